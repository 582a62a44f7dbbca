package pool

import (
	"cmp"
	"context"
	"errors"
	"net"
	"net/netip"
	"os"
	"sync/atomic"
	"syscall"
	"time"

	"golang.org/x/sys/unix"
)

// defaultTimeout is what each step of a call has where the configuration does not say.
const defaultTimeout = 5 * time.Second

// Account counts the connections of a [Pool] and what was done to them, whoever
// opened, used and closed them.
type Account struct {
	Dials      int64 // connections opened
	DialErrors int64 // attempts of the library to open one that failed
	Closed     int64 // connections closed from this side
	Open       int64 // those opened and not yet closed from this side

	// Connects counts connect(2), which a dial may call more than once, and
	// NoLocalPort those of them that found no local port (EADDRNOTAVAIL).
	Connects    int64
	NoLocalPort int64

	// Reads and Writes count the calls of Read and Write on connections that have
	// returned, whether they moved bytes or failed: a pipeline in one piece is one.
	Reads  int64
	Writes int64
}

// ledger opens the connections of a pool and writes down what becomes of them. Its
// zero value dials as package net does, from the program's own place.
type ledger struct {
	dial  Dial // nil: dialHere
	tries int  // calls of connect(2) for a dial that finds no local port; 0: netTries

	dials, dialErrors, closed, connects, noLocalPort, reads, writes atomic.Int64
}

// netTries is how often package net calls connect(2) for a dial that finds no local
// port: EADDRNOTAVAIL might be of one port that was taken meanwhile, so
// doDialTCPProto in net/tcpsock_posix.go tries twice more.
const netTries = 3

func (l *ledger) account() Account {
	// In this order a connection that comes and goes meanwhile is never closed
	// before it was opened.
	a := Account{
		Reads: l.reads.Load(), Writes: l.writes.Load(), Closed: l.closed.Load(), DialErrors: l.dialErrors.Load(),
		NoLocalPort: l.noLocalPort.Load(),
	}
	a.Dials = l.dials.Load()
	a.Connects = l.connects.Load()
	a.Open = a.Dials - a.Closed
	return a
}

// connect opens a connection. Its errors are dialErrors.
func (l *ledger) connect(ctx context.Context, addr netip.AddrPort) (*tracked, error) {
	c, err := l.try(ctx, addr)
	if err != nil {
		l.dialErrors.Add(1)
		return nil, &dialError{err}
	}
	l.dials.Add(1)
	return &tracked{Conn: c, ledger: l}, nil
}

func (l *ledger) try(ctx context.Context, addr netip.AddrPort) (c net.Conn, err error) {
	dial := l.dial
	if dial == nil {
		dial = dialHere
	}
	for range cmp.Or(l.tries, netTries) {
		if ctx.Err() != nil {
			return nil, ctx.Err()
		}
		c, err = dial(ctx, addr)
		if call, ok := errors.AsType[*os.SyscallError](err); ok && (call.Syscall == "socket" || call.Syscall == "bind") {
			return nil, err // it did not come to connect(2)
		}
		l.connects.Add(1)
		if !errors.Is(err, unix.EADDRNOTAVAIL) {
			return c, err
		}
		l.noLocalPort.Add(1)
	}
	return nil, err
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

func (c *tracked) Read(b []byte) (int, error) {
	n, err := c.Conn.Read(b)
	c.ledger.reads.Add(1)
	return n, err
}

func (c *tracked) Write(b []byte) (int, error) {
	n, err := c.Conn.Write(b)
	c.ledger.writes.Add(1)
	return n, err
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
