package config

import (
	"errors"
	"fmt"
	"reflect"
	"slices"
	"strconv"
	"strings"
)

// decoder fills Go values from nodes and says of everything that does not fit
// where it is and what would. The same structs give the JSON Schema, so what
// is accepted and what is published cannot drift apart.
type decoder struct {
	problems
	lookup func(name string) (string, bool) // for ${NAME}
}

// nodeDecoder is for types that are written in more than one way.
type nodeDecoder interface {
	decodeNode(d *decoder, n *node, what string)
}

// resolve carries out the ${NAME} in a string; other nodes stay as they are.
func (d *decoder) resolve(n *node) *node {
	if n.kind != kString || !strings.Contains(n.text, "$") {
		return n
	}
	s, err := Interpolate(n.text, d.lookup)
	if err != nil {
		d.on(n, "%v", err)
		// Carry on with something, so that the other mistakes are found too.
		s = n.text
	}
	if s == n.text {
		return n
	}
	cp := *n
	cp.text = s
	retype(&cp)
	return &cp
}

func (d *decoder) wrong(n *node, what, want string) {
	got := n.kind.String()
	if n.scalar() {
		got = clip(n.text)
	}
	d.on(n, "%s: %s where %s should be", what, got, want)
}

// decode fills v from n. what names the place for messages: `app "web": cwd`.
func (d *decoder) decode(n *node, v reflect.Value, what string) {
	if v.Kind() == reflect.Pointer {
		if v.IsNil() {
			v.Set(reflect.New(v.Type().Elem()))
		}
		v = v.Elem()
	}
	if nd, ok := v.Addr().Interface().(nodeDecoder); ok {
		nd.decodeNode(d, d.resolve(n), what)
		return
	}
	n = d.resolve(n)
	switch v.Kind() {
	case reflect.String:
		if !n.scalar() {
			d.wrong(n, what, "a string")
			return
		}
		v.SetString(n.text)
	case reflect.Bool:
		if n.kind != kBool {
			d.wrong(n, what, "true or false")
			return
		}
		v.SetBool(n.text == "true")
	case reflect.Int, reflect.Int64:
		i, ok := intOf(n.text)
		if n.kind != kNumber || !ok {
			d.wrong(n, what, "a whole number")
			return
		}
		v.SetInt(i)
	case reflect.Slice:
		if n.kind != kList {
			d.wrong(n, what, "a list")
			return
		}
		for i, e := range n.list {
			ev := reflect.New(v.Type().Elem()).Elem()
			d.decode(e, ev, fmt.Sprintf("%s[%d]", what, i))
			v.Set(reflect.Append(v, ev))
		}
	case reflect.Map:
		if n.kind != kMap {
			d.wrong(n, what, "a mapping")
			return
		}
		v.Set(reflect.MakeMapWithSize(v.Type(), len(n.fields)))
		for _, f := range n.fields {
			ev := reflect.New(v.Type().Elem()).Elem()
			d.decode(f.val, ev, what+"."+f.key)
			v.SetMapIndex(reflect.ValueOf(f.key), ev)
		}
	case reflect.Struct:
		d.structure(n, v, what)
	}
}

