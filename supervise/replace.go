package supervise

import (
	"cmp"
	"context"
	"errors"
	"fmt"
	"time"
)

// Errors of Replace that callers decide on; they are wrapped with the name.
var (
	// ErrNotRunning: there is no run that could be replaced.
	ErrNotRunning = errors.New("nothing runs that could be replaced")
	// ErrReplacing: a replacement is under way, or the run before has not ended.
	ErrReplacing = errors.New("a replacement is under way")
	// ErrCalledOff: a stop, a restart or the end of ctx came first.
	ErrCalledOff = errors.New("the replacement was called off")
	// ErrTookOver: the run that was to be replaced ended before the new one was
	// ready, which has taken its place all the same.
	ErrTookOver = errors.New("the run before ended first; the new one has taken its place before it was ready")
)

// ReplaceError says that the new run of a replacement did not become ready.
type ReplaceError struct {
	Name string
	Why  string // in words
	Exit *Exit  // how the new run ended, nil where that is not known (yet)
}

// Error implements error.
func (e *ReplaceError) Error() string {
	return fmt.Sprintf("%q: the new run did not become ready: %s", e.Name, e.Why)
}

// beside is the second run of a child during a replacement: the new one until
// it is ready, then the old one until it has ended.
type beside struct {
	c     *child
	att   *attempt // the start under way
	run   Run
	since time.Time // of run
	old   bool      // it is the run that was replaced
	was   *Exit     // child.lastExit at the swap

	err      error // why the new run is not to take over
	stopSent bool
	killed   bool
	cause    string // of the replacement, then of the stop
	timer    *time.Timer
	gen      uint64

	told      chan struct{} // closed when Replace need wait no longer
	concluded bool
}

// Replace starts a new run of a child beside the one it has, waits until the
// new one is ready, makes it the child's run and stops the old one with its
// grace. It returns when the old one has ended, or does not although it was
// killed. A nil error means that the new run is the child's.
//
// Until the new run is ready the old one is the child's in every respect. A
// new run that ends before it is ready, cannot be started or is not ready in
// time (ReadyTimeout) is stopped with its grace, and the error is a
// [*ReplaceError]; the old run goes on as if nothing had been, and no counter
// has changed. A success counts as one restart and resets backoff and unstable
// count, as Restart does.
//
// Stop, Restart, Remove, Shutdown, a common restart of siblings and a
// supervisor that gives up call the replacement off: ErrCalledOff. So does the
// end of ctx before the new run is ready; its run is then stopped without being
// waited for. Where the old run ends by itself or by Fail, the new one becomes
// the child's run at once, as if it had been started by a restart: ErrTookOver;
// that is one restart, whatever the policy says of such an end, and concerns no
// sibling.
//
// cause is what Attempt and the Stop of the old run are told; "" is "replace".
func (s *Supervisor) Replace(ctx context.Context, name, cause string) error {
	s.mu.Lock()
	set, err := s.startable([]string{name})
	if err != nil {
		s.unlock()
		return err
	}
	c := set[0]
	switch {
	case c.beside != nil:
		err = ErrReplacing
	case c.run == nil || c.intent != none:
		err = ErrNotRunning
	case ctx.Err() != nil:
		err = fmt.Errorf("%w: %w", ErrCalledOff, ctx.Err())
	}
	if err != nil {
		s.unlock()
		return fmt.Errorf("%q: %w", name, err)
	}
	b := &beside{c: c, cause: cmp.Or(cause, "replace"), told: make(chan struct{})}
	c.beside = b
	s.live++
	startCtx, cancel := context.WithCancel(context.Background())
	a := &attempt{c: c, beside: b, ctx: startCtx, cancel: cancel,
		att: Attempt{Restarts: c.restarts + 1, Cause: b.cause, Beside: c.run}}
	b.att = a
	a.job = s.starts.submit(func() { s.start(a) })
	s.report(c)
	s.unlock()

	select {
	case <-b.told:
	case <-s.letGo:
	case <-ctx.Done():
	}
	s.mu.Lock()
	defer s.unlock()
	switch {
	case b.concluded || b.old:
		return b.err
	case s.detached:
		return ErrClosed
	}
	err = fmt.Errorf("%q: %w: %w", name, ErrCalledOff, ctx.Err())
	s.callOff(b, err, "called off")
	return err
}

