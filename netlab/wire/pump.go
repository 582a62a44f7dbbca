package wire

import (
	"errors"
	"fmt"
	"io"
	"os"
	"runtime"
	"sync/atomic"
	"time"

	"golang.org/x/sys/unix"
)

// batch is how many frames one direction reads or writes before the others get
// their turn, so that a flood one way does not starve the other.
const batch = 64

// pump is the loop behind a Wire: one thread for all its directions.
type pump struct {
	quit       int // eventfd
	start      time.Time
	directions []*direction
}

// direction is a one-way street from one descriptor to another, or to the same.
type direction struct {
	from, to int
	mtu      int
	stages   []Stage
	line     delayLine
	counters *counters
}

// run returns nil when told to quit, and otherwise why an end cannot be read.
func (p *pump) run() error {
	// Timer slack belongs to the thread, which ends with this goroutine.
	runtime.LockOSThread()
	if err := unix.Prctl(unix.PR_SET_TIMERSLACK, 1, 0, 0, 0); err != nil {
		return os.NewSyscallError("prctl PR_SET_TIMERSLACK", err)
	}
	fds := make([]unix.PollFd, 0, 3)
	for _, d := range p.directions {
		fds = append(fds, unix.PollFd{Fd: int32(d.from), Events: unix.POLLIN})
	}
	quit := len(fds)
	fds = append(fds, unix.PollFd{Fd: int32(p.quit), Events: unix.POLLIN})
	for {
		_, err := unix.Ppoll(fds, p.untilDue(), nil)
		if errors.Is(err, unix.EINTR) {
			continue // the runtime preempts with a signal
		}
		if err != nil {
			return os.NewSyscallError("ppoll", err)
		}
		if fds[quit].Revents != 0 {
			return nil
		}
		for i, d := range p.directions {
			if fds[i].Revents == 0 {
				continue
			}
			n, err := d.receive(p.now)
			if err == nil && n == 0 && fds[i].Revents&unix.POLLIN == 0 {
				err = fmt.Errorf("poll events %#x and nothing to read", fds[i].Revents)
			}
			if err != nil {
				return fmt.Errorf("end %d of the wire: %w", i, err)
			}
		}
		for _, d := range p.directions {
			d.deliver(p.now())
		}
	}
}

// now is monotonic time since the pump began.
func (p *pump) now() time.Duration { return time.Since(p.start) }

// untilDue is how long to sleep: nil, for ever, when no frame is on its way.
func (p *pump) untilDue() *unix.Timespec {
	next := time.Duration(-1)
	for _, d := range p.directions {
		if due, ok := d.line.front(); ok && (next < 0 || due < next) {
			next = due
		}
	}
	if next < 0 {
		return nil
	}
	ts := unix.NsecToTimespec(int64(max(0, next-p.now())))
	return &ts
}

// receive reads what is there, at most a batch, and says how many frames.
func (d *direction) receive(now func() time.Duration) (n int, err error) {
	for n < batch {
		p := d.line.take()
		size, err := unix.Read(d.from, p.buf[:])
		if err != nil || size == 0 {
			d.line.give(p)
			switch {
			case errors.Is(err, unix.EINTR):
				continue
			case errors.Is(err, unix.EAGAIN):
				return n, nil
			case err != nil:
				return n, os.NewSyscallError("read", err)
			}
			return n, io.EOF
		}
		n++
		d.counters.received.Add(1)
		if column := d.admit(p, size, now); column != nil {
			column.Add(1)
			d.line.give(p)
		}
	}
	return n, nil
}

// admit takes a packet past the stages and into the line. When its way ends
// before, it says in which column.
func (d *direction) admit(p *Packet, size int, now func() time.Duration) *atomic.Uint64 {
	if size == len(p.buf) { // it may have been longer: the rest is cut off
		return &d.counters.refused
	}
	p.reset(size, d.mtu)
	for _, stage := range d.stages {
		if verdict := stage(p); verdict != Forward {
			return d.counters.verdict(verdict)
		}
	}
	if d.line.full() {
		return &d.counters.overflowed
	}
	d.line.push(p, now()+p.hold)
	return nil
}

// deliver writes the frames that are due, at most a batch.
func (d *direction) deliver(now time.Duration) {
	for range batch {
		due, ok := d.line.front()
		if !ok || due > now {
			return
		}
		p := d.line.pop()
		d.write(p)
		d.line.give(p)
	}
}

// write sends a frame out.
func (d *direction) write(p *Packet) {
	for {
		_, err := unix.Write(d.to, p.Frame())
		switch {
		case errors.Is(err, unix.EINTR):
			continue
		case err != nil: // an Ethernet device that cannot take a frame drops it; so does the wire
			d.counters.refused.Add(1)
		default:
			d.counters.forwarded.Add(1)
		}
		return
	}
}
