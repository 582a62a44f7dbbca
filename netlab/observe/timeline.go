package observe

import (
	"fmt"
	"maps"
	"slices"
	"sort"
	"time"
)

// Timeline is what one run showed: for every host and metric the values over
// time, and the events that were marked. Times are offsets from [Timeline.Start]
// by the monotonic clock. It is complete when [Observer.Stop] returns it and does
// not change any more.
//
// Metrics are the names of [Counters], and beside them:
//
//   - Listen.Depth, Listen.Limit: connections in the accept queue and its limit
//     (it holds limit+1); Listen.Drops: what the listener dropped since it was
//     made; Listen.Sockets: how many sockets listen on the port. With several
//     the figures are their sums; with none they are 0.
//   - State.ESTABLISHED and so on: sockets of the host in each [State].
//     ESTABLISHED and TIME_WAIT come from the kernel's own gauges, read just
//     after the other states: while connections open and close, the figures of
//     one sample may disagree by the few that moved in between.
//
// Most accessors take one or more hosts and add them up. A host or metric that
// was not measured is an error.
type Timeline struct {
	start    time.Time
	duration time.Duration
	marks    []Mark
	groups   []*group
}

// Mark is an event of the run.
type Mark struct {
	At   time.Duration
	Name string
}

// Point is a value at a time.
type Point struct {
	At    time.Duration
	Value int64
}

// Sampling says how one kind of sample was taken over the run.
type Sampling struct {
	// What is "counters", "listeners" or "states".
	What string
	// Interval is the time between two samples that was asked for.
	Interval time.Duration
	// Rounds is how often every host was sampled, the first and the last round
	// included; Missed is how many more rounds the interval asked for.
	Rounds, Missed int
	// LongestGap is the longest time between the beginnings of two rounds.
	LongestGap time.Duration
	// Busy is the time that sampling took.
	Busy time.Duration
}

// group is the data of one sampler.
type group struct {
	sampling Sampling
	names    []string // by id
	ids      map[string]int
	tracks   map[string]*track // by host
}

// track is one host's share of a group. A counter seldom changes from one
// sample to the next, so that a series keeps its changes only.
type track struct {
	at     []time.Duration // by round
	series [][]change      // by id
}

// change says that a series has this value from this round on.
type change struct {
	round int
	value int64
}

// record adds a round.
func (t *track) record(at time.Duration, values []int64) {
	round := len(t.at)
	t.at = append(t.at, at)
	for id, v := range values {
		if id == len(t.series) {
			t.series = append(t.series, nil)
			if round > 0 {
				t.series[id] = append(t.series[id], change{}) // not printed before: 0
			}
		}
		s := t.series[id]
		if len(s) == 0 || s[len(s)-1].value != v {
			t.series[id] = append(s, change{round, v})
		}
	}
}

// value returns the value of a series in a round.
func (t *track) value(id, round int) int64 {
	if id >= len(t.series) {
		return 0 // printed on other hosts only, so far
	}
	s := t.series[id]
	i := sort.Search(len(s), func(i int) bool { return s[i].round > round })
	if i == 0 {
		return 0
	}
	return s[i-1].value
}

// Start returns the wall-clock time of offset 0.
func (t *Timeline) Start() time.Time { return t.start }

// Duration returns the offset at which observing ended.
func (t *Timeline) Duration() time.Duration { return t.duration }

// Marks returns the events in order of time.
func (t *Timeline) Marks() []Mark { return t.marks }

// MarkAt returns when the event of that name was first marked.
func (t *Timeline) MarkAt(name string) (time.Duration, error) {
	for _, m := range t.marks {
		if m.Name == name {
			return m.At, nil
		}
	}
	return 0, fmt.Errorf("timeline: no event %q was marked", name)
}

// Samplings returns how the samples were taken. A run with missed samples may
// have missed a peak of a gauge; differences of counters stay exact.
func (t *Timeline) Samplings() []Sampling {
	all := make([]Sampling, len(t.groups))
	for i, g := range t.groups {
		all[i] = g.sampling
	}
	return all
}

// selection is one metric of some hosts. Hosts of one group are sampled round
// by round, so that a sum adds what belongs to one round.
type selection struct {
	id     int
	rounds int
	tracks []*track
}

func (t *Timeline) find(metric string, hosts []string) (selection, error) {
	if len(hosts) == 0 {
		return selection{}, fmt.Errorf("timeline: %s of no host", metric)
	}
	for _, g := range t.groups {
		id, known := g.ids[metric]
		if !known {
			continue
		}
		sel := selection{id: id, rounds: g.sampling.Rounds}
		for _, h := range hosts {
			tr := g.tracks[h]
			if tr == nil {
				return selection{}, fmt.Errorf("timeline: %s was not measured on host %s", metric, h)
			}
			sel.tracks = append(sel.tracks, tr)
		}
		return sel, nil
	}
	return selection{}, fmt.Errorf("timeline: no metric %q was measured", metric)
}

// point is the sum in a round, at the time when its last host was read.
func (s selection) point(round int) Point {
	var p Point
	for _, tr := range s.tracks {
		p.At = max(p.At, tr.at[round])
		p.Value += tr.value(s.id, round)
	}
	return p
}

// Delta returns the last value minus the first: what was counted from before
// [Start] returned until [Observer.Stop].
func (t *Timeline) Delta(metric string, hosts ...string) (int64, error) {
	sel, err := t.find(metric, hosts)
	if err != nil {
		return 0, err
	}
	return sel.point(sel.rounds-1).Value - sel.point(0).Value, nil
}

// Deltas returns the delta of every metric that was measured on each of the
// hosts.
func (t *Timeline) Deltas(hosts ...string) (Counters, error) {
	deltas := Counters{}
	for _, g := range t.groups {
		if slices.ContainsFunc(hosts, func(h string) bool { return g.tracks[h] == nil }) {
			continue
		}
		for _, name := range g.names {
			d, err := t.Delta(name, hosts...)
			if err != nil {
				return nil, err
			}
			deltas[name] = d
		}
	}
	if len(deltas) == 0 {
		return nil, fmt.Errorf("timeline: nothing was measured on all of the hosts %v", hosts)
	}
	return deltas, nil
}

// At returns the value of the last sample at or before offset.
func (t *Timeline) At(offset time.Duration, metric string, hosts ...string) (int64, error) {
	sel, err := t.find(metric, hosts)
	if err != nil {
		return 0, err
	}
	after := sort.Search(sel.rounds, func(round int) bool { return sel.point(round).At > offset })
	if after == 0 {
		return 0, fmt.Errorf("timeline: no sample of %s as early as %v", metric, offset)
	}
	return sel.point(after - 1).Value, nil
}

// Series returns every sample.
func (t *Timeline) Series(metric string, hosts ...string) ([]Point, error) {
	sel, err := t.find(metric, hosts)
	if err != nil {
		return nil, err
	}
	points := make([]Point, sel.rounds)
	for round := range points {
		points[round] = sel.point(round)
	}
	return points, nil
}

// Peak returns the sample with the largest value, the first of them if there
// are several. What happens between two samples it cannot see.
func (t *Timeline) Peak(metric string, hosts ...string) (Point, error) {
	points, err := t.Series(metric, hosts...)
	if err != nil {
		return Point{}, err
	}
	peak := points[0]
	for _, p := range points {
		if p.Value > peak.Value {
			peak = p
		}
	}
	return peak, nil
}

// hosts returns the group's hosts, sorted.
func (g *group) hosts() []string { return slices.Sorted(maps.Keys(g.tracks)) }
