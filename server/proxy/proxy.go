package proxy

import (
	"bufio"
	"context"
	"errors"
	"fmt"
	"net"
	"net/netip"
	"sync"
	"sync/atomic"
	"syscall"
	"time"

	"golang.org/x/sys/unix"
)

// Proxy is a listening proxy. [New] makes it, Serve runs it.
type Proxy struct {
	cfg      Config
	listener *net.TCPListener
	dialer   net.Dialer

	accepted, acceptErrors atomic.Int64
	outcomes               [outcomes]atomic.Int64
	toUpstream, toClient   atomic.Int64

	logMu sync.Mutex // one line at a time
}

// outcome is how a connection ended.
type outcome int

const (
	closed outcome = iota
	noVIP
	noRoute
	upstreamFailed
	clientReset
	upstreamReset
	cutOff
	outcomes // their number
)

// Stats is what a proxy has done so far. Every connection accepted is either open or in exactly one of the columns from
// Closed to CutOff.
type Stats struct {
	Accepted     int64 // connections
	AcceptErrors int64 // times that accepting failed for lack of descriptors or memory, and paused

	Open           int64 // connections that have not ended
	Closed         int64 // relayed; both directions ended in order
	NoVIP          int64 // reset: the VIP could not be learned, and no default was set or could be used
	NoRoute        int64 // reset: no route has the VIP
	UpstreamFailed int64 // reset: the upstream did not accept
	ClientReset    int64 // relayed; the client reset the connection, or was given up by TCP
	UpstreamReset  int64 // relayed; the same with the upstream
	CutOff         int64 // closed by the end of Serve

	ToUpstream, ToClient int64 // bytes passed on by connections that have ended, PROXY protocol headers not counted
}

// keepAlive is Redis's (tcp-keepalive 300: anet.c, anetKeepAlive): the first probe after 300 s of silence, dead after three,
// a third of that apart.
var keepAlive = net.KeepAliveConfig{Enable: true, Idle: 300 * time.Second, Interval: 100 * time.Second, Count: 3}

// New makes a proxy that listens: from its return on the kernel completes connections, which wait for Serve. The network
// namespace is that of the calling thread. An address in use is reported as [unix.EADDRINUSE], wrapped.
func New(cfg Config) (*Proxy, error) {
	if err := cfg.Check(); err != nil {
		return nil, err
	}
	p := &Proxy{cfg: cfg, dialer: net.Dialer{Timeout: cfg.ConnectTimeout, KeepAliveConfig: keepAlive}}
	p.dialer.SetMultipathTCP(false)
	if cfg.Source.IsValid() {
		if err := checkSource(cfg.Source); err != nil {
			return nil, err
		}
		p.dialer.LocalAddr = &net.TCPAddr{IP: cfg.Source.AsSlice()}
		// The port is then chosen by connect(2), which may share it among destinations; bind(2) would take it for good
		// (net/ipv4/af_inet.c, __inet_bind).
		p.dialer.Control = option(unix.IPPROTO_IP, unix.IP_BIND_ADDRESS_NO_PORT, "IP_BIND_ADDRESS_NO_PORT")
	}
	lc := net.ListenConfig{KeepAliveConfig: keepAlive} // net sets SO_REUSEADDR itself
	lc.SetMultipathTCP(false)
	if cfg.Learn == LearnOption {
		lc.Control = option(unix.IPPROTO_TCP, unix.TCP_SAVE_SYN, "TCP_SAVE_SYN")
	}
	l, err := lc.Listen(context.Background(), "tcp4", cfg.Addr.String())
	if err != nil {
		return nil, fmt.Errorf("starting the proxy: %w", err)
	}
	p.listener = l.(*net.TCPListener)
	return p, nil
}

// option returns a control function that sets a socket option to 1.
func option(level, opt int, name string) func(string, string, syscall.RawConn) error {
	return func(_, _ string, raw syscall.RawConn) error {
		var err error
		if e := raw.Control(func(fd uintptr) { err = unix.SetsockoptInt(int(fd), level, opt, 1) }); e != nil {
			err = e
		}
		if err != nil {
			return fmt.Errorf("setting %s: %w", name, err)
		}
		return nil
	}
}

