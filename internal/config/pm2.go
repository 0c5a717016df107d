package config

import (
	"encoding/json"
	"errors"
	"fmt"
	"maps"
	"os"
	"os/user"
	"path/filepath"
	"regexp"
	"slices"
	"strconv"
	"strings"
)

// pm2Keys are the keys PM2 knows in an app, with the aliases of its schema;
// each is also known in camelCase. The order of aliases is PM2's order of
// precedence.
func pm2Keys() map[string][]string {
	return map[string][]string{
		"script": {"exec", "cmd", "command"}, "name": nil, "name_prefix": nil, "filter_env": nil, "namespace": nil,
		"install_url": nil, "cwd": nil, "args": nil, "exec_interpreter": {"interpreter"},
		"node_args": {"interpreter_args", "interpreterArgs"},
		"out_file":  {"out_log", "output", "out"}, "error_file": {"err_log", "err_file", "err", "error"}, "log_file": {"log"},
		"disable_logs": nil, "log_type": nil, "log_date_format": nil, "time": nil, "env": nil,
		"max_memory_restart": nil, "pid_file": {"pid"}, "restart_delay": nil, "exp_backoff_restart_delay": nil,
		"source_map_support": nil, "disable_source_map_support": nil, "wait_ready": nil, "instances": nil,
		"kill_timeout": nil, "kill_signal": nil, "shutdown_with_message": nil, "listen_timeout": nil, "cron_restart": {"cron"},
		"merge_logs": {"combine_logs"}, "vizion": nil, "autorestart": nil, "watch_delay": nil, "watch": nil,
		"ignore_watch": nil, "watch_options": nil, "min_uptime": nil, "max_restarts": nil, "execute_command": nil,
		"exec_mode": nil, "force": nil, "append_env_to_name": nil, "post_update": nil, "trace": nil, "disable_trace": nil,
		"v8": nil, "event_loop_inspector": nil, "deep_monitoring": nil, "increment_var": nil, "instance_var": nil,
		"pmx": nil, "automation": nil, "treekill": nil, "port": nil, "username": nil, "uid": {"user"}, "gid": {"group"},
		"windowsHide": {"windows_hide"}, "kill_retry_time": nil, "write": nil, "io": nil, "autostart": nil, "stop_exit_codes": nil,
		"max_surge": nil, // ours
	}
}

// pm2Loader turns what a PM2 process file says into apps.
type pm2Loader struct {
	problems
	src      string // of a .js file, in which lines are looked up; "" else
	dir      string // the file's folder
	opts     LoadOptions
	environ  map[string]string
	warnings []Warning
	envKnown bool
	keys     map[string]string // any spelling → canonical key
}

// pm2App is one app on its way.
type pm2App struct {
	*pm2Loader
	n    *node
	what string // `app "web"`
	vals map[string]field
	app  App
}

func (l *pm2Loader) load(root *node) *File {
	f := &File{Format: FormatPM2, Daemon: Daemon{Logs: defaultLogs()}}
	l.keys = map[string]string{}
	for key, aliases := range pm2Keys() {
		for _, k := range append([]string{key, camel(key)}, aliases...) {
			l.keys[k] = key
			l.keys[camel(k)] = key
		}
	}
	var list []*node
	var deploy *node
	switch {
	case root == nil || root.kind == kNull:
		l.on(root, "the file has no apps; export {apps: [{script: …}]}")
		return f
	case root.kind == kList:
		list = root.list
	case root.kind != kMap:
		l.on(root, "the file holds %s where {apps: [{script: …}]} should be", root.kind)
		return f
	default:
		deploy = root.get("deploy")
		apps := root.get("apps")
		if apps == nil {
			apps = root.get("pm2")
		}
		switch {
		case apps == nil:
			list = []*node{root}
			deploy = nil
		case apps.kind == kList:
			list = apps.list
		case apps.kind == kMap:
			list = []*node{apps}
		default:
			l.on(apps, "apps: %s where a list of apps should be", apps.kind)
			return f
		}
		if apps != nil {
			for _, fl := range root.fields {
				if !slices.Contains([]string{"apps", "pm2", "deploy"}, fl.key) {
					l.warn(fl.line, fl.key, fmt.Sprintf("%s at the top of the file is not known and does nothing", clip(fl.key)))
				}
			}
		}
	}
	if len(list) == 0 {
		l.on(root, "the list of apps is empty; write at least {script: …}")
	}
	for i, n := range list {
		if n.kind != kMap {
			l.on(n, "the %s app is %s where an object with script: should be", ordinal(i+1), n.kind)
			continue
		}
		a := pm2App{pm2Loader: l, n: n, what: fmt.Sprintf("the %s app", ordinal(i+1)), vals: map[string]field{}}
		if a.build(deploy) {
			l.unique(f.Apps, &a)
			f.Apps = append(f.Apps, a.app)
		}
	}
	if l.opts.Env != "" && !l.envKnown && len(l.list) == 0 {
		l.warn(0, "env", fmt.Sprintf("no app has env_%s, which --env %s asks for", l.opts.Env, l.opts.Env))
	}
	return f
}

