package scenarios

import (
	"container/heap"
	"iter"
	"math"
	"time"

	"connlab/loadgen"
)

// pooling is what the model of a pool must know of it.
type pooling struct {
	idle, active int  // connections kept idle, and at most in all, 0 for any number
	wait         bool // at the limit wait instead of failing
	chain        int  // operations that a caller does, one after the other
	latency      time.Duration
	greeting     time.Duration // how much longer the first operation on a connection takes: go-redis says HELLO before
	ports        int
	timeWait     time.Duration // how long a closed connection keeps its port
	from, to     time.Duration // the steady state: when the pool has got going, and when the last callers come
}

// modelled is what the model says of a run.
type modelled struct {
	dials     float64 // connections opened
	closed    float64 // by the pool, having no place for them
	steady    float64 // those of them in the steady state
	exhausted float64 // operations refused: the limit is reached
	noPort    float64 // operations that found no local port
	waited    float64 // operations that waited for a connection
	half      float64 // when half of the ports had been used, in seconds; 0 for never
	firstNo   float64 // when the first found no local port, in seconds; 0 for never
	inUse     float64 // most connections in use at a time
}

// model plays the arrivals of callers through a pool, without a kernel and without
// waiting: every operation takes the latency, a dial takes no time, a connection is
// taken from the idle ones or else dialed, and one returned beyond the idle limit is
// closed and keeps its port. It is what redigo's and go-redis's pools do
// (redis/pool.go, Pool.get and put; internal/pool, ConnPool.Get and Put): which of the
// idle connections is taken makes no difference to the counts.
func model(callers loadgen.Schedule, p pooling) modelled {
	return replay(func(yield func(due, took time.Duration) bool) {
		for due := range callers {
			if !yield(due, 0) {
				return
			}
		}
	}, p)
}

// replay is model with how long each caller's operations took, 0 for the latency.
func replay(callers iter.Seq2[time.Duration, time.Duration], p pooling) modelled {
	var m modelled
	var ends opsByEnd          // operations in use
	var queue fifo[modelledOp] // those that wait for a connection
	var waiting fifo[time.Duration]
	idle, used := 0, 0
	take := func(now time.Duration, op modelledOp) {
		fresh := idle == 0
		if fresh {
			for waiting.len() > 0 && waiting.first()+p.timeWait <= now {
				waiting.pop()
			}
			if p.ports > 0 && used+waiting.len() >= p.ports {
				if m.firstNo == 0 {
					m.firstNo = now.Seconds()
				}
				// The handler logs the error and goes on with its next operation, which fails
				// in the same way: nothing was returned meanwhile.
				m.noPort += float64(1 + op.left)
				return
			}
			m.dials++
		} else {
			idle--
		}
		switch {
		case op.took > 0:
			op.at = now + op.took
		case fresh:
			op.at = now + p.latency + p.greeting
		default:
			op.at = now + p.latency
		}
		if fresh && p.ports > 0 && m.dials == float64(p.ports/2+1) {
			m.half = op.at.Seconds()
		}
		heap.Push(&ends, op)
		used++
		m.inUse = max(m.inUse, float64(used))
	}
	begin := func(now time.Duration, op modelledOp) {
		switch {
		case p.active == 0 || used < p.active:
			take(now, op)
		case p.wait:
			m.waited++
			queue.push(op)
		default:
			m.exhausted += float64(1 + op.left)
		}
	}
	end := func() {
		op := heap.Pop(&ends).(modelledOp) //nolint:forcetypeassert // nothing else is pushed
		used--
		if idle++; idle > p.idle {
			idle--
			m.closed++
			if op.at >= p.from && op.at <= p.to {
				m.steady++
			}
			waiting.push(op.at)
		}
		if queue.len() > 0 {
			take(op.at, queue.pop())
		}
		if op.left > 0 {
			begin(op.at, modelledOp{took: op.took, left: op.left - 1})
		}
	}
	for due, took := range callers {
		for used > 0 && ends[0].at <= due {
			end()
		}
		begin(due, modelledOp{took: took, left: p.chain - 1})
	}
	for used > 0 {
		end()
	}
	return m
}

// modelledOp is an operation.
type modelledOp struct {
	at   time.Duration // when it ends
	took time.Duration // how long it takes, 0 for the latency
	left int           // operations that its caller does after it
}

// opsByEnd is a heap of operations, the first to end on top.
type opsByEnd []modelledOp

func (h opsByEnd) Len() int           { return len(h) }
func (h opsByEnd) Less(i, j int) bool { return h[i].at < h[j].at }
func (h opsByEnd) Swap(i, j int)      { h[i], h[j] = h[j], h[i] }
func (h *opsByEnd) Push(op any)       { *h = append(*h, op.(modelledOp)) } //nolint:forcetypeassert // of ours
func (h *opsByEnd) Pop() any {
	last := len(*h) - 1
	op := (*h)[last]
	*h = (*h)[:last]
	return op
}

// fifo is a queue.
type fifo[T any] struct {
	items []T
	head  int
}

func (q *fifo[T]) len() int    { return len(q.items) - q.head }
func (q *fifo[T]) first() T    { return q.items[q.head] }
func (q *fifo[T]) push(item T) { q.items = append(q.items, item) }

func (q *fifo[T]) pop() T {
	item := q.items[q.head]
	q.head++
	if q.head > 1024 && q.head > len(q.items)/2 {
		q.items = append(q.items[:0], q.items[q.head:]...)
		q.head = 0
	}
	return item
}

// erlangB is the part of calls that find all of c servers busy and go away, a being
// the offered load, arrivals times service time: for Poisson arrivals and any service
// time with that mean (A. K. Erlang 1917; by the recursion over the number of
// servers).
func erlangB(c int, a float64) float64 {
	b := 1.0
	for i := 1; i <= c; i++ {
		b = a * b / (float64(i) + a*b)
	}
	return b
}

// churnLaw is how many connections a second a pool dials that keeps m idle ones, where
// far more are in use: the idle stock goes up and down by steps of g, equally often, between 0
// and m, and each step down from nothing is a dial. With a goroutine for each of a
// heartbeat's g operations it steps by g, λ/g times a second; with one goroutine for all
// of them by 1, as often. It holds for m ≤ √(λ·W·step), beyond which the number in use
// hardly ever swings so far.
func churnLaw(rate float64, ops int, sync bool, m int) float64 {
	step, steps := float64(ops), rate/float64(ops)
	if sync {
		step = 1
	}
	return steps * step / (float64(m)/step + 1)
}

// swing is √(λ·W·step), the standard deviation of the number of operations in use.
func (u *undersized) swing() float64 {
	step := float64(u.Ops)
	if u.Sync {
		step = 1
	}
	return math.Sqrt(u.Rate * u.Latency.Seconds() * step)
}

// queues says that calls may wait for a connection of the pool, because it has fewer than
// are now and then in use.
func (u *undersized) queues() bool {
	p := u.pooling(KernelRules{})
	return p.wait && float64(p.active) < u.Rate*u.Latency.Seconds()+3*u.swing()
}

// steady is the time in which as many connections are dialed as closed: at first those
// are dialed that are in use, and in the end all are returned.
func (u *undersized) steady() (from, to time.Duration) { return 2 * u.Latency, u.For }
