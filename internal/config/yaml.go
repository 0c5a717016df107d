package config

import (
	"errors"
	"fmt"
	"regexp"
	"strings"
	"unicode/utf8"

	"github.com/goccy/go-yaml"
	"github.com/goccy/go-yaml/ast"
	"github.com/goccy/go-yaml/lexer"
	"github.com/goccy/go-yaml/parser"
	"github.com/goccy/go-yaml/token"
)

// parseYAML reads one YAML document. A nil node is an empty document.
func parseYAML(file string, data []byte) (n *node, err error) {
	// The parser is not ours; whatever it does with a hostile file must come
	// back as an error.
	defer func() {
		if r := recover(); r != nil {
			n, err = nil, &Error{[]Problem{{File: file, Text: "this is not YAML that can be read"}}}
		}
	}()
	if err := checkText(file, data); err != nil {
		return nil, err
	}
	fail := func(tk *token.Token, format string, args ...any) error {
		p := problems{file: file}
		if tk != nil && tk.Position != nil {
			p.at(tk.Position.Line, tk.Position.Column, format, args...)
		} else {
			p.at(0, 0, format, args...)
		}
		return p.err()
	}
	if err := checkShape(file, string(data)); err != nil {
		return nil, err
	}
	tokens := lexer.Tokenize(string(data))
	if len(tokens) > 4*maxNodes {
		return nil, fail(nil, "the file has more than %d values; split it", maxNodes)
	}
	if tk := tooMany(tokens); tk != nil {
		return nil, fail(tk, "the file has more than %d keys; split it", maxKeys)
	}
	if tk := tooDeep(tokens); tk != nil {
		return nil, fail(tk, "nested more than %d levels deep", maxDepth)
	}
	// Doubled keys are found below: the parser's own check takes time that
	// grows with the square of their number.
	f, err := parser.Parse(tokens, 0, parser.AllowDuplicateMapKey())
	if err != nil {
		var ye yaml.Error
		if errors.As(err, &ye) {
			return nil, fail(ye.GetToken(), "not valid YAML: %s", ye.GetMessage())
		}
		return nil, fail(nil, "not valid YAML: %v", err)
	}
	var body ast.Node
	for _, d := range f.Docs {
		if d.Body == nil || d.Body.Type() == ast.CommentType || d.Body.Type() == ast.CommentGroupType {
			continue
		}
		if body != nil {
			return nil, fail(d.Body.GetToken(), "the file holds more than one YAML document; keep the first")
		}
		body = d.Body
	}
	if body == nil {
		return nil, nil
	}
	c := yamlConverter{problems: problems{file: file}, anchors: map[string]*node{}}
	n = c.convert(body, 0)
	if err := c.err(); err != nil {
		return nil, err
	}
	return n, nil
}

// checkText refuses what is no text file at all.
func checkText(file string, data []byte) error {
	p := problems{file: file}
	switch {
	case len(data) > maxFile:
		p.at(0, 0, "the file is larger than %d MiB", maxFile>>20)
	case !utf8.Valid(data):
		line := 1
		for rest := data; len(rest) > 0; {
			r, size := utf8.DecodeRune(rest)
			if r == utf8.RuneError && size == 1 {
				break
			}
			if r == '\n' {
				line++
			}
			rest = rest[size:]
		}
		p.at(line, 0, "the file is not UTF-8 text")
	default:
		for i, line := 0, 1; i < len(data); i++ {
			if data[i] == 0 {
				p.at(line, 0, "the file has a NUL byte; it is not a text file")
				break
			}
			if data[i] == '\n' {
				line++
			}
		}
	}
	return p.err()
}

// checkShape bounds what the tokenizer and the parser recurse and loop over,
// before they do: a line of a thousand brackets or dashes is an attack or an
// accident, never a configuration.
func checkShape(file, s string) error {
	line := 0
	for rest := s; rest != ""; {
		line++
		var l string
		l, rest, _ = strings.Cut(rest, "\n")
		if indent := len(l) - len(strings.TrimLeft(l, " \t")); indent > 1000 && indent < len(l) {
			p := problems{file: file}
			p.at(line, indent+1, "indented by more than 1000 columns")
			return p.err()
		}
	}
	return nil
}

