package loadgen

import (
	"context"
	"fmt"
	"io"
	"net/netip"
	"os"
	"sync"
	"sync/atomic"
	"time"
	"unsafe"

	"golang.org/x/sys/unix"
)

// sockets is an epoll instance and the connections registered in it. One
// goroutine at a time works with it; the counters may be read by any.
type sockets struct {
	epoll   int
	conns   []*conn             // by slot
	free    []*conn             // slots without a connection
	idle    list                // held connections without an operation, longest idle first
	ready   [32]unix.EpollEvent // few at a time: an operation may have come due meanwhile
	scratch [64 << 10]byte

	onLost func(Op, Class) // an idle connection ended; may be nil

	noPwait2 bool // the kernel lacks epoll_pwait2 (before 5.11)

	open   atomic.Int64 // held connections that are open
	lostMu sync.Mutex
	lost   Counts // held connections that ended while idle
}

// conn is a slot for one connection at a time.
type conn struct {
	slot, generation int32 // what its events are marked with
	fd               int
	kept             bool // held beyond its operation
	phase            phase
	since            time.Duration // start of what is timed: connect, then request to reply
	op               Op
	sent             int    // bytes of the request that were sent
	reply            []byte // what came of a reply that is not complete

	list       *list
	prev, next *conn
}

// list is a queue of connections, each in at most one list at a time. Timeouts
// are constant per phase, so that a queue in order of entry is in order of
// deadline too.
type list struct{ first, last *conn }

func (c *conn) moveTo(l *list) {
	c.leave()
	c.list, c.prev = l, l.last
	if l.last == nil {
		l.first = c
	} else {
		l.last.next = c
	}
	l.last = c
}

func (c *conn) leave() {
	if c.list == nil {
		return
	}
	if c.prev == nil {
		c.list.first = c.next
	} else {
		c.prev.next = c.next
	}
	if c.next == nil {
		c.list.last = c.prev
	} else {
		c.next.prev = c.prev
	}
	c.list, c.prev, c.next = nil, nil, nil
}

func newSockets() (*sockets, error) {
	epoll, err := unix.EpollCreate1(unix.EPOLL_CLOEXEC)
	if err != nil {
		return nil, os.NewSyscallError("epoll_create1", err)
	}
	return &sockets{epoll: epoll, lost: Counts{}}, nil
}

// close closes all connections, resetting them if so asked.
func (s *sockets) close(style CloseStyle) {
	for _, c := range s.conns {
		if c.fd >= 0 {
			s.drop(c, style)
		}
	}
	_ = unix.Close(s.epoll)
}

// slot finds a place for a connection.
func (s *sockets) slot() *conn {
	if n := len(s.free); n > 0 {
		c := s.free[n-1]
		s.free = s.free[:n-1]
		return c
	}
	c := &conn{slot: int32(len(s.conns)), fd: -1}
	s.conns = append(s.conns, c)
	return c
}

// watch registers the connection, edge-triggered for all that can happen, so
// that one call does for its whole life.
func (s *sockets) watch(c *conn) unix.Errno {
	ev := unix.EpollEvent{Events: unix.EPOLLIN | unix.EPOLLOUT | unix.EPOLLRDHUP | unix.EPOLLET, Fd: c.slot, Pad: c.generation}
	_, _, errno := unix.RawSyscall6(unix.SYS_EPOLL_CTL, uintptr(s.epoll), unix.EPOLL_CTL_ADD, uintptr(c.fd), uintptr(unsafe.Pointer(&ev)), 0, 0)
	return errno
}

// drop closes the connection and frees its slot.
func (s *sockets) drop(c *conn, style CloseStyle) {
	if c.kept {
		c.kept = false
		s.open.Add(-1)
	}
	if c.fd >= 0 {
		if style == Reset {
			// With a linger time of zero close(2) sends RST (net/ipv4/tcp.c, __tcp_close).
			_ = unix.SetsockoptLinger(c.fd, unix.SOL_SOCKET, unix.SO_LINGER, &unix.Linger{Onoff: 1})
		}
		_, _, _ = unix.RawSyscall(unix.SYS_CLOSE, uintptr(c.fd), 0, 0)
	}
	c.leave()
	c.fd, c.phase = -1, ""
	c.reply = c.reply[:0]
	// An epoll registration lives as long as the open file, and a child that
	// another goroutine is just starting holds a copy until its exec. Events
	// of the old connection then still come; the generation tells them apart.
	c.generation++
	s.free = append(s.free, c)
}

