package daemon

import (
	"cmp"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"maps"
	"net/http"
	"net/url"
	"os"
	"path/filepath"
	"reflect"
	"slices"
	"strconv"
	"strings"
	"time"

	"github.com/remuda-dev/remuda/client"
	"github.com/remuda-dev/remuda/internal/config"
	"github.com/remuda-dev/remuda/internal/monitor"
	"github.com/remuda-dev/remuda/proc"
	"github.com/remuda-dev/remuda/supervise"
)

// maxInstances bounds what one daemon supervises.
const maxInstances = 20_000

// all lists every instance in order of id.
func (d *Daemon) all() []*instance {
	list, _ := d.match(nil)
	return list
}

// Info implements [api.Daemon].
func (d *Daemon) Info() client.Info {
	info := client.Info{
		Version: d.version, API: client.API, PID: os.Getpid(), KeeperPID: d.inventory.keeperPID,
		Started: d.inventory.started, ControllerAt: d.started, ControllerRestarts: d.inventory.restarts,
		Home: d.home, Cgroup: d.inventory.cgroup,
	}
	for _, i := range d.all() {
		info.Instances++
		if st, _ := i.sup.Status(i.name); st.State == supervise.StateOnline {
			info.Online++
		}
	}
	d.mu.Lock()
	info.Pools = len(d.pools)
	info.Warnings = slices.Clone(d.warnings)
	d.mu.Unlock()
	return info
}

// List implements [api.Daemon].
func (d *Daemon) List(targets []client.Target) ([]client.Instance, error) {
	chosen, err := d.match(targets)
	if err != nil {
		return nil, err
	}
	return d.views(chosen), nil
}

// views are instances with what they use.
func (d *Daemon) views(chosen []*instance) []client.Instance {
	usage := d.sampler.usage(d.all(), d.allPools())
	out := make([]client.Instance, len(chosen))
	for n, i := range chosen {
		out[n] = view(i, usage)
	}
	return out
}

func view(i *instance, usage map[int]monitor.Usage) client.Instance {
	v := i.status()
	if u, ok := usage[i.id]; ok && v.PID != 0 {
		v.CPU, v.Memory = u.CPU, u.RSS
	}
	return v
}

// Describe implements [api.Daemon].
func (d *Daemon) Describe(targets []client.Target, secrets bool) ([]client.Detail, error) {
	chosen, err := d.match(targets)
	if err != nil {
		return nil, err
	}
	views := d.views(chosen)
	out := make([]client.Detail, len(chosen))
	for n, i := range chosen {
		i.mu.Lock()
		out[n] = client.Detail{Instance: views[n], Spec: i.spec}
		i.mu.Unlock()
		if views[n].PID != 0 {
			// An unreadable one (another user's) is simply not shown.
			out[n].Env, _ = readEnviron(views[n].PID)
		}
		if !secrets {
			out[n].Env = masked(out[n].Env)
			out[n].Spec.Env = masked(out[n].Spec.Env)
		}
	}
	return out, nil
}

// masked is a copy of an environment without what looks like a secret.
func masked(env map[string]string) map[string]string {
	if env == nil {
		return nil
	}
	out := make(map[string]string, len(env))
	for k, v := range env {
		if v != "" && (config.SecretName(k) || hasPassword(v)) {
			v = "********"
		}
		out[k] = v
	}
	return out
}

// hasPassword says whether a value is a URL with a password in it.
func hasPassword(v string) bool {
	if !strings.Contains(v, "://") || !strings.Contains(v, "@") {
		return false
	}
	u, err := url.Parse(v)
	if err != nil {
		return true
	}
	_, has := u.User.Password()
	return has
}

// Start implements [api.Daemon].
func (d *Daemon) Start(ctx context.Context, req client.StartRequest) (client.ActResult, error) {
	w, err := d.startLocked(ctx, req)
	if err != nil {
		return client.ActResult{}, err
	}
	pools := d.carryOut(ctx, &w.pools)
	out := d.settle(ctx, w.touched, w.begin)
	err = d.discard(ctx, w.surplus)
	return client.ActResult{Instances: out, Pools: pools, Warnings: d.unsaved(nil)}, err
}

// work is what a command has begun and goes on with when others may begin
// theirs.
type work struct {
	begin   time.Time
	touched []*instance // to be looked at until they have settled
	surplus []*instance // to be deleted when they have stopped
	rolls   []*roll     // to be run
	pools   poolPlan
}

func (d *Daemon) startLocked(ctx context.Context, req client.StartRequest) (work, error) {
	d.act.Lock()
	defer d.act.Unlock()
	w := work{begin: time.Now()}
	apps := slices.Clone(req.Apps)
	if len(apps) > 0 || len(req.Pools) == 0 {
		if err := d.admit(apps, nil, req.Force); err != nil {
			return w, err
		}
	}
	if err := d.admitPools(req.Pools, apps); err != nil {
		return w, err
	}
	var added, again []*instance
	for _, spec := range apps {
		d.mu.Lock()
		known := d.apps[spec.Name]
		d.mu.Unlock()
		if known == nil {
			added = append(added, d.add(spec)...)
			continue
		}
		if err := d.notRolling(spec.Name); err != nil {
			d.undo(ctx, added)
			return w, err
		}
		old := d.instancesOf(known)
		more, surplus, err := d.change(known, spec, true, true)
		if err != nil {
			d.undo(ctx, added)
			return w, err
		}
		w.touched, w.surplus = append(w.touched, more...), append(w.surplus, surplus...)
		again = append(again, without(old, surplus)...)
	}
	wanted := d.ask(again)
	w.pools.renew = true // as for apps
	d.putPools(&w.pools, req.Pools, func(*managedPool, config.Pool) bool { return true })
	if err := d.store.save(); err != nil {
		d.undoPools(&w.pools)
		d.undo(ctx, added)
		for n, i := range again {
			i.setWant(wanted[n])
		}
		return w, refuse(http.StatusInsufficientStorage, "nothing was started: the state cannot be saved: %v", err)
	}
	d.readyPools(&w.pools)
	if err := d.supervise(ctx, added); err != nil {
		return w, err
	}
	w.touched = slices.Concat(added, w.touched, again)
	// PM2's start of what runs is a restart: deploy scripts rely on it.
	return w, d.begin("start", again)
}

