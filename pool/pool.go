package pool

import (
	"context"
	"errors"
	"fmt"
	"hash/maphash"
	"math/rand/v2"
	"os"
	"runtime"
	"strconv"
	"sync"
	"time"

	"github.com/remuda-dev/remuda/ipc"
	"github.com/remuda-dev/remuda/proc"
	"github.com/remuda-dev/remuda/supervise"
)

// Task is one thing to be done by a worker.
type Task struct {
	// Name chooses the worker's handler; [Frames] only, at most 1 KiB.
	Name string
	// Body is what the worker gets: JSON for [JSONLines] and [Node], anything
	// else for the others. It must not be changed any more, also not when Do
	// has returned early.
	Body []byte
	// Buffer is the one of [Pool.Buffer] that Body lies in, where that is so: a
	// worker that shares memory reads Body where it is. nil: Body is copied.
	Buffer *ipc.Buffer
	// ShareResult has Result.Body be the worker's own memory where it comes in
	// such, which spares a copy: see [Result.Release].
	ShareResult bool
	// Files go to the worker as duplicates: connections, listeners, other
	// sockets, files. They stay the caller's, open until Do has returned. At
	// most [ipc.MaxFiles] for [Frames], where the worker must take files
	// (ipc.ErrNoFiles), one for [Node], none for the others. A task that is tried
	// again takes them along again.
	Files []*os.File
	// Args are the program's arguments for this task, in place of those of
	// Options.Command; [Exec] only. nil: those of Options.Command. A program
	// with Args and an empty Body reads /dev/null.
	Args []string
	// Priority is 0 to [MaxPriority]: as long as a task of a higher one waits,
	// none of a lower one is begun (but see Options.Ageing).
	Priority int
	// Key has tasks of one key done by one worker; [ConsistentHash] only.
	Key string
	// Timeout bounds the time on a worker, not the wait for one: that is the
	// context's. 0: Options.Timeout; below 0: unbounded.
	Timeout time.Duration
	// Idempotent says that the task may be done twice: it is tried again where
	// its worker died.
	Idempotent bool
	// CacheKey lets the result be shared with all tasks of the same Name and
	// CacheKey, where Options.Cache is set: see [CacheOptions]. "": not.
	CacheKey string
	// OnQueued is called in Do when the task has its place: whatever is given to
	// the pool afterwards, with the same priority, is begun later. Where the
	// task is refused or shares another's result it is not called. nil: nobody
	// wants to know.
	OnQueued func()
	// OnProgress and OnChunk are given what the worker sends ahead of its
	// result, in order; [Frames] only. They hold up the worker's other answers,
	// so they must be quick, and one may still run when Do returns early. nil:
	// dropped.
	OnProgress, OnChunk func([]byte)
}

func (t *Task) check() error {
	if t.Priority < 0 || t.Priority > MaxPriority {
		return fmt.Errorf("pool: priority %d: 0 to %d are possible", t.Priority, MaxPriority)
	}
	return nil
}

// Result is what a task came to. The times are set for failures too.
type Result struct {
	Body     []byte        // the caller's own, but see Release; with Exec also where the program failed
	Files    []*os.File    // what the worker sent along; the caller's own, to be closed
	Wait     time.Duration // from Do to the start on the worker that ended it
	Run      time.Duration // on that worker
	PID      int           // of that worker; 0 for Exec and where there was none
	Attempts int           // workers it was given to
	// Cached says that the task was not done for this call: the result was kept
	// or is another call's, see [CacheOptions]. The other fields are zero where
	// it was kept; else Wait is how long this call has waited, and Run is zero.
	Cached bool

	release func()
}

