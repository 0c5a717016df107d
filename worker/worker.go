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
	"net"
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
	// Body is the handler's own until it returns, and no longer: large ones lie
	// in memory that the pool uses again.
	Body []byte
	// Files came with the task. They are closed when the handler has returned;
	// one that keeps them sets Files to nil.
	Files []*os.File

	id    uint32
	srv   *server
	began time.Time
	reply []*os.File
	in    *ipc.Shared // where Body lies, if it does
	out   *ipc.Lease
}

// ResultBuffer returns n bytes for a result, not cleared: a large one that lies
// in them gets to the pool without being copied. They are the handler's own until
// it returns. The latest call counts; for the handler's goroutine.
func (t *Task) ResultBuffer(n int) []byte {
	t.out.End()
	if t.out = t.srv.ch.Lease(n); t.out == nil {
		return make([]byte, n)
	}
	return t.out.Bytes()
}

// Progress tells whoever waits for the task how far it is. It may be called
// from any goroutine until the handler returns.
func (t *Task) Progress(b []byte) error { return t.srv.ch.Send(ipc.TypeProgress, t.id, b) }

// Chunk sends a piece of a result ahead of the rest. The pieces arrive in
// order. It does not wait for the reader; ipc.ErrFull says that it does not
// keep up. b must not be changed afterwards.
func (t *Task) Chunk(b []byte) error { return t.srv.ch.Send(ipc.TypeChunk, t.id, b) }

// Attach has files sent with the result. They are closed when that is sent, or
// the handler has failed. At most ipc.MaxFiles may go with a result; one that
// the parent does not take fails the task with the code "files". For the
// handler's goroutine.
func (t *Task) Attach(files ...*os.File) { t.reply = append(t.reply, files...) }

// Conn returns the connection that is Files[i], a connected TCP or Unix socket.
// It is the caller's, whatever becomes of Files.
func (t *Task) Conn(i int) (net.Conn, error) { return socket(t, i, net.FileConn) }

// Listener returns the listener that is Files[i]. It is the caller's, whatever
// becomes of Files.
func (t *Task) Listener(i int) (net.Listener, error) { return socket(t, i, net.FileListener) }

// PacketConn returns the UDP or Unix datagram socket that is Files[i]. It is the
// caller's, whatever becomes of Files.
func (t *Task) PacketConn(i int) (net.PacketConn, error) { return socket(t, i, net.FilePacketConn) }

func socket[T any](t *Task, i int, of func(*os.File) (T, error)) (c T, err error) {
	if i < 0 || i >= len(t.Files) {
		return c, &Error{Code: CodeFiles, Message: fmt.Sprintf("file %d of the task is wanted, and it came with %d", i, len(t.Files))}
	}
	if c, err = of(t.Files[i]); err != nil {
		return c, &Error{Code: CodeFiles, Message: fmt.Sprintf("file %d of the task: %v", i, err)}
	}
	return c, nil
}

// CodeFiles is the code of the failure of a task whose files are not what is
// needed, or whose answer's cannot be sent.
const CodeFiles = "files"

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
	w, err := Open(h)
	if err != nil {
		return err
	}
	return w.Serve(ctx)
}

// Worker is a worker that does more than its tasks: it publishes and subscribes
// also outside of them. Its methods may be called from any goroutine.
type Worker struct{ s *server }

// Open makes a Worker on the channel that the pool has left. Its Serve must be
// called then. Like [Serve] it may be called once in a process.
func Open(h Handlers) (*Worker, error) {
	f, err := channel()
	if err != nil {
		return nil, err
	}
	return OpenFile(f, h)
}

// OpenFile is [Open] on a channel of the caller's, a non-blocking Unix stream
// socket, which it takes over.
func OpenFile(f *os.File, h Handlers) (*Worker, error) {
	ch, err := ipc.NewChannel(f, ipc.ChannelOptions{})
	if err != nil {
		f.Close()
		return nil, fmt.Errorf("worker: %w", err)
	}
	s := &server{
		ch: ch, handlers: h, tasks: make(map[uint32]context.CancelFunc),
		topics: ipc.NewTopics(), names: make(map[string]int), over: make(chan error, 1), spins: runtime.GOMAXPROCS(0) > 1,
	}
	s.turn.init(s)
	// First of all, whatever is published before Serve; it is sent by Serve.
	ch.Hold()
	if err := ch.SendHello(ipc.Hello{PID: os.Getpid(), SDK: "go " + runtime.Version()}); err != nil {
		ch.Close()
		return nil, fmt.Errorf("worker: %w", err)
	}
	return &Worker{s}, nil
}

