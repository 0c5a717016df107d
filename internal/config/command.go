package config

import (
	"fmt"
	"os"
	"path/filepath"
	"slices"
	"strings"
)

// commandSpec is a program in PM2's terms: script, interpreter, arguments.
type commandSpec struct {
	script, interpreter string
	args, nodeArgs      []string
	cwd, home           string
	env                 map[string]string // its PATH is searched
	sourceMaps          bool
	noCheck             bool
}

type resolved struct {
	command             []string
	script, interpreter string
	warning             string
}

// interpreterError is about the interpreter, not the script.
type interpreterError struct{ text string }

func (e *interpreterError) Error() string { return e.text }

// resolve settles what is executed, as PM2 does: a script with blanks is a
// command for bash; a file is run by the interpreter its ending names; what
// is no file is looked up in PATH.
func (c *commandSpec) resolve() (resolved, error) {
	path := absPath(c.cwd, c.script, c.home)
	isFile := false
	if st, err := os.Stat(path); err == nil {
		if st.IsDir() {
			return resolved{}, fmt.Errorf("%s is a folder; name the file in it that is to be run", path)
		}
		isFile = true
	}
	if !isFile && strings.ContainsAny(strings.TrimSpace(c.script), " \t\n") {
		shell, ok := c.find("bash", "sh")
		if !ok && !c.noCheck {
			return resolved{}, &interpreterError{"neither bash nor sh is in PATH, and the script is a command with blanks"}
		}
		return resolved{command: append([]string{shell, "-c", c.script, shell}[:3:3], c.args...), script: c.script, interpreter: shell}, nil
	}
	if !isFile {
		found, err := "", fmt.Errorf("no PATH")
		if !strings.Contains(c.script, "/") && !strings.HasPrefix(c.script, "~") {
			found, err = lookPath(c.script, c.env["PATH"], c.cwd)
		}
		switch {
		case err == nil:
			path = found
		case c.noCheck:
		default:
			return resolved{}, fmt.Errorf("%s does not exist%s; check the path (it is relative to %s)", clip(c.script), orElse(notInPath(c.script), ""), c.cwd)
		}
	}
	r := resolved{script: path, interpreter: c.interpreter}
	if err := c.pickInterpreter(&r, path); err != nil {
		return resolved{}, err
	}
	if r.interpreter == "none" {
		r.command = append([]string{path}, c.args...)
		return r, nil
	}
	nodeArgs := c.nodeArgs
	if c.sourceMaps && strings.HasSuffix(filepath.Base(r.interpreter), "node") && !slices.Contains(nodeArgs, "--enable-source-maps") {
		nodeArgs = append(slices.Clip(nodeArgs), "--enable-source-maps")
	}
	r.command = slices.Concat([]string{r.interpreter}, nodeArgs, []string{path}, c.args)
	return r, nil
}

func notInPath(script string) string {
	if strings.Contains(script, "/") {
		return ""
	}
	return ", neither as a file nor in PATH"
}

// find is the first of names that is in PATH, else the first.
func (c *commandSpec) find(names ...string) (string, bool) {
	for _, n := range names {
		if _, err := lookPath(n, c.env["PATH"], c.cwd); err == nil {
			return n, true
		}
	}
	return names[0], false
}

