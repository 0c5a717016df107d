package cli

import (
	"context"
	"fmt"
	"io/fs"
	"os"
	"regexp"
	"slices"
	"strconv"
	"strings"
	"time"

	"github.com/spf13/cobra"
	"golang.org/x/sys/unix"

	"github.com/remuda-dev/remuda/client"
	"github.com/remuda-dev/remuda/internal/config"
)

// loadOptions are the circumstances of this call, for config.
func (c *cli) loadOptions() config.LoadOptions {
	return config.LoadOptions{Environ: c.environ(), Cwd: c.Cwd}
}

// isFile says whether an argument names a process file that is there.
func (c *cli) isFile(arg string) bool {
	if !config.IsFile(arg) {
		return false
	}
	path, err := c.abs(arg)
	if err != nil {
		return false
	}
	st, err := os.Stat(path)
	return err == nil && st.Mode()&fs.ModeDir == 0
}

// targets puts the names of its apps in the place of a process file.
func (c *cli) targets(ctx context.Context, args []string) ([]string, error) {
	var out []string
	for _, a := range args {
		if len(a) > 2 && a[0] == '/' && a[len(a)-1] == '/' {
			if _, err := regexp.Compile(a[1 : len(a)-1]); err != nil {
				return nil, usage("", "target %s: %v", clip(a), err)
			}
		}
		if !c.isFile(a) {
			out = append(out, a)
			continue
		}
		path, err := c.abs(a)
		if err != nil {
			return nil, err
		}
		opts := c.loadOptions()
		opts.NoCheck = true
		file, _, err := config.Load(ctx, path, opts)
		if err != nil {
			return nil, err
		}
		for _, app := range file.Apps {
			if !slices.Contains(out, app.Name) {
				out = append(out, app.Name)
			}
		}
		for _, p := range file.Pools {
			if !slices.Contains(out, p.Name) {
				out = append(out, p.Name)
			}
		}
	}
	return out, nil
}

// environment is the caller's, for --update-env. What tells of the shell
// rather than of the person is left out.
func (c *cli) environment() map[string]string {
	env := map[string]string{}
	for _, kv := range c.environ() {
		k, v, ok := strings.Cut(kv, "=")
		if !ok || k == "" || k == "_" || k == "SHLVL" || k == "PWD" || k == "OLDPWD" {
			continue
		}
		env[k] = v
	}
	return env
}

// act carries out a verb and shows what became of it.
func (c *cli) act(ctx context.Context, req client.ActRequest) error {
	var err error
	if req.Targets, err = c.targets(ctx, req.Targets); err != nil {
		return err
	}
	res, err := c.busy(ctx, string(req.Verb), req.Targets, func() (client.ActResult, error) { return c.client.Act(ctx, req) })
	if err != nil {
		return err
	}
	return c.result(ctx, res, verbWord(req.Verb))
}

// verbWord is what an instance is after a verb where its state does not say.
func verbWord(v client.Verb) string {
	switch v {
	case client.VerbDelete:
		return "deleted"
	case client.VerbReset:
		return "counters reset"
	case client.VerbFlush:
		return "logs emptied"
	case client.VerbReopen:
		return "logs opened anew"
	}
	return ""
}

// result prints what became of each instance and then the table. word is said
// in the place of a state.
func (c *cli) result(ctx context.Context, res client.ActResult, word string) error {
	return c.resultWith(res, word, func() error {
		list, err := c.client.List(ctx)
		if err != nil {
			return err
		}
		c.overview(ctx, list)
		return nil
	})
}

// resultWith is result with another table.
func (c *cli) resultWith(res client.ActResult, word string, table func() error) error {
	for _, w := range res.Warnings {
		c.warn(w)
	}
	failed := false
	for _, o := range res.Instances {
		failed = failed || o.Error != ""
	}
	for _, o := range res.Pools {
		failed = failed || o.Error != ""
	}
	if c.json {
		res.Instances = notNil(res.Instances)
		if err := c.writeJSON(res); err != nil {
			return err
		}
	} else {
		c.outcomes(res, word)
		c.poolOutcomes(res, word)
		if !c.silent {
			if err := table(); err != nil {
				return err
			}
		}
	}
	if failed {
		return errFailed
	}
	return nil
}

