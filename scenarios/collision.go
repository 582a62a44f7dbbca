package scenarios

import (
	"errors"
	"flag"
	"fmt"
	"math"
	"net/netip"
	"os"
	"slices"
	"strconv"
	"strings"
	"time"

	"golang.org/x/sys/unix"

	"connlab/results"
)

// TupleCollision is incident 2: one detector that PINGs a thousand Redis
// instances through a transparent layer-4 balancer, and in almost every round one
// or two of them cannot be reached.
var TupleCollision = Scenario{
	Name:  "tuple-collision",
	Title: "A transparent layer-4 balancer makes two connections one",
	Story: collisionStory,
	New:   func() Experiment { return newCollision() },
	Variants: []Variant{
		{Name: "incident", Role: results.Incident,
			Summary: "1,000 VIPs behind 15 proxies, everything at its default, each round from a client of its own: connects time out in nine rounds of ten"},
		{Name: "forced-first", Role: results.Incident, Set: []string{"pairs=100", "timeout=3500ms"},
			Summary: "the same local port for two VIPs of one proxy, by bind(): every second connection gets SYN, SYN, SYN and no answer"},
		{Name: "forced-last", Role: results.Incident, Set: []string{"pairs=100", "reply=last"},
			Summary: "the same, replies mapped to the last VIP: the second connects within milliseconds and the first is dead"},
		{Name: "scaling", Role: results.Incident, Set: []string{"sweep=100x16,200x16,500x24,1000x12,2000x6"},
			Summary: "how the collisions grow with the number of instances: with its square"},
		{Name: "slow", Role: results.Incident, Set: []string{"rate=95", "rounds=5", "parallel=5"},
			Summary: "fewer than 100 connections a second from each client: it is the number that is open that counts, not the rate"},
		{Name: "wider-range", Role: results.FalseLead, Set: []string{"port-range=1024-65535", "rounds=12"},
			Summary: "the remedy that comes to mind: more local ports; collisions are half as many, and stay"},
		{Name: "port-range-option", Role: results.FalseLead, Set: []string{"ports=range", "rounds=12"},
			Summary: "IP_LOCAL_PORT_RANGE takes every port instead of every second: half as many, and they stay"},
		{Name: "long-connections", Role: results.FalseLead, Set: []string{"long=true", "rounds=3", "parallel=5"},
			Summary: "what users were told: long connections collide while they are opened, and not again"},
		{Name: "small-groups", Role: results.Fix, Set: []string{"proxies=1000", "rounds=8"},
			Summary: "a proxy address for each instance: nobody shares one, nothing can collide"},
		{Name: "bind-first", Role: results.Fix, Set: []string{"ports=bind", "rounds=8"},
			Summary: "bind(addr, 0) before connect(): a port that nobody else on the host has"},
		{Name: "bind-first-exhausted", Role: results.FalseLead, Set: []string{"ports=bind", "port-range=32768-33267", "rounds=2", "parallel=2"},
			Summary: "the price of it: one range for the whole host; 500 ports are 500 connections, whatever their destination"},
		{Name: "layer-7", Role: results.Fix, Set: []string{"path=l7", "rounds=8", "rate=400"},
			Summary: "a layer-7 balancer connects from its own address: its kernel keeps the ports apart"},
		{Name: "haproxy", Role: results.Fix, Set: []string{"path=haproxy", "rounds=8", "rate=400"},
			Summary: "the same with a real one, HAProxy in TCP mode"},
		{Name: "full-nat", Role: results.Fix, Set: []string{"path=fullnat", "rounds=8"},
			Summary: "a layer-4 balancer that rewrites the source too, and keeps its ports apart"},
		{Name: "kernel-nat", Role: results.Fix, Set: []string{"path=kernel-nat", "rounds=8"},
			Summary: "the kernel's own NAT (not telling the proxies the VIP) hides the fault: connection tracking moves the second connection's port"},
		{Name: "proxies-directly", Role: results.Control, Set: []string{"path=proxies", "rounds=8"},
			Summary: "the healthy control: the same number of connections to the proxies themselves"},
		{Name: "instances-directly", Role: results.Control, Set: []string{"path=redis", "rounds=8"},
			Summary: "and to the Redis instances themselves: ports coincide and nobody minds"},
		{Name: "placebo", Role: results.Control, Set: []string{"max-syn-backlog=65536", "rounds=8"},
			Summary: "the placebo control: a longer SYN queue at the proxies; the numbers of the incident must come back"},
	},
}

