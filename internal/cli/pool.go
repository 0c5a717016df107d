package cli

import (
	"bufio"
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"os"
	"os/exec"
	"strings"
	"time"

	"github.com/spf13/cobra"

	"github.com/remuda-dev/remuda/pool"
)

func (c *cli) poolCommand() *cobra.Command {
	cmd := &cobra.Command{
		Use:     "pool",
		GroupID: groupApps,
		Short:   "Spread tasks over worker processes",
		Example: `  remuda pool run -n 4 --protocol jsonl -- jq -c --unbuffered .name < tasks.jsonl`,
		Args:    takes(0, 0),
		RunE:    func(cmd *cobra.Command, _ []string) error { return cmd.Help() },
	}
	cmd.AddCommand(c.poolRunCommand())
	return cmd
}

type poolFlags struct {
	pool.Options
	protocol, name string
	unordered      bool
	retries        int
	perTask        time.Duration
}

func (c *cli) poolRunCommand() *cobra.Command {
	cmd := &cobra.Command{
		Use:   "run [-n N] -- COMMAND [ARG…]",
		Short: "Give each line of standard input to one of N workers",
		Long: `Start N workers and give them the tasks that standard input holds, a JSON value a
line. The results go to standard output, a line each, in the order of the tasks
unless --unordered; a task that fails becomes {"error": {…}}. Input of any size is
taken in constant memory. No daemon is needed. Exit code: 1 if any task failed.

How workers are spoken to (--protocol):
  frames  the SDKs in sdk/ and the Go package worker (docs/worker-protocol.md)
  jsonl   a line of standard input is a task, a line of standard output its result
  node    process.on('message', …) and process.send(…) of Node.js
  exec    the command is run for each task: standard input to standard output`,
		Example: `  remuda pool run -n 4 -- node worker.mjs < tasks.jsonl > results.jsonl
  seq 100 | remuda pool run --protocol exec -n 8 -- ./square
  remuda pool run --protocol jsonl --task-timeout 10s --retries 2 -- python3 -u worker.py < tasks.jsonl`,
		Args: takes(1, -1),
	}
	var o poolFlags
	f := cmd.Flags()
	f.SetInterspersed(false)
	f.IntVarP(&o.Size, "workers", "n", 0, "how many workers (default: one a core)")
	f.IntVarP(&o.Concurrency, "concurrency", "c", 1, "tasks that a worker has at a time")
	f.StringVar(&o.protocol, "protocol", string(pool.Frames), "how workers are spoken to: frames, jsonl, node or exec")
	f.StringVar(&o.name, "task", "", "the `name` of the handler that is to do the tasks (frames)")
	f.BoolVar(&o.unordered, "unordered", false, "print each result as soon as it is there")
	f.DurationVar(&o.perTask, "task-timeout", 0, "kill a worker that needs longer for a task (default: never)")
	f.IntVar(&o.retries, "retries", 0, "how often a task is tried again whose worker died")
	f.IntVar(&o.MaxTasks, "max-tasks", 0, "replace a worker after this many tasks (default: never)")
	f.DurationVar(&o.Grace, "grace", 2*time.Second, "time from a request to stop to the kill")
	cmd.RunE = c.run(needNothing, func(ctx context.Context, args []string) error {
		o.Command = args
		return c.poolRun(ctx, o)
	})
	return cmd
}

// poolOutcome is a task on its way to standard output.
type poolOutcome struct {
	done chan struct{}
	line []byte
	bad  bool
}

