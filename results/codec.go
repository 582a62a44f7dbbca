package results

import (
	"bytes"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"maps"
	"os"
	"regexp"
	"slices"
)

// MaxSize is the most bytes that [Read] takes for a record, so that a wrong file
// is refused before it fills the memory.
const MaxSize = 16 << 20

// ErrSchema says that a document is a record of another version, or none.
var ErrSchema = errors.New("unknown schema")

// Write writes rec as one indented JSON document. It refuses a record that [Read]
// would refuse, such as one with a variant that was never judged. Lists and maps
// that the schema requires are written empty rather than null.
func Write(w io.Writer, rec *Record) error {
	data, err := encode(rec)
	if err != nil {
		return err
	}
	if _, err := w.Write(data); err != nil {
		return fmt.Errorf("writing the record: %w", err)
	}
	return nil
}

func encode(rec *Record) ([]byte, error) {
	filled := filled(rec)
	if err := filled.check(); err != nil {
		return nil, fmt.Errorf("encoding the record: %w", err)
	}
	var b bytes.Buffer
	enc := json.NewEncoder(&b)
	enc.SetEscapeHTML(false) // a formula keeps its < and >
	enc.SetIndent("", "  ")
	if err := enc.Encode(filled); err != nil {
		return nil, fmt.Errorf("encoding the record: %w", err)
	}
	return b.Bytes(), nil
}

// Read reads one record. It is strict: a document of another schema gives
// [ErrSchema], and unknown fields, a variant without a reason for not holding,
// trailing data or more than [MaxSize] bytes are errors too.
func Read(r io.Reader) (*Record, error) {
	data, err := io.ReadAll(io.LimitReader(r, MaxSize+1))
	if err != nil {
		return nil, fmt.Errorf("reading the record: %w", err)
	}
	if len(data) > MaxSize {
		return nil, fmt.Errorf("reading the record: longer than %d bytes", MaxSize)
	}

	// The schema first: a record of another version is told by that, not by the
	// first field that happens to be unknown.
	var version struct {
		Schema string `json:"schema"`
	}
	if err := json.Unmarshal(data, &version); err != nil {
		return nil, fmt.Errorf("reading the record: %w", err)
	}
	if version.Schema != Schema {
		return nil, fmt.Errorf("reading the record: %w %q, want %q", ErrSchema, version.Schema, Schema)
	}

	dec := json.NewDecoder(bytes.NewReader(data))
	dec.DisallowUnknownFields()
	var rec Record
	if err := dec.Decode(&rec); err != nil {
		return nil, fmt.Errorf("reading the record: %w", err)
	}
	full := filled(&rec)
	if err := full.check(); err != nil {
		return nil, fmt.Errorf("reading the record: %w", err)
	}
	return full, nil
}

// Load reads the record in the file at path.
func Load(path string) (*Record, error) {
	f, err := os.Open(path)
	if err != nil {
		return nil, fmt.Errorf("loading a record: %w", err)
	}
	defer func() { _ = f.Close() }() // opened for reading: nothing to lose
	rec, err := Read(f)
	if err != nil {
		return nil, fmt.Errorf("loading %s: %w", path, err)
	}
	return rec, nil
}

// filled is a copy of rec in which no list or map that the schema requires is
// nil, and the time is in UTC.
func filled(rec *Record) *Record {
	r := *rec
	r.Started = r.Started.UTC()
	r.Parameters = orEmptyMap(r.Parameters)
	r.Variants = orEmptyList(slices.Clone(r.Variants))
	for i := range r.Variants {
		v := &r.Variants[i]
		v.Metrics = orEmptyMap(v.Metrics)
		v.Warnings = orEmptyList(v.Warnings)
		v.Predictions = orEmptyList(slices.Clone(v.Predictions))
		for j := range v.Predictions {
			v.Predictions[j].Inputs = orEmptyMap(v.Predictions[j].Inputs)
		}
		v.Series = slices.Clone(v.Series)
		for j := range v.Series {
			v.Series[j].Points = orEmptyList(v.Series[j].Points)
		}
	}
	return &r
}

func orEmptyList[T any](list []T) []T {
	if list == nil {
		return []T{}
	}
	return list
}

func orEmptyMap[V any](m map[string]V) map[string]V {
	if m == nil {
		return map[string]V{}
	}
	return m
}

// incidentName is what may become part of a file name.
var incidentName = regexp.MustCompile(`^[a-z0-9][a-z0-9-]{0,63}$`)

// check says what makes r no record.
func (r *Record) check() error {
	if r.Schema != Schema {
		return fmt.Errorf("%w %q, want %q", ErrSchema, r.Schema, Schema)
	}
	if !incidentName.MatchString(r.Incident) {
		return fmt.Errorf("incident %q is not a name of lower-case letters, digits and hyphens", r.Incident)
	}
	if year := r.Started.Year(); year < 0 || year > 9999 {
		return fmt.Errorf("started in the year %d, which RFC 3339 cannot say", year)
	}
	names := make(map[string]bool)
	for i := range r.Variants {
		v := &r.Variants[i]
		if names[v.Name] {
			return fmt.Errorf("variant %q appears twice", v.Name)
		}
		names[v.Name] = true
		if err := v.check(); err != nil {
			return fmt.Errorf("variant %q: %w", v.Name, err)
		}
	}
	return nil
}

func (v *Variant) check() error {
	if v.Name == "" {
		return errors.New("it has no name")
	}
	if !slices.Contains([]Role{Incident, FalseLead, Fix, Control}, v.Role) {
		return fmt.Errorf("unknown role %q", v.Role)
	}
	if err := v.Verdict.check(); err != nil {
		return err
	}
	if v.Verdict != Held && v.Reason == "" {
		return fmt.Errorf("%s without a reason", v.Verdict)
	}
	if v.Verdict == Held && (len(v.Predictions) == 0 || len(v.Voids) > 0) {
		return errors.New("held, though nothing was predicted or the run was void")
	}
	for _, p := range v.Predictions {
		if err := p.check(v.Verdict); err != nil {
			return fmt.Errorf("prediction of %q: %w", p.Metric, err)
		}
	}
	for _, name := range slices.Sorted(maps.Keys(v.Metrics)) {
		if value := v.Metrics[name].Value; !isFinite(value) {
			return fmt.Errorf("metric %q is %v", name, value)
		}
	}
	for _, s := range v.Series {
		if len(s.Points) > MaxPoints {
			return fmt.Errorf("series %q has %d points, more than %d", s.Name, len(s.Points), MaxPoints)
		}
	}
	return nil
}

// check also looks at what the variant came to: nothing but held predictions
// make a held variant.
func (p *Prediction) check(variant Verdict) error {
	if err := p.Verdict.check(); err != nil {
		return err
	}
	if variant == Held && p.Verdict != Held {
		return fmt.Errorf("%s in a variant that held", p.Verdict)
	}
	if (p.Verdict == Held || p.Verdict == Refuted) && p.Measured == nil {
		return fmt.Errorf("%s without a measurement", p.Verdict)
	}
	if !isFinite(p.Predicted) {
		return fmt.Errorf("predicted %v", p.Predicted)
	}
	for _, name := range slices.Sorted(maps.Keys(p.Inputs)) {
		if !isFinite(p.Inputs[name]) {
			return fmt.Errorf("input %s is %v", name, p.Inputs[name])
		}
	}
	return p.Tolerance.check(p.Predicted)
}

func (v Verdict) check() error {
	if v == "" {
		return errors.New("not judged")
	}
	if !slices.Contains(verdicts, v) {
		return fmt.Errorf("unknown verdict %q", v)
	}
	return nil
}
