package config

import (
	"fmt"
	"maps"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
)

// The structs of remuda.yaml. Their json tags are its keys; the descriptions
// go into the published schema.

type remudaFile struct {
	Version   *int                   `json:"version,omitempty" jsonschema:"enum=1" jsonschema_description:"Version of this format. Only 1 exists."`
	Namespace string                 `json:"namespace,omitempty" jsonschema_description:"Namespace of all apps that name none. Default: default."`
	Env       envMap                 `json:"env,omitempty" jsonschema_description:"Variables for all apps; an app's own go over them."`
	EnvFile   envFiles               `json:"env_file,omitempty" jsonschema_description:".env files for all apps, and for ${NAME} in this file."`
	Apps      map[string]remudaApp   `json:"apps,omitempty" null:"ok" jsonschema_description:"The apps by name. A string or list is the command alone."`
	Pools     map[string]remudaPool  `json:"pools,omitempty" null:"ok" jsonschema_description:"Pools of workers that the daemon keeps, by name. A string or list is the command of a worker alone."`
	Groups    map[string]remudaGroup `json:"groups,omitempty" null:"ok" jsonschema_description:"Apps whose restarts concern each other, by name."`
	Logs      *remudaLogs            `json:"logs,omitempty" jsonschema_description:"Log settings for all apps; an app's own go over them."`
}

type remudaApp struct {
	Run          words             `json:"run" jsonschema_description:"The command: a string split into words as by a shell (quotes, backslashes) but run without one, or a list of words. A relative program path is relative to cwd."`
	Shell        bool              `json:"shell,omitempty" jsonschema_description:"Run the string by /bin/sh -c."`
	Cwd          string            `json:"cwd,omitempty" jsonschema_description:"Working directory, relative to the file. Default: the folder of the file."`
	Namespace    string            `json:"namespace,omitempty" jsonschema_description:"Namespace of the app."`
	Env          envMap            `json:"env,omitempty" jsonschema_description:"Variables, as a mapping or a list of NAME=value."`
	EnvNamed     map[string]envMap `json:"-" prefix:"env_"`
	EnvFile      envFiles          `json:"env_file,omitempty" jsonschema_description:".env files; env goes over them."`
	InheritEnv   *bool             `json:"inherit_env,omitempty" jsonschema_description:"Pass on the daemon's PATH, HOME, LANG and the like. Default: true."`
	Instances    *instances        `json:"instances,omitempty" jsonschema_description:"How many run at once: a number, max (one per CPU) or -1 (one CPU left free). Default: 1."`
	InstanceVar  string            `json:"instance_var,omitempty" jsonschema_description:"Variable that holds the instance's number. Default: NODE_APP_INSTANCE."`
	IncrementVar string            `json:"increment_var,omitempty" jsonschema_description:"Variable of env whose number grows by one from instance to instance."`
	ExecMode     string            `json:"exec_mode,omitempty" jsonschema:"enum=fork,enum=cluster" jsonschema_description:"cluster: Node's cluster, instances share their listening ports. Default: fork."`
	Sticky       bool              `json:"sticky,omitempty" jsonschema_description:"In cluster mode: the connections of one client address go to one instance. Default: false."`
	Sockets      remudaSockets     `json:"sockets,omitempty" jsonschema_description:"Sockets that are opened for the app and handed to each of its processes, as systemd does (LISTEN_FDS)."`
	MaxSurge     surge             `json:"max_surge,omitempty" jsonschema_description:"How many instances a reload replaces at a time, each new one ready before the old one is stopped: a number, or a percentage of the instances. 0: the old one is stopped first. Default: 1 where instances share their sockets, else 0."`
	User         id                `json:"user,omitempty" jsonschema_description:"Run as this user (name or uid); the daemon must be root."`
	Group        id                `json:"group,omitempty" jsonschema_description:"Run with this group (name or gid). Default: the user's."`
	Umask        octal             `json:"umask,omitempty" jsonschema_description:"File mode mask, octal."`
	Autostart    *bool             `json:"autostart,omitempty" jsonschema_description:"false: added as stopped. Default: true."`
	Restart      *remudaRestart    `json:"restart,omitempty" jsonschema_description:"When a run that ended is followed by another: always, on-failure, never, or a mapping. Default: always."`
	Stop         *remudaStop       `json:"stop,omitempty" jsonschema_description:"How a run is ended: a signal, or a mapping."`
	Ready        *remudaReady      `json:"ready,omitempty" jsonschema_description:"How it is seen that a run is ready: ipc, notify, or a mapping."`
	DependsOn    dependencies      `json:"depends_on,omitempty" jsonschema_description:"Apps that must be there first: a name, a list of names, or name: started|ready|completed. Without a condition: ready."`
	Watch        *remudaWatch      `json:"watch,omitempty" jsonschema_description:"Restart when files change: true (cwd), a path, a list of paths, or a mapping."`
	Logs         *remudaLogs       `json:"logs,omitempty" jsonschema_description:"Where output goes."`

	n *node
}

