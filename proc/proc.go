// Package proc starts processes, waits for them and signals the whole tree of
// what they started.
//
// A run is one started process (the leader) with everything that descends from
// it. Every leader gets a session of its own and, where one can be had, a fresh
// cgroup v2 directory, so that children which call setsid or fork twice still
// belong to the run. Where no cgroup is to be had a run's processes are traced
// by parent, session, process group and the environment variable [RunVar].
// cgroup files are read and written plainly: the usual library for it costs
// 5 MB of resident memory and 51 modules for six files.
//
// There are two implementations of [Spawner]: [Direct], which starts children
// of the calling process, and the client of the keeper process, whose children
// outlive the program that asked for them. Both stand on [Launcher].
//
// Invariant: a process is known by pid and start time, never by pid alone; no
// signal is sent to a pid that may have been reused.
//
// The package must never know restart policy, configuration files, log formats
// or anything of the floors above it.
package proc

import (
	"context"
	"errors"
	"fmt"
	"os"
	"strings"
	"syscall"
	"time"
)

// RunVar is the environment variable that marks every process of a run. Its
// value is "<instance tag>-<unique>"; a value given in [Spec.Env] is replaced.
const RunVar = "REMUDA_RUN"

// Bounds of a [Spec]. A spec that exceeds one is refused with a [SpawnError]
// whose Op is [OpSpec].
const (
	MaxLabel = 64 << 10 // bytes of Spec.Label
	MaxFiles = 100      // entries of Spec.Files
	MaxKeep  = 100      // entries of Spec.Keep
	MaxKey   = 100      // bytes of Spec.Key and of a name in Spec.Keep
)

// Credential is the identity a process runs under. Groups are the
// supplementary groups; none is set where it is empty.
type Credential struct {
	UID    uint32
	GID    uint32
	Groups []uint32
}

// Spec says what to start and how. Key and Path are required; everything else
// has a useful zero value. Spawn does not keep a reference to it.
type Spec struct {
	// Key names the run: unique among live runs by convention of the caller,
	// [A-Za-z0-9._-]{1,100}, not starting with a dot. It is part of the name
	// of the cgroup directory.
	Key string
	// Path is the program, absolute. Whoever wants a look-up in PATH does it.
	Path string
	// Args is the whole argument vector, Args[0] included; empty means
	// {Path}.
	Args []string
	// Env is the whole environment as KEY=value; nothing is inherited.
	// [RunVar] is added.
	Env []string
	// Dir is the working directory, absolute; "" means "/".
	Dir string
	// Credential: nil keeps the spawning process's identity.
	Credential *Credential
	// Umask: nil inherits the spawning process's.
	Umask *int
	// Nice is set as the nice value, -20 … 19; 0 inherits.
	Nice int
	// Files are the child's descriptors 0, 1, 2, …; nil entries, and missing
	// ones among the first three, are /dev/null. The caller keeps ownership
	// and may close its copies when Spawn has returned.
	Files []*os.File
	// Keep are descriptors stored beside the process, under names, and handed
	// to the next controller (keeper only; [Direct] refuses them). The caller
	// keeps ownership of its copies.
	Keep map[string]*os.File
	// Label is opaque, at most [MaxLabel] bytes, kept with the process and
	// handed back by the inventory.
	Label []byte
	// MemoryMax is a hard limit in bytes that the kernel's memory controller
	// (v2 or v1) enforces on the whole run; 0 is none. Spawn fails with
	// [OpMemory] where no memory controller can be had: see
	// [Launcher.Memory].
	MemoryMax int64
}

// Spawner starts processes. Its methods may be called concurrently.
type Spawner interface {
	// Spawn starts the program and returns when it has been executed, so
	// that a missing file and the like are Spawn's error, a *[SpawnError].
	// ctx bounds the call, not the life of the process; if it ends first,
	// nothing of the run is left behind.
	Spawn(ctx context.Context, spec Spec) (Process, error)
}

