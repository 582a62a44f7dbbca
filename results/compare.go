package results

import (
	"fmt"
	"io"
	"maps"
	"slices"
	"strings"
)

// A Comparison sets two records side by side.
type Comparison struct {
	A Side `json:"a"`
	B Side `json:"b"`
	// Warnings say why the two may not be the same experiment.
	Warnings []string            `json:"warnings"`
	Variants []VariantComparison `json:"variants"` // those in both, in a's order
	OnlyA    []string            `json:"only_a"`   // names of the variants that b lacks
	OnlyB    []string            `json:"only_b"`
	// Regressions name what b shows less well than a; see [Comparison.Regressed].
	Regressions []string `json:"regressions"`
}

// A Side identifies one of the two records.
type Side struct {
	Heading string  `json:"heading"` // incident, kernel, server, time in one line
	Verdict Verdict `json:"verdict"`
}

// A VariantComparison is one variant in both records.
type VariantComparison struct {
	Name     string             `json:"name"`
	Role     Role               `json:"role"` // in a
	VerdictA Verdict            `json:"verdict_a"`
	VerdictB Verdict            `json:"verdict_b"`
	Metrics  []MetricComparison `json:"metrics"` // the predicted ones first
}

// A MetricComparison is one metric in both records. What one of them lacks is
// nil, and with it the difference and the ratio.
type MetricComparison struct {
	Name       string   `json:"name"`
	Unit       string   `json:"unit"`
	A          *float64 `json:"a"`
	B          *float64 `json:"b"`
	Difference *float64 `json:"difference"` // b−a, in Unit
	Ratio      *float64 `json:"ratio"`      // b/a; nil if a is 0
	// VerdictA and VerdictB are the worst verdicts of the predictions about the
	// metric, empty if there is none.
	VerdictA Verdict `json:"verdict_a,omitempty"`
	VerdictB Verdict `json:"verdict_b,omitempty"`
}

// Compare sets b beside a, which is the older or the reference. Both must have
// been judged. Differences between what the two measured are shown and never
// judged: two counts of one random outcome differ by chance, and whether each
// came out as its formula says is told by the verdicts alone.
func Compare(a, b *Record) Comparison {
	c := Comparison{
		A:           Side{a.heading(), a.Verdict()},
		B:           Side{b.heading(), b.Verdict()},
		Warnings:    []string{},
		Variants:    []VariantComparison{},
		OnlyA:       []string{},
		OnlyB:       []string{},
		Regressions: []string{},
	}
	if a.Incident != b.Incident {
		c.warn("incident: %s in a, %s in b: not the same experiment", a.Incident, b.Incident)
	}
	c.compareParameters("parameter ", a.Parameters, b.Parameters)

	for i := range a.Variants {
		va := &a.Variants[i]
		vb := b.variant(va.Name)
		if vb == nil {
			c.OnlyA = append(c.OnlyA, va.Name)
			continue
		}
		c.compareVariants(va, vb)
	}
	for i := range b.Variants {
		if a.variant(b.Variants[i].Name) == nil {
			c.OnlyB = append(c.OnlyB, b.Variants[i].Name)
		}
	}
	return c
}

// Regressed reports whether b is worse than a anywhere: a variant or a predicted
// metric whose verdict went down the order held, skipped, void, refuted. A held
// claim that became void counts, because b no longer shows it. What only one of
// the two records has does not count: one may well run a single variant and
// compare it with a full record.
func (c *Comparison) Regressed() bool { return len(c.Regressions) > 0 }

func (c *Comparison) warn(format string, args ...any) {
	c.Warnings = append(c.Warnings, fmt.Sprintf(format, args...))
}

func (c *Comparison) compareParameters(where string, a, b map[string]string) {
	names := slices.Collect(maps.Keys(a))
	names = slices.AppendSeq(names, maps.Keys(b))
	slices.Sort(names)
	for _, name := range slices.Compact(names) {
		inA, okA := a[name]
		inB, okB := b[name]
		switch {
		case !okA:
			c.warn("%s%s: %s in b only: not the same experiment", where, name, inB)
		case !okB:
			c.warn("%s%s: %s in a only: not the same experiment", where, name, inA)
		case inA != inB:
			c.warn("%s%s: %s in a, %s in b: not the same experiment", where, name, inA, inB)
		}
	}
}

func (c *Comparison) compareVariants(a, b *Variant) {
	if a.Role != b.Role {
		c.warn("%s: role %s in a, %s in b", a.Name, a.Role, b.Role)
	}
	c.compareParameters(a.Name+": parameter ", a.Parameters, b.Parameters)
	if len(a.Sysctls) > 0 && len(b.Sysctls) > 0 { // a skipped variant has none
		c.compareParameters(a.Name+": sysctl ", a.Sysctls, b.Sysctls)
	}
	if a.Link != b.Link && a.Link != "" && b.Link != "" {
		c.warn("%s: link %s in a, %s in b: not the same experiment", a.Name, a.Link, b.Link)
	}
	c.noteRegression(a.Name, a.Verdict, b.Verdict)

	v := VariantComparison{Name: a.Name, Role: a.Role, VerdictA: a.Verdict, VerdictB: b.Verdict, Metrics: []MetricComparison{}}
	for _, name := range metricNames(a, b) {
		ma, okA := a.Metrics[name]
		mb, okB := b.Metrics[name]
		m := MetricComparison{Name: name, VerdictA: a.verdictOn(name), VerdictB: b.verdictOn(name)}
		if okB {
			m.Unit, m.B = mb.Unit, &mb.Value
		}
		if okA {
			m.Unit, m.A = ma.Unit, &ma.Value
		}
		switch {
		case okA && okB && ma.Unit != mb.Unit:
			c.warn("%s: %s is in %q in a, in %q in b: left out", a.Name, name, ma.Unit, mb.Unit)
			continue
		case okA && okB:
			m.Difference = finite(mb.Value - ma.Value)
			if ma.Value != 0 {
				m.Ratio = finite(mb.Value / ma.Value)
			}
		}
		if m.VerdictA != "" && m.VerdictB != "" {
			c.noteRegression(a.Name+" "+name, m.VerdictA, m.VerdictB)
		}
		v.Metrics = append(v.Metrics, m)
	}
	c.Variants = append(c.Variants, v)
}

