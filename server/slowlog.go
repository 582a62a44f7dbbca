package server

import (
	"fmt"
	"slices"
	"strconv"
	"strings"
	"time"
)

// slowlog keeps the slowest commands, newest last.
type slowlog struct {
	entries []slowEntry
	nextID  int64
}

type slowEntry struct {
	id       int64
	unix     int64 // seconds
	duration time.Duration
	args     []string
	addr     string
	name     string
}

// Limits of what is kept of a command (slowlog.h).
const (
	slowlogMaxArgs   = 32
	slowlogMaxString = 128
)

// add notes a command.
func (l *slowlog) add(c *client, args [][]byte, secret bool, unix int64, d time.Duration, maxLen int) {
	e := slowEntry{id: l.nextID, unix: unix, duration: d, addr: c.addr().String(), name: strings.Clone(c.name[:min(len(c.name), slowlogMaxString)])}
	l.nextID++
	for i, a := range args {
		switch {
		case i == slowlogMaxArgs-1 && len(args) > slowlogMaxArgs:
			e.args = append(e.args, fmt.Sprintf("... (%d more arguments)", len(args)-slowlogMaxArgs+1))
		case secret && i > 0:
			e.args = append(e.args, "(redacted)")
		case len(a) > slowlogMaxString:
			e.args = append(e.args, fmt.Sprintf("%s... (%d more bytes)", a[:slowlogMaxString], len(a)-slowlogMaxString))
		default:
			e.args = append(e.args, string(a))
		}
		if len(e.args) == slowlogMaxArgs {
			break
		}
	}
	l.entries = append(l.entries, e)
	l.trim(maxLen)
}

func (l *slowlog) trim(maxLen int) {
	if n := len(l.entries) - maxLen; n > 0 {
		l.entries = slices.Delete(l.entries, 0, n)
	}
}

func slowlogLen(s *Server, c *client, _ [][]byte) { c.int(int64(len(s.slowlog.entries))) }

func slowlogReset(s *Server, c *client, _ [][]byte) {
	s.slowlog.entries = nil
	c.ok()
}

func slowlogGet(s *Server, c *client, args [][]byte) {
	count := 10
	if len(args) > 3 {
		s.error(c, "ERR unknown subcommand or wrong number of arguments for '"+excerpt(args[1])+"'. Try SLOWLOG HELP.")
		return
	}
	if len(args) == 3 {
		n, err := strconv.Atoi(string(args[2]))
		if err != nil || n < -1 {
			s.error(c, "ERR count should be greater than or equal to -1")
			return
		}
		if count = n; n == -1 {
			count = len(s.slowlog.entries)
		}
	}
	entries := s.slowlog.entries
	entries = entries[len(entries)-min(count, len(entries)):]
	c.array(len(entries))
	for i := len(entries) - 1; i >= 0; i-- {
		e := &entries[i]
		c.array(6)
		c.int(e.id)
		c.int(e.unix)
		c.int(e.duration.Microseconds())
		c.array(len(e.args))
		for _, a := range e.args {
			c.text(a)
		}
		c.text(e.addr)
		c.text(e.name)
		if s.overOutputLimit(c, 0) {
			return // execute closes the client
		}
	}
}
