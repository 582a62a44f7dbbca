package loadgen

import (
	"context"
	"errors"
	"fmt"
	"io"
	"math"
	"runtime"
	"strings"
	"time"

	"golang.org/x/sys/unix"
)

const never = time.Duration(math.MaxInt64)

// maxPollGap is how long an engine that is behind its schedule starts
// operations back to back before it looks at its sockets again. It keeps a
// burst dense without starving the replies.
const maxPollGap = time.Millisecond

// engine is one run: a loop of waiting for events until the next operation is
// due, and starting it.
type engine struct {
	cfg     Config
	s       *sockets
	keep    bool // connections outlive their operations
	targets []unix.RawSockaddrInet4
	report  *Report

	connecting list // in order of connect(2)
	replying   list // in order of the time from which ReplyTimeout counts; also those that wait for the server's FIN
	inFlight   int

	again []int // operations to start once more, by index

	polled   time.Duration // when the sockets were last looked at
	stopped  bool          // the context is done, or the wait failed
	stopTime time.Duration
	failure  error
}

func newEngine(cfg Config, s *sockets, keep bool) *engine {
	e := &engine{cfg: cfg, s: s, keep: keep, report: NewReport()}
	if cfg.Held == nil {
		for _, target := range cfg.Targets {
			e.targets = append(e.targets, socketAddress(target))
		}
	}
	return e
}

func (e *engine) now() time.Duration { return time.Since(e.report.Start) }

func (e *engine) run(ctx context.Context) (*Report, error) {
	runtime.LockOSThread()
	defer runtime.UnlockOSThread()
	restore, err := preciseTimers()
	if err != nil {
		return nil, fmt.Errorf("load: %w", err)
	}
	defer restore()
	unwatch, err := e.s.wakeWhenDone(ctx)
	if err != nil {
		return nil, fmt.Errorf("load: %w", err)
	}
	defer unwatch()

	e.report.Start = time.Now()
	e.polled = -maxPollGap // held connections may have been lost before
	if ctx.Err() != nil {
		e.stop(context.Cause(ctx))
	}
	index := 0
	for due := range e.cfg.Schedule {
		e.turnUntil(ctx, due)
		if e.stopped && due > e.stopTime {
			break
		}
		if e.full() {
			e.turn(ctx, 0) // there may be room that has gone unnoticed
		}
		e.begin(index, due)
		index++
	}
	for (e.inFlight > 0 || len(e.again) > 0) && !e.stopped {
		e.turn(ctx, never)
	}
	e.cancel(&e.connecting)
	e.cancel(&e.replying)
	e.report.End = time.Now()
	if e.failure != nil {
		return e.report, fmt.Errorf("load: %w", e.failure)
	}
	return e.report, nil
}

func (e *engine) stop(cause error) {
	e.stopped, e.failure, e.stopTime = true, cause, e.now()
}

// turnUntil serves the connections until due. It returns early only if the run
// has stopped.
func (e *engine) turnUntil(ctx context.Context, due time.Duration) {
	if now := e.now(); now >= due && now-e.polled < maxPollGap {
		return
	}
	for !e.stopped {
		e.turn(ctx, due)
		if e.now() >= due {
			return
		}
	}
}

// turn waits for events, at most until the given time or the next timeout, and
// deals with what there is.
func (e *engine) turn(ctx context.Context, until time.Duration) {
	if c := e.connecting.first; c != nil {
		until = min(until, c.since+e.cfg.ConnectTimeout)
	}
	if c := e.replying.first; c != nil {
		until = min(until, c.since+e.cfg.ReplyTimeout)
	}
	if len(e.again) > 0 {
		until = 0
	}
	looked := e.now()
	wait := until - looked
	if wait > 10*time.Millisecond {
		// The kernel may end a wait later by a thousandth of its length
		// (fs/select.c, select_estimate_accuracy): come back before.
		wait -= wait / 128
	}
	events, err := e.s.wait(wait)
	if err != nil {
		e.stop(err)
		return
	}
	for _, ev := range events {
		if c := e.s.of(ev); c != nil {
			e.event(c, ev.Events)
		}
	}
	e.polled = e.now()
	if len(events) < cap(e.s.ready) {
		// Whatever had happened when this turn began has been dealt with.
		// What is overdue by then is so by the server's fault.
		e.expire(looked)
	}
	if ctx.Err() != nil {
		e.stop(context.Cause(ctx))
	}
	for len(e.again) > 0 && !e.stopped {
		index := e.again[0]
		e.again = e.again[1:]
		e.begin(index, e.now())
	}
}

