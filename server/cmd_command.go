package server

import (
	"cmp"
	"slices"
	"strings"
)

// sorted returns the rows by name.
func sorted(m map[string]*command) []*command {
	rows := make([]*command, 0, len(m))
	for _, cmd := range m {
		rows = append(rows, cmd)
	}
	slices.SortFunc(rows, func(a, b *command) int { return cmp.Compare(a.name, b.name) })
	return rows
}

// named returns the row of a command, or of a subcommand as "client|id".
func (s *Server) named(name []byte) *command {
	container, sub, isSub := strings.Cut(string(name), "|")
	cmd := find(s.commands, []byte(container))
	if cmd != nil && isSub {
		return find(cmd.byName, []byte(sub))
	}
	return cmd
}

func commandCount(s *Server, c *client, _ [][]byte) { c.int(int64(len(s.commands))) }

func commandAll(s *Server, c *client, _ [][]byte) {
	rows := sorted(s.commands)
	c.array(len(rows))
	for _, cmd := range rows {
		c.commandInfo(cmd)
	}
}

func commandInfo(s *Server, c *client, args [][]byte) {
	if len(args) == 2 {
		commandAll(s, c, args)
		return
	}
	c.array(len(args) - 2)
	for _, name := range args[2:] {
		if cmd := s.named(name); cmd != nil {
			c.commandInfo(cmd)
		} else {
			c.nullArray()
		}
		if s.overOutputLimit(c, 0) {
			return // execute closes the client
		}
	}
}

// commandInfo appends the ten elements that Redis 7 has for a command. Key specifications, which describe what
// first, last and step cannot, are left empty.
func (c *client) commandInfo(cmd *command) {
	c.array(10)
	c.text(cmd.fullName)
	c.int(int64(cmd.arity))
	var names, categories []string
	for _, f := range []struct {
		bit            flags
		name, category string
	}{
		{flagWrite, "write", "@write"}, {flagReadonly, "readonly", "@read"}, {flagDenyOOM, "denyoom", ""},
		{flagAdmin, "admin", "@admin"}, {flagFast, "fast", "@fast"}, {flagNoAuth, "no_auth", ""},
	} {
		if cmd.flags&f.bit == 0 {
			continue
		}
		names = append(names, f.name)
		if f.category != "" {
			categories = append(categories, f.category)
		}
	}
	if cmd.flags&flagFast == 0 {
		categories = append(categories, "@slow")
	}
	c.set(len(names))
	for _, n := range names {
		c.simple(n)
	}
	c.int(int64(cmd.keys.first))
	c.int(int64(cmd.keys.last))
	c.int(int64(cmd.keys.step))
	c.set(len(categories))
	for _, n := range categories {
		c.simple(n)
	}
	c.array(0)
	c.array(0)
	c.array(len(cmd.byName))
	for _, sub := range sorted(cmd.byName) {
		c.commandInfo(sub)
	}
}

func commandDocs(s *Server, c *client, args [][]byte) {
	var rows []*command
	if len(args) == 2 {
		rows = sorted(s.commands)
	}
	for _, name := range args[2:] {
		// A row once is enough, and keeps a request that names one a million times from a reply a hundred times its size.
		if cmd := s.named(name); cmd != nil && !slices.Contains(rows, cmd) {
			rows = append(rows, cmd)
		}
	}
	c.commandDocs(rows)
}

func (c *client) commandDocs(rows []*command) {
	c.dict(len(rows))
	for _, cmd := range rows {
		c.text(cmd.fullName)
		fields := 3
		if len(cmd.byName) > 0 {
			fields++
		}
		c.dict(fields)
		c.text("summary")
		c.text(cmd.summary)
		c.text("since")
		c.text(cmd.since)
		c.text("group")
		c.text(cmd.group)
		if len(cmd.byName) > 0 {
			c.text("subcommands")
			c.commandDocs(sorted(cmd.byName))
		}
	}
}

func commandList(s *Server, c *client, args [][]byte) {
	pattern := "*"
	switch {
	case len(args) == 2:
	case len(args) == 5 && isWord(args[2], "filterby") && isWord(args[3], "pattern"):
		pattern = strings.ToLower(string(args[4]))
	default:
		s.error(c, errSyntax)
		return
	}
	var names []string
	for _, cmd := range sorted(s.commands) {
		if glob(pattern, cmd.name) {
			names = append(names, cmd.name)
		}
	}
	c.array(len(names))
	for _, n := range names {
		c.text(n)
	}
}
