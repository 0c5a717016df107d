package pool

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"math"
	"slices"
	"strings"
	"sync"
	"testing"
	"testing/synctest"
	"time"

	"pgregory.net/rapid"
)

// breakerModel says what a breaker must do, from everything that has happened.
type breakerModel struct {
	o     BreakerOptions
	state BreakerState
	since time.Time // the state
	ends  []modelEnd
	probe int // the call that is the probe, -1
	began time.Time
}

type modelEnd struct {
	at     time.Time
	failed bool
}

// enter is what becomes of call n.
func (m *breakerModel) enter(now time.Time, n int) bool {
	switch m.state {
	case BreakerClosed:
		return true
	case BreakerOpen:
		if now.Sub(m.since) < m.o.OpenFor {
			return false
		}
		m.become(BreakerHalfOpen, now)
	case BreakerHalfOpen:
		if m.probe >= 0 && now.Sub(m.began) < m.o.OpenFor {
			return false
		}
	}
	m.probe, m.began = n, now
	return true
}

func (m *breakerModel) become(s BreakerState, now time.Time) {
	m.state, m.since, m.ends, m.probe = s, now, nil, -1
}

func (m *breakerModel) leave(now time.Time, n int, v verdict, epoch time.Time) {
	if m.state == BreakerHalfOpen {
		switch {
		case v == good:
			m.become(BreakerClosed, now)
		case v == bad:
			m.become(BreakerOpen, now)
		case n == m.probe:
			m.probe = -1
		}
		return
	}
	if v == nothing {
		return
	}
	m.ends = append(m.ends, modelEnd{now, v == bad})
	row := 0
	for _, e := range slices.Backward(m.ends) {
		if !e.failed {
			break
		}
		row++
	}
	slot := m.o.Window / windowSlots
	all, failed := 0, 0
	for _, e := range m.ends {
		if int64(now.Sub(epoch)/slot)-int64(e.at.Sub(epoch)/slot) < windowSlots {
			all++
			if e.failed {
				failed++
			}
		}
	}
	if v == bad && (m.o.Failures > 0 && row >= m.o.Failures ||
		m.o.Rate > 0 && all >= m.o.MinCalls && float64(failed)/float64(all) >= m.o.Rate) {
		m.become(BreakerOpen, now)
	}
}

// bubbled is a test in a bubble of false time, where the deadline of the real one
// may not be asked for.
type bubbled struct{ rapid.TB }

// The breaker does what the model says, whatever happens in whichever order.
func TestBreakerModel(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		rapid.Check(bubbled{t}, func(t *rapid.T) {
			var changes []BreakerChange
			o := BreakerOptions{
				Failures: rapid.IntRange(-1, 4).Draw(t, "failures"),
				Rate:     rapid.SampledFrom([]float64{0, 0.1, 0.5, 1}).Draw(t, "rate"),
				Window:   time.Duration(rapid.IntRange(1, 20).Draw(t, "window")) * time.Second,
				MinCalls: rapid.IntRange(1, 6).Draw(t, "min"),
				OpenFor:  time.Duration(rapid.IntRange(1, 20).Draw(t, "open for")) * time.Second,
				OnChange: func(c BreakerChange) { changes = append(changes, c) },
			}
			b, err := newBreaker(o)
			if err != nil {
				if o.Failures < 0 && o.Rate == 0 {
					return
				}
				t.Fatal(err)
			}
			m := &breakerModel{o: b.o, probe: -1}
			type open struct {
				n    int
				pass pass
				term int
			}
			var (
				calls []open
				n     int
				term  int // of the model
				last  = m.state
				want  []BreakerState
			)
			look := func() {
				if m.state != last {
					last = m.state
					term++
					want = append(want, last)
				}
				if s := b.state; s != m.state {
					t.Fatalf("the state is %s, want %s", s, m.state)
				}
				var got []BreakerState
				for _, c := range changes {
					got = append(got, c.To)
					if (c.To == BreakerOpen) != (c.Cause != nil) {
						t.Fatalf("told %+v", c)
					}
				}
				if !slices.Equal(got, want) {
					t.Fatalf("told %v, want %v", got, want)
				}
			}
			t.Repeat(map[string]func(*rapid.T){
				"": func(*rapid.T) { look() },
				"enter": func(t *rapid.T) {
					now := time.Now()
					p, err := b.enter()
					ok := m.enter(now, n)
					var be *BreakerError
					switch {
					case ok != (err == nil):
						t.Fatalf("enter = %v, want it let through: %v", err, ok)
					case err == nil:
						look()
						calls = append(calls, open{n, p, term})
						n++
					case !errors.Is(err, ErrBreakerOpen) || !errors.As(err, &be) || be.Cause == nil || errors.Is(err, be.Cause):
						t.Fatalf("enter = %#v", err)
					case be.State != m.state || be.RetryAfter <= 0 || be.RetryAfter > b.o.OpenFor:
						t.Fatalf("enter = %+v", be)
					case m.state == BreakerOpen && be.RetryAfter != m.since.Add(b.o.OpenFor).Sub(now):
						t.Fatalf("enter = %+v, open since %s", be, now.Sub(m.since))
					}
				},
				"leave": func(t *rapid.T) {
					if len(calls) == 0 {
						t.Skip()
					}
					i := rapid.IntRange(0, len(calls)-1).Draw(t, "call")
					c := calls[i]
					calls = slices.Delete(calls, i, i+1)
					v := rapid.SampledFrom([]verdict{good, bad, bad, nothing}).Draw(t, "end")
					err := map[verdict]error{
						good: nil, bad: &WorkerError{Kind: ErrWorkerDied}, nothing: fmt.Errorf("x: %w", context.Canceled),
					}[v]
					now := time.Now()
					b.leave(c.pass, err)
					if c.term == term {
						m.leave(now, c.n, v, b.start)
					}
				},
				"sleep": func(t *rapid.T) {
					time.Sleep(time.Duration(rapid.IntRange(1, 8000).Draw(t, "ms")) * time.Millisecond)
				},
			})
		})
	})
}

