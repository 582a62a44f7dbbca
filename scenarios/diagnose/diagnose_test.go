package diagnose

import (
	"maps"
	"os"
	"strings"
	"testing"
	"unicode/utf8"

	"github.com/google/go-cmp/cmp"
	"github.com/stretchr/testify/assert"
	"github.com/stretchr/testify/require"

	"connlab/netlab/observe"
)

// defaults are a new namespace's, and counters that a Linux 6.18 prints: all of
// them zero.
func defaults() Snapshot {
	s := Snapshot{
		Counters: observe.Counters{"TcpExt.PAWSActive": 0, "sockstat.TCP.inuse": 0, "sockstat.TCP.tw": 0},
		Sysctls:  map[string]string{portRange: "32768\t60999", maxBuckets: "131072", twReuse: "2"},
	}
	for _, name := range used() {
		if name != "TcpExt.PAWSPassive" { // gone since 4.12
			s.Counters[name] = 0
		}
	}
	return s
}

// state is a snapshot as far as it differs from defaults.
type state struct {
	counters map[string]int64
	sysctls  map[string]string
	missing  []string // counters and sysctls that were not saved
}

func (st state) snapshot() Snapshot {
	s := defaults()
	maps.Copy(s.Counters, st.counters)
	maps.Copy(s.Sysctls, st.sysctls)
	for _, name := range st.missing {
		delete(s.Counters, name)
		delete(s.Sysctls, name)
	}
	return s
}

// only is the counters and nothing else.
func only(counters map[string]int64) state {
	st := state{counters: counters, missing: []string{portRange, maxBuckets, twReuse}}
	for name := range defaults().Counters {
		if _, there := counters[name]; !there {
			st.missing = append(st.missing, name)
		}
	}
	return st
}

type counts = map[string]int64

