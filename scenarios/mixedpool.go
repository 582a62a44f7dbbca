package scenarios

import (
	"flag"
	"math"
	"strconv"
	"time"

	"connlab/loadgen"
	"connlab/netlab"
	"connlab/results"
)

// MixedPool is the first half of incident 3: a connection pool that does not pool,
// because some of its users close what they are given.
var MixedPool = Scenario{
	Name:  "mixed-pool",
	Title: "A pool drains itself: short connections taken from it and closed",
	Story: mixedPoolStory,
	New:   func() Experiment { return newMixedPool() },
	Variants: []Variant{
		{Name: "incident", Role: results.Incident, Set: []string{"short=2096", "keep=2096", "instances=16", "for=70s"},
			Summary: "as many callers that close as callers that keep: half of all calls dial, and as many TIME_WAITs pile up as the article had (70 s)"},
		{Name: "one-in-ten", Role: results.Incident, Set: []string{"short=100", "keep=900", "instances=2"},
			Summary: "one caller in ten closes: a tenth of all calls dials, a connection is used ten times"},
		{Name: "nine-in-ten", Role: results.Incident, Set: []string{"short=900", "keep=100", "instances=2"},
			Summary: "nine callers in ten close: the pool is as good as none, for those who keep as well"},
		{Name: "nginx", Role: results.Incident, Set: []string{"pool=nginx"},
			Summary: "the real thing: nginx with two workers and its Lua cosockets"},
		{Name: "nginx-resty", Role: results.Incident, Set: []string{"pool=resty"},
			Summary: "the same with lua-resty-redis, as the article had it"},
		{Name: "go-redis-ephemeral", Role: results.Incident, Set: []string{"pool=go-redis-ephemeral"},
			Summary: "the same trap in Go: go-redis's EphemeralConn takes an idle connection of the pool and closes it"},
		{Name: "bigger-pool", Role: results.FalseLead, Set: []string{"size=1000", "idle=10m"},
			Summary: "a remedy that suggests itself: a larger pool that keeps longer: there is nothing in it to keep"},
		{Name: "pool-too-small", Role: results.FalseLead, Set: []string{"short=0", "keep=0", "burst=80", "size=30", "instances=1", "workers=1"},
			Summary: "looks alike: more calls at once than the pool holds; but then more connections are open than it has places"},
		{Name: "server-timeout", Role: results.FalseLead, Set: []string{"short=0", "keep=0", "burst=80", "every=4500ms", "instances=1", "workers=1", "timeout=1", "for=5s"},
			Summary: "looks alike: Redis closes idle connections after a second; but then the TIME_WAITs are those of Redis"},
		{Name: "pool-per-request", Role: results.FalseLead, Set: []string{"short=0", "keep=1000", "per-request=true"},
			Summary: "looks alike: lua_code_cache off, each request has a pool of its own; but then no connection is ever used twice"},
		{Name: "nginx-per-request", Role: results.FalseLead, Set: []string{"pool=nginx", "short=0", "keep=60", "per-request=true"},
			Summary: "the same with the real nginx"},
		{Name: "separate", Role: results.Fix, Set: []string{"separate=true"},
			Summary: "callers that close have a pool of their own: the others do not dial any more; those who close still do, and so the TIME_WAITs stay"},
		{Name: "nginx-separate", Role: results.Fix, Set: []string{"pool=nginx", "separate=true"},
			Summary: "the same with the real nginx"},
		{Name: "all-keep", Role: results.Fix, Set: []string{"short=0", "keep=1000"},
			Summary: "everybody gives back: nobody dials, there is no TIME_WAIT, and connections grow as old as the run"},
		{Name: "redigo", Role: results.Fix, Set: []string{"pool=redigo"},
			Summary: "the same callers through redigo: who closes has dialed for himself, the pool is left alone"},
		{Name: "go-redis", Role: results.Fix, Set: []string{"pool=go-redis"},
			Summary: "the same callers through go-redis"},
		{Name: "all-close", Role: results.Control, Set: []string{"short=1000", "keep=0"},
			Summary: "a control: nobody gives back, every call dials, and that is what was asked for"},
		{Name: "placebo", Role: results.Control, Set: []string{"syn-backlog=65536"},
			Summary: "the placebo control: tcp_max_syn_backlog raised on the web server: half of the callers that keep must still dial"},
	},
}

// The pools that a web server can have.
const (
	poolCosocket = "cosocket" // the policy of nginx's Lua cosockets
	poolRedigo   = "redigo"
	poolGoRedis  = "go-redis"
	poolNginx    = "nginx" // a real nginx, with cosockets
	poolResty    = "resty" // a real nginx, with lua-resty-redis

	poolEphemeral = "go-redis-ephemeral" // go-redis, whose callers that close use Client.EphemeralConn
)

