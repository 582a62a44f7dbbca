package observe

import (
	"encoding/binary"
	"errors"
	"fmt"
	"os"

	"golang.org/x/sys/unix"

	"connlab/netlab"
)

// Query selects sockets.
type Query struct {
	// States to show; zero is all of them.
	States States
	// LocalPort and RemotePort, where not zero, must match.
	LocalPort, RemotePort uint16
}

// ReadSockets returns the TCP sockets of the host that match, TIME_WAIT and
// handshakes not yet completed (SYN_RECV) included. IPv6 sockets that serve
// IPv4 are there with their IPv4 addresses.
//
// It is not a snapshot: the kernel walks its tables while sockets change, and a
// socket that moves meanwhile may be missed or shown twice. Where every socket
// matters, read while the traffic pauses.
func ReadSockets(h *netlab.Host, q Query) ([]Socket, error) {
	d, err := openDiag(h)
	if err != nil {
		return nil, err
	}
	sockets, err := d.sockets(q, nil)
	return sockets, errors.Join(err, d.close())
}

// diag is a NETLINK_SOCK_DIAG socket of one host. It is not for concurrent use.
type diag struct {
	host string
	fd   int
	seq  uint32
	buf  []byte
}

// diagTimeout bounds a receive. The kernel produces a dump inside the receiving
// call itself, so that only an answer that got lost can take longer.
var diagTimeout = unix.Timeval{Sec: 2}

// openDiag makes the socket inside the host's namespace.
func openDiag(h *netlab.Host) (*diag, error) {
	// netlink_dump makes messages of up to 32 KiB for a reader with room for them.
	d := &diag{host: h.Name(), fd: -1, buf: make([]byte, 64<<10)}
	err := h.Do(func() error {
		fd, err := unix.Socket(unix.AF_NETLINK, unix.SOCK_RAW|unix.SOCK_CLOEXEC, unix.NETLINK_SOCK_DIAG)
		if err != nil {
			return os.NewSyscallError("socket", err)
		}
		d.fd = fd
		return os.NewSyscallError("setsockopt", unix.SetsockoptTimeval(fd, unix.SOL_SOCKET, unix.SO_RCVTIMEO, &diagTimeout))
	})
	if err != nil {
		return nil, errors.Join(fmt.Errorf("opening sock_diag: %w", err), d.close())
	}
	return d, nil
}

func (d *diag) close() error {
	if d.fd < 0 {
		return nil
	}
	return unix.Close(d.fd)
}

// dumpAttempts bounds how often a dump is repeated that the kernel calls
// inconsistent.
const dumpAttempts = 5

// sockets appends the matching sockets of both address families to into.
func (d *diag) sockets(q Query, into []Socket) ([]Socket, error) {
	var err error
	for _, family := range []uint8{unix.AF_INET, unix.AF_INET6} {
		if into, err = d.family(family, q, into); err != nil {
			return into, fmt.Errorf("host %s: sock_diag: %w", d.host, err)
		}
	}
	return into, nil
}

func (d *diag) family(family uint8, q Query, into []Socket) ([]Socket, error) {
	start := len(into)
	for range dumpAttempts {
		d.seq++
		if err := unix.Sendto(d.fd, q.request(family, d.seq), 0, &unix.SockaddrNetlink{Family: unix.AF_NETLINK}); err != nil {
			return into, os.NewSyscallError("sendto", err)
		}
		sockets, err := d.receive(into[:start])
		if !errors.Is(err, errInterrupted) {
			return sockets, err
		}
	}
	return into[:start], fmt.Errorf("%w %d times in a row", errInterrupted, dumpAttempts)
}

// errInterrupted is the kernel's word that the table changed under the dump in
// a way that makes it inconsistent (NLM_F_DUMP_INTR).
var errInterrupted = errors.New("dump interrupted")

// receive reads the answers to the last request up to its end.
func (d *diag) receive(into []Socket) ([]Socket, error) {
	interrupted := false
	for {
		n, _, err := unix.Recvfrom(d.fd, d.buf, unix.MSG_TRUNC)
		if errors.Is(err, unix.EINTR) {
			continue
		}
		if err != nil {
			return into, os.NewSyscallError("recvfrom", err)
		}
		if n > len(d.buf) {
			return into, fmt.Errorf("a datagram of %d bytes for a buffer of %d", n, len(d.buf))
		}
		var end dumpEnd
		into, end, err = decodeDatagram(d.buf[:n], d.seq, into)
		if err != nil {
			return into, err
		}
		interrupted = interrupted || end.interrupted
		if end.done {
			if interrupted {
				return into, errInterrupted
			}
			return into, nil
		}
	}
}

// diagSkMeminfo is INET_DIAG_SKMEMINFO, the attribute with the socket's memory
// figures and its drops.
const diagSkMeminfo = 7

// request is struct nlmsghdr with struct inet_diag_req_v2: dump the sockets of
// one family. The ports are matched by the kernel itself (net/ipv4/tcp_diag.c
// tcp_diag_dump), so that no filter program is needed.
func (q Query) request(family uint8, seq uint32) []byte {
	const size = unix.SizeofNlMsghdr + 8 + sizeofSockID
	b := make([]byte, 0, size)
	b = binary.NativeEndian.AppendUint32(b, size)
	b = binary.NativeEndian.AppendUint16(b, unix.SOCK_DIAG_BY_FAMILY)
	b = binary.NativeEndian.AppendUint16(b, unix.NLM_F_REQUEST|unix.NLM_F_DUMP)
	b = binary.NativeEndian.AppendUint32(b, seq)
	b = append(b, 0, 0, 0, 0) // port id: the kernel fills it in
	states := q.States
	if states == 0 {
		states = AllStates
	}
	b = append(b, family, unix.IPPROTO_TCP, 1<<(diagSkMeminfo-1), 0)
	b = binary.NativeEndian.AppendUint32(b, uint32(states))
	b = binary.BigEndian.AppendUint16(b, q.LocalPort)
	b = binary.BigEndian.AppendUint16(b, q.RemotePort)
	return b[:size] // no address, no interface, no cookie: any
}
