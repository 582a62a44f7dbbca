package resp

import (
	"math"
	"strings"
	"testing"

	"github.com/google/go-cmp/cmp"
	"github.com/stretchr/testify/assert"
	"github.com/stretchr/testify/require"
)

func TestAppend(t *testing.T) {
	for _, tc := range []struct {
		why          string
		append       func(dst []byte, v Version) []byte
		resp2, resp3 string
	}{
		{"simple string", func(d []byte, _ Version) []byte { return AppendSimple(d, "OK") }, "+OK\r\n", "+OK\r\n"},
		{"a line end cannot forge a second reply", func(d []byte, _ Version) []byte { return AppendError(d, "ERR a\r\n+b") }, "-ERR a  +b\r\n", "-ERR a  +b\r\n"},
		{"integer", func(d []byte, _ Version) []byte { return AppendInt(d, math.MinInt64) }, ":-9223372036854775808\r\n", ":-9223372036854775808\r\n"},
		{"bulk", func(d []byte, _ Version) []byte { return AppendBulk(d, "a\r\nb") }, "$4\r\na\r\nb\r\n", "$4\r\na\r\nb\r\n"},
		{"empty bulk", func(d []byte, _ Version) []byte { return AppendBulk(d, []byte(nil)) }, "$0\r\n\r\n", "$0\r\n\r\n"},
		{"null", AppendNull, "$-1\r\n", "_\r\n"},
		{"null array", AppendNullArray, "*-1\r\n", "_\r\n"},
		{"array", func(d []byte, _ Version) []byte { return AppendArray(d, 2) }, "*2\r\n", "*2\r\n"},
		{"map", func(d []byte, v Version) []byte { return AppendMap(d, 2, v) }, "*4\r\n", "%2\r\n"},
		{"set", func(d []byte, v Version) []byte { return AppendSet(d, 2, v) }, "*2\r\n", "~2\r\n"},
		{"push", func(d []byte, v Version) []byte { return AppendPush(d, 2, v) }, "*2\r\n", ">2\r\n"},
		{"true", func(d []byte, v Version) []byte { return AppendBool(d, true, v) }, ":1\r\n", "#t\r\n"},
		{"false", func(d []byte, v Version) []byte { return AppendBool(d, false, v) }, ":0\r\n", "#f\r\n"},
		{"double", func(d []byte, v Version) []byte { return AppendDouble(d, 0.1, v) }, "$3\r\n0.1\r\n", ",0.1\r\n"},
		{"infinity", func(d []byte, v Version) []byte { return AppendDouble(d, math.Inf(-1), v) }, "$4\r\n-inf\r\n", ",-inf\r\n"},
		{"not a number", func(d []byte, v Version) []byte { return AppendDouble(d, math.NaN(), v) }, "$3\r\nnan\r\n", ",nan\r\n"},
		{"verbatim", func(d []byte, v Version) []byte { return AppendVerbatim(d, "txt", "hi", v) }, "$2\r\nhi\r\n", "=6\r\ntxt:hi\r\n"},
		{"request", func(d []byte, _ Version) []byte { return AppendRequest(d, "GET", "k") }, "*2\r\n$3\r\nGET\r\n$1\r\nk\r\n", "*2\r\n$3\r\nGET\r\n$1\r\nk\r\n"},
	} {
		assert.Equal(t, tc.resp2, string(tc.append(nil, RESP2)), "%s, RESP2", tc.why)
		assert.Equal(t, "x"+tc.resp3, string(tc.append([]byte("x"), RESP3)), "%s, RESP3, behind other bytes", tc.why)
	}
}

