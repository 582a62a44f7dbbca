package netlab

import (
	"context"
	"encoding/binary"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"net"
	"os"
	"os/exec"
	"regexp"
	"strconv"
	"strings"
	"time"

	"golang.org/x/sys/unix"
)

// Finding is what [Doctor] found out about one need.
type Finding struct {
	Need Need `json:"need"`
	// OK says that the need is met.
	OK bool `json:"ok"`
	// Detail is what was seen. A probe that could not be executed to a point
	// where it tells anything is not OK, and its Detail begins "not probed: ".
	Detail string `json:"detail"`
	// Cost is what goes without it, and what to do.
	Cost string `json:"cost"`
}

// probe tries one need. It returns what it saw and whether that is enough, or
// an error when it could not tell; an error that wraps ErrUnsupported or this
// need's NeedError tells that the need is not met.
type probe struct {
	need Need
	cost string
	try  func(*scratch) (detail string, ok bool, err error)
}

var probes = []probe{
	{NeedPrivilege, "nothing that needs a network runs; run it as root or with sudo", probePrivilege},
	{NeedNamespace, "no lab at all; use a kernel with CONFIG_NET_NS, and a container that allows unshare(CLONE_NEWNET)", probeNamespace},
	{NeedVeth, "no links, so no lab; use a kernel with CONFIG_VETH", probeVeth},
	{NeedBridge, "no switches, so no lab of more than one host; use a kernel with CONFIG_BRIDGE", probeBridge},
	{NeedTUN, "links with delay or loss where netem is missing too: variants with latency are skipped; use a kernel with CONFIG_TUN and give access to /dev/net/tun", probeTUN},
	{NeedNetem, "delay and loss are made by a pump in user space, at some 100,000 packets a second; a kernel with CONFIG_NET_SCH_NETEM (Debian: apt-get install linux-image-amd64) makes them itself", probeNetem},
	{NeedNftables, "variants with packet filters or kernel NAT are skipped; use a kernel with CONFIG_NF_TABLES and CONFIG_NFT_NAT", probeNftables},
	{NeedBTF, "no trace programs that read kernel structures: reasons of drops and resets are not recorded, counters are; use a kernel with CONFIG_DEBUG_INFO_BTF", probeBTF},
	{NeedTracepoints, "who sent a reset and why a packet was dropped is not recorded, counters are; use a kernel with CONFIG_BPF_SYSCALL and CONFIG_BPF_EVENTS", probeTracepoints},
	{NeedFiles, "scenarios at full scale run out of descriptors; raise the hard limit (ulimit -Hn, /etc/security/limits.conf)", probeFiles},
	{NeedUntracked, "connection tracking moves a source port on a clash and so hides tuple collisions, and it refuses packets of its own when its table is full; remove the rules that every new namespace gets", probeConntrack},
	{NeedPlainTCP, "listeners of Go programs are MPTCP, another animal than the one under test; build with godebug multipathtcp=0 in go.mod", probeMPTCP},
	{NeedSYNTimers, "predictions of connect times use the schedule of kernels before 6.5: 1, 3, 7, 15 s", probeSYNTimers},
	{NeedRedis, "runs with the real server beside ours are skipped; apt-get install redis-server", probeProgram("redis-server", "--version")},
	{NeedHAProxy, "variants with a real layer-7 balancer are skipped, those with our own are not; apt-get install haproxy", probeProgram("haproxy", "-v")},
	{NeedNginx, "variants with nginx's own connection pools are skipped, those with our model of them are not; apt-get install nginx libnginx-mod-http-lua", probeNginx},
	{NeedRestyRedis, "variants that call Redis through this library are skipped, those with a Lua script of our own are not; apt-get install lua-nginx-redis", probeRestyRedis},
	{NeedTshark, "captures are recorded, but no second reader checks them; apt-get install tshark", probeProgram("tshark", "--version")},
	{NeedPrometheus, "variants in which a real Prometheus fires the shipped alerts are skipped; apt-get install prometheus", probeProgram("prometheus", "--version")},
	{NeedNodeExporter, "variants in which a real Prometheus fires the shipped alerts are skipped; apt-get install prometheus-node-exporter", probeProgram("prometheus-node-exporter", "--version")},
}

