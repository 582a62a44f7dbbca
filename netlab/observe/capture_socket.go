package observe

import (
	"bytes"
	"encoding/binary"
	"errors"
	"fmt"
	"net"
	"os"
	"time"

	"golang.org/x/net/bpf"
	"golang.org/x/sys/unix"

	"connlab/netlab"
)

// maxFrame is the longest frame that is captured whole, and what libpcap allows
// (MAXIMUM_SNAPLEN). The kernel merges segments of one connection into frames
// of up to 64 KB by default.
const maxFrame = 262_144

// captureBuffer is what the kernel may keep for a capture that does not read, in
// bytes; it counts twice that much and some 700 bytes for the smallest packet
// (net/core/sock.c, sock_setsockopt and skb->truesize), so this is room for
// about 170,000 of them. It takes memory only as it fills.
const captureBuffer = 64 << 20

// packetSocket is an AF_PACKET socket that reads the frames of an interface.
//
// pcapgo's EthernetHandle would do nearly all of this, but it receives from
// every interface until it is bound, cannot tell in from out, and has no way to
// enlarge the socket's buffer.
type packetSocket struct {
	fd   int
	name string // of the point, for errors
	buf  []byte // of one frame
	oob  []byte // of its timestamp
}

// openPacketSocket returns a socket that receives from now on. The filter runs
// in the kernel: packets that nobody asked for then take no room in the buffer
// and no time of the reader.
func openPacketSocket(p CapturePoint, port uint16, snapLen int) (*packetSocket, error) {
	s := &packetSocket{fd: -1, name: p.String(), buf: make([]byte, snapLen), oob: make([]byte, 64)}
	return s.open(p.Host, func() error {
		if err := unix.SetsockoptInt(s.fd, unix.SOL_SOCKET, unix.SO_RCVBUFFORCE, captureBuffer); err != nil {
			return os.NewSyscallError("setsockopt SO_RCVBUFFORCE", err)
		}
		if err := unix.SetsockoptInt(s.fd, unix.SOL_SOCKET, unix.SO_TIMESTAMPNS, 1); err != nil {
			return os.NewSyscallError("setsockopt SO_TIMESTAMPNS", err)
		}
		if port != 0 {
			if err := s.attach(portFilter(port)); err != nil {
				return err
			}
		}
		return s.bind(p.Interface, unix.ETH_P_ALL)
	})
}

// open makes the socket inside the host's namespace and sets it up there. With
// protocol 0 it receives nothing before it is bound.
func (s *packetSocket) open(h *netlab.Host, setUp func() error) (*packetSocket, error) {
	err := h.Do(func() (err error) {
		s.fd, err = unix.Socket(unix.AF_PACKET, unix.SOCK_RAW|unix.SOCK_NONBLOCK|unix.SOCK_CLOEXEC, 0)
		if err != nil {
			return os.NewSyscallError("socket AF_PACKET", err)
		}
		return setUp()
	})
	if err != nil {
		if s.fd >= 0 {
			err = errors.Join(err, s.close())
		}
		return nil, err
	}
	return s, nil
}

// bind begins to receive. It must run in the host's namespace.
func (s *packetSocket) bind(name string, protocol uint16) error {
	iface, err := net.InterfaceByName(name)
	if err != nil {
		return fmt.Errorf("interface %s: %w", name, err)
	}
	if err := unix.Bind(s.fd, &unix.SockaddrLinklayer{Protocol: networkOrder(protocol), Ifindex: iface.Index}); err != nil {
		return os.NewSyscallError("bind", err)
	}
	return nil
}

// networkOrder is htons.
func networkOrder(x uint16) uint16 {
	return binary.NativeEndian.Uint16(binary.BigEndian.AppendUint16(nil, x))
}

