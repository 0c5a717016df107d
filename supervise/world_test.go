package supervise

import (
	"context"
	"errors"
	"fmt"
	"sync"
	"testing"
	"time"

	"go.uber.org/goleak"
)

func TestMain(m *testing.M) { goleak.VerifyTestMain(m) }

// script is how one start, and the run it makes, behave.
type script struct {
	Start   time.Duration // Child.Start takes that long
	Deaf    bool          // and does not look at its context
	Err     bool          // and fails
	Panic   bool
	Ready   time.Duration // below 0: never
	Life    time.Duration // 0: until it is ended
	Code    int
	OnStop  time.Duration // below 0: does not hear Stop
	OnKill  time.Duration
	StopErr int // exit code after Stop
}

// world plays children, and is the witness of what the supervisor does.
type world struct {
	mu     sync.Mutex
	kids   map[string]*kid
	errs   []string
	log    []string
	onCall func(what, name string)        // under mu
	onStop func(r *fakeRun, cause string) // under mu
	idle   bool                           // the model: the supervisor is nested and not started
}

type kid struct {
	w       *world
	name    string
	scripts []script
	n       int // starts so far
	calls   int // under way
	live    []*fakeRun
	want    bool // the model: last asked for
	calm    bool
	last    Attempt

	replaces bool // it was replaced before
}

type fakeRun struct {
	k     *kid
	sc    script
	ready chan struct{}
	done  chan struct{}
	ended chan struct{} // asks its goroutine to end it
	mu    sync.Mutex
	exit  Exit
	stop  bool
	kill  bool
}

func newWorld() *world { return &world{kids: map[string]*kid{}} }

func (w *world) kid(name string, scripts ...script) *kid {
	w.mu.Lock()
	defer w.mu.Unlock()
	k := &kid{w: w, name: name, scripts: scripts}
	w.kids[name] = k
	return k
}

func (w *world) note(what, name string) {
	w.log = append(w.log, what+" "+name)
	if w.onCall != nil {
		w.onCall(what, name)
	}
}

func (w *world) bad(format string, a ...any) {
	w.errs = append(w.errs, fmt.Sprintf(format, a...))
}

func (k *kid) Start(ctx context.Context, a Attempt) (Run, error) {
	k.w.mu.Lock()
	k.w.note("start", k.name)
	var sc script
	if len(k.scripts) > 0 && !k.calm {
		sc = k.scripts[k.n%len(k.scripts)]
	}
	k.n++
	k.last = a
	// The witness cannot know yet that what is there is on its way out, after a
	// replacement: check does, at the next moment of rest.
	switch alive := k.calls + len(k.live); {
	case alive > 1, alive == 1 && a.Beside == nil && !k.replaces:
		k.w.bad("%s: start while %d starts and %d runs are alive", k.name, k.calls, len(k.live))
	case a.Beside != nil && alive == 0 && ctx.Err() == nil && !closed(a.Beside.Done()):
		k.w.bad("%s: start beside what is not alive", k.name)
	}
	k.replaces = k.replaces || a.Beside != nil
	// A stop that comes between the decision and this call has ended ctx.
	if (!k.want || k.w.idle) && ctx.Err() == nil {
		k.w.bad("%s: started after a requested stop", k.name)
	}
	k.calls++
	k.w.mu.Unlock()
	defer func() {
		k.w.mu.Lock()
		k.calls--
		k.w.mu.Unlock()
	}()
	if sc.Start > 0 {
		if sc.Deaf {
			time.Sleep(sc.Start)
		} else {
			select {
			case <-time.After(sc.Start):
			case <-ctx.Done():
				return nil, ctx.Err()
			}
		}
	}
	if sc.Panic {
		panic("no")
	}
	if sc.Err {
		return nil, errors.New("no such file")
	}
	r := &fakeRun{k: k, sc: sc, ready: make(chan struct{}), done: make(chan struct{}), ended: make(chan struct{}, 8)}
	k.w.mu.Lock()
	k.live = append(k.live, r)
	k.w.mu.Unlock()
	if sc.Ready == 0 {
		close(r.ready)
	}
	go r.live()
	return r, nil
}

// live plays the run to its end.
func (r *fakeRun) live() {
	var ready, life <-chan time.Time
	if r.sc.Ready > 0 {
		ready = time.After(r.sc.Ready)
	}
	if r.sc.Life > 0 {
		life = time.After(r.sc.Life)
	}
	for {
		select {
		case <-ready:
			close(r.ready)
			ready = nil
		case <-life:
			r.end(Exit{Code: r.sc.Code})
			return
		case <-r.ended:
			r.mu.Lock()
			e := r.exit
			r.mu.Unlock()
			r.end(e)
			return
		}
	}
}

