// Package nodeipc is the parent's side of the channel that Node.js opens when
// NODE_CHANNEL_FD is set: what a script reaches as process.send and
// process.on('message'). One JSON value a line goes each way over a Unix
// stream socket.
//
// Invariant: nothing a child writes can make the parent block, hold more than
// one line of it, keep a descriptor it passed, or see one of Node's own
// messages ({"cmd":"NODE_…"}) as a message of the program.
//
// All channels of a [Hub] share one goroutine, one epoll and one read buffer,
// so an idle channel costs a few hundred bytes.
//
// It must never import a package of Remuda above floor 0, start a process, or decide
// what a message means.
package nodeipc

import (
	"bytes"
	"encoding/json"
	"errors"
	"fmt"
	"os"
	"strconv"
	"sync"

	"golang.org/x/sys/unix"

	"github.com/remuda-dev/remuda/internal/fdpass"
	"github.com/remuda-dev/remuda/internal/jsondepth"
)

const (
	// MaxLine is the longest line, in bytes without the newline, that is read
	// or sent.
	MaxLine = 1 << 20
	// MaxDepth is how deep arrays and objects of a message may nest.
	MaxDepth = 512
	// MaxQueued is how many bytes wait for a child that does not read before
	// Send says ErrFull.
	MaxQueued = 1 << 20

	readSize = 64 << 10
	// readsPerTurn keeps a child that floods its channel from starving the
	// others: epoll is level triggered and comes back to it.
	readsPerTurn = 8
)

var (
	// ErrFull says that the child does not read what it is sent: MaxQueued
	// bytes wait already. Nothing of the message was sent.
	ErrFull = errors.New("IPC channel full: the program does not read its messages")
	// ErrClosed says that the channel is closed, by either side.
	ErrClosed = errors.New("IPC channel closed")
	// ErrTooLong says that a line is longer than MaxLine.
	ErrTooLong = errors.New("IPC message longer than 1 MiB")
	// ErrMalformed says that a line is not one JSON value, or nests deeper
	// than MaxDepth.
	ErrMalformed = errors.New("malformed IPC message")
)

// Pair makes the two ends of a channel, both close-on-exec. The caller owns
// both: the child's end goes to the program (as the descriptor that [Env]
// names) and is then closed here; the parent's goes to [Hub.Open].
func Pair() (parent, child *os.File, err error) {
	fds, err := unix.Socketpair(unix.AF_UNIX, unix.SOCK_STREAM|unix.SOCK_CLOEXEC, 0)
	if err != nil {
		return nil, nil, fmt.Errorf("make an IPC channel: %w", os.NewSyscallError("socketpair", err))
	}
	return os.NewFile(uintptr(fds[0]), "node-ipc-parent"), os.NewFile(uintptr(fds[1]), "node-ipc-child"), nil
}

// Env is what must be added to the environment of a program that has the
// child's end as descriptor fd.
func Env(fd int) []string {
	return []string{"NODE_CHANNEL_FD=" + strconv.Itoa(fd), "NODE_CHANNEL_SERIALIZATION_MODE=json"}
}

// Handlers is what a channel tells its owner. All are called by the one
// goroutine of the Hub, one after the other: they must be quick and must not
// call [Hub.Close]. Everything else of this package may be called from them.
type Handlers struct {
	// OnMessage is given each message, which it may keep. Nil: dropped.
	OnMessage func(json.RawMessage)
	// OnClose is called once, when the channel ends other than by
	// [Channel.Close] or [Hub.Close]: with nil where the program disconnected
	// or ended, with ErrMalformed, ErrTooLong or the system's error else.
	// The channel is closed by then. Nil: not told.
	OnClose func(error)
	// Resumed says that the socket was read before by another process (a
	// controller that died): the first line may be the rest of one that was
	// begun, and is dropped where it is malformed.
	Resumed bool
}

// Hub reads and writes any number of channels. Make one with [NewHub]. Safe
// for use by several goroutines.
type Hub struct {
	ep   *os.File // the epoll, itself waited for by Go's poller: no thread sits in it
	epfd int
	done chan struct{}

	mu     sync.Mutex
	chans  map[int32]*Channel
	nextID int32
	closed bool
}

// Channel is the parent's end of one channel. Safe for use by several
// goroutines.
type Channel struct {
	hub *Hub
	id  int32
	h   Handlers

	mu       sync.Mutex
	fd       int // -1 once closed
	in       []byte
	out      [][]byte
	queued   int
	resumed  bool
	writable bool // EPOLLOUT is asked for
}

