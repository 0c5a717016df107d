package batch

import (
	"errors"
	"fmt"
	"path/filepath"
	"strconv"
	"strings"
)

// Template is a command whose arguments are filled in for each task:
//
//	{}    the task as it is
//	{.}   without its extension
//	{/}   without its folder
//	{//}  its folder, "." where it has none
//	{/.}  without folder and extension
//	{#}   the number of the task, from 1
//
// Other braces stay as they are. A command without any of these gets the task
// as its last argument.
type Template struct {
	program string
	args    [][]part
}

// part is a piece of an argument: text, or a placeholder where hole is set.
type part struct {
	text string
	hole bool
}

// NewTemplate reads a command. Its program cannot be a placeholder.
func NewTemplate(command []string) (*Template, error) {
	if len(command) == 0 {
		return nil, errors.New("there is no command")
	}
	if first := split(command[0]); len(first) != 1 || first[0].hole {
		return nil, fmt.Errorf("%q: the program itself must be the same for all tasks; only its arguments may have placeholders", command[0])
	}
	t := &Template{program: command[0]}
	any := false
	for _, a := range command[1:] {
		p := split(a)
		for _, x := range p {
			any = any || x.hole
		}
		t.args = append(t.args, p)
	}
	if !any {
		t.args = append(t.args, []part{{"{}", true}})
	}
	return t, nil
}

func split(s string) []part {
	var out []part
	text := 0 // where it began
	for i := 0; i < len(s); {
		n := 0
		if s[i] == '{' {
			for _, h := range [...]string{"{}", "{.}", "{/}", "{//}", "{/.}", "{#}"} {
				if strings.HasPrefix(s[i:], h) {
					n = len(h)
				}
			}
		}
		if n == 0 {
			i++
			continue
		}
		if text < i {
			out = append(out, part{s[text:i], false})
		}
		out = append(out, part{s[i : i+n], true})
		i += n
		text = i
	}
	if text < len(s) || len(out) == 0 {
		out = append(out, part{s[text:], false})
	}
	return out
}

// Args are the arguments for a task.
func (t *Template) Args(task string, seq int64) []string {
	args := make([]string, 0, len(t.args))
	for _, parts := range t.args {
		if len(parts) == 1 && !parts[0].hole {
			args = append(args, parts[0].text)
			continue
		}
		var b strings.Builder
		for _, p := range parts {
			if p.hole {
				b.WriteString(fill(p.text, task, seq))
			} else {
				b.WriteString(p.text)
			}
		}
		args = append(args, b.String())
	}
	return args
}

func fill(hole, task string, seq int64) string {
	switch hole {
	case "{.}":
		return bare(task)
	case "{/}":
		return base(task)
	case "{//}":
		return filepath.Dir(task)
	case "{/.}":
		return bare(base(task))
	case "{#}":
		return strconv.FormatInt(seq, 10)
	}
	return task
}

// base is what follows the last slash.
func base(s string) string { return s[strings.LastIndexByte(s, '/')+1:] }

// bare is s without the extension of its last name. A name that begins with its
// only dot has none.
func bare(s string) string {
	dot := strings.LastIndexByte(s, '.')
	if dot <= strings.LastIndexByte(s, '/')+1 {
		return s
	}
	return s[:dot]
}

// Line is the command for a task as a shell would have to be given it.
func (t *Template) Line(task string, seq int64) string {
	words := append([]string{t.program}, t.Args(task, seq)...)
	for i, w := range words {
		words[i] = quote(w)
	}
	return strings.Join(words, " ")
}

// quote makes one word of a shell out of s.
func quote(s string) string {
	plain := s != ""
	for i := 0; i < len(s) && plain; i++ {
		c := s[i]
		plain = 'a' <= c && c <= 'z' || 'A' <= c && c <= 'Z' || '0' <= c && c <= '9' || strings.IndexByte("_-./:=@%+,", c) >= 0
	}
	if plain {
		return s
	}
	return "'" + strings.ReplaceAll(s, "'", `'\''`) + "'"
}
