package cli

import (
	"cmp"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"time"

	"github.com/spf13/cobra"

	"github.com/remuda-dev/remuda/client"
)

func (c *cli) listCommand() *cobra.Command {
	var sortBy string
	cmd := &cobra.Command{
		Use:     "list [TARGET…]",
		Aliases: []string{"ls", "ps", "l", "status"},
		GroupID: groupLook,
		Short:   "Show the apps in a table",
		Long: `Show every instance, or those that a target matches.

Where the terminal is narrow the less important columns are left out. Below the
table is told what is wrong.`,
		Example: `  remuda list
  remuda ls --sort memory:desc
  remuda list --json | jq '.[].pid'`,
		Args:              takes(0, -1),
		ValidArgsFunction: c.completeTargets,
		RunE: c.run(needClient, func(ctx context.Context, args []string) error {
			order, err := sorting(sortBy)
			if err != nil {
				return err
			}
			list, err := c.client.List(ctx, args...)
			if nothingRuns(err) && len(args) == 0 {
				c.sayNone(err)
				list, err = nil, nil
			}
			if err != nil {
				return err
			}
			if order != nil {
				slices.SortStableFunc(list, order)
			}
			if c.json {
				return c.writeJSON(notNil(list))
			}
			c.overview(ctx, list, args...)
			return nil
		}),
	}
	cmd.Flags().StringVar(&sortBy, "sort", "", "order by a `field`: id, name, namespace, pid, uptime, restarts, status, cpu, memory; field:desc turns it round")
	return cmd
}

// nothingRuns says whether there is no daemon at all: not one of somebody else,
// nor one that is in trouble.
func nothingRuns(err error) bool {
	return errors.Is(err, client.ErrUnreachable) && !errors.Is(err, os.ErrPermission) && !headless(err)
}

// sayNone tells that no daemon runs, and of the apps of one that was lost.
func (c *cli) sayNone(err error) {
	c.say("%s", err)
	if n := stateApps(filepath.Join(c.client.Home(), "state.json")); n > 0 {
		c.say("its list holds %s: `remuda start all` brings them back", plural(n, "app"))
	}
}

// stateApps is how many apps a state file holds, 0 where it cannot be read.
func stateApps(path string) int {
	var state struct{ Apps []json.RawMessage }
	if b, err := os.ReadFile(path); err != nil || json.Unmarshal(b, &state) != nil {
		return 0
	}
	return len(state.Apps)
}

func notNil[T any](s []T) []T {
	if s == nil {
		return []T{}
	}
	return s
}

// sorting is the order that --sort asks for, nil for none.
func sorting(by string) (func(a, b client.Instance) int, error) {
	if by == "" {
		return nil, nil
	}
	field, way, _ := strings.Cut(by, ":")
	var f func(a, b client.Instance) int
	switch field {
	case "id", "pm_id":
		f = func(a, b client.Instance) int { return cmp.Compare(a.ID, b.ID) }
	case "name":
		f = func(a, b client.Instance) int {
			return cmp.Or(cmp.Compare(a.App, b.App), cmp.Compare(a.Index, b.Index))
		}
	case "namespace":
		f = func(a, b client.Instance) int { return cmp.Compare(a.Namespace, b.Namespace) }
	case "pid":
		f = func(a, b client.Instance) int { return cmp.Compare(a.PID, b.PID) }
	case "uptime":
		f = func(a, b client.Instance) int { return b.Since.Compare(a.Since) }
	case "restarts":
		f = func(a, b client.Instance) int { return cmp.Compare(a.Restarts, b.Restarts) }
	case "status", "state":
		f = func(a, b client.Instance) int { return cmp.Compare(a.State, b.State) }
	case "cpu":
		f = func(a, b client.Instance) int { return cmp.Compare(a.CPU, b.CPU) }
	case "memory", "mem":
		f = func(a, b client.Instance) int { return cmp.Compare(a.Memory, b.Memory) }
	default:
		hint := "fields: id, name, namespace, pid, uptime, restarts, status, cpu, memory"
		if s := nearest(field, []string{"id", "name", "namespace", "pid", "uptime", "restarts", "status", "cpu", "memory"}); s != "" {
			hint = "did you mean " + s + "? " + hint
		}
		return nil, usage(hint, "--sort %q: no such field", clip(field))
	}
	switch way {
	case "", "asc":
		return f, nil
	case "desc":
		return func(a, b client.Instance) int { return f(b, a) }, nil
	}
	return nil, usage("", "--sort %q: the order is asc or desc", clip(by))
}

// overview prints instances and pools. Where there are only pools, only those.
func (c *cli) overview(ctx context.Context, list []client.Instance, targets ...string) {
	pools, err := c.client.Pools(ctx, targets...)
	if err != nil { // a daemon before there were pools
		pools = nil
	}
	if len(list) > 0 || len(pools) == 0 {
		c.table(list)
	}
	if len(list) > 0 && len(pools) > 0 {
		c.printf("\n")
	}
	if len(pools) > 0 {
		c.poolTable(pools)
	}
}

// table prints instances and what is wrong with them.
func (c *cli) table(list []client.Instance) {
	now := time.Now()
	p := c.paint(c.Stdout)
	out := arrange(list, c.columns(c.Stdout), now).render(list, p)
	out += troubles(list, p, now)
	fmt.Fprint(c.Stdout, out)
}

