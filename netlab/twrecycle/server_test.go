package twrecycle

import (
	"math/rand/v2"
	"net/netip"
	"testing"
	"time"

	"connlab/netlab/wire"

	"github.com/google/go-cmp/cmp"
	"github.com/gopacket/gopacket/layers"
	"github.com/stretchr/testify/assert"
	"github.com/stretchr/testify/require"
)

func TestRule(t *testing.T) {
	const last = 1_000_000
	short := []layers.TCPOption{{OptionType: layers.TCPOptionKindTimestamps, OptionLength: 6, OptionData: make([]byte, 4)}}
	for _, row := range []struct {
		reason  string
		last    uint32
		from    netip.AddrPort
		flags   wire.Flags
		options []layers.TCPOption
		after   time.Duration
		want    wire.Verdict
	}{
		{"its clock is ahead", last, later, syn, timestamps(last + 5000), 0, wire.Forward},
		{"its clock is the same", last, later, syn, timestamps(last), 0, wire.Forward},
		{"one tick behind is within the window", last, later, syn, timestamps(last - 1), 0, wire.Forward},
		{"two ticks behind are not", last, later, syn, timestamps(last - 2), 0, wire.Drop},
		{"far behind", last, later, syn, timestamps(1), 0, wire.Drop},
		{"just less than half the circle behind", last, later, syn, timestamps(last + 1<<31 + 1), 0, wire.Drop},
		{"half the circle away counts as ahead", last, later, syn, timestamps(last + 1<<31), 0, wire.Forward},
		{"behind across zero", 5, later, syn, timestamps(1<<32 - 1), 0, wire.Drop},
		{"ahead across zero", 1<<32 - 1, later, syn, timestamps(3), 0, wire.Forward},
		{"zero is a timestamp like any other", 0, later, syn, timestamps(1<<32 - 2), 0, wire.Drop},
		{"no timestamp, no comparison", last, later, syn, nil, 0, wire.Forward},
		{"an option of the wrong length is no timestamp", last, later, syn, short, 0, wire.Forward},
		{"asking for ECN changes nothing", last, later, syn | wire.ECE | wire.CWR, timestamps(1), 0, wire.Drop},
		{"a listener drops SYN with FIN before it asks", last, later, syn | wire.FIN, timestamps(1), 0, wire.Forward},
		{"the remembered address has another port", last, ap("10.1.0.7:1"), syn, timestamps(1), 0, wire.Drop},
		{"another address", last, ap("10.1.0.8:40001"), syn, timestamps(1), 0, wire.Forward},
		{"the last second of the minute", last, later, syn, timestamps(1), 59 * time.Second, wire.Drop},
		{"the minute is over", last, later, syn, timestamps(1), 60 * time.Second, wire.Forward},
	} {
		t.Run(row.reason, func(t *testing.T) {
			r := newRig(t)
			r.served(nat, row.last)
			before := r.Stats()
			r.now = r.now.Add(row.after)
			require.Equal(t, row.want, r.in(row.from, row.flags, clientSeq-1, 0, row.options))
			rejected := uint64(0)
			if row.want == wire.Drop {
				rejected = 1
			}
			assert.Equal(t, rejected, r.Stats().Rejected-before.Rejected)
		})
	}
}

// The kernel's clock for this counts whole seconds.
func TestMinuteInWholeSeconds(t *testing.T) {
	r := newRig(t)
	r.now = r.now.Add(900 * time.Millisecond)
	r.served(nat, 1000)
	r.now = r.now.Add(59*time.Second + 99*time.Millisecond)
	require.Equal(t, wire.Drop, r.asks(later, timestamps(1)), "999 ms into the 59th second after")
	r.now = r.now.Add(time.Millisecond)
	require.Equal(t, wire.Forward, r.asks(later, timestamps(1)), "59.1 s after, the 60th second")
}

// The host has one memory for all its ports.
func TestAnyPortOfTheServer(t *testing.T) {
	r := newRig(t)
	r.served(nat, 1000)
	p := packet(t, segment{from: later, to: ap("10.2.0.1:80"), flags: syn, options: timestamps(1)}.frame(t))
	assert.Equal(t, wire.Drop, r.Entering(p))
}

// step is a segment after the handshake.
type step struct {
	out      bool
	flags    wire.Flags
	seq, ack uint32
	payload  int
}

