package scenarios

import (
	"context"
	"errors"
	"fmt"
	"net"
	"net/netip"
	"regexp"
	"slices"
	"strings"
	"sync"
	"time"

	"github.com/gomodule/redigo/redis"

	"connlab/loadgen"
	"connlab/loadgen/pool"
	"connlab/netlab"
	"connlab/netlab/observe"
	"connlab/results"
)

// mixedPoolRun is one arm while it is measured.
type mixedPoolRun struct {
	m      *mixedPool
	v      *results.Variant
	opt    Options
	web    *netlab.Host
	target *target

	began, end    time.Time // of the callers
	keep, closing callCounts
	notBurst      time.Duration // by how much a burst was too slow to be one
	ages          clientAges
	often         int // uses that are more than the mean's, and
	usedOften     int // connections closed by callers after more
}

// callCounts is what became of the callers of one kind.
type callCounts struct {
	ok, dialed, reused int64
	failed             loadgen.Counts
}

// Measure implements [Experiment].
func (m *mixedPool) Measure(ctx context.Context, lab *netlab.Lab, opt Options, v *results.Variant) (err error) {
	r := &mixedPoolRun{m: m, v: v, opt: opt, web: lab.Host("web"), often: m.usesAboveMean()}
	v.Link = r.web.LinkKind()
	if r.target, err = opt.server.start(ctx, lab.Host("redis"), serverConfig{backlog: 4096, timeout: m.Timeout}, opt.Log); err != nil {
		return err
	}
	defer func() { err = errors.Join(err, r.target.stop()) }()
	if v.Sysctls, err = observe.ReadSysctls(r.web, "net.ipv4.tcp_max_tw_buckets", "net.ipv4.tcp_tw_reuse", "net.ipv4.ip_local_port_range", "net.ipv4.tcp_max_syn_backlog"); err != nil {
		return err
	}
	call, endCalls, err := r.caller(ctx, lab)
	if err != nil {
		return err
	}
	defer func() { err = errors.Join(err, endCalls()) }()
	cfg := observe.Config{Counters: lab.Hosts()}
	if m.Burst > 0 {
		cfg.CountersEvery = countersEvery // a burst is short
	}
	giveCounters, err := opt.countersBefore(v.Name, r.web)
	if err != nil {
		return err
	}
	watch, err := observe.Start(ctx, cfg)
	if err != nil {
		return err
	}
	defer watch.Stop() //nolint:errcheck // the first Stop, below, returned the same error
	r.began = time.Now()
	look := r.lookAtClients()
	err = call(ctx)
	r.end = time.Now()
	if err := errors.Join(err, look()); err != nil {
		return err
	}
	if err := noneClosing(ctx, r.web); err != nil {
		return err
	}
	timeline, err := watch.Stop()
	if err != nil {
		return err
	}
	if err := errors.Join(opt.giveTimeline(v.Name, timeline), giveCounters()); err != nil {
		return err
	}
	return r.fill(timeline)
}

// caller prepares the load; end ends what it leaves.
func (r *mixedPoolRun) caller(ctx context.Context, lab *netlab.Lab) (call func(context.Context) error, end func() error, err error) {
	if r.m.realNginx() {
		return r.nginxCaller(ctx, lab)
	}
	p := r.pool()
	return func(ctx context.Context) error { return r.callPool(ctx, p) }, p.Close, nil
}

