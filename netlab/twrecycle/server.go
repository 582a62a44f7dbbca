package twrecycle

import (
	"encoding/binary"
	"maps"
	"net/netip"
	"sync"
	"time"

	"connlab/netlab/wire"
)

// The constants of the rule (include/net/tcp.h), and what follows from
// TCP_RTO_MIN: tcp_time_wait's (rto << 2) - (rto >> 1) for the shortest timeout.
const (
	pawsMSL       = 60 // TCP_PAWS_MSL, in seconds
	pawsWindow    = 1  // TCP_PAWS_WINDOW, in ticks of the peer's clock
	recycledAfter = 700 * time.Millisecond
)

// Bounds of a Server's memory.
const (
	maxConns = 1 << 18
	maxPeers = 1 << 16
)

// optionTimestamps is the kind of the TCP timestamps option (RFC 7323 section 3.2).
const optionTimestamps = 8

// Server is what one server host remembers of its peers. Its stages belong next to
// the host: Entering last, behind whatever rewrites addresses, and Leaving first.
// Only SYNs are ever dropped, and nothing is changed.
type Server struct {
	now func() time.Time

	mu        sync.Mutex // the wire against readers of Stats
	peers     map[netip.Addr]stamp
	conns     map[tuple]*conn
	timeWaits []*conn // oldest first: all last equally long
	swept     time.Time
	stats     Stats
}

// tuple is a connection, as the server sees it.
type tuple struct{ peer, local netip.AddrPort }

// stamp is a TSval and the second in which it came; the zero stamp is none.
type stamp struct {
	value  uint32
	second int64
}

// state is a server's socket as far as it decides who closed first.
type state int

const (
	open      state = iota // SYN_RECV, SYN_SENT and ESTABLISHED
	closeWait              // the peer closed first
	lastAck
	finWait1 // the server closed first
	finWait2
	closing
	timeWait
)

// conn is a connection that has a socket.
type conn struct {
	tuple  tuple
	state  state
	recent stamp     // ts_recent and ts_recent_stamp
	fin    uint32    // the number behind the server's FIN
	peer   uint32    // the number behind the peer's
	until  time.Time // the end of TIME_WAIT
}

// Stats is what a server host has done so far.
type Stats struct {
	// SYNs is those that met no socket, with a timestamp or without.
	SYNs uint64
	// Rejected is those of them that were dropped: PAWSPassive. A SYN that is sent
	// again counts again.
	Rejected uint64
	// TimeWaits is connections that came to TIME_WAIT: the server closed first, with
	// timestamps or without.
	TimeWaits uint64
	// Stamps is how often a peer's stamp was written.
	Stamps uint64
	// Peers is how many addresses have a stamp, one that is too old included.
	Peers int
	// Conns is how many connections have a socket, TIME_WAIT included.
	Conns int
	// Untracked is connections beyond 262,144 and peers beyond 65,536, which the
	// rule knows nothing of.
	Untracked uint64
}

// New is a server host that remembers nothing yet. The rule is for the whole host,
// whatever the port.
func New() *Server {
	return &Server{now: time.Now, peers: make(map[netip.Addr]stamp), conns: make(map[tuple]*conn)}
}

// Entering is the stage of packets to the server: it drops the SYNs that the rule
// rejects.
func (s *Server) Entering(p *wire.Packet) wire.Verdict {
	seg, err := p.TCP()
	if err != nil {
		return wire.Forward
	}
	s.mu.Lock()
	defer s.mu.Unlock()
	now := s.now()
	s.recycle(now)
	t := tuple{peer: seg.Source(), local: seg.Destination()}
	c := s.conns[t]
	switch flags := seg.Flags(); {
	case flags.Has(wire.RST):
		delete(s.conns, t)
	case flags.Has(wire.SYN | wire.ACK): // the server itself connected
		if c == nil || c.state == timeWait {
			c = s.begin(t)
		}
		if c != nil {
			c.see(seg, now)
		}
	case flags.Has(wire.SYN):
		// A listener drops SYN with FIN; another socket answers a SYN by itself.
		if c == nil && !flags.Has(wire.FIN) {
			return s.request(seg, now)
		}
	case c != nil:
		c.see(seg, now)
		s.advance(c, seg, now)
	}
	return wire.Forward
}

// Leaving is the stage of packets from the server: it learns who closes first.
func (s *Server) Leaving(p *wire.Packet) wire.Verdict {
	seg, err := p.TCP()
	if err != nil {
		return wire.Forward
	}
	s.mu.Lock()
	defer s.mu.Unlock()
	t := tuple{peer: seg.Destination(), local: seg.Source()}
	switch flags := seg.Flags(); {
	case flags.Has(wire.RST):
		delete(s.conns, t)
	case flags.Has(wire.SYN | wire.ACK):
		s.begin(t)
	case flags.Has(wire.FIN):
		if c := s.conns[t]; c != nil {
			c.close(seg)
		}
	}
	return wire.Forward
}

