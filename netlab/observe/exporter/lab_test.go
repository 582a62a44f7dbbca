package exporter

import (
	"errors"
	"fmt"
	"net/http"
	"net/netip"
	"os"
	"regexp"
	"slices"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"
	"github.com/stretchr/testify/assert"
	"github.com/stretchr/testify/require"
	"golang.org/x/sys/unix"

	"connlab/netlab"
)

// upLab stands up hosts on one switch. Without privilege the test skips with the
// reason, and fails where CONNLAB_STRICT=1.
func upLab(tb testing.TB, names ...string) *netlab.Lab {
	tb.Helper()
	var hosts []netlab.HostSpec
	for _, name := range names {
		hosts = append(hosts, netlab.HostSpec{Name: name, Links: []netlab.LinkSpec{{Switch: "lan"}}})
	}
	lab, err := netlab.Up(tb.Context(), netlab.Topology{
		Switches: []netlab.SwitchSpec{{Name: "lan", Subnet: netip.MustParsePrefix("10.66.0.0/16")}},
		Hosts:    hosts,
	})
	skipUnmet(tb, err)
	require.NoError(tb, err)
	tb.Cleanup(func() { require.NoError(tb, lab.Down()) })
	return lab
}

func skipUnmet(tb testing.TB, err error) {
	tb.Helper()
	if need, ok := errors.AsType[*netlab.NeedError](err); ok {
		if os.Getenv("CONNLAB_STRICT") == "1" {
			tb.Fatal(need)
		}
		tb.Skip(need)
	}
}

// listen makes a listener on the server that nobody accepts from.
func listen(tb testing.TB, lab *netlab.Lab, port uint16, backlog int) {
	tb.Helper()
	server := lab.Host("server")
	fd, err := server.Socket()
	require.NoError(tb, err)
	tb.Cleanup(func() { _ = unix.Close(fd) })
	require.NoError(tb, unix.SetsockoptInt(fd, unix.SOL_SOCKET, unix.SO_REUSEPORT, 1))
	require.NoError(tb, unix.Bind(fd, &unix.SockaddrInet4{Addr: server.Addr().As4(), Port: int(port)}))
	require.NoError(tb, unix.Listen(fd, backlog))
}

// overflow fills the accept queue of a new listener on the server, and returns when it
// has overflowed, so that it is full.
func overflow(tb testing.TB, lab *netlab.Lab, port uint16, backlog, connects int) {
	tb.Helper()
	listen(tb, lab, port, backlog)
	client, server := lab.Host("client"), lab.Host("server")
	for range connects {
		fd, err := client.Socket()
		require.NoError(tb, err)
		tb.Cleanup(func() { _ = unix.Close(fd) })
		err = unix.Connect(fd, &unix.SockaddrInet4{Addr: server.Addr().As4(), Port: int(port)})
		require.ErrorIs(tb, err, unix.EINPROGRESS)
	}
	e := New(nil)
	e.Add("", []*netlab.Host{server})
	eventually(tb, func() error {
		_, body := scrape(tb, e)
		for line := range strings.Lines(body) {
			if strings.HasPrefix(line, "node_netstat_TcpExt_ListenOverflows{") && !strings.HasSuffix(line, " 0\n") {
				return nil
			}
		}
		return fmt.Errorf("no overflow of a backlog of %d by %d connects: %s", backlog, connects, body)
	})
}

// eventually waits until check returns nil, or fails with what it said last.
func eventually(tb testing.TB, check func() error) {
	tb.Helper()
	deadline := time.Now().Add(20 * time.Second)
	for {
		err := check()
		if err == nil {
			return
		}
		if time.Now().After(deadline) {
			require.NoError(tb, err)
		}
		time.Sleep(5 * time.Millisecond)
	}
}

// inode is the label that is another number in each run.
var inode = regexp.MustCompile(`inode="[1-9][0-9]*",`)

// The queue of each socket, even of those that share a port: one can overflow while
// another is empty.
func TestListenQueues(t *testing.T) {
	lab := upLab(t, "client", "server")
	overflow(t, lab, 6379, 4, 20)
	listen(t, lab, 6380, 7)
	listen(t, lab, 6380, 9)
	e := New(nil)
	e.Add("incident", lab.Hosts())
	status, body := scrape(t, e)
	require.Equal(t, http.StatusOK, status, body)
	var got []string
	sockets := map[string]bool{}
	for line := range strings.Lines(body) {
		if strings.HasPrefix(line, "connlab_") {
			sockets[inode.FindString(line)] = true
			got = append(got, inode.ReplaceAllString(strings.TrimSpace(line), ""))
		}
	}
	slices.Sort(got)
	metric := func(name string, port, value int) string {
		return fmt.Sprintf(`connlab_listen_%s{address=%q,host="server",port="%d",variant="incident"} %d`, name, lab.Host("server").Addr(), port, value)
	}
	assert.Empty(t, cmp.Diff([]string{
		metric("depth", 6379, 5), // one more than the limit
		metric("depth", 6380, 0),
		metric("depth", 6380, 0),
		metric("limit", 6379, 4),
		metric("limit", 6380, 7),
		metric("limit", 6380, 9),
	}, got))
	assert.Len(t, sockets, 3, "each has its own inode, with depth and limit")
}

