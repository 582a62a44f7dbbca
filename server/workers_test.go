package server

import (
	"bufio"
	"context"
	"errors"
	"fmt"
	"net"
	"net/netip"
	"os"
	"os/exec"
	"runtime"
	"slices"
	"strconv"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"
	"github.com/stretchr/testify/assert"
	"github.com/stretchr/testify/require"
	"golang.org/x/sync/errgroup"
	"golang.org/x/sys/unix"

	"connlab/server/resp"
)

// spread is a server of workers that runs as a program.
type spread struct {
	addr    string
	control *conn
	cmd     *exec.Cmd
	stderr  *head
	ended   chan error
}

// startSpread starts a server of workers. It runs in a process of its own, as the workers do.
func startSpread(tb testing.TB, args ...string) *spread {
	tb.Helper()
	self, err := os.Executable()
	require.NoError(tb, err)
	s := &spread{cmd: exec.Command(self, append([]string{"--addr", "127.0.0.1:0"}, args...)...), stderr: &head{}, ended: make(chan error, 1)}
	s.cmd.Env = append(os.Environ(), asProgram+"=1", "GORACE="+os.Getenv("GORACE")+" atexit_sleep_ms=0") // or each process ends a second late
	s.cmd.Stderr = s.stderr
	s.cmd.SysProcAttr = &unix.SysProcAttr{Pdeathsig: unix.SIGKILL}
	// The parent-death signal goes out when the thread that started the child ends.
	runtime.LockOSThread()
	tb.Cleanup(runtime.UnlockOSThread)
	r, w, err := os.Pipe()
	require.NoError(tb, err)
	defer r.Close()
	s.cmd.Stdout = w
	require.NoError(tb, s.cmd.Start())
	require.NoError(tb, w.Close())
	go func() { s.ended <- s.cmd.Wait() }()
	tb.Cleanup(func() {
		_ = s.cmd.Process.Signal(unix.SIGTERM)
		s.wait(tb)
	})
	line, err := bufio.NewReader(r).ReadString('\n')
	require.NoError(tb, err, "waiting for the ready line")
	var backlog, pid, workers int
	var control string
	_, err = fmt.Sscanf(line, "ready addr=%s backlog=%d pid=%d workers=%d control=%s", &s.addr, &backlog, &pid, &workers, &control)
	require.NoError(tb, err, "ready line %q", line)
	require.Equal(tb, s.cmd.Process.Pid, pid)
	s.control = dial(tb, control)
	return s
}

// wait returns how the supervisor ended.
func (s *spread) wait(tb testing.TB) error {
	tb.Helper()
	select {
	case err := <-s.ended:
		s.ended <- err
		return err
	case <-time.After(patience):
		_ = s.cmd.Process.Kill()
		tb.Fatal("the supervisor goes on")
		return nil
	}
}

// list returns a field of INFO that is listed for each worker.
func (s *spread) list(tb testing.TB, field string) (values []int) {
	tb.Helper()
	for v := range strings.SplitSeq(s.control.info(field), ",") {
		n, err := strconv.Atoi(v)
		require.NoError(tb, err)
		values = append(values, n)
	}
	return values
}

// gone waits until processes have ended and nobody holds the listening socket any more.
func (s *spread) gone(tb testing.TB, pids []int) {
	tb.Helper()
	for _, pid := range pids {
		state := ""
		eventually(tb, func() string { return fmt.Sprintf("worker %d: %s", pid, state) }, func() bool {
			stat, err := os.ReadFile(fmt.Sprintf("/proc/%d/stat", pid))
			if err != nil {
				return true
			}
			state = string(stat[strings.LastIndexByte(string(stat), ')')+1:])
			return state[1] == 'Z' // who inherits it may never ask for it
		})
	}
	// The main thread of a process may be a zombie while others of its threads still hold the socket.
	var err error
	eventually(tb, func() string { return fmt.Sprintf("connecting: %v", err) }, func() bool {
		var c net.Conn
		if c, err = net.Dial("tcp4", s.addr); err == nil {
			_ = c.Close()
		}
		return errors.Is(err, unix.ECONNREFUSED)
	})
}

