package daemon

import (
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"strconv"
	"time"

	"golang.org/x/sys/unix"
)

// lock takes a lock that only a live process can hold. It waits a while for a
// holder that may be about to end.
func lock(path string, wait time.Duration) (*os.File, error) {
	f, err := os.OpenFile(path, os.O_CREATE|os.O_RDWR|unix.O_CLOEXEC, 0o600)
	if err != nil {
		return nil, fmt.Errorf("cannot open the lock: %w", err)
	}
	for end := time.Now().Add(wait); ; time.Sleep(5 * time.Millisecond) {
		err := unix.Flock(int(f.Fd()), unix.LOCK_EX|unix.LOCK_NB)
		if err == nil {
			return f, nil
		}
		if !errors.Is(err, unix.EWOULDBLOCK) || time.Now().After(end) {
			f.Close()
			return nil, fmt.Errorf("another daemon runs in %s (lock %s: %w)", filepath.Dir(path), filepath.Base(path), err)
		}
	}
}

// lockVar hands the descriptor of the keeper's lock to a controller's next
// self.
const lockVar = "REMUDA_KEEPER_LOCK"

// bequeath lets a lock outlive this process's program.
func bequeath(l *os.File) error {
	if _, err := unix.FcntlInt(l.Fd(), unix.F_SETFD, 0); err != nil {
		return os.NewSyscallError("fcntl", err)
	}
	return os.Setenv(lockVar, strconv.Itoa(int(l.Fd())))
}

// inheritedLock is the lock that bequeath left, nil where there is none.
func inheritedLock() (*os.File, error) {
	text, ok := os.LookupEnv(lockVar)
	if !ok {
		return nil, nil
	}
	fd, err := strconv.Atoi(text)
	if err != nil {
		return nil, fmt.Errorf("%s=%.20q: %w", lockVar, text, err)
	}
	unix.CloseOnExec(fd)
	l := os.NewFile(uintptr(fd), "keeper.lock")
	if err := unix.Flock(fd, unix.LOCK_EX|unix.LOCK_NB); err != nil {
		return nil, fmt.Errorf("the lock of the keeper was not handed over: %w", err)
	}
	return l, os.Unsetenv(lockVar)
}

// lockName takes the lock of a home's tag: an abstract socket, which goes with
// the process and is there whatever becomes of the folder. A daemon whose
// folder was removed or replaced still runs its programs; one that came up
// beside it would take them for what a crash left behind and end them.
func lockName(tag, home string, wait time.Duration) (*os.File, error) {
	fd, err := unix.Socket(unix.AF_UNIX, unix.SOCK_STREAM|unix.SOCK_CLOEXEC, 0)
	if err != nil {
		return nil, fmt.Errorf("cannot make a lock: %w", os.NewSyscallError("socket", err))
	}
	f := os.NewFile(uintptr(fd), "lock")
	name := &unix.SockaddrUnix{Name: "@remuda/" + tag}
	for end := time.Now().Add(wait); ; time.Sleep(5 * time.Millisecond) {
		err := unix.Bind(fd, name)
		if err == nil {
			// Who asks is told the holder's pid by the kernel. Nobody accepts, so
			// each that asks stays in the queue.
			err = unix.Listen(fd, unix.SOMAXCONN)
		}
		if err == nil {
			return f, nil
		}
		if !errors.Is(err, unix.EADDRINUSE) {
			f.Close()
			return nil, fmt.Errorf("cannot make a lock: %w", os.NewSyscallError("bind", err))
		}
		if time.Now().Before(end) {
			continue
		}
		pid, ours := holder(name)
		if pid > 0 && !ours {
			// Somebody else took the name. That is to be no way to keep us from
			// starting: keeper.lock is held, and f is no worse than nothing.
			return f, nil
		}
		f.Close()
		return nil, fmt.Errorf("another daemon runs for %s although the folder was removed or replaced (keeper pid %d): end it and its programs with `kill %d`, then try again", home, pid, pid)
	}
}

// holder is the process that listens on an abstract socket, 0 where none does,
// and whether it is one that could be our own.
func holder(name *unix.SockaddrUnix) (pid int, ours bool) {
	fd, err := unix.Socket(unix.AF_UNIX, unix.SOCK_STREAM|unix.SOCK_CLOEXEC|unix.SOCK_NONBLOCK, 0)
	if err != nil {
		return 0, false
	}
	defer unix.Close(fd)
	if err := unix.Connect(fd, name); err != nil {
		return 0, false
	}
	c, err := unix.GetsockoptUcred(fd, unix.SOL_SOCKET, unix.SO_PEERCRED)
	if err != nil {
		return 0, false
	}
	return int(c.Pid), int(c.Uid) == os.Geteuid() || c.Uid == 0
}
