package server

import "time"

// cron is the housekeeping of serverCron, Hz times a second, between commands.
func (s *Server) cron() {
	s.clock.syncWall()
	s.stallIfDue()
	s.cronClients()
	s.cronExpire()
	s.sampleOps()
}

// idleBeforeShrink is how long a client must be silent before it loses its empty buffers (clientsCronResizeQueryBuffer).
const idleBeforeShrink = 2 * time.Second

// cronClients looks at every client about once a second: at least 5 a run, otherwise a Hz-th of them (clientsCron).
func (s *Server) cronClients() {
	n := len(s.clients)
	for range min(n, max(5, n/s.cfg.Hz)) {
		if s.cronClient++; s.cronClient >= n {
			s.cronClient = 0
		}
		c := s.clients[s.cronClient]
		idle := s.clock.now - c.lastSeen
		// Whole seconds, and more than asked for, as Redis counts. Who waits for its delayed close has its time already, and
		// who waits for a reply that is held is not idle.
		if s.cfg.Timeout > 0 && c.leaving == nil && c.held.len() == 0 && idle >= s.cfg.Timeout+time.Second {
			s.doom(c, byServer)
			continue
		}
		if idle > idleBeforeShrink {
			c.shrink()
		}
	}
	s.clientMemory = 0
	for _, c := range s.clients {
		s.clientMemory += c.memory()
	}
	s.stats.peakMemory = max(s.stats.peakMemory, s.usedMemory())
}

// usedMemory is what MaxMemory limits: keys, values and the buffers of clients, the latter as of the last cron.
func (s *Server) usedMemory() int64 { return s.keys.bytes + s.clientMemory }

// Bounds of the active expiry (expire.c): keys per look, share of expired ones above which it looks again, share of
// the time between two crons that it may use.
const (
	expireSample  = 20
	expireRepeat  = expireSample / 10
	expireCPUPart = 4
)

// cronExpire removes expired keys that nobody asks for.
func (s *Server) cronExpire() {
	deadline := s.clock.tick() + s.cronPeriod()/expireCPUPart
	now := s.clock.unixMilli()
	for i := range s.keys.dbs {
		for s.clock.tick() < deadline {
			gone := s.keys.expireSome(i, now, expireSample)
			s.stats.expired += int64(gone)
			if gone <= expireRepeat {
				break
			}
		}
	}
}

// sampleOps keeps the rate of commands over the last second or so.
func (s *Server) sampleOps() {
	passed := s.clock.now - s.stats.opsSampledAt
	if passed < time.Second {
		return
	}
	s.stats.opsPerSec = int64(float64(s.stats.commands-s.stats.opsSampled) / passed.Seconds())
	s.stats.opsSampledAt, s.stats.opsSampled = s.clock.now, s.stats.commands
}
