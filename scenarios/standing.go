package scenarios

import (
	"context"
	"errors"
	"flag"
	"fmt"
	"strings"

	"connlab/netlab"
)

// Standing is the network of incident 2 without its load: a client, a balancer,
// proxies and Redis instances, to try things by hand. NewStanding makes one.
type Standing struct{ c *collision }

// NewStanding returns the network at the scenario's defaults.
func NewStanding() *Standing {
	c := newCollision()
	c.Rounds = 1 // one client
	return &Standing{c: c}
}

// Flags registers the parameters of the network, a part of the scenario's.
func (s *Standing) Flags(fs *flag.FlagSet) {
	all := flags(s.c)
	for _, name := range []string{"vips", "proxies", "path", "reply", "port-range", "max-syn-backlog"} {
		f := all.Lookup(name)
		switch name {
		case "path":
			f.Usage = "`balancer`: " + strings.Join(balancedPaths, ", ")
		case "reply":
			f.Usage = "which `vip` the replies of a shared tuple come from, with --path l4: first or last"
		}
		fs.Var(f.Value, f.Name, f.Usage)
	}
}

// balancedPaths are the paths with a balancer in them.
var balancedPaths = []string{pathL4, pathFullNAT, pathKernelNAT, pathL7, pathHAProxy}

// check checks what is the network's. Which load it could bear does not matter.
func (s *Standing) check() error {
	var found checks
	found.within("vips", float64(s.c.VIPs), 1, maxVIPs)
	found.within("proxies", float64(s.c.Proxies), 1, maxProxies)
	found.within("max-syn-backlog", float64(s.c.MaxSYNBacklog), 1, 1e6)
	found.among("path", s.c.Path, balancedPaths...)
	found.among("reply", s.c.Reply, replyFirst, replyLast)
	if s.c.Reply != replyFirst && s.c.Path != pathL4 {
		found.bad("reply=%s is for path=%s, where tuples are shared: not with path=%s", s.c.Reply, pathL4, s.c.Path)
	}
	return found.err()
}

// Use builds the network, starts its programs and calls use with the client's
// host; when that returns everything is taken down. Errors are those of [Run].
func (s *Standing) Use(ctx context.Context, opt Options, use func(client *netlab.Host) error) (err error) {
	if err := s.check(); err != nil {
		return usagef("%s", strings.ReplaceAll(err.Error(), "\n", "; "))
	}
	if opt.server, err = findServer(opt.Server); err != nil {
		return err
	}
	if err := netlab.CheckPrivilege(); err != nil {
		return err
	}
	topology := s.c.Topology()
	opt.progress("starting %d hosts", len(topology.Hosts))
	lab, err := netlab.Up(ctx, topology)
	if err != nil {
		return err
	}
	defer func() { err = errors.Join(err, lab.Down()) }()
	opt.progress("starting the instances and the proxies")
	t, err := s.c.startPrograms(ctx, lab, opt)
	if err != nil {
		return err
	}
	defer t.control.Close()
	return use(s.c.probing(lab)[0])
}

// Describe says which addresses there are, a line each.
func (s *Standing) Describe() []string {
	first, last := s.c.target(0), s.c.target(s.c.VIPs-1)
	return []string{
		fmt.Sprintf("%d instances behind %s: %v to %v (%v+%d)", s.c.VIPs, s.wayIn(), first, last, first.Addr(), s.c.VIPs),
		fmt.Sprintf("%d proxies: %v to %v; VIP 10.8.x.y is served by number (256·x + y) mod %d",
			s.c.Proxies, proxyAddr(0), proxyAddr(s.c.Proxies-1), s.c.Proxies),
		fmt.Sprintf("the VIP 10.8.x.y is the instance 10.9.x.y: one Redis with all of these addresses, at %v", redisAddr),
	}
}

func (s *Standing) wayIn() string {
	switch s.c.Path {
	case pathL4:
		return fmt.Sprintf("a transparent layer-4 balancer (%v), replies of a shared tuple from the %s VIP", balancerAddr, s.c.Reply)
	case pathFullNAT:
		return fmt.Sprintf("a full-NAT layer-4 balancer (%v)", balancerAddr)
	case pathKernelNAT:
		return fmt.Sprintf("the kernel's NAT (%v)", outsideAddr)
	case pathL7:
		return fmt.Sprintf("a layer-7 balancer (%v)", balancerAddr)
	}
	return fmt.Sprintf("HAProxy in TCP mode (%v)", balancerAddr)
}

// Report says what the balancer saw, a line each: what it counted, and every tuple
// that two VIPs shared.
func (s *Standing) Report() []string {
	var lines []string
	if b := s.c.net.balancer; b != nil {
		st := b.Stats()
		lines = append(lines, fmt.Sprintf("the balancer saw packets: %d, SYNs: %d, options added: %d", st.Packets, st.SYNs, st.OptionsAdded))
	}
	if s.c.net.returns == nil {
		return lines
	}
	hits := collisionsOf(s.c.net.returns)
	lines = append(lines, fmt.Sprintf("%d local ports were shared by two VIPs of one proxy at once", len(hits)))
	const shown = 20
	for _, hit := range hits[:min(shown, len(hits))] {
		lines = append(lines, fmt.Sprintf("  %v: open to %v, SYNs to %v: %d; both at proxy %v", hit.Client, hit.First, hit.Second, hit.SYNs, hit.Proxy))
	}
	if more := len(hits) - shown; more > 0 {
		lines = append(lines, fmt.Sprintf("  … and %d more", more))
	}
	return lines
}
