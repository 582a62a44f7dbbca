package pool

import (
	"math"
	"math/rand/v2"
	"net/netip"
	"sync"
	"testing"
	"testing/synctest"
	"time"

	"github.com/stretchr/testify/assert"
	"github.com/stretchr/testify/require"
)

func TestMeanBatch(t *testing.T) {
	e := math.Exp
	for _, c := range []struct {
		name   string
		lambda float64
		k      int
		t      time.Duration
		want   float64
	}{
		{"of one", 1000, 1, 5 * ms, 1},
		{"no command comes after the first", 0, 3, 5 * ms, 1},
		{"no time for it", 1000, 3, 0, 1},
		{"of two: one more comes with 1−e^−x", 200, 2, 5 * ms, 2 - e(-1)},
		{"of three, x = 3: 1 + (1−e^−3) + (1−4e^−3)", 600, 3, 5 * ms, 3 - 5*e(-3)},
		{"no limit: 1+x", 1000, 1_000_000, 5 * ms, 6},
		{"many more than it takes; e^−x is 0", 1e9, 3, time.Second, 3},
		{"hardly any", 1e-9, 3, 5 * ms, 1},
	} {
		assert.InDelta(t, c.want, MeanBatch(c.lambda, c.k, c.t), 1e-9, c.name)
	}
}

func TestBatchDelay(t *testing.T) {
	e := math.Exp
	for _, c := range []struct {
		name   string
		lambda float64
		k      int
		t      time.Duration
		want   float64 // seconds
	}{
		{"of one", 1000, 1, 5 * ms, 0},
		{"no time for it", 1000, 3, 0, 0},
		{"no other comes", 0, 3, 5 * ms, 0.005},
		{"hardly any other comes", 1e-6, 3, 5 * ms, 0.005},
		{"of two: only the first waits, for the second or the time", 200, 2, 5 * ms, (1 - e(-1)) / 200 / (2 - e(-1))},
		{"many more than it takes: (k−1)/2λ", 1e6, 3, 5 * ms, 1e-6},
		{"many more than it takes; e^−x is 0", 1e6, 101, time.Second, 50e-6},
	} {
		assert.InDelta(t, c.want, BatchDelay(c.lambda, c.k, c.t).Seconds(), 2e-9, c.name)
	}
}

// TestTheModelIsTheBatchers sends commands that come as a Poisson process through a
// Batcher to a server that answers at once, at a time of its own: what a command
// waits is what collecting adds. Batches are independent of each other, so the mean
// of n of them with a spread σ differs from the true one by more than 4σ/√n with p <
// 1e-4.
func TestTheModelIsTheBatchers(t *testing.T) {
	const commands = 5000
	for _, c := range []struct {
		lambda float64
		k      int
		t      time.Duration
	}{
		{50, 3, 5 * ms},
		{300, 3, 5 * ms},
		{1000, 3, 5 * ms},
		{5000, 3, 5 * ms},
		{1000, 20, 10 * ms},
		{3000, 20, 10 * ms},
	} {
		synctest.Test(t, func(t *testing.T) {
			s := &pipes{begin: time.Now()}
			b := NewBatcher(netip.AddrPort{}, BatchConfig{Dial: s.connect, Commands: c.k, Delay: c.t})
			random := rand.New(rand.NewPCG(uint64(c.lambda), uint64(c.k)))
			var mu sync.Mutex
			var waited time.Duration
			var calls sync.WaitGroup
			due := s.begin
			for range commands {
				due = due.Add(time.Duration(random.ExpFloat64() / c.lambda * float64(time.Second)))
				time.Sleep(time.Until(due))
				calls.Go(func() {
					start := time.Now()
					_, err := b.Do(t.Context(), "PING", "token")
					assert.NoError(t, err)
					mu.Lock()
					waited += time.Since(start)
					mu.Unlock()
				})
			}
			calls.Wait()
			stats := b.Stats()
			require.NoError(t, b.Close())
			require.EqualValues(t, commands, stats.Commands)

			n := float64(stats.Batches)
			mean := commands / n
			var sizes, squares float64 // of batches
			for _, w := range s.writes {
				sizes += float64(w.Commands)
				squares += float64(w.Commands * w.Commands)
			}
			require.InDelta(t, commands, sizes, 0, "one write for each batch")
			spread := math.Sqrt(max(0, squares/n-mean*mean))
			assert.InDelta(t, MeanBatch(c.lambda, c.k, c.t), mean, 4*spread/math.Sqrt(n)+1e-3, "%+v", c)
			// The waits of a batch are together at most its size times t.
			want := BatchDelay(c.lambda, c.k, c.t).Seconds()
			assert.InEpsilon(t, want, waited.Seconds()/commands, 0.04, "%+v", c)
		})
	}
}