// unique gives an app whose name was only derived from its script, and is
// taken, a number. Names that were written twice are an error later.
func (l *pm2Loader) unique(before []App, a *pm2App) {
	if a.has("name") {
		return
	}
	name := a.app.Name
	for i := 2; slices.Contains(appNames(before), a.app.Name); i++ {
		a.app.Name = name + "-" + strconv.Itoa(i)
	}
	if a.app.Name != name {
		l.warn(a.n.line, "name", fmt.Sprintf("two apps without a name run a script called %s; this one is named %s", clip(name), clip(a.app.Name)))
	}
}

func camel(s string) string {
	parts := strings.Split(s, "_")
	for i, p := range parts[1:] {
		if len(p) > 1 {
			p = strings.ToUpper(p[:1]) + p[1:]
		}
		parts[i+1] = p
	}
	return strings.Join(parts, "")
}

func (l *pm2Loader) warn(line int, key, text string) {
	if line == 0 && key != "" {
		line = l.lineOf(key[strings.LastIndexByte(key, '.')+1:])
	}
	l.warnings = append(l.warnings, Warning{File: l.file, Line: line, Key: key, Text: oneLine(text)})
}

// lineOf is the first line of a .js file where key stands before a colon.
func (l *pm2Loader) lineOf(key string) int {
	if l.src == "" {
		return 0
	}
	re, err := regexp.Compile(`(^|[\s{,])["']?` + regexp.QuoteMeta(key) + `["']?\s*:`)
	if err != nil {
		return 0
	}
	at := re.FindStringIndex(l.src)
	if at == nil {
		return 0
	}
	return 1 + strings.Count(strings.TrimRight(l.src[:at[1]], ": \n"), "\n")
}

func (a *pm2App) has(key string) bool { _, ok := a.vals[key]; return ok }

// bad is a mistake in the value of a key.
func (a *pm2App) bad(key, format string, args ...any) {
	f := a.vals[key]
	line, col := f.line, f.col
	if f.val != nil && f.val.line > 0 && f.val.scalar() {
		line, col = f.val.line, f.val.col
	}
	if line == 0 {
		line = a.lineOf(orElse(f.key, key))
	}
	a.at(line, col, "%s: %s: %s", a.what, orElse(f.key, key), fmt.Sprintf(format, args...))
}

func (a *pm2App) warnKey(key, format string, args ...any) {
	f := a.vals[key]
	name := orElse(f.key, key)
	a.warn(f.line, name, fmt.Sprintf("%s: %s %s", a.what, name, fmt.Sprintf(format, args...)))
}

func (a *pm2App) str(key string) string {
	f, ok := a.vals[key]
	if !ok {
		return ""
	}
	if f.val.kind != kString && f.val.kind != kNumber {
		a.bad(key, "%s where a string should be", f.val.kind)
		return ""
	}
	return f.val.text
}

func (a *pm2App) boolean(key string, other bool) bool {
	f, ok := a.vals[key]
	if !ok {
		return other
	}
	if (f.val.kind == kBool || f.val.kind == kString) && (f.val.text == "true" || f.val.text == "false") {
		return f.val.text == "true"
	}
	a.bad(key, "%s where true or false should be", orElse(clipScalar(f.val), f.val.kind.String()))
	return other
}

func clipScalar(n *node) string {
	if n.scalar() {
		return clip(n.text)
	}
	return ""
}

