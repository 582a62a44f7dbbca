package server

import (
	"math"
	"strings"

	"connlab/server/resp"
)

func del(s *Server, c *client, args [][]byte) {
	var n int64
	for _, key := range args[1:] {
		if s.lookup(c, key) != nil {
			s.keys.remove(c.db, string(key))
			n++
		}
	}
	c.int(n)
}

func exists(s *Server, c *client, args [][]byte) {
	var n int64
	for _, key := range args[1:] {
		if s.lookupRead(c, key) != nil {
			n++
		}
	}
	c.int(n)
}

func expire(s *Server, c *client, args [][]byte) {
	var nx, xx, gt, lt bool
	for _, a := range args[3:] {
		switch strings.ToUpper(string(a)) {
		case "NX":
			nx = true
		case "XX":
			xx = true
		case "GT":
			gt = true
		case "LT":
			lt = true
		default:
			s.error(c, "ERR Unsupported option "+excerpt(a))
			return
		}
	}
	if nx && (xx || gt || lt) {
		s.error(c, "ERR NX and XX, GT or LT options at the same time are not compatible")
		return
	}
	if gt && lt {
		s.error(c, "ERR GT and LT options at the same time are not compatible")
		return
	}
	seconds, ok := resp.ParseInt(args[2])
	if !ok {
		s.error(c, errNotInt)
		return
	}
	now := s.clock.unixMilli()
	if seconds > math.MaxInt64/1000 || seconds < math.MinInt64/1000 || seconds*1000 > math.MaxInt64-now {
		s.error(c, "ERR invalid expire time in 'expire' command")
		return
	}
	at := now + seconds*1000
	e := s.lookup(c, args[1])
	switch {
	case e == nil,
		nx && e.expireAt != 0,
		xx && e.expireAt == 0,
		gt && (e.expireAt == 0 || at <= e.expireAt), // no expiry counts as infinite
		lt && e.expireAt != 0 && at >= e.expireAt:
		c.int(0)
		return
	case at <= now:
		s.keys.remove(c.db, string(args[1]))
	default:
		s.keys.expireAt(c.db, e, at)
	}
	c.int(1)
}

func ttl(s *Server, c *client, args [][]byte) {
	e := s.lookupRead(c, args[1])
	switch {
	case e == nil:
		c.int(-2)
	case e.expireAt == 0:
		c.int(-1)
	default:
		c.int((e.expireAt - s.clock.unixMilli() + 500) / 1000)
	}
}

func dbsize(s *Server, c *client, _ [][]byte) { c.int(int64(len(s.keys.dbs[c.db].keys))) }

func flushall(s *Server, c *client, args [][]byte) {
	if len(args) > 2 || len(args) == 2 && !isWord(args[1], "async") && !isWord(args[1], "sync") {
		s.error(c, errSyntax)
		return
	}
	s.keys.init() // either way: the garbage collector is what takes the time
	c.ok()
}

// isWord compares regardless of case.
func isWord(arg []byte, word string) bool { return strings.EqualFold(string(arg), word) }
