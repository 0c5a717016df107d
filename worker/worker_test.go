package worker_test

import (
	"context"
	"errors"
	"fmt"
	"os"
	"runtime"
	"strings"
	"testing"
	"time"

	"go.uber.org/goleak"
	"golang.org/x/sys/unix"

	"github.com/remuda-dev/remuda/ipc"
	"github.com/remuda-dev/remuda/worker"
)

func TestMain(m *testing.M) { goleak.VerifyTestMain(m) }

// A worker with two handlers.
func Example() {
	err := worker.Serve(context.Background(), worker.Handlers{
		"double": worker.JSON(func(_ context.Context, n int) (int, error) { return 2 * n, nil }),
		"": func(_ context.Context, t *worker.Task) ([]byte, error) {
			return []byte("hello, " + string(t.Body)), nil
		},
	})
	fmt.Println(errors.Is(err, worker.ErrNoChannel)) // no pool has started this
	// Output: true
}

// serve runs a worker in this process and returns the parent's end.
func serve(t *testing.T, ctx context.Context, h worker.Handlers) (*ipc.Channel, <-chan error) { //nolint:revive // t goes first in helpers of tests
	t.Helper()
	a, b, err := ipc.Pair()
	if err != nil {
		t.Fatal(err)
	}
	fd, err := unix.FcntlInt(b.Fd(), unix.F_DUPFD_CLOEXEC, 0)
	if err != nil {
		t.Fatal(err)
	}
	b.Close()
	if err := unix.SetNonblock(fd, true); err != nil {
		t.Fatal(err)
	}
	done := make(chan error, 1)
	go func() { done <- worker.ServeFile(ctx, os.NewFile(uintptr(fd), "child"), h) }()
	ch, err := ipc.NewChannel(a, ipc.ChannelOptions{MaxFrame: 1 << 20})
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { ch.Close() })
	if f, _, _, err := ch.Receive(); err != nil || f.Type != ipc.TypeHello {
		t.Fatal(f.Type, err)
	}
	return ch, done
}

func task(t *testing.T, ch *ipc.Channel, id uint32, name, body string) {
	t.Helper()
	b := append([]byte{0, 0, 0, 0, byte(len(name)), 0}, name+body...)
	if err := ch.Send(ipc.TypeTask, id, b); err != nil {
		t.Fatal(err)
	}
}

func next(t *testing.T, ch *ipc.Channel) string {
	t.Helper()
	f, _, _, err := ch.Receive()
	if err != nil {
		return err.Error()
	}
	return fmt.Sprintf("%s %d %s", f.Type, f.ID, f.Payload)
}

func handlers() worker.Handlers {
	return worker.Handlers{
		"double": worker.JSON(func(_ context.Context, n int) (int, error) { return 2 * n, nil }),
		"wait":   func(ctx context.Context, _ *worker.Task) ([]byte, error) { <-ctx.Done(); return nil, ctx.Err() },
		"panic":  func(context.Context, *worker.Task) ([]byte, error) { panic("oops") },
		"goexit": func(context.Context, *worker.Task) ([]byte, error) { runtime.Goexit(); return nil, nil },
		"big":    func(context.Context, *worker.Task) ([]byte, error) { return make([]byte, 2<<20), nil },
	}
}

func TestServe(t *testing.T) {
	ch, done := serve(t, context.Background(), handlers())
	if err := ch.SendHello(ipc.Hello{}); err != nil {
		t.Fatal(err)
	}
	for i, c := range []struct{ name, body, want string }{
		{"double", "21", "RESULT 0 42"},
		{"double", "x", `"code":"invalid"`},
		{"nothing", "", `"code":"unknown_task"`},
		{"panic", "", `ERROR 3 {"code":"panic","message":"oops"}`},
		{"goexit", "", `"code":"panic"`},
		{"big", "", `too large`},
	} {
		task(t, ch, uint32(i), c.name, c.body)
		if got := next(t, ch); !strings.Contains(got, c.want) {
			t.Errorf("%s %s: %s, want %s", c.name, c.body, got, c.want)
		}
	}
	task(t, ch, 7, "wait", "")
	if err := errors.Join(ch.Send(ipc.TypePing, 9, []byte("p")), ch.Send(ipc.TypeCancel, 99, nil), ch.Send(200, 0, nil)); err != nil {
		t.Fatal(err)
	}
	if got := next(t, ch); got != "PONG 9 p" {
		t.Errorf("ping: %s", got)
	}
	// After STOP what runs is finished, and then it ends.
	if err := errors.Join(ch.Send(ipc.TypeStop, 0, nil), ch.Send(ipc.TypeCancel, 7, nil)); err != nil {
		t.Fatal(err)
	}
	if got := next(t, ch); !strings.Contains(got, `ERROR 7 {"code":"cancelled"`) {
		t.Errorf("cancel: %s", got)
	}
	if got := next(t, ch); got != "EOF" {
		t.Errorf("at the end: %s", got)
	}
	if err := <-done; err != nil {
		t.Errorf("Serve = %v", err)
	}
}

