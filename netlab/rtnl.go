package netlab

import (
	"encoding/binary"
	"errors"
	"fmt"
	"net"
	"net/netip"
	"time"

	"github.com/vishvananda/netlink"
	"github.com/vishvananda/netlink/nl"
	"golang.org/x/sys/unix"
)

// rtnl configures the links of one namespace. Its sockets belong to the
// namespace it was opened in, so that it may be used from any thread.
type rtnl struct {
	handle *netlink.Handle
	batch  int // a raw rtnetlink socket, for many requests in one datagram
}

// openRtnl must run in the namespace it is for.
func openRtnl() (*rtnl, error) {
	handle, err := netlink.NewHandle(unix.NETLINK_ROUTE)
	if err != nil {
		return nil, fmt.Errorf("rtnetlink: %w", err)
	}
	batch, err := unix.Socket(unix.AF_NETLINK, unix.SOCK_RAW|unix.SOCK_CLOEXEC, unix.NETLINK_ROUTE)
	if err != nil {
		handle.Close()
		return nil, fmt.Errorf("rtnetlink: %w", err)
	}
	return &rtnl{handle: handle, batch: batch}, nil
}

func (r *rtnl) close() {
	r.handle.Close()
	unix.Close(r.batch)
}

// loopback is the index of lo in every namespace (include/net/net_namespace.h,
// LOOPBACK_IFINDEX).
const loopback = 1

func attrs(index int) netlink.LinkAttrs {
	a := netlink.NewLinkAttrs()
	a.Index = index
	return a
}

func device(index int) netlink.Link { return &netlink.Device{LinkAttrs: attrs(index)} }

func (r *rtnl) index(name string) (int, error) {
	l, err := r.handle.LinkByName(name)
	if err != nil {
		return 0, fmt.Errorf("interface %s: %w", name, err)
	}
	return l.Attrs().Index, nil
}

func (r *rtnl) operState(index int) (netlink.LinkOperState, error) {
	l, err := r.handle.LinkByIndex(index)
	if err != nil {
		return 0, fmt.Errorf("interface %d: %w", index, err)
	}
	return l.Attrs().OperState, nil
}

func (r *rtnl) setUp(index int) error {
	if err := r.handle.LinkSetUp(device(index)); err != nil {
		return fmt.Errorf("interface %d up: %w", index, err)
	}
	return nil
}

func (r *rtnl) setMAC(index int, m net.HardwareAddr) error {
	if err := r.handle.LinkSetHardwareAddr(device(index), m); err != nil {
		return fmt.Errorf("interface %d hardware address: %w", index, err)
	}
	return nil
}

func (r *rtnl) setQueue(index, frames int) error {
	if err := r.handle.LinkSetTxQLen(device(index), frames); err != nil {
		return fmt.Errorf("interface %d transmit queue: %w", index, err)
	}
	return nil
}

func (r *rtnl) addAddr(index int, p netip.Prefix) error {
	a := p.Addr().As4()
	addr := &netlink.Addr{IPNet: &net.IPNet{IP: a[:], Mask: net.CIDRMask(p.Bits(), 32)}}
	if err := r.handle.AddrAdd(device(index), addr); err != nil {
		return fmt.Errorf("address %v: %w", p, err)
	}
	return nil
}

// addRoute adds a route by way of an address, whose interface the kernel finds;
// without one it makes every address of the prefix the host's own.
func (r *rtnl) addRoute(to netip.Prefix, via netip.Addr) error {
	dst := to.Addr().As4()
	route := &netlink.Route{Dst: &net.IPNet{IP: dst[:], Mask: net.CIDRMask(to.Bits(), 32)}}
	if via.IsValid() {
		gateway := via.As4()
		route.Gw = gateway[:]
	} else {
		route.LinkIndex = loopback
		route.Type, route.Table, route.Scope = unix.RTN_LOCAL, unix.RT_TABLE_LOCAL, netlink.SCOPE_HOST
	}
	if err := r.handle.RouteAdd(route); err != nil {
		return fmt.Errorf("route to %v: %w", to, err)
	}
	return nil
}

// addBridge makes a bridge that forwards at once (no spanning tree) and floods
// no multicast reports.
func (r *rtnl) addBridge(name string) (int, error) {
	off := false
	a := attrs(0)
	a.Name = name
	if err := r.handle.LinkAdd(&netlink.Bridge{LinkAttrs: a, MulticastSnooping: &off}); err != nil {
		return 0, needOr(NeedBridge, fmt.Errorf("bridge: %w", err))
	}
	index, err := r.index(name)
	if err != nil {
		return 0, err
	}
	return index, r.setUp(index)
}

