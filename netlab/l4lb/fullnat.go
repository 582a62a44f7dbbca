package l4lb

import (
	"container/list"
	"net/netip"
	"slices"
	"time"

	"connlab/netlab/wire"
)

// unansweredAfter ends a session whose SYNs the proxy does not answer; conntrack's
// time for the same state (net/netfilter/nf_conntrack_proto_tcp.c, SYN_SENT), which
// is more than the longest pause between two of a client's SYNs, 64 s.
const unansweredAfter = 2 * time.Minute

// maxEnded is how many sessions that are over are kept for late packets.
const maxEnded = 1 << 16

// nat is the table of full NAT: each session has a local address and port that is
// unique per proxy, so there are as many at a time as proxies times local addresses
// times ports. A session ends with the proxy's socket (see [life]), not by being
// idle, since an idle timeout is a fault of its own; its port goes to the end of
// its proxy's queue, so that a TIME_WAIT there is met as late as can be, and until
// the port is taken again, late packets find their way.
type nat struct {
	locals []netip.Addr
	first  uint16 // the lowest port
	ports  uint32 // of each local address
	now    func() time.Time

	byClient map[tuple]*session // client and VIP; the latest session of the two
	byProxy  map[tuple]*session // local and proxy
	waiting  list.List          // sessions not answered yet, by their latest SYN
	ended    list.List          // sessions that are over, by their end
}

type session struct {
	outer tuple // client and VIP
	inner tuple // local and proxy
	local netip.AddrPort
	proxy *proxy
	port  uint32 // what proxy.ports gave

	life  life
	asked time.Time     // the latest SYN
	place *list.Element // in waiting or ended, or nil
}

func newNAT(locals []netip.Addr, ports [2]uint16, now func() time.Time) *nat {
	return &nat{
		locals:   slices.Clone(locals),
		first:    ports[0],
		ports:    uint32(ports[1]-ports[0]) + 1,
		now:      now,
		byClient: make(map[tuple]*session),
		byProxy:  make(map[tuple]*session),
	}
}

// endpoints is how many local addresses and ports there are for each proxy.
func (n *nat) endpoints() uint32 { return n.ports * uint32(len(n.locals)) }

// endpoint is the local address and port of that number, address by address.
func (n *nat) endpoint(i uint32) netip.AddrPort {
	return netip.AddrPortFrom(n.locals[i/n.ports], n.first+uint16(i%n.ports))
}

// owns says that a destination's address is one of the balancer's.
func (n *nat) owns(e endpoint) bool {
	return slices.Contains(n.locals, e.addrPort().Addr())
}

// translate sends a client's segment to a proxy from a local address and port.
func (b *Balancer) translate(seg *wire.Segment, s *service) wire.Verdict {
	n := b.nat
	outer := tuple{endpointOf(seg.Source()), s.vip}
	x := n.byClient[outer]
	switch {
	case opens(seg.Flags()):
		b.counters.syns.Add(1)
		if column := b.mark(seg, s); column != nil {
			return drop(column)
		}
		now := n.now()
		b.expire(now)
		if x == nil || x.life.over {
			if x = n.begin(outer, s, seg.Seq()); x == nil {
				return drop(&b.counters.portsExhausted)
			}
			b.counters.open.Add(1)
		}
		x.asked = now
		if !x.life.answered {
			n.waiting.MoveToBack(x.place)
		}
		b.counters.optionsAdded.Add(1)
	case x == nil:
		return drop(&b.counters.noSession)
	default:
		before := x.life
		x.life.entering(seg)
		b.settle(x, before)
	}
	seg.SetSource(x.local)
	seg.SetDestination(x.proxy.addr)
	return wire.Forward
}

// reverse sends a proxy's segment to the client, from the VIP.
func (b *Balancer) reverse(seg *wire.Segment, local endpoint) wire.Verdict {
	x := b.nat.byProxy[tuple{local, endpointOf(seg.Source())}]
	if x == nil {
		return drop(&b.counters.noSession)
	}
	before := x.life
	x.life.leaving(seg)
	b.settle(x, before)
	seg.SetSource(x.outer.server.addrPort())
	seg.SetDestination(x.outer.client.addrPort())
	b.counters.replies.Add(1)
	return wire.Forward
}

// settle follows a change of a session's life.
func (b *Balancer) settle(x *session, before life) {
	if x.life.answered && !before.answered {
		b.nat.waiting.Remove(x.place)
		x.place = nil
	}
	if x.life.over && !before.over {
		b.end(x)
	}
}

// begin makes a session with the proxy's next port, or nil if it has none left.
func (n *nat) begin(outer tuple, s *service, iss uint32) *session {
	p := s.proxyOf(outer.client)
	port, ok := p.ports.take()
	if !ok {
		return nil
	}
	local := n.endpoint(port)
	x := &session{
		outer: outer,
		inner: tuple{endpointOf(local), endpointOf(p.addr)},
		local: local,
		proxy: p,
		port:  port,
		life:  begun(iss),
	}
	if last := n.byProxy[x.inner]; last != nil {
		n.forget(last)
	}
	n.byClient[outer], n.byProxy[x.inner] = x, x
	x.place = n.waiting.PushBack(x)
	return x
}

// end gives a session's port back.
func (b *Balancer) end(x *session) {
	n := b.nat
	x.life.over = true
	if x.place != nil {
		n.waiting.Remove(x.place)
	}
	x.place = n.ended.PushBack(x)
	x.proxy.ports.give(x.port)
	b.counters.open.Add(^uint64(0))
	if n.ended.Len() > maxEnded {
		n.forget(n.ended.Front().Value.(*session))
	}
}

// forget drops a session that is over.
func (n *nat) forget(x *session) {
	n.ended.Remove(x.place)
	delete(n.byProxy, x.inner)
	if n.byClient[x.outer] == x {
		delete(n.byClient, x.outer)
	}
}

// expire ends the sessions that no proxy answered.
func (b *Balancer) expire(now time.Time) {
	for {
		front := b.nat.waiting.Front()
		if front == nil || now.Sub(front.Value.(*session).asked) < unansweredAfter {
			return
		}
		b.end(front.Value.(*session))
		b.counters.unanswered.Add(1)
	}
}

// ports are the numbers 0 to total-1, each given to one session at a time: those
// never used first, then the one that was given back longest ago.
type ports struct {
	total uint32
	fresh uint32   // from here on never used
	freed []uint32 // a queue
	head  int      // its first
}

func (p *ports) take() (port uint32, ok bool) {
	switch {
	case p.fresh < p.total:
		p.fresh++
		return p.fresh - 1, true
	case p.head == len(p.freed):
		return 0, false
	}
	port = p.freed[p.head]
	p.head++
	return port, true
}

func (p *ports) give(port uint32) {
	if p.head > len(p.freed)/2 { // what is left moves less often than the head did
		p.freed = append(p.freed[:0], p.freed[p.head:]...)
		p.head = 0
	}
	p.freed = append(p.freed, port)
}
