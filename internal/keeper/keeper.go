package keeper

import (
	"cmp"
	"context"
	"errors"
	"fmt"
	"math"
	"os"
	"os/signal"
	"path/filepath"
	"strings"
	"sync"
	"syscall"
	"time"

	"golang.org/x/sys/unix"

	"github.com/remuda-dev/remuda/proc"
)

// EnvFD is the environment variable that tells the controller the number of
// its socket.
const EnvFD = "REMUDA_KEEPER_FD"

// Command is a program to run.
type Command struct {
	Path string   // absolute
	Args []string // Args[0] included; empty means {Path}
	Env  []string // nil: the keeper's own; what the service manager meant for the keeper is left out
}

// Options configure [Run]. Controller.Path and Tag are required.
type Options struct {
	Controller Command
	// Tag names the instance (one daemon home): [proc.ValidTag]. Two keepers
	// with one tag must never run at once; the caller holds the lock.
	Tag string
	// Log takes the keeper's own lines and the controller's stdout and
	// stderr; nil is the keeper's stderr. A line is dropped rather than waited
	// with where it cannot be written at once.
	Log *os.File
	// Hello is how long a controller may take to connect before it is killed;
	// 0 is 15 s.
	Hello time.Duration
}

// The patience of the keeper.
const (
	firstDelay  = 50 * time.Millisecond // before a controller that failed is started again; it doubles
	mostDelay   = 5 * time.Second
	helloTime   = 15 * time.Second // for a controller to connect
	quickDeath  = time.Second      // an exit with an error sooner than this counts as failing
	lingerTime  = 5 * time.Second  // for a controller that has lost or ended its connection to exit
	orphanTime  = 10 * time.Second // how long a SIGTERM waits for a controller
	killTime    = 10 * time.Second // for everything to die at the end
	trimAfter   = 10 * time.Second // from the last message to giving memory back
	trialDeaths = 2                // of a replacement controller before the old one is taken again
)

// keeper is the state of the process. mu guards all of it; it is held while a
// process is started and while one is reaped, so that no exit falls between
// and no signal reaches a reused pid.
type keeper struct {
	opts     Options
	logFD    int
	launcher *proc.Launcher
	id       proc.ID
	started  time.Time
	cgroup   string
	memory   string

	mu      sync.Mutex
	runs    map[uint64]*run
	byPID   map[int]*run // leaders that are not reaped
	lastRun uint64
	stored  map[string]storedFD

	ctl     controller
	starts  int      // controllers started
	next    *Command // what the next controller is to be
	old     *Command // what to go back to while the present one is on trial
	deaths  int      // of the one on trial
	notice  string
	closing bool

	// To the main loop. All are buffered for one and none is waited with but
	// the first, whose reader is always there.
	exited   chan controllerExit
	hello    chan struct{}
	lost     chan struct{} // the connection ended
	shutdown chan shutdownRequest
	active   chan struct{} // something was done: memory may have to be given back
	born     chan struct{} // a child was started: the reaper may wait again

	manager manager
}

// run is one process that was spawned and not forgotten. It must stay small.
type run struct {
	num     uint64
	tree    *proc.Tree
	key     string
	label   []byte
	kept    []keptFD
	exit    *proc.Exit
	told    *connection // the connection that knows of the run, to be told of its exit
	killers []killer    // who waits for its tree to be killed
	killing bool
}

type keptFD struct {
	name string
	fd   int
}

type killer struct {
	c   *connection
	seq uint32
}

type storedFD struct {
	label []byte
	fd    int
}

// controller is the present controller process.
type controller struct {
	pid     int // 0 where there is none
	cmd     Command
	started time.Time
	conn    *connection
	hello   bool
}

type controllerExit struct {
	exit    proc.Exit
	ctl     controller
	drained chan struct{} // closed when all that it sent has been handled
}

type shutdownRequest struct {
	c     *connection
	seq   uint32
	force bool
}

