package pool

import (
	"context"
	"errors"
	"fmt"
	"math/rand/v2"
	"syscall"
	"time"

	"golang.org/x/sys/unix"

	"github.com/remuda-dev/remuda/ipc"
	"github.com/remuda-dev/remuda/proc"
	"github.com/remuda-dev/remuda/supervise"
)

const (
	// linger is how long a worker that closed its channel has to end by itself
	// before it is killed: its own exit says more than our SIGKILL.
	linger = 200 * time.Millisecond
	// killWait bounds the wait for a killed process, for the tasks it had.
	killWait = 5 * time.Second
)

// worker is one life of a worker; to supervise it is a Run. What is below done
// is guarded by Pool.mu.
type worker struct {
	p     *Pool
	slot  *slot
	began time.Time // its start
	pid   int
	conn  ipc.Conn
	reads ipc.Awaiter // conn, where it is one
	proc  proc.Process

	proven chan struct{} // closed when it has answered something, or need not
	done   chan struct{}

	next, prev *worker // in ready or among the spares
	listed     bool    // in ready
	at         int     // in ready.all
	spare      bool    // among the spares
	serving    bool    // takes tasks
	counted    bool    // in usage.up
	idleSince  time.Time
	own        queue // what waits for it by its key
	pins       queue // what it alone may do
	load, sent int
	up         bool // ready for tasks, and its channel has not ended
	wasUp      bool
	answered   bool // proven is closed
	retiring   bool // gets no more tasks
	asked      bool // to end
	over       bool // its end is known
	lost       []*call
	culprit    *call // for whose sake it was killed
	cause      string
	exit       supervise.Exit
	age, term  *time.Timer
	last       *time.Timer

	beat            *time.Timer
	beating, pinged bool
	heard           uint64

	look    *time.Timer // at its memory
	looking bool
}

func (p *Pool) startWorker(ctx context.Context, s *slot) (supervise.Run, error) {
	began := time.Now()
	pr, conn, err := p.launch(ctx, s.n)
	if err != nil {
		p.mu.Lock()
		defer p.mu.Unlock()
		p.startFailed(s, &WorkerError{Kind: ErrNoWorkers, Exit: supervise.Exit{Code: -1, Failed: true, Err: err.Error()}})
		return nil, err
	}
	w := &worker{p: p, slot: s, began: began, pid: pr.ID().PID, conn: conn, proc: pr, proven: make(chan struct{}), done: make(chan struct{})}
	w.reads, _ = conn.(ipc.Awaiter)
	p.mu.Lock()
	s.w = w
	p.mu.Unlock()
	go w.live()
	return w, nil
}

func (p *Pool) startFailed(s *slot, e *WorkerError) {
	if !s.want {
		return
	}
	s.last = e
	if s.fails++; s.fails == failFast {
		p.failing++
	}
	p.failIfBroken()
}

// live is the goroutine that a worker has as long as it lives.
func (w *worker) live() {
	p := w.p
	late := time.AfterFunc(p.o.StartTimeout, func() {
		w.Kill(fmt.Sprintf("was not ready within %s", p.o.StartTimeout))
	})
	served, watched := make(chan struct{}), make(chan struct{})
	go w.watch(served, watched)
	err := w.conn.Serve(func() {
		late.Stop()
		w.opened()
		p.fill(w)
	})
	late.Stop()
	close(served)
	p.mu.Lock()
	w.down()
	asked := w.asked
	if w.cause == "" && err != nil {
		w.cause = err.Error()
	}
	p.mu.Unlock()
	if !asked {
		if !errors.Is(err, ipc.ErrProtocol) && !errors.Is(err, ipc.ErrTooLarge) {
			wait(w.proc.Done(), linger)
		}
		w.killTree()
	}
	// Killed or about to be, by who asked it to end.
	if !wait(w.proc.Done(), killWait+p.o.Grace) {
		w.ended(supervise.Exit{Code: -1, Failed: true, Err: "does not end although it was killed"})
		<-w.proc.Done()
	}
	<-watched
	_ = w.proc.Release() // it is done
	e := w.proc.Exit()
	exit := supervise.Exit{Code: e.Code, At: e.At}
	if e.Signal != 0 {
		exit.Code, exit.Signal = -1, unix.SignalName(e.Signal)
	}
	w.ended(exit)
	close(w.done)
}

// watch clears away what a worker leaves behind, so that its channel ends.
func (w *worker) watch(served <-chan struct{}, watched chan<- struct{}) {
	defer close(watched)
	<-w.proc.Done()
	w.killTree()
	if !wait(served, killWait) {
		w.conn.Close() // somebody else holds the other end
	}
}

// wait waits for c, for d at most, and reports whether it was closed.
func wait(c <-chan struct{}, d time.Duration) bool {
	t := time.NewTimer(d)
	defer t.Stop()
	select {
	case <-c:
		return true
	case <-t.C:
		return false
	}
}

func (w *worker) killTree() {
	ctx, cancel := context.WithTimeout(context.Background(), killWait)
	defer cancel()
	_ = w.proc.KillTree(ctx) // what it could not kill shows as not done
}

