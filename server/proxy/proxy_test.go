package proxy

import (
	"bufio"
	"bytes"
	"fmt"
	"io"
	"net"
	"net/netip"
	"sync"
	"syscall"
	"testing"
	"time"

	"github.com/pires/go-proxyproto"
	"github.com/stretchr/testify/assert"
	"github.com/stretchr/testify/require"
	"golang.org/x/sys/unix"
)

// name is a backend that says which one it is.
func name(s string) func(*net.TCPConn) {
	return func(c *net.TCPConn) {
		_, _ = io.WriteString(c, s)
		_, _ = io.Copy(io.Discard, c)
	}
}

// One listener, several VIPs that are addresses of this host: each leads to its own upstream, and one without a route
// nowhere.
func TestLearnLocal(t *testing.T) {
	one := startBackend(t, "127.9.0.1:0", name("one"))
	startBackend(t, fmt.Sprintf("127.9.3.232:%d", one.port()), name("two"))
	cfg := config(LearnLocal, one.port())
	cfg.Addr = netip.MustParseAddrPort("0.0.0.0:0")
	p := serve(t, cfg)
	at := func(vip string) string { return fmt.Sprintf("%s:%d", vip, p.Addr().Port()) }

	c1, c2 := dial(t, at("127.8.0.1")), dial(t, at("127.8.3.232"))
	c1.hear("one")
	c2.hear("two")
	wantReset(t, at("127.7.0.1"), "")
	p.waitStats(Stats{Accepted: 3, Open: 2, NoRoute: 1})
	require.NoError(t, c1.CloseWrite())
	c1.hearEnd()
	p.waitStats(Stats{Accepted: 3, Open: 1, NoRoute: 1, Closed: 1})
}

func TestLearnHeader(t *testing.T) {
	echo := startEcho(t, "127.9.0.5:0")
	v1 := "PROXY TCP4 10.1.0.7 127.8.0.5 45000 6379\r\n"
	v2, err := header(netip.MustParseAddrPort("10.1.0.7:45000"), netip.MustParseAddrPort("127.8.0.5:6379"))
	require.NoError(t, err)
	for _, tt := range []struct{ why, header string }{{"version 1", v1}, {"version 2", string(v2)}} {
		t.Run(tt.why, func(t *testing.T) {
			p := serve(t, config(LearnHeader, echo.port()))
			c := dial(t, p.Addr().String())
			c.say(tt.header + "in one segment with the header")
			c.hear("in one segment with the header")
			c.say(", and later")
			c.hear(", and later")
			require.NoError(t, c.CloseWrite())
			c.hearEnd()
			p.waitStats(Stats{Accepted: 1, Closed: 1})
			assert.EqualValues(t, len("in one segment with the header, and later"), p.Stats().ToUpstream)
			assert.Equal(t, p.Stats().ToUpstream, p.Stats().ToClient)
		})
	}
	t.Run("version 2 in pieces", func(t *testing.T) {
		p := serve(t, config(LearnHeader, echo.port()))
		c := dial(t, p.Addr().String())
		for _, b := range v2 {
			c.say(string([]byte{b}))
		}
		c.say("x")
		c.hear("x")
	})
	t.Run("the time for the header does not limit what follows", func(t *testing.T) {
		cfg := config(LearnHeader, echo.port())
		cfg.ConnectTimeout = 100 * time.Millisecond
		p := serve(t, cfg)
		c := dial(t, p.Addr().String())
		c.say(string(v2))
		p.waitStats(Stats{Accepted: 1, Open: 1})
		time.Sleep(2 * cfg.ConnectTimeout) // what must not happen happens within this time
		c.say("x")
		c.hear("x")
	})
	t.Run("the upstream speaks first", func(t *testing.T) {
		greeter := startBackend(t, "127.9.0.6:0", name("hello"))
		p := serve(t, config(LearnHeader, greeter.port()))
		c := dial(t, p.Addr().String())
		c.say("PROXY TCP4 10.1.0.7 127.8.0.6 45000 6379\r\n")
		c.hear("hello")
	})
}

