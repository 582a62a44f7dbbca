package netlab

import (
	"context"
	"errors"
	"fmt"
	"io"
	"os"
	"os/exec"
	"strings"
	"sync"
	"syscall"
	"time"

	"golang.org/x/sys/unix"
)

// Program is what a host runs.
type Program struct {
	// Path is the executable and Args its arguments, without the program name.
	Path string
	Args []string
	// Env is added to this process's environment.
	Env []string
	// Dir is the working directory; empty is this process's own.
	Dir string
	// Ready is asked every few milliseconds until it returns nil; nil means
	// ready at once. See [Host.Listening].
	Ready func() error
	// ReadyTimeout bounds that wait; zero means ten seconds.
	ReadyTimeout time.Duration
	// Stdin is copied to the program's standard input, for a configuration that
	// must leave no file; nil is /dev/null. A reader that has not ended when the
	// program has is waited for a second.
	Stdin io.Reader
	// Stdout and Stderr get a copy of the output; either may be nil. What outlives
	// the program and still holds its output is waited for a second.
	Stdout, Stderr io.Writer
	// Terminal is for a program that a person talks to. Stdin, Stdout and Stderr
	// are its own, where they are files, and nothing is kept for Process.Output. It
	// is in this process's group, so that it may read the terminal; a Ctrl-C there
	// is for both. When it ends, this process is the terminal's foreground again,
	// if it was before.
	Terminal bool
	// Contain starts the program in a process-id namespace of its own, and all
	// that it forks is killed when it ends or this process dies, whatever group,
	// session or user it has made its own. It is for programs that fork, such as
	// a master with workers. The program sees other process ids than the machine
	// does: it is not itself that it finds at its own in /proc.
	Contain bool
	// PrivateMounts starts the program in a mount namespace of its own, in which
	// every mount is private: what it mounts is seen by itself and its children
	// only, and is gone with the last of them, however that ends
	// (mount_namespaces(7)). It is for programs that must write files and leave
	// none: they mount a tmpfs first. What they do not mount over is the machine's.
	PrivateMounts bool
}

// Process is a program that runs on a host.
type Process struct {
	host *Host
	cmd  *exec.Cmd
	tail *tail
	done chan struct{}
	err  error // of cmd.Wait; read after done
}

// Start runs a program in the host's namespace and returns when it is ready. It
// is killed when ctx ends and when this process dies, however that happens. When
// it ends, what it has left in its process group is killed, if it has one of its
// own; see [Program].Contain for programs that leave more. A program that ends before it
// is ready, or is not ready in time, is an error that quotes its output.
func (h *Host) Start(ctx context.Context, p Program) (*Process, error) {
	proc := &Process{host: h, tail: &tail{}, done: make(chan struct{})}
	cmd := exec.CommandContext(ctx, p.Path, p.Args...)
	cmd.Env = append(os.Environ(), p.Env...)
	cmd.Dir = p.Dir
	cmd.Stdin = p.Stdin
	cmd.WaitDelay = time.Second
	cmd.SysProcAttr = &syscall.SysProcAttr{}
	var tty *terminal
	if p.Terminal {
		cmd.Stdout, cmd.Stderr = p.Stdout, p.Stderr
		tty = foregroundTerminal()
	} else {
		cmd.Stdout, cmd.Stderr = tee(proc.tail, p.Stdout), tee(proc.tail, p.Stderr)
		// A Ctrl-C at the terminal is for connlab, which then ends its programs in order.
		cmd.SysProcAttr.Setpgid = true
	}
	proc.cmd = cmd
	if p.PrivateMounts {
		// Package syscall makes all mounts of the new namespace private.
		cmd.SysProcAttr.Unshareflags = unix.CLONE_NEWNS
	}
	start, end := cmd.Start, func() error { return nil }
	if p.Contain {
		c, err := newContainer()
		if err != nil {
			return nil, fmt.Errorf("starting %s: host %s: %w", p.Path, h.name, err)
		}
		start, end = func() error { return c.start(cmd) }, c.close
	} else {
		cmd.SysProcAttr.Pdeathsig = syscall.SIGKILL
	}
	// The child inherits the namespace of the thread that forks.
	if err := h.Do(start); err != nil {
		return nil, fmt.Errorf("starting %s: %w", p.Path, errors.Join(err, end(), tty.takeBack()))
	}
	h.lab.mu.Lock()
	h.lab.procs[proc] = struct{}{}
	h.lab.mu.Unlock()
	go func() {
		proc.err = cmd.Wait()
		if errors.Is(proc.err, exec.ErrWaitDelay) {
			proc.err = nil // it ended well; what holds its output or reads for it did not
		}
		if !p.Terminal {
			// What the program started and left behind would keep the namespace.
			_ = unix.Kill(-cmd.Process.Pid, unix.SIGKILL)
		}
		proc.err = errors.Join(proc.err, end(), tty.takeBack())
		h.lab.mu.Lock()
		delete(h.lab.procs, proc)
		h.lab.mu.Unlock()
		close(proc.done)
	}()
	if err := proc.awaitReady(ctx, p); err != nil {
		proc.kill()
		<-proc.done
		return nil, fmt.Errorf("host %s: %s %s: %w%s", h.name, p.Path, strings.Join(p.Args, " "), err, proc.quote())
	}
	return proc, nil
}

