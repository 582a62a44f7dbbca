package server

import (
	"fmt"
	"math/rand/v2"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/stretchr/testify/assert"
	"github.com/stretchr/testify/require"
	"golang.org/x/sys/unix"
)

// setting changes a setting of a server that runs.
func (c *conn) setting(name string, value any) {
	c.tb.Helper()
	require.Equal(c.tb, "+OK", c.do("CONFIG", "SET", name, fmt.Sprint(value)).String())
}

// waitInfo waits until a field of INFO has a value.
func (c *conn) waitInfo(field string, want any) {
	c.tb.Helper()
	eventually(c.tb, func() string { return fmt.Sprintf("%s is %s, want %v", field, c.info(field), want) },
		func() bool { return c.info(field) == fmt.Sprint(want) })
}

// One client after the other waits the whole time, many at once wait it together.
func TestServiceTime(t *testing.T) {
	const each, n = 5 * time.Millisecond, 100
	s := serve(t, func(c *Config) { c.ServiceTime = each })
	admin, c := dial(t, s.Addr().String()), dial(t, s.Addr().String())
	begin := time.Now()
	for range n {
		c.do("PING")
	}
	assert.GreaterOrEqual(t, time.Since(begin), n*each)
	assert.Equal(t, "0", admin.info("held_replies"))
	assert.Equal(t, fmt.Sprint(n), admin.info("releases_total"))
	assert.Equal(t, fmt.Sprint(n), admin.info("requests_total"))
	assert.Equal(t, "0", admin.info("request_wait_us_total"), "there is no ceiling")

	const together = 200 * time.Millisecond
	admin.setting("service-time", together.Microseconds())
	conns := []*conn{c}
	for range n - 1 {
		conns = append(conns, dial(t, s.Addr().String()))
	}
	begin = time.Now()
	for _, c := range conns {
		c.send("PING")
	}
	for _, c := range conns {
		c.receive()
		require.GreaterOrEqual(t, time.Since(begin), together)
	}
	assert.Less(t, time.Since(begin), n*together/2, "they do not wait for one another")
}

// A wait for a reply is not one of whole milliseconds as those for the cron.
func TestServiceTimeBelowAMillisecond(t *testing.T) {
	s := serve(t, func(c *Config) { c.ServiceTime = 300 * time.Microsecond })
	c := dial(t, s.Addr().String())
	var took []time.Duration
	for range 200 {
		begin := time.Now()
		c.do("PING")
		took = append(took, time.Since(begin))
	}
	slices.Sort(took)
	assert.GreaterOrEqual(t, took[0], 300*time.Microsecond)
	assert.Less(t, took[len(took)/10], time.Millisecond, "of the least disturbed ones; a cron may have ended a few long waits")
}

// The ceiling is for all clients together, and a request to it is what one read brings.
func TestMaxRequestRate(t *testing.T) {
	const rate, conns, rounds = 1000, 20, 10
	s := serve(t, func(c *Config) { c.MaxRequestRate = rate })
	admin := dial(t, s.Addr().String())
	var clients []*conn
	for range conns {
		clients = append(clients, dial(t, s.Addr().String()))
	}
	begin := time.Now()
	for range rounds {
		for _, c := range clients {
			c.send("PING")
		}
		for _, c := range clients {
			c.receive()
		}
	}
	const n = conns * rounds
	assert.GreaterOrEqual(t, time.Since(begin), (n-1)*time.Second/rate)
	assert.Equal(t, fmt.Sprint(n), admin.info("requests_total"))
	assert.GreaterOrEqual(t, number64(t, admin.info("request_wait_us_total")), int64(n*1_000_000/rate), "each has at least its own turn")
	assert.GreaterOrEqual(t, number64(t, admin.info("request_wait_us_max")), int64(1_000_000/rate))

	admin.setting("max-request-rate", 0)
	admin.setting("max-request-rate", 10)
	require.Equal(t, "+OK", admin.do("CONFIG", "RESETSTAT").String())
	c := clients[0]
	begin = time.Now()
	const pipelined = 500
	c.write(strings.Repeat("PING\r\n", pipelined))
	for range pipelined {
		require.Equal(t, "+PONG", c.receive().String())
	}
	assert.GreaterOrEqual(t, time.Since(begin), 100*time.Millisecond)
	assert.Equal(t, "1", admin.info("requests_total"))
	assert.Equal(t, "100000", admin.info("request_wait_us_total"))
	assert.Equal(t, "1", admin.info("releases_total"))
}

