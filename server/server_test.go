package server

import (
	"bytes"
	"context"
	"errors"
	"flag"
	"fmt"
	"io"
	"net"
	"strconv"
	"strings"
	"testing"
	"time"

	"github.com/stretchr/testify/assert"
	"github.com/stretchr/testify/require"
	"golang.org/x/sync/errgroup"
	"golang.org/x/sys/unix"

	"connlab/server/resp"
)

func TestAddressErrors(t *testing.T) {
	first := serve(t, nil)
	for _, tc := range []struct {
		addr, want string
		is         error
	}{
		{first.Addr().String(), "binding " + first.Addr().String() + ": address already in use (stop the program that listens there, see ss -lntp, or give another --addr)", unix.EADDRINUSE},
		{"192.0.2.1:6379", "binding 192.0.2.1:6379: cannot assign requested address (no interface here has that address, see ip addr)", unix.EADDRNOTAVAIL},
		{"localhost:6379", `setting addr to "localhost:6379": address "localhost:6379" is not IPv4:port, as 127.0.0.1:6379: ParseAddr("localhost"): unable to parse IP`, nil},
		{"[::1]:6379", `setting addr to "[::1]:6379": address "[::1]:6379" is not IPv4, which is all this server speaks`, nil},
	} {
		cfg := DefaultConfig()
		cfg.Addr = tc.addr
		_, err := New(cfg)
		require.EqualError(t, err, tc.want)
		if tc.is != nil {
			assert.ErrorIs(t, err, tc.is)
		}
	}
	cfg := DefaultConfig()
	cfg.Hz = 0
	_, err := New(cfg)
	assert.EqualError(t, err, `setting hz to "0": argument must be between 1 and 500 inclusive`)
}

// The listener must be plain TCP with the backlog that was asked for, and what was set on it must reach connections.
func TestListener(t *testing.T) {
	s := serve(t, func(c *Config) { c.Backlog = 7; c.KeepAlive = 90 * time.Second })
	proto, err := unix.GetsockoptInt(s.listenFD, unix.SOL_SOCKET, unix.SO_PROTOCOL)
	require.NoError(t, err)
	assert.Equal(t, unix.IPPROTO_TCP, proto)
	info, err := unix.GetsockoptTCPInfo(s.listenFD, unix.IPPROTO_TCP, unix.TCP_INFO)
	require.NoError(t, err)
	assert.Equal(t, uint32(7), info.Sacked, "of a listener the kernel reports the limit of the accept queue here")

	conn := dial(t, s.Addr().String())
	fd, err := strconv.Atoi(field1(conn.text("CLIENT", "LIST"), "fd="))
	require.NoError(t, err)
	for name, o := range map[string][3]int{
		"TCP_NODELAY": {unix.IPPROTO_TCP, unix.TCP_NODELAY, 1}, "SO_KEEPALIVE": {unix.SOL_SOCKET, unix.SO_KEEPALIVE, 1},
		"TCP_KEEPIDLE": {unix.IPPROTO_TCP, unix.TCP_KEEPIDLE, 90}, "TCP_KEEPINTVL": {unix.IPPROTO_TCP, unix.TCP_KEEPINTVL, 30},
	} {
		v, err := unix.GetsockoptInt(fd, o[0], o[1])
		require.NoError(t, err)
		assert.Equal(t, o[2], v, name)
	}
}

// field1 returns what follows a key in a line of CLIENT LIST.
func field1(line, key string) string {
	_, rest, _ := strings.Cut(line, " "+key)
	value, _, _ := strings.Cut(rest, " ")
	return value
}

func TestBacklogAboveSomaxconnIsSaid(t *testing.T) {
	limit, err := somaxconn()
	require.NoError(t, err)
	s := serve(t, func(c *Config) { c.Backlog = limit + 1 })
	require.Len(t, s.Warnings(), 1)
	assert.Contains(t, s.Warnings()[0], fmt.Sprintf("backlog of %d cannot be enforced: net.core.somaxconn is %d", limit+1, limit))
	assert.Equal(t, strconv.Itoa(limit), dial(t, s.Addr().String()).info("backlog_granted"))
	assert.Empty(t, serve(t, nil).Warnings())
}

