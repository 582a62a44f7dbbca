package l4lb

import (
	"net/netip"
	"sync"
	"testing"
	"time"

	"connlab/netlab/wire"

	"github.com/google/go-cmp/cmp"
	"github.com/stretchr/testify/assert"
	"github.com/stretchr/testify/require"
)

// link is a proxy's link with a Return whose clock is ours.
type link struct {
	*Return
	t   testing.TB
	now time.Time
}

func newLink(t testing.TB, policy Policy) *link {
	l := &link{Return: NewReturn(policy, 0), t: t, now: time.Unix(1000, 0)}
	l.Return.now = func() time.Time { return l.now }
	return l
}

// syn lets a balancer's SYN enter; without a VIP, somebody's own.
func (l *link) syn(vip netip.AddrPort, seq uint32) {
	l.t.Helper()
	s := tcp{from: client, to: proxy1, flags: syn, seq: seq, options: linuxOptions}
	if vip.IsValid() {
		s.options = marked(KindTOAVIP, vip)
	}
	p := s.packet(l.t)
	require.Equal(l.t, wire.Forward, l.Entering(p))
	require.Empty(l.t, equal(s, read(l.t, p.Frame())), "what enters is not changed")
}

func (l *link) in(flags wire.Flags, seq, ack uint32) {
	l.t.Helper()
	p := tcp{from: client, to: proxy1, flags: flags, seq: seq, ack: ack}.packet(l.t)
	require.Equal(l.t, wire.Forward, l.Entering(p))
}

// out lets a segment of the proxy leave and returns its source behind the link.
func (l *link) out(flags wire.Flags, seq, ack uint32) netip.AddrPort {
	l.t.Helper()
	s := tcp{from: proxy1, to: client, flags: flags, seq: seq, ack: ack}
	p := s.packet(l.t)
	require.Equal(l.t, wire.Forward, l.Leaving(p))
	got := read(l.t, p.Frame())
	s.from = got.from
	require.Empty(l.t, equal(s, got), "nothing but the source is changed")
	return s.from
}

// open makes a connection for a VIP, with the client's number and 5000.
func (l *link) open(vip netip.AddrPort, seq uint32) {
	l.t.Helper()
	l.syn(vip, seq)
	want := vip
	if !vip.IsValid() {
		want = proxy1
	}
	require.Equal(l.t, want, l.out(synAck, 5000, seq+1))
	l.in(ack, seq+1, 5001)
}

func (l *link) collided(first, second netip.AddrPort, syns int) Collision {
	return Collision{Client: client, Proxy: proxy1, First: first, Second: second, At: l.now, SYNs: syns}
}

func (l *link) assertCollisions(want ...Collision) {
	l.t.Helper()
	sameAddr := cmp.Comparer(func(a, b netip.AddrPort) bool { return a == b })
	assert.Empty(l.t, cmp.Diff(want, l.Collisions(), sameAddr))
	assert.EqualValues(l.t, len(want), l.Stats().Collisions)
}

func TestFirstVIPWins(t *testing.T) {
	l := newLink(t, FirstVIP)
	l.open(vip1, 1000)
	l.syn(vip2, 9000)
	assert.Equal(t, vip1, l.out(ack, 5001, 1001), "the challenge ACK goes to the first client socket")
	l.syn(vip2, 9000)
	l.syn(vip2, 9000)
	assert.Equal(t, vip1, l.out(ack, 5001, 1001))
	l.assertCollisions(l.collided(vip1, vip2, 3))
	l.syn(vip3, 20000)
	want := []Collision{l.collided(vip1, vip2, 3), l.collided(vip1, vip3, 1)}
	l.assertCollisions(want...)
	assert.Equal(t, vip1, l.out(ack, 5001, 1001), "the first connection works on")

	l.in(fin, 1001, 5001)
	assert.Equal(t, vip1, l.out(fin, 5001, 1002))
	l.in(ack, 1002, 5002)
	assert.Equal(t, vip1, l.out(fin, 5001, 1002), "a late retransmission still finds its client")
	l.syn(vip2, 9000)
	assert.Equal(t, vip2, l.out(synAck, 7000, 9001), "the first is closed: the second's SYN, sent again, succeeds")
	l.assertCollisions(want...)
	assert.Equal(t, ReturnStats{Learned: 2, TakenOver: 1, Restored: 7, Collisions: 2, Open: 1}, l.Stats())
}

