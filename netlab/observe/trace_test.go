package observe

import (
	"encoding/json"
	"errors"
	"fmt"
	"io/fs"
	"net/netip"
	"runtime"
	"testing"
	"time"

	"github.com/cilium/ebpf"
	"github.com/cilium/ebpf/btf"
	"github.com/cilium/ebpf/link"
	"github.com/google/go-cmp/cmp"
	"github.com/stretchr/testify/assert"
	"github.com/stretchr/testify/require"
	"golang.org/x/sys/unix"

	"connlab/netlab"
)

// resetOnClose makes close(2) send a reset.
func resetOnClose(tb testing.TB, fd int) {
	tb.Helper()
	require.NoError(tb, unix.SetsockoptLinger(fd, unix.SOL_SOCKET, unix.SO_LINGER, &unix.Linger{Onoff: 1}))
}

// TestTraceCountsRetransmissions makes each kind of segment be sent again: SYNs to a
// listener whose accept queue is full, SYN-ACKs that wait for the client's data
// (TCP_DEFER_ACCEPT), and data that finds the accept queue full. What the kernel's
// counters say of both hosts is what the trace counts.
func TestTraceCountsRetransmissions(t *testing.T) {
	const (
		port    = 6379
		backlog = 10
		waiting = 5 // handshakes that wait for data
		late    = 3 // SYNs when the queue is full
	)
	lab := upLab(t, host("client", nil), host("server", map[string]string{"net.ipv4.tcp_syncookies": "0"}))
	client, server := lab.Host("client"), lab.Host("server")
	listener := listen(t, server, port, backlog)
	require.NoError(t, unix.SetsockoptInt(listener, unix.IPPROTO_TCP, unix.TCP_DEFER_ACCEPT, 1))
	to := netip.AddrPortFrom(server.Addr(), port)
	trace := startTrace(t, client, server)

	open := func(n int) []int { // like connect, but closed below
		fds, err := client.Sockets(n)
		require.NoError(t, err)
		for _, fd := range fds {
			if err := unix.Connect(fd, sockaddr(to)); err != nil {
				require.ErrorIs(t, err, unix.EINPROGRESS)
			}
		}
		return fds
	}
	send := func(fds []int) {
		for _, fd := range fds {
			eventually(t, 5*time.Second, func() error {
				_, err := unix.Write(fd, []byte("PING\r\n"))
				return err
			})
		}
	}
	fds := open(waiting)
	for i := range backlog + 1 { // one after the other: requests count against the backlog, too
		filling := open(1)
		send(filling)
		awaitQueue(t, server, i+1)
		fds = append(fds, filling...)
	}
	send(fds[:waiting])
	fds = append(fds, open(late)...)

	atLeast := func(h *netlab.Host, name string, want int64) {
		eventually(t, 10*time.Second, func() error {
			counters, err := ReadCounters(h)
			if err == nil && counters[name] < want {
				err = fmt.Errorf("host %s: %s is %d, want %d or more", h.Name(), name, counters[name], want)
			}
			return err
		})
	}
	atLeast(client, "TcpExt.TCPSynRetrans", late)
	atLeast(client, "Tcp.RetransSegs", waiting+late)
	atLeast(server, "Tcp.RetransSegs", waiting)
	for _, fd := range fds { // and with it, here and there, every timer
		resetOnClose(t, fd)
		closeAllFDs(t, fd)
	}
	awaitStates(t, client, Query{States: AllStates}, map[State]int{})
	awaitStates(t, server, Query{States: SetOf(SynRecv, Established)}, map[State]int{})
	clientCounters, err := ReadCounters(client)
	require.NoError(t, err)
	serverCounters, err := ReadCounters(server)
	require.NoError(t, err)
	report := stopTrace(t, trace)
	skipWarned(t, report)

	assert.Equal(t, clientCounters["Tcp.RetransSegs"], report.Sum("tcp_retransmit_skb", "client", ""))
	assert.Equal(t, serverCounters["Tcp.RetransSegs"], report.Sum("tcp_retransmit_skb", "server", "")+report.Sum("tcp_retransmit_synack", "server", ""))
	assert.GreaterOrEqual(t, report.Sum("tcp_retransmit_synack", "server", ""), int64(waiting))
	assert.Zero(t, report.Sum("tcp_retransmit_synack", "client", ""))
	var syns int64
	for _, c := range report.Counts {
		local, remote := client.Addr(), server.Addr()
		if c.Host == "server" {
			local, remote = remote, local
		}
		assert.Equal(t, local, c.Local, "%+v", c)
		assert.Equal(t, remote, c.Remote, "%+v", c)
		switch c.Event {
		case "tcp_retransmit_skb":
			if c.State == SynSent {
				syns += c.Count
			}
		case "tcp_retransmit_synack":
			assert.Equal(t, SynRecv, c.State)
		}
	}
	assert.Equal(t, clientCounters["TcpExt.TCPSynRetrans"], syns)

	// A packet that would complete a handshake is dropped for a full accept queue, with
	// the reason; a SYN is dropped without one, and is in the counter only.
	overflows := report.Sum("kfree_skb", "server", "TCP_LISTEN_OVERFLOW")
	assert.GreaterOrEqual(t, overflows, int64(waiting))
	assert.Equal(t, serverCounters["TcpExt.ListenOverflows"], overflows+late+syns)
}

