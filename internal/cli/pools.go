package cli

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"os"
	"slices"
	"strconv"
	"strings"
	"time"
	"unicode/utf8"

	"github.com/spf13/cobra"

	"github.com/remuda-dev/remuda/client"
)

// poolCommands are the commands about pools that the daemon keeps.
func (c *cli) poolCommands() []*cobra.Command {
	return []*cobra.Command{c.poolLsCommand(), c.poolStatsCommand(), c.poolDoCommand(), c.poolScaleCommand(), c.poolRestartCommand(), c.poolDrainCommand()}
}

// completePool offers the names of pools, for commands with one.
func (c *cli) completePool(cmd *cobra.Command, args []string, prefix string) ([]string, cobra.ShellCompDirective) {
	if len(args) > 0 {
		return nil, cobra.ShellCompDirectiveNoFileComp
	}
	return c.completePools(cmd, args, prefix)
}

func (c *cli) completePools(cmd *cobra.Command, args []string, prefix string) ([]string, cobra.ShellCompDirective) {
	if c.dial() != nil {
		return nil, cobra.ShellCompDirectiveNoFileComp
	}
	ctx, cancel := context.WithTimeout(cmd.Context(), completionLimit)
	defer cancel()
	list, err := c.client.Pools(ctx)
	if err != nil {
		return nil, cobra.ShellCompDirectiveNoFileComp
	}
	var names []string
	for k := range list {
		if n := list[k].Name; strings.HasPrefix(n, prefix) && !slices.Contains(args, n) && !strings.ContainsAny(n, "\t\n") {
			names = append(names, n+"\tpool")
		}
	}
	return names, cobra.ShellCompDirectiveNoFileComp
}

// namedPools are the pools of these names, all where none is given.
func (c *cli) namedPools(ctx context.Context, names []string) ([]client.PoolInfo, error) {
	list, err := c.client.Pools(ctx)
	if err != nil || len(names) == 0 {
		return list, err
	}
	var out []client.PoolInfo
	var all []string
	for k := range list {
		all = append(all, list[k].Name)
	}
	for _, name := range names {
		i := slices.IndexFunc(list, func(p client.PoolInfo) bool { return p.Name == name })
		if i < 0 {
			i = slices.IndexFunc(list, func(p client.PoolInfo) bool { return strconv.Itoa(p.ID) == name })
		}
		if i < 0 {
			return nil, noPool(name, all)
		}
		out = append(out, list[i])
	}
	return out, nil
}

func noPool(name string, all []string) error {
	hint := "`remuda pool ls` shows what there is."
	if len(all) == 0 {
		hint = "Pools are made by pools: in remuda.yaml and `remuda up`."
	}
	if s := nearest(name, all); s != "" {
		hint = fmt.Sprintf("did you mean %s?", label(s))
	}
	return hinted{&client.Error{Status: 404, Detail: fmt.Sprintf("no pool is called %q", clip(name))}, hint}
}

// noSuchPool adds where to look, where that is what is wrong.
func noSuchPool(err error) error {
	if errors.Is(err, client.ErrNoTarget) {
		return hinted{err, "`remuda pool ls` shows what there is."}
	}
	return err
}

func (c *cli) poolLsCommand() *cobra.Command {
	return &cobra.Command{
		Use:     "ls [NAME…]",
		Aliases: []string{"list"},
		Short:   "Show the pools that the daemon keeps",
		Long: `Show the pools that the daemon keeps: how many workers are up, how many of them
have a task, how many tasks wait, how many were done and how many failed, how long
half and 99 of 100 of them waited and ran, and what holds the pool up.`,
		Example: `  remuda pool ls
  remuda pool ls --json | jq '.[] | {name, queued: .stats.queued}'`,
		Args:              takes(0, -1),
		ValidArgsFunction: c.completePools,
		RunE: c.run(needClient, func(ctx context.Context, args []string) error {
			list, err := c.namedPools(ctx, args)
			none := nothingRuns(err) && len(args) == 0
			if none {
				c.sayNone(err)
				list, err = nil, nil
			}
			if err != nil {
				return err
			}
			if c.json {
				return c.writeJSON(notNil(list))
			}
			if none {
				return nil
			}
			if len(list) == 0 {
				c.say("there are no pools: pools: in remuda.yaml and `remuda up` make some")
				return nil
			}
			c.poolTable(list)
			return nil
		}),
	}
}