func TestLastVIPWins(t *testing.T) {
	l := newLink(t, LastVIP)
	l.open(vip1, 1000)
	l.syn(vip2, 9000)
	assert.Equal(t, vip2, l.out(ack, 5001, 1001), "the challenge ACK goes to the second client socket")
	l.in(rst, 1001, 0)
	l.syn(vip2, 9000)
	assert.Equal(t, vip2, l.out(synAck, 7000, 9001))
	l.in(ack, 9001, 7001)
	want := l.collided(vip1, vip2, 1)
	l.assertCollisions(want)
	assert.EqualValues(t, 1, l.Stats().Open)

	l.in(ack, 1001, 5001) // the first client knows nothing, sends on
	l.in(rst, 1_000_000_000, 0)
	assert.EqualValues(t, 1, l.Stats().Open, "and its reset, far from the window, ends nothing")

	l.now = l.now.Add(time.Second)
	l.syn(vip1, 50_000)
	assert.Equal(t, vip1, l.out(ack, 7001, 9001))
	l.assertCollisions(want, l.collided(vip2, vip1, 1))
}

func TestLastVIPBackAndForth(t *testing.T) {
	l := newLink(t, LastVIP)
	l.open(vip1, 1000)
	l.syn(vip2, 9000)
	l.syn(vip2, 9000)
	l.syn(vip1, 50_000)
	assert.Equal(t, vip1, l.out(ack, 5001, 1001))
	l.syn(vip2, 9000)
	assert.Equal(t, vip2, l.out(ack, 5001, 1001))
	l.assertCollisions(l.collided(vip1, vip2, 3), l.collided(vip2, vip1, 1))
	assert.EqualValues(t, 1, l.Stats().Open)
}

func TestNoCollision(t *testing.T) {
	for _, row := range []struct {
		reason string
		do     func(l *link)
	}{
		{"a SYN sent again", func(l *link) { l.syn(vip1, 1000); l.syn(vip1, 1000); l.open(vip1, 1000); l.syn(vip1, 1000) }},
		{"another connection to the same VIP", func(l *link) { l.open(vip1, 1000); l.syn(vip1, 9000) }},
		{"after both FINs", func(l *link) {
			l.open(vip1, 1000)
			l.in(fin, 1001, 5001)
			l.out(fin, 5001, 1002)
			l.in(ack, 1002, 5002)
			l.syn(vip2, 9000)
		}},
		{"in TIME_WAIT, the proxy having closed first", func(l *link) {
			l.open(vip1, 1000)
			l.out(fin, 5001, 1001)
			l.in(fin, 1001, 5002)
			l.out(ack, 5002, 1002)
			l.syn(vip2, 9000)
			require.Equal(l.t, vip2, l.out(ack, 5002, 1002), "TIME_WAIT does not take the SYN: an ACK")
			l.in(rst, 1002, 0) // kills it
			l.syn(vip2, 9000)
			require.Equal(l.t, vip2, l.out(synAck, 7000, 9001))
		}},
		{"after a reset of the client", func(l *link) { l.open(vip1, 1000); l.in(rst, 1001, 0); l.syn(vip2, 9000) }},
		{"after a reset of the proxy", func(l *link) { l.open(vip1, 1000); l.out(rst, 5001, 0); l.syn(vip2, 9000) }},
		{"after a refusal", func(l *link) { l.syn(vip1, 1000); l.out(rst|ack, 0, 1001); l.syn(vip2, 9000) }},
		{"nobody answered the first in time", func(l *link) {
			l.syn(vip1, 1000)
			l.now = l.now.Add(answerTime + 1)
			l.syn(vip2, 9000)
		}},
		{"another client port", func(l *link) {
			l.open(vip1, 1000)
			p := tcp{from: ap("10.1.0.7:40002"), to: proxy1, flags: syn, options: marked(KindTOAVIP, vip2)}.packet(l.t)
			l.Entering(p)
		}},
		{"another port of the proxy", func(l *link) {
			l.open(vip1, 1000)
			p := tcp{from: client, to: ap("10.2.0.1:6380"), flags: syn, options: marked(KindTOAVIP, vip2)}.packet(l.t)
			l.Entering(p)
		}},
	} {
		for _, policy := range []Policy{FirstVIP, LastVIP} {
			l := newLink(t, policy)
			row.do(l)
			assert.Empty(t, l.Collisions(), "%s, policy %d", row.reason, policy)
			assert.Zero(t, l.Stats().Collisions, "%s, policy %d", row.reason, policy)
		}
	}
}

