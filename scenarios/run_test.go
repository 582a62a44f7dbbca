package scenarios

import (
	"bytes"
	"errors"
	"os"
	"testing"

	"github.com/stretchr/testify/require"

	"connlab/netlab"
	"connlab/results"
)

// run runs a scenario as `connlab run` does, saves the record and reads it back.
func run(t *testing.T, s *Scenario, opt Options) *results.Record {
	t.Helper()
	require.NoError(t, stamp())
	opt.Progress = func(line string) { t.Log(line) }
	rec, err := Run(t.Context(), s, opt)
	skipIfNeeded(t, err)

	path, err := results.Save(runs, rec)
	require.NoError(t, err)
	rec, err = results.Load(path)
	require.NoError(t, err)
	var table bytes.Buffer
	require.NoError(t, results.WriteTable(&table, rec, results.TableOptions{Charts: true}))
	show(t, table.String())
	return rec
}

// skip ends a test that cannot run here; under CONNLAB_STRICT that is a failure.
func skip(t *testing.T, reason string) {
	t.Helper()
	if os.Getenv("CONNLAB_STRICT") == "1" {
		t.Fatal("CONNLAB_STRICT=1 and this would be skipped: " + reason)
	}
	t.Skip(reason)
}

// skipIfNeeded skips for what the machine lacks, and fails for any other error.
func skipIfNeeded(t *testing.T, err error) {
	t.Helper()
	if need, is := errors.AsType[*netlab.NeedError](err); is {
		skip(t, need.Error())
	}
	require.NoError(t, err)
}
