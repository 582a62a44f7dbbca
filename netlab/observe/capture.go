package observe

import (
	"bufio"
	"errors"
	"fmt"
	"io"
	"runtime"
	"slices"
	"sync"
	"time"

	"github.com/gopacket/gopacket"
	"github.com/gopacket/gopacket/layers"
	"github.com/gopacket/gopacket/pcapgo"

	"connlab/netlab"
)

// CapturePoint is an interface of a host.
type CapturePoint struct {
	Host      *netlab.Host
	Interface string // "" is eth0, the host's first link
}

func (p CapturePoint) String() string { return p.Host.Name() + " " + p.Interface }

// CaptureConfig says what to capture.
type CaptureConfig struct {
	Points []CapturePoint
	// Port keeps the TCP segments over IPv4 that come from this port or go to it;
	// 0 keeps every frame.
	Port uint16
	// SnapLen is how many bytes of each frame are written; 0 writes all of it.
	SnapLen int
	// Comment is written at the head of the file.
	Comment string
	// Limit is how many packets are written at most; 0 is [DefaultCaptureLimit].
	// Reaching it ends the capture.
	Limit int64
}

// DefaultCaptureLimit bounds a capture that somebody forgot: a file of some 100 MB
// if the packets are small.
const DefaultCaptureLimit = 1_000_000

// CaptureStats says what became of a capture.
type CaptureStats struct {
	Points       []PointStats // as they were in the config
	LimitReached bool         // there may have been more packets
}

// PointStats is the account of one capture point.
type PointStats struct {
	Host, Interface string
	Packets         int64 // written
	// Dropped counts the packets that passed the filter and found the capture's
	// buffer full (tp_drops of PACKET_STATISTICS, packet(7)). A capture that
	// dropped is no evidence that a packet was not there.
	Dropped int64
}

// Capture writes the packets of some hosts' interfaces into one pcapng file while
// it runs.
//
// The file has one interface for each point, named "client eth0", with the
// filter, the direction of every packet as the host sees it, and at the end how
// many packets the kernel counted and dropped. Times are the kernel's, taken as
// a packet passes the interface, so one packet appears at both ends of a link
// with the time between.
//
// Packets are written in order of their times. They come from several sockets,
// so each is held back until all that were stamped before it must have arrived
// (see captureSlack); a CPU that stamps a packet and is then kept from queueing
// it for longer makes an exception. Wireshark's "reordercap" mends those.
//
// What a veth link shows are packets before a network card would have finished
// them: with checksums not filled in, which Wireshark calls bad when it is asked
// to check them, and with several segments merged into one of up to 64 KB. On a
// pumped link every packet is complete and no larger than the MTU.
type Capture struct {
	points  []CapturePoint
	sockets []*packetSocket
	limit   int64
	snapLen int

	file  *pcapgo.NgWriter
	held  []packet
	stats CaptureStats

	stopping chan struct{}
	running  sync.WaitGroup
	err      error // of run; read once it has ended
	stop     func() (CaptureStats, error)
}

// captureEvery is how often a capture empties its sockets. Their buffers hold
// much more than what arrives meanwhile, and to wake up for every packet would
// take the processor from the experiment.
const captureEvery = 5 * time.Millisecond

// captureSlack is how long a packet may take from its stamp into the socket's
// buffer, for the file to be in order. It takes microseconds while its CPU is
// not interrupted.
const captureSlack = time.Millisecond

// captureBatch bounds what is taken from one socket before the others have
// their turn.
const captureBatch = 8192

// StartCapture begins to capture into w, in the pcapng format, and returns once
// every point is open: no packet after that is missed. The caller must call
// [Capture.Stop] in any case, and before the lab goes down: the sockets keep the
// namespaces alive. An interface that goes down ends the capture with an error.
func StartCapture(w io.Writer, cfg CaptureConfig) (*Capture, error) {
	cfg, err := cfg.checked()
	if err != nil {
		return nil, fmt.Errorf("capture: %w", err)
	}
	c := &Capture{points: cfg.Points, limit: cfg.Limit, snapLen: cfg.SnapLen, stopping: make(chan struct{})}
	if err := c.openFile(w, cfg); err != nil {
		return nil, fmt.Errorf("capture: writing: %w", err)
	}
	if err := c.openSockets(cfg.Port); err != nil {
		return nil, errors.Join(fmt.Errorf("capture: %w", err), c.close())
	}
	c.stop = sync.OnceValues(func() (CaptureStats, error) {
		close(c.stopping)
		c.running.Wait()
		return c.stats, c.err
	})
	c.running.Go(func() { c.err = c.run() })
	return c, nil
}

