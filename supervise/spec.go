package supervise

import (
	"context"
	"time"
)

// Child is something that can be run again and again: a process, a pool of
// workers, a nested supervisor ([Supervisor.AsChild]).
type Child interface {
	// Start starts one run and returns when it exists; it does not wait for it
	// to be ready. ctx bounds the starting only, not the run: it ends when
	// StartTimeout is over or when the start is no longer wanted. An error
	// means that nothing runs, and counts as a failed run. A Run that is
	// returned although ctx has ended is stopped by the supervisor.
	//
	// Start is never called while an earlier Run of the same child is not
	// Done, nor while an earlier call has not returned; but for a replacement
	// ([Supervisor.Replace], where Attempt.Beside is set), which is started
	// beside the run it is to follow, and for the start after one, when the
	// other run of the two (or its start) may still be on its way to its end.
	// More than two are never alive.
	Start(ctx context.Context, a Attempt) (Run, error)
}

// ChildFunc lets a function be a [Child].
type ChildFunc func(ctx context.Context, a Attempt) (Run, error)

// Start calls f.
func (f ChildFunc) Start(ctx context.Context, a Attempt) (Run, error) { return f(ctx, a) }

// Attempt tells a child why it is started.
type Attempt struct {
	Restarts int    // restarts so far, this one included; 0 at the first start
	Cause    string // in words, "" at a plain start: "exited with code 3", "file changed"
	// Beside is the run that this one is to take the place of when it is
	// ready, and beside which it is started. nil: nothing runs.
	Beside Run
}

// Run is one life of a child. All methods may be called from several
// goroutines, and after the end.
type Run interface {
	// Ready is closed when the run is ready for work. A nil or closed channel
	// means at once.
	Ready() <-chan struct{}
	// Done is closed when the run has ended and nothing of it is left. Until
	// then no other run of the child is started, see Child.Start.
	Done() <-chan struct{}
	// Exit says how it ended. It is called only after Done is closed.
	Exit() Exit
	// Stop asks the run to end, politely, and must not wait for it or block.
	// After the end it does nothing.
	Stop(cause string)
	// Kill ends the run by force, and must not wait or block. After the end it
	// does nothing.
	Kill(cause string)
}

// Exit is how a run ended.
type Exit struct {
	Code   int    // exit code; -1 where a signal ended it or nothing was started
	Signal string // "SIGKILL", …, "" where none ended it
	// Failed counts the run as failed whatever its code. In what the
	// supervisor reports it is also set for every non-zero Code, Signal or Err.
	Failed bool
	Cause  string    // why it was ended, where somebody ended it: "stop", "oom", "spawn", …
	Err    string    // what went wrong, where nothing could be started
	At     time.Time // when it ended; zero means when it was noticed
}

// Policy says which runs are followed by another.
type Policy uint8

// The restart policies.
const (
	Always    Policy = iota // after every end that was not asked for
	OnFailure               // only where the run failed
	Never                   // not at all
)

// ReadyAction is what happens to a run that is not ready in time.
type ReadyAction uint8

// What to do at ReadyTimeout.
const (
	FailRun      ReadyAction = iota // end the run and count it as failed
	TreatAsReady                    // take it as ready
)

// Condition is what a dependency must have reached.
type Condition uint8

// The conditions of a dependency. A child that has run and completed (see
// DepCompleted) and was not stopped by request satisfies all three.
const (
	DepStarted   Condition = iota // a run exists
	DepReady                      // state online
	DepCompleted                  // a run ended by itself with code 0
)

// Dep is one thing a child needs before it is started.
type Dep struct {
	// On is the name of a child, or a group: then every child of the group
	// must satisfy the condition. What is not known (yet) is waited for.
	On        string
	Condition Condition
}

// Backoff is an exponential wait with full jitter: before the n-th restart in
// a row after an unstable run the wait is evenly spread between 0 and
// min(Max, Initial·Factorⁿ⁻¹). The restart after a stable run is immediate.
type Backoff struct {
	Initial time.Duration // 0: no backoff
	Max     time.Duration // 0: one minute
	Factor  float64       // below 1: 2
}

// Spec is how one child is to be run. Only Name and Child must be set.
type Spec struct {
	// Name is unique in its supervisor.
	Name string
	// Group is a label that dependencies can name, "" for none. Many children
	// may carry the same (all instances of an app).
	Group string
	Child Child

	// Restart says which ends are followed by another run.
	Restart Policy
	// StopCodes are exit codes by which a run says that it wants to stay
	// stopped, whatever Restart says.
	StopCodes []int
	// MinUptime is how long a run must have been ready to count as stable. A
	// stable run resets the backoff and the count of unstable runs. 0: one
	// second; below 0: every run that was ready is stable.
	MinUptime time.Duration
	// MaxRestarts is the restart intensity: one more restart than that within
	// Window, and the child is errored. With Window 0, that many unstable runs
	// in a row. 0: 16; below 0: no limit, but from the 17th unstable run in a row
	// on each restart waits 100 ms at least.
	MaxRestarts int
	Window      time.Duration
	// Delay is a fixed wait before each restart that was not asked for. It is
	// not used where Backoff.Initial is set.
	Delay   time.Duration
	Backoff Backoff

	// StartTimeout bounds one call of Child.Start. 0: 30 seconds.
	StartTimeout time.Duration
	// ReadyTimeout bounds the wait for readiness. 0: no bound.
	ReadyTimeout   time.Duration
	OnReadyTimeout ReadyAction
	// Grace is the time from Run.Stop to Run.Kill. 0: ten seconds; below 0:
	// killed at once.
	Grace time.Duration

	DependsOn []Dep

	// Adopt takes over what an earlier supervisor knew of the child. Only
	// [Supervisor.Add] looks at it.
	Adopt *Adoption
}

