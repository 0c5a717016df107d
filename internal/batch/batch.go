// Package batch has a pool do the tasks of an input and writes their results:
// the engine of `remuda pool run`.
//
// Invariants: memory does not grow with the input, but for five bytes a task of
// a job log that is resumed; results are written whole and, unless Unordered, in
// the order of the tasks; with a job log, a task counts as done when its end is
// logged, which comes after its result is in its file (or in the spool, where
// it has to wait for an earlier task's), so that a run that is killed at any
// instant and resumed loses no result and has none twice.
//
// It must never know flags, terminals or the daemon.
package batch

import (
	"bufio"
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"os"
	"slices"
	"sync"
	"sync/atomic"
	"time"

	"golang.org/x/sys/unix"

	"github.com/remuda-dev/remuda/pool"
	"github.com/remuda-dev/remuda/proc"
)

// Options say what is to be done. Pool.Command, Input and Output must be set.
type Options struct {
	// Pool are the workers. Spawner, Retries and Queue are set by Run.
	Pool pool.Options
	// Handler is the name of the workers' handler (frames).
	Handler string
	// Template, where set, makes each task the arguments of a command: the
	// protocol must be exec.
	Template *Template

	// Input has a task in each line, without blank ones around; where NUL is
	// set, up to each NUL byte. A task may have up to 64 MiB.
	Input io.Reader
	NUL   bool

	// Output gets the results. Results is the file behind it, which a resumed
	// run may cut; nil where it is none.
	Output  io.Writer
	Results *os.File
	Format  Format
	// Unordered writes each result as soon as it is there.
	Unordered bool

	// Retries is how often a task is tried again that failed.
	Retries int
	// MaxFailures ends the run when so many tasks have failed: none is begun
	// any more, those that run may end. 0: never.
	MaxFailures int

	// Log is the job log, nil where there is none. Run does not close it.
	Log *Log
	// Redo does failed tasks of the log again.
	Redo bool
	// Sync has results and log on the disk before a task counts as done.
	Sync bool

	// Stop ends the run when it is closed: no task is begun any more, and those
	// that run have Pool.Grace to end. nil: never.
	Stop <-chan struct{}
	// Progress is kept up to date; nil: it is not wanted.
	Progress *Progress
	// Failed is told of each failure, in the order of the results. nil: nobody
	// is.
	Failed func(*Outcome)
	// Note is given what a person may want to know. nil: nobody is.
	Note func(string)
}

// Progress is how far a run is. It may be read at any time.
type Progress struct {
	Done    atomic.Int64 // tasks that have ended, Failed and Skipped ones too
	Failed  atomic.Int64 // in this run
	Skipped atomic.Int64 // done before, by the log
	Running atomic.Int64 // given to the pool and not ended
	Slots   atomic.Int64 // tasks that can be on workers at the same time
}

// Summary is what a run came to.
type Summary struct {
	Done    int64 // tasks that have ended in this run, Failed ones too
	Failed  int64
	Skipped int64 // done before, by the log
	// Stopped says that not all tasks were begun because of failures, or by
	// Options.Stop.
	Stopped bool
	// First is the first failure, nil where there was none.
	First *Outcome
}

const (
	// A result that has to wait for an earlier task's is kept; when so many
	// wait, or so many bytes of them, no task is begun until some are written.
	maxHeld      = 1 << 16
	maxHeldBytes = 64 << 20
	// So much is written at once at most.
	chunk = 1 << 20
	// maxWindow bounds the tasks that are given to the pool.
	maxWindow = 1 << 16
)

// ErrOutput wraps the error of a write to Options.Output.
var ErrOutput = errors.New("cannot write the results")

// item is a task on its way.
type item struct {
	index  int64 // among those that are begun in this run
	out    Outcome
	sum    uint32
	undone bool
	line   []byte // what is to be written
	logged bool   // its end is
}

