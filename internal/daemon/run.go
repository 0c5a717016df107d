package daemon

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"syscall"
	"time"

	"golang.org/x/sys/unix"

	"github.com/remuda-dev/remuda/client"
	"github.com/remuda-dev/remuda/internal/cluster"
	"github.com/remuda-dev/remuda/internal/config"
	"github.com/remuda-dev/remuda/internal/keeper"
	"github.com/remuda-dev/remuda/internal/logs"
	"github.com/remuda-dev/remuda/internal/monitor"
	"github.com/remuda-dev/remuda/internal/nodeipc"
	"github.com/remuda-dev/remuda/internal/probe"
	"github.com/remuda-dev/remuda/proc"
	"github.com/remuda-dev/remuda/supervise"
)

// Names under which the keeper keeps a run's descriptors.
const (
	keptOut = "out"
	keptErr = "err"
	keptIPC = "ipc"
)

const (
	// tailLines of stderr are kept of a run that failed.
	tailLines = 30 // a stack trace of Node, whose first lines say what it is about
	// finishWait is how long the end of a run waits for a log that cannot be
	// written.
	finishWait = 2 * time.Second
	// leftoverWait is how long what a leader left behind is killed for.
	leftoverWait = 10 * time.Second
	// emptyPoll is how often a stopping run whose leader has ended is looked
	// at; only then is anything polled.
	emptyPoll = 10 * time.Millisecond
)

// label travels with a run in the keeper, for a controller that comes after.
type label struct {
	ID       int     `json:"id"`
	App      string  `json:"app"`
	Pool     bool    `json:"pool,omitempty"` // it is a worker of the pool of this id
	Began    int64   `json:"began"`          // Unix nanoseconds; of two runs of an instance the later counts
	Restarts int     `json:"restarts,omitempty"`
	Unstable int     `json:"unstable,omitempty"`
	Recent   []int64 `json:"recent,omitempty"` // Unix milliseconds

	LastExit *client.Exit `json:"last_exit,omitempty"` // of the run before

	Gen   int  `json:"gen,omitempty"`   // of the app's spec
	Ready bool `json:"ready,omitempty"` // it has said so, and will not again

	Cluster bool `json:"cluster,omitempty"` // it shares the app's sockets

	// Trial: it was started beside another run, which counts until this one is
	// ready. Taking this away is the moment at which it takes over.
	Trial bool `json:"trial,omitempty"`
}

// origin is what is known of a run before it is there.
type origin struct {
	inst    *instance
	spec    config.App // as it was at the start
	gen     int        // of spec
	slot    int        // see [instance.slots]
	began   time.Time
	trial   bool // it was started beside another, see [label]
	cluster bool
}

// run is one life of an instance's process. It implements [supervise.Run].
type run struct {
	origin
	proc     *keeper.Process
	out, err *logs.Capture
	ipc      channel         // nil where the program is not Node
	worker   *cluster.Worker // nil where the app is not in cluster mode

	ready  chan struct{}
	done   chan struct{}
	killed chan struct{} // closed when what is left must go at once

	labels sync.Mutex // one change of the label after the other

	mu          sync.Mutex
	cause       string // why it was ended, "" while nobody asked for that
	probeFailed bool   // it did not become ready in time
	exit        supervise.Exit

	ipcReady, notifyReady chan struct{} // nil unless the probe waits for them

	replies replies
}

// channel is Node's, with or without a cluster behind it.
type channel interface {
	Send(v any) error
	Close() error
}

// newRun makes a run of what lives in the keeper already. ready says that nothing has to be waited for.
func newRun(as origin, p *keeper.Process, ready bool) *run {
	r := &run{origin: as, proc: p, ready: make(chan struct{}), done: make(chan struct{}), killed: make(chan struct{})}
	if ready || !r.cluster && !r.trial && !probed(r.spec) {
		close(r.ready)
		return r
	}
	switch r.spec.Ready.Type {
	case "ipc":
		r.ipcReady = make(chan struct{}, 1)
	case "notify":
		r.notifyReady = make(chan struct{}, 1)
	}
	return r
}

