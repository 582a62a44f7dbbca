package wire

import (
	"bytes"
	"slices"
	"testing"

	"github.com/gopacket/gopacket/layers"
	"github.com/stretchr/testify/assert"
	"github.com/stretchr/testify/require"
)

// toa is the data of an option that carries vip: port and address.
var toa = []byte{0x18, 0xeb, 10, 8, 3, 4}

const kindTOA = 250

func TestOption(t *testing.T) {
	_, s := segmentOf(t, synFrame(t))
	data, ok := s.Option(2)
	assert.True(t, ok)
	assert.Equal(t, []byte{0x05, 0xb4}, data, "MSS")
	data, ok = s.Option(4)
	assert.True(t, ok, "SACK permitted has no data and is there")
	assert.Empty(t, data)
	data, ok = s.Option(3)
	assert.True(t, ok)
	assert.Equal(t, []byte{7}, data, "window scale, behind a no-operation")
	for _, kind := range []byte{0, 1, kindTOA} {
		_, ok = s.Option(kind)
		assert.False(t, ok, "kind %d", kind)
	}
	mss, _ := s.Option(2)
	assert.Equal(t, 2, cap(mss), "appending to it does not write into the next option")

	_, s = segmentOf(t, with(synFrame(t), atOptions, 0))
	_, ok = s.Option(4)
	assert.False(t, ok, "behind the end of the list there is nothing")
}

func TestAddOption(t *testing.T) {
	withOptions := func(b ...byte) []byte {
		frame := segmentFrame(t, []byte("abc"), func(_ *layers.IPv4, tcp *layers.TCP) {
			for range len(b) {
				tcp.Options = append(tcp.Options, layers.TCPOption{OptionType: layers.TCPOptionKindNop, OptionLength: 1})
			}
		})
		copy(frame[atOptions:], b)
		return corrected(t, frame)
	}
	for _, row := range []struct {
		name  string
		frame []byte
		want  []byte // the options afterwards
	}{
		{"none before", withOptions(), append([]byte{kindTOA, 8}, toa...)},
		{"whole words before", withOptions(2, 4, 5, 180), append([]byte{2, 4, 5, 180, kindTOA, 8}, toa...)},
		{
			"padding with end of list gives way, and the option begins at an odd byte",
			withOptions(3, 3, 7, 0), append(append([]byte{3, 3, 7, kindTOA, 8}, toa...), 1),
		},
		{
			"there is room behind the end of the list: the header does not grow",
			withOptions(2, 4, 5, 180, 0, 9, 9, 9, 9, 9, 9, 9, 9, 9, 9, 9),
			append(append([]byte{2, 4, 5, 180, kindTOA, 8}, toa...), 1, 1, 1, 1),
		},
	} {
		t.Run(row.name, func(t *testing.T) {
			for _, trailer := range []string{"", "padding"} {
				require.True(t, checksumsOf(t, row.frame).valid())
				p, s := segmentOf(t, append(slices.Clone(row.frame), trailer...))
				require.NoError(t, s.AddOption(kindTOA, toa))
				assert.Equal(t, row.want, p.Frame()[atOptions:atOptions+len(row.want)])
				assert.Equal(t, "abc"+trailer, string(p.Frame()[atOptions+len(row.want):]))
				assert.Equal(t, "abc", string(s.Payload()))
				got, ok := s.Option(kindTOA)
				assert.True(t, ok)
				assert.Equal(t, toa, got)

				c := checksumsOf(t, p.Frame())
				assert.True(t, c.valid(), "%+v", c)
				seen := decodedTCP(t, p.Frame())
				assert.EqualValues(t, 5+len(row.want)/4, seen.DataOffset)
				assert.Equal(t, "abc", string(seen.Payload))
				assert.True(t, slices.ContainsFunc(seen.Options, func(o layers.TCPOption) bool {
					return o.OptionType == kindTOA && bytes.Equal(o.OptionData, toa)
				}), "another parser finds it: %v", seen.Options)

				// What was parsed is still true of the frame.
				_, again := segmentOf(t, p.Frame())
				assert.Equal(t, [3]int{s.ip, s.tcp, s.total}, [3]int{again.ip, again.tcp, again.total})
			}
		})
	}
}

// corrected is a frame with its TCP checksum as gopacket computes it.
func corrected(t testing.TB, frame []byte) []byte {
	right := checksumsOf(t, frame).tcp.Correct
	return with(frame, atTCP+tcpChecksumAt, byte(right>>8), byte(right))
}

func TestAddOptionRefuses(t *testing.T) {
	full := func(options int) []byte {
		return segmentFrame(t, nil, func(_ *layers.IPv4, tcp *layers.TCP) {
			tcp.Options = []layers.TCPOption{{OptionType: 5, OptionLength: uint8(options), OptionData: make([]byte, options-2)}}
		})
	}
	sized := func(total int) []byte { return segmentFrame(t, make([]byte, total-ipv4Size-tcpSize), nil) }
	for _, row := range []struct {
		name  string
		frame []byte
		kind  byte
		data  []byte
		want  error
	}{
		{"the last room", full(32), kindTOA, toa, nil},
		{"one byte too few", full(33), kindTOA, toa, ErrNoRoom},
		{"a full header", full(40), kindTOA, nil, ErrNoRoom},
		{"the longest data", sized(40), kindTOA, make([]byte, 38), nil},
		{"data longer than any header", sized(40), kindTOA, make([]byte, 39), ErrNoRoom},
		{"data whose length does not fit its byte", sized(40), kindTOA, make([]byte, 256), ErrNoRoom},
		{"just the MTU", sized(1492), kindTOA, toa, nil},
		{"a word over the MTU, as padding counts", sized(1493), kindTOA, toa, ErrTooBig},
		{"over the MTU", sized(1500), kindTOA, toa, ErrTooBig},
		{"end of list is no option", sized(40), 0, nil, errKind},
		{"no operation carries nothing", sized(40), 1, toa, errKind},
	} {
		t.Run(row.name, func(t *testing.T) {
			p, s := segmentOf(t, row.frame)
			before := *s
			err := s.AddOption(row.kind, row.data)
			require.ErrorIs(t, err, row.want)
			if row.want != nil {
				assert.Equal(t, row.frame, p.Frame(), "unchanged")
				assert.Equal(t, before, *s)
				return
			}
			got, ok := s.Option(row.kind)
			assert.True(t, ok)
			assert.Equal(t, row.data, got)
			assert.True(t, checksumsOf(t, p.Frame()).valid())
		})
	}

	t.Run("no room in the buffer", func(t *testing.T) { // padding that no MTU counts
		frame := append(sized(100), make([]byte, frameSize-1-114)...)
		p, s := segmentOf(t, frame)
		assert.ErrorIs(t, s.AddOption(kindTOA, toa), ErrTooBig)
		assert.Equal(t, frame, p.Frame())
	})
}

func TestAddOptionTwice(t *testing.T) {
	p, s := segmentOf(t, synFrame(t))
	require.NoError(t, s.AddOption(kindTOA, toa))
	require.NoError(t, s.AddOption(254, []byte{1, 2, 3, 4, 5}))
	first, ok := s.Option(kindTOA)
	require.True(t, ok)
	assert.Equal(t, toa, first)
	second, ok := s.Option(254)
	require.True(t, ok)
	assert.Equal(t, []byte{1, 2, 3, 4, 5}, second)
	assert.True(t, checksumsOf(t, p.Frame()).valid())
	assert.ErrorIs(t, s.AddOption(kindTOA, toa), ErrNoRoom, "20 of Linux, 8 and 8: 36 of 40")
}
