package server

import (
	"bytes"
	"context"
	"errors"
	"flag"
	"fmt"
	"io"
	"net"
	"net/netip"
	"os"
	"os/exec"
	"runtime"
	"slices"
	"syscall"
	"time"

	"golang.org/x/sync/errgroup"
	"golang.org/x/sys/unix"
)

// Workers spreads a server over processes that accept from one listening socket, so that one accept queue feeds more
// connections than one process may have files open. Each worker is a server of its own, with its own loop, clients,
// keys, settings and counters: maxclients, accept-rate, max-request-rate and the like hold for each, also if they are set at
// the control address. A worker that has maxclients clients stops accepting and leaves the queue to the others, where a
// server of one process accepts and sends away.
//
// The process that starts them listens, but neither accepts nor serves: it passes on what comes in at the control address.
// CONNLAB, CONFIG, INFO and PING reach every worker there and have one reply for all: the first error, the sum of numbers, or
// what all say alike. CONNLAB STALL begins and ends for all at the same time. INFO has sums of counters and of the limits
// maxclients and accept-rate, largest and smallest values where these are what counts (of a stall, the time in which all
// stood still), lists other values that differ in the order of the workers, and leaves out the keyspace. On the listening
// socket itself commands that change a server are refused, since they would reach one worker only. The control address asks
// for no password.
//
// Workers die with the process that started them, however it ends (PR_SET_PDEATHSIG). A worker that ends before is an
// error that names it, and ends the others.
type Workers struct {
	Count   int    // processes that accept; 1 without Control is the calling process itself
	Control string // where to take control commands, IPv4 address:port; empty for a free port of 127.0.0.1 if Count is above 1
}

// maxWorkers bounds the processes that one command starts.
const maxWorkers = 256

// workerPatience is how long a worker may take to be ready, and to end when it is told to.
const workerPatience = 10 * time.Second

// Flags registers the two settings on fs, with one worker as the default.
func (w *Workers) Flags(fs *flag.FlagSet) {
	fs.IntVar(&w.Count, "workers", 1, "`processes` that accept from the one listening socket, each with clients, keys and settings of its own; maxclients holds for each")
	fs.StringVar(&w.Control, "control", "", "`address` at which CONNLAB, CONFIG, INFO and PING reach all workers at once; without it more than one worker take a free port of 127.0.0.1 and the ready line says which")
}

func (w *Workers) validate() error {
	if w.Count < 1 || w.Count > maxWorkers {
		return fmt.Errorf("setting workers to %d: argument must be between 1 and %d inclusive", w.Count, maxWorkers)
	}
	if w.Control == "" {
		return nil
	}
	if _, err := parseAddr(w.Control); err != nil {
		return fmt.Errorf("setting control: %w", err)
	}
	return nil
}

// none reports whether the calling process serves by itself.
func (w *Workers) none() bool { return w.Count == 1 && w.Control == "" }

// supervise listens, runs the workers and passes control commands on until ctx is done or a worker ends.
func (w *Workers) supervise(ctx context.Context, cfg Config, args []string, stdout, stderr io.Writer) error {
	program, err := programBefore(args)
	if err != nil {
		return err
	}
	warnings, err := workerWarnings(cfg)
	if err != nil {
		return err
	}
	for _, warning := range warnings {
		warn(stderr, warning)
	}
	at, err := cfg.addrPort()
	if err != nil {
		return err
	}
	listener, addr, err := listenFile(at, cfg.Backlog, cfg.KeepAlive)
	if err != nil {
		return err
	}
	defer listener.Close()
	control, err := w.listenControl()
	if err != nil {
		return err
	}
	defer control.Close()

	// The parent-death signal goes out when the thread that forked ends, so it must last as long as the workers.
	runtime.LockOSThread()
	defer runtime.UnlockOSThread()
	group, ctx := errgroup.WithContext(ctx)
	var all relay
	for number := 1; number <= w.Count; number++ {
		wk, err := startWorker(ctx, number, slices.Concat(program, []string{"--listen-fd=3", "--control-fd=4"}, args), listener)
		if err != nil {
			group.Go(func() error { return err }) // ends those that run
			break
		}
		all.workers = append(all.workers, wk)
		group.Go(func() error { return wk.wait(ctx) })
	}
	group.Go(func() error {
		if len(all.workers) < w.Count {
			return nil
		}
		if err := all.awaitReady(ctx); err != nil {
			return err
		}
		fmt.Fprintf(stdout, "ready addr=%s backlog=%d pid=%d workers=%d control=%s\n", addr, cfg.Backlog, os.Getpid(), w.Count, control.Addr())
		return all.serve(ctx, control)
	})
	err = group.Wait()
	for _, wk := range all.workers {
		wk.control.Close()
	}
	return err
}

