package pool

import (
	"context"
	"os"
	"os/exec"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"github.com/remuda-dev/remuda/ipc"
)

// BenchmarkFloor is a bare ping-pong of 36 bytes between two Go processes over
// a socketpair: what one task costs at least.
func BenchmarkFloor(b *testing.B) {
	parent, child, err := ipc.Pair()
	if err != nil {
		b.Fatal(err)
	}
	defer parent.Close()
	exe, err := os.Executable()
	if err != nil {
		b.Fatal(err)
	}
	// Non-blocking, so that the child too waits in Go's poller.
	rc, err := child.SyscallConn()
	if err != nil {
		b.Fatal(err)
	}
	if err := rc.Control(func(fd uintptr) { _ = unix.SetNonblock(int(fd), true) }); err != nil {
		b.Fatal(err)
	}
	cmd := exec.Command(exe)
	cmd.Env = append(os.Environ(), modeVar+"=pingpong")
	cmd.ExtraFiles = []*os.File{child}
	cmd.Stderr = os.Stderr
	if err := cmd.Start(); err != nil {
		b.Fatal(err)
	}
	child.Close()
	buf := make([]byte, 36)
	for b.Loop() {
		if _, err := parent.Write(buf); err != nil {
			b.Fatal(err)
		}
		if _, err := parent.Read(buf); err != nil {
			b.Fatal(err)
		}
	}
	parent.Close()
	_ = cmd.Wait()
}

func benchmarkDo(b *testing.B, workers, concurrency int) {
	p := newPool(b, Options{Size: workers, Concurrency: max(1, concurrency/workers)})
	ctx := context.Background()
	body := make([]byte, 16)
	if _, err := p.Do(ctx, Task{Body: body}); err != nil {
		b.Fatal(err)
	}
	for p.Stats().Up < workers {
		time.Sleep(time.Millisecond)
	}
	if concurrency == 1 {
		for b.Loop() {
			if _, err := p.Do(ctx, Task{Body: body}); err != nil {
				b.Fatal(err)
			}
		}
		return
	}
	b.ResetTimer()
	var left atomic.Int64
	left.Store(int64(b.N))
	var wg sync.WaitGroup
	for range concurrency {
		wg.Go(func() {
			for left.Add(-1) >= 0 {
				if _, err := p.Do(ctx, Task{Body: body}); err != nil {
					b.Error(err)
					return
				}
			}
		})
	}
	wg.Wait()
	b.StopTimer()
	b.ReportMetric(float64(b.N)/b.Elapsed().Seconds(), "tasks/s")
}

// A Node program that knows nothing of pools, one task at a time.
func BenchmarkDo1Node(b *testing.B) {
	p := newPool(b, Options{Size: 1, Protocol: Node, Command: []string{"node", "-e", "process.on('message', (m) => process.send({n: m.n * 2}))"}})
	ctx := context.Background()
	body := []byte(`{"n":1}`)
	for range 1000 { // until it is compiled
		if _, err := p.Do(ctx, Task{Body: body}); err != nil {
			b.Fatal(err)
		}
	}
	for b.Loop() {
		if _, err := p.Do(ctx, Task{Body: body}); err != nil {
			b.Fatal(err)
		}
	}
}

func BenchmarkDo1(b *testing.B)           { benchmarkDo(b, 1, 1) }
func BenchmarkDo64(b *testing.B)          { benchmarkDo(b, 2, 64) }
func BenchmarkDo64Workers8(b *testing.B)  { benchmarkDo(b, 8, 64) }
func BenchmarkDo64Workers64(b *testing.B) { benchmarkDo(b, 64, 64) }

// 64 MiB there and back, by the socket and by shared memory: copied in and out,
// and where it is.
func BenchmarkSocket64MiB(b *testing.B) { bench64(b, -1, false) }

func BenchmarkShared64MiB(b *testing.B) {
	b.Run("copied", func(b *testing.B) { bench64(b, 0, false) })
	b.Run("in place", func(b *testing.B) { bench64(b, 0, true) })
}

func bench64(b *testing.B, from int, inPlace bool) {
	const size = 64 << 20
	p := newPool(b, Options{Size: 1, SharedMemory: from})
	t := Task{Body: make([]byte, size)}
	if inPlace {
		buf, err := p.Buffer(size)
		if err != nil {
			b.Fatal(err)
		}
		defer buf.Release()
		t = Task{Name: "filled", Body: buf.Bytes(), Buffer: buf, ShareResult: true}
	}
	b.SetBytes(2 * size)
	for b.Loop() {
		r, err := p.Do(b.Context(), t)
		if err != nil || len(r.Body) != size {
			b.Fatal(len(r.Body), err)
		}
		r.Release()
	}
}
