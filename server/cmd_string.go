package server

import (
	"math"
	"strconv"
	"strings"

	"connlab/server/resp"
)

const (
	errNotInt     = "ERR value is not an integer or out of range"
	errSyntax     = "ERR syntax error"
	errOutOfRange = "ERR value is out of range, must be positive"
)

// lookup returns the entry of a key and counts what became of it.
func (s *Server) lookup(c *client, key []byte) *entry {
	e, expired := s.keys.lookup(c.db, key, s.clock.unixMilli())
	if expired {
		s.stats.expired++
	}
	return e
}

// lookupRead is lookup for commands that read, which INFO counts as hits and misses.
func (s *Server) lookupRead(c *client, key []byte) *entry {
	e := s.lookup(c, key)
	if e != nil {
		s.stats.hits++
	} else {
		s.stats.misses++
	}
	return e
}

func (s *Server) replyValue(c *client, e *entry) {
	if e == nil {
		c.null()
		return
	}
	s.bulk(c, e.value)
}

func get(s *Server, c *client, args [][]byte) { s.replyValue(c, s.lookupRead(c, args[1])) }

func mget(s *Server, c *client, args [][]byte) {
	c.array(len(args) - 1)
	for _, key := range args[1:] {
		s.replyValue(c, s.lookupRead(c, key))
		if c.doomed {
			return
		}
	}
}

func mset(s *Server, c *client, args [][]byte) {
	if len(args)%2 == 0 {
		s.error(c, "ERR wrong number of arguments for 'mset' command")
		return
	}
	for i := 1; i < len(args); i += 2 {
		e := s.keys.set(c.db, args[i], args[i+1])
		s.keys.expireAt(c.db, e, 0)
	}
	c.ok()
}

func incr(s *Server, c *client, args [][]byte) {
	var n int64
	e := s.lookup(c, args[1])
	if e != nil {
		var ok bool
		if n, ok = resp.ParseInt(e.value); !ok {
			s.error(c, errNotInt)
			return
		}
	}
	if n == math.MaxInt64 {
		s.error(c, "ERR increment or decrement would overflow")
		return
	}
	n++
	var digits [20]byte
	s.keys.set(c.db, args[1], strconv.AppendInt(digits[:0], n, 10))
	c.int(n)
}

// setOptions is what SET may be told behind key and value.
type setOptions struct {
	nx, xx, get, keepTTL bool
	expireAt             int64 // Unix milliseconds, 0 for none
}

func set(s *Server, c *client, args [][]byte) {
	var opt setOptions
	if len(args) > 3 {
		var msg string
		if opt, msg = s.parseSetOptions(args[3:]); msg != "" {
			s.error(c, msg)
			return
		}
	}
	e := s.lookup(c, args[1])
	if opt.get {
		s.replyValue(c, e)
	}
	if opt.nx && e != nil || opt.xx && e == nil {
		if !opt.get {
			c.null()
		}
		return
	}
	e = s.keys.set(c.db, args[1], args[2])
	if !opt.keepTTL {
		s.keys.expireAt(c.db, e, opt.expireAt)
	}
	if !opt.get {
		c.ok()
	}
}

// parseSetOptions reads them; msg is the error for the client.
func (s *Server) parseSetOptions(args [][]byte) (opt setOptions, msg string) {
	var unit string
	var amount []byte
	for i := 0; i < len(args); i++ {
		switch name := strings.ToUpper(string(args[i])); name {
		case "NX":
			opt.nx = true
		case "XX":
			opt.xx = true
		case "GET":
			opt.get = true
		case "KEEPTTL":
			opt.keepTTL = true
		case "EX", "PX", "EXAT", "PXAT":
			i++
			if i == len(args) || unit != "" {
				return opt, errSyntax
			}
			unit, amount = name, args[i]
		default:
			return opt, errSyntax
		}
	}
	if opt.nx && opt.xx || opt.keepTTL && unit != "" {
		return opt, errSyntax
	}
	if unit == "" {
		return opt, ""
	}
	n, ok := resp.ParseInt(amount)
	if !ok {
		return opt, errNotInt
	}
	const invalid = "ERR invalid expire time in 'set' command"
	if n <= 0 {
		return opt, invalid
	}
	if unit == "EX" || unit == "EXAT" {
		if n > math.MaxInt64/1000 {
			return opt, invalid
		}
		n *= 1000
	}
	if unit == "EX" || unit == "PX" {
		now := s.clock.unixMilli()
		if n > math.MaxInt64-now {
			return opt, invalid
		}
		n += now
	}
	opt.expireAt = n
	return opt, ""
}
