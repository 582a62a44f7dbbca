package pool

import (
	"testing"

	redigo "github.com/gomodule/redigo/redis"
	"github.com/stretchr/testify/require"
)

// BenchmarkSharedConnections sends commands from 200 goroutines by what merges them, and
// by redigo's Pool, which does not. The server is in the same process: compare within one run.
func BenchmarkSharedConnections(b *testing.B) {
	run := func(b *testing.B, ping func() error) {
		b.ReportAllocs()
		b.SetParallelism(100) // for each of 2 CPUs
		b.RunParallel(func(pb *testing.PB) {
			for pb.Next() {
				if err := ping(); err != nil {
					b.Error(err)
				}
			}
		})
	}
	for _, c := range []struct {
		name string
		cfg  BatchConfig
	}{
		{"batch of 3 or 5 ms", BatchConfig{}},
		{"batch of 32 or 1 ms", BatchConfig{Commands: 32, Delay: ms}},
		{"batch of what is there", BatchConfig{Commands: 300, Delay: -1}},
	} {
		b.Run(c.name, func(b *testing.B) {
			s := serve(b, (&faults{}).handle)
			batcher := NewBatcher(s.addr, c.cfg)
			var token any = "00000000000000000001"
			run(b, func() error { _, err := batcher.Do(b.Context(), "PING", token); return err })
			stats := batcher.Stats()
			b.ReportMetric(float64(stats.Commands)/float64(stats.Batches), "commands/batch")
			require.NoError(b, batcher.Close())
		})
	}
	b.Run("redigo Pool", func(b *testing.B) {
		s := serve(b, (&faults{}).handle)
		p := &redigo.Pool{MaxIdle: 200, Dial: func() (redigo.Conn, error) { return redigo.Dial("tcp", s.addr.String()) }}
		run(b, func() error {
			c := p.Get()
			_, err := c.Do("PING", "00000000000000000001")
			_ = c.Close()
			return err
		})
		require.NoError(b, p.Close())
	})
	b.Run("go-redis AutoPipeline", func(b *testing.B) {
		s := serve(b, (&faults{}).handle)
		p := NewAutoPipeline(AutoPipelineConfig{})
		run(b, func() error {
			l, err := p.Get(b.Context(), Keeps, s.addr)
			if err != nil {
				return err
			}
			return l.Ping(b.Context())
		})
		require.NoError(b, p.Close())
	})
}
