package pool

import (
	"context"
	"io"
	"net"
	"testing"
	"time"

	"github.com/stretchr/testify/assert"
	"github.com/stretchr/testify/require"

	"connlab/loadgen"
)

// TestOptionsUnderCallsAtTheSameTime has n callers that keep, all with their
// connections in hand before the first returns its own.
func TestOptionsUnderCallsAtTheSameTime(t *testing.T) {
	const short = 20 * time.Millisecond
	for _, c := range []struct {
		why    string
		pool   Pool
		n      int
		failed loadgen.Counts
		want   Account // when all have returned
	}{
		{
			"redigo closes what MaxIdle does not hold, whatever MaxActive lets in",
			NewRedigo(RedigoConfig{MaxIdle: 50, MaxActive: 500}), 100, loadgen.Counts{}, Account{Dials: 100, Closed: 50, Open: 50},
		},
		{
			"with MaxIdle = MaxActive it closes nothing",
			NewRedigo(RedigoConfig{MaxIdle: 100, MaxActive: 100}), 100, loadgen.Counts{}, Account{Dials: 100, Open: 100},
		},
		{
			"redigo keeps nothing by itself",
			NewRedigo(RedigoConfig{}), 5, loadgen.Counts{}, Account{Dials: 5, Closed: 5},
		},
		{
			"beyond MaxActive redigo fails at once",
			NewRedigo(RedigoConfig{MaxIdle: 3, MaxActive: 3}), 5,
			loadgen.Counts{loadgen.PoolExhausted: 2}, Account{Dials: 3, Open: 3},
		},
		{
			"or, to wait, after the timeout",
			NewRedigo(RedigoConfig{MaxIdle: 3, MaxActive: 3, Wait: true, Timeout: short}), 5,
			loadgen.Counts{loadgen.PoolTimeout: 2}, Account{Dials: 3, Open: 3},
		},
		{
			"without MaxActive there is nothing to wait for",
			NewRedigo(RedigoConfig{MaxIdle: 5, Wait: true}), 5, loadgen.Counts{}, Account{Dials: 5, Open: 5},
		},
		{
			"go-redis keeps all by itself",
			NewGoRedis(GoRedisConfig{PoolSize: 20}), 20, loadgen.Counts{}, Account{Dials: 20, Open: 20},
		},
		{
			"and closes what MaxIdleConns does not hold",
			NewGoRedis(GoRedisConfig{PoolSize: 20, MaxIdleConns: 5}), 20, loadgen.Counts{}, Account{Dials: 20, Closed: 15, Open: 5},
		},
		{
			"beyond PoolSize go-redis fails after PoolTimeout",
			NewGoRedis(GoRedisConfig{PoolSize: 3, PoolTimeout: short}), 5,
			loadgen.Counts{loadgen.PoolTimeout: 2}, Account{Dials: 3, Open: 3},
		},
		{
			"beyond MaxActiveConns at once",
			NewGoRedis(GoRedisConfig{PoolSize: 5, MaxActiveConns: 3}), 5,
			loadgen.Counts{loadgen.PoolExhausted: 2}, Account{Dials: 3, Open: 3},
		},
	} {
		s := serve(t, redis)
		failed := loadgen.Counts{}
		var leases []Lease
		for range c.n {
			l, err := c.pool.Get(t.Context(), Keeps, s.addr)
			if err == nil {
				leases = append(leases, l)
				err = l.Ping(t.Context())
			}
			if err != nil {
				failed[classify(err)]++
			}
		}
		for _, l := range leases {
			require.NoError(t, l.Return(), c.why)
		}
		assert.Equal(t, c.failed, failed, c.why)
		assert.Equal(t, c.want, connections(c.pool), c.why)
		require.NoError(t, c.pool.Close())
	}
}

