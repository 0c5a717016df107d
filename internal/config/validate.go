package config

import (
	"fmt"
	"maps"
	"net"
	"net/url"
	"path/filepath"
	"regexp"
	"slices"
	"strconv"
	"strings"
	"time"
	"unicode"
	"unicode/utf8"

	"github.com/bmatcuk/doublestar/v4"
)

// fieldProblem is a mistake in a normalized app. path is the field's place in
// remuda.yaml ("restart.cron"), by which a file finds the line.
type fieldProblem struct{ path, text string }

// Validate reports what is wrong with a, as *[Error] without positions. Every
// app that [Load] and [FromCommand] return is valid; it is for apps that come
// over the API.
func Validate(a App) error {
	var p problems
	for _, f := range validate(&a) {
		p.at(0, 0, "app %s: %s", clip(a.Name), f.text)
	}
	return p.err()
}

type validator struct{ list []fieldProblem }

func (v *validator) add(path, format string, args ...any) {
	v.list = append(v.list, fieldProblem{path, fmt.Sprintf(format, args...)})
}

func (v *validator) check(ok bool, path, format string, args ...any) {
	if !ok {
		v.add(path, format, args...)
	}
}

func (v *validator) oneOf(path, s string, words ...string) {
	v.check(slices.Contains(words, s), path, "%s: %s is not known%s", path, clip(s),
		orElse(didYouMean(s, words), "; write "+strings.Join(words[:len(words)-1], ", ")+" or "+words[len(words)-1]))
}

// span bounds durations to what timers and people can do with.
func (v *validator) span(path string, ds ...Duration) {
	for _, d := range ds {
		v.check(d >= 0, path, "%s: %s is negative", path, d)
		v.check(d <= Duration(366*24*time.Hour), path, "%s: %s is longer than a year", path, d)
	}
}

func (v *validator) text(path, s string) {
	v.check(!strings.ContainsRune(s, 0) && utf8.ValidString(s), path, "%s: %s has a NUL byte or is not UTF-8", path, clip(s))
}

func (v *validator) path(path, s string) {
	v.check(filepath.IsAbs(s), path, "%s: %s is not an absolute path", path, clip(s))
	v.check(len(s) < 4096, path, "%s: the path is longer than 4095 bytes", path)
	v.text(path, s)
}

// maxName leaves room in the name of a file, which is 255 bytes at most, for
// what is added to an app's name in those of its logs.
const maxName = 200

// badName says what is wrong with the name of an app, namespace or group, ""
// for nothing.
func badName(s string) string {
	switch {
	case s == "":
		return "is empty"
	case len(s) > maxName:
		return fmt.Sprintf("%s is %d bytes long; the most is %d", clip(s), len(s), maxName)
	case !utf8.ValidString(s):
		return fmt.Sprintf("%s is not UTF-8", clip(s))
	case strings.Contains(s, "/"):
		return fmt.Sprintf("%s has a / in it; write %s", clip(s), clip(strings.Trim(strings.ReplaceAll(strings.TrimPrefix(s, "@"), "/", "-"), "-")))
	case strings.HasPrefix(s, "-"):
		return fmt.Sprintf("%s begins with -, which is for flags", clip(s))
	case isDigits(s):
		return fmt.Sprintf("%s is a number, which would be taken for an id; put a letter to it", clip(s))
	case s == "all", s == ".", s == "..":
		return fmt.Sprintf("%s is taken; choose another name", clip(s))
	case strings.TrimSpace(s) != s:
		return fmt.Sprintf("%s begins or ends with a blank", clip(s))
	case strings.ContainsFunc(s, func(r rune) bool { return !unicode.IsPrint(r) }):
		return fmt.Sprintf("%s has characters in it that cannot be printed", clip(s))
	}
	return ""
}

func validate(a *App) []fieldProblem {
	v := &validator{}
	if why := badName(a.Name); why != "" {
		v.add("name", "name %s", why)
	}
	if why := badName(a.Namespace); why != "" {
		v.add("namespace", "namespace %s", why)
	}
	v.run(a)
	v.env(a)
	v.restart(&a.Restart)
	v.check(knownSignal(a.Stop.Signal), "stop.signal", "stop.signal: %s is no signal; write SIGTERM, SIGINT, SIGQUIT, …", clip(a.Stop.Signal))
	v.span("stop.grace", a.Stop.Grace)
	v.ready(&a.Ready)
	for _, dep := range slices.Sorted(maps.Keys(a.DependsOn)) {
		v.oneOf("depends_on."+dep, a.DependsOn[dep], conditions()...)
		v.check(dep != a.Name, "depends_on", "depends_on: the app depends on itself")
	}
	if a.Strategy != "" {
		if why := badName(a.Strategy); why != "" {
			v.add("group", "group %s", why)
		}
	}
	if w := a.Watch; w != nil {
		v.span("watch.debounce", w.Debounce)
		v.check(len(w.Paths) > 0, "watch.paths", "watch: there are no paths")
		for _, p := range w.Paths {
			v.path("watch.paths", p)
		}
		for _, g := range w.Ignore {
			v.check(doublestar.ValidatePattern(g), "watch.ignore", "watch.ignore: %s is no valid glob", clip(g))
		}
	}
	return append(v.list, validateLogs(&a.Logs)...)
}

