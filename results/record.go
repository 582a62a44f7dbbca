package results

import (
	"fmt"
	"time"

	"golang.org/x/sys/unix"
)

// Schema names the version of the record format. [Read] accepts no other.
const Schema = "connlab.record/1"

// A Record is what one run of one incident predicted and measured.
type Record struct {
	Schema   string `json:"schema"`
	Kernel   string `json:"kernel"` // release as uname(2) gives it
	Incident string `json:"incident"`

	Started time.Time `json:"started,omitzero"` // in UTC
	Seconds float64   `json:"seconds,omitempty"`
	Seed    uint64    `json:"seed,omitempty"`
	Server  string    `json:"server,omitempty"` // "mini", "redis 7.0.15"

	// Parameters are spelled as the command line takes them ("1.43s", "511"),
	// so that they can be typed again.
	Parameters map[string]string `json:"parameters"`
	Variants   []Variant         `json:"variants"`
}

// A Variant is one arm of the experiment.
type Variant struct {
	Name       string            `json:"name"`
	Role       Role              `json:"role"`
	Summary    string            `json:"summary,omitempty"`    // one line for people
	Parameters map[string]string `json:"parameters,omitempty"` // only those that differ from the record's
	// Sysctls are those that bear on the outcome, read back from the namespace
	// under test, and Link is how its link was made: "veth", "netem", "pump".
	Sysctls map[string]string `json:"sysctls,omitempty"`
	Link    string            `json:"link,omitempty"`

	Verdict Verdict `json:"verdict"`
	Reason  string  `json:"reason"`
	// Voids are the conditions that make the run worthless; see [Variant.Void].
	Voids []string `json:"voids,omitempty"`

	Predictions []Prediction      `json:"predictions"`
	Metrics     map[string]Metric `json:"metrics"` // by flat name, "server/TcpExt.ListenOverflows"
	Warnings    []string          `json:"warnings"`
	// Evidence is what was seen that is no number, a line each: the kernel's stack
	// at a reset, how many it stands for.
	Evidence []string `json:"evidence,omitempty"`
	Series   []Series `json:"series,omitempty"`
}

// A Prediction is one number that was fixed by a formula before the run.
// [Variant.Judge] fills the last three fields.
type Prediction struct {
	Metric    string             `json:"metric"`
	Formula   string             `json:"formula"`        // "max(0, λ·T − (B+1))"
	Inputs    map[string]float64 `json:"inputs"`         // by the names the formula uses
	Note      string             `json:"note,omitempty"` // what the formula says, for people
	Predicted float64            `json:"predicted"`
	Unit      string             `json:"unit"` // must be the metric's; empty takes the metric's

	Measured *float64 `json:"measured"` // nil if not measured
	// Error is (measured−predicted)/predicted as a fraction, or, where the
	// predicted value is 0, measured−predicted in the prediction's unit. It is
	// nil if nothing was measured.
	Error     *float64  `json:"error"`
	Tolerance Tolerance `json:"tolerance"`
	Verdict   Verdict   `json:"verdict"`
}

// A Metric is one measured number. Values are in base units: "s", "B", or the
// name of what is counted ("SYNs").
type Metric struct {
	Value float64 `json:"value"`
	Unit  string  `json:"unit"`
}

// A Role says what a variant is there to show.
type Role string

// The roles of a variant.
const (
	Incident  Role = "incident"   // reproduces the symptom
	FalseLead Role = "false-lead" // a remedy that people tried: the symptom stays
	Fix       Role = "fix"        // the symptom goes away
	Control   Role = "control"    // nothing is wrong, and nothing must be found
)

// A Verdict is the outcome of a prediction, a variant or a whole record.
type Verdict string

// The verdicts, from best to worst.
const (
	Held    Verdict = "held"    // measured as predicted
	Skipped Verdict = "skipped" // not run: the kernel or the privilege lacks something
	Void    Verdict = "void"    // run, but it says nothing
	Refuted Verdict = "refuted" // measured otherwise than predicted
)

// verdicts lists every verdict from best to worst.
var verdicts = []Verdict{Held, Skipped, Void, Refuted}

// New returns an empty record of the running kernel, started now.
func New(incident string) (*Record, error) {
	var uts unix.Utsname
	if err := unix.Uname(&uts); err != nil {
		return nil, fmt.Errorf("reading the kernel release: %w", err)
	}
	return &Record{
		Schema:   Schema,
		Kernel:   unix.ByteSliceToString(uts.Release[:]),
		Incident: incident,
		Started:  time.Now().UTC().Truncate(time.Second),
	}, nil
}
