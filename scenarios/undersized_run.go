package scenarios

import (
	"bytes"
	"cmp"
	"context"
	"errors"
	"fmt"
	"math"
	"os"
	"slices"
	"strconv"
	"strings"
	"sync"
	"time"

	"golang.org/x/sync/errgroup"
	"golang.org/x/sys/unix"

	"connlab/loadgen"
	"connlab/loadgen/pool"
	"connlab/netlab"
	"connlab/netlab/observe"
	"connlab/results"
)

// undersizedRun is one arm while it is measured.
type undersizedRun struct {
	u      *undersized
	v      *results.Variant
	opt    Options
	lab    *netlab.Lab
	target *target
	legs   []*undersizedLegRun

	giveCounters func(of ...*netlab.Host) error

	control sync.Mutex // of the target's control connection, which legs side by side share
}

// undersizedLegRun is one leg.
type undersizedLegRun struct {
	undersizedLeg
	arm  *undersizedRun
	host *netlab.Host

	longest time.Duration // that Redis takes for a call: go-redis greets it on a new connection

	report     *pool.Report
	account    pool.Account // when the last call had ended
	batched    pool.BatchStats
	began, end time.Time
	churned    int64 // connections closed in the steady state
	tw         int64 // TIME_WAITs of the host, when all were there
	usage      processUsage
	server     serverUsage

	// Of the calls, by OnCall.
	busy     time.Duration // the sum of the times that they had, or waited for, a connection
	firstNo  time.Duration // when the first found no local port, 0 for never
	opened   time.Duration // when the first connection was opened
	half     time.Duration // when half of the ports had been used
	again    time.Duration // when one was opened beyond the number of ports
	dialed   int
	lateness *loadgen.Histogram // until it is strained
	came     []playedCall       // as they came, until then
	pause    time.Duration      // the longest by which a call began late or took too long, until then
}

// Measure implements [Experiment].
func (u *undersized) Measure(ctx context.Context, lab *netlab.Lab, opt Options, v *results.Variant) (err error) {
	legs, err := u.legs()
	if err != nil {
		return err
	}
	if opt.server.kind != ServerMini && slices.ContainsFunc(legs, func(l undersizedLeg) bool { return len(u.Fill) == 0 && l.Latency+time.Duration(l.Ceiling) > 0 }) {
		return &netlab.NeedError{Need: needMini, Err: errors.New("redis-server cannot be told to be slow without standing still, nor to have a limit of requests")}
	}
	r := &undersizedRun{u: u, v: v, opt: opt, lab: lab}
	clients := lab.Hosts()[1:]
	v.Link = clients[0].LinkKind()
	if r.target, err = opt.server.start(ctx, lab.Host("redis"), serverConfig{backlog: 4096}, opt.Log); err != nil {
		return err
	}
	defer func() { err = errors.Join(err, r.target.stop()) }()
	if v.Sysctls, err = observe.ReadSysctls(clients[0], "net.ipv4.ip_local_port_range", "net.ipv4.tcp_tw_reuse", "net.ipv4.tcp_tw_reuse_delay", "net.ipv4.tcp_max_tw_buckets", "net.ipv4.tcp_max_syn_backlog"); err != nil {
		return err
	}
	if len(u.Fill) > 0 {
		return r.measureConnects(ctx, clients[0])
	}
	for _, l := range legs {
		p := l.pooling(ReadKernelRules())
		r.legs = append(r.legs, &undersizedLegRun{
			undersizedLeg: l, arm: r, host: lab.Host(l.host), lateness: loadgen.NewHistogram(), longest: p.latency + p.greeting,
		})
	}
	if r.giveCounters, err = opt.countersBefore(v.Name, clients...); err != nil {
		return err
	}
	watch, err := observe.Start(ctx, observe.Config{Counters: lab.Hosts()})
	if err != nil {
		return err
	}
	defer watch.Stop() //nolint:errcheck // the first Stop, below, returned the same error
	if err := opt.others.await(ctx); err != nil {
		return err
	}
	if err := r.drive(ctx); err != nil {
		return err
	}
	timeline, err := watch.Stop()
	if err != nil {
		return err
	}
	if err := opt.giveTimeline(v.Name, timeline); err != nil {
		return err
	}
	return r.fill(timeline)
}