type run struct {
	Options
	p      *pool.Pool
	ctx    context.Context // ends when what runs is not wanted any more
	kill   context.CancelCauseFunc
	delim  byte
	window int

	queued   chan struct{} // the task begun last has its place in the pool
	finished chan *item
	wg       sync.WaitGroup // of the items that are to come through finished
	halted   chan struct{}  // closed by halt

	mu        sync.Mutex
	cond      *sync.Cond // something below has changed
	inflight  int
	held      int
	heldBytes int64
	stopped   bool
	cut       bool // there was a task that was not begun
	readDone  bool
	readErr   error
	fatal     error

	// The writer's own.
	buf     bytes.Buffer
	end     int64
	next    int64
	pending map[int64]*item
	sum     Summary
	undone  bool // a task was begun and not done
	failed  []*Outcome
	err     error
}

// Run does the tasks. ctx's end kills what runs. The error is why not all tasks
// that should be were done; that some have failed is none.
func Run(ctx context.Context, o Options) (Summary, error) {
	if o.Progress == nil {
		o.Progress = new(Progress)
	}
	if o.Note == nil {
		o.Note = func(string) {}
	}
	ctx, kill := context.WithCancelCause(ctx)
	defer kill(nil)
	r := &run{
		Options: o, ctx: ctx, kill: kill, delim: '\n',
		finished: make(chan *item, 64), halted: make(chan struct{}), pending: map[int64]*item{},
		queued: make(chan struct{}, 1),
	}
	r.cond = sync.NewCond(&r.mu)
	if o.NUL {
		r.delim = 0
	}
	if err := r.sweep(); err != nil {
		return Summary{}, err
	}
	tag := proc.OwnedTag(tagPrefix)
	spawner := &proc.Direct{Tag: tag, DieWithParent: true}
	defer spawner.Close()
	// How often a task is tried is for Retries to say, and lines may be equal.
	r.Pool.PoisonAfter = -1
	r.Pool.Spawner, r.Pool.Retries, r.Pool.Queue, r.Pool.Full = spawner, -1, 0, pool.Block
	p, err := pool.New(r.Pool)
	if err != nil {
		return Summary{}, err
	}
	r.p = p
	size := p.Stats().Size * max(r.Pool.Concurrency, 1)
	if r.Pool.Protocol == pool.Exec {
		size = p.Stats().Size
	}
	r.window = min(2*size+16, maxWindow)
	r.Progress.Slots.Store(int64(size))
	if err := r.begin(tag); err != nil {
		return Summary{}, errors.Join(err, r.close(true))
	}
	return r.run()
}

const tagPrefix = "pool"

// sweep clears away what runs have left behind that were killed, so that none
// of their tasks is still being done when it is done again.
func (r *run) sweep() error {
	if r.Log != nil && r.Log.last != nil && proc.OwnerDead(r.Log.last.Tag, tagPrefix) {
		if _, err := proc.Sweep(r.ctx, r.Log.last.Tag); err != nil {
			return fmt.Errorf("cannot end the processes that the run before has left behind: %w", err)
		}
	}
	if _, err := proc.SweepDead(r.ctx, tagPrefix); err != nil && r.ctx.Err() == nil {
		// Another user's, say: they do no harm here.
		r.Note(fmt.Sprintf("cannot clear away what earlier runs have left behind: %v", err))
	}
	return nil
}

// begin readies results and log for this run.
func (r *run) begin(tag string) error {
	if r.Results != nil && r.Log != nil {
		end, err := r.Results.Seek(0, io.SeekEnd)
		if err != nil {
			return fmt.Errorf("cannot find the end of the results: %w", err)
		}
		r.end = end
	}
	if r.Log == nil {
		return nil
	}
	command := slices.Clone(r.Pool.Command)
	if r.Log.last != nil {
		if r.Log.end >= 0 && r.Log.end < r.end {
			// Written, but not logged any more: those tasks are done again.
			if err := r.Results.Truncate(r.Log.end); err != nil {
				return fmt.Errorf("cannot cut off the results that are not in the job log: %w", err)
			}
			if _, err := r.Results.Seek(r.Log.end, io.SeekStart); err != nil {
				return fmt.Errorf("cannot find the end of the results: %w", err)
			}
			r.end = r.Log.end
		}
		if !slices.Equal(r.Log.last.Command, command) && !slices.Contains(r.Log.last.Command, "…") {
			r.Note(fmt.Sprintf("the command is not the one that the job log speaks of: %q", r.Log.last.Command))
		}
		if n := r.Log.Gone(); n > 0 {
			r.Note(fmt.Sprintf("the results end before the job log does: %d tasks are done again", n))
		}
	}
	return r.Log.begin(tag, command, r.Results)
}

