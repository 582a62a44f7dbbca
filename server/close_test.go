package server

import (
	"encoding/binary"
	"fmt"
	"io"
	"net/netip"
	"os"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/stretchr/testify/assert"
	"github.com/stretchr/testify/require"
	"golang.org/x/sys/unix"
)

// finish sends FIN and leaves the other direction open.
func (c *conn) finish() {
	c.tb.Helper()
	require.NoError(c.tb, c.Conn.(interface{ CloseWrite() error }).CloseWrite())
}

// local is the client's end of the connection, as CLIENT LIST has it.
func (c *conn) local() string { return c.LocalAddr().String() }

// line returns a client's line of CLIENT LIST, or "" if it is not there.
func (c *conn) line(addr string) string {
	c.tb.Helper()
	for line := range strings.Lines(c.text("CLIENT", "LIST")) {
		if field1(line, "addr=") == addr {
			return strings.TrimSuffix(line, "\n")
		}
	}
	return ""
}

// closes returns the counters of INFO in the order client, error, server.
func (c *conn) closes() [3]int64 {
	c.tb.Helper()
	text := c.text("INFO", "connlab")
	var n [3]int64
	for i, by := range []string{"client", "error", "server"} {
		n[i] = number64(c.tb, infoField(text, "closes_by_"+by))
	}
	return n
}

func (c *conn) waitCloses(want [3]int64) {
	c.tb.Helper()
	eventually(c.tb, func() string { return fmt.Sprintf("closes by client, error, server: %v, want %v", c.closes(), want) },
		func() bool { return c.closes() == want })
}

// tcpState returns the state of the socket with these ends in /proc/net/tcp, 0 if there is none
// (numbers of include/net/tcp_states.h).
func tcpState(tb testing.TB, local, remote string) (state int) {
	tb.Helper()
	b, err := os.ReadFile("/proc/net/tcp")
	require.NoError(tb, err)
	hex := func(s string) string {
		ap := netip.MustParseAddrPort(s)
		a4 := ap.Addr().As4()
		return fmt.Sprintf("%08X:%04X", binary.NativeEndian.Uint32(a4[:]), ap.Port())
	}
	for line := range strings.Lines(string(b)) {
		f := strings.Fields(line)
		if f[1] == hex(local) && f[2] == hex(remote) {
			_, err := fmt.Sscanf(f[3], "%X", &state)
			require.NoError(tb, err, "%s", line)
		}
	}
	return state
}

const (
	finWait2 = 5
	timeWait = 6
)

// waitTimeWait waits until one end of a closed connection, the one that closed first, is in TIME_WAIT and the other gone.
func waitTimeWait(tb testing.TB, first, last string) {
	tb.Helper()
	eventually(tb, func() string {
		return fmt.Sprintf("state %d at %s, %d at %s", tcpState(tb, first, last), first, tcpState(tb, last, first), last)
	}, func() bool { return tcpState(tb, first, last) == timeWait && tcpState(tb, last, first) == 0 })
}

// Nobody is closed before the delay is over, nor later than the machine makes it; the client's end is the one in TIME_WAIT.
func TestCloseDelay(t *testing.T) {
	for _, delay := range []time.Duration{0, 20 * time.Millisecond, 300 * time.Millisecond} {
		t.Run(delay.String(), func(t *testing.T) {
			s := serve(t, func(c *Config) { c.CloseDelay = delay })
			const n = 50
			shortest := time.Hour
			for range n {
				c := dial(t, s.Addr().String())
				c.do("PING")
				finished := time.Now()
				c.finish()
				assert.Empty(t, c.waitClosed())
				took := time.Since(finished)
				require.GreaterOrEqual(t, took, delay)
				if shortest = min(shortest, took); delay > 100*time.Millisecond {
					break
				}
			}
			t.Logf("shortest %v", shortest)
			// The least disturbed one shows how exact the loop is; a wait is rounded up to a millisecond.
			assert.Less(t, shortest, delay+100*time.Millisecond)

			admin := dial(t, s.Addr().String())
			c := dial(t, s.Addr().String())
			c.do("PING")
			require.NoError(t, c.Close())
			waitTimeWait(t, c.local(), s.Addr().String())
			closes := admin.closes()
			assert.GreaterOrEqual(t, closes[byClient], int64(2))
			assert.Zero(t, closes[byError]+closes[byServer])
		})
	}
}

