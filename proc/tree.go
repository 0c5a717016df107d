package proc

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"os"
	"slices"
	"strconv"
	"sync"
	"syscall"
	"time"

	"golang.org/x/sys/unix"
)

// Tree is one run as [Launcher.Launch] started it. Its methods may be called
// concurrently.
type Tree struct {
	l   *Launcher
	id  ID
	run string // value of RunVar

	brand uint64 // soft RLIMIT_LOCKS of its processes: see brandOf
	dir   string // cgroup v2 directory, "" where the run is traced
	mem   string // cgroup directory with the memory limit, "" where there is none

	mu     sync.Mutex // keeps a signal to the leader and its reaping apart
	reaped bool
}

// ID identifies the leader.
func (t *Tree) ID() ID { return t.id }

// Reap takes the exit status of the leader if it has ended, and frees its pid;
// done is false where it still runs. Once it was done, Reap must not be called
// again.
func (t *Tree) Reap() (exit Exit, done bool) {
	var ws unix.WaitStatus
	var ru unix.Rusage
	t.mu.Lock()
	t.l.mu.Lock() // the pid leaves the table before it can be reused; see also roots
	pid, err := wait4(t.id.PID, &ws, unix.WNOHANG, &ru)
	if pid == t.id.PID || errors.Is(err, unix.ECHILD) {
		delete(t.l.leaders, t.id.PID)
		t.reaped = true
		done = true
	}
	t.l.mu.Unlock()
	t.mu.Unlock()
	if !done {
		return Exit{}, false
	}
	if err != nil { // somebody else in this process took the status
		return Exit{Code: -1, At: time.Now()}, true
	}
	exit = exitOf(ws)
	exit.User = time.Duration(ru.Utime.Nano())
	exit.Sys = time.Duration(ru.Stime.Nano())
	exit.MaxRSS = ru.Maxrss << 10
	if t.mem != "" && exit.Signal == unix.SIGKILL {
		exit.OOM = oomKills(t.mem, t.l.groups.memV1) > 0
	}
	if t.dir != "" {
		live, err := populated(t.dir)
		exit.Alone = err == nil && !live
	}
	return exit, true
}

// PeekExited waits until a child of the calling process, any child, has ended
// and returns its pid. The child stays a zombie, so that its pid cannot be
// reused before [Tree.Reap] or [Launcher.ReapStranger] is called under the caller's
// lock. The error is [syscall.ECHILD] where there is no child at all.
func PeekExited() (pid int, err error) {
	for {
		err := waitID(unix.P_ALL, 0, unix.WEXITED|unix.WNOWAIT, &pid)
		if !errors.Is(err, unix.EINTR) {
			return pid, err
		}
	}
}

// ReapStranger frees the pid of an ended child that is no run's leader: an
// orphan that this process inherited. It reports its exit.
func (l *Launcher) ReapStranger(pid int) (exit Exit, done bool) {
	l.mu.Lock() // see Tree.roots
	defer l.mu.Unlock()
	var ws unix.WaitStatus
	if n, err := wait4(pid, &ws, unix.WNOHANG, nil); err != nil || n != pid {
		return Exit{}, false
	}
	return exitOf(ws), true
}

func exitOf(ws unix.WaitStatus) Exit {
	if ws.Signaled() {
		return Exit{Code: -1, Signal: ws.Signal(), Core: ws.CoreDump(), At: time.Now()}
	}
	return Exit{Code: ws.ExitStatus(), At: time.Now()}
}

func wait4(pid int, ws *unix.WaitStatus, options int, ru *unix.Rusage) (int, error) {
	for {
		n, err := unix.Wait4(pid, ws, options, ru)
		if !errors.Is(err, unix.EINTR) {
			return n, err
		}
	}
}

// SignalLeader sends sig to the leader; [os.ErrProcessDone] once it was reaped.
func (t *Tree) SignalLeader(sig syscall.Signal) error {
	t.mu.Lock()
	defer t.mu.Unlock()
	if t.reaped {
		return os.ErrProcessDone
	}
	return signalError(syscall.Kill(t.id.PID, sig))
}

