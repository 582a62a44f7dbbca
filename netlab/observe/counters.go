package observe

import (
	"errors"
	"fmt"
	"io"
	"os"

	"connlab/netlab"
)

// Counters are the counters of one namespace, or the sum of several, by name:
// "TcpExt.ListenOverflows", "Tcp.OutRsts", "IpExt.InOctets", "sockstat.TCP.tw".
// Every counter that the kernel prints in netstat, snmp and sockstat is there,
// under the name the kernel prints, except those of sockstat that are the whole
// machine's: TCP orphan, alloc and mem, and UDP mem.
//
// Not all of them count: Tcp.CurrEstab, sockstat and a few others are gauges,
// and Tcp.MaxConn is -1. The unit is the kernel's own: events, packets or, where
// the name says so, octets.
type Counters map[string]int64

// Sub returns c − before, by name. A name that only one of them has counts as 0
// in the other: the kernel prints IcmpMsg counters from the first message on.
func (c Counters) Sub(before Counters) Counters {
	diff := make(Counters, len(c))
	for name, v := range c {
		diff[name] = v - before[name]
	}
	for name, v := range before {
		if _, both := c[name]; !both {
			diff[name] = -v
		}
	}
	return diff
}

// ReadCounters reads the counters of the hosts once and adds them up.
func ReadCounters(hosts ...*netlab.Host) (Counters, error) {
	p := newParser()
	sum := Counters{}
	var values []int64
	for _, h := range hosts {
		files, err := openCounters(h, p)
		if err != nil {
			return nil, err
		}
		clear(values)
		values, err = files.read(values)
		if err := errors.Join(err, files.close()); err != nil {
			return nil, err
		}
		for id, v := range values {
			sum[p.names[id]] += v
		}
	}
	return sum, nil
}

// counterFiles are open counter files of one host.
type counterFiles struct {
	host   string
	parser *parser // shared by the hosts of one sampler
	files  []counterFile
	buf    []byte
}

type counterFile struct {
	name  string
	file  *os.File
	parse func(text []byte, values []int64) ([]int64, error)
}

// openCounters opens the named files, or all three, inside the host's
// namespace, to which they stay tied.
func openCounters(h *netlab.Host, p *parser, names ...string) (*counterFiles, error) {
	if len(names) == 0 {
		names = []string{"netstat", "snmp", "sockstat"}
	}
	c := &counterFiles{host: h.Name(), parser: p, buf: make([]byte, 16<<10)}
	err := h.Do(func() error {
		for _, name := range names {
			f, err := os.Open("/proc/thread-self/net/" + name)
			if err != nil {
				return err
			}
			c.files = append(c.files, counterFile{name, f, p.of(name)})
		}
		return nil
	})
	if err != nil {
		return nil, errors.Join(fmt.Errorf("opening counters: %w", err), c.close())
	}
	return c, nil
}

func (c *counterFiles) names() []string { return c.parser.names }

// read puts the present values into values, by the parser's ids.
func (c *counterFiles) read(values []int64) ([]int64, error) {
	for _, f := range c.files {
		text, err := c.text(f.file)
		if err == nil {
			values, err = f.parse(text, values)
		}
		if err != nil {
			return values, fmt.Errorf("host %s: reading counters: %s: %w", c.host, f.name, err)
		}
	}
	return values, nil
}

// text reads a whole file in one go: a seq_file is shown anew for a read at
// offset 0 (fs/seq_file.c seq_read_iter), so a text that did not fit is read
// again from the start into a larger buffer.
func (c *counterFiles) text(f *os.File) ([]byte, error) {
	for {
		n, err := f.ReadAt(c.buf, 0)
		switch {
		case errors.Is(err, io.EOF):
			return c.buf[:n], nil
		case err != nil:
			return nil, err
		}
		c.buf = make([]byte, 2*len(c.buf))
	}
}

func (c *counterFiles) close() error {
	var errs []error
	for _, f := range c.files {
		errs = append(errs, f.file.Close())
	}
	return errors.Join(errs...)
}
