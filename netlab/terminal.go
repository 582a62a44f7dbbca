package netlab

import (
	"errors"
	"fmt"
	"os"
	"os/signal"

	"golang.org/x/sys/unix"
)

// terminal is this process's controlling terminal, while it is the foreground.
type terminal struct {
	file  *os.File
	group int // of processes, in front
}

// foregroundTerminal is nil where there is no terminal, or another group of
// processes is in front.
func foregroundTerminal() *terminal {
	file, err := os.OpenFile("/dev/tty", os.O_RDWR, 0)
	if err != nil {
		return nil
	}
	t := &terminal{file: file, group: unix.Getpgrp()}
	if front, err := unix.IoctlGetInt(int(file.Fd()), unix.TIOCGPGRP); err != nil || front != t.group {
		_ = file.Close()
		return nil
	}
	return t
}

// takeBack makes this process's group the foreground again. An interactive shell
// puts a group of its own there, and one in a process-id namespace cannot name
// the group that was there before (pid_vnr is 0 for what is outside).
func (t *terminal) takeBack() error {
	if t == nil {
		return nil
	}
	// Who asks from the background is stopped, unless it ignores that signal
	// (drivers/tty/tty_jobctrl.c, __tty_check_change).
	signal.Ignore(unix.SIGTTOU)
	err := unix.IoctlSetPointerInt(int(t.file.Fd()), unix.TIOCSPGRP, t.group)
	signal.Reset(unix.SIGTTOU)
	if errors.Is(err, unix.EIO) {
		err = nil // it hung up meanwhile
	}
	if err != nil {
		err = fmt.Errorf("taking the terminal back: %w", err)
	}
	return errors.Join(err, t.file.Close())
}
