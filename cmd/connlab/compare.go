package main

import (
	"encoding/json"

	"github.com/spf13/cobra"

	"connlab/results"
)

func newCompare() *cobra.Command {
	var asJSON, all bool
	cmd := &cobra.Command{
		Use:   "compare A.json B.json",
		Short: "Put two records side by side",
		Long: `Compare shows the metrics of two records side by side: the mini server beside
redis-server, one kernel beside another, before and after a change.

It exits with 1 if a verdict is worse in B than in A, and with 2 if the two have no
variant in common.`,
		Example: `  sudo connlab run backlog --json > mini.json
  sudo connlab run backlog --server redis --json > redis.json
  connlab compare mini.json redis.json`,
		Args: exactly(2, "two records, as `connlab run --json` writes them"),
		RunE: func(cmd *cobra.Command, args []string) error {
			var recs [2]*results.Record
			for i, path := range args {
				rec, err := results.Load(path)
				if err != nil {
					return exitError{exitUsage, err}
				}
				recs[i] = rec
			}
			c := results.Compare(recs[0], recs[1])
			if len(c.Variants) == 0 {
				return usageErrorf("%s (%s) and %s (%s) have no variant in common: there is nothing to compare",
					args[0], recs[0].Incident, args[1], recs[1].Incident)
			}
			var err error
			if asJSON {
				enc := json.NewEncoder(cmd.OutOrStdout())
				enc.SetIndent("", "  ")
				err = enc.Encode(c)
			} else {
				err = results.WriteComparison(cmd.OutOrStdout(), c, results.TableOptions{All: all})
			}
			if err != nil {
				return err
			}
			if c.Regressed() {
				return exitError{code: exitRefuted}
			}
			return nil
		},
	}
	cmd.Flags().BoolVar(&asJSON, "json", false, "write the comparison as one JSON document")
	cmd.Flags().BoolVar(&all, "all", false, "also the metrics that nothing predicts")
	return cmd
}
