package pool

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"math/rand/v2"
	"os"
	"slices"
	"sync"
	"sync/atomic"
	"testing"
	"testing/synctest"
	"time"

	"pgregory.net/rapid"
)

// What is kept, for how long, and what makes room is as the model says.
func TestCacheModel(t *testing.T) {
	type kept struct {
		key  string
		body []byte
		end  time.Time
	}
	synctest.Test(t, func(t *testing.T) {
		rapid.Check(bubbled{t}, func(t *rapid.T) {
			o := CacheOptions{
				TTL:        time.Duration(rapid.IntRange(1, 10).Draw(t, "ttl")) * time.Second,
				MaxBytes:   int64(rapid.IntRange(1, 2000).Draw(t, "bytes")),
				MaxEntries: rapid.IntRange(0, 4).Draw(t, "entries"),
			}
			var (
				done int
				body []byte
				fail error
			)
			c, err := newCache(o, func(context.Context, *Task) (Result, error) {
				done++
				return Result{Body: body, PID: 1}, fail
			})
			if err != nil {
				t.Fatal(err)
			}
			defer c.close()
			var model []kept // the one used last comes last
			t.Repeat(map[string]func(*rapid.T){
				"": func(t *rapid.T) {
					s := c.stats()
					if s.Bytes > o.MaxBytes || o.MaxEntries > 0 && s.Entries > o.MaxEntries || s.Entries < len(model) {
						t.Fatalf("%+v of %+v, the model has %d", s, o, len(model))
					}
					c.mu.Lock()
					defer c.mu.Unlock()
					if (s.Entries == 0) != (c.expiry == nil) || (s.Entries == 0) != (c.kept == nil) || s.Entries == 0 && s.Bytes != 0 {
						t.Fatalf("%+v, the timer is %v", s, c.expiry)
					}
				},
				"do": func(t *rapid.T) {
					key := rapid.SampledFrom([]string{"a", "b", "c", "d", "e"}).Draw(t, "key")
					body = bytes.Repeat([]byte{byte(done)}, rapid.IntRange(0, 900).Draw(t, "size"))
					fail = rapid.SampledFrom([]error{nil, nil, nil, ErrTimeout}).Draw(t, "fail")
					before := done
					r, err := c.do(context.Background(), &Task{CacheKey: key})
					synctest.Wait()
					i := slices.IndexFunc(model, func(k kept) bool { return k.key == key })
					if i >= 0 {
						k := model[i]
						if err != nil || !r.Cached || r.PID != 0 || !bytes.Equal(r.Body, k.body) || done != before {
							t.Fatalf("%s: %+v, %v, done: %v", key, r, err, done != before)
						}
						if len(r.Body) > 0 {
							r.Body[0]++ // it is the caller's
						}
						model = append(slices.Delete(model, i, i+1), k)
						return
					}
					if !errors.Is(err, fail) || r.Cached || !bytes.Equal(r.Body, body) || done != before+1 {
						t.Fatalf("%s: %+v, %v, done %d times", key, r, err, done-before)
					}
					cost := func(k kept) int64 { return int64(len(k.body)+len(k.key)) + entryCost }
					k := kept{key, bytes.Clone(body), time.Now().Add(o.TTL)}
					if fail != nil || cost(k) > o.MaxBytes {
						return
					}
					sum := cost(k)
					for _, m := range model {
						sum += cost(m)
					}
					for len(model) > 0 && (sum > o.MaxBytes || o.MaxEntries > 0 && len(model) >= o.MaxEntries) {
						sum -= cost(model[0])
						model = model[1:]
					}
					model = append(model, k)
				},
				"sleep": func(t *rapid.T) {
					time.Sleep(time.Duration(rapid.IntRange(1, 4000).Draw(t, "ms")) * time.Millisecond)
					model = slices.DeleteFunc(model, func(k kept) bool { return !time.Now().Before(k.end) })
				},
			})
		})
	})
}

// What is kept and never asked for again is gone soon after its TTL.
func TestCacheExpires(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		c, err := newCache(CacheOptions{TTL: 16 * time.Second}, func(context.Context, *Task) (Result, error) { return Result{}, nil })
		if err != nil {
			t.Fatal(err)
		}
		for i := range 100 {
			_, _ = c.do(context.Background(), &Task{CacheKey: fmt.Sprint(i)})
			time.Sleep(100 * time.Millisecond)
		}
		for range 10 {
			time.Sleep(time.Second)
			if c.mu.Lock(); c.age.last != nil && time.Since(c.age.last.expires) > time.Second {
				t.Errorf("a result is %s too old", time.Since(c.age.last.expires))
			}
			c.mu.Unlock()
		}
		time.Sleep(7 * time.Second)
		if s := c.stats(); s.Entries != 0 || s.Expired != 100 {
			t.Errorf("%+v", s)
		}
	})
}

