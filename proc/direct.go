package proc

import (
	"context"
	"errors"
	"fmt"
	"os"
	"runtime"
	"strconv"
	"sync"
	"syscall"

	"golang.org/x/sys/unix"
)

// Direct is a [Spawner] whose processes are children of the calling process.
// The zero value is ready to use; it must not be copied after first use. It
// waits for its own children only and can stand beside os/exec.
//
// Where no cgroup is to be had and the calling process is not child subreaper
// (prctl PR_SET_CHILD_SUBREAPER), tracing a run means reading all of /proc.
type Direct struct {
	// Tag is the instance tag in [RunVar] and in the cgroup's name: see
	// [ValidTag]. Default "direct<pid>".
	Tag string
	// DieWithParent has the kernel kill every leader with SIGKILL when the
	// calling process ends, however it ends. What a leader has started itself
	// is not killed; [SweepDead] finds it. A thread is held for it until Close.
	DieWithParent bool

	forks    chan func() // to the thread that forks, nil where any may
	forkOnce sync.Once
	once     sync.Once
	launcher *Launcher
	err      error
}

var _ Spawner = (*Direct)(nil)

func (d *Direct) init() (*Launcher, error) {
	d.once.Do(func() {
		tag := d.Tag
		if tag == "" {
			tag = "direct" + strconv.Itoa(os.Getpid())
		}
		d.launcher, d.err = NewLauncher(LauncherOptions{Tag: tag, DieWithParent: d.DieWithParent})
		if d.err == nil && d.DieWithParent {
			d.forks = make(chan func())
			go d.fork()
		}
	})
	return d.launcher, d.err
}

// fork is the thread whose children the leaders are. The kernel kills them with
// the thread, not with the process, so it must be one that lives as long.
func (d *Direct) fork() {
	runtime.LockOSThread()
	for f := range d.forks {
		f()
	}
}

// Spawn implements [Spawner].
func (d *Direct) Spawn(ctx context.Context, spec Spec) (Process, error) {
	if err := ctx.Err(); err != nil {
		return nil, err
	}
	if len(spec.Keep) > 0 {
		return nil, &SpawnError{Op: OpSpec, Err: errors.New("descriptors can be kept by the keeper only")}
	}
	l, err := d.init()
	if err != nil {
		return nil, err
	}
	fds := make([]int, len(spec.Files))
	p := &directProcess{done: make(chan struct{})}
	err = WithFDs(spec.Files, fds, func() error {
		var err error
		if d.forks == nil {
			p.tree, err = l.Launch(&spec, fds)
			return err
		}
		done := make(chan struct{})
		d.forks <- func() {
			defer close(done)
			p.tree, err = l.Launch(&spec, fds)
		}
		<-done
		return err
	})
	if err != nil {
		return nil, err
	}
	go p.wait()
	return p, nil
}

// Close removes the cgroup directories. All processes must have been released,
// and nothing may be spawned afterwards.
func (d *Direct) Close() {
	d.once.Do(func() { d.err = errors.New("proc: the spawner is closed") })
	if d.launcher != nil {
		d.launcher.Close()
	}
	if d.forks != nil {
		d.forkOnce.Do(func() { close(d.forks) })
	}
}

// WithFDs calls f while fds holds the descriptors of files, -1 for a nil one.
// The files cannot be closed meanwhile, and their blocking mode is not touched.
func WithFDs(files []*os.File, fds []int, f func() error) error {
	if len(files) == 0 {
		return f()
	}
	if files[0] == nil {
		fds[0] = -1
		return WithFDs(files[1:], fds[1:], f)
	}
	rc, err := files[0].SyscallConn()
	if err == nil {
		var inner error
		err = rc.Control(func(fd uintptr) {
			fds[0] = int(fd)
			inner = WithFDs(files[1:], fds[1:], f)
		})
		if err == nil {
			return inner
		}
	}
	return &SpawnError{Op: OpFiles, Path: files[0].Name(), Err: fmt.Errorf("not an open file: %w", err)}
}

// directProcess is a child of this process. It has one goroutine, which is
// parked in the poller until the child ends.
type directProcess struct {
	tree *Tree
	done chan struct{}
	exit Exit
}

func (p *directProcess) wait() {
	defer close(p.done)
	if p.poll() {
		return
	}
	// No pidfd here: hold a thread.
	for {
		err := waitID(unix.P_PID, p.tree.id.PID, unix.WEXITED|unix.WNOWAIT, nil)
		if e, done := p.tree.Reap(); done {
			p.exit = e
			return
		}
		if err != nil && !errors.Is(err, unix.EINTR) {
			p.exit = Exit{Code: -1}
			return
		}
	}
}

// poll waits by way of a pidfd; it reports whether that was possible.
func (p *directProcess) poll() bool {
	fd, err := unix.PidfdOpen(p.tree.id.PID, unix.PIDFD_NONBLOCK)
	if err != nil {
		return false
	}
	f := os.NewFile(uintptr(fd), "pidfd") // non-blocking, so it goes to the poller
	defer f.Close()
	rc, err := f.SyscallConn()
	if err != nil {
		return false
	}
	done := false
	err = rc.Read(func(uintptr) bool {
		p.exit, done = p.tree.Reap()
		return done
	})
	return err == nil && done
}

func (p *directProcess) ID() ID                          { return p.tree.id }
func (p *directProcess) Done() <-chan struct{}           { return p.done }
func (p *directProcess) Signal(sig syscall.Signal) error { return p.tree.SignalLeader(sig) }
func (p *directProcess) Members() ([]int, error)         { return p.tree.Members() }

func (p *directProcess) SignalTree(sig syscall.Signal) error { return p.tree.Signal(sig) }

func (p *directProcess) KillTree(ctx context.Context) error { return p.tree.Kill(ctx) }

func (p *directProcess) Exit() Exit {
	select {
	case <-p.done:
		return p.exit
	default:
		return Exit{}
	}
}

func (p *directProcess) Release() error {
	select {
	case <-p.done:
		p.tree.Remove()
		return nil
	default:
		return ErrRunning
	}
}
