package main

import (
	"errors"
	"io"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"github.com/gopacket/gopacket/pcapgo"
	"github.com/stretchr/testify/assert"
	"github.com/stretchr/testify/require"
)

// What a run could not write at its end is said before it begins: without root,
// too.
func TestRunIntoNoDirectory(t *testing.T) {
	dir := t.TempDir()
	file := filepath.Join(dir, "file")
	require.NoError(t, os.WriteFile(file, nil, 0o600))
	for _, flag := range []string{"--save", "--timeline", "--capture", "--counters"} {
		for _, tt := range []struct{ dir, want string }{
			{filepath.Join(dir, "missing"), "no such file or directory"},
			{file, "not a directory"},
		} {
			o := run("run", "backlog", flag, tt.dir)
			assert.Equal(t, exitUsage, o.code, flag)
			assert.Contains(t, o.stderr, flag+" "+tt.dir+": want a directory to write into: ")
			assert.Contains(t, o.stderr, tt.want)
			assert.Equal(t, 1, strings.Count(o.stderr, "\n"), "one line: %s", o.stderr)
			assert.Empty(t, o.stdout)
		}
	}
}

func TestRunCapture(t *testing.T) {
	needLab(t)
	dir := t.TempDir()
	o := run("run", "tuple-collision", "--variant", "forced-first", "--set", "pairs=2", "--set", "timeout=1500ms", "--capture", dir, "-q")
	require.Equal(t, exitOK, o.code, o.stdout+o.stderr)
	assert.Empty(t, o.stderr)
	file, err := os.Open(filepath.Join(dir, "tuple-collision-forced-first.pcapng"))
	require.NoError(t, err)
	defer file.Close()
	packets, err := pcapgo.NewNgReader(file, pcapgo.DefaultNgReaderOptions)
	require.NoError(t, err)
	seen := map[string]int{}
	for {
		_, info, err := packets.ReadPacketData()
		if errors.Is(err, io.EOF) {
			break
		}
		require.NoError(t, err)
		at, err := packets.Interface(info.InterfaceIndex)
		require.NoError(t, err)
		seen[at.Name]++
	}
	// Two SYNs of the second connection at least, beside all of the first.
	for _, at := range []string{"detector-001 eth0", "proxy-02 eth0"} {
		assert.Greater(t, seen[at], 2, "packets at both ends: %v", seen)
	}
}

// A variant that captures nothing leaves no file, and the run says why.
func TestRunCapturesNothing(t *testing.T) {
	needLab(t)
	dir := t.TempDir()
	o := run(append([]string{"run", "backlog", "--variant", "incident", "--capture", dir, "-q"}, small...)...)
	require.Equal(t, exitOK, o.code, o.stdout+o.stderr)
	assert.Equal(t, "--capture "+dir+": none of these variants captured packets, so nothing was written there\n", o.stderr)
	left, err := os.ReadDir(dir)
	require.NoError(t, err)
	assert.Empty(t, left)
}
