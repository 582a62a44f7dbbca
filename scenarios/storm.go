package scenarios

import (
	"flag"
	"fmt"
	"math"
	"net/netip"
	"strconv"
	"time"

	"connlab/netlab"
	"connlab/results"
	"connlab/server"
)

// AcceptQueue is incident 5: nodes with 150,000 connections each, whose accept queue of
// 16,384 places overflows while telnet hangs in "Connecting…". The article has neither the
// rate at which clients came nor the one at which they were accepted; both are parameters.
// The variants have one in twenty-five of its numbers, at the same times; those of full
// size have all.
var AcceptQueue = Scenario{
	Name:  "accept-queue",
	Title: "A reconnect storm into the accept queue of 150,000 connections",
	Story: stormStory,
	New:   func() Experiment { return newStorm() },
	// Each has 6,000 connections to open and thousands of SYNs a second.
	Beside: 5,
	Variants: []Variant{
		{Name: "incident", Role: results.Incident, Light: true,
			Summary: "half of the connections are cut and come back at three times the rate at which they are accepted"},
		{Name: "not-reopened", Role: results.FalseLead, Light: true, Set: []string{"raise-later=60000"},
			Summary: "somaxconn raised while the server listens: ss -lnt still shows the old limit"},
		{Name: "backlog-only", Role: results.FalseLead, Light: true, Set: []string{"backlog=2400"},
			Summary: "the backlog raised, somaxconn not: the kernel cuts it to somaxconn"},
		{Name: "syn-backlog-only", Role: results.FalseLead, Light: true, Set: []string{"max-syn-backlog=65536"},
			Summary: "tcp_max_syn_backlog alone: it is about the other queue"},
		{Name: "twice", Role: results.FalseLead, Light: true, Set: []string{"backlog=1310", "somaxconn=1310"},
			Summary: "twice the queue, reopened: half as many hang, and they are still hundreds"},
		{Name: "reopened", Role: results.Fix, Light: true, Set: []string{"backlog=2400", "somaxconn=2400"},
			Summary: "backlog and somaxconn raised and the listener reopened: a place for all who come faster than they are accepted"},
		{Name: "jitter", Role: results.Fix, Light: true, Set: []string{"jitter=17s"},
			Summary: "clients come back at random within 17 s: nobody is dropped, and it takes no longer than before"},
		{Name: "accepts", Role: results.Fix, Light: true, Set: []string{"accept-rate=0"},
			Summary: "a server that accepts as fast as they come: the root cause removed"},
		{Name: "no-cut", Role: results.Control, Light: true, Set: []string{"share=0"},
			Summary: "the healthy control: nobody is cut, the prober alone connects"},
		{Name: "placebo", Role: results.Control, Light: true, Set: []string{"tw-reuse=1"},
			Summary: "the placebo control: tcp_tw_reuse at the server, which opens no connection; the numbers of the incident must come back"},
		{Name: "impatient", Role: results.Incident, Light: true, Set: []string{"timeout=2s", "for=12s"},
			Summary: "clients that give up after 2 s and come again: what is accepted is dead, and it goes on for ever"},
		{Name: "corpses", Role: results.FalseLead, Light: true, Set: []string{"timeout=2s", "for=12s", "backlog=2400", "somaxconn=2400"},
			Summary: "the long queue that helped patient clients: each has given up before it is accepted"},
		{Name: "short-queue", Role: results.Fix, Light: true, Set: []string{"timeout=2s", "backlog=300", "for=25s"},
			Summary: "a queue shorter than μ times their patience: SYNs are dropped, and everybody gets through"},
		{Name: "impatient-jitter", Role: results.Fix, Light: true, Set: []string{"timeout=2s", "backlog=2400", "somaxconn=2400", "jitter=17s", "base=500ms", "most=8s"},
			Summary: "the long queue with jittered back-off: no queue, no corpses"},
		// Beside all others: it waits for scrapes for half a minute before its storm, and takes next to no time of the CPU until then.
		{Name: "alert", Role: results.Incident, Light: true, Long: true, Set: []string{"alert=true"},
			Summary: "the incident beside a real Prometheus and a real node_exporter: which rule fires, and when"},

		{Name: "full", Role: results.Incident, Full: true, Set: stormAtFull(),
			Summary: "150,000 connections held, 75,000 of them cut, 16,384 places"},
		{Name: "full-reopened", Role: results.Fix, Full: true, Set: stormAtFull("backlog=60000", "somaxconn=60000"),
			Summary: "the same with 60,000 places"},
		{Name: "full-jitter", Role: results.Fix, Full: true, Set: stormAtFull("jitter=17s"),
			Summary: "the same as the incident, with clients that come back at random within 17 s"},
	},
}

// stormAtFull is the article's size: its 150,000 connections and 16,384 places, and everything else
// twenty-five times that of the defaults. A process may have 20,000 descriptors on small machines, so there are ten of a kind.
func stormAtFull(more ...string) []string {
	return append([]string{
		"connections=150000", "rate=15000", "accept-rate=5000", "backlog=16384", "somaxconn=16384", "max-syn-backlog=16384",
		"hosts=10", "workers=10",
	}, more...)
}

