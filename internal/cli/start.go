package cli

import (
	"context"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"slices"
	"strconv"
	"strings"

	"github.com/spf13/cobra"
	"github.com/spf13/pflag"

	"github.com/remuda-dev/remuda/client"
	"github.com/remuda-dev/remuda/internal/config"
)

// startFlags are the flags of start that are not the app's own.
type startFlags struct {
	env       []string // NAME of env_NAME, or NAME=value
	only      string
	force     bool
	updateEnv bool
	attach    bool // follow the logs of what was started
}

// optionalPaths is the value of --watch: with or without paths.
type optionalPaths struct{ to *[]string }

func (o optionalPaths) String() string { return "" }
func (o optionalPaths) Type() string   { return "paths" }
func (o optionalPaths) Set(s string) error {
	if *o.to == nil {
		*o.to = []string{}
	}
	if s != "." {
		*o.to = append(*o.to, words(s)...)
	}
	return nil
}

// words splits a list that is written with commas or blanks.
func words(s string) []string {
	return strings.FieldsFunc(s, func(r rune) bool { return r == ',' || r == ' ' })
}

func (c *cli) startCommand() *cobra.Command {
	var (
		app                   config.CommandLine
		own                   startFlags
		ignoreWatch, stopCode []string
		forkMode              bool
	)
	cmd := &cobra.Command{
		Use:     "start FILE|SCRIPT|COMMAND|TARGET… [-- ARGS…]",
		GroupID: groupApps,
		Short:   "Start programs and keep them running",
		Long: `Start what is named: the apps of a process file, a script, a program in PATH, a
whole command in quotes, or apps that are in the list and stopped. What follows
-- are the program's own arguments.

It returns when each app is ready or has failed; one that dies at once is told
with its last lines of stderr, and the exit code is 1.`,
		Example: `  remuda start app.js
  remuda start server.py --name api -i 2 -- --port 8080
  remuda start "bash -c 'while date; do sleep 1; done'" --name clock
  remuda start ecosystem.config.js --env production --only web,worker
  remuda start web`,
		ValidArgsFunction: c.completeTargetsAndFiles,
		Args: func(cmd *cobra.Command, args []string) error {
			if at := cmd.ArgsLenAtDash(); at >= 0 {
				args = args[:at]
			}
			return takes(1, -1)(cmd, args)
		},
	}
	f := cmd.Flags()
	f.SortFlags = false
	str := func(to *string, name, short, text string) { f.StringVarP(to, name, short, "", text) }
	str(&app.Name, "name", "n", "the app's `name` (default: that of the script)")
	str(&app.Instances, "instances", "i", "how many instances: a `number`, max, or -1 for one fewer than CPUs")
	str(&app.Namespace, "namespace", "", "the `namespace` it belongs to")
	str(&app.Interpreter, "interpreter", "", "the `program` that runs the script; none runs the script itself")
	f.VarPF(alias{&app.Interpreter}, "interpreter-alias", "a", "").Hidden = true
	str(&app.NodeArgs, "interpreter-args", "", "`arguments` of the interpreter")
	str(&app.NodeArgs, "node-args", "", "the same, by PM2's other name")
	str(&app.Cwd, "cwd", "", "the `folder` it runs in")
	f.StringArrayVar(&own.env, "env", nil, "`NAME`: use env_NAME of the process file; NAME=value: a variable for a script")
	f.BoolVarP(&forkMode, "fork", "x", false, "run in fork mode")
	str(&app.ExecMode, "exec-mode", "", "fork or cluster")
	watch := f.VarPF(optionalPaths{&app.Watch}, "watch", "", "restart when files change: in its folder, or in `paths` (--watch=src,lib)")
	watch.NoOptDefVal = "."
	f.StringArrayVar(&ignoreWatch, "ignore-watch", nil, "`globs` of files whose changes do not matter")
	str(&app.WatchDelay, "watch-delay", "", "the `time` to wait for further changes")
	str(&app.MaxMemoryRestart, "max-memory-restart", "", "restart when it takes more than this `size`, for example 300M")
	str(&app.MaxRestarts, "max-restarts", "", "give up after this `number` of unstable runs")
	str(&app.MinUptime, "min-uptime", "", "a run of this `duration` is a stable one")
	str(&app.RestartDelay, "restart-delay", "", "wait this `duration` before each restart")
	str(&app.ExpBackoffRestartDelay, "exp-backoff-restart-delay", "", "wait ever longer between restarts, from this `duration` on")
	str(&app.CronRestart, "cron-restart", "c", "restart by a cron `expression`")
	str(&app.CronRestart, "cron", "", "the same, by PM2's other name")
	f.BoolVar(&app.NoAutorestart, "no-autorestart", false, "do not restart it when it ends")
	f.BoolVar(&app.NoAutostart, "no-autostart", false, "add it to the list without starting it")
	f.BoolVar(&app.WaitReady, "wait-ready", false, "it is online when it sends the message ready")
	str(&app.ListenTimeout, "listen-timeout", "", "the `time` it may take to become ready")
	str(&app.KillTimeout, "kill-timeout", "k", "the `time` it may take to stop before it is killed")
	str(&app.Signal, "stop-signal", "", "the `signal` that asks it to stop")
	f.StringArrayVar(&stopCode, "stop-exit-codes", nil, "exit `codes` after which it is not restarted")
	f.BoolVar(&app.ShutdownWithMessage, "shutdown-with-message", false, "ask it to stop by the message shutdown in place of a signal")
	str(&app.Output, "output", "o", "the `file` for its output")
	str(&app.ErrorLog, "error", "e", "the `file` for its error output")
	str(&app.Log, "log", "l", "the `file` for both")
	str(&app.LogDateFormat, "log-date-format", "", "put the time before each line, in this `format` (YYYY-MM-DD HH:mm:ss)")
	f.BoolVar(&app.Time, "time", false, "put the time before each line")
	f.BoolVar(&app.MergeLogs, "merge-logs", false, "one log for all instances")
	f.BoolVar(&app.DisableLogs, "disable-logs", false, "keep no logs")
	str(&app.LogType, "log-type", "", "json: a JSON object for each line")
	str(&app.UID, "uid", "", "run as this `user`")
	str(&app.GID, "gid", "", "run as this `group`")
	str(&app.InstanceVar, "instance-var", "", "the `variable` that tells an instance its number (default: NODE_APP_INSTANCE)")
	str(&app.MaxSurge, "max-surge", "", "how many instances a reload replaces at a time, a `number` or a percentage; 0 stops the old one first")
	str(&app.IncrementVar, "increment-var", "", "a `variable` of the environment that grows by one from instance to instance")
	f.StringArrayVar(&app.FilterEnv, "filter-env", nil, "leave out variables whose names begin with `text`")
	f.BoolVar(&app.NoTreekill, "no-treekill", false, "stop only the program, not what it has started")
	f.StringVar(&own.only, "only", "", "only these `apps` of the process file")
	f.BoolVar(&own.updateEnv, "update-env", false, "give apps of the list the variables of this shell")
	f.BoolVarP(&own.force, "force", "f", false, "start a further app of the same name")
	for _, name := range []string{"no-vizion", "no-pmx", "no-daemon", "disable-source-map-support", "source-map-support"} {
		f.Bool(name, false, "taken for PM2's sake")
		_ = f.MarkHidden(name)
	}
	f.VarPF(alias{&app.UID}, "user", "u", "").Hidden = true
	f.BoolVar(&own.attach, "attach", false, "follow the logs once it is started")

	cmd.RunE = c.run(needClient, func(ctx context.Context, args []string) error {
		if at := cmd.ArgsLenAtDash(); at >= 0 {
			app.Args, args = args[at:], args[:at]
		}
		for _, s := range ignoreWatch {
			app.IgnoreWatch = append(app.IgnoreWatch, words(s)...)
		}
		for _, s := range stopCode {
			app.StopExitCodes = append(app.StopExitCodes, words(s)...)
		}
		if forkMode && app.ExecMode == "" {
			app.ExecMode = "fork"
		}
		app.Environ, app.CallerCwd = c.environ(), c.Cwd
		for _, e := range own.env {
			if strings.Contains(e, "=") {
				app.Env = append(app.Env, e)
			}
		}
		if f.Changed("no-daemon") {
			c.warn("--no-daemon is not carried out: `remuda daemon` stays in the foreground, for containers")
		}
		args = c.watchedFolders(f, args, &app)
		return c.start(ctx, f, args, app, own)
	})
	return cmd
}

