package loadgen

import (
	"context"
	"encoding/binary"
	"fmt"
	"io"
	"net"
	"net/netip"
	"os"
	"strings"
	"sync/atomic"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"
	"github.com/stretchr/testify/assert"
	"github.com/stretchr/testify/require"
	"golang.org/x/sys/unix"
)

func TestCloseStyle(t *testing.T) {
	for style, want := range map[CloseStyle]error{Graceful: io.EOF, Reset: unix.ECONNRESET} {
		const n = 10
		ended := make(chan error, n)
		target := serve(t, func(c *net.TCPConn) {
			request(c)
			_, _ = c.Write([]byte("+PONG\r\n"))
			_, err := c.Read(make([]byte, 1))
			ended <- err
		})
		report := load(t, Config{Targets: at(target), Schedule: Burst(n, 0), Close: style})
		assert.EqualValues(t, n, report.OK)
		for range n {
			assert.ErrorIs(t, <-ended, want)
		}
	}
}

// keepOpen keeps the connection open after the reply, until the client closes.
func keepOpen(c *net.TCPConn) { answer("+PONG\r\n")(c); silent(c) }

// Every way in which a server can take leave of a client that waits for it.
func TestPassiveClose(t *testing.T) {
	const n = 10
	for _, test := range []struct {
		name   string
		handle func(*net.TCPConn)
		want   Counts
	}{
		{name: "closed with the reply", handle: answer("+PONG\r\n")},
		{name: "closed later", handle: func(c *net.TCPConn) { answer("+PONG\r\n")(c); time.Sleep(20 * ms) }},
		{name: "half closed", handle: func(c *net.TCPConn) { answer("+PONG\r\n")(c); _ = c.CloseWrite(); silent(c) }},
		{name: "not closed", handle: keepOpen, want: Counts{CloseTimeout: n}},
		{name: "reset after the reply", handle: func(c *net.TCPConn) {
			answer("+PONG\r\n")(c)
			time.Sleep(20 * ms) // a reset takes along what was not read
			_ = c.SetLinger(0)
		}, want: Counts{ReadReset: n}},
		{name: "something unasked after the reply", handle: func(c *net.TCPConn) {
			answer("+PONG\r\n")(c)
			time.Sleep(20 * ms) // in one piece with the reply it is no reply at all
			_, _ = io.WriteString(c, "+PONG\r\n")
			silent(c)
		}, want: Counts{BadReply: n}},
		{name: "closed without a reply", handle: answer(), want: Counts{EOF: n}},
		{name: "not answered", handle: silent, want: Counts{ReadTimeout: n}},
		{name: "error reply", handle: answer("-ERR no\r\n"), want: Counts{ServerError: n}},
	} {
		t.Run(test.name, func(t *testing.T) {
			var ops []Op
			report := load(t, Config{Targets: at(serve(t, test.handle)), Schedule: Burst(n, 0), Close: Passive, ReplyTimeout: 200 * ms,
				OnOp: func(op Op) { ops = append(ops, op) }})
			if test.want == nil {
				test.want = Counts{}
			}
			assert.Empty(t, cmp.Diff(test.want, report.Failed))
			assert.Equal(t, n-test.want.Sum(), report.OK)
			require.Len(t, ops, n)
			for _, op := range ops {
				if op.Class == OK {
					assert.NoError(t, op.Err)
					assert.Less(t, op.Done, op.Closed, "it was answered and then closed")
				} else {
					assert.Zero(t, op.Closed)
				}
				if op.Class == CloseTimeout {
					assert.EqualError(t, op.Err, "close: timed out")
					assert.GreaterOrEqual(t, op.Done-op.Connected, 200*ms)
				}
			}
		})
	}
}

