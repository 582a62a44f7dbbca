package netlab

import (
	"errors"
	"fmt"
	"os"
	"sync"

	"golang.org/x/sys/unix"
)

// Need is something that a lab takes from the machine.
type Need string

// The needs of a lab; [Doctor] probes each. [Up] asks for the first six, the
// links' ones where a link wants them.
const (
	NeedPrivilege    Need = "CAP_NET_ADMIN + CAP_SYS_ADMIN"
	NeedNamespace    Need = "network namespaces"
	NeedVeth         Need = "veth"
	NeedBridge       Need = "bridge"
	NeedTUN          Need = "TUN/TAP"
	NeedNetem        Need = "netem"
	NeedNftables     Need = "nftables"
	NeedBTF          Need = "BTF"
	NeedTracepoints  Need = "tracepoints"
	NeedFiles        Need = "open files"
	NeedUntracked    Need = "no connection tracking"
	NeedPlainTCP     Need = "plain TCP listeners"
	NeedSYNTimers    Need = "SYN retry times"
	NeedRedis        Need = "redis-server"
	NeedHAProxy      Need = "haproxy"
	NeedNginx        Need = "nginx with Lua"
	NeedRestyRedis   Need = "lua-resty-redis"
	NeedTshark       Need = "tshark"
	NeedPrometheus   Need = "prometheus"
	NeedNodeExporter Need = "node_exporter"
)

// ErrUnsupported says that this kernel does not have what is needed.
var ErrUnsupported = errors.New("this kernel does not have it")

// NeedError says which need is not met. A test that meets one skips with its text.
type NeedError struct {
	Need Need
	Err  error
}

func (e *NeedError) Error() string { return fmt.Sprintf("needs %s: %v", e.Need, e.Err) }

func (e *NeedError) Unwrap() error { return e.Err }

// needOr turns the errnos by which a kernel says "no such thing" into a NeedError.
func needOr(n Need, err error) error {
	if errors.Is(err, unix.EOPNOTSUPP) || errors.Is(err, unix.ENOENT) || errors.Is(err, unix.EAFNOSUPPORT) {
		return &NeedError{Need: n, Err: fmt.Errorf("%w: %w", ErrUnsupported, err)}
	}
	return err
}

// capabilities of linux/capability.h, as bits of the effective set.
const (
	capNetAdmin = 1 << unix.CAP_NET_ADMIN
	capSysAdmin = 1 << unix.CAP_SYS_ADMIN
)

// CheckPrivilege returns a [*NeedError] unless this process may make network
// namespaces and configure them.
func CheckPrivilege() error {
	header := unix.CapUserHeader{Version: unix.LINUX_CAPABILITY_VERSION_3}
	var data [2]unix.CapUserData
	if err := unix.Capget(&header, &data[0]); err != nil {
		return fmt.Errorf("reading capabilities: %w", err)
	}
	const want = capNetAdmin | capSysAdmin
	if data[0].Effective&want != want {
		return &NeedError{Need: NeedPrivilege, Err: fmt.Errorf("this process (uid %d) lacks them; run it as root or with sudo", os.Geteuid())}
	}
	return nil
}

// netemAvailable asks the kernel once, in a throwaway namespace: a module may be
// built in, loadable or absent, and only trying tells.
var netemAvailable = sync.OnceValue(func() bool {
	t, err := startThread()
	if err != nil {
		return false
	}
	defer t.stop()
	ns, err := t.newNamespace("netem probe")
	if err != nil {
		return false
	}
	defer ns.close()
	return t.in(ns, func() error {
		r, err := openRtnl()
		if err != nil {
			return err
		}
		defer r.close()
		return r.addNetem(loopback, 0, 0)
	}) == nil
})
