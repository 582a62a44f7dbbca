package scenarios

// The stories are for people who read `connlab show`: what was seen, why it
// happens, the formula, and what the remedies do.

const backlogStory = `
WHAT WAS SEEN
  A Redis 2.8.19 with more than a hundred client machines. Now and then clients
  cannot connect, at no particular time and from no particular client; it heals by
  itself. Connections jump from 3,500 to 4,100; more than 2,000 SYNs a second arrive;
  two counters of the server, "SYNs to LISTEN sockets dropped" and "listen queue of a
  socket overflowed", climb together. Nothing is in the slow log. Raising the backlog
  from 511 to 2,048 did not help. A capture shows 1.43 s without a single reply.

WHY
  The kernel completes handshakes by itself and queues the connections for accept().
  That accept queue holds min(backlog, somaxconn)+1 connections. While the event loop
  stands still, nothing is taken out; once the queue is full, every further SYN is
  dropped without an answer, and its client tries again after 1 s, 2 s, ... The loop
  stood still outside any command (in the server's cron), so the slow log, which times
  commands, cannot know.

THE FORMULA
  Arrivals at λ per second during a stall of T seconds need λT places.
    clients that lose their first SYN   max(0, λT − (B+1))       B = min(backlog, somaxconn)
    SYNs dropped                        those, and each retry that falls into the stall
  With λ = 2,000/s and T = 1.43 s, 2,860 places are needed: 511 loses 2,348 clients, 2,048
  still loses 811, 2,900 loses none. But what a longer queue saves waits up to T for its
  reply: a backlog is worth having between λT−1 and μ·(client timeout), μ being the rate
  at which the server catches up. Where that window is empty, no backlog helps.

WHAT COUNTS WHAT
  ListenOverflows counts attempts, retransmitted SYNs included. Victims are connections.
  A client believes that it is connected as soon as it has the SYN-ACK. If the queue fills
  between SYN-ACK and ACK (with latency), the server drops the ACK: the client is
  ESTABLISHED, the server is not. tcp_abort_on_overflow acts there and only there.
`

const collisionStory = `
WHAT WAS SEEN
  A cloud's Redis: client → layer-4 balancer → proxies → Redis. Every instance has a
  VIP of its own; one proxy serves 50 to 100 instances. The balancer is transparent: it
  keeps the client's address, rewrites the destination to the proxy, and carries the VIP
  in a TCP option; replies go from the proxy straight to the client. Customers with
  short connections to several instances see a connect time out now and then. A detector
  that connects to every instance sees it in almost every round, once there are more than
  1,000 of them: each time another instance, and a retry works. Asking the proxies or the
  instances directly is clean. Fewer than 100 connections a second are enough. Behind a
  layer-7 balancer it never happens. It took more than two weeks to find.

WHY
  A local port need be unique only per destination: a client's kernel may well use port
  40000 to two VIPs at once. Behind the balancer both have the same destination, the
  proxy: one 4-tuple, and so one connection. The SYN of the second meets the established
  socket of the first. The proxy's kernel answers with a challenge ACK (RFC 5961,
  section 4), which goes to the first VIP's connection, where it means nothing. The second
  client hears nothing at all: SYN, SYN, SYN.

THE FORMULA
  n connections open at once from one client address, over k proxies, P usable ports:
    collisions in a round   μ = k·(n/k)·(n/k − 1)/2 / P
    rounds with a timeout   1 − e^−μ
  connect() takes only every second port of ip_local_port_range, so P is 14,116 by
  default. n = 1,000 and k = 15 make μ = 2.33: a timeout in nine rounds of ten. It grows
  with the square of n: 100 instances collide once in fifty rounds.
  Which ports collide is chance, so the claims are exact tests,
  Poisson for the collisions and binomial for the rounds, at a level such that one run
  in a thousand is refuted by chance. Each round is another client's: connect() keeps the
  place where it starts looking for ports for ten seconds, so that rounds of one client
  in quick succession collide again and again at the same two instances.

WHAT IS COMPARED
  The balancer counts every tuple that two VIPs share at once. Each timeout of a detector
  must be one of them, by port and VIP, and each of them a timeout.

WHAT THE REMEDIES DO
  More ports, or every port instead of every second, only divide μ by about two. Long
  connections collide while they are opened, and not again. A balancer with an address
  and ports of its own (layer 7, full NAT) cannot collide; nor can bind(addr, 0) before
  connect(), at a price: the whole host then shares one range of ports. If the reverse
  mapping takes the last VIP, the second connection works and the old one dies.
`

