package server

import (
	"fmt"
	"os"
	"runtime"
	"strings"
	"time"

	"golang.org/x/sys/unix"
)

// infoSection is a part of INFO.
type infoSection struct {
	name  string
	write func(s *Server, b *strings.Builder)
}

// infoSections returns them in the order in which they are printed.
func infoSections() []infoSection {
	return []infoSection{
		{"Server", infoServer}, {"Clients", infoClients}, {"Memory", infoMemory}, {"Stats", infoStats},
		{"CPU", infoCPU}, {"Keyspace", infoKeyspace}, {"Connlab", infoConnlab},
	}
}

func info(s *Server, c *client, args [][]byte) {
	wanted := map[string]bool{}
	for _, a := range args[1:] {
		wanted[strings.ToLower(string(a))] = true
	}
	everything := len(args) == 1 || wanted["all"] || wanted["everything"] || wanted["default"]
	var b strings.Builder
	for _, section := range infoSections() {
		if !everything && !wanted[strings.ToLower(section.name)] {
			continue
		}
		if b.Len() > 0 {
			b.WriteString("\r\n")
		}
		b.WriteString("# " + section.name + "\r\n")
		section.write(s, &b)
	}
	c.document(b.String())
}

func field(b *strings.Builder, name string, value any) { fmt.Fprintf(b, "%s:%v\r\n", name, value) }

func infoServer(s *Server, b *strings.Builder) {
	up := int64(s.clock.now / time.Second)
	field(b, "redis_version", Version)
	field(b, "redis_mode", "standalone")
	field(b, "os", "Linux "+runtime.GOARCH)
	field(b, "arch_bits", 32<<(^uint(0)>>63))
	field(b, "multiplexing_api", "epoll")
	field(b, "go_version", runtime.Version())
	field(b, "process_id", os.Getpid())
	field(b, "tcp_port", s.addr.Port())
	field(b, "server_time_usec", time.Now().UnixMicro())
	field(b, "uptime_in_seconds", up)
	field(b, "uptime_in_days", up/86400)
	field(b, "hz", s.cfg.Hz)
	field(b, "configured_hz", s.cfg.Hz)
}

func infoClients(s *Server, b *strings.Builder) {
	maxIn, maxOut := 0, 0
	for _, c := range s.clients {
		maxIn, maxOut = max(maxIn, len(c.in)), max(maxOut, c.unsent())
	}
	field(b, "connected_clients", len(s.clients))
	field(b, "maxclients", s.cfg.MaxClients)
	field(b, "client_recent_max_input_buffer", maxIn)
	field(b, "client_recent_max_output_buffer", maxOut)
	field(b, "blocked_clients", 0)
}

func infoMemory(s *Server, b *strings.Builder) {
	var m runtime.MemStats
	runtime.ReadMemStats(&m)
	used := s.usedMemory()
	field(b, "used_memory", used)
	field(b, "used_memory_human", human(used))
	field(b, "used_memory_rss", m.Sys-m.HeapReleased)
	field(b, "used_memory_rss_human", human(int64(m.Sys-m.HeapReleased)))
	field(b, "used_memory_peak", max(s.stats.peakMemory, used))
	field(b, "used_memory_peak_human", human(max(s.stats.peakMemory, used)))
	field(b, "used_memory_dataset", s.keys.bytes)
	field(b, "mem_clients_normal", s.clientMemory)
	field(b, "maxmemory", s.cfg.MaxMemory)
	field(b, "maxmemory_human", human(s.cfg.MaxMemory))
	field(b, "maxmemory_policy", "noeviction")
	field(b, "mem_allocator", "go")
	field(b, "go_heap_alloc", m.HeapAlloc)
	field(b, "go_gc_cycles", m.NumGC)
}

// human renders bytes as Redis does (util.c, bytesToHuman).
func human(n int64) string {
	v := float64(n)
	for _, unit := range []string{"B", "K", "M", "G"} {
		if v < 1024 {
			if unit == "B" {
				return fmt.Sprintf("%dB", n)
			}
			return fmt.Sprintf("%.2f%s", v, unit)
		}
		v /= 1024
	}
	return fmt.Sprintf("%.2fT", v)
}

