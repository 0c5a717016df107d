package logs

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"os"
	"path/filepath"
	"reflect"
	"regexp"
	"runtime"
	"slices"
	"strings"
	"sync"
	"syscall"
	"testing"
	"time"

	"golang.org/x/sys/unix"
)

func TestPlain(t *testing.T) {
	m := newManager(t, Options{})
	path := filepath.Join(t.TempDir(), "deep", "app-out.log")
	c, w := attach(t, m, Source{"app", 0, Out}, Target{Path: path})
	say(t, w, "one\ntwo")
	eventually(t, "capture", func() bool { return c.Stats().Bytes == 7 })
	if got := content(t, path); got != "one\ntwo" {
		t.Fatalf("got %q", got)
	}
	if st := c.Stats(); !st.Direct || st.Lost != 0 || st.Err != nil {
		t.Errorf("stats %+v", st)
	}
	finish(t, c)
	if got := content(t, path); got != "one\ntwo\n" {
		t.Fatalf("got %q", got)
	}
	for p, want := range map[string]os.FileMode{path: 0o600, filepath.Dir(path): 0o700} {
		if st, err := os.Stat(p); err != nil || st.Mode().Perm() != want {
			t.Errorf("%s: %v %v", p, st.Mode(), err)
		}
	}
	c, w = attach(t, m, Source{"app", 0, Out}, Target{Path: path})
	say(t, w, "a\nb\nc")
	w.Close()
	eventually(t, "EOF", func() bool { return c.Stats().EOF })
	if got := c.Tail(2); !slices.Equal(got, []string{"b", "c"}) {
		t.Errorf("tail %q", got)
	}
	if got := c.Tail(99); !slices.Equal(got, []string{"a", "b", "c"}) {
		t.Errorf("tail has lines of an earlier run: %q", got)
	}
	finish(t, c)
	if got := c.Tail(1); !slices.Equal(got, []string{"c"}) {
		t.Errorf("tail after the end %q", got)
	}
}

func TestNewRunBeginsALine(t *testing.T) {
	path := filepath.Join(t.TempDir(), "x.log")
	if err := os.WriteFile(path, []byte("torn"), 0o600); err != nil {
		t.Fatal(err)
	}
	m := newManager(t, Options{})
	c, w := attach(t, m, Source{"app", 0, Out}, Target{Path: path})
	say(t, w, "new\n")
	finish(t, c)
	if got := content(t, path); got != "torn\nnew\n" {
		t.Fatalf("got %q", got)
	}
}

func TestMergedLinesStayWhole(t *testing.T) {
	m := newManager(t, Options{})
	path := filepath.Join(t.TempDir(), "x.log")
	a, wa := attach(t, m, Source{"app", 0, Out}, Target{Path: path})
	say(t, wa, "first\na-beg")
	eventually(t, "direct", func() bool { return a.Stats().Bytes == 11 && a.Stats().Direct })
	b, wb := attach(t, m, Source{"app", 0, Err}, Target{Path: path})
	say(t, wb, "b-beg")
	eventually(t, "b", func() bool { return b.Stats().Bytes == 5 })
	if a.Stats().Direct || b.Stats().Direct {
		t.Fatal("two sources write into one file directly")
	}
	if got := content(t, path); got != "first\n" {
		t.Fatalf("unfinished lines are in the log: %q", got)
	}
	say(t, wa, "in\n")
	eventually(t, "a", func() bool { return a.Stats().Bytes == 14 })
	say(t, wb, "in\nb-last")
	eventually(t, "b", func() bool { return b.Stats().Bytes == 14 })
	finish(t, b)
	say(t, wa, "alone\n")
	eventually(t, "direct again", func() bool { return a.Stats().Direct })
	say(t, wa, "end")
	finish(t, a)
	if got, want := content(t, path), "first\na-begin\nb-begin\nb-last\nalone\nend\n"; got != want {
		t.Fatalf("got %q, want %q", got, want)
	}
	if left := stateLeft(t, filepath.Dir(path)); len(left) > 0 {
		t.Errorf("left behind: %v", left)
	}
	if got := b.Tail(5); !slices.Equal(got, []string{"b-begin", "b-last"}) {
		t.Errorf("tail %q", got)
	}
}

