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
	// standard output the result, an exit code other than 0 a failure. See
	// Task.Args for arguments.
	Exec Protocol = "exec"
)

// FullPolicy says what happens to a task that finds the queue full.
type FullPolicy uint8

// The policies.
const (
	Block  FullPolicy = iota // Do waits for room
	Reject                   // Do returns ErrQueueFull
	// DropLowest drops the newest of the lowest priority (its own, whatever it
	// has risen to) that is below the new task's, with ErrDropped; where none is
	// below, Do returns ErrQueueFull.
	DropLowest
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
	// Size is how many workers there are, where it is fixed. 0: as many as Go
	// uses processors.
	Size int
	// Min and Max make the size elastic, in place of Size: from Min workers on,
	// more while tasks wait too long, fewer while workers have nothing to do.
	// Min 0 with a Max: 1. Max 0 with a Min: as many as Go uses processors, at
	// least Min.
	Min, Max int
	// ScaleUpWait is how long the oldest task must have waited for the pool to
	// grow: by as many workers as what waits keeps busy, at most to twice its
	// size, and not while workers of an earlier growth are still starting. 0:
	// 100 milliseconds; below 0: whenever a task waits.
	ScaleUpWait time.Duration
	// ScaleDownIdle is how long a worker must have been without a task to be
	// ended where there are more than Min. 0: 30 seconds.
	ScaleDownIdle time.Duration
	// Cooldown is the least time between two changes of the size by the pool
	// itself. 0: one second; below 0: none.
	Cooldown time.Duration
	// Spares is how many workers beyond the size are kept started and ready. One
	// takes the place of a worker that ends, or serves at once where the pool
	// grows, and is itself replaced. 0: none.
	Spares int
	// Concurrency is how many tasks a worker has at a time. 0: 1. For Exec it
	// multiplies Size, Min and Max.
	Concurrency int
	// Balance says which worker gets a task.
	Balance Balance
	// Queue is how many tasks wait for a worker before Full counts. 0: 1024;
	// below 0: none.
	Queue int
	Full  FullPolicy
	// Ageing has a task that waits rise by one priority, up to MaxPriority, each
	// time this long has passed, so that none waits for ever. 0: never,
	// priorities are strict.
	Ageing time.Duration

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
	// PoisonAfter is how many workers a task may end before it is poison: then
	// Do returns a *[PoisonError], and tasks of the same Name and Body are
	// refused for ten minutes after the last such end. 0: 3; below 0: never.
	//
	// A worker's end counts for the tasks that it had, over all calls of Do,
	// whatever ended it (a crash, a signal, nonsense on its channel, MaxMemory,
	// Heartbeat); where it was killed for not giving up one task in time, for
	// that task alone; where it was recycled, or asked to end, for none. With a
	// Concurrency above 1 it may so count for tasks that only stood by: a task
	// that succeeds is cleared of what was counted. The last 256 suspects are
	// remembered.
	PoisonAfter int

	// MaxTasks and MaxAge recycle a worker: it is replaced when it has had that
	// many tasks, or is that old (give or take a tenth, so that not all are
	// replaced at once). 0: never.
	MaxTasks int
	MaxAge   time.Duration
	// MaxMemory recycles a worker when the resident memory of all its processes
	// together, in bytes, exceeds it; looked at a second after a task began, and
	// each second while there are tasks. At one and a half times as much it is
	// killed with the tasks that it has. 0: unbounded. Not for Exec.
	MaxMemory int64
	// Heartbeat has a worker that holds tasks and says nothing asked for a sign
	// of life this often; one that gives none until the next time is killed. It
	// needs workers whose handlers do not hold up their channel (a Node handler
	// that computes does), and Frames, or Node: those are asked by the message
	// {"type":"health_check"} and must answer {"type":"health_check_response"},
	// which is no task's answer. 0: never.
	Heartbeat time.Duration

	// Topics is the bus that workers publish to and subscribe to, [Frames] only;
	// pools that have one in common hear each other. nil: one of the pool's own.
	Topics *ipc.Topics

	// SharedMemory is from how many bytes on bodies travel in shared memory,
	// [Frames] only, to workers that take them so and from them. 0:
	// [ipc.DefaultShared]; below 0: none do.
	SharedMemory int

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
	switch {
	case o.Size != 0 && (o.Min != 0 || o.Max != 0):
		return bad("Size is for a fixed number of workers, Min and Max for an elastic one: set either")
	case o.Min == 0 && o.Max == 0:
		if o.Size == 0 {
			o.Size = runtime.GOMAXPROCS(0)
		}
		o.Min, o.Max = o.Size, o.Size
	case o.Min == 0:
		o.Min = 1
	case o.Max == 0:
		o.Max = max(o.Min, runtime.GOMAXPROCS(0))
	}
	if o.Concurrency == 0 {
		o.Concurrency = 1
	}
	switch {
	case o.Min < 1 || o.Max < o.Min || o.Max > maxWorkers:
		return bad("a size of %d to %d workers: 1 to %d are possible", o.Min, o.Max, maxWorkers)
	case o.Spares < 0 || o.Spares > maxWorkers:
		return bad("%d spare workers: 0 to %d are possible", o.Spares, maxWorkers)
	case o.Concurrency < 1 || o.Concurrency > 1<<16:
		return bad("a concurrency of %d tasks a worker: 1 to 65536 are possible", o.Concurrency)
	case o.Full > DropLowest:
		return bad("unknown policy %d for a full queue", o.Full)
	case o.Balance > ConsistentHash:
		return bad("unknown way %d to balance", o.Balance)
	case o.Timeout < 0 || o.MaxAge < 0 || o.MaxTasks < 0 || o.MaxMemory < 0 || o.Heartbeat < 0 || o.StartTimeout < 0 || o.MaxMessage < 0 || o.Ageing < 0 || o.ScaleDownIdle < 0:
		return bad("Timeout, MaxTasks, MaxAge, MaxMemory, Heartbeat, StartTimeout, MaxMessage, Ageing and ScaleDownIdle must not be negative")
	case o.MaxMemory > 0 && o.Protocol == Exec:
		return bad("MaxMemory needs workers that stay; those of exec end with their task")
	case o.Heartbeat > 0 && o.Protocol != Frames && o.Protocol != Node:
		return bad("Heartbeat needs the protocol frames or node, not %s", o.Protocol)
	}
	if o.Protocol == Exec {
		// A process per task: a slot for each that may run.
		o.Min, o.Max, o.Concurrency = o.Min*o.Concurrency, o.Max*o.Concurrency, 1
	}
	switch {
	case o.ScaleUpWait == 0:
		o.ScaleUpWait = 100 * time.Millisecond
	case o.ScaleUpWait < 0:
		o.ScaleUpWait = 0
	}
	if o.ScaleDownIdle == 0 {
		o.ScaleDownIdle = 30 * time.Second
	}
	switch {
	case o.Cooldown == 0:
		o.Cooldown = time.Second
	case o.Cooldown < 0:
		o.Cooldown = 0
	}
	switch {
	case o.PoisonAfter == 0:
		o.PoisonAfter = 3
	case o.PoisonAfter < 0:
		o.PoisonAfter = 0
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
	if o.Topics == nil {
		o.Topics = ipc.NewTopics()
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
	switch {
	case o.Env == nil:
		o.Env = os.Environ()
	case o.Protocol == Node && ipc.Advanced(o.Env):
		return errors.New("pool: NODE_CHANNEL_SERIALIZATION_MODE=advanced: workers are spoken to in JSON only, leave the variable out")
	}
	o.Env = ipc.Environ(o.Env)
	return nil
}
