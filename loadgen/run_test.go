package loadgen

import (
	"context"
	"errors"
	"fmt"
	"io"
	"net"
	"net/netip"
	"os"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"
	"github.com/google/go-cmp/cmp/cmpopts"
	"github.com/stretchr/testify/assert"
	"github.com/stretchr/testify/require"
	"golang.org/x/sys/unix"
)

// load runs cfg and checks the account.
func load(t testing.TB, cfg Config) *Report {
	t.Helper()
	report, err := Run(t.Context(), cfg)
	require.NoError(t, err)
	require.NoError(t, report.Balanced())
	return report
}

func TestOperationsEndInTheirClass(t *testing.T) {
	const n = 20
	for _, test := range []struct {
		name   string
		handle func(*net.TCPConn)
		change func(*Config)
		want   Counts
	}{
		{name: "answered", handle: pong},
		{name: "answered and closed at once", handle: answer("+PONG\r\n")},
		{name: "answered in pieces", handle: answer("$", "5\r", "\nhel", "lo\r\n")},
		{name: "answered at length", handle: answer("$300000\r\n" + strings.Repeat("x", 300_000) + "\r\n")},
		{name: "answered too long", handle: answer("$2000000\r\n" + strings.Repeat("x", 2_000_000) + "\r\n"), want: Counts{BadReply: n}},
		{name: "answered with another rule", handle: answer("some ", "line\n"), change: func(c *Config) {
			c.Reply = func(b []byte) (bool, error) { return string(b) == "some line\n", nil }
		}},
		{name: "asked at length", handle: func(c *net.TCPConn) {
			if n, _ := io.CopyN(io.Discard, c, 8<<20); n == 8<<20 {
				_, _ = c.Write([]byte("+OK\r\n"))
			}
		}, change: func(c *Config) { c.Request = make([]byte, 8<<20) }},
		{name: "error reply", handle: answer("-ERR no\r\n"), want: Counts{ServerError: n}},
		{name: "nonsense", handle: answer("HTTP/1.1 400\r\n"), want: Counts{BadReply: n}},
		{name: "closed without a reply", handle: answer(), want: Counts{EOF: n}},
		{name: "closed within the reply", handle: answer("+PO"), want: Counts{EOF: n}},
		{name: "reset instead of a reply", handle: resetAfterRequest, want: Counts{ReadReset: n}},
		{name: "never answered", handle: silent, change: func(c *Config) { c.ReplyTimeout = 50 * ms }, want: Counts{ReadTimeout: n}},
		{name: "never answered to the end", handle: func(c *net.TCPConn) { answer("+PON")(c); silent(c) },
			change: func(c *Config) { c.ReplyTimeout = 50 * ms }, want: Counts{ReadTimeout: n}},
		{name: "only connected", handle: silent, change: func(c *Config) { c.ConnectOnly = true }},
		{name: "more than may be in flight", handle: silent, change: func(c *Config) { c.ReplyTimeout = 50 * ms; c.MaxInFlight = 7 },
			want: Counts{ReadTimeout: 7, NotStarted: n - 7}},
	} {
		t.Run(test.name, func(t *testing.T) {
			got := Counts{}
			cfg := Config{Targets: at(serve(t, test.handle)), Schedule: Burst(n, 0), OnOp: func(op Op) { got[op.Class]++ }}
			if test.change != nil {
				test.change(&cfg)
			}
			report := load(t, cfg)
			want := Counts{}
			for class, n := range test.want {
				want[class] = n
			}
			if ok := n - want.Sum(); ok > 0 {
				want[OK] = ok
			}
			assert.Empty(t, cmp.Diff(want, got), "by OnOp")
			assert.EqualValues(t, n, report.Due)
			assert.Equal(t, want[OK], report.OK)
			assert.Equal(t, want[NotStarted], report.NotStarted)
			delete(want, OK)
			delete(want, NotStarted)
			assert.Empty(t, cmp.Diff(want, report.Failed), "in the report")
			if test.want[ServerError] == 0 {
				assert.Empty(t, report.Causes)
			} else {
				assert.Equal(t, map[string]int64{"reply: ERR": n}, report.Causes)
			}
			assert.Equal(t, report.OK, report.Latency.Count())
			assert.Equal(t, report.Started, report.Lateness.Count())
			assert.Equal(t, report.Started, report.Connect.Count(), "all that started came to be connected")
		})
	}
}

