package results

import (
	"maps"
	"math"
	"math/rand/v2"
	"slices"
	"testing"

	"github.com/google/go-cmp/cmp"
	"github.com/google/go-cmp/cmp/cmpopts"
	"github.com/stretchr/testify/assert"
	"github.com/stretchr/testify/require"
)

func TestToleranceAllows(t *testing.T) {
	tests := []struct {
		why                 string
		tolerance           Tolerance
		predicted, measured float64
		want                bool
	}{
		{"equal is exact", Exactly(), 512, 512, true},
		{"one off is not exact", Exactly(), 512, 513, false},
		{"nothing predicted, nothing measured", Exactly(), 0, 0, true},

		{"the upper bound is inside", Within(0.05), 200, 210, true},
		{"the lower bound is inside", Within(0.05), 200, 190, true},
		{"just above", Within(0.05), 200, 211, false},
		{"just below", Within(0.05), 200, 189, false},
		{"five percent of 0 is 0", Within(0.05), 0, 1, false},
		{"the size of a negative prediction counts", Within(0.1), -100, -109, true},

		{"the distance is inside", PlusMinus(1), 5, 6, true},
		{"beyond the distance", PlusMinus(1), 5, 7, false},
		{"it works for 0, unlike a fraction", PlusMinus(1), 0, 1, true},

		{"the bound itself", AtLeast(), 71, 71, true},
		{"above", AtLeast(), 71, 1e6, true},
		{"below", AtLeast(), 71, 70, false},
		{"the bound itself", AtMost(), 71, 71, true},
		{"below", AtMost(), 71, 0, true},
		{"above", AtMost(), 71, 72, false},

		{"the highest count that the test lets hold", Poisson(1e-4), 23.3, 44, true},
		{"one more", Poisson(1e-4), 23.3, 45, false},
		{"the lowest", Poisson(1e-4), 23.3, 7, true},
		{"one fewer", Poisson(1e-4), 23.3, 6, false},
		{"a higher level refutes sooner", Poisson(0.05), 23.3, 44, false},
		{"half a collision is no count", Poisson(1e-4), 23.3, 23.5, false},
		{"impossible but for none", Poisson(1e-4), 0, 1, false},
		{"not a single success of three where half are expected", Binomial(3, 0.2), 1.5, 0, true},
		{"of ten", Binomial(10, 0.2), 5, 0, false},
		{"more than there are trials", Binomial(3, 1e-300), 1.5, 4, false},
		{"a level that is none allows nothing", Poisson(0), 5, 5, false},
		{"more expected than there are trials allows nothing", Binomial(3, 0.05), 4, 3, false},

		{"no tolerance allows nothing", Tolerance{}, 1, 1, false},
		{"nothing near NaN", PlusMinus(1e300), 1, nan, false},
	}
	for _, tt := range tests {
		assert.Equal(t, tt.want, tt.tolerance.Allows(tt.predicted, tt.measured),
			"%s: %v of %v, measured %v", tt.why, tt.tolerance, tt.predicted, tt.measured)
	}
}

func TestToleranceString(t *testing.T) {
	tests := map[string]Tolerance{
		"exact": Exactly(), "±5 %": Within(0.05), "±7 %": Within(0.07), "±0.25 %": Within(0.0025),
		"±3": PlusMinus(3), "±1,500": PlusMinus(1500), "≥": AtLeast(), "≤": AtMost(), "none": {},
		"Poisson test, level 0.01 %": Poisson(1e-4), "binomial test, 1,000 trials, level 5 %": Binomial(1000, 0.05),
	}
	for want, tolerance := range tests {
		assert.Equal(t, want, tolerance.String())
	}
}

