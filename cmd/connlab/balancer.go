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
nothing of the machine's network. Files and programs are the machine's.`,
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
			// A Ctrl-C is for the command: connlab goes when the command has gone.
			ctx, stop := signal.NotifyContext(context.WithoutCancel(cmd.Context()), unix.SIGTERM)
			defer stop()
			var ended error
			err = standing.Use(ctx, opt, func(client *netlab.Host) error {
				line.clear()
				for _, l := range standing.Describe() {
					line.print(l)
				}
				line.print(fmt.Sprintf("you are %v; the network ends with this command", client.Addr()))
				run := exec.CommandContext(ctx, path, args[1:]...)
				run.Stdin, run.Stdout, run.Stderr = cmd.InOrStdin(), cmd.OutOrStdout(), cmd.ErrOrStderr()
				run.SysProcAttr = &syscall.SysProcAttr{Pdeathsig: syscall.SIGKILL}
				if err := client.Do(run.Start); err != nil {
					return err
				}
				ended = run.Wait()
				return nil
			})
			line.clear()
			if err != nil {
				return err
			}
			for _, l := range standing.Report() {
				line.print(l)
			}
			if exit, ok := errors.AsType[*exec.ExitError](ended); ok {
				return exitError{code: max(exit.ExitCode(), exitRefuted)}
			}
			return ended
		},
	}
	fs := flag.NewFlagSet("balancer", flag.ContinueOnError)
	standing.Flags(fs)
	f := cmd.Flags()
	f.AddGoFlagSet(fs)
	f.StringVar(&opt.Server, "server", scenarios.ServerMini, "what the instances are: `mini` or redis")
	f.BoolVarP(&quiet, "quiet", "q", false, "nothing but the command's own output")
	f.BoolVarP(&verbose, "verbose", "v", false, "show the output of the proxies and the server")
	return cmd
}

// lookPath finds a command; "connlab" is this very program, wherever it stands.
func lookPath(name string) (string, error) {
	if name == "connlab" {
		return os.Executable()
	}
	return exec.LookPath(name)
}

// shell is the user's.
func shell() string {
	if s := os.Getenv("SHELL"); s != "" {
		return s
	}
	return "/bin/sh"
}
