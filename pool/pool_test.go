package pool

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"math/rand/v2"
	"path/filepath"
	"strconv"
	"strings"
	"sync"
	"sync/atomic"
	"syscall"
	"testing"
	"time"

	"github.com/remuda-dev/remuda/ipc"
)

func limit(t testing.TB) context.Context {
	ctx, cancel := context.WithTimeout(context.Background(), 60*time.Second)
	t.Cleanup(cancel)
	return ctx
}

func TestDo(t *testing.T) {
	p := newPool(t, Options{Size: 2, Concurrency: 8})
	ctx := limit(t)
	var wg sync.WaitGroup
	for i := range 64 {
		wg.Go(func() {
			for k := range 50 {
				want := fmt.Sprint(i, k)
				r, err := p.Do(ctx, Task{Body: []byte(want)})
				if err != nil || string(r.Body) != want {
					t.Errorf("Do(%q) = %q, %v", want, r.Body, err)
					return
				}
			}
		})
	}
	wg.Wait()
	s := p.Stats()
	if s.Done != 3200 || s.Accepted != 3200 || s.Running != 0 || s.Queued != 0 || s.Died != 0 {
		t.Errorf("Stats = %+v", s)
	}
	for _, n := range []int{0, 1, 1 << 14, 1 << 16, 3 << 20} {
		body := bytes.Repeat([]byte{'x'}, n)
		if r, err := p.Do(ctx, Task{Body: body}); err != nil || !bytes.Equal(r.Body, body) {
			t.Errorf("%d bytes: got %d, %v", n, len(r.Body), err)
		}
	}
}

func TestErrors(t *testing.T) {
	p := newPool(t, Options{Size: 1, MaxMessage: 1 << 20})
	ctx := limit(t)
	var te *TaskError
	if _, err := p.Do(ctx, Task{Name: "fail", Body: []byte("why")}); !errors.As(err, &te) || te.Code != "no" || te.Message != "why" {
		t.Errorf("fail: %v", err)
	}
	if _, err := p.Do(ctx, Task{Name: "panic"}); !errors.As(err, &te) || te.Code != ipc.CodePanic || te.Message != "oops" {
		t.Errorf("panic: %v", err)
	}
	if _, err := p.Do(ctx, Task{Priority: 10}); err == nil {
		t.Error("priority 10 was taken")
	}
	if _, err := p.Do(ctx, Task{Name: strings.Repeat("x", 2000)}); !errors.Is(err, ipc.ErrTooLarge) {
		t.Errorf("long name: %v", err)
	}
	gone, cancel := context.WithCancel(ctx)
	cancel()
	if _, err := p.Do(gone, Task{}); !errors.Is(err, context.Canceled) {
		t.Errorf("ended context: %v", err)
	}
	if s := p.Stats(); s.Died != 0 {
		t.Errorf("a worker died: %+v", s)
	}
	for _, bad := range []Options{
		{}, {Command: []string{"/nonexistent/x"}}, {Command: []string{"true"}, Protocol: "x"}, {Command: []string{"true"}, Size: -1},
		{Command: []string{"true"}, Protocol: JSONLines, Heartbeat: 1}, {Command: []string{"true"}, Protocol: Node, Env: []string{"NODE_CHANNEL_SERIALIZATION_MODE=advanced"}}, {Command: []string{"true"}, Name: "a b"}, {Command: []string{"true"}, Full: 7},
		{Command: []string{"true"}, Size: 2, Min: 1}, {Command: []string{"true"}, Min: 3, Max: 2}, {Command: []string{"true"}, Balance: 9},
		{Command: []string{"true"}, Spares: -1}, {Command: []string{"true"}, MaxMemory: 1, Protocol: Exec}, {Command: []string{"true"}, Ageing: -1},
	} {
		if p, err := New(bad); err == nil {
			t.Errorf("New(%+v) succeeded", bad)
			_ = p.Close(ctx)
		}
	}
}

