package netlab

import (
	"context"
	"fmt"
	"os"
	"os/exec"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/stretchr/testify/require"
)

// upDown times one lab of 120 clients and a server.
func upDown(b *testing.B) (up, down time.Duration) {
	begin := time.Now()
	lab, err := Up(context.Background(), star(120))
	requireLab(b, err)
	stands := time.Now()
	require.NoError(b, lab.Down())
	return stands.Sub(begin), time.Since(stands)
}

func BenchmarkUpDown120(b *testing.B) {
	var ups, downs time.Duration
	for range b.N {
		u, d := upDown(b)
		ups += u
		downs += d
	}
	b.ReportMetric(ups.Seconds()*1000/float64(b.N), "up-ms/op")
	b.ReportMetric(downs.Seconds()*1000/float64(b.N), "down-ms/op")
}

// wantedRatio is how many times faster than mininet a lab must stand up and be
// gone; the benchmark fails below.
const wantedRatio = 10

// BenchmarkUpDown120VersusMininet stands the same hosts up on one bridge with
// Debian's mininet and here, in turns on the same machine, and reports medians
// and their ratio. Both leave the deletion of namespaces to the kernel's
// worker, whose work for one round falls into the next.
func BenchmarkUpDown120VersusMininet(b *testing.B) {
	const rounds = 3
	requireMininet(b)
	var ours, theirs []time.Duration
	for range b.N * rounds {
		up, down := upDown(b)
		ours = append(ours, up+down)
		theirs = append(theirs, mininetUpDown(b, 121))
	}
	slices.Sort(ours)
	slices.Sort(theirs)
	mine, other := ours[len(ours)/2], theirs[len(theirs)/2]
	ratio := other.Seconds() / mine.Seconds()
	b.ReportMetric(mine.Seconds(), "netlab-s")
	b.ReportMetric(other.Seconds(), "mininet-s")
	b.ReportMetric(ratio, "mininet/netlab")
	if ratio < wantedRatio {
		b.Fatalf("mininet takes %v, netlab %v: %.1f times as long, want at least %d", other, mine, ratio, wantedRatio)
	}
}

// requireMininet skips where mininet or what its bridge switch calls is missing.
func requireMininet(b *testing.B) {
	requireLab(b, CheckPrivilege())
	for _, need := range []struct{ probe, hint string }{
		{"/usr/bin/python3 -c 'import mininet.net'", "apt-get install mininet"},
		{"command -v brctl", "apt-get install bridge-utils"},
		{"command -v ifconfig", "apt-get install net-tools"},
		{"command -v unshare", "apt-get install util-linux"},
	} {
		if out, err := exec.Command("/bin/sh", "-c", need.probe).CombinedOutput(); err != nil {
			reason := fmt.Sprintf("%s: %v %s; %s", need.probe, err, strings.TrimSpace(string(out)), need.hint)
			if os.Getenv("CONNLAB_STRICT") == "1" {
				b.Fatal(reason)
			}
			b.Skip(reason)
		}
	}
}

// mininetUpDown runs the script in namespaces of its own: mininet's switch and
// the near ends of its links live in the namespace of the script, and every
// host is a process, which ends with the first of its process namespace.
func mininetUpDown(b *testing.B, hosts int) time.Duration {
	ctx, cancel := context.WithTimeout(context.Background(), 2*time.Minute)
	defer cancel()
	cmd := exec.CommandContext(ctx, "unshare", "--net", "--mount", "--pid", "--fork", "--kill-child", "--mount-proc",
		"/usr/bin/python3", "testdata/updown_mininet.py", fmt.Sprint(hosts))
	var stderr strings.Builder
	cmd.Stderr = &stderr
	out, err := cmd.Output()
	require.NoError(b, err, stderr.String())
	var up, down float64
	_, err = fmt.Sscanf(string(out), "up %f down %f", &up, &down)
	require.NoError(b, err, "the script said %q", out)
	return time.Duration((up + down) * float64(time.Second))
}
