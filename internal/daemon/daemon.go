// Package daemon is the controller: the composition root that brings
// supervision, logs, probes, state and the API together.
//
// Invariant: the controller may be killed at any instant. What shall run is on
// the disk before a caller is told that it will; how a run ended is on the
// disk, or in the label of the run after it, before the keeper forgets it; so
// the next controller loses nothing and starts nothing twice.
//
// It must never fork (the keeper does), nor serve anything but through package
// api.
package daemon

import (
	"cmp"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"hash/fnv"
	"log/slog"
	"maps"
	"net"
	"net/http"
	"os"
	"os/signal"
	"path/filepath"
	"runtime/debug"
	"slices"
	"strings"
	"sync"
	"sync/atomic"
	"syscall"
	"time"

	"github.com/remuda-dev/remuda/client"
	"github.com/remuda-dev/remuda/internal/api"
	"github.com/remuda-dev/remuda/internal/config"
	"github.com/remuda-dev/remuda/internal/keeper"
	"github.com/remuda-dev/remuda/internal/logs"
	"github.com/remuda-dev/remuda/internal/monitor"
	"github.com/remuda-dev/remuda/internal/nodeipc"
	"github.com/remuda-dev/remuda/internal/probe"
	"github.com/remuda-dev/remuda/proc"
	"github.com/remuda-dev/remuda/supervise"
)

// Options of a controller and of its keeper.
type Options struct {
	Home    string // absolute
	Binary  string // this program, absolute
	Version string
	Log     *slog.Logger
}

// Daemon is the controller. Its exported methods are what the API serves; they
// are safe for concurrent use.
type Daemon struct {
	home, binary, version, user string
	log                         *slog.Logger
	started                     time.Time
	inventory                   inventoryFacts
	hardMemory                  bool // the kernel can limit a run's memory
	notifyPath                  string

	keeper   *keeper.Client
	logs     *logs.Manager
	hub      *nodeipc.Hub
	bus      *bus
	store    *store
	sampler  *sampler
	versions *packageVersions
	timers   *timers
	clusters *clusters
	sockets  *activation
	quiet    *time.Timer     // gives memory back when nothing has happened for a while
	gone     <-chan struct{} // closed when the keeper is gone

	// act serialises what changes the set of apps; supervision needs no lock.
	act sync.Mutex

	mu        sync.Mutex
	apps      map[string]*app
	order     []string // of apps, as they were added
	instances map[int]*instance
	nextID    int
	pools     map[string]*managedPool // nil as long as there are none
	poolOrder []string
	groups    []config.Group
	sups      map[string]*supervise.Supervisor // by group, "" is the root
	warnings  []string

	strays   atomic.Int32  // sd_notify messages that fit nothing yet
	ending   atomic.Bool   // the daemon was asked to end with everything
	frozen   atomic.Bool   // what shall run is not to change any more
	halt     chan struct{} // closed when pools start nothing any more
	haltOnce sync.Once
	quit     chan struct{} // closed when the controller shall end and leave the rest as it is
	quitOnce sync.Once
}

type inventoryFacts struct {
	keeperPID int
	started   time.Time
	restarts  int
	cgroup    string
}

type app struct {
	spec      config.App
	gen       int         // of spec, grows with each one that calls for new runs
	lastGen   int         // the highest that was given
	next      *candidate  // what spec is to be when a roll has gone well, see roll.go
	rolling   bool        // its instances are being replaced
	instances []*instance // as they were added
}

// Tag names a home folder in cgroups and environments.
func Tag(home string) string { return hashed(home) }

// hashed is s in 16 characters that fit into any name.
func hashed(s string) string {
	h := fnv.New64a()
	_, _ = h.Write([]byte(s))
	return fmt.Sprintf("%016x", h.Sum64())
}