// alias is a second spelling of a string flag.
type alias struct{ to *string }

func (a alias) String() string     { return "" }
func (a alias) Type() string       { return "string" }
func (a alias) Set(s string) error { *a.to = s; return nil }

// watchedFolders lets `--watch src` mean what it does in PM2, where the paths
// may follow as an argument of their own.
func (c *cli) watchedFolders(f *pflag.FlagSet, args []string, app *config.CommandLine) []string {
	if !f.Changed("watch") || len(args) < 2 {
		return args
	}
	rest := args[:1:1]
	for _, a := range args[1:] {
		path, err := c.abs(a)
		if err == nil {
			if st, err := os.Stat(path); err == nil && st.IsDir() {
				app.Watch = append(app.Watch, a)
				continue
			}
		}
		rest = append(rest, a)
	}
	return rest
}

// start starts what each argument names.
func (c *cli) start(ctx context.Context, f *pflag.FlagSet, args []string, app config.CommandLine, own startFlags) error {
	// All that can be wrong with a command line is found out before a daemon is
	// launched or anything started.
	type job struct {
		file   *config.File
		target string
		app    *config.App
	}
	var jobs []job
	for _, a := range args {
		switch {
		case c.isFile(a):
			file, err := c.load(ctx, a, own)
			if err != nil {
				return err
			}
			c.warnIgnored(f, a, `say it in the file`, "env", "only")
			jobs = append(jobs, job{file: file})
		case config.IsFile(a) && scriptEnding(a) && !c.exists(a):
			return hinted{fmt.Errorf("the process file %s does not exist", clip(a)), "`remuda init` writes one to begin with."}
		default:
			known, err := c.known(ctx, a, app.Name)
			if err != nil {
				return err
			}
			if known {
				c.warnIgnored(f, a, "which is in the list already: delete it first, or change the file it came from")
				jobs = append(jobs, job{target: a})
				continue
			}
			line := app
			line.Script = a
			made, warnings, err := config.FromCommand(line)
			c.warnings(warnings)
			if err != nil {
				return err
			}
			if app.Name == "" && !own.force {
				if err := c.sameName(ctx, a, &made); err != nil {
					return err
				}
			}
			jobs = append(jobs, job{app: &made})
		}
	}
	if err := c.launch(ctx); err != nil {
		return err
	}
	var all client.ActResult
	for _, j := range jobs {
		var (
			res client.ActResult
			err error
		)
		if j.target != "" {
			req := client.ActRequest{Verb: client.VerbStart, Targets: []string{j.target}}
			if own.updateEnv {
				req.Env = c.environment()
			}
			res, err = c.busy(ctx, "start", req.Targets, func() (client.ActResult, error) { return c.client.Act(ctx, req) })
		} else {
			req := client.StartRequest{Force: own.force}
			if j.app != nil {
				req.Apps = []config.App{*j.app}
			} else {
				req.Apps, req.Pools = j.file.Apps, j.file.Pools
			}
			res, err = c.busy(ctx, "start", appNames(req.Apps), func() (client.ActResult, error) { return c.client.Start(ctx, req) })
		}
		if err != nil {
			return err
		}
		all.Instances = append(all.Instances, res.Instances...)
		all.Pools = append(all.Pools, res.Pools...)
		all.Changes = append(all.Changes, res.Changes...)
		all.Warnings = append(all.Warnings, res.Warnings...)
	}
	err := c.result(ctx, all, "")
	if !own.attach || len(all.Instances) == 0 {
		return err
	}
	var ids []string
	for _, o := range all.Instances {
		ids = append(ids, strconv.Itoa(o.ID))
	}
	return errors.Join(err, c.logs(ctx, ids, logFlags{lines: 15}))
}

