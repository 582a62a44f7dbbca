package scenarios

import (
	"context"
	"errors"
	"fmt"
	"net/netip"
	"os"
	"os/exec"
	"path/filepath"
	"strconv"
	"strings"
	"testing"
	"time"

	"github.com/stretchr/testify/assert"
	"github.com/stretchr/testify/require"
	"golang.org/x/sys/unix"

	"connlab/loadgen"
	"connlab/netlab"
	"connlab/netlab/observe"
)

func TestNginxText(t *testing.T) {
	servers := []netip.AddrPort{netip.MustParseAddrPort("10.3.0.1:6379"), netip.MustParseAddrPort("10.3.0.2:6379")}
	modules := []string{"/m/one.so", "/m/two.so"}
	for _, row := range []struct {
		reason string
		cfg    nginxConfig
		resty  string
		has    []string
		hasNot []string
	}{
		{"nginx's defaults", nginxConfig{Servers: servers, Workers: 2}, "",
			[]string{"worker_processes 2;", "load_module /m/one.so;\nload_module /m/two.so;\n", "lua_code_cache on;",
				`{"10.3.0.1", 6379}, {"10.3.0.2", 6379}, `, "conn:setkeepalive(60000, 30)", "conn:close()", "conn:settimeout(5000)"},
			[]string{"require", "options.pool"}},
		{"all of it", nginxConfig{Servers: servers, Workers: 1, SeparatePools: true, NoCodeCache: true, PoolSize: 7, Keepalive: time.Second}, "nginx.redis",
			[]string{"worker_processes 1;", "lua_code_cache off;", `require("nginx.redis"):new()`, "conn:set_keepalive(1000, 7)", "conn:close()",
				`options.pool = "close " .. host .. ":" .. port`},
			[]string{"ngx.socket"}},
	} {
		text, err := row.cfg.text(modules, row.resty)
		require.NoError(t, err, row.reason)
		for _, s := range row.has {
			assert.Contains(t, text, s, row.reason)
		}
		for _, s := range row.hasNot {
			assert.NotContains(t, text, s, row.reason)
		}
		// What is not told where to write writes to the machine's own directories.
		for _, directive := range []string{"pid", "error_log", "client_body_temp_path", "proxy_temp_path", "fastcgi_temp_path", "uwsgi_temp_path", "scgi_temp_path", "access_log off"} {
			assert.Contains(t, text, directive, row.reason)
		}
		assert.LessOrEqual(t, strings.Count(text, "options.pool"), 1, "only calls that close have a pool of their own")
	}
}

// answerOf is a response as nginx writes it.
func answerOf(status, body string) string {
	return fmt.Sprintf("HTTP/1.1 %s\r\nServer: nginx/1.22.1\r\nConnection: keep-alive\r\ncontent-length: %d\r\n\r\n%s", status, len(body), body)
}

