package pool

import (
	"context"
	"errors"
	"fmt"
	"math/rand/v2"
	"path/filepath"
	"slices"
	"sync"
	"sync/atomic"
	"testing"
	"testing/synctest"
	"time"

	"github.com/remuda-dev/remuda/ipc"
)

// A pool whose workers die is left alone for a while, serves what it has kept
// meanwhile, degrades gracefully, and heals by one task.
func TestBreakerAndCacheAroundPool(t *testing.T) {
	var (
		mu   sync.Mutex
		told []BreakerState
	)
	p := newPool(t, Options{
		Size: 2,
		Breaker: &BreakerOptions{
			Failures: 3, OpenFor: 300 * time.Millisecond,
			OnChange: func(c BreakerChange) {
				mu.Lock()
				defer mu.Unlock()
				told = append(told, c.To)
			},
			Fallback: func(_ context.Context, task Task, err error) (Result, error) {
				if task.Name == "pid" {
					return Result{Body: []byte("nobody")}, nil
				}
				return Result{}, fmt.Errorf("no replacement: %w", err)
			},
		},
		Cache: &CacheOptions{TTL: time.Hour},
	})
	ctx := limit(t)
	kept, err := p.Do(ctx, Task{Name: "pid", CacheKey: "k"})
	if err != nil || kept.Cached {
		t.Fatalf("%+v, %v", kept, err)
	}
	for i := range 3 { // not one task, which would be poison
		if _, err := p.Do(ctx, Task{Name: "kill", Body: []byte{byte(i)}}); !errors.Is(err, ErrWorkerDied) {
			t.Errorf("kill: %v", err)
		}
	}
	// Open; unless this machine needs longer than OpenFor for what follows.
	open := time.Now()
	_, refused := p.Do(ctx, Task{})
	stats := p.Stats().Breaker
	if r, err := p.Do(ctx, Task{Name: "pid"}); time.Since(open) < 200*time.Millisecond {
		var be *BreakerError
		if !errors.As(refused, &be) || be.RetryAfter > 300*time.Millisecond || !errors.Is(be.Cause, ErrWorkerDied) {
			t.Errorf("while open: %v", refused)
		}
		if err != nil || string(r.Body) != "nobody" {
			t.Errorf("the fallback: %q, %v", r.Body, err)
		}
		if stats.State != BreakerOpen || stats.Refused != 1 || stats.Opened != 1 || stats.FellBack != 4 {
			t.Errorf("stats: %+v", stats)
		}
	}
	if r, err := p.Do(ctx, Task{Name: "pid", CacheKey: "k"}); err != nil || !r.Cached || !slices.Equal(r.Body, kept.Body) {
		t.Errorf("kept: %+v, %v", r, err)
	}
	for p.Stats().Breaker.State != BreakerClosed {
		if _, err := p.Do(ctx, Task{}); err != nil && !errors.Is(err, ErrBreakerOpen) {
			t.Fatal(err)
		}
	}
	mu.Lock()
	defer mu.Unlock()
	if want := []BreakerState{BreakerOpen, BreakerHalfOpen, BreakerClosed}; !slices.Equal(told, want) {
		t.Errorf("told %v", told)
	}
}

// A hundred callers of one key wake one worker once, whoever leaves.
func TestCacheAroundPool(t *testing.T) {
	p := newPool(t, Options{Size: 2, Concurrency: 4, Cache: &CacheOptions{}})
	ctx := limit(t)
	file := filepath.Join(t.TempDir(), "f")
	var wg sync.WaitGroup
	for i := range 100 {
		wg.Go(func() {
			// Done once, the handler ends its worker; "again" is the answer when
			// it is tried again.
			r, err := p.Do(ctx, Task{Name: "once", Body: []byte(file), Idempotent: true, CacheKey: "k"})
			if err != nil || string(r.Body) != "again" {
				t.Errorf("%d: %q, %v", i, r.Body, err)
			}
		})
	}
	wg.Wait()
	s := p.Stats()
	if s.Died != 1 || s.Done != 1 || s.Cache.Misses != 1 || s.Cache.Hits+s.Cache.Shared != 99 {
		t.Errorf("%+v, cache %+v", s, s.Cache)
	}
	// The last to leave takes the task along, and nothing is kept of it.
	gone, cancel := context.WithCancel(ctx)
	for range 5 {
		wg.Go(func() {
			if _, err := p.Do(gone, Task{Name: "wait", CacheKey: "w"}); !errors.Is(err, context.Canceled) {
				t.Errorf("a caller that left: %v", err)
			}
		})
	}
	for p.Stats().Running == 0 || p.Stats().Cache.Misses+p.Stats().Cache.Shared < 5 {
		time.Sleep(time.Millisecond)
	}
	cancel()
	wg.Wait()
	for p.Stats().Running > 0 {
		time.Sleep(time.Millisecond)
	}
	if s := p.Stats(); s.Cancelled != 1 || s.Cache.Entries != 1 {
		t.Errorf("%+v, cache %+v", s, s.Cache)
	}
}

