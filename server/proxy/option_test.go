package proxy

import (
	"encoding/binary"
	"net/netip"
	"os"
	"os/exec"
	"slices"
	"testing"
	"time"

	"github.com/stretchr/testify/assert"
	"github.com/stretchr/testify/require"
	"golang.org/x/sys/unix"
)

// inNamespace tells the test binary that it stands in a network namespace of its own, and which one that must not be.
const inNamespace = "CONNLAB_PROXY_IN_NAMESPACE"

// alone runs the test that calls it again, in a new network namespace, and reports whether this is that run. Nothing of
// the host's network can be seen or changed there, and all of it is gone when the process ends.
func alone(t *testing.T) bool {
	t.Helper()
	here, err := os.Readlink("/proc/thread-self/ns/net")
	require.NoError(t, err)
	if host := os.Getenv(inNamespace); host != "" {
		require.NotEqual(t, host, here, "still in the namespace of the host")
		command(t, "ip", "link", "set", "lo", "up")
		return true
	}
	if os.Geteuid() != 0 {
		skip(t, "only root may make a network namespace and a TUN device")
	}
	if _, err := exec.LookPath("ip"); err != nil {
		skip(t, "ip is not installed: apt-get install iproute2")
	}
	self, err := os.Executable()
	require.NoError(t, err)
	cmd := exec.CommandContext(t.Context(), self, "-test.run=^"+t.Name()+"$", "-test.v", "-test.timeout=60s")
	cmd.Env = append(os.Environ(), inNamespace+"="+here)
	cmd.SysProcAttr = &unix.SysProcAttr{Cloneflags: unix.CLONE_NEWNET, Pdeathsig: unix.SIGKILL}
	out, err := cmd.CombinedOutput()
	require.NoError(t, err, "%s", out)
	require.Contains(t, string(out), "--- PASS: "+t.Name())
	return false
}

func command(t *testing.T, name string, args ...string) {
	t.Helper()
	out, err := exec.Command(name, args...).CombinedOutput()
	require.NoError(t, err, "%s %v: %s", name, args, out)
}

// wire is the far end of a TUN device: a client whose TCP is written by hand.
type wire struct {
	tun      *os.File
	from, to netip.AddrPort
	seq, ack uint32
}

// newWire makes a TUN device; this host has to.Addr() on its near end.
func newWire(t *testing.T, from, to netip.AddrPort) *wire {
	t.Helper()
	fd, err := unix.Open("/dev/net/tun", unix.O_RDWR|unix.O_CLOEXEC|unix.O_NONBLOCK, 0)
	if err != nil {
		skip(t, "there is no TUN device: "+err.Error())
	}
	req, err := unix.NewIfreq("tun0")
	require.NoError(t, err)
	req.SetUint16(unix.IFF_TUN | unix.IFF_NO_PI)
	require.NoError(t, unix.IoctlIfreq(fd, unix.TUNSETIFF, req))
	tun := os.NewFile(uintptr(fd), "tun0")
	t.Cleanup(func() { _ = tun.Close() })
	command(t, "ip", "addr", "add", to.Addr().String()+"/24", "dev", "tun0")
	command(t, "ip", "link", "set", "tun0", "up")
	return &wire{tun: tun, from: from, to: to, seq: 1000}
}

// send writes a segment.
func (w *wire) send(t *testing.T, flags byte, options []byte, payload string) {
	t.Helper()
	src, dst := w.from.Addr().As4(), w.to.Addr().As4()
	ip := make([]byte, 20)
	ip[0], ip[8], ip[9] = 0x45, 64, unix.IPPROTO_TCP
	copy(ip[12:], src[:])
	copy(ip[16:], dst[:])
	tcp := make([]byte, 20)
	binary.BigEndian.PutUint16(tcp[0:], w.from.Port())
	binary.BigEndian.PutUint16(tcp[2:], w.to.Port())
	binary.BigEndian.PutUint32(tcp[4:], w.seq)
	binary.BigEndian.PutUint32(tcp[8:], w.ack)
	tcp[12], tcp[13] = byte(20+len(options))/4<<4, flags
	binary.BigEndian.PutUint16(tcp[14:], 65535)
	tcp = slices.Concat(tcp, options, []byte(payload))
	pseudo := slices.Concat(ip[12:20], []byte{0, unix.IPPROTO_TCP, 0, byte(len(tcp))}, tcp)
	binary.BigEndian.PutUint16(tcp[16:], checksum(pseudo))
	binary.BigEndian.PutUint16(ip[2:], uint16(len(ip)+len(tcp)))
	binary.BigEndian.PutUint16(ip[10:], checksum(ip))
	_, err := w.tun.Write(append(ip, tcp...))
	require.NoError(t, err)
	w.seq += uint32(len(payload))
}

