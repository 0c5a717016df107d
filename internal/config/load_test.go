package config

import (
	"encoding/json"
	"errors"
	"flag"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"testing"

	"github.com/santhosh-tekuri/jsonschema/v6"
)

var update = flag.Bool("update", false, "rewrite golden files and the published schema")

// circumstances is an environment that is the same on every machine: a PATH
// with stubs, so that what is installed does not show.
func circumstances(t *testing.T) LoadOptions {
	t.Helper()
	bin := t.TempDir()
	for _, name := range []string{"node", "python3", "bash", "sh", "sleep", "ruby"} {
		if err := os.WriteFile(filepath.Join(bin, name), []byte("#!/bin/sh\nexit 0\n"), 0o755); err != nil {
			t.Fatal(err)
		}
	}
	node, err := exec.LookPath("node")
	if err != nil {
		t.Fatalf("the tests need node: %v", err)
	}
	return LoadOptions{Environ: []string{"PATH=" + bin, "HOME=/home/me", "AWS_KEY=a", "MY_SECRET=b", "LANG=C"}, NodePath: node}
}

func TestGolden(t *testing.T) {
	files, err := filepath.Glob("testdata/*/*")
	if err != nil {
		t.Fatal(err)
	}
	broken := []string{"names.json", "throws.config.js", "syntax.config.js"}
	seen := 0
	for _, file := range files {
		if !IsFile(file) || slices.Contains(broken, filepath.Base(file)) || strings.Contains(file, "golden") {
			continue
		}
		seen++
		for _, nodePath := range []string{"", "none"} {
			if nodePath != "" && !isJS(file) {
				continue
			}
			t.Run(strings.TrimPrefix(file, "testdata/")+nodePath, func(t *testing.T) {
				if !*update {
					t.Parallel()
				}
				opts := circumstances(t)
				opts.Env = "production"
				if nodePath != "" {
					opts.NodePath = nodePath
				}
				f, warnings, err := Load(t.Context(), file, opts)
				if err != nil {
					t.Fatal(err)
				}
				for i := range f.Apps {
					// These depend on the machine.
					if n := f.Apps[i].Name; n == "api" || n == "web" && f.Format == FormatPM2 {
						f.Apps[i].Instances = 999
					}
					if err := Validate(f.Apps[i]); err != nil {
						t.Error(err)
					}
				}
				out, err := json.MarshalIndent(map[string]any{"file": f, "warnings": warnings}, "", " ")
				if err != nil {
					t.Fatal(err)
				}
				wd, err := os.Getwd()
				if err != nil {
					t.Fatal(err)
				}
				path := strings.TrimPrefix(opts.Environ[0], "PATH=")
				got := strings.NewReplacer(wd, "WD", path, "BIN").Replace(string(out)) + "\n"
				golden := "testdata/golden/" + strings.ReplaceAll(strings.TrimPrefix(file, "testdata/"), "/", "-") + ".golden"
				if *update && nodePath == "" {
					if err := os.WriteFile(golden, []byte(got), 0o644); err != nil {
						t.Fatal(err)
					}
				}
				want, err := os.ReadFile(golden)
				if err != nil {
					t.Fatal(err)
				}
				if got != string(want) {
					t.Errorf("differs from %s:\n%s", golden, firstDifference(got, string(want)))
				}
			})
		}
	}
	if seen < 12 {
		t.Errorf("only %d shapes of files", seen)
	}
}

func firstDifference(got, want string) string {
	g, w := strings.Split(got, "\n"), strings.Split(want, "\n")
	for i := range min(len(g), len(w)) {
		if g[i] != w[i] {
			return "got  " + g[i] + "\nwant " + w[i]
		}
	}
	return "one is longer"
}

