package daemon

import (
	"cmp"
	"context"
	"encoding/json"
	"fmt"
	"maps"
	"net/http"
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
	usage := d.sampler.usage(d.all())
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
		if config.SecretName(k) && v != "" {
			v = "********"
		}
		out[k] = v
	}
	return out
}

// Start implements [api.Daemon].
func (d *Daemon) Start(ctx context.Context, req client.StartRequest) (client.ActResult, error) {
	begin := time.Now()
	d.act.Lock()
	touched, err := d.startLocked(req)
	d.act.Unlock()
	if err != nil {
		return client.ActResult{}, err
	}
	return client.ActResult{Instances: d.settle(ctx, touched, begin), Warnings: d.unsaved(clusterWarnings(req.Apps))}, nil
}

// clusterWarnings says what is not carried out of cluster mode.
func clusterWarnings(apps []config.App) []string {
	var out []string
	for _, a := range apps {
		if a.ExecMode == "cluster" && a.Instances > 1 {
			out = append(out, fmt.Sprintf("app %q: exec_mode cluster is not carried out yet: its %d instances run as separate processes and cannot share a port", a.Name, a.Instances))
		}
	}
	return out
}

func (d *Daemon) startLocked(req client.StartRequest) ([]*instance, error) {
	apps := slices.Clone(req.Apps)
	if err := d.admit(apps, nil, req.Force); err != nil {
		return nil, err
	}
	var touched, again []*instance
	for _, spec := range apps {
		d.mu.Lock()
		known := d.apps[spec.Name]
		d.mu.Unlock()
		if known == nil {
			added, err := d.add(spec)
			if err != nil {
				return nil, err
			}
			touched = append(touched, added...)
			continue
		}
		if err := d.change(known, spec); err != nil {
			return nil, err
		}
		for _, i := range d.instancesOf(known) {
			i.setWant(true)
			again = append(again, i)
		}
	}
	if err := d.store.save(); err != nil {
		return nil, refuse(http.StatusInsufficientStorage, "nothing was started: the state cannot be saved: %v", err)
	}
	for _, i := range touched {
		if err := i.sup.Add(d.childSpec(i), i.want); err != nil {
			return nil, d.notSupervised(i, err)
		}
	}
	d.wakeGroups(again)
	// PM2's start of what runs is a restart: deploy scripts rely on it.
	return append(touched, again...), d.each(again, func(s *supervise.Supervisor, names []string) error {
		return s.Restart("start", names...)
	})
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
		if force {
			apps[n].Name = d.freeName(apps[n].Name)
		}
		total += apps[n].Instances
	}
	if total > maxInstances {
		return refuse(http.StatusUnprocessableEntity, "%d instances are more than one daemon takes (%d)", total, maxInstances)
	}
	known := func(name string) bool { return d.apps[name] != nil }
	if err := config.ValidateSet(apps, append(slices.Clone(d.groups), groups...), known); err != nil {
		return refuse(http.StatusUnprocessableEntity, "%v", err)
	}
	return nil
}

func (d *Daemon) freeName(name string) string {
	free := name
	for n := 2; d.apps[free] != nil; n++ {
		free = fmt.Sprintf("%s-%d", name, n)
	}
	return free
}

// add makes an app and its instances; nothing of it is supervised yet.
func (d *Daemon) add(spec config.App) ([]*instance, error) {
	d.versions.look(spec)
	d.mu.Lock()
	defer d.mu.Unlock()
	a := &app{spec: spec}
	d.apps[spec.Name] = a
	d.order = append(d.order, spec.Name)
	for n := range spec.Instances {
		d.addInstance(a, n)
	}
	d.timers.set(a)
	return slices.Clone(a.instances), nil
}

// addInstance needs d.mu.
func (d *Daemon) addInstance(a *app, index int) *instance {
	i := d.newInstance(a, d.nextID, index)
	d.nextID++
	i.alone = a.spec.Instances == 1
	i.want = a.spec.Autostart
	return i
}

