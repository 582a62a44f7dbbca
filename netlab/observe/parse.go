package observe

import (
	"bytes"
	"fmt"
	"strconv"
)

// parser turns the texts of /proc/net/{netstat,snmp,sockstat} into a vector of
// values. It learns each counter's name once: a line of names that was seen
// before costs one map look-up. The zero value is not usable; see newParser.
type parser struct {
	names []string         // by id
	ids   map[string]int   // "TcpExt.ListenOverflows" to id
	rows  map[string][]int // a line of names to the ids of its fields
	key   []byte           // scratch
}

func newParser() *parser {
	return &parser{ids: map[string]int{}, rows: map[string][]int{}}
}

// id returns the id of a name, a new one if need be. It takes bytes because a
// look-up by string(bytes) allocates nothing.
func (p *parser) id(name []byte) int {
	id, known := p.ids[string(name)]
	if !known {
		id = len(p.names)
		p.names = append(p.names, string(name))
		p.ids[p.names[id]] = id
	}
	return id
}

// of returns the parser for a file of that name.
func (p *parser) of(file string) func(text []byte, values []int64) ([]int64, error) {
	if file == "sockstat" {
		return p.sockstat
	}
	return p.pairs
}

// pairs reads a text of paired lines, "Tcp: name name" and "Tcp: value value"
// (net/ipv4/proc.c snmp_seq_show, netstat_seq_show), into values, which is
// indexed by id and grown as needed. IcmpMsg is printed only once a message of
// the kind was seen, so that a name may turn up in the middle of a run.
func (p *parser) pairs(text []byte, values []int64) ([]int64, error) {
	for len(text) > 0 {
		var names, line []byte
		names, text = cutLine(text)
		line, text = cutLine(text)
		proto, rest, ok := bytes.Cut(line, []byte(":"))
		if !ok || !bytes.HasPrefix(names, line[:len(proto)+1]) {
			return values, fmt.Errorf("names %.40q are followed by %.40q, not by their values", names, line)
		}
		ids := p.row(names, proto)
		i := 0
		for field := range bytes.FieldsSeq(rest) {
			if i == len(ids) {
				return values, fmt.Errorf("%s: more values than the %d names", proto, len(ids))
			}
			v, err := strconv.ParseInt(string(field), 10, 64)
			if err != nil {
				return values, fmt.Errorf("%s: %w", p.names[ids[i]], err)
			}
			values = put(values, ids[i], v)
			i++
		}
		if i != len(ids) {
			return values, fmt.Errorf("%s: %d values for %d names", proto, i, len(ids))
		}
	}
	return values, nil
}

// row returns the ids of a line of names.
func (p *parser) row(line, proto []byte) []int {
	if ids, known := p.rows[string(line)]; known {
		return ids
	}
	ids := []int{}
	for name := range bytes.FieldsSeq(line[len(proto)+1:]) {
		ids = append(ids, p.id(fmt.Appendf(nil, "%s.%s", proto, name)))
	}
	p.rows[string(line)] = ids
	return ids
}

// hostWide are the figures of sockstat that are the machine's, not the
// namespace's: percpu counters and memory accounts of the protocol (net/ipv4/proc.c
// sockstat_seq_show: tcp_orphan_count_sum, proto_sockets_allocated_sum_positive,
// proto_memory_allocated).
var hostWide = map[string]bool{
	"sockstat.TCP.orphan": true,
	"sockstat.TCP.alloc":  true,
	"sockstat.TCP.mem":    true,
	"sockstat.UDP.mem":    true,
}

// sockstat reads lines of "TCP: inuse 5 orphan 0 tw 2 alloc 7 mem 1".
func (p *parser) sockstat(text []byte, values []int64) ([]int64, error) {
	for len(text) > 0 {
		var line []byte
		line, text = cutLine(text)
		proto, rest, ok := bytes.Cut(line, []byte(":"))
		if !ok {
			return values, fmt.Errorf("line %.40q has no protocol", line)
		}
		named := false
		for field := range bytes.FieldsSeq(rest) {
			if named = !named; named {
				p.key = append(append(p.key[:0], "sockstat."...), proto...)
				p.key = append(append(p.key, '.'), field...)
				continue
			}
			v, err := strconv.ParseInt(string(field), 10, 64)
			if err != nil {
				return values, fmt.Errorf("%s: %w", p.key, err)
			}
			if !hostWide[string(p.key)] {
				values = put(values, p.id(p.key), v)
			}
		}
		if named {
			return values, fmt.Errorf("%s has no value", p.key)
		}
	}
	return values, nil
}

func cutLine(text []byte) (line, rest []byte) {
	line, rest, _ = bytes.Cut(text, []byte("\n"))
	return line, rest
}

// put sets values[id], grown with zeros: a counter that the kernel does not yet
// print is 0.
func put(values []int64, id int, v int64) []int64 {
	for len(values) <= id {
		values = append(values, 0)
	}
	values[id] = v
	return values
}
