package scenarios

import (
	"cmp"
	"context"
	"errors"
	"flag"
	"fmt"
	"io"
	"slices"
	"strings"
	"sync"
	"time"

	"connlab/netlab"
	"connlab/netlab/observe"
	"connlab/results"
)

// Scenario is one incident: what happened, and the arms of the experiment that
// reproduces it.
type Scenario struct {
	Name  string // as the command line takes it
	Title string
	// Story is what happened and why, in a few paragraphs for people.
	Story    string
	Variants []Variant
	// Beside is how many light variants are run side by side at most; 0 is all.
	Beside int
	// New returns the scenario at its defaults, which are the article's numbers.
	New func() Experiment
}

// Variant is one arm: the scenario's defaults with some parameters set.
type Variant struct {
	Name    string
	Role    results.Role
	Summary string // one line: what is different, and what it shows
	Set     []string
	// Full says that it is another variant at the article's full size, for which a run
	// must ask: by name or with [Options.Full].
	Full bool
	// Light says that it waits far more than it computes: a run has all such variants
	// side by side, each in namespaces of its own, unless Options.Set changes what they do.
	// Measurements of this process are not to be had of them.
	Light bool
	// Long says that a light variant takes much longer than the others: it runs beside all of them.
	Long bool
}

// Experiment is a scenario's parameters and what is done with them. A run calls
// its methods in this order, each once.
type Experiment interface {
	// Flags registers every parameter; the value that a flag has at this time
	// is its default.
	Flags(fs *flag.FlagSet)
	// Check says which parameters are out of range or contradict each other.
	Check() error
	// Predict returns the claims, from the parameters and the kernel's rules
	// alone: nothing has been started yet.
	Predict(role results.Role, rules KernelRules) []results.Prediction
	// Topology is the network the experiment takes place in.
	Topology() netlab.Topology
	// Measure runs the experiment in a lab that stands, and fills metrics,
	// warnings, series and void conditions into v.
	Measure(ctx context.Context, lab *netlab.Lab, opt Options, v *results.Variant) error
}

// All lists every scenario, in the order of the articles.
var All = []*Scenario{&Backlog, &TupleCollision, &MixedPool, &TimeWaitBuckets, &UndersizedPool, &AcceptQueue, &Lookalikes}

// ErrUsage is wrapped by every error about what the caller asked for: an
// unknown incident, variant, parameter or server, or a value out of range.
var ErrUsage = errors.New("usage")

type usageError struct{ text string }

func (e usageError) Error() string        { return e.text }
func (e usageError) Is(target error) bool { return target == ErrUsage }

func usagef(format string, args ...any) error { return usageError{fmt.Sprintf(format, args...)} }

// Find returns the scenario of that name.
func Find(name string) (*Scenario, error) {
	names := make([]string, len(All))
	for i, s := range All {
		if s.Name == name {
			return s, nil
		}
		names[i] = s.Name
	}
	return nil, usagef("unknown incident %q; there is: %s", name, strings.Join(names, ", "))
}

// Variant returns the variant of that name.
func (s *Scenario) Variant(name string) (Variant, error) {
	names := make([]string, len(s.Variants))
	for i, v := range s.Variants {
		if v.Name == name {
			return v, nil
		}
		names[i] = v.Name
	}
	return Variant{}, usagef("incident %s has no variant %q; there is: %s", s.Name, name, strings.Join(names, ", "))
}

// Options is how a scenario is run, as opposed to what it runs.
type Options struct {
	// Variants names the arms to run; empty means all but those of full size.
	Variants []string
	// Full runs the arms of full size instead, where Variants names none.
	Full bool
	// Set overrides parameters of every arm, as "name=value". It wins over what
	// a variant sets.
	Set []string
	// Server is the server under test: [ServerMini] or [ServerRedis].
	Server string
	// Progress is told what is going on, a line at a time; nil is silent.
	Progress func(line string)
	// Log gets the output of the programs under test, from several goroutines;
	// nil discards it.
	Log io.Writer

	// Timeline, if set, is given the timeline of each arm, as CSV: seconds, host,
	// metric, value. It is called when the arm's load is over.
	Timeline func(variant string, write func(io.Writer) error) error
	// Capture, if set, is given the packets of each arm that captures some, as a
	// pcapng file.
	Capture func(variant string, file []byte) error
	// Counters, if set, is given what a person would have saved on the hosts that one
	// would look at, before and after each arm's load, in the form that package diagnose
	// reads. An arm without such a host, or without a load, has none to give.
	Counters func(variant, host string, before, after []byte) error
	// Standing, if set, is given the lab of each arm when it stands; what it returns is
	// called before that lab goes down. Arms that run side by side call it at the same
	// time, and one that is tried again calls it again.
	Standing func(variant string, lab *netlab.Lab) (down func())

	server program // found once, before anything is started
	shared bool    // other variants are run beside this one, in this process
	others *member // those, to wait for
}