// without is list less some of it.
func without(list, less []*instance) []*instance {
	return slices.DeleteFunc(slices.Clone(list), func(i *instance) bool { return slices.Contains(less, i) })
}

// ask notes that instances shall run and tells what was noted before. It must
// be saved before they are begun.
func (d *Daemon) ask(list []*instance) (before []bool) {
	for _, i := range list {
		i.mu.Lock()
		before = append(before, i.want)
		i.mu.Unlock()
		i.setWant(true)
	}
	return before
}

// begin has instances that were asked for run anew. What does not run is
// started, which is no restart that counts, as with PM2. Caller holds d.act.
func (d *Daemon) begin(cause string, list []*instance) error {
	var idle, busy []*instance
	for _, i := range list {
		if st, ok := i.sup.Status(i.name); ok && supervise.Ended(st) {
			idle = append(idle, i)
		} else {
			busy = append(busy, i)
		}
	}
	d.wakeGroups(list)
	err := d.each(busy, func(s *supervise.Supervisor, names []string) error { return s.Restart(cause, names...) })
	if err == nil {
		err = d.each(idle, func(s *supervise.Supervisor, names []string) error { return s.Start(names...) })
	}
	for _, i := range list {
		i.mu.Lock()
		i.asked = false
		i.mu.Unlock()
		if st, ok := i.sup.Status(i.name); ok && supervise.Ended(st) {
			i.changed(st) // it was too quick to be put on record
		}
	}
	return err
}

// supervise hands new instances to their supervisors. Where one is refused,
// none of them is kept. Caller holds d.act.
func (d *Daemon) supervise(ctx context.Context, added []*instance) error {
	for _, i := range added {
		i.mu.Lock()
		want := i.want
		i.asked = false // it has no state yet that could be mistaken
		i.mu.Unlock()
		if err := i.sup.Add(d.childSpec(i), want); err != nil {
			d.undo(ctx, added)
			return d.notSupervised(i, err)
		}
	}
	return nil
}

// undo takes back instances that were just added. Caller holds d.act.
func (d *Daemon) undo(ctx context.Context, added []*instance) {
	if len(added) == 0 {
		return
	}
	if err := d.forget(ctx, added); err != nil {
		d.log.Error("taking back what cannot be started", "error", err)
	}
}

// admit checks a set of apps against each other and those that are there.
// With force, names that are taken get a number.
func (d *Daemon) admit(apps []config.App, groups []config.Group, force bool) error {
	if len(apps) == 0 {
		return refuse(http.StatusUnprocessableEntity, "no app is given")
	}
	d.mu.Lock()
	defer d.mu.Unlock()
	total := len(d.instances)
	for n := range apps {
		if err := config.Validate(apps[n]); err != nil {
			return refuse(http.StatusUnprocessableEntity, "%v", err)
		}
		if apps[n].Instances < 1 {
			return refuse(http.StatusUnprocessableEntity, "app %q has %d instances: an app has at least one", apps[n].Name, apps[n].Instances)
		}
		if force {
			apps[n].Name = d.freeName(apps[n].Name)
		}
		total += apps[n].Instances
	}
	if total > maxInstances {
		return refuse(http.StatusUnprocessableEntity, "%d instances are more than one daemon takes (%d)", total, maxInstances)
	}
	all := slices.Clone(groups)
	for _, g := range d.groups {
		if !slices.ContainsFunc(groups, func(n config.Group) bool { return n.Name == g.Name }) {
			all = append(all, g)
		}
	}
	known := func(name string) bool { return d.apps[name] != nil }
	if err := config.ValidateSet(apps, all, known); err != nil {
		return refuse(http.StatusUnprocessableEntity, "%v", err)
	}
	in := map[string]string{}
	for name, a := range d.apps {
		in[name] = a.spec.Strategy
	}
	for _, a := range apps {
		in[a.Name] = a.Strategy
	}
	for _, a := range apps {
		for _, on := range slices.Sorted(maps.Keys(a.DependsOn)) {
			if _, ok := sibling(a.Strategy, in[on], all); !ok {
				return refuse(http.StatusUnprocessableEntity, "app %q of group %q depends on %q, which is outside of that group: let the group's apps depend on each other only, or take one of the two out of its group", a.Name, a.Strategy, on)
			}
		}
	}
	return nil
}

func (d *Daemon) freeName(name string) string {
	free := name
	for n := 2; d.apps[free] != nil || d.pools[free] != nil; n++ {
		free = fmt.Sprintf("%s-%d", name, n)
	}
	return free
}

// add makes an app and its instances; nothing of it is supervised yet.
func (d *Daemon) add(spec config.App) []*instance {
	d.versions.look(spec)
	d.mu.Lock()
	a := &app{spec: spec}
	d.apps[spec.Name] = a
	d.order = append(d.order, spec.Name)
	for n := range spec.Instances {
		d.addInstance(a, n)
	}
	list := slices.Clone(a.instances)
	d.mu.Unlock()
	d.timers.set(spec)
	return list
}

// addInstance needs d.mu.
func (d *Daemon) addInstance(a *app, index int) *instance {
	i := d.newInstance(a, d.nextID, index)
	d.nextID++
	i.alone = a.spec.Instances == 1
	i.want = a.spec.Autostart
	return i
}

