package pool

import (
	"context"
	"errors"
	"time"
)

// Stats is a pool as it was at one moment, and what it has done so far.
type Stats struct {
	Size    int // workers there shall be, spares not counted
	Min     int // bounds of Size
	Max     int
	Up      int // workers that are ready or at work
	Spare   int // of these, workers that wait for their turn to serve
	Busy    int // workers that have a task
	Queued  int // tasks that wait, Blocked not counted
	Blocked int // tasks that wait for room in the queue
	Running int // tasks on workers, also those that were given up and not yet answered

	Accepted  uint64 // tasks, Rejected not counted
	Done      uint64
	Failed    uint64 // a *TaskError, or could not be sent
	TimedOut  uint64
	Cancelled uint64 // given up by their callers, or by Close
	Lost      uint64 // ErrWorkerDied, ErrNoWorkers
	Rejected  uint64 // ErrQueueFull
	Dropped   uint64 // ErrDropped
	Poisoned  uint64 // ErrPoison, refused at once; not among Accepted
	Retried   uint64 // times that a task was given to another worker

	Died     uint64 // workers that ended without being asked to
	Recycled uint64 // workers replaced by MaxTasks, MaxAge or MaxMemory

	Breaker *BreakerStats // nil: none
	Cache   *CacheStats   // nil: none

	Wait Times // in the queue, of tasks that came to a worker
	Run  Times // on a worker
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
	Accepted, Done, Failed, TimedOut, Cancelled, Lost, Rejected, Dropped, Poisoned, Retried, Died, Recycled uint64

	wait, run series
}

// count books the end of a call.
func (s *counters) count(c *call, err error) {
	if c.attempts > 0 {
		s.wait.add(c.res.Wait)
		s.run.add(c.res.Run)
	}
	var te *TaskError
	switch {
	case err == nil:
		s.Done++
	case errors.As(err, &te):
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

// Stats returns the pool as it is now.
func (p *Pool) Stats() Stats {
	var (
		breaker *BreakerStats
		cache   *CacheStats
	)
	if p.breaker != nil {
		breaker = p.breaker.stats()
	}
	if p.cache != nil {
		cache = p.cache.stats()
	}
	p.mu.Lock()
	defer p.mu.Unlock()
	s := &p.stats
	queued := min(p.waiting, p.o.Queue)
	return Stats{
		Size: p.shape.size, Min: p.shape.min, Max: p.shape.max, Up: p.up, Spare: p.shape.spares.n, Busy: min(p.use.busy, p.up), Queued: queued, Blocked: p.waiting - queued, Running: p.running,
		Accepted: s.Accepted, Done: s.Done, Failed: s.Failed, TimedOut: s.TimedOut, Cancelled: s.Cancelled,
		Lost: s.Lost, Rejected: s.Rejected, Dropped: s.Dropped, Poisoned: s.Poisoned, Retried: s.Retried, Died: s.Died, Recycled: s.Recycled,
		Breaker: breaker, Cache: cache,
		Wait: s.wait.all(), Run: s.run.all(),
	}
}
