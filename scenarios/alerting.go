package scenarios

import (
	"bytes"
	"cmp"
	"context"
	"errors"
	"fmt"
	"io"
	"net/http"
	"net/url"
	"os/exec"
	"slices"
	"strconv"
	"strings"
	"text/template"
	"time"

	"connlab/netlab"
)

// Where the programs listen: on the loopback of the host's own namespace.
const (
	exporterPort        = 9100
	defaultExporterPort = 9101 // of the node_exporter with its default filter
	prometheusPort      = 9090
)

// evaluateEvery is how often Prometheus evaluates the rules.
const evaluateEvery = time.Second

// alertWithin is the longest that an alert on a counter's rate waits from the
// first count to its firing, if its rule has no `for` and one scrape came
// before the count: the next scrape sees it after one scrape interval at most,
// and the next evaluation comes one evaluation interval later. A scrape takes a
// few milliseconds more, and whatever pauses the machine adds its length.
func alertWithin(scrape time.Duration) time.Duration { return scrape + evaluateEvery }

// alerting is a real Prometheus and a real node_exporter on a host of a lab, in
// the host's namespace. Each scrape interval is a job of its own, with the
// interval as its name, and all of them scrape the one node_exporter.
//
// Their connections are the host's, too: one from each job to node_exporter,
// and one to Prometheus while it is asked. They last, and count as established.
type alerting struct {
	host       *netlab.Host
	exporter   *netlab.Process
	prometheus *netlab.Process
	intervals  []time.Duration
	started    time.Time
	client     *http.Client
}

// prometheusText is the configuration. That the rules are evaluated more often
// than anything is scraped keeps the evaluation out of the delay.
var prometheusText = template.Must(template.New("prometheus.yml").Parse(`global:
  evaluation_interval: {{.Evaluate.Milliseconds}}ms
rule_files: [/run/rules.yml]
scrape_configs:
{{range .Scrape}}  - job_name: {{.}}
    scrape_interval: {{.Milliseconds}}ms
    static_configs: [targets: ["127.0.0.1:{{$.Exporter}}"]]
{{end}}`))

func prometheusConfig(intervals []time.Duration) (string, error) {
	var b strings.Builder
	err := prometheusText.Execute(&b, map[string]any{"Evaluate": evaluateEvery, "Scrape": intervals, "Exporter": exporterPort})
	return b.String(), err
}

// startAlerting runs both programs on a host, with rules as the rules file, and
// returns when both answer. Nothing need have been scraped by then: see ready.
// Alerts must keep the label job, by which their scrape interval is known.
// What is not installed is a [*netlab.NeedError]; rules that Prometheus refuses
// are an error that quotes it.
func startAlerting(ctx context.Context, host *netlab.Host, rules []byte, intervals []time.Duration, log io.Writer) (*alerting, error) {
	path, err := lookMonitoring(netlab.NeedPrometheus, "prometheus")
	if err != nil {
		return nil, err
	}
	config, err := prometheusConfig(intervals)
	if err != nil {
		return nil, fmt.Errorf("configuration of prometheus: %w", err)
	}
	a := &alerting{
		host: host, intervals: intervals, started: time.Now(),
		client: &http.Client{Timeout: 10 * time.Second, Transport: &http.Transport{DialContext: host.DialContext}},
	}
	if a.exporter, err = startNodeExporter(ctx, host, exporterPort, log, "--collector.netstat.fields=.*"); err != nil {
		return nil, err
	}
	// Its database and both files are on a tmpfs that only it sees and that is gone
	// with it, however it ends. The shell becomes Prometheus, which does not fork.
	a.prometheus, err = host.Start(ctx, netlab.Program{
		Path: "/bin/sh", Dir: "/",
		Args: []string{"-c", `mount -t tmpfs -o size=64m connlab /run && printf %s "$1" >/run/prometheus.yml && cat >/run/rules.yml && exec "$0" ` +
			`--config.file=/run/prometheus.yml --storage.tsdb.path=/run/data --log.level=warn --web.listen-address="127.0.0.1:$2"`,
			path, config, strconv.Itoa(prometheusPort)},
		Stdin: bytes.NewReader(rules),
		Ready: func() error {
			if err := host.Listening(prometheusPort); err != nil {
				return err
			}
			_, err := a.get(ctx, prometheusPort, "/-/ready")
			return err
		},
		ReadyTimeout: 30 * time.Second,
		Stdout:       log, Stderr: log,
		PrivateMounts: true,
	})
	if err != nil {
		return nil, errors.Join(err, a.exporter.Stop(time.Second))
	}
	return a, nil
}

