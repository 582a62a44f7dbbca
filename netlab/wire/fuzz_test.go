package wire

import (
	"bytes"
	"encoding/binary"
	"errors"
	"net/netip"
	"slices"
	"testing"

	"github.com/gopacket/gopacket/layers"
)

// summed is the Internet checksum of all the bytes, with the checksum field as it
// stands; 0 says that it is right (RFC 1071). It is a computation of its own,
// which shares nothing with the one by difference.
func summed(parts ...[]byte) uint16 {
	sum := uint64(0)
	for _, b := range parts {
		for i, v := range b {
			if i%2 == 0 {
				sum += uint64(v) << 8
			} else {
				sum += uint64(v)
			}
		}
	}
	for sum>>16 != 0 {
		sum = sum&0xffff + sum>>16
	}
	return ^uint16(sum)
}

// residues are what is wrong with the two checksums of a segment; 0 is nothing.
func residues(s *Segment) (ip, tcp uint16) {
	header := s.ipHeader()
	segment := s.packet.buf[ethernetSize+s.ip : ethernetSize+s.total]
	var length [4]byte
	binary.BigEndian.PutUint16(length[2:], uint16(len(segment)))
	return summed(header), summed(header[sourceAt:destinationAt+4], []byte{0, protocolTCP}, length[2:], segment)
}

func FuzzSegment(f *testing.F) {
	syn := synFrame(f)
	for _, frame := range [][]byte{
		nil, syn, synAckFrame(f), dataFrame(f, []byte("GET key")), dataFrame(f, make([]byte, 1448)),
		arpFrame(f), ipv6Frame(f), udpFrame(f), taggedFrame(f),
		syn[:13], syn[:14], syn[:33], syn[:34], syn[:53], syn[:54], syn[:len(syn)-1],
		with(syn, atIP, 0x44), with(syn, atIP, 0x4f), with(syn, atIP, 0x65),
		with(syn, atIP+totalLengthAt, 0xff, 0xff), with(syn, atIP+totalLengthAt, 0, 20),
		with(syn, atIP+fragmentAt, 0x20, 0), with(syn, atIP+fragmentAt, 0x1f, 0xff),
		with(syn, atTCP+dataOffsetAt, 0x40), with(syn, atTCP+dataOffsetAt, 0xf0),
		with(syn, atOptions, 250, 0), with(syn, atOptions, 250, 1), with(syn, atOptions, 250, 21), with(syn, atOptions+17, 1, 1, 250),
		with(syn, atOptions, 0, 255), with(syn, atOptions+19, 0),
		slices.Concat(syn, []byte("padding")),
		segmentFrame(f, []byte("odd"), func(ip *layers.IPv4, _ *layers.TCP) {
			ip.Options = []layers.IPv4Option{{OptionType: 148, OptionLength: 4, OptionData: []byte{0, 0}}}
		}),
	} {
		f.Add(frame, uint64(0x0a4d0009_18eb_0a08), byte(250), []byte{0x18, 0xeb, 10, 8, 3, 4})
	}
	f.Fuzz(func(t *testing.T, frame []byte, seed uint64, kind byte, data []byte) {
		if len(frame) >= frameSize {
			return
		}
		p, err := NewPacket(frame)
		if err != nil {
			t.Fatal(err)
		}
		s, err := p.TCP()
		if err != nil {
			classes := 0
			for _, sentinel := range []error{ErrNotTCP, ErrFragment, ErrMalformed} {
				if errors.Is(err, sentinel) {
					classes++
				}
			}
			if s != nil || classes != 1 || !bytes.Equal(frame, p.Frame()) {
				t.Fatalf("segment %v, error %v of %d classes", s, err, classes)
			}
			return
		}
		// What is beyond the packet must not change.
		outside := func() []byte { return slices.Concat(p.Frame()[:ethernetSize], p.Frame()[ethernetSize+s.total:]) }
		trailer, payload := outside(), slices.Clone(s.Payload())
		seq, ack, flags := s.Seq(), s.Ack(), s.Flags()
		ip, tcp := residues(s)

		check := func(what string) {
			t.Helper()
			gotIP, gotTCP := residues(s)
			if !sameResidue(gotIP, ip) || !sameResidue(gotTCP, tcp) {
				t.Fatalf("%s: checksums wrong by %#x and %#x, before by %#x and %#x", what, gotIP, gotTCP, ip, tcp)
			}
			again, err := NewPacket(p.Frame())
			if err != nil {
				t.Fatal(err)
			}
			o, err := again.TCP()
			if err != nil {
				t.Fatalf("%s: no longer a segment: %v", what, err)
			}
			if o.ip != s.ip || o.tcp != s.tcp || o.total != s.total {
				t.Fatalf("%s: lengths %d, %d, %d; in the frame %d, %d, %d", what, s.ip, s.tcp, s.total, o.ip, o.tcp, o.total)
			}
			if !bytes.Equal(outside(), trailer) || !bytes.Equal(s.Payload(), payload) {
				t.Fatalf("%s: changed what it should not", what)
			}
			if s.Seq() != seq || s.Ack() != ack || s.Flags() != flags {
				t.Fatalf("%s: changed sequence numbers or flags", what)
			}
		}
		check("nothing done")

		var b [8]byte
		binary.BigEndian.PutUint64(b[:], seed)
		to := netip.AddrPortFrom(netip.AddrFrom4([4]byte(b[:])), binary.BigEndian.Uint16(b[4:]))
		from, dest := s.Source(), s.Destination()
		s.SetDestination(to)
		check("destination")
		if s.Destination() != to || s.Source() != from {
			t.Fatalf("from %v to %v", s.Source(), s.Destination())
		}
		s.SetSource(dest)
		check("source")
		if s.Destination() != to || s.Source() != dest {
			t.Fatalf("from %v to %v", s.Source(), s.Destination())
		}

		had, found := s.Option(kind)
		had = slices.Clone(had)
		before := slices.Clone(p.Frame())
		if err := s.AddOption(kind, data); err != nil {
			if !bytes.Equal(before, p.Frame()) {
				t.Fatalf("%v, and the frame changed", err)
			}
			check("option refused")
			return
		}
		check("option")
		got, ok := s.Option(kind)
		if !found {
			had = data
		}
		if !ok || !bytes.Equal(got, had) {
			t.Fatalf("option %d is %x, %v; want %x", kind, got, ok, had)
		}
		if s.total > DefaultMTU {
			t.Fatalf("%d bytes", s.total)
		}
	})
}

// sameResidue says whether two residues are as wrong as each other: 0 and 0xffff
// are the two zeros of one's complement.
func sameResidue(a, b uint16) bool { return a%0xffff == b%0xffff }
