package server

import (
	"strings"

	"connlab/server/resp"
)

func clientID(_ *Server, c *client, _ [][]byte) { c.int(c.id) }

func clientGetName(_ *Server, c *client, _ [][]byte) {
	if c.name == "" {
		c.null()
		return
	}
	c.text(c.name)
}

func clientSetName(s *Server, c *client, args [][]byte) {
	if msg := nameError("Client names", args[2]); msg != "" {
		s.error(c, msg)
		return
	}
	c.name = string(args[2])
	c.ok()
}

func clientSetInfo(s *Server, c *client, args [][]byte) {
	lib := c.library()
	field := &lib.name
	switch {
	case isWord(args[2], "lib-ver"):
		field = &lib.version
	case !isWord(args[2], "lib-name"):
		s.error(c, "ERR Unrecognized option '"+excerpt(args[2])+"'")
		return
	}
	if msg := nameError(strings.ToLower(string(args[2])), args[3]); msg != "" {
		s.error(c, msg)
		return
	}
	*field = string(args[3])
	c.lib = &lib
	c.ok()
}

func clientNoEvict(s *Server, c *client, args [][]byte) {
	switch {
	case isWord(args[2], "on"):
		c.noEvict = true
	case isWord(args[2], "off"):
		c.noEvict = false
	default:
		s.error(c, errSyntax)
		return
	}
	c.ok()
}

func clientInfo(s *Server, c *client, _ [][]byte) {
	var b strings.Builder
	s.describe(&b, c)
	b.WriteByte('\n')
	c.document(b.String())
}

func clientList(s *Server, c *client, args [][]byte) {
	var wanted func(*client) bool
	switch {
	case len(args) == 2:
		wanted = func(*client) bool { return true }
	case len(args) == 4 && isWord(args[2], "type"):
		normal, ok := clientType(args[3])
		if !ok {
			s.error(c, "ERR Unknown client type '"+excerpt(args[3])+"'")
			return
		}
		wanted = func(*client) bool { return normal }
	case len(args) > 3 && isWord(args[2], "id"):
		ids := map[int64]bool{}
		for _, a := range args[3:] {
			id, ok := resp.ParseInt(a)
			if !ok || id <= 0 {
				s.error(c, "ERR Invalid client ID")
				return
			}
			ids[id] = true
		}
		wanted = func(o *client) bool { return ids[o.id] }
	default:
		s.error(c, errSyntax)
		return
	}
	var b strings.Builder
	for _, o := range s.byID() {
		if wanted(o) && !o.doomed {
			s.describe(&b, o)
			b.WriteByte('\n')
		}
		if s.overOutputLimit(c, b.Len()) {
			break // execute closes the client
		}
	}
	c.document(b.String())
}

// clientType reads a type of client; all of this server's are normal ones.
func clientType(name []byte) (normal, ok bool) {
	switch strings.ToLower(string(name)) {
	case "normal":
		return true, true
	case "master", "replica", "slave", "pubsub":
		return false, true
	}
	return false, false
}

// killFilter is the conditions of CLIENT KILL. Zero values are conditions not given; an empty address is one that no
// client has.
type killFilter struct {
	id          int64
	addr, laddr *string
	otherType   bool // a type that no client here has
	keepMe      bool
}

func clientKill(s *Server, c *client, args [][]byte) {
	if len(args) == 3 {
		if s.kill(c, killFilter{addr: new(string(args[2]))}) == 0 {
			s.error(c, "ERR No such client")
			return
		}
		c.ok()
		return
	}
	filter, msg := parseKillFilter(args[2:])
	if msg != "" {
		s.error(c, msg)
		return
	}
	c.int(s.kill(c, filter))
}

// parseKillFilter reads the new form of CLIENT KILL; msg is the error for the client.
func parseKillFilter(args [][]byte) (f killFilter, msg string) {
	f.keepMe = true
	if len(args)%2 != 0 {
		return f, errSyntax
	}
	for i := 0; i < len(args); i += 2 {
		value := args[i+1]
		switch strings.ToLower(string(args[i])) {
		case "id":
			id, ok := resp.ParseInt(value)
			if !ok || id <= 0 {
				return f, "ERR client-id should be greater than 0"
			}
			f.id = id
		case "addr":
			f.addr = new(string(value))
		case "laddr":
			f.laddr = new(string(value))
		case "type":
			normal, ok := clientType(value)
			if !ok {
				return f, "ERR Unknown client type '" + excerpt(value) + "'"
			}
			f.otherType = !normal
		case "user":
			if string(value) != "default" {
				return f, "ERR No such user '" + excerpt(value) + "'"
			}
		case "skipme":
			switch {
			case isWord(value, "yes"):
				f.keepMe = true
			case isWord(value, "no"):
				f.keepMe = false
			default:
				return f, errSyntax
			}
		default:
			return f, errSyntax
		}
	}
	return f, ""
}

// kill has every client closed that meets all conditions and returns their number. The asking client gets its reply
// first.
func (s *Server) kill(c *client, f killFilter) (n int64) {
	for _, o := range s.clients {
		if o.doomed || f.otherType ||
			f.id != 0 && o.id != f.id ||
			f.addr != nil && o.addr().String() != *f.addr ||
			f.laddr != nil && o.localAddr().String() != *f.laddr ||
			f.keepMe && o == c {
			continue
		}
		n++
		if o == c {
			c.closeAfterReply = true
		} else {
			s.doom(o, byServer)
		}
	}
	return n
}
