package wire

import (
	"bytes"
	"context"
	"crypto/sha256"
	"errors"
	"io"
	"math/rand/v2"
	"net"
	"net/netip"
	"os"
	"runtime"
	"testing"
	"time"

	"connlab/netlab"

	"github.com/stretchr/testify/assert"
	"github.com/stretchr/testify/require"
	"golang.org/x/sys/unix"
)

// up is a lab, or a skip that says what is missing.
func up(t testing.TB, topology netlab.Topology) *netlab.Lab {
	t.Helper()
	lab, err := netlab.Up(context.Background(), topology)
	if need, ok := errors.AsType[*netlab.NeedError](err); ok {
		if os.Getenv("CONNLAB_STRICT") == "1" {
			t.Fatal(need)
		}
		t.Skip(need)
	}
	require.NoError(t, err)
	t.Cleanup(func() { assert.NoError(t, lab.Down()) })
	return lab
}

var lan = []netlab.SwitchSpec{{Name: "lan", Subnet: netip.MustParsePrefix("10.77.0.0/24")}}

// pumpedLab is a client and a server on one switch; the server's link is w.
func pumpedLab(t testing.TB, w *Wire, link netlab.LinkSpec) (client, server *netlab.Host) {
	t.Helper()
	link.Switch, link.Pump, link.AlwaysPump = "lan", w.Pump, true
	lab := up(t, netlab.Topology{
		Switches: lan,
		Hosts: []netlab.HostSpec{
			{Name: "client", Links: []netlab.LinkSpec{{Switch: "lan"}}},
			{Name: "server", Links: []netlab.LinkSpec{link}},
		},
	})
	require.Equal(t, netlab.LinkPump, lab.Host("server").LinkKind())
	return lab.Host("client"), lab.Host("server")
}

func listen(t testing.TB, h *netlab.Host) net.Listener {
	t.Helper()
	var l net.Listener
	require.NoError(t, h.Do(func() (err error) {
		l, err = net.Listen("tcp4", ":7000")
		return err
	}))
	t.Cleanup(func() { l.Close() })
	return l
}

func TestTCPOverDelayedLink(t *testing.T) {
	const delay = 5 * time.Millisecond
	var w Wire
	client, server := pumpedLab(t, &w, netlab.LinkSpec{Delay: delay})
	l := listen(t, server)

	const size = 10 << 20
	type echo struct {
		sum [sha256.Size]byte
		err error
	}
	echoed := make(chan echo, 1)
	go func() {
		conn, err := l.Accept()
		if err != nil {
			echoed <- echo{err: err}
			return
		}
		defer conn.Close()
		data, err := io.ReadAll(io.LimitReader(conn, size))
		if err == nil {
			_, err = conn.Write(data)
		}
		echoed <- echo{sha256.Sum256(data), err}
	}()

	begin := time.Now()
	conn, err := client.DialContext(t.Context(), "tcp", server.Addr().String()+":7000")
	took := time.Since(begin)
	require.NoError(t, err)
	defer conn.Close()
	t.Logf("connected after %v", took)
	assert.GreaterOrEqual(t, took, 2*delay, "SYN and SYN-ACK cross the wire once each")
	assert.Less(t, took, time.Second, "no SYN was retransmitted")

	data := make([]byte, size)
	chacha := rand.NewChaCha8([32]byte{1})
	_, _ = chacha.Read(data)
	sent := make(chan error, 1)
	go func() {
		_, err := conn.Write(data)
		sent <- err
	}()
	back, err := io.ReadAll(conn)
	require.NoError(t, err)
	require.NoError(t, <-sent)
	e := <-echoed
	require.NoError(t, e.err)
	assert.Equal(t, sha256.Sum256(data), e.sum, "what the server got")
	assert.True(t, bytes.Equal(data, back), "what came back")

	s := w.Stats()
	t.Logf("%+v", s)
	for _, c := range []Counts{s.AtoB, s.BtoA} {
		assert.Greater(t, c.Forwarded, uint64(size/1500), "10 MiB in frames of a 1,500-byte MTU")
		assert.Zero(t, c.Overflowed+c.Lost+c.Refused)
	}
}

// udpPair is a socket of the client and the address of a socket of the server:
// a port without one would be answered by ICMP.
func udpPair(t testing.TB, client, server *netlab.Host) (source int, to unix.Sockaddr) {
	t.Helper()
	open := func(h *netlab.Host) (fd int) {
		require.NoError(t, h.Do(func() (err error) {
			fd, err = unix.Socket(unix.AF_INET, unix.SOCK_DGRAM|unix.SOCK_CLOEXEC, 0)
			return err
		}))
		t.Cleanup(func() { unix.Close(fd) })
		return fd
	}
	require.NoError(t, unix.Bind(open(server), &unix.SockaddrInet4{Port: 9000}))
	return open(client), &unix.SockaddrInet4{Addr: server.Addr().As4(), Port: 9000}
}

// A TAP device drops what its reader has not taken in time, and no counter of
// the wire shows it; the queue that netlab gives it must hold a burst.
func TestBurstReachesTheWire(t *testing.T) {
	const n = 5000
	var w Wire
	client, server := pumpedLab(t, &w, netlab.LinkSpec{Delay: time.Millisecond})
	source, to := udpPair(t, client, server)
	for range n {
		require.NoError(t, unix.Sendto(source, make([]byte, 18), 0, to))
	}
	await(t, func() (bool, any) { c := w.Stats().BtoA; return c.Forwarded == n, c })
	assert.Equal(t, Counts{Received: n, Forwarded: n}, w.Stats().BtoA)
}

// BenchmarkLab is small UDP datagrams from the client through switch and wire to
// the server, as fast as they are taken.
func BenchmarkLab(b *testing.B) {
	var w Wire
	client, server := pumpedLab(b, &w, netlab.LinkSpec{})
	source, to := udpPair(b, client, server)
	datagram := make([]byte, 18)
	arrived := func() uint64 { return w.Stats().BtoA.Forwarded }
	base := arrived()
	b.ResetTimer()
	for i := range b.N {
		// A window below the TAP device's queue, so that none is dropped before the wire.
		for uint64(i)-(arrived()-base) > 256 {
			runtime.Gosched()
		}
		if err := unix.Sendto(source, datagram, 0, to); err != nil {
			b.Fatal(err)
		}
	}
	await(b, func() (bool, any) { n := arrived() - base; return n >= uint64(b.N), n })
	b.ReportMetric(float64(b.N)/b.Elapsed().Seconds(), "frames/s")
}
