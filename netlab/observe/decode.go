package observe

import (
	"encoding/binary"
	"errors"
	"fmt"
	"net/netip"
	"time"

	"golang.org/x/sys/unix"
)

// Socket is a TCP socket as sock_diag shows it (struct inet_diag_msg).
type Socket struct {
	Local, Remote netip.AddrPort
	State         State
	// RQueue is, for a listener, the number of connections in its accept queue;
	// otherwise the bytes received and not yet read.
	RQueue uint32
	// WQueue is, for a listener, the limit of its accept queue, min(backlog,
	// somaxconn), which holds one more than that (include/net/sock.h
	// sk_acceptq_is_full); otherwise the bytes not yet acknowledged.
	WQueue uint32
	// Inode is 0 for a connection that waits to be accepted, for one that its
	// program has closed, and in SYN_RECV and TIME_WAIT.
	Inode uint32
	UID   uint32
	// Timer is the kind of timer that runs: 0 none, 1 retransmission (of the
	// SYN-ACK in SYN_RECV), 2 another, 3 TIME_WAIT, 4 zero window probe. It goes
	// off after Expires; Retransmits is how often it went off without an answer.
	Timer       uint8
	Retransmits uint8
	Expires     time.Duration
	// Drops are the packets this socket dropped (SK_MEMINFO_DROPS): for a
	// listener the SYNs and ACKs that found no room. Always 0 in SYN_RECV and
	// TIME_WAIT, which have no socket of their own.
	Drops uint32
}

// timerTimeWait is the Timer of a time-wait slot (net/ipv4/inet_diag.c
// inet_twsk_diag_fill).
const timerTimeWait = 3

// Sizes of include/uapi/linux/inet_diag.h.
const (
	sizeofSockID  = 48 // struct inet_diag_sockid
	sizeofDiagMsg = 72 // struct inet_diag_msg
)

// dumpEnd is what a datagram says about the dump as a whole.
type dumpEnd struct {
	done        bool // this was the last datagram
	interrupted bool // NLM_F_DUMP_INTR
}

// decodeDatagram appends the sockets of one datagram to into. Messages of an
// earlier request (another sequence number) are passed over.
func decodeDatagram(b []byte, seq uint32, into []Socket) ([]Socket, dumpEnd, error) {
	var end dumpEnd
	for len(b) > 0 {
		if len(b) < unix.SizeofNlMsghdr {
			return into, end, fmt.Errorf("netlink: %d bytes left, too few for a header", len(b))
		}
		size := int64(binary.NativeEndian.Uint32(b))
		if size < unix.SizeofNlMsghdr || size > int64(len(b)) {
			return into, end, fmt.Errorf("netlink: a message of %d bytes in %d", size, len(b))
		}
		kind := binary.NativeEndian.Uint16(b[4:])
		flags := binary.NativeEndian.Uint16(b[6:])
		ours := binary.NativeEndian.Uint32(b[8:]) == seq
		body := b[unix.SizeofNlMsghdr:size]
		b = b[min(align4(int(size)), len(b)):]
		if !ours {
			continue
		}
		end.interrupted = end.interrupted || flags&unix.NLM_F_DUMP_INTR != 0
		switch kind {
		case unix.SOCK_DIAG_BY_FAMILY:
			s, err := decodeSocket(body)
			if err != nil {
				return into, end, err
			}
			into = append(into, s)
		case unix.NLMSG_ERROR, unix.NLMSG_DONE:
			// Both begin with an errno, negative; a DONE may come without.
			if len(body) >= 4 {
				if errno := int32(binary.NativeEndian.Uint32(body)); errno < 0 {
					return into, end, fmt.Errorf("netlink: the kernel answers: %w", unix.Errno(-errno))
				}
			}
			end.done = true
			return into, end, nil
		default:
			return into, end, fmt.Errorf("netlink: unexpected message of type %d", kind)
		}
	}
	return into, end, nil
}

func decodeSocket(b []byte) (Socket, error) {
	if len(b) < sizeofDiagMsg {
		return Socket{}, fmt.Errorf("sock_diag: a socket of %d bytes, want %d", len(b), sizeofDiagMsg)
	}
	local, err := decodeAddr(b[0], b[8:24])
	if err != nil {
		return Socket{}, err
	}
	remote, err := decodeAddr(b[0], b[24:40])
	if err != nil {
		return Socket{}, err
	}
	s := Socket{
		Local:       netip.AddrPortFrom(local, binary.BigEndian.Uint16(b[4:])),
		Remote:      netip.AddrPortFrom(remote, binary.BigEndian.Uint16(b[6:])),
		State:       State(b[1]),
		Timer:       b[2],
		Retransmits: b[3],
		Expires:     time.Duration(binary.NativeEndian.Uint32(b[52:])) * time.Millisecond,
		RQueue:      binary.NativeEndian.Uint32(b[56:]),
		WQueue:      binary.NativeEndian.Uint32(b[60:]),
		UID:         binary.NativeEndian.Uint32(b[64:]),
		Inode:       binary.NativeEndian.Uint32(b[68:]),
	}
	if s.State < Established || s.State > Closing {
		return Socket{}, fmt.Errorf("sock_diag: %v", s.State)
	}
	s.Drops, err = decodeDrops(b[sizeofDiagMsg:])
	return s, err
}

// decodeAddr reads the address of one family; an IPv4 address in an IPv6 socket
// becomes plain IPv4, so that both ends of a connection compare equal.
func decodeAddr(family uint8, b []byte) (netip.Addr, error) {
	switch family {
	case unix.AF_INET:
		return netip.AddrFrom4([4]byte(b[:4])), nil
	case unix.AF_INET6:
		return netip.AddrFrom16([16]byte(b[:16])).Unmap(), nil
	}
	return netip.Addr{}, fmt.Errorf("sock_diag: address family %d", family)
}

// decodeDrops finds INET_DIAG_SKMEMINFO among the attributes; 0 without it.
func decodeDrops(b []byte) (uint32, error) {
	for len(b) > 0 {
		if len(b) < unix.SizeofRtAttr {
			return 0, errors.New("sock_diag: an attribute is cut off")
		}
		size := int(binary.NativeEndian.Uint16(b))
		if size < unix.SizeofRtAttr || size > len(b) {
			return 0, fmt.Errorf("sock_diag: an attribute of %d bytes in %d", size, len(b))
		}
		value := b[unix.SizeofRtAttr:size]
		if binary.NativeEndian.Uint16(b[2:]) == diagSkMeminfo {
			if len(value) < 4*(unix.SK_MEMINFO_DROPS+1) {
				return 0, nil // a kernel before 4.7 has no drops here
			}
			return binary.NativeEndian.Uint32(value[4*unix.SK_MEMINFO_DROPS:]), nil
		}
		b = b[min(align4(size), len(b)):]
	}
	return 0, nil
}

// align4 is NLMSG_ALIGN and RTA_ALIGN.
func align4(n int) int { return (n + 3) &^ 3 }
