package server

import (
	"fmt"
	"net"
	"strconv"
	"strings"
	"testing"
	"time"

	"github.com/stretchr/testify/assert"
	"github.com/stretchr/testify/require"
)

func number64(tb testing.TB, s string) int64 {
	tb.Helper()
	n, err := strconv.ParseInt(s, 10, 64)
	require.NoError(tb, err)
	return n
}

// A stall keeps everybody waiting and is in no log; a slow command is.
func TestStall(t *testing.T) {
	for _, mode := range []StallMode{StallSleep, StallSpin} {
		t.Run(string(mode), func(t *testing.T) {
			s := serve(t, func(c *Config) { c.StallMode = mode; c.SlowlogSlowerThan = 50 * time.Millisecond })
			admin, other := dial(t, s.Addr().String()), dial(t, s.Addr().String())
			other.do("PING")
			require.Equal(t, "0", admin.info("last_stall_end_us"))
			const stall = 400 * time.Millisecond
			require.Equal(t, "+OK", admin.do("CONNLAB", "STALL", "400").String(), "the reply comes before the stall")
			longest := time.Duration(0)
			eventually(t, func() string { return fmt.Sprintf("longest wait %v", longest) }, func() bool {
				sent := time.Now()
				other.do("PING")
				longest = max(longest, time.Since(sent))
				return longest > stall/2
			})
			assert.Equal(t, "1", admin.info("stalls_total"))
			begin, end := number64(t, admin.info("last_stall_start_us")), number64(t, admin.info("last_stall_end_us"))
			assert.GreaterOrEqual(t, end-begin, stall.Microseconds())
			assert.InDelta(t, time.Now().UnixMicro(), end, float64(patience.Microseconds()))
			assert.Equal(t, ":0", admin.do("SLOWLOG", "LEN").String(), "SLOWLOG: %s", admin.do("SLOWLOG", "GET"))

			require.Equal(t, "+OK", admin.do("DEBUG", "SLEEP", "0.1").String())
			log := admin.do("SLOWLOG", "GET")
			require.Len(t, log.Elems, 1)
			assert.Equal(t, `["DEBUG" "SLEEP" "0.1"]`, log.Elems[0].Elems[3].String())
			assert.GreaterOrEqual(t, log.Elems[0].Elems[2].Int, int64(100_000))
			assert.Equal(t, "1", admin.info("stalls_total"), "a slow command is no stall")
		})
	}
}

// While the loop stands still, the kernel goes on completing connections until backlog+1 wait.
func TestStallFillsTheAcceptQueue(t *testing.T) {
	const backlog = 5
	s := serve(t, func(c *Config) { c.Backlog = backlog })
	admin := dial(t, s.Addr().String())
	admin.do("CONNLAB", "ACCEPT", "PAUSE")
	connected := 0
	for range backlog + 1 {
		nc, err := net.DialTimeout("tcp4", s.Addr().String(), patience)
		require.NoError(t, err)
		defer nc.Close()
		connected++
	}
	assert.Equal(t, backlog+1, connected)
	assert.Equal(t, "1", admin.info("accepted_total"), "nobody but the one who asks")
	_, err := net.DialTimeout("tcp4", s.Addr().String(), 200*time.Millisecond)
	assert.True(t, isTimeout(err), "one too many gets no answer: %v", err)
	assert.Equal(t, "1", admin.info("accept_paused"))
	admin.do("CONNLAB", "ACCEPT", "RESUME")
	eventually(t, func() string { return admin.info("accepted_total") }, func() bool { return number64(t, admin.info("accepted_total")) >= backlog+2 })
	assert.Equal(t, "0", admin.info("accept_paused"))
}

func TestAcceptPauseEnds(t *testing.T) {
	s := serve(t, nil)
	admin := dial(t, s.Addr().String())
	require.Equal(t, "+OK", admin.do("CONNLAB", "ACCEPT", "PAUSE", "300").String())
	begin := time.Now()
	assert.Equal(t, "+PONG", admin.do("PING").String(), "who is connected is served on")
	assert.Equal(t, "+PONG", dial(t, s.Addr().String()).do("PING").String())
	assert.GreaterOrEqual(t, time.Since(begin), 250*time.Millisecond, "the newcomer had to wait")
}

func TestPeriodicStall(t *testing.T) {
	s := serve(t, func(c *Config) { c.Hz = 100 })
	c := dial(t, s.Addr().String())
	require.Equal(t, "+OK", c.do("CONFIG", "SET", "stall-every", "50", "stall-for", "20").String())
	eventually(t, func() string { return c.info("stalls_total") }, func() bool { return number64(t, c.info("stalls_total")) >= 3 })
	require.Equal(t, "+OK", c.do("CONFIG", "SET", "stall-every", "0").String())
	total := number64(t, c.info("stalls_total"))
	assert.GreaterOrEqual(t, number64(t, c.info("stalled_us")), total*20_000)
	cycles := number64(t, c.info("loop_cycles"))
	eventually(t, func() string { return c.info("loop_cycles") }, func() bool { return number64(t, c.info("loop_cycles")) > cycles+20 })
	assert.Equal(t, strconv.FormatInt(total, 10), c.info("stalls_total"), "none after it was turned off")
}

