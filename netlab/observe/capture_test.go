package observe

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"net"
	"net/netip"
	"os"
	"os/exec"
	"path/filepath"
	"strconv"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"
	"github.com/google/go-cmp/cmp/cmpopts"
	"github.com/gopacket/gopacket"
	"github.com/gopacket/gopacket/layers"
	"github.com/gopacket/gopacket/pcapgo"
	"github.com/stretchr/testify/assert"
	"github.com/stretchr/testify/require"
	"golang.org/x/sys/unix"

	"connlab/netlab"
)

const redisPort = 6379

// ping connects from the client, sends PING and waits for the PONG of the
// listener, whose side it plays too.
func ping(t *testing.T, client *netlab.Host, listener int, to netip.AddrPort) {
	t.Helper()
	ctx, cancel := context.WithTimeout(t.Context(), 5*time.Second)
	defer cancel()
	conn, err := client.DialContext(ctx, "tcp", to.String())
	require.NoError(t, err)
	defer func() { require.NoError(t, conn.Close()) }()
	require.NoError(t, conn.SetDeadline(time.Now().Add(5*time.Second)))

	accepted := os.NewFile(uintptr(accept(t, listener)), "accepted")
	server, err := net.FileConn(accepted)
	require.NoError(t, err)
	defer func() { require.NoError(t, server.Close()) }()
	require.NoError(t, accepted.Close())
	require.NoError(t, server.SetDeadline(time.Now().Add(5*time.Second)))

	for _, way := range []struct {
		from, to net.Conn
		text     string
	}{{conn, server, "PING\r\n"}, {server, conn, "+PONG\r\n"}} {
		_, err := io.WriteString(way.from, way.text)
		require.NoError(t, err)
		got := make([]byte, len(way.text))
		_, err = io.ReadFull(way.to, got)
		require.NoError(t, err)
		require.Equal(t, way.text, string(got))
	}
}

// capturePing captures at both ends while the client PINGs the server on the
// Redis port and on another one.
func capturePing(t *testing.T, w io.Writer) CaptureStats {
	t.Helper()
	lab := upLab(t, host("client", nil), host("server", nil))
	client, server := lab.Host("client"), lab.Host("server")
	wanted, other := listen(t, server, redisPort, 16), listen(t, server, redisPort+1, 16)

	c, err := StartCapture(w, CaptureConfig{
		Points:  []CapturePoint{{Host: client}, {Host: server, Interface: "eth0"}},
		Port:    redisPort,
		Comment: "a handshake and a PING",
	})
	require.NoError(t, err)
	ping(t, client, other, netip.AddrPortFrom(server.Addr(), redisPort+1))
	ping(t, client, wanted, netip.AddrPortFrom(server.Addr(), redisPort))
	stats, err := c.Stop()
	require.NoError(t, err)
	return stats
}

// captured is a packet as it was read back from a file.
type captured struct {
	Interface string
	Outbound  bool
	Flags     string
	Payload   string
	at        time.Time
	info      gopacket.CaptureInfo
	tcp       *layers.TCP
}

// readBack reads a pcapng file of TCP over IPv4.
func readBack(t *testing.T, r io.Reader) ([]captured, *pcapgo.NgReader) {
	t.Helper()
	file, err := pcapgo.NewNgReader(r, pcapgo.DefaultNgReaderOptions)
	require.NoError(t, err)
	var all []captured
	for {
		data, info, options, err := file.ReadPacketDataWithOptions()
		if errors.Is(err, io.EOF) {
			return all, file
		}
		require.NoError(t, err)
		iface, err := file.Interface(info.InterfaceIndex)
		require.NoError(t, err)
		p := captured{Interface: iface.Name, at: info.Timestamp, info: info}
		require.NotNil(t, options.Flags, "every packet has a direction")
		p.Outbound = options.Flags.Direction == pcapgo.NgEpbFlagDirectionOutbound
		if tcp, ok := gopacket.NewPacket(data, layers.LayerTypeEthernet, gopacket.Default).Layer(layers.LayerTypeTCP).(*layers.TCP); ok {
			p.tcp, p.Payload = tcp, string(tcp.Payload)
			for _, flag := range []struct {
				set  bool
				name string
			}{{tcp.SYN, "S"}, {tcp.FIN, "F"}, {tcp.RST, "R"}, {tcp.PSH, "P"}, {tcp.ACK, "A"}} {
				if flag.set {
					p.Flags += flag.name
				}
			}
		}
		all = append(all, p)
	}
}