// close ends the pool, and what runs with it where now is set.
func (r *run) close(now bool) error {
	ctx := r.ctx
	if now {
		over, cancel := context.WithCancel(context.WithoutCancel(ctx))
		cancel()
		ctx = over
	}
	err := r.p.Close(ctx)
	if now || r.ctx.Err() != nil {
		return nil // as wished
	}
	return err
}

func (r *run) run() (Summary, error) {
	go r.read()
	ended := make(chan struct{})
	var others sync.WaitGroup
	others.Go(func() { // has finished closed when nothing comes any more
		r.mu.Lock()
		for !r.stopped && !r.readDone {
			r.cond.Wait()
		}
		r.mu.Unlock()
		r.wg.Wait()
		close(r.finished)
	})
	others.Go(func() { // stops
		select {
		case <-r.Stop:
			r.halt()
			grace := r.Pool.Grace
			if grace == 0 {
				grace = 2 * time.Second
			}
			t := time.NewTimer(max(grace, 0))
			defer t.Stop()
			select {
			case <-t.C:
				r.kill(context.Canceled)
			case <-r.ctx.Done():
			case <-ended:
			}
		case <-r.ctx.Done():
			r.halt()
		case <-ended:
		}
	})
	others.Go(func() { // has what waits in the pool given back
		select {
		case <-r.halted:
			_ = r.p.Close(r.ctx) // asked for again below
		case <-ended:
		}
	})
	r.write()
	close(ended)
	others.Wait()
	cerr := r.close(r.err != nil)
	r.mu.Lock()
	defer r.mu.Unlock()
	r.sum.Stopped = r.stopped && (r.cut || r.undone || !r.readDone)
	r.sum.Skipped = r.Progress.Skipped.Load()
	switch {
	case r.err != nil:
		return r.sum, r.err
	case r.fatal != nil:
		return r.sum, r.fatal
	case r.readErr != nil && !r.stopped:
		return r.sum, r.readErr
	case r.ctx.Err() != nil:
		return r.sum, context.Cause(r.ctx)
	}
	return r.sum, cerr
}

// halt has no task begun any more; what runs may end.
func (r *run) halt() {
	r.mu.Lock()
	defer r.mu.Unlock()
	if !r.stopped {
		r.stopped = true
		close(r.halted)
		r.cond.Broadcast()
	}
}

// stop ends the run because of err, which concerns all tasks.
func (r *run) stop(err error) {
	r.mu.Lock()
	if r.fatal == nil {
		r.fatal = err
	}
	r.mu.Unlock()
	r.halt()
}

// read begins the tasks of the input. A read that waits cannot be interrupted;
// it is left behind when the run ends, and nothing it returns is begun.
func (r *run) read() {
	err := r.readAll()
	r.mu.Lock()
	defer r.mu.Unlock()
	r.readDone, r.readErr = true, err
	r.cond.Broadcast()
}