// The service time is spent in the thread: others wait for it, and SLOWLOG shows it.
func TestDelay(t *testing.T) {
	s := serve(t, func(c *Config) { c.SlowlogSlowerThan = 5 * time.Millisecond })
	c := dial(t, s.Addr().String())
	require.Equal(t, "+OK", c.do("CONNLAB", "DELAY", "get", "5000").String())
	begin := time.Now()
	for range 10 {
		c.send("GET", "k")
	}
	for range 10 {
		c.receive()
	}
	assert.GreaterOrEqual(t, time.Since(begin), 50*time.Millisecond)
	assert.Equal(t, ":10", c.do("SLOWLOG", "LEN").String())
	require.Equal(t, "+OK", c.do("CONNLAB", "DELAY", "*", "6000").String())
	c.do("PING")
	assert.GreaterOrEqual(t, c.do("SLOWLOG", "LEN").Int, int64(11))
	c.do("CONNLAB", "DELAY", "*", "0")
	c.do("CONNLAB", "DELAY", "get", "0")
	c.do("CONFIG", "SET", "slowlog-log-slower-than", "1000000")
	before := c.do("SLOWLOG", "LEN").Int
	c.do("GET", "k")
	assert.Equal(t, before, c.do("SLOWLOG", "LEN").Int)
}

// The drain of the accept queue is AcceptsPerCycle connections a cycle.
func TestAcceptsPerCycle(t *testing.T) {
	const waiting, perCycle = 60, 3
	s := serve(t, func(c *Config) { c.AcceptsPerCycle = perCycle; c.Backlog = waiting })
	admin := dial(t, s.Addr().String())
	admin.do("CONNLAB", "ACCEPT", "PAUSE")
	for range waiting {
		dial(t, s.Addr().String())
	}
	counters := func() (accepted, cycles int64) {
		text := admin.text("INFO", "connlab")
		return number64(t, infoField(text, "accepted_total")), number64(t, infoField(text, "loop_cycles"))
	}
	accepted0, cycles0 := counters()
	admin.do("CONNLAB", "ACCEPT", "RESUME")
	for accepted := accepted0; accepted < accepted0+waiting; {
		var cycles int64
		accepted, cycles = counters()
		require.LessOrEqual(t, accepted-accepted0, perCycle*(cycles-cycles0), "after %d cycles", cycles-cycles0)
	}
}

// A stall at a given time is there for several servers at once: it begins no earlier and, late as it may begin, ends on time.
func TestStallAt(t *testing.T) {
	s := serve(t, func(c *Config) { c.Hz = 1 })
	c := dial(t, s.Addr().String())
	const stall = 300 * time.Millisecond
	at := time.Now().Add(100 * time.Millisecond)
	require.Equal(t, "+OK", c.do("CONNLAB", "STALL", fmt.Sprint(stall.Milliseconds()), "AT", fmt.Sprint(at.UnixMicro())).String())
	c.waitInfo("stalls_total", 1)
	begin, end := number64(t, c.info("last_stall_start_us")), number64(t, c.info("last_stall_end_us"))
	assert.GreaterOrEqual(t, begin, at.UnixMicro())
	assert.Less(t, begin, at.Add(stall).UnixMicro(), "it does not wait for the cron, which is due once a second")
	assert.InDelta(t, at.Add(stall).UnixMicro(), end, float64(stall.Microseconds()))

	passed := time.Now().Add(-stall * 9 / 10)
	require.Equal(t, "+OK", c.do("CONNLAB", "STALL", fmt.Sprint(stall.Milliseconds()), "AT", fmt.Sprint(passed.UnixMicro())).String())
	c.waitInfo("stalls_total", 2)
	assert.Less(t, number64(t, c.info("stalled_us")), (2 * stall).Microseconds(), "the second had only a tenth of its time left")

	require.Equal(t, "+OK", c.do("CONNLAB", "STALL", "300", "AT", "0").String())
	c.waitInfo("stall_armed_us", 0)
	assert.Equal(t, "2", c.info("stalls_total"), "that one was over long ago")

	for _, tc := range []struct{ request, want string }{
		{"CONNLAB STALL 5 AT", "-ERR syntax error"},
		{"CONNLAB STALL 5 IN 5", "-ERR syntax error"},
		{"CONNLAB STALL 5 AT soon", "-ERR value is not an integer or out of range"},
		{fmt.Sprint("CONNLAB STALL 5 AT ", time.Now().Add(2*maxStall).UnixMicro()), "more than 10m0s from now"},
	} {
		assert.Contains(t, c.do(strings.Fields(tc.request)...).String(), tc.want, tc.request)
	}
	assert.Equal(t, "0", c.info("stall_armed_us"))
}
