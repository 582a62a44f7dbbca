package proxy

import (
	"crypto/sha256"
	"fmt"
	"io"
	"math/rand/v2"
	"net"
	"net/netip"
	"sync"
	"testing"
	"time"

	"github.com/stretchr/testify/assert"
	"github.com/stretchr/testify/require"
	"golang.org/x/sys/unix"
)

// through starts a proxy before a backend and returns both.
func through(tb testing.TB, handle func(*net.TCPConn)) (*running, *backend) {
	tb.Helper()
	b := startBackend(tb, "127.9.0.1:0", handle)
	cfg := config(LearnLocal, b.port())
	cfg.Addr = netip.MustParseAddrPort("127.8.0.1:0")
	return serve(tb, cfg), b
}

func TestHalfCloseByClient(t *testing.T) {
	p, _ := through(t, func(c *net.TCPConn) {
		all, err := io.ReadAll(c) // ends with the client's FIN
		assert.NoError(t, err)
		_, _ = fmt.Fprintf(c, "got %q", all)
	})
	c := dial(t, p.Addr().String())
	c.say("question")
	require.NoError(t, c.CloseWrite())
	c.hear(`got "question"`)
	c.hearEnd()
	p.waitStats(Stats{Accepted: 1, Closed: 1})
}

func TestHalfCloseByUpstream(t *testing.T) {
	heard := make(chan string, 1)
	p, _ := through(t, func(c *net.TCPConn) {
		_, _ = io.WriteString(c, "I have said all")
		assert.NoError(t, c.CloseWrite())
		all, err := io.ReadAll(c)
		assert.NoError(t, err)
		heard <- string(all)
	})
	c := dial(t, p.Addr().String())
	c.hear("I have said all")
	c.hearEnd()
	c.say("and I ")
	c.say("not yet")
	require.NoError(t, c.CloseWrite())
	assert.Equal(t, "and I not yet", receive(t, heard))
	p.waitStats(Stats{Accepted: 1, Closed: 1})
}

// A direction that has ended does not end the other, for as long as that takes.
func TestHalfCloseStaysHalf(t *testing.T) {
	goOn := make(chan bool)
	p, _ := through(t, func(c *net.TCPConn) {
		_, _ = io.Copy(io.Discard, c)
		for range goOn {
			_, _ = io.WriteString(c, "tick")
		}
	})
	c := dial(t, p.Addr().String())
	require.NoError(t, c.CloseWrite())
	for range 10 {
		goOn <- true
		c.hear("tick")
	}
	p.waitStats(Stats{Accepted: 1, Open: 1})
	close(goOn)
	c.hearEnd()
	p.waitStats(Stats{Accepted: 1, Closed: 1})
}

// noise returns reproducible bytes and their hash.
func noise(seed uint64, n int) ([]byte, [sha256.Size]byte) {
	b := make([]byte, n)
	r := rand.NewChaCha8([32]byte{byte(seed)})
	_, _ = r.Read(b)
	return b, sha256.Sum256(b)
}

// 10 MB each way at once, with different bytes.
func TestBytesAreIntact(t *testing.T) {
	const size = 10 << 20
	up, upHash := noise(1, size)
	down, downHash := noise(2, size)
	got := make(chan [sha256.Size]byte, 1)
	p, _ := through(t, func(c *net.TCPConn) {
		var wg sync.WaitGroup
		wg.Go(func() {
			_, err := c.Write(down)
			assert.NoError(t, err)
			assert.NoError(t, c.CloseWrite())
		})
		all, err := io.ReadAll(c)
		assert.NoError(t, err)
		got <- sha256.Sum256(all)
		wg.Wait()
	})
	c := dial(t, p.Addr().String())
	require.NoError(t, c.SetDeadline(time.Now().Add(patience)))
	var wg sync.WaitGroup
	wg.Go(func() {
		_, err := c.Write(up)
		assert.NoError(t, err)
		assert.NoError(t, c.CloseWrite())
	})
	all, err := io.ReadAll(c)
	wg.Wait()
	require.NoError(t, err)
	assert.Equal(t, downHash, sha256.Sum256(all))
	assert.Equal(t, upHash, receive(t, got))
	p.waitStats(Stats{Accepted: 1, Closed: 1})
	assert.EqualValues(t, size, p.Stats().ToUpstream)
	assert.EqualValues(t, size, p.Stats().ToClient)
}

