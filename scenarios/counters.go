package scenarios

import "strings"

// isCounter tells the kernel's counters from its gauges and from what the lab's
// own sampling adds.
func isCounter(name string) bool {
	switch {
	case strings.HasPrefix(name, "TcpExt."), strings.HasPrefix(name, "IpExt."), strings.HasPrefix(name, "Ip."), strings.HasPrefix(name, "Tcp."):
		return name != "Tcp.CurrEstab"
	}
	return false
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
