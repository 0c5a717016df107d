package pool

import (
	"errors"
	"fmt"

	"github.com/remuda-dev/remuda/ipc"
	"github.com/remuda-dev/remuda/supervise"
)

var (
	// ErrWorkerDied says that the worker ended, or had to be ended, with the
	// task. The error is a *[WorkerError].
	ErrWorkerDied = errors.New("pool: the worker died")
	// ErrTimeout says that the task did not end within its timeout, or not
	// before the deadline of the context it was given.
	ErrTimeout = errors.New("pool: the task timed out")
	// ErrQueueFull says that the task was refused ([Reject]).
	ErrQueueFull = errors.New("pool: the queue is full")
	// ErrDropped says that the task was dropped from the full queue for a more
	// urgent one ([DropLowest]).
	ErrDropped = errors.New("pool: the task was dropped from the queue")
	// ErrPoison says that the task is refused because of the workers that it
	// ended. The error is a *[PoisonError].
	ErrPoison = errors.New("pool: the task is poison")
	// ErrClosed says that the pool takes no more tasks, or was closed before the
	// task was done.
	ErrClosed = errors.New("pool: closed")
	// ErrNoWorkers says that no worker can be started. The error is a
	// *[WorkerError] that says why.
	ErrNoWorkers = errors.New("pool: no worker can be started")
)

// TaskError is a failure that the worker itself reported.
type TaskError = ipc.TaskError

// isTaskError reports whether the worker itself reported err. It is a function
// of its own so that what succeeds pays for no pointer.
func isTaskError(err error) bool {
	var e *TaskError
	return errors.As(err, &e)
}

// WorkerError is how a worker ended, for the tasks that it had. It is
// ErrWorkerDied or ErrNoWorkers.
type WorkerError struct {
	Kind error // ErrWorkerDied or ErrNoWorkers
	PID  int   // 0 where it did not start
	Exit supervise.Exit
	// Cause is what it did before, or why it was killed, "" where it ended by
	// itself.
	Cause string
	// Stderr is the end of what it had to say; Exec only.
	Stderr string
}

func (e *WorkerError) Error() string {
	s := e.Kind.Error()
	if e.PID > 0 {
		s += fmt.Sprintf(" (pid %d)", e.PID)
	}
	switch {
	case e.Exit.Err != "":
		s += ": " + e.Exit.Err
	case e.Exit.Signal != "":
		s += ": killed by " + e.Exit.Signal
	default:
		s += fmt.Sprintf(": exit code %d", e.Exit.Code)
	}
	if e.Cause != "" {
		s += ": " + e.Cause
	}
	return s
}

// Is reports whether target is the error's kind.
func (e *WorkerError) Is(target error) bool { return target == e.Kind }
