package pool

import (
	"bufio"
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"math/rand/v2"
	"net"
	"net/netip"
	"slices"
	"strconv"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	redigo "github.com/gomodule/redigo/redis"
	"github.com/stretchr/testify/assert"
	"github.com/stretchr/testify/require"
)

// faults is a server to pipelines that answers PING token with the token and FAIL
// token with an error of that token, and writes down what came on which connection.
type faults struct {
	seed     uint64
	lifetime int    // commands of a connection before the server breaks it, at most; 0: any number
	reply    string // to PING, with the token in it; "": the token
	slow     int    // one in so many pauses before it sends replies; 0: none

	mu       sync.Mutex
	conns    uint64
	received map[netip.Addr][]uint64 // tokens in order, by the client's address
}

func (f *faults) handle(c *net.TCPConn) {
	f.mu.Lock()
	f.conns++
	random := rand.New(rand.NewPCG(f.seed, f.conns))
	f.mu.Unlock()
	var received []uint64
	defer func() {
		f.mu.Lock()
		defer f.mu.Unlock()
		if f.received == nil {
			f.received = map[netip.Addr][]uint64{}
		}
		client := unmapped(c.RemoteAddr().(*net.TCPAddr).AddrPort()).Addr()
		f.received[client] = append(f.received[client], received...)
	}()
	left := -1
	if f.lifetime > 0 {
		left = 1 + random.IntN(f.lifetime)
	}
	in, out := bufio.NewReader(c), bufio.NewWriter(c)
	for {
		args, err := request(in)
		if err != nil {
			return
		}
		reply := "-ERR unknown command\r\n"
		if command := strings.ToLower(args[0]); len(args) == 2 && (command == "ping" || command == "fail") {
			token, err := strconv.ParseUint(args[1], 10, 64)
			if err != nil {
				return
			}
			received = append(received, token)
			reply = fmt.Sprintf("$%d\r\n%s\r\n", len(args[1]), args[1])
			if f.reply != "" {
				reply = fmt.Sprintf(f.reply, args[1])
			}
			if command == "fail" {
				reply = "-ERR " + args[1] + "\r\n"
			}
			if left--; left == 0 {
				breakConn(c, out, reply, random)
				return
			}
		}
		_, _ = out.WriteString(reply) // an error is that of Flush
		if in.Buffered() > 0 {
			continue
		}
		if f.slow > 0 && random.IntN(f.slow) == 0 {
			time.Sleep(time.Duration(random.IntN(2000)) * time.Microsecond)
		}
		if err := out.Flush(); err != nil {
			return
		}
	}
}

// breakConn ends a connection in one of the ways in which they end. What is in flight
// to the server turns a FIN into RST, as the socket is closed with data unread.
func breakConn(c *net.TCPConn, out *bufio.Writer, reply string, random *rand.Rand) {
	switch random.IntN(5) {
	case 0: // after a part of a reply
		_, _ = out.WriteString(reply[:1+random.IntN(len(reply)-1)])
		_ = out.Flush()
	case 1: // the same, by RST, which overtakes replies
		_, _ = out.WriteString(reply[:1+random.IntN(len(reply)-1)])
		_ = out.Flush()
		_ = c.SetLinger(0)
	case 2: // without the replies that were not sent yet
		_ = c.SetLinger(0)
	case 3: // between two replies
		_ = out.Flush()
	case 4: // what is no RESP
		_, _ = out.WriteString("?\r\n" + reply)
		_ = out.Flush()
	}
}

// wiretap dials, from an address of its own for each connection, and keeps what is
// written.
type wiretap struct {
	fail func() bool // whether a dial fails instead; may be nil

	mu      sync.Mutex
	written map[netip.Addr]*tappedConn
}

type tappedConn struct {
	net.Conn
	batch int // the largest that the dialing Batcher makes
	sent  bytes.Buffer
}

