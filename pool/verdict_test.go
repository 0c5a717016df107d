package pool

import (
	"context"
	"encoding/json"
	"slices"
	"strings"
	"sync"
	"testing"
	"testing/synctest"
	"time"
)

func times(n uint64, mean time.Duration) Times {
	return Times{Count: n, Total: time.Duration(n) * mean}
}

// The rules, as documented at Verdict, at their edges.
func TestVerdictRules(t *testing.T) {
	const ms = time.Millisecond
	fixed := setting{size: 2, least: 2, most: 2, concurrency: 1, processors: 8, protocol: Frames, under: true}
	with := func(change func(*setting)) setting {
		s := fixed
		change(&s)
		return s
	}
	run := times(100, 10*ms)
	for _, c := range []struct {
		name           string
		r              Recent
		s              setting
		want           Bottleneck
		reason, advice string
	}{
		{"nothing", Recent{Span: 15 * time.Second}, with(func(s *setting) { s.under = false }), Idle, "no task in the last 15s", ""},
		{"a task runs, none has ended", Recent{Utilization: 0.5, Waiting: 0.05, Span: time.Second}, fixed, Balanced, "", ""},
		{"no worker starts", Recent{Missing: 1}, with(func(s *setting) { s.broken = "no such file" }), StartBound, "no such file", "by hand"},

		{"starts", Recent{Missing: 0.25, Waiting: 0.25, Start: times(4, 300*ms), Span: 3 * time.Second}, fixed, StartBound, "25 % of the workers' time was not there for tasks, which waited 25 % of the time; 4 workers got ready in the last 3s, each in 300ms", "Spares from 0 to 1"},
		{"is slow to start", Recent{Missing: 1, Waiting: 1, Span: 12 * time.Second}, fixed, StartBound, "no worker got ready in the last 12s", "before they are ready"},
		{"starts, but nothing waits", Recent{Missing: 0.9, Waiting: 0.24, Run: run}, fixed, Balanced, "", ""},
		{"few starts", Recent{Missing: 0.24, Waiting: 1, Run: run}, fixed, Balanced, "", ""},
		{"recycles", Recent{Missing: 0.6, Waiting: 0.9, Start: times(20, ms), Recycled: 18}, fixed, StartBound, "", "18 workers recycled: raise MaxTasks"},
		{"dies", Recent{Missing: 0.6, Waiting: 0.9, Start: times(20, ms), Died: 19}, fixed, StartBound, "", "why workers die: 19 workers did"},
		{"has grown", Recent{Missing: 0.6, Waiting: 0.9, Start: times(20, ms)}, with(func(s *setting) { s.least, s.most = 1, 9; s.spares = 2 }), StartBound, "", "raise Min from 1, or raise Spares from 2 to 4"},

		{"messages", Recent{Overhead: 0.5, Handling: 0.5, Utilization: 0.5, Run: times(9, 40*time.Microsecond), IPC: times(9, 30*time.Microsecond)}, fixed, IPCBound, "of 40µs that a task was on a worker its handler took 10µs; workers computed 50 %", "raise Concurrency from 1 to 8"},
		{"messages, many a worker", Recent{Overhead: 0.9, Handling: 0.1, Utilization: 1, Waiting: 1, IPC: run, Run: run}, with(func(s *setting) { s.concurrency = 8 }), IPCBound, "", "put more work into each task"},
		{"messages wait for a busy worker", Recent{Overhead: 0.9, Handling: 0.98, Utilization: 1, Waiting: 1, IPC: run, Run: run}, fixed, WorkersSaturated, "", ""},
		{"large messages", Recent{Overhead: 0.9, Handling: 0.1, Utilization: 1, Bytes: 3 << 20, IPC: run, Run: run}, fixed, IPCBound, "", "less than the 3072 KiB"},
		{"messages, few tasks", Recent{Overhead: 0.9, Handling: 0.1, Utilization: 0.49, IPC: run, Run: run}, fixed, QueueStarved, "", ""},
		{"small share of messages", Recent{Overhead: 0.49, Handling: 0.5, Utilization: 1, Waiting: 1, IPC: run, Run: run}, fixed, WorkersSaturated, "", ""},
		{"workers do not tell", Recent{Overhead: 0, Handling: 0, Utilization: 1, Waiting: 1, Run: run}, fixed, WorkersSaturated, "", ""},

		{"saturated", Recent{Utilization: 0.8, Waiting: 0.5, Run: run, Wait: times(100, 120*ms)}, fixed, WorkersSaturated, "80 % of the places of 2 workers were taken; tasks waited 120ms for 10ms of work", "raise Size from 2 to 4"},
		{"saturated processors", Recent{Utilization: 1, Waiting: 1, Run: run}, with(func(s *setting) { s.processors = 2 }), WorkersSaturated, "", "more than the 2 processors do not help"},
		{"saturated, grows", Recent{Utilization: 1, Waiting: 1, Run: run}, with(func(s *setting) { s.most = 8 }), WorkersSaturated, "", "2 of up to 8 workers and grows"},
		{"saturated, grown", Recent{Utilization: 1, Waiting: 1, Run: run}, with(func(s *setting) { s.least = 1 }), WorkersSaturated, "", "raise Max from 2 to 4"},
		{"full, nothing waits", Recent{Utilization: 1, Waiting: 0.49, Run: run}, fixed, Balanced, "", ""},
		{"not full, some wait", Recent{Utilization: 0.79, Waiting: 1, Run: run}, fixed, Balanced, "79 % of the places", ""},

		{"starved", Recent{Utilization: 0.1, Waiting: 0.09, Run: run}, with(func(s *setting) { s.size, s.least, s.most = 8, 8, 8 }), QueueStarved, "90 % of the places of 8 workers were free", "lower Size from 8 to 2"},
		{"starved, elastic", Recent{Utilization: 0.1, Run: run}, with(func(s *setting) { s.size, s.least, s.most = 4, 4, 8 }), QueueStarved, "", "lower Min from 4 to 1"},
		{"starved, shrinks", Recent{Utilization: 0.1, Run: run}, with(func(s *setting) { s.size, s.least, s.most = 4, 1, 8 }), QueueStarved, "", "submit more tasks"},
		{"half used", Recent{Utilization: 0.5, Run: run}, fixed, Balanced, "", ""},
		{"some wait", Recent{Utilization: 0.3, Waiting: 0.1, Run: run}, fixed, Balanced, "", ""},
		{"sticky", Recent{Utilization: 0.5, Waiting: 0.5, Run: run}, with(func(s *setting) { s.keyed = true }), WorkersSaturated, "of their keys, while 50 % of the places", "spread Task.Key"},
		{"hardly sticky", Recent{Utilization: 0.5, Waiting: 0.49, Run: run}, with(func(s *setting) { s.keyed = true }), Balanced, "", ""},
	} {
		v := judge(c.r, c.s)
		if v.Bottleneck != c.want || !strings.HasPrefix(v.Reason, c.want.String()+": ") {
			t.Errorf("%s: %+v, want %s", c.name, v, c.want)
		}
		if !strings.Contains(v.Reason, c.reason) || !strings.Contains(v.Advice, c.advice) || (c.want == Balanced || c.want == Idle) && v.Advice != "" {
			t.Errorf("%s: %+v, want %q and %q", c.name, v, c.reason, c.advice)
		}
	}
}

