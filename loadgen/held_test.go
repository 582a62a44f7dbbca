package loadgen

import (
	"context"
	"io"
	"net"
	"net/netip"
	"sync"
	"testing"
	"time"

	"github.com/stretchr/testify/assert"
	"github.com/stretchr/testify/require"
	"golang.org/x/sys/unix"
)

// hold opens n connections, all of which must succeed.
func hold(t testing.TB, n int, cfg Config) *Held {
	t.Helper()
	cfg.Schedule = Constant(5000, time.Hour).First(n)
	held, report, err := Hold(t.Context(), cfg)
	require.NoError(t, err)
	t.Cleanup(held.Close)
	require.NoError(t, report.Balanced())
	require.EqualValues(t, n, report.OK, "failed: %v", report.Failed)
	require.Equal(t, n, held.Len())
	return held
}

func TestOperationsOverHeldConnections(t *testing.T) {
	const conns, n = 500, 3000
	target := epollServer(t)
	held := hold(t, conns, Config{Targets: at(target), Sources: []Source{LocalSource("a", netip.MustParseAddr("127.0.0.2")), LocalSource("b", netip.MustParseAddr("127.0.0.3"))}})
	used := map[netip.AddrPort]int{}
	report := load(t, Config{Held: held, Schedule: Constant(2000, n*ms/2), OnOp: func(op Op) {
		if op.Class == OK {
			used[op.Local]++
			assert.Equal(t, []string{"127.0.0.2", "127.0.0.3"}[op.Source], op.Local.Addr().String())
		}
	}})
	assert.EqualValues(t, n, report.Due)
	assert.Empty(t, report.Failed)
	// The server may stand still for a quarter of a second before all
	// connections are busy; a machine that does more often is of no use.
	assert.Less(t, report.NotStarted, int64(n/10))
	assert.Zero(t, report.Connect.Count())
	assert.Len(t, used, conns, "all connections take part")
	assert.Equal(t, conns, held.Len())
	assert.Empty(t, held.Lost())
}

// A look at the connections must not keep a run from beginning.
func TestLenBesideARun(t *testing.T) {
	held := hold(t, 3, Config{Targets: at(epollServer(t))})
	done := make(chan struct{})
	var looking sync.WaitGroup
	looking.Go(func() {
		for {
			select {
			case <-done:
				return
			default:
				held.Len()
			}
		}
	})
	for range 50 {
		report, err := Run(t.Context(), Config{Held: held, Schedule: Burst(1, 0)})
		require.NoError(t, err)
		assert.EqualValues(t, 1, report.OK)
	}
	close(done)
	looking.Wait()
}

func TestLostConnectionsAreNoticed(t *testing.T) {
	const n = 30
	var mu sync.Mutex
	var atServer []*net.TCPConn
	end := make(chan struct{})
	defer close(end)
	target := serve(t, func(c *net.TCPConn) {
		if !request(c) {
			return
		}
		mu.Lock()
		atServer = append(atServer, c)
		mu.Unlock()
		_, _ = c.Write([]byte("+PONG\r\n"))
		<-end
	})
	held := hold(t, n, Config{Targets: at(target)})
	mu.Lock()
	defer mu.Unlock()
	require.Empty(t, held.Lost())
	for i, c := range atServer {
		switch i % 3 {
		case 0:
			require.NoError(t, c.CloseWrite())
		case 1:
			require.NoError(t, c.SetLinger(0))
			require.NoError(t, c.Close())
		}
	}
	_, err := atServer[2].Write([]byte("+unasked\r\n"))
	require.NoError(t, err)
	want := Counts{EOF: 10, ReadReset: 10, BadReply: 1}
	eventually(t, func() (bool, any) {
		lost := held.Lost()
		return assert.ObjectsAreEqual(want, lost), lost
	})
	assert.Equal(t, 9, held.Len())

	// The rest is out of use to nobody but those that are gone.
	report := load(t, Config{Held: held, Schedule: Burst(n, 0), ReplyTimeout: 50 * ms})
	assert.EqualValues(t, n-9, report.NotStarted)
	assert.Equal(t, Counts{ReadTimeout: 9}, report.Failed)
	assert.Zero(t, held.Len(), "a late reply would be taken for the next one's, so a connection does not outlive a timeout")
	assert.Equal(t, want, held.Lost(), "what fails in operation is in the report")
}

func TestLossDuringARun(t *testing.T) {
	var mu sync.Mutex
	var once sync.Once
	var first *net.TCPConn
	target := serve(t, func(c *net.TCPConn) {
		mu.Lock()
		once.Do(func() { first = c })
		mu.Unlock()
		pong(c)
	})
	held := hold(t, 2, Config{Targets: at(target)})
	mu.Lock()
	require.NoError(t, first.CloseWrite())
	mu.Unlock()
	report := load(t, Config{Held: held, Schedule: Constant(100, 100*ms)})
	assert.Empty(t, report.Failed, "nobody was sent to the one that is lost")
	assert.Positive(t, report.OK)
	assert.Equal(t, Counts{EOF: 1}, held.Lost())
	assert.Equal(t, 1, held.Len())
}

func TestAnErrorReplyLeavesTheConnectionInOrder(t *testing.T) {
	target := serve(t, func(c *net.TCPConn) {
		reply := "+PONG\r\n"
		for request(c) {
			if _, err := c.Write([]byte(reply)); err != nil {
				return
			}
			reply = "-LOADING\r\n"
		}
	})
	held := hold(t, 30, Config{Targets: at(target)})
	for range 3 {
		report := load(t, Config{Held: held, Schedule: Burst(30, 0)})
		assert.Equal(t, Counts{ServerError: 30}, report.Failed)
		assert.Equal(t, 30, held.Len())
	}
}