// drive runs the legs, one after the other or side by side.
func (r *undersizedRun) drive(ctx context.Context) error {
	if r.u.Beside {
		if err := r.setServer(r.legs[0].undersizedLeg); err != nil {
			return err
		}
		g, ctx := errgroup.WithContext(ctx)
		for _, l := range r.legs {
			g.Go(func() error { return l.run(ctx) })
		}
		return g.Wait()
	}
	for _, l := range r.legs {
		if err := r.setServer(l.undersizedLeg); err != nil {
			return err
		}
		if err := l.run(ctx); err != nil {
			return err
		}
	}
	return nil
}

// setServer makes Redis as slow as a leg has it.
func (r *undersizedRun) setServer(l undersizedLeg) error {
	if r.target.kind != ServerMini {
		return nil // it is not to be slow
	}
	for _, set := range []struct {
		name  string
		value int64
	}{
		{"max-request-rate", 0}, // forgets what waits for its turn
		{"max-request-rate", int64(l.Ceiling)},
		{"service-time", l.Latency.Microseconds()},
	} {
		if _, err := r.target.control.Do("CONFIG", "SET", set.name, set.value); err != nil {
			return fmt.Errorf("CONFIG SET %s: %w", set.name, err)
		}
	}
	return nil
}

// dialer makes the connections of a leg, from sockets that are made in advance. closeUnused
// must be called when the load is over.
func (l *undersizedLegRun) dialer() (dial pool.Dial, closeUnused func(), err error) {
	from, closeUnused, err := sources([]*netlab.Host{l.host})
	if err != nil {
		return nil, nil, err
	}
	var mu sync.Mutex
	return pool.DialFrom(func() (int, error) {
		mu.Lock()
		defer mu.Unlock()
		return from[0].Socket()
	}), closeUnused, nil
}

// pool is the client under test.
func (l *undersizedLegRun) pool(dial pool.Dial) pool.Pool {
	switch l.Client {
	case clientGoRedis:
		return pool.NewGoRedis(pool.GoRedisConfig{
			Dial: dial, PoolSize: l.PoolSize, PoolTimeout: l.PoolTimeout, MinIdleConns: l.MinIdleConns, MaxIdleConns: l.MaxIdleConns,
			MaxActiveConns: l.MaxActiveConns, ConnMaxIdleTime: l.IdleTimeout, DialerRetries: l.DialerRetries, Timeout: l.Timeout,
		})
	case clientCosocket:
		return pool.NewCosockets(pool.CosocketConfig{Dial: dial, Size: l.MaxIdle, KeepTimeout: l.IdleTimeout, Timeout: l.Timeout})
	case clientBatch:
		return pool.NewBatching(pool.BatchConfig{Dial: dial, Commands: l.BatchCommands, Delay: l.BatchDelay, Conns: l.BatchConns, Timeout: l.Timeout})
	case clientAuto:
		return pool.NewAutoPipeline(pool.AutoPipelineConfig{Dial: dial, Timeout: l.Timeout})
	}
	return pool.NewRedigo(pool.RedigoConfig{
		Dial: dial, MaxIdle: l.MaxIdle, MaxActive: l.MaxActive, Wait: l.Wait,
		IdleTimeout: l.IdleTimeout, MaxConnLifetime: l.MaxConnLifetime, Timeout: l.Timeout,
	})
}

