package main

import (
	"cmp"
	"fmt"
	"io"
	"net/netip"
	"slices"
	"strings"
	"time"

	"connlab/loadgen"
)

// Bounds of a report: beyond them a connect is in the counts only, and several
// seconds share a column.
const (
	maxConnectAttempts = 10_000
	timelineColumns    = 60
	connectBarWidth    = 40
)

// connectReport is what `connlab probe --connect-only` found. Times are in
// seconds; those of a connect count from the start of the run.
type connectReport struct {
	Targets []connectTarget `json:"targets"`
	Every   float64         `json:"every"`
	For     float64         `json:"for"`
	Timeout float64         `json:"timeout"`
	// Load is the account: Latency and Lateness count from when a connect was
	// due, Connect from connect(2).
	Load *loadgen.Report `json:"load"`
	// Slow are the connects that succeeded and took SlowAfter or longer.
	Slow      int64   `json:"slow"`
	SlowAfter float64 `json:"slow_after"`
	// SYNRetries is when this kernel sends a SYN again, from connect(2) on, and
	// OKAtRetry how many connects succeeded before the first of these, before the
	// second, and so on.
	SYNRetries []float64 `json:"syn_retries"`
	OKAtRetry  []int64   `json:"ok_at_retry"`
	// SlowestBySecond has the longest connect, failed or not, of those that came
	// due in each second of the run.
	SlowestBySecond []connectSecond `json:"slowest_by_second"`
	// Attempts are the first connects to end, AttemptsLeftOut how many ended after
	// them.
	Attempts        []connectAttempt `json:"attempts"`
	AttemptsLeftOut int64            `json:"attempts_left_out"`

	retries []time.Duration
}

// connectTarget is the part of one target. Due = OK + failed + not started, and
// the latter two are in Failed.
type connectTarget struct {
	Target netip.AddrPort `json:"target"`
	Due    int64          `json:"due"`
	OK     int64          `json:"ok"`
	Slow   int64          `json:"slow"`
	Failed loadgen.Counts `json:"failed"`
}

type connectSecond struct {
	Due     int64   `json:"due"`
	Failed  int64   `json:"failed"`
	Slowest float64 `json:"slowest"`
}

// connectAttempt is one connect; Connected is 0 where it did not succeed.
type connectAttempt struct {
	Target    netip.AddrPort `json:"target"`
	Local     netip.AddrPort `json:"local"`
	Due       float64        `json:"due"`
	Started   float64        `json:"started"`
	Connected float64        `json:"connected"`
	Done      float64        `json:"done"`
	Class     loadgen.Class  `json:"class"`
	Retry     int            `json:"syn_retry"` // the last one sent before it ended
}

func newConnectReport(targets []netip.AddrPort, every, d, timeout time.Duration, retries []time.Duration) *connectReport {
	r := &connectReport{
		Every: every.Seconds(), For: d.Seconds(), Timeout: timeout.Seconds(), SlowAfter: slowConnect.Seconds(),
		SYNRetries: []float64{}, OKAtRetry: make([]int64, len(retries)+1), SlowestBySecond: []connectSecond{}, Attempts: []connectAttempt{},
		retries: retries,
	}
	for _, target := range targets {
		r.Targets = append(r.Targets, connectTarget{Target: target, Failed: loadgen.Counts{}})
	}
	for _, at := range retries {
		r.SYNRetries = append(r.SYNRetries, at.Seconds())
	}
	return r
}

// add accounts for a connect that ended.
func (r *connectReport) add(op loadgen.Op) {
	took, retry := time.Duration(0), 0
	if op.Class != loadgen.NotStarted {
		took = connectTook(op)
		retry = loadgen.RetryOf(took, r.retries)
	}
	target := &r.Targets[op.Index%len(r.Targets)]
	target.Due++
	for len(r.SlowestBySecond) <= int(op.Due/time.Second) {
		r.SlowestBySecond = append(r.SlowestBySecond, connectSecond{})
	}
	second := &r.SlowestBySecond[op.Due/time.Second]
	second.Due++
	second.Slowest = max(second.Slowest, took.Seconds())
	if op.Class == loadgen.OK {
		target.OK++
		r.OKAtRetry[retry]++
		if took >= slowConnect {
			target.Slow++
			r.Slow++
		}
	} else {
		target.Failed[op.Class]++
		if op.Class != loadgen.Canceled {
			second.Failed++
		}
	}
	if len(r.Attempts) == maxConnectAttempts {
		r.AttemptsLeftOut++
		return
	}
	r.Attempts = append(r.Attempts, connectAttempt{
		Target: op.Target, Local: op.Local, Due: op.Due.Seconds(), Started: op.Started.Seconds(),
		Connected: op.Connected.Seconds(), Done: op.Done.Seconds(), Class: op.Class, Retry: retry,
	})
}

