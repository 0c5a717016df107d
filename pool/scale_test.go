package pool

import (
	"context"
	"errors"
	"fmt"
	"strings"
	"sync"
	"testing"
	"testing/synctest"
	"time"

	"pgregory.net/rapid"
)

// do starts n tasks that take this long and returns at once.
func do(p *Pool, wg *sync.WaitGroup, n int, body string) {
	for range n {
		wg.Go(func() { _, _ = p.Do(context.Background(), Task{Body: []byte(body)}) })
	}
	synctest.Wait()
}

func sizes(p *Pool) string {
	s := p.Stats()
	return fmt.Sprintf("size %d up %d spare %d busy %d queued %d", s.Size, s.Up, s.Spare, s.Busy, s.Queued)
}

func expect(t *testing.T, p *Pool, want string) {
	t.Helper()
	synctest.Wait()
	if got := sizes(p); got != want {
		t.Errorf("%s, want %s", got, want)
	}
}

// A pool grows when tasks wait, with a pause between two steps, and shrinks
// when workers idle; never beyond its bounds.
func TestElastic(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		p, _ := fakePool(t, Options{Min: 1, Max: 6}, false)
		defer func() { _ = p.Close(context.Background()) }()
		var wg sync.WaitGroup
		do(p, &wg, 10, "10s")
		expect(t, p, "size 1 up 1 spare 0 busy 1 queued 9")
		time.Sleep(99 * time.Millisecond)
		expect(t, p, "size 1 up 1 spare 0 busy 1 queued 9")
		time.Sleep(time.Millisecond)
		expect(t, p, "size 2 up 2 spare 0 busy 2 queued 8")
		time.Sleep(999 * time.Millisecond)
		expect(t, p, "size 2 up 2 spare 0 busy 2 queued 8")
		time.Sleep(time.Millisecond)
		expect(t, p, "size 4 up 4 spare 0 busy 4 queued 6")
		time.Sleep(time.Second)
		expect(t, p, "size 6 up 6 spare 0 busy 6 queued 4")
		wg.Wait()
		expect(t, p, "size 6 up 6 spare 0 busy 0 queued 0")
		// Two that have something to do now and then stay.
		for range 20 {
			time.Sleep(2 * time.Second)
			do(p, &wg, 2, "1s")
			wg.Wait()
		}
		expect(t, p, "size 2 up 2 spare 0 busy 0 queued 0")
		time.Sleep(time.Minute)
		expect(t, p, "size 1 up 1 spare 0 busy 0 queued 0")
		p.mu.Lock()
		if p.shape.grow != nil || p.shape.shrink != nil {
			t.Error("an idle pool has timers")
		}
		p.mu.Unlock()
	})
}

// A spare serves at once where a worker ends or the pool grows.
func TestSpares(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		o := Options{Min: 1, Max: 2, Spares: 1, Cooldown: -1}
		p, log := fakePool(t, o, false)
		defer func() { _ = p.Close(context.Background()) }()
		expect(t, p, "size 1 up 2 spare 1 busy 0 queued 0")
		var wg sync.WaitGroup
		do(p, &wg, 1, "die")
		log.mu.Lock()
		log.startWait = time.Hour // nobody comes up any more
		log.mu.Unlock()
		time.Sleep(2 * time.Second)
		expect(t, p, "size 1 up 1 spare 0 busy 0 queued 0")
		if r, err := p.Do(context.Background(), Task{Body: []byte("1s")}); err != nil || r.Wait != 0 || r.Attempts != 1 {
			t.Errorf("Do waited for %s, %d attempts, %v", r.Wait, r.Attempts, err)
		}
		log.mu.Lock()
		log.startWait = 0
		log.mu.Unlock()
		time.Sleep(time.Minute)
		expect(t, p, "size 1 up 2 spare 1 busy 0 queued 0")
		log.mu.Lock()
		log.startWait = 10 * time.Second
		log.mu.Unlock()
		do(p, &wg, 2, "5s")
		time.Sleep(100 * time.Millisecond)
		expect(t, p, "size 2 up 2 spare 0 busy 2 queued 0")
		wg.Wait()
	})
}

// Scale counts at once; what is busy ends its tasks first, and may stay where
// the pool is made larger again before that.
func TestScale(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		p, log := fakePool(t, Options{Size: 4}, false)
		defer func() { _ = p.Close(context.Background()) }()
		var wg sync.WaitGroup
		var mu sync.Mutex
		failed := 0
		for range 4 {
			wg.Go(func() {
				if _, err := p.Do(context.Background(), Task{Body: []byte("10s")}); err != nil {
					mu.Lock()
					failed++
					mu.Unlock()
				}
			})
		}
		synctest.Wait()
		for _, bad := range [][2]int{{0, 1}, {2, 1}, {1, maxWorkers + 1}} {
			if p.Scale(bad[0], bad[1]) == nil {
				t.Errorf("Scale(%v) was taken", bad)
			}
		}
		if err := p.Scale(1, 1); err != nil {
			t.Fatal(err)
		}
		time.Sleep(5 * time.Second)
		if s := p.Stats(); s.Size != 1 || s.Up != 4 || s.Busy != 4 || s.Min != 1 || s.Max != 1 {
			t.Errorf("made smaller: %+v", s)
		}
		if err := p.Scale(2, 3); err != nil {
			t.Fatal(err)
		}
		wg.Wait()
		time.Sleep(10 * time.Second)
		expect(t, p, "size 2 up 2 spare 0 busy 0 queued 0")
		if err := p.Scale(3, 3); err != nil {
			t.Fatal(err)
		}
		expect(t, p, "size 3 up 3 spare 0 busy 0 queued 0")
		if s := p.Stats(); failed > 0 || s.Died > 0 || log.most != 4 {
			t.Errorf("%d failed, %d lived at a time, %+v", failed, log.most, s)
		}
	})
}

