package twrecycle

import (
	"bytes"
	"context"
	"encoding/binary"
	"io"
	"math/rand/v2"
	"net"
	"net/netip"
	"sync"
	"testing"
	"time"

	"connlab/netlab"
	"connlab/netlab/wire"

	"github.com/gopacket/gopacket"
	"github.com/gopacket/gopacket/layers"
	"github.com/stretchr/testify/assert"
	"github.com/stretchr/testify/require"
)

// both is the timestamps option with TSval and TSecr.
func both(value, echo uint32) layers.TCPOption {
	data := binary.BigEndian.AppendUint32(binary.BigEndian.AppendUint32(nil, value), echo)
	return layers.TCPOption{OptionType: layers.TCPOptionKindTimestamps, OptionLength: 10, OptionData: data}
}

// checksumHolds says whether the TCP checksum of a frame is right, by gopacket.
func checksumHolds(t testing.TB, frame []byte) bool {
	t.Helper()
	p := gopacket.NewPacket(frame, layers.LayerTypeEthernet, gopacket.Default)
	require.Nil(t, p.ErrorLayer())
	require.NoError(t, p.TransportLayer().(*layers.TCP).SetNetworkLayerForChecksum(p.NetworkLayer()))
	err, wrong := p.VerifyChecksums()
	require.NoError(t, err)
	return len(wrong) == 0
}

func TestClock(t *testing.T) {
	nop := layers.TCPOption{OptionType: layers.TCPOptionKindNop, OptionLength: 1}
	short := layers.TCPOption{OptionType: layers.TCPOptionKindTimestamps, OptionLength: 6, OptionData: []byte{0, 0, 0, 9}}
	const leaving, entering = false, true
	for _, row := range []struct {
		reason    string
		way       bool
		ahead     uint32
		flags     wire.Flags
		options   []layers.TCPOption
		value     uint32 // of the option that comes out
		echo      uint32
		unchanged bool
	}{
		{"a SYN leaves", leaving, 500, syn, []layers.TCPOption{both(1000, 0)}, 1500, 0, false},
		{"an ACK leaves: the other side's clock is not touched", leaving, 500, ack, []layers.TCPOption{both(1000, 77)}, 1500, 77, false},
		{"aligned as Linux does", leaving, 500, ack, []layers.TCPOption{nop, nop, both(1000, 77)}, 1500, 77, false},
		{"in the middle of a word", leaving, 0x12345, ack, []layers.TCPOption{nop, both(1000, 77)}, 0x12345 + 1000, 77, false},
		{"behind: the other half of the circle", leaving, 1<<32 - 300, ack, []layers.TCPOption{both(1000, 77)}, 700, 77, false},
		{"past the end of the circle", leaving, 500, ack, []layers.TCPOption{both(1<<32-1, 77)}, 499, 77, false},
		{"a SYN-ACK comes: the echo", entering, 500, synAck, []layers.TCPOption{both(1000, 777)}, 1000, 277, false},
		{"the echo in the middle of a word", entering, 0x12345, ack, []layers.TCPOption{nop, both(1000, 7)}, 1000, 1<<32 + 7 - 0x12345, false},
		{"a SYN comes: nothing is echoed", entering, 500, syn, []layers.TCPOption{both(1000, 0)}, 0, 0, true},
		{"no option", leaving, 500, ack, nil, 0, 0, true},
		{"an option of the wrong length is no timestamp", leaving, 500, ack, []layers.TCPOption{short}, 0, 0, true},
		{"no difference", leaving, 0, ack, []layers.TCPOption{both(1000, 77)}, 0, 0, true},
	} {
		t.Run(row.reason, func(t *testing.T) {
			clock := NewClock(row.ahead)
			stage := clock.Leaving
			if row.way == entering {
				stage = clock.Entering
			}
			frame := segment{from: nat, to: server, flags: row.flags, payload: 3, options: row.options}.frame(t)
			require.True(t, checksumHolds(t, frame))
			p := packet(t, frame)
			require.Equal(t, wire.Forward, stage(p))
			assert.Equal(t, row.unchanged, bytes.Equal(frame, p.Frame()))
			assert.True(t, checksumHolds(t, p.Frame()))
			if row.unchanged {
				return
			}
			seg, err := p.TCP()
			require.NoError(t, err)
			data, has := seg.Option(optionTimestamps)
			require.True(t, has)
			assert.Equal(t, row.value, binary.BigEndian.Uint32(data))
			assert.Equal(t, row.echo, binary.BigEndian.Uint32(data[4:]))
			// Another clock that is as far behind undoes it, and nothing else was touched.
			clock.ahead = -row.ahead
			require.Equal(t, wire.Forward, stage(p))
			assert.Equal(t, frame, p.Frame())
		})
	}
}