// Most numbers are those that runs of connlab measured on Linux 6.18
// (results/golden), of the host that is named.
var cases = []struct {
	why     string
	now     state
	before  *state
	verdict string
	left    []Incident // that fit or are possible
	decide  string
}{
	{
		why: "backlog, the server: 3,500 connections stand, 4,468 short ones came, 2,694 attempts were dropped",
		now: state{counters: counts{"Tcp.PassiveOpens": 7968, "Tcp.CurrEstab": 3500, "TcpExt.ListenOverflows": 2694, "TcpExt.ListenDrops": 2694}},

		verdict: "backlog", left: []Incident{Backlog}, decide: "event loop",
	},
	{
		why:    "the same by difference: the standing ones were there before",
		now:    state{counters: counts{"Tcp.PassiveOpens": 7968, "Tcp.CurrEstab": 3502, "TcpExt.ListenOverflows": 2700, "TcpExt.ListenDrops": 2700}},
		before: &state{counters: counts{"Tcp.PassiveOpens": 3500, "Tcp.CurrEstab": 3500, "TcpExt.ListenOverflows": 6, "TcpExt.ListenDrops": 6}},

		verdict: "backlog", left: []Incident{Backlog}, decide: "event loop",
	},
	{
		why: "backlog with clients that give up: a quarter of the connections is reset",
		now: state{counters: counts{"Tcp.PassiveOpens": 5609, "Tcp.CurrEstab": 3500, "Tcp.EstabResets": 513, "TcpExt.ListenOverflows": 2351, "TcpExt.ListenDrops": 2351}},

		verdict: NotEnough, left: []Incident{Backlog, AcceptQueue}, decide: "Tcp.CurrEstab against Tcp.PassiveOpens",
	},
	{
		why: "backlog with a burst beyond the SYN queue: cookies are sent, and answered more than once each",
		now: state{counters: counts{"Tcp.PassiveOpens": 1000, "TcpExt.ListenOverflows": 2440, "TcpExt.ListenDrops": 2440,
			"TcpExt.TCPReqQFullDoCookies": 488, "TcpExt.SyncookiesSent": 488, "TcpExt.SyncookiesRecv": 2928}},

		verdict: "backlog", left: []Incident{Backlog}, decide: "event loop",
	},
	{
		why: "accept-queue: 150,000 stand; all were reset once and came back",
		now: state{counters: counts{"Tcp.PassiveOpens": 300_700, "Tcp.CurrEstab": 150_000, "Tcp.EstabResets": 150_000,
			"TcpExt.ListenOverflows": 493_989, "TcpExt.ListenDrops": 493_997}},

		verdict: "accept-queue", left: []Incident{AcceptQueue}, decide: "somaxconn",
	},
	{
		why: "accept-queue: a fifth was closed by the server and came back, while a prober made 600 short connections",
		now: state{counters: counts{"Tcp.PassiveOpens": 180_600, "Tcp.CurrEstab": 150_001, "TcpExt.TW": 30_000,
			"TcpExt.ListenOverflows": 20_000, "TcpExt.ListenDrops": 20_000}},

		verdict: "accept-queue", left: []Incident{AcceptQueue}, decide: "somaxconn",
	},
	{
		why: "accept-queue: the wire was cut, so the server still holds the old half of each connection",
		now: state{counters: counts{"Tcp.PassiveOpens": 180_000, "Tcp.CurrEstab": 180_000, "TcpExt.ListenOverflows": 9, "TcpExt.ListenDrops": 9}},

		verdict: "accept-queue", left: []Incident{AcceptQueue}, decide: "somaxconn",
	},
	{
		why: "a web server that closes each connection itself has short ones, however many TIME_WAITs that makes",
		now: state{counters: counts{"Tcp.PassiveOpens": 1_000_000, "Tcp.CurrEstab": 200, "TcpExt.TW": 999_000,
			"TcpExt.ListenOverflows": 50, "TcpExt.ListenDrops": 50}},

		verdict: "backlog", left: []Incident{Backlog}, decide: "event loop",
	},
	{
		why: "the two counters that everybody greps for, and nothing else: backlog or accept-queue",
		now: only(counts{"TcpExt.ListenOverflows": 344_683, "TcpExt.ListenDrops": 344_683, "TcpExt.TCPReqQFullDrop": 0, "TcpExt.TCPReqQFullDoCookies": 0,
			"TcpExt.TCPSYNChallenge": 0, "Tcp.ActiveOpens": 0}),

		verdict: NotEnough, left: []Incident{Backlog, AcceptQueue, TWRecycle}, decide: "Tcp.CurrEstab against Tcp.PassiveOpens",
	},
	{
		why: "the same server by nstat -az, which never prints CurrEstab: who is long-lived cannot be told",
		now: state{counters: counts{"Tcp.PassiveOpens": 7968, "TcpExt.ListenOverflows": 2694, "TcpExt.ListenDrops": 2694},
			missing: []string{"Tcp.CurrEstab"}},

		verdict: NotEnough, left: []Incident{Backlog, AcceptQueue}, decide: "nstat leaves CurrEstab out",
	},
	{
		why: "tuple-collision, the proxies: 51 collisions, two SYNs each",
		now: state{counters: counts{"Tcp.ActiveOpens": 20_000, "Tcp.PassiveOpens": 20_000, "TcpExt.TW": 20_001, "sockstat.TCP.tw": 1334,
			"TcpExt.TCPSYNChallenge": 102, "TcpExt.TCPChallengeACK": 102}},

		verdict: "tuple-collision", left: []Incident{TupleCollision}, decide: "capture",
	},
	{
		why: "a client whose server's accept queue overflows: SYN-ACKs that are sent again are challenged, but nothing connects to this host",
		now: state{counters: counts{"Tcp.ActiveOpens": 700, "TcpExt.TW": 132, "sockstat.TCP.tw": 132,
			"TcpExt.TCPSYNChallenge": 188, "TcpExt.TCPChallengeACK": 188, "TcpExt.TCPSynRetrans": 0}},

		verdict: NotEnough, left: []Incident{}, decide: "no incident fits, but TCPSYNChallenge 188",
	},
	{
		why: "client and server in one namespace, an overflow and its challenged SYN-ACKs: not a collision",
		now: state{counters: counts{"Tcp.ActiveOpens": 5_912_043, "Tcp.PassiveOpens": 5_849_695, "Tcp.EstabResets": 6_539_268, "TcpExt.TW": 2_468_050,
			"TcpExt.ListenOverflows": 129_257, "TcpExt.ListenDrops": 129_257, "TcpExt.TCPSYNChallenge": 527, "TcpExt.TCPChallengeACK": 535,
			"TcpExt.TCPReqQFullDoCookies": 3727, "TcpExt.SyncookiesSent": 3727, "TcpExt.SyncookiesRecv": 7842}},

		verdict: "backlog", left: []Incident{Backlog}, decide: "event loop",
	},
	{
		why: "mixed-pool part b, the web server: buckets full, and a RST for each close beyond",
		now: state{counters: counts{"Tcp.ActiveOpens": 150_000, "TcpExt.TW": 131_072, "sockstat.TCP.tw": 131_072,
			"TcpExt.TCPTimeWaitOverflow": 18_928, "Tcp.OutRsts": 18_928}},

		verdict: "mixed-pool", left: []Incident{MixedPool}, decide: "CLIENT LIST",
	},
	{
		why: "the same, and Redis closes at once: overflow without RSTs",
		now: state{counters: counts{"Tcp.ActiveOpens": 1500, "TcpExt.TW": 1311, "sockstat.TCP.tw": 1311, "TcpExt.TCPTimeWaitOverflow": 189},
			sysctls: map[string]string{maxBuckets: "1311"}},

		verdict: "mixed-pool", left: []Incident{MixedPool}, decide: "CLIENT LIST",
	},
	{
		why: "overflow is enough to tell it from used-up ports, without any sysctl",
		now: state{counters: counts{"Tcp.ActiveOpens": 150_000, "TcpExt.TW": 131_072, "TcpExt.TCPTimeWaitOverflow": 18_928},
			missing: []string{portRange, maxBuckets, twReuse, "sockstat.TCP.tw", "sockstat.TCP.inuse"}},

		verdict: "mixed-pool", left: []Incident{MixedPool}, decide: "CLIENT LIST",
	},
	{
		why: "mixed-pool part a, the web server: 127,600 TIME_WAITs to 16 instances, and buckets for twice as many",
		now: state{counters: counts{"Tcp.ActiveOpens": 146_400, "TcpExt.TW": 146_384, "sockstat.TCP.tw": 127_600, "sockstat.TCP.inuse": 40},
			sysctls: map[string]string{maxBuckets: "262144"}},

		verdict: "mixed-pool", left: []Incident{MixedPool, UndersizedPool}, decide: "CLIENT LIST",
	},
	{
		why: "the article of incident 3: 127,866 TIME_WAITs of 131,072",
		now: state{counters: counts{"Tcp.ActiveOpens": 9_000_000, "Tcp.PassiveOpens": 8_000_000, "TcpExt.TW": 8_900_000, "sockstat.TCP.tw": 127_866},
			missing: []string{portRange}},

		verdict: "mixed-pool", left: []Incident{MixedPool, UndersizedPool}, decide: "CLIENT LIST",
	},
	{
		why: "undersized-pool, in 100 ports: 84 TIME_WAITs and 16 idle connections",
		now: state{counters: counts{"Tcp.ActiveOpens": 100, "TcpExt.TW": 84, "sockstat.TCP.tw": 84, "sockstat.TCP.inuse": 16},
			sysctls: map[string]string{portRange: "40000\t40099", twReuse: "0"}},

		verdict: "undersized-pool", left: []Incident{MixedPool, UndersizedPool}, decide: "EADDRNOTAVAIL",
	},
	{
		why: "undersized-pool, the article's node: 60,000 users, over 20,000 TIME_WAITs, 25,232 ports",
		now: state{counters: counts{"Tcp.ActiveOpens": 400_000, "Tcp.PassiveOpens": 500_000, "Tcp.CurrEstab": 60_000, "TcpExt.TW": 399_000,
			"sockstat.TCP.tw": 20_800, "sockstat.TCP.inuse": 60_100},
			sysctls: map[string]string{portRange: "35768 60999", twReuse: "0"}},

		verdict: "undersized-pool", left: []Incident{MixedPool, UndersizedPool}, decide: "EADDRNOTAVAIL",
	},
	{
		why: "60,000 users take no local ports: half of the ports in TIME_WAIT are no shortage yet",
		now: state{counters: counts{"Tcp.ActiveOpens": 400_000, "Tcp.PassiveOpens": 500_000, "Tcp.CurrEstab": 60_000, "TcpExt.TW": 399_000,
			"sockstat.TCP.tw": 13_000, "sockstat.TCP.inuse": 60_100},
			sysctls: map[string]string{portRange: "35768 60999", twReuse: "0"}},

		verdict: NotEnough, left: []Incident{MixedPool, UndersizedPool}, decide: "EADDRNOTAVAIL",
	},
	{
		why: "the same without the port range: too few ports, or too many closes",
		now: state{counters: counts{"Tcp.ActiveOpens": 400_000, "TcpExt.TW": 399_000, "sockstat.TCP.tw": 20_800, "sockstat.TCP.inuse": 60_100},
			missing: []string{portRange}},

		verdict: NotEnough, left: []Incident{MixedPool, UndersizedPool}, decide: "sysctl net.ipv4.ip_local_port_range",
	},
	{
		why: "two thirds of the ports, and few sockets in use: on the way there",
		now: state{counters: counts{"Tcp.ActiveOpens": 40_000, "TcpExt.TW": 39_000, "sockstat.TCP.tw": 18_800, "sockstat.TCP.inuse": 60}},

		verdict: NotEnough, left: []Incident{MixedPool, UndersizedPool}, decide: "EADDRNOTAVAIL",
	},
	{
		why: "syn-flood with cookies: next to none comes back",
		now: state{counters: counts{"Tcp.PassiveOpens": 500, "TcpExt.TCPReqQFullDoCookies": 90_000, "TcpExt.SyncookiesSent": 90_000, "TcpExt.SyncookiesRecv": 40}},

		verdict: "syn-flood", left: []Incident{SYNFlood}, decide: "syn-recv",
	},
	{
		why: "syn-flood without cookies: drops that no accept queue explains",
		now: state{counters: counts{"Tcp.PassiveOpens": 500, "TcpExt.TCPReqQFullDrop": 90_000, "TcpExt.ListenDrops": 90_100, "TcpExt.ListenOverflows": 100}},

		verdict: "syn-flood", left: []Incident{SYNFlood}, decide: "syn-recv",
	},
	{
		why: "a burst of real clients: the SYN queue was full, and they answered",
		now: state{counters: counts{"Tcp.PassiveOpens": 5000, "TcpExt.TCPReqQFullDoCookies": 300, "TcpExt.SyncookiesSent": 300, "TcpExt.SyncookiesRecv": 300}},

		verdict: NotEnough, left: []Incident{}, decide: "no incident fits, but TCPReqQFullDrop 0, TCPReqQFullDoCookies 300",
	},
	{
		why: "tw_recycle on a 3.10: the drops are counted as rejected for their timestamp, no queue was full",
		now: state{counters: counts{"Tcp.PassiveOpens": 5000, "TcpExt.PAWSPassive": 812, "TcpExt.ListenDrops": 812}},

		verdict: "tw_recycle", left: []Incident{TWRecycle}, decide: "tcp_tw_recycle",
	},
	{
		why: "a 3.10 without trouble",
		now: state{counters: counts{"Tcp.PassiveOpens": 5000, "TcpExt.PAWSPassive": 0}},

		verdict: "healthy", left: []Incident{}, decide: "other end",
	},
	{
		why: "backlog without a stall: the server",
		now: state{counters: counts{"Tcp.PassiveOpens": 5100, "Tcp.CurrEstab": 3500}},

		verdict: "healthy", left: []Incident{}, decide: "other end",
	},
	{
		why: "a server that opens nothing needs no local ports: the kernel's counters are enough",
		now: state{counters: counts{"Tcp.PassiveOpens": 5100, "Tcp.CurrEstab": 3500},
			missing: []string{portRange, maxBuckets, twReuse, "sockstat.TCP.tw", "sockstat.TCP.inuse"}},

		verdict: "healthy", left: []Incident{}, decide: "other end",
	},
	{
		why: "a client with short connections and ports to spare",
		now: state{counters: counts{"Tcp.ActiveOpens": 1600, "TcpExt.TW": 1600, "sockstat.TCP.tw": 1600, "TcpExt.TCPSynRetrans": 3}},

		verdict: "healthy", left: []Incident{}, decide: "other end",
	},
	{
		why: "the same client with nstat alone: ports that run out are counted nowhere",
		now: state{counters: counts{"Tcp.ActiveOpens": 1600, "TcpExt.TW": 1600},
			missing: []string{portRange, maxBuckets, twReuse, "sockstat.TCP.tw", "sockstat.TCP.inuse"}},

		verdict: NotEnough, left: []Incident{MixedPool, UndersizedPool}, decide: "sysctl net.ipv4.ip_local_port_range",
	},
	{
		why: "since boot two things happened: which of them now?",
		now: state{counters: counts{"Tcp.PassiveOpens": 90_000, "Tcp.ActiveOpens": 80_000, "TcpExt.TW": 79_000, "TcpExt.TCPTimeWaitOverflow": 500,
			"TcpExt.ListenOverflows": 1000, "TcpExt.ListenDrops": 1000}},

		verdict: NotEnough, left: []Incident{Backlog, MixedPool}, decide: "--before",
	},
	{
		why: "the same by difference: the overflow is long over",
		now: state{counters: counts{"Tcp.PassiveOpens": 90_000, "Tcp.ActiveOpens": 80_000, "TcpExt.TW": 79_000, "TcpExt.TCPTimeWaitOverflow": 500,
			"TcpExt.ListenOverflows": 1000, "TcpExt.ListenDrops": 1000}},
		before: &state{counters: counts{"Tcp.PassiveOpens": 89_000, "Tcp.ActiveOpens": 70_000, "TcpExt.TW": 69_400,
			"TcpExt.ListenOverflows": 1000, "TcpExt.ListenDrops": 1000}},

		verdict: "mixed-pool", left: []Incident{MixedPool}, decide: "CLIENT LIST",
	},
	{
		why: "sockstat alone",
		now: only(counts{"sockstat.TCP.tw": 20_000, "sockstat.TCP.inuse": 10}),

		verdict: NotEnough,
		left:    []Incident{Backlog, AcceptQueue, TupleCollision, MixedPool, UndersizedPool, SYNFlood, TWRecycle},
		decide:  "nstat -az",
	},
}

