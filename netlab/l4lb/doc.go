// Package l4lb is a layer-4 balancer for a lab, as stages of a [wire.Wire]: it
// rewrites packets and terminates nothing.
//
// The way of a connection through a [Transparent] balancer, as clouds run it in
// front of Redis proxies:
//
//	client ──SYN to the VIP──▶ Balancer ──SYN to a proxy, VIP in an option──▶ Return ──▶ proxy
//	client ◀──────source VIP, past the balancer────────────────────────────── Return ◀── proxy
//
// [Balancer] stands on a device of the switch. It keeps the client's address and
// port, makes a proxy of the VIP's group the destination, and puts the VIP into a
// TCP option of the SYN, which is all that tells the proxy which of its VIPs was
// meant. It has no connection table: the proxy is a hash of the addresses, as in
// LVS's source hashing (net/netfilter/ipvs/ip_vs_sh.c), and replies go past it, as
// in LVS's direct routing. [Return] stands on the link of a proxy's host, where a
// cloud has its kernel module or virtual switch: it remembers the VIP of each SYN
// and makes it the source of the replies.
//
// The option's layout is that of TOA_VIP in the TOA modules of LVS: kind 250,
// length 8, port, IPv4 address, both in network order (toa.h: TCPOPT_TOA_VIP,
// struct toa_vip_data). The same modules use 254 (TOA: the client's port and
// address, behind full NAT), 252 (VTOA: client, network and VIP), 249 and 253
// (IPv6); the kind is configurable.
//
// # The fault
//
// A client's kernel keeps local ports unique per destination only. Two connections
// from one client port to two VIPs of one proxy are two there and one 4-tuple at
// the proxy. The second's SYN meets the first's socket, which answers it with a
// challenge ACK (RFC 5961 section 4.2; net/ipv4/tcp_input.c tcp_validate_incoming;
// counters TCPChallengeACK and TCPSYNChallenge). What follows is the Return's
// [Policy]. [Return.Collisions] lists what the clients' timeouts are to be checked
// against. [FullNAT] has no such fault: the balancer chooses source ports itself. Its
// replies come back to the balancer, and no Return may stand in their way.
//
// # What it does not do
//
// No connection tracking by the kernel, whose NAT moves a source port that is
// taken and so hides the fault; no health checks, no weights, no IPv6, no ICMP, no
// reassembly. What is malformed is dropped by the balancer and counted; a Return
// drops nothing, because a link carries ARP, too. Full NAT leaves timestamps as the
// client made them, so a reused port can meet PAWS at the proxy (RFC 7323 section
// 5), as it does behind real ones that do not strip them.
//
// # Alternatives considered
//
// A hash ring (consistent hashing; groups do not change during a run) · nftables
// without tracking (cannot add a TCP option) · the Return inside the proxy (then
// replies of its kernel that no program sees, challenge ACKs and resets, would
// keep the proxy's address).
package l4lb
