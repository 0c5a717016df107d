package config

import (
	"errors"
	"fmt"
	"strings"
)

// ErrShell is what [Split] returns, wrapped, for text that only a shell can
// carry out.
var ErrShell = errors.New("needs a shell")

// Split cuts a command into words as a shell does, without one: blanks
// separate, quotes and backslashes hold together. Where an unquoted character
// means something to a shell (| & ; < > ( ) $ * and so on) the error wraps
// [ErrShell].
func Split(s string) ([]string, error) { return split(s, true) }

// splitLoose is Split for PM2's argument strings, in which such characters
// stand for themselves.
func splitLoose(s string) ([]string, error) { return split(s, false) }

func split(s string, strict bool) ([]string, error) {
	var words []string
	var b strings.Builder
	in := false // within a word
	s = strings.TrimSpace(s)
	for i := 0; i < len(s); i++ {
		c := s[i]
		switch {
		case c == 0:
			return nil, errors.New("a NUL byte in a command")
		case c == '\'':
			end := strings.IndexByte(s[i+1:], '\'')
			if end < 0 {
				return nil, errors.New("a single quote has no partner; write \"'\" for a bare one")
			}
			b.WriteString(s[i+1 : i+1+end])
			i += end + 1
			in = true
		case c == '"':
			end, err := splitDouble(&b, s, i+1, strict)
			if err != nil {
				return nil, err
			}
			i = end
			in = true
		case c == '\\':
			if i+1 >= len(s) {
				return nil, errors.New("a backslash at the end has nothing to escape")
			}
			i++
			if s[i] != '\n' { // a continued line
				b.WriteByte(s[i])
				in = true
			}
		case c == ' ' || c == '\t' || c == '\r' || c == '\n' && !strict:
			if in {
				words = append(words, b.String())
				b.Reset()
				in = false
			}
		case strict && (strings.IndexByte("|&;<>()$`*\n", c) >= 0 || (c == '~' || c == '#') && !in):
			return nil, shellErr(string(c))
		default:
			b.WriteByte(c)
			in = true
		}
	}
	if in {
		words = append(words, b.String())
	}
	return words, nil
}

// splitDouble reads a double-quoted part from i on and returns the offset of
// its closing quote.
func splitDouble(b *strings.Builder, s string, i int, strict bool) (int, error) {
	for ; i < len(s); i++ {
		switch c := s[i]; c {
		case '"':
			return i, nil
		case 0:
			return 0, errors.New("a NUL byte in a command")
		case '\\':
			if i+1 < len(s) && strings.IndexByte("\"\\$`\n", s[i+1]) >= 0 {
				i++
				if s[i] == '\n' {
					continue
				}
			}
			b.WriteByte(s[i])
		case '$', '`':
			if strict && (c == '`' || i+1 < len(s) && startsExpansion(s[i+1])) {
				return 0, shellErr(string(c))
			}
			b.WriteByte(c)
		default:
			b.WriteByte(c)
		}
	}
	return 0, errors.New("a double quote has no partner")
}

func startsExpansion(c byte) bool {
	return c == '(' || c == '{' || c == '_' || c >= 'a' && c <= 'z' || c >= 'A' && c <= 'Z' || c >= '0' && c <= '9' || strings.IndexByte("$?@*#!", c) >= 0
}

func shellErr(c string) error {
	if c == "\n" {
		return fmt.Errorf("%w: it has more than one line", ErrShell)
	}
	return fmt.Errorf("%w: %s means something to a shell only", ErrShell, c)
}

// Join writes words so that [Split], or a shell, reads the same words again.
func Join(words []string) string {
	out := make([]string, len(words))
	for i, w := range words {
		out[i] = quoteWord(w)
	}
	return strings.Join(out, " ")
}

func quoteWord(w string) string {
	plain := w != ""
	for i := 0; i < len(w) && plain; i++ {
		c := w[i]
		plain = c >= 'a' && c <= 'z' || c >= 'A' && c <= 'Z' || c >= '0' && c <= '9' || strings.IndexByte("_-+=./:,@%^", c) >= 0
	}
	if plain {
		return w
	}
	return "'" + strings.ReplaceAll(w, "'", `'\''`) + "'"
}
