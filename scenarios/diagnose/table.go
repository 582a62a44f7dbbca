package diagnose

import (
	"fmt"
	"io"
	"strings"
	"unicode/utf8"
)

// The columns of the table, in characters: less than 100 with two between each.
const (
	widthIncident = 15
	widthVerdict  = 8
	widthCell     = 35
	widthTable    = widthIncident + widthVerdict + 2*widthCell + 6
)

// Write writes a diagnosis as a table less than 100 columns wide and, below it, the verdict
// and what would decide.
func (d Diagnosis) Write(w io.Writer) error {
	var b strings.Builder
	row(&b, "incident", "fits?", []string{"speaks for"}, []string{"speaks against"})
	b.WriteString(strings.Repeat("-", widthTable) + "\n")
	for _, found := range d.Findings {
		against := cells(found.Against, "")
		if found.Verdict == Possible {
			against = append(against, cells(found.Open, "open: ")...)
		}
		row(&b, string(found.Incident), string(found.Verdict), cells(found.For, ""), against)
	}
	b.WriteString("\n")
	next := "Next"
	if d.Verdict == NotEnough {
		next = "What would decide"
	}
	for _, line := range wrap(fmt.Sprintf("Verdict: %s. %s: %s.", d.Verdict, next, d.Decide), widthTable) {
		b.WriteString(line + "\n")
	}
	if d.SinceBoot {
		b.WriteString("These are totals since boot, not rates: it may be long over. Save them twice and use --before.\n")
	}
	_, err := io.WriteString(w, b.String())
	return err
}

// cells writes each observation as lines of a cell.
func cells(seen []Observation, prefix string) []string {
	var lines []string
	for _, o := range seen {
		lines = append(lines, wrap(prefix+o.Value+": "+o.Says, widthCell)...)
	}
	return lines
}

// row writes the lines of one row side by side.
func row(b *strings.Builder, incident, verdict string, left, right []string) {
	for i := range max(1, len(left), len(right)) {
		line := pad(at([]string{incident}, i), widthIncident) + "  " + pad(at([]string{verdict}, i), widthVerdict) + "  " +
			pad(at(left, i), widthCell) + "  " + at(right, i)
		b.WriteString(strings.TrimRight(line, " ") + "\n")
	}
}

func at(lines []string, i int) string {
	if i < len(lines) {
		return lines[i]
	}
	return ""
}

func pad(s string, width int) string {
	return s + strings.Repeat(" ", max(0, width-utf8.RuneCountInString(s)))
}

// wrap breaks a text into lines of at most width characters, between words; from
// the second on they are indented. A longer word has a line of its own.
func wrap(text string, width int) []string {
	const indent = "  "
	var lines []string
	line := ""
	for word := range strings.FieldsSeq(text) {
		switch {
		case line == "":
			line = word
		case utf8.RuneCountInString(line)+1+utf8.RuneCountInString(word) <= width:
			line += " " + word
		default:
			lines = append(lines, line)
			line = indent + word
		}
	}
	if line != "" {
		lines = append(lines, line)
	}
	return lines
}
