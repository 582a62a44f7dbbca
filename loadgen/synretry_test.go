package loadgen

import (
	"testing"
	"time"

	"github.com/stretchr/testify/assert"
)

func TestRetryOf(t *testing.T) {
	const s = time.Second
	linear, doubling := []time.Duration{1 * s, 2 * s, 3 * s, 4 * s, 5 * s, 7 * s, 11 * s}, []time.Duration{1 * s, 3 * s, 7 * s, 15 * s}
	for _, row := range []struct {
		reason  string
		took    time.Duration
		retries []time.Duration
		want    int
	}{
		{"the first SYN was answered", 200 * time.Microsecond, linear, 0},
		{"answered late, before it was sent again", 999 * time.Millisecond, linear, 0},
		{"at the moment it was sent again", 1 * s, linear, 1},
		{"a tick later", 1016 * time.Millisecond, linear, 1},
		{"two seconds, four linear timeouts", 2016 * time.Millisecond, linear, 2},
		{"two seconds, none: the next one is at three", 2016 * time.Millisecond, doubling, 1},
		{"three seconds, none", 3016 * time.Millisecond, doubling, 2},
		{"the sixth, after the timeout has doubled", 7300 * time.Millisecond, linear, 6},
		{"beyond the last that is known", time.Minute, linear, 7},
		{"none known", time.Minute, nil, 0},
	} {
		assert.Equal(t, row.want, RetryOf(row.took, row.retries), row.reason)
	}
}
