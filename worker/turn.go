package worker

import (
	"errors"
	"sync/atomic"
	"time"
)

const (
	// tickFor is how long a handler may hold up the reading, give or take as
	// much again.
	tickFor = time.Millisecond
	// aloneBelow and amongBelow are how long handlers take at most that are run
	// by the goroutine that reads: where the task is the only one, and where
	// there are others, which are done one after the other then.
	aloneBelow = 200 * time.Microsecond
	amongBelow = 4 * time.Microsecond
	// paceFor is how soon after the one before a task must come for that.
	paceFor = tickFor / 4
)

// errTakenOver says that another goroutine reads.
var errTakenOver = errors.New("worker: another goroutine reads")

// turn lets the goroutine that reads run quick handlers itself, which spares the
// switch to another. One that is not quick after all must not keep cancels and
// pings from being read: something looks every millisecond, only while handlers
// are run so, and has another goroutine read then.
type turn struct {
	srv      *server
	now      atomic.Uint64 // counts beginnings and ends: odd while a handler runs
	watching atomic.Bool
	timer    *time.Timer
	seen     uint64       // of the timer: now, when it looked last
	last     time.Time    // of the one that reads: when a task came
	mean     atomic.Int64 // of what handlers took of late, in nanoseconds; 0: not known
}

func (t *turn) init(s *server) {
	t.srv = s
	t.timer = time.AfterFunc(time.Hour, t.look)
	t.timer.Stop()
}

// took notes how long a handler took. One that took much longer than those before
// may only have lost its processor; look tells of those that are slow indeed.
func (t *turn) took(d time.Duration) {
	m := t.mean.Load()
	if m == 0 {
		m = int64(d)
	}
	d = min(d, time.Duration(4*m))
	t.mean.Store(max(m+(int64(d)-m)/8, 1)) // another's may be lost: it is an estimate
}

// quick reports whether the handler that begins now is likely to be quick, and
// one of many, for which looking pays.
func (t *turn) quick(now time.Time, alone bool) bool {
	since := now.Sub(t.last)
	t.last = now
	m := time.Duration(t.mean.Load())
	return m > 0 && since < paceFor && (m < amongBelow || alone && m < aloneBelow)
}

// run runs f in the goroutine that reads.
func (t *turn) run(f func()) error {
	me := t.now.Add(1)
	if !t.watching.Load() && t.watching.CompareAndSwap(false, true) {
		t.timer.Reset(tickFor)
	}
	returned := false
	defer func() {
		// A handler may end its goroutine.
		if !returned && t.now.CompareAndSwap(me, me+1) {
			t.hand()
		}
	}()
	f()
	returned = true
	if !t.now.CompareAndSwap(me, me+1) {
		return errTakenOver
	}
	return nil
}

// hand has another goroutine read.
func (t *turn) hand() {
	t.srv.release()
	go t.srv.read()
}

// look takes over where the same handler still runs, and stops looking where
// none was begun.
func (t *turn) look() {
	now := t.now.Load()
	switch {
	case now != t.seen:
	case now%2 == 1:
		if t.now.CompareAndSwap(now, now+1) {
			t.mean.Store(int64(max(time.Duration(t.mean.Load()), tickFor)))
			t.hand()
		}
	default:
		t.watching.Store(false)
		if t.now.Load() == now || !t.watching.CompareAndSwap(false, true) {
			return
		}
	}
	t.seen = now
	t.timer.Reset(tickFor)
}