func (c *tappedConn) Write(b []byte) (int, error) {
	c.sent.Write(b) // before: an attempt that fails may have sent it
	return c.Conn.Write(b)
}

var errTestDial = errors.New("dial that fails")

func (r *wiretap) dial(ctx context.Context, addr netip.AddrPort, batch int) (net.Conn, error) {
	r.mu.Lock()
	defer r.mu.Unlock()
	if r.fail != nil && r.fail() {
		return nil, errTestDial
	}
	n := len(r.written) + 1
	local := netip.AddrFrom4([4]byte{127, 1, byte(n >> 8), byte(n)})
	d := net.Dialer{LocalAddr: net.TCPAddrFromAddrPort(netip.AddrPortFrom(local, 0))}
	c, err := d.DialContext(ctx, "tcp4", addr.String())
	if err != nil {
		return nil, err
	}
	tapped := &tappedConn{Conn: c, batch: batch}
	r.written[local] = tapped
	return tapped, nil
}

// tokens are those in what was written on a connection. The last command may be cut
// short: its batch took several writes, of which one failed.
func (c *tappedConn) tokens(t *testing.T) []uint64 {
	var tokens []uint64
	for in := bufio.NewReader(&c.sent); ; {
		args, err := request(in)
		if errors.Is(err, io.EOF) || errors.Is(err, io.ErrUnexpectedEOF) {
			return tokens
		}
		if err != nil || len(args) != 2 {
			require.Fail(t, "no command of the test was written", "%q, %v", args, err)
		}
		token, err := strconv.ParseUint(args[1], 10, 64)
		if err != nil {
			require.NoError(t, err)
		}
		tokens = append(tokens, token)
	}
}

// ending is how the command of a token ended for its caller.
type ending int

const (
	never     ending = iota
	answered         // with its own token
	refused          // with the error of its own token
	left             // its caller's context was done
	notDialed        // errTestDial
	broken           // anything else
	endings
)

func (e ending) String() string {
	return [...]string{"never", "answered", "refused", "left", "not dialed", "broken"}[e]
}