// poolColumn is a column of the table of pools; the higher its rank, the sooner
// it is left out where there is no room.
type poolColumn struct {
	title string
	right bool
	rank  int
	cell  func(p *client.PoolInfo) string
}

func poolColumns() []poolColumn {
	number := func(n uint64) string { return strconv.FormatUint(n, 10) }
	two := func(a, b time.Duration, n uint64) string {
		if n == 0 {
			return "-"
		}
		return short(a) + " " + short(b)
	}
	return []poolColumn{
		{"id", true, 3, func(p *client.PoolInfo) string { return strconv.Itoa(p.ID) }},
		{"pool", false, 0, func(p *client.PoolInfo) string { return fit(label(p.Name), 32) }},
		{"protocol", false, 7, func(p *client.PoolInfo) string { return label(p.Protocol) }},
		{"status", false, 0, func(p *client.PoolInfo) string { return label(string(p.State)) }},
		{"workers", true, 0, poolSize},
		{"busy", true, 1, func(p *client.PoolInfo) string { return strconv.Itoa(p.Stats.Busy) }},
		{"queued", true, 0, func(p *client.PoolInfo) string { return strconv.Itoa(p.Stats.Queued + p.Stats.Blocked) }},
		{"done", true, 2, func(p *client.PoolInfo) string { return number(p.Stats.Done) }},
		{"failed", true, 2, func(p *client.PoolInfo) string { return number(failedTasks(&p.Stats)) }},
		{"wait p50 p99", true, 5, func(p *client.PoolInfo) string { return two(p.Stats.Wait.P50, p.Stats.Wait.P99, p.Stats.Wait.Count) }},
		{"run p50 p99", true, 4, func(p *client.PoolInfo) string { return two(p.Stats.Run.P50, p.Stats.Run.P99, p.Stats.Run.Count) }},
		{"mem", true, 6, func(p *client.PoolInfo) string { return size(p.Memory) }},
		{"verdict", false, 3, func(p *client.PoolInfo) string { return dash(verdictWords(p.Stats.Verdict.Bottleneck)) }},
	}
}

// poolSize is how many workers are up of how many there shall be.
func poolSize(p *client.PoolInfo) string {
	s := fmt.Sprintf("%d/%d", p.Stats.Up, p.Stats.Size)
	if p.Stats.Min != p.Stats.Max {
		s += fmt.Sprintf(" (%d-%d)", p.Stats.Min, p.Stats.Max)
	}
	return s
}

// failedTasks are the tasks that came to no result through no wish of their
// callers.
func failedTasks(s *client.PoolStats) uint64 {
	return s.Failed + s.TimedOut + s.Lost + s.Dropped + s.Rejected + s.Poisoned + s.BreakerOpen
}

// verdictWords is a bottleneck in words.
func verdictWords(b string) string {
	switch b {
	case "startup_bound":
		return "worker start-up bound"
	case "ipc_bound":
		return "IPC bound"
	}
	return label(strings.ReplaceAll(b, "_", " "))
}

// short is a duration with three digits at most.
func short(d time.Duration) string {
	unit := time.Duration(1)
	for d/unit >= 1000 {
		unit *= 10
	}
	return d.Round(unit).String()
}

func (c *cli) poolTable(list []client.PoolInfo) {
	p := c.paint(c.Stdout)
	fmt.Fprint(c.Stdout, poolText(list, c.columns(c.Stdout), p))
}

