package proxy

import (
	"encoding/binary"
	"errors"
	"fmt"
	"net/netip"
	"strconv"
	"strings"
)

// Route says where the VIPs of a prefix go: to the address with the same host bits in another prefix, or to one of a list.
// The port of the VIP does not matter.
type Route struct {
	VIPs netip.Prefix

	To   netip.Prefix // as long as VIPs; the zero value if there is a list
	Port uint16       // on all addresses of To

	List []netip.AddrPort // the VIP with host number h goes to List[h mod len(List)]
}

// ParseRoute reads "10.8.0.0/16=10.9.0.0/16:6379", prefix to prefix, or "10.8.0.0/16=10.0.0.11:6379,10.0.0.12:6379",
// prefix to list. Its errors do not repeat s.
func ParseRoute(s string) (Route, error) {
	var r Route
	from, to, ok := strings.Cut(s, "=")
	if !ok {
		return r, errors.New("the upstream is missing; want prefix=upstream, as 10.8.0.0/16=10.9.0.0/16:6379 or 10.8.0.0/16=10.0.0.11:6379,10.0.0.12:6379")
	}
	var err error
	if r.VIPs, err = netip.ParsePrefix(from); err != nil {
		return r, fmt.Errorf("the VIPs %q are not a prefix; want address/length, as 10.8.0.0/16", from)
	}
	if strings.Contains(to, "/") {
		prefix, port, ok := strings.Cut(to, ":")
		if !ok {
			return r, fmt.Errorf("the port is missing; want %s:6379", to)
		}
		if r.To, err = netip.ParsePrefix(prefix); err != nil {
			return r, fmt.Errorf("the upstream %q is not a prefix; want address/length:port, as 10.9.0.0/16:6379", to)
		}
		n, err := strconv.ParseUint(port, 10, 16)
		if err != nil {
			return r, fmt.Errorf("the port %q is not a number from 1 to 65535; want %v:6379", port, r.To)
		}
		r.Port = uint16(n)
	} else {
		for item := range strings.SplitSeq(to, ",") {
			upstream, err := netip.ParseAddrPort(item)
			if err != nil {
				return r, fmt.Errorf("the upstream %q is not an address and a port; want a list, as 10.0.0.11:6379,10.0.0.12:6379, or a prefix, as 10.9.0.0/16:6379", item)
			}
			r.List = append(r.List, upstream)
		}
	}
	return r, r.check()
}

func (r Route) check() error {
	switch {
	case !r.VIPs.IsValid() || !r.VIPs.Addr().Is4():
		return fmt.Errorf("the VIPs %v are not an IPv4 prefix; want one, as 10.8.0.0/16", r.VIPs)
	case r.VIPs != r.VIPs.Masked():
		return fmt.Errorf("%v has host bits; want %v", r.VIPs, r.VIPs.Masked())
	case r.To.IsValid() == (len(r.List) > 0):
		return errors.New("the upstream is either a prefix or a list")
	}
	if r.To.IsValid() {
		switch {
		case !r.To.Addr().Is4():
			return fmt.Errorf("the upstream %v is not an IPv4 prefix; want one, as 10.9.0.0/16", r.To)
		case r.To != r.To.Masked():
			return fmt.Errorf("%v has host bits; want %v", r.To, r.To.Masked())
		case r.To.Bits() != r.VIPs.Bits():
			return fmt.Errorf("%v and %v differ in length; want the same number behind both slashes", r.VIPs, r.To)
		case r.Port == 0:
			return fmt.Errorf("the port is 0; want %v:6379", r.To)
		}
	}
	for _, upstream := range r.List {
		if !upstream.Addr().Is4() || upstream.Port() == 0 {
			return fmt.Errorf("the upstream %v is not an IPv4 address with a port above 0; want one, as 10.0.0.11:6379", upstream)
		}
	}
	return nil
}

// String returns what [ParseRoute] reads.
func (r Route) String() string {
	if r.To.IsValid() {
		return fmt.Sprintf("%v=%v:%d", r.VIPs, r.To, r.Port)
	}
	list := make([]string, len(r.List))
	for i, upstream := range r.List {
		list[i] = upstream.String()
	}
	return r.VIPs.String() + "=" + strings.Join(list, ",")
}

// Upstream returns where a VIP goes; ok is false if the route does not have it.
func (r Route) Upstream(vip netip.Addr) (to netip.AddrPort, ok bool) {
	if !r.VIPs.Contains(vip) {
		return to, false
	}
	host := number(vip) - number(r.VIPs.Addr())
	if !r.To.IsValid() {
		return r.List[host%uint32(len(r.List))], true
	}
	var b [4]byte
	binary.BigEndian.PutUint32(b[:], number(r.To.Addr())+host)
	return netip.AddrPortFrom(netip.AddrFrom4(b), r.Port), true
}

// number returns an IPv4 address as a number.
func number(a netip.Addr) uint32 {
	b := a.As4()
	return binary.BigEndian.Uint32(b[:])
}
