package supervise_test

import (
	"context"
	"fmt"
	"time"

	"github.com/remuda-dev/remuda/supervise"
)

// job is a child made of a function: it runs until the function returns.
func job(f func(ctx context.Context) error) supervise.Child {
	return supervise.ChildFunc(func(context.Context, supervise.Attempt) (supervise.Run, error) {
		ctx, cancel := context.WithCancel(context.Background())
		r := &jobRun{cancel: cancel, done: make(chan struct{})}
		go func() {
			defer close(r.done)
			if err := f(ctx); err != nil {
				r.exit = supervise.Exit{Code: 1, Err: err.Error()}
			}
		}()
		return r, nil
	})
}

type jobRun struct {
	cancel context.CancelFunc
	done   chan struct{}
	exit   supervise.Exit
}

func (r *jobRun) Ready() <-chan struct{} { return nil }
func (r *jobRun) Done() <-chan struct{}  { return r.done }
func (r *jobRun) Exit() supervise.Exit   { return r.exit }
func (r *jobRun) Stop(string)            { r.cancel() }
func (r *jobRun) Kill(string)            { r.cancel() }

// A child that fails twice and then runs.
func Example() {
	ctx := context.Background()
	tries := 0
	flaky := job(func(ctx context.Context) error {
		if tries++; tries < 3 {
			return fmt.Errorf("try %d failed", tries)
		}
		<-ctx.Done()
		return nil
	})

	s := supervise.New(supervise.Options{})
	_ = s.Add(supervise.Spec{Name: "flaky", Child: flaky, Delay: time.Millisecond}, true)

	third := func(st supervise.Status) bool { return st.State == supervise.StateOnline && st.Restarts == 2 }
	got, _ := s.Wait(ctx, third, "flaky")
	fmt.Println(got[0].State, "after", got[0].Restarts, "restarts; last:", got[0].LastExit.Err)

	_ = s.Shutdown(ctx)
	st, _ := s.Status("flaky")
	fmt.Println(st.State)
	// Output:
	// online after 2 restarts; last: try 2 failed
	// stopped
}

// What depends on a child waits for it.
func ExampleDep() {
	ctx := context.Background()
	say := func(what string) supervise.Child {
		return job(func(context.Context) error { fmt.Println(what); return nil })
	}
	s := supervise.New(supervise.Options{})
	_ = s.Add(supervise.Spec{
		Name: "web", Child: say("serving"), Restart: supervise.OnFailure,
		DependsOn: []supervise.Dep{{On: "migrate", Condition: supervise.DepCompleted}},
	}, true)
	st, _ := s.Status("web")
	fmt.Println(st.State+":", st.Reason)
	_ = s.Add(supervise.Spec{Name: "migrate", Child: say("migrating"), Restart: supervise.OnFailure}, true)
	_, _ = s.Wait(ctx, supervise.Ended, "web")
	_ = s.Shutdown(ctx)
	// Output:
	// waiting: waits for migrate, which is not known
	// migrating
	// serving
}

// A supervisor is a child of another.
func ExampleSupervisor_AsChild() {
	ctx := context.Background()
	idle := job(func(ctx context.Context) error { <-ctx.Done(); return nil })

	workers := supervise.New(supervise.Options{Nested: true, Strategy: supervise.OneForAll})
	_ = workers.Add(supervise.Spec{Name: "reader", Child: idle}, true)
	_ = workers.Add(supervise.Spec{Name: "writer", Child: idle}, true)

	root := supervise.New(supervise.Options{})
	_ = root.Add(supervise.Spec{Name: "workers", Child: workers.AsChild()}, true)
	_, _ = root.Wait(ctx, supervise.Up, "workers")
	for _, st := range workers.All() {
		fmt.Println(st.Name, st.State)
	}
	_ = root.Shutdown(ctx)
	// Output:
	// reader online
	// writer online
}
