package netlab

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"io/fs"
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
)

func sh(script string) Program { return Program{Path: "/bin/sh", Args: []string{"-c", script}} }

var errNever = errors.New("never")

func never() error { return errNever }

func TestProgramRunsInTheNamespace(t *testing.T) {
	lab := up(t, star(1))
	server := lab.Host("server")
	var copied bytes.Buffer
	prog := sh("readlink /proc/self/ns/net; echo $WORD; pwd; echo to stderr >&2")
	prog.Env, prog.Dir, prog.Stdout = []string{"WORD=word"}, "/", &copied
	p, err := server.Start(t.Context(), prog)
	require.NoError(t, err)
	<-p.Done()
	assert.Same(t, server, p.Host())
	want := inode(t, server) + "\nword\n/\n"
	assert.Equal(t, want, copied.String())
	assert.ElementsMatch(t, strings.Split(want+"to stderr\n", "\n"), strings.Split(p.Output(), "\n"))
}

func TestReadiness(t *testing.T) {
	lab := up(t, star(1))
	server := lab.Host("server")
	prog := self("listener")
	asked := 0
	prog.Ready = func() error {
		asked++
		return server.Listening(7000)
	}
	p, err := server.Start(t.Context(), prog)
	require.NoError(t, err)
	assert.Greater(t, asked, 1, "it listens only after a while")
	conn, err := lab.Host("client-001").DialContext(t.Context(), "tcp", "10.66.0.2:7000")
	require.NoError(t, err)
	require.NoError(t, conn.Close())
	assert.NoError(t, p.Stop(10*time.Second), "to die of the SIGTERM is no failure")
	assert.Equal(t, "listening\n", p.Output())
	assert.Error(t, server.Listening(7000))
}

func TestStartErrors(t *testing.T) {
	lab := up(t, star(1))
	server := lab.Host("server")
	cancelled, cancel := context.WithCancel(t.Context())
	cancel()
	for _, row := range []struct {
		reason string
		ctx    context.Context
		prog   Program
		ready  func() error
		is     error
		text   string
	}{
		{"no such program", t.Context(), Program{Path: "/no/such"}, nil, fs.ErrNotExist, "starting /no/such: host server: fork/exec /no/such: no such file or directory"},
		{"ends with an error", t.Context(), sh("echo boom >&2; exit 3"), never, nil, "host server: /bin/sh -c echo boom >&2; exit 3: ended before it was ready: exit status 3\nboom"},
		{"ends without an error", t.Context(), sh("exit 0"), never, nil, "host server: /bin/sh -c exit 0: ended before it was ready: exit status 0 (no output)"},
		{"never ready", t.Context(), sh("exec sleep 1000"), never, errNever, "host server: /bin/sh -c exec sleep 1000: not ready after 50ms: never (no output)"},
		{"cancelled before", cancelled, sh("exec sleep 1000"), never, context.Canceled, "starting /bin/sh: host server: context canceled"},
	} {
		t.Run(row.reason, func(t *testing.T) {
			row.prog.Ready, row.prog.ReadyTimeout = row.ready, 50*time.Millisecond
			if strings.HasPrefix(row.reason, "ends") {
				row.prog.ReadyTimeout = 0 // ten seconds
			}
			p, err := server.Start(row.ctx, row.prog)
			assert.Nil(t, p)
			require.EqualError(t, err, row.text)
			if row.is != nil {
				require.ErrorIs(t, err, row.is)
			}
			assert.Empty(t, lab.procs, "it is gone")
		})
	}
}

