package ipc

import (
	"encoding/binary"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"os"
	"time"

	"github.com/remuda-dev/remuda/internal/jsondepth"
)

// Version is the version of the frames protocol that this package speaks.
const Version = 1

// FDVar is the environment variable that tells a worker which descriptor its
// channel is.
const FDVar = "REMUDA_FRAMES_FD"

// HeaderSize is the length in bytes of what precedes each frame's payload.
const HeaderSize = 12

// DefaultMaxFrame is the largest payload in bytes where no other bound is set.
const DefaultMaxFrame = 64 << 20

const (
	maxName  = 1 << 10  // bytes of a task's name
	maxHello = 16 << 10 // bytes of a hello
	maxPing  = 64       // bytes of a ping or pong
)

// Type is what a frame is.
type Type uint8

// The types of frames. Those of 128 and above that a reader does not know are
// skipped; any other unknown type is a violation of the protocol.
const (
	TypeHello    Type = 1  // both: versions and bounds; the first frame each way
	TypeTask     Type = 2  // to the worker: do this
	TypeResult   Type = 3  // to the parent: the task is done; ends its id
	TypeError    Type = 4  // to the parent: the task failed; ends its id
	TypeProgress Type = 5  // to the parent: how far a task is
	TypeChunk    Type = 6  // to the parent: a piece of a streamed result
	TypeCancel   Type = 7  // to the worker: the answer is not wanted any more
	TypePing     Type = 8  // both: are you there?
	TypePong     Type = 9  // both: the answer, with the ping's id and payload
	TypeStop     Type = 10 // to the worker: finish what you have, then end
	TypeHandles  Type = 11 // both: descriptors that belong to the next frame

	TypeSubscribe   Type = 12 // to the parent: what the worker wants to hear
	TypeUnsubscribe Type = 13 // to the parent: and what not any more
	TypePublish     Type = 14 // both: a message for whoever has subscribed

	TypeSegment Type = 15 // both: memory that the sender shares
	TypeShared  Type = 16 // both: the next frame's body is in it
	TypeRelease Type = 17 // to the worker: it may use the segment again
	TypeForget  Type = 18 // both: the sender will not use the segment again
)

// Optional reports whether a reader that does not know the type skips it.
func (t Type) Optional() bool { return t >= 128 }

func (t Type) String() string {
	names := [...]string{"0", "HELLO", "TASK", "RESULT", "ERROR", "PROGRESS", "CHUNK", "CANCEL", "PING", "PONG", "STOP", "HANDLES", "SUBSCRIBE", "UNSUBSCRIBE", "PUBLISH", "SEGMENT", "SHARED", "RELEASE", "FORGET"}
	if int(t) < len(names) {
		return names[t]
	}
	return fmt.Sprint(uint8(t))
}

// Frame is one frame.
type Frame struct {
	Type    Type
	ID      uint32 // which task or ping it belongs to; 0 for none
	Payload []byte
	Took    time.Duration // RESULT and ERROR: the handler's time as it says; 0: not told
	Files   []*os.File    // TASK and RESULT: what came along; the receiver's own
	Shared  *Shared       // TASK and RESULT: the body, where it is not in Payload; to be released
}

var (
	// ErrProtocol says that the other side sent what it must not.
	ErrProtocol = errors.New("ipc: protocol violation")
	// ErrTooLarge says that a message exceeds the bound that was set.
	ErrTooLarge = errors.New("ipc: message too large")
	// ErrClosed says that the channel has ended.
	ErrClosed = errors.New("ipc: channel closed")
	// ErrFull says that the other side does not read what it is sent.
	ErrFull = errors.New("ipc: channel full: the other side does not read")
	// ErrCancelled says that a request was cancelled before it was sent.
	ErrCancelled = errors.New("ipc: request cancelled")
)

// closedBy is ErrClosed for what was under way on a channel that err has ended;
// nil: it ended well.
func closedBy(err error) error {
	if err == nil {
		return ErrClosed
	}
	return fmt.Errorf("%w: %w", ErrClosed, err)
}

