package l4lb

import (
	"encoding/binary"
	"math/bits"
	"net"
	"net/netip"
	"testing"

	"connlab/netlab/wire"

	"github.com/gopacket/gopacket"
	"github.com/gopacket/gopacket/layers"
	"github.com/stretchr/testify/assert"
	"github.com/stretchr/testify/require"
	"go.uber.org/goleak"
)

func TestMain(m *testing.M) { goleak.VerifyTestMain(m) }

var (
	client = ap("10.1.0.7:40000")
	vip1   = ap("10.8.0.1:6379")
	vip2   = ap("10.8.0.2:6379")
	vip3   = ap("10.8.0.3:6379")
	proxy1 = ap("10.2.0.1:6379")
	proxy2 = ap("10.2.0.2:6379")
	local1 = netip.MustParseAddr("10.3.0.1")
	local2 = netip.MustParseAddr("10.3.0.2")
)

func ap(s string) netip.AddrPort { return netip.MustParseAddrPort(s) }

// tcp is a segment to be made.
type tcp struct {
	from, to netip.AddrPort
	flags    wire.Flags
	seq, ack uint32
	payload  []byte
	options  []layers.TCPOption
}

// linuxOptions are those of a Linux client's SYN: 20 bytes.
var linuxOptions = []layers.TCPOption{
	{OptionType: layers.TCPOptionKindMSS, OptionLength: 4, OptionData: []byte{0x05, 0xb4}},
	{OptionType: layers.TCPOptionKindSACKPermitted, OptionLength: 2},
	{OptionType: layers.TCPOptionKindTimestamps, OptionLength: 10, OptionData: []byte{1, 2, 3, 4, 0, 0, 0, 0}},
	{OptionType: layers.TCPOptionKindNop, OptionLength: 1},
	{OptionType: layers.TCPOptionKindWindowScale, OptionLength: 3, OptionData: []byte{7}},
}

// marked is what a balancer makes of them: with the VIP.
func marked(kind byte, vip netip.AddrPort) []layers.TCPOption {
	a := vip.Addr().As4()
	data := append(binary.BigEndian.AppendUint16(nil, vip.Port()), a[:]...)
	return append(linuxOptions[:len(linuxOptions):len(linuxOptions)],
		layers.TCPOption{OptionType: layers.TCPOptionKind(kind), OptionLength: 8, OptionData: data})
}

func (s tcp) frame(t testing.TB) []byte {
	t.Helper()
	from, to := s.from.Addr().As4(), s.to.Addr().As4()
	ip := &layers.IPv4{Version: 4, IHL: 5, TTL: 64, Protocol: layers.IPProtocolTCP, SrcIP: from[:], DstIP: to[:]}
	segment := &layers.TCP{
		SrcPort: layers.TCPPort(s.from.Port()), DstPort: layers.TCPPort(s.to.Port()),
		Seq: s.seq, Ack: s.ack, Window: 64240, Options: s.options,
		FIN: s.flags.Has(wire.FIN), SYN: s.flags.Has(wire.SYN), RST: s.flags.Has(wire.RST),
		PSH: s.flags.Has(wire.PSH), ACK: s.flags.Has(wire.ACK), URG: s.flags.Has(wire.URG),
	}
	require.NoError(t, segment.SetNetworkLayerForChecksum(ip))
	return serialize(t, layers.EthernetTypeIPv4, ip, segment, gopacket.Payload(s.payload))
}

func serialize(t testing.TB, ether layers.EthernetType, inner ...gopacket.SerializableLayer) []byte {
	t.Helper()
	ethernet := &layers.Ethernet{
		SrcMAC: net.HardwareAddr{2, 0, 0, 0, 0, 1}, DstMAC: net.HardwareAddr{2, 0, 0, 0, 0, 2}, EthernetType: ether,
	}
	buf := gopacket.NewSerializeBuffer()
	all := append([]gopacket.SerializableLayer{ethernet}, inner...)
	require.NoError(t, gopacket.SerializeLayers(buf, gopacket.SerializeOptions{FixLengths: true, ComputeChecksums: true}, all...))
	return buf.Bytes()
}

func packet(t testing.TB, frame []byte) *wire.Packet {
	t.Helper()
	p, err := wire.NewPacket(frame)
	require.NoError(t, err)
	return p
}

func (s tcp) packet(t testing.TB) *wire.Packet {
	t.Helper()
	return packet(t, s.frame(t))
}

