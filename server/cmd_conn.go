package server

import (
	"bytes"
	"crypto/sha256"
	"crypto/subtle"
	"fmt"
	"strconv"

	"connlab/server/resp"
)

// Version is the Redis version whose behaviour this server follows, as INFO and HELLO tell it. Client libraries
// choose by it what they may use.
const Version = "7.0.15"

func ping(s *Server, c *client, args [][]byte) {
	switch len(args) {
	case 1:
		c.out = append(c.out, "+PONG\r\n"...)
	case 2:
		s.bulk(c, args[1])
	default:
		s.error(c, "ERR wrong number of arguments for 'ping' command")
	}
}

func echo(s *Server, c *client, args [][]byte) { s.bulk(c, args[1]) }

func quit(_ *Server, c *client, _ [][]byte) {
	c.ok()
	c.closeAfterReply = true
}

func reset(s *Server, c *client, _ [][]byte) {
	s.reset(c)
	c.simple("RESET")
}

func selectDB(s *Server, c *client, args [][]byte) {
	n, ok := resp.ParseInt(args[1])
	switch {
	case !ok:
		s.error(c, errNotInt)
	case int64(int32(n)) != n:
		s.error(c, "ERR value is out of range, value must between -2147483648 and 2147483647")
	case n < 0 || n >= databases:
		s.error(c, "ERR DB index is out of range")
	default:
		c.db = int(n)
		c.ok()
	}
}

const (
	errWrongPass = "WRONGPASS invalid username-password pair or user is disabled."
	errNoPass    = "ERR AUTH <password> called without any password configured for the default user. Are you sure your configuration is correct?"
	errHelloAuth = "NOAUTH HELLO must be called with the client already authenticated, otherwise the HELLO AUTH <user> <pass> option can be used to authenticate the client and select the RESP protocol version at the same time"
)

// passes reports whether the pair is right. Without a password set the one user, default, has any.
func (s *Server) passes(user string, pass []byte) bool {
	if user != "default" {
		return false
	}
	if s.cfg.RequirePass == "" {
		return true
	}
	want, got := sha256.Sum256([]byte(s.cfg.RequirePass)), sha256.Sum256(pass)
	return subtle.ConstantTimeCompare(want[:], got[:]) == 1
}

func auth(s *Server, c *client, args [][]byte) {
	user, pass := "default", args[1]
	switch {
	case len(args) > 3:
		s.error(c, errSyntax)
		return
	case len(args) == 3:
		user, pass = string(args[1]), args[2]
	case s.cfg.RequirePass == "":
		s.error(c, errNoPass)
		return
	}
	if !s.passes(user, pass) {
		s.error(c, errWrongPass)
		return
	}
	c.authenticated = true
	c.ok()
}

func hello(s *Server, c *client, args [][]byte) {
	proto := c.proto
	if len(args) > 1 {
		n, ok := resp.ParseInt(args[1])
		if !ok {
			s.error(c, "ERR Protocol version is not an integer or out of range")
			return
		}
		if proto = resp.Version(n); proto != resp.RESP2 && proto != resp.RESP3 {
			s.error(c, "NOPROTO unsupported protocol version")
			return
		}
	}
	var name []byte
	named, authenticated := false, c.authenticated
	for i := 2; i < len(args); i++ {
		switch more := len(args) - 1 - i; {
		case isWord(args[i], "auth") && more >= 2:
			if !s.passes(string(args[i+1]), args[i+2]) {
				s.error(c, errWrongPass)
				return
			}
			authenticated = true
			i += 2
		case isWord(args[i], "setname") && more >= 1:
			name, named = args[i+1], true
			if msg := nameError("Client names", name); msg != "" {
				s.error(c, msg)
				return
			}
			i++
		default:
			s.error(c, "ERR Syntax error in HELLO option '"+excerpt(args[i])+"'")
			return
		}
	}
	if s.cfg.RequirePass != "" && !authenticated {
		s.error(c, errHelloAuth)
		return
	}
	c.authenticated = authenticated
	if named {
		c.name = string(name)
	}
	c.proto = proto
	c.dict(7)
	c.text("server")
	c.text("redis")
	c.text("version")
	c.text(Version)
	c.text("proto")
	c.int(int64(c.proto))
	c.text("id")
	c.int(c.id)
	c.text("mode")
	c.text("standalone")
	c.text("role")
	c.text("master")
	c.text("modules")
	c.array(0)
}

// maxName bounds what a client calls itself and its library. Redis has no bound but proto-max-bulk-len, so that each
// client could lengthen CLIENT LIST by half a gigabyte.
const maxName = 64 << 10

// nameError says why a name cannot stand in a line of CLIENT LIST, or nothing if it can.
func nameError(what string, name []byte) string {
	if len(name) > maxName {
		return fmt.Sprintf("ERR %s cannot be longer than %d bytes.", what, maxName)
	}
	if bytes.ContainsFunc(name, func(r rune) bool { return r < '!' || r > '~' }) {
		return "ERR " + what + " cannot contain spaces, newlines or special characters."
	}
	return ""
}

func debugSleep(s *Server, c *client, args [][]byte) {
	seconds, err := strconv.ParseFloat(string(args[2]), 64)
	if err != nil {
		seconds = 0 // Redis reads it with strtod and does not look
	}
	s.standStill(secondsBelow(seconds, maxStall))
	c.ok()
}