// of finds the connection that an event is about, or nil if it is gone.
func (s *sockets) of(ev unix.EpollEvent) *conn {
	if ev.Fd < 0 {
		return nil
	}
	if c := s.conns[ev.Fd]; c.fd >= 0 && c.generation == ev.Pad {
		return c
	}
	return nil
}

// wait returns the events that are there after at most d.
func (s *sockets) wait(d time.Duration) ([]unix.EpollEvent, error) {
	var n uintptr
	var errno unix.Errno
	switch {
	case d <= 0:
		n, _, errno = unix.RawSyscall6(unix.SYS_EPOLL_PWAIT, uintptr(s.epoll), uintptr(unsafe.Pointer(&s.ready)), uintptr(len(s.ready)), 0, 0, 0)
	case !s.noPwait2:
		ts := unix.NsecToTimespec(int64(d))
		n, _, errno = unix.Syscall6(unix.SYS_EPOLL_PWAIT2, uintptr(s.epoll), uintptr(unsafe.Pointer(&s.ready)), uintptr(len(s.ready)), uintptr(unsafe.Pointer(&ts)), 0, 0)
		if errno == unix.ENOSYS || errno == unix.EPERM { // EPERM: forbidden by an older seccomp filter
			s.noPwait2 = true
			return s.wait(d)
		}
	default:
		ms := min((d+time.Millisecond-1)/time.Millisecond, time.Hour/time.Millisecond)
		n, _, errno = unix.Syscall6(unix.SYS_EPOLL_PWAIT, uintptr(s.epoll), uintptr(unsafe.Pointer(&s.ready)), uintptr(len(s.ready)), uintptr(ms), 0, 0)
	}
	switch errno {
	case 0:
		return s.ready[:n], nil
	case unix.EINTR:
		return nil, nil
	default:
		return nil, os.NewSyscallError("epoll_wait", errno)
	}
}

// wakeWhenDone makes a wait end when ctx is done.
func (s *sockets) wakeWhenDone(ctx context.Context) (unwatch func(), err error) {
	wake, err := unix.Eventfd(0, unix.EFD_CLOEXEC|unix.EFD_NONBLOCK)
	if err != nil {
		return nil, os.NewSyscallError("eventfd", err)
	}
	if err := unix.EpollCtl(s.epoll, unix.EPOLL_CTL_ADD, wake, &unix.EpollEvent{Events: unix.EPOLLIN | unix.EPOLLET, Fd: -1}); err != nil {
		_ = unix.Close(wake)
		return nil, os.NewSyscallError("epoll_ctl", err)
	}
	woken := make(chan struct{})
	stop := context.AfterFunc(ctx, func() {
		defer close(woken)
		_, _ = unix.Write(wake, []byte{1, 0, 0, 0, 0, 0, 0, 0})
	})
	return func() {
		if !stop() {
			<-woken // it must not write to a descriptor that is another's by then
		}
		_ = unix.EpollCtl(s.epoll, unix.EPOLL_CTL_DEL, wake, nil)
		_ = unix.Close(wake)
	}, nil
}

// park makes a connection without an operation wait for the next one.
func (s *sockets) park(c *conn) {
	c.phase = idle
	c.moveTo(&s.idle)
	if !c.kept {
		c.kept = true
		s.open.Add(1)
	}
}

// idleEvent deals with an event on an idle connection. Nobody has asked
// anything, so whatever can be read means that the connection is lost.
func (s *sockets) idleEvent(c *conn) {
	n, errno := receive(c.fd, s.scratch[:])
	var err error = errno
	switch {
	case errno == unix.EAGAIN:
		return
	case errno == 0 && n == 0:
		err = io.EOF
	case errno == 0:
		err = errBadReply
	}
	class := classify(idle, err)
	s.lostMu.Lock()
	s.lost[class]++
	s.lostMu.Unlock()
	if s.onLost != nil {
		s.onLost(c.op, class)
	}
	s.drop(c, Graceful)
}

// sweep looks at what happened to idle connections.
func (s *sockets) sweep() error {
	for {
		events, err := s.wait(0)
		if err != nil {
			return err
		}
		for _, ev := range events {
			if c := s.of(ev); c != nil {
				s.idleEvent(c)
			}
		}
		if len(events) < len(s.ready) {
			return nil
		}
	}
}

