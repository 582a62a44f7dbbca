package monitoring

import (
	"bufio"
	"context"
	"errors"
	"io"
	"net/http"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"
	"github.com/stretchr/testify/assert"
	"github.com/stretchr/testify/require"
)

// look finds a program, or ends the test; with CONNLAB_STRICT=1 that is a failure.
func look(t *testing.T, program, pkg string) string {
	t.Helper()
	path, err := exec.LookPath(program)
	if errors.Is(err, exec.ErrNotFound) {
		reason := program + " is not installed; install it with: apt-get install " + pkg
		if os.Getenv("CONNLAB_STRICT") == "1" {
			t.Fatal("CONNLAB_STRICT=1, and " + reason)
		}
		t.Skip(reason)
	}
	require.NoError(t, err)
	return path
}

func promtool(t *testing.T, dir string, args ...string) (output string, err error) {
	t.Helper()
	ctx, cancel := context.WithTimeout(t.Context(), time.Minute)
	defer cancel()
	cmd := exec.CommandContext(ctx, look(t, "promtool", "prometheus"), args...)
	cmd.Dir = dir
	out, err := cmd.CombinedOutput()
	return string(out), err
}

const (
	rulesFile = "connlab.rules.yml"
	testsFile = "connlab.rules.test.yml"
)

func TestRules(t *testing.T) {
	output, err := promtool(t, ".", "check", "rules", "--lint-fatal", rulesFile)
	require.NoError(t, err, output)
	output, err = promtool(t, ".", "test", "rules", testsFile)
	require.NoError(t, err, output)
}

// The tests of the rules would notice if one were wrong.
func TestSpoiltRules(t *testing.T) {
	tests, err := os.ReadFile(testsFile)
	require.NoError(t, err)
	for _, row := range []struct{ reason, good, spoilt, alert string }{
		{"a counter above zero", "rate(node_netstat_TcpExt_ListenOverflows[2m]) > 0", "node_netstat_TcpExt_ListenOverflows > 0", "AcceptQueueOverflow"},
		{"a window too short for 30 s", "ListenOverflows[2m]) > 0", "ListenOverflows[1m]) > 0", "AcceptQueueOverflow"},
		{"a difference of rates", "(node_netstat_TcpExt_ListenDrops - node_netstat_TcpExt_ListenOverflows)\n            - (node_netstat_TcpExt_ListenDrops offset 2m - node_netstat_TcpExt_ListenOverflows offset 2m) > 0",
			"rate(node_netstat_TcpExt_ListenDrops[2m]) - rate(node_netstat_TcpExt_ListenOverflows[2m]) > 0", "SYNsDroppedOtherwise"},
		{"one odd scrape is enough", "        for: 1m\n", "", "SYNsDroppedOtherwise"},
		{"servers too", "and 60 * rate", "or 60 * rate", "TimeWaitNearPortRange"},
	} {
		t.Run(row.reason, func(t *testing.T) {
			t.Parallel()
			require.Contains(t, string(Rules), row.good)
			dir := t.TempDir()
			spoilt := strings.ReplaceAll(string(Rules), row.good, row.spoilt)
			require.NoError(t, os.WriteFile(filepath.Join(dir, rulesFile), []byte(spoilt), 0o600))
			require.NoError(t, os.WriteFile(filepath.Join(dir, testsFile), tests, 0o600))
			output, err := promtool(t, dir, "check", "rules", rulesFile)
			require.NoError(t, err, output)
			output, err = promtool(t, dir, "test", "rules", testsFile)
			_, failed := errors.AsType[*exec.ExitError](err)
			assert.True(t, failed, "the tests pass with it: %v\n%s", err, output)
			assert.Contains(t, output, row.alert)
		})
	}
}

// metric is one that the rules read, or point to.
var metric = regexp.MustCompile(`\bnode_(netstat|sockstat|sysctl)_\w+`)

// byDefault are the metrics of the rules that node_exporter 1.5 leaves out unless told otherwise.
var byDefault = []string{
	"node_netstat_TcpExt_TCPChallengeACK", "node_netstat_TcpExt_TCPReqQFullDoCookies", "node_netstat_TcpExt_TCPReqQFullDrop",
	"node_netstat_TcpExt_TCPSYNChallenge", "node_netstat_TcpExt_TCPTimeWaitOverflow",
	"node_sysctl_net_ipv4_ip_local_port_range_max", "node_sysctl_net_ipv4_ip_local_port_range_min", "node_sysctl_net_ipv4_tcp_max_tw_buckets",
}

