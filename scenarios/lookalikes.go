package scenarios

import (
	"flag"
	"net/netip"
	"strconv"
	"time"

	"connlab/netlab"
	"connlab/netlab/twrecycle"
	"connlab/netlab/wire"
	"connlab/results"
)

// Lookalikes is what incident 5 was taken for, and what it could have been: SYNs that come in
// and are not answered, from other causes than a full accept queue.
var Lookalikes = Scenario{
	Name:  "lookalikes",
	Title: "The same “Connecting…” from another cause: tcp_tw_recycle behind NAT, a SYN flood",
	Story: lookalikesStory,
	New:   func() Experiment { return newLookalikes() },
	Variants: []Variant{
		{Name: "tw-recycle", Role: results.Incident, Light: true,
			Summary: "the hypothesis that was rejected: eight hosts behind one address, clocks a day apart, a server with tcp_tw_recycle=1"},
		{Name: "longer-queue", Role: results.FalseLead, Light: true, Set: []string{"backlog=60000", "somaxconn=60000"},
			Summary: "a longer accept queue: it was never full"},
		{Name: "modern-clients", Role: results.Incident, Light: true, Set: []string{"timestamps=1", "addresses=40", "apart=0s", "timeout=700ms"},
			Summary: "the same with clocks at random, as Linux has them since 4.10: half of all SYNs are behind whatever came before"},
		{Name: "recycle-off", Role: results.Fix, Light: true, Set: []string{"recycle=false"},
			Summary: "tcp_tw_recycle=0, as it is since 4.12: nobody is refused"},
		{Name: "no-timestamps", Role: results.Fix, Light: true, Set: []string{"timestamps=0"},
			Summary: "clients without timestamps have no clock to compare; they have no protection against old segments either"},
		{Name: "one-clock", Role: results.Control, Light: true, Set: []string{"apart=0s"},
			Summary: "the healthy control: all hosts have one clock, and the rule is there"},
		{Name: "placebo", Role: results.Control, Light: true, Set: []string{"max-syn-backlog=65536"},
			Summary: "the placebo control: tcp_max_syn_backlog raised; the numbers of tw-recycle must come back"},
		{Name: "syn-flood", Role: results.Incident, Light: true, Set: []string{"flood=2000", "cookies=0", "backlog=511", "timeout=12s"},
			Summary: "2,000 SYNs that nobody completes, without SYN cookies: the other queue is full"},
		{Name: "flood-longer-queue", Role: results.FalseLead, Light: true, Set: []string{"flood=2000", "cookies=0", "backlog=1000", "timeout=12s"},
			Summary: "twice the backlog, which is the limit of that queue too: it is full half a second later"},
		{Name: "syn-cookies", Role: results.Fix, Light: true, Set: []string{"flood=2000", "backlog=511", "timeout=12s"},
			Summary: "the same flood with SYN cookies: no SYN is dropped, and the counters say that there is a flood"},
		{Name: "no-flood", Role: results.Control, Light: true, Set: []string{"cookies=0", "backlog=511", "recycle=false", "apart=0s"},
			Summary: "the healthy control: the same clients, no flood"},
	},
}

// lookalikes is the parameters. It has two shapes: clients behind one address, or, if Flood is
// not 0, a flood of SYNs beside the clients.
type lookalikes struct {
	Hosts      int
	Addresses  int
	Rate       float64
	For        time.Duration
	Timeout    time.Duration
	Apart      time.Duration
	Timestamps int
	Recycle    bool

	Backlog       int
	Somaxconn     int
	MaxSYNBacklog int
	Flood         int
	FloodRate     float64
	Cookies       int

	wires wires // of the topology
}

func newLookalikes() *lookalikes {
	return &lookalikes{
		Hosts: 8, Addresses: 1, Rate: 40, For: 8 * time.Second, Timeout: 2500 * time.Millisecond, Apart: 24 * time.Hour, Timestamps: 2, Recycle: true,
		Backlog: 16384, Somaxconn: 16384, MaxSYNBacklog: 16384, FloodRate: 1000, Cookies: 1,
	}
}

