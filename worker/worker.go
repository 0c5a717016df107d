// Package worker is for programs written in Go that take tasks from a pool of
// Remuda: it speaks the frames protocol (docs/worker-protocol.md) on the
// descriptor that REMUDA_FRAMES_FD names.
//
// Invariant: every task that arrives is answered exactly once, in whatever way
// its handler ends, unless the channel ends first.
//
// It must never import a package of Remuda but ipc.
package worker

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"os"
	"runtime"
	"strconv"
	"sync"
	"sync/atomic"
	"time"

	"golang.org/x/sys/unix"

	"github.com/remuda-dev/remuda/ipc"
)

// Handler does one task. ctx ends when the task is cancelled, when its timeout
// is over, or when the parent is gone. What it returns is the result, which
// must not be changed afterwards. An error that is an *[Error] is reported with
// its code; a panic is reported as a failure of the task.
type Handler func(ctx context.Context, t *Task) ([]byte, error)

// Handlers are the handlers by the names of their tasks. The one under "" gets
// every task that has none of its own.
type Handlers map[string]Handler

// Error is a failure with a code for programs and data.
type Error = ipc.TaskError

// ErrNoChannel says that the program was not started by a pool.
var ErrNoChannel = errors.New("worker: " + ipc.FDVar + " is not set: this program is a worker and is to be started by a pool, for instance with `remuda pool run --protocol frames`")

// Task is what there is to do.
type Task struct {
	Name string
	Body []byte // the handler's own

	id  uint32
	srv *server
}

// Progress tells whoever waits for the task how far it is. It may be called
// from any goroutine until the handler returns.
func (t *Task) Progress(b []byte) error { return t.srv.ch.Send(ipc.TypeProgress, t.id, b) }

// Chunk sends a piece of a result ahead of the rest. The pieces arrive in
// order. It does not wait for the reader; ipc.ErrFull says that it does not
// keep up. b must not be changed afterwards.
func (t *Task) Chunk(b []byte) error { return t.srv.ch.Send(ipc.TypeChunk, t.id, b) }

// JSON makes a handler of a function that takes and gives values of JSON. A
// body that is not what In wants is a failure with the code "invalid".
func JSON[In, Out any](f func(ctx context.Context, in In) (Out, error)) Handler {
	return func(ctx context.Context, t *Task) ([]byte, error) {
		var in In
		if len(t.Body) > 0 {
			if err := json.Unmarshal(t.Body, &in); err != nil {
				return nil, &Error{Code: "invalid", Message: err.Error()}
			}
		}
		out, err := f(ctx, in)
		if err != nil {
			return nil, err
		}
		return json.Marshal(out)
	}
}

// Serve takes tasks until the parent says stop or is gone, or ctx ends. Each
// task has a goroutine of its own; the pool bounds how many there are. It
// returns when the last handler has returned: nil, unless the parent broke the
// protocol or there is no channel ([ErrNoChannel]).
//
// Serve may be called once in a process. The descriptor and the variable are
// not inherited by programs that handlers start.
func Serve(ctx context.Context, h Handlers) error {
	v := os.Getenv(ipc.FDVar)
	if v == "" {
		return ErrNoChannel
	}
	fd, err := strconv.Atoi(v)
	if err != nil || fd < 0 {
		return fmt.Errorf("worker: %s=%q is not a descriptor", ipc.FDVar, v)
	}
	unix.CloseOnExec(fd)
	if err := unix.SetNonblock(fd, true); err != nil {
		return fmt.Errorf("worker: %s=%d: %w", ipc.FDVar, fd, err)
	}
	if err := os.Unsetenv(ipc.FDVar); err != nil {
		return fmt.Errorf("worker: %w", err)
	}
	return ServeFile(ctx, os.NewFile(uintptr(fd), "worker-channel"), h)
}

// ServeFile is [Serve] on a channel of the caller's, a non-blocking Unix stream
// socket, which it takes over.
func ServeFile(ctx context.Context, f *os.File, h Handlers) error {
	ch, err := ipc.NewChannel(f, ipc.ChannelOptions{})
	if err != nil {
		f.Close()
		return fmt.Errorf("worker: %w", err)
	}
	s := &server{ch: ch, handlers: h, base: context.WithoutCancel(ctx), tasks: make(map[uint32]context.CancelFunc)}
	defer context.AfterFunc(ctx, func() { _ = ch.Interrupt() })() // closed: over anyway
	err = s.serve()
	s.cancelAll(err == nil)
	s.running.Wait()
	ch.Flush(flushTimeout)
	ch.Close()
	if err != nil {
		return fmt.Errorf("worker: %w", err)
	}
	return nil
}

const (
	// flushTimeout is how long the last answers wait for a parent that does not
	// read.
	flushTimeout = 5 * time.Second
	// busyFrom is from how many tasks at a time on answers are gathered.
	busyFrom = 4
)

type server struct {
	ch       *ipc.Channel
	handlers Handlers
	base     context.Context
	running  sync.WaitGroup
	count    atomic.Int32

	mu    sync.Mutex
	tasks map[uint32]context.CancelFunc
	gone  bool // the parent is
}

