package twrecycle

import (
	"bytes"
	"net/netip"
	"testing"
	"time"

	"connlab/netlab/wire"

	"github.com/stretchr/testify/assert"
	"github.com/stretchr/testify/require"
)

// assertForwards fails unless the stage forwards the frame unchanged, or drops it
// and it is a request for a connection.
func assertForwards(t *testing.T, stage wire.Stage, frame []byte) {
	t.Helper()
	p := packet(t, frame)
	verdict := stage(p)
	assert.True(t, bytes.Equal(frame, p.Frame()), "changed")
	if verdict == wire.Forward {
		return
	}
	require.Equal(t, wire.Drop, verdict)
	seg, err := packet(t, frame).TCP()
	require.NoError(t, err, "dropped")
	assert.Equal(t, syn, seg.Flags()&(wire.SYN|wire.ACK|wire.RST|wire.FIN), "dropped")
}

// FuzzStage puts any frame through both stages of a server that remembers a peer
// and has one of its connections, and of a clock.
func FuzzStage(f *testing.F) {
	for _, flags := range []wire.Flags{syn, ack, fin, rst, synAck, syn | wire.FIN, 0} {
		for _, value := range []uint32{1, 2000} {
			f.Add(segment{from: later, to: server, flags: flags, options: timestamps(value)}.frame(f))
		}
		f.Add(segment{from: nat, to: server, flags: flags, seq: clientSeq, ack: serverSeq}.frame(f))
		f.Add(segment{from: server, to: nat, flags: flags, seq: serverSeq, ack: clientSeq, payload: 3}.frame(f))
	}
	f.Add([]byte{})
	f.Add([]byte{1, 2, 3})
	f.Fuzz(func(t *testing.T, frame []byte) {
		if len(frame) > 2000 {
			return
		}
		r := newRig(t)
		r.served(ap("10.1.0.7:39999"), 1000)
		r.connects(nat, timestamps(1001))
		assertForwards(t, r.Entering, frame)
		before := r.Stats()
		assertForwards(t, r.Leaving, frame)
		assert.Equal(t, before.SYNs, r.Stats().SYNs, "what leaves is not judged")

		clock, p := NewClock(1<<32-5), packet(t, frame)
		assert.Equal(t, wire.Forward, clock.Leaving(p))
		assert.Equal(t, wire.Forward, clock.Entering(p))
		assert.Len(t, p.Frame(), len(frame))
	})
}

// FuzzSequence puts any order of segments of three connections of one address
// through the stages, two bytes a segment.
func FuzzSequence(f *testing.F) {
	f.Add([]byte{0, 0, 12, 0, 1, 0, 10, 0, 2, 1, 0, 1, 64, 2})
	f.Add([]byte{0, 0, 12, 0, 2, 4, 10, 5, 1, 5, 3, 0, 128, 7, 0, 3})
	f.Fuzz(func(t *testing.T, script []byte) {
		r := newRig(t)
		for script := script[:min(len(script), 200)]; len(script) >= 2; script = script[2:] {
			how, what := script[0], script[1]
			x := segment{
				from:  netip.AddrPortFrom(nat.Addr(), 40000+uint16(how>>4&3)%3),
				to:    server,
				flags: []wire.Flags{syn, ack, fin, rst, synAck, ack, syn | wire.FIN, 0}[how&7],
				seq:   clientSeq + uint32(what&3), ack: serverSeq + uint32(what>>2&3),
			}
			if what&16 == 0 {
				x.options = timestamps(uint32(what>>5) * 1000)
			}
			if how&64 != 0 {
				r.now = r.now.Add(400 * time.Millisecond)
			}
			if how&128 != 0 {
				r.now = r.now.Add(30 * time.Second)
			}
			stage := r.Entering
			if how&8 != 0 {
				x.from, x.to, x.seq, x.ack = x.to, x.from, x.ack, x.seq
				stage = r.Leaving
			}
			assertForwards(t, stage, x.frame(t))
			s := r.Stats()
			assert.LessOrEqual(t, s.Rejected, s.SYNs)
			assert.LessOrEqual(t, s.Conns, 3)
			assert.LessOrEqual(t, s.Peers, 1)
			assert.Zero(t, s.Untracked)
			for key, c := range r.conns {
				assert.Equal(t, key, c.tuple)
				assert.True(t, c.state != timeWait || c.until.After(r.now), "a TIME_WAIT that is over")
			}
		}
	})
}
