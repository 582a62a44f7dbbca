package pool

import (
	"context"
	"math"
	"math/rand/v2"
	"net"
	"net/netip"
	"testing"

	"github.com/stretchr/testify/assert"
	"github.com/stretchr/testify/require"
)

// call is one whole call, and the number of its connection at the server.
func call(t testing.TB, p Pool, s *testServer, kind Kind) (Use, int) {
	t.Helper()
	l, err := p.Get(t.Context(), kind, s.addr)
	require.NoError(t, err)
	require.NoError(t, l.Ping(t.Context()))
	use := l.Use()
	require.NoError(t, l.Return())
	number := s.number(use.Local)
	require.NotZero(t, number, "the server knows no connection from %v", use.Local)
	return use, number
}

// connections is the part of a pool's account that says how many there are.
func connections(p Pool) Account {
	a := p.Account()
	return Account{Dials: a.Dials, DialErrors: a.DialErrors, Closed: a.Closed, Open: a.Open}
}

// numbered is a Use by the number of the connection.
type numbered struct{ conn, reused int }

// TestOneScriptThroughAllPools plays the same callers, one after the other.
func TestOneScriptThroughAllPools(t *testing.T) {
	script := []Kind{Keeps, Keeps, Closes, Keeps, Closes, Closes, Keeps}

	// Whoever connects takes the kept connection, also the one who closes it:
	// the next call dials.
	drained := []numbered{{1, 0}, {1, 1}, {1, 2}, {2, 0}, {2, 1}, {3, 0}, {4, 0}}
	// Callers that close never see the kept connection: it lives on.
	kept := []numbered{{1, 0}, {1, 1}, {2, 0}, {1, 2}, {3, 0}, {4, 0}, {1, 3}}
	// Nothing outlives its call.
	each := []numbered{{1, 0}, {2, 0}, {3, 0}, {4, 0}, {5, 0}, {6, 0}, {7, 0}}

	for _, c := range []struct {
		name string
		pool Pool
		want []numbered
	}{
		{"cosockets look in the pool first", NewCosockets(CosocketConfig{}), drained},
		{"cosockets with a pool name for each kind", NewCosockets(CosocketConfig{Separate: true}), kept},
		{"cosockets with the code cache off", NewCosockets(CosocketConfig{PerRequest: true}), each},
		{"redigo's Dial does not know its Pool", NewRedigo(RedigoConfig{MaxIdle: 1}), kept},
		{"redigo's default MaxIdle is none", NewRedigo(RedigoConfig{}), each},
		{"go-redis: a Client of one's own", NewGoRedis(GoRedisConfig{}), kept},
		{"go-redis: EphemeralConn takes from the pool", NewGoRedis(GoRedisConfig{Ephemeral: true}), drained},
	} {
		t.Run(c.name, func(t *testing.T) {
			s := serve(t, redis)
			var got []numbered
			for _, kind := range script {
				use, conn := call(t, c.pool, s, kind)
				assert.Equal(t, use.Reused == 0, use.Dialed)
				got = append(got, numbered{conn, use.Reused})
			}
			assert.Equal(t, c.want, got)
			dials := int64(got[len(got)-1].conn)
			for _, g := range got {
				dials = max(dials, int64(g.conn))
			}
			assert.Equal(t, dials, c.pool.Account().Dials)
			require.NoError(t, c.pool.Close())
		})
	}
}

