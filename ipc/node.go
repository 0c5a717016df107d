package ipc

import (
	"bytes"
	"encoding/json"
	"errors"
	"fmt"
	"os"
	"slices"
	"strconv"
	"strings"
	"sync"
	"time"

	"golang.org/x/sys/unix"

	"github.com/remuda-dev/remuda/internal/fdpass"
)

const (
	// DefaultMaxUnsolicited is how many messages that answer nothing a worker
	// may send in a second, where no other bound is set.
	DefaultMaxUnsolicited = 20_000

	// maxRetransmissions is how often a handle is sent again that did not
	// arrive; Node's own parent does it as often.
	maxRetransmissions = 3
	// maxBehind is how many messages wait behind a handle that is not yet
	// acknowledged. Each may hold a descriptor.
	maxBehind = 1024
	// maxKey is the longest key of a list of sockets that is sent back.
	maxKey = 1 << 10
)

var (
	// ErrHandle says that a file is none that Node takes over its channel.
	ErrHandle = errors.New("ipc: not a handle for Node: it takes TCP, UDP and Unix stream sockets, and pipes")
	// ErrHandleLost says that a program did not get the handle of a message,
	// often as it was sent; the message did not reach it either.
	ErrHandleLost = errors.New("ipc: the handle did not reach the program, nor did its message")
	// ErrNodeMessage says that a message has a "cmd" that begins with NODE_,
	// which Node keeps for itself.
	ErrNodeMessage = errors.New(`ipc: a message whose "cmd" begins with NODE_ is Node's own and no program's`)
)

// NodeConn is the parent's end of the channel that Node.js programs reach as
// process.send and process.on('message'). Beside tasks it carries messages that
// expect no answer, and handles both ways. It is safe for use by several
// goroutines.
//
// A message with a handle waits for the program's acknowledgement before
// anything else is sent, so that the order is kept.
type NodeConn struct {
	sock      *socket
	w         *writer
	in        *inbox
	limit     int
	maxQueued int
	health    bool
	onMessage func(json.RawMessage, *os.File)
	rate      rate // of the goroutine in Serve

	mu       sync.Mutex
	pending  []*Request // in order; the first sent of them have been written
	sent     int
	pings    int // health checks not answered yet
	err      error
	stopped  bool
	closed   bool
	handle   *outbound // sent, not acknowledged yet
	behind   []outbound
	behindBy int // bytes in behind
	lead     lead

	// Of the one that reads.
	buf  []byte
	part []byte // of a line
}

// outbound is a message on its way to the program.
type outbound struct {
	msg    []byte
	handle nodeHandle
	tries  int
	r      *Request // nil: no answer is expected
}

// nodeHandle is a duplicate of a descriptor and Node's words for it. The zero
// value is none.
type nodeHandle struct {
	fds   []int // none or one
	kind  string
	dgram string // "udp4" or "udp6"
}

func (h *nodeHandle) close() {
	fdpass.Close(h.fds)
	h.fds = nil
}

// NewNode speaks Node's own channel (NodeEnv) over f, the parent's end of a
// Pair, which it takes over unless it fails. Each task is a 'message', with
// Request.Files[0] as its handle where there is one, and the next process.send
// is its answer. An object whose only key is "error" is a failure. What a
// program sends while no task is under way goes to Options.OnMessage.
//
// A program finds a handle as what it is: a connection or a pipe to read from as
// net.Socket, a listener as net.Server, a UDP socket as dgram.Socket, a pipe to
// write to as the bare handle. A file that comes from
// a program has Node's word for it as its name: "net.Socket", "net.Server",
// "net.Native", "dgram.Socket" or "dgram.Native".
func NewNode(f *os.File, o Options) (*NodeConn, error) {
	sock, err := newSocket(f)
	if err != nil {
		return nil, err
	}
	w, in := newWriter(sock, o.MaxQueued), newInbox(sock)
	c := &NodeConn{sock: sock, w: w, in: in, limit: o.MaxMessage, maxQueued: w.limit, health: o.HealthCheck, onMessage: o.OnMessage, rate: rate{limit: o.MaxUnsolicited}}
	if c.limit <= 0 {
		c.limit = DefaultMaxFrame
	}
	if c.rate.limit == 0 {
		c.rate.limit = DefaultMaxUnsolicited
	}
	c.lead.init(&c.mu, sock)
	return c, nil
}

