package loadgen

import "time"

// timers is a heap of clients by their deadline. A client is in at most one heap
// at a time and knows its place there, so that it can be taken out.
type timers struct {
	clients []member
	order   []int32 // indexes of clients
}

// first is the client with the earliest deadline.
func (t *timers) first() (i int32, ok bool) {
	if len(t.order) == 0 {
		return 0, false
	}
	return t.order[0], true
}

// next is the earliest deadline, or never.
func (t *timers) next() time.Duration {
	if i, ok := t.first(); ok {
		return t.clients[i].deadline
	}
	return never
}

// set gives client i a deadline. If it is in a heap it must be in this one.
func (t *timers) set(i int32, deadline time.Duration) {
	c := &t.clients[i]
	c.deadline = deadline
	if c.place == 0 {
		t.order = append(t.order, i)
		c.place = int32(len(t.order))
	}
	t.settle(int(c.place) - 1)
}

// remove takes client i out, if it is in.
func (t *timers) remove(i int32) {
	c := &t.clients[i]
	if c.place == 0 {
		return
	}
	at, last := int(c.place)-1, len(t.order)-1
	c.place = 0
	moved := t.order[last]
	t.order = t.order[:last]
	if at < last {
		t.put(at, moved)
		t.settle(at)
	}
}

func (t *timers) put(at int, i int32) {
	t.order[at] = i
	t.clients[i].place = int32(at) + 1
}

func (t *timers) earlier(a, b int) bool {
	return t.clients[t.order[a]].deadline < t.clients[t.order[b]].deadline
}

func (t *timers) swap(a, b int) {
	i, j := t.order[a], t.order[b]
	t.put(a, j)
	t.put(b, i)
}

// settle moves the client at a place up or down until the heap is in order.
func (t *timers) settle(at int) {
	for at > 0 && t.earlier(at, (at-1)/2) {
		t.swap(at, (at-1)/2)
		at = (at - 1) / 2
	}
	for {
		least := at
		for child := 2*at + 1; child <= 2*at+2 && child < len(t.order); child++ {
			if t.earlier(child, least) {
				least = child
			}
		}
		if least == at {
			return
		}
		t.swap(at, least)
		at = least
	}
}
