package proc

import (
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"runtime"
	"strconv"
	"strings"
	"sync"
	"syscall"

	"golang.org/x/sys/unix"
)

// LauncherOptions configure [NewLauncher].
type LauncherOptions struct {
	// Tag is the instance tag: [ValidTag].
	Tag string
	// Subreaper says that the calling process is child subreaper (or pid 1):
	// what loses its parent becomes its child, which makes tracing exact and
	// cheap.
	Subreaper bool
	// DieWithParent has the kernel kill a leader when the thread that called
	// Launch ends: see [Direct.DieWithParent]. Runs that need a thread of their
	// own for their start (nice value, umask, a memory limit of cgroup v1) go
	// without.
	DieWithParent bool
	// MoveSelf allows the launcher to move the calling process into a leaf of
	// its own cgroup in order to enable the v2 memory controller.
	MoveSelf bool
}

// Launcher starts runs but does not wait for them: it is the mechanism under
// [Direct] and the keeper, for whoever reaps children himself. Its methods may
// be called concurrently.
type Launcher struct {
	opts    LauncherOptions
	groups  groups
	devNull int
	prefix  string // of run ids: random, so that no two launchers share one

	mu      sync.Mutex
	seq     uint64
	leaders map[int]*Tree // leaders that are not reaped yet
}

// NewLauncher finds out what the machine offers and creates the instance's
// cgroup directories where it can. Only an invalid tag or the lack of
// /dev/null is an error.
func NewLauncher(opts LauncherOptions) (*Launcher, error) {
	if !ValidTag(opts.Tag) {
		return nil, fmt.Errorf("proc: instance tag %q: want 1 to 40 of A-Z a-z 0-9 . _ and no dot first", clip(opts.Tag))
	}
	null, err := openRetry("/dev/null", unix.O_RDWR)
	if err != nil {
		return nil, &os.PathError{Op: "open", Path: "/dev/null", Err: err}
	}
	var rnd [6]byte
	if _, err := unix.Getrandom(rnd[:], 0); err != nil {
		_ = unix.Close(null)
		return nil, fmt.Errorf("proc: no random numbers: %w", err)
	}
	return &Launcher{
		opts:    opts,
		groups:  setupGroups(opts.Tag, opts.MoveSelf),
		devNull: null,
		prefix:  fmt.Sprintf("%x.", rnd),
		leaders: make(map[int]*Tree),
	}, nil
}

// Describe says in a sentence each how runs are tracked and where memory
// limits come from: "cgroup v2 at …", "none: …".
func (l *Launcher) Describe() (tree, memory string) { return l.groups.describe() }

func (g *groups) describe() (tree, memory string) {
	tree = "cgroup v2 at " + g.tree
	if g.tree == "" {
		tree = "none: " + g.treeWhy + "; processes are traced by parent, session, environment and brand"
	}
	switch {
	case g.mem == "":
		memory = "none: " + g.memWhy
	case g.memV1:
		memory = "cgroup v1 memory controller at " + g.mem
	default:
		memory = "cgroup v2 memory controller at " + g.mem
	}
	return tree, memory
}

// Memory reports whether [Spec.MemoryMax] can be enforced.
func (l *Launcher) Memory() bool { return l.groups.mem != "" }

// Close removes the instance's cgroup directories as far as they are empty
// and releases descriptors. Trees must not be used afterwards.
func (l *Launcher) Close() {
	if l.groups.tree != "" {
		removeGroup(l.groups.tree)
	}
	if l.groups.mem != "" {
		removeGroup(l.groups.mem)
	}
	_ = unix.Close(l.devNull)
}