const (
	nodeFDVar   = "NODE_CHANNEL_FD"
	nodeModeVar = "NODE_CHANNEL_SERIALIZATION_MODE"
)

// NodeEnv is what must be in the environment of a Node program that has the
// child's end of its channel as descriptor fd. No other value of these
// variables may be there.
func NodeEnv(fd int) []string {
	return []string{nodeFDVar + "=" + strconv.Itoa(fd), nodeModeVar + "=json"}
}

// Environ returns environ without the variables that tell a program of a
// channel: those that this process was started with are not its children's, and
// of two values of a variable some programs take the first.
func Environ(environ []string) []string {
	return slices.DeleteFunc(slices.Clone(environ), func(kv string) bool {
		name, _, _ := strings.Cut(kv, "=")
		return name == FDVar || name == nodeFDVar || name == nodeModeVar
	})
}

// Advanced reports whether environ asks for Node's serialization "advanced",
// which no NodeConn speaks.
func Advanced(environ []string) bool {
	return slices.Contains(environ, nodeModeVar+"=advanced")
}

// Serve implements Conn.
func (c *NodeConn) Serve(ready func()) error {
	if ready != nil {
		ready()
	}
	c.buf = make([]byte, readSize)
	var err error
	for err == nil {
		if err = c.turn(); err == nil {
			err = c.lead.lend(c.underWay)
		}
	}
	err = endOfLines(err, c.part)
	c.mu.Lock()
	c.err = closedBy(err)
	left := c.pending
	c.pending, c.sent = nil, 0
	c.mu.Unlock()
	c.Close()
	for _, r := range left {
		r.To.End(r, nil, c.err)
	}
	return err
}

func (c *NodeConn) underWay() int { return len(c.pending) }

// turn reads once and handles what has come.
func (c *NodeConn) turn() error {
	n, err := c.in.Read(c.buf)
	if err != nil {
		return err
	}
	c.w.hold()
	defer c.w.release()
	c.part, err = c.take(c.part, c.buf[:n])
	return err
}

// Await implements Awaiter.
func (c *NodeConn) Await(r *Request) { c.lead.await(r, c.underWay, c.poll) }

// poll is turn for one that cannot wait.
func (c *NodeConn) poll() error {
	c.in.nowait = true
	defer func() { c.in.nowait = false }()
	return c.turn()
}

// take handles what was read; pending is what was left of the read before.
func (c *NodeConn) take(pending, data []byte) ([]byte, error) {
	if len(pending) == 0 && data[0] == 0 {
		// The length of a binary message, of which no line would ever come.
		return nil, fmt.Errorf("%w: not JSON lines; a program must not ask for Node's serialization 'advanced'", ErrProtocol)
	}
	pending, err := splitLines(pending, data, c.limit, c.line)
	if err != nil {
		return nil, err
	}
	// The kernel ends a read behind the message that a descriptor came with:
	// either that has been handled, or it is what is left.
	if n := c.in.waiting(); n > 1 || n == 1 && len(pending) == 0 {
		return nil, fmt.Errorf("%w: %d descriptors that no message has announced", ErrProtocol, n)
	}
	return pending, nil
}