// A segment that came corrupt leaves so, whatever the clock.
func TestClockKeepsChecksumRightOrWrong(t *testing.T) {
	random := rand.New(rand.NewPCG(7, 323))
	for range 2000 {
		frame := segment{from: nat, to: server, flags: ack, options: []layers.TCPOption{both(random.Uint32(), random.Uint32())}}.frame(t)
		corrupt := random.IntN(2) == 0
		if corrupt {
			frame[14+20+8] ^= byte(1 + random.IntN(255)) // of the acknowledgment number
		}
		p := packet(t, frame)
		clock := NewClock(random.Uint32())
		clock.Leaving(p)
		clock.Entering(p)
		require.Equal(t, !corrupt, checksumHolds(t, p.Frame()), "%+v", clock)
	}
}

// heard records the timestamps of SYNs by the address that they come from.
type heard struct {
	mu   sync.Mutex
	syns map[netip.Addr][]uint32
}

func (h *heard) stage(p *wire.Packet) wire.Verdict {
	if seg, err := p.TCP(); err == nil && seg.Flags()&(wire.SYN|wire.ACK) == wire.SYN {
		if value, has := timestamp(seg); has {
			h.mu.Lock()
			defer h.mu.Unlock()
			h.syns[seg.Source().Addr()] = append(h.syns[seg.Source().Addr()], value)
		}
	}
	return wire.Forward
}

// Two hosts of one machine have one clock, and a server sees them as far apart as
// their wires say. Their kernels notice nothing: a client answers a SYN-ACK whose echo
// is not of its own clock by a reset and counts PAWSActive (net/ipv4/tcp_input.c,
// tcp_rcv_synsent_state_process).
func TestClockOfAHost(t *testing.T) {
	const apart = 1 << 30
	ears := &heard{syns: make(map[netip.Addr][]uint32)}
	link := &wire.Wire{Entering: []wire.Stage{ears.stage}}
	clock := NewClock(apart)
	shifted := &wire.Wire{Leaving: []wire.Stage{clock.Leaving}, Entering: []wire.Stage{clock.Entering}}
	l := up(t, netlab.Topology{
		Switches: []netlab.SwitchSpec{{Name: "lan", Subnet: netip.MustParsePrefix("10.77.0.0/24")}},
		Hosts: []netlab.HostSpec{
			{
				Name:    "server",
				Links:   []netlab.LinkSpec{{Switch: "lan", Addrs: []netip.Addr{serverAddr}, Pump: link.Pump, AlwaysPump: true}},
				Sysctls: map[string]string{"net.ipv4.tcp_timestamps": "1"},
			},
			{
				Name:    "plain",
				Links:   []netlab.LinkSpec{{Switch: "lan"}},
				Sysctls: map[string]string{"net.ipv4.tcp_timestamps": "2"},
			},
			{
				Name:    "shifted",
				Links:   []netlab.LinkSpec{{Switch: "lan", Pump: shifted.Pump, AlwaysPump: true}},
				Sysctls: map[string]string{"net.ipv4.tcp_timestamps": "2"},
			},
		},
	})
	serve(t, l.Host("server"), echo)

	first := make(map[string]uint32)
	for _, name := range []string{"plain", "shifted"} {
		host := l.Host(name)
		ctx, cancel := context.WithTimeout(t.Context(), patience)
		conn, err := host.DialContext(ctx, "tcp4", netip.AddrPortFrom(serverAddr, 7000).String())
		cancel()
		require.NoError(t, err, name)
		require.NoError(t, conn.SetDeadline(time.Now().Add(patience)))
		sent := bytes.Repeat([]byte("0123456789abcdef"), 4096)
		written := make(chan error, 1)
		go func() {
			_, err := conn.Write(sent)
			written <- err
		}()
		got := make([]byte, len(sent))
		_, err = io.ReadFull(conn, got)
		require.NoError(t, err, name)
		require.NoError(t, <-written, name)
		assert.Equal(t, sent, got)

		ears.mu.Lock()
		values := ears.syns[conn.LocalAddr().(*net.TCPAddr).AddrPort().Addr()]
		ears.mu.Unlock()
		require.NotEmpty(t, values, name)
		first[name] = values[0]
		require.NoError(t, conn.Close())
		for _, counter := range []string{"PAWSActive", "PAWSEstab"} {
			assert.Zero(t, tcpExt(t, host, counter), "%s of %s", counter, name)
		}
	}
	// Beside the difference there are the milliseconds between two connections.
	between := first["shifted"] - first["plain"] - apart
	assert.Less(t, between, uint32(patience.Milliseconds()))
	t.Logf("SYNs at %d and %d, %d apart beside the difference", first["plain"], first["shifted"], between)
	assert.Zero(t, tcpExt(t, l.Host("server"), "PAWSEstab"))
}
