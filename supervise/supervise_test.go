package supervise

import (
	"context"
	"errors"
	"fmt"
	"math/rand/v2"
	"slices"
	"strings"
	"testing"
	"testing/synctest"
	"time"

	"pgregory.net/rapid"
)

// bubble runs f with a fake clock, and shuts the supervisor down behind it.
func bubble(t *testing.T, o Options, f func(t *testing.T, w *world, s *Supervisor)) {
	t.Helper()
	synctest.Test(t, func(t *testing.T) {
		w, s := newWorld(), New(o)
		f(t, w, s)
		if err := s.Shutdown(t.Context()); err != nil && !errors.Is(err, ErrClosed) {
			t.Error(err)
		}
		synctest.Wait()
		if err := w.verdict(); err != nil {
			t.Error(err)
		}
	})
}

func (w *world) add(t *testing.T, s *Supervisor, sp Spec, scripts ...script) {
	t.Helper()
	k := w.kid(sp.Name, scripts...)
	k.want = true
	sp.Child = k
	must(t, s.Add(sp, true))
}

func state(t *testing.T, s *Supervisor, name string, want State, reason string) Status {
	t.Helper()
	synctest.Wait()
	st, ok := s.Status(name)
	if !ok || st.State != want || !strings.Contains(st.Reason, reason) {
		t.Errorf("%s: got %s (%q), want %s (…%s…)", name, st.State, st.Reason, want, reason)
	}
	return st
}

func TestPolicies(t *testing.T) {
	for _, c := range []struct {
		name   string
		spec   Spec
		sc     script
		state  State
		reason string
		starts int
	}{
		{"always, code 0", Spec{Restart: Always, MaxRestarts: 3}, script{Life: 1}, StateErrored, "gave up after 3 unstable runs in a row: exited with code 0", 3},
		{"always, code 1", Spec{Restart: Always, MaxRestarts: 3}, script{Life: 1, Code: 1}, StateErrored, "exited with code 1", 3},
		{"always, default limit", Spec{}, script{Life: 1, Code: 1}, StateErrored, "gave up after 16", 16},
		{"on failure, code 0", Spec{Restart: OnFailure}, script{Life: 1}, StateStopped, "completed", 1},
		{"on failure, code 1", Spec{Restart: OnFailure, MaxRestarts: 2}, script{Life: 1, Code: 1}, StateErrored, "exited with code 1", 2},
		{"never, code 0", Spec{Restart: Never}, script{Life: 1}, StateStopped, "completed", 1},
		{"never, code 1", Spec{Restart: Never}, script{Life: 1, Code: 1}, StateStopped, "exited with code 1", 1},
		{"never, spawn error", Spec{Restart: Never}, script{Err: true}, StateErrored, "could not be started: no such file", 1},
		{"stop code", Spec{StopCodes: []int{7}}, script{Life: 1, Code: 7}, StateStopped, "stop codes", 1},
		{"spawn error", Spec{MaxRestarts: 4}, script{Err: true}, StateErrored, "4 unstable runs in a row: could not be started: no such file", 4},
		{"panic", Spec{MaxRestarts: 1}, script{Panic: true}, StateErrored, "1 unstable run in a row: could not be started: start panicked: no", 1},
		{"window", Spec{MaxRestarts: 2, Window: time.Minute}, script{Life: 1, Code: 1}, StateErrored, "gave up after 2 restarts within 1m0s", 3},
		{"window counts stable runs", Spec{MaxRestarts: 2, Window: time.Minute}, script{Life: 5 * time.Second}, StateErrored, "gave up", 3},
		{"not ready in time", Spec{Restart: Never, ReadyTimeout: time.Second}, script{Ready: -1}, StateErrored, "not ready within 1s", 1},
		{"not ready in time, tolerated", Spec{ReadyTimeout: time.Second, OnReadyTimeout: TreatAsReady}, script{Ready: -1}, StateOnline, "", 1},
		{"not ready in time is never stable", Spec{MaxRestarts: 2, ReadyTimeout: 50 * time.Second}, script{Ready: -1}, StateErrored, "2 unstable runs in a row: not ready within 50s", 2},
		{"slow start", Spec{Restart: Never, StartTimeout: time.Second}, script{Start: time.Hour}, StateErrored, "start took longer than 1s", 1},
		{"late run", Spec{Restart: Never, StartTimeout: time.Second}, script{Start: 2 * time.Second, Deaf: true}, StateErrored, "SIGKILL (start timed out)", 1},
		{"unlimited without delay", Spec{MaxRestarts: -1}, script{Err: true}, StateBackoff, "no such file", 17 + 1150},
		{"unlimited", Spec{MaxRestarts: -1, Delay: 10 * time.Second}, script{Life: 1, Code: 1}, StateBackoff, "exited with code 1", 12},
	} {
		t.Run(c.name, func(t *testing.T) {
			bubble(t, Options{}, func(t *testing.T, w *world, s *Supervisor) {
				c.spec.Name = "a"
				w.add(t, s, c.spec, c.sc)
				time.Sleep(115 * time.Second)
				st := state(t, s, "a", c.state, c.reason)
				if n := w.kids["a"].n; n != c.starts || st.Restarts != n-1 && c.state != StateBackoff {
					t.Errorf("%d starts, %d restarts; want %d starts", n, st.Restarts, c.starts)
				}
			})
		})
	}
}

