//go:build race

package scenarios

// underRace says that the race detector is at work: stages and detectors take
// several times as long, and full size would be too much for a machine.
const underRace = true
