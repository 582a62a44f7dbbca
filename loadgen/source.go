package loadgen

import (
	"fmt"
	"net/netip"

	"golang.org/x/sys/unix"
)

// Source is a place from which operations start: a client host.
type Source struct {
	// Name is for reports and errors.
	Name string
	// Socket makes a fresh non-blocking, close-on-exec IPv4 TCP socket,
	// bound or not, which the run then owns. It is called once for each
	// operation on the run's own locked thread and must leave the thread as it
	// found it; the time it takes is lateness. Its errors are classified by
	// the errno they wrap.
	Socket func() (fd int, err error)
}

// LocalSource makes sockets where the program stands. If local is a valid
// address the sockets are bound to it; the port is left to connect(2) by
// IP_BIND_ADDRESS_NO_PORT. Of how connect(2) chooses, three things matter:
// the port need only be unique per destination, so that connections to two
// servers may have the same one; it takes every second port of
// net.ipv4.ip_local_port_range, those of the parity of the range's low end, as
// long as one of them is free (net/ipv4/inet_hashtables.c, __inet_hash_connect);
// and it passes over ports that a socket has bound. [Source.Bound] and
// [Source.InRange] are the other ways to get a port.
func LocalSource(name string, local netip.Addr) Source {
	return Source{Name: name, Socket: func() (int, error) {
		fd, err := unix.Socket(unix.AF_INET, unix.SOCK_STREAM|unix.SOCK_NONBLOCK|unix.SOCK_CLOEXEC, unix.IPPROTO_TCP)
		if err != nil {
			return -1, fmt.Errorf("socket: %w", err)
		}
		if !local.IsValid() {
			return fd, nil
		}
		return prepared(fd, bindAddress(fd, local))
	}}
}

// Bound is s with sockets that are bound to local before they connect; an
// address that is not valid stands for any. A port of s's own choice is lost.
//
// Port 0 makes bind(2) choose: a port that no other socket of an overlapping
// address has, whatever its destination, TIME_WAIT included; first those of the
// parity that connect(2) leaves alone (net/ipv4/inet_connection_sock.c,
// inet_csk_find_open_port; Documentation/networking/ip-sysctl.rst,
// ip_local_port_range). So no two connections of the host have one port, and
// all its destinations together share one range: where it is used up the
// operation fails with [NoLocalPort] (EADDRINUSE).
//
// Any other port is taken as it is, with SO_REUSEADDR, so that several sockets
// can have it as long as their destinations differ; a second one to the same
// destination fails with [NoLocalPort] (EADDRNOTAVAIL).
func (s Source) Bound(local netip.AddrPort) Source {
	return s.with(func(fd int) error { return bindPort(fd, local) })
}

// InRange is s with sockets for which connect(2) chooses from the ports low to
// high, each of them, of whatever parity. An end that is 0 or outside of
// net.ipv4.ip_local_port_range is that of ip_local_port_range, so that
// InRange(0, 0) uses all of its ports. It rests on the socket option
// IP_LOCAL_PORT_RANGE of Linux 6.3 (net/ipv4/inet_connection_sock.c,
// inet_sk_get_local_port_range); up to Linux 6.7 connect(2) still goes by
// parity inside of it.
func (s Source) InRange(low, high uint16) Source {
	return s.with(func(fd int) error {
		// The kernel takes 0 for "no range of its own": with an end beyond any
		// range it is one, and the same.
		ends := int(high)<<16 | int(low)
		if ends == 0 {
			ends = 0xffff << 16
		}
		if err := unix.SetsockoptInt(fd, unix.IPPROTO_IP, ipLocalPortRange, ends); err != nil {
			return fmt.Errorf("local ports %d to %d: %w", low, high, err)
		}
		return nil
	})
}

// ipLocalPortRange is IP_LOCAL_PORT_RANGE of include/uapi/linux/in.h.
const ipLocalPortRange = 51

// with is s whose sockets are prepared further.
func (s Source) with(prepare func(fd int) error) Source {
	return Source{Name: s.Name, Socket: func() (int, error) {
		fd, err := s.Socket()
		if err != nil {
			return -1, err
		}
		return prepared(fd, prepare(fd))
	}}
}

// prepared is fd, or the error, and then fd is closed.
func prepared(fd int, err error) (int, error) {
	if err != nil {
		_ = unix.Close(fd)
		return -1, err
	}
	return fd, nil
}

// bindAddress binds to an address and leaves the port to connect(2).
func bindAddress(fd int, local netip.Addr) error {
	if !local.Unmap().Is4() {
		return fmt.Errorf("bind %s: %w", local, unix.EAFNOSUPPORT)
	}
	if err := unix.SetsockoptInt(fd, unix.IPPROTO_IP, unix.IP_BIND_ADDRESS_NO_PORT, 1); err != nil {
		return fmt.Errorf("bind %s: %w", local, err)
	}
	if err := unix.Bind(fd, &unix.SockaddrInet4{Addr: local.Unmap().As4()}); err != nil {
		return fmt.Errorf("bind %s: %w", local, err)
	}
	return nil
}

// bindPort binds to an address and a port, also where the socket was bound to an
// address before: as long as it has no port it can be bound again
// (net/ipv4/af_inet.c, __inet_bind).
func bindPort(fd int, local netip.AddrPort) error {
	addr := local.Addr().Unmap()
	if !addr.IsValid() {
		addr = netip.IPv4Unspecified()
	}
	if !addr.Is4() {
		return fmt.Errorf("bind %s: %w", local, unix.EAFNOSUPPORT)
	}
	err := unix.SetsockoptInt(fd, unix.IPPROTO_IP, unix.IP_BIND_ADDRESS_NO_PORT, 0)
	if err == nil && local.Port() != 0 {
		err = unix.SetsockoptInt(fd, unix.SOL_SOCKET, unix.SO_REUSEADDR, 1)
	}
	if err == nil {
		err = unix.Bind(fd, &unix.SockaddrInet4{Port: int(local.Port()), Addr: addr.As4()})
	}
	if err != nil {
		return fmt.Errorf("bind %s: %w", netip.AddrPortFrom(addr, local.Port()), err)
	}
	return nil
}