func TestCollision(t *testing.T) {
	direct := netip.AddrPort{}
	for _, row := range []struct {
		reason        string
		do            func(l *link)
		first, second netip.AddrPort
		syns          int
	}{
		{"before the first is answered", func(l *link) { l.syn(vip1, 1000); l.syn(vip2, 9000) }, vip1, vip2, 1},
		{"at the last moment before an answer is out of question", func(l *link) {
			l.now = l.now.Add(-answerTime)
			l.syn(vip1, 1000)
			l.now = l.now.Add(answerTime)
			l.syn(vip2, 9000)
		}, vip1, vip2, 1},
		{"the first asked again in the meantime", func(l *link) {
			l.now = l.now.Add(-answerTime - 1)
			l.syn(vip1, 1000)
			l.now = l.now.Add(answerTime - 1)
			l.syn(vip1, 1000)
			l.now = l.now.Add(2)
			l.syn(vip2, 9000)
		}, vip1, vip2, 1},
		{"in the handshake", func(l *link) { l.syn(vip1, 1000); l.out(synAck, 5000, 1001); l.syn(vip2, 9000) }, vip1, vip2, 1},
		{"on a half-closed connection", func(l *link) { l.open(vip1, 1000); l.in(fin, 1001, 5001); l.out(ack, 5001, 1002); l.syn(vip2, 9000) }, vip1, vip2, 1},
		{"in LAST_ACK", func(l *link) { l.open(vip1, 1000); l.in(fin, 1001, 5001); l.out(fin, 5001, 1002); l.syn(vip2, 9000) }, vip1, vip2, 1},
		{"on an idle connection", func(l *link) {
			l.now = l.now.Add(-time.Hour)
			l.open(vip1, 1000)
			l.now = l.now.Add(time.Hour)
			l.syn(vip2, 9000)
		}, vip1, vip2, 1},
		{"the same address, another port of the VIP", func(l *link) { l.open(vip1, 1000); l.syn(ap("10.8.0.1:6380"), 9000) }, vip1, ap("10.8.0.1:6380"), 1},
		{"a direct connection second", func(l *link) { l.open(vip1, 1000); l.syn(direct, 9000); l.syn(direct, 9000) }, vip1, proxy1, 2},
		{"a direct connection first", func(l *link) { l.open(direct, 1000); l.syn(vip2, 9000) }, proxy1, vip2, 1},
	} {
		for _, policy := range []Policy{FirstVIP, LastVIP} {
			l := newLink(t, policy)
			row.do(l)
			l.assertCollisions(l.collided(row.first, row.second, row.syns))
			want := row.first
			if policy == LastVIP {
				want = row.second
			}
			assert.Equal(t, want, l.out(ack, 5001, 1001), "%s, policy %d", row.reason, policy)
		}
	}
}

// A socket can end unseen, by a timer. That the proxy answers another SYN with a
// SYN-ACK shows it.
func TestSYNACKShowsWhoseTheSocketIs(t *testing.T) {
	for _, policy := range []Policy{FirstVIP, LastVIP} {
		l := newLink(t, policy)
		l.open(vip1, 1000)
		l.syn(vip2, 9000)
		assert.Equal(t, vip2, l.out(synAck, 7000, 9001), "policy %d", policy)
		l.syn(vip2, 9000)
		l.assertCollisions(l.collided(vip1, vip2, 1))
		l.syn(vip1, 1000)
		l.assertCollisions(l.collided(vip1, vip2, 1), l.collided(vip2, vip1, 1))
	}
}

func TestSYNACKToOneOfTwoRivals(t *testing.T) {
	for vip, seq := range map[netip.AddrPort]uint32{vip2: 9000, vip3: 20_000} {
		for _, policy := range []Policy{FirstVIP, LastVIP} {
			l := newLink(t, policy)
			l.open(vip1, 1000)
			l.syn(vip2, 8000)
			l.syn(vip3, 20_000)
			l.syn(vip2, 9000)
			l.syn(vip1, 1000)
			assert.Equal(t, vip, l.out(synAck, 7000, seq+1), "policy %d", policy)
			assert.Equal(t, vip, l.out(ack, 7001, seq+1), "policy %d", policy)
		}
	}
}

