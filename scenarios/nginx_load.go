package scenarios

import (
	"bufio"
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"net/http"
	"net/netip"
	"strconv"
	"strings"

	"golang.org/x/sync/errgroup"

	"connlab/loadgen"
	"connlab/netlab"
)

// nginxLoad is calls of both kinds at the same time, as HTTP requests to nginx over
// connections that are kept, so that the only connections that come and go are
// those to Redis.
type nginxLoad struct {
	Keep, Close loadgen.Schedule
}

// callers is how many HTTP connections each kind of calls has, enough that some of
// the calls are late only if the generator or nginx stands still for a tenth of a
// second.
const callers = 256

// nginxCalls is what became of the calls of one kind.
type nginxCalls struct {
	Report  *loadgen.Report // OK, and what failed by class; ServerError is a call that nginx answers with 502
	Workers map[int]nginxWorkerCalls
	// Errors are the failures that nginx reports, by its text: "connect: timeout".
	Errors map[string]int64
	// MostReused is the largest number of times that a connection had been used before.
	MostReused int64
}

// nginxWorkerCalls are the calls that came to have a connection in one worker: a
// new one, or one from the pool.
type nginxWorkerCalls struct{ Dialed, Reused int64 }

// dialed and reused are the sums over the workers.
func (c nginxCalls) dialed() (sum int64) {
	for _, w := range c.Workers {
		sum += w.Dialed
	}
	return sum
}

func (c nginxCalls) reused() (sum int64) {
	for _, w := range c.Workers {
		sum += w.Reused
	}
	return sum
}

// nginxResult is the account of a load.
type nginxResult struct{ Keep, Close nginxCalls }

// dialShares are the shares of calls that dial, for calls of either kind, that
// follow from what each worker got: in steady state every call that closes costs one
// connection, and every call, of whatever kind, takes what is there. So in a worker
// with s calls that close and l that keep, s/(s+l) of either dial.
func (r nginxResult) dialShares() (keep, closing float64) {
	var keepCalls, closeCalls float64
	for id := range r.workers() {
		k, c := r.Keep.Workers[id], r.Close.Workers[id]
		l, s := float64(k.Dialed+k.Reused), float64(c.Dialed+c.Reused)
		keep += l * s / (s + l)
		closing += s * s / (s + l)
		keepCalls += l
		closeCalls += s
	}
	return keep / max(keepCalls, 1), closing / max(closeCalls, 1)
}

// workers are the ids of those that got any calls.
func (r nginxResult) workers() map[int]bool {
	ids := map[int]bool{}
	for _, calls := range []nginxCalls{r.Keep, r.Close} {
		for id := range calls.Workers {
			ids[id] = true
		}
	}
	return ids
}

// run makes the calls from a host to the nginx at web and returns when the last
// has ended.
func (l nginxLoad) run(ctx context.Context, from *netlab.Host, web netip.AddrPort) (nginxResult, error) {
	var r nginxResult
	g, ctx := errgroup.WithContext(ctx)
	kinds := []struct {
		name     string
		schedule loadgen.Schedule
		to       *nginxCalls
	}{{keepCall, l.Keep, &r.Keep}, {closeCall, l.Close, &r.Close}}
	held := make([]*loadgen.Held, len(kinds))
	for i, kind := range kinds {
		*kind.to = nginxCalls{Report: loadgen.NewReport(), Workers: map[int]nginxWorkerCalls{}, Errors: map[string]int64{}}
		var err error
		if held[i], err = openCallers(ctx, from, web); err != nil {
			return nginxResult{}, err
		}
		defer held[i].Close()
	}
	for i, kind := range kinds {
		g.Go(func() (err error) {
			kind.to.Report, err = loadgen.Run(ctx, loadgen.Config{
				Held: held[i], Schedule: kind.schedule,
				Request: fmt.Appendf(nil, "GET /%s HTTP/1.1\r\nHost: web\r\n\r\n", kind.name),
				Reply:   kind.to.reply, ReplyTimeout: 4 * callTimeout,
			})
			return err
		})
	}
	if err := g.Wait(); err != nil {
		return nginxResult{}, err
	}
	return r, nil
}

