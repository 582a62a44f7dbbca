package scenarios

import (
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/stretchr/testify/assert"
	"github.com/stretchr/testify/require"

	"connlab/results"
)

// goldenRules are those of the kernel that results/golden was recorded on.
var goldenRules = KernelRules{
	Tick:              4 * time.Millisecond,
	LinearSYNTimeouts: 4, TimerRounding: 32 * time.Millisecond, TimeWaitRounding: 2048 * time.Millisecond,
	DelayedACK: 40 * time.Millisecond, ResetReasons: true, ConnectPortStep: 2, RangePortStep: 1, CPUs: 2,
}

// TestBacklog reproduces incident 1: every variant against the mini server, and
// the heart of it against a real redis-server in the same place.
func TestBacklog(t *testing.T) {
	if underRace {
		notRefuted(t, run(t, &Backlog, Options{Variants: []string{"incident", "late-ack-abort", "long-connections"}}))
		return
	}
	for _, tt := range []struct {
		server   string
		variants []string
	}{
		{ServerMini, nil},
		{ServerRedis, []string{"incident", "backlog-2900", "late-ack-abort"}},
	} {
		t.Run(tt.server, func(t *testing.T) {
			saved := savedCounts{}
			rec := run(t, &Backlog, Options{Server: tt.server, Variants: tt.variants, Counters: saved.save})
			allHeld(t, rec)
			if tt.variants == nil {
				checkGolden(t, rec)
				checkDiagnosis(t, rec, saved)
			}
		})
	}
}

// The check must be able to fail: a run without a stall refutes the incident's
// claims, and so does a wrong formula.
func TestBacklogCanFail(t *testing.T) {
	if underRace {
		t.Skip("the judge is the same with the race detector")
	}
	t.Run("no stall", func(t *testing.T) {
		rec := run(t, &Backlog, Options{Variants: []string{"incident"}, Set: []string{"stall=0s", "held=100"}})
		v := rec.Variants[0]
		assert.Equal(t, results.Refuted, v.Verdict, v.Reason)
		assert.Contains(t, v.Reason, metricSymptom)
	})
	t.Run("places without the one more", func(t *testing.T) {
		rec := run(t, &Backlog, Options{Variants: []string{"late-ack-abort"}})
		v := rec.Variants[0]
		require.Equal(t, results.Held, v.Verdict, v.Reason)
		for i := range v.Predictions {
			if p := &v.Predictions[i]; p.Metric == metricResets {
				p.Formula, p.Predicted = "n − B", p.Predicted+1
			}
		}
		v.Judge()
		assert.Equal(t, results.Refuted, v.Verdict, "a queue that holds B, not B+1, must be refuted")
	})
}

func TestBacklogPredictions(t *testing.T) { comparePredictions(t, &Backlog) }

func TestBacklogCheck(t *testing.T) {
	for _, tt := range []struct{ why, set, want string }{
		{"below the range", "hosts=0", "hosts=0 is out of range: 1 to 1000"},
		{"above the range", "rate=20000", "rate=20000 is out of range: 1 to 10000"},
		{"not a number at all", "rate=NaN", "rate=NaN is out of range: 1 to 10000"},
		{"negative time", "stall=-1s", "stall=-1s is out of range: 0s to 5s"},
		{"no such mode", "abort=2", "abort=2 is out of range: 0 to 1"},
		{"nothing to send over", "over-held=true held=0", "over-held=true needs held connections"},
		{"two loads at once", "over-held=true volley-1=10 delay=20ms stall=2s", "volleys are new connections: not with over-held=true"},
		{"a second without a first", "volley-2=10 delay=20ms", "volley-2 needs volley-1"},
		{"no latency, no late ACK", "volley-1=10 stall=2s", "without latency each handshake is over before the next SYN"},
		{"no time for volleys", "volley-1=10 delay=20ms stall=1s", "volleys need a stall of at least 1.5s"},
		{"a first volley that overflows by itself", "volley-1=600 volley-2=10 delay=20ms stall=2s", "volley-1=600 must fit the accept queue of 512 places"},
		{"a second volley that cookies answer", "volley-1=10 volley-2=600 delay=20ms stall=2s", "volley-2=600 must fit the SYN queue of 512 places"},
	} {
		t.Run(tt.why, func(t *testing.T) { refuses(t, &Backlog, tt.set, tt.want) })
	}
	for _, v := range Backlog.Variants {
		e := Backlog.New()
		require.NoError(t, apply(e, v.Set))
		assert.NoError(t, e.Check(), v.Name)
		assert.NoError(t, e.Topology().Check(), v.Name)
	}
}