// nginxCaller starts a real nginx, whose callers are users of its web pages.
func (r *mixedPoolRun) nginxCaller(ctx context.Context, lab *netlab.Lab) (call func(context.Context) error, end func() error, err error) {
	m := r.m
	proc, err := startNginx(ctx, r.web, nginxConfig{
		Servers: instances(m.Instances), Workers: m.Workers, Resty: m.Pool == poolResty,
		SeparatePools: m.Separate, NoCodeCache: m.PerRequest, PoolSize: m.Size, Keepalive: m.Idle,
	}, r.opt.Log)
	if err != nil {
		return nil, nil, err
	}
	call = func(ctx context.Context) error {
		load := nginxLoad{Keep: m.keeping(), Close: m.closing()}
		done, err := load.run(ctx, lab.Host("users"), netip.AddrPortFrom(r.web.Addr(), nginxPort))
		if err != nil {
			return err
		}
		for _, k := range []struct {
			to   *callCounts
			from nginxCalls
		}{{&r.keep, done.Keep}, {&r.closing, done.Close}} {
			for text, n := range k.from.Errors {
				r.v.Warnings = append(r.v.Warnings, fmt.Sprintf("%d calls failed in nginx: %s", n, text))
			}
			*k.to = callCounts{ok: k.from.Report.OK, dialed: k.from.dialed(), reused: k.from.reused(), failed: k.from.Report.Failed}
			if err := k.from.Report.Behind(lumpLimit); err != nil {
				r.v.Void(err.Error())
			}
		}
		return nil
	}
	return call, func() error { return proc.Stop(5 * time.Second) }, nil
}

func (r *mixedPoolRun) dial(ctx context.Context, addr netip.AddrPort) (net.Conn, error) {
	return r.web.DialContext(ctx, "tcp4", addr.String())
}

func (r *mixedPoolRun) pool() pool.Pool {
	m := r.m
	switch m.Pool {
	case poolRedigo:
		return pool.NewRedigo(pool.RedigoConfig{Dial: r.dial, MaxIdle: m.Size, IdleTimeout: m.Idle})
	case poolGoRedis, poolEphemeral:
		return pool.NewGoRedis(pool.GoRedisConfig{Dial: r.dial, PoolSize: m.Size, ConnMaxIdleTime: m.Idle, Ephemeral: m.Pool == poolEphemeral})
	}
	return pool.NewCosockets(pool.CosocketConfig{
		Dial: r.dial, Workers: m.Workers, Size: m.Size, KeepTimeout: m.Idle, Separate: m.Separate, PerRequest: m.PerRequest,
	})
}

// callPool sends the callers through a pool in this process.
func (r *mixedPoolRun) callPool(ctx context.Context, p pool.Pool) error {
	cfg := pool.Config{
		Pool: p, Targets: instances(r.m.Instances), Keeping: r.m.keeping(), Closing: r.m.closing(),
		Progress: &pool.Progress{},
	}
	bursts := make([]struct{ first, last time.Duration }, r.m.bursts())
	if r.m.Burst > 0 {
		cfg.Hold = r.m.Hold
		cfg.OnCall = func(c pool.Call) {
			b := &bursts[c.Index/r.m.Burst]
			if b.last == 0 || c.Done < b.first {
				b.first = c.Done
			}
			b.last = max(b.last, c.Done)
		}
	} else {
		cfg.OnCall = r.ends
	}
	stop := every(time.Second, func() {
		s := cfg.Progress.Snapshot()
		r.opt.progress("%d calls, %d in flight, %d failed", s.Due, s.InFlight, s.Failed)
	})
	defer stop()
	report, err := pool.Run(ctx, cfg)
	if err != nil {
		return err
	}
	for _, b := range bursts {
		r.notBurst = max(r.notBurst, b.last-b.first)
	}
	if err := report.Balanced(); err != nil {
		return err
	}
	for _, k := range []struct {
		to   *callCounts
		from *pool.KindReport
	}{{&r.keep, &report.Keeping}, {&r.closing, &report.Closing}} {
		if n := k.from.NotReturned; n > 0 {
			r.v.Warnings = append(r.v.Warnings, fmt.Sprintf("%d connections that were to be kept could not be given back", n))
		}
		*k.to = callCounts{ok: k.from.Load.OK, dialed: k.from.Dialed, reused: k.from.Reused, failed: k.from.Load.Failed}
		limit := lumpLimit
		if r.m.Burst > 0 {
			limit = r.m.Hold // a lump is what it is to be
		}
		if err := k.from.Load.Behind(limit); err != nil {
			r.v.Void(err.Error())
		}
	}
	return nil
}

