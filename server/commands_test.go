package server

import (
	"fmt"
	"strconv"
	"strings"
	"testing"
	"time"

	"github.com/stretchr/testify/assert"
	"github.com/stretchr/testify/require"

	"connlab/server/resp"
)

// TestCommands has what the comparison with a real Redis leaves out: replies that are this server's own, and enough of
// the rest that a machine without Redis tests every command.
func TestCommands(t *testing.T) {
	s, c := offline(t)
	for _, tc := range []struct{ request, want string }{
		{"PING", "+PONG"},
		{"PING x", `"x"`},
		{"ECHO x", `"x"`},
		{"SET k v", "+OK"},
		{"GET k", `"v"`},
		{"SET k w NX", "nil"},
		{"SET k w GET", `"v"`},
		{"SET k w EX 100", "+OK"},
		{"TTL k", ":100"},
		{"SET k w KEEPTTL", "+OK"},
		{"TTL k", ":100"},
		{"EXPIRE k 50", ":1"},
		{"TTL k", ":50"},
		{"EXISTS k k none", ":2"},
		{"INCR n", ":1"},
		{"INCR n", ":2"},
		{"MSET a 1 b 2", "+OK"},
		{"MGET a none b", `["1" nil "2"]`},
		{"DBSIZE", ":4"},
		{"DEL a b none", ":2"},
		{"SELECT 1", "+OK"},
		{"DBSIZE", ":0"},
		{"SELECT 0", "+OK"},
		{"FLUSHALL", "+OK"},
		{"DBSIZE", ":0"},
		{"CLIENT ID", ":1"},
		{"CLIENT SETNAME me", "+OK"},
		{"CLIENT GETNAME", `"me"`},
		{"CLIENT SETINFO LIB-NAME lib", "+OK"},
		{"CLIENT SETINFO lib-ver 1.0", "+OK"},
		{"CLIENT SETINFO lib-ver \"1 0\"", "-ERR lib-ver cannot contain spaces, newlines or special characters."},
		{"CLIENT SETINFO bogus x", "-ERR Unrecognized option 'bogus'"},
		{"CLIENT NO-EVICT ON", "+OK"},
		{"CONFIG GET max-new-connections-per-cycle", `["max-new-connections-per-cycle" "1000"]`},
		{"CONFIG SET max-new-connections-per-cycle 10 hz 20", "+OK"},
		{"CONFIG GET max-new*", `["max-new-connections-per-cycle" "10"]`},
		{"CONFIG SET max-new-connections-per-cycle 0", "-ERR CONFIG SET failed (possibly related to argument 'max-new-connections-per-cycle') - argument must be between 1 and 1000000 inclusive"},
		{"CONFIG SET close-delay 60000 close-after 1000000", "+OK"},
		{"CONFIG GET close-*", `["close-delay" "60000" "close-after" "1000000"]`},
		{"CONFIG SET close-delay 60001", "-ERR CONFIG SET failed (possibly related to argument 'close-delay') - argument must be between 0 and 60000 inclusive"},
		{"CONFIG SET close-after -1", "-ERR CONFIG SET failed (possibly related to argument 'close-after') - argument must be between 0 and 2147483647 inclusive"},
		{"CONFIG SET stall-mode nap", "-ERR CONFIG SET failed (possibly related to argument 'stall-mode') - argument(s) must be one of the following: sleep, spin"},
		{"CONFIG SET appendonly no save \"\"", "+OK"},
		{"CONFIG SET appendonly yes", "-ERR CONFIG SET failed (possibly related to argument 'appendonly') - can't set immutable config"},
		{"CONFIG SET bind 127.0.0.2", "-ERR CONFIG SET failed (possibly related to argument 'bind') - can't set immutable config"},
		{"CONFIG RESETSTAT", "+OK"},
		{"SLOWLOG LEN", ":0"},
		{"SLOWLOG RESET", "+OK"},
		{"COMMAND COUNT", ":" + strconv.Itoa(len(commandTable()))},
		{"COMMAND LIST FILTERBY PATTERN *get", `["get" "mget"]`},
		{"COMMAND INFO get", `[["get" :2 [+readonly +fast] :1 :1 :1 [+@read +@fast] [] [] []]]`},
		{"COMMAND DOCS echo", `["echo" ["summary" "Returns the given string." "since" "1.0.0" "group" "connection"]]`},
		{"DEBUG SLEEP 0", "+OK"},
		{"CONNLAB", "-ERR wrong number of arguments for 'connlab' command"},
		{"CONNLAB BOGUS", "-ERR unknown subcommand 'BOGUS'. Try CONNLAB HELP."},
		{"CONNLAB STALL x", "-ERR value is not an integer between 0 and 600000"},
		{"CONNLAB STALL 600001", "-ERR value is not an integer between 0 and 600000"},
		{"CONNLAB STALL -1", "-ERR value is not an integer between 0 and 600000"},
		{"CONNLAB STALL", "-ERR wrong number of arguments for 'connlab|stall' command"},
		{"CONNLAB DELAY nosuch 1", "-ERR unknown command 'nosuch'"},
		{"CONNLAB DELAY get x", "-ERR value is not an integer between 0 and 600000000"},
		{"CONNLAB DELAY client|id 0", "+OK"},
		{"CONNLAB DELAY * 0", "+OK"},
		{"CONNLAB ACCEPT", "-ERR wrong number of arguments for 'connlab|accept' command"},
		{"CONNLAB ACCEPT NOW", "-ERR syntax error"},
		{"CONNLAB ACCEPT PAUSE x", "-ERR value is not an integer between 0 and 600000"},
		{"HELLO 2", `["server" "redis" "version" "7.0.15" "proto" :2 "id" :1 "mode" "standalone" "role" "master" "modules" []]`},
		{"HELLO 3 SETNAME you", `{"server" "redis" "version" "7.0.15" "proto" :3 "id" :1 "mode" "standalone" "role" "master" "modules" []}`},
		{"CLIENT GETNAME", `"you"`},
		{"GET none", "nil"},
		{"CONFIG GET hz", `{"hz" "20"}`},
		{"COMMAND DOCS echo", `{"echo" {"summary" "Returns the given string." "since" "1.0.0" "group" "connection"}}`},
		{"RESET", "+RESET"},
		{"CLIENT GETNAME", "nil"},
		{"AUTH x", "-" + errNoPass},
		{"AUTH default x", "+OK"},
		{"QUIT", "+OK"},
	} {
		var p resp.Parser
		_, args, err := p.Next([]byte(tc.request+"\n"), resp.DefaultLimits())
		require.NoError(t, err)
		words := make([]string, len(args))
		for i, a := range args {
			words[i] = string(a)
		}
		assert.Equal(t, tc.want, ask(t, s, c, words...).String(), "%s", tc.request)
	}
	assert.True(t, c.closeAfterReply, "QUIT closes the connection")
}

