package main

import (
	"encoding/json"
	"strings"
	"testing"

	"github.com/stretchr/testify/assert"
	"github.com/stretchr/testify/require"

	"connlab/loadgen"
)

// With --close-passive it is the server that has to close, and one that does not is found out.
func TestLoadPassive(t *testing.T) {
	for _, tt := range []struct {
		why    string
		server []string
		want   loadgen.Counts
		codes  []int
	}{
		{"a server that closes after each reply", []string{"--close-after", "1"}, loadgen.Counts{}, []int{exitOK, exitVoid}},
		{"a server that never closes", nil, loadgen.Counts{loadgen.CloseTimeout: 20}, []int{exitRefuted, exitVoid}},
	} {
		t.Run(tt.why, func(t *testing.T) {
			addr := startListener(t, "server", tt.server...)
			o := run("load", "--addr", addr, "--rate", "200", "--duration", "100ms", "--reply-timeout", "500ms", "--close-passive", "--json", "-q")
			var report loadgen.Report
			require.NoError(t, json.Unmarshal([]byte(o.stdout), &report), "%s", o.stderr)
			assert.NoError(t, report.Balanced())
			assert.EqualValues(t, 20, report.Due)
			assert.Equal(t, tt.want, report.Failed)
			assert.Contains(t, tt.codes, o.code, "void if this machine is too busy: %s", o.stderr)
		})
	}
}

func TestLoadClosesInOneWay(t *testing.T) {
	for _, tt := range []struct {
		args []string
		want string
	}{
		{[]string{"--close-passive", "--close-reset"}, "--close-passive and --close-reset are two ways to close"},
		{[]string{"--close-passive", "--held", "2"}, "--held keeps it"},
	} {
		o := run(append([]string{"load"}, tt.args...)...)
		assert.Equal(t, exitUsage, o.code)
		assert.Contains(t, o.stderr, tt.want)
		assert.Equal(t, 1, strings.Count(o.stderr, "\n"), "one line: %s", o.stderr)
	}
}