// Serve is the function [Serve] for w. It may be called once.
func (w *Worker) Serve(ctx context.Context) error {
	s := w.s
	s.base = context.WithoutCancel(ctx)
	defer context.AfterFunc(ctx, func() { _ = s.ch.Interrupt() })() // closed: over anyway
	s.ch.Release()
	err := s.serve()
	s.cancelAll(err == nil)
	s.running.Wait()
	s.ch.Flush(flushTimeout)
	s.ch.Close()
	if err != nil {
		return fmt.Errorf("worker: %w", err)
	}
	return nil
}

// Publish gives body, which must not be changed any more, to all who have
// subscribed to topic: workers of the pool, this one too, and programs that use
// the pool. It does not wait for them, and nobody says whether there are any.
// What is published before Serve goes out with it. A worker that publishes more
// often than the pool allows (20 000 times a second) is killed. Errors:
// ipc.ErrTopic, ipc.ErrTooLarge, ipc.ErrFull, ipc.ErrClosed.
func (w *Worker) Publish(topic string, body []byte) error { return w.s.ch.Publish(topic, body) }

// Publish is [Worker.Publish].
func (t *Task) Publish(topic string, body []byte) error { return t.srv.ch.Publish(topic, body) }

// Subscription is what a worker has subscribed to.
type Subscription struct {
	*ipc.Subscription
	s    *server
	name string
	once sync.Once
}

// Subscribe subscribes to a topic, or with a "*" at the end to all whose names
// begin with what precedes it. What comes waits within the bounds of o; what o
// says of a slow subscriber holds for the pool's side too, where the policy of
// the worker's latest subscription counts for all of them. The caller must Close
// it; with the end of Serve nothing more comes. Errors: ipc.ErrTopic,
// ipc.ErrClosed.
func (w *Worker) Subscribe(topic string, o ipc.SubscribeOptions) (*Subscription, error) {
	s := w.s
	sub, err := s.topics.Subscribe(topic, o)
	if err != nil {
		return nil, err
	}
	// Under the lock, so that the frames go out in the order of the counts.
	s.mu.Lock()
	defer s.mu.Unlock()
	if err := s.ch.Subscribe(topic, o.Slow); err != nil {
		sub.Close()
		return nil, err
	}
	s.names[topic]++
	return &Subscription{Subscription: sub, s: s, name: topic}, nil
}

// Close ends the subscription.
func (s *Subscription) Close() {
	s.once.Do(func() {
		s.Subscription.Close()
		s.s.mu.Lock()
		defer s.s.mu.Unlock()
		if s.s.names[s.name]--; s.s.names[s.name] == 0 {
			delete(s.s.names, s.name)
			_ = s.s.ch.Unsubscribe(s.name) // ended: just as well
		}
	})
}

// channel takes the channel that the pool has left.
func channel() (*os.File, error) {
	v := os.Getenv(ipc.FDVar)
	if v == "" {
		return nil, ErrNoChannel
	}
	fd, err := strconv.Atoi(v)
	if err != nil || fd < 0 {
		return nil, fmt.Errorf("worker: %s=%q is not a descriptor", ipc.FDVar, v)
	}
	unix.CloseOnExec(fd)
	if err := unix.SetNonblock(fd, true); err != nil {
		return nil, fmt.Errorf("worker: %s=%d: %w", ipc.FDVar, fd, err)
	}
	if err := os.Unsetenv(ipc.FDVar); err != nil {
		return nil, fmt.Errorf("worker: %w", err)
	}
	return os.NewFile(uintptr(fd), "worker-channel"), nil
}

// ServeFile is [Serve] on a channel of the caller's, a non-blocking Unix stream
// socket, which it takes over.
func ServeFile(ctx context.Context, f *os.File, h Handlers) error {
	w, err := OpenFile(f, h)
	if err != nil {
		return err
	}
	return w.Serve(ctx)
}

const (
	// flushTimeout is how long the last answers wait for a parent that does not
	// read.
	flushTimeout = 5 * time.Second
	// busyFrom is from how many tasks at a time on answers are gathered.
	busyFrom = 4
	// expectAfter is after how many quick tasks that came one by one the next
	// is looked for without rest: with more callers the processor is of better
	// use elsewhere.
	expectAfter = 32
)

type server struct {
	ch       *ipc.Channel
	handlers Handlers
	base     context.Context
	running  sync.WaitGroup
	count    atomic.Int32

	topics *ipc.Topics // of this process

	mu    sync.Mutex
	tasks map[uint32]context.CancelFunc
	names map[string]int // how often each topic is subscribed to
	gone  bool           // the parent is

	turn turn
	over chan error // how the reading ended

	// Of the one that reads.
	greeted, stopping bool
	spins             bool // there is a processor to look for tasks with
	lone              int  // tasks in a row that were quick and alone
	held              bool // answers wait for those to what else has come
}

// serve reads until the end, which is nil where it was asked for.
func (s *server) serve() error {
	go s.read()
	return <-s.over
}

