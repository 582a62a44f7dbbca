package observe

import (
	"context"
	"errors"
	"testing"
	"testing/synctest"
	"time"

	"github.com/google/go-cmp/cmp"
	"github.com/stretchr/testify/assert"
	"github.com/stretchr/testify/require"
)

// slowProbe counts its reads; each takes as long as its row says, the last row
// for ever after.
type slowProbe struct {
	takes []time.Duration
	fails int // at this read; 0 never
	reads int64
}

var errProbe = errors.New("probe failed")

func (p *slowProbe) names() []string { return []string{"reads"} }
func (p *slowProbe) close() error    { return nil }
func (p *slowProbe) read(values []int64) ([]int64, error) {
	time.Sleep(p.takes[min(int(p.reads), len(p.takes)-1)])
	p.reads++
	if p.fails > 0 && int(p.reads) == p.fails {
		return values, errProbe
	}
	return append(values[:0], p.reads), nil
}

// runSampler takes a first round and samples every 10 ms, for so long.
func runSampler(t *testing.T, p *slowProbe, long time.Duration) (*group, error) {
	s := newSampler("counters", 0, 10*ms)
	require.NoError(t, s.add("host", func() (probe, error) { return p, nil }))
	start := time.Now()
	require.NoError(t, s.round(start))
	ctx, cancel := context.WithTimeout(t.Context(), long)
	defer cancel()
	err := s.run(ctx, start)
	return s.group(), err
}

func TestSamplerCadence(t *testing.T) {
	for _, tc := range []struct {
		name   string
		takes  []time.Duration
		at     []time.Duration
		missed int
		gap    time.Duration
	}{
		{"reads cost nothing", []time.Duration{0}, []time.Duration{0, 10 * ms, 20 * ms, 30 * ms, 40 * ms, 50 * ms}, 0, 10 * ms},
		{"late by less than an interval is not missed, and the grid stays", []time.Duration{0, 12 * ms, 0}, []time.Duration{0, 10 * ms, 22 * ms, 30 * ms, 40 * ms, 50 * ms}, 0, 12 * ms},
		{"one read of 35 ms costs the rounds at 20 and 30 ms", []time.Duration{0, 35 * ms, 0}, []time.Duration{0, 10 * ms, 45 * ms, 50 * ms}, 2, 35 * ms},
		{"reads slower than the interval, the last one too", []time.Duration{0, 20 * ms}, []time.Duration{0, 10 * ms, 30 * ms, 50 * ms}, 3, 20 * ms},
	} {
		t.Run(tc.name, func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				g, err := runSampler(t, &slowProbe{takes: tc.takes}, 55*ms)
				require.NoError(t, err)
				assert.Empty(t, cmp.Diff(tc.at, g.tracks["host"].at))
				assert.Equal(t, len(tc.at), g.sampling.Rounds)
				assert.Equal(t, tc.missed, g.sampling.Missed)
				assert.Equal(t, tc.gap, g.sampling.LongestGap)
			})
		})
	}
}

func TestSamplerStopsAtAnError(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		g, err := runSampler(t, &slowProbe{takes: []time.Duration{0}, fails: 3}, time.Second)
		require.ErrorIs(t, err, errProbe)
		assert.Equal(t, 2, g.sampling.Rounds, "the round that failed leaves no sample")
		assert.Len(t, g.tracks["host"].at, 2)
	})
}