// integer is a whole number; PM2 takes numbers in strings too.
func (a *pm2App) integer(key string, other int64) int64 {
	f, ok := a.vals[key]
	if !ok {
		return other
	}
	if f.val.kind == kNumber || f.val.kind == kString {
		if v, ok := intOf(strings.TrimSpace(f.val.text)); ok {
			return v
		}
	}
	a.bad(key, "%s where a whole number should be", orElse(clipScalar(f.val), f.val.kind.String()))
	return other
}

// duration is milliseconds, or a string with a unit.
func (a *pm2App) duration(key string, other Duration) Duration {
	f, ok := a.vals[key]
	if !ok {
		return other
	}
	if f.val.kind == kNumber || f.val.kind == kString {
		d, err := ParseDuration(f.val.text)
		if err == nil && d >= 0 {
			return d
		}
	}
	a.bad(key, "%s where a number of milliseconds, or 10s, should be", orElse(clipScalar(f.val), f.val.kind.String()))
	return other
}

// strings is a list, or a string that split cuts up.
func (a *pm2App) strings(key string, split func(string) ([]string, error)) []string {
	f, ok := a.vals[key]
	if !ok {
		return nil
	}
	switch f.val.kind {
	case kString:
		out, err := split(f.val.text)
		if err != nil {
			a.bad(key, "%v", err)
		}
		return out
	case kNumber:
		return []string{f.val.text}
	case kList:
		out := make([]string, 0, len(f.val.list))
		for _, e := range f.val.list {
			if !e.scalar() {
				a.bad(key, "%s in a list of strings", e.kind)
				return nil
			}
			out = append(out, e.text)
		}
		return out
	}
	a.bad(key, "%s where a string or a list of strings should be", f.val.kind)
	return nil
}

// commas is for strings that list names.
func commas(s string) ([]string, error) {
	return strings.FieldsFunc(s, func(r rune) bool { return r == ',' || r == ' ' }), nil
}

func whole(s string) ([]string, error) { return []string{s}, nil }

// index fills vals with what the app has, by canonical key.
func (a *pm2App) index() {
	rank := func(canonical, key string) int {
		return slices.Index(append([]string{canonical}, pm2Keys()[canonical]...), key) & 0xff // camelCase last
	}
	for _, f := range a.n.fields {
		if f.val.kind == kNull {
			continue // undefined and null are nothing said
		}
		if strings.HasPrefix(f.key, "env_") {
			continue
		}
		canonical, ok := a.keys[f.key]
		if !ok {
			known := slices.Sorted(maps.Keys(a.keys))
			a.warn(f.line, f.key, fmt.Sprintf("%s: key %s is not known and does nothing%s", a.what, clip(f.key), didYouMean(f.key, known)))
			continue
		}
		if have, dup := a.vals[canonical]; dup && rank(canonical, have.key) <= rank(canonical, f.key) {
			continue
		}
		a.vals[canonical] = f
	}
}

// base is what relative paths are relative to: the caller's working
// directory, as PM2 has it. Where the app's cwd, or its script if it has no
// cwd, is not there but is beside the file, the file's folder is meant.
func (a *pm2App) base(script string) string {
	cwd := a.opts.Cwd
	probe := script
	if dir := a.str("cwd"); dir != "" {
		probe = dir
	}
	if cwd == a.dir || filepath.IsAbs(probe) || strings.HasPrefix(probe, "~") ||
		exists(filepath.Join(cwd, probe)) || !exists(filepath.Join(a.dir, probe)) {
		return cwd
	}
	return a.dir
}

func exists(path string) bool { _, err := os.Stat(path); return err == nil }