func (a *remudaApp) decodeNode(d *decoder, n *node, what string) {
	a.n = n
	switch n.kind {
	case kString, kList:
		a.Run.decodeNode(d, n, what)
	case kMap:
		d.into(n, a, what)
		if n.get("run") == nil {
			d.on(n, "%s has no run; write run: and the command", what)
		}
	default:
		d.wrong(n, what, "a command or a mapping with run:")
	}
}

type remudaRestart struct {
	Policy        string         `json:"policy,omitempty" jsonschema:"enum=always,enum=on-failure,enum=never" jsonschema_description:"Default: always."`
	MaxRestarts   *int           `json:"max_restarts,omitempty" jsonschema:"minimum=-1" jsonschema_description:"More restarts than this within window: the app is errored and left alone. -1: no limit. Default: 16."`
	Window        *Duration      `json:"window,omitempty" jsonschema_description:"Default: 5m. 0: count runs shorter than min_uptime in a row."`
	MinUptime     *Duration      `json:"min_uptime,omitempty" jsonschema_description:"A run that lasted this long was stable and resets the backoff. Default: 1s."`
	Delay         *Duration      `json:"delay,omitempty" jsonschema_description:"A fixed wait before each restart, in place of backoff."`
	Backoff       *remudaBackoff `json:"backoff,omitempty" jsonschema_description:"A wait that grows with each failure in a row, with jitter; false for none."`
	StopExitCodes exitCodes      `json:"stop_exit_codes,omitempty" jsonschema_description:"Exit codes after which there is no restart."`
	Cron          string         `json:"cron,omitempty" jsonschema_description:"Restart at these times: 5 or 6 cron fields, @every 1h, TZ=Europe/Berlin in front."`
	MaxMemory     byteSize       `json:"max_memory,omitempty" jsonschema_description:"Restart when the app and its children use more: 300M."`
}

func (r *remudaRestart) decodeNode(d *decoder, n *node, what string) {
	if n.kind == kString {
		r.Policy = n.text
		return
	}
	d.into(n, r, what)
}

type remudaBackoff struct {
	Initial Duration `json:"initial,omitempty" jsonschema_description:"Default: 100ms."`
	Max     Duration `json:"max,omitempty" jsonschema_description:"Default: 15s."`
	off     bool
}

func (b *remudaBackoff) decodeNode(d *decoder, n *node, what string) {
	if n.kind == kBool && n.text == "false" {
		b.off = true
		return
	}
	b.Initial, b.Max = defaultBackoff, defaultBackoffMax
	d.into(n, b, what)
	if b.Initial == 0 {
		b.off = true
	}
}

type exitCodes []int

func (c *exitCodes) decodeNode(d *decoder, n *node, what string) {
	list := []*node{n}
	if n.kind == kList {
		list = n.list
	}
	*c = exitCodes{}
	for _, e := range list {
		e = d.resolve(e)
		v, ok := intOf(e.text)
		if e.kind != kNumber || !ok || v < 0 || v > 255 {
			d.wrong(e, what, "an exit code from 0 to 255")
			continue
		}
		*c = append(*c, int(v))
	}
}

