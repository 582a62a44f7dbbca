package main

import (
	"bufio"
	"bytes"
	"encoding/json"
	"fmt"
	"net/netip"
	"os"
	"os/exec"
	"regexp"
	"strings"
	"testing"
	"time"

	"github.com/stretchr/testify/assert"
	"github.com/stretchr/testify/require"
	"golang.org/x/sys/unix"

	"connlab/loadgen"
)

// backlogOfOne listens on loopback with room for two connections, and accepts
// none.
func backlogOfOne(t *testing.T) (listener int, target netip.AddrPort) {
	t.Helper()
	fd, err := unix.Socket(unix.AF_INET, unix.SOCK_STREAM|unix.SOCK_CLOEXEC, 0)
	require.NoError(t, err)
	t.Cleanup(func() { assert.NoError(t, unix.Close(fd)) })
	require.NoError(t, unix.Bind(fd, &unix.SockaddrInet4{Addr: [4]byte{127, 0, 0, 1}}))
	require.NoError(t, unix.Listen(fd, 1))
	local, err := unix.Getsockname(fd)
	require.NoError(t, err)
	return fd, netip.AddrPortFrom(netip.MustParseAddr("127.0.0.1"), uint16(local.(*unix.SockaddrInet4).Port))
}

// waiting is the number of connects to a port of loopback that have had no
// answer: sockets in SYN_SENT, which is state 02 in the table.
func waiting(target netip.AddrPort) (int, error) {
	table, err := os.ReadFile("/proc/thread-self/net/tcp")
	return strings.Count(string(table), fmt.Sprintf(" 0100007F:%04X 02 ", target.Port())), err
}

// acceptOnceWaiting accepts the two that fit and those that wait, once there
// are so many of them.
func acceptOnceWaiting(listener int, target netip.AddrPort, wanted int) error {
	n, err := waiting(target)
	for deadline := time.Now().Add(20 * time.Second); err == nil && n < wanted; n, err = waiting(target) {
		if time.Now().After(deadline) {
			return fmt.Errorf("%d connects wait after 20 s, want %d", n, wanted)
		}
		time.Sleep(time.Millisecond)
	}
	for range 2 + wanted {
		fd, _, acceptErr := unix.Accept4(listener, unix.SOCK_CLOEXEC)
		if acceptErr != nil {
			return acceptErr
		}
		_ = unix.Close(fd)
	}
	return err
}

func decodeConnects(t *testing.T, o outcome) connectReport {
	t.Helper()
	var report connectReport
	require.NoError(t, json.Unmarshal([]byte(o.stdout), &report), "one JSON document: %s", o.stderr)
	require.NoError(t, report.Load.Balanced())
	return report
}

func TestConnectsToGoodTargets(t *testing.T) {
	first := redises(t, 2)
	o := run("probe", "--connect-only", fmt.Sprintf("%v+2:%d", first.Addr(), first.Port()), "--every", "20ms", "--for", "200ms", "--local", "127.79.0.9", "--ports", "bind", "--json", "-q")
	assert.Empty(t, o.stderr, "-q is quiet")
	report := decodeConnects(t, o)
	assert.EqualValues(t, 20, report.Load.Due, "ten for each")
	assert.EqualValues(t, 20, report.Load.OK)
	require.Len(t, report.Targets, 2)
	for _, target := range report.Targets {
		assert.EqualValues(t, 10, target.OK, target.Target)
	}
	require.Len(t, report.Attempts, 20)
	for _, a := range report.Attempts {
		assert.Equal(t, "127.79.0.9", a.Local.Addr().String())
		assert.NotZero(t, a.Local.Port())
		assert.GreaterOrEqual(t, a.Connected, a.Started)
	}
	// A pause of this machine may make one of them slow: then it must say so.
	assert.Equal(t, report.Slow > 0, o.code == exitRefuted, o.code)
	assert.Equal(t, report.Slow == 0, o.code == exitOK, o.code)
}

