package main

import (
	"bufio"
	"fmt"
	"io"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"syscall"
	"testing"
	"time"

	"github.com/stretchr/testify/assert"
	"github.com/stretchr/testify/require"
	"golang.org/x/sys/unix"
)

func TestBalancerUsage(t *testing.T) {
	for _, tt := range []struct {
		why  string
		args []string
		want string
	}{
		{"a command without --", []string{"true"}, `takes the command after --; got "true"`},
		{"no such command", []string{"--", "/no/such"}, "/no/such"},
		{"a path without a balancer", []string{"--path", "redis", "--", "true"}, "path=redis: there is: l4, fullnat, kernel-nat, l7, haproxy"},
		{"another", []string{"--path", "proxies", "--", "true"}, "path=proxies: there is: l4, fullnat"},
		{"no shared tuple to reply to", []string{"--path", "haproxy", "--reply", "last", "--", "true"}, "reply=last is for path=l4"},
		{"unknown reply", []string{"--reply", "none", "--", "true"}, "reply=none: there is: first, last"},
		{"more instances than addresses", []string{"--vips", "2001", "--", "true"}, "vips=2001 is out of range: 1 to 2000"},
		{"no proxy", []string{"--proxies", "0", "--", "true"}, "proxies=0 is out of range: 1 to 1000"},
		{"no backlog", []string{"--max-syn-backlog", "0", "--", "true"}, "max-syn-backlog=0 is out of range"},
		{"a parameter of the load", []string{"--rounds", "3", "--", "true"}, "unknown flag: --rounds"},
		{"unknown server", []string{"--server", "memcached", "--", "true"}, `unknown server "memcached"`},
	} {
		t.Run(tt.why, func(t *testing.T) {
			o := run(append([]string{"balancer"}, tt.args...)...)
			assert.Equal(t, exitUsage, o.code)
			assert.Contains(t, o.stderr, tt.want)
			assert.NotContains(t, o.stderr, "pairs", "there is no such flag here")
		})
	}
	help := run("balancer", "--help").stdout
	for _, want := range []string{"--path balancer", "l4, fullnat, kernel-nat, l7, haproxy", "--server kind", "128+n"} {
		assert.Contains(t, help, want)
	}
}

// smallBalancer is a network that stands soon.
func smallBalancer(command ...string) []string {
	return append([]string{"balancer", "-q", "--vips", "4", "--proxies", "2", "--"}, command...)
}

// The command's input, output and exit status are as they would be without connlab.
func TestBalancerRunsACommand(t *testing.T) {
	needLab(t)
	t.Setenv(asConnlab, "1") // its proxies and instances are this binary too
	for _, tt := range []struct {
		why, script    string
		code           int
		stdout, stderr string
	}{
		{"input and output", "cat; echo err >&2", exitOK, "typed\n", "err\n"},
		{"an exit code", "exit 7", 7, "", ""},
		{"a signal", "kill -TERM $$", 128 + int(unix.SIGTERM), "", ""},
		{"the balancer answers at the last VIP", `exec 3<>/dev/tcp/10.8.0.4/6379; printf 'PING\r\n' >&3; head -1 <&3`, exitOK, "+PONG\r\n", ""},
		{"there is no more than the network's", "ls /sys/class/net >/dev/null; cut -d: -f1 -s /proc/net/dev | tr -d ' '", exitOK, "lo\neth0\n", ""},
	} {
		t.Run(tt.why, func(t *testing.T) {
			var stdout, stderr strings.Builder
			code := connlab(smallBalancer("bash", "-c", tt.script), strings.NewReader("typed\n"), &stdout, &stderr)
			assert.Equal(t, tt.code, code)
			assert.Equal(t, tt.stdout, stdout.String())
			assert.Equal(t, tt.stderr, stderr.String())
		})
	}
}

// connlab is a command like any other, with a network within the network.
func TestBalancerInABalancer(t *testing.T) {
	needLab(t)
	t.Setenv(asConnlab, "1")
	o := run(smallBalancer(append([]string{"connlab"}, smallBalancer("sh", "-c", "echo inside; exit 4")...)...)...)
	assert.Equal(t, outcome{4, "inside\n", ""}, o)
}

// What the command leaves behind goes with it, also when it holds the output.
func TestBalancerEndsWhatTheCommandLeaves(t *testing.T) {
	needLab(t)
	t.Setenv(asConnlab, "1")
	mark, value := balancerMark()
	t.Setenv(mark, value)
	o := run(smallBalancer("sh", "-c", "sleep 61 & setsid sleep 62 & echo $$")...)
	assert.Equal(t, exitOK, o.code, o.stderr)
	assert.NotEmpty(t, o.stdout)
	assert.Empty(t, withMark(t, mark, value))
}

