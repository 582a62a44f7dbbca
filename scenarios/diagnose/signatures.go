package diagnose

import (
	"slices"
	"strings"
	"sync"
)

// Incident is an incident that a diagnosis knows, or Healthy.
type Incident string

// The incidents, in the order of the table. The first five are those of
// docs/incidents.
const (
	Backlog        Incident = "backlog"         // the server stands still, short connections overflow its accept queue
	AcceptQueue    Incident = "accept-queue"    // long-lived connections come back all at once and overflow it
	TupleCollision Incident = "tuple-collision" // a layer-4 balancer makes two connections one
	MixedPool      Incident = "mixed-pool"      // closes come so fast that TIME_WAITs pile up, and then that RSTs are sent
	UndersizedPool Incident = "undersized-pool" // the local ports to one destination are used up
	SYNFlood       Incident = "syn-flood"       // half-open connections fill the SYN queue
	TWRecycle      Incident = "tw_recycle"      // timestamps of several clients behind one address, Linux before 4.12
	Healthy        Incident = "healthy"         // none of the counters that an incident moves has moved
)

// weight is what an observation means for its incident.
type weight int8

const (
	necessary weight = iota // it must hold
	supports                // it need not hold; if it does, it speaks for the incident
	weakens                 // if it holds, it speaks against the incident, which it does not exclude
)

// condition is an observation that an incident makes or does not make.
type condition struct {
	weight weight
	reads  []string // the names that it looks at
	rule   string   // in numbers
	test   func(facts) truth
	yes    string // in words, if it holds
	no     string // in words, if it does not
	source string // who counts, in the kernel
}

// signature is what an incident looks like in the counters of one host.
type signature struct {
	incident   Incident
	conditions []condition
	confirm    string // what to look at next if it fits
	ask        string // what would decide while it is possible
}

// used returns the names of all counters that the signatures look at.
var used = sync.OnceValue(func() []string {
	var names []string
	for _, s := range signatures() {
		for _, c := range s.conditions {
			for _, name := range c.reads {
				if strings.HasPrefix(name, "Tcp") {
					names = append(names, name)
				}
			}
		}
	}
	slices.Sort(names)
	return slices.Compact(names)
})

// listening is not a counter: the accept queues, as ss shows them.
const listening = "ss -lnt"

// The shares of accepted connections that are over, at which they count as short
// or as long-lived. By the mechanism the share is 1 where connections are short and 0
// where they last, whatever the load; a server may have some of the other kind as well: a
// standing population that was accepted since boot, a prober's connections, clients that
// gave up while they queued. So the thresholds are no measured values but the mixtures that
// are still given a name; between them, a factor of two apart, neither is.
const (
	shortShare = 1.0 / 3
	longShare  = 1.0 / 6
)

// The shares of a limit at which it counts as reached. TIME_WAITs end in lumps, and sockstat
// may be read just after one: the timer wheel has a granularity of up to an eighth of the time
// that it waits, which is 2 s of 60 s at 250 Hz (kernel/time/timer.c, LVL_GRAN). Of the local
// ports some are with another destination besides.
const (
	nearBuckets = 0.9
	nearPorts   = 0.8
)

// firstPass is the share of local ports that connect(2) takes before it looks at those of
// the other parity (net/ipv4/inet_hashtables.c, __inet_hash_connect): fewer TIME_WAITs are
// no shortage.
const firstPass = 0.5

// over is how many of the connections that were accepted since the snapshot before,
// or since boot, are over and were not broken. Broken are those that this host
// closed first (TW) or that were reset (EstabResets), as many as are established
// now: a population that was cut off comes back once.
func over(f facts) number {
	broken := f.get("TcpExt.TW").plus(f.get("Tcp.EstabResets")).atMost(f.get("Tcp.CurrEstab"))
	return f.get("Tcp.PassiveOpens").minus(f.change("Tcp.CurrEstab")).minus(broken)
}

