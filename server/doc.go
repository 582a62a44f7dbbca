// Package server is a small RESP server for the lab: one thread, one epoll loop, as Redis has it (ae.c,
// networking.c, server.c), so that what happens to a Redis whose loop stands still happens to this one too. What a
// real Redis only does by accident can be asked of it here:
//
//   - The listener is made by the plain system calls socket, bind and listen(backlog), never by net.Listen, which
//     on Linux opens an MPTCP socket and takes the backlog from net.core.somaxconn. The kernel caps the backlog at
//     somaxconn of the network namespace (net/socket.c, __sys_listen_socket) and lets backlog+1 connections wait
//     (include/net/sock.h, sk_acceptq_is_full).
//   - Connections accepted per cycle of the loop are a setting: 1000 as in Redis up to 7.2 (MAX_ACCEPTS_PER_CALL), 10 as
//     max-new-connections-per-cycle since 7.4.
//   - Connections accepted per second can be limited (accept-rate), so that the rate at which the accept queue drains is known.
//   - A stall can be injected into the cron (CONNLAB STALL, stall-every), outside any command, so that SLOWLOG does
//     not see it; a slow command (CONNLAB DELAY, DEBUG SLEEP) it does see. Accepting can be paused alone (CONNLAB ACCEPT).
//   - Latency that no command makes: every reply can be kept back for some time (service-time), and requests can be served
//     at no more than some rate, each in its turn (max-request-rate), as by a Redis at its limit. Both are virtual time:
//     the loop goes on. A request is what one read brings, a command or a pipeline. A read of nothing but commands of the
//     groups server and connlab and CLIENT is none, so that the server can be asked and set at any time. Replies to one
//     client stay in order. A reply that is kept back is lost if its client is closed, and counts for
//     output-buffer-limit; its client is not idle.
//   - Who closes first, and when: after a client's FIN the server can wait with its own (close-delay), longer than the
//     kernel waits with the ACK, so that the client's FIN_WAIT_2 can be seen; or it closes first, after so many requests
//     (close-after) or idle seconds (timeout), and TIME_WAIT is the server's. CLIENT LIST has ages and idle times in
//     milliseconds too, INFO the number of closes by who ended the connection.
//   - All connections can break at once: CONNLAB CUT closes a share of them by FIN or by RST.
//   - More connections than one process may have open: workers ([Workers]) share one listening socket and so one accept queue.
//
// The loop is level-triggered. It waits in epoll_pwait and nowhere else, in epoll_pwait2 while replies are kept back, unless
// it is told to stand still: in a stall, in a delayed command, in DEBUG SLEEP. Replies are kept until all events of a cycle
// are served and written before the next wait, as Redis does in beforeSleep. PING, GET, MGET, and SET without options and INCR of a key that exists allocate
// nothing once the buffers of the client have grown to its requests; other commands may.
//
// Limits are per client and have Redis's names where it has them: bytes and arguments of one request, bytes of an
// unfinished request (1 GiB unless set otherwise), bytes of replies not taken (256 MiB). Memory is taken for bytes that
// came, not for bytes that were announced, and given back after the request. There is no limit on the total unless it is
// set: maxmemory is off by default, as in Redis, so that keys may fill the memory, and maxclients clients (10000) at their
// limits may ask for 10000 times the sum of these. Even maxmemory only refuses commands that write.
//
// The package refuses to persist, replicate, evict or script: values are strings, in memory, gone with the process.
// It speaks IPv4 TCP without TLS. It knows nothing of network namespaces: it runs in a process that already stands in
// one.
package server