// The ways from a detector to an instance.
const (
	pathL4        = "l4"         // transparent layer-4 balancer, proxies
	pathFullNAT   = "fullnat"    // layer-4 balancer that rewrites the source too, proxies
	pathKernelNAT = "kernel-nat" // nftables DNAT with connection tracking, proxies
	pathL7        = "l7"         // connlab's proxy as a layer-7 balancer, proxies
	pathHAProxy   = "haproxy"    // HAProxy in TCP mode, proxies
	pathProxies   = "proxies"    // straight to the proxies
	pathRedis     = "redis"      // straight to the instances
)

// Where a connection's local port comes from.
const (
	portsKernel = "kernel" // connect() picks
	portsBind   = "bind"   // bind(addr, 0) first
	portsRange  = "range"  // IP_LOCAL_PORT_RANGE
)

// Which VIP the replies of a shared tuple come from.
const (
	replyFirst = "first"
	replyLast  = "last"
)

// collision is the parameters of incident 2. It has three shapes of load: rounds
// of a detector; if Pairs is not 0, pairs of connections that are made to collide;
// and if Long is set, connections that stay open while requests go over them.
type collision struct {
	VIPs          int
	Proxies       int
	Rounds        int
	Parallel      int
	Sweep         sweep
	Path          string
	Reply         string
	Ports         string
	PortRange     portRange
	Rate          float64
	Timeout       time.Duration
	Retries       int
	Pairs         int
	Long          bool
	MaxSYNBacklog int

	net *collisionNet // as of the last Topology
}

func newCollision() *collision {
	return &collision{
		VIPs: 1000, Proxies: 15, Rounds: 20, Parallel: 4,
		Path: pathL4, Reply: replyFirst, Ports: portsKernel, PortRange: portRange{32768, 60999},
		Rate: 800, Timeout: 1500 * time.Millisecond, Retries: 3, MaxSYNBacklog: 4096,
	}
}

// Flags implements [Experiment].
func (c *collision) Flags(fs *flag.FlagSet) {
	fs.IntVar(&c.VIPs, "vips", c.VIPs, "n: `number` of Redis instances, each with a VIP of its own (1 to 2000)")
	fs.IntVar(&c.Proxies, "proxies", c.Proxies, "k: `number` of proxies (addresses), each serving n/k instances (1 to 1000)")
	fs.IntVar(&c.Rounds, "rounds", c.Rounds, "R: `number` of rounds, in each of which another client opens a connection to every instance (1 to 200)")
	fs.IntVar(&c.Parallel, "parallel", c.Parallel, "`number` of clients at work at the same time, each in a round of its own (1 to 8)")
	fs.Var(&c.Sweep, "sweep", "probe several numbers of instances one after the other, each for so many rounds: `NxR,NxR…`")
	fs.StringVar(&c.Path, "path", c.Path, "`way` to the instances: l4, fullnat, kernel-nat, l7, haproxy, proxies or redis")
	fs.StringVar(&c.Reply, "reply", c.Reply, "`which` VIP the replies of a shared tuple come from behind l4: first or last")
	fs.StringVar(&c.Ports, "ports", c.Ports, "`who` picks local ports: kernel (connect), bind (bind(addr, 0) first) or range (IP_LOCAL_PORT_RANGE)")
	fs.Var(&c.PortRange, "port-range", "net.ipv4.ip_local_port_range of the clients, as `LOW-HIGH`")
	fs.Float64Var(&c.Rate, "rate", c.Rate, "connections per second that each client opens (1 to 5000)")
	fs.DurationVar(&c.Timeout, "timeout", c.Timeout, "how long a client waits for a connection, and again for the reply (50ms to 60s)")
	fs.IntVar(&c.Retries, "retries", c.Retries, "how often it tries an instance again within a round (`number`, 0 to 10)")
	fs.IntVar(&c.Pairs, "pairs", c.Pairs, "instead of rounds: so many `pairs` of connections with one local port, to two VIPs of one proxy (0 to 400)")
	fs.BoolVar(&c.Long, "long", c.Long, "open the connections once, and send R rounds of PINGs over them")
	fs.IntVar(&c.MaxSYNBacklog, "max-syn-backlog", c.MaxSYNBacklog, "net.ipv4.tcp_max_syn_backlog of the proxies (1 to 1000000)")
}