// line handles one line of the program.
func (c *NodeConn) line(b []byte) error {
	if err := checkJSON(b); err != nil {
		return err
	}
	b = bytes.TrimSpace(b)
	cmd, fields := nodeCommand(b)
	switch cmd {
	case "":
		return c.message(b, nil, false)
	case "NODE_HANDLE_ACK", "NODE_HANDLE_NACK":
		return c.acknowledged(cmd == "NODE_HANDLE_ACK")
	}
	if err := c.rate.take(); err != nil {
		return err
	}
	switch cmd {
	case "NODE_HANDLE":
		return c.handleMessage(fields)
	case "NODE_SOCKET_GET_COUNT":
		// Of the sockets that were sent here none is this end's any more.
		c.reply(`{"cmd":"NODE_SOCKET_COUNT","count":0,"key":`, fields["key"])
	case "NODE_SOCKET_NOTIFY_CLOSE":
		// A server that the program closes waits for this.
		c.reply(`{"cmd":"NODE_SOCKET_ALL_CLOSED","key":`, fields["key"])
	}
	return nil
}

// reply sends one of Node's own messages, ahead of what waits behind a handle.
func (c *NodeConn) reply(head string, key json.RawMessage) {
	if len(key) == 0 || len(key) > maxKey {
		return
	}
	_ = c.w.queue(append(append([]byte(head), key...), "}\n"...), nil) // full or closed: it is the program that waits
}

// handleMessage takes a message that came with a handle.
func (c *NodeConn) handleMessage(fields map[string]json.RawMessage) error {
	var kind string
	switch _ = json.Unmarshal(fields["type"], &kind); kind {
	case "net.Socket", "net.Server", "net.Native", "dgram.Socket", "dgram.Native":
	default:
		return fmt.Errorf("%w: a handle of the type %q", ErrProtocol, clip(fields["type"]))
	}
	files, err := c.in.takeAs(1, kind)
	switch {
	case errors.Is(err, os.ErrClosed):
		return err
	case err != nil:
		// The program keeps the handle until it is told, and sends it again.
		_ = c.w.queue([]byte(`{"cmd":"NODE_HANDLE_NACK"}`+"\n"), nil)
		return nil
	}
	_ = c.w.queue([]byte(`{"cmd":"NODE_HANDLE_ACK"}`+"\n"), nil)
	msg := fields["msg"]
	if len(msg) == 0 {
		msg = json.RawMessage("null")
	}
	if cmd, _ := nodeCommand(msg); cmd != "" { // Node's own affairs, of which there are none here
		closeFiles(files)
		return nil
	}
	return c.message(msg, files[0], true)
}

// message hands on what the program sent: an answer where a task is under way.
// f is nil or a handle. Unless owned is set, b is copied.
func (c *NodeConn) message(b []byte, f *os.File, owned bool) error {
	if c.health && f == nil && isHealthResponse(b) {
		c.mu.Lock()
		ours := c.pings > 0
		if ours {
			c.pings--
		}
		c.mu.Unlock()
		if ours {
			return nil
		}
	}
	c.mu.Lock()
	var r *Request
	if c.sent > 0 {
		r = c.pending[0]
		c.pending = slices.Delete(c.pending, 0, 1)
		c.sent--
	}
	c.mu.Unlock()
	if r == nil {
		return c.unsolicited(b, f, owned)
	}
	c.lead.ended(r)
	if f != nil {
		r.Got = append(r.Got, f)
	}
	if e := failure(b); e != nil {
		r.To.End(r, nil, e)
		return nil
	}
	if !owned {
		b = bytes.Clone(b)
	}
	r.To.End(r, b, nil)
	return nil
}

func (c *NodeConn) unsolicited(b []byte, f *os.File, owned bool) error {
	if err := c.rate.take(); err != nil {
		closeFile(f)
		return err
	}
	if c.onMessage == nil {
		closeFile(f)
		return nil
	}
	if !owned {
		b = bytes.Clone(b)
	}
	// Others' sends must not wait for what the receiver does here.
	c.w.release()
	c.onMessage(b, f)
	c.w.hold()
	return nil
}

func closeFile(f *os.File) {
	if f != nil {
		f.Close()
	}
}

