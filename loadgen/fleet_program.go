package loadgen

import (
	"context"
	"encoding/json"
	"errors"
	"flag"
	"fmt"
	"io"
	"net/netip"
	"os"
	"runtime/debug"
	"strings"
	"time"

	"golang.org/x/sys/unix"
)

// Exit codes of [FleetMain].
const (
	fleetOK = iota
	fleetFailed
	fleetUsage
	fleetInterrupted
)

const (
	maxFleetWait = time.Hour      // of a time to settle, and of the way to a storm's moment
	maxFleetFor  = 24 * time.Hour // of a fleet by hand
	// frugalGC makes the heap grow by less than half before it is collected:
	// the program is there to hold many clients in little memory.
	frugalGC = 30
)

// fleetOptions is what the program can be told.
type fleetOptions struct {
	addr, source   string
	clients        int
	window         int
	connectTimeout time.Duration
	replyTimeout   time.Duration
	reconnect      Reconnect
	keep           time.Duration
	mine           bool
	json, control  bool
}

// FleetFlags registers the flags of [FleetMain], for a help page.
func FleetFlags(fs *flag.FlagSet) { new(fleetOptions).flags(fs) }

func (o *fleetOptions) flags(fs *flag.FlagSet) {
	fs.StringVar(&o.addr, "addr", "127.0.0.1:6379", "the server: IPv4 `address:port`")
	fs.StringVar(&o.source, "source", "", "local `addresses`, separated by commas, which clients take in turn; up to some 10,000 clients each")
	fs.IntVar(&o.clients, "clients", 1000, "`number` of connections, each of which takes an open file")
	fs.IntVar(&o.window, "window", 128, "`number` of connects in flight while it fills")
	fs.DurationVar(&o.connectTimeout, "connect-timeout", 30*time.Second, "how long an attempt waits for a connection")
	fs.DurationVar(&o.replyTimeout, "reply-timeout", 30*time.Second, "how long an attempt waits for the reply")
	fs.DurationVar(&o.reconnect.Spread, "spread", 0, "the `time` over which first attempts after a cut are spread; 0: at once")
	fs.BoolVar(&o.reconnect.Jitter, "jitter", false, "spread them at random, not evenly")
	fs.DurationVar(&o.reconnect.Base, "base", 0, "the longest `wait` after a failed attempt, doubled with each; 0: at once")
	fs.DurationVar(&o.reconnect.Max, "max", 30*time.Second, "the `wait` at which doubling ends")
	fs.DurationVar(&o.reconnect.Unsteady, "unsteady", 0, "the `time` by which each attempt is later, at random, so that clients do not keep step with the server")
	fs.Uint64Var(&o.reconnect.Seed, "seed", 1, "seed of the random times")
	fs.DurationVar(&o.keep, "for", 10*time.Minute, "how long to hold the connections, unless interrupted before")
	fs.BoolVar(&o.mine, "i-operate-this-target", false, "allow a target other than loopback")
	fs.BoolVar(&o.json, "json", false, "write the report as one JSON document")
	fs.BoolVar(&o.control, "control", false, "take commands from standard input and answer each with a line of JSON: "+fleetCommands)
}

func (o *fleetOptions) config() (FleetConfig, error) {
	cfg := FleetConfig{
		Clients: o.clients, Window: o.window,
		ConnectTimeout: o.connectTimeout, ReplyTimeout: o.replyTimeout, Reconnect: o.reconnect,
	}
	var err error
	cfg.Target, err = netip.ParseAddrPort(o.addr)
	switch {
	case err != nil || !cfg.Target.Addr().Is4() || cfg.Target.Port() == 0:
		return cfg, fmt.Errorf("--addr %s: want an IPv4 address and a port, as 127.0.0.1:6379", o.addr)
	case !cfg.Target.Addr().IsLoopback() && !o.mine:
		return cfg, fmt.Errorf("--addr %s is not loopback: add --i-operate-this-target if it is yours to load", o.addr)
	case o.connectTimeout <= 0 || o.replyTimeout <= 0 || o.window < 1 || o.reconnect.Max <= 0:
		return cfg, errors.New("--connect-timeout, --reply-timeout, --window and --max must be above 0")
	case o.keep <= 0 || o.keep > maxFleetFor:
		return cfg, fmt.Errorf("--for %v is out of range: above 0, at most %v", o.keep, maxFleetFor)
	}
	if o.source != "" {
		for text := range strings.SplitSeq(o.source, ",") {
			addr, err := netip.ParseAddr(text)
			if err != nil || !addr.Is4() {
				return cfg, fmt.Errorf("--source %s: want an IPv4 address", text)
			}
			cfg.Sources = append(cfg.Sources, addr)
		}
	}
	return cfg.withDefaults()
}

