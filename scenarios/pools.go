package scenarios

import (
	"time"

	"connlab/results"
)

// Pools sends one arrival trace through several clients, one after the other: the lab of
// [UndersizedPool] as an instrument. It is no incident and not in [All].
var Pools = Scenario{
	Name:  "pools",
	Title: "One arrival trace through several clients' pools",
	New: func() Experiment {
		u := newUndersized()
		u.Rate, u.Latency, u.For = 3000, 20*time.Millisecond, 3*time.Second
		u.MaxIdle, u.MaxActive, u.PoolSize = 50, 500, 500
		u.Ports = 25_232
		u.Sweep = "client=redigo,go-redis,cosocket,batch,go-redis-auto"
		return u
	},
	Variants: []Variant{{
		Name: "trace", Role: results.Control,
		Summary: "the same heartbeats through each client, on a client host of its own",
	}},
}
