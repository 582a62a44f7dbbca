package netlab

import (
	"bufio"
	"bytes"
	"context"
	"encoding/json"
	"fmt"
	"math/rand/v2"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"runtime"
	"strconv"
	"strings"
	"syscall"
	"testing"
	"time"

	"github.com/stretchr/testify/assert"
	"github.com/stretchr/testify/require"
	"golang.org/x/sys/unix"
)

// standing is what the orphan-maker has made, on one line of JSON.
type standing struct {
	Program   int               // pid
	Container int               // pid of a contained program with two children
	Cookies   map[string]uint64 // of the namespaces, by name
}

// forker has two children, one of which has left its process group and session.
var forker = Program{Path: "/bin/sh", Args: []string{"-c", "sleep 1000 & setsid sleep 1000 & wait"}, Contain: true}

// runOrphanMaker stands a lab up, runs two programs in it, says so, reads standard
// input, takes it all down, and begins again until it is killed or a minute is over.
func runOrphanMaker() {
	fail := func(err error) {
		if err != nil {
			fmt.Fprintln(os.Stderr, err)
			os.Exit(1)
		}
	}
	for end := time.Now().Add(time.Minute); time.Now().Before(end); {
		lab, err := Up(context.Background(), star(10))
		fail(err)
		p, err := lab.Host("server").Start(context.Background(), Program{Path: "/bin/sleep", Args: []string{"1000"}})
		fail(err)
		c, err := lab.Host("server").Start(context.Background(), forker)
		fail(err)
		s := standing{Program: p.Pid(), Container: c.Pid(), Cookies: map[string]uint64{}}
		for _, h := range lab.Hosts() {
			fail(lab.thread.in(h.ns, func() (err error) { s.Cookies[h.name], err = cookie(); return err }))
		}
		for name, sw := range lab.switches {
			fail(lab.thread.in(sw.ns, func() (err error) { s.Cookies[name], err = cookie(); return err }))
		}
		fail(json.NewEncoder(os.Stdout).Encode(s))
		_, _ = os.Stdin.Read(make([]byte, 1)) // at once from /dev/null, never from a pipe
		fail(lab.Down())
	}
}

// cookie identifies the calling thread's namespace among all that ever were
// since boot, as an inode number does not (net/core/sock.c, SO_NETNS_COOKIE).
func cookie() (uint64, error) {
	fd, err := unix.Socket(unix.AF_UNIX, unix.SOCK_DGRAM|unix.SOCK_CLOEXEC, 0)
	if err != nil {
		return 0, err
	}
	defer unix.Close(fd)
	return unix.GetsockoptUint64(fd, unix.SOL_SOCKET, unix.SO_NETNS_COOKIE)
}

// referenced looks at every place where /proc shows that a network namespace is
// held (threads, descriptors, mounts) and returns the places by cookie.
func referenced(t *testing.T, thread *nsThread) map[uint64][]string {
	t.Helper()
	places := map[string][]string{} // by inode
	note := func(path string) {
		if name, err := os.Readlink(path); err == nil && strings.HasPrefix(name, "net:[") {
			places[name] = append(places[name], path)
		}
	}
	for _, pattern := range []string{"/proc/[0-9]*/ns/net", "/proc/[0-9]*/task/[0-9]*/ns/net", "/proc/[0-9]*/fd/[0-9]*"} {
		paths, err := filepath.Glob(pattern)
		require.NoError(t, err)
		for _, path := range paths {
			note(path)
		}
	}
	found := map[uint64][]string{}
	for _, paths := range places {
		for _, path := range paths {
			// Opening may fail: what is looked at belongs to others, and ends when they end.
			fd, err := unix.Open(path, unix.O_RDONLY|unix.O_CLOEXEC, 0)
			if err != nil {
				continue
			}
			err = thread.in(&namespace{fd: fd, name: path}, func() error {
				c, err := cookie()
				found[c] = append(found[c], path)
				return err
			})
			unix.Close(fd)
			if err == nil {
				break
			}
		}
	}
	// A namespace that is mounted is found by the name in the mount table; one
	// is enough of a finding, so the inode stands for the cookie.
	mounts, err := filepath.Glob("/proc/[0-9]*/mountinfo")
	require.NoError(t, err)
	for _, path := range mounts {
		table, _ := os.ReadFile(path)
		for line := range bytes.Lines(table) {
			if bytes.Contains(line, []byte(" net:[")) && bytes.Contains(line, []byte(" - nsfs ")) {
				fields := strings.Fields(string(line))
				fd, err := unix.Open(filepath.Join(filepath.Dir(path), "root", fields[4]), unix.O_RDONLY|unix.O_CLOEXEC, 0)
				if err != nil {
					continue
				}
				_ = thread.in(&namespace{fd: fd, name: fields[4]}, func() error {
					c, err := cookie()
					found[c] = append(found[c], path+" "+fields[4])
					return err
				})
				unix.Close(fd)
			}
		}
	}
	return found
}

