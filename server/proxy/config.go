package proxy

import (
	"errors"
	"flag"
	"fmt"
	"io"
	"net/netip"
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
	OptionKind uint // 2 to 255, for LearnOption

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

// Check reports the first setting that is not valid.
func (c *Config) Check() error {
	switch {
	case !c.Addr.Addr().Is4():
		return fmt.Errorf("the address to listen on, %v, is not IPv4:port", c.Addr)
	case c.Learn != LearnOption && c.Learn != LearnHeader && c.Learn != LearnLocal:
		return fmt.Errorf("the VIP cannot be learned from %q; there is: %s, %s, %s", c.Learn, LearnOption, LearnHeader, LearnLocal)
	case c.OptionKind < 2 || c.OptionKind > 255:
		return fmt.Errorf("option kind %d is out of range: 2 to 255 (kinds 0 and 1 carry nothing)", c.OptionKind)
	case len(c.Routes) == 0 && !c.Default.IsValid():
		return errors.New("neither a route nor a default upstream: nobody could be served")
	case c.Default.IsValid() && (!c.Default.Addr().Is4() || c.Default.Port() == 0):
		return fmt.Errorf("the default upstream %v is not IPv4:port", c.Default)
	case c.Source.IsValid() && !c.Source.Is4():
		return fmt.Errorf("the source address %v is not IPv4", c.Source)
	case c.ConnectTimeout <= 0:
		return fmt.Errorf("the connect timeout %v is not above 0", c.ConnectTimeout)
	}
	for i, r := range c.Routes {
		if err := r.check(); err != nil {
			return fmt.Errorf("route %v: %w", r, err)
		}
		for _, before := range c.Routes[:i] {
			if before.VIPs.Bits() <= r.VIPs.Bits() && before.VIPs.Contains(r.VIPs.Addr()) {
				return fmt.Errorf("route %v is never reached: %v comes before it", r, before)
			}
		}
	}
	return nil
}
