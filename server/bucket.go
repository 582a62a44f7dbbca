package server

import "time"

const (
	// AcceptBurst is how much of AcceptRate is saved up, beyond one connection, while nobody waits: who comes after a quiet time
	// finds 1 + AcceptRate·AcceptBurst places more than the accept queue has.
	AcceptBurst = 100 * time.Millisecond

	// acceptOwed is the longest pause of the machine that costs nothing of the rate, as long as the accept queue has any: what
	// should have been accepted meanwhile is accepted at its end.
	acceptOwed = 10 * time.Second

	// acceptBatch is how much of AcceptRate must be there until accepting goes on after it was too soon, if that is more than one
	// connection: the loop wakes 500 times a second for it, and not for every connection.
	acceptBatch = 2 * time.Millisecond
)

// bucket is a token bucket. Its counts are exact: a token has as many parts as a second has nanoseconds, so that at a rate of
// r tokens a second r parts come in each nanosecond.
type bucket struct {
	rate  int64         // tokens per second, 0 for no limit
	parts int64         // of tokens that are there
	at    time.Duration // of the clock: when that was so
	owed  bool          // somebody waits, as far as is known: nothing that comes is lost
}

const token = int64(time.Second)

// setRate changes the rate. A new one begins with nothing saved up.
func (b *bucket) setRate(rate int, now time.Duration) {
	if b.rate != int64(rate) {
		*b = bucket{rate: int64(rate), at: now}
	}
}

// fill brings in what has come since the last time.
func (b *bucket) fill(now time.Duration) {
	most := AcceptBurst
	if b.owed {
		most = acceptOwed
	}
	passed := min(now-b.at, time.Second+most) // enough at any rate to fill it, and no product is too large
	b.parts = min(b.parts+int64(passed)*b.rate, token+int64(most)*b.rate)
	b.at = now
}

// idle says that nobody waits: of what is there only AcceptBurst is kept.
func (b *bucket) idle() {
	b.owed = false
	b.fill(b.at)
}

// empty reports whether there was no token at the last fill.
func (b *bucket) empty() bool { return b.rate > 0 && b.parts < token }

func (b *bucket) take() {
	if b.rate > 0 {
		b.parts -= token
	}
}

// due returns when a batch is there.
func (b *bucket) due() time.Duration {
	if b.rate == 0 {
		return b.at
	}
	missing := max(token, int64(acceptBatch)*b.rate) - b.parts
	return b.at + time.Duration((missing+b.rate-1)/b.rate)
}