// connect makes n connections and has every one answered.
func connect(tb testing.TB, addr string, n int) []net.Conn {
	tb.Helper()
	conns := make([]net.Conn, n)
	var group errgroup.Group
	for part := range 8 {
		group.Go(func() (err error) {
			for i := part; i < n; i += 8 {
				if conns[i], err = net.Dial("tcp4", addr); err != nil {
					return err
				}
			}
			return nil
		})
	}
	err := group.Wait()
	tb.Cleanup(func() {
		for _, c := range conns {
			if c != nil {
				_ = c.Close()
			}
		}
	})
	require.NoError(tb, err)
	require.Equal(tb, n, answering(conns))
	return conns
}

// answering returns how many connections answer a PING.
func answering(conns []net.Conn) (n int) {
	reply := make([]byte, 64)
	for _, c := range conns {
		_ = c.SetDeadline(time.Now().Add(patience))
		if _, err := c.Write([]byte("PING\r\n")); err != nil {
			continue
		}
		if k, err := c.Read(reply); err == nil && string(reply[:k]) == "+PONG\r\n" {
			n++
		}
	}
	return n
}

// With room for 600 each, 2,000 connections need all four workers, and none is sent away.
func TestWorkersShareOneQueue(t *testing.T) {
	const n = 2000
	s := startSpread(t, "--workers", "4", "--maxclients", "600", "--backlog", "2000")
	conns := connect(t, s.addr, n)
	assert.Equal(t, strconv.Itoa(n), s.control.info("connected_clients"), "control connections are not counted")
	assert.Equal(t, strconv.Itoa(n), s.control.info("accepted_total"))
	assert.Equal(t, "0", s.control.info("rejected_connections"))
	assert.Equal(t, "2400", s.control.info("maxclients"))
	held := s.list(t, "connected_clients_by_worker")
	require.Len(t, held, 4)
	for _, k := range held {
		assert.True(t, k >= n-3*600 && k <= 600, "%v", held)
	}
	pids := s.list(t, "process_id")
	assert.Len(t, slices.Compact(slices.Sorted(slices.Values(pids))), 4)

	want := 0
	for _, k := range held {
		want += int(float64(k)/4 + 0.5)
	}
	assert.Equal(t, int64(want), s.control.do("CONNLAB", "CUT", "0.25").Int)
	s.control.waitInfo("connected_clients", n-want)
	assert.Equal(t, n-want, answering(conns))
	assert.Equal(t, strconv.Itoa(want), s.control.info("closes_by_server"))
	assert.Equal(t, int64(n-want), s.control.do("CONNLAB", "CUT", "1", "RST").Int)
	s.control.waitInfo("connected_clients", 0)
	assert.Zero(t, answering(conns))
	connect(t, s.addr, 1) // the full ones accept again
}

func TestWorkersTakeControlFromOnePlace(t *testing.T) {
	s := startSpread(t, "--workers", "2")
	data := dial(t, s.addr)
	for _, request := range [][]string{{"CONFIG", "SET", "hz", "50"}, {"CONFIG", "RESETSTAT"}, {"CONNLAB", "STALL", "100"}, {"CONNLAB", "CUT", "1"}, {"CONNLAB", "ACCEPT", "PAUSE"}, {"CONNLAB", "DELAY", "*", "1"}} {
		v := data.do(request...)
		assert.True(t, v.IsError(), "%v: %v", request, v)
		assert.Contains(t, v.String(), "is taken at the control address", "%v", request)
	}
	assert.Equal(t, "+OK", s.control.do("CONFIG", "SET", "hz", "50", "close-after", "1", "requirepass", "secret", "service-time", "60000000").String())
	assert.Equal(t, "50", s.control.info("hz"), "both say so")
	assert.Equal(t, `["hz" "50"]`, s.control.do("CONFIG", "GET", "hz").String())
	assert.Equal(t, "+PONG", s.control.do("PING").String(), "neither close-after nor the password nor service-time is for control connections")
	assert.Equal(t, "0", s.control.info("requests_total"))
	assert.Equal(t, "-ERR value is not a share between 0 and 1", s.control.do("CONNLAB", "CUT", "2").String())
	assert.Contains(t, s.control.do("GET", "k").String(), "-ERR this is the control address of several workers")
	s.control.write("*1\r\nx\r\n")
	assert.Equal(t, []string{"-ERR Protocol error: expected '$', got 'x'"}, s.control.waitClosed())
}