// Pool is a set of workers. Its methods may be called concurrently.
type Pool struct {
	o      Options
	launch launchFunc
	lead   bool // callers may read their answers themselves
	sup    *supervise.Supervisor
	own    *proc.Direct // where the caller gave no Spawner

	mu       sync.Mutex
	q        queue // what waits for any worker
	waiting  int   // calls in q and in the workers' own queues, but for broadcasts
	keyed    int   // of these, calls that wait for the worker of their key
	ready    ready
	ring     ring
	shape    shape
	suspects suspects
	up       int // workers whose channel is open
	failing  int // wanted slots whose last few starts failed
	open     int // calls accepted and not ended
	active   *call
	running  int // requests on workers, also of callers that have gone
	refusing bool
	closing  bool
	drained  chan struct{} // closed when refusing and nothing is open
	stats    counters
	use      usage

	breaker *breaker // nil: none
	cache   *cache   // nil: none

	dones     sync.Pool // channels of calls that have ended
	closeOnce sync.Once
	closeErr  error
}

// failFast is how often each slot must have failed to start a worker before
// tasks fail rather than wait.
const failFast = 3

// launchFunc starts the worker of a slot. Process and Conn are the caller's.
type launchFunc func(ctx context.Context, slot int) (proc.Process, ipc.Conn, error)

// New starts a pool. It does not wait for the workers: tasks do. The caller
// must Close it.
func New(o Options) (*Pool, error) {
	if err := o.complete(); err != nil {
		return nil, err
	}
	if err := o.program(); err != nil {
		return nil, err
	}
	var own *proc.Direct
	if o.Spawner == nil {
		own = &proc.Direct{Tag: proc.OwnedTag("pool")}
		o.Spawner = own
	}
	s := &starter{o: o, run: strconv.FormatUint(rand.Uint64(), 36)}
	launch := s.channel
	if o.Protocol == Exec {
		launch = s.exec
	}
	p, err := start(o, launch)
	if err != nil {
		return nil, err
	}
	p.own = own
	return p, nil
}

// start makes a pool of workers that launch starts.
func start(o Options, launch launchFunc) (*Pool, error) {
	p := &Pool{
		o: o, launch: launch, drained: make(chan struct{}),
		lead: runtime.GOMAXPROCS(0) > 1,
		sup:  supervise.New(supervise.Options{Starts: 8}),
	}
	if err := p.addLayers(); err != nil {
		return nil, err
	}
	p.ready.balance = o.Balance
	p.use.want, p.use.taken, p.use.waiting = &p.shape.size, &p.running, &p.waiting
	p.use.advance(time.Now())
	p.ready.first = make([]*worker, o.Concurrency+1)
	p.ready.last = make([]*worker, o.Concurrency+1)
	p.ready.least = len(p.ready.first)
	p.ring.seed = maphash.MakeSeed()
	p.suspects.seed = p.ring.seed
	p.mu.Lock()
	p.shape.min, p.shape.max, p.shape.size = o.Min, o.Max, o.Min
	p.reshape()
	p.mu.Unlock()
	return p, nil
}

// call is a task on its way. What is below task is guarded by Pool.mu; req is
// the Conn's while it is under way.
type call struct {
	p    *Pool
	task Task
	req  ipc.Request
	done chan struct{} // has room for the one that finish sends

	timeout    time.Duration
	asked      time.Time
	began      time.Time
	next, prev *call  // in a queue or in active
	in         *queue // that it waits in
	w          *worker
	only       *worker // a broadcast's: no other may do it
	waitsFor   *worker // where it waits in that worker's own queue
	mark       uint64  // of its name and body; 0: not made yet
	lost       bool    // its worker is gone; how is not known yet
	settled    bool    // the worker has answered, or is gone
	ended      bool
	attempts   int
	timer      *time.Timer
	took       time.Duration // in the handler; 0: not told
	res        Result
	err        error
}