// Doctor tries every need, in a namespace of its own that it removes again, and
// says what it found in a fixed order. It changes nothing on the host, except that
// the kernel may load a module of its own to answer.
func Doctor() []Finding {
	s := openScratch()
	defer s.close()
	findings := make([]Finding, len(probes))
	for i, p := range probes {
		findings[i] = p.run(s)
	}
	return findings
}

func (p probe) run(s *scratch) Finding {
	detail, ok, err := p.try(s)
	if need, is := errors.AsType[*NeedError](err); is && need.Need == p.need {
		detail, ok = need.Err.Error(), false
	} else if errors.Is(err, ErrUnsupported) {
		detail, ok = err.Error(), false
	} else if err != nil {
		detail, ok = "not probed: "+err.Error(), false
	}
	return Finding{Need: p.need, OK: ok, Detail: strings.ReplaceAll(detail, "\n", "; "), Cost: p.cost}
}

// scratch is a namespace for probes.
type scratch struct {
	thread *nsThread
	ns     *namespace
	rt     *rtnl
	err    error // why there is none
}

func openScratch() *scratch {
	s := &scratch{err: CheckPrivilege()}
	if s.err != nil {
		return s
	}
	if s.thread, s.err = startThread(); s.err != nil {
		return s
	}
	if s.ns, s.err = s.thread.newNamespace("doctor"); s.err != nil {
		return s
	}
	s.err = s.in(func() (err error) {
		if s.rt, err = openRtnl(); err != nil {
			return err
		}
		return s.rt.setUp(loopback)
	})
	return s
}

func (s *scratch) in(fn func() error) error {
	if s.err != nil {
		return s.err
	}
	return s.thread.in(s.ns, fn)
}

func (s *scratch) close() {
	if s.rt != nil {
		s.rt.close()
	}
	if s.ns != nil {
		_ = s.ns.close() // a descriptor that was only read cannot fail to close
	}
	if s.thread != nil {
		s.thread.stop()
	}
}

func probePrivilege(*scratch) (string, bool, error) {
	if err := CheckPrivilege(); err != nil {
		return "", false, err
	}
	return fmt.Sprintf("effective, uid %d", os.Geteuid()), true, nil
}

func probeNamespace(s *scratch) (string, bool, error) {
	var inode string
	err := s.in(func() (err error) {
		inode, err = os.Readlink("/proc/thread-self/ns/net")
		return err
	})
	return "made and entered " + inode, true, err
}

func probeVeth(s *scratch) (string, bool, error) {
	err := s.in(func() error { return s.rt.addVeth("veth0", "veth1", s.ns.fd, net.HardwareAddr{2, 0, 0, 0, 0, 1}) })
	return "made a pair", true, err
}

func probeBridge(s *scratch) (string, bool, error) {
	err := s.in(func() error {
		_, err := s.rt.addBridge("br0")
		return err
	})
	return "made one", true, err
}

func probeTUN(s *scratch) (string, bool, error) {
	err := s.in(func() error {
		tap, err := openTAP("tap0")
		if err != nil {
			return err
		}
		return tap.Close()
	})
	return "made a TAP device", true, err
}

func probeNetem(s *scratch) (string, bool, error) {
	err := s.in(func() error {
		if err := s.rt.addNetem(loopback, 0, 0); err != nil {
			return needOr(NeedNetem, fmt.Errorf("queueing discipline netem: %w", err))
		}
		return nil
	})
	return "made a queueing discipline", true, err
}