// Nobody is answered and nothing accepted between the time when the last worker begins to stand still and the time when the
// first goes on, which is about what was asked for.
func TestWorkersStallTogether(t *testing.T) {
	const stall, clients = 600 * time.Millisecond, 4
	s := startSpread(t, "--workers", "3", "--accepts-per-cycle", "1")
	connect(t, s.addr, 30)
	ctx, cancel := context.WithCancel(t.Context())
	defer cancel()
	var mu sync.Mutex
	var answered []int64 // Unix microseconds
	failed := make(chan error, clients)
	var pingers sync.WaitGroup
	for range clients {
		pingers.Go(func() {
			for range time.Tick(2 * time.Millisecond) {
				if ctx.Err() != nil {
					return
				}
				if err := pingOnce(s.addr); err != nil {
					failed <- err
					return
				}
				mu.Lock()
				answered = append(answered, time.Now().UnixMicro())
				mu.Unlock()
			}
		})
	}
	asked := time.Now().UnixMicro()
	require.Equal(t, "+OK", s.control.do("CONNLAB", "STALL", strconv.FormatInt(stall.Milliseconds(), 10)).String())
	s.control.waitInfo("stalls_total", 3)
	resumed := time.Now().UnixMicro()
	eventually(t, func() string { return "no answer after the stall" }, func() bool {
		mu.Lock()
		defer mu.Unlock()
		return len(failed) > 0 || len(answered) > 0 && answered[len(answered)-1] > resumed
	})
	cancel()
	pingers.Wait()
	close(failed)
	require.NoError(t, <-failed)
	begin, end := number64(t, s.control.info("last_stall_start_us")), number64(t, s.control.info("last_stall_end_us"))
	assert.Greater(t, begin, asked)
	assert.Greater(t, end-begin, stall.Microseconds()/2, "together")
	within := 0
	for _, at := range answered {
		if at > begin && at < end {
			within++
		}
	}
	assert.LessOrEqual(t, within, clients, "of %d answers: each client may read one in the stall that was written before", len(answered))
	assert.Greater(t, len(answered), 2*clients)
}

func TestWorkersEnd(t *testing.T) {
	for _, tc := range []struct {
		why    string
		end    func(s *spread, pids []int) error
		code   int
		stderr string
	}{
		{"told to", func(s *spread, _ []int) error { return s.cmd.Process.Signal(unix.SIGTERM) }, 0, ""},
		{"with a supervisor that is killed", func(s *spread, _ []int) error { return s.cmd.Process.Kill() }, -1, ""},
		{"with one of them, which is named", func(_ *spread, pids []int) error { return unix.Kill(pids[1], unix.SIGKILL) }, 1, "server: worker 2 (pid %d) ended: signal: killed"},
	} {
		t.Run(tc.why, func(t *testing.T) {
			s := startSpread(t, "--workers", "3")
			pids := s.list(t, "process_id")
			require.Len(t, pids, 3)
			connect(t, s.addr, 5)
			// Not even a stall keeps them.
			require.Equal(t, "+OK", s.control.do("CONNLAB", "STALL", "600000").String())
			c := dial(t, s.addr)
			eventually(t, func() string { return "no stall" }, func() bool {
				c.send("PING")
				_, err := c.next(100 * time.Millisecond)
				return err != nil
			})
			require.NoError(t, tc.end(s, pids))
			_ = s.wait(t)
			assert.Equal(t, tc.code, s.cmd.ProcessState.ExitCode())
			if strings.Contains(tc.stderr, "%d") {
				tc.stderr = fmt.Sprintf(tc.stderr, pids[1])
			}
			assert.Equal(t, tc.stderr, strings.TrimSpace(string(s.stderr.text)))
			s.gone(t, pids)
		})
	}
}