// Thousands may wait, all for one delay, and one look of the loop at the first is enough.
func TestManyDelayedCloses(t *testing.T) {
	const n = 500
	s := serve(t, func(c *Config) { c.CloseDelay = time.Minute })
	admin := dial(t, s.Addr().String())
	for range n {
		c := dial(t, s.Addr().String())
		c.do("PING")
		require.NoError(t, c.Close())
	}
	eventually(t, func() string { return admin.info("closes_delayed") }, func() bool { return admin.info("closes_delayed") == fmt.Sprint(n) })
	assert.Equal(t, fmt.Sprint(n+1), admin.info("connected_clients"), "their sockets are open")
	cycles := number64(t, admin.info("loop_cycles"))
	eventually(t, func() string { return admin.info("loop_cycles") }, func() bool { return number64(t, admin.info("loop_cycles")) > cycles+20 })
	assert.Equal(t, [3]int64{}, admin.closes(), "a minute is not over")
	require.Equal(t, "+OK", admin.do("CONFIG", "SET", "close-delay", "1").String())
	admin.waitCloses([3]int64{n, 0, 0})
	assert.Equal(t, "0", admin.info("closes_delayed"), "the change holds for those that wait")
	assert.Equal(t, "1", admin.info("connected_clients"))
}

// The loop sleeps no longer than until the next close, which is that of who finished first.
func TestDelayedCloseWakesTheLoop(t *testing.T) {
	s, c := offline(t)
	s.cfg.CloseDelay = 40 * time.Millisecond
	s.nextCron = s.clock.now + time.Minute
	assert.Equal(t, time.Minute, s.untilTimer(), "nobody waits")
	c.finished, c.leaving = s.clock.now, s.leaving.PushBack(c)
	s.clock.now += 10 * time.Millisecond
	other := s.newClient(-1)
	other.finished, other.leaving = s.clock.now, s.leaving.PushBack(other)
	assert.Equal(t, 30*time.Millisecond, s.untilTimer())
	s.doom(c, byError)
	assert.Equal(t, 40*time.Millisecond, s.untilTimer(), "of the other one")
	s.cfg.CloseDelay = 5 * time.Millisecond
	assert.Equal(t, 5*time.Millisecond, s.untilTimer(), "the setting has changed")
	s.doomed = nil // they have no sockets
}

// The end of the stream of one that waits is not reported over and over.
func TestDelayedCloseDoesNotSpin(t *testing.T) {
	s := serve(t, func(c *Config) { c.CloseDelay = time.Minute })
	admin, c := dial(t, s.Addr().String()), dial(t, s.Addr().String())
	c.do("PING")
	c.finish()
	eventually(t, func() string { return admin.info("closes_delayed") }, func() bool { return admin.info("closes_delayed") == "1" })
	cycles := number64(t, admin.info("loop_cycles"))
	begin := time.Now()
	require.NoError(t, admin.SetReadDeadline(begin.Add(300*time.Millisecond)))
	_, err := admin.Read(make([]byte, 1))
	require.True(t, isTimeout(err), "nothing is to be read: %v", err)
	took := time.Since(begin)
	more := number64(t, admin.info("loop_cycles")) - cycles
	assert.LessOrEqual(t, more, int64(took/(100*time.Millisecond))+10, "hz is 10, in %v", took)
}

// CLIENT LIST shows a client until its socket is closed, and says that it has finished.
func TestDelayedCloseInClientList(t *testing.T) {
	s := serve(t, func(c *Config) { c.CloseDelay = time.Minute })
	admin, c := dial(t, s.Addr().String()), dial(t, s.Addr().String())
	c.do("PING")
	before := admin.line(c.local())
	assert.Equal(t, "-1", field1(before+" ", "fin-ms="), "%s", before)
	assert.Equal(t, "r", field1(before, "events="), "%s", before)
	c.finish()
	eventually(t, func() string { return admin.line(c.local()) }, func() bool {
		return number64(t, field1(admin.line(c.local()), "fin-ms=")) >= 5
	})
	line := admin.line(c.local())
	eventually(t, func() string { return fmt.Sprint(tcpState(t, c.local(), s.Addr().String())) },
		func() bool { return tcpState(t, c.local(), s.Addr().String()) == finWait2 })
	assert.Empty(t, field1(line, "events="), "%s", line)
	assert.Equal(t, "N", field1(line, "flags="), "%s", line)
	assert.LessOrEqual(t, number64(t, field1(line, "fin-ms=")), number64(t, field1(line, "idle-ms=")), "the FIN is no request: %s", line)
}

