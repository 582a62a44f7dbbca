package scenarios

import (
	"errors"
	"flag"
	"fmt"
	"math"
	"os"
	"slices"
	"strconv"
	"strings"
	"time"

	"golang.org/x/sys/unix"

	"connlab/netlab"
	"connlab/results"
)

// TimeWaitBuckets is the second half of incident 3: a web server that closes more
// connections than it has places to remember them, and answers the FINs of Redis
// with RSTs.
var TimeWaitBuckets = Scenario{
	Name:  "time-wait-buckets",
	Title: "A FIN is answered with RST: tcp_max_tw_buckets is full",
	Story: timeWaitStory,
	New:   func() Experiment { return newTimeWait() },
	Variants: []Variant{
		{Name: "incident", Role: results.Incident,
			Summary: "131,072 buckets filled (20 s): every further close loses its socket, and the FIN that Redis sends later is answered with RST"},
		{Name: "load", Role: results.Incident, Set: []string{"buckets=1311", "loads=0.9,0.98,1.1,2"},
			Summary: "four web servers with a hundredth of the buckets and of the load, for longer than TIME_WAIT lasts (72 s): who closes faster than M/R overflows, and R is not 60 s but up to 62"},
		{Name: "compressed", Role: results.Incident, Set: small(),
			Summary: "the same with a hundredth of the buckets and of the closes: the same n/M, and n/r below R as there"},
		{Name: "step", Role: results.Incident, Set: []string{"buckets=262", "closes=300", "rate=1500", "trails=0s,10ms,20ms,60ms,80ms,100ms,150ms,200ms"},
			Summary: "how late may Redis close? Below one delayed ACK of 40 ms overflows but no RST, above it an RST for each"},
		{Name: "fin-timeout", Role: results.FalseLead, Set: small("fin-timeout=5"),
			Summary: "a remedy that suggests itself: a shorter tcp_fin_timeout frees nothing that is already in TIME_WAIT"},
		{Name: "reuse", Role: results.FalseLead, Set: small("reuse=1"),
			Summary: "tcp_tw_reuse=1: a bucket is reused only by a connection to the same place from the same port"},
		{Name: "linger-0", Role: results.FalseLead, Set: small("close=reset", "trail=0s"),
			Summary: "SO_LINGER 0: no TIME_WAIT at all, since now every close is an RST"},
		{Name: "raised", Role: results.Fix, Set: small("buckets=2622"),
			Summary: "a higher tcp_max_tw_buckets: no RST, and FIN_WAIT_2 can be seen again"},
		{Name: "fin-timeout-61", Role: results.Fix, Set: small("fin-timeout=61"),
			Summary: "a remedy by accident: with a tcp_fin_timeout above 60 s an orphan waits in FIN_WAIT_2 as a whole socket, and the late FIN finds it"},
		{Name: "server-first", Role: results.Fix, Set: small("close=server", "trail=0s"),
			Summary: "Redis closes first: FIN_WAIT_2 and TIME_WAIT are its, and the web server needs no bucket"},
		{Name: "prompt", Role: results.Control, Set: small("trail=0s"),
			Summary: "Redis closes at once: its FIN comes with the ACK, the buckets overflow, and nobody is reset"},
		{Name: "room", Role: results.Control, Set: small("closes=1300"),
			Summary: "the healthy control: fewer closes than buckets, Redis as late as in the incident"},
		{Name: "placebo", Role: results.Control, Set: small("syn-backlog=65536"),
			Summary: "the placebo control: tcp_max_syn_backlog raised on the web server: the numbers of compressed must come back"},
	},
}

// small are the settings of an arm at a hundredth of the article's size, and more.
func small(more ...string) []string {
	return append([]string{"buckets=1311", "closes=1500", "rate=750"}, more...)
}

// How a connection is closed.
const (
	closeClient = "client" // the web server sends FIN first
	closeServer = "server" // Redis sends FIN first
	closeReset  = "reset"  // the web server sends RST (SO_LINGER 0)
)

