package batch

import (
	"bytes"
	"errors"
	"fmt"
	"maps"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"pgregory.net/rapid"
)

func logHeader(f *os.File) string {
	id, _, _ := identify(f)
	return fmt.Sprintf(`{"run":{"pid":1,"tag":"x","at":"","command":["a"],"results":{"dev":%d,"ino":%d,"size":0}}}`+"\n", id.Dev, id.Ino)
}

func open(t testing.TB, name, content string) *os.File {
	t.Helper()
	f, err := os.OpenFile(name, os.O_RDWR|os.O_CREATE|os.O_TRUNC, 0o600)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { f.Close() })
	if _, err := f.WriteString(content); err != nil {
		t.Fatal(err)
	}
	return f
}

func TestLogRead(t *testing.T) {
	const (
		one  = `{"seq":1,"ok":true,"sum":"00000001","end":2}` + "\n"
		two  = `{"seq":2,"ok":false,"sum":"00000002","end":4}` + "\n"
		held = `{"seq":4,"ok":true,"sum":"00000004","held":{"at":0,"len":2,"sum":0}}` + "\n"
		last = `{"seq":4,"end":6}` + "\n"
		all  = isLogged | isWritten
	)
	for _, x := range []struct {
		name, log, results string
		states             []uint8
		end                int64
		want               string // part of the error
	}{
		{"nothing", "", "", nil, -1, ""},
		{"a run", "H", "", nil, 0, ""},
		{"tasks", "H" + one + two, "1\n2\n", []uint8{all, all | isFailed}, 4, ""},
		{"more results than logged", "H" + one, "1\n2\nto", []uint8{all}, 2, ""},
		{"torn", "H" + one + two[:len(two)-1], "1\n2\n", []uint8{all}, 2, ""},
		{"torn in the first line", "h", "", nil, -1, ""},
		{"held", "H" + one + held, "1\n", []uint8{all, 0, 0, isLogged}, 2, ""},
		{"held and written", "H" + one + two + held + last, "1\n2\n4\n", []uint8{all, all | isFailed, 0, all}, 6, ""},
		{"again", "H" + one + two + "H" + strings.Replace(two, "false", "true", 1), "1\n2\n", []uint8{all, all}, 4, ""},
		{"results lost by a power cut", "H" + one + two, "1\n2", []uint8{all, 0}, 2, ""},
		{"held results lost by a power cut", "H" + one + held + last, "1\n", []uint8{all, 0, 0, 0}, 2, ""},
		{"results truncated", "H" + one, "", nil, 0, "are gone: the file is empty"},
		{"another's file", "precious", "", nil, 0, "is not a job log"},
		{"another's file of JSON", `{"seq":1,"end":1}` + "\n", "", nil, 0, "is not a job log"},
		{"no JSON", "H" + one + "x\n" + two, "1\n2\n", nil, 0, "line 3 of the job log"},
		{"a task without end", "H" + `{"seq":1,"ok":true,"sum":"1"}` + "\n", "", nil, 0, "line 2 of the job log"},
		{"an end of nothing", "H" + last, "", nil, 0, "line 2 of the job log"},
		{"a sum that is none", "H" + `{"seq":1,"ok":true,"sum":"zz","end":2}` + "\n", "1\n", nil, 0, "line 2 of the job log"},
		{"a number out of this world", "H" + `{"seq":99999999999,"ok":true,"sum":"1","end":2}` + "\n", "1\n", nil, 0, "line 2 of the job log"},
		{"no end of a line", "H" + strings.Repeat("x", 1<<20) + "\n", "", nil, 0, "line 2 of the job log"},
	} {
		t.Run(x.name, func(t *testing.T) {
			dir := t.TempDir()
			results := open(t, filepath.Join(dir, "r"), x.results)
			h := logHeader(results)
			content := strings.ReplaceAll(x.log, "H", h)
			if x.log == "h" {
				content = h[:9]
			}
			path := filepath.Join(dir, "l")
			open(t, path, content)
			open(t, path+".held", "4\n")
			l, err := OpenLog(path, true, results)
			if x.want != "" {
				var el *ErrLog
				if !errors.As(err, &el) || !strings.Contains(el.Text, x.want) {
					t.Errorf("%v, want %q", err, x.want)
				}
				if b, err := os.ReadFile(path); string(b) != content {
					t.Errorf("the log was changed: %q, %v", b, err)
				}
				return
			}
			if err != nil {
				t.Fatal(err)
			}
			defer l.Close()
			if string(l.states) != string(x.states) || l.end != x.end {
				t.Errorf("states %v, want %v; end %d, want %d", l.states, x.states, l.end, x.end)
			}
			b, err := os.ReadFile(path)
			if err != nil || len(b) > 0 && b[len(b)-1] != '\n' || !strings.HasPrefix(content, string(b)) {
				t.Errorf("the log: %q, %v", b, err)
			}
			if x.name != "a run" {
				return
			}
			// Nobody else gets it meanwhile.
			if _, err := OpenLog(path, true, nil); err == nil || !strings.Contains(err.Error(), "in use by another") {
				t.Errorf("opened twice: %v", err)
			}
		})
	}
}

