package loadgen

import (
	"fmt"
	"net/netip"
	"os"
	"testing"
	"time"

	"github.com/stretchr/testify/assert"
	"github.com/stretchr/testify/require"
	"golang.org/x/sys/unix"
)

// client is the address from which the ports of these tests are taken. Nothing
// else on the machine has reason to use it, nor has another run of the tests.
var client = netip.AddrFrom4([4]byte{127, 77, byte(os.Getpid() >> 8), byte(os.Getpid())})

// listeners is n addresses of loopback that complete handshakes, and their
// sockets, from which nobody accepts as yet.
func listeners(t testing.TB, n int) (targets []netip.AddrPort, fds []int) {
	t.Helper()
	checkDescriptors(t)
	port := 0 // the first may choose
	for i := range n {
		fd, err := unix.Socket(unix.AF_INET, unix.SOCK_STREAM|unix.SOCK_CLOEXEC|unix.SOCK_NONBLOCK, 0)
		require.NoError(t, err)
		t.Cleanup(func() { assert.NoError(t, unix.Close(fd)) })
		require.NoError(t, unix.Bind(fd, &unix.SockaddrInet4{Port: port, Addr: [4]byte{127, 78, byte(i / 250), byte(i%250 + 1)}}))
		require.NoError(t, unix.Listen(fd, 4))
		port = int(localAddress(fd).Port())
		targets, fds = append(targets, localAddress(fd)), append(fds, fd)
	}
	return targets, fds
}

// ports opens a connection from the source to each target, all at the same time,
// and returns their local ports. They are left without TIME_WAIT.
func ports(t testing.TB, source Source, targets []netip.AddrPort) []uint16 {
	t.Helper()
	var ports []uint16
	held, report, err := Hold(t.Context(), Config{
		Targets: targets, Sources: []Source{source}, Schedule: Constant(20_000, time.Hour).First(len(targets)), ConnectOnly: true, Close: Reset,
		OnOp: func(op Op) {
			assert.Equal(t, targets[op.Index], op.Target)
			assert.Equal(t, client, op.Local.Addr())
			ports = append(ports, op.Local.Port())
		},
	})
	require.NoError(t, err)
	defer held.Close()
	require.EqualValues(t, len(targets), report.OK, "failed: %v %v", report.Failed, report.Causes)
	return ports
}

// portRange is net.ipv4.ip_local_port_range.
func portRange(t testing.TB) (low, high uint16) {
	t.Helper()
	text, err := os.ReadFile("/proc/sys/net/ipv4/ip_local_port_range")
	require.NoError(t, err)
	_, err = fmt.Sscan(string(text), &low, &high)
	require.NoError(t, err)
	require.Greater(t, int(high)-int(low), 4000, "this test wants a range of ports to choose from")
	return low, high
}

// portsOf counts ports by what they have in common.
func portsOf(ports []uint16, low uint16) (sameParity, otherParity, distinct int) {
	seen := map[uint16]bool{}
	for _, port := range ports {
		if port&1 == low&1 {
			sameParity++
		} else {
			otherParity++
		}
		seen[port] = true
	}
	return sameParity, otherParity, len(seen)
}

func TestPortsOfConnect(t *testing.T) {
	const n = 1000
	low, high := portRange(t)
	targets, _ := listeners(t, n)
	same, other, distinct := portsOf(ports(t, LocalSource("", client), targets), low)
	assert.Zero(t, other, "every second port of %d to %d", low, high)
	assert.Equal(t, n, same)
	// n(n-1)/2 pairs over 14,116 ports: 35 expected, fewer than 5 in one of 1e10 runs.
	assert.Less(t, distinct, n-4, "unique per destination only")
}

