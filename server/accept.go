package server

import (
	"errors"
	"fmt"
	"net/netip"
	"time"

	"golang.org/x/sys/unix"
)

// acceptState is what keeps the listener out of the poll.
type acceptState struct {
	paused   bool          // by CONNLAB ACCEPT PAUSE, or for lack of descriptors
	resumeAt time.Duration // of the clock: end of the pause, 0 for none
	full     bool          // a worker with as many clients as it may have
	tooSoon  bool          // for AcceptRate
}

// stopped reports whether accepting waits for something else than its rate.
func (a acceptState) stopped() bool { return a.paused || a.full }

// out reports whether the listener is out of the poll.
func (a acceptState) out() bool { return a.stopped() || a.tooSoon }

// acceptReady accepts up to AcceptsPerCycle connections, and no more than AcceptRate allows by now.
func (s *Server) acceptReady() error {
	if s.accept.out() {
		return nil // by a command served after the wait that reported the listener
	}
	s.tokens.fill(s.clock.now)
	for range s.cfg.AcceptsPerCycle {
		if s.isWorker() && len(s.clients) >= s.cfg.MaxClients {
			s.accept.full = true
			s.tokens.idle()
			return s.stopAccepting()
		}
		if s.tokens.empty() {
			s.accept.tooSoon, s.tokens.owed = true, true
			return s.stopAccepting()
		}
		fd, peer, errno := sysAccept(s.listenFD)
		switch errno {
		case 0:
			s.tokens.take()
			s.admit(fd, peer)
			continue
		case unix.EAGAIN:
			s.tokens.idle()
			return nil
		case unix.EINTR, unix.ECONNABORTED:
			continue
		case unix.EMFILE, unix.ENFILE, unix.ENOBUFS, unix.ENOMEM:
			// Nothing can be accepted now, and level-triggered epoll would report the listener for ever.
			s.stats.acceptErrors++
			return s.pauseAccept(s.clock.now + s.cronPeriod())
		}
		return fmt.Errorf("accepting on %s: %w", s.addr, errno)
	}
	return nil
}

// admit makes a client of an accepted connection, or sends it away when there are too many.
func (s *Server) admit(fd int, peer netip.AddrPort) {
	s.stats.connections++
	s.clock.tick() // up to AcceptsPerCycle connections come in one event; each has an age of its own
	if len(s.clients) >= s.cfg.MaxClients {
		s.stats.rejected++
		_, _ = sysWrite(fd, []byte("-ERR max number of clients reached\r\n")) // best effort, as in Redis
		unix.Close(fd)
		return
	}
	if err := s.poll.add(fd, unix.EPOLLIN); err != nil {
		s.stats.acceptErrors++
		unix.Close(fd)
		return
	}
	c := s.newClient(fd)
	c.ip, c.port = peer.Addr().As4(), peer.Port()
	s.register(c)
}

// pauseAccept stops accepting until the given time of the clock, 0 for until it is resumed.
func (s *Server) pauseAccept(until time.Duration) error {
	s.accept.paused, s.accept.resumeAt = true, until
	s.tokens.idle() // a pause that was asked for is not made up for
	return s.stopAccepting()
}

// resumeAccept ends a pause.
func (s *Server) resumeAccept() error {
	s.accept.paused, s.accept.resumeAt = false, 0
	if s.accept.out() {
		return nil
	}
	return s.startAccepting()
}

// nextAccept returns when the listener is to be put back into the poll, if that is a matter of time.
func (s *Server) nextAccept() (at time.Duration, ok bool) {
	switch {
	case s.accept.paused:
		return s.accept.resumeAt, s.accept.resumeAt != 0
	case s.accept.full:
		return 0, false
	}
	return s.tokens.due(), s.accept.tooSoon
}

// acceptAgain puts the listener back into the poll if all that kept it out is over.
func (s *Server) acceptAgain() error {
	a := &s.accept
	if !a.out() {
		return nil
	}
	if a.resumeAt != 0 && s.clock.now >= a.resumeAt {
		a.paused, a.resumeAt = false, 0
	}
	a.full = a.full && len(s.clients) >= s.cfg.MaxClients
	a.tooSoon = a.tooSoon && s.clock.now < s.tokens.due()
	if a.out() {
		return nil
	}
	// Only who looks knows whether somebody waits.
	if err := s.acceptReady(); err != nil || a.out() {
		return err
	}
	return s.startAccepting()
}

// acceptUnreported has a worker look for connections that nobody told it of: those that another was woken for and did
// not take, since it was full by then, had used up its rate or had something else to do first.
func (s *Server) acceptUnreported() error {
	if !s.isWorker() {
		return nil
	}
	return s.acceptReady()
}

// startAccepting puts the listener into the poll, unless it is there. Of all who wait on it, workers that share it, an
// arrival wakes one (EPOLLEXCLUSIVE); who is busy is passed over (fs/eventpoll.c, ep_poll_callback). Events that are added so
// cannot be modified, hence add and remove. Adding reports a queue that has something in it already (ep_insert).
func (s *Server) startAccepting() error {
	if err := s.poll.add(s.listenFD, unix.EPOLLIN|unix.EPOLLEXCLUSIVE); err != nil && !errors.Is(err, unix.EEXIST) {
		return fmt.Errorf("adding the listener to epoll: %w", err)
	}
	return nil
}

// stopAccepting takes the listener out of the poll, if it is there.
func (s *Server) stopAccepting() error {
	if err := s.poll.remove(s.listenFD); err != nil && !errors.Is(err, unix.ENOENT) {
		return fmt.Errorf("removing the listener from epoll: %w", err)
	}
	return nil
}
