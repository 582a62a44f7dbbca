package main

import (
	"fmt"
	"text/tabwriter"

	"github.com/spf13/cobra"

	"connlab/scenarios"
)

func newList() *cobra.Command {
	return &cobra.Command{
		Use:   "list",
		Short: "List the incidents and their variants",
		Args:  exactly(0, "no argument"),
		RunE: func(cmd *cobra.Command, _ []string) error {
			w := tabwriter.NewWriter(cmd.OutOrStdout(), 0, 0, 2, ' ', 0)
			for _, s := range scenarios.All {
				fmt.Fprintf(w, "%s\t%s\n", s.Name, s.Title)
				for _, v := range s.Variants {
					full := ""
					if v.Full {
						full = ", only with --full or by name"
					}
					fmt.Fprintf(w, "  %s\t%s%s\n", v.Name, v.Role, full)
				}
			}
			return w.Flush()
		},
	}
}