// A worker that dies in whatever way costs its task and is replaced.
func TestWorkerDies(t *testing.T) {
	p := newPool(t, Options{Size: 1, Grace: 100 * time.Millisecond})
	ctx := limit(t)
	for _, c := range []struct{ name, want string }{
		{"exit", "exit code 7"}, {"kill", "SIGKILL"}, {"garbage", "protocol violation"}, {"half", "exit code 0"}, {"close", "worker died"},
	} {
		_, err := p.Do(ctx, Task{Name: c.name})
		var we *WorkerError
		if !errors.Is(err, ErrWorkerDied) || !errors.As(err, &we) || we.PID == 0 || !strings.Contains(err.Error(), c.want) {
			t.Errorf("%s: %v", c.name, err)
		}
		if r, err := p.Do(ctx, Task{Body: []byte("alive")}); err != nil || string(r.Body) != "alive" {
			t.Errorf("after %s: %q, %v", c.name, r.Body, err)
		}
	}
	if s := p.Stats(); s.Died != 5 || s.Lost != 5 || s.Done != 5 {
		t.Errorf("Stats = %+v", s)
	}
}

func TestIdempotentIsRetried(t *testing.T) {
	p := newPool(t, Options{Size: 2})
	ctx := limit(t)
	r, err := p.Do(ctx, Task{Name: "once", Body: []byte(filepath.Join(t.TempDir(), "f")), Idempotent: true})
	if err != nil || string(r.Body) != "again" || r.Attempts != 2 {
		t.Errorf("Do = %q after %d attempts, %v", r.Body, r.Attempts, err)
	}
	r, err = p.Do(ctx, Task{Name: "exit", Idempotent: true})
	if !errors.Is(err, ErrWorkerDied) || r.Attempts != 3 {
		t.Errorf("poison: %v after %d attempts", err, r.Attempts)
	}
}

func TestTimeout(t *testing.T) {
	p := newPool(t, Options{Size: 1, Concurrency: 2, Grace: time.Minute})
	ctx := limit(t)
	r, err := p.Do(ctx, Task{Name: "pid"})
	if err != nil {
		t.Fatal(err)
	}
	first := string(r.Body)
	// A handler that listens gives the task up, and the worker lives on.
	if _, err := p.Do(ctx, Task{Name: "wait", Timeout: 20 * time.Millisecond}); err == nil {
		t.Error("wait: no error")
	}
	short, cancel := context.WithTimeout(ctx, 20*time.Millisecond)
	defer cancel()
	if _, err := p.Do(short, Task{Name: "wait"}); !errors.Is(err, ErrTimeout) || !errors.Is(err, context.DeadlineExceeded) {
		t.Errorf("deadline: %v", err)
	}
	if r, err := p.Do(ctx, Task{Name: "pid"}); err != nil || string(r.Body) != first {
		t.Errorf("the worker was replaced: %q, %v", r.Body, err)
	}
	// One that does not, and one that is stopped, are killed.
	p = newPool(t, Options{Size: 1, Concurrency: 2, Grace: 50 * time.Millisecond})
	for _, name := range []string{"hang", "stop"} {
		if _, err := p.Do(ctx, Task{Name: name, Timeout: 20 * time.Millisecond}); !errors.Is(err, ErrTimeout) {
			t.Errorf("%s: %v", name, err)
		}
		for {
			r, err := p.Do(ctx, Task{Name: "pid"})
			if err == nil && string(r.Body) != first {
				first = string(r.Body)
				break
			}
			if err != nil && !errors.Is(err, ErrWorkerDied) {
				t.Fatal(err)
			}
		}
	}
}

func TestHeartbeat(t *testing.T) {
	p := newPool(t, Options{Size: 1, Heartbeat: 100 * time.Millisecond})
	_, err := p.Do(limit(t), Task{Name: "stop"})
	if !errors.Is(err, ErrWorkerDied) || !strings.Contains(err.Error(), "sign of life") {
		t.Errorf("Do = %v", err)
	}
}

