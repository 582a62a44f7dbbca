package loadgen

import (
	"bufio"
	"bytes"
	"context"
	"encoding/json"
	"fmt"
	"io"
	"net/netip"
	"os"
	"os/exec"
	"runtime/debug"
	"slices"
	"strconv"
	"strings"
	"sync"
	"testing"
	"time"
	"unsafe"

	"github.com/stretchr/testify/assert"
	"github.com/stretchr/testify/require"
	"golang.org/x/sys/unix"
)

// controlled runs the program in this process and returns its other end.
func controlled(t *testing.T, target netip.AddrPort, args ...string) (client *FleetClient, exit func() int) {
	t.Helper()
	inRead, inWrite := io.Pipe()
	outRead, outWrite := io.Pipe()
	code := -1
	var program sync.WaitGroup
	program.Go(func() {
		code = FleetMain(context.Background(), append([]string{"--addr", target.String(), "--control"}, args...), inRead, outWrite, io.Discard)
		_ = outWrite.Close()
	})
	client = NewFleetClient(inWrite, outRead)
	exit = func() int {
		assert.NoError(t, client.Close())
		program.Wait()
		return code
	}
	t.Cleanup(func() { exit() })
	return client, exit
}

func TestFleetUnderControl(t *testing.T) {
	const n = 60
	server := new(peers)
	client, exit := controlled(t, serve(t, server.pong), "--clients", strconv.Itoa(n), "--source", "127.0.0.2,127.0.0.3", "--spread", "50ms", "--jitter")
	do := func(command string) *FleetReport {
		t.Helper()
		report, err := client.Do(t.Context(), command)
		require.NoError(t, err)
		return report
	}
	assert.EqualValues(t, n, do("fill").OK)
	assert.EqualValues(t, n, do("ping 10000").OK)
	do("arm")
	server.cut(t, 0, 20, true)
	eventually(t, func() (bool, any) {
		report := do("report")
		return report.Cut[ReadReset] == 20 && report.Open == n-20, report.Cut
	})
	storm := do(fmt.Sprintf("storm %d 20000", time.Now().Add(50*ms).UnixMicro()))
	assert.EqualValues(t, 20, storm.OK)
	assert.EqualValues(t, n, storm.Open)
	assert.Equal(t, Counts{ReadReset: 20}, storm.Cut)
	assert.Equal(t, storm.OK, do("report").OK)
	assert.EqualValues(t, n, do("quit").Open)
	assert.Zero(t, exit())
	_, err := client.Do(t.Context(), "report")
	require.Error(t, err, "it has ended")
	_, err = client.Do(t.Context(), "report")
	require.ErrorContains(t, err, "after")
}

func TestFleetRefusesCommands(t *testing.T) {
	client, exit := controlled(t, serve(t, pong), "--clients", "3")
	for command, want := range map[string]string{
		"":                      `unknown command ""`,
		"fly":                   "there is: fill, arm, storm <unix µs> <settle ms>",
		"fill 3":                "unknown command",
		"storm":                 "unknown command",
		"storm soon 5":          `"soon" is no whole number`,
		"storm 1 1000":          "more than 1h0m0s",
		"storm 1e9 1000":        "no whole number",
		"ping 0":                "out of range",
		"ping -3":               "out of range",
		"ping 9999999999999999": "out of range",
	} {
		report, err := client.Do(t.Context(), command)
		require.ErrorContains(t, err, want, command)
		assert.Nil(t, report)
	}
	now := time.Now().UnixMicro()
	_, err := client.Do(t.Context(), fmt.Sprintf("storm %d 0", now))
	require.ErrorContains(t, err, "to settle are out of range")
	_, err = client.Do(t.Context(), fmt.Sprintf("storm %d 1000", now))
	require.ErrorContains(t, err, "begins with Arm")
	report, err := client.Do(t.Context(), "fill")
	require.NoError(t, err, "it goes on")
	assert.EqualValues(t, 3, report.Open)
	assert.Zero(t, exit(), "the end of the input is the end")
}

func TestFleetErrorsComeWithTheAccount(t *testing.T) {
	_, target := boundSocket(t)
	client, _ := controlled(t, target, "--clients", "3")
	report, err := client.Do(t.Context(), "fill")
	require.ErrorContains(t, err, "connect_refused")
	require.NotNil(t, report)
	assert.Positive(t, report.Failed[ConnectRefused])
}

