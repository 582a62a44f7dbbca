package scenarios

import (
	"context"
	"errors"
	"fmt"
	"net/netip"
	"slices"
	"strconv"
	"time"

	"golang.org/x/sync/errgroup"

	"connlab/loadgen"
	"connlab/netlab"
	"connlab/netlab/observe"
	"connlab/results"
)

// holdRate is how fast the connections that are open before are opened: slow
// enough for the accept queue of somaxconn-128.
const holdRate = 4000

// behindLimit is by how much one arrival in a hundred may be late: twenty clients
// at the article's rate, of the 316 that are counted most finely.
const behindLimit = 10 * time.Millisecond

// How often the server is sampled. Its counters and its listener cost 0.1 ms a
// sample; counting sockets by state walks the machine's whole table of
// connections, 5 ms a sample at this size, half a core if it were done as often.
const (
	countersEvery = 10 * time.Millisecond
	statesEvery   = 100 * time.Millisecond
)

// shownSysctls of the server's namespace are recorded as the kernel has them.
var shownSysctls = []string{
	"net.core.somaxconn", "net.ipv4.tcp_max_syn_backlog", "net.ipv4.tcp_abort_on_overflow",
	"net.ipv4.tcp_syncookies", "net.ipv4.tcp_synack_retries",
}

// load is when connections are due, from the start of the load.
func (b *backlog) load() loadgen.Schedule {
	if b.Volley1 > 0 {
		return loadgen.Merge(loadgen.Burst(b.Volley1, volley1At), loadgen.Burst(b.Volley2, volley2At))
	}
	return loadgen.Constant(b.Rate, b.arrivalsFor())
}

// arrivalsFor is how long arrivals go on, so that the stall lies within.
func (b *backlog) arrivalsFor() time.Duration { return lead + cronPeriod + b.Stall + tailLoad }

// Measure implements [Experiment].
func (b *backlog) Measure(ctx context.Context, lab *netlab.Lab, opt Options, v *results.Variant) (err error) {
	server := lab.Host("server")
	clients := lab.Hosts()[1:]
	v.Link = server.LinkKind()
	if opt.server.kind != ServerMini && b.Accepts != newBacklog().Accepts {
		v.Warnings = append(v.Warnings, "accepts is the mini server's: redis-server has its own")
	}
	t, err := opt.server.start(ctx, server, serverConfig{backlog: b.Backlog, acceptsPerCycle: b.Accepts}, opt.Log)
	if err != nil {
		return err
	}
	defer func() { err = errors.Join(err, t.stop()) }()
	from, closeUnused, err := sources(clients)
	if err != nil {
		return err
	}
	defer closeUnused()

	opt.progress("opening %d connections to hold", b.Held)
	held, err := b.hold(ctx, t, from)
	if err != nil {
		return err
	}
	if held != nil {
		defer held.Close()
	}

	// Only now: a hiccup while the held connections are opened must not reset one.
	if err := server.SetSysctl("net.ipv4.tcp_abort_on_overflow", strconv.Itoa(b.Abort)); err != nil {
		return err
	}
	if v.Sysctls, err = observe.ReadSysctls(server, shownSysctls...); err != nil {
		return err
	}

	// The clients' counters are read before and after: sampling 120 namespaces
	// ten times a second takes a seventh of a core from what is measured.
	clientsBefore, err := observe.ReadCounters(clients...)
	if err != nil {
		return err
	}
	giveCounters, err := opt.countersBefore(v.Name, server)
	if err != nil {
		return err
	}
	watch, err := observe.Start(ctx, observe.Config{
		Counters: []*netlab.Host{server}, CountersEvery: countersEvery,
		Listeners: []observe.Listener{{Host: server, Port: redisPort}},
		States:    []*netlab.Host{server}, StatesEvery: statesEvery,
	})
	if err != nil {
		return err
	}
	defer watch.Stop() //nolint:errcheck // the first Stop, below, returned the same error
	r := backlogRun{b: b, target: t, watch: watch, clients: clients, v: v}
	if err := r.drive(ctx, opt, from, held); err != nil {
		return err
	}
	timeline, err := watch.Stop()
	if err != nil {
		return err
	}
	if err := errors.Join(opt.giveTimeline(v.Name, timeline), giveCounters()); err != nil {
		return err
	}
	clientsAfter, err := observe.ReadCounters(clients...)
	if err != nil {
		return err
	}
	return r.fill(timeline, clientsAfter.Sub(clientsBefore))
}

