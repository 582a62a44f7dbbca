package main

import (
	"path/filepath"
	"strings"
	"testing"

	"github.com/stretchr/testify/assert"
	"github.com/stretchr/testify/require"

	"connlab/results"
)

func TestCompareWithoutACommonVariant(t *testing.T) {
	golden := filepath.Join("..", "..", "results", "golden", "backlog.json")
	rec, err := results.Load(golden)
	require.NoError(t, err)
	for i := range rec.Variants {
		rec.Variants[i].Name += "-other"
	}
	other, err := results.Save(t.TempDir(), rec)
	require.NoError(t, err)
	for _, args := range [][]string{{"compare", golden, other}, {"compare", golden, other, "--json"}} {
		o := run(args...)
		assert.Equal(t, exitUsage, o.code)
		assert.Contains(t, o.stderr, "have no variant in common")
		assert.Equal(t, 1, strings.Count(o.stderr, "\n"), "one line: %s", o.stderr)
		assert.Empty(t, o.stdout)
	}
}
