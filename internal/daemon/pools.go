package daemon

import (
	"cmp"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"maps"
	"net/http"
	"os"
	"reflect"
	"slices"
	"strconv"
	"strings"
	"sync"
	"syscall"
	"time"

	"golang.org/x/sys/unix"

	"github.com/remuda-dev/remuda/client"
	"github.com/remuda-dev/remuda/internal/config"
	"github.com/remuda-dev/remuda/internal/logs"
	"github.com/remuda-dev/remuda/ipc"
	"github.com/remuda-dev/remuda/pool"
	"github.com/remuda-dev/remuda/proc"
)

const (
	// maxPools bounds what one daemon keeps.
	maxPools = 1000
	// upEvery is how often a pool whose workers were just started is looked at;
	// only then.
	upEvery = 10 * time.Millisecond
	// upSteady is how long workers that give no sign when they are ready must
	// not have ended to be believed to be well, and failedStarts how many ends
	// without a task done are enough for the contrary.
	upSteady     = 200 * time.Millisecond
	failedStarts = 3
	// leaveMost is how long a controller that makes way for another has for the
	// tasks that its pools have.
	leaveMost = 5 * time.Second
)

// managedPool is a pool as it shall be, and its workers as they are: one life
// of them after the other. Tasks are in the memory of the controller; whoever
// asked for one is told when that dies. Its workers are then cleared away by the
// next controller, and started anew.
type managedPool struct {
	d       *Daemon
	id      int
	name    string
	created time.Time

	// Guarded by Daemon.mu.
	spec config.Pool
	want bool // it shall run
	gone bool // it is being deleted

	// op is held by who brings the workers in line with the above.
	op sync.Mutex

	mu       sync.Mutex
	life     *poolLife              // nil: none
	draining map[*poolLife]struct{} // lives that only finish what they have
	begun    chan struct{}          // closed when a life has come about, or will not; nil: none is about to
	reason   string                 // why there is none
	before   leftovers              // of the controller before

	logTrouble string
}

// leftovers are what workers of an earlier controller have left.
type leftovers struct {
	workers  []adoptee
	captures []*logs.Capture
	kept     []string // in the keeper
}

// poolLife is one set of workers with one spec.
type poolLife struct {
	mp       *managedPool
	spec     config.Pool
	began    time.Time
	pool     *pool.Pool
	spawner  *poolSpawner
	captures []*logs.Capture
	writers  []*os.File // ends of the pipes for the workers' output
	kept     []string   // of the other ends, in the keeper

	cut     context.Context // ends when what is left is no longer waited for
	cutNow  context.CancelFunc
	ended   chan struct{}
	endOnce sync.Once
}

// poolSpawner has the keeper start a pool's workers.
type poolSpawner struct {
	mp    *managedPool
	cred  *proc.Credential
	umask *int
	label []byte
	tell  bool // each start and end is an event

	mu    sync.Mutex
	procs map[proc.Process]struct{}
	last  string // failure that was told
}

var _ proc.Spawner = (*poolSpawner)(nil)

// Spawn implements [proc.Spawner].
func (s *poolSpawner) Spawn(ctx context.Context, spec proc.Spec) (proc.Process, error) {
	spec.Credential, spec.Umask, spec.Label = s.cred, s.umask, s.label
	p, err := s.mp.d.keeper.Spawn(ctx, spec)
	text := ""
	if err != nil {
		text = err.Error()
	}
	s.mu.Lock()
	news := text != s.last
	s.last = text
	if err == nil {
		s.procs[p] = struct{}{}
	}
	s.mu.Unlock()
	if err != nil {
		if news && ctx.Err() == nil {
			s.mp.event("pool.start-failed", 0, text)
		}
		return nil, err
	}
	go s.follow(p)
	return p, nil
}

// follow tells of a worker that ends as none should.
func (s *poolSpawner) follow(p proc.Process) {
	<-p.Done()
	s.mu.Lock()
	delete(s.procs, p)
	s.mu.Unlock()
	e := p.Exit()
	if s.tell && !e.Ok() && e.Signal != syscall.SIGTERM {
		s.mp.event("pool.worker-died", p.ID().PID, e.String())
	}
}

// signal sends a signal to the leaders of all workers.
func (s *poolSpawner) signal(sig syscall.Signal) error {
	s.mu.Lock()
	list := slices.Collect(maps.Keys(s.procs))
	s.mu.Unlock()
	if len(list) == 0 {
		return errors.New("no worker runs")
	}
	var errs []error
	for _, p := range list {
		if err := p.Signal(sig); err != nil && !errors.Is(err, os.ErrProcessDone) {
			errs = append(errs, err)
		}
	}
	return errors.Join(errs...)
}

func (s *poolSpawner) pids() []int {
	s.mu.Lock()
	defer s.mu.Unlock()
	out := make([]int, 0, len(s.procs))
	for p := range s.procs {
		out = append(out, p.ID().PID)
	}
	slices.Sort(out)
	return out
}

func (p *managedPool) event(typ string, pid int, text string) {
	p.d.bus.publish(client.Event{Type: typ, App: p.name, ID: p.id, PID: pid, Text: text})
	p.d.quiet.Reset(quietFor)
}

