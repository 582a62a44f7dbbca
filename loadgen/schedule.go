package loadgen

import (
	"iter"
	"math"
	"math/rand/v2"
	"slices"
	"time"
)

// Schedule yields the times at which operations are due, as offsets from the
// start of the run, in nondecreasing order. It is pure: ranging over it twice
// yields the same times, and nothing happens between two of them.
//
// Schedules over a period d cover [0, d): an arrival that would fall on d is
// left out, so that schedules laid end to end by [Schedule.After] and [Merge]
// have no doubled arrival at the seam. A rate that is not positive, or above
// the clock's resolution of 1e9 per second, or a period that is not positive,
// yields nothing.
type Schedule iter.Seq[time.Duration]

const maxRate = 1e9 // operations per second

// Burst is n operations, all due at the offset at.
func Burst(n int, at time.Duration) Schedule {
	return func(yield func(time.Duration) bool) {
		for range n {
			if !yield(at) {
				return
			}
		}
	}
}

// Constant is rate operations per second for d, evenly spaced: operation i is
// due at i/rate, for all i with i/rate < d. Each time is computed from i, not
// from the one before, so that rounding does not add up.
func Constant(rate float64, d time.Duration) Schedule {
	return Ramp(rate, rate, d)
}

// Ramp is a rate that changes in a straight line from one value to another
// (operations per second) over d. Operation i is due where the integral of the
// rate, from·t + (to−from)·t²/2d, reaches i. One of the two rates may be zero.
func Ramp(from, to float64, d time.Duration) Schedule {
	return func(yield func(time.Duration) bool) {
		if !(min(from, to) >= 0) || !(max(from, to) > 0 && max(from, to) <= maxRate) {
			return
		}
		slope := (to - from) / d.Seconds()
		for i := 0.0; ; i++ {
			// The root of slope/2·t² + from·t − i, in the form that
			// neither cancels nor divides by a slope of zero.
			root := from*from + 2*slope*i
			if root < 0 {
				return // a falling rate reaches zero before the i-th arrival
			}
			due := time.Duration(0)
			if i > 0 {
				due = nanoseconds(2 * i * 1e9 / (from + math.Sqrt(root)))
			}
			if due >= d || !yield(due) {
				return
			}
		}
	}
}

// Poisson is a Poisson process of rate operations per second for d: the gaps
// are independent and exponentially distributed. The same seed gives the same
// arrivals.
func Poisson(rate float64, d time.Duration, seed uint64) Schedule {
	return func(yield func(time.Duration) bool) {
		if !(rate > 0 && rate <= maxRate) {
			return
		}
		random := rand.New(rand.NewPCG(seed, 0))
		for t := random.ExpFloat64() / rate; ; t += random.ExpFloat64() / rate {
			due := nanoseconds(t * 1e9)
			if due >= d || !yield(due) {
				return
			}
		}
	}
}

// nanoseconds converts ns, saturating where a Duration ends (292 years).
func nanoseconds(ns float64) time.Duration {
	if ns >= math.MaxInt64 {
		return math.MaxInt64
	}
	return time.Duration(ns)
}

// After is s moved d later.
func (s Schedule) After(d time.Duration) Schedule {
	return func(yield func(time.Duration) bool) {
		for due := range s {
			if !yield(due + d) {
				return
			}
		}
	}
}

// First is the first n operations of s, or all if there are fewer.
func (s Schedule) First(n int) Schedule {
	return func(yield func(time.Duration) bool) {
		if n <= 0 {
			return
		}
		left := n
		for due := range s {
			left--
			if !yield(due) || left == 0 {
				return
			}
		}
	}
}

// Count is the number of operations in s.
func (s Schedule) Count() int {
	n := 0
	for range s {
		n++
	}
	return n
}

// Merge superposes schedules: all their operations, in order of time. Where
// times are equal the earlier argument comes first. Stages in sequence are a
// superposition too:
//
//	Merge(Constant(100, time.Minute), Ramp(100, 2000, time.Minute).After(time.Minute))
func Merge(parts ...Schedule) Schedule {
	return func(yield func(time.Duration) bool) {
		type head struct {
			due  time.Duration
			next func() (time.Duration, bool)
		}
		var heads []head
		for _, part := range parts {
			next, stop := iter.Pull(iter.Seq[time.Duration](part))
			defer stop()
			if due, ok := next(); ok {
				heads = append(heads, head{due, next})
			}
		}
		for len(heads) > 0 {
			first := 0
			for i := range heads {
				if heads[i].due < heads[first].due {
					first = i
				}
			}
			if !yield(heads[first].due) {
				return
			}
			due, ok := heads[first].next()
			if !ok {
				heads = slices.Delete(heads, first, first+1)
				continue
			}
			heads[first].due = due
		}
	}
}
