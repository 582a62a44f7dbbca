package loadgen

import (
	"net/netip"
	"testing"
	"time"

	"github.com/stretchr/testify/assert"
	"github.com/stretchr/testify/require"
	"golang.org/x/sys/unix"
)

func TestEventsOfAnEarlierConnectionAreIgnored(t *testing.T) {
	// Close does not end an epoll registration while a copy of the
	// descriptor exists, as it does in a child between fork and exec.
	checkDescriptors(t)
	s, err := newSockets()
	require.NoError(t, err)
	defer s.close(Graceful)
	add := func() (c *conn, peer int) {
		pair, err := unix.Socketpair(unix.AF_UNIX, unix.SOCK_STREAM|unix.SOCK_CLOEXEC|unix.SOCK_NONBLOCK, 0)
		require.NoError(t, err)
		c = s.slot()
		c.fd = pair[0]
		require.Zero(t, s.watch(c))
		return c, pair[1]
	}
	old, oldPeer := add()
	defer unix.Close(oldPeer)
	duplicate, err := unix.FcntlInt(uintptr(old.fd), unix.F_DUPFD_CLOEXEC, 0)
	require.NoError(t, err)
	defer unix.Close(duplicate)
	s.drop(old, Graceful)

	drain := func() (events, known int) {
		ready, err := s.wait(0)
		require.NoError(t, err)
		for _, ev := range ready {
			if s.of(ev) != nil {
				known++
			}
		}
		return len(ready), known
	}
	drain()
	_, err = unix.Write(oldPeer, []byte("late"))
	require.NoError(t, err)
	events, known := drain()
	require.Equal(t, 1, events, "the kernel still reports the closed connection")
	assert.Zero(t, known, "its slot is free")

	c, peer := add()
	defer unix.Close(peer)
	require.Same(t, old, c, "the slot is used again")
	_, err = unix.Write(oldPeer, []byte("later"))
	require.NoError(t, err)
	events, known = drain()
	require.Equal(t, 2, events)
	assert.Equal(t, 1, known, "only the event of the new connection counts")
}

func TestListKeepsOrder(t *testing.T) {
	var l, other list
	conns := []*conn{{slot: 0}, {slot: 1}, {slot: 2}, {slot: 3}}
	order := func(l *list) (slots []int32) {
		for c := l.first; c != nil; c = c.next {
			slots = append(slots, c.slot)
			require.True(t, c.next == nil && l.last == c || c.next != nil && c.next.prev == c)
		}
		return slots
	}
	for _, c := range conns {
		c.moveTo(&l)
	}
	conns[1].moveTo(&other)
	assert.Equal(t, []int32{0, 2, 3}, order(&l), "from the middle")
	conns[0].moveTo(&l)
	assert.Equal(t, []int32{2, 3, 0}, order(&l), "from the front to the end of the same list")
	conns[0].leave()
	conns[0].leave()
	assert.Equal(t, []int32{2, 3}, order(&l), "from the end, twice")
	conns[2].leave()
	conns[3].leave()
	assert.Empty(t, order(&l))
	assert.Nil(t, l.last)
	assert.Equal(t, []int32{1}, order(&other))
}

func TestSourceErrors(t *testing.T) {
	checkDescriptors(t)
	_, err := LocalSource("x", netip.MustParseAddr("192.0.2.1")).Socket()
	require.ErrorIs(t, err, unix.EADDRNOTAVAIL, "not an address of this host")
	assert.Equal(t, NoLocalPort, classify(opening, err))
	_, err = LocalSource("x", netip.MustParseAddr("::1")).Socket()
	require.ErrorIs(t, err, unix.EAFNOSUPPORT)
}

func TestWaitIsNeverShort(t *testing.T) {
	s, err := newSockets()
	require.NoError(t, err)
	defer s.close(Graceful)
	for _, s.noPwait2 = range []bool{false, true} {
		for _, d := range []time.Duration{300 * time.Microsecond, 1500 * time.Microsecond} {
			// A wait that a signal interrupts may be shorter: the loop of the
			// engine waits again. It cannot be so every time.
			longest := time.Duration(0)
			for range 20 {
				begin := time.Now()
				_, err := s.wait(d)
				require.NoError(t, err)
				longest = max(longest, time.Since(begin))
			}
			assert.GreaterOrEqual(t, longest, d)
		}
	}
}
