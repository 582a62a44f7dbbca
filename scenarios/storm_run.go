package scenarios

import (
	"bufio"
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"math"
	"math/rand/v2"
	"net/netip"
	"os"
	"slices"
	"strconv"
	"strings"
	"time"

	"github.com/gomodule/redigo/redis"
	"golang.org/x/sync/errgroup"

	"connlab/docs/monitoring"
	"connlab/loadgen"
	"connlab/netlab"
	"connlab/netlab/observe"
	"connlab/results"
)

// controlPort is where the server's workers are told things all at once.
const controlPort = 7379

// stormLead is from the order to cut until the first client comes back: by then every client knows.
func (s *storm) stormLead() time.Duration {
	return 1500*time.Millisecond + time.Duration(float64(s.cut())/20_000*float64(time.Second))
}

// Measure implements [Experiment].
func (s *storm) Measure(ctx context.Context, lab *netlab.Lab, opt Options, v *results.Variant) (err error) {
	if opt.server.kind != ServerMini {
		return &netlab.NeedError{Need: needMini, Err: errors.New("redis-server shares its listener with nobody, and accepts as fast as it can")}
	}
	r := &stormRun{s: s, opt: opt, v: v, server: lab.Host(stormServer), prober: lab.Host(stormProber)}
	v.Link = r.server.LinkKind()
	r.memory = append(r.memory, readMemory())
	t, err := opt.server.startControlled(ctx, r.server, opt.Log,
		"--backlog", strconv.Itoa(s.Backlog), "--workers", strconv.Itoa(s.Workers), "--maxclients", strconv.Itoa(shardLimit))
	if err != nil {
		return err
	}
	defer func() { err = errors.Join(err, t.control.Close(), t.proc.Stop(10*time.Second)) }()
	r.target = t
	if s.RaiseLater > 0 {
		if err := r.server.SetSysctl("net.core.somaxconn", strconv.Itoa(s.RaiseLater)); err != nil {
			return err
		}
	}
	if v.Sysctls, err = observe.ReadSysctls(r.server, shownSysctls...); err != nil {
		return err
	}
	for i := range s.Hosts {
		f, err := s.startFleet(ctx, lab.Host(fmt.Sprintf("clients-%d", i+1)), i, t, opt)
		if err != nil {
			return err
		}
		defer func() { err = errors.Join(err, f.stop()) }()
		r.fleets = append(r.fleets, f)
	}
	if err := r.fill(ctx); err != nil {
		return err
	}
	// Only now: it is about those who come back.
	if err := t.setAcceptRate(s); err != nil {
		return err
	}
	if s.Alert {
		opt.progress("starting Prometheus and node_exporter, and waiting for the first scrapes")
		r.alerting, err = startAlerting(ctx, r.server, monitoring.Rules, scrapes, opt.Log)
		if err != nil {
			return err
		}
		defer func() { err = errors.Join(err, r.alerting.stop()) }()
		if err := r.alerting.ready(ctx); err != nil {
			return err
		}
	}
	if err := opt.others.await(ctx); err != nil {
		return err
	}
	giveCounters, err := opt.countersBefore(v.Name, r.server)
	if err != nil {
		return err
	}
	watch, err := observe.Start(ctx, observe.Config{
		Counters: []*netlab.Host{r.server}, CountersEvery: stormEvery,
		Listeners: []observe.Listener{{Host: r.server, Port: redisPort}}, ListenersEvery: stormEvery,
	})
	if err != nil {
		return err
	}
	defer watch.Stop() //nolint:errcheck // the first Stop, below, returned the same error
	r.watch = watch
	others := slices.DeleteFunc(slices.Clone(lab.Hosts()), func(h *netlab.Host) bool { return h == r.server })
	before, err := observe.ReadCounters(others...)
	if err != nil {
		return err
	}
	if err := r.drive(ctx); err != nil {
		return err
	}
	after, err := observe.ReadCounters(others...)
	if err != nil {
		return err
	}
	r.counters = after.Sub(before)
	if err := r.awaitAlerts(ctx); err != nil {
		return err
	}
	timeline, err := watch.Stop()
	if err != nil {
		return err
	}
	if err := errors.Join(opt.giveTimeline(v.Name, timeline), giveCounters()); err != nil {
		return err
	}
	return r.account(ctx, timeline)
}

