package netlab

import (
	"context"
	"errors"
	"fmt"
	"net"
	"net/netip"
	"os"
	"time"

	"golang.org/x/sys/unix"
)

// Host is a host of a standing lab.
type Host struct {
	lab   *Lab
	ns    *namespace
	rt    *rtnl
	name  string
	links []link
}

type link struct {
	kind  string
	addrs []netip.Addr
}

// Name returns the name that the topology gave the host.
func (h *Host) Name() string { return h.name }

// Addr returns the host's first address, or the zero Addr without a link.
func (h *Host) Addr() netip.Addr {
	if len(h.links) == 0 {
		return netip.Addr{}
	}
	return h.links[0].addrs[0]
}

// Addrs returns every address of the host's links, in order.
func (h *Host) Addrs() []netip.Addr {
	var all []netip.Addr
	for _, l := range h.links {
		all = append(all, l.addrs...)
	}
	return all
}

// LinkKind returns how the host's first link was made: [LinkVeth], [LinkNetem]
// or [LinkPump]; "" without a link.
func (h *Host) LinkKind() string {
	if len(h.links) == 0 {
		return ""
	}
	return h.links[0].kind
}

// Do runs fn inside the host's namespace, on the lab's one thread: what fn opens
// there (sockets, files of /proc/thread-self/net) stays with the namespace. fn
// must be short, must not start goroutines that need the namespace, and must
// not call Do.
func (h *Host) Do(fn func() error) error {
	if err := h.lab.thread.in(h.ns, fn); err != nil {
		return fmt.Errorf("host %s: %w", h.name, err)
	}
	return nil
}

// Sysctl reads a sysctl of the host's namespace, white space folded.
func (h *Host) Sysctl(key string) (value string, err error) {
	err = h.Do(func() error {
		value, err = readSysctl(key)
		return err
	})
	return value, err
}

// SetSysctl changes a sysctl of the host's namespace while the lab stands, and
// reads it back.
func (h *Host) SetSysctl(key, value string) error {
	if err := checkSysctl(key, value); err != nil {
		return fmt.Errorf("host %s: %w", h.name, err)
	}
	return h.Do(func() error { return setSysctls(map[string]string{key: value}) })
}

// Socket makes a non-blocking, close-on-exec IPv4 TCP socket on the host. The
// caller owns the descriptor.
func (h *Host) Socket() (fd int, err error) {
	fds, err := h.Sockets(1)
	if err != nil {
		return -1, err
	}
	return fds[0], nil
}

// Sockets makes n sockets as Socket does, in one visit to the namespace: the
// way there and back costs many times what a socket does.
func (h *Host) Sockets(n int) ([]int, error) {
	fds := make([]int, 0, n)
	err := h.Do(func() error {
		for range n {
			fd, err := unix.Socket(unix.AF_INET, unix.SOCK_STREAM|unix.SOCK_NONBLOCK|unix.SOCK_CLOEXEC, unix.IPPROTO_TCP)
			if err != nil {
				return os.NewSyscallError("socket", err)
			}
			fds = append(fds, fd)
		}
		return nil
	})
	if err != nil {
		for _, fd := range fds {
			unix.Close(fd)
		}
		return nil, err
	}
	return fds, nil
}

// DialContext connects from the host. The network is "tcp" or "tcp4" and the
// address an IPv4 address and a port: a lab has no names. It has the shape that
// client libraries take as a dialer.
func (h *Host) DialContext(ctx context.Context, network, address string) (net.Conn, error) {
	to, err := netip.ParseAddrPort(address)
	if err != nil || !to.Addr().Is4() || (network != "tcp" && network != "tcp4") {
		return nil, fmt.Errorf("host %s: dial %s %s: want tcp and an IPv4 address with a port", h.name, network, address)
	}
	fd, err := h.Socket()
	if err != nil {
		return nil, err
	}
	f := os.NewFile(uintptr(fd), address)
	defer f.Close() // net.FileConn works on a duplicate
	if err := connect(ctx, f, fd, to); err != nil {
		return nil, fmt.Errorf("host %s: dial %s: %w", h.name, address, err)
	}
	conn, err := net.FileConn(f)
	if err != nil {
		return nil, fmt.Errorf("host %s: dial %s: %w", h.name, address, err)
	}
	return conn, nil
}

// connect waits for the handshake in the runtime's poller, not on a thread.
func connect(ctx context.Context, f *os.File, fd int, to netip.AddrPort) error {
	err := unix.Connect(fd, &unix.SockaddrInet4{Addr: to.Addr().As4(), Port: int(to.Port())})
	if err == nil {
		return nil
	}
	if !errors.Is(err, unix.EINPROGRESS) {
		return os.NewSyscallError("connect", err)
	}
	stop := context.AfterFunc(ctx, func() { _ = f.SetWriteDeadline(time.Unix(1, 0)) })
	defer stop()
	raw, err := f.SyscallConn()
	if err != nil {
		return err
	}
	var result error
	err = raw.Write(func(fd uintptr) bool {
		// SO_ERROR is 0 both before and after a handshake that succeeds; only
		// a connected socket has a peer.
		errno, err := unix.GetsockoptInt(int(fd), unix.SOL_SOCKET, unix.SO_ERROR)
		switch {
		case err != nil:
			result = os.NewSyscallError("getsockopt", err)
			return true
		case errno != 0:
			result = os.NewSyscallError("connect", unix.Errno(errno))
			return true
		}
		_, err = unix.Getpeername(int(fd))
		return err == nil
	})
	if ctx.Err() != nil && err != nil {
		return ctx.Err()
	}
	return errors.Join(err, result)
}