func (e *engine) expire(now time.Duration) {
	for c := e.connecting.first; c != nil && c.since+e.cfg.ConnectTimeout <= now; c = e.connecting.first {
		e.fail(c, errTimeout)
	}
	for c := e.replying.first; c != nil && c.since+e.cfg.ReplyTimeout <= now; c = e.replying.first {
		e.fail(c, errTimeout)
	}
}

func (e *engine) cancel(l *list) {
	for c := l.first; c != nil; c = l.first {
		e.fail(c, context.Canceled)
	}
}

// full says whether no operation can start.
func (e *engine) full() bool {
	return e.inFlight >= e.cfg.MaxInFlight || e.cfg.Held != nil && e.s.idle.first == nil
}

// begin starts the operation, or counts it as not started.
func (e *engine) begin(index int, due time.Duration) {
	e.report.Due++
	e.cfg.Progress.due.Add(1)
	op := Op{Index: index, Due: due}
	if e.cfg.Held == nil {
		op.Source, op.Target = index%len(e.cfg.Sources), e.cfg.Targets[index%len(e.cfg.Targets)]
	}
	switch {
	case e.stopped || e.full():
		e.leaveOut(op)
	case e.cfg.Held != nil:
		e.use(e.s.idle.first, op)
	default:
		e.open(op)
	}
}

func (e *engine) leaveOut(op Op) {
	e.report.NotStarted++
	e.cfg.Progress.notStarted.Add(1)
	if e.cfg.OnOp != nil {
		op.Class, op.Done = NotStarted, e.now()
		e.cfg.OnOp(op)
	}
}

func (e *engine) started(c *conn) {
	e.inFlight++
	e.report.Started++
	e.cfg.Progress.started.Add(1)
	e.report.Lateness.Record(c.op.Started - c.op.Due)
}

// open starts an operation on a new connection.
func (e *engine) open(op Op) {
	c := e.s.slot()
	c.phase = opening
	fd, err := e.cfg.Sources[op.Source].Socket()
	op.Started = e.now()
	c.op, c.fd, c.since = op, fd, op.Started
	e.started(c)
	if err != nil {
		c.fd = -1
		e.fail(c, err)
		return
	}
	c.phase = connecting
	c.moveTo(&e.connecting)
	errno := connect(fd, &e.targets[op.Index%len(e.targets)])
	if e.cfg.OnOp != nil {
		c.op.Local = localAddress(fd)
	}
	if errno != 0 && errno != unix.EINPROGRESS {
		e.fail(c, errno)
		return
	}
	if e.cfg.hooks.opened != nil {
		e.cfg.hooks.opened(c.op)
	}
	// A connection that is open by now is an event already.
	if errno := e.s.watch(c); errno != 0 {
		e.fail(c, errno)
	}
}

// use starts an operation on a held connection.
func (e *engine) use(c *conn, op Op) {
	op.Source, op.Target, op.Local = c.op.Source, c.op.Target, c.op.Local
	if e.cfg.OnOp != nil && !op.Local.IsValid() {
		op.Local = localAddress(c.fd)
	}
	op.Started = e.now()
	c.op = op
	e.started(c)
	e.ask(c, op.Started)
}

// event deals with what epoll says of a connection.
func (e *engine) event(c *conn, events uint32) {
	switch c.phase {
	case idle:
		e.s.idleEvent(c)
		return
	case connecting:
		e.connect(c, events)
	case writing:
		e.write(c)
	}
	if c.phase == reading && events&^unix.EPOLLOUT != 0 {
		e.read(c)
	} else if c.phase == closing {
		e.readEnd(c)
	}
	// The edge of a close that came with the reply is spent by now.
	if c.phase == idle && events&(unix.EPOLLRDHUP|unix.EPOLLHUP|unix.EPOLLERR) != 0 {
		e.s.idleEvent(c)
	}
}

// connect deals with the end of connect(2).
func (e *engine) connect(c *conn, events uint32) {
	if events&(unix.EPOLLERR|unix.EPOLLHUP) != 0 {
		if errno := socketError(c.fd); errno != 0 {
			e.fail(c, errno)
			return
		}
	}
	if events&unix.EPOLLOUT == 0 {
		return
	}
	c.op.Connected = e.now()
	e.report.Connect.Record(c.op.Connected - c.op.Started)
	if e.cfg.ConnectOnly {
		e.end(c, OK, nil)
	} else {
		e.ask(c, c.op.Connected)
	}
}

