// Package monitoring has the alert rules of this folder, for programs that run
// a Prometheus of their own. README.md says how to deploy them. It evaluates
// nothing itself: the rules rest on the metric names of node_exporter 1.5.
package monitoring

import _ "embed" // for Rules

// Rules is connlab.rules.yml, a rules file of Prometheus.
//
//go:embed connlab.rules.yml
var Rules []byte
