package netlab

import (
	"math"
	"net/netip"
	"os"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"
	"github.com/stretchr/testify/assert"
	"github.com/stretchr/testify/require"
)

func addr(s string) netip.Addr { return netip.MustParseAddr(s) }

func host(name string, links ...LinkSpec) HostSpec { return HostSpec{Name: name, Links: links} }

func at(addrs ...string) LinkSpec {
	l := LinkSpec{Switch: "lan"}
	for _, a := range addrs {
		l.Addrs = append(l.Addrs, addr(a))
	}
	return l
}

func switches(nameThenSubnet ...string) (s []SwitchSpec) {
	for i := 0; i < len(nameThenSubnet); i += 2 {
		s = append(s, SwitchSpec{Name: nameThenSubnet[i], Subnet: netip.MustParsePrefix(nameThenSubnet[i+1])})
	}
	return s
}

func sysctls(key, value string) []HostSpec {
	return []HostSpec{{Name: "a", Sysctls: map[string]string{key: value}}}
}

func nopAttach(*os.File, Port) (func() error, error) { return func() error { return nil }, nil }

// dev is a device on the switch lan.
func dev(name string, addrs ...string) DeviceSpec {
	return DeviceSpec{Name: name, Switch: "lan", Addrs: at(addrs...).Addrs, Attach: nopAttach}
}

// routed is host a at 10.0.0.1 with routes, host b at .2 and a device at .3; on
// another switch is a host at 10.0.1.1.
func routed(toThenVia ...string) Topology {
	a := host("a", at("10.0.0.1"))
	for i := 0; i < len(toThenVia); i += 2 {
		r := RouteSpec{To: netip.MustParsePrefix(toThenVia[i])}
		if via := toThenVia[i+1]; via != "" {
			r.Via = addr(via)
		}
		a.Routes = append(a.Routes, r)
	}
	return Topology{
		Switches: switches("lan", "10.0.0.0/29", "wan", "10.0.1.0/29"),
		Hosts:    []HostSpec{a, host("b", at("10.0.0.2")), host("c", LinkSpec{Switch: "wan"})},
		Devices:  []DeviceSpec{dev("lb", "10.0.0.3")},
	}
}