func TestNodeExporter(t *testing.T) {
	readme, err := os.ReadFile("README.md")
	require.NoError(t, err)
	block := regexp.MustCompile("(?s)```sh\n(.*?)```").FindSubmatch(readme)
	require.NotNil(t, block, "README.md has no command line")
	rules := mentioned(Rules)
	require.Subset(t, rules, byDefault)

	assert.Empty(t, missing(rules, scrape(t, strings.TrimSpace(string(block[1])))), "with the flags of README.md")
	assert.Empty(t, cmp.Diff(byDefault, missing(rules, scrape(t, "prometheus-node-exporter"))), "without them (-want +got)")
	assert.Empty(t, cmp.Diff(byDefault, mentioned(readme)), "what README.md says is left out (-want +got)")
}

// Whatever node_exporter has without the flags it has with them as well.
func TestFlagsTakeNothingAway(t *testing.T) {
	readme, err := os.ReadFile("README.md")
	require.NoError(t, err)
	flag := regexp.MustCompile(`--collector\.netstat\.fields='([^']+)'`).FindSubmatch(readme)
	require.NotNil(t, flag)
	help, err := exec.CommandContext(t.Context(), look(t, "prometheus-node-exporter", "prometheus-node-exporter"), "--help").CombinedOutput()
	require.NoError(t, err, string(help))
	builtin := regexp.MustCompile(`--collector\.netstat\.fields="([^"]+)"`).FindSubmatch(help)
	require.NotNil(t, builtin, string(help))
	const ours = "|TCPReqQFull.*|TCPTimeWaitOverflow|TCPSYNChallenge|TCPChallengeACK"
	assert.Equal(t, string(builtin[1]), strings.Replace(string(flag[1]), ours, "", 1))
}

// mentioned returns the metrics that a text names, sorted, each once.
func mentioned(text []byte) []string {
	names := strings.Fields(strings.Join(metric.FindAllString(string(text), -1), " "))
	slices.Sort(names)
	return slices.Compact(names)
}

func missing(want []string, page string) []string {
	return slices.DeleteFunc(slices.Clone(want), func(name string) bool {
		return regexp.MustCompile(`(?m)^` + name + ` \d`).MatchString(page)
	})
}

// scrape runs a command line of node_exporter, on a port of its own, and returns its metrics.
func scrape(t *testing.T, commandLine string) string {
	t.Helper()
	look(t, "prometheus-node-exporter", "prometheus-node-exporter")
	ctx, cancel := context.WithTimeout(t.Context(), time.Minute)
	defer cancel()
	// The shell becomes node_exporter: what is killed in the end is not the shell alone.
	cmd := exec.CommandContext(ctx, "/bin/sh", "-c", "exec "+commandLine+" --web.listen-address=127.0.0.1:0")
	stderr, err := cmd.StderrPipe()
	require.NoError(t, err)
	require.NoError(t, cmd.Start())
	defer func() {
		cancel()
		_, _ = io.Copy(io.Discard, stderr)
		_ = cmd.Wait() // it was killed
	}()

	listening := regexp.MustCompile(`msg="Listening on" address=(\S+)`)
	var said []string
	for lines := bufio.NewScanner(stderr); lines.Scan(); {
		said = append(said, lines.Text())
		at := listening.FindStringSubmatch(lines.Text())
		if at == nil {
			continue
		}
		req, err := http.NewRequestWithContext(ctx, http.MethodGet, "http://"+at[1]+"/metrics", nil)
		require.NoError(t, err)
		client := http.Client{Transport: &http.Transport{DisableKeepAlives: true}}
		answer, err := client.Do(req)
		require.NoError(t, err)
		defer answer.Body.Close()
		page, err := io.ReadAll(answer.Body)
		require.NoError(t, err)
		require.Equal(t, http.StatusOK, answer.StatusCode, string(page))
		return string(page)
	}
	require.Fail(t, "node_exporter does not listen", strings.Join(said, "\n"))
	return ""
}