// serve reads until the end, which is nil where it was asked for.
func (s *server) serve() error {
	hello := ipc.Hello{PID: os.Getpid(), SDK: "go " + runtime.Version()}
	if err := s.ch.SendHello(hello); err != nil {
		return nil //nolint:nilerr // the parent is gone
	}
	greeted, stopping := false, false
	for {
		f, owned, _, err := s.ch.Receive()
		switch {
		case errors.Is(err, os.ErrDeadlineExceeded):
			return nil
		case errors.Is(err, io.EOF) || errors.Is(err, io.ErrUnexpectedEOF):
			s.mu.Lock()
			s.gone = true
			s.mu.Unlock()
			return nil
		case err != nil:
			return err
		}
		if !greeted && f.Type != ipc.TypeHello {
			return fmt.Errorf("%w: the parent's first frame is %s, not HELLO", ipc.ErrProtocol, f.Type)
		}
		switch f.Type {
		case ipc.TypeHello:
			h, err := ipc.ParseHello(f.Payload)
			if err != nil {
				return err
			}
			greeted = true
			s.ch.SetPeerMax(h.MaxFrame)
		case ipc.TypeTask:
			name, timeout, body, err := ipc.ParseTask(f.Payload)
			if err != nil {
				return err
			}
			if !owned {
				body = append([]byte(nil), body...)
			}
			if stopping {
				_ = s.ch.SendError(f.ID, &Error{Code: ipc.CodeCancelled, Message: "the worker is stopping"}, false)
				continue
			}
			s.begin(&Task{Name: name, Body: body, id: f.ID, srv: s}, timeout)
		case ipc.TypeCancel:
			s.mu.Lock()
			cancel := s.tasks[f.ID]
			s.mu.Unlock()
			if cancel != nil { // else it was answered meanwhile
				cancel()
			}
		case ipc.TypePing:
			if err := s.ch.Send(ipc.TypePong, f.ID, append([]byte(nil), f.Payload...)); err != nil {
				return nil //nolint:nilerr // the next Receive would say so too
			}
		case ipc.TypePong:
		case ipc.TypeStop:
			if !stopping {
				stopping = true
				go func() {
					s.running.Wait()
					s.ch.Flush(flushTimeout)
					_ = s.ch.Interrupt()
				}()
			}
		default:
			if !f.Type.Optional() {
				return fmt.Errorf("%w: unexpected frame %s from the parent", ipc.ErrProtocol, f.Type)
			}
		}
	}
}

func (s *server) begin(t *Task, timeout time.Duration) {
	var (
		ctx    context.Context
		cancel context.CancelFunc
	)
	if timeout > 0 {
		ctx, cancel = context.WithTimeout(s.base, timeout)
	} else {
		ctx, cancel = context.WithCancel(s.base)
	}
	s.mu.Lock()
	s.tasks[t.id] = cancel
	s.mu.Unlock()
	s.count.Add(1)
	s.running.Add(1)
	go s.run(ctx, cancel, t)
}

func (s *server) run(ctx context.Context, cancel context.CancelFunc, t *Task) {
	var body []byte
	var err error = &Error{Code: ipc.CodePanic, Message: "the handler ended its goroutine"}
	// Deferred, so that whatever way the handler ends there is an answer.
	defer func() {
		if r := recover(); r != nil {
			err = &Error{Code: ipc.CodePanic, Message: fmt.Sprint(r)}
		}
		s.answer(ctx, t, body, err)
		cancel()
		s.running.Done()
	}()
	h, ok := s.handlers[t.Name]
	if !ok {
		h, ok = s.handlers[""]
	}
	if !ok || h == nil {
		err = &Error{Code: ipc.CodeUnknown, Message: fmt.Sprintf("this worker has no handler for the task %q", t.Name)}
		return
	}
	body, err = h(ctx, t)
}

func (s *server) answer(ctx context.Context, t *Task, body []byte, err error) {
	s.mu.Lock()
	delete(s.tasks, t.id)
	s.mu.Unlock()
	busy := s.count.Add(-1) >= busyFrom
	if err == nil {
		if busy {
			err = s.ch.SendSoon(ipc.TypeResult, t.id, body)
		} else {
			err = s.ch.Send(ipc.TypeResult, t.id, body)
		}
	}
	if err == nil {
		return
	}
	var e *Error
	switch {
	case errors.As(err, &e):
	case ctx.Err() != nil && errors.Is(err, ctx.Err()):
		e = &Error{Code: ipc.CodeCancelled, Message: err.Error()}
	default:
		e = &Error{Message: err.Error()}
	}
	_ = s.ch.SendError(t.id, e, busy) // the channel has ended: nobody waits
}

// cancelAll ends the contexts of what runs, unless the end was asked for and
// somebody still waits for the answers.
func (s *server) cancelAll(asked bool) {
	s.mu.Lock()
	defer s.mu.Unlock()
	if asked && !s.gone {
		return
	}
	for _, cancel := range s.tasks {
		cancel()
	}
}
