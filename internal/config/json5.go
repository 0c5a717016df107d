package config

import (
	"strconv"
	"strings"
	"unicode"
	"unicode/utf16"
	"unicode/utf8"
)

// parseJSON reads JSON as people write it in process files, which PM2 reads
// as JavaScript: with comments, trailing commas, single quotes and bare keys
// (JSON5). Anything beyond, such as expressions, is an error.
func parseJSON(file string, data []byte) (*node, error) {
	if err := checkText(file, data); err != nil {
		return nil, err
	}
	p := jsonParser{problems: problems{file: file}, s: strings.TrimPrefix(string(data), "\ufeff"), line: 1}
	p.space()
	if p.i == len(p.s) && len(p.list) == 0 {
		return nil, nil
	}
	n := p.value(0)
	if len(p.list) == 0 {
		p.space()
		// A trailing semicolon is harmless and common.
		for p.i < len(p.s) && p.s[p.i] == ';' {
			p.i++
			p.space()
		}
		if p.i < len(p.s) {
			p.fail("%s after the end of the value", p.here())
		}
	}
	if err := p.err(); err != nil {
		return nil, err
	}
	return n, nil
}

// jsonParser stops at the first mistake: after one, the rest is guesswork.
type jsonParser struct {
	problems
	s      string
	i      int
	line   int
	lineAt int // offset of the line's first byte
	made   int
}

func (p *jsonParser) col() int { return utf8.RuneCountInString(p.s[p.lineAt:p.i]) + 1 }

func (p *jsonParser) fail(format string, args ...any) {
	if len(p.list) == 0 {
		p.at(p.line, p.col(), "not valid JSON: "+format, args...)
	}
	p.i = len(p.s)
}

// here names what stands at the current position.
func (p *jsonParser) here() string {
	if p.i >= len(p.s) {
		return "end of file"
	}
	r, _ := utf8.DecodeRuneInString(p.s[p.i:])
	return strconv.QuoteRune(r)
}

func (p *jsonParser) newline() {
	p.line++
	p.lineAt = p.i
}

func (p *jsonParser) space() {
	for p.i < len(p.s) {
		switch c := p.s[p.i]; {
		case c == '\n':
			p.i++
			p.newline()
		case c == ' ' || c == '\t' || c == '\r':
			p.i++
		case strings.HasPrefix(p.s[p.i:], "//"):
			for p.i < len(p.s) && p.s[p.i] != '\n' {
				p.i++
			}
		case strings.HasPrefix(p.s[p.i:], "/*"):
			end := strings.Index(p.s[p.i+2:], "*/")
			if end < 0 {
				p.fail("the comment has no end, write */")
				return
			}
			for stop := p.i + 2 + end + 2; p.i < stop; {
				p.i++
				if p.s[p.i-1] == '\n' {
					p.newline()
				}
			}
		case c >= utf8.RuneSelf:
			r, size := utf8.DecodeRuneInString(p.s[p.i:])
			if r != '\ufeff' && !unicode.IsSpace(r) {
				return
			}
			p.i += size
		default:
			return
		}
	}
}

func (p *jsonParser) value(depth int) *node {
	n := &node{line: p.line, col: p.col()}
	if p.made++; p.made > maxNodes {
		p.fail("more than %d values", maxNodes)
		return n
	}
	if depth > maxDepth {
		p.fail("nested more than %d levels deep", maxDepth)
		return n
	}
	if p.i >= len(p.s) {
		p.fail("a value is missing at the end of the file")
		return n
	}
	switch c := p.s[p.i]; {
	case c == '{':
		p.object(n, depth)
	case c == '[':
		p.array(n, depth)
	case c == '"' || c == '\'':
		n.kind, n.quoted, n.text = kString, true, p.str()
	case c == '`':
		p.fail("template strings are JavaScript; use quotes, or name the file *.config.js")
	case c == '-' || c == '+' || c == '.' || c >= '0' && c <= '9':
		p.number(n)
	default:
		switch w := p.word(); w {
		case "true", "false":
			n.kind, n.text = kBool, w
		case "null", "undefined":
		case "":
			p.fail("%s where a value should be", p.here())
		default:
			p.i -= len(w)
			p.fail("%s is not a value; put strings in quotes", clip(w))
		}
	}
	return n
}

func (p *jsonParser) word() string {
	start := p.i
	for p.i < len(p.s) {
		r, size := utf8.DecodeRuneInString(p.s[p.i:])
		if r != '_' && r != '$' && !unicode.IsLetter(r) && !unicode.IsDigit(r) {
			break
		}
		p.i += size
	}
	return p.s[start:p.i]
}