func infoStats(s *Server, b *strings.Builder) {
	st := &s.stats
	field(b, "total_connections_received", st.connections)
	field(b, "total_commands_processed", st.commands)
	field(b, "instantaneous_ops_per_sec", st.opsPerSec)
	field(b, "total_net_input_bytes", st.netIn)
	field(b, "total_net_output_bytes", st.netOut)
	field(b, "rejected_connections", st.rejected)
	field(b, "expired_keys", st.expired)
	field(b, "evicted_keys", 0)
	field(b, "keyspace_hits", st.hits)
	field(b, "keyspace_misses", st.misses)
	field(b, "client_query_buffer_limit_disconnections", st.queryLimit)
	field(b, "client_output_buffer_limit_disconnections", st.outputLimit)
	field(b, "protocol_errors", st.protocolErrors)
	field(b, "total_error_replies", st.errors)
	field(b, "total_reads_processed", st.reads)
	field(b, "total_writes_processed", st.writes)
}

func infoCPU(_ *Server, b *strings.Builder) {
	var self, thread unix.Rusage
	// Neither can fail: the arguments are constants that the kernel knows.
	_ = unix.Getrusage(unix.RUSAGE_SELF, &self)
	_ = unix.Getrusage(unix.RUSAGE_THREAD, &thread)
	seconds := func(t unix.Timeval) string { return fmt.Sprintf("%.6f", time.Duration(t.Nano()).Seconds()) }
	field(b, "used_cpu_sys", seconds(self.Stime))
	field(b, "used_cpu_user", seconds(self.Utime))
	field(b, "used_cpu_sys_main_thread", seconds(thread.Stime))
	field(b, "used_cpu_user_main_thread", seconds(thread.Utime))
}

func infoKeyspace(s *Server, b *strings.Builder) {
	for i := range s.keys.dbs {
		d := &s.keys.dbs[i]
		if len(d.keys) > 0 {
			fmt.Fprintf(b, "db%d:keys=%d,expires=%d,avg_ttl=0\r\n", i, len(d.keys), len(d.expires))
		}
	}
}

// infoConnlab reports what the lab injects and what it needs to judge it. Of the closes, each connection that is gone is
// counted once, by who ended it: the client by FIN, an error or the client's RST, the server; those rejected because there
// were too many are in none. closes_delayed is the number of connections that wait for theirs now (CloseDelay). Times are Unix microseconds of the system's
// clock, 0 if there was no stall yet.
//
// requests_total counts requests as MaxRequestRate does; request_wait_us_total and _max are their time until they were
// served at that rate, their own 1/MaxRequestRate included. held_replies are kept back now, each to one read;
// release_late_us_total and _max are how long after their time those in releases_total were let go. A request's mean time
// in the server is ServiceTime + request_wait_us_total/requests_total + release_late_us_total/releases_total.
func infoConnlab(s *Server, b *strings.Builder) {
	micro := func(t time.Time) int64 {
		if t.IsZero() {
			return 0
		}
		return t.UnixMicro()
	}
	accepting := 0
	if s.accept.stopped() {
		accepting = 1
	}
	field(b, "backlog_asked", s.cfg.Backlog)
	field(b, "backlog_granted", min(s.cfg.Backlog, s.somaxconn))
	field(b, "accepts_per_cycle", s.cfg.AcceptsPerCycle)
	field(b, "accept_rate", s.cfg.AcceptRate)
	field(b, "accepted_total", s.stats.connections)
	field(b, "accept_errors", s.stats.acceptErrors)
	field(b, "accept_paused", accepting)
	field(b, "closes_by_client", s.stats.closes[byClient])
	field(b, "closes_by_error", s.stats.closes[byError])
	field(b, "closes_by_server", s.stats.closes[byServer])
	field(b, "closes_delayed", s.leaving.Len())
	field(b, "loop_cycles", s.stats.cycles)
	field(b, "requests", s.stats.commands)
	field(b, "stall_mode", s.cfg.StallMode)
	field(b, "stall_armed_us", s.stall.armed.Microseconds())
	field(b, "stalls_total", s.stall.total)
	field(b, "stalled_us", s.stall.totalLength.Microseconds())
	field(b, "last_stall_start_us", micro(s.stall.start))
	field(b, "last_stall_end_us", micro(s.stall.end))
	field(b, "requests_total", s.stats.requests)
	field(b, "request_wait_us_total", s.stats.requestWait.Microseconds())
	field(b, "request_wait_us_max", s.stats.requestWaitMax.Microseconds())
	field(b, "held_replies", s.heldReplies)
	field(b, "releases_total", s.stats.releases)
	field(b, "release_late_us_total", s.stats.releaseLate.Microseconds())
	field(b, "release_late_us_max", s.stats.releaseLateMax.Microseconds())
}
