package resp

import (
	"bytes"
	"fmt"
	"math"
	"strconv"
	"strings"
	"testing"

	"github.com/google/go-cmp/cmp"
	"github.com/stretchr/testify/assert"
	"github.com/stretchr/testify/require"
)

// small limits let a test reach every one of them with few bytes.
var small = Limits{MaxBulk: 20, MaxArgs: 4, MaxInline: 32}

func words(args [][]byte) []string {
	var w []string
	for _, a := range args {
		w = append(w, string(a))
	}
	return w
}

func TestRequests(t *testing.T) {
	long := strings.Repeat("1", 40)
	unauthenticated := DefaultLimits()
	unauthenticated.Unauthenticated = true
	for _, tc := range []struct {
		why  string
		in   string
		lim  Limits
		n    int
		args []string
		err  string
	}{
		{"nothing yet", "", small, 0, nil, ""},
		{"one argument", "*1\r\n$4\r\nPING\r\n", small, 14, []string{"PING"}, ""},
		{"two arguments, more behind", "*2\r\n$3\r\nGET\r\n$1\r\nk\r\n*1\r\n", small, 20, []string{"GET", "k"}, ""},
		{"an empty argument", "*2\r\n$4\r\nECHO\r\n$0\r\n\r\n", small, 20, []string{"ECHO", ""}, ""},
		{"line ends inside an argument", "*1\r\n$4\r\n\r\n\r\n\r\n", small, 14, []string{"\r\n\r\n"}, ""},
		{"no arguments: ignored", "*0\r\nPING\r\n", small, 4, nil, ""},
		{"a null request: ignored", "*-1\r\n", small, 5, nil, ""},
		{"header cut before CR", "*1", small, 0, nil, ""},
		{"header cut before LF", "*1\r", small, 0, nil, ""},
		{"length cut", "*1\r\n$4", small, 0, nil, ""},
		{"argument cut", "*1\r\n$4\r\nPI", small, 0, nil, ""},
		{"argument there, its CR LF not", "*1\r\n$4\r\nPING\r", small, 0, nil, ""},
		{"count no number", "*x\r\n", small, 0, nil, "Protocol error: invalid multibulk length"},
		{"count with a plus", "*+1\r\n", small, 0, nil, "Protocol error: invalid multibulk length"},
		{"count empty", "*\r\n", small, 0, nil, "Protocol error: invalid multibulk length"},
		{"count at the limit", "*4\r\n", small, 0, nil, ""},
		{"count above the limit", "*5\r\n", small, 0, nil, "Protocol error: invalid multibulk length"},
		{"count beyond 64 bits", "*99999999999999999999\r\n", small, 0, nil, "Protocol error: invalid multibulk length"},
		{"not a string", "*1\r\n:4\r\n", small, 0, nil, "Protocol error: expected '$', got ':'"},
		{"empty line for a length", "*1\r\n\r\n", small, 0, nil, "Protocol error: expected '$', got '\r'"},
		{"length negative", "*1\r\n$-1\r\n", small, 0, nil, "Protocol error: invalid bulk length"},
		{"length no number", "*1\r\n$4x\r\n", small, 0, nil, "Protocol error: invalid bulk length"},
		{"length at the limit", "*1\r\n$20\r\n", small, 0, nil, ""},
		{"length above the limit", "*1\r\n$21\r\n", small, 0, nil, "Protocol error: invalid bulk length"},
		{"endless count", "*" + long, small, 0, nil, "Protocol error: too big mbulk count string"},
		{"long count, finished", "*" + long + "\r\n", small, 0, nil, "Protocol error: too big mbulk count string"},
		{"endless length", "*1\r\n$" + long, small, 0, nil, "Protocol error: too big bulk count string"},
		{"10 arguments before AUTH", "*10\r\n", unauthenticated, 0, nil, ""},
		{"11 arguments before AUTH", "*11\r\n", unauthenticated, 0, nil, "Protocol error: unauthenticated multibulk length"},
		{"16 KiB before AUTH", "*1\r\n$16384\r\n", unauthenticated, 0, nil, ""},
		{"more before AUTH", "*1\r\n$16385\r\n", unauthenticated, 0, nil, "Protocol error: unauthenticated bulk length"},

		{"inline", "PING\r\n", small, 6, []string{"PING"}, ""},
		{"inline with LF alone", "PING\n", small, 5, []string{"PING"}, ""},
		{"inline, many blanks", "  SET \t k  v \r\nGET k\r\n", small, 15, []string{"SET", "k", "v"}, ""},
		{"empty line: ignored", "\r\n", small, 2, nil, ""},
		{"inline incomplete", "PING", small, 0, nil, ""},
		{"inline at the limit, unfinished", strings.Repeat("a", 32), small, 0, nil, ""},
		{"inline above the limit, unfinished", strings.Repeat("a", 33), small, 0, nil, "Protocol error: too big inline request"},
		{"inline above the limit, finished", strings.Repeat("a", 33) + "\n", small, 0, nil, "Protocol error: too big inline request"},
		{"quotes", "SET k \"a b\"\n", small, 12, []string{"SET", "k", "a b"}, ""},
		{"quotes open", "SET k \"a b\n", small, 0, nil, "Protocol error: unbalanced quotes in request"},
		{"text right behind a quote", "SET \"a\"b\n", small, 0, nil, "Protocol error: unbalanced quotes in request"},
	} {
		t.Run(tc.why, func(t *testing.T) {
			var p Parser
			n, args, err := p.Next([]byte(tc.in), tc.lim)
			if tc.err != "" {
				require.EqualError(t, err, tc.err)
				var protocol ProtocolError
				require.ErrorAs(t, err, &protocol)
			} else {
				require.NoError(t, err)
			}
			assert.Equal(t, tc.n, n)
			assert.Equal(t, tc.args, words(args))
		})
	}
}

