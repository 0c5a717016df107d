package cli

import (
	"encoding/json"
	"os"
	"os/user"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/remuda-dev/remuda/client"
	"github.com/remuda-dev/remuda/internal/config"
)

func sampleDetail() client.Detail {
	i := instance(7, "web", 1, client.Errored)
	i.Restarts, i.Unstable = 16, 16
	i.LastExit = &client.Exit{Code: -1, Signal: "SIGKILL", At: time.Now(), Cause: "oom"}
	i.Reason = "gave up after 16 restarts"
	i.LastErr = []string{"Error: out of memory"}
	i.OutPath, i.ErrPath = "/h/logs/web-out-7.log", "/h/logs/web-error-7.log"
	return client.Detail{Instance: i, Spec: client.AppSpec{
		Name: "web", Namespace: "default", Command: []string{"/usr/bin/node", "--max-old-space-size=100", "/srv/app.js", "--port", "80 90"},
		Script: "/srv/app.js", Interpreter: "node", Cwd: "/srv", Env: map[string]string{"PORT": "80"}, Instances: 2, ExecMode: "cluster", Autostart: true,
		Restart: config.Restart{Policy: "always", MaxRestarts: 16, MinUptime: config.Duration(time.Second), BackoffInitial: config.Duration(100 * time.Millisecond), BackoffMax: config.Duration(time.Minute), MaxMemory: 300 << 20, Cron: "0 3 * * *"},
		Stop:    config.Stop{Signal: "SIGINT", Grace: config.Duration(1600 * time.Millisecond)},
		Ready:   config.Probe{Type: "http", URL: "http://127.0.0.1/health", Timeout: config.Duration(3 * time.Second)},
		Watch:   &config.Watch{Paths: []string{"/srv"}, Ignore: []string{"node_modules"}},
		Source:  "/srv/remuda.yaml",
	}, Env: map[string]string{"PORT": "80", "API_KEY": "********", "ODD": "it's\n\x1b[31m", "name": "evil"}}
}

func TestDescribe(t *testing.T) {
	f := newFake(t)
	f.details = []client.Detail{sampleDetail()}
	f.instances = []client.Instance{f.details[0].Instance}
	o := remuda(t, f.home, "describe", "web")
	for _, want := range []string{
		"web:1 (id 7)\n", "  reason           gave up after 16 restarts\n", "  last exit        killed by SIGKILL (oom), ",
		"  command          /usr/bin/node --max-old-space-size=100 /srv/app.js --port '80 90'\n",
		"  restart          always, at most 16 unstable runs in a row, backoff 100ms to 1m0s\n",
		"  ready            http http://127.0.0.1/health, within 3s\n", "  stop             SIGINT, SIGKILL after 1.6s\n",
		"  watch            /srv, not node_modules\n", "Last lines of stderr\n  | Error: out of memory\n", "  from             /srv/remuda.yaml\n",
	} {
		if !strings.Contains(o.out, want) {
			t.Errorf("describe does not say %q:\n%s", want, o.out)
		}
	}
	if strings.Contains(o.out, "API_KEY") {
		t.Error("describe shows the environment")
	}
	remuda(t, f.home, "show", "7", "--json").want(t, 0, `"spec":{"name":"web"`, "")
	o = remuda(t, f.home, "env", "7")
	o.want(t, 0, "API_KEY='********'\n", "")
	o.want(t, 0, `ODD=$'it\'s\n\x1b[31m'`, "")
	remuda(t, f.home, "env", "7", "--json", "--secrets").want(t, 0, `"PORT":"80"`, "")
	if r := f.seen("/v1/details"); len(r) != 4 || len(r[2].query["secrets"]) != 0 || r[3].query["secrets"][0] != "true" {
		t.Errorf("%+v", r)
	}
}

