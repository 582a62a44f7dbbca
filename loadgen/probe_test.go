package loadgen

import (
	"context"
	"encoding/json"
	"errors"
	"net"
	"net/netip"
	"os"
	"slices"
	"sync/atomic"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"
	"github.com/stretchr/testify/assert"
	"github.com/stretchr/testify/require"
	"golang.org/x/sys/unix"
)

// probe runs cfg and checks the account.
func probe(t testing.TB, cfg ProbeConfig) *ProbeReport {
	t.Helper()
	report, err := Probe(t.Context(), cfg)
	require.NoError(t, err)
	require.NoError(t, report.Balanced())
	return report
}

// other is an address for connections that end in TIME_WAIT, which keeps ports
// from bind(2).
func other(n byte) netip.Addr { return netip.AddrFrom4([4]byte{127, 76, byte(os.Getpid()), n}) }

var addrPorts = cmp.Comparer(func(a, b netip.AddrPort) bool { return a == b })

func TestProbeHoldsARoundOpenAndClosesIt(t *testing.T) {
	const n, rounds = 1000, 3
	targets, fds := listeners(t, n)
	server := answerPings(t, fds)
	hosts := []Source{LocalSource("a", other(1)), LocalSource("b", other(2))}
	var attempts [rounds][]Attempt
	report := probe(t, ProbeConfig{Targets: targets, Sources: hosts, Rounds: rounds, Timeout: 10 * time.Second, OnAttempt: func(a Attempt) {
		attempts[a.Round] = append(attempts[a.Round], a)
	}})
	most := server.peak()
	assert.Equal(t, n, most, "all at the same time, and none of two rounds")
	require.Len(t, report.Rounds, rounds)
	for i, round := range report.Rounds {
		assert.Equal(t, i, round.Round)
		assert.Equal(t, hosts[i%2].Name, round.Source)
		assert.Equal(t, i%2 == 0, attempts[i][0].Local.Addr() == other(1))
		want := ProbeCounts{Instances: n, First: Counts{OK: n}, Attempts: Counts{OK: n}, Answered: []int64{n, 0, 0, 0}, Shared: Counts{}, Lost: Counts{}}
		got := round.ProbeCounts
		got.Shared = Counts{}
		assert.Empty(t, cmp.Diff(want, got))
		assert.Empty(t, round.Suspects, "nobody failed")
		checkShared(t, attempts[i], round.Shared)
	}
	total := report.Total()
	assert.EqualValues(t, rounds*n, total.Instances)
	assert.EqualValues(t, rounds*n, report.Load.Connect.Count())
	assert.EqualValues(t, rounds*n, report.Reply.Count())
}

// checkShared compares what the attempts of a round say of shared ports with
// their ports.
func checkShared(t *testing.T, attempts []Attempt, shared Counts) {
	t.Helper()
	from := map[netip.AddrPort][]netip.AddrPort{}
	for _, a := range attempts {
		from[a.Local] = append(from[a.Local], a.Target)
	}
	pairs, sharing := 0, 0
	named := map[[2]netip.AddrPort]bool{}
	for _, a := range attempts {
		assert.Equal(t, attempts[0].Local.Addr(), a.Local.Addr(), "one host for a round")
		assert.NotContains(t, a.SharedWith, a.Target)
		for _, other := range a.SharedWith {
			assert.Contains(t, from[a.Local], other)
			named[[2]netip.AddrPort{a.Target, other}] = true
		}
		if len(a.SharedWith) > 0 {
			sharing++
		}
	}
	for _, targets := range from {
		for i, one := range targets {
			for _, other := range targets[:i] {
				pairs++
				assert.True(t, named[[2]netip.AddrPort{one, other}] || named[[2]netip.AddrPort{other, one}], "%v and %v share a port and neither says so", one, other)
			}
		}
	}
	// 35 expected over 14,116 ports, fewer than 5 in one of 1e10 runs.
	assert.GreaterOrEqual(t, pairs, 5, "pairs that share a port")
	assert.EqualValues(t, sharing, shared.Sum())
}