// awaitQueue waits until the host's one listener has so many connections in its accept
// queue.
func awaitQueue(tb testing.TB, h *netlab.Host, want int) {
	tb.Helper()
	eventually(tb, 5*time.Second, func() error {
		sockets, err := ReadSockets(h, Query{States: SetOf(Listen)})
		if err == nil && (len(sockets) != 1 || sockets[0].RQueue != uint32(want)) {
			err = fmt.Errorf("listeners %v, want one with %d connections", sockets, want)
		}
		return err
	})
}

// TestTraceStays holds some connections in FIN_WAIT_2 by shutdown(2), and meanwhile
// closes others whose peer delays its ACK, and does not close.
func TestTraceStays(t *testing.T) {
	const (
		n    = 20
		port = 6379
	)
	lab := upLab(t, host("client", nil), host("server", nil))
	client, server := lab.Host("client"), lab.Host("server")
	listener := listen(t, server, port, 2*n)
	to := netip.AddrPortFrom(server.Addr(), port)
	trace := startTrace(t, client, server)

	halfClosed := openConnections(t, client, listener, to, n)
	for _, c := range halfClosed {
		require.NoError(t, unix.Shutdown(c.client, unix.SHUT_WR))
	}
	awaitStates(t, client, Query{States: AllStates}, map[State]int{FinWait2: n})
	held := time.Now()

	// After a request and its answer the server's kernel takes it that data will go
	// back, and delays ACKs (net/ipv4/tcp_input.c, inet_csk_in_pingpong_mode).
	orphans := openConnections(t, client, listener, to, n)
	for _, c := range orphans {
		say(t, c.client, c.server)
		say(t, c.server, c.client)
	}
	for _, c := range orphans {
		closeAllFDs(t, c.client)
	}
	// The minisocket of an orphan shows as FIN_WAIT_2 to sock_diag.
	awaitStates(t, client, Query{States: AllStates}, map[State]int{FinWait2: 2 * n})

	holding := time.Since(held)
	for _, c := range halfClosed {
		closeAllFDs(t, c.server)
	}
	awaitStates(t, client, Query{States: AllStates}, map[State]int{FinWait2: n, TimeWait: n})
	for _, c := range halfClosed {
		closeAllFDs(t, c.client)
	}
	for _, c := range orphans {
		closeAllFDs(t, c.server)
	}
	awaitStates(t, client, Query{States: AllStates}, map[State]int{TimeWait: 2 * n})
	report := stopTrace(t, trace)

	stays := map[string]map[State]map[State]Stay{"client": {}, "server": {}}
	for _, s := range report.Stays {
		if stays[s.Host][s.State] == nil {
			stays[s.Host][s.State] = map[State]Stay{}
		}
		stays[s.Host][s.State][s.Next] = s
		var inBuckets int64
		for _, b := range s.Buckets {
			inBuckets += b.Count
		}
		assert.Equal(t, s.Count, inBuckets)
		assert.GreaterOrEqual(t, s.Longest, s.Buckets[len(s.Buckets)-1].From)
		assert.Less(t, s.Longest, 2*s.Buckets[len(s.Buckets)-1].From)
	}
	counts := map[string]map[State]map[State]int64{}
	for host, states := range stays {
		counts[host] = map[State]map[State]int64{}
		for state, nexts := range states {
			counts[host][state] = map[State]int64{}
			for next, s := range nexts {
				counts[host][state][next] = s.Count
			}
		}
	}
	assert.Empty(t, cmp.Diff(map[string]map[State]map[State]int64{
		"client": {
			SynSent:     {Established: 2 * n},
			Established: {FinWait1: 2 * n},
			FinWait1:    {FinWait2: 2 * n},
			FinWait2:    {Close: 2 * n},
		},
		"server": {
			SynRecv:     {Established: 2 * n},
			Established: {CloseWait: 2 * n},
			CloseWait:   {LastAck: 2 * n},
			LastAck:     {Close: 2 * n},
		},
	}, counts))

	// The delayed ACK is due after 40 ms (include/net/tcp.h TCP_DELACK_MIN), of which a
	// timer's first tick may be missing; those who called shutdown were acknowledged
	// sooner.
	const delayed = 1 << 25 // 34 ms
	assert.EqualValues(t, n, countFrom(stays["client"][FinWait1][FinWait2], delayed), "%v", stays["client"][FinWait1][FinWait2])
	// Full sockets that are held stay for as long as they are, and orphans no time.
	inFinWait2 := stays["client"][FinWait2][Close]
	assert.GreaterOrEqual(t, inFinWait2.Total, n*holding)
	assert.EqualValues(t, n, inFinWait2.Count-countFrom(inFinWait2, delayed/2), "%v", inFinWait2)
}

