package pool

import (
	"cmp"
	"context"
	"errors"
	"fmt"
	"net/netip"
	"slices"
	"sync"
	"syscall"
	"time"

	"golang.org/x/sys/unix"
)

// Errors of a cosocket, in the words of lua-nginx-module.
var (
	// ErrTooManyWaiting says that the pool and its backlog are full.
	ErrTooManyWaiting = errors.New("too many waiting connect operations")
	// ErrWaitTimeout says that a connect has waited in the backlog for the whole
	// connect timeout. A connection attempt that takes too long fails with the
	// error of its [Dial] instead; nginx says "timeout" to both.
	ErrWaitTimeout = errors.New("timeout")
	// ErrClosed says that the connection was kept or closed before, that its worker
	// has ended, or that a Read or Write on it has failed; from [Conn.SetKeepalive]
	// also that its peer has closed or reset it.
	ErrClosed = errors.New("closed")
	// ErrUnread says that the connection has received more than its caller has read.
	ErrUnread = errors.New("unread data in buffer")
	// ErrDubious says that a connection cannot be kept, because there is data in its
	// socket that nobody has received.
	ErrDubious = errors.New("connection in dubious state")
)

// Settings are the directives of nginx that a worker's pools start from. Zero
// values are nginx's defaults.
type Settings struct {
	// PoolSize is lua_socket_pool_size, by default 30: the size of a pool for
	// which no call has named one.
	PoolSize int
	// KeepaliveTimeout is lua_socket_keepalive_timeout, by default 60 s: how long
	// a connection stays idle. A negative value means for ever.
	KeepaliveTimeout time.Duration
	// ConnectTimeout is lua_socket_connect_timeout, by default 60 s.
	ConnectTimeout time.Duration
}

// ConnectOptions are the options of tcpsock:connect, and the connect timeout
// that the socket was given before.
type ConnectOptions struct {
	// Pool is the name of the pool; the default is the address, host:port.
	// Addresses that share a name share their connections.
	Pool string
	// PoolSize is the size of the pool, if this call creates it; 0 is not given.
	PoolSize int
	// Backlog is how many connects wait where the pool's size is reached, if this
	// call creates the pool. With nil the connections have no limit.
	Backlog *int
	// Timeout is for waiting in the backlog, and again for dialing; 0 is the
	// worker's.
	Timeout time.Duration
}

// Worker is the pools of one nginx worker process. Workers share nothing. It is
// safe for concurrent use.
type Worker struct {
	dial     Dial
	settings Settings

	mu       sync.Mutex
	pools    map[string]*connPool
	stats    Stats
	closed   bool
	watchers sync.WaitGroup
}

// connPool is struct ngx_http_lua_socket_pool_s.
type connPool struct {
	name        string
	size        int
	backlog     int       // -1: no limit
	connections int       // idle, in use, dialing and waiting, of those that are counted
	idle        []*socket // kept first, first
	waiting     []*waiter // in order of arrival
}

// waiter is a connect in the backlog.
type waiter struct {
	done   chan struct{} // closed when it may go on
	socket *socket       // what it got, or nil: it dials
	err    error         // why it fails instead
}

// NewWorker makes a worker without connections.
func NewWorker(dial Dial, s Settings) *Worker {
	s.PoolSize = cmp.Or(s.PoolSize, 30)
	s.KeepaliveTimeout = cmp.Or(s.KeepaliveTimeout, time.Minute)
	s.ConnectTimeout = cmp.Or(s.ConnectTimeout, time.Minute)
	return &Worker{dial: dial, settings: s, pools: map[string]*connPool{}}
}

// Connect is tcpsock:connect. It fails with ErrTooManyWaiting, ErrWaitTimeout,
// ErrClosed after the worker's end, the cause of a ctx that is done while it
// waits, or the error of its [Dial].
func (w *Worker) Connect(ctx context.Context, addr netip.AddrPort, o ConnectOptions) (*Conn, error) {
	backlog := -1
	if o.Backlog != nil {
		if backlog = *o.Backlog; backlog < 0 {
			return nil, fmt.Errorf(`bad "backlog" option value: %d`, backlog)
		}
	}
	if o.PoolSize < 0 {
		return nil, fmt.Errorf(`bad "pool_size" option value: %d`, o.PoolSize)
	}
	c := &Conn{worker: w, key: cmp.Or(o.Pool, addr.String())}
	timeout := cmp.Or(o.Timeout, w.settings.ConnectTimeout)
	s, turn, err := w.begin(c, o.PoolSize, backlog)
	if turn != nil {
		s, err = w.wait(ctx, turn, c.pool, timeout)
	}
	if s == nil && err == nil {
		s, err = w.open(ctx, c.pool, addr, timeout)
	}
	if err != nil {
		return nil, err
	}
	c.reused = s.ready()
	c.socket.Store(s)
	return c, nil
}