// poolText is the table of pools, and below it what is wrong with them.
func poolText(list []client.PoolInfo, limit int, p paint) string {
	columns := poolColumns()
	widths := make([]int, len(columns))
	cells := make([][]string, len(columns))
	for k, col := range columns {
		widths[k] = width(col.title)
		for i := range list {
			s := col.cell(&list[i])
			cells[k] = append(cells[k], s)
			widths[k] = max(widths[k], width(s))
		}
	}
	for limit > 0 {
		total, worst := -len(gap), 0
		for k := range columns {
			total += widths[k] + len(gap)
			if columns[k].rank > columns[worst].rank {
				worst = k
			}
		}
		if total <= limit || columns[worst].rank == 0 {
			break
		}
		columns = slices.Delete(slices.Clone(columns), worst, worst+1)
		widths, cells = slices.Delete(widths, worst, worst+1), slices.Delete(cells, worst, worst+1)
	}
	var b strings.Builder
	for row := -1; row < len(list); row++ {
		for k, col := range columns {
			s := col.title
			if row >= 0 {
				s = cells[k][row]
			}
			pad := strings.Repeat(" ", widths[k]-width(s))
			switch {
			case row < 0:
				s = p.bold(s)
			case col.title == "status":
				s = p.state(list[row].State, s)
			}
			switch {
			case col.right:
				s = pad + s
			case k < len(columns)-1:
				s += pad
			}
			if k > 0 {
				b.WriteString(gap)
			}
			b.WriteString(s)
		}
		b.WriteByte('\n')
	}
	first := true
	for i := range list {
		for _, l := range poolTrouble(&list[i]) {
			if first {
				b.WriteByte('\n')
				first = false
			}
			b.WriteString(p.state(list[i].State, fmt.Sprintf("%s (id %d) %s", label(list[i].Name), list[i].ID, list[i].State)) + ": " + l + "\n")
		}
	}
	return b.String()
}

// poolTrouble is what is wrong with a pool, or not as usual.
func poolTrouble(p *client.PoolInfo) []string {
	var lines []string
	if p.Reason != "" {
		lines = append(lines, oneLine(p.Reason))
	}
	if p.LogTrouble != "" {
		lines = append(lines, "output cannot be written: "+oneLine(p.LogTrouble))
	}
	if p.Draining > 0 {
		lines = append(lines, plural(p.Draining, "task")+" of earlier workers still to be done")
	}
	if b := p.Stats.Breaker; b != nil && b.State != "closed" {
		s := "the breaker is " + label(b.State)
		if b.Cause != "" {
			s += "; it opened on: " + oneLine(b.Cause)
		}
		lines = append(lines, s)
	}
	return lines
}

func (c *cli) poolStatsCommand() *cobra.Command {
	return &cobra.Command{
		Use:     "stats NAME…",
		Short:   "Tell everything of a pool, and what holds it up",
		Long:    "Tell all figures of a pool and say in words what holds it up: workers that are all\nbusy, a queue that is empty, messages that take longer than the work, or workers\nthat take long to start.",
		Example: `  remuda pool stats thumbs`,
		Args:    takes(1, -1), ValidArgsFunction: c.completePools,
		RunE: c.run(needClient, func(ctx context.Context, args []string) error {
			list, err := c.namedPools(ctx, args)
			if err != nil {
				return err
			}
			if c.json {
				return c.writeJSON(list)
			}
			p := c.paint(c.Stdout)
			for k := range list {
				if k > 0 {
					c.printf("\n")
				}
				c.printf("%s", poolFigures(&list[k], p))
			}
			return nil
		}),
	}
}

// pairs is a block of keys and values.
type pairs [][2]string

func (ps pairs) write(b *strings.Builder, title string, p paint) {
	if b.Len() > 0 {
		b.WriteByte('\n')
	}
	b.WriteString(p.bold(title) + "\n")
	for _, kv := range ps {
		if kv[1] != "" {
			fmt.Fprintf(b, "  %-16s %s\n", kv[0], kv[1])
		}
	}
}

