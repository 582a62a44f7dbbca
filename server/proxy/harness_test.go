package proxy

import (
	"context"
	"errors"
	"io"
	"net"
	"net/netip"
	"os"
	"os/exec"
	"runtime"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"github.com/stretchr/testify/assert"
	"github.com/stretchr/testify/require"
	"golang.org/x/sys/unix"
)

// patience is how long tests wait for what must happen; nothing is measured by it.
const patience = 20 * time.Second

// skip ends a test that lacks something; with CONNLAB_STRICT=1 that is a failure.
func skip(tb testing.TB, reason string) {
	tb.Helper()
	if os.Getenv("CONNLAB_STRICT") == "1" {
		tb.Fatal("CONNLAB_STRICT=1, and " + reason)
	}
	tb.Skip(reason)
}

// start runs a program until the test ends.
func start(tb testing.TB, cmd *exec.Cmd) {
	tb.Helper()
	cmd.SysProcAttr = &unix.SysProcAttr{Pdeathsig: unix.SIGKILL}
	// The parent-death signal goes out when the thread that started the child ends.
	runtime.LockOSThread()
	tb.Cleanup(runtime.UnlockOSThread)
	require.NoError(tb, cmd.Start(), "starting %s", cmd.Path)
	tb.Cleanup(func() {
		_ = cmd.Process.Kill()
		_ = cmd.Wait() // fails if the test waited already
	})
}

// eventually waits for a condition; state is printed if it never holds.
func eventually(tb testing.TB, state func() string, ok func() bool) {
	tb.Helper()
	deadline := time.Now().Add(patience)
	for !ok() {
		require.True(tb, time.Now().Before(deadline), "gave up waiting; last state: %s", state())
		time.Sleep(time.Millisecond)
	}
}

// running is a proxy inside the test.
type running struct {
	*Proxy
	tb   testing.TB
	stop func() // ends Serve, waits for it, and checks that every connection is accounted for
}

// serve runs a proxy until the test ends.
func serve(tb testing.TB, cfg Config) *running {
	tb.Helper()
	p, err := New(cfg)
	require.NoError(tb, err)
	ctx, cancel := context.WithCancel(context.Background())
	done := make(chan error, 1)
	go func() { done <- p.Serve(ctx) }()
	r := &running{Proxy: p, tb: tb}
	r.stop = sync.OnceFunc(func() {
		cancel()
		select {
		case err := <-done:
			assert.NoError(tb, err)
			assert.Zero(tb, p.Stats().Open, "%v", p.Stats())
		case <-time.After(patience):
			tb.Error("Serve did not return after its context was done")
		}
	})
	tb.Cleanup(r.stop)
	return r
}

// waitStats waits until the counters are as wanted; bytes are not looked at.
func (r *running) waitStats(want Stats) {
	r.tb.Helper()
	var got Stats
	eventually(r.tb, func() string { return "have " + got.String() + ", want " + want.String() }, func() bool {
		got = r.Stats()
		got.ToClient, got.ToUpstream = want.ToClient, want.ToUpstream
		return got == want
	})
}

// config listens on loopback and sends every VIP in 127.8.0.0/16 to the same host number in 127.9.0.0/16.
func config(learn Learn, port uint16) Config {
	cfg := DefaultConfig()
	cfg.Addr = netip.MustParseAddrPort("127.0.0.1:0")
	cfg.Learn = learn
	cfg.ConnectTimeout = patience
	cfg.Routes = []Route{{VIPs: netip.MustParsePrefix("127.8.0.0/16"), To: netip.MustParsePrefix("127.9.0.0/16"), Port: port}}
	return cfg
}

// backend is an upstream: it runs a function for each connection, and closes it afterwards.
type backend struct {
	tb              testing.TB
	l               net.Listener
	accepted, ended atomic.Int64
}

