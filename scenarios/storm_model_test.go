package scenarios

import (
	"math"
	"testing"
	"time"

	"github.com/stretchr/testify/assert"
	"github.com/stretchr/testify/require"
)

// stormLike is a storm of 3,000 clients at 600 a second into a queue of 655 that is emptied at 200.
func stormLike(change func(*stormModel)) stormModel {
	m := stormModel{
		queue: acceptQueue{Backlog: 655, Somaxconn: 4096}, acceptRate: 200, clients: 3000, spread: 5 * time.Second,
		timeout: 30 * time.Second, horizon: 30 * time.Second, tick: goldenRules.Tick, seed: 1,
	}
	var before time.Duration
	for _, at := range goldenRules.SYNRetries(10) {
		m.intervals = append(m.intervals, at-before)
		before = at
	}
	if change != nil {
		change(&m)
	}
	return m
}

func TestStormModel(t *testing.T) {
	// λ−μ = 400: the queue of 656 places is full after 1.64 s; from then on each SYN finds a place with
	// probability μ over all that come, first ones and retries.
	out := stormLike(nil).play()
	assert.InDelta(t, 1.64, out.fill.Seconds(), 0.01)
	assert.Equal(t, 656, out.peak)
	assert.Len(t, out.recovered, 3000, "all come through")
	assert.InEpsilon(t, 15, quantile(out.recovered, 1).Seconds(), 0.06, "cut/μ")
	assert.Greater(t, float64(out.victims), 3000*(1-200.0/600)-656, "retries take places from first SYNs")
	assert.Zero(t, out.corpses)
	assert.Equal(t, 3000, out.attempts)

	// If nobody is accepted but one, with the token that is there, all are dropped but the first B+2.
	stopped := stormLike(func(m *stormModel) {
		m.acceptRate, m.timeout = 1e-3, 900*time.Millisecond
		m.horizon = 5500 * time.Millisecond
	})
	stopped.back = backOff{time.Hour, time.Hour}
	out = stopped.play()
	assert.Equal(t, 3000-656-1, out.victims)
	assert.Len(t, out.recovered, 1)

	// A place for everybody: nobody waits for a SYN retry.
	out = stormLike(func(m *stormModel) { m.queue.Backlog = 2000 }).play()
	assert.Zero(t, out.overflows)
	assert.InDelta(t, 2000, out.peak, 3, "cut·(1−μ/λ)")

	// Jitter over more than cut/μ: hardly a queue.
	out = stormLike(func(m *stormModel) { m.jitter, m.spread = true, 17*time.Second }).play()
	assert.Zero(t, out.overflows)
	assert.Less(t, out.peak, 100)
	assert.InEpsilon(t, 17, quantile(out.recovered, 1).Seconds(), 0.02)

	// No limit: nobody ever waits.
	out = stormLike(func(m *stormModel) { m.acceptRate = 0 }).play()
	assert.Equal(t, 1, out.peak)
}

// A queue that takes longer to wait in than clients have patience accepts corpses only.
func TestStormModelCorpses(t *testing.T) {
	impatient := func(backlog int) stormOutcome {
		return stormLike(func(m *stormModel) { m.timeout, m.queue.Backlog = 2*time.Second, backlog }).play()
	}
	short, long := impatient(300), impatient(2400)
	assert.Len(t, short.recovered, 3000, "300 < μ·patience = 400: all that is accepted is alive")
	assert.Zero(t, short.corpses)
	require.NotEmpty(t, long.recovered)
	// While there are fewer than 400 before him a client is served: those who come in the first second.
	assert.InEpsilon(t, 600, len(long.recovered), 0.05)
	assert.Less(t, quantile(long.recovered, 1), 4*time.Second, "and then nobody, for ever")
	assert.Greater(t, long.corpses, 4000)
	assert.InEpsilon(t, 200*30, long.corpses+len(long.recovered), 0.05, "the server is busy all the time")
}

// Every attempt of every client ends, and each connection that is accepted is somebody's.
func TestStormModelAdds(t *testing.T) {
	for _, tt := range []struct {
		why    string
		change func(*stormModel)
	}{
		{"patient", nil},
		{"impatient", func(m *stormModel) { m.timeout = 2 * time.Second }},
		{"backing off", func(m *stormModel) { m.timeout, m.back = 2*time.Second, backOff{time.Second, 8 * time.Second} }},
		{"with a prober", func(m *stormModel) { m.probeEvery, m.probeBefore = 100*time.Millisecond, time.Second }},
		{"no storm", func(m *stormModel) { m.clients, m.probeEvery = 0, 100*time.Millisecond }},
	} {
		m := stormLike(tt.change)
		out := m.play()
		probes := out.accepted - len(out.recovered) - out.corpses
		if m.probeEvery == 0 {
			assert.Zero(t, probes, tt.why)
		}
		assert.LessOrEqual(t, len(out.recovered), m.clients, tt.why)
		assert.GreaterOrEqual(t, out.attempts, out.failed+len(out.recovered), tt.why)
		assert.LessOrEqual(t, out.peak, m.queue.places(), tt.why)
		assert.Equal(t, out, m.play(), "the same again: %s", tt.why)
	}
}

// Connect times are those of the SYN retries.
func TestStormModelConnectTimes(t *testing.T) {
	for _, took := range stormLike(nil).play().connects {
		best := took.Seconds()
		for _, at := range goldenRules.SYNRetries(10) {
			if late := (took - at).Seconds(); late >= 0 {
				best = min(best, late)
			}
		}
		assert.LessOrEqual(t, best, 0.5, "%v", took)
	}
}

// Before 4.10 a full queue alone did not drop a SYN: two young requests a second were let
// through to be refused at their final ACK, the third SYN was dropped.
func TestStormModelBefore410(t *testing.T) {
	now := stormLike(nil).play()
	old := stormLike(func(m *stormModel) { m.before410 = true }).play()
	assert.Zero(t, now.ghosts)
	assert.Positive(t, old.ghosts)
	assert.LessOrEqual(t, old.ghosts, 2*5*15, "two at a time, each for 0.2 s at least")
	assert.GreaterOrEqual(t, old.refused, old.ghosts)
	assert.InEpsilon(t, now.overflows, old.overflows, 0.1, "with many SYNs a second the rules hardly differ")
	assert.Len(t, old.recovered, 3000)

	// A lonely client at a full queue: now it is dropped, then it was answered.
	lonely := func(old bool) stormOutcome {
		return stormLike(func(m *stormModel) {
			m.queue.Backlog, m.acceptRate, m.clients, m.spread = 0, 1e-3, 3, 3*time.Second
			m.before410, m.horizon = old, 2500*time.Millisecond
		}).play()
	}
	assert.Equal(t, 1, lonely(false).victims, "the first has the token, the second the place")
	assert.Zero(t, lonely(true).victims)
	assert.Equal(t, 1, lonely(true).ghosts)
}

func TestBackOff(t *testing.T) {
	b := backOff{base: 500 * time.Millisecond, most: 3 * time.Second}
	for k, want := range []time.Duration{500 * time.Millisecond, time.Second, 2 * time.Second, 3 * time.Second, 3 * time.Second} {
		assert.Equal(t, want, b.limit(k))
	}
	assert.Equal(t, 3*time.Second, b.limit(math.MaxInt32))
	assert.Zero(t, backOff{}.limit(3))
}
