package supervise

import (
	"fmt"
	"slices"
	"strings"
)

func (s *Supervisor) index(c *child) {
	if g := c.spec.Group; g != "" {
		s.byGroup[g] = append(s.byGroup[g], c)
	}
	if len(c.spec.DependsOn) > 0 {
		s.withDeps++
	}
	for _, d := range c.spec.DependsOn {
		s.needed[d.On]++
	}
}

func (s *Supervisor) unindex(c *child) {
	if g := c.spec.Group; g != "" {
		s.byGroup[g] = slices.DeleteFunc(s.byGroup[g], func(x *child) bool { return x == c })
		if len(s.byGroup[g]) == 0 {
			delete(s.byGroup, g)
		}
	}
	if len(c.spec.DependsOn) > 0 {
		s.withDeps--
	}
	for _, d := range c.spec.DependsOn {
		if s.needed[d.On]--; s.needed[d.On] == 0 {
			delete(s.needed, d.On)
		}
	}
}

// on calls f for each child that a dependency names, until f returns false.
func (s *Supervisor) on(d Dep, f func(*child) bool) {
	if c := s.byName[d.On]; c != nil && !f(c) {
		return
	}
	for _, c := range s.byGroup[d.On] {
		if c.spec.Name != d.On && !f(c) {
			return
		}
	}
}

// cycle returns a dependency cycle through c, spelled by name, or "". c may
// not be in byName yet.
func (s *Supervisor) cycle(c *child) string {
	if len(c.spec.DependsOn) == 0 {
		return ""
	}
	seen := map[*child]bool{}
	var path []string
	var walk func(*child) bool
	walk = func(x *child) bool {
		path = append(path, x.spec.Name)
		found := false
		for _, d := range x.spec.DependsOn {
			if d.On == c.spec.Name {
				found = true
			} else {
				s.on(d, func(y *child) bool {
					if y == c {
						found = true
					} else if !seen[y] {
						seen[y] = true
						found = walk(y)
					}
					return !found
				})
			}
			if found {
				return true
			}
		}
		path = path[:len(path)-1]
		return false
	}
	if !walk(c) {
		return ""
	}
	return strings.Join(append(path, c.spec.Name), " → ")
}

// reach calls f for all that c depends on, directly or not.
func (s *Supervisor) reach(c *child, f func(*child)) {
	if len(c.spec.DependsOn) == 0 {
		return
	}
	seen := map[*child]bool{c: true}
	todo := []*child{c}
	for len(todo) > 0 {
		x := todo[len(todo)-1]
		todo = todo[:len(todo)-1]
		for _, d := range x.spec.DependsOn {
			s.on(d, func(y *child) bool {
				if !seen[y] {
					seen[y] = true
					f(y)
					todo = append(todo, y)
				}
				return true
			})
		}
	}
}

// unmet says what c has to wait for, "" for nothing; hopeless where waiting
// is of no use.
func (s *Supervisor) unmet(c *child) (why string, hopeless bool) {
	for _, d := range c.spec.DependsOn {
		known := false
		s.on(d, func(x *child) bool {
			known = true
			why, hopeless = x.lacks(d.Condition)
			return why == ""
		})
		if !known {
			why = "waits for " + d.On + ", which is not known"
		}
		if why != "" {
			return why, hopeless
		}
	}
	return "", false
}

// lacks says what x misses to satisfy a condition.
func (x *child) lacks(cond Condition) (why string, hopeless bool) {
	done := x.completed && x.state == StateStopped
	ok, verb := false, ""
	switch cond {
	case DepStarted:
		ok, verb = done || x.run != nil && x.state != StateStopping, "start"
	case DepReady:
		ok, verb = done || x.state == StateOnline, "be ready"
	case DepCompleted:
		ok, verb = x.completed, "complete"
		if !ok && x.want && (x.state == StateErrored || x.state == StateStopped && x.lastExit != nil) {
			return fmt.Sprintf("needs %s to complete, which failed: %s", x.spec.Name, x.reason), true
		}
	}
	if ok {
		return "", false
	}
	why = fmt.Sprintf("waits for %s to %s", x.spec.Name, verb)
	if x.state == StateErrored || x.state == StateStopped {
		why += fmt.Sprintf(", which is %s", x.state)
	}
	return why, false
}
