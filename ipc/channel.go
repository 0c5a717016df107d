package ipc

import (
	"errors"
	"fmt"
	"io"
	"os"
	"sync/atomic"
	"time"

	"golang.org/x/sys/unix"
)

// ChannelOptions bound a channel. The zero value is useful.
type ChannelOptions struct {
	MaxFrame  int // largest payload taken, in bytes; 0: DefaultMaxFrame
	MaxQueued int // bytes that wait for the other side; 0: DefaultMaxQueued
	// Shared is from how many bytes on payloads are taken in shared memory. 0:
	// DefaultShared; below 0: none are, nor sent.
	Shared int
}

// Channel carries frames over a Unix stream socket, either end of it. One
// goroutine may call Receive; everything else may be called from any.
type Channel struct {
	sock *socket
	w    *writer
	in   *inbox
	r    frameReader
	peer atomic.Int64 // the largest payload that the other side takes
	open atomic.Bool  // the other side takes descriptors

	own    *shelf
	theirs views
	from   int          // as ChannelOptions.Shared; 0: none
	shared atomic.Int64 // the other side's; 0: none
	parent bool
}

// Pair makes the two ends of a channel, both close-on-exec. The caller owns
// both; the child's end goes to the worker as the descriptor that FDVar names
// and is then closed here.
func Pair() (parent, child *os.File, err error) {
	fds, err := unix.Socketpair(unix.AF_UNIX, unix.SOCK_STREAM|unix.SOCK_CLOEXEC, 0)
	if err != nil {
		return nil, nil, fmt.Errorf("ipc: make a channel: %w", os.NewSyscallError("socketpair", err))
	}
	if err := unix.SetNonblock(fds[0], true); err != nil {
		_, _ = unix.Close(fds[0]), unix.Close(fds[1])
		return nil, nil, fmt.Errorf("ipc: make a channel: %w", os.NewSyscallError("fcntl", err))
	}
	return os.NewFile(uintptr(fds[0]), "worker-parent"), os.NewFile(uintptr(fds[1]), "worker-child"), nil
}

// NewChannel takes over f, a non-blocking socket, unless it fails.
func NewChannel(f *os.File, o ChannelOptions) (*Channel, error) {
	sock, err := newSocket(f)
	if err != nil {
		return nil, err
	}
	c := &Channel{sock: sock, w: newWriter(sock, o.MaxQueued), in: newInbox(sock), from: max(o.Shared, 0)}
	if o.Shared == 0 {
		c.from = DefaultShared
	}
	c.own = &shelf{w: c.w, idle: sharedIdle, segs: make(map[uint32]*block), buffers: make(map[*Buffer]*block)}
	c.theirs.w = c.w
	c.r.limit = o.MaxFrame
	if c.r.limit <= 0 {
		c.r.limit = DefaultMaxFrame
	}
	c.r.r = c.in
	c.peer.Store(DefaultMaxFrame)
	return c, nil
}

// SetPeer sets what the other side takes, as its hello says.
func (c *Channel) SetPeer(h Hello) {
	c.peer.Store(int64(h.MaxFrame))
	c.open.Store(h.Files)
	if c.from > 0 { // who takes none sends none
		c.shared.Store(int64(h.Shared))
	}
}

// Send sends a frame. It does not wait for the other side: ErrFull says that
// too much waits already, ErrTooLarge that the other side would not take it,
// ErrClosed that the channel has ended. The payload must not change any more. A
// nil error does not mean that the frame has arrived.
func (c *Channel) Send(t Type, id uint32, payload []byte) error {
	if int64(len(payload)) > c.peer.Load() {
		return c.tooLarge(len(payload))
	}
	var head [HeaderSize]byte
	if err := c.w.queue(AppendHeader(head[:0], t, id, len(payload)), payload); err != nil {
		return err
	}
	c.w.flush(false)
	return nil
}

func (c *Channel) tooLarge(n int) error {
	return fmt.Errorf("%w: %d bytes, where the other side takes %d", ErrTooLarge, n, c.peer.Load())
}

// Publish sends a message for whoever has subscribed, on the worker's side. It
// fails as Send does, and with ErrTopic.
func (c *Channel) Publish(topic string, body []byte) error {
	if err := checkTopic(topic, false); err != nil {
		return err
	}
	if len(body) > MaxPublish {
		return fmt.Errorf("%w: a message of %d bytes, where %d are allowed", ErrTooLarge, len(body), MaxPublish)
	}
	return c.publish(topic, body, 0)
}

func (c *Channel) publish(topic string, body []byte, dropped uint32) error {
	if n := 1 + len(topic) + len(body); int64(n) > c.peer.Load() {
		return c.tooLarge(n)
	}
	var space [HeaderSize + 1 + MaxTopic]byte
	if err := c.w.queue(appendPublish(space[:0], topic, dropped, len(body)), body); err != nil {
		return err
	}
	c.w.flush(true)
	return nil
}

// Subscribe asks for messages, on the worker's side: see [Topics.Subscribe].
func (c *Channel) Subscribe(topic string, slow SlowPolicy) error {
	if err := checkTopic(topic, true); err != nil {
		return err
	}
	return c.Send(TypeSubscribe, 0, append([]byte{byte(slow)}, topic...))
}

// Unsubscribe asks for no more of them, by the name that was subscribed to.
func (c *Channel) Unsubscribe(topic string) error {
	if err := checkTopic(topic, true); err != nil {
		return err
	}
	return c.Send(TypeUnsubscribe, 0, []byte(topic))
}