// ends notes how often a connection was used before a caller closes it.
func (r *mixedPoolRun) ends(c pool.Call) {
	if c.Kind == pool.Closes && c.Class == loadgen.OK && c.Reused+1 > r.often {
		r.usedOften++
	}
}

// lumpLimit is by how much one call in a hundred may be late. A pause of the
// generator makes a lump of calls that are due at once: they overlap, and what
// follows from one call after the other does not hold.
const lumpLimit = 50 * time.Millisecond

// clientListEvery is how often CLIENT LIST is looked at.
const clientListEvery = 500 * time.Millisecond

// clientAges is what CLIENT LIST told, over the whole run.
type clientAges struct {
	all    []time.Duration // of all looks, a connection as often as it was seen
	oldest time.Duration
	looks  int
	coarse bool // the server tells whole seconds only
}

// clientField finds what is wanted in a line of CLIENT LIST: whole seconds, or the
// milliseconds that connlab's own server adds.
var clientField = regexp.MustCompile(`(?:^| )(addr|age|age-ms)=(\S+)`)

// lookAtClients reads CLIENT LIST again and again until the function it returns is
// called, which does so once more.
func (r *mixedPoolRun) lookAtClients() (stop func() error) {
	var mu sync.Mutex
	var failed error
	look := func() {
		mu.Lock()
		defer mu.Unlock()
		if failed == nil {
			failed = r.lookOnce()
		}
	}
	end := every(clientListEvery, look)
	return func() error {
		end()
		look()
		return failed
	}
}

func (r *mixedPoolRun) lookOnce() error {
	text, err := redis.String(r.target.control.Do("CLIENT", "LIST"))
	if err != nil {
		return fmt.Errorf("CLIENT LIST: %w", err)
	}
	r.ages.looks++
	for line := range strings.Lines(text) {
		fields := map[string]string{}
		for _, f := range clientField.FindAllStringSubmatch(line, -1) {
			fields[f[1]] = f[2]
		}
		addr, err1 := netip.ParseAddrPort(fields["addr"])
		age, err2 := time.ParseDuration(fields["age"] + "s")
		ms, fine := fields["age-ms"]
		if fine {
			age, err2 = time.ParseDuration(ms + "ms")
		}
		if err := errors.Join(err1, err2); err != nil {
			return fmt.Errorf("CLIENT LIST: %w", err)
		}
		if addr.Addr() != r.web.Addr() {
			continue
		}
		r.ages.coarse = r.ages.coarse || !fine
		r.ages.all = append(r.ages.all, age)
		r.ages.oldest = max(r.ages.oldest, age)
	}
	return nil
}

func (r *mixedPoolRun) metric(name string, value float64, unit string) {
	r.v.Metrics[name] = results.Metric{Value: value, Unit: unit}
}

