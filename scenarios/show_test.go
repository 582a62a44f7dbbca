package scenarios

import (
	"fmt"
	"os"
	"strings"
	"testing"

	"golang.org/x/sys/unix"
)

// show prints what a run found. Without -v, go test swallows the output of tests
// that pass, and with it the table that the run was for: then it goes to go
// test's own standard output.
func show(t *testing.T, text string) {
	t.Helper()
	if testing.Verbose() {
		t.Log("\n" + text)
		return
	}
	out, err := goTestStdout()
	if err != nil {
		t.Log("\n" + text) // seen if the test fails
		return
	}
	defer out.Close()
	fmt.Fprintln(out, text)
}

// goTestStdout duplicates the descriptor of the go command that started this
// test binary. A duplicate shares the file's offset, so that redirected output
// stays in order.
func goTestStdout() (*os.File, error) {
	parent := os.Getppid()
	comm, err := os.ReadFile(fmt.Sprintf("/proc/%d/comm", parent))
	if err != nil {
		return nil, err
	}
	if strings.TrimSpace(string(comm)) != "go" {
		return nil, fmt.Errorf("started by %q", comm)
	}
	pidfd, err := unix.PidfdOpen(parent, 0)
	if err != nil {
		return nil, os.NewSyscallError("pidfd_open", err)
	}
	defer unix.Close(pidfd)
	fd, err := unix.PidfdGetfd(pidfd, 1, 0)
	if err != nil {
		return nil, os.NewSyscallError("pidfd_getfd", err)
	}
	return os.NewFile(uintptr(fd), "stdout of go test"), nil
}
