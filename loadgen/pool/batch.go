package pool

import (
	"cmp"
	"context"
	"net/netip"
	"slices"
	"sync"
	"sync/atomic"
	"time"
)

// BatchConfig says when a [Batcher] sends what it has collected. Zero values have
// the defaults named here.
type BatchConfig struct {
	Dial     Dial // nil: from the program's own place
	Commands int  // a batch is sent as soon as it has so many commands; the default is 3
	// Delay is how long after its first command a batch is sent at the latest; the
	// default is 5 ms. If it is negative, a batch waits for nothing but the one
	// before it to be written: it has what came meanwhile.
	Delay time.Duration
	// Conns is the number of connections that [Batching] has to each server; the
	// default is 1. Each has its own batches. A command goes to one of them at
	// random, by Seed: by turns, arrivals would be more regular than they came.
	Conns int
	Seed  uint64
	// Timeout is for connecting, again for writing a batch and, from the same moment,
	// for all of its replies; the default is 5 s.
	Timeout time.Duration
}

func (cfg BatchConfig) withDefaults() BatchConfig {
	cfg.Commands = max(1, cmp.Or(cfg.Commands, 3))
	cfg.Delay = cmp.Or(cfg.Delay, 5*time.Millisecond)
	cfg.Conns = max(1, cfg.Conns)
	cfg.Timeout = cmp.Or(cfg.Timeout, defaultTimeout)
	return cfg
}

// BatchStats counts the commands of a [Batcher]. Each call of [Batcher.Do] counts
// in exactly one of Commands, Canceled and Unsent.
type BatchStats struct {
	Batches  int64 // given to a connection
	Commands int64 // in them; Commands/Batches is the mean batch
	Canceled int64 // taken out of their batch, because their caller's context was done
	Unsent   int64 // failed with a dial or with Close before they were sent
	// Abandoned is the number of callers that did not wait for the reply or the
	// failure of a command that could not be taken out any more.
	Abandoned int64
}

func (s *BatchStats) add(other BatchStats) {
	s.Batches += other.Batches
	s.Commands += other.Commands
	s.Canceled += other.Canceled
	s.Unsent += other.Unsent
	s.Abandoned += other.Abandoned
}

// Batcher merges the commands of many goroutines into pipelines on one connection
// to one server: a batch is sent when it has BatchConfig.Commands, or
// BatchConfig.Delay after the first of them came. It may be used from many
// goroutines.
//
//   - Commands reach the server in the order in which Do was called, and replies
//     are matched to them by that order. An error reply is only its caller's.
//   - The connection is full duplex: a batch does not wait for the replies of those
//     before it. (The worker of the article that has 3 commands or 5 ms waits for
//     the replies: it sends one batch in a round trip at most.)
//   - When a caller's context is done, only its own wait ends. A command that is
//     not sent yet is taken out of its batch, for the rest of which nothing
//     changes: it is sent Delay after the first one came, be that one gone. A
//     batch that became empty is none: the next command begins another. The
//     reply to a command that was sent is read and dropped.
//   - When the connection breaks (FIN, RST, what is no RESP, a reply that nothing
//     asked for, or a timeout), all commands that were written to it or being written,
//     and not answered, fail with the cause. Those not yet sent go out on the
//     next connection. It is read all the time, so that one that the server closes while
//     nothing is outstanding is not used again.
//   - A connection is dialed when there is a batch to send. A dial that fails
//     fails all batches that are complete or due by then, and the next one dials
//     again. Nothing is retried.
//
// Nothing holds back the callers: who starts them bounds how many wait. Commands
// without exactly one reply (SUBSCRIBE, MONITOR, CLIENT REPLY), those that
// block the server's side of the connection (BLPOP), and transactions are not for a
// connection that is shared.
//
// RESP is redigo's. It gathers what it writes in 4,096 bytes: a batch is one write(2) if
// it fits.
type Batcher struct {
	addr   netip.AddrPort
	cfg    BatchConfig
	ledger *ledger

	ctx     context.Context // until Close
	cancel  context.CancelFunc
	running sync.WaitGroup
	wake    chan struct{} // there is a batch to send
	timer   *time.Timer   // for collecting's due time
	calls   sync.Pool     // of *batchCall

	mu         sync.Mutex
	complete   []*batch // not yet sent, oldest first
	collecting *batch   // has less than cfg.Commands; nil if there are no commands for it
	conn       *batchConn
	closed     bool
	stats      BatchStats
}

