package daemon

import (
	"context"
	"errors"
	"fmt"
	"net/http"
	"slices"
	"strings"
	"syscall"
	"testing"

	"pgregory.net/rapid"

	"github.com/remuda-dev/remuda/client"
	"github.com/remuda-dev/remuda/internal/config"
)

// bare is a daemon with apps and nothing behind them.
func bare(apps ...config.App) *Daemon {
	d := &Daemon{apps: map[string]*app{}, instances: map[int]*instance{}, bus: newBus()}
	for _, spec := range apps {
		a := &app{spec: spec}
		d.apps[spec.Name] = a
		for n := range spec.Instances {
			d.addInstance(a, n)
		}
	}
	return d
}

func TestTargets(t *testing.T) {
	d := bare(
		config.App{Name: "web", Namespace: "front", Instances: 2},
		config.App{Name: "api", Namespace: "back", Instances: 1},
		config.App{Name: "back", Namespace: "default", Instances: 1},
		config.App{Name: "worker", Namespace: "back", Instances: 1},
	)
	for _, c := range []struct {
		targets []string
		want    []int
		err     string
	}{
		{nil, []int{0, 1, 2, 3, 4}, ""},
		{[]string{"all"}, []int{0, 1, 2, 3, 4}, ""},
		{[]string{"web"}, []int{0, 1}, ""},
		{[]string{"web:1"}, []int{1}, ""},
		{[]string{"2"}, []int{2}, ""},
		{[]string{"front"}, []int{0, 1}, ""},
		{[]string{"back"}, []int{3}, ""}, // a name goes before a namespace
		{[]string{"/^w/"}, []int{0, 1, 4}, ""},
		{[]string{"4", "web:0", "4"}, []int{0, 4}, ""},
		{[]string{"wbe"}, nil, `did you mean "web"?`},
		{[]string{"web", "nothing"}, nil, "no app, id or namespace"},
		{[]string{"99"}, nil, `"99"`},
		{[]string{"/(/"}, nil, "missing closing"},
		{[]string{strings.Repeat("x", 10_000)}, nil, "10000 bytes"},
		{[]string{"a\x1b[31m\n"}, nil, `\x1b`},
		{slices.Repeat([]string{"web"}, maxTargets+1), nil, "more than"},
	} {
		got, err := d.match(c.targets)
		if c.err != "" {
			if err == nil || !strings.Contains(err.Error(), c.err) || strings.ContainsAny(err.Error(), "\x1b\n") {
				t.Errorf("%.60q: error %v, want one with %q", c.targets, err, c.err)
			}
			continue
		}
		var ids []int
		for _, i := range got {
			ids = append(ids, i.id)
		}
		if err != nil || !slices.Equal(ids, c.want) {
			t.Errorf("%q: %v, %v; want %v", c.targets, ids, err, c.want)
		}
	}
	if _, err := d.match([]string{"nothing"}); !errors.Is(err, client.ErrNoTarget) {
		t.Errorf("%v is not ErrNoTarget", err)
	}
}

func TestScaleTo(t *testing.T) {
	for _, c := range []struct {
		to   string
		want int // 0: refused
	}{{"4", 4}, {"+2", 5}, {"-1", 2}, {"-3", 0}, {"0", 0}, {"x", 0}, {"+x", 0}, {"", 0}, {"99999999999999999999", 0}} {
		n, err := scaleTo(c.to, 3)
		if n != c.want || (err == nil) != (c.want > 0) {
			t.Errorf("%q: %d, %v", c.to, n, err)
		}
	}
	if n, err := scaleTo("max", 3); err != nil || n < 1 {
		t.Errorf("max: %d, %v", n, err)
	}
}

func TestDistance(t *testing.T) {
	rapid.Check(t, func(t *rapid.T) {
		a := rapid.StringMatching(`[ab]{0,6}`).Draw(t, "a")
		b := rapid.StringMatching(`[ab]{0,6}`).Draw(t, "b")
		limit := rapid.IntRange(1, 8).Draw(t, "limit")
		if got, want := distance(a, b, limit), min(slow(a, b), limit); got != want {
			t.Fatalf("distance(%q, %q, %d) = %d, want %d", a, b, limit, got, want)
		}
	})
}

