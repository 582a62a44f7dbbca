package proxy

import (
	"bufio"
	"bytes"
	"io"
	"net/netip"
	"strings"
	"testing"

	"github.com/stretchr/testify/assert"
	"github.com/stretchr/testify/require"
)

// headerV1 and headerV2 are of one connection, written by the specification and not by the library.
const (
	headerV1 = "PROXY TCP4 10.1.0.7 10.8.3.232 45000 6379\r\n"
	sigV2    = "\r\n\r\n\x00\r\nQUIT\n"
	headerV2 = sigV2 + "\x21\x11\x00\x0c" + "\x0a\x01\x00\x07" + "\x0a\x08\x03\xe8" + "\xaf\xc8" + "\x18\xeb"
	localV2  = sigV2 + "\x20\x00\x00\x00"
	ipv6V2   = sigV2 + "\x21\x21\x00\x24" + "0123456789abcdef0123456789abcdef" + "\xaf\xc8\x18\xeb"
)

func TestReadHeader(t *testing.T) {
	client, vip := netip.MustParseAddrPort("10.1.0.7:45000"), netip.MustParseAddrPort("10.8.3.232:6379")
	for _, tt := range []struct {
		why, header string
		vip         bool
		err         error  // nil: see want
		want        string // part of the error
	}{
		{"version 1", headerV1, true, nil, ""},
		{"version 2", headerV2, true, nil, ""},
		{"version 2 with 5 bytes of TLV", strings.Replace(headerV2, "\x00\x0c", "\x00\x11", 1) + "\x04\x00\x02ok", true, nil, ""},
		{"a health check", localV2, false, errNoAddress, ""},
		{"a health check that names addresses all the same", strings.Replace(headerV2, "\x21\x11", "\x20\x11", 1), false, errNoAddress, ""},
		{"UNKNOWN", "PROXY UNKNOWN\r\n", false, errNoAddress, ""},
		{"IPv6, version 1", "PROXY TCP6 ::1 ::2 45000 6379\r\n", false, errNoAddress, ""},
		{"IPv6, version 2", ipv6V2, false, errNoAddress, ""},
		{"UDP", strings.Replace(headerV2, "\x21\x11", "\x21\x12", 1), false, errNoAddress, ""},
		{"no header", "*1\r\n$4\r\nPING\r\n", false, nil, "signature not present"},
		{"nothing", "", false, nil, "signature not present"},
		{"half a header", headerV2[:20], false, nil, "reading the PROXY protocol header"},
		{"a length that is too small", strings.Replace(headerV2, "\x00\x0c", "\x00\x0b", 1), false, nil, "invalid length"},
		{"a length beyond what is read", strings.Replace(headerV2, "\x00\x0c", "\xff\xff", 1) + strings.Repeat("x", 70_000), false, nil, "invalid length"},
		{"version 3", strings.Replace(headerV2, "\x21\x11", "\x31\x11", 1), false, nil, "unsupported proxy protocol version"},
		{"a line without an end", "PROXY TCP4 " + strings.Repeat("1", 200), false, nil, "107 bytes"},
		{"a port of 17 bits", "PROXY TCP4 10.1.0.7 10.8.3.232 45000 65536\r\n", false, nil, "invalid port"},
	} {
		t.Run(tt.why, func(t *testing.T) {
			rest := "*1\r\n$4\r\nPING\r\n"
			if tt.want != "" {
				rest = "" // a header that is cut short must not be completed by it
			}
			r := bufio.NewReaderSize(strings.NewReader(tt.header+rest), maxHeader)
			gotClient, gotVIP, err := readHeader(r)
			switch {
			case tt.vip:
				require.NoError(t, err)
				assert.Equal(t, client, gotClient)
				assert.Equal(t, vip, gotVIP)
			case tt.err != nil:
				require.ErrorIs(t, err, tt.err)
			default:
				require.ErrorContains(t, err, tt.want)
				return
			}
			left, err := io.ReadAll(r)
			require.NoError(t, err)
			assert.Equal(t, rest, string(left), "no byte behind the header is lost")
		})
	}
}

func TestWriteHeader(t *testing.T) {
	b, err := header(netip.MustParseAddrPort("10.1.0.7:45000"), netip.MustParseAddrPort("10.8.3.232:6379"))
	require.NoError(t, err)
	assert.Equal(t, headerV2, string(b))
}

// Whatever comes: no panic, a VIP that is IPv4, and nothing read beyond the header.
func FuzzReadHeader(f *testing.F) {
	for _, seed := range []string{headerV1, headerV2, localV2, ipv6V2, "PROXY UNKNOWN\r\n", "PING\r\n", headerV2[:17], ""} {
		f.Add([]byte(seed))
	}
	f.Fuzz(func(t *testing.T, b []byte) {
		const rest = "*1\r\n"
		r := bufio.NewReaderSize(io.MultiReader(bytes.NewReader(b), strings.NewReader(rest)), maxHeader)
		client, vip, err := readHeader(r)
		if err != nil {
			return
		}
		assert.True(t, client.Addr().Is4() && vip.Addr().Is4(), "%v %v", client, vip)
		left, err := io.ReadAll(r)
		require.NoError(t, err)
		all := string(b) + rest
		assert.True(t, strings.HasSuffix(all, string(left)), "%q left of %q", left, all)
		used := all[:len(all)-len(left)]
		if strings.HasPrefix(used, "PROXY") {
			assert.Equal(t, strings.Index(used, "\n"), len(used)-1, "a version 1 header is one line")
		} else {
			assert.Len(t, used, 16+int(used[14])<<8+int(used[15]), "a version 2 header has its length")
		}
	})
}
