package supervise

import (
	"context"
	"errors"
	"fmt"
	"math"
	"slices"
	"time"
)

// Everything in this file runs under Supervisor.mu, but for what says
// otherwise.

// intent is what follows when what is alive of a child has ended.
type intent uint8

const (
	none      intent = iota // what its policy says
	toFail                  // what its policy says of a failed run
	toStop                  // nothing
	toStart                 // a start that was asked for meanwhile
	toRestart               // a restart that was asked for
	toRound                 // a restart together with its siblings
	toGiveUp                // nothing: the supervisor gave up
)

// stuckAfter is how long after a kill the children that wait for the end of
// this one are held back.
const stuckAfter = 5 * time.Second

// A child that may be restarted without limit and without a delay would keep a
// core busy if it cannot even start.
const (
	spinAfter = 16 // unstable runs in a row
	spinDelay = 100 * time.Millisecond
)

type child struct {
	spec     Spec
	seq      uint64
	state    State
	want     bool
	removing bool
	removed  bool
	// completed: see Status.
	completed bool

	// What is alive: a start under way, or a run. Never both.
	att     *attempt
	run     Run
	counted bool // in Supervisor.live

	// beside is the second run of a replacement, nil where none is under way.
	// It is ended beside whatever happens to the child, and holds up only the
	// word that nothing of the child is left: final.
	beside *beside
	final  *final

	intent     intent
	stopSent   bool   // Run.Stop or Run.Kill was called
	killed     bool   // Run.Kill was called
	cause      string // of the stop under way, then of the next start
	reason     string
	stateSince time.Time
	runSince   time.Time
	readyAt    time.Time // zero where the run was not ready yet
	next       time.Time // in backoff
	restarts   int
	unstable   int
	recent     []time.Time
	lastExit   *Exit

	// One timer serves all states, since each has at most one thing to wait
	// for. gen tells a timer that fired from one that was replaced meanwhile.
	timer *time.Timer
	gen   uint64

	// Held back until dependents have ended: holds counts them; blocks are
	// those that this one holds back.
	holds  int
	stopID uint64
	blocks []hold

	round   *round
	waiters []place
}

type hold struct {
	c  *child
	id uint64 // of the stop that is held back
}

// attempt is one start, from the decision to the return of Child.Start.
type attempt struct {
	c        *child
	beside   *beside // nil unless it is for a replacement
	ctx      context.Context
	cancel   context.CancelFunc
	job      *job
	called   bool // Child.Start was called
	unwanted bool // dropped before it was called
	late     bool // StartTimeout is over: what still comes is killed
	att      Attempt
}

// round is one common restart of siblings.
type round struct {
	failed  *child
	members []*child
	pending map[*child]struct{} // members that have not ended yet
	delayed bool                // it is not yet time for failed to start again
}

func (c *child) setSpec(sp Spec) {
	sp.StopCodes = slices.Clone(sp.StopCodes)
	sp.DependsOn = slices.Clone(sp.DependsOn)
	sp.Adopt = nil
	c.spec = sp
}

func (c *child) alive() bool { return c.att != nil || c.run != nil }

func (c *child) minUptime() time.Duration {
	if c.spec.MinUptime == 0 {
		return time.Second
	}
	return c.spec.MinUptime
}

func (c *child) stable(at time.Time) bool {
	return !c.readyAt.IsZero() && at.Sub(c.readyAt) >= c.minUptime()
}

func (c *child) status() Status {
	st := Status{
		Name: c.spec.Name, Group: c.spec.Group, State: c.state, Wanted: c.want,
		Run: c.run, Since: c.stateSince, Restarts: c.restarts, Unstable: c.unstable,
		Recent: slices.Clone(c.recent), NextStart: c.next, LastExit: c.lastExit,
		Completed: c.completed, Reason: c.reason, Removed: c.removed,
	}
	if c.run != nil {
		st.Since = c.runSince
	}
	if b := c.beside; b != nil {
		st.Beside = b.run
	}
	if c.run != nil {
		if c.unstable > 0 && c.stable(time.Now()) {
			st.Unstable = 0
		}
	}
	return st
}

