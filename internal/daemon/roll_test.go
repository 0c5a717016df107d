package daemon

import (
	"bytes"
	"context"
	"fmt"
	"math/rand/v2"
	"os"
	"path/filepath"
	"strconv"
	"strings"
	"syscall"
	"testing"
	"time"

	"github.com/remuda-dev/remuda/client"
	"github.com/remuda-dev/remuda/internal/config"
	"github.com/remuda-dev/remuda/test/load"
)

// load asks for the app's answer again and again, by several clients, until
// the returned function is called, which says how many answers there were.
func (b *box) load(addr string, clients int) (stop func() int) {
	l := load.Start(load.Options{Addr: addr, Fresh: clients, Timeout: patience})
	b.Cleanup(func() { l.Stop() }) // also where the test ends early
	return func() int {
		f := l.Stop()
		if len(f.Failures) > 0 {
			b.Errorf("requests failed: %v", &f)
		}
		return f.Requests
	}
}

// processes are those of an app's instances that live, by index: children of
// the keeper, as the programs of the tests have none themselves.
func (b *box) processes(app string) map[int][]int {
	if b.keeper == 0 {
		info, err := b.c.Info(b.ctx)
		if err != nil {
			b.Error(err)
			return nil
		}
		b.keeper = info.KeeperPID
	}
	m := map[int][]int{}
	tasks, _ := filepath.Glob(fmt.Sprintf("/proc/%d/task/*/children", b.keeper))
	for _, path := range tasks {
		children, _ := os.ReadFile(path)
		for _, pid := range strings.Fields(string(children)) {
			env, _ := os.ReadFile("/proc/" + pid + "/environ") // empty of a zombie
			if !bytes.Contains(env, []byte("REMUDA_APP="+app+"\x00")) {
				continue
			}
			for _, kv := range strings.Split(string(env), "\x00") {
				if v, ok := strings.CutPrefix(kv, "REMUDA_INSTANCE="); ok {
					index, _ := strconv.Atoi(v)
					n, _ := strconv.Atoi(pid)
					m[index] = append(m[index], n)
				}
			}
		}
	}
	return m
}

// failures are the errors of a result, by app:index.
func failures(res client.ActResult) map[string]client.Outcome {
	m := map[string]client.Outcome{}
	for _, o := range res.Instances {
		if o.Error != "" {
			m[fmt.Sprintf("%s:%d", o.App, o.Index)] = o
		}
	}
	return m
}

// A version that does not become ready is taken back, and nobody notices but
// the one who wanted it.
func TestReloadRollsBack(t *testing.T) {
	b := newBox(t)
	spec, addr := b.web()
	spec.Ready.Timeout = config.Duration(2 * time.Second)
	b.start(spec)
	b.until("it listens", func() bool { return open(addr) })
	good := b.read("server.js")
	before := b.list()
	stop := b.load(addr, 3)
	for name, tc := range map[string]struct{ js, text, stderr string }{
		"dies":          {"console.error('no config'); process.exit(3)", "exited with code 3", "no config"},
		"never listens": {"console.error('waiting for Godot'); setInterval(() => {}, 1000)", "does not listen within 2s", "waiting for Godot"},
	} {
		b.write("server.js", tc.js)
		res, err := b.act(client.VerbReload, "web")
		if err != nil {
			t.Fatal(err)
		}
		bad := failures(res)
		if o := bad["web:0"]; !strings.Contains(o.Error, tc.text) || !strings.Contains(o.Error, "rolled back") || !strings.Contains(strings.Join(o.LastErr, "\n"), tc.stderr) {
			t.Errorf("%s: told %q, stderr %q", name, o.Error, o.LastErr)
		}
		if o := bad["web:1"]; !strings.Contains(o.Error, "not reloaded, because web:0 failed") {
			t.Errorf("%s: of the other: %q", name, o.Error)
		}
		now := b.list()
		for _, i := range []string{"web:0", "web:1"} {
			if now[i].PID != before[i].PID || now[i].Restarts != 0 || now[i].State != client.Online || now[i].Reason != "" || len(now[i].LastErr) > 0 {
				t.Errorf("%s: %s was %+v, is %+v", name, i, before[i], now[i])
			}
		}
		if p := b.processes("web"); len(p[0]) != 1 || len(p[1]) != 1 {
			t.Errorf("%s: processes: %v", name, p)
		}
	}
	b.write("server.js", good)
	b.well(b.c.Act(b.ctx, client.ActRequest{Verb: client.VerbReload, Targets: []string{"web"}, MaxSurge: "100%"}))
	if now := b.list(); now["web:0"].PID == before["web:0"].PID || now["web:1"].PID == before["web:1"].PID || now["web:0"].Restarts != 1 {
		t.Errorf("not reloaded: %+v", now)
	}
	t.Logf("%d requests", stop())
	if _, err := b.c.Act(b.ctx, client.ActRequest{Verb: client.VerbReload, Targets: []string{"web"}, MaxSurge: "many"}); err == nil {
		t.Error("max_surge many was taken")
	}
}

