package results

import (
	"encoding/json"
	"strings"
	"testing"

	"github.com/google/go-cmp/cmp"
	"github.com/stretchr/testify/assert"
	"github.com/stretchr/testify/require"
)

// changedRecord is the sample run again, on another server and with other ends.
func changedRecord(t *testing.T) *Record {
	t.Helper()
	rec := clone(t, sampleRecord())
	rec.Server = "redis 7.0.15"
	rec.Parameters["rate"] = "1000"
	incident := &rec.Variants[0]
	incident.Metrics["server/Drops.FirstAttempt"] = Metric{1180, "SYNs"}
	incident.Metrics["server/TcpExt.ListenDrops"] = Metric{4000, "events"}
	incident.Metrics["server/TcpExt.ListenOverflows"] = Metric{0, "events"}
	delete(incident.Metrics, "server/AcceptQueue.Limit")
	rec.Variants[1].Metrics["server/Drops.FirstAttempt"] = Metric{820, "SYNs"}
	rec.Variants[1].Parameters["backlog"] = "2000"
	rec.Variants[3].Name = "abort-0"
	rec.Judge()
	return rec
}

func TestCompare(t *testing.T) {
	a, b := sampleRecord(), changedRecord(t)
	c := Compare(a, b)

	assert.Equal(t, []string{
		"parameter rate: 2000 in a, 1000 in b: not the same experiment",
		"backlog-2048: parameter backlog: 2048 in a, 2000 in b: not the same experiment",
	}, c.Warnings)
	assert.Equal(t, []string{"abort-on-overflow"}, c.OnlyA)
	assert.Equal(t, []string{"abort-0"}, c.OnlyB)
	assert.True(t, c.Regressed())
	assert.Equal(t, []string{
		"incident: held in a, refuted in b",
		"incident server/Drops.FirstAttempt: held in a, refuted in b",
		"incident server/AcceptQueue.Limit: held in a, void in b",
	}, c.Regressions, "what got better, as backlog-2048 did, is no regression")

	want := VariantComparison{
		Name: "incident", Role: Incident, VerdictA: Held, VerdictB: Refuted,
		Metrics: []MetricComparison{
			{
				Name: "server/Drops.FirstAttempt", Unit: "SYNs", A: new(2360.0), B: new(1180.0),
				Difference: new(-1180.0), Ratio: new(0.5), VerdictA: Held, VerdictB: Refuted,
			},
			{Name: "server/AcceptQueue.Limit", Unit: "connections", A: new(512.0), VerdictA: Held, VerdictB: Void},
			{
				Name: "clients/Connect.RetriedAfterTheFirstSecondOfTheStall", Unit: "connections", A: new(2290.0), B: new(2290.0),
				Difference: new(0.0), Ratio: new(1.0), VerdictA: Held, VerdictB: Held,
			},
			{Name: "server/TcpExt.ListenDrops", Unit: "events", B: new(4000.0)},
			{Name: "server/TcpExt.ListenOverflows", Unit: "events", A: new(4711.0), B: new(0.0), Difference: new(-4711.0), Ratio: new(0.0)},
		},
	}
	require.NotEmpty(t, c.Variants)
	if diff := cmp.Diff(want, c.Variants[0]); diff != "" {
		t.Errorf("the incident variant (-want +got):\n%s", diff)
	}
}

func TestCompareWithNothingInCommon(t *testing.T) {
	a, b := sampleRecord(), sampleRecord()
	for i := range b.Variants {
		b.Variants[i].Name += "-of-b"
	}
	c := Compare(a, b)
	assert.Empty(t, c.Variants)
	assert.Len(t, c.OnlyA, len(a.Variants))
	assert.Len(t, c.OnlyB, len(b.Variants))
	var out strings.Builder
	require.NoError(t, WriteComparison(&out, c, TableOptions{}))
	assert.True(t, strings.HasSuffix(out.String(), "\nno variant in common: nothing was compared\n"), out.String())
	assert.NotContains(t, out.String(), "nothing is worse", "where nothing was compared nothing is known")
}

func TestCompareWithItself(t *testing.T) {
	c := Compare(sampleRecord(), sampleRecord())
	assert.Empty(t, c.Warnings)
	assert.Empty(t, c.OnlyA)
	assert.Empty(t, c.OnlyB)
	assert.False(t, c.Regressed(), "refuted, void and skipped on both sides is no change")
	for _, v := range c.Variants {
		for _, m := range v.Metrics {
			if m.Difference != nil {
				assert.Zero(t, *m.Difference, m.Name)
			}
		}
	}
}

func TestCompareVerdicts(t *testing.T) {
	tests := []struct {
		a, b      Verdict
		regressed bool
		why       string
	}{
		{Held, Refuted, true, "what held is refuted"},
		{Held, Void, true, "what held is no longer shown"},
		{Held, Skipped, true, "what held was not run"},
		{Void, Refuted, true, "a doubt became a refutation"},
		{Held, "", true, "not judged is void"},
		{Held, Held, false, "no change"},
		{Refuted, Held, false, "better"},
		{Refuted, Void, false, "no longer refuted"},
		{Void, Skipped, false, "by the order of verdicts"},
	}
	for _, tt := range tests {
		a := &Record{Variants: []Variant{{Name: "v", Verdict: tt.a}}}
		b := &Record{Variants: []Variant{{Name: "v", Verdict: tt.b}}}
		c := Compare(a, b)
		assert.Equal(t, tt.regressed, c.Regressed(), tt.why)
	}
}

