package netlab

import (
	"fmt"
	"net"
	"net/netip"
	"os"
)

// devicePort is the place of a device on its switch.
type devicePort struct {
	spec  *DeviceSpec
	sw    *switchNode
	addrs []netip.Addr
	file  *os.File
}

// etherMTU is what Ethernet devices begin with (net/ethernet/eth.c, ether_setup).
const etherMTU = 1500

// addDevice makes the port: a TAP device of the switch, in the same way as the
// switch's end of a pumped link. Frames for it wait in its queue until attach.
func (lab *Lab) addDevice(spec *DeviceSpec, addrs []netip.Addr) (*devicePort, error) {
	sw := lab.switches[spec.Switch]
	d := &devicePort{spec: spec, sw: sw, addrs: addrs}
	name := sw.nextPort()
	err := lab.thread.in(sw.ns, func() (err error) {
		d.file, err = openTAP(name)
		return err
	})
	if err != nil {
		return nil, err
	}
	lab.stops = append(lab.stops, d.file.Close)
	m := member{name: spec.Name, addrs: addrs, tap: true}
	if m.port, err = sw.rt.index(name); err != nil {
		return nil, err
	}
	if err := sw.rt.setQueue(m.port, tapQueue); err != nil {
		return nil, err
	}
	if err := sw.rt.addPort(m.port, sw.bridge); err != nil {
		return nil, err
	}
	sw.ports = append(sw.ports, m)
	return d, nil
}

// attach starts the device. Its stop comes before the end of its port.
func (lab *Lab) attach(d *devicePort) error {
	at := Port{Addrs: d.addrs, MAC: mac(d.addrs[0]), MTU: etherMTU, Neighbour: map[netip.Addr]net.HardwareAddr{}}
	for _, m := range d.sw.ports {
		if m.name == d.spec.Name {
			continue
		}
		for _, a := range m.addrs {
			at.Neighbour[a] = mac(m.addrs[0])
		}
	}
	stop, err := d.spec.Attach(d.file, at)
	if err != nil {
		return fmt.Errorf("attach: %w", err)
	}
	lab.stops = append(lab.stops, func() error {
		if err := stop(); err != nil {
			return fmt.Errorf("device %s: %w", d.spec.Name, err)
		}
		return nil
	})
	return nil
}
