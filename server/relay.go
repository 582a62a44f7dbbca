package server

import (
	"bytes"
	"context"
	"fmt"
	"net"
	"slices"
	"strconv"
	"strings"
	"sync"
	"time"

	"connlab/server/resp"
)

// relay passes commands on to every worker and makes one reply of theirs.
type relay struct {
	workers []*worker

	mu     sync.Mutex // one command at a time, as in a server of one thread
	broken error      // a worker failed to answer: replies and requests no longer belong together
}

// controlLimits bounds what a control connection may send.
var controlLimits = resp.Limits{MaxBulk: 64 << 10, MaxArgs: 1024, MaxInline: 64 << 10}

// stallLead is how far ahead of its beginning a stall is announced, so that every worker knows of it in time. A stall of one
// server waits for its next cron, up to 100 ms.
const stallLead = 50 * time.Millisecond

// awaitReady returns when every worker answers. That a worker has ended is for who waits for it to say.
func (r *relay) awaitReady(ctx context.Context) error {
	for _, w := range r.workers {
		_ = w.control.SetDeadline(time.Now().Add(workerPatience)) // cannot fail on an open socket
	}
	if _, err := r.ask(resp.AppendRequest(nil, "PING")); err != nil {
		select {
		case <-ctx.Done():
			return nil
		case <-time.After(workerPatience):
			return err
		}
	}
	for _, w := range r.workers {
		_ = w.control.SetDeadline(time.Time{})
	}
	return nil
}

// serve answers control connections until ctx is done.
func (r *relay) serve(ctx context.Context, l net.Listener) error {
	var conns sync.WaitGroup
	defer conns.Wait()
	stop := context.AfterFunc(ctx, func() {
		l.Close()
		for _, w := range r.workers {
			w.control.Close() // ends the wait for a reply
		}
	})
	defer stop()
	for {
		conn, err := l.Accept()
		if ctx.Err() != nil {
			if err == nil {
				conn.Close()
			}
			return nil
		}
		if err != nil {
			return fmt.Errorf("control address %s: %w", l.Addr(), err)
		}
		conns.Go(func() {
			defer conn.Close()
			stop := context.AfterFunc(ctx, func() { conn.Close() })
			defer stop()
			r.converse(conn)
		})
	}
}

// converse answers one control connection until it ends or breaks the protocol.
func (r *relay) converse(conn net.Conn) {
	var parser resp.Parser
	var in []byte
	chunk := make([]byte, 4<<10)
	for {
		n, args, err := parser.Next(in, controlLimits)
		switch {
		case err != nil:
			_, _ = conn.Write(resp.AppendError(nil, "ERR "+err.Error())) // best effort: the connection ends
			return
		case n > 0:
			if len(args) > 0 {
				if _, err := conn.Write(r.reply(args)); err != nil {
					return
				}
			}
			in = in[n:]
		default:
			k, err := conn.Read(chunk)
			if err != nil {
				return
			}
			in = append(in, chunk[:k]...)
		}
	}
}

// reply returns what to answer to a command.
func (r *relay) reply(args [][]byte) []byte {
	if !slices.ContainsFunc([]string{"connlab", "config", "info", "ping"}, func(name string) bool { return isWord(args[0], name) }) {
		return resp.AppendError(nil, "ERR this is the control address of several workers: it takes CONNLAB, CONFIG, INFO and PING, not '"+excerpt(args[0])+"'")
	}
	if len(args) == 3 && isWord(args[0], "connlab") && isWord(args[1], "stall") {
		at := strconv.FormatInt(time.Now().Add(stallLead).UnixMicro(), 10)
		args = append(slices.Clone(args), []byte("AT"), []byte(at))
	}
	answers, err := r.ask(resp.AppendRequest(nil, args...))
	if err != nil {
		return resp.AppendError(nil, "ERR "+err.Error())
	}
	return merge(args, answers)
}

// answer is the reply of one worker.
type answer struct {
	raw   []byte
	value resp.Value
}

// ask sends a request to every worker and returns their answers, in order.
func (r *relay) ask(request []byte) ([]answer, error) {
	r.mu.Lock()
	defer r.mu.Unlock()
	for _, w := range r.workers {
		if r.broken == nil {
			if _, err := w.control.Write(request); err != nil {
				r.broken = fmt.Errorf("asking worker %d: %w", w.number, err)
			}
		}
	}
	var answers []answer
	for _, w := range r.workers {
		if r.broken == nil {
			a, err := receive(w.control)
			if err != nil {
				r.broken = fmt.Errorf("waiting for the answer of worker %d: %w", w.number, err)
			}
			answers = append(answers, a)
		}
	}
	return answers, r.broken
}

// receive reads one reply, the only one that is due.
func receive(conn net.Conn) (answer, error) {
	var in []byte
	chunk := make([]byte, 16<<10)
	for {
		n, v, err := resp.Decode(in)
		if err != nil {
			return answer{}, err
		}
		if n > 0 {
			return answer{raw: in[:n], value: v}, nil
		}
		k, err := conn.Read(chunk)
		if err != nil {
			return answer{}, err
		}
		in = append(in, chunk[:k]...)
	}
}

