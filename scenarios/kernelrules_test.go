package scenarios

import (
	"testing"
	"time"

	"github.com/stretchr/testify/assert"
)

func TestSYNRetries(t *testing.T) {
	s := time.Second
	for _, tt := range []struct {
		why    string
		linear int
		want   []time.Duration
	}{
		{"Linux 6.5 and later: four linear timeouts, then doubling", 4, []time.Duration{1 * s, 2 * s, 3 * s, 4 * s, 5 * s, 7 * s, 11 * s}},
		{"before: doubling from the first", 0, []time.Duration{1 * s, 3 * s, 7 * s, 15 * s, 31 * s}},
		{"set to 1 by hand", 1, []time.Duration{1 * s, 2 * s, 4 * s, 8 * s}},
	} {
		t.Run(tt.why, func(t *testing.T) {
			assert.Equal(t, tt.want, KernelRules{LinearSYNTimeouts: tt.linear}.SYNRetries(len(tt.want)))
		})
	}
}

func TestTimerRounding(t *testing.T) {
	for _, tt := range []struct {
		why        string
		tick, want time.Duration
	}{
		{"HZ=1000: 1,000 jiffies lie in the level that counts in 64", time.Millisecond, 64 * time.Millisecond},
		{"HZ=250: 250 jiffies lie in the level that counts in 8", 4 * time.Millisecond, 32 * time.Millisecond},
		{"HZ=100: 100 jiffies lie in the level that counts in 8", 10 * time.Millisecond, 80 * time.Millisecond},
	} {
		t.Run(tt.why, func(t *testing.T) {
			assert.Equal(t, tt.want, timerRounding(tt.tick))
		})
	}
}

func TestReadKernelRulesOfThisKernel(t *testing.T) {
	r := ReadKernelRules()
	assert.Contains(t, []int{0, 4}, r.LinearSYNTimeouts)
	assert.Positive(t, r.TimerRounding)
	assert.Less(t, r.TimerRounding, initialSYNTimeout/8, "a wheel rounds up by an eighth at most")
}
