package daemon

import (
	"fmt"
	"path/filepath"
	"reflect"
	"strings"
	"sync"
	"time"

	"github.com/remuda-dev/remuda/internal/config"
	"github.com/remuda-dev/remuda/internal/watch"
	"github.com/remuda-dev/remuda/supervise"
)

// memoryEvery is how often memory limits are looked at, while any app has one.
const memoryEvery = time.Second

// timers restart apps for reasons that lie outside them: a cron time, a
// changed file, too much memory. They cost nothing where no app asks for it.
// timers is safe for concurrent use.
type timers struct {
	d *Daemon

	mu      sync.Mutex
	stopped bool
	apps    map[string]*triggers
	limited int // apps with a memory limit
	memory  *time.Timer
}

type triggers struct {
	spec    config.App
	cron    *time.Timer
	watcher *watch.Watcher
}

func newTimers(d *Daemon) *timers { return &timers{d: d, apps: map[string]*triggers{}} }

// set brings the triggers of an app in line with its spec. The caller must not
// hold d.mu: this may take a while, and may tell of trouble.
func (t *timers) set(spec config.App) {
	t.mu.Lock()
	defer t.mu.Unlock()
	old := t.apps[spec.Name]
	if old != nil && old.spec.Restart.Cron == spec.Restart.Cron && reflect.DeepEqual(old.spec.Watch, spec.Watch) &&
		old.spec.Cwd == spec.Cwd && old.spec.Restart.MaxMemory == spec.Restart.MaxMemory {
		return
	}
	t.drop(spec.Name)
	if t.stopped {
		return
	}
	tr := &triggers{spec: spec}
	t.apps[spec.Name] = tr
	if spec.Restart.Cron != "" {
		t.schedule(tr)
	}
	if spec.Watch != nil {
		t.watch(tr)
	}
	if spec.Restart.MaxMemory > 0 {
		t.limited++
		if t.memory == nil {
			t.memory = time.AfterFunc(memoryEvery, t.checkMemory)
		}
	}
}

// remove ends the triggers of an app. The caller must not hold d.mu.
func (t *timers) remove(name string) {
	t.mu.Lock()
	defer t.mu.Unlock()
	t.drop(name)
}

// drop is remove under the lock.
func (t *timers) drop(name string) {
	tr := t.apps[name]
	if tr == nil {
		return
	}
	delete(t.apps, name)
	if tr.cron != nil {
		tr.cron.Stop()
	}
	if tr.watcher != nil {
		go tr.watcher.Close() // it may be in the middle of telling us
	}
	if tr.spec.Restart.MaxMemory > 0 {
		t.limited--
	}
}

// stop ends all of them.
func (t *timers) stop() {
	t.mu.Lock()
	defer t.mu.Unlock()
	t.stopped = true
	for name := range t.apps {
		t.drop(name)
	}
}

func (t *timers) schedule(tr *triggers) {
	sched, err := config.ParseCron(tr.spec.Restart.Cron)
	if err != nil {
		t.d.log.Error("cron restart", "app", tr.spec.Name, "error", err)
		return
	}
	next := sched.Next(time.Now())
	if next.IsZero() { // never again
		return
	}
	tr.cron = time.AfterFunc(time.Until(next), func() {
		t.mu.Lock()
		live := !t.stopped && t.apps[tr.spec.Name] == tr
		if live {
			t.schedule(tr)
		}
		t.mu.Unlock()
		if live {
			t.d.restartRunning(tr.spec.Name, "cron "+tr.spec.Restart.Cron)
		}
	})
}

func (t *timers) watch(tr *triggers) {
	w, err := watch.New(watch.Options{
		Paths: tr.spec.Watch.Paths, Ignore: tr.spec.Watch.Ignore, Base: tr.spec.Cwd, Debounce: tr.spec.Watch.Debounce.Std(),
		OnChange: func(paths []string) {
			cause := "file changed: " + relative(tr.spec.Cwd, paths[0])
			if len(paths) > 1 {
				cause = fmt.Sprintf("%s and %d more", cause, len(paths)-1)
			}
			go t.d.restartRunning(tr.spec.Name, cause)
		},
		OnError: func(err error) { t.d.watchTrouble(tr.spec.Name, err) },
	})
	if err != nil {
		t.d.watchTrouble(tr.spec.Name, err)
		return
	}
	tr.watcher = w
}

func relative(base, path string) string {
	if rel, err := filepath.Rel(base, path); err == nil && !strings.HasPrefix(rel, "..") {
		return rel
	}
	return path
}

func (d *Daemon) watchTrouble(name string, err error) {
	text := fmt.Sprintf("watching the files of %s: %v", name, err)
	d.log.Warn(text)
	d.mu.Lock()
	defer d.mu.Unlock()
	if a := d.apps[name]; a != nil && len(a.instances) > 0 {
		d.event(a.instances[0], "app.watch-trouble", 0, text)
	}
}

// restartRunning restarts those instances of an app that run or try to.
func (d *Daemon) restartRunning(name, cause string) {
	d.mu.Lock()
	a := d.apps[name]
	var list []*instance
	if a != nil {
		list = append(list, a.instances...)
	}
	d.mu.Unlock()
	for _, i := range list {
		st, ok := i.sup.Status(i.name)
		if ok && st.Wanted && st.State != supervise.StateErrored {
			if err := i.sup.Restart(cause, i.name); err != nil {
				d.log.Warn("restart", "instance", i.name, "cause", cause, "error", err)
			}
		}
	}
}

// checkMemory restarts what uses more than it may.
func (t *timers) checkMemory() {
	t.mu.Lock()
	if t.stopped || t.limited == 0 {
		t.memory = nil
		t.mu.Unlock()
		return
	}
	limits := make(map[string]int64, t.limited)
	for name, tr := range t.apps {
		if m := tr.spec.Restart.MaxMemory; m > 0 {
			limits[name] = m
		}
	}
	t.memory.Reset(memoryEvery)
	t.mu.Unlock()

	usage := t.d.sampler.usage(t.d.all(), t.d.allPools())
	for _, i := range t.d.all() {
		limit := limits[i.app]
		u, ok := usage[i.id]
		if limit == 0 || !ok || u.RSS <= limit {
			continue
		}
		if st, ok := i.sup.Status(i.name); !ok || st.State != supervise.StateOnline && st.State != supervise.StateUnready {
			continue
		}
		cause := fmt.Sprintf("memory limit: %s are more than %s", config.FormatSize(u.RSS), config.FormatSize(limit))
		if err := i.sup.Restart(cause, i.name); err != nil {
			t.d.log.Warn("restart", "instance", i.name, "cause", cause, "error", err)
		}
	}
}