// asProcess runs the verb as a process of its own, marked as all that it starts.
func asProcess(t *testing.T, mark, value string, args ...string) *exec.Cmd {
	t.Helper()
	cmd := exec.Command(os.Args[0], args...)
	cmd.Env = append(os.Environ(), asConnlab+"=1", mark+"="+value)
	t.Cleanup(func() {
		if cmd.ProcessState == nil && cmd.Process != nil {
			_ = cmd.Process.Kill()
			_ = cmd.Wait()
		}
	})
	return cmd
}

// started runs cmd and returns its standard output after the first line.
func started(t *testing.T, cmd *exec.Cmd) *bufio.Reader {
	t.Helper()
	out, err := cmd.StdoutPipe()
	require.NoError(t, err)
	require.NoError(t, cmd.Start())
	lines := bufio.NewReader(out)
	_, err = lines.ReadString('\n')
	require.NoError(t, err)
	return lines
}

func TestBalancerKilledLeavesNothing(t *testing.T) {
	needLab(t)
	mark, value := balancerMark()
	cmd := asProcess(t, mark, value, smallBalancer("sh", "-c", "(setsid sleep 47; true) & sleep 48 & echo; wait; true")...)
	started(t, cmd)
	var namespaces map[string]bool
	require.Eventually(t, func() bool { // the shell, its subshell and two sleeps among others
		var sleeps int
		namespaces = map[string]bool{}
		for _, dir := range withMark(t, mark, value) {
			name, _ := os.ReadFile(dir + "/comm")
			if string(name) == "sleep\n" {
				sleeps++
			}
			if ns, err := os.Readlink(dir + "/ns/net"); err == nil {
				namespaces[ns] = true
			}
		}
		return sleeps == 2
	}, 20*time.Second, 5*time.Millisecond)
	own, err := os.Readlink("/proc/self/ns/net")
	require.NoError(t, err)
	delete(namespaces, own)
	require.Len(t, namespaces, 4, "two proxies, the instances, the client")

	require.NoError(t, cmd.Process.Kill())
	require.ErrorContains(t, cmd.Wait(), "signal: killed")
	require.Eventually(t, func() bool { return len(withMark(t, mark, value)) == 0 }, 20*time.Second, 5*time.Millisecond)
	require.Eventually(t, func() bool { return !inUse(t, namespaces) }, 20*time.Second, 5*time.Millisecond)
}

// An interrupt ends connlab while it builds; when the command runs it is the
// command's, and SIGTERM ends both.
func TestBalancerInterrupted(t *testing.T) {
	needLab(t)
	mark, value := balancerMark()
	t.Run("while it builds", func(t *testing.T) {
		args := []string{"balancer", "--proxies", "1000", "--", "sh", "-c", "echo ran"}
		cmd := asProcess(t, mark, value, args...)
		var stdout strings.Builder
		cmd.Stdout = &stdout
		progress, err := cmd.StderrPipe()
		require.NoError(t, err)
		require.NoError(t, cmd.Start())
		_, err = bufio.NewReader(progress).ReadString('\n')
		require.NoError(t, err)
		require.NoError(t, cmd.Process.Signal(unix.SIGINT))
		_, _ = io.Copy(io.Discard, progress)
		assert.Equal(t, exitVoid, exitCodeOf(t, cmd.Wait()))
		assert.Empty(t, stdout.String(), "the command did not run")
	})
	t.Run("while the command runs", func(t *testing.T) {
		cmd := asProcess(t, mark, value, smallBalancer("sh", "-c", "echo; read line; echo $line; exit 9")...)
		stdin, err := cmd.StdinPipe()
		require.NoError(t, err)
		out := started(t, cmd)
		for _, s := range []os.Signal{unix.SIGINT, unix.SIGQUIT} {
			require.NoError(t, cmd.Process.Signal(s))
		}
		_, err = io.WriteString(stdin, "still here\n")
		require.NoError(t, err)
		line, err := out.ReadString('\n')
		require.NoError(t, err)
		assert.Equal(t, "still here\n", line)
		assert.Equal(t, 9, exitCodeOf(t, cmd.Wait()))
	})
	t.Run("by SIGTERM", func(t *testing.T) {
		cmd := asProcess(t, mark, value, smallBalancer("sh", "-c", "trap '' TERM; echo; sleep 49 & wait")...)
		started(t, cmd)
		require.NoError(t, cmd.Process.Signal(unix.SIGTERM))
		assert.Equal(t, exitVoid, exitCodeOf(t, cmd.Wait()))
	})
	assert.Empty(t, withMark(t, mark, value))
}

