package wire

import (
	"bytes"
	"errors"
	"net/netip"
	"slices"
	"testing"
	"time"

	"github.com/gopacket/gopacket/layers"
	"github.com/stretchr/testify/assert"
	"github.com/stretchr/testify/require"
)

// Offsets in a frame whose IPv4 header has no options.
const (
	atIP      = ethernetSize
	atTCP     = atIP + ipv4Size
	atOptions = atTCP + tcpSize
)

func TestParseRefuses(t *testing.T) {
	syn := synFrame(t)
	for _, row := range []struct {
		name  string
		frame []byte
		want  error
	}{
		{"empty", nil, errShortFrame},
		{"less than Ethernet", syn[:13], errShortFrame},
		{"Ethernet only", syn[:14], errShortFrame},
		{"ARP", arpFrame(t), ErrNotTCP},
		{"IPv6", ipv6Frame(t), ErrNotTCP},
		{"VLAN tag before IPv4", taggedFrame(t), ErrNotTCP},
		{"UDP", udpFrame(t), ErrNotTCP},
		{"fragment of UDP", with(udpFrame(t), atIP+fragmentAt, 0x20, 0), ErrNotTCP},
		{"a byte less than an IPv4 header", syn[:atTCP-1], errShortFrame},
		{"version 5", with(syn, atIP, 0x55), errVersion},
		{"IHL 4", with(syn, atIP, 0x44), errIHL},
		{"IHL beyond the frame", with(syn[:atTCP+8], atIP, 0x4f), errIHL},
		{"total length below the header's", with(syn, atIP+totalLengthAt, 0, 19), errTotalLength},
		{"total length beyond the frame", with(syn, atIP+totalLengthAt, 0, byte(len(syn)-atIP+1)), errTotalLength},
		{"frame cut off", syn[:len(syn)-1], errTotalLength},
		{"first fragment", with(syn, atIP+fragmentAt, 0x20, 0), ErrFragment},
		{"later fragment", with(syn, atIP+fragmentAt, 0, 1), ErrFragment},
		{"total length without a TCP header", with(syn, atIP+totalLengthAt, 0, 39), errShortTCP},
		{"data offset 4", with(syn, atTCP+dataOffsetAt, 0x40), errDataOffset},
		{"data offset beyond the packet", with(syn, atTCP+dataOffsetAt, 0xb0), errDataOffset},
		{"option of length 0", with(syn, atOptions, 250, 0), errOptions},
		{"option of length 1", with(syn, atOptions, 250, 1), errOptions},
		{"option beyond the header", with(syn, atOptions, 250, 21), errOptions},
		{"option with no place for a length", with(syn, atOptions+17, 1, 1, 250), errOptions},
	} {
		t.Run(row.name, func(t *testing.T) {
			p, err := NewPacket(row.frame)
			require.NoError(t, err)
			for range 2 {
				s, err := p.TCP()
				assert.Nil(t, s)
				assert.ErrorIs(t, err, row.want)
			}
			class := 0
			_, err = p.TCP()
			for _, sentinel := range []error{ErrNotTCP, ErrFragment, ErrMalformed} {
				if errors.Is(err, sentinel) {
					class++
				}
			}
			assert.Equal(t, 1, class, "exactly one of the three classes")
			assert.True(t, bytes.Equal(row.frame, p.Frame()), "parsing changes nothing")
		})
	}
}

func TestParseAccepts(t *testing.T) {
	syn := synFrame(t)
	for _, row := range []struct {
		name  string
		frame []byte
	}{
		{"SYN", syn},
		{"don't fragment is no fragment", with(syn, atIP+fragmentAt, 0x40, 0)},
		{"an option that fills the header", with(syn, atOptions, 250, 20)},
		{"end of list, then what would be a lie", with(syn, atOptions, 0, 250, 0)},
		{"padding behind the packet", slices.Concat(syn, []byte{1, 2, 3})},
		{"no options", segmentFrame(t, []byte("x"), nil)},
		{"IPv4 options", segmentFrame(t, []byte("x"), func(ip *layers.IPv4, _ *layers.TCP) {
			ip.Options = []layers.IPv4Option{{OptionType: 148, OptionLength: 4, OptionData: []byte{0, 0}}} // router alert
		})},
		{"wrong checksums", with(with(syn, atIP+ipv4ChecksumAt, 0, 0), atTCP+tcpChecksumAt, 0, 0)},
	} {
		_, s := segmentOf(t, row.frame)
		assert.Equal(t, client, s.Source(), row.name)
		assert.Equal(t, vip, s.Destination(), row.name)
	}
}

