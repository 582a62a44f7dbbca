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
	// Targets are the servers. Each call goes to one of them at random, by Seed:
	// by turns, two regular schedules could give one server all calls of a kind.
	Targets []netip.AddrPort
	Seed    uint64
	// Keeping and Closing say when callers of either kind come; nil means never.
	// The loop is open, as that of [loadgen.Run].
	Keeping, Closing loadgen.Schedule
	// Hold is how long a caller keeps its connection beyond the reply: what else
	// a web request does.
	Hold time.Duration
	// MaxInFlight bounds the calls of both kinds that have not yet returned their
	// connections; the default is 10,000. One due beyond it is not started.
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
	Index   int // in the schedule of its kind, from 0
	Kind    Kind
	Target  netip.AddrPort
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
	if cfg.Progress == nil {
		cfg.Progress = new(Progress)
	}
	r := &run{cfg: cfg, ctx: ctx, report: NewReport(), start: time.Now()}
	var players sync.WaitGroup
	var played [2]error
	for kind, s := range []loadgen.Schedule{Keeps: cfg.Keeping, Closes: cfg.Closing} {
		if s != nil {
			players.Go(func() { played[kind] = r.play(Kind(kind), s) })
		}
	}
	players.Wait()
	r.calls.Wait()
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
	case cfg.Hold < 0 || cfg.MaxInFlight < 0:
		return errors.New("the holding time or the limit of calls in flight is negative")
	}
	return nil
}

// run is one Run.
type run struct {
	cfg   Config
	ctx   context.Context // of the calls
	start time.Time

	calls    sync.WaitGroup
	inFlight atomic.Int64

	mu     sync.Mutex // of report, and held while OnCall runs
	report *Report
}

func (r *run) now() time.Duration { return time.Since(r.start) }

// play starts the calls of one kind.
func (r *run) play(kind Kind, s loadgen.Schedule) error {
	targets := rand.New(rand.NewPCG(r.cfg.Seed, uint64(kind)))
	return s.Play(r.ctx, r.start, func(index int, due time.Duration) {
		c := Call{Index: index, Kind: kind, Target: r.cfg.Targets[targets.IntN(len(r.cfg.Targets))], Due: due}
		r.cfg.Progress.due.Add(1)
		if r.inFlight.Add(1) > int64(r.cfg.MaxInFlight) {
			r.inFlight.Add(-1)
			c.Class, c.Done = loadgen.NotStarted, r.now()
			r.record(c)
			return
		}
		r.cfg.Progress.started.Add(1)
		r.calls.Go(func() {
			r.call(&c)
			r.inFlight.Add(-1)
			r.record(c)
		})
	})
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