func TestCheck(t *testing.T) {
	small := switches("lan", "10.0.0.0/29") // six addresses
	for _, row := range []struct {
		reason string
		top    Topology
		want   string // "": fine
	}{
		{"a star", star(120), ""},
		{"a host without links", Topology{Hosts: []HostSpec{host("alone")}}, ""},
		{"nothing", Topology{}, "the topology has no hosts"},
		{"a switch alone", Topology{Switches: small}, "the topology has no hosts"},

		{"names: two hosts", Topology{Hosts: []HostSpec{host("a"), host("a")}}, `host "a": the name is already that of a host`},
		{"names: host and switch", Topology{Switches: small, Hosts: []HostSpec{host("lan")}}, `host "lan": the name is already that of a switch`},
		{"names: two switches", Topology{Switches: switches("lan", "10.0.0.0/24", "lan", "10.0.1.0/24"), Hosts: []HostSpec{host("a")}}, `switch "lan": the name is already that of a switch`},
		{"names: empty", Topology{Hosts: []HostSpec{host("")}}, `host "": a name is 1 to 31 lower-case letters, digits and dashes`},
		{"names: a slash would break metric names", Topology{Hosts: []HostSpec{host("a/b")}}, `host "a/b": a name is 1 to 31 lower-case letters, digits and dashes`},
		{"names: upper case", Topology{Hosts: []HostSpec{host("Server")}}, `host "Server": a name is 1 to 31 lower-case letters, digits and dashes`},
		{"names: leading dash", Topology{Hosts: []HostSpec{host("-a")}}, `host "-a": a name is 1 to 31 lower-case letters, digits and dashes`},
		{"names: 31 characters", Topology{Hosts: []HostSpec{host("a234567890123456789012345678901")}}, ""},
		{"names: 32 characters", Topology{Hosts: []HostSpec{host("a2345678901234567890123456789012")}}, `host "a2345678901234567890123456789012": a name is 1 to 31 lower-case letters, digits and dashes`},

		{"addresses: twice", Topology{Switches: small, Hosts: []HostSpec{host("a", at("10.0.0.2")), host("b", at("10.0.0.2"))}}, `host "b": address 10.0.0.2 is already that of host "a"`},
		{"addresses: twice on one host", Topology{Switches: small, Hosts: []HostSpec{host("a", at("10.0.0.2", "10.0.0.2"))}}, `host "a": address 10.0.0.2 is already that of host "a"`},
		{"addresses: outside", Topology{Switches: small, Hosts: []HostSpec{host("a", at("10.0.0.8"))}}, `host "a": address 10.0.0.8 is outside the switch's subnet 10.0.0.0/29`},
		{"addresses: IPv6", Topology{Switches: small, Hosts: []HostSpec{host("a", at("fd00::1"))}}, `host "a": address fd00::1 is outside the switch's subnet 10.0.0.0/29`},
		{"addresses: network", Topology{Switches: small, Hosts: []HostSpec{host("a", at("10.0.0.0"))}}, `host "a": address 10.0.0.0 is the network or broadcast address of 10.0.0.0/29`},
		{"addresses: broadcast", Topology{Switches: small, Hosts: []HostSpec{host("a", at("10.0.0.7"))}}, `host "a": address 10.0.0.7 is the network or broadcast address of 10.0.0.0/29`},

		{"links: unknown switch", Topology{Switches: small, Hosts: []HostSpec{host("a", LinkSpec{Switch: "wan"})}}, `host "a": link to unknown switch "wan"`},
		{"links: negative delay", Topology{Switches: small, Hosts: []HostSpec{host("a", LinkSpec{Switch: "lan", Delay: -time.Second})}}, `host "a": link to "lan": delay -1s is negative`},
		{"links: loss is a share, not per cent", Topology{Switches: small, Hosts: []HostSpec{host("a", LinkSpec{Switch: "lan", Loss: 5})}}, `host "a": link to "lan": loss 5 is not a share between 0 and 1`},
		{"links: negative loss", Topology{Switches: small, Hosts: []HostSpec{host("a", LinkSpec{Switch: "lan", Loss: -0.1})}}, `host "a": link to "lan": loss -0.1 is not a share between 0 and 1`},
		{"links: loss is no number", Topology{Switches: small, Hosts: []HostSpec{host("a", LinkSpec{Switch: "lan", Loss: math.NaN()})}}, `host "a": link to "lan": loss NaN is not a share between 0 and 1`},
		{"links: everything lost is allowed", Topology{Switches: small, Hosts: []HostSpec{host("a", LinkSpec{Switch: "lan", Loss: 1})}}, ""},

		{"subnets: full", Topology{Switches: small, Hosts: Clients(6, "c", "lan", nil)}, ""},
		{"subnets: one too many", Topology{Switches: small, Hosts: Clients(7, "c", "lan", nil)}, `host "c-007": switch "lan": too many hosts for subnet 10.0.0.0/29, which has 6 addresses`},
		{"subnets: a thousand too many say so once", Topology{Switches: small, Hosts: Clients(1000, "c", "lan", nil)}, `host "c-007": switch "lan": too many hosts for subnet 10.0.0.0/29, which has 6 addresses`},
		{"subnets: overlap", Topology{Switches: switches("lan", "10.0.0.0/16", "wan", "10.0.3.0/24"), Hosts: []HostSpec{host("a")}}, `switch "wan": subnet 10.0.3.0/24 overlaps 10.0.0.0/16 of switch "lan"`},
		{"subnets: IPv6", Topology{Switches: switches("lan", "fd00::/64"), Hosts: []HostSpec{host("a")}}, `switch "lan": subnet fd00::/64 is not an IPv4 prefix`},
		{"subnets: none", Topology{Switches: []SwitchSpec{{Name: "lan"}}, Hosts: []HostSpec{host("a")}}, `switch "lan": subnet invalid Prefix is not an IPv4 prefix`},
		{"subnets: too narrow", Topology{Switches: switches("lan", "10.0.0.0/31"), Hosts: []HostSpec{host("a")}}, `switch "lan": subnet 10.0.0.0/31 has no room for two hosts; use /30 or wider`},
		{"subnets: a bad one is not also unknown", Topology{Switches: switches("lan", "10.0.0.0/31"), Hosts: []HostSpec{host("a", at())}}, `switch "lan": subnet 10.0.0.0/31 has no room for two hosts; use /30 or wider`},

		{"subnets: overlaps come in the order of the list", Topology{Switches: switches("c", "10.0.0.0/24", "b", "10.0.1.0/24", "a", "10.0.0.0/16"), Hosts: []HostSpec{host("h")}}, "switch \"a\": subnet 10.0.0.0/16 overlaps 10.0.0.0/24 of switch \"c\"\nswitch \"a\": subnet 10.0.0.0/16 overlaps 10.0.1.0/24 of switch \"b\""},

		{"ports: as many as a bridge takes", Topology{Switches: lan, Hosts: Clients(1023, "c", "lan", nil)}, ""},
		{"ports: one more", Topology{Switches: lan, Hosts: Clients(1024, "c", "lan", nil)}, `switch "lan": a bridge takes at most 1023 links`},

		{"sysctls: fine", Topology{Hosts: sysctls("net.ipv4.tcp_syncookies", "1")}, ""},
		{"sysctls: unknown", Topology{Hosts: sysctls("net.ipv4.tcp_tw_recycle", "1")}, `host "a": unknown sysctl net.ipv4.tcp_tw_recycle: this kernel has no /proc/sys/net/ipv4/tcp_tw_recycle`},
		{"sysctls: of the whole machine", Topology{Hosts: sysctls("kernel.pid_max", "1")}, `host "a": sysctl "kernel.pid_max": only dotted names below net. are per namespace`},
		{"sysctls: a way out", Topology{Hosts: sysctls("net.ipv4.../../kernel.pid_max", "1")}, `host "a": sysctl "net.ipv4.../../kernel.pid_max": only dotted names below net. are per namespace`},
		{"sysctls: without a value", Topology{Hosts: sysctls("net.core.somaxconn", " ")}, `host "a": sysctl net.core.somaxconn: empty value`},

		{"devices: fine", Topology{Switches: small, Hosts: []HostSpec{host("a", at())}, Devices: []DeviceSpec{dev("lb", "10.0.0.2")}}, ""},
		{"devices: a name of a host", Topology{Switches: small, Hosts: []HostSpec{host("a")}, Devices: []DeviceSpec{dev("a")}}, `device "a": the name is already that of a host`},
		{"devices: two of a name", Topology{Switches: small, Hosts: []HostSpec{host("a")}, Devices: []DeviceSpec{dev("lb"), dev("lb")}}, `device "lb": the name is already that of a device`},
		{"devices: a bad name", Topology{Switches: small, Hosts: []HostSpec{host("a")}, Devices: []DeviceSpec{dev("LB")}}, `device "LB": a name is 1 to 31 lower-case letters, digits and dashes`},
		{"devices: unknown switch", Topology{Switches: switches("wan", "10.0.0.0/24"), Hosts: []HostSpec{host("a")}, Devices: []DeviceSpec{dev("lb")}}, `device "lb": link to unknown switch "lan"`},
		{"devices: no switch", Topology{Hosts: []HostSpec{host("a")}, Devices: []DeviceSpec{{Name: "lb", Attach: nopAttach}}}, `device "lb": link to unknown switch ""`},
		{"devices: nothing behind the port", Topology{Switches: small, Hosts: []HostSpec{host("a")}, Devices: []DeviceSpec{{Name: "lb", Switch: "lan"}}}, `device "lb": Attach is nil, so nothing would read its frames`},
		{"devices: an address of a host", Topology{Switches: small, Hosts: []HostSpec{host("a", at("10.0.0.2"))}, Devices: []DeviceSpec{dev("lb", "10.0.0.2")}}, `device "lb": address 10.0.0.2 is already that of host "a"`},
		{"devices: an address of another", Topology{Switches: small, Hosts: []HostSpec{host("a")}, Devices: []DeviceSpec{dev("l", "10.0.0.2"), dev("m", "10.0.0.2")}}, `device "m": address 10.0.0.2 is already that of device "l"`},
		{"devices: an address outside", Topology{Switches: small, Hosts: []HostSpec{host("a")}, Devices: []DeviceSpec{dev("lb", "10.0.0.8")}}, `device "lb": address 10.0.0.8 is outside the switch's subnet 10.0.0.0/29`},
		{"devices: they count up after the hosts", Topology{Switches: small, Hosts: Clients(6, "c", "lan", nil), Devices: []DeviceSpec{dev("lb")}}, `device "lb": switch "lan": too many hosts for subnet 10.0.0.0/29, which has 6 addresses`},
		{"devices: they take ports", Topology{Switches: lan, Hosts: Clients(1023, "c", "lan", nil), Devices: []DeviceSpec{dev("lb")}}, `switch "lan": a bridge takes at most 1023 links`},
		{"devices: no network of devices alone", Topology{Switches: small, Devices: []DeviceSpec{dev("lb")}}, "the topology has no hosts"},

		{"routes: by a host, by a device, local", routed("10.8.0.0/16", "10.0.0.2", "10.9.0.0/16", "10.0.0.3", "10.10.0.0/16", ""), ""},
		{"routes: local on a host without links", Topology{Hosts: []HostSpec{{Name: "alone", Routes: []RouteSpec{{To: netip.MustParsePrefix("10.9.0.0/16")}}}}}, ""},
		{"routes: no prefix", Topology{Hosts: []HostSpec{{Name: "a", Routes: []RouteSpec{{}}}}}, `host "a": route to invalid Prefix: not an IPv4 prefix`},
		{"routes: IPv6", routed("fd00::/64", ""), `host "a": route to fd00::/64: not an IPv4 prefix`},
		{"routes: bits beyond the prefix, which the kernel refuses", routed("10.8.0.1/16", ""), `host "a": route to 10.8.0.1/16: the prefix is 10.8.0.0/16`},
		{"routes: part of the subnet", routed("10.0.0.4/30", ""), `host "a": route to 10.0.0.4/30: it overlaps subnet 10.0.0.0/29 of switch "lan"`},
		{"routes: all of the subnet", routed("10.0.0.0/8", "10.0.0.2"), `host "a": route to 10.0.0.0/8: it overlaps subnet 10.0.0.0/29 of switch "lan"`},
		{"routes: overlap", routed("10.8.0.0/16", "10.0.0.2", "10.8.1.0/24", ""), `host "a": route to 10.8.1.0/24: it overlaps the route to 10.8.0.0/16`},
		{"routes: twice", routed("10.8.0.0/16", "10.0.0.2", "10.8.0.0/16", "10.0.0.2"), `host "a": route to 10.8.0.0/16: it overlaps the route to 10.8.0.0/16`},
		{"routes: via nobody", routed("10.8.0.0/16", "10.0.0.5"), `host "a": route to 10.8.0.0/16: via 10.0.0.5: nobody on switch "lan" has that address`},
		{"routes: via the broadcast address", routed("10.8.0.0/16", "10.0.0.7"), `host "a": route to 10.8.0.0/16: via 10.0.0.7: nobody on switch "lan" has that address`},
		{"routes: via itself", routed("10.8.0.0/16", "10.0.0.1"), `host "a": route to 10.8.0.0/16: via 10.0.0.1: that is the host's own address; leave Via out for a local route`},
		{"routes: via a switch further on", routed("10.8.0.0/16", "10.0.1.1"), `host "a": route to 10.8.0.0/16: via 10.0.1.1: it is on no switch that the host is linked to`},
		{"routes: via IPv6", routed("10.8.0.0/16", "fd00::1"), `host "a": route to 10.8.0.0/16: via fd00::1: it is on no switch that the host is linked to`},

		{"several at once, in order", Topology{Hosts: []HostSpec{host("a"), host("a"), host("b", at())}}, "host \"a\": the name is already that of a host\nhost \"b\": link to unknown switch \"lan\""},
	} {
		t.Run(row.reason, func(t *testing.T) {
			err := row.top.Check()
			if row.want == "" {
				assert.NoError(t, err)
				return
			}
			assert.EqualError(t, err, row.want)
		})
	}
}