func TestStream(t *testing.T) {
	p := newPool(t, Options{Size: 1})
	var got strings.Builder
	r, err := p.Do(limit(t), Task{
		Name:       "stream",
		OnProgress: func(b []byte) { got.WriteString("p" + string(b)) },
		OnChunk:    func(b []byte) { got.WriteString("c" + string(b)) },
	})
	if err != nil || string(r.Body) != "end" || got.String() != "p0cp1cxp2cxx" {
		t.Errorf("%q, %q, %v", r.Body, got.String(), err)
	}
}

func TestReject(t *testing.T) {
	p := newPool(t, Options{Size: 1, Queue: 1, Full: Reject})
	ctx := limit(t)
	if _, err := p.Do(ctx, Task{}); err != nil {
		t.Fatal(err)
	}
	hold, cancel := context.WithCancel(ctx)
	defer cancel()
	var wg sync.WaitGroup
	for range 2 {
		wg.Go(func() { _, _ = p.Do(hold, Task{Name: "wait"}) })
	}
	for s := p.Stats(); s.Running != 1 || s.Queued != 1; s = p.Stats() {
		time.Sleep(time.Millisecond)
	}
	if _, err := p.Do(ctx, Task{}); !errors.Is(err, ErrQueueFull) {
		t.Errorf("Do = %v", err)
	}
	cancel()
	wg.Wait()
	if s := p.Stats(); s.Rejected != 1 || s.Cancelled != 2 {
		t.Errorf("Stats = %+v", s)
	}
}

func TestRecycle(t *testing.T) {
	p := newPool(t, Options{Size: 1, MaxTasks: 3})
	ctx := limit(t)
	pids := map[string]int{}
	for range 9 {
		r, err := p.Do(ctx, Task{Name: "pid"})
		if err != nil {
			t.Fatal(err)
		}
		pids[string(r.Body)]++
		if strconv.Itoa(r.PID) != string(r.Body) {
			t.Errorf("Result.PID = %d, worker says %s", r.PID, r.Body)
		}
	}
	if len(pids) != 3 {
		t.Errorf("tasks by worker: %v", pids)
	}
	if s := p.Stats(); s.Died != 0 {
		t.Errorf("Stats = %+v", s)
	}
}

// A worker that keeps too much memory is replaced after its task, one that
// takes far too much is killed in it.
func TestMaxMemory(t *testing.T) {
	p := newPool(t, Options{Size: 1, MaxMemory: 250 << 20})
	ctx := limit(t)
	r, err := p.Do(ctx, Task{Name: "balloon", Body: []byte("260")})
	if err != nil {
		t.Fatal(err)
	}
	for s := p.Stats(); s.Recycled != 1; s = p.Stats() {
		time.Sleep(10 * time.Millisecond)
		if ctx.Err() != nil {
			t.Fatalf("not recycled: %+v", s)
		}
	}
	if next, err := p.Do(ctx, Task{Name: "pid"}); err != nil || string(next.Body) == string(r.Body) {
		t.Errorf("Do = %s, %v after %s", next.Body, err, r.Body)
	}
	var we *WorkerError
	if _, err := p.Do(ctx, Task{Name: "balloon", Body: []byte("450")}); !errors.As(err, &we) || !strings.Contains(we.Cause, "250 MB are allowed") {
		t.Errorf("Do = %v", err)
	}
}