// probed says whether the program is asked, or says itself, when it is ready.
func probed(spec config.App) bool { return spec.Ready.Type != "none" && spec.Ready.Type != "" }

// Start implements [supervise.Child].
func (i *instance) Start(ctx context.Context, a supervise.Attempt) (supervise.Run, error) {
	as := origin{inst: i, began: time.Now(), trial: a.Beside != nil}
	i.mu.Lock()
	as.spec, as.gen = i.spec, i.gen
	if c := i.candidate; c != nil && as.trial {
		as.spec, as.gen = c.spec, c.gen
	}
	as.slot = i.takeSlot()
	i.mu.Unlock()
	r, err := i.spawn(ctx, as, a)
	if err != nil {
		i.mu.Lock()
		i.slots[as.slot] = false
		i.mu.Unlock()
		i.d.event(i, "app.start-failed", 0, err.Error())
		return nil, err
	}
	i.mu.Lock()
	i.runs = append(i.runs, r)
	var ended []proc.Process
	if !r.trial {
		ended, i.ended = i.ended, nil
		i.run = r
	}
	i.mu.Unlock()
	// Only now is the end of the runs before on record: in this one's label.
	release(ended)
	go r.follow()
	return r, nil
}

func release(ended []proc.Process) {
	for _, p := range ended {
		_ = p.Release()
	}
}

func (i *instance) spawn(ctx context.Context, as origin, a supervise.Attempt) (_ *run, err error) {
	spec := as.spec
	ps := proc.Spec{Key: i.key(as.slot), Args: spec.Command, Dir: spec.Cwd}
	if ps.Credential, err = credential(spec); err != nil {
		return nil, err
	}
	if ps.Umask, err = umask(spec.Umask); err != nil {
		return nil, err
	}
	env := i.environment(spec, ps.Credential)
	if ps.Path, err = lookPath(spec.Command[0], env, spec.Cwd); err != nil {
		return nil, err
	}
	if spec.Restart.MaxMemory > 0 && i.d.hardMemory {
		// The limit itself is looked at every second; the kernel stops what
		// grows faster than that.
		ps.MemoryMax = spec.Restart.MaxMemory + spec.Restart.MaxMemory/4
	}

	var mine, theirs []*os.File // ends of this process and of the child
	defer func() {
		closeAll(theirs)
		if err != nil {
			closeAll(mine)
		}
	}()
	pipe := func(name string) (*os.File, *os.File, error) {
		var p [2]int
		if err := unix.Pipe2(p[:], unix.O_CLOEXEC); err != nil {
			return nil, nil, fmt.Errorf("cannot make a pipe for the output: %w", err)
		}
		r, w := os.NewFile(uintptr(p[0]), name), os.NewFile(uintptr(p[1]), name)
		mine, theirs = append(mine, r), append(theirs, w)
		return r, w, nil
	}
	outR, outW, err := pipe(keptOut)
	if err != nil {
		return nil, err
	}
	errR, errW, err := pipe(keptErr)
	if err != nil {
		return nil, err
	}
	ps.Files = []*os.File{nil, outW, errW}
	ps.Keep = map[string]*os.File{keptOut: outR, keptErr: errR}
	listen, err := i.sockets(ctx, spec, &ps)
	if err != nil {
		return nil, err
	}
	theirs = append(theirs, listen...)
	var channel *os.File
	if wantsIPC(spec) {
		parent, child, err := nodeipc.Pair()
		if err != nil {
			return nil, err
		}
		mine, theirs = append(mine, parent), append(theirs, child)
		channel = parent
		ps.Files = append(ps.Files, child)
		ps.Keep[keptIPC] = parent
		env = append(env, nodeipc.Env(len(ps.Files)-1)...)
	}
	as.cluster = spec.Clustered() // which has a channel, being Node
	if as.cluster {
		primary, err := i.d.clusters.of(spec, ps.Credential)
		if err != nil {
			return nil, err
		}
		env = primary.Env(i.index+1, env)
	} else {
		i.d.clusters.fork(i.app)
	}
	ps.Env = env
	if self, err := announce(spec, &ps); err != nil {
		return nil, err
	} else if self != nil {
		theirs = append(theirs, self)
	}
	if ps.Label, err = i.label(a, as); err != nil {
		return nil, err
	}
	if err := ctx.Err(); err != nil {
		return nil, err
	}
	// Once the keeper has the order it is waited for, also where the start is
	// no longer wanted: the next one could otherwise find this one in its way.
	p, err := i.d.keeper.Spawn(context.WithoutCancel(ctx), ps)
	if err != nil {
		return nil, err
	}
	r := newRun(as, p.(*keeper.Process), false)
	r.attach(descriptors{out: outR, err: errR, ipc: channel})
	mine = nil
	return r, nil
}