func TestForms(t *testing.T) {
	at := time.Date(2026, 3, 4, 5, 6, 7, 0, time.Local)
	m := newManager(t, Options{Now: func() time.Time { return at }})
	dir := t.TempDir()
	js, tm := filepath.Join(dir, "j.log"), filepath.Join(dir, "t.log")
	long := strings.Repeat("0123456789abcdef", MaxLine/16) // exactly MaxLine
	for _, tg := range []Target{{Path: js, JSON: true}, {Path: tm, TimeFormat: "2006-01-02T15:04:05"}} {
		c, w := attach(t, m, Source{"ä\"pp", 3, Err}, tg)
		say(t, w, "plain: text\nbad \xff\x00 byte\n\n")
		say(t, w, long+"\n"+long+"more\nlast")
		w.Close()
		eventually(t, "EOF", func() bool { return c.Stats().EOF })
		finish(t, c)
	}
	for i, line := range strings.Split(strings.TrimSuffix(content(t, js), "\n"), "\n") {
		var v struct {
			Time              time.Time
			App, Stream, Text string
			ID                int
		}
		if err := json.Unmarshal([]byte(line), &v); err != nil || !v.Time.Equal(at) || v.App != "ä\"pp" || v.ID != 3 || v.Stream != Err {
			t.Fatalf("line %d: %v %+v", i, err, v)
		}
	}
	if got := content(t, tm); !strings.HasPrefix(got, "2026-03-04T05:06:07: plain: text\n") {
		t.Errorf("got %q", got[:60])
	}
	for path, f := range map[string]QueryFile{js: {JSON: true}, tm: {TimeFormat: "2006-01-02T15:04:05"}} {
		f.Path, f.Source = path, Source{"ä\"pp", 3, Err}
		want := []Record{
			{at, f.Source, "plain: text", false}, {at, f.Source, "bad \uFFFD\x00 byte", false}, {at, f.Source, "", false},
			{at, f.Source, long, false}, {at, f.Source, long, true}, {at, f.Source, "more", false}, {at, f.Source, "last", false},
		}
		got := all(t, Query{Files: []QueryFile{f}, Lines: -1})
		if len(got) != len(want) {
			t.Fatalf("%s: %d records", path, len(got))
		}
		for i := range want {
			if !got[i].Time.Equal(at) || got[i].Source != f.Source || got[i].Text != want[i].Text || got[i].Cut != want[i].Cut {
				t.Errorf("%s: record %d is %.80v", path, i, got[i])
			}
		}
	}
	if got := all(t, Query{Files: []QueryFile{{Source: Source{"other", 1, Out}, Path: js, JSON: true}}, Lines: -1}); len(got) != 0 {
		t.Errorf("lines of another source: %v", got)
	}
}

func TestRotation(t *testing.T) {
	for _, how := range []string{CompressNone, CompressGzip, CompressZstd} {
		t.Run(how, func(t *testing.T) {
			m := newManager(t, Options{})
			path := filepath.Join(t.TempDir(), "x.log")
			c, w := attach(t, m, Source{"app", 0, Out}, Target{Path: path, MaxSize: 10_000, Keep: 3, Compress: how})
			var want []string
			for i := range 6000 {
				want = append(want, fmt.Sprintf("line %d", i))
			}
			say(t, w, strings.Join(want, "\n")+"\n")
			finish(t, c)
			n := namesOf(path)
			suffix := map[string]string{CompressGzip: ".gz", CompressZstd: ".zst"}[how]
			eventually(t, "compression", func() bool {
				l, err := n.list()
				return err == nil && len(l) == 3 && !slices.ContainsFunc(l, func(r rotatedFile) bool { return r.suffix != suffix || r.both })
			})
			got := texts(all(t, fileQuery(path)))
			if len(got) < 2000 || !slices.Equal(got, want[6000-len(got):]) {
				t.Fatalf("%d lines, the first %q", len(got), got[0])
			}
			for _, k := range []int{0, 1, 500, 1500, 99999} {
				q := fileQuery(path)
				q.Lines = k
				if got2 := texts(all(t, q)); !slices.Equal(got2, got[max(0, len(got)-k):]) {
					t.Errorf("last %d: %d lines", k, len(got2))
				}
				q.Grep = regexp.MustCompile("7$")
				var hits []string
				for _, l := range got {
					if strings.HasSuffix(l, "7") {
						hits = append(hits, l)
					}
				}
				if got2 := texts(all(t, q)); !slices.Equal(got2, hits[max(0, len(hits)-k):]) {
					t.Errorf("last %d that match: %d lines", k, len(got2))
				}
			}
			if err := m.Flush(path); err != nil {
				t.Fatal(err)
			}
			if got := all(t, fileQuery(path)); len(got) != 0 {
				t.Errorf("after flush: %v", got)
			}
		})
	}
}

