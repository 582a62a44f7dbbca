package resp

import (
	"bytes"
	"fmt"
	"math"
	"unsafe"
)

// ProtocolError is a violation of the protocol by the peer. After one, the position in the stream is lost and
// the connection can only be closed.
type ProtocolError string

// Error returns the text that Redis sends to a client in the same case, without the leading "ERR ".
func (e ProtocolError) Error() string { return "Protocol error: " + string(e) }

// Limits bounds what one request may ask for. The names of the Redis settings or constants with the same
// meaning are in parentheses.
type Limits struct {
	MaxBulk   int // bytes in one argument (proto-max-bulk-len)
	MaxArgs   int // arguments of one request (1024*1024 up to Redis 6.2, INT_MAX since)
	MaxInline int // bytes in an inline request or in a header line (PROTO_INLINE_MAX_SIZE)

	// Unauthenticated narrows the limits to 10 arguments of 16 KiB each, which is what Redis grants a client that
	// still has to give a password (networking.c, processMultibulkBuffer).
	Unauthenticated bool
}

// Limits of a client that has not given its password.
const (
	unauthenticatedArgs = 10
	unauthenticatedBulk = 16 * 1024
)

// DefaultLimits returns the limits of a Redis server with an untouched configuration.
func DefaultLimits() Limits {
	return Limits{MaxBulk: 512 << 20, MaxArgs: 1 << 20, MaxInline: 64 << 10}
}

// Parser takes the requests of one client out of a buffer. The zero value is ready for use. It holds the place
// that it has reached within an incomplete request, as offsets, so the caller may move the bytes meanwhile. Between
// requests it keeps its slices, and with them the buffer that the last arguments point into, until [Parser.Release].
type Parser struct {
	pos     int // next byte to look at
	scanned int // bytes behind pos already known to hold no line end
	left    int // arguments still to come, 0 between requests
	bulk    int // length of the argument at pos, meaningful if inBulk
	inBulk  bool
	spans   []span
	args    [][]byte
}

type span struct{ start, end int }

// Next returns the first request in buf and the number of bytes that it takes up. With n == 0 and err == nil the
// request is incomplete: call again with the same bytes and more behind them. The arguments point into buf
// (those of an inline command that were quoted do not) and the slice holds until the next call. A request without
// arguments, as an empty line, has n > 0 and no args; Redis ignores it. An err is a [ProtocolError].
//
// As Redis does, Next trusts that the two bytes behind an argument are CR LF.
func (p *Parser) Next(buf []byte, lim Limits) (n int, args [][]byte, err error) {
	if p.left == 0 {
		if len(buf) == 0 {
			return 0, nil, nil
		}
		if buf[0] != '*' {
			return p.inline(buf, lim)
		}
		line, ok, err := p.line(buf, lim, "too big mbulk count string")
		if !ok {
			return 0, nil, err
		}
		count, ok := ParseInt(line[1:])
		switch {
		case !ok || count > int64(lim.MaxArgs):
			return 0, nil, ProtocolError("invalid multibulk length")
		case count > unauthenticatedArgs && lim.Unauthenticated:
			return 0, nil, ProtocolError("unauthenticated multibulk length")
		case count <= 0:
			return p.finish(), nil, nil
		}
		p.left = int(count)
		p.spans = p.spans[:0]
	}
	for p.left > 0 {
		if !p.inBulk {
			if ok, err := p.bulkHeader(buf, lim); !ok {
				return 0, nil, err
			}
		}
		if len(buf)-p.pos < p.bulk+2 {
			return 0, nil, nil
		}
		p.spans = append(p.spans, span{p.pos, p.pos + p.bulk})
		p.pos += p.bulk + 2
		p.inBulk = false
		p.left--
	}
	p.args = p.args[:0]
	for _, s := range p.spans {
		p.args = append(p.args, buf[s.start:s.end:s.end])
	}
	return p.finish(), p.args, nil
}

// Pending returns how many bytes of the buffer the incomplete request is known to need at least. It is more than
// the buffer holds while the parser waits for a long argument.
func (p *Parser) Pending() int {
	if p.inBulk {
		return p.pos + p.bulk + 2
	}
	return p.pos
}

