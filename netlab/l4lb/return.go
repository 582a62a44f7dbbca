package l4lb

import (
	"container/list"
	"net/netip"
	"slices"
	"sync"
	"time"

	"connlab/netlab/wire"
)

// Policy says which VIP the replies of a tuple that two VIPs share come from.
type Policy int

const (
	// FirstVIP keeps the VIP with which the proxy's socket began, as a module does
	// that keeps the VIP with the socket. The second connection is never answered:
	// the challenge ACKs to its SYNs go to the first, which takes them for
	// duplicates.
	FirstVIP Policy = iota
	// LastVIP takes the VIP of the latest SYN, as a table of addresses does that is
	// simply written to. The challenge ACK reaches the second client, whose kernel
	// answers with a reset that ends the first connection at the proxy (RFC 9293
	// section 3.10.7.3), and whose next SYN succeeds.
	LastVIP
)

// Bounds of a Return's memory.
const (
	maxEntries    = 1 << 18 // SYNs beyond are not learned
	maxIdle       = 1 << 16 // entries without a socket; the oldest go
	maxCollisions = 1 << 16 // listed; all are counted
	maxRivals     = 1 << 10 // of one socket told apart, more VIPs than a proxy serves
)

// answerTime is longer than any proxy takes to answer a SYN. One that is not
// answered by then met a full queue, and there is no socket.
const answerTime = 5 * time.Second

// Return is the return path of one proxy host: two stages of the wire to it.
// It learns from the SYNs that enter which VIP a client's connection is for, and
// makes that VIP the source of what leaves. It drops nothing: what it cannot read
// passes unchanged.
//
// An entry lives as long as the proxy's socket does, as far as the wire tells: from
// the first SYN to a reset or to the acknowledgment of both FINs. It translates
// beyond that, for late retransmissions, until another SYN takes the tuple or, of
// the 65,536 entries without a socket, it is the oldest.
type Return struct {
	policy Policy
	kind   byte
	now    func() time.Time

	mu         sync.Mutex // the wire's thread against readers of what follows
	entries    map[tuple]*entry
	idle       list.List // entries whose life is over or not answered yet, oldest first
	stats      ReturnStats
	collisions []Collision
}

// entry is a client's connection to the proxy.
type entry struct {
	tuple tuple
	vip   endpoint // the proxy's own address for a SYN without the option
	life  life
	asked time.Time // the latest SYN of vip
	place *list.Element

	rivals []rival // of this life
}

// rival is a VIP that came second.
type rival struct {
	vip    endpoint
	iss    uint32 // the sequence number of its latest SYN
	listed int    // index into Return.collisions, or -1
}

// Collision is one tuple shared by two VIPs at a time: while the proxy's socket
// lived that the first VIP's SYN had made, the second's came from the same client
// address and port.
type Collision struct {
	Client netip.AddrPort
	Proxy  netip.AddrPort
	First  netip.AddrPort
	// Second is the proxy's own address if the client's SYN had no VIP, i.e.
	// connected to the proxy directly.
	Second netip.AddrPort
	// At is when the second's first SYN came.
	At time.Time
	// SYNs is how many of the second's SYNs have met that socket so far: what the
	// proxy's kernel counts as TCPSYNChallenge. A SYN after a reset ended the socket
	// is none of them.
	SYNs int
}

// ReturnStats is what a return path has done so far.
type ReturnStats struct {
	// NotTCP is packets, either way, that passed because they are not TCP over IPv4
	// or cannot be read.
	NotTCP uint64
	// BadOptions is SYNs whose option of the kind is no VIP; they count as having
	// none.
	BadOptions uint64
	// Learned is sockets of the proxy that were found to belong to a VIP.
	Learned uint64
	// TakenOver is how many of them took the tuple of another VIP whose socket was
	// over, mostly a TIME_WAIT. That is no sharing.
	TakenOver uint64
	// Full is SYNs that were not learned because there were 262,144 entries.
	Full uint64
	// Restored is packets that left with a VIP as their source.
	Restored uint64
	// Untranslated is TCP packets that left as they came.
	Untranslated uint64
	// Collisions is how many there were, listed or not.
	Collisions uint64
	// Open is how many sockets live now.
	Open uint64
}

// NewReturn is the return path of one proxy host. An option kind of 0 is
// [KindTOAVIP].
func NewReturn(policy Policy, optionKind byte) *Return {
	if optionKind == 0 {
		optionKind = KindTOAVIP
	}
	return &Return{policy: policy, kind: optionKind, now: time.Now, entries: make(map[tuple]*entry)}
}

// Entering is the stage of packets to the proxy host: it learns.
func (r *Return) Entering(p *wire.Packet) wire.Verdict {
	seg, err := p.TCP()
	r.mu.Lock()
	defer r.mu.Unlock()
	if err != nil {
		r.stats.NotTCP++
		return wire.Forward
	}
	t := tuple{client: endpointOf(seg.Source()), server: endpointOf(seg.Destination())}
	e := r.entries[t]
	switch {
	case opens(seg.Flags()):
		r.syn(t, e, seg)
	case e != nil:
		before := e.life
		e.life.entering(seg)
		r.settle(e, before)
	}
	return wire.Forward
}