// stormEvery is how often the server's counters and its accept queue are sampled.
const stormEvery = 20 * time.Millisecond

// startControlled runs the mini server with a control address of its own, which is reached while the accept queue is
// full, and reaches all workers where there are several.
func (p program) startControlled(ctx context.Context, host *netlab.Host, log io.Writer, args ...string) (*target, error) {
	control := netip.AddrPortFrom(host.Addr(), controlPort)
	t := &target{program: p, host: host, addr: netip.AddrPortFrom(host.Addr(), redisPort)}
	ready := func() error {
		conn, err := host.DialContext(ctx, "tcp", control.String())
		if err != nil {
			return err
		}
		t.control = redis.NewConn(conn, 2*time.Minute, 2*time.Minute)
		if _, err := t.control.Do("PING"); err != nil {
			return errors.Join(err, t.control.Close())
		}
		return nil
	}
	var err error
	t.proc, err = host.Start(ctx, netlab.Program{
		Path: p.path, Dir: "/", Ready: ready, Stdout: log, Stderr: log,
		Args: append([]string{"server", "--addr", fmt.Sprintf("0.0.0.0:%d", redisPort), "--timeout", "0", "--control", control.String()}, args...),
	})
	if err != nil {
		return nil, err
	}
	return t, nil
}

// setAcceptRate limits what all workers accept together.
func (t *target) setAcceptRate(s *storm) error {
	if s.AcceptRate == 0 {
		return nil
	}
	if _, err := t.control.Do("CONFIG", "SET", "accept-rate", s.AcceptRate/s.Workers); err != nil {
		return fmt.Errorf("CONFIG SET accept-rate: %w", err)
	}
	return nil
}

// fleet is the process that has the clients of one host.
type fleet struct {
	proc   *netlab.Process
	client *loadgen.FleetClient
	out    *io.PipeReader
}

func (s *storm) startFleet(ctx context.Context, host *netlab.Host, i int, t *target, opt Options) (*fleet, error) {
	var from []string
	for _, a := range host.Addrs() {
		from = append(from, a.String())
	}
	args := []string{
		"fleet", "--control", "--i-operate-this-target", "--addr", t.addr.String(), "--clients", strconv.Itoa(s.clientsOf(i)), "--source", strings.Join(from, ","),
		"--connect-timeout", s.Timeout.String(), "--reply-timeout", s.Timeout.String(), "--spread", s.spread().String(),
		"--unsteady", unsteadiness.String(), "--base", s.Base.String(), "--max", s.Most.String(), "--seed", strconv.Itoa(stormSeed + i),
	}
	if s.Jitter > 0 {
		args = append(args, "--jitter")
	}
	stdin, in := io.Pipe()
	out, stdout := io.Pipe()
	f := &fleet{out: out, client: loadgen.NewFleetClient(in, out)}
	var err error
	f.proc, err = host.Start(ctx, netlab.Program{Path: opt.server.path, Args: args, Dir: "/", Stdin: stdin, Stdout: stdout, Stderr: opt.Log})
	if err != nil {
		return nil, errors.Join(err, in.Close(), out.Close())
	}
	// Who waits for its answer must not wait for ever.
	go func() {
		<-f.proc.Done()
		said := strings.TrimSpace(f.proc.Output())
		ended := fmt.Errorf("it has ended; the last it said: %s", said[max(0, len(said)-300):])
		_, _ = stdout.CloseWithError(ended), stdin.CloseWithError(ended)
	}()
	return f, nil
}

func (f *fleet) stop() error {
	return errors.Join(f.client.Close(), f.out.Close(), f.proc.Stop(5*time.Second))
}

// all sends a command to every fleet and merges their reports.
func (r *stormRun) all(ctx context.Context, command string) (*loadgen.FleetReport, error) {
	reports := make([]*loadgen.FleetReport, len(r.fleets))
	var g errgroup.Group
	for i, f := range r.fleets {
		g.Go(func() (err error) {
			reports[i], err = f.client.Do(ctx, command)
			if err != nil {
				err = fmt.Errorf("clients of %s: %s: %w", f.proc.Host().Name(), command, err)
			}
			return err
		})
	}
	if err := g.Wait(); err != nil {
		return nil, err
	}
	for _, other := range reports[1:] {
		reports[0].Merge(other)
	}
	return reports[0], nil
}

