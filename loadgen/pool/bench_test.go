package pool

import (
	"bufio"
	"fmt"

	"net/netip"
	"os/exec"
	"strings"
	"sync"
	"testing"
	"time"

	redigo "github.com/gomodule/redigo/redis"
	"github.com/stretchr/testify/require"
	"golang.org/x/sys/unix"

	"connlab/loadgen"
)

// startRedis starts a real server, so that what a benchmark spends is the client's.
func startRedis(b *testing.B) netip.AddrPort {
	b.Helper()
	const program = "/usr/bin/redis-server"
	if _, err := exec.LookPath(program); err != nil {
		b.Skip("redis-server is not installed; install it with: apt-get install redis-server")
	}
	fd, addr := bound(b)
	require.NoError(b, unix.Close(fd))
	cmd := exec.Command(program, "--port", fmt.Sprint(addr.Port()), "--bind", "127.0.0.1", "--save", "", "--appendonly", "no")
	out, err := cmd.StdoutPipe()
	require.NoError(b, err)
	require.NoError(b, cmd.Start())
	b.Cleanup(func() {
		_ = cmd.Process.Kill()
		_ = cmd.Wait()
	})
	for lines := bufio.NewScanner(out); lines.Scan(); {
		if strings.Contains(lines.Text(), "Ready to accept") {
			return addr
		}
	}
	b.Fatal("redis-server has ended")
	return addr
}

// processorTime is what the process has used, in both modes.
func processorTime(b *testing.B) time.Duration {
	b.Helper()
	var u unix.Rusage
	require.NoError(b, unix.Getrusage(unix.RUSAGE_SELF, &u))
	return time.Duration(u.Utime.Nano() + u.Stime.Nano())
}

// BenchmarkRun is a whole run at 35,000 calls each second, next to bare loops of
// redigo's Get, Do and Close without anything of this package. Read a figure only where
// ok/due is near 1: what is not started costs nothing.
func BenchmarkRun(b *testing.B) {
	const rate, inFlight = 35_000, 1000
	addr := startRedis(b)
	measured := func(b *testing.B, f func()) {
		b.ResetTimer()
		before, start := processorTime(b), time.Now()
		f()
		b.ReportMetric(float64((processorTime(b)-before).Microseconds())/float64(b.N), "cpu-us/call")
		b.ReportMetric(float64(b.N)/time.Since(start).Seconds(), "calls/s")
	}
	for _, c := range []struct {
		name string
		pool Pool
	}{
		{"redigo", NewRedigo(RedigoConfig{MaxIdle: inFlight})},
		{"go-redis", NewGoRedis(GoRedisConfig{PoolSize: inFlight})},
	} {
		run := func(calls int) *loadgen.Report {
			report, err := Run(b.Context(), Config{
				Pool: c.pool, Targets: []netip.AddrPort{addr}, MaxInFlight: inFlight,
				Keeping: loadgen.Poisson(rate, time.Duration(calls)*time.Second/rate, 1),
			})
			require.NoError(b, err)
			require.NoError(b, report.Balanced())
			return report.Keeping.Load
		}
		b.Run(c.name, func(b *testing.B) {
			run(rate) // opens the connections
			measured(b, func() {
				report := run(b.N)
				b.ReportMetric(float64(report.Lateness.Quantile(0.99).Microseconds()), "p99-late-us")
				b.ReportMetric(float64(report.OK)/float64(report.Due), "ok/due")
			})
		})
		require.NoError(b, c.pool.Close())
	}
	for _, callers := range []int{1, 8} {
		b.Run(fmt.Sprintf("bare/callers=%d", callers), func(b *testing.B) {
			p := barePool(addr, callers)
			defer p.Close()
			measured(b, func() {
				var loops sync.WaitGroup
				for range callers {
					loops.Go(func() {
						for range b.N / callers {
							c := p.Get()
							if _, err := c.Do("PING"); err != nil {
								b.Error(err)
							}
							_ = c.Close()
						}
					})
				}
				loops.Wait()
			})
		})
	}
}

func barePool(addr netip.AddrPort, size int) *redigo.Pool {
	return &redigo.Pool{MaxIdle: size, Dial: func() (redigo.Conn, error) {
		return redigo.Dial("tcp", addr.String(), redigo.DialReadTimeout(defaultTimeout), redigo.DialWriteTimeout(defaultTimeout))
	}}
}
