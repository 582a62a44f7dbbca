package observe

import (
	"errors"
	"fmt"
	"math"
	"strings"

	"github.com/cilium/ebpf/btf"
)

// The tracepoints of a [Trace].
const (
	eventSendReset        = "tcp_send_reset"
	eventReceiveReset     = "tcp_receive_reset"
	eventRetransmit       = "tcp_retransmit_skb"
	eventRetransmitSynAck = "tcp_retransmit_synack"
	eventDrop             = "kfree_skb"
	eventState            = "inet_sock_set_state"
)

// countedEvents are those that make a [TraceCount]. An event's number in the
// kernel is its index here.
var countedEvents = []string{eventSendReset, eventReceiveReset, eventRetransmit, eventRetransmitSynAck, eventDrop}

// tracedEvents are all that a program is attached to.
var tracedEvents = append([]string{eventState}, countedEvents...)

// kernelLayout is what the trace programs have to know of the running kernel. All
// of it comes from the kernel's BTF.
type kernelLayout struct {
	sock    sockLayout // of a sock_common
	inSock  int        // the sock_common in a struct sock
	inReq   int        // the sock_common in a struct request_sock
	skb     skbLayout
	device  int // the namespace in a struct net_device
	inode   int // the inode number in a struct net
	loop    int // the loopback device in a struct net
	ipProto int // the protocol in a struct sock; 2 bytes

	events  map[string]eventLayout
	reasons map[string]map[uint32]string // by tracepoint, where it has reasons
}

// sockLayout is where the fields of a struct sock_common are. They are read in one
// piece: all offsets but from are relative to it.
type sockLayout struct {
	from, size                        int
	remote, local, family, state, net int
	remote6                           int // -1 on a kernel without IPv6
}

// skbLayout is where the fields of a struct sk_buff are, likewise.
type skbLayout struct {
	from, size                       int
	head, network, protocol, arrived int
	device                           int // not in that piece, and so from the beginning
}

// eventLayout is which arguments a tracepoint has where; -1 for one that it lacks.
type eventLayout struct {
	sock, skb, request, reason int
	number                     int // the first that is an int
}

// maxPiece is how much of a structure is read at once at most.
const maxPiece = 96

// loadLayout reads the running kernel's BTF.
func loadLayout() (*kernelLayout, error) {
	spec, err := btf.LoadKernelSpec()
	if err != nil {
		return nil, err
	}
	k := &kernelLayout{events: map[string]eventLayout{}, reasons: map[string]map[uint32]string{}}
	var errs []error
	at := func(structure, path string, size int) int {
		offset, err := fieldOffset(spec, structure, path, size)
		errs = append(errs, err)
		return offset
	}
	piece := func(fields map[*int]int) (from, size int) {
		from, end := math.MaxInt, 0
		for offset, length := range fields {
			from, end = min(from, *offset), max(end, *offset+length)
		}
		if end-from > maxPiece {
			errs = append(errs, fmt.Errorf("%d bytes from the first field to the last, more than %d", end-from, maxPiece))
		}
		for offset := range fields {
			*offset -= from
		}
		return from, (end - from + 7) &^ 7
	}

	s := &k.sock
	s.remote = at("sock_common", "skc_daddr", 4)
	s.local = at("sock_common", "skc_rcv_saddr", 4)
	s.family = at("sock_common", "skc_family", 2)
	s.state = at("sock_common", "skc_state", 1)
	s.net = at("sock_common", "skc_net.net", 8)
	fields := map[*int]int{&s.remote: 4, &s.local: 4, &s.family: 2, &s.state: 1, &s.net: 8}
	if s.remote6, err = fieldOffset(spec, "sock_common", "skc_v6_daddr", 16); err == nil {
		fields[&s.remote6] = 16
	} else {
		s.remote6 = -1
	}
	s.from, s.size = piece(fields)
	k.inSock = at("sock", "__sk_common", 0)
	k.inReq = at("request_sock", "__req_common", 0)
	k.ipProto = at("sock", "sk_protocol", 2)

	b := &k.skb
	b.head = at("sk_buff", "head", 8)
	b.network = at("sk_buff", "network_header", 2)
	b.protocol = at("sk_buff", "protocol", 2)
	b.arrived = at("sk_buff", "skb_iif", 4)
	b.from, b.size = piece(map[*int]int{&b.head: 8, &b.network: 2, &b.protocol: 2, &b.arrived: 4})
	b.device = at("sk_buff", "dev", 8)

	k.device = at("net_device", "nd_net.net", 8)
	k.inode = at("net", "ns.inum", 4)
	k.loop = at("net", "loopback_dev", 8)
	if err := errors.Join(errs...); err != nil {
		return nil, fmt.Errorf("structures of this kernel: %w", err)
	}
	return k, k.loadEvents(spec)
}