// lookMonitoring finds a program whose Debian package has its name.
func lookMonitoring(need netlab.Need, name string) (string, error) {
	path, err := netlab.LookProgram(name)
	if errors.Is(err, exec.ErrNotFound) {
		return "", &netlab.NeedError{Need: need, Err: errors.New("it is not installed; install it with: apt-get install " + name)}
	}
	return path, err
}

// startNodeExporter runs a node_exporter that has netstat and sockstat only.
func startNodeExporter(ctx context.Context, host *netlab.Host, port uint16, log io.Writer, more ...string) (*netlab.Process, error) {
	path, err := lookMonitoring(netlab.NeedNodeExporter, "prometheus-node-exporter")
	if err != nil {
		return nil, err
	}
	return host.Start(ctx, netlab.Program{
		Path: path, Dir: "/",
		Args: append([]string{
			"--collector.disable-defaults", "--collector.netstat", "--collector.sockstat", "--web.disable-exporter-metrics",
			fmt.Sprintf("--web.listen-address=127.0.0.1:%d", port), "--log.level=warn",
		}, more...),
		Ready:  func() error { return host.Listening(port) },
		Stdout: log, Stderr: log,
	})
}

// stop ends both programs and what they stored.
func (a *alerting) stop() error {
	a.client.CloseIdleConnections()
	const grace = 5 * time.Second
	return errors.Join(a.prometheus.Stop(grace), a.exporter.Stop(grace))
}

// ready returns when every job has scraped once: from then on the next scrape
// gives rate() a value. It takes five seconds or ten, for two tickers of five
// seconds stand before the targets (discovery/manager.go, sender, and
// scrape/manager.go, reloader), and up to the longest interval, over which
// Prometheus spreads the first scrapes.
func (a *alerting) ready(ctx context.Context) error {
	wait := slices.Max(a.intervals) + 30*time.Second
	return a.await(ctx, wait, func() error {
		all, err := a.query(ctx, "up", a.started)
		if err != nil {
			return err
		}
		up := map[string]bool{}
		for _, s := range all {
			up[s.Labels["job"]] = slices.ContainsFunc(s.Samples, func(s sample) bool { return s.Value == 1 })
		}
		for _, interval := range a.intervals {
			if !up[interval.String()] {
				return fmt.Errorf("no scrape of the job %v has succeeded", interval)
			}
		}
		return nil
	})
}

// firing is an alert that fired.
type firing struct {
	Rule     string
	Interval time.Duration // of the scrapes that it was judged by
	At       time.Time     // the time that the first such evaluation was for
}

// fired returns what fired since a moment, in order of time: each rule and
// interval once, when it was first firing since then. The zero time is the start.
func (a *alerting) fired(ctx context.Context, after time.Time) ([]firing, error) {
	// Prometheus keeps the state of alerts as a series with a sample of every
	// evaluation, so that one which has ended is there as well.
	all, err := a.query(ctx, `ALERTS{alertstate="firing"}`, after)
	if err != nil {
		return nil, err
	}
	return firings(all, a.intervals)
}

func firings(all []series, intervals []time.Duration) ([]firing, error) {
	var found []firing
	for _, s := range all {
		rule, job := s.Labels["alertname"], s.Labels["job"]
		i := slices.IndexFunc(intervals, func(d time.Duration) bool { return d.String() == job })
		if i < 0 {
			return nil, fmt.Errorf("the alert %s has the job %q, which is no scrape interval", rule, job)
		}
		found = append(found, firing{rule, intervals[i], s.Samples[0].At})
	}
	slices.SortFunc(found, func(a, b firing) int {
		return cmp.Or(a.At.Compare(b.At), cmp.Compare(a.Rule, b.Rule), cmp.Compare(a.Interval, b.Interval))
	})
	return found, nil
}

// awaitFired returns when a rule has fired for every interval since a moment,
// with those firings. If one has not within [alertWithin] and a pause, it returns
// those that have and an error.
func (a *alerting) awaitFired(ctx context.Context, rule string, after time.Time) (found []firing, err error) {
	const pause = 10 * time.Second
	wait := time.Until(after) + alertWithin(slices.Max(a.intervals)) + pause
	err = a.await(ctx, wait, func() error {
		all, err := a.fired(ctx, after)
		if err != nil {
			return err
		}
		found = slices.DeleteFunc(all, func(f firing) bool { return f.Rule != rule })
		if len(found) < len(a.intervals) {
			return fmt.Errorf("%s has fired for %d of the scrape intervals %v: %v", rule, len(found), a.intervals, found)
		}
		return nil
	})
	return found, err
}