// Two connections fit and stay in the queue, closed as they are: a listener that
// accepts nothing never answers another SYN, and the prober does not wait for it.
func TestConnectsToAFullQueue(t *testing.T) {
	_, target := backlogOfOne(t)
	o := run("probe", "--connect-only", target.String(), "--every", "50ms", "--for", "1250ms", "--timeout", "200ms")
	assert.Equal(t, exitRefuted, o.code)
	assert.Contains(t, o.stdout, "connects  due 25 = ok 2 + failed 23 + not started 0; ")
	assert.Contains(t, o.stdout, "failed    connect_timeout 23\n")
	assert.Regexp(t, `(?m)^  gave up      after 0\.2 s +23  █+$`, o.stdout)
	assert.Regexp(t, `(?m)^  xx$`, o.stdout, "a column for each second")
	assert.Len(t, regexp.MustCompile(`(?m)^\d\d:\d\d:\d\d\.\d{3}  `+regexp.QuoteMeta(target.String())+`  Connecting… gave up after \d\.\d{3} s$`).FindAllString(o.stderr, -1), maxLinesOfAKind)
	assert.Contains(t, o.stderr, "and 3 more like it: connect_timeout\n")
}

// A listener that begins to accept while connects hang: the next SYN gets in.
func TestConnectsRecoverAtARetry(t *testing.T) {
	listener, target := backlogOfOne(t)
	const dropped = 2
	accepted := make(chan error, 1)
	go func() { accepted <- acceptOnceWaiting(listener, target, dropped) }()
	o := run("probe", "--connect-only", target.String(), "--every", "10ms", "--for", "40ms", "--json")
	require.NoError(t, <-accepted)
	assert.Equal(t, exitRefuted, o.code)
	report := decodeConnects(t, o)
	assert.InDelta(t, connectTimeout.Seconds(), report.Timeout, 0, "by default, with --connect-only")
	assert.EqualValues(t, 4, report.Load.Due)
	assert.EqualValues(t, 4, report.Load.OK)
	assert.EqualValues(t, 2, report.OKAtRetry[0], "backlog + 1")
	atRetries := int64(0)
	for _, n := range report.OKAtRetry[1:] {
		atRetries += n
	}
	assert.EqualValues(t, dropped, atRetries, "at the first, unless this machine paused: %v", report.OKAtRetry)
	assert.Regexp(t, `(?m)Connecting… \d+\.\d{3} s \(SYN retry \d\)$`, o.stderr)
}

func TestConnectsInterrupted(t *testing.T) {
	target := unanswering(t)
	cmd := exec.Command(os.Args[0], "probe", "--connect-only", target.String(), "--for", "1h")
	cmd.Env = append(os.Environ(), asConnlab+"=1")
	var stdout bytes.Buffer
	cmd.Stdout = &stdout
	stderr, err := cmd.StderrPipe()
	require.NoError(t, err)
	require.NoError(t, cmd.Start())
	said, told := "", false
	for lines := bufio.NewScanner(stderr); lines.Scan(); {
		said += lines.Text() + "\n"
		if strings.Contains(lines.Text(), "in flight") && !told { // the progress, once a second
			told = true
			require.NoError(t, cmd.Process.Signal(unix.SIGINT))
		}
	}
	var exit *exec.ExitError
	require.ErrorAs(t, cmd.Wait(), &exit)
	assert.Equal(t, exitVoid, exit.ExitCode(), said)
	assert.Contains(t, said, "connlab: interrupted")
	assert.Regexp(t, `(?m)^connects  due \d+ = ok 0 \+ failed \d+ \+ not started \d+;`, stdout.String(), "what was seen before")
	assert.Regexp(t, `(?m)^  interrupted +\d+  █+$`, stdout.String())
}

