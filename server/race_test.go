//go:build race

package server

// underRace says that the race detector is at work, whose memory is not the server's.
const underRace = true