func guard(b *breaker, task func() error) error {
	p, err := b.enter()
	if err == nil {
		err = task()
		b.leave(p, err)
	}
	return err
}

func TestBreakerSorts(t *testing.T) {
	task := &TaskError{Message: "no"}
	for _, c := range []struct {
		err       error
		byDefault verdict
		always    verdict // where every error is a failure
	}{
		{nil, good, good},
		{task, good, bad},
		{fmt.Errorf("x: %w", task), good, bad},
		{&WorkerError{Kind: ErrWorkerDied}, bad, bad},
		{&WorkerError{Kind: ErrNoWorkers}, bad, bad},
		{fmt.Errorf("%w after 1s", ErrTimeout), bad, bad},
		{gaveUp(context.DeadlineExceeded), bad, bad},
		{gaveUp(context.Canceled), nothing, nothing},
		{ErrClosed, nothing, nothing},
		{ErrQueueFull, nothing, bad},
		{ErrDropped, nothing, bad},
		{&PoisonError{Last: &WorkerError{Kind: ErrWorkerDied}}, nothing, bad},
	} {
		b, err := newBreaker(BreakerOptions{})
		if err != nil {
			t.Fatal(err)
		}
		if got := b.sort(c.err); got != c.byDefault {
			t.Errorf("%v: %d, want %d", c.err, got, c.byDefault)
		}
		b.o.IsFailure = func(error) bool { return true }
		if got := b.sort(c.err); got != c.always {
			t.Errorf("%v, where all are failures: %d, want %d", c.err, got, c.always)
		}
	}
}

func TestBreakerOptions(t *testing.T) {
	for _, o := range []BreakerOptions{
		{Rate: -0.1}, {Rate: 1.1}, {Rate: math.NaN()}, {Failures: -1}, {Window: -1}, {MinCalls: -1}, {OpenFor: -1},
	} {
		if _, err := newBreaker(o); err == nil {
			t.Errorf("%+v was taken", o)
		}
	}
	for _, s := range []BreakerState{BreakerClosed, BreakerOpen, BreakerHalfOpen} {
		b, err := json.Marshal(s)
		var back BreakerState
		if err != nil || json.Unmarshal(b, &back) != nil || back != s {
			t.Errorf("%s as JSON: %s, %v", s, b, err)
		}
	}
	if err := json.Unmarshal([]byte(`"ajar"`), new(BreakerState)); err == nil || !strings.Contains(err.Error(), "half-open") {
		t.Errorf("an unknown state: %v", err)
	}
}

// Of two hundred that come at once when the breaker may be tried, one gets
// through, and the changes are told in order although they come from many.
func TestBreakerOneProbe(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		var told []string
		b, err := newBreaker(BreakerOptions{Failures: 1, OpenFor: time.Second, OnChange: func(c BreakerChange) {
			told = append(told, c.To.String()) // a race where two are told at once
		}})
		if err != nil {
			t.Fatal(err)
		}
		died := &WorkerError{Kind: ErrWorkerDied}
		for round := range 10 {
			_ = guard(b, func() error { return died })
			time.Sleep(time.Second)
			var wg sync.WaitGroup
			var mu sync.Mutex
			through, refused := 0, 0
			for range 200 {
				wg.Go(func() {
					err := guard(b, func() error {
						time.Sleep(time.Second / 2)
						return nil
					})
					mu.Lock()
					defer mu.Unlock()
					if err == nil {
						through++
					} else {
						refused++
					}
				})
			}
			wg.Wait()
			if through != 1 || refused != 199 {
				t.Fatalf("round %d: %d got through, %d were refused", round, through, refused)
			}
		}
		if got := strings.Join(told, " "); got != strings.TrimSpace(strings.Repeat("open half-open closed ", 10)) {
			t.Errorf("told %s", got)
		}
		if s := b.stats(); s.Opened != 10 || s.Refused != 10*199 || s.State != BreakerClosed || s.Cause != "" {
			t.Errorf("stats = %+v", s)
		}
	})
}

