package results

import (
	"bufio"
	"fmt"
	"math/rand/v2"
	"os"
	"os/exec"
	"path/filepath"
	"runtime"
	"strconv"
	"strings"
	"sync"
	"syscall"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"
	"github.com/google/go-cmp/cmp/cmpopts"
	"github.com/stretchr/testify/assert"
	"github.com/stretchr/testify/require"
	"golang.org/x/sys/unix"
)

// saverDir makes this test binary a program that only saves records there.
const saverDir = "CONNLAB_TEST_SAVER_DIR"

func TestMain(m *testing.M) {
	if dir := os.Getenv(saverDir); dir != "" {
		saveForever(dir)
	}
	os.Exit(m.Run())
}

// saveForever saves records until it is killed, but for no longer than a minute,
// and says so on stdout after each.
func saveForever(dir string) {
	for end := time.Now().Add(time.Minute); time.Now().Before(end); {
		rec := sampleRecord()
		rec.Started = time.Now()
		path, err := Save(dir, rec)
		if err != nil {
			_, _ = fmt.Fprintln(os.Stderr, err)
			os.Exit(1)
		}
		_, _ = fmt.Fprintln(os.Stdout, path)
	}
	os.Exit(0)
}

func TestSave(t *testing.T) {
	dir := t.TempDir()
	rec := sampleRecord()
	var names []string
	for range 3 {
		path, err := Save(dir, rec)
		require.NoError(t, err)
		assert.Equal(t, dir, filepath.Dir(path))
		names = append(names, filepath.Base(path))

		back, err := Load(path)
		require.NoError(t, err)
		if diff := cmp.Diff(rec, back, cmpopts.EquateEmpty()); diff != "" {
			t.Errorf("%s (-want +got):\n%s", path, diff)
		}
	}
	want := []string{"backlog-20261122T132400Z.json", "backlog-20261122T132400Z-2.json", "backlog-20261122T132400Z-3.json"}
	assert.Equal(t, want, names)
	assert.ElementsMatch(t, want, namesIn(t, dir), "nothing else is left in the directory")
}

func TestSaveWithoutATime(t *testing.T) {
	rec := sampleRecord()
	rec.Started = time.Time{}
	path, err := Save(t.TempDir(), rec)
	require.NoError(t, err)
	stamp := strings.TrimSuffix(strings.TrimPrefix(filepath.Base(path), "backlog-"), ".json")
	saved, err := time.Parse("20060102T150405Z", stamp)
	require.NoError(t, err)
	assert.WithinDuration(t, time.Now(), saved, time.Hour)
}

func TestSaveNeverOverwrites(t *testing.T) {
	dir := t.TempDir()
	theirs := filepath.Join(dir, "backlog-20261122T132400Z.json")
	// Not even a link that points nowhere, which a plain create would follow.
	require.NoError(t, os.Symlink(filepath.Join(dir, "elsewhere"), theirs))
	path, err := Save(dir, sampleRecord())
	require.NoError(t, err)
	assert.NotEqual(t, theirs, path)
	assert.NoFileExists(t, filepath.Join(dir, "elsewhere"))
}

func TestSaveAtOnce(t *testing.T) {
	dir := t.TempDir()
	const writers = 20
	paths := make([]string, writers)
	var wg sync.WaitGroup
	for i := range writers {
		wg.Go(func() {
			rec := sampleRecord()
			rec.Seed = uint64(i) + 1
			var err error
			paths[i], err = Save(dir, rec)
			assert.NoError(t, err)
		})
	}
	wg.Wait()
	assert.Len(t, namesIn(t, dir), writers)
	for i, path := range paths {
		rec, err := Load(path)
		require.NoError(t, err)
		assert.Equal(t, uint64(i)+1, rec.Seed, "%s holds what its writer wrote", path)
	}
}

// The way for file systems without O_TMPFILE keeps the same promises, save for
// what a kill leaves.
func TestNamedDraft(t *testing.T) {
	dir := t.TempDir()
	base := filepath.Join(dir, "x")
	require.NoError(t, os.WriteFile(base+".json", []byte("theirs"), 0o600))

	d, err := newNamedDraft(dir)
	require.NoError(t, err)
	path, err := d.publish([]byte("ours"), base)
	require.NoError(t, err)
	require.NoError(t, d.discard())

	assert.Equal(t, base+"-2.json", path)
	for file, want := range map[string]string{base + ".json": "theirs", path: "ours"} {
		got, err := os.ReadFile(file)
		require.NoError(t, err)
		assert.Equal(t, want, string(got))
	}
	assert.ElementsMatch(t, []string{"x.json", "x-2.json"}, namesIn(t, dir), "the temporary name is gone")
	unnamed, err := Save(dir, sampleRecord())
	require.NoError(t, err)
	assert.Equal(t, modeOf(t, unnamed), modeOf(t, path), "both ways give the same permissions")
}

// proc(5) has no O_TMPFILE, and no other new files either: the error shows which
// of the two was tried last.
func TestDraftFallsBackWithoutOTmpfile(t *testing.T) {
	if os.Geteuid() != 0 {
		skip(t, "only root gets past the permissions of /proc; run this test as root")
	}
	_, err := newDraft("/proc")
	assert.ErrorContains(t, err, "/proc/.record-")
}

