package observe

import (
	"context"
	"errors"
	"fmt"
	"sync"
	"time"

	"connlab/netlab"
)

// The intervals that a [Config] takes for zero. They follow from what a sample
// costs, measured on Linux 6.18 with 2 CPUs and a table of 262,144 buckets:
// 70 µs for the counters of a host; 40 µs for a listener, with 4,000
// connections as with none, since listeners have a table of their own. The
// states of a host take a walk over the machine's one table of all others: 0.4 ms
// when it is empty and 0.15 µs more for each socket of whatever host, TIME_WAIT
// included, so 7 ms beside 50,000.
const (
	DefaultCountersEvery  = 100 * time.Millisecond
	DefaultListenersEvery = 10 * time.Millisecond
	DefaultStatesEvery    = 100 * time.Millisecond
)

// Config says what to observe. A list may be empty, and a host may be in all of
// them.
type Config struct {
	// Counters are the hosts whose every counter is sampled.
	Counters      []*netlab.Host
	CountersEvery time.Duration
	// Listeners are sampled for their accept queues; one a host at most.
	Listeners      []Listener
	ListenersEvery time.Duration
	// States are the hosts whose sockets are counted by state.
	States      []*netlab.Host
	StatesEvery time.Duration
}

// Listener is the listening socket of a port on a host.
type Listener struct {
	Host *netlab.Host
	Port uint16
}

// Observer samples while a run goes on.
type Observer struct {
	start    time.Time
	cancel   context.CancelFunc
	running  sync.WaitGroup
	samplers []*sampler
	stop     func() (*Timeline, error)

	mu    sync.Mutex
	marks []Mark
}

// Start opens what cfg names, takes a first sample of everything and returns;
// sampling goes on by itself until Stop or until ctx ends. A listener that does
// not yet listen is an error. The caller must call [Observer.Stop] in any case.
func Start(ctx context.Context, cfg Config) (*Observer, error) {
	samplers, err := cfg.open()
	if err != nil {
		return nil, errors.Join(err, closeAll(samplers))
	}
	ctx, cancel := context.WithCancel(ctx)
	o := &Observer{start: time.Now(), cancel: cancel, samplers: samplers}
	o.stop = sync.OnceValues(o.finish)
	for _, s := range samplers {
		if err := s.round(o.start); err != nil {
			cancel()
			return nil, errors.Join(err, closeAll(samplers))
		}
	}
	for _, s := range samplers {
		o.running.Go(func() { s.err = s.run(ctx, o.start) })
	}
	return o, nil
}

// open returns the samplers that were opened even after an error.
func (cfg Config) open() ([]*sampler, error) {
	counters := newSampler("counters", cfg.CountersEvery, DefaultCountersEvery)
	listeners := newSampler("listeners", cfg.ListenersEvery, DefaultListenersEvery)
	states := newSampler("states", cfg.StatesEvery, DefaultStatesEvery)
	all := []*sampler{counters, listeners, states}
	p := newParser()
	for _, h := range cfg.Counters {
		if err := counters.add(h.Name(), func() (probe, error) { return openCounters(h, p) }); err != nil {
			return all, err
		}
	}
	for _, l := range cfg.Listeners {
		if err := listeners.add(l.Host.Name(), func() (probe, error) { return openListener(l) }); err != nil {
			return all, err
		}
	}
	for _, h := range cfg.States {
		if err := states.add(h.Name(), func() (probe, error) { return openStates(h) }); err != nil {
			return all, err
		}
	}
	return all, nil
}

// Mark notes an event at the present time.
func (o *Observer) Mark(name string) {
	o.mu.Lock()
	defer o.mu.Unlock()
	o.marks = append(o.marks, Mark{At: time.Since(o.start), Name: name})
}

// Stop takes a last sample of everything, closes all files and sockets, and
// returns the timeline. An error says which sampling broke off and why; the
// timeline is then what was seen until there. It is safe to call again and
// returns the same.
func (o *Observer) Stop() (*Timeline, error) { return o.stop() }

