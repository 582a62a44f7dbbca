package scenarios

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"slices"
	"time"

	"golang.org/x/sync/errgroup"

	"connlab/loadgen"
	"connlab/netlab"
	"connlab/netlab/observe"
	"connlab/results"
)

// timeWaitRun is one arm while it is measured.
type timeWaitRun struct {
	w      *timeWait
	v      *results.Variant
	opt    Options
	lab    *netlab.Lab
	target *target
	done   []timeWaitDone
}

// timeWaitDone is a leg that is over.
type timeWaitDone struct {
	timeWaitLeg
	report     *loadgen.Report
	began, end time.Time // of the arrivals
}

// shownTimeWaitSysctls of the web server's namespace are recorded as the kernel
// has them.
var shownTimeWaitSysctls = []string{
	"net.ipv4.tcp_max_tw_buckets", "net.ipv4.tcp_fin_timeout", "net.ipv4.tcp_tw_reuse", "net.ipv4.tcp_max_syn_backlog", "net.ipv4.ip_local_port_range",
}

// Measure implements [Experiment].
func (w *timeWait) Measure(ctx context.Context, lab *netlab.Lab, opt Options, v *results.Variant) (err error) {
	if opt.server.kind != ServerMini && slices.ContainsFunc(w.legs(), func(l timeWaitLeg) bool { return l.trail > 0 }) {
		return &netlab.NeedError{Need: needMini, Err: errors.New("redis-server closes as soon as it reads a FIN, and cannot be told to be late")}
	}
	r := &timeWaitRun{w: w, v: v, opt: opt, lab: lab}
	webs := lab.Hosts()[1:]
	v.Link = webs[0].LinkKind()
	if r.target, err = opt.server.start(ctx, lab.Host("redis"), serverConfig{backlog: 4096}, opt.Log); err != nil {
		return err
	}
	defer func() { err = errors.Join(err, r.target.stop()) }()
	if v.Sysctls, err = observe.ReadSysctls(webs[0], shownTimeWaitSysctls...); err != nil {
		return err
	}
	trace, err := startTrace(webs, v)
	if err != nil {
		return err
	}
	defer trace.stop() //nolint:errcheck // the first stop, below, returned the same error
	cfg := observe.Config{Counters: lab.Hosts()}
	if w.oneLeg() {
		cfg.States, cfg.StatesEvery = webs, w.walkEvery()
	}
	giveCounters, err := opt.countersBefore(v.Name, webs...)
	if err != nil {
		return err
	}
	watch, err := observe.Start(ctx, cfg)
	if err != nil {
		return err
	}
	defer watch.Stop() //nolint:errcheck // as above
	endCapture, err := r.capture()
	if err != nil {
		return err
	}
	if err := errors.Join(r.drive(ctx), endCapture()); err != nil {
		return err
	}
	timeline, err := watch.Stop()
	if err != nil {
		return err
	}
	seen, err := trace.stop()
	if err != nil {
		return err
	}
	if err := errors.Join(opt.giveTimeline(v.Name, timeline), giveCounters()); err != nil {
		return err
	}
	return r.fill(timeline, seen)
}

// captured is the largest load whose packets are captured, all of them.
const captured = 10_000

// capture records the packets at the web server, where somebody wants them and they
// are not too many.
func (r *timeWaitRun) capture() (end func() error, err error) {
	if r.opt.Capture == nil || !r.w.oneLeg() || r.w.Closes > captured {
		return func() error { return nil }, nil
	}
	var file bytes.Buffer
	capture, err := observe.StartCapture(&file, observe.CaptureConfig{
		Points: []observe.CapturePoint{{Host: r.lab.Hosts()[1]}}, Port: redisPort,
		Comment: "connlab " + TimeWaitBuckets.Name + ", variant " + r.v.Name,
	})
	if err != nil {
		return nil, err
	}
	return func() error {
		if _, err := capture.Stop(); err != nil {
			return err
		}
		return r.opt.Capture(r.v.Name, file.Bytes())
	}, nil
}

// oneLeg says that one web server has all of the load: its sockets are counted by
// state.
func (w *timeWait) oneLeg() bool { return len(w.Trails)+len(w.Loads) == 0 }

// walkEvery is how often sockets are counted by state, which is a walk over the
// machine's whole table: 25 ms with the article's 131,072 buckets.
func (w *timeWait) walkEvery() time.Duration {
	if w.Closes < 20_000 {
		return 100 * time.Millisecond
	}
	return 250 * time.Millisecond
}

// drive runs the legs: trails one after the other, loads side by side.
func (r *timeWaitRun) drive(ctx context.Context) error {
	r.done = make([]timeWaitDone, len(r.w.legs()))
	if len(r.w.Loads) > 0 {
		if err := r.trail(r.w.Trail); err != nil {
			return err
		}
		g, ctx := errgroup.WithContext(ctx)
		for i, leg := range r.w.legs() {
			g.Go(func() (err error) {
				r.done[i], err = r.run(ctx, leg)
				return err
			})
		}
		return g.Wait()
	}
	for i, leg := range r.w.legs() {
		if err := r.trail(leg.trail); err != nil {
			return err
		}
		var err error
		if r.done[i], err = r.run(ctx, leg); err != nil {
			return err
		}
	}
	return nil
}

