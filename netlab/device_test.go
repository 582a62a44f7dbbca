package netlab

import (
	"context"
	"encoding/binary"
	"errors"
	"fmt"
	"net"
	"net/netip"
	"os"
	"sync/atomic"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"
	"github.com/stretchr/testify/assert"
	"github.com/stretchr/testify/require"
	"go.uber.org/goleak"
	"golang.org/x/sys/unix"
)

// Offsets in an Ethernet frame with an IPv4 header without options.
const (
	offType     = 12
	offProtocol = 14 + 9
	offSource   = 14 + 12
	offTo       = 14 + 16
	offPorts    = 14 + 20
)

// perFrame is a device that gives each frame to a function, on one goroutine,
// and sends it back into the switch when that says so.
func perFrame(fn func(at Port, frame []byte) bool) Attach {
	return func(port *os.File, at Port) (func() error, error) {
		ended := make(chan error, 1)
		go func() {
			buf := make([]byte, 2048)
			for {
				n, err := port.Read(buf)
				if errors.Is(err, os.ErrDeadlineExceeded) {
					ended <- nil
					return
				}
				if err == nil && fn(at, buf[:n]) {
					_, err = port.Write(buf[:n])
				}
				if err != nil {
					ended <- err
					return
				}
			}
		}()
		return func() error { return errors.Join(port.SetReadDeadline(time.Unix(1, 0)), <-ended) }, nil
	}
}

func swap(a, b []byte) {
	for i := range a {
		a[i], b[i] = b[i], a[i]
	}
}

// A device that sends every datagram back where it came from: what is swapped
// leaves both checksums right.
func TestDeviceReflects(t *testing.T) {
	var got Port
	var strange atomic.Uint64 // frames that are not what the client sent
	reflect := perFrame(func(p Port, f []byte) bool {
		if binary.BigEndian.Uint16(f[offType:]) != unix.ETH_P_IP || f[offProtocol] != unix.IPPROTO_UDP || net.HardwareAddr(f[:6]).String() != p.MAC.String() {
			strange.Add(1)
			return false
		}
		swap(f[0:6], f[6:12])
		swap(f[offSource:offTo], f[offTo:offPorts])
		swap(f[offPorts:offPorts+2], f[offPorts+2:offPorts+4])
		return true
	})
	attach := func(port *os.File, place Port) (func() error, error) {
		got = place
		return reflect(port, place)
	}
	vips := netip.MustParsePrefix("10.8.0.0/16")
	client := host("client", at())
	client.Routes = []RouteSpec{{To: vips, Via: addr("10.66.0.9")}}
	lab := up(t, Topology{
		Switches: lan,
		Hosts:    []HostSpec{client, host("bystander", LinkSpec{Switch: "lan", Addrs: []netip.Addr{addr("10.66.1.1"), addr("10.66.1.2")}})},
		Devices:  []DeviceSpec{{Name: "mirror", Switch: "lan", Addrs: []netip.Addr{addr("10.66.0.9"), addr("10.66.0.10")}, Attach: attach}, dev("other", "10.66.0.20")},
	})
	want := Port{
		Addrs: []netip.Addr{addr("10.66.0.9"), addr("10.66.0.10")},
		MAC:   mac(addr("10.66.0.9")),
		MTU:   1500,
		Neighbour: map[netip.Addr]net.HardwareAddr{
			addr("10.66.0.1"):  mac(addr("10.66.0.1")),
			addr("10.66.1.1"):  mac(addr("10.66.1.1")),
			addr("10.66.1.2"):  mac(addr("10.66.1.1")),
			addr("10.66.0.20"): mac(addr("10.66.0.20")),
		},
	}
	assert.Empty(t, cmp.Diff(want, got, cmp.Comparer(func(a, b netip.Addr) bool { return a == b })))

	for _, to := range []string{"10.8.1.2:53", "10.8.255.255:53", "10.66.0.9:53", "10.66.0.10:53"} {
		var conn *net.UDPConn
		require.NoError(t, lab.Host("client").Do(func() (err error) {
			conn, err = net.DialUDP("udp4", nil, net.UDPAddrFromAddrPort(netip.MustParseAddrPort(to)))
			return err
		}))
		require.NoError(t, conn.SetDeadline(time.Now().Add(10*time.Second)))
		for i := range 100 {
			sent := fmt.Sprintf("datagram %d to %s", i, to)
			_, err := conn.Write([]byte(sent))
			require.NoError(t, err)
			back := make([]byte, 100)
			n, err := conn.Read(back)
			require.NoError(t, err, "it comes back from %s: the socket is connected to it", to)
			require.Equal(t, sent, string(back[:n]))
		}
		require.NoError(t, conn.Close())
	}
	assert.Zero(t, strange.Load(), "nobody asks with ARP, and no frame of others is flooded to the device")
	received, _ := traffic(t, lab.Host("bystander"))
	assert.Zero(t, received, "nor to a host")
}

