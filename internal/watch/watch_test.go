package watch

import (
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"syscall"
	"testing"
	"time"

	"github.com/bmatcuk/doublestar/v4"
	"go.uber.org/goleak"
	"pgregory.net/rapid"
)

func TestMain(m *testing.M) { goleak.VerifyTestMain(m) }

const patience = 30 * time.Second

type watched struct {
	*Watcher
	dir     string
	changes chan []string
	errs    chan error
	known   map[string]bool // told before, or might have been
}

func start(t *testing.T, dir string, opt Options) *watched {
	t.Helper()
	w := &watched{dir: dir, changes: make(chan []string, 1000), errs: make(chan error, 1000), known: make(map[string]bool)}
	if opt.Paths == nil {
		opt.Paths = []string{dir}
	}
	if opt.Base == "" {
		opt.Base = dir
	}
	if opt.Debounce == 0 {
		opt.Debounce = 20 * time.Millisecond
	}
	opt.OnChange = func(p []string) { w.changes <- p }
	opt.OnError = func(err error) { w.errs <- err }
	var err error
	if w.Watcher, err = New(opt); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { w.Close() })
	return w
}

// next waits until all of want were told, and fails on what is not in want or
// in also, of this call or one before: a slow machine may tell one write in two.
func (w *watched) next(t *testing.T, want []string, also ...string) {
	t.Helper()
	missing := make(map[string]bool)
	for _, p := range want {
		missing[p] = true
		w.known[p] = true
	}
	for _, p := range also {
		w.known[p] = true
	}
	deadline := time.After(patience)
	for len(missing) > 0 {
		select {
		case paths := <-w.changes:
			for _, p := range paths {
				rel, err := filepath.Rel(w.dir, p)
				if err != nil {
					t.Fatal(err)
				}
				delete(missing, rel)
				if !w.known[rel] {
					t.Errorf("told %s, want only %s", rel, want)
				}
			}
		case err := <-w.errs:
			t.Fatal(err)
		case <-deadline:
			t.Fatalf("not told: %v", missing)
		}
	}
}

func write(t *testing.T, parts ...string) {
	t.Helper()
	p := filepath.Join(parts...)
	if err := os.MkdirAll(filepath.Dir(p), 0o755); err != nil {
		t.Fatal(err)
	}
	if err := os.WriteFile(p, []byte(time.Now().String()), 0o644); err != nil {
		t.Fatal(err)
	}
}

func rename(t *testing.T, from, to string) {
	t.Helper()
	if err := os.Rename(from, to); err != nil {
		t.Fatal(err)
	}
}

func TestChanges(t *testing.T) {
	dir := t.TempDir()
	write(t, dir, "a.js")
	write(t, dir, "lib/b.js")
	w := start(t, dir, Options{})

	write(t, dir, "lib/b.js")
	w.next(t, []string{"lib/b.js"})

	// an editor's atomic save
	write(t, dir, ".a.js.swp")
	rename(t, filepath.Join(dir, ".a.js.swp"), filepath.Join(dir, "a.js"))
	w.next(t, []string{"a.js"})

	if err := os.Remove(filepath.Join(dir, "a.js")); err != nil {
		t.Fatal(err)
	}
	w.next(t, []string{"a.js"})

	// new folders, with files that are there before they can be watched
	write(t, dir, "new/deep/deeper/c.js")
	w.next(t, []string{"new/deep/deeper/c.js"}, "new", "new/deep", "new/deep/deeper")
	write(t, dir, "new/deep/deeper/d.js")
	w.next(t, []string{"new/deep/deeper/d.js"}, "new", "new/deep", "new/deep/deeper", "new/deep/deeper/c.js")

	// a moved folder goes on under its new name
	rename(t, filepath.Join(dir, "new"), filepath.Join(dir, "moved"))
	w.next(t, []string{"new", "moved", "moved/deep/deeper/d.js"}, "moved/deep", "moved/deep/deeper", "moved/deep/deeper/c.js")
	write(t, dir, "moved/deep/deeper/e.js")
	w.next(t, []string{"moved/deep/deeper/e.js"})

	// deleted and made anew
	if err := os.RemoveAll(filepath.Join(dir, "moved")); err != nil {
		t.Fatal(err)
	}
	write(t, dir, "moved/f.js")
	w.next(t, []string{"moved/f.js"}, "moved", "moved/deep", "moved/deep/deeper", "moved/deep/deeper/c.js", "moved/deep/deeper/d.js", "moved/deep/deeper/e.js")
	write(t, dir, "moved/g.js")
	w.next(t, []string{"moved/g.js"}, "moved", "moved/f.js")
}

