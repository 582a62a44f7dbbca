package observe

import (
	"strings"
	"testing"

	"github.com/google/go-cmp/cmp"
	"github.com/stretchr/testify/assert"
	"github.com/stretchr/testify/require"
)

// kallsyms is a table as /proc/kallsyms shows it: not in order, with data, a module, two
// names for one function and a program of BPF.
const kallsyms = `ffffffff81000000 T _stext
ffffffff81e4a2c0 T tcp_v4_rcv
ffffffff81e49000 t tcp_v4_send_reset.isra.0
ffffffff81e49000 t alias
ffffffff81e49100 d some_data
ffffffff82000000 W weak
ffffffffc0400000 t nf_hook	[nf_tables]
ffffffffc0301000 t bpf_prog_6deef7357e7b4530_connlab_trace	[bpf]
`

func TestFindSymbols(t *testing.T) {
	for _, row := range []struct {
		address uint64
		want    string
		why     string
	}{
		{0xffffffff80ffffff, "", "below all"},
		{0xffffffff81000000, "_stext", "the very beginning"},
		{0xffffffff81e48fff, "_stext", "the last byte before the next"},
		{0xffffffff81e49000, "tcp_v4_send_reset.isra.0", "the first of two names"},
		{0xffffffff81e49101, "tcp_v4_send_reset.isra.0", "data is no function"},
		{0xffffffff81e4a300, "tcp_v4_rcv", "in the middle"},
		{0xffffffff81e4a301, "tcp_v4_rcv", "two addresses in one function"},
		{0xffffffff82000001, "weak", "a weak symbol"},
		{0xffffffffc0301001, "bpf_prog_6deef7357e7b4530_connlab_trace", "listed after a higher address"},
		{0xffffffffffffffff, "nf_hook", "above all"},
	} {
		got, err := findSymbols(strings.NewReader(kallsyms), []uint64{row.address})
		require.NoError(t, err)
		assert.Equal(t, row.want, got[row.address], row.why)
	}
	together, err := findSymbols(strings.NewReader(kallsyms), []uint64{0xffffffff81e4a300, 1, 0xffffffff81e4a301, 0xffffffff81e49001, 0xffffffff81e4a300})
	require.NoError(t, err)
	assert.Empty(t, cmp.Diff(map[uint64]string{
		0xffffffff81e49001: "tcp_v4_send_reset.isra.0", 0xffffffff81e4a300: "tcp_v4_rcv", 0xffffffff81e4a301: "tcp_v4_rcv",
	}, together))
}

func TestFindSymbolsRefuses(t *testing.T) {
	_, err := findSymbols(strings.NewReader("0000000000000000 T _stext\n0000000000000000 T tcp_v4_rcv\n"), []uint64{1})
	assert.ErrorIs(t, err, errNoAddresses)
	_, err = findSymbols(strings.NewReader(""), []uint64{1})
	assert.ErrorIs(t, err, errNoAddresses)
	for _, line := range []string{"tcp_v4_rcv", "ffff T", "xyz T tcp_v4_rcv", "ffff TT tcp_v4_rcv", "10000000000000000 T f"} {
		_, err := findSymbols(strings.NewReader(line), nil)
		assert.ErrorContains(t, err, line)
	}
}

// FuzzFindSymbols compares with a walk over all lines for the one address.
func FuzzFindSymbols(f *testing.F) {
	f.Add(kallsyms, uint64(0xffffffff81e4a300), uint64(0xffffffff81e49000))
	f.Add("10 T a\n10 T b\n8 t c\n", uint64(0x10), uint64(9))
	f.Add("0 T a\n", uint64(0), uint64(1))
	f.Add("f a b\n\n", uint64(0), uint64(1))
	f.Fuzz(func(t *testing.T, table string, a, b uint64) {
		found, err := findSymbols(strings.NewReader(table), []uint64{a, b})
		if err != nil {
			assert.Nil(t, found)
			return
		}
		for _, address := range []uint64{a, b} {
			var begin uint64
			var want string
			for line := range strings.Lines(table) {
				at, kind, name, err := parseSymbol([]byte(strings.TrimRight(line, "\n")))
				require.NoError(t, err)
				if strings.ContainsRune("tTwW", rune(kind)) && at <= address && (want == "" || at > begin) {
					begin, want = at, string(name)
				}
			}
			if found[address] != want {
				t.Errorf("%x is in %q, want %q", address, found[address], want)
			}
		}
	})
}
