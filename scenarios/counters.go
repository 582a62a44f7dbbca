package scenarios

import "strings"

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