func startBackend(tb testing.TB, addr string, handle func(*net.TCPConn)) *backend {
	tb.Helper()
	l, err := net.Listen("tcp4", addr)
	require.NoError(tb, err)
	b := &backend{tb: tb, l: l}
	var wg sync.WaitGroup
	var mu sync.Mutex
	open := map[net.Conn]bool{}
	wg.Go(func() {
		for {
			c, err := l.Accept()
			if err != nil {
				return
			}
			b.accepted.Add(1)
			mu.Lock()
			open[c] = true
			mu.Unlock()
			wg.Go(func() {
				handle(c.(*net.TCPConn))
				_ = c.Close()
				mu.Lock()
				delete(open, c)
				mu.Unlock()
				b.ended.Add(1)
			})
		}
	})
	tb.Cleanup(func() {
		_ = l.Close()
		mu.Lock()
		for c := range open {
			_ = c.Close()
		}
		mu.Unlock()
		wg.Wait()
	})
	return b
}

func (b *backend) addr() string { return b.l.Addr().String() }

func (b *backend) port() uint16 { return addrPort(b.l.Addr().(*net.TCPAddr)).Port() }

func (b *backend) waitFor(what string, ok func() bool) {
	b.tb.Helper()
	eventually(b.tb, func() string { return "waiting for " + what }, ok)
}

// startEcho is a backend that sends back what it gets.
func startEcho(tb testing.TB, addr string) *backend {
	tb.Helper()
	return startBackend(tb, addr, func(c *net.TCPConn) { _, _ = io.Copy(c, c) })
}

// conn is a client.
type conn struct {
	*net.TCPConn
	tb testing.TB
}

func dial(tb testing.TB, addr string) *conn {
	tb.Helper()
	nc, err := net.DialTimeout("tcp4", addr, patience)
	require.NoError(tb, err)
	tb.Cleanup(func() { _ = nc.Close() })
	return &conn{nc.(*net.TCPConn), tb}
}

func (c *conn) say(s string) {
	c.tb.Helper()
	require.NoError(c.tb, c.SetWriteDeadline(time.Now().Add(patience)))
	_, err := io.WriteString(c, s)
	require.NoError(c.tb, err)
}

func (c *conn) hear(want string) {
	c.tb.Helper()
	require.NoError(c.tb, c.SetReadDeadline(time.Now().Add(patience)))
	b := make([]byte, len(want))
	n, err := io.ReadFull(c, b)
	require.NoError(c.tb, err, "after %q", b[:n])
	require.Equal(c.tb, want, string(b))
}

// hearEnd wants a FIN and nothing before it.
func (c *conn) hearEnd() {
	c.tb.Helper()
	require.NoError(c.tb, c.SetReadDeadline(time.Now().Add(patience)))
	n, err := c.Read(make([]byte, 1))
	require.Zero(c.tb, n)
	require.ErrorIs(c.tb, err, io.EOF)
}

// hearReset wants a reset and nothing before it.
func (c *conn) hearReset() {
	c.tb.Helper()
	require.NoError(c.tb, c.SetReadDeadline(time.Now().Add(patience)))
	n, err := c.Read(make([]byte, 1))
	require.Zero(c.tb, n)
	require.ErrorIs(c.tb, err, unix.ECONNRESET)
}

// wantReset connects, says something and wants a reset. Over loopback that may come before connect(2) has been seen to
// succeed, and then is its error.
func wantReset(tb testing.TB, addr, say string) {
	tb.Helper()
	nc, err := net.DialTimeout("tcp4", addr, patience)
	if err != nil {
		require.ErrorIs(tb, err, unix.ECONNRESET)
		return
	}
	defer nc.Close()
	if _, err := io.WriteString(nc, say); err != nil {
		require.True(tb, isReset(err), "%v", err)
		return
	}
	(&conn{nc.(*net.TCPConn), tb}).hearReset()
}

// receive takes a value from a channel.
func receive[T any](tb testing.TB, from <-chan T) T {
	tb.Helper()
	select {
	case v := <-from:
		return v
	case <-time.After(patience):
		require.Fail(tb, "waited in vain for what the backend saw")
		panic("not reached")
	}
}

// openFiles counts the descriptors of this process.
func openFiles(tb testing.TB) int {
	tb.Helper()
	entries, err := os.ReadDir("/proc/self/fd")
	require.NoError(tb, err)
	return len(entries)
}

// isReset reports whether an error is what a reset looks like: a write after it was noticed fails with EPIPE.
func isReset(err error) bool { return errors.Is(err, unix.ECONNRESET) || errors.Is(err, unix.EPIPE) }
