package netlab

import (
	"bufio"
	"bytes"
	"fmt"
	"net/netip"
	"os"
	"strconv"
	"strings"
)

// Listening returns nil when a TCP socket of the host's namespace listens on
// the port, and otherwise says which ports are listened on.
func (h *Host) Listening(port uint16) error {
	var table []byte
	err := h.Do(func() (err error) {
		table, err = os.ReadFile("/proc/thread-self/net/tcp")
		return err
	})
	if err != nil {
		return err
	}
	var others []string
	for _, l := range parseListeners(table) {
		if l.Port() == port {
			return nil
		}
		others = append(others, l.String())
	}
	if len(others) == 0 {
		return fmt.Errorf("host %s: nothing listens on port %d, nor on any other", h.name, port)
	}
	return fmt.Errorf("host %s: nothing listens on port %d, only on %s", h.name, port, strings.Join(others, ", "))
}

// tcpListen is TCP_LISTEN as /proc/net/tcp prints it (include/net/tcp_states.h).
const tcpListen = "0A"

// parseListeners reads the listening sockets of a /proc/net/tcp table, whose
// addresses are in host byte order, hexadecimal (net/ipv4/tcp_ipv4.c
// get_tcp4_sock). Lines it cannot read are passed over.
func parseListeners(table []byte) []netip.AddrPort {
	var found []netip.AddrPort
	for s := bufio.NewScanner(bytes.NewReader(table)); s.Scan(); {
		f := strings.Fields(s.Text())
		if len(f) < 4 || f[3] != tcpListen {
			continue
		}
		hexAddr, hexPort, ok := strings.Cut(f[1], ":")
		addr, err1 := strconv.ParseUint(hexAddr, 16, 32)
		port, err2 := strconv.ParseUint(hexPort, 16, 16)
		if !ok || err1 != nil || err2 != nil {
			continue
		}
		ip := netip.AddrFrom4([4]byte{byte(addr), byte(addr >> 8), byte(addr >> 16), byte(addr >> 24)})
		found = append(found, netip.AddrPortFrom(ip, uint16(port)))
	}
	return found
}
