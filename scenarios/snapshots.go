package scenarios

import (
	"fmt"
	"os"
	"strings"

	"connlab/netlab"
	"connlab/scenarios/diagnose"
)

// countersBefore reads what a person would save on some hosts, now, before a load. The
// function that it returns reads it again and hands both to who wants them: of the hosts
// that it is given, or of all. It must be called while what the load left still stands.
func (o Options) countersBefore(variant string, hosts ...*netlab.Host) (give func(of ...*netlab.Host) error, err error) {
	if o.Counters == nil {
		return func(...*netlab.Host) error { return nil }, nil
	}
	before := map[*netlab.Host][]byte{}
	for _, h := range hosts {
		if before[h], err = savedCounters(h); err != nil {
			return nil, err
		}
	}
	return func(of ...*netlab.Host) error {
		if len(of) == 0 {
			of = hosts
		}
		for _, h := range of {
			after, err := savedCounters(h)
			if err != nil {
				return err
			}
			if err := o.Counters(variant, h.Name(), before[h], after); err != nil {
				return err
			}
		}
		return nil
	}, nil
}

// savedCounters is what a person on the host would save: the files of counters as
// they are, and the sysctls that a diagnosis looks at, as sysctl prints them.
func savedCounters(h *netlab.Host) ([]byte, error) {
	var text strings.Builder
	err := h.Do(func() error {
		for _, name := range []string{"netstat", "snmp", "sockstat"} {
			file, err := os.ReadFile("/proc/thread-self/net/" + name)
			if err != nil {
				return err
			}
			text.Write(file)
		}
		return diagnose.WriteSysctls(&text, "/proc")
	})
	if err != nil {
		return nil, fmt.Errorf("saving counters: %w", err)
	}
	return []byte(text.String()), nil
}