// set moves c to a state and reports it.
func (s *Supervisor) set(c *child, st State, reason string) {
	c.final = nil
	if (st == StateStopped || st == StateErrored) && c.beside != nil {
		c.final = &final{st, reason}
		st, reason = StateStopping, "waits for the other run of its replacement to end"
	}
	if c.state != st {
		c.state = st
		c.stateSince = time.Now()
	}
	c.reason = reason
	if st == StateWaiting {
		s.waiting[c] = struct{}{}
	} else {
		delete(s.waiting, c)
	}
	if st != StateBackoff {
		c.next = time.Time{}
	}
	s.report(c)
}

func (s *Supervisor) report(c *child) {
	if len(s.waiting) > 0 && (s.needed[c.spec.Name] > 0 || s.needed[c.spec.Group] > 0) {
		s.recheck = true
	}
	if s.opt.OnChange == nil && len(c.waiters) == 0 {
		return
	}
	st := c.status()
	if f := s.opt.OnChange; f != nil {
		s.tell.submit(func() { f(st) })
	}
	c.waiters = slices.DeleteFunc(c.waiters, func(p place) bool {
		if p.w.left == 0 || p.w.err != nil || !p.w.until(st) {
			return false
		}
		p.w.got[p.i] = st
		if p.w.left--; p.w.left == 0 {
			close(p.w.over)
		}
		return true
	})
}

func (c *child) disarm() {
	c.gen++
	if c.timer != nil {
		c.timer.Stop()
		c.timer = nil
	}
}

func (s *Supervisor) arm(c *child, d time.Duration) {
	c.disarm()
	gen := c.gen
	c.timer = time.AfterFunc(d, func() {
		s.mu.Lock()
		defer s.unlock()
		if c.gen == gen && !s.detached {
			c.timer = nil
			s.fire(c)
		}
	})
}

// fire is what the state of c does when its time is over.
func (s *Supervisor) fire(c *child) {
	switch {
	case c.att != nil:
		a := c.att
		a.late = true
		a.cancel()
		s.starts.writeOff(a.job)
		if c.intent == none {
			c.intent = toFail
			c.cause = "start timed out"
		}
		s.set(c, StateStopping, fmt.Sprintf("its start has not returned within %s; nothing else can be started until it does", c.startTimeout()))
		s.release(c)
	case c.run != nil && c.state == StateStarting:
		if c.spec.OnReadyTimeout == TreatAsReady {
			s.becomeReady(c)
		} else {
			s.endAll([]*child{c}, toFail, fmt.Sprintf("not ready within %s", c.spec.ReadyTimeout))
		}
	case c.run != nil && c.state == StateStopping && c.killed:
		s.set(c, StateStopping, "was killed and has not ended yet")
		s.release(c)
	case c.run != nil && c.state == StateStopping:
		s.kill(c)
		s.set(c, StateStopping, fmt.Sprintf("killed: it did not stop within %s", c.grace()))
	case c.state == StateBackoff:
		s.begin(c)
	}
}

func (c *child) startTimeout() time.Duration {
	if c.spec.StartTimeout <= 0 {
		return 30 * time.Second
	}
	return c.spec.StartTimeout
}

func (c *child) grace() time.Duration {
	if c.spec.Grace == 0 {
		return 10 * time.Second
	}
	return max(c.spec.Grace, 0)
}

// ---- starting

// beginAll starts children of which nothing is alive, afresh.
func (s *Supervisor) beginAll(set []*child) {
	// None of them must look as if it had ended while another is looked at.
	for _, c := range set {
		c.disarm()
		c.cause = ""
		if c.state != StateBackoff {
			c.completed = false
			c.unstable, c.recent = 0, nil
		}
		c.state, c.stateSince, c.final = StateWaiting, time.Now(), nil
	}
	for _, c := range set {
		s.begin(c)
	}
}

