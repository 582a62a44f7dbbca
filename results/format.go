package results

import (
	"fmt"
	"math"
	"regexp"
	"slices"
	"strconv"
	"strings"
	"unicode"
	"unicode/utf8"
)

// formatNumber writes x for people: whole numbers in full with thousands
// separators, others with four significant digits and never fewer than one
// decimal, so that 811.0 is seen to be not quite 811.
func formatNumber(x float64) string {
	size := math.Abs(x)
	switch {
	case !isFinite(x) || size >= 1e15:
		return strconv.FormatFloat(x, 'g', 6, 64)
	case x == math.Trunc(x):
		return groupThousands(strconv.FormatFloat(x, 'f', 0, 64))
	case size < 1:
		return strconv.FormatFloat(x, 'g', 4, 64)
	}
	wholeDigits := len(strconv.FormatFloat(math.Trunc(size), 'f', 0, 64))
	text := strconv.FormatFloat(x, 'f', max(1, 4-wholeDigits), 64)
	for strings.HasSuffix(text, "0") && !strings.HasSuffix(text, ".0") {
		text = strings.TrimSuffix(text, "0")
	}
	return groupThousands(text)
}

// groupThousands puts commas into the whole part of a decimal number.
func groupThousands(text string) string {
	sign := ""
	if strings.HasPrefix(text, "-") {
		sign, text = "-", text[1:]
	}
	whole, decimals, hasPoint := strings.Cut(text, ".")
	for i := len(whole) - 3; i > 0; i -= 3 {
		whole = whole[:i] + "," + whole[i:]
	}
	if hasPoint {
		whole += "." + decimals
	}
	return sign + whole
}

// withUnit is formatNumber followed by the unit, if there is one.
func withUnit(x float64, unit string) string {
	if unit == "" || unit == "1" {
		return formatNumber(x)
	}
	return formatNumber(x) + " " + unit
}

// formatPercent writes a fraction in percent, without the rounding noise that
// the multiplication brings: 0.07 is 7, not 7.000000000000001.
func formatPercent(fraction float64) string {
	return strconv.FormatFloat(fraction*100, 'g', 6, 64)
}

// formatLevel writes the level of a test with the two digits that matter.
func formatLevel(level float64) string { return strconv.FormatFloat(level*100, 'g', 2, 64) + " %" }

// formatSigned is formatNumber with the sign always shown, save for 0.
func formatSigned(x float64) string {
	if x > 0 {
		return "+" + formatNumber(x)
	}
	return formatNumber(x)
}

// errorText writes the error of a prediction: a percentage, or the difference
// where the predicted value is 0.
func (p *Prediction) errorText() string {
	switch {
	case p.Error == nil:
		return "–"
	case p.Predicted == 0:
		return formatSigned(*p.Error)
	case *p.Error == 0:
		return "0 %"
	}
	percent := *p.Error * 100
	if math.Abs(percent) >= 1e6 {
		return fmt.Sprintf("%+.1e %%", percent)
	}
	text := groupThousands(strconv.FormatFloat(percent, 'f', 1, 64)) + " %"
	if percent > 0 {
		return "+" + text
	}
	return text
}

// toleranceText is the tolerance in a cell of the table: of a test, the counts
// that it lets hold.
func (p *Prediction) toleranceText() string {
	if !p.Tolerance.random() {
		return p.Tolerance.String()
	}
	low, high := p.Tolerance.Band(p.Predicted)
	if math.IsNaN(low) {
		return "none"
	}
	return formatNumber(low) + "–" + formatNumber(high)
}

// allowed is the tolerance in running text.
func (p *Prediction) allowed() string {
	if p.Tolerance.random() {
		return p.toleranceText() + " by " + p.Tolerance.String()
	}
	return p.Tolerance.String()
}

// identifier matches a name in a formula, Greek letters and subscripts included.
var identifier = regexp.MustCompile(`[\p{L}_][\p{L}\p{N}_]*`)

// explain writes a formula with its inputs put in, "a·b = 2·3". Where the
// formula does not spell every input as a word of its own ("λT"), it lists them
// instead. The note follows, and the test if it takes one to judge.
func (p *Prediction) explain() string {
	text := p.calculation()
	if p.Note != "" {
		text += ": " + p.Note
	}
	if p.Tolerance.random() {
		text += "; " + p.Tolerance.String()
	}
	return text
}

func (p *Prediction) calculation() string {
	used := make(map[string]bool)
	substituted := identifier.ReplaceAllStringFunc(p.Formula, func(name string) string {
		value, ok := p.Inputs[name]
		if !ok {
			return name
		}
		used[name] = true
		text := plainNumber(value)
		if value < 0 {
			return "(" + text + ")"
		}
		return text
	})
	if len(p.Inputs) == 0 {
		return p.Formula
	}
	if len(used) == len(p.Inputs) {
		return p.Formula + " = " + substituted
	}
	inputs := make([]string, 0, len(p.Inputs))
	for name, value := range p.Inputs {
		inputs = append(inputs, name+" = "+plainNumber(value))
	}
	slices.Sort(inputs)
	return p.Formula + ", with " + strings.Join(inputs, ", ")
}

// plainNumber has no separators: inside max(0, 2000) a comma would mislead.
func plainNumber(x float64) string {
	if x == math.Trunc(x) && math.Abs(x) < 1e15 {
		return strconv.FormatFloat(x, 'f', 0, 64)
	}
	return strconv.FormatFloat(x, 'g', 6, 64)
}

// printable replaces what a terminal could take for a command: a record may come
// from anywhere.
func printable(text string) string {
	return strings.Map(func(r rune) rune {
		if unicode.IsPrint(r) {
			return r
		}
		return '?'
	}, text)
}

// width counts the columns that text takes. Every script used here is one column
// a character.
func width(text string) int { return utf8.RuneCountInString(text) }

// wrap breaks text between words into lines of at most columns characters, each
// behind indent and the later ones two further in. A longer word is not broken.
func wrap(text, indent string, columns int) []string {
	var lines []string
	line := ""
	for word := range strings.FieldsSeq(printable(text)) {
		switch {
		case line == "":
			line = indent + word
		case width(line)+1+width(word) > columns:
			lines = append(lines, line)
			line = indent + "  " + word
		default:
			line += " " + word
		}
	}
	if line == "" {
		return nil
	}
	return append(lines, line)
}