// One task at a time, as its caller reads the answer: workers are killed,
// stopped and slow, callers leave, and each task ends once.
func TestOneAtATime(t *testing.T) {
	p := newPool(t, Options{Size: 1, Grace: 50 * time.Millisecond, PoisonAfter: -1})
	ctx := limit(t)
	var pid atomic.Int64
	stop := make(chan struct{})
	var wg sync.WaitGroup
	wg.Go(func() {
		for i := range 10 {
			select {
			case <-stop:
				return
			case <-time.After(20 * time.Millisecond):
			}
			if n := int(pid.Load()); n > 0 {
				_ = syscall.Kill(n, []syscall.Signal{syscall.SIGKILL, syscall.SIGSTOP}[i%2]) // gone: just as well
			}
		}
	})
	died, left := 0, 0
	for i := range 5000 {
		do, cancel := context.WithTimeout(ctx, 5*time.Second)
		name, patience := "", time.Duration(0)
		switch i % 100 {
		case 50:
			name, patience = "wait", time.Millisecond
		case 60:
			patience = time.Duration(rand.IntN(100)) * time.Microsecond
		}
		if patience > 0 {
			time.AfterFunc(patience, cancel)
		}
		body := strconv.Itoa(i)
		// A worker that was stopped does not give up in time.
		r, err := p.Do(do, Task{Name: name, Body: []byte(body), Timeout: 200 * time.Millisecond})
		cancel()
		switch {
		case err == nil && (string(r.Body) != body || name == "wait"):
			t.Fatalf("task %d: %q", i, r.Body)
		case err == nil:
			pid.Store(int64(r.PID))
		case errors.Is(err, ErrWorkerDied):
			died++
		case errors.Is(err, ErrTimeout) || errors.Is(err, context.Canceled):
			left++
		default:
			t.Fatalf("task %d: %v", i, err)
		}
	}
	close(stop)
	wg.Wait()
	if s := p.Stats(); s.Done != uint64(5000-died-left) || died+left < 50 {
		t.Errorf("%d died, %d left, %+v", died, left, s)
	}
}

func TestBroadcastToProcesses(t *testing.T) {
	p := newPool(t, Options{Size: 3})
	ctx := limit(t)
	for s := p.Stats(); s.Up != 3; s = p.Stats() {
		time.Sleep(time.Millisecond)
	}
	all, err := p.Broadcast(ctx, Task{Name: "pid"})
	pids := map[string]bool{}
	for _, r := range all {
		if r.Err != nil || strconv.Itoa(r.PID) != string(r.Body) {
			t.Errorf("%+v", r)
		}
		pids[string(r.Body)] = true
	}
	if err != nil || len(pids) != 3 {
		t.Errorf("%v, %v", pids, err)
	}
	all, err = p.Broadcast(ctx, Task{Name: "exit"})
	for _, r := range all {
		if !errors.Is(r.Err, ErrWorkerDied) {
			t.Errorf("%+v", r)
		}
	}
	if err != nil || len(all) == 0 {
		t.Errorf("%v, %v", all, err)
	}
}

// Where no worker can be started tasks fail and do not wait for ever.
func TestNoWorkers(t *testing.T) {
	p := newPool(t, Options{Command: []string{"/bin/false"}, Size: 2})
	_, err := p.Do(limit(t), Task{})
	var we *WorkerError
	if !errors.Is(err, ErrNoWorkers) || !errors.As(err, &we) || we.Exit.Code != 1 {
		t.Errorf("Do = %v", err)
	}
}

func TestClose(t *testing.T) {
	p := newPool(t, Options{Size: 1, Grace: 50 * time.Millisecond})
	ctx := limit(t)
	if _, err := p.Do(ctx, Task{}); err != nil {
		t.Fatal(err)
	}
	errs := make(chan error, 2)
	for range 2 {
		go func() { _, err := p.Do(ctx, Task{Name: "hang"}); errs <- err }()
	}
	for s := p.Stats(); s.Running != 1 || s.Queued != 1; s = p.Stats() {
		time.Sleep(time.Millisecond)
	}
	short, cancel := context.WithTimeout(ctx, 50*time.Millisecond)
	defer cancel()
	if err := p.Drain(short); !errors.Is(err, context.DeadlineExceeded) {
		t.Errorf("Drain = %v", err)
	}
	short, cancel = context.WithTimeout(ctx, 50*time.Millisecond)
	defer cancel()
	if err := p.close(short); !errors.Is(err, context.DeadlineExceeded) {
		t.Errorf("Close = %v", err)
	}
	for range 2 {
		if err := <-errs; !errors.Is(err, ErrClosed) {
			t.Errorf("Do = %v", err)
		}
	}
	if _, err := p.Do(ctx, Task{}); !errors.Is(err, ErrClosed) {
		t.Errorf("Do after Close = %v", err)
	}
}

