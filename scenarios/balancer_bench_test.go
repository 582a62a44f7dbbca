package scenarios

import (
	"context"
	"errors"
	"fmt"
	"io"
	"net"
	"net/netip"
	"slices"
	"testing"
	"time"

	"github.com/gopacket/gopacket"
	"github.com/gopacket/gopacket/layers"
	"github.com/stretchr/testify/require"
	"golang.org/x/sys/unix"

	"connlab/netlab"
	"connlab/netlab/l4lb"
	"connlab/netlab/observe"
	"connlab/netlab/wire"
)

// benchNet is a client, a server that has the VIPs or stands behind them, and
// between their two links either the balancer or a kernel that forwards.
type benchNet struct {
	name           string
	client, server *netlab.Host
	to             netip.AddrPort
	gateway        netip.Addr
	balancer       *l4lb.Balancer
}

var benchServer = netip.MustParseAddr("10.0.0.3")

// upBench builds one. The two links are the same on either side: the client's a
// veth; the server's a veth too or, for whole connections, a pumped link, which the
// balancer's return path needs.
func upBench(b *testing.B, balanced, pumped bool) *benchNet {
	b.Helper()
	n := &benchNet{name: "kernel", to: netip.AddrPortFrom(vip(0), redisPort), gateway: balancerAddr}
	server := &wire.Wire{}
	t := netlab.Topology{
		Switches: []netlab.SwitchSpec{{Name: lanName, Subnet: collisionLAN}},
		Hosts: []netlab.HostSpec{
			{Name: "client", Links: []netlab.LinkSpec{{Switch: lanName}}, Routes: []netlab.RouteSpec{{To: vipPrefix, Via: balancerAddr}}},
			{Name: "server", Links: []netlab.LinkSpec{{Switch: lanName, Addrs: []netip.Addr{benchServer}, Pump: server.Pump, AlwaysPump: pumped}}},
		},
	}
	if balanced {
		n.name = "balancer"
		var err error
		n.balancer, err = l4lb.New(l4lb.Config{Services: map[netip.AddrPort]l4lb.Group{n.to: {netip.AddrPortFrom(benchServer, redisPort)}}})
		require.NoError(b, err)
		back := l4lb.NewReturn(l4lb.FirstVIP, l4lb.KindTOAVIP)
		server.Leaving, server.Entering = []wire.Stage{back.Leaving}, []wire.Stage{back.Entering}
		device := &wire.Wire{Entering: []wire.Stage{n.balancer.Stage}}
		t.Devices = []netlab.DeviceSpec{{Name: "balancer", Switch: lanName, Addrs: []netip.Addr{balancerAddr}, Attach: device.Attach}}
	} else {
		// A router with one arm, and a server that has the VIPs itself: replies go
		// straight to the client here as well.
		t.Hosts = append(t.Hosts, netlab.HostSpec{
			Name: "router", Links: []netlab.LinkSpec{{Switch: lanName, Addrs: []netip.Addr{balancerAddr}}},
			Routes:  []netlab.RouteSpec{{To: vipPrefix, Via: benchServer}},
			Sysctls: map[string]string{"net.ipv4.ip_forward": "1", "net.ipv4.conf.all.send_redirects": "0", "net.ipv4.conf.default.send_redirects": "0"},
		})
		t.Hosts[1].Routes = []netlab.RouteSpec{{To: vipPrefix}}
	}
	lab, err := netlab.Up(context.Background(), t)
	if need, is := errors.AsType[*netlab.NeedError](err); is {
		b.Skip(need)
	}
	require.NoError(b, err)
	b.Cleanup(func() { require.NoError(b, lab.Down()) })
	n.client, n.server = lab.Host("client"), lab.Host("server")
	return n
}

