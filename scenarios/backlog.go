package scenarios

import (
	"flag"
	"fmt"
	"math"
	"net/netip"
	"os"
	"regexp"
	"strconv"
	"time"

	"golang.org/x/sys/unix"

	"connlab/netlab"
	"connlab/netlab/wire"
	"connlab/results"
)

// Backlog is incident 1: a Redis with more than a hundred client machines, whose
// event loop stands still for 1.43 s. The article's end is missing; that the
// server cron shrank the query buffers of many idle clients in one pass is a
// reconstruction from Redis 2.8.19 and its issue 4983.
var Backlog = Scenario{
	Name:  "backlog",
	Title: "An accept queue overflows while the event loop stands still",
	Story: backlogStory,
	New:   func() Experiment { return newBacklog() },
	Variants: []Variant{
		{Name: "incident", Role: results.Incident,
			Summary: "backlog 511, the event loop stands still for 1.43 s: first SYNs are dropped without an answer"},
		{Name: "impatient", Role: results.Incident, Set: []string{"timeout=900ms"},
			Summary: "the same, with clients that wait less than one SYN retransmission: what the article's clients logged"},
		{Name: "backlog-2048", Role: results.FalseLead, Set: []string{"backlog=2048"},
			Summary: "the remedy that was tried: a longer queue only moves the threshold"},
		{Name: "somaxconn-128", Role: results.FalseLead, Set: []string{"backlog=2048", "somaxconn=128"},
			Summary: "a longer backlog alone: the kernel cuts it to somaxconn, and it is worse than before"},
		{Name: "abort-on-overflow", Role: results.FalseLead, Set: []string{"abort=1"},
			Summary: "tcp_abort_on_overflow=1 without latency: SYNs are dropped all the same, and next to nobody is told"},
		{Name: "backlog-2900", Role: results.Fix, Set: []string{"backlog=2900"},
			Summary: "a queue of at least λT places: nothing is dropped, and every client waits for up to the whole stall"},
		{Name: "long-connections", Role: results.Fix, Set: []string{"over-held=true"},
			Summary: "the same requests over connections that exist already: none needs a place, all wait for the stall"},
		{Name: "no-stall", Role: results.Control, Set: []string{"stall=0s"},
			Summary: "the healthy control: backlog 511 and a server that keeps accepting, the root cause removed"},
		{Name: "placebo", Role: results.Control, Set: []string{"max-syn-backlog=65536"},
			Summary: "the placebo control: tcp_max_syn_backlog raised: a knob of the other queue, the numbers of the incident must come back"},
		{Name: "late-ack", Role: results.Incident, Set: []string{"held=0", "stall=2500ms", "volley-1=400", "volley-2=300", "delay=20ms"},
			Summary: "with latency the queue fills between SYN-ACK and ACK: clients believe that they are connected"},
		{Name: "late-ack-abort", Role: results.FalseLead, Set: []string{"held=0", "stall=2500ms", "volley-1=400", "volley-2=300", "delay=20ms", "abort=1"},
			Summary: "the same with tcp_abort_on_overflow=1: those clients get ECONNRESET, after connect() has succeeded"},
		{Name: "cookies", Role: results.Incident, Set: []string{"held=0", "stall=2500ms", "volley-1=1000", "delay=40ms"},
			Summary: "a burst beyond the SYN queue too: SYN cookies answer it, and the server keeps no trace of the ghosts"},
	},
}

// backlog is the parameters of incident 1. It has two shapes of load: open-loop
// arrivals at a constant rate around a stall, or, if Volley1 is not 0, one or two
// volleys of connections inside it.
type backlog struct {
	Hosts int
	Held  int
	Rate  float64
	Stall time.Duration

	Backlog       int
	Somaxconn     int
	MaxSYNBacklog int
	Abort         int
	Accepts       int

	Delay    time.Duration
	Timeout  time.Duration
	OverHeld bool
	Volley1  int
	Volley2  int
}

func newBacklog() *backlog {
	return &backlog{
		Hosts: 120, Held: 3500, Rate: 2000, Stall: 1430 * time.Millisecond,
		Backlog: 511, Somaxconn: 4096, MaxSYNBacklog: 512, Accepts: 1000,
		Timeout: 6 * time.Second,
	}
}

