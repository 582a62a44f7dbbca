package l4lb

import (
	"fmt"
	"math"
	"net/netip"
	"testing"

	"connlab/netlab/wire"

	"github.com/google/go-cmp/cmp"
	"github.com/google/go-cmp/cmp/cmpopts"
	"github.com/gopacket/gopacket/layers"
	"github.com/stretchr/testify/assert"
	"github.com/stretchr/testify/require"
)

// equal compares two segments.
func equal(want, got tcp) string {
	return cmp.Diff(want, got, cmp.AllowUnexported(tcp{}), cmp.Comparer(func(a, b netip.AddrPort) bool { return a == b }), cmpopts.EquateEmpty())
}

func newBalancer(t testing.TB, cfg Config) *Balancer {
	t.Helper()
	b, err := New(cfg)
	require.NoError(t, err)
	return b
}

func one(vip, proxy netip.AddrPort) map[netip.AddrPort]Group {
	return map[netip.AddrPort]Group{vip: {proxy}}
}

func TestTransparent(t *testing.T) {
	for _, kind := range []byte{0, 200, 254} {
		t.Run(fmt.Sprint("kind ", kind), func(t *testing.T) {
			b := newBalancer(t, Config{Services: one(vip1, proxy1), OptionKind: kind})
			used := kind
			if kind == 0 {
				used = KindTOAVIP
			}
			for _, row := range []struct {
				reason    string
				sent, got tcp
			}{
				{"a SYN gets the VIP",
					tcp{from: client, to: vip1, flags: wire.SYN, seq: 7, options: linuxOptions},
					tcp{from: client, to: proxy1, flags: wire.SYN, seq: 7, options: marked(used, vip1)}},
				{"data with the SYN stay with it",
					tcp{from: client, to: vip1, flags: wire.SYN, seq: 7, options: linuxOptions, payload: []byte("odd")},
					tcp{from: client, to: proxy1, flags: wire.SYN, seq: 7, options: marked(used, vip1), payload: []byte("odd")}},
				{"data",
					tcp{from: client, to: vip1, flags: wire.ACK | wire.PSH, seq: 8, ack: 9, payload: []byte("PING\r\n1")},
					tcp{from: client, to: proxy1, flags: wire.ACK | wire.PSH, seq: 8, ack: 9, payload: []byte("PING\r\n1")}},
				{"a FIN",
					tcp{from: client, to: vip1, flags: wire.ACK | wire.FIN, seq: 15, ack: 9},
					tcp{from: client, to: proxy1, flags: wire.ACK | wire.FIN, seq: 15, ack: 9}},
				{"a reset, of a connection never seen: there is no table",
					tcp{from: client, to: vip1, flags: wire.RST, seq: 15},
					tcp{from: client, to: proxy1, flags: wire.RST, seq: 15}},
				{"SYN and FIN together ask for nothing",
					tcp{from: client, to: vip1, flags: wire.SYN | wire.FIN, seq: 15},
					tcp{from: client, to: proxy1, flags: wire.SYN | wire.FIN, seq: 15}},
			} {
				p := row.sent.packet(t)
				require.Equal(t, wire.Forward, b.Stage(p), row.reason)
				assert.Empty(t, equal(row.got, read(t, p.Frame())), row.reason)
			}
			assert.Equal(t, Stats{Packets: 6, Forwarded: 6, SYNs: 2, OptionsAdded: 2}, b.Stats())
		})
	}
}