// fullListener is an address that does not answer SYNs: its accept queue is full.
func fullListener(t *testing.T) netip.AddrPort {
	t.Helper()
	target := listenOnly(t, 0)
	held, report, err := Hold(t.Context(), Config{Targets: at(target), Schedule: Burst(1, 0), ConnectOnly: true, Close: Reset})
	require.NoError(t, err)
	t.Cleanup(held.Close)
	require.EqualValues(t, 1, report.OK)
	return target
}

func TestProbeCountsWhatFails(t *testing.T) {
	_, refused := boundSocket(t)
	good, fds := listeners(t, 20)
	answerPings(t, fds)
	for _, test := range []struct {
		name    string
		target  netip.AddrPort
		retries int
		class   Class
		tries   int64
	}{
		{"refused, three retries by default", refused, 0, ConnectRefused, 4},
		{"refused, one retry", refused, 1, ConnectRefused, 2},
		{"refused, never retried", refused, -1, ConnectRefused, 1},
		{"SYNs are not answered", fullListener(t), 1, ConnectTimeout, 2},
		{"PINGs are not answered", serve(t, silent), 2, ReadTimeout, 3},
		{"answered with an error", serve(t, answer("-LOADING\r\n")), 1, ServerError, 2},
		{"closed", serve(t, answer()), 1, EOF, 2},
	} {
		t.Run(test.name, func(t *testing.T) {
			var locals []netip.AddrPort
			report := probe(t, ProbeConfig{Targets: append(slices.Clone(good), test.target), Timeout: 200 * ms, Retries: test.retries, OnAttempt: func(a Attempt) {
				if a.Target == test.target {
					assert.Equal(t, len(locals), a.Retry)
					assert.Error(t, a.Err)
					locals = append(locals, a.Local)
				} else {
					assert.NoError(t, a.Err)
				}
				assert.Positive(t, a.Took)
			}})
			require.Len(t, report.Rounds, 1)
			n := int64(len(good))
			got := report.Rounds[0].ProbeCounts
			want := ProbeCounts{
				Instances: n + 1, First: Counts{OK: n, test.class: 1}, Attempts: Counts{OK: n, test.class: test.tries},
				Shared: got.Shared, Answered: make([]int64, test.tries), Never: 1, Lost: Counts{},
			}
			want.Answered[0] = n
			assert.Empty(t, cmp.Diff(want, got))
			if test.class == ConnectTimeout || test.class == ReadTimeout {
				assert.Equal(t, test.tries, got.Attempts.Timeouts())
			}
			slices.SortFunc(locals, netip.AddrPort.Compare)
			assert.Len(t, slices.Compact(locals), int(test.tries), "each from a port of its own")
		})
	}
}

// late gives a handler that resets the first n connections and answers later
// ones.
func late(n int64) func(*net.TCPConn) {
	var count atomic.Int64
	return func(c *net.TCPConn) {
		if count.Add(1) <= n {
			resetAfterRequest(c)
			return
		}
		pong(c)
	}
}

func TestRetriesUntilSuccess(t *testing.T) {
	targets := []netip.AddrPort{serve(t, late(0)), serve(t, late(1)), serve(t, late(2)), serve(t, late(2)), serve(t, late(9))}
	report := probe(t, ProbeConfig{Targets: targets, Timeout: 5 * time.Second})
	got := report.Rounds[0]
	assert.Equal(t, []int64{1, 1, 2, 0}, got.Answered)
	assert.EqualValues(t, 1, got.Never)
	assert.Equal(t, Counts{OK: 1, ReadReset: 4}, got.First)
	assert.Equal(t, Counts{OK: 4, ReadReset: 1 + 2 + 2 + 4}, got.Attempts)
}