type remudaStop struct {
	Signal  string    `json:"signal,omitempty" jsonschema_description:"Default: SIGTERM."`
	Grace   *Duration `json:"grace,omitempty" jsonschema_description:"From the signal to SIGKILL. Default: 10s."`
	Message bool      `json:"message,omitempty" jsonschema_description:"Send the message shutdown over the IPC channel in place of the signal."`
}

func (s *remudaStop) decodeNode(d *decoder, n *node, what string) {
	if n.kind == kString {
		s.Signal = n.text
		return
	}
	d.into(n, s, what)
}

type remudaReady struct {
	IPC       bool      `json:"ipc,omitempty" jsonschema_description:"Ready when it sends the message ready over its IPC channel."`
	Notify    bool      `json:"notify,omitempty" jsonschema_description:"Ready when it says READY=1 as to systemd."`
	TCP       tcpTarget `json:"tcp,omitempty" jsonschema_description:"Ready when this port (or host:port) accepts a connection."`
	HTTP      string    `json:"http,omitempty" jsonschema_description:"Ready when this URL answers with a status below 400."`
	Exec      *words    `json:"exec,omitempty" jsonschema_description:"Ready when this command exits with 0."`
	Log       string    `json:"log,omitempty" jsonschema_description:"Ready when a line of its output matches this regular expression (RE2)."`
	Interval  Duration  `json:"interval,omitempty" jsonschema_description:"Time between two looks. Default: 100ms."`
	Timeout   Duration  `json:"timeout,omitempty" jsonschema_description:"Of the whole wait. Default: 60s. Without a probe: how long the new worker of a reload may take to listen; default 30s."`
	OnTimeout string    `json:"on_timeout,omitempty" jsonschema:"enum=fail,enum=online" jsonschema_description:"fail: end the run, it has failed. online: take it as ready. Default: fail."`
}

func (r *remudaReady) decodeNode(d *decoder, n *node, what string) {
	if n.kind == kString {
		switch n.text {
		case "ipc":
			r.IPC = true
		case "notify":
			r.Notify = true
		case "none":
		default:
			d.wrong(n, what, "ipc, notify, none or a mapping such as {http: URL}")
		}
		return
	}
	d.into(n, r, what)
}

type tcpTarget string

func (t *tcpTarget) decodeNode(d *decoder, n *node, what string) {
	if n.kind == kNumber {
		*t = tcpTarget("127.0.0.1:" + n.text)
		return
	}
	if n.kind != kString {
		d.wrong(n, what, "a port or host:port")
		return
	}
	*t = tcpTarget(n.text)
	if strings.HasPrefix(n.text, ":") {
		*t = tcpTarget("127.0.0.1" + n.text)
	}
}

type dependencies map[string]string

func (m *dependencies) decodeNode(d *decoder, n *node, what string) {
	*m = dependencies{}
	switch n.kind {
	case kString:
		(*m)[n.text] = "ready"
	case kList:
		for _, e := range n.list {
			if e = d.resolve(e); e.kind != kString {
				d.wrong(e, what, "the name of an app")
				continue
			}
			(*m)[e.text] = "ready"
		}
	case kMap:
		for _, f := range n.fields {
			v := d.resolve(f.val)
			if v.kind == kNull {
				v = &node{kind: kString, text: "ready"}
			}
			if !slices.Contains(conditions(), v.text) {
				d.on(v, "%s.%s: %s is no condition%s", what, f.key, clip(v.text), orElse(didYouMean(v.text, conditions()), "; write started, ready or completed"))
				continue
			}
			(*m)[f.key] = v.text
		}
	default:
		d.wrong(n, what, "a name, a list of names or a mapping name: condition")
	}
}

func conditions() []string { return []string{"started", "ready", "completed"} }

func orElse(s, other string) string {
	if s == "" {
		return other
	}
	return s
}

