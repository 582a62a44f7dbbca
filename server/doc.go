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
//   - A stall can be injected into the cron (CONNLAB STALL, stall-every), outside any command, so that SLOWLOG does
//     not see it; a slow command (CONNLAB DELAY, DEBUG SLEEP) it does see. Accepting can be paused alone (CONNLAB ACCEPT).
//
// The loop is level-triggered and never blocks but in epoll_pwait. Replies are kept until all events of a cycle are
// served and written before the next wait, as Redis does in beforeSleep. No command allocates in the steady
// state, and no client can exhaust the server: requests, query buffers, output buffers and their number have limits
// with Redis's names, and memory is taken for bytes that came, not for bytes that were announced.
//
// The package refuses to persist, replicate, evict or script: values are strings, in memory, gone with the process.
// It speaks IPv4 TCP without TLS. It knows nothing of network namespaces: it runs in a process that already stands in
// one.
package server
