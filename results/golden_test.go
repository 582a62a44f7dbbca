package results

import (
	"testing"

	"github.com/stretchr/testify/assert"
)

func TestCheckGolden(t *testing.T) {
	tests := []struct {
		why    string
		change func(*Record)
		want   []string
	}{
		{"the same", func(*Record) {}, nil},
		{"kernel, time, server and metrics are the run's own", func(r *Record) {
			r.Kernel, r.Seconds, r.Server, r.Seed = "7.1", 3, "redis 7.0.15", 9
			r.Started = r.Started.AddDate(1, 0, 0)
			r.Variants[0].Metrics["server/Drops.FirstAttempt"] = Metric{2300, "SYNs"}
			r.Variants[0].Warnings = nil
			r.Judge()
		}, nil},
		{"the order of variants is no part", func(r *Record) {
			r.Variants[0], r.Variants[1] = r.Variants[1], r.Variants[0]
		}, nil},
		{"another schema", func(r *Record) { r.Schema = "connlab.record/2" },
			[]string{`schema: golden "connlab.record/1", got "connlab.record/2"`}},
		{"another incident", func(r *Record) { r.Incident = "tuple" },
			[]string{`incident: golden "backlog", got "tuple"`}},
		{"a variant is gone and another came", func(r *Record) { r.Variants[2].Name = "healthy" },
			[]string{"variant no-stall is missing", "variant healthy is not in the golden record"}},
		{"another role", func(r *Record) { r.Variants[2].Role = Fix },
			[]string{`no-stall: role: golden "control", got "fix"`}},
		{"measured otherwise, so judged otherwise", func(r *Record) {
			r.Variants[0].Metrics["server/Drops.FirstAttempt"] = Metric{1, "SYNs"}
			r.Judge()
		}, []string{
			`incident: verdict: golden "held", got "refuted"`,
			`incident: server/Drops.FirstAttempt (within): verdict: golden "held", got "refuted"`,
		}},
		{"the formula gives another value", func(r *Record) { r.Variants[0].Predictions[0].Predicted = 2349 },
			[]string{"incident: server/Drops.FirstAttempt (within): golden predicts 2348, got 2349"}},
		{"rounding in the last digit is no other value", func(r *Record) {
			r.Variants[0].Predictions[0].Predicted = 2348.0000000000005
		}, nil},
		{"another formula", func(r *Record) { r.Variants[0].Predictions[0].Formula = "λ·T" },
			[]string{`incident: server/Drops.FirstAttempt (within): formula: golden "max(0, λ·T − (B+1))", got "λ·T"`}},
		{"a tolerance that was widened", func(r *Record) { r.Variants[0].Predictions[0].Tolerance = Within(0.5) },
			[]string{"incident: server/Drops.FirstAttempt (within): golden allows ±5 %, got ±50 %"}},
		{"a test in place of a share", func(r *Record) { r.Variants[0].Predictions[0].Tolerance = Poisson(1e-4) },
			[]string{
				"incident: server/Drops.FirstAttempt (within) is not predicted",
				"incident: server/Drops.FirstAttempt (poisson) is not in the golden record",
			}},
		{"a claim was dropped", func(r *Record) { r.Variants[0].Predictions = r.Variants[0].Predictions[:2] },
			[]string{"incident: clients/Connect.RetriedAfterTheFirstSecondOfTheStall (at-least) is not predicted"}},
		{"a claim was added about the same metric", func(r *Record) {
			p := drops(511, 1.43)
			p.Tolerance, p.Verdict = AtLeast(), Held
			r.Variants[0].Predictions = append(r.Variants[0].Predictions, p)
		}, []string{"incident: server/Drops.FirstAttempt (at-least) is not in the golden record"}},
	}
	for _, tt := range tests {
		rec := clone(t, sampleRecord())
		tt.change(rec)
		got := CheckGolden(sampleRecord(), rec)
		assert.Equal(t, tt.want, got, tt.why)
	}
}

// A random outcome comes out otherwise each time; only its verdict, its mean and
// its test must be the same.
func TestCheckGoldenOfRandomOutcomes(t *testing.T) {
	golden := randomRecord(2, 40)
	assert.Empty(t, CheckGolden(golden, randomRecord(5, 63)), "other counts, which hold too")
	assert.Equal(t, []string{
		`incident: verdict: golden "held", got "refuted"`,
		`incident: detector/Collisions (poisson): verdict: golden "held", got "refuted"`,
	}, CheckGolden(golden, randomRecord(11, 40)))

	weaker := randomRecord(2, 40)
	weaker.Variants[0].Predictions[0].Tolerance.Level = 1e-6
	weaker.Variants[0].Predictions[1].Tolerance.Trials = 200
	assert.Equal(t, []string{
		"incident: detector/Collisions (poisson): golden allows Poisson test, level 0.01 %, got Poisson test, level 0.0001 %",
		"incident: detector/Rounds.WithTimeout (binomial): golden allows binomial test, 100 trials, level 1 %, got binomial test, 200 trials, level 1 %",
	}, CheckGolden(golden, weaker))
}
