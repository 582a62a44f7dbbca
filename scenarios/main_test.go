package scenarios

import (
	"context"
	"errors"
	"io"
	"io/fs"
	"os"
	"os/signal"
	"path/filepath"
	"sync/atomic"
	"syscall"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"connlab/loadgen"
	"connlab/server"
	"connlab/server/proxy"
)

// programs are what a scenario starts as processes of their own: the verbs of
// connlab that the test binary takes, too.
var programs = map[string]func(ctx context.Context, args []string, stdout, stderr io.Writer) int{
	"server": server.Main,
	"proxy":  proxy.Main,
	"fleet": func(ctx context.Context, args []string, stdout, stderr io.Writer) int {
		return loadgen.FleetMain(ctx, args, os.Stdin, stdout, stderr)
	},
}

// TestMain makes the test binary the program that a scenario runs it as: what is
// under test is a process of its own, as in `connlab run`. As killable it is a
// whole run, to be killed.
func TestMain(m *testing.M) {
	if len(os.Args) > 3 && os.Args[1] == killable {
		os.Exit(runKillable(os.Args[2], os.Args[3]))
	}
	if len(os.Args) > 1 {
		if program := programs[os.Args[1]]; program != nil {
			ctx, stop := signal.NotifyContext(context.Background(), unix.SIGTERM)
			code := program(ctx, os.Args[2:], os.Stdout, os.Stderr)
			stop()
			os.Exit(code)
		}
	}
	code := m.Run()
	if stamped.Load() {
		if err := stamp(); err != nil {
			panic(err)
		}
	}
	os.Exit(code)
}

// stamped says that a lab has been used.
var stamped atomic.Bool

// runs is where tests save their records.
var runs = filepath.Join("..", "results", "runs")

// stamp keeps go test from ever answering these tests from its cache, which knows
// nothing of the kernel: go does not cache a run that opened a file in the module
// which is less than two seconds old when it looks. It looks in the order in
// which the tests opened files, and looking at all of them takes longer than
// that: so this one is opened before any lab is, and written once more at the end.
func stamp() error {
	stamped.Store(true)
	if err := makeLike(filepath.Dir(runs), runs); err != nil {
		return err
	}
	path := filepath.Join(runs, ".tested")
	if err := os.WriteFile(path, []byte(time.Now().String()), 0o644); err != nil {
		return err
	}
	return ownedLike(runs, path)
}

// makeLike makes a directory that belongs to the owner of another one: a test
// under sudo leaves nothing that its user cannot remove.
func makeLike(like, dir string) error {
	if err := os.Mkdir(dir, 0o755); err != nil && !errors.Is(err, fs.ErrExist) {
		return err
	}
	return ownedLike(like, dir)
}

func ownedLike(like, path string) error {
	info, err := os.Stat(like)
	if err != nil {
		return err
	}
	owner := info.Sys().(*syscall.Stat_t)
	return os.Chown(path, int(owner.Uid), int(owner.Gid))
}
