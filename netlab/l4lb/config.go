package l4lb

import (
	"errors"
	"fmt"
	"net/netip"
	"slices"
)

// Mode is what the balancer does to a connection's source.
type Mode int

const (
	// Transparent keeps the client's address and port; replies go past the balancer.
	Transparent Mode = iota
	// FullNAT replaces them by an address and port of the balancer, which replies
	// come back to.
	FullNAT
)

// Group is the proxies among which a VIP's connections are spread.
type Group []netip.AddrPort

// Config describes a balancer. Addresses are IPv4.
type Config struct {
	// Services are the groups by VIP and port.
	Services map[netip.AddrPort]Group
	// OptionKind is the option in which the VIP travels; 0 is [KindTOAVIP]. Kinds
	// that mean something to Linux are refused.
	OptionKind byte
	// Mode is Transparent unless set.
	Mode Mode
	// Locals are the balancer's own source addresses, for FullNAT.
	Locals []netip.Addr
	// Ports is the first and the last port that FullNAT takes of each local address;
	// zero is 1024 to 65535.
	Ports [2]uint16
}

// linuxKinds are the options that Linux reads (include/net/tcp.h, TCPOPT_*;
// net/mptcp/protocol.h) and the obsolete ones below 8 of RFC 1072. 254, which it
// reads as well, is left to experiments (RFC 6994), and used for TOA: Linux takes
// note only if the first two bytes are fastOpenMagic.
var linuxKinds = []byte{0, 1, 2, 3, 4, 5, 6, 7, 8, 19, 29, 30, 34}

// fastOpenMagic marks a fast open cookie in option 254 (include/net/tcp.h,
// TCPOPT_FASTOPEN_MAGIC). A VIP's port stands in the same place.
const (
	experimentalKind = 254
	fastOpenMagic    = 0xf989
)

func (cfg Config) check() error {
	if cfg.Mode != Transparent && cfg.Mode != FullNAT {
		return fmt.Errorf("unknown mode %d", cfg.Mode)
	}
	if slices.Contains(linuxKinds, cfg.OptionKind) {
		return fmt.Errorf("option kind %d has a meaning of its own to Linux", cfg.OptionKind)
	}
	if len(cfg.Services) == 0 {
		return errors.New("no service: nothing to balance")
	}
	for vip, group := range cfg.Services {
		if err := cfg.checkService(vip, group); err != nil {
			return fmt.Errorf("service %v: %w", vip, err)
		}
	}
	if cfg.Mode == FullNAT {
		return cfg.checkLocals()
	}
	if len(cfg.Locals) > 0 {
		return errors.New("local addresses are for full NAT: a transparent balancer keeps the client's")
	}
	return nil
}

func (cfg Config) checkService(vip netip.AddrPort, group Group) error {
	if err := checkEndpoint(vip); err != nil {
		return err
	}
	if cfg.OptionKind == experimentalKind && vip.Port() == fastOpenMagic {
		return fmt.Errorf("option kind %d with port %d is a fast open cookie to Linux", experimentalKind, fastOpenMagic)
	}
	if len(group) == 0 {
		return errors.New("its group has no proxy")
	}
	for i, proxy := range group {
		if err := checkEndpoint(proxy); err != nil {
			return fmt.Errorf("proxy %v: %w", proxy, err)
		}
		if _, loop := cfg.Services[proxy]; loop {
			return fmt.Errorf("proxy %v is a service of this balancer", proxy)
		}
		if slices.Contains(group[:i], proxy) {
			return fmt.Errorf("proxy %v twice", proxy)
		}
	}
	return nil
}

func (cfg Config) checkLocals() error {
	if len(cfg.Locals) == 0 {
		return errors.New("full NAT needs a local address")
	}
	if cfg.Ports[0] == 0 || cfg.Ports[0] > cfg.Ports[1] {
		return fmt.Errorf("ports %d to %d are no range", cfg.Ports[0], cfg.Ports[1])
	}
	for i, local := range cfg.Locals {
		if !local.Is4() || local.IsUnspecified() {
			return fmt.Errorf("local address %v is not IPv4", local)
		}
		if slices.Contains(cfg.Locals[:i], local) {
			return fmt.Errorf("local address %v twice", local)
		}
		for vip, group := range cfg.Services {
			if vip.Addr() == local {
				return fmt.Errorf("local address %v is a VIP", local)
			}
			if slices.ContainsFunc(group, func(p netip.AddrPort) bool { return p.Addr() == local }) {
				return fmt.Errorf("local address %v is a proxy's", local)
			}
		}
	}
	return nil
}

func checkEndpoint(a netip.AddrPort) error {
	switch {
	case !a.Addr().Is4() || a.Addr().IsUnspecified():
		return errors.New("the address is not IPv4")
	case a.Port() == 0:
		return errors.New("no port")
	}
	return nil
}