// With one local port for all, every connection is a suspect of every other.
func TestSuspects(t *testing.T) {
	low, _ := portRange(t)
	local := netip.AddrPortFrom(client, low-2)
	// The targets come one after the other, so that each ends before the next.
	good, never, second := serve(t, pong), serve(t, late(9)), serve(t, late(1))
	report := probe(t, ProbeConfig{
		Targets: []netip.AddrPort{good, never, second}, Sources: []Source{LocalSource("", netip.Addr{}).Bound(local)},
		Rate: 20, Retries: 1, Timeout: 5 * time.Second,
	})
	round := report.Rounds[0]
	want := []Collision{
		{Retry: 0, Local: local, Target: never, Class: ReadReset, SharedWith: []netip.AddrPort{good}},
		{Retry: 1, Local: local, Target: never, Class: ReadReset, SharedWith: []netip.AddrPort{good}},
		{Retry: 0, Local: local, Target: second, Class: ReadReset, SharedWith: []netip.AddrPort{good, never}, AnsweredTo: local},
	}
	assert.Empty(t, cmp.Diff(want, round.Suspects, addrPorts))
	assert.Equal(t, Counts{ReadReset: 3, OK: 1}, round.Shared)
}

func TestWhatWasNotSentSharesNoPort(t *testing.T) {
	// One port can have one connection to a destination: the second attempt
	// ends before a SYN is sent.
	low, _ := portRange(t)
	good := serve(t, pong)
	target := serve(t, pong)
	var failed []Attempt
	report := probe(t, ProbeConfig{
		Targets: []netip.AddrPort{good, target, target}, Sources: []Source{LocalSource("", netip.Addr{}).Bound(netip.AddrPortFrom(client, low-5))},
		Retries: -1, Timeout: 5 * time.Second,
		OnAttempt: func(a Attempt) {
			if a.Class != OK {
				failed = append(failed, a)
			}
		},
	})
	assert.Equal(t, Counts{OK: 2, NoLocalPort: 1}, report.Rounds[0].First)
	assert.Empty(t, report.Rounds[0].Suspects)
	require.Len(t, failed, 1)
	assert.Empty(t, failed[0].SharedWith)
}

func TestSharedWithIsBounded(t *testing.T) {
	const n = 40
	low, _ := portRange(t)
	targets, fds := listeners(t, n)
	answerPings(t, fds)
	longest := 0
	probe(t, ProbeConfig{
		Targets: targets, Sources: []Source{LocalSource("", netip.Addr{}).Bound(netip.AddrPortFrom(client, low-3))},
		OnAttempt: func(a Attempt) { longest = max(longest, len(a.SharedWith)) },
	})
	assert.Equal(t, maxSharedWith, longest)
}

func TestRetriesDoNotWaitForOthers(t *testing.T) {
	_, refused := boundSocket(t)
	slow := serve(t, silent)
	var order []netip.AddrPort
	probe(t, ProbeConfig{Targets: []netip.AddrPort{slow, refused}, Timeout: 500 * ms, Retries: 1, OnAttempt: func(a Attempt) { order = append(order, a.Target) }})
	assert.Equal(t, []netip.AddrPort{refused, refused, slow, slow}, order)
}

func TestConnectionsLostWithinTheRound(t *testing.T) {
	wasReset := make(chan struct{})
	dies := serve(t, func(c *net.TCPConn) {
		request(c)
		_, _ = c.Write([]byte("+PONG\r\n"))
		_ = c.SetLinger(0)
		_ = c.Close()
		close(wasReset)
	})
	lasts := serve(t, func(c *net.TCPConn) {
		<-wasReset
		pong(c)
	})
	report := probe(t, ProbeConfig{Targets: []netip.AddrPort{dies, lasts}, Timeout: 5 * time.Second, Sources: []Source{LocalSource("", other(3))}})
	round := report.Rounds[0]
	assert.Equal(t, Counts{OK: 2}, round.First)
	assert.Equal(t, Counts{ReadReset: 1}, round.Lost)
	require.Len(t, round.LostConnections, 1)
	got := round.LostConnections[0]
	assert.Equal(t, other(3), got.Local.Addr())
	assert.Empty(t, cmp.Diff(LostConnection{Local: got.Local, Target: dies, Class: ReadReset, SharedWith: []netip.AddrPort{}}, got, addrPorts))
}

