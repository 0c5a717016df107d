package cli

import (
	"bufio"
	"context"
	"errors"
	"fmt"
	"io"
	"os"
	"os/exec"
	"os/signal"
	"strings"
	"syscall"
	"time"

	"github.com/spf13/cobra"

	"github.com/remuda-dev/remuda/internal/batch"
	"github.com/remuda-dev/remuda/pool"
)

// exitPipe is the exit code where nobody reads the results any more: that of a
// filter which SIGPIPE has ended.
const exitPipe = 141

type poolRunFlags struct {
	batch.Options
	protocol    string
	exec        bool
	dryRun      bool
	keepGoing   bool
	joblog      string
	resume      bool
	results     string
	progress    bool
	noProgress  bool
	flagChanged func(string) bool
}

func (c *cli) poolRunCommand() *cobra.Command {
	cmd := &cobra.Command{
		Use:   "run [-n N] -- COMMAND [ARG…]",
		Short: "Give each line of standard input to one of N workers",
		Long: `Start N workers and give them the tasks that standard input holds, one a line.
The results go to standard output in the order of the tasks, unless --unordered.
Input of any size is taken in constant memory. No daemon is needed.

How workers are spoken to (--protocol):
  frames  the SDKs in sdk/ and the Go package worker (docs/worker-protocol.md)
  jsonl   a line of standard input is a task, a line of standard output its result
  node    process.on('message', …) and process.send(…) of Node.js
  exec    the command is run for each task: standard input to standard output
A task is a value of JSON (not with exec), a result a line of JSON. A task that
fails becomes {"error": {"kind": …, "message": …}}: kind is task (the worker
reported a failure, or exited with another code than 0), timeout, worker_died,
input (the task cannot be given to the workers) or error.

--exec runs the command for each line with the line among its arguments, never
through a shell; its output comes out as it is, in the order of the lines:
  {}   the line                    {.}   without its extension
  {/}  without its folder          {/.}  without folder and extension
  {//} its folder                  {#}   the number of the task, from 1
Without any of these the line is the last argument. With --json each task gives a
line of JSON with its output, exit code and times instead.

The first failure ends the run: no task is begun any more, and those that run are
let finish. --keep-going goes on, --max-failures N until N have failed.

--joblog FILE appends a line of JSON for each task that has ended. It is written
after the result is in its file, so a run that was killed, at whatever instant,
goes on with the same command line and --resume: tasks in the log are not done
again and no result is lost or comes twice; those that were running are done
again. The input must be the same. The results must be appended to: give
--results FILE, or >> FILE in the shell. What the killed run wrote last and could
not log is cut off there; that is not possible where results go to a pipe.
--resume-failed does failed tasks again, too: their new results come last.
Kills cannot spoil this; power cuts cannot with --fsync.

Ctrl-C (or SIGTERM) once: no task is begun any more, and those that run have the
time of --grace; twice: they are killed. Workers die with remuda, even where it
is killed by SIGKILL.

Exit code: 0 all well, 1 a task failed or the run could not go on, 2 usage,
130 interrupted, 141 nobody reads the results any more.`,
		Example: `  remuda pool run -n 4 -- node worker.mjs < tasks.jsonl > results.jsonl
  remuda pool run --protocol jsonl --timeout 10s --retries 2 -k -- python3 -u worker.py < tasks.jsonl
  ls *.png | remuda pool run --exec -- convert {} -resize 128x128 out/{/}
  find . -name '*.wav' -print0 | remuda pool run -0 --exec --dry-run -- flac {} -o {.}.flac
  remuda pool run --joblog jobs.log --resume --results results.jsonl -- node worker.mjs < tasks.jsonl`,
		Args: func(_ *cobra.Command, args []string) error {
			if len(args) == 0 || args[0] == "" { // further ones may well be empty
				return usage("usage: remuda pool run [-n N] -- COMMAND [ARG…]", "`remuda pool run` needs an argument: the command that does the tasks")
			}
			return nil
		},
	}
	var o poolRunFlags
	f := cmd.Flags()
	f.SetInterspersed(false)
	f.SortFlags = false
	f.IntVarP(&o.Pool.Size, "workers", "n", 0, "how many workers (default: one a core)")
	f.IntVarP(&o.Pool.Concurrency, "concurrency", "c", 1, "tasks that a worker has at a time")
	f.StringVar(&o.protocol, "protocol", string(pool.Frames), "how workers are spoken to: frames, jsonl, node or exec")
	f.StringVar(&o.Handler, "task", "", "the `name` of the handler that is to do the tasks (frames)")
	f.BoolVar(&o.exec, "exec", false, "run the command for each line, with the line among its arguments")
	f.BoolVarP(&o.NUL, "null", "0", false, "tasks end with a NUL byte instead of a newline (with --exec)")
	f.BoolVar(&o.dryRun, "dry-run", false, "print the commands, and run none (with --exec)")
	f.BoolVar(&o.Unordered, "unordered", false, "print each result as soon as it is there")
	f.DurationVar(&o.Pool.Timeout, "timeout", 0, "how long a task may take, for example 30s (default: any time)")
	f.IntVar(&o.Retries, "retries", 0, "how often a task is tried again that has failed")
	f.BoolVarP(&o.keepGoing, "keep-going", "k", false, "go on when tasks fail")
	f.IntVar(&o.MaxFailures, "max-failures", 1, "stop when `N` tasks have failed")
	f.StringVar(&o.joblog, "joblog", "", "log each task that has ended in this `file`")
	f.BoolVar(&o.resume, "resume", false, "do what is not in the job log (all, where there is none yet)")
	f.BoolVar(&o.Redo, "resume-failed", false, "the same, and what has failed again")
	f.StringVar(&o.results, "results", "", "write the results to this `file` (--resume appends)")
	f.BoolVar(&o.Sync, "fsync", false, "have results and job log on the disk before a task counts as done")
	f.BoolVar(&o.progress, "progress", false, "show how far it is (default: where standard error is a terminal and standard output is not)")
	f.BoolVar(&o.noProgress, "no-progress", false, "do not")
	f.IntVar(&o.Pool.MaxTasks, "max-tasks", 0, "replace a worker after this many tasks (default: never)")
	f.DurationVar(&o.Pool.Grace, "grace", 5*time.Second, "time from a request to stop to the kill")
	o.flagChanged = f.Changed
	cmd.RunE = func(cmd *cobra.Command, args []string) error { return c.poolRun(cmd.Context(), &o, args) }
	return cmd
}