// Signal sends sig to every process of the run; [os.ErrProcessDone] where
// there is none.
func (t *Tree) Signal(sig syscall.Signal) error {
	if t.dir != "" && sig == unix.SIGKILL {
		if live, err := populated(t.dir); err == nil && !live {
			return os.ErrProcessDone
		}
		if writeFile(t.dir+"/cgroup.kill", "1") == nil {
			return nil
		}
	}
	members, err := t.members()
	if err != nil {
		return err
	}
	sent := false
	for _, id := range members {
		e := id.Signal(sig)
		switch {
		case e == nil:
			sent = true
		case errors.Is(e, os.ErrProcessDone):
		case err == nil:
			err = fmt.Errorf("pid %d: %w", id.PID, e)
		}
	}
	if !sent && err == nil {
		return os.ErrProcessDone
	}
	return err
}

// Empty reports cheaply whether nothing of the run lives.
func (t *Tree) Empty() (bool, error) {
	if t.dir != "" {
		live, err := populated(t.dir)
		return !live && err == nil, err
	}
	ids, err := t.trace()
	return len(ids) == 0 && err == nil, err
}

// Members lists the pids of the run's live processes.
func (t *Tree) Members() ([]int, error) {
	if t.dir != "" {
		return groupMembers(t.dir, nil)
	}
	ids, err := t.members()
	if err != nil {
		return nil, err
	}
	pids := make([]int, len(ids))
	for i, id := range ids {
		pids[i] = id.PID
	}
	return pids, nil
}

func (t *Tree) members() ([]ID, error) {
	if t.dir == "" {
		return t.trace()
	}
	pids, err := groupMembers(t.dir, nil)
	if err != nil {
		return nil, err
	}
	ids := make([]ID, 0, len(pids))
	for _, pid := range pids {
		if id, err := Identify(pid); err == nil {
			ids = append(ids, id)
		}
	}
	return ids, nil
}

// Kill sends SIGKILL until nothing of the run is left or ctx ends. A traced
// run is first stopped, process by process until no new one turns up, so that
// none can fork away from the signal.
func (t *Tree) Kill(ctx context.Context) error {
	if t.dir != "" {
		return t.killGroup(ctx)
	}
	return killAll(ctx, t.trace)
}

func (t *Tree) killGroup(ctx context.Context) error {
	return killGroup(ctx, t.dir)
}

// killGroup kills everything in a cgroup.
func killGroup(ctx context.Context, dir string) error {
	pause := newPause()
	for {
		live, err := populated(dir)
		if err != nil {
			return fmt.Errorf("proc: cgroup of the run: %w", err)
		}
		if !live {
			return nil
		}
		if e := writeFile(dir+"/cgroup.kill", "1"); e != nil && !gone(e) {
			return fmt.Errorf("proc: cgroup of the run: %w", e)
		} else if e != nil {
			// Linux before 5.14 has no cgroup.kill.
			pids, _ := groupMembers(dir, nil)
			for _, pid := range pids {
				_ = syscall.Kill(pid, syscall.SIGKILL)
			}
		}
		if err := pause.wait(ctx); err != nil {
			pids, _ := groupMembers(dir, nil)
			return leftError(pids, err)
		}
	}
}

func leftError(pids []int, err error) error {
	if len(pids) > 10 {
		pids = pids[:10]
	}
	return fmt.Errorf("proc: processes survive SIGKILL so far (pids %v): %w", pids, err)
}