// Leaving is the stage of packets from the proxy host: it makes the VIP their
// source.
func (r *Return) Leaving(p *wire.Packet) wire.Verdict {
	seg, err := p.TCP()
	r.mu.Lock()
	defer r.mu.Unlock()
	if err != nil {
		r.stats.NotTCP++
		return wire.Forward
	}
	e := r.entries[tuple{client: endpointOf(seg.Destination()), server: endpointOf(seg.Source())}]
	if e == nil {
		r.stats.Untranslated++
		return wire.Forward
	}
	before := e.life
	if anew := e.life.leaving(seg); anew {
		r.renew(e)
	}
	r.settle(e, before)
	if e.vip == e.tuple.server {
		r.stats.Untranslated++
		return wire.Forward
	}
	seg.SetSource(e.vip.addrPort())
	r.stats.Restored++
	return wire.Forward
}

// syn learns from a SYN. e is the tuple's entry or nil.
func (r *Return) syn(t tuple, e *entry, seg *wire.Segment) {
	vip := r.vip(t, seg)
	now := r.now()
	switch {
	case e == nil:
		if len(r.entries) >= maxEntries {
			r.stats.Full++
			return
		}
		e = &entry{tuple: t, life: life{over: true}}
		r.entries[t] = e
		r.begin(e, vip, seg.Seq(), now)
	case e.life.over, !e.life.answered && now.Sub(e.asked) > answerTime:
		if vip != e.vip {
			r.stats.TakenOver++
		}
		r.begin(e, vip, seg.Seq(), now)
	default:
		r.challenge(e, vip, seg.Seq(), now)
	}
}

// vip is the VIP that a SYN is for; the proxy's own address if it names none.
func (r *Return) vip(t tuple, seg *wire.Segment) endpoint {
	data, has := seg.Option(r.kind)
	if !has {
		return t.server
	}
	vip, ok := fromOption(data)
	if !ok {
		r.stats.BadOptions++
		return t.server
	}
	return vip
}

// begin starts an entry's life, the first or the next.
func (r *Return) begin(e *entry, vip endpoint, iss uint32, now time.Time) {
	before := e.life
	e.vip, e.life, e.asked, e.rivals = vip, begun(iss), now, e.rivals[:0]
	if e.place != nil {
		r.idle.MoveToBack(e.place)
	}
	r.learned(e)
	r.settle(e, before)
}

// challenge is a SYN to a living entry.
func (r *Return) challenge(e *entry, vip endpoint, iss uint32, now time.Time) {
	i := slices.IndexFunc(e.rivals, func(x rival) bool { return x.vip == vip })
	switch {
	case i >= 0:
		e.rivals[i].iss = iss
		if listed := e.rivals[i].listed; listed >= 0 {
			r.collisions[listed].SYNs++
		}
	case vip == e.vip: // a retransmission, or the same client anew
		e.asked = now
	default:
		r.stats.Collisions++
		x := rival{vip: vip, iss: iss, listed: -1}
		if len(r.collisions) < maxCollisions {
			x.listed = len(r.collisions)
			r.collisions = append(r.collisions, Collision{
				Client: e.tuple.client.addrPort(),
				Proxy:  e.tuple.server.addrPort(),
				First:  e.vip.addrPort(),
				Second: vip.addrPort(),
				At:     now,
				SYNs:   1,
			})
		}
		if len(e.rivals) < maxRivals {
			e.rivals = append(e.rivals, x)
		}
	}
	if r.policy == LastVIP {
		e.vip = vip
	}
}

// renew gives the entry to the VIP whose SYN the proxy has just answered with a
// new socket, whatever the policy: the old one was gone.
func (r *Return) renew(e *entry) {
	if i := slices.IndexFunc(e.rivals, func(x rival) bool { return x.iss == e.life.iss }); i >= 0 {
		e.vip = e.rivals[i].vip
	}
	e.rivals = e.rivals[:0]
	r.learned(e)
}

func (r *Return) learned(e *entry) {
	if e.vip != e.tuple.server {
		r.stats.Learned++
	}
}

// settle follows a change of an entry's life: counts it, and puts the entry among
// the idle ones or takes it out.
func (r *Return) settle(e *entry, before life) {
	switch {
	case e.life.over && !before.over:
		r.stats.Open--
	case !e.life.over && before.over:
		r.stats.Open++
	}
	switch idle := e.life.over || !e.life.answered; {
	case !idle && e.place != nil:
		r.idle.Remove(e.place)
		e.place = nil
	case idle && e.place == nil:
		e.place = r.idle.PushBack(e)
	}
	if r.idle.Len() > maxIdle {
		r.forget(r.idle.Front().Value.(*entry))
	}
}

// forget drops an idle entry.
func (r *Return) forget(e *entry) {
	r.idle.Remove(e.place)
	delete(r.entries, e.tuple)
	if !e.life.over {
		r.stats.Open--
	}
}

// Stats may be read while the wire runs.
func (r *Return) Stats() ReturnStats {
	r.mu.Lock()
	defer r.mu.Unlock()
	return r.stats
}

// Collisions is a copy of the collisions so far, in order. The first 65,536 are
// listed; [ReturnStats].Collisions counts all.
func (r *Return) Collisions() []Collision {
	r.mu.Lock()
	defer r.mu.Unlock()
	return slices.Clone(r.collisions)
}
