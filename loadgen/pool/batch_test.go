package pool

import (
	"bufio"
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"net"
	"net/netip"
	"os"
	"strings"
	"sync"
	"testing"
	"testing/synctest"
	"time"

	redigo "github.com/gomodule/redigo/redis"
	"github.com/stretchr/testify/assert"
	"github.com/stretchr/testify/require"
)

const ms = time.Millisecond

// pipes is a server for tests with a clock of their own: it hands out net.Pipe, and
// writes down what it is sent. In each test time begins with it.
type pipes struct {
	begin  time.Time
	dial   func(ctx context.Context) error // before a connection is made; nil: nothing
	answer func(token string) string       // the reply to PING token, "" for none yet; nil: the token

	mu     sync.Mutex
	writes []write
	tokens []string
	ends   []net.Conn // of the server, one for each connection
}

// write is one write(2) to the server.
type write struct {
	At       time.Duration
	Commands int
}

type watchedPipe struct {
	net.Conn
	pipes *pipes
}

func (c watchedPipe) Write(b []byte) (int, error) {
	c.pipes.mu.Lock()
	c.pipes.writes = append(c.pipes.writes, write{time.Since(c.pipes.begin), bytes.Count(b, []byte("PING"))})
	c.pipes.mu.Unlock()
	return c.Conn.Write(b)
}

func (p *pipes) connect(ctx context.Context, _ netip.AddrPort) (net.Conn, error) {
	if p.dial != nil {
		if err := p.dial(ctx); err != nil {
			return nil, err
		}
	}
	client, server := net.Pipe()
	p.mu.Lock()
	p.ends = append(p.ends, server)
	p.mu.Unlock()
	go func() {
		in := bufio.NewReader(server)
		for {
			args, err := request(in)
			if err != nil {
				return
			}
			token := args[1]
			p.mu.Lock()
			p.tokens = append(p.tokens, token)
			p.mu.Unlock()
			reply := "+" + token + "\r\n"
			if p.answer != nil {
				reply = p.answer(token)
			}
			if _, err := io.WriteString(server, reply); err != nil {
				return
			}
		}
	}()
	return watchedPipe{client, p}, nil
}

// end is the server's end of the connection with a number, from 0.
func (p *pipes) end(number int) net.Conn {
	p.mu.Lock()
	defer p.mu.Unlock()
	return p.ends[number]
}

// outcome is how a Do ended, and when.
type outcome struct {
	reply any
	err   error
	at    time.Duration
}

// inBubble runs f with a Batcher whose server is s, at a time that goes on when all wait.
// ping does PING token at once in a goroutine of its own, which has come as far as it can
// when ping returns.
func inBubble(t *testing.T, s *pipes, cfg BatchConfig, f func(t *testing.T, b *Batcher, ping func(ctx context.Context, token string) *outcome)) {
	synctest.Test(t, func(t *testing.T) {
		s.begin = time.Now()
		cfg.Dial = s.connect
		b := NewBatcher(netip.AddrPort{}, cfg)
		defer func() { assert.NoError(t, b.Close()) }()
		f(t, b, func(ctx context.Context, token string) *outcome {
			o := new(outcome)
			go func() {
				o.reply, o.err = b.Do(ctx, "PING", token)
				o.at = time.Since(s.begin)
			}()
			synctest.Wait()
			return o
		})
	})
}

// connectionsOf says how many connections there are and were.
func connectionsOf(b *Batcher) Account {
	a := b.ledger.account()
	return Account{Dials: a.Dials, DialErrors: a.DialErrors, Closed: a.Closed, Open: a.Open}
}

// pass lets time pass, and then all others come as far as they can.
func pass(d time.Duration) {
	time.Sleep(d)
	synctest.Wait()
}