// A person at a terminal: an interactive shell has job control, Ctrl-C reaches what
// runs in it and not the network, and the terminal is its owner's again at the end.
func TestBalancerAtATerminal(t *testing.T) {
	needLab(t)
	mark, value := balancerMark()
	keyboard, tty := openTerminal(t)
	around := `"$@"; echo "code $?"; read line; echo "read $line"`
	args := append([]string{"-c", around, "sh", os.Args[0]}, smallBalancer("bash", "--norc", "--noprofile", "-i")...)
	cmd := exec.Command("/bin/sh", args...)
	cmd.Env = append(os.Environ(), asConnlab+"=1", mark+"="+value, "PS1=prompt> ", "TERM=dumb")
	cmd.Stdin, cmd.Stdout, cmd.Stderr = tty, tty, tty
	cmd.SysProcAttr = &syscall.SysProcAttr{Setsid: true, Setctty: true}
	require.NoError(t, cmd.Start())
	t.Cleanup(func() {
		if cmd.ProcessState == nil {
			_ = cmd.Process.Kill()
			_ = cmd.Wait()
		}
	})
	require.NoError(t, keyboard.SetDeadline(time.Now().Add(time.Minute)))
	var screen strings.Builder
	seen := 0 // of it
	await := func(text string) {
		t.Helper()
		b := make([]byte, 4096)
		for !strings.Contains(screen.String()[seen:], text) {
			n, err := keyboard.Read(b)
			require.NoError(t, err, "waiting for %q; the screen:\n%s", text, &screen)
			screen.Write(b[:n])
		}
		seen += strings.Index(screen.String()[seen:], text) + len(text)
	}
	enter := func(text string) {
		t.Helper()
		_, err := keyboard.WriteString(text)
		require.NoError(t, err)
	}
	await("prompt> ")
	enter(`sh -c 'echo fr""ont; exec sleep 1000'` + "\n")
	await("front\r\n")
	enter("\x03")
	await("prompt> ")
	enter(`echo status $?; sh -c 'echo ag""ain; exec sleep 1000'` + "\n")
	await("status 130\r\n")
	await("again\r\n")
	enter("\x1a")
	await("Stopped")
	enter("kill %1; exec 3<>/dev/tcp/10.8.0.1/6379; printf 'PING\\r\\n' >&3; head -1 <&3\n")
	await("+PONG")
	enter("exit 7\n")
	await("code 7\r\n")
	enter("typed\n")
	await("read typed\r\n")
	require.NoError(t, cmd.Wait())
	assert.NotContains(t, screen.String(), "no job control")
	assert.Empty(t, withMark(t, mark, value))
}

// openTerminal makes a terminal: where its keyboard and screen are, and its other end.
func openTerminal(t *testing.T) (keyboard, tty *os.File) {
	t.Helper()
	fd, err := unix.Open("/dev/ptmx", unix.O_RDWR|unix.O_NOCTTY|unix.O_CLOEXEC|unix.O_NONBLOCK, 0)
	require.NoError(t, err)
	keyboard = os.NewFile(uintptr(fd), "/dev/ptmx")
	t.Cleanup(func() { _ = keyboard.Close() })
	require.NoError(t, unix.IoctlSetPointerInt(fd, unix.TIOCSPTLCK, 0))
	number, err := unix.IoctlGetInt(fd, unix.TIOCGPTN)
	require.NoError(t, err)
	tty, err = os.OpenFile(fmt.Sprintf("/dev/pts/%d", number), os.O_RDWR|unix.O_NOCTTY, 0)
	require.NoError(t, err)
	t.Cleanup(func() { _ = tty.Close() })
	return keyboard, tty
}

func exitCodeOf(t *testing.T, err error) int {
	t.Helper()
	var exit *exec.ExitError
	require.ErrorAs(t, err, &exit)
	return exit.ExitCode()
}

// balancerMark is a variable in the environment of all that one test starts.
func balancerMark() (name, value string) {
	return "CONNLAB_TEST_BALANCER", fmt.Sprintf("%d-%d", os.Getpid(), time.Now().UnixNano())
}

// withMark is where /proc has the processes that have the mark.
func withMark(t *testing.T, name, value string) (dirs []string) {
	t.Helper()
	environs, err := filepath.Glob("/proc/[0-9]*/environ")
	require.NoError(t, err)
	for _, path := range environs {
		env, _ := os.ReadFile(path) // empty for a zombie
		if strings.Contains(string(env), name+"="+value) {
			dirs = append(dirs, filepath.Dir(path))
		}
	}
	return dirs
}

// inUse is whether a process or an open file still holds one of the namespaces.
func inUse(t *testing.T, namespaces map[string]bool) bool {
	t.Helper()
	for _, pattern := range []string{"/proc/[0-9]*/task/[0-9]*/ns/net", "/proc/[0-9]*/fd/[0-9]*"} {
		paths, err := filepath.Glob(pattern)
		require.NoError(t, err)
		for _, path := range paths {
			if name, err := os.Readlink(path); err == nil && namespaces[name] {
				return true
			}
		}
	}
	return false
}