// change gives an app a new spec, for its next runs. The number of instances
// is brought in line too; new ones are supervised at once.
func (d *Daemon) change(a *app, spec config.App) error {
	d.versions.look(spec)
	d.mu.Lock()
	spec.Strategy = a.spec.Strategy // moving a live child to another supervisor is not done
	n := spec.Instances
	spec.Instances = len(a.instances)
	a.spec = spec
	for _, i := range a.instances {
		i.mu.Lock()
		i.spec = spec
		i.mu.Unlock()
	}
	list := slices.Clone(a.instances)
	d.timers.set(a)
	d.mu.Unlock()
	for _, i := range list {
		if err := i.sup.Update(d.childSpec(i)); err != nil {
			return d.notSupervised(i, err)
		}
	}
	_, err := d.scale(a, n)
	return err
}

func (d *Daemon) notSupervised(i *instance, err error) error {
	return refuse(http.StatusConflict, "%s cannot be supervised: %v", i.name, err)
}

func (d *Daemon) childSpec(i *instance) supervise.Spec {
	s := i.child()
	d.mu.Lock()
	defer d.mu.Unlock()
	s.DependsOn = d.dependencies(d.apps[i.app].spec)
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
	chosen, err := d.match(req.Targets)
	if err != nil {
		return client.ActResult{}, err
	}
	for _, i := range chosen {
		i.mu.Lock()
		i.signalOnce = req.Signal
		i.mu.Unlock()
	}
	begin := time.Now()
	var out []client.Outcome
	switch req.Verb {
	case client.VerbStart, client.VerbRestart:
		out, err = d.restart(ctx, chosen, req, begin)
	case client.VerbReload:
		out, err = d.reload(ctx, chosen, req)
	case client.VerbStop:
		out, err = d.stop(ctx, chosen)
	case client.VerbDelete:
		out, err = d.remove(ctx, chosen)
	case client.VerbReset:
		err = d.each(chosen, func(s *supervise.Supervisor, names []string) error { return s.Reset(names...) })
		out = d.outcomes(chosen)
	case client.VerbFlush:
		err = d.logs.Flush(d.logFiles(chosen)...)
		out = d.outcomes(chosen)
	case client.VerbReopen:
		d.logs.Reopen(d.logFiles(chosen)...)
		out = d.outcomes(chosen)
	default:
		err = refuse(http.StatusUnprocessableEntity, "unknown verb %s", quoted(string(req.Verb)))
	}
	return client.ActResult{Instances: out, Warnings: d.unsaved(nil)}, err
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

func (d *Daemon) restart(ctx context.Context, list []*instance, req client.ActRequest, begin time.Time) ([]client.Outcome, error) {
	d.act.Lock()
	d.updateEnv(list, req.Env)
	for _, i := range list {
		i.setWant(true)
	}
	d.saveOrWarn()
	cause := string(req.Verb)
	d.wakeGroups(list)
	err := d.each(list, func(s *supervise.Supervisor, names []string) error { return s.Restart(cause, names...) })
	d.act.Unlock()
	if err != nil {
		return nil, err
	}
	return d.settle(ctx, list, begin), nil
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
		merged := maps.Clone(a.spec.Env)
		if merged == nil {
			merged = map[string]string{}
		}
		maps.Copy(merged, env)
		a.spec.Env = merged
		for _, j := range a.instances {
			j.mu.Lock()
			j.spec.Env = merged
			j.mu.Unlock()
		}
	}
}

// reload restarts the instances of each app one after the other; the next one
// goes only when the one before is back.
func (d *Daemon) reload(ctx context.Context, list []*instance, req client.ActRequest) ([]client.Outcome, error) {
	var out []client.Outcome
	for n, i := range list {
		req.Verb = client.VerbReload
		o, err := d.restart(ctx, []*instance{i}, req, time.Now())
		if err != nil {
			return out, err
		}
		out = append(out, o...)
		if o[0].Error != "" && n+1 < len(list) && list[n+1].app == i.app {
			// The others still do their work: they are left alone.
			rest := list[n+1:]
			for _, j := range rest {
				o := d.outcomes([]*instance{j})[0]
				o.Error = fmt.Sprintf("not reloaded, because %s did not come back", i.name)
				out = append(out, o)
			}
			return out, nil
		}
	}
	return out, nil
}

