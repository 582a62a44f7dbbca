package wire

import (
	"encoding/binary"
	"math/rand/v2"
	"testing"
	"time"

	"connlab/netlab"

	"github.com/google/go-cmp/cmp"
	"github.com/stretchr/testify/assert"
	"github.com/stretchr/testify/require"
	"golang.org/x/sys/unix"
)

// number is which of the numbered frames a packet is.
func number(p *Packet) int { return int(binary.BigEndian.Uint32(p.Frame())) }

func TestStagesInOrder(t *testing.T) {
	const n = 200
	var seen []string // by the wire's one thread, until it stops
	says := func(name string, verdict func(i int) Verdict) Stage {
		return func(p *Packet) Verdict {
			if number(p) < 3 {
				seen = append(seen, name)
			}
			return verdict(number(p))
		}
	}
	all := func(int) Verdict { return Forward }
	odd := func(i int) Verdict { return Verdict(i % 2) }
	w := &Wire{
		Leaving:  []Stage{says("l1", all), says("l2", odd), says("l3", all)},
		Entering: []Stage{says("e1", all)},
	}
	r := newRigOf(t, w, netlab.LinkSpec{})
	w.Leaving[0] = nil // the wire has its own copy

	var even []int
	for i := 0; i < n; i += 2 {
		even = append(even, i)
	}
	assert.Empty(t, cmp.Diff(even, carry(t, n, r.a, r.b, r.atoB)))
	assert.Equal(t, Counts{Received: n, Forwarded: n / 2, Dropped: n / 2}, r.atoB())
	assert.Empty(t, cmp.Diff(upTo(n), carry(t, n, r.b, r.a, r.btoA)))
	assert.Equal(t, Counts{Received: n, Forwarded: n}, r.btoA())
	require.NoError(t, r.stop())
	assert.Equal(t, []string{"l1", "l2", "l3", "l1", "l2", "l1", "l2", "l3", "e1", "e1", "e1"}, seen,
		"each in turn, none after a drop, and those of the other direction only for it")
}

func TestUnknownVerdictDrops(t *testing.T) {
	w := &Wire{Leaving: []Stage{func(*Packet) Verdict { return 200 }}}
	r := newRigOf(t, w, netlab.LinkSpec{})
	assert.Empty(t, carry(t, 3, r.a, r.b, r.atoB))
	assert.Equal(t, Counts{Received: 3, Dropped: 3}, r.atoB())
}

func TestStageRewrites(t *testing.T) {
	w := &Wire{Entering: []Stage{func(p *Packet) Verdict {
		s, err := p.TCP()
		if err != nil {
			return Drop
		}
		s.SetDestination(proxy)
		if err := s.AddOption(kindTOA, toa); err != nil {
			return Drop
		}
		return Forward
	}}}
	r := newRigOf(t, w, netlab.LinkSpec{Delay: time.Microsecond})
	for _, frame := range [][]byte{synFrame(t), arpFrame(t), dataFrame(t, make([]byte, 100)), dataFrame(t, make([]byte, 1448))} {
		_, err := r.b.Write(frame)
		require.NoError(t, err)
	}
	await(t, func() (bool, any) { c := r.btoA(); return c.Received == 4 && c.InFlight() == 0, c })
	require.Equal(t, Counts{Received: 4, Forwarded: 2, Dropped: 2}, r.btoA(), "ARP has no segment, and a full frame no room")
	buf := make([]byte, frameSize)
	for _, before := range [][]byte{synFrame(t), dataFrame(t, make([]byte, 100))} {
		n, err := r.a.Read(buf)
		require.NoError(t, err)
		assert.Equal(t, len(before)+8, n, "the frame is longer by the option")
		assert.True(t, checksumsOf(t, buf[:n]).valid())
		_, s := segmentOf(t, buf[:n])
		assert.Equal(t, proxy, s.Destination())
		data, ok := s.Option(kindTOA)
		assert.True(t, ok)
		assert.Equal(t, toa, data)
	}
}