// bring keeps a pool at work by so many callers until its verdict is want.
func bring(t *testing.T, p *Pool, want Bottleneck, callers int, task Task) Stats {
	t.Helper()
	ctx, cancel := context.WithCancel(limit(t))
	var wg sync.WaitGroup
	for range callers {
		wg.Go(func() {
			for ctx.Err() == nil {
				if _, err := p.Do(ctx, task); err != nil && ctx.Err() == nil {
					t.Errorf("%s: %v", want, err)
					return
				}
			}
		})
	}
	var s Stats
	for ctx.Err() == nil {
		if s = p.Stats(); s.Verdict.Bottleneck == want && s.Done > 5 {
			break
		}
		time.Sleep(10 * time.Millisecond)
	}
	cancel()
	wg.Wait()
	if s.Verdict.Bottleneck != want {
		t.Errorf("%s: still %+v", want, s)
	}
	t.Logf("%s (%s)", s.Verdict.Reason, s.Verdict.Advice)
	return s
}

// Each bottleneck, brought about with real workers.
func TestVerdictOfRealPools(t *testing.T) {
	t.Run("saturated", func(t *testing.T) {
		t.Parallel()
		s := bring(t, newPool(t, Options{Size: 1}), WorkersSaturated, 4, Task{Name: "spin", Body: []byte("5ms")})
		if s.Recent.Utilization < 0.8 || s.Wait.P50 < 5*time.Millisecond || s.Run.P50 < 5*time.Millisecond || s.IPC.Count == 0 {
			t.Errorf("%+v", s)
		}
	})
	t.Run("keys", func(t *testing.T) {
		t.Parallel()
		p := newPool(t, Options{Size: 2, Balance: ConsistentHash})
		// Fewer callers than make the load of one worker too uneven.
		s := bring(t, p, WorkersSaturated, 2, Task{Name: "spin", Body: []byte("2ms"), Key: "all the same"})
		if s.Recent.Utilization > 0.8 || !strings.Contains(s.Verdict.Advice, "Task.Key") {
			t.Errorf("%+v", s)
		}
	})
	t.Run("starved", func(t *testing.T) {
		t.Parallel()
		s := bring(t, newPool(t, Options{Size: 3}), QueueStarved, 1, Task{Name: "spin", Body: []byte("1ms")})
		if s.Recent.Utilization > 0.5 || s.Utilization > 0.5 || !strings.Contains(s.Verdict.Advice, "Size from 3") {
			t.Errorf("%+v", s)
		}
	})
	t.Run("messages", func(t *testing.T) {
		t.Parallel()
		s := bring(t, newPool(t, Options{Size: 1}), IPCBound, 1, Task{Body: []byte("x")})
		if s.IPC.Count == 0 || s.IPC.P50 == 0 || s.IPC.P50 > s.Run.P50 || !strings.Contains(s.Verdict.Advice, "Concurrency") {
			t.Errorf("%+v", s)
		}
	})
	t.Run("starts", func(t *testing.T) {
		t.Parallel()
		s := bring(t, newPool(t, Options{Size: 1, MaxTasks: 1}), StartBound, 3, Task{})
		if s.Start.Count < 5 || s.Start.P50 == 0 || s.Recent.Recycled == 0 || !strings.Contains(s.Verdict.Advice, "MaxTasks") {
			t.Errorf("%+v", s)
		}
	})
	t.Run("idle", func(t *testing.T) {
		t.Parallel()
		if v := newPool(t, Options{Size: 1}).Stats().Verdict; v.Bottleneck != Idle {
			t.Errorf("%+v", v)
		}
	})
	t.Run("broken", func(t *testing.T) {
		t.Parallel()
		p := newPool(t, Options{Size: 1, Command: []string{"false"}})
		if _, err := p.Do(limit(t), Task{}); err == nil {
			t.Error("no error")
		}
		if v := p.Stats().Verdict; v.Bottleneck != StartBound || !strings.Contains(v.Reason, "exit code 1") {
			t.Errorf("%+v", v)
		}
	})
}