// Every row of the table must be fit for what reads it.
func TestCommandTable(t *testing.T) {
	var walk func(table []command, parent string)
	walk = func(table []command, parent string) {
		seen := map[string]bool{}
		for _, cmd := range table {
			name := parent + cmd.name
			assert.False(t, seen[cmd.name], "%s is there twice", name)
			seen[cmd.name] = true
			assert.Equal(t, strings.ToLower(cmd.name), cmd.name)
			assert.NotZero(t, cmd.arity, name)
			assert.NotEmpty(t, cmd.summary, name)
			assert.NotEmpty(t, cmd.since, name)
			assert.True(t, cmd.run != nil || cmd.subs != nil && cmd.arity == -2, "%s can be called without a handler", name)
			assert.NotEqual(t, flagWrite|flagReadonly, cmd.flags&(flagWrite|flagReadonly), name)
			if parent == "" {
				assert.NotEmpty(t, cmd.group, name)
			}
			walk(cmd.subs, name+"|")
		}
	}
	walk(commandTable(), "")

	s, c := offline(t)
	for name, cmd := range s.commands {
		if cmd.subs == nil {
			continue
		}
		v := ask(t, s, c, name, "HELP")
		require.Equal(t, resp.Array, v.Kind, name)
		assert.Len(t, v.Elems, 1+2*len(cmd.subs), name)
	}
}

func TestWrongNumberOfArguments(t *testing.T) {
	s, c := offline(t)
	for name, cmd := range s.commands {
		if cmd.arity == -1 {
			continue
		}
		args := []string{name}
		if cmd.arity == 1 {
			args = append(args, "x")
		}
		assert.Equal(t, "-ERR wrong number of arguments for '"+name+"' command", ask(t, s, c, args...).String())
	}
}