// TestOptionsUnderCallsInTurn has five callers that keep, one after the other.
func TestOptionsUnderCallsInTurn(t *testing.T) {
	for _, c := range []struct {
		why  string
		pool Pool
		want Account
	}{
		{"redigo uses a connection for ever", NewRedigo(RedigoConfig{MaxIdle: 1}), Account{Dials: 1, Open: 1}},
		{"until it is too old", NewRedigo(RedigoConfig{MaxIdle: 1, MaxConnLifetime: time.Nanosecond}), Account{Dials: 5, Closed: 4, Open: 1}},
		{"as this one is not", NewRedigo(RedigoConfig{MaxIdle: 1, MaxConnLifetime: time.Hour}), Account{Dials: 1, Open: 1}},
		{"or was idle too long", NewRedigo(RedigoConfig{MaxIdle: 1, IdleTimeout: time.Nanosecond}), Account{Dials: 5, Closed: 4, Open: 1}},
		{"go-redis likewise", NewGoRedis(GoRedisConfig{ConnMaxIdleTime: -1}), Account{Dials: 1, Open: 1}},
		{"or was idle too long", NewGoRedis(GoRedisConfig{ConnMaxIdleTime: time.Nanosecond}), Account{Dials: 5, Closed: 4, Open: 1}},
	} {
		s := serve(t, redis)
		for range 5 {
			call(t, c.pool, s, Keeps)
		}
		assert.Equal(t, c.want, connections(c.pool), c.why)
		require.NoError(t, c.pool.Close())
	}
}

// TestWaitingCallersDoNotDial: of two callers and one connection the second gets it
// when the first returns it.
func TestWaitingCallersDoNotDial(t *testing.T) {
	s := serve(t, redis)
	p := NewRedigo(RedigoConfig{MaxIdle: 1, MaxActive: 1, Wait: true})
	report, err := Run(t.Context(), Config{Pool: p, Targets: targets(s), Keeping: loadgen.Burst(20, 0), Hold: time.Millisecond})
	require.NoError(t, err)
	assert.EqualValues(t, 20, report.Keeping.Load.OK)
	assert.Equal(t, Account{Dials: 1, Open: 1}, connections(p))
	require.NoError(t, p.Close())
}

// TestReadsAndWritesAreCounted: a ping is one of each, and the greeting of go-redis
// one more.
func TestReadsAndWritesAreCounted(t *testing.T) {
	const calls = 10
	for name, c := range map[string]struct {
		pool Pool
		want int64
	}{
		"cosockets": {NewCosockets(CosocketConfig{}), calls},
		"redigo":    {NewRedigo(RedigoConfig{MaxIdle: 1}), calls},
		"go-redis":  {NewGoRedis(GoRedisConfig{}), calls + 1},
	} {
		s := serve(t, redis)
		for range calls {
			call(t, c.pool, s, Keeps)
		}
		a := c.pool.Account()
		assert.Equal(t, []int64{c.want, c.want}, []int64{a.Reads, a.Writes}, name)
		require.NoError(t, c.pool.Close())
	}
}

// TestRedigosPingEndsWithItsContext, and its connection is not used again.
func TestRedigosPingEndsWithItsContext(t *testing.T) {
	asked := make(chan struct{})
	s := serve(t, func(c *net.TCPConn) { _, _ = c.Read(make([]byte, 1)); close(asked); _, _ = io.Copy(io.Discard, c) })
	p := NewRedigo(RedigoConfig{MaxIdle: 1})
	l, err := p.Get(t.Context(), Keeps, s.addr)
	require.NoError(t, err)
	ctx, cancel := context.WithCancel(t.Context())
	go func() { <-asked; cancel() }()
	start := time.Now()
	assert.ErrorIs(t, l.Ping(ctx), context.Canceled)
	assert.Less(t, time.Since(start), defaultTimeout, "it did not wait for the reply's timeout")
	require.NoError(t, l.Return())
	assert.Equal(t, Account{Dials: 1, Closed: 1}, connections(p))
	require.NoError(t, p.Close())
}