func TestCompareOddMetrics(t *testing.T) {
	record := func(metrics map[string]Metric) *Record {
		return &Record{Incident: "x", Variants: []Variant{{Name: "v", Verdict: Held, Metrics: metrics}}}
	}
	c := Compare(
		record(map[string]Metric{"from 0": {0, "s"}, "unit": {1, "s"}, "huge": {-1e308, "s"}}),
		record(map[string]Metric{"from 0": {5, "s"}, "unit": {1, "ms"}, "huge": {1e308, "s"}}),
	)
	assert.Equal(t, []string{`v: unit is in "s" in a, in "ms" in b: left out`}, c.Warnings)
	want := []MetricComparison{
		{Name: "from 0", Unit: "s", A: new(0.0), B: new(5.0), Difference: new(5.0)},
		{Name: "huge", Unit: "s", A: new(-1e308), B: new(1e308), Ratio: new(-1.0)},
	}
	if diff := cmp.Diff(want, c.Variants[0].Metrics); diff != "" {
		t.Errorf("metrics (-want +got):\n%s", diff)
	}
}

func TestCompareWarnsOfOtherExperiments(t *testing.T) {
	record := func(incident, rate string, role Role) *Record {
		rec := &Record{Incident: incident, Variants: []Variant{{Name: "v", Role: role, Verdict: Held}}}
		if rate != "" {
			rec.Parameters = map[string]string{"rate": rate}
		}
		return rec
	}
	tests := []struct {
		why  string
		a, b *Record
		want []string
	}{
		{"the same", record("x", "1", Fix), record("x", "1", Fix), []string{}},
		{"another incident", record("x", "", Fix), record("y", "", Fix), []string{"incident: x in a, y in b: not the same experiment"}},
		{"another value", record("x", "1", Fix), record("x", "2", Fix), []string{"parameter rate: 1 in a, 2 in b: not the same experiment"}},
		{"a parameter is gone", record("x", "1", Fix), record("x", "", Fix), []string{"parameter rate: 1 in a only: not the same experiment"}},
		{"a parameter came", record("x", "", Fix), record("x", "2", Fix), []string{"parameter rate: 2 in b only: not the same experiment"}},
		{"another role", record("x", "", Fix), record("x", "", Control), []string{"v: role fix in a, control in b"}},
	}
	for _, tt := range tests {
		assert.Equal(t, tt.want, Compare(tt.a, tt.b).Warnings, tt.why)
	}
}

// Two counts of one random outcome differ by chance: that is shown, and no
// regression.
func TestCompareRandomOutcomes(t *testing.T) {
	c := Compare(randomRecord(2, 40), randomRecord(5, 63))
	assert.Empty(t, c.Warnings)
	assert.False(t, c.Regressed(), "%v", c.Regressions)
	require.Len(t, c.Variants, 1)
	assert.Equal(t, new(3.0), c.Variants[0].Metrics[0].Difference)

	c = Compare(randomRecord(2, 40), randomRecord(11, 40))
	assert.Equal(t, []string{
		"incident: held in a, refuted in b",
		"incident detector/Collisions: held in a, refuted in b",
	}, c.Regressions)
}

func TestChange(t *testing.T) {
	assert.Equal(t, "held", change(Held, Held))
	assert.Equal(t, "held → void", change(Held, Void))
	assert.Equal(t, "– → held", change("", Held), "predicted in b only")
	assert.Empty(t, change("", ""), "predicted in neither")
}

func TestComparisonJSON(t *testing.T) {
	c := Compare(sampleRecord(), changedRecord(t))
	data, err := json.Marshal(c)
	require.NoError(t, err)
	var back Comparison
	require.NoError(t, json.Unmarshal(data, &back))
	if diff := cmp.Diff(c, back); diff != "" {
		t.Errorf("after a round trip (-want +got):\n%s", diff)
	}

	empty, err := json.Marshal(Compare(&Record{}, &Record{}))
	require.NoError(t, err)
	assert.NotContains(t, string(empty), "null", "an empty list is [], for whoever reads it by program")
}

func TestWriteComparison(t *testing.T) {
	tests := []struct {
		file string
		b    *Record
		opts TableOptions
	}{
		{"compare.txt", changedRecord(t), TableOptions{}},
		{"compare-all.txt", changedRecord(t), TableOptions{All: true}},
		{"compare-same.txt", sampleRecord(), TableOptions{}},
	}
	for _, tt := range tests {
		var b strings.Builder
		require.NoError(t, WriteComparison(&b, Compare(sampleRecord(), tt.b), tt.opts))
		compareWithFile(t, tt.file, b.String())
		assertNarrow(t, b.String())
	}
}
