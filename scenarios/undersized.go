package scenarios

import (
	"flag"
	"fmt"
	"slices"
	"strconv"
	"strings"
	"time"

	"connlab/loadgen"
	"connlab/netlab"
	"connlab/results"
)

// UndersizedPool is incident 4: a pool that keeps fewer connections than are in use
// at a time, closes the others, and eats the local ports.
var UndersizedPool = Scenario{
	Name:  "undersized-pool",
	Title: "A pool too small for a slow Redis: churn, TIME_WAIT, no local port left",
	Story: undersizedStory,
	New:   func() Experiment { return newUndersized() },
	Variants: []Variant{
		{Name: "incident", Role: results.Incident, Light: true, Set: remedy(),
			Summary: "more calls at a time than the pool keeps: each one returned beyond MaxIdle is closed, and 100 local ports are gone"},
		{Name: "more-ports", Role: results.FalseLead, Light: true, Set: remedy("ports=200", "for=32s"),
			Summary: "a remedy that suggests itself: twice the port range; it only takes longer"},
		{Name: "wait", Role: results.FalseLead, Light: true, Set: remedy("wait=true"),
			Summary: "half of the article's remedy: Wait=true alone; as long as MaxIdle is below MaxActive the pool goes on closing"},
		{Name: "go-redis-max-idle", Role: results.FalseLead, Light: true, Set: remedy("client=go-redis", "max-idle-conns=16"),
			Summary: "another client, the same setting: go-redis with MaxIdleConns below what is in use"},
		{Name: "tw-reuse", Role: results.Fix, Light: true, Set: remedy("tw-reuse=1", "reuse-delay=150"),
			Summary: "tcp_tw_reuse=1 alone, its delay in proportion to the ports: none is missing any more, and the pool dials as before"},
		{Name: "synchronous", Role: results.Fix, Light: true, Set: remedy("sync=true"),
			Summary: "a heartbeat's operations one after the other instead of a goroutine each: the next one takes the connection just returned; at twice the load 100 ports last two minutes instead of four seconds, not for ever"},
		{Name: "article", Role: results.Fix, Light: true, Set: remedy("max-idle=60", "max-active=80", "wait=true"),
			Summary: "the article's remedy, MaxIdle 300 of MaxActive 400 and Wait=true, in its proportions"},
		{Name: "equal", Role: results.Fix, Light: true, Set: remedy("max-idle=60"),
			Summary: "MaxIdle = MaxActive: nothing is ever closed"},
		{Name: "go-redis", Role: results.Fix, Light: true, Set: remedy("client=go-redis"),
			Summary: "the same calls through go-redis, which keeps every connection unless told otherwise"},
		{Name: "batching", Role: results.Fix, Light: true, Set: remedy("client=batch"),
			Summary: "requests of many goroutines merged into one pipeline: one connection, however slow Redis is"},
		{Name: "fast", Role: results.Control, Light: true, Set: remedy("latency=1500us"),
			Summary: "a control: the same pool and load while Redis is fast, as it was for months"},
		{Name: "placebo", Role: results.Control, Light: true, Set: remedy("syn-backlog=65536"),
			Summary: "the placebo control: tcp_max_syn_backlog raised on the client; nothing changes"},
		{Name: "churn-law", Role: results.Control, Light: true, Set: []string{"rate=250", "latency=1600ms", "ops=1", "max-active=0", "ports=25232", "for=56s", "sweep=max-idle=5,10,20,50,100,200,500", "beside=true"},
			Summary: "the law of churn, λ/(MaxIdle+1), across MaxIdle, 400 calls being in use: where it holds and where it falls off"},
		{Name: "onset", Role: results.Control, Light: true, Set: []string{"rate=400", "ops=1", "max-idle=30", "max-active=0", "ports=25232", "for=12s", "sweep=latency=15ms,62500us,250ms,1s"},
			Summary: "one pool, a Redis that gets slower: nothing happens until the latency comes near (MaxIdle/3)²/λ"},
		{Name: "exhausted-pool", Role: results.Control, Light: true, Set: []string{"rate=120", "latency=500ms", "ops=1", "max-idle=50", "max-active=50", "ports=25232", "for=40s"},
			Summary: "another error, that looks alike: more in use than MaxActive gives “connection pool exhausted”, by Erlang's formula, and no port is missing"},
		{Name: "ceiling", Role: results.Control, Set: []string{"rate=3000", "ceiling=2500", "latency=0s", "ops=1", "max-idle=50", "max-active=50", "ports=25232", "for=4s"},
			Summary: "a Redis at its limit of requests a second: latency rises until MaxActive/limit, and what is too much is refused"},
		{Name: "ceiling-batching", Role: results.Fix, Set: []string{"client=batch", "rate=3000", "ceiling=2500", "latency=0s", "ops=1", "ports=25232", "for=4s"},
			Summary: "the same Redis and calls, merged into pipelines: a third of the requests, far below its limit, and nothing is refused"},
		{Name: "short", Role: results.Incident, Light: true, Set: []string{"rate=10", "ops=1", "latency=0s", "max-idle=0", "max-active=0", "ports=100", "for=66s"},
			Summary: "the ceiling of short connections: each port once in TIME_WAIT's minute, P/60 a second"},
		{Name: "short-reuse", Role: results.Incident, Set: []string{"rate=1500", "ops=1", "latency=0s", "max-idle=0", "max-active=0", "ports=100", "for=4s", "tw-reuse=1", "sweep=reuse-delay=1000,100", "beside=true"},
			Summary: "the same with tcp_tw_reuse=1: each port once in tcp_tw_reuse_delay, P/delay a second"},
		{Name: "connect-cost", Role: results.Control, Set: []string{"ports=2524", "fill=0,0.25,0.45,0.55,0.75,0.95,1"},
			Summary: "what connect(2) costs the nearer the ports are to their end: nothing, until half of them are taken"},
		{Name: "batching-saves", Role: results.Control, Set: []string{"rate=4000", "ops=1", "latency=2ms", "max-idle=60", "ports=25232", "for=3s", "sweep=client=redigo,batch,go-redis,go-redis-auto"},
			Summary: "what batching saves, and the milliseconds it costs, beside the same calls unbatched and go-redis's own pipelining"},
		{Name: "batching-law", Role: results.Control, Set: []string{"client=batch", "ops=1", "latency=2ms", "ports=25232", "for=3s", "sweep=rate=300,1000,3000", "beside=true"},
			Summary: "how many commands a batch has, sent at 3 of them or after 5 ms"},
		{Name: "full-incident", Role: results.Incident, Full: true, Set: fullSize(),
			Summary: "full size: MaxIdle 50, MaxActive 500, the article's 25,232 ports, all of them spent"},
		{Name: "full-synchronous", Role: results.Fix, Full: true, Set: fullSize("sync=true"),
			Summary: "full size: a heartbeat's operations one after the other"},
		{Name: "full-article", Role: results.Fix, Full: true, Set: fullSize("max-idle=300", "max-active=400", "wait=true"),
			Summary: "full size: MaxIdle 300, MaxActive 400, Wait=true"},
		{Name: "full-connect-cost", Role: results.Control, Full: true, Set: []string{"ports=25232", "fill=0,0.25,0.45,0.55,0.75,0.95,1"},
			Summary: "full size: what connect(2) costs"},
	},
}

