package cluster

import (
	"bytes"
	"encoding/json"
	"errors"
	"fmt"
	"os"
	"sync"
	"syscall"

	"golang.org/x/sys/unix"

	"github.com/remuda-dev/remuda/internal/fdpass"
	"github.com/remuda-dev/remuda/internal/nodeipc"
)

const (
	readSize = 16 << 10
	// maxRetries is how often a handle is sent again that did not arrive, as
	// in Node.
	maxRetries = 3
)

// Address is where a worker listens, in Node's words.
type Address struct {
	Type    string // "4", "6", "-1" (Unix), "udp4", "udp6"
	Address string // "" for any; the path of a Unix socket
	Port    int    // the real one, where 0 was asked for
}

// Handlers is what a worker tells its owner. They are called by the worker's
// goroutine, one after the other, and must not call [Primary.Close] or
// [Primary.Remove].
type Handlers struct {
	// OnMessage is given each message of the program itself. Nil: dropped.
	OnMessage func(json.RawMessage)
	// OnListening is told each server that listens.
	OnListening func(Address)
	// OnClose is called once, when the channel ends other than by a Close:
	// with nil where the program disconnected or ended, with
	// nodeipc.ErrMalformed, nodeipc.ErrTooLong or the system's error else.
	OnClose func(error)
}

// Worker is the primary's end of a worker's channel. Safe for use by several
// goroutines.
type Worker struct {
	p         *Primary
	h         Handlers
	file      *os.File
	conn      syscall.RawConn
	listening chan struct{}
	done      chan struct{}
	first     bool // the next line may be the rest of one; its goroutine's own

	// Primary.mu guards these.
	number  int // of messages to people, and by which sticky clients find it
	age     int // grows from worker to worker
	resumed bool
	leaving bool // disconnects, of its own will or by Disconnect
	dealt   map[int64]conn

	mu        sync.Mutex
	closed    bool
	heard     bool // listening is closed
	cur       *parcel
	urgent    []*parcel
	queue     []*parcel
	queued    int     // bytes in queue
	awaiting  *parcel // sent, and its descriptor not acknowledged
	stuck     bool    // a goroutine waits for the socket to take more
	flushDone sync.WaitGroup
}

// parcel is a line to be sent, with the descriptor it carries or -1.
type parcel struct {
	line  []byte
	off   int
	fd    int
	tries int
}

func (c *parcel) close() {
	if c != nil && c.fd >= 0 {
		_ = unix.Close(c.fd)
		c.fd = -1
	}
}

// buffers are what a read needs; nobody holds them while nothing comes.
type buffers struct{ data, oob []byte }

func newBuffers() *buffers {
	return &buffers{data: make([]byte, readSize), oob: make([]byte, unix.CmsgSpace(4*fdpass.Max))}
}

// Attach takes over f, the primary's end of a worker's channel (see
// [nodeipc.Pair]), whether it succeeds or not. worker is its number in
// messages to people. resumed says that an earlier primary had the channel:
// then the first line may be the rest of one, the worker may have any of the
// listeners, and it counts as listening.
func (p *Primary) Attach(worker int, f *os.File, h Handlers, resumed bool) (*Worker, error) {
	fd, err := fdpass.DupFile(f)
	f.Close()
	if err == nil {
		err = unix.SetNonblock(fd, true) // so that Go's poller waits for it
	}
	if err != nil {
		return nil, fmt.Errorf("attach worker %d: %w", worker, err)
	}
	w := &Worker{
		p: p, h: h, first: resumed, resumed: resumed,
		file:      os.NewFile(uintptr(fd), fmt.Sprintf("worker-%d", worker)),
		listening: make(chan struct{}), done: make(chan struct{}),
	}
	if w.conn, err = w.file.SyscallConn(); err != nil {
		w.file.Close()
		return nil, fmt.Errorf("attach worker %d: %w", worker, err)
	}
	p.mu.Lock()
	defer p.mu.Unlock()
	if p.closed {
		w.file.Close()
		return nil, fmt.Errorf("attach worker %d: %w", worker, nodeipc.ErrClosed)
	}
	p.workers[w] = struct{}{}
	p.attached++
	w.number, w.age = worker, p.attached
	if resumed {
		w.heard = true
		close(w.listening)
		for _, l := range p.listeners {
			l.users[w] = l.dealer != nil
			if l.dealer != nil {
				l.dealer.offer(w)
			}
		}
	}
	p.wg.Add(1)
	go func() {
		defer p.wg.Done()
		w.run()
	}()
	return w, nil
}

// Listening is closed when the worker listens for the first time.
func (w *Worker) Listening() <-chan struct{} { return w.listening }

