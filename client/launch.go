package client

import (
	"context"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
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
	return true, c.launch(ctx, binary)
}

// MakeHome creates the home folder, for its owner alone.
func MakeHome(home string) error {
	if err := os.MkdirAll(filepath.Join(home, "logs"), 0o700); err != nil {
		return fmt.Errorf("cannot make the daemon's folder: %w; set REMUDA_HOME to one you may write", err)
	}
	st, err := os.Stat(home)
	if err != nil {
		return fmt.Errorf("cannot use the daemon's folder: %w", err)
	}
	if own := st.Sys().(*syscall.Stat_t).Uid; int(own) != os.Geteuid() {
		return fmt.Errorf("the daemon's folder %s belongs to user %d, not to you (%d): set REMUDA_HOME to a folder of your own", home, own, os.Geteuid())
	}
	if st.Mode().Perm()&0o077 != 0 {
		if err := os.Chmod(home, 0o700); err != nil {
			return fmt.Errorf("the daemon's folder %s is open to others and cannot be closed: %w", home, err)
		}
	}
	return nil
}

func (c *Client) launch(ctx context.Context, binary string) error {
	logPath := filepath.Join(c.home, "logs", "daemon.log")
	log, err := os.OpenFile(logPath, os.O_CREATE|os.O_WRONLY|os.O_APPEND, 0o600)
	if err != nil {
		return fmt.Errorf("cannot open the daemon's log: %w", err)
	}
	defer log.Close()
	from, err := log.Seek(0, 2)
	if err != nil {
		return fmt.Errorf("cannot use the daemon's log: %w", err)
	}
	cmd := exec.Command(binary, "keeper", "--home", c.home) //nolint:noctx // it outlives the caller
	cmd.Stdout, cmd.Stderr = log, log
	cmd.Dir = "/"
	cmd.SysProcAttr = &syscall.SysProcAttr{Setsid: true}
	if err := cmd.Start(); err != nil {
		return fmt.Errorf("cannot start the daemon: %w", err)
	}
	gone := make(chan error, 1)
	go func() { gone <- cmd.Wait() }()
	tick := time.NewTicker(5 * time.Millisecond)
	defer tick.Stop()
	for {
		if _, err := c.Info(ctx); err == nil || !errors.Is(err, ErrUnreachable) {
			return err
		}
		select {
		case <-tick.C:
		case err := <-gone:
			return fmt.Errorf("the daemon did not start (%v): %s", err, saidSince(logPath, from))
		case <-ctx.Done():
			return fmt.Errorf("the daemon does not answer; its log is %s: %w", logPath, ctx.Err())
		}
	}
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

// waitGone waits until a process has ended.
func waitGone(ctx context.Context, pid int) error {
	fd, err := unix.PidfdOpen(pid, 0)
	if err != nil {
		return nil //nolint:nilerr // it is gone already
	}
	defer unix.Close(fd)
	for {
		n, err := unix.Poll([]unix.PollFd{{Fd: int32(fd), Events: unix.POLLIN}}, 50)
		if n > 0 || (err != nil && !errors.Is(err, unix.EINTR)) {
			return nil
		}
		if ctx.Err() != nil {
			return fmt.Errorf("the daemon (pid %d) has not ended: %w", pid, ctx.Err())
		}
	}
}
