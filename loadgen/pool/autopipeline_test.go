package pool

import (
	"context"
	"errors"
	"math/rand/v2"
	"net"
	"net/netip"
	"sync"
	"sync/atomic"
	"testing"

	goredis "github.com/redis/go-redis/v9"
	"github.com/stretchr/testify/assert"
	"github.com/stretchr/testify/require"

	"connlab/loadgen"
)

// TestAutoPipelineUnderFaults: whatever fails, nobody has the reply to another's
// command, and as retries are off no command is received twice.
func TestAutoPipelineUnderFaults(t *testing.T) {
	const callers, commandsEach = 200, 500
	for name, cfg := range map[string]AutoPipelineConfig{
		"one batch at a time": {},
		"four at a time":      {MaxConcurrentBatches: 4},
	} {
		t.Run(name, func(t *testing.T) {
			f := &faults{seed: 1, lifetime: 1000, slow: 300}
			s := serve(t, f.handle)
			p := NewAutoPipeline(cfg)
			l, err := p.Get(t.Context(), Keeps, s.addr)
			require.NoError(t, err)
			pipeline := l.(*autoPipelineLease).pipeline

			ends := make([]ending, 1+callers*commandsEach) // by token
			var wrong atomic.Int64
			var running sync.WaitGroup
			for caller := range callers {
				running.Go(func() {
					random := rand.New(rand.NewPCG(3, uint64(caller)))
					for i := range commandsEach {
						token := uint64(1 + caller*commandsEach + i)
						text := string(appendToken(nil, token))
						command := "ping"
						if random.IntN(10) == 0 {
							command = "fail"
						}
						cmd := goredis.NewStringCmd(t.Context(), command, text)
						err := pipeline.Process(t.Context(), cmd)
						refusal, isRefusal := errors.AsType[goredis.Error](err)
						switch {
						case err == nil:
							ends[token] = answered
							if command != "ping" || cmd.Val() != text {
								wrong.Add(1)
							}
						case isRefusal:
							ends[token] = refused
							if command != "fail" || refusal.Error() != "ERR "+text {
								wrong.Add(1)
							}
						default:
							ends[token] = broken
						}
					}
				})
			}
			running.Wait()
			require.NoError(t, p.Close())
			eventually(t, func() (bool, any) { _, open := s.count(); return open == 0, open })
			assert.Zero(t, wrong.Load(), "replies of another command")

			received := make([]int, len(ends))
			for _, tokens := range f.received {
				for _, token := range tokens {
					received[token]++
				}
			}
			var count [endings]int
			for token, end := range ends[1:] {
				count[end]++
				n := received[1+token]
				if n > 1 || n == 0 && end != broken {
					require.Fail(t, "received as often as it must not be", "%d: %d times, %v", 1+token, n, end)
				}
			}
			for _, e := range []ending{answered, refused, broken} {
				assert.NotZero(t, count[e], "%v", e)
			}
			assert.Zero(t, count[never])
			assert.Zero(t, p.Account().Open)
			t.Logf("%+v; answered %d, refused %d, broken %d", p.Account(), count[answered], count[refused], count[broken])
		})
	}
}

func TestAutoPipelineRefusesItsConfiguration(t *testing.T) {
	p := NewAutoPipeline(AutoPipelineConfig{MaxFlushDelay: -1})
	_, err := p.Get(t.Context(), Keeps, netip.AddrPort{})
	assert.ErrorContains(t, err, "auto-pipelining: redis: AutoPipelineOptions.MaxFlushDelay")
	assert.NoError(t, p.Close())
}

// sharedPools share their connections among all callers.
func sharedPools(dial Dial) map[string]Pool {
	return map[string]Pool{
		"batching":       NewBatching(BatchConfig{Dial: dial, Commands: 3, Delay: ms, Conns: 2}),
		"autopipelining": NewAutoPipeline(AutoPipelineConfig{Dial: dial, DialerRetries: 1}),
	}
}

// TestCallersShareConnections of both kinds: there are no more than configured,
// whoever closes.
func TestCallersShareConnections(t *testing.T) {
	for name, p := range sharedPools(nil) {
		t.Run(name, func(t *testing.T) {
			s := serve(t, (&faults{}).handle)
			report, err := Run(t.Context(), Config{
				Pool: p, Targets: []netip.AddrPort{s.addr},
				Keeping: poisson(2000, 1), Closing: poisson(1000, 2),
			})
			require.NoError(t, err)
			require.NoError(t, report.Balanced())
			total := report.Total()
			assert.Equal(t, total.Load.Due, total.Load.OK, "failed: %v", total.Load.Failed)
			assert.Equal(t, total.Load.OK, total.Shared)
			assert.Zero(t, total.Dialed+total.Reused)
			accepted, _ := s.count()
			a := p.Account()
			assert.EqualValues(t, accepted, a.Dials)
			assert.LessOrEqual(t, accepted, 2)
			assert.Equal(t, a.Dials, a.Open)
			if b, ok := p.(*Batching); ok {
				stats := b.Stats()
				assert.Equal(t, total.Load.OK, stats.Commands)
				assert.Less(t, stats.Batches, stats.Commands)
			}
			require.NoError(t, p.Close())
			assert.Zero(t, p.Account().Open)
		})
	}
}

// TestClassesOfSharedCalls.
func TestClassesOfSharedCalls(t *testing.T) {
	for _, c := range []struct {
		name  string
		reply string // to the token
		want  map[string]loadgen.Class
	}{
		{"the token comes back", "$20\r\n%s\r\n", map[string]loadgen.Class{"batching": loadgen.OK, "autopipelining": loadgen.OK}},
		{"another token", "$20\r\n%.19s0\r\n", map[string]loadgen.Class{"batching": loadgen.BadReply, "autopipelining": loadgen.BadReply}},
		{"an error", "-LOADING %s\r\n", map[string]loadgen.Class{"batching": loadgen.ServerError, "autopipelining": loadgen.ServerError}},
		// go-redis breaks the connection.
		{"another type", "*0\r\n", map[string]loadgen.Class{"batching": loadgen.BadReply, "autopipelining": loadgen.Other}},
	} {
		s := serve(t, (&faults{reply: c.reply}).handle)
		for name, p := range sharedPools(nil) {
			t.Run(name+": "+c.name, func(t *testing.T) {
				l, err := p.Get(t.Context(), Keeps, s.addr)
				require.NoError(t, err)
				got := loadgen.OK
				if err := l.Ping(t.Context()); err != nil {
					got = classify(err)
				}
				assert.Equal(t, c.want[name], got)
				assert.True(t, l.Use().Shared)
				require.NoError(t, l.Return())
				require.NoError(t, p.Close())
			})
		}
	}
	t.Run("no connection", func(t *testing.T) {
		refuse := func(context.Context, netip.AddrPort) (net.Conn, error) { return nil, errTestDial }
		for name, p := range sharedPools(refuse) {
			l, err := p.Get(t.Context(), Keeps, netip.AddrPort{})
			require.NoError(t, err)
			err = l.Ping(t.Context())
			assert.ErrorIs(t, err, errTestDial, name)
			_, dialed := errors.AsType[*dialError](err)
			assert.True(t, dialed, name)
			assert.Equal(t, Use{}, l.Use(), name)
			dials := map[string]int64{"batching": 1, "autopipelining": 2} // go-redis asks its other pool then
			assert.Equal(t, dials[name], p.Account().DialErrors, name)
			require.NoError(t, p.Close())
		}
	})
}