func TestJSONLines(t *testing.T) {
	p := newPool(t, Options{Command: []string{"/bin/cat"}, Protocol: JSONLines, Size: 2, Concurrency: 4, Grace: 50 * time.Millisecond})
	ctx := limit(t)
	var wg sync.WaitGroup
	for i := range 50 {
		wg.Go(func() {
			want := fmt.Sprintf(`{"i":%d}`, i)
			if r, err := p.Do(ctx, Task{Body: []byte(want)}); err != nil || string(r.Body) != want {
				t.Errorf("Do(%s) = %s, %v", want, r.Body, err)
			}
		})
	}
	wg.Wait()
	var te *TaskError
	if _, err := p.Do(ctx, Task{Body: []byte(`{"error":"broken"}`)}); !errors.As(err, &te) || te.Message != "broken" {
		t.Errorf("error: %v", err)
	}
	if _, err := p.Do(ctx, Task{Body: []byte(`{`)}); !errors.Is(err, ipc.ErrNotJSON) {
		t.Errorf("no JSON: %v", err)
	}
	if r, err := p.Do(ctx, Task{Body: []byte("[1,\n2]")}); err != nil || string(r.Body) != "[1,2]" {
		t.Errorf("two lines: %s, %v", r.Body, err)
	}
	p = newPool(t, Options{Command: []string{"/bin/sh", "-c", "read x; echo nonsense; sleep 100"}, Protocol: JSONLines, Size: 1})
	if _, err := p.Do(ctx, Task{}); !errors.Is(err, ErrWorkerDied) || !strings.Contains(err.Error(), "not a JSON value") {
		t.Errorf("nonsense: %v", err)
	}
	p = newPool(t, Options{Command: []string{"/bin/sh", "-c", "trap '' TERM; while :; do sleep 1; done"}, Protocol: JSONLines, Size: 1, Grace: 20 * time.Millisecond})
	if _, err := p.Do(ctx, Task{Timeout: 20 * time.Millisecond}); !errors.Is(err, ErrTimeout) {
		t.Errorf("deaf: %v", err)
	}
}

func TestExec(t *testing.T) {
	p := newPool(t, Options{Command: []string{"/bin/sh", "-c", `read x; case $x in fail) echo why >&2; exit 3;; kill) kill -9 $$;; slow) sleep 100;; *) echo "got $x";; esac`}, Protocol: Exec, Size: 2, Grace: 50 * time.Millisecond, Stderr: nil})
	ctx := limit(t)
	if r, err := p.Do(ctx, Task{Body: []byte("it\n")}); err != nil || string(r.Body) != "got it\n" {
		t.Errorf("Do = %q, %v", r.Body, err)
	}
	var te *TaskError
	if _, err := p.Do(ctx, Task{Body: []byte("fail\n")}); !errors.As(err, &te) || te.Message != "exit code 3: why" {
		t.Errorf("fail: %v", err)
	}
	if r, err := p.Do(ctx, Task{Body: []byte("kill\n"), Idempotent: true}); !errors.Is(err, ErrWorkerDied) || r.Attempts != 3 {
		t.Errorf("kill: %v after %d attempts", err, r.Attempts)
	}
	if _, err := p.Do(ctx, Task{Body: []byte("slow\n"), Timeout: 20 * time.Millisecond}); !errors.Is(err, ErrTimeout) {
		t.Errorf("slow: %v", err)
	}
	if r, err := p.Do(ctx, Task{Body: []byte("x\n")}); err != nil || string(r.Body) != "got x\n" {
		t.Errorf("Do = %q, %v", r.Body, err)
	}
}
