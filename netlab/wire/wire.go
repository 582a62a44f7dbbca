// Package wire is a cable in user space: it carries Ethernet frames between two
// TAP devices and makes them late or loses them on the way, where the kernel has
// no netem (net/sched/sch_netem.c) to do it.
//
// [Pump] is the [netlab.Pump] for a link whose counters nobody reads; the Pump
// method of a [Wire] is the same with [Wire.Stats]. Every frame that is read ends
// in exactly one column of [Counts] or is still on its way.
//
// What it rests on: a TAP descriptor gives one frame a read and takes one a write
// (drivers/net/tun.c, tun_do_read and tun_get_user); without IFF_VNET_HDR and
// TUNSETOFFLOAD the kernel has completed checksums and cut segments to the MTU
// before the frame is read. ppoll(2) wakes with nanosecond resolution on a thread
// whose timer slack is one nanosecond (PR_SET_TIMERSLACK).
//
// What it refuses to do: reorder frames, deliver one early, hold more than
// [MaxInFlight] of them, or look inside: it carries what it is given.
//
// # Alternatives considered
//
// A goroutine and a timer per frame: the runtime's timers wake up to a
// millisecond late, and order is lost. epoll: no gain over poll for three
// descriptors. A busy loop: exact to a microsecond, at the price of one of two cores.
package wire

import (
	"errors"
	"fmt"
	"math/rand/v2"
	"os"
	"runtime"
	"sync"
	"sync/atomic"
	"time"

	"connlab/netlab"

	"golang.org/x/sys/unix"
)

// MaxInFlight is how many frames each direction of a wire holds; one that
// arrives when all places are taken is dropped and counted as Overflowed.
const MaxInFlight = 1 << 15

// Wire is one cable and its counters. The zero value is ready for one Pump.
type Wire struct {
	used atomic.Bool
	ab   counters
	ba   counters
}

// Stats is what a wire has done so far, by direction. In a lab, a is the host's
// end and b the switch's.
type Stats struct {
	AtoB, BtoA Counts
}

// Counts says what became of the frames of one direction.
type Counts struct {
	// Received is how many frames were read.
	Received uint64
	// Forwarded is how many were written to the other end.
	Forwarded uint64
	// Lost is how many the link's Loss took.
	Lost uint64
	// Overflowed is how many found MaxInFlight others on their way.
	Overflowed uint64
	// Refused is how many the other end did not take, because its device is
	// down or its queue full, or that were too long to carry.
	Refused uint64
}

// InFlight is how many frames are still on their way.
func (c Counts) InFlight() uint64 {
	return c.Received - c.Forwarded - c.Lost - c.Overflowed - c.Refused
}

type counters struct {
	received, forwarded, lost, overflowed, refused atomic.Uint64
}

func (c *counters) read() Counts {
	n := Counts{
		Forwarded:  c.forwarded.Load(),
		Lost:       c.lost.Load(),
		Overflowed: c.overflowed.Load(),
		Refused:    c.refused.Load(),
	}
	// Last: a frame is received before it gets its fate, so that InFlight is
	// never negative while the wire runs.
	n.Received = c.received.Load()
	return n
}

// Stats may be read while the wire runs and after.
func (w *Wire) Stats() Stats { return Stats{AtoB: w.ab.read(), BtoA: w.ba.read()} }

var _ netlab.Pump = Pump

// Pump is the Pump method of a new [Wire].
func Pump(a, b *os.File, link netlab.LinkSpec) (stop func() error, err error) {
	return new(Wire).Pump(a, b, link)
}

// Pump carries frames between a and b, each direction with the link's Delay and
// Loss, until stop is called; the two directions lose independently, repeatable
// by the link's Seed. It makes both descriptors non-blocking and owns neither;
// stop returns when they are no longer used, and may be called again. Frames in
// flight at that moment are gone. The error of stop is why the wire had ended
// by itself: an end that can no longer be read.
func (w *Wire) Pump(a, b *os.File, link netlab.LinkSpec) (stop func() error, err error) {
	if w.used.Swap(true) {
		return nil, errors.New("this wire already joins two ends")
	}
	fdA, err := nonblocking(a)
	if err != nil {
		return nil, fmt.Errorf("end %s: %w", a.Name(), err)
	}
	fdB, err := nonblocking(b)
	if err != nil {
		return nil, fmt.Errorf("end %s: %w", b.Name(), err)
	}
	quit, err := unix.Eventfd(0, unix.EFD_CLOEXEC|unix.EFD_NONBLOCK)
	if err != nil {
		return nil, os.NewSyscallError("eventfd", err)
	}
	p := &pump{
		quit:  quit,
		start: time.Now(),
		directions: [2]*direction{
			{from: fdA, to: fdB, delay: link.Delay, loss: link.Loss, random: seeded(link.Seed, 0), counters: &w.ab},
			{from: fdB, to: fdA, delay: link.Delay, loss: link.Loss, random: seeded(link.Seed, 1), counters: &w.ba},
		},
	}
	ended := make(chan error, 1)
	go func() {
		ended <- p.run()
		runtime.KeepAlive(a) // a finalizer must not close what the loop polls
		runtime.KeepAlive(b)
	}()
	return sync.OnceValue(func() error {
		one := [8]byte{1}
		_, err := unix.Write(quit, one[:]) // any non-zero count, in either byte order
		if err != nil {
			return os.NewSyscallError("waking the pump", err)
		}
		return errors.Join(<-ended, unix.Close(quit))
	}), nil
}

// seeded gives each direction of a link its own repeatable sequence.
func seeded(seed, direction uint64) *rand.Rand { return rand.New(rand.NewPCG(seed, direction)) }

// nonblocking returns f's descriptor, in non-blocking mode.
func nonblocking(f *os.File) (fd int, err error) {
	raw, err := f.SyscallConn() // unlike Fd, it leaves the mode alone
	if err != nil {
		return -1, err
	}
	var mode error
	err = raw.Control(func(n uintptr) {
		fd = int(n)
		mode = unix.SetNonblock(fd, true)
	})
	return fd, errors.Join(err, mode)
}
