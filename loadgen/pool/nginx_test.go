package pool

import (
	"bytes"
	"context"
	"fmt"
	"io"
	"math/rand/v2"
	"net"
	"net/http"
	"os"
	"os/exec"
	"path/filepath"
	"runtime"
	"slices"
	"strings"
	"syscall"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"
	"github.com/stretchr/testify/require"
)

// nginx is a real nginx with one worker, in a directory of its own.
type nginx struct {
	client  http.Client
	scripts int
}

func startNginx(t *testing.T) *nginx {
	t.Helper()
	const program = "/usr/sbin/nginx"
	for _, file := range []string{program, "/usr/lib/nginx/modules/ngx_http_lua_module.so", "/usr/lib/nginx/modules/ndk_http_module.so"} {
		if _, err := os.Stat(file); err != nil {
			const reason = "nginx with its Lua module is not installed; install it with: apt-get install nginx libnginx-mod-http-lua"
			if os.Getenv("CONNLAB_STRICT") == "1" {
				t.Fatal(reason)
			}
			t.Skip(reason)
		}
	}
	dir := t.TempDir()
	for _, name := range []string{"nginx.conf", "script.lua"} {
		text, err := os.ReadFile(filepath.Join("testdata", name))
		require.NoError(t, err)
		require.NoError(t, os.WriteFile(filepath.Join(dir, name), text, 0o600))
	}
	var output bytes.Buffer // complete when nginx has exited
	cmd := exec.Command(program, "-p", dir, "-c", "nginx.conf", "-e", "stderr")
	cmd.Dir = dir // where its Unix socket is to be
	cmd.Stdout, cmd.Stderr = &output, &output
	// A test that is killed takes it along. The signal comes when the thread that
	// started it ends, so that one waits for its end.
	cmd.SysProcAttr = &syscall.SysProcAttr{Pdeathsig: syscall.SIGKILL}
	started, exited := make(chan error), make(chan struct{})
	go func() {
		runtime.LockOSThread()
		defer close(exited)
		err := cmd.Start()
		started <- err
		if err == nil {
			_ = cmd.Wait()
		}
	}()
	require.NoError(t, <-started)
	t.Cleanup(func() {
		_ = cmd.Process.Signal(syscall.SIGTERM)
		select {
		case <-exited:
		case <-time.After(10 * time.Second):
			_ = cmd.Process.Kill()
			<-exited
		}
		if t.Failed() {
			t.Logf("nginx said: %s", &output)
		}
	})

	socket := filepath.Join(dir, "http.sock")
	n := &nginx{client: http.Client{Timeout: 30 * time.Second, Transport: &http.Transport{
		DisableKeepAlives: true,
		DialContext: func(ctx context.Context, _, _ string) (net.Conn, error) {
			var d net.Dialer
			return d.DialContext(ctx, "unix", socket)
		},
	}}}
	for deadline := time.Now().Add(10 * time.Second); ; time.Sleep(5 * time.Millisecond) {
		c, err := net.Dial("unix", socket)
		if err == nil {
			_ = c.Close()
			return n
		}
		select {
		case <-exited:
			t.Fatalf("nginx has ended: %s", &output)
		default:
		}
		require.True(t, time.Now().Before(deadline), "nginx does not listen after 10 s: %v", err)
	}
}

// play runs the script through cosockets, with pools of its own.
func (n *nginx) play(t *testing.T, script []string) []string {
	t.Helper()
	refused, refusedAddr := bound(t)
	defer syscall.Close(refused)
	server := newRecorder(t)
	defer server.close() // and so nginx's pools of this script die
	n.scripts++
	body := fmt.Sprintf("peers all port=%d control=%d refused=%d prefix=s%d.\n%s\n",
		server.data.Port(), server.control.Port(), refusedAddr.Port(), n.scripts, strings.Join(script, "\n"))
	request, err := http.NewRequestWithContext(t.Context(), http.MethodPost, "http://nginx/", strings.NewReader(body))
	require.NoError(t, err)
	response, err := n.client.Do(request)
	require.NoError(t, err)
	defer response.Body.Close()
	text, err := io.ReadAll(response.Body)
	require.NoError(t, err)
	require.Equal(t, http.StatusOK, response.StatusCode, "nginx answered %s", text)
	return strings.Split(strings.TrimSuffix(string(text), "\n"), "\n")
}

func TestTheRecordIsOfTheRealCosockets(t *testing.T) {
	n := startNginx(t)
	for _, r := range records(t) {
		t.Run(r.name, func(t *testing.T) {
			if diff := cmp.Diff(r.account, n.play(t, r.script)); diff != "" {
				t.Errorf("the record (-) and nginx (+) differ:\n%s", diff)
			}
		})
	}
}

func TestRandomScriptsAsThroughNginx(t *testing.T) {
	n := startNginx(t)
	const seed, amount = 1, 300
	for i := range amount {
		random := rand.New(rand.NewPCG(seed, uint64(i)))
		t.Run(fmt.Sprint(i), func(t *testing.T) {
			script := randomScript(random)
			if diff := cmp.Diff(n.play(t, script), play(t, script)); diff != "" {
				t.Errorf("nginx (-) and the worker (+) differ:\n%s", diff)
			}
		})
		if t.Failed() {
			return // one counter-example is enough
		}
	}
}

// randomScript is twenty to forty calls on two pools, small enough to be full.
// Most go to a name for which they mean something.
func randomScript(random *rand.Rand) []string {
	one := func(of ...string) string { return of[random.IntN(len(of))] }
	names := []string{"A", "B", "C", "D", "E", "F"}
	connected := map[string]bool{} // or waits to be
	usual := one("", " size=1 backlog=2", " size=2 backlog=1", " size=2 backlog=3")
	script := make([]string, 20+random.IntN(21))
	for i := range script {
		random.Shuffle(len(names), func(i, j int) { names[i], names[j] = names[j], names[i] })
		connects := random.IntN(20) < 9
		name := names[0]
		if j := slices.IndexFunc(names, func(n string) bool { return connected[n] != connects }); j >= 0 && random.IntN(10) > 0 {
			name = names[j]
		}
		if connects {
			script[i] = "connect " + name + " pool=" + one("p", "p", "q") + one(usual, usual, usual, usual, usual,
				usual+" to=refused", usual+" to=unreachable", " size="+one("1", "2", "3"), " backlog="+one("0", "1"))
			connected[name] = true
			continue
		}
		script[i] = one("keepalive "+name, "keepalive "+name, "keepalive "+name, "keepalive "+name, "keepalive "+name+" size="+one("1", "2"),
			"close "+name, "close "+name, "abort "+name, one("ping ", "more ", "fin ", "rst ", "push ")+name)
		if verb := script[i][0]; verb == 'k' || verb == 'c' {
			connected[name] = false
		}
	}
	return script
}
