package loadgen

import (
	"strings"
	"testing"

	"github.com/stretchr/testify/assert"
	"github.com/stretchr/testify/require"
)

func TestRESPReply(t *testing.T) {
	for _, test := range []struct {
		reason, reply string
		complete      bool
		wantErr       string
	}{
		{"nothing yet", "", false, ""},
		{"simple string", "+PONG\r\n", true, ""},
		{"without its end", "+PONG\r", false, ""},
		{"integer", ":12\r\n", true, ""},
		{"bulk string", "$5\r\nhello\r\n", true, ""},
		{"bulk string with a line end inside", "$4\r\na\r\nb\r\n", true, ""},
		{"empty bulk string", "$0\r\n\r\n", true, ""},
		{"no value", "$-1\r\n", true, ""},
		{"bulk string without its end", "$5\r\nhello\r", false, ""},
		{"bulk string of which only the length is there", "$5\r\n", false, ""},
		{"error", "-ERR no\r\n", true, "error reply: ERR no"},
		{"error without its end", "-ERR no", false, ""},
		{"two replies", "+PONG\r\n+PONG\r\n", false, "7 bytes after it"},
		{"longer than it says", "$1\r\nab\r\n", false, "no line end"},
		{"length is no number", "$x\r\n", false, "bulk length"},
		{"length is negative", "$-2\r\n", false, "bulk length"},
		{"length beyond any memory", "$99999999999999999999\r\n", false, "bulk length"},
		{"another protocol", "HTTP/1.1 200 OK\r\n", false, "it begins with 'H'"},
		{"array, which nobody asked for", "*0\r\n", false, "it begins with '*'"},
	} {
		complete, err := RESPReply([]byte(test.reply))
		assert.Equal(t, test.complete, complete, test.reason)
		if test.wantErr == "" {
			require.NoError(t, err, test.reason)
		} else {
			require.ErrorContains(t, err, test.wantErr, test.reason)
			assert.Equal(t, strings.HasPrefix(test.reply, "-"), complete, test.reason)
		}
	}
}

func FuzzRESPReply(f *testing.F) {
	for _, s := range []string{"+OK\r\n", "-ERR x\r\n", ":1\r\n", "$3\r\nabc\r\n", "$-1\r\n", "$0\r\n\r\n", "$3\r\nabcd\r\n", "\r\n", "$1\r\n"} {
		f.Add([]byte(s))
	}
	f.Fuzz(func(t *testing.T, b []byte) {
		complete, err := RESPReply(b)
		if !complete {
			return
		}
		if err != nil {
			require.ErrorIs(t, err, ErrServer)
		}
		// However a complete reply is cut into reads, it is not complete, and
		// not wrong, before its last byte.
		for i := range b {
			early, err := RESPReply(b[:i])
			require.False(t, early, "%q of %q", b[:i], b)
			require.NoError(t, err, "%q of %q", b[:i], b)
		}
	})
}
