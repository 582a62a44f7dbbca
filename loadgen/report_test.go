package loadgen

import (
	"encoding/json"
	"math/rand/v2"
	"strings"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"
	"github.com/stretchr/testify/assert"
	"github.com/stretchr/testify/require"
)

// randomReport is a balanced report of random content.
func randomReport(random *rand.Rand) *Report {
	r := NewReport()
	r.Start = time.Unix(random.Int64N(1e9), random.Int64N(1e9)).UTC()
	r.End = r.Start.Add(time.Duration(random.Int64N(1e12)))
	classes := []Class{ConnectTimeout, EOF, ReadReset, Other}
	for range random.IntN(50) {
		r.Due++
		switch random.IntN(3) {
		case 0:
			r.NotStarted++
			continue
		case 1:
			r.OK++
			r.Latency.Record(time.Duration(random.ExpFloat64() * 1e7))
		default:
			class := classes[random.IntN(len(classes))]
			r.Failed[class]++
			if class == Other {
				r.Causes["connect: "+string(rune('a'+random.IntN(3)))]++
			}
		}
		r.Started++
		r.Lateness.Record(time.Duration(random.ExpFloat64() * 1e4))
		r.Connect.Record(time.Duration(random.Int64N(int64(2 * longest))))
	}
	return r
}

func merged(reports ...*Report) *Report {
	sum := NewReport()
	for _, r := range reports {
		sum.Merge(r)
	}
	return sum
}

func TestMergeIsASum(t *testing.T) {
	for seed := range uint64(15) {
		random := rand.New(rand.NewPCG(seed, 1))
		a, b, c := randomReport(random), randomReport(random), randomReport(random)
		require.Empty(t, cmp.Diff(merged(a, b), merged(b, a)), "commutative, seed %d", seed)
		require.Empty(t, cmp.Diff(merged(merged(a, b), c), merged(a, merged(b, c))), "associative, seed %d", seed)
		require.Empty(t, cmp.Diff(a, merged(a, NewReport())), "neutral, seed %d", seed)
		sum := merged(a, b, c)
		require.NoError(t, sum.Balanced(), "seed %d", seed)
		require.Equal(t, a.Due+b.Due+c.Due, sum.Due)
		require.Equal(t, a.Latency.Count()+b.Latency.Count()+c.Latency.Count(), sum.Latency.Count())
	}
}

func TestReportSurvivesJSON(t *testing.T) {
	for seed := range uint64(20) {
		report := randomReport(rand.New(rand.NewPCG(seed, 2)))
		b, err := json.Marshal(report)
		require.NoError(t, err)
		got := new(Report)
		require.NoError(t, json.Unmarshal(b, got))
		require.Empty(t, cmp.Diff(report, got), "seed %d", seed)
		got.Merge(report)
		require.Equal(t, 2*report.Due, got.Due)
	}
}

func TestReportAsJSON(t *testing.T) {
	r := NewReport()
	r.Start = time.Date(2026, 1, 2, 3, 4, 5, 0, time.UTC)
	r.End = r.Start.Add(time.Second)
	r.Due, r.Started, r.OK, r.NotStarted = 4, 3, 2, 1
	r.Failed[ReadTimeout] = 1
	r.Latency.Record(time.Millisecond)
	r.Latency.Record(2 * time.Second)
	b, err := json.Marshal(r)
	require.NoError(t, err)
	var got map[string]any
	require.NoError(t, json.Unmarshal(b, &got))
	latency := got["latency"].(map[string]any)
	assert.NotEmpty(t, latency["hdr"])
	delete(latency, "hdr")
	assert.InDelta(t, 0.001, latency["p50"], 0.00001)
	assert.InDelta(t, 1.0005, latency["mean"], 0.001)
	for _, name := range []string{"p90", "p99", "p99.9", "max"} {
		assert.InDelta(t, 2, latency[name], 0.002, name)
		delete(latency, name)
	}
	delete(latency, "p50")
	delete(latency, "mean")
	delete(got, "connect")
	delete(got, "lateness")
	assert.Empty(t, cmp.Diff(map[string]any{
		"start": "2026-01-02T03:04:05Z", "end": "2026-01-02T03:04:06Z",
		"due": 4.0, "started": 3.0, "ok": 2.0, "not_started": 1.0,
		"failed": map[string]any{"read_timeout": 1.0}, "causes": map[string]any{},
		"latency": map[string]any{"count": 2.0},
	}, got))
}

