package scenarios

import (
	"fmt"
	"math"

	"connlab/results"
)

// testLevel is how unlikely a random outcome must be under a prediction to refute
// it: of all runs in which every prediction is right, one in a thousand may be
// refuted by chance, and a run judges about thirty such outcomes.
const testLevel = 1e-3 / 30

// Metrics that Predict and Measure both name.
const (
	metricCollisions    = "balancer/Collisions"
	metricOptions       = "balancer/OptionsAdded"
	metricSYNs          = "balancer/SYNs"
	metricDropped       = "balancer/Dropped"
	metricProbed        = "clients/Instances"
	metricTimedOut      = "clients/Timeouts"
	metricBadRounds     = "clients/Rounds.WithTimeout"
	metricUnreached     = "clients/Unreached"
	metricOtherFailures = "clients/Failed.Other"
	metricNoPort        = "clients/NoLocalPort"
	metricShared        = "clients/SharedTuples"
	metricOddPorts      = "clients/Ports.Odd"
	metricEvenPorts     = "clients/Ports.Even"
	metricUnexplained   = "both/Timeouts.Unexplained"
	metricUnnoticed     = "both/Collisions.Unnoticed"
	metricCollisionSYNs = "balancer/Collisions.SYNs"
	metricUnchallenged  = "both/SYNs.Unchallenged"
	metricMoved         = "balancer/PortsMoved"
	metricLaterFailed   = "clients/Requests.Later.Failed"
	metricLaterOK       = "clients/Requests.Later.OK"
	metricAnswered      = "clients/Answered"
	metricQuiet         = "both/Collisions.Unchallenged"
	metricSYNChallenge  = "proxies/TcpExt.TCPSYNChallenge"
	metricChallengeACK  = "proxies/TcpExt.TCPChallengeACK"
	metricEstabResets   = "proxies/Tcp.EstabResets"
	metricFirstOK       = "clients/First.OK"
	metricFirstLater    = "clients/First.StillOK"
	metricSecondOK      = "clients/Second.OK"
	metricSecondTimeout = "clients/Second.Timeouts"
	metricSecondSlowest = "clients/Second.Connect.Max"
	metricSeenSYNs      = "clients/Capture.SYNs"
	metricSeenAnswers   = "clients/Capture.SYNACKs"
	metricSeenAtProxy   = "proxies/Capture.SYNs"
	metricSeenChallenge = "proxies/Capture.ChallengeACKs"
)

// Predict implements [Experiment].
func (c *collision) Predict(role results.Role, rules KernelRules) []results.Prediction {
	var claims []results.Prediction
	switch {
	case c.Pairs > 0:
		return c.predictPairs(rules)
	case c.Ports == portsBind && c.PortRange.ports() < c.VIPs:
		return c.predictExhausted()
	case c.Long:
		claims = c.predictLong(rules)
	case len(c.Sweep) > 0:
		claims = c.predictSweep(rules)
	default:
		claims = c.predictRounds(rules)
	}
	exact := func(metric, unit, note string) {
		claims = append(claims, claim(metric, unit, "0", nil, 0, results.Exactly(), note))
	}
	exact(metricOtherFailures, "attempts", "nothing fails in another way")
	if c.Path == pathL4 || c.Path == pathFullNAT {
		exact(metricDropped, "packets", "the balancer understands every TCP packet, has room for each option and a port for each connection")
	}
	switch {
	case role == results.Incident || role == results.FalseLead:
		// Where so few collisions are expected that there may be none by chance, the
		// tests above say all there is to say.
		if mean := c.mean(rules); mean > 0 && math.Exp(-mean) > testLevel {
			break
		}
		claims = append(claims, claim(metricTimedOut, "attempts", "1", nil, 1, results.AtLeast(), "the symptom must show"))
	case role == results.Fix:
		exact(metricTimedOut, "attempts", "the symptom must be gone")
	case !c.collides():
		exact(metricTimedOut, "attempts", "and nothing times out")
	}
	return claims
}