func TestRotationByAge(t *testing.T) {
	var mu sync.Mutex
	now := time.Now()
	m := newManager(t, Options{Now: func() time.Time { mu.Lock(); defer mu.Unlock(); return now }})
	path := filepath.Join(t.TempDir(), "x.log")
	c, w := attach(t, m, Source{"app", 0, Out}, Target{Path: path, MaxAge: time.Hour, Keep: 5})
	say(t, w, "old\n")
	eventually(t, "old", func() bool { return c.Stats().Bytes == 4 })
	mu.Lock()
	now = now.Add(2 * time.Hour)
	mu.Unlock()
	say(t, w, "new\n")
	finish(t, c)
	if got := content(t, path+".000001") + "|" + content(t, path); got != "old\n|new\n" {
		t.Errorf("got %q", got)
	}
}

// TestHalfDoneRotation stops a rotation after each of its steps.
func TestHalfDoneRotation(t *testing.T) {
	for step := range 7 {
		dir := t.TempDir()
		path := filepath.Join(dir, "x.log")
		n := namesOf(path)
		must := func(err error) {
			t.Helper()
			if err != nil {
				t.Fatal(err)
			}
		}
		must(os.Mkdir(filepath.Join(dir, stateDir), 0o700))
		must(os.WriteFile(path, []byte("one\ntwo\nthr"), 0o600))
		ino, _ := inode(path)
		steps := []func() error{
			func() error { return os.WriteFile(n.state(".next"), []byte("thr"), 0o600) },
			func() error {
				return writeState(n.state(".cut"), cutJournal{seq: 4, off: 8, tail: 3, ino: ino}.encode())
			},
			func() error { return os.Rename(path, n.rotated(4)) },
			func() error { return os.Truncate(n.rotated(4), 8) },
			func() error { return os.Rename(n.state(".next"), path) },
			func() error { return os.Remove(n.state(".cut")) },
		}
		for _, f := range steps[:step] {
			must(f())
		}
		m := newManager(t, Options{})
		r, w := pipe(t)
		c, err := m.Attach(Source{"app", 0, Out}, r, Target{Path: path, MaxSize: 1000, Keep: 3}, true)
		must(err)
		say(t, w, "ee\nfour\n")
		finish(t, c)
		if got := texts(all(t, fileQuery(path))); !slices.Equal(got, []string{"one", "two", "three", "four"}) {
			t.Errorf("after step %d: %q", step, got)
		}
	}
}

func TestTap(t *testing.T) {
	dir := t.TempDir()
	for name, tg := range map[string]Target{
		"plain":   {Path: filepath.Join(dir, "p.log"), MaxSize: 500, Keep: 100},
		"json":    {Path: filepath.Join(dir, "j.log"), JSON: true},
		"discard": {Path: os.DevNull},
	} {
		t.Run(name, func(t *testing.T) {
			m := newManager(t, Options{})
			c, w := attach(t, m, Source{"app", 0, Out}, tg)
			var mu sync.Mutex
			var got, want []string
			cancel := c.Lines(func(l string) { mu.Lock(); got = append(got, l); mu.Unlock() })
			defer cancel()
			for i := range 300 {
				want = append(want, fmt.Sprint("ready? ", i))
				say(t, w, want[i][:3])
				say(t, w, want[i][3:]+"\n")
			}
			say(t, w, "end")
			finish(t, c)
			want = append(want, "end")
			eventually(t, "lines", func() bool { mu.Lock(); defer mu.Unlock(); return len(got) >= len(want) })
			mu.Lock()
			defer mu.Unlock()
			if !slices.Equal(got, want) {
				t.Fatalf("got %d lines of %d: %q", len(got), len(want), got[max(0, len(got)-3):])
			}
		})
	}
}