func TestWorkersUsage(t *testing.T) {
	for _, tc := range []struct {
		args   []string
		code   int
		stderr string
	}{
		{[]string{"--workers", "0"}, 2, "setting workers to 0: argument must be between 1 and 256 inclusive"},
		{[]string{"--workers", "2", "--control", "somewhere"}, 2, `setting control: address "somewhere" is not IPv4:port`},
		{[]string{"--workers", "2"}, 1, "its command line does not end in the server's arguments"},
		{[]string{"--listen-fd", "9999999"}, 1, "inherited descriptor 9999999: bad file descriptor"},
	} {
		var stdout, stderr strings.Builder
		assert.Equal(t, tc.code, Main(t.Context(), tc.args, &stdout, &stderr), "%v", tc.args)
		assert.Contains(t, stderr.String(), tc.stderr)
		assert.Empty(t, stdout.String())
	}
}

// A control address can be had with one worker, too: the way in stays open when the accept queue is full.
func TestOneWorkerWithControl(t *testing.T) {
	const backlog = 3
	s := startSpread(t, "--workers", "1", "--control", "127.0.0.1:0", "--backlog", strconv.Itoa(backlog))
	require.Equal(t, "+OK", s.control.do("CONNLAB", "ACCEPT", "PAUSE").String())
	for range backlog + 1 {
		dial(t, s.addr)
	}
	_, err := net.DialTimeout("tcp4", s.addr, 200*time.Millisecond)
	require.True(t, isTimeout(err), "%v", err)
	late := dial(t, s.control.RemoteAddr().String())
	assert.Equal(t, "1", late.info("accept_paused"))
	assert.Equal(t, "0", late.info("accepted_total"))
	assert.Equal(t, "+OK", late.do("CONNLAB", "ACCEPT", "RESUME").String())
	late.waitInfo("connected_clients", backlog+1)
}

// A worker in the test's process, for the race detector and for what cannot be seen from outside.
func TestWorkerStopsAcceptingWhenFull(t *testing.T) {
	listener, addr, err := listen(mustParse(t, "127.0.0.1:0"), 10, 0)
	require.NoError(t, err)
	pair, err := unix.Socketpair(unix.AF_UNIX, unix.SOCK_STREAM|unix.SOCK_CLOEXEC, 0)
	require.NoError(t, err)
	cfg := DefaultConfig()
	cfg.MaxClients = 2
	s, err := newWorker(cfg, descriptors{listen: listener, control: pair[0]})
	require.NoError(t, err)
	done := make(chan error, 1)
	go func() { done <- s.Serve(t.Context()) }()
	file := os.NewFile(uintptr(pair[1]), "control")
	nc, err := net.FileConn(file)
	require.NoError(t, err)
	require.NoError(t, file.Close())
	control := &conn{Conn: nc, tb: t}

	a, b := dial(t, addr.String()), dial(t, addr.String())
	a.do("PING")
	b.do("PING")
	third := dial(t, addr.String())
	third.send("PING")
	control.waitInfo("accept_paused", 1)
	assert.Equal(t, "0", control.info("rejected_connections"))
	depth, err := unix.GetsockoptTCPInfo(listener, unix.IPPROTO_TCP, unix.TCP_INFO)
	require.NoError(t, err)
	assert.Equal(t, uint32(1), depth.Unacked, "the third waits in the accept queue, for another worker")
	require.NoError(t, b.Close())
	assert.Equal(t, "+PONG", third.receive().String())
	assert.Equal(t, "3", control.info("accepted_total"))
	assert.Equal(t, "+OK", control.do("CONNLAB", "ACCEPT", "PAUSE").String())
	assert.Equal(t, "+OK", control.do("CONNLAB", "ACCEPT", "RESUME").String())
	assert.Equal(t, "+OK", control.do("CONFIG", "SET", "maxclients", "3").String())
	assert.Equal(t, "+PONG", dial(t, addr.String()).do("PING").String())

	require.NoError(t, nc.Close())
	select {
	case err := <-done:
		require.NoError(t, err)
	case <-time.After(patience):
		t.Fatal("the worker goes on without a supervisor")
	}
	a.waitClosed()
}

