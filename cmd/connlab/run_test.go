package main

import (
	"bufio"
	"context"
	"errors"
	"io"
	"net"
	"net/http"
	"os"
	"path/filepath"
	"regexp"
	"strings"
	"testing"
	"time"

	"github.com/gopacket/gopacket/pcapgo"
	"github.com/stretchr/testify/assert"
	"github.com/stretchr/testify/require"
	"golang.org/x/sys/unix"
)

// What a run could not write at its end is said before it begins: without root,
// too.
func TestRunIntoNoDirectory(t *testing.T) {
	dir := t.TempDir()
	file := filepath.Join(dir, "file")
	require.NoError(t, os.WriteFile(file, nil, 0o600))
	for _, flag := range []string{"--save", "--timeline", "--capture", "--counters"} {
		for _, tt := range []struct{ dir, want string }{
			{filepath.Join(dir, "missing"), "no such file or directory"},
			{file, "not a directory"},
		} {
			o := run("run", "backlog", flag, tt.dir)
			assert.Equal(t, exitUsage, o.code, flag)
			assert.Contains(t, o.stderr, flag+" "+tt.dir+": want a directory to write into: ")
			assert.Contains(t, o.stderr, tt.want)
			assert.Equal(t, 1, strings.Count(o.stderr, "\n"), "one line: %s", o.stderr)
			assert.Empty(t, o.stdout)
		}
	}
}

func TestRunCapture(t *testing.T) {
	needLab(t)
	dir := t.TempDir()
	o := run("run", "tuple-collision", "--variant", "forced-first", "--set", "pairs=2", "--set", "timeout=1500ms", "--capture", dir, "-q")
	require.Equal(t, exitOK, o.code, o.stdout+o.stderr)
	assert.Empty(t, o.stderr)
	file, err := os.Open(filepath.Join(dir, "tuple-collision-forced-first.pcapng"))
	require.NoError(t, err)
	defer file.Close()
	packets, err := pcapgo.NewNgReader(file, pcapgo.DefaultNgReaderOptions)
	require.NoError(t, err)
	seen := map[string]int{}
	for {
		_, info, err := packets.ReadPacketData()
		if errors.Is(err, io.EOF) {
			break
		}
		require.NoError(t, err)
		at, err := packets.Interface(info.InterfaceIndex)
		require.NoError(t, err)
		seen[at.Name]++
	}
	// Two SYNs of the second connection at least, beside all of the first.
	for _, at := range []string{"detector-001 eth0", "proxy-02 eth0"} {
		assert.Greater(t, seen[at], 2, "packets at both ends: %v", seen)
	}
}

// A variant that captures nothing leaves no file, and the run says why.
func TestRunCapturesNothing(t *testing.T) {
	needLab(t)
	dir := t.TempDir()
	o := run(append([]string{"run", "backlog", "--variant", "incident", "--capture", dir, "-q"}, small...)...)
	require.Equal(t, exitOK, o.code, o.stdout+o.stderr)
	assert.Equal(t, "--capture "+dir+": none of these variants captured packets, so nothing was written there\n", o.stderr)
	left, err := os.ReadDir(dir)
	require.NoError(t, err)
	assert.Empty(t, left)
}

// What cannot be served is said before a run begins: without root, too.
func TestRunMetricsNowhere(t *testing.T) {
	taken, err := net.Listen("tcp", "127.0.0.1:0")
	require.NoError(t, err)
	defer taken.Close()
	for _, tt := range []struct{ why, address, want string }{
		{"no port", "127.0.0.1", "want HOST:PORT or :PORT: "},
		{"a port that is none", ":metrics-of-connlab", "unknown port"},
		{"somebody has it", taken.Addr().String(), "address already in use"},
	} {
		t.Run(tt.why, func(t *testing.T) {
			o := run("run", "backlog", "--metrics", tt.address)
			assert.Equal(t, exitUsage, o.code)
			assert.Contains(t, o.stderr, "--metrics "+tt.address+": ")
			assert.Contains(t, o.stderr, tt.want)
			assert.Equal(t, 1, strings.Count(o.stderr, "\n"), "one line: %s", o.stderr)
			assert.Empty(t, o.stdout)
		})
	}
}

// A scrape during the run sees the server overflow, under node_exporter's name, and its
// listener. After the run, which is interrupted then, nothing listens.
func TestRunMetrics(t *testing.T) {
	needLab(t)
	ctx, interrupt := context.WithCancel(t.Context())
	defer interrupt()
	read, write := io.Pipe()
	root := newRoot()
	root.SetArgs(append([]string{"run", "backlog", "--variant", "incident", "--metrics", ":0", "-q"}, small...))
	root.SetOut(io.Discard)
	root.SetErr(write)
	ended := make(chan error, 1)
	go func() {
		ended <- root.ExecuteContext(ctx)
		_ = write.Close()
	}()
	lines := bufio.NewReader(read)
	said, err := lines.ReadString('\n')
	require.NoError(t, err)
	url, ok := strings.CutPrefix(strings.TrimSpace(said), "metrics: ")
	require.True(t, ok, said)
	require.Regexp(t, `^http://127\.0\.0\.1:[1-9][0-9]*/metrics$`, url, "loopback unless one says otherwise")
	go func() { _, _ = io.Copy(io.Discard, lines) }()

	overflows := regexp.MustCompile(`(?m)^node_netstat_TcpExt_ListenOverflows\{host="server",variant="incident"\} [1-9]`)
	limit := regexp.MustCompile(`(?m)^connlab_listen_limit\{.*host="server",.*\} 64$`)
	client := http.Client{Timeout: 10 * time.Second, Transport: &http.Transport{DisableKeepAlives: true}}
	scrape := func() (status int, page string, err error) {
		req, err := http.NewRequestWithContext(t.Context(), http.MethodGet, url, nil)
		require.NoError(t, err)
		resp, err := client.Do(req)
		if err != nil {
			return 0, "", err
		}
		defer resp.Body.Close()
		text, err := io.ReadAll(resp.Body)
		return resp.StatusCode, string(text), err
	}
	deadline := time.Now().Add(time.Minute)
	for overflowed, limited := false, false; !overflowed || !limited; {
		select {
		case err := <-ended:
			require.Fail(t, "the run ended first", "%v; overflow seen: %v, listener seen: %v", err, overflowed, limited)
		case <-time.After(20 * time.Millisecond):
		}
		require.True(t, time.Now().Before(deadline), "overflow seen: %v, listener seen: %v", overflowed, limited)
		status, page, err := scrape()
		require.NoError(t, err)
		require.Equal(t, http.StatusOK, status, page)
		overflowed = overflowed || overflows.MatchString(page)
		limited = limited || limit.MatchString(page)
	}
	interrupt()
	assert.ErrorIs(t, <-ended, context.Canceled)
	_, _, err = scrape()
	assert.ErrorIs(t, err, unix.ECONNREFUSED, "nothing listens after the run")
}
