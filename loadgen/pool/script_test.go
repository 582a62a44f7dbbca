package pool

import (
	"bufio"
	"context"
	"errors"
	"fmt"
	"io"
	"net"
	"net/netip"
	"os"
	"slices"
	"strconv"
	"strings"
	"sync"
	"syscall"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"
	"github.com/stretchr/testify/require"
)

// player runs a script of calls through a Worker as testdata/script.lua runs it
// through nginx, and gives the same account of it.
//
//	connect A pool=p size=2 backlog=1 timeout=100 to=refused
//	keepalive A timeout=50 size=2 | close A | ping A | more A
//	join A                        until its connect has ended
//	abort A                       gives up the connect of A, if it waits
//	fin A | rst A | push A        what the server does to its connection
//	await A                       until the server has lost its connection
//
// Each line gives what the call returned, then the connects that have ended since
// the last one, and what reached the server.
type player struct {
	t       testing.TB
	server  *recorder
	worker  *Worker
	refused netip.AddrPort
	control *bufio.ReadWriter

	mu       sync.Mutex
	names    map[string]*connecting
	finished []string
	threads  sync.WaitGroup
}

// connecting is the last connect of a name, and what came of it.
type connecting struct {
	waiting bool // has not ended
	aborted bool
	abort   context.CancelFunc
	conn    *Conn
	held    bool
	number  int
}

// play returns the account of the script, a line for each.
func play(t testing.TB, script []string) []string {
	t.Helper()
	refused, refusedAddr := bound(t)
	defer syscall.Close(refused)
	server := newRecorder(t)
	defer server.close()
	control, err := net.Dial("tcp4", server.control.String())
	require.NoError(t, err)
	defer control.Close()
	p := &player{
		t: t, server: server, refused: refusedAddr,
		worker:  NewWorker(dialTCP, Settings{}),
		control: bufio.NewReadWriter(bufio.NewReader(control), bufio.NewWriter(control)),
		names:   map[string]*connecting{},
	}
	defer p.end()
	var account []string
	for i, line := range script {
		result := line + " -> " + p.run(line)
		p.settle(line)
		p.mu.Lock()
		slices.Sort(p.finished)
		for _, f := range p.finished {
			result += "; " + f
		}
		p.finished = nil
		p.mu.Unlock()
		if i+1 == len(script) || !strings.HasPrefix(script[i+1], "await") {
			result += " [" + p.ask("mark") + "]"
		}
		account = append(account, result)
	}
	return account
}

// dialTCP is the Dial of these tests.
func dialTCP(ctx context.Context, addr netip.AddrPort) (net.Conn, error) {
	var d net.Dialer
	return d.DialContext(ctx, "tcp4", addr.String())
}

func (p *player) end() {
	p.mu.Lock()
	for _, c := range p.names {
		c.abort()
	}
	p.mu.Unlock()
	p.threads.Wait()
	for _, c := range p.names {
		if c.conn != nil {
			_ = c.conn.Close()
		}
	}
	_ = p.worker.Close()
}

func (p *player) ask(command string) string {
	_, _ = p.control.WriteString(command + "\n")
	require.NoError(p.t, p.control.Flush())
	reply, err := p.control.ReadString('\n')
	require.NoError(p.t, err)
	return strings.TrimSuffix(reply, "\n")
}

// settle waits until all that a call has set off is done: every connect has
// ended or stands in a backlog, and nothing has come on an idle connection.
func (p *player) settle(line string) {
	state := ""
	for deadline := time.Now().Add(10 * time.Second); time.Now().Before(deadline); time.Sleep(50 * time.Microsecond) {
		p.mu.Lock()
		unfinished := 0
		for _, c := range p.names {
			if c.waiting {
				unfinished++
			}
			if c.waiting && c.aborted {
				unfinished++ // it is not to be found in a backlog
			}
		}
		p.mu.Unlock()
		waiting, lost := 0, 0
		p.worker.mu.Lock()
		for _, pool := range p.worker.pools {
			waiting += len(pool.waiting)
			for _, s := range pool.idle {
				if s.look() != quiet {
					lost++
				}
			}
		}
		p.worker.mu.Unlock()
		if unfinished == waiting && lost == 0 {
			return
		}
		state = fmt.Sprintf("%d connects have not ended, %d wait in a backlog; %d idle connections are lost", unfinished, waiting, lost)
	}
	p.t.Fatalf("%q: not done within 10 s: %s", line, state)
}