func slow(a, b string) int {
	if a == "" || b == "" {
		return len(a) + len(b)
	}
	if a[0] == b[0] {
		return slow(a[1:], b[1:])
	}
	return 1 + min(slow(a[1:], b), slow(a, b[1:]), slow(a[1:], b[1:]))
}

func TestNeedsNewRun(t *testing.T) {
	base := config.App{Name: "a", Command: []string{"x"}, Instances: 1, Env: map[string]string{"A": "1"}}
	for _, c := range []struct {
		what   string
		change func(*config.App)
		want   bool
	}{
		{"nothing", func(*config.App) {}, false},
		{"env", func(a *config.App) { a.Env = map[string]string{"A": "2"} }, true},
		{"command", func(a *config.App) { a.Command = []string{"y"} }, true},
		{"log path", func(a *config.App) { a.Logs.Out = "/tmp/x" }, true},
		{"instances", func(a *config.App) { a.Instances = 4 }, false},
		{"policy", func(a *config.App) { a.Restart.Policy = "never" }, false},
		{"grace", func(a *config.App) { a.Stop.Grace = 5 }, false},
		{"kernel memory limit", func(a *config.App) { a.Restart.MaxMemory = 5 }, true},
		{"watch", func(a *config.App) { a.Watch = &config.Watch{} }, false},
	} {
		after := base
		c.change(&after)
		if got := needsNewRun(base, after); got != c.want {
			t.Errorf("%s: %v", c.what, got)
		}
	}
}

func TestLogPaths(t *testing.T) {
	d := &Daemon{home: "/h"}
	for _, c := range []struct {
		alone    bool
		logs     config.Logs
		out, err string
	}{
		{true, config.Logs{}, "/h/logs/web-out.log", "/h/logs/web-error.log"},
		{false, config.Logs{}, "/h/logs/web-out-7.log", "/h/logs/web-error-7.log"},
		{false, config.Logs{Merge: true}, "/h/logs/web-out.log", "/h/logs/web-error.log"},
		{false, config.Logs{Out: "/v/a.txt", Err: "none"}, "/v/a-7.txt", "none"},
		{true, config.Logs{Out: "/v/a", Combine: true}, "/v/a", "/v/a"},
	} {
		i := &instance{d: d, id: 7, alone: c.alone}
		if out, err := i.logPaths(config.App{Name: "web", Logs: c.logs}); out != c.out || err != c.err {
			t.Errorf("%+v: %s %s", c, out, err)
		}
	}
}

func TestParseSignal(t *testing.T) {
	for s, want := range map[string]syscall.Signal{"SIGUSR2": syscall.SIGUSR2, "usr2": syscall.SIGUSR2, "9": 9, "0": 0, "65": 0, "": 0, "SIGNOPE": 0, "-9": 0} {
		if got, err := parseSignal(s); got != want || (err == nil) != (want != 0) {
			t.Errorf("%q: %v, %v", s, got, err)
		}
	}
}

func TestEventsInOrderAndSlowOnesDropped(t *testing.T) {
	b := newBus()
	first := b.seq
	for n := range keptEvents + 10 {
		b.publish(client.Event{Text: fmt.Sprint(n)})
	}
	all := func(client.Event) bool { return true }
	var last uint64
	count := 0
	for e, err := range b.stream(context.Background(), 0, false, all) {
		if err != nil || e.Seq <= last {
			t.Fatalf("%v after %d: %v", e, last, err)
		}
		last = e.Seq
		count++
	}
	if count != keptEvents || last != first+keptEvents+10 {
		t.Fatalf("%d events up to %d", count, last)
	}
	// Who does not read is told.
	var fault error
	for _, err := range b.stream(context.Background(), last-1, true, all) {
		if err != nil {
			fault = err
			break
		}
		if last > 0 { // within the first event: the flood comes while it is being handled
			for range 3000 {
				b.publish(client.Event{Text: "flood"})
			}
			last = 0
		}
	}
	if !errors.Is(fault, errSlow) {
		t.Fatalf("got %v", fault)
	}
}

func TestRefusalsKeepTheirStatus(t *testing.T) {
	var e *client.Error
	if !errors.As(refuse(http.StatusConflict, "x"), &e) || e.Status != http.StatusConflict {
		t.Fatal(e)
	}
}