// openCallers opens the HTTP connections for one kind of calls.
func openCallers(ctx context.Context, from *netlab.Host, web netip.AddrPort) (*loadgen.Held, error) {
	list, closeUnused, err := sources([]*netlab.Host{from})
	if err != nil {
		return nil, err
	}
	defer closeUnused()
	held, rep, err := loadgen.Hold(ctx, loadgen.Config{
		Targets: []netip.AddrPort{web}, Sources: list, ConnectOnly: true,
		Schedule: loadgen.Burst(callers, 0),
	})
	if err == nil && rep.OK != callers {
		err = fmt.Errorf("%d of %d connections to %v are open: %v", rep.OK, callers, web, rep.Failed)
	}
	if err != nil {
		if held != nil {
			held.Close()
		}
		return nil, fmt.Errorf("connecting to nginx: %w", err)
	}
	return held, nil
}

// reply is a [loadgen.ReplyRule] that counts what the complete answers say.
func (c *nginxCalls) reply(b []byte) (complete bool, err error) {
	a, complete, err := parseNginxAnswer(b)
	if !complete || err != nil {
		return false, err
	}
	w := c.Workers[a.worker]
	switch a.what {
	case "dialed":
		w.Dialed++
	case "reused":
		w.Reused++
	}
	c.Workers[a.worker] = w
	c.MostReused = max(c.MostReused, a.reused)
	if a.failure != "" {
		c.Errors[a.failure]++
		return true, fmt.Errorf("%w: %s", loadgen.ErrServer, a.failure)
	}
	return true, nil
}

// nginxAnswer is what a call says of itself.
type nginxAnswer struct {
	what    string // "dialed", "reused", or "none" if it came to no connection
	reused  int64  // how often the connection had been used before
	worker  int
	failure string // at which step and why, "" if all was well
}

// parseNginxAnswer reads an HTTP response whose body is "what reused worker" and,
// where the status is not 200, the failure.
func parseNginxAnswer(b []byte) (a nginxAnswer, complete bool, err error) {
	in := bufio.NewReader(bytes.NewReader(b))
	resp, err := http.ReadResponse(in, nil)
	if errors.Is(err, io.ErrUnexpectedEOF) || errors.Is(err, io.EOF) {
		return a, false, nil
	}
	if err != nil {
		return a, false, fmt.Errorf("http response: %w", err)
	}
	defer resp.Body.Close()
	if resp.ContentLength < 0 {
		return a, false, errors.New("http response: it does not say how long it is")
	}
	body, err := io.ReadAll(resp.Body)
	if errors.Is(err, io.ErrUnexpectedEOF) {
		return a, false, nil
	}
	if err != nil {
		return a, false, fmt.Errorf("http response: %w", err)
	}
	if n := in.Buffered(); n > 0 {
		return a, false, fmt.Errorf("%d bytes after it", n)
	}
	fields := append(strings.SplitN(string(body), " ", 4), "")
	if len(fields) < 4 {
		return a, false, fmt.Errorf("http response: %s: %q", resp.Status, body)
	}
	a.what, a.failure = fields[0], fields[3]
	var err1, err2 error
	a.reused, err1 = strconv.ParseInt(fields[1], 10, 64)
	a.worker, err2 = strconv.Atoi(fields[2])
	if err := errors.Join(err1, err2); err != nil {
		return a, false, fmt.Errorf("http response: %s: %q: %w", resp.Status, body, err)
	}
	if ok := resp.StatusCode == http.StatusOK; ok != (a.failure == "") || a.what == "none" && ok {
		return a, false, fmt.Errorf("http response: %s: %q", resp.Status, body)
	}
	return a, true, nil
}
