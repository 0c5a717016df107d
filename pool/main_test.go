package pool

import (
	"context"
	"errors"
	"fmt"
	"os"
	"strconv"
	"strings"
	"syscall"
	"testing"
	"time"

	"go.uber.org/goleak"

	"github.com/remuda-dev/remuda/ipc"
	sdk "github.com/remuda-dev/remuda/worker"
)

// modeVar makes the test binary the worker that the tests run.
const modeVar = "POOL_TEST_MODE"

func TestMain(m *testing.M) {
	switch os.Getenv(modeVar) {
	case "":
		goleak.VerifyTestMain(m)
	case "worker":
		err := serveTests()
		if err != nil {
			fmt.Fprintln(os.Stderr, err)
			os.Exit(1)
		}
	case "exit":
		os.Exit(3)
	case "pingpong":
		f := os.NewFile(3, "socket")
		b := make([]byte, 64)
		for {
			n, err := f.Read(b)
			if err != nil {
				return
			}
			if _, err := f.Write(b[:n]); err != nil {
				return
			}
		}
	}
}

// serveTests is a worker that also says again what it hears.
func serveTests() error {
	w, err := sdk.Open(handlers())
	if err != nil {
		return err
	}
	sub, err := w.Subscribe("say/*", ipc.SubscribeOptions{})
	if err != nil {
		return err
	}
	defer sub.Close()
	go func() {
		for {
			m, err := sub.Receive(context.Background())
			if err != nil {
				return
			}
			if err := w.Publish("said/"+m.Topic[4:], append([]byte("go: "), m.Body...)); err != nil {
				return
			}
		}
	}()
	return w.Serve(context.Background())
}

