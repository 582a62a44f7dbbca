package loadgen

import (
	"cmp"
	"context"
	"errors"
	"fmt"
	"maps"
	"math/rand/v2"
	"net/netip"
	"runtime"
	"slices"
	"strings"
	"sync/atomic"
	"time"

	"golang.org/x/sys/unix"
)

// FleetConfig says what the clients of a [Fleet] are. Zero values have the
// defaults named here.
type FleetConfig struct {
	// Target is the server, IPv4 address and port.
	Target netip.AddrPort
	// Sources are local IPv4 addresses, which the clients take in turn; none
	// leaves it to the kernel. The port is connect(2)'s choice
	// (IP_BIND_ADDRESS_NO_PORT). It takes one half of
	// net.ipv4.ip_local_port_range first, and searches longer with every
	// connection to the same target once that is full: 10,000 clients per
	// address leave room in the default range.
	Sources []netip.Addr
	// Clients is how many connections are to be open, 1 to 1,000,000. Each
	// takes a descriptor.
	Clients int
	// Window is how many connects [Fleet.Fill], or PINGs [Fleet.Ping], has in
	// flight at a time, by default 128.
	Window int
	// ConnectTimeout counts from connect(2), ReplyTimeout from the open
	// connection to the reply; the defaults are 30 s. A client that gives up
	// closes as always, with FIN: where the handshake was done for the server's
	// kernel, a dead connection stays in its accept queue.
	ConnectTimeout time.Duration
	ReplyTimeout   time.Duration
	// Reconnect says when a client without connection tries again.
	Reconnect Reconnect
}

// Reconnect is a policy of clients that were cut, or whose attempt failed. The
// zero value is that of a naive one: at once, and again at once.
type Reconnect struct {
	// Spread is the time over which first attempts are spread: those of the
	// clients that wait when a storm begins come evenly, in random order, at a
	// rate of clients/Spread, whether or not the server keeps up. A client
	// that is cut later comes at a random time, uniform in [0, Spread) from its
	// own cut.
	Spread time.Duration
	// Jitter makes all first attempts come at such random times ("full jitter").
	Jitter bool
	// After failed attempt k, counted from 0, the next comes after a random
	// time, uniform in [0, min(Max, Base·2^k)]. Base 0 is at once. Max is by
	// default 30 s.
	Base, Max time.Duration
	// Unsteady is how much later each attempt comes, at random, uniform in
	// [0, Unsteady). Clients that keep their times to the microsecond keep step
	// with a server that accepts at a constant rate: the same ones find a place
	// each time.
	Unsteady time.Duration
	// Seed makes another choice of random times and order.
	Seed uint64
}

// after is the longest wait after so many failed attempts.
func (r Reconnect) after(failed uint8) time.Duration {
	limit := r.Base
	for range failed - 1 {
		if limit >= r.Max/2 {
			return r.Max
		}
		limit *= 2
	}
	return min(limit, r.Max)
}

const maxFleetClients = 1_000_000

// reservedFiles is how many descriptors are left to other things than clients.
const reservedFiles = 64

func (cfg FleetConfig) withDefaults() (FleetConfig, error) {
	policy := &cfg.Reconnect
	switch {
	case !cfg.Target.Addr().Unmap().Is4() || cfg.Target.Port() == 0:
		return cfg, fmt.Errorf("target %v is no IPv4 address and port", cfg.Target)
	case cfg.Clients < 1 || cfg.Clients > maxFleetClients:
		return cfg, fmt.Errorf("%d clients are out of range: 1 to %d", cfg.Clients, maxFleetClients)
	case cfg.Window < 0 || cfg.ConnectTimeout < 0 || cfg.ReplyTimeout < 0:
		return cfg, errors.New("a timeout or the window is negative")
	case policy.Spread < 0 || policy.Base < 0 || policy.Max < 0 || policy.Unsteady < 0:
		return cfg, errors.New("a time of the reconnect policy is negative")
	}
	for _, source := range cfg.Sources {
		if !source.Unmap().Is4() {
			return cfg, fmt.Errorf("source %v is no IPv4 address", source)
		}
	}
	cfg.Window = cmp.Or(cfg.Window, 128)
	cfg.ConnectTimeout = cmp.Or(cfg.ConnectTimeout, 30*time.Second)
	cfg.ReplyTimeout = cmp.Or(cfg.ReplyTimeout, 30*time.Second)
	policy.Max = cmp.Or(policy.Max, 30*time.Second)
	return cfg, nil
}