// begin starts c, of which nothing is alive, as soon as nothing is in the way.
func (s *Supervisor) begin(c *child) {
	c.disarm()
	if c.alive() {
		return
	}
	if !s.active {
		why := "its supervisor is not started"
		if s.closed {
			why = "its supervisor is shut down"
		}
		s.set(c, StateStopped, why)
		return
	}
	if r := c.round; r != nil {
		if r.failed == c {
			r.delayed = false
		}
		s.set(c, StateWaiting, "waits for its siblings, after "+r.failed.spec.Name+" failed")
		s.open(r)
		return
	}
	if why, hopeless := s.unmet(c); hopeless {
		s.set(c, StateErrored, why)
		return
	} else if why != "" {
		if c.state != StateWaiting || c.reason != why {
			s.set(c, StateWaiting, why)
		} else {
			s.waiting[c] = struct{}{}
		}
		return
	}
	ctx, cancel := context.WithCancel(context.Background())
	a := &attempt{c: c, ctx: ctx, cancel: cancel, att: Attempt{Restarts: c.restarts, Cause: c.cause}}
	c.att = a
	c.intent = none
	c.readyAt = time.Time{}
	c.counted = true
	s.live++
	a.job = s.starts.submit(func() { s.start(a) })
	s.set(c, StateStarting, c.cause)
}

// startMet starts the waiting children that need wait no longer.
func (s *Supervisor) startMet() {
	var met []*child
	for c := range s.waiting {
		if c.round != nil {
			continue
		}
		if why, _ := s.unmet(c); why != c.reason {
			met = append(met, c)
		}
	}
	slices.SortFunc(met, bySeq)
	for _, c := range met {
		if c.state == StateWaiting && c.round == nil {
			s.begin(c)
		}
	}
}

// start runs on the lane, without the lock.
func (s *Supervisor) start(a *attempt) {
	c := a.c
	s.mu.Lock()
	if a.unwanted {
		s.mu.Unlock()
		return
	}
	a.called = true
	how := c.spec.Child
	if a.beside != nil {
		s.armBeside(a.beside, c.startTimeout())
	} else {
		s.arm(c, c.startTimeout())
	}
	s.mu.Unlock()

	run, err := call(how, a)
	ready := false
	if err == nil {
		ready = closed(run.Ready())
	}

	s.mu.Lock()
	defer s.unlock()
	if a.beside != nil {
		s.startedBeside(a, run, err, ready)
		return
	}
	c.att = nil
	a.cancel()
	c.disarm()
	if err != nil {
		e := &Exit{Code: -1, Failed: true, Cause: "spawn", Err: err.Error(), At: time.Now()}
		if a.late {
			e.Err = fmt.Sprintf("start took longer than %s: %s", c.startTimeout(), e.Err)
		}
		if c.intent == none || c.intent == toFail {
			c.lastExit = e
		}
		if s.detached {
			c.state = StateStopped
			return
		}
		s.down(c, e)
		return
	}
	c.run = run
	c.runSince = time.Now()
	if s.detached {
		return
	}
	go s.watch(c, run, !ready)
	switch {
	case a.late:
		s.kill(c)
		s.set(c, StateStopping, "killed: its start took too long")
	case c.intent != none:
		if c.holds == 0 {
			s.sendStop(c)
		}
		s.report(c)
	case ready:
		s.becomeReady(c)
	default:
		if t := c.spec.ReadyTimeout; t > 0 {
			s.arm(c, t)
		}
		s.report(c)
	}
}

// call runs without the lock.
func call(how Child, a *attempt) (run Run, err error) {
	defer func() {
		if p := recover(); p != nil {
			run, err = nil, fmt.Errorf("start panicked: %v", p)
		}
	}()
	run, err = how.Start(a.ctx, a.att)
	if err == nil && run == nil {
		err = errors.New("start returned neither a run nor an error")
	}
	return run, err
}

