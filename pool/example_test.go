package pool_test

import (
	"context"
	"errors"
	"fmt"
	"sync"
	"time"

	"github.com/remuda-dev/remuda/pool"
)

// Any filter that answers a line with a line is a worker.
func Example() {
	ctx := context.Background()
	p, err := pool.New(pool.Options{Command: []string{"cat"}, Protocol: pool.JSONLines, Size: 2})
	if err != nil {
		fmt.Println(err)
		return
	}
	defer func() { _ = p.Close(ctx) }()

	r, err := p.Do(ctx, pool.Task{Body: []byte(`{"n": 1}`)})
	fmt.Println(string(r.Body), err)

	// What fails says why.
	_, err = p.Do(ctx, pool.Task{Body: []byte(`{"error": "no such file"}`)})
	var failed *pool.TaskError
	fmt.Println(errors.As(err, &failed), err)
	// Output:
	// {"n": 1} <nil>
	// true no such file
}

// An elastic pool with a bounded queue, where urgent tasks push out others and
// none waits for ever.
func ExampleNew() {
	ctx := context.Background()
	p, err := pool.New(pool.Options{
		Command: []string{"cat"}, Protocol: pool.JSONLines,
		Min: 1, Max: 4, Spares: 1,
		Queue: 100, Full: pool.DropLowest, Ageing: 10 * time.Second,
		Timeout: time.Minute, MaxTasks: 10_000,
	})
	if err != nil {
		fmt.Println(err)
		return
	}
	defer func() { _ = p.Close(ctx) }()

	r, err := p.Do(ctx, pool.Task{Body: []byte(`"urgent"`), Priority: pool.MaxPriority, Idempotent: true})
	fmt.Println(string(r.Body), err)
	// Output: "urgent" <nil>
}

// A process for each task; one that does not end in time is killed alone.
func ExamplePool_Do_timeout() {
	ctx := context.Background()
	p, err := pool.New(pool.Options{
		Command: []string{"sh", "-c", "read x; sleep $x; echo slept $x"}, Protocol: pool.Exec, Size: 1,
		Grace: 100 * time.Millisecond,
	})
	if err != nil {
		fmt.Println(err)
		return
	}
	defer func() { _ = p.Close(ctx) }()

	r, err := p.Do(ctx, pool.Task{Body: []byte("0\n")})
	fmt.Printf("%q %v\n", r.Body, err)
	_, err = p.Do(ctx, pool.Task{Body: []byte("60\n"), Timeout: 200 * time.Millisecond})
	fmt.Println(errors.Is(err, pool.ErrTimeout), err)
	// Output:
	// "slept 0\n" <nil>
	// true pool: the task timed out after 200ms
}

// While too much fails the breaker spares the pool, and the fallback takes the
// tasks' place.
func ExampleBreakerOptions() {
	ctx := context.Background()
	p, err := pool.New(pool.Options{
		Command: []string{"sh", "-c", "kill -9 $$"}, Protocol: pool.Exec, Size: 1,
		Breaker: &pool.BreakerOptions{
			Failures: 2,
			OpenFor:  time.Minute,
			Fallback: func(_ context.Context, _ pool.Task, err error) (pool.Result, error) {
				if errors.Is(err, pool.ErrBreakerOpen) {
					return pool.Result{Body: []byte("yesterday's figures")}, nil
				}
				return pool.Result{}, err
			},
			OnChange: func(c pool.BreakerChange) { fmt.Println("the breaker is", c.To) },
		},
	})
	if err != nil {
		fmt.Println(err)
		return
	}
	defer func() { _ = p.Close(ctx) }()

	for range 3 {
		r, err := p.Do(ctx, pool.Task{})
		fmt.Printf("%q, died: %v\n", r.Body, errors.Is(err, pool.ErrWorkerDied))
	}
	// Output:
	// "", died: true
	// the breaker is open
	// "", died: true
	// "yesterday's figures", died: false
}

// Tasks of one CacheKey are done once, whether they come together or later.
func ExampleCacheOptions() {
	ctx := context.Background()
	p, err := pool.New(pool.Options{
		Command: []string{"sh", "-c", "sleep 0.1; echo $$"}, Protocol: pool.Exec, Size: 4,
		Cache: &pool.CacheOptions{TTL: time.Hour, MaxBytes: 16 << 20},
	})
	if err != nil {
		fmt.Println(err)
		return
	}
	defer func() { _ = p.Close(ctx) }()

	var together sync.WaitGroup
	for range 10 {
		together.Go(func() { _, _ = p.Do(ctx, pool.Task{CacheKey: "report of May"}) })
	}
	together.Wait()
	r, err := p.Do(ctx, pool.Task{CacheKey: "report of May"})
	fmt.Println(r.Cached, err, "done:", p.Stats().Done)
	// Output: true <nil> done: 1
}

// The figures say what holds a pool up.
func ExamplePool_Stats() {
	ctx := context.Background()
	p, err := pool.New(pool.Options{Command: []string{"cat"}, Protocol: pool.JSONLines, Size: 2})
	if err != nil {
		fmt.Println(err)
		return
	}
	defer func() { _ = p.Close(ctx) }()

	s := p.Stats()
	fmt.Println(s.Verdict.Bottleneck, s.Done, s.Wait.P99)
	// Output: idle 0 0s
}