// Process is one run: a leader and everything that descends from it. Its
// methods may be called concurrently.
type Process interface {
	// ID identifies the leader.
	ID() ID
	// Done is closed when the leader's exit is known. Descendants may live on.
	Done() <-chan struct{}
	// Exit says how the leader ended; valid after Done.
	Exit() Exit
	// Signal sends sig to the leader; [os.ErrProcessDone] after its exit.
	Signal(sig syscall.Signal) error
	// SignalTree sends sig to every process of the run; [os.ErrProcessDone]
	// where there is none. A process that forks at that very moment may have a
	// child that misses it: KillTree is the call that leaves nothing.
	SignalTree(sig syscall.Signal) error
	// KillTree sends SIGKILL until nothing of the run is left, or ctx ends.
	// Where nothing is left it costs some tens of microseconds.
	KillTree(ctx context.Context) error
	// Members lists the pids of the run's live processes.
	Members() ([]int, error)
	// Release forgets the run after Done: kept descriptors are closed, the
	// cgroup removed. It is an error ([ErrRunning]) while the leader lives;
	// what else of the run lives is left alone and no longer known.
	Release() error
}

// ErrRunning is returned by Release while the leader lives.
var ErrRunning = errors.New("proc: the process is still running")

// Exit is how a leader ended.
type Exit struct {
	Code   int            `json:"code"`             // exit code; -1 where a signal ended it
	Signal syscall.Signal `json:"signal,omitempty"` // 0 where it exited by itself
	Core   bool           `json:"core,omitempty"`   // it dumped core
	OOM    bool           `json:"oom,omitempty"`    // the kernel killed a process of the run for want of memory
	At     time.Time      `json:"at"`
	User   time.Duration  `json:"user"`
	Sys    time.Duration  `json:"sys"`
	MaxRSS int64          `json:"max_rss"` // bytes, the largest of the leader and its waited-for children
	// Alone says that nothing else of the run was left by then, so that there
	// is nothing for KillTree to do. False also means that it is not known.
	Alone bool `json:"alone,omitempty"`
}

// Ok reports whether the process exited by itself with code 0.
func (e Exit) Ok() bool { return e.Code == 0 && e.Signal == 0 }

// String is "exit code 3", "killed by SIGSEGV (core dumped)", "killed by
// SIGKILL (out of memory)".
func (e Exit) String() string {
	if e.Signal == 0 {
		return fmt.Sprintf("exit code %d", e.Code)
	}
	s := "killed by " + signalName(e.Signal)
	if e.Core {
		s += " (core dumped)"
	}
	if e.OOM {
		s += " (out of memory)"
	}
	return s
}

// The steps a [SpawnError] names.
const (
	OpSpec       = "spec"       // the Spec itself is invalid
	OpChdir      = "chdir"      // Spec.Dir
	OpExec       = "exec"       // Spec.Path
	OpCredential = "credential" // Spec.Credential
	OpNice       = "nice"       // Spec.Nice
	OpMemory     = "memory"     // Spec.MemoryMax
	OpCgroup     = "cgroup"     // creating the run's cgroup
	OpFork       = "fork"       // no process or no memory to be had
	OpFiles      = "files"      // descriptors
)

// SpawnError says why a process was not started. Err is or wraps the
// [syscall.Errno] where there is one.
type SpawnError struct {
	Op   string // one of the Op constants
	Path string // the file or directory concerned, "" where none is
	Err  error
}

func (e *SpawnError) Error() string {
	if e.Path == "" {
		return fmt.Sprintf("cannot start (%s): %v", e.Op, e.Err)
	}
	return fmt.Sprintf("cannot start %s: %v", quote(e.Path), e.Err)
}

// Unwrap returns Err.
func (e *SpawnError) Unwrap() error { return e.Err }

// Reason is an error text that stands for an errno. It is what SpawnError.Err
// holds where the bare errno's text would say too little.
type Reason struct {
	Text  string
	Errno syscall.Errno // 0 where there is none
}

func (r *Reason) Error() string { return r.Text }

// Unwrap returns the errno, nil where there is none.
func (r *Reason) Unwrap() error {
	if r.Errno == 0 {
		return nil
	}
	return r.Errno
}

