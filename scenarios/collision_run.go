package scenarios

import (
	"context"
	"errors"
	"fmt"
	"net/netip"
	"slices"
	"sync"
	"sync/atomic"
	"time"

	"golang.org/x/sync/errgroup"

	"connlab/loadgen"
	"connlab/netlab"
	"connlab/netlab/l4lb"
	"connlab/netlab/observe"
	"connlab/results"
)

// collisionRun is one arm while it is measured.
type collisionRun struct {
	c         *collision
	v         *results.Variant
	opt       Options
	detectors []*netlab.Host
	proxies   []*netlab.Host
	start     time.Time

	mu       sync.Mutex
	attempts []attempt
	later    loadgen.Counts // of requests over connections that stay open
	over     atomic.Int64   // rounds

}

// attempt is one connection of a detector, or one try at it.
type attempt struct {
	loadgen.Attempt
	round int // over all sizes, and so by which detector
	size  int // how many instances the round probed
}

// Measure implements [Experiment].
func (c *collision) Measure(ctx context.Context, lab *netlab.Lab, opt Options, v *results.Variant) error {
	r := &collisionRun{c: c, v: v, opt: opt, detectors: c.probing(lab), proxies: c.proxied(lab), later: loadgen.Counts{}}
	v.Link = lab.Host("redis").LinkKind()
	if len(r.proxies) > 0 {
		v.Link = r.proxies[0].LinkKind()
	}
	if c.Ports == portsRange && ReadKernelRules().RangePortStep == 0 {
		return &netlab.NeedError{Need: "IP_LOCAL_PORT_RANGE", Err: netlab.ErrUnsupported}
	}
	opt.progress("starting the instances and %d proxies at %d addresses", len(r.proxies), c.Proxies)
	t, err := c.startPrograms(ctx, lab, opt)
	if err != nil {
		return err
	}
	defer t.control.Close()
	if v.Sysctls, err = observe.ReadSysctls(r.detectors[0], "net.ipv4.ip_local_port_range", "net.ipv4.tcp_syn_retries"); err != nil {
		return err
	}
	// It takes the same way as the detectors' connections, and none of theirs can
	// collide with it, since it comes from another host.
	canary, err := startCanary(ctx, lab.Host("canary"), c.target(0), c.Timeout)
	if err != nil {
		return err
	}
	defer canary.stop()
	giveCounters, err := opt.countersBefore(v.Name, r.proxies...)
	if err != nil {
		return err
	}
	watch, err := observe.Start(ctx, observe.Config{Counters: append(slices.Clone(r.proxies), lab.Host("redis"))})
	if err != nil {
		return err
	}
	defer watch.Stop() //nolint:errcheck // the first Stop, below, returned the same error
	r.start = time.Now()
	switch {
	case c.Pairs > 0:
		err = r.collide(ctx)
	case c.Long:
		err = r.stayOpen(ctx)
	default:
		err = r.probe(ctx)
	}
	if err != nil {
		return err
	}
	slowest := canary.stop()
	r.metric("lab/Canary.Max", slowest.Seconds(), "s")
	if slowest > c.Timeout/2 {
		v.Void(fmt.Sprintf("the machine was too busy: over a connection that nothing collides with, a PING took %v, more than half the timeout of %v",
			slowest.Round(time.Millisecond), c.Timeout))
	}
	timeline, err := watch.Stop()
	if err != nil {
		return err
	}
	if err := errors.Join(opt.giveTimeline(v.Name, timeline), giveCounters()); err != nil {
		return err
	}
	if c.Path == pathKernelNAT {
		moved, byMoved, err := movedPorts(lab.Host("balancer"))
		if err != nil {
			return err
		}
		r.metric(metricMoved, float64(moved), "connections")
		r.metric(metricMovedDiff, float64(moved-byMoved-r.shared()), "connections")
	}
	return r.fill(timeline)
}

func (r *collisionRun) metric(name string, value float64, unit string) {
	r.v.Metrics[name] = results.Metric{Value: value, Unit: unit}
}

// target is where instance i is reached.
func (c *collision) target(i int) netip.AddrPort {
	switch c.Path {
	case pathProxies:
		return proxyAddr(c.group(vip(i)))
	case pathRedis:
		return netip.AddrPortFrom(instance(i), redisPort)
	}
	return netip.AddrPortFrom(vip(i), redisPort)
}

func (c *collision) targets(n int) []netip.AddrPort {
	list := make([]netip.AddrPort, n)
	for i := range list {
		list[i] = c.target(i)
	}
	return list
}

