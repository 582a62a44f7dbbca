package loadgen

import (
	"fmt"
	"net/netip"
	"testing"
	"time"

	"github.com/stretchr/testify/require"
)

// hosts are n addresses of the loopback interface.
func hosts(n byte) []Source {
	var sources []Source
	for i := range n {
		sources = append(sources, LocalSource(fmt.Sprintf("host%d", i), netip.AddrFrom4([4]byte{127, 0, 1, i + 1})))
	}
	return sources
}

// BenchmarkShortConnections connects, asks, reads and closes at a rate, against
// a server in the same process: all that both do is in ns/op where the rate is
// beyond what they can, and otherwise ns/op is the rate's.
func BenchmarkShortConnections(b *testing.B) {
	for _, rate := range []float64{2000, 10_000, 20_000} {
		b.Run(fmt.Sprintf("rate=%v", rate), func(b *testing.B) {
			cfg := Config{Targets: at(epollServer(b)), Sources: hosts(50), Schedule: Constant(rate, time.Hour).First(b.N), Close: Reset}
			b.ReportAllocs()
			b.ResetTimer()
			report, err := Run(b.Context(), cfg)
			b.StopTimer()
			require.NoError(b, err)
			require.NoError(b, report.Balanced())
			require.Empty(b, report.Failed)
			b.ReportMetric(float64(report.OK)/report.End.Sub(report.Start).Seconds(), "ok/s")
			b.ReportMetric(float64(report.NotStarted), "not-started")
			b.ReportMetric(float64(report.Lateness.Quantile(0.5))/1e3, "late-p50-µs")
			b.ReportMetric(float64(report.Lateness.Quantile(0.99))/1e3, "late-p99-µs")
		})
	}
}

// BenchmarkHeldConnections asks over 100 held connections at a rate.
func BenchmarkHeldConnections(b *testing.B) {
	for _, rate := range []float64{2000, 50_000} {
		b.Run(fmt.Sprintf("rate=%v", rate), func(b *testing.B) {
			held := hold(b, 100, Config{Targets: at(epollServer(b)), Close: Reset})
			cfg := Config{Held: held, Schedule: Constant(rate, time.Hour).First(b.N)}
			b.ReportAllocs()
			b.ResetTimer()
			report, err := Run(b.Context(), cfg)
			b.StopTimer()
			require.NoError(b, err)
			require.NoError(b, report.Balanced())
			require.Empty(b, report.Failed)
			b.ReportMetric(float64(report.OK)/report.End.Sub(report.Start).Seconds(), "ok/s")
			b.ReportMetric(float64(report.NotStarted), "not-started")
			b.ReportMetric(float64(report.Lateness.Quantile(0.5))/1e3, "late-p50-µs")
			b.ReportMetric(float64(report.Lateness.Quantile(0.99))/1e3, "late-p99-µs")
		})
	}
}
