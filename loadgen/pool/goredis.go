package pool

import (
	"bytes"
	"cmp"
	"context"
	"errors"
	"fmt"
	"net"
	"net/netip"
	"runtime"
	"strconv"
	"sync"
	"sync/atomic"
	"time"

	goredis "github.com/redis/go-redis/v9"
	"github.com/redis/go-redis/v9/maintnotifications"

	"connlab/loadgen"
)

// GoRedisConfig are the settings of go-redis v9's Client, of which there is one
// for each server. Zero values are go-redis's own defaults.
type GoRedisConfig struct {
	Dial Dial // nil: from the program's own place
	// PoolSize is how many connections are in use at a time, those of callers that
	// close not counted; 0: 10 for each CPU. A call beyond it waits for PoolTimeout.
	PoolSize     int
	PoolTimeout  time.Duration
	MinIdleConns int // idle connections opened in advance, up to PoolSize in all
	// MaxIdleConns is how many idle connections are kept; 0: any number, where redigo
	// keeps none.
	MaxIdleConns int
	// MaxActiveConns is how many connections there are at most, idle or not; 0: any
	// number. A call beyond it fails at once: it means something below PoolSize only.
	MaxActiveConns  int
	ConnMaxIdleTime time.Duration // an idle connection is not used after it; 0: 30 minutes, negative: no limit
	// DialerRetries is how often one call dials, at most, DialerRetryTimeout after
	// the last one failed; 0: 5 times and 100 ms. These are beside the tries of package
	// net: a call that finds no local port makes 15 calls of connect(2).
	DialerRetries      int
	DialerRetryTimeout time.Duration
	// Ephemeral makes callers that close use Client.EphemeralConn instead of a
	// Client of their own. It takes an idle connection of the pool if there is
	// one, and closes it in the end.
	Ephemeral bool
	// Timeout is for connecting, and again for sending and for the reply; the default
	// is 5 s. Waiting for a turn has PoolTimeout, by default 1 s more.
	Timeout time.Duration
}

// GoRedis is a [Pool] over github.com/redis/go-redis/v9. A caller that keeps has
// a connection to itself by Client.Conn, whose Close gives it back. A caller that
// closes has a Client of its own, and closes that.
//
// Two habits of go-redis show: each new connection is greeted with HELLO, one more
// request; and after as many calls whose dials failed as PoolSize it answers with
// the last error without dialing, until a dial that it tries each second succeeds.
// Retries of commands, CLIENT SETINFO and maintenance notifications are turned off.
type GoRedis struct {
	cfg       GoRedisConfig
	ledger    ledger
	lastToken atomic.Uint64
	leases    sync.Map // of the pings on their way: uint64 token to *goRedisLease
	mu        sync.Mutex
	clients   map[netip.AddrPort]*goredis.Client
}

var quietGoRedis = sync.OnceFunc(func() { goredis.SetLogger(noLog{}) })

type noLog struct{}

func (noLog) Printf(context.Context, string, ...any) {}

// NewGoRedis makes a Pool without connections. It silences go-redis in the whole
// program: it would print a line for each dial that fails.
func NewGoRedis(cfg GoRedisConfig) *GoRedis {
	quietGoRedis()
	cfg.Timeout = cmp.Or(cfg.Timeout, defaultTimeout)
	cfg.PoolTimeout = cmp.Or(cfg.PoolTimeout, cfg.Timeout+time.Second)
	// Its default, as it is now: players of schedules change GOMAXPROCS.
	cfg.PoolSize = cmp.Or(cfg.PoolSize, 10*runtime.GOMAXPROCS(0))
	return &GoRedis{cfg: cfg, ledger: ledger{dial: cfg.Dial}, clients: map[netip.AddrPort]*goredis.Client{}}
}

// Get prepares a call; its first Ping takes the connection.
func (p *GoRedis) Get(_ context.Context, kind Kind, addr netip.AddrPort) (Lease, error) {
	l := &goRedisLease{pool: p, token: p.lastToken.Add(1)}
	switch {
	case kind == Keeps:
		c := p.client(addr).Conn()
		l.do, l.close = c.Do, c.Close
	case p.cfg.Ephemeral:
		c := p.client(addr).EphemeralConn()
		l.do, l.close = c.Do, c.Close
	default:
		options := p.options(addr)
		options.PoolSize, options.MinIdleConns = 1, 0
		c := goredis.NewClient(options)
		l.do, l.close = c.Do, c.Close
	}
	return l, nil
}