type remudaWatch struct {
	Paths    stringList `json:"paths,omitempty" jsonschema_description:"Folders and files, relative to cwd. Default: cwd."`
	Ignore   stringList `json:"ignore,omitempty" jsonschema_description:"Globs, relative to cwd. Default: hidden files and node_modules."`
	Debounce *Duration  `json:"debounce,omitempty" jsonschema_description:"Quiet time after the last change before the restart. Default: 200ms."`
	off      bool
}

func (w *remudaWatch) decodeNode(d *decoder, n *node, what string) {
	switch n.kind {
	case kBool:
		w.off = n.text == "false"
	case kString, kList:
		w.Paths.decodeNode(d, n, what)
	default:
		d.into(n, w, what)
	}
}

type remudaLogs struct {
	Out      string     `json:"out,omitempty" jsonschema_description:"File for stdout, relative to the file; none discards. Default: under the daemon's home."`
	Err      string     `json:"err,omitempty" jsonschema_description:"File for stderr, likewise."`
	Merge    *bool      `json:"merge,omitempty" jsonschema_description:"All instances write to one file. Default: false."`
	Combine  *bool      `json:"combine,omitempty" jsonschema_description:"stderr goes where stdout goes. Default: false."`
	Time     timeFormat `json:"time,omitempty" jsonschema_description:"Put the time before each line: true (2006-01-02T15:04:05.000Z07:00) or a Go time layout."`
	JSON     *bool      `json:"json,omitempty" jsonschema_description:"Write each line as a JSON object. Default: false."`
	MaxSize  *byteSize  `json:"max_size,omitempty" jsonschema_description:"Rotate a file of this size; 0 for never. Default: 50MB."`
	MaxAge   *Duration  `json:"max_age,omitempty" jsonschema_description:"Rotate a file after this time; 0 for never. Default: 0."`
	Keep     *int       `json:"keep,omitempty" jsonschema:"minimum=0" jsonschema_description:"Rotated files that are kept. Default: 5."`
	Compress string     `json:"compress,omitempty" jsonschema:"enum=none,enum=gzip,enum=zstd" jsonschema_description:"Rotated files. Default: none."`
}

type timeFormat string

func (t *timeFormat) decodeNode(d *decoder, n *node, what string) {
	switch {
	case n.kind == kBool && n.text == "true":
		*t = isoMillis
	case n.kind == kBool:
		*t = noTime
	case n.kind == kString && n.text != "":
		*t = timeFormat(n.text)
	default:
		d.wrong(n, what, "true, false or a time layout")
	}
}

// noTime tells "time: false" from nothing said.
const noTime timeFormat = "\x00"

type remudaGroup struct {
	Strategy    string    `json:"strategy,omitempty" jsonschema:"enum=one-for-one,enum=one-for-all,enum=rest-for-one" jsonschema_description:"What a failure of one app means for the others: nothing, all restart, or those later in the list restart. Default: one-for-one."`
	Apps        []string  `json:"apps,omitempty" jsonschema_description:"The apps, in order."`
	Parent      string    `json:"parent,omitempty" jsonschema_description:"The group this one belongs to."`
	MaxRestarts int       `json:"max_restarts,omitempty" jsonschema:"minimum=0" jsonschema_description:"More restarts than this within window: the group fails. 0: no limit of its own."`
	Window      *Duration `json:"window,omitempty" jsonschema_description:"Default: 5m."`
}

// remudaLoader turns a parsed remuda.yaml into apps.
type remudaLoader struct {
	decoder
	dir      string // of the file
	opts     LoadOptions
	environ  map[string]string
	warnings []Warning
	envKnown bool // some app has the env_<name> that was asked for
}