func (c *cli) poolRun(ctx context.Context, o poolFlags) error {
	o.Protocol = pool.Protocol(o.protocol)
	o.Timeout = o.perTask
	if o.retries < 0 || o.Size < 0 || o.Concurrency < 1 || o.perTask < 0 || o.Grace < 0 || o.MaxTasks < 0 {
		return usage("`remuda pool run --help` lists the flags.", "-n, -c, --task-timeout, --retries, --max-tasks and --grace must not be negative, and -c not 0")
	}
	if o.retries == 0 {
		o.Retries = -1
	} else {
		o.Retries = o.retries
	}
	if o.Grace == 0 {
		o.Grace = -1
	}
	o.Env, o.Dir = c.environ(), c.Cwd
	// What workers print beside their results is for the person who looks on.
	if f, ok := c.Stderr.(*os.File); ok {
		o.Stdout, o.Stderr = f, f
	}
	p, err := pool.New(o.Options)
	if errors.Is(err, exec.ErrNotFound) || errors.Is(err, os.ErrNotExist) || errors.Is(err, os.ErrPermission) {
		return err
	}
	if err != nil {
		return usage("usage: remuda pool run [-n N] [--protocol frames|jsonl|node|exec] -- COMMAND", "%s", strings.TrimPrefix(err.Error(), "pool: "))
	}
	size := p.Stats().Size
	// Enough tasks that no worker ever waits for one, and no more.
	window := 2*size*o.Concurrency + 16
	tasks, bad, err := c.feed(ctx, p, o, window)
	// What still runs is not wanted where it was cut short.
	end := ctx
	if err != nil {
		var cancel context.CancelFunc
		end, cancel = context.WithCancel(context.WithoutCancel(ctx))
		cancel()
	}
	cerr := p.Close(end)
	switch {
	case err != nil:
		return err
	case cerr != nil:
		return cerr
	case bad > 0:
		c.say("%d of %s failed", bad, plural(tasks, "task"))
		return errFailed
	}
	return nil
}

// feed reads tasks, has p do them and prints the results. At most window are
// between the two at a time.
func (c *cli) feed(ctx context.Context, p *pool.Pool, o poolFlags, window int) (tasks, bad int, err error) {
	ctx, cancel := context.WithCancelCause(ctx)
	defer cancel(nil)
	room := make(chan struct{}, window)
	results := make(chan *poolOutcome, window)
	read := make(chan error, 1)
	go func() {
		defer close(results)
		read <- c.readTasks(ctx, o, func(body []byte) bool {
			select {
			case room <- struct{}{}:
			case <-ctx.Done():
				return false
			}
			r := &poolOutcome{done: make(chan struct{})}
			if !o.unordered {
				results <- r
			}
			go func() {
				res, err := p.Do(ctx, pool.Task{Name: o.name, Body: body, Idempotent: o.retries > 0})
				r.line, r.bad = resultLine(o.Protocol, res.Body, err)
				close(r.done)
				if o.unordered {
					results <- r
				}
			}()
			return true
		})
		// Unordered results are sent by those that do them: the channel may be
		// closed when all of them have.
		for range window {
			if o.unordered {
				room <- struct{}{}
			}
		}
	}()
	out := bufio.NewWriterSize(c.Stdout, 64<<10)
	for r := range results {
		select {
		case <-r.done:
		default:
			// Nothing is held back while nothing comes.
			if err == nil {
				err = out.Flush()
			}
			<-r.done
		}
		<-room
		tasks++
		if ctx.Err() != nil {
			continue
		}
		if r.bad {
			bad++
		}
		if _, werr := out.Write(append(r.line, '\n')); werr != nil && err == nil {
			err = werr
		}
		if err == nil && len(results) == 0 {
			err = out.Flush()
		}
		if err != nil {
			cancel(err)
		}
	}
	if ferr := out.Flush(); err == nil {
		err = ferr
	}
	switch rerr := <-read; {
	case err != nil:
		err = fmt.Errorf("cannot write the results: %w", err)
	case rerr != nil:
		err = rerr
	default:
		err = ctx.Err()
	}
	return tasks, bad, err
}

// maxTaskLine bounds a line of standard input.
const maxTaskLine = 64 << 20

