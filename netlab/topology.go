package netlab

import (
	"fmt"
	"net"
	"net/netip"
	"os"
	"time"
)

// Topology is a network as a value: nothing exists until [Up].
type Topology struct {
	Switches []SwitchSpec
	Hosts    []HostSpec
	Devices  []DeviceSpec
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
	// Routes are added when the links are operational.
	Routes []RouteSpec
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

// RouteSpec is one route of a host, beside those to the subnets of its switches,
// with which it must not overlap.
type RouteSpec struct {
	// To is the IPv4 prefix of the destinations.
	To netip.Prefix
	// Via is the address of a host or a device on a switch that the host is
	// linked to. The zero Via makes every address of To the host's own, as
	// `ip route add local PREFIX dev lo` does: a listener on the wildcard address
	// accepts on all of them, and each can be bound (net/ipv4/fib_frontend.c,
	// inet_addr_type; the kernel calls it AnyIP).
	Via netip.Addr
}

// DeviceSpec is something on a switch that is no kernel: a port whose other end
// is a function that reads and writes Ethernet frames, for example a balancer in
// user space. No ARP is needed to reach it and it gets none: every host knows
// its hardware address.
type DeviceSpec struct {
	Name string
	// Switch is the name of the switch.
	Switch string
	// Addrs are the device's addresses; with none given it gets the lowest
	// address of the switch's subnet that the hosts leave free.
	Addrs []netip.Addr
	// Attach runs the device.
	Attach Attach
}

// Attach runs a device: it takes one frame with each read of port and gives one
// to the switch with each write, until stop is called. The descriptor is
// non-blocking; Attach does not own it: stop returns only when it is no longer
// used. [Up] calls Attach when every link is operational, before it returns.
type Attach func(port *os.File, at Port) (stop func() error, err error)

// Port is what a device knows of its place. It is complete when Attach is
// called and nothing changes it afterwards, so any thread may read it.
type Port struct {
	// Addrs are the device's own addresses.
	Addrs []netip.Addr
	// MAC is the hardware address at which the others reach all of Addrs.
	MAC net.HardwareAddr
	// MTU is the longest IP packet that the switch carries, in bytes.
	MTU int
	// Neighbour holds every address of every other host and device on the
	// switch, with the hardware address that a frame for it must carry.
	Neighbour map[netip.Addr]net.HardwareAddr
}

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
