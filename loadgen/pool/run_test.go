package pool

import (
	"context"
	"errors"
	"io"
	"net"
	"net/netip"
	"reflect"
	"sync"
	"testing"
	"time"

	"github.com/stretchr/testify/assert"
	"github.com/stretchr/testify/require"
	"golang.org/x/sys/unix"

	"connlab/loadgen"
)

func poisson(rate float64, seed uint64) loadgen.Schedule {
	return loadgen.Poisson(rate, 300*time.Millisecond, seed)
}

func TestRunAccountsForEachCall(t *testing.T) {
	a, b := serve(t, redis), serve(t, redis)
	p := NewCosockets(CosocketConfig{})
	keeping, closing := poisson(1000, 1), poisson(500, 2)
	var progress Progress
	var calls []Call
	report, err := Run(t.Context(), Config{
		Pool: p, Targets: []netip.AddrPort{a.addr, b.addr}, Keeping: keeping, Closing: closing,
		OnCall: func(c Call) { calls = append(calls, c) }, Progress: &progress,
	})
	require.NoError(t, err)
	require.NoError(t, p.Close())
	require.NoError(t, report.Balanced())

	assert.EqualValues(t, keeping.Count(), report.Keeping.Load.OK)
	assert.EqualValues(t, closing.Count(), report.Closing.Load.OK)
	due := map[Kind][]time.Duration{Keeps: collect(keeping), Closes: collect(closing)}
	targets := map[Kind]map[netip.AddrPort]int{Keeps: {}, Closes: {}}
	var dialed int64
	for _, c := range calls {
		assert.Equal(t, due[c.Kind][c.Index], c.Due)
		assert.True(t, c.Due <= c.Started && c.Started < c.Done, "%v", c)
		assert.True(t, c.Local.IsValid())
		assert.Equal(t, c.Reused == 0, c.Dialed)
		due[c.Kind][c.Index] = -1 // once
		targets[c.Kind][c.Target]++
		if c.Dialed {
			dialed++
		}
	}
	require.Len(t, calls, keeping.Count()+closing.Count())
	for kind, counts := range targets {
		// Of 100 calls and more at random, one server does not get less than a fifth.
		for _, target := range []netip.AddrPort{a.addr, b.addr} {
			assert.Greater(t, counts[target], len(due[kind])/5, "calls of a caller who %v", kind)
		}
	}
	total := report.Total()
	assert.Equal(t, total.Dialed, dialed)
	assert.Equal(t, total.Load.Latency.Count(), total.Load.OK)
	want := loadgen.Snapshot{Due: total.Load.Due, Started: total.Load.Due, OK: total.Load.Due}
	assert.Equal(t, want, progress.Snapshot())
}

func collect(s loadgen.Schedule) (all []time.Duration) {
	for due := range s {
		all = append(all, due)
	}
	return all
}

// TestCallersKeepTheirConnectionsForTheHoldingTime: calls at one instant cannot
// share a connection, so that there are as many dials.
func TestCallersKeepTheirConnectionsForTheHoldingTime(t *testing.T) {
	const n = 20
	s := serve(t, redis)
	p := NewCosockets(CosocketConfig{})
	start := time.Now()
	report, err := Run(t.Context(), Config{
		Pool: p, Targets: []netip.AddrPort{s.addr}, Keeping: loadgen.Burst(n, 0), Hold: 500 * time.Millisecond,
	})
	require.NoError(t, err)
	require.NoError(t, p.Close())
	assert.EqualValues(t, n, report.Keeping.Dialed)
	assert.GreaterOrEqual(t, time.Since(start), 500*time.Millisecond)
	assert.Less(t, report.Keeping.Load.Latency.Quantile(0.5), 500*time.Millisecond, "holding is no latency")
}

func TestCallsBeyondMaxInFlightAreNotStarted(t *testing.T) {
	s := serve(t, redis)
	p := NewCosockets(CosocketConfig{})
	var notStarted []Call
	report, err := Run(t.Context(), Config{
		Pool: p, Targets: []netip.AddrPort{s.addr}, Hold: 200 * time.Millisecond, MaxInFlight: 4,
		// By the time of the last one the first have gone.
		Closing: loadgen.Merge(loadgen.Burst(10, 0), loadgen.Burst(1, time.Second)),
		OnCall: func(c Call) {
			if c.Class == loadgen.NotStarted {
				notStarted = append(notStarted, c)
			}
		},
	})
	require.NoError(t, err)
	require.NoError(t, p.Close())
	require.NoError(t, report.Balanced())
	assert.EqualValues(t, 4+1, report.Closing.Load.OK)
	assert.EqualValues(t, 6, report.Closing.Load.NotStarted)
	assert.Len(t, notStarted, 6)
	assert.ErrorContains(t, report.Total().Load.Behind(time.Hour), "left out 6 of 11")
}

