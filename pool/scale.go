package pool

import (
	"context"
	"fmt"
	"strconv"
	"sync"
	"time"

	"github.com/remuda-dev/remuda/supervise"
)

// maxWorkers is the largest size of a pool.
const maxWorkers = 4096

// shape is how many workers there are and shall be. It is guarded by Pool.mu.
type shape struct {
	min, max int
	size     int // workers that shall serve
	serving  int
	slots    []*slot
	wanted   int        // slots that shall have a worker: size and the spares
	spares   workerList // up, but not serving
	changed  []*slot    // of which the supervisor has not been told
	telling  bool
	busy     sync.WaitGroup // the goroutine that tells it

	at     time.Time   // of the last change of size that was the pool's own
	grow   *time.Timer // only while something waits
	shrink *time.Timer // only while a worker more than min is idle
}

// slot is the place of one worker.
type slot struct {
	n     int
	name  string
	want  bool // a worker shall be here
	told  bool // what the supervisor was told last
	added bool // the supervisor knows it
	queue bool // in shape.changed
	w     *worker
	fails int          // starts in a row that led to nothing
	last  *WorkerError // why
}

// workerList holds workers; who came last is first.
type workerList struct {
	first *worker
	n     int
}

func (l *workerList) add(w *worker) {
	w.spare = true
	w.prev, w.next = nil, l.first
	if l.first != nil {
		l.first.prev = w
	}
	l.first = w
	l.n++
}

func (l *workerList) remove(w *worker) {
	w.spare = false
	if w.prev != nil {
		w.prev.next = w.next
	} else {
		l.first = w.next
	}
	if w.next != nil {
		w.next.prev = w.prev
	}
	w.next, w.prev = nil, nil
	l.n--
}

// Scale sets the bounds of the pool's size, from now on; both the same make the
// size fixed. Workers that are too many get no more tasks and end when they
// have none. It does not wait for that. For Exec it counts processes. Errors:
// [ErrClosed], or what is wrong with the bounds.
func (p *Pool) Scale(least, most int) error {
	if least < 1 || most < least || most > maxWorkers {
		return fmt.Errorf("pool: a size of %d to %d workers: 1 to %d are possible", least, most, maxWorkers)
	}
	p.mu.Lock()
	defer p.mu.Unlock()
	if p.refusing {
		return ErrClosed
	}
	s := &p.shape
	s.min, s.max = least, most
	s.size = min(max(s.size, least), most)
	p.reshape()
	p.watchWait()
	p.watchIdle()
	return nil
}

// reshape brings the workers there are closer to what shall be. What is busy
// is left alone until it is not.
func (p *Pool) reshape() {
	s := &p.shape
	if p.closing {
		return
	}
	for s.serving < s.size && s.spares.n > 0 {
		p.serve(s.spares.first)
	}
	for s.serving > s.size {
		w := p.ready.idlest()
		if w == nil {
			w = p.leastOf()
		}
		p.withdraw(w)
		s.spares.add(w)
	}
	want := s.size + p.o.Spares
	for s.wanted > want {
		v := p.dispensable()
		v.want = false
		if v.fails >= failFast {
			p.failing--
		}
		v.fails, v.last = 0, nil
		s.wanted--
		if v.w != nil && v.w.spare {
			s.spares.remove(v.w)
		}
		p.tell(v)
	}
	for s.wanted < want {
		v := p.vacant()
		v.want = true
		s.wanted++
		if w := v.w; w != nil && w.up && !w.retiring && v.told {
			// It was to go when it has no more tasks, and may stay.
			if s.serving < s.size {
				s.spares.add(w)
				p.serve(w)
			} else {
				s.spares.add(w)
			}
		}
		p.tell(v)
	}
}

// leastOf returns a serving worker of which all are busy, the one with least
// tasks.
func (p *Pool) leastOf() (least *worker) {
	for _, s := range p.shape.slots {
		if w := s.w; w != nil && w.serving && (least == nil || w.load+w.own.n < least.load+least.own.n) {
			least = w
		}
	}
	return least
}

