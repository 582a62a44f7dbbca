package loadgen

import (
	"context"
	"errors"
	"fmt"
	"maps"
	"math"
	"sync"
	"sync/atomic"
)

// Held is a set of open connections without traffic. It serves one run at a
// time; Len and Lost may be called at any time, from anywhere.
type Held struct {
	running atomic.Bool
	mu      sync.Mutex // held by a run, a look at the connections, or Close
	s       *sockets
	style   CloseStyle
	closed  bool
}

// Hold is [Run], except that it keeps the connection of each operation that
// ends ok: after one request and its reply, or with ConnectOnly without having
// sent anything. The latter shows clients who only believe they are connected.
// The report says how many were opened, and why others were not.
//
// Held is nil only where the report is. The caller closes it.
func Hold(ctx context.Context, cfg Config) (*Held, *Report, error) {
	if cfg.Held != nil {
		return nil, nil, errors.New("load: Hold opens connections, it takes none")
	}
	if cfg.Close == Passive {
		return nil, nil, fmt.Errorf("load: %w", errPassive)
	}
	cfg, err := cfg.withDefaults()
	if err != nil {
		return nil, nil, fmt.Errorf("load: %w", err)
	}
	s, err := newSockets()
	if err != nil {
		return nil, nil, fmt.Errorf("load: %w", err)
	}
	s.onLost = cfg.hooks.lost
	held := &Held{s: s, style: cfg.Close}
	report, err := newEngine(cfg, s, true).run(ctx)
	if report == nil {
		held.Close()
		return nil, nil, err
	}
	return held, report, err
}

// run is Run over the held connections.
func (h *Held) run(ctx context.Context, cfg Config) (*Report, error) {
	if !h.running.CompareAndSwap(false, true) {
		return nil, errors.New("load: the held connections are in use by another run")
	}
	defer h.running.Store(false)
	h.mu.Lock() // Len or Lost may be looking, but only for a moment
	defer h.mu.Unlock()
	if h.closed {
		return nil, errors.New("load: the held connections are closed")
	}
	cfg, err := cfg.withDefaults()
	if err != nil {
		return nil, fmt.Errorf("load: %w", err)
	}
	cfg.Close = h.style
	return newEngine(cfg, h.s, true).run(ctx)
}

// look takes notice of what happened to idle connections, unless a run does
// that already.
func (h *Held) look() {
	if h.mu.TryLock() {
		defer h.mu.Unlock()
		if !h.closed {
			// The one thing that can fail is a wait on a valid epoll instance.
			_ = h.s.sweep()
		}
	}
}

// Len is the number of connections that are open, idle or not.
func (h *Held) Len() int {
	h.look()
	return int(h.s.open.Load())
}

// Lost counts the connections that ended while they were idle: EOF where the
// server closed, ReadReset where it reset, BadReply where it sent something
// unasked. Those that failed during an operation are in that run's report.
func (h *Held) Lost() Counts {
	h.look()
	h.s.lostMu.Lock()
	defer h.s.lostMu.Unlock()
	return maps.Clone(h.s.lost)
}

// Shutdown closes all connections in order: it sends FIN on each, at most rate
// a second, and waits until its peer has sent one too. When ctx is done it waits
// no longer, and closes the rest as [Held.Close] does. It returns the number of
// those: their peers may still have them. A rate that is not positive is an error.
func (h *Held) Shutdown(ctx context.Context, rate float64) (left int, err error) {
	if !(rate > 0) {
		return 0, fmt.Errorf("load: connections cannot be closed at a rate of %v", rate)
	}
	h.mu.Lock()
	defer h.mu.Unlock()
	if h.closed {
		return 0, nil
	}
	h.closed = true
	defer h.s.close(h.style)
	if err := h.s.sweep(); err != nil {
		return h.s.count(), fmt.Errorf("load: %w", err)
	}
	left, err = h.s.hangUp(ctx, Constant(min(rate, maxRate), math.MaxInt64).First(h.s.count()))
	if err != nil {
		return left, fmt.Errorf("load: %w", err)
	}
	return left, nil
}

// Close closes all connections, in the style of the run that opened them. It
// waits for a run that uses them to end. It may be called twice.
func (h *Held) Close() {
	h.mu.Lock()
	defer h.mu.Unlock()
	if !h.closed {
		h.closed = true
		h.s.close(h.style)
	}
}