// Stats may be read while the wire runs.
func (s *Server) Stats() Stats {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.recycle(s.now())
	stats := s.stats
	stats.Peers, stats.Conns = len(s.peers), len(s.conns)
	return stats
}

// request judges a SYN that meets no socket: tcp_peer_is_proven with paws_check.
func (s *Server) request(seg *wire.Segment, now time.Time) wire.Verdict {
	s.stats.SYNs++
	value, has := timestamp(seg)
	last, known := s.peers[seg.Source().Addr()]
	if has && known && now.Unix()-last.second < pawsMSL && int32(last.value-value) > pawsWindow {
		s.stats.Rejected++
		return wire.Drop
	}
	return wire.Forward
}

// begin gives the tuple a new connection in place of any that it had; nil if there
// is no room.
func (s *Server) begin(t tuple) *conn {
	if _, replaces := s.conns[t]; !replaces && len(s.conns) >= maxConns {
		s.stats.Untracked++
		return nil
	}
	c := &conn{tuple: t}
	s.conns[t] = c
	return c
}

// advance moves a connection by a segment of the peer.
func (s *Server) advance(c *conn, seg *wire.Segment, now time.Time) {
	fin := seg.Flags().Has(wire.FIN)
	acked := seg.Flags().Has(wire.ACK) && int32(seg.Ack()-c.fin) >= 0 // if the server's FIN is out
	switch {
	case c.state == open && fin:
		c.state = closeWait
		c.peer = behindFIN(seg)
	case c.state == lastAck && acked:
		delete(s.conns, c.tuple)
	case c.state == finWait1 && acked && fin, c.state == finWait2 && fin, c.state == closing && acked:
		s.enterTimeWait(c, now)
	case c.state == finWait1 && acked:
		c.state = finWait2
		s.remember(c, now)
	case c.state == finWait1 && fin:
		c.state = closing
	}
}

// enterTimeWait stamps the peer and lets the socket live for the recycled time.
// Without timestamps it would live for 60 s, but no SYN without one is judged.
func (s *Server) enterTimeWait(c *conn, now time.Time) {
	c.state = timeWait
	c.until = now.Add(recycledAfter)
	s.timeWaits = append(s.timeWaits, c)
	s.stats.TimeWaits++
	s.remember(c, now)
}

// recycle ends the TIME_WAITs whose time is over.
func (s *Server) recycle(now time.Time) {
	for len(s.timeWaits) > 0 && !now.Before(s.timeWaits[0].until) {
		c := s.timeWaits[0]
		s.timeWaits = s.timeWaits[1:]
		if s.conns[c.tuple] == c { // not reset, nor begun anew
			delete(s.conns, c.tuple)
		}
	}
}

// remember writes the stamp of the connection's peer: tcp_remember_stamp and
// tcp_tw_remember_stamp.
func (s *Server) remember(c *conn, now time.Time) {
	if c.recent == (stamp{}) {
		return
	}
	peer := c.tuple.peer.Addr()
	last, known := s.peers[peer]
	switch {
	case !known && !s.roomForPeer(now):
		s.stats.Untracked++
	case !known, int32(last.value-c.recent.value) <= 0,
		now.Unix()-last.second > pawsMSL && last.second <= c.recent.second:
		s.peers[peer] = c.recent
		s.stats.Stamps++
	}
}

// roomForPeer makes room by forgetting what rejects nobody any more; at most once
// a second, because it looks at all.
func (s *Server) roomForPeer(now time.Time) bool {
	if len(s.peers) >= maxPeers && now.Sub(s.swept) >= time.Second {
		s.swept = now
		maps.DeleteFunc(s.peers, func(_ netip.Addr, x stamp) bool { return now.Unix()-x.second >= pawsMSL })
	}
	return len(s.peers) < maxPeers
}

// see takes the segment's timestamp, unless it is older than what was seen:
// tcp_replace_ts_recent, for segments in order.
func (c *conn) see(seg *wire.Segment, now time.Time) {
	value, has := timestamp(seg)
	if has && (c.recent == (stamp{}) || int32(c.recent.value-value) <= 0) {
		c.recent = stamp{value: value, second: now.Unix()}
	}
}

// close moves a connection by the server's FIN. Whether the peer closed first is in
// its acknowledgment: a FIN that crosses it on the wire came too late.
func (c *conn) close(seg *wire.Segment) {
	switch {
	case c.state == open:
		c.state = finWait1
	case c.state == closeWait && int32(seg.Ack()-c.peer) >= 0:
		c.state = lastAck
	case c.state == closeWait:
		c.state = closing
	default: // sent again
		return
	}
	c.fin = behindFIN(seg)
}

// behindFIN is the sequence number after the segment's FIN.
func behindFIN(seg *wire.Segment) uint32 { return seg.Seq() + uint32(len(seg.Payload())) + 1 }

// timestamp is the TSval of a segment.
func timestamp(seg *wire.Segment) (value uint32, has bool) {
	data, has := seg.Option(optionTimestamps)
	if !has || len(data) != 8 {
		return 0, false
	}
	return binary.BigEndian.Uint32(data), true
}
