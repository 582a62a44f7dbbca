package server

import (
	"container/heap"
	"time"
	"unsafe"
)

// hold is the replies to one read, kept back.
type hold struct {
	due   time.Duration // of the clock
	bytes int
}

const holdSize = int(unsafe.Sizeof(hold{}))

// holdQueue is what is kept back of a client's replies, in order: the due times never fall.
type holdQueue struct {
	holds []hold
	first int // those before it are released
	bytes int // of all: the end of the client's replies
	index int // of the client in Server.held, if there is a hold
}

func (q *holdQueue) len() int    { return len(q.holds) - q.first }
func (q *holdQueue) next() *hold { return &q.holds[q.first] }
func (q *holdQueue) last() *hold { return &q.holds[len(q.holds)-1] }

func (q *holdQueue) push(h hold) {
	if q.first > 0 && q.first >= len(q.holds)/2 {
		q.holds = q.holds[:copy(q.holds, q.holds[q.first:])]
		q.first = 0
	}
	q.holds = append(q.holds, h)
	q.bytes += h.bytes
}

func (q *holdQueue) pop() {
	q.bytes -= q.holds[q.first].bytes
	if q.first++; q.first < len(q.holds) {
		return
	}
	q.first = 0
	if q.holds = q.holds[:0]; cap(q.holds)*holdSize > keepBuffer {
		q.holds = nil
	}
}

// heldClients is a [heap.Interface] of the clients with a hold. The one whose first hold is due next is at the top.
type heldClients []*client

func (h heldClients) Len() int           { return len(h) }
func (h heldClients) Less(i, j int) bool { return h[i].held.next().due < h[j].held.next().due }

func (h heldClients) Swap(i, j int) {
	h[i], h[j] = h[j], h[i]
	h[i].held.index, h[j].held.index = i, j
}

// Push is for package heap.
func (h *heldClients) Push(x any) {
	c := x.(*client)
	c.held.index = len(*h)
	*h = append(*h, c)
}

// Pop is for package heap.
func (h *heldClients) Pop() any {
	last := len(*h) - 1
	c := (*h)[last]
	(*h)[last] = nil
	*h = (*h)[:last]
	return c
}

// replied sees to the replies to a read, after which unsent bytes have become more: they are written before the next
// wait or, as MaxRequestRate and ServiceTime have it, kept back. A read is one request to both, be it a command or a pipeline.
// One of nothing but control commands is none, so that the server can be asked and set when it is overloaded; but the
// replies to a client stay in order.
func (s *Server) replied(c *client, unsent int) {
	now := s.clock.now
	due := now
	if s.toServe {
		s.stats.requests++
		due = s.station.serve(now)
		s.stats.requestWait += due - now
		s.stats.requestWaitMax = max(s.stats.requestWaitMax, due-now)
		due += s.cfg.ServiceTime
	}
	if c.held.len() > 0 {
		due = max(due, c.held.last().due)
	}
	if bytes := c.unsent() - unsent; due > now && bytes > 0 && !c.doomed {
		s.hold(c, hold{due, bytes})
	}
	s.queue(c)
}

func (s *Server) hold(c *client, h hold) {
	c.held.push(h)
	s.heldReplies++
	if c.held.len() == 1 {
		heap.Push(&s.held, c)
	}
}

// releaseHeld lets go what is due by now.
func (s *Server) releaseHeld(now time.Duration) {
	for len(s.held) > 0 {
		c := s.held[0]
		late := now - c.held.next().due
		if late < 0 {
			return
		}
		s.stats.releases++
		s.stats.releaseLate += late
		s.stats.releaseLateMax = max(s.stats.releaseLateMax, late)
		s.heldReplies--
		c.held.pop()
		if c.held.len() > 0 {
			heap.Fix(&s.held, 0)
		} else {
			heap.Pop(&s.held)
		}
		s.queue(c)
	}
}

// forget drops what is held of a client that will get no more replies.
func (s *Server) forget(c *client) {
	if n := c.held.len(); n > 0 {
		heap.Remove(&s.held, c.held.index)
		s.heldReplies -= n
		c.held = holdQueue{}
	}
}
