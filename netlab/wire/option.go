package wire

import (
	"encoding/binary"
	"errors"
)

// Why an option cannot be added.
var (
	// ErrNoRoom is a header that would have more than 40 bytes of options: the data
	// offset has four bits (RFC 9293 section 3.1).
	ErrNoRoom = errors.New("no room for the option in the TCP header")
	// ErrTooBig is a packet that would exceed the MTU.
	ErrTooBig = errors.New("the option would make the packet exceed the MTU")

	errKind = errors.New("option kinds 0 and 1 carry no data")
)

// The two options of one byte (RFC 9293 section 3.2).
const (
	optionEnd = 0
	optionNOP = 1
)

// nextOption returns the option at the start of b and the bytes it takes; n is 0
// at the end of the list, and negative when its length is a lie.
func nextOption(b []byte) (kind byte, data []byte, n int) {
	switch {
	case len(b) == 0 || b[0] == optionEnd:
		return optionEnd, nil, 0
	case b[0] == optionNOP:
		return optionNOP, nil, 1
	case len(b) < 2 || b[1] < 2 || int(b[1]) > len(b):
		return b[0], nil, -1
	}
	return b[0], b[2:b[1]:b[1]], int(b[1])
}

func checkOptions(b []byte) error {
	for {
		_, _, n := nextOption(b)
		switch {
		case n < 0:
			return errOptions
		case n == 0:
			return nil
		}
		b = b[n:]
	}
}

// Option is the first option of that kind: its data, in the frame, without kind
// and length. Kinds 0 (end of list) and 1 (no operation) have none and are never
// found.
func (s *Segment) Option(kind byte) (data []byte, ok bool) {
	b := s.tcpHeader()[tcpSize:]
	for {
		k, data, n := nextOption(b)
		if n <= 0 {
			return nil, false
		}
		if k == kind && k != optionNOP {
			return data, true
		}
		b = b[n:]
	}
}

// AddOption puts an option after the last, padded with no-operations to whole
// 32-bit words, and makes data offset, total length and checksums right. On an
// error the frame is unchanged: [ErrNoRoom], [ErrTooBig], or a kind below 2.
// What was sliced from the frame before has moved.
func (s *Segment) AddOption(kind byte, data []byte) error {
	if kind <= optionNOP {
		return errKind
	}
	options := s.tcpHeader()[tcpSize:]
	used := 0
	for {
		_, _, n := nextOption(options[used:])
		if n <= 0 {
			break // an end of list and its padding give way: nobody reads on behind them
		}
		used += n
	}
	size := max(len(options), (used+2+len(data)+3)&^3)
	if size > maxOptionsBytes {
		return ErrNoRoom
	}
	p, grow := s.packet, size-len(options)
	if s.total+grow > p.mtu || p.size+grow > len(p.buf) {
		return ErrTooBig
	}
	// Checksums go by 16-bit words: begin at one. What follows the header moves
	// by whole words and adds up to the same.
	from := tcpSize + used&^1
	moved := removed(s.tcpHeader()[from:])
	end := ethernetSize + s.ip + s.tcp
	copy(p.buf[end+grow:p.size+grow], p.buf[end:p.size])
	p.size += grow
	s.tcp += grow
	s.total += grow

	ip, tcp := s.ipHeader(), s.tcpHeader()
	option := tcp[tcpSize+used:]
	option[0], option[1] = kind, byte(2+len(data))
	padding := option[2+copy(option[2:], data):]
	for i := range padding {
		padding[i] = optionNOP
	}
	moved += added(tcp[from:])
	offset := binary.BigEndian.Uint16(tcp[dataOffsetAt:])
	moved += put16(tcp[dataOffsetAt:], offset+uint16(grow/4)<<12)
	moved += uint32(grow) // the length in the pseudo-header
	adjust(tcp[tcpChecksumAt:], moved)
	adjust(ip[ipv4ChecksumAt:], put16(ip[totalLengthAt:], uint16(s.total)))
	return nil
}
