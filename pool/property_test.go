package pool

import (
	"context"
	"errors"
	"fmt"
	"math/rand/v2"
	"os"
	"strings"
	"sync"
	"syscall"
	"testing"
	"testing/synctest"
	"time"

	"github.com/remuda-dev/remuda/ipc"
	"github.com/remuda-dev/remuda/proc"
)

// fake is a worker that does to each task what the task's body says, in false
// time: it is both the process and its channel.
type fake struct {
	pid       int
	startWait time.Duration

	mu     sync.Mutex
	reqs   map[*ipc.Request]bool // under way
	gone   bool
	closed chan struct{} // the channel
	done   chan struct{} // the process
	exit   proc.Exit
	log    *fakeLog
}

// fakeLog watches over all workers of a test.
type fakeLog struct {
	mu        sync.Mutex
	live      int
	most      int           // that lived at a time
	startWait time.Duration // of those that are started now
	started   []string      // the tasks, in order
}

func (f *fake) end(e proc.Exit, channel, process bool) {
	f.mu.Lock()
	defer f.mu.Unlock()
	if channel && !f.gone {
		f.gone = true
		close(f.closed)
	}
	if process {
		select {
		case <-f.done:
		default:
			f.exit = e
			f.log.mu.Lock()
			f.log.live--
			f.log.mu.Unlock()
			close(f.done)
		}
	}
}

func (f *fake) Serve(ready func()) error {
	if f.startWait > 0 {
		select {
		case <-time.After(f.startWait):
			ready()
		case <-f.closed:
		}
	} else {
		ready()
	}
	<-f.closed
	f.mu.Lock()
	left := f.reqs
	f.reqs = nil
	f.mu.Unlock()
	for r := range left {
		r.To.End(r, nil, ipc.ErrClosed)
	}
	return nil
}

func (f *fake) answer(r *ipc.Request, body []byte, err error) {
	f.mu.Lock()
	mine := f.reqs[r]
	delete(f.reqs, r)
	f.mu.Unlock()
	if mine {
		r.To.End(r, body, err)
	}
}

func (f *fake) Start(r *ipc.Request) error {
	f.mu.Lock()
	if f.gone {
		f.mu.Unlock()
		return ipc.ErrClosed
	}
	if string(r.Body) == "unsendable" {
		f.mu.Unlock()
		return ipc.ErrTooLarge
	}
	f.reqs[r] = true
	f.mu.Unlock()
	f.log.mu.Lock()
	f.log.started = append(f.log.started, r.Name)
	f.log.mu.Unlock()
	if d, err := time.ParseDuration(string(r.Body)); err == nil {
		time.AfterFunc(d, func() { f.answer(r, []byte("done"), nil) })
		return nil
	}
	after := func(what func()) {
		time.AfterFunc(time.Duration(rand.IntN(2000))*time.Millisecond, what)
	}
	switch string(r.Body) {
	case "ok":
		after(func() { f.answer(r, []byte("done"), nil) })
	case "fail":
		after(func() { f.answer(r, nil, &TaskError{Message: "no"}) })
	case "die":
		after(func() { f.end(proc.Exit{Code: -1, Signal: syscall.SIGKILL}, true, true) })
	case "close": // the channel only
		after(func() { f.end(proc.Exit{}, true, false) })
	case "leave": // the process, before its channel
		after(func() {
			f.end(proc.Exit{Code: 3}, false, true)
			after(func() { f.end(proc.Exit{}, true, false) })
		})
	case "hang":
	}
	return nil
}

func (f *fake) Cancel(r *ipc.Request) bool {
	if string(r.Body) == "ok" {
		time.AfterFunc(10*time.Millisecond, func() { f.answer(r, nil, &TaskError{Code: ipc.CodeCancelled}) })
	}
	return string(r.Body) != "fail"
}

func (f *fake) Ping() bool    { return true }
func (f *fake) Heard() uint64 { return 0 }
func (f *fake) Stop() {
	if f.pid%2 == 0 { // the others do not listen
		f.end(proc.Exit{}, true, true)
	}
}
func (f *fake) Close() { f.end(proc.Exit{}, true, false) }

func (f *fake) ID() proc.ID           { return proc.ID{PID: f.pid} }
func (f *fake) Done() <-chan struct{} { return f.done }
func (f *fake) Exit() proc.Exit {
	f.mu.Lock()
	defer f.mu.Unlock()
	return f.exit
}
func (f *fake) Signal(sig syscall.Signal) error     { return f.SignalTree(sig) }
func (f *fake) SignalTree(sig syscall.Signal) error { return nil }
func (f *fake) KillTree(context.Context) error {
	f.end(proc.Exit{Code: -1, Signal: syscall.SIGKILL}, true, true)
	return nil
}
func (f *fake) Members() ([]int, error) { return nil, nil }
func (f *fake) Release() error {
	select {
	case <-f.done:
		return nil
	default:
		return errors.New("released while it lives")
	}
}

