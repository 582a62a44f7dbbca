package netlab

import (
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"github.com/stretchr/testify/assert"
	"github.com/stretchr/testify/require"
)

// An nginx is looked for in PATH first: these are scripts that say what one says.
func TestLookNginx(t *testing.T) {
	const version = "nginx version: nginx/1.22.1"
	for _, row := range []struct {
		reason  string
		says    string // DIR stands for the directory that has all
		modules []string
		status  int
		want    string // of the error
		need    bool
	}{
		{"as Debian has it", version + "\nconfigure arguments: --with-compat --modules-path=DIR/modules --with-debug", luaModules, 0, "", false},
		{"without the Lua module", version + "\nconfigure arguments: --modules-path=DIR/modules", luaModules[:1], 0,
			"needs nginx with Lua: DIR/nginx has no DIR/modules/ngx_http_lua_module.so; " + nginxCure, true},
		{"built by hand, without modules", version + "\nconfigure arguments:", nil, 0,
			"needs nginx with Lua: DIR/nginx was built without a directory for modules; " + nginxCure, true},
		{"it cannot be executed to an end", "error while loading shared libraries", nil, 127,
			"DIR/nginx -V: exit status 127", false},
		{"it says something else", "hello", nil, 0, `DIR/nginx -V says "hello"`, false},
	} {
		t.Run(row.reason, func(t *testing.T) {
			dir := t.TempDir()
			t.Setenv("PATH", dir+":/usr/bin:/bin")
			require.NoError(t, os.Mkdir(filepath.Join(dir, "modules"), 0o755))
			var modules []string
			for _, name := range row.modules {
				modules = append(modules, filepath.Join(dir, "modules", name))
				require.NoError(t, os.WriteFile(modules[len(modules)-1], nil, 0o644))
			}
			here := strings.NewReplacer("DIR", dir)
			script := fmt.Sprintf("#!/bin/sh\ncat >&2 <<'END'\n%s\nEND\nexit %d\n", here.Replace(row.says), row.status)
			require.NoError(t, os.WriteFile(filepath.Join(dir, "nginx"), []byte(script), 0o755))
			got, err := LookNginx()
			if row.want != "" {
				require.EqualError(t, err, here.Replace(row.want))
				_, need := errors.AsType[*NeedError](err)
				assert.Equal(t, row.need, need, "a lack, or a question that got no answer")
				return
			}
			require.NoError(t, err)
			assert.Equal(t, Nginx{Path: filepath.Join(dir, "nginx"), Version: "1.22.1", Modules: modules}, got)
		})
	}
}