// isHealthResponse reports whether b is {"type":"health_check_response", …}.
func isHealthResponse(b []byte) bool {
	const want = "health_check_response"
	if len(b) == 0 || b[0] != '{' || !bytes.Contains(b, []byte(want)) {
		return false
	}
	var m map[string]json.RawMessage
	return json.Unmarshal(b, &m) == nil && string(m["type"]) == `"`+want+`"`
}

// nodeCommand returns the "cmd" of one of Node's own messages and all of its
// fields, "" for a message of the program.
func nodeCommand(b []byte) (cmd string, fields map[string]json.RawMessage) {
	if len(b) == 0 || b[0] != '{' || !bytes.Contains(b, []byte(`NODE_`)) && !bytes.Contains(b, []byte(`\u`)) {
		return "", nil
	}
	// A struct would match "CMD" as well. Of two of a name the last counts, as
	// in JavaScript.
	if json.Unmarshal(b, &fields) != nil {
		return "", nil
	}
	if json.Unmarshal(fields["cmd"], &cmd) != nil || len(cmd) <= len("NODE_") || cmd[:len("NODE_")] != "NODE_" {
		return "", nil
	}
	return cmd, fields
}

// Start implements Conn. The file of the request is duplicated before it
// returns.
func (c *NodeConn) Start(r *Request) error {
	if len(r.Files) > 1 {
		return fmt.Errorf("%w: %d files, and a message to Node carries one handle", ErrTooLarge, len(r.Files))
	}
	m := outbound{r: r}
	var f *os.File
	if len(r.Files) == 1 {
		f = r.Files[0]
	}
	return c.send(m, r.Body, f, false)
}

// Send sends a message that no answer is expected to, with f as its handle
// unless that is nil. f is duplicated before Send returns and stays the
// caller's. Errors: ErrClosed, ErrFull, ErrTooLarge, ErrNotJSON, ErrHandle,
// ErrNodeMessage. A nil error does not mean that it has arrived; a handle that
// does not arrive is closed in the end.
func (c *NodeConn) Send(msg json.RawMessage, f *os.File) error {
	return c.send(outbound{}, msg, f, false)
}

// SendRaw is Send for programs that want the bare handle in place of a
// net.Socket, net.Server or dgram.Socket, such as to give it to server.listen.
func (c *NodeConn) SendRaw(msg json.RawMessage, f *os.File) error {
	return c.send(outbound{}, msg, f, true)
}

func (c *NodeConn) send(m outbound, body []byte, f *os.File, raw bool) error {
	var err error
	if m.msg, err = jsonLine(body, c.limit); err != nil {
		return err
	}
	if cmd, _ := nodeCommand(bytes.TrimLeft(m.msg, " \t")); cmd != "" {
		return fmt.Errorf("%w: %q", ErrNodeMessage, clip(m.msg))
	}
	if f != nil {
		if m.handle, err = newHandle(f, raw); err != nil {
			return err
		}
	}
	busy, err := c.put(&m)
	if err != nil {
		m.handle.close()
		return err
	}
	c.w.flush(busy)
	return nil
}

// put queues m, whose handle is this connection's from then on unless it fails.
// busy is for the flush that is to follow.
func (c *NodeConn) put(m *outbound) (busy bool, err error) {
	c.mu.Lock()
	defer c.mu.Unlock()
	switch {
	case c.err != nil:
		err = c.err
	case c.stopped || c.closed:
		err = ErrClosed
	case m.r != nil && m.r.cancelled:
		err = ErrCancelled
	case c.handle == nil:
		err = c.write(m)
	case len(c.behind) >= maxBehind || c.behindBy+len(m.msg) > c.maxQueued:
		err = ErrFull
	default:
		c.behind = append(c.behind, *m)
		c.behindBy += len(m.msg)
	}
	if err != nil {
		return false, err
	}
	if m.r != nil {
		m.r.sent = true // or about to be; it is not kept back any more
		c.pending = append(c.pending, m.r)
		c.lead.started(m.r)
	}
	return len(c.pending) >= busyFrom, nil
}

