package scenarios

import (
	"errors"
	"fmt"
	"io/fs"
	"os"
	"runtime"
	"strconv"
	"strings"
	"time"

	"golang.org/x/sys/unix"

	"connlab/netlab"
)

// KernelRules is what a prediction must know of the running kernel: where
// kernels differ, the claim follows the kernel, and the record says which rule
// was used.
type KernelRules struct {
	// LinearSYNTimeouts is how many SYN retransmissions keep the first timeout
	// before it doubles: net.ipv4.tcp_syn_linear_timeouts, 4 by default since
	// Linux 6.5, 0 before.
	LinearSYNTimeouts int
	// Tick is one jiffy, the unit of the kernel's timers.
	Tick time.Duration
	// TimerRounding is by how much a timer of about one second fires late at
	// most: the timer wheel rounds up to the granularity of its level.
	TimerRounding time.Duration
	// TimeWaitRounding is the same for the timer that ends TIME_WAIT after 60 s.
	TimeWaitRounding time.Duration
	// DelayedACK is how long a connection that answers and is answered in turn
	// waits before it sends an ACK alone: TCP_DELACK_MIN (include/net/tcp.h).
	DelayedACK time.Duration
	// ResetReasons says that the tracepoint tcp_send_reset tells why, as it does
	// since Linux 6.10.
	ResetReasons bool
	// ConnectPortStep is how far apart the local ports are that connect(2) takes
	// first: 2 since Linux 4.2, which leaves the others to bind(2), 1 before
	// (net/ipv4/inet_hashtables.c, __inet_hash_connect).
	ConnectPortStep int
	// RangePortStep is the same for a socket with IP_LOCAL_PORT_RANGE: 1 since
	// Linux 6.8, 2 before, 0 where there is no such option, before 6.3.
	RangePortStep int
	// CPUs is how many may meet at the same queue.
	CPUs int
}

// overfill is by how much a queue may be longer than its limit: the kernel looks and counts in two steps,
// and CPUs that meet may all take the last place.
func (r KernelRules) overfill() float64 { return float64(max(2, r.CPUs)) }

// ReadKernelRules reads them. A new network namespace starts with the kernel's
// own defaults, not with the host's settings, so the default is what counts.
func ReadKernelRules() KernelRules {
	r := KernelRules{
		Tick:             tick(),
		TimerRounding:    timerRounding(tick(), netlab.InitialSYNTimeout),
		TimeWaitRounding: timerRounding(tick(), timeWaitLength),
		DelayedACK:       40 * time.Millisecond, // HZ/25 jiffies, whatever HZ is
		ResetReasons:     releaseAtLeast(netlab.Kernel(), 6, 10),
		ConnectPortStep:  1,
		CPUs:             runtime.NumCPU(),
	}
	if releaseAtLeast(netlab.Kernel(), 4, 2) {
		r.ConnectPortStep = 2
	}
	switch {
	case releaseAtLeast(netlab.Kernel(), 6, 8):
		r.RangePortStep = 1
	case releaseAtLeast(netlab.Kernel(), 6, 3):
		r.RangePortStep = 2
	}
	const linear = "/proc/sys/net/ipv4/tcp_syn_linear_timeouts"
	if _, err := os.Stat(linear); !errors.Is(err, fs.ErrNotExist) {
		r.LinearSYNTimeouts = 4 // net/ipv4/tcp_ipv4.c, tcp_sk_init
	}
	return r
}

// releaseAtLeast compares a kernel release such as "6.18.44-generic" with a version.
func releaseAtLeast(release string, major, minor int) bool {
	var a, b int
	if n, _ := fmt.Sscanf(release, "%d.%d", &a, &b); n < 2 {
		return true // no kernel that can run this fails to say
	}
	return a > major || a == major && b >= minor
}

// tick is one jiffy: the resolution of the coarse clocks (kernel/time/posix-timers.c).
func tick() time.Duration {
	var ts unix.Timespec
	if unix.ClockGetres(unix.CLOCK_MONOTONIC_COARSE, &ts) != nil {
		return 4 * time.Millisecond // HZ=250, the commonest choice
	}
	return time.Duration(ts.Nano())
}

// timerRounding is the granularity of the wheel level that holds a timer of length
// d: level n takes timers of 63·8^(n−1) jiffies and more and counts in 8^n jiffies
// (kernel/time/timer.c, LVL_START and LVL_GRAN).
func timerRounding(tick, d time.Duration) time.Duration {
	jiffies := int64(d / tick)
	gran := int64(1)
	for jiffies >= 63*gran {
		gran *= 8
	}
	return time.Duration(gran) * tick
}

// SYNRetries returns when the first n retransmissions of a SYN go out, counted
// from connect(): see [netlab.SYNRetries].
func (r KernelRules) SYNRetries(n int) []time.Duration {
	return netlab.SYNRetries(r.LinearSYNTimeouts, n)
}

// spellRetries writes retry times for people: "1, 2, 3, 4, 5, 7 s".
func spellRetries(times []time.Duration) string {
	words := make([]string, len(times))
	for i, t := range times {
		words[i] = strconv.FormatFloat(t.Seconds(), 'g', -1, 64)
	}
	return strings.Join(words, ", ") + " s"
}