func TestTapOfAdoptedRunSeesItAll(t *testing.T) {
	path := filepath.Join(t.TempDir(), "x.log")
	r, w := pipe(t)
	for i := range 2 {
		fd, err := unix.Dup(int(r.Fd()))
		if err != nil {
			t.Fatal(err)
		}
		m, err := New(Options{})
		if err != nil {
			t.Fatal(err)
		}
		c, err := m.Attach(Source{"app", 0, Out}, os.NewFile(uintptr(fd), "pipe"), Target{Path: path}, i > 0)
		if err != nil {
			t.Fatal(err)
		}
		say(t, w, fmt.Sprintf("line %d\n", i))
		eventually(t, "capture", func() bool { return c.Stats().Bytes == 7 })
		if i == 1 {
			got := make(chan string, 10)
			defer c.Lines(func(l string) { got <- l })()
			if a, b := <-got, <-got; a != "line 0" || b != "line 1" {
				t.Errorf("got %q, %q", a, b)
			}
			if got := c.Tail(9); !slices.Equal(got, []string{"line 0", "line 1"}) {
				t.Errorf("tail %q", got)
			}
		}
		if err := m.Close(context.Background()); err != nil {
			t.Fatal(err)
		}
	}
}

func TestOrphans(t *testing.T) {
	path := filepath.Join(t.TempDir(), "x.log")
	tg := Target{Path: path, Shared: true}
	m, err := New(Options{})
	if err != nil {
		t.Fatal(err)
	}
	c, w := attach(t, m, Source{"app", 0, Out}, tg)
	say(t, w, "whole\nunfinished")
	eventually(t, "capture", func() bool { return c.Stats().Bytes == 16 })
	if err := m.Close(context.Background()); err != nil {
		t.Fatal(err)
	}
	m = newManager(t, Options{})
	m.Settle() // nobody came for the pipe
	c, w = attach(t, m, Source{"app", 0, Out}, tg)
	say(t, w, "next\n")
	finish(t, c)
	if got := content(t, path); got != "whole\nunfinished\nnext\n" {
		t.Errorf("got %q", got)
	}
	if left := stateLeft(t, filepath.Dir(path)); len(left) > 0 {
		t.Errorf("left behind: %v", left)
	}
}

// TestKilledBeforeRewriting: what a killed manager had in the spool only is
// written when its pipe comes back, not first when more is said.
func TestKilledBeforeRewriting(t *testing.T) {
	dir := t.TempDir()
	n := namesOf(filepath.Join(dir, "x.log"))
	r, w := pipe(t)
	st, err := r.Stat()
	if err != nil {
		t.Fatal(err)
	}
	sys, ok := st.Sys().(*syscall.Stat_t)
	if !ok {
		t.Fatal("no inode")
	}
	ino := sys.Ino
	if err := os.Mkdir(filepath.Join(dir, stateDir), 0o700); err != nil {
		t.Fatal(err)
	}
	path := filepath.Join(dir, "x.log")
	if err := os.WriteFile(path, []byte("in\nuncommitted\n"), 0o600); err != nil {
		t.Fatal(err)
	}
	log, _ := inode(path)
	ck := append(encodeHead(log, 3, 0, slot{ino, spoolHead + 3}), encodeSlot(slot{ino, spoolHead})...)
	for p, b := range map[string][]byte{n.state(".ckpt"): ck, n.state(fmt.Sprintf(".%d.spool", ino)): append(encodeSpoolHead(Source{}), "in\nuncommitted\nmore\npart"...)} {
		if err := os.WriteFile(p, b, 0o600); err != nil {
			t.Fatal(err)
		}
	}
	m := newManager(t, Options{})
	c, err := m.Attach(Source{"app", 0, Out}, r, Target{Path: path, Shared: true}, true)
	if err != nil {
		t.Fatal(err)
	}
	if got := content(t, path); got != "in\nuncommitted\nmore\n" {
		t.Errorf("got %q", got)
	}
	say(t, w, "ial\n")
	finish(t, c)
	if got := content(t, path); got != "in\nuncommitted\nmore\npartial\n" {
		t.Errorf("got %q", got)
	}
}