// mixedPool is the parameters of the scenario. It has two shapes of load: callers
// of both kinds at random times, or, if Burst is not 0, bursts of callers that
// keep.
type mixedPool struct {
	Pool       string
	Short      float64
	Keep       float64
	For        time.Duration
	Burst      int
	Every      time.Duration
	Hold       time.Duration
	Instances  int
	Workers    int
	Size       int
	Idle       time.Duration
	Separate   bool
	PerRequest bool
	Timeout    int
	SYNBacklog int
}

func newMixedPool() *mixedPool {
	return &mixedPool{
		Pool: poolCosocket, Short: 500, Keep: 500, For: 3 * time.Second, Every: 200 * time.Millisecond, Hold: 100 * time.Millisecond,
		Instances: 4, Workers: 2, Size: 100, Idle: time.Minute, SYNBacklog: 512,
	}
}

// Flags implements [Experiment].
func (m *mixedPool) Flags(fs *flag.FlagSet) {
	fs.StringVar(&m.Pool, "pool", m.Pool, "the web server's `pool`: cosocket, redigo, go-redis, go-redis-ephemeral, nginx or resty: connlab's model of nginx's Lua cosockets, a Go library, or the real nginx with cosockets or lua-resty-redis")
	fs.Float64Var(&m.Short, "short", m.Short, "s: calls per second that close their connection (0 to 5000)")
	fs.Float64Var(&m.Keep, "keep", m.Keep, "ℓ: calls per second that give it back (0 to 5000)")
	fs.DurationVar(&m.For, "for", m.For, "T: how long callers come (1s to 2m)")
	fs.IntVar(&m.Burst, "burst", m.Burst, "K: instead of short and keep: so many calls at once that give their connection back (0 to 1000)")
	fs.DurationVar(&m.Every, "every", m.Every, "time between two bursts (100ms to 1m)")
	fs.DurationVar(&m.Hold, "hold", m.Hold, "in a burst: how long a caller keeps its connection beyond the reply (10ms to 1s)")
	fs.IntVar(&m.Instances, "instances", m.Instances, "k: Redis `instances`, each with a pool of its own in every worker (1 to 64)")
	fs.IntVar(&m.Workers, "workers", m.Workers, "W: worker processes of nginx, each with pools of its own; Go libraries have one (1 to 16)")
	fs.IntVar(&m.Size, "size", m.Size, "m: `connections` that a pool keeps at most (1 to 10000)")
	fs.DurationVar(&m.Idle, "idle", m.Idle, "how long a pool keeps an idle connection (1s to 1h)")
	fs.BoolVar(&m.Separate, "separate", m.Separate, "callers that close have a pool of their own")
	fs.BoolVar(&m.PerRequest, "per-request", m.PerRequest, "every request has a pool of its own, as with lua_code_cache off")
	fs.IntVar(&m.Timeout, "timeout", m.Timeout, "`seconds` after which Redis closes an idle connection, 0 for never (0 to 3600)")
	fs.IntVar(&m.SYNBacklog, "syn-backlog", m.SYNBacklog, "net.ipv4.tcp_max_syn_backlog of the web server (1 to 1000000)")
}