// Who waits for its close still takes the replies that did not fit into its buffer.
func TestDelayedCloseLetsRepliesOut(t *testing.T) {
	s := serve(t, func(c *Config) { c.CloseDelay = time.Minute })
	admin := dial(t, s.Addr().String())
	value := strings.Repeat("x", 1<<20)
	require.Equal(t, "+OK", admin.do("SET", "k", value).String())
	c := dial(t, s.Addr().String())
	const n = 40
	for range n {
		c.send("GET", "k")
	}
	eventually(t, func() string { return admin.line(c.local()) }, func() bool { return field1(admin.line(c.local()), "tot-cmds=") == fmt.Sprint(n) })
	c.finish()
	eventually(t, func() string { return admin.line(c.local()) }, func() bool { return field1(admin.line(c.local()), "fin-ms=") != "-1" })
	require.Equal(t, "w", field1(admin.line(c.local()), "events="), "replies must be waiting, or this test shows nothing")
	for range n {
		require.Len(t, c.receive().Str, len(value))
	}
	eventually(t, func() string { return admin.line(c.local()) }, func() bool { return field1(admin.line(c.local()), "events=") == "" })
	require.Equal(t, "+OK", admin.do("CONFIG", "SET", "close-delay", "0").String())
	assert.Empty(t, c.waitClosed())
}

// Only who sent FIN and nothing else may have the delay.
func TestCloseAtOnceInSpiteOfTheDelay(t *testing.T) {
	for _, tc := range []struct {
		why  string
		end  func(admin, c *conn)
		want [3]int64
	}{
		{"a reset", func(_, c *conn) {
			require.NoError(t, c.Conn.(interface{ SetLinger(int) error }).SetLinger(0))
			require.NoError(t, c.Close())
		}, [3]int64{byError: 1}},
		{"a reset after FIN", func(admin, c *conn) {
			c.finish()
			eventually(t, func() string { return admin.line(c.local()) }, func() bool { return field1(admin.line(c.local()), "fin-ms=") != "-1" })
			require.NoError(t, c.Conn.(interface{ SetLinger(int) error }).SetLinger(0))
			require.NoError(t, c.Close())
		}, [3]int64{byError: 1}},
		{"killed", func(admin, c *conn) { assert.Equal(t, "+OK", admin.do("CLIENT", "KILL", c.local()).String()) }, [3]int64{byServer: 1}},
		{"killed after FIN, which came first", func(admin, c *conn) {
			c.finish()
			eventually(t, func() string { return admin.line(c.local()) }, func() bool { return field1(admin.line(c.local()), "fin-ms=") != "-1" })
			assert.Equal(t, "+OK", admin.do("CLIENT", "KILL", c.local()).String())
		}, [3]int64{byClient: 1}},
		{"QUIT", func(_, c *conn) { c.send("QUIT") }, [3]int64{byServer: 1}},
		{"no RESP", func(_, c *conn) { c.write("*x\r\n") }, [3]int64{byServer: 1}},
	} {
		t.Run(tc.why, func(t *testing.T) {
			s := serve(t, func(c *Config) { c.CloseDelay = time.Minute })
			admin, c := dial(t, s.Addr().String()), dial(t, s.Addr().String())
			c.do("PING")
			tc.end(admin, c)
			admin.waitCloses(tc.want)
			assert.Equal(t, "0", admin.info("closes_delayed"))
			assert.Equal(t, "1", admin.info("connected_clients"))
			assert.Empty(t, admin.line(c.local()))
		})
	}
}

// The end of the server is the end of those that wait.
func TestServerEndsWithDelayedCloses(t *testing.T) {
	s := serve(t, func(c *Config) { c.CloseDelay = time.Minute })
	admin, c := dial(t, s.Addr().String()), dial(t, s.Addr().String())
	c.do("PING")
	c.finish()
	eventually(t, func() string { return admin.info("closes_delayed") }, func() bool { return admin.info("closes_delayed") == "1" })
	s.Close()
	assert.Empty(t, c.waitClosed())
}

// The idle timeout is for those that are read from; who waits for its close keeps the delay that was asked for.
func TestIdleTimeoutSparesDelayedCloses(t *testing.T) {
	s, c := offline(t)
	other := s.newClient(-1)
	s.cfg.Timeout, s.cfg.CloseDelay = time.Second, time.Minute
	c.finished, c.leaving = s.clock.now, s.leaving.PushBack(c)
	s.clock.now += 2 * time.Second
	s.cronClients()
	assert.True(t, other.doomed)
	assert.False(t, c.doomed)
	s.clock.now = c.finished + s.cfg.CloseDelay - 1
	s.closeDue()
	assert.False(t, c.doomed)
	s.clock.now++
	s.closeDue()
	assert.True(t, c.doomed)
	assert.Equal(t, [...]int64{byClient: 1, byError: 0, byServer: 1}, s.stats.closes)
	s.doomed = nil // they have no sockets
}