// TestMistakes: every mistake is told with its place, the key, and what to do.
func TestMistakes(t *testing.T) {
	for _, c := range []struct{ name, file, body, want string }{
		{"unknown key", "remuda.yaml", "apps:\n  web:\n    run: sleep 1\n    insances: 2\n", `remuda.yaml:4:5: unknown key "insances" in app "web": did you mean "instances"?`},
		{"unknown top key", "remuda.yaml", "aps: {}\napps: {a: sleep 1}\n", `remuda.yaml:1:1: unknown key "aps" at the top of the file: did you mean "apps"?`},
		{"nested key", "remuda.yaml", "apps:\n  a: {run: sleep 1, restart: {backoff: {initail: 1s}}}\n", `remuda.yaml:2:41: unknown key "initail" in app "a": restart.backoff: did you mean "initial"?`},
		{"wrong type", "remuda.yaml", "apps:\n  a: {run: sleep 1, autostart: perhaps}\n", `remuda.yaml:2:32: app "a": autostart: "perhaps" where true or false should be`},
		{"range", "remuda.yaml", "apps:\n  a: {run: sleep 1, instances: 20000}\n", `20000 instances are too many: the most is 10000`},
		{"duration", "remuda.yaml", "apps:\n  a: {run: sleep 1, stop: {grace: soon}}\n", `"soon" is not a duration: write 500ms, 1.5s, 2m, 1h or a number of milliseconds`},
		{"size", "remuda.yaml", "apps:\n  a: {run: sleep 1, logs: {max_size: big}}\n", `"big" is not a size`},
		{"policy", "remuda.yaml", "apps:\n  a:\n    run: sleep 1\n    restart: allways\n", `remuda.yaml:4:14: app "a": restart.policy: "allways" is not known: did you mean "always"?`},
		{"shell", "remuda.yaml", "apps:\n  a: sleep 1 && ls\n", `remuda.yaml:2:6: app "a": run: & means something to a shell only; put quotes around it if it is meant as it stands, or set shell: true`},
		{"assignment", "remuda.yaml", "apps:\n  a: PORT=1 sleep 1\n", `set shell: true`},
		{"quote", "remuda.yaml", "apps:\n  a: sleep '1\n", `a single quote has no partner`},
		{"no run", "remuda.yaml", "apps:\n  a: {cwd: .}\n", `app "a" has no run`},
		{"duplicate", "remuda.yaml", "apps:\n  a: sleep 1\n  a: sleep 2\n", `remuda.yaml:3`},
		{"unset", "remuda.yaml", "apps:\n  a: {run: sleep 1, env: {X: \"${NOPE}\"}}\n", `remuda.yaml:2:30: variable NOPE is not set; set it, or write ${NOPE:-default}`},
		{"message", "remuda.yaml", "apps:\n  a: {run: sleep 1, env: {X: \"${NOPE:?set me}\"}}\n", `variable NOPE is not set: set me`},
		{"cycle", "remuda.yaml", "apps:\n  a: {run: sleep 1, depends_on: b}\n  b: {run: sleep 1, depends_on: [c]}\n  c: {run: sleep 1, depends_on: {a: started}}\n", `circle: a → b → c → a`},
		{"unknown dependency", "remuda.yaml", "apps:\n  web: {run: sleep 1, depends_on: {dbb: ready}}\n  db: sleep 1\n", `remuda.yaml:2:41: app "web" depends on "dbb", which does not exist: did you mean "db"?`},
		{"condition", "remuda.yaml", "apps:\n  a: {run: sleep 1, depends_on: {b: redy}}\n  b: sleep 1\n", `did you mean "ready"?`},
		{"group", "remuda.yaml", "apps: {a: sleep 1}\ngroups: {g: {apps: [b]}}\n", `group "g": there is no app "b"`},
		{"group cycle", "remuda.yaml", "apps: {a: sleep 1}\ngroups: {g: {apps: [a], parent: h}, h: {parent: g}}\n", `circle: g → h → g`},
		{"cron", "remuda.yaml", "apps:\n  a: {run: sleep 1, restart: {cron: \"61 * * * *\"}}\n", `"61 * * * *" is no cron schedule`},
		{"signal", "remuda.yaml", "apps:\n  a: {run: sleep 1, stop: {signal: SIGNOPE}}\n", `"SIGNOPE" is no signal`},
		{"cluster", "remuda.yaml", "apps:\n  a: {run: python3 x.py, exec_mode: cluster}\n", `remuda.yaml:2:37: app "a": exec_mode: cluster is Node's and needs a command that begins with node, not "python3"; any other program shares a port by sockets: [0.0.0.0:8080]`},
		{"cluster of bun", "remuda.yaml", "apps:\n  a: {run: bun x.ts, exec_mode: cluster}\n", `not "bun"`},
		{"sticky", "remuda.yaml", "apps:\n  a: {run: sleep 1, sticky: true}\n", `sticky: is for Node programs in exec_mode: cluster`},
		{"sockets in a cluster", "remuda.yaml", "apps:\n  a: {run: node x.js, exec_mode: cluster, sockets: [8080]}\n", `a Node program in cluster mode shares its ports without`},
		{"socket", "remuda.yaml", "apps:\n  a: {run: sleep 1, sockets: [\"example.org:80\"]}\n", `"example.org:80" is no address to listen at; write 0.0.0.0:8080`},
		{"socket without a port", "remuda.yaml", "apps:\n  a: {run: sleep 1, sockets: [{listen: \"0.0.0.0:0\"}]}\n", `is no address to listen at`},
		{"socket without listen", "remuda.yaml", "apps:\n  a: {run: sleep 1, sockets: [{name: web}]}\n", `sockets[0] has no listen`},
		{"socket twice", "remuda.yaml", "apps:\n  a: {run: sleep 1, sockets: [8080, \":8080\"]}\n", `"[::]:8080" is there twice`},
		{"name of a socket", "remuda.yaml", "apps:\n  a: {run: sleep 1, sockets: [{name: \"a:b\", listen: 80}]}\n", `no colon`},
		{"mode of a port", "remuda.yaml", "apps:\n  a: {run: sleep 1, sockets: [{mode: \"0660\", listen: 80}]}\n", `is no Unix socket and has no mode`},
		{"key of a socket", "remuda.yaml", "apps:\n  a: {run: sleep 1, sockets: [{lisen: 80}]}\n", `did you mean "listen"?`},
		{"reuseport of a path", "remuda.yaml", "apps:\n  a: {run: sleep 1, sockets: {listen: /run/x, reuseport: true}}\n", `there is no reuseport for Unix sockets`},
		{"address in a flow", "remuda.yaml", "apps:\n  a: {run: sleep 1, sockets: [127.0.0.1:99999, localhost:80]}\n", `"127.0.0.1:99999" is no address to listen at`},
		{"regexp", "remuda.yaml", "apps:\n  a: {run: sleep 1, ready: {log: \"(\"}}\n", `no regular expression`},
		{"port", "remuda.yaml", "apps:\n  a: {run: sleep 1, ready: {tcp: 70000}}\n", `a port from 1 to 65535`},
		{"two probes", "remuda.yaml", "apps:\n  a: {run: sleep 1, ready: {tcp: 1, ipc: true}}\n", `ready has ipc and tcp; keep one`},
		{"numeric name", "remuda.yaml", "apps:\n  12: sleep 1\n", `"12" is a number, which would be taken for an id`},
		{"slash name", "remuda.yaml", "apps:\n  a/b: sleep 1\n", `"a/b" has a / in it; write "a-b"`},
		{"all", "remuda.yaml", "apps:\n  all: sleep 1\n", `"all" is taken`},
		{"long name", "remuda.yaml", "apps:\n  ? " + strings.Repeat("a", 10000) + "\n  : sleep 1\n", `10000 bytes long; the most is 200`},
		{"no program", "remuda.yaml", "apps:\n  a: ./missing\n", `program DIR/missing does not exist`},
		{"no folder", "remuda.yaml", "apps:\n  a: {run: sleep 1, cwd: nowhere}\n", `cwd: folder DIR/nowhere does not exist`},
		{"empty", "remuda.yaml", "", `the file has no apps`},
		{"pm2 list", "remuda.yaml", "apps: [{script: a}]\n", `name the file ecosystem.config.yaml`},
		{"yaml syntax", "remuda.yaml", "apps:\n  a: [sleep\n", `not valid YAML`},
		{"alias", "remuda.yaml", "apps: *x\n", `refers to no anchor`},
		{"bomb", "remuda.yaml", bomb(), `more than 200000 values`},
		{"deep", "remuda.yaml", strings.Repeat("[", 100000), `nested more than 64 levels deep`},
		{"dashes", "remuda.yaml", strings.Repeat("- ", 100000) + "a", `nested more than 64 levels deep`},
		{"utf8", "remuda.yaml", "a:\n  \xff", `remuda.yaml:2: the file is not UTF-8 text`},
		{"env file", "remuda.yaml", "env_file: none.env\napps: {a: sleep 1}\n", `env_file: DIR/none.env does not exist`},
		{"null", "remuda.yaml", "apps:\n  a:\n    run: sleep 1\n    cwd:\n", `cwd has no value; write one or remove the key`},
		{"pm2 no script", "ecosystem.config.json", `{"apps": [{"name": "x"}]}`, `app "x" has no script`},
		{"pm2 missing", "ecosystem.config.json", `{"apps": [{"script": "gone.js"}]}`, `ecosystem.config.json:1:22: app "gone": script: "gone.js" does not exist`},
		{"pm2 type", "ecosystem.config.json", `{"apps": [{"script": "sleep", "autorestart": "no"}]}`, `autorestart: "no" where true or false should be`},
		{"pm2 memory", "ecosystem.config.json", `{"apps": [{"script": "sleep", "max_memory_restart": "lots"}]}`, `"lots" where a size such as 300M should be`},
		{"pm2 twice", "ecosystem.config.json", `[{"script": "sleep", "name": "a"}, {"script": "sleep", "name": "a"}]`, `two apps are named "a" (the 1st and the 2nd); rename one`},
		{"pm2 interpreter", "ecosystem.config.json", `{"script": "sleep", "interpreter": "fortran"}`, `interpreter "fortran" is not in PATH`},
		{"pm2 empty", "ecosystem.config.json", `{"apps": []}`, `the list of apps is empty`},
		{"json comma", "ecosystem.config.json", "{\n  \"apps\": [\n  {\"a\": 1 \"b\": 2}]}", `ecosystem.config.json:3:11: not valid JSON: '"' where a comma or } should be`},
		{"json duplicate", "ecosystem.config.json", `{"apps": [{"script": "a", "script": "b"}]}`, `key "script" is there twice`},
		{"json word", "ecosystem.config.json", `{"script": app}`, `"app" is not a value; put strings in quotes`},
		{"procfile", "Procfile", "web sleep 1\n", `Procfile:1:1: "web sleep 1" is not NAME: COMMAND`},
		{"procfile twice", "Procfile", "a: sleep 1\na: sleep 2\n", `Procfile:2:1: a is there twice, the first time at line 1`},
		{"procfile empty", "Procfile", "# nothing\n", `the file has no apps`},
	} {
		t.Run(c.name, func(t *testing.T) {
			t.Parallel()
			dir := t.TempDir()
			path := filepath.Join(dir, c.file)
			if err := os.WriteFile(path, []byte(c.body), 0o644); err != nil {
				t.Fatal(err)
			}
			opts := circumstances(t)
			opts.Cwd = dir
			_, _, err := Load(t.Context(), path, opts)
			if err == nil {
				t.Fatal("no error")
			}
			if got := strings.ReplaceAll(err.Error(), dir, "DIR"); !strings.Contains(got, c.want) {
				t.Errorf("got  %s\nwant %s", got, c.want)
			}
			var e *Error
			if !errors.As(err, &e) {
				t.Errorf("not an *Error: %T", err)
			}
		})
	}
}