// Check implements [Experiment].
func (m *mixedPool) Check() error {
	var found checks
	found.among("pool", m.Pool, poolCosocket, poolRedigo, poolGoRedis, poolEphemeral, poolNginx, poolResty)
	found.within("short", m.Short, 0, 5000)
	found.within("keep", m.Keep, 0, 5000)
	found.lasting("for", m.For, time.Second, 2*time.Minute)
	found.within("burst", float64(m.Burst), 0, 1000)
	found.lasting("every", m.Every, 100*time.Millisecond, time.Minute)
	found.lasting("hold", m.Hold, 10*time.Millisecond, time.Second)
	found.within("instances", float64(m.Instances), 1, 64)
	found.within("workers", float64(m.Workers), 1, 16)
	found.within("size", float64(m.Size), 1, 10_000)
	found.lasting("idle", m.Idle, time.Second, time.Hour)
	found.within("timeout", float64(m.Timeout), 0, 3600)
	found.within("syn-backlog", float64(m.SYNBacklog), 1, 1e6)
	switch {
	case m.Burst == 0 && m.Short+m.Keep == 0:
		found.bad("nobody calls: set short, keep or burst")
	case m.Burst > 0 && m.Short+m.Keep > 0:
		found.bad("bursts are a load of their own: with burst set short=0 and keep=0")
	case m.Burst > 0 && (m.Pool != poolCosocket || m.Instances*m.Workers > 1 || m.PerRequest || m.Separate):
		found.bad("bursts are for one pool: set pool=cosocket, instances=1 and workers=1")
	case m.Burst > 0 && m.Hold >= m.Every:
		found.bad("hold=%v must be shorter than every=%v, or one burst runs into the next", m.Hold, m.Every)
	case m.Burst > 0 && m.Timeout > 0 && m.Every < time.Duration(m.Timeout)*time.Second+timeoutSlack && m.Every > time.Duration(m.Timeout)*time.Second:
		found.bad("every=%v is neither below timeout=%d s nor %v above it: whether Redis closes in time would be a matter of luck", m.Every, m.Timeout, timeoutSlack)
	case m.Burst == 0 && m.Timeout > 0:
		found.bad("timeout is about idle connections: use bursts")
	case m.goLibrary() && (m.Separate || m.PerRequest):
		found.bad("separate and per-request are about nginx: not with pool=%s", m.Pool)
	case m.PerRequest && m.Short > 0:
		found.bad("with per-request=true every call closes in the end: set short=0")
	case m.Separate && m.PerRequest:
		found.bad("separate and per-request contradict each other")
	}
	switch pools := float64(m.pools()); {
	case m.shares() && m.Short*m.For.Seconds() < 20*pools:
		found.bad("%.0f calls that close, for %v pools: their first dials would count; set short or for higher, or instances or workers lower", m.Short*m.For.Seconds(), pools)
	case m.Burst == 0 && m.Size < 10:
		found.bad("size=%d: calls that overlap by chance would find no place; to see that, set burst", m.Size)
	case m.Burst > 0 && m.Idle < m.Every+time.Second:
		found.bad("idle=%v must be a second longer than every=%v, or the pool closes between two bursts", m.Idle, m.Every)
	case m.Burst > 0 && m.For > 50*time.Second:
		found.bad("for=%v: with bursts 50s at most, before the first TIME_WAITs end", m.For)
	case m.Burst == 0 && m.For > 50*time.Second && m.For < 66*time.Second:
		found.bad("for=%v: after 50s the first TIME_WAITs end, and before 66s how many is chance", m.For)
	}
	closing := m.Short
	if m.PerRequest {
		closing += m.Keep
	}
	kept := min(m.For, timeWaitLength+5*time.Second).Seconds()
	if tw := closing * kept; tw > 250_000 {
		found.bad("%.0f TIME_WAITs, and the web server has 262144 buckets: lower the rate or for", tw)
	}
	if per := (m.Short + m.Keep) * kept / float64(m.Instances); per > 18_000 {
		found.bad("up to %.0f connections to each instance: their TIME_WAITs take its ports; set more instances", per)
	}
	return found.err()
}

// timeoutSlack is by how much Redis may close later than its timeout: it counts
// whole seconds, and looks at a part of its clients ten times a second (server.c,
// clientsCron).
const timeoutSlack = 3 * time.Second

func (m *mixedPool) goLibrary() bool {
	return m.Pool == poolRedigo || m.Pool == poolGoRedis || m.Pool == poolEphemeral
}

func (m *mixedPool) realNginx() bool { return m.Pool == poolNginx || m.Pool == poolResty }

// pools is how many pools the callers that keep are spread over.
func (m *mixedPool) pools() int {
	if m.goLibrary() {
		return m.Instances
	}
	return m.Instances * m.Workers
}

// Seeds of the arrivals: any other two would do.
const (
	keepSeed  = 3
	shortSeed = 4
)

// bursts is how many there are.
func (m *mixedPool) bursts() int { return int(math.Ceil(m.For.Seconds() / m.Every.Seconds())) }

// keeping and closing are when callers of either kind come.
func (m *mixedPool) keeping() loadgen.Schedule {
	if m.Burst == 0 {
		return loadgen.Poisson(m.Keep, m.For, keepSeed)
	}
	var parts []loadgen.Schedule
	for i := range m.bursts() {
		parts = append(parts, loadgen.Burst(m.Burst, time.Duration(i)*m.Every))
	}
	return loadgen.Merge(parts...)
}

func (m *mixedPool) closing() loadgen.Schedule {
	if m.Burst > 0 {
		return loadgen.Burst(0, 0)
	}
	return loadgen.Poisson(m.Short, m.For, shortSeed)
}

// Topology implements [Experiment]: users, whom the real nginx needs, a web server,
// and one host that is all Redis instances.
func (m *mixedPool) Topology() netlab.Topology {
	t := netlab.Topology{
		Switches: []netlab.SwitchSpec{{Name: lanName, Subnet: collisionLAN}},
		Hosts: []netlab.HostSpec{redisHost(), webHost("web", map[string]string{
			// Twice the article's: no bucket may be missing here.
			"net.ipv4.tcp_max_tw_buckets":  strconv.Itoa(262_144),
			"net.ipv4.tcp_max_syn_backlog": strconv.Itoa(m.SYNBacklog),
		})},
	}
	if m.realNginx() {
		t.Hosts = append(t.Hosts, netlab.HostSpec{Name: "users", Links: []netlab.LinkSpec{{Switch: lanName}}})
	}
	return t
}