func TestCaptureOfAPing(t *testing.T) {
	var b bytes.Buffer
	stats := capturePing(t, &b)
	packets, file := readBack(t, &b)

	assert.Equal(t, "a handshake and a PING", file.SectionInfo().Comment)
	require.Equal(t, 2, file.NInterfaces())
	require.NotEmpty(t, packets)
	for i, name := range []string{"client eth0", "server eth0"} {
		iface, err := file.Interface(i)
		require.NoError(t, err)
		assert.Equal(t, name, iface.Name)
		assert.Equal(t, "ip and tcp port 6379", iface.Filter)

		client := i == 0
		want := []captured{
			{Interface: name, Outbound: client, Flags: "S"},
			{Interface: name, Outbound: !client, Flags: "SA"},
			{Interface: name, Outbound: client, Flags: "A"},
			{Interface: name, Outbound: client, Flags: "PA", Payload: "PING\r\n"},
			{Interface: name, Outbound: !client, Flags: "PA", Payload: "+PONG\r\n"},
		}
		var got []captured // the handshake and what has a payload
		count := 0
		for _, p := range packets {
			if p.Interface != name {
				continue
			}
			count++
			if count <= 3 || p.Payload != "" {
				got = append(got, p)
			}
		}
		if diff := cmp.Diff(want, got, cmpopts.IgnoreUnexported(captured{})); diff != "" {
			t.Errorf("%s (-want +got):\n%s", name, diff)
		}
		assert.EqualValues(t, count, stats.Points[i].Packets)
		assert.EqualValues(t, count, iface.Statistics.PacketsReceived, "the file says how many there were")
		assert.Zero(t, iface.Statistics.PacketsDropped)
		assert.Zero(t, stats.Points[i].Dropped)
	}
	for i, p := range packets {
		require.NotNil(t, p.tcp)
		assert.True(t, p.tcp.SrcPort == redisPort || p.tcp.DstPort == redisPort, "packet %d is of another port: %v", i, p.tcp)
		if i > 0 {
			assert.False(t, p.at.Before(packets[i-1].at), "packet %d is from before the one that precedes it", i)
		}
	}
	assert.Equal(t, "client eth0", packets[0].Interface, "a SYN leaves before it arrives")
	assert.False(t, stats.LimitReached)
}

// Wireshark's own reader finds nothing wrong with the file.
func TestCaptureReadByTshark(t *testing.T) {
	tshark, err := exec.LookPath("tshark")
	if err != nil {
		reason := fmt.Sprintf("needs tshark to read the file: %v", err)
		if os.Getenv("CONNLAB_STRICT") == "1" {
			t.Fatal(reason)
		}
		t.Skip(reason)
	}
	path := filepath.Join(t.TempDir(), "ping.pcapng")
	f, err := os.Create(path)
	require.NoError(t, err)
	stats := capturePing(t, f)
	require.NoError(t, f.Close())

	var stderr bytes.Buffer
	cmd := exec.CommandContext(t.Context(), tshark, "-n", "-r", path, "-o", "tcp.relative_sequence_numbers:TRUE", "-T", "fields", "-E", "separator=|",
		"-e", "frame.interface_name", "-e", "frame.packet_flags_direction", "-e", "tcp.flags.str", "-e", "tcp.seq", "-e", "tcp.port", "-e", "frame.time_delta",
		"-e", "_ws.malformed")
	cmd.Stderr = &stderr
	out, err := cmd.Output()
	require.NoError(t, err, "%s", stderr.String())
	assert.NotContains(t, stderr.String(), "damaged")
	assert.NotContains(t, stderr.String(), "cut short")

	handshakes := map[string][]string{}
	count := int64(0)
	for line := range strings.Lines(string(out)) {
		fields := strings.Split(strings.TrimSuffix(line, "\n"), "|")
		require.Len(t, fields, 7, line)
		iface, flags := fields[0], strings.Trim(fields[2], "·")
		direction, err := strconv.ParseUint(fields[1], 0, 32) // hexadecimal or decimal by version
		require.NoError(t, err, line)
		assert.Contains(t, strings.Split(fields[4], ","), strconv.Itoa(redisPort), "the filter lets nothing else pass")
		assert.NotContains(t, fields[5], "-", "no packet is from before the one that precedes it")
		assert.Empty(t, fields[6], "malformed")
		handshakes[iface] = append(handshakes[iface], fmt.Sprintf("%d %s", direction, flags))
		count++
	}
	const inbound, outbound = "1", "2"
	require.Len(t, handshakes, 2, "%s", out)
	require.GreaterOrEqual(t, len(handshakes["client eth0"]), 3)
	require.GreaterOrEqual(t, len(handshakes["server eth0"]), 3)
	assert.Equal(t, []string{outbound + " S", inbound + " A··S", outbound + " A"}, handshakes["client eth0"][:3])
	assert.Equal(t, []string{inbound + " S", outbound + " A··S", inbound + " A"}, handshakes["server eth0"][:3])
	assert.Equal(t, stats.Points[0].Packets+stats.Points[1].Packets, count)
}

