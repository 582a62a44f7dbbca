package scenarios

import (
	"container/heap"
	"math"
	"math/rand/v2"
	"slices"
	"time"

	"connlab/netlab"
)

// stormModel plays a reconnect storm: clients that were cut come back to a listener that
// accepts μ connections a second. It is arithmetic on arrival times with the kernel's rules
// for a full queue and for SYN retries, not a simulation of packets: a handshake takes no
// time, as on a link without latency.
type stormModel struct {
	queue       acceptQueue   // limit and places; its Rate and Stall are not used
	acceptRate  float64       // μ, accepts per second while the queue holds any; 0 is at once
	burst       time.Duration // the server makes up for so much time in which nobody came
	clients     int           // that were cut
	spread      time.Duration // their first attempts come within so long
	jitter      bool          // at random times within it, instead of evenly
	back        backOff       // of a client whose attempt failed
	timeout     time.Duration // patience for the connection, and again for the reply
	probeEvery  time.Duration // one more client connects so often and asks nothing; 0 is none
	probeBefore time.Duration // it begins so long before the storm
	horizon     time.Duration // the end, from the beginning of the storm
	intervals   []time.Duration
	tick        time.Duration // a jiffy
	seed        uint64
	lumps       bool // SYN retries that are due in the same tick of a kernel's timers are looked at together: see play
	before410   bool // the rule of kernels before 4.10: see play
}

// backOff is when a client tries again: after a random time, uniform between 0 and
// min(most, base·2^k) after its k-th failure, counted from 0; at once where base is 0.
type backOff struct{ base, most time.Duration }

func (b backOff) limit(failures int) time.Duration {
	if b.base == 0 {
		return 0
	}
	return min(b.most, b.base<<min(failures, 20))
}

// stormOutcome is what happens to the clients and at the listener. Times are counted from
// the beginning of the storm.
type stormOutcome struct {
	victims    int             // clients whose first SYN is dropped
	attempts   int             // of all clients
	failed     int             // attempts that came to nothing, by any timeout
	corpses    int             // connections accepted after their client had given up
	overflows  int             // SYNs dropped, first and retransmitted ones, the prober's too
	peak       int             // most connections in the accept queue
	fill       time.Duration   // when the queue was full first; 0 if it never was
	recovered  []time.Duration // when each client had its reply, in order
	connects   []time.Duration // of all attempts of clients that got a connection, how long it took
	probes     int             // of the prober, between the beginning and the end
	probesHung int             // those whose first SYN was dropped
	accepted   int             // connections that the server accepted, the prober's too
	ghosts     int             // handshakes that were answered, and whose final ACK found the queue full
	refused    int             // final ACKs and requests of ghosts that found it full
}

type stormEventKind uint8

const (
	stormDue     stormEventKind = iota // an attempt begins
	stormSYN                           // a SYN is sent again
	stormGivesUp                       // a client's patience ends
	stormRequest                       // a ghost sends its request again
	stormSYNACK                        // the server sends a ghost its SYN-ACK again, and has an ACK for it
)

type stormEvent struct {
	at      time.Duration
	kind    stormEventKind
	client  int32 // -1 is a probe
	attempt int32 // of the client, from 0; of a probe its number
	retry   int32 // of the SYN
	started time.Duration
}

type stormEvents []stormEvent

func (h stormEvents) Len() int           { return len(h) }
func (h stormEvents) Less(i, j int) bool { return h[i].at < h[j].at }
func (h stormEvents) Swap(i, j int)      { h[i], h[j] = h[j], h[i] }

// Push and Pop are for package heap.
func (h *stormEvents) Push(x any) { *h = append(*h, x.(stormEvent)) }
func (h *stormEvents) Pop() any {
	last := len(*h) - 1
	e := (*h)[last]
	*h = (*h)[:last]
	return e
}

// waiting is a connection in the accept queue.
type waiting struct {
	client, attempt int32
	since           time.Duration
}

const probeClient = -1

// minRTO is the shortest retransmission timeout of data: TCP_RTO_MIN (include/net/tcp.h).
const minRTO = 200 * time.Millisecond

// young is a request of a kernel before 4.10 whose SYN-ACK has not been sent again yet.
type young struct {
	client, attempt int32
	until           time.Duration
}

// mostYoung is how many of them such a kernel has beside a full queue before it drops a SYN.
const mostYoung = 1