// write is the report for people.
func (r *connectReport) write(w io.Writer) error {
	l := r.Load
	fmt.Fprintf(w, "connects  due %d = ok %d + failed %d + not started %d; %d of those ok took %v or longer\n",
		l.Due, l.OK, l.Failed.Sum(), l.NotStarted, r.Slow, slowConnect)
	if l.Failed.Sum() > 0 {
		fmt.Fprintf(w, "failed    %v\n", l.Failed)
	}
	if len(r.Targets) > 1 {
		for _, t := range r.Targets {
			fmt.Fprintf(w, "  %-21v  due %d, ok %d, slow %d, failed: %s\n", t.Target, t.Due, t.OK, t.Slow, cmp.Or(t.Failed.String(), "none"))
		}
	}
	for _, h := range []struct {
		name string
		h    *loadgen.Histogram
	}{{"connect", l.Connect}, {"lateness", l.Lateness}} {
		if h.h.Count() > 0 {
			fmt.Fprintf(w, "%-8s  p50 %v  p90 %v  p99 %v  max %v\n", h.name, round(h.h.Quantile(0.5)), round(h.h.Quantile(0.9)), round(h.h.Quantile(0.99)), round(h.h.Quantile(1)))
		}
	}
	r.writeBars(w)
	return r.writeTimeline(w)
}

// writeBars is the histogram by the SYN that was answered, and what was not.
func (r *connectReport) writeBars(w io.Writer) {
	type bar struct {
		name, when string
		n          int64
	}
	// Whatever needed a retry took longer than slowConnect.
	late := r.Slow
	for _, n := range r.OKAtRetry[1:] {
		late -= n
	}
	bars := []bar{{"first SYN", "under 0.5 s", r.OKAtRetry[0] - late}}
	if late > 0 {
		bars = append(bars, bar{"first SYN", "later", late})
	}
	last := len(r.retries)
	for last > 0 && r.OKAtRetry[last] == 0 {
		last--
	}
	for i, at := range r.retries[:last] {
		bars = append(bars, bar{fmt.Sprintf("SYN retry %d", i+1), fmt.Sprintf("from %g s", at.Seconds()), r.OKAtRetry[i+1]})
	}
	if n := r.Load.Failed[loadgen.ConnectTimeout]; n > 0 {
		bars = append(bars, bar{"gave up", fmt.Sprintf("after %g s", r.Timeout), n})
	}
	other := r.Load.Failed.Sum() - r.Load.Failed[loadgen.ConnectTimeout] - r.Load.Failed[loadgen.Canceled]
	if other > 0 {
		bars = append(bars, bar{"failed", "", other})
	}
	if n := r.Load.Failed[loadgen.Canceled]; n > 0 {
		bars = append(bars, bar{"interrupted", "", n})
	}
	most := slices.MaxFunc(bars, func(a, b bar) int { return cmp.Compare(a.n, b.n) }).n
	fmt.Fprintln(w, "answered")
	for _, b := range bars {
		length := 0
		if b.n > 0 {
			length = max(1, int(b.n*connectBarWidth/most)) // one is to be seen beside a thousand
		}
		fmt.Fprintln(w, strings.TrimRight(fmt.Sprintf("  %-11s  %-13s %6d  %s", b.name, b.when, b.n, strings.Repeat("█", length)), " "))
	}
}

// timelineLevels are the lower ends of what a column's height stands for, in
// seconds: each is twice the one below, as retries are apart in the end.
var timelineLevels = []float64{0, slowConnect.Seconds(), 1, 2, 4, 8, 16, 32}

const timelineBars = "▁▂▃▄▅▆▇█"

// writeTimeline shows the slowest connect of each second, or of several.
func (r *connectReport) writeTimeline(w io.Writer) error {
	if len(r.SlowestBySecond) == 0 {
		return nil
	}
	width := (len(r.SlowestBySecond) + timelineColumns - 1) / timelineColumns
	per := "second"
	if width > 1 {
		per = fmt.Sprintf("%d s", width)
	}
	_, err := fmt.Fprintf(w, "slowest connect that came due in each %s: ▁ under 0.5 s, ▂ from 0.5 s, ▃ from 1 s, ▄ 2, ▅ 4, ▆ 8, ▇ 16, █ 32; x failed\n  %s\n",
		per, timeline(r.SlowestBySecond, width))
	return err
}

// timeline is a column for each width seconds: x where a connect failed, a dot
// where none was due.
func timeline(seconds []connectSecond, width int) string {
	var line strings.Builder
	for column := range slices.Chunk(seconds, width) {
		var all connectSecond
		for _, s := range column {
			all.Due += s.Due
			all.Failed += s.Failed
			all.Slowest = max(all.Slowest, s.Slowest)
		}
		switch {
		case all.Failed > 0:
			line.WriteRune('x')
		case all.Due == 0:
			line.WriteRune('·')
		default:
			line.WriteRune(level(all.Slowest))
		}
	}
	return line.String()
}

func level(seconds float64) rune {
	height := 0
	for i, from := range timelineLevels {
		if seconds >= from {
			height = i
		}
	}
	return []rune(timelineBars)[height]
}
