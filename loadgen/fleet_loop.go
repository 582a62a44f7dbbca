package loadgen

import (
	"context"
	"fmt"
	"io"
	"time"
	"unsafe"

	"golang.org/x/sys/unix"
)

// member is one client of a fleet, in 40 bytes.
type member struct {
	fd         int32
	generation int32 // tells events of an earlier connection apart
	place      int32 // in a heap of timers, from 1; 0 is in none
	phase      clientPhase
	failed     uint8 // attempts since the cut, up to 255
	replied    uint8 // bytes of the reply that have come
	pinging    bool  // the connection was open before this attempt

	deadline time.Duration // by which heap it is in: when to try, or when to give up
	since    time.Duration // connect(2), and later the request
	lost     time.Duration // since when it has been without service
}

type clientPhase uint8

const (
	down   clientPhase = iota // no connection and none due
	dueIn                     // no connection, waits for its next attempt
	dialed                    // connect(2) was called
	asking                    // PING is on its way, or its reply
	atRest                    // an open connection without traffic
)

// firstSYNTimeout is when the kernel sends the first SYN again (RFC 6298 section
// 2.1; include/net/tcp.h, TCP_TIMEOUT_INIT).
const firstSYNTimeout = time.Second

const pingReply = "+PONG\r\n"

func (f *Fleet) now() time.Duration { return time.Since(f.begin) }

// each keeps up to Window attempts in flight, until start has no more to begin
// and all have ended.
func (f *Fleet) each(ctx context.Context, start func() bool) error {
	more := true
	err := f.serve(ctx, never, func() bool {
		for more && f.inFlight < f.cfg.Window && ctx.Err() == nil {
			more = start()
		}
		return more || f.inFlight > 0
	})
	f.settle()
	return err
}

// serve turns the loop as long as more says so, at most until the given time.
func (f *Fleet) serve(ctx context.Context, until time.Duration, more func() bool) error {
	for more() {
		if ctx.Err() != nil {
			return context.Cause(ctx)
		}
		if f.now() >= until {
			// What has happened by now belongs to the time before.
			return f.sweep()
		}
		if err := f.turn(until); err != nil {
			return err
		}
	}
	return nil
}

// turn waits for events, at most until the given time or the next timer, deals
// with what there is, and begins what is due.
func (f *Fleet) turn(until time.Duration) error {
	looked := f.now()
	wait := min(until, f.due.next(), f.expiry.next()) - looked
	if wait > 10*time.Millisecond {
		wait -= wait / 128 // as an engine's turn
	}
	// All of them before anything new begins: a connection that waits to be
	// noticed would seem to be the server's delay.
	complete, err := f.events(wait)
	if err == nil && !complete {
		err = f.sweep()
	}
	if err != nil {
		return err
	}
	// What is overdue by the time of the look is so by the server's fault.
	for f.expiry.next() <= looked {
		i, _ := f.expiry.first()
		f.fail(i, phaseOf(f.clients[i].phase), errTimeout)
	}
	for now, begun := f.now(), f.now(); f.due.next() <= now && now-begun < maxPollGap; now = f.now() {
		i, _ := f.due.first()
		f.due.remove(i)
		f.report.Lateness.Record(now - f.clients[i].deadline)
		f.connect(i)
	}
	return nil
}

// events waits for events at most for the given time and deals with them. It
// says whether there were no more.
func (f *Fleet) events(wait time.Duration) (complete bool, err error) {
	events, err := f.poll.wait(wait)
	for _, ev := range events {
		// One with a negative index only ends the wait.
		if ev.Fd >= 0 && f.clients[ev.Fd].generation == ev.Pad {
			f.event(ev.Fd, ev.Events)
		}
	}
	return len(events) < cap(f.poll.ready), err
}

// sweep deals with all events that are there. A server could send new ones for
// ever, so it gives up after many.
func (f *Fleet) sweep() error {
	for range len(f.clients) {
		if complete, err := f.events(0); complete || err != nil {
			return err
		}
	}
	return nil
}

// releaseAll makes clients come back from now on, and gives each that has no
// connection the time of its first attempt.
func (f *Fleet) releaseAll(moment time.Duration) {
	f.reconnecting = true
	var waiting []int32
	for i := range f.clients {
		if f.clients[i].phase == down {
			waiting = append(waiting, int32(i))
		}
	}
	f.rand.Shuffle(len(waiting), func(a, b int) { waiting[a], waiting[b] = waiting[b], waiting[a] })
	for turn, i := range waiting {
		wait := f.jitter()
		if policy := f.cfg.Reconnect; !policy.Jitter {
			wait = time.Duration(float64(policy.Spread) * float64(turn) / float64(len(waiting)))
		}
		f.release(i, moment, wait)
	}
}

// release lets a client without a connection try after a wait.
func (f *Fleet) release(i int32, lost, wait time.Duration) {
	c := &f.clients[i]
	c.phase, c.failed, c.lost = dueIn, 0, lost
	f.due.set(i, lost+wait+f.part(f.cfg.Reconnect.Unsteady))
}

