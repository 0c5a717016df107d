package cli

import (
	"context"
	"encoding/json"
	"flag"
	"fmt"
	"net/http"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"syscall"
	"testing"
	"time"
	"unicode/utf8"

	"github.com/spf13/cobra"

	"github.com/remuda-dev/remuda/client"
	"github.com/remuda-dev/remuda/internal/config"
)

var update = flag.Bool("update", false, "write the golden files anew")

func tree(root *cobra.Command, visit func(*cobra.Command)) {
	for _, c := range root.Commands() {
		visit(c)
		tree(c, visit)
	}
}

func TestEveryCommandIsDocumented(t *testing.T) {
	c := &cli{}
	seen := map[string]string{}
	tree(c.root(), func(cmd *cobra.Command) {
		if cmd.Name() == "help" || cmd.Hidden {
			return
		}
		if cmd.Short == "" || cmd.GroupID == "" && cmd.Parent() == cmd.Root() {
			t.Errorf("%s has no short help or no group", cmd.Name())
		}
		lines := strings.Split(cmd.Example, "\n")
		for _, l := range lines {
			if !strings.HasPrefix(l, "  ") || !strings.Contains(l, "remuda") {
				t.Errorf("%s: the example %q", cmd.Name(), l)
			}
		}
		under := strings.TrimPrefix(cmd.Parent().CommandPath()+" ", "remuda ")
		for _, name := range append(cmd.Aliases, cmd.Name()) {
			name = under + name
			if seen[name] != "" {
				t.Errorf("%s is a name of both %s and %s", name, seen[name], cmd.Name())
			}
			seen[name] = cmd.Name()
		}
	})
	for _, name := range strings.Fields("start stop restart reload delete del scale list ls ps l status jlist prettylist describe desc info show env pid logs flush reloadLogs sendSignal send trigger reset ping kill save dump resurrect startup unstartup up down events upgrade update doctor completion version init schema") {
		if seen[name] == "" {
			t.Errorf("there is no command %s", name)
		}
	}
}

func TestHelpGolden(t *testing.T) {
	var names []string
	tree((&cli{}).root(), func(cmd *cobra.Command) { names = append(names, strings.TrimPrefix(cmd.CommandPath(), "remuda ")) })
	slices.Sort(names)
	var b strings.Builder
	b.WriteString(remuda(t, "/nonexistent", "--help").out)
	for _, name := range slices.Compact(names) {
		if name == "help" {
			continue
		}
		o := remuda(t, "/nonexistent", append(strings.Fields(name), "--help")...)
		o.want(t, 0, "Examples:", "")
		fmt.Fprintf(&b, "\n=== %s\n%s", name, o.out)
	}
	golden(t, "help.golden", b.String())
}

func golden(t *testing.T, name, got string) {
	t.Helper()
	path := filepath.Join("testdata", name)
	if *update {
		if err := os.MkdirAll("testdata", 0o755); err != nil {
			t.Fatal(err)
		}
		if err := os.WriteFile(path, []byte(got), 0o644); err != nil {
			t.Fatal(err)
		}
	}
	want, err := os.ReadFile(path)
	if err != nil {
		t.Fatal(err)
	}
	if got == string(want) {
		return
	}
	g, w := strings.Split(got, "\n"), strings.Split(string(want), "\n")
	for k := range max(len(g), len(w)) {
		if k >= len(g) || k >= len(w) || g[k] != w[k] {
			t.Fatalf("%s differs from line %d on (go test -update writes it anew):\ngot  %q\nwant %q", path, k+1, strings.Join(g[k:min(k+3, len(g))], "\n"), strings.Join(w[k:min(k+3, len(w))], "\n"))
		}
	}
}

