package scenarios

import (
	"bytes"
	"fmt"
	"math"
	"net"
	"net/netip"
	"os"
	"os/exec"
	"slices"
	"strconv"
	"strings"
	"testing"
	"time"

	"github.com/stretchr/testify/assert"
	"github.com/stretchr/testify/require"
	"github.com/vishvananda/netlink"

	"connlab/loadgen"
	"connlab/netlab"
	"connlab/netlab/observe"
	"connlab/results"
)

// TestTupleCollision reproduces incident 2: every variant against the mini
// server, and the heart of it with a real redis-server as the instances.
func TestTupleCollision(t *testing.T) {
	if underRace {
		// The same code, slowly: what the detector looks for is in the packets' path.
		// A machine that is too busy for the claims then says void, not refuted.
		rec := run(t, &TupleCollision, Options{
			Variants: []string{"incident", "forced-last", "layer-7", "full-nat"},
			Set:      []string{"rounds=2", "rate=150", "parallel=2"},
		})
		notRefuted(t, rec)
		return
	}
	t.Run(ServerMini, func(t *testing.T) {
		saved := savedCounts{}
		rec := run(t, &TupleCollision, Options{Counters: saved.save})
		allHeld(t, rec)
		checkGolden(t, rec)
		checkDiagnosis(t, rec, saved)
		wrongFormula(t, rec)
	})
	t.Run(ServerRedis, func(t *testing.T) {
		rec := run(t, &TupleCollision, Options{Server: ServerRedis, Variants: []string{"incident", "forced-first", "forced-last"}, Set: []string{"rounds=5", "parallel=5"}})
		allHeld(t, rec)
	})
}

// wrongFormula judges what was measured by the formula that everybody writes
// first: connect() may take any port of the range, so P is all of it. All rounds
// of the run with the default range are judged together, by the same judge.
func wrongFormula(t *testing.T, rec *results.Record) {
	t.Helper()
	for _, tt := range []struct {
		why  string
		step int
		want results.Verdict
	}{
		{"P/2: connect() takes every second port", 2, results.Held},
		{"P: every port", 1, results.Refuted},
	} {
		rules := goldenRules
		rules.ConnectPortStep = tt.step
		predicted, measured := 0.0, 0.0
		for _, name := range []string{"incident", "scaling", "slow", "long-connections", "placebo"} {
			arms, err := TupleCollision.prepare(Options{Variants: []string{name}})
			require.NoError(t, err)
			at := slices.IndexFunc(rec.Variants, func(v results.Variant) bool { return v.Name == name })
			require.GreaterOrEqual(t, at, 0, name)
			for _, p := range arms[0].experiment.Predict(arms[0].variant.Role, rules) {
				if p.Metric == metricCollisions || strings.HasPrefix(p.Metric, metricCollisions+".Of") {
					predicted += p.Predicted
					measured += rec.Variants[at].Metrics[p.Metric].Value
				}
			}
		}
		verdict := judged(predicted, measured)
		assert.Equal(t, tt.want, verdict, "%s: predicted %.1f, measured %.0f", tt.why, predicted, measured)
		t.Logf("%s: predicted %.1f, measured %.0f: %s", tt.why, predicted, measured, verdict)
	}
}

// judged is what the judge says of a count and its predicted mean.
func judged(predicted, measured float64) results.Verdict {
	v := results.Variant{
		Metrics: map[string]results.Metric{metricCollisions: {Value: measured, Unit: "connections"}},
		Predictions: []results.Prediction{{
			Metric: metricCollisions, Formula: "Σ R·pairs/P", Unit: "connections", Predicted: predicted, Tolerance: results.Poisson(testLevel),
		}},
	}
	v.Judge()
	return v.Verdict
}

