package proxy

import (
	"encoding/binary"
	"errors"
	"fmt"
	"net"
	"net/netip"
	"unsafe"

	"golang.org/x/sys/unix"
)

// ErrNoOption says that a SYN is in order and has no option of the kind that carries the VIP.
var ErrNoOption = errors.New("the SYN has no option with a VIP")

// errNoSYN says that the kernel kept no SYN: the connection came through a SYN cookie (net/ipv4/tcp_input.c,
// tcp_conn_request keeps the SYN unless it sends a cookie).
var errNoSYN = errors.New("the kernel kept no SYN (a SYN cookie forgets it): the VIP is lost")

// maxSYN is the longest IPv4 and TCP headers, in bytes: the lengths are words of four bytes in four bits.
const maxSYN = 60 + 60

// vipOption is the length of the option that carries the VIP: kind, length, port, IPv4 address.
const vipOption = 8

// ParseSavedSYN finds the VIP in what TCP_SAVED_SYN returns: the IPv4 and TCP headers of a SYN. It is in the first option
// of the kind given, which must be 8 bytes long: kind, length, port, address, in network order. Options are walked as the
// kernel does it (net/ipv4/tcp_input.c, tcp_parse_options): the walk ends at kind 0 and at a length that cannot be.
//
// The error is [ErrNoOption], wrapped or not, if the headers are whole and the option is not there.
func ParseSavedSYN(b []byte, kind byte) (netip.AddrPort, error) {
	var none netip.AddrPort
	if len(b) < 20 || b[0]>>4 != 4 {
		return none, fmt.Errorf("saved SYN of %d bytes does not begin with an IPv4 header", len(b))
	}
	ipLen := int(b[0]&0xf) * 4
	if ipLen < 20 || len(b) < ipLen+20 || b[9] != unix.IPPROTO_TCP {
		return none, fmt.Errorf("saved SYN of %d bytes has no TCP header behind an IPv4 header of %d", len(b), ipLen)
	}
	tcp := b[ipLen:]
	tcpLen := int(tcp[12]>>4) * 4
	if tcpLen < 20 || len(tcp) < tcpLen {
		return none, fmt.Errorf("saved SYN has %d bytes of a TCP header of %d", len(tcp), tcpLen)
	}
	for o := tcp[20:tcpLen]; len(o) > 0; {
		if o[0] == unix.TCPOPT_EOL {
			break
		}
		if o[0] == unix.TCPOPT_NOP {
			o = o[1:]
			continue
		}
		if len(o) < 2 || o[1] < 2 || int(o[1]) > len(o) {
			return none, fmt.Errorf("%w: option %d, with a length that cannot be, ends the walk", ErrNoOption, o[0])
		}
		if o[0] != kind {
			o = o[o[1]:]
			continue
		}
		if o[1] != vipOption {
			return none, fmt.Errorf("option %d of the SYN is %d bytes long, not %d", kind, o[1], vipOption)
		}
		return netip.AddrPortFrom(netip.AddrFrom4([4]byte(o[4:8])), binary.BigEndian.Uint16(o[2:4])), nil
	}
	return none, ErrNoOption
}

// savedSYN returns the headers of the SYN that made an accepted connection, or [errNoSYN]. The kernel forgets them with
// that. The listener must have had TCP_SAVE_SYN set to 1 (2 would put the link-layer header in front) when the SYN came.
func savedSYN(c *net.TCPConn) ([]byte, error) {
	raw, err := c.SyscallConn()
	if err != nil {
		return nil, fmt.Errorf("reading TCP_SAVED_SYN: %w", err)
	}
	buf := make([]byte, maxSYN)
	length := uint32(len(buf))
	var errno unix.Errno
	// x/sys/unix has no getsockopt for bytes that may contain zeros.
	err = raw.Control(func(fd uintptr) {
		_, _, errno = unix.Syscall6(unix.SYS_GETSOCKOPT, fd, unix.IPPROTO_TCP, unix.TCP_SAVED_SYN,
			uintptr(unsafe.Pointer(&buf[0])), uintptr(unsafe.Pointer(&length)), 0)
	})
	switch {
	case err != nil:
		return nil, fmt.Errorf("reading TCP_SAVED_SYN: %w", err)
	case errno != 0:
		return nil, fmt.Errorf("reading TCP_SAVED_SYN: %w", errno)
	case length == 0:
		return nil, errNoSYN
	}
	return buf[:length], nil
}