func (b *backlog) hold(ctx context.Context, t *target, from []loadgen.Source) (*loadgen.Held, error) {
	if b.Held == 0 {
		return nil, nil
	}
	held, report, err := loadgen.Hold(ctx, loadgen.Config{
		Targets: []netip.AddrPort{t.addr}, Sources: from,
		Schedule: loadgen.Constant(holdRate, time.Minute).First(b.Held),
	})
	if err != nil {
		return nil, err
	}
	if held.Len() != b.Held {
		err := fmt.Errorf("only %d of %d connections to hold could be opened: %v", held.Len(), b.Held, report.Failed)
		held.Close()
		return nil, err
	}
	return held, nil
}

// backlogRun is one run of the load, and what it showed.
type backlogRun struct {
	b       *backlog
	target  *target
	watch   *observe.Observer
	clients []*netlab.Host
	v       *results.Variant

	stall  stall
	ops    []loadgen.Op
	report *loadgen.Report

	// Of volleys, while the server stands still.
	joined   observe.Joined
	joinedAt time.Time
}

// drive runs the load, the stall and, for volleys, the look at both ends of
// every connection, side by side.
func (r *backlogRun) drive(ctx context.Context, opt Options, from []loadgen.Source, held *loadgen.Held) error {
	b := r.b
	cfg := loadgen.Config{
		Targets: []netip.AddrPort{r.target.addr}, Sources: from, Schedule: b.load(),
		ConnectTimeout: b.Timeout, ReplyTimeout: b.Timeout,
		MaxInFlight: b.clients(),
		OnOp:        func(op loadgen.Op) { r.ops = append(r.ops, op) },
		Progress:    &loadgen.Progress{},
	}
	stallAt := lead
	if b.Volley1 > 0 {
		stallAt = 0
	}
	if b.OverHeld {
		cfg.Held = held
	}
	done := make(chan struct{})
	var g errgroup.Group
	g.Go(func() (err error) {
		defer close(done)
		r.report, err = loadgen.Run(ctx, cfg)
		return err
	})
	if b.Stall > 0 {
		g.Go(func() (err error) {
			if err := sleep(ctx, stallAt); err != nil {
				return err
			}
			r.watch.Mark("stall asked for")
			r.stall, err = r.target.stand(ctx, b.Stall)
			return err
		})
	}
	if b.Volley1 > 0 {
		g.Go(func() (err error) {
			if err := sleep(ctx, joinAt); err != nil {
				return err
			}
			r.joined, err = r.join()
			return err
		})
	}
	g.Go(func() error {
		for tick := time.NewTicker(500 * time.Millisecond); ; {
			select {
			case <-done:
				tick.Stop()
				return nil
			case <-tick.C:
				s := cfg.Progress.Snapshot()
				opt.progress("%d of %d connections due, %d waiting, %d ok, %d failed", s.Due, b.clients(), s.InFlight, s.OK, s.Failed)
			}
		}
	})
	return g.Wait()
}

// join reads both ends of every connection to the server's port.
func (r *backlogRun) join() (observe.Joined, error) {
	began := time.Now()
	var ends []observe.Socket
	for _, h := range r.clients {
		s, err := observe.ReadSockets(h, observe.Query{RemotePort: redisPort})
		if err != nil {
			return nil, err
		}
		ends = append(ends, s...)
	}
	server, err := observe.ReadSockets(r.target.host, observe.Query{LocalPort: redisPort})
	if err != nil {
		return nil, err
	}
	server = slices.DeleteFunc(server, func(s observe.Socket) bool {
		return s.Remote.Addr() == r.target.addr.Addr() // the control connection
	})
	r.joinedAt = time.Now()
	r.watch.Mark("both ends joined")
	r.metric("both/Join.Duration", r.joinedAt.Sub(began).Seconds(), "s")
	return observe.Join(ends, server), nil
}