// hangUp sends FIN on the idle connections when they are due by the schedule,
// and waits until the peer of each has closed too, or ctx is done. It returns
// the number of connections for which that did not happen.
func (s *sockets) hangUp(ctx context.Context, schedule Schedule) (left int, err error) {
	unwatch, err := s.wakeWhenDone(ctx)
	if err != nil {
		return s.count(), err
	}
	defer unwatch()
	start := time.Now()
	for due := range schedule {
		for now := time.Since(start); now < due && ctx.Err() == nil; now = time.Since(start) {
			if err := s.awaitEnds(due - now); err != nil {
				return s.count(), err
			}
		}
		c := s.idle.first
		if c == nil || ctx.Err() != nil {
			break
		}
		c.leave()
		c.phase = closing
		if unix.Shutdown(c.fd, unix.SHUT_WR) != nil {
			s.drop(c, Graceful) // reset meanwhile
		}
	}
	for s.count() > 0 && ctx.Err() == nil {
		if err := s.awaitEnds(never); err != nil {
			return s.count(), err
		}
	}
	return s.count(), nil
}

// count is the number of open connections, all of which are held.
func (s *sockets) count() int { return int(s.open.Load()) }

// awaitEnds drops the connections of which the peer's end comes within d, and
// whatever else comes of those that are closing.
func (s *sockets) awaitEnds(d time.Duration) error {
	events, err := s.wait(d)
	for _, ev := range events {
		c := s.of(ev)
		switch {
		case c == nil:
		case c.phase == idle:
			s.idleEvent(c)
		default:
			s.drain(c)
		}
	}
	return err
}

// drain reads what is there, and drops the connection where that is its end.
func (s *sockets) drain(c *conn) {
	for {
		switch n, errno := receive(c.fd, s.scratch[:]); {
		case errno == unix.EAGAIN:
			return
		case errno != 0 || n == 0:
			s.drop(c, Graceful)
			return
		}
	}
}

// The calls below do not block on a non-blocking socket.

func connect(fd int, to *unix.RawSockaddrInet4) unix.Errno {
	_, _, errno := unix.RawSyscall(unix.SYS_CONNECT, uintptr(fd), uintptr(unsafe.Pointer(to)), unix.SizeofSockaddrInet4)
	return errno
}

func send(fd int, b []byte) (int, unix.Errno) {
	n, _, errno := unix.RawSyscall6(unix.SYS_SENDTO, uintptr(fd), uintptr(unsafe.Pointer(unsafe.SliceData(b))), uintptr(len(b)), unix.MSG_NOSIGNAL, 0, 0)
	return int(n), errno
}

func receive(fd int, b []byte) (int, unix.Errno) {
	n, _, errno := unix.RawSyscall(unix.SYS_READ, uintptr(fd), uintptr(unsafe.Pointer(unsafe.SliceData(b))), uintptr(len(b)))
	return int(n), errno
}

// socketError fetches and clears the error that epoll has announced.
func socketError(fd int) unix.Errno {
	value, err := unix.GetsockoptInt(fd, unix.SOL_SOCKET, unix.SO_ERROR)
	if err != nil {
		return unix.EBADF
	}
	return unix.Errno(value)
}

func localAddress(fd int) netip.AddrPort {
	var sa unix.RawSockaddrInet4
	size := uint32(unix.SizeofSockaddrInet4)
	_, _, errno := unix.RawSyscall(unix.SYS_GETSOCKNAME, uintptr(fd), uintptr(unsafe.Pointer(&sa)), uintptr(unsafe.Pointer(&size)))
	if errno != 0 {
		return netip.AddrPort{}
	}
	return netip.AddrPortFrom(netip.AddrFrom4(sa.Addr), networkOrder(sa.Port))
}

func socketAddress(to netip.AddrPort) unix.RawSockaddrInet4 {
	return unix.RawSockaddrInet4{Family: unix.AF_INET, Port: networkOrder(to.Port()), Addr: to.Addr().Unmap().As4()}
}

// networkOrder converts a port between the host's byte order and the wire's.
func networkOrder(port uint16) uint16 {
	b := (*[2]byte)(unsafe.Pointer(&port))
	return uint16(b[0])<<8 | uint16(b[1])
}

// preciseTimers makes the calling thread's timers exact to the nanosecond, and
// returns a function that sets its old slack again (prctl(2), PR_SET_TIMERSLACK).
func preciseTimers() (restore func(), err error) {
	slack, err := unix.PrctlRetInt(unix.PR_GET_TIMERSLACK, 0, 0, 0, 0)
	if err != nil {
		return nil, fmt.Errorf("prctl PR_GET_TIMERSLACK: %w", err)
	}
	if err := unix.Prctl(unix.PR_SET_TIMERSLACK, 1, 0, 0, 0); err != nil {
		return nil, fmt.Errorf("prctl PR_SET_TIMERSLACK: %w", err)
	}
	return func() { _ = unix.Prctl(unix.PR_SET_TIMERSLACK, uintptr(slack), 0, 0, 0) }, nil
}