func TestResetByClient(t *testing.T) {
	seen := make(chan error, 1)
	p, _ := through(t, func(c *net.TCPConn) {
		_, _ = io.WriteString(c, "hello")
		_, err := io.Copy(io.Discard, c)
		seen <- err
	})
	c := dial(t, p.Addr().String())
	c.hear("hello")
	reset(c.TCPConn)
	assert.ErrorIs(t, receive(t, seen), unix.ECONNRESET, "the upstream sees a reset")
	p.waitStats(Stats{Accepted: 1, ClientReset: 1})
}

func TestResetByUpstream(t *testing.T) {
	p, _ := through(t, func(c *net.TCPConn) {
		_, _ = io.ReadFull(c, make([]byte, 4))
		reset(c)
	})
	c := dial(t, p.Addr().String())
	c.say("PING")
	c.hearReset()
	p.waitStats(Stats{Accepted: 1, UpstreamReset: 1})
}

// A reset is passed on from a connection of which one direction has ended already, too.
func TestResetAfterHalfClose(t *testing.T) {
	p, _ := through(t, func(c *net.TCPConn) {
		_, _ = io.Copy(io.Discard, c)
		reset(c)
	})
	c := dial(t, p.Addr().String())
	require.NoError(t, c.CloseWrite())
	c.hearReset()
	p.waitStats(Stats{Accepted: 1, UpstreamReset: 1})
}

// The upstream resets while bytes for it are on their way, so that either direction of the relay may notice first: the
// client must see a reset and never an end of file. It has stopped writing before it reads, so its read is told.
func TestResetIsNeverAnEnd(t *testing.T) {
	const rounds = 1000
	p, _ := through(t, func(c *net.TCPConn) {
		_, _ = io.ReadFull(c, make([]byte, 1000))
		reset(c)
	})
	told := 0
	for i := range rounds {
		c := dial(t, p.Addr().String())
		var err error
		for range 20 {
			if _, err = c.Write(make([]byte, 1000)); err != nil {
				break // its write was told: nothing is left to read
			}
		}
		if err == nil {
			told++
			require.NoError(t, c.SetReadDeadline(time.Now().Add(patience)))
			_, err = c.Read(make([]byte, 1))
		}
		require.True(t, isReset(err), "round %d: %v", i, err)
		require.NoError(t, c.Close())
	}
	assert.Greater(t, told, rounds/10, "rounds that say something")
	p.waitStats(Stats{Accepted: rounds, UpstreamReset: rounds})
}

// pair returns both ends of a connection over loopback.
func pair(t *testing.T) (ours, theirs *net.TCPConn) {
	t.Helper()
	l, err := net.Listen("tcp4", "127.0.0.1:0")
	require.NoError(t, err)
	defer l.Close()
	ours = dial(t, l.Addr().String()).TCPConn
	c, err := l.Accept()
	require.NoError(t, err)
	t.Cleanup(func() { _ = c.Close() })
	return ours, c.(*net.TCPConn)
}

// The same, step by step: the write of one direction is told of the reset, and the read of the other sees an end of file.
func TestResetThatReadsAsAnEnd(t *testing.T) {
	client, clientPeer := pair(t)
	upstream, upstreamPeer := pair(t)
	r := relay{client: &end{name: "client", conn: client}, upstream: &end{name: "upstream", conn: upstream}}
	reset(upstreamPeer)
	eventually(t, func() string { return "the reset has not arrived" }, r.upstream.wasReset)
	_, err := upstream.Write([]byte("PING"))
	require.ErrorIs(t, err, unix.ECONNRESET)
	_, err = upstream.Read(make([]byte, 1))
	require.ErrorIs(t, err, io.EOF, "what the kernel says the second time")

	r.pump(r.client, r.upstream)
	(&conn{clientPeer, t}).hearReset()
	var broken *resetError
	require.ErrorAs(t, r.first, &broken)
	assert.Equal(t, "upstream", broken.by.name)
}

// A socket that both ends have closed in order is in state CLOSE as well, and was not reset.
func TestEndIsNoReset(t *testing.T) {
	client, clientPeer := pair(t)
	upstream, _ := pair(t)
	r := relay{client: &end{name: "client", conn: client}, upstream: &end{name: "upstream", conn: upstream}}
	require.NoError(t, clientPeer.CloseWrite())
	_, err := client.Read(make([]byte, 1))
	require.ErrorIs(t, err, io.EOF)
	assert.False(t, r.client.wasReset(), "its FIN has come, ours has not gone")
	r.client.ended.Store(true)
	require.NoError(t, client.CloseWrite())
	eventually(t, func() string { return "the last ACK has not arrived" }, func() bool {
		return sockopt(t, client, unix.IPPROTO_TCP, unix.TCP_INFO)&0xff == unix.BPF_TCP_CLOSE
	})
	assert.False(t, r.client.wasReset())
}
