package main

import (
	"errors"
	"fmt"
	"io"
	"net"
	"os"
	"path/filepath"

	"github.com/spf13/cobra"
	"golang.org/x/sys/unix"

	"connlab/netlab"
	"connlab/netlab/observe/exporter"
	"connlab/results"
	"connlab/scenarios"
)

func newRun() *cobra.Command {
	var opt scenarios.Options
	var asJSON, quiet, verbose bool
	var save, timelines, captures, counters, metrics string
	cmd := &cobra.Command{
		Use:   "run INCIDENT",
		Short: "Reproduce an incident, and judge predicted against measured",
		Long: `Run builds the incident in network namespaces, predicts its numbers, drives the
load, measures at both ends and prints predicted, measured, error and verdict.
It needs root (or CAP_NET_ADMIN and CAP_SYS_ADMIN) and changes nothing outside
its own namespaces; Ctrl-C, or even kill -9, leaves nothing behind.

` + exitHelp,
		Example: `  sudo connlab run backlog
  sudo connlab run backlog --variant incident --set backlog=1024
  sudo connlab run backlog --server redis --json > redis.json
  sudo connlab run backlog --variant incident --set stall=0s    # the check can fail
  sudo connlab run tuple-collision --variant forced-first --capture .
  sudo connlab run backlog --variant incident --counters . &&
    connlab diagnose --before backlog-incident-server.before.txt backlog-incident-server.after.txt
  sudo connlab run backlog --variant incident --metrics :9464 &
    sleep 5; curl -s http://127.0.0.1:9464/metrics | grep ListenOverflows`,
		Args: exactly(1, "an incident; see `connlab list`"),
		RunE: func(cmd *cobra.Command, args []string) (runErr error) {
			s, err := scenarios.Find(args[0])
			if err != nil {
				return err
			}
			for _, given := range []struct{ flag, dir string }{{"save", save}, {"timeline", timelines}, {"capture", captures}, {"counters", counters}} {
				if err := checkDirectory(given.flag, given.dir); err != nil {
					return err
				}
			}
			line := &statusLine{w: cmd.ErrOrStderr(), quiet: quiet}
			line.terminal = isTerminal(line.w)
			opt.Progress = line.show
			if verbose {
				opt.Log = cmd.ErrOrStderr()
			}
			if timelines != "" {
				opt.Timeline = func(variant string, write func(io.Writer) error) error {
					return writeFile(filepath.Join(timelines, s.Name+"-"+variant+".csv"), write)
				}
			}
			captured := false
			if captures != "" {
				opt.Capture = func(variant string, file []byte) error {
					captured = true
					return os.WriteFile(filepath.Join(captures, s.Name+"-"+variant+".pcapng"), file, 0o644)
				}
			}
			if counters != "" {
				opt.Counters = func(variant, host string, before, after []byte) error {
					path := filepath.Join(counters, s.Name+"-"+variant+"-"+host)
					return errors.Join(os.WriteFile(path+".before.txt", before, 0o644), os.WriteFile(path+".after.txt", after, 0o644))
				}
			}
			if metrics != "" {
				stop, err := serveMetrics(metrics, &opt, cmd.ErrOrStderr())
				if err != nil {
					return err
				}
				defer func() { runErr = errors.Join(runErr, stop()) }()
			}
			rec, err := scenarios.Run(cmd.Context(), s, opt)
			line.clear()
			if rec == nil {
				return err
			}
			if captures != "" && !captured {
				fmt.Fprintf(line.w, "--capture %s: none of these variants captured packets, so nothing was written there\n", captures)
			}
			if save != "" {
				path, saveErr := results.Save(save, rec)
				if saveErr != nil {
					return errors.Join(err, saveErr)
				}
				line.print("record: " + path)
			}
			if asJSON {
				err = errors.Join(err, results.Write(cmd.OutOrStdout(), rec))
			} else {
				err = errors.Join(err, results.WriteTable(cmd.OutOrStdout(), rec, results.TableOptions{
					Color: isTerminal(cmd.OutOrStdout()) && os.Getenv("NO_COLOR") == "", Charts: true,
				}))
			}
			if err != nil {
				return err
			}
			return exitError{code: results.ExitCode(rec.Verdict())}.orNil()
		},
	}
	f := cmd.Flags()
	f.StringSliceVar(&opt.Variants, "variant", nil, "run only this `variant` (may be given more than once)")
	f.StringArrayVar(&opt.Set, "set", nil, "set a parameter of every variant: `name=value`; see `connlab show INCIDENT`")
	f.BoolVar(&opt.Full, "full", false, "run only the variants of full size, which are left out otherwise (see: connlab list); four minutes for undersized-pool")
	f.StringVar(&opt.Server, "server", scenarios.ServerMini, "the `server` under test: mini or redis")
	f.BoolVar(&asJSON, "json", false, "write the record as one JSON document to standard output")
	f.StringVar(&save, "save", "", "also save the record in this `directory`")
	f.StringVar(&timelines, "timeline", "", "also write each variant's timeline into this `directory`, as CSV: seconds, host, metric, value")
	f.StringVar(&captures, "capture", "", "also write the packets that variants capture into this `directory`, as pcapng for Wireshark")
	f.StringVar(&counters, "counters", "", "also save the counters of the hosts that one would look at, before and after each variant's load, into this `directory`, for connlab diagnose")
	f.StringVar(&metrics, "metrics", "", "serve the counters of the hosts to Prometheus at this `address` while the run goes on, with the names that node_exporter has; 127.0.0.1 if it is only :PORT, and port 0 is any that is free")
	f.BoolVarP(&quiet, "quiet", "q", false, "no progress on standard error")
	f.BoolVarP(&verbose, "verbose", "v", false, "show the output of the programs under test")
	return cmd
}