// Do has a worker do the task and returns its result. Errors: *[TaskError]
// where the worker reported a failure; [ErrWorkerDied], [ErrTimeout],
// [ErrQueueFull], [ErrDropped], [ErrPoison], [ErrNoWorkers], [ErrClosed]; the context's own where it was
// cancelled, and its own and ErrTimeout where its deadline is over;
// [ipc.ErrTooLarge], [ipc.ErrNotJSON] where the task cannot be sent.
//
// When Do returns early (context, timeout) the worker is told to give the task
// up, and is killed and replaced if it has not within Options.Grace. Workers
// that cannot be told are sent SIGTERM first.
func (p *Pool) Do(ctx context.Context, t Task) (Result, error) {
	if err := t.check(); err != nil {
		return Result{}, err
	}
	if err := ctx.Err(); err != nil {
		return Result{}, gaveUp(err)
	}
	if p.breaker != nil || p.cache != nil {
		layered := t // t itself stays on the stack
		return p.layered(ctx, &layered)
	}
	return p.do(ctx, &t)
}

// do is the innermost layer of Do: the queue and the workers. It does not keep t.
func (p *Pool) do(ctx context.Context, t *Task) (Result, error) {
	c := p.newCall(t, time.Now())
	p.suspects.prepare(c)

	p.mu.Lock()
	p.use.advance(c.asked)
	if p.refusing {
		p.mu.Unlock()
		return Result{}, ErrClosed
	}
	if err := p.broken(); err != nil {
		p.stats.Accepted++
		p.stats.Lost++
		p.mu.Unlock()
		return Result{}, err
	}
	if err := p.suspects.refuse(c, p.o.PoisonAfter); err != nil {
		p.stats.Poisoned++
		p.mu.Unlock()
		return Result{}, err
	}
	// A worker that has room means that nothing waits for any.
	w, later := p.choose(c)
	if w == nil && p.o.Full != Block && p.waiting >= p.o.Queue && !p.makeRoom(c) {
		p.stats.Rejected++
		n := p.waiting
		p.mu.Unlock()
		return Result{}, fmt.Errorf("%w: %d tasks wait and all workers are busy", ErrQueueFull, n)
	}
	p.open++
	p.stats.Accepted++
	if w != nil {
		p.assign(w, c)
		// With more under way the workers need the processors.
		alone := p.lead && w.reads != nil && p.running == 1
		c.req.Wait = alone
		p.mu.Unlock()
		if p.send(w, c) && alone {
			w.reads.Await(&c.req)
		}
	} else {
		// Those that wait for room wait here too: their callers hold still
		// either way, and the most urgent goes first.
		p.wait(c, later)
		p.mu.Unlock()
	}
	if t.OnQueued != nil {
		t.OnQueued()
	}
	p.await(ctx, c)
	return c.res, c.err
}

// await waits for the end of c, or of ctx.
func (p *Pool) await(ctx context.Context, c *call) {
	select {
	case <-c.done:
	case <-ctx.Done():
		p.giveUp(c, gaveUp(ctx.Err()), 0)
		<-c.done // by giveUp, or just before
	}
	p.dones.Put(c.done)
	c.done = nil // finish is called once
}

// wait puts c in a queue: w's own, or where that is nil that for any worker.
func (p *Pool) wait(c *call, w *worker) {
	p.waiting++
	if w != nil {
		p.keyed++
		c.waitsFor = w
		w.own.push(c)
	} else {
		p.q.push(c)
	}
	p.watchWait()
}

// waitFirst is wait for a call that had its turn before.
func (p *Pool) waitFirst(c *call) {
	p.waiting++
	p.q.pushFront(c)
}

// leave takes c out of the queue that it waits in.
func (p *Pool) leave(c *call) {
	c.in.remove(c)
	switch {
	case c.only != nil:
	case c.waitsFor != nil:
		p.keyed--
		p.waiting--
	default:
		p.waiting--
	}
	c.waitsFor = nil
}

