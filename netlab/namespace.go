package netlab

import (
	"errors"
	"fmt"
	"runtime"

	"golang.org/x/sys/unix"
)

// namespace is an anonymous network namespace, alive while the descriptor or a
// process in it is.
type namespace struct {
	fd   int
	name string
}

func (n *namespace) close() error { return unix.Close(n.fd) }

// nsThread is the one OS thread that enters namespaces. It stays locked for the
// life of a Lab: children started on it carry a parent-death signal that fires
// when this very thread ends, and a thread that failed to return to the host's
// namespace must never serve other goroutines again.
type nsThread struct {
	calls chan nsCall
	quit  chan struct{}
	ended chan struct{}
}

type nsCall struct {
	ns  *namespace // nil: the host's own
	fn  func() error
	err chan error
}

var errThreadEnded = errors.New("the lab is down")

// startThread returns when the thread stands ready in the caller's namespace.
func startThread() (*nsThread, error) {
	t := &nsThread{calls: make(chan nsCall), quit: make(chan struct{}), ended: make(chan struct{})}
	ready := make(chan error)
	go t.run(ready)
	if err := <-ready; err != nil {
		return nil, err
	}
	return t, nil
}

func (t *nsThread) run(ready chan<- error) {
	runtime.LockOSThread() // never unlocked: the thread ends with this goroutine
	if unix.Gettid() == unix.Getpid() {
		// /proc/self/net is the main thread's namespace: keep that thread at home.
		again := make(chan struct{})
		go func() {
			close(again)
			t.run(ready)
		}()
		<-again
		runtime.UnlockOSThread()
		return
	}
	defer close(t.ended)
	home, err := unix.Open("/proc/thread-self/ns/net", unix.O_RDONLY|unix.O_CLOEXEC, 0)
	if err != nil {
		ready <- fmt.Errorf("opening the host's network namespace: %w", err)
		return
	}
	defer unix.Close(home)
	ready <- nil
	for {
		select {
		case <-t.quit:
			return
		case call := <-t.calls:
			err, stuck := call.run(home)
			call.err <- err
			if stuck {
				return
			}
		}
	}
}

// run reports as stuck a thread that could not return to the host's namespace.
func (c nsCall) run(home int) (err error, stuck bool) {
	if c.ns != nil {
		if err := unix.Setns(c.ns.fd, unix.CLONE_NEWNET); err != nil {
			return fmt.Errorf("entering the namespace of %s: %w", c.ns.name, err), false
		}
	}
	err = c.fn()
	if back := unix.Setns(home, unix.CLONE_NEWNET); back != nil {
		return errors.Join(err, fmt.Errorf("returning to the host's namespace: %w (the thread ends)", back)), true
	}
	return err, false
}

// in runs fn on the thread, inside ns.
func (t *nsThread) in(ns *namespace, fn func() error) error {
	call := nsCall{ns: ns, fn: fn, err: make(chan error, 1)}
	select {
	case t.calls <- call:
	case <-t.ended:
		return errThreadEnded
	}
	select {
	case err := <-call.err:
		return err
	case <-t.ended:
	}
	select {
	case err := <-call.err: // of the call after which the thread ended
		return err
	default: // fn ended the goroutine: a test's FailNow does
		return errThreadEnded
	}
}

// stop ends the thread; later calls fail with errThreadEnded.
func (t *nsThread) stop() {
	close(t.quit)
	<-t.ended
}

// newNamespace makes one.
func (t *nsThread) newNamespace(name string) (*namespace, error) {
	ns := &namespace{fd: -1, name: name}
	err := t.in(nil, func() error {
		if err := unix.Unshare(unix.CLONE_NEWNET); err != nil {
			return err
		}
		var err error
		ns.fd, err = unix.Open("/proc/thread-self/ns/net", unix.O_RDONLY|unix.O_CLOEXEC, 0)
		return err
	})
	if err != nil {
		err = fmt.Errorf("%s: new network namespace: %w", name, err)
		if errors.Is(err, unix.EPERM) || errors.Is(err, unix.EINVAL) || errors.Is(err, unix.ENOSPC) {
			return nil, &NeedError{Need: NeedNamespace, Err: err}
		}
		return nil, err
	}
	return ns, nil
}
