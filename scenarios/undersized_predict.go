package scenarios

import (
	"fmt"
	"math"
	"time"

	"connlab/loadgen"
	"connlab/loadgen/pool"
	"connlab/results"
)

// Metrics of a leg, after its label and a slash.
const (
	metricDials       = "Dials"
	metricChurned     = "Dials.Closed"
	metricChurn       = "Churn"
	metricExhausted   = "Calls.Failed.pool_exhausted"
	metricNoLocalPort = "Calls.Failed.no_local_port"
	metricOtherFailed = "Calls.Failed.Otherwise"
	metricFirstNoPort = "NoLocalPort.First"
	// What Redis was told is checked against what it says that it did.
	metricServerLatency = "Redis.Latency"
	metricRequestRate   = "Requests.PerSecond"
	metricTWAtEnd       = "TIME_WAIT.End"
	metricHalf          = "Ports.Half"
	metricConnectsLeft  = "Connects.Unaccounted"
	metricGoTries       = "Connects.NoLocalPort.Beyond"
	metricOpensLeft     = "Dials.Unaccounted"
	metricTWLeft        = "TIME_WAIT.Unaccounted"
	metricMeanLatency   = "Latency.Mean"
	metricPortAgain     = "Ports.UsedAgainAfter"
	metricDialRate      = "Dials.PerSecond"
	metricBatch         = "Batch.Mean"
	metricRequests      = "Requests.PerCommand"
	metricRequestRatio  = "Requests.Ratio"
	metricSyscallRatio  = "Syscalls.Ratio"
	metricLatencyCost   = "Latency.Added"
	metricConnectCPU    = "Connect.CPU"
)

// Predict implements [Experiment].
func (u *undersized) Predict(role results.Role, rules KernelRules) []results.Prediction {
	if len(u.Fill) > 0 {
		return u.predictFill(rules)
	}
	legs, _ := u.legs() // of parameters that were checked
	var claims []results.Prediction
	for _, l := range legs {
		p := &legPrediction{undersizedLeg: l, beside: u.Beside, inputs: l.inputs(rules)}
		p.accounts()
		switch {
		case l.batches():
			p.batching()
		case l.Ceiling > 0:
			p.ceiling()
		case l.shortConnections():
			p.short(rules)
		default:
			p.pooled(role, rules)
		}
		claims = append(claims, p.claims...)
	}
	if role == results.Control && legs[0].label != "app" && legs[len(legs)-1].Client != legs[0].Client {
		claims = append(claims, u.predictSavings(legs)...)
	}
	return claims
}

// legPrediction collects the claims of a leg.
type legPrediction struct {
	undersizedLeg
	beside bool
	inputs map[string]float64
	claims []results.Prediction
}

func (p *legPrediction) add(metric, unit, formula string, predicted float64, tol results.Tolerance, note string) {
	p.claims = append(p.claims, claim(p.label+"/"+metric, unit, formula, p.inputs, predicted, tol, note))
}

// inputs are the numbers that formulas name.
func (u *undersized) inputs(rules KernelRules) map[string]float64 {
	in := map[string]float64{
		"λ": u.Rate, "g": float64(u.Ops), "T": u.For.Seconds(), "W": u.Latency.Seconds(), "m": float64(u.MaxIdle), "c": float64(u.MaxActive),
		"P": float64(u.Ports), "R": remembered(rules).Seconds(), "n": float64(u.operations()), "C": float64(u.Ceiling),
		"k": float64(u.BatchCommands), "t": u.BatchDelay.Seconds(), "conns": float64(u.BatchConns), "delay": float64(u.ReuseDelay) / 1000,
	}
	if u.Client == clientGoRedis {
		in["m"], in["c"] = float64(u.MaxIdleConns), float64(u.PoolSize)
	}
	return in
}

// operations is how many there are.
func (u *undersized) operations() int {
	if u.Sync {
		return u.callers().Count() * u.Ops
	}
	return u.callers().Count()
}

// batches says that calls share connections.
func (u *undersized) batches() bool { return u.Client == clientBatch || u.Client == clientAuto }

