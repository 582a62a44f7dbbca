package pool

import (
	"context"
	"errors"
	"fmt"
	"math/rand/v2"
	"net/netip"
	"sync"
	"sync/atomic"

	redigo "github.com/gomodule/redigo/redis"

	"connlab/loadgen"
)

// Batching is a [Pool] over [Batcher]: all callers share BatchConfig.Conns
// connections to each server. A caller has none to itself that it could close or give
// back, so both kinds are one.
type Batching struct {
	cfg       BatchConfig
	ledger    ledger
	lastToken atomic.Uint64

	mu       sync.Mutex
	random   *rand.Rand
	batchers map[netip.AddrPort][]*Batcher
}

// NewBatching makes a Pool without connections.
func NewBatching(cfg BatchConfig) *Batching {
	return &Batching{
		cfg: cfg.withDefaults(), ledger: ledger{dial: cfg.Dial},
		random: rand.New(rand.NewPCG(cfg.Seed, 0)), batchers: map[netip.AddrPort][]*Batcher{},
	}
}

// Get chooses the connection.
func (p *Batching) Get(_ context.Context, _ Kind, addr netip.AddrPort) (Lease, error) {
	p.mu.Lock()
	defer p.mu.Unlock()
	all := p.batchers[addr]
	if all == nil {
		for range p.cfg.Conns {
			all = append(all, newBatcher(addr, p.cfg, &p.ledger))
		}
		p.batchers[addr] = all
	}
	return &batchLease{pool: p, batcher: all[p.random.IntN(len(all))]}, nil
}

// Stats counts the commands so far, to all servers.
func (p *Batching) Stats() BatchStats {
	p.mu.Lock()
	defer p.mu.Unlock()
	var s BatchStats
	for _, all := range p.batchers {
		for _, b := range all {
			s.add(b.Stats())
		}
	}
	return s
}

// Account counts the connections to all servers.
func (p *Batching) Account() Account { return p.ledger.account() }

// Close closes the connections. It returns nil.
func (p *Batching) Close() error {
	p.mu.Lock()
	defer p.mu.Unlock()
	for _, all := range p.batchers {
		for _, b := range all {
			_ = b.Close() // always nil
		}
	}
	return nil
}

type batchLease struct {
	pool    *Batching
	batcher *Batcher
	use     Use
}

// Use says that the connection is shared, once there was one.
func (l *batchLease) Use() Use { return l.use }

// Ping sends a token that the server sends back.
func (l *batchLease) Ping(ctx context.Context) error {
	token := string(appendToken(nil, l.pool.lastToken.Add(1)))
	reply, local, err := l.batcher.do(ctx, "PING", []any{token})
	if local.IsValid() {
		l.use = Use{Shared: true, Local: local}
	}
	if reply, ok := errors.AsType[redigo.Error](err); ok {
		return fmt.Errorf("%w: %s", loadgen.ErrServer, string(reply))
	}
	if err != nil {
		return err
	}
	if text, err := redigo.String(reply, nil); err != nil || text != token {
		return fmt.Errorf("%w: %q to a ping with %q", errBadReply, reply, token)
	}
	return nil
}

// Return does nothing: the connection is not the caller's.
func (l *batchLease) Return() error { return nil }