func TestEachLifeHasItsCollisions(t *testing.T) {
	l := newLink(t, FirstVIP)
	for range 2 {
		l.open(vip1, 1000)
		l.syn(vip2, 9000)
		l.syn(vip2, 9000)
		l.in(rst, 1001, 0)
	}
	want := l.collided(vip1, vip2, 2)
	l.assertCollisions(want, want)
	l.Collisions()[0].SYNs = 99
	l.assertCollisions(want, want)
}

func TestDirectConnectionsKeepTheirSource(t *testing.T) {
	l := newLink(t, FirstVIP)
	assert.Equal(t, proxy1, l.out(ack, 1, 1), "a connection from before")
	l.open(netip.AddrPort{}, 1000)
	assert.Equal(t, proxy1, l.out(ack, 5001, 1001))
	assert.Equal(t, ReturnStats{Untranslated: 3, Open: 1}, l.Stats())
}

func TestOptionThatIsNoVIP(t *testing.T) {
	l := newLink(t, FirstVIP)
	bad := marked(KindTOAVIP, vip1)
	bad[len(bad)-1].OptionLength, bad[len(bad)-1].OptionData = 6, []byte{1, 2, 3, 4}
	p := tcp{from: client, to: proxy1, flags: syn, seq: 1000, options: bad}.packet(t)
	assert.Equal(t, wire.Forward, l.Entering(p))
	assert.Equal(t, proxy1, l.out(synAck, 5000, 1001))
	assert.Equal(t, ReturnStats{BadOptions: 1, Untranslated: 1, Open: 1}, l.Stats())

	other := NewReturn(FirstVIP, 200)
	for _, kind := range []byte{KindTOAVIP, 200} {
		other.Entering(tcp{from: client, to: proxy1, flags: syn, options: marked(kind, vip1)}.packet(t))
		other.Entering(tcp{from: client, to: proxy1, flags: rst, seq: 1}.packet(t))
	}
	assert.EqualValues(t, 1, other.Stats().Learned, "only the option of its own kind")
}

func TestReturnDropsNothing(t *testing.T) {
	for name, frame := range unreadable(t) {
		r := NewReturn(FirstVIP, 0)
		for _, stage := range []wire.Stage{r.Entering, r.Leaving} {
			p := packet(t, frame)
			assert.Equal(t, wire.Forward, stage(p), name)
			assert.Empty(t, cmp.Diff(append([]byte{}, frame...), append([]byte{}, p.Frame()...)), name)
		}
		assert.Equal(t, ReturnStats{NotTCP: 2}, r.Stats(), name)
	}
}

// from gives a packet one of many sources.
func from(t testing.TB, p *wire.Packet, i int) *wire.Packet {
	t.Helper()
	seg, err := p.TCP()
	if err != nil {
		t.Fatal(err)
	}
	seg.SetSource((endpointOf(client) + endpoint(i)).addrPort())
	return p
}

// many lets the segment enter from n sources.
func (l *link) many(n int, s tcp) {
	l.t.Helper()
	one, p := s.packet(l.t), new(wire.Packet)
	for i := range n {
		*p = *one
		l.Entering(from(l.t, p, i))
	}
}