// inputs are what the formulas name.
func (c *collision) inputs(n int, rules KernelRules) map[string]float64 {
	return map[string]float64{
		"n": float64(n), "k": float64(c.Proxies), "R": float64(c.Rounds), "P": c.usable(rules),
		"pairs": c.pairsPerRound(n), "μ": c.expected(n, rules), "r": float64(c.PortRange.ports()),
	}
}

// mean is how many collisions the whole load is expected to have.
func (c *collision) mean(rules KernelRules) float64 {
	if !c.collides() {
		return 0
	}
	if c.Long {
		return float64(c.Parallel) * c.expected(c.VIPs, rules)
	}
	mean := 0.0
	for _, leg := range c.legs() {
		mean += float64(leg.rounds) * c.expected(leg.instances, rules)
	}
	return mean
}

// collides says whether this way lets two connections share a tuple.
func (c *collision) collides() bool { return c.Path == pathL4 }

// enoughRounds is how many rounds it takes for their number with a timeout to say
// something: with fewer, every outcome would be allowed.
const enoughRounds = 20

const pairsNote = "pairs of the connections of a round that share a proxy: k·(n/k)·(n/k−1)/2"

// predictRounds is for R rounds of n instances.
func (c *collision) predictRounds(rules KernelRules) []results.Prediction {
	in := c.inputs(c.VIPs, rules)
	mean := in["R"] * in["μ"]
	claims := []results.Prediction{
		claim(metricProbed, "instances", "R·n", in, in["R"]*in["n"], results.Exactly(), "every instance is probed in every round"),
		claim(metricUnreached, "instances", "0", nil, 0, results.Exactly(), "within a few retries every instance answers"),
	}
	claims = append(claims, c.predictPorts(rules)...)
	if mean == 0 {
		claims = append(claims, claim(metricShared, "connections", "0", nil, 0, results.Exactly(), "no two connections of a host have the same port and the same proxy"))
	} else if c.Path != pathProxies {
		claims = append(claims, claim(metricShared, "connections", "R·pairs/P", in, mean, results.Poisson(testLevel),
			"connections with the port and the proxy of an earlier one; "+pairsNote))
	}
	switch {
	case c.collides() && mean > 0:
		claims = append(claims, claim(metricCollisions, "connections", "R·pairs/P", in, mean, results.Poisson(testLevel), "tuples that two VIPs share at once, as the balancer sees it"))
		if c.Rounds >= enoughRounds {
			claims = append(claims, claim(metricBadRounds, "rounds", "R·(1 − e^−μ)", in, in["R"]*-math.Expm1(-in["μ"]), results.Binomial(c.Rounds, testLevel),
				"rounds in which something times out; μ = pairs/P"))
		}
		claims = append(claims, c.predictMatch()...)
	case c.collides():
		claims = append(claims, claim(metricCollisions, "connections", "0", nil, 0, results.Exactly(), "the balancer sees no tuple twice"))
		claims = append(claims, c.predictMatch()...)
	case c.Path == pathKernelNAT:
		claims = append(claims, claim(metricMoved, "connections", "R·pairs/P", in, mean, results.Poisson(testLevel), "connections that connection tracking gave another port"),
			claim(metricMovedDiff, "connections", "0", nil, 0, results.Exactly(), "as many as would have shared a tuple, and those whose port one of these was moved to"))
	case c.Path == pathProxies:
		claims = append(claims, claim(metricShared, "connections", "0", nil, 0, results.Exactly(), "the client's own kernel keeps the ports of one destination apart"))
	}
	return claims
}

// metricMovedDiff is how many ports were moved for no reason that is known.
const metricMovedDiff = "both/PortsMoved.Unexplained"