// Why each round is another client's: rounds of one client within ten seconds are
// not independent. The pairs of destinations that get one port in a round are drawn
// anew only every ten seconds, and move apart but slowly.
func TestRoundsOfOneClientRepeat(t *testing.T) {
	require.NoError(t, stamp())
	const rounds, destinations = 8, 1000
	c := newCollision()
	c.Path, c.Rounds, c.Proxies = pathRedis, 2, 1
	repeated := func(clients int) (again, all int) {
		inCollisionLab(t, c, Options{}, func(r *collisionRun) {
			before := map[string]bool{}
			for round := range rounds {
				from, closeUnused, err := c.from(r.detectors[round%clients])
				require.NoError(t, err)
				byPort := map[uint16]int{}
				now := map[string]bool{}
				held, _, err := loadgen.Hold(t.Context(), loadgen.Config{
					Targets: c.targets(destinations), Sources: []loadgen.Source{from}, ConnectOnly: true, Close: loadgen.Reset,
					Schedule: loadgen.Constant(5000, time.Hour).First(destinations),
					OnOp: func(op loadgen.Op) {
						if other, taken := byPort[op.Local.Port()]; taken {
							now[fmt.Sprint(min(other, op.Index), max(other, op.Index))] = true
						}
						byPort[op.Local.Port()] = op.Index
					},
				})
				closeUnused()
				require.NoError(t, err)
				held.Close()
				for pair := range now {
					all++
					if before[pair] {
						again++
					}
				}
				before = now
			}
		})
		return again, all
	}
	again, all := repeated(1)
	t.Logf("one client: %d of %d pairs had one port in the round before as well", again, all)
	// Both move on by 2, 4 … 16 at random: by the same in one round of eight.
	assert.Greater(t, again, all/30, "far more than independent rounds would have, which is none")
	againOfTwo, allOfTwo := repeated(2)
	t.Logf("two clients in turn: %d of %d", againOfTwo, allOfTwo)
	assert.Less(t, againOfTwo, 3, "rounds of different clients are independent")
}

// The check must be able to fail: without a shared proxy the incident's symptom
// is missing.
func TestTupleCollisionCanFail(t *testing.T) {
	if underRace {
		t.Skip("the judge is the same with the race detector")
	}
	rec := run(t, &TupleCollision, Options{Variants: []string{"incident"}, Set: []string{"proxies=1000", "rounds=2"}})
	v := rec.Variants[0]
	assert.Equal(t, results.Refuted, v.Verdict, v.Reason)
	assert.Contains(t, v.Reason, metricTimedOut)
}

func TestTupleCollisionPredictions(t *testing.T) { comparePredictions(t, &TupleCollision) }

func TestTupleCollisionCheck(t *testing.T) {
	for _, tt := range []struct{ why, set, want string }{
		{"below the range", "vips=0", "vips=0 is out of range: 1 to 2000"},
		{"above the range", "proxies=1001", "proxies=1001 is out of range: 1 to 1000"},
		{"not a number at all", "rate=NaN", "rate=NaN is out of range: 1 to 5000"},
		{"no such way", "path=l5", "path=l5: there is: l4, fullnat"},
		{"no such policy", "reply=middle", "reply=middle: there is: first, last"},
		{"no time", "timeout=1ms", "timeout=1ms is out of range"},
		{"pairs without the balancer", "pairs=10 path=l7", "pairs collide only behind the transparent balancer"},
		{"too few ports for the formula", "port-range=40000-40100", "the formula is for many more ports than 101"},
		{"pairs without ports", "pairs=200 port-range=65400-65500", "pairs=200 need a port each, and port-range has 101"},
		{"pairs without a second VIP", "pairs=10 vips=20", "vips=20 is less than twice proxies=15"},
		{"two loads", "pairs=10 long=true", "pairs are a load of their own"},
		{"two loads again", "long=true sweep=100x2", "choose one"},
		{"nobody to hurt", "reply=last", "reply=last needs pairs"},
		{"a size that is none", "sweep=100x2,5000x2", "sweep=5000 is out of range: 1 to 2000"},
		{"more connections than a Redis serves", "vips=2000 parallel=5", "10000 connections would be open at once"},
		{"more detectors than ports", "sweep=1x200,2x200,3x200,4x200,5x200", "a detector for each round makes 1000"},
	} {
		t.Run(tt.why, func(t *testing.T) { refuses(t, &TupleCollision, tt.set, tt.want) })
	}
	for _, set := range []string{"port-range=1-2", "port-range=5000", "port-range=6000-5000", "port-range=60000-70000", "sweep=a", "sweep=100", "sweep=100x", "sweep=100x2,100x3"} {
		require.Error(t, apply(TupleCollision.New(), []string{set}), set)
	}
	for _, v := range TupleCollision.Variants {
		e := TupleCollision.New()
		require.NoError(t, apply(e, v.Set))
		assert.NoError(t, e.Check(), v.Name)
		assert.NoError(t, e.Topology().Check(), v.Name)
	}
}

