package daemon

import (
	"context"
	"fmt"
	"slices"
	"time"

	"github.com/remuda-dev/remuda/internal/config"
	"github.com/remuda-dev/remuda/supervise"
)

const (
	// groupWait bounds the wait for a group to take children, which is a
	// matter of microseconds.
	groupWait = 5 * time.Second
	// groupGrace is no bound at all: each app of a group has a grace of its
	// own.
	groupGrace = 365 * 24 * time.Hour
)

// addGroups makes a nested supervisor for each group that has none yet. Caller
// holds d.act, or is alone.
func (d *Daemon) addGroups(groups []config.Group) {
	d.mu.Lock()
	for _, g := range groups {
		if !slices.ContainsFunc(d.groups, func(o config.Group) bool { return o.Name == g.Name }) {
			d.groups = append(d.groups, g)
		}
	}
	all := slices.Clone(d.groups)
	d.mu.Unlock()
	for _, g := range all {
		d.makeGroup(g, all)
	}
}

// makeGroup returns when the group takes children. What is added before that
// would be started together with it, even an app whose work is done.
func (d *Daemon) makeGroup(g config.Group, all []config.Group) {
	d.mu.Lock()
	known := d.sups[g.Name] != nil
	d.mu.Unlock()
	if known {
		return
	}
	if i := slices.IndexFunc(all, func(p config.Group) bool { return g.Parent != "" && p.Name == g.Parent }); i >= 0 {
		d.makeGroup(all[i], all)
	}
	o := supervise.Options{MaxRestarts: g.MaxRestarts, Window: g.Window.Std(), Nested: true, OnChange: d.changed}
	switch g.Strategy {
	case "one-for-all":
		o.Strategy = supervise.OneForAll
	case "rest-for-one":
		o.Strategy = supervise.RestForOne
	}
	s := supervise.New(o)
	d.mu.Lock()
	d.sups[g.Name] = s
	d.mu.Unlock()
	// A group that gave up stays so until somebody starts an app of it.
	spec := supervise.Spec{Name: groupChild(g.Name), Child: s.AsChild(), Restart: supervise.Never, Grace: groupGrace}
	parent := d.supervisorOf(g.Parent)
	err := parent.Add(spec, true)
	if err == nil {
		err = awaitGroup(parent, g.Name)
	}
	if err != nil {
		d.log.Error("group", "name", g.Name, "error", err)
	}
}

func awaitGroup(parent *supervise.Supervisor, name string) error {
	ctx, cancel := context.WithTimeout(context.Background(), groupWait)
	defer cancel()
	_, err := parent.Wait(ctx, func(st supervise.Status) bool { return st.Run != nil || st.State == supervise.StateErrored }, groupChild(name))
	return err
}

// supervisorOf is the supervisor of a group's apps, the root where there is no
// such group.
func (d *Daemon) supervisorOf(group string) *supervise.Supervisor {
	d.mu.Lock()
	defer d.mu.Unlock()
	if s := d.sups[group]; s != nil {
		return s
	}
	return d.sups[""]
}

// dropGroups forgets the groups that have neither apps nor groups in them.
// Caller holds d.act.
func (d *Daemon) dropGroups() {
	for {
		d.mu.Lock()
		used := map[string]bool{}
		for _, a := range d.apps {
			used[a.spec.Strategy] = true
		}
		for _, g := range d.groups {
			used[g.Parent] = true
		}
		at := slices.IndexFunc(d.groups, func(g config.Group) bool { return !used[g.Name] })
		if at < 0 {
			d.mu.Unlock()
			return
		}
		g := d.groups[at]
		d.groups = slices.Delete(slices.Clone(d.groups), at, at+1)
		delete(d.sups, g.Name)
		d.mu.Unlock()
		ctx, cancel := context.WithTimeout(context.Background(), groupWait)
		if err := d.supervisorOf(g.Parent).Remove(ctx, groupChild(g.Name)); err != nil {
			d.log.Error("group", "name", g.Name, "error", err)
		}
		cancel()
	}
}

