package ipc

import (
	"bytes"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"os"
	"sync"
	"sync/atomic"

	"golang.org/x/sys/unix"

	"github.com/remuda-dev/remuda/internal/jsondepth"
)

// maxDepth is how deep arrays and objects of a message may nest.
const maxDepth = 512

// lines is the parent's side of a channel on which a task is one JSON value in
// a line and so is its answer. There are no ids: answers come in the order of
// the tasks.
type lines struct {
	in, out *os.File // read and written
	w       *writer
	limit   int
	reads   atomic.Uint64

	mu      sync.Mutex
	pending []*Request // in order
	err     error
	stopped bool
}

// NewJSONLines speaks JSON lines: to are the worker's standard input, from its
// standard output, both non-blocking pipe ends as from os.Pipe. It takes over
// both unless it fails. An object whose only key is "error" is a failure. A
// line that answers no task is a violation of the protocol.
func NewJSONLines(to, from *os.File, o Options) (Conn, error) {
	rc, err := to.SyscallConn()
	if err != nil {
		return nil, fmt.Errorf("ipc: %w", err)
	}
	c := &lines{in: from, out: to, w: newWriter(rc, o.MaxQueued), limit: o.MaxMessage}
	if c.limit <= 0 {
		c.limit = DefaultMaxFrame
	}
	return c, nil
}

func (c *lines) Serve(ready func()) error {
	if ready != nil {
		ready()
	}
	var (
		pending []byte
		buf     = make([]byte, readSize)
		err     error
	)
	for err == nil {
		var n int
		n, err = c.in.Read(buf)
		c.reads.Add(1)
		if n == 0 {
			continue
		}
		c.w.hold()
		var bad error
		if pending, bad = splitLines(pending, buf[:n], c.limit, c.line); bad != nil {
			err = bad
		}
		c.w.release()
	}
	err = endOfLines(err, pending)
	c.mu.Lock()
	c.err = closedBy(err)
	left := c.pending
	c.pending = nil
	c.mu.Unlock()
	c.Close()
	for _, r := range left {
		r.To.End(r, nil, c.err)
	}
	return err
}

// endOfLines is what Serve returns where a read ended with err: nil for an end
// between two lines, of which part is none.
func endOfLines(err error, part []byte) error {
	switch {
	case errors.Is(err, io.EOF) || errors.Is(err, unix.ECONNRESET):
		if len(part) > 0 {
			return io.ErrUnexpectedEOF
		}
		return nil
	case errors.Is(err, os.ErrClosed):
		return nil
	}
	return err
}

// splitLines calls line for every whole line of pending+data and returns what
// is left, copied from data. A line given is valid during the call only.
func splitLines(pending, data []byte, limit int, line func([]byte) error) ([]byte, error) {
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
		if len(whole) > limit {
			return nil, fmt.Errorf("%w: a line of more than %d bytes", ErrTooLarge, limit)
		}
		if err := line(whole); err != nil {
			return nil, err
		}
	}
	if len(pending)+len(data) > limit {
		return nil, fmt.Errorf("%w: a line of more than %d bytes", ErrTooLarge, limit)
	}
	if len(data) == 0 {
		return pending, nil
	}
	return append(pending, data...), nil
}

// line handles one line of the worker.
func (c *lines) line(b []byte) error {
	b = bytes.TrimSpace(b)
	if len(b) == 0 {
		return nil
	}
	if err := checkJSON(b); err != nil {
		return err
	}
	c.mu.Lock()
	if len(c.pending) == 0 {
		c.mu.Unlock()
		return fmt.Errorf("%w: a line that answers no task: %q", ErrProtocol, clip(b))
	}
	r := c.pending[0]
	c.pending[0] = nil
	if c.pending = c.pending[1:]; len(c.pending) == 0 {
		c.pending = nil
	}
	c.mu.Unlock()
	if e := failure(b); e != nil {
		r.To.End(r, nil, e)
		return nil
	}
	r.To.End(r, bytes.Clone(b), nil)
	return nil
}

