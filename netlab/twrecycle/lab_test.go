package twrecycle

import (
	"context"
	"errors"
	"io"
	"net"
	"net/netip"
	"os"
	"strconv"
	"strings"
	"testing"
	"time"

	"connlab/netlab"
	"connlab/netlab/wire"

	"github.com/stretchr/testify/assert"
	"github.com/stretchr/testify/require"
	"golang.org/x/sys/unix"
)

const patience = 20 * time.Second

var (
	serverAddr = netip.MustParseAddr("10.77.0.9")
	// services are addresses of the server, too. An offset of the timestamps is at
	// least a pair of addresses' own, so a client that never connects to the same
	// address twice has a new clock each time with any kernel.
	services = netip.MustParsePrefix("10.8.0.0/16")
)

func service(i int) netip.AddrPort {
	return netip.AddrPortFrom(netip.AddrFrom4([4]byte{10, 8, byte(i >> 8), byte(i)}), 7000)
}

// lab is a client and a server behind the rule.
type lab struct {
	client, server *netlab.Host
	rule           *Server
	link           *wire.Wire
}

// up stands a topology up, or skips the test and says what is missing.
func up(t *testing.T, topology netlab.Topology) *netlab.Lab {
	t.Helper()
	made, err := netlab.Up(context.Background(), topology)
	if need, ok := errors.AsType[*netlab.NeedError](err); ok {
		if os.Getenv("CONNLAB_STRICT") == "1" {
			t.Fatal(need)
		}
		t.Skip(need)
	}
	require.NoError(t, err)
	t.Cleanup(func() { assert.NoError(t, made.Down()) })
	return made
}

// newLab stands a lab up. The client
// has net.ipv4.tcp_timestamps as given; the server's is 1.
func newLab(t *testing.T, timestamps string) *lab {
	t.Helper()
	rule := New()
	link := &wire.Wire{Entering: []wire.Stage{rule.Entering}, Leaving: []wire.Stage{rule.Leaving}}
	made := up(t, netlab.Topology{
		Switches: []netlab.SwitchSpec{{Name: "lan", Subnet: netip.MustParsePrefix("10.77.0.0/24")}},
		Hosts: []netlab.HostSpec{
			{
				Name:    "client",
				Links:   []netlab.LinkSpec{{Switch: "lan"}},
				Routes:  []netlab.RouteSpec{{To: services, Via: serverAddr}},
				Sysctls: map[string]string{"net.ipv4.tcp_timestamps": timestamps},
			},
			{
				Name:    "server",
				Links:   []netlab.LinkSpec{{Switch: "lan", Addrs: []netip.Addr{serverAddr}, Pump: link.Pump, AlwaysPump: true}},
				Routes:  []netlab.RouteSpec{{To: services}},
				Sysctls: map[string]string{"net.ipv4.tcp_timestamps": "1"},
			},
		},
	})
	return &lab{client: made.Host("client"), server: made.Host("server"), rule: rule, link: link}
}

// serve accepts connections on port 7000, handles one after the other, and closes
// each.
func serve(t *testing.T, host *netlab.Host, handle func(net.Conn)) {
	t.Helper()
	var listener net.Listener
	require.NoError(t, host.Do(func() (err error) {
		listener, err = net.Listen("tcp4", ":7000")
		return err
	}))
	done := make(chan struct{})
	go func() {
		defer close(done)
		for {
			conn, err := listener.Accept()
			if err != nil {
				return
			}
			_ = conn.SetDeadline(time.Now().Add(patience))
			handle(conn)
			conn.Close()
		}
	}()
	t.Cleanup(func() {
		listener.Close()
		<-done
	})
}

// hangUp, waitForEnd and echo are what a server does with a connection.
func hangUp(net.Conn) {}

func waitForEnd(conn net.Conn) { _, _ = io.Copy(io.Discard, conn) }

func echo(conn net.Conn) { _, _ = io.Copy(conn, conn) }

// connect makes a connection and ends it; false says that the rule rejected its
// SYN, after which it is given up.
func (l *lab) connect(t *testing.T, to netip.AddrPort, serverFirst bool) bool {
	t.Helper()
	before := l.rule.Stats()
	ctx, cancel := context.WithTimeout(t.Context(), patience)
	defer cancel()
	type dialled struct {
		conn net.Conn
		err  error
	}
	result := make(chan dialled, 1)
	go func() {
		conn, err := l.client.DialContext(ctx, "tcp4", to.String())
		result <- dialled{conn, err}
	}()
	tick := time.NewTicker(time.Millisecond)
	defer tick.Stop()
	for {
		select {
		case d := <-result:
			require.NoError(t, d.err)
			l.end(t, d.conn, serverFirst, before)
			return true
		case <-tick.C:
			if l.rule.Stats().Rejected > before.Rejected {
				cancel()
				require.Error(t, (<-result).err)
				return false
			}
		}
	}
}

// end sees a connection to its end, at the rule too.
func (l *lab) end(t *testing.T, conn net.Conn, serverFirst bool, before Stats) {
	t.Helper()
	if serverFirst {
		require.NoError(t, conn.SetDeadline(time.Now().Add(patience)))
		_, err := conn.Read(make([]byte, 1))
		require.ErrorIs(t, err, io.EOF)
	}
	require.NoError(t, conn.Close())
	deadline := time.Now().Add(patience)
	for {
		s := l.rule.Stats()
		if serverFirst && s.TimeWaits == before.TimeWaits+1 || !serverFirst && s.Conns == 0 {
			return
		}
		require.True(t, time.Now().Before(deadline), "the connection has not ended: %+v", s)
		time.Sleep(100 * time.Microsecond)
	}
}

