package batch

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"os"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"sync"
	"syscall"
	"testing"
	"time"

	"pgregory.net/rapid"

	"github.com/remuda-dev/remuda/pool"
)

// sink is a buffer that may be read while it is written to.
type sink struct {
	mu  sync.Mutex
	b   bytes.Buffer
	err error
}

func (s *sink) Write(b []byte) (int, error) {
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.err != nil {
		return 0, s.err
	}
	return s.b.Write(b)
}

func (s *sink) String() string {
	s.mu.Lock()
	defer s.mu.Unlock()
	return s.b.String()
}

func shell(t testing.TB, script string, in io.Reader, out io.Writer) Options {
	t.Helper()
	tm, err := NewTemplate([]string{"sh", "-c", script})
	if err != nil {
		t.Fatal(err)
	}
	return Options{
		Pool:     pool.Options{Command: []string{"sh", "-c", script}, Protocol: pool.Exec, Size: 2, Dir: t.TempDir()},
		Template: tm, Format: Raw, Input: in, Output: out,
	}
}

// waitFor waits until f is true.
func waitFor(t *testing.T, what string, f func() bool) {
	t.Helper()
	for deadline := time.Now().Add(patience); !f(); time.Sleep(time.Millisecond) {
		if time.Now().After(deadline) {
			t.Fatal(what)
		}
	}
}

// A task that takes long does not keep later ones from being done, and results
// still come in order.
func TestSlowFirst(t *testing.T) {
	var in strings.Builder
	for i := range 200 {
		fmt.Fprintln(&in, i+1)
	}
	var out sink
	o := shell(t, `[ $0 = 1 ] && until [ -e last ]; do sleep 0.005; done; [ $0 = 200 ] && : > last; echo $0`, strings.NewReader(in.String()), &out)
	sum, err := Run(t.Context(), o)
	if err != nil || sum.Done != 200 || sum.Failed != 0 || sum.Stopped || out.String() != in.String() {
		t.Errorf("%+v, %v\n%s", sum, err, out.String())
	}
}

// Results and job log agree with the outcomes, whatever fails and in whatever
// order tasks end; a resumed run adds what was missing.
func TestOutcomes(t *testing.T) {
	rapid.Check(t, func(rt *rapid.T) {
		dir, err := os.MkdirTemp(t.TempDir(), "")
		if err != nil {
			rt.Fatal(err)
		}
		n := rapid.IntRange(0, 12).Draw(rt, "tasks")
		bad := map[int]bool{}
		var in strings.Builder
		for i := 1; i <= n; i++ {
			if rapid.IntRange(0, 4).Draw(rt, "bad") == 0 {
				bad[i] = true
				fmt.Fprintf(&in, "{\"error\":%d}\n", i) // cat says that it failed
			} else {
				fmt.Fprintln(&in, i)
			}
		}
		most := rapid.SampledFrom([]int{0, 1, 2}).Draw(rt, "max failures")
		unordered := rapid.Bool().Draw(rt, "unordered")
		results, err := os.OpenFile(filepath.Join(dir, "r"), os.O_RDWR|os.O_CREATE|os.O_APPEND, 0o600)
		if err != nil {
			rt.Fatal(err)
		}
		defer results.Close()
		run := func(most int) Summary {
			l, err := OpenLog(filepath.Join(dir, "l"), true, results)
			if err != nil {
				rt.Fatal(err)
			}
			defer l.Close()
			sum, err := Run(context.Background(), Options{
				Pool:  pool.Options{Command: []string{"cat"}, Protocol: pool.JSONLines, Size: 2},
				Input: strings.NewReader(in.String()), Output: results, Results: results,
				Unordered: unordered, MaxFailures: most, Log: l,
			})
			if err != nil {
				rt.Fatal(err)
			}
			return sum
		}
		sum := run(most)
		if most == 0 && (sum.Done != int64(n) || sum.Failed != int64(len(bad)) || sum.Stopped) ||
			!sum.Stopped && (sum.Done != int64(n) || sum.Failed != int64(len(bad))) || sum.Stopped && sum.Failed < int64(most) {
			rt.Fatalf("%d tasks, %d bad, at most %d: %+v", n, len(bad), most, sum)
		}
		again := run(0)
		if again.Skipped != sum.Done || again.Done != int64(n)-sum.Done {
			rt.Fatalf("%+v, resumed %+v", sum, again)
		}
		b, err := os.ReadFile(results.Name())
		if err != nil {
			rt.Fatal(err)
		}
		lines := strings.Split(strings.TrimSuffix(string(b), "\n"), "\n")
		if n == 0 {
			lines = nil
		}
		var failed int
		lines = slices.DeleteFunc(lines, func(s string) bool {
			if strings.HasPrefix(s, `{"error":{"kind":"task"`) {
				failed++
				return true
			}
			return false
		})
		var want []string
		for i := 1; i <= n; i++ {
			if !bad[i] {
				want = append(want, strconv.Itoa(i))
			}
		}
		if unordered || sum.Stopped {
			slices.Sort(lines)
			slices.Sort(want)
		}
		if failed != len(bad) || !slices.Equal(lines, want) {
			rt.Fatalf("%d failed, results %q; want %d, %q", failed, lines, len(bad), want)
		}
	})
}

