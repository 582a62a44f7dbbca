package netlab

import "time"

// InitialSYNTimeout is how long a SYN waits for its answer before it is sent
// again for the first time: TCP_TIMEOUT_INIT (include/net/tcp.h; RFC 6298
// section 2.1).
const InitialSYNTimeout = time.Second

// SYNRetries returns when the first n retransmissions of an unanswered SYN go
// out, counted from connect(): the initial timeout is used linear+1 times before
// it doubles, so 1, 2, 3, 4, 5, 7, 11 … s with four linear timeouts, 1, 3, 7,
// 15 … s with none (net.ipv4.tcp_syn_linear_timeouts; net/ipv4/tcp_timer.c,
// tcp_retransmit_timer).
func SYNRetries(linear, n int) []time.Duration {
	times := make([]time.Duration, n)
	var at time.Duration
	timeout := InitialSYNTimeout
	for i := range times {
		at += timeout
		times[i] = at
		if i >= linear {
			timeout *= 2
		}
	}
	return times
}
