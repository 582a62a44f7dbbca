package l4lb

import "connlab/netlab/wire"

// life follows the proxy's socket of one connection by the packets that pass on
// the proxy's side of a balancer. It begins with a SYN that enters and is over
//
//   - when the proxy resets the connection, or a reset enters that its socket must
//     accept, i.e. whose sequence number lies in the window (RFC 9293 section
//     3.10.7.4; RFC 5961 section 3.2 asks for the exact number, which a packet
//     behind data that is not acknowledged yet cannot be held to here); or
//   - when both sides' FINs have been acknowledged. If the client closed first,
//     that is the acknowledgment which ends LAST_ACK. If the proxy did, its socket
//     has just become a TIME_WAIT; over all the same, since a new SYN does not meet
//     a connection there but tcp_timewait_state_process (net/ipv4/tcp_minisocks.c),
//     which as a rule lets it begin a new one.
//
// What cannot be seen on the wire is missed: a socket that ends by a timer, e.g.
// an orphan in FIN_WAIT_2 after tcp_fin_timeout. If the proxy then answers a later
// SYN with a SYN-ACK, that is proof enough, and a new life begins.
type life struct {
	iss      uint32 // the SYN's sequence number
	expected uint32 // the proxy's RCV.NXT as it last told: the lower edge of its window
	in, out  half
	answered bool // a packet of the proxy was seen
	over     bool
}

// half is the end of one direction.
type half struct {
	fin   bool   // a FIN was seen
	end   uint32 // the sequence number that acknowledges it
	acked bool
}

// maxWindow is more than any tcp_rmem in use allows a receive window to be. A
// segment of another connection falls into it by chance once in 64 times.
const maxWindow = 1 << 26

// begun is the life of a connection whose SYN has that sequence number.
func begun(iss uint32) life { return life{iss: iss, expected: iss + 1} }

// entering takes note of a segment to the proxy. A SYN is its callers' affair.
func (l *life) entering(s *wire.Segment) {
	flags := s.Flags()
	if l.over || flags.Has(wire.SYN) {
		return
	}
	end := s.Seq() + uint32(len(s.Payload()))
	if flags.Has(wire.FIN) {
		end++
	}
	inWindow := end-l.expected <= maxWindow // modulo 2^32
	switch {
	case flags.Has(wire.RST):
		l.over = inWindow
		return
	case flags.Has(wire.FIN) && inWindow:
		l.in.closed(end)
	}
	if flags.Has(wire.ACK) {
		l.out.acknowledged(s.Ack())
	}
	l.over = l.in.acked && l.out.acked
}

// leaving takes note of a segment from the proxy. It returns true when that is
// the SYN-ACK to another SYN than the life's: then the old socket is gone, and this
// is the life of the new one.
func (l *life) leaving(s *wire.Segment) (anew bool) {
	flags := s.Flags()
	switch {
	case l.over:
		return false
	case flags.Has(wire.RST):
		l.answered, l.over = true, true
		return false
	case flags.Has(wire.SYN|wire.ACK) && s.Ack() != l.iss+1:
		*l = begun(s.Ack() - 1)
		anew = true
	}
	l.answered = true
	if flags.Has(wire.ACK) {
		l.expected = s.Ack()
		l.in.acknowledged(s.Ack())
	}
	if flags.Has(wire.FIN) {
		l.out.closed(s.Seq() + uint32(len(s.Payload())) + 1)
	}
	l.over = l.in.acked && l.out.acked
	return anew
}

// closed notes a FIN; the same again, retransmitted, changes nothing.
func (h *half) closed(end uint32) {
	if !h.fin || h.end != end {
		*h = half{fin: true, end: end}
	}
}

// acknowledged notes an acknowledgment. Nothing follows a FIN, so only its own
// number is one of the whole direction.
func (h *half) acknowledged(ack uint32) {
	if h.fin && h.end == ack {
		h.acked = true
	}
}