func TestConnectUsage(t *testing.T) {
	for _, test := range []struct {
		args []string
		want string
	}{
		{[]string{"--connect-only"}, "wants a target"},
		{[]string{"--connect-only", "127.0.0.1+11"}, "at most 10; these are 11"},
		{[]string{"--connect-only", "127.0.0.1", "--rounds", "2"}, "--rounds does not go with --connect-only: it has no rounds"},
		{[]string{"--connect-only", "127.0.0.1", "--retries", "3"}, "--retries does not go with --connect-only: it tries nothing again"},
		{[]string{"--connect-only", "127.0.0.1", "--interval", "1s"}, "--interval does not go with --connect-only"},
		{[]string{"--connect-only", "127.0.0.1", "--rate", "5"}, "--rate does not go with --connect-only"},
		{[]string{"--connect-only", "127.0.0.1", "--every", "0s"}, "--every 0s is out of range: 1ms to 1h"},
		{[]string{"--connect-only", "127.0.0.1", "--for", "25h"}, "--for 25h0m0s is out of range: above 0, at most 24h"},
		{[]string{"--connect-only", "127.0.0.1", "--timeout", "0s"}, "--timeout 0s is out of range"},
		{[]string{"--connect-only", "127.0.0.1", "--ports", "odd"}, "--ports odd: want kernel"},
		{[]string{"127.0.0.1", "--every", "1s"}, "--every says how often --connect-only connects: give that, too"},
		{[]string{"127.0.0.1", "--for", "1s"}, "--for says how often"},
	} {
		o := run(append([]string{"probe"}, test.args...)...)
		assert.Equal(t, exitUsage, o.code, test.args)
		assert.Contains(t, o.stderr, test.want)
		assert.Equal(t, 1, strings.Count(o.stderr, "\n"), "one line: %s", o.stderr)
		assert.Empty(t, o.stdout)
	}
}

func TestConnectTicks(t *testing.T) {
	const ms = time.Millisecond
	var due []time.Duration
	for at := range connectTicks(100*ms, 250*ms, 2) {
		due = append(due, at)
	}
	assert.Equal(t, []time.Duration{0, 0, 100 * ms, 100 * ms, 200 * ms, 200 * ms}, due)
	assert.Equal(t, 600, connectTicks(100*ms, time.Minute, 1).Count(), "the end is not part of it")
}

func TestRetriesWithin(t *testing.T) {
	const s = time.Second
	for _, row := range []struct {
		why     string
		linear  int
		timeout time.Duration
		want    []time.Duration
	}{
		{"four linear timeouts", 4, 30 * s, []time.Duration{1 * s, 2 * s, 3 * s, 4 * s, 5 * s, 7 * s, 11 * s, 19 * s}},
		{"none", 0, 30 * s, []time.Duration{1 * s, 3 * s, 7 * s, 15 * s}},
		{"one that would go out as the connect ends", 0, 3 * s, []time.Duration{1 * s}},
		{"given up before the first", 4, s / 2, []time.Duration{}},
	} {
		assert.Equal(t, row.want, retriesWithin(row.linear, row.timeout), row.why)
	}
}

// connectOp is a connect that was due and started at one time and took so long.
func connectOp(index int, due, took time.Duration, class loadgen.Class) loadgen.Op {
	op := loadgen.Op{Index: index, Target: netip.MustParseAddrPort("10.66.0.2:6379"), Due: due, Started: due, Done: due + took, Class: class}
	if class == loadgen.OK {
		op.Connected = op.Done
	}
	return op
}

func TestConnectLine(t *testing.T) {
	start := time.Date(2026, 1, 2, 10, 41, 3, 0, time.Local)
	retries := []time.Duration{1 * time.Second, 3 * time.Second}
	const due, ms = 214 * time.Millisecond, time.Millisecond
	for _, test := range []struct {
		took  time.Duration
		class loadgen.Class
		want  string
	}{
		{499 * ms, loadgen.OK, ""},
		{500 * ms, loadgen.OK, "Connecting… 0.500 s (no SYN retry: the answer or this machine was slow)"},
		{1016 * ms, loadgen.OK, "Connecting… 1.016 s (SYN retry 1)"},
		{3021 * ms, loadgen.OK, "Connecting… 3.021 s (SYN retry 2)"},
		{30_001 * ms, loadgen.ConnectTimeout, "Connecting… gave up after 30.001 s"},
		{0, loadgen.ConnectRefused, "Connecting… failed after 0.000 s: connect_refused"},
		{0, loadgen.NotStarted, "not started: too many connects in flight"},
		{5 * time.Second, loadgen.Canceled, ""},
	} {
		want := test.want
		if want != "" {
			want = "10:41:03.214  10.66.0.2:6379  " + want
		}
		assert.Equal(t, want, connectLine(start, connectOp(0, due, test.took, test.class), retries))
	}
}