// Adoption is what is known of a child that lived before its supervisor did.
type Adoption struct {
	// Run is a run that lives, or that ended unseen (its Done is closed: then
	// the restart policy is applied to its end). It is taken over without a
	// start, or stopped where the child is added as not started. nil: nothing
	// runs.
	Run Run
	// Since is when Run was started. Zero: now.
	Since time.Time
	// Beside is the other run of a replacement that was under way: it is
	// stopped, with its grace. nil: there is none.
	Beside Run
	// State without a Run: StateErrored or StateStopped together with
	// started = true leave the child so, as its policy had decided before.
	// Other states mean nothing here.
	State  State
	Reason string // shown with State

	Restarts int         // see Status
	Unstable int         // see Status
	Recent   []time.Time // see Status
	LastExit *Exit
}

// Strategy says what the restart of one child means for its siblings. It
// concerns restarts after a run that ended by itself, not those asked for.
type Strategy uint8

// The strategies. Siblings are stopped in reverse dependency order and
// started in dependency order when all of them have ended. Siblings that are
// stopped, completed or errored stay so. A child that is errored itself, or
// stays stopped by its policy, leaves its siblings as they are.
const (
	OneForOne  Strategy = iota // the child alone
	OneForAll                  // all siblings too
	RestForOne                 // those added after it and those that depend on it
)

// Options are the settings of a supervisor; the zero value is useful.
type Options struct {
	Strategy Strategy
	// MaxRestarts within Window over all children: one more, and the
	// supervisor gives up: all its children are stopped and errored, until they
	// are started again, or its parent starts it again where it is nested. 0 or
	// below: no limit. Window 0: five seconds.
	MaxRestarts int
	Window      time.Duration
	// Nested supervisors start nothing until their parent starts them by way
	// of [Supervisor.AsChild].
	Nested bool
	// Starts is how many calls of Child.Start may be under way at a time.
	// 0: 16.
	Starts int
	// OnChange is told every change, in order, one call at a time, from a
	// goroutine of its own and outside all locks: it may call the supervisor.
	// It should be quick, since a slow one delays the reports behind it
	// (supervision itself goes on).
	OnChange func(Status)
	// Rand returns a number in [0,1) for the jitter. It is called one at a
	// time. nil: math/rand/v2.
	Rand func() float64
}

// State is where a child is in its life.
type State string

// The states of a child.
const (
	StateStopped  State = "stopped"  // nothing runs: asked for, completed, or ended and not to be restarted
	StateWaiting  State = "waiting"  // for a dependency, or for siblings to end
	StateStarting State = "starting" // being started, or started and not ready yet
	StateOnline   State = "online"   // runs and is ready
	StateUnready  State = "unready"  // runs, was ready and is not now (SetReady)
	StateStopping State = "stopping" // was asked to end and has not yet
	StateBackoff  State = "backoff"  // waits for its next start
	StateErrored  State = "errored"  // gave up
)

// Status is a child as it was at one moment.
type Status struct {
	Name  string
	Group string
	State State
	// Wanted is what was asked for last: true after Start, false after Stop. It
	// outlives Shutdown, Detach and a stop of a nested supervisor.
	Wanted bool
	// Run is the run that lives, nil where none does.
	Run Run
	// Beside is the other run during a replacement: the new one until it is
	// ready, then the old one until it has ended.
	Beside Run
	// Since is when Run was started, or the state entered where none lives.
	Since time.Time
	// Restarts counts all restarts since the child was added or reset, asked
	// for or not.
	Restarts int
	// Unstable counts the unstable runs in a row.
	Unstable int
	// Recent are the times of the automatic restarts within the spec's Window;
	// kept for an Adoption.
	Recent []time.Time
	// NextStart is when a child in backoff will be started, else zero.
	NextStart time.Time
	// LastExit is the latest end, nil where there was none. Each end has its
	// own pointer; what it points to never changes.
	LastExit *Exit
	// Completed: a run ended by itself with code 0 since it was last asked for.
	Completed bool
	// Reason says in words why the child is in its state, "" where that needs
	// no word.
	Reason string
	// Removed is set in the last report of a child.
	Removed bool
}
