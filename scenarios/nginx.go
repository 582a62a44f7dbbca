package scenarios

import (
	"cmp"
	"context"
	"fmt"
	"io"
	"net/netip"
	"strings"
	"text/template"
	"time"

	"connlab/netlab"
)

// nginxPort is where nginx listens.
const nginxPort = 80

// nginxConfig is an nginx whose Lua code calls Redis: GET /keep is a call that
// gives its connection back to the pool (setkeepalive), GET /close one that closes
// it. Both connect, send PING and wait for the reply.
type nginxConfig struct {
	Servers []netip.AddrPort // a call goes to any of them, each as likely
	Workers int              // processes, each with pools of its own
	// Resty makes the calls through lua-resty-redis; otherwise they are made by a
	// script on the module's cosockets, which lua-resty-redis is built on.
	Resty bool
	// SeparatePools gives the calls that close a pool of their own name. It stays
	// empty, so they always dial.
	SeparatePools bool
	// NoCodeCache is lua_code_cache off: every request has a Lua state, and with it
	// pools, of its own.
	NoCodeCache bool
	// PoolSize and Keepalive are the arguments of setkeepalive. Zero is nginx's
	// default: 30 connections a pool and worker, 60 s idle.
	PoolSize  int
	Keepalive time.Duration
}

// The two kinds of calls, by the path of their HTTP requests.
const (
	keepCall  = "keep"
	closeCall = "close"
)

// callTimeout bounds each step of a call from nginx to Redis.
const callTimeout = 5 * time.Second

// nginxText is the configuration.
//
// All that nginx writes goes to /run, where it has mounted a tmpfs: Debian's own
// directories would be given to another user (src/core/ngx_file.c,
// ngx_create_paths).
//
// It listens with reuseport, so that which worker has a caller's connection is
// chance: the kernel chooses by a hash (net/core/sock_reuseport.c,
// reuseport_select_sock). Without it a worker accepts 16 connections in a row
// before another one does (src/event/ngx_event_accept.c,
// ngx_reorder_accept_events), and calls, which take the connections in turn, come
// to its pools in bursts of 16 of a kind.
var nginxText = template.Must(template.New("nginx.conf").Parse(`daemon off;
user root root;
pid /run/nginx.pid;
error_log stderr;
worker_processes {{.Workers}};
worker_rlimit_nofile 10000;
{{range .Modules}}load_module {{.}};
{{end}}events { worker_connections 9000; }
http {
  access_log off;
  client_body_temp_path /run/body;
  proxy_temp_path /run/proxy;
  fastcgi_temp_path /run/fastcgi;
  uwsgi_temp_path /run/uwsgi;
  scgi_temp_path /run/scgi;

  # The callers' connections are to last.
  client_header_timeout 1h;
  keepalive_timeout 1h;
  keepalive_requests 1000000000;

  lua_code_cache {{if .NoCodeCache}}off{{else}}on{{end}};
  lua_socket_log_errors off;
  server {
    listen {{.Port}} backlog=4096 reuseport;
{{range $kind := .Kinds}}    location = /{{$kind}} {
      content_by_lua_block {
        local servers = { {{range $.Servers}}{"{{.Addr}}", {{.Port}}}, {{end}}}
        -- nginx draws an id for every request, so that the choice does not depend on
        -- a random state, which all workers and requests would begin with.
        local server = servers[tonumber(ngx.var.request_id:sub(1, 8), 16) % #servers + 1]
        local host, port = server[1], server[2]
        local options = {}
{{if and $.SeparatePools (eq $kind "close")}}        options.pool = "close " .. host .. ":" .. port
{{end}}        local what, times = "none", 0
        local function call()
{{if $.Resty}}          local conn = require("{{$.Resty}}"):new()
          conn:set_timeout({{$.Timeout}})
          local ok, err = conn:connect(host, port, options)
          if not ok then return "connect: " .. err end
          times = conn:get_reused_times()
          what = times == 0 and "dialed" or "reused"
          local reply, err = conn:ping()
          if reply ~= "PONG" then return "ping: " .. tostring(err or reply) end
{{if eq $kind "keep"}}          ok, err = conn:set_keepalive({{$.Keepalive}}, {{$.PoolSize}})
{{else}}          ok, err = conn:close()
{{end}}{{else}}          local conn = ngx.socket.tcp()
          conn:settimeout({{$.Timeout}})
          local ok, err = conn:connect(host, port, options)
          if not ok then return "connect: " .. err end
          times = conn:getreusedtimes()
          what = times == 0 and "dialed" or "reused"
          ok, err = conn:send("PING\r\n")
          if not ok then return "send: " .. err end
          local reply, err = conn:receive()
          if reply ~= "+PONG" then return "receive: " .. tostring(err or reply) end
{{if eq $kind "keep"}}          ok, err = conn:setkeepalive({{$.Keepalive}}, {{$.PoolSize}})
{{else}}          ok, err = conn:close()
{{end}}{{end}}          if not ok then return "{{$kind}}: " .. tostring(err) end
        end
        local err = call()
        local line = what .. " " .. times .. " " .. ngx.worker.id()
        if err then
          ngx.status = 502
          line = line .. " " .. err
        end
        ngx.header.content_length = #line
        ngx.print(line)
      }
    }
{{end}}  }
}
`))

// text is the configuration for an nginx with these modules. Resty is the name by
// which Lua knows lua-resty-redis; "" is a script of our own.
func (c nginxConfig) text(modules []string, resty string) (string, error) {
	var b strings.Builder
	err := nginxText.Execute(&b, map[string]any{
		"Workers": c.Workers, "Modules": modules, "NoCodeCache": c.NoCodeCache, "Port": nginxPort,
		"Kinds": []string{keepCall, closeCall}, "Servers": c.Servers, "SeparatePools": c.SeparatePools,
		"Resty": resty, "Timeout": callTimeout.Milliseconds(),
		"Keepalive": cmp.Or(c.Keepalive, time.Minute).Milliseconds(), "PoolSize": cmp.Or(c.PoolSize, 30),
	})
	return b.String(), err
}

// startNginx runs the real thing on a host and returns when it listens. It gets its configuration on standard input and writes nothing but
// to a tmpfs of its own, so that a killed run leaves no file. (nginx itself cannot
// read a pipe: it reads as much as the file's size says.) What is not installed is
// a [*netlab.NeedError].
func startNginx(ctx context.Context, host *netlab.Host, cfg nginxConfig, log io.Writer) (*netlab.Process, error) {
	nginx, err := netlab.LookNginx()
	if err != nil {
		return nil, err
	}
	var resty string
	if cfg.Resty {
		if _, resty, err = netlab.LookRestyRedis(); err != nil {
			return nil, err
		}
	}
	text, err := cfg.text(nginx.Modules, resty)
	if err != nil {
		return nil, fmt.Errorf("nginx: %w", err)
	}
	return host.Start(ctx, netlab.Program{
		Path: "/bin/sh", Dir: "/",
		Args:    []string{"-c", `mount -t tmpfs connlab /run && cat >/run/nginx.conf && exec "$0" -e stderr -c /run/nginx.conf`, nginx.Path},
		Stdin:   strings.NewReader(text),
		Ready:   func() error { return host.Listening(nginxPort) },
		Stdout:  log,
		Stderr:  log,
		Contain: true, PrivateMounts: true,
	})
}