// maxKeys bounds the parser, whose time grows with the square of the keys of
// a mapping: at the bound it is seconds at worst.
const maxKeys = 20_000

func tooMany(tokens token.Tokens) *token.Token {
	keys := 0
	for _, tk := range tokens {
		if tk.Type == token.MappingValueType {
			if keys++; keys > maxKeys {
				return tk
			}
		}
	}
	return nil
}

// tooDeep is the first token nested deeper than maxDepth, nil for none.
func tooDeep(tokens token.Tokens) *token.Token {
	flow, line, run := 0, 0, 0
	for _, tk := range tokens {
		switch tk.Type {
		case token.MappingStartType, token.SequenceStartType:
			flow++
		case token.MappingEndType, token.SequenceEndType:
			flow--
		}
		if flow > maxDepth {
			return tk
		}
		if tk.Position == nil {
			continue
		}
		if tk.Position.Line != line {
			line, run = tk.Position.Line, 0
		}
		switch tk.Type {
		case token.SequenceEntryType, token.MappingKeyType, token.AnchorType, token.TagType, token.AliasType:
			if run++; run > maxDepth && flow == 0 {
				return tk
			}
		case token.MappingValueType:
			if run++; run > maxDepth && flow == 0 {
				return tk
			}
		}
	}
	return nil
}

type yamlConverter struct {
	problems
	anchors map[string]*node
	made    int
}

// count refuses more values than maxNodes, which is what makes a "billion
// laughs" file an error.
func (c *yamlConverter) count(n *node, line, col int) bool {
	var size func(n *node) int
	size = func(n *node) int {
		total := 1
		for _, e := range n.list {
			total += size(e)
		}
		for _, f := range n.fields {
			total += size(f.val)
		}
		return total
	}
	if n == nil {
		c.made++
	} else {
		c.made += size(n)
	}
	if c.made > maxNodes {
		if len(c.list) == 0 {
			c.at(line, col, "the file has more than %d values once aliases are written out", maxNodes)
		}
		return false
	}
	return true
}

func (c *yamlConverter) convert(n ast.Node, depth int) *node {
	out := &node{}
	if n == nil {
		return out
	}
	if tk := n.GetToken(); tk != nil && tk.Position != nil {
		out.line, out.col = tk.Position.Line, tk.Position.Column
	}
	if depth > maxDepth {
		c.at(out.line, out.col, "nested more than %d levels deep", maxDepth)
		return out
	}
	if !c.count(nil, out.line, out.col) {
		return out
	}
	switch n := n.(type) {
	case *ast.NullNode:
	case *ast.BoolNode:
		out.kind, out.text = kBool, fmt.Sprint(n.Value)
	case *ast.IntegerNode:
		out.kind, out.text = kNumber, n.Token.Value
	case *ast.FloatNode:
		out.kind, out.text = kNumber, n.Token.Value
	case *ast.InfinityNode, *ast.NanNode:
		out.kind, out.text = kString, n.GetToken().Value
	case *ast.StringNode:
		out.kind, out.text = kString, n.Value
		out.quoted = n.Token != nil && (n.Token.Type == token.DoubleQuoteType || n.Token.Type == token.SingleQuoteType)
	case *ast.LiteralNode:
		out.kind, out.text, out.quoted = kString, n.Value.Value, true
	case *ast.AnchorNode:
		out = c.convert(n.Value, depth)
		if n.Name != nil {
			c.anchors[n.Name.GetToken().Value] = out
		}
	case *ast.AliasNode:
		name := ""
		if n.Value != nil {
			name = n.Value.GetToken().Value
		}
		target, ok := c.anchors[name]
		if !ok {
			c.at(out.line, out.col, "alias *%s refers to no anchor &%s before it", name, name)
			return out
		}
		if !c.count(target, out.line, out.col) {
			return out
		}
		out = target
	case *ast.TagNode:
		return c.tagged(n, depth, out)
	case *ast.MappingNode:
		out.kind = kMap
		if len(n.Values) > 0 {
			c.pos(out, n.Values[0].Key)
		}
		seen := make(map[string]int, len(n.Values))
		for _, v := range n.Values {
			c.entry(out, v, depth, seen)
		}
	case *ast.MappingValueNode:
		out.kind = kMap
		c.pos(out, n.Key)
		c.entry(out, n, depth, map[string]int{})
	case *ast.SequenceNode:
		out.kind = kList
		for _, v := range n.Values {
			if v != nil && (v.Type() == ast.CommentType || v.Type() == ast.CommentGroupType) {
				continue
			}
			out.list = append(out.list, c.convert(v, depth+1))
		}
	default:
		c.at(out.line, out.col, "%s cannot stand here", strings.ToLower(n.Type().String()))
	}
	return out
}

