package resp

import (
	"bytes"
	"fmt"
	"math"
	"strconv"
	"strings"
)

// Kind is the type of a reply: the byte that it begins with.
type Kind byte

// The kinds of replies, RESP2's first. A RESP2 null ("$-1", "*-1") is decoded as Null.
const (
	SimpleString Kind = '+'
	Error        Kind = '-'
	Integer      Kind = ':'
	BulkString   Kind = '$'
	Array        Kind = '*'
	Null         Kind = '_'
	Double       Kind = ','
	Boolean      Kind = '#'
	BulkError    Kind = '!'
	Verbatim     Kind = '='
	BigNumber    Kind = '('
	Map          Kind = '%'
	Set          Kind = '~'
	Push         Kind = '>'
)

// attribute precedes a reply and says something about it. No command of Redis sends one by itself.
const attribute Kind = '|'

// maxDepth bounds nested replies, as hiredis does; COMMAND DOCS has the deepest, at 7.
const maxDepth = 32

// Value is one reply.
type Value struct {
	Kind Kind
	// Str is the text of a SimpleString, Error, BulkString, BulkError, BigNumber or Verbatim (without its format).
	// It points into the buffer it was decoded from.
	Str   []byte
	Int   int64   // of an Integer; of a Boolean 1 or 0
	Float float64 // of a Double
	// Elems holds what an Array, Set or Push contains, and of a Map key, value, key, value.
	Elems []Value
}

// Decode returns the first reply in buf and the number of bytes that it takes up; n == 0 and err == nil while it is
// incomplete. An err is a [ProtocolError]. Attributes are read and dropped. An incomplete reply is decoded again from
// its beginning by the next call, which is fine for one long string (its length is known at once) but not for
// arrays of a million elements.
func Decode(buf []byte) (n int, v Value, err error) {
	d := decoder{buf: buf}
	v, ok, err := d.value(0)
	if err != nil || !ok {
		return 0, Value{}, err
	}
	return d.pos, v, nil
}

type decoder struct {
	buf []byte
	pos int
}

// value decodes the reply at pos and reports false if it is incomplete.
func (d *decoder) value(depth int) (v Value, ok bool, err error) {
	if depth > maxDepth {
		return v, false, ProtocolError("reply nested too deep")
	}
	if d.pos == len(d.buf) {
		return v, false, nil
	}
	v.Kind = Kind(d.buf[d.pos])
	if !strings.ContainsRune("+-:$*_,#!=(%~>|", rune(v.Kind)) {
		return v, false, ProtocolError(fmt.Sprintf("unexpected reply type %q", byte(v.Kind)))
	}
	line, ok := d.line()
	if !ok {
		return v, false, nil
	}
	switch v.Kind {
	case SimpleString, Error, BigNumber:
		v.Str = line
		return v, true, nil
	case Null:
		return v, true, nil
	case Integer:
		v.Int, ok = ParseInt(bytes.TrimPrefix(line, []byte{'+'}))
	case Boolean:
		ok = len(line) == 1 && (line[0] == 't' || line[0] == 'f')
		if ok && line[0] == 't' {
			v.Int = 1
		}
	case Double:
		v.Float, err = strconv.ParseFloat(string(line), 64)
		ok = err == nil || math.IsInf(v.Float, 0)
	default:
		size, isInt := ParseInt(line)
		if isInt && size == -1 && (v.Kind == BulkString || v.Kind == Array) {
			return Value{Kind: Null}, true, nil
		}
		if !isInt || size < 0 || size > math.MaxInt32 {
			return v, false, ProtocolError(fmt.Sprintf("invalid length in reply %q", clip(line)))
		}
		if v.Kind == BulkString || v.Kind == BulkError || v.Kind == Verbatim {
			return d.bulk(v, int(size))
		}
		return d.elems(v, int(size), depth)
	}
	if !ok {
		return v, false, ProtocolError(fmt.Sprintf("invalid reply %q", string(v.Kind)+string(clip(line))))
	}
	return v, true, nil
}

// line takes the line behind the type byte, without its CR LF.
func (d *decoder) line() ([]byte, bool) {
	rest := d.buf[d.pos+1:]
	end := bytes.Index(rest, []byte("\r\n"))
	if end < 0 {
		return nil, false
	}
	d.pos += 1 + end + 2
	return rest[:end:end], true
}

func (d *decoder) bulk(v Value, size int) (Value, bool, error) {
	if len(d.buf)-d.pos < size+2 {
		return v, false, nil
	}
	end := d.pos + size
	v.Str = d.buf[d.pos:end:end]
	if string(d.buf[end:end+2]) != "\r\n" {
		return v, false, ProtocolError("no CR LF behind a string")
	}
	d.pos = end + 2
	if v.Kind == Verbatim {
		if size < 4 || v.Str[3] != ':' {
			return v, false, ProtocolError("verbatim string without a format")
		}
		v.Str = v.Str[4:]
	}
	return v, true, nil
}

func (d *decoder) elems(v Value, size, depth int) (Value, bool, error) {
	if v.Kind == Map || v.Kind == attribute {
		size *= 2
	}
	// The shortest element takes three bytes: what is not there yet gets no memory. The constant keeps headers nested
	// in headers, each announcing millions, from multiplying even that.
	v.Elems = make([]Value, 0, min(size, (len(d.buf)-d.pos)/3, 1024))
	for range size {
		e, ok, err := d.value(depth + 1)
		if err != nil || !ok {
			return v, false, err
		}
		v.Elems = append(v.Elems, e)
	}
	if v.Kind == attribute {
		return d.value(depth + 1)
	}
	return v, true, nil
}

// clip shortens what a peer sent for use in a message.
func clip(b []byte) []byte { return b[:min(len(b), 64)] }

// IsError reports whether the reply is an error.
func (v Value) IsError() bool { return v.Kind == Error || v.Kind == BulkError }

// String renders the reply on one line for messages and tests, telling kinds apart: +OK, -ERR …, :1, "bulk", nil,
// [array], {map}, <set>.
func (v Value) String() string {
	switch v.Kind {
	case SimpleString, Error:
		return string(v.Kind) + string(v.Str)
	case Integer:
		return ":" + strconv.FormatInt(v.Int, 10)
	case BulkString:
		return strconv.Quote(string(v.Str))
	case BulkError, Verbatim, BigNumber:
		return string(v.Kind) + strconv.Quote(string(v.Str))
	case Null:
		return "nil"
	case Double:
		return "," + strconv.FormatFloat(v.Float, 'g', -1, 64)
	case Boolean:
		return "#" + strconv.FormatBool(v.Int == 1)
	}
	var b strings.Builder
	open, end := "[", "]"
	switch v.Kind {
	case Map:
		open, end = "{", "}"
	case Set:
		open, end = "<", ">"
	case Push:
		open = ">["
	}
	b.WriteString(open)
	for i, e := range v.Elems {
		if i > 0 {
			b.WriteByte(' ')
		}
		b.WriteString(e.String())
	}
	b.WriteString(end)
	return b.String()
}
