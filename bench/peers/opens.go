package main

import (
	"errors"
	"fmt"
	"os"
	"time"

	"golang.org/x/sys/unix"
)

// opens tells when a file is opened.
type opens struct{ fd int }

func watchOpens(path string) (*opens, error) {
	fd, err := unix.InotifyInit1(unix.IN_CLOEXEC | unix.IN_NONBLOCK)
	if err != nil {
		return nil, os.NewSyscallError("inotify_init1", err)
	}
	if _, err := unix.InotifyAddWatch(fd, path, unix.IN_OPEN); err != nil {
		_ = unix.Close(fd)
		return nil, os.NewSyscallError("inotify_add_watch", err)
	}
	return &opens{fd}, nil
}

// Close ends the watch.
func (o *opens) Close() { _ = unix.Close(o.fd) }

// drain forgets what was opened so far.
func (o *opens) drain() error {
	b := make([]byte, 4096)
	for {
		_, err := unix.Read(o.fd, b)
		switch {
		case err == nil, errors.Is(err, unix.EINTR):
		case errors.Is(err, unix.EAGAIN):
			return nil
		default:
			return os.NewSyscallError("read", err)
		}
	}
}

// wait returns when the file is opened.
func (o *opens) wait(most time.Duration) error {
	for end := time.Now().Add(most); ; {
		n, err := unix.Poll([]unix.PollFd{{Fd: int32(o.fd), Events: unix.POLLIN}}, int(time.Until(end).Milliseconds()))
		switch {
		case n > 0:
			return nil
		case err != nil && !errors.Is(err, unix.EINTR):
			return os.NewSyscallError("poll", err)
		case !time.Now().Before(end):
			return fmt.Errorf("nothing happened for %s", most)
		}
	}
}