// BenchmarkBalancerBesideKernel prints ratios: the balancer in user space beside
// plain kernel forwarding, in one run. It fails below 100,000 packets a second.
func BenchmarkBalancerBesideKernel(b *testing.B) {
	if err := netlab.CheckPrivilege(); err != nil {
		b.Skip(err)
	}
	forwarding := []*benchNet{upBench(b, false, false), upBench(b, true, false)}
	whole := []*benchNet{upBench(b, false, true), upBench(b, true, true)}
	const rounds = 5
	measure := func(what string, nets []*benchNet, of func(*testing.B, *benchNet) float64) (kernel, balancer float64) {
		var values [2][]float64
		for range rounds { // interleaved
			for i, n := range nets {
				values[i] = append(values[i], of(b, n))
			}
		}
		for i := range values {
			slices.Sort(values[i])
		}
		kernel, balancer = values[0][rounds/2], values[1][rounds/2]
		b.Logf("%-22s kernel %12.6g   balancer %12.6g   ratio %.3f", what, kernel, balancer, balancer/kernel)
		return kernel, balancer
	}
	for b.Loop() {
		kernel, balancer := measure("SYNs/s", forwarding, synRate)
		b.ReportMetric(balancer, "balancer-SYNs/s")
		b.ReportMetric(balancer/kernel, "SYN-rate-ratio")
		if balancer < 100_000 {
			b.Errorf("the balancer passed %.0f packets/s, want 100,000", balancer)
		}
		kernel, balancer = measure("bulk, MB/s", whole, bulk)
		b.ReportMetric(balancer/kernel, "bulk-ratio")
		for _, q := range []float64{0.5, 0.99} {
			kernel, balancer = measure(fmt.Sprintf("round trip p%.0f, µs", 100*q), whole, func(b *testing.B, n *benchNet) float64 { return roundTrip(b, n, q) })
			b.ReportMetric(balancer-kernel, fmt.Sprintf("added-µs-p%.0f", 100*q))
		}
	}
}

// synRate floods SYNs from the client for a second, and counts those that reach
// the server's listener: its accept queue is full, so that it answers none.
func synRate(b *testing.B, n *benchNet) float64 {
	var fd, one int
	require.NoError(b, n.server.Do(func() (err error) {
		if fd, err = unix.Socket(unix.AF_INET, unix.SOCK_STREAM|unix.SOCK_CLOEXEC, 0); err != nil {
			return err
		}
		if err := unix.SetsockoptInt(fd, unix.SOL_SOCKET, unix.SO_REUSEADDR, 1); err != nil {
			return err
		}
		if err := unix.Bind(fd, &unix.SockaddrInet4{Port: redisPort}); err != nil {
			return err
		}
		return unix.Listen(fd, 0)
	}))
	defer unix.Close(fd)
	full, err := n.server.DialContext(b.Context(), "tcp", fmt.Sprintf("%v:%d", benchServer, redisPort))
	require.NoError(b, err)
	defer full.Close()

	require.NoError(b, n.client.Do(func() (err error) {
		one, err = unix.Socket(unix.AF_PACKET, unix.SOCK_RAW|unix.SOCK_CLOEXEC, 0)
		return err
	}))
	defer unix.Close(one)
	var index int
	var mac net.HardwareAddr
	require.NoError(b, n.client.Do(func() error {
		i, err := net.InterfaceByName("eth0")
		if err == nil {
			index, mac = i.Index, i.HardwareAddr
		}
		return err
	}))
	gateway := n.gatewayMAC()
	frames := synFrames(b, mac, gateway, n.client.Addr(), n.to, 1024)
	before, err := observe.ReadCounters(n.server)
	require.NoError(b, err)
	began := time.Now()
	to := &unix.SockaddrLinklayer{Ifindex: index, Halen: 6}
	for i := 0; time.Since(began) < time.Second; i++ {
		err := unix.Sendto(one, frames[i%len(frames)], 0, to)
		if err != nil && !errors.Is(err, unix.ENOBUFS) && !errors.Is(err, unix.EINTR) {
			require.NoError(b, err)
		}
	}
	after, err := observe.ReadCounters(n.server)
	require.NoError(b, err)
	return float64(after.Sub(before)["TcpExt.ListenOverflows"]) / time.Since(began).Seconds()
}

