package pool

import (
	"context"
	"errors"
	"io"
	"math/rand/v2"
	"net"
	"net/netip"
	"os"
	"sync"
	"sync/atomic"
	"syscall"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"
	"github.com/stretchr/testify/assert"
	"github.com/stretchr/testify/require"
)

// newWorker makes a worker that ends with the test.
func newWorker(t testing.TB, s Settings) *Worker {
	w := NewWorker(dialTCP, s)
	t.Cleanup(func() { assert.NoError(t, w.Close()) })
	return w
}

// connected is a connection that must be had.
func connected(t testing.TB, w *Worker, addr netip.AddrPort, o ConnectOptions) *Conn {
	t.Helper()
	c, err := w.Connect(t.Context(), addr, o)
	require.NoError(t, err)
	return c
}

// echo returns what it is sent.
func echo(c *net.TCPConn) { _, _ = io.Copy(c, c) }

// exchange sends a byte and reads it again.
func exchange(c io.ReadWriter) error {
	if _, err := c.Write([]byte{'x'}); err != nil {
		return err
	}
	var b [1]byte
	_, err := c.Read(b[:])
	return err
}

// await waits until the worker's account is as expected.
func await(t testing.TB, w *Worker, expected Stats) {
	t.Helper()
	eventually(t, func() (bool, any) { s := w.Stats(); return s == expected, cmp.Diff(expected, s) })
}

func TestWorkersShareNothing(t *testing.T) {
	s := serve(t, echo)
	a, b := newWorker(t, Settings{}), newWorker(t, Settings{})
	require.NoError(t, connected(t, a, s.addr, ConnectOptions{}).SetKeepalive(DefaultKeepalive, 0))
	c := connected(t, b, s.addr, ConnectOptions{})
	assert.Zero(t, c.ReusedTimes())
	assert.Equal(t, 1, idle(a, s.addr.String()))
	assert.Equal(t, Stats{Dials: 1, Kept: 1, Open: 1}, a.Stats())
	assert.Equal(t, Stats{Dials: 1, Open: 1}, b.Stats())
	require.NoError(t, c.Close())
}

func TestThePoolSizeOfTheSettings(t *testing.T) {
	for _, row := range []struct {
		name     string
		settings int
		kept     int
		evicted  int64
	}{
		{"the default is 30", 0, 31, 1},
		{"a size is set", 3, 5, 2},
	} {
		t.Run(row.name, func(t *testing.T) {
			s := serve(t, echo)
			w := newWorker(t, Settings{PoolSize: row.settings})
			var conns []*Conn
			for range row.kept {
				conns = append(conns, connected(t, w, s.addr, ConnectOptions{}))
			}
			for _, c := range conns {
				require.NoError(t, c.SetKeepalive(DefaultKeepalive, 0))
			}
			assert.Equal(t, row.evicted, w.Stats().Evicted)
			assert.Equal(t, row.kept-int(row.evicted), idle(w, s.addr.String()))
		})
	}
}

func TestTheIdleTimeOfTheSettings(t *testing.T) {
	const short = 10 * time.Millisecond
	for _, row := range []struct {
		name     string
		settings time.Duration
		timeout  time.Duration
		expires  bool
	}{
		{"the default argument is the setting", short, DefaultKeepalive, true},
		{"an argument goes before the setting", time.Hour, short, true},
		{"an argument of 0 is for ever", short, 0, false},
		{"a negative setting is for ever", -1, DefaultKeepalive, false},
		{"the setting is 60 s by default", 0, DefaultKeepalive, false},
	} {
		t.Run(row.name, func(t *testing.T) {
			s := serve(t, echo)
			w := newWorker(t, Settings{KeepaliveTimeout: row.settings})
			require.NoError(t, connected(t, w, s.addr, ConnectOptions{Pool: "this"}).SetKeepalive(row.timeout, 0))
			// By the time another connection with the short timeout has expired, this
			// one has too if it ever will.
			require.NoError(t, connected(t, w, s.addr, ConnectOptions{Pool: "other"}).SetKeepalive(5*short, 0))
			expected := Stats{Dials: 2, Kept: 2, Expired: 1, Open: 1}
			if row.expires {
				expected.Expired, expected.Open = 2, 0
			}
			await(t, w, expected)
			assert.Equal(t, int(expected.Open), idle(w, "this"))
		})
	}
}