// ask sends the request. The time for the reply counts from since.
func (e *engine) ask(c *conn, since time.Duration) {
	c.since, c.sent, c.reply = since, 0, c.reply[:0]
	c.phase = writing
	c.moveTo(&e.replying)
	e.write(c)
}

func (e *engine) write(c *conn) {
	for c.sent < len(e.cfg.Request) {
		n, errno := send(c.fd, e.cfg.Request[c.sent:])
		switch errno {
		case 0:
			c.sent += n
		case unix.EAGAIN:
			return
		default:
			e.fail(c, errno)
			return
		}
	}
	c.phase = reading
}

// read takes what has come until the reply is complete or nothing is left: the
// event is an edge and does not repeat.
func (e *engine) read(c *conn) {
	for {
		n, errno := receive(c.fd, e.s.scratch[:])
		switch {
		case errno == unix.EAGAIN:
			return
		case errno != 0:
			e.fail(c, errno)
			return
		case n == 0:
			e.fail(c, io.EOF)
			return
		}
		b := e.s.scratch[:n]
		if len(c.reply) > 0 {
			c.reply = append(c.reply, b...)
			b = c.reply
		}
		complete, err := e.cfg.Reply(b)
		switch {
		case errors.Is(err, ErrServer):
			e.fail(c, err)
			return
		case err != nil:
			e.fail(c, fmt.Errorf("%w: %w", errBadReply, err))
			return
		case complete:
			e.replied(c)
			return
		case len(b) > maxReply:
			e.fail(c, fmt.Errorf("%w: longer than %d bytes", errBadReply, maxReply))
			return
		case len(c.reply) == 0:
			c.reply = append(c.reply, b...)
		}
	}
}

// replied ends the operation, or waits for the server's FIN.
func (e *engine) replied(c *conn) {
	if e.cfg.Close != Passive {
		e.end(c, OK, nil)
		return
	}
	c.op.Done = e.now()
	c.phase, c.since = closing, c.op.Done
	c.moveTo(&e.replying)
	e.readEnd(c) // it may have come with the reply
}

// readEnd takes what comes where only a FIN is expected.
func (e *engine) readEnd(c *conn) {
	n, errno := receive(c.fd, e.s.scratch[:])
	switch {
	case errno == unix.EAGAIN:
	case errno != 0:
		e.fail(c, errno)
	case n > 0:
		e.fail(c, fmt.Errorf("%w: %d bytes after it", errBadReply, n))
	default:
		c.op.Closed = e.now()
		e.end(c, OK, nil)
	}
}

func (e *engine) fail(c *conn, err error) {
	class := classify(c.phase, err)
	switch class {
	case Other:
		e.report.Causes[string(c.phase)+": "+cause(err)]++
	case ServerError:
		e.report.Causes["reply: "+firstWord(err)]++
	}
	e.end(c, class, fmt.Errorf("%s: %w", c.phase, err))
}

// cause is the errno's text, or the error's own where there is none.
func cause(err error) string {
	if errno, ok := errors.AsType[unix.Errno](err); ok {
		return errno.Error()
	}
	return err.Error()
}

// firstWord is that of the reply, which follows the text of [ErrServer]. By
// RESP it is the kind of error.
func firstWord(err error) string {
	_, reply, _ := strings.Cut(err.Error(), ErrServer.Error()+": ")
	word, _, _ := strings.Cut(reply, " ")
	return word[:min(len(word), 32)]
}

// end puts the operation in its column, and keeps or closes the connection.
func (e *engine) end(c *conn, class Class, err error) {
	c.op.Class, c.op.Err = class, err
	if c.op.Closed == 0 {
		c.op.Done = e.now()
	}
	e.inFlight--
	if class == OK {
		e.report.OK++
		e.cfg.Progress.ok.Add(1)
		e.report.Latency.Record(c.op.Done - c.op.Due)
	} else {
		e.report.Failed[class]++
		e.cfg.Progress.failed.Add(1)
	}
	op := c.op
	if e.keep && (class == OK || class == ServerError && e.cfg.Held != nil) {
		e.s.park(c)
	} else {
		e.s.drop(c, e.cfg.Close)
	}
	if e.cfg.OnOp != nil {
		e.cfg.OnOp(op)
	}
	if class != OK && e.cfg.hooks.again != nil && e.cfg.hooks.again(op) {
		e.again = append(e.again, op.Index)
	}
}