func TestUsageErrors(t *testing.T) {
	home := newFake(t, instance(0, "web", 0, client.Online)).home
	for _, tc := range []struct {
		args string
		want string
	}{
		{"lst", "did you mean `remuda list`?"},
		{"starrt app.js -n web", "did you mean `remuda start`?"},
		{"frobnicate", "unknown command \"frobnicate\""},
		{"help lst", "did you mean `remuda list`?"},
		{"--jsn list", "did you mean --json?"},
		{"monit", "watch remuda list"},
		{"ecosystem", "remuda init"},
		{"restart web --watch", "--watch is a flag of `remuda start`"},
		{"list --jsn", "did you mean --json?"},
		{"start app.js --max-memory-restar 3", "did you mean --max-memory-restart?"},
		{"stop -z web", "unknown flag -z"},
		{"stop", "needs an argument"},
		{"scale web", "needs 2 arguments"},
		{"scale web many", "\"many\" is not a number of instances"},
		{"scale web 99999999999999999999", "is not a number of instances"},
		{"ping pong", "takes no argument"},
		{"list --sort pod", "did you mean pid?"},
		{"list --sort pid:up", "asc or desc"},
		{"list --timeout soon", "--timeout"},
		{"list --timeout -3s", "must not be negative"},
		{"logs --since yesteryear", "is no time"},
		{"logs -f --nostream", "exclude each other"},
		{"logs --lines x", "--lines"},
		{"completion tcsh", "no completion for the shell"},
		{"startup upstart", "none of the init systems"},
		{"up a.yaml -f b.yaml", "named twice"},
		{"--home", "--home"},
	} {
		o := remuda(t, home, strings.Fields(tc.args)...)
		o.want(t, ExitUsage, "", tc.want)
		if !strings.HasPrefix(o.err, "remuda: ") || strings.Contains(o.err, "Usage:") {
			t.Errorf("%s: stderr %q", tc.args, o.err)
		}
	}
	remuda(t, home, "stop", "").want(t, ExitUsage, "", "empty argument")
}

func TestExitCodes(t *testing.T) {
	f := newFake(t, instance(0, "web", 0, client.Online))
	remuda(t, f.home, "ping").want(t, 0, "pong\n", "")
	remuda(t, f.home, "list").want(t, 0, "web", "")
	remuda(t, f.home, "describe", "nosuch").want(t, ExitNoTarget, "", "remuda: no app, id or namespace is called \"nosuch\"")
	remuda(t, f.home, "stop", "nosuch").want(t, ExitNoTarget, "", "`remuda list`")
	remuda(t, f.home, "logs", "nosuch").want(t, ExitNoTarget, "", "nosuch")
	remuda(t, f.home, "stop", "web").want(t, 0, "[web:0] online", "")
	remuda(t, f.home, "delete", "web", "-s").want(t, 0, "", "")

	none := filepath.Join(newHome(t), "none")
	remuda(t, none, "list").want(t, 0, "id  name", "no daemon is running in "+none)
	if o := remuda(t, none, "list", "--json"); o.out != "[]\n" {
		t.Errorf("list --json without a daemon prints %q", o.out)
	}
	if o := remuda(t, none, "jlist"); o.out != "[]\n" || o.code != 0 {
		t.Errorf("jlist without a daemon prints %q", o.out)
	}
	for _, args := range []string{"ping", "describe web", "logs", "logs --nostream", "events", "events -f", "env 0", "pid", "upgrade", "list web"} {
		remuda(t, none, strings.Fields(args)...).want(t, ExitUnreachable, "", "no daemon is running")
	}
	remuda(t, none, "kill").want(t, 0, "", "no daemon is running")
	remuda(t, none, "version").want(t, 0, "remuda 1.2.3", "")
	if _, err := os.Stat(none); err == nil {
		t.Error("commands that only look have made the home folder")
	}
	lost := newHome(t)
	if err := os.WriteFile(filepath.Join(lost, "state.json"), []byte(`{"version":1,"apps":[{},{}]}`), 0o600); err != nil {
		t.Fatal(err)
	}
	remuda(t, lost, "list").want(t, 0, "id  name", "its list holds 2 apps: `remuda start all`")
	// A daemon that does not start: its words and exit code 1.
	o := remuda(t, none, "stop", "web")
	o.want(t, ExitFailed, "", "this keeper refuses to run")
	remuda(t, f.home, "--version").want(t, 0, "remuda 1.2.3", "")
}

func TestTimeout(t *testing.T) {
	f := newFake(t, instance(0, "web", 0, client.Online))
	f.on("/v1/act", func(_ http.ResponseWriter, r *http.Request) { <-r.Context().Done() })
	remuda(t, f.home, "restart", "web", "--timeout", "50ms").want(t, ExitTimedOut, "", "timed out after 50ms")
}

