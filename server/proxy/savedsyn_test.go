package proxy

import (
	"net"
	"net/netip"
	"slices"
	"testing"

	"github.com/stretchr/testify/assert"
	"github.com/stretchr/testify/require"
)

// syn returns the headers of a SYN with the TCP options given, padded to words with zeros, and as many bytes of IP options.
func syn(ipOptions int, options ...byte) []byte {
	for len(options)%4 != 0 {
		options = append(options, 0)
	}
	ip := make([]byte, 20+ipOptions)
	ip[0], ip[9] = 4<<4|byte(len(ip)/4), 6
	tcp := make([]byte, 20, 60)
	tcp[12], tcp[13] = byte((20+len(options))/4)<<4, 2
	return slices.Concat(ip, tcp, options)
}

// changed returns b with one byte set.
func changed(b []byte, at int, to byte) []byte {
	b[at] = to
	return b
}

var (
	vipBytes = []byte{250, 8, 0x18, 0xeb, 10, 8, 3, 232} // port 6379, 10.8.3.232

	// linuxOptions is what a Linux client sends: MSS, SACK permitted, timestamps, NOP, window scale.
	linuxOptions = []byte{2, 4, 0x05, 0xb4, 4, 2, 8, 10, 1, 2, 3, 4, 0, 0, 0, 0, 1, 3, 3, 7}
)

func TestParseSavedSYN(t *testing.T) {
	const vip = "10.8.3.232:6379"
	for _, tt := range []struct {
		why  string
		b    []byte
		want string // the VIP, or part of the error
		none bool   // the error is ErrNoOption
	}{
		{"appended to the options of a Linux client", syn(0, slices.Concat(linuxOptions, vipBytes)...), vip, false},
		{"the only option", syn(0, vipBytes...), vip, false},
		{"behind two NOPs", syn(0, slices.Concat([]byte{1, 1}, vipBytes)...), vip, false},
		{"40 bytes of IP options in front", syn(40, vipBytes...), vip, false},
		{"the first of two counts", syn(0, slices.Concat(vipBytes, []byte{250, 8, 0, 1, 10, 8, 0, 1})...), vip, false},
		{"all zero is a VIP, too", syn(0, 250, 8, 0, 0, 0, 0, 0, 0), "0.0.0.0:0", false},
		{"no options", syn(0), ErrNoOption.Error(), true},
		{"others only", syn(0, linuxOptions...), ErrNoOption.Error(), true},
		{"another kind: TOA", syn(0, 254, 8, 0x18, 0xeb, 10, 8, 3, 232), ErrNoOption.Error(), true},
		{"behind the end of the list", syn(0, slices.Concat([]byte{0}, vipBytes)...), ErrNoOption.Error(), true},
		{"inside another option", syn(0, slices.Concat([]byte{99, 10}, vipBytes)...), ErrNoOption.Error(), true},
		{"another option of length 0", syn(0, slices.Concat([]byte{99, 0}, vipBytes)...), "option 99, with a length that cannot be", true},
		{"another option of length 1", syn(0, slices.Concat([]byte{99, 1}, vipBytes)...), "option 99, with a length that cannot be", true},
		{"another option longer than what is there", syn(0, slices.Concat([]byte{99, 40}, vipBytes)...), "option 99, with a length that cannot be", true},
		{"a kind as the last byte", changed(syn(0, 1, 1, 1, 1), 43, 250), "option 250, with a length that cannot be", true},
		{"cut at the end of the header", syn(0, 250, 8, 0x18, 0xeb), "option 250, with a length that cannot be", true},
		{"6 bytes long", syn(0, 250, 6, 10, 8, 3, 232), "option 250 of the SYN is 6 bytes long, not 8", false},
		{"20 bytes long", syn(0, append([]byte{250, 20}, make([]byte, 18)...)...), "option 250 of the SYN is 20 bytes long, not 8", false},
		{"empty", nil, "does not begin with an IPv4 header", false},
		{"shorter than an IPv4 header", syn(0)[:19], "does not begin with an IPv4 header", false},
		{"IPv6", changed(syn(0, vipBytes...), 0, 0x65), "does not begin with an IPv4 header", false},
		{"an Ethernet header in front", append(make([]byte, 14), syn(0, vipBytes...)...), "does not begin with an IPv4 header", false},
		{"an IPv4 header of 16 bytes", changed(syn(0, vipBytes...), 0, 0x44), "no TCP header", false},
		{"an IPv4 header longer than all", changed(syn(0), 0, 0x4f), "no TCP header", false},
		{"UDP", changed(syn(0, vipBytes...), 9, 17), "no TCP header", false},
		{"half a TCP header", syn(0)[:39], "no TCP header", false},
		{"a TCP header of 16 bytes", changed(syn(0, vipBytes...), 32, 0x40), "bytes of a TCP header of 16", false},
		{"a TCP header longer than all", changed(syn(0, vipBytes...), 32, 0xf0), "28 bytes of a TCP header of 60", false},
	} {
		t.Run(tt.why, func(t *testing.T) {
			got, err := ParseSavedSYN(tt.b, DefaultOptionKind)
			if err == nil {
				assert.Equal(t, tt.want, got.String())
				return
			}
			assert.ErrorContains(t, err, tt.want)
			assert.Zero(t, got)
			if tt.none {
				assert.ErrorIs(t, err, ErrNoOption)
			} else {
				assert.NotErrorIs(t, err, ErrNoOption)
			}
		})
	}
	got, err := ParseSavedSYN(syn(0, 200, 8, 0x18, 0xeb, 10, 8, 3, 232), 200)
	require.NoError(t, err)
	assert.Equal(t, vip, got.String(), "the kind is a setting")
}

