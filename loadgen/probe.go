package loadgen

import (
	"cmp"
	"context"
	"errors"
	"fmt"
	"math"
	"net/netip"
	"slices"
	"time"
)

// ProbeConfig says what a [Probe] does. Zero values have the defaults named
// here.
type ProbeConfig struct {
	// Targets are the instances, IPv4 address and port.
	Targets []netip.AddrPort
	// Sources are the places from which the rounds go out, in turn: all
	// connections of round r come from Sources[r mod len]. None means the
	// program's own place.
	Sources []Source
	// Rounds is how often every instance is probed, by default once.
	Rounds int
	// Interval is from the end of a round to the beginning of the next.
	Interval time.Duration
	// Rate is how many instances are first tried, and later how many
	// connections are closed, in a second; the default is 5,000. A thousand
	// SYNs at once would overflow queues that the probe is not about.
	Rate float64
	// Timeout is the time for connect(2), and again for the reply; the default
	// is 1 s.
	Timeout time.Duration
	// Retries is how often an instance that failed is tried again: at once and
	// on a new socket, while the connections to the others are still open. The
	// default is 3; a negative number means never.
	Retries int
	// OnAttempt is called for each attempt when it has ended, on the thread of
	// the run: it must not block.
	OnAttempt func(Attempt)
	// Progress, if set, counts the attempts while the probe goes on.
	Progress *Progress
}

// Attempt is one connect and, where that succeeded, one PING.
type Attempt struct {
	Round, Retry  int // both from 0; retry 0 is the first try
	Target, Local netip.AddrPort
	Class         Class
	Err           error         // why it failed, or nil
	Took          time.Duration // from connect(2) to the attempt's end
	// SharedWith are other targets to which this round has already made a
	// connection, or tried to, from the same local address and port: the
	// suspects if this attempt failed because two connections became one
	// behind a load balancer that keeps the client's address. There are at
	// most 10 of them, the earliest first.
	SharedWith []netip.AddrPort
}

// Bounds of what is kept of a round, where every attempt is from one port.
const (
	maxSharedWith = 10
	maxSuspects   = 1000
)

// Probe is a detector: in each round it connects to every target, sends PING,
// waits for the reply, and tries those that fail again. The connections that
// answered stay open until the round is over: that makes all of them
// simultaneous, as connections to so many instances are in a client that serves
// users. Then they are closed in order, and Probe waits for their peers to
// close too, for as long as Timeout beyond the time that Rate takes, so that
// the next round does not meet them. An attempt that fails is closed at once.
//
// An instance that fails is no error. When ctx is done Probe returns the report
// of the rounds so far, the last of them incomplete, together with an error that
// wraps the context's. Only where it could not begin is the report nil.
func Probe(ctx context.Context, cfg ProbeConfig) (*ProbeReport, error) {
	cfg, err := cfg.withDefaults()
	if err != nil {
		return nil, fmt.Errorf("probe: %w", err)
	}
	report := &ProbeReport{Rounds: []ProbeRound{}, Load: NewReport(), Reply: NewHistogram()}
	for number := range cfg.Rounds {
		if number > 0 {
			select {
			case <-time.After(cfg.Interval):
			case <-ctx.Done():
			}
		}
		err := context.Cause(ctx)
		if err == nil {
			err = probeRound(ctx, cfg, number, report)
		}
		if err != nil {
			return report, fmt.Errorf("probe: round %d: %w", number, err)
		}
	}
	return report, nil
}

func (cfg ProbeConfig) withDefaults() (ProbeConfig, error) {
	if cfg.Rounds < 0 || cfg.Interval < 0 {
		return cfg, errors.New("the number of rounds or the interval is negative")
	}
	cfg.Rounds = cmp.Or(cfg.Rounds, 1)
	cfg.Rate = cmp.Or(cfg.Rate, 5000)
	if !(cfg.Rate > 0 && cfg.Rate <= maxRate) {
		return cfg, fmt.Errorf("rate %v is not above 0 and at most %v", cfg.Rate, float64(maxRate))
	}
	cfg.Timeout = cmp.Or(cfg.Timeout, time.Second)
	cfg.Retries = max(cmp.Or(cfg.Retries, 3), 0)
	load, err := cfg.load().withDefaults()
	cfg.Sources = load.Sources
	return cfg, err
}

// load is what a round runs, but for who looks on.
func (cfg ProbeConfig) load() Config {
	n := len(cfg.Targets)
	return Config{
		Targets: cfg.Targets, Sources: cfg.Sources,
		Schedule:       Constant(cfg.Rate, math.MaxInt64).First(n),
		ConnectTimeout: cfg.Timeout, ReplyTimeout: cfg.Timeout,
		MaxInFlight: n, // of each instance one attempt at a time
		Progress:    cfg.Progress,
	}
}