// Flags implements [Experiment].
func (b *backlog) Flags(fs *flag.FlagSet) {
	fs.IntVar(&b.Hosts, "hosts", b.Hosts, "client `hosts`, one address each (1 to 1000)")
	fs.IntVar(&b.Held, "held", b.Held, "`connections` that are open before, and idle (0 to 8000)")
	fs.Float64Var(&b.Rate, "rate", b.Rate, "λ: new connections per second, each for one PING (1 to 10000)")
	fs.DurationVar(&b.Stall, "stall", b.Stall, "T: how long the event loop stands still, outside any command (0s, or 100ms to 5s)")
	fs.IntVar(&b.Backlog, "backlog", b.Backlog, "argument of listen(2) (1 to 65535)")
	fs.IntVar(&b.Somaxconn, "somaxconn", b.Somaxconn, "net.core.somaxconn of the server's namespace (1 to 65535)")
	fs.IntVar(&b.MaxSYNBacklog, "max-syn-backlog", b.MaxSYNBacklog, "net.ipv4.tcp_max_syn_backlog of the server's namespace (1 to 1000000)")
	fs.IntVar(&b.Abort, "abort", b.Abort, "net.ipv4.tcp_abort_on_overflow of the server's namespace (0 or 1)")
	fs.IntVar(&b.Accepts, "accepts", b.Accepts, "accepts per cycle of the mini server's loop: 1000 is Redis to 7.2, 10 is Redis 7.4 (1 to 100000)")
	fs.DurationVar(&b.Delay, "delay", b.Delay, "latency of the server's link, each way (0s to 500ms)")
	fs.DurationVar(&b.Timeout, "timeout", b.Timeout, "how long a client waits for the connection, and again for the reply (50ms to 60s)")
	fs.BoolVar(&b.OverHeld, "over-held", b.OverHeld, "send the requests over the held connections instead of new ones")
	fs.IntVar(&b.Volley1, "volley-1", b.Volley1, "instead of arrivals at a rate: so many `connects` at once inside the stall (0 to 8000)")
	fs.IntVar(&b.Volley2, "volley-2", b.Volley2, "and so many more `connects` once the first are established (0 to 8000)")
}

// Times of a run, counted from the start of the load.
const (
	lead         = 300 * time.Millisecond // arrivals before the stall is asked for
	cronPeriod   = 100 * time.Millisecond // the mini server's stall begins so much later at most
	tailLoad     = 400 * time.Millisecond // arrivals after the stall
	volley1At    = 250 * time.Millisecond // the stall has begun by then
	volley2At    = 500 * time.Millisecond // the first volley is established by then
	joinAt       = 800 * time.Millisecond // the second volley is established by then
	minVolleyFor = 1500 * time.Millisecond
)

// Check implements [Experiment].
func (b *backlog) Check() error {
	var found checks
	found.within("hosts", float64(b.Hosts), 1, 1000)
	found.within("held", float64(b.Held), 0, 8000)
	found.within("rate", b.Rate, 1, 10000)
	found.lasting("stall", b.Stall, 0, 5*time.Second)
	if b.Stall > 0 {
		found.lasting("stall", b.Stall, 100*time.Millisecond, 5*time.Second) // ten samples at least
	}
	found.within("backlog", float64(b.Backlog), 1, 65535)
	found.within("somaxconn", float64(b.Somaxconn), 1, 65535)
	found.within("max-syn-backlog", float64(b.MaxSYNBacklog), 1, 1e6)
	found.within("abort", float64(b.Abort), 0, 1)
	found.within("accepts", float64(b.Accepts), 1, 1e5)
	found.lasting("delay", b.Delay, 0, 500*time.Millisecond)
	found.lasting("timeout", b.Timeout, 50*time.Millisecond, time.Minute)
	found.within("volley-1", float64(b.Volley1), 0, 8000)
	found.within("volley-2", float64(b.Volley2), 0, 8000)
	switch {
	case b.OverHeld && b.Held == 0:
		found.bad("over-held=true needs held connections")
	case b.OverHeld && b.Volley1 > 0:
		found.bad("volleys are new connections: not with over-held=true")
	case b.Volley2 > 0 && b.Volley1 == 0:
		found.bad("volley-2 needs volley-1")
	case b.Volley1 > 0 && b.Stall < minVolleyFor:
		found.bad("volleys need a stall of at least %v to happen in", minVolleyFor)
	case b.Volley1 > 0 && b.Delay < 5*time.Millisecond:
		found.bad("volleys need delay=5ms or more: without latency each handshake is over before the next SYN")
	case b.Volley1 > 0 && b.Delay > 40*time.Millisecond:
		found.bad("volleys need delay=40ms or less, to be established in time")
	case b.Volley1 == 0 && b.Delay > 0:
		found.bad("delay is for the volleys: set volley-1 too")
	case b.Volley2 > 0 && b.Volley1 > b.queue(KernelRules{}).places():
		found.bad("volley-1=%d must fit the accept queue of %d places, for volley-2 to overflow it", b.Volley1, b.queue(KernelRules{}).places())
	case b.Volley2 > b.queue(KernelRules{}).places():
		found.bad("volley-2=%d must fit the SYN queue of %d places, or cookies take over", b.Volley2, b.queue(KernelRules{}).places())
	}
	if len(found) > 0 {
		return found.err()
	}
	return b.checkDescriptors()
}