// change gives an app a new spec, for its next runs; again says that the caller
// is about to begin those. The number of instances is brought in line too: it
// returns those that are new, wanted or not, and those that are to go, see
// scale. Where the spec is refused, all is as before. Caller holds d.act.
func (d *Daemon) change(a *app, spec config.App, again, want bool) (added, surplus []*instance, err error) {
	old := a.spec
	n := spec.Instances
	spec.Strategy = old.Strategy // see upLocked
	spec.Instances = old.Instances
	list := d.respec(a, spec)
	for done, i := range list {
		if err := i.sup.Update(d.childSpec(i)); err != nil {
			d.respec(a, old)
			for _, j := range list[:done] {
				_ = j.sup.Update(d.childSpec(j)) // it took that one before
			}
			return nil, nil, d.notSupervised(i, err)
		}
	}
	if again {
		d.mu.Lock()
		a.lastGen++
		a.gen = a.lastGen
		for _, i := range a.instances {
			i.mu.Lock()
			i.gen = a.gen
			i.mu.Unlock()
		}
		d.mu.Unlock()
	}
	return d.scale(a, n, want)
}

func (d *Daemon) respec(a *app, spec config.App) []*instance {
	d.versions.look(spec)
	d.mu.Lock()
	a.spec = spec
	for _, i := range a.instances {
		i.mu.Lock()
		i.spec = spec
		i.mu.Unlock()
	}
	list := slices.Clone(a.instances)
	d.mu.Unlock()
	d.timers.set(spec)
	return list
}

func (d *Daemon) notSupervised(i *instance, err error) error {
	return refuse(http.StatusConflict, "%s cannot be supervised: %v", i.name, err)
}

func (d *Daemon) childSpec(i *instance) supervise.Spec {
	s := i.child()
	d.mu.Lock()
	defer d.mu.Unlock()
	if a := d.apps[i.app]; a != nil { // else it was just deleted
		s.DependsOn = d.dependencies(a.spec)
	}
	return s
}

func (d *Daemon) instancesOf(a *app) []*instance {
	d.mu.Lock()
	defer d.mu.Unlock()
	return slices.Clone(a.instances)
}

func (i *instance) setWant(want bool) {
	i.mu.Lock()
	i.want, i.asked = want, want
	i.mu.Unlock()
}

// each calls do once per supervisor, with the names of the instances it has.
func (d *Daemon) each(list []*instance, do func(s *supervise.Supervisor, names []string) error) error {
	names := map[*supervise.Supervisor][]string{}
	var order []*supervise.Supervisor
	for _, i := range list {
		if names[i.sup] == nil {
			order = append(order, i.sup)
		}
		names[i.sup] = append(names[i.sup], i.name)
	}
	for _, s := range order {
		if err := do(s, names[s]); err != nil {
			return err
		}
	}
	return nil
}

// Act implements [api.Daemon].
func (d *Daemon) Act(ctx context.Context, req client.ActRequest) (client.ActResult, error) {
	if req.Signal != "" {
		if _, err := parseSignal(req.Signal); err != nil {
			return client.ActResult{}, refuse(http.StatusUnprocessableEntity, "%v", err)
		}
	}
	for k, v := range req.Env {
		if k == "" || strings.ContainsAny(k, "=\x00") || strings.Contains(v, "\x00") {
			return client.ActResult{}, refuse(http.StatusUnprocessableEntity, "%s is no variable of an environment", quoted(k))
		}
	}
	if req.MaxSurge != "" {
		if _, err := config.ResolveSurge(req.MaxSurge, 1); err != nil {
			return client.ActResult{}, refuse(http.StatusUnprocessableEntity, "%v", err)
		}
	}
	chosen, pools, err := d.chosenAll(req.Targets)
	if err != nil {
		return client.ActResult{}, err
	}
	acted, err := d.actPools(ctx, pools, req)
	if err != nil {
		return client.ActResult{}, err
	}
	var out []client.Outcome
	switch req.Verb {
	case client.VerbStart, client.VerbRestart:
		out, err = d.restart(ctx, chosen, req)
	case client.VerbReload:
		out, err = d.reload(ctx, chosen, req)
	case client.VerbStop:
		out, err = d.stop(ctx, chosen, req.Signal)
	case client.VerbDelete:
		out, err = d.remove(ctx, chosen, req.Signal)
	case client.VerbReset:
		out, err = d.reset(chosen)
	case client.VerbFlush:
		err = d.logs.Flush(d.logFiles(chosen)...)
		out = d.outcomes(chosen)
	case client.VerbReopen:
		d.logs.Reopen(d.logFiles(chosen)...)
		out = d.outcomes(chosen)
	case client.VerbDrain:
		if len(chosen) > 0 {
			err = refuse(http.StatusUnprocessableEntity, "only pools can be drained, not the app %s", quoted(chosen[0].app))
		}
	default:
		err = refuse(http.StatusUnprocessableEntity, "unknown verb %s", quoted(string(req.Verb)))
	}
	return client.ActResult{Instances: out, Pools: acted, Warnings: d.unsaved(nil)}, err
}

func (d *Daemon) outcomes(list []*instance) []client.Outcome {
	out := make([]client.Outcome, 0, len(list))
	for _, v := range d.views(list) {
		out = append(out, client.Outcome{Instance: v})
	}
	return out
}

func (d *Daemon) logFiles(list []*instance) []string {
	var paths []string
	for _, i := range list {
		i.mu.Lock()
		out, err := i.logPaths(i.spec)
		i.mu.Unlock()
		paths = append(paths, out, err)
	}
	slices.Sort(paths)
	return slices.Compact(paths)
}

// unsaved adds a word of warning where the state could not be written.
func (d *Daemon) unsaved(warnings []string) []string {
	if err := d.store.failed(); err != nil {
		warnings = append(warnings, fmt.Sprintf("what you asked for was done but cannot be remembered over a restart of the daemon: %v", err))
	}
	return warnings
}

func (d *Daemon) restart(ctx context.Context, list []*instance, req client.ActRequest) ([]client.Outcome, error) {
	w, err := d.restartLocked(list, req)
	if err != nil {
		return nil, err
	}
	return d.settle(ctx, w.touched, w.begin), nil
}