func TestServeEnds(t *testing.T) {
	for name, end := range map[string]func(s *Server, cancel func()){
		"by its context": func(_ *Server, cancel func()) { cancel() },
		"by Close":       func(s *Server, _ func()) { s.Close(); s.Close() },
	} {
		t.Run(name, func(t *testing.T) {
			cfg := DefaultConfig()
			cfg.Addr = "127.0.0.1:0"
			s, err := New(cfg)
			require.NoError(t, err)
			ctx, cancel := context.WithCancel(t.Context())
			defer cancel()
			done := make(chan error, 1)
			go func() { done <- s.Serve(ctx) }()
			c := dial(t, s.Addr().String())
			c.do("PING")
			c.do("CONNLAB", "STALL", "600000")
			eventually(t, func() string { return "no stall" }, func() bool {
				c.send("PING") // the answer stays out once the stall began
				_, err := c.next(300 * time.Millisecond)
				return err != nil
			})
			end(s, cancel)
			select {
			case err := <-done:
				require.NoError(t, err)
			case <-time.After(patience):
				t.Fatal("Serve goes on, in its stall")
			}
			c.waitClosed()
			_, err = net.Dial("tcp4", s.Addr().String())
			require.ErrorIs(t, err, unix.ECONNREFUSED)
			require.ErrorContains(t, s.Serve(ctx), "closed or is served already")
			s.Close()
		})
	}
}

func TestCloseWithoutServe(t *testing.T) {
	cfg := DefaultConfig()
	cfg.Addr = "127.0.0.1:0"
	s, err := New(cfg)
	require.NoError(t, err)
	conn, err := net.Dial("tcp4", s.Addr().String())
	require.NoError(t, err, "the kernel completes connections from New on")
	defer conn.Close()
	s.Close()
	_, err = net.Dial("tcp4", s.Addr().String())
	assert.ErrorIs(t, err, unix.ECONNREFUSED)
}

func TestPipeliningInPieces(t *testing.T) {
	c := dial(t, serve(t, nil).Addr().String())
	const n = 3000
	var all []byte
	for i := range n {
		if i%10 == 0 {
			all = append(all, "ECHO "+strconv.Itoa(i)+"\r\n"...)
		} else {
			all = resp.AppendRequest(all, "ECHO", strconv.Itoa(i))
		}
	}
	for len(all) > 0 {
		k := min(len(all), 777)
		c.write(string(all[:k]))
		all = all[k:]
	}
	for i := range n {
		require.Equal(t, strconv.Itoa(i), string(c.receive().Str))
	}
}

func TestBigValues(t *testing.T) {
	s := serve(t, func(c *Config) { c.MaxBulk = 32 << 20 })
	c := dial(t, s.Addr().String())
	value := strings.Repeat("0123456789abcdef", 1<<20) // 16 MiB: many reads, many writes
	require.Equal(t, "+OK", c.do("SET", "big", value).String())
	got := c.do("GET", "big")
	assert.Zero(t, strings.Compare(value, string(got.Str)), "%d bytes came back", len(got.Str))
	assert.Equal(t, "+PONG", c.do("PING").String())
	eventually(t, func() string { return c.text("CLIENT", "INFO") }, func() bool {
		line := c.text("CLIENT", "INFO")
		free, err1 := strconv.Atoi(field1(line, "qbuf-free="))
		out, err2 := strconv.Atoi(field1(line, "rbs="))
		return err1 == nil && err2 == nil && free <= keepBuffer && out <= keepBuffer
	})
}

// What is announced takes no memory before it comes.
func TestAnnouncedIsNotAllocated(t *testing.T) {
	s := serve(t, nil)
	admin := dial(t, s.Addr().String())
	for range 50 {
		dial(t, s.Addr().String()).write("*1000000\r\n$536870912\r\nabc")
	}
	eventually(t, func() string { return admin.text("CLIENT", "LIST") }, func() bool {
		return strings.Count(admin.text("CLIENT", "LIST"), " qbuf=25 ") == 50
	})
	for line := range strings.Lines(admin.text("CLIENT", "LIST")) {
		total, err := strconv.Atoi(field1(line, "tot-mem="))
		require.NoError(t, err)
		assert.LessOrEqual(t, total, 16<<10, "%s", line)
	}
}

func TestQueryBufferLimit(t *testing.T) {
	s := serve(t, func(c *Config) { c.QueryBufferLimit = 1 << 20 })
	admin := dial(t, s.Addr().String())
	c := dial(t, s.Addr().String())
	junk := bytes.Repeat([]byte("x"), 64<<10)
	_, err := c.Write([]byte("*2\r\n$3\r\nSET\r\n$100000000\r\n"))
	require.NoError(t, err)
	require.NoError(t, c.SetWriteDeadline(time.Now().Add(patience)))
	for range 1 << 10 {
		if _, err = c.Write(junk); err != nil {
			break
		}
	}
	require.Error(t, err, "64 MiB were taken")
	assert.False(t, isTimeout(err), "the connection is closed, not stuck: %v", err)
	assert.Equal(t, "1", admin.info("client_query_buffer_limit_disconnections"))
}

