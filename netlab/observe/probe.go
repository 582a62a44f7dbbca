package observe

import (
	"errors"
	"fmt"

	"connlab/netlab"
)

// listenerProbe samples the accept queue of one port.
type listenerProbe struct {
	diag    *diag
	query   Query
	sockets []Socket
}

func openListener(l Listener) (*listenerProbe, error) {
	d, err := openDiag(l.Host)
	if err != nil {
		return nil, err
	}
	p := &listenerProbe{diag: d, query: Query{States: SetOf(Listen), LocalPort: l.Port}}
	p.sockets, err = d.sockets(p.query, nil)
	if err == nil && len(p.sockets) == 0 {
		err = fmt.Errorf("host %s: nothing listens on port %d", l.Host.Name(), l.Port)
	}
	if err != nil {
		return nil, errors.Join(err, d.close())
	}
	return p, nil
}

var listenerNames = []string{"Listen.Depth", "Listen.Limit", "Listen.Drops", "Listen.Sockets"}

func (p *listenerProbe) names() []string { return listenerNames }

func (p *listenerProbe) read(values []int64) ([]int64, error) {
	var err error
	if p.sockets, err = p.diag.sockets(p.query, p.sockets[:0]); err != nil {
		return values, err
	}
	var depth, limit, drops int64
	for i := range p.sockets {
		s := &p.sockets[i]
		depth += int64(s.RQueue)
		limit += int64(s.WQueue)
		drops += int64(s.Drops)
	}
	return append(values[:0], depth, limit, drops, int64(len(p.sockets))), nil
}

func (p *listenerProbe) close() error { return p.diag.close() }

// stateProbe counts a host's sockets by state.
//
// A dump of every socket takes the kernel more than a microsecond a socket,
// 7 ms for 4,000 of them, which is no thing to do every 10 ms beside an
// experiment. The two states that hold nearly all sockets are therefore not
// dumped but taken from what the kernel counts anyway:
//
//   - Tcp.CurrEstab is ESTABLISHED and CLOSE_WAIT together since Linux 6.10
//     (net/ipv4/tcp.c tcp_set_state; RFC 1213); CLOSE_WAIT is dumped. Kernels
//     before count ESTABLISHED alone, so there the figure is too low by as many.
//   - sockstat's tw is every time-wait slot: TIME_WAIT and those of FIN_WAIT2
//     that have given up their socket (net/ipv4/inet_timewait_sock.c), which
//     the dump shows with the TIME_WAIT timer.
//
// What is left is the walk over the hash table of established sockets, which is
// one for the whole machine; see [DefaultStatesEvery].
type stateProbe struct {
	diag      *diag
	counters  *counterFiles
	currEstab int // ids in values
	tw        int
	values    []int64
	sockets   []Socket
}

const dumpedStates = AllStates &^ (1<<Established | 1<<TimeWait)

func openStates(h *netlab.Host) (*stateProbe, error) {
	d, err := openDiag(h)
	if err != nil {
		return nil, err
	}
	parser := newParser()
	files, err := openCounters(h, parser, "snmp", "sockstat")
	if err != nil {
		return nil, errors.Join(err, d.close())
	}
	return &stateProbe{
		diag: d, counters: files,
		currEstab: parser.id([]byte("Tcp.CurrEstab")),
		tw:        parser.id([]byte("sockstat.TCP.tw")),
	}, nil
}

var stateMetrics = func() []string {
	var names []string
	for s := Established; s <= Closing; s++ {
		names = append(names, fmt.Sprintf("State.%v", s))
	}
	return names
}()

func (p *stateProbe) names() []string { return stateMetrics }

func (p *stateProbe) read(values []int64) ([]int64, error) {
	var err error
	if p.sockets, err = p.diag.sockets(Query{States: dumpedStates}, p.sockets[:0]); err != nil {
		return values, err
	}
	if p.values, err = p.counters.read(p.values); err != nil {
		return values, err
	}
	var n [Closing + 1]int64
	n[TimeWait] = p.values[p.tw]
	for i := range p.sockets {
		s := &p.sockets[i]
		n[s.State]++
		if s.Timer == timerTimeWait {
			n[TimeWait]--
		}
	}
	n[Established] = max(0, p.values[p.currEstab]-n[CloseWait])
	return append(values[:0], n[Established:]...), nil
}

func (p *stateProbe) close() error { return errors.Join(p.diag.close(), p.counters.close()) }
