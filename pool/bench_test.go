package pool

import (
	"context"
	"os"
	"os/exec"
	"sync"
	"sync/atomic"
	"testing"

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