func TestARequestThatIsNeverRead(t *testing.T) {
	target := serve(t, func(*net.TCPConn) { <-t.Context().Done() })
	report := load(t, Config{Targets: at(target), Schedule: Burst(5, 0), Request: make([]byte, 32<<20), ReplyTimeout: 50 * ms})
	assert.Equal(t, Counts{ReadTimeout: 5}, report.Failed)
}

func TestConnectRefused(t *testing.T) {
	_, address := boundSocket(t)
	report := load(t, Config{Targets: at(address), Schedule: Burst(10, 0)})
	assert.Equal(t, Counts{ConnectRefused: 10}, report.Failed)
	assert.Zero(t, report.Connect.Count())
}

func TestConnectReset(t *testing.T) {
	// The reset comes while the engine is busy with making the second socket.
	// Where the machine holds it up just before, it sees the connection open
	// first; the class is then another, and that is for the next try.
	wasReset := make(chan struct{}, 1)
	target := serve(t, func(c *net.TCPConn) {
		_ = c.SetLinger(0)
		_ = c.Close()
		wasReset <- struct{}{}
	})
	local := LocalSource("", netip.Addr{})
	seen := Counts{}
	for range 50 {
		made := 0
		source := Source{Socket: func() (int, error) {
			if made++; made == 2 {
				<-wasReset
				return -1, unix.EMFILE
			}
			return local.Socket()
		}}
		report := load(t, Config{Targets: at(target), Schedule: Burst(2, 0), Sources: []Source{source}})
		require.EqualValues(t, 1, report.Failed[TooManyFiles])
		delete(report.Failed, TooManyFiles)
		for class := range report.Failed {
			require.Contains(t, []Class{ConnectReset, WriteReset, ReadReset}, class)
			seen[class]++
		}
		if seen[ConnectReset] > 0 {
			return
		}
	}
	t.Errorf("no reset was seen by connect: %v", seen)
}

func TestConnectTimeoutWhereTheAcceptQueueIsFull(t *testing.T) {
	const n = 20
	held, report, err := Hold(t.Context(), Config{Targets: at(listenOnly(t, 0)), Schedule: Constant(1000, n*ms), ConnectOnly: true, ConnectTimeout: 200 * ms})
	require.NoError(t, err)
	defer held.Close()
	require.NoError(t, report.Balanced())
	// listen(fd, 0) has room for one, include/net/sock.h sk_acceptq_is_full.
	// On loopback the handshake ends within connect(2), so none races for it.
	assert.EqualValues(t, 1, report.OK)
	assert.Equal(t, Counts{ConnectTimeout: n - 1}, report.Failed)
	assert.Equal(t, 1, held.Len())
}

func TestNoLocalPort(t *testing.T) {
	// A socket that is bound to its port can connect to a destination once.
	_, local := boundSocket(t) // keeps others from the port
	source := Source{Name: "one port", Socket: func() (int, error) {
		fd, err := LocalSource("", netip.Addr{}).Socket()
		if err != nil {
			return -1, err
		}
		if err := errors.Join(unix.SetsockoptInt(fd, unix.SOL_SOCKET, unix.SO_REUSEADDR, 1), unix.Bind(fd, &unix.SockaddrInet4{Port: int(local.Port()) + 1, Addr: [4]byte{127, 0, 0, 9}})); err != nil {
			return -1, errors.Join(err, unix.Close(fd))
		}
		return fd, nil
	}}
	held, report, err := Hold(t.Context(), Config{Targets: at(listenOnly(t, 10)), Schedule: Burst(5, 0), Sources: []Source{source}, ConnectOnly: true, Close: Reset})
	require.NoError(t, err)
	defer held.Close()
	assert.EqualValues(t, 1, report.OK)
	assert.Equal(t, Counts{NoLocalPort: 4}, report.Failed)
}