// gatewayMAC is the gateway's, as netlab derives it from the address.
func (n *benchNet) gatewayMAC() net.HardwareAddr {
	a := n.gateway.As4()
	return net.HardwareAddr{0x02, 0x00, a[0], a[1], a[2], a[3]}
}

func synFrames(b *testing.B, from, to net.HardwareAddr, source netip.Addr, target netip.AddrPort, n int) [][]byte {
	frames := make([][]byte, n)
	for i := range frames {
		eth := &layers.Ethernet{SrcMAC: from, DstMAC: to, EthernetType: layers.EthernetTypeIPv4}
		ip := &layers.IPv4{Version: 4, TTL: 64, Protocol: layers.IPProtocolTCP, SrcIP: source.AsSlice(), DstIP: target.Addr().AsSlice()}
		tcp := &layers.TCP{SrcPort: layers.TCPPort(20000 + i), DstPort: layers.TCPPort(target.Port()), SYN: true, Seq: uint32(i), Window: 64240,
			Options: []layers.TCPOption{{OptionType: layers.TCPOptionKindMSS, OptionLength: 4, OptionData: []byte{5, 180}}}}
		require.NoError(b, tcp.SetNetworkLayerForChecksum(ip))
		buf := gopacket.NewSerializeBuffer()
		require.NoError(b, gopacket.SerializeLayers(buf, gopacket.SerializeOptions{FixLengths: true, ComputeChecksums: true}, eth, ip, tcp))
		frames[i] = buf.Bytes()
	}
	return frames
}

// listen is a listener on the server that hands each connection to serve.
func (n *benchNet) listen(b *testing.B, serve func(net.Conn)) (stop func()) {
	var l net.Listener
	require.NoError(b, n.server.Do(func() (err error) {
		l, err = net.Listen("tcp4", fmt.Sprintf(":%d", redisPort))
		return err
	}))
	go func() {
		for {
			conn, err := l.Accept()
			if err != nil {
				return
			}
			go serve(conn)
		}
	}()
	return func() { l.Close() }
}

// bulk is how many megabytes a second one connection carries to the server.
func bulk(b *testing.B, n *benchNet) float64 {
	const size = 256 << 20
	received := make(chan int64, 1)
	stop := n.listen(b, func(c net.Conn) {
		got, _ := io.Copy(io.Discard, c)
		received <- got
		c.Close()
	})
	defer stop()
	conn, err := n.client.DialContext(b.Context(), "tcp", n.to.String())
	require.NoError(b, err)
	began := time.Now()
	block := make([]byte, 1<<20)
	for range size / len(block) {
		_, err := conn.Write(block)
		require.NoError(b, err)
	}
	require.NoError(b, conn.Close())
	require.EqualValues(b, size, <-received)
	return size / 1e6 / time.Since(began).Seconds()
}

// roundTrip is a quantile of the time that one byte takes there and back, in µs.
func roundTrip(b *testing.B, n *benchNet, q float64) float64 {
	stop := n.listen(b, func(c net.Conn) {
		_, _ = io.Copy(c, c)
		c.Close()
	})
	defer stop()
	conn, err := n.client.DialContext(b.Context(), "tcp", n.to.String())
	require.NoError(b, err)
	defer conn.Close()
	const trips = 5000
	times := make([]time.Duration, trips)
	var one [1]byte
	for i := range times {
		began := time.Now()
		_, err := conn.Write(one[:])
		require.NoError(b, err)
		_, err = io.ReadFull(conn, one[:])
		require.NoError(b, err)
		times[i] = time.Since(began)
	}
	slices.Sort(times)
	return float64(times[int(q*(trips-1))].Nanoseconds()) / 1e3
}
