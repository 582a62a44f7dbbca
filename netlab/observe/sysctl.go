package observe

import (
	"errors"
	"io/fs"

	"connlab/netlab"
)

// ReadSysctls reads the named sysctls of the host's namespace. A name that this
// kernel does not have is left out: which ones exist differs by kernel, and
// their absence is a fact worth recording.
func ReadSysctls(h *netlab.Host, names ...string) (map[string]string, error) {
	values := make(map[string]string, len(names))
	for _, name := range names {
		value, err := h.Sysctl(name)
		if errors.Is(err, fs.ErrNotExist) {
			continue
		}
		if err != nil {
			return nil, err
		}
		values[name] = value
	}
	return values, nil
}