// A second, naive account of the policy: from the lengths and codes of runs to
// what becomes of the child.
func TestPolicyAgainstModel(t *testing.T) {
	rapid.Check(t, func(rt *rapid.T) {
		scripts := rapid.SliceOfN(rapid.Custom(func(t *rapid.T) script {
			return script{
				Life: rapid.SampledFrom([]time.Duration{1, time.Second - 1, time.Second, 3 * time.Second}).Draw(t, "life"),
				Code: rapid.SampledFrom([]int{0, 1, 7}).Draw(t, "code"),
			}
		}), 1, 20).Draw(rt, "runs")
		sp := Spec{
			Name:        "a",
			Restart:     rapid.SampledFrom([]Policy{Always, OnFailure, Never}).Draw(rt, "policy"),
			MaxRestarts: rapid.IntRange(1, 5).Draw(rt, "max"),
			Window:      rapid.SampledFrom([]time.Duration{0, 2 * time.Second, 10 * time.Second}).Draw(rt, "window"),
			Backoff:     rapid.SampledFrom([]Backoff{{}, {Initial: 100 * time.Millisecond, Max: time.Second, Factor: 3}}).Draw(rt, "backoff"),
			StopCodes:   []int{7},
		}
		want, restarts, row := State(""), 0, 0
		var at time.Duration
		var times []time.Duration
		for _, r := range scripts {
			at += r.Life
			if r.Life >= time.Second {
				row = 0
			} else {
				row++
			}
			if r.Code == 7 || sp.Restart == Never || sp.Restart == OnFailure && r.Code == 0 {
				want = StateStopped
				break
			}
			recent := 0
			for _, x := range times {
				if at-x < sp.Window {
					recent++
				}
			}
			if sp.Window == 0 && row == sp.MaxRestarts || sp.Window > 0 && recent == sp.MaxRestarts {
				want = StateErrored
				break
			}
			times = append(times, at)
			restarts++
			if sp.Backoff.Initial > 0 && row > 0 { // half of the bound, see Rand below
				b := 100 * time.Millisecond
				for range row - 1 {
					b *= 3
				}
				at += min(b, time.Second) / 2
			}
		}
		var got Status
		synctest.Test(t, func(t *testing.T) {
			w := newWorld()
			s := New(Options{Rand: func() float64 { return 0.5 }})
			w.add(t, s, sp, append(slices.Clone(scripts), script{})...)
			time.Sleep(time.Hour)
			synctest.Wait()
			got, _ = s.Status("a")
			_ = s.Shutdown(t.Context())
		})
		if want == "" { // the last script lives on
			want = StateOnline
		}
		if got.State != want || got.Restarts != restarts {
			rt.Fatalf("got %s after %d restarts (%s), want %s after %d", got.State, got.Restarts, got.Reason, want, restarts)
		}
	})
}

func TestBackoffBounds(t *testing.T) {
	rapid.Check(t, func(t *rapid.T) {
		b := Backoff{
			Initial: time.Duration(rapid.Int64Range(1, int64(time.Hour)).Draw(t, "initial")),
			Max:     time.Duration(rapid.Int64Range(0, int64(24*time.Hour)).Draw(t, "max")),
			Factor:  rapid.Float64().Draw(t, "factor"),
		}
		top := b.Max
		if top == 0 {
			top = time.Minute
		}
		s := New(Options{})
		last := time.Duration(0)
		for n := 1; n < 2000; n = n*3/2 + 1 {
			d := b.bound(n)
			if d < last || d > top || d <= 0 || n == 1 && d != min(b.Initial, top) {
				t.Fatalf("bound(%d) = %s after %s", n, d, last)
			}
			last = d
			c := &child{spec: Spec{Backoff: b}, unstable: n}
			top := d
			if n > spinAfter {
				top = max(d, spinDelay)
			}
			if w := s.delay(c); w < 0 || w > top {
				t.Fatalf("wait %s outside of 0…%s", w, d)
			}
			c.unstable = 0
			if w := s.delay(c); w != 0 {
				t.Fatalf("wait %s after a stable run", w)
			}
		}
	})
}