var nginxAnswers = []struct {
	reason   string
	bytes    string
	want     nginxAnswer
	complete bool
	err      string
}{
	{"a new connection", answerOf("200 OK", "dialed 0 1"), nginxAnswer{what: "dialed", worker: 1}, true, ""},
	{"one from the pool", answerOf("200 OK", "reused 12 0"), nginxAnswer{what: "reused", reused: 12}, true, ""},
	{"no connection", answerOf("502 Bad Gateway", "none 0 3 connect: connection refused"),
		nginxAnswer{what: "none", worker: 3, failure: "connect: connection refused"}, true, ""},
	{"a connection from the pool that failed", answerOf("502 Bad Gateway", "reused 2 0 receive: closed"),
		nginxAnswer{what: "reused", reused: 2, failure: "receive: closed"}, true, ""},
	{"nothing yet", "", nginxAnswer{}, false, ""},
	{"half a header", "HTTP/1.1 200 OK\r\nServer: ng", nginxAnswer{}, false, ""},
	{"a body that has not come", "HTTP/1.1 200 OK\r\ncontent-length: 10\r\n\r\ndialed", nginxAnswer{}, false, ""},
	{"two responses", answerOf("200 OK", "dialed 0 1") + "HTTP", nginxAnswer{}, false, "4 bytes after it"},
	{"a page of nginx's own", answerOf("500 Internal Server Error", "<html>"), nginxAnswer{}, false, `http response: 500 Internal Server Error: "<html>"`},
	{"no length", "HTTP/1.1 200 OK\r\n\r\nreused 1 0", nginxAnswer{}, false, "http response: it does not say how long it is"},
	{"no HTTP", "+PONG\r\n", nginxAnswer{}, false, `http response: malformed HTTP response "+PONG"`},
	{"well, and a failure", answerOf("200 OK", "dialed 0 1 receive: closed"), nginxAnswer{}, false, `http response: 200 OK: "dialed 0 1 receive: closed"`},
	{"ill, and no failure", answerOf("502 Bad Gateway", "dialed 0 1"), nginxAnswer{}, false, `http response: 502 Bad Gateway: "dialed 0 1"`},
	{"a count that is none", answerOf("200 OK", "dialed x 1"), nginxAnswer{}, false, `http response: 200 OK: "dialed x 1": strconv.ParseInt: parsing "x": invalid syntax`},
}

func TestParseNginxAnswer(t *testing.T) {
	for _, row := range nginxAnswers {
		got, complete, err := parseNginxAnswer([]byte(row.bytes))
		assert.Equal(t, row.complete, complete, row.reason)
		if row.err != "" {
			assert.EqualError(t, err, row.err, row.reason)
			continue
		}
		require.NoError(t, err, row.reason)
		assert.Equal(t, row.want, got, row.reason)
	}
}

func FuzzParseNginxAnswer(f *testing.F) {
	for _, row := range nginxAnswers {
		f.Add([]byte(row.bytes))
	}
	f.Fuzz(func(t *testing.T, b []byte) {
		a, complete, err := parseNginxAnswer(b)
		require.False(t, complete && err != nil, "complete, and an error: %v", err)
		if !complete {
			return
		}
		status, body := "200 OK", fmt.Sprintf("%s %d %d", a.what, a.reused, a.worker)
		if a.failure != "" {
			status, body = "502 Bad Gateway", body+" "+a.failure
		}
		again, complete, err := parseNginxAnswer([]byte(answerOf(status, body)))
		require.NoError(t, err)
		require.True(t, complete)
		require.Equal(t, a, again)
		_, complete, err = parseNginxAnswer(append(b, 'x'))
		require.False(t, complete)
		require.Error(t, err, "what follows is no part of it")
	})
}

// Each answer counts once, in its worker, whether or not the call went well.
func TestNginxReply(t *testing.T) {
	c := nginxCalls{Workers: map[int]nginxWorkerCalls{}, Errors: map[string]int64{}}
	for _, row := range []struct {
		answer   string
		complete bool
		is       error
	}{
		{answerOf("200 OK", "dialed 0 1"), true, nil},
		{answerOf("200 OK", "reused 4 0"), true, nil},
		{answerOf("200 OK", "reused 3 0"), true, nil},
		{answerOf("200 OK", "reused 3 0")[:30], false, nil},
		{answerOf("502 Bad Gateway", "none 0 1 connect: timeout"), true, loadgen.ErrServer},
		{answerOf("502 Bad Gateway", "dialed 0 1 receive: closed"), true, loadgen.ErrServer},
	} {
		complete, err := c.reply([]byte(row.answer))
		assert.Equal(t, row.complete, complete, row.answer)
		assert.ErrorIs(t, err, row.is, row.answer)
	}
	assert.Equal(t, nginxCalls{
		Workers:    map[int]nginxWorkerCalls{0: {Reused: 2}, 1: {Dialed: 2}},
		Errors:     map[string]int64{"connect: timeout": 1, "receive: closed": 1},
		MostReused: 4,
	}, c)
	assert.Equal(t, int64(2), c.dialed())
	assert.Equal(t, int64(2), c.reused())
}

