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
