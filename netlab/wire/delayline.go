package wire

import "time"

// delayLine holds packets until they are due, earliest first, and those of one
// instant in the order in which they came. It keeps its buffers and grows to what
// has been in flight at once, at most MaxInFlight.
//
// Where all are held equally long each is due after the one before, and a queue
// does: those go into a ring. One that is due before the last of the ring goes
// into a heap. What leaves next is at the head of one of the two.
type delayLine struct {
	ring  []entry // the length is 0 or a power of two
	head  int
	count int
	heap  []entry
	seq   uint64
	free  []*Packet
}

// entry is a packet's place in the line.
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

func (l *delayLine) empty() bool { return l.count+len(l.heap) == 0 }

func (l *delayLine) full() bool { return l.count+len(l.heap) == MaxInFlight }

// push queues a packet; the line is not full.
func (l *delayLine) push(p *Packet, due time.Duration) {
	e := entry{due: due, seq: l.seq, packet: p}
	l.seq++
	if l.count > 0 && due < l.at(l.count-1).due {
		l.pushHeap(e)
		return
	}
	if l.count == len(l.ring) {
		l.grow()
	}
	*l.at(l.count) = e
	l.count++
}

// front is when the first packet is due.
func (l *delayLine) front() (due time.Duration, ok bool) {
	switch {
	case l.empty():
		return 0, false
	case l.heapFirst():
		return l.heap[0].due, true
	}
	return l.at(0).due, true
}

// pop takes the first packet off; the line is not empty.
func (l *delayLine) pop() *Packet {
	if l.heapFirst() {
		return l.popHeap().packet
	}
	p := l.at(0).packet
	l.head = (l.head + 1) & (len(l.ring) - 1)
	l.count--
	return p
}

// heapFirst says that the next packet is the heap's and not the ring's.
func (l *delayLine) heapFirst() bool {
	return len(l.heap) > 0 && (l.count == 0 || l.heap[0].before(*l.at(0)))
}

func (l *delayLine) at(i int) *entry { return &l.ring[(l.head+i)&(len(l.ring)-1)] }

func (l *delayLine) grow() {
	ring := make([]entry, max(16, 2*len(l.ring)))
	for i := range l.count {
		ring[i] = *l.at(i)
	}
	l.ring, l.head = ring, 0
}

func (l *delayLine) pushHeap(e entry) {
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

func (l *delayLine) popHeap() entry {
	first := l.heap[0]
	last := len(l.heap) - 1
	e := l.heap[last]
	l.heap = l.heap[:last]
	if last == 0 {
		return first
	}
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
	l.heap[i] = e
	return first
}