// NewHub starts a hub. The caller must Close it.
func NewHub() (*Hub, error) {
	fd, err := unix.EpollCreate1(unix.EPOLL_CLOEXEC)
	if err != nil {
		return nil, fmt.Errorf("start IPC: %w", os.NewSyscallError("epoll_create1", err))
	}
	// Non-blocking is what makes os.NewFile hand it to Go's poller.
	if err := unix.SetNonblock(fd, true); err != nil {
		_ = unix.Close(fd)
		return nil, fmt.Errorf("start IPC: %w", os.NewSyscallError("fcntl", err))
	}
	h := &Hub{ep: os.NewFile(uintptr(fd), "node-ipc-epoll"), epfd: fd, done: make(chan struct{}), chans: make(map[int32]*Channel)}
	rc, err := h.ep.SyscallConn()
	if err != nil {
		h.ep.Close()
		return nil, fmt.Errorf("start IPC: %w", err)
	}
	go func() {
		defer close(h.done)
		var r reader
		events := make([]unix.EpollEvent, 64)
		for {
			n := 0
			err := rc.Read(func(fd uintptr) bool {
				var err error
				n, err = unix.EpollWait(int(fd), events, 0)
				return err == nil && n > 0
			})
			if err != nil { // closed
				return
			}
			for _, ev := range events[:n] {
				h.mu.Lock()
				c := h.chans[ev.Fd]
				h.mu.Unlock()
				if c != nil {
					c.turn(ev.Events, &r)
				}
			}
		}
	}()
	return h, nil
}

// Close closes every channel (OnClose is not called) and ends the hub's
// goroutine. It must not be called from a handler.
func (h *Hub) Close() {
	h.mu.Lock()
	h.closed = true
	all := make([]*Channel, 0, len(h.chans))
	for _, c := range h.chans {
		all = append(all, c)
	}
	h.mu.Unlock()
	for _, c := range all {
		c.close()
	}
	h.ep.Close() // a second Close changes nothing
	<-h.done
}

// Open takes over f, the parent's end, whether it succeeds or not, and begins
// to read. f may come from [Pair] or be a kept descriptor of it.
func (h *Hub) Open(f *os.File, handlers Handlers) (*Channel, error) {
	defer f.Close()
	// A duplicate, so that no *os.File stands by with its poll descriptor.
	fd, err := fdpass.DupFile(f)
	if err != nil {
		return nil, fmt.Errorf("open IPC channel: %w", err)
	}
	c := &Channel{hub: h, fd: fd, h: handlers, resumed: handlers.Resumed}
	h.mu.Lock()
	defer h.mu.Unlock()
	if h.closed {
		_ = unix.Close(fd)
		return nil, ErrClosed
	}
	for h.chans[h.nextID] != nil {
		h.nextID++
	}
	c.id = h.nextID
	h.nextID++
	// An id instead of the descriptor's number: an event that was fetched
	// before a Close never meets the next owner of the number.
	ev := unix.EpollEvent{Events: unix.EPOLLIN, Fd: c.id}
	if err := unix.EpollCtl(h.epfd, unix.EPOLL_CTL_ADD, fd, &ev); err != nil {
		_ = unix.Close(fd)
		return nil, fmt.Errorf("open IPC channel: %w", os.NewSyscallError("epoll_ctl", err))
	}
	h.chans[c.id] = c
	return c, nil
}

// Close closes the channel: the program sees 'disconnect'. Messages that wait
// are dropped. OnClose is not called; a call of OnMessage that runs just now
// is not waited for. The error is always nil: it is an io.Closer.
func (c *Channel) Close() error {
	c.close()
	return nil
}

// close reports whether this call was the one that closed it.
func (c *Channel) close() bool {
	c.mu.Lock()
	fd := c.fd
	c.fd = -1
	c.in, c.out, c.queued = nil, nil, 0
	if fd >= 0 {
		// The descriptor may have a duplicate elsewhere (the keeper's), and
		// epoll would go on reporting it: take it out by hand.
		_ = unix.EpollCtl(c.hub.epfd, unix.EPOLL_CTL_DEL, fd, nil)
		_ = unix.Close(fd)
	}
	c.mu.Unlock()
	if fd < 0 {
		return false
	}
	c.hub.mu.Lock()
	delete(c.hub.chans, c.id)
	c.hub.mu.Unlock()
	return true
}

