package batch

import (
	"bytes"
	"context"
	"os/exec"
	"slices"
	"strings"
	"testing"

	"pgregory.net/rapid"
)

func TestTemplate(t *testing.T) {
	for _, x := range []struct {
		command, task string
		want          string
	}{
		{"p {}", "a/b.c", "a/b.c"},
		{"p {.} {/} {//} {/.} {#}", "a.d/b.tar.gz", "a.d/b.tar b.tar.gz a.d b.tar 7"},
		{"p {.} {/} {//} {/.}", "a.d/b", "a.d/b b a.d b"},
		{"p {.} {/} {//} {/.}", "/b.c", "/b b.c / b"},
		{"p {.} {/.}", "d/.profile", "d/.profile .profile"},
		{"p {.} {/} {//}", "d/", "d/  d"},
		{"p x{}y{{}} {x} {", "T", "xTy{T} {x} {"},
		{"p -v", "T", "-v T"},
		{"p", "T", "T"},
	} {
		tm, err := NewTemplate(strings.Split(x.command, " "))
		if err != nil {
			t.Fatal(err)
		}
		if got := strings.Join(tm.Args(x.task, 7), " "); got != x.want {
			t.Errorf("%q with %q: %q, want %q", x.command, x.task, got, x.want)
		}
	}
	for _, c := range [][]string{nil, {"{}"}, {"x{/}"}} {
		if _, err := NewTemplate(c); err == nil {
			t.Errorf("%q is taken", c)
		}
	}
}

// A shell that is given Line runs what the pool would.
func TestLine(t *testing.T) {
	rapid.Check(t, func(t *rapid.T) {
		task := rapid.StringMatching(`[ -~äß\n]{0,12}`).Draw(t, "task")
		tm, err := NewTemplate([]string{"printf", "%s|", "{}", "a{/}", "'{.}'", ""})
		if err != nil {
			t.Fatal(err)
		}
		out, err := exec.Command("sh", "-c", tm.Line(task, 1)).Output()
		want := strings.Join(tm.Args(task, 1)[1:], "|") + "|"
		if err != nil || string(out) != want {
			t.Fatalf("%s: %q, %v, want %q", tm.Line(task, 1), out, err, want)
		}
	})
}

// Count and Tasks agree, wherever reads end.
func TestCount(t *testing.T) {
	rapid.Check(t, func(t *rapid.T) {
		delim := rapid.SampledFrom([]byte{'\n', 0}).Draw(t, "delim")
		in := rapid.SliceOfN(rapid.SampledFrom([]byte{'\n', 0, ' ', '\t', '\r', 'a'}), 0, 40).Draw(t, "input")
		var tasks [][]byte
		err := Tasks(newReader(in), delim, func(seq int64, b []byte) error {
			if tasks = append(tasks, b); seq != int64(len(tasks)) {
				t.Fatalf("task %d is number %d", len(tasks), seq)
			}
			return nil
		})
		n, cerr := Count(context.Background(), bytes.NewReader(in), 0, delim)
		want := slices.DeleteFunc(bytes.Split(in, []byte{delim}), func(b []byte) bool { return isBlank(b, delim) })
		if err != nil || cerr != nil || n != int64(len(want)) || !slices.EqualFunc(tasks, want, bytes.Equal) {
			t.Fatalf("%q: counted %d, %v; read %q, %v; want %q", in, n, cerr, tasks, err, want)
		}
	})
}
