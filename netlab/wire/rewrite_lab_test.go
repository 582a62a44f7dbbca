package wire

import (
	"bytes"
	"context"
	"io"
	"math/rand/v2"
	"net"
	"net/netip"
	"os"
	"strconv"
	"strings"
	"sync/atomic"
	"syscall"
	"testing"
	"time"
	"unsafe"

	"connlab/netlab"

	"github.com/gopacket/gopacket"
	"github.com/gopacket/gopacket/layers"
	"github.com/stretchr/testify/assert"
	"github.com/stretchr/testify/require"
	"golang.org/x/sys/unix"
)

var vips = netip.MustParsePrefix("10.8.0.0/16")

// proxyLab is a client whose route to all VIPs leads by via, and proxy's host on
// the pumped link w.
func proxyLab(t testing.TB, w *Wire, via netip.Addr, devices ...netlab.DeviceSpec) (clientHost, proxyHost *netlab.Host) {
	t.Helper()
	lab := up(t, netlab.Topology{
		Switches: lan,
		Hosts: []netlab.HostSpec{
			{
				Name:   "client",
				Links:  []netlab.LinkSpec{{Switch: "lan", Addrs: []netip.Addr{client.Addr()}}},
				Routes: []netlab.RouteSpec{{To: vips, Via: via}},
			},
			{
				Name:  "proxy",
				Links: []netlab.LinkSpec{{Switch: "lan", Addrs: []netip.Addr{proxy.Addr()}, Pump: w.Pump, AlwaysPump: true}},
			},
		},
		Devices: devices,
	})
	return lab.Host("client"), lab.Host("proxy")
}

// toProxy sends what is for vip to proxy, and says in the SYN where it was going.
func toProxy(p *Packet) Verdict {
	s, err := p.TCP()
	if err != nil || s.Destination() != vip {
		return Forward
	}
	s.SetDestination(proxy)
	if s.Flags().Has(SYN) && s.AddOption(kindTOA, toa) != nil {
		return Drop
	}
	return Forward
}

// fromVIP gives replies of proxy the source that the client knows.
func fromVIP(p *Packet) Verdict {
	if s, err := p.TCP(); err == nil && s.Source() == proxy {
		s.SetSource(vip)
	}
	return Forward
}

// exchange sends half a MiB to vip and back and returns the SYN as the proxy's
// socket got it.
func exchange(t *testing.T, clientHost, proxyHost *netlab.Host) (savedSYN []byte) {
	t.Helper()
	config := net.ListenConfig{Control: func(_, _ string, c syscall.RawConn) (err error) {
		if controlErr := c.Control(func(fd uintptr) {
			err = unix.SetsockoptInt(int(fd), unix.IPPROTO_TCP, unix.TCP_SAVE_SYN, 1)
		}); controlErr != nil {
			return controlErr
		}
		return err
	}}
	var l net.Listener
	require.NoError(t, proxyHost.Do(func() (err error) {
		l, err = config.Listen(context.Background(), "tcp4", proxy.String())
		return err
	}))
	defer l.Close()
	require.NoError(t, l.(*net.TCPListener).SetDeadline(time.Now().Add(patience)))

	const size = 1 << 19
	type accepted struct {
		local, remote string
		syn           []byte
		err           error
	}
	done := make(chan accepted, 1)
	go func() {
		conn, err := l.Accept()
		if err != nil {
			done <- accepted{err: err}
			return
		}
		defer conn.Close()
		a := accepted{local: conn.LocalAddr().String(), remote: conn.RemoteAddr().String()}
		a.err = conn.SetDeadline(time.Now().Add(patience))
		if a.err == nil {
			a.syn, a.err = synOf(conn.(*net.TCPConn))
		}
		if a.err == nil {
			_, a.err = io.CopyN(conn, conn, size)
		}
		done <- a
	}()

	ctx, cancel := context.WithTimeout(t.Context(), patience)
	defer cancel()
	conn, err := clientHost.DialContext(ctx, "tcp", vip.String())
	require.NoError(t, err)
	defer conn.Close()
	require.NoError(t, conn.SetDeadline(time.Now().Add(patience)))
	data := make([]byte, size)
	_, _ = rand.NewChaCha8([32]byte{2}).Read(data)
	sent := make(chan error, 1)
	go func() {
		_, err := conn.Write(data)
		sent <- err
	}()
	back := make([]byte, size)
	_, err = io.ReadFull(conn, back)
	require.NoError(t, err)
	require.NoError(t, <-sent)
	assert.True(t, bytes.Equal(data, back), "what came back")
	a := <-done
	require.NoError(t, a.err)
	assert.Equal(t, vip.String(), conn.RemoteAddr().String())
	assert.Equal(t, proxy.String(), a.local)
	assert.Equal(t, conn.LocalAddr().String(), a.remote, "the proxy sees the client's own address and port")
	return a.syn
}