// descriptors are this process's ends of what a run is connected by. nil is
// not there.
type descriptors struct {
	out, err           *os.File // read ends of its output
	outRelay, errRelay *os.File // see relay
	ipc                *os.File
	adopted            bool // an earlier controller had them
}

// attach takes the descriptors of the run over.
func (r *run) attach(d descriptors) {
	outTo, errTo := r.inst.targets(r.spec)
	r.out = r.capture(logs.Out, d.out, d.outRelay, outTo, d.adopted)
	r.err = r.capture(logs.Err, d.err, d.errRelay, errTo, d.adopted)
	if d.ipc == nil {
		return
	}
	if r.cluster {
		if err := r.join(d.ipc, d.adopted); err != nil {
			r.inst.d.event(r.inst, "app.ipc", 0, err.Error())
		}
		return
	}
	ch, oerr := r.inst.d.hub.Open(d.ipc, nodeipc.Handlers{OnMessage: r.message, OnClose: r.ipcClosed, Resumed: d.adopted})
	if oerr != nil {
		d.ipc.Close()
		r.inst.d.event(r.inst, "app.ipc", 0, oerr.Error())
		return
	}
	r.ipc = ch
}

// capture never fails: output that cannot be kept as asked is discarded, and
// that is told, for a program must not block on its own words.
func (r *run) capture(stream string, pipe, relay *os.File, t logs.Target, adopted bool) *logs.Capture {
	if pipe == nil {
		return nil
	}
	i := r.inst
	return i.d.capture(logs.Source{App: i.app, ID: i.id, Stream: stream}, pipe, relay, t, adopted, func(err error) {
		i.trouble(err.Error())
		i.d.event(i, "log.trouble", 0, fmt.Sprintf("std%s is discarded: %v", stream, err))
	})
}

// capture takes output into a log, or discards it where that cannot be, which
// trouble is told; nil where not even that can be.
func (d *Daemon) capture(src logs.Source, pipe, relay *os.File, t logs.Target, adopted bool, trouble func(error)) *logs.Capture {
	attach := func() (*logs.Capture, error) {
		if adopted {
			return d.logs.Adopt(src, pipe, relay, t)
		}
		return d.logs.Attach(src, pipe, t, false)
	}
	c, err := attach()
	if err == nil {
		return c
	}
	trouble(err)
	t.Path, relay = "", nil
	if c, err = attach(); err != nil {
		pipe.Close()
		return nil
	}
	return c
}

func (r *run) ipcClosed(err error) {
	if err != nil {
		r.inst.d.event(r.inst, "app.ipc", r.proc.ID().PID, err.Error())
	}
}

func tell(ch chan struct{}) {
	if ch == nil {
		return
	}
	select {
	case ch <- struct{}{}:
	default:
	}
}

// follow goes with the run from its start to the end of the last process of
// it.
func (r *run) follow() {
	ctx, cancel := context.WithCancel(context.Background())
	defer cancel()
	select {
	case <-r.ready:
	default:
		go r.probe(ctx)
	}
	<-r.proc.Done()
	cancel()
	r.clear()
	r.finish()
	i := r.inst
	i.mu.Lock()
	i.runs = slices.DeleteFunc(i.runs, func(x *run) bool { return x == r })
	i.slots[r.slot] = false
	i.mu.Unlock()
	close(r.done)
	r.inst.d.sockets.tidy(r.inst.app)
}