// TestOperationsOfACallerFollowEachOther: each is due when the one before it has
// returned its connection, which it can then have.
func TestOperationsOfACallerFollowEachOther(t *testing.T) {
	const callers, ops, hold = 5, 4, time.Millisecond
	s := serve(t, redis)
	p := NewRedigo(RedigoConfig{MaxIdle: callers})
	var progress Progress
	var of [callers][]Call
	report, err := Run(t.Context(), Config{
		Pool: p, Targets: targets(s), Keeping: loadgen.Burst(callers, 0), Ops: ops, Hold: hold, Progress: &progress,
		OnCall: func(c Call) { of[c.Index] = append(of[c.Index], c) },
	})
	require.NoError(t, err)
	require.NoError(t, p.Close())
	require.NoError(t, report.Balanced())
	for _, calls := range of {
		require.Len(t, calls, ops)
		for op, c := range calls {
			assert.Equal(t, op, c.Op)
			assert.True(t, c.Due <= c.Started && c.Started < c.Done, "%v", c)
			if op == 0 {
				assert.Zero(t, c.Due)
			} else {
				assert.GreaterOrEqual(t, c.Due, calls[op-1].Done+hold)
			}
		}
	}
	assert.LessOrEqual(t, p.Account().Dials, int64(callers), "nobody has two connections")
	assert.EqualValues(t, callers*ops, report.Keeping.Load.OK)
	assert.EqualValues(t, callers*ops, report.Keeping.Load.Latency.Count())
	assert.EqualValues(t, callers, report.Keeping.Load.Lateness.Count(), "the generator starts the first operations only")
	assert.Equal(t, loadgen.Snapshot{Due: callers * ops, Started: callers * ops, OK: callers * ops}, progress.Snapshot())
}

func TestAnOperationIsDoneAfterOneThatFailed(t *testing.T) {
	s := serve(t, redis)
	failed := false
	p := NewRedigo(RedigoConfig{Dial: func(ctx context.Context, addr netip.AddrPort) (net.Conn, error) {
		if !failed {
			failed = true
			return nil, unix.ECONNREFUSED
		}
		return dialHere(ctx, addr)
	}})
	report, err := Run(t.Context(), Config{Pool: p, Targets: targets(s), Keeping: loadgen.Burst(1, 0), Ops: 3})
	require.NoError(t, err)
	require.NoError(t, p.Close())
	require.NoError(t, report.Balanced())
	assert.EqualValues(t, 2, report.Keeping.Load.OK)
	assert.Equal(t, loadgen.Counts{loadgen.ConnectRefused: 1}, report.Keeping.Load.Failed)
}

func TestACallerThatIsNotStartedLeavesOutAllItsOperations(t *testing.T) {
	s := serve(t, redis)
	p := NewRedigo(RedigoConfig{})
	var left []int
	report, err := Run(t.Context(), Config{
		Pool: p, Targets: targets(s), Closing: loadgen.Burst(3, 0), Ops: 2, Hold: 100 * time.Millisecond, MaxInFlight: 1,
		OnCall: func(c Call) {
			if c.Class == loadgen.NotStarted {
				left = append(left, c.Op)
			}
		},
	})
	require.NoError(t, err)
	require.NoError(t, p.Close())
	require.NoError(t, report.Balanced())
	assert.EqualValues(t, 2, report.Closing.Load.OK)
	assert.Equal(t, []int{0, 1, 0, 1}, left)
}

func TestOperationsThatACanceledRunDidNotBeginAreNotDue(t *testing.T) {
	ctx, cancel := context.WithCancel(t.Context())
	s := serve(t, func(c *net.TCPConn) { _, _ = c.Read(make([]byte, 1)); cancel(); _, _ = io.Copy(io.Discard, c) })
	p := NewRedigo(RedigoConfig{})
	report, err := Run(ctx, Config{
		Pool: p, Targets: targets(s), Ops: 3,
		Keeping: loadgen.Merge(loadgen.Burst(1, 0), loadgen.Burst(1, time.Hour)),
	})
	require.ErrorIs(t, err, context.Canceled)
	require.NoError(t, p.Close())
	require.NoError(t, report.Balanced())
	assert.EqualValues(t, 1, report.Keeping.Load.Due)
	assert.Equal(t, loadgen.Counts{loadgen.Canceled: 1}, report.Keeping.Load.Failed)
}

func targets(s *testServer) []netip.AddrPort { return []netip.AddrPort{s.addr} }