func (r *mixedPoolRun) fill(timeline *observe.Timeline) error {
	r.fillCallers()
	if r.m.Burst > 0 && r.notBurst >= r.m.Hold {
		r.v.Void(fmt.Sprintf("a burst took %v to get its replies, so that not all held a connection at once (hold is %v)", r.notBurst.Round(time.Millisecond), r.m.Hold))
	}
	if late := r.end.Sub(r.began) - r.m.For; late > r.m.For/10+500*time.Millisecond {
		r.v.Void(fmt.Sprintf("the callers took %v longer than %v", late.Round(time.Millisecond), r.m.For))
	}
	deltas, err := timeline.Deltas(r.web.Name())
	if err != nil {
		return err
	}
	for counter, n := range deltas {
		if n != 0 && isCounter(counter) {
			r.metric("web/"+counter, float64(n), unitOf(counter))
		}
	}
	opens := deltas["Tcp.ActiveOpens"]
	r.metric("web/Tcp.ActiveOpens", float64(opens), "connections")
	r.metric(metricDialsApart, float64(opens-r.keep.dialed-r.closing.dialed), "connections")
	if err := r.fillSockets(timeline); err != nil {
		return err
	}
	if r.m.shares() && !r.m.realNginx() {
		r.metric(metricUsedOften, float64(r.usedOften), "connections")
	}
	r.metric(metricAgeMax, r.ages.oldest.Seconds(), "s")
	if n := len(r.ages.all); n > 0 {
		slices.Sort(r.ages.all)
		median := r.ages.all[n/2]
		if !r.ages.coarse {
			median += time.Millisecond / 2 // the server rounds down
		}
		// Recorded, and not claimed: N/s·ln2 while calls do not overlap, and more the
		// busier the machine is.
		r.metric("redis/ClientList.Age.Median", median.Seconds(), "s")
	}
	r.metric("redis/ClientList.Looks", float64(r.ages.looks), "looks")
	return nil
}

func (r *mixedPoolRun) fillCallers() {
	failed := r.keep.failed.Sum() + r.closing.failed.Sum()
	r.metric(metricCallsFailed, float64(failed), "calls")
	for _, k := range []struct {
		name string
		c    callCounts
	}{{"Keep", r.keep}, {"Close", r.closing}} {
		r.metric("clients/"+k.name+".Calls", float64(k.c.ok), "calls")
		r.metric("clients/"+k.name+".Dialed", float64(k.c.dialed), "calls")
		r.metric("clients/"+k.name+".Reused", float64(k.c.reused), "calls")
		for class, n := range k.c.failed {
			r.metric("clients/"+k.name+".Failed."+string(class), float64(n), "calls")
		}
	}
	calls, dials := r.keep.dialed+r.keep.reused+r.closing.dialed+r.closing.reused, r.keep.dialed+r.closing.dialed
	if dials > 0 {
		r.metric(metricCallsPerDial, float64(calls)/float64(dials), "calls")
	}
	if n := r.keep.dialed + r.keep.reused; n > 0 {
		r.metric(metricKeepShare, float64(r.keep.dialed)/float64(n), "of calls")
	}
}

// fillSockets records the TIME_WAITs of both sides and the connections of Redis.
func (r *mixedPoolRun) fillSockets(timeline *observe.Timeline) error {
	waiting, err := timeline.Series("sockstat.TCP.tw", r.web.Name())
	if err != nil {
		return err
	}
	r.metric(metricTWEnd, float64(waiting[len(waiting)-1].Value), "sockets")
	steady := r.began.Add(steadyFrom(ReadKernelRules()) + time.Second).Sub(timeline.Start())
	var sum, samples float64
	for _, p := range waiting {
		if p.At >= steady && p.At <= r.end.Sub(timeline.Start()) {
			sum += float64(p.Value)
			samples++
		}
	}
	if samples > 0 {
		r.metric(metricTWSteady, sum/samples, "sockets")
	}
	redisName := r.target.host.Name()
	peak, err := timeline.Peak("sockstat.TCP.tw", redisName)
	if err != nil {
		return err
	}
	r.metric(metricTWServer, float64(peak.Value), "sockets")
	conns, err := timeline.Series("Tcp.CurrEstab", redisName)
	if err != nil {
		return err
	}
	var most int64
	for _, p := range conns {
		most = max(most, p.Value)
	}
	r.metric(metricConnsPeak, float64(most-2), "connections") // the control connection has both its ends there
	first, err := timeline.Series("sockstat.TCP.tw", redisName)
	if err != nil {
		return err
	}
	r.v.Series = append(r.v.Series, seriesOf("web", "sockstat.TCP.tw", waiting), seriesOf("redis", "sockstat.TCP.tw", first), seriesOf("redis", "Tcp.CurrEstab", conns))
	return nil
}