func (o Options) progress(format string, args ...any) {
	if o.Progress != nil {
		o.Progress(fmt.Sprintf(format, args...))
	}
}

// oneAtATime makes what arms tell arrive one at a time: arms can run side by side.
func (o Options) oneAtATime() Options {
	var mu sync.Mutex
	progress, timeline, capture, counters := o.Progress, o.Timeline, o.Capture, o.Counters
	if progress != nil {
		o.Progress = func(line string) {
			mu.Lock()
			defer mu.Unlock()
			progress(line)
		}
	}
	if timeline != nil {
		o.Timeline = func(variant string, write func(io.Writer) error) error {
			mu.Lock()
			defer mu.Unlock()
			return timeline(variant, write)
		}
	}
	if capture != nil {
		o.Capture = func(variant string, file []byte) error {
			mu.Lock()
			defer mu.Unlock()
			return capture(variant, file)
		}
	}
	if counters != nil {
		o.Counters = func(variant, host string, before, after []byte) error {
			mu.Lock()
			defer mu.Unlock()
			return counters(variant, host, before, after)
		}
	}
	return o
}

// giveTimeline hands an arm's timeline to who wants it.
func (o Options) giveTimeline(variant string, t *observe.Timeline) error {
	if o.Timeline == nil {
		return nil
	}
	return o.Timeline(variant, t.WriteCSV)
}

// Run runs the arms of a scenario, the light ones side by side and the others one after
// the other, and judges them. Before
// anything is started it fails with ErrUsage if a name or value is wrong, and
// with a [*netlab.NeedError] if the privilege or the server is missing. Where the
// kernel lacks what an arm needs, the arm is skipped with the reason. A run that breaks makes its arm void. Only when ctx ends early does Run
// return both the record so far and an error.
func Run(ctx context.Context, s *Scenario, opt Options) (*results.Record, error) {
	arms, err := s.prepare(opt)
	if err != nil {
		return nil, err
	}
	if opt.server, err = findServer(opt.Server); err != nil {
		return nil, err
	}
	if err := netlab.CheckPrivilege(); err != nil {
		return nil, err
	}
	rec, err := results.New(s.Name)
	if err != nil {
		return nil, err
	}
	rec.Server = opt.server.version()
	rec.Parameters = arms[0].defaults
	rules := ReadKernelRules()
	opt = opt.oneAtATime()
	ran := make([]*results.Variant, len(arms))
	run := func(i int, others *member) {
		arm, armOpt := arms[i], opt
		armOpt.shared, armOpt.others = others != nil, others
		defer others.here()
		name := fmt.Sprintf("%s %d/%d %s", s.Name, i+1, len(arms), arm.variant.Name)
		armOpt.Progress = func(line string) { opt.progress("%s: %s", name, line) }
		began := time.Now()
		v := arm.runUntilTold(ctx, rules, armOpt)
		ran[i] = &v
		opt.progress("%s: %s in %.1f s", name, v.Verdict, time.Since(began).Seconds())
	}
	light := func(a arm) bool { return a.variant.Light && len(opt.Set) == 0 }
	var lights []int
	var long sync.WaitGroup
	for i, arm := range arms {
		switch {
		case light(arm) && arm.variant.Long:
			alone := newGathering(1)
			long.Go(func() { run(i, alone.member()) })
		case light(arm):
			lights = append(lights, i)
		}
	}
	if len(lights) > 0 {
		for some := range slices.Chunk(lights, cmp.Or(s.Beside, len(lights))) {
			gather := newGathering(len(some))
			var together sync.WaitGroup
			for _, i := range some {
				together.Go(func() { run(i, gather.member()) })
			}
			together.Wait()
		}
	}
	long.Wait()
	for i, arm := range arms {
		if !light(arm) && ctx.Err() == nil {
			run(i, nil)
		}
	}
	for _, v := range ran {
		if v != nil {
			rec.Variants = append(rec.Variants, *v)
		}
	}
	rec.Seconds = time.Since(rec.Started).Seconds()
	return rec, context.Cause(ctx)
}

