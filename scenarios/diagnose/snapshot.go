package diagnose

import (
	"errors"
	"fmt"
	"io"
	"io/fs"
	"maps"
	"os"
	"path/filepath"
	"slices"
	"strconv"
	"strings"

	"connlab/netlab/observe"
)

// Snapshot is what is known of one host, or network namespace, at one moment.
type Snapshot struct {
	// Counters are named as [observe.Counters] names them: "TcpExt.ListenDrops",
	// "Tcp.PassiveOpens", "sockstat.TCP.tw". What is not in it is not known.
	Counters observe.Counters
	// Sysctls are values as sysctl prints them, by names such as
	// "net.ipv4.ip_local_port_range".
	Sysctls map[string]string
	// Listeners are the listening sockets, as `ss -lnt` shows them.
	Listeners []Listener
}

// Listener is a listening socket with its accept queue, in connections.
type Listener struct {
	Addr  string // local address and port, as ss prints them
	Queue int64  // Recv-Q: connections that wait for accept(2)
	Limit int64  // Send-Q: min(backlog, somaxconn); the queue holds one more
}

// full says that a connection more would be refused (include/net/sock.h,
// sk_acceptq_is_full).
func (l Listener) full() bool { return l.Queue > l.Limit }

// The sysctls that a diagnosis looks at, by their names in /proc/sys with dots.
const (
	portRange  = "net.ipv4.ip_local_port_range"
	maxBuckets = "net.ipv4.tcp_max_tw_buckets"
	twReuse    = "net.ipv4.tcp_tw_reuse"
	twRecycle  = "net.ipv4.tcp_tw_recycle"
	somaxconn  = "net.core.somaxconn"
)

// sysctls are all of them. Not every kernel has each.
var sysctls = []string{portRange, maxBuckets, twReuse, twRecycle, somaxconn}

// WriteSysctls writes the sysctls that a diagnosis looks at, as sysctl prints them,
// below a proc file system: those of the calling thread's namespace, which
// /proc/sys/net shows (net/sysctl_net.c, net_ctl_header_lookup). One that this kernel
// does not have is left out.
func WriteSysctls(w io.Writer, proc string) error {
	for _, name := range sysctls {
		value, err := os.ReadFile(filepath.Join(proc, "sys", strings.ReplaceAll(name, ".", "/")))
		if errors.Is(err, fs.ErrNotExist) {
			continue
		}
		if err == nil {
			_, err = fmt.Fprintf(w, "%s = %s\n", name, strings.TrimSpace(string(value)))
		}
		if err != nil {
			return fmt.Errorf("reading sysctl %s: %w", name, err)
		}
	}
	return nil
}

// facts are a snapshot, and the one before it if there is one.
type facts struct {
	now    Snapshot
	before *Snapshot
}

// gauge says that a counter goes up and down: its change is not a count.
func gauge(name string) bool {
	return name == "Tcp.CurrEstab" || strings.HasPrefix(name, "sockstat.")
}

// get returns the value of a name: a counter's growth since the snapshot before,
// or since boot if there is none; a gauge's and a sysctl's value now. Of
// ip_local_port_range it is the number of ports.
func (f facts) get(name string) number {
	switch {
	case name == portRange:
		low, high, err := ports(f.now.Sysctls[name])
		return number{float64(high - low + 1), err == nil}
	case strings.HasPrefix(name, "net."):
		v, err := strconv.ParseInt(f.now.Sysctls[name], 10, 64)
		return number{float64(v), err == nil}
	case gauge(name):
		v, ok := f.now.Counters[name]
		return number{float64(v), ok}
	}
	return f.change(name)
}

// change is by how much a counter or a gauge grew since the snapshot before; all
// of it if there is none.
func (f facts) change(name string) number {
	v, ok := f.now.Counters[name]
	if f.before == nil {
		return number{float64(v), ok}
	}
	old, was := f.before.Counters[name]
	return number{float64(v - old), ok && was}
}

// fullest is the listener whose queue exceeds its limit by most, and whether any
// listener is known.
func (f facts) fullest() (Listener, bool) {
	if len(f.now.Listeners) == 0 {
		return Listener{}, false
	}
	return slices.MaxFunc(f.now.Listeners, func(a, b Listener) int {
		return int((a.Queue - a.Limit) - (b.Queue - b.Limit))
	}), true
}

// check refuses snapshots in the wrong order: the kernel's counters only grow
// until it boots again.
func (f facts) check() error {
	if f.before == nil {
		return nil
	}
	for _, name := range slices.Sorted(maps.Keys(f.now.Counters)) {
		if old, was := f.before.Counters[name]; was && !gauge(name) && f.now.Counters[name] < old {
			return fmt.Errorf("comparing with the snapshot before: %s was %d and is %d: another host, a reboot between, or the two the wrong way round",
				name, old, f.now.Counters[name])
		}
	}
	return nil
}

// ports parses net.ipv4.ip_local_port_range: the lowest and the highest port.
func ports(value string) (low, high int64, err error) {
	fields := strings.Fields(value)
	if len(fields) != 2 {
		return 0, 0, fmt.Errorf("%q is not two ports", value)
	}
	if low, err = strconv.ParseInt(fields[0], 10, 32); err != nil {
		return 0, 0, err
	}
	if high, err = strconv.ParseInt(fields[1], 10, 32); err != nil {
		return 0, 0, err
	}
	if low < 1 || high < low || high > 65535 {
		return 0, 0, fmt.Errorf("%q is not a range of ports", value)
	}
	return low, high, nil
}