func TestTailOverRotation(t *testing.T) {
	m := newManager(t, Options{})
	tg := Target{Path: filepath.Join(t.TempDir(), "x.log"), MaxSize: 40, Keep: 10}
	for run := range 3 {
		c, w := attach(t, m, Source{"app", 0, Out}, tg)
		var want []string
		size := int64(0)
		for i := range 6 + run {
			want = append(want, fmt.Sprintf("run %d line %d", run, i))
			say(t, w, want[i]+"\n")
			size += int64(len(want[i]) + 1)
			eventually(t, "line", func() bool { return c.Stats().Bytes == size })
			for _, n := range []int{1, 3, 20} {
				if got := c.Tail(n); !slices.Equal(got, want[max(0, len(want)-n):]) {
					t.Fatalf("run %d, line %d: last %d are %q", run, i, n, got)
				}
			}
		}
		finish(t, c)
		if got := c.Tail(20); !slices.Equal(got, want) {
			t.Errorf("after run %d: %q", run, got)
		}
	}
}

func TestBadTargets(t *testing.T) {
	m := newManager(t, Options{})
	dir := t.TempDir()
	fifo := filepath.Join(dir, "fifo")
	if err := unix.Mkfifo(fifo, 0o600); err != nil {
		t.Fatal(err)
	}
	link := filepath.Join(dir, "link")
	if err := os.Symlink("/etc/passwd", link); err != nil {
		t.Fatal(err)
	}
	for _, tg := range []Target{{Path: "x.log"}, {Path: dir}, {Path: fifo}, {Path: link}, {Path: "/dev/zero"}, {Path: filepath.Join(dir, "a"), Compress: "rar"}} {
		r, _ := pipe(t)
		if _, err := m.Attach(Source{}, r, tg, false); err == nil {
			t.Errorf("%+v accepted", tg)
		}
		if _, err := r.Stat(); err != nil {
			t.Errorf("%+v: the pipe was taken: %v", tg, err)
		}
	}
	f, err := os.Open("/dev/null")
	if err != nil {
		t.Fatal(err)
	}
	defer f.Close()
	if _, err := m.Attach(Source{}, f, Target{}, false); err == nil {
		t.Error("no pipe accepted")
	}
}

func TestDiscard(t *testing.T) {
	m := newManager(t, Options{})
	for _, p := range []string{"", "none", "/dev/null"} {
		c, w := attach(t, m, Source{"app", 0, Out}, Target{Path: p})
		say(t, w, strings.Repeat("x", 3<<20))
		w.Close()
		finish(t, c)
		if st := c.Stats(); st.Bytes != 3<<20 || st.Lost != 0 {
			t.Errorf("%q: %+v", p, st)
		}
	}
}

func TestOthersTouchTheLog(t *testing.T) {
	for _, tg := range []Target{{}, {TimeFormat: "2006"}} {
		tg.Path = filepath.Join(t.TempDir(), "x.log")
		m := newManager(t, Options{})
		c, w := attach(t, m, Source{"app", 0, Out}, tg)
		size := int64(0)
		put := func(text string) {
			t.Helper()
			say(t, w, text)
			size += int64(len(text))
			eventually(t, text, func() bool { return c.Stats().Bytes == size })
		}
		check := func(path, want string) {
			t.Helper()
			if got := content(t, path); !strings.HasSuffix(got, want+"\n") || strings.Count(got, "\n") != 1 || strings.Contains(got, "\x00") {
				t.Errorf("%+v: %s has %q, want %q", tg, path, got, want)
			}
		}
		put("a\n")
		if err := os.Truncate(tg.Path, 0); err != nil {
			t.Fatal(err)
		}
		put("b\n")
		check(tg.Path, "b")
		if err := os.Remove(tg.Path); err != nil {
			t.Fatal(err)
		}
		put("c\n")
		check(tg.Path, "c")
		if err := os.Rename(tg.Path, tg.Path+".old"); err != nil {
			t.Fatal(err)
		}
		m.Reopen(tg.Path)
		put("d\n")
		check(tg.Path, "d")
		check(tg.Path+".old", "c")
		if err := m.Flush(tg.Path); err != nil {
			t.Fatal(err)
		}
		put("e\n")
		check(tg.Path, "e")
		finish(t, c)
	}
}

// TestTrouble has the log fail and work again.
func TestTrouble(t *testing.T) {
	for name, form := range map[string]Target{"plain": {}, "time": {TimeFormat: "2006"}} {
		t.Run(name, func(t *testing.T) { t.Parallel(); testTrouble(t, form) })
	}
}