// up gives all instances the new spec, or all the old one.
func TestUpRollsBack(t *testing.T) {
	b := newBox(t)
	spec, addr := b.web()
	// Version 2 works for the first instance only.
	b.write("server.js", `if (process.env.V === '2' && process.env.NODE_APP_INSTANCE === '1') { console.error('not me'); process.exit(1) }
`+strings.Replace(b.read("server.js"), "String(process.pid)", "process.env.V", 1))
	spec.InstanceVar = "NODE_APP_INSTANCE"
	spec.Env = map[string]string{"V": "1"}
	b.well(b.c.Up(b.ctx, ofFile(nil, spec)))
	b.until("it answers", func() bool { v, err := get(addr); return err == nil && v == "1" })
	version := func() string {
		b.Helper()
		d, err := b.c.Describe(b.ctx, true, "web")
		if err != nil || d[0].Spec.Env["V"] != d[0].Env["V"] || d[1].Spec.Env["V"] != d[1].Env["V"] {
			t.Fatalf("%v: what is and what is said differ: %+v", err, d)
		}
		return d[0].Env["V"] + d[1].Env["V"]
	}
	stop := b.load(addr, 3)
	before := b.list()
	spec.Env = map[string]string{"V": "2"}
	res, err := b.c.Up(b.ctx, ofFile(nil, spec))
	if err != nil {
		t.Fatal(err)
	}
	bad := failures(res)
	if o := bad["web:1"]; !strings.Contains(o.Error, "exited with code 1; rolled back") || len(o.LastErr) != 1 || o.LastErr[0] != "not me" {
		t.Errorf("told %q, stderr %q", o.Error, o.LastErr)
	}
	if o := bad["web:0"]; o.Error != "rolled back, because web:1 failed" {
		t.Errorf("of the other: %q", o.Error)
	}
	if v := version(); v != "11" || b.list()["web:1"].PID != before["web:1"].PID {
		t.Errorf("versions %s, %+v", v, b.list())
	}
	b.crash()
	if v := version(); v != "11" {
		t.Errorf("with another controller: versions %s", v)
	}
	// One that is well, and the number of instances with it.
	spec.Env = map[string]string{"V": "3"}
	spec.Instances = 3
	b.well(b.c.Up(b.ctx, ofFile(nil, spec)))
	if v := version(); v != "33" || len(b.list()) != 3 {
		t.Errorf("versions %s, %+v", v, b.list())
	}
	b.crash()
	if v := version(); v != "33" || len(b.list()) != 3 {
		t.Errorf("with another controller: versions %s", v)
	}
	b.well(b.c.Act(b.ctx, client.ActRequest{Verb: client.VerbReload, Targets: []string{"web"}, Env: map[string]string{"V": "4"}}))
	if v := version(); v != "44" {
		t.Errorf("after --update-env: versions %s", v)
	}
	stop()
}