func TestInterrupt(t *testing.T) {
	f := newFake(t, instance(0, "web", 0, client.Online))
	interrupt := func(w http.ResponseWriter, r *http.Request) {
		w.(http.Flusher).Flush()
		if err := syscall.Kill(os.Getpid(), syscall.SIGINT); err != nil {
			t.Error(err)
		}
		<-r.Context().Done()
	}
	f.on("/v1/act", interrupt)
	f.on("/v1/logs", interrupt)
	f.on("/v1/events", interrupt)
	remuda(t, f.home, "restart", "web").want(t, ExitInterrupted, "", "remuda: interrupted\n")
	for _, args := range [][]string{{"logs"}, {"events", "-f"}} {
		o := remuda(t, f.home, args...)
		o.want(t, 0, "", "")
		if o.err != "" {
			t.Errorf("%s, interrupted, says %q", args, o.err)
		}
	}
}

func TestBadInput(t *testing.T) {
	f := newFake(t, instance(0, "web", 0, client.Online))
	long := strings.Repeat("n", 10_000)
	for _, target := range []string{long, "a/b/../../etc", "evil\x1b[2J\x07name", "\xff\xfe", "new\nline", "ünï", "a&target=all", "%00"} {
		o := remuda(t, f.home, "stop", target)
		if o.code != ExitNoTarget {
			t.Errorf("stop %.20q: exit code %d: %.200s", target, o.code, o.err)
		}
		if strings.ContainsAny(o.err, "\x1b\x07") || !utf8.ValidString(o.err) || len(o.err) > 5000 {
			t.Errorf("stop %.20q says %d bytes: %.200q", target, len(o.err), o.err)
		}
	}
	for _, cmd := range []string{"describe", "env", "pid", "logs", "restart", "reload", "delete", "reset", "flush", "list", "jlist"} {
		o := remuda(t, f.home, cmd, "bad\x1b]0;title\x07")
		if o.code != ExitNoTarget || strings.ContainsAny(o.out+o.err, "\x1b\x07") {
			t.Errorf("%s: exit code %d, %q", cmd, o.code, o.err)
		}
	}
	o := remuda(t, f.home, long)
	o.want(t, ExitUsage, "", "unknown command")
	if len(o.err) > 500 {
		t.Errorf("an unknown command of 10,000 characters fills %d bytes", len(o.err))
	}
	o = remuda(t, f.home, "list", "--"+long)
	if o.code != ExitUsage || len(o.err) > 500 {
		t.Errorf("an unknown flag of 10,000 characters fills %d bytes, exit code %d", len(o.err), o.code)
	}
}

func TestOtherVersion(t *testing.T) {
	f := newFake(t)
	f.on("/v1/instances", func(w http.ResponseWriter, _ *http.Request) {
		problem(w, http.StatusNotAcceptable, "the command speaks version 1 of the API and the daemon version 9: run `remuda upgrade`")
	})
	remuda(t, f.home, "list").want(t, ExitFailed, "", "version 9: run `remuda upgrade`")
	f.on("/v1/instances", func(w http.ResponseWriter, _ *http.Request) { fmt.Fprint(w, `{"instances": 7}`) })
	remuda(t, f.home, "list").want(t, ExitFailed, "", "of another version")
	f.on("/v1/instances", func(w http.ResponseWriter, _ *http.Request) { fmt.Fprint(w, "\x00<html>") })
	remuda(t, f.home, "list").want(t, ExitFailed, "", "cannot be read")
	f.info.Version, f.info.API = "9.9.9", 9
	remuda(t, f.home, "version").want(t, 0, "daemon 9.9.9", "another version")
	remuda(t, f.home, "doctor").want(t, ExitFailed, "speaks version 9", "")
}

func hangUp(t *testing.T, w http.ResponseWriter) {
	t.Helper()
	conn, _, err := w.(http.Hijacker).Hijack()
	if err != nil {
		t.Error(err)
		return
	}
	conn.Close()
}

