package pool

import (
	"bufio"
	"context"
	"errors"
	"fmt"
	"net"
	"net/netip"
	"os"
	"slices"
	"syscall"
	"time"

	"golang.org/x/sys/unix"
)

// socket is an open connection: in the hands of one Conn after the other, and
// idle in between.
type socket struct {
	conn   net.Conn
	raw    syscall.RawConn
	buffer *bufio.Reader
	reused int           // what its next Conn says
	left   chan struct{} // closed when the watcher of the idle time is gone
}

// bufferSize is lua_socket_buffer_size, a page.
const bufferSize = 4096

func dialSocket(ctx context.Context, dial Dial, addr netip.AddrPort) (*socket, error) {
	c, err := dial(ctx, addr)
	if err != nil {
		return nil, err
	}
	var raw syscall.RawConn
	if sc, ok := c.(syscall.Conn); ok {
		raw, err = sc.SyscallConn()
	} else {
		err = errors.New("it has no descriptor")
	}
	if err != nil {
		_ = c.Close()
		return nil, fmt.Errorf("looking at a connection (%T): %w", c, err)
	}
	return &socket{conn: c, raw: raw, buffer: bufio.NewReaderSize(c, bufferSize)}, nil
}

// ready makes a socket that was taken from a pool fit for use, and says how
// often it was used before.
func (s *socket) ready() int {
	if s.left != nil {
		_ = s.conn.SetReadDeadline(time.Unix(1, 0)) // ends the wait of the watcher
		<-s.left
		s.left = nil
	}
	if s.reused > 0 {
		_ = s.conn.SetDeadline(time.Time{})
	}
	return s.reused
}

// event is what happened to a connection of which nobody wants anything.
type event int

const (
	quiet   event = iota
	ended         // FIN, RST or another error
	unasked       // data
)

// look finds out what there is to read, and leaves it there.
func (s *socket) look() event {
	found := ended
	if err := s.raw.Control(func(fd uintptr) { found = look(fd) }); err != nil {
		return ended
	}
	return found
}

// look sees FIN even where data is still before it, as nginx does by EPOLLRDHUP.
func look(fd uintptr) event {
	p := []unix.PollFd{{Fd: int32(fd), Events: unix.POLLIN | unix.POLLRDHUP}}
	for {
		n, err := unix.Poll(p, 0)
		switch {
		case errors.Is(err, unix.EINTR):
		case err != nil || p[0].Revents&^unix.POLLIN != 0:
			return ended
		case n == 0:
			return quiet
		default:
			return unasked
		}
	}
}

// watch waits beside an idle connection, for timeout at most if that is positive,
// and closes it when something happens. It needs the worker's mutex.
func (w *Worker) watch(p *connPool, s *socket, timeout time.Duration) {
	var deadline time.Time
	if timeout > 0 {
		deadline = time.Now().Add(timeout)
	}
	_ = s.conn.SetReadDeadline(deadline) // fails on a closed connection, as the wait then does
	left := make(chan struct{})
	s.left = left
	w.watchers.Go(func() {
		defer close(left)
		found := quiet
		err := s.raw.Read(func(fd uintptr) bool {
			found = look(fd)
			return found != quiet
		})
		w.mu.Lock()
		defer w.mu.Unlock()
		i := slices.Index(p.idle, s)
		if i < 0 {
			return // taken or closed
		}
		p.idle = slices.Delete(p.idle, i, i+1)
		switch {
		case isTimeout(err):
			w.end(s, &w.stats.Expired)
		case found == unasked:
			w.end(s, &w.stats.Unasked)
		default:
			w.end(s, &w.stats.ServerClosed)
		}
		w.release(p)
	})
}

func isTimeout(err error) bool { return errors.Is(err, os.ErrDeadlineExceeded) }
