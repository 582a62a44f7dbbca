package proxy

import (
	"context"
	"errors"
	"flag"
	"fmt"
	"io"
	"os"
)

// Exit codes of [Main].
const (
	exitOK = iota
	exitFailure
	exitUsage
)

// Main runs the proxy as a program: it reads the flags, listens, prints one line "ready addr=… learn=… pid=…" to stdout
// and serves until ctx is done. It returns the exit code: 0, 1 for a failure, 2 for wrong usage. With --verbose there is
// a line on stderr for each connection that failed, and the counters at the end.
func Main(ctx context.Context, args []string, stdout, stderr io.Writer) int {
	cfg := DefaultConfig()
	fs := flag.NewFlagSet("proxy", flag.ContinueOnError)
	fs.SetOutput(stderr)
	cfg.Flags(fs)
	switch err := fs.Parse(args); {
	case errors.Is(err, flag.ErrHelp):
		return exitOK
	case err != nil:
		return exitUsage
	case fs.NArg() > 0:
		fmt.Fprintf(stderr, "proxy: unexpected argument %q: everything is a flag, see --help\n", fs.Arg(0))
		return exitUsage
	}
	if err := cfg.Check(); err != nil {
		fmt.Fprintln(stderr, "proxy:", err)
		return exitUsage
	}
	if cfg.Verbose {
		cfg.Log = stderr
	}
	p, err := New(cfg)
	if err != nil {
		fmt.Fprintln(stderr, "proxy:", err)
		return exitFailure
	}
	fmt.Fprintf(stdout, "ready addr=%s learn=%s pid=%d\n", p.Addr(), cfg.Learn, os.Getpid())
	err = p.Serve(ctx)
	if cfg.Verbose {
		fmt.Fprintln(stderr, "proxy:", p.Stats())
	}
	if err != nil {
		fmt.Fprintln(stderr, "proxy:", err)
		return exitFailure
	}
	return exitOK
}