func TestHoldKeepsOnlyWhatIsOK(t *testing.T) {
	held, report, err := Hold(t.Context(), Config{Targets: at(serve(t, answer("-ERR max number of clients reached\r\n"))), Schedule: Burst(5, 0)})
	require.NoError(t, err)
	defer held.Close()
	assert.Equal(t, Counts{ServerError: 5}, report.Failed)
	assert.Zero(t, held.Len())
}

func TestHoldCanceled(t *testing.T) {
	// What was opened before is the caller's, together with the account.
	ctx, cancel := context.WithCancel(t.Context())
	held, report, err := Hold(ctx, Config{Targets: at(serve(t, pong)), Schedule: Merge(Burst(5, 0), Burst(5, time.Hour)), OnOp: func(op Op) {
		if op.Index == 4 {
			cancel()
		}
	}})
	require.ErrorIs(t, err, context.Canceled)
	defer held.Close()
	require.NoError(t, report.Balanced())
	assert.EqualValues(t, 5, report.Due)
	assert.EqualValues(t, report.OK, held.Len())
}

func TestHeldServesOneRunAtATime(t *testing.T) {
	held := hold(t, 2, Config{Targets: at(serve(t, pong))})
	var inner error
	var length int
	report := load(t, Config{Held: held, Schedule: Burst(1, 0), OnOp: func(Op) {
		_, inner = Run(t.Context(), Config{Held: held, Schedule: Burst(1, 0)})
		length = held.Len()
	}})
	assert.EqualValues(t, 1, report.OK)
	require.ErrorContains(t, inner, "in use")
	assert.Equal(t, 2, length, "Len answers during a run")

	held.Close()
	held.Close()
	assert.Zero(t, held.Len())
	_, err := Run(t.Context(), Config{Held: held, Schedule: Burst(1, 0)})
	assert.ErrorContains(t, err, "closed")
}

func TestTargetsInTurn(t *testing.T) {
	const n = 30
	targets, fds := listeners(t, 3)
	answerPings(t, fds)
	// The kernel gives one local port to connections of several targets: only
	// both ends together name one.
	type ends struct{ local, target netip.AddrPort }
	connected := map[ends]bool{}
	held := hold(t, n, Config{Targets: targets, OnOp: func(op Op) {
		assert.Equal(t, targets[op.Index%3], op.Target)
		connected[ends{op.Local, op.Target}] = true
	}})
	require.Len(t, connected, n)
	for _, c := range held.s.conns {
		peer, err := unix.Getpeername(c.fd)
		require.NoError(t, err)
		in := peer.(*unix.SockaddrInet4)
		assert.Contains(t, connected, ends{localAddress(c.fd), netip.AddrPortFrom(netip.AddrFrom4(in.Addr), uint16(in.Port))}, "as the kernel knows it")
	}
	times := map[netip.AddrPort]int{}
	report := load(t, Config{Held: held, Schedule: Constant(1000, n*ms), OnOp: func(op Op) {
		times[op.Target]++
		assert.Contains(t, connected, ends{op.Local, op.Target})
	}})
	require.EqualValues(t, n, report.OK)
	assert.Equal(t, map[netip.AddrPort]int{targets[0]: n / 3, targets[1]: n / 3, targets[2]: n / 3}, times)

	var left []netip.AddrPort
	load(t, Config{Targets: targets, Schedule: Burst(3, 0), MaxInFlight: 1, OnOp: func(op Op) {
		if op.Class == NotStarted {
			left = append(left, op.Target)
		}
	}})
	assert.Subset(t, targets[1:], left, "one that is not started has its target")
}

func TestShutdown(t *testing.T) {
	const n, rate = 20, 200.0
	ended := make(chan error, n)
	target := serve(t, func(c *net.TCPConn) {
		request(c)
		_, _ = c.Write([]byte("+PONG\r\n"))
		_, err := c.Read(make([]byte, 1))
		_, _ = c.Write([]byte("and more")) // is read and means nothing
		ended <- err
	})
	held := hold(t, n, Config{Targets: at(target)})
	begin := time.Now()
	left, err := held.Shutdown(t.Context(), rate)
	require.NoError(t, err)
	assert.Zero(t, left)
	assert.GreaterOrEqual(t, time.Since(begin), (n-1)*time.Second/rate, "not faster than the rate")
	for range n {
		assert.ErrorIs(t, <-ended, io.EOF)
	}
	assert.Zero(t, held.Len())
	assert.Empty(t, held.Lost())
	left, err = held.Shutdown(t.Context(), rate)
	assert.NoError(t, err, "twice")
	assert.Zero(t, left)
	held.Close()
}

func TestShutdownWaitsNoLongerThanAsked(t *testing.T) {
	const n = 5
	end := make(chan struct{})
	defer close(end)
	target := serve(t, func(c *net.TCPConn) {
		request(c)
		_, _ = c.Write([]byte("+PONG\r\n"))
		<-end
	})
	held := hold(t, n, Config{Targets: at(target)})
	ctx, cancel := context.WithTimeout(t.Context(), 50*ms)
	defer cancel()
	left, err := held.Shutdown(ctx, 10_000)
	require.NoError(t, err)
	assert.Equal(t, n, left, "their peers have not closed")
	assert.Zero(t, held.Len())

	held = hold(t, n, Config{Targets: at(target)})
	left, err = held.Shutdown(ctx, 1)
	require.NoError(t, err)
	assert.Equal(t, n, left, "no time for one FIN")

	_, err = held.Shutdown(t.Context(), 0)
	assert.ErrorContains(t, err, "rate")
}
