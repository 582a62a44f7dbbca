package main

import (
	"bufio"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"maps"
	"net/netip"
	"slices"
	"strconv"
	"strings"
	"text/tabwriter"
	"time"

	"github.com/spf13/cobra"
	"golang.org/x/sys/unix"

	"connlab/loadgen"
)

// probeOptions is what `connlab probe` can be told.
type probeOptions struct {
	rounds      int
	interval    time.Duration
	timeout     time.Duration
	retries     int
	rate        float64
	ports       string
	local       string
	json, quiet bool

	connectOnly bool
	every       time.Duration
	duration    time.Duration
}

// Bounds of a probe by hand: no probe is endless.
const (
	maxProbeTargets  = 20_000
	maxProbeRounds   = 1000
	maxProbeRetries  = 100
	maxProbeTime     = time.Hour // of an interval or a timeout
	defaultProbePort = 6379
)

func newProbe() *cobra.Command {
	o := probeOptions{}
	cmd := &cobra.Command{
		Use:   "probe TARGET...",
		Short: "Connect to every instance at once, PING it, and name the local ports of those that fail",
		Long: `Probe is a detector for instances behind a load balancer. In each round it connects
to every instance, sends PING and waits for the reply; what answered stays open until
the round is over, so that all connections exist at the same time. An instance that
fails is tried again at once, on a new socket, and so from another local port.

A TARGET is ADDR, ADDR:PORT, or ADDR+COUNT:PORT for COUNT addresses counting up; the
port is 6379 if none is given. A single - reads targets from standard input, one a line;
empty lines, and what follows a #, do not count.

Why local ports matter: the kernel keeps a local port unique for one destination only.
Connections to two instances can have the same one, and behind a balancer that keeps
the client's address and sends both to the same proxy they are then one connection to
that proxy: the second connect times out, and a retry, from another port, works. If the
timeouts come from ports that another instance has too, look there. --ports says how a
port is chosen:

  kernel          by connect: every second port of net.ipv4.ip_local_port_range, so
                  that two connections meet as if there were half as many ports
  bind            by bind before connect: no two connections of this host have one port,
                  and all of its destinations together share one range
  bind:PORT       this one for every instance: each of them meets the others
  range           by connect: every port of net.ipv4.ip_local_port_range (Linux 6.8;
                  from 6.3 on it works, and takes every second port)
  range:LOW-HIGH  the same within this part of it

Rounds less than ten seconds apart are not independent: so long the kernel keeps, for
each destination, the place where connect begins to look for a port, and two instances
that met in one round are likely to meet in the next. --interval 10s is long enough.

Attempts that fail are logged on standard error, up to 20 of a kind in each round. It needs no root, and works in the
network namespace it is started in.

With --connect-only it is a prober like telnet, for one target or up to 10: it connects
to each every 100 ms (--every) for a minute (--for), sends nothing, and tells how long
each connect took and which SYN was answered. The next connect starts on time even
while earlier ones hang, and so it sees a listener whose accept queue is full as people
do: "Connecting…", until the kernel sends the SYN again and there is room. A connect
that takes 0.5 s or longer is logged, up to 20 of a kind. --timeout is then 30 s by
default; --ports and --local work as above.
A connection is closed as soon as it is open. TIME_WAIT is then the prober's, for a
minute: at 10 connects a second 600 of them, each with a local port. And each connect
takes a place in the accept queue until the server accepts it, closed or not: at a
server that has stopped accepting, the prober fills the queue by itself.

Exit codes: 0 every instance answered at the first try, 1 some timed out, failed, or
closed before the round was over, 2 usage, 3 interrupted. With --connect-only: 0 every
connect took less than 0.5 s, 1 some took longer or failed, 2 and 3 the same.`,
		Example: `  connlab probe 10.8.0.1+1000:6379 --rounds 20
  connlab probe 10.8.0.1 10.8.0.16 --ports bind:41234 --retries 0    # one proxy of 15 serves both: they collide
  connlab probe - --json < instances.txt
  connlab probe --connect-only 10.8.0.1:6379 --for 10m               # who sees "Connecting…", and for how long`,
		Args: func(_ *cobra.Command, args []string) error {
			if len(args) == 0 {
				return usageErrorf("connlab probe wants a target: ADDR:PORT, ADDR+COUNT:PORT, or - to read them from standard input")
			}
			return nil
		},
		RunE: func(cmd *cobra.Command, args []string) error {
			if o.connectOnly {
				cfg, err := o.connectConfig(cmd.Flags())
				if err != nil {
					return err
				}
				if cfg.Targets, err = connectTargets(args, cmd.InOrStdin()); err != nil {
					return err
				}
				return probeConnects(cmd.Context(), o, cfg, cmd.OutOrStdout(), cmd.ErrOrStderr())
			}
			if err := checkDetectorFlags(cmd.Flags()); err != nil {
				return err
			}
			cfg, err := o.config()
			if err != nil {
				return err
			}
			if cfg.Targets, err = probeTargets(args, cmd.InOrStdin()); err != nil {
				return err
			}
			return probe(cmd.Context(), o, cfg, cmd.OutOrStdout(), cmd.ErrOrStderr())
		},
	}
	f := cmd.Flags()
	f.IntVar(&o.rounds, "rounds", 1, "`number` of rounds, in each of which every instance is probed")
	f.DurationVar(&o.interval, "interval", time.Second, "from the end of a round to the next")
	f.DurationVar(&o.timeout, "timeout", time.Second, "how long to wait for a connection, and again for the reply; with --connect-only 30s by default")
	f.BoolVar(&o.connectOnly, "connect-only", false, "connect again and again, send nothing, and tell how long each connect took")
	f.DurationVar(&o.every, "every", 100*time.Millisecond, "with --connect-only: from one connect to the next, on time even while earlier ones hang")
	f.DurationVar(&o.duration, "for", time.Minute, "with --connect-only: how long connects come due")
	f.IntVar(&o.retries, "retries", 3, "`number` of times that an instance that failed is tried again within its round")
	f.Float64Var(&o.rate, "rate", 5000, "`number` of connects per second within a round")
	f.StringVar(&o.ports, "ports", "kernel", "`way` to get a local port: kernel, bind[:PORT], range[:LOW-HIGH]")
	f.StringVar(&o.local, "local", "", "the local `address`; by default the kernel's choice")
	f.BoolVar(&o.json, "json", false, "write the report as one JSON document")
	f.BoolVarP(&o.quiet, "quiet", "q", false, "nothing on standard error: no progress, no log of what fails")
	return cmd
}

