package wire

import "time"

// frameSize has room for the longest frame of a 1,500-byte MTU (1,514 bytes, 1,518
// with a VLAN tag); one that fills it was longer.
const frameSize = 2048

// frame is one Ethernet frame on its way.
type frame struct {
	due  time.Duration
	size int
	buf  *[frameSize]byte
}

// delayLine is a queue of frames in a ring. The delay of a direction is constant,
// so frames fall due in the order in which they came and no heap is needed. It
// grows to what has been in flight at once, at most MaxInFlight, and keeps its
// buffers.
type delayLine struct {
	ring  []frame // the length is 0 or a power of two
	head  int
	count int
}

// back returns the buffer for the next push, or nil when the line is full.
func (l *delayLine) back() *[frameSize]byte {
	if l.count == MaxInFlight {
		return nil
	}
	if l.count == len(l.ring) {
		l.grow()
	}
	f := l.at(l.count)
	if f.buf == nil {
		f.buf = new([frameSize]byte)
	}
	return f.buf
}

// push queues the first size bytes of the buffer that back returned.
func (l *delayLine) push(size int, due time.Duration) {
	f := l.at(l.count)
	f.size, f.due = size, due
	l.count++
}

// front returns the frame that is due first, or nil.
func (l *delayLine) front() *frame {
	if l.count == 0 {
		return nil
	}
	return l.at(0)
}

// pop takes the front frame off; its buffer serves again.
func (l *delayLine) pop() {
	l.head = (l.head + 1) & (len(l.ring) - 1)
	l.count--
}

func (l *delayLine) at(i int) *frame { return &l.ring[(l.head+i)&(len(l.ring)-1)] }

func (l *delayLine) grow() {
	ring := make([]frame, max(16, 2*len(l.ring)))
	for i := range l.count {
		ring[i] = *l.at(i)
	}
	l.ring, l.head = ring, 0
}
