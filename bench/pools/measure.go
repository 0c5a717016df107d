package main

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"runtime"
	"slices"
	"strconv"
	"sync"
	"syscall"
	"time"

	"golang.org/x/sys/unix"

	"github.com/remuda-dev/remuda/ipc"
	"github.com/remuda-dev/remuda/pool"
	"github.com/remuda-dev/remuda/test/harness"
	sdk "github.com/remuda-dev/remuda/worker"
)

const modeVar = "BENCH_WORKER" // task or pingpong: be that

// beWorker runs this program as a worker.
func beWorker(mode string) error {
	if mode == "pingpong" {
		f := os.NewFile(3, "socket")
		b := make([]byte, 64)
		for {
			n, err := f.Read(b)
			if err != nil {
				return nil //nolint:nilerr // the end
			}
			if _, err := f.Write(b[:n]); err != nil {
				return err
			}
		}
	}
	return sdk.Serve(context.Background(), sdk.Handlers{
		"": double,
		"echo": func(_ context.Context, t *sdk.Task) ([]byte, error) {
			r := t.ResultBuffer(len(t.Body))
			copy(r, t.Body)
			return r, nil
		},
	})
}

// double makes {"n":42} of {"n":21}. It is not for JSON libraries to be
// measured here.
func double(_ context.Context, t *sdk.Task) ([]byte, error) {
	text, ok := bytes.CutPrefix(bytes.TrimSuffix(t.Body, []byte("}")), []byte(`{"n":`))
	n, err := strconv.Atoi(string(text))
	if !ok || err != nil {
		return nil, fmt.Errorf("not a task: %q", t.Body)
	}
	return append(strconv.AppendInt([]byte(`{"n":`), int64(n*2), 10), '}'), nil
}

// measure measures one pool at one concurrency.
type measure func(ctx context.Context, concurrency int) (figure, error)

func (b *bench) options(protocol pool.Protocol, perWorker int, command ...string) pool.Options {
	return pool.Options{
		Command: command, Dir: b.dir, Protocol: protocol, Size: b.workers, Concurrency: perWorker, Stderr: os.Stderr,
		Env: append(os.Environ(), modeVar+"=task", "GOMAXPROCS=1", "BENCH_SDK="+filepath.Join(harness.Root(), "sdk")),
	}
}

// ours measures a pool of this project.
func (b *bench) ours(o pool.Options) measure {
	return func(ctx context.Context, concurrency int) (f figure, err error) {
		err = with(ctx, o, func(p *pool.Pool) error {
			if _, err := drive(ctx, p, concurrency, 500*time.Millisecond); err != nil {
				return err
			}
			f, err = drive(ctx, p, concurrency, b.length)
			return err
		})
		return f, err
	}
}

func with(ctx context.Context, o pool.Options, f func(*pool.Pool) error) error {
	p, err := pool.New(o)
	if err != nil {
		return err
	}
	err = f(p)
	if cerr := p.Close(ctx); err == nil {
		err = cerr
	}
	return err
}

// drive has concurrency callers give tasks to p for a while.
func drive(ctx context.Context, p *pool.Pool, concurrency int, length time.Duration) (figure, error) {
	var (
		wg    sync.WaitGroup
		mu    sync.Mutex
		all   []time.Duration
		total int
		fault error
	)
	from := time.Now()
	until := from.Add(length)
	for range concurrency {
		wg.Go(func() {
			var times []time.Duration
			done := 0
			body := []byte(`{"n":21}`)
			for now := from; now.Before(until); {
				r, err := p.Do(ctx, pool.Task{Body: body})
				if err == nil && !bytes.Equal(r.Body, []byte(`{"n":42}`)) {
					err = fmt.Errorf("wrong answer %q", r.Body)
				}
				done++
				// To look at the clock is no part of a task; where one waits for
				// the other it is what is asked for.
				if concurrency == 1 || done%16 == 0 {
					then := time.Now()
					times = append(times, then.Sub(now))
					now = then
				}
				if err != nil {
					mu.Lock()
					fault = err
					mu.Unlock()
					return
				}
			}
			mu.Lock()
			all = append(all, times...)
			total += done
			mu.Unlock()
		})
	}
	wg.Wait()
	took := time.Since(from)
	p50 := float64(harness.Median(all)) / 1e3
	if concurrency > 1 {
		p50 /= 16
	}
	return figure{Rate: float64(total) / took.Seconds(), P50: p50}, fault
}