func (p *GoRedis) client(addr netip.AddrPort) *goredis.Client {
	p.mu.Lock()
	defer p.mu.Unlock()
	c := p.clients[addr]
	if c == nil {
		c = goredis.NewClient(p.options(addr))
		p.clients[addr] = c
	}
	return c
}

func (p *GoRedis) options(addr netip.AddrPort) *goredis.Options {
	return &goredis.Options{
		Addr: addr.String(),
		Dialer: func(ctx context.Context, _, _ string) (net.Conn, error) {
			t, err := p.ledger.connect(ctx, addr)
			if err != nil {
				return nil, err
			}
			return &goRedisConn{t, &p.leases}, nil
		},
		PoolSize: p.cfg.PoolSize, PoolTimeout: p.cfg.PoolTimeout,
		MinIdleConns: p.cfg.MinIdleConns, MaxIdleConns: p.cfg.MaxIdleConns, MaxActiveConns: p.cfg.MaxActiveConns,
		ConnMaxIdleTime: p.cfg.ConnMaxIdleTime,
		DialTimeout:     p.cfg.Timeout, ReadTimeout: p.cfg.Timeout, WriteTimeout: p.cfg.Timeout,
		MaxRetries: -1, DialerRetries: p.cfg.DialerRetries, DialerRetryTimeout: p.cfg.DialerRetryTimeout,
		Protocol: 2, DisableIdentity: true, PipelinePoolSize: -1,
		MaintNotificationsConfig: &maintnotifications.Config{Mode: maintnotifications.ModeDisabled},
	}
}

// Account counts the connections of both kinds.
func (p *GoRedis) Account() Account { return p.ledger.account() }

// Close closes the clients of callers that keep, and their connections.
func (p *GoRedis) Close() error {
	p.mu.Lock()
	defer p.mu.Unlock()
	var errs []error
	for _, c := range p.clients {
		errs = append(errs, c.Close())
	}
	clear(p.clients)
	if err := errors.Join(errs...); err != nil {
		return fmt.Errorf("closing go-redis clients: %w", err)
	}
	return nil
}

type goRedisLease struct {
	pool  *GoRedis
	token uint64
	do    func(ctx context.Context, args ...any) *goredis.Cmd
	close func() error
	use   Use
}

func (l *goRedisLease) Use() Use { return l.use }

// Ping sends a token that the server sends back. go-redis does not show which
// connection it uses: the one on which the token passes by.
func (l *goRedisLease) Ping(ctx context.Context) error {
	l.pool.leases.Store(l.token, l)
	defer l.pool.leases.Delete(l.token)
	token := string(appendToken(nil, l.token))
	reply, err := l.do(ctx, "ping", token).Text()
	if _, ok := errors.AsType[goredis.Error](err); ok {
		return fmt.Errorf("%w: %w", loadgen.ErrServer, err)
	}
	if err == nil && reply != token {
		return fmt.Errorf("%w: %q to a ping with %q", errBadReply, reply, token)
	}
	return err
}

// Return gives the connection back, or closes it.
func (l *goRedisLease) Return() error { return l.close() }

// goRedisConn tells the lease whose ping it sends that it is the lease's.
type goRedisConn struct {
	*tracked
	leases *sync.Map
}

func (c *goRedisConn) Write(b []byte) (int, error) {
	if token, ok := tokenOf(b); ok {
		// go-redis writes in the goroutine that called Ping.
		if l, ok := c.leases.Load(token); ok && !l.(*goRedisLease).use.Local.IsValid() {
			l.(*goRedisLease).use = c.use()
		}
	}
	return c.tracked.Write(b)
}

// A token is a decimal number of tokenLength digits.
const tokenLength = 20

var tokenPrefix = []byte("*2\r\n$4\r\nping\r\n$" + strconv.Itoa(tokenLength) + "\r\n")

func appendToken(b []byte, token uint64) []byte { return fmt.Appendf(b, "%0*d", tokenLength, token) }

// tokenOf is the token in the request that b begins with.
func tokenOf(b []byte) (uint64, bool) {
	rest, ok := bytes.CutPrefix(b, tokenPrefix)
	if !ok || len(rest) < tokenLength {
		return 0, false
	}
	token, err := strconv.ParseUint(string(rest[:tokenLength]), 10, 64)
	return token, err == nil
}
