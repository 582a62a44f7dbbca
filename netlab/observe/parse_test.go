package observe

import (
	"testing"

	"github.com/google/go-cmp/cmp"
	"github.com/stretchr/testify/assert"
	"github.com/stretchr/testify/require"
)

// parseTexts is what ReadCounters does with the texts of one host.
func parseTexts(p *parser, texts map[string][]byte, values []int64) (Counters, []int64, error) {
	var err error
	for _, name := range []string{"netstat", "snmp", "sockstat"} {
		if values, err = p.of(name)(texts[name], values); err != nil {
			return nil, values, err
		}
	}
	c := Counters{}
	for id, v := range values {
		c[p.names[id]] = v
	}
	return c, values, nil
}

func fixtureTexts(tb testing.TB) map[string][]byte {
	texts := map[string][]byte{}
	for _, name := range []string{"netstat", "snmp", "sockstat"} {
		texts[name] = fixture(tb, name)
	}
	return texts
}

func TestParseFixture(t *testing.T) {
	texts := fixtureTexts(t)
	p := newParser()
	got, values, err := parseTexts(p, texts, nil)
	require.NoError(t, err)

	// Read off the files by eye; the rest is held by name and by sum.
	want := Counters{
		"TcpExt.ListenOverflows": 15, "TcpExt.ListenDrops": 15,
		"Tcp.RtoMax": 120000, "Tcp.MaxConn": -1, "Tcp.PassiveOpens": 8, "Tcp.CurrEstab": 5, "Tcp.InSegs": 38, "Tcp.OutSegs": 16,
		"Ip.InReceives": 39, "Ip.OutTransmits": 17, "IcmpMsg.InType3": 1, "Udp.OutDatagrams": 1, "UdpLite.MemErrors": 0,
		"sockstat.sockets.used": 11, "sockstat.TCP.inuse": 8, "sockstat.TCP.tw": 3, "sockstat.FRAG.memory": 0,
	}
	chosen := Counters{}
	for name := range want {
		if v, there := got[name]; assert.True(t, there, name) {
			chosen[name] = v
		}
	}
	assert.Empty(t, cmp.Diff(want, chosen))

	names := namesIn(texts)
	assert.Len(t, got, len(names), "every name once")
	for _, name := range names {
		assert.Contains(t, got, name)
	}
	assert.NotContains(t, got, "sockstat.TCP.orphan", "the 188 orphans are the machine's, not those of this namespace")

	again, _, err := parseTexts(p, texts, values)
	require.NoError(t, err)
	assert.Empty(t, cmp.Diff(got, again), "with names already known")
	assert.Len(t, p.names, len(names), "nothing is learnt twice")
}

func TestParsePairs(t *testing.T) {
	for _, tc := range []struct {
		name, text string
		want       Counters
		err        string
	}{
		{name: "empty", text: "", want: Counters{}},
		{name: "signed", text: "Tcp: MaxConn X\nTcp: -1 2\n", want: Counters{"Tcp.MaxConn": -1, "Tcp.X": 2}},
		{name: "no newline at the end", text: "A: x\nA: 1", want: Counters{"A.x": 1}},
		{name: "row without fields", text: "IcmpMsg:\nIcmpMsg:\n", want: Counters{}},
		{name: "one name, two protocols", text: "Udp: InErrors\nUdp: 1\nUdpLite: InErrors\nUdpLite: 2\n", want: Counters{"Udp.InErrors": 1, "UdpLite.InErrors": 2}},
		{name: "fewer values", text: "Tcp: a b\nTcp: 1\n", err: "Tcp: 1 values for 2 names"},
		{name: "more values", text: "Tcp: a\nTcp: 1 2\n", err: "Tcp: more values than the 1 names"},
		{name: "other protocol", text: "Tcp: a\nUdp: 1\n", err: "not by their values"},
		{name: "protocol that begins alike", text: "UdpLite: a\nUdp: 1\n", err: "not by their values"},
		{name: "values missing", text: "Tcp: a\n", err: "not by their values"},
		{name: "no number", text: "Tcp: a\nTcp: x\n", err: "Tcp.a: "},
		{name: "beyond 63 bits", text: "Tcp: a\nTcp: 18446744073709551615\n", err: "Tcp.a: "},
	} {
		t.Run(tc.name, func(t *testing.T) {
			p := newParser()
			values, err := p.pairs([]byte(tc.text), nil)
			if tc.err != "" {
				require.ErrorContains(t, err, tc.err)
				return
			}
			require.NoError(t, err)
			got := Counters{}
			for id, v := range values {
				got[p.names[id]] = v
			}
			assert.Empty(t, cmp.Diff(tc.want, got))
		})
	}
}

func TestParseSockstat(t *testing.T) {
	for _, tc := range []struct {
		name, text, err string
	}{
		{"no protocol", "TCP inuse 1\n", "has no protocol"},
		{"name without value", "TCP: inuse 1 tw\n", "sockstat.TCP.tw has no value"},
		{"no number", "TCP: inuse many\n", "sockstat.TCP.inuse: "},
	} {
		t.Run(tc.name, func(t *testing.T) {
			_, err := newParser().sockstat([]byte(tc.text), nil)
			require.ErrorContains(t, err, tc.err)
		})
	}
}

// A row may gain names while a run goes on; the others keep their ids.
func TestParseGrowingRow(t *testing.T) {
	p := newParser()
	values, err := p.pairs([]byte("IcmpMsg: InType3\nIcmpMsg: 5\nTcp: a\nTcp: 7\n"), nil)
	require.NoError(t, err)
	assert.Equal(t, []int64{5, 7}, values)
	values, err = p.pairs([]byte("IcmpMsg: InType3 OutType8\nIcmpMsg: 6 1\nTcp: a\nTcp: 8\n"), values)
	require.NoError(t, err)
	assert.Equal(t, []int64{6, 8, 1}, values)
	assert.Equal(t, []string{"IcmpMsg.InType3", "Tcp.a", "IcmpMsg.OutType8"}, p.names)
}

func TestCountersSub(t *testing.T) {
	before := Counters{"a": 1, "gone": 4, "same": 9}
	after := Counters{"a": 5, "new": 3, "same": 9}
	want := Counters{"a": 4, "gone": -4, "new": 3, "same": 0}
	assert.Empty(t, cmp.Diff(want, after.Sub(before)))
}

// What parses once parses again to the same, whether or not the names are known.
func FuzzParse(f *testing.F) {
	texts := fixtureTexts(f)
	f.Add(texts["netstat"], texts["sockstat"])
	f.Add(texts["snmp"], []byte("TCP: inuse 5 orphan 0\n"))
	f.Add([]byte("Tcp: a b\nTcp: 1 -2\n"), []byte("x: y 1"))
	f.Add([]byte("Tcp: a\nUdp: 1\n"), []byte("TCP: inuse"))
	f.Add([]byte(":\n:\n"), []byte(":"))
	f.Fuzz(func(t *testing.T, pairs, sockstat []byte) {
		p := newParser()
		texts := map[string][]byte{"netstat": pairs, "sockstat": sockstat}
		first, values, err := parseTexts(p, texts, nil)
		if err != nil {
			return
		}
		if len(values) != len(p.names) {
			t.Fatalf("%d values for %d names", len(values), len(p.names))
		}
		second, _, err := parseTexts(p, texts, values)
		if err != nil {
			t.Fatalf("parsed once, then: %v", err)
		}
		if diff := cmp.Diff(first, second); diff != "" {
			t.Fatal(diff)
		}
	})
}
