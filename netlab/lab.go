package netlab

import (
	"context"
	"errors"
	"fmt"
	"io/fs"
	"net/netip"
	"os"
	"slices"
	"sync"

	"golang.org/x/sys/unix"
)

// Lab is a topology that stands. Its hosts are used from any goroutine; Down
// removes everything.
type Lab struct {
	thread   *nsThread
	hosts    map[string]*Host
	order    []*Host
	switches map[string]*switchNode
	down     sync.Once
	downErr  error

	mu    sync.Mutex
	procs map[*Process]struct{}
	// stops end what runs in user space behind TAP devices and closes them.
	stops []func() error
}

// switchNode is a bridge in its own namespace.
type switchNode struct {
	spec   SwitchSpec
	ns     *namespace
	rt     *rtnl
	bridge int
	ports  []member
}

// member is one link or device as its switch sees it.
type member struct {
	name  string // of the host or device
	addrs []netip.Addr
	tap   bool  // the interfaces are TAP devices
	port  int   // interface index in the switch's namespace
	host  *Host // nil for a device, which has no other end
	iface int   // interface index in the host's namespace
}

// quietSysctls silence what would otherwise talk by itself in every namespace:
// IPv6 address detection and multicast reports. A kernel without IPv6 has none.
func quietSysctls() map[string]string {
	if _, err := os.Stat("/proc/sys/net/ipv6/conf"); errors.Is(err, fs.ErrNotExist) {
		return nil
	}
	return defaultSysctls
}

var defaultSysctls = map[string]string{
	"net.ipv6.conf.all.disable_ipv6":     "1",
	"net.ipv6.conf.default.disable_ipv6": "1",
}

// Up checks t, builds it and returns when every link is operational at both
// ends, every host knows its neighbours and has its routes, and every device is
// attached. It needs CAP_NET_ADMIN and CAP_SYS_ADMIN; without them, or where the
// kernel lacks something, the error is a [*NeedError]. After an error nothing is
// left.
func Up(ctx context.Context, t Topology) (*Lab, error) {
	p, err := t.plan()
	if err != nil {
		return nil, fmt.Errorf("topology: %w", err)
	}
	if err := CheckPrivilege(); err != nil {
		return nil, err
	}
	thread, err := startThread()
	if err != nil {
		return nil, err
	}
	lab := &Lab{
		thread:   thread,
		hosts:    map[string]*Host{},
		switches: map[string]*switchNode{},
		procs:    map[*Process]struct{}{},
	}
	if err := lab.build(ctx, t, p); err != nil {
		return nil, errors.Join(err, lab.Down())
	}
	return lab, nil
}

func (lab *Lab) build(ctx context.Context, t Topology, p plan) error {
	for _, spec := range t.Switches {
		if err := lab.addSwitch(spec); err != nil {
			return fmt.Errorf("switch %s: %w", spec.Name, err)
		}
	}
	for i := range t.Hosts {
		if err := ctx.Err(); err != nil {
			return err
		}
		if err := lab.addHost(&t.Hosts[i], p); err != nil {
			return fmt.Errorf("host %s: %w", t.Hosts[i].Name, err)
		}
	}
	devices := make([]*devicePort, len(t.Devices))
	for i := range t.Devices {
		d := &t.Devices[i]
		var err error
		if devices[i], err = lab.addDevice(d, p.deviceAddrs[d]); err != nil {
			return fmt.Errorf("device %s: %w", d.Name, err)
		}
	}
	for _, sw := range lab.switches {
		if err := sw.introduce(); err != nil {
			return fmt.Errorf("switch %s: neighbours: %w", sw.spec.Name, err)
		}
	}
	for _, sw := range lab.switches {
		if err := sw.awaitOperational(ctx); err != nil {
			return fmt.Errorf("switch %s: %w", sw.spec.Name, err)
		}
	}
	for _, h := range t.Hosts {
		for _, r := range h.Routes {
			if err := lab.hosts[h.Name].rt.addRoute(r.To, r.Via); err != nil {
				return fmt.Errorf("host %s: %w", h.Name, err)
			}
		}
	}
	for _, d := range devices {
		if err := lab.attach(d); err != nil {
			return fmt.Errorf("device %s: %w", d.spec.Name, err)
		}
	}
	return nil
}

func (lab *Lab) addSwitch(spec SwitchSpec) error {
	ns, err := lab.thread.newNamespace(spec.Name)
	if err != nil {
		return err
	}
	sw := &switchNode{spec: spec, ns: ns}
	lab.switches[spec.Name] = sw
	return lab.thread.in(ns, func() error {
		if err := setSysctls(quietSysctls()); err != nil {
			return err
		}
		if sw.rt, err = openRtnl(); err != nil {
			return err
		}
		sw.bridge, err = sw.rt.addBridge("br0")
		return err
	})
}

func (lab *Lab) addHost(spec *HostSpec, p plan) error {
	ns, err := lab.thread.newNamespace(spec.Name)
	if err != nil {
		return err
	}
	h := &Host{lab: lab, ns: ns, name: spec.Name}
	lab.hosts[spec.Name] = h
	lab.order = append(lab.order, h)
	err = lab.thread.in(ns, func() error {
		if err := setSysctls(quietSysctls()); err != nil {
			return err
		}
		if err := setSysctls(spec.Sysctls); err != nil {
			return err
		}
		if h.rt, err = openRtnl(); err != nil {
			return err
		}
		return h.rt.setUp(loopback)
	})
	if err != nil {
		return err
	}
	for i := range spec.Links {
		l := &spec.Links[i]
		if err := lab.addLink(h, i, l, p.addrs[l]); err != nil {
			return fmt.Errorf("link to %s: %w", l.Switch, err)
		}
	}
	return nil
}

// Host returns the host of that name, or nil.
func (lab *Lab) Host(name string) *Host { return lab.hosts[name] }

// Hosts returns every host in the order of the topology.
func (lab *Lab) Hosts() []*Host { return lab.order }

// Down ends the programs, then removes links and namespaces. It is safe to call
// more than once and returns the same error each time.
func (lab *Lab) Down() error {
	lab.down.Do(func() { lab.downErr = lab.tearDown() })
	return lab.downErr
}

func (lab *Lab) tearDown() error {
	var errs []error
	lab.mu.Lock()
	procs := make([]*Process, 0, len(lab.procs))
	for p := range lab.procs {
		procs = append(procs, p)
	}
	lab.mu.Unlock()
	for _, p := range procs {
		p.kill()
	}
	for _, p := range procs {
		<-p.done
	}
	// Backwards: a device is stopped before its port is closed.
	for _, stop := range slices.Backward(lab.stops) {
		errs = append(errs, stop())
	}
	// Closing the last descriptor of a namespace hands it to the kernel's
	// cleanup worker, which removes veths, addresses and TIME_WAIT sockets
	// (net/core/net_namespace.c cleanup_net).
	for _, h := range lab.order {
		errs = append(errs, h.close())
	}
	for _, sw := range lab.switches {
		if sw.rt != nil {
			sw.rt.close()
		}
		errs = append(errs, sw.ns.close())
	}
	lab.thread.stop()
	return errors.Join(errs...)
}

func (h *Host) close() error {
	if h.rt != nil {
		h.rt.close()
	}
	return h.ns.close()
}

// Kernel returns the running kernel's release, as uname -r prints it.
func Kernel() string {
	var u unix.Utsname
	if unix.Uname(&u) != nil {
		return "unknown"
	}
	return unix.ByteSliceToString(u.Release[:])
}
