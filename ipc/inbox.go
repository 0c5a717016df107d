package ipc

import (
	"errors"
	"fmt"
	"io"
	"os"
	"sync"
	"sync/atomic"
	"syscall"
	"time"

	"github.com/remuda-dev/remuda/internal/fdpass"
)

// inbox reads a Unix socket and keeps the descriptors that come along until
// they are taken. One goroutine reads and takes; any may close.
type inbox struct {
	sock  *socket
	in    *fdpass.Receiver
	heard atomic.Uint64

	// Of the one that reads.
	buf  []byte
	n    int
	got  []int
	err  error
	step func(uintptr) bool
	// nowait makes Read return errNothing where it would wait.
	nowait bool
	// expected makes the next Read look for something without rest, for a
	// short time, before it waits.
	expected bool
	spin     spin

	left atomic.Int32 // len(fds)

	mu     sync.Mutex
	fds    []int // in the order in which they came
	closed bool
}

func newInbox(sock *socket) *inbox {
	in := &inbox{sock: sock, in: fdpass.NewReceiver(MaxFiles)}
	in.step = func(fd uintptr) bool {
		in.n, in.got, in.err = in.in.Receive(fd, in.buf)
		return in.nowait || in.err != syscall.EAGAIN //nolint:errorlint // it is not wrapped, and here time counts
	}
	return in
}

// Read implements io.Reader. ErrProtocol: more descriptors came than messages
// can have announced.
func (in *inbox) Read(b []byte) (int, error) {
	in.buf = b
	err := in.receive()
	in.buf = nil
	if in.nowait && err == nil && in.err == syscall.EAGAIN { //nolint:errorlint // as above
		return 0, errNothing
	}
	in.heard.Add(1)
	switch {
	case errors.Is(err, os.ErrDeadlineExceeded):
		return 0, err
	case err != nil:
		return 0, os.ErrClosed
	case errors.Is(in.err, fdpass.ErrTruncated):
		return 0, fmt.Errorf("%w: %w", ErrProtocol, in.err)
	case in.err != nil:
		return 0, os.NewSyscallError("recvmsg", in.err)
	}
	if len(in.got) > 0 {
		if err := in.add(in.got); err != nil {
			return 0, err
		}
		in.got = nil
	}
	if in.n == 0 {
		return 0, io.EOF
	}
	return in.n, nil
}

// receive reads once.
func (in *inbox) receive() error {
	if in.nowait {
		return in.sock.look(in.step)
	}
	if !in.expected {
		return in.sock.read(in.step)
	}
	in.expected = false
	if in.spin.skips() {
		return in.sock.read(in.step)
	}
	in.nowait = true
	defer func() { in.nowait = false }()
	begin := time.Now()
	for {
		if err := in.sock.look(in.step); err != nil || in.err != syscall.EAGAIN { //nolint:errorlint // as above
			in.spin.paid()
			in.sock.unpoll()
			return err
		}
		if time.Since(begin) > expectFor {
			break
		}
	}
	in.spin.failed()
	in.nowait = false
	return in.sock.read(in.step)
}

func (in *inbox) add(fds []int) error {
	in.mu.Lock()
	defer in.mu.Unlock()
	// A read ends behind the first byte of a message with descriptors, so there
	// is one message whose rest is awaited and the one behind it.
	if in.closed || len(in.fds)+len(fds) > 2*MaxFiles {
		fdpass.Close(fds)
		if in.closed {
			return os.ErrClosed
		}
		return fmt.Errorf("%w: %d descriptors that no message has announced", ErrProtocol, len(in.fds)+len(fds))
	}
	in.fds = append(in.fds, fds...)
	in.left.Store(int32(len(in.fds)))
	return nil
}

// waiting is how many descriptors have come and were not taken.
func (in *inbox) waiting() int { return int(in.left.Load()) }

// take returns the n descriptors that came first; they are the caller's.
func (in *inbox) take(n int) ([]*os.File, error) { return in.takeAs(n, "received") }

// takeAs is take for files of another name.
func (in *inbox) takeAs(n int, name string) ([]*os.File, error) {
	in.mu.Lock()
	defer in.mu.Unlock()
	if in.closed {
		return nil, os.ErrClosed
	}
	if n > len(in.fds) {
		return nil, fmt.Errorf("%w: a message announces %d descriptors and came with %d", ErrProtocol, n, len(in.fds))
	}
	files := make([]*os.File, n)
	for i, fd := range in.fds[:n] {
		files[i] = os.NewFile(uintptr(fd), name)
	}
	if in.fds = in.fds[n:]; len(in.fds) == 0 {
		in.fds = nil
	}
	in.left.Store(int32(len(in.fds)))
	return files, nil
}

// close closes what was not taken, and what may come yet.
func (in *inbox) close() {
	in.mu.Lock()
	defer in.mu.Unlock()
	in.closed = true
	fdpass.Close(in.fds)
	in.fds = nil
	in.left.Store(0)
}

// closeFiles closes files that nobody takes.
func closeFiles(files []*os.File) {
	for _, f := range files {
		f.Close()
	}
}