// structure fills a struct by the json tags of its fields; a field tagged
// prefix:"x" takes every key that begins with x.
func (d *decoder) structure(n *node, v reflect.Value, what string) {
	if n.kind == kNull {
		return
	}
	if n.kind != kMap {
		d.wrong(n, what, "a mapping of "+strings.Join(keysOf(v.Type()), ", "))
		return
	}
fields:
	for _, f := range n.fields {
		for i := range v.NumField() {
			sf := v.Type().Field(i)
			if name, _, _ := strings.Cut(sf.Tag.Get("json"), ","); name == f.key && name != "" {
				if f.val.kind == kNull && sf.Tag.Get("null") == "" {
					d.at(f.line, f.col, "%s has no value; write one or remove the key", place(what, f.key))
				} else {
					d.decode(f.val, v.Field(i), place(what, f.key))
				}
				continue fields
			}
		}
		for i := range v.NumField() {
			sf := v.Type().Field(i)
			if pre := sf.Tag.Get("prefix"); pre != "" && strings.HasPrefix(f.key, pre) && f.key != pre {
				if v.Field(i).IsNil() {
					v.Field(i).Set(reflect.MakeMap(sf.Type))
				}
				ev := reflect.New(sf.Type.Elem()).Elem()
				d.decode(f.val, ev, place(what, f.key))
				v.Field(i).SetMapIndex(reflect.ValueOf(strings.TrimPrefix(f.key, pre)), ev)
				continue fields
			}
		}
		if what == "" && strings.HasPrefix(f.key, "x-") {
			continue // room for YAML anchors
		}
		in := "in " + strings.TrimSuffix(what, ":")
		if what == "" {
			in = "at the top of the file"
		}
		keys := keysOf(v.Type())
		hint := didYouMean(f.key, keys)
		if hint == "" {
			hint = "; known are " + strings.Join(keys, ", ")
		}
		d.at(f.line, f.col, "unknown key %s %s%s", clip(f.key), in, hint)
	}
}

// place is the name of key within what.
func place(what, key string) string {
	switch {
	case what == "":
		return key
	case strings.HasSuffix(what, `"`): // app "web"
		return what + ": " + key
	}
	return what + "." + key
}

func keysOf(t reflect.Type) []string {
	var keys []string
	for i := range t.NumField() {
		if name, _, _ := strings.Cut(t.Field(i).Tag.Get("json"), ","); name != "" && name != "-" {
			keys = append(keys, name)
		}
	}
	slices.Sort(keys)
	return keys
}

// into decodes n into the struct p points to.
func (d *decoder) into(n *node, p any, what string) { d.structure(n, reflect.ValueOf(p).Elem(), what) }

// errUnset is what Interpolate returns, wrapped, for a variable without a
// value.
var errUnset = errors.New("is not set")

// Interpolate replaces ${NAME} by the variable's value, ${NAME:-text} by its
// value or, where that is unset or empty, by text, ${NAME:?text} likewise by
// an error with text; $$ stands for one $. A $ before anything else stays.
func Interpolate(s string, lookup func(string) (string, bool)) (string, error) {
	if !strings.Contains(s, "$") {
		return s, nil
	}
	var b strings.Builder
	for i := 0; i < len(s); i++ {
		if s[i] != '$' || i+1 == len(s) {
			b.WriteByte(s[i])
			continue
		}
		if s[i+1] == '$' {
			b.WriteByte('$')
			i++
			continue
		}
		if s[i+1] != '{' {
			b.WriteByte('$')
			continue
		}
		end := strings.IndexByte(s[i:], '}')
		if end < 0 {
			return "", fmt.Errorf("%s has no closing brace; write $$ for a plain $", clip(s[i:]))
		}
		expr := s[i+2 : i+end]
		i += end
		name, rest := expr, ""
		if j := strings.IndexAny(expr, ":-?"); j >= 0 {
			name, rest = expr[:j], expr[j:]
		}
		if !envWord(name) {
			return "", fmt.Errorf("%s is no variable; write ${NAME} or ${NAME:-default}, or $${ for plain text", clip("${"+expr+"}"))
		}
		val, ok := lookup(name)
		colon := strings.HasPrefix(rest, ":")
		if colon && val == "" {
			ok = false
		}
		op := strings.TrimPrefix(rest, ":")
		switch {
		case rest == "" && !ok:
			return "", fmt.Errorf("variable %s %w; set it, or write ${%s:-default}", name, errUnset, name)
		case rest == "", ok && (op != "" && (op[0] == '-' || op[0] == '?')):
			b.WriteString(val)
		case op != "" && op[0] == '-':
			b.WriteString(op[1:])
		case op != "" && op[0] == '?':
			return "", fmt.Errorf("variable %s %w: %s", name, errUnset, op[1:])
		default:
			return "", fmt.Errorf("%s cannot be read; write ${NAME}, ${NAME:-default} or ${NAME:?message}", clip("${"+expr+"}"))
		}
	}
	return b.String(), nil
}