// probe waits until the program is ready, and has the run counted as failed
// where it does not become so in time.
func (r *run) probe(ctx context.Context) {
	if !probed(r.spec) {
		switch err := r.comeUp(ctx); {
		case ctx.Err() != nil:
		case err != nil:
			r.fail(err.Error())
		default:
			r.becomeReady()
		}
		return
	}
	// By tcp and http its siblings, or the run it is beside, answer for it.
	byOthers := r.spec.Ready.Type == "tcp" || r.spec.Ready.Type == "http"
	if byOthers && r.trial && r.worker == nil {
		r.atRest(ctx)
	}
	if byOthers && r.worker != nil && r.worker.Siblings() {
		if err := r.listening(ctx, r.spec.Ready.Timeout.Std()); err != nil && ctx.Err() == nil {
			r.late(err)
			return
		}
	}
	env := probe.Env{Dir: r.spec.Cwd, IPCReady: r.ipcReady, NotifyReady: r.notifyReady, Lines: r.lines}
	if c, err := credential(r.spec); err == nil && c != nil {
		env.Credential = &syscall.Credential{Uid: c.UID, Gid: c.GID, Groups: c.Groups}
	}
	if r.spec.Ready.Type == "exec" {
		env.Environ = r.inst.environment(r.spec, nil)
	}
	err := probe.Wait(ctx, r.spec.Ready, env)
	if ctx.Err() != nil {
		return
	}
	switch {
	case err == nil:
		r.becomeReady()
	case errors.As(err, new(*probe.NotReadyError)):
		r.late(err)
	default:
		r.fail(err.Error())
	}
}

// late is what follows when the program was not ready in time.
func (r *run) late(err error) {
	if r.spec.Ready.OnTimeout == "online" {
		r.becomeReady()
		return
	}
	r.fail(err.Error())
}

// fail has the run counted as failed.
func (r *run) fail(why string) {
	r.mu.Lock()
	r.probeFailed = true
	r.mu.Unlock()
	_ = r.inst.sup.FailRun(why, r.inst.name, r)
}

// becomeReady puts on record that the run is ready. From then on it counts
// also where it was started beside another, for every later controller too.
func (r *run) becomeReady() {
	i := r.inst
	var ended []proc.Process
	if r.trial {
		i.mu.Lock()
		if c := i.candidate; c != nil && c.gen == r.gen {
			i.spec, i.gen = c.spec, c.gen
		}
		ended, i.ended = i.ended, nil
		i.mu.Unlock()
	}
	st, _ := i.sup.Status(i.name)
	err := r.remember(func(l *label) {
		l.Ready, l.Trial = true, false
		if r.trial {
			l.LastExit = exitOf(st.LastExit)
		}
	})
	if err != nil && r.trial {
		// The other must not be stopped: a later controller would take that one
		// for the one that counts.
		r.fail(err.Error())
		return
	}
	release(ended)
	close(r.ready)
}

// comeUp waits until a program that does not say when it is ready has done
// what it does at its start. nil: it has, or need not be waited for.
func (r *run) comeUp(ctx context.Context) error {
	if r.worker == nil {
		r.atRest(ctx)
		return nil
	}
	if most := time.Duration(r.spec.Ready.Timeout); r.trial && r.worker.Siblings() {
		if most == 0 {
			most = replaceWait
		}
		return r.listening(ctx, most)
	}
	_ = r.listening(ctx, listenWait) // it may never want to
	return nil
}

// atRest waits until the program has come to rest, has been busy for a second,
// or has ended.
func (r *run) atRest(ctx context.Context) {
	rest, err := monitor.NewRest(r.proc.ID().PID)
	if err != nil {
		return
	}
	defer rest.Close()
	tick := time.NewTicker(restEvery)
	defer tick.Stop()
	for end := r.began.Add(restMost); time.Now().Before(end); {
		select {
		case <-tick.C:
		case <-ctx.Done():
			return
		}
		switch rest.Look() {
		case monitor.AtRest:
			return
		case monitor.Gone: // ctx ends at any moment
			<-ctx.Done()
			return
		}
	}
}