func (c *cli) outcomes(res client.ActResult, word string) {
	out, bad := c.paint(c.Stdout), c.paint(c.Stderr)
	for k := range res.Instances {
		o := &res.Instances[k]
		if o.Error != "" {
			for _, l := range failure(o, bad) {
				fmt.Fprintln(c.Stderr, l)
			}
			continue
		}
		if c.silent {
			continue
		}
		say := word
		if say == "" {
			say = out.state(o.State, label(string(o.State)))
			if o.PID != 0 {
				say += fmt.Sprintf(" (pid %d)", o.PID)
			}
		}
		c.printf("[%s] %s\n", instanceName(o.Instance), say)
	}
}

// failure tells why an instance is not what was asked for.
func failure(o *client.Outcome, p paint) []string {
	state := string(o.State)
	if (o.State == client.Starting || o.State == client.Stopping) && o.LastExit != nil {
		// It is on its way to another try already: what it is at this instant
		// tells nothing.
		state = "failed"
	}
	head := fmt.Sprintf("[%s] %s: %s", instanceName(o.Instance), label(state), oneLine(o.Error))
	if o.LastExit != nil && o.State != client.Online {
		how := oneLine(ended(*o.LastExit))
		said := strings.Contains(head, how) || o.LastExit.Signal == "" && strings.Contains(head, fmt.Sprintf("code %d", o.LastExit.Code)) ||
			o.LastExit.Signal != "" && strings.Contains(head, o.LastExit.Signal)
		if !said {
			head += "; last run: " + how
		}
	}
	return append([]string{p.red(head)}, stderrLines(o.LastErr, allStderrLines)...)
}

// Timing of the line that tells a waiting person what is waited for.
const (
	busyAfter = 500 * time.Millisecond
	busyEvery = time.Second
)

// busy runs call, and where that takes long and a person looks on, tells how
// far the targets are.
func (c *cli) busy(ctx context.Context, what string, names []string, call func() (client.ActResult, error)) (client.ActResult, error) {
	if c.silent || c.json || !c.isTerminal(c.Stderr) {
		return call()
	}
	done := make(chan struct{})
	told := make(chan struct{})
	go func() {
		defer close(told)
		begin := time.Now()
		next := time.NewTimer(busyAfter)
		defer next.Stop()
		shown := false
		for {
			select {
			case <-done:
				if shown {
					fmt.Fprint(c.Stderr, "\r\x1b[K")
				}
				return
			case <-next.C:
			}
			shown = true
			line := fmt.Sprintf("remuda: %s: %s (%s)", what, c.progress(ctx, names), span(time.Since(begin)))
			fmt.Fprint(c.Stderr, "\r\x1b[K"+fit(line, max(20, c.columns(c.Stderr)-1)))
			next.Reset(busyEvery)
		}
	}()
	res, err := call()
	close(done)
	<-told
	return res, err
}

// progress counts the states of the instances that are worked on.
func (c *cli) progress(ctx context.Context, names []string) string {
	ctx, cancel := context.WithTimeout(ctx, busyAfter)
	defer cancel()
	list, err := c.client.List(ctx, names...)
	if err != nil {
		return "waiting"
	}
	var order []client.State
	count := map[client.State]int{}
	for _, i := range list {
		if count[i.State] == 0 {
			order = append(order, i.State)
		}
		count[i.State]++
	}
	slices.Sort(order)
	var parts []string
	for _, s := range order {
		parts = append(parts, fmt.Sprintf("%d %s", count[s], s))
	}
	return strings.Join(parts, ", ")
}

