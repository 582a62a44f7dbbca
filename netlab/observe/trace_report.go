package observe

import (
	"cmp"
	"fmt"
	"maps"
	"net/netip"
	"slices"
	"strings"
	"time"

	"golang.org/x/sys/unix"
)

// newSynRecv is TCP_NEW_SYN_RECV (include/net/tcp_states.h), the state of a request
// for a connection, which sock_diag shows as SYN_RECV.
const newSynRecv State = 12

// read makes the report of what is in the maps.
func (t *Trace) read() (*TraceReport, error) {
	r := &TraceReport{Lost: map[string]int64{}, Warnings: t.layout.warnings()}
	if err := t.readCounts(r); err != nil {
		return nil, fmt.Errorf("reading counts: %w", err)
	}
	if err := t.readStays(r); err != nil {
		return nil, fmt.Errorf("reading stays: %w", err)
	}
	for event, p := range t.loaded.Programs {
		var lost uint64
		if err := t.loaded.Maps[mapLost].Lookup(uint32(slices.Index(tracedEvents, event)), &lost); err != nil {
			return nil, fmt.Errorf("reading what was lost: %w", err)
		}
		stats, err := p.Stats()
		if err != nil {
			return nil, fmt.Errorf("reading what %s missed: %w", event, err)
		}
		if lost += stats.RecursionMisses; lost > 0 {
			r.Lost[event] = int64(lost)
		}
	}
	return r, nil
}

func (t *Trace) readCounts(r *TraceReport) error {
	counts := map[countKey]uint64{}
	addresses := map[uint64]struct{}{}
	var key countKey
	var count uint64
	entries := t.loaded.Maps[mapCounts].Iterate()
	for entries.Next(&key, &count) {
		counts[key] = count
		for _, address := range key.Stack {
			if address != 0 {
				addresses[address-1] = struct{}{}
			}
		}
	}
	if err := entries.Err(); err != nil {
		return err
	}
	symbols := map[uint64]string{}
	if len(addresses) > 0 {
		var err error
		if symbols, err = kernelSymbols(slices.Collect(maps.Keys(addresses))); err != nil {
			r.Warnings = append(r.Warnings, fmt.Sprintf("stacks have no names: %v", err))
		}
	}
	r.Counts = t.merged(counts, symbols)
	return nil
}

// merged are the counts by name: what is the same but for an address within a function
// is the same.
func (t *Trace) merged(counts map[countKey]uint64, symbols map[uint64]string) []TraceCount {
	sums := map[string]*TraceCount{}
	for key, n := range counts {
		c := TraceCount{
			Event: countedEvents[key.Event], Host: t.hosts[key.Host],
			Local: netip.AddrFrom4(key.Local), Remote: netip.AddrFrom4(key.Remote),
			State: State(key.State), Stack: functions(key.Stack, symbols), Count: int64(n),
		}
		if c.State == newSynRecv {
			c.State = SynRecv
		}
		c.Reason = t.layout.reason(c.Event, key.Reason)
		id := fmt.Sprint(c.Event, c.Host, c.Local, c.Remote, c.Reason, c.State, c.Stack)
		if sum := sums[id]; sum != nil {
			sum.Count += c.Count
		} else {
			sums[id] = &c
		}
	}
	all := make([]TraceCount, 0, len(sums))
	for _, c := range sums {
		all = append(all, *c)
	}
	slices.SortFunc(all, compareCounts)
	return all
}

// compareCounts orders by host and event, and the most frequent first.
func compareCounts(a, b TraceCount) int {
	return cmp.Or(
		cmp.Compare(a.Host, b.Host), cmp.Compare(a.Event, b.Event), cmp.Compare(b.Count, a.Count),
		a.Local.Compare(b.Local), a.Remote.Compare(b.Remote), cmp.Compare(a.Reason, b.Reason),
		cmp.Compare(a.State, b.State), slices.Compare(a.Stack, b.Stack),
	)
}

// functions are the names of a stack from the function on that the tracepoint is in.
// A frame holds the address that its call returns to, which may be that of the next
// function.
func functions(stack [stackFrames]uint64, symbols map[uint64]string) []string {
	var names []string
	for _, address := range stack {
		if address == 0 {
			break
		}
		name, ok := symbols[address-1]
		if !ok {
			return nil
		}
		if name = functionName(name); len(names) > 0 || !ofTracing(name) {
			names = append(names, name)
		}
	}
	return names
}

// ofTracing tells the frames of the program and of the tracepoint's own functions
// (include/trace/bpf_probe.h, include/linux/tracepoint.h), or its interpreter's.
func ofTracing(function string) bool {
	for _, prefix := range []string{"bpf_", "__bpf_", "___bpf_", "__traceiter_", "__probestub_"} {
		if strings.HasPrefix(function, prefix) {
			return true
		}
	}
	return false
}

// reason is the name of a reason, "" for a tracepoint without. An unknown one, as a
// module may have, has its number for a name. A retransmission that was not sent has
// the errno's name.
func (k *kernelLayout) reason(event string, code uint32) string {
	if event == eventRetransmit {
		if code == 0 {
			return ""
		}
		return unix.ErrnoName(unix.Errno(-int32(code)))
	}
	names, ok := k.reasons[event]
	if !ok {
		return ""
	}
	if name, ok := names[code]; ok {
		return name
	}
	return fmt.Sprintf("reason %d", code)
}

func (t *Trace) readStays(r *TraceReport) error {
	for host, name := range t.hosts {
		for state := Established; state <= Closing; state++ {
			for next := Established; next <= Closing; next++ {
				var perCPU []stayValue
				if err := t.loaded.Maps[mapStays].Lookup(stayIndex(host, state, next), &perCPU); err != nil {
					return err
				}
				if stay := sumStays(perCPU); stay.Count > 0 {
					stay.Host, stay.State, stay.Next = name, state, next
					r.Stays = append(r.Stays, stay)
				}
			}
		}
	}
	return nil
}

// sumStays adds up what each CPU has counted.
func sumStays(perCPU []stayValue) Stay {
	var stay Stay
	var buckets [stayBuckets]int64
	for _, v := range perCPU {
		stay.Count += int64(v.Count)
		stay.Total += time.Duration(v.Total)
		stay.Longest = max(stay.Longest, time.Duration(v.Longest))
		for i, n := range v.Buckets {
			buckets[i] += int64(n)
		}
	}
	for i, n := range buckets {
		if n > 0 {
			stay.Buckets = append(stay.Buckets, StayBucket{From: 1 << i, Count: n})
		}
	}
	return stay
}