func (r *backlogRun) metric(name string, value float64, unit string) {
	r.v.Metrics[name] = results.Metric{Value: value, Unit: unit}
}

// fill turns what was seen into metrics.
func (r *backlogRun) fill(timeline *observe.Timeline, clients observe.Counters) error {
	if err := r.report.Balanced(); err != nil {
		return err
	}
	r.checkConditions()
	r.fillClients()
	if r.b.Volley1 > 0 {
		r.fillJoin()
	}
	if err := r.fillServer(timeline); err != nil {
		return err
	}
	return r.fillCounters(timeline, clients)
}

// stallSlack is by how much a stall may be longer than asked for: at the
// article's rate it is forty clients of the 2,348.
const stallSlack = 20 * time.Millisecond

// checkConditions voids a run that was not the experiment that was asked for.
func (r *backlogRun) checkConditions() {
	if n := r.report.NotStarted; n > 0 {
		r.v.Void(fmt.Sprintf("the generator left out %d of %d connections", n, r.report.Due))
	}
	limit := behindLimit
	if r.b.Volley1 > 0 {
		limit = 2 * r.b.Delay // all of a volley's SYNs are there before its first ACK
	}
	late := r.inStall(func(op loadgen.Op) (time.Duration, bool) {
		return op.Started - op.Due, op.Class != loadgen.NotStarted
	}).Quantile(0.99)
	r.metric("clients/Lateness.P99", late.Seconds(), "s")
	if late > limit {
		r.v.Void(fmt.Sprintf("the generator fell behind: 1 %% of the arrivals that count started more than %v late, the limit is %v", late, limit))
	}
	if r.b.Stall == 0 {
		return
	}
	begin, end := r.stall.begin.Sub(r.report.Start), r.stall.end.Sub(r.report.Start)
	if over := r.stall.length() - r.b.Stall; over.Abs() > stallSlack {
		r.v.Void(fmt.Sprintf("the server stood still for %v instead of %v", r.stall.length(), r.b.Stall))
	}
	switch {
	case r.b.Volley1 == 0 && begin < 0:
		r.v.Void(fmt.Sprintf("the stall began %v before the arrivals", -begin))
	case r.b.Volley1 == 0 && end > r.b.arrivalsFor():
		r.v.Void(fmt.Sprintf("the stall ended %v after the arrivals", end-r.b.arrivalsFor()))
	case r.b.Volley1 > 0 && begin > volley1At:
		r.v.Void(fmt.Sprintf("the stall began %v after the first volley", begin-volley1At))
	case r.b.Volley1 > 0 && r.joinedAt.After(r.stall.end):
		r.v.Void(fmt.Sprintf("both ends were joined only %v after the stall", r.joinedAt.Sub(r.stall.end)))
	}
}

// inStall collects a time of the operations that came due while the server stood
// still, or of all if it did not.
func (r *backlogRun) inStall(of func(loadgen.Op) (t time.Duration, ok bool)) *loadgen.Histogram {
	begin, end := r.stall.begin.Sub(r.report.Start), r.stall.end.Sub(r.report.Start)
	h := loadgen.NewHistogram()
	for _, op := range r.ops {
		if r.b.Stall > 0 && (op.Due < begin || op.Due > end) {
			continue
		}
		if t, ok := of(op); ok {
			h.Record(t)
		}
	}
	return h
}