// Flags implements [Experiment].
func (l *lookalikes) Flags(fs *flag.FlagSet) {
	fs.IntVar(&l.Hosts, "hosts", l.Hosts, "client `hosts` (2 to 20)")
	fs.IntVar(&l.Addresses, "addresses", l.Addresses, "addresses of each host that its connections take in turn (1 to 200)")
	fs.Float64Var(&l.Rate, "rate", l.Rate, "λ: new connections per second, for one PING each (1 to 1000)")
	fs.DurationVar(&l.For, "for", l.For, "how long they come (2s to 50s)")
	fs.DurationVar(&l.Timeout, "timeout", l.Timeout, "how long a client waits for the connection, and again for the reply (200ms to 60s)")
	fs.DurationVar(&l.Apart, "apart", l.Apart, "how far apart the clocks of the hosts' timestamps are, one from the next (0s, or 10s to 48h)")
	fs.IntVar(&l.Timestamps, "timestamps", l.Timestamps, "net.ipv4.tcp_timestamps of the clients: 0 none, 1 clocks at random, for each pair of addresses or for each connection, 2 one clock a host (0 to 2)")
	fs.BoolVar(&l.Recycle, "recycle", l.Recycle, "the server's link has the rule of tcp_tw_recycle=1 of Linux 3.10")
	fs.IntVar(&l.Backlog, "backlog", l.Backlog, "argument of listen(2) (1 to 1000000)")
	fs.IntVar(&l.Somaxconn, "somaxconn", l.Somaxconn, "net.core.somaxconn of the server's namespace (1 to 1000000)")
	fs.IntVar(&l.MaxSYNBacklog, "max-syn-backlog", l.MaxSYNBacklog, "net.ipv4.tcp_max_syn_backlog of the server's namespace (1 to 1000000)")
	fs.IntVar(&l.Flood, "flood", l.Flood, "SYNs from addresses that never answer; 0 for none (0 to 100000)")
	fs.Float64Var(&l.FloodRate, "flood-rate", l.FloodRate, "how many of them per second (100 to 5000)")
	fs.IntVar(&l.Cookies, "cookies", l.Cookies, "net.ipv4.tcp_syncookies of the server's namespace (0 or 1)")
}

// longestApart keeps all clocks on one half of the circle of 32 bits, in milliseconds.
const longestApart = 1<<31*time.Millisecond - time.Hour

// Check implements [Experiment].
func (l *lookalikes) Check() error {
	var found checks
	found.within("hosts", float64(l.Hosts), 2, 20)
	found.within("addresses", float64(l.Addresses), 1, 200)
	found.within("rate", l.Rate, 1, 1000)
	found.lasting("for", l.For, 2*time.Second, 50*time.Second)
	found.lasting("timeout", l.Timeout, 200*time.Millisecond, time.Minute)
	found.lasting("apart", l.Apart, 0, 48*time.Hour)
	if l.Apart > 0 {
		found.lasting("apart", l.Apart, 10*time.Second, 48*time.Hour)
	}
	found.within("timestamps", float64(l.Timestamps), 0, 2)
	found.within("backlog", float64(l.Backlog), 1, 1e6)
	found.within("somaxconn", float64(l.Somaxconn), 1, 1e6)
	found.within("max-syn-backlog", float64(l.MaxSYNBacklog), 1, 1e6)
	found.within("flood", float64(l.Flood), 0, 100_000)
	found.within("flood-rate", l.FloodRate, 100, 5000)
	found.within("cookies", float64(l.Cookies), 0, 1)
	if len(found) > 0 {
		return found.err()
	}
	if l.Apart*time.Duration(l.Hosts-1) > longestApart {
		found.bad("apart=%v times hosts=%d is more than half of the circle of 32-bit milliseconds", l.Apart, l.Hosts)
	}
	if n := l.load().Count(); l.randomClocks() && l.Hosts*l.Addresses < n {
		found.bad("hosts=%d of addresses=%d: want a new address for each of %d connections, or their clocks are the same again", l.Hosts, l.Addresses, n)
	}
	if l.randomClocks() && l.Timeout > 900*time.Millisecond {
		found.bad("timeout=%v: want less than the first SYN retry, at 1s, which would have another chance", l.Timeout)
	}
	if room := float64(l.queue().places()); l.Flood > 0 && float64(l.Flood) < 1.2*room {
		found.bad("flood=%d does not fill the SYN queue of %.0f places", l.Flood, room)
	}
	if l.Flood > 0 && l.floodFor()+floodAfter > l.For-time.Second {
		found.bad("for=%v is too short for flood=%d at flood-rate=%v", l.For, l.Flood, l.FloodRate)
	}
	if l.Flood > 0 && l.For > floodAfter+requestLife {
		found.bad("for=%v is longer than the first SYNs of the flood are remembered: %v at most", l.For, floodAfter+requestLife)
	}
	if l.Flood > 0 && l.Timeout < l.For+time.Second {
		found.bad("timeout=%v: want for=%v and more, so that every client connects in the end", l.Timeout, l.For)
	}
	if l.Flood > 0 && l.Cookies == 0 && l.MaxSYNBacklog/4*3 < l.queue().places() {
		found.bad("max-syn-backlog=%d: without cookies its last quarter is kept for known peers (net/ipv4/tcp_input.c, tcp_conn_request), which is below the %d places of the queue", l.MaxSYNBacklog, l.queue().places())
	}
	return found.err()
}

// randomClocks reports whether the rule meets clocks at random.
func (l *lookalikes) randomClocks() bool { return l.Recycle && l.Flood == 0 && l.Timestamps == 1 }

func (l *lookalikes) queue() acceptQueue {
	return acceptQueue{Backlog: l.Backlog, Somaxconn: l.Somaxconn}
}