// What is a request and what is not.
func TestControlCommandsAreNotHeld(t *testing.T) {
	for _, tc := range []struct {
		why      string
		read     string
		requests int64
		held     bool
	}{
		{"a command", "PING\r\n", 1, true},
		{"a pipeline", "SET k v\r\nGET k\r\n", 1, true},
		{"one that fails", "GET\r\n", 1, true},
		{"one that does not exist", "NOSUCH\r\n", 1, true},
		{"a handshake", "HELLO 2\r\n", 1, true},
		{"half a command", "*1\r\n$4\r\nPI", 0, false},
		{"no RESP", "*x\r\n", 0, false},
		{"an empty line", "\r\n", 0, false},
		{"INFO", "INFO\r\n", 0, false},
		{"control commands", "CONFIG GET hz\r\nCONNLAB STALL 0\r\nSLOWLOG LEN\r\nCLIENT LIST\r\n", 0, false},
		{"control commands that fail", "CONFIG\r\nCONFIG NOSUCH\r\nINFO\r\n", 0, false},
		{"a command behind a control command", "INFO\r\nPING\r\n", 1, true},
		{"the command that sets it and the next one", "CONFIG SET service-time 1000000\r\nPING\r\n", 1, true},
	} {
		t.Run(tc.why, func(t *testing.T) {
			s, c := offline(t)
			s.cfg.ServiceTime = time.Second
			s.feed(c, []byte(tc.read))
			assert.Equal(t, tc.requests, s.stats.requests)
			assert.Equal(t, tc.held, len(c.sendable()) == 0 && len(c.out) > 0, "out %q, held %+v", c.out, c.held)
		})
	}
	s, c := offline(t)
	s.feed(c, []byte("*1\r\n$4\r\nPI"))
	s.feed(c, []byte("NG\r\n"))
	assert.Equal(t, int64(1), s.stats.requests, "in two reads")
	assert.Zero(t, s.heldReplies, "no ceiling and no service time")
}

// A later request of the same client has its reply later, whatever has become of the settings.
func TestHoldsStayInOrder(t *testing.T) {
	s, c := offline(t)
	s.cfg.ServiceTime = time.Minute
	s.feed(c, []byte("ECHO 1\r\n"))
	s.cfg.ServiceTime = 0
	s.feed(c, []byte("ECHO 2\r\n"))
	s.feed(c, []byte("CONFIG GET hz\r\n"))
	require.Equal(t, 3, c.held.len())
	due := c.held.next().due
	for _, h := range c.held.holds {
		assert.Equal(t, due, h.due)
	}
	s.releaseHeld(due - 1)
	assert.Empty(t, c.sendable())
	s.releaseHeld(due)
	assert.Equal(t, "$1\r\n1\r\n$1\r\n2\r\n*2\r\n$2\r\nhz\r\n$2\r\n10\r\n", string(c.sendable()))
	assert.Equal(t, []*client{c}, s.pending, "they go out in one cycle")
	s.feed(c, []byte("PING\r\n"))
	assert.Zero(t, c.held.len(), "nothing is before it")
	s.pending = nil // it has no socket
}