// A controller that is killed in the middle of a reload leaves the old run or
// the new one, not both and not neither, and no client notices.
func TestReloadSurvivesCrashes(t *testing.T) {
	b := newBox(t)
	spec, addr := b.web()
	spec.Instances = 1
	// It tells what it is only after a while, as a program that loads something.
	b.write("server.js", "setTimeout(() => {"+b.read("server.js")+"}, 20)")
	b.well(b.c.Up(b.ctx, ofFile(nil, spec)))
	b.until("it listens", func() bool { return open(addr) })
	ctx, cancel := context.WithCancel(t.Context())
	none := make(chan int)
	b.processes("web")
	go func() { // nothing is ever without a run
		n := 0
		for ctx.Err() == nil {
			if p := b.processes("web"); len(p[0]) == 0 {
				n++
			}
			time.Sleep(20 * time.Millisecond)
		}
		none <- n
	}()
	stop := b.load(addr, 1)
	kept, replaced := 0, 0
	longest := 50 * time.Millisecond
	for round := range 20 {
		before := b.list()["web:0"].PID
		info, err := b.c.Info(b.ctx)
		if err != nil {
			t.Fatal(err)
		}
		began := time.Now()
		done := make(chan error, 1)
		go func() {
			if round%2 == 0 {
				_, err := b.act(client.VerbReload, "web")
				done <- err
				return
			}
			next := spec
			next.Env = map[string]string{"ROUND": strconv.Itoa(round)}
			_, err := b.c.Up(b.ctx, ofFile(nil, next))
			done <- err
		}()
		time.Sleep(rand.N(longest + longest/4))
		if err := syscall.Kill(info.PID, syscall.SIGKILL); err != nil {
			t.Fatal(err)
		}
		if err := <-done; err == nil {
			longest = max(longest/2, time.Since(began)) // as long as a reload takes here
		} else {
			longest += longest / 4
		}
		b.until("another controller", func() bool {
			now, err := b.c.Info(b.ctx)
			return err == nil && now.PID != info.PID
		})
		var p []int
		b.until("one run is left", func() bool {
			p = b.processes("web")[0]
			i := b.list()["web:0"]
			return len(p) == 1 && i.State == client.Online && i.PID == p[0]
		})
		// An up goes on with the next controller.
		if round%2 == 1 && strings.Contains(b.read("state.json"), `"next":`) {
			b.until("the up is concluded", func() bool { return !strings.Contains(b.read("state.json"), `"next":`) })
			b.until("one run is left", func() bool { return len(b.processes("web")[0]) == 1 })
		}
		if b.list()["web:0"].PID == before {
			kept++
		} else {
			replaced++
		}
	}
	cancel()
	if n := <-none; n > 0 {
		t.Errorf("%d times there was no run", n)
	}
	t.Logf("%d requests; %d times the old run was left, %d times the new one", stop(), kept, replaced)
	if i := b.list()["web:0"]; i.Unstable > 0 {
		t.Errorf("a run was counted as failed: %+v", i)
	}
}

// What others want of an app that is being reloaded is done, and the reload
// comes to its end.
func TestReloadAmidstOthers(t *testing.T) {
	b := newBox(t)
	spec := b.app("web", `sleep 0.3; echo up; trap 'exit 0' TERM; while :; do sleep 0.01; done`)
	spec.Ready = config.Probe{Type: "log", Pattern: "up", Timeout: config.Duration(20 * time.Second), OnTimeout: "fail"}
	spec.Instances, spec.MaxSurge, spec.Restart.MinUptime = 3, "2", 0
	spec.Env = map[string]string{"V": "0"}
	b.well(b.c.Up(b.ctx, ofFile(nil, spec)))
	for n, tc := range []struct {
		do   func() error
		runs int
	}{
		{func() error { _, err := b.act(client.VerbRestart, "web"); return err }, 3},
		{func() error { _, err := b.act(client.VerbStop, "web:1"); return err }, 2},
		{func() error { _, err := b.c.Scale(b.ctx, client.ScaleRequest{App: "web", To: "4"}); return err }, 4},
		{func() error { _, err := b.c.Scale(b.ctx, client.ScaleRequest{App: "web", To: "2"}); return err }, 3}, // as the file says
		{func() error { // one of its own
			if _, err := b.act(client.VerbReload, "web"); err == nil || !strings.Contains(err.Error(), "is being reloaded") {
				return fmt.Errorf("a second reload: %w", err)
			}
			return nil
		}, 3},
		{func() error { _, err := b.act(client.VerbStop, "web"); return err }, 0},
		{func() error { return nil }, 3}, // starts what is stopped
		{func() error { _, err := b.act(client.VerbDelete, "web"); return err }, 0},
	} {
		spec.Env = map[string]string{"V": strconv.Itoa(n + 1)}
		was := len(b.processes("web"))
		done := make(chan error, 1)
		go func() { _, err := b.c.Up(b.ctx, ofFile(nil, spec)); done <- err }()
		b.until("two of an instance run", func() bool {
			for _, p := range b.processes("web") {
				if len(p) > 1 {
					return true
				}
			}
			return was == 0 && len(b.processes("web")) > 0
		})
		if err := tc.do(); err != nil {
			t.Errorf("%d: %v", n, err)
		}
		if err := <-done; err != nil {
			t.Errorf("%d: up: %v", n, err)
		}
		b.until(fmt.Sprintf("%d run at the end of %d", tc.runs, n), func() bool {
			all := 0
			for _, p := range b.processes("web") {
				all += len(p)
			}
			return all == tc.runs && !strings.Contains(b.read("state.json"), `"next":`)
		})
		details, err := b.c.Describe(b.ctx, true)
		if err != nil {
			t.Fatal(err)
		}
		for _, d := range details {
			if v := strconv.Itoa(n + 1); d.Spec.Env["V"] != v || d.PID != 0 && d.Env["V"] != v {
				t.Errorf("%d: %s:%d has version %s, runs %s", n, d.App, d.Index, d.Spec.Env["V"], d.Env["V"])
			}
		}
	}
}