func closed(ch <-chan struct{}) bool {
	if ch == nil {
		return true
	}
	select {
	case <-ch:
		return true
	default:
		return false
	}
}

func (s *Supervisor) becomeReady(c *child) {
	c.disarm()
	c.readyAt = time.Now()
	s.set(c, StateOnline, "")
}

func (s *Supervisor) adopt(c *child, ad *Adoption, ready bool) {
	c.counted = true
	s.live++
	c.run = ad.Run
	c.runSince = ad.Since
	if c.runSince.IsZero() {
		c.runSince = time.Now()
	}
	go s.watch(c, c.run, !ready)
	switch {
	case !c.want:
		s.endAll([]*child{c}, toStop, "stop")
	case ready:
		c.readyAt = c.runSince
		s.set(c, StateOnline, "")
	default:
		if t := c.spec.ReadyTimeout; t > 0 {
			s.arm(c, t)
		}
		s.set(c, StateStarting, "")
	}
}

// ---- following a run

// watch runs on a goroutine of its own, without the lock.
func (s *Supervisor) watch(c *child, run Run, tillReady bool) {
	if tillReady {
		select {
		case <-run.Ready():
		case <-run.Done():
			if !closed(run.Ready()) {
				s.ended(c, run)
				return
			}
		case <-s.letGo:
			return
		}
		// A fresh goroutine has the smallest stack, and this one may live long.
		defer func() { go s.watch(c, run, false) }()
		s.mu.Lock()
		defer s.unlock()
		switch b := c.beside; {
		case s.detached:
		case c.run == run && c.state == StateStarting:
			s.becomeReady(c)
		case b != nil && b.run == run && !b.old && b.err == nil:
			s.swap(b)
		}
		return
	}
	select {
	case <-run.Done():
		s.ended(c, run)
	case <-s.letGo:
	}
}

// ended is called by watch, without the lock.
func (s *Supervisor) ended(c *child, run Run) {
	e := run.Exit()
	s.mu.Lock()
	defer s.unlock()
	b := c.beside
	other := b != nil && b.run == run
	if s.detached || c.run != run && !other {
		return
	}
	if e.At.IsZero() {
		e.At = time.Now()
	}
	if other {
		if b.stopSent && e.Cause == "" {
			e.Cause = b.cause
		}
		e.Failed = e.failed()
		s.besideEnded(b, &e)
		return
	}
	if c.intent != none && e.Cause == "" {
		e.Cause = c.cause
	}
	if c.intent == toFail {
		e.Failed = true
	}
	e.Failed = e.failed()
	if s.promote(c, &e) {
		return
	}
	c.lastExit = &e
	c.run = nil
	s.down(c, &e)
}

func (e *Exit) failed() bool {
	return e.Failed || e.Code != 0 || e.Signal != "" || e.Err != ""
}

func (e *Exit) words() string {
	switch {
	case e.Cause == "spawn" && e.Err != "":
		return "could not be started: " + e.Err
	case e.Err != "":
		return e.Err
	case e.Signal != "" && e.Cause != "":
		return fmt.Sprintf("ended by %s (%s)", e.Signal, e.Cause)
	case e.Signal != "":
		return "ended by " + e.Signal
	case e.Cause != "":
		return fmt.Sprintf("%s (exited with code %d)", e.Cause, e.Code)
	}
	return fmt.Sprintf("exited with code %d", e.Code)
}

// ---- stopping