// share tells on which side of two thresholds a share lies; between them it is unknown.
func share(part, whole number, atLeast, atMost float64) truth {
	switch {
	case whole.positive() != yes:
		return unknown
	case part.reaches(whole.times(atLeast)) == yes:
		return yes
	case whole.times(atMost).reaches(part) == yes:
		return no
	}
	return unknown
}

// synQueueFull is how often a SYN found the SYN queue full.
func synQueueFull(f facts) number {
	return f.get("TcpExt.TCPReqQFullDrop").plus(f.get("TcpExt.TCPReqQFullDoCookies"))
}

// closes is how many connections this host closed first.
func closes(f facts) number {
	return f.get("TcpExt.TW").plus(f.get("TcpExt.TCPTimeWaitOverflow"))
}

const (
	sourceOverflow = "net/ipv4/tcp_input.c tcp_conn_request, net/ipv4/tcp_ipv4.c tcp_v4_syn_recv_sock"
	sourceSYNQueue = "net/ipv4/tcp_input.c tcp_conn_request, tcp_syn_flood_action"
	sourceTimeWait = "net/ipv4/inet_timewait_sock.c inet_twsk_alloc, net/ipv4/tcp_minisocks.c tcp_time_wait"
	sourceConnect  = "net/ipv4/inet_hashtables.c __inet_hash_connect"
	sourceOpens    = "net/ipv4/tcp_minisocks.c tcp_create_openreq_child, net/ipv4/tcp.c tcp_set_state"
)

// overflow is what backlog and accept-queue have in common.
func overflow() []condition {
	return []condition{{
		reads:  []string{"TcpExt.ListenOverflows"},
		rule:   "ListenOverflows > 0",
		test:   func(f facts) truth { return f.get("TcpExt.ListenOverflows").positive() },
		yes:    "SYNs or final ACKs found an accept queue full (attempts, not clients)",
		no:     "no accept queue was full",
		source: sourceOverflow,
	}, {
		reads:  []string{"TcpExt.TCPReqQFullDrop", "TcpExt.TCPReqQFullDoCookies"},
		rule:   "TCPReqQFullDrop + TCPReqQFullDoCookies ≤ ListenOverflows",
		test:   func(f facts) truth { return f.get("TcpExt.ListenOverflows").reaches(synQueueFull(f)) },
		yes:    "the accept queue was full at least as often as the SYN queue",
		no:     "the SYN queue was full more often than the accept queue",
		source: sourceSYNQueue,
	}, {
		weight: supports,
		reads:  []string{"TcpExt.ListenDrops"},
		rule:   "ListenDrops = ListenOverflows > 0",
		test: func(f facts) truth {
			drops, overflows := f.get("TcpExt.ListenDrops"), f.get("TcpExt.ListenOverflows")
			return all(overflows.positive(), drops.reaches(overflows), overflows.reaches(drops))
		},
		yes:    "every drop was an accept queue's: ListenDrops counts the overflows too",
		source: "include/net/tcp.h tcp_listendrop",
	}, {
		weight: supports,
		reads:  []string{listening},
		rule:   "Recv-Q > Send-Q",
		test: func(f facts) truth {
			l, known := f.fullest()
			return all(truthOf(known), truthOf(l.full()))
		},
		yes:    "this accept queue was full at that moment",
		source: "net/ipv4/tcp_diag.c tcp_diag_get_info, include/net/sock.h sk_acceptq_is_full",
	}}
}

// closesFirst is what mixed-pool and undersized-pool have in common.
func closesFirst() condition {
	return condition{
		reads: []string{"Tcp.ActiveOpens", "TcpExt.TW", "TcpExt.TCPTimeWaitOverflow"},
		rule:  "ActiveOpens > 0 and TW + TCPTimeWaitOverflow ≥ ActiveOpens/2",
		test: func(f facts) truth {
			opens := f.get("Tcp.ActiveOpens")
			return all(opens.positive(), closes(f).reaches(opens.times(0.5)))
		},
		yes:    "this host closes first, half or more of what it opens",
		no:     "this host opens nothing, or keeps or lets others close what it opens",
		source: "net/ipv4/tcp_output.c tcp_connect, net/ipv4/inet_timewait_sock.c __inet_twsk_schedule",
	}
}