func (r *run) readAll() error {
	in := bufio.NewReaderSize(r.Input, 64<<10)
	var seq, index int64
	for n := 1; ; n++ {
		line, err := readTask(in, r.delim)
		if err != nil && !errors.Is(err, io.EOF) {
			return fmt.Errorf("cannot read task %d (line %d of the input): %w", seq+1, n, err)
		}
		last := err != nil
		if r.Template == nil && r.Pool.Protocol != pool.Exec {
			line = bytes.TrimSpace(line)
		}
		if isBlank(line, r.delim) {
			if last {
				return r.checkAll(seq)
			}
			continue
		}
		seq++
		it := &item{out: Outcome{Seq: seq, Task: line}}
		var state uint8
		if r.Log != nil {
			var was uint32
			it.sum = sum(line)
			if was, state = r.Log.state(seq); state != 0 && was != it.sum {
				return badLog("The job log belongs to another input. Remove it to begin anew.",
					"task %d (line %d of the input) is not the one that the job log %s speaks of: %s", seq, n, r.Log.path, clip(text(line), clipTask))
			}
		}
		switch {
		case state == 0 || state&isFailed != 0 && r.Redo:
		case state&isWritten != 0:
			r.Progress.Skipped.Add(1)
			r.Progress.Done.Add(1)
			if last {
				return r.checkAll(seq)
			}
			continue
		default:
			it.line, it.logged = r.Log.waiting(seq)
		}
		it.index = index
		index++
		if !r.admit() {
			return nil
		}
		switch {
		case it.logged:
			r.finish(it)
		case r.Template == nil && r.Pool.Protocol != pool.Exec && !json.Valid(line):
			if r.MaxFailures > 0 {
				r.settle(1) // it may end the run: what comes before it is done first
			}
			it.out.Failure = &Failure{Kind: "input", Message: fmt.Sprintf("line %d of the input is not a JSON value: %s", n, clip(text(line), clipTask))}
			r.finish(it)
			if r.MaxFailures > 0 {
				r.settle(0)
			}
		default:
			go r.do(it)
			<-r.queued // so that tasks are begun in order
		}
		if last {
			return r.checkAll(seq)
		}
	}
}

// checkAll complains where the input has less tasks than the log knows of.
func (r *run) checkAll(n int64) error {
	r.mu.Lock()
	stopped := r.stopped
	r.mu.Unlock()
	if r.Log != nil && n < int64(len(r.Log.states)) && !stopped {
		r.Note(fmt.Sprintf("the input has %d tasks, and the job log knows of %d", n, len(r.Log.states)))
	}
	return nil
}

// admit waits for room for one more task; it reports whether it may be begun.
func (r *run) admit() bool {
	r.mu.Lock()
	defer r.mu.Unlock()
	for !r.stopped && (r.inflight >= r.window || r.held >= maxHeld || r.heldBytes >= maxHeldBytes) {
		r.cond.Wait()
	}
	if r.stopped {
		r.cut = true
		return false
	}
	r.inflight++
	r.wg.Add(1)
	return true
}

// settle waits until no more than n tasks are under way.
func (r *run) settle(n int) {
	r.mu.Lock()
	defer r.mu.Unlock()
	for !r.stopped && r.inflight > n {
		r.cond.Wait()
	}
}

// finish hands an item to the writer.
func (r *run) finish(it *item) {
	r.finished <- it
	r.wg.Done()
}

// do has the pool do a task.
func (r *run) do(it *item) {
	defer r.finish(it)
	r.Progress.Running.Add(1)
	defer r.Progress.Running.Add(-1)
	o := &it.out
	queued := func() { r.queued <- struct{}{} }
	t := pool.Task{Name: r.Handler, Body: o.Task, OnQueued: func() { queued(); queued = nil }}
	switch {
	case r.Template != nil:
		t.Body, t.Args = nil, r.Template.Args(string(o.Task), o.Seq)
	case r.Pool.Protocol == pool.Exec:
		t.Body = slices.Concat(o.Task, []byte{'\n'}) // what reads lines wants one
	}
	for {
		res, err := r.p.Do(r.ctx, t)
		for _, f := range res.Files {
			f.Close() // nobody here wants them
		}
		if queued != nil { // it was refused
			queued()
			queued = nil
		}
		t.OnQueued = nil
		o.Attempts += max(res.Attempts, 1)
		o.Body, o.PID, o.Took, o.Start = res.Body, res.PID, res.Run, time.Now().Add(-res.Run)
		switch {
		case err == nil:
			return
		case undone(err):
			it.undone = true
			if errors.Is(err, pool.ErrNoWorkers) {
				r.stop(err)
			}
			return
		}
		f := failure(err)
		if o.Attempts > r.Retries || f.Kind == "input" {
			o.Failure = &f
			return
		}
	}
}