func bomb() string {
	var b strings.Builder
	b.WriteString("a0: &a0 [x,x,x,x,x,x,x,x,x,x]\n")
	for i := 1; i < 10; i++ {
		s := "a" + string(rune('0'+i))
		ref := "*a" + string(rune('0'+i-1))
		b.WriteString(s + ": &" + s + " [" + strings.Repeat(ref+",", 9) + ref + "]\n")
	}
	return b.String()
}

// TestAllAtOnce: one run tells every mistake, up to a bound.
func TestAllAtOnce(t *testing.T) {
	_, _, err := Parse(t.Context(), "remuda.yaml", []byte("apps:\n  a: {run: sleep 1, foo: 1, bar: 2}\n  b: {run: sleep 1, watch: {paths: .}, stop: 9x}\n  c: 3\n"), circumstances(t))
	var e *Error
	if !errors.As(err, &e) || len(e.Problems) != 4 {
		t.Errorf("%v", err)
	}
	_, _, err = Parse(t.Context(), "remuda.yaml", []byte("apps:\n"+strings.Repeat("  a: {x: 1, y: 2}\n", 1)+"  b:\n    run: sleep 1\n"+func() string {
		var b strings.Builder
		for i := range 50 {
			b.WriteString("    k" + strings.Repeat("z", i+20) + ": 1\n")
		}
		return b.String()
	}()), circumstances(t))
	if !errors.As(err, &e) || len(e.Problems) != maxProblems+1 || !strings.Contains(err.Error(), "more problems") {
		t.Errorf("%v", err)
	}
}