// remember changes what the keeper tells later controllers of the run.
func (r *run) remember(change func(*label)) error {
	r.labels.Lock()
	defer r.labels.Unlock()
	var l label
	err := json.Unmarshal(r.proc.Label(), &l)
	if err == nil {
		change(&l)
		var b []byte
		if b, err = json.Marshal(l); err == nil {
			ctx, cancel := context.WithTimeout(context.Background(), keeperWait)
			defer cancel()
			err = r.proc.SetLabel(ctx, b)
		}
	}
	if err != nil {
		r.inst.d.log.Warn("another controller will know less of this run", "instance", r.inst.name, "error", err)
	}
	return err
}

func (r *run) lines(f func(string)) (cancel func()) {
	var cancels []func()
	for _, c := range []*logs.Capture{r.out, r.err} {
		if c != nil {
			cancels = append(cancels, c.Lines(f))
		}
	}
	return func() {
		for _, c := range cancels {
			c()
		}
	}
}

// clear sees to it that nothing of the run is left when its leader has ended:
// at once after an end by itself, with the rest of the grace period after a
// requested stop.
func (r *run) clear() {
	if r.proc.Exit().Alone {
		return
	}
	r.mu.Lock()
	asked := r.cause != ""
	r.mu.Unlock()
	for asked {
		left, err := r.proc.Members()
		if err != nil || len(left) == 0 {
			break
		}
		select {
		case <-r.killed:
			asked = false
		case <-r.inst.d.gone:
			return
		case <-time.After(emptyPoll):
		}
	}
	ctx, cancel := context.WithTimeout(context.Background(), leftoverWait)
	defer cancel()
	if err := r.proc.KillTree(ctx); err != nil {
		r.inst.d.event(r.inst, "app.leftover", r.proc.ID().PID, "processes of the run that ended cannot be killed: "+err.Error())
	}
}

func (r *run) finish() {
	ctx, cancel := context.WithTimeout(context.Background(), finishWait)
	defer cancel()
	for _, c := range []*logs.Capture{r.out, r.err} {
		if c != nil {
			_ = c.Finish(ctx) // told by OnTrouble
		}
	}
	if r.ipc != nil {
		_ = r.ipc.Close()
	}
	e := r.proc.Exit()
	r.mu.Lock()
	r.exit = supervise.Exit{Code: e.Code, Cause: r.cause, At: e.At}
	if e.Signal != 0 {
		r.exit.Signal = unix.SignalName(e.Signal)
	}
	if e.OOM {
		r.exit.Cause, r.exit.Failed = "oom", true
	}
	failed := !e.Ok() && r.cause == "" || r.exit.Failed || r.probeFailed
	r.mu.Unlock()

	var tail []string
	if failed && r.err != nil {
		tail = r.err.Tail(tailLines)
	}
	i := r.inst
	aside := r.aside()
	i.mu.Lock()
	switch {
	case !aside:
		i.lastErr = tail
		i.ended = append(i.ended, r.proc)
	case r.trial:
		i.trialErr = tail
	}
	i.mu.Unlock()
	if aside { // whose end is nobody's business but that of the replacement
		defer release([]proc.Process{r.proc})
	}
	text := e.String()
	if r.exit.Cause != "" && !e.OOM { // that it says itself
		text += " (" + r.exit.Cause + ")"
	}
	i.d.event(i, "app.exit", r.proc.ID().PID, text)
}

// aside says that the run is not the one that counts: it was to take another's
// place and has not, or another has taken its place.
func (r *run) aside() bool {
	st, _ := r.inst.sup.Status(r.inst.name)
	return st.Beside == supervise.Run(r) || r.trial && st.Run != nil && st.Run != supervise.Run(r)
}

// Ready implements [supervise.Run].
func (r *run) Ready() <-chan struct{} { return r.ready }

