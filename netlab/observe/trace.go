package observe

import (
	"errors"
	"fmt"
	"io/fs"
	"net/netip"
	"slices"
	"sync"
	"time"

	"github.com/cilium/ebpf"
	"github.com/cilium/ebpf/btf"
	"github.com/cilium/ebpf/link"
	"golang.org/x/sys/unix"

	"connlab/netlab"
)

// TraceConfig says what to trace.
type TraceConfig struct {
	// Hosts are those whose events are counted. The kernel runs the programs for
	// the events of the whole machine; those of other namespaces cost some 0.1 µs
	// each and leave no trace.
	Hosts []*netlab.Host
	// Stays are the states whose stays are measured; none is [DefaultStays]. CLOSE has
	// no end and is left out. The hosts can have 65,536 sockets in such states at a
	// time; more are lost. What the stays of a connection cost is some 0.7 µs for every
	// change into, between or out of such states, at either end.
	Stays States
}

// DefaultStays are the states in which the side that closes first waits for the other.
const DefaultStays = 1<<FinWait1 | 1<<FinWait2

// Trace counts, inside the kernel, what happens to the TCP sockets and packets of
// some hosts: see [TraceReport].
type Trace struct {
	hosts  []string
	layout *kernelLayout
	loaded *ebpf.Collection
	links  []link.Link // a link that nobody refers to is closed by the garbage collector
	stop   func() (*TraceReport, error)
}

// TraceReport is what a [Trace] has counted.
type TraceReport struct {
	Counts []TraceCount `json:"counts"`
	Stays  []Stay       `json:"stays"`
	// Lost counts, by tracepoint, the events that found a map full, memory that could
	// not be read, or the program of their tracepoint at work on their CPU, which an
	// interrupt had broken into (recursion_misses of bpf_prog_info). The latter may be
	// events of other namespaces. What is said of a tracepoint that lost any is no
	// account; kfree_skb and inet_sock_set_state happen in processes and in interrupts,
	// and lose a few of many under load.
	Lost map[string]int64 `json:"lost"`
	// Warnings say what this kernel does not show.
	Warnings []string `json:"warnings,omitempty"`
}

// TraceCount is how often something happened to one pair of addresses. The events are
// the kernel's tracepoints:
//
//   - tcp_send_reset: a reset is sent (net/ipv4/tcp_ipv4.c tcp_v4_send_reset, in answer
//     to a packet, and net/ipv4/tcp_output.c tcp_send_active_reset). Tcp.OutRsts counts
//     the same.
//   - tcp_receive_reset: a reset has met a socket that accepts it (net/ipv4/tcp_input.c
//     tcp_reset). One that meets a TIME_WAIT or no socket is not seen, nor one for a
//     connection that was not yet accepted nor complete.
//   - tcp_retransmit_skb: one or more segments, SYNs too, are sent again. The Reason is
//     the error that kept them from being sent, where the kernel tells.
//   - tcp_retransmit_synack: a SYN-ACK is sent again. Tcp.RetransSegs counts the
//     segments of both.
//   - kfree_skb: a packet is thrown away. A SYN that finds the accept queue full is not
//     (net/ipv4/tcp_input.c tcp_conn_request: it is consumed), nor are packets that
//     leave a socket's queue when it is destroyed.
type TraceCount struct {
	Event string `json:"event"`
	Host  string `json:"host"`
	// Local and Remote are the addresses of the pair as the host sees it.
	Local  netip.Addr `json:"local"`
	Remote netip.Addr `json:"remote"`
	// Reason is the kernel's name without its prefix, NO_SOCKET or
	// TCP_LISTEN_OVERFLOW (include/net/rstreason.h and dropreason-core.h); "" for an
	// event that has none.
	Reason string `json:"reason,omitempty"`
	// State is that of the socket concerned, None without one. For tcp_send_reset and
	// tcp_retransmit_skb it is the state while they send: CLOSE for most resets.
	State State `json:"state"`
	// Stack are the kernel's functions that led to a tcp_send_reset or kfree_skb,
	// innermost first and some ten at most, without offsets. Nil for other events,
	// and where a warning says so.
	Stack []string `json:"stack,omitempty"`
	Count int64    `json:"count"`
}

// Stay is the time that full sockets of a host spent in a state before they went into
// the next, by the tracepoint inet_sock_set_state. Only stays that began and ended
// within the trace count.
//
// A socket that a program has closed is not kept for FIN_WAIT_2 and TIME_WAIT: when the
// peer's ACK takes it to FIN_WAIT_2, and tcp_fin_timeout is a minute or less, a timewait
// minisocket takes over at once (net/ipv4/tcp_minisocks.c tcp_time_wait), and the full
// socket goes into CLOSE. So its stay in FIN_WAIT_2 is some microseconds, with a
// minisocket or, at tcp_max_tw_buckets, without; it goes from FIN_WAIT_1 into CLOSE
// where the ACK and the FIN come in one. Nothing goes into TIME_WAIT here. A stay in
// FIN_WAIT_2 of a socket that a program still holds, after shutdown(SHUT_WR), is shown
// in full. So is that of a few orphans: those whose ACK comes in the moment between the
// end of close(2)'s work and its release of the socket stay what they are, without a
// slot (net/ipv4/tcp_input.c tcp_rcv_state_process: sock_owned_by_user).
type Stay struct {
	Host    string        `json:"host"`
	State   State         `json:"state"`
	Next    State         `json:"next"`
	Count   int64         `json:"count"`
	Total   time.Duration `json:"total_ns"`
	Longest time.Duration `json:"longest_ns"`
	// Buckets tell the stays apart by length, shortest first, without empty ones.
	Buckets []StayBucket `json:"buckets"`
}