// checkSource reports whether a socket can have the address: better now than with each connection.
func checkSource(a netip.Addr) error {
	fd, err := unix.Socket(unix.AF_INET, unix.SOCK_STREAM|unix.SOCK_CLOEXEC, unix.IPPROTO_TCP)
	if err != nil {
		return fmt.Errorf("creating a TCP socket: %w", err)
	}
	defer unix.Close(fd)
	if err := unix.Bind(fd, &unix.SockaddrInet4{Addr: a.As4()}); err != nil {
		return fmt.Errorf("binding the source address %v: %w", a, err)
	}
	return nil
}

// Addr returns the address that the proxy listens on, with the port that the kernel chose.
func (p *Proxy) Addr() netip.AddrPort { return addrPort(p.listener.Addr().(*net.TCPAddr)) }

// Stats may be called at any time.
func (p *Proxy) Stats() Stats {
	s := Stats{
		Closed: p.outcomes[closed].Load(), NoVIP: p.outcomes[noVIP].Load(), NoRoute: p.outcomes[noRoute].Load(),
		UpstreamFailed: p.outcomes[upstreamFailed].Load(), ClientReset: p.outcomes[clientReset].Load(),
		UpstreamReset: p.outcomes[upstreamReset].Load(), CutOff: p.outcomes[cutOff].Load(),
		ToUpstream: p.toUpstream.Load(), ToClient: p.toClient.Load(),
		AcceptErrors: p.acceptErrors.Load(),
	}
	s.Accepted = p.accepted.Load() // last: a connection is accepted before it ends
	s.Open = s.Accepted - s.Closed - s.NoVIP - s.NoRoute - s.UpstreamFailed - s.ClientReset - s.UpstreamReset - s.CutOff
	return s
}

// String is one line.
func (s Stats) String() string {
	return fmt.Sprintf("accepted %d (open %d, closed %d, no VIP %d, no route %d, upstream failed %d, reset by client %d, reset by upstream %d, cut off %d), accept errors %d, bytes to upstream %d, to client %d",
		s.Accepted, s.Open, s.Closed, s.NoVIP, s.NoRoute, s.UpstreamFailed, s.ClientReset, s.UpstreamReset, s.CutOff, s.AcceptErrors, s.ToUpstream, s.ToClient)
}

// Serve accepts and relays until ctx is done; it then closes the listener and all connections, waits until they are
// closed and returns nil. It returns early with the error if the listener fails. It can be called once.
func (p *Proxy) Serve(ctx context.Context) error {
	ctx, cancel := context.WithCancel(ctx)
	var conns sync.WaitGroup
	defer conns.Wait()
	defer cancel()
	defer p.listener.Close()
	stop := context.AfterFunc(ctx, func() { _ = p.listener.Close() })
	defer stop()
	pause := minPause
	for {
		client, err := p.listener.AcceptTCP()
		switch {
		case err == nil:
			pause = minPause
			p.accepted.Add(1)
			conns.Go(func() { p.handle(ctx, client) })
		case ctx.Err() != nil:
			return nil
		case lacksResources(err):
			// Who waits for accept keeps waiting. Accepting again at once would only burn the CPU.
			p.acceptErrors.Add(1)
			select {
			case <-ctx.Done():
			case <-time.After(pause):
			}
			pause = min(2*pause, maxPause)
		default:
			return fmt.Errorf("accepting: %w", err)
		}
	}
}

// The pause after a failed accept grows from the first to the second.
const (
	minPause = 5 * time.Millisecond
	maxPause = 500 * time.Millisecond
)

// lacksResources reports whether accepting may work again when connections have ended.
func lacksResources(err error) bool {
	for _, lack := range []error{unix.EMFILE, unix.ENFILE, unix.ENOBUFS, unix.ENOMEM} {
		if errors.Is(err, lack) {
			return true
		}
	}
	return false
}

// handle serves one connection and counts how it ended.
func (p *Proxy) handle(ctx context.Context, client *net.TCPConn) {
	a := arrival{client: addrPort(client.RemoteAddr().(*net.TCPAddr)), local: addrPort(client.LocalAddr().(*net.TCPAddr))}
	o, err := p.serve(ctx, client, &a)
	if err != nil && ctx.Err() != nil {
		o, err = cutOff, nil
		_ = client.Close()
	}
	reset(client) // does nothing to one that was closed in order
	p.outcomes[o].Add(1)
	if err != nil && p.cfg.Log != nil {
		vip := "unknown"
		if a.vip.IsValid() {
			vip = a.vip.String()
		}
		p.logMu.Lock()
		defer p.logMu.Unlock()
		fmt.Fprintf(p.cfg.Log, "proxy: client %v, VIP %s: %v\n", a.client, vip, err)
	}
}

