package server

import (
	"fmt"
	"net"
	"os/exec"
	"strings"
	"testing"
	"time"

	"github.com/gomodule/redigo/redis"
	goredis "github.com/redis/go-redis/v9"
	"github.com/stretchr/testify/assert"
	"github.com/stretchr/testify/require"
)

func TestGoRedis(t *testing.T) {
	s := serve(t, func(c *Config) { c.RequirePass = "secret" })
	for _, protocol := range []int{2, 3} {
		t.Run(fmt.Sprint("RESP", protocol), func(t *testing.T) {
			db := goredis.NewClient(&goredis.Options{Addr: s.Addr().String(), Protocol: protocol, Password: "secret", DB: protocol, ClientName: "tester", PoolSize: 3, DialerRetries: 1})
			defer db.Close()
			ctx := t.Context()
			require.NoError(t, db.Ping(ctx).Err())
			require.NoError(t, db.Set(ctx, "k", "v", time.Minute).Err())
			v, err := db.Get(ctx, "k").Result()
			require.NoError(t, err)
			assert.Equal(t, "v", v)
			ttl, err := db.TTL(ctx, "k").Result()
			require.NoError(t, err)
			assert.Equal(t, time.Minute, ttl)
			require.ErrorIs(t, db.Get(ctx, "none").Err(), goredis.Nil)
			n, err := db.Incr(ctx, "n").Result()
			require.NoError(t, err)
			assert.Equal(t, int64(1), n)
			cmds, err := db.Pipelined(ctx, func(p goredis.Pipeliner) error {
				for i := range 100 {
					p.Set(ctx, fmt.Sprint("p", i), i, 0)
				}
				return nil
			})
			require.NoError(t, err)
			assert.Len(t, cmds, 100)
			all, err := db.MGet(ctx, "p1", "none", "p2").Result()
			require.NoError(t, err)
			assert.Equal(t, []any{"1", nil, "2"}, all)
			size, err := db.DBSize(ctx).Result()
			require.NoError(t, err)
			assert.Equal(t, int64(102), size)
			name, err := db.ClientGetName(ctx).Result()
			require.NoError(t, err)
			assert.Equal(t, "tester", name)
			list, err := db.ClientList(ctx).Result()
			require.NoError(t, err)
			assert.Contains(t, list, "lib-name=go-redis")
			info, err := db.ClientInfo(ctx).Result()
			require.NoError(t, err, "the fields are what the library can parse")
			assert.Equal(t, protocol, info.Resp)
			conf, err := db.ConfigGet(ctx, "maxclients").Result()
			require.NoError(t, err)
			assert.Equal(t, map[string]string{"maxclients": "10000"}, conf)
			commands, err := db.Command(ctx).Result()
			require.NoError(t, err)
			assert.Equal(t, int8(1), commands["get"].FirstKeyPos)
			require.NoError(t, db.Do(ctx, "DEBUG", "SLEEP", "0.02").Err())
			slow, err := db.SlowLogGet(ctx, 1).Result()
			require.NoError(t, err)
			require.Len(t, slow, 1)
			assert.Equal(t, []string{"DEBUG", "SLEEP", "0.02"}, slow[0].Args)
		})
	}
}

func TestRedigo(t *testing.T) {
	s := serve(t, nil)
	pool := &redis.Pool{MaxIdle: 2, MaxActive: 2, Wait: true, Dial: func() (redis.Conn, error) { return redis.Dial("tcp", s.Addr().String(), redis.DialDatabase(1)) }}
	defer pool.Close()
	c := pool.Get()
	defer c.Close()
	_, err := c.Do("SET", "k", 42)
	require.NoError(t, err)
	n, err := redis.Int(c.Do("INCR", "k"))
	require.NoError(t, err)
	assert.Equal(t, 43, n)
	for i := range 50 {
		require.NoError(t, c.Send("ECHO", i))
	}
	require.NoError(t, c.Flush())
	for i := range 50 {
		got, err := redis.Int(c.Receive())
		require.NoError(t, err)
		assert.Equal(t, i, got)
	}
	_, err = c.Do("GET")
	require.EqualError(t, err, "ERR wrong number of arguments for 'get' command")
	_, err = redis.String(c.Do("GET", "none"))
	require.ErrorIs(t, err, redis.ErrNil)
	values, err := redis.Strings(c.Do("CONFIG", "GET", "hz"))
	require.NoError(t, err)
	assert.Equal(t, []string{"hz", "10"}, values)
}

// run executes a program against the server and returns what it prints.
func run(t *testing.T, s *Server, name string, args ...string) string {
	t.Helper()
	path := tool(t, name, "redis-tools")
	host, port, err := net.SplitHostPort(s.Addr().String())
	require.NoError(t, err)
	out, err := exec.CommandContext(t.Context(), path, append([]string{"-h", host, "-p", port}, args...)...).CombinedOutput()
	require.NoError(t, err, "%s %v: %s", name, args, out)
	return string(out)
}

func TestRedisCLI(t *testing.T) {
	s := serve(t, nil)
	assert.Equal(t, "OK\n", run(t, s, "redis-cli", "SET", "k", "a b"))
	assert.Equal(t, "\"a b\"\n", run(t, s, "redis-cli", "--no-raw", "GET", "k"))
	assert.Equal(t, "(nil)\n", run(t, s, "redis-cli", "-3", "--no-raw", "GET", "none"))
	assert.Equal(t, "1) \"hz\"\n2) \"10\"\n", run(t, s, "redis-cli", "--no-raw", "CONFIG", "GET", "hz"))
	assert.Equal(t, "1# \"hz\" => \"10\"\n", run(t, s, "redis-cli", "-3", "--no-raw", "CONFIG", "GET", "hz"))
	assert.Contains(t, run(t, s, "redis-cli", "INFO"), "accepted_total:")
	assert.Contains(t, run(t, s, "redis-cli", "-n", "3", "CLIENT", "LIST"), " db=3 ")
	assert.Contains(t, run(t, s, "redis-cli", "CONNLAB", "HELP"), "STALL <milliseconds> [AT <unix-microseconds>]\n")
	assert.Contains(t, run(t, s, "redis-cli", "COMMAND", "DOCS"), "Returns the string value of a key.")
	assert.Equal(t, "ERR unknown command 'NOSUCH', with args beginning with: \n\n", run(t, s, "redis-cli", "NOSUCH"))
}

func TestRedisBenchmark(t *testing.T) {
	s := serve(t, nil)
	for _, extra := range [][]string{nil, {"-P", "16"}, {"-k", "0"}} {
		n := "10000"
		if len(extra) > 0 && extra[0] == "-k" {
			n = "1000" // a connection each
		}
		out := run(t, s, "redis-benchmark", append([]string{"-t", "ping,set,get,incr,mset", "-n", n, "-q"}, extra...)...)
		assert.NotContains(t, strings.ToLower(out), "error", "%v", extra)
		assert.NotContains(t, out, "Could not fetch server CONFIG", "%v", extra)
		assert.Equal(t, 6, strings.Count(out, "requests per second"), "%v: %s", extra, out)
	}
}