func TestDrops(t *testing.T) {
	full := make([]layers.TCPOption, 33) // 33 of 40 bytes, 36 with padding: 8 more do not fit
	for i := range full {
		full[i] = layers.TCPOption{OptionType: layers.TCPOptionKindNop, OptionLength: 1}
	}
	odd := unreadable(t)
	for _, row := range []struct {
		reason string
		frame  []byte
		want   Stats
	}{
		{"ARP", odd["ARP"], Stats{NotTCP: 1}},
		{"UDP", odd["UDP"], Stats{NotTCP: 1}},
		{"nothing", odd["nothing"], Stats{Malformed: 1}},
		{"short", odd["short"], Stats{Malformed: 1}},
		{"an option that lies about its length", odd["lying option"], Stats{Malformed: 1}},
		{"fragment", odd["fragment"], Stats{Fragments: 1}},
		{"another port of the VIP", tcp{from: client, to: ap("10.8.0.1:6380"), flags: wire.SYN}.frame(t), Stats{NotService: 1}},
		{"another address", tcp{from: client, to: ap("10.8.9.9:6379"), flags: wire.SYN}.frame(t), Stats{NotService: 1}},
		{"a reply: it should go past", tcp{from: proxy1, to: client, flags: wire.SYN | wire.ACK}.frame(t), Stats{NotService: 1}},
		{"a client that brings the option", tcp{from: client, to: vip1, flags: wire.SYN, options: marked(KindTOAVIP, vip2)}.frame(t),
			Stats{SYNs: 1, Forged: 1}},
		{"options full", tcp{from: client, to: vip1, flags: wire.SYN, options: full}.frame(t), Stats{SYNs: 1, NoRoom: 1}},
		{"MTU full", tcp{from: client, to: vip1, flags: wire.SYN, payload: make([]byte, 1500-40-7)}.frame(t), Stats{SYNs: 1, TooBig: 1}},
	} {
		t.Run(row.reason, func(t *testing.T) {
			b := newBalancer(t, Config{Services: one(vip1, proxy1)})
			assert.Equal(t, wire.Drop, b.Stage(packet(t, row.frame)))
			row.want.Packets = 1
			assert.Equal(t, row.want, b.Stats())
			assert.EqualValues(t, 1, b.Stats().Dropped())
		})
	}
	t.Run("a packet that just fits is not dropped", func(t *testing.T) {
		b := newBalancer(t, Config{Services: one(vip1, proxy1)})
		p := tcp{from: client, to: vip1, flags: wire.SYN, payload: make([]byte, 1500-40-8)}.packet(t)
		assert.Equal(t, wire.Forward, b.Stage(p))
		assert.Len(t, read(t, p.Frame()).payload, 1500-40-8)
		assert.Len(t, p.Frame(), 14+1500)
	})
}

func TestConnectionsStayWithTheirProxy(t *testing.T) {
	group := Group{proxy1, proxy2, ap("10.2.0.3:6379"), ap("10.2.0.4:6380")}
	b := newBalancer(t, Config{Services: map[netip.AddrPort]Group{vip1: group, vip2: group}})
	again := newBalancer(t, Config{Services: map[netip.AddrPort]Group{vip1: group, vip2: group}})
	used := make(map[netip.AddrPort]int)
	differ := 0
	for port := range uint16(400) {
		from := netip.AddrPortFrom(client.Addr(), 30000+port)
		way := func(b *Balancer, vip netip.AddrPort, flags wire.Flags) netip.AddrPort {
			p := tcp{from: from, to: vip, flags: flags}.packet(t)
			require.Equal(t, wire.Forward, b.Stage(p))
			return read(t, p.Frame()).to
		}
		first := way(b, vip1, wire.SYN)
		used[first]++
		for _, flags := range []wire.Flags{wire.ACK, wire.ACK | wire.FIN, wire.RST} {
			require.Equal(t, first, way(b, vip1, flags), "port %d", port)
		}
		require.Equal(t, first, way(again, vip1, wire.SYN), "a balancer that was started again, port %d", port)
		if way(b, vip2, wire.SYN) != first {
			differ++
		}
	}
	for _, proxy := range group {
		assert.Positive(t, used[proxy], proxy)
	}
	assert.Len(t, used, len(group))
	// Inputs are fixed, so this passes always or never: 3.29 standard deviations.
	assert.InDelta(t, 300, differ, 3.29*math.Sqrt(400*0.25*0.75), "another VIP is another choice")
}

// The inputs are what a detector makes: even ports in a row, VIPs in a row. They
// are fixed, so each row passes always or never.
func TestSpread(t *testing.T) {
	for _, row := range []struct {
		n     int
		bound float64 // chi-square, n-1 degrees of freedom, 99.9 %
	}{{2, 10.83}, {3, 13.82}, {4, 16.27}, {15, 36.12}, {16, 37.70}, {100, 148.23}} {
		for name, at := range map[string]func(i int) tuple{
			"one VIP, every second port": func(i int) tuple {
				return tuple{endpointOf(client) + endpoint(2*i), endpointOf(vip1)}
			},
			"one port, VIPs in a row": func(i int) tuple {
				return tuple{endpointOf(client), endpointOf(vip1) + endpoint(i)<<16}
			},
			"a port for each VIP": func(i int) tuple {
				return tuple{endpointOf(client) + endpoint(2*i), endpointOf(vip1) + endpoint(i)<<16}
			},
			"clients in a row": func(i int) tuple {
				return tuple{endpointOf(client) + endpoint(i)<<16, endpointOf(vip1)}
			},
		} {
			const total = 10_000
			counts := make([]int, row.n)
			for i := range total {
				counts[spread(at(i), row.n)]++
			}
			expected := float64(total) / float64(row.n)
			chi := 0.0
			for _, c := range counts {
				chi += (float64(c) - expected) * (float64(c) - expected) / expected
			}
			assert.Less(t, chi, row.bound, "%s, %d proxies", name, row.n)
		}
	}
	assert.Equal(t, 0, spread(tuple{endpointOf(client), endpointOf(vip1)}, 1))
}

