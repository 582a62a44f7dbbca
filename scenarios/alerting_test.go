package scenarios

import (
	"path/filepath"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"
	"github.com/stretchr/testify/assert"
	"github.com/stretchr/testify/require"
	"golang.org/x/sys/unix"

	"connlab/netlab"
	"connlab/netlab/observe"
)

// overflowRules has the alert of interest and one that must not fire beside it.
const overflowRules = `groups:
- name: test
  rules:
  - alert: AcceptQueueOverflow
    expr: rate(node_netstat_TcpExt_ListenOverflows[2m]) > 0
  - alert: SYNQueueFull
    expr: rate(node_netstat_TcpExt_TCPReqQFullDrop[2m]) > 0
`

// An accept queue overflows: a real Prometheus sees it, and what it has of the
// counters is what the kernel said.
func TestAlerting(t *testing.T) {
	if err := netlab.CheckPrivilege(); err != nil {
		skip(t, err.Error())
	}
	require.NoError(t, stamp())
	lab, err := netlab.Up(t.Context(), netlab.Topology{
		Switches: []netlab.SwitchSpec{{Name: lanName, Subnet: nginxLAN}},
		Hosts: []netlab.HostSpec{
			{Name: "server", Links: []netlab.LinkSpec{{Switch: lanName}}},
			{Name: "client", Links: []netlab.LinkSpec{{Switch: lanName}}},
		},
	})
	require.NoError(t, err)
	defer func() { assert.NoError(t, lab.Down()) }()
	server := lab.Host("server")
	files := filesUnder(t, "/run")

	const scrape = time.Second
	a, err := startAlerting(t.Context(), server, []byte(overflowRules), []time.Duration{scrape}, nil)
	skipIfNeeded(t, err)
	assert.Equal(t, files, filesUnder(t, "/run"), "its files are its own")
	program, err := findServer(ServerMini)
	require.NoError(t, err)
	redis, err := program.start(t.Context(), server, serverConfig{backlog: 8}, nil)
	require.NoError(t, err)
	require.NoError(t, a.ready(t.Context()))
	found, err := a.fired(t.Context(), time.Time{})
	require.NoError(t, err)
	assert.Empty(t, found, "fired before the overflow")

	before := time.Now()
	overflow(t, lab.Host("client"), redis, 30)
	counters, err := observe.ReadCounters(server)
	require.NoError(t, err)
	after := time.Now()
	found, err = a.awaitFired(t.Context(), "AcceptQueueOverflow", before)
	require.NoError(t, err)
	require.Len(t, found, 1)
	assert.Equal(t, scrape, found[0].Interval)
	t.Logf("fired %v after the first overflow at the earliest; predicted at most: %v", found[0].At.Sub(before), alertWithin(scrape))
	all, err := a.fired(t.Context(), time.Time{})
	require.NoError(t, err)
	assert.Empty(t, cmp.Diff(found, all), "nothing else fires")

	// One scrape that began after all had been counted: nothing counts any more.
	for metric, ours := range map[string]string{
		"node_netstat_TcpExt_ListenOverflows": "TcpExt.ListenOverflows",
		"node_netstat_TcpExt_ListenDrops":     "TcpExt.ListenDrops",
		"node_netstat_TcpExt_TCPReqQFullDrop": "TcpExt.TCPReqQFullDrop",
	} {
		v, err := a.value(t.Context(), metric, scrape, after)
		require.NoError(t, err)
		now, err := observe.ReadCounters(server)
		require.NoError(t, err)
		assert.GreaterOrEqual(t, v, float64(counters[ours]), metric)
		assert.LessOrEqual(t, v, float64(now[ours]), metric)
	}

	out, err := a.leftOut(t.Context())
	require.NoError(t, err)
	assert.NotContains(t, out, "node_netstat_TcpExt_ListenOverflows", "the default filter has what incident 1 needs")
	for _, counter := range []string{"TCPReqQFullDrop", "TCPChallengeACK", "TCPSYNChallenge", "TCPTimeWaitOverflow", "PAWSEstab"} {
		assert.Contains(t, out, "node_netstat_TcpExt_"+counter)
	}

	require.NoError(t, redis.stop())
	require.NoError(t, a.stop())
	_, err = startAlerting(t.Context(), server, []byte("groups: [{name: test, rules: [{alert: A, expr: rate(}]}]"), []time.Duration{time.Second}, nil)
	assert.ErrorContains(t, err, "parse error", "rules that prometheus refuses")
	assert.Error(t, server.Listening(prometheusPort))
	assert.Error(t, server.Listening(exporterPort), "it ends with a prometheus that does")
	assert.Equal(t, files, filesUnder(t, "/run"))
}

// overflow sends SYNs to a server that stands still until each has been accounted
// for, and gives up before any is sent again.
func overflow(t *testing.T, client *netlab.Host, redis *target, n int) {
	t.Helper()
	require.NoError(t, redis.proc.Signal(unix.SIGSTOP))
	defer func() { require.NoError(t, redis.proc.Signal(unix.SIGCONT)) }()
	fds, err := client.Sockets(n)
	require.NoError(t, err)
	defer func() {
		for _, fd := range fds {
			assert.NoError(t, unix.Close(fd))
		}
	}()
	for _, fd := range fds {
		err := unix.Connect(fd, &unix.SockaddrInet4{Addr: redis.addr.Addr().As4(), Port: int(redis.addr.Port())})
		require.ErrorIs(t, err, unix.EINPROGRESS)
	}
	for deadline := time.Now().Add(10 * time.Second); ; time.Sleep(time.Millisecond) {
		counters, err := observe.ReadCounters(redis.host)
		require.NoError(t, err)
		got := counters["TcpExt.ListenOverflows"]
		if got >= int64(n-9) {
			return
		}
		require.True(t, time.Now().Before(deadline), "%d overflows by %d connections to 9 places", got, n)
	}
}

// filesUnder lists a directory of the machine's.
func filesUnder(t *testing.T, dir string) []string {
	t.Helper()
	entries, err := filepath.Glob(filepath.Join(dir, "*"))
	require.NoError(t, err)
	return entries
}
