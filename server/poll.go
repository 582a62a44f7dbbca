package server

import (
	"encoding/binary"
	"fmt"
	"net/netip"
	"time"
	"unsafe"

	"golang.org/x/sys/unix"
)

// The reads and writes of the loop never block, so they need not tell the Go scheduler: RawSyscall does not hand the
// processor on and back, which costs more than a read of a few bytes. Only a wait for events that takes longer than
// rawWait goes through unix.Syscall6.

// sysRead reads from a non-blocking socket. n is 0 at the end of the stream. (recv and send are shorter ways through the
// kernel than read and write.)
func sysRead(fd int, buf []byte) (n int, errno unix.Errno) {
	r, _, errno := unix.RawSyscall6(unix.SYS_RECVFROM, uintptr(fd), uintptr(unsafe.Pointer(unsafe.SliceData(buf))), uintptr(len(buf)), 0, 0, 0)
	return int(r), errno
}

// sysWrite writes to a non-blocking socket; a gone peer is EPIPE.
func sysWrite(fd int, buf []byte) (n int, errno unix.Errno) {
	r, _, errno := unix.RawSyscall6(unix.SYS_SENDTO, uintptr(fd), uintptr(unsafe.Pointer(unsafe.SliceData(buf))), uintptr(len(buf)), unix.MSG_NOSIGNAL, 0, 0)
	return int(r), errno
}

// sysAccept takes a connection from the accept queue; it does not block.
func sysAccept(fd int) (conn int, peer netip.AddrPort, errno unix.Errno) {
	var sa unix.RawSockaddrInet4
	size := uint32(unix.SizeofSockaddrInet4)
	r, _, errno := unix.RawSyscall6(unix.SYS_ACCEPT4, uintptr(fd), uintptr(unsafe.Pointer(&sa)), uintptr(unsafe.Pointer(&size)),
		unix.SOCK_NONBLOCK|unix.SOCK_CLOEXEC, 0, 0)
	if errno != 0 {
		return -1, peer, errno
	}
	port := (*[2]byte)(unsafe.Pointer(&sa.Port)) // in network order
	return int(r), netip.AddrPortFrom(netip.AddrFrom4(sa.Addr), binary.BigEndian.Uint16(port[:])), 0
}

// poller is a level-triggered epoll instance (ae_epoll.c).
type poller struct {
	fd     int
	events []unix.EpollEvent
	idle   bool // the last wait brought nothing: nobody is in a hurry
	coarse bool // the kernel, or a filter before it, has no epoll_pwait2 (Linux 5.11)
}

// newPoller makes one that reports up to size events per wait. Redis reports every ready client in one cycle; the
// number of accepts per cycle means the same thing here only if this does too.
func newPoller(size int) (*poller, error) {
	fd, err := unix.EpollCreate1(unix.EPOLL_CLOEXEC)
	if err != nil {
		return nil, fmt.Errorf("creating an epoll instance: %w", err)
	}
	return &poller{fd: fd, events: make([]unix.EpollEvent, size)}, nil
}

func (p *poller) add(fd int, events uint32) error {
	return unix.EpollCtl(p.fd, unix.EPOLL_CTL_ADD, fd, &unix.EpollEvent{Events: events, Fd: int32(fd)})
}

func (p *poller) modify(fd int, events uint32) error {
	return unix.EpollCtl(p.fd, unix.EPOLL_CTL_MOD, fd, &unix.EpollEvent{Events: events, Fd: int32(fd)})
}

func (p *poller) remove(fd int) error { return unix.EpollCtl(p.fd, unix.EPOLL_CTL_DEL, fd, nil) }

// rawWait is how long the loop waits for events without telling the scheduler. Under load the next event is there within
// that time, and handing the processor back and forth would cost more than parsing it. The garbage collector need not
// wait for the thread: its preemption signal interrupts epoll_pwait, which the kernel never restarts. The time is that
// of the longest kernel tick (HZ=100), so that a short sleep does not have to program a hardware timer of its own.
const rawWait = 10 * time.Millisecond

// maxLooks bounds how often wait looks before it goes to sleep. A look takes about 1.2 µs, so that all of them take a
// quarter of a millisecond: well below the millisecond to which timeouts are rounded, and long enough for a client on the
// same machine to send its next requests.
const maxLooks = 200

// wait returns the events that are there, or waits up to timeout for some, in whole milliseconds. Before it goes to sleep
// it looks up to so many times more, but no more than maxLooks: to wake this thread costs the client which sends the next request as much as several requests, and
// with pipelining the client is what limits the throughput.
func (p *poller) wait(timeout time.Duration, looks int64) ([]unix.EpollEvent, error) {
	ms := max(timeout+time.Millisecond-1, 0) / time.Millisecond
	var n int
	var errno unix.Errno
	if ms == 0 {
		looks = 0 // something else is due
	}
	for looks = min(looks, maxLooks); looks > 0 && n == 0 && errno == 0; looks-- {
		n, errno = p.look(0)
	}
	if n == 0 && errno == 0 && !p.idle {
		first := min(ms, rawWait/time.Millisecond)
		n, errno = p.look(first)
		ms -= first
	}
	if n == 0 && errno == 0 && (p.idle || ms > 0) {
		r, _, e := unix.Syscall6(unix.SYS_EPOLL_PWAIT, uintptr(p.fd), uintptr(unsafe.Pointer(&p.events[0])), uintptr(len(p.events)), uintptr(ms), 0, 0)
		n, errno = int(r), e
	}
	p.idle = n == 0
	return p.ready(n, errno)
}

// ready returns what a wait has brought.
func (p *poller) ready(n int, errno unix.Errno) ([]unix.EpollEvent, error) {
	switch errno {
	case 0:
		return p.events[:n], nil
	case unix.EINTR:
		return nil, nil
	}
	return nil, fmt.Errorf("waiting for events: %w", errno)
}

// waitPrecisely is wait with a timeout that is not rounded: epoll_pwait2 takes nanoseconds. It ends late by a thousandth of
// the timeout (fs/select.c, select_estimate_accuracy) and what the machine makes it.
func (p *poller) waitPrecisely(timeout time.Duration) ([]unix.EpollEvent, error) {
	if p.coarse {
		return p.wait(timeout, 0)
	}
	timeout = max(timeout, 0)
	ts := [2]int64{int64(timeout / time.Second), int64(timeout % time.Second)} // struct __kernel_timespec
	var n uintptr
	var errno unix.Errno
	if timeout <= rawWait {
		n, _, errno = unix.RawSyscall6(unix.SYS_EPOLL_PWAIT2, uintptr(p.fd), uintptr(unsafe.Pointer(&p.events[0])), uintptr(len(p.events)), uintptr(unsafe.Pointer(&ts)), 0, 0)
	} else {
		n, _, errno = unix.Syscall6(unix.SYS_EPOLL_PWAIT2, uintptr(p.fd), uintptr(unsafe.Pointer(&p.events[0])), uintptr(len(p.events)), uintptr(unsafe.Pointer(&ts)), 0, 0)
	}
	if errno == unix.ENOSYS || errno == unix.EPERM {
		p.coarse = true
		return p.wait(timeout, 0)
	}
	p.idle = false
	return p.ready(int(n), errno)
}

// look is epoll_pwait without the scheduler's knowledge.
func (p *poller) look(ms time.Duration) (int, unix.Errno) {
	r, _, errno := unix.RawSyscall6(unix.SYS_EPOLL_PWAIT, uintptr(p.fd), uintptr(unsafe.Pointer(&p.events[0])), uintptr(len(p.events)), uintptr(ms), 0, 0)
	return int(r), errno
}