// TestCallsBeyondThePoolSizeDial has k callers in one place at a time, of whose
// connections the pool keeps m: in each burst after the first k−m are dialed, and as
// many are closed when they come back.
func TestCallsBeyondThePoolSizeDial(t *testing.T) {
	const k, m, bursts = 8, 3, 5
	for name, p := range map[string]Pool{
		"cosockets": NewCosockets(CosocketConfig{Settings: Settings{PoolSize: m}}),
		"redigo":    NewRedigo(RedigoConfig{MaxIdle: m}),
		"go-redis":  NewGoRedis(GoRedisConfig{PoolSize: k, MaxIdleConns: m}),
	} {
		t.Run(name, func(t *testing.T) {
			s := serve(t, redis)
			var dialed []int
			for range bursts {
				var leases []Lease
				n := 0
				for range k {
					l, err := p.Get(t.Context(), Keeps, s.addr)
					require.NoError(t, err)
					require.NoError(t, l.Ping(t.Context()))
					if l.Use().Dialed {
						n++
					}
					leases = append(leases, l)
				}
				for _, l := range leases {
					require.NoError(t, l.Return())
				}
				dialed = append(dialed, n)
			}
			assert.Equal(t, []int{k, k - m, k - m, k - m, k - m}, dialed)
			assert.Equal(t, Account{Dials: k + (bursts-1)*(k-m), Closed: bursts * (k - m), Open: m}, connections(p))
			require.NoError(t, p.Close())
		})
	}
}

// TestDialFractionOfAMixedPool marks each call at random, with probability
// p = s/(s+l), as one that closes. One after the other, a caller that keeps dials if
// and only if the caller before it closed: with probability p, independently.
// Their number is binomial with n = calls that keep. The band of ±3.89 standard
// deviations leaves out 1e-4.
func TestDialFractionOfAMixedPool(t *testing.T) {
	const calls = 3000
	for _, p := range []float64{0.1, 0.25, 0.5, 0.75} {
		s := serve(t, redis)
		pool := NewCosockets(CosocketConfig{})
		random := rand.New(rand.NewPCG(3, math.Float64bits(p)))
		keeping, dialed := 0, 0
		for range calls {
			if random.Float64() < p {
				call(t, pool, s, Closes)
				continue
			}
			keeping++
			if use, _ := call(t, pool, s, Keeps); use.Dialed {
				dialed++
			}
		}
		n := float64(keeping)
		assert.InDelta(t, n*p, dialed, 3.89*math.Sqrt(n*p*(1-p)), "p = %v, n = %d", p, keeping)
		require.NoError(t, pool.Close())
	}
}

// TestSeparatePoolsKeepTheirConnections: with a name for each kind only the first
// caller that keeps dials, whatever the others do.
func TestSeparatePoolsKeepTheirConnections(t *testing.T) {
	s := serve(t, redis)
	p := NewCosockets(CosocketConfig{Separate: true})
	random := rand.New(rand.NewPCG(1, 1))
	closing, dialed := 0, 0
	for range 500 {
		kind := Kind(random.IntN(2))
		use, _ := call(t, p, s, kind)
		switch {
		case kind == Closes:
			closing++
			assert.True(t, use.Dialed)
		case use.Dialed:
			dialed++
		}
	}
	assert.Equal(t, 1, dialed)
	assert.Equal(t, int64(closing+1), p.Account().Dials)
	require.NoError(t, p.Close())
}

// TestWorkersShareNoConnections: each worker's first caller dials.
func TestWorkersShareNoConnections(t *testing.T) {
	const workers = 4
	s := serve(t, redis)
	p := NewCosockets(CosocketConfig{Workers: workers})
	for range 100 {
		call(t, p, s, Keeps)
	}
	assert.Equal(t, Account{Dials: workers, Open: workers}, connections(p))
	require.NoError(t, p.Close())
	assert.Equal(t, Account{Dials: workers, Closed: workers}, connections(p))
}

func TestGoRedisCountsConnectionsOpenedInAdvance(t *testing.T) {
	s := serve(t, redis)
	p := NewGoRedis(GoRedisConfig{MinIdleConns: 3, PoolSize: 5})
	call(t, p, s, Keeps)
	eventually(t, func() (bool, any) { a := p.Account(); return a.Dials >= 3, a })
	require.NoError(t, p.Close())
	eventually(t, func() (bool, any) { a := p.Account(); return a.Open == 0, a })
}