func TestJSErrors(t *testing.T) {
	for file, want := range map[string]string{
		"throws.config.js": "throws.config.js:3:26: ReferenceError: missing is not defined",
		"syntax.config.js": "syntax.config.js:3",
	} {
		for _, node := range []string{"", "none"} {
			opts := circumstances(t)
			if node != "" {
				opts.NodePath = node
			}
			_, _, err := Load(t.Context(), "testdata/pm2/"+file, opts)
			if err == nil || !strings.Contains(err.Error(), want) || strings.Contains(err.Error(), "\n") {
				t.Errorf("%s by %q: %v", file, node, err)
			}
		}
	}
	dir := t.TempDir()
	for name, c := range map[string]struct{ body, want string }{
		"exit.config.js":  {"process.exit(3)", "node ended"},
		"none.config.js":  {"", "has no script"},
		"noexp.config.js": {"module.exports = undefined", "the file has no apps"},
		"text.config.js":  {"module.exports = 'x'", "the file holds a string"},
		"fd.config.js":    {"require('child_process').spawn('sleep', ['30'], {detached: true, stdio: 'inherit'}).unref(); module.exports = {script: 'nope'}", `"nope" does not exist`},
	} {
		path := filepath.Join(dir, name)
		if err := os.WriteFile(path, []byte(c.body), 0o644); err != nil {
			t.Fatal(err)
		}
		opts := circumstances(t)
		opts.Environ[0] = "PATH=" + os.Getenv("PATH")
		if _, _, err := Load(t.Context(), path, opts); err == nil || !strings.Contains(err.Error(), c.want) {
			t.Errorf("%s: %v", name, err)
		}
	}
}