func (p *Process) awaitReady(ctx context.Context, prog Program) error {
	if prog.Ready == nil {
		return nil
	}
	timeout := prog.ReadyTimeout
	if timeout == 0 {
		timeout = 10 * time.Second
	}
	deadline := time.After(timeout)
	tick := time.NewTicker(2 * time.Millisecond)
	defer tick.Stop()
	for {
		last := prog.Ready()
		if last == nil {
			return nil
		}
		select {
		case <-p.done:
			return fmt.Errorf("ended before it was ready: %w", p.exitError())
		case <-ctx.Done():
			return ctx.Err()
		case <-deadline:
			return fmt.Errorf("not ready after %v: %w", timeout, last)
		case <-tick.C:
		}
	}
}

func (p *Process) exitError() error {
	if p.err == nil {
		return errors.New("exit status 0")
	}
	return p.err
}

func (p *Process) quote() string {
	if out := strings.TrimSpace(p.Output()); out != "" {
		return "\n" + out
	}
	return " (no output)"
}

// Pid returns the process id.
func (p *Process) Pid() int { return p.cmd.Process.Pid }

// Host returns the host the process runs on.
func (p *Process) Host() *Host { return p.host }

// Output returns the last 64 KiB of standard output and standard error together.
func (p *Process) Output() string { return p.tail.String() }

// Done is closed when the process has ended.
func (p *Process) Done() <-chan struct{} { return p.done }

// Wait returns when the process has ended, and what is contained with it; the error
// has an [*exec.ExitError] in it unless the exit status was zero.
func (p *Process) Wait() error {
	<-p.done
	return p.err
}

// Signal sends a signal, for example SIGSTOP.
func (p *Process) Signal(s os.Signal) error {
	if err := p.cmd.Process.Signal(s); err != nil {
		return fmt.Errorf("host %s: signal %v to pid %d: %w", p.host.name, s, p.Pid(), err)
	}
	return nil
}

// Stop asks the process to end with SIGTERM and kills it after grace. The error
// is that of a program that had ended by itself, ends with a failure, or has to
// be killed; to die of the SIGTERM is no failure.
func (p *Process) Stop(grace time.Duration) error {
	select {
	case <-p.done:
		return fmt.Errorf("host %s: pid %d had ended: %w%s", p.host.name, p.Pid(), p.exitError(), p.quote())
	default:
	}
	// A stopped process gets no SIGTERM before it continues.
	_ = p.cmd.Process.Signal(unix.SIGCONT)
	_ = p.cmd.Process.Signal(unix.SIGTERM)
	select {
	case <-p.done:
	case <-time.After(grace):
		p.kill()
		<-p.done
		return fmt.Errorf("host %s: pid %d did not end within %v of SIGTERM", p.host.name, p.Pid(), grace)
	}
	if p.err != nil && !p.endedBy(unix.SIGTERM) {
		return fmt.Errorf("host %s: pid %d: %w%s", p.host.name, p.Pid(), p.err, p.quote())
	}
	return nil
}

func (p *Process) endedBy(s unix.Signal) bool {
	status, ok := p.cmd.ProcessState.Sys().(syscall.WaitStatus)
	return ok && status.Signaled() && status.Signal() == s
}

func (p *Process) kill() { _ = p.cmd.Process.Kill() }

// tail keeps the end of a program's output.
type tail struct {
	mu  sync.Mutex
	buf []byte
}

const tailSize = 64 << 10

func (t *tail) Write(b []byte) (int, error) {
	t.mu.Lock()
	defer t.mu.Unlock()
	t.buf = append(t.buf, b...)
	if over := len(t.buf) - tailSize; over > 0 {
		t.buf = append(t.buf[:0], t.buf[over:]...)
	}
	return len(b), nil
}

func (t *tail) String() string {
	t.mu.Lock()
	defer t.mu.Unlock()
	return string(t.buf)
}

func tee(t *tail, also io.Writer) io.Writer {
	if also == nil {
		return t
	}
	return io.MultiWriter(t, also)
}
