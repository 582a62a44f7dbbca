// Package scenarios holds the incidents: one file each with its parameters,
// variants, predictions and measurement, and the one way that all of them run.
//
// [Run] takes a scenario through every variant: parameters, predictions,
// topology, [netlab.Up], programs, observation, load, metrics, verdict. A
// [Scenario] is a value in the list [All]; its [Experiment] is a struct of typed
// parameters whose defaults are the article's numbers.
//
// Predictions are made before anything is started, from the parameters and the
// [KernelRules] alone. A run that was not the experiment that was asked for is
// void and is repeated a few times; a refuted one is not.
//
// What it refuses to do: read the measurement before the prediction, widen a
// tolerance for a busy machine, or count what it did not measure as zero.
//
// How to add an incident is in docs/adding-an-incident.md.
//
// # Alternatives considered
//
// Scenarios in YAML: a file can hold numbers, but an incident is a sequence of
// actions and a formula; the numbers are set with name=value. A registry filled
// by init functions: the list All says the same and can be read.
package scenarios
