package server

import (
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/stretchr/testify/assert"
	"github.com/stretchr/testify/require"

	"connlab/server/resp"
)

// requests are sent in this order to this server and to a real one, and the replies must be the same, errors to the
// letter. What differs by nature (ids, times, lists of everything) is in other tests.
var requests = strings.Split(strings.TrimSpace(`
PING
PING hello
PING a b
ping
ECHO hello
ECHO
ECHO a b
NOSUCH
NOSUCH a b
NOSUCH "a\r\nb" 'c d'
nosuch aaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaa bbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbb ccccccccccccccccccccccccccccccccc dddddd
"with\x00nul" "x\x00y"
GET
GET k
GET k k
SET k
SET k v
GET k
SET k ""
GET k
SET k v NX
SET new v NX
SET missing v XX
SET k w XX
SET k v NX XX
SET k v XX NX
SET k v EX
SET k v EX 0
SET k v EX -1
SET k v EX x
SET k v EX 9223372036854775807
SET k v EX 9223372036854775
SET k v PX 9223372036854775807
SET k v EX 10 PX 10
SET k v KEEPTTL EX 10
SET k v EX 10 KEEPTTL
SET k v BOGUS
SET k v EX 100
TTL k
SET k v2 KEEPTTL
TTL k
SET k v3
TTL k
SET k v4 GET
SET nothere v GET
SET k v5 NX GET
SET nothere2 v XX GET
GET nothere2
SET k v PXAT 1
GET k
SET k v EXAT 99999999999
SET k v PX 100000 NX
SET k v ex 100 nx
DEL k
DEL k
DEL
DEL new nothere k k
EXISTS
EXISTS k
MSET a 1 b 2
EXISTS a a b c
MSET a
MSET a 1 b
MSET
MGET a b c
MGET
INCR a
INCR a
INCR fresh
INCR
SET s abc
INCR s
SET s 01
INCR s
SET s " 1"
INCR s
SET s 9223372036854775807
INCR s
SET s -9223372036854775808
INCR s
SET s 9223372036854775808
INCR s
TTL a
TTL nosuch
TTL
EXPIRE a 100
TTL a
INCR a
TTL a
EXPIRE a x
EXPIRE a 9223372036854775807
EXPIRE a 9223372036854775
EXPIRE a -9223372036854775808
EXPIRE nosuch 100
EXPIRE a 200 NX
EXPIRE a 200 XX
TTL a
EXPIRE a 100 GT
EXPIRE a 300 GT
EXPIRE a 400 LT
EXPIRE a 50 LT
EXPIRE b 50 GT
EXPIRE b 50 LT
EXPIRE a 1 NX XX
EXPIRE a 1 NX GT
EXPIRE a 1 GT LT
EXPIRE a 1 XX GT
EXPIRE a 1 bogus
EXPIRE a
EXPIRE a 0
EXISTS a
EXPIRE b -1
EXISTS b
DBSIZE
DBSIZE x
SELECT 1
DBSIZE
SET a 1
SELECT 0
GET a
SELECT 16
SELECT -1
SELECT x
SELECT 99999999999
SELECT
FLUSHALL BOGUS
FLUSHALL SYNC
FLUSHALL ASYNC
FLUSHALL
FLUSHALL SYNC x
DBSIZE
AUTH x
AUTH default x
AUTH other x
AUTH
AUTH a b c
HELLO 4
HELLO 1
HELLO x
HELLO 2 BOGUS
HELLO 2 AUTH default
HELLO 2 SETNAME "a b"
HELLO 2 AUTH other x
CLIENT
CLIENT BOGUS
CLIENT GETNAME
CLIENT SETNAME tester
CLIENT GETNAME
CLIENT SETNAME "a b"
CLIENT SETNAME "a\nb"
CLIENT SETNAME
CLIENT SETNAME ""
CLIENT GETNAME
CLIENT ID x
CLIENT NO-EVICT ON
CLIENT NO-EVICT OFF
CLIENT NO-EVICT x
CLIENT NO-EVICT
CLIENT KILL
CLIENT KILL 1.2.3.4:5
CLIENT KILL ""
CLIENT KILL ADDR ""
CLIENT KILL LADDR ""
CLIENT KILL ADDR "" SKIPME no
CLIENT KILL ID x
CLIENT KILL ID 0
CLIENT KILL ID 999999
CLIENT KILL ADDR 1.2.3.4:5
CLIENT KILL LADDR 1.2.3.4:5
CLIENT KILL ADDR
CLIENT KILL BOGUS x
CLIENT KILL ID 999999 SKIPME
CLIENT KILL ID 999999 SKIPME maybe
CLIENT KILL ID 999999 SKIPME no
CLIENT KILL TYPE bogus
CLIENT KILL TYPE pubsub
CLIENT KILL USER nobody
CLIENT KILL USER default SKIPME yes
CLIENT LIST BOGUS
CLIENT LIST TYPE bogus
CLIENT LIST TYPE pubsub
CLIENT LIST TYPE
CLIENT LIST ID
CLIENT LIST ID x
CLIENT LIST ID 999999
CONFIG
CONFIG BOGUS
CONFIG GET
CONFIG GET timeout
CONFIG GET TIMEOUT
CONFIG GET nosuch*
CONFIG GET hz
CONFIG GET maxmemory-polic[xyz]
CONFIG GET appendonl?
CONFIG GET sav[e]
CONFIG SET
CONFIG SET timeout
CONFIG SET timeout x
CONFIG SET timeout -1
CONFIG SET timeout 0
CONFIG SET timeout 0 hz
CONFIG SET timeout 0 timeout 0
CONFIG SET nosuch 1
CONFIG SET timeout 60 nosuch 1
CONFIG GET timeout
CONFIG SET timeout 60 maxmemory 1x
CONFIG GET timeout
CONFIG SET timeout 60 maxmemory 100mb
CONFIG GET timeout maxmemory
CONFIG SET timeout 0 maxmemory 0
CONFIG SET databases 5
CONFIG SET tcp-backlog 5
CONFIG SET slowlog-max-len -1
CONFIG SET slowlog-max-len 64
CONFIG GET slowlog-max-len
CONFIG SET maxmemory 1k
CONFIG GET maxmemory
CONFIG SET maxmemory 1
SET big 1
MSET big 1
INCR big
GET big
DEL big
CONFIG SET maxmemory 0
CONFIG RESETSTAT
CONFIG RESETSTAT x
SLOWLOG
SLOWLOG RESET
SLOWLOG LEN
SLOWLOG GET
SLOWLOG GET 5
SLOWLOG GET -1
SLOWLOG GET -2
SLOWLOG GET x
SLOWLOG GET 1 2
slowlog get 1 2
CONFIG GET timeout hz time*
CONFIG GET Time* HZ
SLOWLOG BOGUS
COMMAND BOGUS
COMMAND COUNT x
COMMAND INFO nosuch
COMMAND DOCS nosuch
COMMAND LIST BOGUS
COMMAND LIST FILTERBY PATTERN ge[t]
COMMAND LIST FILTERBY PATTERN nosuch*
DEBUG
DEBUG SLEEP 0
DEBUG SLEEP 0.001
RESET x
RESET
PING
INFO nosuch
QUIT x
`), "\n")