func TestABatchIsSentAtItsSizeOrItsTime(t *testing.T) {
	for _, c := range []struct {
		name  string
		k     int
		delay time.Duration
		come  []time.Duration
		want  []write
	}{
		{"as many as it takes: at once", 3, 5 * ms, []time.Duration{0, 0, 0}, []write{{0, 3}}},
		{"the last of them comes late", 3, 5 * ms, []time.Duration{0, 2 * ms, 4 * ms}, []write{{4 * ms, 3}}},
		{"too few: at its time after the first", 3, 5 * ms, []time.Duration{0, 3 * ms}, []write{{5 * ms, 2}}},
		{"what is too many is the next one's", 3, 5 * ms, []time.Duration{0, 0, 0, 0}, []write{{0, 3}, {5 * ms, 1}}},
		{"the time of a full batch is not the next one's", 2, 5 * ms, []time.Duration{0, 1 * ms, 4 * ms}, []write{{1 * ms, 2}, {9 * ms, 1}}},
		{"time begins with the first, not with the last batch", 3, 5 * ms, []time.Duration{0, 7 * ms}, []write{{5 * ms, 1}, {12 * ms, 1}}},
		{"of one: no waiting", 1, 5 * ms, []time.Duration{0, 0, 1 * ms}, []write{{0, 1}, {0, 1}, {1 * ms, 1}}},
		{"no time: no waiting", 3, -1, []time.Duration{0, 1 * ms, 1 * ms}, []write{{0, 1}, {1 * ms, 1}, {1 * ms, 1}}},
		{"defaults are 3 and 5 ms", 0, 0, []time.Duration{0, 0, 0, 1 * ms}, []write{{0, 3}, {6 * ms, 1}}},
	} {
		t.Run(c.name, func(t *testing.T) {
			s := &pipes{}
			inBubble(t, s, BatchConfig{Commands: c.k, Delay: c.delay}, func(t *testing.T, b *Batcher, ping func(context.Context, string) *outcome) {
				var got []*outcome
				for i, at := range c.come {
					pass(at - time.Since(s.begin))
					got = append(got, ping(t.Context(), fmt.Sprint(i)))
				}
				pass(time.Second)
				assert.Equal(t, c.want, s.writes)
				for i, o := range got {
					assert.NoError(t, o.err)
					assert.Equal(t, fmt.Sprint(i), o.reply)
				}
				assert.Equal(t, BatchStats{Batches: int64(len(c.want)), Commands: int64(len(c.come))}, b.Stats())
			})
		})
	}
}

func TestCommandsReachTheServerInOrder(t *testing.T) {
	s := &pipes{}
	inBubble(t, s, BatchConfig{Commands: 7, Delay: 2 * ms}, func(t *testing.T, _ *Batcher, ping func(context.Context, string) *outcome) {
		var want []string
		for i := range 500 {
			want = append(want, fmt.Sprint(i))
			ping(t.Context(), want[i])
			if i%31 == 0 {
				pass(3 * ms) // some go by their time
			}
		}
		pass(time.Second)
		assert.Equal(t, want, s.tokens)
	})
}

// TestABatchDoesNotWaitForReplies: the replies to all that was sent come at the end.
func TestABatchDoesNotWaitForReplies(t *testing.T) {
	s := &pipes{answer: func(string) string { return "" }}
	inBubble(t, s, BatchConfig{Commands: 2}, func(t *testing.T, _ *Batcher, ping func(context.Context, string) *outcome) {
		var got []*outcome
		for i := range 6 {
			got = append(got, ping(t.Context(), fmt.Sprint(i)))
		}
		require.Equal(t, []write{{0, 2}, {0, 2}, {0, 2}}, s.writes)
		pass(time.Second)
		_, err := io.WriteString(s.end(0), "+0\r\n+1\r\n+2\r\n+3\r\n+4\r\n+5\r\n")
		require.NoError(t, err)
		synctest.Wait()
		for i, o := range got {
			assert.Equal(t, &outcome{reply: fmt.Sprint(i), at: time.Second}, o)
		}
	})
}