// tcpExt is a counter of the host's TcpExt group in /proc/net/netstat.
func tcpExt(t *testing.T, h *netlab.Host, name string) (value int) {
	t.Helper()
	require.NoError(t, h.Do(func() error {
		b, err := os.ReadFile("/proc/thread-self/net/netstat")
		if err != nil {
			return err
		}
		var names []string
		for line := range strings.Lines(string(b)) {
			fields := strings.Fields(line)
			switch {
			case fields[0] != "TcpExt:":
			case names == nil:
				names = fields
			default:
				for i := range names {
					if names[i] == name {
						value, err = strconv.Atoi(fields[i])
						return err
					}
				}
			}
		}
		return os.ErrNotExist
	}), name)
	return value
}

// One client, one address, and a server that closes first. How many connections
// the rule lets in is decided by the clocks that the client's kernel gives them.
func TestClocksOfOneHost(t *testing.T) {
	for _, row := range []struct {
		reason      string
		timestamps  string
		serverFirst bool
		n           int
		min, max    int // rejected
		stamped     bool
	}{
		// Five standard deviations of 100 fair coins.
		{"an offset per connection: half of the circle is behind", "1", true, 100, 25, 75, true},
		{"the host's own clock for all only goes forward", "2", true, 20, 0, 0, true},
		{"no timestamps", "0", true, 20, 0, 0, false},
		{"the client closes first", "1", false, 20, 0, 0, false},
	} {
		t.Run(row.reason, func(t *testing.T) {
			l := newLab(t, row.timestamps)
			handle := waitForEnd
			if row.serverFirst {
				handle = hangUp
			}
			serve(t, l.server, handle)
			rejected := 0
			for i := range row.n {
				if !l.connect(t, service(1+i), row.serverFirst) {
					rejected++
				}
			}
			s := l.rule.Stats()
			t.Logf("%d of %d rejected; %+v", rejected, row.n, s)
			assert.GreaterOrEqual(t, rejected, row.min)
			assert.LessOrEqual(t, rejected, row.max)
			assert.EqualValues(t, row.n-rejected, s.SYNs-s.Rejected, "a SYN that passes is a connection")
			assert.GreaterOrEqual(t, s.Rejected, uint64(rejected), "more only if a pause let one be sent again")
			if row.stamped {
				assert.GreaterOrEqual(t, s.Stamps, s.TimeWaits)
				assert.Equal(t, 1, s.Peers)
			} else {
				assert.Zero(t, s.Stamps)
			}
			assert.Zero(t, s.Untracked)
			assert.Zero(t, tcpExt(t, l.server, "ListenDrops"))
		})
	}
}

// connectTimingOut is connect(2) with TCP_USER_TIMEOUT: it gives up after that and
// a retransmission.
func connectTimingOut(t *testing.T, h *netlab.Host, to netip.AddrPort, after time.Duration) error {
	t.Helper()
	fd, err := h.Socket()
	require.NoError(t, err)
	defer unix.Close(fd)
	require.NoError(t, unix.SetsockoptInt(fd, unix.IPPROTO_TCP, unix.TCP_USER_TIMEOUT, int(after.Milliseconds())))
	require.ErrorIs(t, unix.Connect(fd, &unix.SockaddrInet4{Addr: to.Addr().As4(), Port: int(to.Port())}), unix.EINPROGRESS)
	deadline := time.Now().Add(patience)
	for {
		poll := []unix.PollFd{{Fd: int32(fd), Events: unix.POLLOUT}}
		n, err := unix.Poll(poll, int(time.Until(deadline).Milliseconds()))
		if errors.Is(err, unix.EINTR) {
			continue
		}
		require.NoError(t, err)
		require.Equal(t, 1, n, "connect has not ended within %v", patience)
		errno, err := unix.GetsockoptInt(fd, unix.SOL_SOCKET, unix.SO_ERROR)
		require.NoError(t, err)
		if errno != 0 {
			return unix.Errno(errno)
		}
		return nil
	}
}

// To the client a rejected SYN is a lost one, and no counter of the server's queues
// says otherwise.
func TestRejectedSYNLooksLost(t *testing.T) {
	l := newLab(t, "1")
	serve(t, l.server, hangUp)
	require.True(t, l.connect(t, service(0), true), "the first is remembered")
	// Each has an even chance to be rejected; that none of 40 is, one in 10^12.
	for i := range 40 {
		before, resent := l.rule.Stats(), tcpExt(t, l.client, "TCPSynRetrans")
		err := connectTimingOut(t, l.client, service(1+i), 1200*time.Millisecond)
		if err == nil {
			continue
		}
		require.ErrorIs(t, err, unix.ETIMEDOUT)
		again := tcpExt(t, l.client, "TCPSynRetrans") - resent
		s := l.rule.Stats()
		for deadline := time.Now().Add(patience); s.SYNs < before.SYNs+1+uint64(again); s = l.rule.Stats() {
			require.True(t, time.Now().Before(deadline), "not all SYNs have come: %+v", s)
			time.Sleep(time.Millisecond)
		}
		t.Logf("connection %d: %d SYNs rejected, %d of them sent again", i+1, s.Rejected-before.Rejected, again)
		assert.Positive(t, again, "the client tries again")
		assert.EqualValues(t, 1+again, s.Rejected-before.Rejected, "and is rejected again")
		assert.Equal(t, s.Rejected, l.link.Stats().BtoA.Dropped, "nothing else is dropped")
		for _, name := range []string{"ListenOverflows", "ListenDrops", "TCPReqQFullDrop", "TCPReqQFullDoCookies"} {
			assert.Zero(t, tcpExt(t, l.server, name), name)
		}
		return
	}
	t.Fatal("none of 40 connections was rejected")
}
