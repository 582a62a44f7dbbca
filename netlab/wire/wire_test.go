package wire

import (
	"encoding/binary"
	"fmt"
	"io"
	"math"
	"os"
	"runtime"
	"slices"
	"sync/atomic"
	"testing"
	"time"

	"connlab/netlab"

	"github.com/google/go-cmp/cmp"
	"github.com/stretchr/testify/assert"
	"github.com/stretchr/testify/require"
	"go.uber.org/goleak"
	"golang.org/x/sys/unix"
)

func TestMain(m *testing.M) { goleak.VerifyTestMain(m) }

// rig is a running wire whose two ends are Unix sockets of type SEQPACKET, which
// like a TAP descriptor give one frame a read and take one a write.
type rig struct {
	wire *Wire
	a, b *os.File // the far sides of the wire's ends
	near [2]*os.File
	stop func() error
}

func newRig(t testing.TB, link netlab.LinkSpec) *rig { return newRigOf(t, new(Wire), link) }

func newRigOf(t testing.TB, w *Wire, link netlab.LinkSpec) *rig {
	t.Helper()
	a, nearA := socketPair(t)
	b, nearB := socketPair(t)
	r := &rig{wire: w, a: a, b: b, near: [2]*os.File{nearA, nearB}}
	var err error
	r.stop, err = r.wire.Pump(nearA, nearB, link)
	require.NoError(t, err)
	t.Cleanup(func() { _ = r.stop() })
	return r
}

func socketPair(t testing.TB) (outer, inner *os.File) {
	t.Helper()
	fds, err := unix.Socketpair(unix.AF_UNIX, unix.SOCK_SEQPACKET|unix.SOCK_CLOEXEC, 0)
	require.NoError(t, err)
	// Blocking at the time of NewFile: the runtime's poller keeps away.
	outer, inner = os.NewFile(uintptr(fds[0]), "outer"), os.NewFile(uintptr(fds[1]), "inner")
	t.Cleanup(func() {
		outer.Close()
		inner.Close()
	})
	return outer, inner
}

// numbered is a frame that carries its own number, in varying lengths.
func numbered(i int) []byte {
	f := make([]byte, 60+i%1455)
	binary.BigEndian.PutUint32(f, uint32(i))
	f[len(f)-1] = byte(i)
	return f
}

// carry sends n numbered frames from one side and returns the numbers that come
// out at the other, in order. It sends few at a time, so that nothing is
// refused for want of socket buffer.
func carry(t *testing.T, n int, from, to *os.File, counts func() Counts) []int {
	t.Helper()
	var out []int
	buf := make([]byte, frameSize)
	for sent := 0; sent < n; {
		for range min(batch, n-sent) {
			_, err := from.Write(numbered(sent))
			require.NoError(t, err)
			sent++
		}
		await(t, func() (bool, any) {
			c := counts()
			return c.Received == uint64(sent) && c.InFlight() == 0, c
		})
		for uint64(len(out)) < counts().Forwarded {
			size, err := to.Read(buf)
			require.NoError(t, err)
			i := int(binary.BigEndian.Uint32(buf))
			require.True(t, slices.Equal(buf[:size], numbered(i)), "frame %d came out changed", i)
			out = append(out, i)
		}
	}
	return out
}

// patience bounds every wait for what should take milliseconds.
const patience = 20 * time.Second

// await waits until the condition holds.
func await(t testing.TB, condition func() (ok bool, state any)) {
	t.Helper()
	deadline := time.Now().Add(patience)
	for {
		ok, state := condition()
		if ok {
			return
		}
		if time.Now().After(deadline) {
			require.FailNow(t, "condition not met in time", "last state: %+v", state)
		}
		time.Sleep(50 * time.Microsecond)
	}
}

func (r *rig) atoB() Counts { return r.wire.Stats().AtoB }
func (r *rig) btoA() Counts { return r.wire.Stats().BtoA }

func upTo(n int) []int {
	all := make([]int, n)
	for i := range all {
		all[i] = i
	}
	return all
}

func TestFramesComeOutUnchangedInOrder(t *testing.T) {
	for _, delay := range []time.Duration{0, 2 * time.Millisecond} {
		t.Run(fmt.Sprint(delay), func(t *testing.T) {
			const n = 3000
			r := newRig(t, netlab.LinkSpec{Delay: delay})
			assert.Empty(t, cmp.Diff(upTo(n), carry(t, n, r.a, r.b, r.atoB)))
			assert.Empty(t, cmp.Diff(upTo(n), carry(t, n, r.b, r.a, r.btoA)))
			want := Counts{Received: n, Forwarded: n}
			assert.Equal(t, Stats{AtoB: want, BtoA: want}, r.wire.Stats())
			assert.NoError(t, r.stop())
		})
	}
}