// RunKeeper is the keeper process of a home folder. It returns when the daemon
// has ended.
func RunKeeper(ctx context.Context, o Options) error {
	if err := os.MkdirAll(filepath.Join(o.Home, "logs"), 0o700); err != nil {
		return fmt.Errorf("cannot make the daemon's folder: %w", err)
	}
	l, err := inheritedLock()
	if err != nil {
		return err
	}
	if l == nil {
		if l, err = lock(filepath.Join(o.Home, "keeper.lock"), 5*time.Second); err != nil {
			return err
		}
	}
	defer l.Close()
	n, err := lockName(Tag(o.Home), o.Home, 5*time.Second)
	if err != nil {
		return err
	}
	defer n.Close()
	return keeper.Run(ctx, keeper.Options{
		Controller: keeper.Command{Path: o.Binary, Args: []string{o.Binary, "controller", "--home", o.Home}},
		Tag:        Tag(o.Home),
	})
}

// RunController is the controller process. It returns when it was told to end,
// be it alone (upgrade) or with everything (kill).
func RunController(ctx context.Context, o Options, keeperFD int) error {
	// What was supervised must not outlive this process in the page tables
	// only because the collector is lazy: the daemon is judged by its size.
	debug.SetGCPercent(50)
	l, err := lock(filepath.Join(o.Home, "controller.lock"), 5*time.Second)
	if err != nil {
		return err
	}
	defer l.Close()
	client, inventory, err := keeper.Connect(ctx, keeperFD)
	if err != nil {
		return fmt.Errorf("cannot reach the keeper: %w", err)
	}
	d, err := newDaemon(o, client, inventory)
	if err != nil {
		// Trying again would change nothing. Where programs live the keeper
		// refuses: they are not to be harmed by a file that cannot be read.
		_ = client.Shutdown(ctx, false)
		return err
	}
	return d.serve(ctx)
}

func newDaemon(o Options, k *keeper.Client, inv *keeper.Inventory) (*Daemon, error) {
	st, warning, err := loadState(filepath.Join(o.Home, "state.json"))
	if err != nil {
		return nil, err
	}
	d := &Daemon{
		home: o.Home, binary: o.Binary, version: o.Version, user: currentUser(), log: o.Log, started: time.Now(),
		inventory: inventoryFacts{keeperPID: inv.Keeper.PID, started: inv.Started, restarts: inv.Restarts, cgroup: inv.Cgroup},
		keeper:    k, gone: k.Done(), bus: newBus(), versions: &packageVersions{},
		apps: map[string]*app{}, instances: map[int]*instance{}, nextID: st.NextID, sups: map[string]*supervise.Supervisor{},
		quiet: time.AfterFunc(quietFor, keeper.GiveBack),
		halt:  make(chan struct{}),
		quit:  make(chan struct{}), notifyPath: "@remuda-" + Tag(o.Home),
	}
	d.hardMemory = inv.Memory != "" && !strings.HasPrefix(inv.Memory, "none")
	for _, w := range []string{warning, inv.Notice} {
		if w != "" {
			d.warnings = append(d.warnings, w)
			d.log.Warn(w)
		}
	}
	if d.sampler, err = newSampler(k); err != nil {
		return nil, err
	}
	if d.hub, err = nodeipc.NewHub(); err != nil {
		return nil, err
	}
	if d.logs, err = logs.New(logs.Options{OnTrouble: d.onTrouble, Relay: d.relay, Unrelay: d.unrelay}); err != nil {
		return nil, err
	}
	d.store = newStore(filepath.Join(o.Home, "state.json"), d.snapshot, d.over)
	d.timers = newTimers(d)
	d.clusters = &clusters{d: d}
	d.sockets = &activation{d: d}
	d.sups[""] = supervise.New(supervise.Options{OnChange: d.changed})
	d.restore(st, inv)
	d.logs.Settle()
	return d, nil
}

