package scenarios

import (
	"context"
	"encoding/binary"
	"errors"
	"fmt"
	"io"
	"net/netip"
	"os"
	"strconv"
	"strings"

	"golang.org/x/sync/errgroup"

	"connlab/netlab"
	"connlab/netlab/l4lb"
	"connlab/netlab/wire"
)

// The addresses of incident 2. A host number is where a VIP and its instance
// stand in their prefixes: 10.8.1.2 is the VIP of the instance 10.9.1.2.
var (
	collisionLAN = netip.MustParsePrefix("10.0.0.0/16")
	backendLAN   = netip.MustParsePrefix("10.2.0.0/16") // the proxies' way to the instances
	outsideLAN   = netip.MustParsePrefix("10.1.0.0/16") // where the detectors stand if the kernel does the NAT
	vipPrefix    = netip.MustParsePrefix("10.8.0.0/16")
	redisPrefix  = netip.MustParsePrefix("10.9.0.0/16")

	balancerAddr = netip.MustParseAddr("10.0.0.2")
	redisAddr    = netip.MustParseAddr("10.0.0.3")
	backendAddr  = netip.MustParseAddr("10.2.0.1") // the instances', there
	firstProxy   = netip.MustParseAddr("10.0.2.1")
	outsideAddr  = netip.MustParseAddr("10.1.0.1")
)

// proxyHosts is how many hosts the proxies' addresses are spread over, at most: to
// the kernel's connections an address is a proxy, whoever else is on the host.
const proxyHosts = 15

// nth is the address with the host number n in a prefix.
func nth(p netip.Prefix, n int) netip.Addr {
	b := p.Addr().As4()
	binary.BigEndian.PutUint32(b[:], binary.BigEndian.Uint32(b[:])+uint32(n))
	return netip.AddrFrom4(b)
}

// vip and instance are the addresses of instance i, counted from 0.
func vip(i int) netip.Addr      { return nth(vipPrefix, i+1) }
func instance(i int) netip.Addr { return nth(redisPrefix, i+1) }

// hostNumber is where a VIP or an instance stands in its prefix.
func hostNumber(a netip.Addr) int {
	b := a.As4()
	return int(binary.BigEndian.Uint16(b[2:]))
}

// proxyAddr is the address of proxy number g.
func proxyAddr(g int) netip.AddrPort {
	return netip.AddrPortFrom(nth(netip.PrefixFrom(firstProxy, 16), g), redisPort)
}

// collisionNet is what stands between the hosts: packet stages in user space.
type collisionNet struct {
	balancer *l4lb.Balancer // nil unless there is a layer-4 balancer in user space
	returns  []*l4lb.Return // one for each proxy host behind a transparent balancer
	wires    []*wire.Wire
}

const (
	lanName     = "lan"
	backendName = "backend"
	outsideName = "outside"
)

// Topology implements [Experiment]: detectors, whatever balances, the proxies and
// one host that is all Redis instances.
func (c *collision) Topology() netlab.Topology {
	c.net = &collisionNet{}
	t := netlab.Topology{Switches: []netlab.SwitchSpec{
		{Name: lanName, Subnet: collisionLAN}, {Name: backendName, Subnet: backendLAN},
	}}
	clientLAN, gateway := lanName, balancerAddr
	if c.Path == pathKernelNAT {
		// Replies must pass the NAT again, so the detectors stand behind it.
		t.Switches = append(t.Switches, netlab.SwitchSpec{Name: outsideName, Subnet: outsideLAN})
		clientLAN, gateway = outsideName, outsideAddr
	}
	if c.Path == pathL4 || c.Path == pathFullNAT {
		t.Devices = []netlab.DeviceSpec{c.balancerDevice()}
	}
	t.Hosts = c.clientHosts(clientLAN, gateway)
	t.Hosts = append(t.Hosts, netlab.HostSpec{
		Name: "redis",
		Links: []netlab.LinkSpec{
			{Switch: lanName, Addrs: []netip.Addr{redisAddr}}, // for who goes straight to the instances
			{Switch: backendName, Addrs: []netip.Addr{backendAddr}},
		},
		Routes: []netlab.RouteSpec{{To: redisPrefix}},
	})
	if c.Path != pathRedis {
		t.Hosts = append(t.Hosts, c.proxyHostSpecs()...)
	}
	switch c.Path {
	case pathL7, pathHAProxy:
		t.Hosts = append(t.Hosts, netlab.HostSpec{
			Name:   "balancer",
			Links:  []netlab.LinkSpec{{Switch: lanName, Addrs: []netip.Addr{balancerAddr}}},
			Routes: []netlab.RouteSpec{{To: vipPrefix}},
		})
	case pathKernelNAT:
		t.Hosts = append(t.Hosts, netlab.HostSpec{
			Name: "balancer",
			Links: []netlab.LinkSpec{
				{Switch: lanName, Addrs: []netip.Addr{balancerAddr}},
				{Switch: outsideName, Addrs: []netip.Addr{outsideAddr}},
			},
			Sysctls: map[string]string{"net.ipv4.ip_forward": "1"},
		})
	}
	return t
}

