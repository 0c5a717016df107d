package pool

import (
	"context"
	"errors"
	"runtime"
	"time"
)

// Stats is a pool as it was at one moment, and what it has done so far. The
// names in JSON are stable; durations are whole nanoseconds.
type Stats struct {
	Size    int `json:"size"` // workers there shall be, spares not counted
	Min     int `json:"min"`  // bounds of Size
	Max     int `json:"max"`
	Up      int `json:"up"`      // workers that are ready or at work
	Spare   int `json:"spare"`   // of these, workers that wait for their turn to serve
	Busy    int `json:"busy"`    // workers that have a task
	Queued  int `json:"queued"`  // tasks that wait, Blocked not counted
	Blocked int `json:"blocked"` // tasks that wait for room in the queue
	// Running is the tasks on workers, also those that were given up and not
	// yet answered.
	Running int `json:"running"`

	// Accepted is the tasks that came to the queue or to a worker, or would have
	// if any could be started. Each has not ended or is among the six that
	// follow.
	Accepted  uint64 `json:"accepted"`
	Done      uint64 `json:"done"`
	Failed    uint64 `json:"failed"`    // a *TaskError, or could not be sent
	TimedOut  uint64 `json:"timed_out"` // ErrTimeout
	Cancelled uint64 `json:"cancelled"` // given up by their callers, or by Close
	Lost      uint64 `json:"lost"`      // ErrWorkerDied, ErrNoWorkers
	Dropped   uint64 `json:"dropped"`   // ErrDropped

	// Rejected, Poisoned, BreakerOpen and Cached are tasks that were not accepted:
	// for ErrQueueFull, for ErrPoison, for ErrBreakerOpen, and because the result
	// was kept or is another task's.
	Rejected    uint64 `json:"rejected"`
	Poisoned    uint64 `json:"poisoned"`
	BreakerOpen uint64 `json:"breaker_open"`
	Cached      uint64 `json:"cached"`

	Retried  uint64 `json:"retried"`  // times that a task was given to another worker
	Died     uint64 `json:"died"`     // workers that ended without being asked to
	Recycled uint64 `json:"recycled"` // workers replaced by MaxTasks, MaxAge or MaxMemory

	// Age is the time since the pool was made, Utilization the share of it in
	// which the workers' places (Options.Concurrency each) were taken.
	Age         time.Duration `json:"age_ns"`
	Utilization float64       `json:"utilization"`
	// Wait is the time in the queue of the tasks that came to a worker, Run that
	// on the worker. IPC is what is left of Run without the time that the worker
	// says its handler took, of the tasks where it says so ([Frames]). Start is
	// the time from the start of a worker until it is ready for tasks.
	Wait  Times `json:"wait"`
	Run   Times `json:"run"`
	IPC   Times `json:"ipc"`
	Start Times `json:"start"`

	Recent  Recent  `json:"recent"`
	Verdict Verdict `json:"verdict"` // on Recent

	Breaker *BreakerStats `json:"breaker,omitempty"` // nil: none
	Cache   *CacheStats   `json:"cache,omitempty"`   // nil: none
}

// Times sums up durations. The quantiles are off by 3.2 % at most, or by 32
// nanoseconds where that is more.
type Times struct {
	Count uint64        `json:"count"`
	Total time.Duration `json:"total_ns"`
	Max   time.Duration `json:"max_ns"`
	P50   time.Duration `json:"p50_ns"`
	P90   time.Duration `json:"p90_ns"`
	P99   time.Duration `json:"p99_ns"`
	P999  time.Duration `json:"p999_ns"`
}

// Mean is Total by Count.
func (t Times) Mean() time.Duration {
	if t.Count == 0 {
		return 0
	}
	return t.Total / time.Duration(t.Count)
}

type counters struct {
	Accepted, Done, Failed, TimedOut, Cancelled, Lost, Rejected, Dropped, Poisoned, Retried uint64
}

// count books the end of a call.
func (s *counters) count(err error) {
	switch {
	case err == nil:
		s.Done++
	case isTaskError(err):
		s.Failed++
	case errors.Is(err, ErrDropped):
		s.Dropped++
	case errors.Is(err, ErrWorkerDied) || errors.Is(err, ErrNoWorkers):
		s.Lost++
	case errors.Is(err, ErrTimeout):
		s.TimedOut++
	case errors.Is(err, context.Canceled) || errors.Is(err, ErrClosed):
		s.Cancelled++
	default:
		s.Failed++
	}
}

// Stats returns the pool as it is now. It costs some ten thousand
// nanoseconds, in which the pool does nothing else.
func (p *Pool) Stats() Stats {
	var st Stats
	if p.breaker != nil {
		st.Breaker = p.breaker.stats()
		st.BreakerOpen = st.Breaker.Refused
	}
	if p.cache != nil {
		st.Cache = p.cache.stats()
		st.Cached = st.Cache.Hits + st.Cache.Shared
	}
	p.mu.Lock()
	defer p.mu.Unlock()
	u, s := &p.use, &p.stats
	u.advance(time.Now())
	st.Size, st.Min, st.Max = p.shape.size, p.shape.min, p.shape.max
	st.Up, st.Spare, st.Busy, st.Running = p.up, p.shape.spares.n, min(u.busy, p.up), p.running
	st.Queued = min(p.waiting, p.o.Queue)
	st.Blocked = p.waiting - st.Queued
	st.Accepted, st.Done, st.Failed, st.TimedOut, st.Cancelled = s.Accepted, s.Done, s.Failed, s.TimedOut, s.Cancelled
	st.Lost, st.Dropped, st.Rejected, st.Poisoned, st.Retried = s.Lost, s.Dropped, s.Rejected, s.Poisoned, s.Retried
	st.Died, st.Recycled = u.sums.died, u.sums.recycled
	st.Age = u.sums.elapsed
	st.Utilization = share(u.sums.taken, u.sums.up*time.Duration(p.o.Concurrency))
	st.Wait, st.Run, st.IPC, st.Start = u.wait.all(), u.run.all(), u.ipc.all(), u.start.all()
	st.Recent = u.recent(p.o.Concurrency)
	set := setting{
		size: st.Size, least: st.Min, most: st.Max, spares: p.o.Spares, concurrency: p.o.Concurrency,
		processors: runtime.GOMAXPROCS(0), protocol: p.o.Protocol, under: p.running > 0 || p.waiting > 0, keyed: p.keyed > 0,
	}
	if err := p.broken(); err != nil {
		set.broken = err.Error()
	}
	st.Verdict = judge(st.Recent, set)
	return st
}