func TestBackoffResetsAfterStableRun(t *testing.T) {
	o := Options{Rand: func() float64 { return 1 }}
	bubble(t, o, func(t *testing.T, w *world, s *Supervisor) {
		w.add(t, s, Spec{Name: "a", Backoff: Backoff{Initial: time.Second, Max: 3 * time.Second}, MaxRestarts: -1},
			script{Life: 1}, script{Life: 1}, script{Life: 1}, script{Life: time.Minute}, script{Life: 1}, script{})
		var waits []time.Duration
		for range 5 {
			st, err := s.Wait(t.Context(), func(st Status) bool { return st.LastExit != nil && st.State != StateOnline })
			must(t, err)
			if st[0].State == StateBackoff {
				waits = append(waits, time.Until(st[0].NextStart))
			} else {
				waits = append(waits, 0)
			}
			_, err = s.Wait(t.Context(), Up)
			must(t, err)
			synctest.Wait()
		}
		if got := fmt.Sprint(waits); got != "[1s 2s 3s 0s 1s]" {
			t.Errorf("waits %s", got)
		}
		time.Sleep(2 * time.Second)
		if st := state(t, s, "a", StateOnline, ""); st.Unstable != 0 || st.Restarts != 5 {
			t.Errorf("%d unstable, %d restarts", st.Unstable, st.Restarts)
		}
	})
}

func TestStopWinsAndGrace(t *testing.T) {
	bubble(t, Options{}, func(t *testing.T, w *world, s *Supervisor) {
		w.add(t, s, Spec{Name: "a", Grace: time.Second}, script{OnStop: -1, OnKill: time.Millisecond})
		synctest.Wait()
		must(t, s.Restart("files changed", "a"))
		state(t, s, "a", StateStopping, "files changed")
		must(t, s.Stop("", "a"))
		w.setWant(false, "a")
		time.Sleep(time.Second)
		state(t, s, "a", StateStopping, "did not stop within 1s")
		time.Sleep(time.Millisecond)
		st := state(t, s, "a", StateStopped, "stopped as asked")
		if st.LastExit.Signal != "SIGKILL" || st.LastExit.Cause != "stop" || st.Restarts != 0 {
			t.Errorf("%+v", st)
		}
		// Restart starts what is stopped; Start while stopping starts again.
		w.setWant(true, "a")
		must(t, s.Restart("", "a"))
		if st := state(t, s, "a", StateOnline, ""); st.Restarts != 1 || w.kids["a"].last.Cause != "restart" {
			t.Errorf("%+v", st)
		}
		must(t, s.Stop("", "a"))
		must(t, s.Start("a"))
		time.Sleep(2 * time.Second)
		if st := state(t, s, "a", StateOnline, ""); st.Restarts != 1 {
			t.Errorf("%+v", st)
		}
		must(t, s.Fail("probe", "a"))
		time.Sleep(2 * time.Second)
		if st := state(t, s, "a", StateOnline, ""); st.Restarts != 2 || !st.LastExit.Failed || st.LastExit.Cause != "probe" {
			t.Errorf("%+v %+v", st, st.LastExit)
		}
		must(t, s.SetReady("a", false, "no answer"))
		state(t, s, "a", StateUnready, "no answer")
		must(t, s.SetReady("a", true, ""))
		state(t, s, "a", StateOnline, "")
		must(t, s.Reset())
		if st := state(t, s, "a", StateOnline, ""); st.Restarts != 0 {
			t.Errorf("%+v", st)
		}
	})
}

func TestStopCancelsWhatIsPending(t *testing.T) {
	for name, sc := range map[string]script{"starting": {Start: time.Minute}, "deaf start": {Start: 20 * time.Second, Deaf: true}, "backoff": {Err: true}, "not ready": {Ready: -1}} {
		t.Run(name, func(t *testing.T) {
			bubble(t, Options{}, func(t *testing.T, w *world, s *Supervisor) {
				w.add(t, s, Spec{Name: "a", Delay: time.Minute}, sc)
				synctest.Wait()
				must(t, s.Stop("", "a"))
				w.setWant(false, "a")
				_, err := s.Wait(t.Context(), Ended, "a")
				must(t, err)
				time.Sleep(time.Hour)
				state(t, s, "a", StateStopped, "stopped as asked")
				if w.kids["a"].n != 1 {
					t.Errorf("%d starts", w.kids["a"].n)
				}
			})
		})
	}
}