const timeWaitStory = `
WHAT WAS SEEN
  A web server that talks to Redis sends RSTs all day ("netstat -s | grep reset" climbs).
  A capture shows the order: the web server sends FIN, Redis acknowledges it and sends
  its own FIN a little later, and the web server answers that FIN with RST. A kernel trace
  finds the sender: tcp_v4_send_reset, called by tcp_v4_rcv, which found no socket. "ss"
  shows many FIN_WAIT_1 and hardly a FIN_WAIT_2. In /proc/net/sockstat there are 127,866
  TIME_WAITs; tcp_max_tw_buckets is 131,072. With a higher limit the RSTs stop and FIN_WAIT_2
  can be seen again. Why, the article could not say.

WHY
  A connection that was closed by its program is an orphan. When its FIN is acknowledged it
  enters FIN_WAIT_2, and the kernel does not keep a whole socket just to wait for the
  other side's FIN: tcp_rcv_state_process hands it to tcp_time_wait, which replaces it by a
  small one, a bucket, of which there are tcp_max_tw_buckets at most (per namespace). If
  there is none left, inet_twsk_alloc returns nothing, TCPTimeWaitOverflow is counted, and
  tcp_done ends the socket all the same. The FIN that comes later belongs to no socket:
  tcp_v4_rcv sends an RST.

  It takes a FIN that comes later. Redis's kernel delays the ACK of a FIN by 40 ms
  (TCP_DELACK_MIN); if Redis closes within that time, ACK and FIN are one segment, the
  socket is still there to take it, and nobody is reset, bucket or no bucket.

THE FORMULA
  A bucket is taken for 60 s (TCP_TIMEWAIT_LEN), and up to 2 s more, because the timer wheel
  ends them in lumps: 61 s on average, R = 62 s at most. At r closes a second up to r·R of
  them are in use.
    overflow             if and only if r > M/R        M = tcp_max_tw_buckets
    closes that overflow max(0, n − M)                 for n closes within 60 s
    RSTs                 as many, if the other FIN trails by more than 40 ms, or none
    FIN_WAIT_2 in "ss"   r·(trail − 40 ms) while there are buckets, none when there are not
  The same n/M, trail/40 ms, and n/r below R make the same experiment, whatever its size.

WHAT DOES NOT HELP
  A shorter tcp_fin_timeout (it bounds the wait for the other FIN, not TIME_WAIT; above 60 s
  it helps by accident, because the orphan then waits as a whole socket), tcp_tw_reuse (a
  bucket is reused only by a connection to the same place from the same port), SO_LINGER 0
  (no TIME_WAIT, because every close is an RST). What helps: more buckets, or fewer closes;
  see the incident mixed-pool for where so many closes come from.

  (61 s and 62 s are those of a kernel with HZ=250; the lumps are 2 s there, 4 s with HZ=1000.)
`

const mixedPoolStory = `
WHAT WAS SEEN
  OpenResty with lua-resty-redis. Connections are given back with set_keepalive, and yet
  the web server sends FIN after FIN to Redis: 127,866 TIME_WAITs, and CLIENT LIST shows no
  connection that ever grows old. The code cache is on, Redis's timeout is long enough, and
  the pool is large enough: the three usual suspects are innocent.

WHY
  connect() always looks in the pool first, whoever calls it. Somewhere in the code there is
  a caller that takes a short connection: connect, one command, close(). It is given a
  connection that others keep, the one used last, and closes it. The pool drains, and those
  who keep must dial.

THE FORMULA
  Callers that close come at s per second, those that keep at ℓ. Every call that closes
  takes one connection away, and every connection was dialed once:
    dials per second       s
    P(a call dials)        s/(s+ℓ)     for both kinds: whether the call before it closed
    uses per connection    (s+ℓ)/s
    TIME_WAITs             s·R         R = 61 s on average: s = 2,096 makes 127,900
  Mixing does not add closes: it makes those dial who keep, and keeps every connection young.

WHAT LOOKS ALIKE, AND WHAT TELLS IT APART
  a pool too small       more connections are open at once than the pool has places; with K
                         calls at once and m places each burst dials K−m times
  Redis's timeout        Redis closes first, so the TIME_WAITs are those of Redis
  a pool per request     (lua_code_cache off) no connection is ever used twice

WHAT HELPS
  A pool name of its own for callers that close: then those who keep do not dial any more.
  The TIME_WAITs stay at s·R; only callers that give back end them. A larger pool or a
  longer idle time keep nothing, because there is nothing to keep. redigo has no such trap:
  who closes there has dialed for himself. Nor has go-redis, unless one uses EphemeralConn,
  which takes a connection of the pool and closes it.
`

