package netlab

import (
	"context"
	"fmt"
	"net/netip"
	"os"
	"strconv"
	"strings"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"
	"github.com/stretchr/testify/assert"
	"github.com/stretchr/testify/require"
	"github.com/vishvananda/netlink"
	"go.uber.org/goleak"
	"golang.org/x/sys/unix"
)

func TestUpDown120Hosts(t *testing.T) {
	lab := up(t, star(120))
	require.Len(t, lab.Hosts(), 121)
	seen := map[netip.Addr]bool{}
	inodes := map[string]bool{}
	for i, h := range lab.Hosts() {
		assert.Same(t, h, lab.Host(h.Name()))
		assert.Equal(t, LinkVeth, h.LinkKind())
		assert.Equal(t, addr(fmt.Sprintf("10.66.0.%d", i+1)), h.Addr())
		assert.Len(t, h.Addrs(), 1)
		seen[h.Addr()] = true
		inodes[inode(t, h)] = true
	}
	assert.Len(t, seen, 121, "addresses")
	assert.Len(t, inodes, 121, "namespaces")
	assert.Nil(t, lab.Host("nobody"))

	server := lab.Host("server")
	accepted := listen(t, server)
	for _, h := range lab.Hosts()[:120] {
		conn, err := h.DialContext(t.Context(), "tcp", server.Addr().String()+":7000")
		require.NoError(t, err)
		assert.Equal(t, h.Addr().String(), (<-accepted).Addr().String(), "the server sees the client's own address")
		require.NoError(t, conn.Close())
	}
	require.NoError(t, lab.Down())
	require.NoError(t, lab.Down(), "a second time")
}

// inode is the name of the namespace a host is in.
func inode(t testing.TB, h *Host) (name string) {
	t.Helper()
	require.NoError(t, h.Do(func() (err error) {
		name, err = os.Readlink("/proc/thread-self/ns/net")
		return err
	}))
	return name
}

// counter reads one counter of a host's /proc/net/netstat.
func counter(t testing.TB, h *Host, name string) (value int) {
	t.Helper()
	require.NoError(t, h.Do(func() error {
		b, err := os.ReadFile("/proc/thread-self/net/netstat")
		if err != nil {
			return err
		}
		lines := strings.Split(string(b), "\n")
		for i := 0; i+1 < len(lines); i += 2 {
			values := strings.Fields(lines[i+1])
			for j, field := range strings.Fields(lines[i]) {
				if field == name {
					value, err = strconv.Atoi(values[j])
					return err
				}
			}
		}
		return fmt.Errorf("no counter %s", name)
	}))
	return value
}

func TestSysctls(t *testing.T) {
	const key = "net.ipv4.tcp_max_syn_backlog"
	onHost, err := readSysctl(key)
	require.NoError(t, err)
	set := map[string]string{
		"net.core.somaxconn":             "129",
		"net.ipv4.tcp_abort_on_overflow": "1",
		key:                              "77",
		"net.ipv4.ip_local_port_range":   "40000 40099",
		"net.ipv4.conf.all.rp_filter":    "0",
		"net.ipv6.conf.all.disable_ipv6": "0", // one that a lab sets otherwise by itself
	}
	lab := up(t, Topology{Switches: lan, Hosts: []HostSpec{
		{Name: "set", Sysctls: set, Links: []LinkSpec{{Switch: "lan"}}},
		{Name: "plain", Links: []LinkSpec{{Switch: "lan"}}},
	}})
	got := map[string]string{}
	for k := range set {
		got[k], err = lab.Host("set").Sysctl(k)
		require.NoError(t, err)
	}
	assert.Empty(t, cmp.Diff(set, got))

	plain, err := lab.Host("plain").Sysctl("net.ipv4.tcp_abort_on_overflow")
	require.NoError(t, err)
	assert.Equal(t, "0", plain, "the other host")
	after, err := readSysctl(key)
	require.NoError(t, err)
	assert.Equal(t, onHost, after, "the machine itself")

	require.NoError(t, lab.Host("set").SetSysctl("net.core.somaxconn", "4096"), "while it stands")
	now, err := lab.Host("set").Sysctl("net.core.somaxconn")
	require.NoError(t, err)
	assert.Equal(t, "4096", now)

	for _, row := range []struct{ key, value, want, reason string }{
		{"kernel.pid_max", "9", `host set: sysctl "kernel.pid_max": only dotted names below net. are per namespace`, "not below net"},
		{"net.ipv4.nonsense", "9", "host set: unknown sysctl net.ipv4.nonsense: this kernel has no /proc/sys/net/ipv4/nonsense", "no such name"},
		{"net.core.netdev_max_backlog", "9", "host set: sysctl net.core.netdev_max_backlog exists only in the host's own namespace", "not per namespace"},
		{"net.core.somaxconn", "many", `host set: sysctl net.core.somaxconn = "many": write /proc/sys/net/core/somaxconn: invalid argument`, "the kernel refuses"},
		{"net.ipv4.ip_local_port_range", "50000 40000", `host set: sysctl net.ipv4.ip_local_port_range = "50000 40000": write /proc/sys/net/ipv4/ip_local_port_range: invalid argument`, "the kernel refuses"},
		{"net.core.somaxconn", "0x10", `host set: sysctl net.core.somaxconn: wrote "0x10", the kernel made it "16"`, "read back"},
	} {
		assert.EqualError(t, lab.Host("set").SetSysctl(row.key, row.value), row.want, row.reason)
	}
}

