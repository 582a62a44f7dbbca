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
// IP_BIND_ADDRESS_NO_PORT, so that it need only be unique per destination
// (net/ipv4/inet_hashtables.c, __inet_hash_connect).
func LocalSource(name string, local netip.Addr) Source {
	return Source{Name: name, Socket: func() (int, error) {
		fd, err := unix.Socket(unix.AF_INET, unix.SOCK_STREAM|unix.SOCK_NONBLOCK|unix.SOCK_CLOEXEC, unix.IPPROTO_TCP)
		if err != nil {
			return -1, fmt.Errorf("socket: %w", err)
		}
		if !local.IsValid() {
			return fd, nil
		}
		if err := bindAddress(fd, local); err != nil {
			_ = unix.Close(fd)
			return -1, fmt.Errorf("bind %s: %w", local, err)
		}
		return fd, nil
	}}
}

func bindAddress(fd int, local netip.Addr) error {
	if !local.Unmap().Is4() {
		return unix.EAFNOSUPPORT
	}
	if err := unix.SetsockoptInt(fd, unix.IPPROTO_IP, unix.IP_BIND_ADDRESS_NO_PORT, 1); err != nil {
		return err
	}
	return unix.Bind(fd, &unix.SockaddrInet4{Addr: local.Unmap().As4()})
}