func TestAnErrorReplyIsOneCallers(t *testing.T) {
	s := &pipes{answer: func(token string) string {
		if token == "1" {
			return "-ERR no 1\r\n"
		}
		return "+" + token + "\r\n"
	}}
	inBubble(t, s, BatchConfig{}, func(t *testing.T, _ *Batcher, ping func(context.Context, string) *outcome) {
		before, failed, after := ping(t.Context(), "0"), ping(t.Context(), "1"), ping(t.Context(), "2")
		assert.Equal(t, &outcome{reply: "0"}, before)
		assert.Equal(t, &outcome{err: redigo.Error("ERR no 1")}, failed)
		assert.Equal(t, &outcome{reply: "2"}, after)
		again := ping(t.Context(), "3")
		pass(5 * ms)
		assert.Equal(t, &outcome{reply: "3", at: 5 * ms}, again, "the connection is in order")
		assert.Len(t, s.ends, 1)
	})
}

func TestACallerThatLeavesEndsOnlyItsOwnWait(t *testing.T) {
	errLeft := errors.New("left")
	for _, c := range []struct {
		name string
		s    *pipes
		play func(t *testing.T, s *pipes, ping func(context.Context, string) *outcome, leave func(), ctx context.Context)
		want BatchStats
	}{
		{"before its batch is sent it is taken out, and the time goes on", &pipes{},
			func(t *testing.T, s *pipes, ping func(context.Context, string) *outcome, leave func(), ctx context.Context) {
				left := ping(ctx, "left")
				pass(1 * ms)
				stays := ping(t.Context(), "stays")
				pass(1 * ms)
				leave()
				pass(time.Second)
				assert.Equal(t, &outcome{err: errLeft, at: 2 * ms}, left)
				assert.Equal(t, &outcome{reply: "stays", at: 5 * ms}, stays)
				assert.Equal(t, []write{{5 * ms, 1}}, s.writes)
			}, BatchStats{Batches: 1, Commands: 1, Canceled: 1}},
		{"alone, it leaves no batch, and the next one has a time of its own", &pipes{},
			func(t *testing.T, s *pipes, ping func(context.Context, string) *outcome, leave func(), ctx context.Context) {
				left := ping(ctx, "left")
				leave()
				pass(3 * ms)
				next := ping(t.Context(), "next")
				pass(time.Second)
				assert.Equal(t, &outcome{err: errLeft}, left)
				assert.Equal(t, &outcome{reply: "next", at: 8 * ms}, next)
				assert.Equal(t, []write{{8 * ms, 1}}, s.writes)
			}, BatchStats{Batches: 1, Commands: 1, Canceled: 1}},
		{"its place is free for another", &pipes{},
			func(t *testing.T, s *pipes, ping func(context.Context, string) *outcome, leave func(), ctx context.Context) {
				ping(ctx, "left")
				ping(t.Context(), "0")
				leave()
				synctest.Wait()
				ping(t.Context(), "1")
				assert.Empty(t, s.writes)
				ping(t.Context(), "2")
				assert.Equal(t, []string{"0", "1", "2"}, s.tokens)
			}, BatchStats{Batches: 1, Commands: 3, Canceled: 1}},
		{"after its batch was sent its reply is dropped", &pipes{answer: func(string) string { return "" }},
			func(t *testing.T, s *pipes, ping func(context.Context, string) *outcome, leave func(), ctx context.Context) {
				first, left, last := ping(t.Context(), "0"), ping(ctx, "left"), ping(t.Context(), "2")
				leave()
				synctest.Wait()
				assert.Equal(t, &outcome{err: errLeft}, left)
				_, err := io.WriteString(s.end(0), "+0\r\n+left\r\n+2\r\n")
				require.NoError(t, err)
				synctest.Wait()
				assert.Equal(t, &outcome{reply: "0"}, first)
				assert.Equal(t, &outcome{reply: "2"}, last)
			}, BatchStats{Batches: 1, Commands: 3, Abandoned: 1}},
		{"while its batch waits for the connection it is taken out", &pipes{dial: func(context.Context) error { time.Sleep(1 * ms); return nil }},
			func(t *testing.T, s *pipes, ping func(context.Context, string) *outcome, leave func(), ctx context.Context) {
				ping(t.Context(), "0")
				left := ping(ctx, "left")
				ping(t.Context(), "2")
				leave()
				pass(time.Second)
				assert.Equal(t, &outcome{err: errLeft}, left)
				assert.Equal(t, []string{"0", "2"}, s.tokens)
			}, BatchStats{Batches: 1, Commands: 2, Canceled: 1}},
		{"all of them, while their batch waits for the connection: nothing is sent", &pipes{dial: func(context.Context) error { time.Sleep(1 * ms); return nil }},
			func(_ *testing.T, s *pipes, ping func(context.Context, string) *outcome, leave func(), ctx context.Context) {
				for range 3 {
					ping(ctx, "left")
				}
				leave()
				pass(time.Second)
				assert.Empty(t, s.writes)
			}, BatchStats{Canceled: 3}},
		{"it had left before", &pipes{},
			func(t *testing.T, s *pipes, ping func(context.Context, string) *outcome, leave func(), ctx context.Context) {
				leave()
				assert.Equal(t, &outcome{err: errLeft}, ping(ctx, "left"))
				pass(time.Second)
				assert.Empty(t, s.writes)
			}, BatchStats{Canceled: 1}},
	} {
		t.Run(c.name, func(t *testing.T) {
			inBubble(t, c.s, BatchConfig{}, func(t *testing.T, b *Batcher, ping func(context.Context, string) *outcome) {
				ctx, leave := context.WithCancelCause(t.Context())
				c.play(t, c.s, ping, func() { leave(errLeft) }, ctx)
				assert.Equal(t, c.want, b.Stats())
			})
		})
	}
}

