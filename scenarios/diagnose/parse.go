package diagnose

import (
	"encoding/json"
	"errors"
	"fmt"
	"regexp"
	"slices"
	"strconv"
	"strings"

	"connlab/netlab/observe"
)

// File is a saved text and the name to call it by in errors.
type File struct {
	Name string
	Text []byte
}

// ErrNothing is that a text holds nothing that a diagnosis could use.
var ErrNothing = errors.New("nothing recognised: save /proc/net/netstat, /proc/net/snmp and /proc/net/sockstat (or the output of `nstat -az` or LC_ALL=C `netstat -s`), " +
	"`sysctl " + strings.Join([]string{portRange, maxBuckets}, " ") + "` and `ss -lnt`")

// Parse reads texts that were saved on one host at one moment. Each may hold any
// of these, one after the other, and is recognised by its content:
//
//   - nstat -az, nstat -a, nstat -azj
//   - netstat -s (net-tools, in English)
//   - /proc/net/netstat, /proc/net/snmp, /proc/net/sockstat
//   - lines of sysctl
//   - ss -lnt
//
// Other lines are ignored; a text in which nothing is recognised is an
// [ErrNothing], and a bad number is an error that names the line. If a value is
// there twice, the later one counts.
//
// Two programs leave out counters that are zero: netstat -s, and nstat without -z.
// From a complete output of theirs, a counter that is not there is taken for zero:
// net-tools prints "packet headers predicted" even if it is zero, and nstat without
// -z begins with IpInReceives and has no zero in it. From a part of their output,
// as grep leaves it, what is not there is missing. So is Tcp.CurrEstab from any output
// of nstat, which never prints it (iproute2 misc/nstat.c, useless_number).
func Parse(files ...File) (Snapshot, error) {
	p := parser{snap: Snapshot{Counters: observe.Counters{}, Sysctls: map[string]string{}}}
	for _, f := range files {
		p.found = 0
		if err := p.parse(string(f.Text)); err != nil {
			return Snapshot{}, fmt.Errorf("reading %s: %w", f.Name, err)
		}
		if p.found == 0 {
			return Snapshot{}, fmt.Errorf("reading %s: %w", f.Name, ErrNothing)
		}
	}
	p.addZeros()
	return p.snap, nil
}

type parser struct {
	snap  Snapshot
	found int // values recognised in this file

	// What tells whether an output is complete, and whether it has zeros.
	netstatExt, netstatPredicted    bool
	nstatIP, nstatTCP, nstatHasZero bool
}

func (p *parser) parse(text string) error {
	lines := strings.Split(text, "\n")
	for i := 0; i < len(lines); i++ {
		line := strings.TrimRight(lines[i], " \t\r")
		next := ""
		if i+1 < len(lines) {
			next = strings.TrimRight(lines[i+1], " \t\r")
		}
		pair, err := p.line(line, next)
		if err != nil {
			if pair {
				return fmt.Errorf("lines %d and %d: %w", i+1, i+2, err)
			}
			return fmt.Errorf("line %d: %w", i+1, err)
		}
		if pair {
			i++
		}
	}
	return nil
}

// nstatName is a counter of nstat: group and name without anything between. Only
// what begins so is looked at; TcpExt must come before Tcp.
var nstatName = regexp.MustCompile(`^(TcpExt|Tcp|Ip|Icmp|Udp|MPTcp)([A-Z]\w*|[0-9]\w*)$`)

// line reads one line, and says whether it took the next one with it.
func (p *parser) line(line, next string) (pair bool, err error) {
	fields := strings.Fields(line)
	switch {
	case len(fields) == 0:
	case strings.HasPrefix(line, `{"kernel":`):
		return false, p.nstatJSON(line)
	case line == "TcpExt:":
		p.netstatExt = true
	case (fields[0] == "Tcp:" || fields[0] == "TcpExt:") && len(fields) > 1:
		return true, p.pairs(fields, strings.Fields(next))
	case fields[0] == "TCP:":
		return false, p.sockstat(fields[1:])
	case len(fields) == 3 && nstatName.MatchString(fields[0]):
		return false, p.nstat(fields[0], fields[1])
	case strings.HasPrefix(fields[0], "net."):
		return false, p.sysctl(line)
	case fields[0] == "LISTEN":
		return false, p.listener(fields)
	case len(fields) > 1 && fields[1] == "LISTEN":
		return false, p.listener(fields[1:])
	default:
		return false, p.sentence(fields)
	}
	return false, nil
}

// put records a counter.
func (p *parser) put(name, value string) error {
	v, err := strconv.ParseInt(value, 10, 64)
	if err != nil {
		return fmt.Errorf("%s: %w", name, err)
	}
	if v < 0 && name != "Tcp.MaxConn" { // -1: no limit (net/ipv4/tcp.c, RFC 1213)
		return fmt.Errorf("%s: %d is negative", name, v)
	}
	p.snap.Counters[name] = v
	p.found++
	return nil
}

// pairs reads two lines of /proc/net/netstat or /proc/net/snmp: names, then values
// (net/ipv4/proc.c, netstat_seq_show).
func (p *parser) pairs(names, values []string) error {
	if len(values) == 0 || values[0] != names[0] {
		return fmt.Errorf("names of %s are not followed by their values", names[0])
	}
	if len(names) != len(values) {
		return fmt.Errorf("%s %d names and %d values", names[0], len(names)-1, len(values)-1)
	}
	group := strings.TrimSuffix(names[0], ":")
	for i := 1; i < len(names); i++ {
		if err := p.put(group+"."+names[i], values[i]); err != nil {
			return err
		}
	}
	return nil
}

