package scenarios

import (
	"encoding/json"
	"errors"
	"fmt"
	"math"
	"slices"
	"strconv"
	"strings"
	"time"
)

// series are the samples of one metric with one set of labels, oldest first.
type series struct {
	Labels  map[string]string
	Samples []sample
}

// sample is a value and the time that Prometheus has stored with it, which for a
// scraped one is when the scrape began, in milliseconds, or up to 2 ms earlier
// (scrape/scrape.go, ScrapeTimestampTolerance).
type sample struct {
	At    time.Time
	Value float64
}

// parseMatrix reads an answer of Prometheus's HTTP API to a query whose result is
// a range vector: {"status":"success","data":{"resultType":"matrix","result":
// [{"metric":{…},"values":[[seconds,"value"],…]},…]}}. No series has no samples.
func parseMatrix(answer []byte) ([]series, error) {
	var a struct {
		Status string `json:"status"`
		Error  string `json:"error"`
		Data   struct {
			ResultType string          `json:"resultType"`
			Result     json.RawMessage `json:"result"`
		} `json:"data"`
	}
	if err := json.Unmarshal(answer, &a); err != nil {
		return nil, fmt.Errorf("answer: %w", err)
	}
	if a.Status != "success" {
		return nil, fmt.Errorf("status %q: %s", a.Status, a.Error)
	}
	if a.Data.ResultType != "matrix" {
		return nil, fmt.Errorf("answer of type %q, not matrix", a.Data.ResultType)
	}
	var result []struct {
		Metric map[string]string `json:"metric"`
		Values []matrixSample    `json:"values"`
	}
	if err := json.Unmarshal(a.Data.Result, &result); err != nil {
		return nil, fmt.Errorf("result: %w", err)
	}
	var all []series
	for _, r := range result {
		if len(r.Values) == 0 {
			return nil, fmt.Errorf("no values of %v", r.Metric)
		}
		s := series{Labels: r.Metric}
		for _, v := range r.Values {
			s.Samples = append(s.Samples, sample(v))
		}
		all = append(all, s)
	}
	return all, nil
}

// matrixSample is a sample as JSON has it: [seconds, "value"].
type matrixSample sample

// UnmarshalJSON implements [json.Unmarshaler].
func (s *matrixSample) UnmarshalJSON(text []byte) error {
	var pair []json.RawMessage
	if err := json.Unmarshal(text, &pair); err != nil {
		return err
	}
	if len(pair) != 2 {
		return fmt.Errorf("a sample of %d parts", len(pair))
	}
	var seconds float64
	var value string
	if err := errors.Join(json.Unmarshal(pair[0], &seconds), json.Unmarshal(pair[1], &value)); err != nil {
		return err
	}
	v, err := strconv.ParseFloat(value, 64)
	if err != nil {
		return err
	}
	*s = matrixSample{At: time.UnixMilli(int64(math.Round(seconds * 1e3))), Value: v}
	return nil
}

// cut leaves the samples that are not from before a moment, and the series that
// have one.
func cut(all []series, since time.Time) []series {
	for i := range all {
		all[i].Samples = slices.DeleteFunc(all[i].Samples, func(s sample) bool { return s.At.Before(since) })
	}
	return slices.DeleteFunc(all, func(s series) bool { return len(s.Samples) == 0 })
}

// metricNames are the names in a page of the Prometheus text format, each once.
func metricNames(page []byte) []string {
	var names []string
	for line := range strings.Lines(string(page)) {
		if name := strings.TrimSpace(line[:strings.IndexAny(line+" ", "{ \t")]); name != "" && name[0] != '#' {
			names = append(names, name)
		}
	}
	slices.Sort(names)
	return slices.Compact(names)
}