// Stop lets what runs end and begins nothing more; when the grace is over, or
// ctx, it is killed. An input that says nothing holds nothing up.
func TestStop(t *testing.T) {
	for _, how := range []string{"in time", "too late", "killed"} {
		t.Run(how, func(t *testing.T) {
			r, w := io.Pipe()
			defer func() { _ = w.Close() }()
			go func() { _, _ = io.WriteString(w, "1\n2\n3\n4\n") }() // and no end
			var out sink
			o := shell(t, `echo $0 >> begun; until [ -e go ]; do sleep 0.005; done; echo $0`, r, &out)
			dir := o.Pool.Dir
			o.Pool.Grace = patience
			if how == "too late" {
				o.Pool.Grace = 20 * time.Millisecond
			}
			stop := make(chan struct{})
			o.Stop = stop
			ctx, cancel := context.WithCancel(t.Context())
			defer cancel()
			type end struct {
				sum Summary
				err error
			}
			ended := make(chan end, 1)
			go func() {
				sum, err := Run(ctx, o)
				ended <- end{sum, err}
			}()
			waitFor(t, "two tasks are not begun", func() bool {
				b, _ := os.ReadFile(dir + "/begun")
				return strings.Count(string(b), "\n") == 2
			})
			close(stop)
			switch how {
			case "in time":
				if err := os.WriteFile(dir+"/go", nil, 0o600); err != nil {
					t.Fatal(err)
				}
			case "killed":
				cancel()
			}
			select {
			case e := <-ended:
				// A task may have got to a worker before the stop did.
				if how == "in time" && (e.err != nil || e.sum.Done < 2 || !e.sum.Stopped || !strings.HasPrefix(out.String(), "1\n2\n")) {
					t.Errorf("%+v, %v, %q", e.sum, e.err, out.String())
				}
				if how != "in time" && (!errors.Is(e.err, context.Canceled) || e.sum.Done != 0 || out.String() != "") {
					t.Errorf("%+v, %v, %q", e.sum, e.err, out.String())
				}
			case <-time.After(patience):
				t.Fatal("it does not end")
			}
		})
	}
}

// Results that cannot be written end the run, however many tasks there are.
func TestOutputFails(t *testing.T) {
	r, w := io.Pipe()
	defer func() { _ = w.Close() }()
	go func() {
		for {
			if _, err := io.WriteString(w, "1\n"); err != nil {
				return
			}
		}
	}()
	out := &sink{err: syscall.EPIPE}
	sum, err := Run(t.Context(), shell(t, "echo $0", r, out))
	if !errors.Is(err, ErrOutput) || !errors.Is(err, syscall.EPIPE) {
		t.Errorf("%+v, %v", sum, err)
	}
	_ = r.Close()
}

// Workers that cannot be had are no failure of any task.
func TestNoWorkers(t *testing.T) {
	var out sink
	sum, err := Run(t.Context(), Options{
		Pool:  pool.Options{Command: []string{"false"}, Size: 2},
		Input: strings.NewReader("1\n2\n3\n"), Output: &out,
	})
	if !errors.Is(err, pool.ErrNoWorkers) || sum.Done != 0 || sum.Failed != 0 || out.String() != "" {
		t.Errorf("%+v, %v, %q", sum, err, out.String())
	}
}

// A task that is too long ends the run with a word on where it is.
func TestLongTask(t *testing.T) {
	in := io.MultiReader(strings.NewReader("1\n"), bytes.NewReader(bytes.Repeat([]byte("x"), maxTask+2)))
	var out sink
	_, err := Run(t.Context(), shell(t, "echo $0", in, &out))
	if !errors.Is(err, errLong) || !strings.Contains(err.Error(), "task 2 (line 2 of the input)") || out.String() != "1\n" {
		t.Errorf("%v, %q", err, out.String())
	}
}