func TestConfigErrors(t *testing.T) {
	type services = map[netip.AddrPort]Group
	nat := Config{Services: one(vip1, proxy1), Mode: FullNAT, Locals: []netip.Addr{local1}}
	with := func(cfg Config, change func(*Config)) Config { change(&cfg); return cfg }
	for _, row := range []struct {
		cfg  Config
		want string
	}{
		{Config{}, "no service: nothing to balance"},
		{Config{Services: services{vip1: nil}}, "service 10.8.0.1:6379: its group has no proxy"},
		{Config{Services: one(ap("[::1]:6379"), proxy1)}, "service [::1]:6379: the address is not IPv4"},
		{Config{Services: one(ap("0.0.0.0:6379"), proxy1)}, "service 0.0.0.0:6379: the address is not IPv4"},
		{Config{Services: one(ap("10.8.0.1:0"), proxy1)}, "service 10.8.0.1:0: no port"},
		{Config{Services: one(netip.AddrPort{}, proxy1)}, "service invalid AddrPort: the address is not IPv4"},
		{Config{Services: one(vip1, ap("[::ffff:10.2.0.1]:6379"))}, "service 10.8.0.1:6379: proxy [::ffff:10.2.0.1]:6379: the address is not IPv4"},
		{Config{Services: one(vip1, ap("10.2.0.1:0"))}, "service 10.8.0.1:6379: proxy 10.2.0.1:0: no port"},
		{Config{Services: one(vip1, vip1)}, "service 10.8.0.1:6379: proxy 10.8.0.1:6379 is a service of this balancer"},
		{Config{Services: services{vip1: {proxy1, proxy1}}}, "service 10.8.0.1:6379: proxy 10.2.0.1:6379 twice"},
		{Config{Services: one(vip1, proxy1), OptionKind: 1}, "option kind 1 has a meaning of its own to Linux"},
		{Config{Services: one(vip1, proxy1), OptionKind: 8}, "option kind 8 has a meaning of its own to Linux"},
		{Config{Services: one(vip1, proxy1), OptionKind: 30}, "option kind 30 has a meaning of its own to Linux"},
		{Config{Services: one(ap("10.8.0.1:63881"), proxy1), OptionKind: 254},
			"service 10.8.0.1:63881: option kind 254 with port 63881 is a fast open cookie to Linux"},
		{Config{Services: one(vip1, proxy1), Mode: 2}, "unknown mode 2"},
		{Config{Services: one(vip1, proxy1), Locals: []netip.Addr{local1}}, "local addresses are for full NAT: a transparent balancer keeps the client's"},
		{with(nat, func(c *Config) { c.Locals = nil }), "full NAT needs a local address"},
		{with(nat, func(c *Config) { c.Locals = []netip.Addr{local1, local1} }), "local address 10.3.0.1 twice"},
		{with(nat, func(c *Config) { c.Locals = []netip.Addr{netip.IPv6Loopback()} }), "local address ::1 is not IPv4"},
		{with(nat, func(c *Config) { c.Locals = []netip.Addr{vip1.Addr()} }), "local address 10.8.0.1 is a VIP"},
		{with(nat, func(c *Config) { c.Locals = []netip.Addr{proxy1.Addr()} }), "local address 10.2.0.1 is a proxy's"},
		{with(nat, func(c *Config) { c.Ports = [2]uint16{2000, 1999} }), "ports 2000 to 1999 are no range"},
		{with(nat, func(c *Config) { c.Ports = [2]uint16{0, 1999} }), "ports 0 to 1999 are no range"},
	} {
		_, err := New(row.cfg)
		assert.EqualError(t, err, row.want)
	}
	for _, good := range []Config{
		nat,
		with(nat, func(c *Config) { c.Ports = [2]uint16{5, 5} }),
		{Services: one(vip1, proxy1), OptionKind: 9},
		{Services: one(ap("10.8.0.1:63881"), proxy1)},
	} {
		_, err := New(good)
		assert.NoError(t, err)
	}
}
