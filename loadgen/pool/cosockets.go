package pool

import (
	"cmp"
	"context"
	"errors"
	"fmt"
	"math/rand/v2"
	"net"
	"net/netip"
	"time"

	"connlab/loadgen"
)

// CosocketConfig says how calls use cosockets: what the directives and the Lua
// code of an nginx say.
type CosocketConfig struct {
	Dial Dial // nil: from the program's own place
	// Workers is the number of nginx workers, each with pools of its own; the
	// default is 1. A call goes to one of them at random: taking turns, a regular
	// schedule could give one worker all calls of a kind.
	Workers  int
	Settings Settings

	// PoolSize and Backlog are options of connect.
	PoolSize int
	Backlog  *int
	// KeepTimeout and Size are the arguments of setkeepalive: for KeepTimeout 0
	// means the directive's, and a negative one that idle connections do not expire.
	KeepTimeout time.Duration
	Size        int

	// Separate gives callers that close a pool name of their own: the remedy.
	Separate bool
	// PerRequest gives each call a worker of its own that ends with it, as
	// lua_code_cache off does.
	PerRequest bool

	// Timeout is for waiting in the backlog, again for dialing, and again for the
	// reply; the default is 5 s.
	Timeout time.Duration
}

// Cosockets is a [Pool] over the pools of nginx's cosockets: callers of both kinds
// connect in the same way and so take kept connections, whatever they will do
// with them.
type Cosockets struct {
	cfg     CosocketConfig
	ledger  ledger
	workers []*Worker
}

// NewCosockets makes a Pool without connections.
func NewCosockets(cfg CosocketConfig) *Cosockets {
	cfg.Timeout = cmp.Or(cfg.Timeout, defaultTimeout)
	switch {
	case cfg.KeepTimeout == 0:
		cfg.KeepTimeout = DefaultKeepalive
	case cfg.KeepTimeout < 0:
		cfg.KeepTimeout = 0
	}
	// ngx_event_connect_peer calls connect(2) once.
	p := &Cosockets{cfg: cfg, ledger: ledger{dial: cfg.Dial, tries: 1}}
	if !cfg.PerRequest {
		for range max(cfg.Workers, 1) {
			p.workers = append(p.workers, p.worker())
		}
	}
	return p
}

func (p *Cosockets) worker() *Worker {
	return NewWorker(func(ctx context.Context, addr netip.AddrPort) (net.Conn, error) {
		c, err := p.ledger.connect(ctx, addr)
		if err != nil {
			return nil, err
		}
		return c, nil
	}, p.cfg.Settings)
}

// Get connects: it takes a kept connection of the worker, or dials.
func (p *Cosockets) Get(ctx context.Context, kind Kind, addr netip.AddrPort) (Lease, error) {
	l := &cosocketLease{pool: p, kind: kind}
	var w *Worker
	if p.cfg.PerRequest {
		w = p.worker()
		l.own = w
	} else {
		w = p.workers[rand.IntN(len(p.workers))]
	}
	options := ConnectOptions{PoolSize: p.cfg.PoolSize, Backlog: p.cfg.Backlog, Timeout: p.cfg.Timeout}
	if p.cfg.Separate && kind == Closes {
		options.Pool = "closes:" + addr.String()
	}
	conn, err := w.Connect(ctx, addr, options)
	if err != nil {
		l.end()
		return nil, err
	}
	n := conn.ReusedTimes()
	l.conn, l.use = conn, Use{Dialed: n == 0, Reused: n, Local: localAddress(conn)}
	return l, nil
}

// Account counts the connections of all workers.
func (p *Cosockets) Account() Account { return p.ledger.account() }

// Close ends the workers.
func (p *Cosockets) Close() error {
	for _, w := range p.workers {
		_ = w.Close() // always nil
	}
	return nil
}

type cosocketLease struct {
	pool   *Cosockets
	kind   Kind
	conn   *Conn
	use    Use
	own    *Worker // of this request alone
	failed bool
}

func (l *cosocketLease) Use() Use { return l.use }

var pingRequest = []byte("*1\r\n$4\r\nPING\r\n")

func (l *cosocketLease) Ping(ctx context.Context) error {
	err := l.ping(ctx)
	// An error reply leaves the connection in order.
	l.failed = err != nil && !errors.Is(err, loadgen.ErrServer)
	return err
}

func (l *cosocketLease) ping(ctx context.Context) error {
	if err := l.conn.SetDeadline(time.Now().Add(l.pool.cfg.Timeout)); err != nil {
		return err
	}
	if ctx.Done() != nil {
		stop := context.AfterFunc(ctx, func() { _ = l.conn.SetDeadline(time.Unix(1, 0)) })
		defer stop()
	}
	if _, err := l.conn.Write(pingRequest); err != nil {
		return err
	}
	var buffer [512]byte
	for n := 0; n < len(buffer); {
		m, err := l.conn.Read(buffer[n:])
		n += m
		complete, bad := loadgen.RESPReply(buffer[:n])
		switch {
		case errors.Is(bad, loadgen.ErrServer):
			return bad
		case bad != nil:
			return fmt.Errorf("%w: %w", errBadReply, bad)
		case complete:
			return nil
		case err != nil:
			return err
		}
	}
	return fmt.Errorf("%w: longer than %d bytes", errBadReply, len(buffer))
}

// Return is setkeepalive or close. What setkeepalive does not take is closed, as
// nginx does when the request ends.
func (l *cosocketLease) Return() error {
	var err error
	if l.kind == Keeps && !l.failed {
		err = l.conn.SetKeepalive(l.pool.cfg.KeepTimeout, l.pool.cfg.Size)
	}
	_ = l.conn.Close() // ErrClosed if it was kept
	l.end()
	return err
}

// end ends the worker of a single request.
func (l *cosocketLease) end() {
	if l.own != nil {
		_ = l.own.Close() // always nil
	}
}
