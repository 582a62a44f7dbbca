package observe

import (
	"net/netip"
	"testing"

	"github.com/google/go-cmp/cmp"
	"github.com/stretchr/testify/assert"
)

func TestJoin(t *testing.T) {
	server := netip.MustParseAddrPort("10.0.0.9:6379")
	end := func(port uint16) netip.AddrPort {
		return netip.AddrPortFrom(netip.MustParseAddr("10.0.0.1"), port)
	}
	at := func(s State, port uint16) Socket { return Socket{Local: end(port), Remote: server, State: s} }
	far := func(s State, port uint16) Socket { return Socket{Local: server, Remote: end(port), State: s} }

	joined := Join(
		[]Socket{
			at(Established, 5), // nothing there: a ghost
			at(Established, 4), // nothing there: a ghost
			at(Established, 6), // half open
			at(Established, 7), // sound
			at(CloseWait, 9),
			at(FinWait2, 8), // in the accept queue, its client gone
			at(SynSent, 10), // refused a place
			{Local: end(6379), Remote: netip.MustParseAddrPort("0.0.0.0:0"), State: Listen},
		},
		[]Socket{
			far(SynRecv, 6), far(Established, 7), far(CloseWait, 8),
			far(Established, 11), // the client is gone without a word
			far(FinWait2, 9),
			{Local: server, Remote: netip.MustParseAddrPort("0.0.0.0:0"), State: Listen},
		},
	)
	want := Joined{
		{Established, None}:        {{end(4), server}, {end(5), server}},
		{Established, SynRecv}:     {{end(6), server}},
		{Established, Established}: {{end(7), server}},
		{FinWait2, CloseWait}:      {{end(8), server}},
		{CloseWait, FinWait2}:      {{end(9), server}},
		{SynSent, None}:            {{end(10), server}},
		{None, Established}:        {{end(11), server}},
	}
	same := cmp.Comparer(func(a, b netip.AddrPort) bool { return a == b })
	assert.Empty(t, cmp.Diff(want, joined, same))
	assert.Empty(t, cmp.Diff([]Connection{{end(4), server}, {end(5), server}}, joined.Ghosts(), same))
	assert.Equal(t, 1, joined.Count(Established, SynRecv))
	assert.Zero(t, joined.Count(Established, LastAck))
	assert.Empty(t, Join(nil, nil).Ghosts())
}