// makeRoom drops a call for a more urgent one, and reports whether there was
// one to drop.
func (p *Pool) makeRoom(c *call) bool {
	if p.o.Full != DropLowest {
		return false
	}
	v := p.q.lowest(c.task.Priority)
	if p.keyed > 0 {
		// What waits for one worker is with that worker. Only with
		// ConsistentHash, and only when tasks are dropped, are all looked at.
		for _, s := range p.shape.slots {
			if s.w == nil {
				continue
			}
			x := s.w.own.lowest(c.task.Priority)
			if x != nil && (v == nil || x.task.Priority < v.task.Priority || x.task.Priority == v.task.Priority && x.asked.After(v.asked)) {
				v = x
			}
		}
	}
	if v == nil {
		return false
	}
	p.leave(v)
	p.finish(v, fmt.Errorf("%w: %d tasks waited, and it was the newest of the lowest priority, %d", ErrDropped, p.waiting+1, v.task.Priority))
	return true
}

// gaveUp is the error of a task whose context has ended.
func gaveUp(err error) error {
	if errors.Is(err, context.DeadlineExceeded) {
		return fmt.Errorf("%w: %w", ErrTimeout, err)
	}
	return fmt.Errorf("pool: the task was given up: %w", err)
}

// broken says why no worker can be had, nil where one can or may yet.
func (p *Pool) broken() error {
	if p.up > 0 || p.failing < p.shape.wanted {
		return nil
	}
	for _, s := range p.shape.slots {
		if e := s.last; s.want && e != nil {
			return e
		}
	}
	return ErrNoWorkers
}

// Err says why no worker can be had, nil where one can or may yet. It is what
// Do returns at once then.
func (p *Pool) Err() error {
	p.mu.Lock()
	defer p.mu.Unlock()
	return p.broken()
}

// assign gives c to w; the caller sends it when it has let go of the lock.
func (p *Pool) assign(w *worker, c *call) {
	p.unlist(w)
	now := time.Now()
	if w.load++; w.load == 1 {
		p.use.change(now, 1, 0)
		p.count(w, now)
	} else {
		p.use.advance(now)
	}
	w.sent++
	if p.o.MaxTasks > 0 && w.sent >= p.o.MaxTasks {
		p.retire(w)
	}
	p.list(w)
	p.running++
	c.w, c.lost, c.settled = w, false, false
	c.attempts++
	c.began = now
	c.prev, c.next = nil, p.active
	if c.next != nil {
		c.next.prev = c
	}
	p.active = c
	if c.timeout > 0 {
		n := c.attempts
		c.timer = time.AfterFunc(c.timeout, func() {
			p.giveUp(c, fmt.Errorf("%w after %s", ErrTimeout, c.timeout), n)
		})
	}
	if p.o.Heartbeat > 0 && !w.beating {
		w.beating, w.pinged = true, false
		w.beat = time.AfterFunc(p.o.Heartbeat, w.heartbeat)
	}
	if p.o.MaxMemory > 0 {
		w.watchMemory()
	}
}

// list puts w where tasks find it, if it can take one.
func (p *Pool) list(w *worker) {
	if w.serving && w.load < p.o.Concurrency {
		p.ready.add(w)
	}
}

func (p *Pool) unlist(w *worker) {
	if w.listed {
		p.ready.remove(w)
	}
}

// send starts c on w, and whatever else w gets where that fails. It reports
// whether it has started c.
func (p *Pool) send(w *worker, c *call) bool {
	for first := c; c != nil; {
		err := w.conn.Start(&c.req)
		if err == nil {
			return c == first
		}
		c = p.settle(c, nil, err)
	}
	return false
}

// fill gives w what waits.
func (p *Pool) fill(w *worker) {
	for {
		p.mu.Lock()
		c := p.take(w)
		p.mu.Unlock()
		if c == nil {
			return
		}
		p.send(w, c)
	}
}

