package proxy

import (
	"net"
	"net/netip"
	"testing"

	"github.com/stretchr/testify/assert"
	"github.com/stretchr/testify/require"
)

func TestRoute(t *testing.T) {
	for _, tt := range []struct {
		why, route, vip, want string
	}{
		{"host bits are kept", "10.8.0.0/16=10.9.0.0/16:6379", "10.8.3.232", "10.9.3.232:6379"},
		{"first address", "10.8.0.0/16=10.9.0.0/16:6379", "10.8.0.0", "10.9.0.0:6379"},
		{"last address", "10.8.0.0/16=10.9.0.0/16:7000", "10.8.255.255", "10.9.255.255:7000"},
		{"one below", "10.8.0.0/16=10.9.0.0/16:6379", "10.7.255.255", ""},
		{"one above", "10.8.0.0/16=10.9.0.0/16:6379", "10.9.0.0", ""},
		{"one VIP, one instance", "10.8.0.7/32=10.9.0.1/32:6379", "10.8.0.7", "10.9.0.1:6379"},
		{"an odd prefix length", "10.8.4.0/22=192.168.4.0/22:6379", "10.8.7.255", "192.168.7.255:6379"},
		{"the whole space onto itself", "0.0.0.0/0=0.0.0.0/0:6379", "203.0.113.9", "203.0.113.9:6379"},
		{"host number 0 of 3", "10.8.0.0/16=10.0.0.11:6379,10.0.0.12:6380,10.0.0.13:6379", "10.8.0.0", "10.0.0.11:6379"},
		{"host number 257 of 3: 2", "10.8.0.0/16=10.0.0.11:6379,10.0.0.12:6380,10.0.0.13:6379", "10.8.1.1", "10.0.0.13:6379"},
		{"host number 1000 of 3: 1", "10.8.0.0/16=10.0.0.11:6379,10.0.0.12:6380,10.0.0.13:6379", "10.8.3.232", "10.0.0.12:6380"},
		{"the host number counts within the prefix", "10.8.0.16/28=10.0.0.11:1,10.0.0.12:1", "10.8.0.17", "10.0.0.12:1"},
		{"one for all", "10.8.0.0/16=10.0.0.11:6379", "10.8.9.9", "10.0.0.11:6379"},
	} {
		t.Run(tt.why, func(t *testing.T) {
			r, err := ParseRoute(tt.route)
			require.NoError(t, err)
			assert.Equal(t, tt.route, r.String())
			to, ok := r.Upstream(netip.MustParseAddr(tt.vip))
			require.Equal(t, tt.want != "", ok)
			if ok {
				assert.Equal(t, tt.want, to.String())
			}
		})
	}
}

func TestParseRouteErrors(t *testing.T) {
	for _, tt := range []struct{ why, route, want string }{
		{"nothing", "", "the upstream is missing; want prefix=upstream"},
		{"no upstream", "10.8.0.0/16", "the upstream is missing; want prefix=upstream"},
		{"empty upstream", "10.8.0.0/16=", `the upstream "" is not an address and a port`},
		{"a VIP alone", "10.8.0.1=10.9.0.1:6379", `the VIPs "10.8.0.1" are not a prefix; want address/length`},
		{"host bits in the VIPs", "10.8.0.1/16=10.9.0.0/16:6379", "10.8.0.1/16 has host bits; want 10.8.0.0/16"},
		{"host bits in the upstream", "10.8.0.0/16=10.9.0.1/16:6379", "10.9.0.1/16 has host bits; want 10.9.0.0/16"},
		{"another length", "10.8.0.0/16=10.9.0.0/24:6379", "differ in length"},
		{"no port behind a prefix", "10.8.0.0/16=10.9.0.0/16", "the port is missing; want 10.9.0.0/16:6379"},
		{"port 0", "10.8.0.0/16=10.9.0.0/16:0", "the port is 0"},
		{"a port of 17 bits", "10.8.0.0/16=10.9.0.0/16:65536", `the port "65536" is not a number from 1 to 65535; want 10.9.0.0/16:6379`},
		{"no port in a list", "10.8.0.0/16=10.0.0.11:6379,10.0.0.12", `the upstream "10.0.0.12" is not an address and a port`},
		{"port 0 in a list", "10.8.0.0/16=10.0.0.11:0", "the upstream 10.0.0.11:0 is not an IPv4 address with a port above 0"},
		{"a name", "10.8.0.0/16=redis:6379", `the upstream "redis:6379" is not an address and a port`},
		{"IPv6 VIPs", "fd00::/64=10.0.0.11:6379", "are not an IPv4 prefix"},
		{"IPv6 prefix", "10.8.0.0/16=fd00::/16:6379", `the upstream "fd00::/16:6379" is not a prefix`},
		{"IPv6 upstream", "10.8.0.0/16=[fd00::1]:6379", "is not an IPv4 address with a port"},
	} {
		t.Run(tt.why, func(t *testing.T) {
			_, err := ParseRoute(tt.route)
			assert.ErrorContains(t, err, tt.want)
		})
	}
}

