package daemon

import (
	"fmt"
	"os"
	"os/user"
	"strconv"
	"strings"
	"sync"
	"time"

	"github.com/remuda-dev/remuda/client"
	"github.com/remuda-dev/remuda/internal/config"
	"github.com/remuda-dev/remuda/internal/logs"
	"github.com/remuda-dev/remuda/proc"
	"github.com/remuda-dev/remuda/supervise"
)

// instance is one slot of an app: the child its supervisor runs again and
// again. It implements [supervise.Child].
type instance struct {
	d       *Daemon
	id      int
	app     string
	index   int
	alone   bool
	created time.Time
	name    string // of the child: app:index
	sup     *supervise.Supervisor

	mu         sync.Mutex
	spec       config.App
	gen        int            // of the spec
	want       bool           // it shall run
	asked      bool           // … and its supervisor has not been told yet
	run        *run           // the latest that counted, nil before the first
	runs       []*run         // those that are not over, at most two
	slots      [2]bool        // which of the keys are taken, see key
	candidate  *candidate     // what a run that is started beside another is to be
	trialErr   []string       // last lines of such a one that failed
	ended      []proc.Process // runs whose end is not on record yet: the keeper holds them till then
	lastErr    []string
	logTrouble string
	logLost    int64
	signalOnce string // stop signal for the next stop only
	told       string // the last state that was announced
	toldPID    int
}

// takeSlot takes a key for a run. Caller holds i.mu.
func (i *instance) takeSlot() int {
	slot := 0
	if i.slots[0] {
		slot = 1
	}
	i.slots[slot] = true
	return slot
}

// key is what the keeper knows a run by, and the name of its cgroup. There are
// two, for the two runs of a replacement.
func (i *instance) key(slot int) string {
	name := strings.Map(func(r rune) rune {
		if r < 0x80 && (r == '.' || r == '-' || r == '_' || '0' <= r && r <= '9' || 'a' <= r && r <= 'z' || 'A' <= r && r <= 'Z') {
			return r
		}
		return '_'
	}, i.app)
	key := fmt.Sprintf("%d-%.60s", i.id, strings.TrimLeft(name, "."))
	if slot > 0 {
		key += secondKey
	}
	return key
}

const secondKey = ".2"

func (i *instance) trouble(text string) {
	i.mu.Lock()
	i.logTrouble = text
	i.mu.Unlock()
}

// onTrouble takes what the logs report.
func (i *instance) onTrouble(t logs.Trouble) {
	i.mu.Lock()
	before := i.logTrouble
	i.logTrouble = ""
	if t.Err != nil {
		i.logTrouble = t.Err.Error()
	}
	i.logLost = max(i.logLost, t.Lost)
	i.mu.Unlock()
	if typ, text := troubleEvent(before, t); typ != "" {
		i.d.event(i, typ, 0, text)
	}
}

// troubleEvent is the event that is to be told where the trouble before is
// followed by t; "" for none.
func troubleEvent(before string, t logs.Trouble) (typ, text string) {
	switch {
	case t.Err != nil && before == "":
		return "log.trouble", fmt.Sprintf("%s: %v", t.Path, t.Err)
	case t.Err == nil && before != "":
		return "log.recovered", fmt.Sprintf("%s can be written again; %d bytes were lost", t.Path, t.Lost)
	}
	return "", ""
}

// child is the instance as its supervisor sees it.
func (i *instance) child() supervise.Spec {
	i.mu.Lock()
	a := i.spec
	i.mu.Unlock()
	s := supervise.Spec{
		Name: i.name, Group: i.app, Child: i,
		StopCodes:   a.Restart.StopExitCodes,
		MinUptime:   orNegative(a.Restart.MinUptime.Std()),
		MaxRestarts: a.Restart.MaxRestarts,
		Window:      a.Restart.Window.Std(),
		Delay:       a.Restart.Delay.Std(),
		Backoff:     supervise.Backoff{Initial: a.Restart.BackoffInitial.Std(), Max: a.Restart.BackoffMax.Std()},
		Grace:       orNegative(a.Stop.Grace.Std()),
	}
	if s.MaxRestarts == 0 { // none at all: the first end that calls for one is the last
		s.MaxRestarts, s.Window = 1, 0
	}
	if a.Clustered() {
		s.Grace = max(s.Grace, 0) + drainWait
	}
	switch a.Restart.Policy {
	case "on-failure":
		s.Restart = supervise.OnFailure
	case "never":
		s.Restart = supervise.Never
	}
	return s
}

// orNegative keeps a zero that was asked for from meaning the default.
func orNegative(d time.Duration) time.Duration {
	if d == 0 {
		return -1
	}
	return d
}