// killAll kills what trace finds until it finds nothing.
func killAll(ctx context.Context, trace func() ([]ID, error)) error {
	pause := newPause()
	killed := make(map[ID]bool)
	for {
		ids, err := trace()
		if err != nil {
			return err
		}
		if len(ids) == 0 {
			// A process that is ending cannot be traced but is still there.
			for id := range killed {
				if id.Alive() {
					ids = append(ids, id)
				}
			}
		}
		if len(ids) == 0 {
			return nil
		}
		stopped := make(map[ID]bool, len(ids))
		for fresh, round := true, 0; fresh && round < 20; round++ {
			fresh = false
			for _, id := range ids {
				if !stopped[id] {
					stopped[id], fresh = true, true
					_ = id.Signal(unix.SIGSTOP)
				}
			}
			if fresh {
				if ids, err = trace(); err != nil {
					return err
				}
			}
		}
		denied := 0
		for id := range stopped {
			killed[id] = true
			if errors.Is(id.Signal(unix.SIGKILL), unix.EPERM) {
				denied++
			}
		}
		pids := make([]int, 0, len(ids))
		for _, id := range ids {
			pids = append(pids, id.PID)
		}
		if denied > 0 && denied == len(stopped) {
			return fmt.Errorf("proc: processes of the run have changed to another user and cannot be killed by this one (pids %v): %w", pids, unix.EPERM)
		}
		if err := pause.wait(ctx); err != nil {
			return leftError(pids, err)
		}
	}
}

// pause is a wait that grows from 100 µs to half a second, which only a process
// in uninterruptible sleep will ever see.
type pause struct{ d time.Duration }

func newPause() *pause { return &pause{100 * time.Microsecond} }

func (p *pause) wait(ctx context.Context) error {
	if err := ctx.Err(); err != nil {
		return err
	}
	timer := time.NewTimer(p.d)
	defer timer.Stop()
	p.d = min(p.d*3/2, 500*time.Millisecond)
	select {
	case <-ctx.Done():
		return ctx.Err()
	case <-timer.C:
		return nil
	}
}

// Remove removes the run's cgroup directories, unless something lives in them.
func (t *Tree) Remove() {
	if t.dir != "" {
		removeGroup(t.dir)
	}
	if t.mem != "" && t.mem != t.dir {
		removeGroup(t.mem)
	}
}

// trace finds the live processes of a run without a cgroup. They are: the
// leader; what is in its session or process group; what carries the run's mark
// in its environment, or its brand; and all descendants of these. A process
// that neither descends from a live member, nor kept session, process group or
// environment, and has set its limits anew, cannot be found.
func (t *Tree) trace() ([]ID, error) {
	if t.l.opts.Subreaper {
		ids, err := t.traceChildren()
		if !errors.Is(err, unix.ENOENT) {
			return ids, err
		}
		// The kernel was built without /proc/PID/task/TID/children.
	}
	return t.traceAll()
}

// traceChildren uses that every process of the run is a descendant of this
// process, and of the leader or of an orphan that this process inherited.
func (t *Tree) traceChildren() ([]ID, error) {
	roots, err := t.roots()
	if err != nil {
		return nil, err
	}
	var ids []ID
	for len(roots) > 0 {
		st := roots[len(roots)-1]
		roots = roots[:len(roots)-1]
		if st.live() {
			ids = append(ids, ID{PID: st.pid, Start: st.start})
		}
		below, _ := childrenOf(st.pid, nil) // it may have ended meanwhile
		for _, c := range below {
			if st, err := readStat(c); err == nil {
				roots = append(roots, st)
			}
		}
	}
	return ids, nil
}

// roots lists the children of this process that belong to the run. That it
// finds none must be beyond doubt, for then the run is over. Three things could
// hide one. The kernel's list of children is only reliable while none is taken
// off it, so nothing is reaped meanwhile. A process that was below a child
// when the list was made becomes a child when that one ends; so the list is
// made again until no child has ended since the last time. And a child that is
// just ending has no environment any more and may still have children; it is
// waited for, which takes microseconds.
func (t *Tree) roots() ([]stat, error) {
	t.l.mu.Lock()
	defer t.l.mu.Unlock()
	var dead map[int]bool
	for pass := 0; ; pass++ {
		children, err := childrenOf(os.Getpid(), nil)
		if err != nil {
			return nil, err
		}
		if t.l.leaders[t.id.PID] == t && !slices.Contains(children, t.id.PID) {
			children = append(children, t.id.PID)
		}
		var roots []stat
		again := false
		for _, pid := range children {
			leader := t.l.leaders[pid]
			if leader != nil && leader != t {
				continue // another run's: nothing of ours is below it
			}
			st, err := readStat(pid)
			if err != nil || !st.live() {
				if !dead[pid] {
					if dead == nil {
						dead = make(map[int]bool)
					}
					dead[pid], again = true, true
				}
				continue
			}
			if leader != nil || t.owns(st) {
				roots = append(roots, st)
			} else if st.exiting && pass < 20 {
				again = true
				time.Sleep(100 * time.Microsecond)
			}
		}
		if len(roots) > 0 || !again {
			return roots, nil
		}
	}
}

