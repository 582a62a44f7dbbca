package netlab

import (
	"encoding/binary"
	"errors"
	"fmt"
	"maps"
	"math"
	"net"
	"net/netip"
	"os"
	"regexp"
	"slices"
	"time"
)

// Topology is a network as a value: nothing exists until [Up].
type Topology struct {
	Switches []SwitchSpec
	Hosts    []HostSpec
}

// SwitchSpec is one Ethernet segment: every host linked to it reaches every
// other directly.
type SwitchSpec struct {
	Name string
	// Subnet is the IPv4 prefix whose addresses the linked hosts get.
	Subnet netip.Prefix
}

// HostSpec is one host: a network namespace with its own addresses, sockets,
// counters and sysctls.
type HostSpec struct {
	Name  string
	Links []LinkSpec
	// Sysctls are set in the host's namespace before its links exist, and read
	// back. Keys are dotted names below net, for example "net.core.somaxconn".
	Sysctls map[string]string
}

// LinkSpec joins a host to a switch.
type LinkSpec struct {
	// Switch is the name of the switch.
	Switch string
	// Addrs are the host's addresses on this link; with none given it gets the
	// lowest free address of the switch's subnet.
	Addrs []netip.Addr
	// Delay is added to every packet in each direction; a round trip over one
	// delayed link takes twice as long.
	Delay time.Duration
	// Loss is the share of packets dropped in each direction, 0 to 1.
	Loss float64
	// Seed makes the pump's Loss repeatable. A netem link draws its own.
	Seed uint64
	// Pump carries the frames in user space when the link has Delay or Loss and
	// the kernel has no netem, or when AlwaysPump is set. netlab/wire has one.
	Pump Pump
	// AlwaysPump takes the pump even where netem exists.
	AlwaysPump bool
}

// Pump moves Ethernet frames between two TAP descriptors, one frame a read and
// a write, until stop is called. It owns neither descriptor: stop returns only
// when the pump no longer uses them.
type Pump func(a, b *os.File, link LinkSpec) (stop func() error, err error)

// maxPorts is how many ports a bridge takes: BR_MAX_PORTS is 1<<10 and port
// number 0 is not used (net/bridge/br_private.h, br_if.c find_portno).
const maxPorts = 1<<10 - 1

// nameRE keeps names printable in metric names (host/Group.Name) and errors.
var nameRE = regexp.MustCompile(`^[a-z0-9][a-z0-9-]{0,30}$`)

// Clients returns n hosts named prefix-001 … prefix-n, each with one link to
// the switch and the next free address.
func Clients(n int, prefix, sw string, sysctls map[string]string) []HostSpec {
	hosts := make([]HostSpec, n)
	for i := range hosts {
		hosts[i] = HostSpec{
			Name:    fmt.Sprintf("%s-%03d", prefix, i+1),
			Links:   []LinkSpec{{Switch: sw}},
			Sysctls: sysctls,
		}
	}
	return hosts
}

// Check reports everything that is wrong with t, joined into one error, without
// creating anything and without privilege.
func (t Topology) Check() error {
	_, err := t.plan()
	return err
}

// plan is a checked topology: every address known.
type plan struct {
	addrs map[*LinkSpec][]netip.Addr
}

func (t Topology) plan() (plan, error) {
	var errs []error
	bad := func(format string, args ...any) { errs = append(errs, fmt.Errorf(format, args...)) }

	names := map[string]string{}
	claim := func(name, what string) {
		if !nameRE.MatchString(name) {
			bad("%s %q: a name is 1 to 31 lower-case letters, digits and dashes", what, name)
		}
		if other, taken := names[name]; taken {
			bad("%s %q: the name is already that of a %s", what, name, other)
		}
		names[name] = what
	}

	switches := map[string]*segment{}
	for i, s := range t.Switches {
		claim(s.Name, "switch")
		switches[s.Name] = nil // known, so that its links are not called unknown
		switch {
		case !s.Subnet.IsValid() || !s.Subnet.Addr().Is4():
			bad("switch %q: subnet %v is not an IPv4 prefix", s.Name, s.Subnet)
			continue
		case s.Subnet.Bits() > 30:
			bad("switch %q: subnet %v has no room for two hosts; use /30 or wider", s.Name, s.Subnet)
			continue
		}
		for _, other := range t.Switches[:i] {
			if other.Subnet.Overlaps(s.Subnet) {
				bad("switch %q: subnet %v overlaps %v of switch %q", s.Name, s.Subnet, other.Subnet, other.Name)
			}
		}
		switches[s.Name] = &segment{subnet: s.Subnet.Masked(), owner: map[netip.Addr]string{}}
	}
	if len(t.Hosts) == 0 {
		bad("the topology has no hosts")
	}

	p := plan{addrs: map[*LinkSpec][]netip.Addr{}}
	for i := range t.Hosts {
		h := &t.Hosts[i]
		claim(h.Name, "host")
		for _, key := range slices.Sorted(maps.Keys(h.Sysctls)) {
			if err := checkSysctl(key, h.Sysctls[key]); err != nil {
				bad("host %q: %w", h.Name, err)
			}
		}
		for j := range h.Links {
			l := &h.Links[j]
			seg, known := switches[l.Switch]
			if !known {
				bad("host %q: link to unknown switch %q", h.Name, l.Switch)
			}
			if seg == nil {
				continue
			}
			if seg.ports++; seg.ports == maxPorts+1 {
				bad("switch %q: a bridge takes at most %d links", l.Switch, maxPorts)
			}
			if l.Delay < 0 {
				bad("host %q: link to %q: delay %v is negative", h.Name, l.Switch, l.Delay)
			}
			if math.IsNaN(l.Loss) || l.Loss < 0 || l.Loss > 1 {
				bad("host %q: link to %q: loss %v is not a share between 0 and 1", h.Name, l.Switch, l.Loss)
			}
			if l.AlwaysPump && l.Pump == nil {
				bad("host %q: link to %q: AlwaysPump without a Pump", h.Name, l.Switch)
			}
			for _, a := range l.Addrs {
				if err := seg.take(a, h.Name); err != nil {
					bad("host %q: %w", h.Name, err)
				}
			}
			p.addrs[l] = l.Addrs
		}
	}
	// Addresses that were asked for by name are taken first, so that counting
	// up never collides with one that comes later in the list.
	for i := range t.Hosts {
		h := &t.Hosts[i]
		for j := range h.Links {
			l := &h.Links[j]
			seg := switches[l.Switch]
			if seg == nil || len(l.Addrs) > 0 {
				continue
			}
			a, err := seg.next(h.Name)
			if err != nil {
				bad("host %q: switch %q: %w", h.Name, l.Switch, err)
				return p, errors.Join(errs...) // each further host would say the same
			}
			p.addrs[l] = []netip.Addr{a}
		}
	}
	return p, errors.Join(errs...)
}

// segment hands out the addresses of one switch.
type segment struct {
	subnet netip.Prefix
	owner  map[netip.Addr]string
	last   netip.Addr
	ports  int
}

func (s *segment) take(a netip.Addr, host string) error {
	switch {
	case !s.subnet.Contains(a):
		return fmt.Errorf("address %v is outside the switch's subnet %v", a, s.subnet)
	case a == s.subnet.Addr() || a == broadcast(s.subnet):
		return fmt.Errorf("address %v is the network or broadcast address of %v", a, s.subnet)
	case s.owner[a] != "":
		return fmt.Errorf("address %v is already that of host %q", a, s.owner[a])
	}
	s.owner[a] = host
	return nil
}

func (s *segment) next(host string) (netip.Addr, error) {
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
	s.owner[a] = host
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