func TestDiagnose(t *testing.T) {
	for _, tt := range cases {
		var before *Snapshot
		if tt.before != nil {
			s := tt.before.snapshot()
			before = &s
		}
		d, err := Diagnose(tt.now.snapshot(), before)
		require.NoError(t, err, tt.why)
		assert.Equal(t, tt.verdict, d.Verdict, tt.why)
		assert.Equal(t, tt.left, d.Left(), tt.why)
		assert.Contains(t, d.Decide, tt.decide, tt.why)
		assert.Equal(t, tt.before == nil, d.SinceBoot, tt.why)
		for _, found := range d.Findings {
			checkFinding(t, tt.why, found)
		}
	}
}

// checkFinding holds a finding's verdict against its own observations.
func checkFinding(t *testing.T, why string, found Finding) {
	t.Helper()
	contradicted := false
	for _, o := range found.Against {
		contradicted = contradicted || o.Necessary
	}
	want := Fits
	switch {
	case contradicted:
		want = Excluded
	case len(found.Open) > 0:
		want = Possible
	}
	assert.Equal(t, want, found.Verdict, "%s: %s", why, found.Incident)
	for _, o := range append(append(append([]Observation{}, found.For...), found.Against...), found.Open...) {
		assert.NotEmpty(t, o.Says, "%s: %s: %s", why, found.Incident, o.Rule)
		assert.NotEmpty(t, o.Counter, "%s: %s: %s", why, found.Incident, o.Rule)
		assert.Contains(t, o.Source, "/", "%s: %s: %s names a file of the kernel", why, found.Incident, o.Rule)
	}
}

