package scenarios

import (
	"fmt"
	"math"
	"time"

	"connlab/results"
)

// Metrics that Predict and Measure both name; those of a leg have its suffix.
const (
	metricClosed       = "web/Closed"
	metricTWOverflow   = "web/TcpExt.TCPTimeWaitOverflow"
	metricOutRsts      = "web/Tcp.OutRsts"
	metricTWPeak       = "web/sockstat.TCP.tw.Peak"
	metricTWServer     = "redis/sockstat.TCP.tw.Peak"
	metricFinWait1     = "web/State.FIN_WAIT1.Mean"
	metricFinWait2     = "web/State.FIN_WAIT2.Mean"
	metricRSTsApart    = "web/RSTsWithoutOverflow"
	metricTraceApart   = "web/Trace.ResetsMissed"
	metricTraceNoSock  = "web/Trace.Resets.NoSocket"
	metricTraceStacked = "web/Trace.Resets.FromTcpV4Rcv"
)

// traced begins the names of metrics that only the tracer has.
const traced = "web/Trace."

// Predict implements [Experiment].
func (w *timeWait) Predict(role results.Role, rules KernelRules) []results.Prediction {
	var claims []results.Prediction
	for _, leg := range w.legs() {
		claims = append(claims, w.predictLeg(leg, rules)...)
	}
	switch role {
	case results.Incident, results.FalseLead:
		claims = append(claims, claim(metricOutRsts+".All", "RSTs", "1", nil, 1, results.AtLeast(), "the symptom must show"))
	case results.Fix:
		claims = append(claims, claim(metricOutRsts+".All", "RSTs", "0", nil, 0, results.Exactly(), "the symptom must be gone"))
	}
	return claims
}

// remembered is how long a bucket is in TIME_WAIT on average: the timer wheel rounds
// up.
func remembered(rules KernelRules) time.Duration { return timeWaitLength + rules.TimeWaitRounding/2 }

// taken is how long a bucket is taken on average: before TIME_WAIT it waits for a FIN
// that trails.
func (l timeWaitLeg) taken(rules KernelRules) time.Duration {
	return remembered(rules) + max(0, l.trail-rules.DelayedACK)
}

// overflow is how many closes of a leg find no bucket. Buckets fill at r; from
// then on every close overflows until the first are free again, R after the
// first close.
func (w *timeWait) overflow(leg timeWaitLeg, rules KernelRules) float64 {
	if w.Close != closeClient {
		return 0
	}
	if leg.lasts() <= timeWaitLength {
		return max(0, float64(leg.closes-w.Buckets))
	}
	return max(0, leg.rate*min(leg.lasts(), leg.taken(rules)).Seconds()-float64(w.Buckets))
}

// resets is how many of its peers' FINs a leg answers with RST, or RSTs it sends
// as it closes.
func (w *timeWait) resets(leg timeWaitLeg, rules KernelRules) float64 {
	switch {
	case w.Close == closeReset:
		return float64(leg.closes)
	case leg.trail <= rules.DelayedACK:
		return 0
	}
	return w.overflow(leg, rules)
}