// The clock is ours here, so the bound is exact.
func TestDeliverNeverEarly(t *testing.T) {
	outer, inner := socketPair(t)
	far, near := socketPair(t)
	require.NoError(t, unix.SetNonblock(int(inner.Fd()), true))
	require.NoError(t, unix.SetNonblock(int(far.Fd()), true))
	const delay = 5 * time.Millisecond
	var c counters
	d := direction{from: int(inner.Fd()), to: int(near.Fd()), stages: []Stage{delayStage(delay)}, counters: &c}

	arrivals := []time.Duration{0, 1, time.Millisecond, time.Millisecond, 4 * time.Millisecond}
	for i, at := range arrivals {
		_, err := outer.Write(numbered(i))
		require.NoError(t, err)
		n, err := d.receive(func() time.Duration { return at })
		require.NoError(t, err)
		require.Equal(t, 1, n)
	}
	for _, row := range []struct {
		now    time.Duration
		out    uint64
		reason string
	}{
		{delay - 1, 0, "a nanosecond before the first is due"},
		{delay, 1, "the first, the second came a nanosecond later"},
		{delay + 1, 2, "the second"},
		{delay + time.Millisecond - 1, 2, "between"},
		{delay + time.Millisecond, 4, "two of the same instant"},
		{time.Hour, 5, "the rest"},
	} {
		d.deliver(row.now)
		assert.Equal(t, row.out, c.read().Forwarded, row.reason)
	}
	assert.True(t, d.line.empty())
	buf := make([]byte, frameSize)
	for i := range arrivals {
		_, err := unix.Read(int(far.Fd()), buf)
		require.NoError(t, err)
		assert.Equal(t, uint32(i), binary.BigEndian.Uint32(buf), "order")
	}
}

func TestDelayOnTheClock(t *testing.T) {
	const n, delay = 30, 20 * time.Millisecond
	r := newRig(t, netlab.LinkSpec{Delay: delay})
	buf := make([]byte, frameSize)
	least := time.Hour
	for i := range n {
		begin := time.Now()
		_, err := r.a.Write(numbered(i))
		require.NoError(t, err)
		_, err = r.b.Read(buf)
		require.NoError(t, err)
		least = min(least, time.Since(begin))
	}
	t.Logf("the fastest of %d frames took %v", n, least)
	assert.GreaterOrEqual(t, least, delay, "no frame comes before its delay is over")
	// A busy machine makes any one frame late, but not every one.
	assert.Less(t, least, 2*delay, "the wire itself adds nothing of that size")
}

func TestLoss(t *testing.T) {
	const n = 20_000
	for _, loss := range []float64{0, 0.01, 0.3, 1} {
		t.Run(fmt.Sprint(loss), func(t *testing.T) {
			r := newRig(t, netlab.LinkSpec{Loss: loss, Seed: 1})
			out := carry(t, n, r.a, r.b, r.atoB)
			c := r.atoB()
			assert.EqualValues(t, n, c.Received)
			assert.EqualValues(t, len(out), c.Forwarded)
			assert.EqualValues(t, n-len(out), c.Lost, "each frame that did not come out was lost by choice")
			// The seed is fixed, so this passes always or never; 3.29 standard
			// deviations hold 99.9 % of a binomial distribution.
			bound := 3.29 * math.Sqrt(n*loss*(1-loss))
			assert.InDelta(t, n*loss, float64(c.Lost), bound)
		})
	}
}

func TestLossIsRepeatableAndIndependent(t *testing.T) {
	const n = 500
	carried := func(seed uint64) (ab, ba []int) {
		r := newRig(t, netlab.LinkSpec{Loss: 0.5, Seed: seed})
		return carry(t, n, r.a, r.b, r.atoB), carry(t, n, r.b, r.a, r.btoA)
	}
	ab, ba := carried(7)
	abAgain, baAgain := carried(7)
	abOther, _ := carried(8)
	assert.Empty(t, cmp.Diff(ab, abAgain), "same seed, same frames")
	assert.Empty(t, cmp.Diff(ba, baAgain), "same seed, same frames")
	assert.NotEqual(t, ab, ba, "the directions lose different frames")
	assert.NotEqual(t, ab, abOther, "another seed loses other frames")
}

func TestOverflowIsCounted(t *testing.T) {
	const over = 123
	r := newRig(t, netlab.LinkSpec{Delay: time.Hour})
	frame := make([]byte, 60)
	for range MaxInFlight + over {
		_, err := r.a.Write(frame)
		require.NoError(t, err)
	}
	await(t, func() (bool, any) { return r.atoB().Received == MaxInFlight+over, r.atoB() })
	await(t, func() (bool, any) { return r.atoB().InFlight() <= MaxInFlight, r.atoB() })
	assert.Equal(t, Counts{Received: MaxInFlight + over, Overflowed: over}, r.atoB())
	assert.EqualValues(t, MaxInFlight, r.atoB().InFlight())
	assert.NoError(t, r.stop(), "with frames in flight")
}

