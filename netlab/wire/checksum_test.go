package wire

import (
	"encoding/binary"
	"math/rand/v2"
	"net/netip"
	"testing"

	"github.com/gopacket/gopacket/layers"
	"github.com/stretchr/testify/assert"
	"github.com/stretchr/testify/require"
)

// randomFrame is a segment with right checksums; its lengths are often odd.
func randomFrame(t testing.TB, r *rand.Rand) []byte {
	payload := make([]byte, r.IntN(1400))
	for i := range payload {
		payload[i] = byte(r.Uint32())
	}
	return segmentFrame(t, payload, func(ip *layers.IPv4, tcp *layers.TCP) {
		ip.Id, ip.TTL = uint16(r.Uint32()), uint8(1+r.IntN(255))
		ip.SrcIP, ip.DstIP = randomAddr(r).AsSlice(), randomAddr(r).AsSlice()
		tcp.SrcPort, tcp.DstPort = layers.TCPPort(r.Uint32()), layers.TCPPort(r.Uint32())
		tcp.Seq, tcp.Ack, tcp.Window = r.Uint32(), r.Uint32(), uint16(r.Uint32())
		tcp.SYN, tcp.PSH, tcp.FIN = r.IntN(2) == 0, r.IntN(2) == 0, r.IntN(2) == 0
		if n := r.IntN(25); n >= 2 { // gopacket pads it with end of list
			tcp.Options = []layers.TCPOption{{OptionType: 77, OptionLength: uint8(n), OptionData: payloadOf(r, n-2)}}
		}
		if r.IntN(4) == 0 {
			ip.Options = []layers.IPv4Option{{OptionType: 148, OptionLength: 4, OptionData: payloadOf(r, 2)}}
		}
	})
}

func payloadOf(r *rand.Rand, n int) []byte {
	b := make([]byte, n)
	for i := range b {
		b[i] = byte(r.Uint32())
	}
	return b
}

func randomAddr(r *rand.Rand) netip.Addr { return netip.AddrFrom4([4]byte(payloadOf(r, 4))) }

func randomEndpoint(r *rand.Rand) netip.AddrPort {
	return netip.AddrPortFrom(randomAddr(r), uint16(r.Uint32()))
}

// rewriteAtRandom does to a segment what stages may do, and a hop on top.
func rewriteAtRandom(t testing.TB, r *rand.Rand, p *Packet) {
	s, err := p.TCP()
	require.NoError(t, err)
	for range 1 + r.IntN(4) {
		switch r.IntN(4) {
		case 0:
			s.SetSource(randomEndpoint(r))
		case 1:
			s.SetDestination(randomEndpoint(r))
		case 2:
			if err := s.AddOption(byte(2+r.IntN(254)), payloadOf(r, r.IntN(12))); err != nil {
				require.ErrorIs(t, err, ErrNoRoom)
			}
		case 3:
			to := [4]byte(p.Frame()[atIP+destinationAt:])
			if route([6]byte{}, map[[4]byte][6]byte{to: {}})(p) != Forward {
				require.LessOrEqual(t, p.Frame()[atIP+ttlAt], byte(1))
			}
		}
	}
}

// By difference and from all the bytes it comes to the same, to the bit: 0x0000
// and 0xffff are not confused.
func TestChecksumsByDifferenceAreRight(t *testing.T) {
	r := rand.New(rand.NewPCG(1, 2))
	for i := range 10_000 {
		p, err := NewPacket(randomFrame(t, r))
		require.NoError(t, err)
		rewriteAtRandom(t, r, p)
		c := checksumsOf(t, p.Frame())
		require.Equal(t, c.ip.Correct, c.ip.Actual, "packet %d, IPv4", i)
		require.Equal(t, c.tcp.Correct, c.tcp.Actual, "packet %d, TCP", i)
	}
}

// excess is by how much, in one's complement, a checksum is wrong.
func excess(correct, actual uint32) uint32 { return (actual + 0xffff - correct) % 0xffff }

