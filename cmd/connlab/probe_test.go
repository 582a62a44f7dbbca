package main

import (
	"bufio"
	"bytes"
	"encoding/json"
	"fmt"
	"io"
	"net"
	"net/netip"
	"os"
	"os/exec"
	"regexp"
	"slices"
	"strconv"
	"strings"
	"testing"
	"time"

	"github.com/stretchr/testify/assert"
	"github.com/stretchr/testify/require"
	"golang.org/x/sys/unix"

	"connlab/loadgen"
)

// redises answers PINGs on n addresses of loopback, counting up from the one
// that is returned, at one port.
func redises(t *testing.T, n int) netip.AddrPort {
	t.Helper()
	first := netip.AddrFrom4([4]byte{127, 79, byte(os.Getpid()), 1})
	port := uint16(0) // the first may choose
	addr := first
	for range n {
		l, err := net.ListenTCP("tcp4", net.TCPAddrFromAddrPort(netip.AddrPortFrom(addr, port)))
		require.NoError(t, err)
		t.Cleanup(func() { _ = l.Close() })
		go func() {
			for {
				c, err := l.Accept()
				if err != nil {
					return
				}
				go func() {
					defer c.Close()
					b := make([]byte, len("*1\r\n$4\r\nPING\r\n"))
					for {
						if _, err := io.ReadFull(c, b); err != nil {
							return
						}
						if _, err := c.Write([]byte("+PONG\r\n")); err != nil {
							return
						}
					}
				}()
			}
		}()
		port = l.Addr().(*net.TCPAddr).AddrPort().Port()
		addr = addr.Next()
	}
	return netip.AddrPortFrom(first, port)
}

// unanswering is an address that answers no SYN: the accept queue of its
// listener is full.
func unanswering(t *testing.T) netip.AddrPort {
	t.Helper()
	fd, err := unix.Socket(unix.AF_INET, unix.SOCK_STREAM|unix.SOCK_CLOEXEC, 0)
	require.NoError(t, err)
	t.Cleanup(func() { assert.NoError(t, unix.Close(fd)) })
	require.NoError(t, unix.Bind(fd, &unix.SockaddrInet4{Addr: [4]byte{127, 0, 0, 1}}))
	require.NoError(t, unix.Listen(fd, 0))
	local, err := unix.Getsockname(fd)
	require.NoError(t, err)
	target := netip.AddrPortFrom(netip.MustParseAddr("127.0.0.1"), uint16(local.(*unix.SockaddrInet4).Port))
	c, err := net.DialTimeout("tcp4", target.String(), 10*time.Second)
	require.NoError(t, err)
	t.Cleanup(func() { _ = c.Close() })
	return target
}

func TestProbeOfGoodInstances(t *testing.T) {
	const n = 20
	first := redises(t, n)
	target := fmt.Sprintf("%v+%d:%d", first.Addr(), n, first.Port())
	for _, ports := range []string{"kernel", "bind", "range", "range:40000-41000"} {
		o := run("probe", target, "--rounds", "2", "--interval", "0s", "--timeout", "10s", "--ports", ports, "--local", "127.79.0.9", "--json", "-q")
		require.Equal(t, exitOK, o.code, "%s: %s", ports, o.stderr)
		assert.Empty(t, o.stderr, "-q is quiet")
		var report loadgen.ProbeReport
		require.NoError(t, json.Unmarshal([]byte(o.stdout), &report), "one JSON document")
		require.NoError(t, report.Balanced())
		assert.Equal(t, loadgen.Counts{loadgen.OK: 2 * n}, report.Total().Attempts)
	}
	o := run("probe", target, "--timeout", "10s")
	assert.Equal(t, exitOK, o.code)
	assert.Regexp(t, `(?m)^ +1 +20 +20 +0 +0 +- +0 +0$`, o.stdout)
	assert.Contains(t, o.stdout, "0 of 1 rounds had a timeout; 0 of 20 first tries timed out: 0 %\n")

	var stdout, stderr bytes.Buffer
	rest := fmt.Sprintf("%v+%d:%d", first.Addr().Next(), n-1, first.Port())
	code := connlab([]string{"probe", "-", "--rounds", "2", "--interval", "0s", "--timeout", "10s", "--json"},
		strings.NewReader("# instances\n"+first.String()+" # the first\n\n  "+rest+"\n"), &stdout, &stderr)
	require.Equal(t, exitOK, code, stderr.String())
	var report loadgen.ProbeReport
	require.NoError(t, json.Unmarshal(stdout.Bytes(), &report))
	assert.EqualValues(t, 2*n, report.Total().Instances)
	require.Len(t, report.Rounds, 2)
	assert.Equal(t, 1, report.Rounds[0].Round, "counted as in the table")
	assert.Equal(t, 2, report.Rounds[1].Round)
}

