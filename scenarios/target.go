package scenarios

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"net/netip"
	"os"
	"os/exec"
	"regexp"
	"strconv"
	"strings"
	"time"

	"github.com/gomodule/redigo/redis"
	"golang.org/x/sys/unix"

	"connlab/netlab"
)

// The servers that a scenario can be run against.
const (
	ServerMini  = "mini"  // connlab's own: `connlab server`
	ServerRedis = "redis" // the redis-server found in PATH
)

// redisPort is where every server under test listens.
const redisPort = 6379

// program is the executable of a server under test.
type program struct {
	kind    string
	path    string
	release string
}

// findServer says what is missing before anything is started.
func findServer(kind string) (program, error) {
	switch kind {
	case ServerMini, "":
		path, err := os.Executable()
		if err != nil {
			return program{}, fmt.Errorf("finding this executable: %w", err)
		}
		return program{kind: ServerMini, path: path}, nil
	case ServerRedis:
		path, err := netlab.LookProgram("redis-server")
		if err != nil {
			return program{}, &netlab.NeedError{Need: netlab.NeedRedis, Err: errors.New("it is not in PATH; install it with: apt-get install redis-server")}
		}
		ctx, cancel := context.WithTimeout(context.Background(), 5*time.Second)
		defer cancel()
		out, err := exec.CommandContext(ctx, path, "--version").Output()
		if err != nil {
			return program{}, fmt.Errorf("%s --version: %w", path, err)
		}
		release := "of unknown release"
		if m := regexp.MustCompile(`v=(\S+)`).FindSubmatch(out); m != nil {
			release = string(m[1])
		}
		return program{kind: ServerRedis, path: path, release: release}, nil
	}
	return program{}, usagef("unknown server %q; there is: %s, %s", kind, ServerMini, ServerRedis)
}

func (p program) version() string { return strings.TrimSpace(p.kind + " " + p.release) }

// serverConfig is what a scenario chooses of a server.
type serverConfig struct {
	backlog         int
	acceptsPerCycle int // the mini server's; redis-server has its own, as it is for 0
	timeout         int // seconds after which an idle client is closed, 0 for never
}

// needMini is what an arm needs that asks of the server what a real Redis does
// not do on request.
const needMini netlab.Need = "the mini server"

func (p program) args(cfg serverConfig) []string {
	if p.kind == ServerMini {
		args := []string{
			"server", "--addr", fmt.Sprintf("0.0.0.0:%d", redisPort),
			"--backlog", strconv.Itoa(cfg.backlog),
			"--timeout", strconv.Itoa(cfg.timeout),
		}
		if cfg.acceptsPerCycle > 0 {
			args = append(args, "--accepts-per-cycle", strconv.Itoa(cfg.acceptsPerCycle))
		}
		return args
	}
	return []string{
		"--bind", "0.0.0.0", "--port", strconv.Itoa(redisPort), "--protected-mode", "no",
		"--tcp-backlog", strconv.Itoa(cfg.backlog), "--timeout", strconv.Itoa(cfg.timeout),
		// No files: nothing is left when it is killed.
		"--save", "", "--appendonly", "no", "--logfile", "", "--daemonize", "no",
	}
}

// target is a server under test that runs on a host.
type target struct {
	program
	host    *netlab.Host
	proc    *netlab.Process
	addr    netip.AddrPort
	control redis.Conn // one connection, made before the load and kept
}

// start runs the server and returns when it listens and answers.
func (p program) start(ctx context.Context, host *netlab.Host, cfg serverConfig, log io.Writer) (*target, error) {
	proc, err := host.Start(ctx, netlab.Program{
		Path: p.path, Args: p.args(cfg), Dir: "/",
		Ready:  func() error { return host.Listening(redisPort) },
		Stdout: log, Stderr: log,
	})
	if err != nil {
		return nil, err
	}
	t := &target{program: p, host: host, proc: proc, addr: netip.AddrPortFrom(host.Addr(), redisPort)}
	conn, err := host.DialContext(ctx, "tcp", t.addr.String())
	if err != nil {
		return nil, fmt.Errorf("control connection: %w", err)
	}
	// The control connection waits through a stall, so its limit is the run's.
	t.control = redis.NewConn(conn, 2*time.Minute, 2*time.Minute)
	if _, err := t.control.Do("PING"); err != nil {
		return nil, errors.Join(fmt.Errorf("control connection: %w", err), t.control.Close())
	}
	return t, nil
}