func TestOnlyAndEnv(t *testing.T) {
	opts := circumstances(t)
	opts.Only = []string{"one,two"}
	f, _, err := Load(t.Context(), "testdata/pm2/computed.config.js", opts)
	if err != nil || len(f.Apps) != 2 {
		t.Fatalf("%v %v", f, err)
	}
	opts.Only = []string{"too"}
	if _, _, err := Load(t.Context(), "testdata/pm2/computed.config.js", opts); err == nil || !strings.Contains(err.Error(), `there is no app "too" in the file: did you mean "two"?`) {
		t.Errorf("%v", err)
	}
	opts.Only, opts.Env = nil, "nosuch"
	if _, w, err := Load(t.Context(), "testdata/pm2/plain.json", opts); err != nil || len(w) != 1 || !strings.Contains(w[0].Text, "no app has env_nosuch") {
		t.Errorf("%v %v", w, err)
	}
	opts.NoCheck = true
	if _, _, err := Parse(t.Context(), "", []byte(`{"script": "gone.js"}`), opts); err != nil {
		t.Errorf("NoCheck: %v", err)
	}
}

func TestFind(t *testing.T) {
	dir := t.TempDir()
	if _, err := Find(dir); !errors.Is(err, ErrNotFound) {
		t.Errorf("%v", err)
	}
	for _, name := range []string{"Procfile", "pm2.config.js", "ecosystem.config.cjs", "ecosystem.config.js", "remuda.yml", "remuda.yaml"} {
		if err := os.WriteFile(filepath.Join(dir, name), nil, 0o644); err != nil {
			t.Fatal(err)
		}
		if got, err := Find(dir); err != nil || filepath.Base(got) != name {
			t.Errorf("with %s: %s %v", name, got, err)
		}
	}
	if _, _, err := Load(t.Context(), dir+"/nope.yaml", LoadOptions{}); !errors.Is(err, ErrNotFound) {
		t.Errorf("%v", err)
	}
	for name, want := range map[string]bool{"app.js": false, "x.config.js": true, "a.json": true, "./dir/remuda.yaml": true, "Procfile": true, "web": false, "app.py": false} {
		if IsFile(name) != want {
			t.Errorf("IsFile(%s) = %v", name, !want)
		}
	}
}

