package scenarios

import (
	"context"
	"errors"
	"fmt"
	"io"
	"net"
	"net/netip"
	"runtime"
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
}

var benchServer = netip.MustParseAddr("10.0.0.3")

// upBench builds one. The client's link is a veth; the server's a veth too or, for
// whole connections, a pumped link, which the balancer's return path needs.
func upBench(b *testing.B, name string, balanced, pumped bool) *benchNet {
	b.Helper()
	n := &benchNet{name: name, to: netip.AddrPortFrom(vip(0), redisPort), gateway: balancerAddr}
	server := &wire.Wire{}
	t := netlab.Topology{
		Switches: []netlab.SwitchSpec{{Name: lanName, Subnet: collisionLAN}},
		Hosts: []netlab.HostSpec{
			{Name: "client", Links: []netlab.LinkSpec{{Switch: lanName}}, Routes: []netlab.RouteSpec{{To: vipPrefix, Via: balancerAddr}}},
			{Name: "server", Links: []netlab.LinkSpec{{Switch: lanName, Addrs: []netip.Addr{benchServer}, Pump: server.Pump, AlwaysPump: pumped}}},
		},
	}
	if balanced {
		balancer, err := l4lb.New(l4lb.Config{Services: map[netip.AddrPort]l4lb.Group{n.to: {netip.AddrPortFrom(benchServer, redisPort)}}})
		require.NoError(b, err)
		back := l4lb.NewReturn(l4lb.FirstVIP, l4lb.KindTOAVIP)
		server.Leaving, server.Entering = []wire.Stage{back.Leaving}, []wire.Stage{back.Entering}
		device := &wire.Wire{Entering: []wire.Stage{balancer.Stage}}
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

// BenchmarkBalancerBesideKernel prints the balancer in user space beside a kernel
// that forwards, in one run. It fails below 100,000 packets a second.
//
// A flood of SYNs goes over veth links on both sides: what differs is the forwarder.
// Kernel forwarding has no thread: the sender's own system call carries a packet
// through the switch and the router into the server's stack, so that all of it is on
// one core. Behind the balancer the sender's call ends at the balancer's device; the
// balancer has a thread, and with it a core of its own for the rest of the way. Rates
// compare the two ways to have it done, CPU times what it costs.
//
// Whole connections need the balancer's return path, a pumped link at the server. The
// kernel forwards both with the same link ("pumped") and with a veth ("bare"): the
// ratio to pumped is the balancer alone, the ratio to bare the whole path in user
// space, in which the bare side also has segments of up to 64 KiB (TSO) and a pumped
// link none above 1,514 bytes.
func BenchmarkBalancerBesideKernel(b *testing.B) {
	if err := netlab.CheckPrivilege(); err != nil {
		b.Skip(err)
	}
	bare := upBench(b, "bare kernel", false, false)
	flooded := []*benchNet{bare, upBench(b, "balancer", true, false)}
	whole := []*benchNet{bare, upBench(b, "pumped kernel", false, true), upBench(b, "balancer", true, true)}
	for b.Loop() {
		floods := medians(b, flooded, floodSYNs, "SYNs sent/s", "SYNs arrived/s", "sender's CPU, µs/sent", "others' CPU, µs/arrived")
		kernel, balancer := floods[0][1], floods[1][1]
		b.ReportMetric(floods[1][0], "sent-SYNs/s")
		b.ReportMetric(balancer, "balancer-SYNs/s")
		b.ReportMetric(balancer/kernel, "SYN-rate-ratio")
		b.ReportMetric(floods[1][3], "balancer-µs/SYN")
		if balancer < 100_000 {
			b.Errorf("the balancer passed %.0f packets/s, want 100,000", balancer)
		}
		rates := medians(b, whole, bulk, "bulk, MB/s")
		b.ReportMetric(rates[2][0]/rates[0][0], "bulk-ratio-to-bare")
		b.ReportMetric(rates[2][0]/rates[1][0], "bulk-ratio-to-pumped")
		times := medians(b, whole, roundTrips, "round trip p50, µs", "round trip p99, µs")
		for i, q := range []string{"p50", "p99"} {
			b.ReportMetric(times[2][i]-times[0][i], "added-to-bare-µs-"+q)
			b.ReportMetric(times[2][i]-times[1][i], "added-to-pumped-µs-"+q)
		}
	}
}

// medians measures each net five times, in turn, and prints and returns the medians
// of what was measured: by net, then by quantity. The last net is the balancer's;
// ratios are the balancer's value to the others'.
func medians(b *testing.B, nets []*benchNet, measure func(*testing.B, *benchNet) []float64, quantities ...string) [][]float64 {
	const rounds = 5
	values := make([][][]float64, len(nets)) // by net, quantity, round
	for i := range values {
		values[i] = make([][]float64, len(quantities))
	}
	for range rounds {
		for i, n := range nets {
			for q, value := range measure(b, n) {
				values[i][q] = append(values[i][q], value)
			}
		}
	}
	median := make([][]float64, len(nets))
	for i := range nets {
		for _, v := range values[i] {
			slices.Sort(v)
			median[i] = append(median[i], v[rounds/2])
		}
	}
	last := len(nets) - 1
	for q, quantity := range quantities {
		line := fmt.Sprintf("%-23s", quantity)
		for i, n := range nets {
			line += fmt.Sprintf("   %s %10.6g", n.name, median[i][q])
			if i < last {
				line += fmt.Sprintf(" (ratio %.3f)", median[last][q]/median[i][q])
			}
		}
		b.Log(line)
	}
	return median
}

// floodSYNs sends SYNs from the client for a second, and counts those that reach
// the server's listener: its accept queue is full, so that it answers none. It returns
// how many per second were sent and arrived; the CPU time of the sender's thread for
// each that was sent; and that of all other threads of this process for each that
// arrived: the balancer's, beside a little of Go's runtime, which is all there is
// without a balancer. Work that the kernel gives to ksoftirqd is in neither.
func floodSYNs(b *testing.B, n *benchNet) []float64 {
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
	runtime.LockOSThread() // RUSAGE_THREAD is the sender's
	defer runtime.UnlockOSThread()
	before := overflows(b, n)
	sender, process := cpuTime(b, unix.RUSAGE_THREAD), cpuTime(b, unix.RUSAGE_SELF)
	began := time.Now()
	to := &unix.SockaddrLinklayer{Ifindex: index, Halen: 6}
	sent := 0
	for i := 0; time.Since(began) < time.Second; i++ {
		err := unix.Sendto(one, frames[i%len(frames)], 0, to)
		switch {
		case err == nil:
			sent++
		case !errors.Is(err, unix.ENOBUFS) && !errors.Is(err, unix.EINTR):
			require.NoError(b, err)
		}
	}
	sending := time.Since(began)
	sender = cpuTime(b, unix.RUSAGE_THREAD) - sender
	counting := cpuTime(b, unix.RUSAGE_THREAD)

	// Frames are still on their way: the balancer's device holds thousands.
	arrived, last := overflows(b, n)-before, time.Now()
	for time.Since(last) < 100*time.Millisecond {
		require.Less(b, time.Since(began), 10*time.Second, "SYNs still arrive: %d of %d", arrived, sent)
		time.Sleep(time.Millisecond)
		if now := overflows(b, n) - before; now != arrived {
			arrived, last = now, time.Now()
		}
	}
	counting = cpuTime(b, unix.RUSAGE_THREAD) - counting
	others := cpuTime(b, unix.RUSAGE_SELF) - process - sender - counting
	require.Positive(b, arrived, "of %d SYNs", sent)
	micros := func(cpu time.Duration) float64 { return float64(cpu.Nanoseconds()) / 1e3 }
	return []float64{
		float64(sent) / sending.Seconds(), float64(arrived) / last.Sub(began).Seconds(), // what was queued at the end took its time, too
		micros(sender) / float64(sent), micros(others) / float64(arrived),
	}
}

// overflows is how many SYNs the server's listeners have refused.
func overflows(b *testing.B, n *benchNet) int64 {
	counters, err := observe.ReadCounters(n.server)
	require.NoError(b, err)
	return counters["TcpExt.ListenOverflows"]
}

// cpuTime is the CPU time, user and system, of this thread or process.
func cpuTime(b *testing.B, who int) time.Duration {
	var usage unix.Rusage
	require.NoError(b, unix.Getrusage(who, &usage))
	return time.Duration(usage.Utime.Nano() + usage.Stime.Nano())
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
func bulk(b *testing.B, n *benchNet) []float64 {
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
	return []float64{size / 1e6 / time.Since(began).Seconds()}
}

// roundTrips is the median and the 99th percentile of the time that one byte takes
// there and back, in µs.
func roundTrips(b *testing.B, n *benchNet) []float64 {
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
	at := func(q float64) float64 { return float64(times[int(q*(trips-1))].Nanoseconds()) / 1e3 }
	return []float64{at(0.5), at(0.99)}
}
