package observe

import (
	"strings"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"
	"github.com/stretchr/testify/assert"
	"github.com/stretchr/testify/require"
)

const ms = time.Millisecond

// sampleTimeline has two clients and a server over three rounds. A.new is first
// printed in round 1, and on client-1 only.
func sampleTimeline() *Timeline {
	one, two, queue := &track{}, &track{}, &track{}
	one.record(0, []int64{10, 1})
	two.record(1*ms, []int64{20, 2})
	one.record(100*ms, []int64{10, 5, 3})
	two.record(101*ms, []int64{25, 4})
	one.record(200*ms, []int64{11, 2, 3})
	two.record(202*ms, []int64{25, 3})
	queue.record(0, []int64{0})
	queue.record(10*ms, []int64{5})
	queue.record(20*ms, []int64{5})
	queue.record(30*ms, []int64{2})
	return &Timeline{
		start:    time.Date(2026, 1, 2, 3, 4, 5, 0, time.UTC),
		duration: 250 * ms,
		marks:    []Mark{{50 * ms, "stall begins"}, {150 * ms, "stall ends"}, {160 * ms, "stall begins"}},
		groups: []*group{
			{
				sampling: Sampling{What: "counters", Interval: 100 * ms, Rounds: 3, LongestGap: 101 * ms, Busy: 3 * ms},
				names:    []string{"A.count", "A.gauge", "A.new"},
				ids:      map[string]int{"A.count": 0, "A.gauge": 1, "A.new": 2},
				tracks:   map[string]*track{"client-1": one, "client-2": two},
			},
			{
				sampling: Sampling{What: "listeners", Interval: 10 * ms, Rounds: 4, Missed: 1, LongestGap: 20 * ms, Busy: ms},
				names:    []string{"Listen.Depth"},
				ids:      map[string]int{"Listen.Depth": 0},
				tracks:   map[string]*track{"server": queue},
			},
		},
	}
}

func TestTimelineValues(t *testing.T) {
	tl := sampleTimeline()
	both := []string{"client-1", "client-2"}
	for _, tc := range []struct {
		name   string
		metric string
		hosts  []string
		delta  int64
		peak   Point
		series []Point
	}{
		{"one host", "A.count", both[:1], 1, Point{200 * ms, 11}, []Point{{0, 10}, {100 * ms, 10}, {200 * ms, 11}}},
		{"a sum has the time of its last host", "A.count", both, 6, Point{202 * ms, 36}, []Point{{ms, 30}, {101 * ms, 35}, {202 * ms, 36}}},
		{"peak of the sum, not sum of the peaks", "A.gauge", both, 2, Point{101 * ms, 9}, []Point{{ms, 3}, {101 * ms, 9}, {202 * ms, 5}}},
		{"printed later, on one host", "A.new", both, 3, Point{101 * ms, 3}, []Point{{ms, 0}, {101 * ms, 3}, {202 * ms, 3}}},
		{"never printed on this host", "A.new", both[1:], 0, Point{ms, 0}, []Point{{ms, 0}, {101 * ms, 0}, {202 * ms, 0}}},
		{"first of equal peaks", "Listen.Depth", []string{"server"}, 2, Point{10 * ms, 5}, []Point{{0, 0}, {10 * ms, 5}, {20 * ms, 5}, {30 * ms, 2}}},
	} {
		t.Run(tc.name, func(t *testing.T) {
			delta, err := tl.Delta(tc.metric, tc.hosts...)
			require.NoError(t, err)
			assert.Equal(t, tc.delta, delta)
			peak, err := tl.Peak(tc.metric, tc.hosts...)
			require.NoError(t, err)
			assert.Equal(t, tc.peak, peak)
			series, err := tl.Series(tc.metric, tc.hosts...)
			require.NoError(t, err)
			assert.Empty(t, cmp.Diff(tc.series, series))
		})
	}
}

func TestTimelineAt(t *testing.T) {
	tl := sampleTimeline()
	for _, tc := range []struct {
		at   time.Duration
		want int64
	}{
		{1 * ms, 30}, {100 * ms, 30}, {101 * ms, 35}, {201 * ms, 35}, {202 * ms, 36}, {time.Hour, 36},
	} {
		got, err := tl.At(tc.at, "A.count", "client-1", "client-2")
		require.NoError(t, err)
		assert.Equal(t, tc.want, got, "at %v", tc.at)
	}
	_, err := tl.At(0, "A.count", "client-1", "client-2")
	require.ErrorContains(t, err, "no sample of A.count as early as 0s", "client-2 was first read after 1 ms")
}

func TestTimelineDeltas(t *testing.T) {
	got, err := sampleTimeline().Deltas("client-1", "client-2")
	require.NoError(t, err)
	assert.Empty(t, cmp.Diff(Counters{"A.count": 6, "A.gauge": 2, "A.new": 3}, got))
	_, err = sampleTimeline().Deltas("client-1", "server")
	require.ErrorContains(t, err, "nothing was measured on all of the hosts [client-1 server]")
	_, err = sampleTimeline().Deltas()
	require.ErrorContains(t, err, "of no host")
}

func TestTimelineUnmeasured(t *testing.T) {
	tl := sampleTimeline()
	_, err := tl.Delta("A.unknown", "client-1")
	require.ErrorContains(t, err, `no metric "A.unknown" was measured`)
	_, err = tl.Peak("Listen.Depth", "client-1")
	require.ErrorContains(t, err, "Listen.Depth was not measured on host client-1")
	_, err = tl.Series("A.count")
	require.ErrorContains(t, err, "of no host")
	_, err = tl.At(time.Hour, "A.count", "client-1", "server")
	require.ErrorContains(t, err, "not measured on host server")
}

func TestTimelineMarks(t *testing.T) {
	tl := sampleTimeline()
	at, err := tl.MarkAt("stall begins")
	require.NoError(t, err)
	assert.Equal(t, 50*ms, at, "the first of that name")
	_, err = tl.MarkAt("reboot")
	require.ErrorContains(t, err, `no event "reboot"`)
}

const wantCSV = `seconds,host,metric,value
0.050000,,mark,stall begins
0.150000,,mark,stall ends
0.160000,,mark,stall begins
0.000000,client-1,A.count,10
0.200000,client-1,A.count,11
0.000000,client-1,A.gauge,1
0.100000,client-1,A.gauge,5
0.200000,client-1,A.gauge,2
0.000000,client-1,A.new,0
0.100000,client-1,A.new,3
0.001000,client-2,A.count,20
0.101000,client-2,A.count,25
0.001000,client-2,A.gauge,2
0.101000,client-2,A.gauge,4
0.202000,client-2,A.gauge,3
0.000000,server,Listen.Depth,0
0.010000,server,Listen.Depth,5
0.030000,server,Listen.Depth,2
`

func TestTimelineCSV(t *testing.T) {
	var b strings.Builder
	require.NoError(t, sampleTimeline().WriteCSV(&b))
	assert.Empty(t, cmp.Diff(wantCSV, b.String()))
}