func TestHangUp(t *testing.T) {
	f := newFake(t, instance(0, "web", 0, client.Online))
	for _, path := range []string{"/v1/act", "/v1/instances"} {
		f.on(path, func(w http.ResponseWriter, _ *http.Request) { hangUp(t, w) })
	}
	remuda(t, f.home, "restart", "web").want(t, ExitFailed, "", "the daemon hung up")
	remuda(t, f.home, "list").want(t, ExitFailed, "", "the daemon hung up")
	f.on("/v1/instances", nil)
	f.on("/v1/logs", func(w http.ResponseWriter, _ *http.Request) {
		fmt.Fprintln(w, `{"value":{"id":0,"app":"web","stream":"out","text":"whole"}}`)
		fmt.Fprint(w, `{"value":{"id":0,"app":"web","stream":"out","te`)
		w.(http.Flusher).Flush()
		hangUp(t, w)
	})
	o := remuda(t, f.home, "logs", "--nostream")
	o.want(t, ExitFailed, "0|web | whole\n", "the daemon hung up")
}

func TestRefusedNamesDoNotLaunch(t *testing.T) {
	// A script that is not there is found out before a daemon is launched.
	home := filepath.Join(newHome(t), "none")
	o := remuda(t, home, "start", "./nosuch.js")
	if o.code != ExitFailed || strings.Contains(o.err, "keeper") {
		t.Errorf("exit code %d, stderr %q", o.code, o.err)
	}
	if _, err := os.Stat(home); err == nil {
		t.Error("the home folder was made")
	}
}

func TestStart(t *testing.T) {
	f := newFake(t, instance(3, "web", 0, client.Stopped))
	dir := t.TempDir()
	script := filepath.Join(dir, "job.sh")
	if err := os.WriteFile(script, []byte("#!/bin/sh\nexit 3\n"), 0o755); err != nil {
		t.Fatal(err)
	}
	bad := instance(4, "job", 0, client.Errored)
	bad.LastExit = &client.Exit{Code: 3}
	bad.LastErr = []string{"line \x1b[31mone", "two"}
	good := instance(5, "job", 1, client.Online)
	f.result = client.ActResult{Instances: []client.Outcome{{Instance: bad, Error: "it died within 1s"}, {Instance: good}}, Warnings: []string{"mind the gap"}}
	o := remudaWith(t, context.Background(), Options{Cwd: dir, Environ: []string{"REMUDA_HOME=" + f.home, "PATH=/bin:/usr/bin", "COLOUR=red"},
		Args: []string{"start", "job.sh", "--name", "job", "-i", "2", "--watch", "--stop-exit-codes", "1,2", "-k", "2000", "--", "--port", "80"}})
	o.want(t, ExitFailed, "[job:1] online (pid 1005)\n", "[job:0] errored: it died within 1s; last run: exit code 3\n  | line \\x1b[31mone\n  | two\n")
	o.want(t, ExitFailed, "id  name", "remuda: warning: mind the gap")
	reqs := f.seen("/v1/start")
	if len(reqs) != 1 {
		t.Fatalf("%d start requests", len(reqs))
	}
	var req client.StartRequest
	if err := json.Unmarshal([]byte(reqs[0].body), &req); err != nil || len(req.Apps) != 1 {
		t.Fatalf("%v: %s", err, reqs[0].body)
	}
	app := req.Apps[0]
	if app.Name != "job" || app.Instances != 2 || app.Cwd != dir || app.Watch == nil || len(app.Restart.StopExitCodes) != 2 ||
		time.Duration(app.Stop.Grace) != 2*time.Second || !slices.Equal(app.Command[len(app.Command)-2:], []string{"--port", "80"}) {
		t.Errorf("the app is %+v", app)
	}

	// A name of the list is started again, with the shell's variables if asked.
	f.result = client.ActResult{}
	o = remudaWith(t, context.Background(), Options{Args: []string{"start", "web", "--update-env", "--json"}, Environ: []string{"REMUDA_HOME=" + f.home, "COLOUR=red", "_=x"}})
	o.want(t, 0, `"app":"web"`, "")
	act := f.seen("/v1/act")
	if len(act) != 1 || !strings.Contains(act[0].body, `"verb":"start","targets":["web"]`) || !strings.Contains(act[0].body, `"COLOUR":"red"`) || strings.Contains(act[0].body, `"_"`) {
		t.Errorf("%+v", act)
	}
	remuda(t, f.home, "start", "77").want(t, ExitNoTarget, "", "77")
	remuda(t, f.home, "start", "/^x/").want(t, ExitNoTarget, "", "^x")
	if o := remuda(t, f.home, "start", "nosuchprogram"); o.code != ExitFailed {
		t.Errorf("exit code %d: %s", o.code, o.err)
	}
}