// check looks at the flags and makes options of them.
func (o *poolRunFlags) check(command []string) error {
	const lists = "`remuda pool run --help` lists the flags."
	least := func(name string, n, least int) error {
		if n < least {
			return usage(lists, "--%s %d: must be at least %d", name, n, least)
		}
		return nil
	}
	size := 0
	if o.flagChanged("workers") {
		size = 1
	}
	if err := errors.Join(
		least("workers", o.Pool.Size, size), least("concurrency", o.Pool.Concurrency, 1), least("retries", o.Retries, 0),
		least("max-failures", o.MaxFailures, 1), least("max-tasks", o.Pool.MaxTasks, 0),
	); err != nil {
		var first *usageError
		errors.As(err, &first)
		return first
	}
	switch {
	case o.Pool.Timeout < 0 || o.flagChanged("timeout") && o.Pool.Timeout == 0:
		return usage(lists, "--timeout %s: must be more than 0", o.Pool.Timeout)
	case o.Pool.Grace < 0:
		return usage(lists, "--grace %s: must not be negative", o.Pool.Grace)
	case o.exec && o.flagChanged("protocol") && o.protocol != string(pool.Exec):
		return usage(lists, "--exec runs a command for each task: --protocol %s does not go with it", clip(o.protocol))
	case !o.exec && (o.NUL || o.dryRun):
		name := "--null"
		if o.dryRun {
			name = "--dry-run"
		}
		return usage(lists, "%s needs --exec", name)
	case o.Handler != "" && (o.exec || o.protocol != string(pool.Frames)):
		return usage(lists, "--task names a handler of workers that speak frames; these do not")
	case o.keepGoing && o.flagChanged("max-failures"):
		return usage(lists, "--keep-going and --max-failures contradict each other")
	case o.progress && o.noProgress:
		return usage(lists, "--progress and --no-progress contradict each other")
	case (o.resume || o.Redo) && o.joblog == "":
		return usage("With --joblog FILE on the first run, a later one can be resumed.", "--resume needs --joblog FILE, which says what has been done")
	case o.Sync && o.joblog == "":
		return usage(lists, "--fsync needs --joblog FILE")
	}
	if o.Redo {
		o.resume = true
	}
	if o.keepGoing {
		o.MaxFailures = 0
	}
	if o.Pool.Grace == 0 {
		o.Pool.Grace = -1
	}
	o.Pool.Protocol = pool.Protocol(o.protocol)
	o.Pool.Command = command
	if o.exec {
		t, err := batch.NewTemplate(command)
		if err != nil {
			return usage("usage: remuda pool run --exec -- COMMAND [ARG…]", "%s", err)
		}
		o.Pool.Protocol, o.Template, o.Format = pool.Exec, t, batch.Raw
	}
	return nil
}

