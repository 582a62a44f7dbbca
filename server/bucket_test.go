package server

import (
	"math/rand/v2"
	"testing"
	"time"

	"github.com/stretchr/testify/assert"
)

// drain takes all tokens that are there and returns their number.
func drain(b *bucket, now time.Duration) (n int) {
	for b.fill(now); !b.empty(); b.take() {
		n++
	}
	return n
}

// However irregularly it is looked at, at most AcceptBurst apart, a bucket that is drained each time gives exactly its rate.
func TestBucketIsExact(t *testing.T) {
	for _, rate := range []int{1, 3, 7, 10, 499, 501, 1000, 33_333, 999_999, maxAcceptRate} {
		var b bucket
		const start, length = 5 * time.Second, 10 * time.Second
		b.setRate(rate, start)
		got, now := 0, start
		for now < start+length {
			now = min(now+time.Duration(rand.Int64N(int64(AcceptBurst)+1)), start+length)
			got += drain(&b, now)
		}
		assert.Equal(t, 10*rate, got, "%d a second", rate)
	}
}

func TestBucket(t *testing.T) {
	for _, tc := range []struct {
		why    string
		rate   int
		passed time.Duration // since it was empty
		want   int
	}{
		{"nothing yet", 1000, 999_999 * time.Nanosecond, 0},
		{"one, just now", 1000, time.Millisecond, 1},
		{"the longest pause that costs nothing", 1000, AcceptBurst, 100},
		{"beyond it, there is one more to save up", 1000, AcceptBurst + time.Millisecond, 101},
		{"and no other", 1000, time.Second, 101},
		{"not even in a long life", maxAcceptRate, 100 * 365 * 24 * time.Hour, 100_001},
		{"a rate below the burst saves up one", 1, time.Hour, 1},
	} {
		var b bucket
		b.setRate(tc.rate, time.Second)
		assert.Equal(t, tc.want, drain(&b, time.Second+tc.passed), tc.why)
	}
}

// While somebody waits, a pause of the machine costs nothing of the rate; of a quiet time only AcceptBurst is kept.
func TestBucketOwes(t *testing.T) {
	for _, tc := range []struct {
		why    string
		owed   bool
		passed time.Duration
		want   int
	}{
		{"who waits loses nothing", true, 3 * time.Second, 3000},
		{"up to a limit", true, time.Hour, 10_001},
		{"of a quiet time not all is kept", false, 3 * time.Second, 101},
	} {
		var b bucket
		b.setRate(1000, time.Second)
		b.owed = tc.owed
		assert.Equal(t, tc.want, drain(&b, time.Second+tc.passed), tc.why)
	}
	var b bucket
	b.setRate(1000, time.Second)
	b.owed = true
	b.fill(4 * time.Second)
	b.idle()
	assert.Equal(t, 101, drain(&b, 4*time.Second), "nobody waits any more")
}

// When a batch is due it is there, and a nanosecond before it is not.
func TestBucketIsDue(t *testing.T) {
	for _, tc := range []struct {
		rate, batch int
		after       time.Duration
	}{
		{1, 1, time.Second},
		{3, 1, 333_333_334},
		{500, 1, 2 * time.Millisecond},
		{1000, 2, 2 * time.Millisecond},
		{maxAcceptRate, 2000, 2 * time.Millisecond},
	} {
		for _, early := range []time.Duration{0, 1} {
			var b bucket
			b.setRate(tc.rate, time.Second)
			assert.Equal(t, time.Second+tc.after, b.due(), "%d a second", tc.rate)
			assert.Equal(t, tc.batch-int(early), drain(&b, b.due()-early), "%d a second, %d ns before", tc.rate, early)
		}
	}
}

func TestBucketWithoutRate(t *testing.T) {
	var b bucket
	b.setRate(5, time.Second)
	b.setRate(0, 2*time.Second)
	b.fill(3 * time.Second)
	for range 1000 {
		assert.False(t, b.empty())
		b.take()
	}
	assert.LessOrEqual(t, b.due(), 3*time.Second, "nothing to wait for")
	b.setRate(5, 3*time.Second)
	assert.Equal(t, 1, drain(&b, 3200*time.Millisecond), "of the time without a rate nothing is saved up")
	b.setRate(5, 3500*time.Millisecond)
	assert.Equal(t, 1, drain(&b, 3400*time.Millisecond), "the same rate is no new one")
}