// A folder moved out of the tree is no longer watched under its old name.
func TestMovedOut(t *testing.T) {
	dir, other := t.TempDir(), t.TempDir()
	write(t, dir, "lib/sub/a.js")
	w := start(t, dir, Options{})
	rename(t, filepath.Join(dir, "lib"), filepath.Join(other, "lib"))
	w.next(t, []string{"lib"})
	write(t, other, "lib/sub/a.js")
	write(t, dir, "last")
	w.next(t, []string{"last"})
}

func TestIgnored(t *testing.T) {
	dir := t.TempDir()
	for _, p := range []string{"node_modules/x/i.js", ".git/HEAD", "public/up/1.png", "src/gen/a.js", "src/a.js", "logs/x", "src/node_modules/y"} {
		write(t, dir, p)
	}
	w := start(t, dir, Options{Ignore: []string{"*.log", "logs", "./public/**", "src/gen/", filepath.Join(dir, "abs")}})
	// What is not to be told comes first, the fence last.
	for _, p := range []string{"node_modules/x/i.js", ".git/HEAD", "public/up/1.png", "src/gen/a.js", "logs/x", "src/node_modules/y",
		".env", "a.log", "src/b.log", "abs/x", "src/.cache/x", "node_modules/new/z", "src/logs/x"} {
		write(t, dir, p)
	}
	write(t, dir, "src/a.js")
	w.next(t, []string{"src/a.js"})
	w.Close()
	for d := range w.dirs {
		if rel, _ := filepath.Rel(dir, d); rel != "." && rel != "src" {
			t.Errorf("%s is watched", rel)
		}
	}
}

func TestNoDefaultsAndNamedPaths(t *testing.T) {
	dir := t.TempDir()
	write(t, dir, "node_modules/a")
	write(t, dir, "src/.x")
	write(t, dir, ".env")
	w := start(t, dir, Options{NoDefaults: true})
	write(t, dir, "node_modules/a")
	w.next(t, []string{"node_modules/a"})
	w.Close()

	// What is named is watched whatever its name.
	w = start(t, dir, Options{Paths: []string{filepath.Join(dir, ".env"), filepath.Join(dir, "node_modules")}, Ignore: []string{".env"}})
	write(t, dir, "src/.x")
	write(t, dir, "other")
	write(t, dir, ".env")
	w.next(t, []string{".env"})
	write(t, dir, "node_modules/b")
	w.next(t, []string{"node_modules/b"})
}

func TestOneFile(t *testing.T) {
	dir := t.TempDir()
	file := filepath.Join(dir, "app.js")
	write(t, file)
	w := start(t, dir, Options{Paths: []string{file}})
	for range 3 { // each time another file under the name
		write(t, dir, "other")
		write(t, dir, "app.js~")
		rename(t, file+"~", file)
		w.next(t, []string{"app.js"})
	}
	if err := os.Chmod(file, 0o600); err != nil {
		t.Fatal(err)
	}
	if err := os.Chtimes(file, time.Now(), time.Now()); err != nil {
		t.Fatal(err)
	}
	write(t, file)
	w.next(t, []string{"app.js"})
	if n := len(w.changes); n > 1 { // the write itself may be told in two
		t.Errorf("%d calls more", n)
	}
}