// begin finds an idle connection, or else a place for c among the connections of
// its pool, for which it may have to wait. Without any of them c is to be dialed.
func (w *Worker) begin(c *Conn, size, backlog int) (*socket, *waiter, error) {
	w.mu.Lock()
	defer w.mu.Unlock()
	if w.closed {
		return nil, nil, ErrClosed
	}
	p := w.pools[c.key]
	if p == nil {
		if size == 0 && backlog < 0 {
			return nil, nil, nil
		}
		p = w.create(c.key, cmp.Or(size, w.settings.PoolSize), backlog)
	}
	c.pool = p
	if s := w.take(p); s != nil {
		return s, nil, nil
	}
	if p.backlog >= 0 && p.connections >= p.size+p.backlog {
		w.stats.QueueFull++
		return nil, nil, ErrTooManyWaiting
	}
	p.connections++
	if p.backlog < 0 || p.connections <= p.size {
		return nil, nil, nil
	}
	w.stats.Waited++
	turn := &waiter{done: make(chan struct{})}
	p.waiting = append(p.waiting, turn)
	return nil, turn, nil
}

// wait is for a connect in the backlog. Without a socket it is to dial.
func (w *Worker) wait(ctx context.Context, turn *waiter, p *connPool, timeout time.Duration) (*socket, error) {
	timer := time.NewTimer(timeout)
	defer timer.Stop()
	var err error
	select {
	case <-turn.done:
		return turn.socket, turn.err
	case <-timer.C:
		err = ErrWaitTimeout
	case <-ctx.Done():
		err = fmt.Errorf("waiting for a connection: %w", context.Cause(ctx))
	}
	w.mu.Lock()
	defer w.mu.Unlock()
	i := slices.Index(p.waiting, turn)
	if i < 0 { // its turn has come meanwhile
		return turn.socket, turn.err
	}
	p.waiting = slices.Delete(p.waiting, i, i+1)
	p.connections--
	if errors.Is(err, ErrWaitTimeout) {
		w.stats.WaitTimeouts++
	} else {
		w.stats.WaitCanceled++
		w.resume(p) // though nothing is free (ngx_http_lua_tcp_queue_conn_op_cleanup)
	}
	return nil, err
}

// open dials. On failure it gives up the place in the pool.
func (w *Worker) open(ctx context.Context, p *connPool, addr netip.AddrPort, timeout time.Duration) (*socket, error) {
	ctx, cancel := context.WithTimeout(ctx, timeout)
	defer cancel()
	s, err := dialSocket(ctx, w.dial, addr)
	w.mu.Lock()
	defer w.mu.Unlock()
	w.stats.Dials++
	if err == nil {
		w.stats.Open++
		return s, nil
	}
	w.stats.DialErrors++
	switch {
	case p == nil:
	case failedAtOnce(err):
		// The pool stays, even empty (ngx_http_lua_socket_tcp_connect_helper).
		p.connections--
		w.resume(p)
	default:
		w.release(p)
	}
	return nil, fmt.Errorf("connecting to %s: %w", addr, err)
}

// failedAtOnce says whether connect(2) or a call before it has failed, rather
// than the handshake.
func failedAtOnce(err error) bool {
	errno, ok := errors.AsType[syscall.Errno](err)
	return ok && slices.Contains([]syscall.Errno{
		unix.EACCES, unix.EADDRNOTAVAIL, unix.EMFILE, unix.ENETUNREACH, unix.ENFILE, unix.ENOBUFS, unix.EPERM,
	}, errno)
}

// Stats returns what happened so far.
func (w *Worker) Stats() Stats {
	w.mu.Lock()
	defer w.mu.Unlock()
	return w.stats
}

// Close ends the worker: idle connections are closed, and who waits for one
// fails. Connections in use are still good to their callers, but SetKeepalive
// closes them, as in an nginx worker that is about to exit. It may be called
// twice; the error is nil.
func (w *Worker) Close() error {
	w.mu.Lock()
	w.closed = true
	for _, p := range w.pools {
		for _, turn := range p.waiting {
			turn.err = ErrClosed
			close(turn.done)
		}
		for _, s := range p.idle {
			w.end(s, &w.stats.Shutdown)
		}
		p.connections -= len(p.waiting) + len(p.idle)
		p.waiting, p.idle = nil, nil
		if p.connections == 0 {
			delete(w.pools, p.name)
		}
	}
	w.mu.Unlock()
	w.watchers.Wait()
	return nil
}

// What follows needs the worker's mutex.

func (w *Worker) create(name string, size, backlog int) *connPool {
	p := &connPool{name: name, size: size, backlog: backlog}
	w.pools[name] = p
	return p
}

// take removes the connection that was kept last.
func (w *Worker) take(p *connPool) *socket {
	last := len(p.idle) - 1
	if last < 0 {
		return nil
	}
	s := p.idle[last]
	p.idle[last] = nil
	p.idle = p.idle[:last]
	w.stats.Reuses++
	return s
}

// resume lets the first waiter go on: it gets what is idle, or else dials.
func (w *Worker) resume(p *connPool) {
	if len(p.waiting) == 0 {
		return
	}
	turn := p.waiting[0]
	p.waiting = slices.Delete(p.waiting, 0, 1)
	p.connections--
	if turn.socket = w.take(p); turn.socket == nil {
		p.connections++
	}
	close(turn.done)
}

// release is for a connection that is no more. The last one takes its pool along.
func (w *Worker) release(p *connPool) {
	p.connections--
	if p.connections == 0 {
		delete(w.pools, p.name)
		return
	}
	w.resume(p)
}

// end closes a connection and counts it in one of the ways to end.
func (w *Worker) end(s *socket, way *int64) {
	_ = s.conn.Close()
	w.stats.Open--
	*way++
}