func TestWhoClosesFirst(t *testing.T) {
	const c, s = clientSeq, serverSeq
	for _, row := range []struct {
		reason  string
		untimed bool
		steps   []step
		want    Stats // beside SYNs
	}{
		{"nobody", false, nil, Stats{Conns: 1}},
		{"the server, unanswered so far", false, []step{{out: true, flags: fin, seq: s, ack: c}}, Stats{Conns: 1}},
		{"the server, acknowledged: FIN_WAIT_2 writes", false, []step{
			{out: true, flags: fin, seq: s, ack: c}, {flags: ack, seq: c, ack: s + 1},
		}, Stats{Stamps: 1, Peers: 1, Conns: 1}},
		{"the server: TIME_WAIT writes again", false, []step{
			{out: true, flags: fin, seq: s, ack: c}, {flags: ack, seq: c, ack: s + 1},
			{flags: fin, seq: c, ack: s + 1}, {out: true, flags: ack, seq: s + 1, ack: c + 1},
		}, Stats{TimeWaits: 1, Stamps: 2, Peers: 1, Conns: 1}},
		{"the server, answered by a FIN at once", false, []step{
			{out: true, flags: fin, seq: s, ack: c}, {flags: fin, seq: c, ack: s + 1},
		}, Stats{TimeWaits: 1, Stamps: 1, Peers: 1, Conns: 1}},
		{"the server, with data: its acknowledgment is not the FIN's", false, []step{
			{out: true, flags: fin, seq: s, ack: c, payload: 10}, {flags: ack, seq: c, ack: s + 10},
		}, Stats{Conns: 1}},
		{"the server, with data, all of it acknowledged", false, []step{
			{out: true, flags: fin, seq: s, ack: c, payload: 10}, {flags: ack, seq: c, ack: s + 11},
		}, Stats{Stamps: 1, Peers: 1, Conns: 1}},
		{"the server, twice: a retransmission", false, []step{
			{out: true, flags: fin, seq: s, ack: c}, {out: true, flags: fin, seq: s, ack: c}, {flags: fin, seq: c, ack: s + 1},
		}, Stats{TimeWaits: 1, Stamps: 1, Peers: 1, Conns: 1}},
		{"the server, and the peer's FIN comes twice", false, []step{
			{out: true, flags: fin, seq: s, ack: c}, {flags: fin, seq: c, ack: s + 1}, {flags: fin, seq: c, ack: s + 1},
		}, Stats{TimeWaits: 1, Stamps: 1, Peers: 1, Conns: 1}},
		{"the server, without timestamps", true, []step{
			{out: true, flags: fin, seq: s, ack: c}, {flags: fin, seq: c, ack: s + 1},
		}, Stats{TimeWaits: 1, Conns: 1}},
		{"the client", false, []step{
			{flags: fin, seq: c, ack: s}, {out: true, flags: fin, seq: s, ack: c + 1}, {flags: ack, seq: c + 1, ack: s + 1},
		}, Stats{}},
		{"the client, and the server takes its time", false, []step{
			{flags: fin, seq: c, ack: s}, {out: true, flags: ack, seq: s, ack: c + 1},
			{out: true, flags: ack, seq: s, ack: c + 1, payload: 5}, {flags: ack, seq: c + 1, ack: s + 5},
			{out: true, flags: fin, seq: s + 5, ack: c + 1}, {flags: ack, seq: c + 1, ack: s + 6},
		}, Stats{}},
		{"the client, the server's FIN not acknowledged", false, []step{
			{flags: fin, seq: c, ack: s}, {out: true, flags: fin, seq: s, ack: c + 1}, {flags: ack, seq: c + 1, ack: s},
		}, Stats{Conns: 1}},
		{"both: the client's FIN passes the stage first and meets the server's", false, []step{
			{flags: fin, seq: c, ack: s}, {out: true, flags: fin, seq: s, ack: c}, {flags: ack, seq: c + 1, ack: s + 1},
		}, Stats{TimeWaits: 1, Stamps: 1, Peers: 1, Conns: 1}},
		{"both: the server's FIN passes first", false, []step{
			{out: true, flags: fin, seq: s, ack: c}, {flags: fin, seq: c, ack: s}, {flags: ack, seq: c + 1, ack: s + 1},
		}, Stats{TimeWaits: 1, Stamps: 1, Peers: 1, Conns: 1}},
		{"the client resets", false, []step{{flags: rst, seq: c}}, Stats{}},
		{"the server resets", false, []step{{out: true, flags: rst, seq: s}}, Stats{}},
		{"the server, and the client answers by a reset", false, []step{
			{out: true, flags: fin, seq: s, ack: c}, {flags: rst, seq: c},
		}, Stats{}},
		{"the server, a reset kills the TIME_WAIT and not the stamp", false, []step{
			{out: true, flags: fin, seq: s, ack: c}, {flags: fin, seq: c, ack: s + 1}, {flags: rst, seq: c + 1},
		}, Stats{TimeWaits: 1, Stamps: 1, Peers: 1}},
	} {
		t.Run(row.reason, func(t *testing.T) {
			r := newRig(t)
			options := timestamps(1000)
			if row.untimed {
				options = nil
			}
			r.connects(nat, options)
			for _, x := range row.steps {
				made := segment{from: nat, to: server, flags: x.flags, seq: x.seq, ack: x.ack, payload: x.payload, options: options}
				stage := r.Entering
				if x.out {
					made.from, made.to, stage = server, nat, r.Leaving
				}
				require.Equal(t, wire.Forward, stage(packet(t, made.frame(t))))
			}
			row.want.SYNs = 1
			assert.Empty(t, cmp.Diff(row.want, r.Stats()))
		})
	}
}