// predictable says that the model predicts the leg: a pool that keeps connections, and the
// model knows all that it has been told.
func (u *undersized) predictable() bool {
	return !u.batches() && u.Ceiling == 0 && !u.shortConnections() && u.modelled()
}

// shortConnections says that every call dials and closes.
func (u *undersized) shortConnections() bool {
	return (u.Client == clientRedigo || u.Client == clientCosocket) && u.MaxIdle == 0 && u.Latency == 0
}

// accounts is what must hold whatever happens.
func (p *legPrediction) accounts() {
	p.add(metricConnectsLeft, "connects", "0", 0, results.Exactly(), "connect(2) calls − those that opened a connection − those that found no local port (EADDRNOTAVAIL)")
	p.add(metricOpensLeft, "connections", "0", 0, results.Exactly(), "Tcp.ActiveOpens of the client host − connections that its client dialed")
	p.add(metricOtherFailed, "calls", "0", 0, results.Exactly(), "calls that failed in other ways than the pool and the ports make them fail")
	if p.Client == clientRedigo && p.TWReuse == 0 && p.For < timeWaitLength-2*time.Second {
		p.add(metricGoTries, "connects", "0", 0, results.Exactly(), "connect(2) calls that found no local port − 3 for each call that failed so: no port comes free between the tries that Go's Dial makes")
	}
	if w := p.inputs["W"]; w > 0 && p.Ceiling == 0 {
		p.add(metricServerLatency, "s", "W", w, results.PlusMinus(w/20+0.001), "what a request took at Redis, by its own account: the latency that it was told to have")
	}
	if p.For < timeWaitLength-2*time.Second && p.TWReuse == 0 {
		p.add(metricTWLeft, "sockets", "0", 0, results.Exactly(), "connections that the client closed − its TIME_WAITs: who closes first has them, for a minute")
	}
}

// modelled says whether the model knows all that the client has been told.
func (u *undersized) modelled() bool {
	return u.IdleTimeout == 0 && u.MaxConnLifetime == 0 && u.MinIdleConns == 0 && u.MaxActiveConns == 0 && u.DialerRetries == 1
}

// pooling is the client's pool, for the model.
func (u *undersized) pooling(rules KernelRules) pooling {
	p := pooling{idle: u.MaxIdle, active: u.MaxActive, wait: u.Wait, chain: 1, latency: u.Latency, ports: u.Ports, timeWait: remembered(rules)}
	p.from, p.to = u.steady()
	if u.Sync {
		p.chain = u.Ops
	}
	switch u.Client {
	case clientGoRedis:
		p.idle, p.active, p.wait, p.greeting = u.MaxIdleConns, u.PoolSize, true, u.Latency
		if p.idle == 0 {
			p.idle = math.MaxInt
		}
	case clientCosocket:
		p.active = 0
	}
	if u.TWReuse == 1 {
		p.timeWait = time.Duration(u.ReuseDelay) * time.Millisecond
	}
	return p
}

// spread is how many other arrivals of the same kind the model is played with, to see
// how much is chance.
const spread = 16

// modelledSpread is the model at the arrivals of the run, and the standard deviation
// of its numbers at others.
func (u *undersized) modelledSpread(rules KernelRules) (mean, sd modelled) {
	p := u.pooling(rules)
	mean = model(u.callersOf(heartbeatSeed), p)
	var all [spread]modelled
	for i := range all {
		all[i] = model(u.callersOf(heartbeatSeed+1+uint64(i)), p)
	}
	deviation := func(get func(modelled) float64) float64 {
		var sum, squares float64
		for _, m := range all {
			sum += get(m)
			squares += get(m) * get(m)
		}
		return math.Sqrt(max(0, squares/spread-sum/spread*sum/spread))
	}
	return mean, modelled{
		dials:     deviation(func(m modelled) float64 { return m.dials }),
		steady:    deviation(func(m modelled) float64 { return m.steady }),
		closed:    deviation(func(m modelled) float64 { return m.closed }),
		exhausted: deviation(func(m modelled) float64 { return m.exhausted }),
		noPort:    deviation(func(m modelled) float64 { return m.noPort }),
		half:      deviation(func(m modelled) float64 { return m.half }),
		firstNo:   deviation(func(m modelled) float64 { return m.firstNo }),
	}
}

