package cli

import (
	"encoding/json"
	"fmt"
	"net/http"
	"strings"
	"sync/atomic"
	"testing"
	"time"

	"pgregory.net/rapid"

	"github.com/remuda-dev/remuda/client"
)

func sendLine(w http.ResponseWriter, l any) {
	b, err := json.Marshal(map[string]any{"value": l})
	if err != nil {
		panic(err)
	}
	_, _ = w.Write(append(b, '\n'))
	w.(http.Flusher).Flush()
}

func TestLogLines(t *testing.T) {
	f := newFake(t, instance(0, "web", 0, client.Online), instance(11, "worker", 0, client.Online))
	at := time.Date(2026, 1, 2, 3, 4, 5, 678_000_000, time.Local)
	f.on("/v1/logs", func(w http.ResponseWriter, _ *http.Request) {
		sendLine(w, client.LogLine{Time: at, App: "web", ID: 0, Stream: "out", Text: "hello\tthere"})
		sendLine(w, client.LogLine{Time: at, App: "worker", ID: 11, Stream: "err", Text: "oh\x1b[2J no"})
	})
	remuda(t, f.home, "logs", "--nostream").want(t, 0, "0|web     | hello\tthere\n11|worker | oh\x1b[2J no\n", "")
	remuda(t, f.home, "logs", "--nostream", "--raw").want(t, 0, "hello\tthere\noh\x1b[2J no\n", "")
	remuda(t, f.home, "logs", "--nostream", "--timestamp").want(t, 0, "0|web     | 2026-01-02T03:04:05: hello", "")
	remuda(t, f.home, "logs", "--nostream", "--timestamp=HH:mm", "--raw").want(t, 0, "03:04: hello", "")
	remuda(t, f.home, "logs", "--nostream", "--format").want(t, 0, "app=worker id=11 type=err message=oh", "")
	o := remuda(t, f.home, "logs", "--nostream", "--json", "--err", "--grep", "a|b", "--since", "10m", "web")
	var l client.LogLine
	if err := json.Unmarshal([]byte(strings.SplitN(o.out, "\n", 2)[0]), &l); err != nil || l.App != "web" || l.Text != "hello\tthere" || !l.Time.Equal(at) {
		t.Errorf("%v: %+v", err, l)
	}
	seen := f.seen("/v1/logs")
	q := seen[len(seen)-1].query
	if fmt.Sprint(q["err"], q["out"], q["grep"], q["lines"], q["target"], q["follow"]) != "[true] [] [a|b] [-1] [web] []" {
		t.Errorf("asked for %v", q)
	}
	f.on("/v1/logs", func(w http.ResponseWriter, _ *http.Request) {
		fmt.Fprintln(w, `{"error":"the file is gone"}`)
	})
	remuda(t, f.home, "logs", "--nostream").want(t, ExitFailed, "", "the file is gone")
	f.on("/v1/logs", func(w http.ResponseWriter, _ *http.Request) {
		problem(w, http.StatusUnprocessableEntity, "grep: missing )")
	})
	remuda(t, f.home, "logs", "--grep", "(").want(t, ExitUsage, "", "missing closing )")
}

// TestFollowReconnects has the daemon go away in the middle of a line and come
// back with an overlap.
func TestFollowReconnects(t *testing.T) {
	f := newFake(t, instance(0, "web", 0, client.Online))
	at := time.Now().Add(-time.Minute)
	line := func(n int) client.LogLine {
		return client.LogLine{Time: at.Add(time.Duration(n) * 10 * time.Millisecond), App: "web", ID: 0, Stream: "out", Text: fmt.Sprintf("line %d", n)}
	}
	var calls atomic.Int32
	f.on("/v1/logs", func(w http.ResponseWriter, r *http.Request) {
		switch calls.Add(1) {
		case 1:
			for n := range 5 {
				sendLine(w, line(n))
			}
			fmt.Fprint(w, `{"value":{"id":0,`)
			w.(http.Flusher).Flush()
			hangUp(t, w)
		case 2, 3:
			hangUp(t, w)
		case 4:
			if since := r.URL.Query().Get("since"); since != line(4).Time.Add(-overlap).Format(time.RFC3339Nano) {
				t.Errorf("since %s", since)
			}
			for n := range 8 {
				sendLine(w, line(n))
			}
		default: // the daemon ended in good order; and now grep is refused
			problem(w, http.StatusBadRequest, "that is all")
		}
	})
	o := remuda(t, f.home, "logs", "--raw")
	want := ""
	for n := range 8 {
		want += line(n).Text + "\n"
	}
	if o.out != want || o.code != ExitFailed || strings.Count(o.err, "the daemon went away") != 2 {
		t.Errorf("exit code %d\n%s\n%s", o.code, o.out, o.err)
	}
}

