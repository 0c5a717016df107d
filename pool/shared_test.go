package pool

import (
	"bytes"
	"errors"
	"fmt"
	"math/rand/v2"
	"os"
	"strconv"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"github.com/remuda-dev/remuda/test/leak"
)

// segments is how many segments of shared memory a process has mapped.
func segments(t testing.TB, pid string) int {
	t.Helper()
	b, err := os.ReadFile("/proc/" + pid + "/maps")
	if err != nil {
		t.Fatal(err)
	}
	return strings.Count(string(b), "remuda-shared")
}

func noSegments(t testing.TB) {
	t.Helper()
	n := 0
	for range 1000 {
		if n = segments(t, "self"); n == 0 {
			return
		}
		time.Sleep(10 * time.Millisecond)
	}
	t.Errorf("%d segments are left", n)
}

const pythonShared = `
import sys
sys.path.insert(0, 'SDK')
import remuda_worker
from remuda_worker import TaskError
def buffer(t):
    t.result_buffer(100000)
    b = t.result_buffer(len(t.view))
    b[:] = t.view
    return b
def waste(t):
    t.result_buffer(1 << 20)
    if len(t.view) > 1024: raise TaskError('no')
    return b'x'
def keep(t): global kept; kept = t.view; return kept
remuda_worker.serve({'': lambda t: t.body, 'view': lambda t: t.view, 'buffer': buffer, 'waste': waste, 'keep': keep})
`

// Bodies of all sizes, by the socket and by shared memory, copied and not.
func TestSharedMemory(t *testing.T) {
	for _, c := range []struct {
		name    string
		command []string
		tasks   []string
	}{
		{"go", nil, []string{"", "buffer", "waste"}},
		{"python", []string{"python3", write(t, "w.py", strings.ReplaceAll(pythonShared, "SDK", sdkPath(t, "python")))}, []string{"", "view", "buffer", "waste", "keep"}},
	} {
		t.Run(c.name, func(t *testing.T) {
			before := leak.Descriptors(t)
			p := newPool(t, Options{Command: c.command, Size: 2, Concurrency: 2, Grace: 30 * time.Second})
			ctx := limit(t)
			big := make([]byte, 3<<20)
			for i := range big {
				big[i] = byte(rand.Uint32())
			}
			buf, err := p.Buffer(2 << 20)
			if err != nil {
				t.Fatal(err)
			}
			copy(buf.Bytes(), big)
			var pid atomic.Int64
			var wg sync.WaitGroup
			for range 4 {
				wg.Go(func() {
					for i := range 25 {
						n := []int{10, 64<<10 - 1, 64 << 10, 100_000, 3 << 20}[i%5]
						task := Task{Name: c.tasks[i%len(c.tasks)], Body: big[:n], ShareResult: i%2 == 0}
						if i%3 == 0 && n < 2<<20 {
							task.Buffer, task.Body = buf, buf.Bytes()[5:5+n]
						}
						want := task.Body
						r, err := p.Do(ctx, task)
						if task.Name == "waste" {
							var te *TaskError
							if n > 1<<10 != errors.As(err, &te) || err == nil && string(r.Body) != "x" {
								t.Errorf("waste: %q, %v", r.Body, err)
							}
							continue
						}
						if err != nil || !bytes.Equal(r.Body, want) {
							t.Errorf("%q of %d bytes: %d bytes, %v", task.Name, n, len(r.Body), err)
						}
						pid.Store(int64(r.PID))
						r.Release()
						r.Release()
					}
				})
			}
			wg.Wait()
			buf.Release()
			buf.Release()
			if n := segments(t, strconv.FormatInt(pid.Load(), 10)); n == 0 || n > 40 {
				t.Errorf("the worker has %d segments mapped", n)
			}
			// One that is not given back outlasts the worker, and the memory of
			// a worker that dies does not.
			r, err := p.Do(ctx, Task{Body: big, ShareResult: true})
			if err != nil {
				t.Fatal(err)
			}
			closeQuick(t, p)
			if !bytes.Equal(r.Body, big) {
				t.Error("a result that is kept has changed")
			}
			if n := segments(t, "self"); n != 1 {
				t.Errorf("%d segments are mapped, want the one that is kept", n)
			}
			r.Release()
			noSegments(t)
			leak.Settled(t, before)
		})
	}
}

// Workers that die with shared memory in use leave none of it.
func TestSharedMemoryDeath(t *testing.T) {
	before := leak.Descriptors(t)
	p := newPool(t, Options{Size: 2, Concurrency: 4})
	ctx := limit(t)
	body := make([]byte, 200_000)
	var wg sync.WaitGroup
	for i := range 40 {
		wg.Go(func() {
			task := Task{Body: body, Idempotent: true, ShareResult: i%2 == 0}
			if i%8 == 0 {
				task = Task{Name: "kill", Body: body}
			}
			r, err := p.Do(ctx, task)
			if i%8 == 0 != errors.Is(err, ErrWorkerDied) && !errors.Is(err, ErrPoison) && !errors.Is(err, ErrWorkerDied) {
				t.Errorf("%d: %v", i, err)
			}
			if err == nil && len(r.Body) != len(body) {
				t.Errorf("%d: %d bytes", i, len(r.Body))
			}
			r.Release()
		})
	}
	wg.Wait()
	closeQuick(t, p)
	noSegments(t)
	leak.Settled(t, before)
}

func closeQuick(t *testing.T, p *Pool) {
	t.Helper()
	if err := p.Close(limit(t)); err != nil {
		t.Error("Close:", err)
	}
}

// Without it, and with workers that know nothing of it, all goes by the socket.
func TestNoSharedMemory(t *testing.T) {
	body := bytes.Repeat([]byte("x"), 1<<20)
	for _, o := range []Options{
		{SharedMemory: -1, Size: 1},
		{Command: []string{"python3", write(t, "w.py", smallest(t))}, Size: 1},
	} {
		p := newPool(t, o)
		r, err := p.Do(limit(t), Task{Body: body, ShareResult: true})
		if err != nil || !bytes.Equal(r.Body, body) {
			t.Errorf("%d bytes, %v", len(r.Body), err)
		}
		r.Release()
		if n := segments(t, fmt.Sprint(r.PID)); n != 0 {
			t.Errorf("the worker has %d segments", n)
		}
	}
	noSegments(t)
}