func (c *yamlConverter) pos(out *node, n ast.Node) {
	if n == nil {
		return
	}
	if tk := n.GetToken(); tk != nil && tk.Position != nil {
		out.line, out.col = tk.Position.Line, tk.Position.Column
	}
}

func (c *yamlConverter) tagged(n *ast.TagNode, depth int, out *node) *node {
	tag := ""
	if n.Start != nil {
		tag = n.Start.Value
	}
	v := c.convert(n.Value, depth+1)
	switch tag {
	case "!!str":
		if v.kind == kMap || v.kind == kList {
			c.at(out.line, out.col, "!!str before something that is no string")
			return v
		}
		cp := *v
		cp.kind, cp.quoted = kString, true
		return &cp
	case "!!int", "!!float", "!!bool", "!!map", "!!seq", "!!null":
		return v
	}
	c.at(out.line, out.col, "the YAML tag %s is not known here; leave it out", clip(tag))
	return v
}

// entry adds one key to out; seen has where in out.fields each key is.
func (c *yamlConverter) entry(out *node, v *ast.MappingValueNode, depth int, seen map[string]int) {
	at := &node{}
	c.pos(at, v.Key)
	if v.Key.IsMergeKey() {
		c.merge(out, c.convert(v.Value, depth+1), at, seen)
		return
	}
	key := c.convert(unwrapKey(v.Key), depth+1)
	if !key.scalar() {
		c.at(at.line, at.col, "a key must be a plain word")
		return
	}
	val := c.convert(v.Value, depth+1)
	i, dup := seen[key.text]
	if !dup {
		seen[key.text] = len(out.fields)
		out.fields = append(out.fields, field{key.text, at.line, at.col, val})
		return
	}
	f := &out.fields[i]
	if f.line > 0 {
		c.at(at.line, at.col, "key %s is there twice, the first time at line %d; remove one", clip(key.text), f.line)
		return
	}
	// What the file itself says goes over what << brought in.
	f.line, f.col, f.val = at.line, at.col, val
}

func unwrapKey(k ast.MapKeyNode) ast.Node {
	if mk, ok := k.(*ast.MappingKeyNode); ok {
		return mk.Value
	}
	return k
}

// merge carries out "<<: *base" and "<<: [*a, *b]": keys that are there
// already stay.
func (c *yamlConverter) merge(out, from, at *node, seen map[string]int) {
	switch from.kind {
	case kList:
		for _, n := range from.list {
			if n.kind != kMap {
				c.at(at.line, at.col, "<< merges mappings only")
				return
			}
			c.merge(out, n, at, seen)
		}
	case kMap:
		for _, f := range from.fields {
			if _, ok := seen[f.key]; !ok {
				f.line, f.col = 0, 0
				seen[f.key] = len(out.fields)
				out.fields = append(out.fields, f)
			}
		}
	default:
		c.at(at.line, at.col, "<< merges mappings only")
	}
}

// retype gives a string that interpolation has changed the type its new text
// has. Quoted ones too: within {} YAML wants ${NAME} in quotes.
func retype(n *node) {
	switch {
	case n.text == "true" || n.text == "false":
		n.kind = kBool
	case regexp.MustCompile(`^[-+]?[0-9]+(\.[0-9]+)?$`).MatchString(n.text):
		n.kind = kNumber
	}
}