// Callers of one key share one execution, may each leave, and the last one takes
// it along.
func TestCacheSingleFlight(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		var done, cancelled atomic.Int32
		c, err := newCache(CacheOptions{TTL: -1}, func(ctx context.Context, t *Task) (Result, error) {
			done.Add(1)
			select {
			case <-time.After(time.Second):
				return Result{Body: []byte("body"), PID: 7, Run: time.Second}, nil
			case <-ctx.Done():
				cancelled.Add(1)
				return Result{}, gaveUp(ctx.Err())
			}
		})
		if err != nil {
			t.Fatal(err)
		}
		do := func(ctx context.Context) (Result, error) {
			return c.do(ctx, &Task{Name: "n", CacheKey: "k"})
		}
		// All but the tenth leave, the one that began it first of all.
		var wg sync.WaitGroup
		for i := range 10 {
			wg.Go(func() {
				ctx, cancel := context.WithTimeout(context.Background(), time.Duration(i+1)*90*time.Millisecond)
				defer cancel()
				if i == 9 {
					ctx = context.Background()
				}
				r, err := do(ctx)
				switch {
				case i < 9 && (!errors.Is(err, ErrTimeout) || !errors.Is(err, context.DeadlineExceeded)):
					t.Errorf("%d: %v", i, err)
				case i == 9 && (err != nil || string(r.Body) != "body" || !r.Cached || r.PID != 7 || r.Wait != time.Second || r.Run != 0):
					t.Errorf("%d: %+v, %v", i, r, err)
				}
			})
			synctest.Wait()
		}
		wg.Wait()
		if done.Load() != 1 || cancelled.Load() != 0 {
			t.Errorf("done %d times, cancelled %d", done.Load(), cancelled.Load())
		}
		// Who stays gets a body of its own, and the first is told the truth.
		bodies := make([]Result, 3)
		for i := range bodies {
			wg.Go(func() { bodies[i], _ = do(context.Background()) })
			synctest.Wait()
		}
		wg.Wait()
		bodies[0].Body[0], bodies[1].Body[0] = 'x', 'y'
		if bodies[0].Cached || !bodies[1].Cached || string(bodies[2].Body) != "body" || bodies[0].Run != time.Second {
			t.Errorf("%+v", bodies)
		}
		// All leave: it is given up as the last one left, and the next is another.
		for _, why := range []error{context.Canceled, context.DeadlineExceeded} {
			done.Store(0)
			cancelled.Store(0)
			ctx, cancel := context.WithTimeout(context.Background(), 100*time.Millisecond)
			for range 5 {
				wg.Go(func() { _, _ = do(ctx) })
			}
			synctest.Wait()
			c.mu.Lock()
			f := c.flights[cacheKey{"n", "k"}]
			c.mu.Unlock()
			if errors.Is(why, context.Canceled) {
				cancel()
			}
			wg.Wait()
			cancel()
			if r, err := do(context.Background()); err != nil || r.Cached {
				t.Errorf("after all have left: %+v, %v", r, err)
			}
			<-f.done
			if done.Load() != 2 || cancelled.Load() != 1 || !errors.Is(f.err, why) {
				t.Errorf("done %d times, cancelled %d, with %v", done.Load(), cancelled.Load(), f.err)
			}
		}
		c.close()
		c.wait()
		if len(c.flights) != 0 || c.stats().Entries != 0 {
			t.Errorf("left: %d flights, %+v", len(c.flights), c.stats())
		}
	})
}

// Under a storm of callers that come and leave, each gets the result of its key
// or its own context's error, and one key is never done twice at a time.
func TestCacheStorm(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		const keys = 5
		var under [keys]atomic.Int32
		var done atomic.Int32
		c, err := newCache(CacheOptions{TTL: 200 * time.Millisecond, MaxEntries: 3}, func(ctx context.Context, task *Task) (Result, error) {
			i := task.Body[0]
			done.Add(1)
			if n := under[i].Add(1); n > 1 && ctx.Err() == nil {
				t.Errorf("key %d is done %d times at once", i, n)
			}
			defer under[i].Add(-1)
			select {
			case <-time.After(time.Duration(10+rand.IntN(100)) * time.Millisecond):
			case <-ctx.Done():
				return Result{}, gaveUp(ctx.Err())
			}
			if rand.IntN(5) == 0 {
				return Result{}, &TaskError{Message: "no"}
			}
			return Result{Body: []byte(task.CacheKey)}, nil
		})
		if err != nil {
			t.Fatal(err)
		}
		const calls = 3000
		var wg sync.WaitGroup
		for range calls {
			time.Sleep(time.Duration(rand.IntN(2000)) * time.Microsecond)
			i := rand.IntN(keys)
			wg.Go(func() {
				ctx, cancel := context.WithTimeout(context.Background(), time.Duration(rand.IntN(300))*time.Millisecond)
				defer cancel()
				key := fmt.Sprint("key", i)
				r, err := c.do(ctx, &Task{CacheKey: key, Body: []byte{byte(i)}})
				var te *TaskError
				switch {
				case err == nil && string(r.Body) == key:
				case errors.As(err, &te):
				case errors.Is(err, ErrTimeout) && ctx.Err() != nil:
				default:
					t.Errorf("%s: %q, %v", key, r.Body, err)
				}
			})
		}
		wg.Wait()
		c.close()
		c.wait()
		s := c.stats()
		if s.Hits+s.Shared+s.Misses != calls || s.Misses != uint64(done.Load()) || s.Shared == 0 || s.Hits == 0 || len(c.flights) > 0 || s.Entries > 0 {
			t.Errorf("%+v, done %d times, %d flights", s, done.Load(), len(c.flights))
		}
	})
}

