package observe

import (
	"encoding/csv"
	"encoding/json"
	"io"
	"strconv"
	"time"
)

// WriteCSV writes the timeline as lines of seconds, host, metric, value in the
// order group, host, metric, time. Of each series there is the first sample
// and every one that differs from the one before: a value holds until the next
// line of the same host and metric. Events come first, with no host, the metric
// "mark" and the name as value.
func (t *Timeline) WriteCSV(w io.Writer) error {
	out := csv.NewWriter(w)
	// The writer keeps its first error for Error, at the end.
	_ = out.Write([]string{"seconds", "host", "metric", "value"})
	for _, m := range t.marks {
		_ = out.Write([]string{seconds(m.At), "", "mark", m.Name})
	}
	for _, g := range t.groups {
		for _, host := range g.hosts() {
			tr := g.tracks[host]
			for id, changes := range tr.series {
				for _, c := range changes {
					_ = out.Write([]string{seconds(tr.at[c.round]), host, g.names[id], strconv.FormatInt(c.value, 10)})
				}
			}
		}
	}
	out.Flush()
	return out.Error()
}

func seconds(d time.Duration) string { return strconv.FormatFloat(d.Seconds(), 'f', 6, 64) }

// jsonTimeline is the JSON form of a Timeline.
type jsonTimeline struct {
	Start     time.Time      `json:"start"`
	Seconds   float64        `json:"seconds"`
	Marks     []jsonMark     `json:"marks"`
	Samplings []jsonSampling `json:"samplings"`
	Series    []jsonSeries   `json:"series"`
}

type jsonMark struct {
	Seconds float64 `json:"seconds"`
	Name    string  `json:"name"`
}

type jsonSampling struct {
	What       string  `json:"what"`
	Interval   float64 `json:"interval_seconds"`
	Rounds     int     `json:"rounds"`
	Missed     int     `json:"missed"`
	LongestGap float64 `json:"longest_gap_seconds"`
	Busy       float64 `json:"busy_seconds"`
}

// jsonSeries has its values as two columns of equal length.
type jsonSeries struct {
	Host    string    `json:"host"`
	Metric  string    `json:"metric"`
	Seconds []float64 `json:"seconds"`
	Values  []int64   `json:"values"`
}

// MarshalJSON writes the same as [Timeline.WriteCSV], with the wall-clock start
// and how the samples were taken.
func (t *Timeline) MarshalJSON() ([]byte, error) {
	doc := jsonTimeline{
		Start: t.start, Seconds: t.duration.Seconds(),
		Marks: []jsonMark{}, Samplings: []jsonSampling{}, Series: []jsonSeries{},
	}
	for _, m := range t.marks {
		doc.Marks = append(doc.Marks, jsonMark{m.At.Seconds(), m.Name})
	}
	for _, g := range t.groups {
		s := g.sampling
		doc.Samplings = append(doc.Samplings, jsonSampling{
			What: s.What, Interval: s.Interval.Seconds(), Rounds: s.Rounds, Missed: s.Missed,
			LongestGap: s.LongestGap.Seconds(), Busy: s.Busy.Seconds(),
		})
		for _, host := range g.hosts() {
			tr := g.tracks[host]
			for id, changes := range tr.series {
				js := jsonSeries{Host: host, Metric: g.names[id]}
				for _, c := range changes {
					js.Seconds = append(js.Seconds, tr.at[c.round].Seconds())
					js.Values = append(js.Values, c.value)
				}
				doc.Series = append(doc.Series, js)
			}
		}
	}
	return json.Marshal(doc)
}