func TestWhatHappensToIdleConnectionsIsCounted(t *testing.T) {
	greeting := make(chan string)
	s := serve(t, func(c *net.TCPConn) {
		switch <-greeting {
		case "fin":
			_ = c.CloseWrite()
		case "rst":
			_ = c.SetLinger(0)
			return
		case "data":
			_, _ = io.WriteString(c, "unasked")
		}
		_, _ = io.Copy(io.Discard, c)
	})
	w := newWorker(t, Settings{})
	for range 3 {
		require.NoError(t, connected(t, w, s.addr, ConnectOptions{Pool: "p"}).SetKeepalive(DefaultKeepalive, 0))
		require.NoError(t, connected(t, w, s.addr, ConnectOptions{Pool: "p"}).SetKeepalive(0, 0))
		greeting <- [...]string{"fin", "rst", "data"}[w.Stats().Dials-1]
		eventually(t, func() (bool, any) { return w.Stats().Open == 0, w.Stats() })
	}
	assert.Equal(t, Stats{Dials: 3, Reuses: 3, Kept: 6, ServerClosed: 2, Unasked: 1}, w.Stats())
	assert.Zero(t, idle(w, "p"))
}

func TestAConnectionThatWasKeptIsNotItsOldCallersAnyMore(t *testing.T) {
	s := serve(t, echo)
	w := newWorker(t, Settings{})
	old := connected(t, w, s.addr, ConnectOptions{})
	require.NoError(t, old.SetKeepalive(DefaultKeepalive, 0))
	c := connected(t, w, s.addr, ConnectOptions{})
	_, err := old.Read(make([]byte, 1))
	assert.ErrorIs(t, err, ErrClosed)
	_, err = old.Write([]byte("x"))
	assert.ErrorIs(t, err, ErrClosed)
	assert.ErrorIs(t, old.SetDeadline(time.Unix(1, 0)), ErrClosed)
	assert.ErrorIs(t, old.SetKeepalive(DefaultKeepalive, 0), ErrClosed)
	assert.ErrorIs(t, old.Close(), ErrClosed)
	assert.Nil(t, old.LocalAddr())
	assert.NoError(t, exchange(c))
	require.NoError(t, c.Close())
}

func TestATakenConnectionHasNoDeadline(t *testing.T) {
	s := serve(t, echo)
	w := newWorker(t, Settings{})
	c := connected(t, w, s.addr, ConnectOptions{})
	require.NoError(t, c.SetDeadline(time.Unix(1, 0)))
	_, err := c.Read(make([]byte, 1))
	require.ErrorIs(t, err, os.ErrDeadlineExceeded)
	// A timeout of a read does not forbid to keep: nobody knows what it was for.
	require.NoError(t, c.SetKeepalive(time.Hour, 0))
	c = connected(t, w, s.addr, ConnectOptions{})
	assert.Equal(t, 1, c.ReusedTimes())
	assert.NoError(t, exchange(c))
	require.NoError(t, c.Close())
}

func TestAWriteThatTimesOutForbidsToKeep(t *testing.T) {
	s := serve(t, echo)
	w := newWorker(t, Settings{})
	c := connected(t, w, s.addr, ConnectOptions{})
	require.NoError(t, c.SetDeadline(time.Unix(1, 0)))
	_, err := c.Write([]byte("x"))
	require.ErrorIs(t, err, os.ErrDeadlineExceeded)
	assert.ErrorIs(t, c.SetKeepalive(DefaultKeepalive, 0), ErrClosed)
	assert.NoError(t, c.Close())
}

