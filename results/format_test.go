package results

import (
	"testing"

	"github.com/stretchr/testify/assert"
)

func TestFormatNumber(t *testing.T) {
	tests := []struct {
		x    float64
		want string
	}{
		{0, "0"},
		{512, "512"},
		{2348, "2,348"},
		{-1234567, "-1,234,567"},
		{999999, "999,999"},
		{1.43, "1.43"},
		{0.05, "0.05"},
		{0.00001234, "1.234e-05"},
		{12.3456, "12.35"},
		{1234.567, "1,234.6"},
		{810.99999, "811.0"}, // not 811, and it shows
		{-810.99999, "-811.0"},
		{10.5, "10.5"},
		{1e18, "1e+18"},
		{nan, "NaN"},
		{inf, "+Inf"},
	}
	for _, tt := range tests {
		assert.Equal(t, tt.want, formatNumber(tt.x), "%v", tt.x)
	}
	assert.Equal(t, "2,348 SYNs", withUnit(2348, "SYNs"))
	assert.Equal(t, "3", withUnit(3, ""), "no unit")
	assert.Equal(t, "3", withUnit(3, "1"), "the unit of pure numbers")
}

func TestErrorText(t *testing.T) {
	tests := []struct {
		why       string
		predicted float64
		error     *float64
		want      string
	}{
		{"not measured", 5, nil, "–"},
		{"exactly as predicted", 5, new(0.0), "0 %"},
		{"very near is not equal", 5, new(0.00001), "+0.0 %"},
		{"more", 5, new(0.529), "+52.9 %"},
		{"less", 5, new(-1.0), "-100.0 %"},
		{"much more", 5, new(45.67), "+4,567.0 %"},
		{"beyond any percentage", 5, new(1e300), "+1.0e+302 %"},
		{"difference from a predicted 0", 0, new(12.0), "+12"},
		{"no difference from a predicted 0", 0, new(0.0), "0"},
	}
	for _, tt := range tests {
		p := Prediction{Predicted: tt.predicted, Error: tt.error}
		assert.Equal(t, tt.want, p.errorText(), tt.why)
	}
}

func TestExplain(t *testing.T) {
	tests := []struct {
		why     string
		formula string
		inputs  map[string]float64
		want    string
	}{
		{"every input is a word of the formula", "max(0, λ·T − (B+1))", map[string]float64{"λ": 2000, "T": 1.43, "B": 511},
			"max(0, λ·T − (B+1)) = max(0, 2000·1.43 − (511+1))"},
		{"only whole words are replaced", "T_stall/T", map[string]float64{"T": 2, "T_stall": 1}, "T_stall/T = 1/2"},
		{"λT is one word: inputs are listed", "λT > B", map[string]float64{"λ": 2000, "T": 1.43, "B": 511},
			"λT > B, with B = 511, T = 1.43, λ = 2000"},
		{"a value is not replaced again", "a+b", map[string]float64{"a": 1, "b": 2}, "a+b = 1+2"},
		{"a negative value is bracketed", "a−b", map[string]float64{"a": 1, "b": -2}, "a−b = 1−(-2)"},
		{"no inputs", "nothing is dropped", nil, "nothing is dropped"},
	}
	for _, tt := range tests {
		p := Prediction{Formula: tt.formula, Inputs: tt.inputs}
		assert.Equal(t, tt.want, p.explain(), tt.why)
	}
}

func TestWrap(t *testing.T) {
	assert.Equal(t, []string{"  one two", "    three"}, wrap("one two three", "  ", 10))
	assert.Equal(t, []string{"  λλλ μμμ"}, wrap("λλλ μμμ", "  ", 9), "columns are characters, not bytes")
	assert.Equal(t, []string{"abcdefgh"}, wrap("abcdefgh", "", 4), "a word is not broken")
	assert.Empty(t, wrap(" ", "  ", 9))
}
