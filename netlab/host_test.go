package netlab

import (
	"context"
	"io"
	"net"
	"net/netip"
	"testing"
	"time"

	"github.com/stretchr/testify/assert"
	"github.com/stretchr/testify/require"
	"golang.org/x/sys/unix"
)

// listen accepts on port 7000 of a host and reports each client's address. What
// a client sends is sent back.
func listen(t testing.TB, h *Host) (accepted <-chan netip.AddrPort) {
	t.Helper()
	var l net.Listener
	require.NoError(t, h.Do(func() (err error) {
		l, err = net.Listen("tcp4", ":7000")
		return err
	}))
	t.Cleanup(func() { l.Close() })
	from := make(chan netip.AddrPort, 1000)
	go func() {
		for {
			conn, err := l.Accept()
			if err != nil {
				return // closed
			}
			from <- conn.RemoteAddr().(*net.TCPAddr).AddrPort()
			go func() {
				defer conn.Close()
				// Not conn to conn: that is splice(2), whose pipes stay open in a
				// pool and spoil the count of descriptors.
				_, _ = io.Copy(struct{ io.Writer }{conn}, struct{ io.Reader }{conn})
			}()
		}
	}()
	return from
}

func TestDialContext(t *testing.T) {
	lab := up(t, star(1))
	client, server := lab.Host("client-001"), lab.Host("server")
	require.EqualError(t, server.Listening(7000), "host server: nothing listens on port 7000, nor on any other")
	listen(t, server)
	require.NoError(t, server.Listening(7000))
	require.EqualError(t, server.Listening(7001), "host server: nothing listens on port 7001, only on 0.0.0.0:7000")
	require.EqualError(t, client.Listening(7000), "host client-001: nothing listens on port 7000, nor on any other")

	conn, err := client.DialContext(t.Context(), "tcp", "10.66.0.2:7000")
	require.NoError(t, err)
	defer conn.Close()
	assert.Equal(t, "10.66.0.2:7000", conn.RemoteAddr().String())
	assert.IsType(t, &net.TCPConn{}, conn)
	require.NoError(t, conn.SetDeadline(time.Now().Add(10*time.Second)))
	_, err = io.WriteString(conn, "hello")
	require.NoError(t, err)
	back := make([]byte, 5)
	_, err = io.ReadFull(conn, back)
	require.NoError(t, err)
	assert.Equal(t, "hello", string(back))
}

func TestDialContextErrors(t *testing.T) {
	lab := up(t, star(1))
	client := lab.Host("client-001")
	cancelled, cancel := context.WithCancel(t.Context())
	cancel()
	short, cancel := context.WithTimeout(t.Context(), 100*time.Millisecond)
	defer cancel()
	for _, row := range []struct {
		reason, network, address string
		ctx                      context.Context
		is                       error
		text                     string
	}{
		{"nobody listens", "tcp", "10.66.0.2:7000", t.Context(), unix.ECONNREFUSED, "host client-001: dial 10.66.0.2:7000: connect: connection refused"},
		{"no route", "tcp4", "192.0.2.1:7000", t.Context(), unix.ENETUNREACH, "host client-001: dial 192.0.2.1:7000: connect: network is unreachable"},
		{"no such host: ARP is not answered, the caller's patience ends first", "tcp", "10.66.0.99:7000", short, context.DeadlineExceeded, "host client-001: dial 10.66.0.99:7000: context deadline exceeded"},
		{"cancelled before", "tcp", "10.66.0.99:7000", cancelled, context.Canceled, "host client-001: dial 10.66.0.99:7000: context canceled"},
		{"a name", "tcp", "server:7000", t.Context(), nil, "host client-001: dial tcp server:7000: want tcp and an IPv4 address with a port"},
		{"IPv6", "tcp", "[::1]:7000", t.Context(), nil, "host client-001: dial tcp [::1]:7000: want tcp and an IPv4 address with a port"},
		{"UDP", "udp", "10.66.0.2:7000", t.Context(), nil, "host client-001: dial udp 10.66.0.2:7000: want tcp and an IPv4 address with a port"},
	} {
		t.Run(row.reason, func(t *testing.T) {
			conn, err := client.DialContext(row.ctx, row.network, row.address)
			assert.Nil(t, conn)
			require.EqualError(t, err, row.text)
			if row.is != nil {
				assert.ErrorIs(t, err, row.is)
			}
		})
	}
}