// A task rises by one priority for each Ageing that it waits.
func TestAgeing(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		p, log := fakePool(t, Options{Size: 1, Ageing: 10 * time.Second}, false)
		defer func() { _ = p.Close(context.Background()) }()
		synctest.Wait()
		var wg sync.WaitGroup
		for i, prio := range []int{0, 0, 3, 5, 2, 2} {
			wg.Go(func() {
				_, _ = p.Do(context.Background(), Task{Name: fmt.Sprint(prio, "-", i), Body: []byte("100s"), Priority: prio})
			})
			synctest.Wait()
			time.Sleep(10 * time.Second)
		}
		wg.Wait()
		// After 100 s the second has risen by 9, that of 3 by 8 to the most, that
		// of 5 by 7 to the most: who has come to the most goes by age.
		if got, want := strings.Join(log.started, " "), "0-0 0-1 3-2 5-3 2-4 2-5"; got != want {
			t.Errorf("begun as %s, want %s", got, want)
		}
	})
}

// The order of a queue with ageing is that of a model which sorts.
func TestQueueModel(t *testing.T) {
	rapid.Check(t, func(t *rapid.T) {
		var q queue
		var model []*call
		ageing := time.Duration(rapid.IntRange(0, 3).Draw(t, "ageing")) * time.Second
		now := time.Unix(1000, 0)
		for range rapid.IntRange(1, 60).Draw(t, "steps") {
			now = now.Add(time.Duration(rapid.IntRange(0, 3000).Draw(t, "ms")) * time.Millisecond)
			switch rapid.IntRange(0, 3).Draw(t, "op") {
			case 0, 1:
				c := &call{asked: now}
				c.task.Priority = rapid.IntRange(0, MaxPriority).Draw(t, "prio")
				q.push(c)
				model = append(model, c)
			case 2:
				got := q.peek(func() time.Time { return now }, ageing)
				var want *call
				at := -1
				for i, c := range model {
					if want == nil || c.urgency(now, ageing) > want.urgency(now, ageing) {
						want, at = c, i
					}
				}
				if got != want && (got == nil || want == nil || got.urgency(now, ageing) != want.urgency(now, ageing) || !got.asked.Equal(want.asked)) {
					t.Fatalf("peek: %+v, want %+v", got, want)
				}
				if got != nil {
					for i, c := range model {
						if c == got {
							at = i
						}
					}
					q.remove(got)
					model = append(model[:at], model[at+1:]...)
				}
			case 3:
				below := rapid.IntRange(0, MaxPriority).Draw(t, "below")
				var want *call
				for _, c := range model {
					if c.task.Priority < below && (want == nil || c.task.Priority <= want.task.Priority) {
						want = c
					}
				}
				if got := q.lowest(below); got != want {
					t.Fatalf("lowest below %d: %+v, want %+v", below, got, want)
				}
			}
			if q.n != len(model) {
				t.Fatalf("%d in the queue, want %d", q.n, len(model))
			}
		}
	})
}

func TestDropLowest(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		p, _ := fakePool(t, Options{Size: 1, Queue: 3, Full: DropLowest}, false)
		defer func() { _ = p.Close(context.Background()) }()
		synctest.Wait()
		var (
			wg  sync.WaitGroup
			mu  sync.Mutex
			end = map[string]string{}
		)
		for i, prio := range []int{5, 1, 0, 0, 0, 1, 2, 1, 3} {
			name := fmt.Sprint(prio, "-", i)
			wg.Go(func() {
				_, err := p.Do(context.Background(), Task{Name: name, Body: []byte("1s"), Priority: prio})
				mu.Lock()
				defer mu.Unlock()
				switch {
				case err == nil:
					end[name] = "done"
				case errors.Is(err, ErrDropped):
					end[name] = "dropped"
				case errors.Is(err, ErrQueueFull):
					end[name] = "refused"
				default:
					end[name] = err.Error()
				}
			})
			synctest.Wait()
			time.Sleep(time.Millisecond)
		}
		wg.Wait()
		want := map[string]string{
			"5-0": "done", "1-1": "done", "0-2": "dropped", "0-3": "dropped", "0-4": "refused", "1-5": "dropped", "2-6": "done", "1-7": "refused", "3-8": "done",
		}
		for name, w := range want {
			if end[name] != w {
				t.Errorf("%s was %s, want %s", name, end[name], w)
			}
		}
		if s := p.Stats(); s.Dropped != 3 || s.Rejected != 2 || s.Done != 4 {
			t.Errorf("%+v", s)
		}
	})
}

