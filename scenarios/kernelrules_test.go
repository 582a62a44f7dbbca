package scenarios

import (
	"testing"
	"time"

	"github.com/stretchr/testify/assert"

	"connlab/netlab"
)

func TestSYNRetriesFollowTheKernel(t *testing.T) {
	assert.Equal(t, netlab.SYNRetries(4, 8), KernelRules{LinearSYNTimeouts: 4}.SYNRetries(8))
	assert.Equal(t, netlab.SYNRetries(0, 8), KernelRules{}.SYNRetries(8))
}

func TestTimerRounding(t *testing.T) {
	for _, tt := range []struct {
		why           string
		tick, d, want time.Duration
	}{
		{"HZ=1000: 1,000 jiffies lie in the level that counts in 64", time.Millisecond, time.Second, 64 * time.Millisecond},
		{"HZ=250: 250 jiffies lie in the level that counts in 8", 4 * time.Millisecond, time.Second, 32 * time.Millisecond},
		{"HZ=100: 100 jiffies lie in the level that counts in 8", 10 * time.Millisecond, time.Second, 80 * time.Millisecond},
		{"HZ=250: TIME_WAIT's 15,000 jiffies lie in the level that counts in 512", 4 * time.Millisecond, timeWaitLength, 2048 * time.Millisecond},
	} {
		t.Run(tt.why, func(t *testing.T) {
			assert.Equal(t, tt.want, timerRounding(tt.tick, tt.d))
		})
	}
}

func TestReadKernelRulesOfThisKernel(t *testing.T) {
	r := ReadKernelRules()
	assert.Contains(t, []int{0, 4}, r.LinearSYNTimeouts)
	assert.Positive(t, r.TimerRounding)
	assert.Less(t, r.TimerRounding, netlab.InitialSYNTimeout/8, "a wheel rounds up by an eighth at most")
}
