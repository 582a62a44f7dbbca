package main

import (
	"go/parser"
	"go/token"
	"io/fs"
	"os"
	"path/filepath"
	"regexp"
	"slices"
	"strconv"
	"strings"
	"testing"

	"github.com/stretchr/testify/assert"
	"github.com/stretchr/testify/require"
)

// mayImport says which of our own packages each package may import. A package
// that is not listed may import nothing of ours and must be added here first:
// the rules are the architecture (docs/architecture.md).
var mayImport = map[string][]string{
	"results":                 nil,
	"netlab":                  nil,
	"loadgen":                 nil,
	"server/resp":             nil,
	"docs/monitoring":         nil,
	"netlab/wire":             {"netlab"},
	"netlab/observe":          {"netlab"},
	"netlab/observe/exporter": {"netlab", "netlab/observe"},
	"netlab/l4lb":             {"netlab/wire"},
	"netlab/twrecycle":        {"netlab", "netlab/wire"},
	"loadgen/pool":            {"loadgen"},
	"server":                  {"server/resp"},
	"server/proxy":            {"server/resp"},
	"scenarios":               {"scenarios/diagnose", "docs/monitoring", "results", "netlab", "netlab/wire", "netlab/observe", "netlab/observe/exporter", "netlab/l4lb", "netlab/twrecycle", "loadgen", "loadgen/pool", "server", "server/proxy", "server/resp"},
	"scenarios/diagnose":      {"netlab/observe"},
	"cmd/connlab":             {"results", "netlab", "netlab/wire", "netlab/observe", "netlab/observe/exporter", "netlab/l4lb", "netlab/twrecycle", "loadgen", "loadgen/pool", "server", "server/proxy", "server/resp", "scenarios", "scenarios/diagnose"},
}

// setnsCallers are the only packages that may enter a namespace.
var setnsCallers = []string{"netlab"}

// The files are read, not asked of the go command: the test cache knows what a
// test opens, and would answer from the cache after `go list`.
func TestImportRules(t *testing.T) {
	root := "../.."
	module := "connlab/"
	found := 0
	err := filepath.WalkDir(root, func(path string, d fs.DirEntry, err error) error {
		require.NoError(t, err)
		if d.IsDir() && (strings.HasPrefix(d.Name(), ".") && path != root || d.Name() == "testdata") {
			return fs.SkipDir
		}
		if d.IsDir() || !strings.HasSuffix(path, ".go") {
			return nil
		}
		pkg, err := filepath.Rel(root, filepath.Dir(path))
		require.NoError(t, err)
		source, err := os.ReadFile(path)
		require.NoError(t, err)
		file, err := parser.ParseFile(token.NewFileSet(), path, source, parser.ImportsOnly)
		require.NoError(t, err)

		allowed, known := mayImport[pkg]
		assert.True(t, known, "package %s is not in the import rules", pkg)
		found++
		for _, spec := range file.Imports {
			imported, err := strconv.Unquote(spec.Path.Value)
			require.NoError(t, err)
			ours, isOurs := strings.CutPrefix(imported, module)
			if isOurs && ours != pkg {
				assert.Contains(t, allowed, ours, "%s imports %s", path, imported)
			}
		}
		if strings.Contains(string(source), "unix."+"Setns(") {
			assert.True(t, slices.Contains(setnsCallers, pkg), "%s enters a namespace; only %v may", path, setnsCallers)
		}
		return nil
	})
	require.NoError(t, err)
	require.Greater(t, found, 50, "too few Go files seen: is the walk right?")
}

// A new folder at the top of the tree is a decision, not a habit.
func TestTopLevel(t *testing.T) {
	want := []string{"cmd", "docs", "loadgen", "netlab", "results", "scenarios", "server"}
	entries, err := os.ReadDir("../..")
	require.NoError(t, err)
	for _, e := range entries {
		// A file may be somebody's own: a saved record, a note.
		if strings.HasPrefix(e.Name(), ".") || e.Name() == "bin" || !e.IsDir() {
			continue
		}
		assert.Contains(t, want, e.Name())
	}
}

// Documentation shows measured output; what is still to be filled in is a fault.
func TestDocsAreFilledIn(t *testing.T) {
	docs, err := filepath.Glob("../../docs/*/*.md")
	require.NoError(t, err)
	more, err := filepath.Glob("../../docs/*.md")
	require.NoError(t, err)
	docs = append(append(docs, more...), "../../README.md", "../../CHANGELOG.md")
	placeholder := regexp.MustCompile(`\b[A-Z]+_[A-Z]+\b`)
	allowed := []string{"CONNLAB_STRICT", "CONNLAB_TENFOLD", "CAP_NET", "CAP_SYS", "FIN_WAIT", "TIME_WAIT", "SYN_RECV", "CLOSE_WAIT", "LAST_ACK", "LVL_GRAN", "NO_SOCKET", "TOA_VIP", "IP_LOCAL", "TCP_SAVE", "TCP_SAVED"}
	for _, path := range docs {
		text, err := os.ReadFile(path)
		require.NoError(t, err)
		for _, found := range placeholder.FindAllString(string(text), -1) {
			assert.Contains(t, allowed, found, path)
		}
	}
}
