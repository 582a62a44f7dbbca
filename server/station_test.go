package server

import (
	"fmt"
	"math/rand/v2"
	"testing"
	"time"

	"github.com/stretchr/testify/assert"
)

// However the rate divides a second, ten seconds of it are ten seconds.
func TestStationKeepsItsRate(t *testing.T) {
	for _, rate := range []int{1, 3, 7, 4096, 99_991, 150_000} {
		var st station
		st.setRate(rate)
		n := 10 * rate
		var done time.Duration
		for range n {
			done = st.serve(0)
		}
		assert.Equal(t, 10*time.Second, done, "%d requests a second", rate)
	}
	var st station
	st.setRate(1_000_000_000)
	assert.Equal(t, []time.Duration{1, 2, 3}, []time.Duration{st.serve(0), st.serve(0), st.serve(0)}, "the highest rate")
}

func TestStation(t *testing.T) {
	const ms = time.Millisecond
	for _, tc := range []struct {
		why    string
		rates  []int // before each request; 0 is no limit
		now    []time.Duration
		expect []time.Duration
	}{
		{"no limit, no wait", []int{0, 0}, []time.Duration{5, 5}, []time.Duration{5, 5}},
		{"who finds it free takes its own time", []int{100, 100}, []time.Duration{0, 10 * ms}, []time.Duration{10 * ms, 20 * ms}},
		{"those before are done first", []int{100, 100, 100}, []time.Duration{0, ms, 2 * ms}, []time.Duration{10 * ms, 20 * ms, 30 * ms}},
		{"idle time cannot be saved up", []int{100, 100, 100}, []time.Duration{0, 500 * ms, 500 * ms}, []time.Duration{10 * ms, 510 * ms, 520 * ms}},
		{"nor can parts of a nanosecond", []int{3, 3, 3}, []time.Duration{0, time.Second, time.Second}, []time.Duration{333333333, 1333333333, 1666666666}},
		{"a new rate is for those to come", []int{100, 100, 1000, 1000}, []time.Duration{0, 0, 0, 0}, []time.Duration{10 * ms, 20 * ms, 21 * ms, 22 * ms}},
		{"no limit ends the queue", []int{1, 1, 0, 1000}, []time.Duration{0, 0, ms, ms}, []time.Duration{1000 * ms, 2000 * ms, ms, 2 * ms}},
	} {
		t.Run(tc.why, func(t *testing.T) {
			var st station
			var done []time.Duration
			for i, now := range tc.now {
				st.setRate(tc.rates[i])
				done = append(done, st.serve(now))
			}
			assert.Equal(t, tc.expect, done)
		})
	}
}

// The mean wait in the queue is that of M/D/1, ρ/(2µ(1-ρ)) by Pollaczek and Khinchine.
func TestStationIsMD1(t *testing.T) {
	const rate, n = 150_000, 1_000_000
	for _, load := range []float64{0.2, 0.5, 0.8, 0.9} {
		t.Run(fmt.Sprint(load), func(t *testing.T) {
			random := rand.New(rand.NewPCG(1, 2)) // the same arrivals each time: what the test finds is no matter of luck
			var st station
			st.setRate(rate)
			var now, waited float64 // seconds
			for range n {
				now += random.ExpFloat64() / (load * rate)
				at := time.Duration(now * float64(time.Second))
				waited += (st.serve(at) - at).Seconds() - 1./rate
			}
			assert.InEpsilon(t, load/(2*rate*(1-load)), waited/n, 0.03)
		})
	}
}