// serve opens the API and waits for the end.
func (d *Daemon) serve(ctx context.Context) error {
	signals := make(chan os.Signal, 4)
	signal.Notify(signals, syscall.SIGTERM, syscall.SIGINT, syscall.SIGHUP, syscall.SIGPIPE)
	notifier, err := probe.Listen(probe.NotifyOptions{Path: d.notifyPath, OnMessage: d.notified})
	if err != nil {
		d.log.Warn("sd_notify readiness is not to be had", "error", err)
	} else {
		defer notifier.Close()
	}
	l, err := api.Listen(client.SocketPath(d.home))
	if err != nil {
		return err
	}
	// Streams end with it, so that a follower does not hold up the end.
	streams, endStreams := context.WithCancel(ctx)
	defer endStreams()
	srv := &http.Server{
		Handler:           d.noticing(api.Handler(d, d.version)),
		BaseContext:       func(net.Listener) context.Context { return streams },
		ReadHeaderTimeout: 10 * time.Second,
		IdleTimeout:       time.Minute,
		MaxHeaderBytes:    64 << 10,
		ErrorLog:          slog.NewLogLogger(d.log.Handler(), slog.LevelError),
	}
	served := make(chan error, 1)
	count := len(d.instances) // from here on it is shared
	go func() { served <- srv.Serve(l) }()
	if err := d.keeper.Ready(ctx, fmt.Sprintf("%d instances", count)); err != nil {
		d.log.Warn("the keeper was not told that the controller is ready", "error", err)
	}
	d.event(nil, "daemon.started", os.Getpid(), fmt.Sprintf("controller %d of keeper %d", os.Getpid(), d.inventory.keeperPID))
	d.log.Info("controller ready", "pid", os.Getpid(), "instances", count, "took", time.Since(d.started).Round(time.Microsecond))
	d.quiet.Reset(quietFor)
	d.resumeRolls()
	for {
		select {
		case err := <-served:
			return fmt.Errorf("the API cannot be served: %w", err)
		case <-d.gone:
			l.Close()
			if d.ending.Load() {
				endStreams()
				return d.afterEnd(ctx, srv)
			}
			return d.afterKeeper()
		case <-d.quit:
			d.endPools(leaveMost) // their callers get their answers while there is an API
			endStreams()
			return d.leave(srv)
		case s := <-signals:
			if s == syscall.SIGTERM || s == syscall.SIGINT {
				d.log.Info("asked to end", "signal", s.String())
				go d.endAll(context.Background(), false)
			}
		}
	}
}

// leave ends this controller and leaves every run to the next one.
func (d *Daemon) leave(srv *http.Server) error {
	ctx, cancel := context.WithTimeout(context.Background(), 2*time.Second)
	defer cancel()
	_ = srv.Shutdown(ctx) // lets the answer to the call that ended us go out
	d.timers.stop()
	d.detach(ctx)
	d.clusters.end(true)
	d.sockets.end(true)
	_ = d.logs.Close(ctx)
	return nil
}

// detach ends supervision and leaves what runs alone.
func (d *Daemon) detach(ctx context.Context) {
	d.mu.Lock()
	sups := slices.Collect(maps.Values(d.sups))
	d.mu.Unlock()
	for _, s := range sups {
		if _, err := s.Detach(ctx); err != nil {
			d.log.Warn("letting go of the runs", "error", err)
		}
	}
}

// over says that what stops now does so only because the daemon ends: the state
// file stays as it is.
func (d *Daemon) over() bool {
	select {
	case <-d.gone:
		return true
	default:
		return d.frozen.Load()
	}
}

// afterEnd is what becomes of a daemon that was asked to end when its keeper is
// gone: as a rule that has just been told to.
func (d *Daemon) afterEnd(ctx context.Context, srv *http.Server) error {
	select {
	case <-d.quit:
	case <-time.After(time.Second):
		if _, err := proc.Sweep(ctx, Tag(d.home)); err != nil {
			d.log.Error("the keeper is gone and its processes cannot be ended", "error", err)
		}
	}
	return d.leave(srv)
}

