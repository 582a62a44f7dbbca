package results

import (
	"fmt"
	"math"
)

// A Tolerance says how far a measurement may lie from its prediction. Make one
// with [Exactly], [Within], [PlusMinus], [AtLeast] or [AtMost]; the zero value
// is none, and a prediction without a tolerance is void.
type Tolerance struct {
	Kind ToleranceKind `json:"kind"`
	// Amount is a fraction of the predicted value for KindWithin, a distance in
	// the prediction's unit for KindPlusMinus, and 0 for all others.
	Amount float64 `json:"amount,omitempty"`
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

// Allows reports whether measured is an acceptable outcome for predicted.
// Bounds are inclusive.
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
	}
	return false
}

// String gives the tolerance as the table shows it: "exact", "±5 %", "±3", "≥", "≤".
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
	}
	return "none"
}

// check says why t is not a tolerance that anything can be judged by.
func (t Tolerance) check() error {
	switch t.Kind {
	case KindWithin, KindPlusMinus:
		if !isFinite(t.Amount) || t.Amount < 0 {
			return fmt.Errorf("tolerance %q cannot have the amount %v", t.Kind, t.Amount)
		}
	case KindExact, KindAtLeast, KindAtMost:
		if t.Amount != 0 {
			return fmt.Errorf("tolerance %q takes no amount, not %v", t.Kind, t.Amount)
		}
	case "":
		return fmt.Errorf("no tolerance is stated")
	default:
		return fmt.Errorf("unknown tolerance %q", t.Kind)
	}
	return nil
}

func isFinite(x float64) bool { return !math.IsNaN(x) && !math.IsInf(x, 0) }
