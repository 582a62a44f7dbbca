package server

import (
	"fmt"
	"runtime"
	"slices"
	"strings"
	"testing"
	"time"
	"unsafe"

	"github.com/stretchr/testify/assert"
	"github.com/stretchr/testify/require"
	"golang.org/x/sys/unix"

	"connlab/server/resp"
)

// liveBytes returns the bytes of the heap that are alive.
func liveBytes() int {
	var m runtime.MemStats
	runtime.GC()
	runtime.ReadMemStats(&m)
	return int(m.HeapAlloc)
}

// After a big request the client is as small as before it: neither bytes nor arguments are held on to.
func TestBigRequestLeavesNothing(t *testing.T) {
	const size = 16 << 20
	manyArgs := append([]string{"EXISTS"}, make([]string, 200_000)...)
	for _, tc := range []struct {
		why     string
		request []byte
		rest    string
	}{
		{"one long argument", resp.AppendRequest(nil, "ECHO", strings.Repeat("x", size)), ""},
		{"the beginning of the next request behind it", resp.AppendRequest(nil, "ECHO", strings.Repeat("x", size)), "*1\r\n$4\r\nPI"},
		{"many empty arguments", resp.AppendRequest(nil, manyArgs...), ""},
		{"many arguments within one read", resp.AppendRequest(nil, manyArgs[:2500]...), ""},
	} {
		t.Run(tc.why, func(t *testing.T) {
			s, c := offline(t)
			small, before := c.memory(), liveBytes()
			for in := slices.Concat(tc.request, []byte(tc.rest)); len(in) > 0; {
				n := min(len(in), readSize)
				s.feed(c, in[:n])
				in = in[n:]
			}
			require.Equal(t, int64(1), s.stats.commands)
			require.NotEmpty(t, c.out)
			c.out = nil // as when it is written
			held := liveBytes() - before
			assert.Less(t, held, 1<<20, "after the request, idle")
			assert.LessOrEqual(t, c.memory(), small+keepBuffer)
			assert.Equal(t, tc.rest, string(c.in))
			runtime.KeepAlive(s)
			runtime.KeepAlive(tc.request)
		})
	}
}

func TestMemoryCountsTheParser(t *testing.T) {
	s, c := offline(t)
	before := c.memory()
	var in []byte
	in = resp.AppendArray(in, 100_000)
	for range 50_000 {
		in = resp.AppendBulk(in, "")
	}
	s.feed(c, in)
	assert.GreaterOrEqual(t, c.memory()-before, int64(len(in)+50_000*16))
	s.feed(c, in[len("*100000\r\n"):])
	c.out = nil
	assert.LessOrEqual(t, c.memory(), before+keepBuffer)
	assert.Nil(t, c.parser, "between requests the server's parser is enough")
	assert.Zero(t, s.parser.Memory(), "that of the long request is gone")
}

// Clients share a parser but for unfinished requests: one that stops in the middle of a request, or breaks the protocol, does not
// disturb another.
func TestParsersAreApart(t *testing.T) {
	s, a := offline(t)
	requests := map[string]string{"whole": "*2\r\n$4\r\nECHO\r\n$5\r\nwhole\r\n", "inline": "ECHO inline\r\n"}
	for cut := 1; cut < len(requests["whole"]); cut++ {
		b, broken := s.newClient(-1), s.newClient(-1)
		a.out = a.out[:0]
		s.feed(a, []byte(requests["whole"][:cut]))
		s.feed(broken, []byte("*1\r\nbad\r\n"))
		assert.Equal(t, "-ERR Protocol error: expected '$', got 'b'\r\n", string(broken.out))
		s.feed(b, []byte(requests["inline"]+requests["whole"][:cut/2]))
		s.feed(b, []byte(requests["whole"][cut/2:]))
		assert.Equal(t, "$6\r\ninline\r\n$5\r\nwhole\r\n", string(b.out), "cut at %d", cut)
		s.feed(a, []byte(requests["whole"][cut:]))
		assert.Equal(t, "$5\r\nwhole\r\n", string(a.out), "cut at %d", cut)
		assert.Nil(t, a.parser)
	}
}

