package loadgen

import (
	"math"
	"runtime"
	"slices"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"
	"github.com/stretchr/testify/assert"
	"github.com/stretchr/testify/require"
)

const ms = time.Millisecond

// times is a schedule of the given times.
func times(due ...time.Duration) Schedule { return Schedule(slices.Values(due)) }

func collect(s Schedule) []time.Duration {
	var due []time.Duration
	for d := range s {
		due = append(due, d)
	}
	return due
}

func TestSchedules(t *testing.T) {
	for _, test := range []struct {
		reason   string
		schedule Schedule
		want     []time.Duration
	}{
		{"a burst is all at once", Burst(3, 5*ms), []time.Duration{5 * ms, 5 * ms, 5 * ms}},
		{"a burst of none", Burst(0, 0), nil},
		{"a burst of less than none", Burst(-1, 0), nil},
		{"the first is due at 0, the one at the period's end is left out", Constant(4, time.Second), []time.Duration{0, 250 * ms, 500 * ms, 750 * ms}},
		{"a fraction of an operation rounds up: the second is due at 0.8 s", Constant(1.25, time.Second), []time.Duration{0, 800 * ms}},
		{"slower than the period still starts with one", Constant(0.001, time.Second), []time.Duration{0}},
		{"thirds of a second are cut to the nanosecond, each for itself", Constant(3, time.Second), []time.Duration{0, 333_333_333, 666_666_666}},
		{"no rate", Constant(0, time.Second), nil},
		{"negative rate", Constant(-1, time.Second), nil},
		{"not a number", Constant(math.NaN(), time.Second), nil},
		{"infinite rate", Constant(math.Inf(1), time.Second), nil},
		{"no period", Constant(10, 0), nil},
		{"negative period", Constant(10, -time.Second), nil},
		{"rising from 0 to 8/s in 1 s: i at sqrt(i/4)", Ramp(0, 8, time.Second), []time.Duration{0, 500 * ms, 707_106_781, 866_025_403}},
		{"falling from 8/s to 0: i at 1−sqrt(1−i/4)", Ramp(8, 0, time.Second), []time.Duration{0, 133_974_596, 292_893_218, 500 * ms}},
		{"a ramp from nothing to nothing", Ramp(0, 0, time.Second), nil},
		{"negative end of a ramp", Ramp(10, -1, time.Second), nil},
		{"Poisson without rate", Poisson(0, time.Second, 1), nil},
		{"Poisson without period", Poisson(10, 0, 1), nil},
		{"moved", times(0, ms).After(3 * ms), []time.Duration{3 * ms, 4 * ms}},
		{"cut short", Constant(1000, time.Hour).First(2), []time.Duration{0, ms}},
		{"cut longer than it is", Burst(1, 0).First(5), []time.Duration{0}},
		{"cut to nothing", Burst(1, 0).First(0), nil},
		{"superposed in order of time", Merge(times(0, 4*ms), times(2*ms, 6*ms), nilSchedule), []time.Duration{0, 2 * ms, 4 * ms, 6 * ms}},
		{"superposed at equal times", Merge(Burst(2, ms), Burst(1, ms)), []time.Duration{ms, ms, ms}},
		{"stages end to end have no doubled arrival at the seam", Merge(Constant(1, 2*time.Second), Constant(2, time.Second).After(2*time.Second)),
			[]time.Duration{0, time.Second, 2 * time.Second, 2500 * ms}},
		{"nothing superposed", Merge(), nil},
	} {
		t.Run(test.reason, func(t *testing.T) {
			got := collect(test.schedule)
			assert.Empty(t, cmp.Diff(test.want, got))
			assert.Empty(t, cmp.Diff(got, collect(test.schedule)), "ranging again")
			assert.Equal(t, len(test.want), test.schedule.Count())
			for range test.schedule {
				break // must not go on, or panic
			}
		})
	}
}

func nilSchedule(func(time.Duration) bool) {}

func TestConstantDoesNotDrift(t *testing.T) {
	// One period of 1/2999 s is cut by up to 1 ns; summed up, the last of
	// these would be due 0.3 ms early.
	const rate, seconds = 2999, 300
	s := Constant(rate, seconds*time.Second)
	last, n := time.Duration(0), 0
	for due := range s {
		if n%rate == 0 {
			require.Equal(t, time.Duration(n/rate)*time.Second, due, "operation %d", n)
		}
		if due < last {
			t.Fatalf("operation %d is due at %v, after one at %v", n, due, last)
		}
		last = due
		n++
	}
	assert.Equal(t, rate*seconds, n)
}

func TestRampFollowsTheIntegralOfTheRate(t *testing.T) {
	for _, r := range []struct{ from, to, seconds float64 }{{100, 3000, 7}, {3000, 100, 7}, {0, 500, 3}, {500, 0, 3}, {777.7, 777.8, 5}} {
		d := time.Duration(r.seconds * 1e9)
		i := 0
		for due := range Ramp(r.from, r.to, d) {
			x := due.Seconds()
			reached := r.from*x + (r.to-r.from)*x*x/(2*r.seconds)
			require.InDelta(t, i, reached, 1e-5, "ramp %v, due %v", r, due)
			i++
		}
		assert.Equal(t, int(math.Ceil((r.from+r.to)/2*r.seconds)), i, "ramp %v", r)
	}
}

func TestPoisson(t *testing.T) {
	const rate, seconds = 1000, 200
	due := collect(Poisson(rate, seconds*time.Second, 42))
	assert.Empty(t, cmp.Diff(due, collect(Poisson(rate, seconds*time.Second, 42))), "same seed")
	assert.NotEmpty(t, cmp.Diff(due[:10], collect(Poisson(rate, seconds*time.Second, 43))[:10]), "other seed")
	assert.True(t, slices.IsSorted(due))
	assert.Less(t, due[len(due)-1], seconds*time.Second)

	// Mean and variance of the number per second are both the rate. With 200
	// seconds the standard error of the mean is 2.2 and of the variance 100.
	counts := make([]float64, seconds)
	for _, d := range due {
		counts[int(d/time.Second)]++
	}
	mean, variance := 0.0, 0.0
	for _, c := range counts {
		mean += c / seconds
	}
	for _, c := range counts {
		variance += (c - mean) * (c - mean) / (seconds - 1)
	}
	assert.InDelta(t, rate, mean, 4*2.24)
	assert.InDelta(t, rate, variance, 4*100)

	// Exponential gaps: a share e⁻ˣ is longer than x/rate.
	longer := 0
	for i := 1; i < len(due); i++ {
		if due[i]-due[i-1] > 2*ms {
			longer++
		}
	}
	assert.InDelta(t, math.Exp(-2), float64(longer)/float64(len(due)), 4*0.0008)
}

func TestMergeOnALockedThread(t *testing.T) {
	// The engine ranges over schedules on a locked thread, and its sources
	// may lock it once more in between.
	runtime.LockOSThread()
	defer runtime.UnlockOSThread()
	n := 0
	for range Merge(Constant(1000, time.Second), Poisson(1000, time.Second, 1), Burst(10, 0)) {
		runtime.LockOSThread()
		n++
		runtime.UnlockOSThread()
	}
	assert.Equal(t, 1010+Poisson(1000, time.Second, 1).Count(), n)
}