// sockstat reads "inuse 5 orphan 0 tw 2 alloc 7 mem 1" of /proc/net/sockstat. Of
// these, inuse and tw are the namespace's own (net/ipv4/proc.c, sockstat_seq_show).
func (p *parser) sockstat(fields []string) error {
	if len(fields)%2 != 0 {
		return errors.New("TCP: a name without a value")
	}
	for i := 0; i < len(fields); i += 2 {
		if fields[i] == "inuse" || fields[i] == "tw" {
			if err := p.put("sockstat.TCP."+fields[i], fields[i+1]); err != nil {
				return err
			}
		}
	}
	return nil
}

// nstat reads a counter as nstat prints it.
func (p *parser) nstat(name, value string) error {
	m := nstatName.FindStringSubmatch(name)
	p.nstatIP = p.nstatIP || name == "IpInReceives"
	p.nstatTCP = p.nstatTCP || name == "TcpInSegs"
	p.nstatHasZero = p.nstatHasZero || value == "0"
	if m[1] != "Tcp" && m[1] != "TcpExt" {
		return nil
	}
	return p.put(m[1]+"."+m[2], value)
}

// nstatJSON reads what nstat -j prints, on one line.
func (p *parser) nstatJSON(line string) error {
	var doc struct {
		Kernel map[string]json.Number `json:"kernel"`
	}
	if err := json.Unmarshal([]byte(line), &doc); err != nil {
		return fmt.Errorf("JSON of nstat: %w", err)
	}
	for name, value := range doc.Kernel {
		if nstatName.MatchString(name) {
			if err := p.nstat(name, value.String()); err != nil {
				return err
			}
		}
	}
	return nil
}

// sysctl reads "net.ipv4.tcp_tw_reuse = 2".
func (p *parser) sysctl(line string) error {
	name, value, ok := strings.Cut(line, "=")
	name, value = strings.TrimSpace(name), strings.TrimSpace(value)
	if !ok || !slices.Contains(sysctls, name) {
		return nil
	}
	var err error
	if name == portRange {
		_, _, err = ports(value)
	} else {
		_, err = strconv.ParseUint(value, 10, 63)
	}
	if err != nil {
		return fmt.Errorf("%s: %w", name, err)
	}
	p.snap.Sysctls[name] = value
	p.found++
	return nil
}

// listener reads "LISTEN 0 128 0.0.0.0:6379 0.0.0.0:*" of ss.
func (p *parser) listener(fields []string) error {
	if len(fields) < 4 {
		return errors.New("a listener without Recv-Q, Send-Q and an address")
	}
	queue, err := strconv.ParseUint(fields[1], 10, 32)
	if err != nil {
		return fmt.Errorf("a listener's Recv-Q: %w", err)
	}
	limit, err := strconv.ParseUint(fields[2], 10, 32)
	if err != nil {
		return fmt.Errorf("a listener's Send-Q: %w", err)
	}
	p.snap.Listeners = append(p.snap.Listeners, Listener{Addr: fields[3], Queue: int64(queue), Limit: int64(limit)})
	p.found++
	return nil
}

// sentence reads a line of netstat -s: a number and a sentence that net-tools has
// for the counter, or the counter's own name where it has none.
func (p *parser) sentence(fields []string) error {
	if name, ok := sentences[strings.Join(fields[1:], " ")]; ok {
		p.netstatPredicted = p.netstatPredicted || name == "TcpExt.TCPHPHits"
		return p.put(name, fields[0])
	}
	name, ok := strings.CutSuffix(fields[0], ":")
	if ok && len(fields) == 2 && slices.Contains(used(), "TcpExt."+name) {
		return p.put("TcpExt."+name, fields[1])
	}
	return nil
}

// sentences are those of net-tools' statistics.c (Tcptab and Tcpexttab) for the
// counters that a diagnosis uses, and for TCPHPHits, in the spellings of 1.60 and
// 2.10.
var sentences = map[string]string{
	"active connection openings":                         "Tcp.ActiveOpens",
	"active connections openings":                        "Tcp.ActiveOpens",
	"passive connection openings":                        "Tcp.PassiveOpens",
	"connections established":                            "Tcp.CurrEstab",
	"connection resets received":                         "Tcp.EstabResets",
	"resets sent":                                        "Tcp.OutRsts",
	"packet headers predicted":                           "TcpExt.TCPHPHits",
	"SYN cookies sent":                                   "TcpExt.SyncookiesSent",
	"SYN cookies received":                               "TcpExt.SyncookiesRecv",
	"times the listen queue of a socket overflowed":      "TcpExt.ListenOverflows",
	"SYNs to LISTEN sockets dropped":                     "TcpExt.ListenDrops",
	"SYNs to LISTEN sockets ignored":                     "TcpExt.ListenDrops",
	"TCP sockets finished time wait in fast timer":       "TcpExt.TW",
	"passive connections rejected because of time stamp": "TcpExt.PAWSPassive",
	"active connections rejected because of time stamp":  "TcpExt.PAWSActive",
}

// addZeros puts in the counters that a complete output left out for being zero.
func (p *parser) addZeros() {
	nstat := p.nstatIP && p.nstatTCP && !p.nstatHasZero
	netstat := p.netstatExt && p.netstatPredicted
	for _, name := range used() {
		if _, there := p.snap.Counters[name]; there {
			continue
		}
		if nstat && name != "Tcp.CurrEstab" || netstat && strings.HasPrefix(name, "TcpExt.") {
			p.snap.Counters[name] = 0
		}
	}
}
