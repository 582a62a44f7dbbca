package wire

import (
	"encoding/binary"
	"errors"
	"fmt"
	"net/netip"
)

// Why a packet has no segment.
var (
	// ErrNotTCP is a frame with no TCP over IPv4 in it: ARP, IPv6, a VLAN tag, UDP.
	ErrNotTCP = errors.New("not TCP over IPv4")
	// ErrFragment is a piece of a TCP datagram: only the first has the TCP header,
	// and no piece has a checksum of its own.
	ErrFragment = errors.New("fragment of a TCP datagram")
	// ErrMalformed is a frame whose headers contradict themselves or its length.
	ErrMalformed = errors.New("malformed packet")
)

// What can be wrong, made once: a flood of malformed packets allocates nothing.
var (
	errShortFrame  = fmt.Errorf("%w: shorter than Ethernet and IPv4 headers", ErrMalformed)
	errVersion     = fmt.Errorf("%w: IP version is not 4", ErrMalformed)
	errIHL         = fmt.Errorf("%w: IPv4 header length below 20 bytes or beyond the packet", ErrMalformed)
	errTotalLength = fmt.Errorf("%w: IPv4 total length below the header's or beyond the frame", ErrMalformed)
	errShortTCP    = fmt.Errorf("%w: TCP header beyond the packet", ErrMalformed)
	errDataOffset  = fmt.Errorf("%w: TCP data offset below 5 or beyond the packet", ErrMalformed)
	errOptions     = fmt.Errorf("%w: TCP option whose length is 0, 1 or beyond the header", ErrMalformed)
)

// Offsets and sizes: Ethernet (RFC 894), IPv4 (RFC 791 section 3.1), TCP (RFC 9293
// section 3.1).
const (
	ethernetSize  = 14
	etherTypeAt   = 12
	etherTypeIPv4 = 0x0800

	ipv4Size        = 20
	totalLengthAt   = 2
	fragmentAt      = 6
	ttlAt           = 8
	protocolAt      = 9
	ipv4ChecksumAt  = 10
	sourceAt        = 12
	destinationAt   = 16
	moreFragments   = 0x2000
	fragmentOffset  = 0x1fff
	protocolTCP     = 6
	tcpSize         = 20
	sourcePortAt    = 0
	destPortAt      = 2
	sequenceAt      = 4
	acknowledgedAt  = 8
	dataOffsetAt    = 12
	flagsAt         = 13
	tcpChecksumAt   = 16
	maxOptionsBytes = 40
)

// Flags are the control bits of a segment (RFC 9293 section 3.1).
type Flags uint8

// The control bits.
const (
	FIN Flags = 1 << iota
	SYN
	RST
	PSH
	ACK
	URG
	ECE
	CWR
)

// Has says that all of the given flags are set.
func (f Flags) Has(all Flags) bool { return f&all == all }

// Segment is a TCP segment in the frame's buffer. What is set is written into the
// frame with its checksums at once, by difference (RFC 1624), so that a checksum
// that was wrong stays wrong.
type Segment struct {
	packet *Packet
	ip     int // length of the IPv4 header
	tcp    int // length of the TCP header
	total  int // IPv4 total length; what follows in the frame is padding
}

// parse finds the lengths, or says why there are none.
func (s *Segment) parse() error {
	frame := s.packet.Frame()
	if len(frame) < ethernetSize {
		return errShortFrame
	}
	if binary.BigEndian.Uint16(frame[etherTypeAt:]) != etherTypeIPv4 {
		return ErrNotTCP
	}
	ip := frame[ethernetSize:]
	if len(ip) < ipv4Size {
		return errShortFrame
	}
	if ip[0]>>4 != 4 {
		return errVersion
	}
	s.ip = int(ip[0]&0xf) * 4
	s.total = int(binary.BigEndian.Uint16(ip[totalLengthAt:]))
	switch {
	case s.ip < ipv4Size || s.ip > len(ip):
		return errIHL
	case s.total < s.ip || s.total > len(ip):
		return errTotalLength
	case ip[protocolAt] != protocolTCP:
		return ErrNotTCP
	case binary.BigEndian.Uint16(ip[fragmentAt:])&(moreFragments|fragmentOffset) != 0:
		return ErrFragment
	}
	tcp := ip[s.ip:s.total]
	if len(tcp) < tcpSize {
		return errShortTCP
	}
	s.tcp = int(tcp[dataOffsetAt]>>4) * 4
	if s.tcp < tcpSize || s.tcp > len(tcp) {
		return errDataOffset
	}
	return checkOptions(tcp[tcpSize:s.tcp])
}

// ipHeader is the IPv4 header with its options.
func (s *Segment) ipHeader() []byte { return s.packet.buf[ethernetSize : ethernetSize+s.ip] }

// tcpHeader is the TCP header with its options.
func (s *Segment) tcpHeader() []byte {
	at := ethernetSize + s.ip
	return s.packet.buf[at : at+s.tcp]
}

// Source is where the segment comes from.
func (s *Segment) Source() netip.AddrPort { return s.endpoint(sourceAt, sourcePortAt) }

// Destination is where the segment goes.
func (s *Segment) Destination() netip.AddrPort { return s.endpoint(destinationAt, destPortAt) }

// SetSource makes the segment come from an IPv4 address and port; it panics on
// an address that is not IPv4.
func (s *Segment) SetSource(a netip.AddrPort) { s.setEndpoint(sourceAt, sourcePortAt, a) }

// SetDestination makes the segment go to an IPv4 address and port; it panics on
// an address that is not IPv4.
func (s *Segment) SetDestination(a netip.AddrPort) { s.setEndpoint(destinationAt, destPortAt, a) }

func (s *Segment) endpoint(addrAt, portAt int) netip.AddrPort {
	return netip.AddrPortFrom(
		netip.AddrFrom4([4]byte(s.ipHeader()[addrAt:])),
		binary.BigEndian.Uint16(s.tcpHeader()[portAt:]),
	)
}

func (s *Segment) setEndpoint(addrAt, portAt int, a netip.AddrPort) {
	addr := a.Addr().As4()
	ip, tcp := s.ipHeader(), s.tcpHeader()
	// The addresses are in the IPv4 header and in the pseudo-header of TCP's checksum.
	moved := put16(ip[addrAt:], binary.BigEndian.Uint16(addr[:]))
	moved += put16(ip[addrAt+2:], binary.BigEndian.Uint16(addr[2:]))
	adjust(ip[ipv4ChecksumAt:], moved)
	moved += put16(tcp[portAt:], a.Port())
	adjust(tcp[tcpChecksumAt:], moved)
}

// Flags are the segment's control bits.
func (s *Segment) Flags() Flags { return Flags(s.tcpHeader()[flagsAt]) }

// Seq is the sequence number of the segment's first byte.
func (s *Segment) Seq() uint32 { return binary.BigEndian.Uint32(s.tcpHeader()[sequenceAt:]) }

// Ack is the sequence number that the sender expects next; it means something
// with [ACK] only.
func (s *Segment) Ack() uint32 { return binary.BigEndian.Uint32(s.tcpHeader()[acknowledgedAt:]) }

// Payload is the data of the segment, in the frame; without padding.
func (s *Segment) Payload() []byte {
	return s.packet.buf[ethernetSize+s.ip+s.tcp : ethernetSize+s.total]
}