func (p *player) run(line string) string {
	words := strings.Fields(line)
	verb, name := words[0], words[1]
	options := map[string]string{}
	for _, word := range words[2:] {
		key, value, _ := strings.Cut(word, "=")
		options[key] = value
	}
	p.mu.Lock()
	this := p.names[name]
	if this == nil {
		this = &connecting{abort: func() {}}
	}
	waiting, held := this.waiting, this.held
	p.mu.Unlock()
	switch verb {
	case "connect":
		if waiting || held {
			return "busy"
		}
		p.connect(name, options)
		return "connecting"
	case "abort":
		if !waiting {
			return "not waiting"
		}
		p.mu.Lock()
		this.aborted = true
		p.mu.Unlock()
		this.abort()
		return "aborted"
	case "join":
		for waiting {
			p.mu.Lock()
			waiting = this.waiting
			p.mu.Unlock()
			time.Sleep(100 * time.Microsecond)
		}
		return "joined"
	case "fin", "rst", "push", "await":
		if this.number == 0 {
			return "no number"
		}
		return p.ask(fmt.Sprintf("%s %d", verb, this.number))
	}
	if waiting {
		return "waiting"
	}
	if this.conn == nil {
		return "no socket"
	}
	var err error
	switch verb {
	case "ping", "more":
		return p.ping(this.conn, strings.ToUpper(verb), func() { p.ask("nop") })
	case "close":
		err = this.conn.Close()
	case "keepalive":
		timeout := DefaultKeepalive
		if options["timeout"] != "" {
			timeout = milliseconds(options["timeout"])
		}
		size, _ := strconv.Atoi(options["size"])
		err = this.conn.SetKeepalive(timeout, size)
	default:
		p.t.Fatalf("unknown verb %q", verb)
	}
	if err == nil || errors.Is(err, ErrDubious) {
		this.held = false
	}
	return inNginxWords(err)
}

// connect begins to connect in another goroutine.
func (p *player) connect(name string, options map[string]string) {
	ctx, cancel := context.WithCancel(p.t.Context())
	this := &connecting{waiting: true, abort: cancel}
	p.mu.Lock()
	p.names[name] = this
	p.mu.Unlock()
	o := ConnectOptions{Pool: options["pool"], Timeout: milliseconds(options["timeout"])}
	o.PoolSize, _ = strconv.Atoi(options["size"])
	if backlog, err := strconv.Atoi(options["backlog"]); err == nil {
		o.Backlog = &backlog
	}
	addr := p.server.data
	switch options["to"] {
	case "refused":
		addr = p.refused
	case "unreachable":
		addr = netip.AddrPortFrom(netip.AddrFrom4([4]byte{127, 255, 255, 255}), addr.Port())
	}
	p.threads.Go(func() {
		conn, err := p.worker.Connect(ctx, addr, o)
		result := inNginxWords(err)
		number := 0
		if err == nil {
			reply := p.ping(conn, "PING", func() {})
			result = fmt.Sprintf("reused %d %s", conn.ReusedTimes(), reply)
			_, _ = fmt.Sscanf(reply, "pong %d", &number)
		}
		p.mu.Lock()
		defer p.mu.Unlock()
		this.conn, this.number, this.held, this.waiting = conn, number, err == nil, false
		if !this.aborted {
			p.finished = append(p.finished, name+": "+result)
		}
	})
}

// ping reads the reply byte by byte, for all that it does not read is to stay in
// the buffer of the connection. It begins when all of the reply has come.
func (p *player) ping(c *Conn, request string, come func()) string {
	_ = c.SetDeadline(time.Now().Add(10 * time.Second))
	if _, err := io.WriteString(c, request+"\n"); err != nil {
		return inNginxWords(err)
	}
	come()
	reply := ""
	for {
		var b [1]byte
		if _, err := c.Read(b[:]); err != nil {
			return inNginxWords(err)
		}
		if b[0] == '\n' {
			return reply
		}
		reply += string(b[:])
	}
}

func milliseconds(s string) time.Duration {
	n, _ := strconv.Atoi(s)
	return time.Duration(n) * time.Millisecond
}

// inNginxWords is the text that lua-nginx-module has for an error.
func inNginxWords(err error) string {
	if err == nil {
		return "ok"
	}
	if errors.Is(err, io.EOF) {
		return "closed"
	}
	if errno, ok := errors.AsType[syscall.Errno](err); ok {
		return errno.Error()
	}
	return err.Error()
}

// record is a script and what nginx answered to it.
type record struct {
	name            string
	script, account []string
}

// records reads testdata/cosockets.txt.
func records(t testing.TB) []record {
	t.Helper()
	text, err := os.ReadFile("testdata/cosockets.txt")
	require.NoError(t, err)
	var all []record
	for line := range strings.Lines(string(text)) {
		line = strings.TrimSuffix(line, "\n")
		if name, ok := strings.CutPrefix(line, "## "); ok {
			all = append(all, record{name: name})
		} else if call, _, ok := strings.Cut(line, " -> "); ok {
			r := &all[len(all)-1]
			r.script = append(r.script, call)
			r.account = append(r.account, line)
		}
	}
	require.NotEmpty(t, all)
	return all
}

func TestWorkersAnswerAsCosocketsDo(t *testing.T) {
	for _, r := range records(t) {
		t.Run(r.name, func(t *testing.T) {
			if diff := cmp.Diff(r.account, play(t, r.script)); diff != "" {
				t.Errorf("nginx (-) and the worker (+) differ:\n%s", diff)
			}
		})
	}
}