// opened: the worker is ready for tasks.
func (w *worker) opened() {
	p := w.p
	p.mu.Lock()
	defer p.mu.Unlock()
	w.up, w.wasUp = true, true
	p.up++
	p.use.start.add(time.Since(w.began))
	s := w.slot
	if s.fails >= failFast {
		p.failing--
	}
	s.fails, s.last = 0, nil
	if s.want && !w.retiring {
		p.shape.spares.add(w)
		p.reshape()
		p.watchWait()
	}
	if p.o.MaxAge > 0 {
		// Spread, so that not all are replaced at once.
		d := time.Duration(float64(p.o.MaxAge) * (0.9 + 0.2*rand.Float64()))
		w.age = time.AfterFunc(d, func() {
			p.mu.Lock()
			defer p.mu.Unlock()
			p.retire(w)
			if w.load == 0 {
				p.idle(w)
			}
		})
	}
}

// down: the channel has ended.
func (w *worker) down() {
	if w.up {
		w.up = false
		w.p.up--
	}
	w.p.retire(w)
	for _, t := range []*time.Timer{w.age, w.beat, w.look} {
		if t != nil {
			t.Stop()
		}
	}
}

// ended: how it ended is known, to the tasks that it had as well. The first
// call counts.
func (w *worker) ended(exit supervise.Exit) {
	p := w.p
	p.mu.Lock()
	if w.over {
		p.mu.Unlock()
		return
	}
	w.over = true
	if w.slot.w == w {
		w.slot.w = nil
	}
	exit.Cause = w.cause
	w.exit = exit
	for _, t := range []*time.Timer{w.term, w.last} {
		if t != nil {
			t.Stop()
		}
	}
	if !w.wasUp && !w.asked {
		p.startFailed(w.slot, &WorkerError{Kind: ErrNoWorkers, PID: w.pid, Exit: exit, Cause: w.cause})
	}
	switch {
	case w.asked && w.cause == "recycled":
		p.use.sums.recycled++
	case !w.asked:
		p.use.sums.died++
	}
	for c := w.pins.peek(nil, 0); c != nil; c = w.pins.peek(nil, 0) {
		p.leave(c)
		p.finish(c, &WorkerError{Kind: ErrWorkerDied, PID: w.pid, Exit: exit, Cause: w.cause})
	}
	again := p.bury(w, w.lost)
	w.lost = nil
	p.mu.Unlock()
	p.sendAll(again)
}

// askLater asks the worker to end; Pool.mu is held. It is not the supervisor
// who asks, so the worker is replaced.
func (w *worker) askLater(cause string) {
	w.asked = true
	w.cause = cause
	if !w.answered { // nothing was wrong with it
		w.answered = true
		close(w.proven)
	}
	grace := w.p.o.Grace
	w.last = time.AfterFunc(grace, func() { w.Kill("") })
	go w.ask()
}

// ask asks the worker to end, politely and then by signal.
func (w *worker) ask() {
	w.conn.Stop()
	w.p.mu.Lock()
	defer w.p.mu.Unlock()
	if !w.over {
		w.term = time.AfterFunc(w.p.o.Grace/2, w.signal)
	}
}

// signal sends SIGTERM.
func (w *worker) signal() { _ = w.proc.SignalTree(syscall.SIGTERM) } // gone: just as well

// heartbeat looks whether a worker that holds tasks says anything.
func (w *worker) heartbeat() {
	p := w.p
	p.mu.Lock()
	if w.load == 0 || !w.up {
		w.beating = false
		p.mu.Unlock()
		return
	}
	heard := w.conn.Heard()
	if w.pinged && heard == w.heard {
		p.mu.Unlock()
		w.Kill(fmt.Sprintf("gave no sign of life within %s", p.o.Heartbeat))
		return
	}
	w.pinged, w.heard = true, heard
	p.mu.Unlock()
	w.conn.Ping()
	p.mu.Lock()
	if w.up {
		w.beat = time.AfterFunc(p.o.Heartbeat, w.heartbeat)
	}
	p.mu.Unlock()
}

// Ready implements supervise.Run: a worker counts as well started when it has
// answered something.
func (w *worker) Ready() <-chan struct{} { return w.proven }

// Done implements supervise.Run.
func (w *worker) Done() <-chan struct{} { return w.done }

// Exit implements supervise.Run.
func (w *worker) Exit() supervise.Exit {
	w.p.mu.Lock()
	defer w.p.mu.Unlock()
	return w.exit
}

// Stop implements supervise.Run.
func (w *worker) Stop(cause string) {
	w.p.mu.Lock()
	w.p.retire(w)
	w.asked = true
	if w.cause == "" {
		w.cause = cause
	}
	w.p.mu.Unlock()
	go w.ask()
}

// Kill implements supervise.Run.
func (w *worker) Kill(cause string) {
	w.p.mu.Lock()
	w.p.retire(w)
	if w.cause == "" {
		w.cause = cause
	}
	w.p.mu.Unlock()
	go w.killTree()
}
