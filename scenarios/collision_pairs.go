package scenarios

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"net/netip"
	"time"

	"github.com/gopacket/gopacket"
	"github.com/gopacket/gopacket/layers"
	"github.com/gopacket/gopacket/pcapgo"

	"connlab/loadgen"
	"connlab/netlab/l4lb"
	"connlab/netlab/observe"
)

// collide opens connections to one VIP of a proxy each, then from the same local
// ports to another VIP of the same proxy, and then looks whether the first still
// work. The packets of one pair are captured at both ends.
func (r *collisionRun) collide(ctx context.Context) (err error) {
	c := r.c
	base, closeUnused, err := r.c.from(r.detectors[0])
	if err != nil {
		return err
	}
	defer closeUnused()
	var from []loadgen.Source
	var first, second []netip.AddrPort
	for i := range c.Pairs {
		port := uint16(c.PortRange.low + i)
		from = append(from, base.Bound(netip.AddrPortFrom(r.detectors[0].Addr(), port)))
		first = append(first, c.target(i%c.Proxies))
		second = append(second, c.target(i%c.Proxies+c.Proxies)) // host numbers k apart: the same proxy
	}
	var file bytes.Buffer
	capture, err := observe.StartCapture(&file, observe.CaptureConfig{
		Points: []observe.CapturePoint{{Host: r.detectors[0]}, {Host: r.proxies[c.group(first[0].Addr())%len(r.proxies)]}},
		Port:   uint16(c.PortRange.low),
		Comment: fmt.Sprintf("connlab tuple-collision %s: local port %d to %v, then to %v, both behind proxy %v, at the client and at the proxy. "+
			"Option 250 of a SYN at the proxy is the VIP: port and address. Replies of the shared tuple come from the %s VIP.",
			r.v.Name, c.PortRange.low, first[0], second[0], proxyAddr(c.group(first[0].Addr())), c.Reply),
	})
	if err != nil {
		return err
	}
	defer capture.Stop() //nolint:errcheck // the first Stop, below, returned the same error

	open := func(targets []netip.AddrPort, timeout time.Duration) (*loadgen.Held, *loadgen.Report, error) {
		return loadgen.Hold(ctx, loadgen.Config{
			Targets: targets, Sources: from, Schedule: loadgen.Constant(c.Rate, time.Hour).First(c.Pairs),
			ConnectTimeout: timeout, ReplyTimeout: timeout,
			OnOp: func(op loadgen.Op) {
				r.add(attempt{size: c.VIPs, Attempt: loadgen.Attempt{
					Target: op.Target, Local: op.Local, Class: op.Class, Err: op.Err, Took: op.Done - op.Started,
				}})
			},
		})
	}
	r.opt.progress("opening %d connections", c.Pairs)
	held, report, err := open(first, c.Timeout)
	if held != nil {
		defer held.Close()
	}
	if err != nil {
		return err
	}
	r.metric(metricFirstOK, float64(report.OK), "connections")

	r.opt.progress("and %d more from the same ports to other VIPs of the same proxies", c.Pairs)
	others, report, err := open(second, c.Timeout)
	if others != nil {
		defer others.Close()
	}
	if err != nil {
		return err
	}
	r.metric(metricSecondOK, float64(report.OK), "connections")
	r.metric(metricSecondTimeout, float64(report.Failed[loadgen.ConnectTimeout]), "connections")
	r.metric(metricSecondSlowest, report.Connect.Quantile(1).Seconds(), "s")
	secondOver := time.Now()

	r.opt.progress("asking the first ones again")
	later, err := loadgen.Run(ctx, loadgen.Config{
		Held: held, Schedule: loadgen.Constant(c.Rate, time.Hour).First(c.Pairs), ReplyTimeout: c.Timeout,
	})
	if err != nil {
		return err
	}
	r.metric(metricFirstLater, float64(later.OK), "connections")
	for class, n := range later.Failed {
		r.metric("clients/First.Later."+string(class), float64(n), "connections")
	}
	if n := later.NotStarted; n > 0 {
		r.metric("clients/First.Later.gone", float64(n), "connections")
	}
	stats, err := capture.Stop()
	if err != nil {
		return err
	}
	for _, p := range stats.Points {
		if p.Dropped > 0 || stats.LimitReached {
			r.v.Void(fmt.Sprintf("the capture at %s is not whole: %d packets dropped, limit reached: %v", p.Host, p.Dropped, stats.LimitReached))
		}
	}
	if r.opt.Capture != nil {
		if err := r.opt.Capture(r.v.Name, file.Bytes()); err != nil {
			return err
		}
	}
	return r.fillCapture(&file, second[0], secondOver)
}

