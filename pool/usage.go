package pool

import (
	"time"

	"github.com/remuda-dev/remuda/ipc"
)

// turnTime is how long a turn takes: what is recent is the turn that has begun
// and the one before.
const turnTime = 10 * time.Second

// usage adds up what the workers' time went into, over all workers: two that are
// busy for a second make two seconds. What it says of now is true, nothing ticks.
type usage struct {
	at       time.Time // of the last change
	busy, up int       // workers that have a task; that take or have some
	// Of the pool: workers that shall take tasks, requests on workers, tasks that
	// wait. Read where the time up to a change is added, so before the change.
	want, taken, waiting *int

	sums   sums
	turned time.Time // when the turn began
	before sums      // at the begin of the turn before
	begun  sums      // at the begin of the turn

	wait, run, ipc, start series
}

// sums grow and never shrink.
type sums struct {
	elapsed  time.Duration
	want     time.Duration // workers that shall take tasks
	up       time.Duration // workers that do, or still have some
	busy     time.Duration // workers that have a task
	taken    time.Duration // tasks on workers
	waited   time.Duration // while any task waits
	told     time.Duration // on workers, by tasks whose workers told their own time
	took     time.Duration // what they told
	moved    uint64        // bytes of all tasks that ended on a worker, and of their results
	died     uint64        // workers
	recycled uint64
}

func (s sums) minus(o sums) sums {
	return sums{
		elapsed: s.elapsed - o.elapsed, want: s.want - o.want, up: s.up - o.up, busy: s.busy - o.busy,
		taken: s.taken - o.taken, waited: s.waited - o.waited, told: s.told - o.told, took: s.took - o.took,
		moved: s.moved - o.moved, died: s.died - o.died, recycled: s.recycled - o.recycled,
	}
}

// change books that so many more, or fewer, workers are busy and up from now on.
func (u *usage) change(now time.Time, busy, up int) {
	u.advance(now)
	u.busy += busy
	u.up += up
}

// ran books a task that ended on a worker. took is what the worker said that its
// handler took, 0 where it said nothing; bytes are those of task and result.
func (u *usage) ran(wait, run, took time.Duration, bytes int) {
	u.sums.moved += uint64(bytes)
	u.wait.add(wait)
	u.run.add(run)
	if took > 0 && took < ipc.MaxTook {
		took = min(took, run)
		u.ipc.add(run - took)
		u.sums.told += run
		u.sums.took += took
	}
}

// advance brings the sums up to now.
func (u *usage) advance(now time.Time) {
	if u.at.IsZero() {
		u.at, u.turned = now, now
		return
	}
	for d := now.Sub(u.turned); d >= turnTime; d = now.Sub(u.turned) {
		// After a long time without a change the last two turns are enough.
		u.turned = u.turned.Add(max(d/turnTime-1, 1) * turnTime)
		u.add(u.turned)
		u.before, u.begun = u.begun, u.sums
		for _, s := range []*series{&u.wait, &u.run, &u.ipc, &u.start} {
			s.turn()
		}
	}
	u.add(now)
}

func (u *usage) add(now time.Time) {
	d := now.Sub(u.at)
	if d <= 0 { // callers read the clock before or after others that hold the lock
		return
	}
	u.at = now
	s := &u.sums
	s.elapsed += d
	s.want += d * time.Duration(*u.want)
	s.up += d * time.Duration(u.up)
	s.busy += d * time.Duration(u.busy)
	s.taken += d * time.Duration(*u.taken)
	if *u.waiting > 0 {
		s.waited += d
	}
}

// recent says what became of the time lately. Each worker has so many places.
func (u *usage) recent(places int) Recent {
	s := u.sums.minus(u.before)
	run := u.run.recent()
	return Recent{
		Bytes:       s.moved / max(run.Count, 1),
		Span:        s.elapsed,
		Utilization: share(s.taken, s.up*time.Duration(places)),
		Missing:     share(s.want-s.up, s.want),
		Waiting:     share(s.waited, s.elapsed),
		Overhead:    share(s.told-s.took, s.told),
		Handling:    share(s.took, s.busy),
		Died:        s.died, Recycled: s.recycled,
		Wait: u.wait.recent(), Run: run, IPC: u.ipc.recent(), Start: u.start.recent(),
	}
}

// share is part by whole, from 0 to 1.
func share(part, whole time.Duration) float64 {
	if whole <= 0 {
		return 0
	}
	return min(max(float64(part)/float64(whole), 0), 1)
}
