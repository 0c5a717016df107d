package config

import (
	"context"
	"encoding/json"
	"errors"
	"math"
	"os"
	"path/filepath"
	"runtime"
	"slices"
	"strings"
	"testing"
	"time"

	"go.uber.org/goleak"
	"pgregory.net/rapid"
)

func TestMain(m *testing.M) { goleak.VerifyTestMain(m) }

func TestSplit(t *testing.T) {
	for in, want := range map[string][]string{
		"":                      nil,
		"  a  b\tc ":            {"a", "b", "c"},
		`a 'b c' "d e"f g\ h`:   {"a", "b c", "d ef", "g h"},
		`'' ""`:                 {"", ""},
		`"a\"b\\c\n"`:           {`a"b\c\n`},
		`'a"b\c'`:               {`a"b\c`},
		"node --x=a#b ~":        nil,
		"a \\\n b":              {"a", "b"},
		"http://x/?a=b [c] {d}": {"http://x/?a=b", "[c]", "{d}"},
		`'|' "*" \& "a$"`:       {"|", "*", "&", "a$"},
	} {
		got, err := Split(in)
		if in == "node --x=a#b ~" {
			if !errors.Is(err, ErrShell) {
				t.Errorf("%q: %v", in, err)
			}
			continue
		}
		if err != nil || !slices.Equal(got, want) {
			t.Errorf("%q: %q %v", in, got, err)
		}
	}
	for _, in := range []string{"a | b", "a > b", "$HOME", "a `b`", "a*", `"$HOME"`, "a\nb", "# x", "~/x"} {
		if _, err := Split(in); !errors.Is(err, ErrShell) {
			t.Errorf("%q: %v", in, err)
		}
	}
	for _, in := range []string{"'a", `"a`, `a\`, "a\x00"} {
		if _, err := Split(in); err == nil || errors.Is(err, ErrShell) {
			t.Errorf("%q: %v", in, err)
		}
	}
}

func TestSplitJoinRoundTrip(t *testing.T) {
	rapid.Check(t, func(t *rapid.T) {
		words := rapid.SliceOf(rapid.StringMatching(`[^\x00]*`)).Draw(t, "words")
		got, err := Split(Join(words))
		if err != nil || len(got)+len(words) > 0 && !slices.Equal(got, words) {
			t.Fatalf("%q → %s → %q %v", words, Join(words), got, err)
		}
		loose, err := splitLoose(Join(words))
		if err != nil || !slices.Equal(loose, got) {
			t.Fatalf("loose: %q %v", loose, err)
		}
	})
}

func TestDurationRoundTrip(t *testing.T) {
	rapid.Check(t, func(t *rapid.T) {
		d := Duration(rapid.Int64().Draw(t, "d"))
		b, err := json.Marshal(d)
		if err != nil {
			t.Fatal(err)
		}
		var got Duration
		if err := json.Unmarshal(b, &got); err != nil || got != d {
			t.Fatalf("%s: %v %v", b, got, err)
		}
	})
	for in, want := range map[string]time.Duration{
		`1500`: 1500 * time.Millisecond, `"1.5s"`: 1500 * time.Millisecond, `"2m"`: 2 * time.Minute, `0`: 0, `"0"`: 0, `"1d"`: 24 * time.Hour, `"250"`: 250 * time.Millisecond, `0.5`: 500 * time.Microsecond,
	} {
		var d Duration
		if err := json.Unmarshal([]byte(in), &d); err != nil || d.Std() != want {
			t.Errorf("%s: %v %v", in, d, err)
		}
	}
	for _, in := range []string{`"x"`, `true`, `[]`, `"1e400"`, `"NaN"`, `9e30`, `"99999999999999999999d"`, `""`} {
		var d Duration
		if err := json.Unmarshal([]byte(in), &d); err == nil {
			t.Errorf("%s: %v", in, d)
		}
	}
}

func TestSizeRoundTrip(t *testing.T) {
	rapid.Check(t, func(t *rapid.T) {
		n := rapid.Int64().Draw(t, "n")
		if got, err := ParseSize(FormatSize(n)); err != nil || got != n {
			t.Fatalf("%d → %s → %d %v", n, FormatSize(n), got, err)
		}
	})
	for in, want := range map[string]int64{"300M": 300 << 20, "1.5GB": 3 << 29, "10MiB": 10 << 20, "64k": 64 << 10, "1024": 1024, "1G": 1 << 30, "5 MB": 5 << 20, "7b": 7} {
		if got, err := ParseSize(in); err != nil || got != want {
			t.Errorf("%s: %d %v", in, got, err)
		}
	}
	for _, in := range []string{"", "M", "1X", "1ii", "1bb", "99999999P", "1e3M", "0x10", "99999999999999999999", "NaN", "1kk"} {
		if got, err := ParseSize(in); err == nil {
			t.Errorf("%s: %d", in, got)
		}
	}
}

func TestResolveSurge(t *testing.T) {
	for in, want := range map[string]int{"0": 0, "1": 1, "3": 3, "0%": 0, "1%": 1, "25%": 1, "26%": 2, "100%": 4} {
		if got, err := ResolveSurge(in, 4); err != nil || got != want {
			t.Errorf("%q of 4: %d, %v, want %d", in, got, err, want)
		}
	}
	for _, in := range []string{"", "%", "-1", "+1", "1.5", "101%", "half", "1 %", "99999999999999999999"} {
		if n, err := ResolveSurge(in, 4); err == nil {
			t.Errorf("%q of 4: %d", in, n)
		}
	}
}

func TestResolveInstances(t *testing.T) {
	n := runtime.NumCPU()
	for in, want := range map[string]int{"4": 4, "max": n, "MAX": n, "0": n, "-1": max(1, n-1), "-100000": 1, "3.0": 3} {
		if got, err := ResolveInstances(in); err != nil || got != want {
			t.Errorf("%s: %d %v", in, got, err)
		}
	}
	for _, in := range []string{"", "x", "10001", "1.5", "99999999999999999999"} {
		if got, err := ResolveInstances(in); err == nil {
			t.Errorf("%q: %d", in, got)
		}
	}
}

func TestMomentLayout(t *testing.T) {
	at := time.Date(2026, 3, 4, 15, 6, 7, 89_000_000, time.FixedZone("", 3600))
	for in, want := range map[string]string{
		"YYYY-MM-DD HH:mm:ss.SSS Z": "2026-03-04 15:06:07.089 +01:00",
		"YYYY-MM-DDTHH:mm:ss":       "2026-03-04T15:06:07",
		"DD/MM/YY hh:mm A [at]":     "04/03/26 03:06 PM at",
		"ddd MMM D":                 "Wed Mar 4",
		"ZZ":                        "+0100",
	} {
		layout, bad := momentLayout(in)
		if got := at.Format(layout); got != want || bad != nil {
			t.Errorf("%s: %s %v", in, got, bad)
		}
	}
	if _, bad := momentLayout("X HH:mm:ssSSS Do"); len(bad) != 3 {
		t.Errorf("%v", bad)
	}
}

func TestInterpolate(t *testing.T) {
	vars := map[string]string{"A": "x", "E": ""}
	lookup := func(n string) (string, bool) { v, ok := vars[n]; return v, ok }
	for in, want := range map[string]string{
		"a": "a", "${A}": "x", "-${A}-${A}": "-x-x", "$A": "$A", "$$": "$", "$${A}": "${A}", "${E}": "", "${E:-d}": "d", "${E-d}": "", "${N:-}": "", "${N-d:e}": "d:e", "a$": "a$", "${A:-d}": "x", "${A:?m}": "x",
	} {
		if got, err := Interpolate(in, lookup); err != nil || got != want {
			t.Errorf("%s: %q %v", in, got, err)
		}
	}
	for _, in := range []string{"${N}", "${", "${}", "${1}", "${A B}", "${E:?why}", "${N?}", "${A:x}"} {
		if got, err := Interpolate(in, lookup); err == nil {
			t.Errorf("%s: %q", in, got)
		}
	}
}

// TestInterpolatedTypes: a variable may stand where a number or boolean is
// wanted.
func TestInterpolatedTypes(t *testing.T) {
	opts := circumstances(t)
	opts.Environ = append(opts.Environ, "N=3", "YES=true", "CMD=sleep 5")
	f, _, err := Parse(t.Context(), "remuda.yaml", []byte("apps: {a: {run: '${CMD}', instances: '${N}', autostart: '${YES}', env: {P: '${N}', E: '${NO:-}', Q: '${NO:-}'}, logs: {keep: '${N}'}}}"), opts)
	if err != nil {
		t.Fatal(err)
	}
	a := f.Apps[0]
	if a.Instances != 3 || !a.Autostart || a.Env["P"] != "3" || a.Env["Q"] != "" || a.Logs.Keep != 3 || !slices.Equal(a.Command, []string{"sleep", "5"}) {
		t.Errorf("%+v", a)
	}
}

func TestFromCommand(t *testing.T) {
	opts := circumstances(t)
	dir := t.TempDir()
	for name, mode := range map[string]os.FileMode{"app.js": 0o644, "job.py": 0o644, "tool": 0o755, "data.txt": 0o644, "x.ts": 0o644} {
		if err := os.WriteFile(filepath.Join(dir, name), []byte("x"), mode); err != nil {
			t.Fatal(err)
		}
	}
	start := func(c CommandLine) (App, []Warning, error) {
		c.Environ, c.CallerCwd = opts.Environ, dir
		return FromCommand(c)
	}
	a, w, err := start(CommandLine{
		Script: "app.js", Args: []string{"--a", "b c"}, Name: "web", Instances: "max", NodeArgs: "--inspect --x='1 2'",
		MaxMemoryRestart: "100M", KillTimeout: "500", WatchDelay: "4", Watch: []string{}, IgnoreWatch: []string{"logs"}, StopExitCodes: []string{"0,3"},
		Output: "o.log", Time: true, WaitReady: true, NoAutorestart: true, Env: []string{"A=b"}, FilterEnv: []string{"AWS"}, CronRestart: "@every 1h",
	})
	if err != nil || w != nil {
		t.Fatalf("%v %v", w, err)
	}
	if want := []string{"node", "--inspect", "--x=1 2", dir + "/app.js", "--a", "b c"}; !slices.Equal(a.Command, want) {
		t.Errorf("%q", a.Command)
	}
	if a.Name != "web" || a.ExecMode != "cluster" || a.Instances != runtime.NumCPU() || a.Restart.MaxMemory != 100<<20 ||
		a.Stop.Grace.Std() != 500*time.Millisecond || a.Watch == nil || a.Watch.Paths[0] != dir || a.Watch.Debounce.Std() != 4*time.Second ||
		!slices.Equal(a.Restart.StopExitCodes, []int{0, 3}) || a.Logs.Out != dir+"/o.log" || a.Logs.TimeFormat != pm2TimeFormat || a.Ready.Type != "ipc" ||
		a.Restart.Policy != "never" || a.Env["A"] != "b" || a.Env["AWS_KEY"] != "" || !slices.Equal(a.EnvKeys, []string{"A"}) || a.InheritEnv || a.Restart.Cron != "@every 1h" || a.Source != "" {
		t.Errorf("%+v", a)
	}
	if a, _, err = start(CommandLine{Script: "job.py"}); err != nil || a.Command[0] != "python3" || a.Name != "job" || a.Env["PYTHONUNBUFFERED"] != "1" || !a.Logs.Merge {
		t.Errorf("%+v %v", a, err)
	}
	if a, _, err = start(CommandLine{Script: "./tool"}); err != nil || !slices.Equal(a.Command, []string{dir + "/tool"}) || a.Interpreter != "none" {
		t.Errorf("%+v %v", a, err)
	}
	if a, _, err = start(CommandLine{Script: "sleep", Args: []string{"5"}}); err != nil || filepath.Base(a.Command[0]) != "sleep" || a.Name != "sleep" {
		t.Errorf("%+v %v", a, err)
	}
	if a, _, err = start(CommandLine{Script: "echo a/b && sleep 1"}); err != nil || !slices.Equal(a.Command, []string{"bash", "-c", "echo a/b && sleep 1"}) || a.Name != "echo a-b && sleep 1" {
		t.Errorf("%+v %v", a, err)
	}
	if _, w, err = start(CommandLine{Script: "x.ts"}); err != nil || len(w) != 1 || !strings.Contains(w[0].Text, "TypeScript") {
		t.Errorf("%v %v", w, err)
	}
	for want, c := range map[string]CommandLine{
		"no program to start":            {},
		`"gone" does not exist, neither`: {Script: "gone"},
		"is not executable":              {Script: "data.txt"},
		"is a folder":                    {Script: "."},
		"is a number":                    {Script: "tool", Name: "7"},
		`"x" is no number of instances`:  {Script: "tool", Instances: "x"},
		"is no cron schedule":            {Script: "tool", CronRestart: "often"},
		"is not in PATH":                 {Script: "app.js", Interpreter: "deno"},
		"does not exist":                 {Script: "tool", Cwd: "nowhere"},
		"has no =":                       {Script: "tool", Env: []string{"A"}},
		"is no exit code":                {Script: "tool", StopExitCodes: []string{"256"}},
	} {
		if _, _, err := start(c); err == nil || !strings.Contains(err.Error(), want) {
			t.Errorf("%s: %v", want, err)
		}
	}
}

func TestDiff(t *testing.T) {
	opts := circumstances(t)
	f, _, err := Load(t.Context(), "testdata/remuda/remuda.yaml", opts)
	if err != nil {
		t.Fatal(err)
	}
	old := f.Apps[0]
	g, _, err := Load(t.Context(), "testdata/remuda/remuda.yaml", opts)
	if err != nil {
		t.Fatal(err)
	}
	b := g.Apps[0]
	if d := Diff(old, b); len(d) != 0 {
		t.Errorf("%q", d)
	}
	b.Env["PORT"], b.Env["API_TOKEN"], b.Instances, b.Watch = "81", "s3cret", 3, nil
	b.Restart.BackoffMax = Duration(time.Second)
	delete(b.DependsOn, "db")
	b.Command = []string{"node", "x y"}
	old.Env["DATABASE_URL"], b.Env["DATABASE_URL"] = "pg://u:s3cret@h/d", "pg://u:other@h/d"
	got := Diff(old, b)
	want := []string{
		"command: node server.js --title 'a b' → node 'x y'",
		"env.API_TOKEN: added (value hidden)",
		"env.DATABASE_URL: changed (value hidden)",
		"env.PORT: 3000 → 81",
		"instances: 2 → 3",
		"restart.backoff_max: 15s → 1s",
		"depends_on.db: ready → unset",
		"watch: on → off",
	}
	if !slices.Equal(got, want) {
		t.Errorf("%q", got)
	}
	// The state file and the API pass specs on as JSON.
	js, err := json.Marshal(b)
	if err != nil {
		t.Fatal(err)
	}
	var back App
	if err := json.Unmarshal(js, &back); err != nil {
		t.Fatal(err)
	}
	if d := Diff(b, back); len(d) != 0 {
		t.Errorf("after JSON: %q", d)
	}
}

// TestDiffIgnoresCaller: the same file, from another terminal, is the same.
func TestDiffIgnoresCaller(t *testing.T) {
	opts := circumstances(t)
	load := func(extra ...string) App {
		o := opts
		o.Environ = append(slices.Clone(opts.Environ), extra...)
		f, _, err := Load(t.Context(), "testdata/pm2/plain.json", o)
		if err != nil {
			t.Fatal(err)
		}
		js, err := json.Marshal(f.Apps[0])
		if err != nil {
			t.Fatal(err)
		}
		var a App
		if err := json.Unmarshal(js, &a); err != nil {
			t.Fatal(err)
		}
		return a
	}
	if d := Diff(load("SSH_TTY=/dev/pts/1"), load("SSH_TTY=/dev/pts/2", "MORE=1")); len(d) != 0 {
		t.Errorf("%q", d)
	}
}

func TestSecretName(t *testing.T) {
	for name, want := range map[string]bool{"DB_PASSWORD": true, "GITHUB_TOKEN": true, "AWS_SECRET_ACCESS_KEY": true, "SSH_KEY": true, "api_key": true, "PORT": false, "MONKEY": false, "PWD": false, "AUTHOR": false, "KEYBOARD": false, "COMPASS": false} {
		if SecretName(name) != want {
			t.Errorf("%s: %v", name, !want)
		}
	}
}

func TestValidate(t *testing.T) {
	good := App{
		Name: "a", Namespace: "default", Command: []string{"sleep", "1"}, Cwd: "/", Instances: 1, ExecMode: "fork",
		Restart: defaultRestart(), Stop: Stop{Signal: "SIGTERM"}, Ready: Probe{Type: "none"}, Logs: defaultLogs(),
	}
	if err := Validate(good); err != nil {
		t.Fatal(err)
	}
	for want, change := range map[string]func(a *App){
		"no command":                func(a *App) { a.Command = nil },
		"NUL byte":                  func(a *App) { a.Command = []string{"a\x00"} },
		"not an absolute path":      func(a *App) { a.Cwd = "x" },
		"is not from 1":             func(a *App) { a.Instances = -1 },
		"did you mean \"cluster\"?": func(a *App) { a.ExecMode = "clustre" },
		"is negative":               func(a *App) { a.Stop.Grace = -1 },
		"longer than a year":        func(a *App) { a.Restart.Delay = math.MaxInt64 },
		"cannot be printed":         func(a *App) { a.Name = "a\x1b[31m" },
		"is not UTF-8":              func(a *App) { a.Name = "a\xff" },
		"begins with -":             func(a *App) { a.Name = "-a" },
		"namespace is empty":        func(a *App) { a.Namespace = "" },
		"no valid glob":             func(a *App) { a.Watch = &Watch{Paths: []string{"/"}, Ignore: []string{"[a"}} },
		"is not octal":              func(a *App) { a.Umask = "9" },
		"is no name or number":      func(a *App) { a.User = "a b" },
		"host:port":                 func(a *App) { a.Ready = Probe{Type: "tcp", Address: "x", Interval: 1, Timeout: 1, OnTimeout: "fail"} },
		"is not a URL": func(a *App) {
			a.Ready = Probe{Type: "http", URL: "ftp://x", Interval: 1, Timeout: 1, OnTimeout: "fail"}
		},
		"less than 1K":             func(a *App) { a.Logs.MaxSize = 5 },
		"write none, gzip or zstd": func(a *App) { a.Logs.Compress = "lzma-nine" },
		"depends on itself":        func(a *App) { a.DependsOn = map[string]string{"a": "ready"} },
		"no number under":          func(a *App) { a.IncrementVar = "PORT" },
		"has a = in it":            func(a *App) { a.Env = map[string]string{"A=B": "c"} },
	} {
		a := good
		change(&a)
		if err := Validate(a); err == nil || !strings.Contains(err.Error(), want) || strings.Contains(err.Error(), "\n") {
			t.Errorf("%s: %v", want, err)
		}
	}
	a, b := good, good
	b.Name = "b"
	a.DependsOn = map[string]string{"elsewhere": "ready"}
	if err := ValidateSet([]App{a, b}, nil, func(n string) bool { return n == "elsewhere" }); err != nil {
		t.Error(err)
	}
	b.Strategy = "g"
	if err := ValidateSet([]App{b}, nil, nil); err == nil || !strings.Contains(err.Error(), `group "g", which does not exist`) {
		t.Error(err)
	}
	// A long chain must not be walked by recursion.
	chain := make([]App, 20000)
	for i := range chain {
		chain[i] = good
		chain[i].Name = "n" + strings.Repeat("x", i%7) + FormatSize(int64(i))
		if i > 0 {
			chain[i-1].DependsOn = map[string]string{chain[i].Name: "ready"}
		}
	}
	if err := ValidateSet(chain, nil, nil); err != nil {
		t.Error(err)
	}
}

func TestParseCron(t *testing.T) {
	at := time.Date(2026, 1, 1, 0, 0, 0, 0, time.UTC)
	for spec, want := range map[string]time.Time{
		"0 3 * * *":        at.Add(3 * time.Hour),
		"*/10 * * * * *":   at.Add(10 * time.Second),
		"@every 90s":       at.Add(90 * time.Second),
		"TZ=UTC 0 4 * * *": at.Add(4 * time.Hour),
		"@hourly":          at.Add(time.Hour),
	} {
		s, err := ParseCron(spec)
		if err != nil {
			t.Errorf("%s: %v", spec, err)
			continue
		}
		if got := s.Next(at); !got.Equal(want) {
			t.Errorf("%s: %s", spec, got)
		}
	}
	for _, spec := range []string{"", "TZ=UTC", "x", "* * *", "TZ=Nowhere/X * * * * *", strings.Repeat("*", 5000)} {
		if _, err := ParseCron(spec); err == nil {
			t.Errorf("%q is read", spec)
		}
	}
}

func TestEnvFile(t *testing.T) {
	m, err := parseEnv("f", []byte("# c\nA=1\nexport B='x y'\nC=\"l\\n2\"\n\nD=\n"))
	if err != nil || m["A"] != "1" || m["B"] != "x y" || m["C"] != "l\n2" || len(m) != 4 {
		t.Errorf("%v %v", m, err)
	}
	_, err = parseEnv("f.env", []byte("A=1\nB=2\nthis is s3cret\nC=3\n"))
	if err == nil || !strings.HasPrefix(err.Error(), "f.env:3:") || strings.Contains(err.Error(), "s3cret") {
		t.Errorf("%v", err)
	}
}

// TestGojaBounds: the built-in interpreter ends, whatever a file does.
func TestGojaBounds(t *testing.T) {
	for body, want := range map[string]string{
		"for (;;) {}":              "did not end within",
		"function f() { f() } f()": "call each other without end",
		"'x'.repeat(1e9)":          "too long",
		"var s = 'x', a = []; for (;;) { s += s; if (s.length > 1e7) { a.push(s); s = 'x' + a.length } }": "more than 128 MiB",
		"require('http')":                              `the module "http" needs node`,
		"require('./missing')":                         `cannot find module`,
		"import x from 'y'":                            "import and export need node",
		"throw new Error('no')":                        "Error: no",
		"module.exports = new Promise(function () {})": "not settled",
	} {
		timeout := time.Minute
		if strings.HasPrefix(want, "did not end") {
			timeout = 100 * time.Millisecond
		}
		_, err := runGoja(context.Background(), "/dir/x.config.js", []byte(body), LoadOptions{Cwd: "/"}, timeout)
		if err == nil || !strings.Contains(err.Error(), want) || strings.Contains(err.Error(), "\n") {
			t.Errorf("%s: %v", body, err)
		}
	}
	ctx, cancel := context.WithCancel(t.Context())
	cancel()
	if _, err := runGoja(ctx, "/dir/x.config.js", []byte("for (;;) {}"), LoadOptions{Cwd: "/"}, time.Minute); !errors.Is(err, context.Canceled) {
		t.Errorf("%v", err)
	}
}

func FuzzYAML(f *testing.F) {
	data, err := os.ReadFile("testdata/remuda/remuda.yaml")
	if err != nil {
		f.Fatal(err)
	}
	f.Add(string(data))
	f.Add("apps: [{script: a}]")
	f.Add("a: &a [*a]\n<<: *a\n? x\n: !!str 1\n")
	f.Add(bomb())
	fuzzParse(f, "x.yaml")
}

func FuzzJSON(f *testing.F) {
	for _, name := range []string{"comments.json", "plain.json", "aliases.json"} {
		data, err := os.ReadFile("testdata/pm2/" + name)
		if err != nil {
			f.Fatal(err)
		}
		f.Add(string(data))
	}
	f.Add(`{a: 'b\u00e9\ud83d\ude00\x41', /* c */ "d": +.5,}`)
	fuzzParse(f, "x.json")
}

func FuzzProcfile(f *testing.F) {
	f.Add("web: sleep $PORT\n# x\nb: cd / && ls\n")
	fuzzParse(f, "Procfile")
}

// fuzzParse: whatever is read is an error, or apps that are valid.
func fuzzParse(f *testing.F, name string) {
	dir := f.TempDir()
	opts := LoadOptions{Environ: []string{"PATH=" + dir, "HOME=/h"}, Cwd: dir, NoCheck: true}
	f.Fuzz(func(t *testing.T, s string) {
		file, _, err := Parse(t.Context(), name, []byte(s), opts)
		if err != nil {
			var e *Error
			if !errors.As(err, &e) {
				t.Fatalf("%T %v", err, err)
			}
			for _, p := range e.Problems {
				if strings.Contains(p.Text, "\n") {
					t.Fatalf("more than one line: %q", p.Text)
				}
			}
			return
		}
		for _, a := range file.Apps {
			if err := Validate(a); err != nil {
				t.Fatal(err)
			}
			if d := Diff(a, a); len(d) > 0 {
				t.Fatal(d)
			}
		}
	})
}

func FuzzEnv(f *testing.F) {
	f.Add("A=1\nexport B='x'\nC=\"$A ${B}\"\n")
	f.Fuzz(func(t *testing.T, s string) {
		m, err := parseEnv("f", []byte(s))
		if err != nil && strings.Contains(err.Error(), "\n") {
			t.Fatalf("%q", err)
		}
		for name, val := range m {
			if why := badEnv(name, val); why != "" {
				t.Fatal(why)
			}
		}
	})
}

func FuzzWords(f *testing.F) {
	f.Add(`a 'b c' "d\"e" f\ g`)
	f.Fuzz(func(t *testing.T, s string) {
		words, err := Split(s)
		if err != nil {
			return
		}
		again, err := Split(Join(words))
		if err != nil || !slices.Equal(words, again) {
			t.Fatalf("%q %q %v", words, again, err)
		}
	})
}

func FuzzEcosystemJS(f *testing.F) {
	data, err := os.ReadFile("testdata/pm2/cluster.config.js")
	if err != nil {
		f.Fatal(err)
	}
	f.Add(string(data))
	f.Add("module.exports = [{script: require('path').join(__dirname, 'a')}]")
	f.Fuzz(func(t *testing.T, s string) {
		if len(s) > 4096 {
			return
		}
		out, err := runGoja(t.Context(), "/dir/x.config.js", []byte(s), LoadOptions{Cwd: "/dir", Environ: []string{"A=b"}}, time.Second)
		if err != nil {
			return
		}
		root, err := parseJSON("x", out)
		if err != nil {
			return
		}
		l := &pm2Loader{opts: LoadOptions{Cwd: "/dir", NoCheck: true}, dir: "/dir"}
		for _, a := range l.load(root).Apps {
			if err := Validate(a); err != nil {
				t.Fatal(err)
			}
		}
	})
}
