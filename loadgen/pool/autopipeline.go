package pool

import (
	"cmp"
	"context"
	"errors"
	"fmt"
	"net/netip"
	"sync"
	"time"

	goredis "github.com/redis/go-redis/v9"

	"connlab/loadgen"
)

// AutoPipelineConfig are the settings of go-redis v9's Client.AutoPipeline, of which
// there is one for each server. Zero values are go-redis's own defaults.
type AutoPipelineConfig struct {
	Dial Dial // nil: from the program's own place
	// MaxBatchSize is how many commands end the wait for more; 0: 300. It is no limit:
	// all that came while a batch was under way is sent as one.
	MaxBatchSize  int
	MaxFlushDelay time.Duration // how long commands wait for more; 0: as [AutoPipeline] says
	// MaxConcurrentBatches is how many batches are under way at a time, each on a
	// connection of its own; 0: 1. With more go-redis keeps no order among commands.
	MaxConcurrentBatches int
	PipelinePoolSize     int // connections for batches; 0: 10; beyond it they come from the Client's other pool
	// DialerRetries and DialerRetryTimeout are those of [GoRedisConfig].
	DialerRetries      int
	DialerRetryTimeout time.Duration
	// Timeout is for connecting, again for writing a batch, and again for all of its
	// replies; the default is 5 s.
	Timeout time.Duration
}

// AutoPipeline is a [Pool] over Client.AutoPipeline of github.com/redis/go-redis/v9,
// which merges the commands of callers that wait for their replies. Callers of both
// kinds share its connections: none has one to close.
//
// What it does by default (autopipeline.go, v9.23.0, "blocking face", half duplex):
// one batch at a time is written, and its replies are awaited before the next. There
// is no timer. A command that finds nothing under way is sent at once, alone. Those
// that come while a batch is under way wait for its end, and then for as many more as
// it had callers, which are expected to come again, until none came for 1/8 of the
// usual time of a batch (between 0.2 and 2 ms); less than 8 of them may be sent
// earlier, beside it, if MaxConcurrentBatches allows. With MaxFlushDelay they wait so
// long, or until there are MaxBatchSize.
//
// A caller's context does not end its wait. When a connection breaks, the commands of
// the batch on it that have no reply fail; commands that are queued go out with the
// next batch. Where all dials of its pool for batches fail, a batch does as many in
// the Client's other pool before it fails. Retries of commands are turned off, as in
// [GoRedis].
type AutoPipeline struct {
	cfg   AutoPipelineConfig
	redis *GoRedis // for its options and its ledger

	mu      sync.Mutex
	servers map[netip.AddrPort]autoPipelined
	tokens  uint64
}

type autoPipelined struct {
	client   *goredis.Client
	pipeline *goredis.AutoPipeliner
}

// NewAutoPipeline makes a Pool without connections. It silences go-redis in the whole
// program, as [NewGoRedis] does.
func NewAutoPipeline(cfg AutoPipelineConfig) *AutoPipeline {
	return &AutoPipeline{
		cfg: cfg,
		redis: NewGoRedis(GoRedisConfig{
			Dial: cfg.Dial, DialerRetries: cfg.DialerRetries, DialerRetryTimeout: cfg.DialerRetryTimeout, Timeout: cfg.Timeout,
		}),
		servers: map[netip.AddrPort]autoPipelined{},
	}
}

// Get prepares a call. It fails if go-redis refuses the configuration.
func (p *AutoPipeline) Get(_ context.Context, _ Kind, addr netip.AddrPort) (Lease, error) {
	p.mu.Lock()
	defer p.mu.Unlock()
	s, ok := p.servers[addr]
	if !ok {
		options := p.redis.options(addr)
		options.PipelinePoolSize = p.cfg.PipelinePoolSize
		s.client = goredis.NewClient(options)
		batching := goredis.DefaultBlockingAutoPipelineOptions()
		batching.MaxBatchSize = cmp.Or(p.cfg.MaxBatchSize, batching.MaxBatchSize)
		batching.MaxConcurrentBatches = cmp.Or(p.cfg.MaxConcurrentBatches, batching.MaxConcurrentBatches)
		batching.Unordered = batching.MaxConcurrentBatches > 1
		batching.MaxFlushDelay = p.cfg.MaxFlushDelay
		var err error
		if s.pipeline, err = s.client.AutoPipelineWithOptions(batching); err != nil {
			return nil, errors.Join(fmt.Errorf("auto-pipelining: %w", err), s.client.Close())
		}
		p.servers[addr] = s
	}
	p.tokens++
	return &autoPipelineLease{pipeline: s.pipeline, token: string(appendToken(nil, p.tokens))}, nil
}

// Account counts the connections to all servers.
func (p *AutoPipeline) Account() Account { return p.redis.Account() }

// Close closes the clients and their connections.
func (p *AutoPipeline) Close() error {
	p.mu.Lock()
	defer p.mu.Unlock()
	var errs []error
	for _, s := range p.servers {
		errs = append(errs, s.client.Close()) // and its pipeline
	}
	clear(p.servers)
	if err := errors.Join(errs...); err != nil {
		return fmt.Errorf("closing auto-pipelining clients: %w", err)
	}
	return nil
}

type autoPipelineLease struct {
	pipeline *goredis.AutoPipeliner
	token    string
	use      Use
}

// Use says that the connection is shared. go-redis does not show which it is.
func (l *autoPipelineLease) Use() Use { return l.use }

// Ping sends a token that the server sends back.
func (l *autoPipelineLease) Ping(ctx context.Context) error {
	// Process batches what Do, of the same type, would send by itself.
	cmd := goredis.NewStringCmd(ctx, "ping", l.token)
	err := l.pipeline.Process(ctx, cmd)
	if _, failed := errors.AsType[*dialError](err); failed {
		return err
	}
	l.use.Shared = true
	if _, ok := errors.AsType[goredis.Error](err); ok {
		return fmt.Errorf("%w: %w", loadgen.ErrServer, err)
	}
	if err == nil && cmd.Val() != l.token {
		return fmt.Errorf("%w: %q to a ping with %q", errBadReply, cmd.Val(), l.token)
	}
	return err
}

// Return does nothing: the connection is not the caller's.
func (l *autoPipelineLease) Return() error { return nil }