// Check implements [Experiment].
func (c *collision) Check() error {
	var found checks
	found.within("vips", float64(c.VIPs), 1, maxVIPs)
	found.within("proxies", float64(c.Proxies), 1, maxProxies)
	found.within("rounds", float64(c.Rounds), 1, 200)
	found.within("parallel", float64(c.Parallel), 1, 8)
	found.within("rate", c.Rate, 1, 5000)
	found.within("retries", float64(c.Retries), 0, 10)
	found.within("pairs", float64(c.Pairs), 0, 400)
	found.within("max-syn-backlog", float64(c.MaxSYNBacklog), 1, 1e6)
	found.lasting("timeout", c.Timeout, 50*time.Millisecond, time.Minute)
	found.among("path", c.Path, pathL4, pathFullNAT, pathKernelNAT, pathL7, pathHAProxy, pathProxies, pathRedis)
	found.among("reply", c.Reply, replyFirst, replyLast)
	found.among("ports", c.Ports, portsKernel, portsBind, portsRange)
	for _, leg := range c.Sweep {
		found.within("sweep", float64(leg.instances), 1, maxVIPs)
		found.within("sweep's rounds", float64(leg.rounds), 1, 200)
	}
	switch {
	case c.Pairs > 0 && c.Path != pathL4:
		found.bad("pairs collide only behind the transparent balancer: not with path=%s", c.Path)
	case c.Pairs > 0 && (c.Long || len(c.Sweep) > 0):
		found.bad("pairs are a load of their own: not with long or sweep")
	case c.Pairs > c.PortRange.ports():
		found.bad("pairs=%d need a port each, and port-range has %d", c.Pairs, c.PortRange.ports())
	case c.Pairs > 0 && c.VIPs < 2*c.Proxies:
		found.bad("pairs need two VIPs at each proxy: vips=%d is less than twice proxies=%d", c.VIPs, c.Proxies)
	case c.Long && len(c.Sweep) > 0:
		found.bad("long and sweep are two loads: choose one")
	case c.Reply == replyLast && c.Pairs == 0:
		found.bad("reply=last needs pairs: whom it hurts is an old connection, and a round uses each but once")
	}
	if len(found) > 0 {
		return found.err()
	}
	if n := slices.Max(c.groups(c.most())); c.Pairs == 0 && c.Ports != portsBind && 10*n > c.PortRange.ports() {
		found.bad("a proxy serves %d instances, and the formula is for many more ports than %d: raise port-range or proxies", n, c.PortRange.ports())
	}
	if n := min(c.Parallel, c.detectors()) * c.most(); n > maxOpen {
		found.bad("%d connections would be open at once, and one Redis serves %d: lower parallel or the number of instances", n, maxOpen)
	}
	if n := c.detectors(); n > maxDetectors {
		found.bad("a detector for each round makes %d, and a switch has room for %d: lower rounds", n, maxDetectors)
	}
	return errors.Join(found.err(), c.checkDescriptors())
}

// Bounds of the lab: the addresses that are set up, what one Redis accepts by
// default (maxclients), and the ports of a bridge.
const (
	maxVIPs      = 2000
	maxProxies   = 1000
	maxOpen      = 9000
	maxDetectors = 900
)

// detectors is how many hosts probe: a round each. The kernel keeps the offsets at
// which connect() starts to look for a port for ten seconds, by source and
// destination address, and moves them only a little at each connect
// (net/core/secure_seq.c, secure_ipv4_port_ephemeral;
// net/ipv4/inet_hashtables.c, __inet_hash_connect): two destinations that got the
// same port are likely to get the same port again in the next round. Rounds from
// different hosts have nothing to do with each other.
func (c *collision) detectors() int {
	switch {
	case c.Pairs > 0:
		return 1
	case c.Long:
		return c.Parallel
	}
	n := 0
	for _, leg := range c.legs() {
		n += leg.rounds
	}
	return n
}

// leg is so many rounds with so many instances.
type leg struct{ instances, rounds int }

