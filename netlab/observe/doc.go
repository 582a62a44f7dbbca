// Package observe reads what the kernel knows about the hosts of a lab: every
// counter of a namespace, the accept queue of a listener, the states of its
// sockets. A run has one [Timeline], filled by an [Observer] between [Start]
// and [Observer.Stop]. A [Capture] writes the packets at interfaces of hosts
// into one file that Wireshark opens.
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
//   - Counters count from 0 in a new namespace, and count attempts: a SYN that
//     is dropped three times is three drops of one connection.
//
// What it refuses to do: invent a value (an unknown metric is an error, never
// 0), hide a late sample (it is counted as missed) or a packet that a capture
// lost (it is counted as dropped), or mix what belongs to the machine into what
// belongs to a namespace. Four figures of sockstat are the whole machine's and
// are left out; see [Counters].
//
// An Observer and a Capture keep files and sockets open in the namespaces they
// look at, and an open file keeps its namespace alive: stop them before the lab
// goes down.
package observe
