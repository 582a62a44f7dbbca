package main

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"net/netip"
	"os"
	"strconv"
	"strings"
	"time"

	"github.com/spf13/pflag"

	"connlab/loadgen"
	"connlab/netlab"
)

// Bounds and defaults of `connlab probe --connect-only`.
const (
	connectTimeout    = 30 * time.Second // where --timeout does not say
	slowConnect       = 500 * time.Millisecond
	maxConnectTargets = 10
	minConnectEvery   = time.Millisecond
	maxConnectTime    = 24 * time.Hour
)

// detectorOnly are the flags that say nothing to a prober that connects, and why.
var detectorOnly = map[string]string{
	"rounds":   "it has no rounds: --every and --for say how often it connects",
	"interval": "it does not wait for anything to end: --every says how often it connects",
	"retries":  "it tries nothing again: the kernel does, by sending the SYN again, and that is what it shows",
	"rate":     "its rate is that of --every",
}

// connectOnly are the flags that only such a prober has.
var connectOnly = []string{"every", "for"}

// connectConfig is all but the targets.
func (o probeOptions) connectConfig(flags *pflag.FlagSet) (loadgen.Config, error) {
	cfg := loadgen.Config{ConnectOnly: true, ConnectTimeout: o.timeout, Close: loadgen.Graceful}
	if !flags.Changed("timeout") {
		cfg.ConnectTimeout = connectTimeout
	}
	var refused error
	flags.Visit(func(f *pflag.Flag) {
		if why, is := detectorOnly[f.Name]; is && refused == nil {
			refused = usageErrorf("--%s does not go with --connect-only: %s", f.Name, why)
		}
	})
	switch {
	case refused != nil:
		return cfg, refused
	case o.every < minConnectEvery || o.every > maxProbeTime:
		return cfg, usageErrorf("--every %v is out of range: %v to %v", o.every, minConnectEvery, maxProbeTime)
	case o.duration <= 0 || o.duration > maxConnectTime:
		return cfg, usageErrorf("--for %v is out of range: above 0, at most %v", o.duration, maxConnectTime)
	case cfg.ConnectTimeout <= 0 || cfg.ConnectTimeout > maxProbeTime:
		return cfg, usageErrorf("--timeout %v is out of range: above 0, at most %v", o.timeout, maxProbeTime)
	}
	source, err := o.source()
	cfg.Sources = []loadgen.Source{source}
	return cfg, err
}

// checkDetectorFlags refuses those of the other kind of probe.
func checkDetectorFlags(flags *pflag.FlagSet) error {
	for _, name := range connectOnly {
		if flags.Changed(name) {
			return usageErrorf("--%s says how often --connect-only connects: give that, too", name)
		}
	}
	return nil
}

// connectTicks is one connect to each of n targets, all due at the same time,
// every interval for d.
func connectTicks(interval, d time.Duration, n int) loadgen.Schedule {
	return func(yield func(time.Duration) bool) {
		for due := time.Duration(0); due < d; due += interval {
			for range n {
				if !yield(due) {
					return
				}
			}
		}
	}
}

// linearSYNTimeouts is the setting of the network namespace that this process
// is in; kernels before 6.5 have none, and begin to double at once.
func linearSYNTimeouts() (int, error) {
	const path = "/proc/sys/net/ipv4/tcp_syn_linear_timeouts"
	text, err := os.ReadFile(path)
	if errors.Is(err, fs.ErrNotExist) {
		return 0, nil
	}
	if err != nil {
		return 0, err
	}
	linear, err := strconv.Atoi(strings.TrimSpace(string(text)))
	if err != nil {
		return 0, fmt.Errorf("%s: %w", path, err)
	}
	return linear, nil
}

// retriesWithin is when a SYN without an answer is sent again, up to a timeout.
func retriesWithin(linear int, timeout time.Duration) []time.Duration {
	n := 0
	for ; ; n++ {
		if times := netlab.SYNRetries(linear, n+1); times[n] >= timeout {
			return times[:n]
		}
	}
}

