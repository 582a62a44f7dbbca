package results

import "strings"

// MaxPoints is the most points that a series in a record may have.
const MaxPoints = 200

// A Series is one value over time, kept small enough for a record.
type Series struct {
	Name   string  `json:"name"`
	Unit   string  `json:"unit"`
	Points []Point `json:"points"` // by rising time
}

// A Point is one sample.
type Point struct {
	T float64 `json:"t"` // seconds since the start of the variant
	V float64 `json:"v"`
}

// NewSeries makes a series of points, which must be ordered by time. More than
// [MaxPoints] are thinned: the time is cut into MaxPoints equal buckets and of
// each the highest point is kept, so that a peak survives and a short dip may
// not. Points that are not finite are left out.
func NewSeries(name, unit string, points []Point) Series {
	s := Series{Name: name, Unit: unit}
	for _, p := range points {
		if isFinite(p.T) && isFinite(p.V) {
			s.Points = append(s.Points, p)
		}
	}
	if len(s.Points) <= MaxPoints {
		return s
	}
	var kept []Point
	for _, highest := range highestPerBucket(s.Points, MaxPoints) {
		if highest != nil {
			kept = append(kept, *highest)
		}
	}
	s.Points = kept
	return s
}

// highestPerBucket cuts the time that points span into n equal buckets and gives
// the highest point of each, nil for a bucket without any.
func highestPerBucket(points []Point, n int) []*Point {
	buckets := make([]*Point, n)
	if len(points) == 0 {
		return buckets
	}
	start := points[0].T
	span := points[len(points)-1].T - start
	for i := range points {
		p := &points[i]
		bucket := 0
		if span > 0 {
			// The last point stands on the upper bound of the last bucket; the
			// lower bound is for points out of order.
			bucket = min(max(int((p.T-start)/span*float64(n)), 0), n-1)
		}
		if buckets[bucket] == nil || p.V > buckets[bucket].V {
			buckets[bucket] = p
		}
	}
	return buckets
}

// sparkline draws points as one line of at most width characters, the lowest bar
// at lowest or below, the highest at highest. Time without samples is blank.
func sparkline(points []Point, width int, lowest, highest float64) string {
	bars := []rune("▁▂▃▄▅▆▇█")
	var b strings.Builder
	for _, p := range highestPerBucket(points, min(width, len(points))) {
		if p == nil {
			b.WriteByte(' ')
			continue
		}
		level := 0.0
		if highest > lowest {
			level = (p.V - lowest) / (highest - lowest)
		}
		b.WriteRune(bars[int(min(max(level, 0), 1)*float64(len(bars)-1))])
	}
	return b.String()
}
