package exporter

import (
	"context"
	"errors"
	"fmt"
	"net"
	"net/http"
	"net/netip"
	"os"
	"time"

	"github.com/prometheus/client_golang/prometheus"
	"github.com/prometheus/client_golang/prometheus/promhttp"
	"golang.org/x/sys/unix"

	"connlab/netlab"
)

// Handler serves the metrics under every path.
func (e *Exporter) Handler() http.Handler {
	registry := prometheus.NewRegistry()
	registry.MustRegister(e)
	return promhttp.HandlerFor(registry, promhttp.HandlerOpts{})
}

// Serve serves /metrics on the listener, which it takes over, until stop is called.
// Stop waits a second for scrapes that go on and then cuts them off; its error is that
// of a server that had ended by itself. It is called once.
func (e *Exporter) Serve(l net.Listener) (stop func() error) {
	mux := http.NewServeMux()
	mux.Handle("GET /metrics", e.Handler())
	server := &http.Server{Handler: mux, ReadHeaderTimeout: 10 * time.Second}
	ended := make(chan error, 1)
	go func() { ended <- server.Serve(l) }()
	return func() error {
		ctx, cancel := context.WithTimeout(context.Background(), time.Second)
		defer cancel()
		err := server.Shutdown(ctx)
		if errors.Is(err, context.DeadlineExceeded) {
			err = server.Close()
		}
		if served := <-ended; !errors.Is(served, http.ErrServerClosed) {
			err = errors.Join(err, served)
		}
		if err != nil {
			return fmt.Errorf("serving metrics: %w", err)
		}
		return nil
	}
}

// Listen listens inside a host's namespace, on an IPv4 address of the host's own or its
// loopback, so that a Prometheus on that host can scrape. Port 0 is any that is free.
// The listener and its connections are the host's, and show up in what is exported.
func Listen(h *netlab.Host, at netip.AddrPort) (net.Listener, error) {
	if !at.Addr().Is4() {
		return nil, fmt.Errorf("host %s: listening at %v: not an IPv4 address", h.Name(), at)
	}
	fd, err := h.Socket()
	if err != nil {
		return nil, err
	}
	// The listener has a descriptor of its own (net.FileListener), and this is closed.
	file := os.NewFile(uintptr(fd), "listener")
	err = os.NewSyscallError("setsockopt", unix.SetsockoptInt(fd, unix.SOL_SOCKET, unix.SO_REUSEADDR, 1))
	if err == nil {
		err = os.NewSyscallError("bind", unix.Bind(fd, &unix.SockaddrInet4{Addr: at.Addr().As4(), Port: int(at.Port())}))
	}
	if err == nil {
		err = os.NewSyscallError("listen", unix.Listen(fd, unix.SOMAXCONN))
	}
	var l net.Listener
	if err == nil {
		l, err = net.FileListener(file)
	}
	if err = errors.Join(err, file.Close()); err != nil {
		return nil, fmt.Errorf("host %s: listening at %v: %w", h.Name(), at, err)
	}
	return l, nil
}
