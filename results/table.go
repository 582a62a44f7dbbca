package results

import (
	"cmp"
	"fmt"
	"io"
	"maps"
	"slices"
	"strings"
	"time"
)

// tableWidth is the number of columns that the reports for people keep within.
const tableWidth = 110

// TableOptions chooses what a report for people shows.
type TableOptions struct {
	Color  bool // verdicts in ANSI colours
	Charts bool // the series of each variant as a strip of bars
	All    bool // in a comparison: also the metrics that nothing predicts
}

// WriteTable writes rec for people, at most 110 columns wide: for each variant
// its claims with predicted and measured values, and a count of verdicts at the
// end. The same record and options always give the same text.
func WriteTable(w io.Writer, rec *Record, opts TableOptions) error {
	r := report{color: opts.Color}
	r.text("", rec.heading())
	r.text("  ", parameterText("defaults: ", rec.Parameters))

	head := []string{"metric", "predicted", "measured", "error", "tolerance", "verdict"}
	rows := [][]string{head}
	for _, v := range rec.Variants {
		for i := range v.Predictions {
			rows = append(rows, v.Predictions[i].row())
		}
	}
	g := newGrid(rows)

	for _, v := range rec.Variants {
		r.line("")
		r.variantHeading(v.Name, v.Role, r.paint(v.Verdict, string(v.Verdict)))
		r.text("  ", v.Summary)
		r.text("  ", parameterText("with ", v.Parameters))
		r.text("  ", parameterText("sysctls: ", v.Sysctls))
		if v.Link != "" {
			r.text("  ", "link of the server: "+v.Link)
		}
		if v.Verdict != Held {
			r.text("  ", v.Reason)
		}
		if len(v.Predictions) > 0 {
			r.row(g, head, "")
		}
		for i := range v.Predictions {
			p := &v.Predictions[i]
			r.row(g, p.row(), p.Verdict)
			r.text("    ", p.explain())
		}
		if opts.Charts {
			for _, s := range v.Series {
				r.chart(s)
			}
		}
		for _, line := range v.Evidence {
			r.text("  ", "evidence: "+line)
		}
		for _, warning := range v.Warnings {
			r.text("  ", "warning: "+warning)
		}
	}

	r.line("")
	r.line(countVerdicts(rec.Variants))
	return r.writeTo(w)
}

// heading names the run in one line.
func (r *Record) heading() string {
	parts := []string{r.Incident + " on Linux " + r.Kernel}
	if r.Server != "" {
		parts = append(parts, "server "+r.Server)
	}
	if r.Seed != 0 {
		parts = append(parts, fmt.Sprintf("seed %d", r.Seed))
	}
	if !r.Started.IsZero() {
		parts = append(parts, r.Started.UTC().Format(time.RFC3339))
	}
	if r.Seconds != 0 {
		parts = append(parts, formatNumber(r.Seconds)+" s")
	}
	return strings.Join(parts, ", ")
}

func (p *Prediction) row() []string {
	measured := "not measured"
	if p.Measured != nil {
		measured = withUnit(*p.Measured, p.Unit)
	}
	off := p.errorText()
	if p.Tolerance.Kind == KindAtLeast || p.Tolerance.Kind == KindAtMost {
		off = "–" // the distance from a bound is no error
	}
	return []string{p.Metric, withUnit(p.Predicted, p.Unit), measured, off, p.toleranceText(), string(p.Verdict)}
}

// parameterText lists parameters by name, or is empty if there are none.
func parameterText(prefix string, parameters map[string]string) string {
	if len(parameters) == 0 {
		return ""
	}
	var pairs []string
	for _, name := range slices.Sorted(maps.Keys(parameters)) {
		pairs = append(pairs, name+"="+parameters[name])
	}
	return prefix + strings.Join(pairs, " ")
}

