package l4lb

import (
	"bytes"
	"net/netip"
	"testing"

	"connlab/netlab/wire"

	"github.com/stretchr/testify/assert"
	"github.com/stretchr/testify/require"
)

// consistent fails unless a frame that was forwarded can be read again, and has
// right checksums if it had them before.
func consistent(t *testing.T, stage string, before []byte, p *wire.Packet) {
	t.Helper()
	again := packet(t, p.Frame())
	_, err := again.TCP()
	require.NoError(t, err, "what left %s", stage)
	ipBefore, tcpBefore := checksums(before)
	ip, tcp := checksums(p.Frame())
	assert.Equal(t, ipBefore, ip, "%s: IPv4 checksum right", stage)
	assert.Equal(t, tcpBefore, tcp, "%s: TCP checksum right", stage)
}

// FuzzBalancer puts any frame through every stage.
func FuzzBalancer(f *testing.F) {
	for _, frame := range unreadable(f) {
		f.Add(frame)
	}
	for _, s := range []tcp{
		{from: client, to: vip1, flags: syn, options: linuxOptions},
		{from: client, to: vip1, flags: syn, options: marked(KindTOAVIP, vip2)},
		{from: client, to: vip1, flags: syn, options: linuxOptions, payload: make([]byte, 1440)},
		{from: client, to: vip1, flags: ack, payload: []byte("odd")},
		{from: client, to: vip1, flags: fin},
		{from: client, to: vip1, flags: rst},
		{from: client, to: vip2, flags: syn},
		{from: client, to: proxy1, flags: syn, options: marked(KindTOAVIP, vip2)},
		{from: proxy1, to: client, flags: synAck, options: linuxOptions},
		{from: proxy1, to: netip.AddrPortFrom(local1, 5000), flags: synAck},
		{from: proxy1, to: netip.AddrPortFrom(local1, 5001), flags: rst},
	} {
		f.Add(s.frame(f))
	}
	services := map[netip.AddrPort]Group{vip1: {proxy1, proxy2}}
	transparent, err := New(Config{Services: services})
	require.NoError(f, err)
	f.Fuzz(func(t *testing.T, frame []byte) {
		if len(frame) > 2000 {
			return
		}
		nat := newNATRig(t, [2]uint16{5000, 5000}, services)
		nat.syn(client, vip1) // so that there is something to reverse
		fullNAT := nat.Balancer
		r := newLink(t, LastVIP)
		r.open(vip2, 1000)

		seen := packet(t, frame)
		if transparent.Stage(seen) == wire.Forward {
			consistent(t, "the balancer", frame, seen)
			require.Equal(t, wire.Forward, r.Entering(seen))
			consistent(t, "the balancer and the link", frame, seen)
		}
		seen = packet(t, frame)
		before := fullNAT.Stats()
		if fullNAT.Stage(seen) == wire.Forward {
			consistent(t, "full NAT", frame, seen)
		}
		after := fullNAT.Stats()
		assert.Equal(t, before.Packets+1, after.Packets)
		assert.Equal(t, after.Packets, after.Forwarded+after.Dropped(), "one column each")
		fullNAT.assertConsistent(t)

		for name, stage := range map[string]wire.Stage{"entering": r.Entering, "leaving": r.Leaving} {
			seen = packet(t, frame)
			_, err := packet(t, frame).TCP()
			require.Equal(t, wire.Forward, stage(seen))
			if err != nil || name == "entering" {
				assert.True(t, bytes.Equal(frame, seen.Frame()), "%s: changed", name)
			} else {
				consistent(t, name, frame, seen)
			}
		}
		r.assertConsistent(t)
	})
}

// assertConsistent compares the counters and lists with the table.
func (r *Return) assertConsistent(t *testing.T) {
	t.Helper()
	open, idle := 0, 0
	for key, e := range r.entries {
		assert.Equal(t, key, e.tuple)
		if !e.life.over {
			open++
		}
		if e.life.over || !e.life.answered {
			idle++
			assert.NotNil(t, e.place)
		} else {
			assert.Nil(t, e.place)
		}
	}
	assert.EqualValues(t, open, r.stats.Open)
	assert.Equal(t, idle, r.idle.Len())
	assert.EqualValues(t, len(r.collisions), r.stats.Collisions)
}

func (b *Balancer) assertConsistent(t *testing.T) {
	t.Helper()
	n := b.nat
	open, waiting := 0, 0
	taken := make(map[*proxy]int)
	for inner, x := range n.byProxy {
		assert.Equal(t, inner, x.inner)
		assert.Equal(t, inner.client, endpointOf(n.endpoint(x.port)))
		if !x.life.over {
			open++
			taken[x.proxy]++
			if !x.life.answered {
				waiting++
			}
			assert.Same(t, x, n.byClient[x.outer], "a living session is its client's")
		}
	}
	for outer, x := range n.byClient {
		assert.Equal(t, outer, x.outer)
		assert.Same(t, x, n.byProxy[x.inner])
	}
	assert.EqualValues(t, open, b.counters.open.Load())
	assert.Equal(t, waiting, n.waiting.Len())
	assert.Equal(t, len(n.byProxy)-open, n.ended.Len())
	for p, used := range taken {
		free := p.ports.freed[p.ports.head:]
		assert.EqualValues(t, p.ports.fresh, used+len(free), "each port is taken or free")
	}
}