// checkDescriptors compares what the load needs at most with what this process
// may have open (RLIMIT_NOFILE; the Go runtime raises the soft limit to the hard
// one).
func (b *backlog) checkDescriptors() error {
	var limit unix.Rlimit
	if err := unix.Getrlimit(unix.RLIMIT_NOFILE, &limit); err != nil {
		return os.NewSyscallError("getrlimit", err)
	}
	const perHost, others = 3, 100 // a namespace and two rtnetlink sockets
	need := b.Held + b.clients() + b.Hosts*(batch(b.Hosts)+perHost) + others
	if uint64(need) > limit.Max {
		return fmt.Errorf("this load may need %d open files, and the limit is %d: raise it (ulimit -Hn) or lower held, rate, stall or hosts", need, limit.Max)
	}
	return nil
}

// Topology implements [Experiment]: the clients and the server on one switch.
// Latency is the server's link's.
func (b *backlog) Topology() netlab.Topology {
	const lan = "lan"
	server := netlab.HostSpec{
		Name:  "server",
		Links: []netlab.LinkSpec{{Switch: lan, Delay: b.Delay, Pump: wire.Pump}},
		Sysctls: map[string]string{
			"net.core.somaxconn":           strconv.Itoa(b.Somaxconn),
			"net.ipv4.tcp_max_syn_backlog": strconv.Itoa(b.MaxSYNBacklog),
		},
	}
	return netlab.Topology{
		Switches: []netlab.SwitchSpec{{Name: lan, Subnet: netip.MustParsePrefix("10.66.0.0/16")}},
		Hosts:    append([]netlab.HostSpec{server}, netlab.Clients(b.Hosts, "client", lan, nil)...),
	}
}

// queue is the model of the listener under this load.
func (b *backlog) queue(rules KernelRules) acceptQueue {
	q := acceptQueue{Backlog: b.Backlog, Somaxconn: b.Somaxconn, Rate: b.Rate, Stall: b.Stall, Rounding: rules.TimerRounding}
	if b.OverHeld {
		q.Rate = 0
	}
	for _, at := range rules.SYNRetries(12) {
		if at < b.Timeout {
			q.Retries = append(q.Retries, at)
		}
	}
	return q
}