func TestInfo(t *testing.T) {
	s, c := offline(t)
	ask(t, s, c, "MSET", "a", "1", "b", "2")
	ask(t, s, c, "EXPIRE", "a", "100")
	ask(t, s, c, "MGET", "a", "none")
	all := string(ask(t, s, c, "INFO").Str)
	for _, want := range []string{
		"# Server\r\nredis_version:7.0.15\r\n", "\r\n\r\n# Clients\r\nconnected_clients:1\r\n", "# Memory\r\nused_memory:", "total_commands_processed:4\r\n",
		"keyspace_hits:1\r\nkeyspace_misses:1\r\n", "used_cpu_user:", "# Keyspace\r\ndb0:keys=2,expires=1,avg_ttl=0\r\n", "# Connlab\r\n", "stalls_total:0\r\n", "requests:4\r\n",
	} {
		assert.Contains(t, all, want)
	}
	two := string(ask(t, s, c, "INFO", "keyspace", "CLIENTS").Str)
	assert.Equal(t, 2, strings.Count(two, "# "), "%s", two)
	assert.Equal(t, strings.Count(all, "# "), strings.Count(string(ask(t, s, c, "INFO", "everything").Str), "# "))
	ask(t, s, c, "HELLO", "3")
	assert.Equal(t, resp.Verbatim, ask(t, s, c, "INFO").Kind)
}

// A key is gone when its time has come: when it is asked for, and by the cron when nobody asks.
func TestExpiry(t *testing.T) {
	s, c := offline(t)
	past := func(d time.Duration) { // time passes
		s.clock.base = s.clock.base.Add(-d)
		s.clock.tick()
	}
	ask(t, s, c, "SET", "lazy", "v", "PX", "1000")
	past(1001 * time.Millisecond)
	assert.Equal(t, "nil", ask(t, s, c, "GET", "lazy").String())
	assert.Equal(t, ":0", ask(t, s, c, "DBSIZE").String())

	const n = 500
	for i := range n {
		ask(t, s, c, "SET", fmt.Sprint("k", i), "v", "EX", "10")
	}
	ask(t, s, c, "SET", "stays", "v")
	past(11 * time.Second)
	for range 1000 {
		s.clock.tick()
		s.cronExpire()
		if len(s.keys.dbs[0].expires) == 0 {
			break
		}
	}
	assert.Equal(t, ":1", ask(t, s, c, "DBSIZE").String())
	assert.Equal(t, int64(n+1), s.stats.expired)
	ask(t, s, c, "DEL", "stays")
	assert.Zero(t, s.keys.bytes, "memory of keys is accounted for exactly")
}

func TestMaxMemory(t *testing.T) {
	s, c := offline(t)
	ask(t, s, c, "CONFIG", "SET", "maxmemory", "100kb")
	value := strings.Repeat("x", 1000)
	stored := 0
	for i := range 200 {
		v := ask(t, s, c, "SET", fmt.Sprint("k", i), value)
		if v.IsError() {
			assert.Equal(t, "-OOM command not allowed when used memory > 'maxmemory'.", v.String())
			break
		}
		stored++
	}
	assert.InDelta(t, 100<<10/(1000+entrySize), stored, 5)
	assert.Equal(t, `"`+value+`"`, ask(t, s, c, "GET", "k0").String(), "reading goes on")
	ask(t, s, c, "DEL", "k0", "k1", "k2")
	assert.Equal(t, "+OK", ask(t, s, c, "SET", "k0", value).String(), "and writing, once there is room")
}