// afterKeeper is what becomes of everything when the keeper was killed: no one
// can wait for its children any more, so they are ended, and a new keeper
// starts again what shall run. Nothing runs twice.
func (d *Daemon) afterKeeper() error {
	d.log.Error("the keeper is gone: its processes are ended and started anew")
	d.timers.stop()
	// Its lock is ours from now on, so that no other daemon comes up meanwhile
	// and commands see that one is coming.
	l, err := lock(filepath.Join(d.home, "keeper.lock"), time.Second)
	if err != nil {
		return fmt.Errorf("the keeper is gone, and another has come: %w", err)
	}
	defer l.Close()
	ctx, cancel := context.WithTimeout(context.Background(), 30*time.Second)
	defer cancel()
	d.detach(ctx) // starts under way fail at once, as there is no keeper
	if _, err := proc.Sweep(ctx, Tag(d.home)); err != nil {
		return fmt.Errorf("the keeper is gone and its processes cannot be ended: %w", err)
	}
	if os.Getenv("NOTIFY_SOCKET") != "" || os.Getenv("INVOCATION_ID") != "" {
		return errors.New("the keeper is gone; the service manager will start the daemon again")
	}
	if err := bequeath(l); err != nil {
		return err
	}
	args := []string{d.binary, "keeper", "--home", d.home}
	return fmt.Errorf("cannot start a new keeper: %w", syscall.Exec(d.binary, args, os.Environ()))
}

// endAll stops everything and ends the keeper with it. With forget nothing is
// started again by the next daemon.
func (d *Daemon) endAll(ctx context.Context, forget bool) {
	d.act.Lock() // for good
	d.ending.Store(true)
	if !forget {
		d.saveOrWarn()
		d.frozen.Store(true)
	}
	_ = d.keeper.Stopping(ctx)
	d.timers.stop()
	if forget {
		d.mu.Lock()
		for _, i := range d.instances {
			i.mu.Lock()
			i.want = false
			i.mu.Unlock()
		}
		for _, p := range d.pools {
			p.want = false
		}
		d.mu.Unlock()
		if err := d.store.save(); err != nil {
			d.log.Error("state", "error", err)
		}
	}
	ctx, cancel := context.WithTimeout(ctx, time.Minute)
	defer cancel()
	d.endPools(0)
	if err := d.supervisorOf("").Shutdown(ctx); err != nil { // its groups with it
		d.log.Warn("stopping everything", "error", err)
	}
	d.mu.Lock()
	if forget {
		d.apps, d.instances, d.order, d.nextID, d.groups = map[string]*app{}, map[int]*instance{}, nil, 0, nil
		d.pools, d.poolOrder = nil, nil
	}
	d.mu.Unlock()
	if forget {
		if err := d.store.save(); err != nil {
			d.log.Error("state", "error", err)
		}
	}
	d.clusters.end(false)
	d.sockets.end(false)
	if err := d.keeper.Shutdown(ctx, true); err != nil {
		d.log.Warn("ending the keeper", "error", err)
	}
	d.quitOnce.Do(func() { close(d.quit) })
}

