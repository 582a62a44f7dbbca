package loadgen

import (
	"context"
	"io"
	"math/rand/v2"
	"net"
	"net/netip"
	"slices"
	"sync"
	"testing"
	"time"

	"github.com/stretchr/testify/assert"
	"github.com/stretchr/testify/require"
)

// peers are the connections that a server has accepted, in their order.
type peers struct {
	mu    sync.Mutex
	conns []*net.TCPConn
}

func (p *peers) add(c *net.TCPConn) (number int) {
	p.mu.Lock()
	defer p.mu.Unlock()
	p.conns = append(p.conns, c)
	return len(p.conns) - 1
}

func (p *peers) accepted() int {
	p.mu.Lock()
	defer p.mu.Unlock()
	return len(p.conns)
}

func (p *peers) pong(c *net.TCPConn) {
	p.add(c)
	pong(c)
}

// cut ends connections from one number up to another, not included.
func (p *peers) cut(t *testing.T, from, to int, reset bool) {
	p.mu.Lock()
	defer p.mu.Unlock()
	for _, c := range p.conns[from:to] {
		if reset {
			require.NoError(t, c.SetLinger(0))
		}
		require.NoError(t, c.Close())
	}
}

func newFleet(t *testing.T, cfg FleetConfig) *Fleet {
	t.Helper()
	f, err := NewFleet(cfg)
	require.NoError(t, err)
	t.Cleanup(f.Close)
	return f
}

// filled is a fleet of which every client is connected.
func filled(t *testing.T, cfg FleetConfig) *Fleet {
	t.Helper()
	f := newFleet(t, cfg)
	report, err := f.Fill(t.Context())
	require.NoError(t, err)
	require.NoError(t, report.Balanced())
	require.EqualValues(t, cfg.Clients, report.Open)
	return f
}

func sum(series []int64) (n int64) {
	for _, v := range series {
		n += v
	}
	return n
}

func TestFleetComesBack(t *testing.T) {
	const n = 200
	server := new(peers)
	f := newFleet(t, FleetConfig{
		Target: serve(t, server.pong), Clients: n, Window: 16,
		Sources:   []netip.Addr{netip.MustParseAddr("127.0.0.2"), netip.MustParseAddr("127.0.0.3")},
		Reconnect: Reconnect{Spread: 200 * ms},
	})
	fill, err := f.Fill(t.Context())
	require.NoError(t, err)
	assert.EqualValues(t, n, fill.Attempts)
	assert.EqualValues(t, n, fill.OK)
	assert.EqualValues(t, n, fill.Open)
	assert.EqualValues(t, n, sum(fill.StartedPer100ms))
	assert.EqualValues(t, n, sum(fill.OKPer100ms))
	assert.Empty(t, fill.Cut)
	for _, h := range []*Histogram{fill.Connect, fill.Reply, fill.Recover} {
		assert.EqualValues(t, n, h.Count())
	}
	assert.Equal(t, n, server.accepted())
	from := map[string]int{}
	for _, c := range server.conns {
		from[c.RemoteAddr().(*net.TCPAddr).IP.String()]++
	}
	assert.Equal(t, map[string]int{"127.0.0.2": n / 2, "127.0.0.3": n / 2}, from)

	f.Arm()
	server.cut(t, 0, 50, true)
	server.cut(t, 50, 100, false)
	storm, err := f.Storm(t.Context(), time.Now().Add(100*ms), 20*time.Second)
	require.NoError(t, err)
	require.NoError(t, storm.Balanced())
	assert.Equal(t, Counts{ReadReset: 50, EOF: 50}, storm.Cut)
	assert.EqualValues(t, 100, storm.Attempts)
	assert.EqualValues(t, 100, storm.OK)
	assert.EqualValues(t, n, storm.Open)
	assert.Equal(t, n, f.Open())
	assert.Equal(t, n+100, server.accepted())
	for _, h := range []*Histogram{storm.Connect, storm.Reply, storm.Recover, storm.Lateness} {
		assert.EqualValues(t, 100, h.Count())
	}
	// 50 are due in each step. A pause makes them late, nothing makes them early.
	assert.EqualValues(t, 100, sum(storm.StartedPer100ms))
	assert.LessOrEqual(t, storm.StartedPer100ms[0], int64(50))
	assert.GreaterOrEqual(t, storm.LastOKAfter(), 198*ms, "the last client is due after 99 of 100 parts of the spread")
	assert.GreaterOrEqual(t, storm.Took(), storm.LastOKAfter())

	_, err = f.Storm(t.Context(), time.Now(), time.Second)
	require.ErrorContains(t, err, "begins with Arm")

	pinged, err := f.Ping(t.Context(), 10*time.Second)
	require.NoError(t, err)
	assert.EqualValues(t, n, pinged.OK)
	assert.EqualValues(t, n, pinged.Reply.Count())
	assert.Zero(t, pinged.Connect.Count())
	assert.Zero(t, pinged.Recover.Count(), "nobody was without service")
}

