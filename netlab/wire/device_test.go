package wire

import (
	"net"
	"net/netip"
	"os"
	"testing"

	"connlab/netlab"

	"github.com/gopacket/gopacket/layers"
	"github.com/stretchr/testify/assert"
	"github.com/stretchr/testify/require"
)

var macProxy = net.HardwareAddr{2, 0, 10, 77, 0, 9}

// place is that of a device whose MAC is macB, the destination of the frames made here.
func place() netlab.Port {
	return netlab.Port{
		Addrs: []netip.Addr{netip.MustParseAddr("10.77.0.2")}, MAC: macB, MTU: 1500,
		Neighbour: map[netip.Addr]net.HardwareAddr{client.Addr(): macA, proxy.Addr(): macProxy},
	}
}

func attached(t testing.TB, w *Wire, at netlab.Port) (switchSide *os.File) {
	t.Helper()
	outer, inner := socketPair(t)
	stop, err := w.Attach(inner, at)
	require.NoError(t, err)
	t.Cleanup(func() { assert.NoError(t, stop()) })
	return outer
}

func TestDevice(t *testing.T) {
	toClient := func(frame []byte) []byte { // as its destination, with a checksum to match
		p, s := segmentOf(t, frame)
		s.SetDestination(client)
		return p.Frame()
	}
	lives := func(ttl uint8) []byte {
		return toClient(segmentFrame(t, []byte("x"), func(ip *layers.IPv4, _ *layers.TCP) { ip.TTL = ttl }))
	}
	udp := udpFrame(t) // goes to vip
	for _, row := range []struct {
		name  string
		frame []byte
		want  Counts
		sees  int // how many packets the stage sees
	}{
		{"to a neighbour", lives(64), Counts{Received: 1, Forwarded: 1}, 1},
		{"the last hop but one", lives(2), Counts{Received: 1, Forwarded: 1}, 1},
		{"no hop left", lives(1), Counts{Received: 1, Expired: 1}, 1},
		{"none at all", lives(0), Counts{Received: 1, Expired: 1}, 1},
		{"to nobody's address", synFrame(t), Counts{Received: 1, Unroutable: 1}, 1},
		{"UDP to nobody's address", udp, Counts{Received: 1, Unroutable: 1}, 1},
		{"UDP to a neighbour", with(udp, atIP+destinationAt, 10, 77, 0, 9), Counts{Received: 1, Forwarded: 1}, 1},
		{"IPv6", ipv6Frame(t), Counts{Received: 1, Unroutable: 1}, 1},
		{"ARP for this port alone", arpFrame(t), Counts{Received: 1, Unroutable: 1}, 1},
		{"IPv4 header cut off", lives(64)[:33], Counts{Received: 1, Unroutable: 1}, 1},
		{"addresses only", lives(64)[:14], Counts{Received: 1, Unroutable: 1}, 1},
		{"flooded, for another", with(lives(64), 0, macA...), Counts{Received: 1, Ignored: 1}, 0},
		{"broadcast", with(arpFrame(t), 0, 255, 255, 255, 255, 255, 255), Counts{Received: 1, Ignored: 1}, 0},
		{"less than Ethernet", lives(64)[:13], Counts{Received: 1, Ignored: 1}, 0},
	} {
		t.Run(row.name, func(t *testing.T) {
			sees := 0
			w := &Wire{Entering: []Stage{func(*Packet) Verdict {
				sees++
				return Forward
			}}}
			port := attached(t, w, place())
			_, err := port.Write(row.frame)
			require.NoError(t, err)
			await(t, func() (bool, any) { c := w.Stats().BtoA; return c.Received == 1 && c.InFlight() == 0, c })
			assert.Equal(t, Stats{BtoA: row.want}, w.Stats())
			assert.Equal(t, row.sees, sees)
			if row.want.Forwarded == 0 {
				return
			}
			out := make([]byte, frameSize)
			n, err := port.Read(out)
			require.NoError(t, err)
			out = out[:n]
			next := macA
			if row.name == "UDP to a neighbour" {
				next = macProxy
			}
			assert.Equal(t, next, net.HardwareAddr(out[:6]), "to the neighbour")
			assert.Equal(t, macB, net.HardwareAddr(out[6:12]), "from the port")
			assert.Equal(t, row.frame[atIP+ttlAt]-1, out[atIP+ttlAt], "a hop")
			assert.Equal(t, row.frame[atIP+sourceAt:], out[atIP+sourceAt:], "the rest is as it was")
			if row.name != "UDP to a neighbour" { // whose header was wrong before
				assert.True(t, checksumsOf(t, out).valid())
			}
		})
	}
}

// The destination that counts is the one after the stages, and the MTU is the port's.
func TestDeviceRoutesWhatStagesMade(t *testing.T) {
	var optionErr error
	w := &Wire{Entering: []Stage{func(p *Packet) Verdict {
		s, err := p.TCP()
		if err != nil {
			return Drop
		}
		s.SetDestination(proxy)
		optionErr = s.AddOption(kindTOA, toa)
		return Forward
	}}}
	at := place()
	at.MTU = 67 // a SYN of 60 bytes has no room for 8 more
	port := attached(t, w, at)
	_, err := port.Write(synFrame(t))
	require.NoError(t, err)
	await(t, func() (bool, any) { c := w.Stats().BtoA; return c.Forwarded == 1, c })
	out := make([]byte, frameSize)
	n, err := port.Read(out)
	require.NoError(t, err)
	assert.Equal(t, macProxy, net.HardwareAddr(out[:6]))
	_, s := segmentOf(t, out[:n])
	assert.Equal(t, proxy, s.Destination())
	assert.ErrorIs(t, optionErr, ErrTooBig)
}

func TestAttachRefuses(t *testing.T) {
	_, port := socketPair(t)
	edited := func(edit func(*netlab.Port)) netlab.Port {
		at := place()
		edit(&at)
		return at
	}
	short := net.HardwareAddr{1, 2}
	for _, row := range []struct {
		wire *Wire
		at   netlab.Port
		want string
	}{
		{&Wire{Leaving: []Stage{delayStage(1)}}, place(), "port inner: a device has no leaving packets: its stages are the entering ones"},
		{new(Wire), edited(func(at *netlab.Port) { at.MTU = 0 }), "port inner: MTU of 0 bytes: the longest has 2033"},
		{new(Wire), edited(func(at *netlab.Port) { at.MTU = 9000 }), "port inner: MTU of 9000 bytes: the longest has 2033"},
		{new(Wire), edited(func(at *netlab.Port) { at.MAC = nil }), `port inner: hardware address "" is not of Ethernet`},
		{
			new(Wire), edited(func(at *netlab.Port) { at.Neighbour[proxy.Addr()] = short }),
			`port inner: neighbour 10.77.0.9: hardware address "01:02" is not of Ethernet`,
		},
	} {
		_, err := row.wire.Attach(port, row.at)
		assert.EqualError(t, err, row.want)
	}
	w := new(Wire)
	attached(t, w, place())
	_, err := w.Attach(port, place())
	assert.EqualError(t, err, "this wire is already in use")
}
