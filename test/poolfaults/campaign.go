package main

import (
	"bufio"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"maps"
	"math/rand/v2"
	"os"
	"path/filepath"
	"runtime"
	"runtime/debug"
	"slices"
	"strconv"
	"strings"
	"sync"
	"sync/atomic"
	"syscall"
	"time"

	"golang.org/x/sys/unix"

	"github.com/remuda-dev/remuda/pool"
	"github.com/remuda-dev/remuda/test/harness"
)

const (
	workers    = 4
	submitters = 24              // of each pool
	patience   = 2 * time.Second // for one task on a worker
	grace      = 300 * time.Millisecond
	// hung is when a task counts as one that never ends: with all its attempts
	// it has to wait for others that use up their patience.
	hung = 120 * time.Second

	maxMemory = 200 << 20 // bytes of a worker
)

// campaign is one run.
type campaign struct {
	tasks int
	seed  uint64
	only  string

	dir     string
	log     string
	began   time.Time
	next    atomic.Uint64
	kills   atomic.Int64
	stops   atomic.Int64
	samples []sample

	mu       sync.Mutex
	outcomes map[string]map[string]int // by pool, by kind
	once     map[uint64]bool           // tasks that must not be begun twice: whether they succeeded
	found    []string
}

// sample is what the process used at one moment.
type sample struct {
	rss, heap  int64
	fds, procs int
	goroutines int
}

func (c *campaign) violation(format string, args ...any) {
	c.mu.Lock()
	defer c.mu.Unlock()
	if c.found = append(c.found, fmt.Sprintf(format, args...)); len(c.found) <= 20 {
		fmt.Println("VIOLATION:", c.found[len(c.found)-1])
	}
}

func (c *campaign) run(ctx context.Context) (err error) {
	if c.dir, err = os.MkdirTemp("", "poolfaults"); err != nil {
		return err
	}
	defer func() { err = errors.Join(err, os.RemoveAll(c.dir)) }()
	c.log = filepath.Join(c.dir, "begun")
	if err := os.WriteFile(c.log, nil, 0o600); err != nil {
		return err
	}
	c.outcomes, c.once = map[string]map[string]int{}, map[uint64]bool{}
	shares, err := c.shares()
	if err != nil {
		return err
	}
	if c.only != "" {
		shares = slices.DeleteFunc(shares, func(s share) bool { return !slices.Contains(strings.Split(c.only, ","), s.name) })
	}
	if err := c.warm(ctx, shares); err != nil {
		return err
	}
	before := c.look()
	c.began = time.Now()
	fmt.Printf("%d tasks, seed %d; at rest: %s\n", c.tasks, c.seed, before)
	watch, end := context.WithCancel(ctx)
	var side sync.WaitGroup
	side.Go(func() { c.sampler(watch) })
	side.Go(func() { c.killer(watch) })
	total := 0
	for _, s := range shares {
		total += s.permille
	}
	var all sync.WaitGroup
	for i, s := range shares {
		all.Go(func() { c.pool(ctx, s, c.tasks*s.permille/total, uint64(i)) })
	}
	all.Wait()
	end()
	side.Wait()
	c.leftovers(before)
	c.flat()
	return errors.Join(ctx.Err(), c.begun())
}

// warm starts and ends every pool once, so that what a process makes only once
// (threads, poll descriptors) is there before anything is counted.
func (c *campaign) warm(ctx context.Context, shares []share) error {
	for _, s := range shares {
		p, err := pool.New(c.options(s))
		if err != nil {
			return err
		}
		_, err = p.Do(ctx, pool.Task{Body: []byte(`{"n":0}`)})
		if err = errors.Join(err, p.Close(ctx)); err != nil {
			return fmt.Errorf("%s does not even work without faults: %w", s.name, err)
		}
	}
	return nil
}

func (c *campaign) options(s share) pool.Options {
	memory := int64(maxMemory)
	if s.protocol == pool.Exec {
		memory = 0
	}
	return pool.Options{
		MaxMemory: memory, // what blows up costs its worker
		Name:      s.name, Command: s.command, Protocol: s.protocol, Size: workers,
		Concurrency: map[pool.Protocol]int{pool.Frames: 4, pool.Node: 1, pool.JSONLines: 2, pool.Exec: 1}[s.protocol],
		Env:         append(os.Environ(), modeVar+"="+s.mode, logVar+"="+c.log, dirVar+"="+c.dir),
		Timeout:     patience, Grace: grace,
	}
}

