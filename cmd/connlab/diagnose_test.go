package main

import (
	"bytes"
	"encoding/json"
	"os"
	"path/filepath"
	"strconv"
	"strings"
	"testing"

	"github.com/stretchr/testify/assert"
	"github.com/stretchr/testify/require"

	"connlab/scenarios/diagnose"
)

// runDiagnose runs the verb with a text on standard input.
func runDiagnose(stdin string, args ...string) outcome {
	var stdout, stderr bytes.Buffer
	code := connlab(append([]string{"diagnose"}, args...), strings.NewReader(stdin), &stdout, &stderr)
	return outcome{code, stdout.String(), stderr.String()}
}

// The counters that a backlog moves, at two moments.
const (
	savedThen = `TcpActiveOpens 0 0.0
TcpPassiveOpens 3500 0.0
Tcp: CurrEstab
Tcp: 3500
TcpEstabResets 0 0.0
TcpExtTW 0 0.0
TcpExtListenOverflows 0 0.0
TcpExtListenDrops 0 0.0
TcpExtTCPReqQFullDrop 0 0.0
TcpExtTCPReqQFullDoCookies 0 0.0
TcpExtTCPSYNChallenge 0 0.0
TcpExtTCPTimeWaitOverflow 0 0.0
TcpExtPAWSActive 0 0.0
`
	savedNow = `TcpPassiveOpens 7968 0.0
TcpExtListenOverflows 2694 0.0
TcpExtListenDrops 2694 0.0
`
)

func save(t *testing.T, text string) string {
	t.Helper()
	path := filepath.Join(t.TempDir(), "saved.txt")
	require.NoError(t, os.WriteFile(path, []byte(text), 0o600))
	return path
}

func TestDiagnoseFiles(t *testing.T) {
	then, now := save(t, savedThen), save(t, savedThen+savedNow)
	for _, tt := range []struct {
		why    string
		stdin  string
		args   []string
		code   int
		stdout string
	}{
		{"healthy", "", []string{then}, exitOK, "Verdict: healthy."},
		{"an incident is named, too", "", []string{now}, exitOK, "Verdict: backlog."},
		{"totals are said to be totals", "", []string{now}, exitOK, "totals since boot"},
		{"standard input", savedThen + savedNow, []string{"-"}, exitOK, "Verdict: backlog."},
		{"two files of one host: the later one counts", savedNow, []string{then, "-"}, exitOK, "Verdict: backlog."},
		{"nothing happened between the two", "", []string{now, "--before", now}, exitOK, "Verdict: healthy."},
		{"by difference", "", []string{now, "--before", then}, exitOK, "Verdict: backlog."},
		{"two counters are not enough", savedNow, []string{"-"}, exitVoid, "Verdict: not enough evidence. What would decide:"},
	} {
		o := runDiagnose(tt.stdin, tt.args...)
		assert.Equal(t, tt.code, o.code, "%s: %s", tt.why, o.stderr)
		assert.Contains(t, o.stdout, tt.stdout, tt.why)
	}
}

func TestDiagnoseUsage(t *testing.T) {
	then, now := save(t, savedThen), save(t, savedThen+savedNow)
	for _, tt := range []struct {
		why    string
		args   []string
		stderr string
	}{
		{"no such file", []string{"/no/such/file"}, "/no/such/file"},
		{"nothing to recognise", []string{"-"}, "standard input: nothing recognised: save /proc/net/netstat"},
		{"no such file before", []string{now, "--before", "/no/such/file"}, "/no/such/file"},
		{"the wrong way round", []string{then, "--before", now}, "the wrong way round"},
		{"a file and a process", []string{now, "--pid", "1"}, "got both"},
		{"no such process", []string{"--pid", "999999999"}, "/proc/999999999/net/netstat"},
		{"a process that cannot be", []string{"--pid=-5"}, "/proc/-5/net/netstat"},
	} {
		o := runDiagnose("", tt.args...)
		assert.Equal(t, exitUsage, o.code, tt.why)
		assert.Contains(t, o.stderr, tt.stderr, tt.why)
		assert.Empty(t, o.stdout, tt.why)
	}
}