// config is all but the targets.
func (o probeOptions) config() (loadgen.ProbeConfig, error) {
	cfg := loadgen.ProbeConfig{Rounds: o.rounds, Interval: o.interval, Timeout: o.timeout, Retries: o.retries, Rate: o.rate}
	switch {
	case o.rounds < 1 || o.rounds > maxProbeRounds:
		return cfg, usageErrorf("--rounds %d is out of range: 1 to %d", o.rounds, maxProbeRounds)
	case o.interval < 0 || o.interval > maxProbeTime:
		return cfg, usageErrorf("--interval %v is out of range: 0 to %v", o.interval, maxProbeTime)
	case o.timeout <= 0 || o.timeout > maxProbeTime:
		return cfg, usageErrorf("--timeout %v is out of range: above 0, at most %v", o.timeout, maxProbeTime)
	case o.retries < 0 || o.retries > maxProbeRetries:
		return cfg, usageErrorf("--retries %d is out of range: 0 to %d", o.retries, maxProbeRetries)
	case !(o.rate > 0 && o.rate <= maxLoadRate):
		return cfg, usageErrorf("--rate %v is out of range: above 0, at most %d", o.rate, maxLoadRate)
	}
	if o.retries == 0 {
		cfg.Retries = -1 // to the library 0 is the default
	}
	source, err := o.source()
	cfg.Sources = []loadgen.Source{source}
	return cfg, err
}

