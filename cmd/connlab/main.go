// Connlab reproduces connection incidents in the real kernel: it builds each as
// a network of namespaces, predicts its numbers, measures them and judges the
// difference.
package main

import (
	"context"
	"errors"
	"fmt"
	"io"
	"os"
	"os/signal"
	"strings"

	"github.com/spf13/cobra"
	"golang.org/x/sys/unix"

	"connlab/netlab"
	"connlab/scenarios"
)

// Exit codes, the same for every verb.
const (
	exitOK      = 0 // everything held
	exitRefuted = 1 // a prediction was refuted, or the verb failed
	exitUsage   = 2 // a wrong name, flag or value
	exitVoid    = 3 // a run that says nothing
	exitSkipped = 4 // the kernel, a privilege or a program is missing
)

const exitHelp = `Exit codes: 0 all held, 1 refuted or failed, 2 usage, 3 void (the run says
nothing), 4 skipped (the kernel, a privilege or a program is missing).`

func main() { os.Exit(connlab(os.Args[1:], os.Stdin, os.Stdout, os.Stderr)) }

// exitError is an outcome that is not described by an error's kind.
type exitError struct {
	code int
	err  error // nil: everything has been said
}

func (e exitError) Error() string {
	if e.err == nil {
		return fmt.Sprintf("exit %d", e.code)
	}
	return e.err.Error()
}

func (e exitError) Unwrap() error { return e.err }

func usageErrorf(format string, args ...any) error {
	return exitError{exitUsage, fmt.Errorf(format, args...)}
}

// connlab is the whole program, for tests too. The signals that end a run
// cancel its context: namespaces, programs and files go with it.
func connlab(args []string, stdin io.Reader, stdout, stderr io.Writer) int {
	ctx, stop := signal.NotifyContext(context.Background(), unix.SIGINT, unix.SIGTERM)
	defer stop()
	root := newRoot()
	root.SetArgs(args)
	root.SetIn(stdin)
	root.SetOut(stdout)
	root.SetErr(stderr)
	err := root.ExecuteContext(ctx)
	code := exitCode(err)
	var exit exitError
	said := errors.As(err, &exit) && exit.err == nil
	if err != nil && !said {
		fmt.Fprintln(stderr, "connlab:", strings.ReplaceAll(err.Error(), "\n", "; "))
	}
	return code
}

func exitCode(err error) int {
	var exit exitError
	var need *netlab.NeedError
	switch {
	case err == nil:
		return exitOK
	case errors.As(err, &exit):
		return exit.code
	case errors.Is(err, scenarios.ErrUsage):
		return exitUsage
	case errors.As(err, &need):
		return exitSkipped
	case errors.Is(err, context.Canceled):
		return exitVoid
	}
	return exitRefuted
}

func newRoot() *cobra.Command {
	root := &cobra.Command{
		Use:   "connlab",
		Short: "Reproduce connection incidents in the real kernel, and measure them",
		Long: `connlab builds connection incidents as networks of namespaces on this machine,
drives clients through them, reproduces the failure in the real kernel, and
passes or fails on the difference between predicted and measured numbers.

Start here:
  connlab doctor               what this machine has and lacks
  connlab list                 the incidents
  connlab show backlog         the story, the formula, the variants, the knobs
  sudo connlab run backlog     reproduce it, about a minute

` + exitHelp,
		SilenceErrors: true,
		SilenceUsage:  true,
		Args: func(_ *cobra.Command, args []string) error {
			if len(args) > 0 {
				return usageErrorf("unknown verb %q; there is: list, show, run, compare, doctor, server, proxy, balancer, load, fleet, probe, pools, diagnose", args[0])
			}
			return nil
		},
		RunE: func(cmd *cobra.Command, _ []string) error { return cmd.Help() },
	}
	root.SetFlagErrorFunc(func(_ *cobra.Command, err error) error { return exitError{exitUsage, err} })
	root.AddCommand(newList(), newShow(), newRun(), newCompare(), newDoctor(), newServer(), newProxy(), newBalancer(), newLoad(), newFleet(), newProbe(), newPools(), newDiagnose())
	return root
}

// exactly wants n arguments and names them when they are missing.
func exactly(n int, want string) cobra.PositionalArgs {
	return func(cmd *cobra.Command, args []string) error {
		if len(args) != n {
			return usageErrorf("connlab %s wants %s; got %d arguments", cmd.Name(), want, len(args))
		}
		return nil
	}
}