// status is the instance as the API shows it, less what it uses.
func (i *instance) status() client.Instance {
	st, _ := i.sup.Status(i.name)
	i.mu.Lock()
	defer i.mu.Unlock()
	a := &i.spec
	out := client.Instance{
		ID: i.id, App: i.app, Namespace: a.Namespace, Index: i.index,
		State: client.State(st.State), Since: st.Since, Created: i.created,
		Restarts: st.Restarts, Unstable: st.Unstable,
		LastExit: exitOf(st.LastExit), Reason: st.Reason,
		LogTrouble: i.logTrouble, LogLost: i.logLost,
		User: a.User, Watching: a.Watch != nil, ExecMode: a.ExecMode,
		Version: i.d.versions.of(a),
	}
	if !st.NextStart.IsZero() {
		out.NextStart = &st.NextStart
	}
	if st.State == "" {
		out.State = client.Stopped
	}
	if out.User == "" {
		out.User = i.d.user
	}
	if st.State == supervise.StateErrored || st.State == supervise.StateBackoff || st.LastExit != nil && st.LastExit.Failed {
		out.LastErr = i.lastErr
	}
	if r, ok := st.Run.(*run); ok && r != nil {
		out.PID = r.proc.ID().PID
	}
	out.OutPath, out.ErrPath = i.logPaths(*a)
	return out
}

// record is what must be remembered of the instance.
func (i *instance) record() instanceState {
	st, _ := i.sup.Status(i.name)
	i.mu.Lock()
	defer i.mu.Unlock()
	s := instanceState{ID: i.id, Index: i.index, Run: i.want, Alone: i.alone, Created: i.created, Restarts: st.Restarts, Gen: i.gen}
	s.LastExit = exitOf(st.LastExit)
	// What is at rest but was asked to start would otherwise be taken, after a
	// crash, for a program that has done its work.
	if st.Run == nil && !i.asked && (st.State == supervise.StateErrored || st.State == supervise.StateStopped) {
		s.State, s.Reason, s.LastErr = client.State(st.State), st.Reason, i.lastErr
	}
	return s
}

// changed is told every change of the instance's state.
func (i *instance) changed(st supervise.Status) {
	if st.Removed {
		return
	}
	text := string(st.State)
	if st.Reason != "" {
		text += ": " + st.Reason
	}
	pid := 0
	if r, ok := st.Run.(*run); ok && r != nil {
		pid = r.proc.ID().PID
	}
	i.mu.Lock()
	news := text != i.told || pid != 0 && st.State != supervise.StateStarting && pid != i.toldPID
	i.told, i.toldPID = text, pid
	if r, ok := st.Run.(*run); ok && r != nil && (i.run == nil || i.run.began.Before(r.began)) {
		i.run = r // it has taken the other's place
	}
	i.mu.Unlock()
	if news {
		i.d.event(i, "app."+string(st.State), pid, text)
	}
	if st.Run != nil || st.State != supervise.StateErrored && st.State != supervise.StateStopped {
		return
	}
	if now, ok := i.sup.Status(i.name); !ok || now.State != st.State {
		return // by now it runs again, and that run's end is not this one's
	}
	go i.d.clusters.rest(i.app)
	go i.d.sockets.tidy(i.app)
	// It ended for good: that goes on record, then the keeper may forget it.
	i.mu.Lock()
	if i.asked { // record would leave it out; begin comes back to it
		i.mu.Unlock()
		return
	}
	ended := i.ended
	i.ended = nil
	i.mu.Unlock()
	if len(ended) == 0 && st.State != supervise.StateErrored {
		return
	}
	saved := i.d.store.touch()
	go func() {
		<-saved
		if i.d.store.failed() != nil { // the keeper goes on remembering it
			i.mu.Lock()
			i.ended = append(ended, i.ended...)
			i.mu.Unlock()
			return
		}
		release(ended)
	}()
}

func (d *Daemon) event(i *instance, typ string, pid int, text string) {
	e := client.Event{Type: typ, ID: -1, PID: pid, Text: text}
	if i != nil {
		e.App, e.ID = i.app, i.id
	}
	d.bus.publish(e)
	d.quiet.Reset(quietFor)
}

// packageVersions remembers the version in the package.json beside a script.
// It is safe for concurrent use.
type packageVersions struct {
	mu sync.Mutex
	m  map[string]string
}

func (v *packageVersions) of(a *config.App) string {
	v.mu.Lock()
	defer v.mu.Unlock()
	return v.m[a.Name]
}

func (v *packageVersions) drop(name string) {
	v.mu.Lock()
	defer v.mu.Unlock()
	delete(v.m, name)
}

func (v *packageVersions) look(a config.App) {
	version := packageVersion(a.Cwd, a.Script)
	v.mu.Lock()
	defer v.mu.Unlock()
	if v.m == nil {
		v.m = map[string]string{}
	}
	if version == "" {
		delete(v.m, a.Name)
		return
	}
	v.m[a.Name] = version
}

func idOf(target string) (int, bool) {
	n, err := strconv.Atoi(target)
	return n, err == nil && n >= 0
}

// currentUser is the name of the user the daemon runs as, or its number.
func currentUser() string {
	if u, err := user.LookupId(strconv.Itoa(os.Geteuid())); err == nil {
		return u.Username
	}
	return strconv.Itoa(os.Geteuid())
}
