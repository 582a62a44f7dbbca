package scenarios

import (
	"fmt"
	"math"
	"slices"
	"strconv"
	"time"

	"connlab/results"
	"connlab/server"
)

// Metrics that Predict and Measure both name, beside those of the backlog.
const (
	metricHeldOpen      = "clients/Held"
	metricFillTime      = "clients/Held.Took"
	metricMemory        = "machine/Memory.PerConnection"
	metricMemoryRatio   = "machine/Memory.TotalOverKernel"
	metricCut           = "server/Cut"
	metricQueueFull     = "server/Listen.FullAfter"
	metricCorpses       = "server/Corpses"
	metricAtRetry       = "clients/Connect.AtSYNRetry"
	metricRecoverMedian = "clients/Recovered.Median"
	metricRecoverP90    = "clients/Recovered.P90"
	metricRecovered     = "clients/Recovered"
	metricLateRecovered = "clients/Recovered.SecondHalf"
	metricOut           = "clients/Out"
	metricPong          = "clients/PingAnswered"
	metricProbeHung     = "prober/Hung"
	metricProbeSlowest  = "prober/Slowest"
	metricAlertEarly    = "alert/" + alertRule + ".Early"
	metricAlertValue    = "alert/ListenOverflows.Difference"
	metricNewSYNs       = "modelled/ThisKernel.SYNsDropped" // the same model by today's rule
	metricOldSYNs       = "modelled/Linux4.9.SYNsDropped"   // by the rule before 4.10; not measured, and no claim
	metricOldACKs       = "modelled/Linux4.9.ACKsDropped"
	metricOldGhosts     = "modelled/Linux4.9.Ghosts"
)

// stormFullSize is from how many connections on the figures of memory and of the time to
// establish them are claims: a smaller run shares the machine with others.
const stormFullSize = 100_000

// Bounds at full size, on two cores: see docs/incidents/accept-queue.md for what was measured.
const (
	fillWithin  = 10 * time.Second
	memoryRatio = 1.2
)

// window is the range of backlogs with which a storm neither drops a SYN nor accepts a
// corpse: cut·(1−μ/λ)−1 ≤ B ≤ μ·patience. It is empty where low is above high.
func (s *storm) window() (low, high float64) {
	if s.AcceptRate == 0 {
		return 0, math.Inf(1)
	}
	mu := float64(s.AcceptRate)
	if rate := float64(s.cut()) / s.spread().Seconds(); s.cut() > 0 && rate > mu {
		low = float64(s.cut())*(1-mu/rate) - 1
	}
	return low, mu * s.Timeout.Seconds()
}

// spellWindow says it.
func (s *storm) spellWindow() string {
	low, high := s.window()
	switch {
	case math.IsInf(high, 1):
		return "any backlog will do"
	case low > high:
		return fmt.Sprintf("no backlog can save you: cut·(1−μ/λ)−1 = %.0f, and μ·patience = %.0f", low, high)
	}
	return fmt.Sprintf("the window is cut·(1−μ/λ)−1 = %.0f ≤ B ≤ μ·patience = %.0f", low, high)
}

// losesClients says that clients give up within the run, so that some can be out in the end; those that
// do not are hurt by waiting.
func (s *storm) losesClients() bool { return s.Timeout < s.For/2 }

// outcomes are the storm as both models have it, several times each: chance has a part in who
// finds a place. What happens lies between.
type outcomes struct{ alone, lumps []stormOutcome }

// stormPlays is how often each model is played.
const stormPlays = 3

func (s *storm) play(rules KernelRules) (o outcomes) {
	for i := range stormPlays {
		m := s.model(rules)
		m.seed += uint64(i)
		o.alone = append(o.alone, m.play())
		m.lumps = true
		o.lumps = append(o.lumps, m.play())
	}
	return o
}

// mean is that of a number over the plays of one model.
func mean(plays []stormOutcome, of func(stormOutcome) float64) float64 {
	var sum float64
	for _, o := range plays {
		sum += of(o)
	}
	return sum / float64(len(plays))
}

// between is a claim about a number that the two models bracket.
func (o outcomes) between(metric, unit string, in map[string]float64, of func(stormOutcome) float64, slack float64, note string) results.Prediction {
	const model = "storm(cut, λ, μ, B, p, patience)"
	a, b := mean(o.alone, of), mean(o.lumps, of)
	middle := (a + b) / 2
	if math.Abs(a-b) > slack*middle {
		note += fmt.Sprintf("; %s if each SYN is looked at alone, %s if lumps of SYN retries are", brief(a), brief(b))
	}
	allowed := math.Abs(a-b)/2 + slack*middle
	if unit != "s" {
		allowed += 2 * math.Sqrt(middle) // chance, of a count
	}
	return claim(metric, unit, model, in, middle, results.PlusMinus(math.Ceil(allowed*1000)/1000), note)
}

