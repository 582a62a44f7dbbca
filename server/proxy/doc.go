// Package proxy is a one-to-one Redis proxy of the kind that stands behind the balancer of a cloud: one address and
// port, behind which many instances live, each with a virtual address (VIP) of its own. It learns which VIP a client
// meant, opens one upstream connection for that client connection, and passes bytes both ways without looking at
// them, so that transactions, Pub/Sub and pipelines work as they do without a proxy.
//
// The VIP is learned in one of three ways ([Learn]):
//
//   - From a TCP option of the client's SYN, which a transparent layer-4 balancer put there: kind 250, length 8, port,
//     IPv4 address, as the kernel module TOA_VIP has it. The kernel keeps the headers of the SYN when the listener asks
//     for it with TCP_SAVE_SYN (net/ipv4/tcp_input.c, tcp_reqsk_record_syn), and TCP_SAVED_SYN hands them out once
//     (net/ipv4/tcp.c, do_tcp_getsockopt). A connection that came through a SYN cookie has none: its VIP is lost, and
//     it is reset rather than sent to an instance that it may not have meant.
//   - From a PROXY protocol header, version 1 or 2, in front of the client's bytes.
//   - From the local address of the connection: a layer-7 balancer has the VIPs as its own addresses.
//
// The two ends see of each other what they would see without a proxy: the end of one direction is passed on as the end of
// that direction alone (shutdown(SHUT_WR)), a reset as a reset (SO_LINGER 0). A client that cannot be served, because its
// VIP is unknown, has no route, or the upstream does not accept, is reset too: that is what a refused connection is, and a
// FIN would not be certain to stay one, since closing a socket with unread bytes sends a reset anyhow (net/ipv4/tcp.c,
// __tcp_close).
//
// Bytes go through a buffer in user space, not through splice(2): Go keeps a pipe for as long as a splice lasts, which
// here is the life of the connection, and so a connection would take six descriptors instead of two. Splicing would save CPU
// with long values only.
//
// The backlog is what Go gives to listen(2), net.core.somaxconn of the namespace in which the process was started. The
// package refuses to pool, to share an upstream connection, to look into RESP, to speak TLS or IPv6, and to close idle
// connections; peers that are gone are found by TCP keepalive after about ten minutes.
package proxy
