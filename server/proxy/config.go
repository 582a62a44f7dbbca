package proxy

import (
	"errors"
	"flag"
	"fmt"
	"io"
	"net"
	"net/netip"
	"slices"
	"time"
)

// Learn is where the VIP of a connection comes from.
type Learn string

// The three ways to learn the VIP.
const (
	LearnOption Learn = "option" // a TCP option of the SYN, see [ParseSavedSYN]
	LearnHeader Learn = "header" // the destination in the PROXY protocol header, version 1 or 2, that every connection must begin with
	LearnLocal  Learn = "local"  // the local address of the connection
)

// DefaultOptionKind is the kind of the TCP option that carries the VIP, as TOA_VIP has it.
const DefaultOptionKind = 250

// Config is what a proxy is started with. Start from [DefaultConfig]; a zero Config is not valid.
type Config struct {
	Addr       netip.AddrPort // where to listen, IPv4; port 0 takes a free one
	Learn      Learn
	OptionKind uint // up to 255 and none that Linux reads, for LearnOption

	Routes  []Route        // the first that contains the VIP decides
	Default netip.AddrPort // upstream of connections that name no VIP; the zero value has them reset

	Source     netip.Addr // own address of upstream connections; the zero value leaves it to the kernel
	SendHeader bool       // begin upstream connections with a PROXY protocol header, version 2

	// ConnectTimeout is how long an upstream may take to accept, and a client to send its PROXY protocol header.
	ConnectTimeout time.Duration

	Verbose bool      // has [Main] write Log, and the counters at the end, to its standard error
	Log     io.Writer // gets a line for each connection that failed; nil for none
}

// DefaultConfig returns the defaults of the command line. It still lacks a route.
func DefaultConfig() Config {
	return Config{
		Addr:           netip.MustParseAddrPort("127.0.0.1:6379"),
		Learn:          LearnOption,
		OptionKind:     DefaultOptionKind,
		ConnectTimeout: 5 * time.Second,
	}
}

// Flags defines the flags of the settings; their present values are the defaults. A route given is added to Routes.
func (c *Config) Flags(fs *flag.FlagSet) {
	fs.TextVar(&c.Addr, "addr", c.Addr, "where to listen: IPv4 `address:port`; port 0 takes a free one")
	fs.StringVar((*string)(&c.Learn), "learn", string(c.Learn),
		"`where` the VIP is learned from: option (of the SYN), header (PROXY protocol v1 or v2), local (address of the connection)")
	fs.UintVar(&c.OptionKind, "option-kind", c.OptionKind, "`kind` of the TCP option that carries the VIP")
	fs.Func("route", "where VIPs go, as `prefix=upstream`: a prefix of the same length and a port, or a list of address:port; "+
		"the port of the VIP does not matter; may be given again, the first that fits decides", func(s string) error {
		r, err := ParseRoute(s)
		if err != nil {
			return err
		}
		c.Routes = append(c.Routes, r)
		return nil
	})
	fs.TextVar(&c.Default, "default", c.Default, "upstream `address:port` of connections that name no VIP; without it they are reset")
	fs.TextVar(&c.Source, "source", c.Source, "own `address` of upstream connections")
	fs.BoolVar(&c.SendHeader, "send-header", c.SendHeader, "begin upstream connections with a PROXY protocol v2 header: client as source, VIP as destination")
	fs.BoolVar(&c.Verbose, "verbose", c.Verbose, "print each connection that failed, and the counters at the end")
	fs.DurationVar(&c.ConnectTimeout, "connect-timeout", c.ConnectTimeout, "how long an upstream may take to accept, and a client to send its header")
}

// linuxKinds are the options that Linux reads in a SYN or elsewhere (include/net/tcp.h, TCPOPT_*; 6 and 7 are of RFC 1146).
var linuxKinds = []uint{0, 1, 2, 3, 4, 5, 6, 7, 8, 19, 29, 30, 34}