// clientHosts are the detectors, and the canary.
func (c *collision) clientHosts(lan string, gateway netip.Addr) []netlab.HostSpec {
	hosts := netlab.Clients(c.detectors(), "detector", lan, map[string]string{
		"net.ipv4.ip_local_port_range": fmt.Sprintf("%d %d", c.PortRange.low, c.PortRange.high),
	})
	hosts = append(hosts, netlab.HostSpec{Name: "canary", Links: []netlab.LinkSpec{{Switch: lan}}})
	for i := range hosts {
		switch c.Path {
		case pathProxies:
		case pathRedis:
			hosts[i].Routes = []netlab.RouteSpec{{To: redisPrefix, Via: redisAddr}}
		default:
			hosts[i].Routes = []netlab.RouteSpec{{To: vipPrefix, Via: gateway}}
		}
		if c.Pairs > 0 && i < c.detectors() {
			// What is captured on a TAP device has its checksums complete.
			w := &wire.Wire{}
			c.net.wires = append(c.net.wires, w)
			hosts[i].Links[0].Pump, hosts[i].Links[0].AlwaysPump = w.Pump, true
		}
	}
	return hosts
}

func (c *collision) balancerDevice() netlab.DeviceSpec {
	cfg := l4lb.Config{Services: map[netip.AddrPort]l4lb.Group{}}
	for i := range maxVIPs {
		cfg.Services[netip.AddrPortFrom(vip(i), redisPort)] = l4lb.Group{proxyAddr(c.group(vip(i)))}
	}
	if c.Path == pathFullNAT {
		cfg.Mode, cfg.Locals = l4lb.FullNAT, []netip.Addr{balancerAddr}
	}
	balancer, err := l4lb.New(cfg)
	if err != nil {
		panic(fmt.Sprintf("parameters that Check has passed make a balancer: %v", err))
	}
	w := &wire.Wire{Entering: []wire.Stage{balancer.Stage}}
	c.net.balancer = balancer
	c.net.wires = append(c.net.wires, w)
	return netlab.DeviceSpec{Name: "balancer", Switch: lanName, Addrs: []netip.Addr{balancerAddr}, Attach: w.Attach}
}

// proxyHostSpecs spreads the proxies' addresses over hosts. Behind a transparent
// balancer each host's link has the stages that a cloud's kernel module has.
func (c *collision) proxyHostSpecs() []netlab.HostSpec {
	hosts := make([]netlab.HostSpec, min(c.Proxies, proxyHosts))
	for i := range hosts {
		link := netlab.LinkSpec{Switch: lanName}
		for g := i; g < c.Proxies; g += len(hosts) {
			link.Addrs = append(link.Addrs, proxyAddr(g).Addr())
		}
		if c.Path == pathL4 {
			policy := l4lb.FirstVIP
			if c.Reply == replyLast {
				policy = l4lb.LastVIP
			}
			back := l4lb.NewReturn(policy, l4lb.KindTOAVIP)
			w := &wire.Wire{Leaving: []wire.Stage{back.Leaving}, Entering: []wire.Stage{back.Entering}}
			c.net.returns = append(c.net.returns, back)
			c.net.wires = append(c.net.wires, w)
			link.Pump, link.AlwaysPump = w.Pump, true
		}
		hosts[i] = netlab.HostSpec{
			Name:  fmt.Sprintf("proxy-%02d", i+1),
			Links: []netlab.LinkSpec{link, {Switch: backendName}},
			Sysctls: map[string]string{
				"net.ipv4.tcp_max_syn_backlog": strconv.Itoa(c.MaxSYNBacklog),
			},
			Routes: []netlab.RouteSpec{{To: redisPrefix, Via: backendAddr}},
		}
		if c.Path == pathKernelNAT {
			hosts[i].Routes = append(hosts[i].Routes, netlab.RouteSpec{To: outsideLAN, Via: balancerAddr})
		}
	}
	return hosts
}

// proxied are the hosts of the proxies.
func (c *collision) proxied(lab *netlab.Lab) []*netlab.Host {
	var hosts []*netlab.Host
	for _, h := range lab.Hosts() {
		if strings.HasPrefix(h.Name(), "proxy-") {
			hosts = append(hosts, h)
		}
	}
	return hosts
}

// probing are the hosts of the detectors.
func (c *collision) probing(lab *netlab.Lab) []*netlab.Host { return lab.Hosts()[:c.detectors()] }

