package wire

import "time"

// delayLine holds packets until they are due, earliest first, and those of one
// instant in the order in which they came. It is a binary heap: where all are
// held equally long a push ends where it begins, at the bottom. It grows to what
// has been in flight at once, at most MaxInFlight, and keeps its buffers.
type delayLine struct {
	heap []entry
	seq  uint64
	free []*Packet
}

// entry is a packet's place in the heap.
type entry struct {
	due    time.Duration
	seq    uint64 // breaks ties
	packet *Packet
}

func (e entry) before(o entry) bool {
	return e.due < o.due || e.due == o.due && e.seq < o.seq
}

// take returns a packet to read into. It goes back by push or give.
func (l *delayLine) take() *Packet {
	if n := len(l.free); n > 0 {
		p := l.free[n-1] // the last one used is in the processor's cache
		l.free = l.free[:n-1]
		return p
	}
	return new(Packet)
}

// give takes back a packet that is no longer needed.
func (l *delayLine) give(p *Packet) { l.free = append(l.free, p) }

func (l *delayLine) empty() bool { return len(l.heap) == 0 }

func (l *delayLine) full() bool { return len(l.heap) == MaxInFlight }

// push queues a packet; the line is not full.
func (l *delayLine) push(p *Packet, due time.Duration) {
	e := entry{due: due, seq: l.seq, packet: p}
	l.seq++
	l.heap = append(l.heap, e)
	i := len(l.heap) - 1
	for i > 0 {
		parent := (i - 1) / 2
		if !e.before(l.heap[parent]) {
			break
		}
		l.heap[i] = l.heap[parent]
		i = parent
	}
	l.heap[i] = e
}

// front is when the first packet is due.
func (l *delayLine) front() (due time.Duration, ok bool) {
	if l.empty() {
		return 0, false
	}
	return l.heap[0].due, true
}

// pop takes the first packet off; the line is not empty.
func (l *delayLine) pop() *Packet {
	first := l.heap[0].packet
	last := len(l.heap) - 1
	e := l.heap[last]
	l.heap[last] = entry{}
	l.heap = l.heap[:last]
	i := 0
	for {
		child := 2*i + 1
		if child >= last {
			break
		}
		if child+1 < last && l.heap[child+1].before(l.heap[child]) {
			child++
		}
		if !l.heap[child].before(e) {
			break
		}
		l.heap[i] = l.heap[child]
		i = child
	}
	if last > 0 {
		l.heap[i] = e
	}
	return first
}
