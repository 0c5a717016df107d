package supervise

import (
	"context"
	"fmt"
	"runtime"
	"testing"
	"time"
)

// bareRun is a run that costs nothing itself but its channel.
type bareRun struct {
	done chan struct{}
}

func (r *bareRun) Ready() <-chan struct{} { return nil }
func (r *bareRun) Done() <-chan struct{}  { return r.done }
func (r *bareRun) Exit() Exit             { return Exit{Code: -1, Signal: "SIGKILL"} }
func (r *bareRun) Stop(string)            { close(r.done) }
func (r *bareRun) Kill(string)            {}

// BenchmarkKillToStart measures from the end of a run to the call of
// Child.Start for the next.
func BenchmarkKillToStart(b *testing.B) {
	s := New(Options{OnChange: func(Status) {}})
	started := make(chan *bareRun)
	child := ChildFunc(func(context.Context, Attempt) (Run, error) {
		r := &bareRun{done: make(chan struct{})}
		started <- r
		return r, nil
	})
	for i := range 1000 {
		quiet := ChildFunc(func(context.Context, Attempt) (Run, error) { return &bareRun{done: make(chan struct{})}, nil })
		must(b, s.Add(Spec{Name: fmt.Sprint(i), Child: quiet}, true))
	}
	must(b, s.Add(Spec{Name: "a", Child: child, MaxRestarts: -1, MinUptime: -1}, true))
	r := <-started
	b.ReportAllocs()
	for b.Loop() {
		close(r.done)
		r = <-started
	}
	must(b, s.Shutdown(context.Background()))
}

// BenchmarkMemory measures what a child costs that runs, its watcher included.
func BenchmarkMemory(b *testing.B) {
	for b.Loop() {
		heap, stack, _ := memory(b)
		b.ReportMetric(heap, "heapB/child")
		b.ReportMetric(stack, "stackB/child")
	}
}

// memory returns bytes per child.
func memory(tb testing.TB) (heap, stack float64, goroutines int) {
	const n = 1000
	runs := make([]*bareRun, n)
	children := make([]Child, n)
	names := make([]string, n)
	for i := range n {
		runs[i] = &bareRun{done: make(chan struct{})}
		children[i] = ChildFunc(func(context.Context, Attempt) (Run, error) { return runs[i], nil })
		names[i] = fmt.Sprint("child-", i)
	}
	used := func() (heap, stack float64) {
		for range 3 { // each may halve a stack
			runtime.GC()
		}
		var m runtime.MemStats
		runtime.ReadMemStats(&m)
		return float64(m.HeapAlloc), float64(m.StackInuse)
	}
	idle := runtime.NumGoroutine()
	heap0, stack0 := used()
	s := New(Options{OnChange: func(Status) {}})
	for i := range n {
		must(tb, s.Add(Spec{Name: names[i], Group: "g", Child: children[i]}, true))
	}
	ctx, cancel := context.WithTimeout(context.Background(), time.Minute)
	defer cancel()
	if _, err := s.Wait(ctx, Up); err != nil {
		tb.Fatal(err)
	}
	for runtime.NumGoroutine() > idle+n { // the last starters and reporters
		runtime.Gosched()
	}
	heap, stack = used()
	heap, stack = (heap-heap0)/n, (stack-stack0)/n
	goroutines = runtime.NumGoroutine() - idle
	must(tb, s.Shutdown(ctx))
	return heap, stack, goroutines
}

// The size of stacks is the runtime's choice (it depends on what ran before),
// so the test bounds what is ours: the heap, and one goroutine a child.
func TestMemoryPerChild(t *testing.T) {
	heap, stack, g := memory(t)
	t.Logf("%.0f bytes of heap, %.0f of stack a child; %d goroutines for 1,000", heap, stack, g)
	if g > 1000 {
		t.Errorf("%d goroutines for 1,000 children", g)
	}
	if heap > 3<<10 {
		t.Errorf("%.0f bytes of heap per child", heap)
	}
}