// Send sends v as one message. It never blocks: what the socket does not take
// waits in memory up to MaxQueued, then ErrFull. ErrClosed, ErrTooLong, or an
// error of marshalling are the others. A nil error does not mean that the
// program has read it.
func (c *Channel) Send(v any) error {
	line, err := json.Marshal(v)
	if err != nil {
		return fmt.Errorf("send IPC message: %w", err)
	}
	if len(line) > MaxLine {
		return fmt.Errorf("send IPC message of %d bytes: %w", len(line), ErrTooLong)
	}
	line = append(line, '\n')
	c.mu.Lock()
	defer c.mu.Unlock()
	if c.fd < 0 {
		return ErrClosed
	}
	if len(c.out) > 0 {
		if c.queued+len(line) > MaxQueued {
			return ErrFull
		}
		c.out = append(c.out, line)
		c.queued += len(line)
		return nil
	}
	n, err := write(c.fd, line)
	if err != nil {
		// The reading side sees the end too and tells OnClose.
		return fmt.Errorf("%w: %w", ErrClosed, os.NewSyscallError("sendmsg", err))
	}
	if n < len(line) {
		// Half a line is out, so the rest must follow whatever its length.
		c.out = append(c.out, line[n:])
		c.queued = len(line) - n
		return c.interest(true)
	}
	return nil
}

// interest asks epoll for writability or no longer. c.mu is held.
func (c *Channel) interest(out bool) error {
	if c.writable == out {
		return nil
	}
	ev := unix.EpollEvent{Events: unix.EPOLLIN, Fd: c.id}
	if out {
		ev.Events |= unix.EPOLLOUT
	}
	if err := unix.EpollCtl(c.hub.epfd, unix.EPOLL_CTL_MOD, c.fd, &ev); err != nil {
		return os.NewSyscallError("epoll_ctl", err)
	}
	c.writable = out
	return nil
}

// write sends what the socket takes now.
func write(fd int, b []byte) (int, error) {
	done := 0
	for done < len(b) {
		n, err := unix.SendmsgN(fd, b[done:], nil, nil, unix.MSG_DONTWAIT|unix.MSG_NOSIGNAL)
		switch {
		case errors.Is(err, unix.EINTR):
			continue
		case errors.Is(err, unix.EAGAIN):
			return done, nil
		case err != nil:
			return done, err
		}
		done += n
	}
	return done, nil
}

// flush writes what waits. c.mu is held.
func (c *Channel) flush() error {
	for len(c.out) > 0 {
		n, err := write(c.fd, c.out[0])
		if err != nil {
			return os.NewSyscallError("sendmsg", err)
		}
		c.queued -= n
		if n < len(c.out[0]) {
			c.out[0] = c.out[0][n:]
			return nil
		}
		c.out[0] = nil
		c.out = c.out[1:]
	}
	c.out = nil // give the memory back
	return c.interest(false)
}

// reader holds the buffers of the hub's goroutine.
type reader struct {
	buf, oob []byte
}

// turn handles one event of the channel. Only the hub's goroutine calls it.
func (c *Channel) turn(events uint32, r *reader) {
	if events&unix.EPOLLOUT != 0 {
		c.mu.Lock()
		var err error
		if c.fd >= 0 {
			err = c.flush()
		}
		c.mu.Unlock()
		// A broken pipe is left to the reading side: the program may have
		// written before it closed, and those messages count.
		if err != nil && events&(unix.EPOLLIN|unix.EPOLLHUP|unix.EPOLLERR|unix.EPOLLRDHUP) == 0 {
			c.end(err)
			return
		}
	}
	if events&^uint32(unix.EPOLLOUT) == 0 {
		return
	}
	if r.buf == nil {
		r.buf = make([]byte, readSize)
		r.oob = make([]byte, unix.CmsgSpace(4*fdpass.Max))
	}
	for range readsPerTurn {
		more, err := c.read(r)
		if err != nil {
			c.end(err)
			return
		}
		if !more {
			return
		}
	}
}

// errEOF is the quiet end: the program closed its side.
var errEOF = errors.New("end of channel")

// read reads once and hands on the lines that are whole. more says that there
// may be more to read.
func (c *Channel) read(r *reader) (more bool, err error) {
	c.mu.Lock()
	if c.fd < 0 {
		c.mu.Unlock()
		return false, nil
	}
	n, oobn, _, _, err := unix.Recvmsg(c.fd, r.buf, r.oob, unix.MSG_DONTWAIT|unix.MSG_CMSG_CLOEXEC)
	c.mu.Unlock()
	if oobn > 0 {
		fdpass.Drop(r.oob[:oobn])
	}
	switch {
	case errors.Is(err, unix.EINTR):
		return true, nil
	case errors.Is(err, unix.EAGAIN):
		return false, nil
	case errors.Is(err, unix.ECONNRESET):
		// The program ended with messages unread: an end like any other.
		return false, errEOF
	case err != nil:
		return false, os.NewSyscallError("recvmsg", err)
	case n == 0:
		return false, errEOF
	}
	// c.in is touched by this goroutine and by close: take it, put it back.
	c.mu.Lock()
	pending := c.in
	c.in = nil
	c.mu.Unlock()
	pending, err = splitLines(pending, r.buf[:n], c.line)
	if err != nil {
		return false, err
	}
	c.mu.Lock()
	defer c.mu.Unlock()
	if c.fd < 0 {
		return false, nil
	}
	c.in = pending
	return n == len(r.buf), nil
}