// verbCommand is a command that carries out one verb on targets.
func (c *cli) verbCommand(verb client.Verb, use, short, long, example string) *cobra.Command {
	return &cobra.Command{
		Use: use, GroupID: groupApps, Short: short, Long: long, Example: example,
		Args:              takes(1, -1),
		ValidArgsFunction: c.completeTargetsAndFiles,
		RunE: c.run(needDaemon, func(ctx context.Context, args []string) error {
			return c.act(ctx, client.ActRequest{Verb: verb, Targets: args})
		}),
	}
}

func (c *cli) stopCommand() *cobra.Command {
	cmd := c.verbCommand(client.VerbStop, "stop TARGET…", "Stop apps, keeping them in the list",
		`Send the stop signal to each app and everything it has started, wait for its
grace period, then kill what is left. The app stays in the list: start runs it
again.`,
		`  remuda stop web
  remuda stop all
  remuda stop ecosystem.config.js`)
	sig := cmd.Flags().String("stop-signal", "", "the `signal` to ask with, in place of the app's own")
	cmd.RunE = c.run(needDaemon, func(ctx context.Context, args []string) error {
		return c.act(ctx, client.ActRequest{Verb: client.VerbStop, Targets: args, Signal: signalName(*sig)})
	})
	return cmd
}

func (c *cli) restartCommand() *cobra.Command {
	return c.restarting(client.VerbRestart, "restart TARGET…", "Stop apps and start them again",
		`Stop each app and start it again. With --update-env the app gets the variables
of this shell; a process file together with --update-env or --env is read again
and its apps are brought to what it says.`,
		`  remuda restart web
  PORT=8081 remuda restart web --update-env
  remuda restart ecosystem.config.js --env production`)
}

func (c *cli) reloadCommand() *cobra.Command {
	return c.restarting(client.VerbReload, "reload TARGET…", "Replace running instances one after another",
		`Start a new instance beside each old one, wait until it is ready, and stop the
old one: an app in cluster mode drops no request. An instance that does not
become ready is ended again while the old one goes on; that is told with its
last lines of stderr, and the exit code is 1.

Where two of an instance cannot run side by side, because they would open the
same port, the old one is stopped first.`,
		`  remuda reload web
  remuda reload all --update-env`)
}

func (c *cli) restarting(verb client.Verb, use, short, long, example string) *cobra.Command {
	cmd := c.verbCommand(verb, use, short, long, example)
	f := cmd.Flags()
	update := f.Bool("update-env", false, "give the apps the variables of this shell")
	env := f.String("env", "", "use the env_`NAME` part of a process file")
	var surge string
	if verb == client.VerbReload {
		f.StringVar(&surge, "max-surge", "", "how many instances to replace at a time, a `number` or a percentage; 0 stops the old one first")
	}
	cmd.RunE = c.run(needDaemon, func(ctx context.Context, args []string) error {
		var targets []string
		for _, a := range args {
			if !c.isFile(a) || (!*update && *env == "") {
				targets = append(targets, a)
				continue
			}
			if err := c.startFile(ctx, a, startFlags{env: []string{*env}}); err != nil {
				return err
			}
		}
		if len(targets) == 0 {
			return nil
		}
		req := client.ActRequest{Verb: verb, Targets: targets, MaxSurge: surge}
		if *update {
			req.Env = c.environment()
		}
		return c.act(ctx, req)
	})
	return cmd
}

func (c *cli) deleteCommand() *cobra.Command {
	cmd := c.verbCommand(client.VerbDelete, "delete TARGET…", "Stop apps and take them off the list",
		"Stop each app and forget it. Its log files stay.",
		`  remuda delete web
  remuda delete all`)
	cmd.Aliases = []string{"del"}
	return cmd
}

func (c *cli) resetCommand() *cobra.Command {
	return c.verbCommand(client.VerbReset, "reset TARGET…", "Set the restart counters to zero", "",
		`  remuda reset web
  remuda reset all`)
}