// faults are what a task can ask for, by how likely each is.
func faults() []string {
	return []string{
		"kill", "kill", "kill", "garbage", "garbage", "half", "close", "exit0", "exit0", "leak", "gift",
		"panic", "error", "error", "error", "stop", "spin", "balloon",
	}
}

// pool gives n tasks to one pool.
func (c *campaign) pool(ctx context.Context, s share, n int, id uint64) {
	p, err := pool.New(c.options(s))
	if err != nil {
		c.violation("%s: %v", s.name, err)
		return
	}
	var left atomic.Int64
	left.Store(int64(n))
	// One fault for so many tasks: each costs a worker, and the slow ones its
	// patience.
	rate := 0.004
	if s.protocol == pool.Exec {
		rate = 0.05
	}
	counts := make([]map[string]int, submitters)
	var wg sync.WaitGroup
	for i := range submitters {
		counts[i] = map[string]int{}
		rnd := rand.New(rand.NewPCG(c.seed, id<<8|uint64(i)))
		wg.Go(func() {
			for left.Add(-1) >= 0 && ctx.Err() == nil {
				counts[i][c.task(ctx, p, s, rnd, rate)]++
			}
		})
	}
	wg.Wait()
	cctx, cancel := context.WithTimeout(ctx, 30*time.Second)
	defer cancel()
	if err := p.Close(cctx); err != nil {
		c.violation("%s: close: %v", s.name, err)
	}
	st := p.Stats()
	if st.Running != 0 || st.Queued != 0 || st.Up != 0 {
		c.violation("%s: after Close %d run, %d wait, %d workers are up", s.name, st.Running, st.Queued, st.Up)
	}
	sum := map[string]int{}
	for _, m := range counts {
		for k, v := range m {
			sum[k] += v
		}
	}
	c.mu.Lock()
	c.outcomes[s.name] = sum
	c.mu.Unlock()
	fmt.Printf("%-14s done after %s: %s\n", s.name, time.Since(c.began).Round(time.Millisecond), describe(sum))
}

// task has one task done and says how it ended.
func (c *campaign) task(ctx context.Context, p *pool.Pool, s share, rnd *rand.Rand, rate float64) string {
	o := order{N: c.next.Add(1)}
	if rnd.Float64() < rate {
		all := faults()
		o.Fault = all[rnd.IntN(len(all))]
	}
	switch rnd.IntN(300) {
	case 0:
		o.Pad = strings.Repeat("x", 1<<rnd.IntN(19)) // also by shared memory
	case 1, 2, 3:
		o.Pad = strings.Repeat("y", rnd.IntN(9000))
	}
	body, err := json.Marshal(o)
	if err != nil {
		panic(err) // numbers and strings
	}
	t := pool.Task{Body: body, Priority: rnd.IntN(10), Idempotent: rnd.IntN(2) == 0}
	tctx, cancel := ctx, context.CancelFunc(func() {})
	impatient := rnd.IntN(500) == 0
	if impatient { // a caller that leaves
		tctx, cancel = context.WithTimeout(ctx, time.Duration(rnd.Int64N(int64(5*time.Millisecond))))
	}
	late := time.AfterFunc(hung, func() {
		c.violation("%s: task %d (%q) has not ended after %s", s.name, o.N, o.Fault, hung)
		buf := make([]byte, 4<<20)
		_ = os.WriteFile("poolfaults.stacks", buf[:runtime.Stack(buf, true)], 0o600)
	})
	res, err := p.Do(tctx, t)
	late.Stop()
	cancel()
	if !t.Idempotent {
		c.mu.Lock()
		c.once[o.N] = err == nil
		c.mu.Unlock()
	}
	if err == nil {
		if s.protocol == pool.Exec && o.Fault != "" && len(res.Body) == 0 {
			return "done" // it ended with code 0 and had nothing to say
		}
		var r reply
		if uerr := json.Unmarshal(res.Body, &r); uerr != nil || r.N != o.N || r.Pad != len(o.Pad) {
			c.violation("%s: task %d with %d bytes ended in %.100q", s.name, o.N, len(o.Pad), res.Body)
		}
		return "done"
	}
	return c.kind(s, o, t, err, impatient)
}

