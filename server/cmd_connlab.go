package server

import (
	"fmt"
	"strconv"
	"time"

	"connlab/server/resp"
)

// secondsBelow turns seconds into a duration between 0 and most.
func secondsBelow(seconds float64, most time.Duration) time.Duration {
	if !(seconds > 0) { // NaN is not
		return 0
	}
	return time.Duration(min(seconds, most.Seconds()) * float64(time.Second))
}

// amount reads a number of units up to maxStall; it replies with an error and reports false if it is none.
func (s *Server) amount(c *client, arg []byte, unit time.Duration) (time.Duration, bool) {
	n, ok := resp.ParseInt(arg)
	if most := int64(maxStall / unit); !ok || n < 0 || n > most {
		s.error(c, fmt.Sprintf("ERR value is not an integer between 0 and %d", most))
		return 0, false
	}
	return time.Duration(n) * unit, true
}

func connlabStall(s *Server, c *client, args [][]byte) {
	d, ok := s.amount(c, args[2], time.Millisecond)
	switch {
	case !ok:
		return
	case len(args) == 3:
		s.armStall(d)
	case len(args) == 5 && isWord(args[3], "at"):
		unixMicro, ok := resp.ParseInt(args[4])
		if !ok {
			s.error(c, errNotInt)
			return
		}
		in := time.Until(time.UnixMicro(unixMicro))
		if in > maxStall {
			s.error(c, fmt.Sprintf("ERR the stall is to begin in %v, more than %v from now", in.Round(time.Second), maxStall))
			return
		}
		s.armStallAt(d, s.clock.tick()+max(in, -maxStall)) // as long as none can be, it is over by then
	default:
		s.error(c, errSyntax)
		return
	}
	c.ok()
}

func connlabCut(s *Server, c *client, args [][]byte) {
	share, err := strconv.ParseFloat(string(args[2]), 64)
	switch {
	case err != nil || !(share >= 0 && share <= 1): // NaN is neither
		s.error(c, "ERR value is not a share between 0 and 1")
	case len(args) == 3:
		c.int(s.cut(c, share, false))
	case len(args) == 4 && isWord(args[3], "rst"):
		c.int(s.cut(c, share, true))
	default:
		s.error(c, errSyntax)
	}
}

func connlabDelay(s *Server, c *client, args [][]byte) {
	d, ok := s.amount(c, args[3], time.Microsecond)
	if !ok {
		return
	}
	if string(args[2]) == "*" {
		s.delayAll = d
		c.ok()
		return
	}
	cmd := s.named(args[2])
	if cmd == nil {
		s.error(c, "ERR unknown command '"+excerpt(args[2])+"'")
		return
	}
	cmd.delay = d
	c.ok()
}

func connlabAccept(s *Server, c *client, args [][]byte) {
	var err error
	switch {
	case isWord(args[2], "resume") && len(args) == 3:
		err = s.resumeAccept()
	case isWord(args[2], "pause") && len(args) <= 4:
		var until time.Duration
		if len(args) == 4 {
			d, ok := s.amount(c, args[3], time.Millisecond)
			if !ok {
				return
			}
			until = s.clock.now + max(d, 1)
		}
		err = s.pauseAccept(until)
	default:
		s.error(c, errSyntax)
		return
	}
	if err != nil {
		s.error(c, "ERR "+err.Error())
		return
	}
	c.ok()
}