// Files that come with a result are one caller's, and nobody's where all left.
func TestCacheFiles(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		var mu sync.Mutex
		var given []*os.File
		c, err := newCache(CacheOptions{}, func(context.Context, *Task) (Result, error) {
			f, err := os.Open(os.DevNull)
			mu.Lock()
			given = append(given, f)
			mu.Unlock()
			time.Sleep(time.Second)
			return Result{Files: []*os.File{f}}, err
		})
		if err != nil {
			t.Fatal(err)
		}
		var wg sync.WaitGroup
		var got [3]Result
		for i := range got {
			wg.Go(func() { got[i], _ = c.do(context.Background(), &Task{CacheKey: "k"}) })
			synctest.Wait()
		}
		time.Sleep(time.Second)
		synctest.Wait() // one has its result, the others' tasks are begun, one after the other
		wg.Wait()
		if len(given) != 3 || len(got[0].Files)+len(got[1].Files)+len(got[2].Files) != 3 ||
			got[0].Files[0] == got[1].Files[0] || got[1].Files[0] == got[2].Files[0] || c.stats().Entries != 0 {
			t.Errorf("%d files for %+v", len(given), got)
		}
		for _, r := range got {
			if err := r.Files[0].Close(); err != nil {
				t.Error(err)
			}
		}
		short, cancel := context.WithTimeout(context.Background(), time.Millisecond)
		defer cancel()
		if _, err := c.do(short, &Task{CacheKey: "k"}); !errors.Is(err, ErrTimeout) {
			t.Error(err)
		}
		c.close()
		c.wait()
		if err := given[3].Close(); !errors.Is(err, os.ErrClosed) {
			t.Errorf("what nobody waits for was left open: %v", err)
		}
	})
}

// What would be wrong to share is not.
func TestCachePasses(t *testing.T) {
	done := 0
	c, err := newCache(CacheOptions{}, func(context.Context, *Task) (Result, error) {
		done++
		return Result{}, nil
	})
	if err != nil {
		t.Fatal(err)
	}
	tasks := []Task{{}, {CacheKey: "k", OnChunk: func([]byte) {}}, {CacheKey: "k", OnProgress: func([]byte) {}}, {CacheKey: "k", Files: []*os.File{nil}}}
	for range 2 {
		for _, task := range tasks {
			if r, err := c.do(context.Background(), &task); err != nil || r.Cached {
				t.Errorf("%+v, %v", r, err)
			}
		}
	}
	if s := c.stats(); done != 2*len(tasks) || *s != (CacheStats{}) {
		t.Errorf("done %d times, %+v", done, s)
	}
	for _, o := range []CacheOptions{{MaxBytes: -1}, {MaxEntries: -1}} {
		if _, err := newCache(o, nil); err == nil {
			t.Errorf("%+v was taken", o)
		}
	}
}

func BenchmarkCacheHit(b *testing.B) {
	c, err := newCache(CacheOptions{}, func(context.Context, *Task) (Result, error) { return Result{Body: make([]byte, 64)}, nil })
	if err != nil {
		b.Fatal(err)
	}
	defer c.close()
	b.ReportAllocs()
	task := &Task{CacheKey: "key"}
	for b.Loop() {
		_, _ = c.do(context.Background(), task)
	}
}

func BenchmarkCacheMiss(b *testing.B) {
	c, err := newCache(CacheOptions{TTL: -1}, func(context.Context, *Task) (Result, error) { return Result{Body: make([]byte, 64)}, nil })
	if err != nil {
		b.Fatal(err)
	}
	b.ReportAllocs()
	task := &Task{CacheKey: "key"}
	for b.Loop() {
		_, _ = c.do(context.Background(), task)
	}
}