// Draining and closing count for layers as well.
func TestLayersClose(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		p, _ := fakePool(t, Options{Size: 1, Cache: &CacheOptions{}, Breaker: &BreakerOptions{}}, false)
		ctx := context.Background()
		if _, err := p.Do(ctx, Task{Body: []byte("ok"), CacheKey: "k"}); err != nil {
			t.Fatal(err)
		}
		var wg sync.WaitGroup
		for range 3 {
			wg.Go(func() {
				if _, err := p.Do(ctx, Task{Body: []byte("hang"), CacheKey: "hang"}); !errors.Is(err, ErrClosed) {
					t.Errorf("what hangs: %v", err)
				}
			})
		}
		synctest.Wait()
		short, cancel := context.WithTimeout(ctx, time.Second)
		defer cancel()
		if err := p.Drain(short); err == nil {
			t.Error("drained, although a task hangs")
		}
		if _, err := p.Do(ctx, Task{Body: []byte("ok"), CacheKey: "k"}); !errors.Is(err, ErrClosed) {
			t.Errorf("after Drain: %v", err)
		}
		short, cancel = context.WithTimeout(ctx, time.Second)
		defer cancel()
		_ = p.Close(short)
		wg.Wait()
		if s := p.Stats(); s.Cache.Entries != 0 || s.Breaker.FailuresInRow != 0 {
			t.Errorf("after Close: %+v %+v", s.Cache, s.Breaker)
		}
		// The cache's timer is gone with it: the bubble would not end.
	})
}

// Around a pool that goes wrong in every way each call ends once and is counted
// once, with breaker, cache and fallback, and nothing is left.
func TestLayersEveryTaskEndsOnce(t *testing.T) {
	for seed := range 8 {
		t.Run(fmt.Sprint(seed), func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				rnd := rand.New(rand.NewPCG(uint64(seed), 2))
				var fellBack, changes atomic.Int64
				o := Options{
					Size: 1 + rnd.IntN(4), Concurrency: 1 + rnd.IntN(3), Queue: 1 + rnd.IntN(50), Full: FullPolicy(rnd.IntN(3)),
					Timeout: 3 * time.Second, MaxTasks: rnd.IntN(2) * 7, PoisonAfter: 20,
					Breaker: &BreakerOptions{
						Failures: 2 + rnd.IntN(3), Rate: float64(rnd.IntN(2)) * 0.5, OpenFor: time.Duration(1+rnd.IntN(10)) * time.Second,
						OnChange: func(BreakerChange) { changes.Add(1) },
					},
					Cache: &CacheOptions{TTL: time.Duration(rnd.IntN(20)-1) * time.Second, MaxEntries: rnd.IntN(4)},
				}
				if rnd.IntN(2) == 0 {
					o.Breaker.Fallback = func(_ context.Context, _ Task, err error) (Result, error) {
						fellBack.Add(1)
						return Result{Body: []byte("fallback")}, err
					}
				}
				p, log := fakePool(t, o, true)
				var wg sync.WaitGroup
				var kept atomic.Int64
				const calls = 400
				what := []string{"ok", "ok", "ok", "ok", "fail", "die", "close", "hang", "unsendable"}
				for range calls {
					time.Sleep(time.Duration(rnd.IntN(300)) * time.Millisecond)
					task := Task{Body: []byte(what[rnd.IntN(len(what))]), Priority: rnd.IntN(10), Idempotent: rnd.IntN(2) == 0}
					if rnd.IntN(2) == 0 {
						task.CacheKey = string(task.Body) + fmt.Sprint(rnd.IntN(2))
					}
					patience := time.Duration(1+rnd.IntN(60)) * time.Second
					wg.Go(func() {
						ctx, cancel := context.WithTimeout(context.Background(), patience)
						defer cancel()
						r, err := p.Do(ctx, task)
						if r.Cached {
							kept.Add(1)
						}
						if r.Cached && err != nil || err == nil && string(r.Body) != "done" {
							t.Errorf("%s: %+v, %v", task.Body, r, err)
						}
						var te *TaskError
						if err == nil || errors.As(err, &te) {
							return
						}
						for _, known := range []error{ErrWorkerDied, ErrTimeout, ErrQueueFull, ErrDropped, ErrPoison, ErrNoWorkers, ErrBreakerOpen, ipc.ErrTooLarge} {
							if errors.Is(err, known) {
								return
							}
						}
						t.Errorf("%s ended with %v", task.Body, err)
					})
				}
				wg.Wait()
				synctest.Wait() // tasks that all their callers have left
				s := p.Stats()
				if n := s.Accepted + s.Rejected + s.Poisoned + s.BreakerOpen + s.Cached; n != calls {
					t.Errorf("%d calls, %d counted: %+v", calls, n, s)
				}
				if n := s.Done + s.Failed + s.TimedOut + s.Cancelled + s.Lost + s.Dropped; n != s.Accepted {
					t.Errorf("%d accepted, %d ended: %+v", s.Accepted, n, s)
				}
				if s.Cached < uint64(kept.Load()) || s.Breaker.FellBack != uint64(fellBack.Load()) || s.Breaker.Opened == 0 || s.Breaker.Opened > uint64(changes.Load()) {
					t.Errorf("%d cached, %d fell back, %d changes: %+v %+v", kept.Load(), fellBack.Load(), changes.Load(), s.Cache, s.Breaker)
				}
				if err := p.Close(context.Background()); err != nil {
					t.Error("Close:", err)
				}
				synctest.Wait()
				if s := p.Stats(); s.Running != 0 || p.use.busy != 0 || p.use.up != 0 || s.Cache.Entries != 0 || len(p.cache.flights) != 0 || p.open != 0 || log.live != 0 {
					t.Errorf("left: %+v, %+v, %d open, %d workers live", s, s.Cache, p.open, log.live)
				}
			})
		})
	}
}