func (c *cli) poolRun(ctx context.Context, o *poolRunFlags, command []string) error {
	if err := o.check(command); err != nil {
		return err
	}
	if o.dryRun {
		return c.poolDryRun(o)
	}
	if o.exec && c.json {
		o.Format = batch.Records
	}
	o.Pool.Env, o.Pool.Dir = c.environ(), c.Cwd
	o.Input = c.Stdin
	if err := c.poolFiles(o); err != nil {
		return err
	}
	if o.Log != nil {
		defer o.Log.Close()
	}
	if o.results != "" {
		defer o.Results.Close()
	}

	ctx, kill := context.WithCancel(ctx)
	defer kill()
	o.Progress = new(batch.Progress)
	show := c.showProgress(ctx, o)
	defer show.end()
	// A broken pipe is an error of the write, not the end of this process.
	pipe := make(chan os.Signal, 1)
	signal.Notify(pipe, syscall.SIGPIPE)
	defer signal.Stop(pipe)
	stop := make(chan struct{})
	o.Stop = stop
	ended := make(chan struct{})
	caught := c.poolSignals(ended, func() {
		show.say("interrupted: no task is begun any more, %d may finish within %s (again: they are killed)", o.running(), max(o.Pool.Grace, 0))
		close(stop)
	}, kill)
	o.Note = func(s string) { show.say("%s", s) }
	if o.Format == batch.Raw {
		o.Failed = func(f *batch.Outcome) {
			show.say("task %d failed: %s: %s", f.Seq, f.Failure.Message, o.Template.Line(string(f.Task), f.Seq))
		}
	}
	if o.Log != nil && !c.silent {
		if done, failed, before := o.Log.Resumed(); before {
			show.say("resuming: %s in the job log, %d of them failed", plural(int(done), "task"), failed)
		}
	}
	sum, err := batch.Run(ctx, o.Options)
	close(ended)
	signalled := <-caught
	show.end()
	return c.poolEnd(o, sum, err, signalled)
}

// running is how many tasks workers have.
func (o *poolRunFlags) running() int64 {
	return min(o.Progress.Running.Load(), o.Progress.Slots.Load())
}

// poolEnd tells how a run has ended.
func (c *cli) poolEnd(o *poolRunFlags, sum batch.Summary, err error, signalled bool) error {
	again := ""
	if o.Log != nil {
		again = " --resume goes on."
	}
	var bad *batch.ErrLog
	switch {
	case signalled:
		if err != nil && !errors.Is(err, context.Canceled) && !errors.Is(err, syscall.EPIPE) {
			c.say("%s", err)
		}
		c.say("interrupted: %s done in this run, %d failed.%s", plural(int(sum.Done), "task"), sum.Failed, again)
		return &ExitError{Code: ExitInterrupted}
	case errors.Is(err, batch.ErrOutput) && errors.Is(err, syscall.EPIPE):
		return &ExitError{Code: exitPipe}
	case errors.As(err, &bad):
		return hinted{err, bad.Hint}
	case errors.Is(err, pool.ErrNoWorkers):
		if o.Template == nil {
			again = fmt.Sprintf(" It must be a program that speaks %s (--protocol).%s", o.protocol, again)
		}
		c.say("%s; %s done.%s", strings.TrimPrefix(err.Error(), "pool: "), plural(int(sum.Done), "task"), again)
		return errFailed
	case errors.Is(err, exec.ErrNotFound) || errors.Is(err, os.ErrNotExist) || errors.Is(err, os.ErrPermission) || err != nil && sum.Done > 0:
		return err
	case err != nil:
		if text, ok := strings.CutPrefix(err.Error(), "pool: "); ok {
			return usage("usage: remuda pool run [-n N] [--protocol frames|jsonl|node|exec] -- COMMAND", "%s", text)
		}
		return err
	case sum.Failed == 0:
		return nil
	}
	if sum.Stopped && sum.First != nil {
		after := "the first failure"
		if o.MaxFailures > 1 {
			after = fmt.Sprintf("%d failures; the first was", o.MaxFailures)
		}
		c.say("stopped after %s: task %d: %s", after, sum.First.Seq, sum.First.Failure.Message)
	}
	text := fmt.Sprintf("%d of %s failed", sum.Failed, plural(int(sum.Done), "task"))
	if sum.Stopped {
		text += "; others were not begun (--keep-going goes on in spite of failures)"
	}
	c.say("%s", text)
	if o.Log != nil {
		fmt.Fprintln(c.Stderr, "The same command with --resume-failed does the failed ones again.")
	}
	return errFailed
}

