// Package twrecycle is a server host of Linux 3.10 with net.ipv4.tcp_tw_recycle=1
// and net.ipv4.tcp_timestamps=1, as two stages of the wire to a host of any later
// kernel: it drops the SYNs that such a server drops without a word.
//
// The rule, in the names of Linux 3.10:
//
//   - The server remembers one timestamp for each peer address, whatever the port:
//     tcpm_ts, and the second in which it came, tcpm_ts_stamp
//     (net/ipv4/tcp_metrics.c, struct tcp_metrics_block).
//   - It writes them for a connection that it closed first, with that connection's
//     ts_recent and unless a later one is there: tcp_time_wait
//     (net/ipv4/tcp_minisocks.c) calls tcp_remember_stamp when the peer has
//     acknowledged the FIN of a closed socket (tcp_rcv_state_process, to
//     TCP_FIN_WAIT2) or its own FIN has come with that (tcp_fin, to TCP_TIME_WAIT).
//     A FIN that comes after writes again: tcp_timewait_state_process calls
//     tcp_tw_remember_stamp. A connection without timestamps writes nothing.
//   - The recycled TIME_WAIT lasts three and a half retransmission timeouts and not
//     60 s, and that is what the parameter is for.
//   - tcp_v4_conn_request (net/ipv4/tcp_ipv4.c) asks tcp_peer_is_proven about a SYN
//     that has a timestamp and meets no socket. If fewer than TCP_PAWS_MSL = 60
//     seconds have passed since tcpm_ts_stamp, and tcpm_ts − TSval, as a signed
//     32-bit number, is more than TCP_PAWS_WINDOW = 1, the SYN is dropped. It counts
//     in PAWSPassive ("passive connections rejected because of time stamp") and in
//     ListenDrops, and not in ListenOverflows. A SYN that meets the TIME_WAIT of its
//     own tuple is not asked about.
//
// One address is one clock, says the rule. Behind a NAT it is many: of two clocks
// the one that is behind is locked out, and every connection of the other that the
// server closes renews that for a minute. One host can be many clocks, too: with
// tcp_timestamps=1 the kernel adds a random offset to each connection's clock
// (commit 8a5bd45f6616, Linux 4.10), for some years only to each pair of addresses'
// (28ee1b746f49), and now to each connection's again (165573e41f2f, Linux 7.0 and
// stable releases before it). Such clocks see half of their SYNs rejected whatever
// is remembered: 32-bit numbers are a circle, and half of it is behind any point.
// The parameter and its counter are gone since Linux 4.12 (4396e46187ca).
//
// A [Clock] makes the hosts of a lab, which share the machine's clock, differ like
// those behind a real NAT: two stages of the wire to a client host shift the timestamps
// that it sends and, back again, their echoes.
//
// What it refuses to do: see the host's sockets, queues and counters. A socket is
// what the wire tells, from the SYN-ACK on. A close is taken for close(2): after
// shutdown(2) alone the kernel writes nothing before the peer's FIN. Retransmission
// timeouts are not known, and a TIME_WAIT lasts 700 ms, which is three and a half of
// the shortest (TCP_RTO_MIN). No sequence number but those of the FINs is looked at.
// A SYN is judged also when the kernel's full SYN queue would have had a cookie made
// or its full accept queue would have dropped it before. The kernel behind the
// stages never sees a dropped SYN, so its PAWSPassive and ListenDrops stand still;
// [Stats].Rejected is the former. IPv4 only.
package twrecycle