// SendHello sends the hello.
func (c *Channel) SendHello(h Hello) error {
	h.Remuda = Version
	h.MaxFrame, h.Files, h.Shared = c.r.limit, true, c.from
	if err := c.w.queue(AppendHello(nil, h), nil); err != nil {
		return err
	}
	c.w.flush(false)
	return nil
}

// Answer is what goes with an answer.
type Answer struct {
	Took  time.Duration // in the handler; 0: not told
	Files []*os.File    // at most MaxFiles; the caller's. Not with an error
	Soon  bool          // one of many: those that are sent about now share a system call
	Lease *Lease        // of memory that the result may lie in; it ends
}

// Lease returns memory of n bytes for a result, which the other side will see
// as it is; nil where none is to be had. It must be given to SendResult, or be
// ended.
func (c *Channel) Lease(n int) *Lease {
	if c.shared.Load() == 0 {
		return nil
	}
	return c.own.lease(n)
}

// share has a payload lie in shared memory, where the other side takes it so.
func (c *Channel) share(payload []byte, l *Lease, buf *Buffer) *Lease {
	if l != nil {
		if off, ok := within(l.Bytes(), payload); ok {
			l.off, l.n = off, len(payload)
			return l
		}
		l.End()
	}
	if from := c.shared.Load(); from == 0 || int64(len(payload)) < from {
		return nil
	}
	return c.own.share(payload, buf)
}

// SendResult sends a result, as Send does. ErrNoFiles: the other side takes no
// descriptors.
func (c *Channel) SendResult(id uint32, payload []byte, a Answer) error {
	if int64(len(payload)) > c.peer.Load() {
		a.Lease.End()
		return c.tooLarge(len(payload))
	}
	var space [3*HeaderSize + MaxFiles + sharedSize]byte
	head, fds, err := c.handles(space[:0], id, a.Files)
	if err != nil {
		a.Lease.End()
		return err
	}
	l := c.share(payload, a.Lease, nil)
	if l != nil {
		head, payload = appendShared(head, id, l), nil
		c.own.send(l) // before it is, so that no RELEASE can come first
	}
	at := len(head)
	head = AppendHeader(head, TypeResult, id, len(payload))
	setTook(head[at:], a.Took)
	if err := c.w.queueFDs(head, payload, fds); err != nil {
		l.End()
		return err
	}
	c.w.flush(a.Soon)
	return nil
}

// SendError sends an error frame.
func (c *Channel) SendError(id uint32, e *TaskError, a Answer) error {
	b := AppendError(nil, id, e)
	if int64(len(b)-HeaderSize) > c.peer.Load() {
		b = AppendError(nil, id, &TaskError{Code: e.Code, Message: "the error is too large to be sent"})
	}
	setTook(b, a.Took)
	if err := c.w.queue(b, nil); err != nil {
		return err
	}
	c.w.flush(a.Soon)
	return nil
}

// Receive returns the next frame: io.EOF at the end between two frames,
// ErrProtocol or ErrTooLarge, io.ErrUnexpectedEOF within a frame, or the
// system's error. HANDLES and SHARED frames are no frames of their own here: what
// they announce is in the one that they precede. What is to be done about a
// SEGMENT, RELEASE or FORGET frame is done when it is returned. The payload is the caller's to keep only where owned is set;
// else it is valid until the next call. more says that another frame is here
// already.
func (c *Channel) Receive() (f Frame, owned, more bool, err error) {
	f, owned, err = c.r.next()
	if err == nil && f.Type >= TypeHandles {
		f, owned, err = c.special(f, owned)
	}
	if err == nil && c.r.start == c.r.end && c.in.waiting() > 0 {
		f.drop()
		err = fmt.Errorf("%w: descriptors that no frame has announced", ErrProtocol)
	}
	if err != nil {
		if errors.Is(err, unix.ECONNRESET) { // it ended with frames unread
			err = io.EOF
		}
		return Frame{}, false, false, err
	}
	return f, owned, c.r.whole(), nil
}

// poll reads once, without waiting, and returns errNothing unless a whole frame
// is here then. One that does not fit into the buffer never is.
func (c *Channel) poll() error {
	if c.r.whole() {
		return nil
	}
	if c.r.start == 0 && c.r.end == len(c.r.buf) && c.r.end > 0 {
		return errNothing
	}
	c.in.nowait = true
	err := c.r.fill()
	c.in.nowait = false
	if err == nil && !c.r.whole() {
		err = errNothing
	}
	return err
}

// Hold keeps frames from being written until Release, so that what is sent in
// between goes out together.
func (c *Channel) Hold() { c.w.hold() }

// Release writes what Hold kept.
func (c *Channel) Release() { c.w.release() }

// Flush waits until everything sent has been handed to the system, or timeout
// is over, or the channel has ended.
func (c *Channel) Flush(timeout time.Duration) {
	c.w.flush(false)
	done := make(chan struct{})
	c.w.whenWritten(func() { close(done) })
	t := time.NewTimer(timeout)
	defer t.Stop()
	select {
	case <-done:
	case <-t.C:
	}
}

// Interrupt ends a Receive that waits, and all later ones that would have to,
// with an error that is os.ErrDeadlineExceeded.
func (c *Channel) Interrupt() error { return c.sock.interrupt() }

// Expect is for the one that receives: it tells the next Receive that a frame is
// likely to come within microseconds. Receive then looks for it without rest, for
// a short time and where that has paid of late, before it waits.
func (c *Channel) Expect() { c.in.expected = true }

// Close ends the channel at once, whoever waits in it.
func (c *Channel) Close() {
	c.w.fail(ErrClosed)
	c.sock.Close()
	c.in.close()
	c.own.close()
	c.theirs.close()
}