func testTrouble(t *testing.T, form Target) {
	{
		// A file in place of the folder fails for root, too.
		dir := filepath.Join(t.TempDir(), "logs")
		if err := os.WriteFile(dir, nil, 0o600); err != nil {
			t.Fatal(err)
		}
		var mu sync.Mutex
		var told []Trouble
		m := newManager(t, Options{OnTrouble: func(x Trouble) { mu.Lock(); told = append(told, x); mu.Unlock() }})
		form.Path = filepath.Join(dir, "x.log")
		c, w := attach(t, m, Source{"app", 7, Out}, form)
		say(t, w, "waits\n")
		eventually(t, "trouble", func() bool { return c.Stats().Err != nil })
		if !errors.Is(c.Stats().Err, syscall.ENOTDIR) {
			t.Errorf("cause %v", c.Stats().Err)
		}
		// Far more than any pipe holds: the writer must get through.
		say(t, w, strings.Repeat(strings.Repeat("z", 99)+"\n", 40_000))
		lost := c.Stats().Lost
		if lost == 0 {
			t.Fatal("nothing lost, yet nothing could be written")
		}
		if err := os.Remove(dir); err != nil {
			t.Fatal(err)
		}
		eventually(t, "recovery", func() bool { return c.Stats().Err == nil })
		say(t, w, "after\n")
		finish(t, c)
		st := c.Stats()
		got := content(t, form.Path)
		mark := fmt.Sprintf("[remuda: %d bytes of output lost: not a directory]\n", st.Lost)
		if strings.Count(got, mark) != 1 || !strings.HasSuffix(got, "after\n") {
			t.Errorf("mark %q is not in the log, or not once (%d bytes)", mark, len(got))
		}
		if st.Bytes+st.Lost != 6+4_000_000+6 {
			t.Errorf("%d taken + %d lost", st.Bytes, st.Lost)
		}
		eventually(t, "all-clear", func() bool { mu.Lock(); defer mu.Unlock(); return told[len(told)-1].Err == nil })
		mu.Lock()
		if len(told) < 3 || told[0].Err == nil || told[len(told)-1].Err != nil || told[len(told)-1].Lost != st.Lost || told[0].Source.ID != 7 {
			t.Errorf("told %+v", told)
		}
		mu.Unlock()
	}
}

// TestFullDisk fills a small file system; without the right to mount one the
// same is done by a limit on file sizes in TestTrouble's way.
func TestFullDisk(t *testing.T) {
	dir := t.TempDir()
	if err := unix.Mount("none", dir, "tmpfs", 0, "size=1m"); err != nil {
		if os.Geteuid() == 0 && !errors.Is(err, unix.EPERM) {
			t.Fatal(err)
		}
		// Not allowed: what remains to be shown is that it says so.
		if !errors.Is(err, unix.EPERM) {
			t.Fatalf("mount: %v", err)
		}
		return
	}
	t.Cleanup(func() { _ = unix.Unmount(dir, unix.MNT_DETACH) })
	for _, form := range []Target{{}, {JSON: true}} {
		m := newManager(t, Options{})
		form.Path = filepath.Join(dir, "x.log")
		fill := filepath.Join(dir, "fill")
		c, w := attach(t, m, Source{"app", 0, Out}, form)
		say(t, w, "before\n")
		eventually(t, "before", func() bool { return c.Stats().Bytes == 7 })
		f, err := os.Create(fill)
		if err != nil {
			t.Fatal(err)
		}
		for b := make([]byte, 4096); err == nil; {
			_, err = f.Write(b)
		}
		f.Close()
		if !errors.Is(err, unix.ENOSPC) {
			t.Fatal(err)
		}
		var want []string
		var text strings.Builder
		for i := range 400 {
			want = append(want, fmt.Sprintf("%d %s", i, strings.Repeat("v", 100)))
			text.WriteString(want[i] + "\n")
		}
		say(t, w, text.String())
		eventually(t, "ENOSPC", func() bool { return errors.Is(c.Stats().Err, unix.ENOSPC) })
		if err := os.Remove(fill); err != nil {
			t.Fatal(err)
		}
		finish(t, c)
		if st := c.Stats(); st.Lost != 0 {
			t.Errorf("lost %d although the pipe could hold it", st.Lost)
		}
		got := texts(all(t, Query{Files: []QueryFile{{Source{"app", 0, Out}, form.Path, form.JSON, ""}}, Lines: -1}))
		if want = append([]string{"before"}, want...); !slices.Equal(got, want) {
			t.Errorf("got %d lines, want %d", len(got), len(want))
		}
		if err := m.Flush(form.Path); err != nil {
			t.Fatal(err)
		}
	}
}

