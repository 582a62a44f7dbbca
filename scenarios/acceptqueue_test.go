package scenarios

import (
	"testing"
	"time"

	"github.com/stretchr/testify/assert"
)

// linear is a kernel since 6.5, without timer rounding: whole seconds.
var linear = KernelRules{LinearSYNTimeouts: 4}

func articleQueue(backlog, somaxconn int) acceptQueue {
	return acceptQueue{
		Backlog: backlog, Somaxconn: somaxconn,
		Rate: 2000, Stall: 1430 * time.Millisecond, Retries: linear.SYNRetries(5),
	}
}

func TestAcceptQueueVictims(t *testing.T) {
	for _, tt := range []struct {
		why                string
		backlog, somaxconn int
		want               float64
	}{
		{"the incident: 2,860 arrivals, 512 places", 511, 4096, 2348},
		{"the remedy that was tried", 2048, 4096, 811},
		{"a backlog cut to somaxconn", 2048, 128, 2731},
		{"the last place that is missing", 2858, 4096, 1},
		{"just enough: λT−1", 2859, 4096, 0},
		{"more than enough", 4096, 4096, 0},
	} {
		t.Run(tt.why, func(t *testing.T) {
			assert.InDelta(t, tt.want, articleQueue(tt.backlog, tt.somaxconn).victims(), 1e-6)
		})
	}
}

func TestAcceptQueueAttempts(t *testing.T) {
	for _, tt := range []struct {
		why   string
		queue acceptQueue
		want  float64
	}{
		// Full after 0.256 s. Dropped once: all of the 1.174 s left. Dropped
		// again at their first retry: who came in the 0.43−0.256 s before.
		{"the incident: 2,348 first SYNs and 348 retries", articleQueue(511, 4096), 2348 + 348},
		// Full after 1.0245 s: whoever is dropped retries when the stall is over.
		{"a queue so long that every retry comes after the stall", articleQueue(2048, 4096), 811},
		{"no overflow, no attempt", articleQueue(2900, 4096), 0},
	} {
		t.Run(tt.why, func(t *testing.T) {
			assert.InDelta(t, tt.want, tt.queue.attempts(), 1e-6)
		})
	}
}

func TestAcceptQueueUnserved(t *testing.T) {
	for _, tt := range []struct {
		why     string
		backlog int
		timeout time.Duration
		want    float64
	}{
		{"patience outlasts the stall", 511, 2 * time.Second, 0},
		{"the queue was full before patience would have mattered: all who got a place", 511, 900 * time.Millisecond, 512},
		{"room for all: those of the first 0.53 s", 2900, 900 * time.Millisecond, 1060},
	} {
		t.Run(tt.why, func(t *testing.T) {
			assert.InDelta(t, tt.want, articleQueue(tt.backlog, 4096).unserved(tt.timeout), 1e-6)
		})
	}
}

// The closed formulas must agree with a count over every single client.
func TestAcceptQueueAgainstCounting(t *testing.T) {
	for _, stall := range []time.Duration{0, 100 * time.Millisecond, 1430 * time.Millisecond, 3500 * time.Millisecond} {
		for _, backlog := range []int{1, 128, 511, 2048, 5000} {
			for _, rules := range []KernelRules{linear, {}} {
				for _, timeout := range []time.Duration{900 * time.Millisecond, 2500 * time.Millisecond, 20 * time.Second} {
					q := acceptQueue{Backlog: backlog, Somaxconn: 4096, Rate: 2000, Stall: stall}
					for _, at := range rules.SYNRetries(8) {
						if at < timeout {
							q.Retries = append(q.Retries, at)
						}
					}
					victims, attempts, byRetry, gaveUp := count(q)
					assert.InDelta(t, victims, q.victims(), 1.5, "%+v", q)
					assert.InDelta(t, attempts, q.attempts(), 8, "%+v", q)
					assert.InDelta(t, gaveUp, q.gaveUp(), 1.5, "%+v", q)
					for k, n := range q.byRetry() {
						assert.InDelta(t, byRetry[k], n, 3, "retry %d of %+v", k, q)
					}
				}
			}
		}
	}
}

// count plays the stall client by client.
func count(q acceptQueue) (victims, attempts float64, byRetry []float64, gaveUp float64) {
	byRetry = make([]float64, len(q.Retries)+1)
	full := q.fill()
	gap := time.Duration(float64(time.Second) / q.Rate)
	for first := time.Duration(0); first < q.Stall; first += gap {
		if first < full {
			continue
		}
		victims++
		attempts++
		connected := false
		for k, retry := range q.Retries {
			if first+retry >= q.Stall {
				byRetry[k+1]++
				connected = true
				break
			}
			attempts++
		}
		if !connected {
			gaveUp++
		}
	}
	return victims, attempts, byRetry, gaveUp
}