func (v *validator) run(a *App) {
	v.check(len(a.Command) > 0 && a.Command[0] != "", "run", "there is no command to run")
	total := 0
	for _, w := range a.Command {
		v.check(!strings.ContainsRune(w, 0), "run", "run: a word of the command has a NUL byte in it")
		v.check(len(w) < 128<<10, "run", "run: a word of the command is longer than 128 KiB, which the kernel refuses")
		total += len(w) + 1
	}
	v.check(total < 2<<20, "run", "run: the command is longer than 2 MiB")
	if len(a.Command) > 0 && strings.Contains(a.Command[0], "/") {
		v.path("run", a.Command[0])
	}
	v.path("cwd", a.Cwd)
	v.check(a.Instances >= 0 && a.Instances <= maxInstances, "instances", "instances: %d is not from 1 to %d", a.Instances, maxInstances)
	v.oneOf("exec_mode", a.ExecMode, "fork", "cluster")
	v.sockets(a)
	if a.MaxSurge != "" {
		_, err := ResolveSurge(a.MaxSurge, 1)
		v.check(err == nil, "max_surge", "%v", err)
	}
	for path, s := range map[string]string{"user": a.User, "group": a.Group} {
		v.check(s == "" || validAccount(s), path, "%s: %s is no name or number of a %s", path, clip(s), path)
	}
	if a.Umask != "" {
		m, err := strconv.ParseUint(a.Umask, 8, 32)
		v.check(err == nil && m <= 0o777, "umask", `umask: %s is not octal digits such as "022"`, clip(a.Umask))
	}
}

// validAccount checks the form only; whether the user exists is a matter of
// the machine and the moment.
func validAccount(s string) bool {
	if isDigits(s) {
		n, err := strconv.ParseUint(s, 10, 32)
		return err == nil && n < 1<<32-1
	}
	return len(s) <= 256 && utf8.ValidString(s) && !strings.HasPrefix(s, "-") &&
		!strings.ContainsFunc(s, func(r rune) bool { return r <= ' ' || r == ':' || r == '/' || r == 0x7f })
}

func (v *validator) env(a *App) {
	total := 0
	for _, name := range slices.Sorted(maps.Keys(a.Env)) {
		if why := badEnv(name, a.Env[name]); why != "" {
			v.add("env", "env: %s", why)
		}
		v.check(len(name)+len(a.Env[name]) < 128<<10-2, "env."+name, "env.%s: longer than 128 KiB, which the kernel refuses", clip(name))
		total += len(name) + len(a.Env[name]) + 2
	}
	v.check(total < 2<<20, "env", "env: all variables together are longer than 2 MiB")
	for path, name := range map[string]string{"instance_var": a.InstanceVar, "increment_var": a.IncrementVar} {
		if name != "" {
			v.check(badEnv(name, "") == "", path, "%s: %s is no name of a variable", path, clip(name))
		}
	}
	if a.IncrementVar != "" {
		_, err := strconv.ParseInt(a.Env[a.IncrementVar], 10, 64)
		v.check(err == nil, "increment_var", "increment_var: env has no number under %s to count up from", clip(a.IncrementVar))
	}
}

func (v *validator) restart(r *Restart) {
	v.oneOf("restart.policy", r.Policy, "always", "on-failure", "never")
	for _, c := range r.StopExitCodes {
		v.check(c >= 0 && c <= 255, "restart.stop_exit_codes", "restart.stop_exit_codes: %d is not from 0 to 255", c)
	}
	v.span("restart.min_uptime", r.MinUptime)
	v.span("restart.window", r.Window)
	v.span("restart.delay", r.Delay)
	v.span("restart.backoff", r.BackoffInitial, r.BackoffMax)
	v.check(r.BackoffInitial == 0 || r.BackoffMax >= r.BackoffInitial, "restart.backoff.max", "restart.backoff: max %s is less than initial %s", r.BackoffMax, r.BackoffInitial)
	if r.Cron != "" {
		if _, err := ParseCron(r.Cron); err != nil {
			v.add("restart.cron", "restart.cron: %v", err)
		}
	}
	v.check(r.MaxMemory >= 0, "restart.max_memory", "restart.max_memory: %d is negative", r.MaxMemory)
}