// run sends the leg's calls through its client, and waits until every connection that
// was closed is in TIME_WAIT.
func (l *undersizedLegRun) run(ctx context.Context) (err error) {
	dial, closeUnused, err := l.dialer()
	if err != nil {
		return err
	}
	defer closeUnused()
	p := l.pool(dial)
	defer func() { err = errors.Join(err, p.Close()) }()
	cfg := pool.Config{Pool: p, Targets: instances(1), Keeping: l.callers(), OnCall: l.ended, Progress: &pool.Progress{}}
	if l.Sync {
		cfg.Ops = l.Ops
	}
	stop := every(time.Second, func() {
		s, a := cfg.Progress.Snapshot(), p.Account()
		l.arm.opt.progress("%s: %d calls, %d in flight, %d failed; %d connections opened, %d closed, %d times no local port", l.label, s.Due, s.InFlight, s.Failed, a.Dials, a.Closed, a.NoLocalPort)
	})
	defer stop()
	served, err := l.arm.serverUsage()
	if err != nil {
		return err
	}
	used, err := readUsage()
	if err != nil {
		return err
	}
	churned := l.watchSteady(p)
	l.began = time.Now()
	l.report, err = pool.Run(ctx, cfg)
	l.churned = churned()
	l.end = time.Now()
	if err != nil {
		return err
	}
	now, err := readUsage()
	if err != nil {
		return err
	}
	l.usage = now.since(used)
	servedNow, err := l.arm.serverUsage()
	if err != nil {
		return err
	}
	l.server = servedNow.since(served)
	if batching, ok := p.(*pool.Batching); ok {
		l.batched = batching.Stats()
	}
	if err := l.report.Balanced(); err != nil {
		return err
	}
	return l.settle(ctx, p)
}

// watchSteady counts the connections that are closed in the steady state, from now on.
// The function it returns is for when that is over.
func (l *undersizedLegRun) watchSteady(p pool.Pool) func() int64 {
	from, to := l.steady()
	counts := make(chan int64, 2)
	look := func() { counts <- p.Account().Closed }
	first, second := time.AfterFunc(from, look), time.AfterFunc(to, look)
	return func() int64 {
		if first.Stop() {
			second.Stop()
			return 0 // the run was broken off
		}
		before := <-counts
		if second.Stop() {
			look() // the last call ended before its time
		}
		return <-counts - before
	}
}

// settle waits until the kernel is through with what the client closed.
func (l *undersizedLegRun) settle(ctx context.Context, p pool.Pool) error {
	if err := noneClosing(ctx, l.host); err != nil {
		return err
	}
	l.account = p.Account()
	buckets, err := observe.ReadSockets(l.host, observe.Query{States: observe.SetOf(observe.TimeWait), RemotePort: redisPort})
	l.tw = int64(len(buckets))
	return errors.Join(err, l.arm.giveCounters(l.host))
}

// ended looks at a call that is over. It is not called twice at a time.
func (l *undersizedLegRun) ended(c pool.Call) {
	if c.Class == loadgen.NotStarted {
		return
	}
	l.busy += c.Done - c.Started
	if !l.strained() {
		if c.Op == 0 {
			l.lateness.Record(c.Started - c.Due)
			l.pause = max(l.pause, c.Started-c.Due)
		}
		came := playedCall{at: c.Started}
		if c.Class == loadgen.OK && !l.queues() {
			came.took = c.Done - c.Started
			l.pause = max(l.pause, came.took-l.longest)
		}
		l.came = append(l.came, came)
	}
	if c.Class == loadgen.NoLocalPort && l.firstNo == 0 {
		l.firstNo = c.Done
	}
	if c.Dialed {
		l.dialed++
		switch l.dialed {
		case 1:
			l.opened = c.Done
		case l.Ports/2 + 1:
			l.half = c.Done
		case l.Ports + 1:
			l.again = c.Done
		}
	}
}

// manyPorts are so many that connect(2) costs a millisecond when half of them are taken.
const manyPorts = 10_000

