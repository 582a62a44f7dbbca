package proxy

import (
	"bufio"
	"bytes"
	"context"
	"fmt"
	"io"
	"net"
	"os"
	"os/exec"
	"os/signal"
	"strings"
	"testing"
	"time"

	"github.com/stretchr/testify/assert"
	"github.com/stretchr/testify/require"
	"go.uber.org/goleak"
	"golang.org/x/sys/unix"
)

// asProgram has the test binary run as the proxy program, for tests that need one in a process of its own.
const asProgram = "CONNLAB_PROXY_PROGRAM"

func TestMain(m *testing.M) {
	if os.Getenv(asProgram) == "" {
		goleak.VerifyTestMain(m)
		return
	}
	ctx, stop := signal.NotifyContext(context.Background(), os.Interrupt, unix.SIGTERM)
	code := Main(ctx, os.Args[1:], os.Stdout, os.Stderr)
	stop()
	os.Exit(code)
}

func TestMainUsage(t *testing.T) {
	route := "--route=127.8.0.0/16=127.9.0.0/16:6379"
	for _, tt := range []struct {
		why  string
		args []string
		code int
		want string
	}{
		{"help is no mistake", []string{"--help"}, exitOK, "-send-header"},
		{"unknown flag", []string{"--fast"}, exitUsage, "--fast: flag provided but not defined"},
		{"a flag without its value", []string{"--route"}, exitUsage, "--route: flag needs an argument"},
		{"no port behind a prefix", []string{"--route", "10.8.0.0/16=10.9.0.0/16"}, exitUsage, "connlab: proxy: --route 10.8.0.0/16=10.9.0.0/16: the port is missing; want 10.9.0.0/16:6379"},
		{"a name to listen on", []string{route, "--addr", "localhost:6379"}, exitUsage, "--addr localhost:6379: want an IPv4 address and a port, as"},
		{"not a number", []string{route, "--option-kind=x"}, exitUsage, "--option-kind x: want a number"},
		{"neither true nor false", []string{route, "--verbose=maybe"}, exitUsage, "--verbose maybe: want true or false"},
		{"not a duration", []string{route, "--connect-timeout=5"}, exitUsage, "--connect-timeout 5: want a duration"},
		{"its own upstream", []string{"--addr=127.0.0.1:7399", "--default=127.0.0.1:7399"}, exitUsage, "--default 127.0.0.1:7399: 127.0.0.1:7399 is the proxy itself"},
		{"an argument", []string{route, "127.0.0.1"}, exitUsage, `unexpected argument "127.0.0.1"`},
		{"nowhere to go", nil, exitUsage, "give --route, as 10.8.0.0/16=10.9.0.0/16:6379, or --default, as"},
		{"no route", []string{"--route", "10.8.0.0/16"}, exitUsage, "--route 10.8.0.0/16: the upstream is missing; want prefix=upstream"},
		{"unreachable route", []string{route, "--route=127.8.3.0/24=127.0.0.1:1"}, exitUsage, "is never reached"},
		{"unknown teacher", []string{route, "--learn", "dns"}, exitUsage, "--learn dns: want option, header or local"},
		{"a kind without a length", []string{route, "--option-kind", "1"}, exitUsage, "--option-kind 1: this kind has a meaning of its own"},
		{"a kind of nine bits", []string{route, "--option-kind", "256"}, exitUsage, "--option-kind 256: want a number"},
		{"IPv6 listener", []string{route, "--addr", "[::1]:6379"}, exitUsage, "--addr [::1]:6379: want an IPv4 address and a port"},
		{"IPv6 default", []string{"--default", "[::1]:6379"}, exitUsage, "--default [::1]:6379: want an IPv4 address and a port"},
		{"default without a port", []string{"--default", "127.0.0.1:0"}, exitUsage, "--default 127.0.0.1:0: want an IPv4 address and a port"},
		{"IPv6 source", []string{route, "--source", "::1"}, exitUsage, "--source ::1: want an IPv4 address"},
		{"no patience", []string{route, "--connect-timeout", "0s"}, exitUsage, "--connect-timeout 0s: want a duration above 0"},
		{"somebody else's source", []string{route, "--addr=127.0.0.1:0", "--source", "192.0.2.1"}, exitFailure, "binding the source address 192.0.2.1: cannot assign"},
		{"somebody else's address", []string{route, "--addr=192.0.2.1:0"}, exitFailure, "starting the proxy"},
	} {
		t.Run(tt.why, func(t *testing.T) {
			var stdout, stderr bytes.Buffer
			assert.Equal(t, tt.code, Main(t.Context(), tt.args, &stdout, &stderr))
			assert.Contains(t, stderr.String(), tt.want)
			assert.Empty(t, stdout.String())
			if tt.code == exitUsage {
				assert.Regexp(t, `^connlab: proxy: .* \(see connlab proxy --help\)\n$`, stderr.String(), "one line")
			}
		})
	}
}

// program is the proxy in a process of its own.
type program struct {
	cmd    *exec.Cmd
	addr   string
	stderr *bytes.Buffer
}