// The times at which clients come back are a choice that needs no server.
func TestFleetPolicy(t *testing.T) {
	const n, spread, moment = 1000, time.Second, 5 * time.Second
	waits := func(policy Reconnect) (order []int32, waits []time.Duration) {
		f := newFleet(t, FleetConfig{Target: netip.MustParseAddrPort("127.0.0.1:1"), Clients: n, Reconnect: policy})
		f.releaseAll(moment)
		for i, ok := f.due.first(); ok; i, ok = f.due.first() {
			f.due.remove(i)
			order = append(order, i)
			waits = append(waits, f.clients[i].deadline-moment)
		}
		return order, waits
	}
	evenOrder, even := waits(Reconnect{Spread: spread, Seed: 1})
	require.Len(t, even, n)
	for k, wait := range even {
		assert.InDelta(t, time.Duration(k)*ms, wait, 1000, "client %d, in ns", k)
	}
	inOrder := slices.Clone(evenOrder)
	slices.Sort(inOrder)
	assert.NotEqual(t, inOrder, evenOrder, "in random order")
	again, _ := waits(Reconnect{Spread: spread, Seed: 1})
	assert.Equal(t, evenOrder, again, "the same with the same seed")
	other, _ := waits(Reconnect{Spread: spread, Seed: 2})
	assert.NotEqual(t, evenOrder, other, "another with another seed")

	_, jittered := waits(Reconnect{Spread: spread, Jitter: true, Seed: 1})
	require.Len(t, jittered, n)
	perStep := make([]int, 10)
	for _, wait := range jittered {
		require.GreaterOrEqual(t, wait, time.Duration(0))
		require.Less(t, wait, spread)
		perStep[wait/FleetStep]++
	}
	assert.NotEqual(t, even, jittered)
	for step, k := range perStep {
		assert.InDelta(t, 100, k, 50, "step %d: five standard deviations of a binomial", step)
	}

	_, unsteady := waits(Reconnect{Spread: spread, Unsteady: 10 * ms, Seed: 1})
	require.Len(t, unsteady, n)
	later := 0
	for k, wait := range unsteady {
		assert.InDelta(t, time.Duration(k)*ms, wait, float64(10*ms), "client %d, in ns", k)
		if wait != even[k] {
			later++
		}
	}
	assert.Greater(t, later, n/2)

	_, atOnce := waits(Reconnect{})
	assert.Equal(t, make([]time.Duration, n), atOnce)
}

func TestReconnectAfter(t *testing.T) {
	for _, tt := range []struct {
		why    string
		policy Reconnect
		failed uint8
		want   time.Duration
	}{
		{"at once", Reconnect{Max: time.Second}, 1, 0},
		{"at once for ever", Reconnect{Max: time.Second}, 255, 0},
		{"first failure", Reconnect{Base: 100 * ms, Max: time.Second}, 1, 100 * ms},
		{"doubled", Reconnect{Base: 100 * ms, Max: time.Second}, 2, 200 * ms},
		{"doubled three times", Reconnect{Base: 100 * ms, Max: time.Second}, 4, 800 * ms},
		{"no more than the maximum", Reconnect{Base: 100 * ms, Max: time.Second}, 5, time.Second},
		{"without an overflow", Reconnect{Base: 100 * ms, Max: never}, 255, never},
		{"a base beyond the maximum", Reconnect{Base: 2 * time.Second, Max: time.Second}, 1, time.Second},
	} {
		assert.Equal(t, tt.want, tt.policy.after(tt.failed), tt.why)
	}
}

func TestFleetBacksOff(t *testing.T) {
	const seed, base = 7, 20 * ms
	server := new(peers)
	target := serve(t, func(c *net.TCPConn) {
		if number := server.add(c); number == 1 || number == 2 {
			answer("-LOADING not yet\r\n")(c)
			return
		}
		pong(c)
	})
	f := filled(t, FleetConfig{Target: target, Clients: 1, Reconnect: Reconnect{Base: base, Max: time.Second, Seed: seed}})
	f.Arm()
	server.cut(t, 0, 1, true)
	report, err := f.Storm(t.Context(), time.Now().Add(50*ms), 20*time.Second)
	require.NoError(t, err)
	assert.EqualValues(t, 3, report.Attempts)
	assert.Equal(t, Counts{ServerError: 2}, report.Failed)
	assert.Equal(t, map[string]int64{"reply: LOADING": 2}, report.Causes)
	assert.EqualValues(t, 1, report.OK)
	assert.EqualValues(t, 3, report.Lateness.Count())
	assert.EqualValues(t, 1, report.Recover.Count())
	random := rand.New(rand.NewPCG(seed, 0))
	waits := time.Duration(random.Int64N(int64(base)+1) + random.Int64N(int64(2*base)+1))
	assert.GreaterOrEqual(t, report.LastOKAfter(), waits, "both waits of the policy")
}

