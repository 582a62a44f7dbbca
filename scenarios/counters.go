package scenarios

import (
	"slices"
	"strings"

	"connlab/netlab/observe"
	"connlab/results"
)

// isCounter tells the kernel's counters from its gauges and from those that
// sampling adds.
func isCounter(name string) bool {
	for _, gauges := range []string{"sockstat.", "Listen.", "State.", "Tcp.CurrEstab"} {
		if strings.HasPrefix(name, gauges) {
			return false
		}
	}
	return true
}

// unitOf is what a kernel counter counts.
func unitOf(name string) string {
	switch name {
	case "TcpExt.ListenOverflows", "TcpExt.ListenDrops", "TcpExt.TCPReqQFullDrop", "TcpExt.TCPReqQFullDoCookies",
		"TcpExt.SyncookiesSent", "TcpExt.TCPSynRetrans":
		return "SYNs"
	case "TcpExt.EmbryonicRsts", "Tcp.OutRsts":
		return "RSTs"
	}
	if strings.HasSuffix(name, "Octets") {
		return "B"
	}
	return "events"
}

// alwaysShown are counters that are recorded even where they did not move.
var alwaysShown = []string{
	"TcpExt.ListenOverflows", "TcpExt.ListenDrops", "TcpExt.TCPReqQFullDrop", "TcpExt.TCPReqQFullDoCookies",
	"TcpExt.SyncookiesSent", "TcpExt.EmbryonicRsts", "TcpExt.TCPSynRetrans", "Tcp.OutRsts", "Tcp.RetransSegs",
}

// recordGrowth records the growth of every counter of one side that moved, and of some that did not
// but could have: those always shown, and more.
func recordGrowth(v *results.Variant, side string, deltas observe.Counters, more ...string) {
	for counter, n := range deltas {
		if n != 0 && isCounter(counter) {
			v.Metrics[side+"/"+counter] = results.Metric{Value: float64(n), Unit: unitOf(counter)}
		}
	}
	for _, counter := range slices.Concat(alwaysShown, more) {
		if n, printed := deltas[counter]; printed {
			v.Metrics[side+"/"+counter] = results.Metric{Value: float64(n), Unit: unitOf(counter)}
		}
	}
}
