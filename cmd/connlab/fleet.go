package main

import (
	"flag"
	"slices"

	"github.com/spf13/cobra"

	"connlab/loadgen"
)

func newFleet() *cobra.Command {
	cmd := &cobra.Command{
		Use:   "fleet",
		Short: "Hold many connections that come back when they are cut",
		Long: `Fleet is many persistent clients of one server in one thread and little memory.
It fills: each client connects, sends PING and waits for the reply, some at a time.
Then it holds: a client whose connection is cut comes back by a policy, and tries
again until it is served. It ends after --for, or by Ctrl-C, and reports both.

  at once, and again at once           no flag: a thundering herd
  spread over 10 s                     --spread 10s
  a second try after up to 1 s, 2 s, … --base 1s --max 30s

A process may not have more connections than open files (ulimit -n), and one local
address not more than ports: start several, and give each addresses of its own.

With --control another program tells it what to do, a line each: fill; arm, which
makes it count what is cut; storm, the moment (µs since 1970) at which all that were
cut begin to come back, and the time (ms) they have; ping, which asks on every
connection; report; quit. Each is answered with one line of JSON.

Exit codes: 0 every client had a connection at the end, 1 one had none, or it
failed, 2 usage, 3 interrupted while it filled.`,
		Example: `  connlab server --addr 127.0.0.1:7000 --maxclients 5000
  connlab fleet --addr 127.0.0.1:7000 --clients 4000 --base 100ms --for 1m
  redis-cli -p 7000 CONNLAB CUT 0.5 RST   # meanwhile: half of them are cut`,
		// The loadgen package reads the flags itself, so that any program can be it.
		DisableFlagParsing: true,
		RunE: func(cmd *cobra.Command, args []string) error {
			if slices.ContainsFunc(args, func(a string) bool { return a == "-h" || a == "-help" || a == "--help" }) {
				return cmd.Help()
			}
			return exitError{code: loadgen.FleetMain(cmd.Context(), args, cmd.InOrStdin(), cmd.OutOrStdout(), cmd.ErrOrStderr())}.orNil()
		},
	}
	fs := flag.NewFlagSet("fleet", flag.ContinueOnError)
	loadgen.FleetFlags(fs)
	cmd.Flags().AddGoFlagSet(fs)
	return cmd
}
