package cli

import (
	"encoding/json"
	"fmt"
	"strings"
	"testing"
	"time"
	"unicode/utf8"

	"github.com/remuda-dev/remuda/client"
)

func sampleRows(now time.Time) []client.Instance {
	return []client.Instance{
		{ID: 0, App: "web", Namespace: "default", Version: "1.4.2", ExecMode: "cluster", PID: 4711, Since: now.Add(-3 * time.Minute), State: client.Online, CPU: 12.5, Memory: 54 << 20, User: "root", Watching: true},
		{ID: 1, App: "web", Namespace: "default", Version: "1.4.2", ExecMode: "cluster", PID: 4712, Since: now.Add(-49 * time.Hour), State: client.Online, CPU: 0, Memory: 3 << 30, User: "root", Restarts: 12},
		{ID: 12, App: "数据处理服务", Namespace: "名前空間", ExecMode: "fork", Since: now, State: client.Stopped, User: "www-data"},
		{ID: 103, App: "evil\x1b[2J\nname\xff", Namespace: "default", ExecMode: "fork", Since: now, State: client.Backoff, Reason: "exited\nwith code 1", NextStart: ptr(now.Add(2500 * time.Millisecond)), User: "root", Restarts: 3},
		{ID: 104, App: strings.Repeat("long", 30), Namespace: "default", ExecMode: "fork", State: client.Errored, Reason: "gave up after 16 restarts", LastErr: []string{"a", "b", "c", "d", "e", "Error: \x07port in use"}, User: "root"},
		{ID: 105, App: "logger", Namespace: "default", ExecMode: "fork", PID: 99, Since: now.Add(-time.Hour), State: client.Online, LogTrouble: "no space left on device", LogLost: 2048, User: "root"},
	}
}

func ptr[T any](v T) *T { return &v }

func TestTableFits(t *testing.T) {
	now := time.Date(2026, 1, 2, 3, 4, 5, 0, time.UTC)
	rows := sampleRows(now)
	var b strings.Builder
	for _, w := range []int{20, 40, 60, 80, 100, 120, 200, 0} {
		l := arrange(rows, w, now)
		text := l.render(rows, false)
		fmt.Fprintf(&b, "width %d\n%s\n", w, text)
		for _, line := range strings.Split(text, "\n") {
			if w > 0 && width(line) > w {
				t.Errorf("at %d columns a line takes %d: %q", w, width(line), line)
			}
			if strings.ContainsAny(line, "\x1b\x07") || !utf8.ValidString(line) {
				t.Errorf("a control character in %q", line)
			}
		}
		if n := strings.Count(text, "\n"); n != len(rows)+1 {
			t.Errorf("%d lines for %d rows", n, len(rows))
		}
		for _, title := range []string{"id", "name", "status"} {
			if !strings.Contains(strings.SplitN(text, "\n", 2)[0], title) {
				t.Errorf("at %d columns there is no %s", w, title)
			}
		}
	}
	b.WriteString(troubles(rows, false, now))
	golden(t, "table.golden", b.String())
}

func TestTableColours(t *testing.T) {
	now := time.Now()
	rows := sampleRows(now)
	plain, coloured := arrange(rows, 100, now).render(rows, false), arrange(rows, 100, now).render(rows, true)
	if !strings.Contains(coloured, "\x1b[32monline\x1b[0m") {
		t.Errorf("%q", coloured)
	}
	if strip(coloured) != plain {
		t.Error("colours move columns")
	}
}

func strip(s string) string {
	for {
		i := strings.Index(s, "\x1b[")
		if i < 0 {
			return s
		}
		s = s[:i] + s[i+strings.IndexByte(s[i:], 'm')+1:]
	}
}

func TestColumnsVariable(t *testing.T) {
	f := newFake(t, sampleRows(time.Now())...)
	o := remudaWith(t, t.Context(), Options{Args: []string{"list"}, Environ: []string{"REMUDA_HOME=" + f.home, "COLUMNS=60"}})
	for _, line := range strings.Split(strings.SplitN(o.out, "\n\n", 2)[0], "\n") {
		if width(line) > 60 {
			t.Errorf("%d columns: %q", width(line), line)
		}
	}
	o.want(t, 0, "(id 104) errored: gave up after 16 restarts\n  | b\n", "")
	o.want(t, 0, "logger:0 (id 105) online: output cannot be written: no space left on device (2.0KB lost so far)\n", "")
}

func TestThousandRows(t *testing.T) {
	rows := make([]client.Instance, 1000)
	for k := range rows {
		rows[k] = instance(k, fmt.Sprintf("app-%d", k%50), k/50, client.Errored)
		rows[k].Reason = "gave up"
	}
	f := newFake(t, rows...)
	o := remuda(t, f.home, "list")
	if n := strings.Count(o.out, "\n"); n > 1000+1+1+maxTroubles+1 {
		t.Errorf("%d lines", n)
	}
	o.want(t, 0, "… and 990 more", "")
	var list []client.Instance
	o = remuda(t, f.home, "list", "--json", "--sort", "id:desc")
	if err := json.Unmarshal([]byte(o.out), &list); err != nil || len(list) != 1000 || list[0].ID != 999 {
		t.Errorf("%v, %d instances", err, len(list))
	}
	o = remuda(t, f.home, "restart", "all", "-s")
	if o.out != "" || o.code != 0 {
		t.Errorf("restart -s prints %.100q", o.out)
	}
}

func TestSorting(t *testing.T) {
	now := time.Now()
	rows := sampleRows(now)
	f := newFake(t, rows...)
	for by, first := range map[string]int{"memory:desc": 1, "cpu:desc": 0, "restarts:desc": 1, "uptime:desc": 104, "name": 103, "pid:desc": 1, "status": 103, "namespace:desc": 12} {
		var list []client.Instance
		o := remuda(t, f.home, "list", "--json", "--sort", by)
		if err := json.Unmarshal([]byte(o.out), &list); err != nil {
			t.Fatal(err)
		}
		if list[0].ID != first {
			t.Errorf("--sort %s begins with %d, not %d", by, list[0].ID, first)
		}
	}
}

func BenchmarkTable1000(b *testing.B) {
	rows := make([]client.Instance, 1000)
	for k := range rows {
		rows[k] = instance(k, fmt.Sprintf("app-%d", k), 0, client.Online)
	}
	for b.Loop() {
		arrange(rows, 120, time.Now()).render(rows, true)
	}
}

func BenchmarkRoot(b *testing.B) {
	b.ReportAllocs()
	for b.Loop() {
		(&cli{}).root()
	}
}