// TestABrokenConnectionFailsWhatWasSentOnIt answers the first of six commands, and breaks
// the connection, while a seventh is being collected.
func TestABrokenConnectionFailsWhatWasSentOnIt(t *testing.T) {
	for _, c := range []struct {
		name  string
		after string // what the server sends after the first reply
		cause error
		at    time.Duration
	}{
		{"closed", "", io.EOF, 1 * ms},
		{"closed in the middle of a reply", "$5\r\nab", io.ErrUnexpectedEOF, 1 * ms},
		{"closed in the middle of a line", "+ab", io.EOF, 1 * ms},
	} {
		t.Run(c.name, func(t *testing.T) {
			first := true
			s := &pipes{answer: func(token string) string {
				if token == "0" || !first {
					return "+" + token + "\r\n"
				}
				return ""
			}}
			inBubble(t, s, BatchConfig{}, func(t *testing.T, b *Batcher, ping func(context.Context, string) *outcome) {
				var sent []*outcome
				for i := range 6 {
					sent = append(sent, ping(t.Context(), fmt.Sprint(i)))
				}
				later := ping(t.Context(), "later")
				pass(1 * ms)
				first = false
				_, err := io.WriteString(s.end(0), c.after)
				require.NoError(t, err)
				require.NoError(t, s.end(0).Close())
				pass(time.Second)
				assert.Equal(t, &outcome{reply: "0"}, sent[0])
				for _, o := range sent[1:] {
					assert.ErrorIs(t, o.err, c.cause)
					assert.Equal(t, c.at, o.at)
				}
				assert.Equal(t, &outcome{reply: "later", at: 5 * ms}, later)
				assert.Equal(t, []string{"0", "1", "2", "3", "4", "5", "later"}, s.tokens, "nothing is sent again")
				assert.Len(t, s.ends, 2)
				assert.Equal(t, BatchStats{Batches: 3, Commands: 7}, b.Stats())
			})
		})
	}
}

