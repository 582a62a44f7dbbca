package wire

import (
	"cmp"
	"fmt"
	"math/rand/v2"
	"slices"
	"testing"
	"time"

	"github.com/stretchr/testify/assert"
	"github.com/stretchr/testify/require"
)

// Whatever the holds, packets come off in the order of due time and then of
// arrival, as a stable sort has them; pushes and pops alternate.
func TestDelayLineOrder(t *testing.T) {
	type arrival struct {
		due time.Duration
		p   *Packet
	}
	r := rand.New(rand.NewPCG(5, 6))
	for range 300 {
		var line delayLine
		var model []arrival
		instants := 1 + r.IntN(20) // few: ties are frequent
		for range 200 {
			if r.IntN(3) > 0 {
				a := arrival{time.Duration(r.IntN(instants)), line.take()}
				line.push(a.p, a.due)
				model = append(model, a)
				slices.SortStableFunc(model, func(a, b arrival) int { return cmp.Compare(a.due, b.due) })
			} else if len(model) > 0 {
				due, ok := line.front()
				require.True(t, ok)
				require.Equal(t, model[0].due, due)
				p := line.pop()
				require.Same(t, model[0].p, p)
				line.give(p)
				model = model[1:]
			}
			require.Equal(t, len(model) == 0, line.empty())
		}
	}
}

func TestDelayLineIsBounded(t *testing.T) {
	var line delayLine
	for range MaxInFlight {
		require.False(t, line.full())
		line.push(line.take(), 0)
	}
	assert.True(t, line.full())
	p := line.pop()
	assert.False(t, line.full())
	line.give(p)
	assert.Same(t, p, line.take(), "the buffer serves again")
}

// BenchmarkDelayLine is a push and a pop of a packet held as long as all others,
// by how many are in flight.
func BenchmarkDelayLine(b *testing.B) {
	for _, inFlight := range []int{1, 64, 1000, 30_000} {
		b.Run(fmt.Sprint(inFlight), func(b *testing.B) {
			var line delayLine
			due := time.Duration(0)
			for range inFlight - 1 {
				due++
				line.push(line.take(), due)
			}
			b.ReportAllocs()
			for b.Loop() {
				due++
				line.push(line.take(), due)
				line.give(line.pop())
			}
		})
	}
}
