package results

import (
	"math"
	"sort"
)

// counts is a distribution of counts 0, 1, 2, …: Poisson's or the binomial.
//
// Tails are summed term by term from the count in question outwards, from its
// exact probability on, so that even a tail of 10⁻³⁰⁰ has all its digits. The
// probability is computed as in C. Loader, "Fast and Accurate Computation of
// Binomial Probabilities" (2000), where nothing large cancels, as the logarithms
// of factorials of a million would.
type counts struct {
	mean   float64
	most   float64                 // the highest count that there is
	logP   func(k float64) float64 // the logarithm of P(X = k), for 0 ≤ k ≤ most
	growth func(k float64) float64 // P(X = k+1) / P(X = k)
}

// poissonCounts has any mean from 0 to maxCount.
func poissonCounts(mean float64) counts {
	return counts{
		mean:   mean,
		most:   math.Inf(1),
		logP:   func(k float64) float64 { return -logStirlingRest(k) - deviance(k, mean) },
		growth: func(k float64) float64 { return mean / (k + 1) },
	}
}

// binomialCounts has any mean from 0 to n, and n trials up to maxCount.
func binomialCounts(n, mean float64) counts {
	failures := n - mean
	return counts{
		mean: mean,
		most: n,
		logP: func(k float64) float64 {
			return logStirlingRest(n) - logStirlingRest(k) - logStirlingRest(n-k) -
				deviance(k, mean) - deviance(n-k, failures)
		},
		growth: func(k float64) float64 { return (n - k) / (k + 1) * (mean / failures) },
	}
}

// pValue is that of the two-sided test of the count k: the smaller tail,
// doubled, and at most 1. What is no possible count has 0.
//
// The smaller tail is the one on k's side of the mean. That of the other side
// contains the median, which lies less than one count from the mean, and so is
// at least a half: doubled it would give 1.
func (c counts) pValue(k float64) float64 {
	switch {
	case k != math.Trunc(k) || k < 0 || k > c.most || k > 100*maxCount: // NaN and ±Inf too
		return 0
	case k == c.mean:
		return 1 // also where the mean leaves no other count: 0, or all trials
	case c.mean == 0 || c.mean == c.most:
		return 0
	}
	// The terms are relative to P(X = k). They fall away from the mean, and those
	// below 10⁻¹⁸ of the sum no longer show in it.
	term, sum := 1.0, 1.0
	if k > c.mean {
		for i := k; term > 1e-18*sum; i++ {
			term *= c.growth(i)
			sum += term
		}
	} else {
		for i := k; i > 0 && term > 1e-18*sum; i-- {
			term /= c.growth(i - 1)
			sum += term
		}
	}
	return min(1, 2*math.Exp(c.logP(k))*sum)
}

// band is the lowest and the highest count whose p-value is at least level. All
// between have that too, since each tail only grows towards the median.
func (c counts) band(level float64) (low, high float64) {
	above := int(math.Ceil(c.mean)) // the first count that the upper tail judges
	low = float64(sort.Search(above, func(k int) bool { return c.pValue(float64(k)) >= level }))

	width := 1
	for c.pValue(float64(above+width)) >= level {
		width *= 2
	}
	rejected := sort.Search(width, func(i int) bool { return c.pValue(float64(above+i)) < level })
	return low, float64(above + rejected - 1)
}

// logStirlingRest is ln k! − (k·ln k − k), what Stirling's leading term leaves.
func logStirlingRest(k float64) float64 {
	switch {
	case k == 0:
		return 0
	case k < 16:
		logFactorial, _ := math.Lgamma(k + 1)
		return logFactorial - k*math.Log(k) + k
	}
	// The series of the NIST Digital Library of Mathematical Functions, 5.11.1;
	// the first term left out is below 2·10⁻¹⁴.
	kk := k * k
	return math.Log(2*math.Pi*k)/2 + (1.0/12-(1.0/360-(1.0/1260-1.0/1680/kk)/kk)/kk)/k
}

// deviance is k·ln(k/mean) − (k − mean), which is 0 at the mean and grows away
// from it.
func deviance(k, mean float64) float64 {
	d := k - mean
	switch {
	case k == 0:
		return mean
	case math.Abs(d) < mean/2:
		return k*math.Log1p(d/mean) - d
	}
	return k*(math.Log(k)-math.Log(mean)) - d
}