// fillCapture counts the packets of the captured pair, up to the time at which the
// second connection was made or given up.
func (r *collisionRun) fillCapture(file io.Reader, second netip.AddrPort, until time.Time) error {
	reader, err := pcapgo.NewNgReader(file, pcapgo.NgReaderOptions{WantMixedLinkType: true})
	if err != nil {
		return fmt.Errorf("reading the capture: %w", err)
	}
	const atClient, atProxy = 0, 1
	var seen [2]struct{ packets, syns, synACKs, acks int }
	// A challenge ACK acknowledges what the first connection has sent, and nothing
	// of the second.
	collided, acknowledged := false, uint32(0)
	for {
		data, info, err := reader.ReadPacketData()
		if errors.Is(err, io.EOF) {
			break
		}
		if err != nil {
			return fmt.Errorf("reading the capture: %w", err)
		}
		if info.InterfaceIndex > atProxy || info.Timestamp.After(until) {
			continue
		}
		at := &seen[info.InterfaceIndex]
		at.packets++
		packet := gopacket.NewPacket(data, layers.LayerTypeEthernet, gopacket.NoCopy)
		ip, isIP := packet.NetworkLayer().(*layers.IPv4)
		tcp, isTCP := packet.TransportLayer().(*layers.TCP)
		if !isIP || !isTCP {
			continue
		}
		from, _ := netip.AddrFromSlice(ip.SrcIP)
		to, _ := netip.AddrFromSlice(ip.DstIP)
		meant := netip.AddrPortFrom(to, uint16(tcp.DstPort))
		if info.InterfaceIndex == atProxy {
			meant = vipOption(tcp)
		}
		switch {
		case tcp.SYN && !tcp.ACK && meant == second:
			at.syns++
			collided = true
		case tcp.SYN && tcp.ACK && netip.AddrPortFrom(from, uint16(tcp.SrcPort)) == second:
			at.synACKs++
		case !tcp.ACK || tcp.SYN || tcp.RST || tcp.FIN || tcp.SrcPort != redisPort:
		case !collided:
			acknowledged = tcp.Ack
		case len(tcp.Payload) == 0 && tcp.Ack == acknowledged:
			at.acks++
		}
	}
	if seen[atClient].packets == 0 || seen[atProxy].packets == 0 {
		return errNoCapture
	}
	r.metric(metricSeenSYNs, float64(seen[atClient].syns), "packets")
	r.metric(metricSeenAnswers, float64(seen[atClient].synACKs), "packets")
	r.metric(metricSeenAtProxy, float64(seen[atProxy].syns), "packets")
	r.metric(metricSeenChallenge, float64(seen[atProxy].acks), "packets")
	return nil
}

// vipOption is the VIP that the balancer wrote into a SYN.
func vipOption(tcp *layers.TCP) netip.AddrPort {
	for _, o := range tcp.Options {
		if o.OptionType == l4lb.KindTOAVIP && len(o.OptionData) == 6 {
			a, _ := netip.AddrFromSlice(o.OptionData[2:6])
			return netip.AddrPortFrom(a, uint16(o.OptionData[0])<<8|uint16(o.OptionData[1]))
		}
	}
	return netip.AddrPort{}
}