func TestDependencies(t *testing.T) {
	bubble(t, Options{}, func(t *testing.T, w *world, s *Supervisor) {
		w.add(t, s, Spec{Name: "web", DependsOn: []Dep{{"db", DepReady}, {"migrate", DepCompleted}}})
		w.add(t, s, Spec{Name: "log", DependsOn: []Dep{{On: "db"}}})
		state(t, s, "web", StateWaiting, "waits for db, which is not known")
		w.add(t, s, Spec{Name: "migrate", Restart: OnFailure, DependsOn: []Dep{{"db", DepReady}}}, script{Life: time.Second})
		w.add(t, s, Spec{Name: "db-0", Group: "db"}, script{Ready: time.Second})
		state(t, s, "log", StateOnline, "")
		w.add(t, s, Spec{Name: "db-1", Group: "db"}, script{Ready: 2 * time.Second})
		state(t, s, "web", StateWaiting, "waits for db-0 to be ready")
		time.Sleep(time.Second)
		state(t, s, "migrate", StateWaiting, "waits for db-1 to be ready")
		time.Sleep(time.Second)
		state(t, s, "web", StateWaiting, "waits for migrate to complete")
		time.Sleep(time.Second)
		state(t, s, "migrate", StateStopped, "completed")
		state(t, s, "web", StateOnline, "")
		w.takeLog()
		must(t, s.Restart(""))
		time.Sleep(5 * time.Second)
		state(t, s, "web", StateOnline, "")
		log := w.takeLog()
		at := func(e string) int { return slices.Index(log, e) }
		for _, o := range [][2]string{{"end web", "stop db-0"}, {"end log", "stop db-1"}, {"start db-1", "start migrate"}, {"end migrate", "start web"}} {
			if at(o[0]) < 0 || at(o[0]) > at(o[1]) {
				t.Errorf("%s not before %s: %q", o[0], o[1], log)
			}
		}
		// A stop of the dependency leaves those that run alone, and holds up their next start.
		must(t, s.Stop("", "db-0"))
		w.setWant(false, "db-0")
		state(t, s, "web", StateOnline, "")
		w.crash("web", 1)
		time.Sleep(time.Second)
		state(t, s, "web", StateWaiting, "waits for db-0 to be ready, which is stopped")
		must(t, s.Stop("", "web"))
		w.setWant(false, "web")
		state(t, s, "web", StateStopped, "")
	})
}

func TestCompletedNever(t *testing.T) {
	bubble(t, Options{}, func(t *testing.T, w *world, s *Supervisor) {
		w.add(t, s, Spec{Name: "web", DependsOn: []Dep{{"seed", DepCompleted}}})
		w.add(t, s, Spec{Name: "seed", DependsOn: []Dep{{"migrate", DepCompleted}}})
		w.add(t, s, Spec{Name: "migrate", Restart: Never}, script{Life: 1, Code: 3}, script{Life: 1})
		time.Sleep(time.Second)
		state(t, s, "seed", StateErrored, "needs migrate to complete, which failed: exited with code 3")
		state(t, s, "web", StateErrored, "needs seed to complete")
		w.kids["seed"].scripts = []script{{Life: 1}}
		must(t, s.Update(Spec{Name: "seed", Restart: Never, Child: w.kids["seed"], DependsOn: []Dep{{"migrate", DepCompleted}}}))
		must(t, s.Start())
		time.Sleep(time.Second)
		state(t, s, "web", StateOnline, "")
	})
}

func TestCycles(t *testing.T) {
	bubble(t, Options{}, func(t *testing.T, w *world, s *Supervisor) {
		k := w.kid("x")
		dep := func(name, group string, on ...string) Spec {
			sp := Spec{Name: name, Group: group, Child: k}
			for _, o := range on {
				sp.DependsOn = append(sp.DependsOn, Dep{On: o})
			}
			return sp
		}
		refused := func(err error, cycle string) {
			t.Helper()
			if !errors.Is(err, ErrCycle) || !strings.HasSuffix(err.Error(), ": "+cycle) {
				t.Errorf("got %v, want %s", err, cycle)
			}
		}
		must(t, s.Add(dep("a", "", "b"), false))
		must(t, s.Add(dep("b", "", "c", "other"), false))
		refused(s.Add(dep("c", "", "a"), false), "c → a → b → c")
		refused(s.Add(dep("d", "", "d"), false), "d → d")
		refused(s.Add(dep("e", "g", "g"), false), "e → e")
		refused(s.Add(dep("f", "other", "a"), false), "f → a → b → f")
		must(t, s.Add(dep("c", ""), false))
		refused(s.Update(dep("c", "", "a")), "c → a → b → c")
		must(t, s.Update(dep("c", "new")))
		if len(s.All()) != 3 {
			t.Error(s.All())
		}
		if err := s.Add(dep("a", ""), true); !errors.Is(err, ErrExists) {
			t.Error(err)
		}
		if err := s.Start("a", "nobody"); !errors.Is(err, ErrUnknown) {
			t.Error(err)
		}
		for _, sp := range []Spec{{}, {Name: "z"}, dep("z", "", ""), {Name: "z", Child: k, Restart: 9}} {
			if err := s.Add(sp, true); !errors.Is(err, ErrSpec) {
				t.Error(sp, err)
			}
		}
	})
}

