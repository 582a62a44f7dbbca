package scenarios

import (
	"errors"
	"fmt"
	"slices"
	"strings"

	"connlab/netlab"
	"connlab/netlab/observe"
	"connlab/results"
)

// tracing is the kernel's tracepoints while an arm runs; nil where they cannot be
// had.
type tracing struct {
	trace *observe.Trace
	v     *results.Variant
	told  bool // what this kernel does not show
}

// startTrace traces the hosts. Where the kernel or the privilege lacks what that
// takes, the record says so, what only the tracer can tell is not claimed, and the
// counters still judge.
func startTrace(hosts []*netlab.Host, v *results.Variant) (*tracing, error) {
	trace, err := observe.StartTrace(observe.TraceConfig{Hosts: hosts})
	var need *netlab.NeedError
	if errors.As(err, &need) {
		withoutTrace(v, need.Error())
		return nil, nil
	}
	if err != nil {
		return nil, err
	}
	return &tracing{trace: trace, v: v}, nil
}

// withoutTrace takes back what only the tracer can tell.
func withoutTrace(v *results.Variant, why string) {
	v.Warnings = append(v.Warnings, "reasons and stacks of resets are not claimed: "+why)
	v.Predictions = slices.DeleteFunc(v.Predictions, func(p results.Prediction) bool { return strings.HasPrefix(p.Metric, traced) })
}

// stop ends it and returns what was seen, nil where nothing was looked at. It may
// be called again.
func (t *tracing) stop() (*observe.TraceReport, error) {
	if t == nil {
		return nil, nil
	}
	seen, err := t.trace.Stop()
	if err == nil && len(seen.Warnings) > 0 && !t.told {
		t.told = true
		withoutTrace(t.v, strings.Join(seen.Warnings, "; "))
	}
	return seen, err
}

// answeredResets counts a host's resets that tcp_v4_send_reset sent in answer to a
// packet, and those among them for which tcp_v4_rcv had found no socket.
func answeredResets(seen *observe.TraceReport, host string) (noSocket, answers int64) {
	for _, c := range seen.Counts {
		if c.Event != "tcp_send_reset" || c.Host != host {
			continue
		}
		send := slices.Index(c.Stack, "tcp_v4_send_reset")
		if send < 0 {
			continue
		}
		answers += c.Count
		if c.Reason == "NO_SOCKET" && send+1 < len(c.Stack) && c.Stack[send+1] == "tcp_v4_rcv" {
			noSocket += c.Count
		}
	}
	return noSocket, answers
}

// stacks spells the commonest stacks of an event, innermost function first.
func stacks(seen *observe.TraceReport, event string) []string {
	type path struct{ reason, stack string }
	counts := map[path]int64{}
	for _, c := range seen.Counts {
		if c.Event == event {
			stack := c.Stack
			// Below is how the packet came in, which differs and tells nothing.
			if i := slices.Index(stack, "ip_local_deliver_finish"); i >= 0 {
				stack = stack[:i+1]
			}
			counts[path{c.Reason, strings.Join(stack, " ← ")}] += c.Count
		}
	}
	var paths []path
	for p := range counts {
		paths = append(paths, p)
	}
	slices.SortFunc(paths, func(a, b path) int { return int(counts[b] - counts[a]) })
	const shown = 3
	var lines []string
	for _, p := range paths[:min(shown, len(paths))] {
		lines = append(lines, fmt.Sprintf("%s %s ×%d: %s", event, p.reason, counts[p], p.stack))
	}
	return lines
}
