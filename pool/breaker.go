package pool

import (
	"context"
	"errors"
	"fmt"
	"sync"
	"time"
)

// ErrBreakerOpen says that the breaker refused the task: the pool fails too
// often for more to be tried. The error is a *[BreakerError].
var ErrBreakerOpen = errors.New("pool: the breaker is open")

// BreakerState is what a breaker does with tasks.
type BreakerState uint8

// The states.
const (
	BreakerClosed   BreakerState = iota // lets every task through
	BreakerOpen                         // refuses every task
	BreakerHalfOpen                     // lets one task through, as a probe
)

// String returns closed, open or half-open.
func (s BreakerState) String() string {
	switch s {
	case BreakerClosed:
		return "closed"
	case BreakerOpen:
		return "open"
	case BreakerHalfOpen:
		return "half-open"
	}
	return fmt.Sprintf("BreakerState(%d)", uint8(s))
}

// MarshalText implements encoding.TextMarshaler, so that JSON has the word.
func (s BreakerState) MarshalText() ([]byte, error) { return []byte(s.String()), nil }

// UnmarshalText implements encoding.TextUnmarshaler.
func (s *BreakerState) UnmarshalText(b []byte) error {
	for _, k := range []BreakerState{BreakerClosed, BreakerOpen, BreakerHalfOpen} {
		if string(b) == k.String() {
			*s = k
			return nil
		}
	}
	return fmt.Errorf("pool: unknown state of a breaker %q: closed, open or half-open", b)
}

// BreakerError is how a breaker refuses a task. It is ErrBreakerOpen, and not
// its Cause.
type BreakerError struct {
	State BreakerState // BreakerOpen or BreakerHalfOpen
	// RetryAfter is how long the breaker stays open. While a probe is under way
	// it is a tenth of BreakerOptions.OpenFor, as a guess.
	RetryAfter time.Duration
	Cause      error // the failure that opened the breaker
}

func (e *BreakerError) Error() string {
	s := ErrBreakerOpen.Error()
	if e.State == BreakerHalfOpen {
		s = "pool: the breaker is half-open and waits for its probe"
	}
	return fmt.Sprintf("%s; try again in %s; it opened on: %v", s, e.RetryAfter.Round(time.Millisecond), e.Cause)
}

// Is reports whether target is ErrBreakerOpen.
func (e *BreakerError) Is(target error) bool { return target == ErrBreakerOpen }

// BreakerOptions are the settings of the circuit breaker around a pool. The zero
// value opens after five failures in a row, for half a minute.
//
// A breaker counts the ends of the tasks that it let through. Failures are what
// IsFailure says; a result or a *[TaskError] that is no failure is a success:
// there is a worker that answers. Everything else, such as a task that found the
// queue full, says nothing about the workers and is not counted; nor, whatever
// IsFailure says, are tasks that their callers cancelled or that a closing pool
// gave up.
//
// When OpenFor is over, the next task is let through as a probe, and until it
// ends all others are refused. A success closes the breaker, a failure opens it
// again, and after an end that is not counted the next task is the probe. A
// probe that has not ended within OpenFor is joined by another, so that one that
// hangs does not keep the breaker from closing. Tasks that were let through
// before the breaker last changed its state count no more.
type BreakerOptions struct {
	// Failures is how many failures in a row open the breaker. 0: 5, or none
	// where Rate is set; below 0: none.
	Failures int
	// Rate opens the breaker when this share of the tasks that ended within
	// Window have failed, from MinCalls of them on. It is above 0 and at most
	// 1. 0: off.
	Rate     float64
	Window   time.Duration // slides by tenths; 0: 10 seconds
	MinCalls int           // 0: 20
	// OpenFor is how long the breaker refuses tasks before it tries one. 0: 30
	// seconds.
	OpenFor time.Duration
	// IsFailure says whether a task that ended with this error, which is not
	// nil, failed in the breaker's sense. nil: [ErrWorkerDied], [ErrTimeout]
	// (also by the deadline of the caller's context) and [ErrNoWorkers] are
	// failures, [ErrPoison] is none. It is called concurrently.
	IsFailure func(error) bool
	// Fallback takes the place of a task that the breaker refused (err is a
	// *[BreakerError]) or that failed in the breaker's sense: what it returns is
	// what Do returns. It runs in the goroutine of Do's caller, and its results
	// are not cached. nil: Do returns the error.
	Fallback func(ctx context.Context, t Task, err error) (Result, error)
	// OnChange is told each change of state, one at a time and in order, before
	// the task that brought it about returns. It may use the pool, but not
	// Close it.
	OnChange func(BreakerChange)
}