func TestMerge(t *testing.T) {
	answers := func(raws ...string) (all []answer) {
		for _, raw := range raws {
			n, v, err := resp.Decode([]byte(raw))
			require.NoError(t, err)
			require.Equal(t, len(raw), n)
			all = append(all, answer{[]byte(raw), v})
		}
		return all
	}
	for _, tc := range []struct {
		why     string
		answers []answer
		want    string
	}{
		{"alike", answers("+OK\r\n", "+OK\r\n"), "+OK\r\n"},
		{"numbers are added", answers(":3\r\n", ":4\r\n", ":3\r\n"), ":10\r\n"},
		{"one number is itself", answers(":3\r\n"), ":3\r\n"},
		{"the first error", answers("+OK\r\n", "-ERR a\r\n", "-ERR b\r\n"), "-ERR a\r\n"},
		{"different ones are listed", answers("$1\r\na\r\n", "$1\r\nb\r\n"), "*2\r\n$1\r\na\r\n$1\r\nb\r\n"},
	} {
		assert.Equal(t, tc.want, string(merge([][]byte{[]byte("x")}, tc.answers)), tc.why)
	}
}

func TestMergeInfo(t *testing.T) {
	text := func(pid, clients, start, end, cpu, hz, keys string) string {
		lines := []string{"# Server", "process_id:" + pid, "hz:" + hz, "", "# Memory", "used_memory_human:1K", "", "# CPU", "used_cpu_sys:" + cpu, "", "# Keyspace", "db0:keys=" + keys, "", "# Connlab",
			"connected_clients:" + clients, "last_stall_start_us:" + start, "last_stall_end_us:" + end}
		return strings.Join(lines, "\r\n") + "\r\n"
	}
	want := strings.Join([]string{"# Server", "process_id:11,12", "hz:10", "", "# Memory", "", "# CPU", "used_cpu_sys:0.750000", "", "# Connlab",
		"connected_clients:7", "connected_clients_by_worker:3,4", "last_stall_start_us:105", "last_stall_end_us:200"}, "\r\n") + "\r\n"
	got := mergeInfo([]string{text("11", "3", "100", "200", "0.250000", "10", "1"), text("12", "4", "105", "201", "0.500000", "10", "2")})
	assert.Empty(t, cmp.Diff(want, got))
}

// Every rule is for a field that there is, and every number that a worker counts has one.
func TestInfoRulesAreOfFields(t *testing.T) {
	s, c := offline(t)
	text := string(ask(t, s, c, "INFO").Str)
	for name := range infoRules {
		assert.Contains(t, text, "\n"+name+":")
	}
	for line := range strings.Lines(text) {
		name, _, _ := strings.Cut(line, ":")
		if strings.Contains(name, "_total") || strings.HasPrefix(name, "total_") || strings.HasPrefix(name, "closes_") {
			assert.Contains(t, infoRules, name)
		}
	}
}

func mustParse(tb testing.TB, addr string) (ap netip.AddrPort) {
	tb.Helper()
	ap, err := parseAddr(addr)
	require.NoError(tb, err)
	return ap
}

// An idle connection that has asked once takes less than half a kilobyte of the worker's own memory.
func TestIdleConnectionsAreSmall(t *testing.T) {
	if underRace {
		t.Skip("the race detector's memory is not the server's")
	}
	const n = 5000
	var lim unix.Rlimit
	require.NoError(t, unix.Getrlimit(unix.RLIMIT_NOFILE, &lim))
	if lim.Cur < n+200 {
		skip(t, fmt.Sprintf("the limit of open files, %d, is below the %d connections to hold", lim.Cur, n))
	}
	s := startSpread(t, "--workers", "1", "--control", "127.0.0.1:0", "--maxclients", strconv.Itoa(n), "--backlog", "1000")
	pid := s.list(t, "process_id")[0]
	connect(t, s.addr, 10) // the first ones grow what is there once
	before := anonymous(t, pid)
	connect(t, s.addr, n-10)
	per := float64(anonymous(t, pid)-before) / (n - 10)
	t.Logf("%.0f bytes a connection, beside %d KiB before them", per, before>>10)
	assert.Less(t, per, 500.0)
}

// anonymous returns the resident memory of a process that is its own, in bytes.
func anonymous(tb testing.TB, pid int) int64 {
	tb.Helper()
	text, err := os.ReadFile(fmt.Sprintf("/proc/%d/status", pid))
	require.NoError(tb, err)
	_, rest, ok := strings.Cut(string(text), "\nRssAnon:")
	require.True(tb, ok, "%s", text)
	var kib int64
	_, err = fmt.Sscan(rest, &kib)
	require.NoError(tb, err)
	return kib << 10
}