func (c *cli) flushCommand() *cobra.Command {
	cmd := c.verbCommand(client.VerbFlush, "flush [TARGET…]", "Empty the log files", "Empty the log files of every app, or of those that a target matches.",
		`  remuda flush
  remuda flush web`)
	cmd.GroupID = groupLook
	cmd.Args = takes(0, -1)
	cmd.RunE = c.run(needDaemon, func(ctx context.Context, args []string) error {
		return c.act(ctx, client.ActRequest{Verb: client.VerbFlush, Targets: orAll(args)})
	})
	return cmd
}

func (c *cli) reopenCommand() *cobra.Command {
	cmd := c.verbCommand(client.VerbReopen, "reloadLogs [TARGET…]", "Open the log files anew", "Open the log files anew, for example after logrotate has moved them away.",
		`  remuda reloadLogs`)
	cmd.GroupID = groupLook
	cmd.Args = takes(0, -1)
	cmd.RunE = c.run(needDaemon, func(ctx context.Context, args []string) error {
		return c.act(ctx, client.ActRequest{Verb: client.VerbReopen, Targets: orAll(args)})
	})
	return cmd
}

func orAll(targets []string) []string {
	if len(targets) == 0 {
		return []string{"all"}
	}
	return targets
}

func (c *cli) scaleCommand() *cobra.Command {
	return &cobra.Command{
		Use:     "scale APP N|+N|-N|max",
		GroupID: groupApps,
		Short:   "Set the number of instances of an app",
		Long:    "Set the number of instances of an app, or change it by so many; max is as many\nas there are CPUs.",
		Example: `  remuda scale web 4
  remuda scale web +2
  remuda scale web max`,
		Args:              takes(2, 2),
		ValidArgsFunction: c.completeOneTarget,
		RunE: c.run(needClient, func(ctx context.Context, args []string) error {
			app, to := args[0], args[1]
			if to != "max" {
				if n, err := strconv.Atoi(to); err != nil || n > 10000 || n < -10000 {
					return usage("usage: remuda scale APP N|+N|-N|max", "%q is not a number of instances", clip(to))
				}
			}
			if err := c.launch(ctx); err != nil {
				return err
			}
			res, err := c.busy(ctx, "scale", []string{app}, func() (client.ActResult, error) {
				return c.client.Scale(ctx, client.ScaleRequest{App: app, To: to})
			})
			if err != nil {
				return err
			}
			return c.result(ctx, res, "")
		}),
	}
}

func (c *cli) signalCommand() *cobra.Command {
	return &cobra.Command{
		Use:     "sendSignal SIGNAL TARGET…",
		GroupID: groupApps,
		Short:   "Send a signal to apps",
		Long:    "Send a signal to the processes of apps. A signal is a name with or without SIG, or\na number.",
		Example: `  remuda sendSignal SIGUSR2 web
  remuda sendSignal HUP all`,
		Args: takes(2, -1),
		ValidArgsFunction: func(cmd *cobra.Command, args []string, prefix string) ([]string, cobra.ShellCompDirective) {
			if len(args) == 0 {
				return []string{"SIGHUP", "SIGINT", "SIGTERM", "SIGUSR1", "SIGUSR2", "SIGQUIT", "SIGKILL", "SIGSTOP", "SIGCONT"}, cobra.ShellCompDirectiveNoFileComp
			}
			return c.completeTargets(cmd, args, prefix)
		},
		RunE: c.run(needDaemon, func(ctx context.Context, args []string) error {
			sig := signalName(args[0])
			if n, err := strconv.Atoi(sig); unix.SignalNum(sig) == 0 && (err != nil || n < 1 || n > 64) {
				return usage("`kill -l` lists the signals.", "%q is no signal", clip(args[0]))
			}
			res, err := c.client.Signal(ctx, client.SignalRequest{Targets: args[1:], Signal: sig})
			if err != nil {
				return err
			}
			return c.result(ctx, res, "sent "+label(sig))
		}),
	}
}

// signalName gives a name its SIG; numbers stay.
func signalName(s string) string {
	if _, err := strconv.Atoi(s); err == nil || s == "" {
		return s
	}
	s = strings.ToUpper(s)
	if !strings.HasPrefix(s, "SIG") {
		s = "SIG" + s
	}
	return s
}