// Run is the keeper process: it starts with a [proc.Sweep] of what an earlier
// keeper of the same tag left, becomes child subreaper, starts the controller,
// and returns when a controller asked for shutdown (nil), when ctx ended (the
// processes are then killed), or with an error if it could not begin. It takes
// over signals and child reaping of the whole process: nothing else in the
// process may start or wait for children, and the process should end soon
// after Run returned.
//
// SIGTERM, SIGINT and SIGHUP are passed on to the controller, which decides.
// Where there is none to be had for 10 s, SIGTERM and SIGINT end everything.
//
// NOTIFY_SOCKET, WATCHDOG_USEC and WATCHDOG_PID are taken out of the
// environment: the keeper speaks with the service manager.
func Run(ctx context.Context, opts Options) error {
	if !filepath.IsAbs(opts.Controller.Path) {
		return fmt.Errorf("keeper: the controller's program %q is not an absolute path", opts.Controller.Path)
	}
	k := &keeper{
		opts:     opts,
		logFD:    2,
		runs:     make(map[uint64]*run),
		byPID:    make(map[int]*run),
		stored:   make(map[string]storedFD),
		started:  time.Now(),
		exited:   make(chan controllerExit, 1),
		hello:    make(chan struct{}, 1),
		lost:     make(chan struct{}, 1),
		shutdown: make(chan shutdownRequest, 1),
		active:   make(chan struct{}, 1),
		born:     make(chan struct{}, 1),
	}
	if opts.Log != nil {
		rc, err := opts.Log.SyscallConn()
		if err == nil {
			// The keeper's log is open as long as the keeper runs.
			err = rc.Control(func(fd uintptr) { k.logFD = int(fd) })
		}
		if err != nil {
			return fmt.Errorf("keeper: log: %w", err)
		}
	}
	// Descriptors that this process was started with and does not know of must
	// not reach every process it starts.
	_ = unix.CloseRange(3, math.MaxUint32, unix.CLOSE_RANGE_CLOEXEC)
	k.manager = newManager()
	if err := os.Unsetenv(proc.RunVar); err != nil {
		return fmt.Errorf("keeper: environment: %w", err)
	}
	if opts.Controller.Env == nil {
		k.opts.Controller.Env = os.Environ()
	}
	k.ctl.cmd = k.opts.Controller

	var err error
	if k.id, err = proc.Identify(os.Getpid()); err != nil {
		return fmt.Errorf("keeper: %w", err)
	}
	if killed, err := proc.Sweep(ctx, opts.Tag); err != nil {
		k.logf("what an earlier keeper left could not all be ended: %v", err)
	} else if killed > 0 {
		k.logf("ended %d processes that an earlier keeper left", killed)
	}
	if os.Getpid() != 1 {
		if err := unix.Prctl(unix.PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0); err != nil {
			return fmt.Errorf("keeper: becoming child subreaper: %w", err)
		}
	}
	k.launcher, err = proc.NewLauncher(proc.LauncherOptions{Tag: opts.Tag, Subreaper: true, MoveSelf: true})
	if err != nil {
		return fmt.Errorf("keeper: %w", err)
	}
	k.cgroup, k.memory = k.launcher.Describe()

	// Caught, so that they neither end the keeper nor are ignored by its
	// children (a handler is reset by exec, an ignored signal is not).
	signals := make(chan os.Signal, 16)
	signal.Notify(signals, unix.SIGTERM, unix.SIGINT, unix.SIGHUP, unix.SIGUSR1, unix.SIGUSR2)
	defer signal.Stop(signals)

	tune()
	go k.reap()
	return k.loop(ctx, signals)
}

// loop is the main goroutine: it owns the controller's life.
func (k *keeper) loop(ctx context.Context, signals <-chan os.Signal) error {
	restart := time.NewTimer(0) // starts the first one, too
	hello := stoppedTimer()     // a controller has to connect
	linger := stoppedTimer()    // a controller without a connection has to exit
	orphan := stoppedTimer()    // a signal waits for a controller
	trim := stoppedTimer()
	watchdog := k.manager.ticker()
	failures, trimming, hung := 0, false, false
	var waiting os.Signal // that no controller has got yet

	for {
		select {
		case <-ctx.Done():
			return k.end()

		case <-restart.C:
			if err := k.startController(); err != nil {
				k.logf("the controller cannot be started: %v", err)
				failures++
				k.failedTrial(err.Error(), false)
				restart.Reset(delay(failures))
				break
			}
			hung = false
			hello.Reset(cmp.Or(k.opts.Hello, helloTime))

		case x := <-k.exited:
			linger.Stop()
			hello.Stop()
			<-x.drained
			wait := time.Duration(0)
			switch lived := x.exit.At.Sub(x.ctl.started); {
			case !x.ctl.hello, x.exit.Signal == 0 && x.exit.Code != 0 && lived < quickDeath:
				failures++
				wait = delay(failures)
				switch {
				case x.ctl.hello:
				case hung:
					k.failedTrial("it runs, but does not connect", true)
				default:
					k.failedTrial(x.exit.String(), false)
				}
			case lived < firstDelay:
				wait = firstDelay // a loop, and not a person with kill -9
			default:
				failures = 0
			}
			if x.exit.Code != 0 {
				k.logf("the controller (pid %d) ended: %v", x.ctl.pid, x.exit)
			}
			restart.Reset(wait)

		case <-k.hello:
			hello.Stop()
			failures = 0
			if waiting != nil && k.forward(waiting) {
				waiting = nil
				orphan.Stop()
			}

		case <-hello.C:
			k.mu.Lock()
			hung = !k.ctl.hello
			k.mu.Unlock()
			if hung {
				k.logf("the controller does not connect: killing it")
				k.signalController(unix.SIGKILL)
			}

		case <-k.lost:
			linger.Reset(lingerTime)

		case <-linger.C:
			k.logf("the controller has no connection and does not exit: killing it")
			k.signalController(unix.SIGKILL)

		case sig := <-signals:
			if sig == unix.SIGUSR1 || sig == unix.SIGUSR2 || k.forward(sig) {
				break
			}
			if waiting == nil {
				orphan.Reset(orphanTime)
			}
			if waiting == nil || waiting == unix.SIGHUP {
				waiting = sig
			}

		case <-orphan.C:
			if waiting != unix.SIGHUP {
				k.logf("no controller answers to %v: ending everything", waiting)
				return k.end()
			}
			waiting = nil

		case req := <-k.shutdown:
			k.logf("shutting down")
			if req.force {
				k.killEverything()
			}
			k.mu.Lock()
			req.c.send(&message{kind: kindOK, seq: req.seq})
			// A controller that does not read is not waited for.
			_ = req.c.file.SetWriteDeadline(time.Now().Add(lingerTime))
			req.c.flush(0)
			req.c.close()
			k.mu.Unlock()
			k.endController(lingerTime)
			k.launcher.Close()
			return nil

		case <-k.active:
			if !trimming {
				trimming = true
				trim.Reset(trimAfter)
			}

		case <-trim.C:
			trimming = false
			GiveBack()

		case <-watchdog:
			k.manager.notify("WATCHDOG=1")
		}
	}
}

