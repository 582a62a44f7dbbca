package netlab

import (
	"bytes"
	"errors"
	"os"
	"strconv"
	"strings"
	"testing"

	"github.com/stretchr/testify/assert"
	"github.com/stretchr/testify/require"
	"golang.org/x/sys/unix"
)

func nopPump(_, _ *os.File, _ LinkSpec) (func() error, error) {
	return func() error { return nil }, nil
}

// A link that must be late needs netem or a pump.
func TestLinkKind(t *testing.T) {
	var pump Pump = nopPump
	for _, row := range []struct {
		reason string
		link   LinkSpec
		want   string
	}{
		{"no latency, no loss", LinkSpec{}, LinkVeth},
		{"a pump that is not needed", LinkSpec{Pump: pump}, LinkVeth},
		{"asked for", LinkSpec{Pump: pump, AlwaysPump: true}, LinkPump},
	} {
		got, err := linkKind(&row.link)
		require.NoError(t, err, row.reason)
		assert.Equal(t, row.want, got, row.reason)
	}
	err := Topology{Switches: lan, Hosts: []HostSpec{host("a", LinkSpec{Switch: "lan", AlwaysPump: true})}}.Check()
	require.EqualError(t, err, `host "a": link to "lan": AlwaysPump without a Pump`)

	late := LinkSpec{Delay: 1}
	got, err := linkKind(&late)
	if netemAvailable() {
		require.NoError(t, err)
		assert.Equal(t, LinkNetem, got)
		return
	}
	require.EqualError(t, err, "needs netem: delay or loss on a link: this kernel does not have it; give the link a pump")
	late.Pump = pump
	got, err = linkKind(&late)
	require.NoError(t, err)
	assert.Equal(t, LinkPump, got)
}

// Everyone knows everyone when Up returns: no packet waits for ARP, and none is
// flooded to hosts that it is not for.
func TestNeighboursAreKnown(t *testing.T) {
	lab := up(t, star(3))
	for _, h := range lab.Hosts() {
		const permanent = "0x6" // ATF_PERM|ATF_COM (include/uapi/linux/if_arp.h)
		var known []string
		for _, line := range procNet(t, h, "arp")[1:] {
			f := strings.Fields(line) // address, type, flags, hardware address, mask, device
			assert.Equal(t, permanent, f[2], line)
			assert.Equal(t, mac(addr(f[0])).String(), f[3], line)
			known = append(known, f[0])
		}
		var others []string
		for _, o := range lab.Hosts() {
			if o != h {
				others = append(others, o.Addr().String())
			}
		}
		assert.ElementsMatch(t, others, known, h.Name())
	}

	listen(t, lab.Host("server"))
	conn, err := lab.Host("client-001").DialContext(t.Context(), "tcp", lab.Host("server").Addr().String()+":7000")
	require.NoError(t, err)
	require.NoError(t, conn.Close())
	for _, bystander := range []string{"client-002", "client-003"} {
		received, _ := traffic(t, lab.Host(bystander))
		assert.Zero(t, received, "%s received packets of others", bystander)
	}
}

// procNet reads the lines of a file below /proc/net of a host.
func procNet(t *testing.T, h *Host, file string) []string {
	t.Helper()
	var b []byte
	require.NoError(t, h.Do(func() (err error) {
		b, err = os.ReadFile("/proc/thread-self/net/" + file)
		return err
	}))
	return strings.Split(strings.TrimSpace(string(b)), "\n")
}

// traffic counts the packets that a host's first link has carried.
func traffic(t *testing.T, h *Host) (received, sent int) {
	t.Helper()
	for _, line := range procNet(t, h, "dev") {
		if device, counters, _ := strings.Cut(line, ":"); strings.TrimSpace(device) == "eth0" {
			var err1, err2 error
			f := strings.Fields(counters) // eight of what was received, eight of what was sent: bytes, packets, …
			received, err1 = strconv.Atoi(f[1])
			sent, err2 = strconv.Atoi(f[9])
			require.NoError(t, errors.Join(err1, err2), line)
			return received, sent
		}
	}
	require.FailNow(t, "no eth0", h.Name())
	return 0, 0
}

// A pump that is off the processor for a while must find every frame that came
// meanwhile: a TAP device drops what is beyond its queue, and no counter of the
// lab shows it.
func TestTAPHoldsABurst(t *testing.T) {
	const burst = 5000
	var hostEnd, switchEnd *os.File
	pump := func(a, b *os.File, _ LinkSpec) (func() error, error) {
		hostEnd, switchEnd = a, b
		return func() error { return nil }, nil
	}
	lab := up(t, Topology{Switches: lan, Hosts: []HostSpec{host("a", at()), host("b", LinkSpec{Switch: "lan", Pump: pump, AlwaysPump: true})}})
	for _, row := range []struct {
		from, to *Host
		end      *os.File // where the frames wait
	}{
		{lab.Host("a"), lab.Host("b"), switchEnd},
		{lab.Host("b"), lab.Host("a"), hostEnd},
	} {
		var fd int
		require.NoError(t, row.from.Do(func() (err error) {
			fd, err = unix.Socket(unix.AF_INET, unix.SOCK_DGRAM|unix.SOCK_CLOEXEC, 0)
			return err
		}))
		want := bytes.Repeat([]byte("frame"), 10)
		for range burst {
			require.NoError(t, unix.Sendto(fd, want, 0, &unix.SockaddrInet4{Addr: row.to.Addr().As4(), Port: 9000}))
		}
		require.NoError(t, unix.Close(fd))
		raw, err := row.end.SyscallConn()
		require.NoError(t, err)
		frames := 0
		require.NoError(t, raw.Control(func(fd uintptr) {
			buf := make([]byte, 2048)
			for {
				n, err := unix.Read(int(fd), buf)
				if errors.Is(err, unix.EAGAIN) {
					return
				}
				if err != nil {
					t.Error(err)
					return
				}
				if bytes.HasSuffix(buf[:n], want) {
					frames++
				}
			}
		}))
		assert.Equal(t, burst, frames, "from %s to %s", row.from.Name(), row.to.Name())
	}
}
