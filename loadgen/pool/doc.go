// Package pool holds the ways in which clients of Redis keep their connections,
// as they are in the field.
//
// [Worker] is the connection pool of the cosockets of lua-nginx-module, under
// every lua-resty-redis, as one nginx worker process has it. It is the policy of
// src/ngx_http_lua_socket_tcp.c, version 0.10.23 (Debian 12), over net.Conn, and
// is tested call by call against that module in a real nginx:
//
//   - connect looks into the pool first, whoever asks and whatever for, and takes
//     the connection that was kept last (ngx_http_lua_get_keepalive_peer). A
//     caller that will close its connection takes it from those who keep theirs.
//   - A pool comes into being with a connect that names a size or a backlog, or
//     else with the first setkeepalive, and dies with its last connection
//     (ngx_http_lua_socket_free_pool). Its size and backlog are chosen then, and
//     are not changed by what later calls ask for.
//   - In a full pool setkeepalive closes the idle connection that was kept
//     first, even if the new one then turns out to be unfit.
//   - An idle connection on which anything happens (FIN, RST, unasked data) is
//     closed at once, as is one that was idle for its timeout
//     (ngx_http_lua_socket_keepalive_close_handler).
//   - Only a pool with a backlog limits the connections that are open; more
//     connects wait in order of arrival, each for its connect timeout, and a
//     connection that is kept, closed or lost lets one of them go on
//     (ngx_http_lua_socket_tcp_resume_conn_op). That one takes what is idle or
//     else dials, without looking at the limit again.
//
// Faults of the original are kept, where they are policy: a waiter that gives up
// because it is cancelled lets the next one dial beyond the limit; connections
// that were opened before their pool existed count from when they are kept. Not
// kept is what comes from nginx's event loop: it lets a waiter go on at the end
// of a cycle, so that two connections released within one cycle wake only one,
// and a connect in the same cycle can snatch the connection from it. Here each
// wakes one, at once. TLS, host names and datagrams are left out.
//
// It refuses to look ahead: nothing is dialed before it is asked for, no idle
// connection is tested when it is taken, and nothing is retried.
//
// Every connect(2) is made and counted one by one ([Account]), because a dial of
// package net is up to three: it tries twice more where connect(2) finds no local
// port (EADDRNOTAVAIL; spuriousENOTAVAIL in net/tcpsock_posix.go). Under the Go
// libraries the package does the same itself; nginx does not.
//
// [Run] sends callers of two kinds, those that keep their connection and those
// that close it, through any [Pool]: the cosockets of several workers
// ([NewCosockets]), redigo ([NewRedigo]) or go-redis ([NewGoRedis]), each used as
// its users do; or through a client that merges the requests of many callers into
// pipelines: a [Batcher] ([NewBatching]), go-redis's own ([NewAutoPipeline]). The loop is open, as that of loadgen.Run, and every call says
// whether it was the first to have its connection. A caller may do several
// operations in sequence, each a call of its own.
package pool