// failAfter takes so many bytes and then no more.
type failAfter struct{ left int }

var errDiskFull = errors.New("disk full")

func (w *failAfter) Write(b []byte) (int, error) {
	if len(b) > w.left {
		return 0, errDiskFull
	}
	w.left -= len(b)
	return len(b), nil
}

// A writer that fails ends the capture: its sockets are closed before Stop.
func TestCaptureEndsWhenTheWriterFails(t *testing.T) {
	lab := upLab(t, host("client", nil), host("server", nil))
	client, server := lab.Host("client"), lab.Host("server")
	listener := listen(t, server, redisPort, 16)
	before := openFiles(t)

	_, err := StartCapture(&failAfter{}, CaptureConfig{Points: []CapturePoint{{Host: client}}})
	require.ErrorIs(t, err, errDiskFull, "the head of the file cannot be written")

	c, err := StartCapture(&failAfter{left: 1000}, CaptureConfig{Points: []CapturePoint{{Host: client}, {Host: server}}})
	require.NoError(t, err)
	capturing := openFiles(t)
	require.Equal(t, before+2, capturing)
	for range 5 {
		ping(t, client, listener, netip.AddrPortFrom(server.Addr(), redisPort))
	}
	eventually(t, 5*time.Second, func() error {
		if n := openFiles(t); n > before {
			return fmt.Errorf("%d files are open, %d were before the capture", n, before)
		}
		return nil
	})
	_, err = c.Stop()
	require.ErrorIs(t, err, errDiskFull)
	_, again := c.Stop()
	assert.Equal(t, err, again)
}

func TestCaptureLimit(t *testing.T) {
	lab := upLab(t, host("client", nil), host("server", nil))
	client, server := lab.Host("client"), lab.Host("server")
	listener := listen(t, server, redisPort, 16)
	before := openFiles(t)

	var b bytes.Buffer
	c, err := StartCapture(&b, CaptureConfig{Points: []CapturePoint{{Host: client}, {Host: server}}, Port: redisPort, Limit: 5, SnapLen: 60})
	require.NoError(t, err)
	ping(t, client, listener, netip.AddrPortFrom(server.Addr(), redisPort))
	eventually(t, 5*time.Second, func() error {
		if n := openFiles(t); n > before {
			return fmt.Errorf("the limit is reached, and %d files are open; %d were before the capture", n, before)
		}
		return nil
	})
	stats, err := c.Stop()
	require.NoError(t, err)
	assert.True(t, stats.LimitReached)
	assert.EqualValues(t, 5, stats.Points[0].Packets+stats.Points[1].Packets)

	packets, _ := readBack(t, &b)
	require.Len(t, packets, 5, "the first in the order of time")
	for _, p := range packets {
		assert.Equal(t, 60, p.info.CaptureLength, "cut to the snap length")
		assert.Greater(t, p.info.Length, 60, "a SYN and an ACK with timestamps are longer, and the file knows")
	}
}

