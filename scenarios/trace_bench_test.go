package scenarios

import (
	"context"
	"errors"
	"io"
	"net/netip"
	"runtime"
	"slices"
	"testing"

	"github.com/stretchr/testify/require"

	"connlab/loadgen"
	"connlab/netlab"
	"connlab/netlab/observe"
)

// The load of BenchmarkLoaderBesideTrace: pairs of bursts, one with the trace and one
// without. Each burst leaves its TIME_WAITs on the clients, which have ports for all.
const (
	tracePairs   = 400
	traceWarm    = 300 // before each burst, and not measured
	traceBurst   = 700
	traceClients = 40
	mostLoss     = 0.05
)

// BenchmarkLoaderBesideTrace compares the loader's throughput, connections opened, one
// PING each and closed, with both ends traced and without a trace. It fails where the
// loss is above 5 %.
//
// A burst is a fixed amount of work that keeps both CPUs busy to its end, so that what
// the trace takes shows in its duration. Bursts with and without take turns, now one
// first and now the other, and what is compared is the two of a pair: other load on the
// machine changes slowly beside that. The median of the ratios has an interval that
// needs no distribution (binomial, 95 %).
func BenchmarkLoaderBesideTrace(b *testing.B) {
	hosts := append(netlab.Clients(traceClients, "client", lanName, nil), netlab.HostSpec{Name: "server", Links: []netlab.LinkSpec{{Switch: lanName}}})
	for b.Loop() {
		lab, err := netlab.Up(b.Context(), netlab.Topology{
			Switches: []netlab.SwitchSpec{{Name: lanName, Subnet: netip.MustParsePrefix("10.0.0.0/16")}}, Hosts: hosts,
		})
		if need, is := errors.AsType[*netlab.NeedError](err); is {
			b.Skip(need)
		}
		require.NoError(b, err)
		on, ratios := tracedBursts(b, lab)
		require.NoError(b, lab.Down())

		slices.Sort(ratios)
		low, high := medianInterval(len(ratios))
		median := (ratios[(len(ratios)-1)/2] + ratios[len(ratios)/2]) / 2
		b.Logf("%d pairs of %d connections: with the trace %.0f connections/s, ratio to without %.4f (95 %% interval %.4f to %.4f)",
			len(ratios), traceBurst, on, median, ratios[low], ratios[high])
		b.ReportMetric(median, "ratio")
		b.ReportMetric(ratios[low], "ratio-low")
		b.ReportMetric(ratios[high], "ratio-high")
		if median < 1-mostLoss {
			b.Errorf("the trace costs %.1f %% of the throughput; want at most %.0f %%", 100*(1-median), 100*mostLoss)
		}
	}
}

// tracedBursts returns the median throughput with the trace, and for each pair the
// ratio of that with to that without.
func tracedBursts(b *testing.B, lab *netlab.Lab) (on float64, ratios []float64) {
	server, err := findServer(ServerMini)
	require.NoError(b, err)
	target, err := server.start(b.Context(), lab.Host("server"), serverConfig{backlog: 4096, acceptsPerCycle: 1000}, io.Discard)
	require.NoError(b, err)
	from, closeUnused, err := sources(lab.Hosts()[:traceClients])
	require.NoError(b, err)
	defer closeUnused()

	load := func(n int) float64 {
		report, err := loadgen.Run(context.Background(), loadgen.Config{
			Targets: []netip.AddrPort{target.addr}, Sources: from, Schedule: loadgen.Burst(n, 0),
		})
		require.NoError(b, err)
		require.EqualValues(b, n, report.OK, "%v", report.Failed)
		return float64(report.OK) / report.End.Sub(report.Start).Seconds()
	}
	burst := func() float64 {
		runtime.GC() // what the start of a trace has left is not the burst's, nor are cold caches
		load(traceWarm)
		return load(traceBurst)
	}
	traced := func() float64 {
		trace, err := observe.StartTrace(observe.TraceConfig{Hosts: lab.Hosts()})
		require.NoError(b, err)
		throughput := burst()
		report, err := trace.Stop()
		require.NoError(b, err)
		require.Zero(b, report.Lost["tcp_send_reset"])
		// It was indeed traced. The last FINs are not acknowledged yet.
		require.NotEmpty(b, report.Stays)
		require.Equal(b, observe.FinWait1, report.Stays[0].State)
		require.Positive(b, report.Stays[0].Count)
		return throughput
	}
	burst() // the first grows tables
	var with []float64
	for i := range tracePairs {
		var a, c float64
		if i%2 == 0 {
			a, c = traced(), burst()
		} else {
			c, a = burst(), traced()
		}
		with = append(with, a)
		ratios = append(ratios, a/c)
	}
	require.NoError(b, target.stop())
	slices.Sort(with)
	return with[len(with)/2], ratios
}

// medianInterval are the indexes, in n sorted values, of an interval that has the
// median of what they come from with a probability of 95 % or more: the values below
// it are as many as heads in n throws of a coin.
func medianInterval(n int) (low, high int) {
	below, p := 0.0, 1.0 // P(fewer than low heads), P(low heads)
	for range n {
		p /= 2
	}
	for below+p <= 0.025 {
		below += p
		p *= float64(n-low) / float64(low+1)
		low++
	}
	low = max(0, low-1)
	return low, n - 1 - low
}