// AppendHeader appends the header of a frame with a payload of n bytes.
func AppendHeader(dst []byte, t Type, id uint32, n int) []byte {
	dst = binary.LittleEndian.AppendUint32(dst, uint32(n))
	dst = append(dst, byte(t), 0, 0, 0)
	return binary.LittleEndian.AppendUint32(dst, id)
}

// AppendFrame appends a whole frame.
func AppendFrame(dst []byte, f Frame) []byte {
	return append(AppendHeader(dst, f.Type, f.ID, len(f.Payload)), f.Payload...)
}

// MaxTook is the longest time that an answer can tell; it stands for longer ones
// too.
const MaxTook = (1<<24 - 1) * time.Microsecond

// setTook puts a handler's time into a header.
func setTook(header []byte, took time.Duration) {
	if took <= 0 {
		return
	}
	us := uint32(max(min(took, MaxTook)/time.Microsecond, 1)) // 0 would mean that it is not told
	header[5], header[6], header[7] = byte(us), byte(us>>8), byte(us>>16)
}

// parseHeader reads a header of HeaderSize bytes.
func parseHeader(b []byte, limit int) (t Type, id uint32, n int, err error) {
	size := binary.LittleEndian.Uint32(b)
	t = Type(b[4])
	if t != TypeResult && t != TypeError && (b[5] != 0 || b[6] != 0 || b[7] != 0) {
		return 0, 0, 0, fmt.Errorf("%w: the header's reserved bytes are not zero", ErrProtocol)
	}
	if t == 0 {
		return 0, 0, 0, fmt.Errorf("%w: frame of type 0", ErrProtocol)
	}
	switch t {
	case TypeHello:
		limit = min(limit, maxHello)
	case TypePing, TypePong:
		limit = min(limit, maxPing)
	case TypeTask:
		limit += taskHeader + maxName
	case TypeStop, TypeCancel, TypeRelease, TypeForget:
		limit = 0
	case TypeSegment:
		limit = 8
	case TypeShared:
		limit = sharedSize
	case TypeHandles:
		limit = min(limit, MaxFiles)
	case TypeSubscribe, TypeUnsubscribe:
		limit = 1 + MaxTopic
	case TypePublish:
		limit = 1 + MaxTopic + MaxPublish
	}
	if uint64(size) > uint64(limit) {
		return 0, 0, 0, fmt.Errorf("%w: %s frame of %d bytes, where %d are allowed", ErrTooLarge, t, size, limit)
	}
	return t, binary.LittleEndian.Uint32(b[8:]), int(size), nil
}

// Hello is what each side says first.
type Hello struct {
	Remuda   int    `json:"remuda"`        // the version of the protocol
	MaxFrame int    `json:"max_frame"`     // the largest payload in bytes that the sender takes; 0: DefaultMaxFrame
	PID      int    `json:"pid,omitempty"` // worker
	SDK      string `json:"sdk,omitempty"` // worker: "go", "node 20.1", …
	// Concurrency is how many tasks the parent will have under way at a time.
	Concurrency int `json:"concurrency,omitempty"`
	// Files says that the sender takes descriptors with tasks or results.
	Files bool `json:"files,omitempty"`
	// Handles says that a worker, a program of Node, takes descriptors over
	// Node's own channel.
	Handles bool `json:"handles,omitempty"`
	// Shared is from how many bytes on the sender takes payloads in shared
	// memory; 0: it takes none.
	Shared int `json:"shm,omitempty"`
}

// AppendHello appends a hello frame.
func AppendHello(dst []byte, h Hello) []byte {
	b, err := json.Marshal(h)
	if err != nil { // ints and a string
		panic(err)
	}
	return AppendFrame(dst, Frame{Type: TypeHello, Payload: b})
}