// build makes the app; false where it cannot be used.
func (a *pm2App) build(deploy *node) bool {
	before := len(a.list) + a.more
	if n := a.n.get("name"); n != nil && n.scalar() {
		a.what = "app " + clip(n.text)
	}
	a.index()
	script := a.str("script")
	if strings.TrimSpace(script) == "" {
		if !a.has("script") {
			a.on(a.n, "%s has no script; write script: and the program to run", a.what)
		} else {
			a.bad("script", "is empty; write the program to run")
		}
		return false
	}
	name := a.str("name")
	if name == "" {
		name = nameOf(script)
	}
	if a.boolean("append_env_to_name", false) && a.opts.Env != "" {
		name += "-" + a.opts.Env
	}
	a.what = "app " + clip(name)
	base := a.base(script)
	a.app = App{
		Name:         name,
		Namespace:    orElse(a.str("namespace"), "default"),
		Cwd:          absPath(base, orElse(a.str("cwd"), "."), a.environ["HOME"]),
		Instances:    1,
		InstanceVar:  orElse(a.str("instance_var"), defaultInstanceVar),
		IncrementVar: a.str("increment_var"),
		MaxSurge:     a.str("max_surge"),
		User:         a.str("uid"),
		Group:        a.str("gid"),
		Autostart:    a.boolean("autostart", true),
		Stop:         Stop{Signal: "SIGINT", Grace: a.duration("kill_timeout", pm2KillTimeout), Message: a.boolean("shutdown_with_message", false)},
		Ready:        Probe{Type: "none"},
		Logs:         a.logs(base),
		Source:       a.file,
	}
	if s := a.str("kill_signal"); s != "" {
		a.app.Stop.Signal = signalName(s)
	}
	a.env(deploy)
	a.restart()
	a.ready()
	a.watch()
	a.command(script)
	a.mode()
	a.rest()
	if len(a.list)+a.more > before {
		return false
	}
	for _, p := range validate(&a.app) {
		key := pm2KeyOf(p.path)
		f := a.vals[key]
		line, col := f.line, f.col
		if line == 0 {
			if f.key != "" {
				line = a.lineOf(f.key)
			}
			if line == 0 {
				line, col = a.n.line, a.n.col
			}
		}
		text := p.text
		if f.key != "" && key != p.path {
			text = strings.Replace(text, p.path+":", f.key+":", 1)
		}
		a.at(line, col, "%s: %s", a.what, text)
	}
	return len(a.list)+a.more == before
}

// pm2KeyOf is the PM2 key for a field's path in remuda.yaml.
func pm2KeyOf(path string) string {
	switch path {
	case "run":
		return "script"
	case "user":
		return "uid"
	case "group":
		return "gid"
	case "logs.out":
		return "out_file"
	case "logs.err":
		return "error_file"
	case "restart.cron":
		return "cron_restart"
	case "restart.max_memory":
		return "max_memory_restart"
	case "restart.delay":
		return "restart_delay"
	case "restart.backoff", "restart.backoff.max":
		return "exp_backoff_restart_delay"
	case "ready.timeout":
		return "listen_timeout"
	case "stop.grace":
		return "kill_timeout"
	case "stop.signal":
		return "kill_signal"
	case "watch.ignore":
		return "ignore_watch"
	case "watch.debounce":
		return "watch_delay"
	case "watch.paths":
		return "watch"
	}
	head, rest, ok := strings.Cut(path, ".")
	if ok && head == "restart" {
		return rest
	}
	return head
}

// nameOf is the name PM2 gives to an app that has none.
func nameOf(script string) string {
	if strings.Contains(script, " ") {
		return strings.ReplaceAll(oneLine(strings.TrimSpace(script)), "/", "-")
	}
	base := filepath.Base(script)
	if i := strings.LastIndexByte(base, '.'); i > 0 {
		base = base[:i]
	}
	return base
}

func (a *pm2App) logs(base string) Logs {
	l := defaultLogs()
	home := a.environ["HOME"]
	cwd := absPath(base, orElse(a.str("cwd"), "."), home)
	l.Out = logPath(cwd, a.str("out_file"), home)
	l.Err = logPath(cwd, a.str("error_file"), home)
	if f, ok := a.vals["log_file"]; ok {
		switch {
		case f.val.kind == kBool:
			l.Combine = f.val.text == "true"
		case f.val.kind != kString:
			a.bad("log_file", "%s where a path should be", f.val.kind)
		case f.val.text == "":
		case l.Out != "" || l.Err != "":
			if logPath(cwd, f.val.text, home) != discard {
				a.warnKey("log_file", "is not written: out_file and error_file are; leave them out to have both in one file")
			}
		case logPath(cwd, f.val.text, home) != discard:
			l.Out, l.Combine = logPath(cwd, f.val.text, home), true
		}
	}
	if l.Out != "" && l.Out == l.Err {
		l.Err, l.Combine = "", true
	}
	if a.boolean("disable_logs", false) {
		l.Out, l.Err, l.Combine = discard, discard, false
	}
	// As in PM2: one plain program has its log without a number.
	_, many := a.vals["instances"]
	cluster := strings.HasPrefix(a.str("exec_mode"), "cluster")
	l.Merge = a.boolean("merge_logs", !many && !cluster)
	format := a.str("log_date_format")
	if a.boolean("time", false) {
		format = ""
		l.TimeFormat = pm2TimeFormat
	}
	if format != "" && format != "false" {
		var bad []string
		if l.TimeFormat, bad = momentLayout(format); bad != nil {
			a.warn(a.vals["log_date_format"].line, "log_date_format", a.what+": "+momentWarning(bad))
		}
	}
	switch t := a.str("log_type"); t {
	case "", "raw":
	case "json":
		l.JSON = true
	default:
		a.warnKey("log_type", "%s is not known; lines are written as they are (json is known)", clip(t))
	}
	return l
}