// TestTheTotalHasEachCount sets each count, so that none is forgotten when one is
// added.
func TestTheTotalHasEachCount(t *testing.T) {
	r := newReport()
	counts := 0
	for i := range reflect.TypeFor[KindReport]().NumField() {
		keeping := reflect.ValueOf(&r.Keeping).Elem().Field(i)
		if keeping.Kind() != reflect.Int64 {
			continue
		}
		keeping.SetInt(int64(i))
		reflect.ValueOf(&r.Closing).Elem().Field(i).SetInt(100)
		assert.EqualValues(t, i+100, reflect.ValueOf(r.Total()).Elem().Field(i).Int(), reflect.TypeFor[KindReport]().Field(i).Name)
		counts++
	}
	assert.Equal(t, 4, counts)
}

func TestACanceledRunReportsWhatThereWas(t *testing.T) {
	reason := errors.New("enough")
	ctx, cancel := context.WithCancelCause(t.Context())
	var once sync.Once
	s := serve(t, func(c *net.TCPConn) { once.Do(func() { cancel(reason) }); _, _ = io.Copy(io.Discard, c) })
	p := NewCosockets(CosocketConfig{})
	report, err := Run(ctx, Config{
		Pool: p, Targets: []netip.AddrPort{s.addr},
		Keeping: loadgen.Merge(loadgen.Burst(1, 0), loadgen.Burst(1, time.Hour)),
	})
	require.ErrorIs(t, err, reason)
	require.NoError(t, p.Close())
	require.NoError(t, report.Balanced())
	assert.Equal(t, loadgen.Counts{loadgen.Canceled: 1}, report.Keeping.Load.Failed)
	assert.Zero(t, p.Account().Open)
}

func TestRunRefusesWhatItCannotDo(t *testing.T) {
	p := NewCosockets(CosocketConfig{})
	good := Config{Pool: p, Targets: []netip.AddrPort{netip.MustParseAddrPort("127.0.0.1:1")}, Keeping: loadgen.Burst(0, 0)}
	_, err := Run(t.Context(), good)
	require.NoError(t, err)
	for want, change := range map[string]func(*Config){
		"no pool":     func(c *Config) { c.Pool = nil },
		"no target":   func(c *Config) { c.Targets = nil },
		"no schedule": func(c *Config) { c.Keeping = nil },
		"negative":    func(c *Config) { c.Ops = -1 },
	} {
		bad := good
		change(&bad)
		_, err := Run(t.Context(), bad)
		assert.ErrorContains(t, err, want)
	}
}

