package loadgen

import (
	"encoding/json"
	"errors"
	"fmt"
	"time"
)

// Report is the account of a run. Reports of runs that went side by side, in
// one process or in several, add up by [Report.Merge]; a report survives being
// sent as JSON.
type Report struct {
	// Start and End are wall-clock times: due offsets count from Start, and
	// at End the last operation had ended.
	Start time.Time `json:"start"`
	End   time.Time `json:"end"`

	// Due is the number of operations that came due before the run ended.
	// Due = Started + NotStarted, and Started = OK + the sum of Failed.
	Due        int64 `json:"due"`
	Started    int64 `json:"started"`
	OK         int64 `json:"ok"`
	NotStarted int64 `json:"not_started"`
	// Failed counts failures by class.
	Failed Counts `json:"failed"`
	// Causes says what stands behind the two classes that do not: for [Other]
	// phase and error, "connect: no buffer space available"; for
	// [ServerError] the first word of the reply, "reply: LOADING".
	Causes map[string]int64 `json:"causes"`

	// Connect is the time from connect(2) to an open connection, for all
	// operations that came so far, also where they failed later.
	Connect *Histogram `json:"connect"`
	// Latency is the time from due to done, for the operations that are ok.
	// What failed is in Failed only: read the two together.
	Latency *Histogram `json:"latency"`
	// Lateness is the time from due to started, for all that were started:
	// how well the generator kept its schedule.
	Lateness *Histogram `json:"lateness"`
}

// NewReport makes an empty report, to merge others into.
func NewReport() *Report {
	return &Report{
		Failed: Counts{}, Causes: map[string]int64{},
		Connect: NewHistogram(), Latency: NewHistogram(), Lateness: NewHistogram(),
	}
}

// UnmarshalJSON reads a report that was written as JSON. It refuses one that is
// incomplete or does not balance.
func (r *Report) UnmarshalJSON(b []byte) error {
	type plain Report
	read := plain(*NewReport())
	if err := json.Unmarshal(b, &read); err != nil {
		return fmt.Errorf("decoding report: %w", err)
	}
	if read.Failed == nil || read.Causes == nil || read.Connect == nil || read.Latency == nil || read.Lateness == nil {
		return errors.New("decoding report: a field is null")
	}
	*r = Report(read)
	if err := r.Balanced(); err != nil {
		return fmt.Errorf("decoding report: %w", err)
	}
	return nil
}

// Merge adds other to r. The order in which reports are merged does not
// matter; an empty report changes nothing.
func (r *Report) Merge(other *Report) {
	if r.Start.IsZero() || !other.Start.IsZero() && other.Start.Before(r.Start) {
		r.Start = other.Start
	}
	if other.End.After(r.End) {
		r.End = other.End
	}
	r.Due += other.Due
	r.Started += other.Started
	r.OK += other.OK
	r.NotStarted += other.NotStarted
	for class, n := range other.Failed {
		r.Failed[class] += n
	}
	for cause, n := range other.Causes {
		r.Causes[cause] += n
	}
	r.Connect.Merge(other.Connect)
	r.Latency.Merge(other.Latency)
	r.Lateness.Merge(other.Lateness)
}

// Balanced returns an error unless every due operation stands in exactly one
// column.
func (r *Report) Balanced() error {
	if failed := r.Failed.Sum(); r.Due != r.OK+failed+r.NotStarted || r.Started != r.OK+failed {
		return fmt.Errorf("the account does not balance: %d due, %d started, %d ok, %d failed (%s), %d not started",
			r.Due, r.Started, r.OK, failed, r.Failed, r.NotStarted)
	}
	return nil
}

// Behind returns an error if the generator did not keep its schedule: some
// operations were not started, the 99th percentile of lateness is above limit, or
// one operation was ten times as late: a pause of the generator, too short for the
// percentile, makes a burst of what was due meanwhile. The arrivals were then not
// those that were asked for, and the run says nothing about the server.
func (r *Report) Behind(limit time.Duration) error {
	if r.NotStarted > 0 {
		return fmt.Errorf("the generator left out %d of %d operations", r.NotStarted, r.Due)
	}
	if p99 := r.Lateness.Quantile(0.99); p99 > limit {
		return fmt.Errorf("the generator fell behind: 1 %% of operations started more than %v late, the limit is %v", p99, limit)
	}
	if most := r.Lateness.Quantile(1); most > 10*limit {
		return fmt.Errorf("the generator paused: an operation started %v late, the limit is %v", most, 10*limit)
	}
	return nil
}