func TestPlanFindsFreeAddresses(t *testing.T) {
	top := Topology{
		Switches: switches("lan", "10.0.0.0/24", "wan", "10.0.1.0/24"),
		Hosts: []HostSpec{
			host("a", at()),
			host("b", at(), LinkSpec{Switch: "wan"}),
			host("c", at("10.0.0.1", "10.0.0.3")), // asked for by name: taken before a and b count up
			host("d", at()),
		},
		Devices: []DeviceSpec{dev("e", "10.0.0.6"), dev("f")},
	}
	p, err := top.plan()
	require.NoError(t, err)
	var got [][]netip.Addr
	for i := range top.Hosts {
		for j := range top.Hosts[i].Links {
			got = append(got, p.addrs[&top.Hosts[i].Links[j]])
		}
	}
	for i := range top.Devices {
		got = append(got, p.deviceAddrs[&top.Devices[i]])
	}
	want := [][]netip.Addr{{addr("10.0.0.2")}, {addr("10.0.0.4")}, {addr("10.0.1.1")}, {addr("10.0.0.1"), addr("10.0.0.3")}, {addr("10.0.0.5")}, {addr("10.0.0.6")}, {addr("10.0.0.7")}}
	assert.Empty(t, cmp.Diff(want, got, cmp.Comparer(func(a, b netip.Addr) bool { return a == b })))
}

