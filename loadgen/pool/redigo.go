package pool

import (
	"cmp"
	"context"
	"errors"
	"fmt"
	"net"
	"net/netip"
	"sync"
	"time"

	redigo "github.com/gomodule/redigo/redis"

	"connlab/loadgen"
)

// RedigoConfig are the settings of redigo's Pool, of which there is one for each
// server. Zero values are redigo's own defaults, under which nothing is kept and
// nothing is limited. Its Get takes the idle connection that was returned last. A
// connection that is returned is kept too, and if there are then more than MaxIdle
// the one that is idle longest is closed (put in redis/pool.go): calls in flight
// beyond MaxIdle cost a dial each, however many MaxActive lets in.
type RedigoConfig struct {
	Dial      Dial // nil: from the program's own place
	MaxIdle   int  // idle connections kept; 0 keeps none
	MaxActive int  // connections at most, idle or not, those of callers that close not counted; 0: any number
	// Wait makes a call at MaxActive wait for a connection instead of failing. Without
	// MaxActive it means nothing.
	Wait bool
	// IdleTimeout is how long an idle connection is kept; 0: for ever. It is closed
	// when the next call asks for a connection.
	IdleTimeout time.Duration
	// MaxConnLifetime is how long after its dial a connection is used; 0: for ever. An
	// older one is closed when a call comes upon it.
	MaxConnLifetime time.Duration
	// Timeout is for coming to a connection, waiting included, and again for the
	// reply; the default is 5 s.
	Timeout time.Duration
}

// Redigo is a [Pool] over github.com/gomodule/redigo. Callers that keep use its
// Pool. Callers that close use redis.Dial and Close, because with redigo there is
// no other way to close: a connection of its Pool goes back there by Close.
type Redigo struct {
	cfg    RedigoConfig
	ledger ledger
	mu     sync.Mutex
	pools  map[netip.AddrPort]*redigo.Pool
}

// NewRedigo makes a Pool without connections.
func NewRedigo(cfg RedigoConfig) *Redigo {
	cfg.Timeout = cmp.Or(cfg.Timeout, defaultTimeout)
	return &Redigo{cfg: cfg, ledger: ledger{dial: cfg.Dial}, pools: map[netip.AddrPort]*redigo.Pool{}}
}

// Get takes a connection of the Pool for a caller that keeps, and dials for one
// that closes.
func (p *Redigo) Get(ctx context.Context, kind Kind, addr netip.AddrPort) (Lease, error) {
	if kind == Closes {
		c, err := p.dial(ctx, addr)
		if err != nil {
			return nil, err
		}
		return &redigoLease{conn: c, socket: c, use: c.tracked.use()}, nil
	}
	if p.cfg.Wait {
		// Without it only a dial takes time.
		var cancel context.CancelFunc
		ctx, cancel = context.WithTimeout(ctx, p.cfg.Timeout)
		defer cancel()
	}
	var had *redigoConn
	c, err := p.pool(addr).GetContext(context.WithValue(ctx, redigoKey{}, &had))
	if err != nil {
		if _, dialed := errors.AsType[*dialError](err); !dialed && ctx.Err() != nil {
			return nil, fmt.Errorf("%w: %w", errNoTurn, err)
		}
		return nil, err
	}
	return &redigoLease{conn: c, socket: had, use: had.tracked.use()}, nil
}

// redigoKey is the key of a context's **redigoConn: where to put the connection
// that GetContext comes to, which it does not show.
type redigoKey struct{}

type redigoConn struct {
	redigo.Conn
	tracked *tracked
}

func (p *Redigo) pool(addr netip.AddrPort) *redigo.Pool {
	p.mu.Lock()
	defer p.mu.Unlock()
	pool := p.pools[addr]
	if pool == nil {
		pool = &redigo.Pool{
			MaxIdle: p.cfg.MaxIdle, MaxActive: p.cfg.MaxActive, Wait: p.cfg.Wait,
			IdleTimeout: p.cfg.IdleTimeout, MaxConnLifetime: p.cfg.MaxConnLifetime,
			DialContext: func(ctx context.Context) (redigo.Conn, error) {
				c, err := p.dial(ctx, addr)
				if err != nil {
					return nil, err
				}
				*ctx.Value(redigoKey{}).(**redigoConn) = c
				return c, nil
			},
			TestOnBorrowContext: func(ctx context.Context, c redigo.Conn, _ time.Time) error {
				*ctx.Value(redigoKey{}).(**redigoConn) = c.(*redigoConn)
				return nil // no test: it is the usual setting
			},
		}
		p.pools[addr] = pool
	}
	return pool
}

func (p *Redigo) dial(ctx context.Context, addr netip.AddrPort) (*redigoConn, error) {
	ctx, cancel := context.WithTimeout(ctx, p.cfg.Timeout)
	defer cancel()
	var t *tracked
	c, err := redigo.DialContext(ctx, "tcp", addr.String(),
		redigo.DialReadTimeout(p.cfg.Timeout), redigo.DialWriteTimeout(p.cfg.Timeout),
		redigo.DialContextFunc(func(ctx context.Context, _, _ string) (net.Conn, error) {
			var err error
			if t, err = p.ledger.connect(ctx, addr); err != nil {
				return nil, err
			}
			return t, nil
		}))
	if err != nil {
		return nil, err
	}
	return &redigoConn{c, t}, nil
}

// Account counts the connections of both kinds.
func (p *Redigo) Account() Account { return p.ledger.account() }

// Close closes the idle connections.
func (p *Redigo) Close() error {
	p.mu.Lock()
	defer p.mu.Unlock()
	for _, pool := range p.pools {
		_ = pool.Close() // always nil
	}
	return nil
}

type redigoLease struct {
	conn   redigo.Conn
	socket *redigoConn // behind what the Pool has put around it
	use    Use
}

func (l *redigoLease) Use() Use { return l.use }

// Ping does as redigo's DoContext: a ctx that is done closes the connection. It does
// so without DoContext's goroutine for each command.
func (l *redigoLease) Ping(ctx context.Context) error {
	stop := context.AfterFunc(ctx, func() { _ = l.socket.Close() }) // and so the Pool does not keep it
	defer stop()
	_, err := l.conn.Do("PING")
	if reply, ok := errors.AsType[redigo.Error](err); ok {
		return fmt.Errorf("%w: %s", loadgen.ErrServer, string(reply))
	}
	if err != nil && ctx.Err() != nil {
		return ctx.Err()
	}
	return err
}

// Return gives the connection to the Pool or closes it: redigo calls both Close.
func (l *redigoLease) Return() error { return l.conn.Close() }
