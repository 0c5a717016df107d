package pool

import (
	"cmp"
	"hash/maphash"
	"math/bits"
	"math/rand/v2"
	"slices"
)

// Balance says which of the workers that have room gets a task.
type Balance uint8

// The ways to balance.
const (
	// LeastBusy takes the worker that has the fewest tasks, and among equals the
	// one that was busy last, whose memory is still warm.
	LeastBusy Balance = iota
	// RoundRobin takes one after the other, in a fixed order; those without room
	// are passed over. A pool whose size is elastic shrinks only when each
	// worker's turn comes less often than ScaleDownIdle.
	RoundRobin
	// TwoChoices takes two at random and of these the one that has less.
	TwoChoices
	// ConsistentHash gives tasks of one Task.Key to one worker, so that what
	// the worker remembers is of use again; those without a key go by
	// LeastBusy. A worker that comes or goes moves about as many keys as it is
	// given or had, and no others; one that is replaced gets the keys of the
	// one before.
	//
	// The load is bounded: as long as its worker has room, or has (with what
	// waits for it) less than 1.25 times the average, a task goes to its worker
	// or waits for it, also while others are idle; else the next worker in the
	// key's own order is looked at in the same way.
	ConsistentHash
)

// ready holds the serving workers that have room.
type ready struct {
	balance     Balance
	first, last []*worker // by load; who came last is first
	least       int       // no worker is in a list below it
	n           int

	turn []uint64 // RoundRobin: a bit for each slot whose worker is here
	from int      // the slot whose turn it is
	by   []*worker
	all  []*worker // TwoChoices
}

func (r *ready) add(w *worker) {
	w.prev, w.next = nil, r.first[w.load]
	if w.next != nil {
		w.next.prev = w
	} else {
		r.last[w.load] = w
	}
	r.first[w.load] = w
	w.listed = true
	r.least = min(r.least, w.load)
	r.n++
	switch r.balance {
	case RoundRobin:
		n := w.slot.n
		for n >= len(r.by) {
			r.by = append(r.by, make([]*worker, 64)...)
			r.turn = append(r.turn, 0)
		}
		r.by[n] = w
		r.turn[n/64] |= 1 << (n % 64)
	case TwoChoices:
		w.at = len(r.all)
		r.all = append(r.all, w)
	}
}

func (r *ready) remove(w *worker) {
	if w.prev != nil {
		w.prev.next = w.next
	} else {
		r.first[w.load] = w.next
	}
	if w.next != nil {
		w.next.prev = w.prev
	} else {
		r.last[w.load] = w.prev
	}
	w.next, w.prev, w.listed = nil, nil, false
	r.n--
	switch r.balance {
	case RoundRobin:
		n := w.slot.n
		r.by[n] = nil
		r.turn[n/64] &^= 1 << (n % 64)
	case TwoChoices:
		end := len(r.all) - 1
		moved := r.all[end]
		r.all[w.at], moved.at = moved, w.at
		r.all[end] = nil
		r.all = r.all[:end]
	}
}

// pick returns the worker that is to get the next task, nil where none has
// room.
func (r *ready) pick() *worker {
	switch {
	case r.n == 0:
		r.least = len(r.first)
		return nil
	case r.balance == RoundRobin:
		return r.next()
	case r.balance == TwoChoices:
		a, b := r.all[rand.IntN(r.n)], r.all[rand.IntN(r.n)]
		if b.load < a.load {
			return b
		}
		return a
	}
	for r.first[r.least] == nil {
		r.least++
	}
	return r.first[r.least]
}

// next finds the next slot in turn; 64 at a time, so that it is no matter how
// many there are.
func (r *ready) next() *worker {
	if r.from >= len(r.by) {
		r.from = 0
	}
	i := r.from / 64
	rest := r.turn[i] &^ (1<<(r.from%64) - 1)
	for rest == 0 {
		if i++; i == len(r.turn) {
			i = 0
		}
		rest = r.turn[i]
	}
	n := i*64 + bits.TrailingZeros64(rest)
	r.from = n + 1
	return r.by[n]
}

// idlest returns the worker that has been idle for longest, nil where all have
// tasks.
func (r *ready) idlest() *worker { return r.last[0] }

// points is how many places on the ring a worker has: enough that the largest
// share is not much above the average.
const points = 64

type point struct {
	at uint64
	w  *worker
}

// ring finds the worker of a key: the one whose point comes next.
type ring struct {
	seed   maphash.Seed
	points []point
	n      int // workers
}

func (r *ring) place(slot, i int) uint64 {
	return maphash.Comparable(r.seed, [2]int{slot, i})
}

func (r *ring) add(w *worker) {
	mine := make([]point, points)
	for i := range mine {
		mine[i] = point{r.place(w.slot.n, i), w}
	}
	slices.SortFunc(mine, func(a, b point) int { return cmp.Compare(a.at, b.at) })
	// Merged from the end, in place.
	i, k := len(r.points)-1, points-1
	r.points = append(r.points, mine...)
	for to := len(r.points) - 1; k >= 0; to-- {
		if i >= 0 && r.points[i].at > mine[k].at {
			r.points[to] = r.points[i]
			i--
		} else {
			r.points[to] = mine[k]
			k--
		}
	}
	r.n++
}

func (r *ring) remove(w *worker) {
	r.points = slices.DeleteFunc(r.points, func(p point) bool { return p.w == w })
	r.n--
}

// find returns the first worker in the key's order that ok says yes to, nil
// where there is none.
func (r *ring) find(key string, ok func(*worker) bool) *worker {
	at := maphash.String(r.seed, key)
	i, _ := slices.BinarySearchFunc(r.points, at, func(p point, at uint64) int { return cmp.Compare(p.at, at) })
	var before *worker
	for k := range r.points {
		w := r.points[(i+k)%len(r.points)].w
		if w != before && ok(w) {
			return w
		}
		before = w
	}
	return nil
}

// choose returns the worker that is to do c now, or the one that c waits for;
// neither where it waits for any.
func (p *Pool) choose(c *call) (now, later *worker) {
	if p.o.Balance != ConsistentHash || c.task.Key == "" || p.ring.n == 0 {
		return p.ready.pick(), nil
	}
	// 1.25 times the average with this one, rounded up.
	most := max(p.o.Concurrency, (5*(p.running+p.keyed+1)+4*p.ring.n-1)/(4*p.ring.n))
	w := p.ring.find(c.task.Key, func(w *worker) bool { return w.load+w.own.n < most })
	switch {
	case w == nil:
		return p.ready.pick(), nil
	case w.load < p.o.Concurrency:
		return w, nil
	}
	return nil, w
}