// TestStartDoesNotSurprise: what start is given but cannot carry out is said,
// and no app takes another's place by accident.
func TestStartDoesNotSurprise(t *testing.T) {
	f := newFake(t, instance(3, "web", 0, client.Stopped), instance(4, "npm run dev", 0, client.Stopped), instance(5, "server", 0, client.Online))
	there := client.Detail{Instance: f.instances[2]}
	there.Spec = client.AppSpec{Name: "server", Script: "/srv/a/server.sh", Cwd: "/srv/a"}
	f.details = []client.Detail{there}
	dir := t.TempDir()
	if err := os.WriteFile(filepath.Join(dir, "server.sh"), nil, 0o755); err != nil {
		t.Fatal(err)
	}
	run := func(args ...string) outcome {
		t.Helper()
		return remudaWith(t, context.Background(), Options{Cwd: dir, Args: args, Environ: []string{"REMUDA_HOME=" + f.home, "PATH=/bin:/usr/bin", "PORT=3000"}})
	}
	started := func() config.App {
		t.Helper()
		reqs := f.seen("/v1/start")
		if len(reqs) == 0 {
			return config.App{}
		}
		var req client.StartRequest
		if err := json.Unmarshal([]byte(reqs[len(reqs)-1].body), &req); err != nil || len(req.Apps) != 1 {
			t.Fatalf("%v: %s", err, reqs[0].body)
		}
		return req.Apps[0]
	}

	run("start", "nosuch.config.js").want(t, ExitFailed, "", "the process file nosuch.config.js does not exist")
	run("start", "web", "-i", "4").want(t, 0, "", "--instances is for scripts and was not applied to web")
	run("start", "npm run dev").want(t, 0, "[npm run dev:0]", "")
	if n := len(f.seen("/v1/start")); n != 0 {
		t.Errorf("names with blanks: %d new apps", n)
	}
	run("start", "npm run dev", "--name", "dev").want(t, 0, "", "")
	if a := started(); a.Name != "dev" {
		t.Errorf("started %+v", a)
	}

	run("start", "server.sh").want(t, ExitFailed, "", "an app named server is in the list already and runs /srv/a/server.sh\n--name NAME")
	run("start", "server.sh", "--name", "server").want(t, 0, "", "")
	run("start", "server.sh", "-f").want(t, 0, "", "")
	there.Spec.Script = filepath.Join(dir, "server.sh")
	f.details = []client.Detail{there}
	run("start", "server.sh").want(t, 0, "", "")

	run("start", "sleep", "--name", "s", "-i", "2", "--instance-var", "N", "--increment-var", "PORT", "-u", "nobody", "--", "5").want(t, 0, "", "")
	if a := started(); a.InstanceVar != "N" || a.IncrementVar != "PORT" || a.User != "nobody" {
		t.Errorf("started %+v", a)
	}
	run("start", "sleep", "--name", "s", "--increment-var", "NOSUCH", "--", "5").want(t, ExitFailed, "", "env has no number under \"NOSUCH\"")
}