// poolFigures are all figures of a pool, in blocks.
func poolFigures(p *client.PoolInfo, paint paint) string {
	var b strings.Builder
	s := &p.Stats
	bounds := "fixed"
	if s.Min != s.Max {
		bounds = fmt.Sprintf("%d to %d", s.Min, s.Max)
	}
	var pids []string
	for _, pid := range p.PIDs {
		pids = append(pids, strconv.Itoa(pid))
	}
	earlier := ""
	if p.Draining > 0 {
		earlier = plural(p.Draining, "task") + " of earlier workers still to be done"
	}
	pairs{
		{"status", paint.state(p.State, label(string(p.State)))},
		{"reason", oneLine(p.Reason)},
		{"verdict", oneLine(s.Verdict.Reason)},
		{"advice", oneLine(s.Verdict.Advice)},
		{"protocol", label(p.Protocol)},
		{"since", since(p.Since)},
		{"draining", earlier},
	}.write(&b, fmt.Sprintf("%s (id %d)", label(p.Name), p.ID), paint)
	pairs{
		{"up", fmt.Sprintf("%d of %d (%s)", s.Up, s.Size, bounds)},
		{"spare", nonzero(uint64(s.Spare))},
		{"busy", strconv.Itoa(s.Busy)},
		{"utilization", percent(s.Utilization) + ", lately " + percent(s.Recent.Utilization)},
		{"cpu", strconv.FormatFloat(p.CPU, 'f', 1, 64) + "%"},
		{"memory", size(p.Memory)},
		{"died", nonzero(s.Died)},
		{"recycled", nonzero(s.Recycled)},
		{"pids", strings.Join(pids, " ")},
	}.write(&b, "Workers", paint)
	pairs{
		{"queued", fmt.Sprintf("%d (%d more wait for room in the queue)", s.Queued, s.Blocked)},
		{"running", strconv.Itoa(s.Running)},
		{"done", strconv.FormatUint(s.Done, 10)},
		{"failed", nonzero(s.Failed)},
		{"timed out", nonzero(s.TimedOut)},
		{"worker died", nonzero(s.Lost)},
		{"cancelled", nonzero(s.Cancelled)},
		{"rejected", nonzero(s.Rejected)},
		{"dropped", nonzero(s.Dropped)},
		{"poison", nonzero(s.Poisoned)},
		{"breaker", nonzero(s.BreakerOpen)},
		{"cached", nonzero(s.Cached)},
		{"tried again", nonzero(s.Retried)},
	}.write(&b, "Tasks", paint)
	pairs{
		{"in the queue", timesWords(s.Wait)},
		{"on a worker", timesWords(s.Run)},
		{"messages", timesWords(s.IPC)},
		{"worker's start", timesWords(s.Start)},
	}.write(&b, "Times", paint)
	if x := s.Breaker; x != nil {
		again := ""
		if x.RetryAfter > 0 {
			again = short(x.RetryAfter)
		}
		pairs{
			{"state", label(x.State)}, {"tries again in", again}, {"opened", fmt.Sprintf("%d times", x.Opened)}, {"refused", plural(int(x.Refused), "task")},
			{"cause", oneLine(x.Cause)},
		}.write(&b, "Breaker", paint)
	}
	if x := s.Cache; x != nil {
		pairs{
			{"kept", fmt.Sprintf("%s, %s", plural(x.Entries, "result"), size(x.Bytes))},
			{"hits", fmt.Sprintf("%d, and %d shared a task under way", x.Hits, x.Shared)},
			{"misses", strconv.FormatUint(x.Misses, 10)},
			{"gone", fmt.Sprintf("%d expired, %d made room", x.Expired, x.Evicted)},
		}.write(&b, "Cache", paint)
	}
	return b.String()
}

