package server

import (
	"fmt"
	"net/netip"
	"slices"
	"time"

	"golang.org/x/sys/unix"

	"connlab/server/resp"
)

// looksPerRequest bounds what looking for events before sleeping costs. Driven by redis-benchmark without pipelining, 16
// served a tenth more requests than 4, at the same CPU time: a look is cheaper than going to sleep and being woken.
const looksPerRequest = 16

// loop is aeMain: write what is to be written, wait, serve what is ready, run the cron if it is due.
func (s *Server) loop() error {
	var served int64 // requests of the last cycle
	for !s.closing.Load() {
		s.beforeSleep()
		events, err := s.wait(looksPerRequest * served)
		if err != nil {
			return err
		}
		s.stats.cycles++
		s.clock.tick()
		before := s.stats.commands
		for i := range events {
			if err := s.serveTimed(&events[i]); err != nil {
				return err
			}
		}
		served = s.stats.commands - before
		s.closeDue()
		if s.accept.resumeAt != 0 && s.clock.now >= s.accept.resumeAt {
			if err := s.resumeAccept(); err != nil {
				return err
			}
		}
		if s.clock.now >= s.nextCron {
			s.cron()
			s.nextCron = s.clock.now + s.cronPeriod()
		}
	}
	return nil
}

// wait returns the events that are there, or waits until a timer is due, for replies that are held more precisely than for
// the others.
func (s *Server) wait(looks int64) ([]unix.EpollEvent, error) {
	if len(s.held) == 0 {
		return s.poll.wait(s.untilTimer(), looks)
	}
	s.clock.tick()
	return s.poll.waitPrecisely(min(s.untilTimer(), s.held[0].held.next().due-s.clock.now))
}

// untilTimer returns how long the loop may wait for events, but for replies that are held.
func (s *Server) untilTimer() time.Duration {
	next := s.nextCron
	if s.accept.resumeAt != 0 {
		next = min(next, s.accept.resumeAt)
	}
	if _, at, ok := s.nextClose(); ok {
		next = min(next, at)
	}
	return next - s.clock.now
}

// serveTimed serves one event and sees to it that the time of what is no command, as of accepting connections, is not
// counted to the next command: a command starts when the clock was last read.
func (s *Server) serveTimed(ev *unix.EpollEvent) error {
	before := s.stats.commands
	err := s.serve(ev)
	if s.stats.commands == before || ev.Events&unix.EPOLLOUT != 0 {
		s.clock.tick()
	}
	return err
}

// serve handles one event. Only trouble with the listener is an error.
func (s *Server) serve(ev *unix.EpollEvent) error {
	fd := int(ev.Fd)
	switch fd {
	case s.listenFD:
		return s.acceptReady()
	case s.wakeFD:
		return nil // Close has been called; the loop looks
	}
	c := s.byFD[fd]
	if c == nil || c.doomed {
		return nil
	}
	switch {
	case c.leaving != nil && ev.Events&(unix.EPOLLHUP|unix.EPOLLERR) != 0:
		s.doom(c, byError) // a read would only tell of the FIN again (net/ipv4/tcp.c, tcp_recvmsg_locked: SOCK_DONE)
	case ev.Events&(unix.EPOLLIN|unix.EPOLLHUP|unix.EPOLLERR) != 0:
		s.readable(c)
	}
	if ev.Events&unix.EPOLLOUT != 0 && !c.doomed {
		s.flush(c)
	}
	return nil
}

// beforeSleep writes the replies of this cycle and closes who is to be closed, as Redis's beforeSleep does with
// handleClientsWithPendingWrites and freeClientsInAsyncFreeQueue.
func (s *Server) beforeSleep() {
	if len(s.held) > 0 {
		s.releaseHeld(s.clock.tick())
	}
	for _, c := range s.pending {
		c.pending = false
		if !c.doomed && !c.wantWrite {
			s.flush(c)
		}
	}
	clear(s.pending)
	s.pending = s.pending[:0]
	for _, c := range s.doomed {
		s.drop(c)
	}
	clear(s.doomed)
	s.doomed = s.doomed[:0]
}

// acceptState is the listener's side of the loop.
type acceptState struct {
	paused   bool          // by CONNLAB ACCEPT PAUSE
	resumeAt time.Duration // of the clock: end of a pause, 0 for none
}

