package l4lb

import (
	"math/rand/v2"
	"net/netip"
	"slices"
	"testing"
	"time"

	"connlab/netlab/wire"

	"github.com/stretchr/testify/assert"
	"github.com/stretchr/testify/require"
)

// natRig is a full NAT balancer whose clock is ours.
type natRig struct {
	*Balancer
	t   testing.TB
	now time.Time
}

func newNATRig(t testing.TB, ports [2]uint16, services map[netip.AddrPort]Group, locals ...netip.Addr) *natRig {
	t.Helper()
	if len(locals) == 0 {
		locals = []netip.Addr{local1}
	}
	r := &natRig{t: t, now: time.Unix(1000, 0)}
	r.Balancer = newBalancer(t, Config{Services: services, Mode: FullNAT, Locals: locals, Ports: ports})
	r.nat.now = func() time.Time { return r.now }
	return r
}

// send puts a segment through and returns what comes out, nil for a drop.
func (r *natRig) send(s tcp) *tcp {
	r.t.Helper()
	p := s.packet(r.t)
	if r.Stage(p) == wire.Drop {
		return nil
	}
	got := read(r.t, p.Frame())
	return &got
}

// syn opens a connection and returns its inner source.
func (r *natRig) syn(from, vip netip.AddrPort) netip.AddrPort {
	r.t.Helper()
	got := r.send(tcp{from: from, to: vip, flags: syn, seq: 1000, options: linuxOptions})
	require.NotNil(r.t, got, "a SYN was dropped: %+v", r.Stats())
	return got.from
}

func (r *natRig) reset(from, vip netip.AddrPort) {
	r.t.Helper()
	require.NotNil(r.t, r.send(tcp{from: from, to: vip, flags: rst, seq: 1001}))
}

func TestFullNATRoundTrip(t *testing.T) {
	r := newNATRig(t, [2]uint16{5000, 5999}, one(vip1, proxy1))
	local := netip.AddrPortFrom(local1, 5000)
	for _, row := range []struct {
		reason    string
		sent, got tcp
		open      uint64
	}{
		{"SYN",
			tcp{from: client, to: vip1, flags: syn, seq: 1000, options: linuxOptions},
			tcp{from: local, to: proxy1, flags: syn, seq: 1000, options: marked(KindTOAVIP, vip1)}, 1},
		{"SYN again",
			tcp{from: client, to: vip1, flags: syn, seq: 1000, options: linuxOptions},
			tcp{from: local, to: proxy1, flags: syn, seq: 1000, options: marked(KindTOAVIP, vip1)}, 1},
		{"SYN-ACK",
			tcp{from: proxy1, to: local, flags: synAck, seq: 5000, ack: 1001, options: linuxOptions},
			tcp{from: vip1, to: client, flags: synAck, seq: 5000, ack: 1001, options: linuxOptions}, 1},
		{"request",
			tcp{from: client, to: vip1, flags: ack | wire.PSH, seq: 1001, ack: 5001, payload: []byte("PING\r\n1")},
			tcp{from: local, to: proxy1, flags: ack | wire.PSH, seq: 1001, ack: 5001, payload: []byte("PING\r\n1")}, 1},
		{"reply",
			tcp{from: proxy1, to: local, flags: ack, seq: 5001, ack: 1008, payload: []byte("+PONG\r\n")},
			tcp{from: vip1, to: client, flags: ack, seq: 5001, ack: 1008, payload: []byte("+PONG\r\n")}, 1},
		{"FIN",
			tcp{from: client, to: vip1, flags: fin, seq: 1008, ack: 5008},
			tcp{from: local, to: proxy1, flags: fin, seq: 1008, ack: 5008}, 1},
		{"FIN back",
			tcp{from: proxy1, to: local, flags: fin, seq: 5008, ack: 1009},
			tcp{from: vip1, to: client, flags: fin, seq: 5008, ack: 1009}, 1},
		{"last ACK",
			tcp{from: client, to: vip1, flags: ack, seq: 1009, ack: 5009},
			tcp{from: local, to: proxy1, flags: ack, seq: 1009, ack: 5009}, 0},
		{"FIN back once more: the last ACK was lost behind us",
			tcp{from: proxy1, to: local, flags: fin, seq: 5008, ack: 1009},
			tcp{from: vip1, to: client, flags: fin, seq: 5008, ack: 1009}, 0},
		{"last ACK once more",
			tcp{from: client, to: vip1, flags: ack, seq: 1009, ack: 5009},
			tcp{from: local, to: proxy1, flags: ack, seq: 1009, ack: 5009}, 0},
	} {
		got := r.send(row.sent)
		require.NotNil(t, got, row.reason)
		assert.Empty(t, equal(row.got, *got), row.reason)
		assert.Equal(t, row.open, r.Stats().Open, row.reason)
	}
	assert.Equal(t, Stats{Packets: 10, Forwarded: 10, SYNs: 2, OptionsAdded: 2, Replies: 4}, r.Stats())
}