func (d *Daemon) stop(ctx context.Context, list []*instance) ([]client.Outcome, error) {
	d.act.Lock()
	for _, i := range list {
		i.setWant(false)
	}
	d.saveOrWarn()
	err := d.each(list, func(s *supervise.Supervisor, names []string) error { return s.Stop("stop", names...) })
	d.act.Unlock()
	if err != nil {
		return nil, err
	}
	err = d.each(list, func(s *supervise.Supervisor, names []string) error {
		_, err := s.Wait(ctx, supervise.Ended, names...)
		return err
	})
	return d.outcomes(list), err
}

func (d *Daemon) remove(ctx context.Context, list []*instance) ([]client.Outcome, error) {
	if _, err := d.stop(ctx, list); err != nil {
		return nil, err
	}
	d.act.Lock()
	defer d.act.Unlock()
	out := d.outcomes(list)
	if err := d.forget(ctx, list); err != nil {
		return nil, err
	}
	d.saveOrWarn()
	return out, nil
}

// forget ends the supervision of instances, and of apps that have none left.
func (d *Daemon) forget(ctx context.Context, list []*instance) error {
	err := d.each(list, func(s *supervise.Supervisor, names []string) error { return s.Remove(ctx, names...) })
	if err != nil {
		return err
	}
	d.mu.Lock()
	defer d.mu.Unlock()
	for _, i := range list {
		a := d.apps[i.app]
		delete(d.instances, i.id)
		if a == nil {
			continue
		}
		a.instances = slices.DeleteFunc(a.instances, func(j *instance) bool { return j == i })
		a.spec.Instances = len(a.instances)
		if len(a.instances) == 0 {
			d.timers.remove(i.app)
			delete(d.apps, i.app)
			d.order = slices.DeleteFunc(d.order, func(n string) bool { return n == i.app })
		}
		i.mu.Lock()
		ended := i.ended
		i.ended = nil
		i.mu.Unlock()
		go release(ended)
	}
	return nil
}

// Signal implements [api.Daemon].
func (d *Daemon) Signal(_ context.Context, req client.SignalRequest) (client.ActResult, error) {
	sig, err := parseSignal(req.Signal)
	if err != nil {
		return client.ActResult{}, refuse(http.StatusUnprocessableEntity, "%v", err)
	}
	chosen, err := d.match(req.Targets)
	if err != nil {
		return client.ActResult{}, err
	}
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
	return client.ActResult{Instances: out}, nil
}

// Scale implements [api.Daemon].
func (d *Daemon) Scale(ctx context.Context, req client.ScaleRequest) (client.ActResult, error) {
	begin := time.Now()
	d.act.Lock()
	d.mu.Lock()
	a := d.apps[req.App]
	if a == nil {
		if id, ok := idOf(req.App); ok && d.instances[id] != nil {
			a = d.apps[d.instances[id].app]
		}
	}
	d.mu.Unlock()
	if a == nil {
		d.act.Unlock()
		return client.ActResult{}, refuse(http.StatusNotFound, "no app is called %s%s", quoted(req.App), nearest(req.App, d.all()))
	}
	n, err := scaleTo(req.To, len(a.instances))
	var touched []*instance
	if err == nil {
		touched, err = d.scale(a, n)
	}
	d.act.Unlock()
	if err != nil {
		return client.ActResult{}, err
	}
	settled := d.settle(ctx, touched, begin)
	return client.ActResult{Instances: d.merged(d.instancesOf(a), settled), Warnings: d.unsaved(nil)}, nil
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

// scale adds or takes away instances, the youngest first. It returns those
// that are new. Caller holds d.act.
func (d *Daemon) scale(a *app, n int) ([]*instance, error) {
	d.mu.Lock()
	now := len(a.instances)
	if others := len(d.instances) - now; n+others > maxInstances {
		d.mu.Unlock()
		return nil, refuse(http.StatusUnprocessableEntity, "%d instances are more than one daemon takes (%d)", n+others, maxInstances)
	}
	var added, surplus []*instance
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
		i.want = true
		added = append(added, i)
	}
	if n < now {
		surplus = slices.Clone(a.instances[n:])
	}
	d.mu.Unlock()
	for _, i := range surplus {
		i.setWant(false)
	}
	if err := d.store.save(); err != nil {
		d.log.Error("state", "error", err)
	}
	for _, i := range added {
		if err := i.sup.Add(d.childSpec(i), true); err != nil {
			return added, d.notSupervised(i, err)
		}
	}
	if len(surplus) > 0 {
		ctx, cancel := context.WithTimeout(context.Background(), 2*time.Minute)
		defer cancel()
		if err := d.forget(ctx, surplus); err != nil {
			return added, err
		}
		d.saveOrWarn()
	}
	return added, nil
}

