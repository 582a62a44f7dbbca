package server

import (
	"container/list"
	"context"
	"errors"
	"fmt"
	"net/netip"
	"runtime"
	"sync"
	"sync/atomic"
	"time"

	"golang.org/x/sys/unix"

	"connlab/server/resp"
)

// Server is a listening server. [New] makes it, Serve runs it, Close ends it. Everything but Close and Addr belongs to
// the thread of the loop.
type Server struct {
	cfg       Config
	limits    resp.Limits
	somaxconn int
	warnings  []string

	addr     netip.AddrPort
	listenFD int
	wakeFD   int // eventfd, written by Close
	poll     *poller
	readBuf  []byte

	mu      sync.Mutex // guards state, so that Close does not write to a descriptor already given back
	state   state
	closing atomic.Bool

	control *client   // of a worker: the connection to its supervisor, which is not among clients; nil: no worker
	byFD    []*client // index: descriptor
	clients []*client // dense, in no order
	pending []*client // have replies to write before the next wait
	doomed  []*client // to be closed at the end of the cycle
	leaving list.List // of *client: have sent FIN and wait for CloseDelay, in that order
	held    heldClients
	nextID  int64
	parser  resp.Parser // of clients that are not in the middle of a request

	station     station
	heldReplies int
	toServe     bool // the read being served holds a command that is no control command

	clock    clock
	commands map[string]*command
	delayAll time.Duration
	keys     keyspace
	slowlog  slowlog
	stall    stallState
	accept   acceptState
	tokens   bucket // of AcceptRate
	stats    stats

	nextCron     time.Duration // of the clock
	cronClient   int           // where the rotation over clients goes on
	clientMemory int64         // buffers of all clients, as of the last cron
}

// state is where a server is in its life.
type state int

const (
	made state = iota
	serving
	closed
)

// clock is the loop's time. Reading it costs as much as parsing a request, so it is read after each wait, after each
// command and after each event without one. A command thus lasts from the end of what came before it, and the first from a
// client includes the reading of its request.
type clock struct {
	base time.Time     // start of the server
	now  time.Duration // monotonic, since base
	wall time.Duration // what to add for Unix time; set anew in each cron, as the system's clock may be set
}

func (c *clock) tick() time.Duration {
	c.now = time.Since(c.base)
	return c.now
}

func (c *clock) syncWall() { c.wall = time.Duration(time.Now().UnixNano()) - c.tick() }

// unixMilli is the time of the last tick.
func (c *clock) unixMilli() int64 { return int64((c.wall + c.now) / time.Millisecond) }

// stats is what INFO reports.
type stats struct {
	connections, rejected, acceptErrors     int64
	commands, cycles, reads, writes, errors int64
	netIn, netOut                           int64
	expired, hits, misses                   int64
	closes                                  [byServer + 1]int64 // index: closer
	queryLimit, outputLimit, protocolErrors int64
	opsPerSec                               int64
	opsSampledAt                            time.Duration
	opsSampled                              int64
	peakMemory                              int64

	requests, releases          int64 // reads with a command; holds that ended
	requestWait, requestWaitMax time.Duration
	releaseLate, releaseLateMax time.Duration
}

const readSize = 16 << 10 // PROTO_IOBUF_LEN

// New makes a server that listens: from its return on the kernel completes connections, which wait for Serve. The
// network namespace is that of the calling thread. An address in use is reported as [unix.EADDRINUSE], wrapped.
func New(cfg Config) (*Server, error) {
	if err := cfg.validate(); err != nil {
		return nil, err
	}
	at, err := cfg.addrPort()
	if err != nil {
		return nil, err
	}
	fd, bound, err := listen(at, cfg.Backlog, cfg.KeepAlive)
	if err != nil {
		return nil, err
	}
	return newServer(cfg, fd, bound)
}

// newServer makes a server of a listening socket, which it takes over.
func newServer(cfg Config, listenFD int, addr netip.AddrPort) (_ *Server, err error) {
	s := &Server{cfg: cfg, addr: addr, listenFD: listenFD, wakeFD: -1, poll: &poller{fd: -1}, readBuf: make([]byte, readSize), nextID: 1}
	defer func() {
		if err != nil {
			s.release()
		}
	}()
	if s.somaxconn, err = somaxconn(); err != nil {
		return nil, err
	}
	if w := backlogWarning(cfg.Backlog, s.somaxconn); w != "" {
		s.warnings = append(s.warnings, w)
	}
	s.commands = index(commandTable())
	s.keys.init()
	s.clock.base = time.Now()
	s.clock.syncWall()
	p, err := newPoller(eventsFor(cfg.MaxClients))
	if err != nil {
		return nil, err
	}
	s.poll = p
	if s.wakeFD, err = unix.Eventfd(0, unix.EFD_NONBLOCK|unix.EFD_CLOEXEC); err != nil {
		return nil, fmt.Errorf("creating an eventfd: %w", err)
	}
	if err := s.poll.add(s.wakeFD, unix.EPOLLIN); err != nil {
		return nil, fmt.Errorf("adding an eventfd to epoll: %w", err)
	}
	if err := s.startAccepting(); err != nil {
		return nil, err
	}
	s.cfg.Addr = s.addr.String()
	s.configChanged()
	return s, nil
}