// dispensable returns the wanted slot that is missed least: one that has no
// worker, then an idle spare, then a busy one. A serving worker is none.
func (p *Pool) dispensable() (v *slot) {
	rank := func(s *slot) int {
		switch w := s.w; {
		case w == nil || !w.up:
			return 0
		case w.load == 0:
			return 1
		}
		return 2
	}
	for _, s := range p.shape.slots {
		if s.want && (s.w == nil || !s.w.serving) && (v == nil || rank(s) < rank(v)) {
			v = s
		}
	}
	return v
}

// vacant returns a slot that is not wanted: one whose worker has not been told
// to go, else one that has nothing left, else any; a new one where there is none.
func (p *Pool) vacant() (v *slot) {
	s := &p.shape
	rank := func(s *slot) int {
		switch {
		case s.w != nil && s.told:
			return 0
		case s.w == nil:
			return 1
		}
		return 2
	}
	if s.wanted < len(s.slots) {
		for _, x := range s.slots {
			if !x.want && (v == nil || rank(x) < rank(v)) {
				v = x
			}
		}
		return v
	}
	v = &slot{n: len(s.slots), name: "worker-" + strconv.Itoa(len(s.slots))}
	s.slots = append(s.slots, v)
	return v
}

// serve makes a spare one of those that take tasks.
func (p *Pool) serve(w *worker) {
	if w.spare {
		p.shape.spares.remove(w)
	}
	w.serving = true
	p.shape.serving++
	now := time.Now()
	w.idleSince = now
	p.count(w, now)
	if p.o.Balance == ConsistentHash {
		p.ring.add(w)
	}
	p.list(w)
	if p.waiting > 0 {
		go p.fill(w)
	}
	p.watchIdle()
}

// withdraw takes a worker out of service, or out of the spares. What waited
// for it goes elsewhere.
func (p *Pool) withdraw(w *worker) {
	if w.spare {
		p.shape.spares.remove(w)
	}
	if !w.serving {
		return
	}
	p.unlist(w)
	w.serving = false
	p.shape.serving--
	p.count(w, time.Now())
	if p.o.Balance != ConsistentHash {
		return
	}
	p.ring.remove(w)
	for c := w.own.peek(nil, 0); c != nil; c = w.own.peek(nil, 0) {
		p.leave(c)
		now, later := p.choose(c)
		if now != nil { // it may be given something else first
			go p.fill(now)
			later = now
		}
		p.wait(c, later)
	}
}

// idle: w has no tasks any more.
func (p *Pool) idle(w *worker) {
	switch {
	case w.asked || !w.up:
	case w.retiring:
		w.askLater("recycled")
	case !w.slot.want:
		p.tell(w.slot)
	case w.serving:
		w.idleSince = time.Now()
		p.watchIdle()
	}
}

// tell has the supervisor told what is wanted of a slot. It calls back, so it
// is not called under the lock.
func (p *Pool) tell(v *slot) {
	s := &p.shape
	if p.closing || v.queue || v.want == v.told || !v.want && v.w != nil && v.w.load > 0 {
		return
	}
	v.queue = true
	s.changed = append(s.changed, v)
	if !s.telling {
		s.telling = true
		s.busy.Go(p.tellAll)
	}
}

func (p *Pool) tellAll() {
	s := &p.shape
	for {
		p.mu.Lock()
		if len(s.changed) == 0 || p.closing {
			s.telling = false
			p.mu.Unlock()
			return
		}
		v := s.changed[0]
		s.changed = s.changed[1:]
		v.queue = false
		if v.want == v.told || !v.want && v.w != nil && v.w.load > 0 {
			p.mu.Unlock()
			continue
		}
		v.told = v.want
		want, added := v.want, v.added
		v.added = true
		p.mu.Unlock()
		// It is this goroutine that adds and nobody removes: what can go wrong
		// is that the supervisor is shut down.
		switch {
		case !added:
			_ = p.sup.Add(p.child(v), true)
		case want:
			_ = p.sup.Start(v.name)
		default:
			_ = p.sup.Stop("the pool has become smaller", v.name)
		}
	}
}