func TestJudge(t *testing.T) {
	const name = "server/Drops"
	predict := func(predicted float64, tolerance Tolerance) Prediction {
		return Prediction{Metric: name, Predicted: predicted, Unit: "SYNs", Tolerance: tolerance}
	}
	measure := func(x float64) map[string]Metric { return map[string]Metric{name: {x, "SYNs"}} }

	tests := []struct {
		why         string
		predictions []Prediction
		metrics     map[string]Metric
		voids       []string
		want        Verdict
		reason      string
		verdicts    []Verdict // of the predictions
		errors      []*float64
	}{
		{
			why:         "inside the tolerance; the error is a fraction of the predicted value",
			predictions: []Prediction{predict(800, Within(0.05))}, metrics: measure(810),
			want: Held, reason: "1 of 1 predictions held", verdicts: []Verdict{Held}, errors: []*float64{new(0.0125)},
		},
		{
			why:         "outside: the reason names claim, both values, error and tolerance",
			predictions: []Prediction{predict(800, Within(0.05))}, metrics: measure(1200),
			want: Refuted, reason: "server/Drops: predicted 800 SYNs, measured 1,200 SYNs (+50.0 %, allowed ±5 %)",
			verdicts: []Verdict{Refuted}, errors: []*float64{new(0.5)},
		},
		{
			why:         "predicted 0: the error is the difference",
			predictions: []Prediction{predict(0, Exactly())}, metrics: measure(12),
			want: Refuted, reason: "server/Drops: predicted 0 SYNs, measured 12 SYNs (+12, allowed exact)",
			verdicts: []Verdict{Refuted}, errors: []*float64{new(12.0)},
		},
		{
			why:         "predicted 0 and measured 0 is a measurement like any other",
			predictions: []Prediction{predict(0, Exactly())}, metrics: measure(0),
			want: Held, reason: "1 of 1 predictions held", verdicts: []Verdict{Held}, errors: []*float64{new(0.0)},
		},
		{
			why:         "an unmeasured metric is void, not 0",
			predictions: []Prediction{predict(0, Exactly())}, metrics: nil,
			want: Void, reason: "server/Drops was not measured", verdicts: []Verdict{Void}, errors: []*float64{nil},
		},
		{
			why:         "NaN is not a measurement",
			predictions: []Prediction{predict(800, AtMost())}, metrics: measure(nan),
			want: Void, reason: "server/Drops was not measured", verdicts: []Verdict{Void}, errors: []*float64{nil},
		},
		{
			why:         "infinity is not a measurement, even where it would be at least anything",
			predictions: []Prediction{predict(800, AtLeast())}, metrics: measure(inf),
			want: Void, reason: "server/Drops was not measured", verdicts: []Verdict{Void}, errors: []*float64{nil},
		},
		{
			why:         "another unit is another quantity",
			predictions: []Prediction{predict(1, Exactly())}, metrics: map[string]Metric{name: {1, "ms"}},
			want: Void, reason: `server/Drops: predicted in "SYNs", measured in "ms"`,
			verdicts: []Verdict{Void}, errors: []*float64{nil},
		},
		{
			why:         "a refutation stands beside a claim that could not be checked",
			predictions: []Prediction{{Metric: "server/Missing", Tolerance: Exactly()}, predict(800, Exactly())}, metrics: measure(801),
			want: Refuted, reason: "server/Drops: predicted 800 SYNs, measured 801 SYNs (+0.1 %, allowed exact)",
			verdicts: []Verdict{Void, Refuted}, errors: []*float64{nil, new(1.0 / 800)},
		},
		{
			why:         "the first of two refutations is named",
			predictions: []Prediction{predict(1, AtMost()), predict(9, AtLeast())}, metrics: measure(5),
			want: Refuted, reason: "server/Drops: predicted 1 SYNs, measured 5 SYNs (+400.0 %, allowed ≤)",
			verdicts: []Verdict{Refuted, Refuted}, errors: []*float64{new(4.0), new((5.0 - 9) / 9)},
		},
		{
			why:         "one held and one void claim make no held variant",
			predictions: []Prediction{predict(5, Exactly()), {Metric: "server/Missing", Tolerance: Exactly()}}, metrics: measure(5),
			want: Void, reason: "server/Missing was not measured", verdicts: []Verdict{Held, Void}, errors: []*float64{new(0.0), nil},
		},
		{
			why:         "a void condition wins over held; the numbers stay for people to see",
			predictions: []Prediction{predict(5, Exactly())}, metrics: measure(5), voids: []string{"the generator fell behind"},
			want: Void, reason: "the generator fell behind", verdicts: []Verdict{Void}, errors: []*float64{new(0.0)},
		},
		{
			why:         "a void condition wins over refuted, and two add up",
			predictions: []Prediction{predict(5, Exactly())}, metrics: measure(10), voids: []string{"late", "no probe", "late"},
			want: Void, reason: "late; no probe", verdicts: []Verdict{Void}, errors: []*float64{new(1.0)},
		},
		{
			why:  "who claims nothing shows nothing",
			want: Void, reason: "nothing predicted", metrics: measure(5),
		},
		{
			why:         "a forgotten tolerance is not an exact one",
			predictions: []Prediction{predict(5, Tolerance{})}, metrics: measure(5),
			want: Void, reason: "server/Drops: no tolerance is stated", verdicts: []Verdict{Void}, errors: []*float64{nil},
		},
		{
			why:         "a negative tolerance allows nothing and refutes nothing",
			predictions: []Prediction{predict(5, PlusMinus(-1))}, metrics: measure(5),
			want: Void, reason: `server/Drops: tolerance "plus-minus" cannot have the amount -1`, verdicts: []Verdict{Void}, errors: []*float64{nil},
		},
		{
			why:         "a random outcome within the band of its test",
			predictions: []Prediction{predict(23.3, Poisson(1e-4))}, metrics: measure(7),
			want: Held, reason: "1 of 1 predictions held", verdicts: []Verdict{Held}, errors: []*float64{new((7 - 23.3) / 23.3)},
		},
		{
			why:         "half the formula's mean is refuted, with the band that it missed",
			predictions: []Prediction{predict(116.5, Poisson(1e-4))}, metrics: measure(58),
			want: Refuted, reason: "server/Drops: predicted 116.5 SYNs, measured 58 SYNs (-50.2 %, allowed 77–161 by Poisson test, level 0.01 %)",
			verdicts: []Verdict{Refuted}, errors: []*float64{new((58 - 116.5) / 116.5)},
		},
		{
			why:         "a mean below 0 is no mean of counts",
			predictions: []Prediction{predict(-1, Poisson(1e-4))}, metrics: measure(0),
			want: Void, reason: `server/Drops: tolerance "poisson" needs an expected count between 0 and 1,000,000,000, not -1`,
			verdicts: []Verdict{Void}, errors: []*float64{nil},
		},
		{
			why:         "more successes expected than trials",
			predictions: []Prediction{predict(21, Binomial(20, 1e-4))}, metrics: measure(20),
			want: Void, reason: `server/Drops: tolerance "binomial" needs an expected count between 0 and 20, not 21`,
			verdicts: []Verdict{Void}, errors: []*float64{nil},
		},
		{
			why:         "a formula that gave NaN predicted nothing",
			predictions: []Prediction{predict(nan, Within(0.05))}, metrics: measure(5),
			want: Void, reason: "server/Drops: predicted NaN, which is no prediction", verdicts: []Verdict{Void}, errors: []*float64{nil},
		},
		{
			why:         "an error beyond float64 is cut to its largest, which JSON can carry",
			predictions: []Prediction{predict(1e-308, AtLeast())}, metrics: measure(1e308),
			want: Held, reason: "1 of 1 predictions held", verdicts: []Verdict{Held}, errors: []*float64{new(math.MaxFloat64)},
		},
	}
	for _, tt := range tests {
		t.Run(tt.why, func(t *testing.T) {
			v := Variant{Name: "v", Role: Incident, Predictions: tt.predictions, Metrics: tt.metrics}
			for _, reason := range tt.voids {
				v.Void(reason)
			}
			v.Judge()

			assert.Equal(t, tt.want, v.Verdict)
			assert.Equal(t, tt.reason, v.Reason)
			var verdicts []Verdict
			var errors []*float64
			for _, p := range v.Predictions {
				verdicts = append(verdicts, p.Verdict)
				errors = append(errors, p.Error)
				assert.Equal(t, p.Error == nil, p.Measured == nil, "measured and error come together")
			}
			assert.Equal(t, tt.verdicts, verdicts)
			if diff := cmp.Diff(tt.errors, errors); diff != "" {
				t.Errorf("errors (-want +got):\n%s", diff)
			}
		})
	}
}