// strained says that what is late from now on is part of the incident: connect(2) takes
// the CPU.
func (l *undersizedLegRun) strained() bool {
	return l.Ports >= manyPorts && (l.half > 0 || l.firstNo > 0)
}

// fill records what was measured.
func (r *undersizedRun) fill(timeline *observe.Timeline) error {
	for _, l := range r.legs {
		if err := l.fill(timeline); err != nil {
			return err
		}
	}
	if !r.u.Beside && len(r.legs) > 1 {
		r.fillRatios()
	}
	return nil
}

func (l *undersizedLegRun) metric(name string, value float64, unit string) {
	l.arm.v.Metrics[l.label+"/"+name] = results.Metric{Value: value, Unit: unit}
}

func (l *undersizedLegRun) fill(timeline *observe.Timeline) error {
	load, a := l.report.Keeping.Load, l.account
	l.judgeGenerator()
	l.metric("Calls.OK", float64(load.OK), "calls")
	failed := loadgen.Counts{loadgen.NoLocalPort: 0, loadgen.PoolExhausted: 0, loadgen.PoolTimeout: 0}
	for class, n := range load.Failed {
		failed[class] += n
	}
	for class, n := range failed {
		l.metric("Calls.Failed."+string(class), float64(n), "calls")
	}
	l.metric(metricOtherFailed, float64(load.Failed.Sum()-failed[loadgen.NoLocalPort]-failed[loadgen.PoolExhausted]-failed[loadgen.PoolTimeout]), "calls")

	seconds := l.For.Seconds()
	l.metric(metricDials, float64(a.Dials), "connections")
	l.metric(metricDialRate, float64(a.Dials)/seconds, "connections/s")
	l.metric(metricChurned, float64(a.Closed), "connections")
	from, to := l.steady()
	churn := float64(l.churned) / (to - from).Seconds()
	l.metric(metricChurn, churn, "connections/s")
	l.metric("Connects", float64(a.Connects), "connects")
	l.metric("Connects.NoLocalPort", float64(a.NoLocalPort), "connects")
	l.metric(metricConnectsLeft, float64(a.Connects-a.Dials-a.NoLocalPort), "connects")
	l.metric(metricGoTries, float64(a.NoLocalPort-3*failed[loadgen.NoLocalPort]), "connects")
	if law := churnLaw(l.Rate, l.Ops, l.Sync, l.MaxIdle); l.Client == clientRedigo && a.NoLocalPort == 0 {
		l.metric("Churn.OfLaw", churn/law, "")
	}
	deltas, err := timeline.Deltas(l.host.Name())
	if err != nil {
		return err
	}
	opens := deltas["Tcp.ActiveOpens"]
	l.metric("Tcp.ActiveOpens", float64(opens), "connections")
	l.metric(metricOpensLeft, float64(opens-a.Dials), "connections")
	l.metric(metricTWAtEnd, float64(l.tw), "sockets")
	l.metric(metricTWLeft, float64(a.Closed-l.tw), "sockets")
	l.metric("TIME_WAIT.OfPorts", float64(l.tw)/float64(l.Ports), "")
	if l.firstNo > 0 {
		l.metric(metricFirstNoPort, l.firstNo.Seconds(), "s")
		l.metric("NoLocalPort.PerSecond", ratio(float64(failed[loadgen.NoLocalPort]), (l.For-l.firstNo).Seconds()), "calls/s")
	}
	if l.half > 0 {
		l.metric(metricHalf, l.half.Seconds(), "s")
	}
	if l.again > 0 {
		l.metric(metricPortAgain, (l.again - l.opened).Seconds(), "s")
	}
	l.fillLatency()
	l.fillGroups()
	return l.fillSeries(timeline)
}

// lateAtMost is by how much one call in a hundred may start late where no model says what
// that does: less than the mean distance of two heartbeats makes no lump of them.
func (l *undersizedLegRun) lateAtMost() time.Duration {
	return max(5*time.Millisecond, time.Duration(float64(l.Ops)/l.Rate*float64(time.Second)))
}