// Done implements [supervise.Run].
func (r *run) Done() <-chan struct{} { return r.done }

// Exit implements [supervise.Run].
func (r *run) Exit() supervise.Exit {
	r.mu.Lock()
	defer r.mu.Unlock()
	return r.exit
}

// Stop implements [supervise.Run].
func (r *run) Stop(cause string) {
	r.mu.Lock()
	if r.cause == "" {
		r.cause = cause
	}
	r.mu.Unlock()
	go func() {
		r.inst.d.sockets.leave(r.inst, r.spec, cause)
		if r.spec.Stop.Message && r.ipc != nil && r.ipc.Send("shutdown") == nil {
			return
		}
		r.part(cause)
		signal := ""
		if !r.trial || !r.aside() {
			signal = r.inst.signalNow()
		}
		_ = r.proc.SignalTree(stopSignal(r.spec, signal))
	}()
}

// Kill implements [supervise.Run].
func (r *run) Kill(cause string) {
	r.mu.Lock()
	if r.cause == "" {
		r.cause = cause
	}
	select {
	case <-r.killed:
		r.mu.Unlock()
		return
	default:
		close(r.killed)
	}
	r.mu.Unlock()
	go func() {
		ctx, cancel := context.WithTimeout(context.Background(), leftoverWait)
		defer cancel()
		_ = r.proc.KillTree(ctx)
	}()
}

func (i *instance) label(a supervise.Attempt, as origin) ([]byte, error) {
	l := label{ID: i.id, App: i.app, Began: as.began.UnixNano(), Restarts: a.Restarts, Gen: as.gen, Cluster: as.cluster, Trial: as.trial}
	if st, ok := i.sup.Status(i.name); ok {
		l.Unstable, l.LastExit = st.Unstable, exitOf(st.LastExit)
		for _, t := range st.Recent {
			l.Recent = append(l.Recent, t.UnixMilli())
		}
	}
	return json.Marshal(l)
}

// wantsIPC says whether the program is Node, for which PM2 users expect
// process.send to be there, or is told by message when to stop.
func wantsIPC(spec config.App) bool {
	if spec.Ready.Type == "ipc" || spec.Stop.Message {
		return true
	}
	return config.IsNode(spec.Interpreter)
}

// targets says where the output of a run goes.
func (i *instance) targets(spec config.App) (out, err logs.Target) {
	base := logs.Target{TimeFormat: spec.Logs.TimeFormat, JSON: spec.Logs.JSON, MaxSize: spec.Logs.MaxSize, MaxAge: spec.Logs.MaxAge.Std(), Keep: spec.Logs.Keep, Compress: spec.Logs.Compress}
	base.Shared = spec.Logs.Merge && spec.Instances > 1 || spec.Logs.Combine
	out, err = base, base
	out.Path, err.Path = i.logPaths(spec)
	return out, err
}

// logPaths are the files of an instance, with PM2's names where the user gave
// none.
func (i *instance) logPaths(spec config.App) (out, err string) {
	out, err = spec.Logs.Out, spec.Logs.Err
	dir := filepath.Join(i.d.home, "logs")
	if out == "" {
		out = filepath.Join(dir, spec.Name+"-out.log")
	}
	if spec.Logs.Combine {
		err = out
	}
	if err == "" {
		err = filepath.Join(dir, spec.Name+"-error.log")
	}
	if i.alone || spec.Logs.Merge {
		return out, err
	}
	return numbered(out, i.id), numbered(err, i.id)
}

func numbered(path string, id int) string {
	if path == "none" || path == "/dev/null" {
		return path
	}
	ext := filepath.Ext(path)
	return fmt.Sprintf("%s-%d%s", strings.TrimSuffix(path, ext), id, ext)
}

func closeAll(files []*os.File) {
	for _, f := range files {
		f.Close()
	}
}

func exitOf(e *supervise.Exit) *client.Exit {
	if e == nil {
		return nil
	}
	return &client.Exit{Code: e.Code, Signal: e.Signal, At: e.At, Cause: e.Cause, Error: e.Err}
}