// stormRun is one run, and what it showed.
type stormRun struct {
	s              *storm
	opt            Options
	v              *results.Variant
	server, prober *netlab.Host
	target         *target
	fleets         []*fleet
	watch          *observe.Observer
	alerting       *alerting // nil without
	alerts         []firing
	counters       observe.Counters // of all hosts but the server, how they grew
	memory         []memory         // before anything, and with all connections open
	filled         *loadgen.FleetReport
	fillTook       time.Duration
	cut            int64
	begin          time.Time // the first client comes back
	back           *loadgen.FleetReport
	pong           *loadgen.FleetReport
	probes         []loadgen.Op
	probed         *loadgen.Report
}

// fill opens all connections.
func (r *stormRun) fill(ctx context.Context) (err error) {
	r.opt.progress("opening %d connections", r.s.Connections)
	stop := every(time.Second, func() {
		if c, err := observe.ReadCounters(r.server); err == nil {
			r.opt.progress("%d of %d connections are open", c["Tcp.PassiveOpens"], r.s.Connections)
		}
	})
	defer stop()
	began := time.Now()
	if r.filled, err = r.all(ctx, "fill"); err != nil {
		return err
	}
	r.fillTook = time.Since(began)
	if r.filled.Open != int64(r.s.Connections) {
		return fmt.Errorf("only %d of %d connections could be opened: %v", r.filled.Open, r.s.Connections, r.filled.Failed)
	}
	r.memory = append(r.memory, readMemory())
	return nil
}

// drive cuts, lets the clients come back while the prober looks, and asks everybody in the end.
func (r *stormRun) drive(ctx context.Context) error {
	lead := r.s.stormLead()
	r.begin = time.Now().Add(lead)
	stop := every(time.Second, func() {
		if c, err := observe.ReadCounters(r.server); err == nil {
			r.opt.progress("%+.0f s: %d connected, %d SYNs dropped", time.Since(r.begin).Seconds(), c["Tcp.CurrEstab"], c["TcpExt.ListenOverflows"])
		}
	})
	defer stop()
	if _, err := r.all(ctx, "arm"); err != nil {
		return err
	}
	g, during := errgroup.WithContext(ctx)
	g.Go(func() error { return r.probe(during, lead-probeBefore) })
	g.Go(func() (err error) {
		if r.s.cut() > 0 {
			r.watch.Mark("cut")
			share := strconv.FormatFloat(r.s.Share, 'f', -1, 64)
			if r.cut, err = redis.Int64(r.target.control.Do("CONNLAB", "CUT", share, "RST")); err != nil {
				return fmt.Errorf("CONNLAB CUT: %w", err)
			}
		}
		if late := time.Since(r.begin); late > 0 {
			r.v.Void(fmt.Sprintf("the connections were cut only %v after the first client was to come back", late))
		}
		r.back, err = r.all(during, fmt.Sprintf("storm %d %d", r.begin.UnixMicro(), r.s.For.Milliseconds()))
		return err
	})
	if err := g.Wait(); err != nil {
		return err
	}
	// All that will be connected is.
	if err := sleep(ctx, time.Until(r.begin.Add(r.s.For))); err != nil {
		return err
	}
	var err error
	if r.pong, err = r.all(ctx, fmt.Sprintf("ping %d", pingPatience.Milliseconds())); err != nil {
		return err
	}
	return nil
}

// awaitAlerts waits until the alert has fired at every interval, and compares what Prometheus knows with the kernel.
func (r *stormRun) awaitAlerts(ctx context.Context) (err error) {
	if r.alerting == nil {
		return nil
	}
	r.opt.progress("waiting until %s has fired for scrapes every %v", alertRule, scrapes)
	if _, err := r.alerting.awaitFired(ctx, alertRule, r.begin); err != nil {
		return err
	}
	if r.alerts, err = r.alerting.fired(ctx, time.Time{}); err != nil {
		return err
	}
	own, err := observe.ReadCounters(r.server)
	if err != nil {
		return err
	}
	theirs, err := r.alerting.value(ctx, "node_netstat_TcpExt_ListenOverflows", scrapes[0], time.Now())
	if err != nil {
		return err
	}
	r.metric(metricAlertValue, theirs-float64(own["TcpExt.ListenOverflows"]), "SYNs")
	leftOut, err := r.alerting.leftOut(ctx)
	r.metric("alert/LeftOutByDefault", float64(len(leftOut)), "counters")
	return err
}

