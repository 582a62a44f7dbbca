package scenarios

import (
	"bytes"
	"errors"
	"fmt"
	"os"
	"strings"
	"testing"

	"github.com/google/go-cmp/cmp"
	"github.com/google/go-cmp/cmp/cmpopts"
	"github.com/stretchr/testify/assert"
	"github.com/stretchr/testify/require"

	"connlab/netlab"
	"connlab/results"
)

// run runs a scenario as `connlab run` does, saves the record and reads it back.
func run(t *testing.T, s *Scenario, opt Options) *results.Record {
	t.Helper()
	require.NoError(t, stamp())
	if testing.Verbose() { // or it buries what failed
		opt.Progress = func(line string) { t.Log(line) }
	}
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

// comparePredictions compares a scenario's predictions with its golden record. What
// is golden there is what follows from the parameters: no kernel is asked.
func comparePredictions(t *testing.T, s *Scenario) {
	t.Helper()
	golden, err := results.Load("../results/golden/" + s.Name + ".json")
	require.NoError(t, err)
	arms, err := s.prepare(Options{})
	require.NoError(t, err)
	require.Len(t, golden.Variants, len(arms))
	for i, arm := range arms {
		want := golden.Variants[i]
		assert.Equal(t, want.Name, arm.variant.Name)
		assert.Equal(t, results.Held, want.Verdict)
		got := arm.experiment.Predict(arm.variant.Role, goldenRules)
		diff := cmp.Diff(want.Predictions, got,
			cmpopts.IgnoreFields(results.Prediction{}, "Measured", "Error", "Verdict"),
			cmpopts.EquateApprox(1e-9, 0), cmpopts.EquateEmpty())
		assert.Empty(t, diff, arm.variant.Name)
	}
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

// allHeld wants every variant held; what the machine lacks is skipped.
func allHeld(t *testing.T, rec *results.Record) {
	t.Helper()
	for _, v := range rec.Variants {
		if v.Verdict == results.Skipped && os.Getenv("CONNLAB_STRICT") != "1" {
			t.Logf("%s: skipped: %s", v.Name, v.Reason)
			continue
		}
		assert.Equal(t, results.Held, v.Verdict, whyNot(v))
	}
}

// notRefuted is for runs under the race detector, where the machine may be too
// slow for the claims: void then, but not refuted.
func notRefuted(t *testing.T, rec *results.Record) {
	t.Helper()
	for _, v := range rec.Variants {
		assert.NotEqual(t, results.Refuted, v.Verdict, whyNot(v))
	}
}

// whyNot says in a few lines why a variant did not hold.
func whyNot(v results.Variant) string {
	lines := append([]string{v.Name + ": " + v.Reason}, v.Warnings...)
	for _, p := range v.Predictions {
		if p.Verdict == results.Refuted {
			lines = append(lines, fmt.Sprintf("%s: %v predicted (%s), %v measured", p.Metric, p.Predicted, p.Tolerance, v.Metrics[p.Metric].Value))
		}
	}
	return strings.Join(lines, "\n")
}

// checkGolden compares a whole run with its golden record, where the kernel has the
// same rules and nothing was skipped.
func checkGolden(t *testing.T, rec *results.Record) {
	t.Helper()
	rules := ReadKernelRules()
	rules.CPUs = goldenRules.CPUs
	if rules != goldenRules || rec.Verdict() == results.Skipped {
		return
	}
	golden, err := results.Load("../results/golden/" + rec.Incident + ".json")
	require.NoError(t, err)
	assert.Empty(t, results.CheckGolden(golden, rec))
}

// refuses wants a scenario to say what is wrong with some settings.
func refuses(t *testing.T, s *Scenario, settings, want string) {
	t.Helper()
	e := s.New()
	require.NoError(t, apply(e, strings.Fields(settings)))
	assert.ErrorContains(t, e.Check(), want)
}

func find(t *testing.T, rec *results.Record, name string) results.Variant {
	t.Helper()
	for _, v := range rec.Variants {
		if v.Name == name {
			return v
		}
	}
	require.Fail(t, "no variant "+name)
	return results.Variant{}
}

// checkVariants wants every variant to be a complete and possible experiment.
func checkVariants(t *testing.T, s *Scenario) {
	t.Helper()
	roles := map[results.Role]bool{}
	names := map[string]bool{}
	for _, v := range s.Variants {
		e := s.New()
		require.NoError(t, apply(e, v.Set), v.Name)
		assert.NoError(t, e.Check(), v.Name)
		assert.NoError(t, e.Topology().Check(), v.Name)
		assert.NotEmpty(t, v.Summary, v.Name)
		assert.NotEmpty(t, e.Predict(v.Role, goldenRules), v.Name)
		assert.False(t, names[v.Name], "%s is there twice", v.Name)
		names[v.Name], roles[v.Role] = true, true
	}
	for _, role := range []results.Role{results.Incident, results.FalseLead, results.Fix, results.Control} {
		assert.True(t, roles[role], "no variant is a %s", role)
	}
}