// timeWait is the parameters of the scenario.
type timeWait struct {
	Buckets    int
	Closes     int
	Rate       float64
	Trail      time.Duration
	Close      string
	Instances  int
	FinTimeout int
	Reuse      int
	SYNBacklog int
	Trails     trails
	Loads      numbers
}

func newTimeWait() *timeWait {
	return &timeWait{
		Buckets: 131_072, Closes: 150_000, Rate: 7_500, Trail: 200 * time.Millisecond, Close: closeClient,
		Instances: 16, FinTimeout: 60, Reuse: 2, SYNBacklog: 512,
	}
}

// Flags implements [Experiment].
func (w *timeWait) Flags(fs *flag.FlagSet) {
	fs.IntVar(&w.Buckets, "buckets", w.Buckets, "M: net.ipv4.tcp_max_tw_buckets of the web server (10 to 1000000)")
	fs.IntVar(&w.Closes, "closes", w.Closes, "n: `connections`, each for one PING and then closed (10 to 250000)")
	fs.Float64Var(&w.Rate, "rate", w.Rate, "r: connections per second (1 to 20000)")
	fs.DurationVar(&w.Trail, "trail", w.Trail, "how long after the web server's FIN Redis closes its end (0s to 1s; mini server only)")
	fs.StringVar(&w.Close, "close", w.Close, "how a connection ends: `client|server|reset`: FIN by the web server first, by Redis first, or RST by the web server")
	fs.IntVar(&w.Instances, "instances", w.Instances, "Redis `instances`, an address each: one alone has too few ports for so many TIME_WAITs (1 to 64)")
	fs.IntVar(&w.FinTimeout, "fin-timeout", w.FinTimeout, "net.ipv4.tcp_fin_timeout of the web server, in `seconds` (3 to 120)")
	fs.IntVar(&w.Reuse, "reuse", w.Reuse, "net.ipv4.tcp_tw_reuse of the web server: 0 off, 1 on, 2 loopback only")
	fs.IntVar(&w.SYNBacklog, "syn-backlog", w.SYNBacklog, "net.ipv4.tcp_max_syn_backlog of the web server (1 to 1000000)")
	fs.Var(&w.Trails, "trails", "instead of trail: several, one after the other, each with a web server of its own: `20ms,60ms,…`")
	fs.Var(&w.Loads, "loads", "instead of rate and closes: several web servers side by side, each closing so many times M/60 connections a second for 72 s: `0.9,1.1,…`")
}

// timeWaitLength is how long a bucket is kept (include/net/tcp.h, TCP_TIMEWAIT_LEN),
// before the timer wheel rounds up.
const timeWaitLength = 60 * time.Second

// loadsFor is how long web servers side by side go on: beyond timeWaitLength and two
// lumps of the timer wheel, of up to 5.12 s where HZ is 100.
const loadsFor = 72 * time.Second

// Trails and durations of which the outcome is chance: the delayed ACK is 40 to 44 ms,
// later on a busy machine, and the first TIME_WAITs end after 60 s or more.
const (
	chanceTrailFrom, chanceTrailTo = 25 * time.Millisecond, 55 * time.Millisecond
	chanceLastsFrom, chanceLastsTo = 50 * time.Second, loadsFor
)

