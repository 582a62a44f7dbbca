package scenarios

import (
	"math"
	"testing"
	"time"

	"github.com/stretchr/testify/assert"
	"github.com/stretchr/testify/require"

	"connlab/results"
)

// TestAcceptQueue reproduces incident 5, at one in twenty-five of its size.
func TestAcceptQueue(t *testing.T) {
	if underRace {
		notRefuted(t, run(t, &AcceptQueue, Options{Variants: []string{"incident"}}))
		return
	}
	saved := savedCounts{}
	rec := run(t, &AcceptQueue, Options{Counters: saved.save})
	allHeld(t, rec)
	checkGolden(t, rec)
	checkDiagnosis(t, rec, saved)

	incident := find(t, rec, "incident")
	for i := range incident.Predictions {
		if p := &incident.Predictions[i]; p.Metric == metricVictims {
			p.Predicted *= 1.2
		}
	}
	incident.Judge()
	assert.Equal(t, results.Refuted, incident.Verdict, "a model that is wrong by a fifth must be refuted")
}

// The check must be able to fail: with a place for everybody a run that is called an incident
// says that the symptom is missing.
func TestAcceptQueueCanFail(t *testing.T) {
	if underRace {
		t.Skip("the judge is the same with the race detector")
	}
	rec := run(t, &AcceptQueue, Options{Variants: []string{"incident"}, Set: []string{
		"backlog=2400", "somaxconn=2400", "connections=1000", "rate=300", "for=4s",
	}})
	v := rec.Variants[0]
	assert.Equal(t, results.Refuted, v.Verdict, v.Reason)
	assert.Contains(t, v.Reason, metricSymptom)
}

func TestAcceptQueuePredictions(t *testing.T) { comparePredictions(t, &AcceptQueue) }

func TestAcceptQueueCheck(t *testing.T) {
	if underRace {
		t.Skip("arithmetic of one thread, on 75,000 clients")
	}
	for _, tt := range []struct{ why, set, want string }{
		{"nobody", "connections=1", "connections=1 is out of range"},
		{"not a number", "rate=NaN", "rate=NaN is out of range"},
		{"everybody", "share=1", "share=1 is out of range"},
		{"nearly nobody", "connections=100 share=0.1", "too few to be a storm"},
		{"an accept now and then", "accept-rate=1", "accept-rate=1 is out of range"},
		{"more than a process holds", "connections=60000 hosts=2", "room for 38000"},
		{"more than an address holds", "connections=30000 addresses=1", "connect(2) gets slow beyond 10000"},
		{"it ends before all are back", "jitter=30s for=20s", "ends before the last client comes back"},
		{"a back-off above its limit", "base=10s most=1s", "longer than most"},
		{"workers of unequal parts", "accept-rate=201", "want a multiple"},
		{"no patience", "timeout=1ms", "timeout=1ms is out of range"},
	} {
		t.Run(tt.why, func(t *testing.T) { refuses(t, &AcceptQueue, tt.set, tt.want) })
	}
	checkVariants(t, &AcceptQueue)
}

// The smaller size has the article's numbers without dimension.
func TestAcceptQueueScale(t *testing.T) {
	small, full := newStorm(), newStorm()
	v, err := AcceptQueue.Variant("full")
	require.NoError(t, err)
	require.NoError(t, apply(full, v.Set))
	groups := func(s *storm) []float64 {
		places := float64(s.queue().places())
		return []float64{
			float64(s.cut()) / places, s.Rate / float64(s.AcceptRate), float64(s.AcceptRate) * s.Timeout.Seconds() / places, float64(s.AcceptRate) / places,
			s.spread().Seconds(), float64(s.Connections) / float64(s.cut()),
		}
	}
	for i, g := range groups(full) {
		assert.InEpsilon(t, g, groups(small)[i], 0.002, "group %d", i)
	}
	// And the model has the same shares at both, but for the prober, whose part is larger among fewer.
	a, b := small.model(goldenRules).play(), full.model(goldenRules).play()
	assert.InEpsilon(t, float64(b.victims)/75000, float64(a.victims)/3000, 0.05)
	assert.InEpsilon(t, b.fill.Seconds(), a.fill.Seconds(), 0.04)
	assert.InEpsilon(t, quantile(b.recovered, 0.5).Seconds(), quantile(a.recovered, 0.5).Seconds(), 0.05)
}

// The two models are apart, since how CPUs meet decides; but the claim ends a fifth beyond them.
func TestStormClaimsEnd(t *testing.T) {
	s := newStorm()
	out := s.play(goldenRules)
	overflows := func(o stormOutcome) float64 { return float64(o.overflows + o.refused) }
	for _, p := range s.Predict(results.Incident, goldenRules) {
		if p.Metric == metricOverflows {
			assert.False(t, p.Tolerance.Allows(p.Predicted, 1.2*mean(out.lumps, overflows)))
			assert.False(t, p.Tolerance.Allows(p.Predicted, 0.8*mean(out.alone, overflows)))
			assert.True(t, p.Tolerance.Allows(p.Predicted, mean(out.lumps, overflows)))
			assert.True(t, p.Tolerance.Allows(p.Predicted, mean(out.alone, overflows)))
			return
		}
	}
	t.Fatal("no claim")
}

func TestStormWindow(t *testing.T) {
	s := newStorm()
	low, high := s.window()
	assert.InDelta(t, 1999, low, 1e-9)
	assert.InDelta(t, 6000, high, 1e-9)
	assert.Contains(t, s.spellWindow(), "the window is")
	s.Timeout = 2 * time.Second
	assert.Contains(t, s.spellWindow(), "no backlog can save you")
	s.Jitter = 17 * time.Second
	low, _ = s.window()
	assert.Zero(t, low, "they come more slowly than they are accepted")
	s.AcceptRate = 0
	_, high = s.window()
	assert.True(t, math.IsInf(high, 1))
}