// programBefore returns the part of the process's command line that comes before the server's arguments.
func programBefore(args []string) ([]string, error) {
	n := len(os.Args) - len(args)
	if n < 1 || !slices.Equal(os.Args[n:], args) {
		return nil, errors.New("workers are this program executed again, and its command line does not end in the server's arguments")
	}
	return slices.Clone(os.Args[:n]), nil
}

// workerWarnings returns what is not as asked, in every worker alike. It raises the soft limit of open files.
func workerWarnings(cfg Config) (warnings []string, err error) {
	files, err := fitFileLimit(&cfg)
	if err != nil {
		return nil, err
	}
	most, err := somaxconn()
	if err != nil {
		return nil, err
	}
	return []string{files, backlogWarning(cfg.Backlog, most)}, nil
}

// listenFile is listen with a file that can be handed to children. It is in blocking mode, or [os.File.Fd] would put it there at
// the start of each worker, and with it the workers that run already, since the mode is the socket's. They set it themselves.
func listenFile(at netip.AddrPort, backlog int, keepAlive time.Duration) (*os.File, netip.AddrPort, error) {
	fd, addr, err := listen(at, backlog, keepAlive)
	if err != nil {
		return nil, addr, err
	}
	if err := unix.SetNonblock(fd, false); err != nil {
		unix.Close(fd)
		return nil, addr, fmt.Errorf("listening on %s: %w", addr, err)
	}
	return os.NewFile(uintptr(fd), "listener "+addr.String()), addr, nil
}

// controlBacklog is the places for control connections that wait: few people ask.
const controlBacklog = 128

func (w *Workers) listenControl() (net.Listener, error) {
	where := w.Control
	if where == "" {
		where = "127.0.0.1:0"
	}
	at, err := parseAddr(where)
	if err != nil {
		return nil, err
	}
	file, addr, err := listenFile(at, controlBacklog, 0)
	if err != nil {
		return nil, fmt.Errorf("control address: %w", err)
	}
	defer file.Close()
	l, err := net.FileListener(file) // has a descriptor of its own
	if err != nil {
		return nil, fmt.Errorf("control address %s: %w", addr, err)
	}
	return l, nil
}

// worker is one of the processes, as its supervisor sees it.
type worker struct {
	number  int // from 1
	cmd     *exec.Cmd
	control net.Conn
	stderr  head
}

// startWorker executes argv with the listening socket and one end of a new pair of sockets as descriptors 3 and 4. The worker is
// told to end when ctx is done.
func startWorker(ctx context.Context, number int, argv []string, listener *os.File) (*worker, error) {
	self, err := os.Executable()
	if err != nil {
		return nil, fmt.Errorf("starting worker %d: %w", number, err)
	}
	pair, err := unix.Socketpair(unix.AF_UNIX, unix.SOCK_STREAM|unix.SOCK_CLOEXEC, 0)
	if err != nil {
		return nil, fmt.Errorf("starting worker %d: creating a pair of sockets: %w", number, err)
	}
	ours, theirs := os.NewFile(uintptr(pair[0]), "control"), os.NewFile(uintptr(pair[1]), "control")
	defer ours.Close()
	defer theirs.Close()
	w := &worker{number: number}
	if w.control, err = net.FileConn(ours); err != nil { // has a descriptor of its own
		return nil, fmt.Errorf("starting worker %d: %w", number, err)
	}
	w.cmd = exec.CommandContext(ctx, self, argv[1:]...)
	w.cmd.Args[0] = argv[0]
	w.cmd.ExtraFiles = []*os.File{listener, theirs}
	w.cmd.Stderr = &w.stderr
	w.cmd.Cancel = func() error { return w.cmd.Process.Signal(unix.SIGTERM) }
	w.cmd.WaitDelay = workerPatience
	// A Ctrl-C at the terminal is for the supervisor, which then ends its workers in order.
	w.cmd.SysProcAttr = &syscall.SysProcAttr{Pdeathsig: unix.SIGKILL, Setpgid: true}
	if err := w.cmd.Start(); err != nil {
		w.control.Close()
		return nil, fmt.Errorf("starting worker %d: %w", number, err)
	}
	return w, nil
}

// wait returns when the worker has ended, with an error unless it was told to.
func (w *worker) wait(ctx context.Context) error {
	err := w.cmd.Wait()
	if ctx.Err() != nil {
		return nil
	}
	if err == nil {
		err = errors.New("exit status 0")
	}
	said := ""
	if text := bytes.TrimSpace(w.stderr.text); len(text) > 0 {
		said = "\n" + string(text)
	}
	return fmt.Errorf("worker %d (pid %d) ended: %w%s", w.number, w.cmd.Process.Pid, err, said)
}

// maxHead is how much is kept of what a worker says.
const maxHead = 8 << 10

// head keeps the beginning of what is written to it: there a panic says what it is.
type head struct{ text []byte }

// Write takes all of p, whatever it keeps.
func (h *head) Write(p []byte) (int, error) {
	h.text = append(h.text, p[:min(len(p), maxHead-len(h.text))]...)
	return len(p), nil
}