func TestProbeNamesWhatFails(t *testing.T) {
	good, full, nobody := redises(t, 1), unanswering(t), freePort(t)
	o := run("probe", good.String(), full.String(), nobody, "--timeout", "200ms", "--retries", "1")
	assert.Equal(t, exitRefuted, o.code)
	for _, want := range []string{
		`client\(127\.0\.0\.1:\d+\) connect to instance ` + regexp.QuoteMeta(full.String()) + ` timeout, retry times 1\n`,
		`client\(127\.0\.0\.1:\d+\) connect to instance ` + regexp.QuoteMeta(full.String()) + ` timeout, given up after 1 retries\n`,
		`client\(127\.0\.0\.1:\d+\) connect to instance ` + regexp.QuoteMeta(nobody) + ` failed: connect_refused, retry times 1\n`,
	} {
		assert.Regexp(t, want, o.stderr)
	}
	assert.NotContains(t, o.stderr, "instance "+good.String())
	assert.Regexp(t, `(?m)^ +1 +3 +1 +1 +1 +- +2 +0$`, o.stdout)
	assert.Contains(t, o.stdout, "attempts  connect_refused 2, connect_timeout 2, ok 1\n")
	assert.Contains(t, o.stdout, "1 of 1 rounds had a timeout; 1 of 3 first tries timed out: 33.3 %\n")
	assert.Contains(t, o.stdout, "0 of 2 timeouts, retries included, came from a local port that another instance of the round had")

	assert.NotContains(t, o.stdout, "first tries failed", "most did not fail in another way than by timeout")
	assert.NotContains(t, o.stdout, "canceled")

	o = run("probe", nobody, "--retries", "0", "-q", "--json")
	assert.Equal(t, exitRefuted, o.code)
	var report loadgen.ProbeReport
	require.NoError(t, json.Unmarshal([]byte(o.stdout), &report))
	assert.Equal(t, loadgen.Counts{loadgen.ConnectRefused: 1}, report.Total().Attempts)
}

func TestProbeWhereNobodyListens(t *testing.T) {
	host, port, err := net.SplitHostPort(freePort(t))
	require.NoError(t, err)
	o := run("probe", host+"+100:"+port, "--retries", "0", "--rounds", "2", "--interval", "0s", "--timeout", "10s")
	assert.Equal(t, exitRefuted, o.code)
	assert.Contains(t, o.stdout, "\n200 of 200 first tries failed: connect_refused\n0 of 2 rounds had a timeout;")
	log := o.stderr
	for _, round := range []string{"1", "2"} {
		lines, after, found := strings.Cut(log, "round "+round+": and ")
		require.True(t, found, log)
		more, rest, _ := strings.Cut(after, " more like it: connect_refused\n")
		// By chance two instances have one port: that is another kind.
		shown, shared := strings.Count(lines, "connect to instance"), strings.Count(lines, "is also used")
		assert.Equal(t, maxLinesOfAKind, shown-shared, lines)
		assert.Equal(t, strconv.Itoa(100-shown), more, "every attempt is shown or counted")
		log = rest
	}
	assert.Empty(t, log)
}

func TestAttemptLogCapsEachKind(t *testing.T) {
	var lines []string
	l := attemptLog{add: func(text string) { lines = append(lines, text) }, retries: 3}
	other := []netip.AddrPort{netip.MustParseAddrPort("10.8.3.4:6379")}
	for range maxLinesOfAKind + 7 {
		l.attempt(loadgen.Attempt{Class: loadgen.ConnectTimeout})
	}
	l.attempt(loadgen.Attempt{Class: loadgen.OK}) // says nothing
	l.attempt(loadgen.Attempt{Class: loadgen.ConnectTimeout, SharedWith: other})
	l.attempt(loadgen.Attempt{Class: loadgen.OK, Retry: 1, SharedWith: other})
	require.Len(t, lines, maxLinesOfAKind+2, "a suspect is shown however many others there are")
	l.attempt(loadgen.Attempt{Class: loadgen.ConnectTimeout, Round: 1})
	require.Len(t, lines, maxLinesOfAKind+4)
	assert.Equal(t, "round 1: and 7 more like it: connect_timeout", lines[maxLinesOfAKind+2])
	l.endRound()
	assert.Len(t, lines, maxLinesOfAKind+4, "the second round left nothing out")
}