// The latency is the reply's, however long the server takes to close.
func TestLatencyOfAPassiveCloseIsTheReplys(t *testing.T) {
	const n, delay = 10, 300 * ms
	target := serve(t, func(c *net.TCPConn) { answer("+PONG\r\n")(c); time.Sleep(delay) })
	fastest := time.Hour
	report := load(t, Config{Targets: at(target), Schedule: Burst(n, 0), Close: Passive, OnOp: func(op Op) {
		assert.GreaterOrEqual(t, op.Closed-op.Connected, delay)
		fastest = min(fastest, op.Done-op.Due)
	}})
	require.EqualValues(t, n, report.OK, "failed: %v", report.Failed)
	assert.Less(t, fastest, delay)
	assert.InDelta(t, float64(fastest), float64(report.Latency.Quantile(0)), float64(fastest)/100, "the histogram has the same")
}

// The wait for the close is part of the operation: it takes a place in flight.
func TestPassiveClosesAreInFlight(t *testing.T) {
	const n, most = 20, 5
	report := load(t, Config{Targets: at(serve(t, keepOpen)), Schedule: Burst(n, 0), Close: Passive, ReplyTimeout: 100 * ms, MaxInFlight: most})
	assert.Equal(t, Counts{CloseTimeout: most}, report.Failed)
	assert.EqualValues(t, n-most, report.NotStarted)
}

// Who was answered has its time anew: the one that never was is given up before it.
func TestTheWaitForTheCloseBeginsWithTheReply(t *testing.T) {
	late := serve(t, func(c *net.TCPConn) {
		if request(c) {
			time.Sleep(50 * ms)
			_, _ = io.WriteString(c, "+PONG\r\n")
			silent(c)
		}
	})
	var ended []Class
	load(t, Config{Targets: []netip.AddrPort{late, serve(t, silent)}, Schedule: Burst(2, 0), Close: Passive, ReplyTimeout: 500 * ms,
		OnOp: func(op Op) { ended = append(ended, op.Class) }})
	assert.Equal(t, []Class{ReadTimeout, CloseTimeout}, ended)
}

func TestCancelWhileTheServerIsToClose(t *testing.T) {
	ctx, cancel := context.WithCancel(t.Context())
	var answered atomic.Int32
	target := serve(t, func(c *net.TCPConn) {
		answer("+PONG\r\n")(c)
		if answered.Add(1) == 3 {
			cancel()
		}
		silent(c)
	})
	report, err := Run(ctx, Config{Targets: at(target), Schedule: Burst(3, 0), Close: Passive, ReplyTimeout: time.Hour})
	require.ErrorIs(t, err, context.Canceled)
	require.NoError(t, report.Balanced())
	assert.Equal(t, Counts{Canceled: 3}, report.Failed)
}

// The side that closes first has the connection in TIME_WAIT.
func TestTimeWaitIsOfWhoClosesFirst(t *testing.T) {
	for style, handle := range map[CloseStyle]func(*net.TCPConn){Graceful: keepOpen, Passive: answer("+PONG\r\n")} {
		target := serve(t, handle)
		var op Op
		load(t, Config{Targets: at(target), Schedule: Burst(1, 0), Close: style, OnOp: func(o Op) { op = o }})
		require.Equal(t, OK, op.Class, "%v", op.Err)
		first, last := op.Local, target
		if style == Passive {
			first, last = last, first
		}
		eventually(t, func() (bool, any) {
			there, other := tcpState(t, first, last), tcpState(t, last, first)
			return there == timeWait && other == 0, [2]int{there, other}
		})
	}
}

const timeWait = 6 // include/net/tcp_states.h

// tcpState returns the state of the socket with these ends in /proc/net/tcp, or
// 0 if there is none.
func tcpState(t testing.TB, local, remote netip.AddrPort) (state int) {
	t.Helper()
	b, err := os.ReadFile("/proc/net/tcp")
	require.NoError(t, err)
	hex := func(ap netip.AddrPort) string {
		a4 := ap.Addr().As4()
		return fmt.Sprintf("%08X:%04X", binary.NativeEndian.Uint32(a4[:]), ap.Port())
	}
	for line := range strings.Lines(string(b)) {
		if f := strings.Fields(line); f[1] == hex(local) && f[2] == hex(remote) {
			_, err := fmt.Sscanf(f[3], "%X", &state)
			require.NoError(t, err, "%s", line)
		}
	}
	return state
}