// write queues m, whose handle is this connection's from then on unless it
// fails; c.mu is held.
func (c *NodeConn) write(m *outbound) error {
	if len(m.handle.fds) == 0 {
		if err := c.w.queue(nil, m.msg); err != nil {
			return err
		}
		c.finish("\n")
	} else {
		again, err := unix.FcntlInt(uintptr(m.handle.fds[0]), unix.F_DUPFD_CLOEXEC, 0) // it may have to be sent again
		if err != nil {
			return fmt.Errorf("ipc: %w", os.NewSyscallError("fcntl", err))
		}
		head := `{"cmd":"NODE_HANDLE","type":"` + m.handle.kind + `",`
		if m.handle.dgram != "" {
			head += `"dgramType":"` + m.handle.dgram + `",`
		}
		if err := c.w.queueFDs([]byte(head+`"msg":`), m.msg, []int{again}); err != nil {
			return err
		}
		held := *m // m itself stays off the heap
		c.handle = &held
		c.finish("}\n")
	}
	if m.r != nil && m.tries == 0 {
		c.sent++
	}
	return nil
}

// finish queues the end of a line whose beginning is queued; c.mu is held. It
// is room for a few bytes that may be missing, and half a line helps nobody.
func (c *NodeConn) finish(tail string) {
	if err := c.w.queue([]byte(tail), nil); err != nil {
		c.closeLocked()
	}
}

// acknowledged goes on behind a handle that has arrived, or not.
func (c *NodeConn) acknowledged(arrived bool) error {
	c.mu.Lock()
	m := c.handle
	if m == nil {
		c.mu.Unlock()
		return fmt.Errorf("%w: an acknowledgement, where no handle was sent", ErrProtocol)
	}
	c.handle = nil
	if !arrived && m.tries < maxRetransmissions {
		m.tries++
		err := c.write(m)
		c.mu.Unlock()
		if err != nil {
			m.handle.close()
		}
		return err
	}
	m.handle.close()
	lost := !arrived && m.r != nil && c.forget(m.r)
	err := c.goOn()
	c.mu.Unlock()
	if lost {
		c.lead.ended(m.r)
		m.r.To.End(m.r, nil, ErrHandleLost)
	}
	return err
}

// forget takes r, the last request that was written, out of pending and reports
// whether it was there; c.mu is held.
func (c *NodeConn) forget(r *Request) bool {
	if c.sent == 0 || c.pending[c.sent-1] != r {
		return false // answered all the same
	}
	c.sent--
	c.pending = slices.Delete(c.pending, c.sent, c.sent+1)
	return true
}

// goOn sends what waited behind a handle, up to the next one; c.mu is held.
func (c *NodeConn) goOn() error {
	for c.handle == nil && len(c.behind) > 0 {
		m := c.behind[0]
		if err := c.write(&m); err != nil {
			return err // m stays where Close finds it
		}
		c.behind[0] = outbound{}
		c.behind = c.behind[1:]
		c.behindBy -= len(m.msg)
	}
	if len(c.behind) == 0 {
		c.behind = nil
	}
	c.disconnect()
	return nil
}

// disconnect ends the channel towards the program if that was asked for and
// nothing is left to be sent; c.mu is held.
func (c *NodeConn) disconnect() {
	if !c.stopped || c.handle != nil || len(c.behind) > 0 {
		return
	}
	c.w.whenWritten(func() {
		_ = c.sock.rc.Control(func(fd uintptr) { _ = unix.Shutdown(int(fd), unix.SHUT_WR) }) // closed: just as well
	})
}

// Cancel implements Conn. It can only keep back what was not started.
func (c *NodeConn) Cancel(r *Request) bool {
	c.mu.Lock()
	defer c.mu.Unlock()
	r.cancelled = true
	return !r.sent
}

// Ping implements Conn: with Options.HealthCheck it asks by the message
// {"type":"health_check"}.
func (c *NodeConn) Ping() bool {
	if !c.health {
		return false
	}
	c.mu.Lock()
	c.pings++
	c.mu.Unlock()
	if c.Send(json.RawMessage(`{"type":"health_check"}`), nil) != nil {
		c.mu.Lock()
		c.pings--
		c.mu.Unlock()
		return false
	}
	return true
}