func TestNginxDialShares(t *testing.T) {
	of := func(reused ...int64) nginxCalls {
		c := nginxCalls{Workers: map[int]nginxWorkerCalls{}}
		for id, n := range reused {
			if n > 0 {
				c.Workers[id] = nginxWorkerCalls{Reused: n}
			}
		}
		return c
	}
	for _, row := range []struct {
		reason           string
		keep, close      nginxCalls
		wantKeep, wantCl float64
	}{
		{"one worker", of(300), of(100), 0.25, 0.25},
		{"two that got the same", of(150, 150), of(50, 50), 0.25, 0.25},
		{"one kind each: who keeps need never dial, who closes always", of(300, 0), of(0, 100), 0, 1},
		{"one worker has all that close", of(150, 150), of(150, 0), 0.25, 0.5},
		{"nobody closes", of(300), of(), 0, 0},
		{"nothing", of(), of(), 0, 0},
	} {
		keep, closing := nginxResult{Keep: row.keep, Close: row.close}.dialShares()
		assert.InDelta(t, row.wantKeep, keep, 1e-9, row.reason)
		assert.InDelta(t, row.wantCl, closing, 1e-9, row.reason)
	}
}

var nginxLAN = netip.MustParsePrefix("10.3.0.0/16")

// nginxLab is callers, a web server and a Redis host with two addresses.
func nginxLab() netlab.Topology {
	return netlab.Topology{
		Switches: []netlab.SwitchSpec{{Name: lanName, Subnet: nginxLAN}},
		Hosts: []netlab.HostSpec{
			{Name: "redis", Links: []netlab.LinkSpec{{Switch: lanName, Addrs: []netip.Addr{nth(nginxLAN, 1), nth(nginxLAN, 2)}}}},
			{Name: "web", Links: []netlab.LinkSpec{{Switch: lanName}}},
			{Name: "caller", Links: []netlab.LinkSpec{{Switch: lanName}}},
		},
	}
}

// TestNginx loads a real nginx with calls that keep and calls that close. What
// nginx says of its pools is compared with theory, with the kernel's count of
// connections and with what the server has.
func TestNginx(t *testing.T) {
	if underRace {
		t.Skip("the same code as the variant nginx of TestMixedPool")
	}
	if err := netlab.CheckPrivilege(); err != nil {
		skip(t, err.Error())
	}
	require.NoError(t, stamp())
	seed := uint64(time.Now().UnixNano())
	t.Logf("seed %d", seed)
	// calls are so many of each kind a second, for so long.
	calls := func(keep, closing float64, length time.Duration) nginxLoad {
		return nginxLoad{Keep: loadgen.Poisson(keep, length, seed), Close: loadgen.Poisson(closing, length, seed+1)}
	}
	mixed := calls(900, 300, 2*time.Second)
	for _, row := range []struct {
		name    string
		cfg     nginxConfig
		servers int
		load    nginxLoad
		steady  bool // what is claimed holds in a steady state only
		check   func(t *testing.T, r nginxResult)
	}{
		{"mixed", nginxConfig{Workers: 1}, 1, mixed, true, checkMixed},
		{"mixed, two workers", nginxConfig{Workers: 2}, 1, mixed, true, checkMixed},
		{"mixed, two servers", nginxConfig{Workers: 1}, 2, mixed, true, checkMixed},
		{"mixed, by the library", nginxConfig{Workers: 1, Resty: true}, 1, mixed, true, checkMixed},
		{"separate pools", nginxConfig{Workers: 2, SeparatePools: true}, 1, mixed, false, checkSeparate},
		{"separate pools, by the library, two servers", nginxConfig{Workers: 2, SeparatePools: true, Resty: true}, 2, mixed, false, checkSeparate},
		{"only keep", nginxConfig{Workers: 2}, 1, calls(600, 0, time.Second), false, checkSeparate},
		{"only close", nginxConfig{Workers: 2}, 1, calls(0, 200, time.Second), false, checkAllDial},
		{"no code cache", nginxConfig{Workers: 2, NoCodeCache: true}, 1, calls(60, 20, 2*time.Second), false, checkAllDial},
		{"no code cache, by the library", nginxConfig{Workers: 1, NoCodeCache: true, Resty: true}, 1, calls(30, 10, 2*time.Second), false, checkAllDial},
	} {
		t.Run(row.name, func(t *testing.T) {
			// No pool is ever full: what it closes by itself is no call's.
			row.cfg.PoolSize = 1000
			for attempt := 1; ; attempt++ {
				r := loadNginx(t, row.cfg, row.servers, row.load)
				// A pause of the thread that makes one kind of calls is a burst of
				// that kind: nothing that theory speaks of. Where there is always
				// one, the last load is judged all the same.
				const limit, attempts = 10 * time.Millisecond, 4
				behind := errors.Join(r.Keep.Report.Behind(limit), r.Close.Report.Behind(limit))
				if behind == nil || !row.steady || attempt == attempts {
					row.check(t, r)
					return
				}
				t.Logf("again: %v", behind)
			}
		})
	}
}