// batch is what one pipeline consists of.
type batch struct {
	calls    []*batchCall
	due      time.Time    // when it is sent though it has less than cfg.Commands
	gone     bool         // given to a connection, or failed: no call can be taken out
	deadline time.Time    // for its replies
	written  atomic.Int64 // calls that its connection's write is done with
}

// batchCall is one command. The one who takes the token out of done owns it.
type batchCall struct {
	command string
	args    []any
	batch   *batch

	reply any
	err   error
	local netip.AddrPort // of the connection that it was sent on, if it was
	done  chan struct{}  // of one place: whoever fills it does not wait for the caller
}

func (c *batchCall) finish(reply any, err error, local netip.AddrPort) {
	c.reply, c.err, c.local = reply, err, local
	c.done <- struct{}{}
}

// NewBatcher makes a Batcher for the server at addr. It dials when there is something
// to send. BatchConfig.Conns and Seed have no meaning for it. It must be closed.
func NewBatcher(addr netip.AddrPort, cfg BatchConfig) *Batcher {
	return newBatcher(addr, cfg.withDefaults(), &ledger{dial: cfg.Dial})
}

func newBatcher(addr netip.AddrPort, cfg BatchConfig, l *ledger) *Batcher {
	b := &Batcher{addr: addr, cfg: cfg, ledger: l, wake: make(chan struct{}, 1), timer: time.NewTimer(time.Hour)}
	b.timer.Stop()
	b.calls.New = func() any { return &batchCall{done: make(chan struct{}, 1)} }
	b.ctx, b.cancel = context.WithCancel(context.Background())
	b.running.Go(b.run)
	return b
}

// Do sends a command with the next batch and waits for its reply, of the types that
// redigo has for them. The error is a redigo.Error if that is the reply; the cause of
// ctx if that is done first; ErrClosed; or it says why the connection could not be
// opened or broke. The arguments must not be changed before Do returns, nor, if ctx
// was done, before Close.
func (b *Batcher) Do(ctx context.Context, command string, args ...any) (any, error) {
	reply, _, err := b.do(ctx, command, args)
	return reply, err
}

// do also says on which connection the command was sent.
func (b *Batcher) do(ctx context.Context, command string, args []any) (any, netip.AddrPort, error) {
	c := b.calls.Get().(*batchCall)
	c.command, c.args = command, args
	err := b.collect(ctx, c)
	if err == nil {
		select {
		case <-c.done:
		case <-ctx.Done():
			err = context.Cause(ctx)
			if !b.takeOut(c) {
				return nil, netip.AddrPort{}, err // the call is still the connection's
			}
		}
	}
	reply, local := c.reply, c.local
	err = cmp.Or(err, c.err)
	*c = batchCall{done: c.done}
	b.calls.Put(c)
	return reply, local, err
}

// collect puts a call into the batch that is being collected.
func (b *Batcher) collect(ctx context.Context, c *batchCall) error {
	b.mu.Lock()
	defer b.mu.Unlock()
	if b.closed {
		b.stats.Unsent++
		return ErrClosed
	}
	if ctx.Err() != nil {
		b.stats.Canceled++
		return context.Cause(ctx)
	}
	first := b.collecting == nil
	if first {
		b.collecting = &batch{calls: make([]*batchCall, 0, min(b.cfg.Commands, 64)), due: time.Now().Add(max(0, b.cfg.Delay))}
	}
	c.batch = b.collecting
	c.batch.calls = append(c.batch.calls, c)
	switch {
	case len(c.batch.calls) == b.cfg.Commands:
		b.complete = append(b.complete, c.batch)
		b.collecting = nil
		b.timer.Stop()
		b.wakeUp()
	case first && b.cfg.Delay < 0:
		b.wakeUp()
	case first:
		b.timer.Reset(b.cfg.Delay)
	}
	return nil
}

func (b *Batcher) wakeUp() {
	select {
	case b.wake <- struct{}{}:
	default: // it will look for all there is
	}
}