func TestJudgeSkipped(t *testing.T) {
	v := Variant{Predictions: []Prediction{drops(511, 1.43)}, Metrics: map[string]Metric{"server/Drops.FirstAttempt": {5, "SYNs"}}}
	v.Skip("needs root")
	v.Void("late")
	v.Judge()
	assert.Equal(t, Skipped, v.Verdict)
	assert.Equal(t, "needs root", v.Reason)
	assert.Equal(t, Skipped, v.Predictions[0].Verdict)
	assert.Nil(t, v.Predictions[0].Measured, "what was not run was not measured")
}

func TestJudgeDropsNonFiniteMetrics(t *testing.T) {
	v := Variant{Metrics: map[string]Metric{"a": {nan, "s"}, "b": {1, "s"}, "c": {inf, "s"}}}
	v.Judge()
	assert.Equal(t, map[string]Metric{"b": {1, "s"}}, v.Metrics)
	assert.Equal(t, []string{"a was measured as NaN: dropped", "c was measured as +Inf: dropped"}, v.Warnings)
}

func TestJudgeTakesTheUnitOfTheMetric(t *testing.T) {
	v := Variant{
		Predictions: []Prediction{{Metric: "m", Predicted: 1, Tolerance: Exactly()}},
		Metrics:     map[string]Metric{"m": {1, "s"}},
	}
	v.Judge()
	assert.Equal(t, "s", v.Predictions[0].Unit)
	assert.Equal(t, Held, v.Verdict)
}