func startProgram(t *testing.T, args ...string) *program {
	t.Helper()
	self, err := os.Executable()
	require.NoError(t, err)
	p := &program{cmd: exec.Command(self, append([]string{"--addr", "127.0.0.1:0"}, args...)...), stderr: &bytes.Buffer{}}
	p.cmd.Env = append(os.Environ(), asProgram+"=1")
	p.cmd.Stderr = p.stderr
	out, err := p.cmd.StdoutPipe()
	require.NoError(t, err)
	start(t, p.cmd)
	line, err := bufio.NewReader(out).ReadString('\n')
	require.NoError(t, err, "waiting for the ready line")
	var learn string
	var pid int
	_, err = fmt.Sscanf(line, "ready addr=%s learn=%s pid=%d", &p.addr, &learn, &pid)
	require.NoError(t, err, "ready line %q", line)
	require.Equal(t, p.cmd.Process.Pid, pid)
	return p
}

// end has the program end in order and returns what it said.
func (p *program) end(t *testing.T) string {
	t.Helper()
	require.NoError(t, p.cmd.Process.Signal(unix.SIGTERM))
	timer := time.AfterFunc(patience, func() { _ = p.cmd.Process.Kill() })
	defer timer.Stop()
	require.NoError(t, p.cmd.Wait(), "SIGTERM is an orderly end; stderr: %s", p.stderr)
	return p.stderr.String()
}

func TestProgram(t *testing.T) {
	echo := startEcho(t, "127.0.0.1:0")
	p := startProgram(t, "--learn", "local", "--verbose", "--route", "127.0.0.1/32="+echo.addr())
	c := dial(t, p.addr)
	c.say("hello")
	c.hear("hello")
	require.NoError(t, c.Close())
	stays := dial(t, p.addr)
	stays.say("still here")
	stays.hear("still here")
	// The first is over when the upstream has seen its end.
	echo.waitFor("the first connection to end", func() bool { return echo.ended.Load() == 1 })
	said := p.end(t)
	stays.hearEnd()
	assert.Contains(t, said, "accepted 2 (open 0, closed 1,")
	assert.Contains(t, said, "cut off 1)")
	assert.Contains(t, said, "bytes to upstream 15, to client 15\n")
}

func TestProgramIsQuiet(t *testing.T) {
	p := startProgram(t, "--route", "10.8.0.0/16=127.0.0.1:1")
	wantReset(t, p.addr, "")
	assert.Empty(t, p.end(t))

	p = startProgram(t, "--route", "10.8.0.0/16=127.0.0.1:1", "--verbose")
	wantReset(t, p.addr, "")
	assert.Regexp(t, `^proxy: client 127\.0\.0\.1:\d+, VIP unknown: the SYN has no option with a VIP\n`+
		`proxy: accepted 1 \(open 0, closed 0, no VIP 1,.*\n$`, p.end(t))
}

func TestAddressInUse(t *testing.T) {
	l, err := net.Listen("tcp4", "127.0.0.1:0")
	require.NoError(t, err)
	defer l.Close()
	var stdout, stderr bytes.Buffer
	code := Main(t.Context(), []string{"--addr", l.Addr().String(), "--default", "127.0.0.1:1"}, &stdout, &stderr)
	assert.Equal(t, exitFailure, code)
	assert.Contains(t, stderr.String(), "address already in use")
	assert.Equal(t, 1, strings.Count(stderr.String(), "\n"), "one line: %s", &stderr)
}

// Without descriptors the proxy pauses, says so in its counters, and goes on when there are some again. A connection that
// got the last one has none for its upstream and is reset.
func TestOutOfDescriptors(t *testing.T) {
	echo := startEcho(t, "127.0.0.1:0")
	p := startProgram(t, "--learn", "local", "--verbose", "--route", "127.0.0.1/32="+echo.addr())
	// Runtime and listener have some open already; 40 leave room for about 15 pairs.
	lim := unix.Rlimit{Cur: 40, Max: 40}
	require.NoError(t, unix.Prlimit(p.cmd.Process.Pid, unix.RLIMIT_NOFILE, &lim, nil))
	served := func(wait time.Duration) (net.Conn, bool) {
		c, err := net.Dial("tcp4", p.addr)
		if err != nil {
			require.ErrorIs(t, err, unix.ECONNRESET)
			return nil, false
		}
		t.Cleanup(func() { _ = c.Close() })
		require.NoError(t, c.SetDeadline(time.Now().Add(wait)))
		_, _ = io.WriteString(c, "x")
		_, err = c.Read(make([]byte, 1))
		return c, err == nil
	}
	var conns []net.Conn
	for len(conns) < 40 {
		c, ok := served(2 * time.Second)
		if !ok {
			break
		}
		conns = append(conns, c)
	}
	assert.Greater(t, len(conns), 5)
	assert.Less(t, len(conns), 20)
	for range 5 { // they wait in the accept queue, or are reset
		_, ok := served(50 * time.Millisecond)
		assert.False(t, ok, "there is no descriptor for it")
	}
	for _, c := range conns {
		require.NoError(t, c.Close())
	}
	eventually(t, func() string { return "nobody is served after descriptors came free" }, func() bool {
		_, ok := served(time.Second)
		return ok
	})
	said := p.end(t)
	var errorsSeen int
	_, rest, found := strings.Cut(said, "accept errors ")
	require.True(t, found, said)
	_, err := fmt.Sscanf(rest, "%d,", &errorsSeen)
	require.NoError(t, err, rest)
	assert.Positive(t, errorsSeen, said)
	assert.Less(t, errorsSeen, 200, "it must not spin: %s", said)
}