// judgeGenerator makes a run void whose calls did not come when they were due.
func (l *undersizedLegRun) judgeGenerator() {
	if n := l.report.Keeping.Load.NotStarted; n > 0 {
		l.arm.v.Void(fmt.Sprintf("%s: the generator left out %d calls", l.label, n))
	}
	if p99 := l.lateness.Quantile(0.99); (!l.predictable() || l.strained()) && p99 > l.lateAtMost() {
		l.arm.v.Void(fmt.Sprintf("%s: the generator fell behind: 1 %% of calls started more than %v late", l.label, p99.Round(time.Millisecond)))
	}
	l.judgeMachine()
	// Batches that wait at Redis, which did not run, are read as one.
	if batches, read := l.batched.Batches, l.server.requests; !l.arm.u.Beside && float64(read) < 0.97*float64(batches) {
		l.arm.v.Void(fmt.Sprintf("%s: the machine paused: Redis read %d batches with %d reads", l.label, batches, read))
	}
	// On the way to Redis and back, and through two schedulers, a quiet machine takes half a
	// millisecond.
	if !l.predictable() || l.strained() || l.queues() {
		return
	}
	latency := l.report.Keeping.Load.Latency
	if p50 := latency.Quantile(0.5); p50 > l.Latency+l.Latency/20+time.Millisecond {
		l.arm.v.Void(fmt.Sprintf("%s: the machine was too busy: half of the calls took more than %v, and Redis %v of that", l.label, p50.Round(100*time.Microsecond), l.Latency))
	}
}

// playedCall is a call as it was: when it began, and how long it took; 0 where it had no
// connection, and where calls wait for one.
type playedCall struct{ at, took time.Duration }

// mostPause is how long calls and replies may stand still without a look at what that does.
const mostPause = 10 * time.Millisecond

// judgeMachine plays the model once more if the machine paused, with the calls as they came:
// calls and replies come in lumps then, and a lump makes a pool dial and close. A run in which
// that alone takes up half of what a claim allows was not the experiment.
func (l *undersizedLegRun) judgeMachine() {
	if !l.predictable() || l.strained() || l.pause < mostPause {
		return
	}
	rules := ReadKernelRules()
	planned, sd := l.modelledSpread(rules)
	p := l.pooling(rules)
	p.chain = 1 // each operation of a caller came as a call
	slices.SortFunc(l.came, func(a, b playedCall) int { return cmp.Compare(a.at, b.at) })
	came := replay(func(yield func(at, took time.Duration) bool) {
		for _, c := range l.came {
			if !yield(c.at, c.took) {
				return
			}
		}
	}, p)
	for _, c := range l.counted(planned, sd) {
		if off := c.of(came) - c.of(planned); math.Abs(off) > c.tolerance.Amount/2 {
			l.arm.v.Void(fmt.Sprintf("%s: the machine paused for %v: by the model the times at which calls and replies came make %.4g %s of %.4g",
				l.label, l.pause.Round(time.Millisecond), c.of(came), c.unit, c.of(planned)))
		}
	}
}

