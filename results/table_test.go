package results

import (
	"errors"
	"regexp"
	"strings"
	"testing"
	"unicode/utf8"

	"github.com/stretchr/testify/assert"
	"github.com/stretchr/testify/require"
)

func TestWriteTable(t *testing.T) {
	tests := map[string]TableOptions{
		"table.txt":        {},
		"table-charts.txt": {Charts: true},
	}
	for file, opts := range tests {
		var b strings.Builder
		require.NoError(t, WriteTable(&b, sampleRecord(), opts))
		compareWithFile(t, file, b.String())
		assertNarrow(t, b.String())
	}
}

// A test is shown with the counts that it lets hold.
func TestWriteTableOfRandomOutcomes(t *testing.T) {
	var b strings.Builder
	require.NoError(t, WriteTable(&b, randomRecord(11, 40), TableOptions{}))
	compareWithFile(t, "table-random.txt", b.String())
	assertNarrow(t, b.String())

	rec := randomRecord(2, 40)
	rec.Variants[0].Predictions[0].Predicted = -1
	b.Reset()
	require.NoError(t, WriteTable(&b, rec, TableOptions{}), "what cannot be judged can be shown")
	assertNarrow(t, b.String())
}

// Colour adds escape codes and nothing else.
func TestWriteTableColor(t *testing.T) {
	var plain, coloured strings.Builder
	require.NoError(t, WriteTable(&plain, sampleRecord(), TableOptions{Charts: true}))
	require.NoError(t, WriteTable(&coloured, sampleRecord(), TableOptions{Charts: true, Color: true}))
	assert.NotContains(t, plain.String(), "\x1b")
	for _, painted := range []string{"\x1b[32mheld\x1b[0m", "\x1b[31mrefuted\x1b[0m", "\x1b[33mvoid\x1b[0m", "\x1b[36mskipped\x1b[0m"} {
		assert.Contains(t, coloured.String(), painted)
	}
	codes := regexp.MustCompile("\x1b\\[[0-9]+m")
	assert.Equal(t, plain.String(), codes.ReplaceAllString(coloured.String(), ""))
}

// A record from elsewhere cannot send commands to the terminal, and cannot break
// the table by its lengths.
func TestWriteTableOfHostileText(t *testing.T) {
	rec := sampleRecord()
	rec.Incident = "\x1b]0;title\x07"
	rec.Server = "a\nb\rc\xff"
	for i := range rec.Variants {
		v := &rec.Variants[i]
		v.Name, v.Summary, v.Reason = "\x1b[2J"+v.Name, "\x1b[31mred", "line\nbreak"
		v.Role = "\x1b"
		for j := range v.Predictions {
			p := &v.Predictions[j]
			p.Metric, p.Unit, p.Formula = "\x9b"+strings.Repeat("m", 90), strings.Repeat("u", 90), "\x1b = 1"
			p.Tolerance = PlusMinus(1.23456e-300)
			p.Verdict = "\x1b[1m" + Verdict(strings.Repeat("v", 90))
		}
		v.Warnings = []string{strings.Repeat("long ", 60), "\u202ereversed"}
		for j := range v.Series {
			v.Series[j].Name, v.Series[j].Unit = "\x1b", "\x1b"
		}
	}
	var b strings.Builder
	require.NoError(t, WriteTable(&b, rec, TableOptions{Charts: true}))
	assert.NotRegexp(t, "[\x00-\x09\x0b-\x1f\x7f\u0080-\u009f\u202e]", b.String())
	assertNarrow(t, b.String())
}

func TestWriteTableReportsTheWriter(t *testing.T) {
	err := WriteTable(brokenWriter{}, sampleRecord(), TableOptions{})
	require.ErrorIs(t, err, errBroken)
	err = WriteComparison(brokenWriter{}, Compare(sampleRecord(), sampleRecord()), TableOptions{})
	require.ErrorIs(t, err, errBroken)
	assert.ErrorIs(t, Write(brokenWriter{}, sampleRecord()), errBroken)
}

var errBroken = errors.New("pipe is broken")

type brokenWriter struct{}

func (brokenWriter) Write([]byte) (int, error) { return 0, errBroken }

func assertNarrow(t *testing.T, text string) {
	t.Helper()
	for line := range strings.Lines(text) {
		line = strings.TrimSuffix(line, "\n")
		assert.LessOrEqual(t, utf8.RuneCountInString(line), tableWidth, "too wide: %q", line)
	}
}