// envWord reports whether s is a variable name as shells have them.
func envWord(s string) bool {
	for i, c := range s {
		if c != '_' && (c < 'a' || c > 'z') && (c < 'A' || c > 'Z') && (c < '0' || c > '9' || i == 0) {
			return false
		}
	}
	return s != ""
}

// The types below are what remuda.yaml values are decoded into where a plain
// Go type does not do.

func (d *Duration) decodeNode(dec *decoder, n *node, what string) {
	if n.kind != kNumber && n.kind != kString {
		dec.wrong(n, what, "a duration such as 500ms, 1.5s or 2m")
		return
	}
	v, err := ParseDuration(n.text)
	switch {
	case err != nil:
		dec.on(n, "%s: %v", what, err)
	case v < 0:
		dec.on(n, "%s: %s is negative", what, n.text)
	default:
		*d = v
	}
}

type byteSize int64

func (b *byteSize) decodeNode(dec *decoder, n *node, what string) {
	if n.kind != kNumber && n.kind != kString {
		dec.wrong(n, what, "a size such as 300M or 1.5GB")
		return
	}
	v, err := ParseSize(n.text)
	switch {
	case err != nil:
		dec.on(n, "%s: %v", what, err)
	case v < 0:
		dec.on(n, "%s: %s is negative", what, n.text)
	default:
		*b = byteSize(v)
	}
}

// stringList is a string or a list of strings.
type stringList []string

func (l *stringList) decodeNode(d *decoder, n *node, what string) {
	if n.scalar() {
		*l = stringList{n.text}
		return
	}
	if n.kind != kList {
		d.wrong(n, what, "a string or a list of strings")
		return
	}
	*l = stringList{}
	for i, e := range n.list {
		if e = d.resolve(e); !e.scalar() {
			d.wrong(e, fmt.Sprintf("%s[%d]", what, i), "a string")
			continue
		}
		*l = append(*l, e.text)
	}
}

// words is a command: a string that is split, or a list that is not.
type words struct {
	text string
	list []string
	n    *node
}

func (w *words) decodeNode(d *decoder, n *node, what string) {
	w.n = n
	if n.kind == kString {
		w.text = n.text
		if strings.TrimSpace(n.text) == "" {
			d.on(n, "%s is empty; write the command to run", what)
		}
		return
	}
	var l stringList
	if n.kind != kList {
		d.wrong(n, what, "a command or a list of words")
		return
	}
	l.decodeNode(d, n, what)
	if len(n.list) == 0 {
		d.on(n, "%s is empty; write the command to run", what)
	}
	w.list = l
}

// argv is the command as words; false where it cannot be split, which has
// been said then.
func (w *words) argv(d *decoder, shell bool, what string) ([]string, bool) {
	if w.n == nil {
		return nil, false
	}
	if shell {
		if w.list != nil {
			d.on(w.n, "%s: shell: true goes with a string, not with a list", what)
			return nil, false
		}
		return []string{"/bin/sh", "-c", w.text}, w.text != ""
	}
	if w.list != nil || w.text == "" {
		if len(w.list) > 0 && w.list[0] == "" {
			d.on(w.n, "%s: the first word, the program, is empty", what)
			return nil, false
		}
		return w.list, len(w.list) > 0
	}
	argv, err := Split(w.text)
	switch {
	case errors.Is(err, ErrShell):
		d.on(w.n, "%s: %v; put quotes around it if it is meant as it stands, or set shell: true", what, strings.TrimPrefix(err.Error(), ErrShell.Error()+": "))
		return nil, false
	case err != nil:
		d.on(w.n, "%s: %v", what, err)
		return nil, false
	case len(argv) == 0 || argv[0] == "":
		d.on(w.n, "%s names no program", what)
		return nil, false
	}
	if name, _, ok := strings.Cut(argv[0], "="); ok && envWord(name) {
		d.on(w.n, "%s: %s sets a variable, which only a shell does here; put it under env:, or set shell: true", what, clip(name+"="))
		return nil, false
	}
	return argv, true
}