// Up implements [api.Daemon].
func (d *Daemon) Up(ctx context.Context, req client.UpRequest) (client.ActResult, error) {
	begin := time.Now()
	d.act.Lock()
	changes, touched, err := d.upLocked(ctx, req)
	d.act.Unlock()
	if err != nil {
		return client.ActResult{Changes: changes}, err
	}
	res := client.ActResult{Changes: changes}
	if !req.DryRun {
		settled := d.settle(ctx, touched, begin)
		var mine []*instance
		for _, i := range d.all() {
			if slices.ContainsFunc(req.Apps, func(a config.App) bool { return a.Name == i.app }) {
				mine = append(mine, i)
			}
		}
		res.Instances, res.Warnings = d.merged(mine, settled), d.unsaved(clusterWarnings(req.Apps))
	}
	return res, nil
}

func (d *Daemon) upLocked(ctx context.Context, req client.UpRequest) ([]client.Change, []*instance, error) {
	if err := d.admit(req.Apps, req.Groups, false); err != nil {
		return nil, nil, err
	}
	changes, gone, err := d.compare(req)
	if err != nil || req.DryRun {
		return changes, nil, err
	}
	d.mu.Lock()
	for _, g := range req.Groups {
		if at := slices.IndexFunc(d.groups, func(o config.Group) bool { return o.Name == g.Name }); at < 0 {
			d.groups = append(d.groups, g)
		}
	}
	d.makeGroups(d.groups)
	d.mu.Unlock()
	if len(gone) > 0 {
		for _, i := range gone {
			i.setWant(false)
		}
		if err := d.forget(ctx, gone); err != nil {
			return changes, nil, err
		}
	}
	var touched, added, again []*instance
	for n, spec := range req.Apps {
		d.mu.Lock()
		known := d.apps[spec.Name]
		d.mu.Unlock()
		switch changes[n].Action {
		case "add":
			list, err := d.add(spec)
			if err != nil {
				return changes, nil, err
			}
			added = append(added, list...)
		case "change", "scale":
			before := known.spec
			old := d.instancesOf(known)
			if err := d.change(known, spec); err != nil {
				return changes, nil, err
			}
			if needsNewRun(before, spec) {
				for _, i := range d.instancesOf(known) {
					if slices.Contains(old, i) {
						again = append(again, i)
					}
				}
			}
		case "start":
			again = append(again, d.instancesOf(known)...)
		}
	}
	for _, i := range again {
		i.setWant(true)
	}
	if err := d.store.save(); err != nil {
		return changes, nil, refuse(http.StatusInsufficientStorage, "nothing new was started: the state cannot be saved: %v", err)
	}
	for _, i := range added {
		if err := i.sup.Add(d.childSpec(i), i.want); err != nil {
			return changes, nil, d.notSupervised(i, err)
		}
	}
	touched = slices.Concat(added, again)
	d.wakeGroups(again)
	return changes, touched, d.each(again, func(s *supervise.Supervisor, names []string) error { return s.Restart("up", names...) })
}