// readTasks calls do for each line of standard input, until that says no. A
// read that waits cannot be interrupted; it is left behind.
func (c *cli) readTasks(ctx context.Context, o poolFlags, do func([]byte) bool) error {
	lines := make(chan []byte)
	failed := make(chan error, 1)
	go func() {
		defer close(lines)
		in := bufio.NewReaderSize(c.Stdin, 64<<10)
		for n := 1; ; n++ {
			line, err := readLine(in, maxTaskLine)
			if line = bytes.TrimSpace(line); err == nil || len(line) > 0 && errors.Is(err, io.EOF) {
				if len(line) > 0 {
					if o.Protocol != pool.Exec && !json.Valid(line) {
						failed <- fmt.Errorf("line %d of standard input is not a JSON value: %s", n, clip(string(line)))
						return
					}
					if o.Protocol == pool.Exec {
						line = append(line, '\n') // what reads lines wants one
					}
					select {
					case lines <- line:
					case <-ctx.Done():
						return
					}
				}
			}
			if err != nil {
				if !errors.Is(err, io.EOF) {
					failed <- fmt.Errorf("cannot read line %d of the tasks: %w", n, err)
				}
				return
			}
		}
	}()
	for {
		select {
		case <-ctx.Done():
			return nil
		case line, ok := <-lines:
			if !ok {
				select {
				case err := <-failed:
					return err
				default:
					return nil
				}
			}
			if !do(line) {
				return nil
			}
		}
	}
}

// readLine returns a line of its own memory, without the newline.
func readLine(in *bufio.Reader, most int) ([]byte, error) {
	var line []byte
	for {
		part, err := in.ReadSlice('\n')
		line = append(line, part...)
		if len(line) > most {
			return nil, fmt.Errorf("it is longer than %d bytes", most)
		}
		if !errors.Is(err, bufio.ErrBufferFull) {
			return line, err
		}
	}
}

// resultLine is one line of standard output.
func resultLine(protocol pool.Protocol, body []byte, err error) (line []byte, bad bool) {
	if err == nil {
		return jsonLine(protocol, body), false
	}
	type failure struct {
		Kind    string          `json:"kind"`
		Message string          `json:"message"`
		Code    string          `json:"code,omitempty"`
		Data    json.RawMessage `json:"data,omitempty"`
	}
	f := failure{Kind: "error", Message: err.Error()}
	var te *pool.TaskError
	switch {
	case errors.As(err, &te):
		f = failure{Kind: "task", Message: te.Message, Code: te.Code, Data: te.Data}
	case errors.Is(err, pool.ErrTimeout):
		f.Kind = "timeout"
	case errors.Is(err, pool.ErrWorkerDied):
		f.Kind = "worker_died"
	case errors.Is(err, pool.ErrNoWorkers):
		f.Kind = "no_workers"
	case errors.Is(err, pool.ErrClosed) || errors.Is(err, context.Canceled):
		f.Kind = "cancelled"
	}
	var b bytes.Buffer
	enc := json.NewEncoder(&b)
	enc.SetEscapeHTML(false)
	if enc.Encode(map[string]failure{"error": f}) != nil { // Data is not JSON
		f.Data = nil
		b.Reset()
		_ = enc.Encode(map[string]failure{"error": f}) // strings only
	}
	return bytes.TrimSpace(b.Bytes()), true
}

// jsonLine is a result as one line of JSON: as it is where it is JSON, else as
// a string.
func jsonLine(protocol pool.Protocol, body []byte) []byte {
	b := bytes.TrimSpace(body)
	if len(b) == 0 {
		return []byte("null")
	}
	if protocol != pool.JSONLines && protocol != pool.Node && !json.Valid(b) {
		var s bytes.Buffer
		enc := json.NewEncoder(&s)
		enc.SetEscapeHTML(false)
		_ = enc.Encode(string(b)) // a string
		return bytes.TrimSpace(s.Bytes())
	}
	if bytes.ContainsAny(b, "\n\r") {
		var s bytes.Buffer
		if json.Compact(&s, b) == nil {
			return s.Bytes()
		}
	}
	return b
}