// object is the variables under key; values that are objects become JSON.
func (a *pm2App) object(n *node, key string) map[string]string {
	out := map[string]string{}
	if n == nil || n.kind == kNull {
		return out
	}
	if n.kind != kMap {
		a.on(n, "%s: %s: %s where an object of variables should be", a.what, key, n.kind)
		return out
	}
	for _, f := range n.fields {
		var val string
		switch {
		case f.val.kind == kNull:
			continue
		case f.val.scalar():
			val = f.val.text
		default:
			b, err := json.Marshal(plain(f.val))
			if err != nil {
				a.on(f.val, "%s: %s.%s: %v", a.what, key, f.key, err)
			}
			val = string(b)
		}
		if why := badEnv(f.key, val); why != "" {
			a.at(f.line, f.col, "%s: %s: %s", a.what, key, why)
			continue
		}
		out[f.key] = val
	}
	return out
}

// plain is a node as encoding/json writes it.
func plain(n *node) any {
	switch n.kind {
	case kBool:
		return n.text == "true"
	case kNumber:
		if json.Valid([]byte(n.text)) {
			return json.Number(n.text)
		}
		return n.text
	case kString:
		return n.text
	case kList:
		out := make([]any, len(n.list))
		for i, e := range n.list {
			out[i] = plain(e)
		}
		return out
	case kMap:
		out := make(map[string]any, len(n.fields))
		for _, f := range n.fields {
			out[f.key] = plain(f.val)
		}
		return out
	}
	return nil
}

func (a *pm2App) env(deploy *node) {
	own := map[string]string{}
	if e := a.opts.Env; e != "" {
		maps.Copy(own, a.object(deploy.get(e).get("env"), "deploy."+e+".env"))
	}
	if f, ok := a.vals["env"]; ok {
		maps.Copy(own, a.object(f.val, "env"))
	}
	if e := a.opts.Env; e != "" {
		if n := a.n.get("env_" + e); n != nil {
			a.envKnown = true
			maps.Copy(own, a.object(n, "env_"+e))
		}
	}
	if a.has("port") {
		own["PORT"] = strconv.FormatInt(a.integer("port", 0), 10)
	}
	env := callerEnv(a.environ)
	if f, ok := a.vals["filter_env"]; ok {
		switch f.val.kind {
		case kBool:
			if f.val.text == "true" {
				env = essential(env)
			}
		case kString:
			delete(env, f.val.text)
		default:
			filterEnv(env, a.strings("filter_env", commas))
		}
	}
	if a.app.User != "" {
		accountEnv(own, a.app.User)
	}
	a.app.setEnv(env, own)
}

// setEnv puts own over inherited and notes which are own.
func (a *App) setEnv(inherited, own map[string]string) {
	a.EnvKeys = slices.AppendSeq(make([]string, 0, len(own)), maps.Keys(own))
	slices.Sort(a.EnvKeys)
	maps.Copy(inherited, own)
	a.Env = inherited
}

// accountEnv gives an app that runs as another user that user's home, where
// the user is known on this machine and own does not say otherwise.
func accountEnv(own map[string]string, account string) {
	u, err := user.Lookup(account)
	if err != nil {
		if u, err = user.LookupId(account); err != nil {
			return
		}
	}
	for name, val := range map[string]string{"HOME": u.HomeDir, "USER": u.Username, "LOGNAME": u.Username} {
		if _, ok := own[name]; !ok {
			own[name] = val
		}
	}
}

