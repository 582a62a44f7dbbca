package server

import (
	"math"
	"math/rand/v2"
	"time"

	"golang.org/x/sys/unix"
)

// closer is who ended a connection, as far as the loop can see: a FIN that it has not read yet it does not know of.
type closer int

const (
	byClient closer = iota // by FIN
	byError                // by RST, or by an error of the kernel's, as a timeout
	byServer               // by a command, a setting or a limit
)

// doom has a client closed at the end of the cycle. Events and requests of it that are already there are not served.
func (s *Server) doom(c *client, by closer) {
	if c.doomed {
		return
	}
	c.doomed = true
	if c == s.control {
		s.closing.Store(true) // nobody is left to ask this worker for anything
		return
	}
	s.doomed = append(s.doomed, c)
	s.forget(c)
	if c.leaving != nil {
		s.leaving.Remove(c.leaving)
		c.leaving = nil
		if by == byServer {
			by = byClient // its FIN came first
		}
	}
	s.stats.closes[by]++
}

// cut has a share of all clients closed, rounded to a whole number and chosen at random, and returns their number. The one
// who asks is not among them, nor is a worker's control connection. The close sends FIN or, if it is to be a reset, RST: a
// socket that may not linger at all is disconnected (net/ipv4/tcp.c, __tcp_close). Bytes that were not read make it RST, too.
func (s *Server) cut(asker *client, share float64, reset bool) int64 {
	var victims []*client
	for _, o := range s.clients {
		if o != asker && !o.doomed {
			victims = append(victims, o)
		}
	}
	n := int(math.Round(share * float64(len(victims))))
	for i := range n {
		j := i + rand.IntN(len(victims)-i)
		victims[i], victims[j] = victims[j], victims[i]
		if reset {
			// Cannot fail on a TCP socket.
			_ = unix.SetsockoptLinger(victims[i].fd, unix.SOL_SOCKET, unix.SO_LINGER, &unix.Linger{Onoff: 1, Linger: 0})
		}
		s.doom(victims[i], byServer)
	}
	return int64(n)
}

// drop closes a doomed client.
func (s *Server) drop(c *client) {
	unix.Close(c.fd) // also takes it out of the poll: no descriptor is duplicated here
	s.byFD[c.fd] = nil
	last := s.clients[len(s.clients)-1]
	last.index = c.index
	s.clients[c.index] = last
	s.clients[len(s.clients)-1] = nil
	s.clients = s.clients[:len(s.clients)-1]
}

// clientFinished is what follows a client's FIN: the close, now or after CloseDelay. Until then it can take what is left
// of its replies; what was no complete request is forgotten.
func (s *Server) clientFinished(c *client) {
	if s.cfg.CloseDelay == 0 || c == s.control {
		s.doom(c, byClient)
		return
	}
	c.finished = s.clock.now
	c.leaving = s.leaving.PushBack(c)
	s.watch(c)
}

// nextClose returns the client whose delayed close is the next, and its time. All wait equally long, so that it is the
// one that finished first, and a change of the setting holds for those that wait already.
func (s *Server) nextClose() (c *client, at time.Duration, ok bool) {
	first := s.leaving.Front()
	if first == nil {
		return nil, 0, false
	}
	c = first.Value.(*client)
	return c, c.finished + s.cfg.CloseDelay, true
}

// closeDue closes the clients whose delay is over.
func (s *Server) closeDue() {
	for {
		c, at, ok := s.nextClose()
		if !ok || at > s.clock.now {
			return
		}
		s.doom(c, byClient)
	}
}

// watch has epoll report what a client is waited for. The end of its stream would be reported for ever, so nothing is
// read after it; epoll reports a reset in any case.
func (s *Server) watch(c *client) {
	var events uint32
	if c.leaving == nil {
		events |= unix.EPOLLIN
	}
	if c.wantWrite {
		events |= unix.EPOLLOUT
	}
	if err := s.poll.modify(c.fd, events); err != nil {
		s.doom(c, byError)
	}
}
