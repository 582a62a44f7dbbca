package server

import (
	"errors"
	"flag"
	"fmt"
	"math"
	"net/netip"
	"strconv"
	"strings"
	"time"

	"connlab/server/resp"
)

// setting is one row of the table that the command line, CONFIG GET and CONFIG SET share.
type setting struct {
	name string // in CONFIG
	flag string // on the command line, where it is another
	help string // for the command line; none: not a flag

	get func(*Config) string
	set func(*Config, string) error // nil: a constant that clients ask for

	startOnly bool // CONFIG SET refuses it
}

func (st *setting) flagName() string {
	if st.flag != "" {
		return st.flag
	}
	return st.name
}

// settings is the table. The error texts are those of Redis (config.c), since clients see them.
var settings = []setting{
	{
		name: "bind", flag: "addr", startOnly: true,
		help: "`address` to listen on, IPv4 and port; port 0 takes a free one and the ready line says which",
		get:  func(c *Config) string { return c.Addr },
		set: func(c *Config, s string) error {
			prev := c.Addr
			c.Addr = s
			if _, err := c.addrPort(); err != nil {
				c.Addr = prev
				return err
			}
			return nil
		},
	},
	{
		name: "port",
		get: func(c *Config) string {
			ap, _ := netip.ParseAddrPort(c.Addr) // checked when the server was made
			return strconv.Itoa(int(ap.Port()))
		},
	},
	number("tcp-backlog", func(c *Config) *int { return &c.Backlog }, 0, math.MaxInt32).asFlag("backlog",
		"`places` asked of listen(2) for connections that wait to be accepted; the kernel caps them at net.core.somaxconn and grants one more").atStart(),
	number("max-new-connections-per-cycle", func(c *Config) *int { return &c.AcceptsPerCycle }, 1, 1_000_000).asFlag("accepts-per-cycle",
		"`connections` accepted in one turn of the loop before other clients are served: 1000 as Redis to 7.2, 10 as Redis from 7.4"),
	number("accept-rate", func(c *Config) *int { return &c.AcceptRate }, 0, maxAcceptRate).asFlag("accept-rate",
		"`connections` accepted per second at most while others wait in the accept queue, 0 for no limit; of workers each"),
	number("hz", func(c *Config) *int { return &c.Hz }, 1, 500).asFlag("hz",
		"`runs` of the cron per second; an armed stall waits for the next one"),
	number("maxclients", func(c *Config) *int { return &c.MaxClients }, 1, math.MaxInt32).asFlag("maxclients",
		"`connections` at a time; the next one is accepted, told so and closed"),
	duration("timeout", func(c *Config) *time.Duration { return &c.Timeout }, time.Second, 0, math.MaxInt32).asFlag("timeout",
		"`seconds` without a request after which a client is closed, 0 for never"),
	duration("tcp-keepalive", func(c *Config) *time.Duration { return &c.KeepAlive }, time.Second, 0, 32767).asFlag("tcp-keepalive",
		"`seconds` of silence after which the kernel probes a client, 0 for never"),
	duration("close-delay", func(c *Config) *time.Duration { return &c.CloseDelay }, time.Millisecond, 0, 60_000).asFlag("close-delay",
		"`milliseconds` from a client's FIN to our close; above 40, the kernel's delayed ACK, ACK and FIN go out apart and the client is in FIN_WAIT_2 between them"),
	number("close-after", func(c *Config) *int { return &c.CloseAfter }, 0, math.MaxInt32).asFlag("close-after",
		"`requests` after whose reply a connection is closed, 0 for never; the server closes first, so TIME_WAIT is the server's"),
	duration("service-time", func(c *Config) *time.Duration { return &c.ServiceTime }, time.Microsecond, 0, 60_000_000).asFlag("service-time",
		"`microseconds` from a request to its reply beyond what the server needs, 0 for none; requests do not wait for one another"),
	number("max-request-rate", func(c *Config) *int { return &c.MaxRequestRate }, 0, 1_000_000_000).asFlag("max-request-rate",
		"`requests` per second that the server can serve, each in its turn, 0 for no limit; a pipeline that is read at once is one"),
	{
		name: "requirepass", help: "`password` that clients must give by AUTH or HELLO, empty for none",
		get: func(c *Config) string { return c.RequirePass },
		set: func(c *Config, s string) error { c.RequirePass = s; return nil },
	},
	memory("proto-max-bulk-len", func(c *Config) *int { return &c.MaxBulk }, 1<<20, math.MaxInt32).asFlag("proto-max-bulk-len",
		"`bytes` in one argument, units kb, mb and gb are understood"),
	number("proto-max-multibulk-len", func(c *Config) *int { return &c.MaxArgs }, 16, math.MaxInt32).asFlag("proto-max-multibulk-len",
		"`arguments` in one request"),
	memory("client-query-buffer-limit", func(c *Config) *int { return &c.QueryBufferLimit }, 1<<20, math.MaxInt64).asFlag("client-query-buffer-limit",
		"`bytes` of an unfinished request; a client that sends more is closed"),
	memory("output-buffer-limit", func(c *Config) *int { return &c.OutputBufferLimit }, 1<<14, math.MaxInt64).asFlag("output-buffer-limit",
		"`bytes` of replies that a client has not read; a client that lets more pile up is closed"),
	memory("maxmemory", func(c *Config) *int64 { return &c.MaxMemory }, 0, math.MaxInt64).asFlag("maxmemory",
		"`bytes` in use beyond which commands that write are refused, 0 for no limit"),
	duration("slowlog-log-slower-than", func(c *Config) *time.Duration { return &c.SlowlogSlowerThan }, time.Microsecond, -1, math.MaxInt64/1000).asFlag("slowlog-log-slower-than",
		"`microseconds` from which on a command is put into SLOWLOG, -1 for none"),
	number("slowlog-max-len", func(c *Config) *int { return &c.SlowlogMaxLen }, 0, math.MaxInt64).asFlag("slowlog-max-len",
		"`entries` that SLOWLOG keeps"),
	{
		name: "stall-mode", help: "how the thread stands still in stalls and delays, `sleep|spin`: off the CPU or on it",
		get: func(c *Config) string { return string(c.StallMode) },
		set: func(c *Config, s string) error {
			switch m := StallMode(strings.ToLower(s)); m {
			case StallSleep, StallSpin:
				c.StallMode = m
				return nil
			}
			return errors.New("argument(s) must be one of the following: sleep, spin")
		},
	},
	duration("stall-every", func(c *Config) *time.Duration { return &c.StallEvery }, time.Millisecond, 0, math.MaxInt32).asFlag("stall-every",
		"`milliseconds` from one periodic stall of the cron to the next, 0 for none"),
	duration("stall-for", func(c *Config) *time.Duration { return &c.StallFor }, time.Millisecond, 0, maxStall.Milliseconds()).asFlag("stall-for",
		"`milliseconds` that a periodic stall takes; SLOWLOG does not see it"),
	constant("save", ""), // asked for by redis-benchmark
	constant("appendonly", "no"),
	constant("databases", strconv.Itoa(databases)),
	constant("maxmemory-policy", "noeviction"),
}