// checkDirectory says before a run what would spoil it at its end: a flag's
// directory that no file can be written into.
func checkDirectory(flag, dir string) error {
	if dir == "" {
		return nil
	}
	info, err := os.Stat(dir)
	if err == nil && !info.IsDir() {
		err = unix.ENOTDIR
	}
	if err == nil {
		err = unix.Access(dir, unix.W_OK|unix.X_OK)
	}
	if err != nil {
		return usageErrorf("--%s %s: want a directory to write into: %w", flag, dir, err)
	}
	return nil
}

// serveMetrics serves the counters of every lab that a run has, until stop is called, and
// says where.
func serveMetrics(address string, opt *scenarios.Options, w io.Writer) (stop func() error, err error) {
	host, port, err := net.SplitHostPort(address)
	if err != nil {
		return nil, usageErrorf("--metrics %s: want HOST:PORT or :PORT: %w", address, err)
	}
	if host == "" {
		host = "127.0.0.1" // counters are nobody else's business unless one says so
	}
	l, err := net.Listen("tcp", net.JoinHostPort(host, port))
	if err != nil {
		return nil, usageErrorf("--metrics %s: %w", address, err)
	}
	e := exporter.New(nil)
	opt.Standing = func(variant string, lab *netlab.Lab) (down func()) { return e.Add(variant, lab.Hosts()) }
	fmt.Fprintf(w, "metrics: http://%s/metrics\n", l.Addr())
	return e.Serve(l), nil
}

func writeFile(path string, write func(io.Writer) error) error {
	f, err := os.Create(path)
	if err != nil {
		return err
	}
	return errors.Join(write(f), f.Close())
}

// orNil makes "exit 0" no error at all.
func (e exitError) orNil() error {
	if e.code == exitOK {
		return nil
	}
	return e
}

// statusLine shows progress: one line that is written over on a terminal, a
// line each elsewhere.
type statusLine struct {
	w        io.Writer
	terminal bool
	quiet    bool
}

func (s *statusLine) show(line string) {
	switch {
	case s.quiet:
	case s.terminal:
		fmt.Fprintf(s.w, "\r\x1b[K%.*s", s.columns()-1, line)
	default:
		fmt.Fprintln(s.w, line)
	}
}

// columns is the terminal's width: a longer line would wrap and stay.
func (s *statusLine) columns() int {
	if f, ok := s.w.(*os.File); ok {
		if size, err := unix.IoctlGetWinsize(int(f.Fd()), unix.TIOCGWINSZ); err == nil && size.Col > 1 {
			return int(size.Col)
		}
	}
	return 80
}

func (s *statusLine) clear() {
	if s.terminal && !s.quiet {
		fmt.Fprint(s.w, "\r\x1b[K")
	}
}

func (s *statusLine) print(line string) {
	if !s.quiet {
		fmt.Fprintln(s.w, line)
	}
}

func isTerminal(w io.Writer) bool {
	f, ok := w.(*os.File)
	if !ok {
		return false
	}
	_, err := unix.IoctlGetTermios(int(f.Fd()), unix.TCGETS)
	return err == nil
}
