package wire

import (
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

func BenchmarkParse(b *testing.B) {
	for _, row := range []struct {
		name  string
		frame []byte
	}{{"SYN", synFrame(b)}, {"data", dataFrame(b, make([]byte, 1448))}} {
		b.Run(row.name, func(b *testing.B) {
			p, err := NewPacket(row.frame)
			require.NoError(b, err)
			b.ReportAllocs()
			for b.Loop() {
				p.reset(len(row.frame), DefaultMTU)
				if _, err := p.TCP(); err != nil {
					b.Fatal(err)
				}
			}
		})
	}
}

func BenchmarkAddOption(b *testing.B) {
	frame := synFrame(b)
	p, err := NewPacket(frame)
	require.NoError(b, err)
	b.ReportAllocs()
	for b.Loop() {
		p.reset(copy(p.buf[:], frame), DefaultMTU)
		s, err := p.TCP()
		if err != nil {
			b.Fatal(err)
		}
		if err := s.AddOption(kindTOA, toa); err != nil {
			b.Fatal(err)
		}
	}
}

func BenchmarkRewrite(b *testing.B) {
	_, s := segmentOf(b, dataFrame(b, make([]byte, 1448)))
	to := [2]netip.AddrPort{vip, proxy}
	i := 0
	b.ReportAllocs()
	for b.Loop() {
		i ^= 1
		s.SetDestination(to[i])
		s.SetSource(to[i^1])
	}
}

// threadTime is the processor time of the calling thread, which others on the
// machine do not lengthen.
func threadTime(b *testing.B) time.Duration {
	var ts unix.Timespec
	require.NoError(b, unix.ClockGettime(unix.CLOCK_THREAD_CPUTIME_ID, &ts))
	return time.Duration(ts.Nano())
}

// BenchmarkDevice is what a device in a lab costs: the processor time for reading a
// SYN from its port, the stages, and writing it, with all that the kernel does
// meanwhile as far as the queue of the next link. Without stages and with those
// that rewrite the destination and add an option; the two take turns. All checksums
// are wrong by one, so that the receiver counts each SYN and answers none.
func BenchmarkDevice(b *testing.B) {
	at := netip.MustParseAddr("10.77.0.5")
	var port *os.File
	var place netlab.Port
	capture := func(p *os.File, at netlab.Port) (func() error, error) {
		port, place = p, at
		return func() error { return nil }, nil
	}
	link := new(Wire)
	clientHost, proxyHost := proxyLab(b, link, at, netlab.DeviceSpec{
		Name: "balancer", Switch: "lan", Addrs: []netip.Addr{at}, Attach: capture,
	})
	source := packetSocket(b, clientHost)
	frame := func(to netip.AddrPort) []byte {
		p, s := segmentOf(b, synFrame(b))
		s.SetDestination(to)
		copy(p.Frame(), place.MAC)
		p.Frame()[atTCP+tcpChecksumAt+1]++
		return p.Frame()
	}
	arms := []*struct {
		name  string
		wire  *Wire
		frame []byte
		d     *direction
		took  time.Duration
	}{
		{name: "bare", wire: new(Wire), frame: frame(proxy)},
		{name: "stages", wire: &Wire{Entering: []Stage{toProxy}}, frame: frame(vip)},
	}
	for _, arm := range arms {
		var err error
		arm.d, err = arm.wire.device(port, place)
		require.NoError(b, err)
	}

	runtime.LockOSThread()
	defer runtime.UnlockOSThread()
	start := time.Now()
	now := func() time.Duration { return time.Since(start) }
	const round = 4096 // below the queues of the port and of the link
	sent := uint64(0)
	b.ResetTimer()
	for done := 0; done < b.N; done += round {
		n := min(round, b.N-done)
		for _, arm := range arms {
			for range n {
				if _, err := unix.Write(source, arm.frame); err != nil {
					b.Fatal(err)
				}
			}
			begin := threadTime(b)
			for read := batch; read > 0; {
				var err error
				if read, err = arm.d.receive(now); err != nil {
					b.Fatal(err)
				}
				arm.d.deliver(now())
			}
			arm.took += threadTime(b) - begin
			sent += uint64(n)
			await(b, func() (bool, any) { c := link.Stats().BtoA; return c.Forwarded == sent, c })
		}
	}
	b.StopTimer()
	per := func(d time.Duration) float64 { return float64(d.Nanoseconds()) / float64(b.N) }
	for _, arm := range arms {
		require.Equal(b, uint64(b.N), arm.wire.Stats().BtoA.Forwarded, arm.name)
		b.ReportMetric(per(arm.took), arm.name+"-cpu-ns/frame")
	}
	b.ReportMetric(float64(arms[1].took)/float64(arms[0].took), "stages/bare")
	b.ReportMetric(1e9/per(arms[1].took), "frames/cpu-s")
	assert.Equal(b, 2*b.N, tcpCounter(b, proxyHost, "InCsumErrors"))
	assert.Zero(b, tcpCounter(b, proxyHost, "OutRsts"))
}

// packetSocket sends whole frames from the host's eth0.
func packetSocket(t testing.TB, h *netlab.Host) (fd int) {
	t.Helper()
	require.NoError(t, h.Do(func() (err error) {
		fd, err = unix.Socket(unix.AF_PACKET, unix.SOCK_RAW|unix.SOCK_CLOEXEC, 0)
		if err != nil {
			return err
		}
		t.Cleanup(func() { unix.Close(fd) })
		eth, err := net.InterfaceByName("eth0")
		if err != nil {
			return err
		}
		return unix.Bind(fd, &unix.SockaddrLinklayer{Ifindex: eth.Index})
	}))
	return fd
}
