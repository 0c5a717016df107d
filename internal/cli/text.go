package cli

import (
	"fmt"
	"io"
	"os"
	"strconv"
	"strings"
	"time"
	"unicode"
	"unicode/utf8"

	"github.com/mattn/go-runewidth"
	"golang.org/x/term"

	"github.com/remuda-dev/remuda/client"
)

// maxMessage bounds a message in bytes, so that a name of 10,000 characters
// does not fill the screen.
const maxMessage = 4000

// clean makes text from elsewhere harmless on a terminal: control characters
// (newlines and tabs apart) and invalid UTF-8 become escapes, and what is
// longer than limit bytes is cut.
func clean(s string, limit int) string {
	cut := false
	if limit > 0 && len(s) > limit {
		s, cut = s[:limit], true
		for len(s) > 0 && !utf8.RuneStart(s[len(s)-1]) {
			s = s[:len(s)-1]
		}
		if r, n := utf8.DecodeLastRuneInString(s); r == utf8.RuneError && n == 1 {
			s = s[:len(s)-1]
		}
	}
	s = escape(s, true)
	if cut {
		s += "…"
	}
	return s
}

// label is [clean] for names: one line, no tabs.
func label(s string) string { return escape(s, false) }

func escape(s string, lines bool) string {
	ok := true
	for i := 0; i < len(s); i++ {
		if b := s[i]; b < 0x20 && (!lines || b != '\n' && b != '\t') || b >= 0x7f {
			ok = false
			break
		}
	}
	if ok {
		return s
	}
	var b strings.Builder
	for i := 0; i < len(s); {
		r, n := utf8.DecodeRuneInString(s[i:])
		switch {
		case r == utf8.RuneError && n == 1:
			fmt.Fprintf(&b, `\x%02x`, s[i])
		case lines && (r == '\n' || r == '\t'):
			b.WriteRune(r)
		case unicode.IsPrint(r) || r == '\u200d' || r == '\ufe0f':
			b.WriteString(s[i : i+n])
		default:
			q := strconv.QuoteRune(r)
			b.WriteString(q[1 : len(q)-1])
		}
		i += n
	}
	return b.String()
}

// width is the number of columns s takes on a terminal.
func width(s string) int {
	for i := 0; i < len(s); i++ {
		if s[i] >= 0x80 {
			return runewidth.StringWidth(s)
		}
	}
	return len(s)
}

// fit cuts s to w columns, with … where something is lost.
func fit(s string, w int) string {
	if width(s) <= w {
		return s
	}
	return runewidth.Truncate(s, w, "…")
}

func (c *cli) isTerminal(w io.Writer) bool {
	f, ok := file(w)
	return ok && term.IsTerminal(int(f.Fd()))
}

// file is the file that is written to.
func file(w io.Writer) (*os.File, bool) {
	if o, ok := w.(*output); ok {
		w = o.Writer
	}
	f, ok := w.(*os.File)
	return f, ok
}

// columns is how wide output may be, 0 for any width.
func (c *cli) columns(w io.Writer) int {
	if f, ok := file(w); ok && term.IsTerminal(int(f.Fd())) {
		if n, _, err := term.GetSize(int(f.Fd())); err == nil && n > 0 {
			return n
		}
		return max(c.columnsVariable(), 80)
	}
	return c.columnsVariable()
}

func (c *cli) columnsVariable() int {
	n, err := strconv.Atoi(c.getenv("COLUMNS"))
	if err != nil || n < 0 {
		return 0
	}
	return n
}

// paint is how output is coloured; the zero value does not.
type paint bool

func (c *cli) paint(w io.Writer) paint {
	return paint(!c.noColor && c.getenv("NO_COLOR") == "" && c.getenv("TERM") != "dumb" && c.isTerminal(w))
}

func (p paint) sgr(code, s string) string {
	if !p || s == "" {
		return s
	}
	return "\x1b[" + code + "m" + s + "\x1b[0m"
}

func (p paint) bold(s string) string { return p.sgr("1", s) }
func (p paint) dim(s string) string  { return p.sgr("2", s) }
func (p paint) red(s string) string  { return p.sgr("31", s) }