// floor is a bare ping-pong between two Go processes over a socket pair: what a
// task costs at least.
func (b *bench) floor(ctx context.Context) (figure, error) {
	parent, child, err := ipc.Pair()
	if err != nil {
		return figure{}, err
	}
	defer parent.Close()
	// Non-blocking, so that the child too waits in Go's poller.
	if rc, err := child.SyscallConn(); err == nil {
		_ = rc.Control(func(fd uintptr) { _ = unix.SetNonblock(int(fd), true) })
	}
	cmd := exec.CommandContext(ctx, b.self)
	cmd.Env = append(os.Environ(), modeVar+"=pingpong")
	cmd.ExtraFiles = []*os.File{child}
	err = cmd.Start()
	child.Close()
	if err != nil {
		return figure{}, err
	}
	var (
		buf   = make([]byte, 26) // as long as our frame for the task
		times []time.Duration
		from  = time.Now()
	)
	for now := from; now.Sub(from) < b.length; {
		if _, err := parent.Write(buf); err != nil {
			return figure{}, err
		}
		if _, err := parent.Read(buf); err != nil {
			return figure{}, err
		}
		then := time.Now()
		times = append(times, then.Sub(now))
		now = then
	}
	took := time.Since(from)
	parent.Close()
	return figure{Rate: float64(len(times)) / took.Seconds(), P50: float64(harness.Median(times)) / 1e3}, cmd.Wait()
}

// contestant is one column of the comparison.
type contestant struct {
	name string
	run  measure
}

// peers measures everybody in turns.
func (b *bench) peers(ctx context.Context) error {
	const most = 64
	per := most / b.workers
	all := []contestant{
		{"floor: ping-pong of two Go processes", func(ctx context.Context, c int) (figure, error) {
			if c > 1 {
				return figure{}, nil
			}
			return b.floor(ctx)
		}},
		{"the seed's ProcessPool", b.foreign("node", "peer.mjs", "seed")},
		{"tinypool, child_process", b.foreign("node", "peer.mjs", "tinypool")},
		{"workerpool, process", b.foreign("node", "peer.mjs", "workerpool")},
		{"multiprocessing.Pool", b.foreign("python3", "peer.py")},
		{"ours, the seed's Node worker, one task at a time", b.ours(b.options(pool.Node, 1, "node", "worker.cjs"))},
		{"ours, the seed's Node worker, Concurrency " + fmt.Sprint(per), b.ours(b.options(pool.Node, per, "node", "worker.cjs"))},
		{"ours, Node SDK", b.ours(b.options(pool.Frames, per, "node", "sdk-worker.cjs"))},
		{"ours, Python SDK", b.ours(b.options(pool.Frames, per, "python3", "sdk-worker.py"))},
		{"ours, Go", b.ours(b.options(pool.Frames, per, b.self))},
	}
	conc := []int{1, most}
	rates, p50 := map[string][]float64{}, map[string][]float64{}
	key := func(name string, c int) string { return fmt.Sprint(c, name) }
	for round := range b.rounds {
		fmt.Fprintf(os.Stderr, "  round %d of %d\n", round+1, b.rounds)
		for _, c := range conc {
			for _, who := range all {
				f, err := who.run(ctx, c)
				if err != nil {
					return fmt.Errorf("%s at %d: %w", who.name, c, err)
				}
				if f.Rate > 0 {
					rates[key(who.name, c)] = append(rates[key(who.name, c)], f.Rate)
					p50[key(who.name, c)] = append(p50[key(who.name, c)], f.P50)
				}
			}
		}
	}
	fmt.Printf("\n| pool | tasks/s, 1 caller | median µs | ÷ seed's | tasks/s, %d callers | ÷ seed's |\n|---|---:|---:|---:|---:|---:|\n", most)
	spread := func(v []float64) string {
		if len(v) == 0 {
			return "–"
		}
		return fmt.Sprintf("**%s** (%s–%s)", number(harness.Median(v)), number(slices.Min(v)), number(slices.Max(v)))
	}
	ratio := func(name string, c int) float64 {
		return harness.Median(rates[key(name, c)]) / harness.Median(rates[key(all[1].name, c)])
	}
	for _, who := range all {
		fmt.Printf("| %s | %s | %s | %s | %s | %s |\n", who.name, spread(rates[key(who.name, 1)]), number(harness.Median(p50[key(who.name, 1)])),
			number(ratio(who.name, 1)), spread(rates[key(who.name, most)]), number(ratio(who.name, most)))
	}
	goName, nodeName, one := all[9].name, all[6].name, all[5].name
	floor := harness.Median(p50[key(all[0].name, 1)])
	mine := harness.Median(p50[key(goName, 1)])
	fast := harness.Median(rates[key(goName, most)])
	fmt.Printf("\n- Node worker of the seed, 1 caller: %s × the seed's pool (want ≥ 1.5): %s\n", number(ratio(one, 1)), b.verdict(ratio(one, 1) >= 1.5))
	fmt.Printf("- Node worker of the seed, %d callers: %s × the seed's pool (want ≥ 1.5): %s; one task at a time: %s ×\n", most,
		number(ratio(nodeName, most)), b.verdict(ratio(nodeName, most) >= 1.5), number(ratio(one, most)))
	fmt.Printf("- Go workers, %d callers: %s tasks/s (want ≥ 150 k): %s\n", most, number(fast), b.verdict(fast >= 150e3))
	fmt.Printf("- Go workers, 1 caller: %s µs, %s × the floor of %s µs (want ≤ 2): %s\n", number(mine), number(mine/floor), number(floor), b.verdict(mine <= 2*floor))
	return nil
}

