package observe

import (
	"errors"
	"fmt"
	"maps"
	"net/netip"
	"os"
	"testing"
	"time"

	"github.com/stretchr/testify/require"
	"golang.org/x/sys/unix"

	"connlab/netlab"
)

// upLab stands up hosts on one switch. Without privilege the test skips with
// the reason, and fails where CONNLAB_STRICT=1.
func upLab(tb testing.TB, hosts ...netlab.HostSpec) *netlab.Lab {
	tb.Helper()
	lab, err := netlab.Up(tb.Context(), netlab.Topology{
		Switches: []netlab.SwitchSpec{{Name: "lan", Subnet: netip.MustParsePrefix("10.66.0.0/16")}},
		Hosts:    hosts,
	})
	skipUnmet(tb, err)
	require.NoError(tb, err)
	tb.Cleanup(func() { require.NoError(tb, lab.Down()) })
	return lab
}

// skipUnmet skips the test for a need that the machine does not meet, with the reason,
// and fails it where CONNLAB_STRICT=1.
func skipUnmet(tb testing.TB, err error) {
	tb.Helper()
	if need, ok := errors.AsType[*netlab.NeedError](err); ok {
		if os.Getenv("CONNLAB_STRICT") == "1" {
			tb.Fatal(need)
		}
		tb.Skip(need)
	}
}

func host(name string, sysctls map[string]string) netlab.HostSpec {
	return netlab.HostSpec{Name: name, Links: []netlab.LinkSpec{{Switch: "lan"}}, Sysctls: sysctls}
}

// listen makes a listener that nobody accepts from.
func listen(tb testing.TB, h *netlab.Host, port uint16, backlog int) (fd int) {
	tb.Helper()
	fd, err := h.Socket()
	require.NoError(tb, err)
	tb.Cleanup(func() { _ = unix.Close(fd) })
	require.NoError(tb, unix.SetsockoptInt(fd, unix.SOL_SOCKET, unix.SO_REUSEADDR, 1))
	require.NoError(tb, unix.Bind(fd, &unix.SockaddrInet4{Addr: h.Addr().As4(), Port: int(port)}))
	require.NoError(tb, unix.Listen(fd, backlog))
	return fd
}

// connect begins n connects and waits for none of them.
func connect(tb testing.TB, from *netlab.Host, to netip.AddrPort, n int) (fds []int) {
	tb.Helper()
	for range n {
		fd, err := from.Socket()
		require.NoError(tb, err)
		tb.Cleanup(func() { _ = unix.Close(fd) })
		err = unix.Connect(fd, &unix.SockaddrInet4{Addr: to.Addr().As4(), Port: int(to.Port())})
		if err != nil {
			require.ErrorIs(tb, err, unix.EINPROGRESS)
		}
		fds = append(fds, fd)
	}
	return fds
}

// accept takes the next connection, once it is there.
func accept(tb testing.TB, listener int) (fd int) {
	tb.Helper()
	eventually(tb, 5*time.Second, func() (err error) {
		fd, _, err = unix.Accept(listener)
		return err
	})
	return fd
}

// awaitStates waits until the host's sockets are in these states.
func awaitStates(tb testing.TB, h *netlab.Host, q Query, want map[State]int) {
	tb.Helper()
	eventually(tb, 5*time.Second, func() error {
		sockets, err := ReadSockets(h, q)
		if err != nil {
			return err
		}
		if got := CountStates(sockets); !maps.Equal(got, want) {
			return fmt.Errorf("host %s has sockets in %v, want %v", h.Name(), got, want)
		}
		return nil
	})
}

// eventually asks until the answer is nil, and fails with the last one.
func eventually(tb testing.TB, within time.Duration, ask func() error) {
	tb.Helper()
	deadline := time.Now().Add(within)
	for {
		last := ask()
		if last == nil {
			return
		}
		if time.Now().After(deadline) {
			tb.Fatalf("after %v: %v", within, last)
		}
		time.Sleep(time.Millisecond)
	}
}