// envMap is variables, as a mapping or as a list of NAME=value.
type envMap map[string]string

func (m *envMap) decodeNode(d *decoder, n *node, what string) {
	*m = envMap{}
	switch n.kind {
	case kNull:
	case kMap:
		for _, f := range n.fields {
			v := d.resolve(f.val)
			if !v.scalar() {
				if v.kind == kNull {
					d.at(f.line, f.col, `%s.%s has no value; write "" for an empty one`, what, f.key)
				} else {
					d.wrong(v, what+"."+f.key, "a string, number or boolean")
				}
				continue
			}
			if why := badEnv(f.key, v.text); why != "" {
				d.at(f.line, f.col, "%s: %s", what, why)
				continue
			}
			(*m)[f.key] = v.text
		}
	case kList:
		for _, e := range n.list {
			e = d.resolve(e)
			name, val, ok := strings.Cut(e.text, "=")
			if e.kind != kString || !ok {
				d.wrong(e, what, "NAME=value")
				continue
			}
			if why := badEnv(name, val); why != "" {
				d.on(e, "%s: %s", what, why)
				continue
			}
			(*m)[name] = val
		}
	default:
		d.wrong(n, what, "a mapping of variables")
	}
}

// badEnv says what keeps a variable out of an environment, "" for nothing.
func badEnv(name, val string) string {
	switch {
	case name == "":
		return "a variable has no name"
	case strings.Contains(name, "="):
		return fmt.Sprintf("variable name %s has a = in it", clip(name))
	case strings.ContainsRune(name, 0), strings.ContainsRune(val, 0):
		return fmt.Sprintf("variable %s has a NUL byte in it", clip(strings.ReplaceAll(name, "\x00", "")))
	}
	return ""
}

// envFiles is one .env file or several; {path, required: false} for one that
// may be missing.
type envFiles []envFile

type envFile struct {
	Path     string `json:"path" jsonschema_description:"The file, relative to the folder of remuda.yaml."`
	Required *bool  `json:"required,omitempty" jsonschema_description:"false: no error where the file is missing."`
	n        *node
}

func (l *envFiles) decodeNode(d *decoder, n *node, what string) {
	list := []*node{n}
	if n.kind == kList {
		list = n.list
	}
	for _, e := range list {
		e = d.resolve(e)
		f := envFile{n: e}
		switch e.kind {
		case kString:
			f.Path = e.text
		case kMap:
			d.into(e, &f, what)
		default:
			d.wrong(e, what, "a path")
			continue
		}
		if f.Path == "" {
			d.on(e, "%s: the path is empty", what)
			continue
		}
		*l = append(*l, f)
	}
}

// instances is a number or a word [ResolveInstances] knows.
type instances int

func (i *instances) decodeNode(d *decoder, n *node, what string) {
	if n.kind != kNumber && n.kind != kString {
		d.wrong(n, what, `a number or "max"`)
		return
	}
	v, err := ResolveInstances(n.text)
	if err != nil {
		d.on(n, "%s: %v", what, err)
		return
	}
	*i = instances(v)
}

// id is a user or group: a name or a number.
type id string

func (i *id) decodeNode(d *decoder, n *node, what string) {
	if n.kind != kNumber && n.kind != kString {
		d.wrong(n, what, "a name or a number")
		return
	}
	*i = id(n.text)
}

// octal is a file mode mask, which YAML reads as a number in several ways.
type octal string

func (o *octal) decodeNode(d *decoder, n *node, what string) {
	s := strings.TrimPrefix(n.text, "0o")
	if v, err := strconv.ParseUint(s, 8, 32); !n.scalar() || err != nil || v > 0o777 {
		d.wrong(n, what, `octal digits such as "022"`)
		return
	}
	*o = octal(s)
}