func TestFleetOfAServerThatIsGone(t *testing.T) {
	_, target := boundSocket(t)
	f := newFleet(t, FleetConfig{Target: target, Clients: 50, Reconnect: Reconnect{Base: 10 * ms, Max: 10 * ms}})
	fill, err := f.Fill(t.Context())
	require.ErrorContains(t, err, "0 of 50 clients are connected; failed: connect_refused")
	require.NoError(t, fill.Balanced())
	assert.Zero(t, fill.Open)

	f.Arm()
	storm, err := f.Storm(t.Context(), time.Now(), 700*ms)
	require.NoError(t, err, "the report says who has no connection")
	require.NoError(t, storm.Balanced())
	assert.Zero(t, storm.Open)
	assert.Zero(t, storm.OK)
	assert.GreaterOrEqual(t, storm.Failed[ConnectRefused]+storm.Failed[Canceled], int64(50))
	assert.LessOrEqual(t, storm.Attempts, int64(50*700), "a wait of 5 ms on average, not none")
	assert.Empty(t, storm.Cut)

	ctx, cancel := context.WithCancel(t.Context())
	cancel()
	f.Arm()
	_, err = f.Storm(ctx, time.Now().Add(time.Hour), time.Second)
	require.ErrorIs(t, err, context.Canceled)
}

func TestFillStopsAtTheFirstFailure(t *testing.T) {
	f := newFleet(t, FleetConfig{Target: serve(t, silent), Clients: 300, Window: 10, ReplyTimeout: 100 * ms})
	report, err := f.Fill(t.Context())
	require.ErrorContains(t, err, "read_timeout 10")
	assert.EqualValues(t, 10, report.Attempts, "a window")
	assert.Equal(t, Counts{ReadTimeout: 10}, report.Failed)
	assert.EqualValues(t, 10, report.Connect.Count())
	assert.Zero(t, report.Open)
}

func TestFillCanBeRepeated(t *testing.T) {
	server := new(peers)
	f := newFleet(t, FleetConfig{Clients: 20, Window: 1, Target: serve(t, func(c *net.TCPConn) {
		if server.add(c) == 7 {
			return
		}
		pong(c)
	})})
	report, err := f.Fill(t.Context())
	require.ErrorContains(t, err, "7 of 20 clients are connected; failed: ")
	assert.EqualValues(t, 1, report.Failed.Sum(), "%v", report.Failed)
	report, err = f.Fill(t.Context())
	require.NoError(t, err)
	assert.EqualValues(t, 13, report.OK)
	assert.EqualValues(t, 20, report.Open)
}

// Who waits in front of a full accept queue is a victim by the kernel's account.
func TestFleetCountsVictims(t *testing.T) {
	f := newFleet(t, FleetConfig{Target: listenOnly(t, 4), Clients: 20, ConnectTimeout: 1200 * ms, ReplyTimeout: 50 * ms})
	report, err := f.Fill(t.Context())
	require.ErrorContains(t, err, "0 of 20 clients are connected")
	assert.Equal(t, Counts{ConnectTimeout: 15, ReadTimeout: 5}, report.Failed)
	assert.EqualValues(t, 5, report.Connect.Count(), "the backlog and one")
	assert.EqualValues(t, 15, report.FirstVictims)
}

func TestFleetPing(t *testing.T) {
	const n = 60
	server := new(peers)
	f := filled(t, FleetConfig{Clients: n, Window: 20, Target: serve(t, func(c *net.TCPConn) {
		if server.add(c)%3 > 0 {
			pong(c)
			return
		}
		request(c)
		_, _ = io.WriteString(c, "+PONG\r\n")
		silent(c)
	})})
	report, err := f.Ping(t.Context(), 700*ms)
	require.NoError(t, err)
	require.NoError(t, report.Balanced())
	assert.EqualValues(t, n, report.Attempts)
	assert.EqualValues(t, 40, report.OK)
	assert.Equal(t, Counts{ReadTimeout: 20}, report.Failed)
	assert.EqualValues(t, 40, report.Open)
	assert.Empty(t, report.Cut)
	_, err = f.Ping(t.Context(), 0)
	require.Error(t, err)
}

