package server

import (
	"cmp"
	"container/list"
	"fmt"
	"net/netip"
	"slices"
	"strings"
	"time"

	"golang.org/x/sys/unix"

	"connlab/server/resp"
)

// client is one connection.
type client struct {
	id    int64
	fd    int
	index int // in Server.clients

	// The peer's address. A netip.AddrPort is four times as long, and a hundred thousand idle clients are to fit.
	ip   [4]byte
	port uint16

	in      []byte       // beginning of an unfinished request; empty most of the time
	parser  *resp.Parser // of the unfinished request; nil if there is none
	out     []byte       // replies
	written int          // bytes of out that the socket has taken

	proto         resp.Version
	db            int
	authenticated bool
	noEvict       bool
	name          string
	lib           *library // nil as long as it has not said

	created  time.Duration // of the clock
	lastSeen time.Duration // of the clock: last bytes read from it or written to it
	lastCmd  *command
	requests int // served, errors included

	finished time.Duration // of the clock: when its FIN was read
	leaving  *list.Element // in Server.leaving; nil as long as it has sent no FIN, or if it is closed for that at once

	pending         bool // is in Server.pending
	wantWrite       bool // waits for EPOLLOUT
	closeAfterReply bool
	doomed          bool // is in Server.doomed; must not be served any more

	held holdQueue
}

// library is what a client's library calls itself.
type library struct{ name, version string }

// library returns what is known of the client's library.
func (c *client) library() library {
	if c.lib == nil {
		return library{}
	}
	return *c.lib
}

// addr returns the address that the client connected from.
func (c *client) addr() netip.AddrPort { return netip.AddrPortFrom(netip.AddrFrom4(c.ip), c.port) }

// keepBuffer is the capacity up to which a client's buffers stay allocated when they are empty.
const keepBuffer = 4 << 10

// keepArgs is the number of arguments up to which a client's parser keeps the room for them.
const keepArgs = 1024

func (s *Server) newClient(fd int) *client {
	c := s.connection(fd)
	c.id = s.nextID
	c.index = len(s.clients)
	s.nextID++
	s.clients = append(s.clients, c)
	s.clientMemory += c.memory() // the cron counts anew
	return c
}

// connection returns a client that is in no list yet.
func (s *Server) connection(fd int) *client {
	c := &client{fd: fd, created: s.clock.now, lastSeen: s.clock.now}
	s.reset(c)
	return c
}

// register has the events of a client's descriptor find it.
func (s *Server) register(c *client) {
	if c.fd >= len(s.byFD) {
		s.byFD = append(s.byFD, make([]*client, c.fd+1-len(s.byFD))...)
	}
	s.byFD[c.fd] = c
}

// reset returns the state of the connection to that of a new one. Who connects while no password is set stays
// authenticated when one is set later, as in Redis.
func (s *Server) reset(c *client) {
	c.proto = resp.RESP2
	c.db = 0
	c.authenticated = s.cfg.RequirePass == ""
	c.noEvict = false
	c.name = ""
}

// mustAuthenticate reports whether the client still owes the password.
func (s *Server) mustAuthenticate(c *client) bool {
	return s.cfg.RequirePass != "" && !c.authenticated
}

// compact moves replies that are still to be written to the front when at least half of the buffer was written, so that
// a client which never quite catches up does not make it grow for ever.
func (c *client) compact() {
	if c.written > 0 && c.written >= len(c.out)/2 {
		c.out = c.out[:copy(c.out, c.out[c.written:])]
		c.written = 0
	}
}

// unsent returns the bytes of replies that the socket has not taken, those that are held included.
func (c *client) unsent() int { return len(c.out) - c.written }

// sendable returns the replies that the socket may have now.
func (c *client) sendable() []byte { return c.out[c.written : len(c.out)-c.held.bytes] }

// memory returns the bytes of the client's buffers.
func (c *client) memory() int64 {
	lib := c.library()
	n := cap(c.in) + cap(c.out) + cap(c.held.holds)*holdSize + len(c.name) + len(lib.name) + len(lib.version) + clientSize
	if c.parser != nil {
		n += c.parser.Memory()
	}
	return int64(n)
}

// clientSize is about what a client takes without its buffers.
const clientSize = 512