// read takes the next packet, or says that there is none.
func (s *packetSocket) read() (p packet, ok bool, err error) {
	// MSG_TRUNC returns the length of the packet also where the buffer is shorter.
	n, oobn, _, from, err := unix.Recvmsg(s.fd, s.buf, s.oob, unix.MSG_TRUNC)
	for errors.Is(err, unix.EINTR) {
		n, oobn, _, from, err = unix.Recvmsg(s.fd, s.buf, s.oob, unix.MSG_TRUNC)
	}
	if errors.Is(err, unix.EAGAIN) {
		return packet{}, false, nil
	}
	if err != nil {
		return packet{}, false, fmt.Errorf("%s: %w", s.name, os.NewSyscallError("recvmsg", err))
	}
	p = packet{length: n, data: bytes.Clone(s.buf[:min(n, len(s.buf))])}
	if link, isLink := from.(*unix.SockaddrLinklayer); isLink {
		p.outbound = link.Pkttype == unix.PACKET_OUTGOING
	}
	if p.at, err = stamp(s.oob[:oobn]); err != nil {
		return packet{}, false, fmt.Errorf("%s: %w", s.name, err)
	}
	return p, true, nil
}

// stamp finds the kernel's time of a packet in its control messages
// (SO_TIMESTAMPNS or SO_TIMESTAMPING,
// Documentation/networking/timestamping.rst). The first field is the same in
// both: the time that the software took.
func stamp(oob []byte) (time.Time, error) {
	messages, err := unix.ParseSocketControlMessage(oob)
	if err != nil {
		return time.Time{}, fmt.Errorf("control message: %w", err)
	}
	for _, m := range messages {
		if m.Header.Level != unix.SOL_SOCKET || m.Header.Type != unix.SO_TIMESTAMPNS && m.Header.Type != unix.SO_TIMESTAMPING {
			continue
		}
		var t unix.Timespec
		if _, err := binary.Decode(m.Data, binary.NativeEndian, &t); err != nil {
			return time.Time{}, fmt.Errorf("timestamp: %w", err)
		}
		return time.Unix(t.Unix()), nil
	}
	return time.Time{}, errNoStamp
}

var errNoStamp = errors.New("the kernel gave a packet no time")

// counts returns how many packets passed the filter, dropped ones included, and
// how many of them were dropped. The kernel starts from 0 again at each call.
func (s *packetSocket) counts() (seen, dropped uint32, err error) {
	stats, err := unix.GetsockoptTpacketStats(s.fd, unix.SOL_PACKET, unix.PACKET_STATISTICS)
	if err != nil {
		return 0, 0, fmt.Errorf("%s: %w", s.name, os.NewSyscallError("getsockopt PACKET_STATISTICS", err))
	}
	return stats.Packets, stats.Drops, nil
}

func (s *packetSocket) close() error {
	if err := unix.Close(s.fd); err != nil {
		return fmt.Errorf("%s: %w", s.name, os.NewSyscallError("close", err))
	}
	return nil
}

// portFilter is "ip and tcp port N" over Ethernet, first fragments only: the
// others carry no ports.
func portFilter(port uint16) []bpf.Instruction {
	const etherIPv4, keep = 0x0800, 0xffffffff
	return []bpf.Instruction{
		bpf.LoadAbsolute{Off: 12, Size: 2},
		bpf.JumpIf{Cond: bpf.JumpNotEqual, Val: etherIPv4, SkipTrue: 10},
		bpf.LoadAbsolute{Off: 14 + 9, Size: 1},
		bpf.JumpIf{Cond: bpf.JumpNotEqual, Val: unix.IPPROTO_TCP, SkipTrue: 8},
		bpf.LoadAbsolute{Off: 14 + 6, Size: 2},
		bpf.JumpIf{Cond: bpf.JumpBitsSet, Val: 0x1fff, SkipTrue: 6},
		bpf.LoadMemShift{Off: 14}, // the length of the IP header
		bpf.LoadIndirect{Off: 14, Size: 2},
		bpf.JumpIf{Cond: bpf.JumpEqual, Val: uint32(port), SkipTrue: 2},
		bpf.LoadIndirect{Off: 14 + 2, Size: 2},
		bpf.JumpIf{Cond: bpf.JumpNotEqual, Val: uint32(port), SkipTrue: 1},
		bpf.RetConstant{Val: keep},
		bpf.RetConstant{Val: 0},
	}
}

