package results

import (
	"testing"
	"unicode/utf8"

	"github.com/stretchr/testify/assert"
	"github.com/stretchr/testify/require"
)

func TestNewSeriesKeepsThePeak(t *testing.T) {
	var points []Point
	for i := range 10_000 {
		points = append(points, Point{T: float64(i) / 1000, V: 1})
	}
	points[7777].V = 512
	s := NewSeries("depth", "connections", points)
	assert.Len(t, s.Points, MaxPoints)
	assert.Contains(t, s.Points, Point{7.777, 512})
	for i := range s.Points[1:] {
		require.Less(t, s.Points[i].T, s.Points[i+1].T, "point %d", i)
	}
}

func TestNewSeriesLeavesFewPointsAlone(t *testing.T) {
	assert.Equal(t, []Point{{0, 3}, {0, 4}}, NewSeries("n", "", []Point{{0, 3}, {nan, 1}, {0, 4}, {1, inf}}).Points)
	assert.Empty(t, NewSeries("n", "", nil).Points)
}

func TestNewSeriesAtOneInstant(t *testing.T) {
	points := make([]Point, 1000)
	points[400].V = 9
	assert.Equal(t, []Point{{0, 9}}, NewSeries("n", "", points).Points, "no time passes: one bucket")
}

func TestSparkline(t *testing.T) {
	tests := []struct {
		why    string
		points []Point
		width  int
		want   string
	}{
		{"from lowest to highest", []Point{{0, 0}, {1, 4}, {2, 7}}, 10, "▁▅█"},
		{"a flat line is low", []Point{{0, 5}, {1, 5}}, 10, "▁▁"},
		{"a gap in time shows", []Point{{0, 0}, {1, 7}, {10, 7}, {11, 0}}, 10, "█  █"},
		{"the highest of a bucket", []Point{{0, 0}, {1, 7}, {2, 0}, {3, 1}}, 2, "█▂"},
		{"nothing", nil, 10, ""},
	}
	for _, tt := range tests {
		lowest, highest := inf, -inf
		for _, p := range tt.points {
			lowest, highest = min(lowest, p.V), max(highest, p.V)
		}
		assert.Equal(t, tt.want, sparkline(tt.points, tt.width, lowest, highest), tt.why)
	}
	many := make([]Point, 150)
	for i := range many {
		many[i] = Point{float64(i), float64(i)}
	}
	assert.Equal(t, 106, utf8.RuneCountInString(sparkline(many, 106, 0, 149)))
}