// write writes what comes through finished, until it is closed.
func (r *run) write() {
	for it := range r.finished {
		r.take(it)
		for more := true; more && r.buf.Len() < chunk; {
			select {
			case it, more = <-r.finished:
				if more {
					r.take(it)
				}
			default:
				more = false
			}
		}
		r.commit()
	}
	r.commit()
}

// take readies an item to be written, and those that have waited for it.
func (r *run) take(it *item) {
	defer func() {
		r.mu.Lock()
		defer r.mu.Unlock()
		r.inflight--
		r.cond.Broadcast()
	}()
	if r.err != nil {
		return
	}
	switch {
	case it.undone:
		r.undone = true
	case it.logged: // in an earlier run
		r.Progress.Done.Add(1)
		r.Progress.Skipped.Add(1)
	default:
		r.count(it)
		var b bytes.Buffer
		it.out.write(&b, r.Format, r.Pool.Protocol)
		it.line = b.Bytes()
		it.out.Body = nil
	}
	if r.Unordered {
		r.emit(it)
		return
	}
	if it.index != r.next {
		r.pending[it.index] = it
		if r.Log != nil && !it.undone && !it.logged {
			r.Log.hold(it)
		}
		r.room(1, len(it.line))
		return
	}
	for {
		r.emit(it)
		r.next++
		var waits bool
		if it, waits = r.pending[r.next]; !waits {
			return
		}
		delete(r.pending, r.next)
		r.room(-1, -len(it.line))
	}
}

// room counts what waits to be written.
func (r *run) room(n, bytes int) {
	r.mu.Lock()
	defer r.mu.Unlock()
	r.held += n
	r.heldBytes += int64(bytes)
	r.cond.Broadcast()
}

// count takes note of an end.
func (r *run) count(it *item) {
	r.Progress.Done.Add(1)
	r.sum.Done++
	if it.out.Failure == nil {
		return
	}
	r.Progress.Failed.Add(1)
	r.sum.Failed++
	if r.sum.First == nil {
		first := it.out
		first.Task, first.Body = append([]byte(nil), first.Task[:min(len(first.Task), clipTask+4)]...), nil
		r.sum.First = &first
	}
	if r.MaxFailures > 0 && r.sum.Failed == int64(r.MaxFailures) {
		r.halt()
	}
}

// emit puts an item's result where commit finds it.
func (r *run) emit(it *item) {
	if it.undone {
		return
	}
	r.buf.Write(it.line)
	r.end += int64(len(it.line))
	if r.Log != nil {
		r.Log.wrote(it, r.end)
	}
	if r.Failed != nil && it.out.Failure != nil {
		r.failed = append(r.failed, &it.out)
	}
	if r.buf.Len() >= chunk {
		r.commit()
	}
}

// commit writes results and then the log, so that no task is logged whose result
// is not written.
func (r *run) commit() {
	if r.err != nil {
		return
	}
	err := r.flush()
	if err == nil && r.Log != nil {
		err = r.Log.commit(r.Sync)
	}
	for _, o := range r.failed {
		r.Failed(o)
	}
	r.failed = r.failed[:0]
	if err != nil {
		r.err = err
		r.kill(err)
		r.halt()
	}
}

func (r *run) flush() error {
	if r.buf.Len() == 0 {
		return nil
	}
	_, err := r.Output.Write(r.buf.Bytes())
	r.buf.Reset()
	if r.buf.Cap() > 4*chunk {
		r.buf = bytes.Buffer{}
	}
	if err == nil && r.Sync && r.Results != nil {
		err = unix.Fdatasync(int(r.Results.Fd()))
	}
	if err != nil {
		return fmt.Errorf("%w: %w", ErrOutput, err)
	}
	return nil
}