func TestDecode(t *testing.T) {
	for _, tc := range []struct {
		why, in, want, err string
	}{
		{"simple string", "+OK\r\n", "+OK", ""},
		{"error", "-ERR no\r\n", "-ERR no", ""},
		{"integer", ":-7\r\n", ":-7", ""},
		{"integer with a plus, which RESP3 allows", ":+7\r\n", ":7", ""},
		{"bulk", "$4\r\na\r\nb\r\n", `"a\r\nb"`, ""},
		{"RESP2 null", "$-1\r\n", "nil", ""},
		{"RESP2 null array", "*-1\r\n", "nil", ""},
		{"RESP3 null", "_\r\n", "nil", ""},
		{"array", "*2\r\n:1\r\n*1\r\n+a\r\n", "[:1 [+a]]", ""},
		{"map", "%1\r\n+k\r\n:1\r\n", "{+k :1}", ""},
		{"set", "~2\r\n:1\r\n:2\r\n", "<:1 :2>", ""},
		{"push", ">1\r\n+a\r\n", ">[+a]", ""},
		{"double", ",1.5e3\r\n", ",1500", ""},
		{"double inf", ",inf\r\n", ",+Inf", ""},
		{"true", "#t\r\n", "#true", ""},
		{"false", "#f\r\n", "#false", ""},
		{"verbatim", "=6\r\ntxt:hi\r\n", `="hi"`, ""},
		{"bulk error", "!5\r\nERR x\r\n", `!"ERR x"`, ""},
		{"big number", "(123456789012345678901\r\n", `("123456789012345678901"`, ""},
		{"attribute dropped", "|1\r\n+ttl\r\n:3\r\n$1\r\nv\r\n", `"v"`, ""},
		{"unknown type", "?\r\n", "", `Protocol error: unexpected reply type '?'`},
		{"integer no number", ":a\r\n", "", `Protocol error: invalid reply ":a"`},
		{"boolean", "#x\r\n", "", `Protocol error: invalid reply "#x"`},
		{"double", ",x\r\n", "", `Protocol error: invalid reply ",x"`},
		{"negative length", "$-2\r\n", "", `Protocol error: invalid length in reply "-2"`},
		{"streamed string", "$?\r\n", "", `Protocol error: invalid length in reply "?"`},
		{"null map", "%-1\r\n", "", `Protocol error: invalid length in reply "-1"`},
		{"string longer than it said", "$1\r\nabc", "", "Protocol error: no CR LF behind a string"},
		{"verbatim without format", "=2\r\nhi\r\n", "", "Protocol error: verbatim string without a format"},
		{"nested too deep", strings.Repeat("*1\r\n", 40), "", "Protocol error: reply nested too deep"},
	} {
		t.Run(tc.why, func(t *testing.T) {
			n, v, err := Decode([]byte(tc.in + "+next\r\n"))
			if tc.err != "" {
				require.EqualError(t, err, tc.err)
				return
			}
			require.NoError(t, err)
			assert.Equal(t, len(tc.in), n)
			assert.Equal(t, tc.want, v.String())
			for cut := range len(tc.in) {
				n, _, err := Decode([]byte(tc.in[:cut]))
				require.NoError(t, err, "cut at %d", cut)
				require.Zero(t, n, "cut at %d", cut)
			}
		})
	}
}

func TestDecodeDoesNotAllocateForWhatIsAnnounced(t *testing.T) {
	in := []byte(strings.Repeat("*2147483647\r\n", 30))
	allocs := testing.Benchmark(func(b *testing.B) {
		for b.Loop() {
			_, _, _ = Decode(in)
		}
	})
	assert.Less(t, allocs.AllocedBytesPerOp(), int64(1<<20))
}

// FuzzDecode checks that decoding never panics, stays within the buffer, and that a reply decodes the same from exactly
// its own bytes and not at all from fewer.
func FuzzDecode(f *testing.F) {
	for _, s := range []string{
		"+OK\r\n", "-ERR\r\n", ":1\r\n", "$3\r\nabc\r\n", "$-1\r\n", "*-1\r\n", "*2\r\n:1\r\n$1\r\na\r\n", "%1\r\n+a\r\n#t\r\n", "~1\r\n_\r\n",
		">1\r\n,1.5\r\n", "=6\r\ntxt:hi\r\n", "!3\r\nERR\r\n", "(12\r\n", "|1\r\n+a\r\n+b\r\n+c\r\n", "*1\r\n*1\r\n*1\r\n*0\r\n",
	} {
		f.Add([]byte(s))
	}
	f.Fuzz(func(t *testing.T, in []byte) {
		n, v, err := Decode(in)
		if err != nil || n == 0 {
			return
		}
		if n < 0 || n > len(in) {
			t.Fatalf("n=%d of %d", n, len(in))
		}
		m, again, err := Decode(in[:n])
		if m != n || err != nil || cmp.Diff(v.String(), again.String()) != "" {
			t.Fatalf("from its own bytes alone: n=%d err=%v, before n=%d\n%v\n%v", m, err, n, again, v)
		}
		if m, _, _ := Decode(in[:n-1]); m != 0 {
			t.Fatalf("complete with the last byte missing: n=%d", m)
		}
	})
}