func TestNoVIP(t *testing.T) {
	echo := startEcho(t, "127.0.0.1:0")
	for _, tt := range []struct {
		why            string
		learn          Learn
		sent           string
		withDefault    bool
		served         bool
		connectTimeout time.Duration
		logged         string
	}{
		{"a SYN without the option", LearnOption, "", false, false, patience, "the SYN has no option with a VIP"},
		{"a SYN without the option, and a default", LearnOption, "", true, true, patience, ""},
		{"a health check", LearnHeader, localV2, false, false, patience, "names no IPv4 addresses"},
		{"a health check, and a default", LearnHeader, localV2, true, true, patience, ""},
		{"UNKNOWN, and a default", LearnHeader, "PROXY UNKNOWN\r\n", true, true, patience, ""},
		{"no header, which a default does not excuse", LearnHeader, "*1\r\n$4\r\nPING\r\n", true, false, patience, "signature not present"},
		{"a client that waits for the other to begin", LearnHeader, "", true, false, 50 * time.Millisecond, "i/o timeout"},
	} {
		t.Run(tt.why, func(t *testing.T) {
			cfg := config(tt.learn, 1)
			cfg.ConnectTimeout = tt.connectTimeout
			var log bytes.Buffer
			cfg.Log = &log
			if tt.withDefault {
				cfg.Default = netip.MustParseAddrPort(echo.addr())
			}
			p := serve(t, cfg)
			if tt.served {
				c := dial(t, p.Addr().String())
				c.say(tt.sent + "x")
				c.hear("x")
				require.NoError(t, c.CloseWrite())
				c.hearEnd()
				p.waitStats(Stats{Accepted: 1, Closed: 1})
			} else {
				wantReset(t, p.Addr().String(), tt.sent)
				p.waitStats(Stats{Accepted: 1, NoVIP: 1})
			}
			p.stop()
			if tt.served {
				assert.Empty(t, log.String())
			} else {
				assert.Contains(t, log.String(), tt.logged)
			}
		})
	}
	t.Run("a client that leaves", func(t *testing.T) {
		p := serve(t, config(LearnHeader, 1))
		require.NoError(t, dial(t, p.Addr().String()).Close())
		p.waitStats(Stats{Accepted: 1, NoVIP: 1})
	})
}

// A refused connection is a reset for the client, as it would be without a proxy, whether or not it has sent something.
func TestUpstreamRefuses(t *testing.T) {
	b := startEcho(t, "127.9.0.1:0")
	port := b.port()
	require.NoError(t, b.l.Close())
	cfg := config(LearnLocal, port)
	cfg.Addr = netip.MustParseAddrPort("127.8.0.1:0")
	var log bytes.Buffer
	cfg.Log = &log
	p := serve(t, cfg)
	for i := range int64(20) {
		wantReset(t, p.Addr().String(), []string{"", "PING\r\n"}[i%2])
		p.waitStats(Stats{Accepted: i + 1, UpstreamFailed: i + 1})
	}
	p.stop()
	assert.Contains(t, log.String(), fmt.Sprintf(", VIP %v: dial tcp4 127.9.0.1:%d: connect: connection refused\n", p.Addr(), port))
}

// An upstream whose accept queue is full does not answer a SYN.
func TestUpstreamSilent(t *testing.T) {
	fd, err := unix.Socket(unix.AF_INET, unix.SOCK_STREAM|unix.SOCK_CLOEXEC, 0)
	require.NoError(t, err)
	defer unix.Close(fd)
	require.NoError(t, unix.Bind(fd, &unix.SockaddrInet4{Addr: [4]byte{127, 9, 0, 1}}))
	require.NoError(t, unix.Listen(fd, 0))
	sa, err := unix.Getsockname(fd)
	require.NoError(t, err)
	port := uint16(sa.(*unix.SockaddrInet4).Port)
	dial(t, fmt.Sprintf("127.9.0.1:%d", port)) // takes the one place
	cfg := config(LearnLocal, port)
	cfg.Addr = netip.MustParseAddrPort("127.8.0.1:0")
	cfg.ConnectTimeout = 50 * time.Millisecond
	p := serve(t, cfg)
	dial(t, p.Addr().String()).hearReset()
	p.waitStats(Stats{Accepted: 1, UpstreamFailed: 1})

	cfg.ConnectTimeout = time.Hour
	p = serve(t, cfg)
	c := dial(t, p.Addr().String())
	p.waitStats(Stats{Accepted: 1, Open: 1})
	p.stop() // does not wait for the upstream
	c.hearEnd()
	assert.EqualValues(t, 1, p.Stats().CutOff)
}

