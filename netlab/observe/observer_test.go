package observe

import (
	"fmt"
	"net/netip"
	"os"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"
	"github.com/stretchr/testify/assert"
	"github.com/stretchr/testify/require"
	"go.uber.org/goleak"
	"golang.org/x/sys/unix"

	"connlab/netlab"
)

func TestMain(m *testing.M) { goleak.VerifyTestMain(m) }

func openFiles(t *testing.T) int {
	t.Helper()
	entries, err := os.ReadDir("/proc/self/fd")
	require.NoError(t, err)
	return len(entries)
}

// A backlog of 4 holds 5 connections; the other 15 SYNs are dropped and counted,
// on the server and on nobody else.
func TestObserveFullAcceptQueue(t *testing.T) {
	lab := upLab(t, host("client", nil), host("server", nil), host("bystander", nil))
	client, server, bystander := lab.Host("client"), lab.Host("server"), lab.Host("bystander")
	const backlog, connects = 4, 20
	to := netip.AddrPortFrom(server.Addr(), 6379)
	listen(t, server, to.Port(), backlog)

	before := openFiles(t)
	o, err := Start(t.Context(), Config{
		Counters:      lab.Hosts(),
		CountersEvery: 20 * ms,
		Listeners:     []Listener{{server, to.Port()}},
		States:        []*netlab.Host{client, server},
		StatesEvery:   20 * ms,
	})
	require.NoError(t, err)
	o.Mark("burst")
	connect(t, client, to, connects)
	o.Mark("sent")
	eventually(t, 5*time.Second, func() error { // every sampler gets its turns
		if passed := time.Since(o.start); passed < 120*ms {
			return fmt.Errorf("only %v have passed", passed)
		}
		return nil
	})
	tl, err := o.Stop()
	require.NoError(t, err)
	again, err := o.Stop()
	require.NoError(t, err)
	assert.Same(t, tl, again)
	assert.Equal(t, before+connects, openFiles(t), "the observer's files are closed")

	delta := func(metric, host string) int64 {
		t.Helper()
		d, err := tl.Delta(metric, host)
		require.NoError(t, err)
		return d
	}
	last := func(metric, host string) int64 {
		t.Helper()
		v, err := tl.At(tl.Duration(), metric, host)
		require.NoError(t, err)
		return v
	}
	assert.EqualValues(t, backlog+1, last("Listen.Depth", "server"))
	assert.EqualValues(t, backlog, last("Listen.Limit", "server"))
	assert.EqualValues(t, 1, last("Listen.Sockets", "server"))
	peak, err := tl.Peak("Listen.Depth", "server")
	require.NoError(t, err)
	assert.EqualValues(t, backlog+1, peak.Value)
	begin, err := tl.MarkAt("burst")
	require.NoError(t, err)
	assert.Greater(t, peak.At, begin)
	end, err := tl.MarkAt("sent")
	require.NoError(t, err)
	assert.Greater(t, end, begin)

	drops := delta("TcpExt.ListenOverflows", "server")
	assert.GreaterOrEqual(t, drops, int64(connects-(backlog+1)), "and retransmitted SYNs where the machine was slow")
	assert.Equal(t, drops, delta("TcpExt.ListenDrops", "server"))
	assert.Zero(t, delta("TcpExt.ListenOverflows", "client"))
	assert.Zero(t, delta("TcpExt.ListenOverflows", "bystander"))
	assert.EqualValues(t, connects, delta("Tcp.ActiveOpens", "client"))
	assert.Zero(t, delta("Tcp.ActiveOpens", "server"))
	sum, err := tl.Delta("Tcp.ActiveOpens", "client", "server", "bystander")
	require.NoError(t, err)
	assert.EqualValues(t, connects, sum)

	assert.EqualValues(t, backlog+1, last("State.ESTABLISHED", "server"))
	assert.EqualValues(t, 1, last("State.LISTEN", "server"))
	assert.EqualValues(t, connects, last("State.ESTABLISHED", "client")+last("State.SYN_SENT", "client"))

	for _, s := range tl.Samplings() {
		assert.GreaterOrEqual(t, s.Rounds, 3, s.What)
		assert.GreaterOrEqual(t, s.LongestGap, s.Interval/2, s.What)
		assert.Positive(t, s.Busy, s.What)
	}
	_, err = bystander.Sysctl("net.core.somaxconn")
	require.NoError(t, err, "the lab outlives the observer")
}

func TestStartRefuses(t *testing.T) {
	lab := upLab(t, host("server", nil))
	server := lab.Host("server")
	listen(t, server, 6379, 4)
	before := openFiles(t)
	for _, tc := range []struct {
		name string
		cfg  Config
		err  string
	}{
		{"nothing listens", Config{Counters: lab.Hosts(), Listeners: []Listener{{server, 6380}}}, "host server: nothing listens on port 6380"},
		{"two listeners of one host", Config{Listeners: []Listener{{server, 6379}, {server, 6379}}}, "host server is twice in the listeners"},
		{"a host twice", Config{Counters: []*netlab.Host{server, server}}, "host server is twice in the counters"},
	} {
		t.Run(tc.name, func(t *testing.T) {
			_, err := Start(t.Context(), tc.cfg)
			require.ErrorContains(t, err, tc.err)
			assert.Equal(t, before, openFiles(t), "nothing stays open")
		})
	}
}

