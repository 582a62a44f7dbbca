// Package loadgen sends operations to a TCP server at the times a [Schedule]
// says, and accounts for every one of them.
//
// The loop is open: an operation starts when it is due whether or not earlier
// ones have ended, and its latency counts from the due time. A server that
// stands still for a second therefore shows a second in the histogram instead
// of a pause in the load. Every due operation ends in exactly one column:
// ok, failed with a [Class], or not started; [Report.Balanced] checks the sum.
//
// One [Run] is one OS thread with one epoll instance and raw non-blocking
// sockets. Go's timers wake about half a millisecond late because the runtime
// polls in milliseconds; epoll_pwait2(2) takes nanoseconds, and with the
// thread's timer slack set to 1 ns (prctl PR_SET_TIMERSLACK) an operation
// starts some ten microseconds after it is due. Calls that cannot block are raw
// system calls; only the wait is one that the Go scheduler knows about.
//
// [Probe] is a detector built on it: in each round it asks every one of many
// servers, with all connections open at the same time. [Fleet] is the other kind
// of client: many persistent ones, which come back by a policy when they are cut.
//
// A run refuses to do three things. It does not retry: a failed operation is a
// failed operation, and each retry of a probe is one of its own. It does not delay: an operation that cannot
// start because too many are in flight is counted as not started. It does not
// judge: [Report.Behind] says that the generator itself was too slow, and what
// that means for the experiment is the caller's to decide.
//
// It knows no network namespace. A [Source] makes the sockets, and may make
// them wherever it likes.
package loadgen