// sequenceSeeds are ways of connections, two bytes a step as step reads them.
func sequenceSeeds(f *testing.F) {
	f.Add([]byte{0, 0, 16, 0, 8, 1, 0, 0})
	f.Add([]byte{0, 0, 4, 0, 16, 0, 0, 0, 4, 0, 12, 1, 3, 7, 19, 4, 1, 1})
	f.Add([]byte{0, 0, 17, 1, 2, 2, 18, 2, 1, 2, 0, 0, 1, 0})
}

// maxScript keeps one input of the fuzzer short: 100 segments.
const maxScript = 200

// decode makes a segment of two bytes: 16 kinds either way, few numbers, so that
// sequences meet.
func decode(b []byte) (s step, choice int) {
	flags := []wire.Flags{syn, ack, fin, rst, synAck, ack | wire.PSH, rst | ack, syn | wire.FIN}[b[0]&7]
	s = step{out: b[0]&16 != 0, flags: flags, seq: 1000 + uint32(b[1]&3), ack: 1000 + uint32(b[1]>>2&3), size: int(b[0] >> 5 & 1)}
	return s, int(b[1] >> 4)
}

// FuzzReturnSequence puts any order of segments of few connections through a
// return path.
func FuzzReturnSequence(f *testing.F) {
	sequenceSeeds(f)
	f.Fuzz(func(t *testing.T, script []byte) {
		policy := FirstVIP
		if len(script)%2 == 1 {
			policy = LastVIP
		}
		l := newLink(t, policy)
		for script := script[:min(len(script), maxScript)]; len(script) >= 2; script = script[2:] {
			s, choice := decode(script)
			from := netip.AddrPortFrom(client.Addr(), 40000+uint16(choice&1))
			made := tcp{from: from, to: proxy1, flags: s.flags, seq: s.seq, ack: s.ack, payload: make([]byte, s.size)}
			if choice&8 != 0 {
				l.now = l.now.Add(answerTime)
			}
			if s.out {
				made.from, made.to = made.to, made.from
				p := made.packet(t)
				before := bytes.Clone(p.Frame())
				require.Equal(t, wire.Forward, l.Leaving(p))
				consistent(t, "leaving", before, p)
			} else {
				if vips := []netip.AddrPort{vip1, vip2, vip3}; choice>>1&3 < len(vips) {
					made.options = marked(KindTOAVIP, vips[choice>>1&3])
				}
				require.Equal(t, wire.Forward, l.Entering(made.packet(t)))
			}
			l.assertConsistent(t)
		}
	})
}

// FuzzFullNATSequence puts any order of segments of few connections through full
// NAT with two ports.
func FuzzFullNATSequence(f *testing.F) {
	sequenceSeeds(f)
	f.Fuzz(func(t *testing.T, script []byte) {
		r := newNATRig(t, [2]uint16{5000, 5001}, map[netip.AddrPort]Group{vip1: {proxy1}, vip2: {proxy1}, vip3: {proxy2}})
		for script := script[:min(len(script), maxScript)]; len(script) >= 2; script = script[2:] {
			s, choice := decode(script)
			made := tcp{
				from: netip.AddrPortFrom(client.Addr(), 40000+uint16(choice&1)), to: []netip.AddrPort{vip1, vip2, vip3, vip3}[choice>>1&3],
				flags: s.flags, seq: s.seq, ack: s.ack, payload: make([]byte, s.size),
			}
			if s.out {
				made.from, made.to = []netip.AddrPort{proxy1, proxy2}[choice>>1&1], netip.AddrPortFrom(local1, 5000+uint16(choice&1))
			}
			if choice&8 != 0 {
				r.now = r.now.Add(unansweredAfter / 2)
			}
			p := made.packet(t)
			before := bytes.Clone(p.Frame())
			if r.Stage(p) == wire.Forward {
				consistent(t, "full NAT", before, p)
			}
			r.assertConsistent(t)
			stats := r.Stats()
			assert.Equal(t, stats.Packets, stats.Forwarded+stats.Dropped(), "one column each")
		}
	})
}

// The checksums that gopacket makes are right for the fuzzers, too.
func TestChecksumsOfTheFuzzers(t *testing.T) {
	frame := tcp{from: client, to: vip1, flags: syn, options: linuxOptions, payload: []byte("odd")}.frame(t)
	ip, tcp := checksums(frame)
	assert.True(t, ip)
	assert.True(t, tcp)
	frame[14+8]--     // time to live
	frame[14+20+15]++ // window
	ip, tcp = checksums(frame)
	assert.False(t, ip)
	assert.False(t, tcp)
}