// BreakerChange is a change of a breaker's state.
type BreakerChange struct {
	From, To BreakerState
	At       time.Time
	Cause    error // the failure that opened it; nil where To is not BreakerOpen
}

// BreakerStats is a breaker as it was at one moment.
type BreakerStats struct {
	// State is BreakerHalfOpen also where OpenFor is over and no task has come
	// yet to be the probe.
	State      BreakerState  `json:"state"`
	RetryAfter time.Duration `json:"retry_after_ns"` // how long it stays open
	// FailuresInRow is the count for BreakerOptions.Failures, WindowCalls and
	// WindowFailures those for Rate.
	FailuresInRow  int    `json:"failures_in_row"`
	WindowCalls    int    `json:"window_calls"`
	WindowFailures int    `json:"window_failures"`
	Cause          string `json:"cause,omitempty"` // what opened it last
	Opened         uint64 `json:"opened"`          // how often it opened
	Refused        uint64 `json:"refused"`         // tasks
	FellBack       uint64 `json:"fell_back"`       // tasks that Fallback took the place of
}

// breaker is a circuit breaker. It has neither goroutine nor timer: that it may
// be tried again shows when the next task comes.
type breaker struct {
	o     BreakerOptions
	start time.Time

	mu    sync.Mutex
	state BreakerState
	// term counts the changes of state. What was let through in one term counts
	// in that term only.
	term    uint64
	row     int
	recent  window
	until   time.Time // open: when it may be tried
	probe   uint64    // half-open: the number of the last probe
	probing bool      // it is under way
	probed  time.Time // it began
	cause   error

	opened, refused, fellBack uint64

	changes []BreakerChange // to be told
	telling bool
}

// pass is the leave to do a task.
type pass struct{ term, probe uint64 }

func newBreaker(o BreakerOptions) (*breaker, error) {
	switch {
	case !(o.Rate >= 0 && o.Rate <= 1): // not a number is neither
		return nil, fmt.Errorf("pool: a breaker's rate of %v: it is above 0 and at most 1, or 0 for none", o.Rate)
	case o.Failures < 0 && o.Rate == 0:
		return nil, errors.New("pool: a breaker needs a number of failures or a rate that opens it")
	case o.Window < 0 || o.MinCalls < 0 || o.OpenFor < 0:
		return nil, errors.New("pool: a breaker's Window, MinCalls and OpenFor must not be negative")
	}
	if o.Failures == 0 && o.Rate == 0 {
		o.Failures = 5
	}
	if o.Window == 0 {
		o.Window = 10 * time.Second
	}
	if o.MinCalls == 0 {
		o.MinCalls = 20
	}
	if o.OpenFor == 0 {
		o.OpenFor = 30 * time.Second
	}
	if o.IsFailure == nil {
		o.IsFailure = isFailure
	}
	return &breaker{o: o, start: time.Now(), recent: window{slot: max(o.Window/windowSlots, 1)}}, nil
}

func isFailure(err error) bool {
	if errors.Is(err, ErrPoison) { // the task's fault, and it is out of the way
		return false
	}
	return errors.Is(err, ErrWorkerDied) || errors.Is(err, ErrTimeout) || errors.Is(err, ErrNoWorkers)
}

// fallback returns what Do returns for a task that ended with err.
func (b *breaker) fallback(ctx context.Context, t *Task, r Result, err error) (Result, error) {
	if b.o.Fallback == nil || !errors.Is(err, ErrBreakerOpen) && b.sort(err) != bad {
		return r, err
	}
	b.mu.Lock()
	b.fellBack++
	b.mu.Unlock()
	return b.o.Fallback(ctx, *t, err)
}

// verdict is what the end of a task says about the pool.
type verdict uint8

const (
	nothing verdict = iota
	good
	bad
)

func (b *breaker) sort(err error) verdict {
	switch {
	case err == nil:
		return good
	case saysNothing(err):
		return nothing
	case b.o.IsFailure(err):
		return bad
	case isTaskError(err):
		return good
	}
	return nothing
}

// saysNothing reports whether the error is not the pool's doing.
func saysNothing(err error) bool {
	return errors.Is(err, context.Canceled) || errors.Is(err, ErrClosed)
}

// enter lets a task through, or says why not.
func (b *breaker) enter() (pass, error) {
	b.mu.Lock()
	if b.state == BreakerClosed {
		p := pass{term: b.term}
		b.mu.Unlock()
		return p, nil
	}
	now := time.Now()
	e := &BreakerError{State: b.state, Cause: b.cause}
	switch {
	case b.state == BreakerOpen && now.Before(b.until):
		e.RetryAfter = b.until.Sub(now)
	case b.state == BreakerHalfOpen && b.probing && now.Sub(b.probed) < b.o.OpenFor:
		e.RetryAfter = b.o.OpenFor / 10
	default:
		if b.state == BreakerOpen {
			b.become(BreakerHalfOpen, now)
		}
		b.probe++
		b.probing, b.probed = true, now
		p := pass{b.term, b.probe}
		b.mu.Unlock()
		b.tell()
		return p, nil
	}
	b.refused++
	b.mu.Unlock()
	return pass{}, e
}

