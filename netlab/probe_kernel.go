package netlab

import (
	"errors"
	"fmt"
	"time"
	"unsafe"

	"github.com/google/nftables"
	"github.com/google/nftables/expr"
	mdnetlink "github.com/mdlayher/netlink"
	"golang.org/x/sys/unix"
)

// addNATRule makes an nftables table in the calling thread's namespace with a nat
// chain and one rule that translates a destination.
func addNATRule() error {
	// A kernel without nf_tables answers a batch once, and the client waits for
	// one answer a message (net/netfilter/nfnetlink.c, nfnetlink_rcv_batch).
	bounded := func(c *mdnetlink.Conn) error { return c.SetReadDeadline(time.Now().Add(5 * time.Second)) }
	conn, err := nftables.New(nftables.WithSockOptions(bounded))
	if err != nil {
		return nftError("socket", err)
	}
	table := conn.AddTable(&nftables.Table{Family: nftables.TableFamilyIPv4, Name: "probe"})
	chain := conn.AddChain(&nftables.Chain{
		Name: "prerouting", Table: table, Type: nftables.ChainTypeNAT,
		Hooknum: nftables.ChainHookPrerouting, Priority: nftables.ChainPriorityNATDest,
	})
	conn.AddRule(&nftables.Rule{Table: table, Chain: chain, Exprs: []expr.Any{
		&expr.Immediate{Register: 1, Data: []byte{127, 0, 0, 1}},
		&expr.NAT{Type: expr.NATTypeDestNAT, Family: unix.NFPROTO_IPV4, RegAddrMin: 1},
	}})
	if err := conn.Flush(); err != nil {
		return nftError("nat chain", err)
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
	// The verifier gives up with EAGAIN when a signal comes, and Go's runtime sends
	// its threads signals (kernel/bpf/verifier.c, do_check).
	for retries := 0; errno == unix.EAGAIN && retries < 1000; retries++ {
		n, _, errno = unix.Syscall(unix.SYS_BPF, uintptr(command), uintptr(attr), size)
	}
	switch errno {
	case 0:
		return int(n), nil
	case unix.ENOSYS:
		return -1, fmt.Errorf("%w: %w", ErrUnsupported, errno)
	}
	return -1, errno
}