// remedy is an arm at the scenario's defaults and at twice their load, side by side.
func remedy(set ...string) []string { return append(set, "sweep=rate=80,160", "beside=true") }

// fullSize is an arm with the article's pool and ports.
func fullSize(set ...string) []string {
	return append([]string{"rate=4000", "ops=8", "latency=20ms", "max-idle=50", "max-active=500", "ports=25232", "for=54s", "timeout=1m"}, set...)
}

// The clients that a scenario can be run with.
const (
	clientRedigo   = "redigo"
	clientGoRedis  = "go-redis"
	clientCosocket = "cosocket" // the policy of nginx's Lua cosockets
	clientBatch    = "batch"
	clientAuto     = "go-redis-auto" // go-redis's auto-pipelining
)

// undersized is the parameters of the scenario.
type undersized struct {
	Client  string
	Rate    float64
	Ops     int
	Sync    bool
	For     time.Duration
	Latency time.Duration
	Ceiling int
	Timeout time.Duration

	// redigo
	MaxIdle, MaxActive           int
	Wait                         bool
	IdleTimeout, MaxConnLifetime time.Duration
	// go-redis
	PoolSize, MinIdleConns, MaxIdleConns, MaxActiveConns, DialerRetries int
	PoolTimeout                                                         time.Duration
	// batching
	BatchCommands, BatchConns int
	BatchDelay                time.Duration

	Ports      int
	TWReuse    int
	ReuseDelay int
	SYNBacklog int

	Fill   numbers
	Sweep  string
	Beside bool

	seed uint64 // of the arrivals
}