// The folder that is watched may itself be deleted and made anew.
func TestRootReplaced(t *testing.T) {
	dir := t.TempDir()
	write(t, dir, "dist/main.js")
	w := start(t, dir, Options{Paths: []string{filepath.Join(dir, "dist")}})
	if err := os.RemoveAll(filepath.Join(dir, "dist")); err != nil {
		t.Fatal(err)
	}
	w.next(t, []string{"dist"}, "dist/main.js")
	write(t, dir, "dist/main.js")
	w.next(t, []string{"dist/main.js"}, "dist")
	write(t, dir, "dist/sub/x.js")
	w.next(t, []string{"dist/sub/x.js"}, "dist", "dist/sub", "dist/main.js")
}

func TestBurstIsOneCall(t *testing.T) {
	dir := t.TempDir()
	w := start(t, dir, Options{Debounce: time.Second})
	for i := range 500 {
		write(t, dir, fmt.Sprintf("f%03d", i))
	}
	var first []string
	select {
	case first = <-w.changes:
	case <-time.After(patience):
		t.Fatal("not told")
	}
	if len(first) != maxPaths || !slices.IsSorted(first) {
		t.Errorf("%d paths, want %d, sorted", len(first), maxPaths)
	}
}

// Changes that never pause are told nevertheless.
func TestEndlessBurst(t *testing.T) {
	dir := t.TempDir()
	w := start(t, dir, Options{Debounce: 100 * time.Millisecond})
	end := time.After(patience)
	tick := time.NewTicker(5 * time.Millisecond)
	defer tick.Stop()
	for {
		select {
		case <-tick.C:
			write(t, dir, "f")
		case <-w.changes:
			return
		case <-end:
			t.Fatal("not told")
		}
	}
}

func TestSymlinks(t *testing.T) {
	dir, other := t.TempDir(), t.TempDir()
	if err := os.Symlink(dir, filepath.Join(dir, "circle")); err != nil {
		t.Fatal(err)
	}
	link := filepath.Join(other, "link")
	if err := os.Symlink(dir, link); err != nil {
		t.Fatal(err)
	}
	w := start(t, link, Options{})
	write(t, dir, "sub/a")
	w.next(t, []string{"sub/a"}, "sub")
}

func TestBadOptions(t *testing.T) {
	dir := t.TempDir()
	for _, c := range []struct {
		opt  Options
		want string
	}{
		{Options{}, "no path"},
		{Options{Paths: []string{""}}, "empty path"},
		{Options{Paths: []string{filepath.Join(dir, "none")}}, "none: no such file"},
		{Options{Paths: []string{dir}, Ignore: []string{"a[b"}}, `"a[b"`},
		{Options{Paths: []string{dir}, Ignore: []string{"!a"}}, "negated"},
		{Options{Paths: []string{dir}, Ignore: []string{""}}, "empty ignore"},
	} {
		w, err := New(c.opt)
		if err == nil {
			w.Close()
			t.Errorf("%+v: no error", c.opt)
		} else if !strings.Contains(err.Error(), c.want) {
			t.Errorf("%+v: %v, want …%s…", c.opt, err, c.want)
		}
	}
}

func TestLimit(t *testing.T) {
	dir := t.TempDir()
	write(t, dir, "a/b/c")
	w, err := prepare(Options{Paths: []string{dir}})
	if err != nil {
		t.Fatal(err)
	}
	n := 0
	w.add = func(string) error {
		if n++; n > 2 {
			return syscall.ENOSPC
		}
		return nil
	}
	if err = w.begin(); !errors.Is(err, ErrLimit) || !strings.Contains(err.Error(), "fs.inotify.max_user_watches") {
		t.Errorf("error %v, want ErrLimit that names the setting", err)
	}
	// Later on it is told, once.
	var told []error
	w.opt.OnError = func(err error) { told = append(told, err) }
	w.grow(filepath.Join(dir, "a"))
	w.grow(filepath.Join(dir, "a"))
	if len(told) != 1 || !errors.Is(told[0], ErrLimit) {
		t.Errorf("told %v, want the limit once", told)
	}
	if err := explain(syscall.EMFILE, 0); !errors.Is(err, ErrLimit) || !strings.Contains(err.Error(), "max_user_instances") {
		t.Error(err)
	}
}