func TestTheEndOfAWorker(t *testing.T) {
	s := serve(t, echo)
	w := NewWorker(dialTCP, Settings{})
	backlog := 1
	limited := ConnectOptions{Pool: "limited", PoolSize: 1, Backlog: &backlog}
	idle, used := connected(t, w, s.addr, ConnectOptions{}), connected(t, w, s.addr, limited)
	require.NoError(t, idle.SetKeepalive(0, 0))
	waited := make(chan error)
	go func() {
		_, err := w.Connect(t.Context(), s.addr, limited)
		waited <- err
	}()
	await(t, w, Stats{Dials: 2, Open: 2, Kept: 1, Waited: 1})

	require.NoError(t, w.Close())
	assert.ErrorIs(t, <-waited, ErrClosed, "who waits fails")
	assert.Equal(t, int64(1), w.Stats().Open, "what is idle is closed")
	assert.Len(t, w.pools, 1, "its pool is gone")
	_, err := w.Connect(t.Context(), s.addr, ConnectOptions{})
	assert.ErrorIs(t, err, ErrClosed)
	assert.NoError(t, exchange(used), "what is in use is not touched")
	assert.NoError(t, used.SetKeepalive(DefaultKeepalive, 0), "setkeepalive closes, and says it is well")
	assert.Equal(t, Stats{Dials: 2, Kept: 1, Waited: 1, Shutdown: 2}, w.Stats())
	assert.Empty(t, w.pools)
	require.NoError(t, w.Close())
	eventually(t, func() (bool, any) { accepted, open := s.count(); return accepted == 2 && open == 0, open })
}

func TestConnectRefusesWhatCannotBe(t *testing.T) {
	w := newWorker(t, Settings{})
	negative := -1
	_, err := w.Connect(t.Context(), netip.AddrPort{}, ConnectOptions{PoolSize: -1})
	assert.EqualError(t, err, `bad "pool_size" option value: -1`)
	_, err = w.Connect(t.Context(), netip.AddrPort{}, ConnectOptions{Backlog: &negative})
	assert.EqualError(t, err, `bad "backlog" option value: -1`)

	s := serve(t, echo)
	c := connected(t, w, s.addr, ConnectOptions{})
	assert.EqualError(t, c.SetKeepalive(DefaultKeepalive, -1), `bad "pool_size" option value: -1`)
	assert.NoError(t, exchange(c), "it is still the caller's")
	require.NoError(t, c.SetKeepalive(DefaultKeepalive, 1))
	require.NoError(t, connected(t, w, s.addr, ConnectOptions{}).SetKeepalive(DefaultKeepalive, -1), "the pool is there: no size is asked for")
}

func TestFailedDials(t *testing.T) {
	near, far := net.Pipe()
	t.Cleanup(func() { _, _ = near.Close(), far.Close() })
	boom := errors.New("boom")
	for _, row := range []struct {
		name  string
		dial  Dial
		check func(error) bool
	}{
		{"an error is passed on", func(context.Context, netip.AddrPort) (net.Conn, error) { return nil, boom },
			func(err error) bool { return errors.Is(err, boom) }},
		{"the connect timeout ends a dial", func(ctx context.Context, _ netip.AddrPort) (net.Conn, error) { <-ctx.Done(); return nil, ctx.Err() },
			func(err error) bool { return errors.Is(err, context.DeadlineExceeded) }},
		{"a connection without a descriptor cannot be watched, and is closed", func(context.Context, netip.AddrPort) (net.Conn, error) { return near, nil },
			func(err error) bool {
				_, closed := near.Write(nil)
				return err != nil && errors.Is(closed, io.ErrClosedPipe)
			}},
	} {
		t.Run(row.name, func(t *testing.T) {
			w := NewWorker(row.dial, Settings{ConnectTimeout: 10 * time.Millisecond})
			_, err := w.Connect(t.Context(), netip.MustParseAddrPort("127.0.0.1:1"), ConnectOptions{PoolSize: 1})
			assert.True(t, row.check(err), "%v", err)
			assert.Equal(t, Stats{Dials: 1, DialErrors: 1}, w.Stats())
			assert.Empty(t, w.pools, "the pool died with its only connection")
			require.NoError(t, w.Close())
		})
	}
}

func TestACanceledWaitSaysWhy(t *testing.T) {
	s := serve(t, echo)
	w := newWorker(t, Settings{})
	backlog := 1
	o := ConnectOptions{PoolSize: 1, Backlog: &backlog}
	c := connected(t, w, s.addr, o)
	ctx, cancel := context.WithCancelCause(t.Context())
	because := errors.New("because")
	cancel(because)
	_, err := w.Connect(ctx, s.addr, o)
	assert.ErrorIs(t, err, because)
	assert.Equal(t, Stats{Dials: 1, Open: 1, Waited: 1, WaitCanceled: 1}, w.Stats())
	require.NoError(t, c.Close())
}