func TestCorruptStaysCorrupt(t *testing.T) {
	r := rand.New(rand.NewPCG(3, 4))
	corrupt := 0
	for i := range 5_000 {
		frame := randomFrame(t, r)
		// Anywhere but where the parser would see it: addresses and ports, sequence
		// numbers, window, urgent pointer and checksums.
		words := []int{
			atIP + ipv4ChecksumAt, atIP + sourceAt, atIP + destinationAt + 2, atIP + 4,
		}
		tcp := atIP + int(frame[atIP]&0xf)*4
		words = append(words, tcp+sourcePortAt, tcp+sequenceAt, tcp+14, tcp+tcpChecksumAt, tcp+18)
		at := words[r.IntN(len(words))]
		frame[at] ^= 1 << r.IntN(8)
		before := checksumsOf(t, frame)
		if !before.valid() {
			corrupt++
		}

		p, err := NewPacket(frame)
		require.NoError(t, err)
		rewriteAtRandom(t, r, p)
		after := checksumsOf(t, p.Frame())
		require.Equal(t, excess(before.ip.Correct, before.ip.Actual), excess(after.ip.Correct, after.ip.Actual), "packet %d, IPv4", i)
		require.Equal(t, excess(before.tcp.Correct, before.tcp.Actual), excess(after.tcp.Correct, after.tcp.Actual), "packet %d, TCP", i)
		require.Equal(t, before.tcp.Valid, after.tcp.Valid)
		require.Equal(t, before.ip.Valid, after.ip.Valid)
	}
	assert.Equal(t, 5_000, corrupt, "one flipped bit is always seen")
}

// Checksums that come out as 0x0000, start as it, or arrive as its other
// spelling 0xffff, which every receiver takes for right (RFC 1624 section 3).
func TestChecksumZero(t *testing.T) {
	frame := dataFrame(t, []byte("0123456789abcde"))
	last := len(frame) - 3 // an even offset from the TCP header
	require.Zero(t, (last-atTCP)%2)
	// zeroed is the frame with the payload word that makes the TCP checksum 0x0000
	// once it goes to that destination.
	zeroed := func(to netip.AddrPort) []byte {
		p, s := segmentOf(t, frame)
		s.SetDestination(to)
		c := checksumsOf(t, p.Frame()).tcp.Correct
		word := uint32(binary.BigEndian.Uint16(frame[last:])) + c
		word = word&0xffff + word>>16
		return corrected(t, with(frame, last, byte(word>>8), byte(word)))
	}
	tcpChecksum := func(frame []byte) uint16 { return binary.BigEndian.Uint16(frame[atTCP+tcpChecksumAt:]) }

	p, s := segmentOf(t, zeroed(proxy))
	require.NotZero(t, tcpChecksum(p.Frame()))
	s.SetDestination(proxy)
	assert.Equal(t, uint16(0), tcpChecksum(p.Frame()), "becomes 0x0000")
	assert.True(t, checksumsOf(t, p.Frame()).valid())

	p, s = segmentOf(t, zeroed(vip))
	require.Equal(t, uint16(0), tcpChecksum(p.Frame()))
	s.SetDestination(proxy)
	c := checksumsOf(t, p.Frame())
	assert.Equal(t, c.tcp.Correct, c.tcp.Actual, "was 0x0000")
	s.SetDestination(vip)
	assert.Equal(t, uint16(0), tcpChecksum(p.Frame()), "and is again")

	p, s = segmentOf(t, with(zeroed(vip), atTCP+tcpChecksumAt, 0xff, 0xff))
	require.True(t, checksumsOf(t, p.Frame()).valid(), "0xffff arrives")
	s.SetDestination(vip)
	assert.True(t, checksumsOf(t, p.Frame()).valid(), "nothing changed")
	s.SetDestination(proxy)
	require.NoError(t, s.AddOption(kindTOA, toa))
	assert.True(t, checksumsOf(t, p.Frame()).valid())
}