func (o *Observer) finish() (*Timeline, error) {
	o.cancel()
	o.running.Wait()
	t := &Timeline{start: o.start}
	var errs []error
	for _, s := range o.samplers {
		if s.err == nil {
			s.err = s.round(o.start)
		}
		errs = append(errs, s.err)
		if len(s.hosts) > 0 {
			t.groups = append(t.groups, s.group())
		}
	}
	t.duration = time.Since(o.start)
	o.mu.Lock()
	t.marks = append(t.marks, o.marks...)
	o.mu.Unlock()
	return t, errors.Join(errors.Join(errs...), closeAll(o.samplers))
}

func closeAll(samplers []*sampler) error {
	var errs []error
	for _, s := range samplers {
		for _, p := range s.probes {
			errs = append(errs, p.close())
		}
	}
	return errors.Join(errs...)
}

// probe reads the metrics of one host.
type probe interface {
	// read puts the values into the slice, grown as needed, in the order of names.
	read(values []int64) ([]int64, error)
	// names may grow from one read to the next.
	names() []string
	close() error
}

// sampler reads its probes round by round.
type sampler struct {
	sampling Sampling
	hosts    []string
	probes   []probe
	tracks   []*track
	values   [][]int64
	last     time.Duration // when the last round began
	err      error         // of run; read once it has ended
}

func newSampler(what string, every, byDefault time.Duration) *sampler {
	if every <= 0 {
		every = byDefault
	}
	return &sampler{sampling: Sampling{What: what, Interval: every}}
}

func (s *sampler) add(host string, open func() (probe, error)) error {
	for _, h := range s.hosts {
		if h == host {
			return fmt.Errorf("observe: host %s is twice in the %s", host, s.sampling.What)
		}
	}
	p, err := open()
	if err != nil {
		return fmt.Errorf("observe: %s: %w", s.sampling.What, err)
	}
	s.hosts = append(s.hosts, host)
	s.probes = append(s.probes, p)
	s.tracks = append(s.tracks, &track{})
	s.values = append(s.values, nil)
	return nil
}

// round samples every probe. The time of a sample is taken before it is read,
// and a round that fails leaves no sample.
func (s *sampler) round(start time.Time) error {
	began := time.Since(start)
	at := make([]time.Duration, len(s.probes))
	for i, p := range s.probes {
		at[i] = time.Since(start)
		var err error
		if s.values[i], err = p.read(s.values[i]); err != nil {
			return fmt.Errorf("observe: %s: %w", s.sampling.What, err)
		}
	}
	for i, tr := range s.tracks {
		tr.record(at[i], s.values[i])
	}
	if s.sampling.Rounds > 0 {
		s.sampling.LongestGap = max(s.sampling.LongestGap, began-s.last)
	}
	s.last = began
	s.sampling.Rounds++
	s.sampling.Busy += time.Since(start) - began
	return nil
}

// run takes a round at every multiple of the interval. One that is late by an
// interval or more is taken at once, and those that were due meanwhile are
// missed: samples are never caught up, since each must tell of its own time.
func (s *sampler) run(ctx context.Context, start time.Time) error {
	if len(s.probes) == 0 {
		return nil
	}
	interval := s.sampling.Interval
	timer := time.NewTimer(0)
	defer timer.Stop()
	for due := s.last + interval; ; due += interval {
		timer.Reset(due - time.Since(start))
		select {
		case <-ctx.Done():
		case <-timer.C:
		}
		missed := max(0, (time.Since(start)-due)/interval)
		s.sampling.Missed += int(missed)
		due += missed * interval
		if ctx.Err() != nil { // and not only where the select chose it
			return nil
		}
		if err := s.round(start); err != nil {
			return err
		}
	}
}

// group hands over the data once sampling has ended.
func (s *sampler) group() *group {
	g := &group{sampling: s.sampling, ids: map[string]int{}, tracks: map[string]*track{}}
	for i, host := range s.hosts {
		if names := s.probes[i].names(); len(names) > len(g.names) {
			g.names = names
		}
		g.tracks[host] = s.tracks[i]
	}
	for id, name := range g.names {
		g.ids[name] = id
	}
	return g
}