// A worker with its last task is at work, not missing; and what lies long back
// counts no more.
func TestVerdictOfRecycling(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		p, _ := fakePool(t, Options{Size: 2, MaxTasks: 1, Grace: time.Millisecond}, false)
		var wg sync.WaitGroup
		for range 6 {
			wg.Go(func() {
				for range 30 {
					if _, err := p.Do(context.Background(), Task{Body: []byte("ok")}); err != nil {
						t.Error(err)
					}
				}
			})
		}
		time.Sleep(time.Minute)
		s := p.Stats()
		if s.Verdict.Bottleneck != WorkersSaturated || s.Recent.Missing > 0.1 || s.Utilization < 0.9 || s.Recent.Span < turnTime || s.Recent.Span > 2*turnTime {
			t.Errorf("%+v", s)
		}
		wg.Wait()
		time.Sleep(time.Hour)
		s = p.Stats()
		if s.Verdict.Bottleneck != Idle || s.Recent.Run.Count != 0 || s.Run.Count != 180 || s.Utilization > 0.1 || p.use.busy != 0 || p.use.up != 2 {
			t.Errorf("an hour later: %+v", s)
		}
		_ = p.Close(context.Background())
		synctest.Wait()
		if p.use.up != 0 || p.use.busy != 0 {
			t.Errorf("after Close %d workers are there, %d busy", p.use.up, p.use.busy)
		}
	})
}

// The names of a pool's figures in JSON, which others rely on.
func TestStatsJSON(t *testing.T) {
	b, err := json.Marshal(Stats{Breaker: &BreakerStats{}, Cache: &CacheStats{}})
	if err != nil {
		t.Fatal(err)
	}
	var m map[string]any
	if err := json.Unmarshal(b, &m); err != nil {
		t.Fatal(err)
	}
	var names []string
	var collect func(string, map[string]any)
	collect = func(prefix string, m map[string]any) {
		for k, v := range m {
			if k != strings.ToLower(k) {
				t.Errorf("the name %s%s is not in snake case", prefix, k)
			}
			if sub, ok := v.(map[string]any); ok {
				collect(prefix+k+".", sub)
			} else {
				names = append(names, prefix+k)
			}
		}
	}
	collect("", m)
	for _, want := range []string{
		"size", "up", "busy", "queued", "blocked", "running", "accepted", "done", "failed", "timed_out", "cancelled", "lost",
		"rejected", "breaker_open", "cached", "retried", "died", "recycled", "age_ns", "utilization", "wait.p50_ns", "run.p999_ns",
		"ipc.count", "start.max_ns", "recent.span_ns", "recent.utilization", "recent.bytes_per_task", "recent.wait.total_ns", "verdict.bottleneck",
		"verdict.reason", "breaker.state", "breaker.retry_after_ns", "cache.hits", "cache.bytes",
	} {
		if !slices.Contains(names, want) {
			t.Errorf("%s is not among %v", want, names)
		}
	}
}

func BenchmarkStats(b *testing.B) {
	p := newPool(b, Options{Size: 1})
	if _, err := p.Do(context.Background(), Task{}); err != nil {
		b.Fatal(err)
	}
	b.ReportAllocs()
	for b.Loop() {
		p.Stats()
	}
}

func BenchmarkUsage(b *testing.B) {
	var n int
	u := usage{want: &n, taken: &n, waiting: &n}
	now := time.Now()
	for b.Loop() {
		now = now.Add(time.Microsecond)
		u.change(now, 1, 0)
		u.change(now, -1, 0)
		u.ran(1, 2, 1, 1)
	}
}
