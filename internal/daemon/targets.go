package daemon

import (
	"fmt"
	"net/http"
	"regexp"
	"slices"
	"strings"

	"github.com/remuda-dev/remuda/client"
)

// maxTargets bounds one request.
const maxTargets = 10_000

func refuse(status int, format string, args ...any) error {
	return &client.Error{Status: status, Detail: fmt.Sprintf(format, args...)}
}

// named is what a target can match: an instance or a pool.
type named struct {
	id                   int
	app, name, namespace string
	inst                 *instance
	pool                 *managedPool
}

// match finds the instances that targets name, in order of id. Each target
// must match something, be it a pool, but "all", which may match nothing. No
// target is all.
func (d *Daemon) match(targets []client.Target) ([]*instance, error) {
	list, _, err := d.matchAll(targets)
	return list, err
}

// matchAll is match for pools too.
func (d *Daemon) matchAll(targets []client.Target) ([]*instance, []*managedPool, error) {
	if len(targets) > maxTargets {
		return nil, nil, refuse(http.StatusUnprocessableEntity, "%d targets are more than %d", len(targets), maxTargets)
	}
	d.mu.Lock()
	all := make([]named, 0, len(d.instances)+len(d.pools))
	for _, i := range d.instances {
		all = append(all, named{id: i.id, app: i.app, name: i.name, namespace: d.apps[i.app].spec.Namespace, inst: i})
	}
	for _, p := range d.pools {
		all = append(all, named{id: p.id, app: p.name, name: p.name, namespace: p.spec.Namespace, pool: p})
	}
	d.mu.Unlock()
	slices.SortFunc(all, func(a, b named) int { return a.id - b.id })
	chosen := make([]bool, len(all))
	if len(targets) == 0 || slices.Contains(targets, "all") {
		for n := range chosen {
			chosen[n] = true
		}
		targets = nil
	}
	for _, t := range targets {
		is, err := matcher(t, all)
		if err != nil {
			return nil, nil, err
		}
		found := false
		for n := range all {
			if is(&all[n]) {
				found, chosen[n] = true, true
			}
		}
		if !found {
			return nil, nil, refuse(http.StatusNotFound, "no app, id or namespace is called %s%s", quoted(t), nearest(t, namesOf(all)))
		}
	}
	var (
		list  []*instance
		pools []*managedPool
	)
	for n := range all {
		switch {
		case !chosen[n]:
		case all[n].inst != nil:
			list = append(list, all[n].inst)
		default:
			pools = append(pools, all[n].pool)
		}
	}
	return list, pools, nil
}

func namesOf(all []named) []string {
	names := make([]string, len(all))
	for n := range all {
		names[n] = all[n].app
	}
	return names
}

// chosen is match for what changes something: there, no target is a mistake.
func (d *Daemon) chosen(targets []client.Target) ([]*instance, error) {
	list, _, err := d.chosenAll(targets)
	return list, err
}

// chosenAll is chosen for pools too.
func (d *Daemon) chosenAll(targets []client.Target) ([]*instance, []*managedPool, error) {
	if len(targets) == 0 {
		return nil, nil, refuse(http.StatusUnprocessableEntity, "no target is given: name apps, or say all")
	}
	return d.matchAll(targets)
}

// matcher reads one target. A name goes before an id, that before app:index
// and a namespace, as PM2 has it.
func matcher(t string, all []named) (func(*named) bool, error) {
	if len(t) > 2 && t[0] == '/' && t[len(t)-1] == '/' {
		re, err := regexp.Compile(t[1 : len(t)-1])
		if err != nil {
			return nil, refuse(http.StatusUnprocessableEntity, "target %s: %v", quoted(t), err)
		}
		return func(n *named) bool { return re.MatchString(n.app) }, nil
	}
	if slices.ContainsFunc(all, func(n named) bool { return n.app == t }) {
		return func(n *named) bool { return n.app == t }, nil
	}
	if id, ok := idOf(t); ok {
		return func(n *named) bool { return n.id == id }, nil
	}
	if slices.ContainsFunc(all, func(n named) bool { return n.name == t }) {
		return func(n *named) bool { return n.name == t }, nil
	}
	return func(n *named) bool { return n.namespace == t }, nil
}

// quoted shows what somebody typed, escaped and not at any length.
func quoted(s string) string {
	if len(s) > 100 {
		return fmt.Sprintf("%q… (%d bytes)", s[:100], len(s))
	}
	return fmt.Sprintf("%q", s)
}

// nearest suggests a name for one that is not there.
func nearest(t string, names []string) string {
	if len(t) > 100 {
		return ""
	}
	best, dist := "", 3
	for _, name := range names {
		if n := distance(strings.ToLower(t), strings.ToLower(name), dist); n < dist {
			best, dist = name, n
		}
	}
	if best == "" {
		return "; `remuda list` shows what there is"
	}
	return fmt.Sprintf("; did you mean %q?", best)
}

// distance is the Levenshtein distance, or limit where it is no less.
func distance(a, b string, limit int) int {
	if len(a)-len(b) >= limit || len(b)-len(a) >= limit {
		return limit
	}
	row := make([]int, len(b)+1)
	for j := range row {
		row[j] = j
	}
	for i := range len(a) {
		diag := row[0]
		row[0] = i + 1
		for j := range len(b) {
			cost := diag
			if a[i] != b[j] {
				cost++
			}
			diag = row[j+1]
			row[j+1] = min(cost, row[j]+1, diag+1)
		}
	}
	return min(row[len(b)], limit)
}