// quote shortens and escapes what came from outside.
func quote(s string) string {
	const most = 300
	if len(s) > most {
		s = s[:most] + "…"
	}
	for i := range len(s) {
		if s[i] < 0x20 || s[i] == 0x7f || s[i] == ' ' {
			return fmt.Sprintf("%q", s)
		}
	}
	return s
}

// Validate reports the first thing that is wrong with the spec itself as a
// *[SpawnError] with [OpSpec]; it does not look at the file system.
func (s *Spec) Validate() error {
	bad := func(format string, args ...any) error {
		return &SpawnError{Op: OpSpec, Err: fmt.Errorf(format, args...)}
	}
	if !ValidKey(s.Key) {
		return bad("key %q: want 1 to %d of A-Z a-z 0-9 . _ - and no dot first", clip(s.Key), MaxKey)
	}
	if !strings.HasPrefix(s.Path, "/") {
		return bad("path %q is not absolute", clip(s.Path))
	}
	if s.Dir != "" && !strings.HasPrefix(s.Dir, "/") {
		return bad("working directory %q is not absolute", clip(s.Dir))
	}
	if strings.IndexByte(s.Path, 0) >= 0 || strings.IndexByte(s.Dir, 0) >= 0 {
		return bad("path or working directory holds a NUL byte")
	}
	for i, a := range s.Args {
		if strings.IndexByte(a, 0) >= 0 {
			return bad("argument %d holds a NUL byte", i)
		}
	}
	for _, e := range s.Env {
		if strings.IndexByte(e, 0) >= 0 {
			name, _, _ := strings.Cut(e, "=")
			return bad("environment variable %q holds a NUL byte", clip(name))
		}
		if strings.IndexByte(e, '=') <= 0 {
			return bad("environment entry %q is not NAME=value", clip(e))
		}
	}
	if len(s.Label) > MaxLabel {
		return bad("label has %d bytes, more than %d", len(s.Label), MaxLabel)
	}
	if len(s.Files) > MaxFiles {
		return bad("%d files, more than %d", len(s.Files), MaxFiles)
	}
	if len(s.Keep) > MaxKeep {
		return bad("%d descriptors to keep, more than %d", len(s.Keep), MaxKeep)
	}
	for name, f := range s.Keep {
		if name == "" || len(name) > MaxKey || f == nil {
			return bad("descriptor to keep %q: want a name of 1 to %d bytes and an open file", clip(name), MaxKey)
		}
	}
	if s.Nice < -20 || s.Nice > 19 {
		return bad("nice %d is outside -20 … 19", s.Nice)
	}
	if s.Umask != nil && (*s.Umask < 0 || *s.Umask > 0o777) {
		return bad("umask %#o is outside 0 … 0777", *s.Umask)
	}
	if s.MemoryMax < 0 {
		return bad("memory limit %d is negative", s.MemoryMax)
	}
	if s.Credential != nil && len(s.Credential.Groups) > 65536 {
		return bad("%d groups, more than 65536", len(s.Credential.Groups))
	}
	return nil
}

// ValidKey reports whether s may be a [Spec.Key].
func ValidKey(s string) bool {
	return len(s) > 0 && len(s) <= MaxKey && s[0] != '.' && validName(s, "._-")
}

// ValidTag reports whether s may be an instance tag: [A-Za-z0-9._]{1,40}, no
// dot first. A tag holds no "-", so that no tag followed by "-" begins another.
func ValidTag(s string) bool {
	return len(s) > 0 && len(s) <= 40 && s[0] != '.' && validName(s, "._")
}

func validName(s, punct string) bool {
	for i := range len(s) {
		c := s[i]
		switch {
		case 'a' <= c && c <= 'z', 'A' <= c && c <= 'Z', '0' <= c && c <= '9':
		case strings.IndexByte(punct, c) >= 0:
		default:
			return false
		}
	}
	return true
}

func clip(s string) string {
	if len(s) > 80 {
		return s[:80] + "…"
	}
	return s
}