// probeNftables has a namespace of its own: a nat chain turns on the connection
// tracking that probeConntrack must not find.
func probeNftables(s *scratch) (string, bool, error) {
	if s.err != nil {
		return "", false, s.err
	}
	ns, err := s.thread.newNamespace("doctor nat")
	if err != nil {
		return "", false, err
	}
	return "made a nat chain with a rule", true, errors.Join(s.thread.in(ns, addNATRule), ns.close())
}

const btfPath = "/sys/kernel/btf/vmlinux"

// btfMagic begins every BTF object (include/uapi/linux/btf.h).
const btfMagic = 0xeb9f

func probeBTF(*scratch) (string, bool, error) {
	f, err := os.Open(btfPath)
	if errors.Is(err, fs.ErrNotExist) {
		return btfPath + " does not exist", false, nil
	}
	if err != nil {
		return "", false, err
	}
	defer f.Close()
	var magic [2]byte
	if _, err := io.ReadFull(f, magic[:]); err != nil {
		return "", false, fmt.Errorf("reading %s: %w", btfPath, err)
	}
	if binary.NativeEndian.Uint16(magic[:]) != btfMagic {
		return fmt.Sprintf("%s begins with %x, which is not BTF", btfPath, magic), false, nil
	}
	return btfPath, true, nil
}

// tracepoints are the ones that say why a packet was dropped or reset, a segment
// sent again, or a socket's state changed.
var tracepoints = []string{
	"kfree_skb", "tcp_send_reset", "tcp_receive_reset", "tcp_retransmit_skb", "tcp_retransmit_synack", "inet_sock_set_state",
}

func probeTracepoints(*scratch) (string, bool, error) {
	var missing []string
	for _, name := range tracepoints {
		err := attachRawTracepoint(name)
		if errors.Is(err, unix.ENOENT) {
			missing = append(missing, name)
			continue
		}
		if err != nil {
			return "", false, err
		}
	}
	if len(missing) > 0 {
		return "this kernel has no " + strings.Join(missing, ", "), false, nil
	}
	return "attached to " + strings.Join(tracepoints, ", "), true, nil
}

const (
	// filesWanted is what one process of an incident at full scale opens: 3,500
	// connections held and a burst of 4,000, with room to spare.
	filesWanted = 12_000
	// filesBeside is for what a process opens besides connections.
	filesBeside = 100
	// mostConnections is the largest number of connections any incident holds.
	mostConnections = 150_000
)

func probeFiles(*scratch) (string, bool, error) {
	var limit unix.Rlimit
	if err := unix.Getrlimit(unix.RLIMIT_NOFILE, &limit); err != nil {
		return "", false, os.NewSyscallError("getrlimit", err)
	}
	return describeFiles(limit.Cur, limit.Max), limit.Max >= filesWanted, nil
}

func describeFiles(soft, hard uint64) string {
	if hard <= filesBeside {
		return fmt.Sprintf("soft limit %d, hard limit %d", soft, hard)
	}
	each := min(hard-filesBeside, mostConnections)
	return fmt.Sprintf("soft limit %d, hard limit %d: one process holds %d connections, %d take %d processes on each side",
		soft, hard, each, mostConnections, (mostConnections+each-1)/each)
}

// probeConntrack makes a connection over the namespace's loopback and looks
// whether it was tracked: having the module is not having it in the path
// (net/netfilter/nf_conntrack_proto.c nf_ct_netns_get: hooks come with the
// first rule that asks for them).
func probeConntrack(s *scratch) (detail string, ok bool, err error) {
	err = s.in(func() error {
		const path = "/proc/sys/net/netfilter/nf_conntrack_count"
		if _, err := os.Stat(path); errors.Is(err, fs.ErrNotExist) {
			detail, ok = "the kernel has no connection tracking, or has not loaded it", true
			return nil
		}
		var tracked string
		err := withLoopback(func(*net.TCPListener) error {
			b, err := os.ReadFile(path)
			tracked = strings.TrimSpace(string(b))
			return err
		})
		ok = tracked == "0"
		detail = "the kernel can, but a connection in a new namespace is not tracked"
		if !ok {
			detail = fmt.Sprintf("a new namespace with one connection tracks %s", tracked)
		}
		return err
	})
	return detail, ok, err
}