// Judging judged variants changes nothing, whatever mixture they hold; judging
// after a late metric arrived takes it in.
func TestJudgeIsIdempotent(t *testing.T) {
	const seed = 20261122
	rng := rand.New(rand.NewPCG(seed, 0))
	pick := func(values ...float64) float64 { return values[rng.IntN(len(values))] }
	tolerances := []Tolerance{Exactly(), Within(0.05), PlusMinus(3), AtLeast(), AtMost(), {}, Within(-1), Poisson(0.01), Binomial(150, 0.01)}
	names := []string{"a", "b", "c"}
	units := []string{"", "s", "SYNs"}

	seen := make(map[Verdict]int)
	for range 5000 {
		v := Variant{Metrics: make(map[string]Metric)}
		for range rng.IntN(4) {
			v.Predictions = append(v.Predictions, Prediction{
				Metric:    names[rng.IntN(len(names))],
				Predicted: pick(0, 1, 100, nan),
				Unit:      units[rng.IntN(len(units))],
				Tolerance: tolerances[rng.IntN(len(tolerances))],
			})
		}
		for _, name := range names {
			if rng.IntN(4) > 0 {
				v.Metrics[name] = Metric{pick(0, 1, 101, nan, inf), units[rng.IntN(len(units))]}
			}
		}
		switch rng.IntN(6) {
		case 0:
			v.Void("late")
		case 1:
			v.Skip("needs root")
		}
		v.Judge()
		seen[v.Verdict]++

		again := v
		again.Predictions = slices.Clone(v.Predictions)
		again.Metrics = maps.Clone(v.Metrics)
		again.Judge()
		if diff := cmp.Diff(v, again, cmpopts.EquateNaNs()); diff != "" {
			t.Fatalf("seed %d: judging again changed (-once +twice):\n%s", seed, diff)
		}
	}
	for _, verdict := range verdicts {
		assert.NotZero(t, seen[verdict], "no variant came out %s: the property was not tested there", verdict)
	}

	v := Variant{Predictions: []Prediction{drops(511, 1.43)}}
	v.Judge()
	require.Equal(t, Void, v.Verdict)
	v.Metrics = map[string]Metric{"server/Drops.FirstAttempt": {2348, "SYNs"}}
	v.Judge()
	assert.Equal(t, Held, v.Verdict, "a metric that came late")
}

func TestRecordVerdictAndExitCode(t *testing.T) {
	tests := []struct {
		why      string
		variants []Verdict
		want     Verdict
		code     int
	}{
		{"nothing was run", nil, Void, 3},
		{"all held", []Verdict{Held, Held}, Held, 0},
		{"one refuted", []Verdict{Held, Refuted, Held}, Refuted, 1},
		{"refuted is worse than void", []Verdict{Void, Refuted}, Refuted, 1},
		{"void is worse than skipped", []Verdict{Skipped, Void, Held}, Void, 3},
		{"not all that was asked was shown", []Verdict{Held, Skipped}, Skipped, 4},
		{"all skipped", []Verdict{Skipped, Skipped}, Skipped, 4},
		{"not judged is not green", []Verdict{Held, ""}, Void, 3},
		{"a word that is no verdict is not green", []Verdict{Held, "fine"}, Void, 3},
	}
	for _, tt := range tests {
		var rec Record
		for _, verdict := range tt.variants {
			rec.Variants = append(rec.Variants, Variant{Verdict: verdict})
		}
		assert.Equal(t, tt.want, rec.Verdict(), tt.why)
		assert.Equal(t, tt.code, ExitCode(rec.Verdict()), tt.why)
	}
	assert.Equal(t, 3, ExitCode("fine"), "no verdict counts as void")
}

func TestNew(t *testing.T) {
	rec, err := New("backlog")
	require.NoError(t, err)
	assert.Equal(t, Schema, rec.Schema)
	assert.Regexp(t, `^\d+\.\d+`, rec.Kernel)
	assert.False(t, rec.Started.IsZero())
	assert.Equal(t, Void, rec.Verdict())
}