func (d *Daemon) restartLocked(list []*instance, req client.ActRequest) (work, error) {
	d.act.Lock()
	defer d.act.Unlock()
	list = d.present(list)
	w := work{begin: time.Now(), touched: list}
	d.updateEnv(list, req.Env)
	d.signalNext(list, req.Signal)
	d.ask(list)
	d.saveOrWarn()
	return w, d.begin(string(req.Verb), list)
}

// has says whether an instance has not been deleted.
func (d *Daemon) has(i *instance) bool {
	d.mu.Lock()
	defer d.mu.Unlock()
	return d.instances[i.id] == i
}

// present leaves out what was deleted since it was looked up. Caller holds
// d.act.
func (d *Daemon) present(list []*instance) []*instance {
	return slices.DeleteFunc(slices.Clone(list), func(i *instance) bool { return !d.has(i) })
}

// await waits until each of the instances that is still there has met a
// condition.
func (d *Daemon) await(ctx context.Context, list []*instance, until func(supervise.Status) bool) error {
	return d.each(list, func(s *supervise.Supervisor, names []string) error {
		for len(names) > 0 {
			_, err := s.Wait(ctx, until, names...)
			if !errors.Is(err, supervise.ErrRemoved) && !errors.Is(err, supervise.ErrUnknown) {
				return err
			}
			names = known(s, names)
		}
		return nil
	})
}

// known are those of names that are children.
func known(s *supervise.Supervisor, names []string) []string {
	return slices.DeleteFunc(slices.Clone(names), func(n string) bool {
		_, ok := s.Status(n)
		return !ok
	})
}

// signalNext has the runs there are stopped with another signal than usual, if
// one is given.
func (d *Daemon) signalNext(list []*instance, signal string) {
	for _, i := range list {
		st, _ := i.sup.Status(i.name)
		i.mu.Lock()
		i.signalOnce = ""
		if st.Run != nil {
			i.signalOnce = signal
		}
		i.mu.Unlock()
	}
}

// reset sets counters to zero, those that the keeper would tell the next
// controller too.
func (d *Daemon) reset(list []*instance) ([]client.Outcome, error) {
	d.act.Lock()
	defer d.act.Unlock()
	list = d.present(list)
	err := d.each(list, func(s *supervise.Supervisor, names []string) error { return s.Reset(names...) })
	for _, i := range list {
		i.mu.Lock()
		r := i.run
		i.mu.Unlock()
		if st, _ := i.sup.Status(i.name); r != nil && (st.Run != nil || st.State == supervise.StateBackoff) {
			_ = r.remember(func(l *label) { l.Restarts, l.Unstable, l.Recent = 0, 0, nil })
		}
	}
	d.saveOrWarn()
	return d.outcomes(list), err
}

// saveOrWarn saves; a failure shows as a warning, see unsaved. What is asked
// of things that exist is done all the same.
func (d *Daemon) saveOrWarn() {
	if err := d.store.save(); err != nil {
		d.log.Error("state", "error", err)
	}
}

// updateEnv merges variables into the specs of the apps of instances.
func (d *Daemon) updateEnv(list []*instance, env map[string]string) {
	if len(env) == 0 {
		return
	}
	d.mu.Lock()
	defer d.mu.Unlock()
	for _, i := range list {
		a := d.apps[i.app]
		if a == nil {
			continue
		}
		a.spec.Env = mergedEnv(a.spec.Env, env)
		if a.next != nil { // an instance may have it already
			next := *a.next
			next.spec.Env = mergedEnv(next.spec.Env, env)
			a.next = &next
		}
		for _, j := range a.instances {
			j.mu.Lock()
			if j.spec.Env = a.spec.Env; a.next != nil && j.gen == a.next.gen {
				j.spec.Env = a.next.spec.Env
			}
			j.mu.Unlock()
		}
	}
}

// reload gives the instances of each app new runs, one app after the other.
func (d *Daemon) reload(ctx context.Context, list []*instance, req client.ActRequest) ([]client.Outcome, error) {
	var out []client.Outcome
	for len(list) > 0 {
		name := list[0].app
		var of []*instance
		of, list = split(list, name)
		d.mu.Lock()
		a := d.apps[name]
		most := 0
		if a != nil {
			spec := a.spec
			spec.MaxSurge = cmp.Or(req.MaxSurge, spec.MaxSurge)
			most = surge(spec, len(a.instances))
		}
		d.mu.Unlock()
		var o []client.Outcome
		var err error
		if most > 0 {
			o, err = d.rollReload(a, of, req)
		} else {
			o, err = d.reloadInTurn(ctx, of, req)
		}
		if out = append(out, o...); err != nil {
			return out, err
		}
	}
	slices.SortStableFunc(out, func(a, b client.Outcome) int { return cmp.Compare(a.ID, b.ID) })
	return out, nil
}

// split takes the instances of one app out of a list.
func split(list []*instance, name string) (of, rest []*instance) {
	for _, i := range list {
		if i.app == name {
			of = append(of, i)
		} else {
			rest = append(rest, i)
		}
	}
	return of, rest
}

// reloadInTurn restarts instances one after the other; the next one goes only
// when the one before is back. Where one does not come back, the others of its
// app still do their work: they are left alone.
func (d *Daemon) reloadInTurn(ctx context.Context, list []*instance, req client.ActRequest) ([]client.Outcome, error) {
	var out []client.Outcome
	failed := map[string]string{}
	for _, i := range list {
		if by := failed[i.app]; by != "" {
			o := d.outcomes([]*instance{i})[0]
			o.Error = fmt.Sprintf("not reloaded, because %s did not come back", by)
			out = append(out, o)
			continue
		}
		o, err := d.restart(ctx, []*instance{i}, req)
		if err != nil {
			return out, err
		}
		out = append(out, o...)
		if len(o) > 0 && o[0].Error != "" && d.has(i) {
			failed[i.app] = i.name
		}
	}
	return out, nil
}

