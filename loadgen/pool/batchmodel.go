package pool

import (
	"math"
	"time"
)

// MeanBatch is the mean number of commands in a batch that is sent with k of them, or
// t after the first one came, when commands come as a Poisson process of lambda per
// second: to each connection, if there are several. After the first, N more come
// within t, N having the Poisson distribution of mean lambda·t; those beyond k−1 go
// into the next batch:
//
//	1 + E[min(N, k−1)] = 1 + Σ P(N ≥ j), j = 1 … k−1
//
// Round trips per second are lambda divided by it.
func MeanBatch(lambda float64, k int, t time.Duration) float64 {
	commands, _ := batchSums(lambda, k, t)
	return commands
}

// BatchDelay is what collecting adds to the latency of a command in the mean: the time
// from its coming until its batch is sent, for the batches of [MeanBatch].
//
// While a batch has n commands, the waits of its commands grow by n seconds each
// second. From its first command on it has 1+N(s) of them at time s, until k or t is
// reached. While N is j−1 it leaves that value at the rate lambda, and before t it does
// so with P(N(t) ≥ j): so it spends P(N(t) ≥ j)/lambda there in the mean, and the
// waits of a batch are together
//
//	Σ j·P(N(t) ≥ j)/lambda, j = 1 … k−1
//
// which, divided by the number of its commands, is the mean. It is t where hardly a
// command comes within t, and (k−1)/(2·lambda) where many times k do.
func BatchDelay(lambda float64, k int, t time.Duration) time.Duration {
	if k <= 1 || t <= 0 {
		return 0
	}
	if lambda <= 0 {
		return t
	}
	commands, waits := batchSums(lambda, k, t)
	return time.Duration(waits / lambda / commands * float64(time.Second))
}

// batchSums are 1 + Σ P(N ≥ j) and Σ j·P(N ≥ j) for j = 1 … k−1 and N Poisson with
// mean lambda·t.
func batchSums(lambda float64, k int, t time.Duration) (commands, waits float64) {
	mean := max(0, lambda*t.Seconds())
	commands = 1
	tail := -math.Expm1(-mean) // P(N ≥ 1), exact also where it is tiny
	for j := 1; j < k && tail > 0; j++ {
		commands += tail
		waits += float64(j) * tail
		logFactorial, _ := math.Lgamma(float64(j + 1))
		tail -= math.Exp(float64(j)*math.Log(mean) - mean - logFactorial) // P(N = j); by logarithms, as exp(−mean) may underflow
	}
	return commands, waits
}