// callerEnv is the caller's environment without what belongs to the caller's
// own process: its place in a shell, and channels an outer supervisor made.
func callerEnv(environ map[string]string) map[string]string {
	env := maps.Clone(environ)
	for _, name := range []string{
		"_", "PWD", "OLDPWD", "SHLVL",
		"NODE_CHANNEL_FD", "NODE_CHANNEL_SERIALIZATION_MODE", "NODE_UNIQUE_ID", "NODE_APP_INSTANCE", "pm_id",
		"LISTEN_FDS", "LISTEN_PID", "LISTEN_FDNAMES", "NOTIFY_SOCKET", "WATCHDOG_USEC", "WATCHDOG_PID",
		"INVOCATION_ID", "JOURNAL_STREAM", "SYSTEMD_EXEC_PID", "MANAGERPID",
	} {
		delete(env, name)
	}
	if env == nil {
		env = map[string]string{}
	}
	return env
}

// filterEnv drops every variable whose name contains one of parts.
func filterEnv(env map[string]string, parts []string) {
	for name := range env {
		if slices.ContainsFunc(parts, func(p string) bool { return p != "" && strings.Contains(name, p) }) {
			delete(env, name)
		}
	}
}

// essential is what is left under filter_env: true. PM2 leaves nothing, with
// which no interpreter is found; PATH and HOME stay.
func essential(env map[string]string) map[string]string {
	out := map[string]string{}
	for _, name := range []string{"PATH", "HOME"} {
		if v, ok := env[name]; ok {
			out[name] = v
		}
	}
	return out
}

func (a *pm2App) restart() {
	r := &a.app.Restart
	*r = Restart{
		Policy:      "always",
		MinUptime:   a.duration("min_uptime", defaultMinUptime),
		MaxRestarts: defaultMaxRestarts,
		Delay:       a.duration("restart_delay", 0),
	}
	if n := a.integer("max_restarts", defaultMaxRestarts); n < 0 || n > 1<<31 {
		a.bad("max_restarts", "%d is out of range", n)
	} else {
		r.MaxRestarts = int(n)
	}
	if !a.boolean("autorestart", true) {
		r.Policy = "never"
	}
	if d := a.duration("exp_backoff_restart_delay", 0); d > 0 {
		r.BackoffInitial, r.BackoffMax = d, max(d, defaultBackoffMax)
	}
	if f, ok := a.vals["cron_restart"]; ok && f.val.text != "0" && f.val.text != "false" {
		r.Cron = strings.TrimSpace(a.str("cron_restart"))
	}
	if f, ok := a.vals["max_memory_restart"]; ok {
		v, err := ParseSize(f.val.text)
		if (f.val.kind != kNumber && f.val.kind != kString) || err != nil || v < 0 {
			a.bad("max_memory_restart", "%s where a size such as 300M should be", orElse(clipScalar(f.val), f.val.kind.String()))
		}
		r.MaxMemory = max(0, v)
	}
	for _, s := range a.strings("stop_exit_codes", commas) {
		n, ok := intOf(s)
		if !ok || n < 0 || n > 255 {
			a.bad("stop_exit_codes", "%s is no exit code from 0 to 255", clip(s))
			continue
		}
		r.StopExitCodes = append(r.StopExitCodes, int(n))
	}
}

func (a *pm2App) ready() {
	timeout := a.duration("listen_timeout", pm2ListenTimeout)
	if a.boolean("wait_ready", false) {
		a.app.Ready = Probe{Type: "ipc", Timeout: orDuration(timeout, pm2ListenTimeout), OnTimeout: "online"}
	} else if a.has("listen_timeout") {
		a.warnKey("listen_timeout", "does nothing without wait_ready")
	}
}