// countFrom is how many stays were of this length or longer.
func countFrom(s Stay, from time.Duration) (n int64) {
	for _, b := range s.Buckets {
		if b.From >= from {
			n += b.Count
		}
	}
	return n
}

// say sends a line from one end to the other, and returns when it is read.
func say(tb testing.TB, from, to int) {
	tb.Helper()
	_, err := unix.Write(from, []byte("PING\r\n"))
	require.NoError(tb, err)
	eventually(tb, 5*time.Second, func() error {
		_, err := unix.Read(to, make([]byte, 16))
		return err
	})
}

func TestTraceCountsWhatFindsNoRoom(t *testing.T) {
	const port = 6379
	lab := upLab(t, host("client", nil), host("server", nil), host("other", nil))
	client, server, other := lab.Host("client"), lab.Host("server"), lab.Host("other")
	trace, err := startLimited(TraceConfig{Hosts: lab.Hosts(), Stays: AllStates}, traceLimits{counts: 1, sockets: 1})
	skipUnmet(t, err)
	require.NoError(t, err)
	refused(t, client, netip.AddrPortFrom(server.Addr(), port), 2)
	refused(t, other, netip.AddrPortFrom(client.Addr(), port), 1)
	report, err := trace.Stop()
	require.NoError(t, err)
	// There is room for the first of each: the client's first socket, and one of the
	// resets' four events and addresses.
	assert.Len(t, report.Counts, 1)
	assert.NotEmpty(t, report.Lost)
}

// TestTraceDefaultStays knows nothing of the states before a socket is closed, nor of the
// side that closes last.
func TestTraceDefaultStays(t *testing.T) {
	const (
		n    = 20
		port = 6379
	)
	lab := upLab(t, host("client", nil), host("server", nil))
	client, server := lab.Host("client"), lab.Host("server")
	listener := listen(t, server, port, n)
	trace, err := StartTrace(TraceConfig{Hosts: lab.Hosts()})
	skipUnmet(t, err)
	require.NoError(t, err)
	for _, c := range openConnections(t, client, listener, netip.AddrPortFrom(server.Addr(), port), n) {
		require.NoError(t, unix.Shutdown(c.client, unix.SHUT_WR))
		awaitStates(t, client, Query{States: SetOf(FinWait2)}, map[State]int{FinWait2: 1})
		closeAllFDs(t, c.server, c.client)
	}
	report := stopTrace(t, trace)
	var got []Stay
	for _, s := range report.Stays {
		got = append(got, Stay{Host: s.Host, State: s.State, Next: s.Next, Count: s.Count})
	}
	assert.Empty(t, cmp.Diff([]Stay{
		{Host: "client", State: FinWait1, Next: FinWait2, Count: n},
		{Host: "client", State: FinWait2, Next: Close, Count: n},
	}, got))
}

func TestTraceStopDetaches(t *testing.T) {
	lab := upLab(t, host("client", nil))
	trace := startTrace(t, lab.Hosts()...)
	var ids []link.ID
	for _, l := range trace.links {
		info, err := l.Info()
		require.NoError(t, err)
		ids = append(ids, info.ID)
	}
	require.Len(t, ids, len(countedEvents)+1)
	first := stopTrace(t, trace)
	again, err := trace.Stop()
	require.NoError(t, err)
	assert.Same(t, first, again)
	for _, id := range ids {
		// The kernel lets go of a link in a work queue.
		eventually(t, 5*time.Second, func() error {
			l, err := link.NewFromID(id)
			if err != nil {
				if errors.Is(err, fs.ErrNotExist) {
					return nil
				}
				return err
			}
			return errors.Join(errors.New("a link is still there"), l.Close())
		})
	}
}