// loadEvents finds the arguments of the tracepoints, and the names of reasons.
func (k *kernelLayout) loadEvents(spec *btf.Spec) error {
	for _, event := range tracedEvents {
		proto, err := tracepointPrototype(spec, event)
		if err != nil {
			return err
		}
		layout, reasons := arguments(proto)
		lacks := func(argument int, name string) error {
			if argument >= 0 {
				return nil
			}
			return fmt.Errorf("tracepoint %s of this kernel has no %s", event, name)
		}
		switch event {
		case eventDrop:
			err = lacks(layout.skb, "sk_buff")
		case eventSendReset:
			err = errors.Join(lacks(layout.skb, "sk_buff"), lacks(layout.sock, "sock"))
		case eventRetransmitSynAck:
			err = lacks(layout.request, "request_sock")
		case eventState:
			err = errors.Join(lacks(layout.sock, "sock"), lacks(layout.number, "state"))
		default:
			err = lacks(layout.sock, "sock")
		}
		if err != nil {
			return err
		}
		k.events[event] = layout
		if reasons != nil {
			k.reasons[event] = reasonNames(reasons)
		}
	}
	return nil
}

// warnings are what is not seen, or not told, on this kernel.
func (k *kernelLayout) warnings() []string {
	var all []string
	if k.events[eventSendReset].reason < 0 {
		all = append(all, "tcp_send_reset has no reason on this kernel: reasons are empty, and resets without a socket may not be traced at all")
	}
	if k.events[eventDrop].reason < 0 {
		all = append(all, "kfree_skb has no reason on this kernel: reasons are empty, and packets freed in good order are counted as well")
	}
	if k.events[eventDrop].sock < 0 {
		all = append(all, "kfree_skb has no rx_sk on this kernel: packets that were dropped after they had found their socket are not counted")
	}
	return all
}

// tracepointPrototype is the function that a tracepoint calls its programs by,
// which has one argument of the tracepoint's own before those of the program.
func tracepointPrototype(spec *btf.Spec, event string) (*btf.FuncProto, error) {
	var def *btf.Typedef
	if err := spec.TypeByName("btf_trace_"+event, &def); err != nil {
		return nil, fmt.Errorf("tracepoint %s: %w", event, err)
	}
	pointer, ok := def.Type.(*btf.Pointer)
	if ok {
		if proto, ok := pointer.Target.(*btf.FuncProto); ok && len(proto.Params) > 0 {
			return proto, nil
		}
	}
	return nil, fmt.Errorf("tracepoint %s: its type is %v", event, def.Type)
}

// arguments finds the arguments by their types, since places change between
// kernels and names are not in the BTF.
func arguments(proto *btf.FuncProto) (layout eventLayout, reasons *btf.Enum) {
	layout = eventLayout{sock: -1, skb: -1, request: -1, reason: -1, number: -1}
	for i, param := range proto.Params[1:] {
		switch t := btf.UnderlyingType(param.Type).(type) {
		case *btf.Pointer:
			target, ok := btf.UnderlyingType(t.Target).(*btf.Struct)
			if !ok {
				continue
			}
			switch target.Name {
			case "sock":
				layout.sock = i
			case "sk_buff":
				layout.skb = i
			case "request_sock":
				layout.request = i
			}
		case *btf.Enum:
			if t.Name == "sk_rst_reason" || t.Name == "skb_drop_reason" {
				layout.reason, reasons = i, t
			}
		case *btf.Int:
			if layout.number < 0 {
				layout.number = i
			}
		}
	}
	return layout, reasons
}

// reasonNames are the names of an enum of reasons without their prefix.
func reasonNames(enum *btf.Enum) map[uint32]string {
	names := map[uint32]string{}
	for _, v := range enum.Values {
		name := v.Name
		for _, prefix := range []string{"SK_RST_REASON_", "SKB_DROP_REASON_"} {
			name = strings.TrimPrefix(name, prefix)
		}
		names[uint32(v.Value)] = name
	}
	return names
}

// fieldOffset is how many bytes into a structure the field stands that the path
// leads to, through structures in it: "ns.inum". A size other than 0 is what the
// field must have.
func fieldOffset(spec *btf.Spec, structure, path string, size int) (int, error) {
	var s *btf.Struct
	if err := spec.TypeByName(structure, &s); err != nil {
		return 0, fmt.Errorf("struct %s: %w", structure, err)
	}
	var t btf.Type = s
	offset := 0
	for part := range strings.SplitSeq(path, ".") {
		member, at, ok := findMember(t, part)
		if !ok {
			return 0, fmt.Errorf("struct %s has no %s", structure, path)
		}
		t = member.Type
		offset += at
	}
	if got, err := btf.Sizeof(t); size != 0 && (err != nil || got != size) {
		return 0, fmt.Errorf("%s of struct %s has %d bytes, not %d: %w", path, structure, got, size, err)
	}
	return offset, nil
}

// findMember looks into members without a name as well, as C does. A bitfield has
// no offset and is not found.
func findMember(t btf.Type, name string) (found btf.Member, offset int, ok bool) {
	var members []btf.Member
	switch t := btf.UnderlyingType(t).(type) {
	case *btf.Struct:
		members = t.Members
	case *btf.Union:
		members = t.Members
	}
	for _, m := range members {
		if m.BitfieldSize != 0 {
			continue
		}
		if m.Name == name {
			return m, int(m.Offset.Bytes()), true
		}
		if m.Name == "" {
			if found, inner, ok := findMember(m.Type, name); ok {
				return found, int(m.Offset.Bytes()) + inner, true
			}
		}
	}
	return btf.Member{}, 0, false
}