// merge makes one reply of the workers': the first error, the sum of integers, what all say alike, INFO merged field by
// field, and otherwise the array of the replies.
func merge(args [][]byte, answers []answer) []byte {
	alike, sum, numbers := true, int64(0), true
	var texts []string
	for _, a := range answers {
		if a.value.IsError() {
			return a.raw
		}
		alike = alike && bytes.Equal(a.raw, answers[0].raw)
		numbers = numbers && a.value.Kind == resp.Integer
		sum += a.value.Int
		texts = append(texts, string(a.value.Str))
	}
	switch {
	case isWord(args[0], "info"):
		return resp.AppendBulk(nil, mergeInfo(texts))
	case numbers:
		return resp.AppendInt(nil, sum)
	case alike:
		return answers[0].raw
	}
	all := resp.AppendArray(nil, len(answers))
	for _, a := range answers {
		all = append(all, a.raw...)
	}
	return all
}

// infoRules says how fields of INFO are merged that are neither alike nor listed.
var infoRules = map[string]func([]int64) int64{
	"server_time_usec": largest, "uptime_in_seconds": smallest, "uptime_in_days": smallest,

	"connected_clients": total, "maxclients": total, "blocked_clients": total,
	"client_recent_max_input_buffer": largest, "client_recent_max_output_buffer": largest,

	"used_memory": total, "used_memory_rss": total, "used_memory_peak": total, "used_memory_dataset": total,
	"mem_clients_normal": total, "maxmemory": total, "go_heap_alloc": total, "go_gc_cycles": total,

	"total_connections_received": total, "total_commands_processed": total, "instantaneous_ops_per_sec": total,
	"total_net_input_bytes": total, "total_net_output_bytes": total, "rejected_connections": total,
	"expired_keys": total, "evicted_keys": total, "keyspace_hits": total, "keyspace_misses": total,
	"client_query_buffer_limit_disconnections": total, "client_output_buffer_limit_disconnections": total,
	"protocol_errors": total, "total_error_replies": total, "total_reads_processed": total, "total_writes_processed": total,

	"accept_rate": total, "accepted_total": total, "accept_errors": total, "accept_paused": total,
	"closes_by_client": total, "closes_by_error": total, "closes_by_server": total, "closes_delayed": total,
	"loop_cycles": total, "requests": total, "stall_armed_us": largest, "stalls_total": total, "stalled_us": total,
	// From the last to begin to the first to end, all stand still.
	"last_stall_start_us": largest, "last_stall_end_us": smallest,
	"requests_total": total, "request_wait_us_total": total, "request_wait_us_max": largest, "held_replies": total,
	"releases_total": total, "release_late_us_total": total, "release_late_us_max": largest,
}

func total(values []int64) (sum int64) {
	for _, v := range values {
		sum += v
	}
	return sum
}

func largest(values []int64) int64  { return slices.Max(values) }
func smallest(values []int64) int64 { return slices.Min(values) }

// mergeInfo makes one text of the workers' INFO.
func mergeInfo(texts []string) string {
	var workers []map[string]string
	for _, text := range texts {
		fields := map[string]string{}
		for line := range strings.Lines(text) {
			if name, value, ok := strings.Cut(strings.TrimRight(line, "\r\n"), ":"); ok {
				fields[name] = value
			}
		}
		workers = append(workers, fields)
	}
	var b strings.Builder
	keyspace := false
	for line := range strings.Lines(texts[0]) {
		line = strings.TrimRight(line, "\r\n")
		if line == "# Keyspace" {
			keyspace = true
		}
		if keyspace { // to the empty line behind it
			keyspace = line != ""
			continue
		}
		name, _, isField := strings.Cut(line, ":")
		if !isField {
			b.WriteString(line + "\r\n")
			continue
		}
		var values []string
		for _, fields := range workers {
			values = append(values, fields[name])
		}
		mergeField(&b, name, values)
	}
	return b.String()
}

// mergeField writes one field. Those by which one sees how connections are shared out are listed, too.
func mergeField(b *strings.Builder, name string, values []string) {
	switch {
	case strings.HasSuffix(name, "_human"):
		return // derived from another, which is there
	case strings.HasPrefix(name, "used_cpu_"):
		field(b, name, totalSeconds(values))
	case infoRules[name] != nil:
		field(b, name, merged(values, infoRules[name]))
	case slices.ContainsFunc(values, func(v string) bool { return v != values[0] }):
		field(b, name, strings.Join(values, ","))
	default:
		field(b, name, values[0])
	}
	if name == "connected_clients" || name == "accepted_total" {
		field(b, name+"_by_worker", strings.Join(values, ","))
	}
}

// merged applies a rule; what is no number, which no worker says, is listed.
func merged(values []string, rule func([]int64) int64) string {
	var numbers []int64
	for _, v := range values {
		n, err := strconv.ParseInt(v, 10, 64)
		if err != nil {
			return strings.Join(values, ",")
		}
		numbers = append(numbers, n)
	}
	return strconv.FormatInt(rule(numbers), 10)
}

// totalSeconds adds decimal seconds; what is no number, which no worker says, is listed.
func totalSeconds(values []string) string {
	sum := 0.0
	for _, v := range values {
		seconds, err := strconv.ParseFloat(v, 64)
		if err != nil {
			return strings.Join(values, ",")
		}
		sum += seconds
	}
	return strconv.FormatFloat(sum, 'f', 6, 64)
}