// The formula by the article's numbers, and by counting pairs.
func TestExpectedCollisions(t *testing.T) {
	for _, tt := range []struct {
		why         string
		set         string
		step        int
		mean, delta float64
	}{
		{"the article: n = 1,000, k = 15, every second port", "", 2, 2.33, 0.005},
		{"every port", "ports=range", 2, 1.163, 0.001},
		{"a kernel before 4.2", "", 1, 1.163, 0.001},
		{"k divides n: k·(n/k)·(n/k−1)/2/P", "vips=900 proxies=15", 2, 15 * 60 * 59 / 2. / 14116, 1e-12},
		{"one proxy each", "proxies=1000", 2, 0, 0},
		{"a port of one's own", "ports=bind", 2, 0, 0},
		{"twice the instances, four times the collisions", "vips=2000", 2, 4 * 2.326, 0.08},
	} {
		e := newCollision()
		require.NoError(t, apply(e, strings.Fields(tt.set)))
		rules := goldenRules
		rules.ConnectPortStep = tt.step
		got := e.expected(e.VIPs, rules)
		assert.InDelta(t, tt.mean, got, tt.delta, tt.why)
	}
	article := newCollision()
	atLeastOne := -math.Expm1(-article.expected(1000, goldenRules))
	assert.InDelta(t, 0.9, atLeastOne, 0.005, "almost every round")
}

// The evidence of one collided connection, from both ends in one file.
func TestCaptureOfACollision(t *testing.T) {
	tshark, err := exec.LookPath("tshark")
	if err != nil {
		skip(t, (&netlab.NeedError{Need: netlab.NeedTshark, Err: err}).Error())
	}
	path := t.TempDir() + "/collision.pcapng"
	rec := run(t, &TupleCollision, Options{
		Variants: []string{"forced-first"}, Set: []string{"pairs=2", "timeout=1500ms"},
		Capture: func(_ string, file []byte) error { return os.WriteFile(path, file, 0o600) },
	})
	require.Equal(t, results.Held, rec.Variants[0].Verdict, rec.Variants[0].Reason)
	out, err := exec.CommandContext(t.Context(), tshark, "-r", path, "-Y", "tcp.flags.syn == 1", "-T", "fields", "-E", "separator=;",
		"-e", "frame.interface_name", "-e", "ip.dst", "-e", "tcp.flags.ack").Output()
	require.NoError(t, err)
	client, proxied := "detector-001 eth0", "proxy-02 eth0"
	assert.Equal(t, []string{
		client + ";10.8.0.1;0", proxied + ";10.0.2.2;0", proxied + ";10.0.0.1;1", client + ";10.0.0.1;1", // the first connection
		client + ";10.8.0.16;0", proxied + ";10.0.2.2;0", // SYN
		client + ";10.8.0.16;0", proxied + ";10.0.2.2;0", // SYN, after a second
	}, strings.Split(strings.TrimSpace(strings.ReplaceAll(strings.ReplaceAll(string(out), "True", "1"), "False", "0")), "\n"))
}

