package pool

import (
	"context"
	"errors"
	"fmt"
	"net"
	"net/netip"
	"os"
	"syscall"
	"testing"
	"time"

	"github.com/stretchr/testify/assert"
	"github.com/stretchr/testify/require"
	"golang.org/x/sys/unix"

	"connlab/loadgen"
)

func TestDialsFromTheProgramsOwnPlace(t *testing.T) {
	for _, address := range []string{"127.0.0.1:0", "[::1]:0"} {
		l, err := net.Listen("tcp", address)
		if errors.Is(err, unix.EADDRNOTAVAIL) || errors.Is(err, unix.EAFNOSUPPORT) {
			continue // a host without IPv6
		}
		require.NoError(t, err)
		defer l.Close()
		to := l.Addr().(*net.TCPAddr).AddrPort()
		c, err := dialHere(t.Context(), to)
		require.NoError(t, err)
		assert.Equal(t, to, c.RemoteAddr().(*net.TCPAddr).AddrPort())
		assert.Implements(t, (*syscall.Conn)(nil), c)
		require.NoError(t, c.Close())
	}
}

func TestDialsFailAsTheHandshakeDoes(t *testing.T) {
	fd, refused := bound(t)
	defer unix.Close(fd)
	_, err := dialHere(t.Context(), refused)
	require.ErrorIs(t, err, unix.ECONNREFUSED)
	assert.Equal(t, loadgen.ConnectRefused, loadgen.ConnectClass(err))

	// The accept queue of backlog 0 holds one: the next SYN gets no answer.
	fd, silent := bound(t)
	defer unix.Close(fd)
	require.NoError(t, unix.Listen(fd, 0))
	first, err := dialHere(t.Context(), silent)
	require.NoError(t, err)
	defer first.Close()
	ctx, cancel := context.WithTimeout(t.Context(), 20*time.Millisecond)
	defer cancel()
	_, err = dialHere(ctx, silent)
	assert.ErrorIs(t, err, context.DeadlineExceeded)
	ctx, cancel = context.WithCancel(t.Context())
	defer time.AfterFunc(20*time.Millisecond, cancel).Stop()
	_, err = dialHere(ctx, silent)
	assert.ErrorIs(t, err, context.Canceled)
}

// TestEachConnectIsCountedByItsOwnResult lets one call of each library meet a Dial
// that always fails.
func TestEachConnectIsCountedByItsOwnResult(t *testing.T) {
	const soon = time.Nanosecond
	for _, c := range []struct {
		why  string
		pool func(Dial) Pool
		err  error
		want Account
	}{
		{
			"redigo dials once, and package net tries three times",
			func(d Dial) Pool { return NewRedigo(RedigoConfig{Dial: d}) },
			os.NewSyscallError("connect", unix.EADDRNOTAVAIL), Account{DialErrors: 1, Connects: 3, NoLocalPort: 3},
		},
		{
			"package net tries no other error again",
			func(d Dial) Pool { return NewRedigo(RedigoConfig{Dial: d}) },
			os.NewSyscallError("connect", unix.ECONNREFUSED), Account{DialErrors: 1, Connects: 1},
		},
		{
			"without a socket there is no connect(2)",
			func(d Dial) Pool { return NewRedigo(RedigoConfig{Dial: d}) },
			os.NewSyscallError("socket", unix.EMFILE), Account{DialErrors: 1},
		},
		{
			"go-redis dials five times unless it is told otherwise, each as package net does",
			func(d Dial) Pool { return NewGoRedis(GoRedisConfig{Dial: d, DialerRetryTimeout: soon}) },
			os.NewSyscallError("connect", unix.EADDRNOTAVAIL), Account{DialErrors: 5, Connects: 15, NoLocalPort: 15},
		},
		{
			"and dials again for any error",
			func(d Dial) Pool { return NewGoRedis(GoRedisConfig{Dial: d, DialerRetryTimeout: soon}) },
			os.NewSyscallError("connect", unix.ECONNREFUSED), Account{DialErrors: 5, Connects: 5},
		},
		{
			"told otherwise",
			func(d Dial) Pool {
				return NewGoRedis(GoRedisConfig{Dial: d, DialerRetries: 2, DialerRetryTimeout: soon})
			},
			os.NewSyscallError("connect", unix.EADDRNOTAVAIL), Account{DialErrors: 2, Connects: 6, NoLocalPort: 6},
		},
		{
			"nginx calls connect(2) once",
			func(d Dial) Pool { return NewCosockets(CosocketConfig{Dial: d}) },
			os.NewSyscallError("connect", unix.EADDRNOTAVAIL), Account{DialErrors: 1, Connects: 1, NoLocalPort: 1},
		},
	} {
		p := c.pool(func(context.Context, netip.AddrPort) (net.Conn, error) {
			return nil, fmt.Errorf("somewhere: %w", c.err)
		})
		l, err := p.Get(t.Context(), Keeps, netip.MustParseAddrPort("127.0.0.1:1"))
		if err == nil {
			err = l.Ping(t.Context())
			_ = l.Return()
		}
		assert.ErrorIs(t, err, c.err, c.why)
		assert.Equal(t, c.want, p.Account(), c.why)
		require.NoError(t, p.Close())
	}
}