func TestTooManyFiles(t *testing.T) {
	const n = 50
	target := listenOnly(t, n)
	var limit unix.Rlimit
	require.NoError(t, unix.Getrlimit(unix.RLIMIT_NOFILE, &limit))
	entries, err := os.ReadDir("/proc/self/fd")
	require.NoError(t, err)
	defer func() { require.NoError(t, unix.Setrlimit(unix.RLIMIT_NOFILE, &limit)) }()
	require.NoError(t, unix.Setrlimit(unix.RLIMIT_NOFILE, &unix.Rlimit{Cur: uint64(len(entries)) + 30, Max: limit.Max}))

	held, report, err := Hold(t.Context(), Config{Targets: at(target), Schedule: Burst(n, 0), ConnectOnly: true})
	require.NoError(t, err)
	defer held.Close()
	require.NoError(t, report.Balanced())
	assert.Positive(t, report.OK)
	assert.LessOrEqual(t, report.OK, int64(30))
	assert.Equal(t, Counts{TooManyFiles: n - report.OK}, report.Failed)
}

func TestOtherErrorsKeepTheirName(t *testing.T) {
	noSocket := Source{Socket: func() (int, error) { return unix.Open("/dev/null", unix.O_RDWR|unix.O_CLOEXEC, 0) }}
	noErrno := Source{Socket: func() (int, error) { return -1, errors.New("host is down") }}
	var errs []error
	report := load(t, Config{Targets: at(listenOnly(t, 1)), Schedule: Burst(3, 0), Sources: []Source{noSocket, noErrno}, OnOp: func(op Op) { errs = append(errs, op.Err) }})
	assert.Equal(t, Counts{Other: 3}, report.Failed)
	assert.Equal(t, map[string]int64{"connect: socket operation on non-socket": 2, "socket: host is down": 1}, report.Causes)
	require.Len(t, errs, 3)
	assert.ErrorIs(t, errs[0], unix.ENOTSOCK)
}

func TestClassify(t *testing.T) {
	// Those that loopback does not bring forth on demand, beside their
	// neighbours.
	for _, test := range []struct {
		phase phase
		err   error
		want  Class
	}{
		{connecting, unix.ETIMEDOUT, ConnectTimeout},
		{connecting, unix.ENETUNREACH, Unreachable},
		{connecting, unix.EHOSTUNREACH, Unreachable},
		{connecting, unix.ECONNRESET, ConnectReset},
		{connecting, unix.EADDRINUSE, Other},
		{opening, fmt.Errorf("bind: %w", unix.EADDRINUSE), NoLocalPort},
		{opening, fmt.Errorf("socket: %w", unix.ENFILE), TooManyFiles},
		{writing, unix.ECONNRESET, WriteReset},
		{writing, unix.EPIPE, WriteBrokenPipe},
		{writing, errTimeout, ReadTimeout},
		{closing, errTimeout, CloseTimeout},
		{closing, unix.ECONNRESET, ReadReset},
		{reading, unix.ETIMEDOUT, ReadTimeout},
		{reading, unix.ECONNREFUSED, Other},
		{reading, unix.EHOSTUNREACH, Unreachable},
		{idle, unix.ECONNRESET, ReadReset},
		{reading, context.Canceled, Canceled},
	} {
		assert.Equal(t, test.want, classify(test.phase, test.err), "%s: %v", test.phase, test.err)
	}
}

func TestOpsCanBeJoinedWithTheServersSide(t *testing.T) {
	const n = 200
	var mu sync.Mutex
	var atServer []netip.AddrPort
	target := serve(t, func(c *net.TCPConn) {
		mu.Lock()
		atServer = append(atServer, c.RemoteAddr().(*net.TCPAddr).AddrPort())
		mu.Unlock()
		pong(c)
	})
	sources := []Source{LocalSource("a", netip.MustParseAddr("127.0.0.2")), LocalSource("b", netip.MustParseAddr("127.0.0.3")), LocalSource("c", netip.Addr{})}
	host := []string{"127.0.0.2", "127.0.0.3", "127.0.0.1"}
	var ops []Op
	var atClient []netip.AddrPort
	report := load(t, Config{Targets: at(target), Schedule: Constant(2000, 100*ms), Sources: sources, OnOp: func(op Op) {
		ops, atClient = append(ops, op), append(atClient, op.Local)
	}})
	require.Len(t, ops, n)
	require.EqualValues(t, n, report.OK)
	mu.Lock()
	defer mu.Unlock()
	assert.Empty(t, cmp.Diff(atServer, atClient, cmpopts.SortSlices(netip.AddrPort.Compare), cmp.Comparer(func(a, b netip.AddrPort) bool { return a == b })))
	seen := make([]bool, n)
	for _, op := range ops {
		require.False(t, seen[op.Index], "operation %d ended twice", op.Index)
		seen[op.Index] = true
		assert.Equal(t, op.Index%3, op.Source)
		assert.Equal(t, host[op.Source], op.Local.Addr().String())
		assert.Equal(t, time.Duration(op.Index)*500*time.Microsecond, op.Due)
		assert.LessOrEqual(t, op.Due, op.Started)
		assert.Less(t, op.Started, op.Connected)
		assert.Less(t, op.Connected, op.Done)
		assert.NoError(t, op.Err)
	}
}

