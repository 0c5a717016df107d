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

// match finds the instances that targets name, in order of id. Each target
// must match something, but "all", which may match nothing. No target is all.
func (d *Daemon) match(targets []client.Target) ([]*instance, error) {
	d.mu.Lock()
	all := slices.SortedFunc(func(yield func(*instance) bool) {
		for _, i := range d.instances {
			if !yield(i) {
				return
			}
		}
	}, func(a, b *instance) int { return a.id - b.id })
	namespaces := make(map[*instance]string, len(all))
	for _, i := range all {
		namespaces[i] = d.apps[i.app].spec.Namespace
	}
	d.mu.Unlock()
	if len(targets) == 0 {
		return all, nil
	}
	if len(targets) > maxTargets {
		return nil, refuse(http.StatusUnprocessableEntity, "%d targets are more than %d", len(targets), maxTargets)
	}
	chosen := map[*instance]bool{}
	for _, t := range targets {
		if t == "all" {
			return all, nil
		}
		is, err := matcher(t, all, namespaces)
		if err != nil {
			return nil, err
		}
		found := false
		for _, i := range all {
			if is(i) {
				found, chosen[i] = true, true
			}
		}
		if !found {
			return nil, refuse(http.StatusNotFound, "no app, id or namespace is called %s%s", quoted(t), nearest(t, all))
		}
	}
	return slices.DeleteFunc(all, func(i *instance) bool { return !chosen[i] }), nil
}

// chosen is match for what changes something: there, no target is a mistake.
func (d *Daemon) chosen(targets []client.Target) ([]*instance, error) {
	if len(targets) == 0 {
		return nil, refuse(http.StatusUnprocessableEntity, "no target is given: name apps, or say all")
	}
	return d.match(targets)
}

// matcher reads one target. A name goes before an id, that before app:index
// and a namespace, as PM2 has it.
func matcher(t string, all []*instance, namespaces map[*instance]string) (func(*instance) bool, error) {
	if len(t) > 2 && t[0] == '/' && t[len(t)-1] == '/' {
		re, err := regexp.Compile(t[1 : len(t)-1])
		if err != nil {
			return nil, refuse(http.StatusUnprocessableEntity, "target %s: %v", quoted(t), err)
		}
		return func(i *instance) bool { return re.MatchString(i.app) }, nil
	}
	if slices.ContainsFunc(all, func(i *instance) bool { return i.app == t }) {
		return func(i *instance) bool { return i.app == t }, nil
	}
	if id, ok := idOf(t); ok {
		return func(i *instance) bool { return i.id == id }, nil
	}
	if slices.ContainsFunc(all, func(i *instance) bool { return i.name == t }) {
		return func(i *instance) bool { return i.name == t }, nil
	}
	return func(i *instance) bool { return namespaces[i] == t }, nil
}

// quoted shows what somebody typed, escaped and not at any length.
func quoted(s string) string {
	if len(s) > 100 {
		return fmt.Sprintf("%q… (%d bytes)", s[:100], len(s))
	}
	return fmt.Sprintf("%q", s)
}

// nearest suggests a name for one that is not there.
func nearest(t string, all []*instance) string {
	if len(t) > 100 {
		return ""
	}
	best, dist := "", 3
	for _, i := range all {
		if n := distance(strings.ToLower(t), strings.ToLower(i.app), dist); n < dist {
			best, dist = i.app, n
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
