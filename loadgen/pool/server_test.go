package pool

import (
	"bufio"
	"fmt"
	"io"
	"net"
	"net/netip"
	"strconv"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/stretchr/testify/require"
)

// testServer is a server that keeps a log of its connections.
type testServer struct {
	addr netip.AddrPort

	mu       sync.Mutex
	accepted map[netip.AddrPort]int // number of the connection from a client's address, from 1
	open     int
}

// serve runs handle in a goroutine for each connection until the end of the test.
func serve(t testing.TB, handle func(*net.TCPConn)) *testServer {
	t.Helper()
	l, err := net.ListenTCP("tcp4", &net.TCPAddr{IP: net.IPv4(127, 0, 0, 1)})
	require.NoError(t, err)
	s := &testServer{addr: l.Addr().(*net.TCPAddr).AddrPort(), accepted: map[netip.AddrPort]int{}}
	var handlers sync.WaitGroup
	var conns []*net.TCPConn // of the accepting goroutine
	handlers.Go(func() {
		for {
			c, err := l.AcceptTCP()
			if err != nil {
				break
			}
			conns = append(conns, c)
			s.mu.Lock()
			s.accepted[unmapped(c.RemoteAddr().(*net.TCPAddr).AddrPort())] = len(conns)
			s.open++
			s.mu.Unlock()
			handlers.Go(func() {
				handle(c)
				_ = c.Close()
				s.mu.Lock()
				s.open--
				s.mu.Unlock()
			})
		}
		for _, c := range conns {
			_ = c.Close()
		}
	})
	t.Cleanup(func() { _ = l.Close(); handlers.Wait() })
	return s
}

// number is that of the connection from a client's address, or 0.
func (s *testServer) number(client netip.AddrPort) int {
	s.mu.Lock()
	defer s.mu.Unlock()
	return s.accepted[client]
}

func (s *testServer) count() (accepted, open int) {
	s.mu.Lock()
	defer s.mu.Unlock()
	return len(s.accepted), s.open
}

// redis answers as a server of RESP2 does: PING with and without an argument,
// and an error to everything else.
func redis(c *net.TCPConn) {
	in := bufio.NewReader(c)
	for {
		args, err := request(in)
		if err != nil {
			return
		}
		reply := "-ERR unknown command\r\n"
		if strings.EqualFold(args[0], "ping") {
			reply = "+PONG\r\n"
			if len(args) > 1 {
				reply = fmt.Sprintf("$%d\r\n%s\r\n", len(args[1]), args[1])
			}
		}
		if _, err := io.WriteString(c, reply); err != nil {
			return
		}
	}
}

// request reads an array of bulk strings.
func request(in *bufio.Reader) ([]string, error) {
	size := func() (int, error) {
		line, err := in.ReadString('\n')
		if err != nil {
			return 0, err
		}
		return strconv.Atoi(strings.TrimSpace(line[1:]))
	}
	n, err := size()
	if err != nil {
		return nil, err
	}
	args := make([]string, n)
	for i := range args {
		length, err := size()
		if err != nil {
			return nil, err
		}
		body := make([]byte, length+2)
		if _, err := io.ReadFull(in, body); err != nil {
			return nil, err
		}
		args[i] = string(body[:length])
	}
	return args, nil
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
