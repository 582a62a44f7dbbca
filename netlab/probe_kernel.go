package netlab

import (
	"encoding/binary"
	"errors"
	"fmt"
	"os"
	"unsafe"

	"github.com/vishvananda/netlink/nl"
	"golang.org/x/sys/unix"
)

// addNftTable makes an nftables table in the calling thread's namespace by one
// batch of three netlink messages (net/netfilter/nfnetlink.c nfnetlink_rcv_batch),
// the second of which is acknowledged.
func addNftTable() error {
	message := func(kind, flags int, family uint8, subsystem uint16) *nl.NetlinkRequest {
		r := nl.NewNetlinkRequest(kind, flags)
		r.AddData(&nl.Nfgenmsg{NfgenFamily: family, Version: unix.NFNETLINK_V0, ResId: nl.Swap16(subsystem)})
		return r
	}
	begin := message(unix.NFNL_MSG_BATCH_BEGIN, 0, unix.AF_UNSPEC, unix.NFNL_SUBSYS_NFTABLES)
	table := message(unix.NFNL_SUBSYS_NFTABLES<<8|unix.NFT_MSG_NEWTABLE, unix.NLM_F_CREATE|unix.NLM_F_ACK, unix.NFPROTO_IPV4, 0)
	table.AddData(nl.NewRtAttr(unix.NFTA_TABLE_NAME, nl.ZeroTerminated("probe")))
	end := message(unix.NFNL_MSG_BATCH_END, 0, unix.AF_UNSPEC, unix.NFNL_SUBSYS_NFTABLES)

	fd, err := unix.Socket(unix.AF_NETLINK, unix.SOCK_RAW|unix.SOCK_CLOEXEC, unix.NETLINK_NETFILTER)
	if err != nil {
		return nftError("socket", err)
	}
	defer unix.Close(fd)
	if err := unix.SetsockoptTimeval(fd, unix.SOL_SOCKET, unix.SO_RCVTIMEO, &unix.Timeval{Sec: 5}); err != nil {
		return os.NewSyscallError("setsockopt", err)
	}
	var batch []byte
	for _, r := range []*nl.NetlinkRequest{begin, table, end} {
		batch = append(batch, r.Serialize()...)
	}
	if err := unix.Sendto(fd, batch, 0, &unix.SockaddrNetlink{Family: unix.AF_NETLINK}); err != nil {
		return nftError("send", err)
	}
	buf := make([]byte, 4096)
	n, _, err := unix.Recvfrom(fd, buf, 0)
	for errors.Is(err, unix.EINTR) {
		n, _, err = unix.Recvfrom(fd, buf, 0)
	}
	if err != nil {
		return nftError("receive", err)
	}
	if n < unix.SizeofNlMsghdr+4 {
		return fmt.Errorf("nftables: an answer of %d bytes", n)
	}
	if errno := int32(binary.NativeEndian.Uint32(buf[unix.SizeofNlMsghdr:])); errno != 0 {
		return nftError("new table", unix.Errno(-errno))
	}
	return nil
}

// nftError tells a kernel without nfnetlink (no such protocol) or without
// nf_tables (no such subsystem) from other failures.
func nftError(doing string, err error) error {
	err = fmt.Errorf("nftables: %s: %w", doing, err)
	if errors.Is(err, unix.EPROTONOSUPPORT) || errors.Is(err, unix.EINVAL) {
		return &NeedError{Need: NeedNftables, Err: fmt.Errorf("%w: %w", ErrUnsupported, err)}
	}
	return needOr(NeedNftables, err)
}

// attachRawTracepoint attaches a program that does nothing to the tracepoint and
// detaches it. The error is ENOENT where the kernel has no such tracepoint
// (kernel/bpf/syscall.c, bpf_raw_tp_link_attach).
func attachRawTracepoint(name string) error {
	prog, err := loadEmptyProgram()
	if err != nil {
		return fmt.Errorf("loading a raw tracepoint program: %w", err)
	}
	defer unix.Close(prog)
	cname, err := unix.BytePtrFromString(name)
	if err != nil {
		return err
	}
	attr := struct {
		name unsafe.Pointer
		prog uint32
		_    uint32
	}{name: unsafe.Pointer(cname), prog: uint32(prog)}
	link, err := bpf(unix.BPF_RAW_TRACEPOINT_OPEN, unsafe.Pointer(&attr), unsafe.Sizeof(attr))
	if err != nil {
		return fmt.Errorf("attaching to %s: %w", name, err)
	}
	return unix.Close(link)
}

// loadEmptyProgram loads "r0 = 0; exit".
func loadEmptyProgram() (fd int, err error) {
	type instruction struct {
		code uint8
		_    [7]byte // registers, offset, immediate: all zero here
	}
	const mov64, exit = 0xb7, 0x95 // BPF_ALU64|BPF_MOV|BPF_K, BPF_JMP|BPF_EXIT
	program := [2]instruction{{code: mov64}, {code: exit}}
	license := [4]byte{'G', 'P', 'L'}
	// The first members of union bpf_attr for BPF_PROG_LOAD (include/uapi/linux/bpf.h).
	attr := struct {
		kind, count           uint32
		instructions, license unsafe.Pointer
		logLevel, logSize     uint32
		logBuf                unsafe.Pointer
	}{
		kind:         unix.BPF_PROG_TYPE_RAW_TRACEPOINT,
		count:        uint32(len(program)),
		instructions: unsafe.Pointer(&program),
		license:      unsafe.Pointer(&license),
	}
	return bpf(unix.BPF_PROG_LOAD, unsafe.Pointer(&attr), unsafe.Sizeof(attr))
}

// bpf is the system call. The pointers in attr are __aligned_u64 to the kernel:
// right as they are where a pointer has 64 bits, refused elsewhere.
func bpf(command int, attr unsafe.Pointer, size uintptr) (fd int, err error) {
	if unsafe.Sizeof(attr) != 8 {
		return -1, fmt.Errorf("bpf with 32-bit pointers: %w", ErrUnsupported)
	}
	n, _, errno := unix.Syscall(unix.SYS_BPF, uintptr(command), uintptr(attr), size)
	switch errno {
	case 0:
		return int(n), nil
	case unix.ENOSYS:
		return -1, fmt.Errorf("%w: %w", ErrUnsupported, errno)
	}
	return -1, errno
}