// arm is a variant with its parameters filled in.
type arm struct {
	variant    Variant
	experiment Experiment
	defaults   map[string]string // of the scenario, with Options.Set
	differs    map[string]string // where this arm differs from them
	overridden []string          // settings of the variant that Options.Set replaced
}

func (s *Scenario) prepare(opt Options) ([]arm, error) {
	var chosen []Variant
	for _, v := range s.Variants {
		if len(opt.Variants) == 0 && v.Full == opt.Full {
			chosen = append(chosen, v)
		}
	}
	if opt.Full && len(opt.Variants) == 0 && len(chosen) == 0 {
		return nil, usagef("incident %s has no variants that only a full run has: all of its variants are run without --full", s.Name)
	}
	if len(opt.Variants) > 0 {
		for _, name := range opt.Variants {
			v, err := s.Variant(name)
			if err != nil {
				return nil, err
			}
			chosen = append(chosen, v)
		}
	}
	base := s.New()
	if err := apply(base, opt.Set); err != nil {
		return nil, err
	}
	defaults := spell(base)
	var arms []arm
	for _, v := range chosen {
		a := arm{variant: v, experiment: s.New(), defaults: defaults, differs: map[string]string{}}
		if err := apply(a.experiment, append(slices.Clone(v.Set), opt.Set...)); err != nil {
			return nil, err
		}
		if err := a.experiment.Check(); err != nil {
			hint := ""
			if len(v.Set) > 0 && len(opt.Set) > 0 {
				hint = fmt.Sprintf(" (this variant sets %s; choose variants with --variant)", strings.Join(v.Set, " "))
			}
			return nil, usagef("variant %s: %s%s", v.Name, strings.ReplaceAll(err.Error(), "\n", "; "), hint)
		}
		values := spell(a.experiment)
		if name, list, is := strings.Cut(values["sweep"], "="); is && sets(opt.Set, name) {
			return nil, usagef("--set %s=… has no effect in variant %s, which has a leg for each of %s=%s: set sweep=%s=… instead, or choose variants with --variant", name, v.Name, name, list, name)
		}
		for name, value := range values {
			if value != defaults[name] {
				a.differs[name] = value
			}
		}
		for _, set := range v.Set {
			name, _, _ := strings.Cut(set, "=")
			if sets(opt.Set, name) {
				a.overridden = append(a.overridden, set)
			}
		}
		arms = append(arms, a)
	}
	return arms, nil
}

// sets says that one of the settings is for a parameter.
func sets(settings []string, name string) bool {
	return slices.ContainsFunc(settings, func(s string) bool { return strings.HasPrefix(s, name+"=") })
}

// flags returns the parameters of e as a flag set, bound to e.
func flags(e Experiment) *flag.FlagSet {
	fs := flag.NewFlagSet("", flag.ContinueOnError)
	fs.SetOutput(io.Discard)
	e.Flags(fs)
	return fs
}

func apply(e Experiment, settings []string) error {
	fs := flags(e)
	for _, set := range settings {
		name, value, ok := strings.Cut(set, "=")
		if !ok {
			return usagef("--set %s: want name=value", set)
		}
		if fs.Lookup(name) == nil {
			var names []string
			fs.VisitAll(func(f *flag.Flag) { names = append(names, f.Name) })
			return usagef("--set %s: unknown parameter %q; there is: %s", set, name, strings.Join(names, ", "))
		}
		if err := fs.Set(name, value); err != nil {
			return usagef("--set %s: %s", set, wanted(fs.Lookup(name), err))
		}
	}
	return nil
}