// shrink gives buffers of an idle client back.
func (c *client) shrink() {
	if len(c.in) == 0 {
		c.in = nil
	}
	if len(c.out) == 0 {
		c.out = nil
	}
	if c.parser != nil {
		c.parser.Release()
	}
}

// localAddr returns the address that the client connected to.
func (c *client) localAddr() netip.AddrPort {
	sa, err := unix.Getsockname(c.fd)
	if err != nil {
		return netip.AddrPort{}
	}
	return addrPortOf(sa)
}

// byID returns all clients, oldest first.
func (s *Server) byID() []*client {
	return slices.SortedFunc(slices.Values(s.clients), func(a, b *client) int { return cmp.Compare(a.id, b.id) })
}

// describe renders a client as CLIENT LIST does (networking.c, catClientInfoString). Fields of features that this server
// lacks have the value that Redis shows when they are not used. tot-cmds, the requests before this one, is of Redis 8. The
// last three are our own, in milliseconds: age, idle time, and time since the client's FIN, -1 as long as there is none. A
// client that waits for its delayed close (CloseDelay) is shown as long as its socket is open; fin-ms tells it from the
// others, and events lacks the r, since it is not read from.
func (s *Server) describe(b *strings.Builder, c *client) {
	cmd := "NULL"
	if c.lastCmd != nil {
		cmd = c.lastCmd.fullName
	}
	flags := ""
	if c.closeAfterReply {
		flags += "c"
	}
	if c.noEvict {
		flags += "e"
	}
	if flags == "" {
		flags = "N"
	}
	events, fin := "r", int64(-1)
	if c.leaving != nil {
		events, fin = "", (s.clock.now - c.finished).Milliseconds()
	}
	if c.wantWrite {
		events += "w"
	}
	age, idle := s.clock.now-c.created, s.clock.now-c.lastSeen
	unsent, lib := c.unsent(), c.library()
	fmt.Fprintf(b, "id=%d addr=%s laddr=%s fd=%d name=%s age=%d idle=%d flags=%s db=%d sub=0 psub=0 ssub=0 multi=-1 qbuf=%d qbuf-free=%d argv-mem=0 multi-mem=0 rbs=%d rbp=%d obl=%d oll=0 omem=%d tot-mem=%d events=%s cmd=%s user=default redir=-1 resp=%d lib-name=%s lib-ver=%s tot-cmds=%d age-ms=%d idle-ms=%d fin-ms=%d",
		c.id, c.addr(), c.localAddr(), c.fd, c.name, age/time.Second, idle/time.Second, flags, c.db, len(c.in), cap(c.in)-len(c.in), cap(c.out), cap(c.out), unsent, unsent, c.memory(), events, cmd, c.proto, lib.name, lib.version, c.requests, age.Milliseconds(), idle.Milliseconds(), fin)
}

// bulk replies with a string, unless that goes beyond what the client may let pile up: then it only notes that.
func (s *Server) bulk(c *client, b []byte) {
	if s.overOutputLimit(c, len(b)) {
		s.stats.outputLimit++
		s.doom(c, byServer)
		return
	}
	c.out = resp.AppendBulk(c.out, b)
}

// overOutputLimit reports whether more bytes of replies would be too many.
func (s *Server) overOutputLimit(c *client, more int) bool {
	return !c.doomed && c.unsent()+more > s.cfg.OutputBufferLimit
}

func (c *client) ok()           { c.out = append(c.out, "+OK\r\n"...) }
func (c *client) null()         { c.out = resp.AppendNull(c.out, c.proto) }
func (c *client) nullArray()    { c.out = resp.AppendNullArray(c.out, c.proto) }
func (c *client) int(n int64)   { c.out = resp.AppendInt(c.out, n) }
func (c *client) array(n int)   { c.out = resp.AppendArray(c.out, n) }
func (c *client) dict(n int)    { c.out = resp.AppendMap(c.out, n, c.proto) }
func (c *client) set(n int)     { c.out = resp.AppendSet(c.out, n, c.proto) }
func (c *client) text(s string) { c.out = resp.AppendBulk(c.out, s) }
func (c *client) simple(s string) {
	c.out = resp.AppendSimple(c.out, s)
}

// document replies with text for people: RESP3 has a type for it.
func (c *client) document(s string) { c.out = resp.AppendVerbatim(c.out, "txt", s, c.proto) }
