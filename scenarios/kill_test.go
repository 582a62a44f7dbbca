package scenarios

import (
	"bytes"
	"context"
	"fmt"
	"io/fs"
	"math/rand/v2"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/stretchr/testify/assert"
	"github.com/stretchr/testify/require"

	"connlab/results"
)

const (
	killable = "run-to-be-killed"
	// killToken marks the processes of one killed run by their environment.
	killToken = "CONNLAB_KILL_TEST"
)

// runKillable is a run like any other, with its record saved.
func runKillable(dir string) int {
	rec, err := Run(context.Background(), &Backlog, Options{
		Variants: []string{"incident", "late-ack"}, Set: []string{"held=200", "hosts=40"},
		Progress: func(line string) { fmt.Fprintln(os.Stderr, line) },
	})
	if err == nil {
		_, err = results.Save(dir, rec)
	}
	if err != nil {
		fmt.Fprintln(os.Stderr, err)
		return 1
	}
	return 0
}

// A run that is killed at any moment leaves no namespace, interface, process or
// file.
func TestKilledRunLeavesNothing(t *testing.T) {
	if err := netlabUsable(t); err != nil {
		skip(t, err.Error())
	}
	const kills = 20
	seed := uint64(time.Now().UnixNano())
	t.Logf("seed %d", seed)
	random := rand.New(rand.NewPCG(seed, 0))
	self, err := os.Executable()
	require.NoError(t, err)
	dir := t.TempDir()
	namespaces, interfaces, files := namespacesInUse(t), interfaceNames(t), filesIn(t, dir)
	killedAt := map[string]int{}
	for i := range kills {
		token := fmt.Sprintf("%s=%d-%d", killToken, seed, i)
		var progress bytes.Buffer
		cmd := exec.Command(self, killable, dir)
		cmd.Env = append(os.Environ(), token)
		cmd.Stderr = &progress
		require.NoError(t, cmd.Start())
		delay := time.Duration(random.Int64N(int64(4 * time.Second)))
		time.Sleep(delay) // the moment is what is random
		require.NoError(t, cmd.Process.Kill())
		_ = cmd.Wait()
		killedAt[lastStage(progress.String())]++

		var left []string
		for deadline := time.Now().Add(10 * time.Second); ; time.Sleep(5 * time.Millisecond) {
			left = processesWith(t, token)
			for ns := range namespacesInUse(t) {
				if !namespaces[ns] {
					left = append(left, ns)
				}
			}
			if len(left) == 0 || time.Now().After(deadline) {
				break
			}
		}
		assert.Empty(t, left, "killed after %v, in %q", delay, lastStage(progress.String()))
		assert.Equal(t, interfaces, interfaceNames(t), "interfaces of the host")
		assert.Equal(t, files, filesIn(t, dir), "files")
	}
	t.Logf("killed while: %v", killedAt)
}

var stages = regexp.MustCompile(`starting|opening|due|held|refuted|void`)

// lastStage says how far a run had come.
func lastStage(progress string) string {
	found := stages.FindAllString(progress, -1)
	if len(found) == 0 {
		return "before the first line"
	}
	return found[len(found)-1]
}

var nsLink = regexp.MustCompile(`^net:\[\d+\]$`)

// namespacesInUse returns every network namespace that some thread stands in or
// some descriptor or mount holds: the kernel removes all others.
func namespacesInUse(t *testing.T) map[string]bool {
	t.Helper()
	seen := map[string]bool{}
	for _, pattern := range []string{"/proc/[0-9]*/task/[0-9]*/ns/net", "/proc/[0-9]*/fd/*"} {
		links, err := filepath.Glob(pattern)
		require.NoError(t, err)
		for _, link := range links {
			// A process that ended meanwhile is no longer in the way.
			if target, err := os.Readlink(link); err == nil && nsLink.MatchString(target) {
				seen[target] = true
			}
		}
	}
	mounts, err := os.ReadFile("/proc/self/mountinfo")
	require.NoError(t, err)
	for _, word := range strings.Fields(string(mounts)) {
		if nsLink.MatchString(word) {
			seen[word] = true
		}
	}
	return seen
}

func processesWith(t *testing.T, token string) []string {
	t.Helper()
	environs, err := filepath.Glob("/proc/[0-9]*/environ")
	require.NoError(t, err)
	var found []string
	for _, path := range environs {
		env, err := os.ReadFile(path)
		if err == nil && slices.Contains(strings.Split(string(env), "\x00"), token) {
			found = append(found, filepath.Dir(path))
		}
	}
	return found
}

func interfaceNames(t *testing.T) []string {
	t.Helper()
	list, err := net.Interfaces()
	require.NoError(t, err)
	var names []string
	for _, i := range list {
		names = append(names, i.Name)
	}
	return names
}

// filesIn lists what a run could have left: in its directory for records, in the
// one for temporary files, and in the working directory.
func filesIn(t *testing.T, dir string) []string {
	t.Helper()
	var names []string
	for _, root := range []string{dir, "."} {
		require.NoError(t, filepath.WalkDir(root, func(path string, _ fs.DirEntry, err error) error {
			names = append(names, path)
			return err
		}))
	}
	tmp, err := os.ReadDir(os.TempDir())
	require.NoError(t, err)
	for _, e := range tmp {
		if strings.Contains(e.Name(), "connlab") {
			names = append(names, e.Name())
		}
	}
	return names
}