// Launch starts spec's program in a session, and where it can a cgroup, of its
// own. fds are the child's descriptors 0, 1, 2, …, where a negative one and
// missing ones among the first three are /dev/null; they stay the caller's.
// Pipes and terminals among them are set to blocking mode, which is what
// programs expect of their standard streams. Spec.Files, Spec.Keep and
// Spec.Label are not looked at.
//
// The caller must reap the leader with [Tree.Reap] and nothing else.
func (l *Launcher) Launch(spec *Spec, fds []int) (*Tree, error) {
	if err := spec.Validate(); err != nil {
		return nil, err
	}
	l.mu.Lock()
	l.seq++
	unique := l.prefix + strconv.FormatUint(l.seq, 36)
	l.mu.Unlock()

	t := &Tree{l: l, run: l.opts.Tag + "-" + unique}
	t.brand = brandOf(l.opts.Tag, unique)
	if spec.MemoryMax > 0 {
		if err := l.makeMemory(t, spec, unique); err != nil {
			return nil, err
		}
	}
	if t.dir == "" && l.groups.tree != "" {
		// Where the directory cannot be had after all (a limit on their
		// number, say) the run is traced.
		t.dir = makeRunDir(l.groups.tree, spec.Key+"-"+unique)
	}

	pid, err := l.start(t, spec, fds)
	if err != nil {
		t.Remove()
		return nil, err
	}
	st, err := readStat(pid)
	if err != nil { // /proc hides it or is not mounted: the pid has to do
		st = stat{}
	}
	t.id = ID{PID: pid, Start: st.start}
	l.mu.Lock()
	l.leaders[pid] = t
	l.mu.Unlock()
	return t, nil
}

// makeRunDir creates a fresh directory below parent; "" where it cannot.
func makeRunDir(parent, name string) string {
	dir := filepath.Join(parent, name)
	err := unix.Mkdir(dir, 0o755)
	if err == unix.ENOENT && mkdir(parent) == nil { // somebody removed the empty parent
		err = unix.Mkdir(dir, 0o755)
	}
	if err != nil {
		return ""
	}
	return dir
}

// makeMemory creates the directory that enforces the memory limit.
func (l *Launcher) makeMemory(t *Tree, spec *Spec, unique string) error {
	g := &l.groups
	if g.mem == "" {
		return &SpawnError{Op: OpMemory, Err: fmt.Errorf("a memory limit is asked for, but there is %s", g.memWhy)}
	}
	dir := makeRunDir(g.mem, spec.Key+"-"+unique)
	if dir == "" {
		return &SpawnError{Op: OpMemory, Path: g.mem, Err: errors.New("cannot create a memory cgroup there")}
	}
	file := "memory.max"
	if g.memV1 {
		file = "memory.limit_in_bytes"
	}
	if err := writeFile(filepath.Join(dir, file), strconv.FormatInt(spec.MemoryMax, 10)); err != nil {
		_ = unix.Rmdir(dir)
		return &SpawnError{Op: OpMemory, Path: filepath.Join(dir, file), Err: fmt.Errorf("cannot set the memory limit to %d bytes: %w", spec.MemoryMax, err)}
	}
	t.mem = dir
	if !g.memV1 {
		t.dir = dir // one directory serves both ends
	}
	return nil
}