// firstOverflow is when the accept queue is seen to have overflowed.
func firstOverflow(timeline *observe.Timeline, host string) (at time.Duration, overflowed bool, err error) {
	counts, err := timeline.Series("TcpExt.ListenOverflows", host)
	if err != nil {
		return 0, false, err
	}
	i := slices.IndexFunc(counts, func(p observe.Point) bool { return p.Value > counts[0].Value })
	if i < 0 {
		return 0, false, nil
	}
	return counts[i].At, true, nil
}

// accountAlerts is when alerts fired, counted from the first overflow.
func (r *stormRun) accountAlerts(timeline *observe.Timeline) error {
	if r.alerting == nil {
		return nil
	}
	at, overflowed, err := firstOverflow(timeline, r.server.Name())
	if err != nil || !overflowed {
		return err // without one the claims about it are void, and others say why
	}
	first := timeline.Start().Add(at)
	early := 0
	for _, f := range r.alerts {
		after := f.At.Sub(first)
		switch {
		case f.Rule == alertRule && after < -stormEvery-alertClock:
			early++
		case f.Rule == alertRule:
			r.metric(metricAlertAfter(f.Interval), after.Seconds(), "s")
		default:
			r.metric(fmt.Sprintf("alert/%s.%v.After", f.Rule, f.Interval), after.Seconds(), "s")
		}
	}
	r.metric(metricAlertEarly, float64(early), "alerts")
	return nil
}

// alertClock is by how much the time that Prometheus gives an alert may be early.
const alertClock = 2 * time.Millisecond

// pingPatience is for the replies of all clients in the end.
const pingPatience = 10 * time.Second

// probe connects every 100 ms, asks nothing and closes.
func (r *stormRun) probe(ctx context.Context, after time.Duration) error {
	from, closeUnused, err := sources([]*netlab.Host{r.prober})
	if err != nil {
		return err
	}
	defer closeUnused()
	if err := sleep(ctx, after); err != nil {
		return err
	}
	r.probed, err = loadgen.Run(ctx, loadgen.Config{
		Targets: []netip.AddrPort{r.target.addr}, Sources: from, ConnectOnly: true, ConnectTimeout: r.s.Timeout,
		Schedule: probeTimes(time.Until(r.begin) + r.s.For),
		OnOp:     func(op loadgen.Op) { r.probes = append(r.probes, op) },
	})
	return err
}

// probeTimes is every 100 ms, and up to a half of that later: a prober in step with the server's limit would find a
// place always, or never.
func probeTimes(length time.Duration) loadgen.Schedule {
	return func(yield func(time.Duration) bool) {
		random := rand.New(rand.NewPCG(stormSeed, 0))
		for at := time.Duration(0); at < length; at += probeEvery {
			if !yield(at + time.Duration(random.Float64()*float64(probeEvery/2))) {
				return
			}
		}
	}
}

// memory is what the machine has in use, in bytes.
type memory struct {
	used float64 // by kernel and programs, without files in the page cache
	anon float64 // by programs
	err  error
}

// readMemory reads /proc/meminfo. It is the machine's: other programs' changes are in it.
func readMemory() memory {
	text, err := os.ReadFile("/proc/meminfo")
	if err != nil {
		return memory{err: err}
	}
	field := map[string]float64{}
	for scan := bufio.NewScanner(bytes.NewReader(text)); scan.Scan(); {
		var kib float64
		if name, value, ok := strings.Cut(scan.Text(), ":"); ok {
			if _, err := fmt.Sscanf(strings.TrimSpace(value), "%g kB", &kib); err == nil {
				field[name] = kib * 1024
			}
		}
	}
	return memory{
		used: field["MemTotal"] - field["MemFree"] - field["Buffers"] - field["Cached"],
		anon: field["AnonPages"],
	}
}

func (r *stormRun) metric(name string, value float64, unit string) {
	r.v.Metrics[name] = results.Metric{Value: value, Unit: unit}
}