func TestProbeReportOfAStoppedRound(t *testing.T) {
	report := &loadgen.ProbeReport{Load: loadgen.NewReport(), Reply: loadgen.NewHistogram(), Rounds: []loadgen.ProbeRound{{
		Interrupted: true,
		ProbeCounts: loadgen.ProbeCounts{
			Instances: 10, Never: 7, Answered: []int64{3, 0},
			First:    loadgen.Counts{loadgen.OK: 3, loadgen.ConnectTimeout: 1, loadgen.ConnectRefused: 1, loadgen.Canceled: 3, loadgen.NotStarted: 2},
			Attempts: loadgen.Counts{loadgen.OK: 3, loadgen.ConnectTimeout: 1, loadgen.ConnectRefused: 2, loadgen.Canceled: 4},
		},
	}}}
	var out strings.Builder
	require.NoError(t, writeProbe(&out, report))
	// The one that timed out was stopped at its retry; the one refused had all its tries.
	assert.Regexp(t, `(?m)^ *round +instances +ok +timeouts +other +retries until success +failed +lost +canceled$`, out.String())
	assert.Regexp(t, `(?m)^ +1 +10 +3 +1 +1 +- +1 +0 +6$`, out.String())
	assert.Contains(t, out.String(), "1 of 5 first tries timed out: 20 %", "of those that ended")
	assert.Contains(t, out.String(), "of 0 attempts from such a port none timed out, of the other 6 16.7 %\n")
}

func TestProbeNamesBothEndsOfACollision(t *testing.T) {
	good, full := redises(t, 1), unanswering(t)
	_, port, err := net.SplitHostPort(freePort(t))
	require.NoError(t, err)
	o := run("probe", good.String(), full.String(), "--timeout", "200ms", "--retries", "0", "--local", "127.79.0.8", "--ports", "bind:"+port)
	assert.Equal(t, exitRefuted, o.code)
	assert.Equal(t, fmt.Sprintf("client(127.79.0.8:%s) connect to instance %v timeout, given up after 0 retries; local port %s is also used for %v\n", port, full, port, good), o.stderr)
	// The good one shares the port too, unless it had answered before the other began.
	assert.Regexp(t, `(?m)^1 of 1 timeouts, retries included, came from a local port that another instance of the round had: of (1 attempts from such a port 100 % timed out, of the other 1 0 %|2 attempts from such a port 50 % timed out, of the other 0 none)$`, o.stdout)
}

func TestAttemptLine(t *testing.T) {
	target, local := netip.MustParseAddrPort("10.8.1.2:6379"), netip.MustParseAddrPort("10.0.0.2:41234")
	others := []netip.AddrPort{netip.MustParseAddrPort("10.8.3.4:6379"), netip.MustParseAddrPort("10.8.3.5:6379"), netip.MustParseAddrPort("10.8.3.6:6379")}
	for _, test := range []struct {
		attempt loadgen.Attempt
		want    string
	}{
		{loadgen.Attempt{Class: loadgen.OK}, ""},
		{loadgen.Attempt{Class: loadgen.Canceled, Retry: 1}, ""},
		{
			loadgen.Attempt{Class: loadgen.OK, Retry: 1, Target: target, Local: local},
			"client(10.0.0.2:41234) instance 10.8.1.2:6379 answered at retry 1",
		},
		{
			loadgen.Attempt{Class: loadgen.ConnectTimeout, Target: target, Local: local, SharedWith: others[:1]},
			"client(10.0.0.2:41234) connect to instance 10.8.1.2:6379 timeout, retry times 1; local port 41234 is also used for 10.8.3.4:6379",
		},
		{
			loadgen.Attempt{Class: loadgen.ReadTimeout, Retry: 1, Target: target, Local: local, SharedWith: others},
			"client(10.0.0.2:41234) PING to instance 10.8.1.2:6379 timeout, retry times 2; local port 41234 is also used for 10.8.3.4:6379 and 2 more",
		},
		{
			loadgen.Attempt{Class: loadgen.NoLocalPort, Retry: 3, Target: target},
			"client(no port) connect to instance 10.8.1.2:6379 failed: no_local_port, given up after 3 retries",
		},
		{
			loadgen.Attempt{Class: loadgen.ReadReset, Target: target, Local: local},
			"client(10.0.0.2:41234) PING to instance 10.8.1.2:6379 failed: read_reset, retry times 1",
		},
	} {
		assert.Equal(t, test.want, attemptLine(test.attempt, 3))
	}
}

