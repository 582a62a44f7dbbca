package l4lb

import (
	"testing"

	"connlab/netlab/wire"

	"github.com/stretchr/testify/assert"
	"github.com/stretchr/testify/require"
)

// step is a segment between the client and the proxy.
type step struct {
	out      bool // from the proxy
	flags    wire.Flags
	seq, ack uint32
	size     int // of the data
}

func in(flags wire.Flags, seq, ack uint32, size int) step  { return step{false, flags, seq, ack, size} }
func out(flags wire.Flags, seq, ack uint32, size int) step { return step{true, flags, seq, ack, size} }

func (s step) segment(t testing.TB) *wire.Segment {
	t.Helper()
	made := tcp{from: client, to: proxy1, flags: s.flags, seq: s.seq, ack: s.ack, payload: make([]byte, s.size)}
	if s.out {
		made.from, made.to = made.to, made.from
	}
	seg, err := made.packet(t).TCP()
	require.NoError(t, err)
	return seg
}

const (
	syn    = wire.SYN
	ack    = wire.ACK
	fin    = wire.FIN | wire.ACK
	rst    = wire.RST
	synAck = wire.SYN | wire.ACK
)

// The client's SYN has sequence number 1000, the proxy's 5000.
func TestLife(t *testing.T) {
	handshake := []step{out(synAck, 5000, 1001, 0), in(ack, 1001, 5001, 0)}
	for _, row := range []struct {
		reason string
		steps  []step
		over   bool
	}{
		{"only asked", nil, false},
		{"answered", []step{out(synAck, 5000, 1001, 0)}, false},
		{"open", append(handshake, in(ack, 1001, 5001, 10), out(ack, 5001, 1011, 5)), false},
		{"refused", []step{out(rst|ack, 0, 1001, 0)}, true},
		{"the client gives up in the handshake", []step{out(synAck, 5000, 1001, 0), in(rst, 1001, 0, 0)}, true},

		{"half closed by the client", append(handshake, in(fin, 1001, 5001, 0), out(ack, 5001, 1002, 0)), false},
		{"half closed, data goes on", append(handshake, in(fin, 1001, 5001, 0), out(ack, 5001, 1002, 500), in(ack, 1002, 5501, 0)), false},
		{"LAST_ACK", append(handshake, in(fin, 1001, 5001, 0), out(fin, 5001, 1002, 0)), false},
		{"LAST_ACK, an old acknowledgment", append(handshake, in(fin, 1001, 5001, 0), out(fin, 5001, 1002, 100), in(ack, 1002, 5001, 0)), false},
		{"closed by the client first", append(handshake, in(fin, 1001, 5001, 0), out(fin, 5001, 1002, 0), in(ack, 1002, 5002, 0)), true},
		{"FINs with data", append(handshake, in(fin, 1001, 5001, 9), out(fin, 5001, 1011, 100), in(ack, 1011, 5102, 0)), true},
		{"both FINs sent twice", append(handshake,
			in(fin, 1001, 5001, 0), in(fin, 1001, 5001, 0), out(ack, 5001, 1002, 0), in(fin, 1001, 5001, 0),
			out(fin, 5001, 1002, 0), out(fin, 5001, 1002, 0), in(ack, 1002, 5002, 0)), true},

		{"the client's FIN again, when it was acknowledged", append(handshake,
			in(fin, 1001, 5001, 0), out(fin, 5001, 1002, 0), in(fin, 1001, 5001, 0), in(ack, 1002, 5002, 0)), true},
		{"a FIN that comes with a SYN is none", append(handshake,
			in(syn|fin, 1001, 5001, 0), out(fin, 5001, 1002, 0), in(ack, 1002, 5002, 0)), false},

		{"FIN_WAIT_2", append(handshake, out(fin, 5001, 1001, 0), in(ack, 1001, 5002, 0)), false},
		{"FIN_WAIT_2, the client sends on", append(handshake, out(fin, 5001, 1001, 0), in(ack, 1001, 5002, 7), out(ack, 5002, 1008, 0)), false},
		{"FIN_WAIT_2 meets the client's FIN, not acknowledged yet", append(handshake, out(fin, 5001, 1001, 0), in(ack, 1001, 5002, 0), in(fin, 1001, 5002, 0)), false},
		{"TIME_WAIT", append(handshake, out(fin, 5001, 1001, 0), in(ack, 1001, 5002, 0), in(fin, 1001, 5002, 0), out(ack, 5002, 1002, 0)), true},
		{"CLOSING: FINs cross, one is acknowledged", append(handshake, out(fin, 5001, 1001, 0), in(fin, 1001, 5001, 0), out(ack, 5002, 1002, 0)), false},
		{"CLOSING, both acknowledged", append(handshake, out(fin, 5001, 1001, 0), in(fin, 1001, 5001, 0), out(ack, 5002, 1002, 0), in(ack, 1002, 5002, 0)), true},

		{"reset by the proxy", append(handshake, out(rst|ack, 5001, 1001, 0)), true},
		{"reset by the client", append(handshake, in(rst, 1001, 0, 0)), true},
		{"reset behind data that are on their way", append(handshake, in(ack, 1001, 5001, 1000), in(rst, 2001, 0, 0)), true},
		{"reset by a client that was sent a challenge ACK", append(handshake, in(ack, 1001, 5001, 50), out(ack, 5001, 1051, 0), in(rst, 1051, 0, 0)), true},
		{"a reset of the past", append(handshake, in(ack, 1001, 5001, 50), out(ack, 5001, 1051, 0), in(rst, 1001, 0, 0)), false},
		{"a reset of another connection", append(handshake, in(rst, 3_000_000_000, 0, 0)), false},
		{"a FIN of another connection", append(handshake,
			in(fin, 3_000_000_000, 1, 0), out(fin, 5001, 1001, 0), in(ack, 1001, 5002, 0), out(ack, 5002, 3_000_000_001, 0)), false},
		{"a FIN of another connection near by, then the right one", append(handshake,
			in(fin, 9000, 1, 0), in(fin, 1001, 5001, 0), out(fin, 5001, 1002, 0), in(ack, 1002, 5002, 0)), true},
		{"a SYN ends nothing", append(handshake, in(syn, 7000, 0, 0)), false},
		{"nothing wakes the dead", append(handshake, in(rst, 1001, 0, 0), out(ack, 5001, 1001, 0), in(ack, 1001, 5001, 0)), true},
	} {
		for _, wrap := range []uint32{0, ^uint32(0) - 1005, ^uint32(0) - 1000} { // sequence numbers go round
			l := begun(1000 + wrap)
			for _, s := range row.steps {
				s.seq += wrap
				if s.flags.Has(ack) {
					s.ack += wrap
				}
				if s.out {
					require.False(t, l.leaving(s.segment(t)), "%s, offset %d: no other SYN was answered", row.reason, wrap)
				} else {
					l.entering(s.segment(t))
				}
			}
			assert.Equal(t, row.over, l.over, "%s, offset %d", row.reason, wrap)
		}
	}
}

