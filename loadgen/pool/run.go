package pool

import (
	"cmp"
	"context"
	"errors"
	"fmt"
	"math/rand/v2"
	"net/netip"
	"sync"
	"sync/atomic"
	"time"

	"connlab/loadgen"
)

// Config says what a run does. Zero values have the defaults named here.
type Config struct {
	Pool Pool
	// Targets are the servers. Each caller goes to one of them at random, the same
	// in each run: by turns, two regular schedules could give one server all calls of
	// a kind.
	Targets []netip.AddrPort
	// Keeping and Closing say when callers of either kind come; nil means never.
	// The loop is open, as that of [loadgen.Run].
	Keeping, Closing loadgen.Schedule
	// Ops is how many operations each caller does, one after the other, as code in
	// the synchronous style does; the default is 1. Each is a call of its own, with a
	// connection that is taken, held and returned, and comes due when the one before it
	// has returned its own, also where that failed. When ctx is done the operations
	// that have not begun are not due. (Callers in the asynchronous style are several
	// in the schedule, due at the same moment.)
	Ops int
	// Hold is how long a caller keeps its connection beyond each reply: what else
	// a web request does.
	Hold time.Duration
	// MaxInFlight bounds the callers of both kinds that are on their way, until they
	// have returned their last connection; the default is 10,000. One due beyond it
	// is not started, with all its operations.
	MaxInFlight int
	// OnCall is called for each due call when it has ended and returned its
	// connection, also for those not started. It is not called twice at a time, and
	// must not block.
	OnCall func(Call)
	// Progress, if set, shows the account while the run goes on.
	Progress *Progress
}

// Call is one caller's use of the pool. Times are offsets from the start; zero means
// never.
type Call struct {
	Index  int // of the caller in the schedule of its kind, from 0
	Op     int // among the caller's operations, from 0
	Kind   Kind
	Target netip.AddrPort
	// Due is when the caller was due or, for its later operations, when it had
	// returned the connection before. One that is not started is due with its caller.
	Due     time.Duration
	Started time.Duration // just before the pool was asked for a connection
	Done    time.Duration // the reply was complete, or the call had failed
	Use                   // the connection that it had
	Class   loadgen.Class
	Err     error // why it failed, nil if it is OK or not started
	// NotReturned says why the connection of a caller that keeps, with its reply
	// in order, could not be given back; nil if it was. The call is OK nevertheless.
	NotReturned error
}

// Progress is the account of a run that goes on, to be read from anywhere at any
// time. The zero value is ready.
type Progress struct {
	due, started, ok, failed, notStarted atomic.Int64
}

// Snapshot reads the account. Numbers that change meanwhile may be of slightly
// different moments; InFlight is never negative.
func (p *Progress) Snapshot() loadgen.Snapshot {
	s := loadgen.Snapshot{OK: p.ok.Load(), Failed: p.failed.Load(), NotStarted: p.notStarted.Load()}
	s.Started = p.started.Load()
	s.Due = p.due.Load()
	s.InFlight = s.Started - s.OK - s.Failed
	return s
}

// Run sends the callers of both schedules to the pool, each in a goroutine of
// its own, and returns their account when the last of them has returned its
// connection. A call that fails is no error. The pool stays open.
//
// When ctx is done no more calls come due; those in flight end as soon as their
// library lets them, at the latest after the pool's timeouts, and the failed among
// them in the class [loadgen.Canceled]. Run then returns the complete report together
// with an error that wraps the context's. Only where the run could not begin is the
// report nil.
func Run(ctx context.Context, cfg Config) (*Report, error) {
	if err := cfg.check(); err != nil {
		return nil, fmt.Errorf("pool load: %w", err)
	}
	cfg.MaxInFlight = cmp.Or(cfg.MaxInFlight, 10_000)
	cfg.Ops = cmp.Or(cfg.Ops, 1)
	if cfg.Progress == nil {
		cfg.Progress = new(Progress)
	}
	r := &run{cfg: cfg, ctx: ctx, report: newReport(), start: time.Now()}
	var players sync.WaitGroup
	var played [2]error
	for kind, s := range []loadgen.Schedule{Keeps: cfg.Keeping, Closes: cfg.Closing} {
		if s != nil {
			players.Go(func() { played[kind] = r.play(Kind(kind), s) })
		}
	}
	players.Wait()
	r.callers.Wait()
	end := time.Now()
	for _, k := range []*KindReport{&r.report.Keeping, &r.report.Closing} {
		k.Load.Start, k.Load.End = r.start, end
	}
	if err := errors.Join(played[:]...); err != nil {
		return r.report, fmt.Errorf("pool load: %w", err)
	}
	return r.report, nil
}

