package server

import (
	"context"
	"errors"
	"flag"
	"fmt"
	"io"
	"math"
	"os"
	"runtime"
	"runtime/debug"

	"golang.org/x/sys/unix"
)

// Exit codes of [Main].
const (
	exitOK = iota
	exitFailure
	exitUsage
)

// reservedFiles is how many descriptors are kept for other things than clients (CONFIG_MIN_RESERVED_FDS).
const reservedFiles = 32

// Main runs the server as a program: it reads the flags, listens, prints one line "ready addr=… backlog=… pid=…" to
// stdout and serves until ctx is done. It returns the exit code: 0, 1 for a failure, 2 for wrong usage. It changes
// settings of the whole process: the limit of open files and the garbage collector's.
//
// With workers ([Workers]) the line goes on with "workers=… control=…". They are this program executed again: by the command
// line of the process, which must end in args.
func Main(ctx context.Context, args []string, stdout, stderr io.Writer) int {
	cfg := DefaultConfig()
	var workers Workers
	var inherited descriptors
	fs := flag.NewFlagSet("server", flag.ContinueOnError)
	fs.SetOutput(stderr)
	cfg.Flags(fs)
	workers.Flags(fs)
	inherited.flags(fs)
	switch err := fs.Parse(args); {
	case errors.Is(err, flag.ErrHelp):
		return exitOK
	case err != nil:
		return exitUsage
	case fs.NArg() > 0:
		fmt.Fprintf(stderr, "server: unexpected argument %q: everything is a flag, see --help\n", fs.Arg(0))
		return exitUsage
	}
	if err := workers.validate(); err != nil {
		fmt.Fprintln(stderr, "server:", err)
		return exitUsage
	}
	var err error
	switch {
	case inherited.given():
		err = serveInherited(ctx, cfg, inherited)
	case workers.none():
		err = serveAlone(ctx, cfg, stdout, stderr)
	default:
		err = workers.supervise(ctx, cfg, args, stdout, stderr)
	}
	if err != nil {
		fmt.Fprintln(stderr, "server:", err)
		return exitFailure
	}
	return exitOK
}

// serveAlone is the server of one process.
func serveAlone(ctx context.Context, cfg Config, stdout, stderr io.Writer) error {
	tuneRuntime(roomyGC)
	warning, err := fitFileLimit(&cfg)
	if err != nil {
		return err
	}
	warn(stderr, warning)
	s, err := New(cfg)
	if err != nil {
		return err
	}
	for _, w := range s.Warnings() {
		warn(stderr, w)
	}
	fmt.Fprintf(stdout, "ready addr=%s backlog=%d pid=%d\n", s.Addr(), cfg.Backlog, os.Getpid())
	return s.Serve(ctx)
}

func warn(stderr io.Writer, warning string) {
	if warning != "" {
		fmt.Fprintln(stderr, "server: warning:", warning)
	}
}

// How far the heap may grow beyond what is alive before a collection, in percent of that. What is alive is small
// unless keys fill it, so a server of one process has room. Workers are there to hold many clients in little memory.
const (
	roomyGC  = 400
	frugalGC = 50
)

// tuneRuntime fits the Go runtime to a process with one busy thread. Two processors: one for the loop, one on which the
// garbage collector can work beside it. Half of the machine's memory is the limit from which the collector works harder
// than gcPercent says.
func tuneRuntime(gcPercent int) {
	runtime.GOMAXPROCS(2)
	debug.SetGCPercent(gcPercent)
	var si unix.Sysinfo_t
	if err := unix.Sysinfo(&si); err == nil {
		debug.SetMemoryLimit(int64(si.Totalram) * int64(si.Unit) / 2)
	}
}

// clientsAllowed returns how many clients the soft limit of open files leaves room for; less than 1 is none.
func clientsAllowed() (int, error) {
	var lim unix.Rlimit
	if err := unix.Getrlimit(unix.RLIMIT_NOFILE, &lim); err != nil {
		return 0, fmt.Errorf("reading the limit of open files: %w", err)
	}
	return int(min(lim.Cur, math.MaxInt32)) - reservedFiles, nil
}

// fitFileLimit raises the soft limit of open files to the hard one and, if that is still not enough, lowers the number
// of clients (adjustOpenFilesLimit).
func fitFileLimit(cfg *Config) (warning string, err error) {
	var lim unix.Rlimit
	if err := unix.Getrlimit(unix.RLIMIT_NOFILE, &lim); err != nil {
		return "", fmt.Errorf("reading the limit of open files: %w", err)
	}
	if lim.Cur < lim.Max {
		lim.Cur = lim.Max
		if err := unix.Setrlimit(unix.RLIMIT_NOFILE, &lim); err != nil {
			return "", fmt.Errorf("raising the limit of open files to %d: %w", lim.Max, err)
		}
	}
	if lim.Cur >= uint64(cfg.MaxClients)+reservedFiles {
		return "", nil
	}
	if lim.Cur <= reservedFiles {
		return "", fmt.Errorf("the limit of open files, %d, is too small to serve anybody; raise it (ulimit -n)", lim.Cur)
	}
	asked := cfg.MaxClients
	cfg.MaxClients = int(lim.Cur) - reservedFiles
	return fmt.Sprintf("maxclients lowered from %d to %d: the limit of open files is %d (ulimit -Hn)", asked, cfg.MaxClients, lim.Cur), nil
}