// In a random graph, a child is started only after what it needs is ready and
// stopped only after what needs it has ended.
func TestOrderInRandomGraphs(t *testing.T) {
	rapid.Check(t, func(rt *rapid.T) {
		n := rapid.IntRange(2, 8).Draw(rt, "n")
		edges := make([][]int, n)
		for i := range n {
			for j := range i {
				if rapid.IntRange(0, 2).Draw(rt, "edge") == 0 {
					edges[i] = append(edges[i], j)
				}
			}
		}
		order := rapid.Permutation(slices.Collect(func(yield func(int) bool) {
			for i := range n {
				if !yield(i) {
					return
				}
			}
		})).Draw(rt, "order of adding")
		slow := rapid.SliceOfN(rapid.SampledFrom([]time.Duration{0, 1, time.Second}), n, n).Draw(rt, "slow")
		var err error
		synctest.Test(t, func(t *testing.T) {
			w, s := newWorld(), New(Options{})
			name := func(i int) string { return fmt.Sprint("n", i) }
			w.onCall = func(what, who string) {
				for i := range n {
					for _, j := range edges[i] {
						up := func(k *kid) bool { return len(k.live) == 1 && closed(k.live[0].ready) }
						if what == "start" && who == name(i) && !up(w.kids[name(j)]) {
							w.bad("%s started before %s was ready", who, name(j))
						}
						if what == "stop" && who == name(j) && len(w.kids[name(i)].live) > 0 {
							w.bad("%s stopped before %s had ended", who, name(i))
						}
					}
				}
			}
			for i := range n {
				w.kid(name(i), script{Ready: slow[i], OnStop: slow[i]}).want = true
			}
			for _, i := range order {
				sp := Spec{Name: name(i), Child: w.kids[name(i)]}
				for _, j := range edges[i] {
					sp.DependsOn = append(sp.DependsOn, Dep{name(j), DepReady})
				}
				must(t, s.Add(sp, true))
			}
			for range 2 {
				time.Sleep(time.Minute)
				synctest.Wait()
				for _, st := range s.All() {
					if st.State != StateOnline {
						w.bad("%s is %s", st.Name, st.State)
					}
				}
				must(t, s.Restart(""))
			}
			time.Sleep(time.Minute)
			must(t, s.Shutdown(t.Context()))
			err = w.verdict()
		})
		if err != nil {
			rt.Fatal(err)
		}
	})
}

func TestStrategies(t *testing.T) {
	for _, c := range []struct {
		strategy Strategy
		want     string
	}{
		{OneForOne, "end c, start c"},
		{OneForAll, "end c, stop e, stop b, end b, stop a, end e, end a, start a, start c, start e, start b"},
		{RestForOne, "end c, stop e, stop b, end e, end b, start c, start e, start b"},
	} {
		t.Run(fmt.Sprint(c.strategy), func(t *testing.T) {
			bubble(t, Options{Strategy: c.strategy, Starts: 1}, func(t *testing.T, w *world, s *Supervisor) {
				w.add(t, s, Spec{Name: "a"}, script{OnStop: time.Second})
				// b was added before c and depends on it.
				w.add(t, s, Spec{Name: "b", DependsOn: []Dep{{"a", DepReady}, {"c", DepReady}}}, script{OnStop: time.Second})
				w.add(t, s, Spec{Name: "c", Delay: 500 * time.Millisecond})
				w.add(t, s, Spec{Name: "d", Restart: Never}, script{Life: 1}) // completed: stays so
				w.add(t, s, Spec{Name: "e"}, script{OnStop: 1500 * time.Millisecond})
				time.Sleep(2 * time.Second)
				synctest.Wait()
				w.takeLog()
				w.crash("c", 1)
				time.Sleep(600 * time.Millisecond)
				if c.strategy == OneForAll {
					state(t, s, "c", StateWaiting, "waits for its siblings")
					state(t, s, "a", StateStopping, "waits for those that depend on it")
				}
				time.Sleep(10 * time.Second)
				synctest.Wait()
				got := w.takeLog()
				want := strings.Split(c.want, ", ")
				// What happens at one instant has no order: compare the barriers.
				last, first := 0, len(got)
				for i, e := range got {
					if strings.HasPrefix(e, "end") {
						last = i
					} else if strings.HasPrefix(e, "start") {
						first = min(first, i)
					}
				}
				if last > first {
					t.Errorf("a start before the last end: %q", got)
				}
				slices.Sort(got)
				slices.Sort(want)
				if !slices.Equal(got, want) {
					t.Errorf("got %q, want %q", got, want)
				}
				for _, x := range []string{"a", "b", "c", "e"} {
					state(t, s, x, StateOnline, "")
				}
			})
		})
	}
}

