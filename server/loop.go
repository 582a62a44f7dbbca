package server

import (
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
		if err := s.acceptAgain(); err != nil {
			return err
		}
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
		if s.clock.now >= s.nextCron {
			s.cron()
			s.planCron()
			if err := s.acceptUnreported(); err != nil {
				return err
			}
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
	if at, ok := s.nextAccept(); ok {
		next = min(next, at)
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
	case n > 0 && cap(c.in) > keepBuffer:
		c.in = slices.Clone(c.in[n:])
		c.parser.Release() // the last arguments point into the old one
	case n > 0:
		c.in = c.in[:copy(c.in, c.in[n:])]
	}
	if len(c.in) > s.cfg.QueryBufferLimit {
		s.stats.queryLimit++
		s.doom(c, byServer)
	}
}

// process serves the complete requests at the start of buf and returns how many bytes they took. A client has a parser of its
// own only in the middle of a request; most are between two.
func (s *Server) process(c *client, buf []byte) (consumed int) {
	c.compact()
	lim := s.limits
	parser := &s.parser
	if c.parser != nil {
		parser = c.parser
	}
	for consumed < len(buf) && !c.doomed && !c.closeAfterReply {
		lim.Unauthenticated = s.mustAuthenticate(c)
		n, args, err := parser.Next(buf[consumed:], lim)
		if err != nil {
			s.stats.protocolErrors++
			s.error(c, "ERR "+err.Error())
			c.closeAfterReply = true
			*parser = resp.Parser{} // it lost its place
			break
		}
		if n == 0 {
			if c.parser == nil {
				c.parser = new(s.parser)
				s.parser = resp.Parser{}
			}
			return consumed
		}
		consumed += n
		if len(args) > 0 {
			s.execute(c, args)
			c.requests++
			if s.cfg.CloseAfter > 0 && c.requests >= s.cfg.CloseAfter && c != s.control {
				c.closeAfterReply = true
			}
		}
		if len(args) > keepArgs {
			parser.Release()
		}
	}
	c.parser = nil
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
