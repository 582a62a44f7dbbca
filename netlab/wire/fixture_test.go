package wire

import (
	"net"
	"net/netip"
	"slices"
	"testing"

	"github.com/gopacket/gopacket"
	"github.com/gopacket/gopacket/layers"
	"github.com/stretchr/testify/require"
)

var (
	client = netip.MustParseAddrPort("10.77.0.1:40001")
	vip    = netip.MustParseAddrPort("10.8.3.4:6379")
	proxy  = netip.MustParseAddrPort("10.77.0.9:6380")

	macA = net.HardwareAddr{2, 0, 10, 77, 0, 1}
	macB = net.HardwareAddr{2, 0, 10, 77, 0, 2}
)

// serialized is a frame of these layers with right lengths and checksums.
func serialized(t testing.TB, parts ...gopacket.SerializableLayer) []byte {
	t.Helper()
	b := gopacket.NewSerializeBuffer()
	require.NoError(t, gopacket.SerializeLayers(b, gopacket.SerializeOptions{FixLengths: true, ComputeChecksums: true}, parts...))
	return b.Bytes()
}

func ethernet(kind layers.EthernetType) *layers.Ethernet {
	return &layers.Ethernet{SrcMAC: macA, DstMAC: macB, EthernetType: kind}
}

func ipv4(protocol layers.IPProtocol) *layers.IPv4 {
	return &layers.IPv4{
		Version: 4, TTL: 64, Id: 7, Protocol: protocol,
		SrcIP: client.Addr().AsSlice(), DstIP: vip.Addr().AsSlice(),
	}
}

// segmentFrame is a TCP segment from client to vip.
func segmentFrame(t testing.TB, payload []byte, edit func(*layers.IPv4, *layers.TCP)) []byte {
	t.Helper()
	ip := ipv4(layers.IPProtocolTCP)
	tcp := &layers.TCP{
		SrcPort: layers.TCPPort(client.Port()), DstPort: layers.TCPPort(vip.Port()),
		Seq: 0x01020304, Ack: 0x0a0b0c0d, Window: 64240, ACK: true,
	}
	if edit != nil {
		edit(ip, tcp)
	}
	require.NoError(t, tcp.SetNetworkLayerForChecksum(ip))
	frame := serialized(t, ethernet(layers.EthernetTypeIPv4), ip, tcp, gopacket.Payload(payload))
	return frame[:ethernetSize+int(ip.Length)] // gopacket pads to 60 bytes; a TAP device does not
}

// linuxOptions are those of a SYN from Linux.
func linuxOptions() []layers.TCPOption {
	return []layers.TCPOption{
		{OptionType: layers.TCPOptionKindMSS, OptionLength: 4, OptionData: []byte{0x05, 0xb4}},
		{OptionType: layers.TCPOptionKindSACKPermitted, OptionLength: 2},
		{OptionType: layers.TCPOptionKindTimestamps, OptionLength: 10, OptionData: []byte{1, 2, 3, 4, 0, 0, 0, 0}},
		{OptionType: layers.TCPOptionKindNop, OptionLength: 1},
		{OptionType: layers.TCPOptionKindWindowScale, OptionLength: 3, OptionData: []byte{7}},
	}
}

func synFrame(t testing.TB) []byte {
	return segmentFrame(t, nil, func(_ *layers.IPv4, tcp *layers.TCP) {
		tcp.SYN, tcp.ACK, tcp.Ack, tcp.Options = true, false, 0, linuxOptions()
	})
}

func synAckFrame(t testing.TB) []byte {
	return segmentFrame(t, nil, func(_ *layers.IPv4, tcp *layers.TCP) {
		tcp.SYN, tcp.Options = true, linuxOptions()
	})
}

func dataFrame(t testing.TB, payload []byte) []byte {
	return segmentFrame(t, payload, func(_ *layers.IPv4, tcp *layers.TCP) {
		tcp.PSH = true
		tcp.Options = []layers.TCPOption{
			{OptionType: layers.TCPOptionKindNop, OptionLength: 1},
			{OptionType: layers.TCPOptionKindNop, OptionLength: 1},
			{OptionType: layers.TCPOptionKindTimestamps, OptionLength: 10, OptionData: []byte{1, 2, 3, 4, 5, 6, 7, 8}},
		}
	})
}