func newUndersized() *undersized {
	return &undersized{
		Client: clientRedigo, Rate: 80, Ops: 4, For: 24 * time.Second, Latency: 125 * time.Millisecond, Timeout: 5 * time.Second,
		MaxIdle: 16, MaxActive: 60, PoolSize: 60, DialerRetries: 1,
		BatchCommands: 3, BatchDelay: 5 * time.Millisecond, BatchConns: 1,
		Ports: 100, ReuseDelay: 1000, SYNBacklog: 512,
		seed: heartbeatSeed,
	}
}

// Flags implements [Experiment].
func (u *undersized) Flags(fs *flag.FlagSet) {
	fs.StringVar(&u.Client, "client", u.Client, "the `client`: redigo, go-redis, cosocket (nginx's Lua cosockets), batch (requests merged into pipelines) or go-redis-auto (its auto-pipelining)")
	fs.Float64Var(&u.Rate, "rate", u.Rate, "λ: Redis operations per second (1 to 50000)")
	fs.IntVar(&u.Ops, "ops", u.Ops, "g: `operations` of a heartbeat; heartbeats come at random, λ/g a second (1 to 64)")
	fs.BoolVar(&u.Sync, "sync", u.Sync, "a heartbeat does its operations one after the other, instead of a goroutine for each")
	fs.DurationVar(&u.For, "for", u.For, "T: how long heartbeats come (1s to 10m)")
	fs.DurationVar(&u.Latency, "latency", u.Latency, "W: service time of a request at Redis, requests not waiting for one another (0 to 10s)")
	fs.IntVar(&u.Ceiling, "ceiling", u.Ceiling, "C: `requests` per second that Redis can serve, one after the other; 0 for no limit (0 to 1000000)")
	fs.DurationVar(&u.Timeout, "timeout", u.Timeout, "of each step of a call: waiting for a connection, dialing, the reply (10ms to 1m)")
	fs.IntVar(&u.MaxIdle, "max-idle", u.MaxIdle, "m: redigo's MaxIdle, and the cosockets' pool size: idle `connections` kept; 0 keeps none (0 to 10000)")
	fs.IntVar(&u.MaxActive, "max-active", u.MaxActive, "c: redigo's MaxActive: `connections` at most; 0 is any number (0 to 10000)")
	fs.BoolVar(&u.Wait, "wait", u.Wait, "redigo's Wait: at MaxActive wait for a connection instead of failing")
	fs.DurationVar(&u.IdleTimeout, "idle-timeout", u.IdleTimeout, "redigo's IdleTimeout, the cosockets' keep-alive timeout, go-redis's ConnMaxIdleTime; 0 is the client's own default (0 to 1h)")
	fs.DurationVar(&u.MaxConnLifetime, "max-conn-lifetime", u.MaxConnLifetime, "redigo's MaxConnLifetime; 0 is any age (0 to 1h)")
	fs.IntVar(&u.PoolSize, "pool-size", u.PoolSize, "go-redis's PoolSize: `connections` in use at a time, more calls wait (1 to 10000)")
	fs.IntVar(&u.MinIdleConns, "min-idle-conns", u.MinIdleConns, "go-redis's MinIdleConns: `connections` opened in advance (0 to 10000)")
	fs.IntVar(&u.MaxIdleConns, "max-idle-conns", u.MaxIdleConns, "go-redis's MaxIdleConns: idle `connections` kept; 0 is any number (0 to 10000)")
	fs.IntVar(&u.MaxActiveConns, "max-active-conns", u.MaxActiveConns, "go-redis's MaxActiveConns: `connections` at most; 0 is any number (0 to 10000)")
	fs.DurationVar(&u.PoolTimeout, "pool-timeout", u.PoolTimeout, "go-redis's PoolTimeout; 0 is a second more than timeout (0 to 1m)")
	fs.IntVar(&u.DialerRetries, "dialer-retries", u.DialerRetries, "go-redis's DialerRetries: `dials` for a connection, 100 ms apart (1 to 100)")
	fs.IntVar(&u.BatchCommands, "batch", u.BatchCommands, "k: `commands` that make a batch full (1 to 10000)")
	fs.DurationVar(&u.BatchDelay, "batch-delay", u.BatchDelay, "t: how long the first command of a batch waits for others at most (100us to 1s)")
	fs.IntVar(&u.BatchConns, "batch-conns", u.BatchConns, "`connections` of the batching client, each with batches of its own (1 to 1000)")
	fs.IntVar(&u.Ports, "ports", u.Ports, "P: local `ports`, from 35768 on: net.ipv4.ip_local_port_range; 25232 is the article's (2 to 29000)")
	fs.IntVar(&u.TWReuse, "tw-reuse", u.TWReuse, "`value` of net.ipv4.tcp_tw_reuse (0 to 2)")
	fs.IntVar(&u.ReuseDelay, "reuse-delay", u.ReuseDelay, "net.ipv4.tcp_tw_reuse_delay, in `milliseconds` (1 to 60000)")
	fs.IntVar(&u.SYNBacklog, "syn-backlog", u.SYNBacklog, "net.ipv4.tcp_max_syn_backlog of the client (1 to 1000000)")
	fs.Var(&u.Fill, "fill", "instead of calls: the CPU time of connect(2) while these `parts` of the ports are in TIME_WAIT: 0,0.5,…,1")
	fs.StringVar(&u.Sweep, "sweep", u.Sweep, "one parameter with several values, each a leg of its own on a client host of its own: `name=value,value,…`")
	fs.BoolVar(&u.Beside, "beside", u.Beside, "run the legs of a sweep side by side, instead of one after the other")
}