// Heard implements Conn.
func (c *NodeConn) Heard() uint64 { return c.in.heard.Load() }

// Stop implements Conn: the program sees 'disconnect' behind what was sent.
func (c *NodeConn) Stop() {
	c.mu.Lock()
	defer c.mu.Unlock()
	c.stopped = true
	c.disconnect()
}

// Close implements Conn.
func (c *NodeConn) Close() {
	c.mu.Lock()
	defer c.mu.Unlock()
	c.closeLocked()
}

func (c *NodeConn) closeLocked() {
	if c.closed {
		return
	}
	c.closed = true
	c.w.fail(ErrClosed)
	c.sock.Close()
	c.in.close()
	if c.handle != nil {
		c.handle.handle.close()
		c.handle = nil
	}
	for i := range c.behind {
		c.behind[i].handle.close()
	}
	c.behind, c.behindBy = nil, 0
}

// newHandle duplicates f and finds out what it is to Node. raw asks for the
// bare handle.
func newHandle(f *os.File, raw bool) (nodeHandle, error) {
	fds, err := fdpass.Dup([]*os.File{f})
	if err != nil {
		return nodeHandle{}, fmt.Errorf("ipc: %w", err)
	}
	h := nodeHandle{fds: fds}
	if h.kind, h.dgram = nodeKind(fds[0]); h.kind == "" {
		h.close()
		return nodeHandle{}, fmt.Errorf("%w: %s", ErrHandle, f.Name())
	}
	switch {
	case !raw:
	case h.dgram != "":
		h.kind, h.dgram = "dgram.Native", ""
	default:
		h.kind = "net.Native"
	}
	return h, nil
}

// nodeKind is what a descriptor is to Node; "" where Node would not take it, or
// would even abort over it.
func nodeKind(fd int) (kind, dgram string) {
	sort, err := unix.GetsockoptInt(fd, unix.SOL_SOCKET, unix.SO_TYPE)
	if err != nil {
		var st unix.Stat_t
		if unix.Fstat(fd, &st) != nil || st.Mode&unix.S_IFMT != unix.S_IFIFO {
			return "", ""
		}
		if flags, err := unix.FcntlInt(uintptr(fd), unix.F_GETFL, 0); err != nil || flags&unix.O_ACCMODE == unix.O_WRONLY {
			return "net.Native", "" // a net.Socket would begin to read
		}
		return "net.Socket", ""
	}
	domain, err := unix.GetsockoptInt(fd, unix.SOL_SOCKET, unix.SO_DOMAIN)
	if err != nil {
		return "", ""
	}
	inet := domain == unix.AF_INET || domain == unix.AF_INET6
	switch {
	case sort == unix.SOCK_STREAM && (inet || domain == unix.AF_UNIX):
		if listens, err := unix.GetsockoptInt(fd, unix.SOL_SOCKET, unix.SO_ACCEPTCONN); err == nil && listens != 0 {
			return "net.Server", ""
		}
		return "net.Socket", ""
	case sort == unix.SOCK_DGRAM && domain == unix.AF_INET:
		return "dgram.Socket", "udp4"
	case sort == unix.SOCK_DGRAM && domain == unix.AF_INET6:
		return "dgram.Socket", "udp6"
	}
	return "", ""
}

// rate bounds how many messages a second come. A negative limit is none.
type rate struct {
	limit int
	since time.Time
	n     int
}

func (r *rate) take() error {
	if r.limit < 0 {
		return nil
	}
	now := time.Now()
	if now.Sub(r.since) >= time.Second {
		r.since, r.n = now, 0
	}
	if r.n++; r.n > r.limit {
		return fmt.Errorf("%w: more than %d messages in a second that answer nothing", ErrProtocol, r.limit)
	}
	return nil
}