func TestRepliesStayInOrder(t *testing.T) {
	const first = 300 * time.Millisecond
	s := serve(t, func(c *Config) { c.ServiceTime = first })
	admin, c := dial(t, s.Addr().String()), dial(t, s.Addr().String())
	begin := time.Now()
	c.send("ECHO", "1")
	admin.waitInfo("requests_total", 1)
	admin.setting("service-time", 0)
	c.send("ECHO", "2")
	admin.waitInfo("requests_total", 2)
	c.send("CONFIG", "GET", "service-time")
	assert.Equal(t, `"1"`, c.receive().String())
	assert.GreaterOrEqual(t, time.Since(begin), first)
	assert.Equal(t, `"2"`, c.receive().String())
	assert.Equal(t, `["service-time" "0"]`, c.receive().String())
	assert.Equal(t, "0", admin.info("held_replies"))
	assert.Equal(t, "2", admin.info("requests_total"))
}

// Thousands of replies that are held keep nobody from the server, and closing their clients ends them.
func TestServerAnswersWhileItHolds(t *testing.T) {
	const clients, rounds = 500, 4
	s := serve(t, func(c *Config) { c.ServiceTime = time.Minute })
	admin := dial(t, s.Addr().String())
	var conns []*conn
	for range clients {
		conns = append(conns, dial(t, s.Addr().String()))
	}
	for i := range rounds {
		for _, c := range conns {
			c.send("PING")
		}
		admin.waitInfo("held_replies", (i+1)*clients)
	}
	for _, request := range []string{"CONNLAB STALL 0", "CONFIG SET hz 10", "CLIENT NO-EVICT OFF", "SLOWLOG RESET"} {
		assert.Equal(t, "+OK", admin.do(strings.Fields(request)...).String(), "%s", request)
	}
	assert.Contains(t, admin.line(conns[0].local()), fmt.Sprintf(" omem=%d ", rounds*len("+PONG\r\n")), "a reply that is held is there")
	assert.Equal(t, "0", admin.info("releases_total"))

	cycles, begin := number64(t, admin.info("loop_cycles")), time.Now()
	_, err := admin.next(200 * time.Millisecond)
	require.True(t, isTimeout(err), "nothing is to be read: %v", err)
	took := time.Since(begin)
	assert.LessOrEqual(t, number64(t, admin.info("loop_cycles"))-cycles, int64(took/(100*time.Millisecond))+10, "hz is 10, in %v", took)

	for _, c := range conns[1:] {
		require.NoError(t, c.Close())
	}
	admin.waitInfo("held_replies", rounds)
	admin.waitInfo("connected_clients", 2)
	_, err = conns[0].next(10 * time.Millisecond)
	assert.True(t, isTimeout(err), "the first client is held on: %v", err)
}

// What was held of a client that is gone does not come to the one that has its descriptor now.
func TestCloseWhileHeld(t *testing.T) {
	const each = 200 * time.Millisecond
	s := serve(t, func(c *Config) { c.ServiceTime = each })
	admin, old := dial(t, s.Addr().String()), dial(t, s.Addr().String())
	old.send("ECHO", "old")
	asked := time.Now()
	admin.waitInfo("held_replies", 1)
	descriptor := field1(admin.line(old.local()), "fd=")
	require.NoError(t, old.Close())
	admin.waitInfo("connected_clients", 1)
	assert.Equal(t, "0", admin.info("held_replies"))

	c := dial(t, s.Addr().String())
	require.Equal(t, `"new"`, c.do("ECHO", "new").String())
	require.GreaterOrEqual(t, time.Since(asked), each, "the time of the old one has passed")
	assert.Equal(t, `"newer"`, c.do("ECHO", "newer").String())
	assert.Equal(t, descriptor, field1(admin.line(c.local()), "fd="), "or this test shows nothing")
	assert.Equal(t, "2", admin.info("releases_total"))
}

