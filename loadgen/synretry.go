package loadgen

import "time"

// RetryOf says which SYN a connection owes its being open to, from how long
// connect(2) took: 0 is the first one, n the n-th retransmission. The kernel
// sends them at retries, counted from connect(2) and in rising order, and a
// timer never fires early (kernel/time/timer.c, calc_index): it is the last one
// sent by then. A server that answers late, by more than the time between two of
// them, is credited to the later one.
func RetryOf(took time.Duration, retries []time.Duration) int {
	for i, at := range retries {
		if took < at {
			return i
		}
	}
	return len(retries)
}