// Siblings says whether another worker of the app has a listener.
func (w *Worker) Siblings() bool {
	w.p.mu.Lock()
	defer w.p.mu.Unlock()
	for _, l := range w.p.listeners {
		for u := range l.users {
			if u != w {
				return true
			}
		}
	}
	return false
}

// Done is closed when the channel is. After Disconnect that means that the
// worker has closed its servers and ended the last of its connections; a
// program that something else keeps alive (a timer, a database) may then be
// ended by a signal and loses nothing.
func (w *Worker) Done() <-chan struct{} { return w.done }

// Disconnect asks the worker to close its servers, to finish the connections
// it has, and to end. It gets no connection more. It may be called again.
func (w *Worker) Disconnect() error {
	w.p.mu.Lock()
	defer w.p.mu.Unlock()
	if w.leaving {
		return nil
	}
	w.leaving = true
	for _, l := range w.p.listeners {
		w.p.leave(w, l)
	}
	return w.push(order{Cmd: cmdCluster, Act: "disconnect", Seq: w.p.nextSeq()}, -1)
}

// Send sends v as a message of the program. It never blocks: what the socket
// does not take waits in memory up to [nodeipc.MaxQueued], then it is
// nodeipc.ErrFull. nodeipc.ErrClosed, ErrTooLong or an error of marshalling
// are the others. A nil error does not mean that the program has read it.
func (w *Worker) Send(v any) error { return w.push(v, -1) }

// Close closes the channel; a worker that does not expect that ends at once,
// unless somebody else has a copy of it. OnClose is not called, and a handler
// that runs just now is not waited for. The error is always nil.
func (w *Worker) Close() error {
	w.shut()
	return nil
}

// shut reports whether this call was the one that closed it.
func (w *Worker) shut() bool {
	w.mu.Lock()
	if w.closed {
		w.mu.Unlock()
		return false
	}
	w.closed = true
	w.cur.close()
	w.awaiting.close()
	for _, c := range w.queue {
		c.close()
	}
	w.cur, w.awaiting, w.queue, w.urgent, w.queued = nil, nil, nil, nil, 0
	w.mu.Unlock()
	w.file.Close() // ends the goroutines
	return true
}

// push sends v, and fd, which it owns, along with it; -1 for none.
func (w *Worker) push(v any, fd int) error {
	c := &parcel{fd: fd}
	line, err := json.Marshal(v)
	if err == nil && len(line) > nodeipc.MaxLine {
		err = nodeipc.ErrTooLong
	}
	if err != nil {
		c.close()
		return fmt.Errorf("send IPC message: %w", err)
	}
	line = append(line, '\n')
	c.line = line
	w.mu.Lock()
	defer w.mu.Unlock()
	switch {
	case w.closed:
		err = nodeipc.ErrClosed
	case len(w.queue) > 0 && w.queued+len(c.line) > nodeipc.MaxQueued:
		err = nodeipc.ErrFull
	}
	if err != nil {
		c.close()
		return err
	}
	w.queue = append(w.queue, c)
	w.queued += len(c.line)
	w.flush()
	return nil
}

// flush sends what can be sent now. w.mu is held.
func (w *Worker) flush() {
	if w.stuck || w.closed {
		return
	}
	full := false
	if w.conn.Control(func(fd uintptr) { full = !w.drain(int(fd)) }) != nil || !full {
		return
	}
	// The socket is full: this is rare, and a goroutine lasts as long as it is.
	w.stuck = true
	w.flushDone.Add(1)
	go func() {
		defer w.flushDone.Done()
		_ = w.conn.Write(func(fd uintptr) bool {
			w.mu.Lock()
			defer w.mu.Unlock()
			w.stuck = !w.closed && !w.drain(int(fd))
			return !w.stuck
		})
	}()
}

// drain writes until there is nothing to be sent now, and then reports true,
// or the socket takes no more. w.mu is held.
func (w *Worker) drain(fd int) bool {
	for {
		if w.cur == nil && !w.next() {
			return true
		}
		c := w.cur
		var rights []byte
		if c.off == 0 && c.fd >= 0 {
			rights = unix.UnixRights(c.fd)
		}
		n, err := unix.SendmsgN(fd, c.line[c.off:], rights, nil, unix.MSG_DONTWAIT|unix.MSG_NOSIGNAL)
		switch {
		case errors.Is(err, unix.EINTR):
			continue
		case errors.Is(err, unix.EAGAIN):
			return false
		case errors.Is(err, unix.ETOOMANYREFS) && c.off == 0:
			// Too many descriptors are on their way in this user's name.
			c.close()
			w.cur = nil
			continue
		case err != nil:
			return true // the reading side sees the end too
		}
		if c.off += n; c.off < len(c.line) {
			continue
		}
		if w.cur = nil; c.fd >= 0 {
			w.awaiting = c
		}
	}
}