// The end of a connection that the server means to close waits for the replies before it.
func TestServerClosesAfterTheHeldReplies(t *testing.T) {
	const each = 50 * time.Millisecond
	for _, tc := range []struct {
		why     string
		request string
		want    []string
	}{
		{"QUIT", "PING\r\nQUIT\r\nPING\r\n", []string{"+PONG", "+OK"}},
		{"close-after", "PING\r\nPING\r\nPING\r\nPING\r\n", []string{"+PONG", "+PONG", "+PONG"}},
		{"no RESP", "PING\r\n*x\r\n", []string{"+PONG", "-ERR Protocol error: invalid multibulk length"}},
	} {
		t.Run(tc.why, func(t *testing.T) {
			s := serve(t, func(c *Config) { c.ServiceTime, c.CloseAfter = each, 3 })
			c := dial(t, s.Addr().String())
			begin := time.Now()
			c.write(tc.request)
			assert.Equal(t, tc.want, c.waitClosed())
			assert.GreaterOrEqual(t, time.Since(begin), each)
		})
	}
	t.Run("each with a time of its own", func(t *testing.T) {
		s := serve(t, func(c *Config) { c.ServiceTime = 2 * each })
		admin, c := dial(t, s.Addr().String()), dial(t, s.Addr().String())
		var want []string
		for i := range 20 {
			c.send("ECHO", fmt.Sprint(i))
			want = append(want, fmt.Sprintf("%q", fmt.Sprint(i)))
			admin.waitInfo("requests_total", i+1)
		}
		c.send("QUIT")
		assert.Equal(t, append(want, "+OK"), c.waitClosed())
		assert.Equal(t, "21", admin.info("releases_total"))
		assert.Equal(t, [3]int64{byServer: 1}, admin.closes())
	})
}

// Who finishes has its replies as long as its close is delayed, and not beyond, held or not.
func TestFINWhileHeld(t *testing.T) {
	s := serve(t, func(c *Config) { c.ServiceTime, c.CloseDelay = 100*time.Millisecond, time.Minute })
	admin, c := dial(t, s.Addr().String()), dial(t, s.Addr().String())
	c.send("PING")
	c.finish()
	assert.Equal(t, "+PONG", c.receive().String())
	admin.setting("close-delay", 0)
	assert.Empty(t, c.waitClosed())

	admin.setting("service-time", time.Minute.Microseconds())
	c = dial(t, s.Addr().String())
	c.send("PING")
	c.finish()
	assert.Empty(t, c.waitClosed())
	admin.waitInfo("held_replies", 0)
	assert.Equal(t, [3]int64{byClient: 2}, admin.closes())
}

func TestHeldRepliesCountForTheOutputLimit(t *testing.T) {
	s := serve(t, func(c *Config) { c.ServiceTime, c.OutputBufferLimit = time.Minute, 1<<14 })
	admin, c := dial(t, s.Addr().String()), dial(t, s.Addr().String())
	for i := range 16 {
		c.send("ECHO", strings.Repeat("x", 1000))
		admin.waitInfo("requests_total", i+1)
	}
	require.Equal(t, "16", admin.info("held_replies"))
	c.send("ECHO", strings.Repeat("x", 1000))
	assert.Empty(t, c.waitClosed())
	assert.Equal(t, "1", admin.info("client_output_buffer_limit_disconnections"))
	assert.Equal(t, "0", admin.info("held_replies"))
}

func TestIdleTimeoutSparesTheHeld(t *testing.T) {
	s, c := offline(t)
	idle := s.newClient(-1)
	s.cfg.Timeout, s.cfg.ServiceTime = time.Second, time.Minute
	s.feed(c, []byte("PING\r\n"))
	s.clock.now += 3 * time.Second
	s.cronClients()
	assert.True(t, idle.doomed)
	assert.False(t, c.doomed)
	s.doomed = nil // it has no socket
}

