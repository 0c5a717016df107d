package pool_test

import (
	"context"
	"errors"
	"fmt"
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