// undersizedPorts is the lowest local port, as in the article.
const undersizedPorts = 35768

// undersizedLeg is one client host's part of an arm.
type undersizedLeg struct {
	label string // of metrics: "app", or the value that is swept: "max-idle=50"
	host  string
	*undersized
}

// legs are the values of the sweep, in its order, or else the parameters as they are.
func (u *undersized) legs() ([]undersizedLeg, error) {
	if u.Sweep == "" {
		return []undersizedLeg{{"app", "app", u}}, nil
	}
	name, list, ok := strings.Cut(u.Sweep, "=")
	values := strings.Split(list, ",")
	if !ok || len(values) < 2 {
		return nil, fmt.Errorf("sweep=%s: want name=value,value,… with at least two values", u.Sweep)
	}
	if name == "sweep" || name == "beside" || name == "fill" {
		return nil, fmt.Errorf("sweep=%s: %s is not a parameter of a leg", u.Sweep, name)
	}
	var all []undersizedLeg
	for i, value := range values {
		leg := *u
		leg.Sweep = ""
		if err := apply(&leg, []string{name + "=" + value}); err != nil {
			return nil, fmt.Errorf("sweep=%s: %w", u.Sweep, err)
		}
		label := name + "=" + value
		if slices.ContainsFunc(all, func(l undersizedLeg) bool { return l.label == label }) {
			return nil, fmt.Errorf("sweep=%s: %s is there twice", u.Sweep, value)
		}
		all = append(all, undersizedLeg{label, "app" + strconv.Itoa(i+1), &leg})
	}
	return all, nil
}

// Check implements [Experiment].
func (u *undersized) Check() error {
	legs, err := u.legs()
	if err != nil {
		return err
	}
	var found checks
	if len(legs) > 16 {
		found.bad("sweep=%s: %d legs, 16 at most", u.Sweep, len(legs))
	}
	for _, l := range legs {
		l.check(&found)
		if u.Beside && (l.Latency != legs[0].Latency || l.Ceiling != legs[0].Ceiling) {
			found.bad("sweep=%s beside=true: latency and ceiling are Redis's, and legs side by side have the same Redis", u.Sweep)
		}
	}
	if u.Beside && u.Sweep == "" {
		found.bad("beside is for the legs of a sweep")
	}
	if len(u.Fill) > 0 && u.Sweep != "" {
		found.bad("fill makes no calls, so there is nothing to sweep")
	}
	return found.err()
}

