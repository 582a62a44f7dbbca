package netlab

import (
	"errors"
	"fmt"
	"io"
	"os"
	"os/exec"
	"syscall"

	"golang.org/x/sys/unix"
)

// container is a process-id namespace that lives as long as this process wants
// it. Its first process reads a pipe that only this process writes to, and ends
// when that end is closed, by the kernel too when this process is killed at
// whatever moment; with the first process the kernel kills all others
// (kernel/pid_namespace.c, zap_pid_ns_processes). A parent-death signal would
// not do: a program that changes its user loses it (kernel/cred.c,
// commit_creds), and its children never have it.
type container struct {
	holder *exec.Cmd
	pidfd  int       // of the holder: /proc has other numbers where this process is itself contained
	open   io.Closer // the end of the pipe that keeps it
}

func newContainer() (*container, error) {
	holder := exec.Command("/bin/cat")
	c := &container{holder: holder, pidfd: -1}
	// Out of reach of a Ctrl-C, as the programs are.
	holder.SysProcAttr = &syscall.SysProcAttr{Cloneflags: unix.CLONE_NEWPID, Setpgid: true, PidFD: &c.pidfd}
	var err error
	if c.open, err = holder.StdinPipe(); err != nil {
		return nil, fmt.Errorf("new process-id namespace: %w", err)
	}
	if err := holder.Start(); err != nil {
		return nil, fmt.Errorf("new process-id namespace: %w", err)
	}
	return c, nil
}

// start starts cmd in the container. It must run on the lab's thread: the
// children of a thread are born in the namespace that it names (setns(2),
// CLONE_NEWPID), while the thread stays where it is.
func (c *container) start(cmd *exec.Cmd) error {
	home, err := unix.Open("/proc/self/ns/pid", unix.O_RDONLY|unix.O_CLOEXEC, 0)
	if err != nil {
		return fmt.Errorf("opening the own process-id namespace: %w", err)
	}
	defer unix.Close(home)
	if err := unix.Setns(c.pidfd, unix.CLONE_NEWPID); err != nil { // by pidfd since Linux 5.8
		return os.NewSyscallError("setns", err)
	}
	err = cmd.Start()
	if back := unix.Setns(home, unix.CLONE_NEWPID); back != nil {
		if err == nil {
			_ = cmd.Process.Kill()
			_ = cmd.Wait()
		}
		err = errors.Join(err, fmt.Errorf("returning to the own process-id namespace: %w", back))
	}
	return err
}

// close ends what is in the container and returns when all of it is gone; the
// program that was started there must have been waited for.
func (c *container) close() error {
	return errors.Join(c.open.Close(), c.holder.Wait(), unix.Close(c.pidfd))
}