func TestFinishGivesUp(t *testing.T) {
	dir := filepath.Join(t.TempDir(), "logs")
	if err := os.WriteFile(dir, nil, 0o600); err != nil {
		t.Fatal(err)
	}
	m := newManager(t, Options{})
	c, w := attach(t, m, Source{"app", 0, Out}, Target{Path: filepath.Join(dir, "x.log")})
	say(t, w, "gone\n")
	ctx, cancel := context.WithTimeout(context.Background(), 50*time.Millisecond)
	defer cancel()
	if err := c.Finish(ctx); !errors.Is(err, syscall.ENOTDIR) {
		t.Errorf("finish: %v", err)
	}
	if c.Stats().Lost != 5 {
		t.Errorf("stats %+v", c.Stats())
	}
}

// TestSlowWriterDoesNotHoldFinish: processes that outlive the run keep the
// pipe open.
func TestFinishDoesNotWaitForEOF(t *testing.T) {
	m := newManager(t, Options{})
	path := filepath.Join(t.TempDir(), "x.log")
	c, w := attach(t, m, Source{"app", 0, Out}, Target{Path: path})
	say(t, w, "x")
	finish(t, c)
	if got := content(t, path); got != "x\n" {
		t.Errorf("got %q", got)
	}
	if _, err := w.WriteString("y"); !errors.Is(err, syscall.EPIPE) {
		t.Errorf("the pipe is still open: %v", err)
	}
}

func TestMany(t *testing.T) {
	m := newManager(t, Options{MaxOpen: 20, IdleClose: 50 * time.Millisecond})
	dir := t.TempDir()
	const n = 150
	var cs []*Capture
	var ws []*os.File
	for i := range n {
		c, w := attach(t, m, Source{"app", i, Out}, Target{Path: filepath.Join(dir, fmt.Sprint(i, ".log")), MaxSize: DefaultMaxSize, Keep: 10, Shared: i%2 == 0})
		cs, ws = append(cs, c), append(ws, w)
	}
	for round := range 3 {
		for i, w := range ws {
			say(t, w, fmt.Sprintf("%d %d\n", i, round))
		}
	}
	for i, c := range cs {
		finish(t, c)
		if got, want := content(t, c.Path()), fmt.Sprintf("%d 0\n%d 1\n%d 2\n", i, i, i); got != want {
			t.Fatalf("%d: %q", i, got)
		}
	}
	eventually(t, "closing", func() bool { m.mu.Lock(); defer m.mu.Unlock(); return len(m.open) == 0 && len(m.sinks) == 0 })
}

// TestIdleCost measures the memory of an idle stream.
func TestIdleCost(t *testing.T) {
	m := newManager(t, Options{})
	dir := t.TempDir()
	const n = 1000
	var rs []*os.File
	for range n {
		r, _ := pipe(t)
		rs = append(rs, r)
	}
	var a, b runtime.MemStats
	runtime.GC()
	runtime.ReadMemStats(&a)
	cs := make([]*Capture, n)
	for i, r := range rs {
		c, err := m.Attach(Source{"app", i, Out}, r, Target{Path: filepath.Join(dir, fmt.Sprint(i, ".log")), MaxSize: DefaultMaxSize, Keep: 10}, false)
		if err != nil {
			t.Fatal(err)
		}
		cs[i] = c
	}
	runtime.GC()
	runtime.ReadMemStats(&b)
	per := (int64(b.HeapAlloc) - int64(a.HeapAlloc)) / n
	t.Logf("%d bytes of heap an idle stream, %d goroutines", per, runtime.NumGoroutine())
	if per > 2048 {
		t.Errorf("%d bytes an idle stream", per)
	}
	runtime.KeepAlive(cs)
}

func follow(t *testing.T, q Query) (next func() Record, stop func()) {
	t.Helper()
	q.Follow = true
	ctx, cancel := context.WithCancel(context.Background())
	ch := make(chan Record)
	done := make(chan struct{})
	go func() {
		defer close(done)
		for r, err := range Read(ctx, q) {
			if err != nil {
				t.Errorf("follow: %v", err)
			}
			select {
			case ch <- r:
			case <-ctx.Done():
			}
		}
	}()
	stop = func() { cancel(); <-done }
	t.Cleanup(stop)
	return func() Record {
		t.Helper()
		select {
		case r := <-ch:
			return r
		case <-time.After(20 * time.Second):
			t.Fatal("nothing more comes")
			return Record{}
		}
	}, stop
}

