package daemon

import (
	"cmp"
	"context"
	"errors"
	"fmt"
	"maps"
	"net/http"
	"slices"
	"sync"
	"time"

	"github.com/remuda-dev/remuda/client"
	"github.com/remuda-dev/remuda/internal/config"
	"github.com/remuda-dev/remuda/supervise"
)

// A roll replaces the runs of an app, so many at a time, each by one that is
// started beside it and must be ready before the old one is stopped. Where it
// is to bring another spec, that stands beside the app's own in the state file
// until all instances have it; a controller that finds it there goes on with
// the roll. Where a run of it does not become ready, the instances that have
// it get the old spec back in the same way.

// candidate is a spec that is being tried.
type candidate struct {
	spec config.App
	gen  int
}

// rollTries is how often an instance is tried whose replacement others call
// off, by a restart of it.
const rollTries = 5

// surges says whether two runs of one instance can serve side by side.
func surges(spec config.App) bool { return spec.Clustered() || len(spec.Sockets) > 0 }

// sideBySide says whether a run of the one spec can serve beside one of the
// other: not where they would open the same port in different ways.
func sideBySide(old, fresh config.App) bool {
	if old.Clustered() != fresh.Clustered() || (len(old.Sockets) > 0) != (len(fresh.Sockets) > 0) {
		return false
	}
	for _, a := range old.Sockets {
		for _, b := range fresh.Sockets {
			if collide(a, b) {
				return false
			}
		}
	}
	return true
}

// surge is how many instances of an app are replaced at a time, 0 where the
// old run must be gone before the new one is started.
func surge(spec config.App, instances int) int {
	if spec.MaxSurge == "" {
		if surges(spec) {
			return 1
		}
		return 0
	}
	n, err := config.ResolveSurge(spec.MaxSurge, instances)
	if err != nil { // which was checked before
		return 0
	}
	return n
}

// roll is one of an app, under way.
type roll struct {
	d      *Daemon
	a      *app
	to     candidate // what the instances are to have
	from   candidate // what the app has
	anew   bool      // to is another spec than from
	most   int       // at a time
	cause  string
	signal string // for the stop of the old runs, "" for the usual one
	count  int    // how many instances there are to be when it went well, 0: as many as there are

	mu     sync.Mutex
	tried  map[*instance]bool
	begin  map[*instance]time.Time // of those that got a new run
	failed map[*instance]failure
	cut    bool // supervision has ended: the next controller goes on
}

func newRoll(d *Daemon, a *app, cause string) *roll {
	return &roll{
		d: d, a: a, cause: cause, from: candidate{a.spec, a.gen},
		tried: map[*instance]bool{}, begin: map[*instance]time.Time{}, failed: map[*instance]failure{},
	}
}

// failure is what went wrong with one instance.
type failure struct {
	text    string
	lastErr []string
	late    bool // after the new run had taken over
}

// beginRoll takes the app for a roll to spec, which is nil where it is to have
// new runs of the one it has. Caller holds d.act.
func (d *Daemon) beginRoll(a *app, spec *config.App, cause string) (*roll, error) {
	if err := d.notRolling(a.spec.Name); err != nil {
		return nil, err
	}
	d.mu.Lock()
	r := newRoll(d, a, cause)
	r.to = r.from
	if spec != nil {
		a.lastGen++
		r.to, r.anew = candidate{*spec, a.lastGen}, true
		r.to.spec.Instances = a.spec.Instances
		a.next = &r.to
	}
	r.most = max(1, surge(r.to.spec, len(a.instances)))
	a.rolling = true
	d.mu.Unlock()
	if spec == nil {
		return r, nil
	}
	if err := d.store.save(); err != nil {
		d.mu.Lock()
		a.next, a.rolling = nil, false
		d.mu.Unlock()
		return nil, refuse(http.StatusInsufficientStorage, "nothing was started: the state cannot be saved: %v", err)
	}
	return r, nil
}