// Check implements [Experiment].
func (w *timeWait) Check() error {
	var found checks
	found.within("buckets", float64(w.Buckets), 10, 1e6)
	found.within("closes", float64(w.Closes), 10, 250_000)
	found.within("rate", w.Rate, 1, 20_000)
	found.lasting("trail", w.Trail, 0, time.Second)
	found.among("close", w.Close, closeClient, closeServer, closeReset)
	found.within("instances", float64(w.Instances), 1, 64)
	found.within("fin-timeout", float64(w.FinTimeout), 3, 120) // longer than any trail
	found.within("reuse", float64(w.Reuse), 0, 2)
	found.within("syn-backlog", float64(w.SYNBacklog), 1, 1e6)
	for _, trail := range w.Trails {
		found.lasting("trails", trail, 0, time.Second)
	}
	for _, trail := range append([]time.Duration{w.Trail}, w.Trails...) {
		if trail > chanceTrailFrom && trail < chanceTrailTo {
			found.bad("a trail of %v is about as long as a delayed ACK: on which side it falls is chance; take up to %v, or from %v", trail, chanceTrailFrom, chanceTrailTo)
		}
	}
	for _, load := range w.Loads {
		found.within("loads", load, 0.01, 10)
	}
	if len(w.Trails) > 0 && len(w.Loads) > 0 {
		found.bad("trails and loads are two experiments: choose one")
	}
	if len(w.Trails)+len(w.Loads) > 0 && w.Close != closeClient {
		found.bad("trails and loads are about who closes first: not with close=%s", w.Close)
	}
	if w.Close != closeClient && w.Trail > 0 {
		found.bad("trail is how long after the web server's FIN Redis sends its own: with close=%s set trail=0s", w.Close)
	}
	if len(found) > 0 {
		return found.err()
	}
	for _, leg := range w.legs() {
		if leg.rate > 20_000 {
			found.bad("%s closes %.0f connections a second: 20000 at most", leg.host, leg.rate)
		}
		// Two ports of three at most: connect() slows down as it runs out of free ones.
		if perInstance := leg.closes / w.Instances; perInstance > 18_000 {
			found.bad("closes=%d to %d instances take %d ports each: set more instances", leg.closes, w.Instances, perInstance)
		}
		if leg.lasts() > 2*time.Minute {
			found.bad("closes=%d at rate=%v take %v: two minutes at most", leg.closes, leg.rate, leg.lasts().Round(time.Second))
		}
		if w.Close == closeClient && leg.lasts() > chanceLastsFrom && leg.lasts() < chanceLastsTo {
			found.bad("closes=%d at rate=%v take %v: the first TIME_WAITs end meanwhile, and how many is chance; take up to %v, or from %v", leg.closes, leg.rate, leg.lasts().Round(time.Second), chanceLastsFrom, chanceLastsTo)
		}
		if w.Close == closeClient && leg.lasts() > timeWaitLength && float64(leg.closes) > float64(w.Buckets)+leg.rate*timeWaitLength.Seconds() {
			found.bad("after the first TIME_WAITs have ended the story repeats itself: closes=%d is more than M + 60·r", leg.closes)
		}
	}
	return errors.Join(found.err(), w.checkDescriptors())
}

// mostOpen is how many connections either side may have open at once: the mini
// server and a Redis take 10,000 clients unless told otherwise.
const mostOpen = 9000

// checkDescriptors compares what is open at once with that, and with what this
// process may have open.
func (w *timeWait) checkDescriptors() error {
	var limit unix.Rlimit
	if err := unix.Getrlimit(unix.RLIMIT_NOFILE, &limit); err != nil {
		return os.NewSyscallError("getrlimit", err)
	}
	const slack = 2 // a machine that is twice as slow as it should be
	var open float64
	for _, leg := range w.legs() {
		need := slack * leg.rate * (leg.trail + 50*time.Millisecond).Seconds()
		if len(w.Loads) > 0 {
			need += open
		}
		open = max(open, need)
	}
	if open > mostOpen {
		return fmt.Errorf("such rates with such trails may keep %.0f connections open at once, and Redis takes 10000: lower one of them", open)
	}
	if need := uint64(open) + 3000; need > limit.Max {
		return fmt.Errorf("such rates with such trails may need %d open files, and the limit is %d: raise it (ulimit -Hn) or lower one of them", need, limit.Max)
	}
	return nil
}

// timeWaitLeg is one web server's part: all of the load, one trail, or one of
// several loads.
type timeWaitLeg struct {
	host   string
	suffix string // of its metrics
	rate   float64
	closes int
	trail  time.Duration
	factor float64 // of M/60, if it is one of several loads
}