func TestSource(t *testing.T) {
	peers := make(chan netip.AddrPort, 10)
	b := startBackend(t, "127.9.0.1:0", func(c *net.TCPConn) {
		peers <- addrPort(c.RemoteAddr().(*net.TCPAddr))
		_, _ = io.Copy(c, c)
	})
	cfg := config(LearnLocal, b.port())
	cfg.Addr = netip.MustParseAddrPort("127.8.0.1:0")
	cfg.Source = netip.MustParseAddr("127.10.0.5")
	p := serve(t, cfg)
	ports := map[uint16]bool{}
	for range 10 {
		c := dial(t, p.Addr().String())
		c.say("x")
		c.hear("x")
		peer := receive(t, peers)
		assert.Equal(t, cfg.Source, peer.Addr())
		ports[peer.Port()] = true
	}
	assert.Len(t, ports, 10, "each connection has a port of its own")

	conn, err := p.dialer.DialContext(t.Context(), "tcp4", b.addr())
	require.NoError(t, err)
	defer conn.Close()
	assert.Equal(t, 1, sockopt(t, conn.(*net.TCPConn), unix.IPPROTO_IP, unix.IP_BIND_ADDRESS_NO_PORT),
		"the port is chosen with the destination in view")
}

// sockopt reads an option of a socket.
func sockopt(t *testing.T, c syscall.Conn, level, opt int) int {
	t.Helper()
	raw, err := c.SyscallConn()
	require.NoError(t, err)
	var v int
	require.NoError(t, raw.Control(func(fd uintptr) { v, err = unix.GetsockoptInt(int(fd), level, opt) }))
	require.NoError(t, err)
	return v
}

func TestPlainTCP(t *testing.T) {
	b := startEcho(t, "127.9.0.1:0")
	p := serve(t, config(LearnOption, b.port()))
	conn, err := p.dialer.DialContext(t.Context(), "tcp4", b.addr())
	require.NoError(t, err)
	defer conn.Close()
	assert.Equal(t, unix.IPPROTO_TCP, sockopt(t, p.listener, unix.SOL_SOCKET, unix.SO_PROTOCOL), "not MPTCP")
	assert.Equal(t, unix.IPPROTO_TCP, sockopt(t, conn.(*net.TCPConn), unix.SOL_SOCKET, unix.SO_PROTOCOL), "not MPTCP")
	assert.Equal(t, 1, sockopt(t, p.listener, unix.SOL_SOCKET, unix.SO_REUSEADDR))
	assert.Equal(t, 1, sockopt(t, p.listener, unix.IPPROTO_TCP, unix.TCP_SAVE_SYN))
	p = serve(t, config(LearnLocal, b.port()))
	assert.Equal(t, unix.IPPROTO_TCP, sockopt(t, p.listener, unix.SOL_SOCKET, unix.SO_PROTOCOL), "not MPTCP")
	assert.Equal(t, 0, sockopt(t, p.listener, unix.IPPROTO_TCP, unix.TCP_SAVE_SYN), "the SYN is kept for those who read it")
}

// headerOf is a backend that echoes what comes behind a header and tells the header.
func headerOf(headers chan<- *proxyproto.Header) func(*net.TCPConn) {
	return func(c *net.TCPConn) {
		r := bufio.NewReader(c)
		h, err := proxyproto.Read(r)
		if err != nil {
			h = nil
		}
		headers <- h
		_, _ = io.Copy(c, r)
	}
}

func TestSendHeader(t *testing.T) {
	headers := make(chan *proxyproto.Header, 1)
	b := startBackend(t, "127.9.0.1:0", headerOf(headers))
	cfg := config(LearnLocal, b.port())
	cfg.Addr = netip.MustParseAddrPort("127.8.0.1:0")
	cfg.SendHeader = true
	p := serve(t, cfg)
	c := dial(t, p.Addr().String())
	h := receive(t, headers) // comes before the client says anything
	require.NotNil(t, h)
	assert.EqualValues(t, 2, h.Version)
	assert.Equal(t, c.LocalAddr().String(), h.SourceAddr.String())
	assert.Equal(t, p.Addr().String(), h.DestinationAddr.String())
	c.say("x")
	c.hear("x")
}

