package main

import (
	"bytes"
	"encoding/json"
	"fmt"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"syscall"
	"testing"
	"time"

	"github.com/stretchr/testify/assert"
	"github.com/stretchr/testify/require"

	"connlab/loadgen"
	"connlab/netlab"
	"connlab/results"
	"connlab/scenarios"
)

// asConnlab makes the test binary be connlab: runs start it as `connlab server`,
// `connlab proxy` and `connlab fleet`, and tests start it as another user or to interrupt it.
const asConnlab = "CONNLAB_TEST_AS_CONNLAB"

func TestMain(m *testing.M) {
	if os.Getenv(asConnlab) != "" || len(os.Args) > 1 && slices.Contains([]string{"server", "proxy", "fleet"}, os.Args[1]) {
		os.Exit(connlab(os.Args[1:], os.Stdin, os.Stdout, os.Stderr))
	}
	os.Exit(m.Run())
}

type outcome struct {
	code           int
	stdout, stderr string
}

func run(args ...string) outcome {
	var stdout, stderr bytes.Buffer
	code := connlab(args, strings.NewReader(""), &stdout, &stderr)
	return outcome{code, stdout.String(), stderr.String()}
}

func TestUsageErrors(t *testing.T) {
	for _, tt := range []struct {
		why  string
		args []string
		want string
	}{
		{"unknown verb", []string{"fly"}, `unknown verb "fly"; there is: list, show, run`},
		{"unknown flag", []string{"run", "backlog", "--fast"}, "unknown flag: --fast"},
		{"no incident", []string{"run"}, "connlab run wants an incident"},
		{"unknown incident", []string{"run", "flood"}, `unknown incident "flood"; there is: backlog`},
		{"unknown incident to show", []string{"show", "flood"}, `unknown incident "flood"`},
		{"unknown variant", []string{"run", "backlog", "--variant", "x"}, `has no variant "x"; there is: incident`},
		{"unknown parameter", []string{"run", "backlog", "--set", "speed=9"}, `unknown parameter "speed"; there is: abort`},
		{"value of another type", []string{"run", "backlog", "--set", "stall=long"}, "--set stall=long"},
		{"value out of range", []string{"run", "backlog", "--set", "hosts=5000"}, "hosts=5000 is out of range: 1 to 1000"},
		{"unknown server", []string{"run", "backlog", "--server", "memcached"}, `unknown server "memcached"; there is: mini, redis`},
		{"a record that is not there", []string{"compare", "nope.json", "nope.json"}, "nope.json"},
		{"one record", []string{"compare", "a.json"}, "wants two records"},
		{"somebody else's server", []string{"load", "--addr", "192.0.2.1:6379"}, "add --i-operate-this-target"},
		{"a name for an address", []string{"load", "--addr", "localhost:6379"}, "want an IPv4 address and a port"},
		{"no rate", []string{"load", "--rate", "0"}, "--rate 0 is out of range"},
		{"a rate that is no number", []string{"load", "--rate", "NaN"}, "--rate NaN is out of range"},
		{"no time", []string{"load", "--duration", "-1s"}, "--duration -1s is out of range"},
		{"server flag out of range", []string{"server", "--hz", "0"}, "hz"},
	} {
		t.Run(tt.why, func(t *testing.T) {
			o := run(tt.args...)
			assert.Equal(t, exitUsage, o.code)
			assert.Contains(t, o.stderr, tt.want)
			assert.Empty(t, o.stdout)
			if tt.args[0] != "server" { // its flags are listed below the line
				assert.Equal(t, 1, strings.Count(o.stderr, "\n"), "one line: %s", o.stderr)
			}
		})
	}
}

func TestListAndShow(t *testing.T) {
	o := run("list")
	require.Equal(t, exitOK, o.code, o.stderr)
	for _, s := range scenarios.All {
		assert.Contains(t, o.stdout, s.Name)
		shown := run("show", s.Name)
		require.Equal(t, exitOK, shown.code, shown.stderr)
		for _, v := range s.Variants {
			assert.Contains(t, o.stdout, v.Name)
			assert.Contains(t, shown.stdout, v.Summary)
		}
		for _, p := range s.Parameters() {
			assert.Contains(t, shown.stdout, p.Name)
		}
	}
}

func TestHelpTeaches(t *testing.T) {
	for _, verb := range []string{"list", "show", "run", "compare", "doctor", "server", "load", "fleet"} {
		o := run(verb, "--help")
		assert.Equal(t, exitOK, o.code, verb)
		assert.Contains(t, o.stdout, "Usage:", verb)
	}
	assert.Contains(t, run().stdout, "Start here:")
	assert.Contains(t, run("run", "--help").stdout, "Exit codes: 0 all held")
}