func TestFollowRotation(t *testing.T) {
	for _, tg := range []Target{{MaxSize: 5000}, {MaxSize: 5000, Compress: CompressGzip}, {MaxSize: 5000, Shared: true}} {
		m := newManager(t, Options{})
		// The folder does not exist yet.
		tg.Path, tg.Keep = filepath.Join(t.TempDir(), "a", "b", "x.log"), 1<<20
		next, stop := follow(t, Query{Files: []QueryFile{{Source{"app", 0, Out}, tg.Path, false, ""}}, Lines: -1})
		c, w := attach(t, m, Source{"app", 0, Out}, tg)
		go func() {
			for i := range 5000 {
				if _, err := fmt.Fprintf(w, "line %d\n", i); err != nil {
					return // the test has failed
				}
			}
			_, _ = io.WriteString(w, "end")
		}()
		for i := range 5000 {
			if r := next(); r.Text != fmt.Sprintf("line %d", i) || r.Cut {
				t.Fatalf("%+v: got %v, want line %d", tg, r, i)
			}
		}
		finish(t, c)
		if r := next(); r.Text != "end" || r.Cut {
			t.Fatalf("got %v", r)
		}
		l, _ := namesOf(tg.Path).list()
		if len(l) < 5 {
			t.Errorf("%d rotations", len(l))
		}
		stop()
	}
}

func TestFollowTouched(t *testing.T) {
	m := newManager(t, Options{})
	path := filepath.Join(t.TempDir(), "x.log")
	c, w := attach(t, m, Source{"app", 0, Out}, Target{Path: path})
	say(t, w, "1\n2\n3\n")
	eventually(t, "3", func() bool { return c.Stats().Bytes == 6 })
	next, _ := follow(t, Query{Files: []QueryFile{{Source{"app", 0, Out}, path, false, ""}}, Lines: 1})
	expect := func(want string) {
		t.Helper()
		if r := next(); r.Text != want {
			t.Fatalf("got %v, want %s", r, want)
		}
	}
	expect("3")
	say(t, w, "4\n")
	expect("4")
	if err := m.Flush(path); err != nil {
		t.Fatal(err)
	}
	say(t, w, "5\n")
	expect("5")
	if err := os.Remove(path); err != nil {
		t.Fatal(err)
	}
	say(t, w, "6\n")
	expect("6")
	say(t, w, "7")
	say(t, w, "8\n")
	expect("78")
	finish(t, c)
}

func TestMergeByTime(t *testing.T) {
	var mu sync.Mutex
	now := time.Now().Truncate(time.Second)
	m := newManager(t, Options{Now: func() time.Time { mu.Lock(); defer mu.Unlock(); return now }})
	dir := t.TempDir()
	var cs []*Capture
	var ws []*os.File
	q := Query{Lines: -1}
	for i := range 3 {
		src := Source{"app", i, Out}
		tg := Target{Path: filepath.Join(dir, fmt.Sprint(i)), JSON: i == 2}
		c, w := attach(t, m, src, tg)
		cs, ws = append(cs, c), append(ws, w)
		q.Files = append(q.Files, QueryFile{src, tg.Path, tg.JSON, ""})
	}
	var want []string
	start := now
	size := make([]int64, 3)
	for i := range 30 {
		text := fmt.Sprint("line ", i, "\n")
		k := i * 7 % 3
		say(t, ws[k], text)
		size[k] += int64(len(text))
		eventually(t, text, func() bool { return cs[k].Stats().Bytes == size[k] })
		want = append(want, strings.TrimSpace(text))
		mu.Lock()
		now = now.Add(time.Second)
		mu.Unlock()
	}
	finish(t, cs...)
	got := all(t, q)
	if !slices.Equal(texts(got), want) {
		t.Fatalf("got %q", texts(got))
	}
	for i, r := range got {
		if !r.Time.Equal(start.Add(time.Duration(i) * time.Second)) {
			t.Errorf("%v", r)
		}
	}
	q.Since, q.Until = start.Add(5*time.Second), start.Add(9*time.Second)
	if got := texts(all(t, q)); !reflect.DeepEqual(got, want[5:10]) {
		t.Errorf("since/until: %q", got)
	}
}
