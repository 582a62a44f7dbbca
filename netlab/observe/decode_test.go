package observe

import (
	"encoding/binary"
	"net/netip"
	"testing"

	"github.com/google/go-cmp/cmp"
	"github.com/stretchr/testify/assert"
	"github.com/stretchr/testify/require"
	"golang.org/x/sys/unix"
)

func TestDecodeRecordedDump(t *testing.T) {
	sockets, end, err := decodeDatagram(recordedDump(t), recordedSeq, nil)
	require.NoError(t, err)
	assert.Equal(t, dumpEnd{done: true}, end)
	assert.Empty(t, cmp.Diff(map[State]int{Listen: 3, Established: 5, SynRecv: 2, TimeWait: 3}, CountStates(sockets)))

	byLocal := map[State]map[uint16]Socket{}
	for _, s := range sockets {
		if byLocal[s.State] == nil {
			byLocal[s.State] = map[uint16]Socket{}
		}
		byLocal[s.State][s.Local.Port()] = s
		assert.Equal(t, netip.MustParseAddr("10.66.0.2"), s.Local.Addr())
	}
	full := byLocal[Listen][6379]
	assert.EqualValues(t, 5, full.RQueue, "a backlog of 4 holds 5")
	assert.EqualValues(t, 4, full.WQueue)
	assert.EqualValues(t, 15, full.Drops)
	assert.NotZero(t, full.Inode)
	assert.Equal(t, netip.MustParseAddrPort("0.0.0.0:0"), full.Remote)

	queued := byLocal[Established][6379]
	assert.Zero(t, queued.Inode, "nobody has accepted it")
	assert.Equal(t, netip.MustParseAddr("10.66.0.1"), queued.Remote.Addr())

	assert.EqualValues(t, 1, byLocal[SynRecv][6380].Timer, "the SYN-ACK's")
	tw := byLocal[TimeWait][6381]
	assert.EqualValues(t, timerTimeWait, tw.Timer)
	assert.Greater(t, tw.Expires.Seconds(), 55.0)
	assert.LessOrEqual(t, tw.Expires.Seconds(), 60.0)
}

// message makes a netlink message for the tables below.
func message(kind, flags uint16, seq uint32, body []byte) []byte {
	b := binary.NativeEndian.AppendUint32(nil, uint32(unix.SizeofNlMsghdr+len(body)))
	b = binary.NativeEndian.AppendUint16(b, kind)
	b = binary.NativeEndian.AppendUint16(b, flags)
	b = binary.NativeEndian.AppendUint32(b, seq)
	b = binary.NativeEndian.AppendUint32(b, 0)
	return append(b, body...)
}

func errno(e unix.Errno) []byte {
	return binary.NativeEndian.AppendUint32(nil, uint32(-int32(e)))
}

// diagMessage is struct inet_diag_msg of an IPv6 socket that serves IPv4.
func diagMessage(attributes ...byte) []byte {
	b := make([]byte, sizeofDiagMsg)
	b[0], b[1] = unix.AF_INET6, byte(Established)
	binary.BigEndian.PutUint16(b[4:], 80)
	binary.BigEndian.PutUint16(b[6:], 40000)
	local, remote := netip.MustParseAddr("::ffff:10.0.0.1").As16(), netip.MustParseAddr("2001:db8::1").As16()
	copy(b[8:], local[:])
	copy(b[24:], remote[:])
	return append(b, attributes...)
}

