package resp

import (
	"math"
	"strconv"
)

// Version is a version of the protocol.
type Version int

// The two versions. A connection begins with RESP2 and changes by the HELLO command.
const (
	RESP2 Version = 2
	RESP3 Version = 3
)

// AppendSimple appends a simple string. CR and LF, which would end it, become blanks.
func AppendSimple(dst []byte, s string) []byte { return appendLine(append(dst, '+'), s) }

// AppendError appends an error; msg begins with its code, as in "ERR syntax error". CR and LF become blanks.
func AppendError(dst []byte, msg string) []byte { return appendLine(append(dst, '-'), msg) }

func appendLine(dst []byte, s string) []byte {
	start := len(dst)
	dst = append(dst, s...)
	for i := start; i < len(dst); i++ {
		if dst[i] == '\r' || dst[i] == '\n' {
			dst[i] = ' '
		}
	}
	return append(dst, '\r', '\n')
}

// AppendInt appends an integer.
func AppendInt(dst []byte, n int64) []byte { return appendHeader(dst, ':', n) }

func appendHeader(dst []byte, kind byte, n int64) []byte {
	dst = strconv.AppendInt(append(dst, kind), n, 10)
	return append(dst, '\r', '\n')
}

// AppendBulk appends a bulk string.
func AppendBulk[T []byte | string](dst []byte, s T) []byte {
	dst = appendHeader(dst, '$', int64(len(s)))
	dst = append(dst, s...)
	return append(dst, '\r', '\n')
}

// AppendNull appends the null of the version; in RESP2 that of a missing string.
func AppendNull(dst []byte, v Version) []byte {
	if v >= RESP3 {
		return append(dst, "_\r\n"...)
	}
	return append(dst, "$-1\r\n"...)
}

// AppendNullArray appends the null of the version; in RESP2 that of a missing array.
func AppendNullArray(dst []byte, v Version) []byte {
	if v >= RESP3 {
		return append(dst, "_\r\n"...)
	}
	return append(dst, "*-1\r\n"...)
}

// AppendArray appends the header of an array of n elements, which the caller appends next.
func AppendArray(dst []byte, n int) []byte { return appendHeader(dst, '*', int64(n)) }

// AppendMap appends the header of a map of n pairs; the caller appends key, value, key, value. RESP2 has an array of
// 2n elements for it.
func AppendMap(dst []byte, n int, v Version) []byte {
	if v >= RESP3 {
		return appendHeader(dst, '%', int64(n))
	}
	return AppendArray(dst, 2*n)
}

// AppendSet appends the header of a set of n elements, in RESP2 of an array.
func AppendSet(dst []byte, n int, v Version) []byte {
	if v >= RESP3 {
		return appendHeader(dst, '~', int64(n))
	}
	return AppendArray(dst, n)
}

// AppendPush appends the header of an out-of-band message of n elements, in RESP2 of an array.
func AppendPush(dst []byte, n int, v Version) []byte {
	if v >= RESP3 {
		return appendHeader(dst, '>', int64(n))
	}
	return AppendArray(dst, n)
}

// AppendDouble appends a floating-point number, in RESP2 as a bulk string.
func AppendDouble(dst []byte, f float64, v Version) []byte {
	var text string
	switch {
	case math.IsInf(f, 1):
		text = "inf"
	case math.IsInf(f, -1):
		text = "-inf"
	case math.IsNaN(f):
		text = "nan"
	default:
		text = strconv.FormatFloat(f, 'g', 17, 64)
		if short := strconv.FormatFloat(f, 'g', -1, 64); len(short) < len(text) {
			text = short
		}
	}
	if v >= RESP3 {
		return appendLine(append(dst, ','), text)
	}
	return AppendBulk(dst, text)
}

// AppendBool appends a truth value, in RESP2 the integer 1 or 0.
func AppendBool(dst []byte, b bool, v Version) []byte {
	switch {
	case v >= RESP3 && b:
		return append(dst, "#t\r\n"...)
	case v >= RESP3:
		return append(dst, "#f\r\n"...)
	case b:
		return AppendInt(dst, 1)
	}
	return AppendInt(dst, 0)
}

// AppendVerbatim appends text with its format, three letters such as "txt" or "mkd"; in RESP2 a bulk string
// without the format.
func AppendVerbatim(dst []byte, format, text string, v Version) []byte {
	if v < RESP3 {
		return AppendBulk(dst, text)
	}
	dst = appendHeader(dst, '=', int64(len(text)+4))
	dst = append(dst, (format + "   ")[:3]...)
	dst = append(dst, ':')
	dst = append(dst, text...)
	return append(dst, '\r', '\n')
}

// AppendRequest appends a command as a client sends it: an array of bulk strings.
func AppendRequest[T []byte | string](dst []byte, args ...T) []byte {
	dst = AppendArray(dst, len(args))
	for _, a := range args {
		dst = AppendBulk(dst, a)
	}
	return dst
}