// maxAcceptRate is more than a kernel completes connections.
const maxAcceptRate = 1_000_000

// maxStall bounds every way to make the thread stand still.
const maxStall = 10 * time.Minute

func (st setting) asFlag(flag, help string) setting {
	st.flag, st.help = flag, help
	return st
}

func (st setting) atStart() setting {
	st.startOnly = true
	return st
}

func constant(name, value string) setting {
	return setting{name: name, get: func(*Config) string { return value }}
}

var errNotInteger = errors.New("argument couldn't be parsed into an integer")

func checkRange(v, lo, hi int64) error {
	if v < lo || v > hi {
		return fmt.Errorf("argument must be between %d and %d inclusive", lo, hi)
	}
	return nil
}

func number(name string, field func(*Config) *int, lo, hi int64) setting {
	return setting{
		name: name,
		get:  func(c *Config) string { return strconv.Itoa(*field(c)) },
		set: func(c *Config, s string) error {
			v, ok := resp.ParseInt([]byte(s))
			if !ok {
				return errNotInteger
			}
			if err := checkRange(v, lo, hi); err != nil {
				return err
			}
			*field(c) = int(v)
			return nil
		},
	}
}

func duration(name string, field func(*Config) *time.Duration, unit time.Duration, lo, hi int64) setting {
	return setting{
		name: name,
		get: func(c *Config) string {
			if *field(c) < 0 {
				return "-1"
			}
			return strconv.FormatInt(int64(*field(c)/unit), 10)
		},
		set: func(c *Config, s string) error {
			v, ok := resp.ParseInt([]byte(s))
			if !ok {
				return errNotInteger
			}
			if err := checkRange(v, lo, hi); err != nil {
				return err
			}
			*field(c) = time.Duration(v) * unit
			return nil
		},
	}
}

func memory[T int | int64](name string, field func(*Config) *T, lo, hi int64) setting {
	return setting{
		name: name,
		get:  func(c *Config) string { return strconv.FormatInt(int64(*field(c)), 10) },
		set: func(c *Config, s string) error {
			v, ok := parseMemory(s)
			if !ok {
				return errors.New("argument must be a memory value")
			}
			if err := checkRange(v, lo, hi); err != nil {
				return err
			}
			*field(c) = T(v)
			return nil
		},
	}
}

// parseMemory reads a number of bytes with an optional unit: k, m, g are powers of 1000, kb, mb, gb of 1024 (util.c,
// memtoull).
func parseMemory(s string) (int64, bool) {
	digits := len(s)
	for i, c := range s {
		if c < '0' || c > '9' {
			digits = i
			break
		}
	}
	units := map[string]int64{"": 1, "b": 1, "k": 1000, "kb": 1 << 10, "m": 1e6, "mb": 1 << 20, "g": 1e9, "gb": 1 << 30}
	unit, ok := units[strings.ToLower(s[digits:])]
	if !ok {
		return 0, false
	}
	v, err := strconv.ParseInt(s[:digits], 10, 64)
	if err != nil || v > math.MaxInt64/unit {
		return 0, false
	}
	return v * unit, true
}

// flagValue lets a row of the table be a [flag.Value].
type flagValue struct {
	config  *Config
	setting *setting
}

func (f flagValue) String() string {
	if f.config == nil {
		return "" // the flag package asks a zero value
	}
	return f.setting.get(f.config)
}

func (f flagValue) Set(s string) error { return f.setting.set(f.config, s) }

// Flags registers every setting on fs, with its present value as the default.
func (c *Config) Flags(fs *flag.FlagSet) {
	for i := range settings {
		if st := &settings[i]; st.help != "" {
			fs.Var(flagValue{c, st}, st.flagName(), st.help)
		}
	}
}