// read reads until the end, or until another goroutine has taken over.
func (s *server) read() {
	err := s.readAll()
	if !errors.Is(err, errTakenOver) {
		s.release()
		s.over <- err
	}
}

func (s *server) readAll() error {
	more := false
	for {
		if !more {
			s.release()
		}
		var (
			f     ipc.Frame
			owned bool
			err   error
		)
		f, owned, more, err = s.ch.Receive()
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
		if !s.greeted && f.Type != ipc.TypeHello {
			return fmt.Errorf("%w: the parent's first frame is %s, not HELLO", ipc.ErrProtocol, f.Type)
		}
		if f.Files != nil && s.stopping {
			closeAll(f.Files)
		}
		if (f.Files != nil || f.Shared != nil) && f.Type != ipc.TypeTask {
			closeAll(f.Files)
			f.Shared.Release()
			return fmt.Errorf("%w: descriptors or shared memory with a frame %s of the parent", ipc.ErrProtocol, f.Type)
		}
		switch f.Type {
		case ipc.TypeHello:
			h, err := ipc.ParseHello(f.Payload)
			if err != nil {
				return err
			}
			s.greeted = true
			s.ch.SetPeer(h)
		case ipc.TypeTask:
			name, timeout, body, err := ipc.ParseTask(f.Payload)
			if err != nil {
				closeAll(f.Files)
				f.Shared.Release()
				return err
			}
			switch {
			case f.Shared != nil && len(body) > 0:
				f.Shared.Release()
				return fmt.Errorf("%w: a task both in shared memory and not", ipc.ErrProtocol)
			case f.Shared != nil:
				body = f.Shared.Bytes
			case !owned:
				body = append([]byte(nil), body...)
			}
			if s.stopping {
				f.Shared.Release()
				_ = s.ch.SendError(f.ID, &Error{Code: ipc.CodeCancelled, Message: "the worker is stopping"}, ipc.Answer{})
				continue
			}
			if err := s.begin(&Task{Name: name, Body: body, Files: f.Files, id: f.ID, srv: s, in: f.Shared}, timeout, more); err != nil {
				return err
			}
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
		case ipc.TypePublish:
			topic, body, err := ipc.ParsePublish(f.Payload)
			if err != nil {
				return err
			}
			s.topics.Forward(ipc.Message{Topic: topic, Body: append([]byte(nil), body...), Dropped: uint64(f.ID)})
		case ipc.TypePong, ipc.TypeSegment, ipc.TypeForget, ipc.TypeRelease:
		case ipc.TypeStop:
			if !s.stopping {
				s.stopping = true
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

// begin has a task done, in a goroutine of its own or, where that is quicker, in
// this one. The error is errTakenOver, where another goroutine reads now. more
// says that something has come behind the task.
func (s *server) begin(t *Task, timeout time.Duration, more bool) error {
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
	alone := s.count.Add(1) == 1 && !more
	s.running.Add(1)
	now := time.Now()
	if !s.turn.quick(now, alone) {
		s.lone = 0
		s.release()
		go s.run(ctx, cancel, t)
		return nil
	}
	if more && !s.held {
		s.held = true
		s.ch.Hold()
	}
	t.began = now
	if err := s.turn.run(func() { s.run(ctx, cancel, t) }); err != nil {
		return err
	}
	if !alone {
		s.lone = 0
	} else if s.lone++; s.lone > expectAfter && s.spins {
		s.ch.Expect()
	}
	return nil
}

// release sends the answers that were held.
func (s *server) release() {
	if s.held {
		s.held = false
		s.ch.Release()
	}
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
		t.in.Release()
		t.out.End()
		closeAll(t.Files)
		closeAll(t.reply)
		cancel()
		s.running.Done()
	}()
	if t.began.IsZero() {
		t.began = time.Now()
	}
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
	a := ipc.Answer{Took: max(time.Since(t.began), time.Microsecond), Soon: s.count.Add(-1) >= busyFrom}
	s.turn.took(a.Took)
	if err == nil {
		with := a
		with.Files, with.Lease = t.reply, t.out
		t.out = nil
		if err = s.ch.SendResult(t.id, body, with); err == nil {
			return
		}
		if len(t.reply) > 0 && !errors.Is(err, ipc.ErrClosed) {
			err = &Error{Code: CodeFiles, Message: err.Error()}
		}
	}
	var e *Error
	switch {
	case errors.As(err, &e):
	case ctx.Err() != nil && errors.Is(err, ctx.Err()):
		e = &Error{Code: ipc.CodeCancelled, Message: err.Error()}
	default:
		e = &Error{Message: err.Error()}
	}
	_ = s.ch.SendError(t.id, e, a) // the channel has ended: nobody waits
}

func closeAll(files []*os.File) {
	for _, f := range files {
		if f != nil {
			f.Close()
		}
	}
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