// Predict must have an answer for whatever Check lets pass.
func TestPredictOverTheRange(t *testing.T) {
	for _, stall := range []string{"0s", "100ms", "1430ms", "5s"} {
		for _, timeout := range []string{"50ms", "400ms", "900ms", "1500ms", "2500ms", "60s"} {
			for _, backlog := range []string{"1", "511", "65535"} {
				for _, more := range []string{"held=10", "over-held=true", "held=0 volley-1=1 delay=5ms", "held=0 volley-1=8000 delay=40ms", "volley-1=1 volley-2=1 delay=20ms abort=1"} {
					e := Backlog.New()
					require.NoError(t, apply(e, strings.Fields("stall="+stall+" timeout="+timeout+" backlog="+backlog+" "+more)))
					if e.Check() != nil {
						continue
					}
					for _, rules := range []KernelRules{goldenRules, {TimerRounding: 80 * time.Millisecond}, {LinearSYNTimeouts: 1}} {
						for _, p := range e.Predict(results.Incident, rules) {
							v := results.Variant{Predictions: []results.Prediction{p}, Metrics: map[string]results.Metric{p.Metric: {Value: p.Predicted, Unit: p.Unit}}}
							v.Judge()
							assert.Equal(t, results.Held, v.Verdict, "%s with %s: a measurement as predicted must hold: %s", p.Metric, spell(e), v.Reason)
							assert.GreaterOrEqual(t, p.Predicted, 0.0, p.Metric)
						}
					}
				}
			}
		}
	}
}

func TestPrepare(t *testing.T) {
	for _, tt := range []struct {
		why  string
		opt  Options
		want string
	}{
		{"unknown variant", Options{Variants: []string{"nope"}}, `incident backlog has no variant "nope"`},
		{"unknown parameter", Options{Set: []string{"nope=1"}}, `unknown parameter "nope"`},
		{"no value", Options{Set: []string{"stall"}}, "want name=value"},
		{"not a duration", Options{Set: []string{"stall=soon"}}, "--set stall=soon"},
		{"out of range", Options{Set: []string{"held=-1"}}, "held=-1 is out of range"},
		{"unknown server", Options{Server: "nope"}, `unknown server "nope"`},
	} {
		t.Run(tt.why, func(t *testing.T) {
			rec, err := Run(t.Context(), &Backlog, tt.opt)
			require.ErrorIs(t, err, ErrUsage)
			assert.Contains(t, err.Error(), tt.want)
			assert.Nil(t, rec)
		})
	}
	t.Run("what is set by hand wins over the variant, and is said", func(t *testing.T) {
		arms, err := Backlog.prepare(Options{Variants: []string{"backlog-2048"}, Set: []string{"backlog=700"}})
		require.NoError(t, err)
		assert.Equal(t, []string{"backlog=2048"}, arms[0].overridden)
		assert.Equal(t, 700, arms[0].experiment.(*backlog).Backlog)
	})
}

func variantNames() []string {
	var names []string
	for _, v := range Backlog.Variants {
		names = append(names, v.Name)
	}
	return names
}

func TestVariantsCoverEveryRole(t *testing.T) {
	roles := map[results.Role]bool{}
	for _, v := range Backlog.Variants {
		roles[v.Role] = true
		assert.NotEmpty(t, v.Summary, v.Name)
	}
	for _, role := range []results.Role{results.Incident, results.FalseLead, results.Fix, results.Control} {
		assert.True(t, roles[role], "no variant is a %s", role)
	}
	names := variantNames()
	slices.Sort(names)
	assert.Equal(t, names, slices.Compact(slices.Clone(names)), "names are unique")
}
