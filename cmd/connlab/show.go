package main

import (
	"flag"
	"fmt"
	"io"
	"strings"
	"text/tabwriter"

	"github.com/spf13/cobra"

	"connlab/scenarios"
)

func newShow() *cobra.Command {
	return &cobra.Command{
		Use:     "show INCIDENT",
		Short:   "Tell an incident: what happened, why, the formula, the variants and parameters",
		Example: "  connlab show backlog",
		Args:    exactly(1, "an incident; see `connlab list`"),
		RunE: func(cmd *cobra.Command, args []string) error {
			s, err := scenarios.Find(args[0])
			if err != nil {
				return err
			}
			return show(cmd.OutOrStdout(), s)
		},
	}
}

func show(out io.Writer, s *scenarios.Scenario) error {
	fmt.Fprintf(out, "%s: %s\n\n%s\n\nVARIANTS\n", s.Name, s.Title, strings.TrimSpace(s.Story))
	for _, v := range s.Variants {
		full := ""
		if v.Full {
			full = ", only with --full or by name"
		}
		fmt.Fprintf(out, "  %s (%s%s)\n      %s\n", v.Name, v.Role, full, v.Summary)
		if len(v.Set) > 0 {
			fmt.Fprintf(out, "      sets %s\n", strings.Join(v.Set, " "))
		}
	}
	fmt.Fprintf(out, "\nPARAMETERS, for --set name=value\n")
	w := tabwriter.NewWriter(out, 0, 0, 2, ' ', 0)
	for _, p := range s.Parameters() {
		_, help := flag.UnquoteUsage(p)
		fmt.Fprintf(w, "  %s\t%s\t%s\n", p.Name, p.DefValue, help)
	}
	return w.Flush()
}