// child is how the worker of a slot is to be run.
func (p *Pool) child(v *slot) supervise.Spec {
	grace := p.o.Grace
	if grace == 0 {
		grace = -1
	}
	return supervise.Spec{
		Name: v.name,
		Child: supervise.ChildFunc(func(ctx context.Context, _ supervise.Attempt) (supervise.Run, error) {
			return p.startWorker(ctx, v)
		}),
		Restart: supervise.Always,
		// A run is ready when it has answered something, and stable then.
		MinUptime: -1,
		// It never gives up; Do says what is wrong.
		MaxRestarts:  -1,
		Backoff:      p.o.Backoff,
		StartTimeout: p.o.StartTimeout,
		Grace:        grace,
	}
}

// watchWait has the pool grow when what waits has waited long enough.
func (p *Pool) watchWait() {
	s := &p.shape
	if s.size >= s.max || s.grow != nil || p.waiting == 0 || p.closing {
		return
	}
	now := time.Now()
	d := max(p.o.ScaleUpWait-now.Sub(p.oldest()), s.at.Add(p.o.Cooldown).Sub(now), 0)
	s.grow = time.AfterFunc(d, p.grow)
}

// oldest returns when the task that has waited for longest came.
func (p *Pool) oldest() time.Time {
	at, ok := p.q.oldest()
	if p.keyed > 0 {
		for _, s := range p.shape.slots {
			if s.w == nil {
				continue
			}
			if x, any := s.w.own.oldest(); any && (!ok || x.Before(at)) {
				at, ok = x, true
			}
		}
	}
	if !ok {
		return time.Now()
	}
	return at
}

func (p *Pool) grow() {
	p.mu.Lock()
	defer p.mu.Unlock()
	s := &p.shape
	s.grow = nil
	// While those that are to serve do not all yet, more would not help sooner:
	// the next that comes up looks again.
	if p.waiting == 0 || s.serving < s.size || s.size >= s.max || p.closing {
		return
	}
	now := time.Now()
	if now.Sub(p.oldest()) >= p.o.ScaleUpWait && now.Sub(s.at) >= p.o.Cooldown {
		// As many as what waits keeps busy, at most twice as many as there are.
		more := min((p.waiting+p.o.Concurrency-1)/p.o.Concurrency, s.size)
		s.size = min(s.size+more, s.max)
		s.at = now
		p.reshape()
	}
	p.watchWait()
}

// watchIdle has the pool shrink when workers have been idle for long enough.
func (p *Pool) watchIdle() {
	s := &p.shape
	if s.size <= s.min || s.shrink != nil || p.closing {
		return
	}
	w := p.ready.idlest()
	if w == nil {
		return // the next one to become idle looks again
	}
	now := time.Now()
	d := max(p.o.ScaleDownIdle-now.Sub(w.idleSince), s.at.Add(p.o.Cooldown).Sub(now), 0)
	s.shrink = time.AfterFunc(d, p.shrink)
}

func (p *Pool) shrink() {
	p.mu.Lock()
	defer p.mu.Unlock()
	s := &p.shape
	s.shrink = nil
	if p.closing {
		return
	}
	now := time.Now()
	if now.Sub(s.at) >= p.o.Cooldown {
		n := 0
		for w := p.ready.idlest(); w != nil && now.Sub(w.idleSince) >= p.o.ScaleDownIdle; w = w.prev {
			n++
		}
		if n = min(n, s.size-s.min); n > 0 {
			s.size -= n
			s.at = now
			p.reshape()
		}
	}
	p.watchIdle()
}