func percent(f float64) string { return fmt.Sprintf("%.0f%%", 100*f) }

func nonzero(n uint64) string {
	if n == 0 {
		return ""
	}
	return strconv.FormatUint(n, 10)
}

func timesWords(t client.PoolTimes) string {
	if t.Count == 0 {
		return ""
	}
	return fmt.Sprintf("p50 %s  p90 %s  p99 %s  max %s", short(t.P50), short(t.P90), short(t.P99), short(t.Max))
}

type poolDoFlags struct {
	client.PoolTask
	raw bool
}

func (c *cli) poolDoCommand() *cobra.Command {
	var o poolDoFlags
	cmd := &cobra.Command{
		Use:   "do NAME [TASK]",
		Short: "Have a pool do a task and print the result",
		Long: `Give a pool a task, the argument or what standard input holds, and print the
result. Interrupted or timed out (--timeout), the task is given up.

Exit code: 1 if the task failed, 3 if there is no such pool, 124 if it timed out.
With --json the result is {"result": …} and a failure {"error": {"kind": …}}.`,
		Example: `  remuda pool do thumbs --task resize '{"file": "a.png"}'
  remuda pool do jobs --priority 9 --timeout 10s < task.json`,
		Args: takes(1, 2), ValidArgsFunction: c.completePool,
	}
	f := cmd.Flags()
	f.StringVar(&o.Name, "task", "", "the `name` of the handler that is to do it (frames)")
	f.IntVarP(&o.Priority, "priority", "p", 0, "0 to 9, which goes first")
	f.DurationVar(&o.Timeout, "task-timeout", 0, "how long it may take on a worker (default: as the pool says)")
	f.StringVar(&o.Key, "key", "", "tasks of one `key` go to one worker (balance: consistent-hash)")
	f.StringVar(&o.CacheKey, "cache-key", "", "share the result with tasks of the same name and `key` (cache)")
	f.BoolVar(&o.Idempotent, "idempotent", false, "it may be done twice: try again where its worker dies")
	f.BoolVar(&o.raw, "raw", false, "print the result without adding a newline")
	cmd.RunE = c.run(needClient, func(ctx context.Context, args []string) error {
		if o.Priority < 0 || o.Priority > 9 {
			return usage("", "--priority %d: 0 to 9 are possible", o.Priority)
		}
		if o.Timeout < 0 {
			return usage("", "--task-timeout %s: must not be negative", o.Timeout)
		}
		return c.poolDo(ctx, args, o)
	})
	return cmd
}

// maxPoolTask bounds what standard input may hold.
const maxPoolTask = 64 << 20

func (c *cli) poolDo(ctx context.Context, args []string, o poolDoFlags) error {
	switch {
	case len(args) == 2:
		o.Body = []byte(args[1])
	case c.readsTerminal():
		return usage("usage: remuda pool do NAME [TASK]", "no task is given: name it, or put it on standard input")
	default:
		b, err := readAll(ctx, c.Stdin)
		if err != nil {
			return fmt.Errorf("cannot read the task: %w", err)
		}
		o.Body = b
	}
	r, err := c.client.Do(ctx, args[0], o.PoolTask)
	if err != nil {
		return c.poolFailure(ctx, noSuchPool(err))
	}
	if c.json {
		return c.writeJSON(map[string]any{
			"result": jsonBody(r.Body), "wait_ns": r.Wait, "run_ns": r.Run, "pid": r.PID, "attempts": r.Attempts, "cached": r.Cached,
		})
	}
	if !o.raw && !bytes.HasSuffix(r.Body, []byte("\n")) && utf8.Valid(r.Body) {
		r.Body = append(r.Body, '\n')
	}
	if _, err := c.Stdout.Write(r.Body); err != nil {
		return fmt.Errorf("cannot write the result: %w", err)
	}
	return nil
}