func (l *undersizedLegRun) fillLatency() {
	l.metric("Generator.Lateness.P99", l.lateness.Quantile(0.99).Seconds(), "s")
	load := l.report.Keeping.Load
	for _, q := range []struct {
		name string
		q    float64
	}{{"Latency.P50", 0.5}, {"Latency.P99", 0.99}, {"Latency.P99.9", 0.999}} {
		l.metric(q.name, load.Latency.Quantile(q.q).Seconds(), "s")
	}
	l.metric(metricMeanLatency, load.Latency.Mean().Seconds(), "s")
	l.metric("Calls.InUse", l.busy.Seconds()/l.end.Sub(l.began).Seconds(), "calls") // Little: λ·W
	if l.batched.Batches > 0 {
		l.metric(metricBatch, float64(l.batched.Commands)/float64(l.batched.Batches), "commands")
	}
	if l.Latency+time.Duration(l.Ceiling) > 0 {
		l.metric(metricServerLatency, l.server.latency(l.Latency).Seconds(), "s")
	}
	commands := float64(load.OK)
	if commands == 0 || l.arm.u.Beside {
		return // legs side by side have this process and Redis in common
	}
	elapsed := l.end.Sub(l.began).Seconds()
	l.metric(metricRequestRate, float64(l.server.requests)/elapsed, "requests/s")
	l.metric(metricRequests, float64(l.server.requests)/commands, "requests")
	l.metric("Commands.PerSecond", float64(l.server.commands)/elapsed, "commands/s")
	l.metric("Server.CPU", l.server.cpu.Seconds()/commands, "s")
	if l.arm.opt.shared {
		return // this process does other variants' work, too
	}
	l.metric("Client.CPU", l.usage.cpu.Seconds()/commands, "s")
	l.metric("Client.Syscalls", float64(l.usage.syscalls)/commands, "syscalls")
}

// group is a number without dimension: two runs in which all are the same are the same
// experiment.
type group struct {
	name  string
	value float64
}

// groups are those of a pool that keeps connections.
func (u *undersized) groups(rules KernelRules) []group {
	return []group{
		{"m/√(λWg)", float64(u.MaxIdle) / u.swing()},
		{"λW/c", ratio(u.Rate*u.Latency.Seconds(), float64(u.MaxActive))},
		{"g/m", ratio(float64(u.Ops), float64(u.MaxIdle))},
		{"P/c", ratio(float64(u.Ports), float64(u.MaxActive))},
		{"churn·R/P", churnLaw(u.Rate, u.Ops, u.Sync, u.MaxIdle) * remembered(rules).Seconds() / float64(u.Ports)},
	}
}

// fillGroups records the groups, beside those of full size.
func (l *undersizedLegRun) fillGroups() {
	if l.Client != clientRedigo || l.Latency == 0 {
		return
	}
	rules := ReadKernelRules()
	full := newUndersized()
	_ = apply(full, fullSize()) // a test applies it
	words := make([]string, 0, 5)
	for i, g := range l.groups(rules) {
		l.metric("Group."+g.name, g.value, "")
		words = append(words, fmt.Sprintf("%s %.3g (%.3g)", g.name, g.value, full.groups(rules)[i].value))
	}
	l.arm.v.Evidence = append(l.arm.v.Evidence, l.label+": without dimension (at full size): "+strings.Join(words, ", "))
}

// ratio is 0 where there is nothing to divide by.
func ratio(a, b float64) float64 {
	if b == 0 {
		return 0
	}
	return a / b
}

func (l *undersizedLegRun) fillSeries(timeline *observe.Timeline) error {
	names := []string{"sockstat.TCP.tw"}
	if len(l.arm.legs) == 1 {
		names = append(names, "Tcp.CurrEstab")
	}
	for _, name := range names {
		points, err := timeline.Series(name, l.host.Name())
		if err != nil {
			return err
		}
		l.arm.v.Series = append(l.arm.v.Series, seriesOf(l.label, name, points))
	}
	return nil
}

// fillRatios compares every leg with the first.
func (r *undersizedRun) fillRatios() {
	first := r.legs[0]
	both := func(l *undersizedLegRun, metric, name, unit string, compare func(a, b float64) float64) {
		a, has := r.v.Metrics[l.label+"/"+name]
		b, firstHas := r.v.Metrics[first.label+"/"+name]
		if has && firstHas && b.Value > 0 {
			l.metric(metric, compare(a.Value, b.Value), unit)
		}
	}
	for _, l := range r.legs[1:] {
		if l.Client == first.Client {
			continue
		}
		both(l, metricRequestRatio, metricRequests, "", ratio)
		both(l, metricSyscallRatio, "Client.Syscalls", "", ratio)
		both(l, metricLatencyCost, metricMeanLatency, "s", func(a, b float64) float64 { return a - b })
	}
}