func TestOverflowRescans(t *testing.T) {
	dir := t.TempDir()
	w, err := prepare(Options{Paths: []string{dir}})
	if err != nil {
		t.Fatal(err)
	}
	w.add = func(string) error { return nil }
	if err := w.begin(); err != nil {
		t.Fatal(err)
	}
	write(t, dir, "a/b") // its event was dropped
	w.rescan()
	if _, ok := w.dirs[filepath.Join(dir, "a")]; !ok {
		t.Error("the new folder is not watched")
	}
	if _, ok := w.pending[filepath.Join(dir, "a/b")]; !ok {
		t.Error("the new file is not told")
	}
}

func TestCloseAtOnce(t *testing.T) {
	dir := t.TempDir()
	for range 20 {
		w := start(t, dir, Options{})
		write(t, dir, "x")
		w.Close()
		w.Close()
	}
}

// The walk over the parts of a path agrees with the definition: a path is
// ignored when any part of it below the root is, by name or by what it is
// relative to Base.
func TestIgnoreProperty(t *testing.T) {
	part := rapid.SampledFrom([]string{"a", "b", "ab", "node_modules", ".git", "x.log", "logs"})
	pattern := rapid.SampledFrom([]string{"a", "*.log", "a/b", "**/logs", "a/**", "b/*", "{a,b}/ab", "./a/logs", "logs/", "**/a/b/**", "*", "**"})
	rapid.Check(t, func(t *rapid.T) {
		base := rapid.SampledFrom([]string{"/r", "/r/a", "/", "/other"}).Draw(t, "base")
		root := rapid.SampledFrom([]string{"/r", "/", "/r/a"}).Draw(t, "root")
		patterns := rapid.SliceOfN(pattern, 0, 3).Draw(t, "patterns")
		noDefaults := rapid.Bool().Draw(t, "noDefaults")
		parts := rapid.SliceOfN(part, 1, 5).Draw(t, "parts")
		w, err := prepare(Options{Paths: []string{root}, Base: base, Ignore: patterns, NoDefaults: noDefaults})
		if err != nil {
			t.Fatal(err)
		}
		want := false
		p := root
		for _, name := range parts {
			p = filepath.Join(p, name)
			want = want || !noDefaults && (name[0] == '.' || name == "node_modules")
			for _, g := range patterns {
				g = strings.TrimSuffix(strings.TrimPrefix(g, "./"), "/")
				subject := name
				if strings.Contains(g, "/") {
					rel, err := filepath.Rel(base, p)
					if err != nil || strings.HasPrefix(rel, "..") || rel == "." {
						continue
					}
					subject = rel
				}
				ok, err := doublestar.Match(g, subject)
				if err != nil {
					t.Fatal(err)
				}
				want = want || ok
			}
			if got := !w.wanted(p); got != want {
				t.Fatalf("root %s, base %s, ignore %q: %s ignored: %v, want %v", root, base, patterns, p, got, want)
			}
			// What is below an ignored folder is ignored.
			if want && w.wanted(p+"/z") {
				t.Fatalf("%s/z is wanted, though %s is ignored", p, p)
			}
		}
	})
}

func FuzzGlob(f *testing.F) {
	f.Add("a/**", "a/b")
	f.Add("{", "x")
	f.Add("[[", "/")
	f.Fuzz(func(t *testing.T, pattern, path string) {
		w, err := prepare(Options{Paths: []string{"/r"}, Base: "/r", Ignore: []string{pattern}})
		if err != nil {
			return
		}
		if p := filepath.Clean("/r/" + path); within("/r", p) {
			w.wanted(p)
		}
	})
}
