package loadgen

import (
	"context"
	"errors"
	"fmt"
	"io"
	"net"
	"net/netip"
	"os"
	"sync"
	"testing"
	"time"

	"github.com/stretchr/testify/assert"
	"github.com/stretchr/testify/require"
	"go.uber.org/goleak"
	"golang.org/x/sys/unix"
)

// asFleet makes the test binary be `connlab fleet`: a process of its own.
const asFleet = "CONNLAB_TEST_AS_FLEET"

func TestMain(m *testing.M) {
	if os.Getenv(asFleet) != "" {
		os.Exit(FleetMain(context.Background(), os.Args[1:], os.Stdin, os.Stdout, os.Stderr))
	}
	// The runtime opens its network poller on first use and keeps it: do that
	// before anything counts descriptors.
	l, err := net.Listen("tcp4", "127.0.0.1:0")
	if err != nil {
		panic(err)
	}
	_ = l.Close()
	goleak.VerifyTestMain(m)
}

// at is the one target of a test.
func at(target netip.AddrPort) []netip.AddrPort { return []netip.AddrPort{target} }

// checkDescriptors fails the test if it ends with more open files than now.
func checkDescriptors(t testing.TB) {
	t.Helper()
	count := func() int {
		entries, err := os.ReadDir("/proc/self/fd")
		require.NoError(t, err)
		return len(entries)
	}
	before := count()
	// Another server of the test may be about to close what its clients have closed.
	t.Cleanup(func() {
		eventually(t, func() (bool, any) {
			now := count()
			return now <= before, fmt.Sprintf("%d open files, %d at the beginning", now, before)
		})
	})
}

// serve runs handle in a goroutine for each connection. At the end of the test
// it closes everything and waits for the handlers.
func serve(t testing.TB, handle func(*net.TCPConn)) netip.AddrPort {
	t.Helper()
	checkDescriptors(t)
	l, err := net.ListenTCP("tcp4", &net.TCPAddr{IP: net.IPv4(127, 0, 0, 1)})
	require.NoError(t, err)
	var handlers sync.WaitGroup
	var mu sync.Mutex
	open := map[*net.TCPConn]bool{}
	closed := false
	handlers.Go(func() {
		for {
			c, err := l.AcceptTCP()
			if err != nil {
				return
			}
			mu.Lock()
			if closed {
				_ = c.Close()
			}
			open[c] = true
			mu.Unlock()
			handlers.Go(func() {
				handle(c)
				_ = c.Close()
				mu.Lock()
				delete(open, c)
				mu.Unlock()
			})
		}
	})
	t.Cleanup(func() {
		_ = l.Close()
		mu.Lock()
		closed = true
		for c := range open {
			_ = c.Close()
		}
		mu.Unlock()
		handlers.Wait()
	})
	return l.Addr().(*net.TCPAddr).AddrPort()
}

// request reads one PING and says whether it came.
func request(c *net.TCPConn) bool {
	_, err := io.ReadFull(c, make([]byte, len(ping)))
	return err == nil
}

// pong answers every request.
func pong(c *net.TCPConn) {
	for request(c) {
		if _, err := c.Write([]byte("+PONG\r\n")); err != nil {
			return
		}
	}
}

// answer gives a handler that answers one request with the pieces, each sent
// for itself, and closes.
func answer(pieces ...string) func(*net.TCPConn) {
	return func(c *net.TCPConn) {
		if !request(c) {
			return
		}
		for _, piece := range pieces {
			if _, err := io.WriteString(c, piece); err != nil {
				return
			}
		}
	}
}

// silent never answers.
func silent(c *net.TCPConn) { _, _ = io.Copy(io.Discard, c) }

func resetAfterRequest(c *net.TCPConn) {
	request(c)
	_ = c.SetLinger(0)
}

// listenOnly listens and never accepts: at most backlog+1 connections fit.
func listenOnly(t testing.TB, backlog int) netip.AddrPort {
	t.Helper()
	fd, address := boundSocket(t)
	require.NoError(t, unix.Listen(fd, backlog))
	return address
}