func (c *commandSpec) pickInterpreter(r *resolved, path string) error {
	switch in := c.interpreter; {
	case in == "none":
		if c.noCheck {
			return nil
		}
		return checkProgram(path)
	case strings.HasPrefix(in, "node@"):
		node := c.env["NVM_DIR"] + "/versions/node/v" + strings.TrimPrefix(strings.TrimPrefix(in, "node@"), "v") + "/bin/node"
		if c.env["NVM_DIR"] == "" || checkProgram(node) != nil && !c.noCheck {
			return &interpreterError{fmt.Sprintf("%s asks for a Node of nvm that is not installed; run nvm install %s, or name the path of a node", in, strings.TrimPrefix(in, "node@"))}
		}
		r.interpreter = node
		return nil
	case in != "":
		if strings.Contains(in, "/") || strings.HasPrefix(in, "~") {
			r.interpreter = absPath(c.cwd, in, c.home)
			if err := checkProgram(r.interpreter); err != nil && !c.noCheck {
				return &interpreterError{err.Error()}
			}
			return nil
		}
		if _, ok := c.find(in); !ok && !c.noCheck {
			return &interpreterError{fmt.Sprintf("interpreter %s is not in PATH; install it or name its path", clip(in))}
		}
		return nil
	}
	var names []string
	ext := strings.ToLower(filepath.Ext(path))
	switch ext {
	case ".js", ".cjs", ".mjs", ".jsx":
		names = []string{"node", "nodejs"}
	case ".ts", ".tsx", ".mts", ".cts":
		names = []string{"bun", "ts-node", "tsx", "node"}
	case ".py":
		names = []string{"python", "python3"}
	case ".sh":
		names = []string{"bash", "sh"}
	case ".rb":
		names = []string{"ruby"}
	case ".php":
		names = []string{"php"}
	case ".pl":
		names = []string{"perl"}
	case ".coffee":
		names = []string{"coffee"}
	case ".ls":
		names = []string{"lsc"}
	default:
		r.interpreter = "none"
		if c.noCheck {
			return nil
		}
		return checkProgram(path)
	}
	name, ok := c.find(names...)
	r.interpreter = name
	if !ok && !c.noCheck {
		return &interpreterError{fmt.Sprintf("%s is run by %s, which is not in PATH; install it, or name an interpreter", filepath.Base(path), strings.Join(names, " or "))}
	}
	if name == "node" && strings.HasSuffix(strings.Trim(ext, ".cmx"), "ts") {
		r.warning = "neither bun nor ts-node is in PATH; node runs the TypeScript itself, which it can from version 22.18 on"
	}
	return nil
}

// CommandLine is `remuda start SCRIPT [flags] [-- ARGS]`: PM2's flags as the
// person gave them. Strings that are "" and slices that are nil were not
// given.
type CommandLine struct {
	Script string
	Args   []string
	Name, Namespace,
	Interpreter, // --interpreter; "none" runs Script itself
	NodeArgs, // --node-args, --interpreter-args: split like a shell's words
	Instances, // -i: "4", "max", "0", "-1"
	ExecMode, // "fork" (-x), "cluster"
	Cwd,
	Output, ErrorLog, Log, // -o, -e, -l
	LogDateFormat, LogType,
	MaxMemoryRestart, RestartDelay, ExpBackoffRestartDelay,
	MaxRestarts, MinUptime, KillTimeout, ListenTimeout,
	CronRestart, WatchDelay, UID, GID, Signal,
	InstanceVar, IncrementVar,
	MaxSurge string // "1", "25%"
	Watch         []string // --watch: nil not given, empty = Cwd
	IgnoreWatch   []string
	FilterEnv     []string
	StopExitCodes []string
	Time, MergeLogs, DisableLogs, WaitReady, ShutdownWithMessage,
	NoAutorestart, NoAutostart, NoTreekill bool
	// Environ is the caller's environment; nil means os.Environ().
	Environ []string
	// Env are further variables, NAME=value, over Environ.
	Env []string
	// CallerCwd is what relative paths are relative to, "" for the process's
	// own working directory.
	CallerCwd string
}

