package ipc

import (
	"errors"
	"fmt"
	"os"
	"runtime"
	"sync"
	"syscall"
	"unsafe"

	"golang.org/x/sys/unix"

	"github.com/remuda-dev/remuda/internal/fdpass"
)

const (
	// DefaultMaxQueued is how many bytes wait for a side that does not read,
	// where no other bound is set.
	DefaultMaxQueued = 256 << 20

	copyBelow   = 16 << 10 // longer payloads are not copied but written from where they are
	segmentSize = 64 << 10 // of what is copied together
	maxVectors  = 64       // of one system call
	maxRounds   = 4        // of writing for others before a goroutine takes over
)

type segment struct {
	b   []byte
	own bool  // the writer's own buffer
	fds []int // go out with the first byte; the writer's own
}

// writer writes to one non-blocking descriptor. Whoever queues first becomes
// the one that writes and takes along what others queue meanwhile; what the
// descriptor does not take at once is left to a goroutine that ends with it.
// So a lone message costs one system call and no switch, and many share one.
type writer struct {
	rc    rawWriter
	limit int

	mu      sync.Mutex
	segs    []segment
	queued  int    // bytes, with those being written
	owned   bool   // somebody writes, or is about to
	held    bool   // what is queued waits for release
	ending  func() // called once when all is written
	room    sync.Cond
	err     error
	spare   []byte
	spareSg []segment

	// Of the one that writes.
	out  []segment
	vec  []unix.Iovec
	wait bool
	werr error
	step func(uintptr) bool
}

// rawWriter is that part of a syscall.RawConn.
type rawWriter interface {
	Write(step func(fd uintptr) bool) error
}

func newWriter(rc rawWriter, limit int) *writer {
	if limit <= 0 {
		limit = DefaultMaxQueued
	}
	w := &writer{rc: rc, limit: limit}
	w.room.L = &w.mu
	w.step = w.writeStep
	return w
}

// queue puts head and body at the end of what is to be written. head is copied;
// body must not change until it is written.
func (w *writer) queue(head, body []byte) error {
	w.mu.Lock()
	defer w.mu.Unlock()
	if w.err != nil {
		return w.err
	}
	n := len(head) + len(body)
	if w.queued > 0 && w.queued+n > w.limit {
		return ErrFull
	}
	w.queued += n
	if len(body) < copyBelow {
		w.copy(head, body)
		return nil
	}
	w.copy(head, nil)
	w.segs = append(w.segs, segment{b: body})
	return nil
}

// queueFDs is queue for a message with descriptors: they go out with the first
// byte of head, which is not empty. It takes them over and closes them in any
// case.
func (w *writer) queueFDs(head, body []byte, fds []int) error {
	if len(fds) == 0 {
		return w.queue(head, body)
	}
	w.mu.Lock()
	defer w.mu.Unlock()
	err := w.err
	if n := len(head) + len(body); err == nil && w.queued > 0 && w.queued+n > w.limit {
		err = ErrFull
	}
	if err != nil {
		fdpass.Close(fds)
		return err
	}
	w.queued += len(head) + len(body)
	// Not behind what is there: its first byte must begin a system call.
	w.segs = append(w.segs, segment{b: append(w.spare[:0], head...), own: true, fds: fds})
	w.spare = nil
	if len(body) < copyBelow {
		w.copy(nil, body)
	} else {
		w.segs = append(w.segs, segment{b: body})
	}
	return nil
}

// drop closes the descriptors that were to go out.
func drop(segs []segment) {
	for _, s := range segs {
		fdpass.Close(s.fds)
	}
}

func (w *writer) copy(head, body []byte) {
	last := len(w.segs) - 1
	if last < 0 || !w.segs[last].own || len(w.segs[last].b)+len(head)+len(body) > segmentSize {
		buf := w.spare
		w.spare = nil
		w.segs = append(w.segs, segment{b: buf[:0], own: true})
		last++
	}
	w.segs[last].b = append(append(w.segs[last].b, head...), body...)
}

// hold keeps what is queued from being written until release.
func (w *writer) hold() {
	w.mu.Lock()
	w.held = true
	w.mu.Unlock()
}

func (w *writer) release() {
	w.mu.Lock()
	w.held = false
	w.flushLocked(false)
}

// flush has everything written that is queued. With soon set it lets those who
// run now add to it first.
func (w *writer) flush(soon bool) {
	w.mu.Lock()
	w.flushLocked(soon)
}

// flushLocked is entered with w.mu held and left without.
func (w *writer) flushLocked(soon bool) {
	if w.owned || w.held || len(w.segs) == 0 || w.err != nil {
		w.mu.Unlock()
		return
	}
	w.owned = true
	if soon {
		w.mu.Unlock()
		go w.finish(true)
		return
	}
	for round := 0; ; round++ {
		if !w.take() {
			w.mu.Unlock()
			return
		}
		if round == maxRounds {
			w.mu.Unlock()
			go w.finish(false)
			return
		}
		w.mu.Unlock()
		err := w.write(false)
		w.mu.Lock()
		w.written(err)
		if len(w.out) > 0 {
			w.mu.Unlock()
			go w.finish(false)
			return
		}
	}
}