func udpFrame(t testing.TB) []byte {
	ip := ipv4(layers.IPProtocolUDP)
	udp := &layers.UDP{SrcPort: 9, DstPort: 10}
	require.NoError(t, udp.SetNetworkLayerForChecksum(ip))
	return serialized(t, ethernet(layers.EthernetTypeIPv4), ip, udp, gopacket.Payload("datagram"))
}

func arpFrame(t testing.TB) []byte {
	return serialized(t, ethernet(layers.EthernetTypeARP), &layers.ARP{
		AddrType: layers.LinkTypeEthernet, Protocol: layers.EthernetTypeIPv4, HwAddressSize: 6, ProtAddressSize: 4,
		Operation: layers.ARPRequest, SourceHwAddress: macA, SourceProtAddress: client.Addr().AsSlice(),
		DstHwAddress: make([]byte, 6), DstProtAddress: vip.Addr().AsSlice(),
	})
}

func ipv6Frame(t testing.TB) []byte {
	ip := &layers.IPv6{
		Version: 6, HopLimit: 64, NextHeader: layers.IPProtocolTCP,
		SrcIP: net.ParseIP("fe80::1"), DstIP: net.ParseIP("fe80::2"),
	}
	tcp := &layers.TCP{SrcPort: 1, DstPort: 2, SYN: true}
	require.NoError(t, tcp.SetNetworkLayerForChecksum(ip))
	return serialized(t, ethernet(layers.EthernetTypeIPv6), ip, tcp)
}

func taggedFrame(t testing.TB) []byte {
	ip := ipv4(layers.IPProtocolTCP)
	tcp := &layers.TCP{SrcPort: 1, DstPort: 2, SYN: true}
	require.NoError(t, tcp.SetNetworkLayerForChecksum(ip))
	return serialized(t, ethernet(layers.EthernetTypeDot1Q),
		&layers.Dot1Q{VLANIdentifier: 5, Type: layers.EthernetTypeIPv4}, ip, tcp)
}

// with is a copy of a frame with some bytes at an offset changed.
func with(frame []byte, at int, bytes ...byte) []byte {
	c := slices.Clone(frame)
	copy(c[at:], bytes)
	return c
}

// segmentOf is the segment in a frame that has one.
func segmentOf(t testing.TB, frame []byte) (*Packet, *Segment) {
	t.Helper()
	p, err := NewPacket(frame)
	require.NoError(t, err)
	s, err := p.TCP()
	require.NoError(t, err)
	return p, s
}

// checksums are both checksums of a frame with TCP in it, as they stand there and
// as gopacket computes them from all the bytes.
type checksums struct {
	ip, tcp gopacket.ChecksumVerificationResult
}

func (c checksums) valid() bool { return c.ip.Valid && c.tcp.Valid }

func checksumsOf(t testing.TB, frame []byte) checksums {
	t.Helper()
	decoded := gopacket.NewPacket(frame, layers.LayerTypeEthernet, gopacket.Default)
	ip, ok := decoded.Layer(layers.LayerTypeIPv4).(*layers.IPv4)
	require.True(t, ok, "gopacket finds IPv4: %v", decoded)
	tcp, ok := decoded.Layer(layers.LayerTypeTCP).(*layers.TCP)
	require.True(t, ok, "gopacket finds TCP: %v", decoded)
	require.NoError(t, tcp.SetNetworkLayerForChecksum(ip))
	var c checksums
	var err error
	err, c.ip = ip.VerifyChecksum()
	require.NoError(t, err)
	err, c.tcp = tcp.VerifyChecksum()
	require.NoError(t, err)
	return c
}

// decodedTCP is what gopacket makes of a frame.
func decodedTCP(t testing.TB, frame []byte) *layers.TCP {
	t.Helper()
	decoded := gopacket.NewPacket(frame, layers.LayerTypeEthernet, gopacket.Default)
	require.Nil(t, decoded.ErrorLayer())
	tcp, ok := decoded.Layer(layers.LayerTypeTCP).(*layers.TCP)
	require.True(t, ok)
	return tcp
}