// Metrics that Predict and Measure both name.
const (
	metricLimit        = "server/Listen.Limit"
	metricPeakDepth    = "server/Listen.PeakDepth"
	metricEstablished  = "server/Tcp.CurrEstab.InStall"
	metricOverflows    = "server/TcpExt.ListenOverflows"
	metricDropsOnly    = "server/ListenDropsWithoutOverflow"
	metricStall        = "server/Stall" // measured only: a stall of another length voids the run
	metricSlowest      = "server/Slowlog.Longest"
	metricEmbryonic    = "server/TcpExt.EmbryonicRsts"
	metricCookies      = "server/TcpExt.SyncookiesSent"
	metricHalfOpen     = "server/Join.HalfOpen"
	metricSymptom      = "clients/Symptom"
	metricVictims      = "clients/Connect.Victims"
	metricRetriedOnce  = "clients/Connect.RetriedOnce"
	metricRetriedMore  = "clients/Connect.RetriedTwice"
	metricPeakOnce     = "clients/Connect.RetriedOnce.Median"
	metricPeakTwice    = "clients/Connect.RetriedTwice.Median"
	metricReadTimeouts = "clients/Failed.read_timeout"
	metricTimeouts     = "clients/Failed.connect_timeout"
	metricResets       = "clients/Failed.reset"
	metricFailed       = "clients/Failed"
	metricLatencyMax   = "clients/Latency.Max"
	metricLatencyMean  = "clients/Latency.InStall.Mean"
	metricEstabAtJoin  = "clients/Join.ESTABLISHED"
	metricGhosts       = "clients/Join.Ghosts"
	metricDroppedACKs  = "both/DroppedACKs"
)

// Predict implements [Experiment].
func (b *backlog) Predict(role results.Role, rules KernelRules) []results.Prediction {
	q := b.queue(rules)
	claims := []results.Prediction{{
		Metric: metricLimit, Formula: "min(backlog, somaxconn)", Unit: "connections",
		Inputs:    map[string]float64{"backlog": float64(b.Backlog), "somaxconn": float64(b.Somaxconn)},
		Predicted: float64(q.limit()), Tolerance: results.Exactly(),
	}}
	if b.Volley1 > 0 {
		claims = append(claims, b.predictVolleys(q)...)
	} else {
		claims = append(claims, b.predictArrivals(q)...)
	}
	return append(claims, b.predictSymptom(role)...)
}

// symptomShare is the share of clients that must be hurt for an incident to
// count as reproduced.
const symptomShare = 0.01

func (b *backlog) predictSymptom(role results.Role) []results.Prediction {
	p := results.Prediction{Metric: metricSymptom, Unit: "connections"}
	switch role {
	case results.Incident, results.FalseLead:
		p.Formula, p.Note, p.Tolerance = "s·clients", "the symptom must show", results.AtLeast()
		p.Inputs = map[string]float64{"s": symptomShare, "clients": float64(b.clients())}
		p.Predicted = math.Ceil(symptomShare * float64(b.clients()))
	case results.Fix:
		p.Formula, p.Note, p.Tolerance = "0", "the symptom must be gone", results.Exactly()
	default:
		return nil // a control has the numbers that its parameters give it
	}
	return []results.Prediction{p}
}

// clients is how many operations the load consists of.
func (b *backlog) clients() int { return b.load().Count() }

// claim is a prediction whose inputs are those of all that its formula names.
func claim(metric, unit, formula string, all map[string]float64, predicted float64, tol results.Tolerance, note string) results.Prediction {
	p := results.Prediction{
		Metric: metric, Unit: unit, Formula: formula, Inputs: map[string]float64{},
		Predicted: predicted, Tolerance: tol, Note: note,
	}
	for _, name := range formulaName.FindAllString(formula, -1) {
		if value, known := all[name]; known {
			p.Inputs[name] = value
		}
	}
	return p
}

var formulaName = regexp.MustCompile(`[\p{L}_][\p{L}\p{N}_]*`)

// within is a relative tolerance, except that a predicted nothing is exact.
func within(predicted, rel float64) results.Tolerance {
	if predicted == 0 {
		return results.Exactly()
	}
	return results.Within(rel)
}