// brief writes a number of a note.
func brief(x float64) string {
	if x >= 100 {
		return strconv.FormatFloat(x, 'f', 0, 64)
	}
	return strconv.FormatFloat(x, 'g', 3, 64)
}

// overflowed says that the queue overflows, in any of the plays.
func (o outcomes) overflowed() bool {
	return slices.ContainsFunc(slices.Concat(o.alone, o.lumps), func(o stormOutcome) bool { return o.overflows > 0 })
}

// Predict implements [Experiment].
func (s *storm) Predict(role results.Role, rules KernelRules) []results.Prediction {
	q, out := s.queue(), s.play(rules)
	in := map[string]float64{
		"backlog": float64(s.Backlog), "somaxconn": float64(s.Somaxconn), "connections": float64(s.Connections), "share": s.Share,
		"cut": float64(s.cut()), "λ": float64(s.cut()) / max(s.spread().Seconds(), 1e-9), "μ": float64(s.AcceptRate), "B": float64(q.limit()),
		"patience": s.Timeout.Seconds(), "p": 1 / probeEvery.Seconds(), "b": server.AcceptBurst.Seconds(), "r₁": rules.SYNRetries(1)[0].Seconds(),
	}
	claims := []results.Prediction{
		claim(metricLimit, "connections", "min(backlog, somaxconn)", in, float64(q.limit()), results.Exactly(), "both as they were when listen(2) was called"),
		claim(metricHeldOpen, "connections", "connections", in, float64(s.Connections), results.Exactly(), "each has sent PING and had PONG"),
		claim(metricCut, "connections", "share·connections", in, float64(s.cut()), results.PlusMinus(float64(s.Workers)), "each worker resets its part"),
		claim(metricDropsOnly, "SYNs", "0", nil, 0, results.Exactly(), "ListenDrops − ListenOverflows: nothing is dropped for another reason"),
	}
	if s.Connections >= stormFullSize {
		claims = append(claims,
			claim(metricFillTime, "s", "10", nil, fillWithin.Seconds(), results.AtMost(), "to establish all of them, PING and PONG included"),
			claim(metricMemoryRatio, "1", "1.2", nil, memoryRatio, results.AtMost(), "all memory that the connections take, over the kernel's own part of it"))
	}
	if !out.overflowed() {
		claims = append(claims,
			claim(metricPeakDepth, "connections", "B", in, float64(q.limit()), results.AtMost(), "connections that wait for accept(): the queue never fills"),
			claim(metricOverflows, "SYNs", "0", nil, 0, results.Exactly(), "the queue never overflows"),
			claim(metricVictims, "clients", "0", nil, 0, results.Exactly(), "clients whose first SYN is dropped"),
			claim(metricProbeHung, "connects", "0", nil, 0, results.Exactly(), "of a connect every 100 ms: none waits for a SYN retry"))
	} else {
		claims = append(claims, s.predictOverflow(out, in, rules)...)
	}
	claims = append(claims, s.predictClients(out, in)...)
	if s.Alert {
		claims = append(claims, predictAlert()...)
	}
	return append(claims, s.predictSymptom(role)...)
}

// predictOverflow is for a storm that fills the queue.
func (s *storm) predictOverflow(out outcomes, in map[string]float64, rules KernelRules) []results.Prediction {
	hung := func(o stormOutcome) float64 { return float64(o.probesHung) }
	probes := (mean(out.alone, hung) + mean(out.lumps, hung)) / 2
	claims := []results.Prediction{
		claim(metricPeakDepth, "connections", "B+1", in, float64(s.queue().places()), results.PlusMinus(rules.overfill()), "connections that wait for accept(): the queue is full; CPUs that meet may all take the last place"),
		out.between(metricVictims, "clients", in, func(o stormOutcome) float64 { return float64(o.victims) }, 0.05, "clients whose first SYN is dropped"),
		out.between(metricOverflows, "SYNs", in, func(o stormOutcome) float64 { return float64(o.overflows + o.refused) }, 0.05, "attempts: SYNs, and what ghosts send, the prober's too"),
		claim(metricProbeHung, "connects", "1.25·storm(cut, λ, μ, B, p, patience)", in, 1.25*probes, results.PlusMinus(0.75*probes),
			"of a connect every 100 ms: those that wait for a SYN retry, “Connecting…”; from half to twice what the models have, since whether a probe meets the place that is free decides"),
		claim(metricAtRetry, "1", "0.98", nil, 0.98, results.AtLeast(), "part of the connects that took next to nothing, or until one of the SYN retries"),
	}
	if s.Jitter == 0 {
		full := (float64(s.queue().places()) + in["μ"]*in["b"]) / (in["λ"] + in["p"] - in["μ"])
		if full < s.spread().Seconds() && full < s.Timeout.Seconds() {
			claims = append(claims, claim(metricQueueFull, "s", "(B + 1 + μ·b)/(λ + p − μ)", in, full, results.PlusMinus(0.05*full+fillPause.Seconds()),
				"from the first client that comes back; b is what the server's limit lets pass at once, p the prober"))
		}
	}
	if !s.losesClients() {
		claims = append(claims, claim(metricProbeSlowest, "s", "r₁", in, in["r₁"], results.AtLeast(), "the prober's slowest connect: a SYN retry at least"))
	}
	return claims
}