// checkFiles returns an error if the process may not have so many clients.
func checkFiles(clients int) error {
	var limit unix.Rlimit
	if err := unix.Getrlimit(unix.RLIMIT_NOFILE, &limit); err != nil {
		return fmt.Errorf("reading the limit of open files: %w", err)
	}
	if need := uint64(clients) + reservedFiles; limit.Cur < need {
		return fmt.Errorf("%d clients need %d open files, this process may have %d (ulimit -n): divide them among several processes", clients, need, limit.Cur)
	}
	return nil
}

// Fleet is many persistent clients of one server in little memory: some 50 bytes
// each, beside what the kernel needs. Each has a connection and is mostly silent;
// when its connection is cut, it comes back as the [Reconnect] policy says.
//
// Nothing happens in the background: a connection that ends is noticed while a
// method runs, so call [Fleet.Watch] in between. The methods are for one
// goroutine at a time, except Open. Each of Fill, Arm, Keep and Ping begins a new
// account; Storm goes on with Arm's. Where ctx is done early they return the
// account so far with an error that wraps the context's.
type Fleet struct {
	cfg     FleetConfig
	target  unix.RawSockaddrInet4
	sources []unix.RawSockaddrInet4
	poll    *sockets // its epoll instance and buffer; the connections are those of clients
	rand    *rand.Rand

	clients  []member
	due      timers // clients that wait for their next attempt
	expiry   timers // clients that wait for the server
	inFlight int    // attempts, as many as are in expiry
	open     atomic.Int64

	begin        time.Time // of all times below
	reconnecting bool      // clients that are cut, or fail, come back
	armed        bool
	storm        time.Duration // from when Recover and the series count
	replyTimeout time.Duration
	report       *FleetReport
}

// NewFleet makes the clients, none of them connected yet. The caller closes it.
func NewFleet(cfg FleetConfig) (*Fleet, error) {
	cfg, err := cfg.withDefaults()
	if err == nil {
		err = checkFiles(cfg.Clients)
	}
	if err != nil {
		return nil, fmt.Errorf("fleet: %w", err)
	}
	poll, err := newSockets()
	if err != nil {
		return nil, fmt.Errorf("fleet: %w", err)
	}
	f := &Fleet{
		cfg: cfg, target: socketAddress(cfg.Target), poll: poll,
		rand:    rand.New(rand.NewPCG(cfg.Reconnect.Seed, 0)),
		clients: make([]member, cfg.Clients), begin: time.Now(),
	}
	f.due.clients, f.expiry.clients = f.clients, f.clients
	for _, source := range cfg.Sources {
		f.sources = append(f.sources, socketAddress(netip.AddrPortFrom(source, 0)))
	}
	f.account(f.begin)
	return f, nil
}

// Open is how many clients have a connection, of which a PING was answered. It
// may be called from anywhere at any time.
func (f *Fleet) Open() int { return int(f.open.Load()) }

// Close closes all connections. It may be called twice.
func (f *Fleet) Close() {
	if f.poll == nil {
		return
	}
	for i := range f.clients {
		f.hangUp(int32(i))
	}
	f.poll.close(Graceful)
	f.poll = nil
}

// account begins a new account whose times count from start.
func (f *Fleet) account(start time.Time) {
	f.report = NewFleetReport()
	f.armed = false
	f.countFrom(start)
}

func (f *Fleet) countFrom(start time.Time) {
	f.report.Start = start
	f.storm = start.Sub(f.begin)
}

// Report is the account so far, as a copy.
func (f *Fleet) Report() *FleetReport {
	r := NewFleetReport()
	r.Merge(f.report)
	r.Clients, r.Open = int64(len(f.clients)), f.open.Load()
	r.End = time.Now()
	return r
}

// run does an action on the thread that all of it needs, and returns the account.
func (f *Fleet) run(ctx context.Context, action func() error) (*FleetReport, error) {
	if f.poll == nil {
		return nil, errors.New("fleet: it is closed")
	}
	runtime.LockOSThread()
	defer runtime.UnlockOSThread()
	restore, err := preciseTimers()
	if err != nil {
		return nil, fmt.Errorf("fleet: %w", err)
	}
	defer restore()
	unwatch, err := f.poll.wakeWhenDone(ctx)
	if err != nil {
		return nil, fmt.Errorf("fleet: %w", err)
	}
	defer unwatch()
	if err := action(); err != nil {
		return f.Report(), fmt.Errorf("fleet: %w", err)
	}
	return f.Report(), nil
}

