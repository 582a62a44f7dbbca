package scenarios

import (
	"errors"
	"io/fs"
	"os"
	"strconv"
	"strings"
	"time"

	"golang.org/x/sys/unix"
)

// KernelRules is what a prediction must know of the running kernel: where
// kernels differ, the claim follows the kernel, and the record says which rule
// was used.
type KernelRules struct {
	// LinearSYNTimeouts is how many SYN retransmissions keep the first timeout
	// before it doubles: net.ipv4.tcp_syn_linear_timeouts, 4 by default since
	// Linux 6.5, 0 before.
	LinearSYNTimeouts int
	// TimerRounding is by how much a timer of about one second fires late at
	// most: the timer wheel rounds up to the granularity of its level.
	TimerRounding time.Duration
}

// ReadKernelRules reads them. A new network namespace starts with the kernel's
// own defaults, not with the host's settings, so the default is what counts.
func ReadKernelRules() KernelRules {
	r := KernelRules{TimerRounding: timerRounding(tick())}
	const linear = "/proc/sys/net/ipv4/tcp_syn_linear_timeouts"
	if _, err := os.Stat(linear); !errors.Is(err, fs.ErrNotExist) {
		r.LinearSYNTimeouts = 4 // net/ipv4/tcp_ipv4.c, tcp_sk_init
	}
	return r
}

// tick is one jiffy: the resolution of the coarse clocks (kernel/time/posix-timers.c).
func tick() time.Duration {
	var ts unix.Timespec
	if unix.ClockGetres(unix.CLOCK_MONOTONIC_COARSE, &ts) != nil {
		return 4 * time.Millisecond // HZ=250, the commonest choice
	}
	return time.Duration(ts.Nano())
}

// timerRounding is the granularity of the wheel level that holds a timer of one
// second: level n takes timers of 63·8^(n−1) jiffies and more and counts in 8^n
// jiffies (kernel/time/timer.c, LVL_START and LVL_GRAN).
func timerRounding(tick time.Duration) time.Duration {
	jiffies := int64(initialSYNTimeout / tick)
	gran := int64(1)
	for jiffies >= 63*gran {
		gran *= 8
	}
	return time.Duration(gran) * tick
}

// initialSYNTimeout is TCP_TIMEOUT_INIT (include/net/tcp.h; RFC 6298 section 2.1).
const initialSYNTimeout = time.Second

// SYNRetries returns when the first n retransmissions of a SYN go out, counted
// from connect(): 1, 2, 3, 4, 5, 7, 11 … s with four linear timeouts, 1, 3, 7,
// 15 … s with none (net/ipv4/tcp_timer.c, tcp_retransmit_timer).
func (r KernelRules) SYNRetries(n int) []time.Duration {
	times := make([]time.Duration, n)
	var at time.Duration
	timeout := initialSYNTimeout
	for i := range times {
		at += timeout
		times[i] = at
		if i >= r.LinearSYNTimeouts {
			timeout *= 2
		}
	}
	return times
}

// spellRetries writes retry times for people: "1, 2, 3, 4, 5, 7 s".
func spellRetries(times []time.Duration) string {
	words := make([]string, len(times))
	for i, t := range times {
		words[i] = strconv.FormatFloat(t.Seconds(), 'g', -1, 64)
	}
	return strings.Join(words, ", ") + " s"
}
