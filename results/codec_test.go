package results

import (
	"bytes"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"
	"github.com/google/go-cmp/cmp/cmpopts"
	"github.com/stretchr/testify/assert"
	"github.com/stretchr/testify/require"
)

func TestRoundTrip(t *testing.T) {
	rec := sampleRecord()
	var b bytes.Buffer
	require.NoError(t, Write(&b, rec))
	compareWithFile(t, "record.json", b.String())

	back, err := Read(&b)
	require.NoError(t, err)
	if diff := cmp.Diff(rec, back, cmpopts.EquateEmpty()); diff != "" {
		t.Errorf("after a round trip (-want +got):\n%s", diff)
	}
}

// A tolerance keeps its level and trials, and others do not get any.
func TestRoundTripOfRandomOutcomes(t *testing.T) {
	rec := randomRecord(2, 40)
	var b bytes.Buffer
	require.NoError(t, Write(&b, rec))
	back, err := Read(&b)
	require.NoError(t, err)
	if diff := cmp.Diff(rec, back, cmpopts.EquateEmpty()); diff != "" {
		t.Errorf("after a round trip (-want +got):\n%s", diff)
	}
	b.Reset()
	require.NoError(t, Write(&b, sampleRecord()))
	assert.NotContains(t, b.String(), `"level"`)
	assert.NotContains(t, b.String(), `"trials"`)
}

// The schema has lists and objects where Go has nil.
func TestWriteHasNoNullButMeasurements(t *testing.T) {
	rec := &Record{Schema: Schema, Incident: "x", Variants: []Variant{{Name: "v", Role: Control}}}
	rec.Judge()
	var b bytes.Buffer
	require.NoError(t, Write(&b, rec))
	assert.NotContains(t, b.String(), "null")
	assert.NotContains(t, b.String(), "started", "a record that does not say when")
	assert.Nil(t, rec.Parameters, "writing leaves the record as it was")

	rec.Variants[0].Predictions = []Prediction{drops(511, 1.43)}
	rec.Judge()
	b.Reset()
	require.NoError(t, Write(&b, rec))
	assert.Contains(t, b.String(), `"measured": null`)
	assert.Contains(t, b.String(), `"error": null`)
}

func TestWriteKeepsFormulasReadable(t *testing.T) {
	rec := sampleRecord()
	rec.Variants[0].Predictions[0].Formula = "λT > B & 1 < 2"
	var b bytes.Buffer
	require.NoError(t, Write(&b, rec))
	assert.Contains(t, b.String(), `"λT > B & 1 < 2"`)
}