// next returns the flags and the payload of the next segment to the client.
func (w *wire) next(t *testing.T) (flags byte, payload string) {
	t.Helper()
	require.NoError(t, w.tun.SetReadDeadline(time.Now().Add(patience)))
	b := make([]byte, 2000)
	for {
		n, err := w.tun.Read(b)
		require.NoError(t, err)
		p := b[:n]
		if n < 40 || p[0] != 0x45 || p[9] != unix.IPPROTO_TCP {
			continue // a new interface sends IPv6 of its own
		}
		tcp := p[20:]
		payload = string(tcp[tcp[12]>>4*4:])
		w.ack = binary.BigEndian.Uint32(tcp[4:]) + uint32(len(payload))
		return tcp[13], payload
	}
}

// checksum is that of RFC 1071.
func checksum(b []byte) uint16 {
	if len(b)%2 != 0 {
		b = append(b[:len(b):len(b)], 0)
	}
	var sum uint32
	for i := 0; i < len(b); i += 2 {
		sum += uint32(binary.BigEndian.Uint16(b[i:]))
	}
	for sum > 0xffff {
		sum = sum&0xffff + sum>>16
	}
	return ^uint16(sum)
}

const (
	flagSYN = 2
	flagPSH = 8
	flagACK = 16
)

// A SYN with the option, as a balancer would hand it over, through the real kernel to the right upstream.
func TestLearnOption(t *testing.T) {
	if !alone(t) {
		return
	}
	w := newWire(t, netip.MustParseAddrPort("10.0.0.2:45000"), netip.MustParseAddrPort("10.0.0.11:6379"))
	echo := startEcho(t, "127.9.3.232:0")
	cfg := config(LearnOption, echo.port())
	cfg.Addr = w.to
	cfg.Routes = []Route{{VIPs: netip.MustParsePrefix("10.8.0.0/16"), To: netip.MustParsePrefix("127.9.0.0/16"), Port: echo.port()}}
	p := serve(t, cfg)

	w.send(t, flagSYN, slices.Concat([]byte{2, 4, 0x05, 0xb4}, vipBytes), "")
	w.seq++
	flags, _ := w.next(t)
	require.EqualValues(t, flagSYN|flagACK, flags)
	w.ack++
	w.send(t, flagACK, nil, "")
	w.send(t, flagACK|flagPSH, nil, "PING")
	for {
		flags, payload := w.next(t)
		require.Zero(t, flags&^(flagACK|flagPSH), "a FIN or a reset came")
		if payload != "" {
			assert.Equal(t, "PING", payload)
			break
		}
	}
	assert.EqualValues(t, 1, echo.accepted.Load())
	p.waitStats(Stats{Accepted: 1, Open: 1})
}

// A SYN cookie forgets the SYN: who it was for is not known, so not even the default upstream gets the connection.
func TestSYNCookie(t *testing.T) {
	if !alone(t) {
		return
	}
	// 2: a cookie for every connection (Documentation/networking/ip-sysctl.rst).
	require.NoError(t, os.WriteFile("/proc/sys/net/ipv4/tcp_syncookies", []byte("2"), 0))
	echo := startEcho(t, "127.0.0.1:0")
	cfg := config(LearnOption, 1)
	cfg.Default = netip.MustParseAddrPort(echo.addr())
	p := serve(t, cfg)
	wantReset(t, p.Addr().String(), "PING")
	// Data that is under way when the proxy resets the connection carries the cookie too, and makes it once more.
	eventually(t, func() string { return p.Stats().String() }, func() bool { got := p.Stats(); return got.Accepted > 0 && got.NoVIP == got.Accepted })
	assert.EqualValues(t, 0, echo.accepted.Load())

	require.NoError(t, os.WriteFile("/proc/sys/net/ipv4/tcp_syncookies", []byte("1"), 0))
	c := dial(t, p.Addr().String())
	c.say("PING")
	c.hear("PING")
	assert.EqualValues(t, 1, echo.accepted.Load(), "with the SYN at hand it is seen to have no option")
}