func TestMemoryIsBounded(t *testing.T) {
	const over = 100
	opening := tcp{from: client, to: proxy1, flags: syn, seq: 1000, options: marked(KindTOAVIP, vip1)}
	t.Run("closed", func(t *testing.T) {
		l := newLink(t, FirstVIP)
		l.many(maxIdle+over, opening)
		l.many(maxIdle+over, tcp{from: client, to: proxy1, flags: rst, seq: 1001})
		assert.Len(t, l.entries, maxIdle)
		assert.Zero(t, l.Stats().Open)
	})
	t.Run("never answered", func(t *testing.T) {
		l := newLink(t, FirstVIP)
		l.many(maxIdle+over, opening)
		assert.Len(t, l.entries, maxIdle)
		assert.EqualValues(t, maxIdle, l.Stats().Open)
		assert.NotContains(t, l.entries, tuple{endpointOf(client), endpointOf(proxy1)}, "the oldest go")
		assert.Contains(t, l.entries, tuple{endpointOf(client) + maxIdle + over - 1, endpointOf(proxy1)}, "the newest stay")
	})
	t.Run("never answered, but asked by another connection", func(t *testing.T) {
		l := newLink(t, FirstVIP)
		l.many(maxIdle, opening)
		l.many(1, tcp{from: client, to: proxy1, flags: rst, seq: 1001})
		l.many(1, opening)
		l.Entering(from(t, opening.packet(t), maxIdle))
		assert.Contains(t, l.entries, tuple{endpointOf(client), endpointOf(proxy1)}, "is not the oldest any more")
		assert.NotContains(t, l.entries, tuple{endpointOf(client) + 1, endpointOf(proxy1)})
	})
	t.Run("all", func(t *testing.T) {
		l := newLink(t, FirstVIP)
		for i := range endpoint(maxEntries) {
			l.entries[tuple{i, 0}] = nil
		}
		l.syn(vip1, 1000)
		assert.Equal(t, proxy1, l.out(synAck, 5000, 1001))
		assert.Equal(t, ReturnStats{Full: 1, Untranslated: 1}, l.Stats())
	})
	t.Run("living", func(t *testing.T) {
		const n = maxIdle + over
		l := newLink(t, FirstVIP)
		asks, answers, p := opening.packet(t), tcp{from: proxy1, to: client, flags: synAck, ack: 1001}.packet(t), new(wire.Packet)
		for i := range n {
			*p = *asks
			l.Entering(from(t, p, i))
			*p = *answers
			seg, err := p.TCP()
			if err != nil {
				t.Fatal(err)
			}
			seg.SetDestination((endpointOf(client) + endpoint(i)).addrPort())
			l.Leaving(p)
		}
		assert.Len(t, l.entries, n, "an answered connection is never forgotten")
		assert.Zero(t, l.idle.Len())
	})
	t.Run("collisions", func(t *testing.T) {
		l := newLink(t, FirstVIP)
		opening.options = marked(KindTOAVIP, vip1)
		for range 2 { // one half of what is listed
			l.many(maxCollisions/2+over, opening)
			opening.options = marked(KindTOAVIP, vip2)
		}
		opening.options = marked(KindTOAVIP, vip3)
		l.many(maxCollisions/2+over, opening)
		l.many(maxCollisions/2+over, opening)
		assert.Len(t, l.Collisions(), maxCollisions)
		assert.EqualValues(t, maxCollisions+2*over, l.Stats().Collisions, "all are counted, once each")
		assert.Equal(t, 2, l.Collisions()[maxCollisions/2+over].SYNs)
	})
	t.Run("rivals", func(t *testing.T) {
		l := newLink(t, FirstVIP)
		l.open(vip1, 1000)
		for i := range maxRivals + over {
			l.syn((endpointOf(vip2) + endpoint(i)<<16).addrPort(), 9000)
		}
		e := l.entries[tuple{endpointOf(client), endpointOf(proxy1)}]
		assert.Len(t, e.rivals, maxRivals)
		assert.EqualValues(t, maxRivals+over, l.Stats().Collisions)
	})
}

// For the race detector: the wire's thread writes, others read.
func TestReadersWhileItRuns(t *testing.T) {
	r := NewReturn(FirstVIP, 0)
	b := newBalancer(t, Config{Services: map[netip.AddrPort]Group{vip1: {proxy1}, vip2: {proxy1}}})
	var readers sync.WaitGroup
	quit := make(chan struct{})
	readers.Go(func() {
		for {
			select {
			case <-quit:
				return
			default:
			}
			s := b.Stats()
			assert.LessOrEqual(t, s.Forwarded+s.Dropped(), s.Packets)
			assert.LessOrEqual(t, s.OptionsAdded, s.SYNs)
			assert.LessOrEqual(t, uint64(len(r.Collisions())), r.Stats().Collisions)
		}
	})
	const n = 500
	for i := range n {
		from := netip.AddrPortFrom(client.Addr(), uint16(20000+i))
		for _, vip := range []netip.AddrPort{vip1, vip2} {
			p := tcp{from: from, to: vip, flags: syn, options: linuxOptions}.packet(t)
			require.Equal(t, wire.Forward, b.Stage(p))
			r.Entering(p)
		}
	}
	close(quit)
	readers.Wait()
	assert.Len(t, r.Collisions(), n)
}
