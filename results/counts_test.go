package results

import (
	"fmt"
	"math"
	"math/big"
	"testing"

	"github.com/stretchr/testify/assert"
	"github.com/stretchr/testify/require"
)

// precision is that of the reference in bits; a float64 has 53.
const precision = 160

func exactly(x float64) *big.Float { return new(big.Float).SetPrec(precision).SetFloat64(x) }

// power is x to the n-th by repeated squaring.
func power(x *big.Float, n int) *big.Float {
	result, square := exactly(1), new(big.Float).Copy(x)
	for ; n > 0; n /= 2 {
		if n%2 == 1 {
			result.Mul(result, square)
		}
		square.Mul(square, square)
	}
	return result
}

// expMinus is e to the −mean: the series at mean/2²⁰ or less, squared again.
func expMinus(mean float64) *big.Float {
	x := exactly(-mean / (1 << 20)) // exact: a power of two
	term, sum := exactly(1), exactly(1)
	for i := 1; i < 60; i++ {
		term.Mul(term, x)
		term.Quo(term, exactly(float64(i)))
		sum.Add(sum, term)
	}
	return power(sum, 1<<20)
}

// referencePValue adds up both tails of a distribution from its first term on,
// with growth(i) = P(i+1)/P(i), in so many bits that nothing is lost.
func referencePValue(first *big.Float, growth func(i int) *big.Float, k int) float64 {
	atMost, below := exactly(0), exactly(0)
	p := new(big.Float).Copy(first)
	for i := 0; ; i++ {
		atMost.Add(atMost, p)
		if i == k {
			break
		}
		below.Add(below, p)
		p.Mul(p, growth(i))
	}
	tail := new(big.Float).Sub(exactly(1), below)
	if atMost.Cmp(tail) < 0 {
		tail = atMost
	}
	value, _ := tail.Mul(tail, exactly(2)).Float64()
	return min(1, value)
}

func TestPoissonPValue(t *testing.T) {
	tests := []struct {
		mean float64
		k    int
	}{
		{2.33, 0}, {2.33, 1}, {2.33, 2}, {2.33, 3}, {2.33, 12},
		{0.25, 0}, {0.25, 1}, {0.25, 2}, // most likely outcome is none at all
		{23.3, 8}, {23.3, 9}, {23.3, 23}, {23.3, 24}, {23.3, 44}, {23.3, 45},
		{15, 15}, {16, 14}, {15.5, 16}, // around the change from lgamma to the series
		{1000, 500}, {1000, 1200}, {1000.5, 1000}, {1000.5, 1001},
		{1e5, 99_999}, {1e5, 100_001}, {1e6, 1_004_000}, // the work of the reference grows with the count
	}
	for _, tt := range tests {
		want := referencePValue(expMinus(tt.mean), func(i int) *big.Float {
			return new(big.Float).Quo(exactly(tt.mean), exactly(float64(i+1)))
		}, tt.k)
		got := poissonCounts(tt.mean).pValue(float64(tt.k))
		assert.InEpsilon(t, want, got, 1e-11, "mean %v, count %d", tt.mean, tt.k)
	}
}

func TestBinomialPValue(t *testing.T) {
	tests := []struct {
		trials int
		p      float64 // a sum of few powers of two: then the mean is exact, too
		k      int
	}{
		{1, 0.5, 0}, {1, 0.5, 1}, {2, 0.25, 2},
		{20, 0.25, 0}, {20, 0.25, 4}, {20, 0.25, 5}, {20, 0.25, 6}, {20, 0.25, 20},
		{100, 0.75, 60}, {100, 0.75, 90}, {100, 0.75, 100},
		{1000, 1.0 / 128, 1}, {1000, 1.0 / 128, 7}, {1000, 1.0 / 128, 8}, {1000, 1.0 / 128, 25},
		{100_000, 0.5, 49_000}, {100_000, 0.5, 50_001}, {100_000, 0.5, 51_000},
		{1_000_000, 1.0 / 1024, 800}, {1_000_000, 1.0 / 1024, 1200},
	}
	for _, tt := range tests {
		odds := new(big.Float).Quo(exactly(tt.p), exactly(1-tt.p))
		want := referencePValue(power(exactly(1-tt.p), tt.trials), func(i int) *big.Float {
			g := new(big.Float).Quo(exactly(float64(tt.trials-i)), exactly(float64(i+1)))
			return g.Mul(g, odds)
		}, tt.k)
		got := binomialCounts(float64(tt.trials), float64(tt.trials)*tt.p).pValue(float64(tt.k))
		assert.InEpsilon(t, want, got, 1e-11, "%d trials of %v, count %d", tt.trials, tt.p, tt.k)
	}
}

func TestPValueOfOddCounts(t *testing.T) {
	poisson, binomial := poissonCounts(10), binomialCounts(20, 10)
	tests := []struct {
		why    string
		counts counts
		k      float64
		want   float64
	}{
		{"half a count", poisson, 9.5, 0},
		{"fewer than none", poisson, -1, 0},
		{"NaN", poisson, nan, 0},
		{"infinite", poisson, inf, 0},
		{"minus infinite", poisson, math.Inf(-1), 0},
		{"more than can be represented exactly", poisson, 1e300, 0},
		{"so many that the probability is below the smallest float64", poisson, 1e9, 0},
		{"more successes than trials", binomial, 21, 0},
		{"no mean, no count", poissonCounts(0), 0, 1},
		{"no mean, one count", poissonCounts(0), 1, 0},
		{"the smallest mean there is", poissonCounts(math.SmallestNonzeroFloat64), 0, 1},
		{"and one count beside it", poissonCounts(math.SmallestNonzeroFloat64), 1e10, 0},
		{"no success expected", binomialCounts(20, 0), 0, 1},
		{"no success expected, one seen", binomialCounts(20, 0), 1, 0},
		{"all successes", binomialCounts(20, 20), 20, 1},
		{"all successes but one", binomialCounts(20, 20), 19, 0},
	}
	for _, tt := range tests {
		assert.InDelta(t, tt.want, tt.counts.pValue(tt.k), 0, tt.why)
	}
}