func TestJlist(t *testing.T) {
	f := newFake(t)
	f.details = []client.Detail{sampleDetail()}
	o := remuda(t, f.home, "jlist")
	var list []struct {
		PID   *int `json:"pid"`
		Name  string
		ID    int `json:"pm_id"`
		Monit struct {
			Memory int64
			CPU    float64
		}
		Env map[string]any `json:"pm2_env"`
	}
	if err := json.Unmarshal([]byte(o.out), &list); err != nil || len(list) != 1 {
		t.Fatalf("%v: %s", err, o.out)
	}
	p := list[0]
	if p.PID == nil || p.Name != "web" || p.ID != 7 || p.Monit.Memory != 26_000_000 || p.Monit.CPU != 0.5 {
		t.Errorf("%+v", p)
	}
	for key, want := range map[string]any{
		"status": "errored", "restart_time": 16.0, "unstable_restarts": 16.0, "pm_exec_path": "/srv/app.js", "pm_cwd": "/srv",
		"exec_interpreter": "node", "exec_mode": "cluster_mode", "instances": 2.0, "namespace": "default", "autorestart": true,
		"pm_out_log_path": "/h/logs/web-out-7.log", "pm_err_log_path": "/h/logs/web-error-7.log", "merge_logs": false,
		"exit_code": 0.0, "username": "root", "vizion": false, "version": "1.0.0", "PORT": "80", "name": "web", "NODE_APP_INSTANCE": 1.0,
		"pm_id": 7.0, "max_memory_restart": float64(300 << 20), "kill_timeout": 1600.0,
	} {
		if p.Env[key] != want {
			t.Errorf("pm2_env.%s is %v, want %v", key, p.Env[key], want)
		}
	}
	if b, _ := json.Marshal([]any{p.Env["node_args"], p.Env["args"], p.Env["axm_actions"], p.Env["axm_monitor"]}); string(b) != `[["--max-old-space-size=100"],["--port","80 90"],[],{}]` {
		t.Errorf("%s", b)
	}
	for _, key := range []string{"pm_uptime", "created_at"} {
		if ms, _ := p.Env[key].(float64); time.Since(time.UnixMilli(int64(ms))) > 2*time.Hour {
			t.Errorf("%s is %v", key, p.Env[key])
		}
	}
	if s := o.out; strings.Count(s, "\n") != 1 {
		t.Errorf("jlist takes %d lines", strings.Count(s, "\n"))
	}
	remuda(t, f.home, "prettylist").want(t, 0, "\n    \"name\": \"web\"", "")
	for st, want := range map[client.State]string{client.Online: "online", client.Backoff: "waiting restart", client.Starting: "launching", client.Stopped: "stopped", client.Stopping: "stopping", client.Errored: "errored"} {
		if got := pm2Status(st); got != want {
			t.Errorf("%s is %q", st, got)
		}
	}
}

func TestServices(t *testing.T) {
	u := &user.User{Username: "deploy", Uid: "1000", HomeDir: "/home/deploy"}
	var b strings.Builder
	for _, s := range []service{
		{system: initSystemd, user: u, home: "/home/deploy/.remuda", binary: "/usr/local/bin/remuda", path: "/usr/bin:/bin"},
		{system: initSystemd, user: u, perUser: true, home: `/home/deploy/100% "mine"\x $HOME`, binary: "/opt/my $tools/remuda", path: "/usr/bin", running: true},
		{system: initOpenRC, user: u, home: "/home/deploy/it's", binary: "/usr/bin/remuda", path: "/usr/bin"},
	} {
		b.WriteString(planText(s.install("")) + "--- and back\n" + planText(s.uninstall("")) + "=====\n")
	}
	golden(t, "services.golden", b.String())
}

// TestStartup holds on machines with and without an init system that is known:
// a dry run changes nothing on either.
func TestStartup(t *testing.T) {
	home := newHome(t)
	for _, system := range []string{initSystemd, initOpenRC} {
		o := remuda(t, home, "startup", system, "--dry-run")
		o.want(t, 0, "# would write /", "")
		o.want(t, 0, "REMUDA_HOME="+map[string]string{initSystemd: "", initOpenRC: "'"}[system]+home, "")
		remuda(t, home, "unstartup", system, "--dry-run").want(t, 0, "# would remove /", "")
		remuda(t, home, "startup", system, "--dry-run", "--json").want(t, 0, `"write":"/`, "")
	}
	remuda(t, home, "startup", "systemd", "--dry-run", "--hp", "/home/x").want(t, 0, "REMUDA_HOME=/home/x/.remuda", "")
	if os.Geteuid() == 0 {
		remuda(t, home, "startup", "systemd", "--dry-run", "-u", "nosuchuser\x1b").want(t, ExitFailed, "", "nosuchuser")
	} else {
		remuda(t, home, "startup", "systemd", "--dry-run", "-u", "nosuchuser\x1b").want(t, ExitFailed, "", "only root")
	}
	switch initSystem() {
	case "":
		remuda(t, home, "startup").want(t, ExitFailed, "", "`remuda daemon`")
		remuda(t, home, "startup", "systemd").want(t, ExitFailed, "", "does not run this machine")
		remuda(t, home, "unstartup").want(t, ExitFailed, "", "`remuda daemon`")
	case initSystemd:
		remuda(t, home, "startup", "openrc").want(t, ExitFailed, "", "does not run this machine")
	case initOpenRC:
		remuda(t, home, "startup", "systemd").want(t, ExitFailed, "", "does not run this machine")
	}
}