// endAll makes children end, each after those of the set that depend on it,
// and then be treated as in says.
func (s *Supervisor) endAll(set []*child, in intent, cause string) {
	set = slices.Clone(set)
	slices.SortFunc(set, bySeq)
	if len(set) > 1 && s.withDeps > 0 {
		s.hold(set)
	}
	if in != toFail {
		s.callOffAll(set, cause)
	}
	if in == toStop || in == toGiveUp {
		// Left behind by all of the set before any of their siblings goes on.
		for _, r := range leave(set) {
			defer s.open(r)
		}
	}
	// First what lives, so that nothing is started beside a dependency that is
	// just about to be stopped; latest first.
	for _, c := range slices.Backward(set) {
		if !c.alive() {
			continue
		}
		c.intent, c.cause = in, cause
		switch a := c.att; {
		case a != nil && !a.called:
			a.unwanted = true
			a.cancel()
			c.att = nil
			c.state = StateStopping
		case a != nil:
			a.cancel()
			s.set(c, StateStopping, cause)
		case c.stopSent:
			s.report(c)
		case c.holds > 0:
			c.disarm()
			s.set(c, StateStopping, "waits for those that depend on it to stop")
		default:
			s.set(c, StateStopping, cause)
			s.sendStop(c)
		}
	}
	if in == toRestart {
		for _, c := range set {
			if !c.alive() && c.state != StateWaiting {
				c.disarm()
				c.state, c.stateSince, c.final = StateWaiting, time.Now(), nil
				c.next = time.Time{}
			}
		}
	}
	for _, c := range set {
		if !c.alive() {
			c.intent, c.cause = in, cause
			s.down(c, nil)
		}
	}
}

// hold notes who of the set has to wait for whom.
func (s *Supervisor) hold(set []*child) {
	in := make(map[*child]bool, len(set))
	for _, c := range set {
		// What is being stopped already keeps the order it has: an order given
		// once has no cycle, two mixed might.
		if c.alive() && c.state != StateStopping {
			in[c] = true
			s.seq++
			c.stopID = s.seq
		}
	}
	for _, c := range set {
		if !c.alive() || c.att != nil && !c.att.called {
			continue
		}
		if c.att != nil && c.att.late || c.killed && c.timer == nil {
			continue // stuck: see release
		}
		s.reach(c, func(d *child) {
			if in[d] {
				d.holds++
				c.blocks = append(c.blocks, hold{d, d.stopID})
			}
		})
	}
}

// release lets those go on that wait for c to end.
func (s *Supervisor) release(c *child) {
	blocks := c.blocks
	c.blocks = nil
	for _, h := range blocks {
		d := h.c
		if d.stopID != h.id || d.holds == 0 {
			continue
		}
		if d.holds--; d.holds == 0 && d.run != nil && !d.stopSent {
			s.set(d, StateStopping, d.cause)
			s.sendStop(d)
		}
	}
}

func (s *Supervisor) sendStop(c *child) {
	if c.spec.Grace < 0 {
		s.kill(c)
		return
	}
	c.stopSent = true
	run, cause := c.run, c.cause
	s.stops.submit(func() { run.Stop(cause) })
	s.arm(c, c.grace())
}

func (s *Supervisor) kill(c *child) {
	c.stopSent, c.killed = true, true
	run, cause := c.run, c.cause
	s.kills.submit(func() { run.Kill(cause) })
	s.arm(c, stuckAfter)
}

func (s *Supervisor) killAll(cause string) {
	for _, c := range s.order {
		switch {
		case c.att != nil && c.att.called:
			c.att.late = true
			c.att.cancel()
		case c.run != nil && !c.killed:
			c.cause = cause
			s.kill(c)
		}
		switch b := c.beside; {
		case b == nil:
		case b.att != nil:
			b.att.late = true
			b.att.cancel()
		case !b.killed:
			b.cause = cause
			s.killBeside(b)
		}
	}
}

// down decides what follows when nothing of c is alive (any more). e is how
// the run or the start ended, nil where there was none.
func (s *Supervisor) down(c *child, e *Exit) {
	c.disarm()
	was := c.counted
	if was {
		c.counted = false
		s.live--
	}
	in := c.intent
	c.intent = none
	c.stopSent, c.killed, c.holds, c.stopID = false, false, 0, 0
	if r := c.round; r != nil {
		delete(r.pending, c)
	}
	switch in {
	case none, toFail:
		s.decide(c, e, in == toFail)
	case toStop:
		if was {
			c.completed = false
		}
		if was || c.state != StateStopped {
			s.set(c, StateStopped, stopReason(c.cause))
		}
	case toGiveUp:
		s.set(c, StateErrored, c.cause)
	case toStart:
		c.completed = false
		c.unstable, c.recent = 0, nil
		c.cause = ""
		s.begin(c)
	case toRestart:
		c.restarts++
		c.completed = false
		c.unstable, c.recent = 0, nil
		s.begin(c)
	case toRound:
		c.restarts++
		s.begin(c)
	}
	if c.final != nil && !c.beside.concluded {
		return // see besideOver
	}
	s.release(c)
	if c.removing && !c.alive() && c.beside == nil {
		s.forget(c)
	}
}