func TestRefused(t *testing.T) {
	t.Run("far queue full", func(t *testing.T) {
		const n = 5000 // nobody reads b: its socket buffer takes some hundred frames
		r := newRig(t, netlab.LinkSpec{})
		for range n {
			_, err := r.a.Write(make([]byte, 1000))
			require.NoError(t, err)
		}
		await(t, func() (bool, any) { c := r.atoB(); return c.Received == n && c.InFlight() == 0, c })
		c := r.atoB()
		assert.Positive(t, c.Forwarded)
		assert.Positive(t, c.Refused)
		assert.EqualValues(t, n, c.Forwarded+c.Refused)
	})
	t.Run("too long", func(t *testing.T) {
		r := newRig(t, netlab.LinkSpec{})
		for _, size := range []int{frameSize - 1, frameSize, 9000} {
			_, err := r.a.Write(make([]byte, size))
			require.NoError(t, err)
		}
		await(t, func() (bool, any) { c := r.atoB(); return c.Received == 3 && c.InFlight() == 0, c })
		assert.Equal(t, Counts{Received: 3, Forwarded: 1, Refused: 2}, r.atoB())
	})
}

// The loop is called directly: through Pump, stop could come before the loop has
// seen the end.
func TestEndGoneIsReported(t *testing.T) {
	quit, err := unix.Eventfd(0, unix.EFD_CLOEXEC)
	require.NoError(t, err)
	defer unix.Close(quit)
	gone, end := socketPair(t)
	_, other := socketPair(t)
	a, err := nonblocking(end)
	require.NoError(t, err)
	b, err := nonblocking(other)
	require.NoError(t, err)
	p := &pump{start: time.Now(), quit: quit, directions: []*direction{
		{from: a, to: b, counters: new(counters)},
		{from: b, to: a, counters: new(counters)},
	}}
	require.NoError(t, gone.Close())
	ended := make(chan error)
	go func() { ended <- p.run() }()
	err = <-ended
	require.ErrorIs(t, err, io.EOF)
	assert.EqualError(t, err, "end 0 of the wire: EOF")
}

func TestAWireIsUsedOnce(t *testing.T) {
	r := newRig(t, netlab.LinkSpec{})
	_, err := r.wire.Pump(r.near[0], r.near[1], netlab.LinkSpec{})
	assert.EqualError(t, err, "this wire is already in use")
}

func TestClosedEnd(t *testing.T) {
	_, a := socketPair(t)
	_, b := socketPair(t)
	require.NoError(t, b.Close())
	_, err := Pump(a, b, netlab.LinkSpec{})
	assert.ErrorContains(t, err, "end inner: use of closed file")
}

func TestStopLeavesNothing(t *testing.T) {
	_, a := socketPair(t)
	_, b := socketPair(t)
	cycle := func() {
		stop, err := Pump(a, b, netlab.LinkSpec{Delay: time.Second})
		require.NoError(t, err)
		require.NoError(t, stop())
		require.NoError(t, stop(), "a second time")
	}
	cycle() // whatever the runtime opens once
	before := entries(t, "/proc/self/fd")
	threads := entries(t, "/proc/self/task")
	for range 30 {
		cycle()
	}
	assert.Equal(t, before, entries(t, "/proc/self/fd"), "descriptors")
	// A thread ends a moment after its goroutine.
	await(t, func() (bool, any) {
		n := entries(t, "/proc/self/task")
		return n < threads+15, fmt.Sprintf("threads: %d before, %d after 30 wires", threads, n)
	})
}

func entries(t *testing.T, dir string) int {
	t.Helper()
	list, err := os.ReadDir(dir)
	require.NoError(t, err)
	return len(list)
}

func BenchmarkSocketPair(b *testing.B) {
	r := newRig(b, netlab.LinkSpec{})
	var out atomic.Int64
	go func() {
		buf := make([]byte, frameSize)
		for {
			if _, err := r.b.Read(buf); err != nil {
				return
			}
			out.Add(1)
		}
	}()
	frame := numbered(0)
	b.ResetTimer()
	for i := range b.N {
		for int64(i)-out.Load() > 64 { // a window, so that nothing is refused
			runtime.Gosched()
		}
		if _, err := r.a.Write(frame); err != nil {
			b.Fatal(err)
		}
	}
	await(b, func() (bool, any) { return out.Load() == int64(b.N), r.atoB() })
	b.StopTimer()
	b.ReportMetric(float64(b.N)/b.Elapsed().Seconds(), "frames/s")
	require.NoError(b, r.stop())
	require.NoError(b, r.near[1].Close()) // ends the reader
}
