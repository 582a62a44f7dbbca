package main

import (
	"context"
	"errors"
	"flag"
	"fmt"
	"os"
	"os/exec"
	"os/signal"
	"syscall"

	"github.com/spf13/cobra"
	"golang.org/x/sys/unix"

	"connlab/netlab"
	"connlab/scenarios"
)

func newBalancer() *cobra.Command {
	standing := scenarios.NewStanding()
	var opt scenarios.Options
	var quiet, verbose bool
	cmd := &cobra.Command{
		Use:   "balancer [flags] [-- COMMAND [ARGUMENT...]]",
		Short: "Stand up a balancer with proxies and Redis instances, and run a command before it",
		Long: `Balancer builds the network of the incident tuple-collision (a client, a balancer,
proxies, Redis instances), runs a command on the client, by default your shell, and
takes everything down when it ends. Then it says what the balancer saw: every
local port that two VIPs shared at one proxy.

The network is made of namespaces of its own: the command sees its addresses and
nothing of the machine's network. Files and programs are the machine's. All that
the command starts ends with it; it has process ids of its own, so that ps, which
shows the machine's, shows others than the shell's $$ and $!.

Ctrl-C belongs to the command as soon as it runs. The mini server knows what
benchmarks use; for transactions and Pub/Sub take --server redis.

Exit codes: the command's own, or 128+n if signal n ended it; if it never ran, or
connlab was told to end, connlab's: 1 failed, 2 usage, 3 interrupted, 4 skipped
(the kernel, a privilege or a program is missing).`,
		Example: `  sudo connlab balancer                                     # a shell on the client
  sudo connlab balancer -- redis-cli -h 10.8.0.1 PING
  sudo connlab balancer -- connlab probe 10.8.0.1+1000      # the incident, by hand
  sudo connlab balancer --path haproxy -- redis-benchmark -h 10.8.0.1 -n 10000 -q`,
		Args: func(cmd *cobra.Command, args []string) error {
			if n := cmd.ArgsLenAtDash(); len(args) > 0 && n != 0 {
				return usageErrorf("connlab balancer takes the command after --; got %q", args[0])
			}
			return nil
		},
		RunE: func(cmd *cobra.Command, args []string) error {
			if len(args) == 0 {
				args = []string{shell()}
			}
			path, err := lookPath(args[0])
			if err != nil {
				return usageErrorf("%v", err)
			}
			line := &statusLine{w: cmd.ErrOrStderr(), quiet: quiet}
			line.terminal = isTerminal(line.w)
			opt.Progress = line.show
			if verbose {
				opt.Log = cmd.ErrOrStderr()
			}
			ctx, stop := signal.NotifyContext(context.WithoutCancel(cmd.Context()), unix.SIGTERM)
			defer stop()
			untilStart := context.AfterFunc(cmd.Context(), stop)
			var ended error
			err = standing.Use(ctx, opt, func(client *netlab.Host) error {
				// From here on the keys that send signals are for the command.
				if !untilStart() {
					return cmd.Context().Err()
				}
				quit := make(chan os.Signal, 1)
				signal.Notify(quit, unix.SIGQUIT)
				defer signal.Stop(quit)
				line.clear()
				for _, l := range standing.Describe() {
					line.print(l)
				}
				line.print(fmt.Sprintf("you are %v; the network ends with this command", client.Addr()))
				proc, err := client.Start(ctx, netlab.Program{
					Path: path, Args: args[1:], Contain: true, Terminal: true,
					Stdin: cmd.InOrStdin(), Stdout: cmd.OutOrStdout(), Stderr: cmd.ErrOrStderr(),
				})
				if err != nil {
					return err
				}
				ended = proc.Wait()
				return ctx.Err()
			})
			line.clear()
			if err != nil {
				return err
			}
			for _, l := range standing.Report() {
				line.print(l)
			}
			if exit, ok := errors.AsType[*exec.ExitError](ended); ok {
				return exitError{code: shellCode(exit)}
			}
			return ended
		},
	}
	fs := flag.NewFlagSet("balancer", flag.ContinueOnError)
	standing.Flags(fs)
	f := cmd.Flags()
	f.AddGoFlagSet(fs)
	f.StringVar(&opt.Server, "server", scenarios.ServerMini, "`kind` of the instances: mini or redis")
	f.BoolVarP(&quiet, "quiet", "q", false, "nothing but the command's own output")
	f.BoolVarP(&verbose, "verbose", "v", false, "show the output of the proxies and the server")
	return cmd
}

// shellCode is the exit code that a shell would give: 128+n for signal n.
func shellCode(exit *exec.ExitError) int {
	if status, ok := exit.Sys().(syscall.WaitStatus); ok && status.Signaled() {
		return 128 + int(status.Signal())
	}
	return exit.ExitCode()
}

// lookPath finds a command; "connlab" is this very program, wherever it stands.
func lookPath(name string) (string, error) {
	if name == "connlab" {
		return os.Executable()
	}
	return exec.LookPath(name)
}

// shell is the user's, or bash: dash as an interactive shell cannot give the
// terminal back from a namespace of process ids, and says so by its exit code.
func shell() string {
	if s := os.Getenv("SHELL"); s != "" {
		return s
	}
	if bash, err := exec.LookPath("bash"); err == nil {
		return bash
	}
	return "/bin/sh"
}
