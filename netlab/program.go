package netlab

import (
	"errors"
	"os/exec"
	"path/filepath"
)

// programDirs are where a distribution puts programs for root, which the PATH of
// an ordinary user may lack though everybody may execute them.
var programDirs = []string{"/usr/sbin", "/sbin"}

// LookProgram returns the path of a program that is in PATH, or else in /usr/sbin
// or /sbin. If it is in none of them the error wraps [exec.ErrNotFound].
func LookProgram(name string) (path string, err error) {
	return lookProgram(name, programDirs)
}

func lookProgram(name string, dirs []string) (string, error) {
	path, err := exec.LookPath(name)
	if !errors.Is(err, exec.ErrNotFound) {
		return path, err
	}
	for _, dir := range dirs {
		if found, err := exec.LookPath(filepath.Join(dir, name)); err == nil {
			return found, nil
		}
	}
	return "", err
}