// poolFiles opens results and job log.
func (c *cli) poolFiles(o *poolRunFlags) error {
	o.Output = c.Stdout
	if f, ok := file(c.Stdout); ok {
		o.Results = f
	}
	if o.results != "" {
		path, err := c.abs(o.results)
		if err != nil {
			return err
		}
		// What is there is cut off when the job log has agreed.
		f, err := os.OpenFile(path, os.O_RDWR|os.O_CREATE|os.O_APPEND, 0o666)
		if err != nil {
			return fmt.Errorf("cannot open the results: %w", err)
		}
		o.Results, o.Output = f, f
	}
	if o.Results != nil {
		if st, err := o.Results.Stat(); err != nil || !st.Mode().IsRegular() {
			if o.results != "" {
				o.Results.Close()
				return fmt.Errorf("the results' file %s is not a regular file", o.results)
			}
			o.Results = nil
		}
	}
	if o.joblog != "" {
		path, err := c.abs(o.joblog)
		if err == nil {
			o.Log, err = batch.OpenLog(path, o.resume, o.Results)
		}
		if err != nil {
			if o.results != "" {
				o.Results.Close()
			}
			var bad *batch.ErrLog
			if errors.As(err, &bad) {
				return hinted{err, bad.Hint}
			}
			return err
		}
	}
	if o.results != "" && !o.resume {
		if err := o.Results.Truncate(0); err != nil {
			return fmt.Errorf("cannot empty the results: %w", err)
		}
	}
	return nil
}

// poolSignals calls first and second at the first and second request to end,
// until ended is closed; the third ends the process. The channel it returns then
// tells whether there was any.
func (c *cli) poolSignals(ended <-chan struct{}, first, second func()) <-chan bool {
	signals := make(chan os.Signal, 4)
	for _, s := range []os.Signal{syscall.SIGINT, syscall.SIGTERM, syscall.SIGHUP} {
		if !signal.Ignored(s) { // nohup
			signal.Notify(signals, s)
		}
	}
	caught := make(chan bool, 1)
	go func() {
		defer signal.Stop(signals)
		for n := 0; ; n++ {
			select {
			case <-ended:
				caught <- n > 0
				return
			case <-signals:
			}
			switch n {
			case 0:
				first()
			case 1:
				second()
				signal.Stop(signals)
			}
		}
	}()
	return caught
}

// poolDryRun prints the commands.
func (c *cli) poolDryRun(o *poolRunFlags) error {
	in, out := bufio.NewReaderSize(c.Stdin, 64<<10), bufio.NewWriter(c.Stdout)
	delim := byte('\n')
	if o.NUL {
		delim = 0
	}
	err := batch.Tasks(in, delim, func(seq int64, task []byte) error {
		_, err := fmt.Fprintln(out, o.Template.Line(string(task), seq))
		return err
	})
	if ferr := out.Flush(); err == nil {
		err = ferr
	}
	return err
}

// showProgress readies what shows how far a run is, and has everything else that
// is printed meanwhile go past it.
func (c *cli) showProgress(ctx context.Context, o *poolRunFlags) *progress {
	terminal := c.isTerminal(c.Stderr)
	wanted := o.progress || !o.noProgress && terminal && !c.isTerminal(o.Output) && !c.silent
	show := newProgress(c, o.Progress, wanted, terminal)
	if f, ok := c.Stderr.(*os.File); ok {
		// What workers print beside their results is for the person who looks on.
		o.Pool.Stdout, o.Pool.Stderr = f, f
		if show.bar != nil {
			if w := show.pipe(); w != nil {
				o.Pool.Stdout, o.Pool.Stderr = w, w
			}
		}
	}
	if show.bar != nil && c.isTerminal(o.Output) {
		o.Output = show.lines()
	}
	if in, ok := c.Stdin.(*os.File); ok && wanted {
		if st, err := in.Stat(); err == nil && st.Mode().IsRegular() {
			if at, err := in.Seek(0, io.SeekCurrent); err == nil {
				show.count(ctx, in, at, o.NUL)
			}
		}
	}
	return show
}