// options are the spec in the words of package pool, but for what is the
// daemon's.
func poolOptions(spec config.Pool) pool.Options {
	none := func(n int) int {
		if n == 0 {
			return -1
		}
		return n
	}
	span := func(d config.Duration) time.Duration { return orNegative(d.Std()) }
	o := pool.Options{
		Protocol: pool.Protocol(spec.Protocol), Min: spec.Min, Max: spec.Max, Dir: spec.Cwd,
		ScaleUpWait: span(spec.ScaleUpWait), ScaleDownIdle: max(spec.ScaleDownIdle.Std(), 1), Cooldown: span(spec.Cooldown),
		Spares: spec.Spares, Concurrency: spec.Concurrency, Queue: none(spec.Queue), Ageing: spec.Ageing.Std(),
		Timeout: spec.Timeout.Std(), Grace: span(spec.Grace), StartTimeout: spec.StartTimeout.Std(),
		Retries: none(spec.Retries), PoisonAfter: none(spec.PoisonAfter),
		MaxTasks: spec.MaxTasks, MaxAge: spec.MaxAge.Std(), MaxMemory: spec.MaxMemory, Heartbeat: spec.Heartbeat.Std(),
		MaxMessage: int(spec.MaxMessage),
	}
	switch spec.Balance {
	case "round-robin":
		o.Balance = pool.RoundRobin
	case "two-choices":
		o.Balance = pool.TwoChoices
	case "consistent-hash":
		o.Balance = pool.ConsistentHash
	}
	switch spec.Full {
	case "reject":
		o.Full = pool.Reject
	case "drop-lowest":
		o.Full = pool.DropLowest
	}
	if b := spec.Breaker; b != nil {
		o.Breaker = &pool.BreakerOptions{Failures: none(b.Failures), Rate: b.Rate, Window: b.Window.Std(), MinCalls: b.MinCalls, OpenFor: b.OpenFor.Std()}
	}
	if c := spec.Cache; c != nil {
		o.Cache = &pool.CacheOptions{TTL: span(c.TTL), MaxBytes: c.MaxBytes, MaxEntries: c.MaxEntries}
	}
	return o
}

// inShort is what package pool says, without its name.
func inShort(err error) string { return strings.TrimPrefix(err.Error(), "pool: ") }

// bounds are the least and the most workers in the words of [pool.Pool.Scale].
func bounds(spec config.Pool) (least, most int) {
	if spec.Protocol == string(pool.Exec) {
		return spec.Min * spec.Concurrency, spec.Max * spec.Concurrency
	}
	return spec.Min, spec.Max
}

// begin starts workers. It does not wait for them.
func (p *managedPool) begin(spec config.Pool) (_ *poolLife, err error) {
	app := spec.App()
	asInstance := &instance{d: p.d, id: p.id, app: p.name, alone: true}
	l := &poolLife{mp: p, spec: spec, began: time.Now(), ended: make(chan struct{})}
	l.cut, l.cutNow = context.WithCancel(context.Background())
	l.spawner = &poolSpawner{mp: p, tell: spec.Protocol != string(pool.Exec), procs: map[proc.Process]struct{}{}}
	defer func() {
		if err != nil {
			l.cutNow()
			l.close()
		}
	}()
	if l.spawner.cred, err = credential(app); err != nil {
		return nil, err
	}
	if l.spawner.umask, err = umask(app.Umask); err != nil {
		return nil, err
	}
	if l.spawner.label, err = json.Marshal(label{ID: p.id, Pool: true, App: p.name, Began: l.began.UnixNano()}); err != nil {
		return nil, err
	}
	o := poolOptions(spec)
	o.Name, o.Spawner = asInstance.key(0), l.spawner
	o.Name = o.Name[:min(len(o.Name), 60)] // as package pool wants it
	o.Env = asInstance.environment(app, l.spawner.cred)
	path, err := lookPath(spec.Command[0], o.Env, spec.Cwd)
	if err != nil {
		return nil, err
	}
	o.Command = append([]string{path}, spec.Command[1:]...)
	outTo, errTo := asInstance.targets(app)
	if o.Stdout, err = l.output(logs.Out, outTo); err != nil {
		return nil, err
	}
	if o.Stderr, err = l.output(logs.Err, errTo); err != nil {
		return nil, err
	}
	if l.pool, err = pool.New(o); err != nil {
		return nil, errors.New(inShort(err))
	}
	return l, nil
}

// output makes a pipe from all workers into a log. The keeper has a copy of
// its end, so that what workers say when this process dies is not lost.
func (l *poolLife) output(stream string, t logs.Target) (*os.File, error) {
	p := l.mp
	var fds [2]int
	if err := unix.Pipe2(fds[:], unix.O_CLOEXEC); err != nil {
		return nil, fmt.Errorf("cannot make a pipe for the output: %w", err)
	}
	r, w := os.NewFile(uintptr(fds[0]), stream), os.NewFile(uintptr(fds[1]), stream)
	l.writers = append(l.writers, w)
	name := fmt.Sprintf("pool-%d-%s-%d", p.id, stream, l.began.UnixNano())
	ctx, cancel := context.WithTimeout(context.Background(), keeperWait)
	defer cancel()
	if err := p.d.keeper.Put(ctx, name, nil, r); err == nil {
		l.kept = append(l.kept, name)
	}
	if c := p.capture(stream, r, nil, t, false); c != nil {
		l.captures = append(l.captures, c)
	}
	return w, nil
}

// capture takes output into a log, or discards it where it cannot be kept as
// asked, for workers must not block on their own words.
func (p *managedPool) capture(stream string, pipe, relay *os.File, t logs.Target, adopted bool) *logs.Capture {
	return p.d.capture(logs.Source{App: p.name, ID: p.id, Stream: stream}, pipe, relay, t, adopted, func(err error) {
		p.mu.Lock()
		p.logTrouble = err.Error()
		p.mu.Unlock()
		p.event("log.trouble", 0, fmt.Sprintf("std%s is discarded: %v", stream, err))
	})
}

// onTrouble takes what the logs report.
func (p *managedPool) onTrouble(t logs.Trouble) {
	text := ""
	if t.Err != nil {
		text = t.Err.Error()
	}
	p.mu.Lock()
	before := p.logTrouble
	p.logTrouble = text
	p.mu.Unlock()
	if typ, text := troubleEvent(before, t); typ != "" {
		p.event(typ, 0, text)
	}
}

// end ends the workers: what waits fails, what runs has until ctx ends. It
// returns when nothing is left of them.
func (l *poolLife) end(ctx context.Context) {
	l.endOnce.Do(func() {
		defer close(l.ended)
		if err := l.pool.Close(ctx); err != nil && ctx.Err() == nil {
			l.mp.d.log.Warn("ending the workers of a pool", "pool", l.mp.name, "error", err)
		}
		l.cutNow()
		l.close()
	})
	<-l.ended
}