func TestAPortThatIsFreeInTheEndIsNoFailedDial(t *testing.T) {
	s := serve(t, redis)
	connects := 0
	p := NewRedigo(RedigoConfig{Dial: func(ctx context.Context, addr netip.AddrPort) (net.Conn, error) {
		if connects++; connects < netTries {
			return nil, os.NewSyscallError("connect", unix.EADDRNOTAVAIL)
		}
		return dialHere(ctx, addr)
	}})
	call(t, p, s, Keeps)
	a := p.Account()
	assert.Equal(t, Account{Dials: 1, Closed: 1, Connects: 3, NoLocalPort: 2, Reads: 1, Writes: 1}, a)
	require.NoError(t, p.Close())
}

// TestPackageNetTriesAsOften gives sockets a range of one local port, which is in
// use for the same destination, and lets both dial.
func TestPackageNetTriesAsOften(t *testing.T) {
	s := serve(t, redis)
	taken, err := dialHere(t.Context(), s.addr)
	require.NoError(t, err)
	defer taken.Close()
	port := int(localAddress(taken).Port())
	onePort := func(fd int) error {
		return unix.SetsockoptInt(fd, unix.IPPROTO_IP, unix.IP_LOCAL_PORT_RANGE, port<<16|port)
	}

	sockets := 0
	var refused error
	d := net.Dialer{ControlContext: func(_ context.Context, _, _ string, c syscall.RawConn) error {
		sockets++
		return errors.Join(c.Control(func(fd uintptr) { refused = onePort(int(fd)) }), refused)
	}}
	_, err = d.DialContext(t.Context(), "tcp4", s.addr.String())
	if errors.Is(refused, unix.ENOPROTOOPT) {
		const reason = "the kernel has no IP_LOCAL_PORT_RANGE: it came with Linux 6.3"
		if os.Getenv("CONNLAB_STRICT") == "1" {
			t.Fatal(reason)
		}
		t.Skip(reason)
	}
	require.ErrorIs(t, err, unix.EADDRNOTAVAIL)
	assert.Equal(t, netTries, sockets)

	l := ledger{dial: func(ctx context.Context, addr netip.AddrPort) (net.Conn, error) {
		family, to := socketAddress(addr)
		fd, err := unix.Socket(family, unix.SOCK_STREAM|unix.SOCK_NONBLOCK|unix.SOCK_CLOEXEC, 0)
		if err != nil {
			return nil, os.NewSyscallError("socket", err)
		}
		f := os.NewFile(uintptr(fd), "")
		defer f.Close()
		return nil, errors.Join(onePort(fd), connect(ctx, f, to))
	}}
	_, err = l.connect(t.Context(), s.addr)
	require.ErrorIs(t, err, unix.EADDRNOTAVAIL)
	assert.Equal(t, loadgen.NoLocalPort, classify(err))
	assert.Equal(t, Account{DialErrors: 1, Connects: int64(sockets), NoLocalPort: int64(sockets)}, l.account())
}
