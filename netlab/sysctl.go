package netlab

import (
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"regexp"
	"slices"
	"strings"
)

var sysctlRE = regexp.MustCompile(`^net(\.[a-zA-Z0-9_-]+){2,}$`)

// sysctlPath is where a sysctl of the calling thread's namespace is read and
// written: the kernel resolves /proc/sys/net by the namespace of the thread
// that opens it (net/sysctl_net.c, net_ctl_header_lookup).
func sysctlPath(key string) string {
	return filepath.Join("/proc/sys", strings.ReplaceAll(key, ".", "/"))
}

// checkSysctl needs no namespace: it compares with what this kernel lists for
// the caller's own. A sysctl that only the host's namespace has is found when
// it is set.
func checkSysctl(key, value string) error {
	if !sysctlRE.MatchString(key) {
		return fmt.Errorf("sysctl %q: only dotted names below net. are per namespace", key)
	}
	if strings.TrimSpace(value) == "" {
		return fmt.Errorf("sysctl %s: empty value", key)
	}
	if _, err := os.Stat(sysctlPath(key)); errors.Is(err, fs.ErrNotExist) {
		return fmt.Errorf("unknown sysctl %s: this kernel has no %s", key, sysctlPath(key))
	}
	return nil
}

// setSysctls writes and reads back in the calling thread's namespace.
func setSysctls(values map[string]string) error {
	keys := make([]string, 0, len(values))
	for key := range values {
		keys = append(keys, key)
	}
	slices.Sort(keys)
	for _, key := range keys {
		path := sysctlPath(key)
		// No O_CREATE: on procfs it would turn "does not exist" into "permission denied".
		f, err := os.OpenFile(path, os.O_WRONLY, 0)
		if errors.Is(err, fs.ErrNotExist) {
			return fmt.Errorf("sysctl %s exists only in the host's own namespace", key)
		}
		if err != nil {
			return fmt.Errorf("sysctl %s: %w", key, err)
		}
		_, err = f.WriteString(values[key])
		if err := errors.Join(err, f.Close()); err != nil {
			return fmt.Errorf("sysctl %s = %q: %w", key, values[key], err)
		}
		got, err := readSysctl(key)
		if err != nil {
			return err
		}
		if got != normalSysctl(values[key]) {
			return fmt.Errorf("sysctl %s: wrote %q, the kernel made it %q", key, values[key], got)
		}
	}
	return nil
}

func readSysctl(key string) (string, error) {
	b, err := os.ReadFile(sysctlPath(key))
	if err != nil {
		return "", fmt.Errorf("sysctl %s: %w", key, err)
	}
	return normalSysctl(string(b)), nil
}

// normalSysctl makes "32768\t60999\n" and "32768 60999" the same.
func normalSysctl(s string) string { return strings.Join(strings.Fields(s), " ") }
