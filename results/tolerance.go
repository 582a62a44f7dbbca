package results

import (
	"fmt"
	"math"
)

// A Tolerance says how far a measurement may lie from its prediction. Make one
// with [Exactly], [Within], [PlusMinus], [AtLeast], [AtMost], [Poisson] or
// [Binomial]; the zero value is none, and a prediction without a tolerance is
// void.
type Tolerance struct {
	Kind ToleranceKind `json:"kind"`
	// Amount is a fraction of the predicted value for KindWithin, a distance in
	// the prediction's unit for KindPlusMinus, and 0 for all others.
	Amount float64 `json:"amount,omitempty"`
	// Level is the level of the test, between 0 and 1, for KindPoisson and
	// KindBinomial, and 0 for all others.
	Level float64 `json:"level,omitempty"`
	// Trials is the number of trials for KindBinomial, and 0 for all others.
	Trials int `json:"trials,omitempty"`
}

// A ToleranceKind names a way to compare.
type ToleranceKind string

// The kinds of tolerance.
const (
	KindExact     ToleranceKind = "exact"
	KindWithin    ToleranceKind = "within"
	KindPlusMinus ToleranceKind = "plus-minus"
	KindAtLeast   ToleranceKind = "at-least"
	KindAtMost    ToleranceKind = "at-most"
	KindPoisson   ToleranceKind = "poisson"
	KindBinomial  ToleranceKind = "binomial"
)

// Exactly allows no difference at all. It is for counts: a formula whose
// floating-point value may be off in the last digit has to be rounded first.
func Exactly() Tolerance { return Tolerance{Kind: KindExact} }

// Within allows a difference of rel times the predicted value either way; 0.05
// is five percent. A predicted 0 is then exact: use [PlusMinus] there.
func Within(rel float64) Tolerance { return Tolerance{Kind: KindWithin, Amount: rel} }

// PlusMinus allows a difference of abs either way, in the prediction's unit.
func PlusMinus(abs float64) Tolerance { return Tolerance{Kind: KindPlusMinus, Amount: abs} }

// AtLeast allows the predicted value and everything above it.
func AtLeast() Tolerance { return Tolerance{Kind: KindAtLeast} }

// AtMost allows the predicted value and everything below it.
func AtMost() Tolerance { return Tolerance{Kind: KindAtMost} }

// Poisson is for a count of independent rare events whose mean the formula
// gives. The measured count holds unless the exact two-sided Poisson test with
// the predicted mean rejects it at level: it holds as long as
// min(1, 2·min(P(X ≤ k), P(X ≥ k))) ≥ level for k the count. Where the formula
// is right, a run is refuted by chance with a probability of at most level.
//
// The doubled smaller tail is one of several two-sided conventions. It is that
// of the exact interval (F. Garwood, "Fiducial Limits for the Poisson
// Distribution", Biometrika 28, 1936), so its band has no gaps; R's poisson.test
// adds up the less likely outcomes instead and may differ by a count.
func Poisson(level float64) Tolerance { return Tolerance{Kind: KindPoisson, Level: level} }

// Binomial is for the count of successes among a number of independent trials;
// the prediction is the expected count, trials times the probability of success.
// It holds as with [Poisson], by the binomial distribution (C. J. Clopper and
// E. S. Pearson, "The Use of Confidence or Fiducial Limits Illustrated in the
// Case of the Binomial", Biometrika 26, 1934).
func Binomial(trials int, level float64) Tolerance {
	return Tolerance{Kind: KindBinomial, Level: level, Trials: trials}
}

// Allows reports whether measured is an acceptable outcome for predicted.
// Bounds are inclusive. A tolerance for counts allows nothing that is no count.
func (t Tolerance) Allows(predicted, measured float64) bool {
	distance := math.Abs(measured - predicted)
	switch t.Kind {
	case KindExact:
		return measured == predicted
	case KindWithin:
		return distance <= t.Amount*math.Abs(predicted)
	case KindPlusMinus:
		return distance <= t.Amount
	case KindAtLeast:
		return measured >= predicted
	case KindAtMost:
		return measured <= predicted
	case KindPoisson, KindBinomial:
		return t.check(predicted) == nil && t.counts(predicted).pValue(measured) >= t.Level
	}
	return false
}

