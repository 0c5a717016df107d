package pool

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"os"
	"strings"
	"sync"
	"syscall"
	"time"

	"golang.org/x/sys/unix"

	"github.com/remuda-dev/remuda/ipc"
	"github.com/remuda-dev/remuda/proc"
	"github.com/remuda-dev/remuda/supervise"
)

// execSlot is a worker that is no process: it starts one for each task, one
// after the other. It is its own Conn and its own Process.
type execSlot struct {
	s    *starter
	slot int
	done chan struct{} // closed with the slot
	runs sync.WaitGroup

	mu     sync.Mutex
	closed bool
	req    *ipc.Request // under way, or cancelled before it was
	proc   proc.Process // of req
	cancel context.CancelFunc
	gaveUp bool // req was cancelled
}

func (s *starter) exec(context.Context, int) (proc.Process, ipc.Conn, error) {
	e := &execSlot{s: s, done: make(chan struct{})}
	return e, e, nil
}

// Serve implements ipc.Conn.
func (e *execSlot) Serve(ready func()) error {
	ready()
	<-e.done
	e.runs.Wait()
	return nil
}

// Start implements ipc.Conn.
func (e *execSlot) Start(r *ipc.Request) error {
	if len(r.Files) > 0 {
		return ipc.ErrNoFiles
	}
	e.mu.Lock()
	defer e.mu.Unlock()
	switch {
	case e.closed:
		return ipc.ErrClosed
	case e.req == r && e.gaveUp:
		return ipc.ErrCancelled
	}
	ctx, cancel := context.WithCancel(context.Background())
	e.req, e.proc, e.cancel, e.gaveUp = r, nil, cancel, false
	e.runs.Add(1)
	go func() {
		defer e.runs.Done()
		defer cancel()
		body, err := e.run(ctx, r)
		e.mu.Lock()
		if e.req == r {
			e.req, e.proc = nil, nil
		}
		if e.closed && err != nil {
			err = fmt.Errorf("%w: %w", ipc.ErrClosed, err)
		}
		e.mu.Unlock()
		r.To.End(r, body, err)
	}()
	return nil
}

func (e *execSlot) run(ctx context.Context, r *ipc.Request) ([]byte, error) {
	died := func(what string, err error) error {
		return &WorkerError{Kind: ErrWorkerDied, Exit: supervise.Exit{Code: -1, Failed: true, Err: what + ": " + err.Error()}}
	}
	var args []string
	if c, ok := r.To.(*call); ok {
		args = c.task.Args
	}
	var in *os.File // without a task it reads nothing
	if args == nil || len(r.Body) > 0 {
		var err error
		if in, err = input(r.Body); err != nil {
			return nil, died("give it its input", err)
		}
		defer in.Close()
	}
	outR, outW, err := os.Pipe()
	if err != nil {
		return nil, died("make its standard output", err)
	}
	defer outR.Close()
	errR, errW, err := os.Pipe()
	if err != nil {
		outW.Close()
		return nil, died("make its standard error", err)
	}
	defer errR.Close()
	spec := e.s.spec(e.slot, []*os.File{in, outW, errW}, nil)
	if args != nil {
		spec.Args = append([]string{spec.Path}, args...)
	}
	pr, err := e.s.o.Spawner.Spawn(ctx, spec)
	outW.Close()
	errW.Close()
	if err != nil {
		if ctx.Err() != nil {
			return nil, fmt.Errorf("pool: %w", ctx.Err())
		}
		if args != nil && unfit(err) {
			return nil, &TaskError{Code: "arguments", Message: err.Error()}
		}
		return nil, &WorkerError{Kind: ErrNoWorkers, Exit: supervise.Exit{Code: -1, Failed: true, Err: err.Error()}}
	}
	e.mu.Lock()
	e.proc = pr
	gone, gaveUp := e.closed, e.gaveUp
	e.mu.Unlock()
	if gone {
		killNow(pr)
	} else if gaveUp {
		_ = pr.SignalTree(syscall.SIGTERM)
	}
	var (
		out  []byte
		rerr error
		tail tail
		wg   sync.WaitGroup
	)
	wg.Add(2)
	go func() {
		defer wg.Done()
		out, rerr = io.ReadAll(io.LimitReader(outR, int64(e.s.o.MaxMessage)+1))
		if len(out) > e.s.o.MaxMessage {
			out, rerr = nil, fmt.Errorf("%w: more than %d bytes of standard output", ipc.ErrTooLarge, e.s.o.MaxMessage)
			killNow(pr)
		}
	}()
	go func() {
		defer wg.Done()
		tail.to = e.s.o.Stderr
		_, _ = io.Copy(&tail, errR) // cannot fail but by the pipe's end
		tail.end()
	}()
	<-pr.Done()
	killNow(pr) // what it left behind holds its pipes
	t := time.AfterFunc(killWait, func() { outR.Close(); errR.Close() })
	wg.Wait()
	t.Stop()
	_ = pr.Release()
	exit := pr.Exit()
	switch {
	case rerr != nil:
		return nil, rerr
	case exit.Ok():
		return out, nil
	case exit.Signal != 0:
		return out, &WorkerError{
			Kind: ErrWorkerDied, PID: pr.ID().PID, Stderr: tail.String(),
			Exit: supervise.Exit{Code: -1, Failed: true, Signal: unix.SignalName(exit.Signal), At: exit.At},
		}
	}
	text := fmt.Sprintf("exit code %d", exit.Code)
	if s := lastLine(tail.String()); s != "" {
		text += ": " + s
	}
	data, err := json.Marshal(struct {
		Code   int    `json:"exit_code"`
		Stderr string `json:"stderr,omitempty"`
	}{exit.Code, tail.String()})
	if err != nil {
		data = nil
	}
	return out, &TaskError{Code: "exit", Message: text, Data: data}
}

