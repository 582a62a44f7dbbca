package loadgen

import (
	"context"
	"errors"
	"fmt"
	"io"
	"maps"
	"net"
	"os"
	"slices"

	"golang.org/x/sys/unix"
)

// Class is the column in which an operation ends. The strings are part of the
// record format and do not change.
type Class string

// The two classes that are no failure.
const (
	OK         Class = "ok"
	NotStarted Class = "not_started" // too many in flight, or no idle held connection
)

// The classes of failure. Which phase saw a reset depends on when it came: with
// tcp_abort_on_overflow=1, for instance, connect(2) has succeeded before the
// reset arrives, and whether connect, write or read reports it is a race.
const (
	ConnectTimeout  Class = "connect_timeout"   // no SYN-ACK within ConnectTimeout, or ETIMEDOUT
	ConnectRefused  Class = "connect_refused"   // ECONNREFUSED: RST to the SYN
	ConnectReset    Class = "connect_reset"     // ECONNRESET before the connection was seen to be open
	NoLocalPort     Class = "no_local_port"     // EADDRNOTAVAIL, or EADDRINUSE from bind
	TooManyFiles    Class = "too_many_files"    // EMFILE, ENFILE
	Unreachable     Class = "unreachable"       // ENETUNREACH, EHOSTUNREACH
	WriteReset      Class = "write_reset"       // ECONNRESET while sending the request
	WriteBrokenPipe Class = "write_broken_pipe" // EPIPE while sending the request
	ReadReset       Class = "read_reset"        // ECONNRESET while waiting for the reply, or with Passive for the close
	EOF             Class = "eof"               // the server closed before the reply was complete
	ReadTimeout     Class = "read_timeout"      // request not sent or reply not complete within ReplyTimeout, or ETIMEDOUT
	CloseTimeout    Class = "close_timeout"     // with Passive: the server did not close within ReplyTimeout of its reply
	ServerError     Class = "server_error"      // a reply that says error
	BadReply        Class = "bad_reply"         // bytes that are no reply, or that nobody asked for
	PoolExhausted   Class = "pool_exhausted"    // the client's pool had no connection, and no place in a queue for one
	PoolTimeout     Class = "pool_timeout"      // waited in vain for a connection of the client's pool
	Canceled        Class = "canceled"          // in flight when the run was canceled
	Other           Class = "other"             // any other errno; Report.Causes has its name
)

// Counts is a number of operations per class. A class that did not occur is
// absent.
type Counts map[Class]int64

// Sum is the number of operations in all classes.
func (c Counts) Sum() int64 {
	var sum int64
	for _, n := range c {
		sum += n
	}
	return sum
}

// String lists the classes by name: "eof 3, read_reset 1".
func (c Counts) String() string {
	s := ""
	for _, class := range slices.Sorted(maps.Keys(c)) {
		if s != "" {
			s += ", "
		}
		s += fmt.Sprintf("%s %d", class, c[class])
	}
	return s
}

// phase is what an operation was doing when it failed.
type phase string

const (
	opening    phase = "socket"
	connecting phase = "connect"
	writing    phase = "write"
	reading    phase = "read"
	idle       phase = "idle"
	closing    phase = "close"
)

var errTimeout = errors.New("timed out")

// ConnectClass is the class of an error from making a connection, of package net
// or an errno.
func ConnectClass(err error) Class {
	if errors.Is(err, unix.EADDRINUSE) {
		return NoLocalPort // of bind(2), which is part of a dial
	}
	return classify(connecting, err)
}

// ReplyClass is the class of an error from sending a request or waiting for its
// reply, of package net or an errno.
func ReplyClass(err error) Class {
	if op, ok := errors.AsType[*net.OpError](err); ok && op.Op == "write" {
		return classify(writing, err)
	}
	return classify(reading, err)
}

// classify names the column of a failure.
func classify(p phase, err error) Class {
	switch {
	case errors.Is(err, context.Canceled):
		return Canceled
	case errors.Is(err, errTimeout), errors.Is(err, unix.ETIMEDOUT),
		errors.Is(err, os.ErrDeadlineExceeded), errors.Is(err, context.DeadlineExceeded):
		switch p {
		case connecting:
			return ConnectTimeout
		case closing:
			return CloseTimeout
		default:
			return ReadTimeout
		}
	case errors.Is(err, unix.EADDRNOTAVAIL), p == opening && errors.Is(err, unix.EADDRINUSE):
		return NoLocalPort
	case errors.Is(err, unix.EMFILE), errors.Is(err, unix.ENFILE):
		return TooManyFiles
	case errors.Is(err, unix.ENETUNREACH), errors.Is(err, unix.EHOSTUNREACH):
		return Unreachable
	case errors.Is(err, unix.ECONNREFUSED) && p == connecting:
		return ConnectRefused
	case errors.Is(err, unix.ECONNRESET):
		switch p {
		case connecting:
			return ConnectReset
		case writing:
			return WriteReset
		default:
			return ReadReset
		}
	case errors.Is(err, unix.EPIPE) && p == writing:
		return WriteBrokenPipe
	case errors.Is(err, io.EOF):
		return EOF
	case errors.Is(err, ErrServer):
		return ServerError
	case errors.Is(err, errBadReply):
		return BadReply
	default:
		return Other
	}
}