func TestCompare(t *testing.T) {
	golden := filepath.Join("..", "..", "results", "golden", "backlog.json")
	same := run("compare", golden, golden)
	assert.Equal(t, exitOK, same.code, same.stderr)

	rec, err := results.Load(golden)
	require.NoError(t, err)
	v := &rec.Variants[0]
	v.Metrics["clients/Connect.Victims"] = results.Metric{Value: 7, Unit: "connections"}
	v.Judge()
	worse, err := results.Save(t.TempDir(), rec)
	require.NoError(t, err)
	o := run("compare", golden, worse)
	assert.Equal(t, exitRefuted, o.code, "a verdict is worse")
	assert.Contains(t, o.stdout, "refuted")
	o = run("compare", golden, worse, "--json")
	assert.True(t, json.Valid([]byte(o.stdout)), "one JSON document")
}

func TestDoctor(t *testing.T) {
	o := run("doctor", "--json")
	var findings []netlab.Finding
	require.NoError(t, json.Unmarshal([]byte(o.stdout), &findings))
	assert.Greater(t, len(findings), 8)
	for _, f := range findings {
		assert.NotContains(t, f.Detail, "not probed", f.Need)
	}
	people := run("doctor")
	assert.Equal(t, o.code, people.code)
	assert.Equal(t, len(findings), strings.Count(people.stdout, "\nok  ")+strings.Count(people.stdout, "\nLACK")+1, people.stdout)
}

func TestDoctorTellsTheCost(t *testing.T) {
	var b strings.Builder
	writeFindings(&b, []netlab.Finding{
		{Need: netlab.NeedVeth, OK: true, Detail: "made a pair", Cost: "no links"},
		{Need: netlab.NeedNetem, Detail: "not there", Cost: "a pump does it"},
	})
	assert.Regexp(t, `^ok    veth +made a pair\nLACK  netem +not there\n +a pump does it\n$`, b.String())
}

// freePort finds a port that was free a moment ago.
func freePort(t *testing.T) string {
	t.Helper()
	l, err := net.Listen("tcp4", "127.0.0.1:0")
	require.NoError(t, err)
	defer l.Close()
	return l.Addr().String()
}

// startServer runs `connlab server` as a process and waits until it answers.
func startServer(t *testing.T) (addr string) { return startListener(t, "server") }

// startListener does so with any verb that listens on an --addr.
func startListener(t *testing.T, verb string, args ...string) (addr string) {
	t.Helper()
	addr = freePort(t)
	cmd := exec.Command(os.Args[0], append([]string{verb, "--addr", addr}, args...)...)
	require.NoError(t, cmd.Start())
	t.Cleanup(func() {
		assert.NoError(t, cmd.Process.Signal(syscall.SIGTERM))
		assert.NoError(t, cmd.Wait(), "SIGTERM is an orderly end")
	})
	require.Eventually(t, func() bool {
		conn, err := net.Dial("tcp4", addr)
		if err == nil {
			conn.Close()
		}
		return err == nil
	}, 10*time.Second, 5*time.Millisecond)
	return addr
}

func TestServerAndLoad(t *testing.T) {
	addr := startServer(t)

	o := run("server", "--addr", addr)
	assert.Equal(t, exitRefuted, o.code)
	assert.Contains(t, o.stderr, "address already in use")
	assert.Equal(t, 1, strings.Count(strings.TrimSpace(o.stderr), "\n")+1, "one line: %s", o.stderr)

	for _, args := range [][]string{{}, {"--held", "5"}, {"--poisson"}, {"--close-reset"}} {
		o = run(append([]string{"load", "--addr", addr, "--rate", "200", "--duration", "500ms", "--json", "-q"}, args...)...)
		var report loadgen.Report
		require.NoError(t, json.Unmarshal([]byte(o.stdout), &report), "%v: %s", args, o.stderr)
		assert.NoError(t, report.Balanced())
		assert.Equal(t, report.Due, report.OK, "%v: %v", args, report.Failed)
		assert.Contains(t, []int{exitOK, exitVoid}, o.code, "void if this machine is too busy: %s", o.stderr)
	}
	o = run("load", "--addr", addr, "--rate", "200", "--duration", "500ms", "-q")
	assert.Contains(t, o.stdout, "operations  due 100 = ok 100 + failed 0 + not started 0")
}

func TestLoadOfNobody(t *testing.T) {
	o := run("load", "--addr", freePort(t), "--rate", "100", "--duration", "100ms", "-q")
	assert.Contains(t, o.stdout, "connect_refused 10")
	assert.Contains(t, []int{exitRefuted, exitVoid}, o.code)
}

// needLab skips where no lab can stand.
func needLab(t *testing.T) {
	t.Helper()
	err := netlab.CheckPrivilege()
	if err == nil {
		return
	}
	if os.Getenv("CONNLAB_STRICT") == "1" {
		t.Fatal(err)
	}
	t.Skip(err)
}

// small makes a variant small and quick; its claims follow its parameters.
var small = []string{"--set", "hosts=10", "--set", "held=50", "--set", "rate=500", "--set", "backlog=64", "--set", "stall=600ms"}