// round is one round while it goes on. An instance is known by its index in
// the targets.
type round struct {
	cfg     ProbeConfig
	report  *ProbeRound
	reply   *Histogram
	tried   []int                    // attempts that ended, per instance
	sent    []bool                   // its attempt in flight has sent a SYN
	from    map[netip.AddrPort][]int // the instances to which a SYN was sent from each local port
	suspect map[int][]int            // of an instance without an answer its entries in report.Suspects
}

// probeRound makes one round and adds it to the report.
func probeRound(ctx context.Context, cfg ProbeConfig, number int, report *ProbeReport) error {
	source := cfg.Sources[number%len(cfg.Sources)]
	r := &round{
		cfg:     cfg,
		report:  &ProbeRound{Round: number, Source: source.Name, ProbeCounts: newProbeCounts(cfg.Retries), Suspects: []Collision{}, LostConnections: []LostConnection{}},
		reply:   report.Reply,
		tried:   make([]int, len(cfg.Targets)),
		sent:    make([]bool, len(cfg.Targets)),
		from:    map[netip.AddrPort][]int{},
		suspect: map[int][]int{},
	}
	load := cfg.load()
	load.Sources = []Source{source}
	load.OnOp = r.ended
	load.hooks = hooks{opened: r.opened, again: r.again, lost: r.lost}
	held, account, err := Hold(ctx, load)
	if account == nil {
		return err
	}
	defer held.Close()
	if err == nil {
		var left int
		left, err = r.shutdown(ctx, held)
		r.report.Unclosed = int64(left)
	} else {
		r.report.Interrupted = true
	}
	for _, tried := range r.tried {
		r.report.Instances++
		if tried == 0 {
			r.report.First[NotStarted]++
		}
	}
	r.report.Never = r.report.Instances - r.report.Attempts[OK]
	r.report.Start, r.report.End = account.Start, time.Now()
	report.Rounds = append(report.Rounds, *r.report)
	report.Load.Merge(account)
	return err
}

// closeRate is how many connections per second a round closes at least: a slow
// probe need not be slow in closing, too.
const closeRate = 2000

func (r *round) shutdown(ctx context.Context, held *Held) (left int, err error) {
	rate := max(r.cfg.Rate, closeRate)
	sending := time.Duration(float64(held.Len()) / rate * float64(time.Second))
	ctx, cancel := context.WithTimeout(ctx, sending+r.cfg.Timeout)
	defer cancel()
	return held.Shutdown(ctx, rate)
}

func (r *round) opened(op Op) {
	r.sent[op.Index] = true
	r.from[op.Local] = append(r.from[op.Local], op.Index)
}

// ended accounts for an attempt.
func (r *round) ended(op Op) {
	if op.Class == NotStarted {
		return // the run was stopped
	}
	a := Attempt{
		Round: r.report.Round, Retry: r.tried[op.Index], Target: op.Target, Local: op.Local,
		Class: op.Class, Err: op.Err, Took: op.Done - op.Started,
	}
	if r.sent[op.Index] {
		r.sent[op.Index], a.SharedWith = false, r.sharedWith(op)
	}
	r.tried[op.Index]++
	r.report.Attempts[a.Class]++
	if a.Retry == 0 {
		r.report.First[a.Class]++
	}
	if len(a.SharedWith) > 0 {
		r.report.Shared[a.Class]++
	}
	switch {
	case a.Class == OK:
		r.report.Answered[a.Retry]++
		r.reply.Record(op.Done - op.Connected)
		for _, i := range r.suspect[op.Index] {
			r.report.Suspects[i].AnsweredTo = a.Local
		}
	case a.Class != Canceled && len(a.SharedWith) > 0 && len(r.report.Suspects) < maxSuspects:
		r.suspect[op.Index] = append(r.suspect[op.Index], len(r.report.Suspects))
		r.report.Suspects = append(r.report.Suspects, Collision{Retry: a.Retry, Local: a.Local, Target: a.Target, Class: a.Class, SharedWith: a.SharedWith})
	}
	if r.cfg.OnAttempt != nil {
		r.cfg.OnAttempt(a)
	}
}

// sharedWith lists the other targets of the operation's local port.
func (r *round) sharedWith(op Op) []netip.AddrPort {
	others := []netip.AddrPort{}
	for _, index := range r.from[op.Local] {
		other := r.cfg.Targets[index]
		if other == op.Target || slices.Contains(others, other) {
			continue
		}
		if others = append(others, other); len(others) == maxSharedWith {
			break
		}
	}
	return others
}

// again says whether an instance is tried once more.
func (r *round) again(op Op) bool {
	return op.Class != Canceled && op.Class != NotStarted && r.tried[op.Index] <= r.cfg.Retries
}

func (r *round) lost(op Op, class Class) {
	r.report.Lost[class]++
	if len(r.report.LostConnections) < maxSuspects {
		r.report.LostConnections = append(r.report.LostConnections, LostConnection{Local: op.Local, Target: op.Target, Class: class, SharedWith: r.sharedWith(op)})
	}
}