// ParseHello reads the payload of a hello frame and checks the version.
func ParseHello(b []byte) (Hello, error) {
	var h Hello
	if err := json.Unmarshal(b, &h); err != nil {
		return Hello{}, fmt.Errorf("%w: hello: %w", ErrProtocol, err)
	}
	if h.Remuda != Version {
		return Hello{}, fmt.Errorf("%w: the other side speaks version %d of the frames protocol, this one version %d", ErrProtocol, h.Remuda, Version)
	}
	if h.MaxFrame < 0 || h.Shared < 0 {
		return Hello{}, fmt.Errorf("%w: hello: max_frame %d, shm %d", ErrProtocol, h.MaxFrame, h.Shared)
	}
	if h.MaxFrame == 0 {
		h.MaxFrame = DefaultMaxFrame
	}
	return h, nil
}

const taskHeader = 6

// appendTask appends the header of a task frame and all of its payload but the
// body.
func appendTask(dst []byte, id uint32, name string, timeout time.Duration, body int) []byte {
	dst = AppendHeader(dst, TypeTask, id, taskHeader+len(name)+body)
	// Rounded up: 0 would mean none.
	ms := min(uint64((timeout+time.Millisecond-1)/time.Millisecond), 1<<32-1)
	dst = binary.LittleEndian.AppendUint32(dst, uint32(ms))
	dst = binary.LittleEndian.AppendUint16(dst, uint16(len(name)))
	return append(dst, name...)
}

// ParseTask reads the payload of a task frame. body aliases b. timeout is 0
// where there is none.
func ParseTask(b []byte) (name string, timeout time.Duration, body []byte, err error) {
	if len(b) < taskHeader {
		return "", 0, nil, fmt.Errorf("%w: task frame of %d bytes", ErrProtocol, len(b))
	}
	n := int(binary.LittleEndian.Uint16(b[4:]))
	if n > maxName || n > len(b)-taskHeader {
		return "", 0, nil, fmt.Errorf("%w: task name of %d bytes", ErrProtocol, n)
	}
	timeout = time.Duration(binary.LittleEndian.Uint32(b)) * time.Millisecond
	return string(b[taskHeader : taskHeader+n]), timeout, b[taskHeader+n:], nil
}

// appendPublish appends a publish frame without its body.
func appendPublish(dst []byte, topic string, dropped uint32, body int) []byte {
	dst = AppendHeader(dst, TypePublish, dropped, 1+len(topic)+body)
	return append(append(dst, byte(len(topic))), topic...)
}

// ParsePublish reads the payload of a publish frame. body aliases b.
func ParsePublish(b []byte) (topic string, body []byte, err error) {
	if len(b) == 0 || int(b[0]) > len(b)-1 {
		return "", nil, fmt.Errorf("%w: PUBLISH of %d bytes", ErrProtocol, len(b))
	}
	topic = string(b[1 : 1+int(b[0])])
	if err := checkTopic(topic, false); err != nil {
		return "", nil, fmt.Errorf("%w: %w", ErrProtocol, err)
	}
	if body = b[1+len(topic):]; len(body) > MaxPublish {
		return "", nil, fmt.Errorf("%w: PUBLISH of a message of %d bytes", ErrTooLarge, len(body))
	}
	return topic, body, nil
}

// TaskError is a failure that the worker itself reported.
type TaskError struct {
	Code    string          `json:"code,omitempty"` // for programs; "" where the worker gave none
	Message string          `json:"message"`
	Data    json.RawMessage `json:"data,omitempty"` // whatever the worker added
}

// The codes of task errors that the SDKs use by themselves.
const (
	CodeUnknown   = "unknown_task" // no handler of that name
	CodePanic     = "panic"        // the handler crashed and the worker lives on
	CodeCancelled = "cancelled"    // the handler gave up because it was told to
)

func (e *TaskError) Error() string {
	if e.Code == "" {
		return e.Message
	}
	return e.Message + " (" + e.Code + ")"
}

