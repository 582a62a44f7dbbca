// Package resp reads and writes RESP, the Redis serialization protocol, in versions 2 and 3
// (https://redis.io/docs/latest/develop/reference/protocol-spec/), over byte slices.
//
// A [Parser] takes requests (arrays of bulk strings, or inline commands) out of a buffer for an event
// loop: it says how many bytes it used, and 0 while the request is not complete. It keeps its place
// between calls, so that a request which arrives in many pieces is looked at once and not once per piece.
// [Decode] takes one reply out of a buffer. The Append functions write replies, in the form of the
// protocol version that the client asked for.
//
// The package does no input or output, keeps no time and starts no goroutine. It never allocates for what a
// peer only announces: memory follows the bytes that came. It does not read streamed strings and
// aggregates ("$?", "*?"), which no Redis server sends.
package resp