// take assigns the next task to w, nil where there is none or w takes none.
func (p *Pool) take(w *worker) *call {
	if !w.up || w.asked || w.load >= p.o.Concurrency {
		return nil
	}
	c := w.pins.peek(time.Now, p.o.Ageing)
	if w.serving && p.waiting > 0 {
		x := p.q.peek(time.Now, p.o.Ageing)
		if w.own.n > 0 {
			x = moreUrgent(w.own.peek(time.Now, p.o.Ageing), x, time.Now(), p.o.Ageing)
		}
		if c == nil {
			c = x
		} else {
			c = moreUrgent(c, x, time.Now(), p.o.Ageing)
		}
	}
	if c != nil {
		p.leave(c)
		p.assign(w, c)
	}
	return c
}

// End implements ipc.Receiver.
func (c *call) End(_ *ipc.Request, body []byte, err error) {
	w := c.w // not changed while the request is under way
	if next := c.p.settle(c, body, err); next != nil {
		c.p.send(w, next)
	}
}

// Progress implements ipc.Receiver.
func (c *call) Progress(_ *ipc.Request, b []byte) { c.tell(c.task.OnProgress, b) }

// Chunk implements ipc.Receiver.
func (c *call) Chunk(_ *ipc.Request, b []byte) { c.tell(c.task.OnChunk, b) }

func (c *call) tell(f func([]byte), b []byte) {
	if f == nil {
		return
	}
	c.p.mu.Lock()
	ended := c.ended
	c.p.mu.Unlock()
	if !ended {
		f(b)
	}
}

// settle ends a request and returns what its worker is to be sent next.
func (p *Pool) settle(c *call, body []byte, err error) (next *call) {
	p.mu.Lock()
	w := c.w
	if errors.Is(err, ipc.ErrClosed) {
		// How the worker ended is known when it has.
		c.lost, c.settled = true, true
		if w.over {
			again := p.bury(w, []*call{c})
			p.mu.Unlock()
			p.sendAll(again)
			return nil
		}
		w.lost = append(w.lost, c)
		p.mu.Unlock()
		return nil
	}
	defer p.mu.Unlock()
	c.settled = true
	p.use.advance(time.Now())
	p.running--
	p.unlink(c)
	p.unlist(w)
	p.unload(w)
	if !w.answered && (err == nil || isTaskError(err)) {
		w.answered = true
		close(w.proven)
	}
	switch {
	case c.ended:
		// Nobody waits; what is left is the timer that would kill the worker.
		stopTimer(c)
		c.dropAnswer()
	case errors.Is(err, ErrWorkerDied):
		// Exec: the process was the task's own.
		var we *WorkerError
		if errors.As(err, &we) && we.PID > 0 {
			if poison := p.suspects.blame(c, we, p.o.PoisonAfter); poison != nil {
				p.finish(c, poison)
				break
			}
		}
		if !p.again(c) {
			p.finish(c, err)
			break
		}
		p.waitFirst(c)
		if to := p.ready.pick(); to != nil && !w.serving {
			go p.fill(to)
		}
	default:
		c.res.Body, c.took = body, c.req.Took
		if err == nil {
			p.suspects.clear(c)
			c.res.Files, c.res.release = c.req.Got, c.req.Release
		} else {
			c.dropAnswer()
		}
		p.finish(c, err)
	}
	if next = p.take(w); next == nil {
		p.list(w)
		if w.load == 0 {
			p.idle(w)
		}
	}
	return next
}

// unload: w has one task less.
func (p *Pool) unload(w *worker) {
	if w.load--; w.load == 0 {
		at := p.use.at // the caller has brought it up to now
		p.use.change(at, -1, 0)
		p.count(w, at)
	}
}

// count books whether w is there for tasks: it takes some, or still has some.
func (p *Pool) count(w *worker, now time.Time) {
	switch there := w.serving || w.load > 0; {
	case there == w.counted:
	case there:
		p.use.change(now, 0, 1)
		w.counted = true
	default:
		p.use.change(now, 0, -1)
		w.counted = false
	}
}