// predictMatch says that the two ends agree, port by port.
func (c *collision) predictMatch() []results.Prediction {
	return []results.Prediction{
		claim(metricUnexplained, "attempts", "0", nil, 0, results.Exactly(), "timeouts of which the balancer has no collision with that port and VIP"),
		claim(metricUnnoticed, "connections", "0", nil, 0, results.Exactly(), "collisions that no client noticed"),
		claim(metricUnchallenged, "SYNs", "0", nil, 0, results.AtLeast(),
			"SYNs of collisions − TCPSYNChallenge: the proxies' kernels challenge no other; a SYN that meets a handshake under way is not counted"),
		claim(metricQuiet, "connections", "0", nil, 0, results.AtMost(),
			"collisions − TCPSYNChallenge: of the SYNs of each one at least meets the established socket"),
	}
}

// predictPorts is about where local ports come from.
func (c *collision) predictPorts(rules KernelRules) []results.Prediction {
	in := c.inputs(c.VIPs, rules)
	even := c.PortRange.low%2 == 0
	firstChoice, other := metricOddPorts, metricEvenPorts
	if even {
		firstChoice, other = metricEvenPorts, metricOddPorts
	}
	switch {
	case c.Ports == portsKernel && rules.ConnectPortStep == 2:
		return []results.Prediction{claim(other, "ports", "0", nil, 0, results.Exactly(), "connect() takes every second port, of the parity of the range's low end")}
	case c.Ports == portsRange && rules.RangePortStep == 1:
		trials := c.Rounds * c.VIPs
		return []results.Prediction{claim(other, "ports", "R·n/2", in, float64(trials)/2, results.Binomial(trials, testLevel), "IP_LOCAL_PORT_RANGE takes every port")}
	case c.Ports == portsBind && c.VIPs <= c.PortRange.ports()/2:
		return []results.Prediction{claim(firstChoice, "ports", "0", nil, 0, results.Exactly(), "bind() takes the ports that connect() leaves, until there are none")}
	}
	return nil
}

// predictSweep is for rounds with several numbers of instances.
func (c *collision) predictSweep(rules KernelRules) []results.Prediction {
	var claims []results.Prediction
	for _, leg := range c.Sweep {
		in := c.inputs(leg.instances, rules)
		in["R"] = float64(leg.rounds)
		claims = append(claims, claim(sweepMetric(leg.instances), "connections", "R·pairs/P", in, in["R"]*in["μ"], results.Poisson(testLevel),
			fmt.Sprintf("collisions in R rounds of %d instances, μ = %.3g a round", leg.instances, in["μ"])))
	}
	claims = append(claims, claim(metricUnreached, "instances", "0", nil, 0, results.Exactly(), "within a few retries every instance answers"))
	return append(claims, c.predictMatch()...)
}

// sweepMetric is the collisions at one size of a sweep.
func sweepMetric(n int) string { return fmt.Sprintf("%s.Of%d", metricCollisions, n) }

// predictLong is for connections that are opened once.
func (c *collision) predictLong(rules KernelRules) []results.Prediction {
	in := c.inputs(c.VIPs, rules)
	in["D"] = float64(c.Parallel)
	return append([]results.Prediction{
		claim(metricCollisions, "connections", "D·pairs/P", in, in["D"]*in["μ"], results.Poisson(testLevel), "D detectors open their connections once; "+pairsNote),
		claim(metricLaterOK, "requests", "D·n·R", in, in["D"]*in["n"]*in["R"], results.Exactly(), "R rounds of requests over them are all answered"),
		claim(metricLaterFailed, "requests", "0", nil, 0, results.Exactly(), "and nothing times out any more"),
		claim(metricUnreached, "instances", "0", nil, 0, results.Exactly(), "within a few retries every connection stands"),
	}, c.predictMatch()...)
}