// predictArrivals is for arrivals at a rate around a stall.
func (b *backlog) predictArrivals(q acceptQueue) []results.Prediction {
	places, victims := float64(q.places()), q.victims()
	inputs := map[string]float64{"λ": q.Rate, "T": q.Stall.Seconds(), "B": float64(q.limit()), "held": float64(b.Held)}
	waiting := claim(metricPeakDepth, "connections", "B+1", inputs, places, results.Exactly(), "connections that wait for accept(): the queue is full")
	peak := places
	switch {
	case q.arrivals() == 0:
		peak = 0
		waiting = claim(metricPeakDepth, "connections", "B", inputs, float64(q.limit()), results.AtMost(), "connections that wait for accept(): the queue never fills")
	case q.arrivals() < places:
		peak = q.arrivals()
		waiting = claim(metricPeakDepth, "connections", "λ·T", inputs, peak, results.Within(0.05), "connections that wait for accept(): there is room for all")
	}
	claims := []results.Prediction{
		waiting,
		claim(metricDropsOnly, "SYNs", "0", nil, 0, results.Exactly(), "ListenDrops − ListenOverflows: nothing is dropped for another reason"),
	}
	if b.Held > 0 && b.Stall > 0 {
		claims = append(claims, claim(metricEstablished, "connections", "held + min(B+1, λ·T)", inputs, float64(b.Held)+peak, results.Within(0.02),
			"at most, while the server stands still"))
	}
	if b.Stall > 0 {
		claims = append(claims, claim(metricSlowest, "s", "T/10", inputs, b.Stall.Seconds()/10, results.AtMost(),
			"the stall is outside any command: SLOWLOG does not have it"))
	}
	unserved := q.unserved(b.Timeout)
	if b.OverHeld {
		all := q
		all.Rate, all.Backlog, all.Somaxconn = b.Rate, math.MaxInt32, math.MaxInt32 // every request finds room in its socket
		unserved = all.unserved(b.Timeout)
	}
	inputs["λ"], inputs["t"] = b.Rate, b.Timeout.Seconds()
	if unserved > 0 {
		claims = append(claims, claim(metricReadTimeouts, "connections", "λ·min((B+1)/λ, max(0, T − t))", inputs, unserved, results.Within(0.05),
			fmt.Sprintf("connected at once, and no reply within t = %v", b.Timeout)))
	}
	inputs["λ"] = q.Rate
	if victims == 0 {
		claims = append(claims,
			claim(metricVictims, "connections", "max(0, λ·T − (B+1))", inputs, 0, results.Exactly(), "clients whose first SYN is dropped"),
			claim(metricOverflows, "SYNs", "0", nil, 0, results.Exactly(), "the queue never overflows"),
		)
		if unserved > 0 {
			return claims
		}
		claims = append(claims, claim(metricFailed, "connections", "0", nil, 0, results.Exactly(), "every client is served"))
		if b.Stall > 0 {
			gap := 1 / b.Rate
			inputs["gap"] = gap
			claims = append(claims,
				claim(metricLatencyMax, "s", "T − gap", inputs, b.Stall.Seconds()-gap, results.AtLeast(), "who comes as the stall begins waits for all of it"),
				claim(metricLatencyMean, "s", "T", inputs, b.Stall.Seconds(), results.AtMost(), "the average of who comes during the stall: T/2, and more the longer the server takes to catch up"),
			)
		}
		return claims
	}
	claims = append(claims,
		claim(metricVictims, "connections", "max(0, λ·T − (B+1))", inputs, victims, results.Within(0.05), "clients whose first SYN is dropped"),
		claim(metricOverflows, "SYNs", "Σ λ·max(0, T − (B+1)/λ − r)", inputs, q.attempts(), results.Within(0.05),
			"attempts, over r = 0 and the SYN retries at "+spellRetries(q.lateRetries())),
	)
	if gaveUp := q.gaveUp(); gaveUp > 0 {
		inputs["r"] = q.lateRetry(len(q.Retries)).Seconds()
		return append(claims, claim(metricTimeouts, "connections", "λ·max(0, T − (B+1)/λ − r)", inputs, gaveUp, results.Within(0.05),
			fmt.Sprintf("r: the last SYN within the timeout of %v", b.Timeout)))
	}
	// Retransmissions fire together, a tick of the timer wheel at a time, and
	// are answered together. A lump that meets the queue as it is emptied may
	// get more SYN-ACKs than there are places: its last ACKs are dropped, and
	// with tcp_abort_on_overflow answered with RST.
	if unserved == 0 {
		lump := math.Ceil(q.Rate * q.Rounding.Seconds())
		if b.Abort == 1 {
			inputs["h"] = q.Rounding.Seconds()
			claims = append(claims,
				claim(metricResets, "connections", "λ·h", inputs, lump, results.AtMost(),
					"reset: at most one lump of SYN retries, those of one step h of the timer wheel, which meets the queue as it is emptied; a dropped SYN is never answered"),
				claim(metricTimeouts, "connections", "0", nil, 0, results.Exactly(), "all others connect in the end"),
				claim(metricReadTimeouts, "connections", "0", nil, 0, results.Exactly(), "and are served"))
		} else {
			claims = append(claims, claim(metricFailed, "connections", "0", nil, 0, results.Exactly(), "patient clients connect in the end"))
		}
		claims = append(claims, claim(metricDroppedACKs, "ACKs", "0", nil, 0, results.PlusMinus(lump),
			fmt.Sprintf("ListenOverflows − RetransSegs of both ends: every SYN dropped is sent again, but for at most one lump of λ·%v SYN retries", q.Rounding)))
	}
	counts := q.byRetry()
	inputs["r₁"] = q.lateRetry(1).Seconds()
	claims = append(claims,
		claim(metricRetriedOnce, "connections", "λ·T − (B+1) − λ·max(0, T − (B+1)/λ − r₁)", inputs, counts[1], within(counts[1], 0.05),
			fmt.Sprintf("connected with the first SYN retry; the timer is %v late on average", q.Rounding/2)),
		claim(metricPeakOnce, "s", "r₁", inputs, q.lateRetry(1).Seconds(), results.PlusMinus(q.Rounding.Seconds()), "the peak of their connect times"),
	)
	if len(counts) > 2 {
		claims = append(claims, claim(metricRetriedMore, "connections", "λ·max(0, T − (B+1)/λ − r₁)", inputs, counts[2], within(counts[2], 0.15),
			"connected with the second"))
		if counts[2] > 0 {
			inputs["r₂"] = q.lateRetry(2).Seconds()
			claims = append(claims, claim(metricPeakTwice, "s", "r₂", inputs, q.lateRetry(2).Seconds(), results.PlusMinus(2*q.Rounding.Seconds()),
				"the peak of their connect times"))
		}
	}
	return claims
}