// TestWhatIsNoReplyBreaksTheConnection also when nothing asked for it.
func TestWhatIsNoReplyBreaksTheConnection(t *testing.T) {
	s := &pipes{}
	inBubble(t, s, BatchConfig{Commands: 1}, func(t *testing.T, b *Batcher, ping func(context.Context, string) *outcome) {
		require.NoError(t, ping(t.Context(), "0").err)
		_, err := io.WriteString(s.end(0), "+one too many\r\n")
		require.NoError(t, err)
		synctest.Wait()
		assert.True(t, b.conn.isBroken())
		assert.Equal(t, &outcome{reply: "1"}, ping(t.Context(), "1"), "on the next one")
		s.answer = func(string) string { return "?\r\n" }
		assert.ErrorContains(t, ping(t.Context(), "2").err, "connection broke: redigo: unexpected response line")
		assert.Equal(t, Account{Dials: 2, Closed: 2}, connectionsOf(b))
	})
}

// TestAnIdleConnectionThatTheServerClosedIsNotUsed.
func TestAnIdleConnectionThatTheServerClosedIsNotUsed(t *testing.T) {
	s := &pipes{}
	inBubble(t, s, BatchConfig{Commands: 1}, func(t *testing.T, b *Batcher, ping func(context.Context, string) *outcome) {
		require.NoError(t, ping(t.Context(), "0").err)
		pass(time.Hour)
		require.False(t, b.conn.isBroken(), "it may be idle as long as it likes")
		require.NoError(t, s.end(0).Close())
		synctest.Wait()
		assert.Equal(t, &outcome{reply: "1", at: time.Hour}, ping(t.Context(), "1"))
		assert.Equal(t, Account{Dials: 2, Closed: 1, Open: 1}, connectionsOf(b))
	})
}

// TestRepliesThatDoNotCome: each batch has its time from when it was sent.
func TestRepliesThatDoNotCome(t *testing.T) {
	s := &pipes{answer: func(token string) string {
		if strings.HasPrefix(token, "no") {
			return ""
		}
		time.Sleep(70 * ms)
		return "+" + token + "\r\n"
	}}
	inBubble(t, s, BatchConfig{Commands: 1, Timeout: 100 * ms}, func(t *testing.T, _ *Batcher, ping func(context.Context, string) *outcome) {
		slow := ping(t.Context(), "slow")
		pass(50 * ms)
		none := ping(t.Context(), "none")
		pass(80 * ms)
		with := ping(t.Context(), "no reply either")
		pass(time.Second)
		assert.Equal(t, &outcome{reply: "slow", at: 70 * ms}, slow)
		assert.ErrorIs(t, none.err, os.ErrDeadlineExceeded)
		assert.Equal(t, 150*ms, none.at)
		assert.ErrorIs(t, with.err, os.ErrDeadlineExceeded, "it was on the same connection")
		assert.Equal(t, 150*ms, with.at)
		again := ping(t.Context(), "again")
		pass(time.Second)
		assert.Equal(t, &outcome{reply: "again", at: 1200 * ms}, again)
	})
}

// TestAServerThatDoesNotRead: the write has its time as well.
func TestAServerThatDoesNotRead(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		begin := time.Now()
		var server net.Conn
		b := NewBatcher(netip.AddrPort{}, BatchConfig{Commands: 1, Timeout: 100 * ms, Dial: func(context.Context, netip.AddrPort) (net.Conn, error) {
			var client net.Conn
			client, server = net.Pipe()
			return client, nil
		}})
		_, err := b.Do(t.Context(), "PING", "0")
		assert.ErrorIs(t, err, os.ErrDeadlineExceeded)
		assert.Equal(t, 100*ms, time.Since(begin))
		assert.NoError(t, b.Close())
		assert.NoError(t, server.Close())
	})
}

// TestAReplyBeforeItsCommand: the server answers all four commands of a batch, of which
// it has not yet read the first, and the last did not fit into the buffer.
func TestAReplyBeforeItsCommand(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		client, server := net.Pipe()
		b := NewBatcher(netip.AddrPort{}, BatchConfig{Commands: 4, Dial: func(context.Context, netip.AddrPort) (net.Conn, error) { return client, nil }})
		var errs [4]error
		var calls sync.WaitGroup
		for i := range errs {
			calls.Go(func() { _, errs[i] = b.Do(t.Context(), "PING", strings.Repeat("x", 1200)) })
			synctest.Wait()
		}
		_, err := io.WriteString(server, "+0\r\n+1\r\n+2\r\n+3\r\n")
		require.NoError(t, err)
		calls.Wait()
		assert.NoError(t, errors.Join(errs[:3]...))
		assert.ErrorIs(t, errs[3], errBadReply)
		assert.NoError(t, b.Close())
		assert.NoError(t, server.Close())
	})
}

