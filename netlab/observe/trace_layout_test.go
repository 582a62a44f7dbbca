package observe

import (
	"strings"
	"testing"

	"github.com/cilium/ebpf/btf"
	"github.com/google/go-cmp/cmp"
	"github.com/stretchr/testify/assert"
)

// TestArguments has the prototypes of tracepoints as they were and are.
func TestArguments(t *testing.T) {
	tracepoint := &btf.Pointer{Target: (*btf.Void)(nil)}
	sock := &btf.Pointer{Target: &btf.Const{Type: &btf.Struct{Name: "sock"}}}
	skb := &btf.Pointer{Target: &btf.Const{Type: &btf.Struct{Name: "sk_buff"}}}
	location := &btf.Pointer{Target: (*btf.Void)(nil)}
	reset := &btf.Enum{Name: "sk_rst_reason"}
	dropped := &btf.Enum{Name: "skb_drop_reason"}
	number := &btf.Const{Type: &btf.Int{Name: "int", Size: 4}}
	for _, row := range []struct {
		why  string
		args []btf.Type
		want eventLayout
	}{
		{"tcp_send_reset before 6.10", []btf.Type{sock, skb}, eventLayout{0, 1, -1, -1, -1}},
		{"tcp_send_reset since", []btf.Type{sock, skb, &btf.Const{Type: reset}}, eventLayout{0, 1, -1, 2, -1}},
		{"kfree_skb before 5.17", []btf.Type{skb, location}, eventLayout{-1, 0, -1, -1, -1}},
		{"kfree_skb before 6.11", []btf.Type{skb, location, dropped}, eventLayout{-1, 0, -1, 2, -1}},
		{"kfree_skb since", []btf.Type{skb, location, dropped, sock}, eventLayout{3, 0, -1, 2, -1}},
		{"tcp_retransmit_skb with an error", []btf.Type{sock, skb, number}, eventLayout{0, 1, -1, -1, 2}},
		{"inet_sock_set_state: the first of two", []btf.Type{sock, number, number}, eventLayout{0, -1, -1, -1, 1}},
		{"tcp_retransmit_synack", []btf.Type{sock, &btf.Pointer{Target: &btf.Struct{Name: "request_sock"}}}, eventLayout{0, -1, 1, -1, -1}},
		{"an enum that is no reason", []btf.Type{&btf.Enum{Name: "tcp_state"}}, eventLayout{-1, -1, -1, -1, -1}},
	} {
		proto := &btf.FuncProto{Params: []btf.FuncParam{{Type: tracepoint}}}
		for _, arg := range row.args {
			proto.Params = append(proto.Params, btf.FuncParam{Type: arg})
		}
		got, _ := arguments(proto)
		assert.Equal(t, row.want, got, row.why)
	}
}

func TestFindMember(t *testing.T) {
	word := &btf.Int{Name: "u32", Size: 4}
	inner := &btf.Union{Members: []btf.Member{
		{Name: "skc_addrpair", Type: word},
		{Type: &btf.Struct{Members: []btf.Member{{Name: "skc_daddr", Type: word}, {Name: "skc_rcv_saddr", Type: word, Offset: 32}}}},
	}}
	s := &btf.Struct{Members: []btf.Member{
		{Name: "first", Type: word},
		{Type: inner, Offset: 64},
		{Name: "bits", Type: word, Offset: 96, BitfieldSize: 3},
	}}
	for _, row := range []struct {
		name string
		want int // -1 for none
	}{{"first", 0}, {"skc_daddr", 8}, {"skc_rcv_saddr", 12}, {"bits", -1}, {"last", -1}} {
		_, offset, ok := findMember(s, row.name)
		assert.Equal(t, row.want >= 0, ok, row.name)
		if ok {
			assert.Equal(t, row.want, offset, row.name)
		}
	}
}

// TestOldKernel says what an old kernel does not show, and gives no reasons then.
func TestOldKernel(t *testing.T) {
	k := &kernelLayout{
		events:  map[string]eventLayout{eventSendReset: {0, 1, -1, -1, -1}, eventDrop: {-1, 0, -1, -1, -1}},
		reasons: map[string]map[uint32]string{},
	}
	assert.Len(t, k.warnings(), 3)
	assert.Empty(t, k.reason(eventSendReset, 7))

	k.events[eventSendReset] = eventLayout{0, 1, -1, 2, -1}
	k.events[eventDrop] = eventLayout{3, 0, -1, 2, -1}
	k.reasons[eventSendReset] = reasonNames(&btf.Enum{Values: []btf.EnumValue{{Name: "SK_RST_REASON_NO_SOCKET", Value: 1}}})
	assert.Empty(t, k.warnings())
	assert.Equal(t, "NO_SOCKET", k.reason(eventSendReset, 1))
	assert.Equal(t, "reason 70001", k.reason(eventSendReset, 70001), "a module's")
	assert.Empty(t, k.reason(eventReceiveReset, 0))
	assert.Empty(t, k.reason(eventRetransmit, 0))
	failed := int32(-105)
	assert.Equal(t, "ENOBUFS", k.reason(eventRetransmit, uint32(failed)))
}

func TestFunctions(t *testing.T) {
	symbols := map[uint64]string{
		9: "bpf_prog_6deef7357e7b4530_connlab_trace", 19: "bpf_trace_run3", 29: "__traceiter_tcp_send_reset",
		39: "tcp_v4_send_reset.isra.0", 49: "tcp_v4_rcv", 59: "bpf_dispatcher",
	}
	assert.Equal(t, []string{"tcp_v4_send_reset", "tcp_v4_rcv", "bpf_dispatcher"}, functions([stackFrames]uint64{10, 20, 30, 40, 50, 60}, symbols))
	assert.Nil(t, functions([stackFrames]uint64{}, symbols), "no stack")
	assert.Nil(t, functions([stackFrames]uint64{10, 99}, symbols), "no names")
}

// TestMerged has two keys that differ by an address within one function.
func TestMerged(t *testing.T) {
	trace := &Trace{hosts: []string{"a", "b"}, layout: &kernelLayout{reasons: map[string]map[uint32]string{eventSendReset: {1: "NO_SOCKET"}}}}
	key := countKey{Local: [4]byte{10, 0, 0, 1}, Remote: [4]byte{10, 0, 0, 2}, Reason: 1, Stack: [stackFrames]uint64{40}}
	elsewhere, other := key, key
	elsewhere.Stack[0] = 41
	other.Host = 1
	request := countKey{Host: 1, Event: 3, State: 12}
	got := trace.merged(map[countKey]uint64{key: 1, elsewhere: 2, other: 4, request: 8}, map[uint64]string{39: "f", 40: "f"})
	var lines []string
	for _, c := range got {
		lines = append(lines, strings.Join([]string{c.Event, c.Host, c.Reason, c.State.String(), strings.Join(c.Stack, " ")}, ","))
	}
	assert.Empty(t, cmp.Diff([]string{
		"tcp_send_reset,a,NO_SOCKET,none,f",
		"tcp_retransmit_synack,b,,SYN_RECV,",
		"tcp_send_reset,b,NO_SOCKET,none,f",
	}, lines))
	assert.Equal(t, []int64{3, 8, 4}, []int64{got[0].Count, got[1].Count, got[2].Count})
}