// Stop delivers what arrived before it, although no tick of the capture may have
// passed since, and leaves no file open.
func TestCaptureStopDrains(t *testing.T) {
	lab := upLab(t, host("client", nil), host("server", nil))
	client, server := lab.Host("client"), lab.Host("server")
	listener := listen(t, server, redisPort, 16)
	before := openFiles(t)
	for round := range 20 {
		var b bytes.Buffer
		c, err := StartCapture(&b, CaptureConfig{Points: []CapturePoint{{Host: client}, {Host: server}}, Port: redisPort})
		require.NoError(t, err)
		ping(t, client, listener, netip.AddrPortFrom(server.Addr(), redisPort))
		stats, err := c.Stop()
		require.NoError(t, err)
		packets, _ := readBack(t, &b)
		var order []string
		pongs := 0
		for _, p := range packets {
			order = append(order, strings.TrimSuffix(p.Interface, " eth0")+" "+p.Flags)
			if p.Payload == "+PONG\r\n" {
				pongs++
			}
		}
		require.Greater(t, len(order), 6)
		assert.Equal(t, []string{"client S", "server S", "server SA", "client SA", "client A", "server A"}, order[:6],
			"round %d: cause before effect, from the first packet of a capture on", round)
		assert.Equal(t, 2, pongs, "round %d: at both ends", round)
		assert.EqualValues(t, len(packets), stats.Points[0].Packets+stats.Points[1].Packets)
	}
	assert.Equal(t, before, openFiles(t))
}

// flood sends n datagrams.
func flood(t testing.TB, from *netlab.Host, to netip.AddrPort, n int) {
	t.Helper()
	fd := datagramSocket(t, from)
	address := &unix.SockaddrInet4{Addr: to.Addr().As4(), Port: int(to.Port())}
	payload := make([]byte, 32)
	for range n {
		require.NoError(t, unix.Sendto(fd, payload, 0, address))
	}
}

func datagramSocket(t testing.TB, h *netlab.Host) (fd int) {
	t.Helper()
	require.NoError(t, h.Do(func() (err error) {
		fd, err = unix.Socket(unix.AF_INET, unix.SOCK_DGRAM|unix.SOCK_CLOEXEC, 0)
		return err
	}))
	t.Cleanup(func() { require.NoError(t, unix.Close(fd)) })
	return fd
}

// sink takes datagrams and drops what it has no room for. Without it the host
// would answer with ICMP.
func sink(t testing.TB, h *netlab.Host, port int) {
	t.Helper()
	require.NoError(t, unix.Bind(datagramSocket(t, h), &unix.SockaddrInet4{Addr: h.Addr().As4(), Port: port}))
}

// As many packets as there may be in seconds of an experiment, sent as fast as one
// thread can, are all in the file: at the sender's end by number, and at the
// receiver's end as many as its kernel counted.
func TestCaptureLosesNothing(t *testing.T) {
	const datagrams = 100_000
	lab := upLab(t, host("client", nil), host("server", nil))
	client, server := lab.Host("client"), lab.Host("server")
	sink(t, server, redisPort)

	before, err := ReadCounters(server)
	require.NoError(t, err)
	c, err := StartCapture(io.Discard, CaptureConfig{Points: []CapturePoint{{Host: client}, {Host: server}}})
	require.NoError(t, err)
	started := time.Now()
	flood(t, client, netip.AddrPortFrom(server.Addr(), redisPort), datagrams)
	sent := time.Since(started)
	during, err := ReadCounters(server)
	require.NoError(t, err)
	stats, err := c.Stop()
	require.NoError(t, err)
	after, err := ReadCounters(server)
	require.NoError(t, err)

	t.Logf("%d packets at two points, sent in %v: %+v", datagrams, sent, stats)
	assert.False(t, stats.LimitReached)
	assert.Zero(t, stats.Points[0].Dropped)
	assert.Zero(t, stats.Points[1].Dropped)
	assert.EqualValues(t, datagrams, stats.Points[0].Packets)
	const received = "Ip.InReceives"
	assert.GreaterOrEqual(t, stats.Points[1].Packets, during.Sub(before)[received], "what the server's own kernel had counted")
	assert.LessOrEqual(t, stats.Points[1].Packets, after.Sub(before)[received])
}

