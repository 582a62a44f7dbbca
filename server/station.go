package server

import "time"

// station is a single server with a queue, first come first served, in virtual time: a request takes 1/rate seconds and
// begins when those before it are done. Nothing waits in it, it only tells when a request is done. Poisson arrivals make
// it the M/D/1 queue.
type station struct {
	rate int64         // requests per second, 0 for no limit
	free time.Duration // of the clock: when all requests so far are done
	rest int64         // and so many rate-ths of a nanosecond later, or the rate would not be exact
}

// setRate changes the rate for requests to come; what is promised to others stays. No limit ends the queue.
func (st *station) setRate(rate int) {
	switch {
	case rate == 0:
		*st = station{}
	case st.rate != int64(rate):
		*st = station{rate: int64(rate), free: st.free}
	}
}

// serve returns when a request is done that comes now.
func (st *station) serve(now time.Duration) (done time.Duration) {
	if st.rate == 0 {
		return now
	}
	if st.free < now {
		st.free, st.rest = now, 0
	}
	st.free += time.Second / time.Duration(st.rate)
	if st.rest += int64(time.Second) % st.rate; st.rest >= st.rate {
		st.rest -= st.rate
		st.free++
	}
	return st.free
}