// fillClients counts what the clients saw.
func (r *backlogRun) fillClients() {
	rep := r.report
	var victims, slowest float64
	// By SYN retry: those that connected with the first, the second.
	waits := [2]*loadgen.Histogram{loadgen.NewHistogram(), loadgen.NewHistogram()}
	retries := ReadKernelRules().SYNRetries(len(waits) + 1)
	for _, op := range r.ops {
		waited := connectTime(op)
		if op.Class == loadgen.ConnectTimeout || waited >= retries[0]/2 {
			victims++ // before half the first timeout no retransmission has been due
		}
		for k := range waits {
			low := retries[0] / 2
			if k > 0 {
				low = (retries[k-1] + retries[k]) / 2
			}
			if op.Connected > 0 && waited >= low && waited < (retries[k]+retries[k+1])/2 {
				waits[k].Record(waited)
			}
		}
		if op.Class == loadgen.OK {
			slowest = max(slowest, (op.Done - op.Due).Seconds())
		}
	}
	failed := rep.Failed.Sum()
	r.metric("clients/Due", float64(rep.Due), "connections")
	r.metric("clients/OK", float64(rep.OK), "connections")
	r.metric("clients/NotStarted", float64(rep.NotStarted), "connections")
	r.metric(metricFailed, float64(failed), "connections")
	for class, n := range rep.Failed {
		r.metric("clients/Failed."+string(class), float64(n), "connections")
	}
	r.metric(metricTimeouts, float64(rep.Failed[loadgen.ConnectTimeout]), "connections")
	// Which call reports a reset is a race, so they are counted together.
	resets := rep.Failed[loadgen.ConnectReset] + rep.Failed[loadgen.WriteReset] + rep.Failed[loadgen.WriteBrokenPipe] + rep.Failed[loadgen.ReadReset]
	r.metric(metricResets, float64(resets), "connections")
	r.metric(metricVictims, victims, "connections")
	for k, names := range [...][2]string{{metricRetriedOnce, metricPeakOnce}, {metricRetriedMore, metricPeakTwice}} {
		r.metric(names[0], float64(waits[k].Count()), "connections")
		if waits[k].Count() > 0 {
			r.metric(names[1], waits[k].Quantile(0.5).Seconds(), "s")
		}
	}
	r.metric(metricReadTimeouts, float64(rep.Failed[loadgen.ReadTimeout]), "connections")
	r.metric(metricLatencyMax, slowest, "s")
	waited := r.inStall(func(op loadgen.Op) (time.Duration, bool) { return op.Done - op.Due, op.Class == loadgen.OK })
	r.metric(metricLatencyMean, waited.Mean().Seconds(), "s")
	r.metric("clients/Latency.P50", rep.Latency.Quantile(0.5).Seconds(), "s")
	r.metric("clients/Latency.P99", rep.Latency.Quantile(0.99).Seconds(), "s")
	if r.b.Volley1 == 0 {
		r.metric(metricSymptom, max(victims, float64(failed)), "connections")
	}
}

// connectTime is how long an operation waited for its connection, to the end of
// its patience if it got none. Over a held connection nothing is waited for.
func connectTime(op loadgen.Op) time.Duration {
	switch {
	case op.Connected > 0:
		return op.Connected - op.Started
	case op.Class == loadgen.ConnectTimeout:
		return op.Done - op.Started
	}
	return 0
}

// fillJoin counts connections by what their two ends believe.
func (r *backlogRun) fillJoin() {
	var established, ghosts int
	for ends, list := range r.joined {
		r.metric(fmt.Sprintf("both/Join.%v-%v", ends.Client, ends.Server), float64(len(list)), "connections")
		if ends.Client != observe.Established {
			continue
		}
		established += len(list)
		if ends.Server != observe.Established {
			ghosts += len(list)
		}
	}
	r.metric(metricEstabAtJoin, float64(established-r.b.Held), "sockets")
	r.metric(metricGhosts, float64(ghosts), "connections")
	r.metric(metricHalfOpen, float64(r.joined.Count(observe.Established, observe.SynRecv)), "connections")
	r.metric(metricSymptom, max(float64(ghosts), r.v.Metrics[metricResets].Value), "connections")
}

