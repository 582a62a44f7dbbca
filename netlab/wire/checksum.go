package wire

import "encoding/binary"

// The Internet checksum by difference, RFC 1624 equation 3: HC' = ~(~HC + ~m + m').
// Differences ~m + m' of several words add up; each function here returns such
// a sum, which 32 bits hold for far more words than a header has.

// put16 writes a word and returns its difference.
func put16(b []byte, word uint16) uint32 {
	moved := uint32(^binary.BigEndian.Uint16(b)) + uint32(word)
	binary.BigEndian.PutUint16(b, word)
	return moved
}

// removed is the difference of words that are no longer there, ~m each. The
// length of b is even.
func removed(b []byte) (moved uint32) {
	for ; len(b) > 0; b = b[2:] {
		moved += uint32(^binary.BigEndian.Uint16(b))
	}
	return moved
}

// added is the difference of words that are new, m' each. The length of b is even.
func added(b []byte) (moved uint32) {
	for ; len(b) > 0; b = b[2:] {
		moved += uint32(binary.BigEndian.Uint16(b))
	}
	return moved
}

// adjust makes the checksum at the start of b that of the changed words.
func adjust(b []byte, moved uint32) {
	sum := uint32(^binary.BigEndian.Uint16(b)) + moved
	sum = sum&0xffff + sum>>16
	sum = sum&0xffff + sum>>16
	binary.BigEndian.PutUint16(b, ^uint16(sum))
}
