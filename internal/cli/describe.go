package cli

import (
	"context"
	"fmt"
	"maps"
	"slices"
	"strconv"
	"strings"
	"time"

	"github.com/spf13/cobra"

	"github.com/remuda-dev/remuda/client"
	"github.com/remuda-dev/remuda/internal/config"
)

func since(t time.Time) string {
	if t.IsZero() {
		return "-"
	}
	return span(time.Since(t))
}

func (c *cli) describeCommand() *cobra.Command {
	cmd := &cobra.Command{
		Use:     "describe TARGET…",
		Aliases: []string{"desc", "info", "show"},
		GroupID: groupLook,
		Short:   "Tell everything of an app",
		Long:    "Tell everything of each instance: what runs and how, where its logs are, how its\nlast run ended. `remuda env` shows its environment.",
		Example: `  remuda describe web
  remuda describe 0 --json`,
		Args:              takes(1, -1),
		ValidArgsFunction: c.completeTargets,
	}
	secrets := cmd.Flags().Bool("secrets", false, "with --json: show the values of variables that look like secrets")
	cmd.RunE = c.run(needClient, func(ctx context.Context, args []string) error {
		list, err := c.client.Describe(ctx, *secrets, args...)
		if err != nil {
			return err
		}
		pools, err := c.client.DescribePools(ctx, *secrets, args...)
		if err != nil { // a daemon before there were pools
			pools = nil
		}
		if c.json {
			all := make([]any, 0, len(list)+len(pools))
			for k := range list {
				all = append(all, list[k])
			}
			for k := range pools {
				all = append(all, pools[k])
			}
			return c.writeJSON(all)
		}
		now := time.Now()
		p := c.paint(c.Stdout)
		for k := range list {
			if k > 0 {
				c.printf("\n")
			}
			c.printf("%s", description(&list[k], p, now))
		}
		for k := range pools {
			if k > 0 || len(list) > 0 {
				c.printf("\n")
			}
			c.printf("%s", poolDescription(&pools[k], p))
		}
		return nil
	})
	return cmd
}

// description is one instance in blocks of keys and values.
func description(d *client.Detail, p paint, now time.Time) string {
	var b strings.Builder
	type pair struct{ key, value string }
	block := func(title string, pairs ...pair) {
		if b.Len() > 0 {
			b.WriteByte('\n')
		}
		b.WriteString(p.bold(title) + "\n")
		for _, kv := range pairs {
			if kv.value != "" {
				fmt.Fprintf(&b, "  %-16s %s\n", kv.key, kv.value)
			}
		}
	}
	spec := &d.Spec
	running, up := "", ""
	if d.PID != 0 {
		running, up = strconv.Itoa(d.PID), span(now.Sub(d.Since))+" (since "+stamp(d.Since)+")"
	}
	next := ""
	if d.NextStart != nil {
		next = "in " + brief(d.NextStart.Sub(now)) + " (" + stamp(*d.NextStart) + ")"
	}
	last := ""
	if d.LastExit != nil {
		last = oneLine(ended(*d.LastExit)) + ", " + stamp(d.LastExit.At)
	}
	block(fmt.Sprintf("%s (id %d)", instanceName(d.Instance), d.ID),
		pair{"status", p.state(d.State, label(string(d.State)))},
		pair{"reason", oneLine(d.Reason)},
		pair{"pid", running},
		pair{"uptime", up},
		pair{"restarts", fmt.Sprintf("%d (unstable: %d)", d.Restarts, d.Unstable)},
		pair{"next start", next},
		pair{"last exit", last},
		pair{"cpu", strconv.FormatFloat(d.CPU, 'f', 1, 64) + "%"},
		pair{"memory", size(d.Memory)},
		pair{"user", label(d.User)},
		pair{"namespace", label(d.Namespace)},
		pair{"version", label(d.Version)},
		pair{"created", stamp(d.Created)},
	)
	group := ""
	if spec.Strategy != "" {
		group = label(spec.Strategy)
	}
	var needs []string
	for _, k := range slices.Sorted(maps.Keys(spec.DependsOn)) {
		needs = append(needs, label(k)+" ("+label(spec.DependsOn[k])+")")
	}
	block("Program",
		pair{"command", commandLine(spec.Command)},
		pair{"script", label(spec.Script)},
		pair{"interpreter", label(spec.Interpreter)},
		pair{"cwd", label(spec.Cwd)},
		pair{"mode", modeWords(d)},
		pair{"sockets", socketWords(spec.Sockets)},
		pair{"instances", strconv.Itoa(spec.Instances)},
		pair{"max surge", label(spec.MaxSurge)},
		pair{"variables", plural(len(spec.Env), "variable") + " (`remuda env " + strconv.Itoa(d.ID) + "`)"},
		pair{"from", label(spec.Source)},
		pair{"depends on", strings.Join(needs, ", ")},
		pair{"group", group},
	)
	watch := ""
	if spec.Watch != nil {
		watch = label(strings.Join(spec.Watch.Paths, ", "))
		if len(spec.Watch.Ignore) > 0 {
			watch += ", not " + label(strings.Join(spec.Watch.Ignore, ", "))
		}
	}
	block("Supervision",
		pair{"restart", restartWords(d)},
		pair{"memory limit", limitSize(spec.Restart.MaxMemory)},
		pair{"cron", label(spec.Restart.Cron)},
		pair{"ready", readyWords(d)},
		pair{"stop", stopWords(d)},
		pair{"watch", watch},
	)
	trouble := oneLine(d.LogTrouble)
	if d.LogLost > 0 {
		trouble = strings.TrimSpace(trouble + fmt.Sprintf(" (%s lost)", size(d.LogLost)))
	}
	block("Logs",
		pair{"output", label(d.OutPath)},
		pair{"errors", label(d.ErrPath)},
		pair{"trouble", trouble},
	)
	if len(d.LastErr) > 0 {
		block("Last lines of stderr")
		for _, l := range stderrLines(d.LastErr, allStderrLines) {
			b.WriteString(l + "\n")
		}
	}
	return b.String()
}