func TestSchemaIsCurrent(t *testing.T) {
	got, err := Schema()
	if err != nil {
		t.Fatal(err)
	}
	const path = "../../schema/remuda.schema.json"
	if *update {
		if err := os.MkdirAll(filepath.Dir(path), 0o755); err != nil {
			t.Fatal(err)
		}
		if err := os.WriteFile(path, got, 0o644); err != nil {
			t.Fatal(err)
		}
	}
	want, err := os.ReadFile(path)
	if err != nil {
		t.Fatal(err)
	}
	if string(got) != string(want) {
		t.Fatalf("%s is not current; run go test ./internal/config -update", path)
	}
	doc, err := jsonschema.UnmarshalJSON(strings.NewReader(string(got)))
	if err != nil {
		t.Fatal(err)
	}
	c := jsonschema.NewCompiler()
	if err := c.AddResource("remuda.json", doc); err != nil {
		t.Fatal(err)
	}
	sch, err := c.Compile("remuda.json")
	if err != nil {
		t.Fatal(err)
	}
	data, err := os.ReadFile("testdata/remuda/remuda.yaml")
	if err != nil {
		t.Fatal(err)
	}
	for body, valid := range map[string]bool{
		string(data):            true,
		"apps: {a: sleep 1}":    true,
		"apps: {a: [sleep, 1]}": true,
		"apps: {a: {run: x, restart: {backoff: false}, ready: ipc, watch: true, stop: SIGINT, instances: max}}": true,
		"apps: {a: {run: x, sockets: 80}}": true,
		"apps: {a: {run: x, sockets: [80, \"udp://:53\", {listen: /run/x, mode: \"0660\"}, {listen: 80}]}}": true,
		"apps: {a: {run: x, sockets: [{lisen: 80}]}}":                                                       false,
		"apps: {a: {run: x, insances: 1}}":                                                                  false,
		"apps: {a: {run: x, restart: allways}}":                                                             false,
		"apps: {a: {cwd: x}}":                                                                               false,
		"foo: 1\napps: {}":                                                                                  false,
		"apps: {a: {run: x, env_production: {A: 1}, env_file: [a, {path: b, required: false}]}}":            true,
		"namespace: a":       false,
		"pools: {a: worker}": true,
		"pools: {a: {run: x, min: 1, max: max, breaker: true, cache: {ttl: 1m}, logs: {out: none}, timeout: 3s}}": true,
		"pools: {a: {run: x, breaker: {rate: 50%}}}":                                                              true,
		"pools: {a: {run: x, balance: fair}}":                                                                     false,
		"pools: {a: {size: 2}}":                                                                                   false,
	} {
		n, err := parseYAML("x", []byte(body))
		if err != nil {
			t.Fatal(err)
		}
		b, err := json.Marshal(plain(n))
		if err != nil {
			t.Fatal(err)
		}
		v, err := jsonschema.UnmarshalJSON(strings.NewReader(string(b)))
		if err != nil {
			t.Fatal(err)
		}
		if err := sch.Validate(v); (err == nil) != valid {
			t.Errorf("%s: %v", body, err)
		}
	}
}