// floodFor is how long the flood takes, and floodAfter when it begins.
func (l *lookalikes) floodFor() time.Duration {
	return time.Duration(float64(l.Flood) / l.FloodRate * float64(time.Second))
}

const floodAfter = time.Second

// requestLife is how long a request is kept that nobody completes, while more than half of the SYN queue is taken: its
// SYN-ACK is sent again twice, and the third timeout ends it (net/ipv4/inet_connection_sock.c, reqsk_timer_handler).
const requestLife = 7 * time.Second

// floodFull is when the SYN queue is full.
func (l *lookalikes) floodFull() time.Duration {
	return floodAfter + time.Duration(float64(l.queue().places())/l.FloodRate*float64(time.Second))
}

// Addresses and names of the lab.
var (
	lookServer = netip.MustParseAddr("10.66.0.1")
	lookRouter = netip.MustParseAddr("10.66.0.2")
	lookInside = netip.MustParseAddr("10.77.0.1") // the router's other side
)

// wires are the stages that a lab of this kind has, and that are asked when the load is over.
type wires struct {
	recycle *twrecycle.Server
	flood   *synFlood
}

// Topology implements [Experiment].
func (l *lookalikes) Topology() netlab.Topology {
	w := &l.wires
	serverLink := netlab.LinkSpec{Switch: "lan", Addrs: []netip.Addr{lookServer}}
	if l.Recycle && l.Flood == 0 {
		w.recycle = twrecycle.New()
		cable := &wire.Wire{Leaving: []wire.Stage{w.recycle.Leaving}, Entering: []wire.Stage{w.recycle.Entering}}
		serverLink.Pump, serverLink.AlwaysPump = cable.Pump, true
	}
	server := netlab.HostSpec{Name: "server", Links: []netlab.LinkSpec{serverLink}, Sysctls: map[string]string{
		"net.core.somaxconn":           strconv.Itoa(l.Somaxconn),
		"net.ipv4.tcp_max_syn_backlog": strconv.Itoa(l.MaxSYNBacklog),
		"net.ipv4.tcp_syncookies":      strconv.Itoa(l.Cookies),
	}}
	t := netlab.Topology{
		Switches: []netlab.SwitchSpec{{Name: "lan", Subnet: netip.MustParsePrefix("10.66.0.0/16")}},
		Hosts:    []netlab.HostSpec{server},
	}
	if l.Flood > 0 {
		t.Hosts = append(t.Hosts, netlab.Clients(l.Hosts, "client", "lan", nil)...)
		w.flood = &synFlood{to: netip.AddrPortFrom(lookServer, redisPort), n: l.Flood, rate: l.FloodRate}
		t.Devices = []netlab.DeviceSpec{{Name: "flood", Switch: "lan", Addrs: floodSources(), Attach: w.flood.Attach}}
		return t
	}
	t.Switches = append(t.Switches, netlab.SwitchSpec{Name: "inside", Subnet: netip.MustParsePrefix("10.77.0.0/16")})
	t.Hosts = append(t.Hosts, netlab.HostSpec{
		Name:    "router",
		Links:   []netlab.LinkSpec{{Switch: "lan", Addrs: []netip.Addr{lookRouter}}, {Switch: "inside", Addrs: []netip.Addr{lookInside}}},
		Sysctls: map[string]string{"net.ipv4.ip_forward": "1"},
	})
	clients := netlab.Clients(l.Hosts, "client", "inside", map[string]string{"net.ipv4.tcp_timestamps": strconv.Itoa(l.Timestamps)})
	for i := range clients {
		clients[i].Links[0].Addrs = l.inside(i)
		clients[i].Routes = []netlab.RouteSpec{{To: netip.MustParsePrefix("10.66.0.0/16"), Via: lookInside}}
		if l.Apart > 0 && l.Timestamps == 2 {
			// The first host has the latest clock.
			clock := twrecycle.NewClock(uint32(l.Apart.Milliseconds()) * uint32(l.Hosts-1-i))
			cable := &wire.Wire{Leaving: []wire.Stage{clock.Leaving}, Entering: []wire.Stage{clock.Entering}}
			clients[i].Links[0].Pump, clients[i].Links[0].AlwaysPump = cable.Pump, true
		}
	}
	t.Hosts = append(t.Hosts, clients...)
	return t
}

// inside is the addresses of a client host behind the router.
func (l *lookalikes) inside(host int) []netip.Addr {
	addrs := make([]netip.Addr, l.Addresses)
	for i := range addrs {
		addrs[i] = netip.AddrFrom4([4]byte{10, 77, byte(1 + host), byte(1 + i)})
	}
	return addrs
}

// floodSources are the addresses that SYNs of a flood come from.
func floodSources() []netip.Addr {
	addrs := make([]netip.Addr, 200)
	for i := range addrs {
		addrs[i] = netip.AddrFrom4([4]byte{10, 66, 200, byte(1 + i)})
	}
	return addrs
}