// Two runs of one instance write into its log side by side.
func TestReloadKeepsAllOutput(t *testing.T) {
	b := newBox(t)
	spec := b.app("web", `trap 'echo "$$ end"; exit 0' TERM; n=0; while :; do n=$((n+1)); echo "$$ $n"; sleep 0.002; done`)
	spec.MaxSurge = "1"
	b.start(spec)
	for range 4 {
		b.well(b.act(client.VerbReload, "web"))
	}
	b.well(b.act(client.VerbStop, "web"))
	next, ended := map[string]int{}, 0
	for _, l := range b.lines("logs/web-out.log") {
		pid, n, _ := strings.Cut(l, " ")
		switch {
		case n == "end":
			ended++
			next[pid] = -1
		case n == strconv.Itoa(next[pid]+1):
			next[pid]++
		default:
			t.Fatalf("after %s of %s comes %q", strconv.Itoa(next[pid]), pid, l)
		}
	}
	if len(next) != 5 || ended != 5 {
		t.Errorf("%d runs, %d ended: %v", len(next), ended, next)
	}
}

// Who may be beside whom is the app's to say.
func TestSurge(t *testing.T) {
	b := newBox(t)
	order := func(surge string) string {
		b.Helper()
		name := "s" + surge
		spec := b.app(name, `echo start >>order-`+name+`; trap 'echo end >>order-`+name+`; exit 0' TERM; while :; do sleep 0.01; done`)
		spec.MaxSurge = surge
		b.start(spec)
		b.until("it has started", func() bool { return len(b.lines("order-"+name)) == 1 })
		b.well(b.act(client.VerbReload, name))
		b.until("it has been reloaded", func() bool { return len(b.lines("order-"+name)) == 3 })
		return strings.Join(b.lines("order-"+name), " ")
	}
	for surge, want := range map[string]string{"": "start end start", "0": "start end start", "1": "start start end", "25%": "start start end"} {
		if got := order(surge); got != want {
			t.Errorf("max_surge %q: %s, want %s", surge, got, want)
		}
	}
}

func TestSortOut(t *testing.T) {
	var (
		old    = remains{}
		dead   = remains{ended: true}
		fresh  = remains{trial: true}
		unborn = remains{trial: true, ended: true}
	)
	for name, tc := range map[string]struct {
		runs        []remains
		last, other int
	}{
		"one":                             {[]remains{old}, 0, -1},
		"a replacement that is not ready": {[]remains{old, fresh}, 0, 1},
		"one that was":                    {[]remains{old, old}, 1, 0},
		"one that has taken over":         {[]remains{dead, old}, 1, -1},
		"one that failed":                 {[]remains{old, unborn}, 0, -1},
		"the old one ended first":         {[]remains{dead, fresh}, 1, -1},
		"both ended":                      {[]remains{dead, unborn}, 0, -1},
		"the new one alone":               {[]remains{fresh}, 0, -1},
		"it has ended":                    {[]remains{unborn}, 0, -1},
		"the new one has ended since":     {[]remains{old, dead}, 1, 0},
		"two in a row":                    {[]remains{dead, unborn, old, fresh}, 2, 3},
	} {
		if last, other := sortOut(tc.runs); last != tc.last || other != tc.other {
			t.Errorf("%s: %d and %d, want %d and %d", name, last, other, tc.last, tc.other)
		}
	}
}
