package scenarios

import (
	"fmt"
	"maps"
	"os"
	"slices"
	"strings"
	"testing"

	"github.com/stretchr/testify/assert"
	"github.com/stretchr/testify/require"

	"connlab/results"
	"connlab/scenarios/diagnose"
)

// diagnosis is what the counters of two variants of a scenario are to be taken for.
type diagnosis struct {
	scenario      *Scenario
	sick, healthy string
	incident      diagnose.Incident // that the sick one has
}

func (d diagnosis) wants() map[string]diagnose.Incident {
	return map[string]diagnose.Incident{d.sick: d.incident, d.healthy: diagnose.Healthy}
}

// diagnosable says of each scenario which variant has the incident so that the counters
// of the hosts that one would look at tell it, and which is in good health.
var diagnosable = []diagnosis{
	{&Backlog, "incident", "no-stall", diagnose.Backlog},
	{&TupleCollision, "incident", "proxies-directly", diagnose.TupleCollision},
	// The smaller variants come near no limit of the kernel's: their counters are healthy.
	{&MixedPool, "incident", "all-keep", diagnose.MixedPool},
	// The second half of the same incident. Of the controls, room and prompt fill the buckets
	// as well, as they are meant to.
	{&TimeWaitBuckets, "compressed", "raised", diagnose.MixedPool},
	{&UndersizedPool, "incident", "fast", diagnose.UndersizedPool},
	{&AcceptQueue, "incident", "no-cut", diagnose.AcceptQueue},
}

// savedCounts are the counters that [Options.Counters] was given, by variant and host.
type savedCounts map[string]map[string]beforeAfter

type beforeAfter struct{ before, after []byte }

func (s savedCounts) save(variant, host string, before, after []byte) error {
	if s[variant] == nil {
		s[variant] = map[string]beforeAfter{}
	}
	s[variant][host] = beforeAfter{before, after}
	return nil
}

// verdict is what the hosts of a variant have, by what grew during its load and also
// since its namespaces were made: the one incident that any has while the others are
// healthy, or all of the verdicts.
func (s savedCounts) verdict(t *testing.T, variant string) string {
	t.Helper()
	require.NotEmpty(t, s[variant], "variant %s saved no counters", variant)
	all := map[string]bool{}
	for host, text := range s[variant] {
		before, err := diagnose.Parse(diagnose.File{Name: host + " before", Text: text.before})
		require.NoError(t, err)
		after, err := diagnose.Parse(diagnose.File{Name: host + " after", Text: text.after})
		require.NoError(t, err)
		for _, then := range []*diagnose.Snapshot{&before, nil} {
			d, err := diagnose.Diagnose(after, then)
			require.NoError(t, err)
			all[d.Verdict] = true
		}
	}
	if len(all) > 1 {
		delete(all, string(diagnose.Healthy)) // not each host need have it
	}
	return strings.Join(slices.Sorted(maps.Keys(all)), " and ")
}

// checkDiagnosis wants the counters of a scenario's run to name its incident, and to find
// nothing where nothing is wrong. A run that says nothing has counters that say nothing.
func checkDiagnosis(t *testing.T, rec *results.Record, saved savedCounts) {
	t.Helper()
	at := slices.IndexFunc(diagnosable, func(d diagnosis) bool { return d.scenario.Name == rec.Incident })
	require.GreaterOrEqual(t, at, 0, rec.Incident)
	for variant, want := range diagnosable[at].wants() {
		if v := find(t, rec, variant); v.Verdict == results.Held {
			assert.Equal(t, string(want), saved.verdict(t, variant), "%s %s", rec.Incident, variant)
		}
	}
}

// TestDiagnoseTenfold runs each incident and its healthy control ten times, which takes
// about 45 minutes, and prints what their counters were taken for.
func TestDiagnoseTenfold(t *testing.T) {
	if os.Getenv("CONNLAB_TENFOLD") != "1" {
		t.Skip("three quarters of an hour; set CONNLAB_TENFOLD=1 and -timeout 2h. Each incident's own test has one run of it")
	}
	for _, d := range diagnosable {
		t.Run(d.scenario.Name, func(t *testing.T) { tenfold(t, d) })
	}
}

func tenfold(t *testing.T, d diagnosis) {
	const times = 10
	table := map[string]map[string]int{d.sick: {}, d.healthy: {}}
	for range times {
		saved := savedCounts{}
		rec := run(t, d.scenario, Options{Variants: []string{d.sick, d.healthy}, Counters: saved.save})
		for variant, want := range d.wants() {
			if v := find(t, rec, variant); v.Verdict != results.Held {
				table[variant]["("+string(v.Verdict)+")"]++
				continue
			}
			got := saved.verdict(t, variant)
			table[variant][got]++
			assert.Equal(t, string(want), got, variant)
		}
	}
	for variant, counts := range table {
		show(t, fmt.Sprintf("tenfold: %s %s: %v", d.scenario.Name, variant, counts))
		assert.Zero(t, counts["("+string(results.Refuted)+")"], variant)
		assert.Less(t, counts["("+string(results.Void)+")"], times/2, "%s: hardly a run said anything", variant)
	}
}