// close lets go of the output.
func (l *poolLife) close() {
	closeAll(l.writers)
	ctx, cancel := context.WithTimeout(context.Background(), finishWait)
	defer cancel()
	finish(ctx, l.mp.d, l.captures, l.kept)
}

func finish(ctx context.Context, d *Daemon, captures []*logs.Capture, kept []string) {
	for _, c := range captures {
		_ = c.Finish(ctx) // told by OnTrouble
	}
	for _, name := range kept {
		_ = d.keeper.Drop(ctx, name)
	}
}

// drain has the workers finish what they have and ends them then, in the
// background.
func (p *managedPool) drain(l *poolLife) <-chan struct{} {
	p.mu.Lock()
	if p.draining == nil {
		p.draining = map[*poolLife]struct{}{}
	}
	p.draining[l] = struct{}{}
	p.mu.Unlock()
	go func() {
		_ = l.pool.Drain(l.cut) // cut short where it is no longer waited for
		ctx, cancel := context.WithTimeout(context.Background(), l.spec.Grace.Std())
		defer cancel()
		l.end(ctx)
		p.mu.Lock()
		delete(p.draining, l)
		p.mu.Unlock()
	}()
	return l.ended
}

// cutAll ends every life. With patience they have that long to do what they
// have; without, those that drain are cut short and the present one has the
// pool's grace for what runs.
func (p *managedPool) cutAll(patience time.Duration) {
	p.mu.Lock()
	l := p.life
	p.life = nil
	lives := slices.Collect(maps.Keys(p.draining))
	p.mu.Unlock()
	if patience > 0 {
		if l != nil {
			lives = append(lives, l)
			p.drain(l)
		}
		ctx, cancel := context.WithTimeout(context.Background(), patience)
		defer cancel()
		for _, x := range lives {
			select {
			case <-x.ended:
			case <-ctx.Done():
				x.cutNow()
				<-x.ended
			}
		}
		return
	}
	for _, x := range lives {
		x.cutNow()
	}
	if l != nil {
		ctx, cancel := context.WithTimeout(context.Background(), l.spec.Grace.Std())
		defer cancel()
		l.end(ctx)
	}
	for _, x := range lives {
		<-x.ended
	}
}

// about says that reconcile is about to be called, so that tasks wait for what
// comes of it.
func (p *managedPool) about() {
	p.mu.Lock()
	defer p.mu.Unlock()
	if p.life == nil && p.begun == nil {
		p.begun, p.reason = make(chan struct{}), ""
	}
}

// settled is the end of about.
func (p *managedPool) settled(l *poolLife, reason string) {
	p.mu.Lock()
	defer p.mu.Unlock()
	if l != nil {
		p.life = l
	}
	p.reason = reason
	if p.begun != nil {
		close(p.begun)
		p.begun = nil
	}
}

// reconcile brings the workers in line with what shall be and returns when at
// least one of them is ready, or with the reason why none is. Where the workers
// must be others, the new ones take over when they are ready and those before
// finish what they have; where none gets ready, those before go on and the spec
// is again the one before. renew wants other workers in any case.
func (p *managedPool) reconcile(ctx context.Context, renew bool) error {
	p.op.Lock()
	defer p.op.Unlock()
	p.clear()
	p.d.mu.Lock()
	spec, want := p.spec, p.want && !p.gone
	p.d.mu.Unlock()
	p.mu.Lock()
	old := p.life
	p.mu.Unlock()
	if p.d.halted() {
		p.settled(nil, "")
		return errEnding
	}
	if !want {
		p.settled(nil, "")
		p.cutAll(0)
		if old != nil {
			p.event("pool.stopped", 0, "stopped")
		}
		return nil
	}
	if old != nil && !renew {
		same := old.spec
		same.Min, same.Max, same.Autostart, same.Source, same.Namespace = spec.Min, spec.Max, spec.Autostart, spec.Source, spec.Namespace
		if reflect.DeepEqual(same, spec) {
			if old.spec.Min != spec.Min || old.spec.Max != spec.Max {
				if err := old.pool.Scale(bounds(spec)); err != nil {
					return errors.New(inShort(err))
				}
				p.event("pool.scaled", 0, sizeWords(spec.Min, spec.Max))
			}
			p.mu.Lock()
			old.spec = spec
			p.mu.Unlock()
			return p.up(ctx, old)
		}
	}
	l, err := p.begin(spec)
	if err == nil && old == nil {
		p.settled(l, "")
	}
	if err == nil {
		err = p.up(ctx, l)
	}
	switch {
	case err == nil && old == nil:
		p.event("pool.online", 0, "online: "+sizeWords(spec.Min, spec.Max))
		return nil
	case err == nil:
		p.settled(l, "")
		p.drain(old)
		p.event("pool.replaced", 0, "other workers have taken over; those before finish what they have")
		return nil
	case old == nil && l == nil:
		p.settled(nil, err.Error())
		p.event("pool.errored", 0, err.Error())
		return err
	case old == nil: // it goes on trying
		return err
	}
	if l != nil {
		now, cancel := context.WithCancel(context.Background())
		cancel()
		l.end(now)
	}
	p.settled(nil, "")
	p.event("pool.kept", 0, "the workers before go on, as no new one gets ready: "+err.Error())
	if renew {
		return fmt.Errorf("no new worker gets ready, those before go on: %w", err)
	}
	p.d.mu.Lock()
	if reflect.DeepEqual(p.spec, spec) {
		p.spec = old.spec
	}
	p.d.mu.Unlock()
	p.d.saveOrWarn()
	return fmt.Errorf("no worker of the new form gets ready, those before go on: %w", err)
}

// errEnding is why nothing is started any more.
var errEnding = errors.New("the daemon ends, or makes way for another")