// StayBucket counts the stays of From and longer, but shorter than twice that.
type StayBucket struct {
	From  time.Duration `json:"from_ns"`
	Count int64         `json:"count"`
}

// Sum adds up the counts of an event at a host for a reason; "" matches all.
func (r *TraceReport) Sum(event, host, reason string) int64 {
	var sum int64
	for _, c := range r.Counts {
		if (event == "" || c.Event == event) && (host == "" || c.Host == host) && (reason == "" || c.Reason == reason) {
			sum += c.Count
		}
	}
	return sum
}

// StartTrace begins to trace: no event after it has returned is missed. It attaches to
// all tracepoints or none, and returns an error that wraps a [*netlab.NeedError] where
// the kernel or the privilege lacks. The caller must call [Trace.Stop] in any case.
func StartTrace(cfg TraceConfig) (*Trace, error) {
	return startLimited(cfg, defaultLimits)
}

func startLimited(cfg TraceConfig, limits traceLimits) (*Trace, error) {
	t := &Trace{}
	if err := t.start(cfg, limits); err != nil {
		return nil, errors.Join(fmt.Errorf("trace: %w", err), t.close())
	}
	t.stop = sync.OnceValues(t.finish)
	return t, nil
}

func (t *Trace) start(cfg TraceConfig, limits traceLimits) error {
	hosts, stays := cfg.Hosts, cfg.Stays
	if stays == 0 {
		stays = DefaultStays
	}
	stays &= AllStates &^ SetOf(Close)
	if len(hosts) == 0 {
		return errors.New("no host to trace")
	}
	for i, h := range hosts {
		if h == nil {
			return fmt.Errorf("host %d is nil", i)
		}
		if slices.Contains(hosts[:i], h) {
			return fmt.Errorf("host %s is traced twice", h.Name())
		}
		t.hosts = append(t.hosts, h.Name())
	}
	if err := netlab.CheckPrivilege(); err != nil {
		return err
	}
	var err error
	if t.layout, err = loadLayout(); err != nil {
		return layoutNeed(err)
	}
	if t.loaded, err = ebpf.NewCollection(traceSpec(t.layout, len(hosts), stays, limits)); err != nil {
		return bpfNeed("loading", err)
	}
	for i, h := range hosts {
		inode, err := namespaceInode(h)
		if err != nil {
			return err
		}
		if err := t.loaded.Maps[mapHosts].Put(inode, uint32(i)); err != nil {
			return fmt.Errorf("host %s: %w", h.Name(), err)
		}
	}
	for _, event := range tracedEvents {
		l, err := link.AttachRawTracepoint(link.RawTracepointOptions{Name: event, Program: t.loaded.Programs[event]})
		if err != nil {
			return bpfNeed("attaching to "+event, err)
		}
		t.links = append(t.links, l)
	}
	return nil
}

// layoutNeed tells a kernel without BTF from one without a tracepoint.
func layoutNeed(err error) error {
	if errors.Is(err, btf.ErrNotFound) {
		return &netlab.NeedError{Need: netlab.NeedTracepoints, Err: fmt.Errorf("%w: %w", netlab.ErrUnsupported, err)}
	}
	if errors.Is(err, btf.ErrNotSupported) || errors.Is(err, fs.ErrNotExist) {
		return &netlab.NeedError{Need: netlab.NeedBTF, Err: fmt.Errorf("%w: %w", netlab.ErrUnsupported, err)}
	}
	// A kernel whose structures or tracepoints are others than those known here.
	return &netlab.NeedError{Need: netlab.NeedTracepoints, Err: err}
}

// bpfNeed tells a lack of privilege, as root of a user namespace has it, and a kernel
// without a tracepoint or bpf(2) from other failures.
func bpfNeed(doing string, err error) error {
	err = fmt.Errorf("%s: %w", doing, err)
	switch {
	case errors.Is(err, unix.EPERM) || errors.Is(err, unix.EACCES):
		var verifier *ebpf.VerifierError
		if errors.As(err, &verifier) && len(verifier.Log) > 0 {
			return err // the program is at fault
		}
		return &netlab.NeedError{Need: netlab.NeedPrivilege, Err: err}
	case errors.Is(err, unix.ENOENT) || errors.Is(err, unix.ENOSYS) || errors.Is(err, ebpf.ErrNotSupported):
		return &netlab.NeedError{Need: netlab.NeedTracepoints, Err: fmt.Errorf("%w: %w", netlab.ErrUnsupported, err)}
	}
	return err
}

// namespaceInode is the number by which the kernel names a host's namespace.
func namespaceInode(h *netlab.Host) (uint32, error) {
	var stat unix.Stat_t
	err := h.Do(func() error { return unix.Stat("/proc/thread-self/ns/net", &stat) })
	return uint32(stat.Ino), err
}

// Stop detaches from the tracepoints and returns what they counted. It is safe to call
// again and returns the same.
func (t *Trace) Stop() (*TraceReport, error) { return t.stop() }

func (t *Trace) finish() (*TraceReport, error) {
	errs := []error{t.detach()}
	report, err := t.read()
	errs = append(errs, err, t.close())
	if err := errors.Join(errs...); err != nil {
		return nil, fmt.Errorf("trace: %w", err)
	}
	return report, nil
}

func (t *Trace) detach() error {
	var errs []error
	for _, l := range t.links {
		errs = append(errs, l.Close())
	}
	t.links = nil
	return errors.Join(errs...)
}

func (t *Trace) close() error {
	err := t.detach()
	if t.loaded != nil {
		t.loaded.Close()
	}
	return err
}