// synOf is the SYN that made a connection, from the IP header on (tcp(7), TCP_SAVED_SYN).
func synOf(conn *net.TCPConn) ([]byte, error) {
	raw, err := conn.SyscallConn()
	if err != nil {
		return nil, err
	}
	syn := make([]byte, 120)
	size := uint32(len(syn))
	var errno unix.Errno
	err = raw.Control(func(fd uintptr) {
		_, _, errno = unix.Syscall6(unix.SYS_GETSOCKOPT, fd, unix.IPPROTO_TCP, unix.TCP_SAVED_SYN,
			uintptr(unsafe.Pointer(&syn[0])), uintptr(unsafe.Pointer(&size)), 0)
	})
	if err == nil && errno != 0 {
		err = os.NewSyscallError("getsockopt TCP_SAVED_SYN", errno)
	}
	return syn[:size], err
}

// assertSYN looks at a SYN as another parser sees it.
func assertSYN(t *testing.T, syn []byte) {
	t.Helper()
	decoded := gopacket.NewPacket(syn, layers.LayerTypeIPv4, gopacket.Default)
	tcp, ok := decoded.Layer(layers.LayerTypeTCP).(*layers.TCP)
	require.True(t, ok, "%v", decoded)
	var data []byte
	for _, o := range tcp.Options {
		if o.OptionType == kindTOA {
			data = o.OptionData
		}
	}
	assert.Equal(t, toa, data, "of the options %v", tcp.Options)
	assert.Len(t, tcp.Options, 6, "Linux's five and ours: %v", tcp.Options)
}

// tcpCounter is a counter of the host's Tcp group in /proc/net/snmp.
func tcpCounter(t testing.TB, h *netlab.Host, name string) (value int) {
	t.Helper()
	require.NoError(t, h.Do(func() error {
		b, err := os.ReadFile("/proc/thread-self/net/snmp")
		if err != nil {
			return err
		}
		var names []string
		for line := range strings.Lines(string(b)) {
			fields := strings.Fields(line)
			if fields[0] != "Tcp:" {
				continue
			}
			if names == nil {
				names = fields
				continue
			}
			for i := range names {
				if names[i] == name {
					value, err = strconv.Atoi(fields[i])
					return err
				}
			}
		}
		return os.ErrNotExist
	}))
	return value
}

func assertNoBadChecksum(t testing.TB, hosts ...*netlab.Host) {
	t.Helper()
	for _, h := range hosts {
		assert.Zero(t, tcpCounter(t, h, "InCsumErrors"), h.Name())
	}
}

func TestTCPThroughRewritingStages(t *testing.T) {
	w := &Wire{Entering: []Stage{toProxy}, Leaving: []Stage{fromVIP}}
	clientHost, proxyHost := proxyLab(t, w, proxy.Addr())
	assertSYN(t, exchange(t, clientHost, proxyHost))
	assertNoBadChecksum(t, clientHost, proxyHost)
	s := w.Stats()
	assert.Zero(t, s.AtoB.Dropped+s.BtoA.Dropped)
}

// A balancer with one arm: from the client to the device, from there to the
// proxy, and past the device straight back.
func TestTCPThroughDevice(t *testing.T) {
	at := netip.MustParseAddr("10.77.0.5")
	device := &Wire{Entering: []Stage{toProxy}}
	link := &Wire{Leaving: []Stage{fromVIP}}
	clientHost, proxyHost := proxyLab(t, link, at, netlab.DeviceSpec{
		Name: "balancer", Switch: "lan", Addrs: []netip.Addr{at}, Attach: device.Attach,
	})
	syn := exchange(t, clientHost, proxyHost)
	assertSYN(t, syn)
	ip := gopacket.NewPacket(syn, layers.LayerTypeIPv4, gopacket.Default).Layer(layers.LayerTypeIPv4).(*layers.IPv4)
	assert.EqualValues(t, 63, ip.TTL, "one hop")
	assertNoBadChecksum(t, clientHost, proxyHost)

	await(t, func() (bool, any) { // the last acknowledgements are still on their way
		c := device.Stats().BtoA
		return c.Received == c.Forwarded+c.Ignored, c
	})
	s := device.Stats()
	t.Logf("device %+v, link %+v", s.BtoA, link.Stats())
	assert.Equal(t, Counts{}, s.AtoB, "a device has one arm")
	assert.Greater(t, s.BtoA.Forwarded, uint64(1<<19/1500), "half a MiB from the client")
	assert.Greater(t, link.Stats().AtoB.Forwarded, uint64(1<<19/1500), "half a MiB from the proxy")
}

// A segment that is corrupt before it is rewritten is so afterwards: the
// receiver sees it, and TCP repairs it.
func TestReceiverSeesCorruption(t *testing.T) {
	var corrupted atomic.Int64
	corrupt := func(p *Packet) Verdict {
		if s, err := p.TCP(); err == nil && len(s.Payload()) > 100 && corrupted.Load() < 3 {
			s.Payload()[50] ^= 0x10
			corrupted.Add(1)
		}
		return Forward
	}
	w := &Wire{Entering: []Stage{corrupt, toProxy}, Leaving: []Stage{fromVIP}}
	clientHost, proxyHost := proxyLab(t, w, proxy.Addr())
	exchange(t, clientHost, proxyHost)
	require.EqualValues(t, 3, corrupted.Load())
	assert.Equal(t, 3, tcpCounter(t, proxyHost, "InCsumErrors"))
	assertNoBadChecksum(t, clientHost)
}