// unfit reports whether it is the arguments that a program was not started for.
func unfit(err error) bool {
	var se *proc.SpawnError
	return errors.Is(err, syscall.E2BIG) || errors.As(err, &se) && se.Op == proc.OpSpec
}

// input is a file of memory that holds b: a pipe would need somebody who writes
// while the program reads.
func input(b []byte) (*os.File, error) {
	fd, err := unix.MemfdCreate("task", unix.MFD_CLOEXEC)
	if err != nil {
		return nil, os.NewSyscallError("memfd_create", err)
	}
	f := os.NewFile(uintptr(fd), "task")
	if _, err := f.Write(b); err != nil {
		f.Close()
		return nil, err
	}
	if _, err := f.Seek(0, io.SeekStart); err != nil {
		f.Close()
		return nil, err
	}
	return f, nil
}

func killNow(pr proc.Process) {
	ctx, cancel := context.WithTimeout(context.Background(), killWait)
	defer cancel()
	_ = pr.KillTree(ctx)
}

// tail keeps the end of what is written to it, and passes it on by whole lines:
// programs that run at the same time do not write into each other's.
type tail struct {
	to   *os.File
	line []byte // what has come of a line
	b    []byte
}

const (
	maxTail = 4 << 10
	maxLine = 64 << 10 // a longer one is passed on in pieces
)

func (t *tail) Write(b []byte) (int, error) {
	if t.to != nil {
		t.line = append(t.line, b...)
		n := bytes.LastIndexByte(t.line, '\n') + 1
		if n == 0 && len(t.line) > maxLine {
			n = len(t.line)
		}
		if n > 0 {
			_, _ = t.to.Write(t.line[:n]) // the caller's affair
			t.line = append(t.line[:0], t.line[n:]...)
		}
	}
	t.b = append(t.b, b...)
	if len(t.b) > 2*maxTail {
		t.b = append(t.b[:0], t.b[len(t.b)-maxTail:]...)
	}
	return len(b), nil
}

// end passes on what has no newline.
func (t *tail) end() {
	if len(t.line) > 0 {
		_, _ = t.to.Write(t.line)
		t.line = nil
	}
}

func (t *tail) String() string {
	b := t.b
	if len(b) > maxTail {
		b = b[len(b)-maxTail:]
	}
	return strings.ToValidUTF8(string(bytes.TrimSpace(b)), "\uFFFD")
}

func lastLine(s string) string {
	if i := strings.LastIndexByte(s, '\n'); i >= 0 {
		s = s[i+1:]
	}
	return s
}

// Cancel implements ipc.Conn: SIGTERM is the polite way.
func (e *execSlot) Cancel(r *ipc.Request) bool {
	e.mu.Lock()
	defer e.mu.Unlock()
	if e.req == nil {
		e.req = r
	}
	if e.req != r {
		return true
	}
	e.gaveUp = true
	if e.proc != nil {
		_ = e.proc.SignalTree(syscall.SIGTERM) // gone: it ends
	}
	return true
}

// Ping implements ipc.Conn.
func (e *execSlot) Ping() bool { return false }

// Heard implements ipc.Conn.
func (e *execSlot) Heard() uint64 { return 0 }

// Stop implements ipc.Conn.
func (e *execSlot) Stop() { e.end(false) }

// Close implements ipc.Conn.
func (e *execSlot) Close() { e.end(true) }

// end closes the slot when its process has ended, with kill at once.
func (e *execSlot) end(kill bool) {
	e.mu.Lock()
	first := !e.closed
	e.closed = true
	pr, cancel := e.proc, e.cancel
	e.mu.Unlock()
	if kill {
		if cancel != nil {
			cancel()
		}
		if pr != nil {
			killNow(pr)
		}
	}
	if first {
		go func() {
			e.runs.Wait()
			close(e.done)
		}()
	}
}

// ID implements proc.Process.
func (e *execSlot) ID() proc.ID { return proc.ID{} }

// Done implements proc.Process.
func (e *execSlot) Done() <-chan struct{} { return e.done }

// Exit implements proc.Process.
func (e *execSlot) Exit() proc.Exit { return proc.Exit{} }

// Signal implements proc.Process.
func (e *execSlot) Signal(sig syscall.Signal) error { return e.SignalTree(sig) }

// SignalTree implements proc.Process.
func (e *execSlot) SignalTree(sig syscall.Signal) error {
	e.mu.Lock()
	pr := e.proc
	e.mu.Unlock()
	if pr == nil {
		return os.ErrProcessDone
	}
	return pr.SignalTree(sig)
}

// KillTree implements proc.Process.
func (e *execSlot) KillTree(context.Context) error {
	e.end(true)
	return nil
}

// Members implements proc.Process.
func (e *execSlot) Members() ([]int, error) {
	e.mu.Lock()
	pr := e.proc
	e.mu.Unlock()
	if pr == nil {
		return nil, nil
	}
	return pr.Members()
}

// Release implements proc.Process.
func (e *execSlot) Release() error {
	select {
	case <-e.done:
		return nil
	default:
		return errors.New("pool: the slot is still in use")
	}
}