// predictVolleys is for one or two volleys inside a stall, over a link with
// latency.
func (b *backlog) predictVolleys(q acceptQueue) []results.Prediction {
	n, places := float64(b.Volley1+b.Volley2), float64(q.places())
	inputs := map[string]float64{"n": n, "B": float64(q.limit())}
	late := max(0, n-places)
	exact := func(metric, unit, formula string, predicted float64, note string) results.Prediction {
		return claim(metric, unit, formula, inputs, predicted, results.Exactly(), note)
	}
	claims := []results.Prediction{
		exact(metricPeakDepth, "connections", "min(B+1, n)", min(places, n), "connections that wait for accept()"),
		exact(metricVictims, "connections", "0", 0, "every SYN is answered"),
	}
	if b.Abort == 1 && b.Volley2 > 0 {
		return append(claims,
			exact(metricResets, "connections", "max(0, n − (B+1))", late, "ECONNRESET, after connect() has succeeded"),
			exact(metricEmbryonic, "RSTs", "max(0, n − (B+1))", late, "resets of handshakes that found no room"),
			exact(metricGhosts, "connections", "0", 0, "they were told"),
			exact(metricDroppedACKs, "ACKs", "max(0, n − (B+1))", late, "ListenOverflows − RetransSegs of both ends"),
		)
	}
	claims = append(claims,
		exact(metricEstabAtJoin, "sockets", "n", n, "every client believes that it is connected"),
		exact(metricGhosts, "connections", "max(0, n − (B+1))", late, "ESTABLISHED at the client, not at the server"),
		exact(metricResets, "connections", "0", 0, "they are not told"),
		claim(metricOverflows, "ACKs", "max(0, n − (B+1))", inputs, late, results.AtLeast(), "attempts: every ACK and request that finds no room"),
	)
	if b.Volley2 == 0 {
		// The SYN queue holds B+1 requests as well, B before Linux 6.14
		// (include/net/inet_connection_sock.h, inet_csk_reqsk_queue_is_full);
		// cookies answer the rest.
		return append(claims, claim(metricCookies, "SYNs", "max(0, n − (B+1))", inputs, late, results.PlusMinus(1), "SYNs beyond the SYN queue"),
			exact(metricDroppedACKs, "ACKs", "max(0, n − (B+1))", late, "ListenOverflows − RetransSegs of both ends"))
	}
	return append(claims, exact(metricHalfOpen, "connections", "max(0, n − (B+1))", late, "handshakes that the server still holds open for them"))
}
