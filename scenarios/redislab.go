package scenarios

import (
	"context"
	"fmt"
	"net/netip"
	"time"

	"connlab/netlab"
	"connlab/netlab/observe"
	"connlab/results"
)

// redisHost is one host that is every Redis instance: each has an address of its
// own there.
func redisHost() netlab.HostSpec {
	return netlab.HostSpec{
		Name:   "redis",
		Links:  []netlab.LinkSpec{{Switch: lanName, Addrs: []netip.Addr{redisAddr}}},
		Routes: []netlab.RouteSpec{{To: redisPrefix}},
	}
}

// webHost is a client of the instances.
func webHost(name string, sysctls map[string]string) netlab.HostSpec {
	return netlab.HostSpec{
		Name:    name,
		Links:   []netlab.LinkSpec{{Switch: lanName}},
		Routes:  []netlab.RouteSpec{{To: redisPrefix, Via: redisAddr}},
		Sysctls: sysctls,
	}
}

// instances are where the first n Redis instances listen.
func instances(n int) []netip.AddrPort {
	list := make([]netip.AddrPort, n)
	for i := range list {
		list[i] = netip.AddrPortFrom(instance(i), redisPort)
	}
	return list
}

// every calls f at an interval until stop is called.
func every(interval time.Duration, f func()) (stop func()) {
	done, out := make(chan struct{}), make(chan struct{})
	go func() {
		defer close(out)
		tick := time.NewTicker(interval)
		defer tick.Stop()
		for {
			select {
			case <-done:
				return
			case <-tick.C:
				f()
			}
		}
	}()
	return func() {
		close(done)
		<-out
	}
}

// seriesOf is a metric of a host over time.
func seriesOf(host, name string, points []observe.Point) results.Series {
	list := make([]results.Point, len(points))
	for i, p := range points {
		list[i] = results.Point{T: p.At.Seconds(), V: float64(p.Value)}
	}
	return results.NewSeries(host+"/"+name, unitOfGauge(name), list)
}

func unitOfGauge(name string) string {
	if isCounter(name) {
		return unitOf(name)
	}
	return "sockets"
}

// noneClosing waits until every connection to Redis that a client host has closed is
// a bucket.
func noneClosing(ctx context.Context, client *netlab.Host) error {
	closing := observe.SetOf(observe.FinWait1, observe.Closing, observe.LastAck, observe.CloseWait)
	for deadline := time.Now().Add(10 * time.Second); ; {
		sockets, err := observe.ReadSockets(client, observe.Query{States: closing, RemotePort: redisPort})
		if err != nil {
			return err
		}
		if len(sockets) == 0 {
			return nil
		}
		if time.Now().After(deadline) {
			return fmt.Errorf("%d connections of %s are still closing", len(sockets), client.Name())
		}
		if err := sleep(ctx, 20*time.Millisecond); err != nil {
			return err
		}
	}
}
