// Package seed_test runs the Node programs of Remuda's seed document, unchanged,
// with Remuda in the place of their Node parent. testdata/worker.js is the
// document's own text; the other workers are those that the parents in it imply.
package seed_test

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"sync"
	"testing"
	"time"

	"go.uber.org/goleak"

	"github.com/remuda-dev/remuda/ipc"
	"github.com/remuda-dev/remuda/pool"
)

func TestMain(m *testing.M) { goleak.VerifyTestMain(m) }

func newPool(t *testing.T, worker string, o pool.Options) (*pool.Pool, context.Context) {
	t.Helper()
	ctx, cancel := context.WithTimeout(context.Background(), 2*time.Minute)
	t.Cleanup(cancel)
	o.Command = []string{"node", filepath.Join("testdata", worker)}
	o.Protocol = pool.Node
	o.Stderr = os.Stderr
	p, err := pool.New(o)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if err := p.Close(ctx); err != nil {
			t.Error("Close:", err)
		}
	})
	return p, ctx
}

// class ProcessPool: tasks are queued, given to free workers, and a worker that
// ends is replaced.
func TestProcessPool(t *testing.T) {
	p, ctx := newPool(t, "pool-worker.js", pool.Options{Size: 2})
	for p.Stats().Up < 2 && ctx.Err() == nil {
		time.Sleep(time.Millisecond)
	}
	type answer struct{ Square, PID int }
	var mu sync.Mutex
	pids := map[int]int{}
	var wg sync.WaitGroup
	for n := range 100 {
		wg.Go(func() {
			r, err := p.Do(ctx, pool.Task{Body: fmt.Appendf(nil, `{"n":%d}`, n)})
			var a answer
			if err != nil || json.Unmarshal(r.Body, &a) != nil || a.Square != n*n {
				t.Errorf("the square of %d: %s, %v", n, r.Body, err)
			}
			mu.Lock()
			defer mu.Unlock()
			pids[a.PID]++
		})
	}
	wg.Wait()
	if len(pids) != 2 {
		t.Errorf("tasks by worker: %v, want two workers", pids)
	}
	// handleWorkerExit: unlike the seed's, the task that was lost says so.
	if _, err := p.Do(ctx, pool.Task{Body: []byte(`{"exit":3}`)}); !errors.Is(err, pool.ErrWorkerDied) {
		t.Errorf("a task whose worker ends: %v", err)
	}
	for n := range 10 {
		if r, err := p.Do(ctx, pool.Task{Body: fmt.Appendf(nil, `{"n":%d}`, n)}); err != nil {
			t.Errorf("after it: %s, %v", r.Body, err)
		}
	}
}

// Handle passing: the parent accepts, the worker answers the client.
func TestHandlePassing(t *testing.T) {
	parent, child, err := ipc.Pair()
	if err != nil {
		t.Fatal(err)
	}
	worker, err := ipc.NewNode(parent, ipc.Options{})
	if err != nil {
		t.Fatal(err)
	}
	cmd := exec.Command("node", "testdata/worker.js")
	cmd.Env = append(ipc.Environ(os.Environ()), ipc.NodeEnv(3)...)
	cmd.ExtraFiles = []*os.File{child}
	cmd.Stderr = os.Stderr
	if err := cmd.Start(); err != nil {
		t.Fatal(err)
	}
	child.Close()
	served := make(chan error, 1)
	go func() { served <- worker.Serve(nil) }()

	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	accepted := make(chan struct{})
	go func() { // net.createServer((socket) => { worker.send('socket', socket) })
		defer close(accepted)
		for {
			c, err := l.Accept()
			if err != nil {
				return
			}
			f, err := c.(*net.TCPConn).File()
			c.Close()
			if err != nil {
				t.Error(err)
				continue
			}
			if err := worker.Send(json.RawMessage(`"socket"`), f); err != nil {
				t.Error(err)
			}
			f.Close()
		}
	}()
	var wg sync.WaitGroup
	for range 20 {
		wg.Go(func() {
			c, err := net.Dial("tcp", l.Addr().String())
			if err != nil {
				t.Error(err)
				return
			}
			defer c.Close()
			_ = c.SetDeadline(time.Now().Add(time.Minute))
			if b, err := io.ReadAll(c); string(b) != "Handled by worker\n" {
				t.Errorf("the client got %q, %v", b, err)
			}
		})
	}
	wg.Wait()
	l.Close()
	<-accepted
	worker.Stop() // worker.disconnect()
	if err := errors.Join(<-served, cmd.Wait()); err != nil {
		t.Error(err)
	}
}

// class ProcessSupervisor: a worker that answers its health checks lives,
// however long its task takes, and one that does not is killed and replaced.
func TestHealthCheck(t *testing.T) {
	const every = 3 * time.Second
	t.Run("answered", func(t *testing.T) {
		t.Parallel()
		p, ctx := newPool(t, "supervised-worker.js", pool.Options{Size: 1, Heartbeat: every})
		if r, err := p.Do(ctx, pool.Task{Body: []byte(`{"sleep":1}`)}); err != nil {
			t.Errorf("a short task: %s, %v", r.Body, err)
		}
		var got struct{ Checks int }
		r, err := p.Do(ctx, pool.Task{Body: []byte(`{"sleep":7000}`)})
		if err != nil || json.Unmarshal(r.Body, &got) != nil || got.Checks < 2 {
			t.Errorf("a long task: %s, %v; want two health checks or more", r.Body, err)
		}
		if s := p.Stats(); s.Died != 0 {
			t.Errorf("a worker that answers was killed: %+v", s)
		}
	})
	t.Run("unanswered", func(t *testing.T) {
		t.Parallel()
		p, ctx := newPool(t, "supervised-worker.js", pool.Options{Size: 1, Heartbeat: every})
		if _, err := p.Do(ctx, pool.Task{Body: []byte(`{"hang":true}`)}); !errors.Is(err, pool.ErrWorkerDied) {
			t.Errorf("a task whose worker hangs: %v", err)
		}
		if r, err := p.Do(ctx, pool.Task{Body: []byte(`{"sleep":1}`)}); err != nil || string(r.Body) != `{"checks":0}` {
			t.Errorf("after it: %s, %v", r.Body, err)
		}
	})
}

// class DistributedTaskQueue: {taskId, task} in, {taskId, result} or
// {taskId, error} out.
func TestTaskQueue(t *testing.T) {
	p, ctx := newPool(t, "task-worker.js", pool.Options{Size: 2, Concurrency: 4})
	var wg sync.WaitGroup
	for i, c := range []struct{ task, want string }{
		{`{"n":0}`, `"result":0`}, {`{"n":10}`, `"result":55}`}, {`{"n":50}`, `"result":12586269025}`}, {`{"n":-1}`, `"error":"not a natural number: -1"`}, {`{}`, `"error":"not a natural number: undefined"`},
	} {
		wg.Go(func() {
			id := fmt.Sprintf("%d-0.5", i)
			r, err := p.Do(ctx, pool.Task{Body: fmt.Appendf(nil, `{"taskId":%q,"task":%s}`, id, c.task)})
			want := fmt.Sprintf(`{"taskId":%q,%s`, id, c.want)
			if err != nil || string(r.Body) != want && string(r.Body) != want+"}" {
				t.Errorf("%s: %s, %v, want %s", c.task, r.Body, err, want)
			}
		})
	}
	wg.Wait()
}
