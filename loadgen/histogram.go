package loadgen

import (
	"encoding/json"
	"errors"
	"fmt"
	"math"
	"time"

	"github.com/HdrHistogram/hdrhistogram-go"
)

// Values are kept in nanoseconds to three significant digits; longer ones than
// an hour count as an hour.
const (
	longest           = time.Hour
	significantDigits = 3
)

// Histogram is a distribution of durations, exact to one part in a thousand up
// to one hour. It is for one goroutine at a time.
type Histogram struct {
	hdr *hdrhistogram.Histogram
}

// NewHistogram makes an empty histogram.
func NewHistogram() *Histogram {
	return &Histogram{hdrhistogram.New(1, int64(longest), significantDigits)}
}

// Record adds one duration.
func (h *Histogram) Record(d time.Duration) {
	// Inside the range the only error is a total beyond 2^63.
	_ = h.hdr.RecordValue(int64(min(max(d, 0), longest)))
}

// Count is the number of durations recorded.
func (h *Histogram) Count() int64 { return h.hdr.TotalCount() }

// Quantile is the duration that the fraction q (0 to 1) of all recorded ones
// does not exceed, or 0 if there is none. Quantile(1) is the longest.
func (h *Histogram) Quantile(q float64) time.Duration {
	return time.Duration(h.hdr.ValueAtQuantile(q * 100))
}

// Mean is the arithmetic mean, or 0 if nothing was recorded.
func (h *Histogram) Mean() time.Duration { return time.Duration(math.Round(h.hdr.Mean())) }

// CountBetween is the number of durations d with from <= d < to, where a
// duration stands at the lower end of its bucket.
func (h *Histogram) CountBetween(from, to time.Duration) int64 {
	var n int64
	for _, bar := range h.hdr.Distribution() {
		if low := time.Duration(bar.From); from <= low && low < to {
			n += bar.Count
		}
	}
	return n
}

// Merge adds all durations of other to h.
func (h *Histogram) Merge(other *Histogram) { h.hdr.Merge(other.hdr) }

// Equal says whether both hold the same counts.
func (h *Histogram) Equal(other *Histogram) bool { return h.hdr.Equals(other.hdr) }

// histogramJSON has durations in seconds. The quantiles are for readers; HDR
// carries the counts (HdrHistogram V2 compressed, base64), so that reports can
// be merged after they were sent as JSON.
type histogramJSON struct {
	Count int64   `json:"count"`
	Mean  float64 `json:"mean"`
	P50   float64 `json:"p50"`
	P90   float64 `json:"p90"`
	P99   float64 `json:"p99"`
	P999  float64 `json:"p99.9"`
	Max   float64 `json:"max"`
	HDR   string  `json:"hdr"`
}

// MarshalJSON writes count, mean, quantiles in seconds, and the whole
// histogram.
func (h *Histogram) MarshalJSON() ([]byte, error) {
	hdr, err := h.hdr.Encode(hdrhistogram.V2CompressedEncodingCookieBase)
	if err != nil {
		return nil, fmt.Errorf("encoding histogram: %w", err)
	}
	return json.Marshal(histogramJSON{
		Count: h.Count(), Mean: h.Mean().Seconds(),
		P50: h.Quantile(0.5).Seconds(), P90: h.Quantile(0.9).Seconds(), P99: h.Quantile(0.99).Seconds(),
		P999: h.Quantile(0.999).Seconds(), Max: h.Quantile(1).Seconds(),
		HDR: string(hdr),
	})
}

// UnmarshalJSON reads what MarshalJSON wrote. Only the histogram itself is
// read; the quantiles follow from it.
func (h *Histogram) UnmarshalJSON(b []byte) error {
	var j histogramJSON
	if err := json.Unmarshal(b, &j); err != nil {
		return fmt.Errorf("decoding histogram: %w", err)
	}
	hdr, err := hdrhistogram.Decode([]byte(j.HDR))
	if err != nil {
		return fmt.Errorf("decoding histogram: %w", err)
	}
	if hdr.LowestTrackableValue() != 1 || hdr.HighestTrackableValue() != int64(longest) || hdr.SignificantFigures() != significantDigits {
		return errors.New("decoding histogram: not one of this program's: other range or precision")
	}
	h.hdr = hdr
	return nil
}
