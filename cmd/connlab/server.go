package main

import (
	"flag"
	"slices"

	"github.com/spf13/cobra"

	"connlab/server"
)

func newServer() *cobra.Command {
	cmd := &cobra.Command{
		Use:   "server",
		Short: "Run the mini Redis server: one thread, one epoll loop, a stall on demand",
		Long: `Server speaks RESP2 and RESP3 and knows the commands that clients and benchmarks
use. Its backlog is given to listen(2) as it is, and its event loop can be made to
stand still, outside any command, while clients connect:

  redis-cli CONNLAB STALL 1430           a stall of 1.43 s in the next cron run
  redis-cli CONFIG SET accept-rate 1000  1,000 connections accepted a second
  redis-cli CONFIG SET close-delay 200   its FIN trails each client's by 200 ms
  redis-cli CONFIG SET close-after 1     it closes first, after one reply
  redis-cli CONNLAB CUT 0.5 RST          half of all connections are reset
  redis-cli CONNLAB HELP                 the other faults
  redis-cli INFO connlab                 when it last stalled, and for how long

With --workers N, that many processes accept from its one accept queue, for more
connections than one process may have files open. Settings, --maxclients and
--accept-rate among them, hold for each, keys are each one's own, and the commands
above are then for the address of --control, which passes them on to all.

Who starts it waits for the one line that it prints when all of it is ready:

  ready addr=127.0.0.1:7000 backlog=511 pid=4711
  ready addr=127.0.0.1:7000 backlog=4096 pid=4711 workers=9 control=127.0.0.1:7001`,
		Example: `  connlab server --addr 127.0.0.1:7000 --backlog 511
  connlab server --addr 127.0.0.1:7000 --backlog 4096 --workers 9 --maxclients 19000 --accept-rate 111 --control 127.0.0.1:7001`,
		// The server package reads its own flags, so that any program can be it.
		DisableFlagParsing: true,
		RunE: func(cmd *cobra.Command, args []string) error {
			if slices.ContainsFunc(args, func(a string) bool { return a == "-h" || a == "-help" || a == "--help" }) {
				return cmd.Help()
			}
			return exitError{code: server.Main(cmd.Context(), args, cmd.OutOrStdout(), cmd.ErrOrStderr())}.orNil()
		},
	}
	cfg := server.DefaultConfig()
	fs := flag.NewFlagSet("server", flag.ContinueOnError)
	cfg.Flags(fs)
	var workers server.Workers
	workers.Flags(fs)
	cmd.Flags().AddGoFlagSet(fs)
	return cmd
}