// Whoever waits for an answer can give up: the fleet sees the end of its input.
func TestFleetClientCanceled(t *testing.T) {
	inRead, inWrite := io.Pipe()
	outRead, outWrite := io.Pipe()
	defer outWrite.Close()
	client := NewFleetClient(inWrite, outRead)
	ctx, cancel := context.WithCancel(t.Context())
	var reading sync.WaitGroup
	reading.Go(func() {
		lines := bufio.NewScanner(inRead)
		assert.True(t, lines.Scan())
		assert.Equal(t, "fill", lines.Text())
		cancel()
		assert.False(t, lines.Scan())
	})
	_, err := client.Do(ctx, "fill")
	require.ErrorIs(t, err, context.Canceled)
	reading.Wait()
	_, err = client.Do(t.Context(), "report")
	require.ErrorContains(t, err, "after context canceled")
}

func TestFleetClientMistrustsAnswers(t *testing.T) {
	for _, tt := range []struct{ why, answer, want string }{
		{"to another command", `{"command":"arm"}`, `the answer is to "arm"`},
		{"no JSON", `ready`, "the answer: "},
		{"an account that does not balance", `{"command":"fill","report":{"attempts":1}}`, "does not balance"},
		{"none", ``, "waiting for the answer: EOF"},
	} {
		client := NewFleetClient(discardCloser{}, strings.NewReader(strings.TrimPrefix(tt.answer+"\n", "\n")))
		_, err := client.Do(t.Context(), "fill")
		require.ErrorContains(t, err, tt.want, tt.why)
	}
	_, err := NewFleetClient(discardCloser{}, strings.NewReader("")).Do(t.Context(), "arm\nfill")
	require.ErrorContains(t, err, "one line")
}

type discardCloser struct{}

func (discardCloser) Write(b []byte) (int, error) { return len(b), nil }
func (discardCloser) Close() error                { return nil }

func FuzzFleetCommand(f *testing.F) {
	for _, line := range []string{"arm", "report", "storm 1 1", "ping 0", "storm 99999999999999999999 1", "fill x", "", "\x00", "quit", "report  "} {
		f.Add(line)
	}
	fleet, err := NewFleet(FleetConfig{Target: netip.MustParseAddrPort("127.0.0.1:1"), Clients: 1})
	require.NoError(f, err)
	defer fleet.Close()
	ctx, cancel := context.WithCancel(f.Context())
	cancel() // what is a command does not get far
	f.Fuzz(func(t *testing.T, line string) {
		report, err := fleet.do(ctx, line)
		if err == nil {
			require.NotNil(t, report)
			require.NoError(t, report.Balanced())
		}
	})
}

func TestFleetByHand(t *testing.T) {
	target := serve(t, pong).String()
	var stdout, stderr bytes.Buffer
	code := FleetMain(t.Context(), []string{"--addr", target, "--clients", "20", "--for", "50ms", "--json"}, nil, &stdout, &stderr)
	require.Zero(t, code, stderr.String())
	var reports map[string]*FleetReport
	require.NoError(t, json.Unmarshal(stdout.Bytes(), &reports))
	assert.EqualValues(t, 20, reports["fill"].OK)
	assert.EqualValues(t, 20, reports["held"].Open)
	assert.GreaterOrEqual(t, reports["held"].Took(), 50*ms)

	stdout.Reset()
	code = FleetMain(t.Context(), []string{"--addr", target, "--clients", "20", "--for", "1ms"}, nil, &stdout, &stderr)
	require.Zero(t, code, stderr.String())
	assert.Contains(t, stdout.String(), "filled    20 of 20 clients connected")
	assert.Contains(t, stdout.String(), "held      20 of 20 clients connected")
	assert.Empty(t, stderr.String(), "no progress but on a terminal")

	_, gone := boundSocket(t)
	code = FleetMain(t.Context(), []string{"--addr", gone.String(), "--clients", "2"}, nil, &stdout, &stderr)
	assert.Equal(t, fleetFailed, code)
	assert.Contains(t, stdout.String(), "failed    connect_refused")
	assert.Contains(t, stderr.String(), "0 of 2 clients are connected")

	ctx, cancel := context.WithCancel(t.Context())
	cancel()
	assert.Equal(t, fleetInterrupted, FleetMain(ctx, []string{"--addr", target}, nil, io.Discard, io.Discard))
}