func (c *Comparison) noteRegression(what string, a, b Verdict) {
	if b.worseThan(a) {
		c.Regressions = append(c.Regressions, fmt.Sprintf("%s: %s in a, %s in b", what, a, b.orVoid()))
	}
}

// finite is nil for what JSON cannot carry.
func finite(x float64) *float64 {
	if !isFinite(x) {
		return nil
	}
	return &x
}

// metricNames lists the metrics of both variants: first those that a prediction
// names, in the order of a's and then b's predictions, then the others by name.
func metricNames(a, b *Variant) []string {
	var names []string
	add := func(name string) {
		if !slices.Contains(names, name) {
			names = append(names, name)
		}
	}
	for _, p := range slices.Concat(a.Predictions, b.Predictions) {
		add(p.Metric)
	}
	predicted := len(names)

	others := slices.Collect(maps.Keys(a.Metrics))
	others = slices.AppendSeq(others, maps.Keys(b.Metrics))
	slices.Sort(others)
	for _, name := range slices.Compact(others) {
		if !slices.Contains(names[:predicted], name) {
			names = append(names, name)
		}
	}
	return names
}

// variant finds a variant by name, nil if there is none.
func (r *Record) variant(name string) *Variant {
	for i := range r.Variants {
		if r.Variants[i].Name == name {
			return &r.Variants[i]
		}
	}
	return nil
}

// verdictOn is the worst verdict of v's predictions about a metric, empty if
// there is none.
func (v *Variant) verdictOn(metric string) Verdict {
	worst := Verdict("")
	for _, p := range v.Predictions {
		if p.Metric == metric && (worst == "" || p.Verdict.worseThan(worst)) {
			worst = p.Verdict.orVoid()
		}
	}
	return worst
}

// WriteComparison writes c for people, at most 110 columns wide. Metrics that
// nothing predicts are only counted, unless opts.All asks for them.
func WriteComparison(w io.Writer, c Comparison, opts TableOptions) error {
	r := report{color: opts.Color}
	r.text("", "a: "+c.A.Heading+": "+string(c.A.Verdict))
	r.text("", "b: "+c.B.Heading+": "+string(c.B.Verdict))
	for _, warning := range c.Warnings {
		r.text("", "warning: "+warning)
	}

	head := []string{"metric", "a", "b", "b−a", "b/a", "verdict"}
	rows := [][]string{head}
	for _, v := range c.Variants {
		for _, m := range v.Metrics {
			if opts.All || m.predicted() {
				rows = append(rows, m.row())
			}
		}
	}
	g := newGrid(rows)

	for _, v := range c.Variants {
		r.line("")
		r.variantHeading(v.Name, v.Role, r.paint(v.VerdictB, change(v.VerdictA, v.VerdictB)))
		hidden, hiddenChanged := 0, 0
		for i, m := range v.Metrics {
			if !opts.All && !m.predicted() {
				hidden++
				if m.Difference == nil || *m.Difference != 0 {
					hiddenChanged++
				}
				continue
			}
			if i == 0 {
				r.row(g, head, "")
			}
			r.row(g, m.row(), m.VerdictB)
		}
		if hidden > 0 {
			r.line(fmt.Sprintf("  metrics without a prediction, not shown: %d, of them different: %d", hidden, hiddenChanged))
		}
	}

	r.line("")
	r.text("", only("a", c.OnlyA))
	r.text("", only("b", c.OnlyB))
	for _, regression := range c.Regressions {
		r.text("", "worse: "+regression)
	}
	switch {
	case len(c.Variants) == 0:
		r.line("no variant in common: nothing was compared")
	case !c.Regressed():
		r.line("nothing is worse in b")
	}
	return r.writeTo(w)
}

func (m *MetricComparison) predicted() bool { return m.VerdictA != "" || m.VerdictB != "" }

func (m *MetricComparison) row() []string {
	value := func(x *float64) string {
		if x == nil {
			return "–"
		}
		return withUnit(*x, m.Unit)
	}
	difference, ratio := "–", "–"
	if m.Difference != nil {
		difference = formatSigned(*m.Difference)
	}
	if m.Ratio != nil {
		ratio = formatNumber(*m.Ratio)
	}
	return []string{m.Name, value(m.A), value(m.B), difference, ratio, change(m.VerdictA, m.VerdictB)}
}

// change writes a verdict that stayed once, and one that changed with an arrow.
func change(a, b Verdict) string {
	if a == b {
		return string(a)
	}
	side := func(v Verdict) string {
		if v == "" {
			return "–"
		}
		return string(v)
	}
	return side(a) + " → " + side(b)
}

func only(side string, names []string) string {
	if len(names) == 0 {
		return ""
	}
	return "only in " + side + ": " + strings.Join(names, ", ")
}
