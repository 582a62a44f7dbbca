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
	metricRSTsApart    = "web/OutRstsMinusOverflow"
	metricTraceApart   = "web/Trace.ResetsMissed"
	metricTraceNoSock  = "web/Trace.Resets.NO_SOCKET"
	metricTraceAnswers = "web/Trace.Resets.TcpV4SendReset"
	metricTWFull       = "web/OverflowOrRecycled"
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

// taken is how long a bucket is taken at most: it waits for a FIN that trails, is in
// TIME_WAIT for 60 s, and up to one granule of the timer wheel longer.
func (l timeWaitLeg) taken(rules KernelRules) time.Duration {
	return max(0, l.trail-rules.DelayedACK) + timeWaitLength + rules.TimeWaitRounding
}

// overflow is how many closes of a leg find no bucket. Buckets fill at r; from
// then on every close overflows, until buckets come free. They do so in lumps, a
// granule G of the timer wheel apart. The first lump is due U after the first close's
// 60 s are over, 0 < U ≤ G, and frees r·U; those are taken again within U, and
// closes overflow for the rest of G. From the second lump on as many are freed as are
// taken. So, whatever U is, closes overflow for as long as if all buckets were kept
// for the longest time.
func (w *timeWait) overflow(leg timeWaitLeg, rules KernelRules) float64 {
	if w.Close != closeClient {
		return 0
	}
	if leg.lasts() <= timeWaitLength {
		return max(0, float64(leg.closes-w.Buckets))
	}
	return max(0, leg.rate*leg.taken(rules).Seconds()-float64(w.Buckets))
}

func (w *timeWait) overflowFormula(leg timeWaitLeg) string {
	if leg.lasts() <= timeWaitLength {
		return "max(0, n − M)"
	}
	return "max(0, r·R − M)"
}

// resets is how many of its peers' FINs a leg answers with RST, or RSTs it sends
// as it closes.
func (w *timeWait) resets(leg timeWaitLeg, rules KernelRules) float64 {
	switch {
	case w.Close == closeReset:
		return float64(leg.closes)
	case leg.trail <= rules.DelayedACK || w.keepsSockets():
		return 0
	}
	return w.overflow(leg, rules)
}

// meet is by how many buckets tcp_max_tw_buckets may be exceeded: the kernel looks
// whether there is room (inet_twsk_alloc), and counts the bucket a little later
// (inet_twsk_hashdance_schedule), so that CPUs which meet there both find the last.
const meet = 2