func TestRoundsAndStops(t *testing.T) {
	bubble(t, Options{Strategy: OneForAll}, func(t *testing.T, w *world, s *Supervisor) {
		for _, n := range []string{"a", "b", "c"} {
			w.add(t, s, Spec{Name: n, Delay: time.Minute}, script{OnStop: time.Second})
		}
		synctest.Wait()
		w.crash("a", 1)
		time.Sleep(2 * time.Second)
		state(t, s, "a", StateBackoff, "exited with code 1")
		state(t, s, "b", StateWaiting, "waits for its siblings, after a failed")
		must(t, s.Stop("", "a")) // the others need not wait for it
		w.setWant(false, "a")
		state(t, s, "b", StateOnline, "")
		state(t, s, "c", StateOnline, "")
		w.crash("b", 1)
		time.Sleep(2 * time.Second)
		must(t, s.Start("b")) // at once
		state(t, s, "b", StateOnline, "")
		state(t, s, "c", StateOnline, "")
		w.crash("b", 1)
		time.Sleep(2 * time.Second)
		must(t, s.Stop("")) // all: none may start
		w.setWant(false, "a", "b", "c")
		time.Sleep(time.Hour)
		state(t, s, "c", StateStopped, "stopped as asked")
	})
}

func TestSupervisorIntensity(t *testing.T) {
	bubble(t, Options{MaxRestarts: 3, Window: time.Minute}, func(t *testing.T, w *world, s *Supervisor) {
		w.add(t, s, Spec{Name: "a"})
		w.add(t, s, Spec{Name: "b"})
		for range 4 {
			synctest.Wait()
			w.crash("b", 1)
			synctest.Wait()
			time.Sleep(time.Second)
		}
		state(t, s, "b", StateErrored, "the supervisor gave up after 3 restarts within 1m0s; the last to fail was b: exited with code 1")
		state(t, s, "a", StateErrored, "the supervisor gave up")
		must(t, s.Start())
		state(t, s, "a", StateOnline, "")
	})
}

func TestNested(t *testing.T) {
	bubble(t, Options{}, func(t *testing.T, w *world, s *Supervisor) {
		sub := New(Options{Nested: true, MaxRestarts: 2, Window: time.Minute, Strategy: OneForAll})
		w.add(t, sub, Spec{Name: "x"}, script{Ready: time.Second, OnStop: time.Second})
		w.add(t, sub, Spec{Name: "y"})
		state(t, sub, "x", StateStopped, "its supervisor is not started")
		must(t, s.Add(Spec{Name: "sub", Child: sub.AsChild(), MaxRestarts: 2, Window: time.Hour}, true))
		state(t, s, "sub", StateStarting, "")
		time.Sleep(time.Second)
		state(t, s, "sub", StateOnline, "")
		must(t, s.Restart("", "sub"))
		time.Sleep(1500 * time.Millisecond)
		state(t, s, "sub", StateStarting, "")
		time.Sleep(time.Second)
		state(t, s, "sub", StateOnline, "")
		state(t, sub, "x", StateOnline, "")
		for range 3 {
			time.Sleep(4 * time.Second)
			synctest.Wait()
			w.crash("y", 2)
		}
		time.Sleep(1500 * time.Millisecond) // gave up, and is restarted by its parent
		st := state(t, s, "sub", StateStarting, "")
		if st.Restarts != 2 || !st.LastExit.Failed || !strings.Contains(st.LastExit.Err, "last to fail was y") {
			t.Errorf("%+v %+v", st, st.LastExit)
		}
		time.Sleep(10 * time.Second)
		must(t, s.Stop("", "sub"))
		time.Sleep(10 * time.Second)
		state(t, s, "sub", StateStopped, "")
		state(t, sub, "y", StateStopped, "stopped: its supervisor: stop")
		must(t, sub.Shutdown(t.Context()))
	})
}

