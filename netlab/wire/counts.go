package wire

import "sync/atomic"

// Stats is what a wire has done so far, by direction. In a lab, a is the host's
// end and b the switch's; what a device forwards enters it, from b.
type Stats struct {
	AtoB, BtoA Counts
}

// Counts says what became of the frames of one direction: each ends in exactly
// one column after Received, or is still in flight.
type Counts struct {
	// Received is how many frames were read.
	Received uint64
	// Forwarded is how many were written to the other end.
	Forwarded uint64
	// Dropped is how many a stage gave the verdict [Drop].
	Dropped uint64
	// Lost is how many the link's Loss took.
	Lost uint64
	// Overflowed is how many found MaxInFlight others on their way.
	Overflowed uint64
	// Refused is how many the other end did not take, because its device is
	// down or its queue full, or that were too long to carry.
	Refused uint64
	// Ignored is how many frames reached a device that were not addressed to it.
	Ignored uint64
	// Unroutable is how many packets a device had whose destination is no
	// neighbour of its port, or that are not IPv4 at all.
	Unroutable uint64
	// Expired is how many reached a device with no time to live left for a hop.
	Expired uint64
}

// InFlight is how many frames are still on their way.
func (c Counts) InFlight() uint64 {
	return c.Received - c.Forwarded - c.Dropped - c.Lost - c.Overflowed - c.Refused - c.Ignored - c.Unroutable - c.Expired
}

type counters struct {
	received, forwarded, dropped, lost, overflowed, refused, ignored, unroutable, expired atomic.Uint64
}

func (c *counters) read() Counts {
	n := Counts{
		Forwarded:  c.forwarded.Load(),
		Dropped:    c.dropped.Load(),
		Lost:       c.lost.Load(),
		Overflowed: c.overflowed.Load(),
		Refused:    c.refused.Load(),
		Ignored:    c.ignored.Load(),
		Unroutable: c.unroutable.Load(),
		Expired:    c.expired.Load(),
	}
	// Last: a frame is received before it gets its fate, so that InFlight is
	// never negative while the wire runs.
	n.Received = c.received.Load()
	return n
}

// verdict is the column of a verdict that ends a packet's way. One that this
// package does not know is a stage's mistake, and drops.
func (c *counters) verdict(v Verdict) *atomic.Uint64 {
	switch v {
	case lost:
		return &c.lost
	case ignored:
		return &c.ignored
	case unroutable:
		return &c.unroutable
	case expired:
		return &c.expired
	default:
		return &c.dropped
	}
}