// signatures is the table. The last one is Healthy.
func signatures() []signature {
	return []signature{
		{
			incident: Backlog,
			conditions: append(overflow(), condition{
				reads:  []string{"Tcp.PassiveOpens", "Tcp.CurrEstab", "TcpExt.TW", "Tcp.EstabResets"},
				rule:   "PassiveOpens − CurrEstab − min(TW + EstabResets, CurrEstab) ≥ PassiveOpens/3",
				test:   func(f facts) truth { return share(over(f), f.get("Tcp.PassiveOpens"), shortShare, longShare) },
				yes:    "many accepted connections ended by themselves: they are short",
				no:     "next to no accepted connection ended by itself: they are long-lived",
				source: sourceOpens,
			}),
			confirm: "sample `ss -lnt` beside the latency of the server's event loop: Recv-Q above Send-Q while the loop stands still; " +
				"a longer queue helps only if λ·stall − 1 ≤ backlog ≤ μ·(client timeout)",
			ask: askOverflow,
		},
		{
			incident: AcceptQueue,
			conditions: append(overflow(), condition{
				reads: []string{"Tcp.PassiveOpens", "Tcp.CurrEstab", "TcpExt.TW", "Tcp.EstabResets"},
				rule:  "PassiveOpens − CurrEstab − min(TW + EstabResets, CurrEstab) ≤ PassiveOpens/6",
				test: func(f facts) truth {
					return not(share(over(f), f.get("Tcp.PassiveOpens"), shortShare, longShare))
				},
				yes:    "accepted connections still stand, or were cut off and came back: long-lived",
				no:     "many accepted connections ended by themselves: they are short",
				source: sourceOpens,
			}),
			confirm: "compare Send-Q of `ss -lnt` with net.core.somaxconn: the queue is min(backlog, somaxconn) + 1, and a raised somaxconn " +
				"counts only from the next listen(2) on; then look at how fast clients come back",
			ask: askOverflow,
		},
		{
			incident: TupleCollision,
			conditions: []condition{{
				reads:  []string{"TcpExt.TCPSYNChallenge"},
				rule:   "TCPSYNChallenge > 0",
				test:   func(f facts) truth { return f.get("TcpExt.TCPSYNChallenge").positive() },
				yes:    "SYNs hit the 4-tuple of a connection that stands, and were challenged",
				no:     "no SYN hit a connection that stands",
				source: "net/ipv4/tcp_input.c tcp_validate_incoming (RFC 5961 section 4)",
			}, {
				reads:  []string{"Tcp.PassiveOpens"},
				rule:   "PassiveOpens > 0",
				test:   func(f facts) truth { return f.get("Tcp.PassiveOpens").positive() },
				yes:    "this host accepts connections, as the proxy behind a balancer does",
				no:     "this host accepts nothing: those SYNs are SYN-ACKs that its servers sent again",
				source: sourceOpens,
			}, {
				reads:  []string{"TcpExt.ListenOverflows"},
				rule:   "ListenOverflows < TCPSYNChallenge",
				test:   func(f facts) truth { return f.get("TcpExt.TCPSYNChallenge").exceeds(f.get("TcpExt.ListenOverflows")) },
				yes:    "and no full accept queue explains them",
				no:     "a full accept queue has SYN-ACKs sent again, which are challenged as well",
				source: sourceOverflow,
			}, {
				weight: supports,
				reads:  []string{"TcpExt.TCPChallengeACK"},
				rule:   "TCPChallengeACK ≥ TCPSYNChallenge/2 > 0",
				test: func(f facts) truth {
					syns := f.get("TcpExt.TCPSYNChallenge")
					return all(syns.positive(), f.get("TcpExt.TCPChallengeACK").reaches(syns.times(0.5)))
				},
				yes:    "challenge ACKs went out: the only answer that such a SYN gets",
				source: "net/ipv4/tcp_input.c tcp_send_challenge_ack",
			}},
			confirm: "capture at this host: SYNs from a client address and port that `ss -tn` shows as established, and no SYN-ACK; " +
				"a client that was rebooted, or a NAT that gives a port away too early, moves the counter as well",
			ask: "TcpExt.TCPSYNChallenge of the host behind the balancer: save `nstat -az` there",
		},
		{
			incident: MixedPool,
			conditions: []condition{closesFirst(), {
				reads: []string{"TcpExt.TCPTimeWaitOverflow", "sockstat.TCP.tw", maxBuckets, portRange},
				rule:  "TCPTimeWaitOverflow > 0, or tw ≥ 0.9·tcp_max_tw_buckets, or tw > ports",
				test: func(f facts) truth {
					overflow, tw := f.get("TcpExt.TCPTimeWaitOverflow").positive(), f.get("sockstat.TCP.tw")
					switch {
					case some(overflow, tw.reaches(f.get(maxBuckets).times(nearBuckets)), tw.exceeds(f.get(portRange))) == yes:
						return yes
					case all(not(overflow), f.get(portRange).times(firstPass).exceeds(tw)) == yes:
						return no
					}
					return unknown // as many as a pool with one destination may have
				},
				yes:    "TIME_WAITs reach their limit, or are more than one destination's ports",
				no:     "there are few TIME_WAITs",
				source: sourceTimeWait,
			}, {
				weight: supports,
				reads:  []string{"Tcp.OutRsts"},
				rule:   "OutRsts ≥ TCPTimeWaitOverflow/2 > 0",
				test: func(f facts) truth {
					overflows := f.get("TcpExt.TCPTimeWaitOverflow")
					return all(overflows.positive(), f.get("Tcp.OutRsts").reaches(overflows.times(0.5)))
				},
				yes:    "a late FIN finds neither socket nor bucket, and is answered with RST",
				source: "net/ipv4/tcp_ipv4.c tcp_v4_rcv, tcp_v4_send_reset",
			}},
			confirm: "`ss -tan state time-wait` names the destinations; ages in Redis's CLIENT LIST: if none grows old although callers keep their " +
				"connections, other callers close them; if as many are open as the pool has places, the pool is too small",
			ask: askPorts,
		},
		{
			incident: UndersizedPool,
			conditions: []condition{closesFirst(), {
				reads: []string{"sockstat.TCP.tw", "sockstat.TCP.inuse", portRange},
				rule:  "ports/2 ≤ tw ≤ ports and tw + (inuse, unless > ports) ≥ 0.8·ports",
				test: func(f facts) truth {
					tw, local := f.get("sockstat.TCP.tw"), f.get(portRange)
					near, inUse := local.times(nearPorts), f.get("sockstat.TCP.inuse")
					// More sockets than ports are those of clients of this host, which take none.
					enough := some(tw.reaches(near), all(local.reaches(inUse), tw.plus(inUse).reaches(near)))
					half := tw.reaches(local.times(firstPass))
					switch {
					case half != yes:
						return half
					case enough == yes && tw.exceeds(local) == no:
						return yes
					}
					return unknown // on the way there, or with several destinations
				},
				yes:    "TIME_WAITs and sockets in use are as many as one destination's local ports",
				no:     "TIME_WAITs leave more than half of the local ports free",
				source: sourceConnect,
			}, {
				reads:  []string{"TcpExt.TCPTimeWaitOverflow"},
				rule:   "TCPTimeWaitOverflow = 0",
				test:   func(f facts) truth { return f.get("TcpExt.TCPTimeWaitOverflow").none() },
				yes:    "every close got its TIME_WAIT, which holds the port",
				no:     "closes that found no bucket gave their ports back at once",
				source: sourceTimeWait,
			}, {
				weight: weakens,
				reads:  []string{twReuse},
				rule:   "tcp_tw_reuse = 1",
				test: func(f facts) truth {
					reuse := f.get(twReuse)
					return all(reuse.reaches(of(1)), of(1).reaches(reuse))
				},
				yes:    "ports in TIME_WAIT may be used again after a second",
				source: "net/ipv4/tcp_ipv4.c tcp_twsk_unique",
			}},
			confirm: "EADDRNOTAVAIL (cannot assign requested address) in the client's log: no counter counts it, connect(2) fails before a SYN is sent; " +
				"then compare the pool's MaxIdle with the connections in use",
			ask: askPorts,
		},
		{
			incident: SYNFlood,
			conditions: []condition{{
				reads:  []string{"TcpExt.TCPReqQFullDoCookies", "TcpExt.TCPReqQFullDrop"},
				rule:   "TCPReqQFullDoCookies + TCPReqQFullDrop > ListenOverflows",
				test:   func(f facts) truth { return synQueueFull(f).exceeds(f.get("TcpExt.ListenOverflows")) },
				yes:    "the SYN queue was full, and more often than the accept queue",
				no:     "the SYN queue was not full, or less often than the accept queue",
				source: sourceSYNQueue,
			}, {
				reads: []string{"TcpExt.SyncookiesSent", "TcpExt.SyncookiesRecv"},
				rule:  "SyncookiesRecv ≤ SyncookiesSent/2",
				test: func(f facts) truth {
					return f.get("TcpExt.SyncookiesSent").times(0.5).reaches(f.get("TcpExt.SyncookiesRecv"))
				},
				yes:    "few SYN cookies, if any were sent, were answered",
				no:     "SYN cookies were answered: those were clients",
				source: "include/net/tcp.h cookie_init_sequence, net/ipv4/syncookies.c cookie_v4_check",
			}, {
				weight: supports,
				reads:  []string{"TcpExt.ListenDrops", "TcpExt.ListenOverflows"},
				rule:   "ListenDrops > ListenOverflows",
				test:   func(f facts) truth { return f.get("TcpExt.ListenDrops").exceeds(f.get("TcpExt.ListenOverflows")) },
				yes:    "SYNs were dropped that no accept queue had refused",
				source: "include/net/tcp.h tcp_listendrop",
			}},
			confirm: "`ss -tan state syn-recv`: many requests, from addresses that never connect; " +
				"a burst of clients, far away, fills the SYN queue as well, but they answer",
			ask: "TcpExt.TCPReqQFullDoCookies and SyncookiesRecv against SyncookiesSent: save `nstat -az`",
		},
		{
			incident: TWRecycle,
			conditions: []condition{{
				reads: []string{"TcpExt.PAWSPassive"},
				rule:  "PAWSPassive > 0 (a kernel with PAWSActive but no PAWSPassive has no tcp_tw_recycle)",
				test: func(f facts) truth {
					rejected := f.get("TcpExt.PAWSPassive").positive()
					if rejected == unknown && f.get("TcpExt.PAWSActive").known {
						return no
					}
					return rejected
				},
				yes:    "SYNs were refused for a timestamp older than another client's of that address",
				no:     "no SYN was refused for its timestamp; since Linux 4.12 none is",
				source: "net/ipv4/tcp_ipv4.c tcp_v4_conn_request, net/ipv4/tcp_metrics.c tcp_peer_is_proven (Linux 3.10)",
			}, {
				reads:  []string{"TcpExt.PAWSPassive", "TcpExt.ListenOverflows"},
				rule:   "PAWSPassive > ListenOverflows",
				test:   func(f facts) truth { return f.get("TcpExt.PAWSPassive").exceeds(f.get("TcpExt.ListenOverflows")) },
				yes:    "no full accept queue explains it",
				no:     "more SYNs were refused for a full accept queue",
				source: sourceOverflow,
			}},
			confirm: "`sysctl net.ipv4.tcp_tw_recycle` is 1, and the clients that fail share an address with others (NAT)",
			ask:     "`sysctl net.ipv4.tcp_tw_recycle`: where there is no such sysctl, it is not this; where it is 1, TcpExt.PAWSPassive counts",
		},
		{
			incident: Healthy,
			conditions: []condition{{
				reads: []string{"TcpExt.ListenOverflows", "TcpExt.ListenDrops"},
				rule:  "ListenOverflows = ListenDrops = 0",
				test: func(f facts) truth {
					return all(f.get("TcpExt.ListenOverflows").none(), f.get("TcpExt.ListenDrops").none())
				},
				yes:    "no listener dropped anything",
				no:     "listeners dropped SYNs or ACKs",
				source: sourceOverflow,
			}, {
				reads:  []string{"TcpExt.TCPReqQFullDrop", "TcpExt.TCPReqQFullDoCookies"},
				rule:   "TCPReqQFullDrop = TCPReqQFullDoCookies = 0",
				test:   func(f facts) truth { return synQueueFull(f).none() },
				yes:    "no SYN queue was full",
				no:     "a SYN queue was full",
				source: sourceSYNQueue,
			}, {
				reads:  []string{"TcpExt.TCPSYNChallenge"},
				rule:   "TCPSYNChallenge = 0",
				test:   func(f facts) truth { return f.get("TcpExt.TCPSYNChallenge").none() },
				yes:    "no SYN hit a connection that stands",
				no:     "SYNs hit connections that stand",
				source: "net/ipv4/tcp_input.c tcp_validate_incoming",
			}, {
				reads: []string{"TcpExt.PAWSPassive"},
				rule:  "PAWSPassive = 0, or the kernel has none",
				test: func(f facts) truth {
					accepted := f.get("TcpExt.PAWSPassive").none()
					if accepted == unknown && f.get("TcpExt.PAWSActive").known {
						return yes
					}
					return accepted
				},
				yes:    "no SYN was refused for its timestamp",
				no:     "SYNs were refused for their timestamps",
				source: "net/ipv4/tcp_ipv4.c tcp_v4_conn_request (Linux 3.10)",
			}, {
				reads:  []string{"TcpExt.TCPTimeWaitOverflow"},
				rule:   "TCPTimeWaitOverflow = 0",
				test:   func(f facts) truth { return f.get("TcpExt.TCPTimeWaitOverflow").none() },
				yes:    "every close got its TIME_WAIT",
				no:     "closes found no TIME_WAIT bucket",
				source: sourceTimeWait,
			}, {
				reads: []string{"Tcp.ActiveOpens", "sockstat.TCP.tw", portRange},
				rule:  "ActiveOpens = 0, or tw < ports/2",
				test: func(f facts) truth {
					return some(
						f.get("Tcp.ActiveOpens").none(),
						f.get(portRange).times(firstPass).exceeds(f.get("sockstat.TCP.tw")))
				},
				yes:    "there are local ports enough",
				no:     "TIME_WAITs are half as many as local ports, or more",
				source: sourceConnect,
			}, {
				weight: weakens,
				reads:  []string{"TcpExt.TCPSynRetrans"},
				rule:   "TCPSynRetrans > 0",
				test:   func(f facts) truth { return f.get("TcpExt.TCPSynRetrans").positive() },
				yes:    "SYNs or SYN-ACKs had to be sent again: what drops them is at the other end, or between",
				source: "net/ipv4/tcp_output.c __tcp_retransmit_skb, tcp_rtx_synack",
			}},
			confirm: "these are one host's counters: if connections fail all the same, look at the other end, and at the client's log for EADDRNOTAVAIL",
			ask:     askPorts,
		},
	}
}

// What decides between incidents that share their counters.
const (
	askOverflow = "how many connections are long-lived: Tcp.CurrEstab against Tcp.PassiveOpens, from /proc/net/snmp before and after (--before; nstat leaves CurrEstab out); " +
		"few accepted connections that stay: backlog, nearly all that stay or come back: accept-queue"
	askPorts = "`sysctl net.ipv4.ip_local_port_range net.ipv4.tcp_max_tw_buckets` against tw in /proc/net/sockstat, and EADDRNOTAVAIL in the client's log: " +
		"tw near the number of ports: undersized-pool; above it, or near the buckets: mixed-pool; below half of it: neither"
	askEverything = "the kernel's counters: save /proc/net/netstat and /proc/net/snmp, or `nstat -az`"
	askWhich      = "which of these counters grows while connections fail: save them twice, and compare with --before"
)