// probeConnects connects at the times that o says, whatever became of the
// connects before, and tells how long each took.
func probeConnects(ctx context.Context, o probeOptions, cfg loadgen.Config, stdout, stderr io.Writer) error {
	linear, err := linearSYNTimeouts()
	if err != nil {
		return fmt.Errorf("when a SYN is sent again: %w", err)
	}
	cfg.Schedule = connectTicks(o.every, o.duration, len(cfg.Targets))
	cfg.Progress = &loadgen.Progress{}
	log := startProbeLog(&statusLine{w: stderr, quiet: o.quiet, terminal: isTerminal(stderr)}, cfg.Progress)
	r := newConnectReport(cfg.Targets, o.every, o.duration, cfg.ConnectTimeout, retriesWithin(linear, cfg.ConnectTimeout))
	lines := connectLog{add: log.add, start: time.Now(), retries: r.retries}
	cfg.OnOp = func(op loadgen.Op) {
		r.add(op)
		lines.connect(op)
	}
	r.Load, err = loadgen.Run(ctx, cfg)
	lines.end()
	log.end()
	if r.Load == nil {
		return err
	}
	interrupted := errors.Is(err, context.Canceled)
	if interrupted {
		err = nil
	}
	if o.json {
		enc := json.NewEncoder(stdout)
		enc.SetIndent("", "  ")
		err = errors.Join(err, enc.Encode(r))
	} else {
		err = errors.Join(err, r.write(stdout))
	}
	switch {
	case err != nil:
		return err
	case interrupted:
		return exitError{exitVoid, errors.New("interrupted: the report covers what came due before")}
	case r.Slow > 0 || r.Load.OK < r.Load.Due:
		return exitError{code: exitRefuted}
	}
	return nil
}

// connectLog logs the connects that took long or failed, of each kind only the
// first maxLinesOfAKind.
type connectLog struct {
	add     func(text string)
	start   time.Time // about when the run began
	retries []time.Duration
	kinds   []loadgen.Class // in the order of their first lines
	lines   map[loadgen.Class]int
}

func (l *connectLog) connect(op loadgen.Op) {
	text := connectLine(l.start, op, l.retries)
	if text == "" {
		return
	}
	if l.lines == nil {
		l.lines = map[loadgen.Class]int{}
	}
	if l.lines[op.Class]++; l.lines[op.Class] == 1 {
		l.kinds = append(l.kinds, op.Class)
	}
	if l.lines[op.Class] <= maxLinesOfAKind {
		l.add(text)
	}
}

// end says how many lines there are besides those that were added.
func (l *connectLog) end() {
	for _, class := range l.kinds {
		what := string(class)
		if class == loadgen.OK {
			what = fmt.Sprintf("open after %v or more", slowConnect)
		}
		if more := l.lines[class] - maxLinesOfAKind; more > 0 {
			l.add(fmt.Sprintf("and %d more like it: %s", more, what))
		}
	}
}

// connectLine is what somebody in front of telnet saw; empty where there was
// nothing to see, and for a connect that was stopped with the probe.
func connectLine(start time.Time, op loadgen.Op, retries []time.Duration) string {
	took := connectTook(op)
	at := start.Add(op.Started).Format("15:04:05.000")
	switch op.Class {
	case loadgen.OK:
		if took < slowConnect {
			return ""
		}
		which := "no SYN retry: the answer or this machine was slow"
		if n := loadgen.RetryOf(took, retries); n > 0 {
			which = fmt.Sprintf("SYN retry %d", n)
		}
		return fmt.Sprintf("%s  %v  Connecting… %s s (%s)", at, op.Target, seconds(took), which)
	case loadgen.ConnectTimeout:
		return fmt.Sprintf("%s  %v  Connecting… gave up after %s s", at, op.Target, seconds(took))
	case loadgen.NotStarted:
		return fmt.Sprintf("%s  %v  not started: too many connects in flight", start.Add(op.Due).Format("15:04:05.000"), op.Target)
	case loadgen.Canceled:
		return ""
	}
	return fmt.Sprintf("%s  %v  Connecting… failed after %s s: %s", at, op.Target, seconds(took), op.Class)
}

// connectTook counts from connect(2), as the kernel's SYN timer does.
func connectTook(op loadgen.Op) time.Duration {
	if op.Class == loadgen.OK {
		return op.Connected - op.Started
	}
	return op.Done - op.Started
}

func seconds(d time.Duration) string { return strconv.FormatFloat(d.Seconds(), 'f', 3, 64) }

// connectTargets are those of probeTargets, which must be few.
func connectTargets(args []string, stdin io.Reader) ([]netip.AddrPort, error) {
	targets, err := probeTargets(args, stdin)
	if len(targets) > maxConnectTargets {
		return nil, usageErrorf("--connect-only is for a few targets, at most %d; these are %d", maxConnectTargets, len(targets))
	}
	return targets, err
}