func TestCompat(t *testing.T) {
	f := newFake(t, instance(3, "web", 0, client.Online), instance(4, "web", 1, client.Online))
	if o := remuda(t, f.home, "id", "web"); o.out != "[ 3, 4 ]\n" || o.code != 0 {
		t.Errorf("%+v", o)
	}
	remuda(t, f.home, "id", "nosuch").want(t, 0, "[]\n", "")
	dir := t.TempDir()
	if err := os.WriteFile(filepath.Join(dir, "ecosystem.config.json"), []byte(`{"apps":[{"name":"web","script":"sleep 100","env_x":{"A":"b"}}]}`), 0o600); err != nil {
		t.Fatal(err)
	}
	for _, verb := range []string{"startOrRestart", "startOrReload", "startOrGracefulReload"} {
		o := remudaWith(t, context.Background(), Options{Cwd: dir, Args: []string{verb, "ecosystem.config.json", "--env", "x"}, Environ: []string{"REMUDA_HOME=" + f.home, "PATH=/bin:/usr/bin"}})
		o.want(t, 0, "id  name", "")
	}
	if reqs := f.seen("/v1/start"); len(reqs) != 3 || !strings.Contains(reqs[2].body, `"A":"b"`) {
		t.Errorf("%+v", reqs)
	}
	remuda(t, f.home, "startOrRestart", "web").want(t, ExitFailed, "", "web is not a process file that is there")
}

const procfile = "web: sleep 100\nworker: sleep 200\n"

func TestFilesAsTargets(t *testing.T) {
	f := newFake(t, instance(0, "web", 0, client.Online), instance(1, "worker", 0, client.Online))
	dir := t.TempDir()
	path := filepath.Join(dir, "Procfile")
	if err := os.WriteFile(path, []byte(procfile), 0o644); err != nil {
		t.Fatal(err)
	}
	run := func(args ...string) outcome {
		return remudaWith(t, context.Background(), Options{Cwd: dir, Args: args, Environ: []string{"REMUDA_HOME=" + f.home, "PATH=/bin:/usr/bin"}})
	}
	run("stop", "Procfile").want(t, 0, "[worker:0]", "")
	if r := f.seen("/v1/act"); len(r) != 1 || !strings.Contains(r[0].body, `"targets":["web","worker"]`) {
		t.Errorf("%+v", r)
	}
	f.result = client.ActResult{Instances: []client.Outcome{}}
	f.changes = []client.Change{{App: "web", Action: "add"}, {App: "api", Action: "change", Fields: []string{"env.PORT: 80 → 81"}}, {App: "old", Action: "remove"}, {App: "a", Action: "none"}, {App: "b", Action: "none"}}
	o := run("up", "--dry-run")
	if want := "+ add web (1 instance)\n~ change api: env.PORT: 80 → 81\n- remove old\n= 2 unchanged\n"; o.out != want || o.code != 0 {
		t.Errorf("up --dry-run prints %q, exit code %d, %s", o.out, o.code, o.err)
	}
	if r := f.seen("/v1/up"); len(r) != 1 || !strings.Contains(r[0].body, `"dry_run":true`) || !strings.Contains(r[0].body, `"source":"`+path+`"`) {
		t.Errorf("%+v", r)
	}
	run("up").want(t, 0, "= 2 unchanged\nid  name", "")
	if r := f.seen("/v1/up"); len(r) != 3 || strings.Contains(r[2].body, "dry_run") {
		t.Errorf("%+v", r)
	}
	run("down").want(t, 0, "id  name", "nothing runs of "+path)
	if r := f.seen("/v1/down"); len(r) != 1 || !strings.Contains(r[0].body, path) {
		t.Errorf("%+v", r)
	}
	// Without a daemon a dry run does not launch one.
	none := filepath.Join(newHome(t), "none")
	remudaWith(t, context.Background(), Options{Cwd: dir, Args: []string{"up", "--dry-run", "--home", none}, Environ: []string{"PATH=/bin:/usr/bin"}}).
		want(t, 0, "+ add worker (1 instance)", "no daemon is running")
	remuda(t, none, "up").want(t, ExitFailed, "", "`remuda init`")
}

func TestScaleAndSignal(t *testing.T) {
	f := newFake(t, instance(0, "web", 0, client.Online))
	for _, args := range [][]string{{"scale", "web", "-1"}, {"scale", "web", "-1", "--json"}, {"--json", "scale", "web", "+2"}, {"scale", "web", "max"}} {
		remuda(t, f.home, args...).want(t, 0, "", "")
	}
	var to []string
	for _, r := range f.seen("/v1/scale") {
		var s client.ScaleRequest
		if err := json.Unmarshal([]byte(r.body), &s); err != nil {
			t.Fatal(err)
		}
		to = append(to, s.App+" "+s.To)
	}
	if fmt.Sprint(to) != "[web -1 web -1 web +2 web max]" {
		t.Errorf("%q", to)
	}
	remuda(t, f.home, "sendSignal", "usr2", "web").want(t, 0, "[web:0] sent SIGUSR2", "")
	if r := f.seen("/v1/signal"); !strings.Contains(r[0].body, `"signal":"SIGUSR2"`) {
		t.Errorf("%+v", r)
	}
}