// shared sends 64 MiB there and back: by socket, by shared memory into and out
// of which they are copied, and in place.
func (b *bench) shared(ctx context.Context) error {
	const size = 64 << 20
	o := b.options(pool.Frames, 1, b.self)
	o.Size, o.MaxMessage = 1, size
	socket := o
	socket.SharedMemory = -1
	times := map[string][]float64{}
	for range b.rounds {
		for _, way := range []struct {
			name    string
			o       pool.Options
			inPlace bool
		}{{"socket", socket, false}, {"copied", o, false}, {"in place", o, true}} {
			err := with(ctx, way.o, func(p *pool.Pool) error {
				took, err := thereAndBack(ctx, p, size, way.inPlace)
				times[way.name] = append(times[way.name], took...)
				return err
			})
			if err != nil {
				return fmt.Errorf("%s: %w", way.name, err)
			}
		}
	}
	s, c, m := harness.Median(times["socket"]), harness.Median(times["copied"]), harness.Median(times["in place"])
	fmt.Printf("\n64 MiB there and back, median of %d: by socket %s ms; by shared memory %s ms where it is copied in and out (%s × faster), %s ms in place: %s × faster (want ≥ 5): %s\n",
		len(times["socket"]), number(s), number(c), number(s/c), number(m), number(s/m), b.verdict(s/m >= 5))
	return nil
}

// thereAndBack returns the milliseconds that each of some tasks took, once the
// segments are there.
func thereAndBack(ctx context.Context, p *pool.Pool, size int, inPlace bool) (took []float64, err error) {
	t := pool.Task{Name: "echo"}
	if inPlace {
		buf, err := p.Buffer(size)
		if err != nil {
			return nil, err
		}
		defer buf.Release()
		t.Body, t.Buffer, t.ShareResult = buf.Bytes(), buf, true
	} else {
		t.Body = make([]byte, size)
	}
	for i := range t.Body {
		t.Body[i] = byte(i >> 12)
	}
	for i := range 7 {
		from := time.Now()
		r, err := p.Do(ctx, t)
		if err != nil {
			return nil, err
		}
		if i > 0 {
			took = append(took, float64(time.Since(from))/1e6)
		}
		same := bytes.Equal(r.Body, t.Body)
		r.Release()
		if !same {
			return nil, errors.New("the answer is another")
		}
	}
	return took, nil
}

// scale is how the cost of a task grows with the number of workers.
func (b *bench) scale(ctx context.Context) error {
	fmt.Print("\n| Go workers | callers | tasks/s | median µs | parent's CPU a task, µs | parent's heap a worker, KB | start to last worker up, ms |\n|---:|---:|---:|---:|---:|---:|---:|\n")
	for _, n := range []int{1, 2, 8, 64, 512} {
		var rate, p50, cpu, heap, up []float64
		for range min(b.rounds, 3) {
			o := b.options(pool.Frames, max(1, 64/n), b.self)
			o.Size = n
			before := heapInUse()
			began := time.Now()
			err := with(ctx, o, func(p *pool.Pool) error {
				if err := allUp(ctx, p, n); err != nil {
					return err
				}
				up = append(up, float64(time.Since(began))/1e6)
				if _, err := drive(ctx, p, 64, 300*time.Millisecond); err != nil {
					return err
				}
				heap = append(heap, float64(heapInUse()-before)/float64(n)/1024)
				c := cpuTime()
				f, err := drive(ctx, p, 64, b.length)
				cpu = append(cpu, (cpuTime()-c).Seconds()*1e6/(f.Rate*b.length.Seconds()))
				rate, p50 = append(rate, f.Rate), append(p50, f.P50)
				return err
			})
			if err != nil {
				return fmt.Errorf("%d workers: %w", n, err)
			}
		}
		fmt.Printf("| %d | 64 | %s | %s | %s | %s | %s |\n", n, number(harness.Median(rate)), number(harness.Median(p50)),
			number(harness.Median(cpu)), number(harness.Median(heap)), number(harness.Median(up)))
	}
	return nil
}

func allUp(ctx context.Context, p *pool.Pool, n int) error {
	return harness.Eventually(60*time.Second, func() error {
		if s := p.Stats(); s.Up < n && ctx.Err() == nil {
			return fmt.Errorf("%d of %d workers are up", s.Up, n)
		}
		return ctx.Err()
	})
}

func heapInUse() int64 {
	runtime.GC()
	var m runtime.MemStats
	runtime.ReadMemStats(&m)
	return int64(m.HeapAlloc + m.StackInuse)
}

func cpuTime() time.Duration {
	var u syscall.Rusage
	if syscall.Getrusage(syscall.RUSAGE_SELF, &u) != nil {
		return 0
	}
	return time.Duration(u.Utime.Nano() + u.Stime.Nano())
}