// storm is the parameters of incident 5.
type storm struct {
	Connections int
	Share       float64
	Rate        float64
	AcceptRate  int
	Hosts       int
	Addresses   int
	Workers     int

	Backlog       int
	Somaxconn     int
	MaxSYNBacklog int
	TWReuse       int
	RaiseLater    int

	Timeout time.Duration
	Jitter  time.Duration
	Base    time.Duration
	Most    time.Duration
	For     time.Duration
	Alert   bool
}

func newStorm() *storm {
	return &storm{
		Connections: 6000, Share: 0.5, Rate: 600, AcceptRate: 200, Hosts: 2, Addresses: 4, Workers: 2,
		Backlog: 655, Somaxconn: 655, MaxSYNBacklog: 655, TWReuse: 2,
		Timeout: 30 * time.Second, Most: time.Minute, For: 20 * time.Second,
	}
}

// Flags implements [Experiment].
func (s *storm) Flags(fs *flag.FlagSet) {
	fs.IntVar(&s.Connections, "connections", s.Connections, "clients, one connection each, that are connected before (100 to 160000)")
	fs.Float64Var(&s.Share, "share", s.Share, "`part` of them that the server resets (0 to 0.9)")
	fs.Float64Var(&s.Rate, "rate", s.Rate, "λ: how many of those come back per second, without jitter (50 to 20000)")
	fs.IntVar(&s.AcceptRate, "accept-rate", s.AcceptRate, "μ: connections that the server accepts per second, all workers together, who have equal parts; 0 for as fast as they come (0, or 20 to 20000)")
	fs.IntVar(&s.Hosts, "hosts", s.Hosts, "client `hosts`, a process each (1 to 16)")
	fs.IntVar(&s.Addresses, "addresses", s.Addresses, "`addresses` of each client host (1 to 32)")
	fs.IntVar(&s.Workers, "workers", s.Workers, "server `processes` that share the listening socket, and so one accept queue (1 to 16)")
	fs.IntVar(&s.Backlog, "backlog", s.Backlog, "argument of listen(2) (1 to 1000000)")
	fs.IntVar(&s.Somaxconn, "somaxconn", s.Somaxconn, "net.core.somaxconn of the server's namespace when it calls listen(2) (1 to 1000000)")
	fs.IntVar(&s.MaxSYNBacklog, "max-syn-backlog", s.MaxSYNBacklog, "net.ipv4.tcp_max_syn_backlog of the server's namespace (1 to 1000000)")
	fs.IntVar(&s.TWReuse, "tw-reuse", s.TWReuse, "net.ipv4.tcp_tw_reuse of the server's namespace (0, 1 or 2)")
	fs.IntVar(&s.RaiseLater, "raise-later", s.RaiseLater, "net.core.somaxconn that is set once the server listens; 0 for none (0 to 1000000)")
	fs.DurationVar(&s.Timeout, "timeout", s.Timeout, "a client's patience for the connection, and again for its first reply (200ms to 120s)")
	fs.DurationVar(&s.Jitter, "jitter", s.Jitter, "clients come back at a random time within so long, instead of at the rate (0s, or 1s to 2m)")
	fs.DurationVar(&s.Base, "base", s.Base, "back-off: after its k-th failure a client waits a random time up to base·2^k; 0s for none (0s to 1m)")
	fs.DurationVar(&s.Most, "most", s.Most, "the longest back-off (0s to 10m)")
	fs.BoolVar(&s.Alert, "alert", s.Alert, "a real Prometheus and a real node_exporter in the server's namespace, and the rules of docs/monitoring")
	fs.DurationVar(&s.For, "for", s.For, "how long is looked at, from the moment the first client comes back (3s to 5m)")
}

// shardLimit is how many connections a process can have: the limit of descriptors on small machines is 20,000.
const shardLimit = 19_000