func TestAdoption(t *testing.T) {
	bubble(t, Options{}, func(t *testing.T, w *world, s *Supervisor) {
		w.add(t, s, Spec{Name: "a"})
		w.add(t, s, Spec{Name: "dies"})
		w.add(t, s, Spec{Name: "gone", Restart: Never})
		w.add(t, s, Spec{Name: "unwanted"})
		w.add(t, s, Spec{Name: "bad", MaxRestarts: 1}, script{Life: 1, Code: 1})
		w.add(t, s, Spec{Name: "queued"}, script{Start: time.Second})
		time.Sleep(5 * time.Millisecond)
		synctest.Wait()
		left, err := s.Detach(t.Context())
		must(t, err)
		synctest.Wait()
		if err := s.Add(Spec{Name: "b", Child: w.kids["a"]}, true); !errors.Is(err, ErrClosed) {
			t.Error(err)
		}
		if len(w.kids["a"].live) != 1 {
			t.Fatal("detach has ended a run")
		}
		// Time without a supervisor.
		time.Sleep(time.Minute)
		w.crash("dies", 3)
		w.crash("gone", 3)
		synctest.Wait()
		w.setWant(false, "unwanted")
		s2 := New(Options{})
		for _, st := range left {
			ad := &Adoption{Run: st.Run, Since: st.Since, State: st.State, Reason: st.Reason, Restarts: st.Restarts + 5, LastExit: st.LastExit}
			must(t, s2.Add(Spec{Name: st.Name, Child: w.kids[st.Name], Adopt: ad, Restart: map[bool]Policy{true: Never}[st.Name == "gone"]}, st.Name != "unwanted"))
		}
		st := state(t, s2, "a", StateOnline, "")
		if time.Since(st.Since) < time.Minute || st.Restarts != 5 {
			t.Errorf("%+v", st)
		}
		if st := state(t, s2, "dies", StateOnline, ""); st.Restarts != 6 || st.LastExit.Code != 3 || st.Unstable != 0 {
			t.Errorf("%+v", st)
		}
		state(t, s2, "gone", StateStopped, "exited with code 3")
		state(t, s2, "unwanted", StateStopped, "stopped as asked")
		state(t, s2, "bad", StateErrored, "gave up after 1 unstable run")
		state(t, s2, "queued", StateOnline, "")
		for n, want := range map[string]int{"a": 1, "dies": 2, "gone": 1, "unwanted": 1, "bad": 1, "queued": 1} {
			if got := w.kids[n].n; got != want {
				t.Errorf("%s: %d starts, want %d", n, got, want)
			}
		}
		must(t, s2.Shutdown(t.Context()))
	})
}

func TestStartsRunBesideEachOther(t *testing.T) {
	bubble(t, Options{Starts: 16}, func(t *testing.T, w *world, s *Supervisor) {
		begin := time.Now()
		for i := range 100 {
			w.add(t, s, Spec{Name: fmt.Sprint(i)}, script{Start: time.Second})
		}
		_, err := s.Wait(t.Context(), Up)
		must(t, err)
		if d := time.Since(begin); d != 7*time.Second { // ⌈100/16⌉
			t.Error(d)
		}
	})
}

func TestHungStartsHoldUpNobody(t *testing.T) {
	bubble(t, Options{Starts: 1}, func(t *testing.T, w *world, s *Supervisor) {
		w.add(t, s, Spec{Name: "hangs"}, script{Start: time.Hour, Deaf: true}, script{})
		w.add(t, s, Spec{Name: "db", DependsOn: nil})
		time.Sleep(31 * time.Second)
		state(t, s, "db", StateOnline, "")
		state(t, s, "hangs", StateStopping, "its start has not returned within 30s")
		ctx, cancel := context.WithTimeout(t.Context(), time.Second)
		defer cancel()
		if err := s.Remove(ctx, "hangs"); !errors.Is(err, context.DeadlineExceeded) || !strings.Contains(err.Error(), "hangs has not ended") {
			t.Error(err)
		}
		if err := s.Start("hangs"); !errors.Is(err, ErrRemoved) {
			t.Error(err)
		}
		w.setWant(false, "hangs")
		time.Sleep(time.Hour)
		synctest.Wait()
		if _, ok := s.Status("hangs"); ok || len(w.kids["hangs"].live) != 0 {
			t.Error("the late run was not ended, or the child not forgotten")
		}
	})
}

func TestShutdownKillsAtTheEndOfItsContext(t *testing.T) {
	bubble(t, Options{}, func(t *testing.T, w *world, s *Supervisor) {
		w.add(t, s, Spec{Name: "a"})
		w.add(t, s, Spec{Name: "b", Grace: time.Hour}, script{OnStop: -1})
		synctest.Wait()
		ctx, cancel := context.WithTimeout(t.Context(), time.Second)
		defer cancel()
		err := s.Shutdown(ctx)
		if !errors.Is(err, context.DeadlineExceeded) || !strings.Contains(err.Error(), "killed b:") {
			t.Error(err)
		}
		must(t, s.Shutdown(t.Context()))
		if err := s.Start(); !errors.Is(err, ErrClosed) {
			t.Error(err)
		}
	})
}