// TestFollowNewcomers: what is started while logs are followed is shown too.
func TestFollowNewcomers(t *testing.T) {
	f := newFake(t, instance(0, "web", 0, client.Online))
	at := time.Now()
	var calls atomic.Int32
	first := make(chan struct{})
	f.on("/v1/logs", func(w http.ResponseWriter, r *http.Request) {
		n := calls.Add(1)
		if n > 2 {
			problem(w, http.StatusBadRequest, "that is all")
			return
		}
		sendLine(w, client.LogLine{Time: at, App: "web", ID: 0, Stream: "out", Text: "old"})
		if n == 1 {
			close(first)
			<-r.Context().Done()
			return
		}
		sendLine(w, client.LogLine{Time: at, App: "api", ID: 7, Stream: "out", Text: "new"})
	})
	f.on("/v1/events", func(w http.ResponseWriter, r *http.Request) {
		<-first
		f.mu.Lock()
		if len(f.instances) == 1 {
			f.instances = append(f.instances, instance(7, "api", 0, client.Online))
		}
		f.mu.Unlock()
		for seq, e := range []client.Event{
			{App: "gone", ID: 3, Time: at.Add(-time.Hour)}, // of before
			{App: "web", ID: 0, Time: time.Now()},
			{App: "api", ID: 7, Time: time.Now()},
		} {
			e.Seq = uint64(seq + 1)
			sendLine(w, e)
		}
		<-r.Context().Done()
	})
	o := remuda(t, f.home, "logs", "--raw")
	if o.out != "old\nnew\n" || strings.Count(o.err, "went away") != 1 {
		t.Errorf("exit code %d\n%s\n%s", o.code, o.out, o.err)
	}
}

func TestEvents(t *testing.T) {
	f := newFake(t)
	var calls atomic.Int32
	f.on("/v1/events", func(w http.ResponseWriter, r *http.Request) {
		ev := func(seq uint64) client.Event {
			return client.Event{Seq: seq, Time: time.Now(), Type: "app.exit", App: "web", ID: 0, Text: "exit code\n3"}
		}
		switch calls.Add(1) {
		case 1:
			sendLine(w, ev(1))
			sendLine(w, ev(2))
			hangUp(t, w)
		case 2:
			if after := r.URL.Query().Get("after"); after != "2" {
				t.Errorf("after %s", after)
			}
			sendLine(w, ev(3))
			sendLine(w, client.Event{Seq: 4, Type: "daemon.started", ID: -1, Text: "controller 7"})
		default:
			problem(w, http.StatusBadRequest, "that is all")
		}
	})
	o := remuda(t, f.home, "events", "-f")
	if n := strings.Count(o.out, "web (id 0) exit code; 3\n"); n != 3 || !strings.Contains(o.out, "daemon.started   controller 7\n") {
		t.Errorf("%s", o.out)
	}
}