const undersizedStory = `
WHAT WAS SEEN
  A push service in Go, redigo with MaxIdle=50, MaxActive=500, Wait=false. For months all is
  well at 350,000 users. On a holiday there are 500,000; Redis nodes reach their limit of
  about 150,000 requests a second and answer late. In ten minutes 160,000 calls fail with
  “connect: cannot assign requested address”: 60,000 established connections, over 20,000
  TIME_WAITs, ip_local_port_range 35768–60999 (25,232 ports), tcp_tw_reuse=0.

WHY
  By Little's law λ·W calls have a connection at a time. While W is 0.2 ms they are a few,
  and the pool keeps all it needs. When W is 20 ms they are hundreds. A connection returned
  while MaxIdle others are idle is closed, by the client: its local port stays in TIME_WAIT
  for 60 s (61 s on average, by the kernel's timer). The next call that finds none idle
  dials. The number in use goes up and down all the time, so that this goes on all the time.

THE FORMULAS
  Calls come at λ a second and take W; a heartbeat makes g of them, in a goroutine each.
  in use at a time         λ·W ± √(λ·W·g)
  churn                    λ·g/(m+g) closes and dials a second, for MaxIdle m ≤ √(λ·W·g); it
                           falls off beyond, and is nothing from 5 or 6 times that on. With
                           g=1 it is λ/(m+1). One goroutine for all g: (λ/g)/(m+1)
  onset                    W* ≈ (m/3)²/(λ·g): the latency below which nothing is to be seen
  ports                    exhausted iff churn > P/61 s; from empty after P/churn
  short connections        P/61 s a second; with tcp_tw_reuse=1 P/tcp_tw_reuse_delay
  connection pool          refuses λ·B(c, λ·W) calls a second, B being Erlang's loss
  exhausted                formula: another error, that comes without any TIME_WAIT
  a batch                  1 + E[min(Poisson(λ·t), k−1)] commands, sent when it has k or t
                           after its first

WHAT CONNECT COSTS
  connect(2) looks for a free port among those of one parity first, from where it ended
  last. While there are some it finds one at once. When half of the ports are taken it looks
  at all P/2 of them each time, before it turns to the others: with the article's range
  about 2 ms of CPU instead of 25 µs. When all are taken it looks at all, in vain, and Go's Dial
  does it three times. So a service that runs out of ports burns its CPU, too.

WHAT DOES NOT HELP, AND WHAT DOES
  More ports only take longer to spend. Wait=true alone changes nothing while MaxIdle is below
  MaxActive: the closes come from MaxIdle. tcp_tw_reuse=1 ends the errors, and leaves the
  churn. MaxIdle=MaxActive ends both; the article's 300 of 400 with Wait=true does so too at
  full size, because the number in use hardly ever swings by 300. A heartbeat that does its
  operations one after the other takes the connection it has just returned: churn falls by
  g². Merging requests into pipelines needs one connection, however slow Redis is, costs the
  first of a batch t, and takes requests off Redis, which is what was slow.

SIZES
  The variants have 100 ports and a pool to suit; each remedy is shown at the load of the
  incident and, beside it, at twice that. The numbers without dimension are recorded as
  Group.…: m/√(λ·W·g), λ·W/c, g/m, P/c, churn·R/P. The variants of --full have the article's
  pool and ports: 4,000 operations a second, 8 to a heartbeat, spend them within a minute.
`