// trail sets how long after a client's FIN the server closes.
func (r *timeWaitRun) trail(d time.Duration) error {
	if r.target.kind != ServerMini {
		return nil // it is never late, and was not asked to be
	}
	if _, err := r.target.control.Do("CONFIG", "SET", "close-delay", d.Milliseconds()); err != nil {
		return fmt.Errorf("CONFIG SET close-delay: %w", err)
	}
	return nil
}

// run sends one leg's connections and waits until both ends are through with them.
func (r *timeWaitRun) run(ctx context.Context, leg timeWaitLeg) (timeWaitDone, error) {
	host := r.lab.Host(leg.host)
	from, closeUnused, err := sources([]*netlab.Host{host})
	if err != nil {
		return timeWaitDone{}, err
	}
	defer closeUnused()
	cfg := loadgen.Config{
		Targets: instances(r.w.Instances), Sources: from,
		Schedule: loadgen.Constant(leg.rate, time.Hour).First(leg.closes),
		Progress: &loadgen.Progress{},
	}
	switch r.w.Close {
	case closeServer:
		cfg.Request, cfg.Close = quitRequest, loadgen.Passive
	case closeReset:
		cfg.Close = loadgen.Reset
	}
	stop := every(time.Second, func() {
		s := cfg.Progress.Snapshot()
		r.opt.progress("%s: %d of %d connections closed, %d failed", leg.host, s.OK, leg.closes, s.Failed)
	})
	defer stop()
	d := timeWaitDone{timeWaitLeg: leg, began: time.Now()}
	lateness, err := r.lateness(ctx, leg)
	if err != nil {
		return d, err
	}
	d.report, err = loadgen.Run(ctx, cfg)
	d.end = time.Now()
	lateness()
	if err != nil {
		return d, err
	}
	return d, r.settle(ctx, host)
}

// lateness watches how late Redis is by itself, which adds to a trail that is to be
// shorter than a delayed ACK, until the function that it returns is called.
func (r *timeWaitRun) lateness(ctx context.Context, leg timeWaitLeg) (end func(), err error) {
	ack := ReadKernelRules().DelayedACK
	if r.w.Close != closeClient || leg.trail > ack {
		return func() {}, nil
	}
	canary, err := startCanary(ctx, r.target.host, r.target.addr, time.Second)
	if err != nil {
		return nil, err
	}
	return func() {
		slowest := canary.stop()
		r.metric("redis/Canary.Max"+leg.suffix, slowest.Seconds(), "s")
		if leg.trail+slowest >= ack {
			r.v.Void(fmt.Sprintf("the machine was too busy: Redis took %v to answer a PING, so that a trail of %v may have been longer than %v",
				slowest.Round(time.Millisecond), leg.trail, ack))
		}
	}, nil
}

// quitRequest makes any Redis close first, after its reply.
var quitRequest = []byte("*1\r\n$4\r\nQUIT\r\n")

// settle waits until Redis has closed its end of every connection of a host.
func (r *timeWaitRun) settle(ctx context.Context, web *netlab.Host) error {
	open := observe.SetOf(observe.Established, observe.CloseWait, observe.LastAck, observe.FinWait1, observe.FinWait2, observe.Closing, observe.SynRecv)
	for deadline := time.Now().Add(r.w.Trail + 10*time.Second); ; {
		sockets, err := observe.ReadSockets(r.target.host, observe.Query{States: open, LocalPort: redisPort})
		if err != nil {
			return err
		}
		left := 0
		for _, s := range sockets {
			if s.Remote.Addr() == web.Addr() {
				left++
			}
		}
		if left == 0 {
			return nil
		}
		if time.Now().After(deadline) {
			return fmt.Errorf("%d connections of %s are still open at Redis", left, web.Name())
		}
		if err := sleep(ctx, 20*time.Millisecond); err != nil {
			return err
		}
	}
}

func (r *timeWaitRun) metric(name string, value float64, unit string) {
	r.v.Metrics[name] = results.Metric{Value: value, Unit: unit}
}

func (r *timeWaitRun) fill(timeline *observe.Timeline, seen *observe.TraceReport) error {
	var resets float64
	for _, d := range r.done {
		n, err := r.fillLeg(d, timeline, seen)
		if err != nil {
			return err
		}
		resets += n
	}
	r.metric(metricOutRsts+".All", resets, "RSTs")
	peak, err := timeline.Peak("sockstat.TCP.tw", r.target.host.Name())
	if err != nil {
		return err
	}
	r.metric(metricTWServer, float64(peak.Value), "sockets")
	if seen != nil {
		if n := seen.Lost["tcp_send_reset"]; n > 0 {
			r.v.Void(fmt.Sprintf("the tracer lost %d resets", n))
		}
		r.v.Evidence = append(r.v.Evidence, stacks(seen, "tcp_send_reset")...)
	}
	if !r.w.oneLeg() {
		return nil
	}
	for _, name := range []string{"sockstat.TCP.tw", "State." + observe.FinWait1.String(), "State." + observe.FinWait2.String(), "Tcp.OutRsts"} {
		points, err := timeline.Series(name, r.done[0].host)
		if err != nil {
			return err
		}
		r.v.Series = append(r.v.Series, seriesOf("web", name, points))
	}
	return nil
}