// over says that nothing more comes of a stop: it is done, or was overtaken by
// a start.
func over(st supervise.Status) bool { return supervise.Ended(st) || st.Wanted }

func (d *Daemon) stop(ctx context.Context, list []*instance, signal string) ([]client.Outcome, error) {
	list, err := d.stopLocked(list, signal)
	if err != nil {
		return nil, err
	}
	err = d.await(ctx, list, over)
	out := d.outcomes(list)
	for n, i := range list {
		if st, ok := i.sup.Status(i.name); ok && st.Wanted {
			out[n].Error = "another command started it again meanwhile"
		}
	}
	return out, err
}

func (d *Daemon) stopLocked(list []*instance, signal string) ([]*instance, error) {
	d.act.Lock()
	defer d.act.Unlock()
	list = d.present(list)
	for _, i := range list {
		i.setWant(false)
	}
	d.saveOrWarn()
	d.signalNext(list, signal)
	return list, d.each(list, func(s *supervise.Supervisor, names []string) error { return s.Stop("stop", names...) })
}

func (d *Daemon) remove(ctx context.Context, list []*instance, signal string) ([]client.Outcome, error) {
	if _, err := d.stop(ctx, list, signal); err != nil {
		return nil, err
	}
	d.act.Lock()
	defer d.act.Unlock()
	list = d.present(list)
	out := d.outcomes(list)
	return out, d.forget(ctx, list)
}

// discard forgets instances that are being stopped, when they have ended.
// Others may use the daemon meanwhile.
func (d *Daemon) discard(ctx context.Context, list []*instance) error {
	if len(list) == 0 {
		return nil
	}
	if err := d.await(ctx, list, over); err != nil {
		return err
	}
	d.act.Lock()
	defer d.act.Unlock()
	return d.forget(ctx, d.present(list))
}

// forgetMost bounds the wait for the end of a process that not even SIGKILL
// ends: others want to use the daemon too.
const forgetMost = 2 * time.Minute

// forget ends the supervision of instances, of apps that have none left and of
// groups that have no apps left. Caller holds d.act.
func (d *Daemon) forget(ctx context.Context, list []*instance) error {
	ctx, cancel := context.WithTimeout(ctx, forgetMost)
	defer cancel()
	err := d.each(list, func(s *supervise.Supervisor, names []string) error { return s.Remove(ctx, known(s, names)...) })
	if err != nil {
		return err
	}
	var gone []string
	var ended []proc.Process
	d.mu.Lock()
	for _, i := range list {
		a := d.apps[i.app]
		delete(d.instances, i.id)
		i.mu.Lock()
		ended = append(ended, i.ended...)
		i.ended = nil
		i.mu.Unlock()
		if a == nil {
			continue
		}
		a.instances = slices.DeleteFunc(a.instances, func(j *instance) bool { return j == i })
		a.spec.Instances = len(a.instances)
		if len(a.instances) == 0 {
			gone = append(gone, i.app)
			delete(d.apps, i.app)
			d.order = slices.DeleteFunc(d.order, func(n string) bool { return n == i.app })
		}
	}
	d.mu.Unlock()
	for _, name := range gone {
		d.timers.remove(name)
		d.versions.drop(name)
	}
	for _, name := range gone {
		d.clusters.rest(name)
	}
	for _, i := range list {
		d.sockets.tidy(i.app)
	}
	d.dropGroups()
	d.saveOrWarn()
	go release(ended)
	return nil
}

// Signal implements [api.Daemon].
func (d *Daemon) Signal(_ context.Context, req client.SignalRequest) (client.ActResult, error) {
	sig, err := parseSignal(req.Signal)
	if err != nil {
		return client.ActResult{}, refuse(http.StatusUnprocessableEntity, "%v", err)
	}
	chosen, pools, err := d.chosenAll(req.Targets)
	if err != nil {
		return client.ActResult{}, err
	}
	signalled := d.signalPools(pools, sig)
	out := d.outcomes(chosen)
	for n, i := range chosen {
		st, _ := i.sup.Status(i.name)
		r, ok := st.Run.(*run)
		if !ok || r == nil {
			out[n].Error = "does not run"
			continue
		}
		if err := r.proc.Signal(sig); err != nil {
			out[n].Error = err.Error()
		}
	}
	return client.ActResult{Instances: out, Pools: signalled}, nil
}

// Scale implements [api.Daemon].
func (d *Daemon) Scale(ctx context.Context, req client.ScaleRequest) (client.ActResult, error) {
	d.mu.Lock()
	isPool := d.pools[req.App] != nil
	d.mu.Unlock()
	if isPool {
		return d.ScalePool(ctx, req.App, req.To)
	}
	a, w, err := d.scaleLocked(req)
	if err != nil {
		return client.ActResult{}, err
	}
	settled := d.settle(ctx, w.touched, w.begin)
	if err := d.discard(ctx, w.surplus); err != nil {
		return client.ActResult{}, err
	}
	return client.ActResult{Instances: d.merged(d.instancesOf(a), settled), Warnings: d.unsaved(nil)}, nil
}

func (d *Daemon) scaleLocked(req client.ScaleRequest) (*app, work, error) {
	d.act.Lock()
	defer d.act.Unlock()
	w := work{begin: time.Now()}
	d.mu.Lock()
	a := d.apps[req.App]
	if a == nil {
		if id, ok := idOf(req.App); ok && d.instances[id] != nil {
			a = d.apps[d.instances[id].app]
		}
	}
	d.mu.Unlock()
	if a == nil {
		return nil, w, refuse(http.StatusNotFound, "no app is called %s%s", quoted(req.App), nearest(req.App, d.names()))
	}
	n, err := scaleTo(req.To, len(a.instances))
	if err != nil {
		return nil, w, err
	}
	w.touched, w.surplus, err = d.scale(a, n, true)
	return a, w, err
}