// TestCarryOut runs steps for real, in a folder of the test.
func TestCarryOut(t *testing.T) {
	dir := t.TempDir()
	file := filepath.Join(dir, "a", "b", "unit")
	c := &cli{}
	var errs strings.Builder
	c.Stderr = &errs
	err := c.carryOut(t.Context(), []step{
		{write: file, content: "hello\n", mode: 0o755},
		{run: []string{"sh", "-c", "echo no >&2; exit 3"}, mayFail: true},
		{run: []string{"cp", file, file + "2"}},
	})
	st, serr := os.Stat(file)
	if err != nil || serr != nil || st.Mode().Perm() != 0o755 || !strings.Contains(errs.String(), "exit status 3): no") {
		t.Errorf("%v, %v, %v, %q", err, serr, st, errs.String())
	}
	if err := c.carryOut(t.Context(), []step{{remove: file}, {remove: file}, {run: []string{"test", "-e", file}}}); err == nil {
		t.Error("a failing step is no error")
	}
}

func TestDoctor(t *testing.T) {
	f := newFake(t, instance(0, "web", 0, client.Online))
	if err := os.Chmod(f.home, 0o700); err != nil {
		t.Fatal(err)
	}
	find := func(o outcome, name string) check {
		var list []check
		if err := json.Unmarshal([]byte(o.out), &list); err != nil {
			t.Fatalf("%v: %s", err, o.out)
		}
		for _, k := range list {
			if k.Name == name {
				return k
			}
		}
		t.Errorf("no check of %s in %s", name, o.out)
		return check{}
	}
	o := remuda(t, f.home, "doctor", "--json")
	for _, name := range []string{"socket", "daemon", "state.json", "dump.json", "cgroup"} {
		if k := find(o, name); k.Status != "ok" {
			t.Errorf("%+v", k)
		}
	}
	if k := find(o, "home"); k.Status == "fail" {
		t.Errorf("%+v", k)
	}
	for _, name := range []string{"kernel", "inotify", "open files", "node", "python3", "config"} {
		find(o, name)
	}
	if err := os.WriteFile(filepath.Join(f.home, "state.json"), []byte("{broken"), 0o600); err != nil {
		t.Fatal(err)
	}
	if err := os.Chmod(f.home, 0o755); err != nil {
		t.Fatal(err)
	}
	o = remuda(t, f.home, "doctor", "--json")
	if k := find(o, "state.json"); k.Status != "fail" || k.Fix == "" || o.code != ExitFailed {
		t.Errorf("%+v, exit code %d", k, o.code)
	}
	if k := find(o, "home"); k.Status != "warn" || !strings.HasPrefix(k.Fix, "chmod 700") {
		t.Errorf("%+v", k)
	}
	remuda(t, f.home, "doctor").want(t, ExitFailed, "fail  state.json", "")

	file := filepath.Join(newHome(t), "file")
	if err := os.WriteFile(file, nil, 0o600); err != nil {
		t.Fatal(err)
	}
	remuda(t, file, "doctor").want(t, ExitFailed, "is not a folder", "")
	remuda(t, "/dev/null/home", "doctor").want(t, ExitFailed, "set REMUDA_HOME", "")

	dir := t.TempDir()
	if err := os.WriteFile(filepath.Join(dir, "remuda.yaml"), []byte("apps:\n  web:\n    comand: x\n"), 0o600); err != nil {
		t.Fatal(err)
	}
	o = remudaWith(t, t.Context(), Options{Args: []string{"doctor"}, Cwd: dir, Environ: []string{"REMUDA_HOME=" + newHome(t), "PATH=/bin"}})
	o.want(t, ExitFailed, "remuda.yaml:3", "")
}

func TestText(t *testing.T) {
	for d, want := range map[time.Duration]string{-time.Second: "0s", 42 * time.Second: "42s", 3 * time.Minute: "3m", 47 * time.Hour: "47h", 100 * time.Hour: "4d"} {
		if got := span(d); got != want {
			t.Errorf("span(%s) = %s, want %s", d, got, want)
		}
	}
	for in, want := range map[string]string{"a": "a", "": "''", "a b": "'a b'", "it's": `'it'\''s'`, "x\ny": `$'x\ny'`, "/usr/bin/node": "/usr/bin/node"} {
		if got := quote(in); got != want {
			t.Errorf("quote(%q) = %s, want %s", in, got, want)
		}
	}
	if got := clean(strings.Repeat("ü", 100), 11); got != "üüüüü…" {
		t.Errorf("%q", got)
	}
	if got := clean("a\xffb\x00\n", 0); got != "a\\xffb\\x00\n" {
		t.Errorf("%q", got)
	}
	for in, want := range map[string]string{"starrt": "start", "lst": "list", "xyzzyxyzzy": "", "desc": "describe"} {
		if got := nearest(in, []string{"start", "stop", "list", "describe"}); got != want {
			t.Errorf("nearest(%q) = %q", in, got)
		}
	}
}