func TestAfterDown(t *testing.T) {
	lab := up(t, star(1))
	h := lab.Host("server")
	require.NoError(t, lab.Down())
	require.EqualError(t, h.Do(func() error { return nil }), "host server: the lab is down")
	_, err := h.Socket()
	require.EqualError(t, err, "host server: the lab is down")
	_, err = h.Start(t.Context(), Program{Path: "/bin/true"})
	require.EqualError(t, err, "starting /bin/true: host server: the lab is down")
	_, err = h.Sysctl("net.core.somaxconn")
	require.EqualError(t, err, "host server: the lab is down")
	assert.NoError(t, lab.Down())
}

func TestDoReturnsTheError(t *testing.T) {
	lab := up(t, star(1))
	err := lab.Host("server").Do(func() error { return unix.EMFILE })
	require.ErrorIs(t, err, unix.EMFILE)
	assert.EqualError(t, err, "host server: too many open files")
}

// A test that fails inside Do ends the goroutine of the lab's thread.
func TestDoThatEndsItsGoroutine(t *testing.T) {
	lab := up(t, star(1))
	err := lab.Host("server").Do(func() error {
		new(testing.T).FailNow()
		return nil
	})
	require.EqualError(t, err, "host server: the lab is down")
	assert.NoError(t, lab.Down())
}

func TestUpCancelled(t *testing.T) {
	requireLab(t, CheckPrivilege())
	ctx, cancel := context.WithCancel(t.Context())
	cancel()
	lab, err := Up(ctx, star(3))
	assert.Nil(t, lab)
	assert.ErrorIs(t, err, context.Canceled)
}

// held is what this process holds of the machine.
type held struct{ files, threads int }

func holding(t testing.TB) held {
	t.Helper()
	count := func(dir string) int {
		list, err := os.ReadDir(dir)
		require.NoError(t, err)
		return len(list)
	}
	return held{files: count("/proc/self/fd"), threads: count("/proc/self/task")}
}

// requireNothingMore waits for threads, which end a moment after their
// goroutines; the runtime may have started a few of its own meanwhile.
func requireNothingMore(t testing.TB, before held, labs int) {
	t.Helper()
	require.Less(t, 4, labs/2, "too few labs to tell a thread a lab from the runtime's own")
	await(t, "what was held before", func() (bool, any) {
		now := holding(t)
		return now.files == before.files && now.threads < before.threads+labs/2, fmt.Sprintf("before %+v, after %d labs %+v", before, labs, now)
	})
}

func TestUpErrorLeavesNothing(t *testing.T) {
	requireLab(t, CheckPrivilege())
	defer goleak.VerifyNone(t, goleak.IgnoreCurrent())
	top := star(5)
	// Known to the machine's own namespace, and only to it: found out at the last host.
	top.Hosts[5].Sysctls = map[string]string{"net.core.netdev_max_backlog": "1000"}
	fail := func() {
		lab, err := Up(t.Context(), top)
		assert.Nil(t, lab)
		assert.EqualError(t, err, "host server: sysctl net.core.netdev_max_backlog exists only in the host's own namespace")
	}
	fail()
	before := holding(t)
	const labs = 20
	for range labs {
		fail()
	}
	requireNothingMore(t, before, labs)
}