// account turns what was seen into metrics.
func (r *stormRun) account(ctx context.Context, timeline *observe.Timeline) error {
	r.accountMemory()
	r.accountClients()
	r.accountProber()
	r.accountGroups()
	if err := r.accountServer(timeline); err != nil {
		return err
	}
	if err := r.accountAlerts(timeline); err != nil {
		return err
	}
	r.checkConditions()
	return ctx.Err()
}

func (r *stormRun) accountMemory() {
	r.metric(metricHeldOpen, float64(r.filled.Open), "connections")
	r.metric(metricFillTime, r.fillTook.Seconds(), "s")
	before, after := r.memory[0], r.memory[1]
	if err := errors.Join(before.err, after.err); err != nil {
		r.v.Warnings = append(r.v.Warnings, fmt.Sprintf("the machine's memory: %v", err))
		return
	}
	if r.opt.shared {
		return // with whom others share the machine
	}
	total := after.used - before.used
	kernel := total - (after.anon - before.anon)
	n := float64(r.s.Connections)
	r.metric(metricMemory, total/n, "B")
	r.metric("machine/Memory.Kernel.PerConnection", kernel/n, "B")
	r.metric(metricMemoryRatio, total/kernel, "1")
}

// accountClients is what the clients saw. Where a client's first SYN is dropped it waits for a SYN retry at least:
// half the time to that tells the two apart.
func (r *stormRun) accountClients() {
	back := r.back
	r.metric(metricCut, float64(r.cut), "connections")
	r.metric("clients/Cut", float64(back.Cut.Sum()), "connections")
	r.metric("clients/Attempts", float64(back.Attempts), "connects")
	r.metric("clients/OK", float64(back.OK), "connects")
	for class, n := range back.Failed {
		r.metric("clients/Failed."+string(class), float64(n), "connects")
	}
	r.metric(metricVictims, float64(back.FirstVictims), "clients")
	recovered := back.Recover.Count()
	out := float64(back.Clients - back.Open)
	r.metric(metricRecovered, float64(recovered), "clients")
	r.metric(metricOut, out, "clients")
	r.metric(metricLateRecovered, float64(back.Recover.CountBetween(r.s.For/2, time.Hour)), "clients")
	r.metric(metricPong, float64(r.pong.OK), "clients")
	if recovered > 0 {
		r.metric(metricRecoverMedian, back.Recover.Quantile(0.5).Seconds(), "s")
		r.metric(metricRecoverP90, back.Recover.Quantile(0.9).Seconds(), "s")
		r.metric("clients/Recovered.Last", back.Recover.Quantile(1).Seconds(), "s")
	}
	if n := back.Connect.Count(); n > 0 {
		r.metric(metricAtRetry, float64(r.atRetries(back.Connect))/float64(n), "1")
		r.metric("clients/Connect.P50", back.Connect.Quantile(0.5).Seconds(), "s")
		r.metric("clients/Connect.P99", back.Connect.Quantile(0.99).Seconds(), "s")
		r.metric("clients/Connect.Max", back.Connect.Quantile(1).Seconds(), "s")
	}
	r.metric("clients/Lateness.P99", back.Lateness.Quantile(0.99).Seconds(), "s")
	if r.s.losesClients() {
		r.metric(metricSymptom, out, "clients")
	} else {
		r.metric(metricSymptom, float64(back.FirstVictims), "clients")
	}
}

// retrySlack is by how much a connect may take longer than the time of a SYN retry, and its timer's rounding.
const retrySlack = 100 * time.Millisecond

// atRetries counts the connects that took next to nothing, or until a SYN retry.
func (r *stormRun) atRetries(connect *loadgen.Histogram) int64 {
	rules := ReadKernelRules()
	n := connect.CountBetween(0, retrySlack)
	before, late := time.Duration(0), time.Duration(0)
	for _, at := range rules.SYNRetries(12) {
		late += timerRounding(rules.Tick, at-before)
		before = at
		// A histogram's bucket may begin a thousandth earlier.
		n += connect.CountBetween(at-at/500, at+late+retrySlack)
	}
	return n
}

