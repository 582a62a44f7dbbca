package observe

import (
	"cmp"
	"net/netip"
	"slices"
)

// Connection is a TCP connection by its two ends.
type Connection struct {
	Client, Server netip.AddrPort
}

// Ends is the state of a connection at each end; None is an end without a
// socket.
type Ends struct {
	Client, Server State
}

// Joined holds every connection under the states of its two ends, sorted.
type Joined map[Ends][]Connection

// Join matches the sockets of clients with those of servers by 4-tuple.
// Listeners take no part. For the clients give the sockets of every client host
// one after the other; for the servers only what those clients connect to (see
// [Query]), or the rest shows up with one end.
//
// The two lists are read one after the other, so a connection that moves on in
// between is seen in two states that never were at the same time. Read both
// while the traffic pauses.
func Join(client, server []Socket) Joined {
	ends := map[Connection]Ends{}
	for _, s := range client {
		if s.State == Listen {
			continue
		}
		c := Connection{Client: s.Local, Server: s.Remote}
		ends[c] = Ends{Client: s.State}
	}
	for _, s := range server {
		if s.State == Listen {
			continue
		}
		c := Connection{Client: s.Remote, Server: s.Local}
		e := ends[c]
		e.Server = s.State
		ends[c] = e
	}
	j := Joined{}
	for c, e := range ends {
		j[e] = append(j[e], c)
	}
	for _, list := range j {
		slices.SortFunc(list, func(a, b Connection) int {
			return cmp.Or(a.Client.Compare(b.Client), a.Server.Compare(b.Server))
		})
	}
	return j
}

// Count returns how many connections have these states at their ends.
func (j Joined) Count(client, server State) int { return len(j[Ends{client, server}]) }

// Ghosts returns the connections that the client believes established and of
// which the server has nothing: their handshake was answered by a SYN cookie or
// by a request that has since expired, and the final ACK found no room. A
// connection that the server still holds in SYN_RECV may yet complete and is no
// ghost; count those with Count(Established, SynRecv).
func (j Joined) Ghosts() []Connection { return j[Ends{Established, None}] }