// predictExhausted is for bind(addr, 0) with fewer ports than connections.
func (c *collision) predictExhausted() []results.Prediction {
	in := map[string]float64{"n": float64(c.VIPs), "r": float64(c.PortRange.ports()), "R": float64(c.Rounds)}
	return []results.Prediction{
		claim(metricNoPort, "instances", "R·(n − r)", in, in["R"]*(in["n"]-in["r"]), results.Exactly(),
			"instances that got no local port: bind() needs one that no connection of the host has, to wherever it goes"),
		claim(metricAnswered, "instances", "R·r", in, in["R"]*in["r"], results.Exactly(), "the others answer"),
		claim(metricShared, "connections", "0", nil, 0, results.Exactly(), "no two connections of a host have the same port"),
		claim(metricTimedOut, "attempts", "0", nil, 0, results.Exactly(), "nothing times out: it fails at once"),
		claim(metricOtherFailures, "attempts", "0", nil, 0, results.Exactly(), "nor in another way"),
	}
}

// synsWithin is how many SYNs a connect sends before it gives up.
func (c *collision) synsWithin(rules KernelRules) int {
	n := 1
	for _, at := range rules.SYNRetries(12) {
		if at+rules.TimerRounding < c.Timeout {
			n++
		}
	}
	return n
}

// predictPairs is for pairs of connections that are made to collide.
func (c *collision) predictPairs(rules KernelRules) []results.Prediction {
	in := map[string]float64{"p": float64(c.Pairs), "s": float64(c.synsWithin(rules))}
	p, s := in["p"], in["s"]
	exact := func(metric, unit, formula string, predicted float64, note string) results.Prediction {
		return claim(metric, unit, formula, in, predicted, results.Exactly(), note)
	}
	claims := []results.Prediction{
		exact(metricCollisions, "connections", "p", p, "every pair collides"),
		exact(metricFirstOK, "connections", "p", p, "the first of each pair connects and answers"),
	}
	if c.Reply == replyFirst {
		return append(claims,
			exact(metricSecondTimeout, "connections", "p", p, "the second gets no answer that it can use"),
			exact(metricFirstLater, "connections", "p", p, "the first works as before"),
			exact(metricSYNChallenge, "events", "p·s", p*s, "each SYN of the second meets the socket of the first: "+fmt.Sprintf("s = %v within the timeout", s)),
			exact(metricChallengeACK, "events", "p·s", p*s, "and is answered with a challenge ACK, which goes to the first VIP's connection"),
			exact(metricUnexplained, "attempts", "0", 0, "each timeout is a collision that the balancer counted"),
			exact(metricUnnoticed, "connections", "0", 0, "and each of those a timeout"),
			exact(metricSeenSYNs, "packets", "s", s, "captured at the client for one second connection: SYN, SYN, SYN …"),
			exact(metricSeenAnswers, "packets", "0", 0, "and no SYN-ACK"),
			exact(metricSeenAtProxy, "packets", "s", s, "captured at the proxy: every one of them arrives"),
			exact(metricSeenChallenge, "packets", "s", s, "and is answered, with an ACK for the other connection"),
		)
	}
	return append(claims,
		exact(metricSecondOK, "connections", "p", p, "the second connects and answers"),
		claim(metricSecondSlowest, "s", "1", nil, 1, results.AtMost(), "in less than one SYN retransmission timeout: a reset clears the way, and the next SYN follows at once"),
		exact(metricFirstLater, "connections", "0", 0, "the first is dead"),
		exact(metricSYNChallenge, "events", "p", p, "one SYN of each pair met the old socket"),
		exact(metricEstabResets, "events", "2·p", 2*p, "which the second client's reset then closed, and with it the proxy's connection to the instance"),
		exact(metricSeenSYNs, "packets", "2", 2, "captured at the client for one second connection: the SYN, and again after the reset"),
		exact(metricSeenAnswers, "packets", "1", 1, "and the SYN-ACK"),
		exact(metricSeenAtProxy, "packets", "2", 2, "captured at the proxy"),
		exact(metricSeenChallenge, "packets", "1", 1, "the challenge that made the client send the reset"),
	)
}
