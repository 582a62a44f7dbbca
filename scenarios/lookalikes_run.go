package scenarios

import (
	"context"
	"errors"
	"fmt"
	"math"
	"net/netip"
	"strconv"
	"time"

	"github.com/google/nftables"
	"github.com/google/nftables/expr"
	"golang.org/x/sync/errgroup"
	"golang.org/x/sys/unix"

	"connlab/loadgen"
	"connlab/netlab"
	"connlab/netlab/observe"
	"connlab/results"
)

// Metrics of the lookalikes, beside those of the backlog.
const (
	metricServed        = "clients/OK"
	metricRejected      = "modelled/Linux3.10.PAWSPassive" // by the stage on the server's link, not by this kernel
	metricFirstRejected = "modelled/PAWSPassiveWithoutSynRetrans"
	metricListenDrops   = "server/TcpExt.ListenDrops"
	metricFloodDrops    = "server/TCPReqQFullDropWithoutClients"
	metricFloodCookies  = "server/TCPReqQFullDoCookiesWithoutClients"
	metricCookiesRecv   = "server/TcpExt.SyncookiesRecv"
	metricHalfOpenPeak  = "server/State.SYN_RECV.Peak"
	metricFlooded       = "flood/SYNs"
	metricOtherDrops    = "server/ListenDropsWithoutReqQFullDrop"
)

// lookFirst is the time between the first client and the others: by then the server remembers it.
const lookFirst = 500 * time.Millisecond

// load is when clients are due: the first, and then the others.
func (l *lookalikes) load() loadgen.Schedule {
	return func(yield func(time.Duration) bool) {
		if !yield(0) {
			return
		}
		for at := range loadgen.Constant(l.Rate, l.For-lookFirst) {
			if !yield(lookFirst + at) {
				return
			}
		}
	}
}

// latest is how many of the clients are on the host whose clock is ahead of all others.
func (l *lookalikes) latest() int { return (l.load().Count() + l.Hosts - 1) / l.Hosts }

// Predict implements [Experiment].
func (l *lookalikes) Predict(role results.Role, rules KernelRules) []results.Prediction {
	n := l.load().Count()
	in := map[string]float64{
		"backlog": float64(l.Backlog), "somaxconn": float64(l.Somaxconn), "B": float64(l.queue().limit()),
		"for": l.For.Seconds(), "a": floodAfter.Seconds(), "f": l.FloodRate,
		"n": float64(n), "hosts": float64(l.Hosts), "flood": float64(l.Flood), "λ": l.Rate, "r₁": rules.SYNRetries(1)[0].Seconds(),
	}
	claims := []results.Prediction{
		claim(metricLimit, "connections", "min(backlog, somaxconn)", in, float64(l.queue().limit()), results.Exactly(), ""),
		claim(metricOverflows, "SYNs", "0", nil, 0, results.Exactly(), "the accept queue never overflows, whatever clients see"),
	}
	if l.Flood > 0 {
		claims = append(claims, l.predictFlood(in, rules)...)
	} else {
		claims = append(claims, l.predictClocks(in, rules)...)
	}
	p := results.Prediction{Metric: metricSymptom, Unit: "connections"}
	switch role {
	case results.Incident, results.FalseLead:
		p.Formula, p.Note, p.Tolerance = "s·n", "the symptom must show: SYNs without an answer", results.AtLeast()
		p.Inputs, p.Predicted = map[string]float64{"s": symptomShare, "n": float64(n)}, math.Ceil(symptomShare*float64(n))
	case results.Fix:
		p.Formula, p.Note, p.Tolerance = "0", "the symptom must be gone", results.Exactly()
	default:
		return claims
	}
	return append(claims, p)
}