func (u *undersized) check(found *checks) {
	found.among("client", u.Client, clientRedigo, clientGoRedis, clientCosocket, clientBatch, clientAuto)
	found.within("rate", u.Rate, 1, 50_000)
	found.within("ops", float64(u.Ops), 1, 64)
	found.lasting("for", u.For, time.Second, 10*time.Minute)
	found.lasting("latency", u.Latency, 0, 10*time.Second)
	found.within("ceiling", float64(u.Ceiling), 0, 1e6)
	found.lasting("timeout", u.Timeout, 10*time.Millisecond, time.Minute)
	found.within("max-idle", float64(u.MaxIdle), 0, 10_000)
	found.within("max-active", float64(u.MaxActive), 0, 10_000)
	found.lasting("idle-timeout", u.IdleTimeout, 0, time.Hour)
	found.lasting("max-conn-lifetime", u.MaxConnLifetime, 0, time.Hour)
	found.within("pool-size", float64(u.PoolSize), 1, 10_000)
	found.within("min-idle-conns", float64(u.MinIdleConns), 0, 10_000)
	found.within("max-idle-conns", float64(u.MaxIdleConns), 0, 10_000)
	found.within("max-active-conns", float64(u.MaxActiveConns), 0, 10_000)
	found.lasting("pool-timeout", u.PoolTimeout, 0, time.Minute)
	found.within("dialer-retries", float64(u.DialerRetries), 1, 100)
	found.within("batch", float64(u.BatchCommands), 1, 10_000)
	found.lasting("batch-delay", u.BatchDelay, 100*time.Microsecond, time.Second)
	found.within("batch-conns", float64(u.BatchConns), 1, 1000)
	found.within("ports", float64(u.Ports), 2, 29_000)
	found.within("tw-reuse", float64(u.TWReuse), 0, 2)
	found.within("reuse-delay", float64(u.ReuseDelay), 1, 60_000)
	found.within("syn-backlog", float64(u.SYNBacklog), 1, 1e6)
	for _, x := range u.Fill {
		found.within("fill", x, 0, 1)
	}
	if !slices.IsSorted(u.Fill) {
		found.bad("fill=%v: the parts must rise: a port once taken stays so for a minute", u.Fill)
	}
	switch {
	case u.Timeout <= u.Latency:
		found.bad("timeout=%v must be longer than latency=%v, or no call gets its reply", u.Timeout, u.Latency)
	case u.For < 4*u.Latency:
		found.bad("for=%v must be at least four times latency=%v, or the pool never gets going", u.For, u.Latency)
	case u.Rate*u.Latency.Seconds() > 5000:
		found.bad("%.0f calls in use at a time (rate·latency): 5000 at most", u.Rate*u.Latency.Seconds())
	case u.Rate*u.For.Seconds() > 1e7:
		found.bad("%.0f operations: ten million at most; lower rate or for", u.Rate*u.For.Seconds())
	case u.Sync && u.Ops == 1:
		found.bad("with one operation there is none to come after it: sync needs ops=2 or more")
	}
}

// heartbeatSeed is the seed of the arrivals. Any other would do: the model is played with the
// same ones; only how near the law of churn a short run comes differs, by a few percent.
const heartbeatSeed = 5

// heartbeats are when users' heartbeats come.
func (u *undersized) heartbeats() loadgen.Schedule {
	return loadgen.Poisson(u.Rate/float64(u.Ops), u.For, u.seed)
}

// callers are when callers of the pool come: as many as a heartbeat has operations,
// all at once, or one that does them all.
func (u *undersized) callers() loadgen.Schedule {
	if u.Sync {
		return u.heartbeats()
	}
	return func(yield func(time.Duration) bool) {
		for due := range u.heartbeats() {
			for range u.Ops {
				if !yield(due) {
					return
				}
			}
		}
	}
}

// Topology implements [Experiment]: Redis, and a client host for each leg, with ports
// and TIME_WAITs of its own.
func (u *undersized) Topology() netlab.Topology {
	t := netlab.Topology{
		Switches: []netlab.SwitchSpec{{Name: lanName, Subnet: collisionLAN}},
		Hosts:    []netlab.HostSpec{redisHost()},
	}
	legs, _ := u.legs() // of parameters that were checked
	for _, l := range legs {
		sysctls := map[string]string{
			"net.ipv4.ip_local_port_range": fmt.Sprintf("%d %d", undersizedPorts, undersizedPorts+l.Ports-1),
			"net.ipv4.tcp_tw_reuse":        strconv.Itoa(l.TWReuse),
			"net.ipv4.tcp_max_syn_backlog": strconv.Itoa(l.SYNBacklog),
		}
		if l.ReuseDelay != 1000 {
			// Since Linux 6.14; before, it is a second.
			sysctls["net.ipv4.tcp_tw_reuse_delay"] = strconv.Itoa(l.ReuseDelay)
		}
		t.Hosts = append(t.Hosts, webHost(l.host, sysctls))
	}
	return t
}