// A client that asks and never reads is closed when too much has piled up, in one command or in many.
func TestOutputBufferLimit(t *testing.T) {
	s := serve(t, func(c *Config) { c.OutputBufferLimit = 1 << 20 })
	admin := dial(t, s.Addr().String())
	require.Equal(t, "+OK", admin.do("SET", "k", strings.Repeat("x", 100<<10)).String())

	args := append([]string{"MGET"}, strings.Fields(strings.Repeat("k ", 1000))...)
	one := dial(t, s.Addr().String())
	one.send(args...)
	one.waitClosed()
	assert.Equal(t, "1", admin.info("client_output_buffer_limit_disconnections"))

	many := dial(t, s.Addr().String())
	require.NoError(t, many.SetWriteDeadline(time.Now().Add(patience)))
	gets := bytes.Repeat(resp.AppendRequest(nil, "GET", "k"), 100)
	var err error
	for range 10_000 {
		if _, err = many.Write(gets); err != nil {
			break
		}
	}
	require.Error(t, err)
	assert.False(t, isTimeout(err), "the connection is closed, not stuck: %v", err)
	assert.Equal(t, "2", admin.info("client_output_buffer_limit_disconnections"))
	peak, err := strconv.Atoi(admin.info("used_memory_peak"))
	require.NoError(t, err)
	assert.Less(t, peak, 8<<20)
}

func isTimeout(err error) bool {
	e, ok := errors.AsType[net.Error](err)
	return ok && e.Timeout()
}

// Replies beyond the socket's buffer wait for the client and come complete.
func TestSlowReaderGetsEverything(t *testing.T) {
	s := serve(t, nil)
	c := dial(t, s.Addr().String())
	value := strings.Repeat("x", 1<<20)
	require.Equal(t, "+OK", c.do("SET", "k", value).String())
	const n = 40
	for range n {
		c.send("GET", "k")
	}
	admin := dial(t, s.Addr().String())
	eventually(t, func() string { return admin.text("CLIENT", "LIST") }, func() bool {
		return strings.Contains(admin.text("CLIENT", "LIST"), "events=rw")
	})
	for range n {
		require.Len(t, c.receive().Str, len(value))
	}
	assert.Equal(t, "+PONG", c.do("PING").String())
}

func TestMaxClients(t *testing.T) {
	s := serve(t, func(c *Config) { c.MaxClients = 2 })
	a, b := dial(t, s.Addr().String()), dial(t, s.Addr().String())
	a.do("PING")
	b.do("PING")
	third := dial(t, s.Addr().String())
	assert.Equal(t, []string{"-ERR max number of clients reached"}, third.waitClosed())
	assert.Equal(t, "1", a.info("rejected_connections"))
	require.NoError(t, b.Close())
	eventually(t, func() string { return a.info("connected_clients") }, func() bool { return a.info("connected_clients") == "1" })
	assert.Equal(t, "+PONG", dial(t, s.Addr().String()).do("PING").String(), "the place is free again")
	assert.Equal(t, "+OK", a.do("CONFIG", "SET", "maxclients", "5").String())
	dial(t, s.Addr().String()).do("PING")
	assert.Equal(t, "3", a.info("connected_clients"))
}

func TestClientKill(t *testing.T) {
	s := serve(t, nil)
	admin := dial(t, s.Addr().String())
	victims := make([]*conn, 4)
	ids := make([]string, 4)
	for i := range victims {
		victims[i] = dial(t, s.Addr().String())
		ids[i] = strconv.FormatInt(victims[i].do("CLIENT", "ID").Int, 10)
	}
	assert.Equal(t, "+OK", admin.do("CLIENT", "KILL", victims[0].LocalAddr().String()).String())
	victims[0].waitClosed()
	assert.Equal(t, ":1", admin.do("CLIENT", "KILL", "ID", ids[1]).String())
	victims[1].waitClosed()
	assert.Equal(t, ":1", admin.do("CLIENT", "KILL", "ADDR", victims[2].LocalAddr().String(), "TYPE", "normal").String())
	victims[2].waitClosed()
	assert.Equal(t, ":0", admin.do("CLIENT", "KILL", "ID", ids[0]).String(), "gone already")
	list := admin.text("CLIENT", "LIST", "ID", ids[3], ids[2])
	assert.Equal(t, 1, strings.Count(list, "\n"), "%s", list)
	assert.Equal(t, ":1", admin.do("CLIENT", "KILL", "LADDR", s.Addr().String()).String(), "not the one who asks")
	victims[3].waitClosed()
	assert.Equal(t, ":1", admin.do("CLIENT", "KILL", "SKIPME", "no").String(), "who asks gets the reply")
	assert.Empty(t, admin.waitClosed())
}