func TestFullNATDropsWhatItDoesNotKnow(t *testing.T) {
	r := newNATRig(t, [2]uint16{5000, 5999}, one(vip1, proxy1))
	r.syn(client, vip1)
	local := netip.AddrPortFrom(local1, 5000)
	for reason, s := range map[string]tcp{
		"data of no session":           {from: ap("10.1.0.7:40002"), to: vip1, flags: ack},
		"a reply to a free port":       {from: proxy1, to: netip.AddrPortFrom(local1, 5001), flags: ack},
		"a reply of another proxy":     {from: proxy2, to: local, flags: ack},
		"a client that connects to us": {from: client, to: local, flags: syn},
	} {
		assert.Nil(t, r.send(s), reason)
	}
	assert.Nil(t, r.send(tcp{from: proxy1, to: client, flags: ack}), "not to us")
	assert.Equal(t, Stats{Packets: 6, Forwarded: 1, SYNs: 1, OptionsAdded: 1, NoSession: 4, NotService: 1, Open: 1}, r.Stats())
}

// The very case that a transparent balancer makes one tuple of.
func TestFullNATKeepsConnectionsApart(t *testing.T) {
	r := newNATRig(t, [2]uint16{5000, 5999}, map[netip.AddrPort]Group{vip1: {proxy1}, vip2: {proxy1}, vip3: {proxy2}})
	first, second := r.syn(client, vip1), r.syn(client, vip2)
	assert.NotEqual(t, first, second, "one client port, two VIPs, one proxy")
	assert.Equal(t, first, r.syn(client, vip3), "another proxy: the local port is free there")
	for vip, s := range map[netip.AddrPort]tcp{
		vip1: {from: proxy1, to: first, flags: synAck, ack: 1001},
		vip2: {from: proxy1, to: second, flags: synAck, ack: 1001},
		vip3: {from: proxy2, to: first, flags: synAck, ack: 1001},
	} {
		got := r.send(s)
		require.NotNil(t, got)
		assert.Equal(t, vip, got.from)
		assert.Equal(t, client, got.to)
	}
}

func TestPortsAreReusedLast(t *testing.T) {
	r := newNATRig(t, [2]uint16{65534, 65535}, one(vip1, proxy1), local1, local2)
	from := func(i uint16) netip.AddrPort { return netip.AddrPortFrom(client.Addr(), 40000+i) }
	all := []netip.AddrPort{ap("10.3.0.1:65534"), ap("10.3.0.1:65535"), ap("10.3.0.2:65534"), ap("10.3.0.2:65535")}
	for i, want := range all {
		assert.Equal(t, want, r.syn(from(uint16(i)), vip1), "never used yet")
	}
	assert.Nil(t, r.send(tcp{from: from(4), to: vip1, flags: syn}), "all taken")
	assert.EqualValues(t, 1, r.Stats().PortsExhausted)
	assert.EqualValues(t, 4, r.Stats().Open)

	r.reset(from(2), vip1)
	r.reset(from(0), vip1)
	assert.EqualValues(t, 2, r.Stats().Open)
	late := tcp{from: proxy1, to: all[2], flags: ack}
	require.NotNil(t, r.send(late), "late, but the port is not taken again")
	assert.Equal(t, all[2], r.syn(from(5), vip1), "given back first")
	got := r.send(late)
	require.NotNil(t, got)
	assert.Equal(t, from(5), got.to, "the port is another client's now")
	assert.Nil(t, r.send(tcp{from: from(2), to: vip1, flags: ack}), "the old session is forgotten")
	r.reset(from(1), vip1)
	assert.Equal(t, all[0], r.syn(from(6), vip1), "given back second")
	assert.Equal(t, all[1], r.syn(from(1), vip1), "given back last; to the same client, by chance")
	assert.Nil(t, r.send(tcp{from: from(7), to: vip1, flags: syn}), "all taken again")
	assert.EqualValues(t, 2, r.Stats().PortsExhausted)
}

