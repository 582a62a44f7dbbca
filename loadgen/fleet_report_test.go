package loadgen

import (
	"encoding/json"
	"math/rand/v2"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"
	"github.com/stretchr/testify/assert"
	"github.com/stretchr/testify/require"
)

func randomFleetReport(random *rand.Rand) *FleetReport {
	r := NewFleetReport()
	r.Start = time.Unix(random.Int64N(1e6), 0).UTC()
	r.LastOK = r.Start.Add(time.Duration(random.Int64N(1e9)))
	r.End = r.LastOK.Add(time.Duration(random.Int64N(1e9)))
	r.Clients, r.Open, r.FirstVictims = random.Int64N(1000), random.Int64N(1000), random.Int64N(1000)
	r.OK = random.Int64N(50)
	for _, class := range []Class{EOF, ConnectTimeout, ServerError}[:random.IntN(4)] {
		r.Failed[class] = random.Int64N(10) + 1
		r.Cut[class] = random.Int64N(10) + 1
		r.Causes[string(class)] = 1
	}
	r.Attempts = r.OK + r.Failed.Sum()
	for range r.OK {
		for _, h := range []*Histogram{r.Connect, r.Reply, r.Recover, r.Lateness} {
			h.Record(time.Duration(random.Int64N(int64(time.Second))))
		}
		addStep(&r.OKPer100ms, random.IntN(30), 1)
		addStep(&r.StartedPer100ms, random.IntN(30), 1)
	}
	return r
}

func TestFleetReportsMergeInAnyOrder(t *testing.T) {
	for seed := range uint64(2) {
		random := rand.New(rand.NewPCG(seed, 1))
		a, b, c := randomFleetReport(random), randomFleetReport(random), randomFleetReport(random)
		merged := func(reports ...*FleetReport) *FleetReport {
			r := NewFleetReport()
			for _, other := range reports {
				r.Merge(other)
			}
			return r
		}
		all := merged(a, b, c)
		require.NoError(t, all.Balanced())
		require.Empty(t, cmp.Diff(all, merged(a, merged(b, c))), "seed %d", seed)
		require.Empty(t, cmp.Diff(all, merged(c, b, NewFleetReport(), a)), "seed %d", seed)
		require.Equal(t, a.Attempts+b.Attempts+c.Attempts, all.Attempts)
		require.Equal(t, a.OK+b.OK+c.OK, sum(all.OKPer100ms))
		require.Equal(t, a.Open+b.Open+c.Open, all.Open)
	}
}

func TestFleetReportSurvivesJSON(t *testing.T) {
	for seed := range uint64(2) {
		report := randomFleetReport(rand.New(rand.NewPCG(seed, 2)))
		b, err := json.Marshal(report)
		require.NoError(t, err)
		got := new(FleetReport)
		require.NoError(t, json.Unmarshal(b, got))
		require.Empty(t, cmp.Diff(report, got), "seed %d", seed)
	}
	for reason, text := range map[string]string{
		"it does not balance": `{"attempts": 3, "ok": 1, "failed": {"eof": 1}}`,
		"a column is missing": `{"cut": null}`,
		"it is a list":        `[]`,
	} {
		assert.Error(t, json.Unmarshal([]byte(text), new(FleetReport)), reason)
	}
}

func TestAddStep(t *testing.T) {
	var series []int64
	for _, step := range []int{2, 0, 2, -5} {
		addStep(&series, step, 1)
	}
	assert.Equal(t, []int64{2, 0, 2}, series)
	addStep(&series, 1<<40, 3)
	assert.Len(t, series, maxFleetSteps)
	assert.EqualValues(t, 3, series[maxFleetSteps-1])
	r := NewFleetReport()
	assert.Zero(t, r.LastOKAfter())
}
