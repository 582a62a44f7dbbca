package proxy

import (
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
		{"nothing", "", "is not prefix=upstream"},
		{"no upstream", "10.8.0.0/16", "is not prefix=upstream"},
		{"empty upstream", "10.8.0.0/16=", "reading the upstreams"},
		{"a VIP alone", "10.8.0.1=10.9.0.1:6379", "reading the VIPs"},
		{"host bits in the VIPs", "10.8.0.1/16=10.9.0.0/16:6379", "10.8.0.0/16 is meant?"},
		{"host bits in the upstream", "10.8.0.0/16=10.9.0.1/16:6379", "10.9.0.0/16 is meant?"},
		{"another length", "10.8.0.0/16=10.9.0.0/24:6379", "differ in length"},
		{"no port behind a prefix", "10.8.0.0/16=10.9.0.0/16", "reading the port"},
		{"port 0", "10.8.0.0/16=10.9.0.0/16:0", "the port is 0"},
		{"a port of 17 bits", "10.8.0.0/16=10.9.0.0/16:65536", "reading the port"},
		{"no port in a list", "10.8.0.0/16=10.0.0.11:6379,10.0.0.12", "reading the upstreams"},
		{"port 0 in a list", "10.8.0.0/16=10.0.0.11:0", "is not IPv4:port"},
		{"a name", "10.8.0.0/16=redis:6379", "reading the upstreams"},
		{"IPv6 VIPs", "fd00::/64=10.0.0.11:6379", "are not an IPv4 prefix"},
		{"IPv6 prefix", "10.8.0.0/16=fd00::/16:6379", "reading the upstream"},
		{"IPv6 upstream", "10.8.0.0/16=[fd00::1]:6379", "is not IPv4:port"},
	} {
		t.Run(tt.why, func(t *testing.T) {
			_, err := ParseRoute(tt.route)
			assert.ErrorContains(t, err, tt.want)
		})
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
