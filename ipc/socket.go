package ipc

import (
	"fmt"
	"os"
	"sync"
	"syscall"
	"time"

	"golang.org/x/sys/unix"
)

// socket is a non-blocking Unix stream socket that Go's poller knows only while
// somebody waits for it. What the poller knows wakes a thread with each message
// and each time the other side has read one, also while the one that is to have
// it is about to read: two switches that a caller in Await, or a worker that
// looks for its next task, would pay for.
//
// One goroutine at a time reads, and one writes; any may close.
type socket struct {
	base *os.File // not polled
	rc   syscall.RawConn

	mu      sync.Mutex
	polled  *os.File // of the one that reads; nil: nobody waits
	prc     syscall.RawConn
	room    *os.File // of the one that waits to write
	closed  bool
	noReads bool
}

// newSocket takes over f unless it fails.
func newSocket(f *os.File) (*socket, error) {
	rc, err := f.SyscallConn()
	if err != nil {
		return nil, fmt.Errorf("ipc: %w", err)
	}
	s := &socket{polled: f, prc: rc}
	if cerr := rc.Control(func(fd uintptr) {
		var dup int
		if dup, err = unix.FcntlInt(fd, unix.F_DUPFD_CLOEXEC, 0); err != nil {
			return
		}
		// A file that blocks when it is made is kept out of the poller.
		if err = unix.SetNonblock(dup, false); err == nil {
			s.base = os.NewFile(uintptr(dup), f.Name())
			err = unix.SetNonblock(dup, true)
		}
		if err != nil {
			_ = unix.Close(dup)
		}
	}); cerr != nil {
		err = cerr
	}
	if err != nil {
		return nil, fmt.Errorf("ipc: %w", os.NewSyscallError("fcntl", err))
	}
	if s.rc, err = s.base.SyscallConn(); err != nil {
		s.base.Close()
		return nil, fmt.Errorf("ipc: %w", err)
	}
	return s, nil
}

// dup returns another descriptor of the socket, which is polled; s.mu is held.
func (s *socket) dup() (*os.File, error) {
	if s.closed {
		return nil, os.ErrClosed
	}
	var d int
	var err error
	if cerr := s.rc.Control(func(fd uintptr) { d, err = unix.FcntlInt(fd, unix.F_DUPFD_CLOEXEC, 0) }); cerr != nil {
		return nil, cerr
	}
	if err != nil {
		return nil, os.NewSyscallError("fcntl", err)
	}
	return os.NewFile(uintptr(d), s.base.Name()), nil
}

// read calls step, and again each time something has come, until it returns
// true.
func (s *socket) read(step func(uintptr) bool) error {
	rc, err := s.poll()
	if err != nil {
		return err
	}
	return rc.Read(step)
}

func (s *socket) poll() (syscall.RawConn, error) {
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.closed {
		return nil, os.ErrClosed
	}
	if s.polled == nil {
		f, err := s.dup()
		if err != nil {
			return nil, err
		}
		rc, err := f.SyscallConn()
		if err == nil && s.noReads {
			err = f.SetReadDeadline(time.Unix(1, 0))
		}
		if err != nil {
			f.Close()
			return nil, err
		}
		s.polled, s.prc = f, rc
	}
	return s.prc, nil
}

// unpoll says that nobody waits for what comes.
func (s *socket) unpoll() {
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.polled != nil && !s.closed && !s.noReads {
		s.polled.Close()
		s.polled, s.prc = nil, nil
	}
}

// look calls step, which must return true.
func (s *socket) look(step func(uintptr) bool) error { return s.rc.Read(step) }

// Write calls step, and again each time there is room, until it returns true.
func (s *socket) Write(step func(uintptr) bool) error {
	done := false
	err := s.rc.Write(func(fd uintptr) bool {
		done = step(fd)
		return true
	})
	if err != nil || done {
		return err
	}
	s.mu.Lock()
	f, err := s.dup()
	s.room = f
	s.mu.Unlock()
	if err != nil {
		return err
	}
	defer func() {
		s.mu.Lock()
		s.room = nil
		s.mu.Unlock()
		f.Close()
	}()
	rc, err := f.SyscallConn()
	if err != nil {
		return err
	}
	return rc.Write(step)
}

// interrupt ends a read that waits, and all later ones that would.
func (s *socket) interrupt() error {
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.closed {
		return os.ErrClosed
	}
	s.noReads = true
	if s.polled == nil {
		return nil
	}
	return s.polled.SetReadDeadline(time.Unix(1, 0))
}

func (s *socket) Close() {
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.closed {
		return
	}
	s.closed = true
	s.base.Close()
	if s.polled != nil {
		s.polled.Close()
	}
	if s.room != nil {
		s.room.Close()
	}
}
