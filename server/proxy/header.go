package proxy

import (
	"bufio"
	"errors"
	"fmt"
	"net"
	"net/netip"

	"github.com/pires/go-proxyproto"
)

// maxHeader is the longest PROXY protocol header that is read, in bytes. One with nothing but IPv4 addresses has 28;
// balancers append some hundred bytes of their own at most.
const maxHeader = 4096

// errNoAddress says that a PROXY protocol header names no addresses: the balancer speaks for itself, as in a health check
// (command LOCAL), or does not know them (UNKNOWN).
var errNoAddress = errors.New("the PROXY protocol header names no IPv4 addresses")

// readHeader reads the PROXY protocol header that a connection must begin with; the protocol forbids to guess whether there
// is one (section 5 of its specification). What the reader holds afterwards belongs to the connection's bytes. The error is
// [errNoAddress], wrapped or not, if the header is in order and names no addresses. A version 1 header must arrive in one
// piece, as its specification asks of senders.
func readHeader(r *bufio.Reader) (client, vip netip.AddrPort, err error) {
	h, err := proxyproto.Read(r)
	if err != nil {
		return client, vip, fmt.Errorf("reading the PROXY protocol header: %w", err)
	}
	source, isTCP := h.SourceAddr.(*net.TCPAddr)
	destination, alsoTCP := h.DestinationAddr.(*net.TCPAddr)
	if h.Command.IsLocal() || !isTCP || !alsoTCP || !h.TransportProtocol.IsIPv4() {
		return client, vip, errNoAddress
	}
	return addrPort(source), addrPort(destination), nil
}

// header returns a PROXY protocol header, version 2, of a connection from client to vip.
func header(client, vip netip.AddrPort) ([]byte, error) {
	h := proxyproto.HeaderProxyFromAddrs(2, net.TCPAddrFromAddrPort(client), net.TCPAddrFromAddrPort(vip))
	b, err := h.Format()
	if err != nil {
		return nil, fmt.Errorf("writing a PROXY protocol header from %v to %v: %w", client, vip, err)
	}
	return b, nil
}

// addrPort returns an IPv4 address as such: the net package may hold it as an IPv6 one.
func addrPort(a *net.TCPAddr) netip.AddrPort {
	ap := a.AddrPort()
	return netip.AddrPortFrom(ap.Addr().Unmap(), ap.Port())
}