func TestNamedDraftThatFailsLeavesNothing(t *testing.T) {
	dir := t.TempDir()
	d, err := newNamedDraft(dir)
	require.NoError(t, err)
	_, err = d.publish(nil, filepath.Join(dir, "none", "x"))
	require.ErrorIs(t, err, os.ErrNotExist)
	require.NoError(t, d.discard())
	assert.Empty(t, namesIn(t, dir))
}

func TestSaveFailures(t *testing.T) {
	dir := t.TempDir()
	_, err := Save(filepath.Join(dir, "none"), sampleRecord())
	require.ErrorIs(t, err, os.ErrNotExist)
	require.ErrorContains(t, err, filepath.Join(dir, "none"), "it says which directory")

	file := filepath.Join(dir, "file")
	require.NoError(t, os.WriteFile(file, nil, 0o600))
	_, err = Save(file, sampleRecord())
	require.ErrorIs(t, err, syscall.ENOTDIR)

	rec := sampleRecord()
	rec.Variants[0].Verdict = ""
	_, err = Save(dir, rec)
	require.ErrorContains(t, err, "not judged")
	assert.Equal(t, []string{"file"}, namesIn(t, dir), "a record that is none leaves nothing")
}

func TestSaveWithoutPermission(t *testing.T) {
	dir := t.TempDir()
	require.NoError(t, os.Chmod(dir, 0o500))
	failure := make(chan error)
	go func() {
		// A thread with another file system user loses root's right to write
		// everywhere (setfsuid(2)). It stays locked, so it ends with this goroutine.
		runtime.LockOSThread()
		if os.Geteuid() == 0 {
			if err := unix.Setfsuid(65534); err != nil {
				failure <- err
				return
			}
		}
		_, err := Save(dir, sampleRecord())
		failure <- err
	}()
	err := <-failure
	require.ErrorIs(t, err, os.ErrPermission)
	require.ErrorContains(t, err, dir, "it says which directory")
	assert.Empty(t, namesIn(t, dir))
}

func TestSaveGivesTheFileToTheOwnerOfTheDirectory(t *testing.T) {
	if os.Geteuid() != 0 {
		skip(t, "only root writes for others; run this test as root")
	}
	dir := t.TempDir()
	const uid, gid = 12345, 23456
	require.NoError(t, os.Chown(dir, uid, gid))
	named, err := newNamedDraft(dir)
	require.NoError(t, err)
	second, err := named.publish([]byte("x"), filepath.Join(dir, "x"))
	require.NoError(t, err)
	require.NoError(t, named.discard())
	first, err := Save(dir, sampleRecord())
	require.NoError(t, err)

	for _, path := range []string{first, second} {
		var st syscall.Stat_t
		require.NoError(t, syscall.Stat(path, &st))
		assert.Equal(t, []uint32{uid, gid}, []uint32{st.Uid, st.Gid}, path)
	}
}

// A process that saves without pause is killed at a random moment, again and
// again: whatever stands in the directory is a whole record.
func TestSaveSurvivesKill(t *testing.T) {
	self, err := os.Executable()
	require.NoError(t, err)
	const kills = 20
	saved := 0
	for range kills {
		dir := t.TempDir()
		d, err := newDraft(dir)
		require.NoError(t, err)
		if d.temp != "" {
			require.NoError(t, d.discard())
			skip(t, "the file system of the test directory has no O_TMPFILE; point TMPDIR elsewhere")
		}
		require.NoError(t, d.discard())

		delay := time.Duration(rand.Int64N(int64(20 * time.Millisecond)))
		killSaver(t, self, dir, delay)
		names := namesIn(t, dir)
		assert.NotEmpty(t, names)
		for _, name := range names {
			_, err := Load(filepath.Join(dir, name))
			require.NoError(t, err, "%s, killed %v after its first record", name, delay)
		}
		saved += len(names)
	}
	t.Logf("%d records of %d killed processes, every one whole", saved, kills)
}

// killSaver starts a saver on dir and kills it delay after its first record.
func killSaver(t *testing.T, self, dir string, delay time.Duration) {
	t.Helper()
	saver := exec.CommandContext(t.Context(), self)
	saver.Env = append(os.Environ(), saverDir+"="+dir)
	saver.Stderr = os.Stderr
	out, err := saver.StdoutPipe()
	require.NoError(t, err)
	require.NoError(t, saver.Start())
	_, readErr := bufio.NewReader(out).ReadString('\n')
	timer := time.AfterFunc(delay, func() { _ = saver.Process.Kill() })
	defer timer.Stop()
	err = saver.Wait()
	require.NoError(t, readErr, "the saver saved nothing: %v", err)
	require.ErrorContains(t, err, "signal: killed")
}

func modeOf(t *testing.T, path string) os.FileMode {
	t.Helper()
	info, err := os.Stat(path)
	require.NoError(t, err)
	return info.Mode()
}

func namesIn(t *testing.T, dir string) []string {
	t.Helper()
	entries, err := os.ReadDir(dir)
	require.NoError(t, err)
	var names []string
	for _, entry := range entries {
		names = append(names, entry.Name())
	}
	return names
}

// skip skips the test, or fails it where nothing may be skipped.
func skip(t *testing.T, reason string) {
	t.Helper()
	if strict, _ := strconv.ParseBool(os.Getenv("CONNLAB_STRICT")); strict {
		t.Fatalf("CONNLAB_STRICT is set, and this would be skipped: %s", reason)
	}
	t.Skip(reason)
}