// scaleTo reads "4", "+2", "-1" and "max".
func scaleTo(s string, now int) (int, error) {
	wrong := refuse(http.StatusUnprocessableEntity, "%s is no number of instances: give N, +N, -N or max", quoted(s))
	n := 0
	switch {
	case strings.HasPrefix(s, "+"), strings.HasPrefix(s, "-"):
		by, err := strconv.Atoi(s)
		if err != nil {
			return 0, wrong
		}
		n = now + by
	case s == "0": // for config it means max
		return 0, refuse(http.StatusUnprocessableEntity, "an app has at least one instance: use `remuda stop` or `remuda delete`")
	default:
		var err error
		if n, err = config.ResolveInstances(s); err != nil {
			return 0, wrong
		}
	}
	if n < 1 {
		return 0, refuse(http.StatusUnprocessableEntity, "%d instances %s make %d: an app has at least one", now, s, n)
	}
	return n, nil
}

// scale adds instances, or stops those that are too many, the youngest first.
// It returns the new ones, which run if want is set, and those that the caller
// has to discard. Caller holds d.act.
func (d *Daemon) scale(a *app, n int, want bool) (added, surplus []*instance, err error) {
	d.mu.Lock()
	now := len(a.instances)
	if others := len(d.instances) - now; n+others > maxInstances {
		d.mu.Unlock()
		return nil, nil, refuse(http.StatusUnprocessableEntity, "%d instances are more than one daemon takes (%d)", n+others, maxInstances)
	}
	a.spec.Instances = n
	for _, i := range a.instances {
		i.mu.Lock()
		i.spec.Instances = n
		i.mu.Unlock()
	}
	next := 0
	for len(a.instances) < n {
		for slices.ContainsFunc(a.instances, func(i *instance) bool { return i.index == next }) {
			next++
		}
		i := d.addInstance(a, next)
		i.want = want
		added = append(added, i)
	}
	if n < now {
		surplus = slices.Clone(a.instances[n:])
	}
	d.mu.Unlock()
	if n == now {
		return nil, nil, nil
	}
	for _, i := range surplus {
		i.setWant(false)
	}
	d.saveOrWarn()
	if err := d.supervise(context.Background(), added); err != nil {
		return nil, nil, err
	}
	return added, surplus, d.each(surplus, func(s *supervise.Supervisor, names []string) error { return s.Stop("scale", names...) })
}

// Up implements [api.Daemon].
func (d *Daemon) Up(ctx context.Context, req client.UpRequest) (client.ActResult, error) {
	changes, w, err := d.upLocked(ctx, req)
	if req.DryRun {
		return client.ActResult{Changes: changes}, err
	}
	pools := d.carryOut(ctx, &w.pools)
	settled := d.rollUp(ctx, &w)
	if err != nil {
		return client.ActResult{Changes: changes}, err
	}
	settled = append(settled, d.settle(ctx, w.touched, w.begin)...)
	if err := d.discard(ctx, w.surplus); err != nil {
		return client.ActResult{Changes: changes}, err
	}
	var mine []*instance
	for _, i := range d.all() {
		if slices.ContainsFunc(req.Apps, func(a config.App) bool { return a.Name == i.app }) {
			mine = append(mine, i)
		}
	}
	return client.ActResult{Changes: changes, Instances: d.merged(mine, settled), Pools: pools, Warnings: d.unsaved(nil)}, nil
}

func (d *Daemon) upLocked(ctx context.Context, req client.UpRequest) ([]client.Change, work, error) {
	d.act.Lock()
	defer d.act.Unlock()
	w := work{begin: time.Now()}
	if len(req.Apps) > 0 || len(req.Pools) == 0 {
		if err := d.admit(req.Apps, req.Groups, false); err != nil {
			return nil, w, err
		}
	}
	if err := d.admitPools(req.Pools, req.Apps); err != nil {
		return nil, w, err
	}
	changes, gone, moved, err := d.compare(req)
	if err != nil {
		return changes, w, err
	}
	poolChanges, gonePools, err := d.comparePools(req)
	changes = append(changes, poolChanges...)
	if err != nil || req.DryRun {
		return changes, w, err
	}
	for _, c := range changes {
		if err := d.notRolling(c.App); err != nil && c.Action != "none" {
			return changes, w, err
		}
	}
	// A live child cannot be moved to another supervisor: those that move are
	// made anew.
	was := map[string][]bool{}
	var moving []*instance
	for name := range moved {
		d.mu.Lock()
		for _, i := range d.apps[name].instances {
			i.mu.Lock()
			was[name] = append(was[name], i.want)
			i.mu.Unlock()
			moving = append(moving, i)
		}
		d.mu.Unlock()
	}
	if err := d.forget(ctx, moving); err != nil {
		return changes, w, err
	}
	gone = d.present(gone) // but for those that were in a group that changes
	d.addGroups(req.Groups)
	for _, i := range gone {
		i.setWant(false)
	}
	var added, again []*instance
	type change struct {
		a    *app
		spec config.App
	}
	var gently []change
	for n, spec := range req.Apps {
		d.mu.Lock()
		known := d.apps[spec.Name]
		d.mu.Unlock()
		switch action := changes[n].Action; {
		case known == nil:
			list := d.add(spec)
			for k, i := range list {
				if k < len(was[spec.Name]) && was[spec.Name][k] {
					i.setWant(true)
				}
			}
			added = append(added, list...)
		case action == "change", action == "scale":
			old := d.instancesOf(known)
			renew := action == "change" && needsNewRun(known.spec, spec)
			if renew && surge(known.spec, len(old)) > 0 && surge(spec, spec.Instances) > 0 && sideBySide(known.spec, spec) {
				gently = append(gently, change{known, spec})
				continue
			}
			more, surplus, err := d.change(known, spec, renew, spec.Autostart)
			if err != nil {
				d.undo(ctx, added)
				return changes, w, err
			}
			w.touched, w.surplus = append(w.touched, more...), append(w.surplus, surplus...)
			for _, i := range without(old, surplus) {
				if i.wanted() && renew || !i.wanted() && spec.Autostart {
					again = append(again, i)
				}
			}
		case action == "start":
			for _, i := range d.instancesOf(known) {
				if !i.wanted() {
					again = append(again, i)
				}
			}
		}
	}
	wanted := d.ask(again)
	d.planUp(&w.pools, req, poolChanges, gonePools)
	if err := d.store.save(); err != nil {
		d.undoPools(&w.pools)
		d.undo(ctx, added)
		for n, i := range again {
			i.setWant(wanted[n])
		}
		return changes, w, refuse(http.StatusInsufficientStorage, "nothing new was started: the state cannot be saved: %v", err)
	}
	d.readyPools(&w.pools)
	if err := d.each(gone, func(s *supervise.Supervisor, names []string) error { return s.Stop("up", names...) }); err != nil {
		return changes, w, err
	}
	if err := d.supervise(ctx, added); err != nil {
		return changes, w, err
	}
	w.touched = slices.Concat(added, w.touched, again)
	w.surplus = append(w.surplus, gone...)
	if err := d.begin("up", again); err != nil {
		return changes, w, err
	}
	for _, c := range gently {
		if c.spec.Autostart {
			d.ask(slices.DeleteFunc(d.instancesOf(c.a), (*instance).wanted))
		}
		n := c.spec.Instances
		c.spec.Strategy = c.a.spec.Strategy // see above
		r, err := d.beginRoll(c.a, &c.spec, "up")
		if err != nil {
			return changes, w, err
		}
		if n != len(d.instancesOf(c.a)) {
			r.count = n
		}
		w.rolls = append(w.rolls, r)
	}
	return changes, w, nil
}

