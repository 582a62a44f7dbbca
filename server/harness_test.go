package server

import (
	"context"
	"net"
	"strings"
	"testing"
	"time"

	"github.com/stretchr/testify/require"

	"connlab/server/resp"
)

// patience is how long tests wait for what must happen; nothing is measured by it.
const patience = 20 * time.Second

// serve runs a server inside the test and returns it.
func serve(tb testing.TB, change func(*Config)) *Server {
	tb.Helper()
	cfg := DefaultConfig()
	cfg.Addr = "127.0.0.1:0"
	if change != nil {
		change(&cfg)
	}
	s, err := New(cfg)
	require.NoError(tb, err)
	ctx, cancel := context.WithCancel(context.Background())
	done := make(chan error, 1)
	go func() { done <- s.Serve(ctx) }()
	tb.Cleanup(func() {
		cancel()
		select {
		case err := <-done:
			require.NoError(tb, err)
		case <-time.After(patience):
			tb.Error("Serve did not return after its context was done")
		}
	})
	return s
}

// conn is a plain client.
type conn struct {
	net.Conn
	tb  testing.TB
	buf []byte
}

func dial(tb testing.TB, addr string) *conn {
	tb.Helper()
	nc, err := net.Dial("tcp4", addr)
	require.NoError(tb, err)
	tb.Cleanup(func() { _ = nc.Close() })
	return &conn{Conn: nc, tb: tb}
}

// send writes a request.
func (c *conn) send(args ...string) {
	c.tb.Helper()
	c.write(string(resp.AppendRequest(nil, args...)))
}

func (c *conn) write(raw string) {
	c.tb.Helper()
	require.NoError(c.tb, c.SetWriteDeadline(time.Now().Add(patience)))
	_, err := c.Write([]byte(raw))
	require.NoError(c.tb, err)
}

// receive returns the next reply.
func (c *conn) receive() resp.Value {
	c.tb.Helper()
	v, err := c.next(patience)
	require.NoError(c.tb, err, "waiting for a reply; have %.200q", c.buf)
	return v
}

// next returns the next reply or the error that came instead.
func (c *conn) next(wait time.Duration) (resp.Value, error) {
	if err := c.SetReadDeadline(time.Now().Add(wait)); err != nil {
		return resp.Value{}, err
	}
	chunk := make([]byte, 64<<10)
	for {
		n, v, err := resp.Decode(c.buf)
		if err != nil {
			return v, err
		}
		if n > 0 {
			c.buf = c.buf[n:len(c.buf):len(c.buf)] // the value points into what was cut off
			return v, nil
		}
		k, err := c.Read(chunk)
		if err != nil {
			return v, err
		}
		c.buf = append(c.buf, chunk[:k]...)
	}
}

// do sends a request and returns the reply.
func (c *conn) do(args ...string) resp.Value {
	c.tb.Helper()
	c.send(args...)
	return c.receive()
}

// text is do for replies that are strings.
func (c *conn) text(args ...string) string {
	c.tb.Helper()
	return string(c.do(args...).Str)
}

// info returns a field of INFO.
func (c *conn) info(field string) string {
	c.tb.Helper()
	text := c.text("INFO")
	require.Contains(c.tb, text, "\n"+field+":")
	return infoField(text, field)
}

func infoField(text, field string) string {
	_, rest, _ := strings.Cut(text, "\n"+field+":")
	value, _, _ := strings.Cut(rest, "\r")
	return value
}

// waitClosed waits until the server has closed the connection and returns what came before.
func (c *conn) waitClosed() (replies []string) {
	c.tb.Helper()
	for {
		v, err := c.next(patience)
		if err != nil {
			require.False(c.tb, isTimeout(err), "the connection was not closed; replies so far %v", replies)
			return replies
		}
		replies = append(replies, v.String())
	}
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

// ask serves one request to a client without a socket and returns the reply.
func ask(tb testing.TB, s *Server, c *client, args ...string) resp.Value {
	tb.Helper()
	c.out = c.out[:0]
	s.feed(c, resp.AppendRequest(nil, args...))
	n, v, err := resp.Decode(c.out)
	require.NoError(tb, err)
	require.Equal(tb, len(c.out), n, "one reply is due, got %q", c.out)
	v.Str = append([]byte(nil), v.Str...) // out is used again
	return v
}