func countVerdicts(variants []Variant) string {
	counts := make(map[Verdict]int)
	for _, v := range variants {
		counts[v.Verdict.orVoid()]++
	}
	return fmt.Sprintf("%d held, %d refuted, %d void, %d skipped",
		counts[Held], counts[Refuted], counts[Void], counts[Skipped])
}

// A report gathers the lines of a text for people.
type report struct {
	b     strings.Builder
	color bool
}

func (r *report) line(text string) {
	r.b.WriteString(strings.TrimRight(text, " "))
	r.b.WriteByte('\n')
}

// text writes running text, wrapped; empty text gives no line.
func (r *report) text(indent, text string) {
	for _, line := range wrap(text, indent, tableWidth) {
		r.line(line)
	}
}

func (r *report) variantHeading(name string, role Role, verdict string) {
	r.line(fmt.Sprintf("%s [%s]: %s", printable(name), printable(string(role)), verdict))
}

// row writes the cells of one row; the last is coloured by verdict.
func (r *report) row(g grid, cells []string, verdict Verdict) {
	if width(cells[0]) > g.widths[0] {
		r.line("  " + printable(cells[0]))
		cells = append([]string{""}, cells[1:]...)
	}
	line := "  " + pad(cells[0], g.widths[0])
	last := len(cells) - 1
	for i := 1; i < last; i++ {
		line += "  " + padLeft(cells[i], g.widths[i])
	}
	r.line(line + "  " + r.paint(verdict, shorten(cells[last])))
}

func (r *report) chart(s Series) {
	if len(s.Points) == 0 {
		return
	}
	byValue := func(a, b Point) int { return cmp.Compare(a.V, b.V) }
	lowest, highest := slices.MinFunc(s.Points, byValue).V, slices.MaxFunc(s.Points, byValue).V
	start, end := s.Points[0].T, s.Points[len(s.Points)-1].T
	r.text("  ", fmt.Sprintf("%s, lowest %s, highest %s, %s s to %s s:", s.Name,
		formatNumber(lowest), withUnit(highest, s.Unit), formatNumber(start), formatNumber(end)))
	r.line("    " + sparkline(s.Points, tableWidth-4, lowest, highest))
}

// paint colours text by what the verdict means, if colour was asked for.
func (r *report) paint(verdict Verdict, text string) string {
	text = printable(text)
	codes := map[Verdict]string{Held: "32", Refuted: "31", Void: "33", Skipped: "36"}
	code, ok := codes[verdict]
	if !r.color || !ok {
		return text
	}
	return "\x1b[" + code + "m" + text + "\x1b[0m"
}

func (r *report) writeTo(w io.Writer) error {
	if _, err := io.WriteString(w, r.b.String()); err != nil {
		return fmt.Errorf("writing the report: %w", err)
	}
	return nil
}

// A grid holds the column widths that all rows of a report share.
type grid struct{ widths []int }

// cellWidth is the most that a cell other than the first may take, so that five
// of them leave room for the first.
const cellWidth = 18

// newGrid makes every column as wide as its widest cell, save for first cells
// that would make the whole wider than the report: those get lines of their own.
func newGrid(rows [][]string) grid {
	widths := make([]int, len(rows[0]))
	room := tableWidth - 2
	for i := len(widths) - 1; i > 0; i-- {
		for _, row := range rows {
			widths[i] = max(widths[i], width(shorten(row[i])))
		}
		room -= 2 + widths[i]
	}
	for _, row := range rows {
		if w := width(row[0]); w <= room {
			widths[0] = max(widths[0], w)
		}
	}
	return grid{widths}
}

// shorten cuts text to the width of a cell.
func shorten(text string) string {
	runes := []rune(text)
	if len(runes) <= cellWidth {
		return text
	}
	return string(runes[:cellWidth-1]) + "…"
}

func pad(text string, w int) string {
	return printable(text) + strings.Repeat(" ", w-width(text))
}

func padLeft(text string, w int) string {
	text = printable(shorten(text))
	return strings.Repeat(" ", w-width(text)) + text
}