// arrival is what is known of a connection before its upstream is open.
type arrival struct {
	client netip.AddrPort // as the PROXY protocol header says if there is one, else the peer
	local  netip.AddrPort // own address
	vip    netip.AddrPort // zero if the connection names none and goes to the default
	early  []byte         // bytes of the client that came with the header
}

// serve takes a connection from its beginning to its end. If it returns an error, the client may still be open.
func (p *Proxy) serve(ctx context.Context, client *net.TCPConn, a *arrival) (outcome, error) {
	stop := context.AfterFunc(ctx, func() { _ = client.Close() }) // the relay then closes the upstream
	defer stop()
	if err := p.learn(client, a); err != nil {
		return noVIP, err
	}
	to, ok := p.upstreamOf(a.vip)
	if !ok {
		return noRoute, errors.New("no route has it")
	}
	conn, err := p.dialer.DialContext(ctx, "tcp4", to.String())
	if err != nil {
		return upstreamFailed, err
	}
	upstream := conn.(*net.TCPConn)
	defer upstream.Close()

	first := a.early
	if p.cfg.SendHeader {
		vip := a.vip
		if !vip.IsValid() {
			vip = a.local
		}
		h, err := header(a.client, vip)
		if err != nil {
			return upstreamFailed, err
		}
		first = append(h, first...)
	}
	r := relay{client: &end{name: "client", conn: client}, upstream: &end{name: "upstream", conn: upstream}}
	if len(first) > 0 {
		// A new connection takes more bytes than the longest header and what can come with it, so this does not wait.
		if _, err := upstream.Write(first); err != nil {
			return upstreamReset, fmt.Errorf("sending the first bytes to upstream %v: %w", to, err)
		}
		r.client.taken.Add(int64(len(a.early)))
	}
	err = r.run()
	p.toUpstream.Add(r.client.taken.Load())
	p.toClient.Add(r.upstream.taken.Load())
	var broken *resetError
	switch {
	case err == nil:
		return closed, nil
	case errors.As(err, &broken) && broken.by == r.client:
		return clientReset, err
	default:
		return upstreamReset, err
	}
}

// learn finds the VIP. It stays the zero value if the connection names none and a default is set.
func (p *Proxy) learn(client *net.TCPConn, a *arrival) error {
	switch p.cfg.Learn {
	case LearnOption:
		syn, err := savedSYN(client)
		if err != nil {
			return err
		}
		a.vip, err = ParseSavedSYN(syn, byte(p.cfg.OptionKind))
		if errors.Is(err, ErrNoOption) && p.cfg.Default.IsValid() {
			return nil
		}
		return err
	case LearnHeader:
		if err := client.SetReadDeadline(time.Now().Add(p.cfg.ConnectTimeout)); err != nil {
			return fmt.Errorf("limiting the wait for the header: %w", err)
		}
		r := bufio.NewReaderSize(client, maxHeader)
		source, vip, err := readHeader(r)
		switch {
		case err == nil:
			a.client, a.vip = source, vip
		case !errors.Is(err, errNoAddress) || !p.cfg.Default.IsValid():
			return err
		}
		if a.early, err = r.Peek(r.Buffered()); err != nil {
			return fmt.Errorf("reading what came with the header: %w", err)
		}
		return client.SetReadDeadline(time.Time{})
	default: // LearnLocal; Check allows no other
		a.vip = a.local
		return nil
	}
}

// upstreamOf returns where a VIP goes, or the default if there is no VIP.
func (p *Proxy) upstreamOf(vip netip.AddrPort) (to netip.AddrPort, ok bool) {
	if !vip.IsValid() {
		return p.cfg.Default, true
	}
	for _, r := range p.cfg.Routes {
		if to, ok := r.Upstream(vip.Addr()); ok {
			return to, true
		}
	}
	return to, false
}