func TestNamesAreBounded(t *testing.T) {
	s, c := offline(t)
	longest := strings.Repeat("n", maxName)
	for _, tc := range []struct {
		what    string
		request []string
	}{
		{"Client names", []string{"CLIENT", "SETNAME"}},
		{"lib-name", []string{"CLIENT", "SETINFO", "LIB-NAME"}},
		{"lib-ver", []string{"CLIENT", "SETINFO", "lib-ver"}},
		{"Client names", []string{"HELLO", "2", "SETNAME"}},
	} {
		assert.False(t, ask(t, s, c, append(tc.request, longest)...).IsError(), "%v", tc.request)
		assert.Equal(t, "-ERR "+tc.what+" cannot be longer than 65536 bytes.", ask(t, s, c, append(tc.request, longest+"n")...).String(), "%v", tc.request)
	}
	assert.Equal(t, longest, string(ask(t, s, c, "CLIENT", "GETNAME").Str))

	ask(t, s, c, "CONFIG", "SET", "slowlog-log-slower-than", "0")
	ask(t, s, c, "SLOWLOG", "RESET")
	log := ask(t, s, c, "SLOWLOG", "GET", "1")
	assert.Equal(t, longest[:slowlogMaxString], string(log.Elems[0].Elems[5].Str))
}

// Lists stop at the limit for replies instead of becoming as long as they may.
func TestListsStopAtTheOutputLimit(t *testing.T) {
	for _, request := range []string{"CLIENT LIST", "SLOWLOG GET -1"} {
		s, c := offline(t)
		s.cfg.OutputBufferLimit = 1 << 20
		name := strings.Repeat("n", maxName)
		for range 500 {
			s.newClient(-1).name = name
			s.slowlog.add(c, [][]byte{[]byte(name)}, false, 0, 0, 1<<20)
		}
		for range 20_000 {
			s.slowlog.add(c, [][]byte{[]byte(name)}, false, 0, 0, 1<<20)
		}
		s.feed(c, resp.AppendRequest(nil, strings.Fields(request)...))
		assert.True(t, c.doomed, "%s", request)
		assert.Less(t, len(c.out), 1<<20+2*maxName, "%s", request)
		assert.Equal(t, int64(1), s.stats.outputLimit, "%s", request)
	}
}

// An error repeats the beginning of what was wrong, not all of it.
func TestErrorsQuoteABeginning(t *testing.T) {
	long := strings.Repeat("a", 1<<20)
	s, c := offline(t)
	ask(t, s, c, "SET", "k", "v")
	for _, request := range [][]string{
		{long}, {"GET" + long, "k"}, {"CLIENT", long}, {"EXPIRE", "k", "1", long}, {"CLIENT", "SETINFO", long, "x"}, {"CLIENT", "LIST", "TYPE", long},
		{"CLIENT", "KILL", "TYPE", long}, {"CLIENT", "KILL", "USER", long}, {"HELLO", "2", long}, {"CONFIG", "SET", long, "1"}, {"CONNLAB", "DELAY", long, "1"},
	} {
		v := ask(t, s, c, request...)
		require.True(t, v.IsError(), "%.40q", request)
		assert.Contains(t, v.String(), "aaaa")
		assert.Less(t, len(v.Str), 3*maxExcerpt, "%.40q", request)
	}
}

// What the loop does between commands is not the next command's time: here it accepts hundreds of connections in the
// cycle of a PING.
func TestAcceptingIsNotTheCommandsTime(t *testing.T) {
	const waiting = 500
	s := serve(t, func(c *Config) { c.SlowlogSlowerThan = 0 })
	admin, other := dial(t, s.Addr().String()), dial(t, s.Addr().String())
	shortest := time.Hour
	for range 3 { // the least disturbed one counts
		admin.do("CONNLAB", "ACCEPT", "PAUSE")
		var queued []*conn
		for range waiting {
			queued = append(queued, dial(t, s.Addr().String()))
		}
		before := number64(t, admin.info("accepted_total"))
		admin.do("SLOWLOG", "RESET")
		// First the listener becomes ready, then, in the sleep, the PING.
		admin.write("CONNLAB ACCEPT RESUME\r\nDEBUG SLEEP 0.3\r\n")
		admin.write("ECHO asleep\r\n")
		_, err := admin.next(20 * time.Millisecond)
		require.True(t, isTimeout(err), "the loop does not sleep: %v", err)
		other.do("PING")
		for range 3 {
			admin.receive()
		}
		require.Equal(t, before+waiting, number64(t, admin.info("accepted_total")))
		for _, e := range admin.do("SLOWLOG", "GET", "-1").Elems {
			if e.Elems[3].String() == `["PING"]` {
				shortest = min(shortest, time.Duration(e.Elems[2].Int)*time.Microsecond)
			}
		}
		for _, q := range queued {
			require.NoError(t, q.Close())
		}
	}
	t.Logf("PING took %v", shortest)
	assert.Less(t, shortest, 500*time.Microsecond, "a PING takes microseconds, accepting %d connections some milliseconds", waiting)
}