// The binomial of very many trials is Poisson's, and a count of failures is as
// good as one of successes.
func TestDistributionsAgree(t *testing.T) {
	for k := range 60 {
		poisson := poissonCounts(20).pValue(float64(k))
		assert.InEpsilon(t, poisson, binomialCounts(1e9, 20).pValue(float64(k)), 1e-5, "count %d", k)
		successes := binomialCounts(60, 20).pValue(float64(k))
		assert.InEpsilon(t, successes, binomialCounts(60, 40).pValue(float64(60-k)), 1e-12, "count %d of 60", k)
	}
}

// A count holds exactly where it lies in the band, at any level; a higher level
// never allows more.
func TestBand(t *testing.T) {
	levels := []float64{1e-300, 1e-9, 1e-4, 0.01, 0.05, 0.5, 0.99}
	for _, mean := range []float64{0, 1e-300, 0.001, 0.5, 0.7, 1, 2.33, 9.99, 23.3, 60} {
		previous := make(map[string][2]float64)
		for _, level := range levels {
			for _, tolerance := range []Tolerance{Poisson(level), Binomial(60, level)} {
				low, high := tolerance.Band(mean)
				what := fmt.Sprintf("%v of %v", tolerance, mean)
				require.LessOrEqual(t, low, high, what)
				if before, ok := previous[string(tolerance.Kind)]; ok {
					assert.GreaterOrEqual(t, low, before[0], "%s: no wider than at a lower level", what)
					assert.LessOrEqual(t, high, before[1], "%s: no wider than at a lower level", what)
				}
				previous[string(tolerance.Kind)] = [2]float64{low, high}
				for k := range 400 {
					inside := low <= float64(k) && float64(k) <= high
					require.Equal(t, inside, tolerance.Allows(mean, float64(k)), "%s: count %d, band %v–%v", what, k, low, high)
				}
			}
		}
	}
}

func TestBandGrowsWithTheMean(t *testing.T) {
	lastLow, lastHigh := 0.0, 0.0
	for mean := 0.0; mean < 200; mean += 0.37 {
		low, high := Poisson(1e-4).Band(mean)
		assert.GreaterOrEqual(t, low, lastLow, "mean %v", mean)
		assert.GreaterOrEqual(t, high, lastHigh, "mean %v", mean)
		lastLow, lastHigh = low, high
	}
}

// What the level promises: where the formula is right, a run is refuted by chance
// no more often than that. Summed over all outcomes, not drawn.
func TestLevelBoundsTheRiskOfAFalseRefutation(t *testing.T) {
	for _, mean := range []float64{0.1, 1, 2.33, 23.3, 1000} {
		for _, level := range []float64{1e-4, 0.01, 0.2} {
			c := poissonCounts(mean)
			risk := 1.0
			low, high := c.band(level)
			for k := low; k <= high; k++ {
				risk -= math.Exp(c.logP(k))
			}
			assert.LessOrEqual(t, risk, level+1e-12, "mean %v, level %v", mean, level)
			if mean == 1000 {
				assert.Greater(t, risk, level/2, "with many counts little of the level is given away")
			}
		}
	}
}

// The bands of tests were computed with 60 digits, by adding up the tails.
func TestBandOfEveryKind(t *testing.T) {
	tests := []struct {
		tolerance Tolerance
		predicted float64
		low, high float64
	}{
		{Exactly(), 5, 5, 5},
		{Within(0.1), -100, -110, -90},
		{PlusMinus(3), 0, -3, 3},
		{AtLeast(), 7, 7, inf},
		{AtMost(), 7, math.Inf(-1), 7},
		{Poisson(1e-4), 23.3, 7, 44},
		{Poisson(0.05), 10, 4, 17},
		{Binomial(10, 0.05), 5, 2, 8},
		{Poisson(1e-4), 0, 0, 0},
		{Binomial(10, 1e-4), 10, 10, 10},
		{Poisson(1e-4), 1e9, 999_876_971, 1_000_123_034},
	}
	for _, tt := range tests {
		low, high := tt.tolerance.Band(tt.predicted)
		assert.InDelta(t, tt.low, low, 0, "%v of %v", tt.tolerance, tt.predicted)
		assert.InDelta(t, tt.high, high, 0, "%v of %v", tt.tolerance, tt.predicted)
	}
	low, high := Tolerance{}.Band(5)
	assert.True(t, math.IsNaN(low) && math.IsNaN(high), "no tolerance has no band")
}

func BenchmarkPoissonBand(b *testing.B) {
	for _, mean := range []float64{23.3, 1e6, 1e9} {
		b.Run(fmt.Sprint(mean), func(b *testing.B) {
			for b.Loop() {
				Poisson(1e-4).Band(mean)
			}
		})
	}
}
