package main

import (
	"testing"

	"github.com/stretchr/testify/assert"
	"github.com/stretchr/testify/require"
)

func TestProxyHelpTeaches(t *testing.T) {
	o := run("proxy", "--help")
	require.Equal(t, exitOK, o.code, o.stderr)
	for _, want := range []string{"--learn option", "--learn header", "--learn local", "--send-header", "--source address",
		"--route prefix=upstream", "--default address:port", "--option-kind kind", "(default 250)", "--verbose",
		"Behind a layer-4 balancer", "A layer-7 balancer"} {
		assert.Contains(t, o.stdout, want)
	}
}

func TestProxyUsage(t *testing.T) {
	for _, tt := range []struct {
		why  string
		args []string
		want string
	}{
		{"nowhere to go", nil, "neither a route nor a default upstream"},
		{"bad route", []string{"--route", "10.8.0.0/16=10.9.0.0/24:6379"}, "differ in length"},
	} {
		t.Run(tt.why, func(t *testing.T) {
			o := run(append([]string{"proxy"}, tt.args...)...)
			assert.Equal(t, exitUsage, o.code)
			assert.Contains(t, o.stderr, tt.want)
			assert.Empty(t, o.stdout)
		})
	}
}

// The proxy before the mini server, both as programs.
func TestProxyBeforeServer(t *testing.T) {
	addr := startListener(t, "proxy", "--learn", "local", "--route", "127.0.0.1/32="+startServer(t))
	o := run("load", "--addr", addr, "--rate", "200", "--duration", "500ms", "-q")
	assert.Contains(t, o.stdout, "operations  due 100 = ok 100 + failed 0 + not started 0", o.stderr)
}