// splitLines calls line for every whole line of pending+data and returns what
// is left, copied from data. A line given is valid during the call only.
func splitLines(pending, data []byte, line func([]byte) error) ([]byte, error) {
	for {
		i := bytes.IndexByte(data, '\n')
		if i < 0 {
			break
		}
		whole := data[:i]
		if len(pending) > 0 {
			whole = append(pending, whole...)
			pending = nil
		}
		data = data[i+1:]
		if len(whole) > MaxLine {
			return nil, ErrTooLong
		}
		if err := line(whole); err != nil {
			return nil, err
		}
	}
	if len(pending)+len(data) > MaxLine {
		return nil, ErrTooLong
	}
	if len(data) == 0 {
		return pending, nil
	}
	return append(pending, data...), nil
}

// line handles one line of the program.
func (c *Channel) line(b []byte) error {
	first := c.resumed
	c.resumed = false
	c.mu.Lock()
	closed := c.fd < 0
	c.mu.Unlock()
	if closed { // by a handler of the line before
		return nil
	}
	cmd, err := decode(b)
	switch {
	case err != nil && first:
		return nil
	case err != nil:
		return err
	case cmd == "NODE_HANDLE":
		// The descriptor is closed already: say that it did not arrive, else
		// the program waits for ever. Full or closed: nothing to be done.
		_ = c.Send(struct {
			Cmd string `json:"cmd"`
		}{"NODE_HANDLE_NACK"})
	case cmd != "": // Node's own
	case c.h.OnMessage != nil:
		c.h.OnMessage(json.RawMessage(bytes.Clone(b)))
	}
	return nil
}

// Check reports whether b may be sent as a message of a program: one JSON value
// of bounded length and depth, and none that Node would take for its own.
func Check(b []byte) error {
	if len(b) > MaxLine {
		return ErrTooLong
	}
	cmd, err := decode(b)
	if err == nil && cmd != "" {
		err = fmt.Errorf("%w: a cmd that begins with NODE_ is Node's own", ErrMalformed)
	}
	return err
}

// decode checks that b is one JSON value of bounded depth and returns its
// "cmd" where that makes it one of Node's own messages.
func decode(b []byte) (cmd string, err error) {
	if jsondepth.Exceeds(b, MaxDepth) {
		return "", fmt.Errorf("%w: nested deeper than %d", ErrMalformed, MaxDepth)
	}
	if !json.Valid(b) {
		return "", fmt.Errorf("%w: not JSON: %q", ErrMalformed, clip(b, 64))
	}
	b = bytes.TrimLeft(b, " \t\r\n")
	if len(b) == 0 || b[0] != '{' {
		return "", nil
	}
	// Token by token, since a struct would match "CMD" as well, and a map
	// would build all of a large message.
	dec := json.NewDecoder(bytes.NewReader(b))
	if _, err := dec.Token(); err != nil {
		return "", fmt.Errorf("%w: %w", ErrMalformed, err)
	}
	for dec.More() {
		key, err := dec.Token()
		if err != nil {
			return "", fmt.Errorf("%w: %w", ErrMalformed, err)
		}
		var val json.RawMessage
		if err := dec.Decode(&val); err != nil {
			return "", fmt.Errorf("%w: %w", ErrMalformed, err)
		}
		if key == "cmd" { // the last one counts, as in JavaScript
			cmd = ""
			if len(val) > 0 && val[0] == '"' {
				if err := json.Unmarshal(val, &cmd); err != nil {
					return "", fmt.Errorf("%w: %w", ErrMalformed, err)
				}
			}
		}
	}
	if len(cmd) <= len("NODE_") || cmd[:len("NODE_")] != "NODE_" {
		return "", nil
	}
	return cmd, nil
}

func clip(b []byte, n int) []byte {
	if len(b) > n {
		return b[:n]
	}
	return b
}

// end closes the channel and tells its owner why, unless that was its owner.
func (c *Channel) end(err error) {
	if !c.close() || c.h.OnClose == nil {
		return
	}
	if errors.Is(err, errEOF) {
		err = nil
	}
	c.h.OnClose(err)
}