// checked is cfg with its defaults filled in.
func (cfg CaptureConfig) checked() (CaptureConfig, error) {
	if len(cfg.Points) == 0 {
		return cfg, errors.New("no point to capture at")
	}
	cfg.Points = slices.Clone(cfg.Points)
	for i := range cfg.Points {
		p := &cfg.Points[i]
		if p.Host == nil {
			return cfg, fmt.Errorf("point %d has no host", i)
		}
		if p.Interface == "" {
			p.Interface = "eth0"
		}
		if slices.Contains(cfg.Points[:i], *p) {
			return cfg, fmt.Errorf("%v is captured twice", p)
		}
	}
	if cfg.SnapLen < 0 || cfg.Limit < 0 {
		return cfg, fmt.Errorf("a snap length of %d or a limit of %d makes no sense", cfg.SnapLen, cfg.Limit)
	}
	if cfg.SnapLen == 0 || cfg.SnapLen > maxFrame {
		cfg.SnapLen = maxFrame
	}
	if cfg.Limit == 0 {
		cfg.Limit = DefaultCaptureLimit
	}
	return cfg, nil
}

// openFile writes what stands before the packets, so that a file which cannot be
// written is known at once.
func (c *Capture) openFile(w io.Writer, cfg CaptureConfig) error {
	filter := ""
	if cfg.Port != 0 {
		filter = fmt.Sprintf("ip and tcp port %d", cfg.Port)
	}
	for i, p := range cfg.Points {
		iface := pcapgo.NgInterface{
			Name: p.String(), Filter: filter, OS: runtime.GOOS,
			LinkType: layers.LinkTypeEthernet, SnapLength: uint32(cfg.SnapLen),
		}
		var err error
		if i == 0 {
			c.file, err = pcapgo.NewNgWriterInterface(bufio.NewWriterSize(w, 64<<10), iface, pcapgo.NgWriterOptions{
				SectionInfo: pcapgo.NgSectionInfo{Application: "connlab", Comment: cfg.Comment, Hardware: runtime.GOARCH, OS: runtime.GOOS},
			})
		} else {
			_, err = c.file.AddInterface(iface)
		}
		if err != nil {
			return err
		}
		c.stats.Points = append(c.stats.Points, PointStats{Host: p.Host.Name(), Interface: p.Interface})
	}
	return c.file.Flush()
}

// openSockets leaves those that it opened in c even after an error.
func (c *Capture) openSockets(port uint16) error {
	stamping, err := awaitStamps(c.points[0].Host)
	if err != nil {
		return err
	}
	for _, p := range c.points {
		s, err := openPacketSocket(p, port, c.snapLen)
		if err != nil {
			return errors.Join(err, stamping.close())
		}
		c.sockets = append(c.sockets, s)
	}
	return stamping.close()
}

func (c *Capture) close() error {
	var errs []error
	for _, s := range c.sockets {
		errs = append(errs, s.close())
	}
	return errors.Join(errs...)
}

// Stop ends the capture, writes what had arrived and was not written yet, and
// closes the sockets; w stays open. An error says why the capture broke off; the
// file is then good up to there, if it could be written at all. It is safe to
// call again and returns the same.
func (c *Capture) Stop() (CaptureStats, error) { return c.stop() }

// run captures until it is stopped, the limit is reached or something fails.
func (c *Capture) run() error {
	err := c.capture()
	if err == nil {
		err = c.writeAccounts()
	}
	if err != nil {
		err = fmt.Errorf("capture: %w", err)
	}
	return errors.Join(err, c.close())
}

