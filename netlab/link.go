package netlab

import (
	"context"
	"errors"
	"fmt"
	"net"
	"net/netip"
	"os"
	"time"

	"github.com/vishvananda/netlink"
	"golang.org/x/sys/unix"
)

// The three ways a link is made; [Host.LinkKind] reports which.
const (
	LinkVeth  = "veth"  // a bare veth pair: no latency
	LinkNetem = "netem" // a veth pair with a netem qdisc at both ends
	LinkPump  = "pump"  // two TAP devices with a pump in user space between them
)

func (lab *Lab) addLink(h *Host, index int, l *LinkSpec, addrs []netip.Addr) error {
	sw := lab.switches[l.Switch]
	kind, err := linkKind(l)
	if err != nil {
		return err
	}
	end := fmt.Sprintf("eth%d", index)
	port := sw.nextPort()
	if kind == LinkPump {
		err = lab.addPumped(h, end, sw, port, l, addrs[0])
	} else {
		err = sw.rt.addVeth(port, end, h.ns.fd, mac(addrs[0]))
	}
	if err != nil {
		return err
	}
	m := member{name: h.name, addrs: addrs, tap: kind == LinkPump, host: h}
	if m.port, err = sw.rt.index(port); err != nil {
		return err
	}
	if m.iface, err = h.rt.index(end); err != nil {
		return err
	}
	if kind == LinkNetem {
		for _, e := range []struct {
			rt    *rtnl
			index int
		}{{sw.rt, m.port}, {h.rt, m.iface}} {
			if err := e.rt.addNetem(e.index, l.Delay, l.Loss); err != nil {
				return fmt.Errorf("netem: %w", err)
			}
		}
	}
	// The switch's end first: then the host's end finds carrier as it comes up.
	if err := sw.rt.addPort(m.port, sw.bridge); err != nil {
		return err
	}
	for _, a := range addrs {
		if err := h.rt.addAddr(m.iface, netip.PrefixFrom(a, sw.spec.Subnet.Bits())); err != nil {
			return err
		}
	}
	if err := h.rt.setUp(m.iface); err != nil {
		return err
	}
	sw.ports = append(sw.ports, m)
	h.links = append(h.links, link{kind: kind, addrs: addrs})
	return nil
}

// nextPort is the name of the interface that the switch gets next.
func (sw *switchNode) nextPort() string { return fmt.Sprintf("p%d", len(sw.ports)+1) }

// linkKind chooses how a link is made.
func linkKind(l *LinkSpec) (string, error) {
	switch {
	case l.AlwaysPump:
		return LinkPump, nil
	case l.Delay == 0 && l.Loss == 0:
		return LinkVeth, nil
	case netemAvailable():
		return LinkNetem, nil
	case l.Pump != nil:
		return LinkPump, nil
	}
	return "", &NeedError{Need: NeedNetem, Err: fmt.Errorf("delay or loss on a link: %w; give the link a pump", ErrUnsupported)}
}

// addPumped makes the two TAP devices and starts the pump between them.
func (lab *Lab) addPumped(h *Host, end string, sw *switchNode, port string, l *LinkSpec, a netip.Addr) error {
	var hostEnd, switchEnd *os.File
	err := lab.thread.in(h.ns, func() (err error) {
		hostEnd, err = openTAP(end)
		return err
	})
	if err != nil {
		return err
	}
	err = lab.thread.in(sw.ns, func() (err error) {
		switchEnd, err = openTAP(port)
		return err
	})
	if err != nil {
		return errors.Join(err, hostEnd.Close())
	}
	if err := configureTAPs(h.rt, end, mac(a), sw.rt, port); err != nil {
		return errors.Join(err, hostEnd.Close(), switchEnd.Close())
	}
	stop, err := l.Pump(hostEnd, switchEnd, *l)
	if err != nil {
		return errors.Join(fmt.Errorf("pump: %w", err), hostEnd.Close(), switchEnd.Close())
	}
	lab.stops = append(lab.stops, func() error {
		return errors.Join(stop(), hostEnd.Close(), switchEnd.Close())
	})
	return nil
}

// tapQueue is how many frames a TAP device holds for its reader. It drops what is
// beyond, counted in the device's tx_dropped only; the default of 500
// (drivers/net/tun.c, TUN_READQ_SIZE) is less than one burst of SYNs that finds
// the pump off the processor.
const tapQueue = 10_000

