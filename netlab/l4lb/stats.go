package l4lb

import (
	"sync/atomic"

	"connlab/netlab/wire"
)

// Stats is what a balancer has done so far. Each packet that it saw is in
// exactly one of Forwarded and the columns of drops.
type Stats struct {
	// Packets is how many came to the stage.
	Packets uint64
	// Forwarded is how many went on, rewritten.
	Forwarded uint64
	// SYNs is how many of the packets asked a service for a connection, whatever
	// became of them; a retransmission counts again.
	SYNs uint64
	// OptionsAdded is how many SYNs went on with the VIP in them.
	OptionsAdded uint64

	// NotTCP to PortsExhausted are the packets dropped, by reason. NotTCP is ARP,
	// UDP, ICMP, IPv6.
	NotTCP uint64
	// Malformed is headers that contradict themselves or the frame.
	Malformed uint64
	// Fragments is pieces of datagrams.
	Fragments uint64
	// NotService is another destination or another port.
	NotService uint64
	// Forged is SYNs that had the option already.
	Forged uint64
	// NoRoom is SYNs with too many options for one more.
	NoRoom uint64
	// TooBig is SYNs with so much data that the option would exceed the MTU.
	TooBig uint64
	// NoSession is, in full NAT, packets other than SYNs of connections that the
	// balancer does not know, in either direction.
	NoSession uint64
	// PortsExhausted is, in full NAT, SYNs that found no free local port for their
	// proxy.
	PortsExhausted uint64

	// Replies is, in full NAT, how many of the forwarded packets went to clients.
	Replies uint64
	// Unanswered is, in full NAT, sessions that ended because no packet of the proxy
	// had come two minutes after the last SYN.
	Unanswered uint64
	// Open is, in full NAT, how many sessions there are now.
	Open uint64
}

// Dropped is the sum of the columns of drops.
func (s Stats) Dropped() uint64 {
	return s.NotTCP + s.Malformed + s.Fragments + s.NotService + s.Forged + s.NoRoom + s.TooBig + s.NoSession + s.PortsExhausted
}

type column = atomic.Uint64

type counters struct {
	packets, forwarded, syns, optionsAdded,
	notTCP, malformed, fragments, notService, forged, noRoom, tooBig, noSession, portsExhausted,
	replies, unanswered, open column
}

// drop ends a packet's way in a column.
func drop(c *column) wire.Verdict {
	c.Add(1)
	return wire.Drop
}

// Stats may be read while the balancer runs: Packets may then be ahead of the
// columns by the packet that is being looked at.
func (b *Balancer) Stats() Stats {
	c := &b.counters
	s := Stats{
		Forwarded:      c.forwarded.Load(),
		OptionsAdded:   c.optionsAdded.Load(),
		NotTCP:         c.notTCP.Load(),
		Malformed:      c.malformed.Load(),
		Fragments:      c.fragments.Load(),
		NotService:     c.notService.Load(),
		Forged:         c.forged.Load(),
		NoRoom:         c.noRoom.Load(),
		TooBig:         c.tooBig.Load(),
		NoSession:      c.noSession.Load(),
		PortsExhausted: c.portsExhausted.Load(),
		Replies:        c.replies.Load(),
		Unanswered:     c.unanswered.Load(),
		Open:           c.open.Load(),
	}
	// Causes after their effects, so that no sum exceeds its whole.
	s.SYNs = c.syns.Load()
	s.Packets = c.packets.Load()
	return s
}
