package twrecycle

import (
	"encoding/binary"

	"connlab/netlab/wire"
)

// Clock is the clock of a client host's TCP timestamps, as two stages of the wire to
// it: so much ahead of the kernel's own, with which hosts on one machine all begin.
// The host must have one clock for all its connections, net.ipv4.tcp_timestamps=2:
// with 1 the kernel adds a random offset that hides this one.
type Clock struct{ ahead uint32 }

// NewClock is a clock that is so many ticks ahead, on the circle of 32 bits, so that
// half of it is behind. A tick of Linux is a millisecond (TCP_TS_HZ, include/net/tcp.h).
func NewClock(ahead uint32) *Clock { return &Clock{ahead} }

// Leaving is the stage of packets from the host: TSval is later by the difference.
func (c *Clock) Leaving(p *wire.Packet) wire.Verdict {
	if seg, err := p.TCP(); err == nil {
		shift(p, seg, 0, c.ahead)
	}
	return wire.Forward
}

// Entering is the stage of packets to the host: TSecr, the echo of its timestamps, is
// earlier by it, except in a segment without ACK, whose echo means nothing (RFC 7323
// section 3.2).
func (c *Clock) Entering(p *wire.Packet) wire.Verdict {
	if seg, err := p.TCP(); err == nil && seg.Flags().Has(wire.ACK) {
		shift(p, seg, 4, -c.ahead)
	}
	return wire.Forward
}

// shift adds to one half of the timestamps option, TSval at 0 or TSecr at 4, and to
// the TCP checksum the difference that this makes of the options (RFC 1624 equation
// 3). They are summed as a whole: the option may begin in the middle of a word.
func shift(p *wire.Packet, seg *wire.Segment, half int, by uint32) {
	data, has := seg.Option(optionTimestamps)
	if !has || len(data) != 8 {
		return
	}
	const ethernet, dataOffset, checksum, fixed = 14, 12, 16, 20
	frame := p.Frame()
	header := frame[ethernet+int(frame[ethernet]&0xf)*4:]
	options := header[fixed : header[dataOffset]>>4*4]

	before := onesSum(options)
	value := data[half : half+4]
	binary.BigEndian.PutUint32(value, binary.BigEndian.Uint32(value)+by)
	sum := fold(uint32(^binary.BigEndian.Uint16(header[checksum:])) + uint32(^before) + uint32(onesSum(options)))
	binary.BigEndian.PutUint16(header[checksum:], ^sum)
}

// onesSum is the sum of 16-bit words in ones' complement. The length of b is even.
func onesSum(b []byte) uint16 {
	var sum uint32
	for ; len(b) > 0; b = b[2:] {
		sum += uint32(binary.BigEndian.Uint16(b))
	}
	return fold(sum)
}

// fold adds the carries in.
func fold(sum uint32) uint16 {
	sum = sum&0xffff + sum>>16
	return uint16(sum + sum>>16)
}
