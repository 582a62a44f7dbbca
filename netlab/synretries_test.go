package netlab

import (
	"testing"
	"time"

	"github.com/stretchr/testify/assert"
)

func TestSYNRetries(t *testing.T) {
	const s = time.Second
	for _, row := range []struct {
		reason string
		linear int
		want   []time.Duration
	}{
		{"Linux 6.5 and later: four linear timeouts, then doubling", 4, []time.Duration{1 * s, 2 * s, 3 * s, 4 * s, 5 * s, 7 * s, 11 * s, 19 * s}},
		{"before: doubling from the first", 0, []time.Duration{1 * s, 3 * s, 7 * s, 15 * s, 31 * s, 63 * s}},
		{"set to 1 by hand", 1, []time.Duration{1 * s, 2 * s, 4 * s, 8 * s}},
		{"fewer than the linear ones", 4, []time.Duration{1 * s, 2 * s}},
		{"none", 4, []time.Duration{}},
	} {
		assert.Equal(t, row.want, SYNRetries(row.linear, len(row.want)), row.reason)
	}
}