func TestSendAndTrigger(t *testing.T) {
	f := newFake(t, instance(0, "web", 0, client.Online))
	for _, c := range []struct {
		args []string
		want client.MessageRequest
	}{
		{[]string{"send", "web", "hello there"}, client.MessageRequest{Message: json.RawMessage(`"hello there"`)}},
		{[]string{"send", "web", `{"a":1}`}, client.MessageRequest{Message: json.RawMessage(`{"a":1}`)}},
		{[]string{"send", "web", "--text", "null"}, client.MessageRequest{Message: json.RawMessage(`"null"`)}},
		{[]string{"trigger", "web", "act"}, client.MessageRequest{Message: json.RawMessage(`"act"`), Reply: "act", WaitMS: 5000}},
		{[]string{"trigger", "web", "act", "7", "--wait", "1s"}, client.MessageRequest{Message: json.RawMessage(`{"msg":"act","opts":7}`), Reply: "act", WaitMS: 1000}},
	} {
		remuda(t, f.home, c.args...).want(t, 0, "[web:0] message sent", "")
		seen := f.seen("/v1/message")
		c.want.Targets = []client.Target{"web"}
		want, err := json.Marshal(c.want)
		if err != nil {
			t.Fatal(err)
		}
		if got := strings.TrimSpace(seen[len(seen)-1].body); got != string(want) {
			t.Errorf("%q asks for %s, want %s", c.args, got, want)
		}
	}
	out := client.Outcome{Instance: instance(0, "web", 0, client.Online), Reply: json.RawMessage(`{"a":"x"}`)}
	bad := client.Outcome{Instance: instance(1, "web", 1, client.Online), Error: "did not reply within 5s"}
	f.result = client.ActResult{Instances: []client.Outcome{out, bad}}
	remuda(t, f.home, "trigger", "web", "act").want(t, ExitFailed, `[web:0] {"a":"x"}`, "[web:1] did not reply within 5s")
	remuda(t, f.home, "trigger", "web", "act", "--json").want(t, ExitFailed, `"reply":{"a":"x"}`, "")
	remuda(t, f.home, "trigger", "web", "act", "--wait", "0s").want(t, ExitUsage, "", "--wait is to be from 1ms to 10m0s")
}

func TestCompletion(t *testing.T) {
	blue := instance(1, "worker", 0, client.Online)
	blue.Namespace = "blue"
	f := newFake(t, instance(0, "web", 0, client.Online), blue)
	o := remuda(t, f.home, "__complete", "stop", "w")
	o.want(t, 0, "web\tapp\nworker\tapp\n", "")
	remuda(t, f.home, "__complete", "describe", "b").want(t, 0, "blue\tnamespace\n", "")
	remuda(t, f.home, "__complete", "describe", "1").want(t, 0, "1\tworker:0\n", "")
	remuda(t, f.home, "__complete", "sta").want(t, 0, "start\t", "")
	remuda(t, "/nonexistent", "__complete", "stop", "").want(t, 0, ":", "")
	for _, sh := range []string{"bash", "zsh", "fish", "powershell"} {
		remuda(t, f.home, "completion", sh).want(t, 0, "remuda", "")
	}
}