// predictClocks is for clients behind one address.
func (l *lookalikes) predictClocks(in map[string]float64, rules KernelRules) []results.Prediction {
	n := l.load().Count()
	drops := claim(metricListenDrops, "SYNs", "0", nil, 0, results.Exactly(), "of this kernel, which does not see what the stage drops")
	switch {
	case l.randomClocks():
		// A clock for each pair of addresses or for each connection, by kernel: see package twrecycle. No two
		// connections here have one pair of addresses, so each clock is drawn anew, whatever is remembered.
		trials := n - 1
		half := float64(trials) / 2
		return []results.Prediction{
			drops,
			claim(metricRejected, "SYNs", "(n − 1)/2", in, half, results.Binomial(trials, testLevel), "all but the first are behind with a chance of one half: clocks at random on a circle of 32 bits, half of which is behind any point"),
			claim(metricTimeouts, "connections", "(n − 1)/2", in, half, results.Binomial(trials, testLevel), "those, within one SYN's patience"),
		}
	case l.Recycle && l.Timestamps == 2 && l.Apart > 0:
		tries := 1
		for _, at := range rules.SYNRetries(12) {
			if at < l.Timeout {
				tries++
			}
		}
		in["k"] = float64(tries)
		ok := l.latest()
		return []results.Prediction{
			drops,
			claim(metricServed, "connections", "n/hosts", in, float64(ok), results.Exactly(), "rounded up: those of the host whose clock is ahead of all others"),
			claim(metricTimeouts, "connections", "n − n/hosts", in, float64(n-ok), results.Exactly(), "all others, for a minute after each connection that the server closed first"),
			claim(metricFirstRejected, "SYNs", "n − n/hosts", in, float64(n-ok), results.Exactly(), "PAWSPassive − TCPSynRetrans: their first SYN, and no retransmission gets in either"),
			claim(metricRejected, "SYNs", "k·(n − n/hosts)", in, float64(tries*(n-ok)), results.Within(0.05), "k SYNs within their patience, one more where a client gives up late; of the stage, a kernel of that time would have counted them"),
		}
	}
	return []results.Prediction{drops, claim(metricServed, "connections", "n", in, float64(n), results.Exactly(), "everybody")}
}

// predictFlood is for a flood of SYNs.
func (l *lookalikes) predictFlood(in map[string]float64, rules KernelRules) []results.Prediction {
	beyond := in["flood"] - (in["B"] + 1)
	whileFull := l.Rate * (l.For - l.floodFull()).Seconds()
	claims := []results.Prediction{
		claim(metricFlooded, "SYNs", "flood", in, in["flood"], results.Exactly(), "sent"),
		claim(metricHalfOpenPeak, "sockets", "B+1", in, in["B"]+1, results.PlusMinus(rules.overfill()), "requests in the SYN queue: its limit is the listener's too; B before Linux 6.14 (commit 3479c7549fb1, which stable kernels have as well)"),
		claim(metricFailed, "connections", "0", nil, 0, results.Exactly(), "clients that are patient connect in the end"),
	}
	if l.Cookies == 1 {
		return append(claims,
			claim(metricFloodCookies, "SYNs", "flood − (B+1)", in, beyond, results.PlusMinus(rules.overfill()), "TCPReqQFullDoCookies − SyncookiesRecv: SYNs answered with a cookie because the SYN queue is full, and the cookie never came back"),
			claim(metricCookiesRecv, "events", "λ·(for − a − (B+1)/f)", in, whileFull, results.Within(0.05), "cookies that came back: clients that come while the SYN queue is full"),
			claim(metricListenDrops, "SYNs", "0", nil, 0, results.Exactly(), "none is dropped"),
			claim(metricVictims, "connections", "0", nil, 0, results.Exactly(), "no client waits for a SYN retry"))
	}
	return append(claims,
		claim(metricFloodDrops, "SYNs", "flood − (B+1)", in, beyond, results.PlusMinus(rules.overfill()), "TCPReqQFullDrop − the clients' TCPSynRetrans: a client sends again each SYN that was dropped, the flood does not"),
		claim(metricOtherDrops, "SYNs", "0", nil, 0, results.Exactly(), "ListenDrops − TCPReqQFullDrop: nothing is dropped for another reason, so ListenDrops > ListenOverflows"),
		claim(metricVictims, "connections", "λ·(for − a − (B+1)/f)", in, whileFull, results.Within(0.05),
			"clients that come while the SYN queue is full: a request lives for three SYN-ACK timeouts, 1 + 2 + 4 s, when there are many"))
}

// masquerade makes a host's connections to other networks come from its own address, as
// `nft add rule nat postrouting masquerade` does.
func masquerade(h *netlab.Host, address netip.Addr) error {
	err := h.Do(func() error {
		conn, err := nftables.New() // its socket is made here, inside the namespace
		if err != nil {
			return err
		}
		table := conn.AddTable(&nftables.Table{Family: nftables.TableFamilyIPv4, Name: "nat"})
		chain := conn.AddChain(&nftables.Chain{
			Name: "postrouting", Table: table, Type: nftables.ChainTypeNAT,
			Hooknum: nftables.ChainHookPostrouting, Priority: nftables.ChainPriorityNATSource,
		})
		conn.AddRule(&nftables.Rule{Table: table, Chain: chain, Exprs: []expr.Any{
			&expr.Meta{Key: expr.MetaKeyL4PROTO, Register: 1},
			&expr.Cmp{Op: expr.CmpOpEq, Register: 1, Data: []byte{unix.IPPROTO_TCP}},
			&expr.Immediate{Register: 1, Data: address.AsSlice()},
			&expr.NAT{Type: expr.NATTypeSourceNAT, Family: unix.NFPROTO_IPV4, RegAddrMin: 1},
		}})
		return conn.Flush()
	})
	if errors.Is(err, unix.ENOENT) || errors.Is(err, unix.EOPNOTSUPP) || errors.Is(err, unix.EPROTONOSUPPORT) {
		return &netlab.NeedError{Need: netlab.NeedNftables, Err: fmt.Errorf("a nat chain: %w", err)}
	}
	return err
}