// play returns what happens.
//
// Clients of one kernel send their SYN retries in lumps, since the timer wheel rounds (32 ms
// at 250 Hz). A lump is sent in one go before any of its answers is looked at (kernel/softirq.c:
// timers come before receiving), so that one free place can let all of its SYNs pass; all but one
// of those clients are then refused at their final ACK, and are ghosts: they believe that
// they are connected, and send their request again until there is a place. How many of a
// lump pass depends on how two CPUs meet, so there are two models: each SYN looked at by
// itself, and whole lumps. What happens lies between them. Clients on machines of
// their own have no lumps.
//
// The rule since 4.10 is that a SYN is dropped if the queue is full
// (net/ipv4/tcp_input.c, tcp_conn_request). Before, it was dropped only if more than one
// young request waited as well: one whose SYN-ACK had not been sent again, which is done
// after a second (commit 5ea8ea2cb7f1). So such a kernel answers two SYNs a second although the
// queue is full, and refuses their final ACKs: those clients believe that they are connected,
// and send their request again after 0.2, 0.4, 0.8 s and so on until a place is free.
func (m stormModel) play() stormOutcome {
	random := rand.New(rand.NewPCG(m.seed, 0x6a09e667f3bcc909))
	var out stormOutcome
	var events stormEvents
	for i := range m.clients {
		at := time.Duration(float64(m.spread) * float64(i) / float64(m.clients))
		if m.jitter {
			at = time.Duration(random.Float64() * float64(m.spread))
		}
		events = append(events, stormEvent{at: at, kind: stormDue, client: int32(i)})
	}
	if m.probeEvery > 0 {
		for i, at := int32(0), -m.probeBefore; at < m.horizon; i, at = i+1, at+m.probeEvery {
			events = append(events, stormEvent{at: at, kind: stormDue, client: probeClient, attempt: i})
		}
	}
	for i := range events {
		events[i].at += unsteady(random)
	}
	heap.Init(&events)

	places := m.queue.places()
	var queue []waiting
	head := 0
	current := make([]int32, m.clients)           // the attempt each client is at
	done := make([]bool, m.clients)               // has its reply
	connected := make([]time.Duration, m.clients) // of the current attempt; negative is not yet
	haunting := map[[2]int32]bool{}               // attempts of clients that are ghosts, and of probes
	lump, lumpPasses := -time.Hour, false
	gone := func(e stormEvent) bool {
		return e.client != probeClient && (current[e.client] != e.attempt || done[e.client])
	}
	token := -time.Hour // when the next token is there at the earliest, if the bucket had no bottom
	gap := time.Duration(0)
	if m.acceptRate > 0 {
		gap = time.Duration(float64(time.Second) / m.acceptRate)
	}
	drain := func(until time.Duration) {
		for head < len(queue) {
			w := queue[head]
			at := w.since
			if gap > 0 {
				token = max(token, at-m.burst)
				at = max(at, token)
				if at > until {
					return
				}
				token += gap
			}
			head++
			out.accepted++
			if w.client == probeClient {
				continue
			}
			if current[w.client] != w.attempt || done[w.client] {
				out.corpses++
				continue
			}
			done[w.client] = true
			out.recovered = append(out.recovered, at)
		}
	}
	var youngs []young
	// refuse is for what a ghost sends, the e.retry-th of its kind, while there is no place.
	refuse := func(e stormEvent) {
		out.refused++
		interval := netlab.InitialSYNTimeout << min(e.retry, 9)
		if e.kind == stormRequest {
			// A tail loss probe comes before the first timeout (net/ipv4/tcp_output.c,
			// tcp_schedule_loss_probe).
			interval = minRTO << min(max(0, e.retry-1), 9)
		}
		e.at, e.retry = m.wheel(e.at, interval), e.retry+1
		heap.Push(&events, e)
	}
	// haunt makes a ghost of a handshake that has been answered in vain.
	haunt := func(e stormEvent) {
		out.ghosts++
		haunting[[2]int32{e.client, e.attempt}] = true
		if e.client != probeClient {
			connected[e.client] = e.at
			out.connects = append(out.connects, e.at-e.started)
			heap.Push(&events, stormEvent{at: e.at + m.timeout, kind: stormGivesUp, client: e.client, attempt: e.attempt})
		}
		e.retry = 0
		e.kind = stormSYNACK
		refuse(e) // the final ACK
		if e.client != probeClient {
			e.kind = stormRequest
			refuse(e)
		}
	}
	syn := func(e stormEvent) {
		if len(queue)-head < places {
			queue = append(queue, waiting{e.client, e.attempt, e.at})
			out.peak = max(out.peak, len(queue)-head)
			if len(queue)-head == places && out.fill == 0 {
				out.fill = e.at
			}
			took := e.at - e.started
			if e.client == probeClient {
				return
			}
			if e.kind == stormRequest || e.kind == stormSYNACK {
				return // it has been connected, as it believes, since its SYN-ACK
			}
			connected[e.client] = e.at
			out.connects = append(out.connects, took)
			heap.Push(&events, stormEvent{at: e.at + m.timeout, kind: stormGivesUp, client: e.client, attempt: e.attempt})
			return
		}
		if m.before410 {
			youngs = slices.DeleteFunc(youngs, func(y young) bool { return y.until <= e.at })
			if len(youngs) <= mostYoung {
				youngs = append(youngs, young{e.client, e.attempt, m.wheel(e.at, netlab.InitialSYNTimeout)})
				haunt(e)
				return
			}
		}
		out.overflows++
		if e.retry == 0 {
			switch {
			case e.client == probeClient:
				out.probesHung++
			case e.attempt == 0:
				out.victims++
			}
		}
		if int(e.retry) >= len(m.intervals) {
			return
		}
		again := e
		again.kind, again.retry = stormSYN, e.retry+1
		again.at = m.wheel(e.at, m.intervals[e.retry])
		if again.at-e.started < m.timeout {
			heap.Push(&events, again)
		}
	}
	for events.Len() > 0 {
		e := heap.Pop(&events).(stormEvent)
		if e.at > m.horizon {
			break
		}
		drain(e.at)
		switch e.kind {
		case stormDue:
			e.started = e.at
			if e.client == probeClient {
				if e.at >= 0 {
					out.probes++
				}
			} else {
				out.attempts++
				current[e.client], connected[e.client] = e.attempt, -1
				heap.Push(&events, stormEvent{at: e.at + m.timeout, kind: stormGivesUp, client: e.client, attempt: e.attempt})
			}
			syn(e)
		case stormSYN:
			if gone(e) {
				continue
			}
			if e.at != lump {
				lump, lumpPasses = e.at, len(queue)-head < places
			}
			if m.lumps && lumpPasses && len(queue)-head >= places {
				haunt(e)
				continue
			}
			syn(e)
		case stormRequest, stormSYNACK:
			// It goes on when its client has given up: what an orphan has not sent is sent again.
			ghost := [2]int32{e.client, e.attempt}
			if !haunting[ghost] {
				continue
			}
			if len(queue)-head >= places {
				refuse(e)
				continue
			}
			delete(haunting, ghost)
			youngs = slices.DeleteFunc(youngs, func(y young) bool { return y.client == e.client && y.attempt == e.attempt })
			syn(e)
		case stormGivesUp:
			c := e.client
			if done[c] || current[c] != e.attempt || connected[c] >= 0 && e.at < connected[c]+m.timeout {
				continue
			}
			out.failed++
			current[c], connected[c] = e.attempt+1, -1
			wait := time.Duration(random.Float64()*float64(m.back.limit(int(e.attempt)))) + unsteady(random)
			heap.Push(&events, stormEvent{at: e.at + wait, kind: stormDue, client: c, attempt: e.attempt + 1})
		}
	}
	drain(m.horizon)
	slices.Sort(out.recovered)
	slices.Sort(out.connects)
	return out
}

// unsteadiness is by how much attempts come later than they should, at random, in the model as in
// the run. Without it arrivals, accepts and probes would keep step, and the same ones would find
// a place each time.
const unsteadiness = 10 * time.Millisecond

// unsteady is that of one attempt.
func unsteady(random *rand.Rand) time.Duration {
	return time.Duration(random.Float64() * float64(unsteadiness))
}

// wheel is when a timer set at a time goes off: rounded up to the granularity of the
// timer wheel's level (kernel/time/timer.c, calc_index).
func (m stormModel) wheel(at, interval time.Duration) time.Duration {
	step := timerRounding(m.tick, interval)
	return (at+interval)/step*step + step
}

// quantile is the value that the fraction q of a sorted list does not exceed.
func quantile(sorted []time.Duration, q float64) time.Duration {
	if len(sorted) == 0 {
		return 0
	}
	return sorted[min(len(sorted)-1, int(math.Ceil(q*float64(len(sorted))))-1)]
}
