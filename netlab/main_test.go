package netlab

import (
	"context"
	"errors"
	"fmt"
	"net"
	"net/netip"
	"os"
	"testing"
	"time"

	"github.com/stretchr/testify/assert"
	"github.com/stretchr/testify/require"
)

// roleEnv makes this test binary a program that a test runs.
const roleEnv = "CONNLAB_NETLAB_TEST_ROLE"

func TestMain(m *testing.M) {
	switch role := os.Getenv(roleEnv); role {
	case "":
		os.Exit(m.Run())
	case "listener":
		runListener()
	case "orphan-maker":
		runOrphanMaker()
	default:
		fmt.Fprintln(os.Stderr, "unknown role", role)
		os.Exit(2)
	}
}

// runListener listens on port 7000 a little after it started, and for ever.
func runListener() {
	time.Sleep(50 * time.Millisecond)
	if _, err := net.Listen("tcp4", ":7000"); err != nil {
		fmt.Fprintln(os.Stderr, err)
		os.Exit(1)
	}
	fmt.Fprintln(os.Stdout, "listening")
	select {}
}

// self is this test binary in a role.
func self(role string) Program {
	return Program{Path: "/proc/self/exe", Env: []string{roleEnv + "=" + role}}
}

// requireLab skips a test that this machine cannot run, with the reason; with
// CONNLAB_STRICT=1 it fails instead.
func requireLab(t testing.TB, err error) {
	t.Helper()
	if need, ok := errors.AsType[*NeedError](err); ok {
		if os.Getenv("CONNLAB_STRICT") == "1" {
			t.Fatal(need)
		}
		t.Skip(need)
	}
	require.NoError(t, err)
}

// up stands a topology up for the length of a test.
func up(t testing.TB, top Topology) *Lab {
	t.Helper()
	lab, err := Up(context.Background(), top)
	requireLab(t, err)
	t.Cleanup(func() { assert.NoError(t, lab.Down()) })
	return lab
}

var lan = []SwitchSpec{{Name: "lan", Subnet: netip.MustParsePrefix("10.66.0.0/16")}}

// star is n clients and a server on one switch.
func star(n int) Topology {
	return Topology{
		Switches: lan,
		Hosts:    append(Clients(n, "client", "lan", nil), HostSpec{Name: "server", Links: []LinkSpec{{Switch: "lan"}}}),
	}
}

// await waits until the condition holds.
func await(t testing.TB, what string, condition func() (ok bool, state any)) {
	t.Helper()
	deadline := time.Now().Add(20 * time.Second)
	for {
		ok, state := condition()
		if ok {
			return
		}
		if time.Now().After(deadline) {
			require.FailNow(t, what+": not within 20 s", "last state: %v", state)
		}
		time.Sleep(time.Millisecond)
	}
}
