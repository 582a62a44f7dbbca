package server

import (
	"bytes"
	"fmt"
	"strings"
	"time"
)

// command is one row of the command table, which dispatch, COMMAND and the HELP subcommands share.
type command struct {
	name    string // lower case
	arity   int    // arguments with the command's name (and the subcommand's); negative: at least so many
	flags   flags
	keys    keySpec
	group   string
	since   string
	summary string
	usage   string // of a subcommand, for HELP: what follows its name
	run     func(s *Server, c *client, args [][]byte)
	subs    []command // of a container: run is then for the container alone, nil if it needs one

	fullName string // "client|id"; set by index
	byName   map[string]*command
	delay    time.Duration // service time added by CONNLAB DELAY, 0 for none
}

// flags is what dispatch and clients need to know of a command.
type flags uint16

const (
	flagWrite       flags = 1 << iota
	flagReadonly          // the two are exclusive
	flagDenyOOM           // refused above MaxMemory
	flagAdmin             // for operators
	flagFast              // constant time
	flagNoAuth            // allowed before AUTH
	flagSecret            // its arguments are not shown in SLOWLOG
	flagControl           // for looking at the server and setting it: no part in ServiceTime and MaxRequestRate; set by index
	flagEveryWorker       // means the whole server: a worker takes it from its control connection only
)

// keySpec says where the keys are among the arguments; last is negative when counted from the end.
type keySpec struct{ first, last, step int }

// index makes the rows findable by name.
func index(table []command) map[string]*command {
	m := make(map[string]*command, len(table))
	for i := range table {
		cmd := &table[i]
		cmd.fullName = cmd.name
		if cmd.group == groupServer || cmd.group == groupConnlab || cmd.name == "client" {
			cmd.flags |= flagControl
		}
		m[cmd.name] = cmd
		if cmd.subs == nil {
			continue
		}
		cmd.subs = append(cmd.subs, command{name: "help", arity: 2, since: "5.0.0", summary: "Prints this help.", run: help})
		cmd.byName = index(cmd.subs)
		for j := range cmd.subs {
			sub := &cmd.subs[j]
			sub.fullName = cmd.name + "|" + sub.name
			sub.group = cmd.group
			sub.flags |= cmd.flags & flagControl
		}
	}
	return m
}

// find returns the row for a name in any case.
func find(m map[string]*command, name []byte) *command {
	var lower [32]byte
	if len(name) > len(lower) {
		return nil
	}
	for i, ch := range name {
		if ch >= 'A' && ch <= 'Z' {
			ch += 'a' - 'A'
		}
		lower[i] = ch
	}
	return m[string(lower[:len(name)])]
}

// execute serves one request. The checks are in the order of Redis's processCommand.
func (s *Server) execute(c *client, args [][]byte) {
	start := s.clock.now
	s.stats.commands++
	cmd := find(s.commands, args[0])
	if (cmd == nil || cmd.flags&flagControl == 0) && c != s.control {
		s.toServe = true
	}
	if cmd == nil {
		s.error(c, unknownCommand(args))
		return
	}
	if cmd.byName != nil && len(args) > 1 {
		sub := find(cmd.byName, args[1])
		if sub == nil {
			s.error(c, fmt.Sprintf("ERR unknown subcommand '%s'. Try %s HELP.", excerpt(args[1]), strings.ToUpper(cmd.name)))
			return
		}
		cmd = sub
	}
	switch {
	case cmd.arity > 0 && len(args) != cmd.arity || len(args) < -cmd.arity:
		s.error(c, "ERR wrong number of arguments for '"+cmd.fullName+"' command")
		return
	case cmd.flags&flagNoAuth == 0 && s.mustAuthenticate(c):
		s.error(c, "NOAUTH Authentication required.")
		return
	case cmd.flags&flagEveryWorker != 0 && s.isWorker() && c != s.control:
		s.error(c, "ERR this is one worker of several: '"+cmd.fullName+"' is taken at the control address, which passes it on to all")
		return
	case cmd.flags&flagDenyOOM != 0 && s.cfg.MaxMemory > 0 && s.usedMemory() > s.cfg.MaxMemory:
		s.error(c, "OOM command not allowed when used memory > 'maxmemory'.")
		return
	}
	c.lastCmd = cmd
	cmd.run(s, c, args)
	if d := s.serviceTime(cmd); d > 0 {
		s.standStill(d)
	}
	if took := s.clock.tick() - start; s.cfg.SlowlogSlowerThan >= 0 && took >= s.cfg.SlowlogSlowerThan {
		s.slowlog.add(c, args, cmd.flags&flagSecret != 0, s.clock.unixMilli()/1000, took, s.cfg.SlowlogMaxLen)
	}
	if s.overOutputLimit(c, 0) {
		s.stats.outputLimit++
		s.doom(c, byServer)
	}
}

// serviceTime is what CONNLAB DELAY adds to a command. CONNLAB itself is free of the delay for all, or nobody could take
// it back in time.
func (s *Server) serviceTime(cmd *command) time.Duration {
	if cmd.delay > 0 || cmd.group == groupConnlab {
		return cmd.delay
	}
	return s.delayAll
}

// unknownCommand quotes the beginning of the request, as Redis does.
func unknownCommand(args [][]byte) string {
	var b strings.Builder
	for _, a := range args[1:] {
		if b.Len() >= maxExcerpt {
			break
		}
		fmt.Fprintf(&b, "'%s' ", cString(a, maxExcerpt-b.Len()))
	}
	return fmt.Sprintf("ERR unknown command '%s', with args beginning with: %s", excerpt(args[0]), b.String())
}

// maxExcerpt is how many bytes of a request an error reply repeats.
const maxExcerpt = 128

// excerpt is what an error reply repeats of an argument.
func excerpt(arg []byte) string { return string(cString(arg, maxExcerpt)) }

// cString cuts at the first NUL and at n bytes, as printf's %.*s does.
func cString(b []byte, n int) []byte {
	if nul := bytes.IndexByte(b, 0); nul >= 0 {
		b = b[:nul]
	}
	return b[:min(len(b), n)]
}

// help replies with the usage of every subcommand of a container.
func help(s *Server, c *client, args [][]byte) {
	parent := find(s.commands, args[0])
	name := strings.ToUpper(parent.name)
	c.array(1 + 2*len(parent.subs))
	c.simple(name + " <subcommand> [<arg> [value] [opt] ...]. Subcommands are:")
	for i := range parent.subs {
		sub := &parent.subs[i]
		c.simple(strings.TrimSpace(strings.ToUpper(sub.name) + " " + sub.usage))
		c.simple("    " + sub.summary)
	}
}