// notRolling refuses what cannot be done to an app that is being reloaded.
func (d *Daemon) notRolling(name string) error {
	d.mu.Lock()
	defer d.mu.Unlock()
	if a := d.apps[name]; a != nil && a.rolling {
		return refuse(http.StatusConflict, "app %q is being reloaded by another command: try again when that is done", name)
	}
	return nil
}

// resumeRolls goes on with what an earlier controller had begun.
func (d *Daemon) resumeRolls() {
	d.mu.Lock()
	defer d.mu.Unlock()
	for _, a := range d.apps {
		if a.next == nil {
			continue
		}
		a.rolling = true
		r := newRoll(d, a, "up")
		r.to, r.anew = *a.next, true
		r.most = max(1, surge(r.to.spec, len(a.instances)))
		go r.run(nil)
	}
}

// run carries the roll out over instances; over all of the app where it is to
// another spec. What it does takes as long as the programs take, and is not
// ended by whoever asked for it. It returns the instances it was for.
func (r *roll) run(list []*instance) []client.Outcome {
	ctx := context.Background()
	if r.anew {
		list = r.others()
	}
	all := slices.Clone(list)
	r.over(ctx, list, r.to)
	// What was added meanwhile has the spec before.
	for more := r.others(); r.well() && len(more) > 0; more = r.others() {
		all = append(all, more...)
		r.over(ctx, more, r.to)
	}
	r.mu.Lock()
	cut := r.cut
	r.mu.Unlock()
	if cut {
		return r.outcomes(all, nil, false)
	}
	r.settle(ctx)
	failed := r.failures()
	back := len(failed) > 0 && r.anew
	if back {
		r.takeBack(ctx)
	}
	r.conclude(len(failed) == 0)
	return r.outcomes(all, failed, back)
}

// others are the instances of the app that do not have the spec, and have not
// been asked to.
func (r *roll) others() []*instance {
	return slices.DeleteFunc(r.d.instancesOf(r.a), func(i *instance) bool {
		r.mu.Lock()
		defer r.mu.Unlock()
		return r.tried[i] || i.has(r.to)
	})
}

// well says that nothing stands against going on.
func (r *roll) well() bool {
	r.mu.Lock()
	defer r.mu.Unlock()
	return len(r.failed) == 0 && !r.cut
}

func (i *instance) has(c candidate) bool {
	i.mu.Lock()
	defer i.mu.Unlock()
	return i.gen == c.gen
}

func (r *roll) failures() map[*instance]failure {
	r.mu.Lock()
	defer r.mu.Unlock()
	return maps.Clone(r.failed)
}

// over gives instances new runs of a spec, so many at a time, until one fails.
func (r *roll) over(ctx context.Context, list []*instance, to candidate) {
	var wg sync.WaitGroup
	room := make(chan struct{}, r.most)
	for _, i := range list {
		room <- struct{}{}
		if to.gen == r.to.gen && !r.well() {
			<-room
			break
		}
		r.mu.Lock()
		r.tried[i] = true
		r.mu.Unlock()
		wg.Add(1)
		go func() {
			defer wg.Done()
			r.exchange(ctx, i, to)
			<-room
		}()
	}
	wg.Wait()
}