// FleetMain runs a [Fleet] as a program: it reads the flags, fills, and holds the
// connections, which reconnect when they are cut, until ctx is done or for as
// long as it was told; then it reports. With --control it does what the lines of
// stdin say instead. It returns the exit code: 0, 1 where a client ended without a
// connection or something failed, 2 for wrong usage, 3 where the fill was
// interrupted. While it runs the garbage collector of the process is a frugal one.
func FleetMain(ctx context.Context, args []string, stdin io.Reader, stdout, stderr io.Writer) int {
	var o fleetOptions
	fs := flag.NewFlagSet("fleet", flag.ContinueOnError)
	fs.SetOutput(stderr)
	o.flags(fs)
	switch err := fs.Parse(args); {
	case errors.Is(err, flag.ErrHelp):
		return fleetOK
	case err != nil:
		return fleetUsage
	case fs.NArg() > 0:
		fmt.Fprintf(stderr, "fleet: unexpected argument %q: everything is a flag, see --help\n", fs.Arg(0))
		return fleetUsage
	}
	cfg, err := o.config()
	if err != nil {
		fmt.Fprintln(stderr, "fleet:", err)
		return fleetUsage
	}
	defer debug.SetGCPercent(debug.SetGCPercent(frugalGC))
	f, err := NewFleet(cfg)
	if err != nil {
		fmt.Fprintln(stderr, err)
		return fleetFailed
	}
	defer f.Close()
	if o.control {
		err = controlFleet(ctx, f, stdin, stdout)
	} else {
		err = o.byHand(ctx, f, stdout, stderr)
	}
	switch {
	case err == nil:
		return fleetOK
	case errors.Is(err, context.Canceled):
		fmt.Fprintln(stderr, "fleet: interrupted while it filled")
		return fleetInterrupted
	}
	fmt.Fprintln(stderr, "fleet:", strings.TrimPrefix(err.Error(), "fleet: "))
	return fleetFailed
}

// byHand fills, keeps and reports.
func (o *fleetOptions) byHand(ctx context.Context, f *Fleet, stdout, stderr io.Writer) error {
	stop := showProgress(f, stderr)
	fill, err := f.Fill(ctx)
	held := NewFleetReport()
	if err == nil {
		limited, cancel := context.WithTimeout(ctx, o.keep)
		held, err = f.Keep(limited)
		cancel()
	}
	stop()
	if fill == nil || held == nil {
		return err
	}
	if o.json {
		enc := json.NewEncoder(stdout)
		enc.SetIndent("", "  ")
		err = errors.Join(err, enc.Encode(map[string]*FleetReport{"fill": fill, "held": held}))
	} else {
		err = errors.Join(err, writeFleet(stdout, "filled", fill), writeFleet(stdout, "held", held))
	}
	if err == nil && held.Open < held.Clients {
		err = fmt.Errorf("%d of %d clients ended without a connection", held.Clients-held.Open, held.Clients)
	}
	return err
}

// showProgress writes a line every second where w is a terminal.
func showProgress(f *Fleet, w io.Writer) (stop func()) {
	file, ok := w.(*os.File)
	if !ok {
		return func() {}
	}
	if _, err := unix.IoctlGetTermios(int(file.Fd()), unix.TCGETS); err != nil {
		return func() {}
	}
	quit, done := make(chan struct{}), make(chan struct{})
	go func() {
		defer close(done)
		tick := time.NewTicker(time.Second)
		defer tick.Stop()
		for {
			select {
			case <-quit:
				return
			case <-tick.C:
				fmt.Fprintf(w, "%s  %d of %d connected\n", time.Now().Format(time.TimeOnly), f.Open(), len(f.clients))
			}
		}
	}()
	return func() { close(quit); <-done }
}

// writeFleet is the account for people. Nothing is written of an account of nobody.
func writeFleet(w io.Writer, what string, r *FleetReport) error {
	if r.Clients == 0 {
		return nil
	}
	_, err := fmt.Fprintf(w, "%-8s  %d of %d clients connected after %v\n", what, r.Open, r.Clients, r.Took().Round(time.Millisecond))
	if n := r.Cut.Sum(); n > 0 {
		fmt.Fprintf(w, "cut       %d: %v\n", n, r.Cut)
	}
	if r.Attempts > 0 {
		fmt.Fprintf(w, "attempts  %d = ok %d + failed %d\n", r.Attempts, r.OK, r.Failed.Sum())
	}
	if r.Failed.Sum() > 0 {
		fmt.Fprintf(w, "failed    %v\n", r.Failed)
	}
	if r.FirstVictims > 0 {
		fmt.Fprintf(w, "victims   %d first attempts had their SYN go unanswered\n", r.FirstVictims)
	}
	for _, h := range []struct {
		name string
		h    *Histogram
	}{{"connect", r.Connect}, {"reply", r.Reply}, {"recover", r.Recover}, {"lateness", r.Lateness}} {
		if h.h.Count() > 0 && (h.h != r.Recover || r.Cut.Sum() > 0) {
			fmt.Fprintf(w, "%-8s  p50 %v  p99 %v  max %v\n", h.name, h.h.Quantile(0.5).Round(10*time.Microsecond),
				h.h.Quantile(0.99).Round(10*time.Microsecond), h.h.Quantile(1).Round(10*time.Microsecond))
		}
	}
	return err
}