// fakePool makes a pool of fakes; one in ten fails to start or to be ready.
func fakePool(t *testing.T, o Options, flaky bool) (*Pool, *fakeLog) {
	t.Helper()
	if err := o.complete(); err != nil {
		t.Fatal(err)
	}
	log, n := &fakeLog{}, 0
	p, err := start(o, func(context.Context, int) (proc.Process, ipc.Conn, error) {
		log.mu.Lock()
		defer log.mu.Unlock()
		if n++; flaky && n%10 == 0 {
			return nil, nil, os.ErrPermission
		}
		f := &fake{pid: n, reqs: map[*ipc.Request]bool{}, closed: make(chan struct{}), done: make(chan struct{}), log: log}
		f.startWait = log.startWait
		if flaky && n%10 == 5 {
			f.startWait = time.Hour
		}
		log.live++
		log.most = max(log.most, log.live)
		return f, f, nil
	})
	if err != nil {
		t.Fatal(err)
	}
	return p, log
}

// Every task ends exactly once, in success or a typed error, whatever its
// worker does, and nothing is left.
func TestEveryTaskEndsOnce(t *testing.T) {
	for seed := range 12 {
		t.Run(fmt.Sprint(seed), func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				rnd := rand.New(rand.NewPCG(uint64(seed), 1))
				o := Options{
					Min: 1 + rnd.IntN(4), Concurrency: 1 + rnd.IntN(3), Queue: 1 + rnd.IntN(50), Full: FullPolicy(rnd.IntN(3)),
					Balance: Balance(rnd.IntN(4)), Ageing: time.Duration(rnd.IntN(2)) * time.Second, Spares: rnd.IntN(3),
					ScaleDownIdle: time.Duration(1+rnd.IntN(10)) * time.Second, Cooldown: time.Duration(rnd.IntN(2)) * time.Second, PoisonAfter: 20,
					Timeout: 5 * time.Second, MaxTasks: rnd.IntN(2) * 7, MaxAge: time.Duration(rnd.IntN(2)) * 20 * time.Second,
					Heartbeat: time.Duration(rnd.IntN(2)) * 10 * time.Second,
				}
				o.Max = o.Min + rnd.IntN(4)
				most := o.Max
				p, log := fakePool(t, o, true)
				var (
					wg   sync.WaitGroup
					mu   sync.Mutex
					ends = map[string]int{}
				)
				const tasks = 400
				what := []string{"ok", "ok", "ok", "ok", "fail", "die", "close", "leave", "hang", "unsendable"}
				for range tasks {
					time.Sleep(time.Duration(rnd.IntN(300)) * time.Millisecond)
					task := Task{Body: []byte(what[rnd.IntN(len(what))]), Priority: rnd.IntN(10), Idempotent: rnd.IntN(2) == 0}
					if k := rnd.IntN(8); k > 0 {
						task.Key = fmt.Sprint(k)
					}
					if rnd.IntN(20) == 0 {
						least := 1 + rnd.IntN(4)
						if err := p.Scale(least, least+rnd.IntN(4)); err != nil {
							t.Error("Scale:", err)
						}
						most = max(most, p.Stats().Max)
					}
					if rnd.IntN(20) == 0 {
						wg.Go(func() {
							ctx, cancel := context.WithTimeout(context.Background(), time.Minute)
							defer cancel()
							all, err := p.Broadcast(ctx, Task{Body: []byte("1s")})
							if err != nil && !errors.Is(err, ErrNoWorkers) {
								t.Error("Broadcast:", err)
							}
							for _, r := range all {
								if r.Err != nil && !errors.Is(r.Err, ErrWorkerDied) && !errors.Is(r.Err, ErrTimeout) {
									t.Error("Broadcast:", r.Err)
								}
								if r.Attempts > 1 {
									t.Errorf("a broadcast was given to %d workers", r.Attempts)
								}
								if r.Err == nil {
									mu.Lock()
									ends["done"]++
									mu.Unlock()
								}
							}
						})
					}
					if s := p.Stats(); s.Size < s.Min || s.Size > s.Max {
						t.Errorf("a size of %d, where %d to %d are allowed", s.Size, s.Min, s.Max)
					}
					patience := time.Duration(rnd.IntN(120)) * time.Second
					wg.Go(func() {
						ctx, cancel := context.WithTimeout(context.Background(), patience)
						defer cancel()
						_, err := p.Do(ctx, task)
						kind := "?"
						var te *TaskError
						for name, known := range map[string]bool{
							"done": err == nil, "failed": errors.As(err, &te), "died": errors.Is(err, ErrWorkerDied), "timeout": errors.Is(err, ErrTimeout),
							"full": errors.Is(err, ErrQueueFull), "dropped": errors.Is(err, ErrDropped), "poison": errors.Is(err, ErrPoison), "none": errors.Is(err, ErrNoWorkers), "unsendable": errors.Is(err, ipc.ErrTooLarge),
						} {
							if known {
								kind = name
							}
						}
						if kind == "?" {
							t.Errorf("%s ended with %v", task.Body, err)
						}
						mu.Lock()
						ends[kind]++
						mu.Unlock()
					})
				}
				wg.Wait()
				s := p.Stats()
				if n := s.Done + s.Failed + s.TimedOut + s.Cancelled + s.Lost + s.Dropped; n != s.Accepted {
					t.Errorf("%d accepted, %d ended: %+v", s.Accepted, n, s)
				}
				if ends["done"] != int(s.Done) || ends["done"] == 0 {
					t.Errorf("ends %v, stats %+v", ends, s)
				}
				log.mu.Lock()
				if log.most > most+o.Spares {
					t.Errorf("%d workers lived at a time, where %d and %d spares are allowed", log.most, most, o.Spares)
				}
				log.mu.Unlock()
				// Left alone it comes down to its least, and nothing ticks.
				time.Sleep(10 * time.Minute)
				p.mu.Lock()
				if h := &p.shape; h.size != h.min || h.serving != h.size && o.MaxAge == 0 || h.wanted != h.size+o.Spares || h.grow != nil || h.shrink != nil || p.waiting != 0 || p.keyed != 0 {
					t.Errorf("left alone: a size of %d, %d serve, %d wanted, timers %v %v, %d wait", h.size, h.serving, h.wanted, h.grow, h.shrink, p.waiting)
				}
				p.mu.Unlock()
				if err := p.Close(context.Background()); err != nil {
					t.Error("Close:", err)
				}
				synctest.Wait()
				s = p.Stats()
				if s.Running != 0 || s.Queued != 0 || s.Up != 0 || s.Busy != 0 || p.active != nil || p.open != 0 || log.live != 0 {
					t.Errorf("left: %+v, %d open, %d workers live", s, p.open, log.live)
				}
			})
		})
	}
}