func TestARoundDoesNotWaitForeverForItsPeers(t *testing.T) {
	end := make(chan struct{})
	defer close(end)
	stays := serve(t, func(c *net.TCPConn) {
		request(c)
		_, _ = c.Write([]byte("+PONG\r\n"))
		<-end
	})
	report := probe(t, ProbeConfig{Targets: []netip.AddrPort{stays, serve(t, pong)}, Timeout: 200 * ms, Rounds: 2, Interval: ms})
	require.Len(t, report.Rounds, 2)
	for _, round := range report.Rounds {
		assert.EqualValues(t, 1, round.Unclosed)
		assert.Equal(t, Counts{OK: 2}, round.First)
	}
	assert.GreaterOrEqual(t, report.Rounds[1].Start.Sub(report.Rounds[0].End), ms)
}

func TestProbeInterrupted(t *testing.T) {
	_, refused := boundSocket(t)
	for _, test := range []struct {
		name   string
		cfg    ProbeConfig
		when   func(Attempt) bool
		rounds int
		want   Counts
	}{
		{
			"within a round: what is in flight is canceled, what is to come is left out",
			ProbeConfig{Targets: []netip.AddrPort{serve(t, silent), serve(t, pong), refused}, Rate: 20, Timeout: time.Hour},
			func(a Attempt) bool { return a.Class == OK }, 1, Counts{Canceled: 1, OK: 1, NotStarted: 1},
		},
		{
			"before a retry",
			ProbeConfig{Targets: []netip.AddrPort{refused}},
			func(a Attempt) bool { return a.Retry == 1 }, 1, Counts{ConnectRefused: 1},
		},
		{
			"between rounds",
			ProbeConfig{Targets: []netip.AddrPort{refused}, Retries: -1, Rounds: 2, Interval: time.Hour},
			func(Attempt) bool { return true }, 1, Counts{ConnectRefused: 1},
		},
	} {
		t.Run(test.name, func(t *testing.T) {
			enough := errors.New("enough")
			ctx, cancel := context.WithCancelCause(t.Context())
			defer cancel(nil)
			test.cfg.OnAttempt = func(a Attempt) {
				if test.when(a) {
					cancel(enough)
				}
			}
			report, err := Probe(ctx, test.cfg)
			require.ErrorIs(t, err, enough)
			require.NoError(t, report.Balanced())
			require.Len(t, report.Rounds, test.rounds)
			assert.Equal(t, test.want, report.Rounds[0].First)
		})
	}
}

func TestProbeConfigIsChecked(t *testing.T) {
	good := at(netip.MustParseAddrPort("127.0.0.1:1"))
	for _, test := range []struct {
		want string
		cfg  ProbeConfig
	}{
		{"no target", ProbeConfig{}},
		{"no IPv4 address", ProbeConfig{Targets: at(netip.MustParseAddrPort("[::1]:1"))}},
		{"negative", ProbeConfig{Targets: good, Rounds: -1}},
		{"negative", ProbeConfig{Targets: good, Interval: -1}},
		{"negative", ProbeConfig{Targets: good, Timeout: -1}},
		{"rate -1 is not", ProbeConfig{Targets: good, Rate: -1}},
		{`source "x" makes no sockets`, ProbeConfig{Targets: good, Sources: []Source{{Name: "x"}}}},
	} {
		report, err := Probe(t.Context(), test.cfg)
		require.ErrorContains(t, err, test.want)
		assert.Nil(t, report)
	}
}

