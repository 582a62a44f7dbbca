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
type tracing struct{ trace *observe.Trace }

// startTrace traces the hosts. Where the kernel or the privilege lacks what that
// takes, the record says so, what only the tracer can tell is not claimed, and the
// counters still judge.
func startTrace(hosts []*netlab.Host, v *results.Variant) (*tracing, error) {
	trace, err := observe.StartTrace(observe.TraceConfig{Hosts: hosts})
	var need *netlab.NeedError
	if errors.As(err, &need) {
		v.Warnings = append(v.Warnings, "no tracepoints, so neither reasons nor stacks of resets: "+need.Error())
		v.Predictions = slices.DeleteFunc(v.Predictions, func(p results.Prediction) bool { return strings.HasPrefix(p.Metric, traced) })
		return nil, nil
	}
	if err != nil {
		return nil, err
	}
	return &tracing{trace}, nil
}

// stop ends it and returns what was seen, nil where nothing was looked at. It may
// be called again.
func (t *tracing) stop() (*observe.TraceReport, error) {
	if t == nil {
		return nil, nil
	}
	return t.trace.Stop()
}

// throughReceive counts a host's resets that tcp_v4_rcv sent, by tcp_v4_send_reset,
// as a packet came in.
func throughReceive(seen *observe.TraceReport, host string) (n int64) {
	for _, c := range seen.Counts {
		if c.Event != "tcp_send_reset" || c.Host != host {
			continue
		}
		send := slices.Index(c.Stack, "tcp_v4_send_reset")
		if send >= 0 && send+1 < len(c.Stack) && c.Stack[send+1] == "tcp_v4_rcv" {
			n += c.Count
		}
	}
	return n
}

// stacks spells the commonest stacks of an event, innermost function first.
func stacks(seen *observe.TraceReport, event string) []string {
	type path struct{ reason, stack string }
	counts := map[path]int64{}
	for _, c := range seen.Counts {
		if c.Event == event {
			counts[path{c.Reason, strings.Join(c.Stack, " ← ")}] += c.Count
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