func (l *remudaLoader) load(root *node) *File {
	var rf remudaFile
	f := &File{Format: FormatRemuda}
	if root == nil || root.kind != kMap || len(root.fields) == 0 {
		l.on(root, "the file has no apps; write apps: and below it NAME: COMMAND")
		return f
	}
	// .env files come first: what they define, ${NAME} anywhere may use.
	shared := l.variables(root, nil, "")
	l.lookup = l.chain(shared)
	// Apps and pools are decoded one by one, each with its own variables.
	top := *root
	top.fields = slices.DeleteFunc(slices.Clone(root.fields), func(f field) bool { return f.key == "apps" || f.key == "pools" })
	l.into(&top, &rf, "")
	if rf.Version != nil && *rf.Version != 1 {
		l.on(root.get("version"), "version %d of the format is not known; this program reads version 1", *rf.Version)
	}
	f.Daemon.Logs = l.logs(defaultLogs(), rf.Logs, "logs")
	apps := root.get("apps")
	switch {
	case (apps == nil || apps.kind == kNull) && len(pools(root)) > 0:
	case apps == nil || apps.kind == kNull:
		l.on(root, "the file has no apps; write apps: and below it NAME: COMMAND")
	case apps.kind != kMap:
		l.on(apps, "apps: %s where a mapping NAME: COMMAND should be (a list of apps is the PM2 format: name the file ecosystem.config.yaml)", apps.kind)
	default:
		for _, entry := range apps.fields {
			f.Apps = append(f.Apps, l.app(entry, &rf, shared, f.Daemon.Logs))
		}
	}
	l.pools(root.get("pools"), &rf, shared, f)
	l.groups(root.get("groups"), &rf, f)
	if l.opts.Env != "" && !l.envKnown && len(l.list) == 0 {
		l.warn(nil, "env", fmt.Sprintf("no app has env_%s, which --env %s asks for", l.opts.Env, l.opts.Env))
	}
	return f
}

// pools are the entries of the pools of a file.
func pools(root *node) []field {
	if n := root.get("pools"); n != nil {
		return n.fields
	}
	return nil
}

func (l *remudaLoader) warn(n *node, key, text string) {
	w := Warning{File: l.file, Key: key, Text: text}
	if n != nil {
		w.Line = n.line
	}
	l.warnings = append(l.warnings, w)
}

// variables reads the env_file of n, over base.
func (l *remudaLoader) variables(n *node, base map[string]string, what string) map[string]string {
	vars := maps.Clone(base)
	if vars == nil {
		vars = map[string]string{}
	}
	fn := n.get("env_file")
	if fn == nil || fn.kind == kNull {
		return vars
	}
	d := decoder{problems: problems{file: l.file}, lookup: l.chain(base)}
	var files envFiles
	files.decodeNode(&d, d.resolve(fn), place(what, "env_file"))
	if len(d.list) > 0 {
		return vars // said when the whole is decoded
	}
	for _, e := range files {
		path := absPath(l.dir, e.Path, l.home())
		m, err := readEnvFile(path)
		switch {
		case isNotExist(err) && e.Required != nil && !*e.Required:
		case isNotExist(err):
			l.on(e.n, "%s: %s does not exist; create it, or write {path: %s, required: false}", place(what, "env_file"), path, e.Path)
		case err != nil:
			l.on(e.n, "%s: %v", place(what, "env_file"), err)
		}
		maps.Copy(vars, m)
	}
	return vars
}

// chain looks a variable up in the caller's environment, then in vars.
func (l *remudaLoader) chain(vars map[string]string) func(string) (string, bool) {
	return func(name string) (string, bool) {
		if v, ok := l.environ[name]; ok {
			return v, true
		}
		v, ok := vars[name]
		return v, ok
	}
}

func (l *remudaLoader) home() string { return l.environ["HOME"] }