// leave books the end of a task that was let through.
func (b *breaker) leave(p pass, err error) {
	v := b.sort(err) // the caller's code: not under the lock
	b.mu.Lock()
	switch {
	case p.term != b.term:
	case b.state == BreakerHalfOpen:
		switch {
		case v == good:
			b.become(BreakerClosed, time.Now())
		case v == bad:
			b.cause = err
			b.become(BreakerOpen, time.Now())
		case p.probe == b.probe:
			b.probing = false
		}
	case v == nothing:
	default:
		if b.count(v == bad) {
			b.cause = err
			b.become(BreakerOpen, time.Now())
		}
	}
	changed := len(b.changes) > 0
	b.mu.Unlock()
	if changed {
		b.tell()
	}
}

// count books an end while closed and reports whether it is one too many.
func (b *breaker) count(failed bool) (tooMany bool) {
	if failed {
		b.row++
	} else {
		b.row = 0
	}
	if b.o.Rate > 0 {
		n, bad := b.recent.add(time.Since(b.start), failed)
		tooMany = failed && n >= b.o.MinCalls && float64(bad)/float64(n) >= b.o.Rate
	}
	return tooMany || failed && b.o.Failures > 0 && b.row >= b.o.Failures
}

// become changes the state; b.cause is set before.
func (b *breaker) become(s BreakerState, now time.Time) {
	c := BreakerChange{From: b.state, To: s, At: now}
	b.state = s
	b.term++
	b.row, b.probing = 0, false
	b.recent.clear()
	switch s {
	case BreakerOpen:
		b.opened++
		b.until = now.Add(b.o.OpenFor)
		c.Cause = b.cause
	case BreakerClosed:
		b.cause = nil
	}
	if b.o.OnChange != nil {
		b.changes = append(b.changes, c)
	}
}

// tell tells what has changed, unless somebody is at it: who is tells all.
func (b *breaker) tell() {
	b.mu.Lock()
	defer b.mu.Unlock()
	if b.telling {
		return
	}
	b.telling = true
	defer func() { b.telling = false }() // also where OnChange panics
	for len(b.changes) > 0 {
		c := b.changes[0]
		b.changes = b.changes[1:]
		b.tellOne(c)
	}
	b.changes = nil
}

// tellOne tells c without the lock, and has it again at its end.
func (b *breaker) tellOne(c BreakerChange) {
	b.mu.Unlock()
	defer b.mu.Lock()
	b.o.OnChange(c)
}

func (b *breaker) stats() *BreakerStats {
	b.mu.Lock()
	defer b.mu.Unlock()
	s := &BreakerStats{State: b.state, FailuresInRow: b.row, Opened: b.opened, Refused: b.refused, FellBack: b.fellBack}
	if b.o.Rate > 0 {
		s.WindowCalls, s.WindowFailures = b.recent.sum(time.Since(b.start))
	}
	if b.cause != nil {
		s.Cause = b.cause.Error()
	}
	if b.state == BreakerOpen {
		if s.RetryAfter = time.Until(b.until); s.RetryAfter <= 0 {
			s.State, s.RetryAfter = BreakerHalfOpen, 0
		}
	}
	return s
}

// windowSlots is how many parts a sliding window has.
const windowSlots = 10

// window counts what happened lately. It slides by slots: the one that has begun
// and the nine before count.
type window struct {
	slot time.Duration
	at   int64 // number of the slot that has begun
	all  [windowSlots]int
	bad  [windowSlots]int
}

// slide lets go of what is too old. now does not go back.
func (w *window) slide(now time.Duration) {
	to := int64(now / w.slot)
	for i := max(w.at, to-windowSlots) + 1; i <= to; i++ {
		w.all[i%windowSlots], w.bad[i%windowSlots] = 0, 0
	}
	w.at = max(w.at, to)
}

func (w *window) add(now time.Duration, bad bool) (all, failed int) {
	w.slide(now)
	w.all[w.at%windowSlots]++
	if bad {
		w.bad[w.at%windowSlots]++
	}
	return w.sum(now)
}

func (w *window) sum(now time.Duration) (all, bad int) {
	w.slide(now)
	for i := range w.all {
		all += w.all[i]
		bad += w.bad[i]
	}
	return all, bad
}

func (w *window) clear() { *w = window{slot: w.slot, at: w.at} }