// accountProber is what a person with telnet sees.
func (r *stormRun) accountProber() {
	half := ReadKernelRules().SYNRetries(1)[0] / 2
	var hung, slowest, due float64
	var points []results.Point
	began := r.begin.Sub(r.probed.Start)
	for _, op := range r.probes {
		waited := connectTime(op)
		points = append(points, results.Point{T: (op.Due - began).Seconds(), V: waited.Seconds()})
		if op.Due < began {
			continue
		}
		due++
		slowest = max(slowest, waited.Seconds())
		if waited >= half || op.Class == loadgen.ConnectTimeout {
			hung++
		}
	}
	slices.SortFunc(points, func(a, b results.Point) int { return int(math.Copysign(1, a.T-b.T)) })
	r.metric("prober/Connects", due, "connects")
	r.metric(metricProbeHung, hung, "connects")
	r.metric(metricProbeSlowest, slowest, "s")
	r.v.Series = append(r.v.Series, results.NewSeries("the prober's connect time", "s", points))
}

// accountGroups records the numbers without dimension, which a smaller run has in common with the article's.
func (r *stormRun) accountGroups() {
	s := r.s
	places := float64(s.queue().places())
	rate := float64(s.cut()) / max(s.spread().Seconds(), 1e-9)
	r.metric("Group.cut/(B+1)", float64(s.cut())/places, "1")
	if s.AcceptRate > 0 {
		low, high := s.window()
		r.metric("Group.λ/μ", rate/float64(s.AcceptRate), "1")
		r.metric("Group.μ·patience/(B+1)", float64(s.AcceptRate)*s.Timeout.Seconds()/places, "1")
		r.metric("Group.μ·r₁/(B+1)", float64(s.AcceptRate)*ReadKernelRules().SYNRetries(1)[0].Seconds()/places, "1")
		r.metric("Group.held/cut", float64(s.Connections)/max(1, float64(s.cut())), "1")
		r.metric("Window.Low", low, "connections")
		r.metric("Window.High", high, "connections")
	}
}

// accountServer is what the server's namespace knows.
func (r *stormRun) accountServer(timeline *observe.Timeline) error {
	host := r.server.Name()
	limit, err := timeline.Peak("Listen.Limit", host)
	if err != nil {
		return err
	}
	depths, err := timeline.Series("Listen.Depth", host)
	if err != nil {
		return err
	}
	deltas, err := timeline.Deltas(host)
	if err != nil {
		return err
	}
	begin := r.begin.Sub(timeline.Start())
	r.metric(metricLimit, float64(limit.Value), "connections")
	// It is full when it is seen so, or when it has overflowed: between two accepts it is full for some milliseconds only.
	overflow, overflowed, err := firstOverflow(timeline, host)
	if err != nil {
		return err
	}
	full := time.Duration(-1)
	if overflowed {
		full = overflow - begin
	}
	var peak int64
	points := make([]results.Point, len(depths))
	for i, p := range depths {
		peak = max(peak, p.Value)
		if p.Value > limit.Value && (full < 0 || p.At-begin < full) {
			full = p.At - begin
		}
		points[i] = results.Point{T: (p.At - begin).Seconds(), V: float64(p.Value)}
	}
	r.metric(metricPeakDepth, float64(peak), "connections")
	if full >= 0 {
		r.metric(metricQueueFull, full.Seconds(), "s")
		if lost := r.pauses(depths, begin, full); r.s.Jitter == 0 && lost > fillPause {
			r.v.Void(fmt.Sprintf("while the queue filled the machine stood still for %v, the limit is %v", lost, fillPause))
		}
	}
	r.v.Series = append(r.v.Series, results.NewSeries("accept queue", "connections", points))
	recordGrowth(r.v, "server", deltas)
	recordGrowth(r.v, "clients", r.counters)
	for _, counter := range []string{"TcpExt.ListenOverflows", "TcpExt.ListenDrops", "Tcp.PassiveOpens"} {
		if _, printed := deltas[counter]; !printed {
			return fmt.Errorf("this kernel does not print %s", counter)
		}
	}
	overflows := deltas["TcpExt.ListenOverflows"]
	r.metric(metricDropsOnly, float64(deltas["TcpExt.ListenDrops"]-overflows), "SYNs")
	// What went through the queue and was neither the prober's nor had a reply is a corpse.
	accepted, err := r.acceptedUntil(timeline, begin+r.s.For)
	if err != nil {
		return err
	}
	r.metric("server/Accepted", float64(accepted), "connections")
	r.metric(metricCorpses, float64(accepted-r.back.OK-r.probed.OK), "connections")
	// No kernel that can run this has the old rule: the model says what it would have done, and what it does by today's.
	model := r.s.model(ReadKernelRules())
	r.metric(metricNewSYNs, float64(model.play().overflows), "SYNs")
	model.before410 = true
	modelled := model.play()
	r.metric(metricOldSYNs, float64(modelled.overflows), "SYNs")
	r.metric(metricOldACKs, float64(modelled.refused), "ACKs")
	r.metric(metricOldGhosts, float64(modelled.ghosts), "connections")
	return r.checkAccepts(timeline)
}