func stopReason(cause string) string {
	if cause == "stop" {
		return "stopped as asked"
	}
	return "stopped: " + cause
}

func (s *Supervisor) forget(c *child) {
	c.removed = true
	s.unindex(c)
	delete(s.byName, c.spec.Name)
	delete(s.waiting, c)
	s.order = slices.DeleteFunc(s.order, func(x *child) bool { return x == c })
	s.report(c)
	for _, p := range c.waiters {
		if p.w.err == nil && p.w.left > 0 {
			p.w.got[p.i] = c.status()
			p.w.err = fmt.Errorf("%q: %w", c.spec.Name, ErrRemoved)
			close(p.w.over)
		}
	}
	c.waiters = nil
	s.recheck = true
}

// ---- the restart policy

func (s *Supervisor) decide(c *child, e *Exit, forced bool) {
	sp := &c.spec
	if c.stable(e.At) {
		c.unstable = 0
	} else {
		c.unstable++
	}
	why := e.words()
	failed := e.failed()
	if !failed {
		c.completed = true
	}
	switch {
	case !forced && e.Signal == "" && e.Err == "" && slices.Contains(sp.StopCodes, e.Code):
		s.set(c, StateStopped, why+", which is one of its stop codes")
		return
	case sp.Restart == Never && (forced || e.Cause == "spawn"):
		s.set(c, StateErrored, why)
		return
	case sp.Restart == Never, sp.Restart == OnFailure && !failed:
		if !failed {
			why = "completed"
		}
		s.set(c, StateStopped, why)
		return
	}
	now := time.Now()
	if limit := c.maxRestarts(); limit >= 0 {
		c.recent = within(c.recent, now, sp.Window)
		if sp.Window > 0 && len(c.recent) >= limit {
			s.set(c, StateErrored, fmt.Sprintf("gave up after %s within %s: %s", times(len(c.recent), "restart"), sp.Window, why))
			return
		}
		if sp.Window <= 0 && c.unstable >= limit {
			s.set(c, StateErrored, fmt.Sprintf("gave up after %s in a row: %s", times(c.unstable, "unstable run"), why))
			return
		}
		if sp.Window > 0 {
			c.recent = append(c.recent, now)
		}
	}
	if limit := s.opt.MaxRestarts; limit > 0 {
		s.recent = within(s.recent, now, s.opt.Window)
		if len(s.recent) >= limit {
			s.giveUp(c, fmt.Sprintf("the supervisor gave up after %s within %s; the last to fail was %s: %s",
				times(len(s.recent), "restart"), s.opt.Window, sp.Name, why))
			return
		}
		s.recent = append(s.recent, now)
	}
	c.restarts++
	c.cause = why
	wait := s.delay(c)
	if s.opt.Strategy != OneForOne {
		s.newRound(c, why)
	}
	if wait <= 0 {
		s.begin(c)
		return
	}
	s.arm(c, wait)
	c.next = now.Add(wait)
	s.set(c, StateBackoff, why)
}

func (c *child) maxRestarts() int {
	if c.spec.MaxRestarts == 0 {
		return 16
	}
	return c.spec.MaxRestarts
}

// within drops the times that have left the window.
func within(ts []time.Time, now time.Time, window time.Duration) []time.Time {
	return slices.DeleteFunc(ts, func(t time.Time) bool { return now.Sub(t) >= window })
}

