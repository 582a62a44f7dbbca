package l4lb

import (
	"net/netip"
	"testing"

	"connlab/netlab/wire"

	"github.com/stretchr/testify/assert"
	"github.com/stretchr/testify/require"
)

// manyServices are VIPs in 15 groups of one proxy each, as in the incident.
func manyServices(n int) map[netip.AddrPort]Group {
	services := make(map[netip.AddrPort]Group, n)
	for i := range n {
		services[vipOf(i)] = Group{(endpointOf(proxy1) + endpoint(i%15)<<16).addrPort()}
	}
	return services
}

func vipOf(i int) netip.AddrPort { return (endpointOf(vip1) + endpoint(i)<<16).addrPort() }

const benchServices = 2000

// packets are n of the same segment, each from its own port to its own VIP.
func packets(t testing.TB, n int, s tcp) []*wire.Packet {
	t.Helper()
	s.to = vip1
	frame := s.frame(t)
	all := make([]*wire.Packet, n)
	for i := range all {
		all[i] = packet(t, frame)
		seg, err := all[i].TCP()
		require.NoError(t, err)
		seg.SetSource(netip.AddrPortFrom(client.Addr(), uint16(i)))
		seg.SetDestination(vipOf(i % benchServices))
		all[i] = packet(t, all[i].Frame()) // not parsed yet, as it comes from a wire
	}
	return all
}

var traffic = map[string]tcp{
	"SYN":  {from: client, flags: syn, options: linuxOptions},
	"data": {from: client, flags: ack | wire.PSH, payload: make([]byte, 100)},
}

// What the transparent way costs is to be no garbage.
func TestStageAllocatesNothing(t *testing.T) {
	for name, s := range traffic {
		b := newBalancer(t, Config{Services: manyServices(benchServices)})
		r := NewReturn(FirstVIP, 0)
		all := packets(t, 1001, s)
		i := 0
		assert.Zero(t, testing.AllocsPerRun(1000, func() {
			assert.Equal(t, wire.Forward, b.Stage(all[i]))
			if name == "data" {
				r.Entering(all[i])
				r.Leaving(all[i])
			}
			i++
		}), name)
	}
}

// BenchmarkStage is of packets that are not parsed yet, with 2,000 services. A
// packet can be sent once, since the stage changes it; the time is with the copy
// of its 2 KB buffer, as a wire's is with the read.
func BenchmarkStage(b *testing.B) {
	for _, name := range []string{"SYN", "data"} {
		b.Run(name, func(b *testing.B) {
			balancer := newBalancer(b, Config{Services: manyServices(benchServices)})
			all := packets(b, benchServices, traffic[name])
			p := new(wire.Packet)
			i := 0
			b.ReportAllocs()
			for b.Loop() {
				*p = *all[i]
				if balancer.Stage(p) != wire.Forward {
					b.Fatal(balancer.Stats())
				}
				if i++; i == len(all) {
					i = 0
				}
			}
			b.ReportMetric(float64(b.N)/b.Elapsed().Seconds(), "packets/s")
		})
	}
}

// BenchmarkReturn is of data to a proxy that holds one connection.
func BenchmarkReturn(b *testing.B) {
	l := newLink(b, FirstVIP)
	l.open(vip1, 1000)
	request := tcp{from: client, to: proxy1, flags: ack, seq: 1001, payload: make([]byte, 100)}.packet(b)
	b.ReportAllocs()
	for b.Loop() {
		l.Entering(request)
	}
	b.ReportMetric(float64(b.N)/b.Elapsed().Seconds(), "packets/s")
}