func TestConnectReport(t *testing.T) {
	const s, ms = time.Second, time.Millisecond
	target := netip.MustParseAddrPort("10.66.0.2:6379")
	r := newConnectReport([]netip.AddrPort{target}, 100*ms, 5*s, 30*s, retriesWithin(0, 30*s))
	r.Load = loadgen.NewReport()
	count := func(due, took time.Duration, class loadgen.Class, times int) {
		for range times {
			r.add(connectOp(0, due, took, class))
			r.Load.Due++
			if class == loadgen.NotStarted {
				r.Load.NotStarted++
				continue
			}
			r.Load.Started++
			if class == loadgen.OK {
				r.Load.OK++
			} else {
				r.Load.Failed[class]++
			}
		}
	}
	count(0, 300*time.Microsecond, loadgen.OK, 80)
	count(1*s, 600*ms, loadgen.OK, 1)
	count(1*s, 1016*ms, loadgen.OK, 8)
	count(3*s, 7016*ms, loadgen.OK, 2)
	count(4*s, 30*s, loadgen.ConnectTimeout, 4)
	count(4*s, 0, loadgen.ConnectRefused, 3)
	count(5*s, 9*s, loadgen.Canceled, 1)
	count(6*s, 0, loadgen.NotStarted, 1)
	require.NoError(t, r.Load.Balanced())
	var out strings.Builder
	require.NoError(t, r.write(&out))
	assert.Equal(t, `connects  due 100 = ok 91 + failed 8 + not started 1; 11 of those ok took 500ms or longer
failed    canceled 1, connect_refused 3, connect_timeout 4
answered
  first SYN    under 0.5 s       80  ████████████████████████████████████████
  first SYN    later              1  █
  SYN retry 1  from 1 s           8  ████
  SYN retry 2  from 3 s           0
  SYN retry 3  from 7 s           2  █
  gave up      after 30 s         4  ██
  failed                          3  █
  interrupted                     1  █
slowest connect that came due in each second: ▁ under 0.5 s, ▂ from 0.5 s, ▃ from 1 s, ▄ 2, ▅ 4, ▆ 8, ▇ 16, █ 32; x failed
  ▁▃·▅x▆x
`, out.String())
	assert.EqualValues(t, 11, r.Slow)
	assert.Equal(t, []int64{81, 8, 0, 2, 0}, r.OKAtRetry)
	assert.Equal(t, loadgen.Counts{loadgen.ConnectTimeout: 4, loadgen.ConnectRefused: 3, loadgen.Canceled: 1, loadgen.NotStarted: 1}, r.Targets[0].Failed)
	assert.Equal(t, "▃▅xx", timeline(r.SlowestBySecond, 2), "two seconds a column")
}

func TestConnectReportOfManyKeepsTheFirst(t *testing.T) {
	r := newConnectReport([]netip.AddrPort{netip.MustParseAddrPort("10.66.0.2:6379")}, time.Millisecond, time.Minute, time.Second, nil)
	for i := range maxConnectAttempts + 7 {
		r.add(connectOp(i, 0, time.Millisecond, loadgen.OK))
	}
	assert.Len(t, r.Attempts, maxConnectAttempts)
	assert.EqualValues(t, 7, r.AttemptsLeftOut)
	assert.Equal(t, []int64{maxConnectAttempts + 7}, r.OKAtRetry, "the counts know them all")
}