// orphanMaker starts this binary again, marked so that it and what it starts are
// found by their environment.
func orphanMaker(t *testing.T, mark string, stdin *os.File) (*exec.Cmd, *bufio.Reader) {
	t.Helper()
	runtime.LockOSThread() // the death signal is of this thread
	t.Cleanup(runtime.UnlockOSThread)
	cmd := exec.Command("/proc/self/exe")
	cmd.Env = append(os.Environ(), roleEnv+"=orphan-maker", mark)
	cmd.SysProcAttr = &syscall.SysProcAttr{Pdeathsig: syscall.SIGKILL}
	cmd.Stdin = stdin
	cmd.Stderr = os.Stderr
	out, err := cmd.StdoutPipe()
	require.NoError(t, err)
	require.NoError(t, cmd.Start())
	return cmd, bufio.NewReader(out)
}

// marked lists the processes that have the mark in their environment.
func marked(t *testing.T, mark string) (pids []int) {
	t.Helper()
	environs, err := filepath.Glob("/proc/[0-9]*/environ")
	require.NoError(t, err)
	for _, path := range environs {
		b, _ := os.ReadFile(path) // empty for a zombie
		if bytes.Contains(b, []byte(mark)) {
			pid, err := strconv.Atoi(filepath.Base(filepath.Dir(path)))
			require.NoError(t, err)
			pids = append(pids, pid)
		}
	}
	return pids
}

func TestKillLeavesNothing(t *testing.T) {
	requireLab(t, CheckPrivilege())
	thread, err := startThread()
	require.NoError(t, err)
	defer thread.stop()
	interfaces := interfaceNames(t)
	mark := fmt.Sprintf("CONNLAB_MARK=%d-%d", os.Getpid(), time.Now().UnixNano())
	stdin, holdsIt, err := os.Pipe()
	require.NoError(t, err)
	defer stdin.Close()
	defer holdsIt.Close()
	cmd, out := orphanMaker(t, mark, stdin)
	line, err := out.ReadBytes('\n')
	require.NoError(t, err)
	var s standing
	require.NoError(t, json.Unmarshal(line, &s))

	// All of it is there, and is seen where the test will look again.
	require.Len(t, s.Cookies, 12, "ten clients, a server, a switch")
	before := referenced(t, thread)
	for name, c := range s.Cookies {
		require.NotEmpty(t, before[c], name)
	}
	var pids []int
	// This one, a program, and a contained one with two children and its holder.
	await(t, "the contained program has its children", func() (bool, any) {
		pids = marked(t, mark)
		return len(pids) == 6, pids
	})
	require.Subset(t, pids, []int{cmd.Process.Pid, s.Program, s.Container})

	require.NoError(t, cmd.Process.Kill())
	require.Error(t, cmd.Wait())
	await(t, "every process is gone", func() (bool, any) {
		pids := marked(t, mark)
		return len(pids) == 0 && processState(s.Program) == "", fmt.Sprint(pids, processState(s.Program))
	})
	await(t, "no namespace is held", func() (bool, any) {
		found := referenced(t, thread)
		for name, c := range s.Cookies {
			if places := found[c]; places != nil {
				return false, fmt.Sprint(name, places)
			}
		}
		return true, nil
	})
	assert.Equal(t, interfaces, interfaceNames(t))
}

func TestKillAtRandomMoments(t *testing.T) {
	requireLab(t, CheckPrivilege())
	seed := uint64(time.Now().UnixNano())
	t.Logf("seed %d", seed)
	random := rand.New(rand.NewPCG(seed, 0))
	interfaces := interfaceNames(t)
	for i := range 20 {
		mark := fmt.Sprintf("CONNLAB_MARK=%d-%d-%d", os.Getpid(), seed, i)
		cmd, _ := orphanMaker(t, mark, nil)
		after := time.Duration(random.Int64N(int64(300 * time.Millisecond)))
		time.Sleep(after) // the moment itself, not a wait for anything
		require.NoError(t, cmd.Process.Kill())
		require.ErrorContains(t, cmd.Wait(), "signal: killed", "it ran until then")
		await(t, fmt.Sprintf("every process is gone that was killed after %v", after), func() (bool, any) {
			pids := marked(t, mark)
			return len(pids) == 0, pids
		})
	}
	assert.Equal(t, interfaces, interfaceNames(t))
}

func interfaceNames(t *testing.T) (names []string) {
	t.Helper()
	list, err := net.Interfaces()
	require.NoError(t, err)
	for _, i := range list {
		names = append(names, i.Name)
	}
	return names
}
