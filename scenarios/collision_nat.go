package scenarios

import (
	"errors"
	"fmt"
	"net/netip"

	"github.com/google/nftables"
	"github.com/google/nftables/binaryutil"
	"github.com/google/nftables/expr"
	"github.com/vishvananda/netlink"
	"golang.org/x/sys/unix"

	"connlab/netlab"
)

// addKernelNAT makes a host translate VIPs to proxies with the kernel's own
// means: a nat chain in prerouting and a map, as `nft add rule nat prerouting
// dnat to ip daddr map @vips` does.
func (c *collision) addKernelNAT(h *netlab.Host) error {
	err := h.Do(func() error {
		conn, err := nftables.New() // its socket is made here, inside the namespace
		if err != nil {
			return err
		}
		table := conn.AddTable(&nftables.Table{Family: nftables.TableFamilyIPv4, Name: "nat"})
		chain := conn.AddChain(&nftables.Chain{
			Name: "prerouting", Table: table, Type: nftables.ChainTypeNAT,
			Hooknum: nftables.ChainHookPrerouting, Priority: nftables.ChainPriorityNATDest,
		})
		vips := &nftables.Set{Table: table, Name: "vips", IsMap: true, KeyType: nftables.TypeIPAddr, DataType: nftables.TypeIPAddr}
		if err := conn.AddSet(vips, nil); err != nil {
			return err
		}
		elements := make([]nftables.SetElement, c.VIPs)
		for i := range elements {
			elements[i] = nftables.SetElement{Key: vip(i).AsSlice(), Val: proxyAddr(c.group(vip(i))).Addr().AsSlice()}
		}
		const perMessage = 200 // a netlink attribute holds 64 KiB
		for len(elements) > 0 {
			n := min(perMessage, len(elements))
			if err := conn.SetAddElements(vips, elements[:n]); err != nil {
				return err
			}
			elements = elements[n:]
		}
		conn.AddRule(&nftables.Rule{Table: table, Chain: chain, Exprs: []expr.Any{
			&expr.Meta{Key: expr.MetaKeyL4PROTO, Register: 1},
			&expr.Cmp{Op: expr.CmpOpEq, Register: 1, Data: []byte{unix.IPPROTO_TCP}},
			&expr.Payload{DestRegister: 1, Base: expr.PayloadBaseTransportHeader, Offset: 2, Len: 2},
			&expr.Cmp{Op: expr.CmpOpEq, Register: 1, Data: binaryutil.BigEndian.PutUint16(redisPort)},
			&expr.Payload{DestRegister: 1, Base: expr.PayloadBaseNetworkHeader, Offset: 16, Len: 4},
			&expr.Lookup{SourceRegister: 1, DestRegister: 1, SetName: vips.Name, SetID: vips.ID, IsDestRegSet: true},
			&expr.NAT{Type: expr.NATTypeDestNAT, Family: unix.NFPROTO_IPV4, RegAddrMin: 1},
		}})
		return conn.Flush()
	})
	if errors.Is(err, unix.ENOENT) || errors.Is(err, unix.EOPNOTSUPP) || errors.Is(err, unix.EPROTONOSUPPORT) {
		return &netlab.NeedError{Need: netlab.NeedNftables, Err: fmt.Errorf("a nat chain: %w", err)}
	}
	return err
}

// natFlow is what the reply of a translated connection is known by.
type natFlow struct {
	proxy, client netip.Addr
	port          uint16
}

// movedPorts counts the connections whose client port the kernel's NAT has
// changed, among those that connection tracking still knows, and how many of them
// had to because another was moved to their port before (net/netfilter/nf_nat_core.c,
// get_unique_tuple: any port that nobody has in that reply direction).
func movedPorts(h *netlab.Host) (moved, byMoved int, err error) {
	err = h.Do(func() error {
		handle, err := netlink.NewHandle(unix.NETLINK_NETFILTER)
		if err != nil {
			return err
		}
		defer handle.Close()
		flows, err := handle.ConntrackTableList(netlink.ConntrackTable, unix.AF_INET)
		if err != nil {
			return fmt.Errorf("reading the connection tracking table: %w", err)
		}
		moved, byMoved = countMoved(flows)
		return nil
	})
	return moved, byMoved, err
}

func countMoved(flows []*netlink.ConntrackFlow) (moved, byMoved int) {
	movedTo := map[natFlow]bool{}
	wanted := map[natFlow]int{}
	for _, f := range flows {
		to, ok := netip.AddrFromSlice(f.Forward.DstIP)
		if !ok || !vipPrefix.Contains(to.Unmap()) || f.Forward.SrcPort == f.Reverse.DstPort {
			continue
		}
		moved++
		proxy, _ := netip.AddrFromSlice(f.Reverse.SrcIP)
		client, _ := netip.AddrFromSlice(f.Reverse.DstIP)
		movedTo[natFlow{proxy.Unmap(), client.Unmap(), f.Reverse.DstPort}] = true
		wanted[natFlow{proxy.Unmap(), client.Unmap(), f.Forward.SrcPort}]++
	}
	for f, n := range wanted {
		if movedTo[f] {
			byMoved += n
		}
	}
	return moved, byMoved
}