// A layer-7 balancer (VIPs are its own addresses, own source address, sends headers) before proxies that learn from them.
func TestTwoTiers(t *testing.T) {
	headers := make(chan *proxyproto.Header, 2)
	b := startBackend(t, "127.9.0.3:0", headerOf(headers))
	proxyCfg := config(LearnHeader, b.port())
	proxyCfg.SendHeader = true // tells what it learned
	first, second := serve(t, proxyCfg), serve(t, proxyCfg)
	balancerCfg := config(LearnLocal, 1)
	balancerCfg.Addr = netip.MustParseAddrPort("127.8.0.3:0") // host number 3: the second of two
	balancerCfg.Routes = []Route{{VIPs: netip.MustParsePrefix("127.8.0.0/16"), List: []netip.AddrPort{first.Addr(), second.Addr()}}}
	balancerCfg.Source = netip.MustParseAddr("127.10.0.5")
	balancerCfg.SendHeader = true
	balancer := serve(t, balancerCfg)

	c := dial(t, balancer.Addr().String())
	c.say("PING")
	c.hear("PING")
	h := receive(t, headers)
	require.NotNil(t, h)
	assert.Equal(t, c.LocalAddr().String(), h.SourceAddr.String(), "the client's address goes all the way")
	assert.Equal(t, balancer.Addr().String(), h.DestinationAddr.String())
	require.NoError(t, c.CloseWrite())
	c.hearEnd()
	for p, want := range map[*running]Stats{balancer: {Accepted: 1, Closed: 1}, first: {}, second: {Accepted: 1, Closed: 1}} {
		p.waitStats(want)
	}
}

// 500 clients at once, a VIP each: one upstream connection per client, to the right upstream, with its bytes alone.
func TestOneUpstreamEach(t *testing.T) {
	const clients = 500
	echo := startEcho(t, "127.0.0.1:0")
	cfg := config(LearnHeader, 1)
	cfg.Routes = []Route{{VIPs: netip.MustParsePrefix("10.8.0.0/16"), List: []netip.AddrPort{netip.MustParseAddrPort(echo.addr())}}}
	p := serve(t, cfg)
	var wg sync.WaitGroup
	held := make([]*conn, clients)
	for i := range clients {
		wg.Go(func() {
			nc, err := net.DialTimeout("tcp4", p.Addr().String(), patience)
			if !assert.NoError(t, err) {
				return
			}
			_ = nc.SetDeadline(time.Now().Add(patience))
			held[i] = &conn{nc.(*net.TCPConn), t}
			token := fmt.Sprintf("token of client %d", i)
			_, err = fmt.Fprintf(nc, "PROXY TCP4 10.1.0.7 10.8.%d.%d 45000 6379\r\n%s", i>>8, i&255, token)
			assert.NoError(t, err)
			got := make([]byte, len(token))
			_, err = io.ReadFull(nc, got)
			assert.NoError(t, err)
			assert.Equal(t, token, string(got))
		})
	}
	wg.Wait()
	require.False(t, t.Failed())
	assert.EqualValues(t, clients, echo.accepted.Load(), "upstream connections")
	assert.EqualValues(t, clients, p.Stats().Open)
	for _, c := range held {
		require.NoError(t, c.Close())
	}
	p.waitStats(Stats{Accepted: clients, Closed: clients})
	echo.waitFor("every upstream connection to end", func() bool { return echo.ended.Load() == clients })
	assert.EqualValues(t, clients, echo.accepted.Load(), "no more than that")
}

// The end of Serve closes connections in every state and leaves no descriptor (TestMain looks for goroutines).
func TestEndOfServe(t *testing.T) {
	echo := startEcho(t, "127.9.0.5:0")
	for _, idle := range []int{0, 50} {
		p := serve(t, config(LearnHeader, echo.port()))
		before := openFiles(t)
		var relayed, waiting []*conn
		for range idle {
			c := dial(t, p.Addr().String())
			c.say("PROXY TCP4 10.1.0.7 127.8.0.5 45000 6379\r\nx")
			c.hear("x")
			relayed = append(relayed, c)
			waiting = append(waiting, dial(t, p.Addr().String()))
		}
		n := int64(2 * idle)
		p.waitStats(Stats{Accepted: n, Open: n})
		p.stop()
		assert.Equal(t, Stats{Accepted: n, CutOff: n, ToUpstream: n / 2, ToClient: n / 2}, p.Stats())
		for _, c := range append(relayed, waiting...) {
			c.hearEnd()
			require.NoError(t, c.Close())
		}
		_, err := net.DialTimeout("tcp4", p.Addr().String(), patience)
		assert.ErrorIs(t, err, unix.ECONNREFUSED)
		eventually(t, func() string { return fmt.Sprintf("%d descriptors, %d at most expected", openFiles(t), before-1) },
			func() bool { return openFiles(t) <= before-1 }) // the listener is gone, too
	}
}