// FailRun ends a run of the child as a failed one: its run, as Fail does, or
// the new run of a replacement, which then fails. It does nothing where run is
// neither of the two or is being stopped already.
func (s *Supervisor) FailRun(cause, name string, run Run) error {
	s.mu.Lock()
	defer s.unlock()
	if s.detached {
		return ErrClosed
	}
	set, err := s.lookUp([]string{name})
	if err != nil {
		return err
	}
	c := set[0]
	cause = cmp.Or(cause, "failed")
	switch b := c.beside; {
	case c.run == run && c.run != nil && c.intent == none:
		s.endAll(set, toFail, cause)
	case b != nil && b.run == run && b.run != nil:
		s.callOff(b, &ReplaceError{Name: name, Why: cause}, cause)
	}
	return nil
}

// ---- what follows runs under Supervisor.mu

func (b *beside) conclude() {
	if !b.concluded {
		b.concluded = true
		close(b.told)
	}
}

func (b *beside) disarm() {
	b.gen++
	if b.timer != nil {
		b.timer.Stop()
		b.timer = nil
	}
}

func (s *Supervisor) armBeside(b *beside, d time.Duration) {
	b.disarm()
	gen := b.gen
	b.timer = time.AfterFunc(d, func() {
		s.mu.Lock()
		defer s.unlock()
		if b.gen == gen && !s.detached {
			b.timer = nil
			s.fireBeside(b)
		}
	})
}

// fireBeside is what follows when the time of what b does is over.
func (s *Supervisor) fireBeside(b *beside) {
	c := b.c
	switch {
	case b.att != nil:
		b.att.late = true
		b.att.cancel()
		s.starts.writeOff(b.att.job)
		if b.err == nil {
			b.err = &ReplaceError{Name: c.spec.Name, Why: fmt.Sprintf("its start has not returned within %s", c.startTimeout())}
		}
		s.stuckBeside(b)
	case b.killed:
		s.stuckBeside(b)
	case b.stopSent:
		s.killBeside(b)
	case c.spec.OnReadyTimeout == TreatAsReady:
		s.swap(b)
	default:
		why := fmt.Sprintf("not ready within %s", c.spec.ReadyTimeout)
		s.callOff(b, &ReplaceError{Name: c.spec.Name, Why: why}, why)
	}
}

// stuckBeside holds up nobody for what does not end.
func (s *Supervisor) stuckBeside(b *beside) {
	b.conclude()
	if b.c.final != nil {
		s.release(b.c)
	}
}

// callOff ends the new run of a replacement. It does nothing where that has
// taken over, or is being ended already.
func (s *Supervisor) callOff(b *beside, err error, cause string) {
	if b.old || b.err != nil {
		return
	}
	b.err, b.cause = err, cause
	switch a := b.att; {
	case a != nil && !a.called:
		a.unwanted = true
		a.cancel()
		b.att = nil
		s.besideOver(b)
	case a != nil:
		a.cancel()
	default:
		s.stopBeside(b)
	}
}

// callOffAll calls the replacements of children off that are to end.
func (s *Supervisor) callOffAll(set []*child, cause string) {
	for _, c := range set {
		if b := c.beside; b != nil {
			s.callOff(b, fmt.Errorf("%q: %w: %s", c.spec.Name, ErrCalledOff, cause), cause)
		}
	}
}

func (s *Supervisor) stopBeside(b *beside) {
	if b.c.spec.Grace < 0 {
		s.killBeside(b)
		return
	}
	b.stopSent = true
	run, cause := b.run, b.cause
	s.stops.submit(func() { run.Stop(cause) })
	s.armBeside(b, b.c.grace())
}

func (s *Supervisor) killBeside(b *beside) {
	b.stopSent, b.killed = true, true
	run, cause := b.run, b.cause
	s.kills.submit(func() { run.Kill(cause) })
	s.armBeside(b, stuckAfter)
}