// The memory is of a peer, whoever asked for the connection.
func TestServerThatConnects(t *testing.T) {
	r := newRig(t)
	r.out(nat, syn, serverSeq-1, 0)
	require.Equal(t, wire.Forward, r.in(nat, synAck, clientSeq-1, serverSeq, timestamps(1000)))
	r.out(nat, ack, serverSeq, clientSeq)
	r.serverCloses(nat, timestamps(1000))
	assert.Empty(t, cmp.Diff(Stats{TimeWaits: 1, Stamps: 1, Peers: 1, Conns: 1}, r.Stats()))
	assert.Equal(t, wire.Drop, r.asks(later, timestamps(1)))
}

// The stamp is the last timestamp that the connection brought, and a late
// duplicate does not turn it back.
func TestStampIsTheLastTimestamp(t *testing.T) {
	r := newRig(t)
	r.connects(nat, timestamps(1000))
	r.in(nat, ack, clientSeq, serverSeq, timestamps(3000))
	r.in(nat, ack, clientSeq, serverSeq, timestamps(2000))
	r.in(nat, ack, clientSeq, serverSeq, nil)
	r.serverCloses(nat, timestamps(2500))
	assert.Equal(t, wire.Drop, r.asks(later, timestamps(2998)))
	assert.Equal(t, wire.Forward, r.asks(later, timestamps(2999)))
}

// Two clients share an address, one clock is far behind the other. Times are in
// seconds after the first connection.
func TestTwoClocksBehindOneAddress(t *testing.T) {
	r := newRig(t)
	begin := r.now
	at := func(second int) { r.now = begin.Add(time.Duration(second) * time.Second) }
	ahead := func() []layers.TCPOption { return timestamps(500_000 + uint32(r.now.Sub(begin).Milliseconds())) }
	behind := func() []layers.TCPOption { return timestamps(1000 + uint32(r.now.Sub(begin).Milliseconds())) }

	old := ap("10.1.0.7:39999")
	r.connects(old, behind())
	r.connects(nat, behind())
	r.serverCloses(nat, behind())
	require.Equal(t, wire.Forward, r.asks(later, behind()), "nothing is remembered but its own clock")

	at(1)
	r.connects(ap("10.1.0.7:40002"), ahead())
	require.Equal(t, wire.Forward, r.asks(later, behind()), "a connection alone is not remembered")
	r.serverCloses(ap("10.1.0.7:40002"), ahead())
	require.Equal(t, wire.Drop, r.asks(later, behind()))

	at(3)
	require.Equal(t, wire.Drop, r.asks(later, behind()), "sent again, its clock has gone on, and so has the other")
	require.Equal(t, wire.Forward, r.asks(ap("10.1.0.7:40003"), ahead()), "the clock ahead is never rejected")

	at(10)
	r.in(old, ack, clientSeq, serverSeq, behind())
	r.serverCloses(old, behind())
	require.Equal(t, wire.Drop, r.asks(later, behind()), "the close of the one behind does not turn the stamp back")

	at(50)
	r.connects(ap("10.1.0.7:40004"), ahead())
	r.serverCloses(ap("10.1.0.7:40004"), ahead())
	at(61)
	require.Equal(t, wire.Drop, r.asks(later, behind()), "a minute after the first close, but not after the last")
	at(110)
	require.Equal(t, wire.Forward, r.asks(later, behind()), "a minute after the last")
}

// A later stamp gives way to an earlier one when it is more than a minute old: one
// second more than it takes to reject nobody.
func TestOldStampGivesWay(t *testing.T) {
	for _, row := range []struct {
		after  time.Duration
		stamps uint64
		want   wire.Verdict
	}{
		{60 * time.Second, 1, wire.Forward},
		{61 * time.Second, 2, wire.Drop},
	} {
		r := newRig(t)
		r.served(nat, 500_000)
		r.now = r.now.Add(row.after)
		r.served(later, 1000)
		assert.Equal(t, row.stamps, r.Stats().Stamps, "after %v", row.after)
		assert.Equal(t, row.want, r.asks(nat, timestamps(900)), "after %v", row.after)
	}
}

