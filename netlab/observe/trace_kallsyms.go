package observe

import (
	"bufio"
	"bytes"
	"errors"
	"fmt"
	"io"
	"os"
	"slices"
	"strconv"
	"strings"
)

// errNoAddresses says that /proc/kallsyms shows zeros for addresses.
var errNoAddresses = errors.New("addresses are hidden (sysctl kernel.kptr_restrict)")

// kernelSymbols names the functions of the running kernel that the addresses lie in.
func kernelSymbols(addresses []uint64) (map[uint64]string, error) {
	f, err := os.Open("/proc/kallsyms")
	if err != nil {
		return nil, err
	}
	defer f.Close()
	symbols, err := findSymbols(f, addresses)
	if err != nil {
		return nil, fmt.Errorf("/proc/kallsyms: %w", err)
	}
	return symbols, nil
}

// findSymbols reads a table as /proc/kallsyms has it, lines of address, type and name,
// in any order, and returns for each address the name of the last function that begins
// at or before it; none for an address below them all. Of two names for one function
// the first counts. The table has hundreds of thousands of lines and addresses are
// few, so that it is not kept.
func findSymbols(r io.Reader, addresses []uint64) (map[uint64]string, error) {
	wanted := slices.Sorted(slices.Values(addresses))
	wanted = slices.Compact(wanted)
	type symbol struct {
		begin uint64
		name  string
	}
	best := make([]symbol, len(wanted)) // of the functions since the address before
	hidden := true
	lines := bufio.NewScanner(r)
	for lines.Scan() {
		begin, kind, name, err := parseSymbol(lines.Bytes())
		if err != nil {
			return nil, err
		}
		hidden = hidden && begin == 0
		if !strings.ContainsRune("tTwW", rune(kind)) {
			continue
		}
		i, _ := slices.BinarySearch(wanted, begin)
		if i < len(wanted) && (best[i].name == "" || begin > best[i].begin) {
			best[i] = symbol{begin, string(name)}
		}
	}
	if err := lines.Err(); err != nil {
		return nil, err
	}
	if hidden {
		return nil, errNoAddresses
	}
	found := make(map[uint64]string, len(wanted))
	var last symbol
	for i, address := range wanted {
		if best[i].name != "" {
			last = best[i]
		}
		if last.name != "" {
			found[address] = last.name
		}
	}
	return found, nil
}

// parseSymbol reads a line of /proc/kallsyms: "ffffffff81e4a2c0 T tcp_v4_rcv", and
// after a tab the module, which is left out.
func parseSymbol(line []byte) (address uint64, kind byte, name []byte, err error) {
	fields := bytes.Fields(line)
	if len(fields) < 3 || len(fields[1]) != 1 {
		return 0, 0, nil, fmt.Errorf("line %q is not address, type, name", line)
	}
	address, err = strconv.ParseUint(string(fields[0]), 16, 64)
	if err != nil {
		return 0, 0, nil, fmt.Errorf("line %q: %w", line, err)
	}
	return address, fields[1][0], fields[2], nil
}

// functionName is a symbol without what the compiler appends to the name of a part
// or a variant: "tcp_v4_send_reset.isra.0".
func functionName(symbol string) string {
	name, _, _ := strings.Cut(symbol, ".")
	return name
}