func (s *packetSocket) attach(program []bpf.Instruction) error {
	raw, err := bpf.Assemble(program)
	if err != nil {
		return fmt.Errorf("assembling the filter: %w", err)
	}
	filter := make([]unix.SockFilter, len(raw))
	for i, r := range raw {
		filter[i] = unix.SockFilter{Code: r.Op, Jt: r.Jt, Jf: r.Jf, K: r.K}
	}
	err = unix.SetsockoptSockFprog(s.fd, unix.SOL_SOCKET, unix.SO_ATTACH_FILTER,
		&unix.SockFprog{Len: uint16(len(filter)), Filter: &filter[0]})
	if err != nil {
		return os.NewSyscallError("setsockopt SO_ATTACH_FILTER", err)
	}
	return nil
}

// awaitStamps returns once the kernel puts a time on every packet as it passes.
// It goes on with that while any socket wants it; the one returned does until it
// is closed.
//
// The kernel does not begin when the first such socket asks but a little later,
// from a work queue (net/core/dev.c net_enable_timestamp). A packet before that
// is given the time at which it is read, and a SYN could then come after its
// answer. Frames that no protocol takes, sent over the host's loopback, tell
// without a trace in the host's counters other than those of lo.
func awaitStamps(h *netlab.Host) (*packetSocket, error) {
	const within = 2 * time.Second
	s, err := openStampProbe(h)
	if err != nil {
		return nil, err
	}
	for deadline := time.Now().Add(within); ; {
		stamped, err := s.loopFrame()
		if stamped {
			return s, nil
		}
		if err == nil && time.Now().After(deadline) {
			err = fmt.Errorf("%s: %w in %v", s.name, errNoStamp, within)
		}
		if err != nil {
			return nil, errors.Join(err, s.close())
		}
	}
}

// probeProtocol is an EtherType for local experiments (IEEE 802).
const probeProtocol = 0x88b5

// openStampProbe opens a socket on the host's loopback that is told the time of
// a packet only where the kernel took it.
func openStampProbe(h *netlab.Host) (*packetSocket, error) {
	s := &packetSocket{fd: -1, name: h.Name() + " lo", buf: make([]byte, 64), oob: make([]byte, 128)}
	return s.open(h, func() error {
		// Unlike SO_TIMESTAMPNS this makes up no time at the reader.
		const flags = unix.SOF_TIMESTAMPING_RX_SOFTWARE | unix.SOF_TIMESTAMPING_SOFTWARE
		if err := unix.SetsockoptInt(s.fd, unix.SOL_SOCKET, unix.SO_TIMESTAMPING, flags); err != nil {
			return os.NewSyscallError("setsockopt SO_TIMESTAMPING", err)
		}
		return s.bind("lo", probeProtocol)
	})
}

// loopFrame sends a frame around and reports whether it came back with a time.
func (s *packetSocket) loopFrame() (stamped bool, err error) {
	frame := make([]byte, 60)
	binary.BigEndian.PutUint16(frame[12:], probeProtocol)
	if err := unix.Send(s.fd, frame, 0); err != nil {
		return false, fmt.Errorf("%s: %w", s.name, os.NewSyscallError("send", err))
	}
	const wait = 50 // ms
	_, err = unix.Poll([]unix.PollFd{{Fd: int32(s.fd), Events: unix.POLLIN}}, wait)
	if err != nil && !errors.Is(err, unix.EINTR) {
		return false, fmt.Errorf("%s: %w", s.name, os.NewSyscallError("poll", err))
	}
	_, stamped, err = s.read()
	if errors.Is(err, errNoStamp) {
		return false, nil
	}
	return stamped, err
}