func TestRun(t *testing.T) {
	needLab(t)
	dir := t.TempDir()
	o := run(append([]string{"run", "backlog", "--variant", "incident", "--json", "--save", dir, "--timeline", dir, "--counters", dir}, small...)...)
	require.Equal(t, exitOK, o.code, o.stdout+o.stderr)
	rec, err := results.Read(strings.NewReader(o.stdout))
	require.NoError(t, err, "one JSON document on standard output")
	assert.Equal(t, results.Held, rec.Verdict())
	assert.Contains(t, o.stderr, "backlog 1/1 incident: held", "progress on standard error")
	saved, err := filepath.Glob(filepath.Join(dir, "backlog-*.json"))
	require.NoError(t, err)
	require.Len(t, saved, 1)
	timeline, err := os.ReadFile(filepath.Join(dir, "backlog-incident.csv"))
	require.NoError(t, err)
	assert.Contains(t, string(timeline), "server,Listen.Depth,65", "the queue of 64+1 places was full")
	counters := filepath.Join(dir, "backlog-incident-server")
	o = run("diagnose", "--before", counters+".before.txt", counters+".after.txt")
	assert.Equal(t, exitOK, o.code, o.stderr)
	assert.Contains(t, o.stdout, "Verdict: backlog.", "what a run saves can be diagnosed")

	o = run(append([]string{"run", "backlog", "--variant", "incident", "-q", "--set", "stall=0s"}, small[:8]...)...)
	assert.Equal(t, exitRefuted, o.code, "no stall, no incident: %s", o.stdout)
	assert.Contains(t, o.stdout, "clients/Symptom: predicted")
	assert.Empty(t, o.stderr, "-q is quiet")
}

func TestRunWithoutPrivilege(t *testing.T) {
	bin := filepath.Join(t.TempDir(), "connlab-under-test")
	self, err := os.ReadFile(os.Args[0])
	require.NoError(t, err)
	require.NoError(t, os.WriteFile(bin, self, 0o755))
	// t.TempDir is its owner's only, and so is the folder above it.
	require.NoError(t, os.Chmod(filepath.Dir(bin), 0o755))
	require.NoError(t, os.Chmod(filepath.Dir(filepath.Dir(bin)), 0o755))
	cmd := exec.Command(bin, "run", "backlog")
	cmd.Env = append(os.Environ(), asConnlab+"=1")
	cmd.Dir = "/"
	if os.Geteuid() == 0 {
		cmd.SysProcAttr = &syscall.SysProcAttr{Credential: &syscall.Credential{Uid: 65534, Gid: 65534}}
	}
	out, err := cmd.CombinedOutput()
	var exit *exec.ExitError
	require.ErrorAs(t, err, &exit, "%s", out)
	assert.Equal(t, exitSkipped, exit.ExitCode(), "%s", out)
	assert.Contains(t, string(out), "needs CAP_NET_ADMIN + CAP_SYS_ADMIN")
	assert.Contains(t, string(out), "run it as root or with sudo")
	assert.Equal(t, 1, strings.Count(string(out), "\n"), "one line: %s", out)
}

func TestRunWithoutRedis(t *testing.T) {
	t.Setenv("PATH", t.TempDir())
	o := run("run", "backlog", "--server", "redis")
	assert.Equal(t, exitSkipped, o.code)
	assert.Contains(t, o.stderr, "apt-get install redis-server")
	assert.Equal(t, 1, strings.Count(o.stderr, "\n"), "one line")
	assert.Empty(t, o.stdout)
}

// An interrupt in the middle of a run ends it in order: the record so far, no
// process left, exit code void.
func TestRunInterrupted(t *testing.T) {
	needLab(t)
	cmd := exec.Command(os.Args[0], append([]string{"run", "backlog", "--variant", "incident"}, small...)...)
	token := fmt.Sprintf("CONNLAB_TEST_INTERRUPTED=%d", time.Now().UnixNano())
	cmd.Env = append(os.Environ(), asConnlab+"=1", token)
	var stdout bytes.Buffer
	cmd.Stdout = &stdout
	progress, err := cmd.StderrPipe()
	require.NoError(t, err)
	require.NoError(t, cmd.Start())
	buf := make([]byte, 4096)
	for said := ""; !strings.Contains(said, "opening"); {
		n, err := progress.Read(buf)
		require.NoError(t, err, said)
		said += string(buf[:n])
	}
	require.NoError(t, cmd.Process.Signal(syscall.SIGINT))
	go func() { // keep reading, or it blocks
		for {
			if _, err := progress.Read(buf); err != nil {
				return
			}
		}
	}()
	err = cmd.Wait()
	var exit *exec.ExitError
	require.ErrorAs(t, err, &exit)
	assert.Equal(t, exitVoid, exit.ExitCode(), stdout.String())
	assert.Contains(t, stdout.String(), "interrupted")
	environs, err := filepath.Glob("/proc/[0-9]*/environ")
	require.NoError(t, err)
	for _, path := range environs {
		env, err := os.ReadFile(path)
		if err == nil {
			assert.NotContains(t, strings.Split(string(env), "\x00"), token, "%s is left", filepath.Dir(path))
		}
	}
}