// acceptReady accepts up to AcceptsPerCycle connections.
func (s *Server) acceptReady() error {
	if s.accept.paused {
		return nil // by a command served after the wait that reported the listener
	}
	for range s.cfg.AcceptsPerCycle {
		fd, peer, errno := sysAccept(s.listenFD)
		switch errno {
		case 0:
			s.admit(fd, peer)
			continue
		case unix.EAGAIN:
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
	c.addr = peer
	if fd >= len(s.byFD) {
		s.byFD = append(s.byFD, make([]*client, fd+1-len(s.byFD))...)
	}
	s.byFD[fd] = c
}

// pauseAccept takes the listener out of the poll until the given time of the clock, 0 for until it is resumed.
func (s *Server) pauseAccept(until time.Duration) error {
	s.accept.resumeAt = until
	if err := s.poll.modify(s.listenFD, 0); err != nil {
		return fmt.Errorf("pausing accept: %w", err)
	}
	return nil
}

func (s *Server) resumeAccept() error {
	s.accept = acceptState{}
	if err := s.poll.modify(s.listenFD, unix.EPOLLIN); err != nil {
		return fmt.Errorf("resuming accept: %w", err)
	}
	return nil
}

// readable reads once from a client and serves what is complete.
func (s *Server) readable(c *client) {
	n, errno := sysRead(c.fd, s.readBuf)
	switch {
	case errno == unix.EAGAIN || errno == unix.EINTR:
		return
	case errno != 0:
		s.doom(c, byError)
		return
	case n == 0:
		s.clientFinished(c)
		return
	}
	s.stats.reads++
	s.stats.netIn += int64(n)
	c.lastSeen = s.clock.now
	s.feed(c, s.readBuf[:n])
}

// feed takes bytes from a client, which are the caller's again afterwards, and serves the requests in them. What is
// incomplete is kept.
func (s *Server) feed(c *client, data []byte) {
	if c.closeAfterReply {
		return // the client is told why already; what else it says does not matter
	}
	s.toServe = false
	defer s.replied(c, c.unsent())
	if len(c.in) == 0 {
		n := s.process(c, data)
		if n < len(data) && !c.doomed {
			c.in = append(c.in, data[n:]...)
		}
		return
	}
	if need := c.parser.Pending(); need > cap(c.in) && need-len(c.in) <= 4*readSize {
		c.in = slices.Grow(c.in, need-len(c.in)) // the end is in sight: make room once
	}
	c.in = append(c.in, data...)
	n := s.process(c, c.in)
	switch {
	case n == len(c.in) && cap(c.in) > keepBuffer:
		c.in = nil
		c.parser.Release() // the last arguments point into it
	case n > 0 && cap(c.in) > keepBuffer:
		c.in = slices.Clone(c.in[n:])
		c.parser.Release()
	case n > 0:
		c.in = c.in[:copy(c.in, c.in[n:])]
	}
	if len(c.in) > s.cfg.QueryBufferLimit {
		s.stats.queryLimit++
		s.doom(c, byServer)
	}
}

// process serves the complete requests at the start of buf and returns how many bytes they took.
func (s *Server) process(c *client, buf []byte) (consumed int) {
	c.compact()
	lim := s.limits
	for consumed < len(buf) && !c.doomed && !c.closeAfterReply {
		lim.Unauthenticated = s.mustAuthenticate(c)
		n, args, err := c.parser.Next(buf[consumed:], lim)
		if err != nil {
			s.stats.protocolErrors++
			s.error(c, "ERR "+err.Error())
			c.closeAfterReply = true
			break
		}
		if n == 0 {
			return consumed
		}
		consumed += n
		if len(args) > 0 {
			s.execute(c, args)
			c.requests++
			if s.cfg.CloseAfter > 0 && c.requests >= s.cfg.CloseAfter {
				c.closeAfterReply = true
			}
		}
		if len(args) > keepArgs {
			c.parser.Release()
		}
	}
	return len(buf)
}

// queue marks a client that has replies to be written before the next wait.
func (s *Server) queue(c *client) {
	if !c.pending && len(c.sendable()) > 0 {
		c.pending = true
		s.pending = append(s.pending, c)
	}
}

// flush writes what it can of a client's replies but for those that are held; the rest waits until the socket is writable.
func (s *Server) flush(c *client) {
	for len(c.sendable()) > 0 {
		n, errno := sysWrite(c.fd, c.sendable())
		if errno == unix.EINTR {
			continue
		}
		if errno == unix.EAGAIN {
			break
		}
		if errno != 0 {
			s.doom(c, byError)
			return
		}
		s.stats.writes++
		s.stats.netOut += int64(n)
		c.written += n
		if n > 0 {
			c.lastSeen = s.clock.now
		}
		if n == 0 || len(c.sendable()) > 0 {
			break // the socket's buffer is full
		}
	}
	if c.unsent() == 0 {
		c.written = 0
		if c.out = c.out[:0]; cap(c.out) > keepBuffer {
			c.out = nil
		}
		if c.closeAfterReply {
			s.doom(c, byServer)
			return
		}
	}
	if done := len(c.sendable()) == 0; c.wantWrite == done {
		c.wantWrite = !done
		s.watch(c)
	}
}

// error replies with an error, whose message begins with its code.
func (s *Server) error(c *client, msg string) {
	s.stats.errors++
	c.out = resp.AppendError(c.out, msg)
}