// TestResume checks that whatever was seen and comes again, and however often
// lines repeat, each line is shown once.
func TestResume(t *testing.T) {
	rapid.Check(t, func(t *rapid.T) {
		base := time.Unix(1_700_000_000, 0)
		n := rapid.IntRange(1, 60).Draw(t, "lines")
		words := rapid.IntRange(1, 4).Draw(t, "words")
		// The first lines may have been left out (--lines). Where those are the
		// same as what follows, nobody can tell.
		left := rapid.IntRange(0, max(0, n-2)).Draw(t, "left out")
		var all []client.LogLine
		at := base
		for k := range n {
			at = at.Add(time.Duration(rapid.IntRange(1, 400).Draw(t, "ms")) * time.Millisecond)
			word := rapid.IntRange(0, words).Draw(t, "word")
			if left > 0 {
				word = k
			}
			all = append(all, client.LogLine{Time: at, ID: k % 2, Stream: "out", Text: fmt.Sprint(word)})
		}
		var r resume
		var shown []client.LogLine
		next := 0 // the first line not yet sent
		for next < n {
			from := 0
			if !r.last.IsZero() {
				for from < n && all[from].Time.Before(r.last.Add(-overlap)) {
					from++
				}
			}
			r.reconnected()
			least := next
			if left > 0 {
				least = max(next, left+2) // at least one line of each is shown
			}
			upto := rapid.IntRange(least, n).Draw(t, "upto")
			if r.last.IsZero() {
				from = left
			}
			for _, l := range all[from:max(from, upto)] {
				shown = append(shown, r.pass(l)...)
			}
			next = max(next, upto)
		}
		count := func(list []client.LogLine, id int) string {
			s := ""
			for _, l := range list {
				if l.ID == id {
					s += l.Text + " "
				}
			}
			return s
		}
		for id := range 2 {
			if count(shown, id) != count(all[left:], id) {
				t.Fatalf("instance %d: shown %s\nwritten %s", id, count(shown, id), count(all[left:], id))
			}
		}
	})
}

func TestTame(t *testing.T) {
	for in, want := range map[string]string{
		"plain":               "plain",
		"tab\tok":             "tab\tok",
		"\x1b[31mred\x1b[0m":  "\x1b[31mred\x1b[0m\x1b[0m",
		"\x1b[2Jwipe":         `\x1b[2Jwipe`,
		"\x1b]0;title\x07":    `\x1b]0;title\a`,
		"progress 1\rdone\r":  `progress 1\rdone`,
		"\x1b":                `\x1b`,
		"\x1b[31":             `\x1b[31`,
		"\u009b31m":           `\u009b31m`,
		"ünï\x00":             `ünï\x00`,
		"\x1b[1;38:5:9mx\x7f": "\x1b[1;38:5:9mx\\x7f\x1b[0m",
	} {
		if got := tame(in); got != want {
			t.Errorf("tame(%q) = %q, want %q", in, got, want)
		}
	}
}

func TestMoment(t *testing.T) {
	now := time.Date(2026, 5, 6, 12, 0, 0, 0, time.Local)
	for in, want := range map[string]time.Time{
		"":                     {},
		"10m":                  now.Add(-10 * time.Minute),
		"3d":                   now.Add(-72 * time.Hour),
		"08:30":                time.Date(2026, 5, 6, 8, 30, 0, 0, time.Local),
		"2026-01-02":           time.Date(2026, 1, 2, 0, 0, 0, 0, time.Local),
		"2026-01-02 03:04:05":  time.Date(2026, 1, 2, 3, 4, 5, 0, time.Local),
		"2026-01-02T03:04:05Z": time.Date(2026, 1, 2, 3, 4, 5, 0, time.UTC),
	} {
		if got, err := moment(in, now); err != nil || !got.Equal(want) {
			t.Errorf("moment(%q) = %v, %v, want %v", in, got, err, want)
		}
	}
	for _, in := range []string{"x", "1e9999d", "d", "-d", "25:99", strings.Repeat("9", 10000)} {
		if got, err := moment(in, now); err == nil {
			t.Errorf("moment(%.20q) = %v", in, got)
		}
	}
	if l := goLayout("YYYY-MM-DD HH:mm:ss.SSS Z"); l != "2006-01-02 15:04:05.000 -07:00" {
		t.Errorf("%q", l)
	}
}