func TestUpstreamThatIsTheProxy(t *testing.T) {
	for _, tt := range []struct {
		why, addr string
		upstream  string
		refused   bool
	}{
		{"its own address", "127.0.0.1:7399", "127.0.0.1:7399", true},
		{"another port", "127.0.0.1:7399", "127.0.0.1:7400", false},
		{"another address of loopback", "127.0.0.1:7399", "127.0.0.2:7399", false},
		{"connect takes no address for loopback", "127.0.0.1:7399", "0.0.0.0:7399", true},
		{"it listens on every address: loopback", "0.0.0.0:7399", "127.3.4.5:7399", true},
		{"it listens on every address, another port", "0.0.0.0:7399", "127.0.0.1:7400", false},
		{"every address, and an instance elsewhere", "0.0.0.0:6379", "192.0.2.9:6379", false},
		{"the kernel picks its port, which nobody can know before", "127.0.0.1:0", "127.0.0.1:7399", false},
	} {
		t.Run(tt.why, func(t *testing.T) {
			cfg := DefaultConfig()
			cfg.Addr, cfg.Default = netip.MustParseAddrPort(tt.addr), netip.MustParseAddrPort(tt.upstream)
			route := DefaultConfig()
			route.Addr = cfg.Addr
			route.Routes = []Route{{VIPs: netip.MustParsePrefix("10.8.0.0/16"), List: []netip.AddrPort{netip.MustParseAddrPort("192.0.2.8:1"), cfg.Default}}}
			for _, err := range []error{cfg.Check(), route.Check()} {
				if tt.refused {
					assert.ErrorContains(t, err, tt.upstream+" is the proxy itself, which listens on "+tt.addr)
				} else {
					assert.NoError(t, err)
				}
			}
		})
	}
	addrs, err := net.InterfaceAddrs()
	require.NoError(t, err)
	for _, a := range addrs {
		cfg := DefaultConfig()
		if own := netip.MustParsePrefix(a.String()).Addr(); own.Is4() {
			cfg.Addr, cfg.Default = netip.MustParseAddrPort("0.0.0.0:7399"), netip.AddrPortFrom(own, 7399)
			assert.ErrorContains(t, cfg.Check(), "is the proxy itself", "an address of this host")
		}
	}
}

func TestOptionKinds(t *testing.T) {
	for kind, ok := range map[uint]bool{0: false, 1: false, 2: false, 8: false, 9: true, 19: false, 28: true, 29: false, 30: false, 34: false, 200: true, 250: true, 255: true, 256: false} {
		cfg := DefaultConfig()
		cfg.Default, cfg.OptionKind = netip.MustParseAddrPort("192.0.2.9:6379"), kind
		assert.Equal(t, ok, cfg.Check() == nil, kind)
	}
}

func TestRoutesInOrder(t *testing.T) {
	cfg := DefaultConfig()
	for _, s := range []string{"10.8.3.0/24=10.0.0.3:6379", "10.8.0.0/16=10.0.0.1:6379"} {
		r, err := ParseRoute(s)
		require.NoError(t, err)
		cfg.Routes = append(cfg.Routes, r)
	}
	require.NoError(t, cfg.Check())
	p := &Proxy{cfg: cfg}
	for vip, want := range map[string]string{"10.8.3.9:1": "10.0.0.3:6379", "10.8.4.9:1": "10.0.0.1:6379"} {
		to, ok := p.upstreamOf(netip.MustParseAddrPort(vip))
		assert.True(t, ok)
		assert.Equal(t, want, to.String(), vip)
	}
	cfg.Routes[0], cfg.Routes[1] = cfg.Routes[1], cfg.Routes[0]
	assert.ErrorContains(t, cfg.Check(), "is never reached: 10.8.0.0/16=10.0.0.1:6379 comes before it")

	cfg.Routes = []Route{{VIPs: netip.MustParsePrefix("10.8.0.0/16")}}
	assert.ErrorContains(t, cfg.Check(), "either a prefix or a list", "a route made by hand")
}