func (w *timeWait) predictLeg(leg timeWaitLeg, rules KernelRules) []results.Prediction {
	n, m := float64(leg.closes), float64(w.Buckets)
	inputs := map[string]float64{
		"n": n, "M": m, "r": leg.rate, "T": leg.lasts().Seconds(), "R": leg.taken(rules).Seconds(),
		"d": leg.trail.Seconds(), "A": rules.DelayedACK.Seconds(),
	}
	var claims []results.Prediction
	add := func(metric, unit, formula string, predicted float64, tol results.Tolerance, note string) {
		claims = append(claims, claim(metric+leg.suffix, unit, formula, inputs, predicted, tol, note))
	}
	overflow, resets := w.overflow(leg, rules), w.resets(leg, rules)
	add(metricClosed, "connections", "n", n, results.Exactly(), w.groups(leg))
	switch {
	case w.Close == closeServer:
		add(metricTWOverflow, "sockets", "0", 0, results.Exactly(), "the web server closes second, and has nothing to remember")
		add(metricTWPeak, "sockets", "0", 0, results.Exactly(), "TIME_WAITs of the web server")
		if leg.lasts() < timeWaitLength {
			add(metricTWServer, "sockets", "n", n, results.Exactly(), "TIME_WAITs of Redis: it sent the first FIN")
		}
		add(metricOutRsts, "RSTs", "0", 0, results.Exactly(), "each FIN finds its socket")
		return claims
	case w.Close == closeReset:
		add(metricTWOverflow, "sockets", "0", 0, results.Exactly(), "an RST ends a connection at once")
		add(metricTWPeak, "sockets", "0", 0, results.Exactly(), "TIME_WAITs of the web server")
		add(metricOutRsts, "RSTs", "n", n, results.Exactly(), "one for every close")
		return claims
	case leg.lasts() <= timeWaitLength:
		add(metricTWOverflow, "sockets", "max(0, n − M)", overflow, results.Exactly(), "closes that find every bucket taken; none is free again within 60 s")
		add(metricTWPeak, "sockets", "min(n, M)", min(n, m), results.Exactly(), "buckets in use, FIN_WAIT_2 included")
	default:
		tolerance := results.Exactly()
		if overflow > 0 {
			tolerance = results.PlusMinus(math.Ceil(leg.rate*rules.TimeWaitRounding.Seconds()/2) + 3)
		}
		add(metricTWOverflow, "sockets", "max(0, r·min(T, R) − M)", overflow, tolerance,
			fmt.Sprintf("R: the wait for the FIN, 60 s, and up to %v more, since the timer wheel ends them in lumps; at most one of which decides", rules.TimeWaitRounding))
	}
	if leg.trail > rules.DelayedACK {
		add(metricRSTsApart, "RSTs", "0", 0, results.Exactly(), "OutRsts − TCPTimeWaitOverflow: one RST for each close that overflowed")
	} else {
		add(metricOutRsts, "RSTs", "0", 0, results.Exactly(), "the FIN came with the ACK: it met the socket")
	}
	if !w.oneLeg() {
		return claims
	}
	// The states are claimed where they stand still for long enough to be seen.
	full := leg.lasts() - time.Duration(m/leg.rate*float64(time.Second))
	switch {
	case leg.trail < rules.DelayedACK+settled:
	case n <= m && leg.lasts() > 2*leg.trail+watched:
		add(metricFinWait2, "sockets", "r·(d − A)", leg.rate*(leg.trail-rules.DelayedACK).Seconds(), results.Within(0.1), "waiting for the FIN of Redis")
		add(metricFinWait1, "sockets", "r·A", leg.rate*rules.DelayedACK.Seconds(), results.Within(0.25), "waiting for the ACK, which the other side delays")
	case n > m && full > 2*leg.trail+watched:
		add(metricFinWait2, "sockets", "0", 0, results.Exactly(), "once the buckets are full FIN_WAIT_2 cannot be seen any more")
		add(metricFinWait1, "sockets", "r·A", leg.rate*rules.DelayedACK.Seconds(), results.Within(0.25), "waiting for the ACK, which the other side delays")
	}
	if resets > 0 {
		add(metricTraceApart, "RSTs", "0", 0, results.Exactly(), "OutRsts − resets that the tracer saw")
		add(metricTraceStacked, "RSTs", "n − M", resets, results.Exactly(), "sent by tcp_v4_send_reset ← tcp_v4_rcv")
		if rules.ResetReasons {
			add(metricTraceNoSock, "RSTs", "n − M", resets, results.Exactly(), "for the reason NO_SOCKET")
		}
	}
	return claims
}

// settled is by how much a trail must be longer than a delayed ACK for FIN_WAIT_2
// to last longer than the two are uncertain, and watched how long a state must
// stand still to be claimed: some samples.
const (
	settled = 50 * time.Millisecond
	watched = time.Second
)

// groups are the numbers without dimension that make two runs of different size
// the same experiment.
func (w *timeWait) groups(leg timeWaitLeg) string {
	return fmt.Sprintf("groups: n/M = %.3f, 60·r/M = %.3f, (n/r)/60 s = %.3f, trail/40 ms = %.2f",
		float64(leg.closes)/float64(w.Buckets), timeWaitLength.Seconds()*leg.rate/float64(w.Buckets),
		leg.lasts().Seconds()/timeWaitLength.Seconds(), leg.trail.Seconds()/0.04)
}