// After the reply to its n-th request a connection is closed by the server, whose end is the one in TIME_WAIT.
func TestCloseAfter(t *testing.T) {
	s := serve(t, func(c *Config) { c.CloseAfter = 3 })
	c := dial(t, s.Addr().String())
	assert.Equal(t, "+PONG", c.do("PING").String())
	assert.Equal(t, "-ERR unknown command 'NOSUCH', with args beginning with: ", c.do("NOSUCH").String(), "an error is a reply")
	assert.Equal(t, `"last"`, c.do("ECHO", "last").String())
	assert.Empty(t, c.waitClosed())
	require.NoError(t, c.Close())
	waitTimeWait(t, s.Addr().String(), c.local())

	pipelined := dial(t, s.Addr().String())
	pipelined.write(strings.Repeat("PING\r\n", 5))
	assert.Equal(t, []string{"+PONG", "+PONG", "+PONG"}, pipelined.waitClosed(), "what is beyond is not served")

	admin := dial(t, s.Addr().String())
	require.Equal(t, "+OK", admin.do("CONFIG", "SET", "close-after", "0").String())
	for range 10 {
		require.Equal(t, "+PONG", admin.do("PING").String(), "0 is never")
	}
	assert.Equal(t, [3]int64{byServer: 2}, admin.closes())
	require.Equal(t, "+OK", admin.do("CONFIG", "SET", "close-after", "5").String(), "who is beyond already gets one more reply")
	assert.Empty(t, admin.waitClosed())
}

// A close-after with a big last reply waits until all of it is out.
func TestCloseAfterWritesItsReply(t *testing.T) {
	s := serve(t, nil)
	admin := dial(t, s.Addr().String())
	value := strings.Repeat("x", 16<<20)
	require.Equal(t, "+OK", admin.do("SET", "k", value).String())
	require.Equal(t, "+OK", admin.do("CONFIG", "SET", "close-after", "3").String())
	c := dial(t, s.Addr().String())
	c.do("PING")
	c.do("PING")
	require.Len(t, c.do("GET", "k").Str, len(value))
	assert.Empty(t, c.waitClosed())
}

// Whole seconds are cut off as Redis cuts them; the milliseconds are there for the ages below a second.
func TestAgeAndIdle(t *testing.T) {
	s, c := offline(t)
	c.created, c.lastSeen = 10*time.Second, 12*time.Second
	for _, tc := range []struct {
		now                         time.Duration
		age, idle, ageMilli, idleMs string
	}{
		{12 * time.Second, "2", "0", "2000", "0"},
		{12999 * time.Millisecond, "2", "0", "2999", "999"},
		{13*time.Second - 1, "2", "0", "2999", "999"},
		{13 * time.Second, "3", "1", "3000", "1000"},
		{10*time.Second + 24*time.Hour, "86400", "86398", "86400000", "86398000"},
	} {
		s.clock.now = tc.now
		var b strings.Builder
		s.describe(&b, c)
		line := b.String() + " "
		got := []string{field1(line, "age="), field1(line, "idle="), field1(line, "age-ms="), field1(line, "idle-ms="), field1(line, "fin-ms=")}
		assert.Equal(t, []string{tc.age, tc.idle, tc.ageMilli, tc.idleMs, "-1"}, got, "at %v", tc.now)
	}
}

// In a served connection the age counts from its acceptance and the idle time from its last request, by the clock of the
// test, which is an upper bound; what was seen before the question is a lower one.
func TestAgeAndIdleOfConnections(t *testing.T) {
	s := serve(t, nil)
	admin := dial(t, s.Addr().String())
	admin.do("PING")
	beforeDial := time.Now()
	c := dial(t, s.Addr().String())
	c.do("PING")
	accepted := time.Now()
	var asked, answered time.Time
	eventually(t, func() string { return admin.line(c.local()) }, func() bool {
		asked = time.Now()
		c.do("PING")
		answered = time.Now()
		return answered.Sub(accepted) > 50*time.Millisecond
	})
	begin := time.Now()
	line := admin.line(c.local())
	end := time.Now()
	age, idle := number64(t, field1(line, "age-ms=")), number64(t, field1(line, "idle-ms="))
	assert.GreaterOrEqual(t, age, begin.Sub(accepted).Milliseconds()-1)
	assert.LessOrEqual(t, age, end.Sub(beforeDial).Milliseconds()+1)
	assert.GreaterOrEqual(t, idle, begin.Sub(answered).Milliseconds()-1)
	assert.LessOrEqual(t, idle, end.Sub(asked).Milliseconds()+1)
	assert.Equal(t, age/1000, number64(t, field1(line, "age=")))
	assert.GreaterOrEqual(t, number64(t, field1(line, "tot-cmds=")), int64(2))
}

