package server

import (
	"fmt"
	"net/netip"
	"time"

	"connlab/server/resp"
)

// StallMode is how the thread stands still in a stall, in a delayed command and in DEBUG SLEEP.
type StallMode string

// The two modes. In both the loop serves nobody.
const (
	StallSleep StallMode = "sleep" // off the CPU, as a page fault or a slow disk
	StallSpin  StallMode = "spin"  // on the CPU, as freeing a million buffers
)

// Config is what a server is started with. Start from [DefaultConfig]; a zero Config is not valid. The settings that may
// change while the server runs (CONFIG SET) are marked so.
type Config struct {
	Addr    string // where to listen, IPv4 address:port; port 0 takes a free one
	Backlog int    // argument of listen(2); the kernel caps it at net.core.somaxconn

	AcceptsPerCycle int // connections accepted in one cycle of the loop; changeable
	Hz              int // runs of the cron per second, 1 to 500; changeable
	MaxClients      int // connections at a time; one more gets an error and is closed; changeable

	// AcceptRate is how many connections a second are accepted at most, 0 for no limit; changeable. As long as the accept queue has
	// any, it is the rate at which that queue drains: those above it stay there, and the loop serves its clients meanwhile. A
	// quiet time saves up a little, see [AcceptBurst]. EMQX has the setting as max_conn_rate, 1,000 for its TCP listener in the
	// emqx.conf of 4.x, where all of a second's connections are granted at the beginning of the second (esockd_limiter.erl).
	AcceptRate int

	Timeout   time.Duration // idle time after which a client is closed, in whole seconds, 0 for never; changeable
	KeepAlive time.Duration // TCP keepalive, in whole seconds, 0 for none; changeable, for new connections

	// CloseDelay is the time from a client's FIN to our close, in milliseconds up to a minute; changeable, also for
	// those that wait already. A FIN that arrives has the kernel delay the ACK (net/ipv4/tcp_input.c, tcp_fin enters
	// pingpong mode) by TCP_DELACK_MIN (include/net/tcp.h, HZ/25: 40 ms). A close within that time makes ACK and FIN one
	// segment, so that the client goes from FIN_WAIT_1 to TIME_WAIT; a later one makes them two, with FIN_WAIT_2 between.
	CloseDelay time.Duration
	// CloseAfter is the number of requests after whose last reply we close a connection, 0 for never; changeable. We
	// close first then, and TIME_WAIT is ours, as with nginx's keepalive_requests. What the client had sent beyond is not
	// served; bytes of it that were not even read make the kernel send RST instead of FIN (net/ipv4/tcp.c, __tcp_close).
	CloseAfter int

	// ServiceTime is the time from a request to its reply beyond what the server needs for it, in microseconds up to a
	// minute; changeable, for requests to come. It is a delay and no occupation: requests do not wait for one another, and the
	// loop serves others meanwhile.
	ServiceTime time.Duration
	// MaxRequestRate is how many requests a second the server can serve, 0 for no limit; changeable, for requests to
	// come. Each takes its turn for 1/MaxRequestRate and then ServiceTime, without occupying the loop. A request is what
	// one read of up to 16 KiB (networking.c, PROTO_IOBUF_LEN) brings, a command or a pipeline: a Redis at its limit
	// serves more commands in pipelines, at hardly more requests.
	MaxRequestRate int

	RequirePass string // password clients must give, empty for none; changeable

	MaxBulk           int   // bytes in one argument; changeable
	MaxArgs           int   // arguments of one request; changeable
	QueryBufferLimit  int   // bytes of an unfinished request; more closes the client; changeable
	OutputBufferLimit int   // bytes of replies that a client has not taken; more closes it; changeable
	MaxMemory         int64 // bytes in use beyond which writes are refused, 0 for no limit; changeable

	SlowlogSlowerThan time.Duration // commands at least this long are logged, negative for none; changeable
	SlowlogMaxLen     int           // entries kept; changeable

	StallMode  StallMode     // how the thread stands still; changeable
	StallEvery time.Duration // time from the start of a periodic stall to the next, 0 for none; changeable
	StallFor   time.Duration // length of a periodic stall; changeable
}

// DefaultConfig returns the defaults of Redis where it has the setting.
func DefaultConfig() Config {
	lim := resp.DefaultLimits()
	return Config{
		Addr:              "127.0.0.1:6379",
		Backlog:           511,
		AcceptsPerCycle:   1000,
		Hz:                10,
		MaxClients:        10000,
		KeepAlive:         300 * time.Second,
		MaxBulk:           lim.MaxBulk,
		MaxArgs:           lim.MaxArgs,
		QueryBufferLimit:  1 << 30,
		OutputBufferLimit: 256 << 20,
		SlowlogSlowerThan: 10 * time.Millisecond,
		SlowlogMaxLen:     128,
		StallMode:         StallSleep,
	}
}

// addrPort reads Addr.
func (c *Config) addrPort() (netip.AddrPort, error) { return parseAddr(c.Addr) }

func parseAddr(addr string) (netip.AddrPort, error) {
	ap, err := netip.ParseAddrPort(addr)
	if err != nil {
		return ap, fmt.Errorf("address %q is not IPv4:port, as 127.0.0.1:6379: %w", addr, err)
	}
	if !ap.Addr().Is4() {
		return ap, fmt.Errorf("address %q is not IPv4, which is all this server speaks", addr)
	}
	return ap, nil
}

// validate checks every setting by the rule that CONFIG SET uses.
func (c *Config) validate() error {
	for i := range settings {
		st := &settings[i]
		if st.set == nil {
			continue
		}
		if err := st.set(c, st.get(c)); err != nil {
			return fmt.Errorf("setting %s to %q: %w", st.flagName(), st.get(c), err)
		}
	}
	return nil
}