func TestUpDownLeavesNothing(t *testing.T) {
	requireLab(t, CheckPrivilege())
	defer goleak.VerifyNone(t, goleak.IgnoreCurrent())
	cycle := func() {
		lab, err := Up(t.Context(), star(5))
		require.NoError(t, err)
		for _, contain := range []bool{false, true} {
			_, err = lab.Host("server").Start(t.Context(), Program{Path: "/bin/sleep", Args: []string{"1000"}, Contain: contain})
			require.NoError(t, err)
		}
		require.NoError(t, lab.Down())
	}
	cycle()
	before := holding(t)
	const labs = 20
	for range labs {
		cycle()
	}
	requireNothingMore(t, before, labs)
}

// A link that is up in name only drops what is sent over it, which looks like an
// overflow at the server: not one of the SYNs sent right after Up may need a second try.
func TestLinksCarryWhenUpReturns(t *testing.T) {
	const repeats, burst = 20, 20
	for range repeats {
		lab, err := Up(t.Context(), star(burst))
		requireLab(t, err)
		server := lab.Host("server")
		fd, err := server.Socket()
		require.NoError(t, err)
		require.NoError(t, unix.Bind(fd, &unix.SockaddrInet4{Port: 7000}))
		require.NoError(t, unix.Listen(fd, 100))
		to := &unix.SockaddrInet4{Addr: server.Addr().As4(), Port: 7000}
		var clients [burst]int
		for i := range clients {
			clients[i], err = lab.Hosts()[i].Socket()
			require.NoError(t, err)
		}
		for _, c := range clients {
			require.ErrorIs(t, unix.Connect(c, to), unix.EINPROGRESS)
		}
		for _, c := range clients {
			await(t, "handshake", func() (bool, any) {
				info, err := unix.GetsockoptTCPInfo(c, unix.IPPROTO_TCP, unix.TCP_INFO)
				require.NoError(t, err)
				return info.State == 1, fmt.Sprintf("TCP state %d", info.State)
			})
			require.NoError(t, unix.Close(c))
		}
		for _, h := range lab.Hosts() {
			assert.Zero(t, counter(t, h, "TCPSynRetrans"), h.Name())
		}
		require.NoError(t, unix.Close(fd))
		require.NoError(t, lab.Down())
	}
}

// The burst above rarely meets a link that is late; here one is.
func TestAwaitOperationalWaits(t *testing.T) {
	lab := up(t, star(1))
	sw, rt := lab.switches["lan"], lab.Host("server").rt
	eth0, err := rt.index("eth0")
	require.NoError(t, err)
	require.NoError(t, rt.handle.LinkSetDown(device(eth0)))
	ctx, cancel := context.WithTimeout(t.Context(), 50*time.Millisecond)
	defer cancel()
	require.ErrorIs(t, sw.awaitOperational(ctx), context.DeadlineExceeded)

	require.NoError(t, rt.setUp(eth0))
	require.NoError(t, sw.awaitOperational(t.Context()))
	for _, m := range sw.ports {
		for where, state := range map[string]func() (netlink.LinkOperState, error){
			"host":   func() (netlink.LinkOperState, error) { return m.host.rt.operState(m.iface) },
			"switch": func() (netlink.LinkOperState, error) { return sw.rt.operState(m.port) },
		} {
			got, err := state()
			require.NoError(t, err)
			assert.Equal(t, netlink.LinkOperState(netlink.OperUp), got, "%s: end at the %s", m.host.name, where)
		}
	}
}

func TestTwoSwitchesAndTwoAddresses(t *testing.T) {
	lab := up(t, Topology{
		Switches: switches("lan", "10.0.0.0/24", "wan", "10.0.1.0/24"),
		Hosts: []HostSpec{
			host("left", at()),
			host("both", at("10.0.0.9", "10.0.0.10"), LinkSpec{Switch: "wan"}),
			host("right", LinkSpec{Switch: "wan"}),
		},
	})
	both := lab.Host("both")
	assert.Equal(t, []netip.Addr{addr("10.0.0.9"), addr("10.0.0.10"), addr("10.0.1.1")}, both.Addrs())
	accepted := listen(t, both)
	for _, row := range []struct{ from, to string }{{"left", "10.0.0.9"}, {"left", "10.0.0.10"}, {"right", "10.0.1.1"}} {
		from := lab.Host(row.from)
		conn, err := from.DialContext(t.Context(), "tcp", row.to+":7000")
		require.NoError(t, err, row)
		assert.Equal(t, from.Addr(), (<-accepted).Addr())
		require.NoError(t, conn.Close())
	}
	ctx, cancel := context.WithTimeout(t.Context(), time.Second)
	defer cancel()
	_, err := lab.Host("left").DialContext(ctx, "tcp", "10.0.1.1:7000")
	assert.ErrorIs(t, err, unix.ENETUNREACH, "the switches are not joined")
}