func modeWords(d *client.Detail) string {
	if d.Spec.Sticky {
		return label(d.ExecMode) + ", sticky"
	}
	return label(d.ExecMode)
}

func socketWords(list []config.Socket) string {
	var words []string
	for _, s := range list {
		words = append(words, label(s.String()))
	}
	return strings.Join(words, ", ")
}

func limitSize(n int64) string {
	if n <= 0 {
		return ""
	}
	return size(n)
}

func restartWords(d *client.Detail) string {
	r := d.Spec.Restart
	s := label(r.Policy)
	if r.MaxRestarts >= 0 {
		if r.Window > 0 {
			s += fmt.Sprintf(", at most %d within %s", r.MaxRestarts, time.Duration(r.Window))
		} else {
			s += fmt.Sprintf(", at most %d unstable runs in a row", r.MaxRestarts)
		}
	}
	if r.BackoffInitial > 0 {
		s += fmt.Sprintf(", backoff %s to %s", time.Duration(r.BackoffInitial), time.Duration(r.BackoffMax))
	} else if r.Delay > 0 {
		s += fmt.Sprintf(", after %s", time.Duration(r.Delay))
	}
	if len(r.StopExitCodes) > 0 {
		s += fmt.Sprintf(", not after exit codes %v", r.StopExitCodes)
	}
	return s
}

func readyWords(d *client.Detail) string {
	r := d.Spec.Ready
	what := r.Address + r.URL + r.Pattern + commandLine(r.Command)
	switch {
	case (r.Type == "" || r.Type == "none") && d.Spec.ExecMode == "cluster":
		return "when it listens"
	case r.Type == "" || r.Type == "none":
		return "when it has started"
	case what == "":
		return fmt.Sprintf("%s, within %s", label(r.Type), time.Duration(r.Timeout))
	}
	return fmt.Sprintf("%s %s, within %s", label(r.Type), label(what), time.Duration(r.Timeout))
}

func stopWords(d *client.Detail) string {
	s := label(d.Spec.Stop.Signal)
	if d.Spec.Stop.Message {
		s = "message shutdown"
	}
	return fmt.Sprintf("%s, SIGKILL after %s", s, time.Duration(d.Spec.Stop.Grace))
}

// commandLine writes an argv so that a shell would read it the same.
func commandLine(argv []string) string {
	var words []string
	for _, a := range argv {
		words = append(words, quote(a))
	}
	return strings.Join(words, " ")
}

func quote(s string) string {
	plain := func(r rune) bool {
		return r >= 'a' && r <= 'z' || r >= 'A' && r <= 'Z' || r >= '0' && r <= '9' || strings.ContainsRune("_-./:=@%+,", r)
	}
	if s != "" && strings.TrimFunc(s, plain) == "" {
		return s
	}
	if q := label(s); q != s {
		return "$'" + strings.ReplaceAll(q, "'", `\'`) + "'"
	}
	return "'" + strings.ReplaceAll(s, "'", `'\''`) + "'"
}

func (c *cli) envCommand() *cobra.Command {
	cmd := &cobra.Command{
		Use:     "env TARGET",
		GroupID: groupLook,
		Short:   "Show the environment of an instance",
		Long:    "Show the variables an instance has, as a shell would read them. Values of variables\nwhose names look like secrets are masked unless --secrets is given.",
		Example: `  remuda env 0
  remuda env web --secrets`,
		Args:              takes(1, 1),
		ValidArgsFunction: c.completeOneTarget,
	}
	secrets := cmd.Flags().Bool("secrets", false, "show the values of variables that look like secrets")
	cmd.RunE = c.run(needClient, func(ctx context.Context, args []string) error {
		list, err := c.client.Describe(ctx, *secrets, args...)
		if err != nil {
			return err
		}
		if c.json {
			out := map[string]map[string]string{}
			for k := range list {
				env := list[k].Env
				if env == nil {
					env = map[string]string{}
				}
				out[strconv.Itoa(list[k].ID)] = env
			}
			return c.writeJSON(out)
		}
		for k := range list {
			if len(list) > 1 {
				if k > 0 {
					c.printf("\n")
				}
				c.printf("# %s (id %d)\n", instanceName(list[k].Instance), list[k].ID)
			}
			for _, name := range slices.Sorted(maps.Keys(list[k].Env)) {
				c.printf("%s=%s\n", label(name), quote(list[k].Env[name]))
			}
		}
		return nil
	})
	return cmd
}

func (c *cli) pidCommand() *cobra.Command {
	return &cobra.Command{
		Use:     "pid [TARGET…]",
		GroupID: groupLook,
		Short:   "Print the process ids of apps",
		Long:    "Print the process id of each instance that runs, one a line.",
		Example: `  remuda pid web
  kill -USR2 $(remuda pid web)`,
		Args:              takes(0, -1),
		ValidArgsFunction: c.completeTargets,
		RunE: c.run(needClient, func(ctx context.Context, args []string) error {
			list, err := c.client.List(ctx, args...)
			if err != nil {
				return err
			}
			pids := []int{}
			for k := range list {
				if list[k].PID != 0 {
					pids = append(pids, list[k].PID)
				}
			}
			if c.json {
				return c.writeJSON(pids)
			}
			for _, pid := range pids {
				c.printf("%d\n", pid)
			}
			return nil
		}),
	}
}
