package pool

import (
	"errors"
	"fmt"
	"net"
	"strings"

	"connlab/loadgen"
)

// Report is the account of a run.
type Report struct {
	Keeping KindReport `json:"keeping"`
	Closing KindReport `json:"closing"`
}

// KindReport is the account of the callers of one kind.
type KindReport struct {
	// Load says how the calls ended. Its Latency is from due to the reply, waiting
	// for a connection included. Its Lateness is that of each caller's first
	// operation, the only one that the generator starts. Its Connect stays empty: a
	// library does not tell connecting from waiting.
	Load *loadgen.Report `json:"load"`
	// Dialed is the number of calls that were the first to have their connection,
	// Reused that of those that were not, and Shared that of those which had it
	// together with others. A call without a connection is in none of them.
	Dialed int64 `json:"dialed"`
	Reused int64 `json:"reused"`
	Shared int64 `json:"shared"`
	// NotReturned is the number of calls that are OK and could not give their
	// connection back.
	NotReturned int64 `json:"not_returned"`
}

func newReport() *Report {
	return &Report{Keeping: KindReport{Load: loadgen.NewReport()}, Closing: KindReport{Load: loadgen.NewReport()}}
}

func (k *KindReport) merge(other *KindReport) {
	k.Load.Merge(other.Load)
	k.Dialed += other.Dialed
	k.Reused += other.Reused
	k.Shared += other.Shared
	k.NotReturned += other.NotReturned
}

// Total is the account of the callers of both kinds together.
func (r *Report) Total() *KindReport {
	t := &KindReport{Load: loadgen.NewReport()}
	t.merge(&r.Keeping)
	t.merge(&r.Closing)
	return t
}

// Balanced returns an error unless every due call of either kind stands in exactly
// one column, and every call that is OK had a connection.
func (r *Report) Balanced() error {
	for _, kind := range []Kind{Keeps, Closes} {
		k := r.of(kind)
		if err := k.Load.Balanced(); err != nil {
			return fmt.Errorf("caller %v: %w", kind, err)
		}
		if had := k.Dialed + k.Reused + k.Shared; had < k.Load.OK || had > k.Load.Started || k.NotReturned > k.Load.OK {
			return fmt.Errorf("caller %v: the account does not balance: %d started, %d ok, %d had a connection, %d could not return it",
				kind, k.Load.Started, k.Load.OK, had, k.NotReturned)
		}
	}
	return nil
}

func (r *Report) of(kind Kind) *KindReport {
	if kind == Keeps {
		return &r.Keeping
	}
	return &r.Closing
}

// add puts a call in its column.
func (k *KindReport) add(c Call) {
	load := k.Load
	load.Due++
	if c.Class == loadgen.NotStarted {
		load.NotStarted++
		return
	}
	load.Started++
	if c.Op == 0 {
		load.Lateness.Record(c.Started - c.Due)
	}
	switch {
	case c.Shared:
		k.Shared++
	case c.Dialed:
		k.Dialed++
	case c.Reused > 0:
		k.Reused++
	}
	if c.NotReturned != nil {
		k.NotReturned++
	}
	if c.Class == loadgen.OK {
		load.OK++
		load.Latency.Record(c.Done - c.Due)
		return
	}
	load.Failed[c.Class]++
	switch c.Class {
	case loadgen.Other:
		load.Causes[cause(c.Err)]++
	case loadgen.ServerError:
		_, reply, _ := strings.Cut(c.Err.Error(), loadgen.ErrServer.Error()+": ")
		word, _, _ := strings.Cut(reply, " ")
		load.Causes["reply: "+word]++
	}
}

// cause is the text of an error without the addresses that package net puts into
// it.
func cause(err error) string {
	if op, ok := errors.AsType[*net.OpError](err); ok {
		return op.Op + ": " + op.Err.Error()
	}
	return err.Error()
}