// pingOnce connects, asks once and closes.
func pingOnce(addr string) error {
	nc, err := net.Dial("tcp4", addr)
	if err != nil {
		return err
	}
	defer nc.Close()
	if _, err := nc.Write([]byte("PING\r\n")); err != nil {
		return err
	}
	_, err = io.ReadFull(nc, make([]byte, len("+PONG\r\n")))
	return err
}

// Short connections must leave nothing behind.
func TestShortConnections(t *testing.T) {
	s := serve(t, nil)
	var group errgroup.Group
	for range 4 {
		group.Go(func() error {
			for range 500 {
				if err := pingOnce(s.Addr().String()); err != nil {
					return err
				}
			}
			return nil
		})
	}
	require.NoError(t, group.Wait())
	admin := dial(t, s.Addr().String())
	eventually(t, func() string { return admin.info("connected_clients") }, func() bool { return admin.info("connected_clients") == "1" })
	assert.Equal(t, "2001", admin.info("accepted_total"))
}

func TestFlags(t *testing.T) {
	cfg := DefaultConfig()
	fs := flag.NewFlagSet("server", flag.ContinueOnError)
	cfg.Flags(fs)
	require.NoError(t, fs.Parse([]string{
		"--addr", "10.0.0.1:7000", "--backlog", "2048", "--accepts-per-cycle=10", "--hz", "100", "--maxclients", "5", "--timeout", "3", "--tcp-keepalive", "0",
		"--requirepass", "x", "--proto-max-bulk-len", "1mb", "--client-query-buffer-limit", "2gb", "--output-buffer-limit", "64kb", "--maxmemory", "1k",
		"--slowlog-log-slower-than", "-1", "--slowlog-max-len", "9", "--stall-mode", "spin", "--stall-every", "5000", "--stall-for", "1430", "--proto-max-multibulk-len", "100",
		"--close-delay", "60", "--close-after", "100",
	}))
	assert.Equal(t, Config{
		Addr: "10.0.0.1:7000", Backlog: 2048, AcceptsPerCycle: 10, Hz: 100, MaxClients: 5, Timeout: 3 * time.Second, RequirePass: "x",
		MaxBulk: 1 << 20, MaxArgs: 100, QueryBufferLimit: 2 << 30, OutputBufferLimit: 64 << 10, MaxMemory: 1000,
		SlowlogSlowerThan: -time.Microsecond, SlowlogMaxLen: 9, StallMode: StallSpin, StallEvery: 5 * time.Second, StallFor: 1430 * time.Millisecond,
		CloseDelay: 60 * time.Millisecond, CloseAfter: 100,
	}, cfg)
	var help strings.Builder
	fs.SetOutput(&help)
	fs.PrintDefaults()
	assert.Contains(t, help.String(), "net.core.somaxconn")
	for _, bad := range [][]string{{"--backlog", "x"}, {"--hz", "501"}, {"--addr", "nowhere"}, {"--maxmemory", "5 elephants"}, {"--stall-mode", "nap"}, {"--close-delay", "60001"}, {"--close-after", "-1"}, {"--bogus"}} {
		fs := flag.NewFlagSet("server", flag.ContinueOnError)
		fs.SetOutput(io.Discard)
		c := DefaultConfig()
		c.Flags(fs)
		require.Error(t, fs.Parse(bad), "%v", bad)
		assert.Equal(t, DefaultConfig(), c, "%v leaves everything as it was", bad)
	}
}

func TestMainExitCodes(t *testing.T) {
	taken := serve(t, nil).Addr().String()
	for _, tc := range []struct {
		args   []string
		code   int
		stderr string
	}{
		{[]string{"--help"}, 0, "-backlog places"},
		{[]string{"--bogus"}, 2, "flag provided but not defined: -bogus"},
		{[]string{"--hz", "0"}, 2, "argument must be between 1 and 500 inclusive"},
		{[]string{"start"}, 2, `unexpected argument "start"`},
		{[]string{"--addr", taken}, 1, "address already in use"},
	} {
		var stdout, stderr strings.Builder
		code := Main(t.Context(), tc.args, &stdout, &stderr)
		assert.Equal(t, tc.code, code, "%v: %s", tc.args, stderr.String())
		assert.Contains(t, stderr.String(), tc.stderr)
		assert.Empty(t, stdout.String())
	}
}

// As a program of its own: the ready line, service, and an orderly end on SIGTERM.
func TestProgram(t *testing.T) {
	addr, pid := startProgram(t, nil, "--backlog", "300")
	c := dial(t, addr)
	assert.Equal(t, "300", c.info("backlog_asked"))
	assert.Equal(t, strconv.Itoa(pid), c.info("process_id"))
	require.NoError(t, unix.Kill(pid, unix.SIGTERM))
	c.waitClosed()
}