// loadNginx runs a load in a lab of its own, and checks what holds however late
// the calls come: that nginx, the kernel and the server tell of the same connections.
func loadNginx(t *testing.T, cfg nginxConfig, servers int, load nginxLoad) nginxResult {
	t.Helper()
	lab, err := netlab.Up(t.Context(), nginxLab())
	require.NoError(t, err)
	defer func() { assert.NoError(t, lab.Down()) }()
	web := lab.Host("web")
	server, err := findServer(ServerMini)
	require.NoError(t, err)
	redis, err := server.start(t.Context(), lab.Host("redis"), serverConfig{backlog: 511, acceptsPerCycle: 1000}, nil)
	require.NoError(t, err)
	for _, a := range redis.host.Addrs()[:servers] {
		cfg.Servers = append(cfg.Servers, netip.AddrPortFrom(a, redisPort))
	}
	before, err := observe.ReadCounters(web)
	require.NoError(t, err)
	nginx, err := startNginx(t.Context(), web, cfg, nil)
	skipIfNeeded(t, err)
	r, err := load.run(t.Context(), lab.Host("caller"), netip.AddrPortFrom(web.Addr(), nginxPort))
	require.NoError(t, err, nginx.Output())
	after, err := observe.ReadCounters(web)
	require.NoError(t, err)
	for kind, c := range map[string]nginxCalls{keepCall: r.Keep, closeCall: r.Close} {
		t.Logf("%s: %d ok, %d dialed, %d reused, at most %d times; %v", kind, c.Report.OK, c.dialed(), c.reused(), c.MostReused, c.Workers)
		require.NoError(t, c.Report.Balanced())
		assert.Empty(t, c.Report.Failed, "%s: %v", kind, c.Errors)
		assert.Equal(t, c.Report.OK, c.dialed()+c.reused(), "every call says how it came to its connection")
	}

	dials := r.Keep.dialed() + r.Close.dialed()
	assert.Equal(t, dials, after.Sub(before)["Tcp.ActiveOpens"], "connect(2) by the kernel's count, and by nginx's")
	left := dials - r.Close.Report.OK
	if cfg.NoCodeCache {
		left = 0 // a pool ends with its request, and closes what it has
	}
	awaitClients(t, redis, left)
	awaitEqual(t, dials-left, "TIME_WAIT at the web server, of what nginx has closed", func() int64 {
		now, err := observe.ReadCounters(web)
		require.NoError(t, err)
		return now["sockstat.TCP.tw"]
	})
	assert.NoFileExists(t, "/run/nginx.conf")
	assert.NoError(t, nginx.Stop(5*time.Second))
	awaitClients(t, redis, 0)
	assert.NoError(t, redis.stop())
	return r
}

