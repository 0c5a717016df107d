package api

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"net/http"
	"strings"
	"testing"
	"testing/iotest"
	"time"

	"pgregory.net/rapid"

	"github.com/remuda-dev/remuda/client"
)

// tasks is a daemon whose pools do what a test says.
type tasks struct {
	recorder
	do func(ctx context.Context, pool string, t client.PoolTask) (client.PoolResult, error)
}

func (r *tasks) Do(ctx context.Context, pool string, t client.PoolTask) (client.PoolResult, error) {
	return r.do(ctx, pool, t)
}

func TestDo(t *testing.T) {
	want := client.PoolTask{Name: "a/b", Body: []byte("\x00task"), Priority: 9, Key: "k&=", CacheKey: "ü", Idempotent: true, Timeout: 1500 * time.Millisecond}
	d := &tasks{do: func(_ context.Context, pool string, task client.PoolTask) (client.PoolResult, error) {
		if pool != "a b" || fmt.Sprint(task) != fmt.Sprint(want) {
			t.Errorf("%q %+v", pool, task)
		}
		return client.PoolResult{Body: []byte("\xffresult"), Wait: 1, Run: 2, PID: 3, Attempts: 4, Cached: true}, nil
	}}
	c := serveHandler(t, Handler(d, "9"))
	r, err := c.Do(t.Context(), "a b", want)
	if err != nil || string(r.Body) != "\xffresult" || r.Wait != 1 || r.Run != 2 || r.PID != 3 || r.Attempts != 4 || !r.Cached {
		t.Errorf("%+v %v", r, err)
	}
	// An empty result, of an empty task.
	d.do = func(_ context.Context, _ string, task client.PoolTask) (client.PoolResult, error) {
		if len(task.Body) != 0 {
			t.Errorf("%q", task.Body)
		}
		return client.PoolResult{}, nil
	}
	if r, err := c.Do(t.Context(), "p", client.PoolTask{}); err != nil || len(r.Body) != 0 {
		t.Errorf("%+v %v", r, err)
	}
	d.do = func(context.Context, string, client.PoolTask) (client.PoolResult, error) {
		return client.PoolResult{}, &client.Error{Status: http.StatusTooManyRequests, Kind: client.TaskQueueFull, Detail: "full", Code: "C", Data: []byte(`[1]`)}
	}
	_, err = c.Do(t.Context(), "p", client.PoolTask{})
	var e *client.Error
	if !errors.As(err, &e) || e.Status != http.StatusTooManyRequests || e.Kind != client.TaskQueueFull || e.Detail != "full" || e.Code != "C" || string(e.Data) != "[1]" {
		t.Errorf("%#v", err)
	}
	d.do = func(context.Context, string, client.PoolTask) (client.PoolResult, error) {
		t.Error("an invalid task came through")
		return client.PoolResult{}, nil
	}
	for _, bad := range []client.PoolTask{{Priority: 10}, {Priority: -1}, {Timeout: -1}, {Name: strings.Repeat("n", 1025)}, {Body: make([]byte, maxTask+1)}} {
		if _, err := c.Do(t.Context(), "p", bad); !errors.As(err, &e) || e.Status/100 != 4 {
			t.Errorf("%.40v: %v", bad, err)
		}
	}
}

// A caller that hangs up ends the task's context.
func TestDoHungUp(t *testing.T) {
	began, ended := make(chan struct{}), make(chan error, 1)
	d := &tasks{do: func(ctx context.Context, _ string, _ client.PoolTask) (client.PoolResult, error) {
		close(began)
		<-ctx.Done()
		ended <- ctx.Err()
		return client.PoolResult{}, ctx.Err()
	}}
	c := serveHandler(t, Handler(d, "9"))
	ctx, cancel := context.WithCancel(t.Context())
	go func() { <-began; cancel() }()
	if _, err := c.Do(ctx, "p", client.PoolTask{Body: []byte("x")}); !errors.Is(err, context.Canceled) {
		t.Error(err)
	}
	if err := <-ended; !errors.Is(err, context.Canceled) {
		t.Error(err)
	}
}

// A daemon that dies over a task leaves it open whether it was done.
func TestDoLost(t *testing.T) {
	c := serveHandler(t, http.HandlerFunc(func(http.ResponseWriter, *http.Request) { panic(http.ErrAbortHandler) }))
	if _, err := c.Do(t.Context(), "p", client.PoolTask{}); !errors.Is(err, client.ErrTaskLost) {
		t.Error(err)
	}
}

// Whatever comes in whatever pieces is read as it is, and what was taken of the
// budget is told.
func TestReadTask(t *testing.T) {
	rapid.Check(t, func(t *rapid.T) {
		want := bytes.Repeat([]byte("abcdefg"), rapid.IntRange(0, 40_000).Draw(t, "n"))
		known := rapid.Bool().Draw(t, "length known")
		length := int64(-1)
		if known {
			length = int64(len(want))
		}
		var b budget
		r := io.Reader(bytes.NewReader(want))
		if rapid.Bool().Draw(t, "halves") {
			r = iotest.HalfReader(r)
		}
		got, taken, err := b.read(r, length)
		if err != nil || !bytes.Equal(got, want) {
			t.Fatalf("%d of %d bytes: %v", len(got), len(want), err)
		}
		if b.used.Load() != taken || taken < int64(cap(got)) {
			t.Fatalf("%d taken, %d told, %d had", b.used.Load(), taken, cap(got))
		}
		if known && int64(cap(got)) > max(length, 1) {
			t.Fatalf("%d bytes for %d", cap(got), length)
		}
	})
	var b budget
	if _, taken, err := b.read(strings.NewReader("short"), 10); !errors.Is(err, io.ErrUnexpectedEOF) || b.used.Load() != taken {
		t.Error(err)
	}
	if _, _, err := new(budget).read(nil, maxTask+1); !errors.Is(err, errBody) {
		t.Error(err)
	}
	endless := &endless{}
	if _, _, err := new(budget).read(endless, -1); !errors.Is(err, errBody) || endless.n > maxTask+1 {
		t.Errorf("%v after %d bytes", err, endless.n)
	}
	full := &budget{}
	full.used.Store(maxTasks - 10)
	if _, taken, err := full.read(endless, 11); !errors.Is(err, errBusy) || taken != 0 || full.used.Load() != maxTasks-10 {
		t.Errorf("%v, %d taken", err, taken)
	}
}

type endless struct{ n int64 }

func (e *endless) Read(b []byte) (int, error) {
	e.n += int64(len(b))
	return len(b), nil
}
