package results

import (
	"encoding/json"
	"flag"
	"math"
	"os"
	"path/filepath"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"
	"github.com/stretchr/testify/require"
)

var update = flag.Bool("update", false, "rewrite the files in testdata from what the code does")

// sampleRecord is a judged record with one variant of every verdict.
func sampleRecord() *Record {
	rec := &Record{
		Schema:     Schema,
		Kernel:     "6.18.44",
		Incident:   "backlog",
		Started:    time.Date(2026, 11, 22, 13, 24, 0, 0, time.UTC),
		Seconds:    41.25,
		Seed:       7,
		Server:     "mini",
		Parameters: map[string]string{"hosts": "120", "rate": "2000", "stall": "1.43s", "backlog": "511"},
		Variants: []Variant{
			{
				Name: "incident", Role: Incident, Summary: "listen(511) and a stall of 1.43 s: SYNs are dropped without a word",
				Sysctls: map[string]string{"net.core.somaxconn": "4096"}, Link: "veth",
				Predictions: []Prediction{
					drops(511, 1.43),
					{
						Metric: "server/AcceptQueue.Limit", Formula: "min(backlog, somaxconn) + 1", Note: "one more than the limit",
						Inputs: map[string]float64{"backlog": 511, "somaxconn": 4096}, Predicted: 512,
						Unit: "connections", Tolerance: Exactly(),
					},
					{
						Metric: "clients/Connect.RetriedAfterTheFirstSecondOfTheStall", Formula: "some, wherever λT > B+1",
						Inputs: map[string]float64{"λ": 2000, "T": 1.43, "B": 511}, Predicted: 1,
						Unit: "connections", Tolerance: AtLeast(),
					},
				},
				Metrics: map[string]Metric{
					"server/Drops.FirstAttempt":                            {2360, "SYNs"},
					"server/AcceptQueue.Limit":                             {512, "connections"},
					"clients/Connect.RetriedAfterTheFirstSecondOfTheStall": {2290, "connections"},
					"server/TcpExt.ListenOverflows":                        {4711, "events"},
				},
				Warnings: []string{"the load generator was up to 3 ms late"},
				Evidence: []string{"tcp_send_reset NO_SOCKET ×7: tcp_v4_send_reset ← tcp_v4_rcv"},
				Series: []Series{NewSeries("accept queue depth", "connections", []Point{
					{0, 0}, {0.5, 256}, {1, 512}, {1.5, 512}, {2, 64}, {2.5, 0},
				})},
			},
			{
				Name: "backlog-2048", Role: FalseLead, Parameters: map[string]string{"backlog": "2048"},
				Predictions: []Prediction{drops(2048, 1.43)},
				Metrics:     map[string]Metric{"server/Drops.FirstAttempt": {1240, "SYNs"}},
			},
			{
				Name: "no-stall", Role: Control,
				Predictions: []Prediction{drops(511, 0)},
				Metrics:     map[string]Metric{"server/TcpExt.ListenOverflows": {0, "events"}},
			},
			{
				Name: "abort-on-overflow", Role: FalseLead,
				Predictions: []Prediction{drops(511, 1.43)},
			},
		},
	}
	rec.Variants[3].Skip("no /dev/net/tun, which a link needs for latency where there is no netem")
	rec.Judge()
	return rec
}

// drops predicts the first SYNs that a full accept queue turns away while the
// server stands still for stall seconds.
func drops(backlog, stall float64) Prediction {
	const rate = 2000
	return Prediction{
		Metric: "server/Drops.FirstAttempt", Formula: "max(0, λ·T − (B+1))",
		Inputs:    map[string]float64{"λ": rate, "T": stall, "B": backlog},
		Predicted: math.Round(max(0, rate*stall-(backlog+1))), Unit: "SYNs", Tolerance: Within(0.05),
	}
}

// randomRecord is a judged record of two random outcomes, a Poisson count of mean
// 2.33 and a binomial one of mean 50.
func randomRecord(collisions, rounds float64) *Record {
	rec := &Record{
		Schema: Schema, Kernel: "6.18.44", Incident: "collision",
		Variants: []Variant{{
			Name: "incident", Role: Incident,
			Predictions: []Prediction{
				{
					Metric: "detector/Collisions", Formula: "k·(n/k)·(n/k−1)/2/P", Note: "of one round",
					Inputs:    map[string]float64{"n": 1000, "k": 15, "P": 14116},
					Predicted: 2.33, Unit: "collisions", Tolerance: Poisson(1e-4),
				},
				{
					Metric: "detector/Rounds.WithTimeout", Formula: "rounds·p",
					Inputs:    map[string]float64{"rounds": 100, "p": 0.5},
					Predicted: 50, Unit: "rounds", Tolerance: Binomial(100, 0.01),
				},
			},
			Metrics: map[string]Metric{
				"detector/Collisions":         {collisions, "collisions"},
				"detector/Rounds.WithTimeout": {rounds, "rounds"},
			},
		}},
	}
	rec.Judge()
	return rec
}

// clone copies a record deeply, by way of its JSON.
func clone(t *testing.T, rec *Record) *Record {
	t.Helper()
	data, err := json.Marshal(rec)
	require.NoError(t, err)
	var copied Record
	require.NoError(t, json.Unmarshal(data, &copied))
	return &copied
}

// compareWithFile fails the test if got is not what the file in testdata holds.
func compareWithFile(t *testing.T, file, got string) {
	t.Helper()
	path := filepath.Join("testdata", file)
	if *update {
		require.NoError(t, os.WriteFile(path, []byte(got), 0o644))
	}
	want, err := os.ReadFile(path)
	require.NoError(t, err)
	if diff := cmp.Diff(string(want), got); diff != "" {
		t.Errorf("%s differs from what was written (-want +got):\n%s", path, diff)
	}
}

var nan, inf = math.NaN(), math.Inf(1)