// start forks and executes; it returns the pid.
func (l *Launcher) start(t *Tree, spec *Spec, fds []int) (int, error) {
	files := make([]uintptr, 0, max(3, len(fds)))
	for _, fd := range fds {
		if fd < 0 {
			fd = l.devNull
		} else {
			setBlocking(fd)
		}
		files = append(files, uintptr(fd))
	}
	for len(files) < 3 {
		files = append(files, uintptr(l.devNull))
	}
	args := spec.Args
	if len(args) == 0 {
		args = []string{spec.Path}
	}
	env := make([]string, 1, len(spec.Env)+1)
	env[0] = RunVar + "=" + t.run
	for _, e := range spec.Env {
		if !strings.HasPrefix(e, RunVar+"=") {
			env = append(env, e)
		}
	}
	sys := &syscall.SysProcAttr{Setsid: true}
	if c := spec.Credential; c != nil && !alreadyIs(c) {
		sys.Credential = &syscall.Credential{Uid: c.UID, Gid: c.GID, Groups: c.Groups}
	}
	attr := &syscall.ProcAttr{Dir: spec.Dir, Env: env, Files: files, Sys: sys}
	if attr.Dir == "" {
		attr.Dir = "/"
	}
	if t.dir != "" {
		fd, err := openRetry(t.dir, unix.O_RDONLY|unix.O_DIRECTORY)
		if err != nil {
			return 0, &SpawnError{Op: OpCgroup, Path: t.dir, Err: err}
		}
		defer func() { _ = unix.Close(fd) }()
		sys.UseCgroupFD, sys.CgroupFD = true, fd
	}

	fork := func() (int, error) {
		pid, err := forkExec(spec.Path, args, attr, t.brand)
		if err == nil {
			return pid, nil
		}
		serr, sure := diagnose(spec, err)
		if !sure && sys.UseCgroupFD && t.mem != t.dir {
			// It may be the cgroup that the kernel did not like: trace instead.
			sys.UseCgroupFD = false
			if pid, err = forkExec(spec.Path, args, attr, t.brand); err == nil {
				removeGroup(t.dir)
				t.dir = ""
				return pid, nil
			}
		}
		return 0, serr
	}
	memV1 := t.mem != "" && l.groups.memV1
	if spec.Nice == 0 && spec.Umask == nil && !memV1 {
		if l.opts.DieWithParent {
			sys.Pdeathsig = unix.SIGKILL
		}
		return fork()
	}

	// Nice value, umask and v1 cgroup belong to a thread, and a child inherits
	// them from the thread that forks: so a thread of its own takes them on,
	// forks, and ends. Nothing races with the child and nothing has to be
	// undone, which an ordinary user could not do for the nice value.
	var pid int
	var err error
	onOwnThread(func() {
		if spec.Nice != 0 {
			if e := unix.Setpriority(unix.PRIO_PROCESS, 0, spec.Nice); e != nil {
				err = &SpawnError{Op: OpNice, Err: fmt.Errorf("cannot set the nice value %d: %w", spec.Nice, e)}
				return
			}
		}
		if memV1 {
			if e := writeFile(t.mem+"/tasks", strconv.Itoa(unix.Gettid())); e != nil {
				err = &SpawnError{Op: OpMemory, Path: t.mem, Err: fmt.Errorf("cannot enter the memory cgroup: %w", e)}
				return
			}
		}
		if spec.Umask != nil {
			if e := unix.Unshare(unix.CLONE_FS); e != nil {
				// A seccomp filter forbids it: then the umask is the whole
				// process's for the moment of the fork.
				umaskLock.Lock()
				defer umaskLock.Unlock()
				defer unix.Umask(unix.Umask(*spec.Umask))
			} else {
				unix.Umask(*spec.Umask)
			}
		}
		pid, err = fork()
	})
	return pid, err
}

// umaskLock guards the umask of the process, which is one per process whatever
// the number of launchers.
var umaskLock sync.Mutex

// onOwnThread runs f on an operating-system thread that ends afterwards and is
// not the main thread, which cannot end.
func onOwnThread(f func()) {
	done := make(chan struct{})
	go func() {
		defer close(done)
		runtime.LockOSThread()
		if unix.Gettid() == os.Getpid() {
			// Hold the main thread, so that the next goroutine is on another.
			onOwnThread(f)
			runtime.UnlockOSThread()
			return
		}
		f() // the thread ends because it is never unlocked
	}()
	<-done
}

// alreadyIs reports whether an ordinary user asks for what it is anyway, which
// the kernel would refuse to "change" for want of privilege.
func alreadyIs(c *Credential) bool {
	return os.Geteuid() != 0 && int(c.UID) == os.Getuid() && int(c.UID) == os.Geteuid() &&
		int(c.GID) == os.Getgid() && int(c.GID) == os.Getegid() && len(c.Groups) == 0
}

// setBlocking clears O_NONBLOCK on pipes and character devices.
func setBlocking(fd int) {
	var st unix.Stat_t
	if unix.Fstat(fd, &st) != nil || st.Mode&unix.S_IFMT != unix.S_IFIFO && st.Mode&unix.S_IFMT != unix.S_IFCHR {
		return
	}
	fl, err := unix.FcntlInt(uintptr(fd), unix.F_GETFL, 0)
	if err == nil && fl&unix.O_NONBLOCK != 0 {
		_, _ = unix.FcntlInt(uintptr(fd), unix.F_SETFL, fl&^unix.O_NONBLOCK)
	}
}
