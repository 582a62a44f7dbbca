package pool

import (
	"errors"
	"fmt"
	"net"
	"net/netip"
	"sync"
	"time"

	redigo "github.com/gomodule/redigo/redis"
)

// batchConn is a connection of a [Batcher], with the batches whose replies it owes.
// One goroutine writes and another reads; redigo's Conn allows that.
type batchConn struct {
	conn    net.Conn
	redis   redigo.Conn
	local   netip.AddrPort
	timeout time.Duration

	// writing is held while a batch becomes one that is owed and is written: its calls
	// must not fail, and come back with another command, before write is done with them.
	writing sync.Mutex

	mu     sync.Mutex // may be locked by who has locked the Batcher's
	owed   []*batch   // oldest first; the first one's deadline is the connection's
	broken error      // why it owes nothing any more
}

func newBatchConn(t *tracked, timeout time.Duration) *batchConn {
	return &batchConn{conn: t, redis: redigo.NewConn(undated{t}, 0, 0), local: localAddress(t), timeout: timeout}
}

// undated keeps redigo, which sets the deadline for reading with each reply, from
// clearing the batch's.
type undated struct{ net.Conn }

func (undated) SetReadDeadline(time.Time) error { return nil }

func (c *batchConn) isBroken() bool {
	c.mu.Lock()
	defer c.mu.Unlock()
	return c.broken != nil
}

// owe makes b one of those whose replies will come or else fail. It says no if the
// connection is broken. The caller holds writing, for the call of write that follows.
func (c *batchConn) owe(b *batch) bool {
	c.mu.Lock()
	defer c.mu.Unlock()
	if c.broken != nil {
		return false
	}
	b.deadline = time.Now().Add(c.timeout)
	if c.owed = append(c.owed, b); len(c.owed) == 1 {
		c.setReadDeadline()
	}
	return true
}

// oldest is the batch whose replies come next, or nil.
func (c *batchConn) oldest() *batch {
	c.mu.Lock()
	defer c.mu.Unlock()
	if len(c.owed) == 0 {
		return nil
	}
	return c.owed[0]
}

// answered takes away the oldest batch.
func (c *batchConn) answered() {
	c.mu.Lock()
	defer c.mu.Unlock()
	c.owed[0] = nil
	c.owed = c.owed[1:]
	c.setReadDeadline()
}

// setReadDeadline: the caller holds mu. Its errors, of a connection that is closed,
// are those of reading too.
func (c *batchConn) setReadDeadline() {
	var t time.Time
	if len(c.owed) > 0 {
		t = c.owed[0].deadline
	}
	_ = c.conn.SetReadDeadline(t)
}

// write sends b, which was made owed. After an error nothing more is.
func (c *batchConn) write(b *batch) {
	_ = c.conn.SetWriteDeadline(b.deadline) // fails only if it is closed
	for i, call := range b.calls {
		if c.redis.Send(call.command, call.args...) != nil {
			c.close(c.redis.Err())
			return
		}
		b.written.Store(int64(i + 1)) // the end of it is still in redigo's buffer
	}
	if c.redis.Flush() != nil {
		c.close(c.redis.Err())
	}
}

// read gives the replies to those who asked, until the connection breaks. It alone
// finishes calls, so that none is finished twice.
func (c *batchConn) read() {
	var b *batch
	next := 0 // reply of b
	for {
		reply, err := c.redis.Receive()
		if err != nil {
			if _, ok := errors.AsType[redigo.Error](err); !ok {
				break
			}
		}
		if b == nil {
			b = c.oldest()
		}
		if b == nil || int64(next) == b.written.Load() {
			c.close(fmt.Errorf("%w: nothing asked for it", errBadReply))
			break
		}
		call := b.calls[next]
		b.calls[next] = nil
		call.finish(reply, err, c.local)
		if next++; next == len(b.calls) {
			c.answered()
			b, next = nil, 0
		}
	}
	c.close(c.redis.Err())
	c.writing.Lock() // it was closed: write ends, and there will be no other
	defer c.writing.Unlock()
	c.mu.Lock()
	owed, cause := c.owed, fmt.Errorf("connection broke: %w", c.broken)
	c.owed = nil
	c.mu.Unlock()
	for _, b := range owed {
		for _, call := range b.calls[next:] {
			call.finish(nil, cause, c.local)
		}
		next = 0
	}
}

// close closes the connection, and keeps the first reason given. Those who read and
// write give redigo's first error: it closes the connection itself, and what the
// other one then meets is that.
func (c *batchConn) close(cause error) {
	c.mu.Lock()
	if c.broken == nil {
		c.broken = cause
	}
	c.mu.Unlock()
	_ = c.conn.Close() // tells nothing that matters any more
}