// finish writes until nothing is left. It may wait for the other side.
func (w *writer) finish(yield bool) {
	if yield {
		runtime.Gosched()
	}
	w.mu.Lock()
	for len(w.out) > 0 || w.take() {
		w.mu.Unlock()
		err := w.write(true)
		w.mu.Lock()
		w.written(err)
	}
	w.mu.Unlock()
}

// take moves what is queued to the writing side; where there is nothing, it
// gives up the ownership.
func (w *writer) take() bool {
	if len(w.segs) == 0 || w.err != nil {
		w.owned = false
		if f := w.ending; f != nil {
			w.ending = nil
			f()
		}
		return false
	}
	w.out, w.segs, w.spareSg = w.segs, w.spareSg[:0], nil
	return true
}

// written accounts for what write did.
func (w *writer) written(err error) {
	defer w.room.Broadcast()
	if err != nil {
		if w.err == nil {
			w.err = err
		}
		drop(w.out)
		drop(w.segs)
		w.out, w.segs, w.queued = nil, nil, 0
		return
	}
	done := 0
	for len(w.out) > done && len(w.out[done].b) == 0 {
		done++
	}
	if done == len(w.out) {
		w.queued = 0
		for _, s := range w.segs {
			w.queued += len(s.b)
		}
		clear(w.out)
		w.spareSg = w.out[:0]
		w.out = nil
	}
}

// write writes w.out, as much as goes or, with wait, all of it. What has been
// written is cut off.
func (w *writer) write(wait bool) error {
	w.wait, w.werr = wait, nil
	if err := w.rc.Write(w.step); err != nil {
		return fmt.Errorf("%w: %w", ErrClosed, err)
	}
	return w.werr
}

func (w *writer) writeStep(fd uintptr) bool {
	for {
		w.vec = w.vec[:0]
		var with *segment
		for i := range w.out {
			s := &w.out[i]
			if len(s.b) == 0 {
				continue
			}
			if len(w.vec) == maxVectors || len(s.fds) > 0 && len(w.vec) > 0 {
				break
			}
			if len(s.fds) > 0 {
				with = s
			}
			v := unix.Iovec{Base: &s.b[0]}
			v.SetLen(len(s.b))
			w.vec = append(w.vec, v)
		}
		if len(w.vec) == 0 {
			return true
		}
		var n uintptr
		var errno syscall.Errno
		switch {
		case with != nil:
			var sent int
			var err error
			if sent, err = fdpass.Send(fd, w.vec, with.fds); err == nil {
				fdpass.Close(with.fds)
				with.fds = nil
			}
			n = uintptr(sent)
			errors.As(err, &errno)
		case len(w.vec) == 1:
			n, _, errno = unix.Syscall(unix.SYS_WRITE, fd, uintptr(unsafe.Pointer(w.vec[0].Base)), uintptr(w.vec[0].Len))
		default:
			n, _, errno = unix.Syscall(unix.SYS_WRITEV, fd, uintptr(unsafe.Pointer(&w.vec[0])), uintptr(len(w.vec)))
		}
		clear(w.vec)
		switch errno {
		case 0:
			w.cut(int(n))
		case unix.EINTR:
		case unix.EAGAIN:
			return !w.wait
		default:
			w.werr = fmt.Errorf("%w: %w", ErrClosed, os.NewSyscallError("write", errno))
			return true
		}
	}
}

// cut takes n written bytes off w.out.
func (w *writer) cut(n int) {
	for i := range w.out {
		if n == 0 {
			return
		}
		s := &w.out[i]
		k := min(n, len(s.b))
		n -= k
		if k == len(s.b) {
			if s.own && cap(s.b) <= segmentSize && w.keep(s) {
				continue
			}
			s.b = nil
		} else {
			s.b = s.b[k:]
		}
	}
}

// keep puts a written buffer aside for the next one to queue.
func (w *writer) keep(s *segment) bool {
	w.mu.Lock()
	defer w.mu.Unlock()
	if w.spare == nil {
		w.spare = s.b[:0]
	}
	s.b = nil
	return true
}

// fail makes every later queue fail with err.
func (w *writer) fail(err error) {
	w.mu.Lock()
	defer w.mu.Unlock()
	if w.err == nil {
		w.err = err
	}
	drop(w.segs)
	w.segs = nil
	w.room.Broadcast()
}

// waitRoom waits until no more than n bytes wait to be written, or it fails.
func (w *writer) waitRoom(n int) error {
	w.mu.Lock()
	defer w.mu.Unlock()
	for w.err == nil && w.queued > n {
		w.room.Wait()
	}
	return w.err
}

// whenWritten calls f, which must not call the writer, when nothing is left to
// be written.
func (w *writer) whenWritten(f func()) {
	w.mu.Lock()
	defer w.mu.Unlock()
	if w.err == nil && (w.owned || len(w.segs) > 0) {
		w.ending = f
		return
	}
	f()
}

// isClosed reports whether err is the quiet end of a channel.
func isClosed(err error) bool {
	return errors.Is(err, os.ErrClosed) || errors.Is(err, unix.EPIPE) || errors.Is(err, unix.ECONNRESET)
}