// The most urgent goes first, and among equals the first.
func TestPriorities(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		p, log := fakePool(t, Options{Size: 1}, false)
		synctest.Wait()
		var wg sync.WaitGroup
		for i, prio := range []int{0, 0, 3, 9, 3, 1, 9} {
			wg.Go(func() {
				_, _ = p.Do(context.Background(), Task{Name: fmt.Sprint(prio, "-", i), Body: []byte("ok"), Priority: prio})
			})
			synctest.Wait()
		}
		wg.Wait()
		if got, want := strings.Join(log.started, " "), "0-0 9-3 9-6 3-2 3-4 1-5 0-1"; got != want {
			t.Errorf("begun as %s, want %s", got, want)
		}
		_ = p.Close(context.Background())
	})
}

// A pool of a command that cannot be started says so, tries on, and heals.
func TestHeals(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		o := Options{Size: 2}
		if err := o.complete(); err != nil {
			t.Fatal(err)
		}
		log, broken := &fakeLog{}, true
		p, err := start(o, func(context.Context, int) (proc.Process, ipc.Conn, error) {
			log.mu.Lock()
			defer log.mu.Unlock()
			if broken {
				return nil, nil, os.ErrPermission
			}
			log.live++
			f := &fake{pid: 2, reqs: map[*ipc.Request]bool{}, closed: make(chan struct{}), done: make(chan struct{}), log: log}
			return f, f, nil
		})
		if err != nil {
			t.Fatal(err)
		}
		for range 2 {
			if _, err := p.Do(context.Background(), Task{Body: []byte("ok")}); !errors.Is(err, ErrNoWorkers) || !strings.Contains(err.Error(), "permission denied") {
				t.Errorf("Do = %v", err)
			}
		}
		log.mu.Lock()
		broken = false
		log.mu.Unlock()
		time.Sleep(10 * time.Second)
		if r, err := p.Do(context.Background(), Task{Body: []byte("ok")}); err != nil || string(r.Body) != "done" {
			t.Errorf("Do = %q, %v", r.Body, err)
		}
		_ = p.Close(context.Background())
	})
}