// fillServer reads the listener, the sockets' states and the server itself.
func (r *backlogRun) fillServer(timeline *observe.Timeline) error {
	host := r.target.host.Name()
	limit, err := timeline.Peak("Listen.Limit", host)
	if err != nil {
		return err
	}
	depth, err := timeline.Peak("Listen.Depth", host)
	if err != nil {
		return err
	}
	halfOpen, err := timeline.Peak("State.SYN_RECV", host)
	if err != nil {
		return err
	}
	r.metric("server/State.SYN_RECV.Peak", float64(halfOpen.Value), "sockets")
	r.metric(metricLimit, float64(limit.Value), "connections")
	r.metric(metricPeakDepth, float64(depth.Value), "connections")
	if r.b.Stall > 0 {
		// CurrEstab is ESTABLISHED and CLOSE_WAIT: a client that gave up keeps its place in the queue.
		established, err := r.peakDuringStall(timeline, "Tcp.CurrEstab", host)
		if err != nil {
			return err
		}
		// The control connection has both its ends on the server's host.
		r.metric(metricEstablished, float64(established-2), "connections")
		r.metric(metricStall, r.stall.length().Seconds(), "s")
	}
	slow, err := r.target.slowest()
	if err != nil {
		return err
	}
	r.metric(metricSlowest, slow.Seconds(), "s")
	series, err := timeline.Series("Listen.Depth", host)
	if err != nil {
		return err
	}
	points := make([]results.Point, len(series))
	for i, p := range series {
		points[i] = results.Point{T: p.At.Seconds(), V: float64(p.Value)}
	}
	r.v.Series = append(r.v.Series, results.NewSeries("accept queue", "connections", points))
	return nil
}

// peakDuringStall is the largest value sampled while the server stood still.
func (r *backlogRun) peakDuringStall(timeline *observe.Timeline, metric, host string) (int64, error) {
	series, err := timeline.Series(metric, host)
	if err != nil {
		return 0, err
	}
	begin, end := r.stall.begin.Sub(timeline.Start()), r.stall.end.Sub(timeline.Start())
	var peak int64
	for _, p := range series {
		if p.At >= begin && p.At <= end {
			peak = max(peak, p.Value)
		}
	}
	return peak, nil
}

// fillCounters records the growth of every kernel counter that moved.
func (r *backlogRun) fillCounters(timeline *observe.Timeline, clients observe.Counters) error {
	server, err := timeline.Deltas(r.target.host.Name())
	if err != nil {
		return err
	}
	recordGrowth(r.v, "server", server)
	recordGrowth(r.v, "clients", clients)
	for _, counter := range []string{"TcpExt.ListenOverflows", "TcpExt.ListenDrops", "Tcp.RetransSegs"} {
		if _, printed := server[counter]; !printed {
			return fmt.Errorf("this kernel does not print %s", counter)
		}
	}
	overflows := server["TcpExt.ListenOverflows"]
	if r.b.Volley1 > 0 {
		r.metric(metricOverflows, float64(overflows), "ACKs")
	}
	r.metric(metricDropsOnly, float64(server["TcpExt.ListenDrops"]-overflows), "SYNs")
	// Whatever is dropped is sent again, and counted by who sends it, except a
	// bare ACK. The server sends again the SYN-ACK that it then gets that ACK for.
	r.metric(metricDroppedACKs, float64(overflows-clients["Tcp.RetransSegs"]-server["Tcp.RetransSegs"]), "ACKs")
	for _, s := range timeline.Samplings() {
		r.metric("both/Sampling."+s.What+".Missed", float64(s.Missed), "samples")
		r.metric("both/Sampling."+s.What+".Busy", s.Busy.Seconds(), "s")
		// A peak that lasts for the rest of the stall is seen all the same,
		// unless sampling stood still for the whole of it.
		if r.b.Stall > 0 && s.LongestGap > r.b.Stall/2 {
			r.v.Void(fmt.Sprintf("sampling of %s stood still for %v", s.What, s.LongestGap))
		}
	}
	return nil
}