// backlogWarning says what is wrong with a backlog, or nothing if it is not.
func backlogWarning(backlog, somaxconn int) string {
	if backlog <= somaxconn {
		return ""
	}
	return fmt.Sprintf("the backlog of %d cannot be enforced: net.core.somaxconn is %d here; raise it (sysctl net.core.somaxconn=%d) and start again", backlog, somaxconn, backlog)
}

// eventsFor returns how many events one wait must be able to report: every client, the listener, the wake-up and a
// worker's control connection.
func eventsFor(maxClients int) int { return min(maxClients, 1<<20) + 3 }

// Addr returns the address that the server listens on, with the port that the kernel chose.
func (s *Server) Addr() netip.AddrPort { return s.addr }

// Warnings returns what is not as asked but does not keep the server from running: a backlog above somaxconn.
func (s *Server) Warnings() []string { return s.warnings }

// Serve runs the loop on the calling goroutine, with its thread locked, until ctx is done or Close is called; it
// then closes the listener and all connections and returns nil. It can be called once.
func (s *Server) Serve(ctx context.Context) error {
	s.mu.Lock()
	if s.state != made {
		s.mu.Unlock()
		return errors.New("serving: the server was closed or is served already")
	}
	s.state = serving
	s.mu.Unlock()

	runtime.LockOSThread()
	defer runtime.UnlockOSThread()
	defer s.release()
	stop := context.AfterFunc(ctx, s.Close)
	defer stop()
	restore := fineTimers()
	defer restore()
	return s.loop()
}

// Close makes Serve return, soon: it does not wait for that. A server that was never served is closed at once. It may be
// called from any goroutine and more than once.
func (s *Server) Close() {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.closing.Store(true)
	switch s.state {
	case made:
		s.releaseLocked()
	case serving:
		one := [8]byte{1}
		_, _ = unix.Write(s.wakeFD, one[:]) // can only fail if it was written 2^64-1 times
	}
}

func (s *Server) release() {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.releaseLocked()
}

func (s *Server) releaseLocked() {
	s.state = closed
	for _, c := range s.clients {
		unix.Close(c.fd)
	}
	if s.control != nil {
		unix.Close(s.control.fd)
	}
	s.clients, s.byFD, s.control = nil, nil, nil
	for _, fd := range []int{s.listenFD, s.wakeFD, s.poll.fd} {
		if fd >= 0 {
			unix.Close(fd)
		}
	}
	s.listenFD, s.wakeFD, s.poll.fd = -1, -1, -1
}

// fineTimers lets sleeps of the calling thread end on time, to the microsecond, instead of up to 50 µs late
// (PR_SET_TIMERSLACK); a delay of some microseconds per command would be meaningless otherwise.
func fineTimers() (restore func()) {
	before, err := unix.PrctlRetInt(unix.PR_GET_TIMERSLACK, 0, 0, 0, 0)
	if err != nil {
		return func() {}
	}
	_ = unix.Prctl(unix.PR_SET_TIMERSLACK, 1, 0, 0, 0)
	return func() { _ = unix.Prctl(unix.PR_SET_TIMERSLACK, uintptr(before), 0, 0, 0) }
}

// configChanged carries over what settings mean outside of cfg.
func (s *Server) configChanged() {
	s.limits = resp.Limits{MaxBulk: s.cfg.MaxBulk, MaxArgs: s.cfg.MaxArgs, MaxInline: resp.DefaultLimits().MaxInline}
	if n := eventsFor(s.cfg.MaxClients); n > len(s.poll.events) {
		s.poll.events = make([]unix.EpollEvent, n)
	}
	s.slowlog.trim(s.cfg.SlowlogMaxLen)
	s.station.setRate(s.cfg.MaxRequestRate)
	s.tokens.setRate(s.cfg.AcceptRate, s.clock.now)
	s.nextCron = min(s.nextCron, s.clock.now+s.cronPeriod())
}

func (s *Server) cronPeriod() time.Duration { return time.Second / time.Duration(s.cfg.Hz) }