func (l *remudaLoader) app(entry field, rf *remudaFile, shared map[string]string, logs Logs) App {
	what := "app " + clip(entry.key)
	vars := l.variables(entry.val, shared, what)
	l.lookup = l.chain(vars)
	defer func() { l.lookup = l.chain(shared) }()
	before := len(l.list) + l.more
	var r remudaApp
	r.decodeNode(&l.decoder, l.resolve(entry.val), what)

	a := App{
		Name:         entry.key,
		Namespace:    orElse(r.Namespace, orElse(rf.Namespace, "default")),
		Cwd:          absPath(l.dir, orElse(r.Cwd, "."), l.home()),
		InheritEnv:   r.InheritEnv == nil || *r.InheritEnv,
		Instances:    1,
		InstanceVar:  orElse(r.InstanceVar, defaultInstanceVar),
		IncrementVar: r.IncrementVar,
		ExecMode:     orElse(r.ExecMode, "fork"),
		Sticky:       r.Sticky,
		MaxSurge:     string(r.MaxSurge),
		User:         string(r.User),
		Group:        string(r.Group),
		Umask:        string(r.Umask),
		Autostart:    r.Autostart == nil || *r.Autostart,
		Restart:      l.restart(r.Restart),
		Stop:         Stop{Signal: "SIGTERM", Grace: defaultGrace},
		Ready:        l.ready(r.Ready, what),
		DependsOn:    r.DependsOn,
		Logs:         l.logs(logs, r.Logs, place(what, "logs")),
		Source:       l.file,
	}
	if len(a.DependsOn) == 0 {
		a.DependsOn = nil
	}
	if r.Instances != nil {
		a.Instances = int(*r.Instances)
	}
	if s := r.Stop; s != nil {
		if s.Signal != "" {
			a.Stop.Signal = signalName(s.Signal)
		}
		if s.Grace != nil {
			a.Stop.Grace = *s.Grace
		}
		a.Stop.Message = s.Message
	}
	a.Env = l.env(&r, rf, vars)
	l.watch(&a, r.Watch)
	l.sockets(&a, r.Sockets)
	if argv, ok := r.Run.argv(&l.decoder, r.Shell, what+": run"); ok {
		l.command(&a, argv, r.Shell, orNode(r.Run.n, entry.val))
	}
	if len(l.list)+l.more == before {
		for _, p := range validate(&a) {
			n, line, col := entry.val, entry.line, entry.col
			if p.path != "name" {
				line, col = find(n, p.path, line, col)
			}
			l.at(line, col, "%s: %s", what, p.text)
		}
	}
	return a
}

func orNode(n, other *node) *node {
	if n == nil {
		return other
	}
	return n
}

// find is the position of the deepest part of a dotted path that n has.
func find(n *node, path string, line, col int) (int, int) {
	for key := range strings.SplitSeq(path, ".") {
		if n.kind != kMap {
			break
		}
		i := slices.IndexFunc(n.fields, func(f field) bool { return f.key == key })
		if i < 0 {
			break
		}
		f := n.fields[i]
		if f.line > 0 {
			line, col = f.line, f.col
		}
		n = f.val
		if n.line > 0 && n.scalar() {
			line, col = n.line, n.col
		}
	}
	return line, col
}

func (l *remudaLoader) env(r *remudaApp, rf *remudaFile, vars map[string]string) map[string]string {
	env := maps.Clone(vars)
	maps.Copy(env, rf.Env)
	// A .env file of the app is nearer to it than the file's env.
	if len(r.EnvFile) > 0 {
		for _, e := range r.EnvFile {
			if m, err := readEnvFile(absPath(l.dir, e.Path, l.home())); err == nil {
				maps.Copy(env, m)
			}
		}
	}
	maps.Copy(env, r.Env)
	if named, ok := r.EnvNamed[l.opts.Env]; ok {
		l.envKnown = true
		maps.Copy(env, named)
	}
	if len(env) == 0 {
		return nil
	}
	return env
}

func (l *remudaLoader) restart(r *remudaRestart) Restart {
	out := defaultRestart()
	if r == nil {
		return out
	}
	out.Policy = orElse(r.Policy, out.Policy)
	out.StopExitCodes = r.StopExitCodes
	out.Cron = r.Cron
	out.MaxMemory = int64(r.MaxMemory)
	if r.MaxRestarts != nil {
		out.MaxRestarts = *r.MaxRestarts
	}
	if r.Window != nil {
		out.Window = *r.Window
	}
	if r.MinUptime != nil {
		out.MinUptime = *r.MinUptime
	}
	if r.Delay != nil {
		out.Delay, out.BackoffInitial, out.BackoffMax = *r.Delay, 0, 0
	}
	if b := r.Backoff; b != nil {
		out.BackoffInitial, out.BackoffMax = b.Initial, b.Max
		if b.off {
			out.BackoffInitial, out.BackoffMax = 0, 0
		} else if b.Max < b.Initial {
			out.BackoffMax = b.Initial
		}
	}
	return out
}

