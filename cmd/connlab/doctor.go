package main

import (
	"encoding/json"
	"fmt"
	"io"
	"slices"

	"github.com/spf13/cobra"

	"connlab/netlab"
)

// essential are the needs without which no lab stands at all.
var essential = []netlab.Need{netlab.NeedPrivilege, netlab.NeedNamespace, netlab.NeedVeth, netlab.NeedBridge}

func newDoctor() *cobra.Command {
	var asJSON bool
	cmd := &cobra.Command{
		Use:   "doctor",
		Short: "Probe what this machine has of what connlab needs, and what each lack costs",
		Long: `Doctor tries each need in a throwaway namespace and changes nothing on the host.

It exits with 4 if something is missing without which no incident can run.`,
		Args: exactly(0, "no argument"),
		RunE: func(cmd *cobra.Command, _ []string) error {
			findings := netlab.Doctor()
			out := cmd.OutOrStdout()
			if asJSON {
				enc := json.NewEncoder(out)
				enc.SetIndent("", "  ")
				if err := enc.Encode(findings); err != nil {
					return err
				}
			} else {
				writeFindings(out, findings)
			}
			for _, f := range findings {
				if !f.OK && slices.Contains(essential, f.Need) {
					return exitError{code: exitSkipped}
				}
			}
			return nil
		},
	}
	cmd.Flags().BoolVar(&asJSON, "json", false, "write the findings as one JSON document")
	return cmd
}

func writeFindings(out io.Writer, findings []netlab.Finding) {
	for _, f := range findings {
		mark := "ok  "
		if !f.OK {
			mark = "LACK"
		}
		fmt.Fprintf(out, "%s  %-32s %s\n", mark, f.Need, f.Detail)
		if !f.OK {
			fmt.Fprintf(out, "      %-32s %s\n", "", f.Cost)
		}
	}
}