// quiesce has the pool take nothing new, and ends its workers when they have
// done what they have. It returns then, or when ctx ends.
func (p *managedPool) quiesce(ctx context.Context) error {
	p.op.Lock()
	p.clear()
	p.d.mu.Lock()
	want := p.want
	p.d.mu.Unlock()
	if want {
		p.op.Unlock()
		return errors.New("another command started it again meanwhile")
	}
	p.settled(nil, "")
	p.mu.Lock()
	l := p.life
	p.life = nil
	p.mu.Unlock()
	if l != nil {
		p.event("pool.draining", 0, "takes no new tasks")
		p.drain(l)
	}
	p.op.Unlock()
	p.mu.Lock()
	lives := slices.Collect(maps.Keys(p.draining))
	p.mu.Unlock()
	for _, x := range lives {
		select {
		case <-x.ended:
		case <-ctx.Done():
			return ctx.Err()
		}
	}
	if l != nil {
		p.event("pool.stopped", 0, "stopped, with everything done")
	}
	return nil
}

// halted says whether the daemon is about to end.
func (d *Daemon) halted() bool {
	select {
	case <-d.halt:
		return true
	default:
		return d.over()
	}
}

func sizeWords(least, most int) string {
	if least == most && most == 1 {
		return "1 worker"
	}
	if least == most {
		return fmt.Sprintf("%d workers", most)
	}
	return fmt.Sprintf("%d to %d workers", least, most)
}

// clear ends what workers of the controller before have left.
func (p *managedPool) clear() {
	b := p.before
	p.before = leftovers{}
	var all sync.WaitGroup
	for _, a := range b.workers {
		all.Go(func() { endStranger(a) })
	}
	all.Wait()
	ctx, cancel := context.WithTimeout(context.Background(), finishWait)
	defer cancel()
	finish(ctx, p.d, b.captures, b.kept)
}

// up waits until a worker is ready, none can be had or will be in time.
func (p *managedPool) up(ctx context.Context, l *poolLife) error {
	late := time.NewTimer(l.spec.StartTimeout.Std() + settleMost)
	defer late.Stop()
	tick := time.NewTicker(upEvery)
	defer tick.Stop()
	// Without a greeting nobody knows whether a worker works but by its not
	// ending.
	var steady time.Duration
	if l.spec.Protocol == string(pool.JSONLines) || l.spec.Protocol == string(pool.Node) {
		steady = upSteady
	}
	first := l.pool.Stats()
	died, since := first.Died, time.Now()
	for {
		s := l.pool.Stats()
		if s.Died != died || s.Up == 0 {
			died, since = s.Died, time.Now()
		}
		if s.Up > 0 && (time.Since(since) >= steady || s.Done > first.Done) {
			return nil
		}
		if err := l.pool.Err(); err != nil {
			return errors.New(inShort(err) + l.said())
		}
		if s.Died >= first.Died+failedStarts && s.Done == first.Done {
			return errors.New("workers end as soon as they are started" + l.said())
		}
		select {
		case <-tick.C:
		case <-late.C:
			return errors.New("no worker is ready yet" + l.said())
		case <-ctx.Done():
			return ctx.Err()
		case <-l.ended:
			return errors.New("the pool was stopped meanwhile")
		case <-p.d.halt:
			return errEnding
		case <-p.d.gone:
			return errors.New("the keeper is gone")
		}
	}
}

// said is the last line that a worker wrote to stderr, if any.
func (l *poolLife) said() string {
	for _, c := range slices.Backward(l.captures) {
		if c.Source().Stream != logs.Err {
			continue
		}
		if tail := c.Tail(1); len(tail) > 0 && tail[0] != "" {
			return "; the last it said was: " + tail[0]
		}
	}
	return ""
}

// pids are those of all workers there are.
func (p *managedPool) pids() []int {
	p.mu.Lock()
	lives := slices.Collect(maps.Keys(p.draining))
	if p.life != nil {
		lives = append(lives, p.life)
	}
	p.mu.Unlock()
	var out []int
	for _, l := range lives {
		out = append(out, l.spawner.pids()...)
	}
	return out
}

// view is the pool as the API shows it, less what it uses.
func (p *managedPool) view() client.PoolInfo {
	p.d.mu.Lock()
	spec, want := p.spec, p.want
	p.d.mu.Unlock()
	p.mu.Lock()
	l, begun, reason, trouble := p.life, p.begun != nil, p.reason, p.logTrouble
	draining := slices.Collect(maps.Keys(p.draining))
	p.mu.Unlock()
	v := client.PoolInfo{
		ID: p.id, Name: p.name, Namespace: spec.Namespace, Protocol: spec.Protocol, Created: p.created, LogTrouble: trouble,
		State: client.Stopped, Stats: client.PoolStats{Min: spec.Min, Max: spec.Max},
	}
	_, v.OutPath, v.ErrPath = p.logs()
	for _, x := range draining {
		s := x.pool.Stats()
		v.Draining += s.Queued + s.Blocked + s.Running
	}
	v.PIDs = p.pids()
	switch {
	case l != nil:
		v.Stats = poolStats(l.pool.Stats())
		v.Since = l.began
		err := l.pool.Err()
		switch {
		case err != nil:
			v.State, v.Reason = client.Errored, inShort(err)
		case v.Stats.Up == 0:
			v.State = client.Starting
		default:
			v.State = client.Online
		}
	case begun && want:
		v.State = client.Starting
	case want && reason != "":
		v.State, v.Reason = client.Errored, reason
	case len(draining) > 0:
		v.State = client.Stopping
	}
	return v
}

// logs says where the workers' output goes.
func (p *managedPool) logs() (spec config.Logs, out, err string) {
	p.d.mu.Lock()
	app := p.spec.App()
	p.d.mu.Unlock()
	out, err = (&instance{d: p.d, id: p.id, alone: true}).logPaths(app)
	return app.Logs, out, err
}

