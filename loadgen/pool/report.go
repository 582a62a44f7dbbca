package pool

import (
	"encoding/json"
	"errors"
	"fmt"
	"net"
	"strings"
	"time"

	"connlab/loadgen"
)

// Report is the account of a run. Reports of runs that went side by side add up by
// [Report.Merge]; a report survives being sent as JSON.
type Report struct {
	Keeping KindReport `json:"keeping"`
	Closing KindReport `json:"closing"`
}

// KindReport is the account of the callers of one kind.
type KindReport struct {
	// Load says how the calls ended. Its Latency is from due to the reply, waiting
	// for a connection included. Its Connect stays empty: a library does not tell
	// connecting from waiting.
	Load *loadgen.Report `json:"load"`
	// Dialed is the number of calls that were the first to have their connection,
	// Reused that of those that were not. A call without a connection is in neither.
	Dialed int64 `json:"dialed"`
	Reused int64 `json:"reused"`
	// NotReturned is the number of calls that are OK and could not give their
	// connection back.
	NotReturned int64 `json:"not_returned"`
}

// NewReport makes an empty report, to merge others into.
func NewReport() *Report {
	return &Report{Keeping: KindReport{Load: loadgen.NewReport()}, Closing: KindReport{Load: loadgen.NewReport()}}
}

// DialFraction is the part of the calls with a connection for which it was opened,
// or 0 if there are none.
func (k *KindReport) DialFraction() float64 {
	if k.Dialed+k.Reused == 0 {
		return 0
	}
	return float64(k.Dialed) / float64(k.Dialed+k.Reused)
}

// UnmarshalJSON reads a report that was written as JSON. It refuses one that is
// incomplete or does not balance.
func (r *Report) UnmarshalJSON(b []byte) error {
	type plain Report
	var read plain
	if err := json.Unmarshal(b, &read); err != nil {
		return fmt.Errorf("decoding pool report: %w", err)
	}
	if read.Keeping.Load == nil || read.Closing.Load == nil {
		return errors.New("decoding pool report: a kind of callers is missing")
	}
	*r = Report(read)
	if err := r.Balanced(); err != nil {
		return fmt.Errorf("decoding pool report: %w", err)
	}
	return nil
}

// Merge adds other to r. The order in which reports are merged does not matter.
func (r *Report) Merge(other *Report) {
	r.Keeping.merge(&other.Keeping)
	r.Closing.merge(&other.Closing)
}

func (k *KindReport) merge(other *KindReport) {
	k.Load.Merge(other.Load)
	k.Dialed += other.Dialed
	k.Reused += other.Reused
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
		if had := k.Dialed + k.Reused; had < k.Load.OK || had > k.Load.Started || k.NotReturned > k.Load.OK {
			return fmt.Errorf("caller %v: the account does not balance: %d started, %d ok, %d had a connection, %d could not return it",
				kind, k.Load.Started, k.Load.OK, had, k.NotReturned)
		}
	}
	return nil
}

// Behind returns an error if the generator did not keep the schedule of all calls
// together: see [loadgen.Report.Behind].
func (r *Report) Behind(limit time.Duration) error { return r.Total().Load.Behind(limit) }

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
	load.Lateness.Record(c.Started - c.Due)
	switch {
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
