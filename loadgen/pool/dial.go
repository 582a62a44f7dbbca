package pool

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

// Dial opens a connection to a server, from whatever place it likes. It makes one
// connect(2): where that finds no local port the pool tries again as its library
// does, so that each connect(2) is counted by its own result. The connection must
// have a descriptor ([syscall.Conn]), as those of package net do.
type Dial func(ctx context.Context, addr netip.AddrPort) (net.Conn, error)

// dialHere is the Dial from the program's own place. It is not net.Dialer, which
// calls connect(2) again without a word (doDialTCPProto in net/tcpsock_posix.go).
func dialHere(ctx context.Context, addr netip.AddrPort) (net.Conn, error) {
	family, _ := socketAddress(addr)
	return dialBy(ctx, addr, func() (int, error) {
		fd, err := unix.Socket(family, unix.SOCK_STREAM|unix.SOCK_NONBLOCK|unix.SOCK_CLOEXEC, unix.IPPROTO_TCP)
		return fd, os.NewSyscallError("socket", err)
	})
}

// DialFrom is the Dial from the place where socket makes non-blocking TCP sockets,
// whose descriptors become the Dial's.
func DialFrom(socket func() (fd int, err error)) Dial {
	return func(ctx context.Context, addr netip.AddrPort) (net.Conn, error) { return dialBy(ctx, addr, socket) }
}

func dialBy(ctx context.Context, addr netip.AddrPort, socket func() (fd int, err error)) (net.Conn, error) {
	_, to := socketAddress(addr)
	fd, err := socket()
	if err != nil {
		return nil, err
	}
	f := os.NewFile(uintptr(fd), addr.String())
	defer f.Close() // net.FileConn works on a duplicate
	if err := connect(ctx, f, to); err != nil {
		return nil, err
	}
	c, err := net.FileConn(f)
	if err != nil {
		return nil, fmt.Errorf("taking over a connected socket: %w", err)
	}
	return c, nil
}

func socketAddress(addr netip.AddrPort) (family int, to unix.Sockaddr) {
	if ip := addr.Addr().Unmap(); ip.Is4() {
		return unix.AF_INET, &unix.SockaddrInet4{Addr: ip.As4(), Port: int(addr.Port())}
	}
	return unix.AF_INET6, &unix.SockaddrInet6{Addr: addr.Addr().As16(), Port: int(addr.Port())}
}

// connect calls connect(2) on the non-blocking socket f, and waits for the
// handshake in the runtime's poller.
func connect(ctx context.Context, f *os.File, to unix.Sockaddr) error {
	raw, err := f.SyscallConn()
	if err != nil {
		return fmt.Errorf("looking at a socket: %w", err)
	}
	if e := raw.Control(func(fd uintptr) { err = unix.Connect(int(fd), to) }); e != nil {
		return fmt.Errorf("looking at a socket: %w", e)
	}
	if !errors.Is(err, unix.EINPROGRESS) {
		return os.NewSyscallError("connect", err) // nil if there was none
	}
	stop := context.AfterFunc(ctx, func() { _ = f.SetWriteDeadline(time.Unix(1, 0)) })
	defer stop()
	var result error
	err = raw.Write(func(fd uintptr) bool {
		// SO_ERROR is 0 both before and after a handshake that succeeds; only a
		// connected socket has a peer.
		errno, err := unix.GetsockoptInt(int(fd), unix.SOL_SOCKET, unix.SO_ERROR)
		switch {
		case err != nil:
			result = os.NewSyscallError("getsockopt", err)
		case errno != 0:
			result = os.NewSyscallError("connect", unix.Errno(errno))
		default:
			_, err = unix.Getpeername(int(fd))
			return err == nil
		}
		return true
	})
	if err != nil && ctx.Err() != nil {
		return ctx.Err()
	}
	return errors.Join(err, result)
}