// poolStats are the figures in the words of package client, which knows no
// package that runs processes.
func poolStats(s pool.Stats) (out client.PoolStats) {
	b, err := json.Marshal(s)
	if err == nil {
		_ = json.Unmarshal(b, &out) // the same fields: see the tests
	}
	return out
}

// addPool makes a pool; nothing of it runs yet. It needs d.mu.
func (d *Daemon) addPool(spec config.Pool, id int, created time.Time) *managedPool {
	p := &managedPool{d: d, id: id, name: spec.Name, created: created, spec: spec, want: spec.Autostart}
	if d.pools == nil {
		d.pools = map[string]*managedPool{}
	}
	d.pools[spec.Name] = p
	d.poolOrder = append(d.poolOrder, spec.Name)
	return p
}

// dropPools forgets pools, but for what somebody has started again meanwhile. It
// needs d.mu.
func (d *Daemon) dropPools(list []*managedPool) {
	for _, p := range list {
		if d.pools[p.name] == p && !p.want {
			p.gone = true
			p.event("pool.deleted", 0, "deleted")
			delete(d.pools, p.name)
			d.poolOrder = slices.DeleteFunc(d.poolOrder, func(n string) bool { return n == p.name })
		}
	}
}

// allPools are the pools in the order they were added.
func (d *Daemon) allPools() []*managedPool {
	d.mu.Lock()
	defer d.mu.Unlock()
	out := make([]*managedPool, 0, len(d.poolOrder))
	for _, name := range d.poolOrder {
		out = append(out, d.pools[name])
	}
	return out
}

func (d *Daemon) poolByID(id int) *managedPool {
	for _, p := range d.allPools() {
		if p.id == id {
			return p
		}
	}
	return nil
}

// poolOf finds the pool of a name or id.
func (d *Daemon) poolOf(name string) (*managedPool, error) {
	all := d.allPools()
	var names []string
	for _, p := range all {
		if p.name == name {
			return p, nil
		}
		names = append(names, p.name)
	}
	if id, ok := idOf(name); ok {
		for _, p := range all {
			if p.id == id {
				return p, nil
			}
		}
	}
	hint := nearest(name, names)
	if len(names) == 0 {
		hint = "; there is none: pools are made by pools: in remuda.yaml and `remuda up`"
	} else if strings.Contains(hint, "remuda list") {
		hint = "; there is " + strings.Join(names[:min(len(names), 10)], ", ")
	}
	return nil, refuse(http.StatusNotFound, "no pool is called %s%s", quoted(name), hint)
}

// admitPools checks pools of a request against each other, its apps and what
// is there.
func (d *Daemon) admitPools(pools []config.Pool, apps []config.App) error {
	d.mu.Lock()
	defer d.mu.Unlock()
	seen := map[string]bool{}
	for n := range apps {
		seen[apps[n].Name] = true
		if d.pools[apps[n].Name] != nil {
			return refuse(http.StatusConflict, "a pool is called %s already: give the app another name, or delete the pool", quoted(apps[n].Name))
		}
	}
	total := len(d.pools)
	for n := range pools {
		name := pools[n].Name
		if err := config.ValidatePool(pools[n]); err != nil {
			return refuse(http.StatusUnprocessableEntity, "%v", err)
		}
		if seen[name] {
			return refuse(http.StatusUnprocessableEntity, "%s is there twice: rename one, as commands know apps and pools by name", quoted(name))
		}
		seen[name] = true
		if d.apps[name] != nil {
			return refuse(http.StatusConflict, "an app is called %s already: give the pool another name, or delete the app", quoted(name))
		}
		if d.pools[name] == nil {
			total++
		}
	}
	if total > maxPools {
		return refuse(http.StatusUnprocessableEntity, "%d pools are more than one daemon keeps (%d)", total, maxPools)
	}
	return nil
}

// poolPlan is what a command makes of pools. It is carried out in steps, so
// that it is on the disk before anything is done, and others may use the daemon
// while workers start.
type poolPlan struct {
	touched []*managedPool // to be brought in line
	renew   bool           // with other workers in any case
	drain   bool           // and let do what they have where they are to go
	gone    []*managedPool // to be forgotten when their workers have ended
	shown   []*managedPool // only to be told of
	undo    []func()       // needs d.mu
}

// putPools gives pools their specs, and makes those that are not there. Caller
// holds d.act.
func (d *Daemon) putPools(plan *poolPlan, specs []config.Pool, want func(p *managedPool, spec config.Pool) bool) {
	d.mu.Lock()
	defer d.mu.Unlock()
	for _, spec := range specs {
		p := d.pools[spec.Name]
		if p == nil {
			p = d.addPool(spec, d.nextID, time.Now())
			d.nextID++
			plan.undo = append(plan.undo, func() { p.want = false; d.dropPools([]*managedPool{p}) })
		} else {
			was, wanted := p.spec, p.want
			plan.undo = append(plan.undo, func() { p.spec, p.want = was, wanted })
			p.want, p.spec = want(p, spec), spec
		}
		plan.touched = append(plan.touched, p)
	}
}

// wantPools sets whether pools shall run. Caller holds d.act.
func (d *Daemon) wantPools(plan *poolPlan, list []*managedPool, want bool) {
	d.mu.Lock()
	defer d.mu.Unlock()
	for _, p := range list {
		was := p.want
		plan.undo = append(plan.undo, func() { p.want = was })
		p.want = want
	}
	plan.touched = append(plan.touched, list...)
}

func (d *Daemon) undoPools(plan *poolPlan) {
	d.mu.Lock()
	defer d.mu.Unlock()
	for _, f := range slices.Backward(plan.undo) {
		f()
	}
	*plan = poolPlan{}
}

// readyPools is called when the plan is on the disk. Caller holds d.act.
func (d *Daemon) readyPools(plan *poolPlan) {
	for _, p := range plan.touched {
		d.mu.Lock()
		want := p.want
		d.mu.Unlock()
		if want {
			p.about()
		}
	}
}