// A listener that goes away is seen to go, and is no error.
func TestObserveListenerGone(t *testing.T) {
	lab := upLab(t, host("server", nil))
	server := lab.Host("server")
	fd := listen(t, server, 6379, 4)
	o, err := Start(t.Context(), Config{Listeners: []Listener{{server, 6379}}})
	require.NoError(t, err)
	require.NoError(t, unix.Shutdown(fd, unix.SHUT_RD)) // a listener's end: tcp_disconnect
	tl, err := o.Stop()
	require.NoError(t, err)
	series, err := tl.Series("Listen.Sockets", "server")
	require.NoError(t, err)
	assert.EqualValues(t, 1, series[0].Value)
	assert.Zero(t, series[len(series)-1].Value)
}

// The state sampler does not dump the two large states; it must come to the
// same figures as a dump that does.
func TestSampledStatesEqualTheDump(t *testing.T) {
	lab := upLab(t, host("client", nil), host("server", nil))
	client, server := lab.Host("client"), lab.Host("server")
	to := netip.AddrPortFrom(server.Addr(), 6379)
	listener := listen(t, server, to.Port(), 64)
	peers := connect(t, client, to, 12)
	accepted := make([]int, len(peers))
	for i := range accepted {
		fd := accept(t, listener)
		accepted[i] = fd
		t.Cleanup(func() { _ = unix.Close(fd) })
	}
	// Of twelve: two half-closed by the client (CLOSE_WAIT here, FIN_WAIT2
	// there), three closed by the client alone (FIN_WAIT2 there without a
	// socket), four closed by the server first (TIME_WAIT here), three stay.
	remote := func(fd int) int {
		name, err := unix.Getpeername(fd)
		require.NoError(t, err)
		return name.(*unix.SockaddrInet4).Port
	}
	byPort := map[int]int{}
	for _, fd := range accepted {
		byPort[remote(fd)] = fd
	}
	for i, peer := range peers {
		name, err := unix.Getsockname(peer)
		require.NoError(t, err)
		fd := byPort[name.(*unix.SockaddrInet4).Port]
		switch {
		case i < 2:
			require.NoError(t, unix.Shutdown(peer, unix.SHUT_WR))
		case i < 5:
			require.NoError(t, unix.Shutdown(peer, unix.SHUT_RDWR))
			require.NoError(t, unix.Dup3(listener, peer, unix.O_CLOEXEC)) // closes peer, keeps the number
		case i < 9:
			require.NoError(t, unix.Shutdown(fd, unix.SHUT_WR))
			require.NoError(t, unix.Shutdown(peer, unix.SHUT_WR))
		}
	}
	want := map[string]map[State]int{
		"server": {Listen: 1, CloseWait: 5, TimeWait: 4, Established: 3},
		"client": {FinWait2: 5, Established: 3},
	}
	for _, h := range lab.Hosts() {
		awaitStates(t, h, Query{}, want[h.Name()])
		p, err := openStates(h)
		require.NoError(t, err)
		values, err := p.read(nil)
		require.NoError(t, err)
		require.NoError(t, p.close())
		got := map[State]int{}
		for i, v := range values {
			if v != 0 {
				got[Established+State(i)] = int(v)
			}
		}
		assert.Empty(t, cmp.Diff(want[h.Name()], got), "host %s", h.Name())
	}
}

// Clients believe they are connected; the server waits for data, then stops
// listening and forgets them without a word.
func TestGhosts(t *testing.T) {
	lab := upLab(t, host("client", nil), host("server", nil))
	client, server := lab.Host("client"), lab.Host("server")
	to := netip.AddrPortFrom(server.Addr(), 6379)
	listener := listen(t, server, to.Port(), 64)
	require.NoError(t, unix.SetsockoptInt(listener, unix.IPPROTO_TCP, unix.TCP_DEFER_ACCEPT, 30))
	const waiting = 7
	connect(t, client, to, waiting)

	joined := func() Joined {
		c, err := ReadSockets(client, Query{RemotePort: to.Port()})
		require.NoError(t, err)
		s, err := ReadSockets(server, Query{LocalPort: to.Port()})
		require.NoError(t, err)
		return Join(c, s)
	}
	awaitStates(t, client, Query{}, map[State]int{Established: waiting})
	j := joined()
	assert.Equal(t, waiting, j.Count(Established, SynRecv))
	assert.Empty(t, j.Ghosts())

	require.NoError(t, unix.Shutdown(listener, unix.SHUT_RD))
	eventually(t, 10*time.Second, func() error {
		if j = joined(); len(j.Ghosts()) != waiting {
			return fmt.Errorf("%d ghosts of %d: %v", len(j.Ghosts()), waiting, j)
		}
		return nil
	})
	assert.Len(t, j, 1, "and nothing but ghosts")
}