// TestClassesOfFailedCalls brings about each failure with each library that has it.
func TestClassesOfFailedCalls(t *testing.T) {
	const short = 50 * time.Millisecond
	resets := func(c *net.TCPConn) { _, _ = c.Read(make([]byte, 1)); _ = c.SetLinger(0) }
	says := func(reply string) func(*net.TCPConn) {
		return func(c *net.TCPConn) { _, _ = c.Read(make([]byte, 64)); _, _ = io.WriteString(c, reply) }
	}
	silent := func(c *net.TCPConn) { _, _ = io.Copy(io.Discard, c) }
	// never stands for a server that does not answer the SYN.
	never := func(ctx context.Context, _ netip.AddrPort) (net.Conn, error) { <-ctx.Done(); return nil, ctx.Err() }
	one := loadgen.Burst(1, 0)
	// The second comes while the first holds its connection.
	two := loadgen.Merge(one, loadgen.Burst(1, 200*time.Millisecond))
	for _, c := range []struct {
		name   string
		pool   func() Pool
		handle func(*net.TCPConn) // nil: nobody listens
		calls  loadgen.Schedule
		want   loadgen.Counts
	}{
		{"cosockets, refused", func() Pool { return NewCosockets(CosocketConfig{}) }, nil, one, loadgen.Counts{loadgen.ConnectRefused: 1}},
		{"cosockets, connect timeout", func() Pool { return NewCosockets(CosocketConfig{Dial: never, Timeout: short}) }, nil, one, loadgen.Counts{loadgen.ConnectTimeout: 1}},
		{"cosockets, EOF", func() Pool { return NewCosockets(CosocketConfig{}) }, says(""), one, loadgen.Counts{loadgen.EOF: 1}},
		{"cosockets, reset", func() Pool { return NewCosockets(CosocketConfig{}) }, resets, one, loadgen.Counts{loadgen.ReadReset: 1}},
		{"cosockets, reply timeout", func() Pool { return NewCosockets(CosocketConfig{Timeout: short}) }, silent, one, loadgen.Counts{loadgen.ReadTimeout: 1}},
		{"cosockets, error reply", func() Pool { return NewCosockets(CosocketConfig{}) }, says("-LOADING wait\r\n"), one, loadgen.Counts{loadgen.ServerError: 1}},
		{"cosockets, no reply", func() Pool { return NewCosockets(CosocketConfig{}) }, says("HTTP/1.1 400\r\n"), one, loadgen.Counts{loadgen.BadReply: 1}},
		{"cosockets, queue full", func() Pool { return NewCosockets(CosocketConfig{PoolSize: 1, Backlog: new(int)}) }, redis, two, loadgen.Counts{loadgen.PoolExhausted: 1}},
		{"cosockets, queue timeout", func() Pool { return NewCosockets(CosocketConfig{PoolSize: 1, Backlog: ptr(1), Timeout: short}) }, redis, two, loadgen.Counts{loadgen.PoolTimeout: 1}},

		{"redigo, refused", func() Pool { return NewRedigo(RedigoConfig{}) }, nil, one, loadgen.Counts{loadgen.ConnectRefused: 1}},
		{"redigo, connect timeout", func() Pool { return NewRedigo(RedigoConfig{Dial: never, Timeout: short}) }, nil, one, loadgen.Counts{loadgen.ConnectTimeout: 1}},
		{"redigo, EOF", func() Pool { return NewRedigo(RedigoConfig{}) }, says(""), one, loadgen.Counts{loadgen.EOF: 1}},
		{"redigo, reset", func() Pool { return NewRedigo(RedigoConfig{}) }, resets, one, loadgen.Counts{loadgen.ReadReset: 1}},
		{"redigo, reply timeout", func() Pool { return NewRedigo(RedigoConfig{Timeout: short}) }, silent, one, loadgen.Counts{loadgen.ReadTimeout: 1}},
		{"redigo, error reply", func() Pool { return NewRedigo(RedigoConfig{}) }, says("-LOADING wait\r\n"), one, loadgen.Counts{loadgen.ServerError: 1}},
		{"redigo, exhausted", func() Pool { return NewRedigo(RedigoConfig{MaxActive: 1}) }, redis, two, loadgen.Counts{loadgen.PoolExhausted: 1}},
		{"redigo, waits in vain", func() Pool { return NewRedigo(RedigoConfig{MaxActive: 1, Wait: true, Timeout: short}) }, redis, two, loadgen.Counts{loadgen.PoolTimeout: 1}},

		{"go-redis, refused", func() Pool { return NewGoRedis(GoRedisConfig{}) }, nil, one, loadgen.Counts{loadgen.ConnectRefused: 1}},
		{"go-redis, connect timeout", func() Pool { return NewGoRedis(GoRedisConfig{Dial: never, Timeout: short}) }, nil, one, loadgen.Counts{loadgen.ConnectTimeout: 1}},
		{"go-redis, EOF", func() Pool { return NewGoRedis(GoRedisConfig{}) }, says(""), one, loadgen.Counts{loadgen.EOF: 1}},
		{"go-redis, reset", func() Pool { return NewGoRedis(GoRedisConfig{}) }, resets, one, loadgen.Counts{loadgen.ReadReset: 1}},
		{"go-redis, reply timeout", func() Pool { return NewGoRedis(GoRedisConfig{Timeout: short}) }, silent, one, loadgen.Counts{loadgen.ReadTimeout: 1}},
		{"go-redis, waits in vain", func() Pool { return NewGoRedis(GoRedisConfig{PoolSize: 1, PoolTimeout: short}) }, redis, two, loadgen.Counts{loadgen.PoolTimeout: 1}},
		{"go-redis, exhausted", func() Pool { return NewGoRedis(GoRedisConfig{PoolSize: 2, MaxActiveConns: 1}) }, redis, two, loadgen.Counts{loadgen.PoolExhausted: 1}},
	} {
		t.Run(c.name, func(t *testing.T) {
			t.Parallel()
			target := netip.MustParseAddrPort("127.0.0.1:1") // tcpmux: nobody listens
			if c.handle != nil {
				target = serve(t, c.handle).addr
			}
			p := c.pool()
			report, err := Run(t.Context(), Config{
				Pool: p, Targets: []netip.AddrPort{target}, Keeping: c.calls, Hold: time.Second * time.Duration(c.calls.Count()-1),
			})
			require.NoError(t, err)
			require.NoError(t, report.Balanced())
			assert.Equal(t, c.want, report.Keeping.Load.Failed, "causes: %v", report.Keeping.Load.Causes)
			require.NoError(t, p.Close())
			assert.Zero(t, p.Account().Open)
		})
	}
}

func ptr(n int) *int { return &n }

// BenchmarkCalls is one call at a time through each library, of both kinds in turn.
func BenchmarkCalls(b *testing.B) {
	for _, c := range []struct {
		name string
		pool Pool
	}{
		{"cosockets", NewCosockets(CosocketConfig{})},
		{"redigo", NewRedigo(RedigoConfig{MaxIdle: 10})},
		{"go-redis", NewGoRedis(GoRedisConfig{})},
	} {
		b.Run(c.name, func(b *testing.B) {
			s := serve(b, redis)
			kind := Keeps
			for b.Loop() {
				call(b, c.pool, s, kind)
				kind = 1 - kind
			}
		})
		if err := c.pool.Close(); err != nil {
			b.Error(err)
		}
	}
}