func TestDiagnoseJSON(t *testing.T) {
	o := runDiagnose(savedThen+savedNow, "-", "--json")
	require.Equal(t, exitOK, o.code, o.stderr)
	var d diagnose.Diagnosis
	require.NoError(t, json.Unmarshal([]byte(o.stdout), &d))
	assert.Equal(t, "backlog", d.Verdict)
	assert.True(t, d.SinceBoot)
	require.NotEmpty(t, d.Findings)
	assert.Equal(t, diagnose.Backlog, d.Findings[0].Incident)
	assert.Equal(t, diagnose.Fits, d.Findings[0].Verdict)
	assert.Contains(t, o.stdout, `"rule": "ListenOverflows > 0"`, "what a person reads is not escaped for HTML")
}

// This machine's own counters can be read by anybody; what they say is its own
// business.
func TestDiagnoseThisMachine(t *testing.T) {
	for _, args := range [][]string{{"--json"}, {"--json", "--pid", strconv.Itoa(os.Getpid())}} {
		o := runDiagnose("", args...)
		assert.Contains(t, []int{exitOK, exitVoid}, o.code, o.stderr)
		assert.Empty(t, o.stderr, "our own process is in our own namespace")
		var d diagnose.Diagnosis
		require.NoError(t, json.Unmarshal([]byte(o.stdout), &d))
		for _, found := range d.Findings {
			for _, seen := range append(found.For, found.Against...) {
				assert.NotContains(t, seen.Value, "ports ?", "the port range was read")
			}
		}
	}
}

// fakeProc is a /proc with two processes in two namespaces: our own and 42.
func fakeProc(t *testing.T) string {
	t.Helper()
	proc := t.TempDir()
	files := map[string]string{
		"thread-self/net/netstat":          "TcpExt: ListenDrops\nTcpExt: 1\n",
		"thread-self/net/snmp":             "Tcp: ActiveOpens\nTcp: 2\n",
		"thread-self/net/sockstat":         "TCP: inuse 3 orphan 0 tw 4 alloc 9 mem 9\n",
		"42/net/netstat":                   "TcpExt: ListenDrops\nTcpExt: 11\n",
		"42/net/snmp":                      "Tcp: ActiveOpens\nTcp: 12\n",
		"42/net/sockstat":                  "TCP: inuse 13 orphan 0 tw 14 alloc 9 mem 9\n",
		"sys/net/ipv4/ip_local_port_range": "32768\t60999\n",
		"sys/net/core/somaxconn":           "4096\n",
		"43/net/sockstat":                  "",
	}
	for name, text := range files {
		path := filepath.Join(proc, name)
		require.NoError(t, os.MkdirAll(filepath.Dir(path), 0o755))
		require.NoError(t, os.WriteFile(path, []byte(text), 0o600))
	}
	for process, namespace := range map[string]string{"thread-self": "net:[1]", "42": "net:[2]"} {
		require.NoError(t, os.MkdirAll(filepath.Join(proc, process, "ns"), 0o755))
		require.NoError(t, os.Symlink(namespace, filepath.Join(proc, process, "ns", "net")))
	}
	return proc
}

func TestLiveSnapshot(t *testing.T) {
	proc := fakeProc(t)
	var notes strings.Builder
	own, err := liveSnapshot(proc, &notes, 0)
	require.NoError(t, err)
	assert.Equal(t, int64(1), own.Counters["TcpExt.ListenDrops"])
	assert.Equal(t, int64(4), own.Counters["sockstat.TCP.tw"])
	assert.Equal(t, map[string]string{"net.ipv4.ip_local_port_range": "32768\t60999", "net.core.somaxconn": "4096"}, own.Sysctls,
		"those that this kernel has")
	assert.Empty(t, notes.String())

	other, err := liveSnapshot(proc, &notes, 42)
	require.NoError(t, err)
	assert.Equal(t, int64(11), other.Counters["TcpExt.ListenDrops"])
	assert.Equal(t, int64(12), other.Counters["Tcp.ActiveOpens"])
	assert.Equal(t, int64(14), other.Counters["sockstat.TCP.tw"])
	assert.Empty(t, other.Sysctls, "ours are not its")
	assert.Contains(t, notes.String(), "process 42 is in another network namespace")

	_, err = liveSnapshot(proc, &notes, 43)
	assert.ErrorContains(t, err, "43/net/netstat")
}