// keepsSockets says that an orphan waits in FIN_WAIT_2 as a whole socket: for as much
// of tcp_fin_timeout as exceeds TIME_WAIT's 60 s (net/ipv4/tcp_input.c,
// tcp_rcv_state_process). A bucket is only asked for when the FIN has come.
func (w *timeWait) keepsSockets() bool {
	return time.Duration(w.FinTimeout)*time.Second > timeWaitLength
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
	counted := results.Exactly()
	if n > m {
		counted = results.PlusMinus(meet)
	}
	add(metricClosed, "closes", "n", n, results.Exactly(), "every connection is closed; "+w.groups(leg))
	switch {
	case w.Close == closeServer:
		add(metricTWOverflow, "sockets", "0", 0, results.Exactly(), "the web server closes second, and has nothing to remember")
		add(metricTWPeak, "sockets", "0", 0, results.Exactly(), "TIME_WAITs of the web server")
		if leg.lasts() < timeWaitLength {
			add(metricTWServer, "sockets", "n", n, results.Within(0.01), "TIME_WAITs of Redis, which sent the first FIN; a port of the web server that is used again takes its bucket over")
		}
		add(metricOutRsts, "RSTs", "0", 0, results.Exactly(), "each FIN finds its socket")
		return claims
	case w.Close == closeReset:
		add(metricTWOverflow, "sockets", "0", 0, results.Exactly(), "an RST ends a connection at once")
		add(metricTWPeak, "sockets", "0", 0, results.Exactly(), "TIME_WAITs of the web server")
		add(metricOutRsts, "RSTs", "n", n, results.Exactly(), "one for every close")
		return claims
	case leg.lasts() <= timeWaitLength && w.Reuse == 1:
		add(metricTWFull, "sockets", w.overflowFormula(leg), overflow, counted, "closes that find every bucket taken, and buckets that a connection to the same place from the same port took over")
		add(metricTWPeak, "sockets", "min(n, M)", min(n, m), counted, "buckets in use, FIN_WAIT_2 included")
	case leg.lasts() <= timeWaitLength:
		add(metricTWOverflow, "sockets", w.overflowFormula(leg), overflow, counted, "closes that find every bucket taken; none is free again within 60 s")
		add(metricTWPeak, "sockets", "min(n, M)", min(n, m), counted, "buckets in use, FIN_WAIT_2 included")
	default:
		if overflow > 0 {
			// The delayed ACK and the timer's tick: some milliseconds.
			counted = results.PlusMinus(math.Ceil(leg.rate*0.02) + 2)
		}
		add(metricTWOverflow, "sockets", w.overflowFormula(leg), overflow, counted,
			fmt.Sprintf("R, how long a bucket is taken at most: the wait for the FIN, 60 s, and %v, since the timer wheel ends them in lumps", rules.TimeWaitRounding))
	}
	switch {
	case w.keepsSockets():
		add(metricOutRsts, "RSTs", "0", 0, results.Exactly(), "the FIN finds a whole socket, bucket or no bucket")
	case leg.trail > rules.DelayedACK:
		if w.Reuse != 1 {
			add(metricOutRsts, "RSTs", w.overflowFormula(leg), resets, counted, "as many: the FIN that comes later finds no socket")
		}
		add(metricRSTsApart, "RSTs", "0", 0, results.Exactly(), "OutRsts − TCPTimeWaitOverflow: one RST for each close that overflowed")
	default:
		add(metricOutRsts, "RSTs", "0", 0, results.Exactly(), "the FIN came with the ACK: it met the socket")
	}
	if !w.oneLeg() {
		return claims
	}
	// The states are claimed where they stand still for long enough to be seen.
	full := leg.lasts() - time.Duration(m/leg.rate*float64(time.Second))
	switch {
	case leg.trail < rules.DelayedACK+settled || leg.lasts() > timeWaitLength:
	case (n <= m || w.keepsSockets()) && leg.lasts() > 2*leg.trail+watched:
		add(metricFinWait2, "sockets", "r·(d − A)", leg.rate*(leg.trail-rules.DelayedACK).Seconds(), results.Within(0.1), "waiting for the FIN of Redis, which trails by d, the ACK by A")
		add(metricFinWait1, "sockets", "r·A", leg.rate*rules.DelayedACK.Seconds(), results.Within(0.25), "waiting for the ACK, which the other side delays by A")
	case n > m && full > 2*leg.trail+watched:
		// Where the ACK comes in the moment in which close(2) is at work the socket stays whole, and needs no bucket
		// (net/ipv4/tcp_input.c, tcp_rcv_state_process: sock_owned_by_user).
		add(metricFinWait2, "sockets", "r·(d − A)/100", leg.rate*(leg.trail-rules.DelayedACK).Seconds()/100, results.AtMost(),
			"once the buckets are full FIN_WAIT_2 is hardly to be seen any more: not one in a hundred is left")
		add(metricFinWait1, "sockets", "r·A", leg.rate*rules.DelayedACK.Seconds(), results.Within(0.25), "waiting for the ACK, which the other side delays by A")
	}
	if resets > 0 && leg.lasts() <= timeWaitLength {
		add(metricTraceApart, "RSTs", "0", 0, results.Exactly(), "OutRsts − resets that the tracer saw")
	}
	if resets > 0 && leg.lasts() <= timeWaitLength && w.Reuse != 1 {
		add(metricTraceAnswers, "RSTs", "n − M", resets, counted, "sent by tcp_v4_send_reset, in answer to a packet")
		if rules.ResetReasons {
			add(metricTraceNoSock, "RSTs", "0.9·(n − M)", math.Ceil(0.9*resets), results.AtLeast(),
				"by tcp_v4_rcv, for the reason NO_SOCKET: all, but for ports that are used again so soon that Redis still has the old connection and challenges the SYN")
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
	return fmt.Sprintf("without dimension, to compare with runs of other sizes: n/M = %.3f, 60·r/M = %.3f, (n/r)/60 s = %.3f, trail/40 ms = %.2f",
		float64(leg.closes)/float64(w.Buckets), timeWaitLength.Seconds()*leg.rate/float64(w.Buckets),
		leg.lasts().Seconds()/timeWaitLength.Seconds(), leg.trail.Seconds()/0.04)
}