func (c *Capture) capture() error {
	ticker := time.NewTicker(captureEvery)
	defer ticker.Stop()
	for !c.stats.LimitReached {
		select {
		case <-c.stopping:
			return c.drain()
		case <-ticker.C:
		}
		upTo, err := c.read()
		if err != nil {
			return err
		}
		if err := c.write(upTo.Add(-captureSlack)); err != nil {
			return err
		}
	}
	return nil
}

// drain takes and writes all that arrived until now. What goes on arriving does
// not keep it.
func (c *Capture) drain() error {
	end := time.Now()
	for !c.stats.LimitReached {
		upTo, err := c.read()
		if err != nil {
			return err
		}
		if !upTo.Before(end) {
			return c.write(time.Unix(1<<40, 0)) // all
		}
		if err := c.write(upTo.Add(-captureSlack)); err != nil {
			return err
		}
	}
	return nil
}

// read takes what the sockets have. What they still have, or will have, is from
// upTo on, but for the slack.
func (c *Capture) read() (upTo time.Time, err error) {
	upTo = time.Now()
	for i, s := range c.sockets {
		for n := 1; ; n++ {
			p, ok, err := s.read()
			if err != nil {
				return upTo, err
			}
			if !ok {
				break
			}
			p.point = i
			c.held = append(c.held, p)
			if n == captureBatch {
				if p.at.Before(upTo) {
					upTo = p.at
				}
				break
			}
		}
	}
	return upTo, nil
}

// write writes the held packets from before upTo, and passes on what is written
// so far.
func (c *Capture) write(upTo time.Time) error {
	due := takeBefore(&c.held, upTo)
	if len(due) == 0 {
		return nil
	}
	if left := c.limit - c.written(); int64(len(due)) >= left {
		due = due[:left]
		c.stats.LimitReached = true
	}
	for i := range due {
		p := &due[i]
		info := gopacket.CaptureInfo{
			Timestamp: p.at, InterfaceIndex: p.point,
			CaptureLength: len(p.data), Length: p.length,
		}
		if err := c.file.WritePacketWithOptions(info, p.data, pcapgo.NgPacketOptions{Flags: p.direction()}); err != nil {
			return fmt.Errorf("writing: %w", err)
		}
		c.stats.Points[p.point].Packets++
	}
	return c.flush()
}

func (c *Capture) written() (n int64) {
	for _, p := range c.stats.Points {
		n += p.Packets
	}
	return n
}

func (c *Capture) flush() error {
	if err := c.file.Flush(); err != nil {
		return fmt.Errorf("writing: %w", err)
	}
	return nil
}

// writeAccounts ends the file with what the kernel counted at each point.
func (c *Capture) writeAccounts() error {
	for i, s := range c.sockets {
		seen, dropped, err := s.counts()
		if err != nil {
			return err
		}
		c.stats.Points[i].Dropped = int64(dropped)
		now := time.Now()
		err = c.file.WriteInterfaceStats(i, pcapgo.NgInterfaceStatistics{
			LastUpdate: now, EndTime: now, PacketsReceived: uint64(seen), PacketsDropped: uint64(dropped),
		})
		if err != nil {
			return fmt.Errorf("writing: %w", err)
		}
	}
	return c.flush()
}

// packet is one that was captured.
type packet struct {
	point    int
	at       time.Time
	length   int    // on the wire
	data     []byte // as much of it as was kept
	outbound bool
}

var (
	inboundFlags  = pcapgo.NgEpbFlags{Direction: pcapgo.NgEpbFlagDirectionInbound}
	outboundFlags = pcapgo.NgEpbFlags{Direction: pcapgo.NgEpbFlagDirectionOutbound}
)

func (p *packet) direction() *pcapgo.NgEpbFlags {
	if p.outbound {
		return &outboundFlags
	}
	return &inboundFlags
}

// takeBefore takes the packets from before a time out of held, in the order of
// their times; those of one time stay in the order in which they came.
func takeBefore(held *[]packet, before time.Time) []packet {
	slices.SortStableFunc(*held, func(a, b packet) int { return a.at.Compare(b.at) })
	n, _ := slices.BinarySearchFunc(*held, before, func(p packet, t time.Time) int { return p.at.Compare(t) })
	due := (*held)[:n]
	*held = slices.Clone((*held)[n:])
	return due
}
