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
// server. Zero values are redigo's own defaults.
type RedigoConfig struct {
	Dial        Dial          // nil: from the program's own place
	MaxIdle     int           // idle connections kept; 0 keeps none
	MaxActive   int           // connections at most, those of callers that close not counted; 0: any number
	Wait        bool          // at MaxActive wait for a connection instead of failing
	IdleTimeout time.Duration // an idle connection is closed after it; 0: never
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
	ctx, cancel := context.WithTimeout(ctx, p.cfg.Timeout)
	defer cancel()
	if kind == Closes {
		c, err := p.dial(ctx, addr)
		if err != nil {
			return nil, err
		}
		return &redigoLease{conn: c, use: c.tracked.use()}, nil
	}
	var had *redigoConn
	c, err := p.pool(addr).GetContext(context.WithValue(ctx, redigoKey{}, &had))
	if err != nil {
		if _, dialed := errors.AsType[*dialError](err); !dialed && ctx.Err() != nil {
			return nil, fmt.Errorf("%w: %w", errNoTurn, err)
		}
		return nil, err
	}
	return &redigoLease{conn: c, use: had.tracked.use()}, nil
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
			MaxIdle: p.cfg.MaxIdle, MaxActive: p.cfg.MaxActive, Wait: p.cfg.Wait, IdleTimeout: p.cfg.IdleTimeout,
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
	conn redigo.Conn
	use  Use
}

func (l *redigoLease) Use() Use { return l.use }

func (l *redigoLease) Ping(context.Context) error {
	_, err := l.conn.Do("PING")
	if reply, ok := errors.AsType[redigo.Error](err); ok {
		return fmt.Errorf("%w: %s", loadgen.ErrServer, string(reply))
	}
	return err
}

// Return gives the connection to the Pool or closes it: redigo calls both Close.
func (l *redigoLease) Return() error { return l.conn.Close() }
