package observe

import (
	"net/netip"
	"testing"

	"github.com/stretchr/testify/require"
)

const benchPort = 6379

func benchmarkProbe(b *testing.B, p probe) {
	b.Cleanup(func() { require.NoError(b, p.close()) })
	values, err := p.read(nil)
	require.NoError(b, err)
	b.ReportAllocs()
	for b.Loop() {
		if values, err = p.read(values); err != nil {
			b.Fatal(err)
		}
	}
}

// BenchmarkCounters is one sample of every counter of one host.
func BenchmarkCounters(b *testing.B) {
	lab := upLab(b, host("server", nil))
	p, err := openCounters(lab.Host("server"), newParser())
	require.NoError(b, err)
	benchmarkProbe(b, p)
}

// BenchmarkListener is one sample of an accept queue, with as many established
// sockets on the machine as the name says.
func BenchmarkListener(b *testing.B) {
	for _, held := range []struct {
		name  string
		count int
	}{{"0", 0}, {"4000", 4000}} {
		b.Run(held.name, func(b *testing.B) {
			lab := upLab(b, host("client", nil), host("server", nil))
			server := lab.Host("server")
			listen(b, server, benchPort, 4096)
			connect(b, lab.Host("client"), netip.AddrPortFrom(server.Addr(), benchPort), held.count)
			p, err := openListener(Listener{server, benchPort})
			require.NoError(b, err)
			benchmarkProbe(b, p)
		})
	}
}

// BenchmarkStates is one count by state of a host's sockets.
func BenchmarkStates(b *testing.B) {
	for _, held := range []struct {
		name  string
		count int
	}{{"0", 0}, {"4000", 4000}} {
		b.Run(held.name, func(b *testing.B) {
			lab := upLab(b, host("client", nil), host("server", nil))
			server := lab.Host("server")
			listen(b, server, benchPort, 4096)
			connect(b, lab.Host("client"), netip.AddrPortFrom(server.Addr(), benchPort), held.count)
			p, err := openStates(server)
			require.NoError(b, err)
			benchmarkProbe(b, p)
		})
	}
}
