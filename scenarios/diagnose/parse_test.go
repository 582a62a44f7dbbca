package diagnose

import (
	"io"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"github.com/google/go-cmp/cmp"
	"github.com/stretchr/testify/assert"
	"github.com/stretchr/testify/require"

	"connlab/netlab/observe"
)

func readTestdata(t testing.TB, name string) File {
	t.Helper()
	text, err := os.ReadFile(filepath.Join("testdata", name))
	require.NoError(t, err)
	return File{Name: name, Text: text}
}

// The fixtures are what nstat of iproute2 6.1 and netstat of net-tools 2.10 print
// for one and the same pair of /proc/net/netstat and /proc/net/snmp.
func TestProgramsAgree(t *testing.T) {
	for _, state := range []struct{ name, why string }{
		{"backlog", "a server after incident 1: most counters are zero, and two programs leave them out"},
		{"every", "each counter has another value: a sentence that is taken for another one shows"},
	} {
		t.Run(state.name, func(t *testing.T) {
			proc, err := Parse(readTestdata(t, state.name+".proc.txt"))
			require.NoError(t, err)
			want := observe.Counters{}
			for _, name := range used() {
				value, there := proc.Counters[name]
				if !there && name == "TcpExt.PAWSPassive" {
					continue // not in this kernel
				}
				require.True(t, there, name)
				want[name] = value
			}
			require.Greater(t, len(want), 15, state.why)

			for _, program := range []string{"nstat-az", "nstat-a", "nstat-azj", "netstat-s"} {
				got, err := Parse(readTestdata(t, state.name+"."+program+".txt"))
				require.NoError(t, err, program)
				for name, value := range want {
					counted, there := got.Counters[name]
					if name == "Tcp.CurrEstab" && strings.HasPrefix(program, "nstat") {
						assert.False(t, there, "%s prints no %s: it is missing, not zero", program, name)
						continue
					}
					assert.True(t, there, "%s: %s is missing", program, name)
					assert.Equal(t, value, counted, "%s: %s", program, name)
				}
			}
		})
	}
}

func TestParse(t *testing.T) {
	for _, tt := range []struct {
		why  string
		text string
		want Snapshot
	}{
		{
			"sockstat: what is the whole machine's is left out",
			"sockets: used 11\nTCP: inuse 8 orphan 188 tw 3 alloc 2866 mem 1041\nUDP: inuse 7 mem 0\n",
			Snapshot{Counters: observe.Counters{"sockstat.TCP.inuse": 8, "sockstat.TCP.tw": 3}},
		},
		{
			"sysctl: those that are used, with or without spaces and tabs",
			"net.ipv4.ip_local_port_range = 32768\t60999\nnet.core.somaxconn=4096\nnet.ipv4.ip_forward = x\n" +
				"sysctl: cannot stat /proc/sys/net/ipv4/tcp_tw_recycle: No such file or directory\n",
			Snapshot{Sysctls: map[string]string{portRange: "32768\t60999", somaxconn: "4096"}},
		},
		{
			"ss -lnt and ss -ln: with and without the column Netid; who does not listen is ignored",
			"State  Recv-Q Send-Q Local Address:Port Peer Address:PortProcess\n" +
				"LISTEN 129    128          0.0.0.0:6379      0.0.0.0:*    users:((\"redis\",pid=1,fd=6))\n" +
				"tcp LISTEN 0 4096 [::]:22 [::]:*\nESTAB 0 0 10.0.0.1:22 10.0.0.2:40000\n",
			Snapshot{Listeners: []Listener{{"0.0.0.0:6379", 129, 128}, {"[::]:22", 0, 4096}}},
		},
		{
			"a part of nstat: what grep left out is missing, not zero",
			"TcpExtListenOverflows           7                  0.0\n",
			Snapshot{Counters: observe.Counters{"TcpExt.ListenOverflows": 7}},
		},
		{
			"a part of netstat -s, without headings",
			"    7 times the listen queue of a socket overflowed\n    TCPTimeWaitOverflow: 3\n    IPReversePathFilter: 1\n",
			Snapshot{Counters: observe.Counters{"TcpExt.ListenOverflows": 7, "TcpExt.TCPTimeWaitOverflow": 3}},
		},
		{
			"netstat -s in another language: a heading is no reason to take counters for zero",
			"TcpExt:\n    7 SYN-Cookies verschickt\n    TCPTimeWaitOverflow: 3\n",
			Snapshot{Counters: observe.Counters{"TcpExt.TCPTimeWaitOverflow": 3}},
		},
		{
			"nstat -z of a few counters begins with a zero somewhere: the others are missing",
			"IpInReceives 1 0.0\nTcpInSegs 1 0.0\nTcpActiveOpens 0 0.0\n",
			Snapshot{Counters: observe.Counters{"Tcp.InSegs": 1, "Tcp.ActiveOpens": 0}},
		},
		{
			"the old spelling of net-tools 1.60",
			"    5 active connections openings\n    6 SYNs to LISTEN sockets ignored\n",
			Snapshot{Counters: observe.Counters{"Tcp.ActiveOpens": 5, "TcpExt.ListenDrops": 6}},
		},
		{
			"saved on Windows on the way",
			"Tcp: MaxConn ActiveOpens\r\nTcp: -1 5\r\n",
			Snapshot{Counters: observe.Counters{"Tcp.MaxConn": -1, "Tcp.ActiveOpens": 5}},
		},
		{
			"twice: the later one counts",
			"TcpActiveOpens 1 0.0\nhello, world\nTcpActiveOpens 2 0.0\n",
			Snapshot{Counters: observe.Counters{"Tcp.ActiveOpens": 2}},
		},
	} {
		if tt.want.Counters == nil {
			tt.want.Counters = observe.Counters{}
		}
		if tt.want.Sysctls == nil {
			tt.want.Sysctls = map[string]string{}
		}
		got, err := Parse(File{"saved", []byte(tt.text)})
		require.NoError(t, err, tt.why)
		assert.Empty(t, cmp.Diff(tt.want, got), tt.why)
	}
}