// Whatever comes: no panic, and a VIP only if its eight bytes are there.
func FuzzParseSavedSYN(f *testing.F) {
	f.Add(syn(0, slices.Concat(linuxOptions, vipBytes)...), byte(250))
	f.Add(syn(40, vipBytes...), byte(250))
	f.Add(syn(0, 99, 0, 250, 8), byte(250))
	f.Add(syn(0, linuxOptions...), byte(8))
	f.Add(syn(0)[:39], byte(0))
	f.Add([]byte{}, byte(1))
	f.Fuzz(func(t *testing.T, b []byte, kind byte) {
		vip, err := ParseSavedSYN(b, kind)
		if err != nil {
			assert.Zero(t, vip)
			return
		}
		addr := vip.Addr().As4()
		option := append([]byte{kind, 8, byte(vip.Port() >> 8), byte(vip.Port())}, addr[:]...)
		found := false
		for i := 40; i+8 <= len(b) && i+8 <= maxSYN; i++ {
			found = found || slices.Equal(b[i:i+8], option)
		}
		assert.True(t, found, "%v is not in % x", vip, b)
	})
}

// What the kernel returns for a connection over loopback: its IPv4 and TCP headers, no link-layer header, and once only.
func TestSavedSYNOfTheKernel(t *testing.T) {
	p, err := New(config(LearnOption, 1))
	require.NoError(t, err)
	defer p.listener.Close()
	client := dial(t, p.Addr().String())
	c, err := p.listener.AcceptTCP()
	require.NoError(t, err)
	defer c.Close()

	b, err := savedSYN(c)
	require.NoError(t, err)
	_, err = ParseSavedSYN(b, DefaultOptionKind)
	assert.ErrorIs(t, err, ErrNoOption, "% x", b)
	assert.Equal(t, byte(0x45), b[0], "the IPv4 header comes first")
	assert.Equal(t, byte(2), b[33]&0x3f, "of the flags only SYN is set")
	from := netip.AddrPortFrom(netip.AddrFrom4([4]byte(b[12:16])), uint16(b[20])<<8|uint16(b[21]))
	to := netip.AddrPortFrom(netip.AddrFrom4([4]byte(b[16:20])), uint16(b[22])<<8|uint16(b[23]))
	assert.Equal(t, addrPort(client.LocalAddr().(*net.TCPAddr)), from)
	assert.Equal(t, p.Addr(), to)
	assert.Len(t, b, 20+int(b[32]>>4)*4, "both headers and nothing else")

	_, err = savedSYN(c)
	assert.ErrorIs(t, err, errNoSYN, "the kernel has forgotten it")
}

// A listener that does not ask for the SYN gets none.
func TestNoSavedSYN(t *testing.T) {
	p, err := New(config(LearnLocal, 1))
	require.NoError(t, err)
	defer p.listener.Close()
	dial(t, p.Addr().String())
	c, err := p.listener.AcceptTCP()
	require.NoError(t, err)
	defer c.Close()
	_, err = savedSYN(c)
	assert.ErrorIs(t, err, errNoSYN)
}
