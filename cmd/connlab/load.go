package main

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net/netip"
	"time"

	"github.com/spf13/cobra"

	"connlab/loadgen"
)

// loadOptions is what `connlab load` can be told.
type loadOptions struct {
	addr           string
	rate           float64
	duration       time.Duration
	poisson        bool
	seed           uint64
	held           int
	connectTimeout time.Duration
	replyTimeout   time.Duration
	resetClose     bool
	passiveClose   bool
	mine           bool
	json, quiet    bool
}

func newLoad() *cobra.Command {
	o := loadOptions{}
	cmd := &cobra.Command{
		Use:   "load",
		Short: "Load a server with open-loop arrivals, and account for every operation",
		Long: `Load opens connections at the times a schedule says, whether or not the server
keeps up: each operation connects, sends PING, reads the reply and closes.
Latency counts from the moment an operation was due, so a server that stands still
is seen to; every operation ends in exactly one column: ok, failed (by class), or
not started.

With --held N the operations go over N connections that are opened first and kept.

Who closes first keeps the connection in TIME_WAIT for a minute. By default that is
load, and each costs it a local port; with --close-reset it is nobody; with
--close-passive it is the server, which must be one that closes by itself, as
connlab server --close-after 1 does after one reply. A server that does not close
within --reply-timeout of its reply then makes the operation fail as close_timeout.
Latency is always that of the reply.

` + exitHelp + `
A run whose generator fell behind its schedule is void (3); one with failed
operations exits with 1.`,
		Example: `  connlab load --addr 127.0.0.1:6379 --rate 2000 --duration 10s
  connlab load --addr 127.0.0.1:6379 --rate 2000 --duration 10s --held 100 --poisson --json
  connlab load --addr 127.0.0.1:6379 --rate 500 --duration 10s --close-passive`,
		Args: exactly(0, "no argument, only flags"),
		RunE: func(cmd *cobra.Command, _ []string) error {
			return load(cmd.Context(), o, cmd.OutOrStdout(), cmd.ErrOrStderr())
		},
	}
	f := cmd.Flags()
	f.StringVar(&o.addr, "addr", "127.0.0.1:6379", "the server: IPv4 `address:port`")
	f.Float64Var(&o.rate, "rate", 1000, "operations per second")
	f.DurationVar(&o.duration, "duration", 5*time.Second, "how long operations come due")
	f.BoolVar(&o.poisson, "poisson", false, "Poisson arrivals instead of evenly spaced ones")
	f.Uint64Var(&o.seed, "seed", 1, "seed of the Poisson arrivals")
	f.IntVar(&o.held, "held", 0, "open so many `connections` first and send the operations over them")
	f.DurationVar(&o.connectTimeout, "connect-timeout", 5*time.Second, "how long to wait for a connection")
	f.DurationVar(&o.replyTimeout, "reply-timeout", 5*time.Second, "how long to wait for a reply")
	f.BoolVar(&o.resetClose, "close-reset", false, "close with RST (SO_LINGER 0): no TIME_WAIT is left")
	f.BoolVar(&o.passiveClose, "close-passive", false, "after the reply wait for the server to close first: TIME_WAIT is the server's")
	f.BoolVar(&o.mine, "i-operate-this-target", false, "allow a target other than loopback")
	f.BoolVar(&o.json, "json", false, "write the report as one JSON document")
	f.BoolVarP(&o.quiet, "quiet", "q", false, "no progress on standard error")
	return cmd
}

// Bounds of a load by hand: no run is endless.
const (
	maxLoadRate     = 100_000
	maxLoadDuration = time.Hour
	maxLoadHeld     = 100_000
	// holdRate is how fast held connections are opened.
	holdRate = 5000
	// behindLimit is by how much one in a hundred operations may start late
	// before latencies mean nothing.
	behindLimit = 20 * time.Millisecond
)