// processUsage is what this process has used: both the client and the loader.
type processUsage struct {
	cpu      time.Duration
	syscalls int64 // read(2), write(2) and their like
}

func (u processUsage) since(before processUsage) processUsage {
	return processUsage{u.cpu - before.cpu, u.syscalls - before.syscalls}
}

func readUsage() (processUsage, error) {
	var usage unix.Rusage
	if err := unix.Getrusage(unix.RUSAGE_SELF, &usage); err != nil {
		return processUsage{}, fmt.Errorf("getrusage: %w", err)
	}
	text, err := os.ReadFile("/proc/self/io")
	if err != nil {
		return processUsage{}, err
	}
	u := processUsage{cpu: time.Duration(usage.Utime.Nano() + usage.Stime.Nano())}
	for line := range bytes.Lines(text) {
		name, value, _ := bytes.Cut(bytes.TrimSpace(line), []byte(": "))
		if string(name) == "syscr" || string(name) == "syscw" {
			n, err := strconv.ParseInt(string(value), 10, 64)
			if err != nil {
				return u, fmt.Errorf("/proc/self/io: %w", err)
			}
			u.syscalls += n
		}
	}
	return u, nil
}

// serverUsage is what Redis says of itself.
type serverUsage struct {
	requests int64 // reads that brought something: a command, or a pipeline of them
	commands int64
	cpu      time.Duration
	// Of the mini server: what has made it slow so far, apart from the latency that it was
	// told to have.
	waited, late    time.Duration // sums over requests that waited for their turn, and over replies that were released late
	served, replies int64         // how many those were
}

func (u serverUsage) since(before serverUsage) serverUsage {
	return serverUsage{
		u.requests - before.requests, u.commands - before.commands, u.cpu - before.cpu,
		u.waited - before.waited, u.late - before.late, u.served - before.served, u.replies - before.replies,
	}
}

// latency is what a request took at Redis on average: the service time that it was told to
// have, and what came on top of it. Nothing is told to a server that released no reply.
func (u serverUsage) latency(told time.Duration) time.Duration {
	if u.replies == 0 {
		return 0
	}
	if u.served > 0 {
		told += u.waited / time.Duration(u.served)
	}
	return told + u.late/time.Duration(u.replies)
}

func (r *undersizedRun) serverUsage() (u serverUsage, err error) {
	r.control.Lock()
	defer r.control.Unlock()
	stats, err := r.target.info("stats")
	if err != nil {
		return u, err
	}
	cpu, err := r.target.info("cpu")
	if err != nil {
		return u, err
	}
	var errs [8]error
	if r.target.kind == ServerMini {
		held, err := r.target.info("connlab")
		if err != nil {
			return u, err
		}
		u.served, errs[4] = strconv.ParseInt(held["requests_total"], 10, 64)
		u.replies, errs[5] = strconv.ParseInt(held["releases_total"], 10, 64)
		var waited, late int64
		waited, errs[6] = strconv.ParseInt(held["request_wait_us_total"], 10, 64)
		late, errs[7] = strconv.ParseInt(held["release_late_us_total"], 10, 64)
		u.waited, u.late = time.Duration(waited)*time.Microsecond, time.Duration(late)*time.Microsecond
	}
	u.requests, errs[0] = strconv.ParseInt(stats["total_reads_processed"], 10, 64)
	u.commands, errs[1] = strconv.ParseInt(stats["total_commands_processed"], 10, 64)
	for i, name := range []string{"used_cpu_sys", "used_cpu_user"} {
		var s float64
		s, errs[2+i] = strconv.ParseFloat(cpu[name], 64)
		u.cpu += time.Duration(s * float64(time.Second))
	}
	if err := errors.Join(errs[:]...); err != nil {
		return u, fmt.Errorf("INFO: %w", err)
	}
	return u, nil
}