// predictClients is what becomes of the clients.
func (s *storm) predictClients(out outcomes, in map[string]float64) []results.Prediction {
	if s.cut() == 0 {
		return []results.Prediction{claim(metricPong, "clients", "connections", in, float64(s.Connections), results.Exactly(), "each answers a PING in the end")}
	}
	recovered := func(o stormOutcome) float64 { return float64(len(o.recovered)) }
	corpses := out.between(metricCorpses, "connections", in, func(o stormOutcome) float64 { return float64(o.corpses) }, 0.05, "accepted after their client had given up")
	if mean(out.alone, recovered) < float64(s.cut()) {
		claims := []results.Prediction{
			out.between(metricRecovered, "clients", in, recovered, 0.1, "clients that had their reply: those who came while the wait was shorter than their patience"),
			corpses,
		}
		last := func(o stormOutcome) float64 { return quantile(o.recovered, 1).Seconds() }
		if max(mean(out.alone, last), mean(out.lumps, last)) < s.For.Seconds()/2 {
			claims = append(claims, claim(metricLateRecovered, "clients", "0", nil, 0, results.Exactly(), "in the second half of the run nobody gets through any more"))
		}
		return claims
	}
	after := func(q float64) func(stormOutcome) float64 {
		return func(o stormOutcome) float64 { return quantile(o.recovered, q).Seconds() }
	}
	claims := []results.Prediction{
		claim(metricOut, "clients", "0", nil, 0, results.Exactly(), "all are connected again"),
		claim(metricPong, "clients", "connections", in, float64(s.Connections), results.Exactly(), "each answers a PING in the end"),
	}
	if s.losesClients() && out.overflowed() {
		// What ghosts send after their clients gave up takes places, too: how many, the models do not know well.
		dead := mean(out.lumps, func(o stormOutcome) float64 { return float64(o.corpses) })
		in["corpses"] = dead
		first, last := 0.9*in["cut"]/in["μ"]-in["b"], (in["cut"]+dead)/in["μ"]+in["patience"]
		return append(claims, corpses, claim(metricRecoverP90, "s", "between 0.9·cut/μ − b and (cut + corpses)/μ + patience", in, (first+last)/2, results.PlusMinus((last-first)/2),
			"until nine in ten had their reply: no sooner than they can be accepted, and not after all and the corpses could have been"))
	}
	return append(claims,
		out.between(metricRecoverMedian, "s", in, after(0.5), 0.05, "until half of the clients had their reply"),
		out.between(metricRecoverP90, "s", in, after(0.9), 0.05, "until nine in ten had it"))
}

// alertPause is what a busy machine may add to the time until an alert.
const alertPause = time.Second

// predictAlert is for a Prometheus and a node_exporter beside the server.
func predictAlert() []results.Prediction {
	var claims []results.Prediction
	for _, every := range scrapes {
		in := map[string]float64{"s": every.Seconds(), "e": evaluateEvery.Seconds()}
		claims = append(claims, claim(metricAlertAfter(every), "s", "s + e", in, (alertWithin(every)+alertPause).Seconds(), results.AtMost(),
			"from the first overflow until "+alertRule+" fires: the next scrape, and the next evaluation; and a second for a busy machine"))
	}
	return append(claims,
		claim(metricAlertEarly, "alerts", "0", nil, 0, results.Exactly(), "alerts of that rule before the first overflow"),
		claim(metricAlertValue, "SYNs", "0", nil, 0, results.Exactly(), "node_netstat_TcpExt_ListenOverflows as Prometheus has it in the end, less the kernel's own counter"))
}

// metricAlertAfter is for one interval of scrapes.
func metricAlertAfter(every time.Duration) string {
	return fmt.Sprintf("alert/%s.%v.After", alertRule, every)
}

// predictSymptom is what people complain of: clients that wait for a SYN retry or, where they give up
// within the run, clients that are out in its end.
func (s *storm) predictSymptom(role results.Role) []results.Prediction {
	p := results.Prediction{Metric: metricSymptom, Unit: "clients"}
	switch role {
	case results.Incident, results.FalseLead:
		p.Formula, p.Note, p.Tolerance = "s·cut", "the symptom must show; "+s.spellWindow(), results.AtLeast()
		p.Inputs = map[string]float64{"s": symptomShare, "cut": float64(s.cut())}
		p.Predicted = math.Ceil(symptomShare * float64(s.cut()))
	case results.Fix:
		p.Formula, p.Note, p.Tolerance = "0", "the symptom must be gone; "+s.spellWindow(), results.Exactly()
	default:
		return nil // a control has the numbers that its parameters give it
	}
	return []results.Prediction{p}
}