// value returns a metric as Prometheus has it from the first scrape that began
// after a moment, which it waits for.
func (a *alerting) value(ctx context.Context, metric string, interval time.Duration, after time.Time) (v float64, err error) {
	wait := time.Until(after) + interval + 10*time.Second
	err = a.await(ctx, wait, func() error {
		all, err := a.query(ctx, fmt.Sprintf("%s{job=%q}", metric, interval), after)
		switch {
		case err != nil:
			return err
		case len(all) == 0:
			return fmt.Errorf("prometheus has no %s of the job %v scraped after %v", metric, interval, after)
		case len(all) > 1:
			return fmt.Errorf("prometheus has %d series of %s in the job %v", len(all), metric, interval)
		}
		v = all[0].Samples[0].Value
		return nil
	})
	return v, err
}

// leftOut names the metrics that node_exporter with its default filter does not
// have, of those that it has without one, sorted.
func (a *alerting) leftOut(ctx context.Context) (names []string, err error) {
	byDefault, err := startNodeExporter(ctx, a.host, defaultExporterPort, nil)
	if err != nil {
		return nil, err
	}
	defer func() { err = errors.Join(err, byDefault.Stop(time.Second)) }()
	all, err := a.exported(ctx, exporterPort)
	if err != nil {
		return nil, err
	}
	some, err := a.exported(ctx, defaultExporterPort)
	if err != nil {
		return nil, err
	}
	names = slices.DeleteFunc(all, func(name string) bool { return slices.Contains(some, name) })
	slices.Sort(names)
	return names, nil
}

// exported names the metrics that a node_exporter has.
func (a *alerting) exported(ctx context.Context, port uint16) ([]string, error) {
	page, err := a.get(ctx, port, "/metrics")
	return metricNames(page), err
}

// await asks until done returns nil; at the deadline the error is its last one.
func (a *alerting) await(ctx context.Context, wait time.Duration, done func() error) error {
	for deadline := time.Now().Add(wait); ; {
		last := done()
		if last == nil {
			return nil
		}
		select {
		case <-a.prometheus.Done():
			return fmt.Errorf("host %s: prometheus has ended: %w: %s", a.host.Name(), last, a.prometheus.Output())
		default:
		}
		if time.Now().After(deadline) {
			return fmt.Errorf("host %s: waited %v: %w", a.host.Name(), wait.Round(time.Second), last)
		}
		if err := sleep(ctx, 100*time.Millisecond); err != nil {
			return errors.Join(err, last)
		}
	}
}

// query returns the stored samples of a selector since a moment; a series that has
// none is not there.
func (a *alerting) query(ctx context.Context, selector string, since time.Time) ([]series, error) {
	if since.Before(a.started) {
		since = a.started
	}
	// A range reaches back from now. What it has of before is cut off below.
	span := time.Since(since) + time.Second
	q := url.Values{"query": {fmt.Sprintf("%s[%dms]", selector, span.Milliseconds())}}
	answer, err := a.get(ctx, prometheusPort, "/api/v1/query?"+q.Encode())
	if err != nil {
		return nil, err
	}
	all, err := parseMatrix(answer)
	if err != nil {
		return nil, fmt.Errorf("host %s: prometheus: %s: %w", a.host.Name(), selector, err)
	}
	return cut(all, since), nil
}

// get fetches a page from a program on the host.
func (a *alerting) get(ctx context.Context, port uint16, path string) ([]byte, error) {
	req, err := http.NewRequestWithContext(ctx, http.MethodGet, fmt.Sprintf("http://127.0.0.1:%d%s", port, path), nil)
	if err != nil {
		return nil, err
	}
	answer, err := a.client.Do(req)
	if err != nil {
		return nil, fmt.Errorf("host %s: %w", a.host.Name(), err)
	}
	defer answer.Body.Close()
	body, err := io.ReadAll(answer.Body)
	if err != nil {
		return nil, fmt.Errorf("host %s: port %d: %s: %w", a.host.Name(), port, path, err)
	}
	if answer.StatusCode != http.StatusOK {
		return nil, fmt.Errorf("host %s: port %d: %s: %s: %s", a.host.Name(), port, path, answer.Status, bytes.TrimSpace(body))
	}
	return body, nil
}
