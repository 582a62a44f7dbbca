package scenarios

import (
	"errors"
	"fmt"
	"slices"
	"strings"
	"time"
)

// checks collects what is wrong with a scenario's parameters, a sentence each.
type checks []error

// bad adds a sentence, once: legs of one arm can have the same fault.
func (c *checks) bad(format string, args ...any) {
	err := fmt.Errorf(format, args...)
	if !slices.ContainsFunc(*c, func(known error) bool { return known.Error() == err.Error() }) {
		*c = append(*c, err)
	}
}

// within wants low ≤ value ≤ high, which NaN is not.
func (c *checks) within(name string, value, low, high float64) {
	if !(value >= low && value <= high) {
		c.bad("%s=%v is out of range: %v to %v", name, value, low, high)
	}
}

func (c *checks) lasting(name string, value, low, high time.Duration) {
	if value < low || value > high {
		c.bad("%s=%v is out of range: %v to %v", name, value, low, high)
	}
}

func (c *checks) among(name, value string, known ...string) {
	if !slices.Contains(known, value) {
		c.bad("%s=%s: there is: %s", name, value, strings.Join(known, ", "))
	}
}

func (c *checks) err() error { return errors.Join(*c...) }