// jitter is a random part of the policy's spread.
func (f *Fleet) jitter() time.Duration { return f.part(f.cfg.Reconnect.Spread) }

// part is a random part of d.
func (f *Fleet) part(d time.Duration) time.Duration {
	if d > 0 {
		return time.Duration(f.rand.Int64N(int64(d)))
	}
	return 0
}

// settle ends everything that is under way or due.
func (f *Fleet) settle() {
	f.reconnecting = false
	for i, ok := f.due.first(); ok; i, ok = f.due.first() {
		f.due.remove(i)
		f.clients[i].phase = down
	}
	for i, ok := f.expiry.first(); ok; i, ok = f.expiry.first() {
		f.fail(i, phaseOf(f.clients[i].phase), context.Canceled)
	}
}

// phaseOf is the phase by which a failure is classified.
func phaseOf(p clientPhase) phase {
	if p == dialed {
		return connecting
	}
	return reading
}

// started counts an attempt.
func (f *Fleet) started(c *member) {
	c.since = f.now()
	f.inFlight++
	f.report.Attempts++
	addStep(&f.report.StartedPer100ms, int((c.since-f.storm)/FleetStep), 1)
}

// connect begins an attempt on a new connection.
func (f *Fleet) connect(i int32) {
	c := &f.clients[i]
	if c.phase == down {
		c.lost, c.failed = f.storm, 0
	}
	c.pinging = false
	f.started(c)
	c.phase, c.fd = dialed, -1
	f.expiry.set(i, c.since+f.cfg.ConnectTimeout)
	fd, err := f.socket(int(i))
	if err != nil {
		f.fail(i, opening, err)
		return
	}
	c.fd = int32(fd)
	c.generation++
	if errno := connect(fd, &f.target); errno != 0 && errno != unix.EINPROGRESS {
		f.fail(i, connecting, errno)
		return
	}
	ev := unix.EpollEvent{Events: unix.EPOLLIN | unix.EPOLLOUT | unix.EPOLLRDHUP | unix.EPOLLET, Fd: i, Pad: c.generation}
	_, _, errno := unix.RawSyscall6(unix.SYS_EPOLL_CTL, uintptr(f.poll.epoll), unix.EPOLL_CTL_ADD, uintptr(fd), uintptr(unsafe.Pointer(&ev)), 0, 0)
	if errno != 0 {
		f.fail(i, connecting, errno)
	}
}

// socket makes the socket of a client, with its source address.
func (f *Fleet) socket(i int) (int, error) {
	fd, _, errno := unix.RawSyscall(unix.SYS_SOCKET, unix.AF_INET, unix.SOCK_STREAM|unix.SOCK_NONBLOCK|unix.SOCK_CLOEXEC, unix.IPPROTO_TCP)
	if errno != 0 {
		return -1, fmt.Errorf("socket: %w", errno)
	}
	if len(f.sources) == 0 {
		return int(fd), nil
	}
	source, on := i%len(f.sources), int32(1)
	_, _, errno = unix.RawSyscall6(unix.SYS_SETSOCKOPT, fd, unix.IPPROTO_IP, unix.IP_BIND_ADDRESS_NO_PORT, uintptr(unsafe.Pointer(&on)), unsafe.Sizeof(on), 0)
	if errno == 0 {
		_, _, errno = unix.RawSyscall(unix.SYS_BIND, fd, uintptr(unsafe.Pointer(&f.sources[source])), unix.SizeofSockaddrInet4)
	}
	if errno != 0 {
		return prepared(int(fd), fmt.Errorf("bind %v: %w", f.cfg.Sources[source], errno))
	}
	return int(fd), nil
}

// event deals with what epoll says of a client's connection.
func (f *Fleet) event(i int32, events uint32) {
	c := &f.clients[i]
	rested := c.phase == atRest
	if c.phase == dialed {
		f.opened(i, events)
	}
	if c.phase == asking && events&^unix.EPOLLOUT != 0 {
		f.read(i)
	}
	// The edge of a close that came with the reply is spent by now.
	if c.phase == atRest && (rested || events&(unix.EPOLLRDHUP|unix.EPOLLHUP|unix.EPOLLERR) != 0) {
		f.look(i)
	}
}

// opened deals with the end of connect(2).
func (f *Fleet) opened(i int32, events uint32) {
	c := &f.clients[i]
	if events&(unix.EPOLLERR|unix.EPOLLHUP) != 0 {
		if errno := socketError(int(c.fd)); errno != 0 {
			f.fail(i, connecting, errno)
			return
		}
	}
	if events&unix.EPOLLOUT == 0 {
		return
	}
	now := f.now()
	f.report.Connect.Record(now - c.since)
	f.countVictim(c, now)
	c.since = now
	f.request(i)
}

