package scenarios

import (
	"context"
	"errors"
	"fmt"
	"net"
	"net/netip"
	"os"
	"sync/atomic"
	"time"

	"github.com/gopacket/gopacket"
	"github.com/gopacket/gopacket/layers"

	"connlab/netlab"
)

// synFlood is a device on a switch that sends SYNs from its addresses, and never answers what
// they are answered with.
type synFlood struct {
	to   netip.AddrPort
	n    int
	rate float64

	port *os.File
	at   netlab.Port
	sent atomic.Int64
}

// Attach is a [netlab.Attach]. What comes in is not read: the device's queue is full after 500
// frames, and drops the rest.
func (f *synFlood) Attach(port *os.File, at netlab.Port) (stop func() error, err error) {
	f.port, f.at = port, at
	return func() error { return nil }, nil
}

// floodStep is how often a flood sends what is due.
const floodStep = time.Millisecond

// send sends all SYNs, from different addresses and ports, and returns when it has.
func (f *synFlood) send(ctx context.Context) error {
	toMAC, known := f.at.Neighbour[f.to.Addr()]
	if !known {
		return fmt.Errorf("SYN flood: %v is not on the switch", f.to.Addr())
	}
	began := time.Now()
	for f.sent.Load() < int64(f.n) {
		due := min(int64(f.n), int64(time.Since(began).Seconds()*f.rate)+1)
		for f.sent.Load() < due {
			frame, err := f.frame(int(f.sent.Load()), toMAC)
			if err != nil {
				return fmt.Errorf("SYN flood: %w", err)
			}
			if _, err := f.port.Write(frame); err != nil {
				return fmt.Errorf("SYN flood: %w", err)
			}
			f.sent.Add(1)
		}
		if err := sleep(ctx, floodStep); err != nil {
			return err
		}
	}
	return nil
}

// frame is the i-th SYN.
func (f *synFlood) frame(i int, toMAC net.HardwareAddr) ([]byte, error) {
	from := f.at.Addrs[i%len(f.at.Addrs)]
	ip := &layers.IPv4{Version: 4, TTL: 64, Protocol: layers.IPProtocolTCP, SrcIP: from.AsSlice(), DstIP: f.to.Addr().AsSlice()}
	tcp := &layers.TCP{
		SrcPort: layers.TCPPort(1024 + i/len(f.at.Addrs)), DstPort: layers.TCPPort(f.to.Port()),
		Seq: uint32(i) * 64_000, SYN: true, Window: 64_240,
		Options: []layers.TCPOption{{OptionType: layers.TCPOptionKindMSS, OptionLength: 4, OptionData: []byte{0x05, 0xb4}}},
	}
	buffer := gopacket.NewSerializeBuffer()
	err := errors.Join(
		tcp.SetNetworkLayerForChecksum(ip),
		gopacket.SerializeLayers(buffer, gopacket.SerializeOptions{FixLengths: true, ComputeChecksums: true},
			&layers.Ethernet{SrcMAC: f.at.MAC, DstMAC: toMAC, EthernetType: layers.EthernetTypeIPv4}, ip, tcp),
	)
	return buffer.Bytes(), err
}