func times(n int, what string) string {
	if n == 1 {
		return "1 " + what
	}
	return fmt.Sprintf("%d %ss", n, what)
}

// delay is the wait before the restart after an end that was just counted.
func (s *Supervisor) delay(c *child) time.Duration {
	wait := max(c.spec.Delay, 0)
	if b := c.spec.Backoff; b.Initial > 0 {
		wait = 0
		if c.unstable > 0 {
			wait = time.Duration(s.opt.Rand() * float64(b.bound(c.unstable)))
		}
	}
	if c.unstable > spinAfter {
		wait = max(wait, spinDelay)
	}
	return wait
}

// bound is the longest wait before the n-th restart in a row.
func (b Backoff) bound(n int) time.Duration {
	if b.Max <= 0 {
		b.Max = time.Minute
	}
	if !(b.Factor >= 1) { // NaN too
		b.Factor = 2
	}
	d := float64(b.Initial) * math.Pow(b.Factor, float64(n-1))
	if !(d < float64(b.Max)) {
		return b.Max
	}
	return time.Duration(d)
}

func (s *Supervisor) giveUp(c *child, why string) {
	s.recent = nil
	s.set(c, StateErrored, why)
	if s.opt.Nested {
		s.active = false
		if s.period != nil {
			s.period.failed = why
		}
	}
	var set []*child
	for _, x := range s.order {
		if x != c && x.busy() {
			set = append(set, x)
		}
	}
	s.endAll(set, toGiveUp, why)
}

// busy tells whether c runs, or is about to.
func (c *child) busy() bool {
	if c.alive() {
		return c.intent != toStop && c.intent != toGiveUp
	}
	return c.state == StateWaiting || c.state == StateBackoff
}

// ---- rounds: the common restarts of one-for-all and rest-for-one

// newRound makes a round of a child that failed and its siblings. It opens when
// begin is called for that child, at the earliest.
func (s *Supervisor) newRound(failed *child, why string) {
	rest := map[*child]bool{}
	if s.opt.Strategy == RestForOne {
		for _, x := range s.order {
			if x.seq > failed.seq {
				rest[x] = true
			} else {
				s.reach(x, func(d *child) { rest[x] = rest[x] || d == failed })
			}
		}
		s.reach(failed, func(d *child) { delete(rest, d) }) // those came before it all the same
	}
	r := &round{failed: failed, delayed: true, pending: map[*child]struct{}{}}
	var live, members []*child
	for _, x := range s.order {
		if x != failed && (!x.busy() || s.opt.Strategy == RestForOne && !rest[x]) {
			continue
		}
		members = append(members, x)
	}
	if len(members) == 1 {
		return
	}
	older := leave(members)
	r.members = members
	for _, x := range members {
		x.round = r
		switch {
		case x == failed:
		case x.alive():
			r.pending[x] = struct{}{}
			live = append(live, x)
		default:
			x.disarm()
			s.set(x, StateWaiting, "waits for its siblings, after "+failed.spec.Name+" failed")
		}
	}
	s.endAll(live, toRound, failed.spec.Name+": "+why)
	for _, o := range older {
		s.open(o)
	}
}

// open starts the members of a round when nothing is in the way any more.
func (s *Supervisor) open(r *round) {
	if r.delayed || len(r.pending) > 0 {
		return
	}
	var set []*child
	for _, x := range r.members {
		if x.round == r {
			x.round = nil
			if !x.alive() && (x.state == StateWaiting || x.state == StateBackoff) {
				set = append(set, x)
			}
		}
	}
	r.members = nil
	for _, x := range set {
		s.begin(x)
	}
}

// leave takes children out of their rounds, which may then be ready to open.
func leave(set []*child) (left []*round) {
	for _, c := range set {
		if r := c.round; r != nil {
			c.round = nil
			delete(r.pending, c)
			if r.failed == c {
				r.delayed = false
			}
			left = append(left, r)
		}
	}
	return left
}