func (o loadOptions) config() (loadgen.Config, error) {
	var cfg loadgen.Config
	target, err := netip.ParseAddrPort(o.addr)
	switch {
	case err != nil || !target.Addr().Is4() || target.Port() == 0:
		return cfg, usageErrorf("--addr %s: want an IPv4 address and a port, as 127.0.0.1:6379", o.addr)
	case !target.Addr().IsLoopback() && !o.mine:
		return cfg, usageErrorf("--addr %s is not loopback: add --i-operate-this-target if it is yours to load", o.addr)
	case !(o.rate > 0 && o.rate <= maxLoadRate):
		return cfg, usageErrorf("--rate %v is out of range: above 0, at most %d", o.rate, maxLoadRate)
	case o.duration <= 0 || o.duration > maxLoadDuration:
		return cfg, usageErrorf("--duration %v is out of range: above 0, at most %v", o.duration, maxLoadDuration)
	case o.held < 0 || o.held > maxLoadHeld:
		return cfg, usageErrorf("--held %d is out of range: 0 to %d", o.held, maxLoadHeld)
	case o.connectTimeout <= 0 || o.replyTimeout <= 0:
		return cfg, usageErrorf("--connect-timeout and --reply-timeout must be above 0")
	case o.passiveClose && o.resetClose:
		return cfg, usageErrorf("--close-passive and --close-reset are two ways to close: give one of them")
	case o.passiveClose && o.held > 0:
		return cfg, usageErrorf("--close-passive closes a connection after one reply, --held keeps it: give one of them")
	}
	cfg = loadgen.Config{
		Targets:        []netip.AddrPort{target},
		Schedule:       loadgen.Constant(o.rate, o.duration),
		ConnectTimeout: o.connectTimeout,
		ReplyTimeout:   o.replyTimeout,
	}
	if o.poisson {
		cfg.Schedule = loadgen.Poisson(o.rate, o.duration, o.seed)
	}
	switch {
	case o.resetClose:
		cfg.Close = loadgen.Reset
	case o.passiveClose:
		cfg.Close = loadgen.Passive
	}
	return cfg, nil
}

func load(ctx context.Context, o loadOptions, stdout, stderr io.Writer) error {
	cfg, err := o.config()
	if err != nil {
		return err
	}
	if o.held > 0 {
		opening := cfg
		opening.Schedule = loadgen.Constant(holdRate, maxLoadDuration).First(o.held)
		held, report, err := loadgen.Hold(ctx, opening)
		if err != nil {
			return err
		}
		defer held.Close()
		if held.Len() < o.held {
			return fmt.Errorf("only %d of %d connections could be opened: %v", held.Len(), o.held, report.Failed)
		}
		cfg.Held = held
	}
	line := &statusLine{w: stderr, quiet: o.quiet, terminal: isTerminal(stderr)}
	cfg.Progress = &loadgen.Progress{}
	stop := every(time.Second, func() {
		s := cfg.Progress.Snapshot()
		line.show(fmt.Sprintf("due %d, in flight %d, ok %d, failed %d, not started %d", s.Due, s.InFlight, s.OK, s.Failed, s.NotStarted))
	})
	report, err := loadgen.Run(ctx, cfg)
	stop()
	line.clear()
	if report == nil {
		return err
	}
	interrupted := errors.Is(err, context.Canceled)
	if interrupted {
		line.print("interrupted: the report covers what came due before")
		err = nil
	}
	if o.json {
		enc := json.NewEncoder(stdout)
		enc.SetIndent("", "  ")
		err = errors.Join(err, enc.Encode(report))
	} else {
		err = errors.Join(err, writeReport(stdout, report))
	}
	if err != nil {
		return err
	}
	if interrupted {
		return exitError{code: exitVoid}
	}
	if behind := report.Behind(behindLimit); behind != nil {
		return exitError{exitVoid, behind}
	}
	if n := report.Failed.Sum(); n > 0 {
		return exitError{code: exitRefuted}
	}
	return nil
}

// writeReport is the account for people.
func writeReport(w io.Writer, r *loadgen.Report) error {
	_, err := fmt.Fprintf(w, "operations  due %d = ok %d + failed %d + not started %d\n", r.Due, r.OK, r.Failed.Sum(), r.NotStarted)
	if n := r.Failed.Sum(); n > 0 {
		fmt.Fprintf(w, "failed      %v\n", r.Failed)
	}
	for _, h := range []struct {
		name string
		h    *loadgen.Histogram
	}{{"connect", r.Connect}, {"latency", r.Latency}, {"lateness", r.Lateness}} {
		if h.h.Count() == 0 {
			continue
		}
		fmt.Fprintf(w, "%-10s  p50 %v  p90 %v  p99 %v  p99.9 %v  max %v\n", h.name,
			round(h.h.Quantile(0.5)), round(h.h.Quantile(0.9)), round(h.h.Quantile(0.99)), round(h.h.Quantile(0.999)), round(h.h.Quantile(1)))
	}
	fmt.Fprintln(w, "latency counts from the due time; lateness is how late the generator itself was")
	return err
}

func round(d time.Duration) time.Duration { return d.Round(10 * time.Microsecond) }

// every calls f at an interval until stop, which waits for it.
func every(interval time.Duration, f func()) (stop func()) {
	quit, done := make(chan struct{}), make(chan struct{})
	go func() {
		defer close(done)
		t := time.NewTicker(interval)
		defer t.Stop()
		for {
			select {
			case <-quit:
				return
			case <-t.C:
				f()
			}
		}
	}()
	return func() { close(quit); <-done }
}