// sameName refuses to put a program in the place of another one only because
// their scripts are called the same: server.js of two folders, npm in two
// projects. A name that was given is meant.
func (c *cli) sameName(ctx context.Context, arg string, made *config.App) error {
	list, err := c.client.Describe(ctx, false, made.Name)
	if err != nil {
		return nil // there is none of that name, or the start will tell
	}
	path, err := c.abs(arg)
	if err != nil {
		return err
	}
	for k := range list {
		there := &list[k].Spec
		if list[k].App != made.Name || there.Script == made.Script && (there.Cwd == made.Cwd || path == made.Script) {
			continue
		}
		what := there.Script
		if what == made.Script {
			what += " in " + there.Cwd
		}
		return hinted{fmt.Errorf("an app named %s is in the list already and runs %s", clip(made.Name), clip(what)),
			fmt.Sprintf("--name NAME gives this one another name; --name %s puts it in the place of the other.", quote(made.Name))}
	}
	return nil
}

func appNames(apps []config.App) []string {
	names := make([]string, len(apps))
	for k := range apps {
		names[k] = apps[k].Name
	}
	return names
}

// known says whether an argument of start is an app of the list. A path or a
// name with the ending of a script never is, and a command with blanks is not
// where it is to get a name of its own.
func (c *cli) known(ctx context.Context, arg, name string) (bool, error) {
	regex := len(arg) > 1 && strings.HasPrefix(arg, "/") && strings.HasSuffix(arg, "/")
	words := strings.ContainsAny(arg, " \t\n")
	if !regex && (strings.Contains(arg, "/") || scriptEnding(arg) || words && name != "" && name != arg) {
		return false, nil
	}
	if words && !regex {
		list, err := c.client.List(ctx, arg)
		return err == nil && len(list) > 0, nil
	}
	_, err := c.client.List(ctx, arg)
	if errors.Is(err, client.ErrUnreachable) && !errors.Is(err, os.ErrPermission) && c.hasState() {
		// The daemon was lost, and what it ran may be what is meant.
		if err := c.launch(ctx); err != nil {
			return false, err
		}
		_, err = c.client.List(ctx, arg)
	}
	switch {
	case err == nil:
		return true, nil
	case errors.Is(err, client.ErrUnreachable) && !errors.Is(err, os.ErrPermission):
		if arg == "all" || regex {
			return false, err
		}
		return false, nil
	case errors.Is(err, client.ErrNoTarget):
		if arg == "all" || regex || isNumber(arg) {
			return false, err
		}
		return false, nil
	}
	return false, err
}