// exchange sends a line of the table and returns the reply as text.
func exchange(c *conn, line string) string {
	c.tb.Helper()
	var p resp.Parser
	_, args, err := p.Next([]byte(line+"\n"), resp.DefaultLimits())
	require.NoError(c.tb, err, "request %q in the table", line)
	c.write(string(resp.AppendRequest(nil, args...)))
	v := c.receive()
	if strings.HasPrefix(line, "CONFIG GET") && len(v.Elems)%2 == 0 {
		sortPairs(v.Elems) // Redis replies in the order of a hash table
	}
	return v.String()
}

func sortPairs(elems []resp.Value) {
	pairs := slices.SortedFunc(slices.Chunk(elems, 2), func(a, b []resp.Value) int { return strings.Compare(a[0].String(), b[0].String()) })
	copy(elems, slices.Concat(pairs...))
}

func TestSameRepliesAsRedis(t *testing.T) {
	redis, _ := startRedis(t, nil)
	ours := serve(t, nil).Addr().String()
	for _, version := range []string{"2", "3"} {
		t.Run("RESP"+version, func(t *testing.T) {
			a, b := dial(t, ours), dial(t, redis)
			require.False(t, a.do("HELLO", version).IsError())
			require.False(t, b.do("HELLO", version).IsError())
			for _, line := range requests {
				got, want := exchange(a, line), exchange(b, line)
				assert.Equal(t, want, got, "%s", line)
				if line == "RESET" {
					a.do("HELLO", version)
					b.do("HELLO", version)
				}
			}
		})
	}
}