// slowest is the part of the rate asked for that a web server must keep up: what
// is claimed of the states of its sockets has room for that.
const slowest = 0.92

// fillLeg records one leg and returns how many RSTs its host sent.
func (r *timeWaitRun) fillLeg(d timeWaitDone, timeline *observe.Timeline, seen *observe.TraceReport) (resets float64, err error) {
	if err := d.report.Balanced(); err != nil {
		return 0, err
	}
	metric := func(name string, value float64, unit string) { r.metric(name+d.suffix, value, unit) }
	metric(metricClosed, float64(d.report.OK), "closes")
	for class, n := range d.report.Failed {
		metric("web/Failed."+string(class), float64(n), "connections")
	}
	if d.report.NotStarted > 0 {
		r.v.Void(fmt.Sprintf("the generator left out %d of %d connections", d.report.NotStarted, d.report.Due))
	}
	rate := float64(d.report.Due) / d.end.Sub(d.began).Seconds()
	metric("web/Rate", rate, "connections/s")
	if d.lasts() > time.Second && rate < slowest*d.rate {
		r.v.Void(fmt.Sprintf("%s closed %.0f connections a second instead of %.0f", d.host, rate, d.rate))
	}
	deltas, err := timeline.Deltas(d.host)
	if err != nil {
		return 0, err
	}
	for counter, n := range deltas {
		if n != 0 && isCounter(counter) {
			metric("web/"+counter, float64(n), unitOf(counter))
		}
	}
	overflow, resets := float64(deltas["TcpExt.TCPTimeWaitOverflow"]), float64(deltas["Tcp.OutRsts"])
	metric(metricTWOverflow, overflow, "sockets")
	metric(metricOutRsts, resets, "RSTs")
	metric(metricRSTsApart, resets-overflow, "RSTs")
	metric(metricTWFull, overflow+float64(deltas["TcpExt.TWRecycled"]), "sockets")
	peak, err := timeline.Peak("sockstat.TCP.tw", d.host)
	if err != nil {
		return 0, err
	}
	metric(metricTWPeak, float64(peak.Value), "sockets")
	if r.w.oneLeg() {
		if err := r.fillStates(d, timeline, metric); err != nil {
			return 0, err
		}
	}
	if seen == nil {
		return resets, nil
	}
	metric(metricTraceApart, resets-float64(seen.Sum("tcp_send_reset", d.host, "")), "RSTs")
	noSocket, answers := answeredResets(seen, d.host)
	metric(metricTraceNoSock, float64(noSocket), "RSTs")
	metric(metricTraceAnswers, float64(answers), "RSTs")
	for _, stay := range seen.Stays {
		if stay.Host == d.host && (stay.State == observe.FinWait1 || stay.State == observe.FinWait2) && stay.Count > 0 {
			metric(fmt.Sprintf("web/Trace.Stay.%v-%v.Mean", stay.State, stay.Next), (stay.Total / time.Duration(stay.Count)).Seconds(), "s")
		}
	}
	return resets, nil
}

// fillStates averages the sockets that wait for an ACK and for a FIN, over the time
// in which neither the beginning nor the end of the load shows and, where the
// buckets fill, all are in use.
func (r *timeWaitRun) fillStates(d timeWaitDone, timeline *observe.Timeline, metric func(string, float64, string)) error {
	from := d.began.Add(2*d.trail + r.w.walkEvery())
	if d.closes > r.w.Buckets && r.w.Close == closeClient && !r.w.keepsSockets() {
		waiting, err := timeline.Series("sockstat.TCP.tw", d.host)
		if err != nil {
			return err
		}
		full := slices.IndexFunc(waiting, func(p observe.Point) bool { return p.Value >= int64(r.w.Buckets) })
		if full < 0 {
			return nil
		}
		from = timeline.Start().Add(waiting[full].At + 2*d.trail)
	}
	for _, m := range []struct {
		state  observe.State
		metric string
	}{{observe.FinWait1, metricFinWait1}, {observe.FinWait2, metricFinWait2}} {
		points, err := timeline.Series("State."+m.state.String(), d.host)
		if err != nil {
			return err
		}
		var sum, samples float64
		for _, p := range points {
			if at := timeline.Start().Add(p.At); at.After(from) && at.Before(d.end) {
				sum += float64(p.Value)
				samples++
			}
		}
		if samples > 0 {
			metric(m.metric, sum/samples, "sockets")
		}
	}
	return nil
}