// restore brings back what shall run, joined with what does.
func (d *Daemon) restore(st state, inv *keeper.Inventory) {
	running := map[int][]adoptee{}
	var workers []adoptee
	for _, a := range inv.Processes {
		var l label
		if err := json.Unmarshal(a.Label(), &l); err != nil {
			d.log.Error("a run without a readable label is ended", "key", a.Key(), "error", err)
			l.ID = -1
		}
		if l.Pool {
			workers = append(workers, adoptee{Adopted: a, label: l})
			continue
		}
		running[l.ID] = append(running[l.ID], adoptee{Adopted: a, label: l})
	}
	relays := map[string]*os.File{}
	for _, s := range inv.Stored {
		relays[s.Name] = s.File
	}
	d.clusters.inherit(relays)
	d.sockets.inherit(relays)
	d.restorePools(st.Pools, workers, relays)
	d.addGroups(st.Groups)
	type pair struct {
		i *instance
		s instanceState
	}
	var all []pair
	d.mu.Lock() // for the reports of the groups
	for _, as := range st.Apps {
		a := &app{spec: as.Spec, gen: as.Gen, lastGen: max(as.Gen, as.LastGen)}
		if as.Next != nil {
			a.next = &candidate{*as.Next, a.lastGen}
		}
		d.apps[as.Spec.Name] = a
		d.order = append(d.order, as.Spec.Name)
		d.versions.look(as.Spec)
		for _, is := range as.Instances {
			i := d.newInstance(a, is.ID, is.Index)
			i.alone, i.created, i.want, i.lastErr = is.Alone, is.Created, is.Run, is.LastErr
			if c := a.next; c != nil && is.Gen == c.gen {
				i.spec, i.gen = c.spec, c.gen
			}
			d.nextID = max(d.nextID, is.ID+1)
			all = append(all, pair{i, is})
		}
	}
	d.mu.Unlock()
	for _, p := range all {
		adoption, older := d.adopt(p.i, p.s, running[p.i.id], relays)
		spec := p.i.child()
		spec.DependsOn = d.dependencies(p.i.spec)
		spec.Adopt = adoption
		delete(running, p.i.id)
		err := p.i.sup.Add(spec, p.i.want)
		if err == nil && older && p.i.want {
			// The controller before was killed between saving the spec and
			// the restart that was to follow.
			err = p.i.sup.Restart("up", p.i.name)
		}
		if err != nil {
			d.warnings = append(d.warnings, err.Error())
			d.log.Error("cannot supervise", "instance", p.i.name, "error", err)
			if p.i.run != nil { // nobody could stop it later on
				p.i.run.Kill("cannot be supervised")
			}
		}
	}
	d.clusters.settle(d.apps)
	d.sockets.settle(d.apps)
	for name, f := range relays { // of runs that are gone
		f.Close()
		_ = d.keeper.Drop(context.Background(), name)
	}
	for _, list := range running { // of instances that were deleted
		for _, a := range list {
			go endStranger(a)
		}
	}
	for _, name := range d.order {
		d.timers.set(d.apps[name].spec)
	}
}

type adoptee struct {
	keeper.Adopted
	label label
}

func (a adoptee) ended() bool {
	select {
	case <-a.Done():
		return true
	default:
		return false
	}
}

func (a adoptee) close() {
	for _, f := range a.Files {
		f.Close()
	}
}

func endStranger(a adoptee) {
	a.close()
	ctx, cancel := context.WithTimeout(context.Background(), leftoverWait)
	defer cancel()
	_ = a.KillTree(ctx)
	<-a.Done()
	_ = a.Release()
}

// adopt makes what the supervisor must know of an instance that lived before
// this controller: its latest run where the keeper has one, else how it had
// ended. older says that the run is of an earlier spec than the app now has.
func (d *Daemon) adopt(i *instance, s instanceState, runs []adoptee, relays map[string]*os.File) (ad *supervise.Adoption, older bool) {
	ad = &supervise.Adoption{State: supervise.State(s.State), Reason: s.Reason, Restarts: s.Restarts}
	ad.LastExit = exitFrom(s.LastExit)
	if len(runs) == 0 {
		return ad, false
	}
	slices.SortFunc(runs, func(a, b adoptee) int { return cmp.Compare(a.label.Began, b.label.Began) })
	facts := make([]remains, len(runs))
	for n, a := range runs {
		facts[n] = remains{a.label.Trial, a.ended()}
	}
	at, other := sortOut(facts)
	for n, a := range runs {
		switch n {
		case at:
		case other:
			// Whichever of the two it is, it may be serving: it is stopped as
			// in the replacement that it is left of.
			r := d.takeOver(i, a, true, relays)
			go r.follow()
			ad.Beside = r
		default:
			go endStranger(a)
		}
	}
	last := runs[at]
	if last.ended() && s.State != "" && s.LastExit != nil && !s.LastExit.At.Before(last.Exit().At) {
		// What followed from its end is on record already; the controller
		// before had no more time to have the keeper forget it.
		go endStranger(last)
		return ad, false
	}
	if c := d.apps[i.app].next; c != nil && c.gen == last.label.Gen {
		i.spec, i.gen = c.spec, c.gen
	}
	r := d.takeOver(i, last, last.label.Ready, relays)
	i.run = r
	ad.Run, ad.Since = r, time.Unix(0, last.label.Began)
	if last.label.LastExit != nil {
		ad.LastExit = exitFrom(last.label.LastExit)
	}
	ad.Restarts, ad.Unstable = max(s.Restarts, last.label.Restarts), last.label.Unstable
	for _, ms := range last.label.Recent {
		ad.Recent = append(ad.Recent, time.UnixMilli(ms))
	}
	go r.follow()
	return ad, last.label.Gen != i.gen
}

