package server

// glob reports whether s matches the pattern: * any bytes, ? one byte, [a-z] and [^a-z] sets, \ takes the next byte as it
// is (util.c, stringmatchlen). After a mismatch it goes back to the last star only, so the time is at most the
// product of the lengths whatever the pattern.
func glob(pattern, s string) bool {
	star, mark := -1, 0
	p, i := 0, 0
	for i < len(s) {
		if p < len(pattern) && pattern[p] == '*' {
			star, mark = p, i
			p++
			continue
		}
		if n := matchOne(pattern[p:], s[i]); n > 0 {
			p += n
			i++
			continue
		}
		if star < 0 {
			return false
		}
		mark++
		p, i = star+1, mark
	}
	for p < len(pattern) && pattern[p] == '*' {
		p++
	}
	return p == len(pattern)
}

// matchOne returns how much of the pattern stands for the byte, 0 for no match.
func matchOne(pattern string, b byte) int {
	if pattern == "" {
		return 0
	}
	switch pattern[0] {
	case '?':
		return 1
	case '[':
		return matchSet(pattern, b)
	case '\\':
		if len(pattern) > 1 {
			if pattern[1] == b {
				return 2
			}
			return 0
		}
	}
	if pattern[0] == b {
		return 1
	}
	return 0
}

// matchSet matches a pattern that begins with "[". A set that is not closed ends with the pattern.
func matchSet(pattern string, b byte) int {
	p := 1
	not := p < len(pattern) && pattern[p] == '^'
	if not {
		p++
	}
	found := false
	for p < len(pattern) && pattern[p] != ']' {
		switch {
		case pattern[p] == '\\' && p+1 < len(pattern):
			p++
			found = found || pattern[p] == b
			p++
		case p+2 < len(pattern) && pattern[p+1] == '-':
			lo, hi := min(pattern[p], pattern[p+2]), max(pattern[p], pattern[p+2])
			found = found || lo <= b && b <= hi
			p += 3
		default:
			found = found || pattern[p] == b
			p++
		}
	}
	if found == not {
		return 0
	}
	return min(p+1, len(pattern))
}