// TestCapture is what an engineer does who does not believe the balancer: capture
// at the proxies, and let Wireshark check every checksum and every option.
func TestCapture(t *testing.T) {
	if underRace {
		t.Skip("the same code as TestCaptureOfACollision, with ten thousand times the packets")
	}
	tshark, err := exec.LookPath("tshark")
	if err != nil {
		skip(t, (&netlab.NeedError{Need: netlab.NeedTshark, Err: err}).Error())
	}
	const rounds, instances = 10, 1000
	c := newCollision()
	c.Rounds = rounds
	path := t.TempDir() + "/proxies.pcapng"
	file, err := os.Create(path)
	require.NoError(t, err)
	defer file.Close()
	r := inCollisionLab(t, c, Options{}, func(r *collisionRun) {
		cfg := observe.CaptureConfig{Port: redisPort, Limit: 10_000_000}
		for _, h := range r.proxies {
			cfg.Points = append(cfg.Points, observe.CapturePoint{Host: h})
		}
		capture, err := observe.StartCapture(file, cfg)
		require.NoError(t, err)
		require.NoError(t, r.probe(t.Context()))
		stats, err := capture.Stop()
		require.NoError(t, err)
		require.False(t, stats.LimitReached)
		for _, p := range stats.Points {
			require.Zero(t, p.Dropped, "packets that the capture at %s missed", p.Host)
		}
	})
	require.GreaterOrEqual(t, len(r.attempts), rounds*instances)

	out, err := exec.CommandContext(t.Context(), tshark, "-r", path, "-o", "tcp.check_checksum:TRUE", "-o", "ip.check_checksum:TRUE",
		"-T", "fields", "-E", "occurrence=a", "-E", "separator=;",
		"-e", "ip.dst", "-e", "tcp.flags", "-e", "tcp.option_kind", "-e", "tcp.checksum.status", "-e", "ip.checksum.status", "-e", "_ws.malformed",
		"-e", "frame.number", "-e", "frame.interface_name", "-e", "frame.time_relative", "-e", "ip.src", "-e", "tcp.srcport", "-e", "tcp.checksum", "-e", "tcp.checksum_calculated").Output()
	require.NoError(t, err)
	const isGood = "1"
	var packets, syns, options, malformed int
	var bad []string
	for line := range strings.Lines(string(out)) {
		fields := strings.Split(strings.TrimSuffix(line, "\n"), ";")
		require.Len(t, fields, 13, line)
		packets++
		if strings.HasPrefix(fields[0], "10.0.2.") && fields[1] == "0x0002" {
			syns++
			if slices.Contains(strings.Split(fields[2], ","), "250") {
				options++
			}
		}
		// Linux writes a sum of 0 as 0xffff, which is the same number (net/core/dev.c,
		// skb_checksum_help, CSUM_MANGLED_0; RFC 1624); tshark calls that bad.
		if zero := fields[11] == "0xffff" && fields[12] == "0x0000"; !zero && fields[3] != isGood || fields[4] != isGood {
			bad = append(bad, line)
		}
		if fields[5] != "" {
			malformed++
		}
	}
	assert.GreaterOrEqual(t, syns, rounds*instances, "SYNs that reached the proxies")
	assert.Equal(t, syns, options, "each with the option")
	assert.Equal(t, int(c.net.balancer.Stats().OptionsAdded), options, "as many as the balancer says")
	assert.Greater(t, packets, 8*rounds*instances, "SYN, SYN-ACK, ACK, PING, PONG, FIN, FIN, ACK")
	assert.Empty(t, bad, "packets without two checksums that are good")
	assert.Zero(t, malformed, "malformed packets")
	t.Logf("%d packets, %d SYNs with the option, %d bad checksums", packets, options, len(bad))
}

// inCollisionLab builds the network of c and calls use in it.
func inCollisionLab(t *testing.T, c *collision, opt Options, use func(r *collisionRun)) *collisionRun {
	t.Helper()
	require.NoError(t, stamp())
	require.NoError(t, c.Check())
	var err error
	opt.server, err = findServer(opt.Server)
	require.NoError(t, err)
	lab, err := netlab.Up(t.Context(), c.Topology())
	skipIfNeeded(t, err)
	defer func() { require.NoError(t, lab.Down()) }()
	target, err := c.startPrograms(t.Context(), lab, opt)
	require.NoError(t, err)
	defer target.control.Close()
	r := &collisionRun{c: c, v: &results.Variant{Metrics: map[string]results.Metric{}}, opt: opt,
		detectors: c.probing(lab), proxies: c.proxied(lab), start: time.Now()}
	use(r)
	return r
}