func TestProbeUsage(t *testing.T) {
	for _, test := range []struct {
		args []string
		want string
	}{
		{[]string{}, "wants a target"},
		{[]string{"-"}, "no targets on standard input"},
		{[]string{"localhost:6379"}, `target "localhost:6379": want ADDR`},
		{[]string{"[::1]:6379"}, "want ADDR"},
		{[]string{"127.0.0.1:0"}, "want ADDR"},
		{[]string{"127.0.0.1+0"}, "want ADDR"},
		{[]string{"127.0.0.1+20001"}, "more than 20000 addresses"},
		{[]string{"127.0.0.1+20000", "127.0.0.1"}, "more than 20000 targets"},
		{[]string{"255.255.255.254+3"}, "addresses end at 255.255.255.255"},
		{[]string{"127.0.0.1+3:7", "127.0.0.1:6379", "127.0.0.2:7"}, `target "127.0.0.2:7": 127.0.0.2:7 is there twice`},
		{[]string{"127.0.0.1", "--local", "192.0.2.1"}, "--local 192.0.2.1 is not an address of this host"},
		{[]string{"127.0.0.1", "--rounds", "0"}, "--rounds 0 is out of range"},
		{[]string{"127.0.0.1", "--rounds", "1001"}, "--rounds 1001 is out of range: 1 to 1000"},
		{[]string{"127.0.0.1", "--retries", "-1"}, "--retries -1 is out of range"},
		{[]string{"127.0.0.1", "--interval", "-1s"}, "--interval -1s is out of range"},
		{[]string{"127.0.0.1", "--timeout", "0s"}, "--timeout 0s is out of range"},
		{[]string{"127.0.0.1", "--rate", "NaN"}, "--rate NaN is out of range"},
		{[]string{"127.0.0.1", "--local", "::1"}, "want an IPv4 address"},
		{[]string{"127.0.0.1", "--ports", "odd"}, "--ports odd: want kernel"},
		{[]string{"127.0.0.1", "--ports", "kernel:5"}, "want kernel"},
		{[]string{"127.0.0.1", "--ports", "bind:0"}, "want kernel"},
		{[]string{"127.0.0.1", "--ports", "range:5"}, "want kernel"},
		{[]string{"127.0.0.1", "--ports", "range:5-4"}, "want kernel"},
		{[]string{"127.0.0.1", "--ports", "range:5-70000"}, "want kernel"},
	} {
		o := run(append([]string{"probe"}, test.args...)...)
		assert.Equal(t, exitUsage, o.code, test.args)
		assert.Contains(t, o.stderr, test.want)
		assert.Equal(t, 1, strings.Count(o.stderr, "\n"), "one line: %s", o.stderr)
		assert.Empty(t, o.stdout)
	}
}

func TestProbeTargetsOfStandardInput(t *testing.T) {
	for _, test := range []struct{ why, lines, want string }{
		{"a name, after lines that do not count", "# instances\n\n127.0.0.1\nlocalhost # us\n", `standard input, line 4: target "localhost": want ADDR`},
		{"one of a range again", "127.0.0.1+3:7\n127.0.0.3:7\n", `standard input, line 2: target "127.0.0.3:7": 127.0.0.3:7 is there twice`},
		{"only comments", "# none yet\n", "no targets on standard input"},
	} {
		_, err := probeTargets([]string{"-"}, strings.NewReader(test.lines))
		require.ErrorContains(t, err, test.want, test.why)
		assert.Equal(t, exitUsage, exitCode(err), test.why)
	}
	_, err := probeTargets([]string{"-"}, strings.NewReader("127.0.0.1\n"+strings.Repeat("1", bufio.MaxScanTokenSize+1)))
	assert.ErrorContains(t, err, "standard input, line 2: ", "a line without an end")
}