func (o probeOptions) source() (loadgen.Source, error) {
	var local netip.Addr
	if o.local != "" {
		var err error
		if local, err = netip.ParseAddr(o.local); err != nil || !local.Is4() {
			return loadgen.Source{}, usageErrorf("--local %s: want an IPv4 address", o.local)
		}
		if err := checkLocal(local); err != nil {
			return loadgen.Source{}, err
		}
	}
	source := loadgen.LocalSource("local", local)
	how, which, given := strings.Cut(o.ports, ":")
	switch {
	case how == "kernel" && !given:
		return source, nil
	case how == "bind" && !given:
		return source.Bound(netip.AddrPortFrom(local, 0)), nil
	case how == "bind":
		if port, err := parsePort(which); err == nil {
			return source.Bound(netip.AddrPortFrom(local, port)), nil
		}
	case how == "range" && !given:
		return source.InRange(0, 0), nil
	case how == "range":
		from, to, _ := strings.Cut(which, "-")
		low, errLow := parsePort(from)
		high, errHigh := parsePort(to)
		if errLow == nil && errHigh == nil && low <= high {
			return source.InRange(low, high), nil
		}
	}
	return source, usageErrorf("--ports %s: want kernel, bind, bind:PORT, range, or range:LOW-HIGH", o.ports)
}

// checkLocal tells an address that this host does not have from one that has no
// port left, which the same errno stands for later. It takes no port.
func checkLocal(local netip.Addr) error {
	fd, err := unix.Socket(unix.AF_INET, unix.SOCK_STREAM|unix.SOCK_CLOEXEC, 0)
	if err != nil {
		return fmt.Errorf("--local %v: %w", local, err)
	}
	defer unix.Close(fd)
	if err := unix.SetsockoptInt(fd, unix.IPPROTO_IP, unix.IP_BIND_ADDRESS_NO_PORT, 1); err != nil {
		return fmt.Errorf("--local %v: IP_BIND_ADDRESS_NO_PORT: %w", local, err)
	}
	err = unix.Bind(fd, &unix.SockaddrInet4{Addr: local.As4()})
	if errors.Is(err, unix.EADDRNOTAVAIL) {
		return usageErrorf("--local %v is not an address of this host; `ip -4 address` lists those it has", local)
	}
	if err != nil {
		return fmt.Errorf("--local %v: bind: %w", local, err)
	}
	return nil
}

func parsePort(s string) (uint16, error) {
	port, err := strconv.ParseUint(s, 10, 16)
	if err == nil && port == 0 {
		err = errors.New("port 0")
	}
	return uint16(port), err
}

// probeTargets are those of the arguments, - standing for the lines of stdin.
func probeTargets(args []string, stdin io.Reader) ([]netip.AddrPort, error) {
	var targets []netip.AddrPort
	seen := map[netip.AddrPort]bool{}
	add := func(arg string) error {
		more, err := parseTargets(arg)
		if err != nil {
			return err
		}
		if len(targets)+len(more) > maxProbeTargets {
			return usageErrorf("more than %d targets", maxProbeTargets)
		}
		for _, target := range more {
			if seen[target] {
				return usageErrorf("target %q: %v is there twice; want each instance once", arg, target)
			}
			seen[target] = true
		}
		targets = append(targets, more...)
		return nil
	}
	for _, arg := range args {
		if arg != "-" {
			if err := add(arg); err != nil {
				return nil, err
			}
			continue
		}
		lines := bufio.NewScanner(stdin)
		number := 0
		for lines.Scan() {
			number++
			line, _, _ := strings.Cut(lines.Text(), "#")
			if line = strings.TrimSpace(line); line == "" {
				continue
			}
			if err := add(line); err != nil {
				return nil, usageErrorf("standard input, line %d: %w", number, err)
			}
		}
		if err := lines.Err(); err != nil {
			return nil, fmt.Errorf("standard input, line %d: %w", number+1, err)
		}
	}
	if len(targets) == 0 {
		return nil, usageErrorf("no targets on standard input")
	}
	return targets, nil
}