// A log that is there already is left alone where the run is not to be resumed.
func TestLogThere(t *testing.T) {
	dir := t.TempDir()
	results := open(t, filepath.Join(dir, "r"), "")
	path := filepath.Join(dir, "l")
	open(t, path, logHeader(results))
	if _, err := OpenLog(path, false, results); err == nil || !strings.Contains(err.Error(), "is there already") {
		t.Error(err)
	}
	open(t, path, "")
	l, err := OpenLog(path, false, results)
	if err != nil {
		t.Fatal(err)
	}
	l.Close()
}

// What is held is read back, whatever was written before, and the spool does not
// keep what has been written.
func TestSpool(t *testing.T) {
	dir := t.TempDir()
	rapid.Check(t, func(t *rapid.T) {
		path := filepath.Join(dir, "l")
		if err := os.RemoveAll(path); err != nil {
			t.Fatal(err)
		}
		l, err := OpenLog(path, false, nil)
		if err != nil {
			t.Fatal(err)
		}
		if err := l.begin("tag", []string{"a"}, nil); err != nil {
			t.Fatal(err)
		}
		var items []*item
		next, end := 0, int64(0)
		for range rapid.IntRange(0, 30).Draw(t, "steps") {
			switch {
			case next < len(items) && rapid.Bool().Draw(t, "write"):
				end += int64(len(items[next].line))
				l.wrote(items[next], end)
				next++
			default:
				it := &item{out: Outcome{Seq: int64(len(items) + 1)}, line: []byte(rapid.StringN(0, 20, -1).Draw(t, "line"))}
				items = append(items, it)
				l.hold(it)
			}
			if rapid.Bool().Draw(t, "commit") {
				if err := l.commit(false); err != nil {
					t.Fatal(err)
				}
			}
		}
		if err := l.commit(false); err != nil {
			t.Fatal(err)
		}
		if next == len(items) && l.spoolEnd != 0 {
			t.Errorf("the spool keeps %d bytes", l.spoolEnd)
		}
		l.Close()
		if l, err = OpenLog(path, true, nil); err != nil {
			t.Fatal(err)
		}
		defer l.Close() // of the second
		for i, it := range items {
			b, ok := l.waiting(it.out.Seq)
			_, state := l.state(it.out.Seq)
			if written := i < next; ok == written || written != (state&isWritten != 0) || !written && string(b) != string(it.line) {
				t.Fatalf("task %d: %q, %v, state %d; written: %v", it.out.Seq, b, ok, state, written)
			}
		}
	})
}

// Whatever is in the file, it is a log or an error, and costs no memory.
func FuzzLog(f *testing.F) {
	f.Add([]byte(`{"run":{"pid":1,"tag":"x","results":{"dev":1,"ino":2}}}` + "\n" + `{"seq":1,"ok":true,"sum":"1","end":2}` + "\n" + `{"seq":3,"ok":true,"sum":"1","held":{"at":0,"len":2,"sum":0}}` + "\n{\"seq\":3,\"end\":1}\n"))
	f.Add([]byte(`{"run":{`))
	f.Fuzz(func(t *testing.T, b []byte) {
		l := &Log{resume: true, held: map[int64]span{}}
		good, err := l.read(bytes.NewReader(b), &fileID{1, 2}, 3)
		if err != nil {
			return
		}
		if len(l.states) > len(b)+maxAhead || len(l.sums) != len(l.states) || good > int64(len(b)) || good > 0 && b[good-1] != '\n' {
			t.Errorf("%d states, %d of %d bytes", len(l.states), good, len(b))
		}
		again := &Log{resume: true, held: map[int64]span{}}
		if n, err := again.read(bytes.NewReader(b[:good]), &fileID{1, 2}, 3); n != good || err != nil || again.end != l.end || !maps.Equal(again.held, l.held) {
			t.Errorf("without the torn line: %d, %v", n, err)
		}
	})
}
