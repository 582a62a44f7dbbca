package pool

import (
	"context"
	"errors"
	"fmt"
	"net/netip"

	redigo "github.com/gomodule/redigo/redis"
	goredis "github.com/redis/go-redis/v9"

	"connlab/loadgen"
)

// Kind is what a caller does with its connection when it is done.
type Kind int

const (
	// Keeps gives it back to the pool.
	Keeps Kind = iota
	// Closes closes it.
	Closes
)

// String is "keeps" or "closes".
func (k Kind) String() string {
	switch k {
	case Keeps:
		return "keeps"
	case Closes:
		return "closes"
	}
	return fmt.Sprintf("Kind(%d)", int(k))
}

// Pool is a library's way to connections, for callers of both kinds. It may be
// used from many goroutines.
type Pool interface {
	// Get begins a call to the server at addr. Whether it already waits for a
	// connection, or the lease's first Ping does, is the library's way.
	Get(ctx context.Context, kind Kind, addr netip.AddrPort) (Lease, error)
	// Account counts the connections so far.
	Account() Account
	// Close closes the idle connections and ends what the library does in the
	// background. No call may be on its way.
	Close() error
}

// Lease is a connection in the hands of one caller. It is for one goroutine.
type Lease interface {
	// Ping sends one request and waits for its reply.
	Ping(ctx context.Context) error
	// Use says which connection it is. It is the zero value where there was none,
	// and known for certain only after Ping.
	Use() Use
	// Return ends the call in the way of its kind. A connection that failed is
	// closed. An error says that a connection which was to be kept is not.
	Return() error
}

// Use says which connection a call had.
type Use struct {
	// Dialed says that no call had it before: it was opened for this one, or in
	// advance by MinIdleConns.
	Dialed bool
	Reused int // number of calls that had it before
	// Shared says that the connection carried requests of other calls at the same
	// time; Dialed and Reused then say nothing.
	Shared bool
	Local  netip.AddrPort // its own address and port; not valid if there was no connection
}

// errNoTurn is for a library that says no more than that the context is done.
var errNoTurn = errors.New("no connection of the pool became free in time")

var errBadReply = errors.New("bad reply")

// classify names the column of a failed call.
func classify(err error) loadgen.Class {
	if _, ok := errors.AsType[*dialError](err); ok {
		return loadgen.ConnectClass(err)
	}
	switch {
	case errors.Is(err, redigo.ErrPoolExhausted), errors.Is(err, goredis.ErrPoolExhausted), errors.Is(err, ErrTooManyWaiting):
		return loadgen.PoolExhausted
	case errors.Is(err, errNoTurn), errors.Is(err, goredis.ErrPoolTimeout), errors.Is(err, ErrWaitTimeout):
		return loadgen.PoolTimeout
	case errors.Is(err, errBadReply):
		return loadgen.BadReply
	}
	return loadgen.ReplyClass(err)
}
