package proxy

import (
	"errors"
	"fmt"
	"io"
	"net"
	"sync"
	"sync/atomic"

	"golang.org/x/sys/unix"
)

// end is one end of a relay.
type end struct {
	name  string
	conn  *net.TCPConn
	ended atomic.Bool  // the relay has ended its own direction (sent a FIN)
	taken atomic.Int64 // bytes read from it that the other end took
}

// resetError says which end of a relay broke the connection, and how it was noticed.
type resetError struct {
	by  *end
	err error
}

func (e *resetError) Error() string { return fmt.Sprintf("reset by the %s: %v", e.by.name, e.err) }

func (e *resetError) Unwrap() error { return e.err }

// relay passes bytes between two connections until both directions have ended, and closes both.
type relay struct {
	client, upstream *end

	once  sync.Once
	first error // what ended the relay before its time
}

// bufferSize is what one read can bring. Replies that are longer come in several.
const bufferSize = 32 << 10

var buffers = sync.Pool{New: func() any { return new([bufferSize]byte) }}

// run returns nil when both ends have closed in order, a [resetError] if one broke the connection (it was then broken to
// the other as well), and an error that is [net.ErrClosed] if the connections were closed by somebody else.
func (r *relay) run() error {
	var wg sync.WaitGroup
	wg.Go(func() { r.pump(r.upstream, r.client) })
	r.pump(r.client, r.upstream)
	wg.Wait()
	_ = r.client.conn.Close()
	_ = r.upstream.conn.Close()
	return r.first
}

// pump passes one direction. A reset is noticed by the next read from that end or write to it. Two are therefore noticed
// late: that of an end which has sent a FIN before, when there is something to write to it, and that of an end whose bytes
// the other does not take, when it takes them.
func (r *relay) pump(to, from *end) {
	buf := buffers.Get().(*[bufferSize]byte)
	defer buffers.Put(buf)
	for {
		n, err := from.conn.Read(buf[:])
		if n > 0 {
			if _, err := to.conn.Write(buf[:n]); err != nil {
				r.abort(to, err)
				return
			}
			from.taken.Add(int64(n))
		}
		switch {
		case errors.Is(err, io.EOF):
			if from.wasReset() {
				r.abort(from, unix.ECONNRESET)
				return
			}
			to.ended.Store(true)
			// It fails if that end has been reset, which the other direction finds out.
			_ = to.conn.CloseWrite()
			return
		case err != nil:
			r.abort(from, err)
			return
		}
	}
}

// wasReset reports whether what reads as the end of a connection is a reset. The kernel reports a reset once, to whoever
// comes first (net/core/sock.c, sock_error): if that is the other direction's write, this one's read sees an end of file.
// A socket that was reset is in state CLOSE; after a FIN alone it cannot be as long as no FIN was sent to that end.
func (e *end) wasReset() bool {
	raw, err := e.conn.SyscallConn()
	if err != nil {
		return false // closed here: no reset
	}
	var info *unix.TCPInfo
	var infoErr error
	err = raw.Control(func(fd uintptr) {
		info, infoErr = unix.GetsockoptTCPInfo(int(fd), unix.IPPROTO_TCP, unix.TCP_INFO)
	})
	// In this order: a FIN of ours that led to CLOSE was noted before it was sent.
	return err == nil && infoErr == nil && info.State == unix.BPF_TCP_CLOSE && !e.ended.Load()
}

// abort breaks both connections: their ends are sent a reset. Only the first reason counts.
func (r *relay) abort(by *end, err error) {
	r.once.Do(func() {
		if errors.Is(err, net.ErrClosed) { // Serve ends: both are being closed in order
			r.first = err
			_ = r.client.conn.Close()
			_ = r.upstream.conn.Close()
			return
		}
		r.first = &resetError{by, err}
		reset(r.client.conn)
		reset(r.upstream.conn)
	})
}

// reset closes a connection with a reset instead of a FIN (net/ipv4/tcp.c, __tcp_close: a linger time of 0).
func reset(c *net.TCPConn) {
	_ = c.SetLinger(0) // fails if it is closed already
	_ = c.Close()
}