// The clock is read after every event that was not a command, so that the next command starts there.
func TestEventsWithoutCommandsEndWithAReading(t *testing.T) {
	s, _ := offline(t)
	conn := dial(t, s.Addr().String())
	listener := unix.EpollEvent{Fd: int32(s.listenFD), Events: unix.EPOLLIN}
	begin := time.Since(s.clock.base)
	require.NoError(t, s.serveTimed(&listener))
	assert.GreaterOrEqual(t, s.clock.now, begin, "accepting")

	require.Len(t, s.clients, 2)
	c := s.clients[1]
	c.ok()
	begin = time.Since(s.clock.base)
	require.NoError(t, s.serveTimed(&unix.EpollEvent{Fd: int32(c.fd), Events: unix.EPOLLOUT}))
	assert.Empty(t, c.out)
	assert.GreaterOrEqual(t, s.clock.now, begin, "writing")

	conn.write("PI")
	begin = time.Since(s.clock.base)
	require.NoError(t, s.serveTimed(&unix.EpollEvent{Fd: int32(c.fd), Events: unix.EPOLLIN}))
	assert.Equal(t, "PI", string(c.in))
	assert.GreaterOrEqual(t, s.clock.now, begin, "reading a part of a request")
}

// A command that pauses accepting is obeyed in the cycle in which the listener is ready already, and for as long as asked.
func TestAcceptPauseInTheSameCycle(t *testing.T) {
	s, c := offline(t)
	conn := dial(t, s.Addr().String())
	defer conn.Close()
	require.Equal(t, "+OK", ask(t, s, c, "CONNLAB", "ACCEPT", "PAUSE").String())
	require.NoError(t, s.acceptReady())
	assert.Zero(t, s.stats.connections)
	assert.Equal(t, acceptState{paused: true}, s.accept)
}

// Looking for events instead of sleeping has an end, whatever number is asked for.
func TestLooksAreBounded(t *testing.T) {
	p, err := newPoller(1)
	require.NoError(t, err)
	defer unix.Close(p.fd)
	done := make(chan error, 1)
	go func() {
		_, err := p.wait(5*time.Millisecond, 1<<40)
		done <- err
	}()
	select {
	case err := <-done:
		require.NoError(t, err)
	case <-time.After(patience):
		t.Fatal("still looking")
	}
}

// Who takes replies is not idle.
func TestWritingCountsAgainstTheIdleTimeout(t *testing.T) {
	s, c := offline(t)
	pair, err := unix.Socketpair(unix.AF_UNIX, unix.SOCK_STREAM|unix.SOCK_NONBLOCK, 0)
	require.NoError(t, err)
	defer unix.Close(pair[1])
	c.fd = pair[0] // closed with the server
	seen := c.lastSeen
	s.clock.base = s.clock.base.Add(-time.Minute)
	s.clock.tick()
	s.flush(c)
	assert.Equal(t, seen, c.lastSeen, "there was nothing to write")
	c.ok()
	s.flush(c)
	require.Empty(t, c.out)
	assert.Equal(t, s.clock.now, c.lastSeen)
}

func TestMaxClientsWithinTheFileLimit(t *testing.T) {
	s, c := offline(t)
	most, err := clientsAllowed()
	require.NoError(t, err)
	var lim unix.Rlimit
	require.NoError(t, unix.Getrlimit(unix.RLIMIT_NOFILE, &lim))
	require.LessOrEqual(t, uint64(most)+reservedFiles, lim.Cur)
	if most < 1 || lim.Cur > 1<<30 {
		skip(t, fmt.Sprintf("a limit of %d open files leaves nothing to test", lim.Cur))
	}
	assert.Equal(t, "+OK", ask(t, s, c, "CONFIG", "SET", "maxclients", fmt.Sprint(most)).String())
	assert.Equal(t, fmt.Sprintf("-ERR CONFIG SET failed (possibly related to argument 'maxclients') - The operating system is not able to handle the specified number of clients, try with %d", most),
		ask(t, s, c, "CONFIG", "SET", "maxclients", fmt.Sprint(most+1)).String())
	assert.Equal(t, most, s.cfg.MaxClients)
}

// The bytes of a key are there once, which is how often they are counted.
func TestKeysAreSharedWithTheirExpiry(t *testing.T) {
	s, c := offline(t)
	ask(t, s, c, "SET", "key", "v")
	ask(t, s, c, "EXPIRE", "key", "100")
	ask(t, s, c, "SET", "other", "v", "EX", "100")
	ask(t, s, c, "SET", "other", "w", "EX", "200")
	d := &s.keys.dbs[0]
	require.Len(t, d.expires, 2)
	at := map[*byte]bool{}
	for k := range d.keys {
		at[unsafe.StringData(k)] = true
	}
	for k := range d.expires {
		assert.True(t, at[unsafe.StringData(k)], "%s is there twice", k)
	}
	ask(t, s, c, "DEL", "key", "other")
	assert.Empty(t, d.expires)
	assert.Zero(t, s.keys.bytes)
}
