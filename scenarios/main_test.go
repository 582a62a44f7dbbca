package scenarios

import (
	"context"
	"os"
	"os/signal"
	"testing"

	"golang.org/x/sys/unix"

	"connlab/server"
)

// TestMain makes the test binary the mini server when a scenario runs it as
// that: what is under test is a process of its own, as in `connlab run`. As
// killable it is a whole run, to be killed.
func TestMain(m *testing.M) {
	if len(os.Args) > 2 && os.Args[1] == killable {
		os.Exit(runKillable(os.Args[2]))
	}
	if len(os.Args) > 1 && os.Args[1] == "server" {
		ctx, stop := signal.NotifyContext(context.Background(), unix.SIGTERM)
		code := server.Main(ctx, os.Args[2:], os.Stdout, os.Stderr)
		stop()
		os.Exit(code)
	}
	os.Exit(m.Run())
}