// Connections that are accepted in one cycle have ages of their own.
func TestAgesWithinOneCycle(t *testing.T) {
	s, _ := offline(t)
	const n = 100
	for range n {
		dial(t, s.Addr().String())
	}
	begin := s.clock.tick()
	require.NoError(t, s.acceptReady())
	end := s.clock.tick()
	require.Len(t, s.clients, n+1)
	ages := map[time.Duration]bool{}
	for _, c := range s.clients[1:] {
		ages[c.created] = true
		assert.True(t, begin <= c.created && c.created <= end)
	}
	assert.Greater(t, len(ages), n/2)
}

// An idle client is closed by the server, whole seconds after its last request and at least one more than asked for, and
// the server's end is the one in TIME_WAIT; a busy one stays.
func TestIdleTimeout(t *testing.T) {
	s := serve(t, func(c *Config) { c.Timeout = time.Second; c.Hz = 100 })
	idle := dial(t, s.Addr().String())
	begin := time.Now()
	idle.do("PING")
	busy := dial(t, s.Addr().String())
	var wg sync.WaitGroup
	stop := make(chan struct{})
	wg.Go(func() {
		for {
			select {
			case <-stop:
				return
			case <-time.After(50 * time.Millisecond):
				busy.do("PING")
			}
		}
	})
	assert.Empty(t, idle.waitClosed())
	assert.GreaterOrEqual(t, time.Since(begin), 2*time.Second)
	close(stop)
	wg.Wait()
	assert.Equal(t, "+PONG", busy.do("PING").String())
	assert.Equal(t, [3]int64{byServer: 1}, busy.closes())
	require.NoError(t, idle.Close())
	waitTimeWait(t, s.Addr().String(), idle.local())
}

// BenchmarkDelayedCloses is what one close costs the loop while many others wait.
func BenchmarkDelayedCloses(b *testing.B) {
	for _, waiting := range []int{0, 100_000} {
		b.Run(fmt.Sprint(waiting), func(b *testing.B) {
			s, _ := offline(b)
			s.cfg.CloseDelay = time.Minute
			finish := func() {
				c := &client{finished: s.clock.now}
				c.leaving = s.leaving.PushBack(c)
			}
			for range waiting {
				finish()
			}
			for b.Loop() {
				finish()
				s.clock.now = s.leaving.Front().Value.(*client).finished + s.cfg.CloseDelay
				s.closeDue()
				s.doomed = s.doomed[:0]
			}
		})
	}
}

// A cut hits as many as it says, by FIN or by RST, and not the one who asks.
func TestCut(t *testing.T) {
	for _, tc := range []struct {
		how  []string
		want error
	}{
		{nil, io.EOF},
		{[]string{"RST"}, unix.ECONNRESET},
	} {
		s := serve(t, nil)
		admin := dial(t, s.Addr().String())
		var conns []*conn
		for range 11 {
			c := dial(t, s.Addr().String())
			c.do("PING")
			conns = append(conns, c)
		}
		left := len(conns)
		for _, share := range []struct {
			of  string
			cut int
		}{{"0", 0}, {"0.2", 2}, {"0.5", 5}, {"1", 4}, {"1", 0}} {
			v := admin.do(append([]string{"CONNLAB", "CUT", share.of}, tc.how...)...)
			require.Equal(t, fmt.Sprint(":", share.cut), v.String(), "%v of %d", share.of, left)
			left -= share.cut
			admin.waitInfo("connected_clients", 1+left)
		}
		for _, c := range conns {
			_, err := c.next(patience)
			assert.ErrorIs(t, err, tc.want)
		}
		assert.Equal(t, "11", admin.info("closes_by_server"))
		for _, bad := range []string{"-0.1", "1.1", "nan", "half", "0.5 FIN", "0.5 RST now"} {
			v := admin.do(append([]string{"CONNLAB", "CUT"}, strings.Fields(bad)...)...)
			assert.True(t, v.IsError(), "%s: %v", bad, v)
		}
	}
}