// next takes the next parcel. As in Node everything waits until a descriptor
// was acknowledged, so that the order stays; but a refusal does not, or two
// sides could wait for each other. w.mu is held.
func (w *Worker) next() bool {
	switch {
	case len(w.urgent) > 0:
		w.cur, w.urgent = w.urgent[0], w.urgent[1:]
	case w.awaiting == nil && len(w.queue) > 0:
		w.cur = w.queue[0]
		w.queue[0] = nil
		if w.queue = w.queue[1:]; len(w.queue) == 0 {
			w.queue = nil
		}
		w.queued -= len(w.cur.line)
	}
	return w.cur != nil
}

// arrived handles the acknowledgement of a descriptor.
func (w *Worker) arrived(ok bool) {
	w.mu.Lock()
	defer w.mu.Unlock()
	c := w.awaiting
	if c == nil { // of one that an earlier primary sent
		return
	}
	w.awaiting = nil
	if c.tries++; ok || c.tries > maxRetries {
		c.close()
	} else {
		c.off = 0
		w.queue = append([]*parcel{c}, w.queue...)
		w.queued += len(c.line)
	}
	w.flush()
}

// listens notes that a server of the worker listens.
func (w *Worker) listens(a Address) {
	w.mu.Lock()
	if !w.heard {
		w.heard = true
		close(w.listening)
	}
	w.mu.Unlock()
	if w.h.OnListening != nil {
		w.h.OnListening(a)
	}
}

// errEOF is the quiet end: the program closed its side.
var errEOF = errors.New("end of channel")

// run reads until the channel ends.
func (w *Worker) run() {
	var pending []byte
	var err error
	for err == nil {
		var b *buffers
		n, oobn := 0, 0
		rerr := w.conn.Read(func(fd uintptr) bool {
			b = w.p.bufs.Get().(*buffers)
			n, oobn, _, _, err = unix.Recvmsg(int(fd), b.data, b.oob, unix.MSG_DONTWAIT|unix.MSG_CMSG_CLOEXEC)
			if errors.Is(err, unix.EAGAIN) {
				w.p.bufs.Put(b)
				return false
			}
			return true
		})
		if rerr != nil { // closed
			break
		}
		if oobn > 0 {
			fdpass.Drop(b.oob[:oobn])
		}
		switch {
		case errors.Is(err, unix.EINTR):
			n, err = 0, nil
		case errors.Is(err, unix.ECONNRESET), err == nil && n == 0:
			// The program may end with messages unread: an end like any other.
			err = errEOF
		case err == nil:
			pending, err = split(pending, b.data[:n], w.line)
		}
		w.p.bufs.Put(b)
	}
	mine := w.shut()
	w.flushDone.Wait()
	w.p.mu.Lock()
	w.p.gone(w)
	w.p.mu.Unlock()
	close(w.done)
	if mine && w.h.OnClose != nil {
		if errors.Is(err, errEOF) {
			err = nil
		}
		w.h.OnClose(err)
	}
}

// split calls line for every whole line of pending+data and returns what is
// left. A line given is valid during the call only.
func split(pending, data []byte, line func([]byte) error) ([]byte, error) {
	for {
		whole, rest, found := bytes.Cut(data, []byte{'\n'})
		if len(pending)+len(whole) > nodeipc.MaxLine {
			return nil, nodeipc.ErrTooLong
		}
		if !found {
			if len(data) == 0 {
				return pending, nil
			}
			return append(pending, data...), nil
		}
		if len(pending) > 0 {
			whole, pending = append(pending, whole...), nil
		}
		if err := line(whole); err != nil {
			return nil, err
		}
		data = rest
	}
}

// line handles one line of the program.
func (w *Worker) line(b []byte) error {
	first := w.first
	w.first = false
	cmd, f, err := decode(b)
	switch {
	case err != nil && first:
		return nil
	case err != nil:
		return err
	case cmd == cmdCluster:
		w.p.internal(w, f)
	case cmd == cmdAck, cmd == cmdNack:
		w.arrived(cmd == cmdAck)
	case cmd == cmdHandle:
		// The descriptor is closed already: say that it did not arrive, else
		// the program waits for ever.
		w.refuse()
	case cmd != "": // Node's own
	case w.h.OnMessage != nil:
		w.h.OnMessage(json.RawMessage(bytes.Clone(b)))
	}
	return nil
}

// refuse tells the program that its descriptor did not arrive.
func (w *Worker) refuse() {
	w.mu.Lock()
	defer w.mu.Unlock()
	if len(w.urgent) < maxRetries+1 { // it sends one at a time
		w.urgent = append(w.urgent, &parcel{line: []byte(`{"cmd":"` + cmdNack + `"}` + "\n"), fd: -1})
	}
	w.flush()
}
