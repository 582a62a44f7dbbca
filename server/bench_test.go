package server

import (
	"bufio"
	"encoding/csv"
	"fmt"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"runtime"
	"slices"
	"strconv"
	"strings"
	"testing"
	"time"

	"github.com/stretchr/testify/require"
	"golang.org/x/sys/unix"

	"connlab/server/resp"
)

// skip ends a test that lacks something; with CONNLAB_STRICT=1 that is a failure.
func skip(tb testing.TB, reason string) {
	tb.Helper()
	if os.Getenv("CONNLAB_STRICT") == "1" {
		tb.Fatal("CONNLAB_STRICT=1, and " + reason)
	}
	tb.Skip(reason)
}

// tool returns the path of a program of a Debian package, or skips.
func tool(tb testing.TB, name, pkg string) string {
	tb.Helper()
	path, err := exec.LookPath(name)
	if err != nil {
		skip(tb, name+" is not installed: apt-get install "+pkg)
	}
	return path
}

// start runs a program until the test ends.
func start(tb testing.TB, cmd *exec.Cmd) {
	tb.Helper()
	cmd.SysProcAttr = &unix.SysProcAttr{Pdeathsig: unix.SIGKILL}
	// The parent-death signal goes out when the thread that started the child ends.
	runtime.LockOSThread()
	tb.Cleanup(runtime.UnlockOSThread)
	require.NoError(tb, cmd.Start(), "starting %s", cmd.Path)
	tb.Cleanup(func() {
		_ = cmd.Process.Kill()
		_ = cmd.Wait()
	})
}

// startProgram runs this package's server in a process of its own and returns its address and pid. The prefix goes
// before the program, as taskset does.
func startProgram(tb testing.TB, prefix []string, args ...string) (addr string, pid int) {
	tb.Helper()
	self, err := os.Executable()
	require.NoError(tb, err)
	argv := slices.Concat(prefix, []string{self, "--addr", "127.0.0.1:0"}, args)
	cmd := exec.Command(argv[0], argv[1:]...)
	cmd.Env = append(os.Environ(), asProgram+"=1")
	cmd.Stderr = os.Stderr
	out, err := cmd.StdoutPipe()
	require.NoError(tb, err)
	start(tb, cmd)
	line, err := bufio.NewReader(out).ReadString('\n')
	require.NoError(tb, err, "waiting for the ready line")
	_, err = fmt.Sscanf(strings.ReplaceAll(line, " backlog=", " "), "ready addr=%s", &addr)
	require.NoError(tb, err, "ready line %q", line)
	return addr, cmd.Process.Pid
}

// startRedis runs a real redis-server and returns its address and pid.
func startRedis(tb testing.TB, prefix []string, args ...string) (addr string, pid int) {
	tb.Helper()
	redis := tool(tb, "redis-server", "redis-server")
	// A free port: taken, seen, given back. The server is asked for until it answers, so losing the race fails the test.
	l, err := net.Listen("tcp4", "127.0.0.1:0")
	require.NoError(tb, err)
	addr = l.Addr().String()
	require.NoError(tb, l.Close())
	_, port, err := net.SplitHostPort(addr)
	require.NoError(tb, err)
	argv := slices.Concat(prefix, []string{redis, "--port", port, "--bind", "127.0.0.1", "--save", "", "--appendonly", "no",
		"--dir", tb.TempDir(), "--enable-debug-command", "yes"}, args)
	cmd := exec.Command(argv[0], argv[1:]...)
	start(tb, cmd)
	deadline := time.Now().Add(10 * time.Second)
	for {
		conn, err := net.Dial("tcp4", addr)
		if err == nil {
			require.NoError(tb, conn.Close())
			return addr, cmd.Process.Pid
		}
		require.True(tb, time.Now().Before(deadline), "redis-server does not answer on %s: %v", addr, err)
		time.Sleep(10 * time.Millisecond)
	}
}

// cpuSeconds returns what a process has used, from /proc/<pid>/stat.
func cpuSeconds(tb testing.TB, pid int) float64 {
	tb.Helper()
	b, err := os.ReadFile(filepath.Join("/proc", strconv.Itoa(pid), "stat"))
	require.NoError(tb, err)
	// The name in parentheses may hold blanks; utime and stime are the 12th and 13th fields behind it.
	fields := strings.Fields(string(b[strings.LastIndexByte(string(b), ')')+1:]))
	var ticks float64
	for _, f := range fields[11:13] {
		v, err := strconv.ParseFloat(f, 64)
		require.NoError(tb, err)
		ticks += v
	}
	return ticks / 100 // USER_HZ
}

// workload is one kind of load of redis-benchmark.
type workload struct {
	command  string
	pipeline int
	keys     int // in turn at random; 0 is one and the same key, which never leaves the processor's cache
	requests int
}

func (w workload) String() string {
	if w.keys > 0 {
		return fmt.Sprintf("%s-P%d-r%d", w.command, w.pipeline, w.keys)
	}
	return fmt.Sprintf("%s-P%d", w.command, w.pipeline)
}