// exchange gives one instance a run of a spec in the place of the one it has,
// and whatever has no run the spec alone.
func (r *roll) exchange(ctx context.Context, i *instance, to candidate) {
	d := r.d
	begin := time.Now()
	defer func() {
		i.mu.Lock()
		i.asked = false // its supervisor knows
		i.mu.Unlock()
	}()
	for try := 1; ; try++ {
		if !d.has(i) {
			return
		}
		i.mu.Lock()
		i.candidate, i.trialErr = &to, nil
		i.mu.Unlock()
		d.signalNext([]*instance{i}, r.signal)
		err := i.sup.Replace(ctx, i.name, r.cause)
		i.mu.Lock()
		i.candidate = nil
		lastErr := i.trialErr
		i.mu.Unlock()
		switch {
		case err == nil, errors.Is(err, supervise.ErrTookOver):
			r.give(i, to)
			r.began(i, begin)
			return
		case errors.Is(err, supervise.ErrCalledOff) && i.wanted() && try < rollTries:
			// It was restarted, or failed together with its siblings.
			_, _ = i.sup.Wait(ctx, supervise.Settled, i.name)
			continue
		case errors.Is(err, supervise.ErrReplacing) && try < rollTries:
			// Its run before that is about to be killed.
			_, _ = i.sup.Wait(ctx, func(st supervise.Status) bool { return st.Beside == nil }, i.name)
			continue
		case errors.Is(err, supervise.ErrNotRunning), errors.Is(err, supervise.ErrCalledOff):
			r.give(i, to)
			if !i.wanted() {
				return
			}
			if err := r.restart(i); err != nil {
				r.fail(i, failure{text: err.Error()})
				return
			}
			r.began(i, begin)
			return
		case errors.Is(err, supervise.ErrUnknown), errors.Is(err, supervise.ErrRemoved):
			return // it is being deleted
		case errors.Is(err, supervise.ErrClosed):
			r.mu.Lock()
			r.cut = true
			r.mu.Unlock()
			return
		}
		f := failure{text: err.Error(), lastErr: lastErr}
		var re *supervise.ReplaceError
		if errors.As(err, &re) {
			f.text = "the new run did not become ready: " + re.Why
		}
		r.fail(i, f)
		return
	}
}

// restart gives an instance a run that has none to be replaced.
func (r *roll) restart(i *instance) error {
	d := r.d
	d.act.Lock()
	defer d.act.Unlock()
	if !d.has(i) {
		return nil
	}
	d.ask([]*instance{i})
	d.saveOrWarn()
	return d.begin(r.cause, []*instance{i})
}

// give notes that an instance has a spec.
func (r *roll) give(i *instance, to candidate) {
	i.mu.Lock()
	to.spec.Instances = i.spec.Instances
	i.spec, i.gen = to.spec, to.gen
	i.mu.Unlock()
	if err := i.sup.Update(r.d.childSpec(i)); err != nil && r.d.has(i) {
		r.d.log.Warn("a new spec is not taken", "instance", i.name, "error", err)
	}
}

func (r *roll) began(i *instance, at time.Time) {
	r.mu.Lock()
	defer r.mu.Unlock()
	r.begin[i] = at
}

func (r *roll) fail(i *instance, f failure) {
	r.mu.Lock()
	defer r.mu.Unlock()
	r.failed[i] = f
	r.d.event(i, "app.reload-failed", 0, f.text)
}

// settle finds out which of the new runs have ended since they took over.
func (r *roll) settle(ctx context.Context) {
	r.mu.Lock()
	begin := maps.Clone(r.begin)
	r.mu.Unlock()
	var wg sync.WaitGroup
	for i, at := range begin {
		wg.Add(1)
		go func() {
			defer wg.Done()
			for _, o := range r.d.settle(ctx, []*instance{i}, at) {
				if o.Error != "" && r.d.has(i) && i.wanted() {
					r.fail(i, failure{text: o.Error, lastErr: o.LastErr, late: true})
				}
			}
		}()
	}
	wg.Wait()
}

// takeBack gives the old spec back to the instances that have the new one.
func (r *roll) takeBack(ctx context.Context) {
	r.d.log.Warn("rolling back", "app", r.from.spec.Name)
	var list []*instance
	for _, i := range r.d.instancesOf(r.a) {
		if i.has(r.to) {
			list = append(list, i)
		}
	}
	before := r.failures()
	r.cause, r.signal = "rollback", ""
	// What the app has may have got new variables since.
	r.d.mu.Lock()
	old := candidate{r.a.spec, r.a.gen}
	r.d.mu.Unlock()
	r.over(ctx, list, old)
	for i, f := range r.failures() {
		if was, ok := before[i]; ok && was.text == f.text {
			continue
		}
		// Not even that: then without a second run beside it.
		r.give(i, old)
		if i.wanted() {
			if err := r.restart(i); err != nil {
				r.d.log.Error("rolling back", "instance", i.name, "error", err)
			}
		}
	}
}