func (r *rtnl) addPort(index, bridge int) error {
	if err := r.handle.LinkSetMasterByIndex(device(index), bridge); err != nil {
		return fmt.Errorf("bridge port: %w", err)
	}
	return r.setUp(index)
}

// addVeth makes a pair whose far end is born in the namespace peerNS.
func (r *rtnl) addVeth(name, peer string, peerNS int, peerMAC net.HardwareAddr) error {
	a := attrs(0)
	a.Name = name
	veth := &netlink.Veth{LinkAttrs: a, PeerName: peer, PeerHardwareAddr: peerMAC, PeerNamespace: netlink.NsFd(peerNS)}
	if err := r.handle.LinkAdd(veth); err != nil {
		return needOr(NeedVeth, fmt.Errorf("veth pair: %w", err))
	}
	return nil
}

// netemLimit is how many packets a netem qdisc may hold; the kernel's default
// of 1,000 is less than one burst of SYNs in flight.
const netemLimit = 200_000

func (r *rtnl) addNetem(index int, delay time.Duration, loss float64) error {
	return r.handle.QdiscAdd(netlink.NewNetem(
		netlink.QdiscAttrs{LinkIndex: index, Handle: netlink.MakeHandle(1, 0), Parent: netlink.HANDLE_ROOT},
		netlink.NetemQdiscAttrs{Latency: uint32(delay.Microseconds()), Limit: netemLimit, Loss: float32(loss * 100)},
	))
}

// neighbour is a permanent entry: of a host (addr is at mac) or, without addr,
// of a bridge (mac is behind port iface).
type neighbour struct {
	iface int
	addr  netip.Addr
	mac   net.HardwareAddr
}

// batchSize keeps one datagram below the default socket buffer.
const batchSize = 256

// addNeighbours writes many entries with one system call per batch. Only the
// last request of a batch asks for an acknowledgement; an earlier one that
// fails is reported all the same (net/netlink/af_netlink.c netlink_rcv_skb).
func (r *rtnl) addNeighbours(list []neighbour) error {
	for len(list) > 0 {
		n := min(len(list), batchSize)
		if err := r.sendNeighbours(list[:n]); err != nil {
			return err
		}
		list = list[n:]
	}
	return nil
}

func (r *rtnl) sendNeighbours(list []neighbour) error {
	var datagram []byte
	for i, n := range list {
		flags := unix.NLM_F_CREATE | unix.NLM_F_REPLACE
		if i == len(list)-1 {
			flags |= unix.NLM_F_ACK
		}
		req := nl.NewNetlinkRequest(unix.RTM_NEWNEIGH, flags)
		msg := &netlink.Ndmsg{Family: unix.AF_INET, Index: uint32(n.iface), State: netlink.NUD_PERMANENT}
		if !n.addr.IsValid() {
			msg.Family, msg.Flags, msg.State = unix.AF_BRIDGE, netlink.NTF_MASTER, netlink.NUD_NOARP
		}
		req.AddData(msg)
		if n.addr.IsValid() {
			a := n.addr.As4()
			req.AddData(nl.NewRtAttr(unix.NDA_DST, a[:]))
		}
		req.AddData(nl.NewRtAttr(unix.NDA_LLADDR, n.mac))
		datagram = append(datagram, req.Serialize()...)
	}
	if err := unix.Sendto(r.batch, datagram, 0, &unix.SockaddrNetlink{Family: unix.AF_NETLINK}); err != nil {
		return fmt.Errorf("rtnetlink send: %w", err)
	}
	return r.awaitAck()
}

// awaitAck reads until the acknowledgement and returns the first error seen.
func (r *rtnl) awaitAck() error {
	var first error
	buf := make([]byte, 64<<10)
	for {
		n, _, err := unix.Recvfrom(r.batch, buf, 0)
		if errors.Is(err, unix.EINTR) {
			continue
		}
		if err != nil {
			return fmt.Errorf("rtnetlink receive: %w", err)
		}
		for rest := buf[:n]; len(rest) >= unix.SizeofNlMsghdr+4; {
			size := int(binary.NativeEndian.Uint32(rest))
			errno := int32(binary.NativeEndian.Uint32(rest[unix.SizeofNlMsghdr:]))
			if errno == 0 {
				return first
			}
			if first == nil {
				first = fmt.Errorf("neighbour entry: %w", unix.Errno(-errno))
			}
			if size < unix.SizeofNlMsghdr || size > len(rest) {
				return first
			}
			// The acknowledged request is the last of its batch; when that very
			// one fails no zero follows.
			if flags := binary.NativeEndian.Uint16(rest[unix.SizeofNlMsghdr+4+6:]); flags&unix.NLM_F_ACK != 0 {
				return first
			}
			rest = rest[size:]
		}
	}
}