func TestDecodeDatagram(t *testing.T) {
	const seq = 7
	socket := Socket{
		Local:  netip.MustParseAddrPort("10.0.0.1:80"),
		Remote: netip.MustParseAddrPort("[2001:db8::1]:40000"),
		State:  Established,
	}
	badState := diagMessage()
	badState[1] = 200
	badFamily := diagMessage()
	badFamily[0] = unix.AF_UNIX
	oversized := message(unix.NLMSG_DONE, 0, seq, nil)
	binary.NativeEndian.PutUint32(oversized, 1<<31)

	for _, tc := range []struct {
		name string
		in   []byte
		want []Socket
		end  dumpEnd
		err  string
	}{
		{name: "empty"},
		{name: "mapped address", in: message(unix.SOCK_DIAG_BY_FAMILY, 0, seq, diagMessage()), want: []Socket{socket}},
		{name: "answer to an earlier request", in: message(unix.SOCK_DIAG_BY_FAMILY, 0, seq-1, diagMessage())},
		{name: "done", in: message(unix.NLMSG_DONE, unix.NLM_F_MULTI, seq, errno(0)), end: dumpEnd{done: true}},
		{name: "done without errno", in: message(unix.NLMSG_DONE, 0, seq, nil), end: dumpEnd{done: true}},
		{name: "done with an error", in: message(unix.NLMSG_DONE, 0, seq, errno(unix.EINTR)), err: "interrupted system call"},
		{name: "error", in: message(unix.NLMSG_ERROR, 0, seq, errno(unix.ENOENT)), err: "no such file"},
		{name: "inconsistent dump", in: message(unix.NLMSG_DONE, unix.NLM_F_DUMP_INTR, seq, errno(0)), end: dumpEnd{done: true, interrupted: true}},
		{name: "unknown type", in: message(99, 0, seq, nil), err: "type 99"},
		{name: "half a header", in: make([]byte, 9), err: "too few for a header"},
		{name: "length below a header", in: make([]byte, 16), err: "a message of 0 bytes"},
		{name: "length beyond the datagram", in: oversized, err: "a message of 2147483648 bytes"},
		{name: "half a socket", in: message(unix.SOCK_DIAG_BY_FAMILY, 0, seq, diagMessage()[:71]), err: "71 bytes"},
		{name: "unknown state", in: message(unix.SOCK_DIAG_BY_FAMILY, 0, seq, badState), err: "state(200)"},
		{name: "unknown family", in: message(unix.SOCK_DIAG_BY_FAMILY, 0, seq, badFamily), err: "address family 1"},
		{name: "half an attribute", in: message(unix.SOCK_DIAG_BY_FAMILY, 0, seq, diagMessage(4, 0)), err: "cut off"},
		{name: "attribute too long", in: message(unix.SOCK_DIAG_BY_FAMILY, 0, seq, diagMessage(9, 0, 7, 0)), err: "an attribute of 9 bytes"},
		{name: "attribute too short", in: message(unix.SOCK_DIAG_BY_FAMILY, 0, seq, diagMessage(3, 0, 7, 0)), err: "an attribute of 3 bytes"},
		{name: "memory figures without drops", in: message(unix.SOCK_DIAG_BY_FAMILY, 0, seq, diagMessage(4, 0, 7, 0)), want: []Socket{socket}},
	} {
		t.Run(tc.name, func(t *testing.T) {
			got, end, err := decodeDatagram(tc.in, seq, nil)
			if tc.err != "" {
				require.ErrorContains(t, err, tc.err)
				return
			}
			require.NoError(t, err)
			assert.Equal(t, tc.end, end)
			assert.Empty(t, cmp.Diff(tc.want, got, cmp.Comparer(func(a, b netip.AddrPort) bool { return a == b })))
		})
	}
}

func TestStateNames(t *testing.T) {
	for s := Established; s <= Closing; s++ {
		assert.NotContains(t, s.String(), "state(", "state %d", s)
		assert.NotZero(t, AllStates&SetOf(s), s)
	}
	assert.Equal(t, "state(12)", (Closing + 1).String())
	assert.Zero(t, AllStates&SetOf(None, Closing+1))
}

// The decoder stays inside its bytes, and finds no more sockets than they hold.
func FuzzDecode(f *testing.F) {
	f.Add(recordedDump(f), uint32(recordedSeq))
	f.Add(message(unix.SOCK_DIAG_BY_FAMILY, 0, 1, diagMessage(4, 0, 7, 0)), uint32(1))
	f.Add(message(unix.NLMSG_DONE, 0, 1, errno(0)), uint32(1))
	f.Add(message(unix.NLMSG_ERROR, 0, 1, errno(unix.EPERM)), uint32(1))
	f.Fuzz(func(t *testing.T, b []byte, seq uint32) {
		sockets, end, err := decodeDatagram(b, seq, nil)
		if most := len(b) / (unix.SizeofNlMsghdr + sizeofDiagMsg); len(sockets) > most {
			t.Fatalf("%d sockets in %d bytes", len(sockets), len(b))
		}
		if err != nil && end.done {
			t.Fatal("an error and an end")
		}
		for _, s := range sockets {
			if !s.Local.IsValid() || !s.Remote.IsValid() || s.State < Established || s.State > Closing {
				t.Fatalf("%+v", s)
			}
		}
	})
}