func handlers() sdk.Handlers {
	return sdk.Handlers{
		"": func(_ context.Context, t *sdk.Task) ([]byte, error) { return t.Body, nil },
		"pid": func(context.Context, *sdk.Task) ([]byte, error) {
			return []byte(strconv.Itoa(os.Getpid())), nil
		},
		"fail": func(_ context.Context, t *sdk.Task) ([]byte, error) {
			return nil, &sdk.Error{Code: "no", Message: string(t.Body)}
		},
		"panic": func(context.Context, *sdk.Task) ([]byte, error) { panic("oops") },
		"exit": func(context.Context, *sdk.Task) ([]byte, error) {
			os.Exit(7)
			return nil, nil
		},
		"kill": func(context.Context, *sdk.Task) ([]byte, error) {
			_ = syscall.Kill(os.Getpid(), syscall.SIGKILL)
			select {}
		},
		"stop": func(context.Context, *sdk.Task) ([]byte, error) {
			_ = syscall.Kill(os.Getpid(), syscall.SIGSTOP)
			select {} // another thread may have taken the signal
		},
		"garbage": func(context.Context, *sdk.Task) ([]byte, error) {
			_, _ = syscall.Write(3, []byte("this is no frame at all, is it?"))
			select {}
		},
		"half": func(context.Context, *sdk.Task) ([]byte, error) {
			_, _ = syscall.Write(3, []byte{100, 0, 0, 0, 3, 0})
			os.Exit(0)
			return nil, nil
		},
		"close": func(context.Context, *sdk.Task) ([]byte, error) {
			_ = syscall.Shutdown(3, syscall.SHUT_RDWR)
			select {}
		},
		"wait": func(ctx context.Context, _ *sdk.Task) ([]byte, error) {
			<-ctx.Done()
			return nil, ctx.Err()
		},
		"balloon": func(_ context.Context, t *sdk.Task) ([]byte, error) {
			n, err := strconv.Atoi(string(t.Body))
			if err != nil {
				return nil, err
			}
			// Not Go's memory: the race detector would keep a shadow of it.
			if _, err := syscall.Mmap(-1, 0, n<<20, syscall.PROT_READ|syscall.PROT_WRITE, syscall.MAP_PRIVATE|syscall.MAP_ANON|syscall.MAP_POPULATE); err != nil {
				return nil, err
			}
			if n >= 300 {
				select {}
			}
			return []byte(strconv.Itoa(os.Getpid())), nil
		},
		"hang": func(context.Context, *sdk.Task) ([]byte, error) { select {} },
		"spin": func(_ context.Context, t *sdk.Task) ([]byte, error) {
			d, err := time.ParseDuration(string(t.Body))
			for end := time.Now().Add(d); time.Now().Before(end); {
			}
			return nil, err
		},
		"once": func(_ context.Context, t *sdk.Task) ([]byte, error) {
			f, err := os.OpenFile(string(t.Body), os.O_CREATE|os.O_EXCL, 0o600)
			if err != nil {
				for _, f := range t.Files {
					if _, err := f.WriteString("again"); err != nil {
						return nil, err
					}
				}
				return []byte("again"), nil
			}
			f.Close()
			os.Exit(1)
			return nil, nil
		},
		"stream": func(_ context.Context, t *sdk.Task) ([]byte, error) {
			for i := range 3 {
				if err := errors.Join(t.Progress([]byte(strconv.Itoa(i))), t.Chunk([]byte(strings.Repeat("x", i)))); err != nil {
					return nil, err
				}
			}
			return []byte("end"), nil
		},
		"hello": func(_ context.Context, t *sdk.Task) ([]byte, error) {
			c, err := t.Conn(0)
			if err != nil {
				return nil, err
			}
			_, err = c.Write([]byte("hello"))
			c.Close()
			return []byte(strconv.Itoa(len(t.Files))), err
		},
		"accept": func(_ context.Context, t *sdk.Task) ([]byte, error) {
			l, err := t.Listener(0)
			if err != nil {
				return nil, err
			}
			c, err := l.Accept()
			if err != nil {
				return nil, err
			}
			_, err = c.Write([]byte("hello"))
			c.Close()
			l.Close()
			return nil, err
		},
		"udp": func(_ context.Context, t *sdk.Task) ([]byte, error) {
			c, err := t.PacketConn(0)
			if err != nil {
				return nil, err
			}
			defer func() { _ = c.Close() }()
			b := make([]byte, 10)
			n, who, err := c.ReadFrom(b)
			if err == nil {
				_, err = c.WriteTo(b[:n], who)
			}
			return nil, err
		},
		"buffer": func(_ context.Context, t *sdk.Task) ([]byte, error) {
			_ = t.ResultBuffer(10) // another is wanted after all
			b := t.ResultBuffer(len(t.Body) + 2)
			copy(b[1:], t.Body)
			return b[1 : 1+len(t.Body)], nil
		},
		"filled": func(_ context.Context, t *sdk.Task) ([]byte, error) {
			b := t.ResultBuffer(len(t.Body))
			for i := 0; i < len(b); i += 4096 { // as somebody would who makes something
				b[i] = t.Body[i] + 1
			}
			return b, nil
		},
		"waste": func(_ context.Context, t *sdk.Task) ([]byte, error) {
			b := t.ResultBuffer(1 << 20)
			if len(t.Body) > 1<<10 {
				panic(string(b[:0]))
			}
			return []byte("x"), nil
		},
		"publish": func(_ context.Context, t *sdk.Task) ([]byte, error) {
			return nil, t.Publish("say/"+t.Name, t.Body)
		},
		"flood": func(_ context.Context, t *sdk.Task) ([]byte, error) {
			for {
				if err := t.Publish("flood", t.Body); err != nil && !errors.Is(err, ipc.ErrFull) {
					return nil, err
				}
			}
		},
		"count": func(context.Context, *sdk.Task) ([]byte, error) {
			dir, err := os.ReadDir("/proc/self/fd")
			return []byte(strconv.Itoa(len(dir))), err
		},
		"write": func(_ context.Context, t *sdk.Task) ([]byte, error) {
			for _, f := range t.Files {
				if _, err := f.Write(t.Body); err != nil {
					return nil, err
				}
			}
			return nil, nil
		},
		"give": func(_ context.Context, t *sdk.Task) ([]byte, error) {
			r, w, err := os.Pipe()
			if err != nil {
				return nil, err
			}
			a, b, err := ipc.Pair()
			if err != nil {
				return nil, err
			}
			t.Attach(r, b)
			for _, f := range []*os.File{w, a} {
				if _, err := f.Write(t.Body); err != nil {
					return nil, err
				}
				f.Close()
			}
			return nil, nil
		},
		"back": func(_ context.Context, t *sdk.Task) ([]byte, error) {
			t.Attach(t.Files...)
			return nil, nil
		},
		"many": func(_ context.Context, t *sdk.Task) ([]byte, error) {
			for range ipc.MaxFiles + 1 {
				f, err := os.Open(os.DevNull)
				if err != nil {
					return nil, err
				}
				t.Attach(f)
			}
			return nil, nil
		},
	}
}

// newPool makes a pool of the test's own workers.
func newPool(t testing.TB, o Options) *Pool {
	t.Helper()
	if o.Command == nil {
		o.Command = []string{"/proc/self/exe"}
		if exe, err := os.Executable(); err == nil {
			o.Command[0] = exe
		}
		o.Env = append(os.Environ(), modeVar+"=worker", "GORACE=atexit_sleep_ms=0")
	}
	if o.Stderr == nil {
		o.Stderr = os.Stderr
	}
	p, err := New(o)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		ctx, cancel := context.WithTimeout(context.Background(), 20*time.Second)
		defer cancel()
		if err := p.Close(ctx); err != nil {
			t.Error("Close:", err)
		}
		if s := p.Stats(); s.Running != 0 || s.Queued != 0 || s.Up != 0 {
			t.Errorf("after Close: %+v", s)
		}
	})
	return p
}