func TestSameClientAgainGetsAnotherPort(t *testing.T) {
	r := newNATRig(t, [2]uint16{5000, 5001}, one(vip1, proxy1))
	first := r.syn(client, vip1)
	r.reset(client, vip1)
	second := r.syn(client, vip1)
	assert.NotEqual(t, first, second)
	got := r.send(tcp{from: client, to: vip1, flags: ack, seq: 1001})
	require.NotNil(t, got)
	assert.Equal(t, second, got.from, "the client's packets are of the new session")
	r.reset(client, vip1)
	assert.Equal(t, first, r.syn(client, vip1))
	assert.Len(t, r.nat.byClient, 1)
	assert.Len(t, r.nat.byProxy, 2)

	other := ap("10.1.0.7:40002")
	assert.Equal(t, second, r.syn(other, vip1), "takes the port of the client's former session")
	got = r.send(tcp{from: client, to: vip1, flags: ack, seq: 1001})
	require.NotNil(t, got, "whose present one goes on")
	assert.Equal(t, first, got.from)
}

func TestSYNSentAgainWaitsAnew(t *testing.T) {
	r := newNATRig(t, [2]uint16{5000, 5001}, one(vip1, proxy1))
	other, third := ap("10.1.0.7:40002"), ap("10.1.0.7:40004")
	r.syn(client, vip1)
	r.now = r.now.Add(time.Second)
	left := r.syn(other, vip1)
	r.now = r.now.Add(time.Second)
	r.syn(client, vip1)
	r.now = r.now.Add(unansweredAfter - time.Second)
	assert.Equal(t, left, r.syn(third, vip1), "the other's time is up, though it came second")
	assert.EqualValues(t, 1, r.Stats().Unanswered)
}

func TestPortsQueue(t *testing.T) {
	const total = 50
	p := ports{total: total}
	var taken, free []uint32 // the same in two slices
	for i := range uint32(total) {
		free = append(free, i)
	}
	random := rand.New(rand.NewPCG(1, 1))
	for range 20_000 {
		if random.IntN(2) == 0 {
			port, ok := p.take()
			require.Equal(t, len(free) > 0, ok)
			if ok {
				require.Equal(t, free[0], port)
				taken, free = append(taken, port), free[1:]
			}
		} else if len(taken) > 0 {
			i := random.IntN(len(taken))
			p.give(taken[i])
			free = append(free, taken[i])
			taken = slices.Delete(taken, i, i+1)
		}
	}
	assert.LessOrEqual(t, cap(p.freed), 4*total, "the queue does not grow for ever")
}

func TestUnansweredSessionsEnd(t *testing.T) {
	r := newNATRig(t, [2]uint16{5000, 5001}, one(vip1, proxy1))
	other, third := ap("10.1.0.7:40002"), ap("10.1.0.7:40004")
	unanswered, answered := r.syn(client, vip1), r.syn(other, vip1)
	require.NotNil(t, r.send(tcp{from: proxy1, to: answered, flags: synAck, ack: 1001}))

	r.now = r.now.Add(unansweredAfter - 1)
	assert.Nil(t, r.send(tcp{from: third, to: vip1, flags: syn}), "not yet")
	assert.Equal(t, unanswered, r.syn(client, vip1), "asks again, and has two minutes more")
	r.now = r.now.Add(unansweredAfter - 1)
	assert.Nil(t, r.send(tcp{from: third, to: vip1, flags: syn}), "not yet")
	r.now = r.now.Add(1)
	assert.Equal(t, unanswered, r.syn(third, vip1), "the port of the one that nobody answered")
	r.now = r.now.Add(time.Hour)
	require.NotNil(t, r.send(tcp{from: other, to: vip1, flags: ack, seq: 1001}), "an idle connection stays")
	assert.Equal(t, Stats{Packets: 8, Forwarded: 6, SYNs: 6, OptionsAdded: 4, Replies: 1, PortsExhausted: 2, Unanswered: 1, Open: 2}, r.Stats())
}

func TestEndedSessionsAreBounded(t *testing.T) {
	r := newNATRig(t, [2]uint16{1, 65535}, one(vip1, proxy1), local1, local2)
	opening := tcp{from: client, to: vip1, flags: syn, seq: 1000}.packet(t)
	closing := tcp{from: client, to: vip1, flags: rst, seq: 1001}.packet(t)
	p := new(wire.Packet)
	for i := range maxEnded + 100 {
		for _, one := range []*wire.Packet{opening, closing} {
			*p = *one
			if r.Stage(from(t, p, i)) != wire.Forward {
				t.Fatal(r.Stats())
			}
		}
	}
	assert.Equal(t, maxEnded, r.nat.ended.Len())
	assert.Len(t, r.nat.byProxy, maxEnded)
	assert.Len(t, r.nat.byClient, maxEnded)
	assert.Zero(t, r.Stats().Open)
}
