package scenarios

import "time"

// acceptQueue is the model of a listener whose server stands still while SYNs
// arrive at a constant rate. It is arithmetic on arrival times, not a
// simulation of packets: during a stall the queue only fills, and a SYN that
// finds it full is dropped without an answer.
type acceptQueue struct {
	Backlog   int           // as given to listen(2)
	Somaxconn int           // net.core.somaxconn of the listener's namespace
	Rate      float64       // first SYNs per second
	Stall     time.Duration // nothing is accepted for so long
	// Retries are when a client sends its SYN again, while it has patience.
	Retries []time.Duration
	// Rounding is by how much retransmission timers are late at most; on
	// average they are late by half of it.
	Rounding time.Duration
}

// limit is what listen(2) makes of the backlog (net/socket.c, __sys_listen_socket).
func (q acceptQueue) limit() int { return min(q.Backlog, q.Somaxconn) }

// places is how many connections fit: a queue counts as full when it holds
// more than its limit (include/net/sock.h, sk_acceptq_is_full).
func (q acceptQueue) places() int { return q.limit() + 1 }

// arrivals is λT: how many clients send their first SYN during the stall.
func (q acceptQueue) arrivals() float64 { return q.Rate * q.Stall.Seconds() }

// victims is how many clients lose their first SYN: max(0, λT − (B+1)).
func (q acceptQueue) victims() float64 {
	return max(0, q.arrivals()-float64(q.places()))
}

// fill is when the queue is full, counted from the start of the stall; the
// length of the stall if it never is.
func (q acceptQueue) fill() time.Duration {
	if q.Rate == 0 {
		return q.Stall
	}
	return min(q.Stall, time.Duration(float64(q.places())/q.Rate*float64(time.Second)))
}

// byRetry returns how many victims connect with their k-th retransmission, for k
// from 1; index 0 is not used. A client whose retransmission falls into the same
// stall is dropped again.
func (q acceptQueue) byRetry() []float64 {
	counts := make([]float64, len(q.Retries)+1)
	full := q.fill()
	for k := 1; k <= len(q.Retries); k++ {
		// A client that sent its first SYN at t is still refused at its
		// (k−1)-th retry if that goes out before the stall ends.
		counts[k] = q.sentBefore(full, q.Stall-q.lateRetry(k-1)) - q.sentBefore(full, q.Stall-q.lateRetry(k))
	}
	return counts
}

// lateRetry is when the k-th retransmission goes out on average, 0 being the
// first SYN. Each timer is rounded up by itself.
func (q acceptQueue) lateRetry(k int) time.Duration {
	if k == 0 {
		return 0
	}
	return q.Retries[k-1] + time.Duration(k)*q.Rounding/2
}

// lateRetries are the times of all retransmissions, each with its rounding.
func (q acceptQueue) lateRetries() []time.Duration {
	times := make([]time.Duration, len(q.Retries))
	for k := range times {
		times[k] = q.lateRetry(k + 1)
	}
	return times
}

// unserved is how many clients find a place and lose patience in it: those that
// come so early in the stall that it outlasts their timeout.
func (q acceptQueue) unserved(timeout time.Duration) float64 {
	return q.sentBefore(0, min(q.fill(), q.Stall-timeout))
}

// sentBefore counts first SYNs sent between from and to.
func (q acceptQueue) sentBefore(from, to time.Duration) float64 {
	return max(0, q.Rate*(to-from).Seconds())
}

// attempts is how many SYNs are dropped, first ones and retransmitted ones:
// what TcpExt.ListenOverflows counts (net/ipv4/tcp_input.c, tcp_conn_request).
// It is more than the number of victims as soon as the stall outlasts the first
// retransmission.
func (q acceptQueue) attempts() float64 {
	var sum float64
	full := q.fill()
	for k := 0; k <= len(q.Retries); k++ {
		sum += q.sentBefore(full, q.Stall-q.lateRetry(k))
	}
	return sum
}

// gaveUp is how many clients never connect: their first SYN is dropped, and so is
// every retransmission that they live to see. Retries must hold those before the
// clients' connect timeout, and no other.
func (q acceptQueue) gaveUp() float64 {
	return q.sentBefore(q.fill(), q.Stall-q.lateRetry(len(q.Retries)))
}
