package server

import (
	"bytes"
	"errors"
	"fmt"
	"net/netip"
	"os"
	"strconv"
	"time"

	"golang.org/x/sys/unix"
)

// listen makes the listening socket. Every option that accepted connections shall have is set on it, since Linux hands
// them on (net/core/sock.c, sk_clone; TCP_NODELAY and the keepalive times are part of the cloned tcp_sock): accepting
// then takes no further system calls.
func listen(at netip.AddrPort, backlog int, keepAlive time.Duration) (fd int, bound netip.AddrPort, err error) {
	fd, err = unix.Socket(unix.AF_INET, unix.SOCK_STREAM|unix.SOCK_NONBLOCK|unix.SOCK_CLOEXEC, unix.IPPROTO_TCP)
	if err != nil {
		return -1, bound, fmt.Errorf("creating a TCP socket: %w", err)
	}
	defer func() {
		if err != nil {
			unix.Close(fd)
		}
	}()
	if err = unix.SetsockoptInt(fd, unix.SOL_SOCKET, unix.SO_REUSEADDR, 1); err != nil {
		return -1, bound, fmt.Errorf("setting SO_REUSEADDR: %w", err)
	}
	if err = unix.SetsockoptInt(fd, unix.IPPROTO_TCP, unix.TCP_NODELAY, 1); err != nil {
		return -1, bound, fmt.Errorf("setting TCP_NODELAY: %w", err)
	}
	if err = setKeepAlive(fd, keepAlive); err != nil {
		return -1, bound, err
	}
	if err = unix.Bind(fd, &unix.SockaddrInet4{Addr: at.Addr().As4(), Port: int(at.Port())}); err != nil {
		return -1, bound, fmt.Errorf("binding %s: %w%s", at, err, bindAdvice(err))
	}
	if err = unix.Listen(fd, backlog); err != nil {
		return -1, bound, fmt.Errorf("listening on %s: %w%s", at, err, bindAdvice(err))
	}
	sa, err := unix.Getsockname(fd)
	if err != nil {
		return -1, bound, fmt.Errorf("asking for the bound address: %w", err)
	}
	return fd, addrPortOf(sa), nil
}

// bindAdvice says what to do about the errors that people meet.
func bindAdvice(err error) string {
	switch {
	case errors.Is(err, unix.EADDRINUSE):
		return " (stop the program that listens there, see ss -lntp, or give another --addr)"
	case errors.Is(err, unix.EADDRNOTAVAIL):
		return " (no interface here has that address, see ip addr)"
	case errors.Is(err, unix.EACCES):
		return " (ports below net.ipv4.ip_unprivileged_port_start need root; give another --addr)"
	}
	return ""
}

// setKeepAlive arranges probes as Redis does (anet.c, anetKeepAlive): the first after d of silence, then every third of
// it, dead after three.
func setKeepAlive(fd int, d time.Duration) error {
	seconds := int(d / time.Second)
	if seconds == 0 {
		if err := unix.SetsockoptInt(fd, unix.SOL_SOCKET, unix.SO_KEEPALIVE, 0); err != nil {
			return fmt.Errorf("clearing SO_KEEPALIVE: %w", err)
		}
		return nil
	}
	for _, o := range []struct {
		name              string
		level, opt, value int
	}{
		{"SO_KEEPALIVE", unix.SOL_SOCKET, unix.SO_KEEPALIVE, 1},
		{"TCP_KEEPIDLE", unix.IPPROTO_TCP, unix.TCP_KEEPIDLE, seconds},
		{"TCP_KEEPINTVL", unix.IPPROTO_TCP, unix.TCP_KEEPINTVL, max(seconds/3, 1)},
		{"TCP_KEEPCNT", unix.IPPROTO_TCP, unix.TCP_KEEPCNT, 3},
	} {
		if err := unix.SetsockoptInt(fd, o.level, o.opt, o.value); err != nil {
			return fmt.Errorf("setting %s to %d: %w", o.name, o.value, err)
		}
	}
	return nil
}

// somaxconn returns net.core.somaxconn of the namespace that the calling thread stands in.
func somaxconn() (int, error) {
	b, err := os.ReadFile("/proc/sys/net/core/somaxconn")
	if err != nil {
		return 0, fmt.Errorf("reading the limit of the backlog: %w", err)
	}
	n, err := strconv.Atoi(string(bytes.TrimSpace(b)))
	if err != nil {
		return 0, fmt.Errorf("reading the limit of the backlog: %w", err)
	}
	return n, nil
}

func addrPortOf(sa unix.Sockaddr) netip.AddrPort {
	if v4, ok := sa.(*unix.SockaddrInet4); ok {
		return netip.AddrPortFrom(netip.AddrFrom4(v4.Addr), uint16(v4.Port))
	}
	return netip.AddrPort{}
}
