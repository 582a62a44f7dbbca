package exporter

import (
	"bufio"
	"io"
	"net/http"
	"net/http/httptest"
	"strconv"
	"strings"
	"testing"

	"github.com/google/go-cmp/cmp"
	"github.com/prometheus/client_golang/prometheus"
	"github.com/stretchr/testify/assert"
	"github.com/stretchr/testify/require"

	"connlab/netlab"
)

func TestNames(t *testing.T) {
	for _, tt := range []struct {
		reason, counter, want string
		kind                  prometheus.ValueType
		filtered              bool
	}{
		{"of the default filter", "TcpExt.ListenOverflows", `"node_netstat_TcpExt_ListenOverflows", help: "Statistic TcpExtListenOverflows."`, prometheus.UntypedValue, false},
		{"left out by it", "TcpExt.TCPTimeWaitOverflow", `"node_netstat_TcpExt_TCPTimeWaitOverflow", help: "Statistic TcpExtTCPTimeWaitOverflow."`, prometheus.UntypedValue, true},
		{"a gauge of snmp is untyped too", "Tcp.CurrEstab", `"node_netstat_Tcp_CurrEstab", help: "Statistic TcpCurrEstab."`, prometheus.UntypedValue, false},
		{"sockstat is not filtered", "sockstat.TCP.tw", `"node_sockstat_TCP_tw", help: "Number of TCP sockets in state tw."`, prometheus.GaugeValue, false},
		{"all protocols", "sockstat.sockets.used", `"node_sockstat_sockets_used", help: "Number of IPv4 sockets in use."`, prometheus.GaugeValue, false},
	} {
		t.Run(tt.reason, func(t *testing.T) {
			desc, kind := New(nil).describe(tt.counter)
			assert.Contains(t, desc.String(), tt.want)
			assert.Equal(t, tt.kind, kind)
			desc, _ = New(DefaultFields).describe(tt.counter)
			assert.Equal(t, tt.filtered, desc == nil, "%v", desc)
		})
	}
}

// A scrape between two labs is no failure.
func TestNoLab(t *testing.T) {
	status, body := scrape(t, New(nil))
	assert.Equal(t, http.StatusOK, status)
	assert.Empty(t, body)
}

// scrape asks the handler, without a network.
func scrape(tb testing.TB, e *Exporter) (status int, body string) {
	tb.Helper()
	w := httptest.NewRecorder()
	e.Handler().ServeHTTP(w, httptest.NewRequestWithContext(tb.Context(), http.MethodGet, "/metrics", nil))
	return w.Code, w.Body.String()
}

// exposed is what a scrape says, by the names of the metrics.
type exposed struct {
	kind, help map[string]string
	value      map[string]float64 // with the labels, if there are any
}

// cut is the labels of the one host that is compared with node_exporter, which has none.
const cut = `{host="server",variant="v"}`

// parse reads the text of a scrape, and takes the labels off.
func parse(tb testing.TB, body string) exposed {
	tb.Helper()
	e := exposed{map[string]string{}, map[string]string{}, map[string]float64{}}
	for lines := bufio.NewScanner(strings.NewReader(body)); lines.Scan(); {
		switch f := strings.SplitN(lines.Text(), " ", 4); {
		case f[0] == "#" && f[1] == "TYPE":
			e.kind[f[2]] = f[3]
		case f[0] == "#" && f[1] == "HELP":
			e.help[f[2]] = f[3]
		default:
			name, text, ok := strings.Cut(lines.Text(), " ")
			require.True(tb, ok, lines.Text())
			v, err := strconv.ParseFloat(text, 64)
			require.NoError(tb, err, lines.Text())
			e.value[strings.Replace(name, cut, "", 1)] = v
		}
	}
	require.NotEmpty(tb, e.value, body)
	return e
}

// ours says that a metric is one that node_exporter should have.
func ours(name string) bool { return !strings.HasPrefix(name, "connlab_") }

// theirs says that a metric of node_exporter is one that this package should have.
func theirs(name string) bool {
	if field, is := strings.CutPrefix(name, "node_sockstat_"); is {
		switch field {
		case "TCP_orphan", "TCP_alloc", "TCP_mem", "TCP_mem_bytes", "UDP_mem", "UDP_mem_bytes":
			return false // the machine's
		}
		return !strings.Contains(field, "6_") // IPv6
	}
	field, is := strings.CutPrefix(name, "node_netstat_")
	proto, _, _ := strings.Cut(field, "_")
	return is && !strings.HasSuffix(proto, "6") // Ip6, Icmp6, Udp6, UdpLite6
}