func (r *fakeRun) end(e Exit) {
	w := r.k.w
	w.mu.Lock()
	for i, x := range r.k.live {
		if x == r {
			r.k.live = append(r.k.live[:i:i], r.k.live[i+1:]...)
		}
	}
	w.note("end", r.k.name)
	w.mu.Unlock()
	r.mu.Lock()
	r.exit = e
	r.mu.Unlock()
	close(r.done)
}

func (r *fakeRun) ask(after time.Duration, e Exit) {
	go func() {
		select {
		case <-time.After(after):
			r.mu.Lock()
			r.exit = e
			r.mu.Unlock()
			select {
			case r.ended <- struct{}{}:
			default:
			}
		case <-r.done:
		}
	}()
}

func (r *fakeRun) Ready() <-chan struct{} { return r.ready }
func (r *fakeRun) Done() <-chan struct{}  { return r.done }
func (r *fakeRun) Exit() Exit {
	select {
	case <-r.done:
	default:
		panic("Exit before Done")
	}
	r.mu.Lock()
	defer r.mu.Unlock()
	return r.exit
}

func (r *fakeRun) Stop(cause string) {
	r.k.w.mu.Lock()
	r.k.w.note("stop", r.k.name)
	if r.k.w.onStop != nil {
		r.k.w.onStop(r, cause)
	}
	if r.stop {
		r.k.w.bad("%s: stopped twice", r.k.name)
	}
	r.stop = true
	r.k.w.mu.Unlock()
	if r.sc.OnStop >= 0 {
		r.ask(r.sc.OnStop, Exit{Code: r.sc.StopErr})
	}
}

func (r *fakeRun) Kill(string) {
	r.k.w.mu.Lock()
	r.k.w.note("kill", r.k.name)
	r.kill = true
	r.k.w.mu.Unlock()
	r.ask(r.sc.OnKill, Exit{Code: -1, Signal: "SIGKILL"})
}

// crash ends the live run of a kid at once; false where there is none.
func (w *world) crash(name string, code int) bool {
	w.mu.Lock()
	defer w.mu.Unlock()
	k := w.kids[name]
	if k == nil || len(k.live) == 0 {
		return false
	}
	k.live[0].ask(0, Exit{Code: code})
	return true
}

func (w *world) setWant(want bool, names ...string) {
	w.mu.Lock()
	defer w.mu.Unlock()
	for _, n := range names {
		w.kids[n].want = want
	}
}

func (w *world) takeLog() []string {
	w.mu.Lock()
	defer w.mu.Unlock()
	l := w.log
	w.log = nil
	return l
}

// check compares the supervisor with what lives, at a moment of rest.
func (w *world) check(s *Supervisor) {
	all := map[string]Status{}
	for _, st := range s.All() {
		all[st.Name] = st
	}
	w.mu.Lock()
	defer w.mu.Unlock()
	for name, k := range w.kids {
		st, known := all[name]
		known2 := 0 // how many live runs the supervisor knows
		for _, r := range k.live {
			switch Run(r) {
			case st.Run:
				known2++
			case st.Beside:
				known2++
				if st.Run == nil && !r.stop && !r.kill {
					w.bad("%s: the second run alone is left, and not asked to end; state %s", name, st.State)
				}
			default:
				w.bad("%s: the supervisor has lost a run; state %s", name, st.State)
			}
		}
		switch {
		case len(k.live)+k.calls > 2:
			w.bad("%s: %d live runs, %d starts", name, len(k.live), k.calls)
		case len(k.live)+k.calls > 0 && !known:
			w.bad("%s: lives and is not known", name)
		case st.Run != nil && st.Run == st.Beside:
			w.bad("%s: the run is beside itself; state %s", name, st.State)
		case known2 == 0 && st.Run != nil, known2 < 2 && st.Run != nil && st.Beside != nil:
			w.bad("%s: the supervisor has a dead run; state %s", name, st.State)
		case len(k.live)+k.calls > 0 && (!k.want || w.idle) && st.State != StateStopping:
			w.bad("%s: lives, is not wanted and is %s", name, st.State)
		case len(k.live)+k.calls > 0 && Ended(st):
			w.bad("%s: lives and is %s", name, st.State)
		}
		if known && st.Wanted != k.want {
			w.bad("%s: wanted %v, should be %v", name, st.Wanted, k.want)
		}
		if known && (st.State == StateErrored || st.State == StateWaiting || st.State == StateBackoff) && st.Reason == "" {
			w.bad("%s: %s without a reason", name, st.State)
		}
		if known && (st.State == StateBackoff) != !st.NextStart.IsZero() {
			w.bad("%s: %s with next start %v", name, st.State, st.NextStart)
		}
	}
}

func (w *world) verdict() error {
	w.mu.Lock()
	defer w.mu.Unlock()
	if len(w.errs) == 0 {
		return nil
	}
	return errors.New(w.errs[0])
}

func must(t testing.TB, err error) {
	t.Helper()
	if err != nil {
		t.Fatal(err)
	}
}