func TestSlowlogEntry(t *testing.T) {
	s, c := offline(t)
	ask(t, s, c, "CONFIG", "SET", "slowlog-log-slower-than", "0", "slowlog-max-len", "3")
	ask(t, s, c, "SLOWLOG", "RESET")
	ask(t, s, c, "CLIENT", "SETNAME", "me")
	ask(t, s, c, "AUTH", "default", "topsecret")
	ask(t, s, c, append([]string{"MGET", strings.Repeat("k", 200)}, make([]string, 40)...)...)
	v := ask(t, s, c, "SLOWLOG", "GET", "-1")
	require.Len(t, v.Elems, 3, "bounded by slowlog-max-len: %s", v)
	e := v.Elems[0].Elems // newest first
	require.Len(t, e, 6)
	assert.Equal(t, int64(4), e[0].Int, "CONFIG SET was 0, SLOWLOG RESET 1")
	assert.InDelta(t, time.Now().Unix(), e[1].Int, 60)
	require.Len(t, e[3].Elems, slowlogMaxArgs)
	assert.Equal(t, `"`+strings.Repeat("k", 128)+`... (72 more bytes)"`, e[3].Elems[1].String())
	assert.Equal(t, `"... (11 more arguments)"`, e[3].Elems[31].String())
	assert.Equal(t, `"me"`, e[5].String())
	assert.Equal(t, `["AUTH" "(redacted)" "(redacted)"]`, v.Elems[1].Elems[3].String(), "no password in the log")
	assert.Equal(t, ":3", ask(t, s, c, "SLOWLOG", "LEN").String())
}

func TestGlob(t *testing.T) {
	for _, tc := range []struct {
		pattern, s string
		want       bool
	}{
		{"*", "", true}, {"*", "abc", true}, {"", "", true}, {"", "a", false}, {"a*c", "abbc", true}, {"a*c", "abcd", false}, {"a*b*c", "a1b2b3c", true},
		{"a?c", "abc", true}, {"a?c", "ac", false}, {"[ab]c", "bc", true}, {"[^ab]c", "bc", false}, {"[^ab]c", "xc", true}, {"[a-c]x", "bx", true}, {"[c-a]x", "bx", true},
		{"[a-c]x", "dx", false}, {`[\]]`, "]", true}, {`\*`, "*", true}, {`\*`, "a", false}, {`a\`, `a\`, true}, {"[a", "a", true}, {"[", "a", false}, {"a**", "a", true},
	} {
		assert.Equal(t, tc.want, glob(tc.pattern, tc.s), "glob(%q, %q)", tc.pattern, tc.s)
	}
	assert.False(t, glob(strings.Repeat("a*", 1000)+"b", strings.Repeat("a", 10_000)), "and that without taking for ever")
}

// The requests that the package comment names allocate nothing in the steady state.
func TestNoAllocationPerCommand(t *testing.T) {
	s, c := offline(t)
	for _, req := range [][]string{{"PING"}, {"SET", "key", "xxx"}, {"GET", "key"}, {"INCR", "n"}, {"MGET", "key", "n"}} {
		in := resp.AppendRequest(nil, req...)
		allocs := testing.AllocsPerRun(1000, func() {
			c.out, c.pending, s.pending = c.out[:0], false, s.pending[:0]
			s.feed(c, in)
		})
		assert.Zero(t, allocs, "%v", req)
	}
}

// FuzzConnection feeds bytes through the whole way of a connection, short of the socket.
func FuzzConnection(f *testing.F) {
	for _, line := range requests {
		f.Add([]byte(line+"\r\n"), uint8(7))
	}
	f.Add([]byte("*2\r\n$4\r\nECHO\r\n$2\r\nhi\r\nHELLO 3\r\nINFO\r\nCLIENT LIST\r\nCOMMAND\r\nCOMMAND DOCS\r\n"), uint8(1))
	f.Add([]byte("CONFIG SET slowlog-log-slower-than 0\nSET a b\nSLOWLOG GET\nCONNLAB DELAY * 5\nCONNLAB STALL 5\nCONNLAB ACCEPT PAUSE 5\nCLIENT KILL SKIPME no\n"), uint8(255))
	f.Fuzz(func(t *testing.T, in []byte, size uint8) {
		s, c := offline(t)
		s.closing.Store(true) // no sleeping
		for len(in) > 0 && !c.doomed {
			k := min(len(in), int(size)+1)
			s.feed(c, in[:k])
			in = in[k:]
			if size%3 == 0 {
				s.clock.tick()
				s.cron()
			}
		}
		for out := c.out; len(out) > 0 && !c.doomed; {
			n, _, err := resp.Decode(out)
			if err != nil || n == 0 {
				t.Fatalf("not a reply: n=%d err=%v in %.100q", n, err, out)
			}
			out = out[n:]
		}
	})
}