// A task that ends workers is refused after three of them, whoever submits it,
// for ten minutes.
func TestPoison(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		p, _ := fakePool(t, Options{Size: 2, Retries: 10}, false)
		defer func() { _ = p.Close(context.Background()) }()
		ctx := context.Background()
		var pe *PoisonError
		r, err := p.Do(ctx, Task{Name: "x", Body: []byte("die"), Idempotent: true})
		if !errors.As(err, &pe) || !errors.Is(err, ErrPoison) || !errors.Is(err, ErrWorkerDied) || r.Attempts != 3 || pe.Workers != 3 || pe.Last.PID == 0 {
			t.Errorf("Do = %v after %d attempts", err, r.Attempts)
		}
		for i := range 3 {
			_, err = p.Do(ctx, Task{Name: "y", Body: []byte("die")})
			if !errors.Is(err, ErrWorkerDied) || errors.Is(err, ErrPoison) != (i == 2) {
				t.Errorf("Do = %v", err)
			}
		}
		for _, name := range []string{"x", "y"} {
			if r, err := p.Do(ctx, Task{Name: name, Body: []byte("die")}); !errors.Is(err, ErrPoison) || r.Attempts != 0 {
				t.Errorf("again: Do = %v after %d attempts", err, r.Attempts)
			}
		}
		if _, err := p.Do(ctx, Task{Name: "x", Body: []byte("ok")}); err != nil {
			t.Error("another body:", err)
		}
		if s := p.Stats(); s.Poisoned != 2 || s.Died != 6 {
			t.Errorf("%+v", s)
		}
		time.Sleep(suspectFor)
		if _, err := p.Do(ctx, Task{Name: "x", Body: []byte("die")}); !errors.Is(err, ErrWorkerDied) || errors.Is(err, ErrPoison) {
			t.Errorf("after ten minutes: %v", err)
		}
	})
}

// Of two tasks on one worker only the one that does not give up in time counts,
// and success clears.
func TestPoisonBlamesWho(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		p, _ := fakePool(t, Options{Size: 1, Concurrency: 2}, false)
		defer func() { _ = p.Close(context.Background()) }()
		ctx := context.Background()
		for range 3 {
			var wg sync.WaitGroup
			wg.Go(func() { _, _ = p.Do(ctx, Task{Name: "by", Body: []byte("1m")}) })
			wg.Go(func() { _, _ = p.Do(ctx, Task{Name: "bad", Body: []byte("hang"), Timeout: time.Second}) })
			wg.Wait()
		}
		if _, err := p.Do(ctx, Task{Name: "by", Body: []byte("1m")}); err != nil {
			t.Error("the bystander:", err)
		}
		if _, err := p.Do(ctx, Task{Name: "bad", Body: []byte("hang")}); !errors.Is(err, ErrPoison) {
			t.Error("the other:", err)
		}
		for range 4 {
			var wg sync.WaitGroup
			wg.Go(func() { _, _ = p.Do(ctx, Task{Name: "good", Body: []byte("1m")}) })
			wg.Go(func() { _, _ = p.Do(ctx, Task{Name: fmt.Sprint(time.Now()), Body: []byte("die")}) })
			wg.Wait()
			if _, err := p.Do(ctx, Task{Name: "good", Body: []byte("1m")}); err != nil {
				t.Error("a task that succeeds:", err)
			}
		}
	})
}

// The suspects are bounded, the oldest is forgotten.
func TestSuspects(t *testing.T) {
	rapid.Check(t, func(t *rapid.T) {
		var s suspects
		s.seed = fakeSeed
		counts := map[string]int{}
		var order []string // by the last deed
		forget := func(name string) {
			delete(counts, name)
			for i, n := range order {
				if n == name {
					order = append(order[:i], order[i+1:]...)
					return
				}
			}
		}
		for range rapid.IntRange(1, maxSuspects+200).Draw(t, "steps") {
			name := fmt.Sprint(rapid.IntRange(0, maxSuspects+50).Draw(t, "name"))
			c := &call{task: Task{Name: name}}
			if rapid.IntRange(0, 9).Draw(t, "op") == 0 {
				s.clear(c)
				forget(name)
			} else {
				n := counts[name]
				if n == 0 && len(order) == maxSuspects {
					forget(order[0])
				}
				forget(name)
				counts[name] = n + 1
				order = append(order, name)
				if err := s.blame(c, &WorkerError{}, 2); (err != nil) != (counts[name] >= 2) {
					t.Fatalf("%s ended %d: %v", name, counts[name], err)
				}
			}
			if len(s.by) != len(order) || s.any.Load() != (len(order) > 0) {
				t.Fatalf("%d are remembered, want %d", len(s.by), len(order))
			}
			if err := s.refuse(&call{task: Task{Name: name}}, 2); (err != nil) != (counts[name] >= 2) {
				t.Fatalf("%s ended %d: refuse: %v", name, counts[name], err)
			}
		}
	})
}
