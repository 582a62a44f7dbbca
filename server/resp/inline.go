package resp

import "bytes"

// splitArgs splits a line into words as redis-cli does and as Redis does with inline requests (sds.c, sdssplitargs):
// blanks separate; "…" may hold \n \r \t \b \a \xHH and \ before any other byte; '…' may hold \'; a closing quote
// must be followed by a blank or the end. It appends to args and reports false for quotes out of balance. Words
// without quotes point into line.
func splitArgs(args [][]byte, line []byte) ([][]byte, bool) {
	if nul := bytes.IndexByte(line, 0); nul >= 0 {
		line = line[:nul] // Redis works on C strings here
	}
	for i := 0; ; {
		for i < len(line) && isSpace(line[i]) {
			i++
		}
		if i == len(line) {
			return args, true
		}
		start := i
		for i < len(line) && !endsWord(line[i]) && line[i] != '"' && line[i] != '\'' {
			i++
		}
		if i == len(line) || endsWord(line[i]) {
			args = append(args, line[start:i:i])
			continue
		}
		word, next, ok := quotedWord(bytes.Clone(line[start:i]), line, i)
		if !ok {
			return args, false
		}
		args = append(args, word)
		i = next
	}
}

// quotedWord reads the rest of a word from the quote at line[i] on and returns where it ends.
func quotedWord(word, line []byte, i int) ([]byte, int, bool) {
	for i < len(line) && !endsWord(line[i]) {
		quote := line[i]
		if quote != '"' && quote != '\'' {
			word = append(word, quote)
			i++
			continue
		}
		i++
		for {
			if i == len(line) {
				return nil, 0, false
			}
			if line[i] == quote {
				i++
				break
			}
			b, n := unescape(line[i:], quote)
			word = append(word, b)
			i += n
		}
		if i < len(line) && !isSpace(line[i]) {
			return nil, 0, false
		}
	}
	return word, i, true
}

// unescape returns the byte that s begins with inside the given quotes, and how many bytes spell it.
func unescape(s []byte, quote byte) (b byte, n int) {
	if s[0] != '\\' || len(s) < 2 {
		return s[0], 1
	}
	if quote == '\'' {
		if s[1] == '\'' {
			return '\'', 2
		}
		return s[0], 1
	}
	if s[1] == 'x' && len(s) >= 4 {
		hi, ok1 := hexDigit(s[2])
		lo, ok2 := hexDigit(s[3])
		if ok1 && ok2 {
			return hi<<4 | lo, 4
		}
	}
	switch s[1] {
	case 'n':
		return '\n', 2
	case 'r':
		return '\r', 2
	case 't':
		return '\t', 2
	case 'b':
		return '\b', 2
	case 'a':
		return '\a', 2
	}
	return s[1], 2
}

func hexDigit(c byte) (byte, bool) {
	switch {
	case c >= '0' && c <= '9':
		return c - '0', true
	case c >= 'a' && c <= 'f':
		return c - 'a' + 10, true
	case c >= 'A' && c <= 'F':
		return c - 'A' + 10, true
	}
	return 0, false
}

// isSpace is isspace() of the C locale.
func isSpace(c byte) bool { return c == ' ' || c >= '\t' && c <= '\r' }

// endsWord is the narrower set of bytes that end an unquoted word.
func endsWord(c byte) bool { return c == ' ' || c == '\n' || c == '\r' || c == '\t' }
