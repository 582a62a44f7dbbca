package wire

import (
	"fmt"
	"time"
)

// frameSize has room for the longest frame of a 1,500-byte MTU (1,514 bytes, 1,518
// with a VLAN tag) and for what a stage adds; one that fills it was longer.
const frameSize = 2048

// DefaultMTU is the longest IPv4 packet, in bytes, to which an option can make one
// grow where nothing else is said: Ethernet's (RFC 894).
const DefaultMTU = 1500

// Verdict is what a stage says of a packet.
type Verdict uint8

const (
	// Forward is to the next stage, and out after the last.
	Forward Verdict = iota
	// Drop ends the packet's way here, counted in [Counts].Dropped.
	Drop
	// The rest are for the wire's own stages.
	lost
	unroutable
	ignored
	expired
)

// Stage sees each packet of one direction in turn, on the wire's own thread: it
// must not block, and p is not its own after it returns.
type Stage func(p *Packet) Verdict

// Packet is one Ethernet frame on its way, without preamble and check sequence, in
// a buffer with room to grow.
type Packet struct {
	size int
	mtu  int
	hold time.Duration

	seg    Segment
	err    error
	parsed bool

	buf [frameSize]byte
}

// NewPacket is a packet that came over no wire, for tests and tools: it copies the
// frame. A stage treats it as any other; its MTU is [DefaultMTU]. The error is a
// frame that fits no buffer.
func NewPacket(frame []byte) (*Packet, error) {
	if len(frame) >= frameSize {
		return nil, fmt.Errorf("a frame of %d bytes: the longest has %d", len(frame), frameSize-1)
	}
	p := new(Packet)
	p.reset(copy(p.buf[:], frame), DefaultMTU)
	return p, nil
}

// reset makes p what has just been read into its buffer.
func (p *Packet) reset(size, mtu int) {
	p.size, p.mtu, p.hold, p.parsed = size, mtu, 0, false
}

// Frame is the whole Ethernet frame, in the packet's own buffer: what is written
// to it leaves as written, without new checksums. After [Packet.TCP] the lengths
// in it must stay as they were.
func (p *Packet) Frame() []byte { return p.buf[:p.size] }

// maxHold keeps a due time from overflowing.
const maxHold = 1 << 62

// Hold lets the packet leave d later than it would; over stages it adds up. A
// packet that is held longer than its successors is overtaken by them. Time does
// not go backwards: a negative d is none.
func (p *Packet) Hold(d time.Duration) {
	p.hold += min(max(0, d), maxHold-p.hold)
}

// TCP is the TCP segment in the frame: parsed, or again what was parsed. Errors
// are [ErrNotTCP], [ErrFragment] and [ErrMalformed], the last wrapped with what is
// wrong. Checksums are not looked at: a segment that arrived corrupt leaves so,
// for its receiver to see.
func (p *Packet) TCP() (*Segment, error) {
	if !p.parsed {
		p.parsed = true
		p.seg = Segment{packet: p}
		p.err = p.seg.parse()
	}
	if p.err != nil {
		return nil, p.err
	}
	return &p.seg, nil
}