func (v *validator) ready(p *Probe) {
	v.oneOf("ready", p.Type, "none", "ipc", "notify", "tcp", "http", "exec", "log")
	v.span("ready.interval", p.Interval)
	v.span("ready.timeout", p.Timeout)
	if p.Type != "none" && p.Type != "" {
		v.oneOf("ready.on_timeout", p.OnTimeout, "fail", "online")
		v.check(p.Timeout > 0, "ready.timeout", "ready.timeout: must be more than 0")
	}
	if p.Type == "tcp" || p.Type == "http" || p.Type == "exec" {
		v.check(p.Interval > 0, "ready.interval", "ready.interval: must be more than 0")
	}
	switch p.Type {
	case "tcp":
		host, port, err := net.SplitHostPort(p.Address)
		v.check(err == nil && host != "" && validPort(port), "ready.tcp", "ready.tcp: %s is not host:port with a port from 1 to 65535", clip(p.Address))
	case "http":
		u, err := url.Parse(p.URL)
		ok := err == nil && (u.Scheme == "http" || u.Scheme == "https") && u.Hostname() != "" && (u.Port() == "" || validPort(u.Port()))
		v.check(ok, "ready.http", "ready.http: %s is not a URL such as http://127.0.0.1:3000/healthz", clip(p.URL))
	case "exec":
		v.check(len(p.Command) > 0 && p.Command[0] != "", "ready.exec", "ready.exec: there is no command")
		for _, w := range p.Command {
			v.text("ready.exec", w)
		}
	case "log":
		_, err := regexp.Compile(p.Pattern)
		v.check(err == nil && len(p.Pattern) <= 4096, "ready.log", "ready.log: %s is no regular expression (RE2): %v", clip(p.Pattern), err)
	}
}

func validPort(s string) bool {
	n, err := strconv.ParseUint(s, 10, 16)
	return err == nil && n > 0
}

func validateLogs(l *Logs) []fieldProblem {
	v := &validator{}
	for path, p := range map[string]string{"logs.out": l.Out, "logs.err": l.Err} {
		if p != "" && p != "none" {
			v.path(path, p)
		}
	}
	v.check(l.MaxSize >= 0, "logs.max_size", "logs.max_size: %d is negative", l.MaxSize)
	v.check(l.MaxSize == 0 || l.MaxSize >= 1024, "logs.max_size", "logs.max_size: %d bytes is less than 1K; write 10M, or 0 for no rotation", l.MaxSize)
	v.check(l.Keep >= 0 && l.Keep <= 100_000, "logs.keep", "logs.keep: %d is not from 0 to 100000", l.Keep)
	v.span("logs.max_age", l.MaxAge)
	v.check(l.MaxAge == 0 || l.MaxAge >= Duration(time.Second), "logs.max_age", "logs.max_age: %s is less than 1s", l.MaxAge)
	v.oneOf("logs.compress", l.Compress, "none", "gzip", "zstd")
	v.check(len(l.TimeFormat) <= 128 && !strings.ContainsFunc(l.TimeFormat, unicode.IsControl), "logs.time", "logs.time: %s is no time layout", clip(l.TimeFormat))
	return v.list
}

// ValidateSet checks apps against each other: names that occur twice,
// dependencies on apps that are neither among them nor known (nil: none is),
// cycles, groups.
func ValidateSet(apps []App, groups []Group, known func(name string) bool) error {
	var p problems
	for _, f := range validateSet(apps, groups, known) {
		p.at(0, 0, "%s", f.text)
	}
	return p.err()
}

// setProblem is a mistake between apps; app is the index of the one to blame,
// -1 for a group.
type setProblem struct {
	app        int
	group      string
	path, text string
}

