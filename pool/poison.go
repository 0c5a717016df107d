package pool

import (
	"fmt"
	"hash/maphash"
	"sync/atomic"
	"time"
)

const (
	maxSuspects = 256              // that are remembered
	suspectFor  = 10 * time.Minute // after the last worker that one ended
)

// PoisonError says that a task is not done because of the workers that it, or
// one of the same name and body, has ended. It is ErrPoison, and what its Last
// is.
type PoisonError struct {
	Workers int          // that it ended
	Last    *WorkerError // how the last of them ended
}

func (e *PoisonError) Error() string {
	return fmt.Sprintf("%s: it has ended %d workers, the last so: %s", ErrPoison, e.Workers, e.Last)
}

// Is reports whether target is ErrPoison.
func (e *PoisonError) Is(target error) bool { return target == ErrPoison }

// Unwrap returns how the last of the workers ended.
func (e *PoisonError) Unwrap() error { return e.Last }

// suspects remembers the tasks that workers have ended with, by a hash of name,
// body and arguments under a key of this process, which nobody can aim at. It is guarded
// by Pool.mu, but for any. While there are none it costs nothing.
type suspects struct {
	seed        maphash.Seed
	any         atomic.Bool
	by          map[uint64]*suspect
	first, last *suspect // by the time of their last deed, the oldest first
}

type suspect struct {
	mark       uint64
	next, prev *suspect
	at         time.Time
	workers    int
	died       *WorkerError
}

// prepare makes the mark of a call where it will be looked at, before the lock
// is taken: the body may be long.
func (s *suspects) prepare(c *call) {
	if s.any.Load() {
		s.mark(c)
	}
}

func (s *suspects) mark(c *call) uint64 {
	if c.mark == 0 {
		var h maphash.Hash
		h.SetSeed(s.seed)
		_, _ = h.WriteString(c.task.Name) // never fails
		_ = h.WriteByte(0)
		_, _ = h.Write(c.task.Body)
		for _, arg := range c.task.Args {
			_ = h.WriteByte(0)
			_, _ = h.WriteString(arg)
		}
		c.mark = max(h.Sum64(), 1)
	}
	return c.mark
}

// refuse returns the error of a call that is poison, nil of any other.
func (s *suspects) refuse(c *call, after int) error {
	if len(s.by) == 0 {
		return nil
	}
	now := time.Now()
	for s.first != nil && now.Sub(s.first.at) >= suspectFor {
		s.forget(s.first)
	}
	x := s.by[s.mark(c)]
	if x == nil || x.workers < after {
		return nil
	}
	return &PoisonError{Workers: x.workers, Last: x.died}
}

// blame counts the end of a worker for a call that it had, and returns an error
// where the call is poison now. After 0 means never.
func (s *suspects) blame(c *call, died *WorkerError, after int) error {
	if after == 0 {
		return nil
	}
	mark := s.mark(c)
	x := s.by[mark]
	if x != nil {
		s.unlink(x)
	} else {
		if len(s.by) == maxSuspects {
			s.forget(s.first)
		}
		if s.by == nil {
			s.by = make(map[uint64]*suspect)
		}
		x = &suspect{mark: mark}
		s.by[mark] = x
		s.any.Store(true)
	}
	x.at, x.died = time.Now(), died
	x.workers++
	x.prev = s.last
	if s.last != nil {
		s.last.next = x
	} else {
		s.first = x
	}
	s.last = x
	if x.workers < after {
		return nil
	}
	return &PoisonError{Workers: x.workers, Last: died}
}

// clear forgets a call that has succeeded.
func (s *suspects) clear(c *call) {
	if len(s.by) == 0 {
		return
	}
	if x := s.by[s.mark(c)]; x != nil {
		s.forget(x)
	}
}

func (s *suspects) forget(x *suspect) {
	s.unlink(x)
	delete(s.by, x.mark)
	s.any.Store(len(s.by) > 0)
}

func (s *suspects) unlink(x *suspect) {
	if x.prev != nil {
		x.prev.next = x.next
	} else {
		s.first = x.next
	}
	if x.next != nil {
		x.next.prev = x.prev
	} else {
		s.last = x.prev
	}
	x.next, x.prev = nil, nil
}
