package scenarios

import (
	"math"
	"strings"
	"testing"
	"time"

	"github.com/stretchr/testify/assert"

	"connlab/results"
)

// TestTimeWaitBuckets reproduces the second half of incident 3. It takes longer
// than TIME_WAIT does, and is idle for most of it: so it runs beside TestMixedPool,
// which has to wait as long.
func TestTimeWaitBuckets(t *testing.T) {
	t.Parallel()
	if underRace {
		rec := run(t, &TimeWaitBuckets, Options{Variants: []string{"compressed", "step", "server-first", "linger-0"}})
		notRefuted(t, rec)
		return
	}
	saved := savedCounts{}
	rec := run(t, &TimeWaitBuckets, Options{Counters: saved.save})
	allHeld(t, rec)
	checkGolden(t, rec)
	checkDiagnosis(t, rec, saved)

	compressed := find(t, rec, "compressed")
	for i := range compressed.Predictions {
		if p := &compressed.Predictions[i]; p.Metric == metricTWOverflow {
			p.Formula, p.Predicted = "n − M + 3", p.Predicted+meet+1
		}
	}
	compressed.Judge()
	assert.Equal(t, results.Refuted, compressed.Verdict, "a limit of three buckets less must be refuted")
}

// The check must be able to fail: without a trail nobody is reset, and a run that
// is called an incident says so.
func TestTimeWaitBucketsCanFail(t *testing.T) {
	if underRace {
		t.Skip("the judge is the same with the race detector")
	}
	rec := run(t, &TimeWaitBuckets, Options{Variants: []string{"compressed"}, Set: []string{"trail=0s"}})
	v := rec.Variants[0]
	assert.Equal(t, results.Refuted, v.Verdict, v.Reason)
	assert.Contains(t, v.Reason, metricOutRsts+".All")
}

// A real Redis cannot be told to close late; what does not ask for that must hold.
func TestTimeWaitBucketsRedis(t *testing.T) {
	if underRace {
		t.Skip("the same code as with the mini server")
	}
	rec := run(t, &TimeWaitBuckets, Options{Server: ServerRedis, Variants: []string{"prompt", "linger-0", "server-first"}})
	allHeld(t, rec)
	rec = run(t, &TimeWaitBuckets, Options{Server: ServerRedis, Variants: []string{"compressed"}})
	assert.Equal(t, results.Skipped, rec.Variants[0].Verdict)
	assert.Contains(t, rec.Variants[0].Reason, "cannot be told to be late")
}

func TestTimeWaitBucketsPredictions(t *testing.T) { comparePredictions(t, &TimeWaitBuckets) }

func TestTimeWaitModel(t *testing.T) {
	w := newTimeWait()
	w.Buckets = 1000
	rules := KernelRules{TimeWaitRounding: 2 * time.Second, DelayedACK: 40 * time.Millisecond}
	for _, tt := range []struct {
		why              string
		leg              timeWaitLeg
		overflow, resets float64
	}{
		{"fewer closes than buckets", timeWaitLeg{rate: 100, closes: 999, trail: time.Second}, 0, 0},
		{"one more than fits", timeWaitLeg{rate: 100, closes: 1001, trail: time.Second}, 1, 1},
		{"as late as a delayed ACK: FIN and ACK are one segment", timeWaitLeg{rate: 100, closes: 1001, trail: 40 * time.Millisecond}, 1, 0},
		{"later", timeWaitLeg{rate: 100, closes: 1001, trail: 41 * time.Millisecond}, 1, 1},
		{"for longer than TIME_WAIT, below M/R", timeWaitLeg{rate: 15.8, closes: 16 * 65, trail: time.Second}, 0, 0},
		{"above: r·R − M, R = the wait for the FIN, 60 s and a lump", timeWaitLeg{rate: 20, closes: 20 * 65, trail: 540 * time.Millisecond}, 20*62.5 - 1000, 20*62.5 - 1000},
	} {
		t.Run(tt.why, func(t *testing.T) {
			assert.InDelta(t, tt.overflow, w.overflow(tt.leg, rules), 1e-9)
			assert.InDelta(t, tt.resets, w.resets(tt.leg, rules), 1e-9)
		})
	}
	w.FinTimeout = 61
	assert.Zero(t, w.resets(timeWaitLeg{rate: 100, closes: 5000, trail: time.Second}, rules), "a whole socket waits for the FIN")
	w.Close = closeServer
	assert.Zero(t, w.overflow(timeWaitLeg{rate: 100, closes: 5000}, rules), "who closes second has nothing to remember")
	w.Close = closeReset
	assert.InDelta(t, 5000, w.resets(timeWaitLeg{rate: 100, closes: 5000}, rules), 0, "each close is an RST")
}

func TestTimeWaitBucketsCheck(t *testing.T) {
	for _, tt := range []struct{ why, set, want string }{
		{"below the range", "buckets=1", "buckets=1 is out of range: 10 to 1e+06"},
		{"not a number at all", "rate=NaN", "rate=NaN is out of range"},
		{"no such way to close", "close=nicely", "close=nicely: there is: client, server, reset"},
		{"two experiments", "trails=1ms loads=1", "trails and loads are two experiments"},
		{"a trail of nobody", "close=server", "with close=server set trail=0s"},
		{"too few ports", "instances=4 closes=150000", "37500 ports each: set more instances"},
		{"too long", "rate=1 closes=1000", "two minutes at most"},
		{"a load too high", "buckets=1000000 loads=2", "20000 at most"},
		{"one trail too late", "trails=10ms,2s", "trails=2s is out of range"},
		{"as long as chance decides", "buckets=1000 rate=10 closes=620", "how many is chance"},
		{"a trail that chance decides", "trail=40ms", "on which side it falls is chance"},
		{"one of several trails", "trails=10ms,30ms", "on which side it falls is chance"},
		{"more open than Redis takes", "trails=1s rate=15000", "Redis takes 10000"},
		{"beyond the first period", "buckets=100 rate=10 closes=1100", "the story repeats itself"},
	} {
		t.Run(tt.why, func(t *testing.T) { refuses(t, &TimeWaitBuckets, tt.set, tt.want) })
	}
	for _, bad := range []string{"trails=20ms,20ms", "trails=soon", "loads=1,,2", "loads=" + strings.Repeat("1,", 30)} {
		assert.Error(t, apply(TimeWaitBuckets.New(), []string{bad}), bad)
	}
	checkVariants(t, &TimeWaitBuckets)
}

// What the model says of lumps, counted one close after the other.
func TestTimeWaitModelByCounting(t *testing.T) {
	const rate, buckets = 20.0, 1000
	rules := KernelRules{TimeWaitRounding: 2 * time.Second, DelayedACK: 40 * time.Millisecond}
	w := newTimeWait()
	w.Buckets = buckets
	leg := timeWaitLeg{rate: rate, closes: int(rate * loadsFor.Seconds()), trail: 140 * time.Millisecond}
	for _, phase := range []float64{0.01, 0.5, 1, 1.7, 1.99} {
		var ends []float64 // of the buckets taken, in order
		overflow := 0
		for i := range leg.closes {
			at := float64(i) / rate
			for len(ends) > 0 && ends[0] <= at {
				ends = ends[1:]
			}
			if len(ends) == buckets {
				overflow++
				continue
			}
			end := at + 0.1 + 60 // and then the wheel's next lump
			ends = append(ends, phase+2*math.Ceil((end-phase)/2))
		}
		assert.InDelta(t, w.overflow(leg, rules), overflow, 2, "the first lump %v s after the first close", phase)
	}
}