// wanted says what a parameter takes; package flag only says "parse error".
func wanted(f *flag.Flag, err error) string {
	if getter, ok := f.Value.(flag.Getter); ok {
		switch getter.Get().(type) {
		case int:
			return "want a whole number"
		case float64:
			return "want a number"
		case bool:
			return "want true or false"
		case time.Duration:
			return "want a time with its unit, such as 500ms or 3s"
		}
	}
	return err.Error()
}

// spell returns every parameter as it would be typed.
func spell(e Experiment) map[string]string {
	values := map[string]string{}
	flags(e).VisitAll(func(f *flag.Flag) { values[f.Name] = f.Value.String() })
	return values
}

// Parameters returns the scenario's parameters with their defaults and help.
func (s *Scenario) Parameters() []*flag.Flag {
	var all []*flag.Flag
	flags(s.New()).VisitAll(func(f *flag.Flag) { all = append(all, f) })
	return all
}

// tries is how often an arm is run whose run says nothing, because the machine
// was too busy for the experiment that was asked for.
const tries = 4

// runUntilTold runs an arm, and again if it was void, once the machine is quiet. A
// refuted arm is never run again, and the record says how often was tried and why.
func (a arm) runUntilTold(ctx context.Context, rules KernelRules, opt Options) results.Variant {
	var voids []string
	for try := 1; ; try++ {
		v, err := a.run(ctx, rules, opt)
		opt.others.here() // ready or not
		if v.Verdict != results.Void || err != nil || ctx.Err() != nil || try == tries {
			v.Warnings = append(v.Warnings, voids...)
			return v
		}
		opt.progress("void, once more when the machine is quiet: %s", v.Reason)
		told := fmt.Sprintf("try %d was void: %s", try, v.Reason)
		if !awaitQuiet(ctx) {
			told += fmt.Sprintf("; the machine was not quiet within %v after it", quietWithin)
		}
		if ctx.Err() != nil {
			return v
		}
		voids = append(voids, told)
	}
}

// What counts as quiet: for quietFor no sleep of a millisecond took much longer. A machine
// that is never quiet is not waited for any longer than quietWithin.
const (
	quietFor    = 2 * time.Second
	quietWithin = 30 * time.Second
	quietPause  = 8 * time.Millisecond // two ticks of a 250 Hz kernel
)

// awaitQuiet waits until the machine is quiet, and says whether it is: a virtual machine's
// host, or a build beside the run, makes it busy for seconds or minutes.
func awaitQuiet(ctx context.Context) bool {
	began := time.Now()
	for since := began; time.Since(since) < quietFor; {
		if time.Since(began) > quietWithin || ctx.Err() != nil {
			return false
		}
		asleep := time.Now()
		time.Sleep(time.Millisecond)
		if time.Since(asleep) > quietPause {
			since = time.Now()
		}
	}
	return true
}

// run takes one arm from prediction to verdict. An error is no condition of the
// machine: trying again is of no use.
func (a arm) run(ctx context.Context, rules KernelRules, opt Options) (results.Variant, error) {
	v := results.Variant{
		Name:        a.variant.Name,
		Role:        a.variant.Role,
		Summary:     a.variant.Summary,
		Parameters:  a.differs,
		Predictions: a.experiment.Predict(a.variant.Role, rules),
		Metrics:     map[string]results.Metric{},
	}
	if len(a.overridden) > 0 {
		v.Warnings = append(v.Warnings, "set by hand, so no longer what the variant is about: "+strings.Join(a.overridden, ", "))
	}
	topology := a.experiment.Topology()
	opt.progress("starting %d hosts", len(topology.Hosts))
	lab, err := netlab.Up(ctx, topology)
	if err == nil {
		down := func() {}
		if opt.Standing != nil {
			down = opt.Standing(a.variant.Name, lab)
		}
		err = a.experiment.Measure(ctx, lab, opt, &v)
		down()
		err = errors.Join(err, lab.Down())
	}
	var need *netlab.NeedError
	switch {
	case errors.As(err, &need):
		v.Skip(need.Error())
	case ctx.Err() != nil:
		v.Void("interrupted")
	case err != nil:
		v.Void(err.Error())
	}
	v.Judge()
	return v, err
}