func configureTAPs(host *rtnl, end string, hw net.HardwareAddr, sw *rtnl, port string) error {
	h, err := host.index(end)
	if err != nil {
		return err
	}
	s, err := sw.index(port)
	if err != nil {
		return err
	}
	return errors.Join(host.setMAC(h, hw), host.setQueue(h, tapQueue), sw.setQueue(s, tapQueue))
}

// openTAP makes a TAP device in the calling thread's namespace. The device
// lives as long as the descriptor (drivers/net/tun.c, tun_chr_close).
func openTAP(name string) (*os.File, error) {
	fd, err := unix.Open("/dev/net/tun", unix.O_RDWR|unix.O_CLOEXEC|unix.O_NONBLOCK, 0)
	if err != nil {
		return nil, &NeedError{Need: NeedTUN, Err: fmt.Errorf("opening /dev/net/tun: %w", err)}
	}
	req, err := unix.NewIfreq(name)
	if err != nil {
		return nil, errors.Join(err, unix.Close(fd))
	}
	req.SetUint16(unix.IFF_TAP | unix.IFF_NO_PI)
	if err := unix.IoctlIfreq(fd, unix.TUNSETIFF, req); err != nil {
		return nil, errors.Join(&NeedError{Need: NeedTUN, Err: fmt.Errorf("making TAP device %s: %w", name, err)}, unix.Close(fd))
	}
	return os.NewFile(uintptr(fd), name), nil
}

// introduce writes down every neighbour at every host, and every host's MAC at
// its port of the switch, as permanent entries: no packet ever waits for ARP,
// and permanent entries do not count against the neighbour table's limit
// (net/core/neighbour.c neigh_alloc, exempt_from_gc).
func (sw *switchNode) introduce() error {
	forward := make([]neighbour, 0, len(sw.ports))
	for _, m := range sw.ports {
		forward = append(forward, neighbour{iface: m.port, mac: mac(m.addrs[0])})
	}
	if err := sw.rt.addNeighbours(forward); err != nil {
		return err
	}
	for i, m := range sw.ports {
		if m.host == nil {
			continue // a device is told by its Port
		}
		others := make([]neighbour, 0, len(sw.ports))
		for j, o := range sw.ports {
			if i == j || o.host == m.host {
				continue
			}
			for _, a := range o.addrs {
				others = append(others, neighbour{iface: m.iface, addr: a, mac: mac(o.addrs[0])})
			}
		}
		if err := m.host.rt.addNeighbours(others); err != nil {
			return fmt.Errorf("host %s: %w", m.host.name, err)
		}
	}
	return nil
}

// readyTimeout bounds the wait for carrier, which takes microseconds to
// milliseconds; only a machine in deep trouble needs more.
const readyTimeout = 10 * time.Second

// awaitOperational returns when both ends of every link report operational
// state up: before that a packet is dropped without a trace.
func (sw *switchNode) awaitOperational(ctx context.Context) error {
	deadline := time.Now().Add(readyTimeout)
	for _, m := range sw.ports {
		if err := awaitEnd(ctx, sw.rt, m.port, m.tap, deadline); err != nil {
			return fmt.Errorf("link of %s, end at switch %s: %w", m.name, sw.spec.Name, err)
		}
		if m.host == nil {
			continue
		}
		if err := awaitEnd(ctx, m.host.rt, m.iface, m.tap, deadline); err != nil {
			return fmt.Errorf("link of %s, end at host %s: %w", m.name, m.name, err)
		}
	}
	return nil
}

func awaitEnd(ctx context.Context, rt *rtnl, index int, tap bool, deadline time.Time) error {
	for {
		state, err := rt.operState(index)
		if err != nil {
			return err
		}
		// A TAP device reports no operational state: it carries from the
		// moment it is up and its descriptor is open (drivers/net/tun.c).
		if state == netlink.OperUp || tap && state == netlink.OperUnknown {
			return nil
		}
		if time.Now().After(deadline) {
			return fmt.Errorf("not operational after %v; operational state is %v (RFC 2863)", readyTimeout, state)
		}
		select {
		case <-ctx.Done():
			return ctx.Err()
		case <-time.After(200 * time.Microsecond):
		}
	}
}
