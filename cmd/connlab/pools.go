package main

import (
	"context"
	"errors"
	"flag"
	"fmt"
	"io"
	"slices"
	"strings"
	"text/tabwriter"
	"time"

	"github.com/spf13/cobra"
	"github.com/spf13/pflag"

	"connlab/results"
	"connlab/scenarios"
)

// poolsOnly are the parameters of the scenario that are no flags of `connlab pools`,
// whose arms are the clients.
var poolsOnly = []string{"client", "sweep", "beside", "fill"}

func newPools() *cobra.Command {
	var clients []string
	var asJSON, quiet bool
	var save string
	cmd := &cobra.Command{
		Use:   "pools",
		Short: "Send one arrival trace through several clients' pools, and compare",
		Long: `Pools sends the same heartbeats, at the same moments, through each client in turn,
each on a namespaced host of its own, with ports and TIME_WAITs of its own, to one Redis that is
as slow as you say. It prints what each client dialed, left in TIME_WAIT, failed and
cost; --json writes the record with the predictions and the curve over time.

Clients:
  redigo         gomodule/redigo's Pool: MaxIdle, MaxActive, Wait
  go-redis       go-redis v9's Client: PoolSize, MaxIdleConns, …
  cosocket       the pool of nginx's Lua cosockets, of size --max-idle
  batch          requests of many goroutines merged: --batch commands or --batch-delay
  go-redis-auto  go-redis's own auto-pipelining, at its defaults

It needs root and changes nothing outside its own namespaces.

` + exitHelp,
		Example: `  sudo connlab pools
  sudo connlab pools --rate 5000 --latency 10ms --max-idle 100 --clients redigo,batch
  sudo connlab pools --max-idle 500 --sync --json > pools.json`,
		Args: exactly(0, "no argument, only flags"),
		RunE: func(cmd *cobra.Command, _ []string) error {
			if err := checkDirectory("save", save); err != nil {
				return err
			}
			opt := scenarios.Options{Set: []string{"sweep=client=" + strings.Join(clients, ",")}}
			if len(clients) == 1 {
				opt.Set = []string{"sweep=", "client=" + clients[0]}
			}
			cmd.Flags().Visit(func(f *pflag.Flag) {
				if flag := scenarioFlag(f.Name); flag != nil {
					opt.Set = append(opt.Set, f.Name+"="+f.Value.String())
				}
			})
			line := &statusLine{w: cmd.ErrOrStderr(), quiet: quiet}
			line.terminal = isTerminal(line.w)
			opt.Progress = line.show
			return pools(cmd.Context(), opt, poolsOutput{out: cmd.OutOrStdout(), line: line, clients: clients, json: asJSON, save: save})
		},
	}
	f := cmd.Flags()
	f.StringSliceVar(&clients, "clients", []string{"redigo", "go-redis", "cosocket", "batch", "go-redis-auto"}, "the `clients` to compare, in this order")
	f.BoolVar(&asJSON, "json", false, "write the record as one JSON document to standard output")
	f.StringVar(&save, "save", "", "also save the record in this `directory`")
	f.BoolVarP(&quiet, "quiet", "q", false, "no progress on standard error")
	for _, p := range scenarios.Pools.Parameters() {
		if !slices.Contains(poolsOnly, p.Name) {
			f.AddGoFlag(p)
		}
	}
	f.SortFlags = false
	return cmd
}

// scenarioFlag is the scenario's parameter of a name, nil if it has none.
func scenarioFlag(name string) *flag.Flag {
	for _, p := range scenarios.Pools.Parameters() {
		if p.Name == name && !slices.Contains(poolsOnly, name) {
			return p
		}
	}
	return nil
}

// poolsOutput is where and how a comparison is written.
type poolsOutput struct {
	out     io.Writer
	line    *statusLine
	clients []string
	json    bool
	save    string
}

