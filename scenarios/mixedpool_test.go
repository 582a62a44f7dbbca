package scenarios

import (
	"testing"

	"github.com/stretchr/testify/assert"

	"connlab/results"
)

// TestMixedPool reproduces the first half of incident 3, beside
// TestTimeWaitBuckets: see there.
func TestMixedPool(t *testing.T) {
	t.Parallel()
	if underRace {
		rec := run(t, &MixedPool, Options{
			Variants: []string{"one-in-ten", "nginx", "pool-too-small", "pool-per-request", "separate", "redigo", "go-redis", "go-redis-ephemeral"},
			Set:      []string{"for=2s"},
		})
		notRefuted(t, rec)
		return
	}
	// The two full-size arms of TestTimeWaitBuckets run first there, so that the one
	// of this scenario runs last: two cores bear one at a time.
	var others []string
	for _, v := range MixedPool.Variants[1:] {
		others = append(others, v.Name)
	}
	saved := savedCounts{}
	rec := run(t, &MixedPool, Options{Variants: append(others, MixedPool.Variants[0].Name), Counters: saved.save})
	allHeld(t, rec)
	checkGolden(t, rec)
	checkDiagnosis(t, rec, saved)

	incident := find(t, rec, "incident")
	for i := range incident.Predictions {
		if p := &incident.Predictions[i]; p.Metric == metricKeepDialed {
			p.Formula, p.Predicted = p.Formula+"·0.98", 0.98*p.Predicted
		}
	}
	incident.Judge()
	assert.Equal(t, results.Refuted, incident.Verdict, "a share that is wrong by a fiftieth must be refuted")
}

// The check must be able to fail: where nobody closes, a run that is called an
// incident says that the symptom is missing.
func TestMixedPoolCanFail(t *testing.T) {
	if underRace {
		t.Skip("the judge is the same with the race detector")
	}
	rec := run(t, &MixedPool, Options{Variants: []string{"one-in-ten"}, Set: []string{"short=0"}})
	v := rec.Variants[0]
	assert.Equal(t, results.Refuted, v.Verdict, v.Reason)
	assert.Contains(t, v.Reason, metricKeepShare)
}

func TestMixedPoolRedis(t *testing.T) {
	if underRace {
		t.Skip("the same code as with the mini server")
	}
	allHeld(t, run(t, &MixedPool, Options{Server: ServerRedis, Variants: []string{"one-in-ten", "nginx-resty", "separate"}}))
}

func TestMixedPoolPredictions(t *testing.T) { comparePredictions(t, &MixedPool) }

func TestMixedPoolCheck(t *testing.T) {
	for _, tt := range []struct{ why, set, want string }{
		{"below the range", "size=0", "size=0 is out of range: 1 to 10000"},
		{"not a number at all", "short=NaN", "short=NaN is out of range"},
		{"no such pool", "pool=none", "pool=none: there is: cosocket, redigo"},
		{"nobody calls", "short=0 keep=0", "nobody calls"},
		{"two loads", "burst=10", "bursts are a load of their own"},
		{"bursts through several pools", "short=0 keep=0 burst=10", "bursts are for one pool"},
		{"bursts that run into each other", "short=0 keep=0 burst=10 instances=1 workers=1 hold=300ms every=200ms", "must be shorter than every"},
		{"a matter of luck", "short=0 keep=0 burst=10 instances=1 workers=1 timeout=1 every=2s", "a matter of luck"},
		{"nothing is idle for long", "timeout=1", "timeout is about idle connections: use bursts"},
		{"nginx's settings in Go", "pool=redigo separate=true", "separate and per-request are about nginx"},
		{"two kinds where there is one", "per-request=true", "set short=0"},
		{"first dials would count", "short=1", "their first dials would count"},
		{"no place by chance", "size=1", "to see that, set burst"},
		{"the pool closes", "short=0 keep=0 burst=10 instances=1 workers=1 every=2s idle=2s", "or the pool closes between two bursts"},
		{"neither steady nor all there", "for=55s instances=16", "how many is chance"},
		{"too many buckets", "short=5000 keep=0 for=70s instances=64", "the web server has 262144 buckets"},
		{"too few ports", "short=5000 keep=5000 for=60s instances=1", "set more instances"},
	} {
		t.Run(tt.why, func(t *testing.T) { refuses(t, &MixedPool, tt.set, tt.want) })
	}
	checkVariants(t, &MixedPool)
}