const stormStory = `
WHAT WAS SEEN
  Five EMQX nodes, about 150,000 connections each, Linux 5.15. Now and then telnet to the port
  hangs in “Connecting…”. A capture on the server shows the SYN coming in and no answer.
  tcp_tw_recycle behind NAT is suspected and ruled out: it has been gone since 4.12
  (connlab show lookalikes). The counters say what it is: 493,989 times the listen queue
  of a socket overflowed, 493,997 SYNs dropped. somaxconn and tcp_max_syn_backlog are 16,384.

WHY
  A connection waits in the accept queue from its handshake until the program calls accept(2).
  Clients come at λ a second and are accepted at μ. After a network fault, a restart or a
  failover all who were cut come back at once, and λ is above μ. When the queue is full the
  kernel drops every further SYN without a word; the client sends it again after 1, 2, 3, 4, 5,
  7, 11 s (1, 3, 7, 15 s before Linux 6.5). Whoever gets through in between is luck: a place becomes free μ times a second, and
  the next SYN that happens to come has it.

THE FORMULAS
  limit                    min(backlog, somaxconn), as they were when listen(2) was called
  places                   limit + 1
  full after               (B+1)/(λ−μ)
  all are back after       cut/μ at least, with or without a long queue, with or without jitter
  connect time             the next SYN retry that finds a place
  patience                 a client that waits in the queue for longer than its patience is
                           accepted as a corpse. Waiting takes B/μ
  the window for B         cut·(1−μ/λ)−1 ≤ B ≤ μ·patience. Where it is empty no backlog can
                           save you
  The number of SYNs dropped, and who comes through when, follow from a small model of the
  queue with the kernel's SYN retries, which is played before anything is started.

WHAT DOES NOT HELP
  somaxconn alone, or backlog alone: the smaller of the two is the limit. Both, without
  reopening the listener: the limit is what it was (ss -lnt, Send-Q). tcp_max_syn_backlog: that
  is the other queue. Twice the queue: half as many hang. A queue beyond μ·patience: clients
  give up and come again while their corpses are accepted one after the other; the server is
  busy for ever and serves nobody. That state outlasts its cause.

WHAT HELPS
  Backlog and somaxconn within the window, and a restart. A server that accepts faster. Clients
  that come back at random over a while: nobody is dropped, and it takes no longer. Where
  clients are impatient, a shorter queue: SYNs are dropped, which costs nothing, and
  who waits in the queue is served in time.

SIZES
  The variants have 6,000 connections, 3,000 of them cut, 655 places: one in twenty-five of the
  article's, at the same times and with the same numbers without dimension, recorded as
  Group.…: cut/(B+1), λ/μ, μ·patience/(B+1), μ·r₁/(B+1). Those of --full hold 150,000.
  The article has neither λ nor μ. EMQX's listeners have a limit of connections per second
  (max_conn_rate), which is what the server's accept-rate is here.
`

const lookalikesStory = `
WHAT WAS SUSPECTED
  SYNs come in and are not answered. Those who hunted incident 5 first suspected
  tcp_tw_recycle, as everybody does who has met it once. It is gone since Linux 4.12; the
  server had 5.15. The other suspect, here as always, is a SYN flood. Both look the same to a
  client: “Connecting…”. The server's counters tell them apart.

TCP_TW_RECYCLE
  With it Linux 3.10 remembered one timestamp for each peer address, when a connection that it
  had closed first went to TIME_WAIT, and for a minute dropped each SYN from that address whose
  timestamp was older (tcp_v4_conn_request, tcp_peer_is_proven). One address is one clock, says
  the rule. Behind NAT it is many: whose clock is ahead gets in, all others hang. Since 4.10
  clocks are random, for each connection or each pair of addresses, so that behind NAT half of
  all SYNs are behind; two releases later the sysctl was removed. Here the rule is a stage on the server's link; what
  it would have counted is called modelled.

A SYN FLOOD
  SYNs whose handshake nobody completes fill the SYN queue, whose limit is the listener's
  backlog too. Then SYN cookies answer (TCPReqQFullDoCookies), and nobody waits. Without them
  every further SYN is dropped, of clients too, until the requests expire.

THE FINGERPRINTS
                          ListenOverflows  ListenDrops   others
  full accept queue       grows            the same      queue at its limit (ss -lnt)
  tcp_tw_recycle, NAT     0                grows         PAWSPassive (“passive connections
                                                         rejected because of time stamp”)
  SYN flood, no cookies   0                grows         TCPReqQFullDrop the same, SYN_RECV
  SYN flood, cookies      0                0             TCPReqQFullDoCookies, SyncookiesSent
`