// wants say what the value of a flag looks like; of --route its own errors do.
var wants = map[string]string{
	"addr":            "an IPv4 address and a port, as 10.0.0.11:6379",
	"learn":           fmt.Sprintf("%s, %s or %s", LearnOption, LearnHeader, LearnLocal),
	"option-kind":     fmt.Sprintf("a number from 9 to 255 but 19, 29, 30 and 34, as %d", DefaultOptionKind),
	"default":         "an IPv4 address and a port, as 10.9.0.1:6379",
	"source":          "an IPv4 address, as 10.0.0.2",
	"send-header":     "true or false",
	"verbose":         "true or false",
	"connect-timeout": "a duration above 0, as 5s",
}

// Check reports the first setting that is not valid, by its flag.
func (c *Config) Check() error {
	switch {
	case !c.Addr.Addr().Is4():
		return fmt.Errorf("--addr %v: want %s", c.Addr, wants["addr"])
	case c.Learn != LearnOption && c.Learn != LearnHeader && c.Learn != LearnLocal:
		return fmt.Errorf("--learn %s: want %s", c.Learn, wants["learn"])
	case slices.Contains(linuxKinds, c.OptionKind):
		return fmt.Errorf("--option-kind %d: this kind has a meaning of its own; want %s", c.OptionKind, wants["option-kind"])
	case c.OptionKind > 255:
		return fmt.Errorf("--option-kind %d: want %s", c.OptionKind, wants["option-kind"])
	case len(c.Routes) == 0 && !c.Default.IsValid():
		return errors.New("neither a route nor a default upstream, so nobody could be served; " +
			"give --route, as 10.8.0.0/16=10.9.0.0/16:6379, or --default, as 10.9.0.1:6379")
	case c.Default.IsValid() && (!c.Default.Addr().Is4() || c.Default.Port() == 0):
		return fmt.Errorf("--default %v: want %s", c.Default, wants["default"])
	case c.Source.IsValid() && !c.Source.Is4():
		return fmt.Errorf("--source %v: want %s", c.Source, wants["source"])
	case c.ConnectTimeout <= 0:
		return fmt.Errorf("--connect-timeout %v: want %s", c.ConnectTimeout, wants["connect-timeout"])
	}
	for i, r := range c.Routes {
		if err := r.check(); err != nil {
			return fmt.Errorf("--route %v: %w", r, err)
		}
		for _, before := range c.Routes[:i] {
			if before.VIPs.Bits() <= r.VIPs.Bits() && before.VIPs.Contains(r.VIPs.Addr()) {
				return fmt.Errorf("--route %v is never reached: %v comes before it; put it first", r, before)
			}
		}
	}
	return c.checkLoop()
}

// checkLoop refuses upstreams that are the proxy itself: one connection would become as many as there are descriptors.
// It knows those that are given one by one, not what a prefix leads to.
func (c *Config) checkLoop() error {
	type upstream struct {
		flag string
		to   netip.AddrPort
	}
	upstreams := []upstream{{"--default " + c.Default.String(), c.Default}}
	for _, r := range c.Routes {
		for _, to := range r.List {
			upstreams = append(upstreams, upstream{"--route " + r.String(), to})
		}
	}
	for _, u := range upstreams {
		self, err := c.reaches(u.to)
		if err != nil {
			return err
		}
		if self {
			return fmt.Errorf("%s: %v is the proxy itself, which listens on %v: each connection would make another; want another address or port", u.flag, u.to, c.Addr)
		}
	}
	return nil
}

// reaches reports whether a connection to an upstream comes to the proxy's own listener.
func (c *Config) reaches(upstream netip.AddrPort) (bool, error) {
	if !upstream.IsValid() || upstream.Port() != c.Addr.Port() {
		return false, nil
	}
	to := upstream.Addr()
	if to.IsUnspecified() { // connect takes it for loopback (net/ipv4/route.c ip_route_output_key_hash_rcu)
		to = netip.AddrFrom4([4]byte{127, 0, 0, 1})
	}
	if !c.Addr.Addr().IsUnspecified() {
		return to == c.Addr.Addr(), nil
	}
	if to.IsLoopback() {
		return true, nil
	}
	local, err := net.InterfaceAddrs()
	if err != nil {
		return false, fmt.Errorf("reading the addresses of this host: %w", err)
	}
	return slices.ContainsFunc(local, func(a net.Addr) bool {
		prefix, err := netip.ParsePrefix(a.String())
		return err == nil && prefix.Addr() == to
	}), nil
}