// from is a detector as the load generator sees it, with its way to come by ports.
func (c *collision) from(h *netlab.Host) (s loadgen.Source, closeUnused func(), err error) {
	list, closeUnused, err := sources([]*netlab.Host{h})
	if err != nil {
		return loadgen.Source{}, nil, err
	}
	s = list[0]
	switch c.Ports {
	case portsBind:
		s = s.Bound(netip.AddrPortFrom(h.Addr(), 0))
	case portsRange:
		s = s.InRange(uint16(c.PortRange.low), uint16(c.PortRange.high))
	}
	return s, closeUnused, nil
}

// probe is R rounds of each size, each by a detector that has not probed before.
func (r *collisionRun) probe(ctx context.Context) error {
	type job struct{ round, size int }
	jobs := make(chan job)
	var g errgroup.Group
	outer := ctx
	ctx, cancel := context.WithCancel(ctx)
	defer cancel()
	go r.report(ctx)
	for range r.c.Parallel {
		g.Go(func() error {
			for j := range jobs {
				if err := r.round(ctx, r.detectors[j.round], j.round, j.size); err != nil {
					cancel()
					return err
				}
				r.over.Add(1)
			}
			return nil
		})
	}
	round := 0
feed:
	for _, leg := range r.c.legs() {
		for range leg.rounds {
			select {
			case jobs <- job{round, leg.instances}:
			case <-ctx.Done():
				break feed
			}
			round++
		}
	}
	close(jobs)
	return errors.Join(g.Wait(), context.Cause(outer))
}

// report says every second how far the rounds are.
func (r *collisionRun) report(ctx context.Context) {
	for tick := time.NewTicker(time.Second); ; {
		select {
		case <-ctx.Done():
			tick.Stop()
			return
		case <-tick.C:
			r.mu.Lock()
			timeouts := 0
			for _, a := range r.attempts {
				if a.Class == loadgen.ConnectTimeout {
					timeouts++
				}
			}
			attempts := len(r.attempts)
			r.mu.Unlock()
			r.opt.progress("%d of %d rounds over, %d connections so far, %d timed out", r.over.Load(), r.c.detectors(), attempts, timeouts)
		}
	}
}

func (r *collisionRun) round(ctx context.Context, h *netlab.Host, round, size int) error {
	from, closeUnused, err := r.c.from(h)
	if err != nil {
		return err
	}
	defer closeUnused()
	_, err = loadgen.Probe(ctx, loadgen.ProbeConfig{
		Targets: r.c.targets(size), Sources: []loadgen.Source{from},
		Rate: r.c.Rate, Timeout: r.c.Timeout, Retries: r.c.Retries,
		OnAttempt: func(a loadgen.Attempt) { r.add(attempt{Attempt: a, round: round, size: size}) },
	})
	return err
}

func (r *collisionRun) add(a attempt) {
	r.mu.Lock()
	r.attempts = append(r.attempts, a)
	r.mu.Unlock()
}

// stayOpen opens the connections once, trying again where one times out, and
// sends R rounds of requests over them.
func (r *collisionRun) stayOpen(ctx context.Context) error {
	var g errgroup.Group
	watched, cancel := context.WithCancel(ctx)
	defer cancel()
	go r.report(watched)
	for d, h := range r.detectors {
		g.Go(func() error {
			defer r.over.Add(1)
			from, closeUnused, err := r.c.from(h)
			if err != nil {
				return err
			}
			defer closeUnused()
			open := r.c.targets(r.c.VIPs)
			for try := 0; try <= r.c.Retries && len(open) > 0; try++ {
				var failed []netip.AddrPort
				held, _, err := loadgen.Hold(ctx, loadgen.Config{
					Targets: open, Sources: []loadgen.Source{from},
					Schedule:       loadgen.Constant(r.c.Rate, time.Hour).First(len(open)),
					ConnectTimeout: r.c.Timeout, ReplyTimeout: r.c.Timeout,
					OnOp: func(op loadgen.Op) {
						r.add(attempt{round: d, size: r.c.VIPs, Attempt: loadgen.Attempt{
							Retry: try, Target: op.Target, Local: op.Local, Class: op.Class, Err: op.Err, Took: op.Done - op.Started,
						}})
						if op.Class != loadgen.OK {
							failed = append(failed, op.Target)
						}
					},
				})
				if held != nil {
					defer held.Close()
				}
				if err != nil {
					return err
				}
				if err := r.overHeld(ctx, held); err != nil {
					return err
				}
				open = failed
			}
			return nil
		})
	}
	return g.Wait()
}