func TestRecordChecks(t *testing.T) {
	tests := []struct {
		why    string
		change func(*Record)
		want   string
	}{
		{"a name that would leave the directory", func(r *Record) { r.Incident = "../x" }, `incident "../x" is not a name`},
		{"no name", func(r *Record) { r.Incident = "" }, `incident "" is not a name`},
		{"a year of five digits", func(r *Record) { r.Started = time.Date(10000, 1, 1, 0, 0, 0, 0, time.UTC) }, "year 10000"},
		{"one variant twice", func(r *Record) { r.Variants[1].Name = "incident" }, `variant "incident" appears twice`},
		{"a variant without a name", func(r *Record) { r.Variants[1].Name = "" }, `variant "": it has no name`},
		{"an unknown role", func(r *Record) { r.Variants[1].Role = "hero" }, `variant "backlog-2048": unknown role "hero"`},
		{"not judged", func(r *Record) { r.Variants[1].Verdict = "" }, `variant "backlog-2048": not judged`},
		{"an unknown verdict", func(r *Record) { r.Variants[1].Verdict = "fine" }, `unknown verdict "fine"`},
		{"skipped without a reason", func(r *Record) { r.Variants[3].Reason = "" }, "skipped without a reason"},
		{"held over a refuted claim", func(r *Record) { r.Variants[1].Verdict = Held }, "refuted in a variant that held"},
		{"held over a void condition", func(r *Record) { r.Variants[0].Voids = []string{"late"} }, "held, though"},
		{"held over nothing", func(r *Record) { r.Variants[0].Predictions = nil }, "held, though nothing was predicted"},
		{"held without a measurement", func(r *Record) { r.Variants[0].Predictions[0].Measured = nil }, "held without a measurement"},
		{"a prediction that was not judged", func(r *Record) { r.Variants[1].Predictions[0].Verdict = "" },
			`prediction of "server/Drops.FirstAttempt": not judged`},
		{"a prediction that is no number", func(r *Record) { r.Variants[1].Predictions[0].Predicted = nan }, "predicted NaN"},
		{"an input that is no number", func(r *Record) { r.Variants[1].Predictions[0].Inputs["T"] = inf }, "input T is +Inf"},
		{"no tolerance", func(r *Record) { r.Variants[1].Predictions[0].Tolerance = Tolerance{} }, "no tolerance is stated"},
		{"an unknown tolerance", func(r *Record) { r.Variants[1].Predictions[0].Tolerance = Tolerance{Kind: "roughly"} },
			`unknown tolerance "roughly"`},
		{"an exact tolerance with an amount", func(r *Record) { r.Variants[1].Predictions[0].Tolerance.Kind = KindExact },
			`tolerance "exact" takes no amount, not 0.05`},
		{"a level for no test", func(r *Record) { r.Variants[1].Predictions[0].Tolerance.Level = 0.05 },
			`tolerance "within" takes no level, not 0.05`},
		{"trials for no binomial", func(r *Record) { r.Variants[1].Predictions[0].Tolerance.Trials = 5 },
			`tolerance "within" takes no trials, not 5`},
		{"a test with an amount", func(r *Record) {
			r.Variants[1].Predictions[0].Tolerance = Tolerance{Kind: KindPoisson, Amount: 0.1, Level: 0.05}
		}, `tolerance "poisson" takes no amount, not 0.1`},
		{"a test without a level", func(r *Record) { r.Variants[1].Predictions[0].Tolerance = Poisson(0) },
			`tolerance "poisson" needs a level between 0 and 1, not 0`},
		{"a level that refutes everything", func(r *Record) { r.Variants[1].Predictions[0].Tolerance = Poisson(1) },
			`tolerance "poisson" needs a level between 0 and 1, not 1`},
		{"a level that is no number", func(r *Record) { r.Variants[1].Predictions[0].Tolerance = Poisson(nan) },
			`tolerance "poisson" needs a level between 0 and 1, not NaN`},
		{"no trials", func(r *Record) { r.Variants[1].Predictions[0].Tolerance = Binomial(0, 0.05) },
			`tolerance "binomial" needs 1 to 1,000,000,000 trials, not 0`},
		{"fewer trials than expected successes", func(r *Record) { r.Variants[1].Predictions[0].Tolerance = Binomial(810, 0.05) },
			`tolerance "binomial" needs an expected count between 0 and 810, not 811`},
		{"a metric that is no number", func(r *Record) { r.Variants[1].Metrics["x"] = Metric{nan, "s"} }, `metric "x" is NaN`},
		{"a series too long", func(r *Record) { r.Variants[0].Series[0].Points = make([]Point, MaxPoints+1) },
			`series "accept queue depth" has 201 points`},
		{"a length of time that is no number", func(r *Record) { r.Seconds = nan }, "unsupported value: NaN"},
	}
	for _, tt := range tests {
		rec := sampleRecord()
		tt.change(rec)
		var b bytes.Buffer
		err := Write(&b, rec)
		if assert.ErrorContains(t, err, tt.want, tt.why) {
			assert.Empty(t, b.String(), "%s: nothing half written", tt.why)
		}
	}
}