// A listener on :: serves IPv4; both ends must meet in the join all the same.
func TestJoinWithIPv6Listener(t *testing.T) {
	lab := upLab(t, host("client", nil), host("server", nil))
	client, server := lab.Host("client"), lab.Host("server")
	to := netip.AddrPortFrom(server.Addr(), 6379)
	var fd int
	require.NoError(t, server.Do(func() (err error) {
		fd, err = unix.Socket(unix.AF_INET6, unix.SOCK_STREAM|unix.SOCK_CLOEXEC, unix.IPPROTO_TCP)
		return err
	}))
	t.Cleanup(func() { _ = unix.Close(fd) })
	require.NoError(t, unix.SetsockoptInt(fd, unix.IPPROTO_IPV6, unix.IPV6_V6ONLY, 0))
	require.NoError(t, unix.Bind(fd, &unix.SockaddrInet6{Port: int(to.Port())}))
	require.NoError(t, unix.Listen(fd, 8))
	connect(t, client, to, 3)
	awaitStates(t, server, Query{}, map[State]int{Listen: 1, Established: 3})

	c, err := ReadSockets(client, Query{States: SetOf(Established)})
	require.NoError(t, err)
	s, err := ReadSockets(server, Query{LocalPort: to.Port()})
	require.NoError(t, err)
	assert.Equal(t, 3, Join(c, s).Count(Established, Established))
	assert.Len(t, Join(c, s), 1)

	p, err := openListener(Listener{server, to.Port()})
	require.NoError(t, err)
	values, err := p.read(nil)
	require.NoError(t, err)
	require.NoError(t, p.close())
	assert.Equal(t, []int64{3, 8, 0, 1}, values, "depth, limit, drops, sockets")
}

func TestQueryPorts(t *testing.T) {
	lab := upLab(t, host("client", nil), host("server", nil))
	client, server := lab.Host("client"), lab.Host("server")
	for _, port := range []uint16{6379, 6380} {
		listen(t, server, port, 8)
		connect(t, client, netip.AddrPortFrom(server.Addr(), port), 3)
	}
	awaitStates(t, server, Query{}, map[State]int{Listen: 2, Established: 6})
	for _, tc := range []struct {
		name string
		host *netlab.Host
		q    Query
		want map[State]int
	}{
		{"everything", server, Query{}, map[State]int{Listen: 2, Established: 6}},
		{"local port", server, Query{LocalPort: 6379}, map[State]int{Listen: 1, Established: 3}},
		{"local port and state", server, Query{LocalPort: 6379, States: SetOf(Established)}, map[State]int{Established: 3}},
		{"remote port", client, Query{RemotePort: 6380}, map[State]int{Established: 3}},
		{"the other end's port", client, Query{LocalPort: 6380}, map[State]int{}},
	} {
		t.Run(tc.name, func(t *testing.T) {
			sockets, err := ReadSockets(tc.host, tc.q)
			require.NoError(t, err)
			assert.Empty(t, cmp.Diff(tc.want, CountStates(sockets)))
		})
	}
}

func TestReadCountersAddsHosts(t *testing.T) {
	lab := upLab(t, host("client-1", nil), host("client-2", nil), host("server", nil))
	server := lab.Host("server")
	clients := []*netlab.Host{lab.Host("client-1"), lab.Host("client-2")}
	to := netip.AddrPortFrom(server.Addr(), 6379)
	listen(t, server, to.Port(), 64)
	before, err := ReadCounters(clients...)
	require.NoError(t, err)
	connect(t, clients[0], to, 3)
	connect(t, clients[1], to, 4)
	awaitStates(t, server, Query{}, map[State]int{Listen: 1, Established: 7})
	after, err := ReadCounters(clients...)
	require.NoError(t, err)
	diff := after.Sub(before)
	assert.EqualValues(t, 7, diff["Tcp.ActiveOpens"])
	assert.EqualValues(t, 7, diff["Tcp.CurrEstab"])
	assert.Zero(t, diff["Tcp.PassiveOpens"])
	none, err := ReadCounters()
	require.NoError(t, err)
	assert.Empty(t, none)
}

func TestReadSysctls(t *testing.T) {
	lab := upLab(t, host("server", map[string]string{"net.core.somaxconn": "128"}))
	got, err := ReadSysctls(lab.Host("server"), "net.core.somaxconn", "net.ipv4.tcp_abort_on_overflow", "net.ipv4.tcp_no_such_thing")
	require.NoError(t, err)
	assert.Empty(t, cmp.Diff(map[string]string{"net.core.somaxconn": "128", "net.ipv4.tcp_abort_on_overflow": "0"}, got))
}