func TestStop(t *testing.T) {
	lab := up(t, star(1))
	server := lab.Host("server")
	start := func(script string) *Process {
		prog := sh(script)
		var p *Process
		ready := make(chan struct{})
		prog.Stdout = writerFunc(func([]byte) { close(ready) })
		p, err := server.Start(t.Context(), prog)
		require.NoError(t, err)
		<-ready // the script's one line says that its trap is set
		return p
	}
	t.Run("in order", func(t *testing.T) {
		p := start(`trap "exit 0" TERM; echo; while :; do sleep 0.01; done`)
		assert.NoError(t, p.Stop(10*time.Second))
	})
	t.Run("with a failure", func(t *testing.T) {
		p := start(`trap "echo bad >&2; exit 4" TERM; echo; while :; do sleep 0.01; done`)
		assert.ErrorContains(t, p.Stop(10*time.Second), ": exit status 4\nbad")
	})
	t.Run("stopped by SIGSTOP", func(t *testing.T) {
		p := start("echo; exec sleep 1000")
		require.NoError(t, p.Signal(unix.SIGSTOP))
		await(t, "the program stops", func() (bool, any) {
			s := processState(p.Pid())
			return s == "T", s
		})
		assert.NoError(t, p.Stop(10*time.Second))
	})
	t.Run("deaf", func(t *testing.T) {
		p := start(`trap "" TERM; echo; while :; do sleep 0.01; done`)
		require.ErrorContains(t, p.Stop(50*time.Millisecond), "did not end within 50ms of SIGTERM")
		assert.Empty(t, processState(p.Pid()))
	})
	t.Run("ended by itself", func(t *testing.T) {
		p := start("echo; exit 5")
		<-p.Done()
		require.ErrorContains(t, p.Stop(time.Second), " had ended: exit status 5")
		assert.ErrorIs(t, p.Signal(unix.SIGSTOP), os.ErrProcessDone)
	})
	t.Run("with its context", func(t *testing.T) {
		ctx, cancel := context.WithCancel(t.Context())
		p, err := server.Start(ctx, sh("exec sleep 1000"))
		require.NoError(t, err)
		cancel()
		<-p.Done()
		assert.Empty(t, processState(p.Pid()))
	})
}

type writerFunc func([]byte)

func (f writerFunc) Write(b []byte) (int, error) {
	f(b)
	return len(b), nil
}

// processState is the letter of proc_pid_stat(5), "" for a process that is gone
// or dead.
func processState(pid int) string {
	b, err := os.ReadFile("/proc/" + strconv.Itoa(pid) + "/stat")
	if err != nil {
		return ""
	}
	_, rest, _ := strings.Cut(string(b), ") ")
	state, _, _ := strings.Cut(rest, " ")
	if state == "Z" || state == "X" {
		return ""
	}
	return state
}

// What a program started and did not end goes with it, or the namespace stays.
func TestDownEndsProgramsAndTheirChildren(t *testing.T) {
	lab := up(t, star(1))
	lines := make(chan string, 1)
	prog := sh("sleep 1000 >/dev/null 2>&1 & echo $!; wait")
	prog.Stdout = writerFunc(func(b []byte) { lines <- string(b) })
	p, err := lab.Host("server").Start(t.Context(), prog)
	require.NoError(t, err)
	child, err := strconv.Atoi(strings.TrimSpace(<-lines))
	require.NoError(t, err)
	require.NotEmpty(t, processState(child))
	require.NoError(t, lab.Down())
	assert.Empty(t, processState(p.Pid()))
	await(t, "the program's child is gone", func() (bool, any) { s := processState(child); return s == "", s })
}

func TestStdin(t *testing.T) {
	lab := up(t, star(1))
	server := lab.Host("server")
	t.Run("is read to its end", func(t *testing.T) {
		config := strings.Repeat("a line of configuration\n", 10_000) // more than a pipe holds
		prog := sh("cat; echo end")
		var out bytes.Buffer
		prog.Stdin, prog.Stdout = strings.NewReader(config), &out
		p, err := server.Start(t.Context(), prog)
		require.NoError(t, err)
		<-p.Done()
		same := out.String() == config+"end\n"
		assert.True(t, same, "%d bytes came back of %d", out.Len(), len(config))
	})
	t.Run("may be left unread", func(t *testing.T) {
		prog := sh(`trap "exit 0" TERM; echo; while :; do sleep 0.01; done`)
		prog.Stdin = strings.NewReader(strings.Repeat("x", 1<<20))
		ready := make(chan struct{})
		prog.Stdout = writerFunc(func([]byte) { close(ready) })
		p, err := server.Start(t.Context(), prog)
		require.NoError(t, err)
		<-ready
		assert.NoError(t, p.Stop(10*time.Second))
	})
	t.Run("none is an empty one", func(t *testing.T) {
		p, err := server.Start(t.Context(), sh("cat; readlink /proc/self/fd/0"))
		require.NoError(t, err)
		<-p.Done()
		assert.Equal(t, "/dev/null\n", p.Output())
	})
}