// run returns requests per second, server CPU seconds per request, and how busy the client's core was, 0 to 1: near 1 it
// is redis-benchmark that limits the rate.
func (w workload) run(tb testing.TB, bench, addr string, pid int) (rate, cpu, busy float64) {
	tb.Helper()
	_, port, err := net.SplitHostPort(addr)
	require.NoError(tb, err)
	before := cpuSeconds(tb, pid)
	args := []string{"-c", "1", bench, "-h", "127.0.0.1", "-p", port, "-c", "50", "-t", w.command,
		"-P", strconv.Itoa(w.pipeline), "-n", strconv.Itoa(w.requests), "--csv"}
	if w.keys > 0 {
		args = append(args, "-r", strconv.Itoa(w.keys))
	}
	cmd := exec.Command("taskset", args...)
	began := time.Now()
	out, err := cmd.CombinedOutput()
	elapsed := time.Since(began)
	require.NoError(tb, err, "redis-benchmark: %s", out)
	rows, err := csv.NewReader(strings.NewReader(string(out))).ReadAll()
	require.NoError(tb, err, "%s", out)
	require.Len(tb, rows, 2, "%s", out)
	rate, err = strconv.ParseFloat(rows[1][1], 64)
	require.NoError(tb, err, "%s", out)
	used := cmd.ProcessState.UserTime() + cmd.ProcessState.SystemTime()
	return rate, (cpuSeconds(tb, pid) - before) / float64(w.requests), used.Seconds() / elapsed.Seconds()
}

func median(v []float64) float64 {
	v = slices.Sorted(slices.Values(v))
	return (v[(len(v)-1)/2] + v[len(v)/2]) / 2
}

// ratios divides round by round: what disturbs the machine for longer than a round disturbs both sides of a ratio.
func ratios(a, b []float64) []float64 {
	r := make([]float64, len(a))
	for i := range a {
		r[i] = a[i] / b[i]
	}
	return r
}

// BenchmarkBesideRedis drives this server and a real redis-server with redis-benchmark, each server on the first core and
// the client on the second, in turns, and reports the median ratios of the rounds: x/… requests per second, cpu/… server
// CPU per request. With one request in flight per connection redis-benchmark itself is the bottleneck.
func BenchmarkBesideRedis(b *testing.B) {
	bench := tool(b, "redis-benchmark", "redis-tools")
	tool(b, "taskset", "util-linux")
	if runtime.NumCPU() < 2 {
		skip(b, "server and client need a core each, and there is one")
	}
	pinned := []string{"taskset", "-c", "0"}
	ours, oursPID := startProgram(b, pinned)
	redis, redisPID := startRedis(b, pinned)
	const rounds = 5
	table := fmt.Sprintf("\n%-16s %12s %12s %7s %12s %12s %7s %15s", "", "connlab/s", "redis/s", "ratio", "connlab µs", "redis µs", "ratio", "client busy")
	for _, w := range []workload{
		{"get", 1, 0, 100_000}, {"set", 1, 0, 100_000},
		{"get", 16, 0, 1_000_000}, {"set", 16, 0, 1_000_000},
		// SET first: it makes the keys that GET finds.
		{"set", 16, 100_000, 1_000_000}, {"get", 16, 100_000, 1_000_000},
	} {
		var rate, cpu, busy [2][]float64
		for round := range rounds + 1 {
			for k, srv := range []struct {
				addr string
				pid  int
			}{{ours, oursPID}, {redis, redisPID}} {
				r, c, client := w.run(b, bench, srv.addr, srv.pid)
				if round > 0 { // the first one warms up
					rate[k], cpu[k], busy[k] = append(rate[k], r), append(cpu[k], c), append(busy[k], client)
				}
			}
		}
		name := w.String()
		x, c := median(ratios(rate[0], rate[1])), median(ratios(cpu[0], cpu[1]))
		table += fmt.Sprintf("\n%-16s %12.0f %12.0f %7.2f %12.2f %12.2f %7.2f %6.0f %% %4.0f %%", name, median(rate[0]), median(rate[1]), x, median(cpu[0])*1e6, median(cpu[1])*1e6, c,
			median(busy[0])*100, median(busy[1])*100)
		b.ReportMetric(x, "x/"+name)
		b.ReportMetric(c, "cpu/"+name)
	}
	b.ReportMetric(0, "ns/op") // means nothing here
	b.Log(table + "\nµs: server CPU per request; medians of " + strconv.Itoa(rounds) + " interleaved rounds, ratios taken round by round; client busy: CPU time of redis-benchmark beside connlab and beside redis")
}

// BenchmarkCommands measures the way from received bytes to the reply, without sockets.
func BenchmarkCommands(b *testing.B) {
	for _, req := range [][]string{{"PING"}, {"GET", "key"}, {"SET", "key", "xxx"}, {"INCR", "n"}} {
		b.Run(req[0], func(b *testing.B) {
			s, c := offline(b)
			s.feed(c, resp.AppendRequest(nil, "SET", "key", "xxx"))
			in := resp.AppendRequest(nil, req...)
			b.ReportAllocs()
			for b.Loop() {
				c.out, c.pending, s.pending = c.out[:0], false, s.pending[:0]
				s.feed(c, in)
			}
		})
	}
}

// offline returns a server with one client that has no socket: what it says is fed, what it gets is in c.out.
func offline(tb testing.TB) (*Server, *client) {
	tb.Helper()
	cfg := DefaultConfig()
	cfg.Addr = "127.0.0.1:0"
	s, err := New(cfg)
	require.NoError(tb, err)
	tb.Cleanup(s.Close)
	return s, s.newClient(-1)
}
