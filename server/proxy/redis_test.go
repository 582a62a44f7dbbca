package proxy

import (
	"bytes"
	"context"
	"fmt"
	"io"
	"net"
	"net/netip"
	"os/exec"
	"strings"
	"testing"
	"time"

	"github.com/gomodule/redigo/redis"
	goredis "github.com/redis/go-redis/v9"
	"github.com/stretchr/testify/assert"
	"github.com/stretchr/testify/require"
)

// behindProxy starts a real redis-server and a proxy before it, and returns the addresses of both.
func behindProxy(t *testing.T) (p *running, direct string) {
	t.Helper()
	program, err := exec.LookPath("redis-server")
	if err != nil {
		skip(t, "redis-server is not installed: apt-get install redis-server")
	}
	// A free port: taken, seen, given back. The server is asked for until it answers, so losing the race fails the test.
	l, err := net.Listen("tcp4", "127.9.0.7:0")
	require.NoError(t, err)
	direct = l.Addr().String()
	require.NoError(t, l.Close())
	port := netip.MustParseAddrPort(direct).Port()
	start(t, exec.Command(program, "--port", fmt.Sprint(port), "--bind", "127.9.0.7", "--save", "", "--appendonly", "no", "--dir", t.TempDir()))
	eventually(t, func() string { return "redis-server does not answer on " + direct }, func() bool {
		c, err := net.Dial("tcp4", direct)
		if err == nil {
			_ = c.Close()
		}
		return err == nil
	})
	cfg := config(LearnLocal, port)
	cfg.Addr = netip.MustParseAddrPort("127.8.0.7:0")
	return serve(t, cfg), direct
}

func TestRedigo(t *testing.T) {
	p, _ := behindProxy(t)
	open := func() redis.Conn {
		c, err := redis.Dial("tcp4", p.Addr().String(), redis.DialReadTimeout(patience), redis.DialWriteTimeout(patience))
		require.NoError(t, err)
		t.Cleanup(func() { _ = c.Close() })
		return c
	}
	c := open()

	require.NoError(t, c.Send("MULTI"))
	require.NoError(t, c.Send("SET", "k", 41))
	require.NoError(t, c.Send("INCR", "k"))
	replies, err := redis.Values(c.Do("EXEC"))
	require.NoError(t, err)
	assert.Equal(t, []any{"OK", int64(42)}, replies)

	value, _ := noise(3, 10<<20)
	_, err = c.Do("SET", "large", value)
	require.NoError(t, err)
	got, err := redis.Bytes(c.Do("GET", "large"))
	require.NoError(t, err)
	assert.True(t, bytes.Equal(value, got), "10 MB there and back")

	sub := redis.PubSubConn{Conn: open()}
	require.NoError(t, sub.Subscribe("news"))
	assert.Equal(t, redis.Subscription{Kind: "subscribe", Channel: "news", Count: 1}, sub.Receive())
	for i := range 100 {
		heard, err := redis.Int(c.Do("PUBLISH", "news", i))
		require.NoError(t, err)
		assert.Equal(t, 1, heard)
	}
	for i := range 100 {
		assert.Equal(t, redis.Message{Channel: "news", Data: fmt.Append(nil, i)}, sub.Receive())
	}

	for i := range 10_000 {
		require.NoError(t, c.Send("ECHO", i))
	}
	require.NoError(t, c.Flush())
	for i := range 10_000 {
		n, err := redis.Int(c.Receive())
		require.NoError(t, err)
		require.Equal(t, i, n)
	}

	// Each client has a connection of its own: WATCH of one sees the write of another.
	other := open()
	_, err = c.Do("WATCH", "k")
	require.NoError(t, err)
	_, err = other.Do("SET", "k", 1)
	require.NoError(t, err)
	require.NoError(t, c.Send("MULTI"))
	require.NoError(t, c.Send("SET", "k", 2))
	reply, err := c.Do("EXEC")
	require.NoError(t, err)
	assert.Nil(t, reply, "the transaction is void")
}

func TestGoRedis(t *testing.T) {
	p, direct := behindProxy(t)
	ctx, cancel := context.WithTimeout(t.Context(), patience)
	defer cancel()
	c := goredis.NewClient(&goredis.Options{Addr: p.Addr().String(), DialerRetries: 1, MaxRetries: -1, PoolSize: 20})
	defer c.Close()

	replies, err := c.TxPipelined(ctx, func(tx goredis.Pipeliner) error {
		tx.Set(ctx, "k", 41, 0)
		tx.Incr(ctx, "k")
		return nil
	})
	require.NoError(t, err)
	assert.EqualValues(t, 42, replies[1].(*goredis.IntCmd).Val())

	sub := c.Subscribe(ctx, "news")
	defer sub.Close()
	_, err = sub.Receive(ctx)
	require.NoError(t, err)
	heard, err := c.Publish(ctx, "news", "x").Result()
	require.NoError(t, err)
	assert.EqualValues(t, 1, heard)
	m, err := sub.ReceiveMessage(ctx)
	require.NoError(t, err)
	assert.Equal(t, "x", m.Payload)

	_, err = c.Pipelined(ctx, func(pipe goredis.Pipeliner) error {
		for range 10_000 {
			pipe.Ping(ctx)
		}
		return nil
	})
	require.NoError(t, err)

	// Redis has as many clients as the proxy has connections, and the one that asks.
	own := goredis.NewClient(&goredis.Options{Addr: direct, DialerRetries: 1, MaxRetries: -1})
	defer own.Close()
	var list string
	eventually(t, func() string { return fmt.Sprintf("proxy: %v; redis:\n%s", p.Stats(), list) }, func() bool {
		list, err = own.ClientList(ctx).Result()
		require.NoError(t, err)
		return strings.Count(list, "\n") == int(p.Stats().Open)+1
	})
	assert.Positive(t, p.Stats().Open)
}

// QUIT is answered and the server closes first; CLIENT KILL closes a connection from outside. The client sees both as it
// would without a proxy.
func TestRedisCloses(t *testing.T) {
	p, direct := behindProxy(t)
	c := dial(t, p.Addr().String())
	c.say("QUIT\r\n")
	c.hear("+OK\r\n")
	c.hearEnd()
	require.NoError(t, c.Close())
	p.waitStats(Stats{Accepted: 1, Closed: 1})

	c = dial(t, p.Addr().String())
	c.say("PING\r\n")
	c.hear("+PONG\r\n")
	admin := dial(t, direct)
	admin.say("CLIENT KILL TYPE normal SKIPME yes\r\n")
	admin.hear(":1\r\n")
	c.hearEnd()
}

// 10,000 PINGs in one write, read only afterwards by a client that is slow to read.
func TestPipeline(t *testing.T) {
	p, _ := behindProxy(t)
	const n = 10_000
	c := dial(t, p.Addr().String())
	require.NoError(t, c.SetDeadline(time.Now().Add(patience)))
	c.say(strings.Repeat("*1\r\n$4\r\nPING\r\n", n))
	require.NoError(t, c.CloseWrite())
	all, err := io.ReadAll(io.LimitReader(c, 1<<20))
	require.NoError(t, err)
	assert.Equal(t, strings.Repeat("+PONG\r\n", n), string(all))
	p.waitStats(Stats{Accepted: 1, Closed: 1})
	assert.Equal(t, Stats{Accepted: 1, Closed: 1, ToUpstream: 14 * n, ToClient: 7 * n}, p.Stats())
}