// jsonBody is a result as a value: as it is where it is JSON, else as a string.
func jsonBody(b []byte) any {
	if json.Valid(b) {
		return json.RawMessage(b)
	}
	return string(b)
}

// poolFailure is the exit of a task that failed.
func (c *cli) poolFailure(ctx context.Context, err error) error {
	var e *client.Error
	is := errors.As(err, &e) && e.Kind != ""
	if c.json && (is || errors.Is(err, client.ErrTaskLost)) {
		what := map[string]any{"kind": "lost", "message": err.Error()}
		if is {
			what["kind"] = e.Kind
			if e.Code != "" {
				what["code"] = e.Code
			}
			if len(e.Data) > 0 {
				what["data"] = e.Data
			}
		}
		if werr := c.writeJSON(map[string]any{"error": what}); werr != nil {
			return werr
		}
		if is && e.Kind == client.TaskTimedOut {
			return &ExitError{Code: ExitTimedOut}
		}
		return errFailed
	}
	if is && e.Kind == client.TaskTimedOut && ctx.Err() == nil {
		return &ExitError{Code: ExitTimedOut, Err: err}
	}
	if is && e.Code != "" {
		return fmt.Errorf("%w (%s)", err, label(e.Code))
	}
	return err
}

// readAll is what r holds, at most a task. A read that waits cannot be
// interrupted; it is left behind.
func readAll(ctx context.Context, r io.Reader) ([]byte, error) {
	type read struct {
		b   []byte
		err error
	}
	done := make(chan read, 1)
	go func() {
		b, err := io.ReadAll(io.LimitReader(r, maxPoolTask+1))
		done <- read{b, err}
	}()
	select {
	case x := <-done:
		if x.err == nil && len(x.b) > maxPoolTask {
			x.err = errors.New("it is larger than 64 MiB")
		}
		return x.b, x.err
	case <-ctx.Done():
		return nil, ctx.Err()
	}
}

// readsTerminal says whether standard input is a person.
func (c *cli) readsTerminal() bool {
	f, ok := c.Stdin.(*os.File)
	return ok && c.isTerminal(f)
}

func (c *cli) poolScaleCommand() *cobra.Command {
	return &cobra.Command{
		Use:   "scale NAME N|MIN..MAX|+N|-N",
		Short: "Set the size of a pool",
		Long: `Set the number of workers of a pool, or its bounds, or move both by so many. Workers
that are too many finish their tasks first.`,
		Example: `  remuda pool scale thumbs 4
  remuda pool scale thumbs 1..8
  remuda pool scale thumbs +2`,
		Args: takes(2, 2), ValidArgsFunction: c.completePool,
		RunE: c.run(needClient, func(ctx context.Context, args []string) error {
			return c.poolResult(ctx, func() (client.ActResult, error) { return c.client.ScalePool(ctx, args[0], args[1]) })
		}),
	}
}

func (c *cli) poolRestartCommand() *cobra.Command {
	return &cobra.Command{
		Use:     "restart NAME…",
		Aliases: []string{"reload"},
		Short:   "Replace the workers of pools, without losing a task",
		Long: `Start other workers for each pool. When the first of them is ready, they get the
tasks that come from then on, and those before finish what they have. Where none
gets ready, those before go on.`,
		Example: `  remuda pool restart thumbs`,
		Args:    takes(1, -1), ValidArgsFunction: c.completePools,
		RunE: c.run(needClient, func(ctx context.Context, args []string) error {
			return c.poolAct(ctx, client.VerbRestart, args)
		}),
	}
}

func (c *cli) poolDrainCommand() *cobra.Command {
	return &cobra.Command{
		Use:   "drain NAME…",
		Short: "Have pools finish what they have and stop",
		Long:  "Have pools take nothing new, wait until all they have is done, and end their\nworkers. `remuda start NAME` starts them again.",
		Example: `  remuda pool drain thumbs
  remuda pool drain thumbs --timeout 1m`,
		Args: takes(1, -1), ValidArgsFunction: c.completePools,
		RunE: c.run(needClient, func(ctx context.Context, args []string) error {
			return c.poolAct(ctx, client.VerbDrain, args)
		}),
	}
}

