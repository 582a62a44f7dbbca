package observe

import (
	"encoding/csv"
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