// A balancer with direct return needs no more than this: the device hands the
// client's packets on to a host that has all virtual addresses for its own, and
// the host answers past the device.
func TestDeviceForwardsToAHostWithLocalRoute(t *testing.T) {
	vips := netip.MustParsePrefix("10.8.0.0/16")
	var forwarded atomic.Uint64
	forward := perFrame(func(p Port, f []byte) bool {
		copy(f[0:6], p.Neighbour[addr("10.66.0.2")])
		copy(f[6:12], p.MAC)
		forwarded.Add(1)
		return true
	})
	client, server := host("client", at()), host("server", at())
	client.Routes = []RouteSpec{{To: vips, Via: addr("10.66.0.3")}}
	server.Routes = []RouteSpec{{To: vips}}
	lab := up(t, Topology{Switches: lan, Hosts: []HostSpec{client, server}, Devices: []DeviceSpec{{Name: "balancer", Switch: "lan", Attach: forward}}})
	accepted := acceptAt(t, lab.Host("server"))
	ctx, cancel := context.WithTimeout(t.Context(), 10*time.Second)
	defer cancel()
	for _, to := range []string{"10.8.0.0:7000", "10.8.1.2:7000", "10.8.255.255:7000"} {
		conn, err := lab.Host("client").DialContext(ctx, "tcp", to)
		require.NoError(t, err)
		assert.Equal(t, to, <-accepted, "the server's socket has the virtual address")
		require.NoError(t, conn.SetDeadline(time.Now().Add(10*time.Second)))
		n, err := conn.Read(make([]byte, 100))
		require.NoError(t, err)
		assert.Equal(t, len(to), n)
		require.NoError(t, conn.Close())
	}
	// All that the client sends comes by the device, and nothing that the server sends.
	await(t, "the client's packets", func() (bool, any) {
		_, sent := traffic(t, lab.Host("client"))
		n := int(forwarded.Load())
		return n == sent, fmt.Sprintf("%d forwarded of %d sent", n, sent)
	})
}

// acceptAt accepts on port 7000, writes to each connection the address that the
// server's end of it has, closes it and reports the address.
func acceptAt(t *testing.T, h *Host) <-chan string {
	t.Helper()
	var l net.Listener
	require.NoError(t, h.Do(func() (err error) {
		l, err = net.Listen("tcp4", ":7000")
		return err
	}))
	t.Cleanup(func() { l.Close() })
	local := make(chan string, 100)
	go func() {
		for {
			conn, err := l.Accept()
			if err != nil {
				return // closed
			}
			_, _ = conn.Write([]byte(conn.LocalAddr().String()))
			conn.Close()
			local <- conn.LocalAddr().String()
		}
	}()
	return local
}

// A local route without a device: the kernel's own AnyIP, reached by way of the
// host that has it.
func TestLocalRoute(t *testing.T) {
	all := netip.MustParsePrefix("10.9.0.0/16")
	client, many := host("client", at()), host("many", at())
	client.Routes = []RouteSpec{{To: all, Via: addr("10.66.0.2")}}
	many.Routes = []RouteSpec{{To: all}}
	lab := up(t, Topology{Switches: lan, Hosts: []HostSpec{client, many, host("stranger", at())}})
	accepted := acceptAt(t, lab.Host("many"))
	ctx, cancel := context.WithTimeout(t.Context(), 10*time.Second)
	defer cancel()
	for _, to := range []string{"10.9.0.0:7000", "10.9.1.2:7000", "10.9.255.255:7000", "10.66.0.2:7000"} {
		for _, from := range []string{"client", "many"} {
			conn, err := lab.Host(from).DialContext(ctx, "tcp", to)
			require.NoError(t, err, "%s to %s", from, to)
			assert.Equal(t, to, <-accepted)
			require.NoError(t, conn.Close())
		}
	}
	_, err := lab.Host("stranger").DialContext(ctx, "tcp", "10.9.1.2:7000")
	require.ErrorIs(t, err, unix.ENETUNREACH, "a host without the route")
	_, err = lab.Host("client").DialContext(ctx, "tcp", "10.10.0.1:7000")
	assert.ErrorIs(t, err, unix.ENETUNREACH, "beyond the prefix")

	fd, err := lab.Host("many").Socket()
	require.NoError(t, err)
	defer unix.Close(fd)
	assert.NoError(t, unix.Bind(fd, &unix.SockaddrInet4{Addr: addr("10.9.3.4").As4()}), "each address can be bound")
}

// What an Attach has been given stays its own until its stop returns, and is
// closed then; an Attach that fails takes the lab down with it.
func TestDeviceLifecycle(t *testing.T) {
	requireLab(t, CheckPrivilege())
	defer goleak.VerifyNone(t, goleak.IgnoreCurrent())
	var ports []*os.File
	var stopped []string
	attach := func(name string, failure, stopFailure error) DeviceSpec {
		return DeviceSpec{Name: name, Switch: "lan", Attach: func(port *os.File, _ Port) (func() error, error) {
			ports = append(ports, port)
			return func() error {
				stopped = append(stopped, name)
				assert.NoError(t, port.SetDeadline(time.Now()), "the port is open when its device stops")
				return stopFailure
			}, failure
		}}
	}
	broken, jammed := errors.New("broken"), errors.New("jammed")
	for _, row := range []struct {
		reason  string
		devices []DeviceSpec
		up      error
		down    string
		stopped []string
	}{
		{"two run", []DeviceSpec{attach("one", nil, nil), attach("two", nil, nil)}, nil, "", []string{"two", "one"}},
		{"the second fails", []DeviceSpec{attach("one", nil, nil), attach("two", broken, nil)}, broken, "", []string{"one"}},
		{"one had ended by itself", []DeviceSpec{attach("one", nil, jammed), attach("two", nil, nil)}, nil, "device one: jammed", []string{"two", "one"}},
	} {
		t.Run(row.reason, func(t *testing.T) {
			ports, stopped = nil, nil
			lab, err := Up(t.Context(), Topology{Switches: lan, Hosts: []HostSpec{host("a", at())}, Devices: row.devices})
			if row.up != nil {
				assert.Nil(t, lab)
				require.ErrorIs(t, err, row.up)
				assert.EqualError(t, err, "device two: attach: broken")
			} else {
				require.NoError(t, err)
				if err := lab.Down(); row.down == "" {
					assert.NoError(t, err)
				} else {
					assert.EqualError(t, err, row.down)
				}
			}
			assert.Equal(t, row.stopped, stopped)
			for _, p := range ports {
				assert.ErrorIs(t, p.Close(), os.ErrClosed)
			}
		})
	}
}