func (a *pm2App) watch() {
	f, ok := a.vals["watch"]
	if !ok || f.val.kind == kBool && f.val.text == "false" {
		return
	}
	w := &Watch{Debounce: defaultDebounce}
	if f.val.kind != kBool {
		for _, p := range a.strings("watch", whole) {
			if p != "" && p != "true" {
				w.Paths = append(w.Paths, absPath(a.app.Cwd, p, a.environ["HOME"]))
			}
		}
	}
	if d, ok := a.vals["watch_delay"]; ok && d.val.kind != kBool {
		w.Debounce = a.duration("watch_delay", defaultDebounce)
	}
	if a.has("ignore_watch") {
		w.Ignore = []string{}
		for _, n := range listOf(a.vals["ignore_watch"].val) {
			a.ignore(w, n, "ignore_watch")
		}
	}
	if o, ok := a.vals["watch_options"]; ok && o.val.kind == kMap {
		for _, of := range o.val.fields {
			switch of.key {
			case "ignored":
				if w.Ignore == nil {
					w.Ignore = []string{}
				}
				for _, n := range listOf(of.val) {
					a.ignore(w, n, "watch_options.ignored")
				}
			case "ignoreInitial", "persistent", "followSymlinks", "usePolling", "interval", "binaryInterval", "atomic", "awaitWriteFinish", "cwd", "disableGlobbing", "alwaysStat", "depth", "ignorePermissionErrors":
				// These tune chokidar. The ones that say what our watching
				// does anyway need no word.
				if (of.key == "followSymlinks" && of.val.text == "false") || (of.key == "ignoreInitial" && of.val.text == "true") ||
					(of.key == "usePolling" && of.val.text == "false") || (of.key == "persistent" && of.val.text == "true") {
					continue
				}
				a.warn(of.line, "watch_options."+of.key, fmt.Sprintf("%s: watch_options.%s is not carried out; files are watched by inotify, watch_delay sets the wait", a.what, of.key))
			default:
				a.warn(of.line, "watch_options."+of.key, fmt.Sprintf("%s: watch_options.%s is not known and does nothing", a.what, of.key))
			}
		}
	}
	finishWatch(&a.app, w)
}

func listOf(n *node) []*node {
	if n.kind == kList {
		return n.list
	}
	return []*node{n}
}

// regexKey marks a regular expression of a .js file in what is handed over.
const regexKey = "$remuda:regexp"

// ignore adds what ignore_watch says, in any of the ways it is written: a
// name, a path, a glob, a simple regular expression.
func (a *pm2App) ignore(w *Watch, n *node, key string) {
	s := n.text
	if re := n.get(regexKey); re != nil {
		s = re.text
	} else if n.kind != kString {
		a.on(n, "%s: %s: %s where a path should be", a.what, key, n.kind)
		return
	}
	s = strings.TrimSpace(s)
	if s == "" {
		return
	}
	if lit, ok := literalRegex(s); ok && (n.kind == kMap || lit != s) {
		w.Ignore = append(w.Ignore, "**/*"+globQuote(lit)+"*", "**/*"+globQuote(lit)+"*/**")
		return
	}
	if n.kind == kMap || strings.HasPrefix(s, "^") || strings.HasSuffix(s, "$") || strings.Contains(s, `\.`) || strings.Contains(s, ".*") && strings.ContainsAny(s, "()|\\") {
		a.warn(n.line, key, fmt.Sprintf("%s: %s: the regular expression %s is not carried out; write a glob such as **/tmp/**", a.what, key, clip(s)))
		return
	}
	if filepath.IsAbs(s) {
		if rel, ok := relativeTo(a.app.Cwd, s); ok {
			s = rel
		}
	}
	s = strings.TrimSuffix(strings.TrimPrefix(s, "./"), "/")
	if !strings.Contains(s, "/") {
		s = "**/" + s
	}
	w.Ignore = append(w.Ignore, s)
	if !strings.HasSuffix(s, "**") {
		w.Ignore = append(w.Ignore, s+"/**")
	}
}

// literalRegex is the text a regular expression without operators stands for.
func literalRegex(s string) (string, bool) {
	var b strings.Builder
	for i := 0; i < len(s); i++ {
		switch c := s[i]; {
		case c == '\\' && i+1 < len(s) && strings.IndexByte(`./-_`, s[i+1]) >= 0:
			i++
			b.WriteByte(s[i])
		case strings.IndexByte(`\^$.|?*+()[]{}/`, c) >= 0:
			return "", false
		default:
			b.WriteByte(c)
		}
	}
	return b.String(), b.Len() > 0
}

func (a *pm2App) command(script string) {
	args := a.strings("args", splitLoose)
	nodeArgs := a.strings("node_args", splitLoose)
	interpreter := a.str("exec_interpreter")
	c := commandSpec{
		script: script, args: args, interpreter: interpreter, nodeArgs: nodeArgs,
		cwd: a.app.Cwd, env: a.app.Env, noCheck: a.opts.NoCheck, home: a.environ["HOME"],
	}
	if a.boolean("source_map_support", false) && !a.boolean("disable_source_map_support", false) {
		c.sourceMaps = true
	}
	if !c.noCheck {
		if err := checkDir(a.app.Cwd); err != nil {
			a.bad("cwd", "%v", err)
			return
		}
	}
	r, err := c.resolve()
	if err != nil {
		key := "script"
		var ie *interpreterError
		if errors.As(err, &ie) && interpreter != "" {
			key = "exec_interpreter"
		}
		a.bad(key, "%v", err)
		return
	}
	a.app.Command, a.app.Script, a.app.Interpreter = r.command, r.script, r.interpreter
	if strings.Contains(filepath.Base(r.interpreter), "python") && !slices.Contains(a.app.EnvKeys, "PYTHONUNBUFFERED") {
		a.app.Env["PYTHONUNBUFFERED"] = "1" // as PM2: else the log lags behind
	}
	if r.warning != "" {
		a.warn(a.vals["script"].line, orElse(a.vals["script"].key, "script"), a.what+": "+r.warning)
	}
}