// TestBatchingUnderFaults sends a million commands, while the server breaks
// connections, dials fail and callers leave, and then compares three accounts,
// connection by connection: how each command ended for its caller, what was written,
// and what the server received.
func TestBatchingUnderFaults(t *testing.T) {
	const callers, commandsEach = 200, 5000
	f := &faults{seed: 1, lifetime: 2000, slow: 300}
	s := serve(t, f.handle)
	random := rand.New(rand.NewPCG(2, 2)) // under the wiretap's lock
	r := &wiretap{written: map[netip.Addr]*tappedConn{}, fail: func() bool { return random.IntN(20) == 0 }}
	var batchers []*Batcher
	for _, cfg := range []BatchConfig{
		{Commands: 1},
		{Commands: 3, Delay: ms},
		{Commands: 20, Delay: ms},
		{Commands: 16, Delay: -1},
		{Commands: 500, Delay: ms}, // more than are ever there, and than fit into a write
	} {
		cfg.Dial = func(ctx context.Context, addr netip.AddrPort) (net.Conn, error) {
			return r.dial(ctx, addr, cfg.Commands)
		}
		batchers = append(batchers, NewBatcher(s.addr, cfg))
	}

	type result struct {
		ending ending
		local  netip.Addr // of the connection
	}
	results := make([]result, 1+callers*commandsEach) // by token
	ctx, cancel := context.WithTimeout(t.Context(), 90*time.Second)
	defer cancel()
	var wrong atomic.Int64
	var running sync.WaitGroup
	for caller := range callers {
		running.Go(func() {
			random := rand.New(rand.NewPCG(3, uint64(caller)))
			for i := range commandsEach {
				token := uint64(1 + caller*commandsEach + i)
				b := batchers[random.IntN(len(batchers))]
				command, text := "PING", string(appendToken(nil, token))
				if random.IntN(10) == 0 {
					command = "FAIL"
				}
				ctx, cancel := ctx, context.CancelFunc(func() {})
				if random.IntN(20) == 0 {
					ctx, cancel = context.WithTimeout(ctx, time.Duration(random.IntN(1500))*time.Microsecond)
				}
				reply, local, err := b.do(ctx, command, []any{text})
				cancel()
				end := result{ending: broken, local: local.Addr()}
				refusal, isRefusal := errors.AsType[redigo.Error](err)
				switch {
				case err == nil:
					end.ending = answered
					if b, ok := reply.([]byte); !ok || command != "PING" || string(b) != text {
						wrong.Add(1)
					}
				case isRefusal:
					end.ending = refused
					if command != "FAIL" || string(refusal) != "ERR "+text {
						wrong.Add(1)
					}
				case errors.Is(err, context.DeadlineExceeded):
					end.ending = left
				case errors.Is(err, errTestDial):
					end.ending = notDialed
				}
				results[token] = end
			}
		})
	}
	running.Wait()
	require.NoError(t, ctx.Err(), "some replies never came")
	var stats BatchStats
	for _, b := range batchers {
		stats.add(b.Stats())
		require.NoError(t, b.Close())
	}
	eventually(t, func() (bool, any) { _, open := s.count(); return open == 0, open })
	assert.Zero(t, wrong.Load(), "replies of another command")

	var count [endings]int
	onConn := map[netip.Addr]int{} // commands that ended on a connection
	for _, end := range results[1:] {
		count[end.ending]++
		switch end.ending {
		case answered, refused, broken:
			onConn[end.local]++
		}
	}
	t.Logf("%d connections, %+v", len(r.written), stats)
	for e, n := range count {
		t.Logf("%v: %d", ending(e), n)
		assert.Equal(t, e == int(never), n == 0, "%v: %d", ending(e), n)
	}
	assert.EqualValues(t, len(results)-1, stats.Commands+stats.Canceled+stats.Unsent, "each command is in one column: %+v", stats)
	assert.EqualValues(t, count[left], stats.Canceled+stats.Abandoned)

	seen := make([]bool, len(results))
	totalUnwritten, totalWritten := 0, 0
	for local, c := range r.written {
		written := c.tokens(t)
		totalWritten += len(written)
		received := f.received[local]
		require.LessOrEqual(t, len(received), len(written))
		require.True(t, slices.Equal(written[:len(received)], received), "the server receives what is written, in order")
		failing := false
		for _, token := range written { // testify's checks would take longer than all the rest
			end := results[token]
			ofConn := end.ending == answered || end.ending == refused || end.ending == broken
			switch {
			case seen[token]:
				require.Fail(t, "written twice", "%d", token)
			case !ofConn && end.ending != left:
				require.Fail(t, "written, and ended otherwise", "%d: %v", token, end.ending)
			case ofConn && end.local != local:
				require.Fail(t, "written on one connection and ended on another", "%d: %v, %v, %v", token, local, end.local, end.ending)
			case ofConn && failing && end.ending != broken:
				require.Fail(t, "answered after one that failed", "%d", token)
			}
			seen[token] = true
			if ofConn {
				onConn[local]--
				failing = end.ending == broken
			}
		}
		unwritten := onConn[local]
		if c.batch*(len(tokenPrefix)+tokenLength+2) <= 4096 {
			require.Zero(t, unwritten, "failed without having been written")
		}
		require.LessOrEqual(t, unwritten, c.batch, "of a batch that takes several writes the rest is not written when one fails")
		totalUnwritten += unwritten
		delete(onConn, local)
	}
	assert.Empty(t, onConn, "ended on a connection that was never made")
	missing := int(stats.Commands) - totalWritten
	assert.GreaterOrEqual(t, missing, totalUnwritten)
	assert.LessOrEqual(t, missing-totalUnwritten, int(stats.Abandoned), "given to a connection and not written, of callers that left")
	t.Logf("given to a connection that broke before they were written: %d", missing)
}
