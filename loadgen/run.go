package loadgen

import (
	"cmp"
	"context"
	"errors"
	"fmt"
	"net/netip"
	"sync/atomic"
	"time"
)

// CloseStyle is how an operation closes its connection.
type CloseStyle int

const (
	// Graceful sends FIN. The client closes first, so TIME_WAIT is its.
	Graceful CloseStyle = iota
	// Reset sends RST, by SO_LINGER with a time of zero. No TIME_WAIT is left.
	Reset
	// Passive waits for the server's FIN and only then sends its own. The
	// server closes first, so TIME_WAIT is the server's; it must be one that
	// closes, as `connlab server --close-after 1`. The operation is in flight
	// until then: where the server has not closed within ReplyTimeout of its
	// reply the operation ends as [CloseTimeout], where it resets as
	// [ReadReset], where it says more as [BadReply]. One that fails, in these
	// ways or before, closes as with Graceful.
	Passive
)

// Config says what a run does. Zero values have the defaults named here.
type Config struct {
	// Targets are the servers, IPv4 address and port: operation i goes to
	// Targets[i mod len].
	Targets []netip.AddrPort
	// Sources are the places from which operations start, in turn: operation
	// i starts from Sources[i mod len]. None means the program's own place.
	Sources []Source
	// Schedule says when operations are due. The run ends when the last of
	// them has ended.
	Schedule Schedule

	// Request is what an operation sends, by default the Redis command PING,
	// and Reply the rule for what comes back, by default [RESPReply].
	Request []byte
	Reply   ReplyRule
	// ConnectOnly makes an operation end, well, once its connection is open:
	// nothing is sent. It is what a prober like telnet sees.
	ConnectOnly bool

	// ConnectTimeout counts from connect(2); the default is 5 s. The kernel's
	// own limit is net.ipv4.tcp_syn_retries, about 2 minutes.
	ConnectTimeout time.Duration
	// ReplyTimeout counts from the open connection, and on a held connection
	// from the start of the operation, to the complete reply; with Passive
	// once more from there to the server's FIN. The default is 5 s.
	ReplyTimeout time.Duration
	// Close is how connections are closed, whether or not the operation
	// succeeded. Passive needs a reply to wait after and is not for
	// ConnectOnly, Held and [Hold].
	Close CloseStyle

	// Held, if set, makes operations go over these connections instead of new
	// ones: each takes the one that has been idle longest, so that they take
	// turns while the server answers. An operation that finds none idle is
	// not started. One that fails closes its connection, except by a
	// ServerError, which leaves it in order. Targets, Sources, ConnectTimeout
	// and Close are not used.
	Held *Held

	// MaxInFlight bounds the operations in flight, by default 10,000. One due
	// beyond it is not started.
	MaxInFlight int

	// OnOp is called for each due operation when it ends, also for those not
	// started, on the thread of the run: it must not block.
	OnOp func(Op)
	// Progress, if set, shows the account while the run goes on.
	Progress *Progress

	hooks hooks
}

// hooks are what [Probe] needs beyond OnOp. They may be nil, and are called on
// the thread of the run.
type hooks struct {
	opened func(Op)        // connect(2) has sent a SYN: the local port is known
	again  func(Op) bool   // says of a failed operation whether to start it once more, due at once
	lost   func(Op, Class) // a connection that Hold had kept ended while it was idle
}

// Op is one operation. Times are offsets from Report.Start; zero means never.
type Op struct {
	Index  int // in the schedule, from 0
	Source int // index in Config.Sources, or of the source a held connection came from
	// Target is the server. Only an operation that found no idle held
	// connection has none.
	Target netip.AddrPort
	// Local is the client's address and port, where it came to have one.
	Local     netip.AddrPort
	Due       time.Duration
	Started   time.Duration // just before connect(2), or before the request on a held connection
	Connected time.Duration // the connection was seen to be open; zero on a held one
	// Done is when it ended; if it is OK that is when its reply was complete,
	// with any CloseStyle: a latency is that of the reply.
	Done   time.Duration
	Closed time.Duration // the server's FIN was seen; only with Passive, and if it is OK
	Class  Class
	Err    error // why it failed, nil if it is OK or not started
}