// A probe that hangs is joined by another after OpenFor, and what was let
// through before the breaker opened neither closes it nor takes the probe's place.
func TestBreakerStragglers(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		b, err := newBreaker(BreakerOptions{Failures: 1, OpenFor: time.Second})
		if err != nil {
			t.Fatal(err)
		}
		enter := func(want bool) pass {
			t.Helper()
			p, err := b.enter()
			if (err == nil) != want {
				t.Fatalf("enter = %v", err)
			}
			return p
		}
		early, failing := enter(true), enter(true)
		b.leave(failing, ErrTimeout)
		if s := b.stats(); s.State != BreakerOpen || s.RetryAfter != time.Second || s.Cause != ErrTimeout.Error() {
			t.Errorf("stats = %+v", s)
		}
		time.Sleep(time.Second)
		if s := b.stats(); s.State != BreakerHalfOpen || s.RetryAfter != 0 {
			t.Errorf("stats = %+v", s)
		}
		hung := enter(true)
		b.leave(early, nil)
		enter(false)
		time.Sleep(time.Second)
		second := enter(true)
		enter(false)
		b.leave(hung, context.Canceled) // does not make room: the second is under way
		enter(false)
		b.leave(second, context.Canceled)
		b.leave(enter(true), nil)
		enter(true)
		if b.state != BreakerClosed {
			t.Errorf("the state is %s", b.state)
		}
	})
}

func TestBreakerFallback(t *testing.T) {
	var seen []error
	b, err := newBreaker(BreakerOptions{Failures: 2, Fallback: func(_ context.Context, t Task, err error) (Result, error) {
		seen = append(seen, err)
		return Result{Body: append([]byte("instead of "), t.Body...)}, nil
	}})
	if err != nil {
		t.Fatal(err)
	}
	do := func(end error) (string, error) {
		r := Result{Body: []byte("y")}
		err := guard(b, func() error { return end })
		if err != nil {
			r, err = b.fallback(context.Background(), &Task{Body: []byte("x")}, r, err)
		}
		return string(r.Body), err
	}
	for _, c := range []struct {
		end  error
		want string
		fail bool
	}{
		{nil, "y", false},
		{&TaskError{}, "y", true},
		{context.Canceled, "y", true},
		{ErrTimeout, "instead of x", false},
		{ErrTimeout, "instead of x", false},
		{nil, "instead of x", false}, // open by now
	} {
		if got, err := do(c.end); got != c.want || (err != nil) != c.fail {
			t.Errorf("%v: %q, %v", c.end, got, err)
		}
	}
	if len(seen) != 3 || !errors.Is(seen[1], ErrTimeout) || !errors.Is(seen[2], ErrBreakerOpen) {
		t.Errorf("the fallback saw %v", seen)
	}
	if s := b.stats(); s.FellBack != 3 || s.Refused != 1 {
		t.Errorf("stats = %+v", s)
	}
}

// OnChange may use what it watches.
func TestBreakerOnChangeReenters(t *testing.T) {
	var (
		b    *breaker
		told []BreakerState
	)
	b, err := newBreaker(BreakerOptions{Failures: 1, OpenFor: time.Nanosecond, OnChange: func(c BreakerChange) {
		told = append(told, c.To)
		b.stats()
		if c.To == BreakerOpen {
			time.Sleep(time.Microsecond)
			p, err := b.enter()
			if err != nil {
				t.Error(err)
			}
			b.leave(p, nil)
		}
	}})
	if err != nil {
		t.Fatal(err)
	}
	p, _ := b.enter()
	b.leave(p, ErrTimeout)
	if want := []BreakerState{BreakerOpen, BreakerHalfOpen, BreakerClosed}; !slices.Equal(told, want) {
		t.Errorf("told %v", told)
	}
}

func benchmarkBreaker(b *testing.B, o BreakerOptions) {
	br, err := newBreaker(o)
	if err != nil {
		b.Fatal(err)
	}
	b.ReportAllocs()
	for b.Loop() {
		p, _ := br.enter()
		br.leave(p, nil)
	}
}

func BenchmarkBreaker(b *testing.B)     { benchmarkBreaker(b, BreakerOptions{}) }
func BenchmarkBreakerRate(b *testing.B) { benchmarkBreaker(b, BreakerOptions{Rate: 0.5}) }