func stopTimer(c *call) {
	if c.timer != nil {
		c.timer.Stop()
		c.timer = nil
	}
}

// unlink takes c out of active.
func (p *Pool) unlink(c *call) {
	if c.prev != nil {
		c.prev.next = c.next
	} else if p.active == c {
		p.active = c.next
	}
	if c.next != nil {
		c.next.prev = c.prev
	}
	c.next, c.prev = nil, nil
}

// again reports whether c may be tried once more, and readies it for that.
func (p *Pool) again(c *call) bool {
	if !c.task.Idempotent || c.attempts > p.o.Retries || p.closing || c.only != nil {
		return false
	}
	stopTimer(c)
	c.req.Reset()
	c.req.Wait = false
	c.w, c.lost = nil, false
	p.stats.Retried++
	return true
}

// finish ends a call for its caller.
func (p *Pool) finish(c *call, err error) {
	now := time.Now()
	c.ended, c.err = true, err
	stopTimer(c)
	c.res.Attempts = c.attempts
	if c.attempts > 0 {
		c.res.Wait, c.res.Run = c.began.Sub(c.asked), now.Sub(c.began)
		if c.w != nil {
			c.res.PID = c.w.pid
		}
	} else {
		c.res.Wait = now.Sub(c.asked)
	}
	if c.attempts > 0 {
		p.use.ran(c.res.Wait, c.res.Run, c.took, len(c.task.Body)+len(c.res.Body))
	}
	p.stats.count(err)
	p.open--
	c.done <- struct{}{}
	if p.refusing && p.open == 0 {
		close(p.drained)
	}
}

// giveUp ends a call for its caller before its worker has. attempt, unless 0,
// is the one it is about.
func (p *Pool) giveUp(c *call, err error, attempt int) {
	p.mu.Lock()
	if c.ended || attempt > 0 && (c.attempts != attempt || c.in != nil) {
		p.mu.Unlock()
		return
	}
	if c.in != nil {
		p.use.advance(time.Now())
		p.leave(c)
		p.finish(c, err)
		p.mu.Unlock()
		return
	}
	w, settled := c.w, c.settled
	p.finish(c, err)
	p.mu.Unlock()
	if settled {
		return
	}
	polite := w.conn.Cancel(&c.req)
	p.mu.Lock()
	defer p.mu.Unlock()
	if c.settled {
		return
	}
	cause := fmt.Sprintf("did not give up a task within %s of being told to", p.o.Grace)
	if !polite {
		p.retire(w)
		w.signal()
		cause = fmt.Sprintf("had a task that was given up, and did not end within %s of SIGTERM", p.o.Grace)
	}
	c.timer = time.AfterFunc(p.o.Grace, func() {
		p.mu.Lock()
		settled := c.settled
		if !settled && w.culprit == nil {
			w.culprit = c
		}
		p.mu.Unlock()
		if !settled {
			w.Kill(cause)
		}
	})
}

// retire keeps w from getting any more tasks, for good.
func (p *Pool) retire(w *worker) {
	if w.retiring {
		return
	}
	w.retiring = true
	p.withdraw(w)
	p.reshape()
}

// bury ends the calls that a worker took with it, or readies them to be tried
// again; those it returns have a worker already and must be sent.
func (p *Pool) bury(w *worker, calls []*call) (again []*call) {
	p.use.advance(time.Now())
	for _, c := range calls {
		p.running--
		p.unlink(c)
		p.unload(w)
		died := &WorkerError{Kind: ErrWorkerDied, PID: w.pid, Exit: w.exit, Cause: w.cause}
		var poison error
		// Nobody is to blame for the end of a worker that was asked to end, and
		// one alone where it did not give up in time.
		if !w.asked && !p.closing && (w.culprit == nil || w.culprit == c) {
			if e := p.suspects.blame(c, died, p.o.PoisonAfter); e != nil {
				poison = e
			}
		}
		switch {
		case c.ended:
			stopTimer(c)
			continue
		case poison != nil:
			p.finish(c, poison)
			continue
		case !p.again(c):
			p.finish(c, died)
			continue
		}
		if to, later := p.choose(c); to != nil {
			p.assign(to, c)
			again = append(again, c)
		} else if later != nil {
			p.wait(c, later)
		} else {
			p.waitFirst(c)
		}
	}
	p.failIfBroken()
	return again
}