// standstill is the time during which a test kept something standing.
type standstill struct{ begin, end time.Time }

// waited is how many operations of cfg's schedule came due during the
// standstill and so had to wait at least d for its end.
func (s standstill) waited(schedule Schedule, start time.Time, d time.Duration) int64 {
	n := int64(0)
	for due := range schedule {
		if s.begin.Sub(start) < due && due <= s.end.Sub(start)-d {
			n++
		}
	}
	return n
}

func TestLatencyCountsFromTheDueTimeWhenTheServerStalls(t *testing.T) {
	const rate, stall = 1000, 300 * ms
	var standing sync.RWMutex
	target := serve(t, func(c *net.TCPConn) {
		if request(c) {
			standing.RLock()
			defer standing.RUnlock()
			_, _ = c.Write([]byte("+PONG\r\n"))
		}
	})
	progress := new(Progress)
	var still standstill
	var keeper sync.WaitGroup
	keeper.Go(func() {
		for progress.Snapshot().Started < rate/4 {
			time.Sleep(ms)
		}
		standing.Lock()
		still.begin = time.Now()
		time.Sleep(stall)
		still.end = time.Now()
		standing.Unlock()
	})
	schedule := Constant(rate, time.Second)
	report := load(t, Config{Targets: at(target), Schedule: schedule, Progress: progress})
	keeper.Wait()
	require.EqualValues(t, rate, report.OK)
	assert.GreaterOrEqual(t, report.Latency.Quantile(1), stall-2*ms)
	for _, d := range []time.Duration{20 * ms, 100 * ms, 200 * ms} {
		least := still.waited(schedule, report.Start, d)
		require.GreaterOrEqual(t, least, int64((stall-d)/ms)-1, "the load went on during the stall")
		assert.GreaterOrEqual(t, report.Latency.CountBetween(d-d/500, time.Hour), least, "latencies of %v and more", d)
	}
}

func TestLatencyCountsFromTheDueTimeWhenTheGeneratorStalls(t *testing.T) {
	const n, stall = 400, 200 * ms
	local := LocalSource("", netip.Addr{})
	made := 0
	var still standstill
	source := Source{Socket: func() (int, error) {
		if made++; made == 101 {
			still.begin = time.Now()
			time.Sleep(stall)
			still.end = time.Now()
		}
		return local.Socket()
	}}
	schedule := Constant(1000, n*ms)
	report := load(t, Config{Targets: at(serve(t, pong)), Schedule: schedule, Sources: []Source{source}})
	require.EqualValues(t, n, report.OK)
	for _, d := range []time.Duration{20 * ms, 100 * ms} {
		least := still.waited(schedule, report.Start, d)
		require.Positive(t, least)
		assert.GreaterOrEqual(t, report.Lateness.CountBetween(d-d/500, time.Hour), least, "latenesses of %v and more", d)
		assert.GreaterOrEqual(t, report.Latency.CountBetween(d-d/500, time.Hour), least, "latencies of %v and more", d)
	}
	require.ErrorContains(t, report.Behind(20*ms), "fell behind")
	require.NoError(t, report.Behind(time.Minute))
}

func TestALargeRunBalances(t *testing.T) {
	const n = 9000 // both ends of each, should none be served in time, are within 20,000 files
	progress := new(Progress)
	report := load(t, Config{Targets: at(epollServer(t)), Sources: hosts(50), Schedule: Poisson(10_000, time.Hour, 7).First(n), Close: Reset, Progress: progress})
	assert.EqualValues(t, n, report.Due)
	assert.EqualValues(t, n, report.OK, "failed: %v, not started: %d", report.Failed, report.NotStarted)
	assert.Equal(t, Snapshot{Due: n, Started: n, OK: n}, progress.Snapshot())
	t.Logf("lateness p50 %v p99 %v, connect p50 %v p99 %v, latency p50 %v p99 %v", report.Lateness.Quantile(0.5), report.Lateness.Quantile(0.99),
		report.Connect.Quantile(0.5), report.Connect.Quantile(0.99), report.Latency.Quantile(0.5), report.Latency.Quantile(0.99))
}