// AppendError appends an error frame.
func AppendError(dst []byte, id uint32, e *TaskError) []byte {
	b, err := json.Marshal(e)
	if err != nil { // Data is not JSON
		b, _ = json.Marshal(TaskError{Code: e.Code, Message: e.Message})
	}
	return AppendFrame(dst, Frame{Type: TypeError, ID: id, Payload: b})
}

// ParseError reads the payload of an error frame.
func ParseError(b []byte) (*TaskError, error) {
	if jsondepth.Exceeds(b, maxDepth) {
		return nil, fmt.Errorf("%w: error nested deeper than %d", ErrProtocol, maxDepth)
	}
	e := new(TaskError)
	if err := json.Unmarshal(b, e); err != nil {
		return nil, fmt.Errorf("%w: error: %w", ErrProtocol, err)
	}
	return e, nil
}

const readSize = 16 << 10

// frameReader takes frames off a stream.
type frameReader struct {
	r          io.Reader
	buf        []byte
	start, end int
	limit      int
}

// whole reports whether the next frame is in the buffer already,
// with what precedes it.
func (r *frameReader) whole() bool {
	b := r.buf[r.start:r.end]
	for {
		if len(b) < HeaderSize {
			return false
		}
		n := binary.LittleEndian.Uint32(b)
		if uint64(len(b)-HeaderSize) < uint64(n) {
			return false
		}
		if t := Type(b[4]); t != TypeHandles && t != TypeShared {
			return true
		}
		b = b[HeaderSize+n:]
	}
}

// next returns the next frame. Unless owned is set, its payload is valid until
// the following call only. The error is io.EOF between frames.
func (r *frameReader) next() (f Frame, owned bool, err error) {
	for r.end-r.start < HeaderSize {
		if err := r.fill(); err != nil {
			return Frame{}, false, err
		}
	}
	t, id, n, err := parseHeader(r.buf[r.start:], r.limit)
	if err != nil {
		return Frame{}, false, err
	}
	f = Frame{Type: t, ID: id}
	if t == TypeResult || t == TypeError {
		h := r.buf[r.start:]
		f.Took = time.Duration(uint32(h[5])|uint32(h[6])<<8|uint32(h[7])<<16) * time.Microsecond
	}
	if HeaderSize+n <= len(r.buf) {
		for r.end-r.start < HeaderSize+n {
			if err := r.fill(); err != nil {
				return Frame{}, false, err
			}
		}
		f.Payload = r.buf[r.start+HeaderSize : r.start+HeaderSize+n : r.start+HeaderSize+n]
		r.start += HeaderSize + n
		return f, false, nil
	}
	// Too large for the buffer: read in place. Memory grows with what has
	// arrived, not with what was announced.
	body := make([]byte, 0, min(n, 1<<20))
	body = append(body, r.buf[r.start+HeaderSize:r.end]...)
	r.start, r.end = 0, 0
	for len(body) < n {
		if len(body) == cap(body) {
			bigger := make([]byte, len(body), min(n, 2*cap(body)))
			copy(bigger, body)
			body = bigger
		}
		got, err := r.r.Read(body[len(body):min(cap(body), n)])
		body = body[:len(body)+got]
		if err != nil && len(body) < n {
			return Frame{}, false, unexpected(err)
		}
	}
	f.Payload = body
	return f, true, nil
}

func unexpected(err error) error {
	if errors.Is(err, io.EOF) {
		return io.ErrUnexpectedEOF
	}
	return err
}

// fill reads once.
func (r *frameReader) fill() error {
	if r.buf == nil {
		r.buf = make([]byte, readSize)
	}
	if r.start == r.end {
		r.start, r.end = 0, 0
	} else if r.start > 0 {
		r.end = copy(r.buf, r.buf[r.start:r.end])
		r.start = 0
	}
	n, err := r.r.Read(r.buf[r.end:])
	r.end += n
	if n > 0 {
		return nil
	}
	if err == nil {
		return nil
	}
	if r.end > r.start {
		return unexpected(err)
	}
	return err
}