func stoppedTimer() *time.Timer {
	t := time.NewTimer(time.Hour)
	t.Stop()
	return t
}

func delay(failures int) time.Duration {
	return min(firstDelay<<min(failures-1, 10), mostDelay)
}

// startController starts the controller with one end of a socket.
func (k *keeper) startController() error {
	k.mu.Lock()
	defer k.mu.Unlock()
	if k.next != nil {
		if k.old == nil {
			old := k.ctl.cmd
			k.old, k.deaths = &old, 0
		}
		k.ctl.cmd, k.next = *k.next, nil
	}
	cmd := k.ctl.cmd
	pair, err := unix.Socketpair(unix.AF_UNIX, unix.SOCK_SEQPACKET|unix.SOCK_CLOEXEC|unix.SOCK_NONBLOCK, 0)
	if err != nil {
		return fmt.Errorf("socket pair: %w", err)
	}
	defer func() { _ = unix.Close(pair[1]) }()
	c, err := newConnection(k, pair[0])
	if err != nil {
		return err
	}
	null, err := unix.Open("/dev/null", unix.O_RDWR|unix.O_CLOEXEC, 0)
	if err != nil {
		c.close()
		return fmt.Errorf("/dev/null: %w", err)
	}
	defer func() { _ = unix.Close(null) }()
	out, errOut := uintptr(k.logFD), uintptr(k.logFD)
	if k.opts.Log == nil {
		out = 1
	}
	env := make([]string, 0, len(cmd.Env)+1)
	for _, e := range cmd.Env {
		if name, _, _ := strings.Cut(e, "="); name != EnvFD && !ofManager(name) {
			env = append(env, e)
		}
	}
	args := cmd.Args
	if len(args) == 0 {
		args = []string{cmd.Path}
	}
	pid, err := syscall.ForkExec(cmd.Path, args, &syscall.ProcAttr{
		Env:   append(env, EnvFD+"=3"),
		Files: []uintptr{uintptr(null), out, errOut, uintptr(pair[1])},
		// A process group of its own: what a terminal sends to the keeper's
		// reaches the controller once, by way of the keeper. It has no death
		// signal: it has to survive a dead keeper to clean up.
		Sys: &syscall.SysProcAttr{Setpgid: true},
	})
	if err != nil {
		c.close()
		return fmt.Errorf("%s: %w", cmd.Path, err)
	}
	k.ctl = controller{pid: pid, cmd: cmd, started: time.Now(), conn: c}
	k.starts++
	go k.serve(c)
	k.wakeReaper()
	return nil
}

// failedTrial counts a death of a controller before hello; a replacement that
// keeps dying, or does what is no use to try again, is given up for the program
// before it.
func (k *keeper) failedTrial(why string, hopeless bool) {
	k.mu.Lock()
	defer k.mu.Unlock()
	if k.old == nil {
		return
	}
	if k.deaths++; k.deaths < trialDeaths && !hopeless {
		return
	}
	k.notice = fmt.Sprintf("the new controller %s did not come up (%s); back to %s", k.ctl.cmd.Path, why, k.old.Path)
	k.ctl.cmd, k.old = *k.old, nil
	k.logf("%s", k.notice)
}