// parseTargets reads ADDR[+COUNT][:PORT].
func parseTargets(arg string) ([]netip.AddrPort, error) {
	bad := usageErrorf("target %q: want ADDR, ADDR:PORT or ADDR+COUNT:PORT with an IPv4 address, as 10.8.0.1+1000:6379", arg)
	hosts, portText, given := strings.Cut(arg, ":")
	port := uint16(defaultProbePort)
	if given {
		var err error
		if port, err = parsePort(portText); err != nil {
			return nil, bad
		}
	}
	first, countText, given := strings.Cut(hosts, "+")
	count := uint64(1)
	if given {
		var err error
		if count, err = strconv.ParseUint(countText, 10, 32); err != nil || count == 0 {
			return nil, bad
		}
	}
	addr, err := netip.ParseAddr(first)
	if err != nil || !addr.Is4() {
		return nil, bad
	}
	if count > maxProbeTargets {
		return nil, usageErrorf("target %q: more than %d addresses", arg, maxProbeTargets)
	}
	targets := make([]netip.AddrPort, 0, count)
	for range count {
		if !addr.IsValid() {
			return nil, usageErrorf("target %q: addresses end at 255.255.255.255", arg)
		}
		targets = append(targets, netip.AddrPortFrom(addr, port))
		addr = addr.Next()
	}
	return targets, nil
}

func probe(ctx context.Context, o probeOptions, cfg loadgen.ProbeConfig, stdout, stderr io.Writer) error {
	cfg.Progress = &loadgen.Progress{}
	log := startProbeLog(&statusLine{w: stderr, quiet: o.quiet, terminal: isTerminal(stderr)}, cfg.Progress)
	attempts := attemptLog{add: log.add, retries: o.retries}
	cfg.OnAttempt = attempts.attempt
	report, err := loadgen.Probe(ctx, cfg)
	attempts.endRound()
	log.end()
	if report == nil {
		return err
	}
	interrupted := errors.Is(err, context.Canceled)
	if interrupted {
		err = nil
	}
	if o.json {
		enc := json.NewEncoder(stdout)
		enc.SetIndent("", "  ")
		err = errors.Join(err, enc.Encode(countedFromOne(report)))
	} else {
		err = errors.Join(err, writeProbe(stdout, report))
	}
	total := report.Total()
	switch {
	case err != nil:
		return err
	case interrupted:
		return exitError{exitVoid, errors.New("interrupted: the report covers what was probed before")}
	case total.First[loadgen.OK] < total.Instances || total.Lost.Sum() > 0:
		return exitError{code: exitRefuted}
	}
	return nil
}

// countedFromOne is the report with its rounds numbered as in the table.
func countedFromOne(report *loadgen.ProbeReport) *loadgen.ProbeReport {
	numbered := *report
	numbered.Rounds = slices.Clone(report.Rounds)
	for i := range numbered.Rounds {
		numbered.Rounds[i].Round++
	}
	return &numbered
}