// Bounds of what is told below the table.
const (
	maxTroubles    = 10
	maxStderrLines = 5
	// … and of a program that was just started in vain: a whole stack trace.
	allStderrLines = 30
)

// troubles is what is wrong with instances, in lines.
func troubles(list []client.Instance, p paint, now time.Time) string {
	var b strings.Builder
	told, more := 0, 0
	for k := range list {
		i := &list[k]
		lines := trouble(i, now)
		if len(lines) == 0 {
			continue
		}
		if told == maxTroubles {
			more++
			continue
		}
		if told == 0 {
			b.WriteByte('\n')
		}
		told++
		for n, l := range lines {
			if n == 0 {
				l = p.state(i.State, fmt.Sprintf("%s (id %d) %s", instanceName(*i), i.ID, i.State)) + l
			}
			b.WriteString(l + "\n")
		}
	}
	if more > 0 {
		fmt.Fprintf(&b, "… and %d more: `remuda describe TARGET` tells of each.\n", more)
	}
	return b.String()
}

// trouble is what is wrong with one instance: the first line goes on after its
// name and state.
func trouble(i *client.Instance, now time.Time) []string {
	var lines []string
	switch i.State {
	case client.Errored, client.Unready, client.Backoff:
		why := oneLine(i.Reason)
		if why == "" && i.LastExit != nil {
			why = oneLine(ended(*i.LastExit))
		}
		if i.NextStart != nil && i.State == client.Backoff {
			why = strings.TrimPrefix(why+fmt.Sprintf("; next try in %s", brief(i.NextStart.Sub(now))), "; ")
		}
		if why != "" {
			why = ": " + why
		}
		lines = append(lines, why)
		if i.State == client.Errored {
			lines = append(lines, stderrLines(i.LastErr, maxStderrLines)...)
		}
	}
	if i.LogTrouble != "" {
		s := ": output cannot be written: " + oneLine(i.LogTrouble)
		if i.LogLost > 0 {
			s += fmt.Sprintf(" (%s lost so far)", size(i.LogLost))
		}
		if len(lines) == 0 {
			lines = append(lines, s)
		} else {
			lines = append(lines, "  "+s[2:])
		}
	}
	return lines
}

// stderrLines are the last lines of stderr, marked as such.
func stderrLines(last []string, most int) []string {
	if n := len(last) - most; n > 0 {
		last = last[n:]
	}
	var out []string
	for _, l := range last {
		out = append(out, "  | "+clean(strings.TrimRight(l, "\r\n"), 500))
	}
	return out
}

// oneLine is [clean] for reasons.
func oneLine(s string) string {
	return clean(strings.ReplaceAll(strings.TrimSpace(s), "\n", "; "), 500)
}

// brief is a wait: to a tenth of a second below ten seconds.
func brief(d time.Duration) string {
	if d <= 0 {
		return "0s"
	}
	if d < 10*time.Second {
		return d.Round(100 * time.Millisecond).String()
	}
	return span(d)
}

func (c *cli) jlistCommand() *cobra.Command {
	cmd := &cobra.Command{
		Use:     "jlist [TARGET…]",
		GroupID: groupLook,
		Short:   "Print the apps as JSON with PM2's field names",
		Long: `Print every instance as JSON in the shape of PM2's jlist: pid, name, pm_id,
monit.memory, monit.cpu, pm2_env.status, pm2_env.restart_time, …

Values of variables whose names look like secrets are masked unless --secrets is
given. ` + "`remuda list --json`" + ` has Remuda's own, shorter form.`,
		Example: `  remuda jlist
  remuda jlist | jq '.[] | {name, pid, status: .pm2_env.status}'`,
		Args:              takes(0, -1),
		ValidArgsFunction: c.completeTargets,
	}
	secrets := cmd.Flags().Bool("secrets", false, "show the values of variables that look like secrets")
	cmd.RunE = c.run(needClient, func(ctx context.Context, args []string) error {
		return c.jlist(ctx, args, *secrets, c.isTerminal(c.Stdout) && c.json)
	})
	return cmd
}

func (c *cli) prettylistCommand() *cobra.Command {
	cmd := &cobra.Command{
		Use:               "prettylist [TARGET…]",
		GroupID:           groupLook,
		Short:             "Print jlist indented",
		Example:           `  remuda prettylist`,
		Args:              takes(0, -1),
		ValidArgsFunction: c.completeTargets,
	}
	secrets := cmd.Flags().Bool("secrets", false, "show the values of variables that look like secrets")
	cmd.RunE = c.run(needClient, func(ctx context.Context, args []string) error {
		return c.jlist(ctx, args, *secrets, true)
	})
	return cmd
}

func (c *cli) jlist(ctx context.Context, targets []string, secrets, indent bool) error {
	list, err := c.client.Describe(ctx, secrets, targets...)
	if nothingRuns(err) && len(targets) == 0 {
		c.sayNone(err)
		list, err = nil, nil
	}
	if err != nil {
		return err
	}
	out := make([]map[string]any, 0, len(list))
	for k := range list {
		out = append(out, pm2Process(&list[k], c.client.Home()))
	}
	return c.encode(out, indent)
}