// withLoopback runs fn while a connection over the loopback of the calling
// thread's namespace stands.
func withLoopback(fn func(*net.TCPListener) error) error {
	l, err := net.Listen("tcp4", "127.0.0.1:0")
	if err != nil {
		return err
	}
	defer l.Close()
	conn, err := net.DialTimeout("tcp4", l.Addr().String(), time.Second)
	if err != nil {
		return err
	}
	defer conn.Close()
	return fn(l.(*net.TCPListener))
}

// probeMPTCP looks at what Go's net.Listen makes. Whether that is MPTCP depends
// on the go.mod of the program, not only on the kernel.
func probeMPTCP(s *scratch) (detail string, ok bool, err error) {
	err = s.in(func() error {
		enabled, err := readSysctl("net.mptcp.enabled")
		if errors.Is(err, fs.ErrNotExist) {
			enabled = "absent"
		} else if err != nil {
			return err
		}
		return withLoopback(func(l *net.TCPListener) error {
			raw, err := l.SyscallConn()
			if err != nil {
				return err
			}
			var protocol int
			var optErr error
			err = raw.Control(func(fd uintptr) {
				protocol, optErr = unix.GetsockoptInt(int(fd), unix.SOL_SOCKET, unix.SO_PROTOCOL)
			})
			ok = protocol == unix.IPPROTO_TCP
			detail = fmt.Sprintf("net.Listen makes a socket of protocol %d (TCP is %d, MPTCP %d); net.mptcp.enabled is %s",
				protocol, unix.IPPROTO_TCP, unix.IPPROTO_MPTCP, enabled)
			return errors.Join(err, optErr)
		})
	})
	return detail, ok, err
}

// shownRetries is enough to see where the times begin to double.
const shownRetries = 7

func probeSYNTimers(s *scratch) (detail string, ok bool, err error) {
	const key = "net.ipv4.tcp_syn_linear_timeouts"
	err = s.in(func() error {
		value, err := readSysctl(key)
		if errors.Is(err, fs.ErrNotExist) {
			detail = fmt.Sprintf("%s is absent: a SYN is sent again after %v", key, SYNRetries(0, shownRetries))
			return nil
		}
		if err != nil {
			return err
		}
		linear, err := strconv.Atoi(value)
		detail, ok = fmt.Sprintf("%s is %d: a SYN is sent again after %v", key, linear, SYNRetries(linear, shownRetries)), linear > 0
		return err
	})
	return detail, ok, err
}

// versionRE finds the version in what a program says of itself, as in "Redis
// server v=7.0.15 sha=…", "HAProxy version 2.6.12-1 …", "TShark (Wireshark) 4.0.17 …".
var versionRE = regexp.MustCompile(`\d+(\.\d+)+`)

// versionTimeout is long because tshark reads a hundred megabytes of libraries,
// from a slow disk on a machine that has just started.
const versionTimeout = time.Minute

// probeProgram looks for a program and asks for its version.
func probeProgram(name, versionFlag string) func(*scratch) (string, bool, error) {
	return func(*scratch) (string, bool, error) {
		path, err := LookProgram(name)
		if errors.Is(err, exec.ErrNotFound) {
			return "neither in PATH nor in " + strings.Join(programDirs, " or "), false, nil
		}
		if err != nil {
			return "", false, err
		}
		ctx, cancel := context.WithTimeout(context.Background(), versionTimeout)
		defer cancel()
		out, err := exec.CommandContext(ctx, path, versionFlag).Output()
		if err != nil {
			return "", false, fmt.Errorf("%s %s: %w", path, versionFlag, err)
		}
		line, _, _ := strings.Cut(string(out), "\n")
		version := versionRE.FindString(line)
		if version == "" {
			return "", false, fmt.Errorf("%s %s says %q", path, versionFlag, line)
		}
		return path + " " + version, true, nil
	}
}