// TestRedisThroughBalancer: what passes the balancer and the proxy is Redis,
// whole, for real clients and a real server.
func TestRedisThroughBalancer(t *testing.T) {
	require.NoError(t, stamp())
	for _, tt := range []struct{ path string }{{pathL4}, {pathFullNAT}, {pathL7}, {pathHAProxy}} {
		t.Run(tt.path, func(t *testing.T) {
			s := NewStanding()
			s.c.VIPs, s.c.Proxies, s.c.Path = 30, 3, tt.path
			err := s.Use(t.Context(), Options{Server: ServerRedis}, func(client *netlab.Host) error {
				carriesRedis(t, client)
				return nil
			})
			skipIfNeeded(t, err)
		})
	}
}

func carriesRedis(t *testing.T, client *netlab.Host) {
	host := vip(7).String()
	start := func(stdin string, args ...string) (wait func() string) {
		cmd := exec.CommandContext(t.Context(), "redis-cli", append([]string{"-h", host}, args...)...)
		var out bytes.Buffer
		cmd.Stdin, cmd.Stdout, cmd.Stderr = strings.NewReader(stdin), &out, &out
		require.NoError(t, client.Do(cmd.Start))
		return func() string {
			_ = cmd.Wait() // what matters is what it printed
			return out.String()
		}
	}
	cli := func(stdin string, args ...string) string { return start(stdin, args...)() }

	assert.Contains(t, cli("", "CLIENT", "INFO"), fmt.Sprintf(" laddr=%v:%d ", nth(redisPrefix, hostNumber(netip.MustParseAddr(host))), redisPort),
		"the proxy went to the instance that the VIP stands for")

	assert.Equal(t, "OK\nQUEUED\nQUEUED\n1\n2\n", cli("MULTI\nINCR a\nINCR a\nEXEC\n"), "a transaction")

	subscriber := start("", "--csv", "SUBSCRIBE", "news")
	require.Eventually(t, func() bool { return cli("", "PUBLISH", "news", "hello") == "1\n" }, 10*time.Second, 20*time.Millisecond, "one subscriber")
	_ = cli("", "CLIENT", "KILL", "TYPE", "pubsub")
	assert.Contains(t, subscriber(), `"message","news","hello"`)

	value := strings.Repeat("0123456789abcdef", 10<<20/16)
	assert.Equal(t, "OK\n", cli(value, "-x", "SET", "big"))
	assert.Equal(t, value+"\n", cli("", "GET", "big"), "10 MB there and back")

	var pipeline strings.Builder
	for i := range 10_000 {
		fmt.Fprintf(&pipeline, "*3\r\n$3\r\nSET\r\n$%d\r\nk%d\r\n$%d\r\n%d\r\n", 1+len(strconv.Itoa(i)), i, len(strconv.Itoa(i)), i)
	}
	assert.Contains(t, cli(pipeline.String(), "--pipe"), "errors: 0, replies: 10000")
	assert.Equal(t, "9999\n", cli("", "GET", "k9999"))
}

// A port that is taken because another connection was moved to it is no collision of two clients' ports.
func TestCountMoved(t *testing.T) {
	flow := func(host byte, proxy byte, sent, translated uint16) *netlink.ConntrackFlow {
		client := net.IPv4(10, 66, 0, host)
		return &netlink.ConntrackFlow{
			Forward: netlink.IPTuple{SrcIP: client, DstIP: vip(0).AsSlice(), SrcPort: sent},
			Reverse: netlink.IPTuple{SrcIP: net.IPv4(10, 67, 0, proxy), DstIP: client, DstPort: translated},
		}
	}
	moved, byMoved := countMoved([]*netlink.ConntrackFlow{
		flow(1, 1, 40_000, 40_000),
		flow(1, 1, 40_000, 50_000), // the second with this port: moved
		flow(1, 1, 50_000, 50_002), // its own port is taken by the one above
		flow(1, 2, 50_000, 50_000), // of another proxy nobody has it
		flow(2, 1, 50_000, 50_000), // of another client neither
	})
	assert.Equal(t, 2, moved)
	assert.Equal(t, 1, byMoved)
}