func (k *keeper) signalController(sig syscall.Signal) {
	k.mu.Lock()
	defer k.mu.Unlock()
	if k.ctl.pid > 0 {
		_ = syscall.Kill(k.ctl.pid, sig) // not reaped, so it is still that process
	}
}

// forward passes a signal on to a controller that has said hello, and so
// handles signals; it reports whether there is one.
func (k *keeper) forward(sig os.Signal) bool {
	k.mu.Lock()
	defer k.mu.Unlock()
	s, ok := sig.(syscall.Signal)
	return ok && k.ctl.pid > 0 && k.ctl.hello && syscall.Kill(k.ctl.pid, s) == nil
}

// end kills everything, the controller included.
func (k *keeper) end() error {
	k.mu.Lock()
	k.closing = true
	k.mu.Unlock()
	k.killEverything()
	k.signalController(unix.SIGTERM)
	k.endController(lingerTime)
	k.launcher.Close()
	return nil
}

// endController waits for the controller to exit, and then makes it.
func (k *keeper) endController(patience time.Duration) {
	for _, sig := range []syscall.Signal{unix.SIGTERM, unix.SIGKILL, 0} {
		k.mu.Lock()
		there := k.ctl.pid > 0
		k.mu.Unlock()
		if !there {
			return
		}
		select {
		case <-k.exited:
			return
		case <-time.After(patience):
			if sig != 0 {
				k.signalController(sig)
			}
		}
	}
}

// killEverything kills all runs, a few at a time.
func (k *keeper) killEverything() {
	ctx, cancel := context.WithTimeout(context.Background(), killTime)
	defer cancel()
	k.mu.Lock()
	trees := make([]*proc.Tree, 0, len(k.runs))
	for _, r := range k.runs {
		trees = append(trees, r.tree)
	}
	k.mu.Unlock()
	// All are told to die before any is waited for.
	for _, t := range trees {
		_ = t.Signal(unix.SIGKILL)
	}
	for _, t := range trees {
		if err := t.Kill(ctx); err != nil {
			k.logf("%v", err)
		}
		t.Remove()
	}
}

func (k *keeper) wakeReaper() {
	select {
	case k.born <- struct{}{}:
	default:
	}
}

func (k *keeper) touch() {
	select {
	case k.active <- struct{}{}:
	default:
	}
}

// reap is the goroutine that waits for children. It first looks who has ended
// and only reaps under the lock: until then the pid cannot be reused.
func (k *keeper) reap() {
	for {
		pid, err := proc.PeekExited()
		if errors.Is(err, unix.ECHILD) {
			<-k.born
			continue
		}
		if err != nil {
			k.logf("waiting for children: %v", err)
			time.Sleep(firstDelay)
			continue
		}
		k.mu.Lock()
		switch r := k.byPID[pid]; {
		case r != nil:
			if exit, done := r.tree.Reap(); done {
				delete(k.byPID, pid)
				r.exit = &exit
				k.tellExit(r)
			}
		case pid == k.ctl.pid:
			if exit, done := k.launcher.ReapStranger(pid); done {
				ctl := k.ctl
				k.ctl = controller{cmd: ctl.cmd}
				k.exited <- controllerExit{exit: exit, ctl: ctl, drained: ctl.conn.ended}
				ctl.conn.peerDead()
			}
		default:
			k.launcher.ReapStranger(pid)
		}
		k.mu.Unlock()
		k.touch()
	}
}

// tellExit tells the present controller, if it knows of the run; another will
// find the exit in the inventory.
func (k *keeper) tellExit(r *run) {
	if r.told == nil || r.told != k.ctl.conn {
		return
	}
	var e encoder
	e.u64(r.num)
	encodeExit(&e, r.exit)
	r.told.send(&message{kind: kindExit, body: e.b})
}

// logf writes a line to the log, if that is possible at once.
func (k *keeper) logf(format string, args ...any) {
	p := []unix.PollFd{{Fd: int32(k.logFD), Events: unix.POLLOUT}}
	if n, err := unix.Poll(p, 0); err != nil || n != 1 || p[0].Revents&unix.POLLOUT == 0 {
		return
	}
	// Not by an os.File: a broken pipe at descriptor 2 would end the process.
	_, _ = unix.Write(k.logFD, []byte(time.Now().Format("2006-01-02T15:04:05.000Z07:00")+" keeper: "+fmt.Sprintf(format, args...)+"\n"))
}
