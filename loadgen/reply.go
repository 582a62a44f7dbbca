package loadgen

import (
	"bytes"
	"errors"
	"fmt"
	"strconv"
)

// A ReplyRule looks at all bytes received so far and says whether they are the
// complete reply. An error that wraps [ErrServer] says that the reply is
// complete and reports an error; any other error says that the bytes are no
// reply. The rule must not keep b.
type ReplyRule func(b []byte) (complete bool, err error)

// ErrServer is wrapped by a [ReplyRule] for a well-formed reply that reports an
// error. It puts the operation in the class [ServerError].
var ErrServer = errors.New("error reply")

var errBadReply = errors.New("bad reply")

// maxReply bounds the bytes kept for one reply; a longer one is a bad reply.
const maxReply = 1 << 20

// RESPReply is the rule for one reply of a Redis server: a simple string, an
// integer, a bulk string or an error (RESP2). Arrays are not understood. Bytes
// after the reply are an error, because a request has one reply.
func RESPReply(b []byte) (complete bool, err error) {
	if len(b) == 0 {
		return false, nil
	}
	switch b[0] {
	case '+', ':', '-', '$':
	default:
		return false, fmt.Errorf("it begins with %q", b[0])
	}
	end := bytes.Index(b, []byte("\r\n"))
	if end < 0 {
		return false, nil
	}
	line, size := string(b[1:end]), end+2
	if b[0] == '$' && line != "-1" {
		n, err := strconv.ParseUint(line, 10, 31)
		if err != nil {
			return false, fmt.Errorf("bulk length: %w", err)
		}
		body := size + int(n)
		size = body + 2
		if len(b) < size {
			return false, nil
		}
		if !bytes.Equal(b[body:size], []byte("\r\n")) {
			return false, fmt.Errorf("no line end after %d bytes of bulk string", n)
		}
	}
	if len(b) > size {
		return false, fmt.Errorf("%d bytes after it", len(b)-size)
	}
	if b[0] == '-' {
		return true, fmt.Errorf("%w: %s", ErrServer, line)
	}
	return true, nil
}