// checkMixed: every call takes from the pool what is there, and every call that
// closes has taken one connection from it for ever.
func checkMixed(t *testing.T, r nginxResult) {
	keep, closing := r.dialShares()
	gotKeep := float64(r.Keep.dialed()) / float64(r.Keep.Report.OK)
	gotClosing := float64(r.Close.dialed()) / float64(r.Close.Report.OK)
	t.Logf("of those that keep dial %.3f, by theory %.3f; of those that close %.3f, by theory %.3f", gotKeep, keep, gotClosing, closing)
	// What is left was dialed and not closed yet: the more of it, the less steady
	// the state was. Beyond that, five standard deviations of 1,800 and of 600
	// independent draws.
	left := r.Keep.dialed() + r.Close.dialed() - r.Close.Report.OK
	ahead := float64(left) / float64(r.Keep.Report.OK+r.Close.Report.OK)
	assert.InDelta(t, keep, gotKeep, 0.05+ahead)
	assert.InDelta(t, closing, gotClosing, 0.09+ahead)
	assert.LessOrEqual(t, left, int64(callers))
	for id := range r.workers() {
		assert.Positive(t, r.Keep.Workers[id].Dialed, "worker %d", id)
	}
}

// checkSeparate: calls that keep have as many connections as there ever were calls
// at the same time, however many calls there are; calls that close always dial.
func checkSeparate(t *testing.T, r nginxResult) {
	assert.LessOrEqual(t, r.Keep.dialed(), int64(callers))
	assert.Greater(t, r.Keep.MostReused, int64(50), "connections live")
	checkEachDials(t, r.Close)
}

func checkAllDial(t *testing.T, r nginxResult) {
	checkEachDials(t, r.Keep)
	checkEachDials(t, r.Close)
}

func checkEachDials(t *testing.T, c nginxCalls) {
	assert.Equal(t, c.Report.OK, c.dialed())
	assert.Zero(t, c.MostReused)
}

// awaitClients waits until the server has so many clients beside the control
// connection.
func awaitClients(t *testing.T, redis *target, want int64) {
	t.Helper()
	awaitEqual(t, want, "clients of the server", func() int64 {
		info, err := redis.info("clients")
		require.NoError(t, err)
		n, err := strconv.ParseInt(info["connected_clients"], 10, 64)
		require.NoError(t, err)
		return n - 1
	})
}

// awaitEqual waits until got returns what is wanted.
func awaitEqual(t *testing.T, want int64, what string, got func() int64) {
	t.Helper()
	last := got()
	for deadline := time.Now().Add(5 * time.Second); last != want && time.Now().Before(deadline); last = got() {
		time.Sleep(5 * time.Millisecond)
	}
	assert.Equal(t, want, last, what)
}

// A call that fails says at which step, and that it had a connection.
func TestNginxFailures(t *testing.T) {
	if err := netlab.CheckPrivilege(); err != nil {
		skip(t, err.Error())
	}
	require.NoError(t, stamp())
	lab, err := netlab.Up(t.Context(), nginxLab())
	require.NoError(t, err)
	defer func() { assert.NoError(t, lab.Down()) }()
	cfg := nginxConfig{Workers: 1, Servers: []netip.AddrPort{netip.AddrPortFrom(lab.Host("redis").Addr(), redisPort)}}
	nginx, err := startNginx(t.Context(), lab.Host("web"), cfg, nil)
	skipIfNeeded(t, err)
	load := nginxLoad{Keep: loadgen.Constant(50, time.Second), Close: loadgen.Burst(0, 0)}
	r, err := load.run(t.Context(), lab.Host("caller"), netip.AddrPortFrom(lab.Host("web").Addr(), nginxPort))
	require.NoError(t, err, nginx.Output())
	require.Positive(t, r.Keep.Report.Due)
	assert.Equal(t, loadgen.Counts{loadgen.ServerError: r.Keep.Report.Due}, r.Keep.Report.Failed)
	assert.Equal(t, map[string]int64{"connect: connection refused": r.Keep.Report.Due}, r.Keep.Errors)
	assert.Zero(t, r.Keep.dialed()+r.Keep.reused())
	assert.NoError(t, nginx.Stop(5*time.Second))
}