// stopWithin is how long a server may take to end. With the race detector each of its processes ends a second late
// (atexit_sleep_ms), and workers end before the one that started them.
const stopWithin = 5 * time.Second

func (t *target) stop() error {
	return errors.Join(t.control.Close(), t.proc.Stop(stopWithin))
}

// stall is when the server's event loop stood still.
type stall struct{ begin, end time.Time }

func (s stall) length() time.Duration { return s.end.Sub(s.begin) }

// stand makes the event loop stand still for d, outside any command, and
// returns when it is over. The mini server stalls in its cron, within a tenth of
// a second from now; redis-server is stopped from outside, at once.
func (t *target) stand(ctx context.Context, d time.Duration) (stall, error) {
	if t.kind == ServerRedis {
		return t.standStopped(ctx, d)
	}
	before, err := t.info("connlab")
	if err != nil {
		return stall{}, err
	}
	if _, err := t.control.Do("CONNLAB", "STALL", d.Milliseconds()); err != nil {
		return stall{}, fmt.Errorf("arming a stall: %w", err)
	}
	// The next answer after the stall has begun comes when it is over.
	for deadline := time.Now().Add(d + 10*time.Second); ; {
		now, err := t.info("connlab")
		if err != nil {
			return stall{}, err
		}
		if now["stalls_total"] != before["stalls_total"] {
			begin, err1 := unixMicro(now["last_stall_start_us"])
			end, err2 := unixMicro(now["last_stall_end_us"])
			return stall{begin, end}, errors.Join(err1, err2)
		}
		if time.Now().After(deadline) {
			return stall{}, fmt.Errorf("the server has not stalled %v after it was told to; stalls_total is %q", d, now["stalls_total"])
		}
		if err := sleep(ctx, 5*time.Millisecond); err != nil {
			return stall{}, err
		}
	}
}

func (t *target) standStopped(ctx context.Context, d time.Duration) (s stall, err error) {
	if err := t.proc.Signal(unix.SIGSTOP); err != nil {
		return s, err
	}
	s.begin = time.Now()
	err = sleep(ctx, d)
	s.end = time.Now()
	return s, errors.Join(err, t.proc.Signal(unix.SIGCONT))
}

func unixMicro(text string) (time.Time, error) {
	us, err := strconv.ParseInt(text, 10, 64)
	if err != nil {
		return time.Time{}, fmt.Errorf("server time %q: %w", text, err)
	}
	return time.UnixMicro(us), nil
}

// info returns one section of INFO.
func (t *target) info(section string) (map[string]string, error) {
	text, err := redis.Bytes(t.control.Do("INFO", section))
	if err != nil {
		return nil, fmt.Errorf("INFO %s: %w", section, err)
	}
	fields := map[string]string{}
	for line := range bytes.Lines(text) {
		if name, value, ok := strings.Cut(strings.TrimSpace(string(line)), ":"); ok {
			fields[name] = value
		}
	}
	return fields, nil
}

// slowest is how long the longest command took that the server itself found slow;
// 0 if it found none.
func (t *target) slowest() (time.Duration, error) {
	const all = 128 // the longest log that either server keeps by default
	entries, err := redis.SlowLogs(t.control.Do("SLOWLOG", "GET", all))
	if err != nil {
		return 0, fmt.Errorf("SLOWLOG GET: %w", err)
	}
	var longest time.Duration
	for _, e := range entries {
		longest = max(longest, e.ExecutionTime)
	}
	return longest, nil
}

func sleep(ctx context.Context, d time.Duration) error {
	select {
	case <-ctx.Done():
		return context.Cause(ctx)
	case <-time.After(d):
		return nil
	}
}