func TestBalanced(t *testing.T) {
	good := func() *Report {
		r := NewReport()
		r.Due, r.Started, r.OK, r.NotStarted, r.Failed = 10, 8, 5, 2, Counts{EOF: 2, ReadReset: 1}
		return r
	}
	require.NoError(t, good().Balanced())
	for reason, spoil := range map[string]func(*Report){
		"one is lost":             func(r *Report) { r.OK-- },
		"one is in two columns":   func(r *Report) { r.NotStarted++ },
		"one class is missing":    func(r *Report) { delete(r.Failed, ReadReset) },
		"started and never ended": func(r *Report) { r.Started++ },
	} {
		r := good()
		spoil(r)
		err := r.Balanced()
		require.Error(t, err, reason)
		assert.Contains(t, err.Error(), "eof 2", reason)
		b, err := json.Marshal(r)
		require.NoError(t, err)
		assert.ErrorContains(t, json.Unmarshal(b, new(Report)), "does not balance", reason)
	}
}

func TestBehind(t *testing.T) {
	r := NewReport()
	for range 980 {
		r.Lateness.Record(10 * time.Microsecond)
	}
	for range 9 {
		r.Lateness.Record(5 * ms)
	}
	require.NoError(t, r.Behind(ms), "under 1 % may be late")
	r.Lateness.Record(11 * ms)
	require.ErrorContains(t, r.Behind(ms), "paused", "but not by as much")
	for range 11 {
		r.Lateness.Record(time.Second)
	}
	require.ErrorContains(t, r.Behind(ms), "fell behind")
	require.NoError(t, r.Behind(2*time.Second))
	r.Due, r.NotStarted = 1001, 1
	assert.ErrorContains(t, r.Behind(2*time.Second), "left out 1 of 1001")
}

func TestHistogram(t *testing.T) {
	h := NewHistogram()
	assert.Zero(t, h.Quantile(0.5))
	assert.Zero(t, h.Mean())
	for i := range 1000 {
		h.Record(time.Duration(i+1) * ms)
	}
	assert.InEpsilon(t, 500*ms, h.Quantile(0.5), 0.002)
	assert.InEpsilon(t, 990*ms, h.Quantile(0.99), 0.002)
	assert.InEpsilon(t, time.Second, h.Quantile(1), 0.002)
	assert.InEpsilon(t, 500500*time.Microsecond, h.Mean(), 0.002)
	assert.InDelta(t, 100, h.CountBetween(200*ms, 300*ms), 1)
	assert.EqualValues(t, 1000, h.CountBetween(0, 2*time.Second))
	assert.Zero(t, h.CountBetween(2*time.Second, time.Hour))
	h.Record(-ms)
	h.Record(100 * time.Hour)
	assert.EqualValues(t, 1002, h.Count(), "what is out of range counts at its end")
	assert.EqualValues(t, 1, h.CountBetween(0, ms/2))
	assert.InEpsilon(t, longest, h.Quantile(1), 0.002)
}

func TestReportRefusesBadJSON(t *testing.T) {
	b, err := json.Marshal(NewReport())
	require.NoError(t, err)
	require.NoError(t, json.Unmarshal(b, new(Report)))
	for reason, change := range map[string][2]string{
		"a histogram is null": {`"connect":{`, `"connect":null,"x":{`},
		"counts are null":     {`"failed":{}`, `"failed":null`},
		"not base64":          {`"hdr":"`, `"hdr":"!`},
		"no number":           {`"due":0`, `"due":"0"`},
	} {
		changed := strings.Replace(string(b), change[0], change[1], 1)
		require.NotEqual(t, string(b), changed, reason)
		assert.Error(t, json.Unmarshal([]byte(changed), new(Report)), reason)
	}
}

func FuzzReport(f *testing.F) {
	for seed := range uint64(5) {
		b, err := json.Marshal(randomReport(rand.New(rand.NewPCG(seed, 3))))
		require.NoError(f, err)
		f.Add(b)
	}
	f.Add([]byte(`{"due":1,"not_started":1}`))
	f.Fuzz(func(t *testing.T, b []byte) {
		r := new(Report)
		if json.Unmarshal(b, r) != nil {
			return
		}
		require.NoError(t, r.Balanced())
		again, err := json.Marshal(r)
		require.NoError(t, err)
		got := new(Report)
		require.NoError(t, json.Unmarshal(again, got))
		require.Empty(t, cmp.Diff(r, got))
	})
}