func TestParseSeveralFiles(t *testing.T) {
	got, err := Parse(
		File{"sockstat", []byte("TCP: inuse 1 orphan 0 tw 2 alloc 3 mem 1\n")},
		File{"sysctl", []byte("net.ipv4.tcp_tw_reuse = 2\n")})
	require.NoError(t, err)
	assert.Equal(t, observe.Counters{"sockstat.TCP.inuse": 1, "sockstat.TCP.tw": 2}, got.Counters)
	assert.Equal(t, map[string]string{twReuse: "2"}, got.Sysctls)
}

func TestParseErrors(t *testing.T) {
	for _, tt := range []struct{ why, text, want string }{
		{"no number", "\nTcpExtListenDrops many 0.0", "reading saved: line 2: TcpExt.ListenDrops"},
		{"a negative count", "TcpExtListenDrops -1 0.0", "line 1: TcpExt.ListenDrops: -1 is negative"},
		{"too large", "    99999999999999999999 SYNs to LISTEN sockets dropped", "line 1: TcpExt.ListenDrops"},
		{"names without values", "TcpExt: ListenDrops", "lines 1 and 2: names of TcpExt: are not followed by their values"},
		{"names of one, values of another", "Tcp: InSegs\nTcpExt: 5", "not followed by their values"},
		{"fewer values than names", "Tcp: InSegs OutSegs\nTcp: 5", "Tcp: 2 names and 1 values"},
		{"a bad value in a row", "Tcp: InSegs OutSegs\nTcp: 5 x", "lines 1 and 2: Tcp.OutSegs"},
		{"sockstat cut off", "TCP: inuse 8 orphan 1 tw", "TCP: a name without a value"},
		{"sockstat without a number", "TCP: inuse 8 tw some", "line 1: sockstat.TCP.tw"},
		{"a range of one port", "net.ipv4.ip_local_port_range = 32768", "line 1: net.ipv4.ip_local_port_range"},
		{"a range backwards", "net.ipv4.ip_local_port_range = 60999 32768", "is not a range of ports"},
		{"a sysctl without a number", "net.core.somaxconn = lots", "line 1: net.core.somaxconn"},
		{"a listener without a queue", "LISTEN x 128 0.0.0.0:6379 0.0.0.0:*", "line 1: a listener's Recv-Q"},
		{"a listener cut off", "LISTEN 0", "line 1: a listener without"},
		{"broken JSON", `{"kernel":{"TcpInSegs":`, "line 1: JSON of nstat"},
		{"a fraction in JSON", `{"kernel":{"TcpInSegs":1.5}}`, "line 1: Tcp.InSegs"},
	} {
		_, err := Parse(File{"saved", []byte(tt.text)})
		require.Error(t, err, tt.why)
		assert.NotErrorIs(t, err, ErrNothing, tt.why)
		assert.Contains(t, err.Error(), tt.want, tt.why)
	}
}

func TestParseNothing(t *testing.T) {
	good := File{"good", []byte("TcpActiveOpens 1 0.0\n")}
	for _, tt := range []struct{ why, text string }{
		{"empty", ""},
		{"another text", "A story about the kernel, with not one counter in it.\n"},
		{"headings only", "Tcp:\nTcpExt:\n"},
		{"only sysctls that nobody needs", "net.ipv4.ip_forward = 1\n"},
	} {
		_, err := Parse(good, File{"bad", []byte(tt.text)})
		require.ErrorIs(t, err, ErrNothing, tt.why)
		assert.Contains(t, err.Error(), "reading bad: ", tt.why)
		assert.Contains(t, err.Error(), "nstat -az", "it says what to save")
	}
}

func FuzzParse(f *testing.F) {
	files, err := filepath.Glob("testdata/*.txt")
	require.NoError(f, err)
	require.NotEmpty(f, files)
	for _, path := range files {
		text, err := os.ReadFile(path)
		require.NoError(f, err)
		f.Add(text)
	}
	f.Add([]byte("TCP: inuse 8 orphan 188 tw 3\nnet.ipv4.ip_local_port_range = 1 2\nLISTEN 1 2 a b\n"))
	f.Fuzz(func(t *testing.T, text []byte) {
		s, err := Parse(File{"fuzz", text})
		if err != nil {
			assert.True(t, strings.HasPrefix(err.Error(), "reading fuzz: "), err)
			return
		}
		assert.NotZero(t, len(s.Counters)+len(s.Sysctls)+len(s.Listeners), "recognised, and nothing is there")
		for name, v := range s.Counters {
			assert.True(t, v >= 0 || name == "Tcp.MaxConn", "%s is %d", name, v)
		}
		// Whatever was read can be diagnosed, and nothing has changed since itself.
		d, err := Diagnose(s, &s)
		require.NoError(t, err)
		for _, found := range d.Findings {
			if found.Incident != Healthy {
				assert.NotEqual(t, Fits, found.Verdict, "%s, and no counter moved", found.Incident)
			}
		}
		require.NoError(t, d.Write(io.Discard))
	})
}