// traceAll reads all of /proc.
func (t *Tree) traceAll() ([]ID, error) {
	all, err := allStats()
	if err != nil {
		return nil, err
	}
	in := make(map[int]bool)
	for _, st := range all {
		if st.pid != os.Getpid() && t.owns(st) {
			in[st.pid] = true
		}
	}
	return closure(all, in, nil), nil
}

// closure lists the live ones of the processes in the set and their
// descendants, sparing some.
func closure(all []stat, in, spare map[int]bool) []ID {
	for grown := len(in) > 0; grown; {
		grown = false
		for _, st := range all {
			if !in[st.pid] && in[st.ppid] && !spare[st.pid] {
				in[st.pid], grown = true, true
			}
		}
	}
	var ids []ID
	for _, st := range all {
		if in[st.pid] && st.live() {
			ids = append(ids, ID{PID: st.pid, Start: st.start})
		}
	}
	return ids
}

// owns decides for one process by itself, without its parents.
func (t *Tree) owns(st stat) bool {
	if st.start < t.id.Start {
		return false
	}
	if st.pid == t.id.PID {
		return st.start == t.id.Start
	}
	if mark := runMark(st); mark != "" {
		return mark == t.run
	}
	return st.session == t.id.PID || st.pgrp == t.id.PID || brandedAs(st.pid) == t.brand
}

// live reports whether the process can still do something: a zombie cannot,
// unless only its main thread ended.
func (st *stat) live() bool {
	return st.state != 'X' && (st.state != 'Z' || st.threads > 1)
}

// runMark reads RunVar from the environment a process was started with; ""
// where it is not there, was overwritten or may not be read.
func runMark(st stat) string {
	if st.pid == 2 || st.ppid == 2 || !st.live() {
		return "" // kernel threads have none, zombies no longer
	}
	path := "/proc/" + strconv.Itoa(st.pid) + "/environ"
	b, err := readWhole(path, 4<<20)
	if err == nil && len(b) == 0 {
		// It has none, or it is just being executed.
		time.Sleep(time.Millisecond)
		b, _ = readWhole(path, 4<<20)
	}
	for len(b) > 0 {
		var e []byte
		if i := bytes.IndexByte(b, 0); i >= 0 {
			e, b = b[:i], b[i+1:]
		} else {
			e, b = b, nil
		}
		if v, ok := bytes.CutPrefix(e, []byte(RunVar+"=")); ok {
			return string(v)
		}
	}
	return ""
}

// childrenOf appends the children of all threads of a process.
func childrenOf(pid int, to []int) ([]int, error) {
	dir := "/proc/" + strconv.Itoa(pid) + "/task"
	tids, err := listPids(dir)
	if err != nil {
		return to, err
	}
	for i, tid := range tids {
		var e error
		if to, e = readPids(dir+"/"+strconv.Itoa(tid)+"/children", to); e != nil && i == 0 && len(tids) == 1 {
			err = e
		}
	}
	return to, err
}

func allStats() ([]stat, error) {
	pids, err := listPids("/proc")
	if err != nil {
		return nil, err
	}
	all := make([]stat, 0, len(pids))
	for _, pid := range pids {
		if st, err := readStat(pid); err == nil {
			all = append(all, st)
		}
	}
	return all, nil
}

// listPids lists the entries of a directory that are numbers.
func listPids(dir string) ([]int, error) {
	f, err := os.Open(dir)
	if err != nil {
		return nil, err
	}
	defer f.Close()
	names, err := f.Readdirnames(-1)
	if err != nil {
		return nil, err
	}
	pids := make([]int, 0, len(names))
	for _, n := range names {
		if pid, err := strconv.Atoi(n); err == nil {
			pids = append(pids, pid)
		}
	}
	return pids, nil
}