// conclude puts on record what the app has from now on.
func (r *roll) conclude(well bool) {
	d := r.d
	d.act.Lock()
	defer d.act.Unlock()
	d.mu.Lock()
	there := d.apps[r.from.spec.Name] == r.a
	next := r.a.next
	var spec config.App
	if there && well && next != nil {
		spec = next.spec
		spec.Instances = len(r.a.instances)
		r.a.gen = next.gen
	}
	r.a.next, r.a.rolling = nil, false
	d.mu.Unlock()
	if !r.anew || !there {
		return
	}
	if well {
		for _, i := range d.respec(r.a, spec) {
			i.mu.Lock()
			i.gen = r.a.gen
			i.mu.Unlock()
		}
	}
	d.saveOrWarn()
	for _, i := range d.instancesOf(r.a) {
		_ = i.sup.Update(d.childSpec(i)) // it was taken before
	}
}

// outcomes say what became of each instance.
func (r *roll) outcomes(list []*instance, failed map[*instance]failure, back bool) []client.Outcome {
	d := r.d
	var by string // the first that failed
	for _, i := range list {
		if _, ok := failed[i]; ok {
			by = i.name
			break
		}
	}
	var out []client.Outcome
	for _, i := range list {
		if !d.has(i) {
			continue
		}
		o := d.outcomes([]*instance{i})[0]
		r.mu.Lock()
		_, began := r.begin[i]
		cut := r.cut
		r.mu.Unlock()
		f, bad := failed[i]
		switch {
		case cut && !began:
			o.Error = "not reloaded, because the daemon ends"
		case bad && f.late && back:
			o.Error, o.LastErr = f.text+"; rolled back to the version before", f.lastErr
		case bad && f.late:
			o.Error, o.LastErr = f.text, f.lastErr
		case bad:
			o.Error, o.LastErr = f.text+"; rolled back, the old run goes on", f.lastErr
		case by != "" && began && back:
			o.Error = fmt.Sprintf("rolled back, because %s failed", by)
		case by != "" && !began:
			o.Error = fmt.Sprintf("not reloaded, because %s failed", by)
		}
		out = append(out, o)
	}
	slices.SortStableFunc(out, func(a, b client.Outcome) int { return cmp.Compare(a.ID, b.ID) })
	return out
}

// rollReload is a reload of instances of one app whose runs can be replaced
// side by side.
func (d *Daemon) rollReload(a *app, list []*instance, req client.ActRequest) ([]client.Outcome, error) {
	d.act.Lock()
	if list = d.present(list); len(list) == 0 {
		d.act.Unlock()
		return nil, nil
	}
	var spec *config.App
	d.mu.Lock()
	if len(req.Env) > 0 {
		changed := a.spec
		changed.Env = mergedEnv(changed.Env, req.Env)
		spec = &changed
	}
	all := len(a.instances)
	d.mu.Unlock()
	d.ask(list)
	if spec == nil {
		d.saveOrWarn()
	}
	r, err := d.beginRoll(a, spec, string(req.Verb))
	if err == nil {
		r.signal = req.Signal
		if req.MaxSurge != "" {
			n, _ := config.ResolveSurge(req.MaxSurge, all) // checked by Act
			r.most = max(1, n)
		}
	}
	d.act.Unlock()
	if err != nil {
		return nil, err
	}
	return r.run(list), nil // with other variables it goes over all: an app has one environment
}

// mergedEnv is a copy of env with more over it.
func mergedEnv(env, more map[string]string) map[string]string {
	out := maps.Clone(env)
	if out == nil {
		out = map[string]string{}
	}
	maps.Copy(out, more)
	return out
}