func (p *jsonParser) number(n *node) {
	start := p.i
	for p.i < len(p.s) && strings.IndexByte("+-.0123456789abcdefABCDEFxX_", p.s[p.i]) >= 0 {
		p.i++
	}
	n.kind, n.text = kNumber, strings.TrimPrefix(p.s[start:p.i], "+")
	if i, ok := intOf(n.text); ok && strings.ContainsAny(n.text, "xX") {
		n.text = strconv.FormatInt(i, 10)
		return
	}
	if _, err := strconv.ParseFloat(n.text, 64); err != nil || strings.ContainsAny(n.text, "xX_") {
		p.i = start
		p.fail("%s is not a number", clip(n.text))
	}
}

func (p *jsonParser) str() string {
	quote := p.s[p.i]
	p.i++
	var b strings.Builder
	for p.i < len(p.s) {
		c := p.s[p.i]
		switch c {
		case quote:
			p.i++
			return b.String()
		case '\n':
			p.fail("the string has no end on its line")
			return ""
		case '\\':
			p.i++
			p.escape(&b)
		default:
			b.WriteByte(c)
			p.i++
		}
	}
	p.fail("the string has no end")
	return ""
}

func (p *jsonParser) escape(b *strings.Builder) {
	if p.i >= len(p.s) {
		return
	}
	c := p.s[p.i]
	p.i++
	switch c {
	case 'n':
		b.WriteByte('\n')
	case 't':
		b.WriteByte('\t')
	case 'r':
		b.WriteByte('\r')
	case 'b':
		b.WriteByte('\b')
	case 'f':
		b.WriteByte('\f')
	case 'v':
		b.WriteByte('\v')
	case '0':
		b.WriteByte(0)
	case '\n':
		p.newline()
	case 'x', 'u':
		width := 4
		if c == 'x' {
			width = 2
		}
		r, ok := p.hex(width)
		if !ok {
			p.fail("\\%c is followed by %d hexadecimal digits", c, width)
			return
		}
		if utf16.IsSurrogate(r) && strings.HasPrefix(p.s[p.i:], `\u`) {
			save := p.i
			p.i += 2
			low, ok := p.hex(4)
			if pair := utf16.DecodeRune(r, low); ok && pair != utf8.RuneError {
				r = pair
			} else {
				p.i = save
			}
		}
		b.WriteRune(r)
	default:
		b.WriteByte(c)
	}
}

func (p *jsonParser) hex(width int) (rune, bool) {
	if p.i+width > len(p.s) {
		return 0, false
	}
	v, err := strconv.ParseUint(p.s[p.i:p.i+width], 16, 32)
	if err != nil {
		return 0, false
	}
	p.i += width
	return rune(v), true
}

func (p *jsonParser) array(n *node, depth int) {
	n.kind = kList
	p.i++
	for {
		p.space()
		if p.i >= len(p.s) {
			p.fail("the list has no end, write ]")
			return
		}
		if p.s[p.i] == ']' {
			p.i++
			return
		}
		n.list = append(n.list, p.value(depth+1))
		if !p.separator(']', "list") {
			return
		}
	}
}

// separator takes the comma between two elements and reports whether
// another may follow; the closing bracket is left where it is.
func (p *jsonParser) separator(closing byte, what string) bool {
	p.space()
	if p.i >= len(p.s) {
		p.fail("the %s has no end, write %c", what, closing)
		return false
	}
	switch p.s[p.i] {
	case ',':
		p.i++
	case closing:
	default:
		p.fail("%s where a comma or %c should be", p.here(), closing)
		return false
	}
	return true
}

func (p *jsonParser) object(n *node, depth int) {
	n.kind = kMap
	p.i++
	seen := map[string]int{}
	for {
		p.space()
		if p.i >= len(p.s) {
			p.fail("the object has no end, write }")
			return
		}
		if p.s[p.i] == '}' {
			p.i++
			return
		}
		f := field{line: p.line, col: p.col()}
		if c := p.s[p.i]; c == '"' || c == '\'' {
			f.key = p.str()
		} else if f.key = p.word(); f.key == "" {
			p.fail("%s where a key should be", p.here())
		}
		p.space()
		if len(p.list) > 0 {
			return
		}
		if p.i >= len(p.s) || p.s[p.i] != ':' {
			p.fail("%s where a colon should follow the key %s", p.here(), clip(f.key))
			return
		}
		if first := seen[f.key]; first > 0 {
			p.list = append(p.list, Problem{p.file, f.line, f.col, "key " + clip(f.key) + " is there twice, the first time at line " + strconv.Itoa(first) + "; remove one"})
			p.i = len(p.s)
			return
		}
		seen[f.key] = f.line
		p.i++
		p.space()
		f.val = p.value(depth + 1)
		n.fields = append(n.fields, f)
		if !p.separator('}', "object") {
			return
		}
	}
}
