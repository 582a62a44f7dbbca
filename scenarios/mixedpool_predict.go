package scenarios

import (
	"fmt"
	"math"
	"time"

	"connlab/results"
)

// Metrics that Predict and Measure both name.
const (
	metricKeepDialed   = "clients/Keep.Dialed"
	metricKeepReused   = "clients/Keep.Reused"
	metricKeepShare    = "clients/Keep.DialShare"
	metricCloseDialed  = "clients/Close.Dialed"
	metricCallsPerDial = "clients/CallsPerDial"
	metricCallsFailed  = "clients/Calls.Failed"
	metricDialsApart   = "both/Dials.Unaccounted"
	metricTWEnd        = "web/sockstat.TCP.tw.End"
	metricTWSteady     = "web/sockstat.TCP.tw.Steady"
	metricConnsPeak    = "redis/Connections.Peak"
	metricAgeMax       = "redis/ClientList.Age.Max"
	metricUsedOften    = "clients/Connections.UsedOften"
)

// symptomDials is the share of the calls that keep which must dial for an incident
// to count as reproduced, and below which it counts as gone: the first calls of
// each pool have to dial in any case.
const symptomDials = 0.05

// Predict implements [Experiment].
func (m *mixedPool) Predict(role results.Role, rules KernelRules) []results.Prediction {
	claims := []results.Prediction{
		claim(metricCallsFailed, "calls", "0", nil, 0, results.Exactly(), "every call gets its reply"),
		claim(metricDialsApart, "connections", "0", nil, 0, results.Exactly(), "Tcp.ActiveOpens − connections that calls were the first to have"),
	}
	if m.Burst > 0 {
		claims = append(claims, m.predictBursts()...)
	} else {
		claims = append(claims, m.predictArrivals(rules)...)
	}
	symptom := claim(metricKeepShare, "of calls", "x", map[string]float64{"x": symptomDials}, symptomDials, results.AtLeast(), "the symptom must show: callers that keep dial")
	switch role {
	case results.Incident, results.FalseLead:
	case results.Fix:
		symptom.Tolerance, symptom.Note = results.AtMost(), "the symptom must be gone: callers that keep find a connection"
	default:
		return claims
	}
	return append(claims, symptom)
}

// dialShare is the share of all calls that dial where callers of both kinds share
// pools, each call that closes taking one connection away: s/(s+ℓ), by the numbers of
// calls that the schedules have.
func (m *mixedPool) dialShare() float64 {
	closes, keeps := float64(m.closing().Count()), float64(m.keeping().Count())
	return closes / (closes + keeps)
}

// shares says whether callers that close are given connections that others keep.
func (m *mixedPool) shares() bool {
	return m.Pool != poolRedigo && m.Pool != poolGoRedis && !m.Separate && !m.PerRequest && m.Short > 0 && m.Keep > 0
}

func (m *mixedPool) predictArrivals(rules KernelRules) []results.Prediction {
	keeps, closes := float64(m.keeping().Count()), float64(m.closing().Count())
	inputs := map[string]float64{
		"s": m.Short, "ℓ": m.Keep, "nₛ": closes, "nₗ": keeps, "T": m.For.Seconds(), "R": remembered(rules).Seconds(),
		"W": float64(m.Workers), "k": float64(m.Instances), "m": float64(m.Size),
	}
	var claims []results.Prediction
	add := func(metric, unit, formula string, predicted float64, tol results.Tolerance, note string) {
		claims = append(claims, claim(metric, unit, formula, inputs, predicted, tol, note))
	}
	ended := closes // connections that the web server closes
	switch {
	case m.shares():
		// The numbers of calls being given, dials vary less than in independent trials, so
		// that the tests are on the safe side.
		p := m.dialShare()
		add(metricKeepDialed, "calls", "nₗ·nₛ/(nₛ+nₗ)", keeps*p, results.Binomial(int(keeps), testLevel), "s/(s+ℓ) of the nₗ calls that keep: each dials if the one before it in its pool closed")
		add(metricCloseDialed, "calls", "nₛ·nₛ/(nₛ+nₗ)", closes*p, results.Binomial(int(closes), testLevel), "as many of the nₛ calls that close: they find the same pools; such a connection is used just once")
		add(metricCallsPerDial, "calls", "(nₛ+nₗ)/nₛ", 1/p, results.Within(0.1), "(s+ℓ)/s: how often a connection is used")
	case m.PerRequest:
		ended = keeps
		add(metricKeepDialed, "calls", "nₗ", keeps, results.Exactly(), "each pool ends with its request, and closes what it was given to keep")
		add(metricKeepReused, "calls", "0", 0, results.Exactly(), "what tells it apart: no connection is ever used twice")
	case closes > 0:
		add(metricCloseDialed, "calls", "nₛ", closes, results.Exactly(), "who closes has dialed")
	}
	if m.shares() {
		add(metricKeepReused, "calls", "1", 1, results.AtLeast(), "what tells it apart from a pool per request: some connections are used again")
		add(metricConnsPeak, "connections", "W·k·m", float64(m.pools()*m.Size), results.AtMost(), "what tells it apart from a pool too small: at no time are there more connections than places")
		add(metricTWServer, "sockets", "0", 0, results.Exactly(), "what tells it apart from a timeout of Redis: Redis closes none first")
	}
	if m.For < timeWaitLength {
		add(metricTWEnd, "sockets", m.endedFormula(), ended, results.Exactly(), "TIME_WAITs of the web server: one for each connection that it closed")
	} else if m.For > steadyFrom(rules)+2*time.Second {
		add(metricTWSteady, "sockets", m.endedFormula()+"/T·R", ended/m.For.Seconds()*remembered(rules).Seconds(), results.Within(0.005),
			fmt.Sprintf("TIME_WAITs in the steady state: each lasts 60 s, and up to %v more; R is the average", rules.TimeWaitRounding))
	}
	return append(claims, m.predictAge(inputs)...)
}