// writeProbe is the report for people: a line a round, and what they say.
func writeProbe(w io.Writer, r *loadgen.ProbeReport) error {
	table := tabwriter.NewWriter(w, 0, 0, 2, ' ', tabwriter.AlignRight)
	total := r.Total()
	stopped := unfinished(total) > 0 // a column only where it says something
	fmt.Fprint(table, "round\tinstances\tok\ttimeouts\tother\tretries until success\tfailed\tlost\t")
	if stopped {
		fmt.Fprint(table, "canceled\t")
	}
	fmt.Fprintln(table)
	withTimeout := 0
	for _, round := range r.Rounds {
		first := round.First
		if first.Timeouts() > 0 {
			withTimeout++
		}
		fmt.Fprintf(table, "%d\t%d\t%d\t%d\t%d\t%s\t%d\t%d\t", round.Round+1, round.Instances, first[loadgen.OK], first.Timeouts(),
			otherFailures(first).Sum(), retriesText(round.Answered), round.Never-unfinished(round.ProbeCounts), round.Lost.Sum())
		if stopped {
			fmt.Fprintf(table, "%d\t", unfinished(round.ProbeCounts))
		}
		fmt.Fprintln(table)
	}
	if err := table.Flush(); err != nil {
		return err
	}
	for _, h := range []struct {
		name string
		h    *loadgen.Histogram
	}{{"connect", r.Load.Connect}, {"reply", r.Reply}} {
		if h.h.Count() > 0 {
			fmt.Fprintf(w, "%-8s  p50 %v  p90 %v  p99 %v  max %v\n", h.name, round(h.h.Quantile(0.5)), round(h.h.Quantile(0.9)), round(h.h.Quantile(0.99)), round(h.h.Quantile(1)))
		}
	}
	if failed := total.Attempts.Sum() - total.Attempts[loadgen.OK]; failed > 0 {
		fmt.Fprintf(w, "attempts  %v\n", total.Attempts)
	}
	if total.Lost.Sum() > 0 {
		fmt.Fprintf(w, "lost      %v: these answered, and their peer ended them before the round was over\n", total.Lost)
	}
	tried := total.Instances - total.First[loadgen.NotStarted] - total.First[loadgen.Canceled]
	if tried == 0 {
		return nil
	}
	timeouts, other := total.First.Timeouts(), otherFailures(total.First)
	if n := other.Sum(); 2*n > tried {
		what := fmt.Sprint(other)
		if classes := slices.Collect(maps.Keys(other)); len(classes) == 1 {
			what = string(classes[0])
		}
		fmt.Fprintf(w, "%d of %d first tries failed: %s\n", n, tried, what)
	}
	fmt.Fprintf(w, "%d of %d rounds had a timeout; %d of %d first tries timed out: %s\n",
		withTimeout, len(r.Rounds), timeouts, tried, ratio(timeouts, tried))
	if total.Attempts.Timeouts() == 0 {
		return nil
	}
	_, err := fmt.Fprintln(w, sharedPortsText(total))
	return err
}

// otherFailures are the tries that neither succeeded nor timed out nor were
// stopped with the probe.
func otherFailures(tries loadgen.Counts) loadgen.Counts {
	other := loadgen.Counts{}
	for class, n := range tries {
		switch class {
		case loadgen.OK, loadgen.ConnectTimeout, loadgen.ReadTimeout, loadgen.Canceled, loadgen.NotStarted:
		default:
			if n > 0 {
				other[class] = n
			}
		}
	}
	return other
}

// unfinished are the instances of which nothing is known because the probe was
// stopped before their attempt began or ended.
func unfinished(c loadgen.ProbeCounts) int64 {
	return c.Attempts[loadgen.Canceled] + c.First[loadgen.NotStarted]
}

// retriesText is how many instances answered at which retry: "1:5 2:1".
func retriesText(answered []int64) string {
	var parts []string
	for retry, n := range answered {
		if retry > 0 && n > 0 {
			parts = append(parts, fmt.Sprintf("%d:%d", retry, n))
		}
	}
	if len(parts) == 0 {
		return "-"
	}
	return strings.Join(parts, " ")
}

// sharedPortsText sets the timeouts of attempts that shared their local port
// beside those of the others. Attempts that were stopped are neither.
func sharedPortsText(total loadgen.ProbeCounts) string {
	sharing, shared := total.Shared.Sum()-total.Shared[loadgen.Canceled], total.Shared.Timeouts()
	alone, timeouts := total.Attempts.Sum()-total.Attempts[loadgen.Canceled]-sharing, total.Attempts.Timeouts()
	return fmt.Sprintf("%d of %d timeouts, retries included, came from a local port that another instance of the round had: of %d attempts from such a port %s timed out, of the other %d %s",
		shared, timeouts, sharing, ratio(shared, sharing), alone, ratio(timeouts-shared, alone))
}

func ratio(k, n int64) string {
	if n == 0 {
		return "none"
	}
	return strconv.FormatFloat(100*float64(k)/float64(n), 'g', 3, 64) + " %"
}