// byModel is the tolerance of what the model says, in counts or seconds: a tenth, since
// calls take a little longer than the latency, and one standard deviation of what other
// arrivals would give. It is played with the arrivals of the run; but where two of them
// are close, which comes first is chance.
func byModel(predicted, sd float64) results.Tolerance {
	return results.PlusMinus(0.1*predicted + sd)
}

// modelClaim is a number of the model's that is claimed of a run.
type modelClaim struct {
	of        func(modelled) float64
	unit      string
	tolerance results.Tolerance
}

// Numbers of the model that are claimed.
func ofNoPort(m modelled) float64    { return m.noPort }
func ofFirstNo(m modelled) float64   { return m.firstNo }
func ofHalf(m modelled) float64      { return m.half }
func ofClosed(m modelled) float64    { return m.closed }
func ofSteady(m modelled) float64    { return m.steady }
func ofExhausted(m modelled) float64 { return m.exhausted }

// counted are the numbers of the model that are claimed of a run, where they are.
func (u *undersized) counted(m, sd modelled) []modelClaim {
	all := []modelClaim{u.closedClaim(m, sd)}
	switch {
	case m.noPort > 0 && u.Ports >= manyPorts:
		return []modelClaim{{ofHalf, "s until half of the ports had been used", byModel(m.half, sd.half)}}
	case m.noPort > 0:
		all = []modelClaim{
			{ofNoPort, "calls without a port", byModel(m.noPort, sd.noPort)},
			{ofFirstNo, "s until no port was left", byModel(m.firstNo, sd.firstNo)},
		}
	}
	if u.MaxActive == 0 && m.noPort == 0 {
		all = append(all, modelClaim{ofSteady, "connections closed in the steady state", byModel(m.steady, sd.steady)})
	}
	if u.refuses() {
		all = append(all, u.exhaustedClaim(m, sd))
	}
	return all
}

// burstCloses is how many connections more a pool may close where it closes hardly any: a
// pause of the machine makes a burst of calls.
const burstCloses = 10

// closedClaim is about connections that the pool closes.
func (u *undersized) closedClaim(m, sd modelled) modelClaim {
	tol := byModel(m.closed, sd.closed)
	if pool := u.pooling(KernelRules{}); pool.idle < pool.active {
		tol.Amount += burstCloses
	}
	return modelClaim{ofClosed, "connections closed", tol}
}

// refuses says that the pool has a limit, and an error for who comes when it is reached.
func (u *undersized) refuses() bool { return u.MaxActive > 0 && !u.Wait && u.Client == clientRedigo }

// exhaustedClaim is about calls that the pool refuses: a heartbeat or two find it full that the
// model has just before or after that.
func (u *undersized) exhaustedClaim(m, sd modelled) modelClaim {
	tol := byModel(m.exhausted, sd.exhausted)
	tol.Amount += 2 * float64(u.Ops)
	return modelClaim{ofExhausted, "calls refused", tol}
}

// exhaustion is about when no port is left.
func (p *legPrediction) exhaustion(m, sd modelled) {
	const note = "time to exhaustion: when the first dial finds no local port"
	if p.Ports < manyPorts {
		p.add(metricNoLocalPort, "calls", "model(λ, g, W, m, c, P)", m.noPort, byModel(m.noPort, sd.noPort), "connect: cannot assign requested address")
		p.add(metricFirstNoPort, "s", "model(λ, g, W, m, c, P)", m.firstNo, byModel(m.firstNo, sd.firstNo), note)
		return
	}
	p.add(metricHalf, "s", "model(λ, g, W, m, c, P/2)", m.half, byModel(m.half, sd.half), "when half of the ports had been used")
	p.add(metricHalf, "s", "P/2·(m+g)/(λ·g)", p.inputs["P"]/2/churnLaw(p.Rate, p.Ops, p.Sync, p.MaxIdle), results.Within(0.25), "the same by the law of churn, from an empty range")
	p.add(metricFirstNoPort, "s", "model(λ, g, W, m, c, P)", m.firstNo, results.AtMost(),
		note+"; sooner, the slower the machine: from half on each connect(2) takes milliseconds of CPU, calls are late, more are in use, and more dial")
}