// remains is what decides which of the runs of an instance counts.
type remains struct{ trial, ended bool }

// sortOut says which of the runs of an instance counts, given in the order they
// began: the latest, but for those that were started beside another and were
// not ready yet; of these only where the other has ended. other is a second one
// that lives, -1 where there is none.
func sortOut(runs []remains) (last, other int) {
	last, other = -1, -1
	trial := -1
	for n, r := range runs {
		switch {
		case !r.trial:
			last = n
		case !r.ended || trial < 0:
			trial = n
		}
	}
	if last < 0 || trial >= 0 && runs[last].ended && !runs[trial].ended {
		last = trial
	}
	for n, r := range runs {
		if n != last && !r.ended {
			other = n
		}
	}
	return last, other
}

// takeOver makes a run of what an earlier controller left, of the instance's
// spec or that of its app.
func (d *Daemon) takeOver(i *instance, a adoptee, ready bool, relays map[string]*os.File) *run {
	as := origin{inst: i, spec: i.spec, gen: a.label.Gen, began: time.Unix(0, a.label.Began), cluster: a.label.Cluster}
	if strings.HasSuffix(a.Key(), secondKey) {
		as.slot = 1
	}
	if of := d.apps[i.app]; of.gen == as.gen {
		as.spec = of.spec
	}
	r := newRun(as, a.Process, ready)
	kept := descriptors{out: a.Files[keptOut], err: a.Files[keptErr], ipc: a.Files[keptIPC], adopted: true}
	for stream, f := range map[string]struct{ pipe, relay **os.File }{logs.Out: {&kept.out, &kept.outRelay}, logs.Err: {&kept.err, &kept.errRelay}} {
		name := relayName(i.id, stream, pipeInode(*f.pipe))
		*f.relay = relays[name]
		delete(relays, name)
	}
	r.attach(kept)
	i.runs = append(i.runs, r)
	i.slots[as.slot] = true
	return r
}

// exitFrom turns round exitOf.
func exitFrom(e *client.Exit) *supervise.Exit {
	if e == nil {
		return nil
	}
	return &supervise.Exit{Code: e.Code, Signal: e.Signal, Cause: e.Cause, Err: e.Error, At: e.At, Failed: e.Code != 0 || e.Signal != ""}
}

func (d *Daemon) newInstance(a *app, id, index int) *instance {
	i := &instance{d: d, id: id, app: a.spec.Name, index: index, created: time.Now(), name: fmt.Sprintf("%s:%d", a.spec.Name, index), spec: a.spec, gen: a.gen}
	i.sup = d.sups[a.spec.Strategy]
	if i.sup == nil {
		i.sup = d.sups[""]
	}
	a.instances = append(a.instances, i)
	d.instances[id] = i
	return i
}

// changed is told every change of every child.
func (d *Daemon) changed(st supervise.Status) {
	d.mu.Lock()
	var found *instance
	if a := d.apps[st.Group]; a != nil {
		for _, i := range a.instances {
			if i.name == st.Name {
				found = i
			}
		}
	}
	d.mu.Unlock()
	if found != nil {
		found.changed(st)
	}
}

