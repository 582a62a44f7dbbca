// Package observe reads what the kernel knows about the hosts of a lab: every
// counter of a namespace, the accept queue of a listener, the states of its
// sockets. A run has one [Timeline], filled by an [Observer] between [Start]
// and [Observer.Stop]. A [Capture] writes the packets at interfaces of hosts
// into one file that Wireshark opens. A [Trace] counts, inside the kernel, who
// sends a reset and why, what is dropped or sent again, and for how long sockets
// stay in a state.
//
// What it rests on:
//
//   - /proc/thread-self/net/{netstat,snmp,sockstat}, opened inside the namespace
//     once and read again at offset 0 from any thread: a seq_file of /proc/net
//     keeps the namespace it was opened in (fs/proc/proc_net.c
//     single_open_net). /proc/self/net would be the main thread's namespace.
//   - NETLINK_SOCK_DIAG with inet_diag_req_v2 (include/uapi/linux/inet_diag.h),
//     on a socket that was made inside the namespace and sees that one only.
//     For a listener the receive queue is the accept queue's length and the
//     send queue its limit (net/ipv4/tcp_diag.c tcp_diag_get_info).
//   - AF_PACKET sockets (packet(7)), made inside the namespace, with a classic
//     BPF filter and the kernel's timestamps; the pcapng format
//     (draft-ietf-opsawg-pcapng) by gopacket's pcapgo.
//   - Tracepoints (include/trace/events/{tcp,sock,skb}.h) with BPF programs of type
//     BPF_PROG_TYPE_RAW_TRACEPOINT, which are assembled here: no compiler is needed.
//     Where a structure has its fields, which arguments a tracepoint has and what
//     its reasons are called is read from the running kernel's BTF
//     (CONFIG_DEBUG_INFO_BTF, /sys/kernel/btf/vmlinux); names of functions come from
//     /proc/kallsyms. It takes CAP_SYS_ADMIN (bpf(2)) and Linux 5.6 or later, for
//     bpf_probe_read_kernel and a sk_protocol that is no bitfield.
//   - Counters count from 0 in a new namespace, and count attempts: a SYN that
//     is dropped three times is three drops of one connection.
//
// What it refuses to do: invent a value (an unknown metric is an error, never
// 0), hide a late sample (it is counted as missed), a packet that a capture lost
// (it is counted as dropped) or an event that a trace lost (likewise), guess an
// argument that a kernel's tracepoint does not have (the report warns), or mix
// what belongs to the machine into what belongs to a namespace. Four figures of
// sockstat are the whole machine's and are left out; see [Counters]. Tracepoints
// are the whole machine's as well: a trace looks at the namespace of every event
// and leaves those of others alone. It shows TCP over IPv4 only.
//
// An Observer and a Capture keep files and sockets open in the namespaces they
// look at, and an open file keeps its namespace alive: stop them before the lab
// goes down.
package observe