func TestCancel(t *testing.T) {
	cause := errors.New("enough")
	ctx, cancel := context.WithCancelCause(t.Context())
	progress := new(Progress)
	watched := make(chan struct{})
	go func() {
		defer close(watched)
		for progress.Snapshot().InFlight < 10 {
			time.Sleep(ms)
		}
		cancel(cause)
	}()
	begin := time.Now()
	report, err := Run(ctx, Config{Targets: at(serve(t, silent)), Schedule: Merge(Burst(10, 0), Constant(1, time.Hour).After(time.Hour)), ReplyTimeout: time.Hour, Progress: progress})
	<-watched
	require.ErrorIs(t, err, cause)
	assert.Less(t, time.Since(begin), time.Minute, "the wait for the next operation ends at once")
	require.NoError(t, report.Balanced())
	assert.Equal(t, Counts{Canceled: 10}, report.Failed)
	assert.EqualValues(t, 10, report.Due, "what was not yet due is not part of the account")
}

func TestCanceledBeforeItBegins(t *testing.T) {
	ctx, cancel := context.WithCancel(t.Context())
	cancel()
	report, err := Run(ctx, Config{Targets: at(listenOnly(t, 1)), Schedule: Merge(Burst(3, 0), Burst(3, time.Hour))})
	require.ErrorIs(t, err, context.Canceled)
	require.NoError(t, report.Balanced())
	assert.EqualValues(t, 3, report.NotStarted)
	assert.EqualValues(t, 3, report.Due)
}

func TestConfigIsChecked(t *testing.T) {
	target := netip.MustParseAddrPort("127.0.0.1:1")
	held := &Held{s: &sockets{}}
	for _, test := range []struct {
		want string
		cfg  Config
	}{
		{"no schedule", Config{Targets: at(target)}},
		{"no target", Config{Schedule: Burst(1, 0)}},
		{"no IPv4 address", Config{Schedule: Burst(1, 0), Targets: at(netip.MustParseAddrPort("[::1]:1"))}},
		{"no IPv4 address", Config{Schedule: Burst(1, 0), Targets: at(netip.MustParseAddrPort("127.0.0.1:0"))}},
		{`source "x" makes no sockets`, Config{Schedule: Burst(1, 0), Targets: at(target), Sources: []Source{{Name: "x"}}}},
		{"negative", Config{Schedule: Burst(1, 0), Targets: at(target), ConnectTimeout: -1}},
		{"Passive does not go with ConnectOnly", Config{Schedule: Burst(1, 0), Targets: at(target), Close: Passive, ConnectOnly: true}},
		{"Passive does not go with", Config{Schedule: Burst(1, 0), Held: held, Close: Passive}},
		{"ConnectOnly does nothing", Config{Schedule: Burst(1, 0), Held: held, ConnectOnly: true}},
	} {
		report, err := Run(t.Context(), test.cfg)
		require.ErrorContains(t, err, test.want)
		assert.Nil(t, report)
	}
	_, _, err := Hold(t.Context(), Config{Schedule: Burst(1, 0), Held: held})
	assert.ErrorContains(t, err, "takes none")
	_, _, err = Hold(t.Context(), Config{Schedule: Burst(1, 0), Targets: at(target), Close: Passive})
	assert.ErrorContains(t, err, "Passive does not go with")
}

func TestWithoutPwait2(t *testing.T) {
	// As on kernels before 5.11: milliseconds, rounded up.
	s, err := newSockets()
	require.NoError(t, err)
	defer s.close(Graceful)
	s.noPwait2 = true
	cfg, err := Config{Targets: at(serve(t, pong)), Schedule: Constant(1000, 100*ms)}.withDefaults()
	require.NoError(t, err)
	report, err := newEngine(cfg, s, false).run(t.Context())
	require.NoError(t, err)
	assert.EqualValues(t, 100, report.OK)
}