func (cfg Config) check() error {
	switch {
	case cfg.Pool == nil:
		return errors.New("no pool")
	case len(cfg.Targets) == 0:
		return errors.New("no target")
	case cfg.Keeping == nil && cfg.Closing == nil:
		return errors.New("no schedule")
	case cfg.Hold < 0 || cfg.MaxInFlight < 0 || cfg.Ops < 0:
		return errors.New("the holding time, the limit of callers in flight or their number of operations is negative")
	}
	return nil
}

// run is one Run.
type run struct {
	cfg   Config
	ctx   context.Context // of the calls
	start time.Time

	callers  sync.WaitGroup
	inFlight atomic.Int64

	mu     sync.Mutex // of report, and held while OnCall runs
	report *Report
}

func (r *run) now() time.Duration { return time.Since(r.start) }

// play starts the callers of one kind.
func (r *run) play(kind Kind, s loadgen.Schedule) error {
	targets := rand.New(rand.NewPCG(0, uint64(kind)))
	return s.Play(r.ctx, r.start, func(index int, due time.Duration) {
		c := Call{Index: index, Kind: kind, Target: r.cfg.Targets[targets.IntN(len(r.cfg.Targets))], Due: due}
		if r.inFlight.Add(1) > int64(r.cfg.MaxInFlight) {
			r.inFlight.Add(-1)
			r.leaveOut(c)
			return
		}
		r.cfg.Progress.due.Add(1)
		r.cfg.Progress.started.Add(1)
		r.callers.Go(func() {
			r.caller(c)
			r.inFlight.Add(-1)
		})
	})
}

// leaveOut is for a caller that is not started.
func (r *run) leaveOut(c Call) {
	c.Class, c.Done = loadgen.NotStarted, r.now()
	for c.Op = range r.cfg.Ops {
		r.cfg.Progress.due.Add(1)
		r.record(c)
	}
}

// caller does the operations of one caller, of which c is the first.
func (r *run) caller(c Call) {
	for {
		next := c
		r.call(&c)
		next.Op, next.Due = c.Op+1, r.now()
		r.record(c)
		if next.Op == r.cfg.Ops || r.ctx.Err() != nil {
			return
		}
		c = next
		r.cfg.Progress.due.Add(1)
		r.cfg.Progress.started.Add(1)
	}
}

// call is what a web request does with the pool.
func (r *run) call(c *Call) {
	c.Started = r.now()
	lease, err := r.cfg.Pool.Get(r.ctx, c.Kind, c.Target)
	if err == nil {
		err = lease.Ping(r.ctx)
		c.Use = lease.Use()
	}
	c.Done = r.now()
	c.Class, c.Err = loadgen.OK, err
	if err != nil {
		if c.Class = classify(err); r.ctx.Err() != nil {
			c.Class = loadgen.Canceled
		}
	}
	if lease == nil {
		return
	}
	if err == nil {
		r.hold()
	}
	if err := lease.Return(); err != nil && c.Kind == Keeps && c.Class == loadgen.OK {
		c.NotReturned = err
	}
}

func (r *run) hold() {
	if r.cfg.Hold == 0 {
		return
	}
	t := time.NewTimer(r.cfg.Hold)
	defer t.Stop()
	select {
	case <-t.C:
	case <-r.ctx.Done():
	}
}

func (r *run) record(c Call) {
	switch c.Class {
	case loadgen.OK:
		r.cfg.Progress.ok.Add(1)
	case loadgen.NotStarted:
		r.cfg.Progress.notStarted.Add(1)
	default:
		r.cfg.Progress.failed.Add(1)
	}
	r.mu.Lock()
	defer r.mu.Unlock()
	r.report.of(c.Kind).add(c)
	if r.cfg.OnCall != nil {
		r.cfg.OnCall(c)
	}
}