// rollUp carries the rolls of an up out, one app after the other, and has those
// apps scaled that are what they are to be.
func (d *Daemon) rollUp(ctx context.Context, w *work) (out []client.Outcome) {
	for _, r := range w.rolls {
		o := r.run(nil)
		out = append(out, o...)
		if slices.ContainsFunc(o, func(o client.Outcome) bool { return o.Error != "" }) {
			continue
		}
		d.act.Lock()
		d.mu.Lock()
		there := d.apps[r.from.spec.Name] == r.a
		d.mu.Unlock()
		if there && r.count > 0 {
			added, surplus, err := d.scale(r.a, r.count, r.to.spec.Autostart)
			if err != nil {
				d.log.Warn("scale", "app", r.from.spec.Name, "error", err)
			}
			w.touched, w.surplus = append(w.touched, added...), append(w.surplus, surplus...)
		}
		d.act.Unlock()
	}
	return out
}

func (i *instance) wanted() bool {
	i.mu.Lock()
	defer i.mu.Unlock()
	return i.want
}

// compare finds what up has to do: one change for each app of the request, in
// its order, then one for each that is to go. moved are the apps that come
// under another supervisor.
func (d *Daemon) compare(req client.UpRequest) (changes []client.Change, gone []*instance, moved map[string]bool, err error) {
	d.mu.Lock()
	defer d.mu.Unlock()
	wanted := map[string]bool{}
	moved = map[string]bool{}
	groups := d.changedGroups(req.Groups)
	for _, spec := range req.Apps {
		wanted[spec.Name] = true
		c := client.Change{App: spec.Name, Action: "add"}
		if a := d.apps[spec.Name]; a != nil {
			if a.spec.Source != req.Source {
				from := "a command line"
				if a.spec.Source != "" {
					from = a.spec.Source
				}
				return nil, nil, nil, refuse(http.StatusConflict, "app %q runs already, from %s: delete it there or choose another name", spec.Name, from)
			}
			is := a.spec
			is.Instances = len(a.instances)
			c.Action, c.Fields = "none", config.Diff(is, spec)
			if why := groups[a.spec.Strategy]; why != "" {
				c.Fields = append(c.Fields, why)
				moved[spec.Name] = true
			}
			if a.spec.Strategy != spec.Strategy {
				moved[spec.Name] = true
			}
			same := is
			same.Instances = spec.Instances
			switch {
			case moved[spec.Name]:
				c.Action = "change"
			case len(c.Fields) == 0 && spec.Autostart && slices.ContainsFunc(a.instances, func(i *instance) bool { return !i.wanted() }):
				c.Action, c.Fields = "start", []string{"it is stopped"}
			case len(c.Fields) == 0:
			case len(config.Diff(same, spec)) == 0:
				c.Action = "scale"
			default:
				c.Action = "change"
			}
		}
		changes = append(changes, c)
	}
	for _, name := range d.order {
		a := d.apps[name]
		if a.spec.Source == req.Source && req.Source != "" && !wanted[name] {
			changes = append(changes, client.Change{App: name, Action: "remove"})
			gone = append(gone, a.instances...)
			moved[name] = groups[a.spec.Strategy] != ""
		} else if why := groups[a.spec.Strategy]; why != "" && !wanted[name] {
			return nil, nil, nil, refuse(http.StatusConflict, "app %q, which is not of this file, is in a group that would change (%s): give the group another name", name, why)
		}
	}
	maps.DeleteFunc(moved, func(_ string, is bool) bool { return !is })
	return changes, gone, moved, nil
}

// needsNewRun says whether a change shows only in a new process.
func needsNewRun(before, after config.App) bool {
	for _, a := range []*config.App{&before, &after} {
		a.Instances, a.Autostart, a.DependsOn, a.Watch, a.Source, a.Namespace, a.Strategy = 0, false, nil, nil, "", "", ""
		a.MaxSurge, a.Restart, a.Stop.Grace, a.Stop.Signal, a.Ready = "", config.Restart{MaxMemory: a.Restart.MaxMemory}, 0, "", config.Probe{}
	}
	return !reflect.DeepEqual(before, after)
}