// Quick handlers are run by the goroutine that reads; one among them that is
// not quick, or does not return, keeps nothing from being read.
func TestQuickAndSlow(t *testing.T) {
	h := handlers()
	h["echo"] = func(_ context.Context, t *worker.Task) ([]byte, error) { return t.Body, nil }
	ch, done := serve(t, context.Background(), h)
	if err := ch.SendHello(ipc.Hello{}); err != nil {
		t.Fatal(err)
	}
	id := uint32(0)
	quick := func() {
		t.Helper()
		for range 200 {
			id++
			task(t, ch, id, "echo", "x")
			if got, want := next(t, ch), fmt.Sprintf("RESULT %d x", id); got != want {
				t.Fatalf("%s, want %s", got, want)
			}
		}
	}
	for range 5 {
		quick()
		id++
		slow := id
		task(t, ch, slow, "wait", "")
		if err := ch.Send(ipc.TypePing, 9, nil); err != nil {
			t.Fatal(err)
		}
		if got := next(t, ch); got != "PONG 9 " {
			t.Fatalf("ping: %s", got)
		}
		quick() // beside it
		if err := ch.Send(ipc.TypeCancel, slow, nil); err != nil {
			t.Fatal(err)
		}
		if got := next(t, ch); !strings.Contains(got, fmt.Sprintf(`ERROR %d {"code":"cancelled"`, slow)) {
			t.Fatalf("cancel: %s", got)
		}
		quick()
		id++
		task(t, ch, id, "goexit", "")
		if got := next(t, ch); !strings.Contains(got, `"code":"panic"`) {
			t.Fatalf("goexit: %s", got)
		}
	}
	// Many at a time, in one write.
	ch.Hold()
	for range 500 {
		id++
		task(t, ch, id, "echo", "y")
	}
	ch.Release()
	seen := map[string]bool{}
	for range 500 {
		seen[next(t, ch)] = true
	}
	for i := id - 499; i <= id; i++ {
		if !seen[fmt.Sprintf("RESULT %d y", i)] {
			t.Errorf("no answer to %d", i)
		}
	}
	// The parent goes while a handler runs in the goroutine that reads.
	quick()
	task(t, ch, id+1, "wait", "")
	ch.Flush(time.Minute)
	ch.Close()
	if err := <-done; err != nil {
		t.Errorf("Serve = %v", err)
	}
}

// The end of the context, of the parent and of the parent's good manners.
func TestServeEnds(t *testing.T) {
	ctx, cancel := context.WithCancel(context.Background())
	ch, done := serve(t, ctx, handlers())
	if err := ch.SendHello(ipc.Hello{}); err != nil {
		t.Fatal(err)
	}
	cancel()
	if err := <-done; err != nil {
		t.Errorf("after the end of its context: %v", err)
	}

	ch, done = serve(t, context.Background(), handlers())
	if err := ch.SendHello(ipc.Hello{}); err != nil {
		t.Fatal(err)
	}
	task(t, ch, 1, "wait", "")
	ch.Flush(time.Minute)
	ch.Close()
	if err := <-done; err != nil {
		t.Errorf("after the end of the parent: %v", err)
	}

	ch, done = serve(t, context.Background(), handlers())
	task(t, ch, 1, "double", "1")
	if err := <-done; !errors.Is(err, ipc.ErrProtocol) {
		t.Errorf("a task before the hello: %v", err)
	}
	_ = ch
}
