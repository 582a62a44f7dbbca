package twrecycle

import (
	"encoding/binary"
	"net"
	"net/netip"
	"testing"
	"time"

	"connlab/netlab/wire"

	"github.com/gopacket/gopacket"
	"github.com/gopacket/gopacket/layers"
	"github.com/stretchr/testify/require"
)

const (
	syn    = wire.SYN
	ack    = wire.ACK
	fin    = wire.FIN | wire.ACK
	rst    = wire.RST
	synAck = wire.SYN | wire.ACK
)

var (
	server = ap("10.2.0.1:6379")
	nat    = ap("10.1.0.7:40000") // the address that clients share
	later  = ap("10.1.0.7:40001")
)

func ap(s string) netip.AddrPort { return netip.MustParseAddrPort(s) }

// Where both sides begin to count: the first byte after the SYN.
const (
	clientSeq = 1001
	serverSeq = 5001
)

// timestamps is the option with a TSval, as a list.
func timestamps(value uint32) []layers.TCPOption {
	data := binary.BigEndian.AppendUint32(nil, value)
	return []layers.TCPOption{{OptionType: layers.TCPOptionKindTimestamps, OptionLength: 10, OptionData: append(data, 0, 0, 0, 0)}}
}

// segment is a segment to be made.
type segment struct {
	from, to netip.AddrPort
	flags    wire.Flags
	seq, ack uint32
	payload  int
	options  []layers.TCPOption
}

func (s segment) frame(t testing.TB) []byte {
	t.Helper()
	from, to := s.from.Addr().As4(), s.to.Addr().As4()
	ip := &layers.IPv4{Version: 4, TTL: 64, Protocol: layers.IPProtocolTCP, SrcIP: from[:], DstIP: to[:]}
	tcp := &layers.TCP{
		SrcPort: layers.TCPPort(s.from.Port()), DstPort: layers.TCPPort(s.to.Port()),
		Seq: s.seq, Ack: s.ack, Window: 64240, Options: s.options,
		FIN: s.flags.Has(wire.FIN), SYN: s.flags.Has(wire.SYN), RST: s.flags.Has(wire.RST),
		ACK: s.flags.Has(wire.ACK), ECE: s.flags.Has(wire.ECE), CWR: s.flags.Has(wire.CWR),
	}
	require.NoError(t, tcp.SetNetworkLayerForChecksum(ip))
	mac := net.HardwareAddr{2, 0, 0, 0, 0, 1}
	ethernet := &layers.Ethernet{SrcMAC: mac, DstMAC: mac, EthernetType: layers.EthernetTypeIPv4}
	buf := gopacket.NewSerializeBuffer()
	require.NoError(t, gopacket.SerializeLayers(buf, gopacket.SerializeOptions{FixLengths: true, ComputeChecksums: true},
		ethernet, ip, tcp, gopacket.Payload(make([]byte, s.payload))))
	return buf.Bytes()
}

func packet(t testing.TB, frame []byte) *wire.Packet {
	t.Helper()
	p, err := wire.NewPacket(frame)
	require.NoError(t, err)
	return p
}

// rig is a server host whose clock a test sets. The clock begins at a whole second.
type rig struct {
	*Server
	t   testing.TB
	now time.Time
}

func newRig(t testing.TB) *rig {
	r := &rig{Server: New(), t: t, now: time.Unix(1_000_000, 0)}
	r.Server.now = func() time.Time { return r.now }
	return r
}

// in is a segment of a client.
func (r *rig) in(from netip.AddrPort, flags wire.Flags, seq, ack uint32, options []layers.TCPOption) wire.Verdict {
	r.t.Helper()
	return r.Entering(packet(r.t, segment{from: from, to: server, flags: flags, seq: seq, ack: ack, options: options}.frame(r.t)))
}

// out is a segment of the server.
func (r *rig) out(to netip.AddrPort, flags wire.Flags, seq, ack uint32) {
	r.t.Helper()
	p := packet(r.t, segment{from: server, to: to, flags: flags, seq: seq, ack: ack, options: timestamps(77)}.frame(r.t))
	require.Equal(r.t, wire.Forward, r.Leaving(p), "what leaves is never dropped")
}

// asks is what becomes of a SYN.
func (r *rig) asks(from netip.AddrPort, options []layers.TCPOption) wire.Verdict {
	r.t.Helper()
	return r.in(from, syn, clientSeq-1, 0, options)
}

// connects is a whole handshake.
func (r *rig) connects(from netip.AddrPort, options []layers.TCPOption) {
	r.t.Helper()
	require.Equal(r.t, wire.Forward, r.asks(from, options), "the SYN of %s", from)
	r.out(from, synAck, serverSeq-1, clientSeq)
	require.Equal(r.t, wire.Forward, r.in(from, ack, clientSeq, serverSeq, options))
}

// serverCloses is the end of a connection that the server closes first.
func (r *rig) serverCloses(from netip.AddrPort, options []layers.TCPOption) {
	r.t.Helper()
	r.out(from, fin, serverSeq, clientSeq)
	require.Equal(r.t, wire.Forward, r.in(from, fin, clientSeq, serverSeq+1, options))
	r.out(from, ack, serverSeq+1, clientSeq+1)
}

// served is a connection from SYN to TIME_WAIT.
func (r *rig) served(from netip.AddrPort, value uint32) {
	r.t.Helper()
	r.connects(from, timestamps(value))
	r.serverCloses(from, timestamps(value))
}