// startPrograms starts the Redis instances, the proxies and what balances in
// user space above TCP. They end with the lab.
func (c *collision) startPrograms(ctx context.Context, lab *netlab.Lab, opt Options) (*target, error) {
	self, err := os.Executable()
	if err != nil {
		return nil, fmt.Errorf("finding this executable: %w", err)
	}
	t, err := opt.server.start(ctx, lab.Host("redis"), serverConfig{backlog: 4096, acceptsPerCycle: 1000}, opt.Log)
	if err != nil {
		return nil, err
	}
	var g errgroup.Group
	for _, h := range c.proxied(lab) {
		g.Go(func() error { return startProxy(ctx, h, self, c.proxyArgs(), opt.Log) })
	}
	switch c.Path {
	case pathL7:
		g.Go(func() error { return startProxy(ctx, lab.Host("balancer"), self, c.layer7Args(), opt.Log) })
	case pathHAProxy:
		g.Go(func() error { return c.startHAProxy(ctx, lab.Host("balancer"), opt.Log) })
	case pathKernelNAT:
		g.Go(func() error { return c.addKernelNAT(lab.Host("balancer")) })
	}
	if err := g.Wait(); err != nil {
		return nil, errors.Join(err, t.control.Close())
	}
	return t, nil
}

func startProxy(ctx context.Context, h *netlab.Host, self string, args []string, log io.Writer) error {
	_, err := h.Start(ctx, netlab.Program{
		Path: self, Args: append([]string{"proxy", "--addr", fmt.Sprintf("0.0.0.0:%d", redisPort)}, args...), Dir: "/",
		// Many proxies share two cores: a thread each is enough.
		Env:    []string{"GOMAXPROCS=1"},
		Ready:  func() error { return h.Listening(redisPort) },
		Stdout: log, Stderr: log,
	})
	return err
}

// proxyArgs is how the proxies learn which instance a connection is for.
func (c *collision) proxyArgs() []string {
	route := fmt.Sprintf("%v=%v:%d", vipPrefix, redisPrefix, redisPort)
	switch c.Path {
	case pathL7, pathHAProxy:
		return []string{"--learn", "header", "--route", route}
	case pathL4, pathFullNAT:
		return []string{"--learn", "option", "--route", route}
	}
	// Nobody tells them: every connection goes to the first instance.
	return []string{"--learn", "option", "--route", route, "--default", netip.AddrPortFrom(instance(0), redisPort).String()}
}

// layer7Args makes connlab's proxy a layer-7 balancer: the VIPs are its own
// addresses, and it says which one was meant in a PROXY protocol header.
func (c *collision) layer7Args() []string {
	proxies := make([]string, c.Proxies)
	for g := range proxies {
		proxies[g] = proxyAddr(g).String()
	}
	return []string{"--learn", "local", "--send-header", "--route", fmt.Sprintf("%v=%s", vipPrefix, strings.Join(proxies, ","))}
}

// startHAProxy runs the real thing with its configuration on standard input, so
// that a killed run leaves no file.
func (c *collision) startHAProxy(ctx context.Context, h *netlab.Host, log io.Writer) error {
	path, err := findHAProxy()
	if err != nil {
		return err
	}
	_, err = h.Start(ctx, netlab.Program{
		Path: path, Args: []string{"-db", "-f", "/dev/stdin"}, Dir: "/",
		Stdin:  strings.NewReader(c.haproxyConfig()),
		Ready:  func() error { return h.Listening(redisPort) },
		Stdout: log, Stderr: log,
	})
	return err
}

func findHAProxy() (string, error) {
	path, err := netlab.LookProgram("haproxy")
	if err != nil {
		return "", &netlab.NeedError{Need: netlab.NeedHAProxy, Err: errors.New("it is not installed; install it with: apt-get install haproxy")}
	}
	return path, nil
}

// haproxyConfig sends the VIPs of each group to their proxy, and the VIP along.
func (c *collision) haproxyConfig() string {
	var b strings.Builder
	fmt.Fprintf(&b, "global\n  maxconn 9000\ndefaults\n  mode tcp\n  timeout connect 5s\n  timeout client 60s\n  timeout server 60s\n")
	fmt.Fprintf(&b, "frontend vips\n  bind 0.0.0.0:%d backlog 4096\n", redisPort)
	const perLine = 50 // HAProxy takes 64 words a line; lines of one name add up
	for g := range c.Proxies {
		n := 0
		for i := range maxVIPs {
			if c.group(vip(i)) != g {
				continue
			}
			if n%perLine == 0 {
				fmt.Fprintf(&b, "\n  acl group%d dst", g)
			}
			fmt.Fprintf(&b, " %v", vip(i))
			n++
		}
	}
	b.WriteByte('\n')
	for g := range c.Proxies {
		fmt.Fprintf(&b, "  use_backend proxy%d if group%d\n", g, g)
	}
	for g := range c.Proxies {
		fmt.Fprintf(&b, "backend proxy%d\n  server s %v send-proxy-v2\n", g, proxyAddr(g))
	}
	return b.String()
}
