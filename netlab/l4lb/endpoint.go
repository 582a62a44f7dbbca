package l4lb

import (
	"encoding/binary"
	"math/bits"
	"net/netip"

	"connlab/netlab/wire"
)

// KindTOAVIP is the option in which a VIP travels by default, as in TOA_VIP: port
// (2 bytes, network order), IPv4 address (4).
const KindTOAVIP = 250

// endpoint is an IPv4 address and a port as one number, the port in the low 16
// bits: half the size of a netip.AddrPort in a map's key, and quicker to hash.
type endpoint uint64

func endpointOf(a netip.AddrPort) endpoint {
	b := a.Addr().As4()
	return endpoint(binary.BigEndian.Uint32(b[:]))<<16 | endpoint(a.Port())
}

func (e endpoint) addrPort() netip.AddrPort {
	var b [4]byte
	binary.BigEndian.PutUint32(b[:], uint32(e>>16))
	return netip.AddrPortFrom(netip.AddrFrom4(b), uint16(e))
}

const optionSize = 6 // without kind and length

// option is e as the data of the VIP option.
func (e endpoint) option() (data [optionSize]byte) {
	binary.BigEndian.PutUint16(data[:], uint16(e))
	binary.BigEndian.PutUint32(data[2:], uint32(e>>16))
	return data
}

// fromOption reads what option wrote; false for another length, port 0 or address
// 0.0.0.0, which nothing connects to.
func fromOption(data []byte) (endpoint, bool) {
	if len(data) != optionSize {
		return 0, false
	}
	port, addr := binary.BigEndian.Uint16(data), binary.BigEndian.Uint32(data[2:])
	return endpoint(addr)<<16 | endpoint(port), port != 0 && addr != 0
}

// tuple is both ends of a connection as one of the sides sees it; with the
// protocol, the classic 5-tuple.
type tuple struct{ client, server endpoint }

// spread picks one of n by a hash of the tuple: the same for each packet of a
// connection, without any state.
func spread(t tuple, n int) int {
	h := mix(mix(uint64(t.client)) ^ uint64(t.server))
	hi, _ := bits.Mul64(h, uint64(n)) // the high bits of h decide, without a division
	return int(hi)
}

// mix is SplitMix64's output function (Steele, Lea, Flood: Fast Splittable
// Pseudorandom Number Generators, 2014): each bit of the input turns over about
// half of the output's, so that neighbouring ports and addresses spread.
func mix(z uint64) uint64 {
	z += 0x9e3779b97f4a7c15
	z = (z ^ z>>30) * 0xbf58476d1ce4e5b9
	z = (z ^ z>>27) * 0x94d049bb133111eb
	return z ^ z>>31
}

// opens says that a segment asks a listener for a connection: what Linux takes for
// a SYN (net/ipv4/tcp_input.c tcp_rcv_state_process, TCP_LISTEN).
func opens(f wire.Flags) bool {
	return f&(wire.SYN|wire.ACK|wire.RST|wire.FIN) == wire.SYN
}