// What is wrong at the level of the protocol is answered the same and closes the connection.
func TestSameProtocolErrorsAsRedis(t *testing.T) {
	redis, _ := startRedis(t, nil)
	ours := serve(t, nil).Addr().String()
	for _, raw := range []string{
		"*x\r\n", "*\r\n", "*+1\r\n", "*99999999999999999999\r\n", "*1\r\n:1\r\n", "*1\r\nPING\r\n", "*1\r\n$x\r\n", "*1\r\n$-1\r\n", "*1\r\n$\r\n",
		"*1\r\n$536870913\r\n", "SET \"a\r\n", "SET 'a\r\n", "SET \"a\"b\r\n", strings.Repeat("a", 70_000), "*" + strings.Repeat("1", 70_000),
		"*1\r\n$" + strings.Repeat("1", 70_000), "PING\r\nPING \"\r\nPING\r\n", "*0\r\n\r\n*-5\r\nQUIT\r\n", "QUIT\r\nPING\r\n", "ECHO \"\\x41\\n\"\nQUIT\n",
		"*2\r\n$4\r\nECHO\r\n$2\r\nabXXQUIT\r\n",
	} {
		got := dialogue(t, ours, raw)
		want := dialogue(t, redis, raw)
		assert.Equal(t, want, got, "%.40q", raw)
	}
}

// dialogue sends bytes and returns the replies until the server closes.
func dialogue(t *testing.T, addr, raw string) []string {
	t.Helper()
	c := dial(t, addr)
	require.NoError(t, c.SetWriteDeadline(time.Now().Add(patience)))
	_, _ = c.Write([]byte(raw)) // the server may have closed before it has read all
	return c.waitClosed()
}

func TestSameLimitsBeforeAuthAsRedis(t *testing.T) {
	redis, _ := startRedis(t, nil, "--requirepass", "secret")
	ours := serve(t, func(c *Config) { c.RequirePass = "secret" }).Addr().String()
	a, b := dial(t, ours), dial(t, redis)
	for _, line := range []string{
		"PING", "GET k", "NOSUCH", "GET", "CLIENT ID", "CLIENT BOGUS", "CONFIG GET timeout", "COMMAND COUNT", "AUTH wrong", "AUTH default wrong", "AUTH other secret",
		"HELLO", "HELLO 3", "HELLO 4", "HELLO 2 AUTH default wrong", "RESET", "AUTH secret", "PING", "HELLO 2 SETNAME x AUTH default wrong", "PING", "RESET", "PING",
		"AUTH default secret", "PING",
	} {
		assert.Equal(t, exchange(b, line), exchange(a, line), "%s", line)
	}
	for _, raw := range []string{"*11\r\n", "*1\r\n$16385\r\n", "QUIT\r\n"} {
		assert.Equal(t, dialogue(t, redis, raw), dialogue(t, ours, raw), "%q", raw)
	}
}
