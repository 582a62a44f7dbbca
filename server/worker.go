package server

import (
	"context"
	"errors"
	"flag"
	"fmt"

	"golang.org/x/sys/unix"
)

// descriptors is what a worker inherits from its supervisor.
type descriptors struct {
	listen  int // the listening socket that all workers share
	control int // one end of a pair of sockets: a client whose requests come from the control address
}

// flags registers the descriptors; -1 is for none.
func (d *descriptors) flags(fs *flag.FlagSet) {
	fs.IntVar(&d.listen, "listen-fd", -1, "of a worker, set by the program itself: `descriptor` of the listening socket that it shares")
	fs.IntVar(&d.control, "control-fd", -1, "of a worker, set by the program itself: `descriptor` of its control connection")
}

func (d *descriptors) given() bool { return d.listen >= 0 || d.control >= 0 }

// serveInherited is one worker. What there is to warn of, its supervisor has said.
func serveInherited(ctx context.Context, cfg Config, d descriptors) error {
	tuneRuntime(frugalGC)
	if _, err := fitFileLimit(&cfg); err != nil {
		return err
	}
	s, err := newWorker(cfg, d)
	if err != nil {
		return err
	}
	return s.Serve(ctx)
}

// newWorker makes a server of a listening socket that others accept from, too, and takes over both descriptors.
func newWorker(cfg Config, d descriptors) (*Server, error) {
	if err := cfg.validate(); err != nil {
		return nil, err
	}
	for _, fd := range []int{d.listen, d.control} {
		if err := unix.SetNonblock(fd, true); err != nil {
			return nil, fmt.Errorf("inherited descriptor %d: %w", fd, err)
		}
		unix.CloseOnExec(fd)
	}
	sa, err := unix.Getsockname(d.listen)
	if err != nil {
		return nil, fmt.Errorf("asking for the bound address: %w", err)
	}
	addr := addrPortOf(sa)
	if !addr.IsValid() {
		return nil, errors.New("the inherited socket is not one of IPv4")
	}
	s, err := newServer(cfg, d.listen, addr)
	if err != nil {
		return nil, err
	}
	c := s.connection(d.control)
	c.authenticated = true // by who started us
	if err := s.poll.add(c.fd, unix.EPOLLIN); err != nil {
		s.release()
		return nil, fmt.Errorf("adding the control connection to epoll: %w", err)
	}
	s.control = c
	s.register(c)
	return s, nil
}

// isWorker reports whether other processes accept from the same listening socket.
func (s *Server) isWorker() bool { return s.control != nil }
