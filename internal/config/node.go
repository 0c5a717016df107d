package config

import (
	"fmt"
	"strconv"
	"strings"
)

// Bounds of what is read: no file a person writes comes near them, and
// nothing within them takes noticeable time or memory.
const (
	maxFile  = 4 << 20 // bytes
	maxDepth = 64      // of nesting
	maxNodes = 200_000 // values, aliases written out
)

type kind uint8

const (
	kNull kind = iota
	kBool
	kNumber
	kString
	kList
	kMap
)

func (k kind) String() string {
	switch k {
	case kNull:
		return "nothing"
	case kBool:
		return "true or false"
	case kNumber:
		return "a number"
	case kString:
		return "a string"
	case kList:
		return "a list"
	default:
		return "a mapping"
	}
}

// node is a value of a file, of whatever syntax, with its position. The
// positions are what the standard decoders lose and a person needs.
type node struct {
	kind      kind
	text      string // kString: the value; kBool, kNumber: as written
	quoted    bool   // kString: in quotes, so never taken for another type
	list      []*node
	fields    []field // kMap, in the order of the file
	line, col int
}

type field struct {
	key       string
	line, col int
	val       *node
}

// get is the value of a key of a mapping, nil where there is none.
func (n *node) get(key string) *node {
	if n == nil {
		return nil
	}
	for i := range n.fields {
		if n.fields[i].key == key {
			return n.fields[i].val
		}
	}
	return nil
}

// scalar reports whether n is a string, number or bool; its text is then n.text.
func (n *node) scalar() bool { return n.kind == kBool || n.kind == kNumber || n.kind == kString }

// problems collects what is wrong with one file. Past the limit it only
// counts, so that a broken generator does not flood a terminal.
type problems struct {
	file string
	list []Problem
	more int
}

const maxProblems = 20

func (p *problems) at(line, col int, format string, args ...any) {
	if len(p.list) >= maxProblems {
		p.more++
		return
	}
	p.list = append(p.list, Problem{File: p.file, Line: line, Col: col, Text: oneLine(fmt.Sprintf(format, args...))})
}

func (p *problems) on(n *node, format string, args ...any) {
	if n == nil {
		p.at(0, 0, format, args...)
		return
	}
	p.at(n.line, n.col, format, args...)
}

// err is nil where nothing is wrong.
func (p *problems) err() error {
	if len(p.list) == 0 {
		return nil
	}
	list := p.list
	if p.more > 0 {
		list = append(list[:len(list):len(list)], Problem{File: p.file, Text: fmt.Sprintf("and %d more problems", p.more)})
	}
	return &Error{Problems: list}
}

// oneLine keeps text that quotes a file or another program on one line.
func oneLine(s string) string {
	if !strings.ContainsFunc(s, func(r rune) bool { return r < ' ' || r == 0x7f }) {
		return s
	}
	return strings.Map(func(r rune) rune {
		if r < ' ' || r == 0x7f {
			return ' '
		}
		return r
	}, strings.TrimSpace(s))
}

// intOf reads a whole number as YAML and JavaScript write it.
func intOf(s string) (int64, bool) {
	t := strings.ReplaceAll(s, "_", "")
	if n, err := strconv.ParseInt(t, 0, 64); err == nil {
		// ParseInt reads 010 as eight; YAML 1.2, JSON and people do not.
		if len(t) > 1 && strings.TrimLeft(t, "+-0") != "" && strings.HasPrefix(strings.TrimLeft(t, "+-"), "0") && isDigits(strings.TrimLeft(t, "+-")) {
			n, err = strconv.ParseInt(t, 10, 64)
			return n, err == nil
		}
		return n, true
	}
	if n, err := strconv.ParseInt(t, 10, 64); err == nil {
		return n, true
	}
	// 3.0 and 1e3 are whole numbers in JavaScript.
	if f, err := strconv.ParseFloat(t, 64); err == nil && f == float64(int64(f)) && f < 1<<53 && f > -(1<<53) {
		return int64(f), true
	}
	return 0, false
}

func isDigits(s string) bool {
	return s != "" && strings.Trim(s, "0123456789") == ""
}

// nearest is the candidate a person most likely meant by s, "" where none is
// near.
func nearest(s string, candidates []string) string {
	if len(s) > 64 {
		return ""
	}
	best, bestDist := "", 1+max(1, len(s)/3)
	low := strings.ToLower(strings.ReplaceAll(s, "-", "_"))
	for _, c := range candidates {
		lc := strings.ToLower(c)
		if strings.ReplaceAll(low, "_", "") == strings.ReplaceAll(lc, "_", "") {
			return c
		}
		if d := editDistance(low, lc); d < bestDist {
			best, bestDist = c, d
		}
	}
	return best
}

// editDistance counts insertions, deletions, replacements and swaps of
// neighbours that turn a into b.
func editDistance(a, b string) int {
	prev2 := make([]int, len(b)+1)
	prev := make([]int, len(b)+1)
	cur := make([]int, len(b)+1)
	for j := range prev {
		prev[j] = j
	}
	for i := 1; i <= len(a); i++ {
		cur[0] = i
		for j := 1; j <= len(b); j++ {
			cost := 1
			if a[i-1] == b[j-1] {
				cost = 0
			}
			cur[j] = min(prev[j]+1, cur[j-1]+1, prev[j-1]+cost)
			if i > 1 && j > 1 && a[i-1] == b[j-2] && a[i-2] == b[j-1] {
				cur[j] = min(cur[j], prev2[j-2]+1)
			}
		}
		prev2, prev, cur = prev, cur, prev2
	}
	return prev[len(b)]
}

func didYouMean(s string, candidates []string) string {
	if c := nearest(s, candidates); c != "" {
		return fmt.Sprintf(": did you mean %q?", c)
	}
	return ""
}