func (l *remudaLoader) ready(r *remudaReady, what string) Probe {
	if r == nil {
		return Probe{Type: "none"}
	}
	var types []string
	p := Probe{Type: "none", Timeout: orDuration(r.Timeout, defaultReadyTimeout), OnTimeout: orElse(r.OnTimeout, "fail")}
	is := func(yes bool, t string) bool {
		if yes {
			types = append(types, t)
			p.Type = t
		}
		return yes
	}
	is(r.IPC, "ipc")
	is(r.Notify, "notify")
	if is(r.TCP != "", "tcp") {
		p.Address, p.Interval = string(r.TCP), orDuration(r.Interval, defaultProbeInterval)
	}
	if is(r.HTTP != "", "http") {
		p.URL, p.Interval = r.HTTP, orDuration(r.Interval, defaultProbeInterval)
	}
	if is(r.Exec != nil, "exec") {
		p.Interval = orDuration(r.Interval, defaultProbeInterval)
		p.Command, _ = r.Exec.argv(&l.decoder, false, place(what, "ready.exec"))
	}
	if is(r.Log != "", "log") {
		p.Pattern = r.Log
	}
	switch {
	case len(types) == 0:
		return Probe{Type: "none", Timeout: r.Timeout}
	case len(types) > 1:
		l.at(0, 0, "%s: ready has %s; keep one", what, strings.Join(types, " and "))
	}
	return p
}

func orDuration(d, other Duration) Duration {
	if d == 0 {
		return other
	}
	return d
}

func (l *remudaLoader) logs(out Logs, r *remudaLogs, what string) Logs {
	if r == nil {
		return out
	}
	out.Out = orElse(logPath(l.dir, r.Out, l.home()), out.Out)
	out.Err = orElse(logPath(l.dir, r.Err, l.home()), out.Err)
	for _, b := range []struct {
		to   *bool
		from *bool
	}{{&out.Merge, r.Merge}, {&out.Combine, r.Combine}, {&out.JSON, r.JSON}} {
		if b.from != nil {
			*b.to = *b.from
		}
	}
	switch r.Time {
	case "":
	case noTime:
		out.TimeFormat = ""
	default:
		out.TimeFormat = string(r.Time)
	}
	if r.MaxSize != nil {
		out.MaxSize = int64(*r.MaxSize)
	}
	if r.MaxAge != nil {
		out.MaxAge = *r.MaxAge
	}
	if r.Keep != nil {
		out.Keep = *r.Keep
	}
	out.Compress = orElse(r.Compress, out.Compress)
	if what == "logs" {
		// Checked here: an app without mistakes of its own would be blamed.
		for _, p := range validateLogs(&out) {
			l.at(0, 0, "%s", p.text)
		}
	}
	return out
}

func (l *remudaLoader) watch(a *App, r *remudaWatch) {
	if r == nil || r.off {
		return
	}
	w := &Watch{Debounce: defaultDebounce, Ignore: r.Ignore}
	if r.Debounce != nil {
		w.Debounce = *r.Debounce
	}
	for _, p := range r.Paths {
		w.Paths = append(w.Paths, absPath(a.Cwd, p, l.home()))
	}
	finishWatch(a, w)
}

// command fills in what runs, from the words of run.
func (l *remudaLoader) command(a *App, argv []string, shell bool, n *node) {
	l.program("app "+clip(a.Name), a, argv, shell, n)
}

