package supervise

import (
	"cmp"
	"context"
	"errors"
	"fmt"
	"math/rand/v2"
	"slices"
	"strings"
	"sync"
	"time"
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
type Supervisor struct {
	opt    Options
	starts lane // calls of Child.Start
	stops  lane // calls of Run.Stop; apart from kills, so that one that blocks against its contract holds up no kill
	kills  lane // calls of Run.Kill
	tell   lane // calls of OnChange: one at a time
	letGo  chan struct{}

	mu       sync.Mutex
	byName   map[string]*child
	byGroup  map[string][]*child
	order    []*child       // as added
	seq      uint64         // numbers children and stops
	live     int            // children that have a run or a start under way
	withDeps int            // children that depend on something
	needed   map[string]int // how many dependencies name it
	waiting  map[*child]struct{}
	recheck  bool        // something changed that a waiting child may wait for
	recent   []time.Time // automatic restarts within opt.Window
	active   bool        // children may be started
	closed   bool
	detached bool
	period   *period // the run of a nested supervisor
	conds    []*cond
}

// cond is somebody who waits until ok, called under the lock.
type cond struct {
	ok  func() bool
	met chan struct{}
}

// New makes a supervisor without children. It holds no goroutine and no timer
// while nothing of it runs.
func New(o Options) *Supervisor {
	if o.Starts <= 0 {
		o.Starts = 16
	}
	if o.Window <= 0 {
		o.Window = 5 * time.Second
	}
	if o.Rand == nil {
		o.Rand = rand.Float64
	}
	return &Supervisor{
		opt:     o,
		starts:  lane{limit: o.Starts},
		stops:   lane{limit: 4},
		kills:   lane{limit: 4},
		tell:    lane{limit: 1},
		letGo:   make(chan struct{}),
		byName:  map[string]*child{},
		byGroup: map[string][]*child{},
		needed:  map[string]int{},
		waiting: map[*child]struct{}{},
		active:  !o.Nested,
	}
}

// unlock carries out what follows from the changes made under the lock, and
// gives the lock back.
func (s *Supervisor) unlock() {
	for s.recheck && !s.detached {
		s.recheck = false
		s.startMet()
	}
	s.checkPeriod()
	s.conds = slices.DeleteFunc(s.conds, func(c *cond) bool {
		if !c.ok() {
			return false
		}
		close(c.met)
		return true
	})
	s.mu.Unlock()
}

// await gives the lock back and waits until ok, or for ctx.
func (s *Supervisor) await(ctx context.Context, ok func() bool) error {
	c := &cond{ok: ok, met: make(chan struct{})}
	s.conds = append(s.conds, c)
	s.unlock()
	select {
	case <-c.met:
		return nil
	case <-ctx.Done():
	}
	s.mu.Lock()
	defer s.mu.Unlock()
	select {
	case <-c.met:
		return nil
	default:
	}
	s.conds = slices.DeleteFunc(s.conds, func(x *cond) bool { return x == c })
	return ctx.Err()
}

func (s *Supervisor) lookUp(names []string) ([]*child, error) {
	if len(names) == 0 {
		return slices.Clone(s.order), nil
	}
	set := make([]*child, 0, len(names))
	for _, n := range names {
		c := s.byName[n]
		if c == nil {
			return nil, fmt.Errorf("%q: %w", n, ErrUnknown)
		}
		if len(names) < 8 && slices.Contains(set, c) {
			continue
		}
		set = append(set, c)
	}
	if len(names) >= 8 {
		slices.SortFunc(set, bySeq)
		set = slices.Compact(set)
	}
	return set, nil
}

// startable looks up children that are about to be asked to run.
func (s *Supervisor) startable(names []string) ([]*child, error) {
	if s.closed {
		return nil, ErrClosed
	}
	set, err := s.lookUp(names)
	if err != nil {
		return nil, err
	}
	if len(names) == 0 {
		return slices.DeleteFunc(set, func(c *child) bool { return c.removing }), nil
	}
	for _, c := range set {
		if c.removing {
			return nil, fmt.Errorf("%q: %w", c.spec.Name, ErrRemoved)
		}
	}
	return set, nil
}

func bySeq(a, b *child) int { return cmp.Compare(a.seq, b.seq) }

func (sp *Spec) check() error {
	bad := func(what string) error { return fmt.Errorf("%q: %w: %s", sp.Name, ErrSpec, what) }
	switch {
	case sp.Name == "":
		return bad("it has no name")
	case sp.Child == nil:
		return bad("it has no Child")
	case sp.Restart > Never:
		return bad("unknown restart policy")
	case sp.OnReadyTimeout > TreatAsReady:
		return bad("unknown OnReadyTimeout")
	}
	for _, d := range sp.DependsOn {
		if d.On == "" {
			return bad("a dependency has no name")
		}
		if d.Condition > DepCompleted {
			return bad("unknown condition on " + d.On)
		}
	}
	return nil
}

// Add adds a child and, where started is set, starts it as Start does. What it
// depends on may be added later. It refuses a name that is taken (ErrExists),
// a spec that makes no sense (ErrSpec) and a dependency cycle (ErrCycle, the
// cycle spelled by name).
func (s *Supervisor) Add(spec Spec, started bool) error {
	if err := spec.check(); err != nil {
		return err
	}
	// Foreign code is not called under the lock.
	ready := spec.Adopt != nil && spec.Adopt.Run != nil && closed(spec.Adopt.Run.Ready())
	s.mu.Lock()
	defer s.unlock()
	if s.closed {
		return ErrClosed
	}
	if old := s.byName[spec.Name]; old != nil {
		if old.removing {
			return fmt.Errorf("%q: %w", spec.Name, ErrRemoved)
		}
		return fmt.Errorf("%q: %w", spec.Name, ErrExists)
	}
	ad := spec.Adopt
	s.seq++
	c := &child{seq: s.seq, want: started, state: StateStopped, stateSince: time.Now()}
	c.setSpec(spec)
	s.index(c)
	if cycle := s.cycle(c); cycle != "" {
		s.unindex(c)
		return fmt.Errorf("%w: %s", ErrCycle, cycle)
	}
	s.byName[spec.Name] = c
	s.order = append(s.order, c)
	if ad != nil {
		c.restarts, c.unstable, c.recent = ad.Restarts, ad.Unstable, slices.Clone(ad.Recent)
		if ad.LastExit != nil {
			e := *ad.LastExit
			c.lastExit = &e
		}
	}
	s.recheck = true // for those who wait for this name or group
	if ad != nil && ad.Beside != nil {
		s.adoptBeside(c, ad.Beside)
	}
	switch {
	case ad != nil && ad.Run != nil:
		s.adopt(c, ad, ready)
	case started && ad != nil && (ad.State == StateErrored || ad.State == StateStopped):
		c.completed = ad.State == StateStopped && c.lastExit != nil && !c.lastExit.failed()
		s.set(c, ad.State, ad.Reason)
	case started:
		s.begin(c)
	default:
		s.set(c, StateStopped, "")
	}
	return nil
}

// Update replaces the spec of the child of that name without a restart: each
// field counts from the next time it is looked at. Adopt is ignored.
func (s *Supervisor) Update(spec Spec) error {
	if err := spec.check(); err != nil {
		return err
	}
	s.mu.Lock()
	defer s.unlock()
	set, err := s.startable([]string{spec.Name})
	if err != nil {
		return err
	}
	c := set[0]
	old := c.spec
	s.unindex(c)
	c.setSpec(spec)
	s.index(c)
	if cycle := s.cycle(c); cycle != "" {
		s.unindex(c)
		c.spec = old
		s.index(c)
		return fmt.Errorf("%w: %s", ErrCycle, cycle)
	}
	s.recheck = true
	return nil
}

// Start asks for children to run and does not wait for it. One that is
// stopped, completed or errored starts afresh (backoff and unstable count at
// zero); one whose dependencies are not met waits for them; one in backoff
// starts at once; one that is stopping starts when it has ended; one that runs
// or starts is left alone. No name means all.
// All names are looked up first: ErrUnknown means that nothing was done.
func (s *Supervisor) Start(names ...string) error {
	s.mu.Lock()
	defer s.unlock()
	set, err := s.startable(names)
	if err != nil {
		return err
	}
	var fresh []*child
	for _, c := range set {
		c.want = true
		switch {
		case c.alive():
			if c.intent == toStop || c.intent == toGiveUp || c.intent == toFail {
				c.intent = toStart
				s.report(c)
			}
		case c.state == StateBackoff, c.state == StateStopped, c.state == StateErrored, c.final != nil:
			fresh = append(fresh, c)
		}
	}
	s.beginAll(fresh)
	return nil
}

// Stop asks for children to stop, in reverse dependency order where they
// depend on each other, and does not wait for it (see Wait and Ended). It
// cancels whatever is pending: a start, a restart, a wait. cause is what
// Run.Stop is told; "" is "stop". No name means all.
func (s *Supervisor) Stop(cause string, names ...string) error {
	s.mu.Lock()
	defer s.unlock()
	if s.detached {
		return ErrClosed
	}
	set, err := s.lookUp(names)
	if err != nil {
		return err
	}
	for _, c := range set {
		c.want = false
	}
	s.endAll(set, toStop, cmp.Or(cause, "stop"))
	return nil
}

// Restart asks for a new run of each child and does not wait for it: stopped
// in reverse dependency order, started in dependency order. It counts as one
// restart, resets backoff and unstable count, and starts what was stopped or
// errored. A later Stop wins. cause is what Run.Stop and Attempt are told; ""
// is "restart". No name means all.
func (s *Supervisor) Restart(cause string, names ...string) error {
	s.mu.Lock()
	defer s.unlock()
	set, err := s.startable(names)
	if err != nil {
		return err
	}
	for _, c := range set {
		c.want = true
		c.completed = false
	}
	s.endAll(set, toRestart, cmp.Or(cause, "restart"))
	return nil
}

// Fail ends the runs of children as failed ones, for instance where a liveness
// probe says so: stopped with grace, then treated by policy, intensity and
// backoff as if it had crashed. It does nothing where nothing runs or the run
// is being stopped already. No name means all.
func (s *Supervisor) Fail(cause string, names ...string) error {
	s.mu.Lock()
	defer s.unlock()
	if s.detached {
		return ErrClosed
	}
	set, err := s.lookUp(names)
	if err != nil {
		return err
	}
	set = slices.DeleteFunc(set, func(c *child) bool { return c.run == nil || c.intent != none })
	s.endAll(set, toFail, cmp.Or(cause, "failed"))
	return nil
}

// SetReady moves a child between online and unready, and from starting to
// online. reason is shown while it is unready. It does nothing in other states.
func (s *Supervisor) SetReady(name string, ready bool, reason string) error {
	s.mu.Lock()
	defer s.unlock()
	set, err := s.lookUp([]string{name})
	if err != nil {
		return err
	}
	c := set[0]
	switch {
	case s.detached:
	case ready && c.state == StateStarting && c.run != nil:
		s.becomeReady(c)
	case ready && c.state == StateUnready:
		s.set(c, StateOnline, "")
	case !ready && (c.state == StateOnline || c.state == StateUnready && c.reason != reason):
		s.set(c, StateUnready, reason)
	}
	return nil
}

// Reset sets the counters of children (Restarts, Unstable, Recent) to zero.
// No name means all.
func (s *Supervisor) Reset(names ...string) error {
	s.mu.Lock()
	defer s.unlock()
	set, err := s.lookUp(names)
	if err != nil {
		return err
	}
	for _, c := range set {
		c.restarts, c.unstable, c.recent = 0, 0, nil
		s.report(c)
	}
	return nil
}

// Remove stops children as Stop does, waits for their end and forgets them. If
// ctx ends first its error is returned and the removal goes on. No name means
// none.
func (s *Supervisor) Remove(ctx context.Context, names ...string) error {
	if len(names) == 0 {
		return nil
	}
	s.mu.Lock()
	set, err := s.lookUp(names)
	if err == nil && s.detached {
		err = ErrClosed
	}
	if err != nil {
		s.unlock()
		return err
	}
	for _, c := range set {
		c.want = false
		c.removing = true
	}
	s.endAll(set, toStop, "removed")
	if err := s.await(ctx, func() bool {
		set = slices.DeleteFunc(set, func(c *child) bool { return c.removed })
		return len(set) == 0
	}); err != nil {
		return fmt.Errorf("remove: %s has not ended: %w", s.names(func(c *child) bool { return slices.Contains(set, c) }), err)
	}
	return nil
}

// names lists children for a person.
func (s *Supervisor) names(which func(*child) bool) string {
	s.mu.Lock()
	defer s.mu.Unlock()
	var b strings.Builder
	n := 0
	for _, c := range s.order {
		if !which(c) {
			continue
		}
		if n++; n > 10 {
			b.WriteString(", …")
			break
		}
		if n > 1 {
			b.WriteString(", ")
		}
		b.WriteString(c.spec.Name)
	}
	return b.String()
}

// Status returns one child; false where there is none of that name.
func (s *Supervisor) Status(name string) (Status, bool) {
	s.mu.Lock()
	defer s.mu.Unlock()
	c := s.byName[name]
	if c == nil {
		return Status{}, false
	}
	return c.status(), true
}

// All returns all children in the order they were added.
func (s *Supervisor) All() []Status {
	s.mu.Lock()
	defer s.mu.Unlock()
	return s.all()
}

func (s *Supervisor) all() []Status {
	all := make([]Status, len(s.order))
	for i, c := range s.order {
		all[i] = c.status()
	}
	return all
}

// waiter is one call of Wait.
type waiter struct {
	until func(Status) bool
	got   []Status
	left  int
	err   error
	over  chan struct{}
}

// place is what a waiter left with a child.
type place struct {
	w *waiter
	i int // in w.got
}

// Wait waits until each of the children has met the condition (it need not
// hold for all at one moment) and returns the Status that met it, in the order
// of names. until is called under a lock: it must be quick and not call the
// supervisor. A child that is removed meanwhile is an error (ErrRemoved). On
// error the latest statuses are returned with it. No name means all there are.
func (s *Supervisor) Wait(ctx context.Context, until func(Status) bool, names ...string) ([]Status, error) {
	w := &waiter{until: until, over: make(chan struct{})}
	s.mu.Lock()
	set, err := s.lookUp(names)
	if err != nil {
		s.mu.Unlock()
		return nil, err
	}
	if len(names) > 0 { // lookUp drops doubles and may sort
		set = set[:0]
		for _, n := range names {
			set = append(set, s.byName[n])
		}
	}
	w.got = make([]Status, len(set))
	for i, c := range set {
		w.got[i] = c.status()
		if !until(w.got[i]) {
			w.left++
			c.waiters = append(c.waiters, place{w, i})
		}
	}
	if w.left == 0 {
		s.mu.Unlock()
		return w.got, nil
	}
	s.mu.Unlock()
	select {
	case <-w.over:
	case <-ctx.Done():
	}
	s.mu.Lock()
	defer s.mu.Unlock()
	if w.left == 0 {
		return w.got, nil
	}
	for i, c := range set {
		c.waiters = slices.DeleteFunc(c.waiters, func(p place) bool {
			if p.w != w {
				return false
			}
			w.got[i] = c.status()
			return true
		})
	}
	if w.err == nil {
		w.err = ctx.Err()
	}
	return w.got, w.err
}

// Ended is a condition for Wait: nothing runs and nothing is about to.
func Ended(st Status) bool { return st.State == StateStopped || st.State == StateErrored }

// Settled is a condition for Wait: the child is not on its way to another
// state: stopped, online, unready or errored.
func Settled(st Status) bool {
	return Ended(st) || st.State == StateOnline || st.State == StateUnready
}

// Up is a condition for Wait: online.
func Up(st Status) bool { return st.State == StateOnline }

// Shutdown stops all children in reverse dependency order and waits for their
// end; from now on nothing is started. If ctx ends first, all that is left is
// killed, and the error says who it was; Shutdown may be called again to wait
// for them.
func (s *Supervisor) Shutdown(ctx context.Context) error {
	s.mu.Lock()
	if s.detached {
		s.unlock()
		return ErrClosed
	}
	s.closed, s.active = true, false
	s.endAll(slices.Clone(s.order), toStop, "shutdown")
	err := s.await(ctx, func() bool { return s.live == 0 })
	if err == nil {
		return nil
	}
	left := s.names((*child).alive)
	s.mu.Lock()
	s.killAll("shutdown")
	s.unlock()
	return fmt.Errorf("shutdown: killed %s: %w", left, err)
}

// Detach lets go of all runs without stopping them, so that another supervisor
// may adopt them: nothing is started or stopped any more, starts under way are
// waited for (or ctx). It returns the children as they were left.
func (s *Supervisor) Detach(ctx context.Context) ([]Status, error) {
	s.mu.Lock()
	if !s.detached {
		s.closed, s.active, s.detached = true, false, true
		close(s.letGo)
		for _, c := range s.order {
			c.disarm()
			if c.att != nil && !c.att.called {
				c.att.unwanted = true
				c.att.cancel()
				c.att = nil
			}
			if b := c.beside; b != nil {
				b.disarm()
				if b.att != nil && !b.att.called {
					b.att.unwanted = true
					b.att.cancel()
					b.att = nil
				}
			}
		}
	}
	err := s.await(ctx, func() bool {
		return !slices.ContainsFunc(s.order, func(c *child) bool { return c.att != nil || c.beside != nil && c.beside.att != nil })
	})
	return s.All(), err
}