// boundSocket holds a port of 127.0.0.1 on which nobody listens.
func boundSocket(t testing.TB) (fd int, address netip.AddrPort) {
	t.Helper()
	checkDescriptors(t)
	fd, err := unix.Socket(unix.AF_INET, unix.SOCK_STREAM|unix.SOCK_CLOEXEC|unix.SOCK_NONBLOCK, 0)
	require.NoError(t, err)
	t.Cleanup(func() { assert.NoError(t, unix.Close(fd)) })
	require.NoError(t, unix.Bind(fd, &unix.SockaddrInet4{Addr: [4]byte{127, 0, 0, 1}}))
	return fd, localAddress(fd)
}

// eventually waits for a condition and says what it saw last.
func eventually(t testing.TB, reached func() (ok bool, state any)) {
	t.Helper()
	var state any
	for deadline := time.Now().Add(10 * time.Second); time.Now().Before(deadline); time.Sleep(time.Millisecond) {
		var ok bool
		if ok, state = reached(); ok {
			return
		}
	}
	t.Fatalf("not reached within 10 s; last seen: %v", state)
}

// epollServer answers PINGs from one thread, for loads that goroutines would
// not keep up with. It returns the address; the test's end stops it.
func epollServer(t testing.TB) netip.AddrPort {
	t.Helper()
	listener, address := boundSocket(t)
	require.NoError(t, unix.Listen(listener, 4096))
	answerPings(t, []int{listener})
	return address
}

// population is the number of connections that a server has had at one time.
type population struct {
	mu   sync.Mutex
	most int
}

func (p *population) set(n int) {
	p.mu.Lock()
	defer p.mu.Unlock()
	p.most = max(n, p.most)
}

func (p *population) peak() int {
	p.mu.Lock()
	defer p.mu.Unlock()
	return p.most
}

// answerPings answers on all connections of the listeners, from one thread,
// until the end of the test.
func answerPings(t testing.TB, listeners []int) *population {
	t.Helper()
	s, err := newSockets()
	require.NoError(t, err)
	for i, listener := range listeners {
		require.NoError(t, unix.EpollCtl(s.epoll, unix.EPOLL_CTL_ADD, listener, &unix.EpollEvent{Events: unix.EPOLLIN, Fd: -1, Pad: int32(i)}))
	}
	p := new(population)
	done := make(chan struct{})
	var loop sync.WaitGroup
	loop.Go(func() {
		for {
			select {
			case <-done:
				return
			default:
			}
			events, err := s.wait(100 * time.Millisecond)
			if err != nil {
				t.Error(err)
				return
			}
			for _, ev := range events {
				if ev.Fd < 0 {
					acceptAll(t, s, listeners[ev.Pad])
				} else if c := s.of(ev); c != nil {
					pongRaw(s, c)
				}
			}
			p.set(len(s.conns) - len(s.free))
		}
	})
	t.Cleanup(func() { close(done); loop.Wait(); s.close(Graceful) })
	return p
}

func acceptAll(t testing.TB, s *sockets, listener int) {
	for {
		fd, _, err := unix.Accept4(listener, unix.SOCK_NONBLOCK|unix.SOCK_CLOEXEC)
		if err != nil {
			if !errors.Is(err, unix.EAGAIN) {
				t.Error(err)
			}
			return
		}
		c := s.slot()
		c.fd = fd
		if errno := s.watch(c); errno != 0 {
			t.Error(errno)
		}
	}
}

func pongRaw(s *sockets, c *conn) {
	for {
		n, errno := receive(c.fd, s.scratch[:])
		switch {
		case errno == unix.EAGAIN:
			return
		case errno != 0 || n == 0:
			s.drop(c, Graceful)
			return
		}
		if _, errno := send(c.fd, []byte("+PONG\r\n")); errno != 0 {
			s.drop(c, Graceful)
			return
		}
	}
}