func TestFleetUsage(t *testing.T) {
	for _, tt := range []struct {
		args []string
		want string
	}{
		{[]string{"--addr", "localhost:1"}, "want an IPv4 address and a port"},
		{[]string{"--addr", "192.0.2.1:1"}, "add --i-operate-this-target"},
		{[]string{"--clients", "0"}, "out of range"},
		{[]string{"--window", "0"}, "must be above 0"},
		{[]string{"--source", "127.0.0.2,x"}, "--source x"},
		{[]string{"--for", "0s"}, "--for 0s is out of range"},
		{[]string{"--spread", "-1s"}, "negative"},
		{[]string{"--fly"}, "not defined"},
		{[]string{"fly"}, "everything is a flag"},
	} {
		var stderr bytes.Buffer
		assert.Equal(t, fleetUsage, FleetMain(t.Context(), tt.args, nil, io.Discard, &stderr), tt.args)
		assert.Contains(t, stderr.String(), tt.want, tt.args)
	}
}

// What a connection costs this program is what makes many of them possible.
func TestFleetMemory(t *testing.T) {
	var limit unix.Rlimit
	require.NoError(t, unix.Getrlimit(unix.RLIMIT_NOFILE, &limit))
	if limit.Cur < 12_500 {
		// Fewer connections do not outweigh what the program itself takes.
		reason := fmt.Sprintf("6,000 connections take 12,500 open files, the limit here is %d (ulimit -n)", limit.Cur)
		if os.Getenv("CONNLAB_STRICT") == "1" {
			t.Fatal(reason)
		}
		t.Skip(reason)
	}
	n := 6000
	if raceDetector() {
		n = 600
	}
	target := epollServer(t)
	cmd := exec.CommandContext(t.Context(), os.Args[0], "--addr", target.String(), "--clients", strconv.Itoa(n), "--source", "127.0.0.2,127.0.0.3", "--control")
	cmd.Env = append(os.Environ(), asFleet+"=1")
	cmd.Stderr = os.Stderr
	stdin, err := cmd.StdinPipe()
	require.NoError(t, err)
	stdout, err := cmd.StdoutPipe()
	require.NoError(t, err)
	require.NoError(t, cmd.Start())
	defer func() {
		_ = stdin.Close()
		assert.NoError(t, cmd.Wait())
	}()
	client := NewFleetClient(stdin, stdout)
	_, err = client.Do(t.Context(), "report")
	require.NoError(t, err)
	before := anonymousMemory(t, cmd.Process.Pid)
	report, err := client.Do(t.Context(), "fill")
	require.NoError(t, err)
	require.EqualValues(t, n, report.Open)
	perClient := (anonymousMemory(t, cmd.Process.Pid) - before) / n
	t.Logf("%d bytes for each of %d connections; filled in %v", perClient, n, report.Took())
	assert.EqualValues(t, 40, unsafe.Sizeof(member{}))
	if !raceDetector() { // whose own memory comes on top
		assert.Less(t, perClient, 400)
	}
}

// anonymousMemory is RssAnon of proc(5), in bytes.
func anonymousMemory(t *testing.T, pid int) int {
	t.Helper()
	file, err := os.Open(fmt.Sprintf("/proc/%d/status", pid))
	require.NoError(t, err)
	defer file.Close()
	for lines := bufio.NewScanner(file); lines.Scan(); {
		if value, ok := strings.CutPrefix(lines.Text(), "RssAnon:"); ok {
			kib, err := strconv.Atoi(strings.TrimSuffix(strings.TrimSpace(value), " kB"))
			require.NoError(t, err)
			return kib << 10
		}
	}
	t.Fatal("no RssAnon in /proc/pid/status")
	return 0
}

func raceDetector() bool {
	info, _ := debug.ReadBuildInfo()
	return info != nil && slices.ContainsFunc(info.Settings, func(s debug.BuildSetting) bool { return s.Key == "-race" && s.Value == "true" })
}
