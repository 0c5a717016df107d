package daemon

import (
	"slices"

	"github.com/remuda-dev/remuda/internal/config"
	"github.com/remuda-dev/remuda/supervise"
)

// makeGroups makes a nested supervisor for each group that has none yet.
// Caller holds d.mu or is alone.
func (d *Daemon) makeGroups(groups []config.Group) {
	for _, g := range groups {
		d.makeGroup(g, groups)
	}
}

func (d *Daemon) makeGroup(g config.Group, all []config.Group) *supervise.Supervisor {
	if s := d.sups[g.Name]; s != nil {
		return s
	}
	parent := d.sups[""]
	if i := slices.IndexFunc(all, func(p config.Group) bool { return g.Parent != "" && p.Name == g.Parent }); i >= 0 {
		parent = d.makeGroup(all[i], all)
	}
	o := supervise.Options{MaxRestarts: g.MaxRestarts, Window: g.Window.Std(), Nested: true, OnChange: d.changed}
	switch g.Strategy {
	case "one-for-all":
		o.Strategy = supervise.OneForAll
	case "rest-for-one":
		o.Strategy = supervise.RestForOne
	}
	s := supervise.New(o)
	d.sups[g.Name] = s
	// A group that gave up stays so until somebody starts an app of it.
	err := parent.Add(supervise.Spec{Name: groupChild(g.Name), Child: s.AsChild(), Restart: supervise.Never}, true)
	if err != nil {
		d.log.Error("group", "name", g.Name, "error", err)
	}
	return s
}

// wakeGroups starts the groups that instances are in, from the outermost, where
// they had given up.
func (d *Daemon) wakeGroups(list []*instance) {
	d.mu.Lock()
	defer d.mu.Unlock()
	var wake func(name string)
	wake = func(name string) {
		at := slices.IndexFunc(d.groups, func(g config.Group) bool { return g.Name == name })
		if at < 0 {
			return
		}
		parent := d.groups[at].Parent
		wake(parent)
		if err := d.sups[parent].Start(groupChild(name)); err != nil {
			d.log.Warn("group", "name", name, "error", err)
		}
	}
	for _, i := range list {
		wake(d.apps[i.app].spec.Strategy)
	}
}

// groupChild is the name of a group as a child; no app can have it.
func groupChild(name string) string { return "group/" + name }

// dependencies are those of an app among its siblings: on one that is in
// another group, the group stands for it.
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
		if other := d.apps[on]; other != nil && other.spec.Strategy != spec.Strategy {
			if other.spec.Strategy == "" {
				continue // told at load: an app of a group cannot wait for one outside
			}
			dep.On = groupChild(other.spec.Strategy)
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