func TestStartTraceRefuses(t *testing.T) {
	lab := upLab(t, host("client", nil))
	client := lab.Host("client")
	for _, row := range []struct {
		hosts []*netlab.Host
		want  string
	}{
		{nil, "trace: no host to trace"},
		{[]*netlab.Host{client, nil}, "trace: host 1 is nil"},
		{[]*netlab.Host{client, client}, "trace: host client is traced twice"},
	} {
		_, err := StartTrace(TraceConfig{Hosts: row.hosts})
		assert.EqualError(t, err, row.want)
	}
}

func TestStartTraceWithoutPrivilege(t *testing.T) {
	failed := make(chan error)
	go func() {
		runtime.LockOSThread() // for ever: the thread ends with its goroutine
		header := unix.CapUserHeader{Version: unix.LINUX_CAPABILITY_VERSION_3}
		var none [2]unix.CapUserData
		if err := unix.Capset(&header, &none[0]); err != nil {
			failed <- err
			return
		}
		_, err := StartTrace(TraceConfig{Hosts: []*netlab.Host{{}}})
		failed <- err
	}()
	err := <-failed
	need, ok := errors.AsType[*netlab.NeedError](err)
	require.True(t, ok, "%v", err)
	assert.Equal(t, netlab.NeedPrivilege, need.Need)
}

// TestTraceNeeds says which need is not met by the error that the kernel, or the reader
// of its BTF, gives.
func TestTraceNeeds(t *testing.T) {
	for _, row := range []struct {
		err  error
		want netlab.Need
		why  string
	}{
		{bpfNeed("loading", unix.EPERM), netlab.NeedPrivilege, "root of a user namespace"},
		{bpfNeed("attaching", unix.ENOENT), netlab.NeedTracepoints, "no such tracepoint"},
		{bpfNeed("loading", unix.ENOSYS), netlab.NeedTracepoints, "no bpf(2)"},
		{bpfNeed("loading", ebpf.ErrNotSupported), netlab.NeedTracepoints, "no such map or program"},
		{bpfNeed("loading", unix.ENOMEM), "", "a failure is no need"},
		{bpfNeed("loading", &ebpf.VerifierError{Cause: unix.EACCES, Log: []string{"R1 invalid"}}), "", "the program is at fault"},
		{layoutNeed(fs.ErrNotExist), netlab.NeedBTF, "no BTF"},
		{layoutNeed(btf.ErrNotSupported), netlab.NeedBTF, "no BTF"},
		{layoutNeed(btf.ErrNotFound), netlab.NeedTracepoints, "no such tracepoint in the BTF"},
	} {
		need, ok := errors.AsType[*netlab.NeedError](row.err)
		if assert.Equal(t, row.want != "", ok, row.why) && ok {
			assert.Equal(t, row.want, need.Need, row.why)
		}
	}
}

func TestTraceReportJSON(t *testing.T) {
	want := TraceReport{
		Counts: []TraceCount{{
			Event: "tcp_send_reset", Host: "client", Local: netip.MustParseAddr("10.0.0.1"), Remote: netip.MustParseAddr("10.0.0.2"),
			Reason: "NO_SOCKET", Stack: []string{"tcp_v4_send_reset", "tcp_v4_rcv"}, Count: 3,
		}},
		Stays: []Stay{{Host: "client", State: FinWait1, Next: FinWait2, Count: 1, Total: 5, Longest: 5, Buckets: []StayBucket{{4, 1}}}},
		Lost:  map[string]int64{eventDrop: 1}, Warnings: []string{"w"},
	}
	b, err := json.Marshal(want)
	require.NoError(t, err)
	var got TraceReport
	require.NoError(t, json.Unmarshal(b, &got))
	assert.Empty(t, cmp.Diff(want, got, cmp.Comparer(func(a, b netip.Addr) bool { return a == b })))
}

func TestTraceReportSum(t *testing.T) {
	r := TraceReport{Counts: []TraceCount{
		{Event: "kfree_skb", Host: "a", Reason: "NO_SOCKET", Count: 1},
		{Event: "tcp_send_reset", Host: "a", Reason: "NO_SOCKET", Count: 2},
		{Event: "tcp_send_reset", Host: "b", Reason: "NO_SOCKET", Count: 4},
		{Event: "tcp_send_reset", Host: "b", Reason: "TCP_STATE", Count: 8},
	}}
	assert.EqualValues(t, 15, r.Sum("", "", ""))
	assert.EqualValues(t, 14, r.Sum("tcp_send_reset", "", ""))
	assert.EqualValues(t, 12, r.Sum("tcp_send_reset", "b", ""))
	assert.EqualValues(t, 4, r.Sum("tcp_send_reset", "b", "NO_SOCKET"))
	assert.Zero(t, r.Sum("tcp_send_reset", "c", ""))
}
