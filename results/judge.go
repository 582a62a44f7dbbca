package results

import (
	"fmt"
	"maps"
	"math"
	"slices"
	"strings"
)

// Void notes a condition under which the run says nothing about its
// predictions, such as a load generator that fell behind its schedule. It wins
// over whatever was measured. Several conditions add up.
func (v *Variant) Void(reason string) {
	if !slices.Contains(v.Voids, reason) {
		v.Voids = append(v.Voids, reason)
	}
}

// Skip marks a variant that was not run, for the reason given. [Variant.Judge]
// leaves it skipped.
func (v *Variant) Skip(reason string) {
	v.Verdict = Skipped
	v.Reason = reason
}

// Judge fills measured, error and verdict of every prediction from the metric of
// its name, then the variant's verdict and its reason in one line:
//
//   - a skipped variant stays skipped, with every prediction skipped;
//   - a condition noted by [Variant.Void] makes the variant and all its
//     predictions void, however the numbers came out;
//   - a prediction is void if its metric was not measured or was measured in
//     another unit, or if the prediction itself cannot be judged by;
//   - one refuted prediction refutes the variant, even beside void ones;
//   - a variant that predicted nothing is void.
//
// A metric that is NaN or infinite is no measurement: it is taken out, with a
// warning. Judging twice gives the same as judging once.
func (v *Variant) Judge() {
	v.dropNonFinite()

	firstReason := make(map[Verdict]string)
	held := 0
	for i := range v.Predictions {
		p := &v.Predictions[i]
		reason := p.judge(v.Metrics)
		switch {
		case v.Verdict == Skipped:
			p.Measured, p.Error, p.Verdict = nil, nil, Skipped
		case len(v.Voids) > 0:
			p.Verdict = Void
		}
		if p.Verdict == Held {
			held++
		}
		if _, seen := firstReason[p.Verdict]; !seen {
			firstReason[p.Verdict] = reason
		}
	}
	if v.Verdict == Skipped {
		return
	}

	refutation, refuted := firstReason[Refuted]
	doubt, void := firstReason[Void]
	switch {
	case len(v.Voids) > 0:
		v.Verdict, v.Reason = Void, strings.Join(v.Voids, "; ")
	case refuted:
		v.Verdict, v.Reason = Refuted, refutation
	case void:
		v.Verdict, v.Reason = Void, doubt
	case len(v.Predictions) == 0:
		v.Verdict, v.Reason = Void, "nothing predicted"
	default:
		v.Verdict, v.Reason = Held, fmt.Sprintf("%d of %d predictions held", held, len(v.Predictions))
	}
}

// dropNonFinite takes out the metrics that are no numbers, which JSON could not
// carry either.
func (v *Variant) dropNonFinite() {
	for _, name := range slices.Sorted(maps.Keys(v.Metrics)) {
		if value := v.Metrics[name].Value; !isFinite(value) {
			delete(v.Metrics, name)
			v.Warnings = append(v.Warnings, fmt.Sprintf("%s was measured as %v: dropped", name, value))
		}
	}
}

// judge fills p from metrics and gives the reason for any verdict but held.
func (p *Prediction) judge(metrics map[string]Metric) string {
	p.Measured, p.Error, p.Verdict = nil, nil, Void

	if !isFinite(p.Predicted) {
		return fmt.Sprintf("%s: predicted %v, which is no prediction", p.Metric, p.Predicted)
	}
	if err := p.Tolerance.check(p.Predicted); err != nil {
		return fmt.Sprintf("%s: %v", p.Metric, err)
	}
	m, ok := metrics[p.Metric]
	if !ok {
		return p.Metric + " was not measured"
	}
	if p.Unit == "" {
		p.Unit = m.Unit
	}
	if p.Unit != m.Unit {
		return fmt.Sprintf("%s: predicted in %q, measured in %q", p.Metric, p.Unit, m.Unit)
	}

	p.Measured = new(m.Value)
	p.Error = new(relativeError(p.Predicted, m.Value))
	if p.Tolerance.Allows(p.Predicted, m.Value) {
		p.Verdict = Held
		return ""
	}
	p.Verdict = Refuted
	return fmt.Sprintf("%s: predicted %s, measured %s (%s, allowed %s)", p.Metric,
		withUnit(p.Predicted, p.Unit), withUnit(m.Value, p.Unit), p.errorText(), p.allowed())
}

// relativeError follows the convention at [Prediction].Error. A quotient too
// large for a float64 becomes the largest one, which JSON can carry.
func relativeError(predicted, measured float64) float64 {
	e := measured - predicted
	if predicted != 0 {
		e /= predicted
	}
	return min(max(e, -math.MaxFloat64), math.MaxFloat64)
}

// Judge judges every variant.
func (r *Record) Judge() {
	for i := range r.Variants {
		r.Variants[i].Judge()
	}
}

// Verdict is the worst verdict among the variants, where refuted is worse than
// void, void than skipped, and skipped than held: a record is held only if
// everything that was asked was shown. A record without variants is void, and so
// is a variant that was not judged.
func (r *Record) Verdict() Verdict {
	if len(r.Variants) == 0 {
		return Void
	}
	worst := Held
	for _, v := range r.Variants {
		if v.Verdict.worseThan(worst) {
			worst = v.Verdict.orVoid()
		}
	}
	return worst
}

// ExitCode is the exit status that tells a verdict: 0 held, 1 refuted, 3 void,
// 4 skipped. 2 is left for wrong usage. What is no verdict counts as void.
func ExitCode(v Verdict) int {
	switch v {
	case Held:
		return 0
	case Refuted:
		return 1
	case Skipped:
		return 4
	}
	return 3
}

// orVoid is v, or void if v is no verdict.
func (v Verdict) orVoid() Verdict {
	if slices.Contains(verdicts, v) {
		return v
	}
	return Void
}

func (v Verdict) worseThan(w Verdict) bool {
	return slices.Index(verdicts, v.orVoid()) > slices.Index(verdicts, w.orVoid())
}