// FromCommand turns a command line into an app, with PM2's defaults. It goes
// the way of a PM2 file with one app, so the two cannot differ.
func FromCommand(c CommandLine) (App, []Warning, error) {
	opts := LoadOptions{Environ: c.Environ, Cwd: c.CallerCwd}
	if err := opts.complete(); err != nil {
		return App{}, nil, err
	}
	n := &node{kind: kMap}
	set := func(key string, v *node) { n.fields = append(n.fields, field{key: key, val: v}) }
	for _, f := range []struct{ key, val string }{
		{"script", c.Script}, {"name", c.Name}, {"namespace", c.Namespace}, {"interpreter", c.Interpreter},
		{"node_args", c.NodeArgs}, {"instances", c.Instances}, {"exec_mode", c.ExecMode}, {"cwd", c.Cwd},
		{"log_date_format", c.LogDateFormat}, {"log_type", c.LogType},
		{"max_memory_restart", c.MaxMemoryRestart}, {"restart_delay", c.RestartDelay}, {"exp_backoff_restart_delay", c.ExpBackoffRestartDelay},
		{"max_restarts", c.MaxRestarts}, {"min_uptime", c.MinUptime}, {"kill_timeout", c.KillTimeout}, {"listen_timeout", c.ListenTimeout},
		{"cron_restart", c.CronRestart}, {"uid", c.UID}, {"gid", c.GID}, {"kill_signal", c.Signal},
		{"instance_var", c.InstanceVar}, {"increment_var", c.IncrementVar}, {"max_surge", c.MaxSurge},
	} {
		if f.val != "" {
			set(f.key, &node{kind: kString, text: f.val})
		}
	}
	// PM2 takes these relative to the caller, not to --cwd.
	for _, f := range []struct{ key, val string }{{"out_file", c.Output}, {"error_file", c.ErrorLog}, {"log_file", c.Log}} {
		if f.val != "" {
			p := f.val
			if l := logPath(opts.Cwd, p, ""); !strings.HasPrefix(p, "~") {
				p = l
			}
			set(f.key, &node{kind: kString, text: p})
		}
	}
	if d := c.WatchDelay; d != "" {
		if isDigits(d) {
			d += "s" // --watch-delay 4 is seconds, unlike in a file
		}
		set("watch_delay", &node{kind: kString, text: d})
	}
	for _, f := range []struct {
		key  string
		vals []string
	}{{"args", c.Args}, {"ignore_watch", c.IgnoreWatch}, {"filter_env", c.FilterEnv}, {"stop_exit_codes", splitCommas(c.StopExitCodes)}, {"watch", c.Watch}} {
		if f.vals != nil {
			l := &node{kind: kList}
			for _, s := range f.vals {
				l.list = append(l.list, &node{kind: kString, text: s})
			}
			set(f.key, l)
		}
	}
	for _, f := range []struct {
		key string
		on  bool
		val string
	}{
		{"time", c.Time, "true"}, {"merge_logs", c.MergeLogs, "true"}, {"disable_logs", c.DisableLogs, "true"}, {"wait_ready", c.WaitReady, "true"},
		{"shutdown_with_message", c.ShutdownWithMessage, "true"}, {"autorestart", c.NoAutorestart, "false"}, {"autostart", c.NoAutostart, "false"},
		{"treekill", c.NoTreekill, "false"},
	} {
		if f.on {
			set(f.key, &node{kind: kBool, text: f.val})
		}
	}
	env := &node{kind: kMap}
	for _, kv := range c.Env {
		name, val, ok := strings.Cut(kv, "=")
		if !ok {
			return App{}, nil, &Error{[]Problem{{Text: fmt.Sprintf("variable %s has no =; write NAME=value", clip(kv))}}}
		}
		env.fields = append(env.fields, field{key: name, val: &node{kind: kString, text: val}})
	}
	set("env", env)
	if c.Script == "" {
		return App{}, nil, &Error{[]Problem{{Text: "there is no program to start; name a script, a command or a process file"}}}
	}
	l := &pm2Loader{dir: opts.Cwd, opts: opts, environ: environMap(opts.Environ)}
	f := l.load(n)
	if err := l.err(); err != nil {
		return App{}, l.warnings, err
	}
	return f.Apps[0], l.warnings, nil
}

func splitCommas(list []string) []string {
	var out []string
	for _, s := range list {
		parts, _ := commas(s)
		out = append(out, parts...)
	}
	return out
}
