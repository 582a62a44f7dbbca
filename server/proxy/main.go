package proxy

import (
	"context"
	"errors"
	"flag"
	"fmt"
	"io"
	"os"
	"strings"
)

// Exit codes of [Main].
const (
	exitOK = iota
	exitFailure
	exitUsage
)

// Main runs the proxy as a program: it reads the flags, listens, prints one line "ready addr=… learn=… pid=…" to stdout
// and serves until ctx is done. It returns the exit code: 0, 1 for a failure, 2 for wrong usage. What went wrong is one
// line on stderr. With --verbose there is also a line for each connection that failed, and the counters at the end.
func Main(ctx context.Context, args []string, stdout, stderr io.Writer) int {
	cfg := DefaultConfig()
	switch err := cfg.parse(args, stderr); {
	case errors.Is(err, flag.ErrHelp):
		return exitOK
	case err != nil:
		say(stderr, fmt.Sprintf("%v (see connlab proxy --help)", err))
		return exitUsage
	}
	if cfg.Verbose {
		cfg.Log = stderr
	}
	p, err := New(cfg)
	if err != nil {
		say(stderr, err)
		return exitFailure
	}
	fmt.Fprintf(stdout, "ready addr=%s learn=%s pid=%d\n", p.Addr(), cfg.Learn, os.Getpid())
	err = p.Serve(ctx)
	if cfg.Verbose {
		fmt.Fprintln(stderr, "proxy:", p.Stats()) // as a line of the log
	}
	if err != nil {
		say(stderr, err)
		return exitFailure
	}
	return exitOK
}

func say(stderr io.Writer, what any) { fmt.Fprintln(stderr, "connlab: proxy:", what) }

// parse reads the flags and checks what they say. If they ask for help it prints it and returns [flag.ErrHelp].
func (c *Config) parse(args []string, help io.Writer) error {
	fs := flag.NewFlagSet("proxy", flag.ContinueOnError)
	fs.SetOutput(io.Discard) // of a mistake it writes the whole usage
	c.Flags(fs)
	var refused error
	fs.VisitAll(func(f *flag.Flag) { f.Value = flagValue{f.Value, f.Name, &refused} })
	switch err := fs.Parse(args); {
	case errors.Is(err, flag.ErrHelp):
		fs.SetOutput(help)
		fs.Usage()
		return err
	case refused != nil:
		return refused
	case err != nil:
		if what, name, ok := strings.Cut(err.Error(), ": -"); ok {
			return fmt.Errorf("--%s: %s", name, what)
		}
		return err
	case fs.NArg() > 0:
		return fmt.Errorf("unexpected argument %q: everything is a flag", fs.Arg(0))
	}
	return c.Check()
}

// flagValue keeps the error of a value that was refused: the flag package returns no more than its text, among its own.
type flagValue struct {
	flag.Value
	name    string
	refused *error
}

// Set sets the flag.
func (v flagValue) Set(s string) error {
	err := v.Value.Set(s)
	if err == nil {
		return nil
	}
	if want, ok := wants[v.name]; ok {
		err = errors.New("want " + want) // instead of what the parser calls it
	}
	*v.refused = fmt.Errorf("--%s %s: %w", v.name, s, err)
	return *v.refused
}

// IsBoolFlag tells the flag package that the flag needs no value.
func (v flagValue) IsBoolFlag() bool {
	b, ok := v.Value.(interface{ IsBoolFlag() bool })
	return ok && b.IsBoolFlag()
}