func clip(b []byte) []byte { return b[:min(len(b), 64)] }

func checkJSON(b []byte) error {
	if jsondepth.Exceeds(b, maxDepth) {
		return fmt.Errorf("%w: nested deeper than %d", ErrProtocol, maxDepth)
	}
	if !json.Valid(b) {
		return fmt.Errorf("%w: not a JSON value: %q", ErrProtocol, clip(b))
	}
	return nil
}

// failure is what an object with the only key "error" says; nil for any other
// value.
func failure(b []byte) *TaskError {
	if len(b) == 0 || b[0] != '{' || !bytes.HasPrefix(bytes.TrimLeft(b[1:], " \t\r\n"), []byte(`"error"`)) {
		return nil
	}
	var m map[string]json.RawMessage
	if json.Unmarshal(b, &m) != nil || len(m) != 1 || m["error"] == nil {
		return nil
	}
	raw := m["error"]
	e := new(TaskError)
	switch raw[0] {
	case '"':
		_ = json.Unmarshal(raw, &e.Message)
	case '{':
		if json.Unmarshal(raw, e) != nil || e.Message == "" {
			*e = TaskError{Message: "the task failed", Data: bytes.Clone(raw)}
		}
	default:
		*e = TaskError{Message: "the task failed", Data: bytes.Clone(raw)}
	}
	return e
}

// ErrNotJSON says that a task's body is not JSON where the protocol needs it.
var ErrNotJSON = errors.New("ipc: the task's body is not a JSON value")

// jsonLine returns body as a JSON value without line breaks, null where it is
// empty.
func jsonLine(body []byte, limit int) ([]byte, error) {
	switch {
	case len(body) == 0:
		return []byte("null"), nil
	case len(body) > limit:
		return nil, fmt.Errorf("%w: %d bytes, where %d are allowed", ErrTooLarge, len(body), limit)
	case !json.Valid(body):
		return nil, fmt.Errorf("%w: %q", ErrNotJSON, clip(body))
	case !bytes.ContainsAny(body, "\n\r"):
		return body, nil
	}
	var b bytes.Buffer
	if err := json.Compact(&b, body); err != nil {
		return nil, fmt.Errorf("%w: %w", ErrNotJSON, err)
	}
	return b.Bytes(), nil
}

func (c *lines) Start(r *Request) error {
	if len(r.Files) > 0 {
		return ErrNoFiles
	}
	body, err := jsonLine(r.Body, c.limit)
	if err != nil {
		return err
	}
	c.mu.Lock()
	switch {
	case c.err != nil:
		c.mu.Unlock()
		return c.err
	case c.stopped:
		c.mu.Unlock()
		return ErrClosed
	case r.cancelled:
		c.mu.Unlock()
		return ErrCancelled
	}
	if err = c.w.queue(body, nil); err == nil {
		// After a part that was taken the rest must follow.
		if err = c.w.queue([]byte{'\n'}, nil); err != nil {
			c.mu.Unlock()
			c.Close()
			return err
		}
		r.sent = true
		c.pending = append(c.pending, r)
	}
	busy := len(c.pending) >= busyFrom
	c.mu.Unlock()
	if err == nil {
		c.w.flush(busy)
	}
	return err
}

// Cancel can only keep back what was not sent.
func (c *lines) Cancel(r *Request) bool {
	c.mu.Lock()
	defer c.mu.Unlock()
	r.cancelled = true
	return !r.sent
}

func (c *lines) Ping() bool { return false }

func (c *lines) Heard() uint64 { return c.reads.Load() }

// Stop closes the worker's standard input when what was sent is written.
func (c *lines) Stop() {
	c.mu.Lock()
	c.stopped = true
	c.mu.Unlock()
	c.w.whenWritten(func() { c.out.Close() })
}

func (c *lines) Close() {
	c.w.fail(ErrClosed)
	c.in.Close()
	c.out.Close()
}
