package observe

import (
	"encoding/binary"
	"math/rand/v2"
	"slices"
	"testing"
	"time"

	"github.com/stretchr/testify/assert"
	"github.com/stretchr/testify/require"
	"golang.org/x/net/bpf"
)

// frame is an Ethernet frame with an IPv4 header of ihl words and two ports.
func frame(change func(b []byte), ihl int, source, destination uint16) []byte {
	b := make([]byte, 14+4*ihl+20)
	binary.BigEndian.PutUint16(b[12:], 0x0800)
	b[14] = 0x40 | byte(ihl)
	b[14+9] = 6
	binary.BigEndian.PutUint16(b[14+4*ihl:], source)
	binary.BigEndian.PutUint16(b[14+4*ihl+2:], destination)
	if change != nil {
		change(b)
	}
	return b
}

func TestPortFilter(t *testing.T) {
	vm, err := bpf.NewVM(portFilter(6379))
	require.NoError(t, err)
	tests := []struct {
		why   string
		frame []byte
		keep  bool
	}{
		{"to the port", frame(nil, 5, 40000, 6379), true},
		{"from the port", frame(nil, 5, 6379, 40000), true},
		{"both", frame(nil, 5, 6379, 6379), true},
		{"an IP header with options is longer", frame(nil, 7, 40000, 6379), true},
		{"another port", frame(nil, 5, 40000, 6380), false},
		{"the ports read past the wrong header length", frame(func(b []byte) {
			binary.BigEndian.PutUint16(b[14+20:], 6379)
		}, 7, 40000, 6380), false},
		{"UDP", frame(func(b []byte) { b[14+9] = 17 }, 5, 40000, 6379), false},
		{"IPv6", frame(func(b []byte) { binary.BigEndian.PutUint16(b[12:], 0x86dd) }, 5, 40000, 6379), false},
		{"ARP", frame(func(b []byte) { binary.BigEndian.PutUint16(b[12:], 0x0806) }, 5, 40000, 6379), false},
		{"a later fragment has no ports", frame(func(b []byte) { b[14+7] = 1 }, 5, 40000, 6379), false},
		{"the first fragment has", frame(func(b []byte) { b[14+6] = 0x20 }, 5, 40000, 6379), true},
		{"do not fragment", frame(func(b []byte) { b[14+6] = 0x40 }, 5, 40000, 6379), true},
		{"cut before the ports", frame(nil, 5, 40000, 6379)[:14+20], false},
		{"nothing", nil, false},
	}
	for _, tt := range tests {
		kept, err := vm.Run(tt.frame)
		require.NoError(t, err, tt.why)
		assert.Equal(t, tt.keep, kept >= len(tt.frame) && kept > 0, tt.why)
	}
}

// Several sockets, each in the order of its times and late by less than the
// slack, come out as one order, and every packet once.
func TestPacketsComeOutInTheOrderOfTheirTimes(t *testing.T) {
	const seed, packets, sockets = 20261122, 5000, 3
	rng := rand.New(rand.NewPCG(seed, 0))
	start := time.Unix(1_800_000_000, 0)
	arriving := make([]packet, packets) // in the order of arrival
	arrived := make([]time.Time, packets)
	at := start
	for i := range arriving {
		at = at.Add(time.Duration(rng.IntN(300)) * time.Microsecond)
		arriving[i] = packet{point: rng.IntN(sockets), at: at.Add(-time.Duration(rng.Int64N(int64(captureSlack)))), length: i}
		arrived[i] = at
	}

	var held, out []packet
	for i := 0; i < packets; {
		n := min(1+rng.IntN(40), packets-i)
		held = append(held, arriving[i:i+n]...)
		i += n
		upTo := arrived[i-1] // a round that began now would have all that arrived before
		out = append(out, takeBefore(&held, upTo.Add(-captureSlack))...)
		for _, p := range held {
			require.False(t, p.at.Before(upTo.Add(-captureSlack)), "seed %d: held back for nothing", seed)
		}
	}
	out = append(out, takeBefore(&held, time.Unix(1<<40, 0))...)
	assert.Empty(t, held)
	assert.True(t, slices.IsSortedFunc(out, func(a, b packet) int { return a.at.Compare(b.at) }), "seed %d", seed)
	seen := make(map[int]bool)
	for _, p := range out {
		seen[p.length] = true
	}
	assert.Len(t, out, packets)
	assert.Len(t, seen, packets)
}

func TestPacketsOfOneTimeStayInTheirOrder(t *testing.T) {
	at := time.Unix(1, 0)
	held := []packet{{length: 1, at: at}, {length: 2, at: at}, {length: 3, at: at.Add(-1)}, {length: 4, at: at.Add(1)}}
	var order []int
	for _, p := range takeBefore(&held, at.Add(1)) {
		order = append(order, p.length)
	}
	assert.Equal(t, []int{3, 1, 2}, order)
	require.Len(t, held, 1, "what is from the time itself on stays")
	assert.Equal(t, 4, held[0].length)
}

func TestStamp(t *testing.T) {
	_, err := stamp(nil)
	require.ErrorIs(t, err, errNoStamp)
	_, err = stamp(make([]byte, 24))
	assert.Error(t, err, "a control message of length 0")
}
