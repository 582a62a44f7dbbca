package pool

import (
	"fmt"
	"net/netip"
	"strconv"
	"strings"
	"sync"
	"testing"

	"github.com/stretchr/testify/require"
	"golang.org/x/sys/unix"
)

// recorder is a server that notes in which order its connections come and go,
// and does to them what it is told on another port. It is one loop over one
// epoll instance: each descriptor is reported once, is read once, and is armed
// again before the answer is sent. So the order of its record is the order in
// which things reached its host.
type recorder struct {
	data, control netip.AddrPort
	epoll, stop   int
	listeners     [2]int
	peers         map[int]*recorded // by descriptor
	numbers       map[int]int       // descriptor of a connection that is open
	last          int
	record        []string // since the last mark
	awaited       map[int]int
	loop          sync.WaitGroup
}

// recorded is a connection; its number is 0 if it is for control.
type recorded struct {
	number int
	input  string
}

func newRecorder(t testing.TB) *recorder {
	t.Helper()
	r := &recorder{peers: map[int]*recorded{}, numbers: map[int]int{}, awaited: map[int]int{}}
	var err error
	r.epoll, err = unix.EpollCreate1(unix.EPOLL_CLOEXEC)
	require.NoError(t, err)
	r.stop, err = unix.Eventfd(0, unix.EFD_CLOEXEC)
	require.NoError(t, err)
	require.NoError(t, r.arm(unix.EPOLL_CTL_ADD, r.stop))
	for i, addr := range []*netip.AddrPort{&r.data, &r.control} {
		r.listeners[i], *addr = bound(t)
		require.NoError(t, unix.Listen(r.listeners[i], 128))
		require.NoError(t, r.arm(unix.EPOLL_CTL_ADD, r.listeners[i]))
	}
	r.loop.Go(r.run)
	t.Cleanup(r.close)
	return r
}

// bound makes a socket with an address that nobody else gets.
func bound(t testing.TB) (fd int, addr netip.AddrPort) {
	t.Helper()
	fd, err := unix.Socket(unix.AF_INET, unix.SOCK_STREAM|unix.SOCK_NONBLOCK|unix.SOCK_CLOEXEC, 0)
	require.NoError(t, err)
	ip := [4]byte{127, 0, 0, 1}
	require.NoError(t, unix.Bind(fd, &unix.SockaddrInet4{Addr: ip}))
	sa, err := unix.Getsockname(fd)
	require.NoError(t, err)
	return fd, netip.AddrPortFrom(netip.AddrFrom4(ip), uint16(sa.(*unix.SockaddrInet4).Port))
}

// close ends the server and all its connections. It may be called twice.
func (r *recorder) close() {
	if r.stop < 0 {
		return
	}
	_, _ = unix.Write(r.stop, []byte{1, 0, 0, 0, 0, 0, 0, 0})
	r.loop.Wait()
	for fd := range r.peers {
		_ = unix.Close(fd)
	}
	for _, fd := range []int{r.listeners[0], r.listeners[1], r.epoll, r.stop} {
		_ = unix.Close(fd)
	}
	r.stop = -1
}

func (r *recorder) arm(op, fd int) error {
	return unix.EpollCtl(r.epoll, op, fd, &unix.EpollEvent{Events: unix.EPOLLIN | unix.EPOLLONESHOT, Fd: int32(fd)})
}

func (r *recorder) run() {
	events := make([]unix.EpollEvent, 64)
	for {
		n, err := unix.EpollWait(r.epoll, events, -1)
		if err != nil && err != unix.EINTR {
			return
		}
		for _, ev := range events[:max(n, 0)] {
			switch fd := int(ev.Fd); fd {
			case r.stop:
				return
			case r.listeners[0], r.listeners[1]:
				r.accept(fd)
			default:
				r.read(fd)
			}
		}
	}
}

func (r *recorder) accept(listener int) {
	fd, _, err := unix.Accept4(listener, unix.SOCK_NONBLOCK|unix.SOCK_CLOEXEC)
	_ = r.arm(unix.EPOLL_CTL_MOD, listener)
	if err != nil {
		return
	}
	_ = unix.SetsockoptInt(fd, unix.IPPROTO_TCP, unix.TCP_NODELAY, 1)
	p := &recorded{}
	if listener == r.listeners[0] {
		r.last++
		p.number = r.last
		r.numbers[p.number] = fd
		r.record = append(r.record, fmt.Sprintf("accept %d", p.number))
	}
	r.peers[fd] = p
	_ = r.arm(unix.EPOLL_CTL_ADD, fd)
}

func (r *recorder) read(fd int) {
	p := r.peers[fd]
	if p == nil {
		return // closed by an order in the same batch of events
	}
	var b [4096]byte
	n, err := unix.Read(fd, b[:])
	switch {
	case n > 0:
		_ = r.arm(unix.EPOLL_CTL_MOD, fd)
		p.input += string(b[:n])
		for {
			line, rest, complete := strings.Cut(p.input, "\n")
			if !complete {
				return
			}
			p.input = rest
			r.answer(fd, p, line)
		}
	case err == unix.EAGAIN:
		_ = r.arm(unix.EPOLL_CTL_MOD, fd)
	case err != nil:
		r.drop(fd, "reset")
	default:
		r.drop(fd, "fin")
	}
}

// drop closes a connection that the other end has ended.
func (r *recorder) drop(fd int, how string) {
	p := r.peers[fd]
	r.forget(fd)
	if p.number == 0 {
		return
	}
	r.record = append(r.record, fmt.Sprintf("%s %d", how, p.number))
	if control, ok := r.awaited[p.number]; ok {
		r.send(control, "gone")
	}
}

func (r *recorder) forget(fd int) {
	delete(r.numbers, r.peers[fd].number)
	delete(r.peers, fd)
	_ = unix.Close(fd)
}

func (r *recorder) send(fd int, line string) {
	_, _ = unix.Write(fd, []byte(line+"\n")) // a reader that is gone needs no answer
}

// answer does what a line asks for: PING and MORE on a connection, the rest on
// one for control.
func (r *recorder) answer(fd int, p *recorded, line string) {
	verb, argument, _ := strings.Cut(line, " ")
	number, _ := strconv.Atoi(argument)
	target, open := r.numbers[number]
	switch verb {
	case "PING":
		r.send(fd, fmt.Sprintf("pong %d", p.number))
	case "MORE":
		r.send(fd, fmt.Sprintf("pong %d\nand more", p.number))
	case "nop":
		r.send(fd, "ok")
	case "mark":
		r.send(fd, strings.Join(r.record, ", "))
		r.record = nil
	case "await":
		if open {
			r.awaited[number] = fd
			return
		}
		r.send(fd, "gone")
	case "fin", "rst", "push":
		if !open {
			r.send(fd, "gone")
			return
		}
		switch verb {
		case "fin":
			_ = unix.Shutdown(target, unix.SHUT_WR)
		case "rst":
			_ = unix.SetsockoptLinger(target, unix.SOL_SOCKET, unix.SO_LINGER, &unix.Linger{Onoff: 1})
			r.forget(target)
		case "push":
			r.send(target, "unasked")
		}
		r.send(fd, "ok")
	default:
		r.send(fd, "unknown "+line)
	}
}