// bulkHeader reads "$<length>\r\n" at pos. It reports false if the line is incomplete or wrong.
func (p *Parser) bulkHeader(buf []byte, lim Limits) (ok bool, err error) {
	line, ok, err := p.line(buf, lim, "too big bulk count string")
	if !ok {
		return false, err
	}
	if len(line) == 0 || line[0] != '$' {
		got := byte('\r')
		if len(line) > 0 {
			got = line[0]
		}
		return false, ProtocolError(fmt.Sprintf("expected '$', got '%c'", got))
	}
	size, ok := ParseInt(line[1:])
	switch {
	case !ok || size < 0 || size > int64(lim.MaxBulk):
		return false, ProtocolError("invalid bulk length")
	case size > unauthenticatedBulk && lim.Unauthenticated:
		return false, ProtocolError("unauthenticated bulk length")
	}
	p.bulk, p.inBulk = int(size), true
	return true, nil
}

// line returns the line at pos without its end and moves pos behind it. A line is over at CR; the byte behind it is
// taken for LF, as in Redis. tooLong is the error for a line that does not end within the limit.
func (p *Parser) line(buf []byte, lim Limits, tooLong ProtocolError) (line []byte, ok bool, err error) {
	rest := buf[p.pos:]
	end := indexCR(rest[p.scanned:])
	if end < 0 {
		p.scanned = len(rest)
		if len(rest) > lim.MaxInline {
			return nil, false, tooLong
		}
		return nil, false, nil
	}
	end += p.scanned
	if end > lim.MaxInline {
		return nil, false, tooLong
	}
	if end+2 > len(rest) {
		p.scanned = end
		return nil, false, nil
	}
	p.scanned = 0
	p.pos += end + 2
	return rest[:end], true, nil
}

// indexCR is bytes.IndexByte for CR. A header line mostly has three or four bytes, for which the call does not pay.
func indexCR(b []byte) int {
	for i := range min(len(b), 4) {
		if b[i] == '\r' {
			return i
		}
	}
	return bytes.IndexByte(b, '\r')
}

// inline reads a command typed as a line: words separated by blanks, perhaps quoted.
func (p *Parser) inline(buf []byte, lim Limits) (n int, args [][]byte, err error) {
	end := bytes.IndexByte(buf[p.scanned:], '\n')
	if end < 0 {
		p.scanned = len(buf)
		if len(buf) > lim.MaxInline {
			return 0, nil, ProtocolError("too big inline request")
		}
		return 0, nil, nil
	}
	end += p.scanned
	if end > lim.MaxInline {
		return 0, nil, ProtocolError("too big inline request")
	}
	args, ok := splitArgs(p.args[:0], buf[:end])
	if !ok {
		return 0, nil, ProtocolError("unbalanced quotes in request")
	}
	p.args = args
	p.pos = end + 1
	return p.finish(), args, nil
}

// finish ends the request and returns its length.
func (p *Parser) finish() int {
	n := p.pos
	p.pos, p.scanned, p.left, p.inBulk = 0, 0, 0, false
	return n
}

// Release gives up the last request: its arguments, which must not be used any more, the hold that they have on the
// caller's buffer, and the memory for more of them. What is known of an incomplete request stays.
func (p *Parser) Release() {
	p.args = nil
	if p.left == 0 {
		p.spans = nil
	}
}

// Memory returns the bytes that the parser holds, without those of the buffer.
func (p *Parser) Memory() int {
	return cap(p.args)*int(unsafe.Sizeof(p.args[0])) + cap(p.spans)*int(unsafe.Sizeof(p.spans[0]))
}

// ParseInt reads a decimal 64-bit integer in the one form that Redis accepts for lengths and for integer values
// (util.c, string2ll): an optional minus, no plus, no leading zero, no blank, nothing else.
func ParseInt(b []byte) (int64, bool) {
	if len(b) == 1 && b[0] >= '0' && b[0] <= '9' {
		return int64(b[0] - '0'), true
	}
	neg := len(b) > 0 && b[0] == '-'
	if neg {
		b = b[1:]
	}
	if len(b) == 0 || len(b) > 19 || b[0] < '1' || b[0] > '9' {
		return 0, false
	}
	var v uint64 // 19 digits always fit
	for _, c := range b {
		if c < '0' || c > '9' {
			return 0, false
		}
		v = v*10 + uint64(c-'0')
	}
	switch {
	case neg && v <= -math.MinInt64:
		return -int64(v), true
	case !neg && v <= math.MaxInt64:
		return int64(v), true
	}
	return 0, false
}
