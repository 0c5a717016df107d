package ipc

import "time"

const (
	gatherFrom = 8 // tasks that a worker has, from which on more are kept back
	// gatherFor is how long they are kept where no answer comes.
	gatherFor = 200 * time.Microsecond
	// gatherPace is how soon after one another answers must come.
	gatherPace = 100 * time.Microsecond
)

// gather keeps tasks back for a moment while the worker has plenty to do, so
// that many share a system call and, what costs more, a switch to the worker.
// They go out with its next answers, which come soon, or when they are as many
// as it has. It is guarded by the Conn's lock.
type gather struct {
	kept  int // tasks that are queued and not written
	most  int // tasks that the worker had since answers came last
	had   int // and before that: all may be answered at once, and come again
	quick bool
	last  time.Time // answers came
	late  *time.Timer
	flush func()
}

// keep says whether the task that was queued last, one of pending, is to be
// kept back.
func (g *gather) keep(pending int) bool {
	g.most = max(g.most, pending)
	has := pending - g.kept - 1
	if !g.quick || has < gatherFrom || g.kept+1 >= has {
		g.kept = 0
		return false
	}
	if g.kept++; g.kept == 1 {
		if g.late == nil {
			g.late = time.AfterFunc(gatherFor, g.flush)
		} else {
			g.late.Reset(gatherFor)
		}
	}
	return true
}

// busy reports whether tasks are many, so that one lets others join it.
func (g *gather) busy() bool { return max(g.most, g.had) >= busyFrom }

// turned is called when answers have come, before what is queued is written.
func (g *gather) turned(pending int, now time.Time) {
	g.had, g.most = g.most, pending
	g.quick = now.Sub(g.last) < gatherPace
	g.last = now
	g.kept = 0
}

// waited is called when no answer came.
func (g *gather) waited() { g.kept, g.quick = 0, false }