// What is missing is missing, not zero: without a counter an incident can only
// become possible, never fit or be excluded where it was not before.
func TestMissingIsNotZero(t *testing.T) {
	moved := 0
	for _, tt := range cases {
		now := tt.now.snapshot()
		full, err := Diagnose(now, nil)
		require.NoError(t, err)
		for name := range now.Counters {
			if name == "TcpExt.PAWSPassive" {
				continue // where PAWSActive is printed and it is not, the kernel has no such rule
			}
			less := Snapshot{Counters: maps.Clone(now.Counters), Sysctls: now.Sysctls}
			delete(less.Counters, name)
			d, err := Diagnose(less, nil)
			require.NoError(t, err)
			for i, found := range d.Findings {
				if found.Verdict != full.Findings[i].Verdict {
					moved++
					assert.Equal(t, Possible, found.Verdict, "%s: %s without %s was %s", tt.why, found.Incident, name, full.Findings[i].Verdict)
				}
			}
		}
	}
	assert.Greater(t, moved, 100, "removing counters hardly matters")
}

// Each incident is some case's verdict, and so is that there is not enough.
func TestCasesCoverTheTable(t *testing.T) {
	seen := map[string]bool{}
	for _, tt := range cases {
		seen[tt.verdict] = true
	}
	for _, s := range signatures() {
		assert.True(t, seen[string(s.incident)], s.incident)
		assert.NotEmpty(t, s.confirm)
		assert.NotEmpty(t, s.ask)
	}
	assert.True(t, seen[NotEnough])
}

