package netlab

import (
	"os"
	"os/exec"
	"path/filepath"
	"testing"

	"github.com/stretchr/testify/assert"
	"github.com/stretchr/testify/require"
)

func TestLookProgram(t *testing.T) {
	inPath, beside := t.TempDir(), t.TempDir()
	t.Setenv("PATH", inPath)
	write := func(mode os.FileMode, path ...string) string {
		file := filepath.Join(path...)
		require.NoError(t, os.WriteFile(file, []byte("#!/bin/sh\n"), mode))
		return file
	}
	dirs := []string{filepath.Join(beside, "absent"), beside}

	_, err := lookProgram("nowhere", dirs)
	require.ErrorIs(t, err, exec.ErrNotFound)

	want := write(0o755, beside, "balancer")
	path, err := lookProgram("balancer", dirs)
	require.NoError(t, err)
	assert.Equal(t, want, path, "not in PATH, but where programs for root are")

	want = write(0o755, inPath, "balancer")
	path, err = lookProgram("balancer", dirs)
	require.NoError(t, err)
	assert.Equal(t, want, path, "PATH comes first")

	write(0o644, beside, "notes")
	_, err = lookProgram("notes", dirs)
	assert.ErrorIs(t, err, exec.ErrNotFound, "a file that is no program")
}
