package wire

import (
	"encoding/binary"
	"errors"
	"fmt"
	"net"
	"os"
	"slices"

	"connlab/netlab"
)

var _ netlab.Attach = new(Wire).Attach

// Attach runs a device on a switch with one arm: each frame that comes in and is
// addressed to the port's MAC goes past the Entering stages and out of the same
// port again, counted in BtoA, until stop is called. Leaving must be empty. After
// the stages the frame is routed by the IPv4 destination that it has then: the
// source MAC becomes the port's and the destination MAC that of the neighbour,
// and the time to live is one less (RFC 1812 section 5.3.1), as it is behind every
// router and behind LVS (net/netfilter/ipvs/ip_vs_xmit.c decrement_ttl): two hops
// that name each other then end a packet, and do not carry it round for ever.
// Nothing is answered: no ARP, which a lab does not need, and no ICMP.
//
// It makes the descriptor non-blocking and does not own it; stop is as that of
// [Wire.Pump].
func (w *Wire) Attach(port *os.File, at netlab.Port) (stop func() error, err error) {
	d, err := w.device(port, at)
	if err != nil {
		return nil, fmt.Errorf("port %s: %w", port.Name(), err)
	}
	return w.begin([]*os.File{port}, d)
}

// device is the one direction of a device.
func (w *Wire) device(port *os.File, at netlab.Port) (*direction, error) {
	if len(w.Leaving) > 0 {
		return nil, errors.New("a device has no leaving packets: its stages are the entering ones")
	}
	if longest := frameSize - 1 - ethernetSize; at.MTU < 1 || at.MTU > longest {
		return nil, fmt.Errorf("MTU of %d bytes: the longest has %d", at.MTU, longest)
	}
	fd, err := nonblocking(port)
	if err != nil {
		return nil, err
	}
	own, err := hardware(at.MAC)
	if err != nil {
		return nil, err
	}
	next := make(map[[4]byte][6]byte, len(at.Neighbour))
	for addr, mac := range at.Neighbour {
		if next[addr.As4()], err = hardware(mac); err != nil {
			return nil, fmt.Errorf("neighbour %v: %w", addr, err)
		}
	}
	stages := slices.Concat([]Stage{addressedTo(own)}, w.Entering, []Stage{route(own, next)})
	return &direction{from: fd, to: fd, mtu: at.MTU, stages: stages, counters: &w.ba}, nil
}

func hardware(mac net.HardwareAddr) (a [6]byte, err error) {
	if len(mac) != len(a) {
		return a, fmt.Errorf("hardware address %q is not of Ethernet", mac)
	}
	return [6]byte(mac), nil
}

// addressedTo ignores what the switch floods: frames for others and broadcasts.
func addressedTo(own [6]byte) Stage {
	return func(p *Packet) Verdict {
		if f := p.Frame(); len(f) < ethernetSize || [6]byte(f) != own {
			return ignored
		}
		return Forward
	}
}

// route sends a packet on to its next hop.
func route(own [6]byte, next map[[4]byte][6]byte) Stage {
	return func(p *Packet) Verdict {
		f := p.Frame()
		if len(f) < ethernetSize+ipv4Size || binary.BigEndian.Uint16(f[etherTypeAt:]) != etherTypeIPv4 {
			return unroutable
		}
		ip := f[ethernetSize:]
		mac, ok := next[[4]byte(ip[destinationAt:])]
		if !ok {
			return unroutable
		}
		if ip[ttlAt] <= 1 {
			return expired
		}
		const hop = 1 << 8 // the time to live is the upper half of its word
		adjust(ip[ipv4ChecksumAt:], put16(ip[ttlAt:], binary.BigEndian.Uint16(ip[ttlAt:])-hop))
		copy(f, mac[:])
		copy(f[len(mac):], own[:])
		return Forward
	}
}