// program is command for what is called who in messages.
func (l *remudaLoader) program(who string, a *App, argv []string, shell bool, n *node) {
	a.Command = slices.Clone(argv)
	if shell {
		a.Script, a.Interpreter = argv[2], "/bin/sh"
	} else {
		if strings.HasPrefix(argv[0], "~/") || strings.Contains(argv[0], "/") {
			a.Command[0] = absPath(a.Cwd, argv[0], l.home())
		}
		a.Script, a.Interpreter = scriptOf(argv)
	}
	if l.opts.NoCheck {
		return
	}
	what := who + ": run"
	if err := checkDir(a.Cwd); err != nil {
		line, col := find(n, "cwd", n.line, n.col)
		l.at(line, col, "%s: cwd: %v", who, err)
		return
	}
	if filepath.IsAbs(a.Command[0]) {
		if err := checkProgram(a.Command[0]); err != nil {
			l.on(n, "%s: %v", what, err)
		}
		return
	}
	path, own := a.Env["PATH"]
	if !own {
		path = l.environ["PATH"]
	}
	if _, err := lookPath(a.Command[0], path, a.Cwd); err != nil {
		if own {
			l.on(n, "%s: %s is not in the PATH of its env", what, clip(a.Command[0]))
			return
		}
		l.warn(n, "run", fmt.Sprintf("%s: %s is not in your PATH; it must be in the daemon's", what, clip(a.Command[0])))
	}
}

func (l *remudaLoader) groups(n *node, rf *remudaFile, f *File) {
	if n == nil || n.kind != kMap {
		return
	}
	for _, entry := range n.fields {
		g := rf.Groups[entry.key]
		out := Group{Name: entry.key, Parent: g.Parent, Strategy: orElse(g.Strategy, "one-for-one"), MaxRestarts: g.MaxRestarts}
		if g.Window != nil {
			out.Window = *g.Window
		} else if g.MaxRestarts > 0 {
			out.Window = defaultWindow
		}
		f.Groups = append(f.Groups, out)
		line, col := find(entry.val, "apps", entry.line, entry.col)
		for _, name := range g.Apps {
			i := slices.IndexFunc(f.Apps, func(a App) bool { return a.Name == name })
			switch {
			case i < 0:
				l.at(line, col, "group %q: there is no app %q%s", entry.key, name, didYouMean(name, appNames(f.Apps)))
			case f.Apps[i].Strategy != "":
				l.at(line, col, "group %q: app %q is in group %q already; an app belongs to one", entry.key, name, f.Apps[i].Strategy)
			default:
				f.Apps[i].Strategy = entry.key
				g := &f.Groups[len(f.Groups)-1]
				g.Apps = append(g.Apps, name)
			}
		}
	}
}

func appNames(apps []App) []string {
	names := make([]string, len(apps))
	for i := range apps {
		names[i] = apps[i].Name
	}
	return names
}

// scriptOf guesses, for show, which word of a command is the script, and by
// what it is interpreted.
func scriptOf(argv []string) (script, interpreter string) {
	base := filepath.Base(argv[0])
	base = strings.TrimRight(base, "0123456789.")
	if !slices.Contains([]string{"node", "nodejs", "bun", "deno", "python", "ruby", "php", "perl", "bash", "sh"}, base) {
		return argv[0], "none"
	}
	for _, w := range argv[1:] {
		if !strings.HasPrefix(w, "-") {
			return w, argv[0]
		}
		if strings.TrimLeft(w, "-") == "c" || w == "-e" || w == "-m" || w == "-p" {
			break // code or a module follows, no file
		}
	}
	return argv[0], "none"
}

// ResolveInstances turns what a person gives for a number of instances into
// one: "4", "max" or "0" (as many as CPUs), "-1" (one fewer, at least 1).
func ResolveInstances(s string) (int, error) {
	t := strings.ToLower(strings.TrimSpace(s))
	if t == "max" {
		t = "0"
	}
	n, err := strconv.Atoi(t)
	if err != nil {
		i, ok := intOf(t)
		if !ok || i > 1<<31 || i < -1<<31 {
			return 0, fmt.Errorf(`%s is no number of instances: write 1 to %d, "max", or -1 for one fewer than CPUs`, clip(s), maxInstances)
		}
		n = int(i)
	}
	if n <= 0 {
		n = max(1, cpus()+n)
	}
	if n > maxInstances {
		return 0, fmt.Errorf("%s instances are too many: the most is %d", t, maxInstances)
	}
	return n, nil
}