// A full buffer drops, and the account says so: written and dropped are all that
// was sent.
func TestCaptureCountsWhatItDrops(t *testing.T) {
	const datagrams = 5000
	lab := upLab(t, host("client", nil), host("server", nil))
	client, server := lab.Host("client"), lab.Host("server")
	sink(t, server, redisPort)

	w := &gate{reading: make(chan struct{}), release: make(chan struct{})}
	c, err := StartCapture(w, CaptureConfig{Points: []CapturePoint{{Host: client}}})
	require.NoError(t, err)
	w.closed.Store(true)
	smallBuffer(t, c.sockets[0])

	to := netip.AddrPortFrom(server.Addr(), redisPort)
	flood(t, client, to, 1) // and the capture stands still at the gate
	select {
	case <-w.reading:
	case <-time.After(5 * time.Second):
		require.Fail(t, "the first packet was not written within 5 s")
	}
	flood(t, client, to, datagrams)
	close(w.release)
	stats, err := c.Stop()
	require.NoError(t, err)

	p := stats.Points[0]
	assert.Positive(t, p.Dropped)
	assert.EqualValues(t, 1+datagrams, p.Packets+p.Dropped, "%+v", stats)
}

// gate is a writer that stands still once it is closed, until it is released.
type gate struct {
	closed           atomic.Bool
	reading, release chan struct{}
	once             sync.Once
}

func (g *gate) Write(b []byte) (int, error) {
	if g.closed.Load() {
		g.once.Do(func() { close(g.reading) })
		<-g.release
	}
	return len(b), nil
}

// smallBuffer makes a socket drop soon.
func smallBuffer(t *testing.T, s *packetSocket) {
	t.Helper()
	require.NoError(t, unix.SetsockoptInt(s.fd, unix.SOL_SOCKET, unix.SO_RCVBUF, 64<<10))
}

func TestCaptureConfig(t *testing.T) {
	h := &netlab.Host{}
	tests := []struct {
		why  string
		cfg  CaptureConfig
		want string
	}{
		{"nowhere", CaptureConfig{}, "no point to capture at"},
		{"a host that the lab does not have", CaptureConfig{Points: []CapturePoint{{Host: nil}}}, "point 0 has no host"},
		{"one interface by default and by name", CaptureConfig{Points: []CapturePoint{{Host: h}, {Host: h, Interface: "eth0"}}}, "eth0 is captured twice"},
		{"a negative limit", CaptureConfig{Points: []CapturePoint{{Host: h}}, Limit: -1}, "a limit of -1 makes no sense"},
		{"a negative snap length", CaptureConfig{Points: []CapturePoint{{Host: h}}, SnapLen: -1}, "a snap length of -1"},
	}
	for _, tt := range tests {
		var b bytes.Buffer
		_, err := StartCapture(&b, tt.cfg)
		if assert.ErrorContains(t, err, tt.want, tt.why) {
			assert.Zero(t, b.Len(), "%s: nothing written", tt.why)
		}
	}
}

func TestCaptureOfNoInterface(t *testing.T) {
	lab := upLab(t, host("client", nil))
	before := openFiles(t)
	_, err := StartCapture(io.Discard, CaptureConfig{Points: []CapturePoint{{Host: lab.Host("client")}, {Host: lab.Host("client"), Interface: "eth7"}}})
	require.ErrorContains(t, err, "host client: interface eth7")
	assert.Equal(t, before, openFiles(t), "what was open is closed")
}

// BenchmarkDatagram is what it takes to send one, beside a capture at the sender
// and without: the difference is what a capture costs the experiment.
func BenchmarkDatagram(b *testing.B) {
	for _, capturing := range []bool{false, true} {
		b.Run(fmt.Sprintf("captured=%v", capturing), func(b *testing.B) {
			lab := upLab(b, host("client", nil), host("server", nil))
			client, server := lab.Host("client"), lab.Host("server")
			sink(b, server, redisPort)
			if capturing {
				c, err := StartCapture(io.Discard, CaptureConfig{Points: []CapturePoint{{Host: client}}, Limit: 1 << 40})
				require.NoError(b, err)
				defer func() {
					stats, err := c.Stop()
					require.NoError(b, err)
					require.Zero(b, stats.Points[0].Dropped)
				}()
			}
			b.ResetTimer()
			flood(b, client, netip.AddrPortFrom(server.Addr(), redisPort), b.N)
		})
	}
}