// hasState says whether the daemon's folder holds apps of a daemon before.
func (c *cli) hasState() bool {
	st, err := os.Stat(filepath.Join(c.client.Home(), "state.json"))
	return err == nil && st.Size() > 0
}

func (c *cli) exists(arg string) bool {
	path, err := c.abs(arg)
	if err == nil {
		_, err = os.Stat(path)
	}
	return !errors.Is(err, os.ErrNotExist)
}

func isNumber(s string) bool {
	return s != "" && strings.Trim(s, "0123456789") == ""
}

func scriptEnding(name string) bool {
	switch filepath.Ext(name) {
	case ".js", ".cjs", ".mjs", ".ts", ".tsx", ".mts", ".cts", ".py", ".sh", ".rb", ".pl", ".php", ".lua", ".json", ".yaml", ".yml", ".coffee", ".bash", ".jar":
		return true
	}
	return false
}

// load reads a process file and passes its warnings on.
func (c *cli) load(ctx context.Context, arg string, own startFlags) (*config.File, error) {
	path, err := c.abs(arg)
	if err != nil {
		return nil, err
	}
	opts := c.loadOptions()
	for _, e := range own.env {
		if !strings.Contains(e, "=") {
			opts.Env = e
		}
	}
	if own.only != "" {
		opts.Only = words(own.only)
	}
	file, warnings, err := config.Load(ctx, path, opts)
	c.warnings(warnings)
	return file, err
}

// startFile starts the apps of one file.
func (c *cli) startFile(ctx context.Context, arg string, own startFlags) error {
	file, err := c.load(ctx, arg, own)
	if err != nil {
		return err
	}
	res, err := c.busy(ctx, "start", appNames(file.Apps), func() (client.ActResult, error) {
		return c.client.Start(ctx, client.StartRequest{Apps: file.Apps, Pools: file.Pools, Force: own.force})
	})
	if err != nil {
		return err
	}
	return c.result(ctx, res, "")
}

// warnIgnored tells of flags that say how a script is to be run, given with
// something that says that itself: a process file, an app of the list. fine are
// further flags that mean something there.
func (c *cli) warnIgnored(f *pflag.FlagSet, what, instead string, fine ...string) {
	fine = append(fine, "update-env", "force", "json", "home", "timeout", "no-color", "silent", "mini-list", "no-daemon", "attach", "no-vizion", "no-pmx")
	f.Visit(func(x *pflag.Flag) {
		if !slices.Contains(fine, x.Name) {
			c.warn(fmt.Sprintf("--%s is for scripts and was not applied to %s; %s", x.Name, clip(what), instead))
		}
	})
}