// Fill connects every client that has no connection, at most Window at a time,
// and lets each send PING and wait for the reply. It does not try again: after a
// failure it begins no more, waits for those in flight and returns an error that
// says why, with the account.
func (f *Fleet) Fill(ctx context.Context) (*FleetReport, error) {
	f.account(time.Now())
	f.replyTimeout = f.cfg.ReplyTimeout
	return f.run(ctx, func() error {
		next := 0
		err := f.each(ctx, func() bool {
			for next < len(f.clients) && f.clients[next].phase != down {
				next++
			}
			if next == len(f.clients) || f.report.Failed.Sum()+f.report.Cut.Sum() > 0 {
				return false
			}
			f.connect(int32(next))
			return true
		})
		if err == nil && f.Open() < len(f.clients) {
			err = f.unfilled()
		}
		return err
	})
}

// unfilled says why there are clients without a connection.
func (f *Fleet) unfilled() error {
	text := fmt.Sprintf("%d of %d clients are connected", f.Open(), len(f.clients))
	if f.report.Failed.Sum() > 0 {
		text += fmt.Sprintf("; failed: %v", f.report.Failed)
	}
	if len(f.report.Causes) > 0 {
		text += fmt.Sprintf(", because of %s", strings.Join(slices.Sorted(maps.Keys(f.report.Causes)), ", "))
	}
	if f.report.Cut.Sum() > 0 {
		text += fmt.Sprintf("; cut: %v", f.report.Cut)
	}
	return errors.New(text)
}

// Ping sends PING on every open connection, at most Window at a time, and waits
// up to timeout for each reply. A connection that fails is closed, and its
// client has none until the next fill, storm or Keep.
func (f *Fleet) Ping(ctx context.Context, timeout time.Duration) (*FleetReport, error) {
	if timeout <= 0 {
		return nil, fmt.Errorf("fleet: a reply cannot be waited for %v", timeout)
	}
	f.account(time.Now())
	f.replyTimeout = timeout
	return f.run(ctx, func() error {
		next := 0
		return f.each(ctx, func() bool {
			for next < len(f.clients) && f.clients[next].phase != atRest {
				next++
			}
			if next == len(f.clients) {
				return false
			}
			f.ask(int32(next))
			next++
			return true
		})
	})
}

// Arm begins the account of a storm: connections that are cut from now on are
// counted in it.
func (f *Fleet) Arm() {
	f.account(time.Now())
	f.armed = true
}

// Storm waits until a moment of the wall clock and lets every client without a
// connection come back by the policy, until all of them have one, or for the time
// settle from that moment. What is in flight then ends as [Canceled]. Clients
// that do not get a connection are no error: the report has them, in Clients-Open.
// It needs an [Fleet.Arm] before it.
func (f *Fleet) Storm(ctx context.Context, at time.Time, settle time.Duration) (*FleetReport, error) {
	if !f.armed {
		return nil, errors.New("fleet: a storm begins with Arm")
	}
	f.armed = false
	f.countFrom(at)
	f.replyTimeout = f.cfg.ReplyTimeout
	return f.run(ctx, func() error {
		moment := f.storm
		if err := f.serve(ctx, moment, func() bool { return true }); err != nil {
			return err
		}
		defer f.settle()
		f.releaseAll(moment)
		return f.serve(ctx, moment+settle, func() bool { return f.Open() < len(f.clients) })
	})
}

// Keep lets every client that has no connection come back by the policy, from the
// moment of its own cut, until ctx is done, which is no error. Clients that have
// none now are as if cut now.
func (f *Fleet) Keep(ctx context.Context) (*FleetReport, error) {
	f.account(time.Now())
	f.replyTimeout = f.cfg.ReplyTimeout
	return f.run(ctx, func() error {
		defer f.settle()
		f.releaseAll(f.now())
		return f.untilDone(ctx)
	})
}

// Watch takes notice of connections that are cut until ctx is done, which is no
// error. Their clients stay without one.
func (f *Fleet) Watch(ctx context.Context) error {
	_, err := f.run(ctx, func() error { return f.untilDone(ctx) })
	return err
}

// untilDone serves the connections until ctx is done.
func (f *Fleet) untilDone(ctx context.Context) error {
	err := f.serve(ctx, never, func() bool { return true })
	if ctx.Err() != nil {
		return f.sweep()
	}
	return err
}
