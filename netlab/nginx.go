package netlab

import (
	"context"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"strings"
)

// Nginx is an installed nginx with its Lua module.
type Nginx struct {
	// Path is the executable and Version what it says of itself, "1.22.1".
	Path, Version string
	// Modules are the files to load, in order, for Lua in the configuration.
	Modules []string
}

const (
	nginxCure      = "install it with: apt-get install nginx libnginx-mod-http-lua"
	restyRedisCure = "install it with: apt-get install lua-nginx-redis"
)

// luaModules are what nginx loads for Lua; the second needs the first.
var luaModules = []string{"ndk_http_module.so", "ngx_http_lua_module.so"}

// modulesRE finds in the output of nginx -V where its package puts modules.
var modulesRE = regexp.MustCompile(`--modules-path=(\S+)`)

// LookNginx finds nginx and its Lua module. If one of them is not there the
// error is a [*NeedError].
func LookNginx() (Nginx, error) {
	lacks := func(what string) error {
		return &NeedError{Need: NeedNginx, Err: errors.New(what + "; " + nginxCure)}
	}
	path, err := LookProgram("nginx")
	if errors.Is(err, exec.ErrNotFound) {
		return Nginx{}, lacks("nginx is not installed")
	}
	if err != nil {
		return Nginx{}, fmt.Errorf("finding nginx: %w", err)
	}
	ctx, cancel := context.WithTimeout(context.Background(), versionTimeout)
	defer cancel()
	about, err := exec.CommandContext(ctx, path, "-V").CombinedOutput() // it writes to standard error
	if err != nil {
		return Nginx{}, fmt.Errorf("%s -V: %w", path, err)
	}
	first, _, _ := strings.Cut(string(about), "\n")
	n := Nginx{Path: path, Version: versionRE.FindString(first)}
	if n.Version == "" {
		return Nginx{}, fmt.Errorf("%s -V says %q", path, first)
	}
	dir := modulesRE.FindSubmatch(about)
	if dir == nil {
		return Nginx{}, lacks(path + " was built without a directory for modules")
	}
	for _, name := range luaModules {
		file := filepath.Join(string(dir[1]), name)
		if _, err := os.Stat(file); errors.Is(err, fs.ErrNotExist) {
			return Nginx{}, lacks(fmt.Sprintf("%s has no %s", path, file))
		} else if err != nil {
			return Nginx{}, fmt.Errorf("finding nginx's modules: %w", err)
		}
		n.Modules = append(n.Modules, file)
	}
	return n, nil
}

// restyRedisFiles are where lua-resty-redis may be, and the name by which Lua then
// knows it: Debian's package has a name of its own. All are on the search path
// that Debian builds LuaJIT with.
var restyRedisFiles = []struct{ file, module string }{
	{"/usr/local/share/lua/5.1/resty/redis.lua", "resty.redis"},
	{"/usr/share/lua/5.1/resty/redis.lua", "resty.redis"},
	{"/usr/share/lua/5.1/nginx/redis.lua", "nginx.redis"},
}

// LookRestyRedis finds the Lua library lua-resty-redis and returns its file and the
// name that require takes. If it is not there the error is a [*NeedError].
func LookRestyRedis() (file, module string, err error) {
	for _, at := range restyRedisFiles {
		_, err := os.Stat(at.file)
		if err == nil {
			return at.file, at.module, nil
		}
		if !errors.Is(err, fs.ErrNotExist) {
			return "", "", fmt.Errorf("finding lua-resty-redis: %w", err)
		}
	}
	return "", "", &NeedError{Need: NeedRestyRedis, Err: errors.New("it is not installed; " + restyRedisCure)}
}

func probeNginx(*scratch) (string, bool, error) {
	n, err := LookNginx()
	if err != nil {
		return "", false, err
	}
	return fmt.Sprintf("%s %s with %s", n.Path, n.Version, n.Modules[len(n.Modules)-1]), true, nil
}

func probeRestyRedis(*scratch) (string, bool, error) {
	file, module, err := LookRestyRedis()
	if err != nil {
		return "", false, err
	}
	return fmt.Sprintf("%s, known to Lua as %s", file, module), true, nil
}
