package scenarios

import (
	"testing"
	"time"

	"github.com/stretchr/testify/assert"

	"connlab/results"
)

// TestAcceptQueueLookalikes reproduces what incident 5 was taken for.
func TestAcceptQueueLookalikes(t *testing.T) {
	if underRace {
		notRefuted(t, run(t, &Lookalikes, Options{Variants: []string{"tw-recycle", "syn-flood"}}))
		return
	}
	rec := run(t, &Lookalikes, Options{})
	allHeld(t, rec)
	checkGolden(t, rec)
}

// The check must be able to fail: with one clock a run that is called an incident says that
// the symptom is missing.
func TestLookalikesCanFail(t *testing.T) {
	if underRace {
		t.Skip("the judge is the same with the race detector")
	}
	rec := run(t, &Lookalikes, Options{Variants: []string{"tw-recycle"}, Set: []string{"apart=0s", "for=2s"}})
	v := rec.Variants[0]
	assert.Equal(t, results.Refuted, v.Verdict, v.Reason)
	assert.Contains(t, v.Reason, metricSymptom)
}

func TestLookalikesPredictions(t *testing.T) { comparePredictions(t, &Lookalikes) }

func TestLookalikesCheck(t *testing.T) {
	for _, tt := range []struct{ why, set, want string }{
		{"one host", "hosts=1", "hosts=1 is out of range"},
		{"a clock twice", "timestamps=1 timeout=700ms addresses=20", "want a new address for each of 301 connections"},
		{"two chances", "timestamps=1 addresses=40", "less than the first SYN retry"},
		{"not a number", "rate=NaN", "rate=NaN is out of range"},
		{"around the circle", "apart=48h hosts=20", "more than half of the circle"},
		{"too few for the queue", "flood=500 backlog=511 timeout=12s", "does not fill the SYN queue"},
		{"no time for it", "flood=2000 flood-rate=100 backlog=511 timeout=12s", "too short for flood=2000"},
		{"forgotten by then", "flood=2000 backlog=511 for=20s timeout=30s", "longer than the first SYNs of the flood are remembered"},
		{"no patience", "flood=2000 backlog=511", "every client connects in the end"},
		{"another limit before", "flood=2000 backlog=511 timeout=12s cookies=0 max-syn-backlog=512", "last quarter is kept"},
	} {
		t.Run(tt.why, func(t *testing.T) { refuses(t, &Lookalikes, tt.set, tt.want) })
	}
	checkVariants(t, &Lookalikes)
}

func TestLookalikesLoad(t *testing.T) {
	l := newLookalikes()
	l.Rate, l.For, l.Hosts = 10, 2*time.Second, 4
	var at []time.Duration
	for due := range l.load() {
		at = append(at, due)
	}
	assert.Len(t, at, 16)
	assert.Equal(t, []time.Duration{0, 500 * time.Millisecond, 600 * time.Millisecond}, at[:3])
	assert.Equal(t, 4, l.latest(), "the first of every four")
}