// kind is the name of a typed error; one that is not is a violation.
func (c *campaign) kind(s share, o order, t pool.Task, err error, impatient bool) string {
	var te *pool.TaskError
	var we *pool.WorkerError
	switch {
	case errors.Is(err, pool.ErrPoison):
		return "poison"
	case errors.As(err, &te):
		if o.Fault == "" && s.protocol != pool.Exec {
			c.violation("%s: task %d asked for nothing and failed: %v", s.name, o.N, err)
		}
		return "task error"
	case errors.As(err, &we) && errors.Is(err, pool.ErrWorkerDied):
		return "worker died"
	case errors.Is(err, pool.ErrTimeout):
		return "timed out"
	case impatient && errors.Is(err, context.DeadlineExceeded):
		return "left"
	case errors.Is(err, pool.ErrNoWorkers):
		return "no workers" // all were killed as they came up
	default:
		c.violation("%s: task %d (fault %q, idempotent %v): unexpected %v", s.name, o.N, o.Fault, t.Idempotent, err)
		return "other"
	}
}

// killer kills and stops workers that it meets.
func (c *campaign) killer(ctx context.Context) {
	rnd := rand.New(rand.NewPCG(c.seed, 1<<40))
	self := os.Getpid()
	for ctx.Err() == nil {
		select {
		case <-ctx.Done():
		case <-time.After(time.Duration(rnd.Int64N(int64(150 * time.Millisecond)))):
		}
		pids := harness.Children(self)
		if len(pids) == 0 {
			continue
		}
		pid := pids[rnd.IntN(len(pids))]
		// A child that is stopped before its exec holds up this whole process:
		// fork is vfork, and not what is tested.
		if env, err := os.ReadFile(fmt.Sprintf("/proc/%d/environ", pid)); err != nil || !strings.Contains(string(env), c.dir) {
			continue
		}
		// Most of them have had time to come up: one that is killed whenever it
		// starts is in backoff for good.
		if p, ok := harness.Stat(pid); !ok || uptime()-p.Start < 200 && rnd.IntN(10) > 0 {
			continue
		}
		if rnd.IntN(4) == 0 {
			if syscall.Kill(pid, syscall.SIGSTOP) == nil {
				c.stops.Add(1)
			}
		} else if syscall.Kill(pid, syscall.SIGKILL) == nil {
			c.kills.Add(1)
		}
	}
}

// uptime is the time since boot in the ticks of harness.Proc.Start, which are
// hundredths of a second.
func uptime() uint64 {
	var t unix.Timespec
	if unix.ClockGettime(unix.CLOCK_BOOTTIME, &t) != nil {
		return 0
	}
	return uint64(t.Sec)*100 + uint64(t.Nsec)/1e7
}

// sampler looks at what this process uses.
func (c *campaign) sampler(ctx context.Context) {
	t := time.NewTicker(500 * time.Millisecond)
	defer t.Stop()
	for {
		select {
		case <-ctx.Done():
			return
		case <-t.C:
			c.samples = append(c.samples, c.look())
			if n := len(c.samples); n%20 == 0 {
				fmt.Printf("  %4ds: %d tasks begun; %s\n", n/2, c.next.Load(), c.samples[n-1])
			}
		}
	}
}

// look counts what the process has.
func (c *campaign) look() sample {
	var s sample
	s.rss, _ = harness.Memory(os.Getpid())
	var m runtime.MemStats
	runtime.ReadMemStats(&m)
	s.heap = int64(m.HeapAlloc)
	s.goroutines = runtime.NumGoroutine()
	if fds, err := os.ReadDir("/proc/self/fd"); err == nil {
		s.fds = len(fds) - 1 // its own
	}
	s.procs = len(harness.Children(os.Getpid()))
	return s
}

func (s sample) String() string {
	return fmt.Sprintf("RSS %.1f MB, heap %.1f MB, %d goroutines, %d descriptors, %d processes",
		float64(s.rss)/1e6, float64(s.heap)/1e6, s.goroutines, s.fds, s.procs)
}

// leftovers finds what is there that was not before.
func (c *campaign) leftovers(before sample) {
	err := harness.Eventually(10*time.Second, func() error {
		runtime.GC()
		now := c.look()
		var bad []string
		if now.goroutines > before.goroutines {
			bad = append(bad, fmt.Sprintf("%d goroutines, %d before", now.goroutines, before.goroutines))
		}
		if now.fds > before.fds {
			bad = append(bad, fmt.Sprintf("%d descriptors, %d before: %s", now.fds, before.fds, descriptors()))
		}
		if left := harness.Belonging(c.dir); len(left) > 0 || now.procs > 0 {
			bad = append(bad, fmt.Sprintf("%d processes are left: %s", max(len(left), now.procs), harness.Describe(left)))
		}
		if n := mappings(); n > 0 {
			bad = append(bad, fmt.Sprintf("%d shared segments are mapped", n))
		}
		if dirs := cgroups(); len(dirs) > 0 {
			bad = append(bad, "control groups are left: "+strings.Join(dirs, " "))
		}
		if len(bad) > 0 {
			return errors.New(strings.Join(bad, "; "))
		}
		return nil
	})
	if err != nil {
		c.violation("at the end: %v", err)
		buf := make([]byte, 1<<20)
		fmt.Printf("%s\n", buf[:runtime.Stack(buf, true)])
	}
	debug.FreeOSMemory()
	fmt.Println("at the end:", c.look())
}