// legs are what is probed, one after the other.
func (c *collision) legs() []leg {
	if len(c.Sweep) > 0 {
		return c.Sweep
	}
	return []leg{{c.VIPs, c.Rounds}}
}

// most is the largest number of instances that is probed.
func (c *collision) most() int {
	n := 0
	for _, leg := range c.legs() {
		n = max(n, leg.instances)
	}
	return n
}

// checkDescriptors compares what the detectors hold open at most with what this
// process may have open.
func (c *collision) checkDescriptors() error {
	var limit unix.Rlimit
	if err := unix.Getrlimit(unix.RLIMIT_NOFILE, &limit); err != nil {
		return os.NewSyscallError("getrlimit", err)
	}
	const perHost, others = 6, 300
	need := min(c.Parallel, c.detectors())*c.most() + stashed + (c.detectors()+min(c.Proxies, proxyHosts))*perHost + others
	if uint64(need) > limit.Max {
		return fmt.Errorf("this load may need %d open files, and the limit is %d: raise it (ulimit -Hn) or lower parallel, vips or rounds", need, limit.Max)
	}
	return nil
}

// usable is P, from how many ports a connection's local port is drawn.
func (c *collision) usable(rules KernelRules) float64 {
	step := rules.ConnectPortStep
	if c.Ports == portsRange {
		step = rules.RangePortStep
	}
	return math.Floor(float64(c.PortRange.ports()) / float64(max(1, step)))
}

// groups returns how many of n instances each of the k proxies serves.
func (c *collision) groups(n int) []int {
	g := make([]int, c.Proxies)
	for i := range n {
		g[c.group(vip(i))]++
	}
	return g
}

// group is which proxy serves a VIP: by its host number.
func (c *collision) group(vip netip.Addr) int { return hostNumber(vip) % c.Proxies }

// pairsPerRound is how many pairs of the n connections of a round share a proxy:
// Σ n_g·(n_g−1)/2, which is k·(n/k)·(n/k−1)/2 where k divides n.
func (c *collision) pairsPerRound(n int) float64 {
	pairs := 0
	for _, g := range c.groups(n) {
		pairs += g * (g - 1) / 2
	}
	return float64(pairs)
}

// expected is μ, how many collisions a round has on average: each pair that
// shares a proxy has the same port once in P times.
func (c *collision) expected(n int, rules KernelRules) float64 {
	if c.Ports == portsBind {
		return 0
	}
	return c.pairsPerRound(n) / c.usable(rules)
}

// portRange is a range of ports, both ends included.
type portRange struct{ low, high int }

func (r portRange) ports() int { return r.high - r.low + 1 }

// String implements [flag.Value].
func (r *portRange) String() string { return fmt.Sprintf("%d-%d", r.low, r.high) }

// Set implements [flag.Value].
func (r *portRange) Set(s string) error {
	low, high, _ := strings.Cut(s, "-")
	a, err1 := strconv.Atoi(low)
	b, err2 := strconv.Atoi(high)
	if err := errors.Join(err1, err2); err != nil || a < 1024 || b > 65535 || b-a < 1 {
		return errors.New("want LOW-HIGH, two or more ports between 1024 and 65535")
	}
	*r = portRange{a, b}
	return nil
}

// sweep is a list of legs as a parameter: "100x40,1000x12".
type sweep []leg

// String implements [flag.Value].
func (s *sweep) String() string {
	words := make([]string, len(*s))
	for i, leg := range *s {
		words[i] = fmt.Sprintf("%dx%d", leg.instances, leg.rounds)
	}
	return strings.Join(words, ",")
}

// Set implements [flag.Value].
func (s *sweep) Set(text string) error {
	var list sweep
	for word := range strings.SplitSeq(text, ",") {
		n, r, _ := strings.Cut(word, "x")
		instances, err1 := strconv.Atoi(n)
		rounds, err2 := strconv.Atoi(r)
		if errors.Join(err1, err2) != nil {
			return errors.New("want instances x rounds, with commas between: 100x40,1000x12")
		}
		if slices.ContainsFunc(list, func(l leg) bool { return l.instances == instances }) {
			return fmt.Errorf("%d instances are there twice", instances)
		}
		list = append(list, leg{instances, rounds})
	}
	*s = list
	return nil
}
