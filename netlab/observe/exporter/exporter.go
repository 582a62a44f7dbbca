// Package exporter serves the counters of a running lab's hosts to Prometheus.
//
// It has two kinds of metrics, all with the labels variant and host:
//
//   - What node_exporter 1.5 has of /proc/net/netstat, snmp and sockstat, with its
//     names, types and help texts (collector/netstat_linux.go and
//     sockstat_linux.go): node_netstat_TcpExt_ListenOverflows, untyped, and
//     node_sockstat_TCP_tw, a gauge.
//   - What node_exporter does not have: for each listening socket, the length and
//     the limit of its accept queue, by sock_diag; see package observe.
//
// Everything is read anew at each scrape, and a scrape of which a part cannot be
// read fails as a whole, with status 500 and the reason.
//
// What it refuses to do: keep a value from an earlier scrape, show the figures of
// sockstat that are the whole machine's (TCP orphan, alloc and mem, UDP mem) as if
// they were a host's, and show IPv6 (snmp6, sockstat6), which labs do not have. It
// has no sysctls, which two of the shipped alert rules read, and no metrics of its
// own process.
package exporter

import (
	"fmt"
	"regexp"
	"strconv"
	"strings"
	"sync"

	"github.com/prometheus/client_golang/prometheus"

	"connlab/netlab"
	"connlab/netlab/observe"
)

// DefaultFields is what node_exporter 1.5 has of netstat and snmp unless it is told
// otherwise: the default of its flag --collector.netstat.fields. It matches names
// such as "TcpExt_ListenOverflows".
var DefaultFields = regexp.MustCompile(`^(.*_(InErrors|InErrs)|Ip_Forwarding|Ip(6|Ext)_(InOctets|OutOctets)|Icmp6?_(InMsgs|OutMsgs)|TcpExt_(Listen.*|Syncookies.*|TCPSynRetrans|TCPTimeouts)|Tcp_(ActiveOpens|InSegs|OutSegs|OutRsts|PassiveOpens|RetransSegs|CurrEstab)|Udp6?_(InDatagrams|OutDatagrams|NoPorts|RcvbufErrors|SndbufErrors))$`)

// Exporter exports hosts, which come and go while it serves. It is for use by any
// number of goroutines.
type Exporter struct {
	fields *regexp.Regexp

	mu       sync.RWMutex // held for reading by a scrape
	standing map[int]group
	next     int
}

// group is the hosts of one lab.
type group struct {
	variant string
	hosts   []*netlab.Host
}

// New returns an exporter of no hosts. The fields of netstat and snmp are those that
// match, or all for nil.
func New(fields *regexp.Regexp) *Exporter {
	return &Exporter{fields: fields, standing: map[int]group{}}
}

// Add exports hosts from now on, until remove is called: that must be before their lab
// goes down, and waits for a scrape that goes on. Two labs that stand at the same time
// must differ in variant, or every scrape fails.
func (e *Exporter) Add(variant string, hosts []*netlab.Host) (remove func()) {
	e.mu.Lock()
	defer e.mu.Unlock()
	id := e.next
	e.next++
	e.standing[id] = group{variant, hosts}
	return func() {
		e.mu.Lock()
		defer e.mu.Unlock()
		delete(e.standing, id)
	}
}

// labels are those of every metric.
var labels = []string{"variant", "host"}

var (
	listenLabels = []string{"variant", "host", "address", "port", "inode"}
	listenDepth  = prometheus.NewDesc("connlab_listen_depth",
		"Connections in the accept queue of a listening socket.", listenLabels, nil)
	listenLimit = prometheus.NewDesc("connlab_listen_limit",
		"Limit of the accept queue, min(backlog, somaxconn); the queue holds one more.", listenLabels, nil)
)

// Describe sends nothing: which counters there are differs by kernel.
func (e *Exporter) Describe(chan<- *prometheus.Desc) {}

// Collect reads every host. It implements [prometheus.Collector].
func (e *Exporter) Collect(ch chan<- prometheus.Metric) {
	e.mu.RLock()
	defer e.mu.RUnlock()
	for _, g := range e.standing {
		for _, h := range g.hosts {
			if err := e.collect(ch, g.variant, h); err != nil {
				ch <- prometheus.NewInvalidMetric(listenDepth, fmt.Errorf("variant %s: %w", g.variant, err))
			}
		}
	}
}

func (e *Exporter) collect(ch chan<- prometheus.Metric, variant string, h *netlab.Host) error {
	counters, err := observe.ReadCounters(h)
	if err != nil {
		return err
	}
	for name, v := range counters {
		if desc, kind := e.describe(name); desc != nil {
			ch <- prometheus.MustNewConstMetric(desc, kind, float64(v), variant, h.Name())
		}
	}
	listeners, err := observe.ReadSockets(h, observe.Query{States: observe.SetOf(observe.Listen)})
	if err != nil {
		return err
	}
	for _, l := range listeners {
		// Sockets with SO_REUSEPORT share address and port, and each has a queue.
		values := []string{variant, h.Name(), l.Local.Addr().String(), strconv.Itoa(int(l.Local.Port())), strconv.Itoa(int(l.Inode))}
		ch <- prometheus.MustNewConstMetric(listenDepth, prometheus.GaugeValue, float64(l.RQueue), values...)
		ch <- prometheus.MustNewConstMetric(listenLimit, prometheus.GaugeValue, float64(l.WQueue), values...)
	}
	return nil
}

// describe returns node_exporter's name, help and type of a counter, or nil if it is
// filtered out.
func (e *Exporter) describe(name string) (*prometheus.Desc, prometheus.ValueType) {
	proto, field, _ := strings.Cut(name, ".")
	if proto == "sockstat" {
		proto, field, _ = strings.Cut(field, ".")
		help := fmt.Sprintf("Number of %s sockets in state %s.", proto, field)
		if proto == "sockets" && field == "used" {
			help = "Number of IPv4 sockets in use."
		}
		return prometheus.NewDesc("node_sockstat_"+proto+"_"+field, help, labels, nil), prometheus.GaugeValue
	}
	key := proto + "_" + field
	if e.fields != nil && !e.fields.MatchString(key) {
		return nil, 0
	}
	return prometheus.NewDesc("node_netstat_"+key, "Statistic "+proto+field+".", labels, nil), prometheus.UntypedValue
}