// mode settles instances and exec_mode, which depend on each other and on
// the interpreter.
func (a *pm2App) mode() {
	f, given := a.vals["instances"]
	if given {
		if f.val.kind == kNumber || f.val.kind == kString {
			n, err := ResolveInstances(f.val.text)
			if err != nil {
				a.bad("instances", "%v", err)
			}
			a.app.Instances = n
		} else {
			a.bad("instances", "%s where a number or \"max\" should be", f.val.kind)
		}
	}
	clusters := IsNode(a.app.Interpreter)
	// PM2 has these in cluster mode, too.
	others := !clusters && (strings.HasSuffix(a.app.Interpreter, "node") || strings.HasSuffix(a.app.Interpreter, "bun"))
	mode := strings.TrimSuffix(a.str("exec_mode"), "_mode")
	if a.boolean("execute_command", false) {
		mode = "fork"
	}
	switch mode {
	case "fork", "cluster":
	case "":
		mode = "fork"
		if given && (clusters || others && a.app.Instances > 1) {
			mode = "cluster"
		}
	default:
		a.bad("exec_mode", "%s is not known: write fork or cluster", clip(mode))
		mode = "fork"
	}
	if mode == "cluster" && !clusters && a.app.Interpreter != "" {
		const instead = "this one runs in fork mode, in which instances share a port by sockets: of a remuda.yaml, or where each opens it with SO_REUSEPORT"
		if a.has("exec_mode") {
			a.warnKey("exec_mode", "cluster is for Node programs; %s", instead)
		} else {
			a.warnKey("instances", "mean cluster mode to PM2, which is for Node programs; %s", instead)
		}
		mode = "fork"
	}
	a.app.ExecMode = mode
}

// rest speaks up for every key that asks for something that is not carried
// out.
func (a *pm2App) rest() {
	// What asks for nothing when it has this value.
	quiet := map[string]string{
		"vizion": "false", "pmx": "false", "automation": "false", "trace": "false", "disable_trace": "true", "v8": "false",
		"event_loop_inspector": "false", "deep_monitoring": "false", "treekill": "true", "force": "false", "write": "false",
	}
	why := map[string]string{
		"vizion":               "is not carried out: there is no reading of version control",
		"pmx":                  "is not carried out: nothing is loaded into the program",
		"automation":           "is not carried out: nothing is loaded into the program",
		"trace":                "is not carried out: there is no tracing",
		"disable_trace":        "does nothing: there is no tracing",
		"v8":                   "is not carried out: nothing is loaded into the program",
		"event_loop_inspector": "is not carried out: nothing is loaded into the program",
		"deep_monitoring":      "is not carried out: nothing is loaded into the program",
		"treekill":             "is not carried out: a stop always ends the children too",
		"force":                "does nothing in a file: use start --force",
		"write":                "does nothing",
		"post_update":          "is not carried out: there is no deployment",
		"pid_file":             "is not carried out: no pid files are written; ask with remuda pid",
		"name_prefix":          "is not carried out: write it into name",
		"install_url":          "is not carried out",
		"io":                   "is not carried out: there is no PM2 Plus",
		"kill_retry_time":      "does nothing: the end of a process is seen at once",
	}
	for _, key := range slices.Sorted(maps.Keys(why)) {
		f, ok := a.vals[key]
		if !ok || quiet[key] != "" && f.val.text == quiet[key] {
			continue
		}
		a.warnKey(key, "%s", why[key])
	}
	for _, key := range []string{"ignore_watch", "watch_delay", "watch_options"} {
		if a.has(key) && a.app.Watch == nil && !a.has("watch") {
			a.warnKey(key, "does nothing without watch")
		}
	}
}
