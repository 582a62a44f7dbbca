package netlab

import (
	"encoding/binary"
	"errors"
	"fmt"
	"maps"
	"math"
	"net"
	"net/netip"
	"regexp"
	"slices"
)

// maxPorts is how many ports a bridge takes: BR_MAX_PORTS is 1<<10 and port
// number 0 is not used (net/bridge/br_private.h, br_if.c find_portno).
const maxPorts = 1<<10 - 1

// nameRE keeps names printable in metric names (host/Group.Name) and errors.
var nameRE = regexp.MustCompile(`^[a-z0-9][a-z0-9-]{0,30}$`)

// Check reports everything that is wrong with t, joined into one error, without
// creating anything and without privilege.
func (t Topology) Check() error {
	_, err := t.plan()
	return err
}

// plan is a checked topology: every address known.
type plan struct {
	addrs       map[*LinkSpec][]netip.Addr
	deviceAddrs map[*DeviceSpec][]netip.Addr
}

// planner makes a plan and collects what stands in its way.
type planner struct {
	plan
	names    map[string]string   // what each name is that of
	segments map[string]*segment // by switch; nil for one whose subnet is of no use
	errs     []error
}

func (p *planner) bad(format string, args ...any) {
	p.errs = append(p.errs, fmt.Errorf(format, args...))
}

func (t Topology) plan() (plan, error) {
	p := &planner{
		plan:     plan{addrs: map[*LinkSpec][]netip.Addr{}, deviceAddrs: map[*DeviceSpec][]netip.Addr{}},
		names:    map[string]string{},
		segments: map[string]*segment{},
	}
	p.switches(t.Switches)
	if len(t.Hosts) == 0 {
		p.bad("the topology has no hosts")
	}
	for i := range t.Hosts {
		p.host(&t.Hosts[i])
	}
	for i := range t.Devices {
		p.device(&t.Devices[i])
	}
	// Addresses that were asked for by name are taken by now, so that counting
	// up never collides with one that comes later in the list.
	if err := p.countUp(t); err != nil {
		p.errs = append(p.errs, err)
	} else {
		for i := range t.Hosts {
			p.routes(&t.Hosts[i])
		}
	}
	return p.plan, errors.Join(p.errs...)
}

func (p *planner) claim(name, what string) {
	if !nameRE.MatchString(name) {
		p.bad("%s %q: a name is 1 to 31 lower-case letters, digits and dashes", what, name)
	}
	if other, taken := p.names[name]; taken {
		p.bad("%s %q: the name is already that of a %s", what, name, other)
	}
	p.names[name] = what
}

func (p *planner) switches(specs []SwitchSpec) {
	for i, s := range specs {
		p.claim(s.Name, "switch")
		p.segments[s.Name] = nil // known, so that its links are not called unknown
		switch {
		case !s.Subnet.IsValid() || !s.Subnet.Addr().Is4():
			p.bad("switch %q: subnet %v is not an IPv4 prefix", s.Name, s.Subnet)
			continue
		case s.Subnet.Bits() > 30:
			p.bad("switch %q: subnet %v has no room for two hosts; use /30 or wider", s.Name, s.Subnet)
			continue
		}
		for _, other := range specs[:i] {
			if other.Subnet.Overlaps(s.Subnet) {
				p.bad("switch %q: subnet %v overlaps %v of switch %q", s.Name, s.Subnet, other.Subnet, other.Name)
			}
		}
		p.segments[s.Name] = &segment{subnet: s.Subnet.Masked(), owner: map[netip.Addr]string{}}
	}
}

func (p *planner) host(h *HostSpec) {
	p.claim(h.Name, "host")
	for _, key := range slices.Sorted(maps.Keys(h.Sysctls)) {
		if err := checkSysctl(key, h.Sysctls[key]); err != nil {
			p.bad("host %q: %w", h.Name, err)
		}
	}
	for i := range h.Links {
		l := &h.Links[i]
		if !p.plug(hostName(h), l.Switch, l.Addrs) {
			continue
		}
		if l.Delay < 0 {
			p.bad("host %q: link to %q: delay %v is negative", h.Name, l.Switch, l.Delay)
		}
		if math.IsNaN(l.Loss) || l.Loss < 0 || l.Loss > 1 {
			p.bad("host %q: link to %q: loss %v is not a share between 0 and 1", h.Name, l.Switch, l.Loss)
		}
		if l.AlwaysPump && l.Pump == nil {
			p.bad("host %q: link to %q: AlwaysPump without a Pump", h.Name, l.Switch)
		}
	}
}

func (p *planner) device(d *DeviceSpec) {
	p.claim(d.Name, "device")
	if d.Attach == nil {
		p.bad("device %q: Attach is nil, so nothing would read its frames", d.Name)
	}
	p.plug(deviceName(d), d.Switch, d.Addrs)
}

// hostName and deviceName are how an error calls the owner of an address.
func hostName(h *HostSpec) string     { return fmt.Sprintf("host %q", h.Name) }
func deviceName(d *DeviceSpec) string { return fmt.Sprintf("device %q", d.Name) }