// pooled is about a pool that keeps connections.
func (p *legPrediction) pooled(role results.Role, rules KernelRules) {
	if !p.modelled() {
		return
	}
	m, sd := p.modelledSpread(rules)
	symptom := func(note string) {
		p.add(metricNoLocalPort, "calls", "1", 1, results.AtLeast(), note)
	}
	switch {
	case m.noPort > 0 && role != results.Fix:
		symptom("the symptom must show: cannot assign requested address")
		p.exhaustion(m, sd)
		if p.For < timeWaitLength {
			p.add(metricDials, "connections", "P", float64(p.Ports), results.Exactly(), "every port was used, and once: those in use and those in TIME_WAIT")
			p.add(metricTWAtEnd, "sockets", "P − m", p.inputs["P"]-p.inputs["m"], results.Exactly(), "TIME_WAITs when all calls are over: all ports but those of the idle connections")
		}
	case role == results.Incident || role == results.FalseLead:
		symptom("the symptom must show: cannot assign requested address")
	default:
		p.add(metricNoLocalPort, "calls", "0", 0, results.Exactly(), "no dial finds all ports taken")
		p.add(metricChurned, "connections", "model(λ, g, W, m, c)", m.closed, p.closedClaim(m, sd).tolerance, "connections returned for which the pool has no place: each is a TIME_WAIT")
	}
	if p.refuses() && (m.noPort == 0 || p.Ports < manyPorts) {
		p.add(metricExhausted, "calls", "model(λ, g, W, m, c)", m.exhausted, p.exhaustedClaim(m, sd).tolerance, "redigo: connection pool exhausted")
		if p.Ops == 1 && p.MaxIdle == p.MaxActive && m.exhausted > 100 {
			e := p.Rate * p.For.Seconds() * erlangB(p.MaxActive, p.Rate*p.Latency.Seconds())
			p.add(metricExhausted, "calls", "λ·T·B(c, λ·W)", e, results.Within(0.1), "the same by Erlang's loss formula: calls that find all c connections in use")
		}
	}
	if role != results.Control || m.noPort > 0 || p.Client != clientRedigo || p.MaxActive > 0 {
		return
	}
	from, to := p.steady()
	steady := (to - from).Seconds()
	law := churnLaw(p.Rate, p.Ops, p.Sync, p.MaxIdle)
	third := p.inputs["m"] / 3
	onset := third * third / (p.Rate * p.inputs["g"]) // W*
	switch x := p.Latency.Seconds() / onset; {
	case x <= 0.25:
		p.add(metricChurn, "connections/s", "λ/(m+1)/10", law/10, results.AtMost(), fmt.Sprintf("a quarter of W* = (m/3)²/λ = %.3g s or less: next to nothing is closed", onset))
	case x > 0.9 && x < 1.1:
		p.add(metricChurn, "connections/s", "0.65·λ/(m+1)", 0.65*law, results.Within(0.25), fmt.Sprintf("at W* = (m/3)²/λ = %.3g s: half to four fifths of the law", onset))
	}
	if float64(p.MaxIdle) > 3*p.swing() {
		p.add(metricChurn, "connections/s", "λ/(m+1)/3", law/3, results.AtMost(), "far beyond the swing √(λ·W) the law does not hold: hardly one is closed")
		return
	}
	p.add(metricChurn, "connections/s", "model(λ, g, W, m, c)", m.steady/steady, byModel(m.steady/steady, sd.steady/steady), "connections closed a second, and as many dialed, from 2·W on")
	if float64(p.MaxIdle) <= p.swing() && law*steady > 500 {
		formula := "λ/(m+1)"
		if p.Ops > 1 && !p.Sync {
			formula = "λ·g/(m+g)"
		}
		p.add(metricChurn, "connections/s", formula, law, results.Within(0.15), "the law of churn, for m ≤ √(λ·W)")
	}
}