// read takes a frame apart again, by gopacket, and finds its checksums right.
func read(t testing.TB, frame []byte) tcp {
	t.Helper()
	p := gopacket.NewPacket(frame, layers.LayerTypeEthernet, gopacket.Default)
	require.Nil(t, p.ErrorLayer())
	if network := p.NetworkLayer(); network != nil && p.TransportLayer() != nil {
		require.NoError(t, p.TransportLayer().(*layers.TCP).SetNetworkLayerForChecksum(network))
	}
	err, wrong := p.VerifyChecksums()
	require.NoError(t, err)
	require.Empty(t, wrong, "layers with a wrong checksum")
	ip := p.Layer(layers.LayerTypeIPv4).(*layers.IPv4)
	require.LessOrEqual(t, int(ip.Length), len(frame)-14, "IPv4 total length; behind it is padding")
	seg := p.Layer(layers.LayerTypeTCP).(*layers.TCP)
	flags := wire.Flags(0)
	for flag, set := range map[wire.Flags]bool{
		wire.FIN: seg.FIN, wire.SYN: seg.SYN, wire.RST: seg.RST, wire.PSH: seg.PSH, wire.ACK: seg.ACK, wire.URG: seg.URG,
	} {
		if set {
			flags |= flag
		}
	}
	from, _ := netip.AddrFromSlice(ip.SrcIP)
	to, _ := netip.AddrFromSlice(ip.DstIP)
	return tcp{
		from:  netip.AddrPortFrom(from, uint16(seg.SrcPort)),
		to:    netip.AddrPortFrom(to, uint16(seg.DstPort)),
		flags: flags, seq: seg.Seq, ack: seg.Ack, payload: seg.Payload, options: seg.Options,
	}
}

func arp(t testing.TB) []byte {
	t.Helper()
	return serialize(t, layers.EthernetTypeARP, &layers.ARP{
		AddrType: layers.LinkTypeEthernet, Protocol: layers.EthernetTypeIPv4, HwAddressSize: 6, ProtAddressSize: 4, Operation: layers.ARPRequest,
		SourceHwAddress: make([]byte, 6), SourceProtAddress: make([]byte, 4), DstHwAddress: make([]byte, 6), DstProtAddress: make([]byte, 4),
	})
}

func udp(t testing.TB) []byte {
	t.Helper()
	to := vip1.Addr().As4()
	ip := &layers.IPv4{Version: 4, IHL: 5, TTL: 64, Protocol: layers.IPProtocolUDP, SrcIP: []byte{10, 1, 0, 7}, DstIP: to[:]}
	datagram := &layers.UDP{SrcPort: 40000, DstPort: 6379}
	require.NoError(t, datagram.SetNetworkLayerForChecksum(ip))
	return serialize(t, layers.EthernetTypeIPv4, ip, datagram, gopacket.Payload("x"))
}

// unreadable are frames of which a stage can make nothing, by what they are.
func unreadable(t testing.TB) map[string][]byte {
	t.Helper()
	fragment := tcp{from: client, to: vip1, flags: wire.ACK}.frame(t)
	fragment[14+6] |= 0x20 // more fragments
	lying := tcp{from: client, to: vip1, flags: wire.SYN, options: linuxOptions}.frame(t)
	lying[14+20+20+1] = 200 // the length of the first option
	return map[string][]byte{
		"nothing": {}, "short": {1, 2, 3}, "ARP": arp(t), "UDP": udp(t), "fragment": fragment, "lying option": lying,
	}
}

// checksums says whether the IPv4 and the TCP checksum of a frame with TCP are
// right, by adding everything up (RFC 1071).
func checksums(frame []byte) (ip, tcp bool) {
	packet := frame[14:]
	header := int(packet[0]&0xf) * 4
	total := int(binary.BigEndian.Uint16(packet[2:]))
	segment := packet[header:total]
	pseudo := append(append([]byte(nil), packet[12:20]...), 0, 6)
	pseudo = binary.BigEndian.AppendUint16(pseudo, uint16(len(segment)))
	return sum(packet[:header]) == 0xffff, sum(append(pseudo, segment...)) == 0xffff
}

func sum(b []byte) uint16 {
	var s uint32
	for i := 0; i+1 < len(b); i += 2 {
		s += uint32(binary.BigEndian.Uint16(b[i:]))
	}
	if len(b)%2 == 1 {
		s += uint32(b[len(b)-1]) << 8
	}
	for s > 0xffff {
		s = s>>16 + s&0xffff
	}
	return uint16(s)
}

func TestEndpoint(t *testing.T) {
	for _, a := range []netip.AddrPort{client, vip1, ap("255.255.255.255:65535"), ap("1.2.3.4:1")} {
		e := endpointOf(a)
		assert.Equal(t, a, e.addrPort())
		data := e.option()
		back, ok := fromOption(data[:])
		assert.True(t, ok)
		assert.Equal(t, e, back)
	}
	data := endpointOf(ap("10.8.3.4:6379")).option()
	assert.Equal(t, [6]byte{0x18, 0xeb, 10, 8, 3, 4}, data, "port, then address, in network order")
	for _, no := range [][]byte{nil, make([]byte, 5), make([]byte, 7), {0, 0, 10, 8, 0, 1}, {0x18, 0xeb, 0, 0, 0, 0}} {
		_, ok := fromOption(no)
		assert.False(t, ok, "% x", no)
	}
}

func TestOpens(t *testing.T) {
	for flags, want := range map[wire.Flags]bool{
		wire.SYN:                       true,
		wire.SYN | wire.PSH:            true,  // fast open: data with the SYN
		wire.SYN | wire.ECE | wire.CWR: true,  // asks for ECN (RFC 3168)
		wire.SYN | wire.ACK:            false, // an answer
		wire.SYN | wire.RST:            false, // a listener looks at RST first
		wire.SYN | wire.FIN:            false, // a listener drops it
		wire.ACK:                       false,
		0:                              false,
	} {
		assert.Equal(t, want, opens(flags), "flags %08b", bits.Reverse8(uint8(flags)))
	}
}
