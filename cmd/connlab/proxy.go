package main

import (
	"flag"
	"slices"

	"github.com/spf13/cobra"

	"connlab/server/proxy"
)

func newProxy() *cobra.Command {
	cmd := &cobra.Command{
		Use:   "proxy",
		Short: "Run the one-to-one Redis proxy: it learns the VIP, one upstream connection per client",
		Long: `Proxy stands where a cloud has its Redis proxies: many instances behind one address
and port, each with a virtual address (VIP). It learns which VIP a client meant,
opens one upstream connection for it, and passes bytes, half-closes and resets both
ways. Who cannot be served is reset.

  --learn option   a layer-4 balancer put the VIP into a TCP option of the SYN
  --learn header   a layer-7 balancer sends a PROXY protocol header (v1 or v2)
  --learn local    the VIPs are addresses of this host: be that layer-7 balancer

A route maps VIPs to upstreams, by prefix (10.8.3.4 to 10.9.3.4) or by list (host
number modulo length); the first route that has the VIP decides.

Exit codes: 0 ended by SIGINT or SIGTERM, 1 it could not listen or serve, 2 usage.`,
		Example: `  Behind a layer-4 balancer: the VIP from the SYN, each VIP to its instance
    connlab proxy --addr 10.0.0.11:6379 --learn option \
      --route 10.8.0.0/16=10.9.0.0/16:6379

  A layer-7 balancer before two proxies that run with --learn header
    connlab proxy --addr 0.0.0.0:6379 --learn local \
      --source 10.0.0.2 --send-header \
      --route 10.8.0.0/16=10.0.0.11:6379,10.0.0.12:6379`,
		// The proxy package reads its own flags, so that any program can be it.
		DisableFlagParsing: true,
		RunE: func(cmd *cobra.Command, args []string) error {
			if slices.ContainsFunc(args, func(a string) bool { return a == "-h" || a == "-help" || a == "--help" }) {
				return cmd.Help()
			}
			return exitError{code: proxy.Main(cmd.Context(), args, cmd.OutOrStdout(), cmd.ErrOrStderr())}.orNil()
		},
	}
	cfg := proxy.DefaultConfig()
	fs := flag.NewFlagSet("proxy", flag.ContinueOnError)
	cfg.Flags(fs)
	cmd.Flags().AddGoFlagSet(fs)
	return cmd
}
