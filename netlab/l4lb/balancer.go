package l4lb

import (
	"errors"
	"net/netip"
	"time"

	"connlab/netlab/wire"
)

// service is one VIP and port.
type service struct {
	vip    endpoint
	option [optionSize]byte
	group  []*proxy
}

// proxy may be in the groups of many services.
type proxy struct {
	addr  netip.AddrPort
	ports ports // full NAT only
}

// Balancer is a layer-4 balancer; see the package comment. Its Stage belongs to
// one wire, its Stats to anybody.
type Balancer struct {
	kind     byte
	services map[endpoint]*service
	nat      *nat // full NAT only
	counters counters
}

// New builds a balancer. Each error names what is wrong with the configuration,
// which is not consulted afterwards.
func New(cfg Config) (*Balancer, error) {
	if cfg.OptionKind == 0 {
		cfg.OptionKind = KindTOAVIP
	}
	if cfg.Ports == [2]uint16{} {
		cfg.Ports = [2]uint16{1024, 65535}
	}
	if err := cfg.check(); err != nil {
		return nil, err
	}
	b := &Balancer{kind: cfg.OptionKind, services: make(map[endpoint]*service, len(cfg.Services))}
	proxies := make(map[netip.AddrPort]*proxy)
	if cfg.Mode == FullNAT {
		b.nat = newNAT(cfg.Locals, cfg.Ports, time.Now)
	}
	for vip, group := range cfg.Services {
		s := &service{vip: endpointOf(vip), option: endpointOf(vip).option()}
		for _, addr := range group {
			p, known := proxies[addr]
			if !known {
				p = &proxy{addr: addr}
				if b.nat != nil {
					p.ports.total = b.nat.endpoints()
				}
				proxies[addr] = p
			}
			s.group = append(s.group, p)
		}
		b.services[s.vip] = s
	}
	return b, nil
}

// Stage balances a packet: one of a client to a service goes to a proxy of its
// group; in full NAT, a reply of a proxy goes to the client. All else is dropped
// and counted by its reason.
func (b *Balancer) Stage(p *wire.Packet) wire.Verdict {
	b.counters.packets.Add(1)
	seg, err := p.TCP()
	switch {
	case err == nil:
	case errors.Is(err, wire.ErrNotTCP):
		return drop(&b.counters.notTCP)
	case errors.Is(err, wire.ErrFragment):
		return drop(&b.counters.fragments)
	default:
		return drop(&b.counters.malformed)
	}
	to := endpointOf(seg.Destination())
	s := b.services[to]
	var verdict wire.Verdict
	switch {
	case s != nil && b.nat != nil:
		verdict = b.translate(seg, s)
	case s != nil:
		verdict = b.redirect(seg, s)
	case b.nat != nil && b.nat.owns(to):
		verdict = b.reverse(seg, to)
	default:
		verdict = drop(&b.counters.notService)
	}
	if verdict == wire.Forward {
		b.counters.forwarded.Add(1)
	}
	return verdict
}

// redirect sends a client's segment to a proxy with its source kept.
func (b *Balancer) redirect(seg *wire.Segment, s *service) wire.Verdict {
	if opens(seg.Flags()) {
		b.counters.syns.Add(1)
		if column := b.mark(seg, s); column != nil {
			return drop(column)
		}
		b.counters.optionsAdded.Add(1)
	}
	seg.SetDestination(s.proxyOf(endpointOf(seg.Source())).addr)
	return wire.Forward
}

// proxyOf is the proxy of the group that a client's connection goes to.
func (s *service) proxyOf(client endpoint) *proxy {
	return s.group[spread(tuple{client, s.vip}, len(s.group))]
}

// mark puts the VIP into a SYN, or names the column of what prevents it. A SYN
// that has the option already comes from somebody who would choose the VIP, i.e.
// whose data to see, by himself: the proxy would read the first of two.
func (b *Balancer) mark(seg *wire.Segment, s *service) *column {
	if _, has := seg.Option(b.kind); has {
		return &b.counters.forged
	}
	switch err := seg.AddOption(b.kind, s.option[:]); {
	case err == nil:
		return nil
	case errors.Is(err, wire.ErrTooBig):
		return &b.counters.tooBig
	default:
		return &b.counters.noRoom
	}
}