// A Prometheus on the host itself scrapes on its loopback. What is removed is gone from
// the next scrape on, and what is stopped does not listen.
func TestInsideTheNamespace(t *testing.T) {
	lab := upLab(t, "client", "server")
	server := lab.Host("server")
	l, err := Listen(server, netip.MustParseAddrPort("127.0.0.1:9464"))
	require.NoError(t, err)
	_, err = Listen(server, netip.MustParseAddrPort("127.0.0.1:9464"))
	require.ErrorIs(t, err, unix.EADDRINUSE)
	assert.ErrorContains(t, err, "host server: listening at 127.0.0.1:9464: bind: ")
	_, err = Listen(server, netip.MustParseAddrPort("[::1]:9464"))
	require.ErrorContains(t, err, "not an IPv4 address")

	e := New(nil)
	removeServer := e.Add("v", []*netlab.Host{server})
	removeClient := e.Add("v", []*netlab.Host{lab.Host("client")})
	stop := e.Serve(l)
	const url = "http://127.0.0.1:9464/metrics"
	body := get200(t, server, url)
	assert.Contains(t, body, `node_netstat_TcpExt_ListenOverflows{host="server",variant="v"} 0`)
	assert.Contains(t, body, `node_netstat_TcpExt_ListenOverflows{host="client",variant="v"} 0`)
	assert.Contains(t, body, `connlab_listen_depth{address="127.0.0.1",host="server",`, "the listener itself")

	_, _, err = fetch(t, lab.Host("client"), url)
	require.ErrorIs(t, err, unix.ECONNREFUSED, "another host has another loopback")
	status, _, err := fetch(t, server, "http://127.0.0.1:9464/other")
	require.NoError(t, err)
	assert.Equal(t, http.StatusNotFound, status)

	removeClient()
	body = get200(t, server, url)
	assert.Contains(t, body, `host="server"`)
	assert.NotContains(t, body, `host="client"`)
	removeServer()
	assert.Empty(t, get200(t, server, url))

	require.NoError(t, stop())
	_, _, err = fetch(t, server, url)
	require.ErrorIs(t, err, unix.ECONNREFUSED)
}

// A scrape that cannot be complete says so and shows nothing.
func TestScrapeFails(t *testing.T) {
	lab := upLab(t, "client", "server")
	e := New(nil)
	remove := e.Add("v", lab.Hosts())
	e.Add("v", lab.Hosts()[1:])
	status, body := scrape(t, e)
	assert.Equal(t, http.StatusInternalServerError, status)
	assert.Contains(t, body, "was collected before with the same name and label values")
	remove()
	status, body = scrape(t, e)
	assert.Equal(t, http.StatusOK, status, body)

	require.NoError(t, lab.Down())
	status, body = scrape(t, e)
	assert.Equal(t, http.StatusInternalServerError, status)
	assert.Contains(t, body, "variant v: opening counters: host server: ")
	assert.NotContains(t, body, "# TYPE")
}

// Labs come and go under scrapes: none finds a lab that is down.
func TestScrapesWhileLabsComeAndGo(t *testing.T) {
	e := New(nil)
	done := make(chan struct{})
	var wg sync.WaitGroup
	for range 2 {
		wg.Go(func() {
			for {
				select {
				case <-done:
					return
				default:
				}
				status, body := scrape(t, e)
				if !assert.Equal(t, http.StatusOK, status, body) {
					return
				}
			}
		})
	}
	defer wg.Wait()
	defer close(done)
	for i := range 5 {
		lab := upLab(t, "client", "server")
		remove := e.Add(fmt.Sprint(i), lab.Hosts())
		status, body := scrape(t, e)
		assert.Equal(t, http.StatusOK, status)
		assert.Contains(t, body, fmt.Sprintf(`node_sockstat_TCP_tw{host="server",variant="%d"} 0`, i))
		remove()
		require.NoError(t, lab.Down())
	}
}