// overHeld sends R requests over each of the connections.
func (r *collisionRun) overHeld(ctx context.Context, held *loadgen.Held) error {
	if held.Len() == 0 {
		return nil
	}
	requests := held.Len() * r.c.Rounds
	rate := min(r.c.Rate, float64(held.Len())) // one a second each: surely idle again
	report, err := loadgen.Run(ctx, loadgen.Config{
		Held: held, Schedule: loadgen.Constant(rate, time.Hour).First(requests), ReplyTimeout: r.c.Timeout,
	})
	if err != nil {
		return err
	}
	r.mu.Lock()
	defer r.mu.Unlock()
	for class, n := range report.Failed {
		r.later[class] += n
	}
	r.later[loadgen.OK] += report.OK
	r.later[loadgen.NotStarted] += report.NotStarted
	return nil
}

// flow is a connection as its client sees it.
type flow struct{ local, target netip.AddrPort }

// fill turns what was seen into metrics.
func (r *collisionRun) fill(timeline *observe.Timeline) error {
	r.fillClients()
	r.fillBalancer()
	if len(r.proxies) == 0 {
		return nil
	}
	names := make([]string, len(r.proxies))
	for i, h := range r.proxies {
		names[i] = h.Name()
	}
	deltas, err := timeline.Deltas(names...)
	if err != nil {
		return err
	}
	for counter, n := range deltas {
		if n != 0 && isCounter(counter) {
			r.metric("proxies/"+counter, float64(n), unitOf(counter))
		}
	}
	for _, counter := range []string{"TcpExt.TCPSYNChallenge", "TcpExt.TCPChallengeACK", "TcpExt.ListenOverflows", "TcpExt.ListenDrops", "Tcp.EstabResets"} {
		n, printed := deltas[counter]
		if !printed {
			return fmt.Errorf("this kernel does not print %s", counter)
		}
		r.metric("proxies/"+counter, float64(n), unitOf(counter))
	}
	if syns, counted := r.v.Metrics[metricCollisionSYNs]; counted {
		r.metric(metricUnchallenged, syns.Value-float64(deltas["TcpExt.TCPSYNChallenge"]), "SYNs")
		r.metric(metricQuiet, r.v.Metrics[metricCollisions].Value-float64(deltas["TcpExt.TCPSYNChallenge"]), "connections")
	}
	if n := deltas["TcpExt.ListenOverflows"]; n > 0 {
		r.v.Void(fmt.Sprintf("%d SYNs found the accept queue of a proxy full: that is another incident", n))
	}
	for _, w := range r.c.net.wires {
		s := w.Stats()
		if n := s.AtoB.Overflowed + s.BtoA.Overflowed + s.AtoB.Refused + s.BtoA.Refused; n > 0 {
			r.v.Void(fmt.Sprintf("%d packets found a queue of the lab's own wires full", n))
		}
	}
	return nil
}

// fillClients counts what the detectors saw. Every attempt ends in one column:
// answered, timed out, without a local port, or failed in another way.
func (r *collisionRun) fillClients() {
	var probed, answered, timeouts, noPort, noPortAgain, odd, even int
	badRound := map[int]bool{}
	retries := map[int]int{}
	failed := loadgen.Counts{}
	took := loadgen.NewHistogram()
	for _, a := range r.attempts {
		if a.Retry == 0 {
			probed++
			switch port := a.Local.Port(); {
			case port == 0:
			case port%2 == 1:
				odd++
			default:
				even++
			}
		}
		switch a.Class {
		case loadgen.OK:
			answered++
			retries[a.Retry]++
			took.Record(a.Took)
		case loadgen.ConnectTimeout:
			timeouts++
			badRound[a.round] = true
		case loadgen.NoLocalPort:
			if a.Retry == 0 {
				noPort++
			} else {
				noPortAgain++
			}
		default:
			failed[a.Class]++
		}
	}
	r.metric(metricProbed, float64(probed), "instances")
	r.metric(metricAnswered, float64(answered), "instances")
	r.metric(metricUnreached, float64(probed-answered), "instances") // one that has answered is not tried again
	r.metric(metricTimedOut, float64(timeouts), "attempts")
	r.metric(metricBadRounds, float64(len(badRound)), "rounds")
	r.metric(metricOtherFailures, float64(failed.Sum()), "attempts")
	r.metric(metricNoPort, float64(noPort), "instances")
	r.metric("clients/NoLocalPort.Retries", float64(noPortAgain), "attempts")
	r.metric(metricOddPorts, float64(odd), "ports")
	r.metric(metricEvenPorts, float64(even), "ports")
	r.metric(metricShared, float64(r.shared()), "connections")
	r.metric("clients/Took.P50", took.Quantile(0.5).Seconds(), "s")
	r.metric("clients/Took.P99", took.Quantile(0.99).Seconds(), "s")
	r.metric("clients/Took.Max", took.Quantile(1).Seconds(), "s")
	for retry, n := range retries {
		r.metric(fmt.Sprintf("clients/Answered.Retry%d", retry), float64(n), "instances")
	}
	for class, n := range failed {
		r.metric("clients/Failed."+string(class), float64(n), "attempts")
	}
	if r.c.Long {
		r.metric(metricLaterOK, float64(r.later[loadgen.OK]), "requests")
		r.metric(metricLaterFailed, float64(r.later.Sum()-r.later[loadgen.OK]), "requests")
	}
}