// Without a canceled wait, which lets another caller dial, a pool with a backlog
// never has more connections than its size, however many callers there are.
func TestNoConnectionIsLostAmongManyCallers(t *testing.T) {
	const callers, calls, size = 16, 200, 4
	var open, most atomic.Int64
	var dials atomic.Int64
	s := serve(t, echo)
	w := NewWorker(func(ctx context.Context, addr netip.AddrPort) (net.Conn, error) {
		dials.Add(1)
		if dials.Load()%10 == 0 {
			return nil, syscall.ECONNREFUSED
		}
		now := open.Add(1)
		for {
			if seen := most.Load(); now <= seen || most.CompareAndSwap(seen, now) {
				break
			}
		}
		c, err := dialTCP(ctx, addr)
		return counted{c.(*net.TCPConn), &open}, err
	}, Settings{})
	backlog := callers / 2
	var kept, closed, refused, full atomic.Int64
	var group sync.WaitGroup
	for i := range callers {
		random := rand.New(rand.NewPCG(1, uint64(i)))
		group.Go(func() {
			for range calls {
				c, err := w.Connect(t.Context(), s.addr, ConnectOptions{Pool: "p", PoolSize: size, Backlog: &backlog})
				switch {
				case errors.Is(err, ErrTooManyWaiting):
					full.Add(1)
					continue
				case errors.Is(err, syscall.ECONNREFUSED):
					refused.Add(1)
					continue
				}
				if !assert.NoError(t, err) {
					return
				}
				assert.NoError(t, exchange(c))
				if random.IntN(2) == 0 {
					assert.NoError(t, c.SetKeepalive(time.Duration(random.IntN(3))*time.Millisecond, 0))
					kept.Add(1)
				} else {
					assert.NoError(t, c.Close())
					closed.Add(1)
				}
			}
		})
	}
	group.Wait()
	require.NoError(t, w.Close())
	stats := w.Stats()
	assert.Equal(t, int64(callers*calls), kept.Load()+closed.Load()+refused.Load()+full.Load())
	assert.Equal(t, Stats{
		Dials: dials.Load(), DialErrors: refused.Load(), Reuses: stats.Reuses, Kept: kept.Load(),
		Closed: closed.Load(), Expired: stats.Expired, Shutdown: stats.Shutdown,
		QueueFull: full.Load(), Waited: stats.Waited,
	}, stats)
	assert.Equal(t, stats.Dials-stats.DialErrors, stats.Closed+stats.Expired+stats.Shutdown)
	assert.Equal(t, kept.Load(), stats.Reuses+stats.Expired+stats.Shutdown, "what was kept was taken once or ended")
	assert.LessOrEqual(t, most.Load(), int64(size))
	assert.Empty(t, w.pools)
	eventually(t, func() (bool, any) {
		accepted, open := s.count()
		return accepted == int(stats.Dials-stats.DialErrors) && open == 0, [2]int{accepted, open}
	})
}

// counted is a connection that counts itself while it is open.
type counted struct {
	*net.TCPConn
	open *atomic.Int64
}

func (c counted) Close() error {
	c.open.Add(-1)
	return c.TCPConn.Close()
}

// BenchmarkConnectAndKeep is a connect that takes an idle connection and a
// setkeepalive that gives it back, without traffic in between.
func BenchmarkConnectAndKeep(b *testing.B) {
	s := serve(b, echo)
	w := newWorker(b, Settings{})
	b.ReportAllocs()
	var before, after syscall.Rusage
	require.NoError(b, syscall.Getrusage(syscall.RUSAGE_SELF, &before))
	for b.Loop() {
		c, err := w.Connect(b.Context(), s.addr, ConnectOptions{})
		if err != nil {
			b.Fatal(err)
		}
		if err := c.SetKeepalive(DefaultKeepalive, 0); err != nil {
			b.Fatal(err)
		}
	}
	require.NoError(b, syscall.Getrusage(syscall.RUSAGE_SELF, &after))
	cpu := after.Utime.Nano() + after.Stime.Nano() - before.Utime.Nano() - before.Stime.Nano()
	b.ReportMetric(float64(cpu)/float64(b.N), "cpu-ns/op")
}

// idle is the number of idle connections in the worker's pool of this name.
func idle(w *Worker, pool string) int {
	w.mu.Lock()
	defer w.mu.Unlock()
	if p := w.pools[pool]; p != nil {
		return len(p.idle)
	}
	return 0
}