// plug takes a port of the switch and the addresses that were asked for. It
// returns false where there is no such switch to say more about.
func (p *planner) plug(who, sw string, addrs []netip.Addr) bool {
	seg, known := p.segments[sw]
	if !known {
		p.bad("%s: link to unknown switch %q", who, sw)
	}
	if seg == nil {
		return false
	}
	if seg.ports++; seg.ports == maxPorts+1 {
		p.bad("switch %q: a bridge takes at most %d links", sw, maxPorts)
	}
	for _, a := range addrs {
		if err := seg.take(a, who); err != nil {
			p.bad("%s: %w", who, err)
		}
	}
	return true
}

// countUp gives an address to every link, then to every device, that asked for
// none. Its error is the first: each further one would say the same.
func (p *planner) countUp(t Topology) (err error) {
	for i := range t.Hosts {
		h := &t.Hosts[i]
		for j := range h.Links {
			l := &h.Links[j]
			if p.addrs[l], err = p.orNext(l.Addrs, hostName(h), l.Switch); err != nil {
				return err
			}
		}
	}
	for i := range t.Devices {
		d := &t.Devices[i]
		if p.deviceAddrs[d], err = p.orNext(d.Addrs, deviceName(d), d.Switch); err != nil {
			return err
		}
	}
	return nil
}

// orNext is what was asked for, or else the lowest free address of the switch.
func (p *planner) orNext(asked []netip.Addr, who, sw string) ([]netip.Addr, error) {
	seg := p.segments[sw]
	if seg == nil || len(asked) > 0 {
		return asked, nil
	}
	a, err := seg.next(who)
	if err != nil {
		return nil, fmt.Errorf("%s: switch %q: %w", who, sw, err)
	}
	return []netip.Addr{a}, nil
}

// routes checks a host's routes when every address has its owner.
func (p *planner) routes(h *HostSpec) {
	for i, r := range h.Routes {
		if !r.To.IsValid() || !r.To.Addr().Is4() {
			p.bad("host %q: route to %v: not an IPv4 prefix", h.Name, r.To)
			continue
		}
		if r.To != r.To.Masked() {
			p.bad("host %q: route to %v: the prefix is %v", h.Name, r.To, r.To.Masked())
		}
		for _, l := range h.Links {
			if seg := p.segments[l.Switch]; seg != nil && seg.subnet.Overlaps(r.To) {
				p.bad("host %q: route to %v: it overlaps subnet %v of switch %q", h.Name, r.To, seg.subnet, l.Switch)
			}
		}
		for _, other := range h.Routes[:i] {
			if other.To.IsValid() && other.To.Overlaps(r.To) {
				p.bad("host %q: route to %v: it overlaps the route to %v", h.Name, r.To, other.To)
			}
		}
		if r.Via.IsValid() {
			if err := p.via(h, r.Via); err != nil {
				p.bad("host %q: route to %v: via %v: %w", h.Name, r.To, r.Via, err)
			}
		}
	}
}

// via says why a host cannot send by way of an address.
func (p *planner) via(h *HostSpec, a netip.Addr) error {
	for _, l := range h.Links {
		seg := p.segments[l.Switch]
		if seg == nil || !seg.subnet.Contains(a) {
			continue
		}
		switch seg.owner[a] {
		case "":
			return fmt.Errorf("nobody on switch %q has that address", l.Switch)
		case hostName(h):
			return errors.New("that is the host's own address; leave Via out for a local route")
		}
		return nil
	}
	return errors.New("it is on no switch that the host is linked to")
}

// segment hands out the addresses of one switch.
type segment struct {
	subnet netip.Prefix
	owner  map[netip.Addr]string
	last   netip.Addr
	ports  int
}

func (s *segment) take(a netip.Addr, who string) error {
	switch {
	case !s.subnet.Contains(a):
		return fmt.Errorf("address %v is outside the switch's subnet %v", a, s.subnet)
	case a == s.subnet.Addr() || a == broadcast(s.subnet):
		return fmt.Errorf("address %v is the network or broadcast address of %v", a, s.subnet)
	case s.owner[a] != "":
		return fmt.Errorf("address %v is already that of %s", a, s.owner[a])
	}
	s.owner[a] = who
	return nil
}

func (s *segment) next(who string) (netip.Addr, error) {
	a := s.last
	if !a.IsValid() {
		a = s.subnet.Addr()
	}
	for a = a.Next(); s.owner[a] != ""; a = a.Next() {
	}
	if !s.subnet.Contains(a) || a == broadcast(s.subnet) {
		return a, fmt.Errorf("too many hosts for subnet %v, which has %d addresses", s.subnet, 1<<(32-s.subnet.Bits())-2)
	}
	s.last = a
	s.owner[a] = who
	return a, nil
}

func broadcast(p netip.Prefix) netip.Addr {
	b := p.Masked().Addr().As4()
	n := binary.BigEndian.Uint32(b[:]) | 1<<(32-p.Bits()) - 1
	binary.BigEndian.PutUint32(b[:], n)
	return netip.AddrFrom4(b)
}

// mac derives a locally administered unicast MAC from an address, so that
// neighbours can be written down before any interface exists.
func mac(a netip.Addr) net.HardwareAddr {
	b := a.As4()
	return net.HardwareAddr{0x02, 0x00, b[0], b[1], b[2], b[3]}
}
