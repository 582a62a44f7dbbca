package loadgen

import (
	"context"
	"fmt"
	"runtime"
	"sync"
	"time"

	"golang.org/x/sys/unix"
)

// longestNap bounds one sleep of [Schedule.Play], so that it notices soon
// when its context is done.
const longestNap = 20 * time.Millisecond

// players are those at work in this process.
var players playing

type playing struct {
	mu         sync.Mutex
	n          int
	processors int // of the Go scheduler without them
}

func (p *playing) begin() {
	p.mu.Lock()
	defer p.mu.Unlock()
	if p.n == 0 {
		p.processors = runtime.GOMAXPROCS(0)
	}
	p.n++
	runtime.GOMAXPROCS(p.processors + p.n)
}

func (p *playing) end() {
	p.mu.Lock()
	defer p.mu.Unlock()
	p.n--
	runtime.GOMAXPROCS(p.processors + p.n)
}

// Play calls f for each operation of s when it is due, counted from start, with
// the operation's index and due time: some ten microseconds late, and at once
// where it is overdue. It is for loads that go through other people's clients, which
// cannot be part of a [Run]. f must not block.
//
// Play locks its goroutine to the thread while it runs, and lends the Go scheduler one
// more processor (GOMAXPROCS): asleep in nanosleep(2) the thread keeps its own until the
// runtime notices, which can take 10 ms (runtime/proc.go, retake), and players side by
// side on a small machine would hold back each other and what they have started. When ctx is done it
// calls f no more and returns an error that wraps the context's.
func (s Schedule) Play(ctx context.Context, start time.Time, f func(index int, due time.Duration)) error {
	runtime.LockOSThread()
	defer runtime.UnlockOSThread()
	players.begin()
	defer players.end()
	restore, err := preciseTimers()
	if err != nil {
		return fmt.Errorf("playing a schedule: %w", err)
	}
	defer restore()
	index := 0
	for due := range s {
		for ctx.Err() == nil {
			wait := due - time.Since(start)
			if wait <= 0 {
				break
			}
			nap := unix.NsecToTimespec(int64(min(wait, longestNap)))
			// A signal ends it early; the loop sees to that.
			_ = unix.Nanosleep(&nap, nil)
		}
		if ctx.Err() != nil {
			return fmt.Errorf("playing a schedule: %w", context.Cause(ctx))
		}
		f(index, due)
		index++
	}
	return nil
}
