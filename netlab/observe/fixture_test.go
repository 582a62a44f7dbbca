package observe

import (
	"encoding/hex"
	"flag"
	"fmt"
	"net/netip"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/stretchr/testify/assert"
	"github.com/stretchr/testify/require"
	"golang.org/x/sys/unix"
)

// fixtures are the texts and the dump of the server's namespace in
// TestEveryCounterOfThisKernel, which writes them anew with -record.
const fixtures = "testdata/linux-6.18.44"

var record = flag.Bool("record", false, "write the counters and sockets of this kernel to "+fixtures)

func fixture(tb testing.TB, name string) []byte {
	tb.Helper()
	b, err := os.ReadFile(filepath.Join(fixtures, name))
	require.NoError(tb, err)
	return b
}

// recordedSeq is the sequence number of the recorded dump.
const recordedSeq = 1

func recordedDump(tb testing.TB) []byte {
	tb.Helper()
	b, err := hex.DecodeString(strings.Join(strings.Fields(string(fixture(tb, "sock_diag.hex"))), ""))
	require.NoError(tb, err)
	return b
}

// TestEveryCounterOfThisKernel reads a namespace that has seen overflow, closed
// connections, a handshake that waits for data and an ICMP error.
func TestEveryCounterOfThisKernel(t *testing.T) {
	lab := upLab(t, host("client", nil), host("server", nil))
	client, server := lab.Host("client"), lab.Host("server")

	busy := netip.AddrPortFrom(server.Addr(), 6379)
	listen(t, server, busy.Port(), 4)
	connect(t, client, busy, 20)

	deferred := netip.AddrPortFrom(server.Addr(), 6380)
	fd := listen(t, server, deferred.Port(), 8)
	require.NoError(t, unix.SetsockoptInt(fd, unix.IPPROTO_TCP, unix.TCP_DEFER_ACCEPT, 30))
	connect(t, client, deferred, 2)

	closing := netip.AddrPortFrom(server.Addr(), 6381)
	fd = listen(t, server, closing.Port(), 8)
	peers := connect(t, client, closing, 3)
	for _, peer := range peers {
		require.NoError(t, unix.Close(accept(t, fd))) // first: TIME_WAIT is the server's
		require.NoError(t, unix.Shutdown(peer, unix.SHUT_WR))
	}
	require.NoError(t, server.Do(func() error { // nobody listens on port 9: ICMP port unreachable
		udp, err := unix.Socket(unix.AF_INET, unix.SOCK_DGRAM|unix.SOCK_CLOEXEC, 0)
		if err != nil {
			return err
		}
		defer unix.Close(udp)
		return unix.Sendto(udp, []byte("x"), 0, &unix.SockaddrInet4{Addr: client.Addr().As4(), Port: 9})
	}))
	awaitStates(t, server, Query{}, map[State]int{Listen: 3, Established: 5, SynRecv: 2, TimeWait: 3})
	eventually(t, 5*time.Second, func() error {
		c, err := ReadCounters(server)
		if err == nil && (c["TcpExt.ListenDrops"] < 15 || c["IcmpMsg.InType3"] == 0) {
			err = fmt.Errorf("%d ListenDrops, %d ICMP errors", c["TcpExt.ListenDrops"], c["IcmpMsg.InType3"])
		}
		return err
	})

	texts := map[string][]byte{}
	require.NoError(t, server.Do(func() error {
		for _, name := range []string{"netstat", "snmp", "sockstat"} {
			b, err := os.ReadFile("/proc/thread-self/net/" + name)
			if err != nil {
				return err
			}
			texts[name] = b
		}
		return nil
	}))
	got, err := ReadCounters(server)
	require.NoError(t, err)

	want := namesIn(texts)
	assert.Len(t, got, len(want))
	for _, name := range want {
		assert.Contains(t, got, name)
	}
	assert.GreaterOrEqual(t, got["TcpExt.ListenOverflows"], int64(15))
	assert.Equal(t, got["TcpExt.ListenOverflows"], got["TcpExt.ListenDrops"])
	assert.EqualValues(t, len(peers), got["sockstat.TCP.tw"])
	assert.EqualValues(t, 5, got["Tcp.CurrEstab"], "the accept queue of the full listener")
	assert.EqualValues(t, 1, got["IcmpMsg.InType3"], "a name that the kernel prints only now")
	assert.EqualValues(t, -1, got["Tcp.MaxConn"])

	if !*record {
		return
	}
	for name, text := range texts {
		require.NoError(t, os.WriteFile(filepath.Join(fixtures, name), text, 0o644))
	}
	d, err := openDiag(server)
	require.NoError(t, err)
	d.seq = recordedSeq
	require.NoError(t, unix.Sendto(d.fd, Query{}.request(unix.AF_INET, d.seq), 0, &unix.SockaddrNetlink{Family: unix.AF_NETLINK}))
	var dump []byte
	for end := (dumpEnd{}); !end.done; {
		n, _, err := unix.Recvfrom(d.fd, d.buf, 0)
		require.NoError(t, err)
		_, end, err = decodeDatagram(d.buf[:n], d.seq, nil)
		require.NoError(t, err)
		dump = append(dump, d.buf[:n]...)
	}
	require.NoError(t, d.close())
	var lines strings.Builder
	for text := hex.EncodeToString(dump); text != ""; {
		n := min(len(text), 96)
		fmt.Fprintln(&lines, text[:n])
		text = text[n:]
	}
	require.NoError(t, os.WriteFile(filepath.Join(fixtures, "sock_diag.hex"), []byte(lines.String()), 0o644))
}

// namesIn lists the counters of texts in another way than the parser does: the
// first line of each pair, and the first of each two fields of sockstat.
func namesIn(texts map[string][]byte) []string {
	var names []string
	for _, file := range []string{"netstat", "snmp"} {
		for i, line := range strings.Split(strings.TrimSpace(string(texts[file])), "\n") {
			fields := strings.Fields(line)
			for _, f := range fields[1:] {
				if i%2 == 0 {
					names = append(names, strings.TrimSuffix(fields[0], ":")+"."+f)
				}
			}
		}
	}
	for line := range strings.Lines(string(texts["sockstat"])) {
		fields := strings.Fields(line)
		for i := 1; i < len(fields); i += 2 {
			name := "sockstat." + strings.TrimSuffix(fields[0], ":") + "." + fields[i]
			switch fields[i] {
			case "orphan", "alloc", "mem": // the machine's
			default:
				names = append(names, name)
			}
		}
	}
	return names
}