func TestParseTargets(t *testing.T) {
	for _, test := range []struct {
		arg         string
		n           int
		first, last string
	}{
		{"10.8.0.1", 1, "10.8.0.1:6379", "10.8.0.1:6379"},
		{"10.8.0.1:6380", 1, "10.8.0.1:6380", "10.8.0.1:6380"},
		{"10.8.0.1+1000:6379", 1000, "10.8.0.1:6379", "10.8.3.232:6379"},
		{"10.8.0.255+2", 2, "10.8.0.255:6379", "10.8.1.0:6379"},
		{"255.255.255.254+2:1", 2, "255.255.255.254:1", "255.255.255.255:1"},
	} {
		targets, err := parseTargets(test.arg)
		require.NoError(t, err, test.arg)
		require.Len(t, targets, test.n, test.arg)
		assert.Equal(t, test.first, targets[0].String())
		assert.Equal(t, test.last, targets[test.n-1].String())
	}
}

func FuzzParseTargets(f *testing.F) {
	for _, seed := range []string{"10.8.0.1", "10.8.0.1:6380", "10.8.0.1+1000:6379", "255.255.255.255+2", "127.0.0.1+20001", "[::1]:1", "+1:1", "1.2.3.4+:", "1.2.3.4+1+1:1:1"} {
		f.Add(seed)
	}
	f.Fuzz(func(t *testing.T, arg string) {
		targets, err := parseTargets(arg)
		if err != nil {
			assert.Equal(t, exitUsage, exitCode(err))
			assert.Empty(t, targets)
			return
		}
		require.NotEmpty(t, targets)
		require.LessOrEqual(t, len(targets), maxProbeTargets)
		first, last := targets[0], targets[len(targets)-1]
		require.True(t, first.Addr().Is4() && first.Port() != 0, "%v", first)
		require.Equal(t, first.Port(), last.Port())
		// Written out, it says the same.
		again, err := parseTargets(fmt.Sprintf("%v+%d:%d", first.Addr(), len(targets), first.Port()))
		require.NoError(t, err)
		require.Equal(t, targets, again)
	})
}

// stopped is a terminal that stands still until it is let go.
type stopped struct {
	bytes.Buffer
	resume chan struct{}
}

func (s *stopped) Write(b []byte) (int, error) {
	<-s.resume
	return s.Buffer.Write(b)
}

func TestProbeLogOfAStoppedTerminal(t *testing.T) {
	terminal := &stopped{resume: make(chan struct{})}
	log := startProbeLog(&statusLine{w: terminal}, &loadgen.Progress{})
	const lines = 2 * maxPendingLines
	for i := range lines {
		log.add(strconv.Itoa(i)) // waits for ever if it waits at all
	}
	close(terminal.resume)
	log.end()
	written := strings.Split(strings.TrimSpace(terminal.String()), "\n")
	shown := slices.DeleteFunc(slices.Clone(written), func(line string) bool { return strings.Contains(line, " ") })
	assert.GreaterOrEqual(t, len(shown), maxPendingLines)
	for i, line := range shown[:maxPendingLines] {
		require.Equal(t, strconv.Itoa(i), line, "the first ones, in order")
	}
	// The line that the terminal was given made room for one more, whenever that was.
	assert.LessOrEqual(t, len(shown), maxPendingLines+1)
	assert.Equal(t, fmt.Sprintf("%d lines not shown", lines-len(shown)), written[len(written)-1], "every line is shown or counted")
}

func TestProbeInterrupted(t *testing.T) {
	target := redises(t, 1)
	cmd := exec.Command(os.Args[0], "probe", target.String(), "--rounds", "2", "--interval", "1h")
	cmd.Env = append(os.Environ(), asConnlab+"=1")
	var stdout bytes.Buffer
	cmd.Stdout = &stdout
	stderr, err := cmd.StderrPipe()
	require.NoError(t, err)
	require.NoError(t, cmd.Start())
	said := ""
	for lines := bufio.NewScanner(stderr); lines.Scan(); {
		said += lines.Text() + "\n"
		if strings.Contains(lines.Text(), "in flight 0, ok 1") { // the progress, once a second
			require.NoError(t, cmd.Process.Signal(unix.SIGINT))
		}
	}
	var exit *exec.ExitError
	require.ErrorAs(t, cmd.Wait(), &exit)
	assert.Equal(t, exitVoid, exit.ExitCode(), said)
	assert.Regexp(t, `(?m)^ +1 +1 +1 +0 +0 +- +0 +0$`, stdout.String(), "what was probed before")
	assert.Contains(t, said, "connlab: interrupted")
}