// TestADialThatFailsFailsWhatWaitsForIt: two complete batches, but not the one that
// is still being collected.
func TestADialThatFailsFailsWhatWaitsForIt(t *testing.T) {
	errDial := errors.New("no route")
	dials := 0
	s := &pipes{}
	s.dial = func(context.Context) error {
		if dials++; dials > 1 {
			return nil
		}
		time.Sleep(2 * ms)
		return errDial
	}
	inBubble(t, s, BatchConfig{}, func(t *testing.T, b *Batcher, ping func(context.Context, string) *outcome) {
		var got []*outcome
		for i := range 7 {
			got = append(got, ping(t.Context(), fmt.Sprint(i)))
		}
		pass(time.Second)
		for _, o := range got[:6] {
			assert.ErrorIs(t, o.err, errDial)
			_, dialed := errors.AsType[*dialError](o.err)
			assert.True(t, dialed)
			assert.Equal(t, 2*ms, o.at)
		}
		assert.Equal(t, &outcome{reply: "6", at: 5 * ms}, got[6])
		assert.Equal(t, BatchStats{Batches: 1, Commands: 1, Unsent: 6}, b.Stats())
		assert.Equal(t, Account{Dials: 1, DialErrors: 1, Open: 1}, connectionsOf(b))
	})
}

// TestADialHasItsTime.
func TestADialHasItsTime(t *testing.T) {
	s := &pipes{dial: func(ctx context.Context) error { <-ctx.Done(); return ctx.Err() }}
	inBubble(t, s, BatchConfig{Commands: 1, Timeout: 100 * ms}, func(t *testing.T, _ *Batcher, ping func(context.Context, string) *outcome) {
		o := ping(t.Context(), "0")
		pass(time.Second)
		assert.ErrorIs(t, o.err, context.DeadlineExceeded)
		assert.Equal(t, 100*ms, o.at)
	})
}

func TestCloseFailsWhatWaitsAndWhatIsInFlight(t *testing.T) {
	hang := false
	s := &pipes{answer: func(string) string { return "" }}
	s.dial = func(ctx context.Context) error {
		if hang {
			<-ctx.Done()
			return ctx.Err()
		}
		return nil
	}
	for _, hang = range []bool{false, true} {
		t.Run(fmt.Sprintf("dialing %v", hang), func(t *testing.T) {
			inBubble(t, s, BatchConfig{}, func(t *testing.T, b *Batcher, ping func(context.Context, string) *outcome) {
				var got []*outcome
				for i := range 5 {
					got = append(got, ping(t.Context(), fmt.Sprint(i)))
				}
				require.NoError(t, b.Close())
				got = append(got, ping(t.Context(), "late"))
				for _, o := range got {
					assert.ErrorIs(t, o.err, ErrClosed)
				}
				want := BatchStats{Batches: 1, Commands: 3, Unsent: 3}
				if hang {
					want = BatchStats{Unsent: 6}
				}
				assert.Equal(t, want, b.Stats())
				assert.Zero(t, b.ledger.account().Open)
			})
		})
	}
}

// TestABatchLargerThanTheBufferTakesMoreWrites, of the size of redigo's buffer.
func TestABatchLargerThanTheBufferTakesMoreWrites(t *testing.T) {
	s := &pipes{}
	inBubble(t, s, BatchConfig{Commands: 4}, func(t *testing.T, _ *Batcher, ping func(context.Context, string) *outcome) {
		token := strings.Repeat("x", 1200)
		for range 3 {
			ping(t.Context(), token)
		}
		last := ping(t.Context(), token)
		assert.NoError(t, last.err)
		assert.Len(t, s.writes, 2, "4,840 bytes")
	})
}
