package wire

import (
	"errors"
	"fmt"
	"math/rand/v2"
	"os"
	"runtime"
	"slices"
	"sync"
	"sync/atomic"
	"time"

	"connlab/netlab"

	"golang.org/x/sys/unix"
)

// MaxInFlight is how many frames each direction of a wire holds; one that
// arrives when all places are taken is dropped and counted as Overflowed.
const MaxInFlight = 1 << 15

// Wire is one cable, or one device on a switch, and its counters. The zero value
// is ready for one Pump or one Attach.
type Wire struct {
	// Leaving and Entering are the stages of packets that leave the host (a to b)
	// and enter it (b to a), in order. They are read once, when the wire begins;
	// both directions run on one thread.
	Leaving, Entering []Stage

	used atomic.Bool
	ab   counters
	ba   counters
}

// Stats may be read while the wire runs and after.
func (w *Wire) Stats() Stats { return Stats{AtoB: w.ab.read(), BtoA: w.ba.read()} }

var _ netlab.Pump = Pump

// Pump is the Pump method of a new [Wire].
func Pump(a, b *os.File, link netlab.LinkSpec) (stop func() error, err error) {
	return new(Wire).Pump(a, b, link)
}

// Pump carries frames between a and b until stop is called, past the stages of
// their direction and then with the link's Delay and Loss, which are stages like
// the others; the two directions lose independently, repeatable by the link's
// Seed. It makes both descriptors non-blocking and owns neither; stop returns
// when they are no longer used, and may be called again. Frames in flight at
// that moment are gone. The error of stop is why the wire had ended by itself:
// an end that can no longer be read.
func (w *Wire) Pump(a, b *os.File, link netlab.LinkSpec) (stop func() error, err error) {
	fdA, err := nonblocking(a)
	if err != nil {
		return nil, fmt.Errorf("end %s: %w", a.Name(), err)
	}
	fdB, err := nonblocking(b)
	if err != nil {
		return nil, fmt.Errorf("end %s: %w", b.Name(), err)
	}
	return w.begin([]*os.File{a, b},
		&direction{from: fdA, to: fdB, mtu: DefaultMTU, stages: withLink(w.Leaving, link, 0), counters: &w.ab},
		&direction{from: fdB, to: fdA, mtu: DefaultMTU, stages: withLink(w.Entering, link, 1), counters: &w.ba},
	)
}

// withLink is the stages of one direction of a link with the link's own at the end.
func withLink(stages []Stage, link netlab.LinkSpec, direction uint64) []Stage {
	stages = slices.Clone(stages)
	if link.Loss > 0 {
		stages = append(stages, lossStage(link.Loss, rand.New(rand.NewPCG(link.Seed, direction))))
	}
	if link.Delay > 0 {
		stages = append(stages, delayStage(link.Delay))
	}
	return stages
}

// lossStage loses a share of the packets.
func lossStage(share float64, random *rand.Rand) Stage {
	return func(*Packet) Verdict {
		if random.Float64() < share {
			return lost
		}
		return Forward
	}
}

// delayStage makes every packet late by d.
func delayStage(d time.Duration) Stage {
	return func(p *Packet) Verdict {
		p.Hold(d)
		return Forward
	}
}

// begin runs the directions on a thread of their own; files are whose descriptors
// they use.
func (w *Wire) begin(files []*os.File, directions ...*direction) (stop func() error, err error) {
	if w.used.Swap(true) {
		return nil, errors.New("this wire is already in use")
	}
	quit, err := unix.Eventfd(0, unix.EFD_CLOEXEC|unix.EFD_NONBLOCK)
	if err != nil {
		return nil, os.NewSyscallError("eventfd", err)
	}
	p := &pump{quit: quit, start: time.Now(), directions: directions}
	ended := make(chan error, 1)
	go func() {
		ended <- p.run()
		runtime.KeepAlive(files) // a finalizer must not close what the loop polls
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