// Check implements [Experiment].
func (s *storm) Check() error {
	var found checks
	found.within("connections", float64(s.Connections), 100, 160_000)
	found.within("share", s.Share, 0, 0.9)
	found.within("rate", s.Rate, 50, 20_000)
	if s.AcceptRate != 0 {
		found.within("accept-rate", float64(s.AcceptRate), 20, 20_000)
	}
	found.within("hosts", float64(s.Hosts), 1, 16)
	found.within("addresses", float64(s.Addresses), 1, 32)
	found.within("workers", float64(s.Workers), 1, 16)
	found.within("backlog", float64(s.Backlog), 1, 1e6)
	found.within("somaxconn", float64(s.Somaxconn), 1, 1e6)
	found.within("max-syn-backlog", float64(s.MaxSYNBacklog), 1, 1e6)
	found.within("tw-reuse", float64(s.TWReuse), 0, 2)
	found.within("raise-later", float64(s.RaiseLater), 0, 1e6)
	found.lasting("timeout", s.Timeout, 200*time.Millisecond, 2*time.Minute)
	found.lasting("jitter", s.Jitter, 0, 2*time.Minute)
	if s.Jitter > 0 {
		found.lasting("jitter", s.Jitter, time.Second, 2*time.Minute)
	}
	found.lasting("base", s.Base, 0, time.Minute)
	found.lasting("most", s.Most, 0, 10*time.Minute)
	found.lasting("for", s.For, 3*time.Second, 5*time.Minute)
	if len(found) > 0 {
		return found.err()
	}
	if most := shardLimit * min(s.Hosts, s.Workers); s.Connections > most {
		found.bad("connections=%d: with hosts=%d and workers=%d there is room for %d, %d in a process", s.Connections, s.Hosts, s.Workers, most, shardLimit)
	}
	if per := s.Connections / (s.Hosts * s.Addresses); per > 10_000 {
		found.bad("addresses=%d: that is %d connections an address; connect(2) gets slow beyond 10000", s.Addresses, per)
	}
	if s.AcceptRate%s.Workers != 0 {
		found.bad("accept-rate=%d cannot be shared by workers=%d: want a multiple", s.AcceptRate, s.Workers)
	}
	if s.Base > s.Most {
		found.bad("base=%v is longer than most=%v", s.Base, s.Most)
	}
	if s.Alert && s.Share == 0 {
		found.bad("alert=true waits for an alert, and with share=0 there is no reason for one")
	}
	if s.spread() > s.For {
		found.bad("for=%v ends before the last client comes back, after %v", s.For, s.spread())
	}
	if s.Share > 0 && s.cut() < 50 {
		found.bad("share=%v of %d connections are too few to be a storm", s.Share, s.Connections)
	}
	return found.err()
}

// cut is how many connections the server resets.
func (s *storm) cut() int { return int(math.Round(s.Share * float64(s.Connections))) }

// alertRule is the rule that must fire, and scrapes are the intervals at which the server is scraped, each by a job of its own.
const alertRule = "AcceptQueueOverflow"

var scrapes = []time.Duration{5 * time.Second, 15 * time.Second, 30 * time.Second}

// spread is how long clients come back for the first time: at the rate, or at random within
// the jitter.
func (s *storm) spread() time.Duration {
	if s.Jitter > 0 {
		return s.Jitter
	}
	return time.Duration(float64(s.cut()) / s.Rate * float64(time.Second))
}

// Names of the hosts.
const (
	stormServer = "server"
	stormProber = "prober"
)

// Topology implements [Experiment]: the server, the hosts of the clients and the prober's on one switch.
func (s *storm) Topology() netlab.Topology {
	const lan = "lan"
	link := func(addrs ...netip.Addr) []netlab.LinkSpec { return []netlab.LinkSpec{{Switch: lan, Addrs: addrs}} }
	hosts := []netlab.HostSpec{
		{Name: stormServer, Links: link(netip.AddrFrom4([4]byte{10, 66, 0, 1})), Sysctls: map[string]string{
			"net.core.somaxconn":           strconv.Itoa(s.Somaxconn),
			"net.ipv4.tcp_max_syn_backlog": strconv.Itoa(s.MaxSYNBacklog),
			"net.ipv4.tcp_tw_reuse":        strconv.Itoa(s.TWReuse),
		}},
		{Name: stormProber, Links: link(netip.AddrFrom4([4]byte{10, 66, 0, 2}))},
	}
	for i := range s.Hosts {
		hosts = append(hosts, netlab.HostSpec{Name: fmt.Sprintf("clients-%d", i+1), Links: link(s.addresses(i)...)})
	}
	return netlab.Topology{
		Switches: []netlab.SwitchSpec{{Name: lan, Subnet: netip.MustParsePrefix("10.66.0.0/16")}},
		Hosts:    hosts,
	}
}

// addresses are those of the i-th host of clients.
func (s *storm) addresses(i int) []netip.Addr {
	addrs := make([]netip.Addr, s.Addresses)
	for k := range addrs {
		addrs[k] = netip.AddrFrom4([4]byte{10, 66, byte(16 + i), byte(1 + k)})
	}
	return addrs
}

// clientsOf is how many of the clients are on the i-th host.
func (s *storm) clientsOf(i int) int {
	n := s.Connections / s.Hosts
	if i < s.Connections%s.Hosts {
		n++
	}
	return n
}

// Times of a run beside those that are parameters.
const (
	probeEvery  = 100 * time.Millisecond
	probeBefore = time.Second // before the storm
)

// stormSeed makes the clients' random times repeatable.
const stormSeed = 5

// queue is the listener.
func (s *storm) queue() acceptQueue { return acceptQueue{Backlog: s.Backlog, Somaxconn: s.Somaxconn} }

// model is the storm as the model plays it.
func (s *storm) model(rules KernelRules) stormModel {
	m := stormModel{
		queue: s.queue(), acceptRate: float64(s.AcceptRate), burst: server.AcceptBurst,
		clients: s.cut(), spread: s.spread(), jitter: s.Jitter > 0, back: backOff{s.Base, s.Most},
		timeout: s.Timeout, probeEvery: probeEvery, probeBefore: probeBefore, horizon: s.For,
		tick: rules.Tick, seed: stormSeed,
	}
	var before time.Duration
	for _, at := range rules.SYNRetries(12) {
		m.intervals = append(m.intervals, at-before)
		before = at
	}
	return m
}