// ceiling is about a Redis at its limit.
func (p *legPrediction) ceiling() {
	p.add(metricNoLocalPort, "calls", "0", 0, results.Exactly(), "no dial finds all ports taken")
	in := p.inputs
	// Long enough that the time until all connections are in use does not count.
	if p.Client != clientRedigo || p.MaxActive == 0 || p.Wait || (in["λ"]-in["C"])*in["T"] < 20*in["c"] {
		return
	}
	p.add(metricMeanLatency, "s", "c/C", in["c"]/in["C"], results.Within(0.1), "latency rises until all connections are in use: each of c calls waits for the others")
	p.add(metricRequestRate, "requests/s", "C", in["C"], results.Within(0.03), "what Redis serves: its limit")
	p.add(metricServerLatency, "s", "c/C", in["c"]/in["C"], results.Within(0.1), "what a request took at Redis, by its own account: nearly all of it is waiting for its turn")
	p.add(metricExhausted, "calls", "n − C·T − c", in["n"]-in["C"]*in["T"]-in["c"], results.Within(0.1), "what comes beyond the limit is refused: connection pool exhausted")
	p.add(metricChurned, "connections", "(λ−C)·T/10", (in["λ"]-in["C"])*in["T"]/10, results.AtMost(), "hardly a connection is closed: none is idle")
}

// short is about connections that serve one call.
func (p *legPrediction) short(rules KernelRules) {
	in := p.inputs
	if p.TWReuse == 1 {
		p.add(metricDialRate, "connections/s", "P/delay", in["P"]/in["delay"], results.Within(0.1), "each port once in tcp_tw_reuse_delay")
		p.add(metricNoLocalPort, "calls", "1", 1, results.AtLeast(), "the symptom must show: what comes beyond that finds no port")
		return
	}
	p.add(metricNoLocalPort, "calls", "1", 1, results.AtLeast(), "the symptom must show: cannot assign requested address")
	m := model(p.callers(), p.pooling(rules))
	p.add(metricFirstNoPort, "s", "model(λ, P)", m.firstNo, results.PlusMinus(0.2), "time to exhaustion: when the call comes that is one too many")
	p.add(metricFirstNoPort, "s", "P/λ", in["P"]/in["λ"], results.Within(0.3), "the same on average")
	if p.For > steadyFrom(rules)+2*time.Second {
		p.add(metricPortAgain, "s", "R", in["R"], results.PlusMinus(rules.TimeWaitRounding.Seconds()/2+10/in["λ"]),
			"from the first use of the first port to the next use of any: the ceiling is P/R connections a second")
	}
}

// batching is about calls that share connections.
func (p *legPrediction) batching() {
	p.add(metricNoLocalPort, "calls", "0", 0, results.Exactly(), "no dial finds all ports taken")
	p.add(metricChurned, "connections", "0", 0, results.Exactly(), "nothing is closed, so nothing is in TIME_WAIT")
	if p.Client != clientBatch {
		return
	}
	p.add(metricDials, "connections", "conns", p.inputs["conns"], results.Exactly(), "the connections of the batching client, however slow Redis is")
	if p.Ceiling > 0 && p.Rate/p.meanBatch() < float64(p.Ceiling)/2 {
		p.add(metricMeanLatency, "s", "t", p.inputs["t"], results.AtMost(), "Redis, asked less than half as often as it can serve, keeps nobody waiting; collecting takes less than t")
	}
	if p.Ops == 1 {
		mean := p.meanBatch()
		p.add(metricBatch, "commands", "1 + E[min(Poisson(λ·t/conns), k−1)]", mean, results.Within(0.05), "commands in a batch: sent when it has k, or t after its first")
		if p.beside {
			return
		}
		p.add(metricRequests, "requests", "1/(1 + E[min(Poisson(λ·t/conns), k−1)])", 1/mean, results.Within(0.05), "what Redis reads for each command")
	}
}