func (p *Pool) sendAll(calls []*call) {
	for _, c := range calls {
		p.send(c.w, c)
	}
}

// failIfBroken ends what waits where no worker will come.
func (p *Pool) failIfBroken() {
	err := p.broken()
	if err == nil {
		return
	}
	p.endWaiting(err)
}

// endWaiting ends what waits.
func (p *Pool) endWaiting(err error) {
	end := func(q *queue) {
		for c := q.peek(nil, 0); c != nil; c = q.peek(nil, 0) {
			p.leave(c)
			p.finish(c, err)
		}
	}
	end(&p.q)
	for _, s := range p.shape.slots {
		if w := s.w; w != nil {
			end(&w.own)
			end(&w.pins)
		}
	}
}

// Drain has the pool take nothing new and waits until everything it has
// accepted has ended, or ctx has. The workers stay until Close.
func (p *Pool) Drain(ctx context.Context) error {
	p.mu.Lock()
	p.refuse()
	p.mu.Unlock()
	select {
	case <-p.drained:
		return nil
	case <-ctx.Done():
		p.mu.Lock()
		defer p.mu.Unlock()
		return fmt.Errorf("pool: %d tasks were not done: %w", p.open, ctx.Err())
	}
}

func (p *Pool) refuse() {
	if p.refusing {
		return
	}
	p.refusing = true
	if p.open == 0 {
		close(p.drained)
	}
}

// Close ends the pool. What waits fails with ErrClosed at once, what runs may
// end until ctx does and fails with ErrClosed then. The workers are asked to
// end, and killed after Options.Grace or when ctx ends. Close returns when
// nothing is left of them; later calls wait and return the same. The error is
// ctx's where it cut something short.
func (p *Pool) Close(ctx context.Context) error {
	p.closeOnce.Do(func() { p.closeErr = p.close(ctx) })
	return p.closeErr
}

// lastWait is how long Close waits for workers that were sent SIGKILL.
const lastWait = 30 * time.Second

func (p *Pool) close(ctx context.Context) error {
	p.mu.Lock()
	p.closing = true
	p.endWaiting(ErrClosed)
	p.refuse()
	for _, t := range []*time.Timer{p.shape.grow, p.shape.shrink} {
		if t != nil {
			t.Stop()
		}
	}
	p.mu.Unlock()
	if p.cache != nil {
		p.cache.close()
	}
	var cut error
	select {
	case <-p.drained:
	case <-ctx.Done():
		p.mu.Lock()
		cut = fmt.Errorf("pool: closed with %d tasks under way: %w", p.open, ctx.Err())
		for c := p.active; c != nil; c = c.next {
			if !c.ended {
				p.finish(c, ErrClosed)
			}
		}
		p.mu.Unlock()
	}
	if p.cache != nil {
		p.cache.wait()
	}
	p.shape.busy.Wait()
	err := p.sup.Shutdown(ctx)
	if err != nil {
		if cut == nil {
			cut = fmt.Errorf("pool: the workers had to be killed: %w", ctx.Err())
		}
		last, cancel := context.WithTimeout(context.WithoutCancel(ctx), lastWait)
		defer cancel()
		if err := p.sup.Shutdown(last); err != nil {
			cut = fmt.Errorf("pool: %w", err)
		}
	}
	if p.own != nil {
		p.own.Close()
	}
	return cut
}
