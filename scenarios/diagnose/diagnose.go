package diagnose

import (
	"fmt"
	"slices"
	"strconv"
	"strings"
)

// Verdict is how well an incident fits.
type Verdict string

// The verdicts about an incident.
const (
	Fits     Verdict = "fits"     // each necessary observation was made
	Excluded Verdict = "excluded" // a necessary observation was not made
	Possible Verdict = "possible" // a necessary observation cannot be told, and none is contradicted
)

// NotEnough is the overall verdict if the counters do not single out one incident.
const NotEnough = "not enough evidence"

// Observation is one thing that the counters say about an incident.
type Observation struct {
	Counter string `json:"counter"` // names, separated by ", "
	Value   string `json:"value"`   // "ListenOverflows 2694"; "?" for what is missing
	Rule    string `json:"rule"`    // the condition in numbers
	Says    string `json:"says"`    // in words
	Source  string `json:"source"`  // what counts it, in the kernel
	// Necessary says that the incident does not fit without it.
	Necessary bool `json:"necessary"`
}

// Finding is what the counters say about one incident.
type Finding struct {
	Incident Incident      `json:"incident"`
	Verdict  Verdict       `json:"verdict"`
	For      []Observation `json:"for"`
	Against  []Observation `json:"against"`
	// Open are necessary observations that cannot be told from the input.
	Open []Observation `json:"open"`
}

// Diagnosis is what the counters of one host say.
type Diagnosis struct {
	// Verdict is the incident that fits, Healthy, or [NotEnough].
	Verdict string `json:"verdict"`
	// Decide is what would decide between those that are left, or, if one
	// incident fits, what to look at next.
	Decide string `json:"decide"`
	// SinceBoot says that counters are totals since boot, or since the namespace
	// was made: the incident may be long over.
	SinceBoot bool      `json:"since_boot"`
	Findings  []Finding `json:"findings"`
}

// Diagnose compares a snapshot with the signature of each incident. If before is
// not nil, counters are compared by how much they grew since. It fails if a
// counter went backwards.
func Diagnose(now Snapshot, before *Snapshot) (Diagnosis, error) {
	f := facts{now: now, before: before}
	if err := f.check(); err != nil {
		return Diagnosis{}, err
	}
	d := Diagnosis{SinceBoot: before == nil}
	for _, s := range signatures() {
		d.Findings = append(d.Findings, s.find(f))
	}
	d.Verdict, d.Decide = d.conclude(f)
	return d, nil
}

// find judges one incident.
func (s signature) find(f facts) Finding {
	found := Finding{Incident: s.incident, Verdict: Fits, For: []Observation{}, Against: []Observation{}, Open: []Observation{}}
	for _, c := range s.conditions {
		t := c.test(f)
		switch {
		case c.weight == supports && t == yes:
			found.For = append(found.For, c.observe(f, c.yes))
		case c.weight == weakens && t == yes:
			found.Against = append(found.Against, c.observe(f, c.yes))
		case c.weight != necessary:
		case t == yes:
			found.For = append(found.For, c.observe(f, c.yes))
		case t == no:
			found.Against = append(found.Against, c.observe(f, c.no))
			found.Verdict = Excluded
		default:
			found.Open = append(found.Open, c.observe(f, c.open(f)))
			if found.Verdict == Fits {
				found.Verdict = Possible
			}
		}
	}
	return found
}

func (c condition) observe(f facts, says string) Observation {
	values := make([]string, len(c.reads))
	for i, name := range c.reads {
		values[i] = f.show(name)
	}
	return Observation{
		Counter: strings.Join(c.reads, ", "), Value: strings.Join(values, ", "),
		Rule: c.rule, Says: says, Source: c.source, Necessary: c.weight == necessary,
	}
}

// open says why a condition cannot be told.
func (c condition) open(f facts) string {
	for _, name := range c.reads {
		if name != listening && !f.get(name).known {
			return "not in the input"
		}
	}
	return "neither clearly so nor clearly not"
}

// show writes a reading: "ListenOverflows 2694", "tw 84", "ports 28232".
func (f facts) show(name string) string {
	if name == listening {
		l, known := f.fullest()
		if !known {
			return listening + " ?"
		}
		return fmt.Sprintf("%s: %d in a queue of %d+1", l.Addr, l.Queue, l.Limit)
	}
	short := name[strings.LastIndexByte(name, '.')+1:]
	if name == portRange {
		short = "ports"
	}
	n := f.get(name)
	if !n.known {
		return short + " ?"
	}
	return short + " " + strconv.FormatFloat(n.value, 'f', 0, 64)
}

// conclude gives the overall verdict and what would decide.
func (d *Diagnosis) conclude(f facts) (verdict, decide string) {
	var fits, possible []signature
	for i, s := range signatures() {
		switch {
		case s.incident == Healthy:
			if len(fits) == 0 && len(possible) == 0 && d.Findings[i].Verdict == Fits {
				return string(Healthy), s.confirm
			}
		case d.Findings[i].Verdict == Fits:
			fits = append(fits, s)
		case d.Findings[i].Verdict == Possible:
			possible = append(possible, s)
		}
	}
	switch {
	case len(fits) == 1:
		return string(fits[0].incident), fits[0].confirm
	case len(fits) > 1:
		return NotEnough, askWhich
	case !f.get("TcpExt.ListenOverflows").known:
		return NotEnough, askEverything
	case len(possible) > 0:
		return NotEnough, possible[0].ask
	}
	healthy := d.Findings[len(d.Findings)-1]
	if healthy.Verdict == Possible {
		return NotEnough, askPorts
	}
	says := []string{}
	for _, o := range healthy.Against {
		if o.Necessary {
			says = append(says, o.Value)
		}
	}
	return NotEnough, "no incident fits, but " + strings.Join(slices.Compact(says), ", ") + "; " + askWhich
}

// Left returns the incidents that fit or are possible, without Healthy.
func (d Diagnosis) Left() []Incident {
	left := []Incident{}
	for _, found := range d.Findings {
		if found.Verdict != Excluded && found.Incident != Healthy {
			left = append(left, found.Incident)
		}
	}
	return left
}