func TestContain(t *testing.T) {
	lab := up(t, star(1))
	server := lab.Host("server")
	mark := fmt.Sprintf("CONNLAB_MARK=contain-%d", os.Getpid())
	name, value, _ := strings.Cut(mark, "=")
	t.Setenv(name, value) // of all that is started here, what keeps the container included
	start := func(t *testing.T, script string) *Process {
		prog := sh(script)
		prog.Contain = true
		ready := make(chan struct{})
		prog.Stdout = writerFunc(func([]byte) { close(ready) })
		p, err := server.Start(t.Context(), prog)
		require.NoError(t, err)
		<-ready
		return p
	}
	t.Run("it stands in the host's network, and its pid is the machine's", func(t *testing.T) {
		p := start(t, `echo "$$ $(readlink /proc/self/ns/net)"; exec sleep 1000`)
		pidInside, ns, _ := strings.Cut(strings.TrimSpace(p.Output()), " ")
		assert.Equal(t, inode(t, server), ns)
		status, err := os.ReadFile(fmt.Sprintf("/proc/%d/status", p.Pid()))
		require.NoError(t, err)
		assert.Contains(t, string(status), fmt.Sprintf("\nNSpid:\t%d\t%s\n", p.Pid(), pidInside))
		assert.NotEqual(t, "1", pidInside, "the first process of a namespace would not die of SIGTERM")
		assert.NoError(t, p.Stop(10*time.Second))
	})
	t.Run("signals do what they do otherwise", func(t *testing.T) {
		p := start(t, "echo; exec sleep 1000")
		require.NoError(t, p.Signal(unix.SIGSTOP))
		await(t, "the program stops", func() (bool, any) {
			s := processState(p.Pid())
			return s == "T", s
		})
		assert.NoError(t, p.Stop(10*time.Second))
		p = start(t, `trap "echo bad >&2; exit 4" TERM; echo; while :; do sleep 0.01; done`)
		assert.ErrorContains(t, p.Stop(10*time.Second), ": exit status 4\nbad")
		p = start(t, `trap "" TERM; echo; while :; do sleep 0.01; done`)
		assert.ErrorContains(t, p.Stop(50*time.Millisecond), "did not end within 50ms of SIGTERM")
		assert.Empty(t, marked(t, mark))
	})
	t.Run("all that it has forked ends with it", func(t *testing.T) {
		p := start(t, "setsid sleep 1000 >/dev/null 2>&1 & echo; read forever")
		<-p.Done() // read ends at once: standard input is empty
		assert.Empty(t, marked(t, mark))
	})
	t.Run("what cannot be started leaves nothing", func(t *testing.T) {
		p, err := server.Start(t.Context(), Program{Path: "/no/such", Contain: true})
		assert.Nil(t, p)
		require.EqualError(t, err, "starting /no/such: host server: fork/exec /no/such: no such file or directory")
		assert.Empty(t, marked(t, mark))
	})
	t.Run("the next program is not contained", func(t *testing.T) {
		p, err := server.Start(t.Context(), sh("readlink /proc/self/ns/pid"))
		require.NoError(t, err)
		<-p.Done()
		own, err := os.Readlink("/proc/self/ns/pid")
		require.NoError(t, err)
		assert.Equal(t, own+"\n", p.Output())
	})
}