func descriptors() string {
	fds, err := os.ReadDir("/proc/self/fd")
	if err != nil {
		return err.Error()
	}
	count := map[string]int{}
	for _, f := range fds {
		to, err := os.Readlink("/proc/self/fd/" + f.Name())
		if err == nil {
			count[strings.TrimRight(to, "0123456789[]:")]++
		}
	}
	return describe(count)
}

// mappings is how many segments of shared memory are mapped.
func mappings() int {
	f, err := os.Open("/proc/self/maps")
	if err != nil {
		return 0
	}
	defer f.Close()
	n := 0
	for s := bufio.NewScanner(f); s.Scan(); {
		if strings.Contains(s.Text(), "/memfd:") {
			n++
		}
	}
	return n
}

// cgroups are the folders of this process's pools.
func cgroups() (found []string) {
	mark := "pool" + strconv.Itoa(os.Getpid()) + "."
	for _, root := range []string{"/sys/fs/cgroup", "/sys/fs/cgroup/unified", "/sys/fs/cgroup/memory"} {
		dirs, err := filepath.Glob(root + "/*/*" + mark + "*")
		more, err2 := filepath.Glob(root + "/*" + mark + "*")
		if errors.Join(err, err2) == nil {
			found = append(append(found, dirs...), more...)
		}
	}
	return found
}

// flat compares the memory of the last third of the run with that of the
// second.
func (c *campaign) flat() {
	n := len(c.samples)
	if n < 30 {
		return // too short to say
	}
	third := func(from, to int) float64 {
		var v []float64
		for _, s := range c.samples[from:to] {
			v = append(v, float64(s.rss))
		}
		return harness.Median(v)
	}
	mid, end := third(n/3, 2*n/3), third(2*n/3, n)
	fmt.Printf("resident memory: %.1f MB in the second third of the run, %.1f MB in the last\n", mid/1e6, end/1e6)
	// The record of what must be begun once is the campaign's own: 40 bytes a
	// task.
	own := float64(c.tasks) * 40
	if end > mid*1.2+own+16e6 {
		c.violation("memory grows: %.1f MB, then %.1f MB", mid/1e6, end/1e6)
	}
}

// begun checks the workers' record: a task that may not be repeated was begun
// once at most, and one that succeeded was begun.
func (c *campaign) begun() error {
	f, err := os.Open(c.log)
	if err != nil {
		return err
	}
	defer f.Close()
	times := make([]uint8, c.next.Load()+1)
	r := bufio.NewReaderSize(f, 1<<20)
	for {
		line, err := r.ReadString('\n')
		if errors.Is(err, io.EOF) {
			break
		}
		if err != nil {
			return err
		}
		n, err := strconv.ParseUint(strings.TrimSpace(line), 10, 64)
		if err != nil || n >= uint64(len(times)) {
			return fmt.Errorf("the record has the line %q", line)
		}
		times[n]++
	}
	for n, done := range c.once {
		if times[n] > 1 {
			c.violation("task %d may not be repeated and was begun %d times", n, times[n])
		}
		if done && times[n] == 0 {
			c.violation("task %d succeeded and no worker has seen it", n)
		}
	}
	return nil
}

func (c *campaign) report() int {
	total, sum := 0, map[string]int{}
	for _, m := range c.outcomes {
		for k, v := range m {
			sum[k] += v
			total += v
		}
	}
	fmt.Printf("%d tasks in %s: %s\n", total, time.Since(c.began).Round(time.Second), describe(sum))
	fmt.Printf("%d workers were killed from outside, %d stopped\n", c.kills.Load(), c.stops.Load())
	if len(c.found) > 0 {
		fmt.Printf("%d violations; seed %d\n", len(c.found), c.seed)
		return 1
	}
	fmt.Println("0 violations")
	return 0
}

func describe(m map[string]int) string {
	var out []string
	for _, k := range slices.Sorted(maps.Keys(m)) {
		out = append(out, fmt.Sprintf("%d %s", m[k], k))
	}
	return strings.Join(out, ", ")
}