// Progress is the account of one or several runs that go on, to be read from
// anywhere at any time. The zero value is ready; runs that share one add up.
type Progress struct {
	due, started, ok, failed, notStarted atomic.Int64
}

// Snapshot is the account at one moment.
type Snapshot struct {
	Due, Started, OK, Failed, NotStarted, InFlight int64
}

// Snapshot reads the account. Numbers that change meanwhile may be of slightly
// different moments; InFlight is never negative.
func (p *Progress) Snapshot() Snapshot {
	s := Snapshot{OK: p.ok.Load(), Failed: p.failed.Load(), NotStarted: p.notStarted.Load()}
	s.Started = p.started.Load()
	s.Due = p.due.Load()
	s.InFlight = s.Started - s.OK - s.Failed
	return s
}

// Run sends the operations of cfg.Schedule and returns their account. It locks
// its goroutine to the thread while it runs. An operation that fails is no
// error.
//
// When ctx is done, the operations in flight end in the class [Canceled], those
// overdue are not started, those not yet due are not part of the account, and
// Run returns the complete report together with an error that wraps the
// context's. Only where the run could not begin is the report nil.
func Run(ctx context.Context, cfg Config) (*Report, error) {
	if cfg.Held != nil {
		return cfg.Held.run(ctx, cfg)
	}
	cfg, err := cfg.withDefaults()
	if err != nil {
		return nil, fmt.Errorf("load: %w", err)
	}
	s, err := newSockets()
	if err != nil {
		return nil, fmt.Errorf("load: %w", err)
	}
	defer s.close(cfg.Close)
	return newEngine(cfg, s, false).run(ctx)
}

var errPassive = errors.New("the server is waited for to close after a reply on a connection of the operation's own: Passive does not go with ConnectOnly or held connections")

var ping = []byte("*1\r\n$4\r\nPING\r\n")

func (cfg Config) withDefaults() (Config, error) {
	if cfg.Schedule == nil {
		return cfg, errors.New("no schedule")
	}
	if cfg.Held == nil && len(cfg.Targets) == 0 {
		return cfg, errors.New("no target")
	}
	for _, target := range cfg.Targets {
		if !target.Addr().Unmap().Is4() || target.Port() == 0 {
			return cfg, fmt.Errorf("target %v is no IPv4 address and port", target)
		}
	}
	if cfg.Held != nil && cfg.ConnectOnly {
		return cfg, errors.New("held connections are open already: ConnectOnly does nothing")
	}
	if cfg.Close == Passive && (cfg.ConnectOnly || cfg.Held != nil) {
		return cfg, errPassive
	}
	if cfg.ConnectTimeout < 0 || cfg.ReplyTimeout < 0 || cfg.MaxInFlight < 0 {
		return cfg, errors.New("a timeout or the limit of operations in flight is negative")
	}
	for _, source := range cfg.Sources {
		if source.Socket == nil {
			return cfg, fmt.Errorf("source %q makes no sockets", source.Name)
		}
	}
	if len(cfg.Sources) == 0 {
		cfg.Sources = []Source{LocalSource("local", netip.Addr{})}
	}
	if len(cfg.Request) == 0 {
		cfg.Request = ping
	}
	if cfg.Reply == nil {
		cfg.Reply = RESPReply
	}
	if cfg.Progress == nil {
		cfg.Progress = new(Progress)
	}
	cfg.ConnectTimeout = cmp.Or(cfg.ConnectTimeout, 5*time.Second)
	cfg.ReplyTimeout = cmp.Or(cfg.ReplyTimeout, 5*time.Second)
	cfg.MaxInFlight = cmp.Or(cfg.MaxInFlight, 10_000)
	return cfg, nil
}