// Down implements [api.Daemon].
func (d *Daemon) Down(ctx context.Context, source string) (client.ActResult, error) {
	var mine []*instance
	for _, i := range d.all() {
		i.mu.Lock()
		if i.spec.Source == source {
			mine = append(mine, i)
		}
		i.mu.Unlock()
	}
	pools := d.allPools()
	d.mu.Lock()
	pools = slices.DeleteFunc(pools, func(p *managedPool) bool { return p.spec.Source != source })
	d.mu.Unlock()
	if source == "" || len(mine) == 0 && len(pools) == 0 {
		return client.ActResult{}, refuse(http.StatusNotFound, "nothing runs from %s", quoted(source))
	}
	out, err := d.remove(ctx, mine, "")
	if err != nil {
		return client.ActResult{}, err
	}
	ended, err := d.actPools(ctx, pools, client.ActRequest{Verb: client.VerbDelete})
	return client.ActResult{Instances: out, Pools: ended, Warnings: d.unsaved(nil)}, err
}

// dump is the file of save and resurrect.
func (d *Daemon) dumpPath() string { return filepath.Join(d.home, "dump.json") }

// Save implements [api.Daemon].
func (d *Daemon) Save(_ context.Context, force bool) (client.Saved, error) {
	st := d.snapshot()
	if len(st.Apps)+len(st.Pools) == 0 && !force {
		return client.Saved{}, refuse(http.StatusConflict, "there is nothing to save; --force writes the empty list")
	}
	if err := writeJSON(d.dumpPath(), st); err != nil {
		return client.Saved{}, refuse(http.StatusInsufficientStorage, "%v", err)
	}
	return client.Saved{Path: d.dumpPath(), Apps: len(st.Apps), Pools: len(st.Pools)}, nil
}

// Resurrect implements [api.Daemon].
func (d *Daemon) Resurrect(ctx context.Context) (client.ActResult, error) {
	st, err := readState(d.dumpPath())
	if os.IsNotExist(err) {
		return client.ActResult{}, refuse(http.StatusNotFound, "nothing was saved: %s is not there; `remuda save` writes it", d.dumpPath())
	}
	if err != nil {
		return client.ActResult{}, refuse(http.StatusUnprocessableEntity, "%v", err)
	}
	w, known, err := d.resurrectLocked(ctx, st)
	if err != nil {
		return client.ActResult{}, err
	}
	pools := d.carryOut(ctx, &w.pools)
	return client.ActResult{Instances: append(d.settle(ctx, w.touched, w.begin), d.outcomes(known)...), Pools: pools, Warnings: d.unsaved(nil)}, nil
}

func (d *Daemon) resurrectLocked(ctx context.Context, st state) (w work, known []*instance, err error) {
	d.act.Lock()
	defer d.act.Unlock()
	w.begin = time.Now()
	var fresh []appState
	var specs []config.App
	for _, as := range st.Apps {
		d.mu.Lock()
		a := d.apps[as.Spec.Name]
		d.mu.Unlock()
		if a != nil {
			known = append(known, d.instancesOf(a)...)
			continue
		}
		fresh, specs = append(fresh, as), append(specs, as.Spec)
	}
	pools := d.freshPools(st.Pools)
	if len(fresh) == 0 && len(pools) == 0 {
		return w, known, nil
	}
	if len(fresh) > 0 {
		if err := d.admit(specs, st.Groups, false); err != nil {
			return w, nil, err
		}
	}
	if err := d.admitPools(poolSpecs(pools), specs); err != nil {
		return w, nil, err
	}
	d.addGroups(st.Groups)
	for _, as := range fresh {
		list := d.add(as.Spec)
		for n, i := range list {
			if n < len(as.Instances) {
				i.setWant(as.Instances[n].Run)
			}
		}
		w.touched = append(w.touched, list...)
	}
	d.putPools(&w.pools, poolSpecs(pools), nil) // which are all new
	d.resurrectPools(pools)
	d.saveOrWarn()
	d.readyPools(&w.pools)
	return w, known, d.supervise(ctx, w.touched)
}

// Upgrade implements [api.Daemon].
func (d *Daemon) Upgrade(ctx context.Context, binary string) error {
	st, err := os.Stat(binary)
	if err != nil || !filepath.IsAbs(binary) || !st.Mode().IsRegular() || st.Mode().Perm()&0o111 == 0 {
		return refuse(http.StatusUnprocessableEntity, "%s is no program by absolute path: %v", quoted(binary), cmp.Or(err, os.ErrInvalid))
	}
	d.act.Lock() // what is being changed is finished first, and nothing begins
	defer d.act.Unlock()
	if err := d.keeper.Replace(ctx, binary, []string{binary, "controller", "--home", d.home}); err != nil {
		return err
	}
	d.log.Info("making place for another controller", "binary", binary)
	d.quitOnce.Do(func() { close(d.quit) })
	return nil
}

// Kill implements [api.Daemon]. It returns when everything has been stopped;
// the daemon ends just after.
func (d *Daemon) Kill(ctx context.Context) error {
	d.endAll(ctx, true)
	return nil
}

// packageVersion is the version in the package.json nearest above a script.
func packageVersion(cwd, script string) string {
	dir := cwd
	if filepath.IsAbs(script) {
		dir = filepath.Dir(script)
	}
	for range 3 {
		path := filepath.Join(dir, "package.json")
		if st, err := os.Stat(path); err == nil { // which may be anything
			if !st.Mode().IsRegular() || st.Size() > 1<<20 {
				return ""
			}
			b, err := os.ReadFile(path)
			var p struct{ Version string }
			if err != nil || json.Unmarshal(b, &p) != nil || len(p.Version) > 64 {
				return ""
			}
			return p.Version
		}
		dir = filepath.Dir(dir)
	}
	return ""
}
