package supervise

import (
	"context"
	"errors"
)

// Errors that callers decide on; they are wrapped with the name.
var (
	ErrUnknown = errors.New("no such child")
	ErrExists  = errors.New("a child of this name exists")
	ErrRemoved = errors.New("the child is being removed")
	ErrClosed  = errors.New("the supervisor is shut down")
	ErrCycle   = errors.New("dependency cycle")
	ErrSpec    = errors.New("invalid child spec")
)

// Supervisor runs children. All methods may be called from any goroutine.
type Supervisor struct{}

// New makes a supervisor without children. It holds no goroutine and no timer
// while nothing of it runs.
func New(o Options) *Supervisor { panic("soon") }

// Add adds a child and, where started is set, starts it as Start does. What it
// depends on may be added later. It refuses a name that is taken (ErrExists),
// a spec that makes no sense (ErrSpec) and a dependency cycle (ErrCycle, the
// cycle spelled by name).
func (s *Supervisor) Add(spec Spec, started bool) error { panic("soon") }

// Update replaces the spec of the child of that name without a restart: each
// field counts from the next time it is looked at. Adopt is ignored.
func (s *Supervisor) Update(spec Spec) error { panic("soon") }

// Start asks for children to run and does not wait for it. One that is
// stopped, completed or errored starts afresh (backoff and unstable count at
// zero); one whose dependencies are not met waits for them; one in backoff
// starts at once; one that is stopping starts when it has ended; one that runs
// or starts is left alone. No name means all.
// All names are looked up first: ErrUnknown means that nothing was done.
func (s *Supervisor) Start(names ...string) error { panic("soon") }

// Stop asks for children to stop, in reverse dependency order where they
// depend on each other, and does not wait for it (see Wait and Ended). It
// cancels whatever is pending: a start, a restart, a wait. cause is what
// Run.Stop is told; "" is "stop". No name means all.
func (s *Supervisor) Stop(cause string, names ...string) error { panic("soon") }

// Restart asks for a new run of each child and does not wait for it: stopped
// in reverse dependency order, started in dependency order. It counts as one
// restart, resets backoff and unstable count, and starts what was stopped or
// errored. A later Stop wins. cause is what Run.Stop and Attempt are told; ""
// is "restart". No name means all.
func (s *Supervisor) Restart(cause string, names ...string) error { panic("soon") }

// Fail ends the runs of children as failed ones, for instance where a liveness
// probe says so: stopped with grace, then treated by policy, intensity and
// backoff as if it had crashed. It does nothing where nothing runs.
func (s *Supervisor) Fail(cause string, names ...string) error { panic("soon") }

// SetReady moves a child between online and unready, and from starting to
// online. reason is shown while it is unready. It does nothing in other states.
func (s *Supervisor) SetReady(name string, ready bool, reason string) error { panic("soon") }

// Reset sets the counters of children (Restarts, Unstable, Recent) to zero.
// No name means all.
func (s *Supervisor) Reset(names ...string) error { panic("soon") }

// Remove stops children as Stop does, waits for their end and forgets them. If
// ctx ends first its error is returned and the removal goes on. No name means
// none.
func (s *Supervisor) Remove(ctx context.Context, names ...string) error { panic("soon") }

// Status returns one child; false where there is none of that name.
func (s *Supervisor) Status(name string) (Status, bool) { panic("soon") }

// All returns all children in the order they were added.
func (s *Supervisor) All() []Status { panic("soon") }

// Wait waits until each of the children has met the condition (it need not
// hold for all at one moment) and returns the Status that met it, in the order
// of names. until is called under a lock: it must be quick and not call the
// supervisor. A child that is removed meanwhile is an error (ErrRemoved). On
// error the latest statuses are returned with it. No name means all there are.
func (s *Supervisor) Wait(ctx context.Context, until func(Status) bool, names ...string) ([]Status, error) {
	panic("soon")
}

// Ended is a condition for Wait: nothing runs and nothing is about to.
func Ended(st Status) bool { panic("soon") }

// Settled is a condition for Wait: the child is not on its way to another
// state: stopped, online, unready or errored.
func Settled(st Status) bool { panic("soon") }

// Up is a condition for Wait: online.
func Up(st Status) bool { panic("soon") }

// Shutdown stops all children in reverse dependency order and waits for their
// end; from now on nothing is started. If ctx ends first, all that is left is
// killed, and the error says who it was; Shutdown may be called again to wait
// for them.
func (s *Supervisor) Shutdown(ctx context.Context) error { panic("soon") }

// Detach lets go of all runs without stopping them, so that another supervisor
// may adopt them: nothing is started or stopped any more, starts under way are
// waited for (or ctx). It returns the children as they were left.
func (s *Supervisor) Detach(ctx context.Context) ([]Status, error) { panic("soon") }

// AsChild makes a supervisor a child of another, for which it must have been
// made with Options.Nested. Started, it starts all children that are wanted;
// its run is ready when all of them were online or completed, is Done when all
// have ended, and failed where the supervisor gave up.
func (s *Supervisor) AsChild() Child { panic("soon") }