func TestDiagnoseBackwards(t *testing.T) {
	before := state{counters: counts{"TcpExt.ListenDrops": 5}}.snapshot()
	now := state{counters: counts{"TcpExt.ListenDrops": 4}}.snapshot()
	_, err := Diagnose(now, &before)
	assert.ErrorContains(t, err, "TcpExt.ListenDrops was 5 and is 4")

	gauges := state{counters: counts{"Tcp.CurrEstab": 9, "sockstat.TCP.tw": 9}}.snapshot()
	_, err = Diagnose(defaults(), &gauges)
	assert.NoError(t, err, "gauges may fall")
}

func TestListenerSpeaksForOverflow(t *testing.T) {
	s := state{counters: counts{"Tcp.PassiveOpens": 7968, "TcpExt.ListenOverflows": 2694, "TcpExt.ListenDrops": 2694}}.snapshot()
	s.Listeners = []Listener{{"0.0.0.0:22", 0, 128}, {"0.0.0.0:6379", 512, 511}}
	d, err := Diagnose(s, nil)
	require.NoError(t, err)
	values := []string{}
	for _, o := range d.Findings[0].For {
		values = append(values, o.Value)
	}
	assert.Contains(t, values, "0.0.0.0:6379: 512 in a queue of 511+1", "the fullest one is named")

	s.Listeners[1].Queue = 511 // one place left
	d, err = Diagnose(s, nil)
	require.NoError(t, err)
	for _, o := range d.Findings[0].For {
		assert.NotEqual(t, listening, o.Counter, "511 of 512 places are not a full queue")
	}
}

func TestWrite(t *testing.T) {
	s, err := Parse(readTestdata(t, "backlog.proc.txt"), File{"more", []byte("TCP: inuse 3502 orphan 0 tw 0 alloc 3510 mem 9\n" +
		"LISTEN 512 511 0.0.0.0:6379 0.0.0.0:*\n")})
	require.NoError(t, err)
	d, err := Diagnose(s, nil)
	require.NoError(t, err)
	var out strings.Builder
	require.NoError(t, d.Write(&out))
	for line := range strings.Lines(out.String()) {
		assert.LessOrEqual(t, utf8.RuneCountInString(strings.TrimRight(line, "\n")), widthTable, line)
	}
	want, err := os.ReadFile("testdata/backlog.table")
	require.NoError(t, err)
	assert.Empty(t, cmp.Diff(string(want), out.String()))
}
