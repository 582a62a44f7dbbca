package wire

import (
	"errors"
	"fmt"
	"io"
	"math/rand/v2"
	"os"
	"runtime"
	"time"

	"golang.org/x/sys/unix"
)

// batch is how many frames one direction reads or writes before the others get
// their turn, so that a flood one way does not starve the other.
const batch = 64

// pump is the loop behind a Wire: one thread, two directions.
type pump struct {
	quit       int // eventfd
	start      time.Time
	directions [2]*direction
}

// direction is a one-way street from one descriptor to another.
type direction struct {
	from, to int
	delay    time.Duration
	loss     float64
	random   *rand.Rand
	line     delayLine
	counters *counters
	scratch  [frameSize]byte // where a frame goes that finds the line full
}

// run returns nil when told to quit, and otherwise why an end cannot be read.
func (p *pump) run() error {
	// Timer slack belongs to the thread, which ends with this goroutine.
	runtime.LockOSThread()
	if err := unix.Prctl(unix.PR_SET_TIMERSLACK, 1, 0, 0, 0); err != nil {
		return os.NewSyscallError("prctl PR_SET_TIMERSLACK", err)
	}
	fds := []unix.PollFd{
		{Fd: int32(p.directions[0].from), Events: unix.POLLIN},
		{Fd: int32(p.directions[1].from), Events: unix.POLLIN},
		{Fd: int32(p.quit), Events: unix.POLLIN},
	}
	for {
		_, err := unix.Ppoll(fds, p.untilDue(), nil)
		if errors.Is(err, unix.EINTR) {
			continue // the runtime preempts with a signal
		}
		if err != nil {
			return os.NewSyscallError("ppoll", err)
		}
		if fds[2].Revents != 0 {
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
	var next *frame
	for _, d := range p.directions {
		if f := d.line.front(); f != nil && (next == nil || f.due < next.due) {
			next = f
		}
	}
	if next == nil {
		return nil
	}
	ts := unix.NsecToTimespec(int64(max(0, next.due-p.now())))
	return &ts
}

// receive reads what is there, at most a batch, and says how many frames.
func (d *direction) receive(now func() time.Duration) (n int, err error) {
	for n < batch {
		buf := d.line.back()
		full := buf == nil
		if full {
			buf = &d.scratch
		}
		size, err := unix.Read(d.from, buf[:])
		switch {
		case errors.Is(err, unix.EINTR):
			continue
		case errors.Is(err, unix.EAGAIN):
			return n, nil
		case err != nil:
			return n, os.NewSyscallError("read", err)
		case size == 0:
			return n, io.EOF
		}
		n++
		d.counters.received.Add(1)
		switch {
		case size == len(buf): // it may have been longer: the rest is cut off
			d.counters.refused.Add(1)
		case d.random.Float64() < d.loss:
			d.counters.lost.Add(1)
		case full:
			d.counters.overflowed.Add(1)
		default:
			d.line.push(size, now()+d.delay)
		}
	}
	return n, nil
}

// deliver writes the frames that are due, at most a batch.
func (d *direction) deliver(now time.Duration) {
	for range batch {
		f := d.line.front()
		if f == nil || f.due > now {
			return
		}
		_, err := unix.Write(d.to, f.buf[:f.size])
		if errors.Is(err, unix.EINTR) {
			continue
		}
		// An Ethernet device that cannot take a frame drops it; so does the wire.
		if err != nil {
			d.counters.refused.Add(1)
		} else {
			d.counters.forwarded.Add(1)
		}
		d.line.pop()
	}
}