// acceptedUntil is how many connections the server has accepted since the prober began: those that came into
// the queue and are no longer in it.
func (r *stormRun) acceptedUntil(timeline *observe.Timeline, at time.Duration) (int64, error) {
	host := r.server.Name()
	opened, err1 := timeline.At(at, "Tcp.PassiveOpens", host)
	before, err2 := timeline.At(r.begin.Sub(timeline.Start())-probeBefore-probeEvery/2, "Tcp.PassiveOpens", host)
	depth, err3 := timeline.At(at, "Listen.Depth", host)
	return opened - before - depth, errors.Join(err1, err2, err3)
}

// acceptSlack is by how much the server may accept more or fewer than it was told to.
const acceptSlack = 0.03

// checkAccepts voids a run whose server did not accept at the rate that was asked for while many waited: while a tenth
// of the places and more were taken, so that the queue was not empty between two looks either.
func (r *stormRun) checkAccepts(timeline *observe.Timeline) error {
	if r.s.AcceptRate == 0 || r.s.cut() == 0 || r.s.Jitter > 0 {
		return nil
	}
	host := r.server.Name()
	begin := r.begin.Sub(timeline.Start())
	depths, err := timeline.Series("Listen.Depth", host)
	if err != nil {
		return err
	}
	var from, to time.Duration
	for _, p := range depths {
		many := p.Value >= int64(r.s.queue().places()/10)
		switch {
		case p.At < begin+500*time.Millisecond || p.At > begin+r.s.For || from == 0 && !many:
			continue
		case from == 0:
			from = p.At
		}
		if !many {
			break
		}
		to = p.At
	}
	if to-from < time.Second {
		return nil
	}
	first, err1 := r.acceptedUntil(timeline, from)
	last, err2 := r.acceptedUntil(timeline, to)
	if err := errors.Join(err1, err2); err != nil {
		return err
	}
	rate := float64(last-first) / (to - from).Seconds()
	r.metric("server/AcceptRate", rate, "1/s")
	if math.Abs(rate/float64(r.s.AcceptRate)-1) > acceptSlack {
		r.v.Void(fmt.Sprintf("the server accepted %.1f a second while somebody waited, instead of %d", rate, r.s.AcceptRate))
	}
	return nil
}

// behind is by how much one attempt in a hundred may be late: a twentieth of the time within which they come, in which the
// queue fills and overflows. What follows is paced by SYN retries, which are seconds apart.
func (s *storm) behind() time.Duration { return min(s.spread()/20, 250*time.Millisecond) }

// fillPause is for how long the machine may stand still while the queue fills.
const fillPause = 100 * time.Millisecond

// pauses is for how long the machine stood still while the queue filled, beyond what sampling it takes.
func (r *stormRun) pauses(depths []observe.Point, begin, full time.Duration) (lost time.Duration) {
	for i := 1; i < len(depths); i++ {
		if gap := depths[i].At - depths[i-1].At; depths[i].At > begin && depths[i-1].At < begin+full {
			lost += max(0, gap-2*stormEvery)
		}
	}
	return lost
}

// checkConditions voids a run that was not the experiment that was asked for.
func (r *stormRun) checkConditions() {
	if late := r.back.Lateness.Quantile(0.99); late > r.s.behind() {
		r.v.Void(fmt.Sprintf("the clients fell behind: 1 %% of their connects began more than %v late, the limit is %v", late, r.s.behind()))
	}
	if n := r.back.Cut.Sum(); n != r.cut {
		r.v.Void(fmt.Sprintf("the server cut %d connections, and %d clients know of it", r.cut, n))
	}
	if n := r.probed.NotStarted; n > 0 {
		r.v.Void(fmt.Sprintf("the prober left out %d connects", n))
	}
}