func TestWait(t *testing.T) {
	bubble(t, Options{}, func(t *testing.T, w *world, s *Supervisor) {
		w.add(t, s, Spec{Name: "a"}, script{Ready: time.Second})
		w.add(t, s, Spec{Name: "b"}, script{Ready: -1})
		got, err := s.Wait(t.Context(), Up, "a")
		if err != nil || got[0].Name != "a" || got[0].State != StateOnline {
			t.Error(got, err)
		}
		ctx, cancel := context.WithTimeout(t.Context(), time.Second)
		defer cancel()
		got, err = s.Wait(ctx, Settled, "b", "a", "b")
		if !errors.Is(err, context.DeadlineExceeded) || got[0].State != StateStarting || got[1].Name != "a" || got[2].Name != "b" {
			t.Error(got, err)
		}
		go func() { must(t, s.Remove(t.Context(), "b")) }()
		if _, err = s.Wait(t.Context(), Up, "b"); !errors.Is(err, ErrRemoved) {
			t.Error(err)
		}
		if _, err = s.Wait(t.Context(), Up, "b"); !errors.Is(err, ErrUnknown) {
			t.Error(err)
		}
	})
}

// OnChange may call anything, and hears the changes in order.
func TestOnChangeMayCallBack(t *testing.T) {
	var s *Supervisor
	var states []State
	o := Options{OnChange: func(st Status) {
		states = append(states, st.State)
		if st.State == StateOnline {
			_ = s.Stop("enough", "a")
			_, _ = s.Wait(context.Background(), Ended, "a")
		}
	}}
	synctest.Test(t, func(t *testing.T) {
		s = New(o)
		w := newWorld()
		w.add(t, s, Spec{Name: "a"}, script{OnStop: time.Second})
		time.Sleep(2 * time.Second)
		must(t, s.Remove(t.Context(), "a"))
		synctest.Wait()
		if got := fmt.Sprint(states); got != "[starting online stopping stopped stopped]" {
			t.Error(got)
		}
	})
}

// Real time and real parallelism, for the race detector.
func TestStorm(t *testing.T) {
	w := newWorld()
	s := New(Options{Strategy: RestForOne, OnChange: func(Status) {}})
	names := []string{"a", "b", "c", "d"}
	for i, n := range names {
		sp := Spec{Name: n, MaxRestarts: -1, Delay: time.Millisecond, Grace: 5 * time.Millisecond}
		if i > 0 {
			sp.DependsOn = []Dep{{names[i-1], DepReady}}
		}
		w.add(t, s, sp, script{}, script{Life: time.Millisecond, Code: 1}, script{Err: true}, script{OnStop: -1}, script{Start: time.Millisecond})
	}
	done := make(chan bool)
	for range 4 {
		go func() {
			defer func() { done <- true }()
			for range 300 {
				n := names[rand.IntN(len(names))]
				switch rand.IntN(6) {
				case 0:
					_ = s.Stop("", n)
				case 1:
					_ = s.Restart("", n, "a")
				case 2:
					_ = s.Fail("", n)
				case 3:
					w.crash(n, 1)
				case 4:
					s.All()
				default:
					_ = s.Start(n)
				}
			}
		}()
	}
	for range 4 {
		<-done
	}
	must(t, s.Stop(""))
	ctx, cancel := context.WithTimeout(t.Context(), 30*time.Second)
	defer cancel()
	if _, err := s.Wait(ctx, Ended); err != nil {
		t.Fatal(err)
	}
	must(t, s.Shutdown(ctx))
	must(t, w.verdict())
}

func TestRoundsOverlap(t *testing.T) {
	bubble(t, Options{Strategy: RestForOne}, func(t *testing.T, w *world, s *Supervisor) {
		w.add(t, s, Spec{Name: "before"})
		w.add(t, s, Spec{Name: "a", Delay: 2 * time.Second, DependsOn: []Dep{{"late", DepReady}}})
		w.add(t, s, Spec{Name: "b"})
		w.add(t, s, Spec{Name: "c", Grace: time.Minute}, script{OnStop: 10 * time.Second})
		w.add(t, s, Spec{Name: "late"})
		synctest.Wait()
		w.crash("a", 1)
		synctest.Wait()
		w.add(t, s, Spec{Name: "e", Delay: time.Second})
		must(t, s.Update(Spec{Name: "c", Child: w.kids["c"], DependsOn: []Dep{{"e", DepReady}}}))
		time.Sleep(time.Second)
		state(t, s, "b", StateWaiting, "waits for its siblings, after a failed")
		state(t, s, "c", StateStopping, "a: exited with code 1")
		w.crash("e", 1)
		time.Sleep(time.Second) // e has taken c over: a need not wait for it
		state(t, s, "a", StateOnline, "")
		state(t, s, "b", StateOnline, "")
		state(t, s, "e", StateWaiting, "waits for its siblings")
		time.Sleep(10 * time.Second)
		state(t, s, "e", StateOnline, "")
		state(t, s, "c", StateOnline, "")
		for n, want := range map[string]int{"before": 1, "late": 1, "a": 2, "b": 2, "c": 2, "e": 2} {
			if got := w.kids[n].n; got != want { // late came after a, but a depends on it
				t.Errorf("%s: %d starts, want %d", n, got, want)
			}
		}
	})
}