func TestInlineQuoting(t *testing.T) {
	for _, tc := range []struct {
		why, in string
		want    []string
		bad     bool
	}{
		{"escapes in double quotes", `"\n\r\t\b\a\\\"\q"`, []string{"\n\r\t\b\a\\\"q"}, false},
		{"hex in double quotes", `"\x00\xff\x4A"`, []string{"\x00\xff\x4a"}, false},
		{"not hex after \\x", `"\xg1"`, []string{"xg1"}, false},
		{"hex cut by the end", `"\x4`, nil, true},
		{"backslash at the end", `"\`, nil, true},
		{"single quotes keep backslashes", `'a\n\'b'`, []string{`a\n'b`}, false},
		{"empty strings", `"" ''`, []string{"", ""}, false},
		{"a quote in the middle of a word", `ab"c d"`, []string{"abc d"}, false},
		{"the second quote in a word", `a'b''c'`, nil, true},
		{"no quotes: the backslash is itself", `a\nb`, []string{`a\nb`}, false},
		{"a NUL ends the line", "a\x00b c", []string{"a"}, false},
		{"vertical tab: a blank between words only", "a \vb\vc", []string{"a", "b\vc"}, false},
	} {
		t.Run(tc.why, func(t *testing.T) {
			args, ok := splitArgs(nil, []byte(tc.in))
			require.Equal(t, tc.bad, !ok)
			if ok {
				assert.Equal(t, tc.want, words(args))
			}
		})
	}
}

func TestParseInt(t *testing.T) {
	for _, tc := range []struct {
		in string
		v  int64
		ok bool
	}{
		{"0", 0, true}, {"7", 7, true}, {"-1", -1, true}, {"10", 10, true},
		{strconv.Itoa(math.MaxInt64), math.MaxInt64, true}, {strconv.Itoa(math.MinInt64), math.MinInt64, true},
		{"9223372036854775808", 0, false}, {"-9223372036854775809", 0, false}, {"99999999999999999999", 0, false},
		{"", 0, false}, {"-", 0, false}, {"-0", 0, false}, {"00", 0, false}, {"01", 0, false}, {"+1", 0, false},
		{" 1", 0, false}, {"1 ", 0, false}, {"1.0", 0, false}, {"x", 0, false}, {"/", 0, false}, {":", 0, false},
	} {
		v, ok := ParseInt([]byte(tc.in))
		assert.Equal(t, tc.ok, ok, "ParseInt(%q)", tc.in)
		assert.Equal(t, tc.v, v, "ParseInt(%q)", tc.in)
	}
}

// A request must come out the same whatever pieces it arrives in, and although the buffer moves between the pieces.
func TestPieces(t *testing.T) {
	stream := "*3\r\n$3\r\nSET\r\n$1\r\nk\r\n$12\r\nhello\r\nworld\r\nECHO \"a b\"\r\n*0\r\n*1\r\n$4\r\nPING\r\n"
	want := [][]string{{"SET", "k", "hello\r\nworld"}, {"ECHO", "a b"}, nil, {"PING"}}
	for size := 1; size <= len(stream); size++ {
		assert.Empty(t, cmp.Diff(want, feed(t, []byte(stream), size)), "pieces of %d bytes", size)
	}
}

// feed gives the stream to a parser in pieces and returns the requests.
func feed(t testing.TB, stream []byte, size int) [][]string {
	t.Helper()
	var p Parser
	var got [][]string
	var buf []byte
	for len(stream) > 0 {
		k := min(size, len(stream))
		buf = append(bytes.Clone(buf), stream[:k]...)
		stream = stream[k:]
		for {
			n, args, err := p.Next(buf, DefaultLimits())
			require.NoError(t, err)
			if n == 0 {
				break
			}
			got = append(got, words(args))
			buf = buf[n:]
		}
	}
	assert.Empty(t, buf, "bytes left over")
	return got
}

// An incomplete request must not be scanned from its start at each read. Bytes already scanned are overwritten here
// before the next call: a parser which looked at them again would find an error.
func TestIncompleteIsNotScannedAgain(t *testing.T) {
	const args = 5000
	var stream []byte
	stream = AppendArray(stream, args)
	for range args {
		stream = AppendBulk(stream, "xyz")
	}
	var p Parser
	buf := bytes.Clone(stream)
	for have := 1; have < len(stream); have += 7 {
		n, _, err := p.Next(buf[:have], DefaultLimits())
		require.NoError(t, err)
		require.Zero(t, n)
		for i := range min(p.pos, have) {
			buf[i] = 0xff
		}
	}
	n, got, err := p.Next(buf, DefaultLimits())
	require.NoError(t, err)
	assert.Equal(t, len(stream), n)
	assert.Len(t, got, args)

	inline := bytes.Repeat([]byte("a"), 1000)
	p = Parser{}
	for have := range inline {
		_, _, err := p.Next(inline[:have], DefaultLimits())
		require.NoError(t, err)
		assert.Equal(t, have, p.scanned)
	}
}

// What a client announces costs nothing until it comes, and a huge request's slices are not kept.
func TestMemoryFollowsTheBytes(t *testing.T) {
	var p Parser
	_, _, err := p.Next([]byte("*1048576\r\n$536870912\r\nabc"), DefaultLimits())
	require.NoError(t, err)
	assert.LessOrEqual(t, cap(p.spans)+cap(p.args), 16)
	assert.Equal(t, len("*1048576\r\n$536870912\r\n")+512<<20+2, p.Pending())

	p = Parser{}
	var stream []byte
	stream = AppendArray(stream, 100_000)
	for range 100_000 {
		stream = AppendBulk(stream, "")
	}
	_, args, err := p.Next(stream, DefaultLimits())
	require.NoError(t, err)
	require.Len(t, args, 100_000)
	assert.GreaterOrEqual(t, p.Memory(), 100_000*(24+16), "a slice header and a span for each argument")
	p.Release()
	assert.Zero(t, p.Memory(), "after the request, idle")
}

// Release must not lose the place in a request of which a part has come.
func TestReleaseWithinARequest(t *testing.T) {
	var p Parser
	req := AppendRequest(nil, "SET", "k", "v")
	n, _, err := p.Next(req[:len(req)-3], DefaultLimits())
	require.NoError(t, err)
	require.Zero(t, n)
	p.Release()
	n, args, err := p.Next(req, DefaultLimits())
	require.NoError(t, err)
	assert.Equal(t, len(req), n)
	assert.Equal(t, []string{"SET", "k", "v"}, words(args))
}

func TestNoAllocationInTheSteadyState(t *testing.T) {
	var p Parser
	req := AppendRequest(nil, "SET", "key:000000000001", "xxx")
	inline := []byte("SET key value\r\n")
	allocs := testing.AllocsPerRun(1000, func() {
		_, _, _ = p.Next(req, DefaultLimits())
		_, _, _ = p.Next(inline, DefaultLimits())
	})
	assert.Zero(t, allocs)
}

// FuzzRequests checks, for any bytes, that the parser does not panic, that arguments lie within what was consumed and
// within the limits, and that the pieces in which bytes arrive make no difference.
func FuzzRequests(f *testing.F) {
	for _, s := range []string{
		"*1\r\n$4\r\nPING\r\n", "*3\r\n$3\r\nSET\r\n$1\r\nk\r\n$3\r\na\r\n\r\n", "PING\r\n", "SET \"a\\x00\" 'b\\''\n", "*0\r\n*-1\r\n\r\n",
		"*2\r\n$4\r\nECHO\r\n$536870912\r\n", "*1048577\r\n", "*1\r\n$-1\r\n", "*1\r\n:1\r\n", "\"\\x", "*\r", "*1\r\n$1\r\nab\r\n",
	} {
		f.Add([]byte(s), uint8(3))
	}
	lim := Limits{MaxBulk: 64, MaxArgs: 16, MaxInline: 48}
	run := func(stream []byte, size int) (out []string) {
		var p Parser
		var buf []byte
		for len(stream) > 0 {
			k := min(size, len(stream))
			buf = append(bytes.Clone(buf), stream[:k]...)
			stream = stream[k:]
			for {
				n, args, err := p.Next(buf, lim)
				if err != nil {
					return append(out, err.Error())
				}
				if n == 0 {
					break
				}
				if n < 0 || n > len(buf) || len(args) > max(lim.MaxArgs, lim.MaxInline) {
					panic(fmt.Sprintf("n=%d of %d, %d arguments", n, len(buf), len(args)))
				}
				for _, a := range args {
					if len(a) > lim.MaxBulk {
						panic(fmt.Sprintf("argument of %d bytes", len(a)))
					}
				}
				out = append(out, fmt.Sprintf("%q", args))
				buf = buf[n:]
			}
		}
		return out
	}
	f.Fuzz(func(t *testing.T, stream []byte, size uint8) {
		bytewise := run(stream, 1)
		pieces := run(stream, int(size)+1)
		if d := cmp.Diff(bytewise, pieces); d != "" {
			t.Fatalf("pieces of %d bytes differ from single bytes:\n%s", int(size)+1, d)
		}
	})
}

func BenchmarkRequests(b *testing.B) {
	var p Parser
	req := AppendRequest(nil, "SET", "key:000000000001", "xxx")
	b.SetBytes(int64(len(req)))
	b.ReportAllocs()
	for b.Loop() {
		_, _, _ = p.Next(req, DefaultLimits())
	}
}
