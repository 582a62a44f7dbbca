package observe

import (
	"errors"
	"fmt"
	"net"
	"net/netip"
	"strings"
	"testing"
	"time"

	"github.com/stretchr/testify/assert"
	"github.com/stretchr/testify/require"
	"golang.org/x/sys/unix"

	"connlab/netlab"
)

// startTrace traces until the test ends, or until it stops the trace itself.
func startTrace(tb testing.TB, hosts ...*netlab.Host) *Trace {
	tb.Helper()
	trace, err := StartTrace(TraceConfig{Hosts: hosts, Stays: AllStates})
	skipUnmet(tb, err)
	require.NoError(tb, err)
	tb.Cleanup(func() {
		_, err := trace.Stop()
		require.NoError(tb, err)
	})
	return trace
}

// stopTrace returns the report of a trace that lost nothing.
func stopTrace(tb testing.TB, trace *Trace) *TraceReport {
	tb.Helper()
	report, err := trace.Stop()
	require.NoError(tb, err)
	require.Empty(tb, report.Lost)
	return report
}

// skipWarned skips the test on a kernel that does not show everything.
func skipWarned(tb testing.TB, report *TraceReport) {
	tb.Helper()
	if len(report.Warnings) > 0 {
		skipUnmet(tb, &netlab.NeedError{Need: netlab.NeedTracepoints, Err: fmt.Errorf("in full: %s", strings.Join(report.Warnings, "; "))})
	}
}

// connection is one between two hosts, with the descriptor at each end.
type connection struct{ client, server int }

// openConnections opens n, all of them accepted.
func openConnections(tb testing.TB, client *netlab.Host, listener int, to netip.AddrPort, n int) []connection {
	tb.Helper()
	fds, err := client.Sockets(n)
	require.NoError(tb, err)
	byPort := map[int]int{}
	for _, fd := range fds {
		if err := unix.Connect(fd, sockaddr(to)); err != nil {
			require.ErrorIs(tb, err, unix.EINPROGRESS)
		}
		name, err := unix.Getsockname(fd)
		require.NoError(tb, err)
		byPort[name.(*unix.SockaddrInet4).Port] = fd
	}
	conns := make([]connection, n)
	for i := range conns {
		server := accept(tb, listener)
		peer, err := unix.Getpeername(server)
		require.NoError(tb, err)
		conns[i] = connection{byPort[peer.(*unix.SockaddrInet4).Port], server}
	}
	return conns
}

func sockaddr(to netip.AddrPort) *unix.SockaddrInet4 {
	return &unix.SockaddrInet4{Addr: to.Addr().As4(), Port: int(to.Port())}
}

// awaitCounter waits until a counter of the host has a value.
func awaitCounter(tb testing.TB, h *netlab.Host, name string, want int64) {
	tb.Helper()
	eventually(tb, 10*time.Second, func() error {
		counters, err := ReadCounters(h)
		if err != nil {
			return err
		}
		if counters[name] != want {
			return fmt.Errorf("host %s: %s is %d, want %d", h.Name(), name, counters[name], want)
		}
		return nil
	})
}

func closeAllFDs(tb testing.TB, fds ...int) {
	tb.Helper()
	for _, fd := range fds {
		require.NoError(tb, unix.Close(fd))
	}
}

// refused makes n connects to a port where nobody listens.
func refused(tb testing.TB, from *netlab.Host, to netip.AddrPort, n int) {
	tb.Helper()
	fds, err := from.Sockets(n)
	require.NoError(tb, err)
	for _, fd := range fds {
		err := unix.Connect(fd, sockaddr(to))
		if err != nil && !errors.Is(err, unix.ECONNREFUSED) {
			require.ErrorIs(tb, err, unix.EINPROGRESS)
		}
	}
	for _, fd := range fds {
		eventually(tb, 5*time.Second, func() error {
			info, err := unix.GetsockoptTCPInfo(fd, unix.IPPROTO_TCP, unix.TCP_INFO)
			if err == nil && State(info.State) != Close {
				err = fmt.Errorf("a connect to %v is in %v", to, State(info.State))
			}
			return err
		})
	}
	closeAllFDs(tb, fds...)
}