// The clock is ours, so the order is exact.
func TestHoldOvertakes(t *testing.T) {
	outer, inner := socketPair(t)
	far, near := socketPair(t)
	require.NoError(t, unix.SetNonblock(int(inner.Fd()), true))
	require.NoError(t, unix.SetNonblock(int(far.Fd()), true))
	holds := []time.Duration{30, 0, 10, 20, 10, 0}
	hold := func(p *Packet) Verdict {
		p.Hold(holds[number(p)])
		return Forward
	}
	d := direction{
		from: int(inner.Fd()), to: int(near.Fd()), counters: new(counters),
		stages: []Stage{hold, delayStage(5)},
	}
	for i := range holds {
		_, err := outer.Write(numbered(i))
		require.NoError(t, err)
	}
	n, err := d.receive(func() time.Duration { return 100 }) // all at one instant
	require.NoError(t, err)
	require.Equal(t, len(holds), n)
	var out []int
	buf := make([]byte, frameSize)
	for _, row := range []struct {
		now  time.Duration
		want []int
	}{
		{104, nil},
		{105, []int{1, 5}},
		{114, []int{1, 5}},
		{115, []int{1, 5, 2, 4}},
		{125, []int{1, 5, 2, 4, 3}},
		{135, []int{1, 5, 2, 4, 3, 0}},
	} {
		d.deliver(row.now)
		for {
			if _, err := unix.Read(int(far.Fd()), buf); err != nil {
				require.ErrorIs(t, err, unix.EAGAIN)
				break
			}
			out = append(out, int(binary.BigEndian.Uint32(buf)))
		}
		assert.Equal(t, row.want, out, "at %d", row.now)
	}
}

func TestHeldFrameIsOvertakenOnTheWire(t *testing.T) {
	const held = 3
	w := &Wire{Leaving: []Stage{func(p *Packet) Verdict {
		if number(p) == held {
			p.Hold(50 * time.Millisecond)
		}
		return Forward
	}}}
	r := newRigOf(t, w, netlab.LinkSpec{Delay: time.Millisecond})
	for i := range 10 {
		_, err := r.a.Write(numbered(i))
		require.NoError(t, err)
	}
	buf := make([]byte, frameSize)
	var out []int
	for range 10 {
		_, err := r.b.Read(buf)
		require.NoError(t, err)
		out = append(out, int(binary.BigEndian.Uint32(buf)))
	}
	assert.Equal(t, []int{0, 1, 2, 4, 5, 6, 7, 8, 9, held}, out)
}

// Whatever becomes of it, a frame is counted once.
func TestEveryFrameInOneColumn(t *testing.T) {
	const n = 20_000
	r := rand.New(rand.NewPCG(9, 9))
	dropped, seen := uint64(0), 0
	w := &Wire{Leaving: []Stage{func(p *Packet) Verdict {
		seen++
		p.Hold(time.Duration(r.IntN(3)) * time.Millisecond)
		if r.IntN(4) == 0 {
			dropped++
			return Drop
		}
		return Forward
	}}}
	rig := newRigOf(t, w, netlab.LinkSpec{Loss: 0.2, Seed: 3})
	tooLong := uint64(0)
	buf := make([]byte, 9000)
	out := uint64(0)
	for sent := 0; sent < n; {
		for range batch {
			frame := numbered(sent)
			if sent%10 == 0 {
				frame = make([]byte, frameSize)
				tooLong++
			}
			_, err := rig.a.Write(frame)
			require.NoError(t, err)
			sent++
		}
		c := rig.atoB()
		require.LessOrEqual(t, c.InFlight(), c.Received, "never negative, at any moment")
		// Not more on their way than the far socket's buffer takes.
		await(t, func() (bool, any) {
			c := rig.atoB()
			return c.Received == uint64(sent) && c.InFlight() == 0, c
		})
		for out < rig.atoB().Forwarded {
			_, err := rig.b.Read(buf)
			require.NoError(t, err)
			out++
		}
	}
	require.NoError(t, rig.stop())
	c := rig.atoB()
	assert.Zero(t, c.InFlight())
	assert.Equal(t, tooLong, c.Refused, "too long")
	assert.EqualValues(t, c.Received-tooLong, seen, "what is whole passes the stages")
	assert.Equal(t, dropped, c.Dropped)
	assert.Positive(t, c.Lost)
	assert.Equal(t, out, c.Forwarded)
	assert.Equal(t, Counts{Received: c.Received, Forwarded: out, Dropped: dropped, Lost: c.Lost, Refused: tooLong}, c)
	assert.Equal(t, c.Received, out+dropped+c.Lost+tooLong)
}

// Stages see what finds the line full, too: a balancer's counts are of what came.
func TestStagesSeeWhatOverflows(t *testing.T) {
	const over = 10
	seen := 0
	w := &Wire{Leaving: []Stage{func(*Packet) Verdict {
		seen++
		return Forward
	}}}
	r := newRigOf(t, w, netlab.LinkSpec{Delay: time.Hour})
	for i := range MaxInFlight + over {
		_, err := r.a.Write(numbered(i % 50))
		require.NoError(t, err)
	}
	await(t, func() (bool, any) { c := r.atoB(); return c.Overflowed == over, c })
	require.NoError(t, r.stop())
	assert.Equal(t, MaxInFlight+over, seen)
	assert.Equal(t, Counts{Received: MaxInFlight + over, Overflowed: over}, r.atoB())
}
