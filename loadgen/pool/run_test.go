package pool

import (
	"context"
	"encoding/json"
	"errors"
	"io"
	"net"
	"net/netip"
	"sync"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"
	"github.com/stretchr/testify/assert"
	"github.com/stretchr/testify/require"

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
		Pool: p, Targets: []netip.AddrPort{a.addr, b.addr}, Seed: 1, Keeping: keeping, Closing: closing,
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
	assert.InDelta(t, float64(dialed)/float64(len(calls)), total.DialFraction(), 1e-9)
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
	assert.ErrorContains(t, report.Behind(time.Hour), "left out 6 of 11")
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
		"negative":    func(c *Config) { c.Hold = -1 },
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

func TestReportsAddUpAndSurviveJSON(t *testing.T) {
	s := serve(t, redis)
	p := NewRedigo(RedigoConfig{MaxIdle: 5})
	sum := NewReport()
	var parts []*Report
	for seed := range uint64(2) {
		r, err := Run(t.Context(), Config{Pool: p, Targets: []netip.AddrPort{s.addr}, Keeping: poisson(200, seed), Closing: poisson(100, seed+9)})
		require.NoError(t, err)
		b, err := json.Marshal(r)
		require.NoError(t, err)
		var read Report
		require.NoError(t, json.Unmarshal(b, &read))
		sum.Merge(&read)
		parts = append(parts, r)
	}
	require.NoError(t, p.Close())
	require.NoError(t, sum.Balanced())
	type numbers struct{ OK, Dialed, Reused int64 }
	of := func(k KindReport) numbers { return numbers{k.Load.OK, k.Dialed, k.Reused} }
	plus := func(a, b numbers) numbers { return numbers{a.OK + b.OK, a.Dialed + b.Dialed, a.Reused + b.Reused} }
	want := []numbers{plus(of(parts[0].Keeping), of(parts[1].Keeping)), plus(of(parts[0].Closing), of(parts[1].Closing))}
	if diff := cmp.Diff(want, []numbers{of(sum.Keeping), of(sum.Closing)}); diff != "" {
		t.Error(diff)
	}

	for want, bad := range map[string]string{
		"a kind of callers is missing":               `{}`,
		"caller keeps: the account does not balance": `{"keeping":{"load":{},"dialed":1},"closing":{"load":{}}}`,
	} {
		var r Report
		assert.ErrorContains(t, json.Unmarshal([]byte(bad), &r), want)
	}
}

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