// carryOut brings pools in line and tells what became of each. Caller does not
// hold d.act.
func (d *Daemon) carryOut(ctx context.Context, plan *poolPlan) []client.PoolOutcome {
	list := append(slices.Clone(plan.touched), plan.shown...)
	if len(list) == 0 {
		return nil
	}
	errs := make([]error, len(list))
	var all sync.WaitGroup
	for n, p := range plan.touched {
		all.Go(func() {
			if plan.drain {
				errs[n] = p.quiesce(ctx)
			} else {
				errs[n] = p.reconcile(ctx, plan.renew)
			}
		})
	}
	all.Wait()
	views := d.poolViews(list)
	out := make([]client.PoolOutcome, len(views))
	for n := range views {
		out[n].PoolInfo = views[n]
		if errs[n] != nil {
			out[n].Error = errs[n].Error()
		}
	}
	if len(plan.gone) > 0 {
		d.act.Lock()
		d.mu.Lock()
		d.dropPools(plan.gone)
		d.mu.Unlock()
		d.saveOrWarn()
		d.act.Unlock()
	}
	return out
}

// poolViews are pools with what they use.
func (d *Daemon) poolViews(list []*managedPool) []client.PoolInfo {
	out := make([]client.PoolInfo, len(list))
	usage := d.sampler.usage(d.all(), d.allPools())
	for n, p := range list {
		out[n] = p.view()
		if u, ok := usage[p.id]; ok && len(out[n].PIDs) > 0 {
			out[n].CPU, out[n].Memory = u.CPU, u.RSS
		}
	}
	return out
}

// comparePools finds what up has to do about pools.
func (d *Daemon) comparePools(req client.UpRequest) (changes []client.Change, gone []*managedPool, err error) {
	d.mu.Lock()
	defer d.mu.Unlock()
	wanted := map[string]bool{}
	for _, spec := range req.Pools {
		wanted[spec.Name] = true
		c := client.Change{App: spec.Name, Pool: true, Action: "add"}
		if p := d.pools[spec.Name]; p != nil {
			if p.spec.Source != req.Source {
				return nil, nil, refuse(http.StatusConflict, "pool %q is there already, from %s: delete it there or choose another name", spec.Name, cmp.Or(p.spec.Source, "the API"))
			}
			is := p.spec
			c.Action, c.Fields = "none", config.DiffPools(is, spec)
			is.Min, is.Max = spec.Min, spec.Max
			switch {
			case len(c.Fields) == 0 && spec.Autostart && !p.want:
				c.Action, c.Fields = "start", []string{"it is stopped"}
			case len(c.Fields) == 0:
			case len(config.DiffPools(is, spec)) == 0:
				c.Action = "scale"
			default:
				c.Action = "change"
			}
		}
		changes = append(changes, c)
	}
	for _, name := range d.poolOrder {
		if p := d.pools[name]; p.spec.Source == req.Source && req.Source != "" && !wanted[name] {
			changes = append(changes, client.Change{App: name, Pool: true, Action: "remove"})
			gone = append(gone, p)
		}
	}
	return changes, gone, nil
}

// planUp notes what up makes of pools; the caller saves. Caller holds d.act.
func (d *Daemon) planUp(plan *poolPlan, req client.UpRequest, changes []client.Change, gone []*managedPool) {
	var specs []config.Pool
	for n, c := range changes[:len(req.Pools)] {
		if c.Action != "none" {
			specs = append(specs, req.Pools[n])
		}
	}
	d.putPools(plan, specs, func(p *managedPool, spec config.Pool) bool { return p.want || spec.Autostart })
	d.planDelete(plan, gone)
}

// planDelete notes that pools are to go. Caller holds d.act.
func (d *Daemon) planDelete(plan *poolPlan, list []*managedPool) {
	d.wantPools(plan, list, false)
	plan.gone = append(plan.gone, list...)
}

// Pools implements [api.Daemon].
func (d *Daemon) Pools(targets []client.Target, specs, secrets bool) ([]client.PoolInfo, error) {
	_, list, err := d.matchAll(targets)
	if err != nil || len(list) == 0 {
		return nil, err
	}
	out := d.poolViews(list)
	for n, p := range list {
		if !specs {
			break
		}
		d.mu.Lock()
		spec := p.spec
		d.mu.Unlock()
		if !secrets {
			spec.Env = masked(spec.Env)
		}
		out[n].Spec = &spec
	}
	return out, nil
}

// ActPools implements [api.Daemon].
func (d *Daemon) ActPools(ctx context.Context, req client.ActRequest) (client.ActResult, error) {
	if len(req.Targets) == 0 {
		return client.ActResult{}, refuse(http.StatusUnprocessableEntity, "no pool is named")
	}
	var list []*managedPool
	for _, t := range req.Targets {
		if t == "all" {
			list = d.allPools()
			break
		}
		p, err := d.poolOf(t)
		if err != nil {
			return client.ActResult{}, err
		}
		if !slices.Contains(list, p) {
			list = append(list, p)
		}
	}
	out, err := d.actPools(ctx, list, req)
	return client.ActResult{Instances: []client.Outcome{}, Pools: out, Warnings: d.unsaved(nil)}, err
}

// actPools carries out a verb on pools.
func (d *Daemon) actPools(ctx context.Context, list []*managedPool, req client.ActRequest) ([]client.PoolOutcome, error) {
	if len(list) == 0 {
		return nil, nil
	}
	plan, err := d.planAct(list, req)
	if err != nil {
		return nil, err
	}
	return d.carryOut(ctx, plan), nil
}