func TestReadRefuses(t *testing.T) {
	var b bytes.Buffer
	require.NoError(t, Write(&b, sampleRecord()))
	whole := b.String()

	tests := []struct {
		why, doc, want string
	}{
		{"nothing", "", "unexpected end of JSON input"},
		{"cut short after a comma", whole[:strings.LastIndex(whole, ",")+1], "unexpected end of JSON input"},
		{"not a record", "[1,2]", "cannot unmarshal"},
		{"two documents", whole + whole, "invalid character '{' after top-level value"},
		{"an unknown field, such as a misspelt one", strings.Replace(whole, `"warnings"`, `"wranings"`, 1), `unknown field "wranings"`},
		{"no schema", "{}", `unknown schema ""`},
		{"a later version is told by its version", `{"schema":"connlab.record/2","new":1}`,
			`unknown schema "connlab.record/2", want "connlab.record/1"`},
		{"a held variant that was edited to have nothing behind it", strings.Replace(whole, `"verdict": "refuted"`, `"verdict": "held"`, 1),
			"refuted in a variant that held"},
		{"more than a record can be", whole + strings.Repeat(" ", MaxSize), "longer than 16777216 bytes"},
	}
	for _, tt := range tests {
		_, err := Read(strings.NewReader(tt.doc))
		require.ErrorContains(t, err, tt.want, tt.why)
	}
	_, err := Read(strings.NewReader(`{"schema":"x"}`))
	assert.ErrorIs(t, err, ErrSchema)
}

func TestLoad(t *testing.T) {
	path := filepath.Join(t.TempDir(), "none.json")
	_, err := Load(path)
	require.ErrorIs(t, err, os.ErrNotExist)

	require.NoError(t, os.WriteFile(path, []byte("{}"), 0o600))
	_, err = Load(path)
	require.ErrorIs(t, err, ErrSchema)
	assert.ErrorContains(t, err, path)
}

// What Read accepts can be written, and reading that gives the same again.
func FuzzRead(f *testing.F) {
	var b bytes.Buffer
	require.NoError(f, Write(&b, sampleRecord()))
	f.Add(b.Bytes())
	for _, seed := range []string{
		`{}`,
		`{"schema":"connlab.record/1","incident":"x"}`,
		`{"schema":"connlab.record/1","incident":"x","started":"9999-12-31T23:59:59-23:00","variants":null}`,
		`{"schema":"connlab.record/1","incident":"x","started":"2026-11-22T13:24:00.5+02:00","seed":18446744073709551615,"variants":[
			{"name":"v","role":"fix","verdict":"void","reason":"r","predictions":[{"metric":"m","predicted":-0,"inputs":null,
			"tolerance":{"kind":"within","amount":1e-300},"verdict":"void"},{"metric":"n","predicted":2.33,
			"tolerance":{"kind":"poisson","level":1e-4},"verdict":"void"},{"metric":"o","predicted":1e-300,
			"tolerance":{"kind":"binomial","level":1e-300,"trials":1000000000},"verdict":"void"}],"metrics":{"\u0000":{"value":1e308}},"series":[{"points":null}]}]}`,
	} {
		f.Add([]byte(seed))
	}
	f.Fuzz(func(t *testing.T, data []byte) {
		rec, err := Read(bytes.NewReader(data))
		if err != nil {
			return
		}
		var once bytes.Buffer
		require.NoError(t, Write(&once, rec), "what was accepted can be written")
		again, err := Read(bytes.NewReader(once.Bytes()))
		require.NoError(t, err, "what was written can be read")
		if diff := cmp.Diff(rec, again, cmpopts.EquateEmpty()); diff != "" {
			t.Errorf("changed by a round trip (-want +got):\n%s", diff)
		}
		// No record can make a report fail.
		require.NoError(t, WriteTable(&once, rec, TableOptions{Charts: true}))
		require.NoError(t, WriteComparison(&once, Compare(rec, again), TableOptions{All: true}))
		assert.Empty(t, CheckGolden(rec, again))
	})
}
