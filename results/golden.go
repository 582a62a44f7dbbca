package results

import (
	"fmt"
	"math"
)

// CheckGolden lists how rec departs from a golden record of the same incident in
// what a run must reproduce: the schema, the incident, the set of variants with
// their roles and verdicts, and for each its predictions with metric, formula,
// predicted value, tolerance and verdict. What a run measures, and the kernel and
// the time of it, are its own. No difference gives an empty list. A prediction
// judged by a test at some level departs from its golden verdict by chance with a
// probability of at most that level.
func CheckGolden(golden, rec *Record) []string {
	var diffs diffList
	diffs.compare("schema", golden.Schema, rec.Schema)
	diffs.compare("incident", golden.Incident, rec.Incident)
	for i := range golden.Variants {
		want := &golden.Variants[i]
		got := rec.variant(want.Name)
		if got == nil {
			diffs.add("variant %s is missing", want.Name)
			continue
		}
		diffs.compare(want.Name+": role", string(want.Role), string(got.Role))
		diffs.compare(want.Name+": verdict", string(want.Verdict), string(got.Verdict))
		diffs.comparePredictions(want, got)
	}
	for i := range rec.Variants {
		if golden.variant(rec.Variants[i].Name) == nil {
			diffs.add("variant %s is not in the golden record", rec.Variants[i].Name)
		}
	}
	return diffs
}

type diffList []string

func (d *diffList) add(format string, args ...any) {
	*d = append(*d, fmt.Sprintf(format, args...))
}

func (d *diffList) compare(what, golden, got string) {
	if golden != got {
		d.add("%s: golden %q, got %q", what, golden, got)
	}
}

// comparePredictions pairs the predictions by what they claim: one metric may be
// predicted twice, from above and from below.
func (d *diffList) comparePredictions(golden, got *Variant) {
	rest := make([]*Prediction, 0, len(got.Predictions))
	for i := range got.Predictions {
		rest = append(rest, &got.Predictions[i])
	}
	take := func(like *Prediction) *Prediction {
		for i, p := range rest {
			if p != nil && p.Metric == like.Metric && p.Tolerance.Kind == like.Tolerance.Kind {
				rest[i] = nil
				return p
			}
		}
		return nil
	}
	for i := range golden.Predictions {
		want := &golden.Predictions[i]
		what := golden.Name + ": " + want.Metric + " (" + string(want.Tolerance.Kind) + ")"
		p := take(want)
		if p == nil {
			d.add("%s is not predicted", what)
			continue
		}
		d.compare(what+": formula", want.Formula, p.Formula)
		if !sameValue(want.Predicted, p.Predicted) {
			d.add("%s: golden predicts %v, got %v", what, want.Predicted, p.Predicted)
		}
		if want.Tolerance != p.Tolerance {
			d.add("%s: golden allows %s, got %s", what, want.Tolerance, p.Tolerance)
		}
		d.compare(what+": verdict", string(want.Verdict), string(p.Verdict))
	}
	for _, p := range rest {
		if p != nil {
			d.add("%s: %s (%s) is not in the golden record", golden.Name, p.Metric, p.Tolerance.Kind)
		}
	}
}

// sameValue lets two values of one formula differ by rounding alone: a machine
// with fused multiply-add rounds once where another rounds twice.
func sameValue(a, b float64) bool {
	return a == b || math.Abs(a-b) <= 1e-12*max(math.Abs(a), math.Abs(b))
}