// TestTraceCountsEachReset makes resets of four kinds, 10,000 together, on two hosts
// that are traced, and others that are not: every one is counted once, with the
// reason, state and stack of its kind, and none of the others.
func TestTraceCountsEachReset(t *testing.T) {
	const (
		batch  = 250
		rounds = 10
		each   = batch * rounds
		port   = 6379
		closed = 9 // nobody listens
	)
	lab := upLab(t,
		// Without room for a single TIME_WAIT an orphan is gone as it enters FIN_WAIT_2.
		host("client", map[string]string{"net.ipv4.tcp_max_tw_buckets": "0"}),
		host("server", nil), host("untraced", nil))
	client, server, untraced := lab.Host("client"), lab.Host("server"), lab.Host("untraced")
	to := netip.AddrPortFrom(server.Addr(), port)
	listener := listen(t, server, port, batch)
	trace := startTrace(t, client, server)

	var answers, aborts int64 // resets that the server and the client have sent
	for range rounds {
		refused(t, client, netip.AddrPortFrom(server.Addr(), closed), batch)
		answers += batch
		awaitCounter(t, server, "Tcp.OutRsts", answers)
		refused(t, untraced, netip.AddrPortFrom(untraced.Addr(), closed), 10)
		_, err := net.DialTimeout("tcp4", "127.0.0.1:9", time.Second)
		require.ErrorIs(t, err, unix.ECONNREFUSED, "in the machine's own namespace")

		conns := openConnections(t, client, listener, to, batch)
		for _, c := range conns {
			require.NoError(t, unix.SetsockoptLinger(c.client, unix.SOL_SOCKET, unix.SO_LINGER, &unix.Linger{Onoff: 1}))
			closeAllFDs(t, c.client)
		}
		aborts += batch
		awaitCounter(t, client, "Tcp.OutRsts", aborts)
		for _, c := range conns {
			closeAllFDs(t, c.server)
		}

		conns = openConnections(t, client, listener, to, batch)
		for _, c := range conns {
			_, err := unix.Write(c.server, []byte("never read"))
			require.NoError(t, err)
			eventually(t, 5*time.Second, func() error {
				_, _, err := unix.Recvfrom(c.client, make([]byte, 1), unix.MSG_PEEK)
				return err
			})
			closeAllFDs(t, c.client)
		}
		aborts += batch
		awaitCounter(t, client, "Tcp.OutRsts", aborts)
		for _, c := range conns {
			closeAllFDs(t, c.server)
		}

		conns = openConnections(t, client, listener, to, batch)
		for _, c := range conns {
			// The server will delay its ACK: one that comes while the client still closes
			// would leave a full socket in FIN_WAIT_2 (see Stay), which a FIN finds.
			say(t, c.client, c.server)
			say(t, c.server, c.client)
		}
		for _, c := range conns {
			closeAllFDs(t, c.client)
		}
		awaitStates(t, client, Query{States: AllStates}, map[State]int{}) // the ACK has come
		for _, c := range conns {
			closeAllFDs(t, c.server)
		}
		aborts += batch
		awaitCounter(t, client, "Tcp.OutRsts", aborts)
	}

	report := stopTrace(t, trace)
	skipWarned(t, report)
	assert.EqualValues(t, 4*each, report.Sum("tcp_send_reset", "", ""))
	assert.EqualValues(t, each, report.Sum("tcp_send_reset", "server", ""), "as OutRsts of the server")
	assert.EqualValues(t, 3*each, report.Sum("tcp_send_reset", "client", ""), "as OutRsts of the client")

	for _, kind := range []struct {
		host, reason string
		state        State
		stack        []string // its beginning
		why          string
	}{
		{"server", "NO_SOCKET", None, []string{"tcp_v4_send_reset", "tcp_v4_rcv"}, "a port where nobody listens"},
		{"client", "TCP_STATE", Close, []string{"tcp_send_active_reset", "tcp_disconnect"}, "SO_LINGER of 0"},
		{"client", "TCP_ABORT_ON_CLOSE", Close, []string{"tcp_send_active_reset", "__tcp_close"}, "unread data at close"},
		{"client", "NO_SOCKET", None, []string{"tcp_v4_send_reset", "tcp_v4_rcv"}, "a FIN after the socket has gone"},
	} {
		var count int64
		for _, c := range report.Counts {
			if c.Event != "tcp_send_reset" || c.Host != kind.host || c.Reason != kind.reason {
				continue
			}
			count += c.Count
			assert.Equal(t, kind.state, c.State, kind.why)
			if assert.GreaterOrEqual(t, len(c.Stack), len(kind.stack), kind.why) {
				assert.Equal(t, kind.stack, c.Stack[:len(kind.stack)], kind.why)
			}
			local, remote := client.Addr(), server.Addr()
			if kind.host == "server" {
				local, remote = remote, local
			}
			assert.Equal(t, local, c.Local, kind.why)
			assert.Equal(t, remote, c.Remote, kind.why)
		}
		assert.EqualValues(t, each, count, kind.why)
	}

	// What one sends the other receives: refused connects here, aborted connections
	// and those closed for good there.
	assert.EqualValues(t, each, report.Sum("tcp_receive_reset", "client", ""))
	assert.EqualValues(t, 3*each, report.Sum("tcp_receive_reset", "server", ""))

	// A packet that is answered with a reset is thrown away with the same reason.
	assert.EqualValues(t, each, report.Sum("kfree_skb", "client", "NO_SOCKET"))
	assert.EqualValues(t, each, report.Sum("kfree_skb", "server", "NO_SOCKET"))
}
