package server

import (
	"time"

	"golang.org/x/sys/unix"
)

// stallState is what has been asked for and what has happened.
type stallState struct {
	armed      time.Duration // length of a stall that is to come, 0 for none
	at         time.Duration // of the clock: when it begins, 0 for the next cron
	armedCycle int64         // the cycle that armed it
	nextEvery  time.Duration // of the clock: next periodic stall, 0 for not yet planned

	total       int64
	start, end  time.Time
	totalLength time.Duration
}

// armStall has the next cron stand still. The cron of the present cycle does not count, so that the reply to the
// client that asks is written first.
func (s *Server) armStall(d time.Duration) {
	s.stall.armed, s.stall.at = d, 0
	s.stall.armedCycle = s.stats.cycles
}

// armStallAt has a cron stand still from a time of the clock on. One that comes late ends on time, so that servers which
// are told the same are all still in between.
func (s *Server) armStallAt(d, at time.Duration) {
	s.armStall(d)
	s.stall.at = at
	s.nextCron = min(s.nextCron, at)
}

// planCron sets the time of the next cron: a period from now, or when a stall is to begin.
func (s *Server) planCron() {
	s.nextCron = s.clock.now + s.cronPeriod()
	if s.stall.armed > 0 && s.stall.at != 0 {
		s.nextCron = min(s.nextCron, s.stall.at)
	}
}

// stallIfDue is the injected fault: the cron stands still, where Redis once shrank the buffers of thousands of clients.
// No command is running, so nothing shows in SLOWLOG.
func (s *Server) stallIfDue() {
	if s.stall.armed > 0 && s.stats.cycles > s.stall.armedCycle && s.clock.now >= s.stall.at {
		d := s.stall.armed
		if s.stall.at != 0 {
			d -= s.clock.now - s.stall.at
		}
		s.stall.armed, s.stall.at = 0, 0
		if d > 0 {
			s.stallNow(d)
		}
	}
	if s.cfg.StallEvery == 0 || s.cfg.StallFor == 0 {
		s.stall.nextEvery = 0
		return
	}
	if s.stall.nextEvery == 0 {
		s.stall.nextEvery = s.clock.now + s.cfg.StallEvery
	}
	if s.clock.now >= s.stall.nextEvery {
		s.stall.nextEvery = max(s.stall.nextEvery, s.clock.now-s.cfg.StallEvery) + s.cfg.StallEvery
		s.stallNow(s.cfg.StallFor)
	}
}

func (s *Server) stallNow(d time.Duration) {
	s.tokens.idle() // what was not accepted during a stall that was asked for is not made up for
	s.stall.start = time.Now()
	s.standStill(d)
	s.stall.end = time.Now()
	s.stall.total++
	s.stall.totalLength += s.stall.end.Sub(s.stall.start)
	s.clock.tick()
}

// standStill keeps the thread from doing anything for d. Only Close ends it before. The sleep is one in the kernel,
// on the descriptor that Close writes to, and not time.Sleep, which would wake up to a millisecond late.
func (s *Server) standStill(d time.Duration) {
	end := time.Now().Add(d)
	for left := d; left > 0 && !s.closing.Load(); left = time.Until(end) {
		if s.cfg.StallMode == StallSpin {
			continue
		}
		ts := unix.NsecToTimespec(int64(left))
		wake := []unix.PollFd{{Fd: int32(s.wakeFD), Events: unix.POLLIN}}
		if _, err := unix.Ppoll(wake, &ts, nil); err != nil && err != unix.EINTR {
			return // not with these arguments
		}
	}
}