func TestTokensOfPings(t *testing.T) {
	request := func(token uint64) []byte {
		return append(append([]byte{}, tokenPrefix...), appendToken(nil, token)...)
	}
	for _, c := range []struct {
		name  string
		b     []byte
		token uint64
		ok    bool
	}{
		{"the first", append(request(1), "\r\n"...), 1, true},
		{"the largest fills all digits", append(request(math.MaxUint64), "\r\n"...), math.MaxUint64, true},
		{"cut short", request(1)[:len(request(1))-1], 0, false},
		{"another command", []byte("*2\r\n$5\r\nhello\r\n$1\r\n2\r\n"), 0, false},
		{"not a number", append(append([]byte{}, tokenPrefix...), "0000000000000000000x"...), 0, false},
	} {
		token, ok := tokenOf(c.b)
		assert.Equal(t, c.ok, ok, c.name)
		if c.ok {
			assert.Equal(t, c.token, token, c.name)
		}
	}
}

// TestTheAccountIsTheServers compares what the pool says with what the server saw,
// after callers of both kinds at the same time.
func TestTheAccountIsTheServers(t *testing.T) {
	for name, p := range map[string]Pool{
		"cosockets":               NewCosockets(CosocketConfig{Workers: 2, Settings: Settings{PoolSize: 3}}),
		"cosockets per request":   NewCosockets(CosocketConfig{PerRequest: true}),
		"redigo":                  NewRedigo(RedigoConfig{MaxIdle: 3}),
		"go-redis":                NewGoRedis(GoRedisConfig{PoolSize: 20, MaxIdleConns: 3}),
		"go-redis, EphemeralConn": NewGoRedis(GoRedisConfig{PoolSize: 20, Ephemeral: true}),
	} {
		t.Run(name, func(t *testing.T) {
			s := serve(t, redis)
			report, err := Run(context.Background(), Config{
				Pool: p, Targets: []netip.AddrPort{s.addr},
				Keeping: poisson(1000, 1), Closing: poisson(500, 2),
			})
			require.NoError(t, err)
			require.NoError(t, report.Balanced())
			total := report.Total()
			require.Equal(t, total.Load.Due, total.Load.OK, "failed: %v", total.Load.Failed)
			a := p.Account()
			assert.Equal(t, a.Dials, total.Dialed, "each connection has one first call")
			assert.Equal(t, total.Load.OK, total.Dialed+total.Reused)
			if name == "cosockets" {
				var policy Account
				for _, w := range p.(*Cosockets).workers {
					s := w.Stats()
					policy.Dials += s.Dials
					policy.Open += s.Open
					policy.Closed += s.Closed + s.Evicted + s.Expired + s.ServerClosed + s.Unasked + s.Dubious + s.Shutdown
				}
				assert.Equal(t, policy, connections(p), "the workers' own account beside that of their connections")
			}
			assert.Equal(t, a.Dials, a.Connects)
			assert.GreaterOrEqual(t, a.Writes, total.Load.OK)
			assert.GreaterOrEqual(t, a.Reads, total.Load.OK)
			assert.GreaterOrEqual(t, a.Closed, report.Closing.Load.OK, "each caller that closes has closed one")
			eventually(t, func() (bool, any) {
				accepted, open := s.count()
				return int64(accepted) == a.Dials && int64(open) == a.Open, []any{a, accepted, open}
			})
			require.NoError(t, p.Close())
			assert.Zero(t, p.Account().Open)
			eventually(t, func() (bool, any) { _, open := s.count(); return open == 0, open })
		})
	}
}

func TestAConnectionClosesOnce(t *testing.T) {
	s := serve(t, redis)
	var l ledger
	c, err := l.connect(t.Context(), s.addr)
	require.NoError(t, err)
	require.NoError(t, c.Close())
	assert.ErrorIs(t, c.Close(), net.ErrClosed)
	assert.Equal(t, Account{Dials: 1, Closed: 1, Connects: 1}, l.account())
}