// A SYN that meets a socket never comes to the rule.
func TestSocketAnswersForItself(t *testing.T) {
	r := newRig(t)
	r.connects(nat, timestamps(1000))
	r.served(later, 500_000)
	require.Equal(t, wire.Forward, r.asks(nat, timestamps(1)), "established")
	require.EqualValues(t, 2, r.Stats().SYNs, "not counted")

	require.Equal(t, wire.Forward, r.asks(later, timestamps(1)), "TIME_WAIT")
	r.now = r.now.Add(recycledAfter - 1)
	require.Equal(t, wire.Forward, r.asks(later, timestamps(1)), "still")
	r.now = r.now.Add(1)
	require.Equal(t, wire.Drop, r.asks(later, timestamps(1)), "recycled")
	assert.Equal(t, 1, r.Stats().Conns, "the established one")
}

// The socket that the TIME_WAIT's own tuple gets is not the one that is recycled.
func TestTupleBegunAnewInTimeWait(t *testing.T) {
	r := newRig(t)
	r.served(nat, 1000)
	r.connects(nat, timestamps(2000))
	r.now = r.now.Add(time.Hour)
	assert.Equal(t, 1, r.Stats().Conns)
	r.serverCloses(nat, timestamps(3000))
	assert.EqualValues(t, 2, r.Stats().TimeWaits)
}

// An unanswered SYN leaves nothing behind, so no flood fills the memory.
func TestUnansweredSYN(t *testing.T) {
	r := newRig(t)
	for port := range uint16(100) {
		require.Equal(t, wire.Forward, r.asks(netip.AddrPortFrom(nat.Addr(), 1+port), timestamps(1)))
	}
	assert.Equal(t, Stats{SYNs: 100}, r.Stats())
}

// What cannot be read passes.
func TestNotTCP(t *testing.T) {
	r := newRig(t)
	r.served(nat, 1000)
	fragment := segment{from: later, to: server, flags: syn, options: timestamps(1)}.frame(t)
	fragment[14+6] |= 0x20 // more fragments
	for _, frame := range [][]byte{{}, {1, 2, 3}, fragment} {
		assert.Equal(t, wire.Forward, r.Entering(packet(t, frame)))
		assert.Equal(t, wire.Forward, r.Leaving(packet(t, frame)))
	}
	assert.Zero(t, r.Stats().Rejected)
}

// Clocks that are uniform over the circle of 32 bits: half of it is behind any
// point, so half of the SYNs are rejected, whatever happened before. The bounds
// are five standard deviations of that binomial distribution.
func TestUniformClocks(t *testing.T) {
	const n = 4096
	const mean, deviation = n / 2, 32
	random := rand.New(rand.NewPCG(3, 10))
	r := newRig(t)
	for i := range n {
		r.now = r.now.Add(10 * time.Millisecond)
		from := netip.AddrPortFrom(nat.Addr(), uint16(10_000+i))
		value := timestamps(random.Uint32())
		if r.asks(from, value) == wire.Forward {
			r.out(from, synAck, serverSeq-1, clientSeq)
			r.serverCloses(from, value)
		}
	}
	s := r.Stats()
	t.Logf("%+v", s)
	assert.InDelta(t, mean, s.Rejected, 5*deviation)
	assert.Equal(t, s.SYNs-s.Rejected, s.TimeWaits)
	assert.Equal(t, s.TimeWaits, s.Stamps)
	assert.Equal(t, 1, s.Peers)
}

func TestMemoryIsBounded(t *testing.T) {
	r := newRig(t)
	addr := func(i int) netip.AddrPort {
		return netip.AddrPortFrom(netip.AddrFrom4([4]byte{10, byte(i >> 16), byte(i >> 8), byte(i)}), 40000)
	}
	for i := range maxConns {
		require.NotNil(t, r.begin(tuple{addr(i), server}))
	}
	require.Nil(t, r.begin(tuple{addr(maxConns), server}))
	require.NotNil(t, r.begin(tuple{addr(0), server}), "the same tuple again")
	assert.Equal(t, Stats{Conns: maxConns, Untracked: 1}, r.Stats())
	r.out(addr(maxConns), synAck, serverSeq-1, clientSeq)
	r.serverCloses(addr(maxConns), timestamps(1))
	assert.Equal(t, Stats{Conns: maxConns, Untracked: 2}, r.Stats(), "the rule knows nothing of it")

	remember := func(i int) {
		r.remember(&conn{tuple: tuple{addr(i), server}, recent: stamp{value: 1, second: r.now.Unix()}}, r.now)
	}
	r.stats = Stats{}
	for i := range maxPeers {
		remember(i)
	}
	remember(maxPeers)
	remember(0)
	assert.Equal(t, Stats{Stamps: maxPeers + 1, Peers: maxPeers, Conns: maxConns, Untracked: 1}, r.Stats())
	r.now = r.now.Add(pawsMSL * time.Second)
	remember(maxPeers)
	assert.Equal(t, Stats{Stamps: maxPeers + 2, Peers: 1, Conns: maxConns, Untracked: 1}, r.Stats(), "the others reject nobody any more")
}
