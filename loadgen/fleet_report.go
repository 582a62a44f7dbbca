package loadgen

import (
	"encoding/json"
	"errors"
	"fmt"
	"time"
)

// FleetStep is the length of one element of the series in a [FleetReport].
const FleetStep = 100 * time.Millisecond

// maxFleetSteps ends the series: what comes later counts in its last element.
const maxFleetSteps = int(time.Hour / FleetStep)

// FleetReport is the account of what a [Fleet] was last told to do. Those of
// fleets that worked side by side, in one process or in several, add up by
// [FleetReport.Merge]; a report survives being sent as JSON.
type FleetReport struct {
	// Start is the wall-clock time from which Recover and the series count: the
	// moment of a storm, otherwise that of the call. End is when it had ended.
	Start time.Time `json:"start"`
	End   time.Time `json:"end"`
	// LastOK is when the last attempt ended ok: zero if none did.
	LastOK time.Time `json:"last_ok"`

	// Clients is how many there are, and Open how many of them had a
	// connection at End.
	Clients int64 `json:"clients"`
	Open    int64 `json:"open"`
	// Cut counts the connections that ended while nothing was asked: EOF where
	// the server closed, ReadReset where it reset, BadReply where it sent
	// something unasked. A client that is cut twice counts twice.
	Cut Counts `json:"cut"`

	// Attempts is how many a client began: to connect and have a PING
	// answered, or with Ping to have it answered on the connection there is.
	// Attempts = OK + the sum of Failed.
	Attempts int64 `json:"attempts"`
	OK       int64 `json:"ok"`
	// Failed counts failures by class, and Causes says what is behind Other and
	// ServerError, as in [Report].
	Failed Counts           `json:"failed"`
	Causes map[string]int64 `json:"causes"`
	// FirstVictims is how many first attempts, of those after a cut or of a
	// fill, had their SYN go unanswered so that it was sent again after a
	// second: by the kernel's own count (TCP_INFO, tcpi_total_retrans), which a
	// pause of this program does not disturb. One that gave up before that
	// second is not among them.
	FirstVictims int64 `json:"first_victims"`

	// Connect is the time from connect(2) to an open connection, for all
	// attempts that came so far, also where they failed later; Reply that from
	// the request to its reply.
	Connect *Histogram `json:"connect"`
	Reply   *Histogram `json:"reply"`
	// Recover is how long clients were without service: from the moment of the
	// storm, or where that was later from their own cut, to the reply of the
	// first attempt that was ok; in a fill from its start. A client that has not
	// got there is not in it.
	Recover *Histogram `json:"recover"`
	// Lateness is how much later than due reconnects began: how well the
	// generator kept its schedule. A fill has no schedule and records none.
	Lateness *Histogram `json:"lateness"`

	// StartedPer100ms and OKPer100ms count the attempts that began and those
	// that ended ok in each [FleetStep] since Start.
	StartedPer100ms []int64 `json:"started_per_100ms"`
	OKPer100ms      []int64 `json:"ok_per_100ms"`
}

// NewFleetReport makes an empty report, to merge others into.
func NewFleetReport() *FleetReport {
	return &FleetReport{
		Cut: Counts{}, Failed: Counts{}, Causes: map[string]int64{},
		Connect: NewHistogram(), Reply: NewHistogram(), Recover: NewHistogram(), Lateness: NewHistogram(),
		StartedPer100ms: []int64{}, OKPer100ms: []int64{},
	}
}

// Took is the time from Start to End.
func (r *FleetReport) Took() time.Duration { return r.End.Sub(r.Start) }

// LastOKAfter is the time from Start to LastOK, or 0 if nothing was ok.
func (r *FleetReport) LastOKAfter() time.Duration {
	if r.LastOK.IsZero() {
		return 0
	}
	return r.LastOK.Sub(r.Start)
}

// Merge adds other to r. The order in which reports are merged does not matter;
// an empty report changes nothing. The series are added step by step, so they
// should have one Start, as those of a storm do.
func (r *FleetReport) Merge(other *FleetReport) {
	if r.Start.IsZero() || !other.Start.IsZero() && other.Start.Before(r.Start) {
		r.Start = other.Start
	}
	if other.End.After(r.End) {
		r.End = other.End
	}
	if other.LastOK.After(r.LastOK) {
		r.LastOK = other.LastOK
	}
	r.Clients += other.Clients
	r.Open += other.Open
	r.Attempts += other.Attempts
	r.OK += other.OK
	r.FirstVictims += other.FirstVictims
	for class, n := range other.Cut {
		r.Cut[class] += n
	}
	for class, n := range other.Failed {
		r.Failed[class] += n
	}
	for cause, n := range other.Causes {
		r.Causes[cause] += n
	}
	r.Connect.Merge(other.Connect)
	r.Reply.Merge(other.Reply)
	r.Recover.Merge(other.Recover)
	r.Lateness.Merge(other.Lateness)
	for step, n := range other.StartedPer100ms {
		addStep(&r.StartedPer100ms, step, n)
	}
	for step, n := range other.OKPer100ms {
		addStep(&r.OKPer100ms, step, n)
	}
}

// addStep adds n to one element of a series, which grows as far as needed.
func addStep(series *[]int64, step int, n int64) {
	step = min(max(step, 0), maxFleetSteps-1)
	for len(*series) <= step {
		*series = append(*series, 0)
	}
	(*series)[step] += n
}

// Balanced returns an error unless every attempt stands in exactly one column.
func (r *FleetReport) Balanced() error {
	if failed := r.Failed.Sum(); r.Attempts != r.OK+failed {
		return fmt.Errorf("the account does not balance: %d attempts, %d ok, %d failed (%s)", r.Attempts, r.OK, failed, r.Failed)
	}
	return nil
}

// UnmarshalJSON reads a report that was written as JSON. It refuses one that is
// incomplete or does not balance.
func (r *FleetReport) UnmarshalJSON(b []byte) error {
	type plain FleetReport
	read := plain(*NewFleetReport())
	if err := json.Unmarshal(b, &read); err != nil {
		return fmt.Errorf("decoding fleet report: %w", err)
	}
	if read.Cut == nil || read.Failed == nil || read.Causes == nil ||
		read.Connect == nil || read.Reply == nil || read.Recover == nil || read.Lateness == nil {
		return errors.New("decoding fleet report: a field is null")
	}
	*r = FleetReport(read)
	if err := r.Balanced(); err != nil {
		return fmt.Errorf("decoding fleet report: %w", err)
	}
	return nil
}