func TestHoldSettings(t *testing.T) {
	s, c := offline(t)
	for _, tc := range []struct{ name, value, want string }{
		{"service-time", "60000000", "+OK"},
		{"service-time", "60000001", "argument must be between 0 and 60000000 inclusive"},
		{"service-time", "-1", "argument must be between 0 and 60000000 inclusive"},
		{"max-request-rate", "1000000000", "+OK"},
		{"max-request-rate", "1000000001", "argument must be between 0 and 1000000000 inclusive"},
		{"max-request-rate", "1.5", "argument couldn't be parsed into an integer"},
	} {
		assert.Contains(t, ask(t, s, c, "CONFIG", "SET", tc.name, tc.value).String(), tc.want, "%s %s", tc.name, tc.value)
	}
	assert.Equal(t, time.Minute, s.cfg.ServiceTime)
	assert.Equal(t, int64(1_000_000_000), s.station.rate)

	s.stats.requests, s.stats.requestWait, s.stats.requestWaitMax = 1, 2, 3
	s.stats.releases, s.stats.releaseLate, s.stats.releaseLateMax, s.heldReplies = 4, 5, 6, 7
	ask(t, s, c, "CONFIG", "RESETSTAT")
	assert.Zero(t, s.stats.requests+s.stats.releases)
	assert.Zero(t, s.stats.requestWait+s.stats.requestWaitMax+s.stats.releaseLate+s.stats.releaseLateMax)
	assert.Equal(t, 7, s.heldReplies, "it is a state and no counter")
}

// What is released is at all times what a plain list of the holds says.
func TestHoldsAgainstAPlainList(t *testing.T) {
	random := rand.New(rand.NewPCG(3, 4))
	s, _ := offline(t)
	type entry struct {
		c *client
		hold
	}
	var list []entry
	clients := make([]*client, 20)
	sent := map[*client]int{}
	for i := range clients {
		clients[i] = s.newClient(-1)
	}
	var now time.Duration
	for step := range 20_000 {
		i := random.IntN(len(clients))
		c := clients[i]
		switch random.IntN(20) {
		case 0: // it is gone, and another has its place
			s.doom(c, byClient)
			list = slices.DeleteFunc(list, func(e entry) bool { return e.c == c })
			clients[i] = s.newClient(-1)
			require.Zero(t, c.held.len())
		case 1, 2, 3, 4, 5, 6: // time passes
			cut := now + time.Duration(random.IntN(2000))
			list = slices.DeleteFunc(list, func(e entry) bool {
				if e.due > cut {
					return false
				}
				sent[e.c] += e.bytes
				return true
			})
			s.releaseHeld(cut)
			now = cut
		default:
			due := now + time.Duration(random.IntN(3000))
			if c.held.len() > 0 {
				due = max(due, c.held.last().due)
			}
			h := hold{due, 1 + random.IntN(5)}
			c.out = append(c.out, make([]byte, h.bytes)...)
			s.hold(c, h)
			list = append(list, entry{c, h})
		}
		require.Equal(t, len(list), s.heldReplies, "step %d", step)
		for _, c := range clients {
			require.Len(t, c.sendable(), sent[c], "step %d", step)
		}
	}
	require.NotZero(t, s.stats.releases)
	s.doomed = nil // they have no sockets
}

// Without epoll_pwait2 a wait is rounded up, never down; with it, it is as long as asked, and ends with an event.
func TestWaitPrecisely(t *testing.T) {
	for _, coarse := range []bool{false, true} {
		t.Run(fmt.Sprintf("coarse %v", coarse), func(t *testing.T) {
			p, err := newPoller(1)
			require.NoError(t, err)
			defer unix.Close(p.fd)
			p.coarse = coarse
			for _, timeout := range []time.Duration{-time.Second, 0, 100 * time.Microsecond, rawWait + 1500*time.Microsecond} {
				deadline := time.Now().Add(patience)
				for begin := time.Now(); time.Since(begin) < timeout; { // a signal ends a wait early
					require.True(t, time.Now().Before(deadline))
					_, err := p.waitPrecisely(timeout - time.Since(begin))
					require.NoError(t, err)
				}
			}
			fd, err := unix.Eventfd(1, unix.EFD_NONBLOCK|unix.EFD_CLOEXEC)
			require.NoError(t, err)
			defer unix.Close(fd)
			require.NoError(t, p.add(fd, unix.EPOLLIN))
			events, err := p.waitPrecisely(time.Hour)
			require.NoError(t, err)
			assert.Len(t, events, 1)
			assert.Equal(t, coarse, p.coarse, "this kernel has epoll_pwait2")
		})
	}
}