// Band gives the lowest and the highest value that t allows for predicted, in
// the prediction's unit; ±Inf where there is no bound, and NaN for both if t
// cannot judge predicted.
func (t Tolerance) Band(predicted float64) (low, high float64) {
	if t.check(predicted) != nil {
		return math.NaN(), math.NaN()
	}
	low, high = predicted, predicted
	switch t.Kind {
	case KindWithin:
		low -= t.Amount * math.Abs(predicted)
		high += t.Amount * math.Abs(predicted)
	case KindPlusMinus:
		low -= t.Amount
		high += t.Amount
	case KindAtLeast:
		high = math.Inf(1)
	case KindAtMost:
		low = math.Inf(-1)
	case KindPoisson, KindBinomial:
		return t.counts(predicted).band(t.Level)
	}
	return low, high
}

// random reports whether t judges a random outcome by a test.
func (t Tolerance) random() bool { return t.Kind == KindPoisson || t.Kind == KindBinomial }

// counts is the distribution that a random outcome has if predicted is right.
func (t Tolerance) counts(predicted float64) counts {
	if t.Kind == KindBinomial {
		return binomialCounts(float64(t.Trials), predicted)
	}
	return poissonCounts(predicted)
}

// String gives the tolerance in a few words: "exact", "±5 %", "±3", "≥", "≤",
// "Poisson test, level 0.01 %". The table shows the [Tolerance.Band] of a test.
func (t Tolerance) String() string {
	switch t.Kind {
	case KindExact:
		return "exact"
	case KindWithin:
		return "±" + formatPercent(t.Amount) + " %"
	case KindPlusMinus:
		return "±" + formatNumber(t.Amount)
	case KindAtLeast:
		return "≥"
	case KindAtMost:
		return "≤"
	case KindPoisson:
		return "Poisson test, level " + formatLevel(t.Level)
	case KindBinomial:
		return "binomial test, " + formatNumber(float64(t.Trials)) + " trials, level " + formatLevel(t.Level)
	}
	return "none"
}

// maxCount bounds the mean and the trials of a test, whose work grows with the
// square root of the mean.
const maxCount = 1e9

// check says why t is not a tolerance that predicted can be judged by.
func (t Tolerance) check(predicted float64) error {
	if !t.random() && t.Level != 0 {
		return fmt.Errorf("tolerance %q takes no level, not %v", t.Kind, t.Level)
	}
	if t.Kind != KindBinomial && t.Trials != 0 {
		return fmt.Errorf("tolerance %q takes no trials, not %d", t.Kind, t.Trials)
	}
	switch t.Kind {
	case KindWithin, KindPlusMinus:
		if !isFinite(t.Amount) || t.Amount < 0 {
			return fmt.Errorf("tolerance %q cannot have the amount %v", t.Kind, t.Amount)
		}
	case KindExact, KindAtLeast, KindAtMost, KindPoisson, KindBinomial:
		if t.Amount != 0 {
			return fmt.Errorf("tolerance %q takes no amount, not %v", t.Kind, t.Amount)
		}
	case "":
		return fmt.Errorf("no tolerance is stated")
	default:
		return fmt.Errorf("unknown tolerance %q", t.Kind)
	}
	if t.random() {
		return t.checkTest(predicted)
	}
	return nil
}

// checkTest says why the test of t cannot judge predicted.
func (t Tolerance) checkTest(predicted float64) error {
	if !(t.Level > 0 && t.Level < 1) {
		return fmt.Errorf("tolerance %q needs a level between 0 and 1, not %v", t.Kind, t.Level)
	}
	most := maxCount
	if t.Kind == KindBinomial {
		if t.Trials < 1 || t.Trials > maxCount {
			return fmt.Errorf("tolerance %q needs 1 to %s trials, not %d", t.Kind, formatNumber(maxCount), t.Trials)
		}
		most = float64(t.Trials)
	}
	if !(predicted >= 0 && predicted <= most) {
		return fmt.Errorf("tolerance %q needs an expected count between 0 and %s, not %v", t.Kind, formatNumber(most), predicted)
	}
	return nil
}

func isFinite(x float64) bool { return !math.IsNaN(x) && !math.IsInf(x, 0) }
