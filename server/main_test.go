package server

import (
	"context"
	"os"
	"os/signal"
	"testing"

	"golang.org/x/sys/unix"
)

// asProgram has the test binary run as the server program, for tests that need one in a process of its own.
const asProgram = "CONNLAB_SERVER_PROGRAM"

func TestMain(m *testing.M) {
	if os.Getenv(asProgram) == "" {
		os.Exit(m.Run())
	}
	ctx, stop := signal.NotifyContext(context.Background(), os.Interrupt, unix.SIGTERM)
	code := Main(ctx, os.Args[1:], os.Stdout, os.Stderr)
	stop()
	os.Exit(code)
}