func TestFleetKeep(t *testing.T) {
	const n = 40
	server := new(peers)
	f := filled(t, FleetConfig{Target: serve(t, server.pong), Clients: n, Reconnect: Reconnect{Spread: 20 * ms}})
	ctx, cancel := context.WithCancel(t.Context())
	defer cancel()
	var report *FleetReport
	var err error
	var keeping sync.WaitGroup
	keeping.Go(func() { report, err = f.Keep(ctx) })
	for round := range 3 {
		server.cut(t, round*10, round*10+10, round == 0)
		eventually(t, func() (bool, any) {
			accepted, open := server.accepted(), f.Open()
			return accepted == n+10*(round+1) && open == n, []int{accepted, open}
		})
	}
	cancel()
	keeping.Wait()
	require.NoError(t, err)
	assert.Equal(t, Counts{ReadReset: 10, EOF: 20}, report.Cut)
	assert.EqualValues(t, 30, report.OK)
	assert.EqualValues(t, 30, report.Recover.Count())
	assert.EqualValues(t, n, report.Open)
}

func TestFleetWatch(t *testing.T) {
	server := new(peers)
	f := filled(t, FleetConfig{Target: serve(t, server.pong), Clients: 10})
	server.cut(t, 0, 4, false)
	_, err := server.conns[5].Write([]byte("+unasked\r\n"))
	require.NoError(t, err)
	ctx, cancel := context.WithCancel(t.Context())
	defer cancel()
	var watching sync.WaitGroup
	watching.Go(func() { assert.NoError(t, f.Watch(ctx)) })
	eventually(t, func() (bool, any) { return f.Open() == 5, f.Open() })
	cancel()
	watching.Wait()
	assert.Equal(t, Counts{EOF: 4, BadReply: 1}, f.Report().Cut)
	assert.Equal(t, 10, server.accepted(), "nobody came back")
	f.Close()
	f.Close()
	_, err = f.Fill(t.Context())
	require.ErrorContains(t, err, "closed")
	assert.Zero(t, f.Open())
}

func TestFleetReply(t *testing.T) {
	for _, tt := range []struct {
		why    string
		pieces []string
		want   error
	}{
		{"whole", []string{"+PONG\r\n"}, nil},
		{"split", []string{"+PO", "NG\r\n"}, nil},
		{"byte by byte", []string{"+", "P", "O", "N", "G", "\r", "\n"}, nil},
		{"another reply", []string{"+OK\r\n"}, errBadReply},
		{"wrong in the second piece", []string{"+PO", "ST\r\n"}, errBadReply},
		{"too much", []string{"+PONG\r\n+PONG\r\n"}, errBadReply},
		{"too much in the second piece", []string{"+PONG", "\r\n+"}, errBadReply},
		{"an error", []string{"-ERR max number of clients reached\r\n"}, ErrServer},
		{"an error in pieces", []string{"-ERR max"}, ErrServer},
	} {
		var m member
		var err error
		for _, piece := range tt.pieces {
			require.NoError(t, err, tt.why)
			err = m.reply([]byte(piece))
		}
		if tt.want == nil {
			require.NoError(t, err, tt.why)
			assert.Len(t, pingReply, int(m.replied), tt.why)
		} else {
			require.ErrorIs(t, err, tt.want, tt.why)
		}
	}
}

func TestFleetConfigErrors(t *testing.T) {
	target := netip.MustParseAddrPort("127.0.0.1:1")
	for _, tt := range []struct {
		cfg  FleetConfig
		want string
	}{
		{FleetConfig{Clients: 1}, "no IPv4 address and port"},
		{FleetConfig{Target: target}, "0 clients are out of range"},
		{FleetConfig{Target: target, Clients: 1_000_001}, "1 to 1000000"},
		{FleetConfig{Target: target, Clients: 1, Window: -1}, "window is negative"},
		{FleetConfig{Target: target, Clients: 1, Sources: []netip.Addr{netip.MustParseAddr("::1")}}, "source ::1"},
		{FleetConfig{Target: target, Clients: 1, Reconnect: Reconnect{Base: -1}}, "policy is negative"},
	} {
		_, err := NewFleet(tt.cfg)
		assert.ErrorContains(t, err, tt.want)
	}
	require.ErrorContains(t, checkFiles(1<<40), "(ulimit -n)")
}

// A heap that is asked in every order agrees with a list.
func TestTimers(t *testing.T) {
	random := rand.New(rand.NewPCG(1, 2))
	heap := timers{clients: make([]member, 50)}
	list := map[int32]time.Duration{}
	for range 5000 {
		i := int32(random.IntN(len(heap.clients)))
		if random.IntN(3) > 0 {
			list[i] = time.Duration(random.IntN(30))
			heap.set(i, list[i])
		} else {
			delete(list, i)
			heap.remove(i)
		}
		require.Len(t, heap.order, len(list))
		earliest := never
		for _, at := range list {
			earliest = min(earliest, at)
		}
		require.Equal(t, earliest, heap.next())
	}
}
