package pool

import (
	"context"
	"errors"
	"net"
	"net/netip"
	"sync/atomic"
	"syscall"
	"time"
)

// defaultTimeout is what each step of a call has where the configuration does not say.
const defaultTimeout = 5 * time.Second

// Account counts the connections of a [Pool], whoever opened and closed them.
type Account struct {
	Dials      int64 // connections opened
	DialErrors int64 // attempts to open one that failed
	Closed     int64 // connections closed from this side
	Open       int64 // those opened and not yet closed from this side
}

// ledger opens the connections of a pool and writes down their end.
type ledger struct {
	dial                      Dial
	dials, dialErrors, closed atomic.Int64
}

func (l *ledger) account() Account {
	// In this order a connection that comes and goes meanwhile is never closed
	// before it was opened.
	a := Account{Closed: l.closed.Load(), DialErrors: l.dialErrors.Load()}
	a.Dials = l.dials.Load()
	a.Open = a.Dials - a.Closed
	return a
}

// connect opens a connection. Its errors are dialErrors.
func (l *ledger) connect(ctx context.Context, addr netip.AddrPort) (*tracked, error) {
	var c net.Conn
	var err error
	if l.dial != nil {
		c, err = l.dial(ctx, addr)
	} else {
		var d net.Dialer
		c, err = d.DialContext(ctx, "tcp4", addr.String())
	}
	if err != nil {
		l.dialErrors.Add(1)
		return nil, &dialError{err}
	}
	l.dials.Add(1)
	return &tracked{Conn: c, ledger: l}, nil
}

// dialError marks the error of a dial on its way through a library, which may
// add to it what it likes.
type dialError struct{ err error }

func (e *dialError) Error() string { return e.err.Error() }
func (e *dialError) Unwrap() error { return e.err }

// tracked is a connection in the ledger.
type tracked struct {
	net.Conn
	ledger *ledger
	uses   int // calls that had it; for the one that has it
	ended  atomic.Bool
}

// use notes that one more call has the connection, and says which it is.
func (c *tracked) use() Use {
	u := Use{Dialed: c.uses == 0, Reused: c.uses, Local: localAddress(c)}
	c.uses++
	return u
}

func (c *tracked) Close() error {
	err := c.Conn.Close()
	if c.ended.CompareAndSwap(false, true) {
		c.ledger.closed.Add(1)
	}
	return err
}

// SyscallConn is how pools look at an idle connection without reading from it.
func (c *tracked) SyscallConn() (syscall.RawConn, error) {
	s, ok := c.Conn.(syscall.Conn)
	if !ok {
		return nil, errors.New("the dialed connection is no socket")
	}
	return s.SyscallConn()
}

func localAddress(c interface{ LocalAddr() net.Addr }) netip.AddrPort {
	if a, ok := c.LocalAddr().(*net.TCPAddr); ok {
		return unmapped(a.AddrPort())
	}
	return netip.AddrPort{}
}

func unmapped(a netip.AddrPort) netip.AddrPort { return netip.AddrPortFrom(a.Addr().Unmap(), a.Port()) }