func (d *Daemon) onTrouble(t logs.Trouble) {
	d.mu.Lock()
	i := d.instances[t.Source.ID]
	d.mu.Unlock()
	if i != nil {
		i.onTrouble(t)
	} else if p := d.poolByID(t.Source.ID); p != nil {
		p.onTrouble(t)
	}
}

// notified takes an sd_notify message of a program. It may come before the
// keeper's answer that the program was started has been dealt with, so one that
// fits nothing is looked at a few times more.
func (d *Daemon) notified(m probe.Message) {
	if m.Fields["READY"] != "1" || d.toldReady(m.PID) {
		return
	}
	if d.strays.Add(1) > maxStrays {
		d.strays.Add(-1)
		return
	}
	go func() {
		defer d.strays.Add(-1)
		for range 10 {
			time.Sleep(100 * time.Millisecond)
			if d.toldReady(m.PID) {
				return
			}
		}
	}()
}

// maxStrays bounds how many messages that fit nothing are held at a time.
const maxStrays = 100

// toldReady passes word on to whoever's run the process is in.
func (d *Daemon) toldReady(pid int) bool {
	d.mu.Lock()
	var waiting []*run
	for _, i := range d.instances {
		i.mu.Lock()
		for _, r := range i.runs {
			if r.notifyReady != nil {
				waiting = append(waiting, r)
			}
		}
		i.mu.Unlock()
	}
	d.mu.Unlock()
	for _, r := range waiting {
		if r.proc.ID().PID == pid {
			tell(r.notifyReady)
			return true
		}
	}
	for _, r := range waiting {
		if pids, err := r.proc.Members(); err == nil && slices.Contains(pids, pid) {
			tell(r.notifyReady)
			return true
		}
	}
	return false
}

// snapshot is the state as it is to be written.
func (d *Daemon) snapshot() state {
	d.mu.Lock()
	defer d.mu.Unlock()
	st := state{Version: stateVersion, NextID: d.nextID, Groups: d.groups}
	for _, name := range d.order {
		a := d.apps[name]
		as := appState{Spec: a.spec, Gen: a.gen, LastGen: a.lastGen}
		if a.next != nil {
			as.Next = &a.next.spec
		}
		for _, i := range a.instances {
			as.Instances = append(as.Instances, i.record())
		}
		st.Apps = append(st.Apps, as)
	}
	st.Pools = d.poolStates()
	return st
}

// sampler looks at what processes use, at most once in sampleEvery, so that
// many lists cost one look.
type sampler struct {
	s      *monitor.Sampler
	keeper *keeper.Client

	mu   sync.Mutex
	at   time.Time
	last map[int]monitor.Usage
}

const sampleEvery = 200 * time.Millisecond

func newSampler(k *keeper.Client) (*sampler, error) {
	s, err := monitor.NewSampler()
	if err != nil {
		return nil, err
	}
	return &sampler{s: s, keeper: k}, nil
}

func (s *sampler) usage(instances []*instance, pools []*managedPool) map[int]monitor.Usage {
	s.mu.Lock()
	defer s.mu.Unlock()
	if time.Since(s.at) < sampleEvery {
		return s.last
	}
	members, _ := s.keeper.AllMembers(context.Background()) // without: the leaders alone
	groups := make(map[int][]int, len(instances))
	for _, i := range instances {
		i.mu.Lock()
		r := i.run
		i.mu.Unlock()
		if r == nil {
			continue
		}
		select {
		case <-r.proc.Done():
			continue
		default:
		}
		leader := r.proc.ID().PID
		groups[i.id] = []int{leader}
		if pids := members[leader]; len(pids) > 0 {
			groups[i.id] = pids
		}
	}
	for _, p := range pools {
		for _, leader := range p.pids() {
			groups[p.id] = append(groups[p.id], leader)
			for _, pid := range members[leader] {
				if pid != leader {
					groups[p.id] = append(groups[p.id], pid)
				}
			}
		}
	}
	s.last, s.at = s.s.Sample(groups), time.Now()
	return s.last
}