func TestLifeAnew(t *testing.T) {
	l := begun(1000)
	for _, s := range []step{out(synAck, 5000, 1001, 0), out(synAck, 5000, 1001, 0), out(ack, 5001, 1001, 0)} {
		require.False(t, l.leaving(s.segment(t)), "the SYN-ACK of this life, again, and a challenge ACK")
	}
	assert.True(t, l.leaving(out(synAck, 8000, 7001, 0).segment(t)), "the proxy answers another SYN: its old socket is gone")
	assert.Equal(t, life{iss: 7000, expected: 7001, answered: true}, l)
	l.entering(in(rst, 1001, 0, 0).segment(t))
	assert.False(t, l.over, "a reset of the old life")
	l.entering(in(rst, 7001, 0, 0).segment(t))
	assert.True(t, l.over)
}

func TestAnswered(t *testing.T) {
	for _, row := range []struct {
		reason string
		step   step
		want   bool
	}{
		{"SYN-ACK", out(synAck, 5000, 1001, 0), true},
		{"refused", out(rst|ack, 0, 1001, 0), true},
		{"an ACK, of a TIME_WAIT", out(ack, 4000, 333, 0), true},
		{"the client's own data", in(ack, 1001, 1, 3), false},
	} {
		l := begun(1000)
		if row.step.out {
			l.leaving(row.step.segment(t))
		} else {
			l.entering(row.step.segment(t))
		}
		assert.Equal(t, row.want, l.answered, row.reason)
	}
}
