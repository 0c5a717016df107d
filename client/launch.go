package client

import (
	"context"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"syscall"
	"time"

	"golang.org/x/sys/unix"
)

// Launch makes sure that a daemon runs in the client's home folder: where none
// answers, binary is started as its keeper, detached from the caller. However
// many callers launch at once, one daemon comes to be. It returns when the
// daemon answers, with true where this call started it.
func (c *Client) Launch(ctx context.Context, binary string) (bool, error) {
	if _, err := c.Info(ctx); err == nil || !errors.Is(err, ErrUnreachable) || errors.Is(err, os.ErrPermission) {
		return false, err
	}
	if err := MakeHome(c.home); err != nil {
		return false, err
	}
	unlock, err := lock(ctx, filepath.Join(c.home, "launch.lock"))
	if err != nil {
		return false, err
	}
	defer unlock()
	if _, err := c.Info(ctx); err == nil {
		return false, nil
	}
	return c.launch(ctx, binary)
}

// MakeHome creates the home folder, for its owner alone. A folder that is open
// to others is closed only where it is the daemon's already or holds nothing:
// with REMUDA_HOME=/tmp by mistake, /tmp stays as it is.
func MakeHome(home string) error {
	if err := os.MkdirAll(home, 0o700); err != nil {
		return fmt.Errorf("cannot make the daemon's folder: %w; set REMUDA_HOME to one you may write", err)
	}
	st, err := os.Stat(home)
	if err != nil {
		return fmt.Errorf("cannot use the daemon's folder: %w", err)
	}
	if own, ok := st.Sys().(*syscall.Stat_t); ok && int(own.Uid) != os.Geteuid() {
		return fmt.Errorf("the daemon's folder %s belongs to user %d, not to you (%d): set REMUDA_HOME to a folder of your own", home, own.Uid, os.Geteuid())
	}
	if st.Mode().Perm()&0o077 != 0 {
		entries, err := os.ReadDir(home)
		if err != nil {
			return fmt.Errorf("cannot use the daemon's folder: %w", err)
		}
		ours := func(e os.DirEntry) bool { return e.Name() == "launch.lock" || e.Name() == "keeper.lock" }
		if len(entries) > 0 && !slices.ContainsFunc(entries, ours) {
			return fmt.Errorf("the folder %s is open to others (mode %04o) and holds other things: chmod 700 it, or set REMUDA_HOME to a folder for the daemon alone", home, st.Mode().Perm())
		}
		if err := os.Chmod(home, 0o700); err != nil {
			return fmt.Errorf("the daemon's folder %s is open to others and cannot be closed: %w", home, err)
		}
	}
	if err := os.MkdirAll(filepath.Join(home, "logs"), 0o700); err != nil {
		return fmt.Errorf("cannot make the daemon's folder: %w; set REMUDA_HOME to one you may write", err)
	}
	return nil
}

// launch starts a keeper and waits until a daemon answers. Where that is one of
// another keeper (its controller was just being replaced), the new keeper is
// not needed.
func (c *Client) launch(ctx context.Context, binary string) (bool, error) {
	logPath := filepath.Join(c.home, "logs", "daemon.log")
	log, err := os.OpenFile(logPath, os.O_CREATE|os.O_WRONLY|os.O_APPEND, 0o600)
	if err != nil {
		return false, fmt.Errorf("cannot open the daemon's log: %w", err)
	}
	defer log.Close()
	from, err := log.Seek(0, 2)
	if err != nil {
		return false, fmt.Errorf("cannot use the daemon's log: %w", err)
	}
	cmd := exec.Command(binary, "keeper", "--home", c.home) //nolint:noctx // it outlives the caller
	cmd.Stdout, cmd.Stderr = log, log
	cmd.Dir = "/"
	cmd.SysProcAttr = &syscall.SysProcAttr{Setsid: true}
	if err := cmd.Start(); err != nil {
		return false, fmt.Errorf("cannot start the daemon: %w", err)
	}
	gone := make(chan error, 1)
	go func() { gone <- cmd.Wait() }()
	tick := time.NewTicker(5 * time.Millisecond)
	defer tick.Stop()
	for {
		info, err := c.Info(ctx)
		if err == nil && info.KeeperPID != cmd.Process.Pid {
			_ = cmd.Process.Kill()
			return false, nil
		}
		if err == nil || !errors.Is(err, ErrUnreachable) {
			return err == nil, err
		}
		select {
		case <-tick.C:
		case err := <-gone:
			return false, fmt.Errorf("the daemon did not start (%s): %s", errText(err), saidSince(logPath, from))
		case <-ctx.Done():
			return false, fmt.Errorf("the daemon does not answer; its log is %s: %w", logPath, ctx.Err())
		}
	}
}

// errText is the end of a keeper that should have gone on.
func errText(err error) string {
	if err == nil {
		return "exit code 0"
	}
	return err.Error()
}

// saidSince is what a log file holds from an offset on, its last lines only.
func saidSince(path string, from int64) string {
	b, err := os.ReadFile(path)
	if err != nil || int64(len(b)) <= from {
		return "it said nothing; see " + path
	}
	s := strings.TrimSpace(string(b[from:]))
	return s[max(0, len(s)-2000):]
}

// lock takes an exclusive lock on a file, waiting for whoever holds it.
func lock(ctx context.Context, path string) (unlock func(), err error) {
	f, err := os.OpenFile(path, os.O_CREATE|os.O_RDWR, 0o600)
	if err != nil {
		return nil, fmt.Errorf("cannot open the lock of the daemon's folder: %w", err)
	}
	for {
		err := unix.Flock(int(f.Fd()), unix.LOCK_EX|unix.LOCK_NB)
		if err == nil {
			return func() { f.Close() }, nil
		}
		if !errors.Is(err, unix.EWOULDBLOCK) {
			f.Close()
			return nil, fmt.Errorf("cannot lock %s: %w", path, err)
		}
		select {
		case <-ctx.Done():
			f.Close()
			return nil, fmt.Errorf("another command has been starting the daemon and does not finish (lock %s): %w", path, ctx.Err())
		case <-time.After(5 * time.Millisecond):
		}
	}
}

// process is one process that is waited for, whatever its pid is used for
// afterwards.
type process struct{ pid, fd int }

func waitFor(pid int) (process, error) {
	fd, err := unix.PidfdOpen(pid, 0)
	if errors.Is(err, unix.ESRCH) {
		return process{pid: pid, fd: -1}, nil
	}
	if err != nil {
		return process{}, fmt.Errorf("cannot watch the daemon (pid %d): %w", pid, err)
	}
	return process{pid: pid, fd: fd}, nil
}

func (p process) Close() {
	if p.fd >= 0 {
		unix.Close(p.fd)
	}
}

// wait returns when the process has ended.
func (p process) wait(ctx context.Context) error {
	for p.fd >= 0 {
		n, err := unix.Poll([]unix.PollFd{{Fd: int32(p.fd), Events: unix.POLLIN}}, 50)
		if n > 0 || (err != nil && !errors.Is(err, unix.EINTR)) {
			return nil
		}
		if ctx.Err() != nil {
			return fmt.Errorf("the daemon (pid %d) has not ended: %w", p.pid, ctx.Err())
		}
	}
	return nil
}