// changedGroups says, for each group that is there and is to be another, or is
// inside of such a one, what changes. Caller holds d.mu.
func (d *Daemon) changedGroups(groups []config.Group) map[string]string {
	changed := map[string]string{}
	for _, g := range d.groups {
		at := slices.IndexFunc(groups, func(n config.Group) bool { return n.Name == g.Name })
		if at < 0 {
			continue
		}
		n := groups[at]
		for _, f := range []struct{ what, from, to string }{
			{"strategy", g.Strategy, n.Strategy},
			{"parent", g.Parent, n.Parent},
			{"max_restarts", fmt.Sprint(g.MaxRestarts), fmt.Sprint(n.MaxRestarts)},
			{"window", g.Window.String(), n.Window.String()},
		} {
			if f.from != f.to {
				changed[g.Name] = fmt.Sprintf("group %s: %s: %q → %q", g.Name, f.what, f.from, f.to)
			}
		}
	}
	for more := len(changed) > 0; more; {
		more = false
		for _, g := range d.groups {
			if changed[g.Name] == "" && changed[g.Parent] != "" {
				changed[g.Name], more = changed[g.Parent], true
			}
		}
	}
	return changed
}

// wakeGroups starts the groups that instances are in, from the outermost, where
// they had given up. Caller holds d.act.
func (d *Daemon) wakeGroups(list []*instance) {
	d.mu.Lock()
	var names []string // the outer before the inner
	var need func(name string)
	need = func(name string) {
		at := slices.IndexFunc(d.groups, func(g config.Group) bool { return g.Name == name })
		if at < 0 || slices.Contains(names, name) {
			return
		}
		need(d.groups[at].Parent)
		names = append(names, name)
	}
	for _, i := range list {
		if a := d.apps[i.app]; a != nil {
			need(a.spec.Strategy)
		}
	}
	parents := map[string]string{}
	for _, g := range d.groups {
		parents[g.Name] = g.Parent
	}
	d.mu.Unlock()
	for _, name := range names {
		parent := d.supervisorOf(parents[name])
		err := parent.Start(groupChild(name))
		if err == nil {
			err = awaitGroup(parent, name)
		}
		if err != nil {
			d.log.Warn("group", "name", name, "error", err)
		}
	}
}

// groupChild is the name of a group as a child; no app can have it.
func groupChild(name string) string { return "group/" + name }

// sibling is what stands for an app of the group other, seen from the apps of
// the group own: "" for the app itself, else the group it is in among their
// siblings. Where there is none, because other is further out, ok is false.
func sibling(own, other string, groups []config.Group) (name string, ok bool) {
	for range len(groups) + 1 {
		if other == own {
			return name, true
		}
		at := slices.IndexFunc(groups, func(g config.Group) bool { return g.Name == other })
		if at < 0 {
			return "", false
		}
		name, other = other, groups[at].Parent
	}
	return "", false
}

// dependencies are those of an app among its siblings: on one that is in
// another group, the group stands for it. Caller holds d.mu, or is alone.
func (d *Daemon) dependencies(spec config.App) []supervise.Dep {
	var deps []supervise.Dep
	for on, cond := range spec.DependsOn {
		dep := supervise.Dep{On: on}
		switch cond {
		case "ready":
			dep.Condition = supervise.DepReady
		case "completed":
			dep.Condition = supervise.DepCompleted
		}
		if other := d.apps[on]; other != nil {
			group, ok := sibling(spec.Strategy, other.spec.Strategy, d.groups)
			if !ok {
				continue // see admit
			}
			if group != "" {
				dep.On = groupChild(group)
			}
		}
		deps = append(deps, dep)
	}
	slices.SortFunc(deps, func(a, b supervise.Dep) int {
		if a.On < b.On {
			return -1
		}
		return 1
	})
	return deps
}
