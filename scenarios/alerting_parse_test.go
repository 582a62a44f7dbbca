package scenarios

import (
	"math"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"
	"github.com/stretchr/testify/assert"
	"github.com/stretchr/testify/require"
)

// matrixOf is an answer of Prometheus 2.42 with this result.
func matrixOf(result string) string {
	return `{"status":"success","data":{"resultType":"matrix","result":` + result + `}}`
}

var matrices = []struct {
	reason string
	answer string
	want   []series
	err    string
}{
	{"nothing is stored", matrixOf(`[]`), nil, ""},
	{
		"two series, seconds with and without a fraction",
		matrixOf(`[{"metric":{"job":"5s"},"values":[[1700000000.123,"0"],[1700000005,"21"]]},{"metric":{"job":"15s"},"values":[[1700000001.5,"1.5e+06"]]}]`),
		[]series{
			{map[string]string{"job": "5s"}, []sample{{time.UnixMilli(1700000000123), 0}, {time.UnixMilli(1700000005000), 21}}},
			{map[string]string{"job": "15s"}, []sample{{time.UnixMilli(1700000001500), 1.5e6}}},
		},
		"",
	},
	{"a value that JSON has no number for", matrixOf(`[{"metric":{},"values":[[1,"+Inf"]]}]`),
		[]series{{map[string]string{}, []sample{{time.UnixMilli(1000), math.Inf(1)}}}}, ""},
	{"a refusal", `{"status":"error","errorType":"bad_data","error":"parse error: x"}`, nil, `status "error": parse error: x`},
	{"an instant vector", `{"status":"success","data":{"resultType":"vector","result":[]}}`, nil, `answer of type "vector", not matrix`},
	{"no JSON", "Service Unavailable", nil, "answer: invalid character 'S' looking for beginning of value"},
	{"half an answer", `{"status":"success"`, nil, "answer: unexpected end of JSON input"},
	{"no result", `{"status":"success","data":{"resultType":"matrix"}}`, nil, "result: unexpected end of JSON input"},
	{"a series without values", matrixOf(`[{"metric":{"job":"5s"},"values":[]}]`), nil, "no values of map[job:5s]"},
	{"a sample without a value", matrixOf(`[{"metric":{},"values":[[1]]}]`), nil, "result: a sample of 1 parts"},
	{"a value that is none", matrixOf(`[{"metric":{},"values":[[1,"x"]]}]`), nil, `result: strconv.ParseFloat: parsing "x": invalid syntax`},
}

func TestParseMatrix(t *testing.T) {
	for _, row := range matrices {
		got, err := parseMatrix([]byte(row.answer))
		if row.err != "" {
			assert.EqualError(t, err, row.err, row.reason)
			continue
		}
		require.NoError(t, err, row.reason)
		assert.Empty(t, cmp.Diff(row.want, got), row.reason)
	}
}

func FuzzParseMatrix(f *testing.F) {
	for _, row := range matrices {
		f.Add([]byte(row.answer))
	}
	f.Fuzz(func(t *testing.T, answer []byte) {
		all, err := parseMatrix(answer)
		if err != nil {
			require.Nil(t, all)
		}
		for _, s := range all {
			require.NotEmpty(t, s.Samples)
		}
	})
}

func TestCut(t *testing.T) {
	at := func(seconds ...int64) (samples []sample) {
		for _, s := range seconds {
			samples = append(samples, sample{At: time.Unix(s, 0)})
		}
		return samples
	}
	got := cut([]series{{Samples: at(1, 2, 3)}, {Samples: at(1)}, {Samples: at(4)}}, time.Unix(2, 0))
	assert.Empty(t, cmp.Diff([]series{{Samples: at(2, 3)}, {Samples: at(4)}}, got), "what is from that very moment stays")
	assert.Empty(t, cut([]series{{Samples: at(1)}}, time.Unix(2, 0)))
}

func TestFirings(t *testing.T) {
	of := func(rule, job string, ms int64) series {
		return series{map[string]string{"alertname": rule, "job": job}, []sample{{time.UnixMilli(ms), 1}, {time.UnixMilli(ms + 1000), 1}}}
	}
	got, err := firings([]series{of("B", "5s", 7), of("A", "5s", 7), of("A", "1m0s", 9), of("A", "500ms", 3)},
		[]time.Duration{5 * time.Second, time.Minute, 500 * time.Millisecond})
	require.NoError(t, err)
	assert.Empty(t, cmp.Diff([]firing{
		{"A", 500 * time.Millisecond, time.UnixMilli(3)},
		{"A", 5 * time.Second, time.UnixMilli(7)},
		{"B", 5 * time.Second, time.UnixMilli(7)},
		{"A", time.Minute, time.UnixMilli(9)},
	}, got))
	_, err = firings([]series{of("A", "", 1)}, []time.Duration{time.Second})
	assert.EqualError(t, err, `the alert A has the job "", which is no scrape interval`)
}

func TestMetricNames(t *testing.T) {
	const page = `# HELP node_netstat_Tcp_OutRsts Statistic TcpOutRsts.
# TYPE node_netstat_Tcp_OutRsts untyped
node_netstat_Tcp_OutRsts 12
node_scrape_collector_success{collector="netstat"} 1
node_scrape_collector_success{collector="sockstat"} 1

node_a 1`
	assert.Equal(t, []string{"node_a", "node_netstat_Tcp_OutRsts", "node_scrape_collector_success"}, metricNames([]byte(page)))
	assert.Empty(t, metricNames(nil))
}

func TestPrometheusConfig(t *testing.T) {
	got, err := prometheusConfig([]time.Duration{500 * time.Millisecond, time.Minute})
	require.NoError(t, err)
	assert.Equal(t, `global:
  evaluation_interval: 1000ms
rule_files: [/run/rules.yml]
scrape_configs:
  - job_name: 500ms
    scrape_interval: 500ms
    static_configs: [targets: ["127.0.0.1:9100"]]
  - job_name: 1m0s
    scrape_interval: 60000ms
    static_configs: [targets: ["127.0.0.1:9100"]]
`, got)
}