func validateSet(apps []App, groups []Group, known func(name string) bool) []setProblem {
	var out []setProblem
	index := map[string]int{}
	for i := range apps {
		if first, dup := index[apps[i].Name]; dup {
			out = append(out, setProblem{app: i, path: "name", text: fmt.Sprintf("two apps are named %s (the %s and the %s); rename one", clip(apps[i].Name), ordinal(first+1), ordinal(i+1))})
			continue
		}
		index[apps[i].Name] = i
	}
	names := appNames(apps)
	for i := range apps {
		a := &apps[i]
		for _, dep := range slices.Sorted(maps.Keys(a.DependsOn)) {
			if _, ok := index[dep]; !ok && (known == nil || !known(dep)) {
				out = append(out, setProblem{app: i, path: "depends_on." + dep, text: fmt.Sprintf("app %s depends on %s, which does not exist%s", clip(a.Name), clip(dep), didYouMean(dep, names))})
			}
		}
	}
	if c := cycle(apps, index); c != nil {
		out = append(out, setProblem{app: index[c[0]], path: "depends_on", text: "the apps depend on each other in a circle: " + strings.Join(c, " → ") + "; remove one of these dependencies"})
	}
	return append(out, validateGroups(apps, groups)...)
}

func ordinal(n int) string {
	suffix := "th"
	if n%100 < 11 || n%100 > 13 {
		switch n % 10 {
		case 1:
			suffix = "st"
		case 2:
			suffix = "nd"
		case 3:
			suffix = "rd"
		}
	}
	return strconv.Itoa(n) + suffix
}

// cycle is the first circle of dependencies, its first app at both ends; nil
// for none. It keeps its own stack: the depth is the caller's input.
func cycle(apps []App, index map[string]int) []string {
	const (
		unseen = iota
		open
		done
	)
	state := make([]uint8, len(apps))
	type frame struct {
		app  int
		deps []string
	}
	for start := range apps {
		if state[start] != unseen {
			continue
		}
		stack := []frame{{start, slices.Sorted(maps.Keys(apps[start].DependsOn))}}
		state[start] = open
		for len(stack) > 0 {
			top := &stack[len(stack)-1]
			if len(top.deps) == 0 {
				state[top.app] = done
				stack = stack[:len(stack)-1]
				continue
			}
			dep, ok := index[top.deps[0]]
			top.deps = top.deps[1:]
			if !ok || state[dep] == done {
				continue
			}
			if state[dep] == open {
				var names []string
				from := slices.IndexFunc(stack, func(f frame) bool { return f.app == dep })
				for _, f := range stack[from:] {
					names = append(names, apps[f.app].Name)
				}
				return append(names, apps[dep].Name)
			}
			state[dep] = open
			stack = append(stack, frame{dep, slices.Sorted(maps.Keys(apps[dep].DependsOn))})
		}
	}
	return nil
}

func validateGroups(apps []App, groups []Group) []setProblem {
	var out []setProblem
	add := func(g, path, format string, args ...any) {
		out = append(out, setProblem{app: -1, group: g, path: path, text: fmt.Sprintf(format, args...)})
	}
	parent := map[string]string{}
	var names []string
	for _, g := range groups {
		if why := badName(g.Name); why != "" {
			add(g.Name, "", "the name of a group %s", why)
		}
		if _, dup := parent[g.Name]; dup {
			add(g.Name, "", "two groups are named %s", clip(g.Name))
		}
		parent[g.Name] = g.Parent
		names = append(names, g.Name)
	}
	for _, g := range groups {
		v := &validator{}
		v.oneOf("strategy", g.Strategy, "one-for-one", "one-for-all", "rest-for-one")
		v.check(g.MaxRestarts >= 0, "max_restarts", "max_restarts: %d is negative", g.MaxRestarts)
		v.span("window", g.Window)
		for _, f := range v.list {
			add(g.Name, f.path, "group %s: %s", clip(g.Name), f.text)
		}
		if g.Parent == "" {
			continue
		}
		if _, ok := parent[g.Parent]; !ok {
			add(g.Name, "parent", "group %s: there is no group %s to be its parent%s", clip(g.Name), clip(g.Parent), didYouMean(g.Parent, names))
			continue
		}
		path := []string{g.Name}
		for p := g.Parent; p != "" && len(path) <= len(groups); p = parent[p] {
			path = append(path, p)
			// Told once, by the group of the circle that is first by name.
			if p == g.Name {
				if slices.Min(path) == g.Name {
					add(g.Name, "parent", "the groups are each other's parents in a circle: %s", strings.Join(path, " → "))
				}
				break
			}
		}
	}
	for i := range apps {
		if s := apps[i].Strategy; s != "" {
			if _, ok := parent[s]; !ok {
				out = append(out, setProblem{app: i, path: "group", text: fmt.Sprintf("app %s belongs to group %s, which does not exist%s", clip(apps[i].Name), clip(s), didYouMean(s, names))})
			}
		}
	}
	return out
}
