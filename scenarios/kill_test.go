package scenarios

import (
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
	"strconv"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/stretchr/testify/assert"
	"github.com/stretchr/testify/require"

	"connlab/netlab"
	"connlab/results"
)

const (
	killable = "run-to-be-killed"
	// killToken marks the processes of one killed run by their environment.
	killToken = "CONNLAB_KILL_TEST"
	saving    = "saving the record"
)

// killables are runs like any other, with pumps, programs and a record: one of each
// incident.
var killables = []struct {
	scenario *Scenario
	opt      Options
}{
	{&Backlog, Options{Variants: []string{"late-ack-abort"}, Set: []string{"hosts=40", "stall=1500ms"}}},
	{&TupleCollision, Options{Variants: []string{"forced-last", "haproxy"}, Set: []string{"vips=60", "proxies=6", "rounds=4"}}},
	{&MixedPool, Options{Variants: []string{"nginx"}, Set: []string{"for=1s"}}},
	{&TimeWaitBuckets, Options{Variants: []string{"compressed"}, Set: []string{"rate=1500"}}},
	{&AcceptQueue, Options{Variants: []string{"jitter"}, Set: []string{"connections=600", "jitter=1500ms", "for=3s"}}},
}

func runKillable(which, dir string) int {
	i, err := strconv.Atoi(which)
	if err != nil || i >= len(killables) {
		return 2
	}
	k := killables[i]
	k.opt.Progress = func(line string) { fmt.Fprintln(os.Stderr, line) }
	rec, err := Run(context.Background(), k.scenario, k.opt)
	if err == nil {
		fmt.Fprintln(os.Stderr, saving)
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
	if underRace {
		t.Skip("the kernel cleans up, whatever the run was built with")
	}
	if err := netlab.CheckPrivilege(); err != nil {
		skip(t, err.Error())
	}
	require.NoError(t, stamp())
	const kills = 20
	seed := uint64(time.Now().UnixNano())
	t.Logf("seed %d", seed)
	random := rand.New(rand.NewPCG(seed, 0))
	dir := t.TempDir()
	length := make([]time.Duration, len(killables))
	for which := range killables {
		whole := time.Now()
		start(t, which, dir, "", func(*exec.Cmd, *lines) {})
		length[which] = time.Since(whole)
	}
	namespaces, interfaces, files := namespacesInUse(t), interfaceNames(t), filesIn(t, dir)
	killedAt := map[string]int{}
	for i := range kills {
		token := fmt.Sprintf("%s=%d-%d", killToken, seed, i)
		which := i % len(killables)
		delay := time.Duration(random.Int64N(int64(length[which])))
		progress := start(t, which, dir, token, func(cmd *exec.Cmd, progress *lines) {
			if i%5 == 0 { // the moment that makes a file is short: aim at it
				progress.await(saving)
				delay = time.Duration(random.Int64N(int64(2 * time.Millisecond)))
			}
			time.Sleep(delay) // the moment is what is random
			_ = cmd.Process.Kill()
		})
		killedAt[lastStage(progress)]++
		files = append(files, wholeRecords(t, dir)...)
		slices.Sort(files)
		files = slices.Compact(files)

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
		assert.Empty(t, left, "killed after %v, in %q", delay, lastStage(progress))
		assert.Equal(t, interfaces, interfaceNames(t), "interfaces of the host")
		assert.Equal(t, files, filesIn(t, dir), "files")
	}
	t.Logf("killed while: %v", killedAt)
}

// start runs a killable run, lets meanwhile have it, and waits for its end.
func start(t *testing.T, which int, dir, token string, meanwhile func(*exec.Cmd, *lines)) (progress string) {
	t.Helper()
	self, err := os.Executable()
	require.NoError(t, err)
	cmd := exec.Command(self, killable, strconv.Itoa(which), dir)
	cmd.Env = append(os.Environ(), token)
	out := &lines{said: make(chan struct{}, 1)}
	cmd.Stderr = out
	require.NoError(t, cmd.Start())
	meanwhile(cmd, out)
	_ = cmd.Wait()
	return out.String()
}

// lines is what a run has said so far.
type lines struct {
	mu   sync.Mutex
	text strings.Builder
	said chan struct{}
}

func (l *lines) Write(b []byte) (int, error) {
	l.mu.Lock()
	defer l.mu.Unlock()
	select {
	case l.said <- struct{}{}:
	default:
	}
	return l.text.Write(b)
}

func (l *lines) String() string {
	l.mu.Lock()
	defer l.mu.Unlock()
	return l.text.String()
}

// await returns when the run has said the text, or half a minute later.
func (l *lines) await(text string) {
	for deadline := time.After(30 * time.Second); !strings.Contains(l.String(), text); {
		select {
		case <-l.said:
		case <-deadline:
			return
		}
	}
}

// wholeRecords lists the records that were saved before the kill came, each of
// which must be whole.
func wholeRecords(t *testing.T, dir string) []string {
	t.Helper()
	paths, err := filepath.Glob(filepath.Join(dir, "*.json"))
	require.NoError(t, err)
	for _, path := range paths {
		_, err := results.Load(path)
		assert.NoError(t, err, "a record that is there is whole")
	}
	return paths
}

var stages = regexp.MustCompile(`starting|opening|due|held|refuted|void|saving`)

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
	slices.Sort(names)
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
	slices.Sort(names)
	return names
}