func pools(ctx context.Context, opt scenarios.Options, o poolsOutput) error {
	rec, err := scenarios.Run(ctx, &scenarios.Pools, opt)
	o.line.clear()
	if rec == nil {
		return err
	}
	if o.save != "" {
		path, saveErr := results.Save(o.save, rec)
		if saveErr != nil {
			return errors.Join(err, saveErr)
		}
		o.line.print("record: " + path)
	}
	if o.json {
		err = errors.Join(err, results.Write(o.out, rec))
	} else {
		err = errors.Join(err, writePools(o.out, rec, o.clients))
	}
	if err != nil {
		return err
	}
	return exitError{code: results.ExitCode(rec.Verdict())}.orNil()
}

// poolColumns are the lines of the comparison: a client is a column.
var poolColumns = []struct{ name, metric string }{
	{"calls ok", "Calls.OK"},
	{"failed: no local port", "Calls.Failed.no_local_port"},
	{"failed: pool exhausted", "Calls.Failed.pool_exhausted"},
	{"failed: pool timeout", "Calls.Failed.pool_timeout"},
	{"failed: in another way", "Calls.Failed.Otherwise"},
	{"connections dialed", "Dials"},
	{"dials per second", "Dials.PerSecond"},
	{"TIME_WAIT at the end", "TIME_WAIT.End"},
	{"latency p50", "Latency.P50"},
	{"latency p99", "Latency.P99"},
	{"latency p99.9", "Latency.P99.9"},
	{"requests per second at Redis (a pipeline is one)", "Requests.PerSecond"},
	{"commands per second at Redis", "Commands.PerSecond"},
	{"CPU per call, client and loader", "Client.CPU"},
	{"CPU per call, Redis", "Server.CPU"},
	{"reads and writes per call", "Client.Syscalls"},
}

// writePools is the comparison for people.
func writePools(out io.Writer, rec *results.Record, clients []string) error {
	v := rec.Variants[0]
	var columns []string // the clients' prefixes in names of metrics
	for _, c := range clients {
		column := "client=" + c
		if len(clients) == 1 {
			column = "app"
		}
		columns = append(columns, column)
	}
	in := func(name string) string { return name + "=" + rec.Parameters[name] }
	fmt.Fprintf(out, "one client after the other, each with the same calls: %s\n  %s\n\n",
		strings.Join([]string{in("rate"), in("ops"), in("sync"), in("for"), in("latency"), in("ceiling"), in("ports")}, " "),
		strings.Join([]string{in("max-idle"), in("max-active"), in("wait"), in("pool-size"), in("max-idle-conns"), in("batch"), in("batch-delay")}, " "))
	w := tabwriter.NewWriter(out, 0, 0, 2, ' ', tabwriter.AlignRight)
	fmt.Fprint(w, "\t")
	for _, c := range clients {
		fmt.Fprintf(w, "%s\t", c)
	}
	fmt.Fprintln(w)
	for _, row := range poolColumns {
		fmt.Fprintf(w, "%s\t", row.name)
		for _, c := range columns {
			m, measured := v.Metrics[c+"/"+row.metric]
			if !measured {
				fmt.Fprint(w, "–\t")
				continue
			}
			fmt.Fprintf(w, "%s\t", poolValue(m))
		}
		fmt.Fprintln(w)
	}
	if err := w.Flush(); err != nil {
		return err
	}
	fmt.Fprintf(out, "\n%s: %s\n", v.Verdict, v.Reason)
	for _, text := range v.Warnings {
		fmt.Fprintln(out, text)
	}
	return nil
}

func poolValue(m results.Metric) string {
	if m.Unit == "s" {
		return time.Duration(m.Value * float64(time.Second)).Round(100 * time.Nanosecond).String()
	}
	if m.Value == float64(int64(m.Value)) || m.Value >= 100 {
		return fmt.Sprintf("%.0f", m.Value)
	}
	return fmt.Sprintf("%.2f", m.Value)
}