func (u *undersized) meanBatch() float64 {
	return pool.MeanBatch(u.Rate/float64(u.BatchConns), u.BatchCommands, u.BatchDelay)
}

// predictSavings compares clients with the first one.
func (u *undersized) predictSavings(legs []undersizedLeg) []results.Prediction {
	var claims []results.Prediction
	for _, l := range legs[1:] {
		if l.Ops > 1 || l.Rate < 1000 || legs[0].Client != clientRedigo {
			continue
		}
		if l.Client == clientAuto {
			p := &legPrediction{undersizedLeg: l, inputs: map[string]float64{"W": l.Latency.Seconds()}}
			p.add(metricRequestRatio, "", "1/2", 0.5, results.AtMost(), "requests that Redis reads, beside "+legs[0].label)
			p.add(metricSyscallRatio, "", "1/2", 0.5, results.AtMost(), "reads and writes of this process for each command, beside "+legs[0].label)
			p.add(metricLatencyCost, "s", "W + 0.002", l.Latency.Seconds()+0.002, results.AtMost(), "mean latency that it costs: a call waits for the batch before its own, W at most")
			claims = append(claims, p.claims...)
		}
		if l.Client != clientBatch {
			continue
		}
		p := &legPrediction{undersizedLeg: l, inputs: map[string]float64{"λ": l.Rate, "k": float64(l.BatchCommands), "t": l.BatchDelay.Seconds(), "conns": float64(l.BatchConns)}}
		p.add(metricRequestRatio, "", "1/(1 + E[min(Poisson(λ·t/conns), k−1)])", 1/l.meanBatch(), results.Within(0.07), "requests that Redis reads, beside "+legs[0].label)
		p.add(metricSyscallRatio, "", "1/(1 + E[min(Poisson(λ·t/conns), k−1)])", 1/l.meanBatch(), results.PlusMinus(0.1), "reads and writes of this process for each command, beside "+legs[0].label+": one of each for a batch")
		delay := pool.BatchDelay(l.Rate/float64(l.BatchConns), l.BatchCommands, l.BatchDelay)
		p.add(metricLatencyCost, "s", "delay(λ, k, t)", delay.Seconds(), results.PlusMinus(0.0005), "mean latency that it costs: how long a command waits until its batch is sent")
		claims = append(claims, p.claims...)
	}
	return claims
}

// predictFill is about the cost of connect(2). It looks at ports one after the other,
// first those of the lowest port's parity (net/ipv4/inet_hashtables.c,
// __inet_hash_connect), from behind where it ended: while some of that parity are free it
// comes upon one soon, and then it looks at all P/2 of them each time.
func (u *undersized) predictFill(rules KernelRules) []results.Prediction {
	if rules.ConnectPortStep != 2 {
		return nil
	}
	in := map[string]float64{"P": float64(u.Ports)}
	var claims []results.Prediction
	base := -1.0
	for _, x := range u.Fill {
		label := fillLabel(x)
		ratio := label + "/" + metricConnectCPU + ".Ratio"
		switch {
		case base < 0:
			base = x
			continue
		case x < 0.48:
			claims = append(claims, claim(ratio, "", "2", in, 2, results.AtMost(), "CPU of a connect(2) beside the first: hardly different, the next port is free"))
		case x > 0.52 && x < 1:
			claims = append(claims, claim(ratio, "", "P/1000", in, in["P"]/1000, results.AtLeast(), "CPU of a connect(2) beside the first: it looks at P/2 ports of one parity, all taken, before the others"))
		case x == 1:
			claims = append(claims,
				claim(ratio, "", "P/600", in, in["P"]/600, results.AtLeast(), "CPU of a connect(2) beside the first: it looks at all P ports, in vain"),
				claim(label+"/Connect.NoLocalPort", "connects", "n", map[string]float64{"n": fillProbes}, fillProbes, results.Exactly(), "every connect(2) fails: EADDRNOTAVAIL"))
		}
	}
	return claims
}

// callersOf is callers at other arrivals.
func (u *undersized) callersOf(seed uint64) loadgen.Schedule {
	other := *u
	other.seed = seed
	return other.callers()
}