func (d *Daemon) planAct(list []*managedPool, req client.ActRequest) (*poolPlan, error) {
	d.act.Lock()
	defer d.act.Unlock()
	plan := &poolPlan{}
	d.mu.Lock()
	list = slices.DeleteFunc(list, func(p *managedPool) bool { return d.pools[p.name] != p })
	d.mu.Unlock()
	switch req.Verb {
	case client.VerbStart, client.VerbRestart, client.VerbReload:
		plan.renew = req.Verb != client.VerbStart
		if len(req.Env) > 0 {
			d.mu.Lock()
			for _, p := range list {
				p.spec.Env = mergedEnv(p.spec.Env, req.Env)
			}
			d.mu.Unlock()
		}
		d.wantPools(plan, list, true)
	case client.VerbStop:
		d.wantPools(plan, list, false)
	case client.VerbDelete:
		d.planDelete(plan, list)
	case client.VerbDrain:
		plan.drain = true
		d.wantPools(plan, list, false)
	case client.VerbReset: // they count nothing that could be set to zero
		plan.shown = list
		return plan, nil
	case client.VerbFlush:
		plan.shown = list
		return plan, d.logs.Flush(d.poolLogs(list)...)
	case client.VerbReopen:
		plan.shown = list
		d.logs.Reopen(d.poolLogs(list)...)
		return plan, nil
	default:
		return nil, refuse(http.StatusUnprocessableEntity, "unknown verb %s", quoted(string(req.Verb)))
	}
	d.saveOrWarn()
	d.readyPools(plan)
	return plan, nil
}

func (d *Daemon) poolLogs(list []*managedPool) []string {
	var paths []string
	for _, p := range list {
		_, out, err := p.logs()
		paths = append(paths, out, err)
	}
	slices.Sort(paths)
	return slices.Compact(paths)
}

// ScalePool implements [api.Daemon].
func (d *Daemon) ScalePool(ctx context.Context, name, to string) (client.ActResult, error) {
	p, err := d.poolOf(name)
	if err != nil {
		return client.ActResult{}, err
	}
	plan := &poolPlan{}
	err = func() error {
		d.act.Lock()
		defer d.act.Unlock()
		d.mu.Lock()
		spec := p.spec
		d.mu.Unlock()
		if err := scalePool(&spec, to); err != nil {
			return err
		}
		d.putPools(plan, []config.Pool{spec}, func(p *managedPool, _ config.Pool) bool { return p.want })
		d.saveOrWarn()
		return nil
	}()
	if err != nil {
		return client.ActResult{}, err
	}
	return client.ActResult{Instances: []client.Outcome{}, Pools: d.carryOut(ctx, plan), Warnings: d.unsaved(nil)}, nil
}

// scalePool reads "4", "2..8", "+1" and "-1". The last two move both bounds.
func scalePool(spec *config.Pool, to string) error {
	wrong := refuse(http.StatusUnprocessableEntity, "%s is no size of a pool: give N, MIN..MAX, +N or -N", quoted(to))
	number := func(s string) (int, bool) {
		n, err := strconv.Atoi(s)
		return n, err == nil && n >= 0 && n <= 1<<20 && s[0] != '+'
	}
	least, most, isRange := strings.Cut(to, "..")
	switch {
	case isRange:
		a, okA := number(least)
		b, okB := number(most)
		if !okA || !okB {
			return wrong
		}
		spec.Min, spec.Max = a, b
	case strings.HasPrefix(to, "+"), strings.HasPrefix(to, "-"):
		by, ok := number(to[1:])
		if !ok {
			return wrong
		}
		if to[0] == '-' {
			by = -by
		}
		now := sizeWords(spec.Min, spec.Max)
		spec.Min, spec.Max = spec.Min+by, spec.Max+by
		if spec.Min < 1 {
			return refuse(http.StatusUnprocessableEntity, "%s %s make less than one: use `remuda pool drain` or `remuda stop` to have none", now, to)
		}
	default:
		n, err := config.ResolveInstances(to)
		if err != nil || to == "0" {
			return wrong
		}
		spec.Min, spec.Max = n, n
	}
	if err := config.ValidatePool(*spec); err != nil {
		return refuse(http.StatusUnprocessableEntity, "%v", err)
	}
	return nil
}

// Do implements [api.Daemon].
func (d *Daemon) Do(ctx context.Context, name string, t client.PoolTask) (client.PoolResult, error) {
	p, err := d.poolOf(name)
	if err != nil {
		return client.PoolResult{}, err
	}
	task := pool.Task{Name: t.Name, Body: t.Body, Priority: t.Priority, Key: t.Key, CacheKey: t.CacheKey, Timeout: t.Timeout, Idempotent: t.Idempotent}
	var tried *poolLife
	for {
		p.mu.Lock()
		l, begun, reason := p.life, p.begun, p.reason
		p.mu.Unlock()
		switch {
		case l != nil && l != tried:
			r, err := l.pool.Do(ctx, task)
			if errors.Is(err, pool.ErrClosed) && r.Attempts == 0 {
				// It came just when others took over.
				tried = l
				continue
			}
			res := client.PoolResult{Body: r.Body, Wait: r.Wait, Run: r.Run, PID: r.PID, Attempts: r.Attempts, Cached: r.Cached}
			return res, p.failure(err)
		case begun != nil:
			select {
			case <-begun:
			case <-ctx.Done():
				return client.PoolResult{}, p.failure(fmt.Errorf("%w: %w", pool.ErrTimeout, ctx.Err()))
			}
		case reason != "":
			return client.PoolResult{}, p.refusal(http.StatusServiceUnavailable, client.TaskNoWorkers, reason)
		default:
			return client.PoolResult{}, p.failure(pool.ErrClosed)
		}
	}
}

func (p *managedPool) refusal(status int, kind client.TaskKind, text string) error {
	return &client.Error{Status: status, Kind: kind, Detail: "pool " + quoted(p.name) + ": " + text}
}

