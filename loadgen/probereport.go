package loadgen

import (
	"errors"
	"fmt"
	"net/netip"
	"time"
)

// ProbeReport is what a [Probe] found.
type ProbeReport struct {
	Rounds []ProbeRound `json:"rounds"`
	// Load is the account of all attempts of all rounds: its Connect is the
	// time that connects took, its Latency the one from the moment an attempt
	// was due to the reply.
	Load *Report `json:"load"`
	// Reply is the time from the open connection to the reply, of all attempts
	// of all rounds that are OK.
	Reply *Histogram `json:"reply"`
}

// ProbeRound is one round.
type ProbeRound struct {
	Round  int       `json:"round"`  // from 0
	Source string    `json:"source"` // name of the source it went out from
	Start  time.Time `json:"start"`
	End    time.Time `json:"end"` // its connections were closed
	// Interrupted says that the round was ended before its time. Instances may
	// then have been tried less often than they would have been.
	Interrupted bool `json:"interrupted"`
	ProbeCounts
	// Suspects are the failed attempts whose local port had another target, in
	// order of their end; the first 1,000 of them.
	Suspects []Collision `json:"suspects"`
	// LostConnections are those that answered and ended by their peer before the
	// round was over; the first 1,000 of them.
	LostConnections []LostConnection `json:"lost_connections"`
}

// ProbeCounts are the numbers of one or more rounds.
type ProbeCounts struct {
	// Instances is the number of targets, times the number of rounds.
	Instances int64 `json:"instances"`
	// First says how the first tries ended, OK included. An instance that an
	// interrupted round did not come to is [NotStarted].
	First Counts `json:"first"`
	// Attempts says the same of all attempts.
	Attempts Counts `json:"attempts"`
	// Shared says the same of those attempts whose local port had another
	// target when they ended: see Attempt.SharedWith.
	Shared Counts `json:"shared"`
	// Answered[i] is the number of instances that answered at retry i; retry 0
	// is the first try. Its length is the number of attempts an instance gets.
	Answered []int64 `json:"answered"`
	// Never is the number of instances that did not answer.
	Never int64 `json:"never"`
	// Lost counts the connections that answered and ended by their peer before
	// the round was over, as [Held.Lost] does.
	Lost Counts `json:"lost"`
	// Unclosed is the number of connections whose peer had not closed in time
	// when the round was over.
	Unclosed int64 `json:"unclosed"`
}

// Collision is a failed attempt that had its local port in common with another.
type Collision struct {
	Retry      int              `json:"retry"` // which attempt it was, from 0
	Local      netip.AddrPort   `json:"local"`
	Target     netip.AddrPort   `json:"target"` // the instance that failed
	Class      Class            `json:"class"`
	SharedWith []netip.AddrPort `json:"shared_with"` // see Attempt.SharedWith
	// AnsweredTo is the local address and port of the retry that was answered;
	// not valid, and empty as JSON, if none was.
	AnsweredTo netip.AddrPort `json:"answered_to"`
}

// LostConnection is one that answered and then ended by its peer.
type LostConnection struct {
	Local      netip.AddrPort   `json:"local"`
	Target     netip.AddrPort   `json:"target"`
	Class      Class            `json:"class"`       // EOF, ReadReset, or BadReply for something unasked
	SharedWith []netip.AddrPort `json:"shared_with"` // see Attempt.SharedWith
}

// Timeouts is the number of operations that timed out, connecting or waiting for
// the reply.
func (c Counts) Timeouts() int64 { return c[ConnectTimeout] + c[ReadTimeout] }

func newProbeCounts(retries int) ProbeCounts {
	return ProbeCounts{First: Counts{}, Attempts: Counts{}, Shared: Counts{}, Answered: make([]int64, retries+1), Lost: Counts{}}
}

// Total is the sum of all rounds.
func (r *ProbeReport) Total() ProbeCounts {
	total := newProbeCounts(0)
	for _, round := range r.Rounds {
		total.Instances += round.Instances
		total.First.add(round.First)
		total.Attempts.add(round.Attempts)
		total.Shared.add(round.Shared)
		for i, n := range round.Answered {
			if i == len(total.Answered) {
				total.Answered = append(total.Answered, 0)
			}
			total.Answered[i] += n
		}
		total.Never += round.Never
		total.Lost.add(round.Lost)
		total.Unclosed += round.Unclosed
	}
	return total
}

func (c Counts) add(other Counts) {
	for class, n := range other {
		c[class] += n
	}
}

// Balanced returns an error unless every instance of every round and every
// attempt stands where it must: each instance has one first try, and either
// answered or never did; one that answered at retry i had i+1 attempts, one that
// never did had all, but in an interrupted round; and the attempts are those that
// the account of the load knows.
func (r *ProbeReport) Balanced() error {
	for i := range r.Rounds {
		if err := r.Rounds[i].balanced(r.Rounds[i].Interrupted); err != nil {
			return fmt.Errorf("round %d: %w", r.Rounds[i].Round, err)
		}
	}
	if err := r.Load.Balanced(); err != nil {
		return err
	}
	attempts := r.Total().Attempts
	if attempts.Sum() != r.Load.Started || attempts[OK] != r.Load.OK || attempts[OK] != r.Reply.Count() {
		return fmt.Errorf("attempts do not balance: %v; the load had %d started, %d ok, %d replies", attempts, r.Load.Started, r.Load.OK, r.Reply.Count())
	}
	return nil
}

func (c *ProbeCounts) balanced(interrupted bool) error {
	var answered, attempts int64
	for i, n := range c.Answered {
		answered += n
		attempts += n * int64(i+1)
	}
	most := attempts + c.Never*int64(len(c.Answered))
	switch sum := c.Attempts.Sum(); {
	case c.First.Sum() != c.Instances || answered+c.Never != c.Instances:
		return fmt.Errorf("instances do not balance: %d; first tries %v; %d answered, %d never", c.Instances, c.First, answered, c.Never)
	case len(c.Answered) == 0 || c.First[OK] != c.Answered[0] || c.Attempts[OK] != answered:
		return fmt.Errorf("answers do not balance: %v by retry; first tries %v, attempts %v", c.Answered, c.First, c.Attempts)
	case sum > most || sum < most && !interrupted:
		return fmt.Errorf("attempts do not balance: %d of %d (%v)", sum, most, c.Attempts)
	case !interrupted && c.First[NotStarted] > 0:
		return errors.New("instances were left out")
	}
	return nil
}