func TestDaemonCommands(t *testing.T) {
	f := newFake(t, instance(0, "web", 0, client.Online))
	remuda(t, f.home, "save").want(t, 0, "Wrote 1 app to "+f.home, "")
	remuda(t, f.home, "save", "--json").want(t, 0, `"apps":1`, "")
	remuda(t, f.home, "resurrect").want(t, 0, "id  name", "")
	remuda(t, f.home, "flush").want(t, 0, "[web:0] logs emptied", "")
	remuda(t, f.home, "reloadLogs").want(t, 0, "[web:0] logs opened anew", "")
	remuda(t, f.home, "reset", "all").want(t, 0, "[web:0] counters reset", "")
	remuda(t, f.home, "pid", "web").want(t, 0, "1000\n", "")
	remuda(t, f.home, "pid", "--json").want(t, 0, "[1000]\n", "")
	remuda(t, f.home, "version").want(t, 0, "daemon 1.2.3", "")
	remuda(t, f.home, "upgrade", "--binary", "/nonexistent/x").want(t, ExitFailed, "", "no such file")
	text := filepath.Join(t.TempDir(), "text")
	if err := os.WriteFile(text, nil, 0o600); err != nil {
		t.Fatal(err)
	}
	remuda(t, f.home, "upgrade", "--binary", text).want(t, ExitFailed, "", "not an executable file")
	for script, want := range map[string]string{
		"#!/bin/sh\necho no >&2; exit 3\n": "version` failed: exit status 3: no\nThe daemon was left as it is.",
		"#!/bin/sh\necho hello\n":          "is not Remuda",
		"\x7fELF":                          "exec format error",
	} {
		path := filepath.Join(t.TempDir(), "program")
		if err := os.WriteFile(path, []byte(script), 0o700); err != nil {
			t.Fatal(err)
		}
		remuda(t, f.home, "upgrade", "--binary", path).want(t, ExitFailed, "", want)
	}
	if reqs := f.seen("/v1/upgrade"); len(reqs) != 0 {
		t.Errorf("what is not Remuda was put in the place of the daemon: %+v", reqs)
	}
	for _, r := range f.seen("/v1/act") {
		if strings.Contains(r.body, "flush") && !strings.Contains(r.body, `["all"]`) {
			t.Errorf("flush asks for %s", r.body)
		}
	}
}

func TestInitAndSchema(t *testing.T) {
	dir := t.TempDir()
	run := func(args ...string) outcome {
		return remudaWith(t, context.Background(), Options{Cwd: dir, Args: args})
	}
	run("init").want(t, 0, "Wrote remuda.yaml", "")
	run("init").want(t, ExitFailed, "", "is there already\n--force")
	run("init", "--force").want(t, 0, "Wrote", "")
	run("init", "no/such/dir.yaml").want(t, ExitFailed, "", "cannot write the file")
	// What it writes is right, with each comment taken for what it shows too.
	b, err := os.ReadFile(filepath.Join(dir, "remuda.yaml"))
	if err != nil {
		t.Fatal(err)
	}
	shown := ""
	for line := range strings.Lines(string(b)) {
		if rest, is := strings.CutPrefix(line, "    # "); is && !strings.HasPrefix(rest, "What") {
			line = "    " + rest
		}
		shown += line
	}
	for _, text := range []string{string(b), shown + "  db: sleep 1\n"} {
		file, warnings, err := config.Parse(t.Context(), "remuda.yaml", []byte(text), config.LoadOptions{Cwd: dir, NoCheck: true})
		if err != nil || len(warnings) > 0 || file.Apps[0].Name == "" {
			t.Errorf("%v, %v\n%s", err, warnings, text)
		}
	}
	o := run("schema")
	o.want(t, 0, `"$schema"`, "")
	if !json.Valid([]byte(o.out)) {
		t.Error("the schema is no JSON")
	}
}

type fullDisk struct{}

func (fullDisk) Write([]byte) (int, error) { return 0, syscall.ENOSPC }

// TestOutputThatCannotBeWritten is no success.
func TestOutputThatCannotBeWritten(t *testing.T) {
	f := newFake(t, instance(0, "web", 0, client.Online))
	for _, args := range []string{"list", "jlist", "--help", "version", "stop web"} {
		var said strings.Builder
		code := Main(t.Context(), Options{Args: strings.Fields(args), Environ: []string{"REMUDA_HOME=" + f.home}, Stdout: fullDisk{}, Stderr: &said, Version: "1.2.3"})
		if code != ExitFailed || !strings.Contains(said.String(), "no space left on device") {
			t.Errorf("%s: exit code %d: %s", args, code, said.String())
		}
	}
}