// shared counts the connections that had the local port and the proxy of an
// earlier one of the same round.
func (r *collisionRun) shared() int {
	type tuple struct {
		local netip.AddrPort
		proxy int
	}
	n := map[tuple]int{}
	for _, a := range r.attempts {
		if a.Local.Port() != 0 && a.Class != loadgen.NoLocalPort {
			n[tuple{a.Local, r.groupOf(a.Target)}]++
		}
	}
	shared := 0
	for _, k := range n {
		shared += k - 1
	}
	return shared
}

// groupOf is which proxy a target leads to.
func (r *collisionRun) groupOf(target netip.AddrPort) int {
	if r.c.Path == pathProxies {
		return hostNumber(target.Addr()) - hostNumber(firstProxy)
	}
	return r.c.group(target.Addr())
}

// fillBalancer compares what the balancer counted with what the detectors saw,
// connection by connection.
func (r *collisionRun) fillBalancer() {
	if b := r.c.net.balancer; b != nil {
		s := b.Stats()
		r.metric(metricSYNs, float64(s.SYNs), "packets")
		r.metric(metricOptions, float64(s.OptionsAdded), "packets")
		r.metric(metricDropped, float64(s.Dropped()-s.NotTCP), "packets")
		r.metric("balancer/Packets", float64(s.Packets), "packets")
	}
	if r.c.net.returns == nil {
		return
	}
	collisions := collisionsOf(r.c.net.returns)
	balance := map[flow]int{}
	for _, a := range r.attempts {
		if a.Class == loadgen.ConnectTimeout {
			balance[flow{a.Local, a.Target}]++
		}
	}
	syns := 0
	points := []results.Point{{T: 0, V: 0}}
	for i, hit := range collisions {
		balance[flow{hit.Client, hit.Second}]--
		syns += hit.SYNs
		points = append(points, results.Point{T: hit.At.Sub(r.start).Seconds(), V: float64(i + 1)})
	}
	var unexplained, unnoticed int
	for _, n := range balance {
		unexplained += max(0, n)
		unnoticed += max(0, -n)
	}
	r.metric(metricCollisions, float64(len(collisions)), "connections")
	r.metric(metricCollisionSYNs, float64(syns), "SYNs")
	r.metric(metricUnexplained, float64(unexplained), "attempts")
	r.metric(metricUnnoticed, float64(unnoticed), "connections")
	r.v.Series = append(r.v.Series, results.NewSeries("collisions", "connections", points))
	if len(r.c.Sweep) > 0 {
		r.fillSweep(collisions)
	}
}

// fillSweep counts the collisions at each size: a detector probes one size only.
func (r *collisionRun) fillSweep(collisions []l4lb.Collision) {
	size := map[netip.Addr]int{}
	for _, a := range r.attempts {
		size[r.detectors[a.round].Addr()] = a.size
	}
	count := map[int]int{}
	for _, hit := range collisions {
		count[size[hit.Client.Addr()]]++
	}
	for _, leg := range r.c.Sweep {
		r.metric(sweepMetric(leg.instances), float64(count[leg.instances]), "connections")
	}
}

// collisionsOf are the collisions that all proxies' return paths saw, in order of
// time.
func collisionsOf(returns []*l4lb.Return) []l4lb.Collision {
	var all []l4lb.Collision
	for _, back := range returns {
		all = append(all, back.Collisions()...)
	}
	slices.SortFunc(all, func(a, b l4lb.Collision) int { return a.At.Compare(b.At) })
	return all
}

var errNoCapture = errors.New("nothing was captured")
