package pool

import (
	"fmt"
	"net"
	"slices"
	"sync/atomic"
	"time"
)

// DefaultKeepalive as the timeout of [Conn.SetKeepalive] means the worker's.
const DefaultKeepalive time.Duration = -1

// Conn is a connected cosocket: one caller's use of a connection. Read, Write
// and SetDeadline are those of net.Conn; after SetKeepalive or Close they fail
// with ErrClosed.
type Conn struct {
	worker *Worker
	key    string    // name of the pool that it is kept in
	pool   *connPool // in which it is counted, if it is
	socket atomic.Pointer[socket]
	reused int

	readFailed, writeFailed atomic.Bool
}

// Read reads into b. After an error other than a timeout the connection cannot
// be read or kept any more, and Read fails with ErrClosed.
func (c *Conn) Read(b []byte) (int, error) {
	s := c.socket.Load()
	if s == nil || c.readFailed.Load() {
		return 0, ErrClosed
	}
	n, err := s.buffer.Read(b)
	if err != nil && !isTimeout(err) {
		c.readFailed.Store(true)
	}
	return n, err
}

// Write writes b. After any error the connection cannot be written to or kept
// any more, and Write fails with ErrClosed.
func (c *Conn) Write(b []byte) (int, error) {
	s := c.socket.Load()
	if s == nil || c.writeFailed.Load() {
		return 0, ErrClosed
	}
	n, err := s.conn.Write(b)
	if err != nil {
		c.writeFailed.Store(true)
	}
	return n, err
}

// SetDeadline sets the time after which Read and Write fail.
func (c *Conn) SetDeadline(t time.Time) error {
	s := c.socket.Load()
	if s == nil {
		return ErrClosed
	}
	return s.conn.SetDeadline(t)
}

// LocalAddr is the connection's own address, and nil when it was kept or closed.
func (c *Conn) LocalAddr() net.Addr {
	if s := c.socket.Load(); s != nil {
		return s.conn.LocalAddr()
	}
	return nil
}

// ReusedTimes is tcpsock:getreusedtimes: how many callers had the connection
// before.
func (c *Conn) ReusedTimes() int { return c.reused }

// SetKeepalive is tcpsock:setkeepalive: it gives the connection back to the pool,
// for timeout at most; 0 means for ever. Size is the pool's, if this call creates
// the pool; 0 is not given.
//
// After ErrDubious the connection is closed. After any other error it is still
// the caller's, who must Close it; nginx does so at the end of the request.
// Unlike nginx, which knows what its event loop has told it, SetKeepalive asks
// the socket, and so does not keep what would be lost in the next moment.
func (c *Conn) SetKeepalive(timeout time.Duration, size int) error {
	w := c.worker
	w.mu.Lock()
	defer w.mu.Unlock()
	s := c.socket.Load()
	if s == nil {
		return ErrClosed
	}
	found := s.look()
	switch {
	case c.readFailed.Load() || c.writeFailed.Load() || found == ended:
		return ErrClosed
	case s.buffer.Buffered() > 0:
		return ErrUnread
	case w.closed:
		c.finish(s, &w.stats.Shutdown)
		return nil
	}
	p := w.pools[c.key]
	if p == nil {
		if size < 0 {
			return fmt.Errorf(`bad "pool_size" option value: %d`, size)
		}
		if size == 0 {
			size = w.settings.PoolSize
		}
		p = w.create(c.key, size, -1)
	}
	c.socket.Store(nil)
	if len(p.idle) >= p.size {
		oldest := p.idle[0]
		p.idle = slices.Delete(p.idle, 0, 1)
		w.end(oldest, &w.stats.Evicted)
		if c.pool != nil {
			p.connections--
		}
	} else if c.pool == nil {
		p.connections++
	}
	if found != quiet {
		w.end(s, &w.stats.Dubious)
		w.release(p)
		return ErrDubious
	}
	if timeout < 0 {
		timeout = w.settings.KeepaliveTimeout
	}
	s.reused = c.reused + 1
	w.stats.Kept++
	p.idle = append(p.idle, s)
	w.resume(p)
	if len(p.idle) > 0 && p.idle[len(p.idle)-1] == s {
		w.watch(p, s, timeout)
	}
	return nil
}

// Close really closes the connection.
func (c *Conn) Close() error {
	c.worker.mu.Lock()
	defer c.worker.mu.Unlock()
	s := c.socket.Load()
	if s == nil {
		return ErrClosed
	}
	c.finish(s, &c.worker.stats.Closed)
	return nil
}

// finish closes the connection in the caller's hands. It needs the worker's
// mutex.
func (c *Conn) finish(s *socket, way *int64) {
	c.socket.Store(nil)
	c.worker.end(s, way)
	if c.pool != nil {
		c.worker.release(c.pool)
	}
}
