package pool

import (
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"runtime"
	"time"

	"github.com/remuda-dev/remuda/ipc"
	"github.com/remuda-dev/remuda/proc"
	"github.com/remuda-dev/remuda/supervise"
)

// Protocol is how tasks reach a worker.
type Protocol string

// The protocols.
const (
	// Frames is the binary protocol of docs/worker-protocol.md.
	Frames Protocol = "frames"
	// JSONLines writes each task as one line of JSON to the worker's standard
	// input and takes the next line of its standard output as the answer. An
	// object with the only key "error" is a failure.
	JSONLines Protocol = "jsonl"
	// Node makes each task a 'message' of Node's child_process and takes the
	// next process.send as the answer; failures as with JSONLines.
	Node Protocol = "node"
	// Exec starts the command anew for each task: standard input is the task,
	// standard output the result, an exit code other than 0 a failure.
	Exec Protocol = "exec"
)

// FullPolicy says what happens to a task that finds the queue full.
type FullPolicy uint8

// The policies.
const (
	Block  FullPolicy = iota // Do waits for room
	Reject                   // Do returns ErrQueueFull
)

// MaxPriority is the priority of the most urgent tasks.
const MaxPriority = 9

// Options are the settings of a pool. Only Command must be set.
type Options struct {
	// Command is the program of a worker and its arguments. The program is
	// looked up in PATH.
	Command []string
	Dir     string   // working directory; "": the caller's
	Env     []string // KEY=value; nil: the caller's
	// Stdout and Stderr are where workers' output goes that is no answer; nil:
	// nowhere. They stay the caller's and must be open as long as the pool.
	Stdout, Stderr *os.File
	// Spawner starts the workers; nil: as children of this process.
	Spawner proc.Spawner
	// Name is part of the names of runs and of messages: see
	// [proc.ValidKey], at most 60 bytes. "": "pool".
	Name string

	Protocol Protocol // "": Frames
	// Size is how many workers there are. 0: as many as Go uses processors.
	Size int
	// Concurrency is how many tasks a worker has at a time. 0: 1. For Exec it
	// multiplies Size.
	Concurrency int
	// Queue is how many tasks wait for a worker before Full counts. 0: 1024;
	// below 0: none.
	Queue int
	Full  FullPolicy

	// Timeout bounds a task's time on a worker where the task sets none.
	// 0: unbounded.
	Timeout time.Duration
	// Grace is how long a worker has to give up a task that was cancelled or
	// timed out, or to end when it was asked to, before it is killed. 0: two
	// seconds; below 0: none.
	Grace time.Duration
	// Retries is how often a task with Idempotent set is tried again after its
	// worker died. 0: 2; below 0: never.
	Retries int

	// MaxTasks and MaxAge recycle a worker: it is replaced when it has had that
	// many tasks, or is that old (give or take a tenth, so that not all are
	// replaced at once). 0: never.
	MaxTasks int
	MaxAge   time.Duration
	// Heartbeat has a worker that holds tasks and says nothing asked for a sign
	// of life this often; one that gives none until the next time is killed. It
	// needs Frames, and workers whose handlers do not hold up their channel (a
	// Node handler that computes does). 0: never.
	Heartbeat time.Duration

	// Breaker puts a circuit breaker around the pool; nil: none. Cache keeps
	// results and lets tasks share them; nil: none. Neither is changed.
	Breaker *BreakerOptions
	Cache   *CacheOptions

	// StartTimeout bounds the time until a worker is ready. 0: 30 seconds.
	StartTimeout time.Duration
	// Backoff is the wait before a worker is started again that ended before it
	// had answered anything. The zero value: from 50 milliseconds to 5 seconds.
	// One that had answered is replaced at once.
	Backoff supervise.Backoff
	// MaxMessage is the largest task or answer in bytes. 0:
	// [ipc.DefaultMaxFrame].
	MaxMessage int
}

// complete checks the options and fills in the defaults.
func (o *Options) complete() error {
	bad := func(format string, args ...any) error {
		return fmt.Errorf("pool: "+format, args...)
	}
	if o.Name == "" {
		o.Name = "pool"
	}
	if len(o.Name) > 60 || !proc.ValidKey(o.Name) {
		return bad("the name %q is not of letters, digits, dot, hyphen and underscore", o.Name)
	}
	switch o.Protocol {
	case "":
		o.Protocol = Frames
	case Frames, JSONLines, Node, Exec:
	default:
		return bad("unknown protocol %q: frames, jsonl, node or exec", o.Protocol)
	}
	if o.Size == 0 {
		o.Size = runtime.GOMAXPROCS(0)
	}
	if o.Concurrency == 0 {
		o.Concurrency = 1
	}
	switch {
	case o.Size < 1 || o.Size > 4096:
		return bad("a size of %d workers: 1 to 4096 are possible", o.Size)
	case o.Concurrency < 1 || o.Concurrency > 1<<16:
		return bad("a concurrency of %d tasks a worker: 1 to 65536 are possible", o.Concurrency)
	case o.Full > Reject:
		return bad("unknown policy %d for a full queue", o.Full)
	case o.Timeout < 0 || o.MaxAge < 0 || o.MaxTasks < 0 || o.Heartbeat < 0 || o.StartTimeout < 0 || o.MaxMessage < 0:
		return bad("Timeout, MaxTasks, MaxAge, Heartbeat, StartTimeout and MaxMessage must not be negative")
	case o.Heartbeat > 0 && o.Protocol != Frames:
		return bad("Heartbeat needs the protocol frames, not %s", o.Protocol)
	}
	if o.Protocol == Exec {
		// A process per task: a slot for each that may run.
		o.Size, o.Concurrency = o.Size*o.Concurrency, 1
	}
	switch {
	case o.Queue == 0:
		o.Queue = 1024
	case o.Queue < 0:
		o.Queue = 0
	}
	switch {
	case o.Grace == 0:
		o.Grace = 2 * time.Second
	case o.Grace < 0:
		o.Grace = 0
	}
	switch {
	case o.Retries == 0:
		o.Retries = 2
	case o.Retries < 0:
		o.Retries = 0
	}
	if o.StartTimeout == 0 {
		o.StartTimeout = 30 * time.Second
	}
	if o.Backoff.Initial == 0 {
		o.Backoff = supervise.Backoff{Initial: 50 * time.Millisecond, Max: 5 * time.Second}
	}
	if o.MaxMessage == 0 {
		o.MaxMessage = ipc.DefaultMaxFrame
	}
	return nil
}

// program makes Command, Dir and Env absolute.
func (o *Options) program() error {
	if len(o.Command) == 0 || o.Command[0] == "" {
		return errors.New("pool: no command: a pool needs the program that its workers are")
	}
	path, err := exec.LookPath(o.Command[0])
	if err != nil {
		return fmt.Errorf("pool: the workers' program: %w", err)
	}
	if path, err = filepath.Abs(path); err != nil {
		return fmt.Errorf("pool: the workers' program: %w", err)
	}
	o.Command = append([]string{path}, o.Command[1:]...)
	if o.Dir == "" {
		if o.Dir, err = os.Getwd(); err != nil {
			return fmt.Errorf("pool: the workers' folder: %w", err)
		}
	} else if o.Dir, err = filepath.Abs(o.Dir); err != nil {
		return fmt.Errorf("pool: the workers' folder: %w", err)
	}
	if o.Env == nil {
		o.Env = os.Environ()
	}
	return nil
}