// endedFormula names the connections that the web server closes.
func (m *mixedPool) endedFormula() string {
	if m.PerRequest {
		return "nₗ"
	}
	return "nₛ"
}

// steadyFrom is when as many TIME_WAITs end as begin.
func steadyFrom(rules KernelRules) time.Duration { return timeWaitLength + rules.TimeWaitRounding }

// ageRisk is how unlikely it must be that a connection that short calls take at
// random is seen older than the claim says.
const ageRisk = 1e-6

// usesAboveMean is the number of uses beyond which a connection counts as used
// often: the mean, rounded up.
func (m *mixedPool) usesAboveMean() int {
	if !m.shares() {
		return 0
	}
	return int(math.Ceil(1 / m.dialShare()))
}

// predictAge is about the ages of connections, in uses and in seconds.
func (m *mixedPool) predictAge(inputs map[string]float64) []results.Prediction {
	switch {
	case m.shares():
		// In each of N pools the connection on top is taken and closed at s/N a second:
		// while calls do not overlap its age is exponential. It is looked at every half
		// second.
		n := float64(m.pools())
		looks := n * m.For.Seconds() / clientListEvery.Seconds()
		inputs["N"], inputs["looks"], inputs["ε"] = n, looks, ageRisk
		claims := []results.Prediction{claim(metricAgeMax, "s", "1 + ln(looks/ε)·N/s", inputs, 1+math.Log(looks/ageRisk)*n/m.Short, results.AtMost(),
			"the oldest connection in CLIENT LIST: none grows old; N pools, each looked at every half second, ε the risk to meet an older one by chance")}
		if closes, u := inputs["nₛ"], float64(m.usesAboveMean()); !m.realNginx() { // which does not tell of each connection
			inputs["u"] = u
			claims = append(claims, claim(metricUsedOften, "connections", "nₛ·(nₗ/(nₛ+nₗ))^u", inputs, closes*math.Pow(1-m.dialShare(), u), results.Binomial(int(closes), testLevel),
				"connections that had more than u uses, u the mean rounded up: whoever is given one closes it with the same probability, so that uses are geometric"))
		}
		return claims
	case m.PerRequest || m.Keep == 0:
		return []results.Prediction{claim(metricAgeMax, "s", "1", inputs, 1, results.AtMost(), "the oldest connection in CLIENT LIST: none grows old")}
	}
	return []results.Prediction{claim(metricAgeMax, "s", "T − 1", inputs, m.For.Seconds()-1, results.AtLeast(), "the oldest connection in CLIENT LIST: as old as the run")}
}

// expires says whether Redis closes what is idle between two bursts.
func (m *mixedPool) expires() bool {
	return m.Timeout > 0 && m.Every > time.Duration(m.Timeout)*time.Second
}

func (m *mixedPool) predictBursts() []results.Prediction {
	b, k, size := float64(m.bursts()), float64(m.Burst), float64(m.Size)
	inputs := map[string]float64{"b": b, "K": k, "m": size}
	var claims []results.Prediction
	add := func(metric, unit, formula string, predicted float64, note string) {
		claims = append(claims, claim(metric, unit, formula, inputs, predicted, results.Exactly(), note))
	}
	over := max(0, k-size)
	if m.expires() {
		add(metricKeepDialed, "calls", "b·K", b*k, "between two bursts Redis closes whatever the pool keeps")
		add(metricTWServer, "sockets", "(b−1)·min(K, m)", (b-1)*min(k, size), "what tells it apart: Redis closes first, and has the TIME_WAITs")
	} else {
		add(metricKeepDialed, "calls", "K + (b−1)·max(0, K−m)", k+(b-1)*over, "the first burst dials, and of each later one those for whom no connection is kept")
		add(metricTWServer, "sockets", "0", 0, "Redis closes none first")
	}
	add(metricTWEnd, "sockets", "b·max(0, K−m)", b*over, "TIME_WAITs of the web server: connections for which the pool has no place")
	note := "connections open at once"
	if over > 0 {
		note = fmt.Sprintf("what tells it apart: more connections are open at once than the pool has places, m = %d", m.Size)
	}
	add(metricConnsPeak, "connections", "K", k, note)
	return claims
}