// countVictim counts a first attempt whose SYN had to be sent again.
func (f *Fleet) countVictim(c *member, now time.Duration) {
	if c.failed > 0 || c.fd < 0 || now-c.since < firstSYNTimeout/2 {
		return
	}
	info, err := unix.GetsockoptTCPInfo(int(c.fd), unix.IPPROTO_TCP, unix.TCP_INFO)
	if err == nil && info.Total_retrans > 0 {
		f.report.FirstVictims++
	}
}

// ask begins an attempt on the connection that there is.
func (f *Fleet) ask(i int32) {
	c := &f.clients[i]
	c.pinging = true
	f.started(c)
	f.request(i)
}

// request sends PING. The few bytes always fit into the buffer of a connection on
// which everything before was answered.
func (f *Fleet) request(i int32) {
	c := &f.clients[i]
	c.phase, c.replied = asking, 0
	f.expiry.set(i, c.since+f.replyTimeout)
	switch n, errno := send(int(c.fd), ping); {
	case errno != 0:
		f.fail(i, writing, errno)
	case n < len(ping):
		f.fail(i, writing, io.ErrShortWrite)
	}
}

// read takes what has come until the reply is complete or nothing is left.
func (f *Fleet) read(i int32) {
	c := &f.clients[i]
	for {
		n, errno := receive(int(c.fd), f.poll.scratch[:])
		switch {
		case errno == unix.EAGAIN:
			return
		case errno != 0:
			f.fail(i, reading, errno)
			return
		case n == 0:
			f.fail(i, reading, io.EOF)
			return
		}
		if err := c.reply(f.poll.scratch[:n]); err != nil {
			f.fail(i, reading, err)
			return
		}
		if int(c.replied) == len(pingReply) {
			f.replied(i)
			return
		}
	}
}

// reply compares what came with the rest of the reply. It keeps no bytes, so an
// error reply in several pieces is known by its first.
func (c *member) reply(b []byte) error {
	if c.replied == 0 && b[0] == '-' {
		if _, err := RESPReply(b); err != nil {
			return err
		}
		return fmt.Errorf("%w: incomplete", ErrServer)
	}
	rest := pingReply[c.replied:]
	if len(b) > len(rest) || rest[:len(b)] != string(b) {
		return errBadReply
	}
	c.replied += uint8(len(b))
	return nil
}

func (f *Fleet) replied(i int32) {
	c := &f.clients[i]
	now := f.now()
	f.inFlight--
	f.expiry.remove(i)
	f.report.OK++
	f.report.Reply.Record(now - c.since)
	f.report.LastOK = f.begin.Add(now)
	addStep(&f.report.OKPer100ms, int((now-f.storm)/FleetStep), 1)
	if !c.pinging {
		f.report.Recover.Record(now - c.lost)
		f.open.Add(1)
	}
	c.phase, c.failed, c.pinging = atRest, 0, false
}

// look deals with an event on a connection without traffic: whatever can be read
// means that it is lost.
func (f *Fleet) look(i int32) {
	n, errno := receive(int(f.clients[i].fd), f.poll.scratch[:])
	var err error = errno
	switch {
	case errno == unix.EAGAIN:
		return
	case errno == 0 && n == 0:
		err = io.EOF
	case errno == 0:
		err = errBadReply
	}
	f.report.Cut[classify(idle, err)]++
	f.hangUp(i)
	if f.reconnecting {
		f.release(i, f.now(), f.jitter())
	}
}

// fail ends an attempt, and the connection with it.
func (f *Fleet) fail(i int32, p phase, err error) {
	c := &f.clients[i]
	class := classify(p, err)
	f.report.Failed[class]++
	switch class {
	case Other:
		f.report.Causes[string(p)+": "+cause(err)]++
	case ServerError:
		f.report.Causes["reply: "+firstWord(err)]++
	}
	if p == connecting {
		f.countVictim(c, f.now())
	}
	f.inFlight--
	f.expiry.remove(i)
	pinged := c.pinging
	f.hangUp(i)
	if pinged || !f.reconnecting {
		return
	}
	c.failed = min(c.failed, 254) + 1
	c.phase = dueIn
	wait := time.Duration(f.rand.Int64N(int64(f.cfg.Reconnect.after(c.failed)) + 1))
	f.due.set(i, f.now()+wait+f.part(f.cfg.Reconnect.Unsteady))
}

// hangUp closes the connection, if the client has one.
func (f *Fleet) hangUp(i int32) {
	c := &f.clients[i]
	switch c.phase {
	case down, dueIn:
		return
	case atRest:
		f.open.Add(-1)
	case asking:
		if c.pinging {
			f.open.Add(-1)
		}
	}
	if c.fd >= 0 {
		_, _, _ = unix.RawSyscall(unix.SYS_CLOSE, uintptr(c.fd), 0, 0)
	}
	c.generation++
	c.phase, c.pinging = down, false
}