// Measure implements [Experiment].
func (l *lookalikes) Measure(ctx context.Context, lab *netlab.Lab, opt Options, v *results.Variant) (err error) {
	if l.Flood == 0 && opt.server.kind != ServerMini {
		return &netlab.NeedError{Need: needMini, Err: errors.New("redis-server does not close first on request")}
	}
	server := lab.Host("server")
	v.Link = server.LinkKind()
	clients := lab.Hosts()[1:]
	if l.Flood == 0 {
		if err := masquerade(lab.Host("router"), lookRouter); err != nil {
			return err
		}
		clients = clients[1:]
	}
	t, err := l.start(ctx, opt, server)
	if err != nil {
		return err
	}
	defer func() { err = errors.Join(err, t.stop()) }()
	if v.Sysctls, err = observe.ReadSysctls(server, shownSysctls...); err != nil {
		return err
	}
	from, closeUnused, err := sources(clients)
	if err != nil {
		return err
	}
	defer closeUnused()
	from = l.inTurn(from)
	if err := opt.others.await(ctx); err != nil {
		return err
	}
	giveCounters, err := opt.countersBefore(v.Name, server)
	if err != nil {
		return err
	}
	before, err := observe.ReadCounters(clients...)
	if err != nil {
		return err
	}
	watch, err := observe.Start(ctx, observe.Config{
		Counters: []*netlab.Host{server}, Listeners: []observe.Listener{{Host: server, Port: redisPort}},
		States: []*netlab.Host{server},
	})
	if err != nil {
		return err
	}
	defer watch.Stop() //nolint:errcheck // the first Stop, below, returned the same error
	r := lookRun{l: l, v: v}
	if err := r.drive(ctx, opt, t, from); err != nil {
		return err
	}
	timeline, err := watch.Stop()
	if err != nil {
		return err
	}
	if err := errors.Join(opt.giveTimeline(v.Name, timeline), giveCounters()); err != nil {
		return err
	}
	after, err := observe.ReadCounters(clients...)
	if err != nil {
		return err
	}
	return r.account(timeline, after.Sub(before))
}

// start starts the server. Who closes first has the TIME_WAIT, which is what is remembered.
func (l *lookalikes) start(ctx context.Context, opt Options, server *netlab.Host) (*target, error) {
	if l.Flood > 0 {
		return opt.server.start(ctx, server, serverConfig{backlog: l.Backlog}, opt.Log)
	}
	return opt.server.startControlled(ctx, server, opt.Log, "--backlog", strconv.Itoa(l.Backlog), "--close-after", "1")
}

// inTurn is all addresses of all hosts, host by host and then the next address of each.
func (l *lookalikes) inTurn(hosts []loadgen.Source) []loadgen.Source {
	if l.Flood > 0 {
		return hosts
	}
	var list []loadgen.Source
	for i := range l.Addresses {
		for host, s := range hosts {
			list = append(list, s.Bound(netip.AddrPortFrom(l.inside(host)[i], 0)))
		}
	}
	return list
}

// lookRun is one run, and what it showed.
type lookRun struct {
	l      *lookalikes
	v      *results.Variant
	ops    []loadgen.Op
	report *loadgen.Report
}

func (r *lookRun) drive(ctx context.Context, opt Options, t *target, from []loadgen.Source) error {
	cfg := loadgen.Config{
		Targets: []netip.AddrPort{t.addr}, Sources: from, Schedule: r.l.load(),
		ConnectTimeout: r.l.Timeout, ReplyTimeout: r.l.Timeout,
		OnOp:     func(op loadgen.Op) { r.ops = append(r.ops, op) },
		Progress: &loadgen.Progress{},
	}
	if r.l.Flood == 0 {
		cfg.Close = loadgen.Passive
	}
	stop := every(time.Second, func() {
		s := cfg.Progress.Snapshot()
		opt.progress("%d clients, %d in flight, %d failed", s.Due, s.InFlight, s.Failed)
	})
	defer stop()
	g, ctx := errgroup.WithContext(ctx)
	g.Go(func() (err error) {
		r.report, err = loadgen.Run(ctx, cfg)
		return err
	})
	if r.l.Flood > 0 {
		g.Go(func() error {
			if err := sleep(ctx, floodAfter); err != nil {
				return err
			}
			return r.l.wires.flood.send(ctx)
		})
	}
	return g.Wait()
}