// startedBeside is the rest of start for a replacement.
func (s *Supervisor) startedBeside(a *attempt, run Run, err error, ready bool) {
	b, c := a.beside, a.c
	b.att = nil
	a.cancel()
	b.disarm()
	if err != nil {
		if s.detached {
			return
		}
		if b.err == nil {
			e := &Exit{Code: -1, Failed: true, Cause: "spawn", Err: err.Error(), At: time.Now()}
			b.err = &ReplaceError{Name: c.spec.Name, Why: e.words(), Exit: e}
		}
		s.besideOver(b)
		return
	}
	b.run, b.since = run, time.Now()
	if s.detached {
		return
	}
	go s.watch(c, run, !ready)
	switch {
	case a.late:
		s.killBeside(b)
	case b.err != nil:
		s.stopBeside(b)
	case ready:
		s.swap(b)
	default:
		if t := c.spec.ReadyTimeout; t > 0 {
			s.armBeside(b, t)
		}
		s.report(c)
	}
}

// swap makes the new run, which is ready, the child's, and stops the old one.
func (s *Supervisor) swap(b *beside) {
	c := b.c
	b.disarm()
	c.disarm()
	old, since := c.run, b.since
	stopSent, killed := c.stopSent, c.killed // where it was failed meanwhile
	c.run, c.runSince = b.run, since
	c.intent, c.stopSent, c.killed = none, false, false
	c.countReplaced()
	b.run, b.old, b.was = old, true, c.lastExit
	s.unhold(c)
	s.becomeReady(c)
	switch {
	case killed:
		b.stopSent, b.killed = true, true
		s.armBeside(b, stuckAfter)
	case stopSent:
		b.stopSent = true
		s.armBeside(b, c.grace())
	default:
		s.stopBeside(b)
	}
}

func (c *child) countReplaced() {
	c.restarts++
	c.completed = false
	c.unstable, c.recent = 0, nil
}

// unhold ends the part of c in the order of a stop: it does not end.
func (s *Supervisor) unhold(c *child) {
	c.holds, c.stopID = 0, 0
	s.release(c)
}

// promote makes the new run the child's although it is not ready, since the
// old one has ended, as e says. It reports false where there is none.
func (s *Supervisor) promote(c *child, e *Exit) bool {
	b := c.beside
	if b == nil || b.old || b.err != nil || c.intent != none && c.intent != toFail {
		return false
	}
	b.disarm()
	c.disarm()
	c.beside = nil
	s.live--
	c.lastExit = e
	c.att, c.run, c.runSince = b.att, b.run, b.since
	c.intent, c.stopSent, c.killed, c.cause = none, false, false, b.cause
	c.readyAt = time.Time{}
	c.countReplaced()
	s.unhold(c)
	b.att, b.run = nil, nil
	b.err = fmt.Errorf("%q: %w (it %s)", c.spec.Name, ErrTookOver, e.words())
	b.conclude()
	switch {
	case c.att != nil:
		c.att.beside = nil
		if c.att.called {
			s.arm(c, c.startTimeout())
		}
	case c.spec.ReadyTimeout > 0:
		s.arm(c, c.spec.ReadyTimeout)
	}
	s.set(c, StateStarting, e.words())
	return true
}

// besideEnded is what follows when b's run is done.
func (s *Supervisor) besideEnded(b *beside, e *Exit) {
	b.run = nil
	if b.old {
		if c := b.c; c.lastExit == b.was { // else something ended after the swap
			c.lastExit = e
		}
	} else {
		var re *ReplaceError
		switch {
		case b.err == nil:
			b.err = &ReplaceError{Name: b.c.spec.Name, Why: e.words(), Exit: e}
		case errors.As(b.err, &re):
			re.Exit = e
		}
	}
	s.besideOver(b)
}

// adoptBeside takes over the other run of a replacement, to end it.
func (s *Supervisor) adoptBeside(c *child, run Run) {
	b := &beside{c: c, run: run, old: true, was: c.lastExit, cause: "replace", told: make(chan struct{})}
	c.beside = b
	s.live++
	go s.watch(c, run, false)
	s.stopBeside(b)
}

// besideOver forgets b, of which nothing is left.
func (s *Supervisor) besideOver(b *beside) {
	c := b.c
	b.disarm()
	b.conclude()
	c.beside = nil
	s.live--
	f := c.final
	if f == nil {
		s.report(c)
		return
	}
	s.set(c, f.state, f.reason)
	s.release(c)
	if c.removing && !c.alive() {
		s.forget(c)
	}
}

// final is the state of a child that has come to its end but for the second
// run of a replacement.
type final struct {
	state  State
	reason string
}