// of keeps the metrics that pass.
func of(metrics map[string]string, pass func(string) bool) map[string]string {
	kept := map[string]string{}
	for name, what := range metrics {
		if pass(name) {
			kept[name] = what
		}
	}
	return kept
}

// TestAgreesWithNodeExporter asks a real node_exporter in the namespace for the same.
func TestAgreesWithNodeExporter(t *testing.T) {
	lab := upLab(t, "client", "server")
	server := lab.Host("server")
	overflow(t, lab, 6379, 4, 20)
	hosts := []*netlab.Host{server}

	t.Run("every field", func(t *testing.T) {
		ask := startNodeExporter(t, server, 9100, "--collector.netstat.fields=.*")
		e := New(nil)
		e.Add("v", hosts)
		before := scrapeOK(t, e)
		node := parse(t, ask())
		after := scrapeOK(t, e)

		assert.Empty(t, cmp.Diff(of(node.kind, theirs), of(after.kind, ours)), "types")
		assert.Empty(t, cmp.Diff(of(node.help, theirs), of(after.help, ours)), "help")
		assert.Positive(t, node.value["node_netstat_TcpExt_ListenOverflows"])
		for name := range of(node.kind, theirs) {
			// What a scrape itself may raise and lower again is no evidence.
			if strings.HasPrefix(name, "node_sockstat_") || name == "node_netstat_Tcp_CurrEstab" {
				continue
			}
			assert.GreaterOrEqual(t, node.value[name], before.value[name], name)
			assert.LessOrEqual(t, node.value[name], after.value[name], name)
		}
	})
	t.Run("the default filter", func(t *testing.T) {
		ask := startNodeExporter(t, server, 9101)
		e := New(DefaultFields)
		e.Add("v", hosts)
		assert.Empty(t, cmp.Diff(of(parse(t, ask()).kind, theirs), of(scrapeOK(t, e).kind, ours)))
	})
}

func scrapeOK(tb testing.TB, e *Exporter) exposed {
	tb.Helper()
	status, body := scrape(tb, e)
	require.Equal(tb, http.StatusOK, status, body)
	return parse(tb, body)
}

// startNodeExporter runs a node_exporter on a host and returns what asks it. Without
// one the test skips, and fails where CONNLAB_STRICT=1.
func startNodeExporter(t *testing.T, h *netlab.Host, port uint16, more ...string) (ask func() string) {
	t.Helper()
	path, err := netlab.LookProgram("prometheus-node-exporter")
	if err != nil {
		skipUnmet(t, &netlab.NeedError{Need: netlab.NeedNodeExporter, Err: err})
	}
	address := "127.0.0.1:" + strconv.Itoa(int(port))
	p, err := h.Start(t.Context(), netlab.Program{
		Path: path,
		Args: append([]string{"--collector.disable-defaults", "--collector.netstat", "--collector.sockstat",
			"--web.disable-exporter-metrics", "--web.listen-address=" + address}, more...),
		Ready: func() error { return h.Listening(port) },
	})
	require.NoError(t, err)
	t.Cleanup(func() { _ = p.Stop(0) })
	return func() string { return get200(t, h, "http://"+address+"/metrics") }
}

// get200 gets a page from within a host's namespace.
func get200(t *testing.T, h *netlab.Host, url string) string {
	t.Helper()
	status, body, err := fetch(t, h, url)
	require.NoError(t, err)
	require.Equal(t, http.StatusOK, status, body)
	return body
}

func fetch(t *testing.T, h *netlab.Host, url string) (status int, body string, err error) {
	t.Helper()
	client := http.Client{Transport: &http.Transport{DialContext: h.DialContext, DisableKeepAlives: true}}
	req, err := http.NewRequestWithContext(t.Context(), http.MethodGet, url, nil)
	require.NoError(t, err)
	resp, err := client.Do(req)
	if err != nil {
		return 0, "", err
	}
	defer resp.Body.Close()
	text, err := io.ReadAll(resp.Body)
	return resp.StatusCode, string(text), err
}