// takeOut takes a call out of its batch, and says whether it still could.
func (b *Batcher) takeOut(c *batchCall) bool {
	b.mu.Lock()
	defer b.mu.Unlock()
	if c.batch.gone {
		b.stats.Abandoned++
		return false
	}
	b.stats.Canceled++
	i := slices.Index(c.batch.calls, c)
	if c.batch.calls = slices.Delete(c.batch.calls, i, i+1); len(c.batch.calls) > 0 {
		return true
	}
	if c.batch == b.collecting {
		b.collecting = nil
		b.timer.Stop()
		return true
	}
	i = slices.Index(b.complete, c.batch)
	b.complete = slices.Delete(b.complete, i, i+1)
	return true
}

// run sends the batches.
func (b *Batcher) run() {
	for {
		select {
		case <-b.ctx.Done():
			return
		case <-b.wake:
		case <-b.timer.C:
		}
		for b.next() {
			if conn, err := b.connect(); err != nil {
				b.fail(b.takeAll(false), err)
			} else {
				b.send(conn)
			}
		}
	}
}

// next says whether there is a batch to send.
func (b *Batcher) next() bool {
	b.mu.Lock()
	defer b.mu.Unlock()
	return b.oldest() != nil
}

// oldest is the batch to be sent next, or nil. The caller holds mu.
func (b *Batcher) oldest() *batch {
	if len(b.complete) > 0 {
		return b.complete[0]
	}
	if b.collecting != nil && !time.Now().Before(b.collecting.due) {
		return b.collecting
	}
	return nil
}

// pop takes the oldest batch away. The caller holds mu.
func (b *Batcher) pop() {
	if len(b.complete) > 0 {
		b.complete[0].gone, b.complete[0] = true, nil
		b.complete = b.complete[1:]
		return
	}
	b.collecting.gone, b.collecting = true, nil
}

// connect is for run: the connection, a new one if there is none that works.
func (b *Batcher) connect() (*batchConn, error) {
	if b.conn != nil && !b.conn.isBroken() { // only run changes b.conn
		return b.conn, nil
	}
	ctx, cancel := context.WithTimeout(b.ctx, b.cfg.Timeout)
	defer cancel()
	t, err := b.ledger.connect(ctx, b.addr)
	if err != nil {
		return nil, err
	}
	b.mu.Lock()
	defer b.mu.Unlock()
	if b.closed {
		_ = t.Close()
		return nil, ErrClosed
	}
	b.conn = newBatchConn(t, b.cfg.Timeout)
	b.running.Go(b.conn.read)
	return b.conn, nil
}

// send writes the oldest batch, unless it is gone, all of its callers having left. If
// the connection broke meanwhile it leaves the batch for the next one.
func (b *Batcher) send(conn *batchConn) {
	conn.writing.Lock()
	defer conn.writing.Unlock()
	if oldest := b.give(conn); oldest != nil {
		conn.write(oldest)
	}
}

// give makes the oldest batch the connection's and returns it, or nil.
func (b *Batcher) give(conn *batchConn) *batch {
	b.mu.Lock()
	defer b.mu.Unlock()
	oldest := b.oldest()
	if oldest == nil || !conn.owe(oldest) {
		return nil
	}
	b.pop()
	b.stats.Batches++
	b.stats.Commands += int64(len(oldest.calls))
	return oldest
}

// takeAll takes away the batches that are complete or due, or all.
func (b *Batcher) takeAll(closing bool) []*batch {
	b.mu.Lock()
	defer b.mu.Unlock()
	if closing {
		b.closed = true
	}
	var taken []*batch
	for {
		oldest := b.oldest()
		if oldest == nil && closing {
			oldest = b.collecting
		}
		if oldest == nil {
			return taken
		}
		b.pop()
		b.stats.Unsent += int64(len(oldest.calls))
		taken = append(taken, oldest)
	}
}

func (b *Batcher) fail(batches []*batch, err error) {
	for _, f := range batches {
		for _, c := range f.calls {
			c.finish(nil, err, netip.AddrPort{})
		}
	}
}

// Stats counts the commands so far.
func (b *Batcher) Stats() BatchStats {
	b.mu.Lock()
	defer b.mu.Unlock()
	return b.stats
}

// Close closes the connection. Commands that wait, and those whose replies are
// outstanding, fail with ErrClosed. It returns nil.
func (b *Batcher) Close() error {
	waiting := b.takeAll(true)
	b.cancel() // ends a dial
	b.fail(waiting, ErrClosed)
	b.mu.Lock()
	conn := b.conn
	b.mu.Unlock()
	if conn != nil {
		conn.close(ErrClosed)
	}
	b.running.Wait()
	return nil
}