// Up says the same as Check, and before it asks for any privilege.
func TestUpChecksFirst(t *testing.T) {
	lab, err := Up(t.Context(), Topology{})
	assert.Nil(t, lab)
	assert.EqualError(t, err, "topology: the topology has no hosts")
}

func TestMACsAreLocalUnicastAndDistinct(t *testing.T) {
	m := mac(addr("10.66.1.2"))
	assert.Equal(t, "02:00:0a:42:01:02", m.String())
	assert.Zero(t, m[0]&1, "unicast")
	assert.NotZero(t, m[0]&2, "locally administered")
}

func TestParseListeners(t *testing.T) {
	const table = `  sl  local_address rem_address   st tx_queue rx_queue tr tm->when retrnsmt   uid  timeout inode
   0: 0100007F:18EB 00000000:0000 0A 00000000:00000000 00:00000000 00000000     0        0 11111 1 0000000000000000 100 0 0 10 0
   1: 0242420A:1B58 00000000:0000 0A 00000081:00000000 00:00000000 00000000     0        0 11112 1 0000000000000000 100 0 0 10 0
   2: 0242420A:1B58 0342420A:8000 01 00000000:00000000 00:00000000 00000000     0        0 11113 1 0000000000000000 20 4 30 10 -1
   3: zz
   4: 0242420A 00000000:0000 0A
`
	want := []netip.AddrPort{netip.MustParseAddrPort("127.0.0.1:6379"), netip.MustParseAddrPort("10.66.66.2:7000")}
	got := parseListeners([]byte(table))
	assert.Empty(t, cmp.Diff(want, got, cmp.Comparer(func(a, b netip.AddrPort) bool { return a == b })))
	assert.Empty(t, parseListeners(nil))
}

func FuzzParseListeners(f *testing.F) {
	f.Add([]byte("   0: 0100007F:18EB 00000000:0000 0A 0:0\n"))
	f.Add([]byte("x 0100007F 0 0A\n\x00"))
	f.Fuzz(func(t *testing.T, table []byte) {
		for _, l := range parseListeners(table) {
			assert.True(t, l.Addr().Is4())
		}
	})
}