// compare finds what up has to do: one change for each app of the request, in
// its order, then one for each that is to go.
func (d *Daemon) compare(req client.UpRequest) (changes []client.Change, gone []*instance, err error) {
	d.mu.Lock()
	defer d.mu.Unlock()
	wanted := map[string]bool{}
	for _, spec := range req.Apps {
		wanted[spec.Name] = true
		c := client.Change{App: spec.Name, Action: "add"}
		if a := d.apps[spec.Name]; a != nil {
			if a.spec.Source != req.Source {
				from := "a command line"
				if a.spec.Source != "" {
					from = a.spec.Source
				}
				return nil, nil, refuse(http.StatusConflict, "app %q runs already, from %s: delete it there or choose another name", spec.Name, from)
			}
			c.Action, c.Fields = "none", config.Diff(a.spec, spec)
			same := a.spec
			same.Instances = spec.Instances
			switch {
			case len(c.Fields) == 0 && spec.Autostart && slices.ContainsFunc(a.instances, func(i *instance) bool { return !i.want }):
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
		if a := d.apps[name]; a.spec.Source == req.Source && req.Source != "" && !wanted[name] {
			changes = append(changes, client.Change{App: name, Action: "remove"})
			gone = append(gone, a.instances...)
		}
	}
	return changes, gone, nil
}

// needsNewRun says whether a change shows only in a new process.
func needsNewRun(before, after config.App) bool {
	for _, a := range []*config.App{&before, &after} {
		a.Instances, a.Autostart, a.DependsOn, a.Watch, a.Source, a.Namespace, a.Strategy = 0, false, nil, nil, "", "", ""
		a.Restart, a.Stop.Grace, a.Stop.Signal, a.Ready = config.Restart{MaxMemory: a.Restart.MaxMemory}, 0, "", config.Probe{}
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
	if source == "" || len(mine) == 0 {
		return client.ActResult{}, refuse(http.StatusNotFound, "nothing runs from %s", quoted(source))
	}
	out, err := d.remove(ctx, mine)
	return client.ActResult{Instances: out, Warnings: d.unsaved(nil)}, err
}

// dump is the file of save and resurrect.
func (d *Daemon) dumpPath() string { return filepath.Join(d.home, "dump.json") }

// Save implements [api.Daemon].
func (d *Daemon) Save(_ context.Context, force bool) (client.Saved, error) {
	st := d.snapshot()
	if len(st.Apps) == 0 && !force {
		return client.Saved{}, refuse(http.StatusConflict, "there is nothing to save; --force writes the empty list")
	}
	if err := writeJSON(d.dumpPath(), st); err != nil {
		return client.Saved{}, refuse(http.StatusInsufficientStorage, "%v", err)
	}
	return client.Saved{Path: d.dumpPath(), Apps: len(st.Apps)}, nil
}

// Resurrect implements [api.Daemon].
func (d *Daemon) Resurrect(ctx context.Context) (client.ActResult, error) {
	begin := time.Now()
	st, err := readState(d.dumpPath())
	if os.IsNotExist(err) {
		return client.ActResult{}, refuse(http.StatusNotFound, "nothing was saved: %s is not there; `remuda save` writes it", d.dumpPath())
	}
	if err != nil {
		return client.ActResult{}, refuse(http.StatusUnprocessableEntity, "%v", err)
	}
	d.act.Lock()
	d.mu.Lock()
	for _, g := range st.Groups {
		if !slices.ContainsFunc(d.groups, func(o config.Group) bool { return o.Name == g.Name }) {
			d.groups = append(d.groups, g)
		}
	}
	d.makeGroups(d.groups)
	d.mu.Unlock()
	var added, known []*instance
	for _, as := range st.Apps {
		d.mu.Lock()
		a := d.apps[as.Spec.Name]
		d.mu.Unlock()
		if a != nil {
			known = append(known, d.instancesOf(a)...)
			continue
		}
		list, err := d.add(as.Spec)
		if err != nil {
			d.act.Unlock()
			return client.ActResult{}, err
		}
		for n, i := range list {
			if n < len(as.Instances) {
				i.want = as.Instances[n].Run
			}
		}
		added = append(added, list...)
	}
	d.saveOrWarn()
	for _, i := range added {
		if err == nil {
			err = i.sup.Add(d.childSpec(i), i.want)
		}
	}
	d.act.Unlock()
	if err != nil {
		return client.ActResult{}, err
	}
	return client.ActResult{Instances: append(d.settle(ctx, added, begin), d.outcomes(known)...), Warnings: d.unsaved(nil)}, nil
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
		b, err := os.ReadFile(filepath.Join(dir, "package.json"))
		if err == nil {
			var p struct{ Version string }
			if len(b) > 1<<20 || json.Unmarshal(b, &p) != nil || len(p.Version) > 64 {
				return ""
			}
			return p.Version
		}
		dir = filepath.Dir(dir)
	}
	return ""
}
