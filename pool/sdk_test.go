package pool

import (
	"context"
	"errors"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"strings"
	"sync"
	"testing"
	"time"
)

// sdkPath is a file of the SDKs.
func sdkPath(t testing.TB, name string) string {
	t.Helper()
	p, err := filepath.Abs(filepath.Join("..", "sdk", name))
	if err != nil {
		t.Fatal(err)
	}
	return p
}

func write(t testing.TB, name, text string) string {
	t.Helper()
	p := filepath.Join(t.TempDir(), name)
	if err := os.WriteFile(p, []byte(text), 0o600); err != nil {
		t.Fatal(err)
	}
	return p
}

const nodeWorker = `
import { serve, TaskError } from 'SDK'
serve({
  '': (t) => t.body,
  double: async (t) => { await null; return t.data * 2 },
  fail: () => { throw new TaskError('no', 'code', { x: 1 }) },
  stream: (t) => { t.progress(1); t.chunk('x'); return new Uint8Array([101, 110, 100]) },
  wait: (t) => new Promise((resolve, reject) => t.signal.addEventListener('abort', () => reject(t.signal.reason))),
  hang: () => { for (;;); },
  exit: () => process.exit(7)
})
`

const pythonWorker = `
import os, sys
sys.path.insert(0, 'SDK')
import remuda_worker
from remuda_worker import TaskError
def fail(t): raise TaskError('no', 'code', {'x': 1})
def stream(t):
    t.progress(1); t.chunk('x')
    return b'end'
def wait(t):
    t.cancelled.wait()
    raise TaskError('cancelled', 'cancelled')
def hang(t):
    while True: pass
remuda_worker.serve({'': lambda t: t.body, 'double': lambda t: t.data * 2, 'fail': fail, 'stream': stream, 'wait': wait, 'hang': hang, 'exit': lambda t: os._exit(7)})
`

// Both SDKs do what the one in Go does.
func TestSDKs(t *testing.T) {
	for _, c := range []struct {
		name    string
		command []string
	}{
		{"node", []string{"node", write(t, "w.mjs", strings.ReplaceAll(nodeWorker, "SDK", sdkPath(t, "node/remuda-worker.mjs")))}},
		{"python", []string{"python3", write(t, "w.py", strings.ReplaceAll(pythonWorker, "SDK", sdkPath(t, "python")))}},
	} {
		t.Run(c.name, func(t *testing.T) {
			p := newPool(t, Options{Command: c.command, Size: 1, Concurrency: 8, Grace: 30 * time.Second})
			ctx := limit(t)
			var wg sync.WaitGroup
			for i := range 8 {
				body := strings.Repeat("x", []int{0, 10, 5000, 70000, 2 << 20}[i%5])
				wg.Go(func() {
					for range 5 {
						if r, err := p.Do(ctx, Task{Body: []byte(body)}); err != nil || string(r.Body) != body {
							t.Errorf("echo of %d bytes: %d, %v", len(body), len(r.Body), err)
						}
					}
				})
			}
			wg.Wait()
			if r, err := p.Do(ctx, Task{Name: "double", Body: []byte("21")}); err != nil || string(r.Body) != "42" {
				t.Errorf("double: %s, %v", r.Body, err)
			}
			var te *TaskError
			if _, err := p.Do(ctx, Task{Name: "fail"}); !errors.As(err, &te) || te.Message != "no" || te.Code != "code" || !strings.Contains(string(te.Data), "1") {
				t.Errorf("fail: %v", err)
			}
			var got strings.Builder
			note := func(b []byte) { got.Write(b) }
			if r, err := p.Do(ctx, Task{Name: "stream", OnProgress: note, OnChunk: note}); err != nil || string(r.Body) != "end" || got.String() != `1"x"` {
				t.Errorf("stream: %s, %q, %v", r.Body, got.String(), err)
			}
			short, cancel := context.WithTimeout(ctx, 20*time.Millisecond)
			defer cancel()
			if _, err := p.Do(short, Task{Name: "wait"}); !errors.Is(err, ErrTimeout) {
				t.Errorf("wait: %v", err)
			}
			for p.Stats().Running > 0 {
				time.Sleep(time.Millisecond)
			}
			if s := p.Stats(); s.Died != 0 {
				t.Errorf("a worker died: %+v", s)
			}
			if _, err := p.Do(ctx, Task{Name: "exit"}); !errors.Is(err, ErrWorkerDied) || !strings.Contains(err.Error(), "exit code 7") {
				t.Errorf("exit: %v", err)
			}
			p = newPool(t, Options{Command: c.command, Size: 1, Grace: 20 * time.Millisecond})
			if _, err := p.Do(ctx, Task{Name: "hang", Timeout: 20 * time.Millisecond}); !errors.Is(err, ErrTimeout) {
				t.Errorf("hang: %v", err)
			}
			for p.Stats().Died < 1 {
				time.Sleep(time.Millisecond)
			}
			if r, err := p.Do(ctx, Task{Body: []byte("alive")}); err != nil || string(r.Body) != "alive" {
				t.Errorf("after all: %s, %v", r.Body, err)
			}
		})
	}
}

// smallest is the worker of the protocol's description.
func smallest(t testing.TB) string {
	t.Helper()
	doc, err := os.ReadFile("../docs/worker-protocol.md")
	if err != nil {
		t.Fatal(err)
	}
	m := regexp.MustCompile("(?s)```python\n(.*?)```").FindSubmatch(doc)
	if m == nil {
		t.Fatal("no worker in the description")
	}
	return string(m[1])
}

// It does work.
func TestSmallestWorker(t *testing.T) {
	py, err := exec.LookPath("python3")
	if err != nil {
		t.Fatal(err)
	}
	p := newPool(t, Options{Command: []string{py, write(t, "w.py", smallest(t))}, Size: 1})
	if r, err := p.Do(limit(t), Task{Name: "x", Body: []byte("hello")}); err != nil || string(r.Body) != "hello" {
		t.Errorf("Do = %s, %v", r.Body, err)
	}
}

// The worker of a pool that was written for Node's child_process, as it is.
func TestNodeProgram(t *testing.T) {
	p := newPool(t, Options{
		Command: []string{"node", write(t, "worker.js", `process.on('message', (task) => { process.send({ square: task.n * task.n }) })`)},
		Size:    2, Protocol: Node,
	})
	ctx := limit(t)
	var wg sync.WaitGroup
	for range 20 {
		wg.Go(func() {
			if r, err := p.Do(ctx, Task{Body: []byte(`{"n":7}`)}); err != nil || string(r.Body) != `{"square":49}` {
				t.Errorf("Do = %s, %v", r.Body, err)
			}
		})
	}
	wg.Wait()
}