func TestAccessors(t *testing.T) {
	_, s := segmentOf(t, append(dataFrame(t, []byte("payload")), "padding"...))
	assert.Equal(t, client, s.Source())
	assert.Equal(t, vip, s.Destination())
	assert.Equal(t, uint32(0x01020304), s.Seq())
	assert.Equal(t, uint32(0x0a0b0c0d), s.Ack())
	assert.Equal(t, PSH|ACK, s.Flags())
	assert.True(t, s.Flags().Has(ACK))
	assert.True(t, s.Flags().Has(PSH|ACK))
	assert.False(t, s.Flags().Has(SYN|ACK))
	assert.Equal(t, "payload", string(s.Payload()), "without what follows the packet")

	_, s = segmentOf(t, synFrame(t))
	assert.Equal(t, SYN, s.Flags())
	assert.Empty(t, s.Payload())
}

func TestFlagsAreTheKernelsBits(t *testing.T) {
	frame := synFrame(t)
	for bit, set := range map[Flags]func(*layers.TCP) bool{
		FIN: func(l *layers.TCP) bool { return l.FIN },
		SYN: func(l *layers.TCP) bool { return l.SYN },
		RST: func(l *layers.TCP) bool { return l.RST },
		PSH: func(l *layers.TCP) bool { return l.PSH },
		ACK: func(l *layers.TCP) bool { return l.ACK },
		URG: func(l *layers.TCP) bool { return l.URG },
		ECE: func(l *layers.TCP) bool { return l.ECE },
		CWR: func(l *layers.TCP) bool { return l.CWR },
	} {
		frame[atTCP+flagsAt] = byte(bit)
		assert.True(t, set(decodedTCP(t, frame)), "%#x", bit)
		_, s := segmentOf(t, frame)
		assert.Equal(t, bit, s.Flags())
	}
}

func TestRewrite(t *testing.T) {
	for name, frame := range map[string][]byte{
		"SYN": synFrame(t), "SYN-ACK": synAckFrame(t), "data": dataFrame(t, []byte("odd")), "padded": append(synFrame(t), 9),
	} {
		p, s := segmentOf(t, frame)
		s.SetDestination(proxy)
		s.SetSource(vip)
		assert.Equal(t, vip, s.Source(), name)
		assert.Equal(t, proxy, s.Destination(), name)
		assert.True(t, checksumsOf(t, p.Frame()).valid(), name)
		assert.Len(t, p.Frame(), len(frame), name)

		s.SetDestination(vip)
		s.SetSource(client)
		assert.Equal(t, frame, slices.Clone(p.Frame()), "%s: there and back", name)
	}
}

func TestOnlyIPv4IsWritten(t *testing.T) {
	p, s := segmentOf(t, synFrame(t))
	assert.Panics(t, func() { s.SetSource(netip.MustParseAddrPort("[fe80::1]:1")) })
	assert.Equal(t, synFrame(t), slices.Clone(p.Frame()))
	mapped := netip.AddrPortFrom(netip.MustParseAddr("::ffff:10.77.0.9"), 6380)
	s.SetSource(mapped)
	assert.Equal(t, proxy, s.Source(), "an IPv4 address in IPv6's clothes is one")
}

func TestHoldAddsUp(t *testing.T) {
	p, err := NewPacket(nil)
	require.NoError(t, err)
	p.Hold(2 * time.Millisecond)
	p.Hold(-time.Second)
	p.Hold(time.Millisecond)
	assert.Equal(t, 3*time.Millisecond, p.hold, "and never less")
	for range 3 {
		p.Hold(1<<63 - 1)
	}
	assert.Equal(t, time.Duration(maxHold), p.hold, "and does not wrap around")
}

func TestNewPacketCopies(t *testing.T) {
	frame := synFrame(t)
	p, s := segmentOf(t, frame)
	s.SetSource(vip)
	assert.Equal(t, synFrame(t), frame)
	assert.NotEqual(t, frame, p.Frame())

	_, err := NewPacket(make([]byte, frameSize))
	assert.EqualError(t, err, "a frame of 2048 bytes: the longest has 2047")
}