const nginxToBeKilled = "CONNLAB_NGINX_TO_BE_KILLED"

// TestKilledNginxLeavesNothing executes itself again to have a process that runs
// an nginx and can be killed.
func TestKilledNginxLeavesNothing(t *testing.T) {
	if err := netlab.CheckPrivilege(); err != nil {
		skip(t, err.Error())
	}
	if said := os.Getenv(nginxToBeKilled); said != "" {
		lab, err := netlab.Up(t.Context(), nginxLab())
		require.NoError(t, err)
		cfg := nginxConfig{Workers: 2, Servers: []netip.AddrPort{netip.MustParseAddrPort("10.3.0.1:6379")}}
		nginx, err := startNginx(t.Context(), lab.Host("web"), cfg, nil)
		skipIfNeeded(t, err)
		require.NoError(t, os.WriteFile(said, []byte(strconv.Itoa(nginx.Pid())+"\n"), 0o644))
		<-nginx.Done() // for ever
		return
	}
	_, err := netlab.LookNginx()
	skipIfNeeded(t, err)
	require.NoError(t, stamp())
	files := filesUnderRun(t)
	said := filepath.Join(t.TempDir(), "pid")
	ctx, cancel := context.WithTimeout(t.Context(), time.Minute)
	defer cancel()
	cmd := exec.CommandContext(ctx, "/proc/self/exe", "-test.run=^"+t.Name()+"$")
	cmd.Env = append(os.Environ(), nginxToBeKilled+"="+said)
	require.NoError(t, cmd.Start())
	var master int
	for master == 0 {
		if b, err := os.ReadFile(said); err == nil && strings.HasSuffix(string(b), "\n") {
			master, err = strconv.Atoi(strings.TrimSpace(string(b)))
			require.NoError(t, err)
		}
		require.NoError(t, ctx.Err(), "nginx runs")
		time.Sleep(time.Millisecond)
	}
	var processes []int
	for len(processes) != 3 {
		processes = append(children(t, master), master)
		require.NoError(t, ctx.Err(), "a master and two workers: %v", processes)
	}
	for _, name := range []string{"nginx.conf", "nginx.pid"} {
		require.FileExists(t, fmt.Sprintf("/proc/%d/root/run/%s", master, name), "it is where nginx sees it")
		require.NoFileExists(t, "/run/"+name)
	}

	require.NoError(t, cmd.Process.Kill())
	require.ErrorContains(t, cmd.Wait(), "signal: killed")
	for deadline := time.Now().Add(10 * time.Second); ; time.Sleep(time.Millisecond) {
		var left []int
		for _, pid := range processes {
			if err := unix.Kill(pid, 0); !errors.Is(err, unix.ESRCH) {
				left = append(left, pid)
			}
		}
		if len(left) == 0 {
			break
		}
		require.True(t, time.Now().Before(deadline), "processes %v of nginx are left", left)
	}
	assert.Equal(t, files, filesUnderRun(t))
}

// children are the processes that a process has started, by proc_pid_stat(5).
func children(t *testing.T, parent int) (pids []int) {
	t.Helper()
	stats, err := filepath.Glob("/proc/[0-9]*/stat")
	require.NoError(t, err)
	for _, path := range stats {
		b, _ := os.ReadFile(path) // a process that ended meanwhile is nobody's child
		_, rest, _ := strings.Cut(string(b), ") ")
		if f := strings.Fields(rest); len(f) > 1 && f[1] == strconv.Itoa(parent) {
			pid, err := strconv.Atoi(filepath.Base(filepath.Dir(path)))
			require.NoError(t, err)
			pids = append(pids, pid)
		}
	}
	return pids
}

func filesUnderRun(t *testing.T) (names []string) {
	t.Helper()
	list, err := os.ReadDir("/run")
	require.NoError(t, err)
	for _, e := range list {
		names = append(names, e.Name())
	}
	return names
}