func TestProbeReportSurvivesJSON(t *testing.T) {
	low, _ := portRange(t)
	report := probe(t, ProbeConfig{
		Targets: []netip.AddrPort{serve(t, late(0)), serve(t, late(1)), serve(t, late(9))}, Rounds: 2,
		Sources: []Source{LocalSource("host", netip.Addr{}).Bound(netip.AddrPortFrom(client, low-4))}, Timeout: 5 * time.Second,
	})
	require.NotEmpty(t, report.Rounds[0].Suspects)
	b, err := json.Marshal(report)
	require.NoError(t, err)
	got := new(ProbeReport)
	require.NoError(t, json.Unmarshal(b, got))
	require.NoError(t, got.Balanced())
	assert.Empty(t, cmp.Diff(report, got, addrPorts))
}

func TestALostAttemptIsNoticed(t *testing.T) {
	make := func() *ProbeReport {
		r := &ProbeReport{Rounds: []ProbeRound{{ProbeCounts: ProbeCounts{
			Instances: 10, First: Counts{OK: 7, ConnectTimeout: 3}, Attempts: Counts{OK: 9, ConnectTimeout: 3 + 1 + 1},
			Answered: []int64{7, 2, 0}, Never: 1,
		}}}, Load: NewReport(), Reply: NewHistogram()}
		r.Load.Due, r.Load.Started, r.Load.OK, r.Load.Failed[ConnectTimeout] = 14, 14, 9, 5
		for range 9 {
			r.Reply.Record(ms)
		}
		return r
	}
	require.NoError(t, make().Balanced())
	for _, test := range []struct {
		why  string
		lose func(*ProbeReport)
		want string
	}{
		{"a first try", func(r *ProbeReport) { r.Rounds[0].First[OK]-- }, "round 0: instances"},
		{"an instance that never answered", func(r *ProbeReport) { r.Rounds[0].Never-- }, "instances"},
		{"an answer", func(r *ProbeReport) { r.Rounds[0].Attempts[OK]-- }, "answers"},
		{"an answer at another retry", func(r *ProbeReport) { r.Rounds[0].Answered = []int64{6, 3, 0} }, "answers"},
		{"a failed attempt", func(r *ProbeReport) { r.Rounds[0].Attempts[ConnectTimeout]-- }, "attempts"},
		{"one attempt too many", func(r *ProbeReport) { r.Rounds[0].Attempts[EOF]++ }, "attempts"},
		{"one too many, interrupted", func(r *ProbeReport) { r.Rounds[0].Interrupted = true; r.Rounds[0].Attempts[EOF]++ }, "attempts"},
		{"an instance left out", func(r *ProbeReport) {
			r.Rounds[0].First[ConnectTimeout]--
			r.Rounds[0].First[NotStarted]++
		}, "left out"},
		{"of the load", func(r *ProbeReport) { r.Load.OK-- }, "account"},
		{"an operation the probe does not know", func(r *ProbeReport) { r.Load.Due++; r.Load.Started++; r.Load.Failed[EOF]++ }, "attempts"},
		{"a reply", func(r *ProbeReport) { r.Reply = NewHistogram() }, "attempts"},
	} {
		r := make()
		test.lose(r)
		assert.ErrorContains(t, r.Balanced(), test.want, test.why)
	}
	r := make()
	r.Rounds[0].Interrupted = true
	r.Rounds[0].Attempts[ConnectTimeout]--
	r.Load.Due, r.Load.Started, r.Load.Failed[ConnectTimeout] = 13, 13, 4
	assert.NoError(t, r.Balanced(), "an interrupted round may have tried less often")
}

func TestASocketThatCannotBeMadeIsTriedAgain(t *testing.T) {
	target := serve(t, pong)
	local := LocalSource("", netip.Addr{})
	made := 0
	source := Source{Socket: func() (int, error) {
		if made++; made <= 2 {
			return -1, unix.EMFILE
		}
		return local.Socket()
	}}
	report := probe(t, ProbeConfig{Targets: at(target), Sources: []Source{source}, Timeout: 5 * time.Second})
	assert.Equal(t, []int64{0, 0, 1, 0}, report.Rounds[0].Answered)
	assert.Equal(t, Counts{TooManyFiles: 2, OK: 1}, report.Rounds[0].Attempts)
	assert.Empty(t, report.Rounds[0].Shared, "what has no port shares none")
}