// state colours s by the state it tells of.
func (p paint) state(st client.State, s string) string {
	switch st {
	case client.Online:
		return p.sgr("32", s)
	case client.Errored:
		return p.sgr("1;31", s)
	case client.Backoff, client.Unready:
		return p.sgr("33", s)
	case client.Starting, client.Waiting, client.Stopping:
		return p.sgr("36", s)
	case client.Stopped:
		return p.sgr("90", s)
	}
	return s
}

// app gives each app a colour of its own, the same each time.
func (p paint) app(name, s string) string {
	if !p {
		return s
	}
	colours := [...]string{"36", "32", "33", "35", "34", "96", "92", "93", "95", "94"}
	h := uint32(2166136261)
	for i := 0; i < len(name); i++ {
		h = (h ^ uint32(name[i])) * 16777619
	}
	return p.sgr(colours[h%uint32(len(colours))], s)
}

// span is a duration as short as it is told apart: 0s, 42s, 3m, 2h, 5d.
func span(d time.Duration) string {
	switch {
	case d < time.Second:
		return "0s"
	case d < time.Minute:
		return fmt.Sprintf("%ds", d/time.Second)
	case d < time.Hour:
		return fmt.Sprintf("%dm", d/time.Minute)
	case d < 48*time.Hour:
		return fmt.Sprintf("%dh", d/time.Hour)
	}
	return fmt.Sprintf("%dd", d/(24*time.Hour))
}

// size is a number of bytes as a person reads it.
func size(n int64) string {
	switch {
	case n < 1<<10:
		return fmt.Sprintf("%dB", n)
	case n < 1<<20:
		return fmt.Sprintf("%.1fKB", float64(n)/(1<<10))
	case n < 1<<30:
		return fmt.Sprintf("%.1fMB", float64(n)/(1<<20))
	}
	return fmt.Sprintf("%.1fGB", float64(n)/(1<<30))
}

// stamp is a point in time in the local zone.
func stamp(t time.Time) string {
	if t.IsZero() {
		return "-"
	}
	return t.Local().Format("2006-01-02 15:04:05")
}

func yesno(b bool) string {
	if b {
		return "yes"
	}
	return "no"
}

func plural(n int, one string) string {
	if n == 1 {
		return "1 " + one
	}
	return fmt.Sprintf("%d %ss", n, one)
}

// instanceName is how one instance is spoken of.
func instanceName(i client.Instance) string { return fmt.Sprintf("%s:%d", label(i.App), i.Index) }

// ended tells how a run ended.
func ended(x client.Exit) string {
	var s string
	switch {
	case x.Error != "":
		s = x.Error
	case x.Signal != "":
		s = "killed by " + x.Signal
	default:
		s = fmt.Sprintf("exit code %d", x.Code)
	}
	if x.Cause != "" && x.Cause != "exit" {
		s += " (" + x.Cause + ")"
	}
	return clean(s, maxMessage)
}

// distance is the Damerau-free edit distance of two words, for suggestions.
func distance(a, b string) int {
	if len(a) > 64 || len(b) > 64 {
		return max(len(a), len(b))
	}
	row := make([]int, len(b)+1)
	for j := range row {
		row[j] = j
	}
	for i := 1; i <= len(a); i++ {
		diagonal := row[0]
		row[0] = i
		for j := 1; j <= len(b); j++ {
			cost := diagonal
			if a[i-1] != b[j-1] {
				cost++
			}
			diagonal = row[j]
			row[j] = min(cost, row[j]+1, row[j-1]+1)
		}
	}
	return row[len(b)]
}

// nearest is the word most like s, "" where none is like it.
func nearest(s string, words []string) string {
	best, at := "", len(s)/3+2
	for _, w := range words {
		d := distance(strings.ToLower(s), strings.ToLower(w))
		if len(s) >= 3 && strings.HasPrefix(w, s) {
			d = min(d, 1)
		}
		if d < at {
			best, at = w, d
		}
	}
	return best
}