// failure is how a task failed, for the API.
func (p *managedPool) failure(err error) error {
	if err == nil {
		return nil
	}
	var te *pool.TaskError
	text := inShort(err)
	switch {
	case errors.As(err, &te):
		e := &client.Error{Status: http.StatusUnprocessableEntity, Kind: client.TaskFailed, Detail: te.Message, Code: te.Code}
		if json.Valid(te.Data) {
			e.Data = te.Data
		}
		return e
	case errors.Is(err, pool.ErrPoison): // which is ErrWorkerDied too, maybe
		return p.refusal(http.StatusUnprocessableEntity, client.TaskPoison, text)
	case errors.Is(err, pool.ErrBreakerOpen):
		return p.refusal(http.StatusServiceUnavailable, client.TaskBreakerOpen, text)
	case errors.Is(err, pool.ErrWorkerDied):
		return p.refusal(http.StatusBadGateway, client.TaskWorkerDied, text)
	case errors.Is(err, pool.ErrNoWorkers):
		return p.refusal(http.StatusServiceUnavailable, client.TaskNoWorkers, text)
	case errors.Is(err, pool.ErrTimeout):
		return p.refusal(http.StatusGatewayTimeout, client.TaskTimedOut, text)
	case errors.Is(err, pool.ErrQueueFull):
		return p.refusal(http.StatusTooManyRequests, client.TaskQueueFull, text)
	case errors.Is(err, pool.ErrDropped):
		return p.refusal(http.StatusServiceUnavailable, client.TaskDropped, text)
	case errors.Is(err, pool.ErrClosed):
		return p.refusal(http.StatusServiceUnavailable, client.TaskClosed, "it is stopped, or the daemon makes way for another: `remuda start` starts it, and a task can be given again")
	case errors.Is(err, context.Canceled):
		return p.refusal(http.StatusServiceUnavailable, client.TaskClosed, text)
	case errors.Is(err, ipc.ErrTooLarge):
		return p.refusal(http.StatusRequestEntityTooLarge, client.TaskInvalid, text)
	}
	return p.refusal(http.StatusUnprocessableEntity, client.TaskInvalid, text)
}

// endPools ends the workers of all pools: see cutAll.
func (d *Daemon) endPools(patience time.Duration) {
	d.haltOnce.Do(func() { close(d.halt) })
	var all sync.WaitGroup
	for _, p := range d.allPools() {
		all.Go(func() {
			p.op.Lock()
			defer p.op.Unlock()
			p.settled(nil, "")
			p.cutAll(patience)
		})
	}
	all.Wait()
}

// poolState is a pool in the state file.
type poolState struct {
	Spec    config.Pool `json:"spec"`
	ID      int         `json:"id"`
	Run     bool        `json:"run"`
	Created time.Time   `json:"created"`
}

// poolStates needs d.mu.
func (d *Daemon) poolStates() []poolState {
	var out []poolState
	for _, name := range d.poolOrder {
		p := d.pools[name]
		out = append(out, poolState{Spec: p.spec, ID: p.id, Run: p.want, Created: p.created})
	}
	return out
}

// restorePools brings pools back. Their workers are started when those of the
// controller before have ended, which nobody waits for.
func (d *Daemon) restorePools(states []poolState, workers []adoptee, stored map[string]*os.File) {
	byID := map[int]*managedPool{}
	d.mu.Lock()
	for _, s := range states {
		p := d.addPool(s.Spec, s.ID, s.Created)
		p.want = s.Run
		d.nextID = max(d.nextID, s.ID+1)
		byID[s.ID] = p
	}
	d.mu.Unlock()
	for _, a := range workers {
		if p := byID[a.label.ID]; p != nil {
			p.before.workers = append(p.before.workers, a)
		} else {
			go endStranger(a)
		}
	}
	for name, f := range stored {
		var id int
		rest, ok := strings.CutPrefix(name, "pool-")
		num, rest, _ := strings.Cut(rest, "-")
		stream, _, _ := strings.Cut(rest, "-")
		id, err := strconv.Atoi(num)
		p := byID[id]
		if !ok || err != nil || p == nil {
			continue // dropped with what else is of no use
		}
		delete(stored, name)
		second := relayName(id, stream, pipeInode(f))
		relay := stored[second]
		delete(stored, second)
		outTo, errTo := (&instance{d: d, id: id, alone: true}).targets(p.spec.App())
		if stream == logs.Err {
			outTo = errTo
		}
		p.before.kept = append(p.before.kept, name)
		if c := p.capture(stream, f, relay, outTo, true); c != nil {
			p.before.captures = append(p.before.captures, c)
		}
	}
	for _, p := range byID {
		if p.want {
			p.about()
		}
		go func() {
			if err := p.reconcile(context.Background(), false); err != nil {
				d.log.Warn("a pool cannot be brought back", "pool", p.name, "error", err)
			}
		}()
	}
}

// freshPools are those of a dump that are not there.
func (d *Daemon) freshPools(states []poolState) []poolState {
	d.mu.Lock()
	defer d.mu.Unlock()
	return slices.DeleteFunc(slices.Clone(states), func(s poolState) bool { return d.pools[s.Spec.Name] != nil })
}

func poolSpecs(states []poolState) []config.Pool {
	out := make([]config.Pool, len(states))
	for n := range states {
		out[n] = states[n].Spec
	}
	return out
}

// resurrectPools has pools that were just made run as they did. Caller holds
// d.act.
func (d *Daemon) resurrectPools(states []poolState) {
	d.mu.Lock()
	defer d.mu.Unlock()
	for _, s := range states {
		d.pools[s.Spec.Name].want = s.Run
	}
}

// signalPools sends a signal to the workers of pools.
func (d *Daemon) signalPools(list []*managedPool, sig syscall.Signal) []client.PoolOutcome {
	var out []client.PoolOutcome
	for n, v := range d.poolViews(list) {
		o := client.PoolOutcome{PoolInfo: v}
		list[n].mu.Lock()
		l := list[n].life
		list[n].mu.Unlock()
		if l == nil {
			o.Error = "does not run"
		} else if err := l.spawner.signal(sig); err != nil {
			o.Error = err.Error()
		}
		out = append(out, o)
	}
	return out
}

// names are those of all apps and pools.
func (d *Daemon) names() []string {
	d.mu.Lock()
	defer d.mu.Unlock()
	return slices.Concat(d.order, d.poolOrder)
}