// What a program mounts is its own, and nothing of it is left behind.
func TestPrivateMounts(t *testing.T) {
	lab := up(t, star(1))
	server := lab.Host("server")
	for _, contain := range []bool{false, true} {
		dir := t.TempDir()
		prog := sh("mount -t tmpfs connlab-test " + dir + " && echo there >" + dir + "/file && echo && exec sleep 1000")
		prog.PrivateMounts, prog.Contain = true, contain
		said := make(chan struct{}, 1)
		prog.Stdout = writerFunc(func([]byte) { said <- struct{}{} })
		p, err := server.Start(t.Context(), prog)
		require.NoError(t, err)
		select {
		case <-said:
		case <-p.Done():
			require.FailNow(t, "it could not mount", p.Output())
		}
		inside, err := os.ReadFile(fmt.Sprintf("/proc/%d/root%s/file", p.Pid(), dir))
		require.NoError(t, err)
		assert.Equal(t, "there\n", string(inside))
		assert.Equal(t, []int{p.Pid()}, mounters(t, dir), "it is mounted for that process alone")
		outside, err := os.ReadDir(dir)
		require.NoError(t, err)
		assert.Empty(t, outside)

		require.NoError(t, p.Signal(unix.SIGKILL))
		<-p.Done()
		assert.Empty(t, mounters(t, dir))
		outside, err = os.ReadDir(dir)
		require.NoError(t, err)
		assert.Empty(t, outside)
	}
	t.Run("a program without it is in the machine's", func(t *testing.T) {
		p, err := server.Start(t.Context(), sh("readlink /proc/self/ns/mnt"))
		require.NoError(t, err)
		<-p.Done()
		own, err := os.Readlink("/proc/self/ns/mnt")
		require.NoError(t, err)
		assert.Equal(t, own+"\n", p.Output())
	})
}

// mounters are the processes that see something mounted at a directory.
func mounters(t *testing.T, dir string) (pids []int) {
	t.Helper()
	tables, err := filepath.Glob("/proc/[0-9]*/mountinfo")
	require.NoError(t, err)
	for _, table := range tables {
		// A process that ended meanwhile sees nothing.
		if b, err := os.ReadFile(table); err == nil && strings.Contains(string(b), " "+dir+" ") {
			pid, err := strconv.Atoi(filepath.Base(filepath.Dir(table)))
			require.NoError(t, err)
			pids = append(pids, pid)
		}
	}
	return pids
}

// A program at the terminal has the files that it was given, and its group is ours.
func TestTerminal(t *testing.T) {
	lab := up(t, star(1))
	server := lab.Host("server")
	in, err := os.Open("/dev/null")
	require.NoError(t, err)
	defer in.Close()
	out, err := os.Create(t.TempDir() + "/out")
	require.NoError(t, err)
	defer out.Close()
	for _, contain := range []bool{false, true} {
		prog := sh("readlink /proc/self/fd/1; ps -o pgid= -p $(cut -d' ' -f4 /proc/self/stat); exit 3")
		prog.Terminal, prog.Contain = true, contain
		prog.Stdin, prog.Stdout, prog.Stderr = in, out, out
		p, err := server.Start(t.Context(), prog)
		require.NoError(t, err)
		exit, ok := errors.AsType[*exec.ExitError](p.Wait())
		require.True(t, ok)
		assert.Equal(t, 3, exit.ExitCode())
		assert.Empty(t, p.Output())
		b, err := os.ReadFile(out.Name())
		require.NoError(t, err)
		assert.Equal(t, []string{out.Name(), strconv.Itoa(unix.Getpgrp())}, strings.Fields(string(b)))
		require.NoError(t, out.Truncate(0))
		_, err = out.Seek(0, io.SeekStart)
		require.NoError(t, err)
	}
}

// A child that holds the output does not keep a program from having ended.
func TestWait(t *testing.T) {
	lab := up(t, star(1))
	prog := sh("sleep 1000 & echo said")
	prog.Contain = true
	p, err := lab.Host("server").Start(t.Context(), prog)
	require.NoError(t, err)
	require.NoError(t, p.Wait())
	assert.Equal(t, "said\n", p.Output())
}

func TestTailKeepsTheEnd(t *testing.T) {
	var tl tail
	for i := range 3 * tailSize / 100 {
		n, err := tl.Write(bytes.Repeat([]byte{byte('a' + i%26)}, 100))
		require.NoError(t, err)
		require.Equal(t, 100, n)
	}
	_, err := tl.Write([]byte("end"))
	require.NoError(t, err)
	assert.Len(t, tl.String(), tailSize)
	assert.True(t, strings.HasSuffix(tl.String(), "end"))
}