// lasts is how long its connections take to arrive.
func (l timeWaitLeg) lasts() time.Duration {
	return time.Duration(float64(l.closes) / l.rate * float64(time.Second))
}

func (w *timeWait) legs() []timeWaitLeg {
	switch {
	case len(w.Trails) > 0:
		var legs []timeWaitLeg
		for i, trail := range w.Trails {
			legs = append(legs, timeWaitLeg{host: fmt.Sprintf("web-%d", i+1), suffix: ".trail-" + trail.String(), rate: w.Rate, closes: w.Closes, trail: trail})
		}
		return legs
	case len(w.Loads) > 0:
		var legs []timeWaitLeg
		for i, load := range w.Loads {
			rate := load * float64(w.Buckets) / timeWaitLength.Seconds()
			legs = append(legs, timeWaitLeg{
				host: fmt.Sprintf("web-%d", i+1), suffix: ".load-" + strconv.FormatFloat(load, 'g', -1, 64), rate: rate,
				closes: int(math.Ceil(rate * loadsFor.Seconds())), trail: w.Trail, factor: load,
			})
		}
		return legs
	}
	return []timeWaitLeg{{host: "web", rate: w.Rate, closes: w.Closes, trail: w.Trail}}
}

// Topology implements [Experiment]: the web servers and one host that is all
// Redis instances.
func (w *timeWait) Topology() netlab.Topology {
	redis := redisHost()
	// What Redis closes first is remembered there, and there must be room.
	redis.Sysctls = map[string]string{"net.ipv4.tcp_max_tw_buckets": "1000000"}
	t := netlab.Topology{Switches: []netlab.SwitchSpec{{Name: lanName, Subnet: collisionLAN}}, Hosts: []netlab.HostSpec{redis}}
	for _, leg := range w.legs() {
		t.Hosts = append(t.Hosts, webHost(leg.host, map[string]string{
			"net.ipv4.tcp_max_tw_buckets":  strconv.Itoa(w.Buckets),
			"net.ipv4.tcp_fin_timeout":     strconv.Itoa(w.FinTimeout),
			"net.ipv4.tcp_tw_reuse":        strconv.Itoa(w.Reuse),
			"net.ipv4.tcp_max_syn_backlog": strconv.Itoa(w.SYNBacklog),
		}))
	}
	return t
}

// trails is a list of times as a parameter: "20ms,60ms".
type trails []time.Duration

// String implements [flag.Value].
func (t *trails) String() string {
	words := make([]string, len(*t))
	for i, d := range *t {
		words[i] = d.String()
	}
	return strings.Join(words, ",")
}

// Set implements [flag.Value].
func (t *trails) Set(text string) error {
	list, err := listOf(text, time.ParseDuration, "want times with commas between: 20ms,60ms")
	*t = list
	return err
}

// numbers is a list of numbers as a parameter: "0.9,1.1".
type numbers []float64

// String implements [flag.Value].
func (l *numbers) String() string {
	words := make([]string, len(*l))
	for i, f := range *l {
		words[i] = strconv.FormatFloat(f, 'g', -1, 64)
	}
	return strings.Join(words, ",")
}

// Set implements [flag.Value].
func (l *numbers) Set(text string) error {
	list, err := listOf(text, func(s string) (float64, error) { return strconv.ParseFloat(s, 64) }, "want numbers with commas between: 0.9,1.1")
	*l = list
	return err
}

// listOf reads at most 20 different values; an empty text is an empty list.
func listOf[T comparable](text string, parse func(string) (T, error), want string) ([]T, error) {
	if text == "" {
		return nil, nil
	}
	var list []T
	for word := range strings.SplitSeq(text, ",") {
		value, err := parse(word)
		if err != nil {
			return nil, errors.New(want)
		}
		if slices.Contains(list, value) {
			return nil, fmt.Errorf("%s is there twice", word)
		}
		list = append(list, value)
	}
	if len(list) > 20 {
		return nil, fmt.Errorf("%d values: 20 at most", len(list))
	}
	return list, nil
}
