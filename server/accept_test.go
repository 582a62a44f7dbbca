package server

import (
	"fmt"
	"net"
	"slices"
	"strconv"
	"testing"
	"time"

	"github.com/stretchr/testify/assert"
	"github.com/stretchr/testify/require"
)

// queue makes connections that the kernel completes and nobody has asked for an answer.
func queue(tb testing.TB, addr string, n int) {
	tb.Helper()
	for range n {
		c, err := net.DialTimeout("tcp4", addr, patience)
		require.NoError(tb, err)
		tb.Cleanup(func() { _ = c.Close() })
	}
}

// accepted returns the number of accepted connections and when, in microseconds, that was so.
func accepted(tb testing.TB, admin *conn) (n, at int64) {
	tb.Helper()
	text := admin.text("INFO")
	return number64(tb, infoField(text, "accepted_total")), number64(tb, infoField(text, "server_time_usec"))
}

// While the accept queue has any, connections are accepted at the rate that is set, by one process as by three together. The
// machine may stand still in some of the windows, and make up for it in the next: the median is none of these.
func TestAcceptRate(t *testing.T) {
	const backlog, windows, window = 4000, 5, 120 * time.Millisecond
	most, err := somaxconn()
	require.NoError(t, err)
	if most < backlog {
		skip(t, fmt.Sprintf("net.core.somaxconn is %d, and %d connections are to wait in the accept queue", most, backlog))
	}
	for _, tc := range []struct {
		why  string
		rate int
		set  string // for each process
		own  int    // accepted connections that are the asker's
		run  func(t *testing.T) (addr string, admin *conn)
	}{
		{"one", 3000, "3000", 1, func(t *testing.T) (string, *conn) {
			addr := serve(t, func(c *Config) { c.Backlog = backlog }).Addr().String()
			return addr, dial(t, addr)
		}},
		{"three", 3000, "1000", 0, func(t *testing.T) (string, *conn) {
			s := startSpread(t, "--workers", "3", "--backlog", strconv.Itoa(backlog))
			return s.addr, s.control
		}},
	} {
		t.Run(tc.why, func(t *testing.T) {
			addr, admin := tc.run(t)
			require.Equal(t, "+PONG", admin.do("PING").String())
			require.Equal(t, "+OK", admin.do("CONFIG", "SET", "accept-rate", "1").String())
			queue(t, addr, backlog)
			first, start := accepted(t, admin)
			require.Equal(t, "+OK", admin.do("CONFIG", "SET", "accept-rate", tc.set).String())
			assert.Equal(t, strconv.Itoa(tc.rate), admin.info("accept_rate"), "of all together")
			assert.Equal(t, "0", admin.info("accept_paused"), "it goes on")
			var ratios []float64
			n0, t0 := accepted(t, admin)
			for len(ratios) < windows {
				time.Sleep(window)
				n, at := accepted(t, admin)
				ratios = append(ratios, float64(n-n0)/(float64(at-t0)/1e6*float64(tc.rate)))
				n0, t0 = n, at
			}
			passed := time.Duration(t0-start)*time.Microsecond + AcceptBurst + acceptBatch
			assert.LessOrEqual(t, float64(n0-first), passed.Seconds()*float64(tc.rate)+3, "whatever the machine does, not more than the rate and what was saved up")
			require.Less(t, n0, int64(backlog+tc.own), "the queue must not run empty")
			slices.Sort(ratios)
			assert.InDelta(t, 1, ratios[windows/2], 0.1, "of %.3f", ratios)
			t.Logf("%d accepted in %v; to the rate as %.3f", n0-first, time.Duration(t0-start)*time.Microsecond, ratios)

			require.Equal(t, "+OK", admin.do("CONFIG", "SET", "accept-rate", "0").String())
			admin.waitInfo("accepted_total", backlog+tc.own)
		})
	}
}

// The loop sleeps until the next connection may be accepted, and at high rates until several may.
func TestAcceptRateWakesSeldom(t *testing.T) {
	const n = 2000
	s := serve(t, func(c *Config) { c.Backlog = n })
	admin := dial(t, s.Addr().String())
	require.Equal(t, "+OK", admin.do("CONFIG", "SET", "accept-rate", "1").String())
	queue(t, s.Addr().String(), n)
	cycles, got := number64(t, admin.info("loop_cycles")), number64(t, admin.info("accepted_total"))
	time.Sleep(300 * time.Millisecond)
	assert.Less(t, number64(t, admin.info("loop_cycles"))-cycles, int64(50), "while the queue is full: INFO, the cron and one connection or two")

	const asked = 20
	cycles = number64(t, admin.info("loop_cycles"))
	require.Equal(t, "+OK", admin.do("CONFIG", "SET", "accept-rate", "20000").String())
	for range asked {
		time.Sleep(10 * time.Millisecond)
		if got = number64(t, admin.info("accepted_total")); got == n+1 {
			break
		}
	}
	cycles = number64(t, admin.info("loop_cycles")) - cycles
	assert.Greater(t, got, 8*cycles, "at 20,000 a second 40 come in a batch, which takes two cycles")
}

// What else keeps connections from being accepted, and a new rate, do not lose the listener.
func TestAcceptRateAndPauses(t *testing.T) {
	s := serve(t, func(c *Config) { c.AcceptRate = 10 })
	admin := dial(t, s.Addr().String())
	require.Equal(t, "+PONG", admin.do("PING").String())
	require.Equal(t, "+OK", admin.do("CONFIG", "SET", "accept-rate", "1").String())
	queue(t, s.Addr().String(), 5)
	for _, request := range [][]string{{"CONNLAB", "ACCEPT", "PAUSE", "50"}, {"CONNLAB", "ACCEPT", "PAUSE"}, {"CONNLAB", "ACCEPT", "RESUME"}} {
		require.Equal(t, "+OK", admin.do(request...).String())
	}
	assert.Equal(t, "0", admin.info("accept_paused"))
	require.Equal(t, "+OK", admin.do("CONFIG", "SET", "accept-rate", "100").String())
	admin.waitInfo("connected_clients", 6)

	require.Equal(t, "+OK", admin.do("CONFIG", "SET", "accept-rate", "1").String())
	queue(t, s.Addr().String(), 5)
	require.Equal(t, "+OK", admin.do("CONNLAB", "ACCEPT", "PAUSE").String())
	require.Equal(t, "+OK", admin.do("CONFIG", "SET", "accept-rate", "0").String())
	before := admin.info("accepted_total")
	time.Sleep(50 * time.Millisecond)
	assert.Equal(t, before, admin.info("accepted_total"), "paused, whatever the rate")
	require.Equal(t, "+OK", admin.do("CONNLAB", "ACCEPT", "RESUME").String())
	admin.waitInfo("connected_clients", 11)

	for _, bad := range []string{"-1", "1000001", "0.5", "many"} {
		assert.True(t, admin.do("CONFIG", "SET", "accept-rate", bad).IsError(), bad)
	}
	assert.Equal(t, `["accept-rate" "0"]`, admin.do("CONFIG", "GET", "accept-rate").String())
}