func (c *cli) poolAct(ctx context.Context, verb client.Verb, args []string) error {
	return c.poolResult(ctx, func() (client.ActResult, error) {
		return c.client.ActPools(ctx, client.ActRequest{Verb: verb, Targets: args})
	})
}

func (c *cli) poolResult(ctx context.Context, call func() (client.ActResult, error)) error {
	res, err := call()
	if err != nil {
		return noSuchPool(err)
	}
	return c.resultWith(res, "", func() error {
		list, err := c.client.Pools(ctx)
		if err != nil {
			return err
		}
		c.poolTable(list)
		return nil
	})
}

// poolOutcomes tells what became of each pool. word is said in the place of a
// state.
func (c *cli) poolOutcomes(res client.ActResult, word string) {
	out, bad := c.paint(c.Stdout), c.paint(c.Stderr)
	for k := range res.Pools {
		o := &res.Pools[k]
		if o.Error != "" {
			fmt.Fprintln(c.Stderr, bad.red(fmt.Sprintf("[%s] %s: %s", label(o.Name), label(string(o.State)), oneLine(o.Error))))
			continue
		}
		if c.silent {
			continue
		}
		say := word
		if say == "" {
			say = out.state(o.State, label(string(o.State)))
			if o.Stats.Up > 0 {
				say += fmt.Sprintf(" (%s of %d up)", plural(o.Stats.Up, "worker"), o.Stats.Size)
			}
		}
		c.printf("[%s] %s\n", label(o.Name), say)
	}
}

// poolDescription is poolFigures and how the pool is to be run.
func poolDescription(p *client.PoolInfo, paint paint) string {
	var b strings.Builder
	b.WriteString(poolFigures(p, paint))
	if s := p.Spec; s != nil {
		pairs{
			{"command", commandLine(s.Command)},
			{"cwd", label(s.Cwd)},
			{"user", label(s.User)},
			{"namespace", label(s.Namespace)},
			{"variables", plural(len(s.Env), "variable")},
			{"from", label(s.Source)},
			{"created", stamp(p.Created)},
		}.write(&b, "Program", paint)
		queue := fmt.Sprintf("%d, then %s", s.Queue, label(s.Full))
		if s.Ageing > 0 {
			queue += fmt.Sprintf("; a task rises every %s", time.Duration(s.Ageing))
		}
		pairs{
			{"concurrency", strconv.Itoa(s.Concurrency)},
			{"balance", label(s.Balance)},
			{"queue", queue},
			{"timeout", limitSpan(time.Duration(s.Timeout))},
			{"grace", time.Duration(s.Grace).String()},
			{"retries", strconv.Itoa(s.Retries)},
			{"poison after", nonzero(uint64(s.PoisonAfter))},
			{"spares", nonzero(uint64(s.Spares))},
			{"recycled after", recycleWords(s)},
			{"heartbeat", limitSpan(time.Duration(s.Heartbeat))},
		}.write(&b, "Settings", paint)
	}
	pairs{{"output", label(p.OutPath)}, {"errors", label(p.ErrPath)}, {"trouble", oneLine(p.LogTrouble)}}.write(&b, "Logs", paint)
	return b.String()
}

func limitSpan(d time.Duration) string {
	if d <= 0 {
		return ""
	}
	return d.String()
}

func recycleWords(s *client.PoolSpec) string {
	var parts []string
	if s.MaxTasks > 0 {
		parts = append(parts, plural(s.MaxTasks, "task"))
	}
	if s.MaxAge > 0 {
		parts = append(parts, time.Duration(s.MaxAge).String())
	}
	if s.MaxMemory > 0 {
		parts = append(parts, size(s.MaxMemory))
	}
	return strings.Join(parts, ", ")
}
