package scenarios

import (
	"context"
	"fmt"
	"net/netip"
	"time"

	"github.com/gomodule/redigo/redis"

	"connlab/netlab"
)

// canary is a connection that asks something all the time, and that the fault under
// test cannot touch. What it waits for an answer is how busy the machine is.
type canary struct {
	cancel  context.CancelFunc
	slowest chan time.Duration
	result  time.Duration
	done    bool
}

// canaryEvery is the time between an answer and the next PING.
const canaryEvery = 20 * time.Millisecond

// startCanary asks the server at addr, from a host of the lab; no answer within the
// timeout is as slow as it gets.
func startCanary(ctx context.Context, h *netlab.Host, addr netip.AddrPort, timeout time.Duration) (*canary, error) {
	conn, err := h.DialContext(ctx, "tcp", addr.String())
	if err != nil {
		return nil, fmt.Errorf("canary: %w", err)
	}
	client := redis.NewConn(conn, timeout, timeout)
	if _, err := client.Do("PING"); err != nil {
		client.Close()
		return nil, fmt.Errorf("canary: %w", err)
	}
	ctx, cancel := context.WithCancel(ctx)
	k := &canary{cancel: cancel, slowest: make(chan time.Duration, 1)}
	go func() {
		defer client.Close()
		var slowest time.Duration
		for {
			began := time.Now()
			_, err := client.Do("PING")
			slowest = max(slowest, time.Since(began))
			if err != nil {
				slowest = max(slowest, timeout)
			}
			if err != nil || sleep(ctx, canaryEvery) != nil {
				k.slowest <- slowest
				return
			}
		}
	}()
	return k, nil
}

// stop ends it and returns the longest time it waited for an answer. It may be
// called again.
func (k *canary) stop() time.Duration {
	if !k.done {
		k.cancel()
		k.result, k.done = <-k.slowest, true
	}
	return k.result
}