func (r *lookRun) metric(name string, value float64, unit string) {
	r.v.Metrics[name] = results.Metric{Value: value, Unit: unit}
}

// lookBehind is by how much one client in a hundred may be late.
const lookBehind = 200 * time.Millisecond

// account turns what was seen into metrics.
func (r *lookRun) account(timeline *observe.Timeline, clients observe.Counters) error {
	if err := r.report.Balanced(); err != nil {
		return err
	}
	lateness := loadgen.NewHistogram()
	half := ReadKernelRules().SYNRetries(1)[0] / 2
	var victims float64
	var first time.Duration
	for _, op := range r.ops {
		if op.Due == 0 {
			first = op.Done
		}
		lateness.Record(op.Started - op.Due)
		if waited := connectTime(op); waited >= half {
			victims++
		}
	}
	if first > lookFirst/2 {
		r.v.Void(fmt.Sprintf("the first client was served only after %v: the server may not have remembered it when the others came, after %v", first, lookFirst))
	}
	if n := r.report.NotStarted; n > 0 {
		r.v.Void(fmt.Sprintf("the generator left out %d of %d clients", n, r.report.Due))
	}
	if late := lateness.Quantile(0.99); late > lookBehind {
		r.v.Void(fmt.Sprintf("the generator fell behind: 1 %% of the clients came more than %v late, the limit is %v", late, lookBehind))
	}
	failed := float64(r.report.Failed.Sum())
	r.metric("clients/Due", float64(r.report.Due), "connections")
	r.metric(metricServed, float64(r.report.OK), "connections")
	r.metric(metricFailed, failed, "connections")
	for class, n := range r.report.Failed {
		r.metric("clients/Failed."+string(class), float64(n), "connections")
	}
	r.metric(metricTimeouts, float64(r.report.Failed[loadgen.ConnectTimeout]), "connections")
	r.metric(metricVictims, victims, "connections")
	r.metric(metricSymptom, max(victims, failed), "connections")

	const host = "server"
	for _, peak := range []struct{ name, of, unit string }{
		{metricLimit, "Listen.Limit", "connections"}, {metricPeakDepth, "Listen.Depth", "connections"}, {metricHalfOpenPeak, "State.SYN_RECV", "sockets"},
	} {
		p, err := timeline.Peak(peak.of, host)
		if err != nil {
			return err
		}
		r.metric(peak.name, float64(p.Value), peak.unit)
	}
	server, err := timeline.Deltas(host)
	if err != nil {
		return err
	}
	recordGrowth(r.v, "server", server, "TcpExt.SyncookiesRecv", "TcpExt.SyncookiesFailed")
	recordGrowth(r.v, "clients", clients, "TcpExt.SyncookiesRecv", "TcpExt.SyncookiesFailed")
	for _, counter := range []string{"TcpExt.ListenOverflows", "TcpExt.ListenDrops", "TcpExt.TCPReqQFullDrop", "TcpExt.TCPReqQFullDoCookies"} {
		if _, printed := server[counter]; !printed {
			return fmt.Errorf("this kernel does not print %s", counter)
		}
	}
	r.metric(metricOtherDrops, float64(server["TcpExt.ListenDrops"]-server["TcpExt.TCPReqQFullDrop"]), "SYNs")
	if r.l.Flood > 0 {
		r.metric(metricFloodDrops, float64(server["TcpExt.TCPReqQFullDrop"]-clients["TcpExt.TCPSynRetrans"]), "SYNs")
		r.metric(metricFloodCookies, float64(server["TcpExt.TCPReqQFullDoCookies"]-server["TcpExt.SyncookiesRecv"]), "SYNs")
	}
	if w := r.l.wires.recycle; w != nil {
		rejected := float64(w.Stats().Rejected)
		r.metric(metricRejected, rejected, "SYNs")
		r.metric(metricFirstRejected, rejected-float64(clients["TcpExt.TCPSynRetrans"]), "SYNs")
	}
	if w := r.l.wires.flood; w != nil {
		r.metric(metricFlooded, float64(w.sent.Load()), "SYNs")
	}
	return nil
}