func TestPortsInRange(t *testing.T) {
	const n = 1000
	low, _ := portRange(t)
	from, to := low+1000, low+2999
	targets, _ := listeners(t, n)
	chosen := ports(t, LocalSource("", client).InRange(from, to), targets)
	for _, port := range chosen {
		require.True(t, from <= port && port <= to, "port %d is outside of %d to %d", port, from, to)
	}
	same, other, distinct := portsOf(chosen, low)
	// Each parity has its share; a fair coin is beyond 400:600 in one of 1e9 runs.
	assert.InDelta(t, n/2, same, 100, "all ports, %d of one parity and %d of the other", same, other)
	assert.Less(t, distinct, n, "unique per destination only")

	same, other, _ = portsOf(ports(t, LocalSource("", client).InRange(0, 0), targets), low)
	assert.InDelta(t, n/2, same, 100, "all ports of the namespace's range, %d of one parity and %d of the other", same, other)
}

func TestPortsOfBind(t *testing.T) {
	const n = 500
	low, high := portRange(t)
	targets, _ := listeners(t, n)
	chosen := ports(t, LocalSource("", client).Bound(netip.AddrPortFrom(client, 0)), targets)
	_, other, distinct := portsOf(chosen, low)
	assert.Equal(t, n, distinct, "unique on the host")
	assert.Equal(t, n, other, "bind leaves the ports of the low end's parity to connect")
	for _, port := range chosen {
		assert.True(t, low <= port && port <= high, "port %d is outside of %d to %d", port, low, high)
	}
}

func TestOneRangeForAllDestinationsOfBind(t *testing.T) {
	// Twenty ports, thirty destinations: connect(2) uses ports again, bind(2)
	// does not.
	low, _ := portRange(t)
	targets, _ := listeners(t, 30)
	few := LocalSource("", client).InRange(low+3000, low+3019)
	ports(t, few, targets)
	used := map[uint16]int{}
	held, report, err := Hold(t.Context(), Config{
		Targets: targets, Sources: []Source{few.Bound(netip.AddrPortFrom(client, 0))}, Schedule: Burst(len(targets), 0), ConnectOnly: true, Close: Reset,
		OnOp: func(op Op) {
			if op.Class == OK {
				used[op.Local.Port()]++
			}
		},
	})
	require.NoError(t, err)
	defer held.Close()
	// Others of the machine may have some of the twenty.
	assert.LessOrEqual(t, report.OK, int64(20))
	assert.Len(t, used, int(report.OK), "each port once")
	assert.Equal(t, Counts{NoLocalPort: 30 - report.OK}, report.Failed)
	assert.Positive(t, report.OK)
}

func TestOnePortForAllDestinations(t *testing.T) {
	low, _ := portRange(t)
	local := netip.AddrPortFrom(client, low-1)
	targets, _ := listeners(t, 20)
	for _, port := range ports(t, LocalSource("", client).Bound(local), targets) {
		assert.Equal(t, local.Port(), port)
	}
	report := load(t, Config{
		Targets: targets[:1], Sources: []Source{LocalSource("", netip.Addr{}).Bound(local)}, Schedule: Burst(3, 0), ReplyTimeout: 50 * ms, Close: Reset,
	})
	assert.Equal(t, Counts{ReadTimeout: 1, NoLocalPort: 2}, report.Failed, "once per destination")
}

func TestASocketIsNotLeftBehind(t *testing.T) {
	checkDescriptors(t)
	local := LocalSource("host", netip.Addr{})
	for _, test := range []struct {
		why    string
		source Source
		want   error
	}{
		{"not an address of this host", local.Bound(netip.MustParseAddrPort("192.0.2.1:0")), unix.EADDRNOTAVAIL},
		{"IPv6", local.Bound(netip.MustParseAddrPort("[::1]:0")), unix.EAFNOSUPPORT},
		{"a range that ends before it begins", local.InRange(40_001, 40_000), unix.EINVAL},
		{"the source's own error", LocalSource("host", netip.MustParseAddr("::1")).Bound(netip.AddrPort{}), unix.EAFNOSUPPORT},
	} {
		fd, err := test.source.Socket()
		assert.ErrorIs(t, err, test.want, test.why)
		assert.Equal(t, -1, fd, test.why)
		assert.Equal(t, "host", test.source.Name)
	}
	_, port := boundSocket(t)
	_, err := local.Bound(port).Socket()
	require.ErrorIs(t, err, unix.EADDRINUSE, "held by a socket without SO_REUSEADDR")
	assert.Equal(t, NoLocalPort, classify(opening, err))
}
