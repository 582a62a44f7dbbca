package main

import (
	"fmt"
	"slices"
	"sync/atomic"
	"time"

	"connlab/loadgen"
)

// maxLinesOfAKind is how many lines of one kind a round's log has: what is said
// 20 times is not clearer when it is said 20,000 times.
const maxLinesOfAKind = 20

// kindOfLine is what the lines of two attempts have in common.
type kindOfLine struct {
	class  loadgen.Class
	shared bool // the local port is another instance's too
}

// attemptLog logs the attempts of each round, of each kind only the first.
type attemptLog struct {
	add     func(text string)
	retries int
	round   int
	kinds   []kindOfLine // in the order of their first lines
	lines   map[kindOfLine]int
}

func (l *attemptLog) attempt(a loadgen.Attempt) {
	text := attemptLine(a, l.retries)
	if text == "" {
		return
	}
	if a.Round != l.round {
		l.endRound()
		l.round = a.Round
	}
	kind := kindOfLine{a.Class, len(a.SharedWith) > 0 && a.Class != loadgen.OK}
	if l.lines == nil {
		l.lines = map[kindOfLine]int{}
	}
	if l.lines[kind]++; l.lines[kind] == 1 {
		l.kinds = append(l.kinds, kind)
	}
	if l.lines[kind] <= maxLinesOfAKind {
		l.add(text)
	}
}

// endRound says how many lines the round has besides those that were added.
func (l *attemptLog) endRound() {
	for _, kind := range l.kinds {
		more := l.lines[kind] - maxLinesOfAKind
		if more <= 0 {
			continue
		}
		what := string(kind.class)
		switch {
		case kind.class == loadgen.OK:
			what = "answered at a retry"
		case kind.shared:
			what += " from a port that another instance has too"
		}
		l.add(fmt.Sprintf("round %d: and %d more like it: %s", l.round+1, more, what))
	}
	l.kinds, l.lines = nil, nil
}

// probeLog writes to the terminal, which may stand still, on behalf of the run's
// thread, which must not: what is too much for its queue is counted, not shown.
type probeLog struct {
	line    *statusLine
	lines   chan string
	dropped atomic.Int64
	written chan struct{}
}

// maxPendingLines is how many lines a log holds for a terminal that stands still.
const maxPendingLines = 4096

func startProbeLog(line *statusLine, progress *loadgen.Progress) *probeLog {
	l := &probeLog{line: line, lines: make(chan string, maxPendingLines), written: make(chan struct{})}
	go func() {
		defer close(l.written)
		l.write(progress)
	}()
	return l
}

// add never waits.
func (l *probeLog) add(text string) {
	select {
	case l.lines <- text:
	default:
		l.dropped.Add(1)
	}
}

// end returns when all that was added is written or counted.
func (l *probeLog) end() {
	close(l.lines)
	<-l.written
	if n := l.dropped.Load(); n > 0 {
		l.line.print(fmt.Sprintf("%d lines not shown", n))
	}
}

// write prints lines as they come, and the progress once a second.
func (l *probeLog) write(progress *loadgen.Progress) {
	tick := time.NewTicker(time.Second)
	defer tick.Stop()
	for {
		select {
		case text, more := <-l.lines:
			l.line.clear()
			if !more {
				return
			}
			l.line.print(text)
		case <-tick.C:
			s := progress.Snapshot()
			l.line.show(fmt.Sprintf("attempts %d, in flight %d, ok %d, failed %d", s.Started, s.InFlight, s.OK, s.Failed))
		}
	}
}

// connectClasses are those of a connect; the others are of the PING over it.
var connectClasses = []loadgen.Class{
	loadgen.ConnectTimeout, loadgen.ConnectRefused, loadgen.ConnectReset, loadgen.NoLocalPort, loadgen.TooManyFiles, loadgen.Unreachable,
}

// attemptLine is the log line of an attempt that failed or that was a retry, as
// detectors write it; empty for others.
func attemptLine(a loadgen.Attempt, retries int) string {
	if a.Class == loadgen.Canceled || a.Class == loadgen.OK && a.Retry == 0 {
		return ""
	}
	client := "no port"
	if a.Local.Port() != 0 {
		client = a.Local.String()
	}
	if a.Class == loadgen.OK {
		return fmt.Sprintf("client(%s) instance %v answered at retry %d", client, a.Target, a.Retry)
	}
	what, how := "PING to", "failed: "+string(a.Class)
	if slices.Contains(connectClasses, a.Class) {
		what = "connect to"
	}
	if a.Class == loadgen.ConnectTimeout || a.Class == loadgen.ReadTimeout {
		how = "timeout"
	}
	next := fmt.Sprintf("retry times %d", a.Retry+1)
	if a.Retry == retries {
		next = fmt.Sprintf("given up after %d retries", retries)
	}
	text := fmt.Sprintf("client(%s) %s instance %v %s, %s", client, what, a.Target, how, next)
	if len(a.SharedWith) > 0 {
		text += fmt.Sprintf("; local port %d is also used for %v", a.Local.Port(), a.SharedWith[0])
		if more := len(a.SharedWith) - 1; more > 0 {
			text += fmt.Sprintf(" and %d more", more)
		}
	}
	return text
}
