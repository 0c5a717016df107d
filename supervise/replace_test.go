package supervise

import (
	"context"
	"errors"
	"fmt"
	"testing"
	"testing/synctest"
	"time"

	"pgregory.net/rapid"
)

// replaced looks at what Replace has returned; before is from just before it.
func (w *world) replaced(s *Supervisor, before Status, err error) {
	w.mu.Lock()
	defer w.mu.Unlock()
	var re *ReplaceError
	switch {
	case err == nil:
		if r, ok := before.Run.(*fakeRun); ok && !closed(r.done) && !r.stop && !r.kill {
			w.bad("%s: replaced, but the old run was not ended", before.Name)
		}
	case errors.As(err, &re):
		if re.Name != before.Name || re.Why == "" {
			w.bad("%s: a failure without a reason: %+v", before.Name, re)
		}
	case errors.Is(err, ErrNotRunning), errors.Is(err, ErrReplacing), errors.Is(err, ErrCalledOff),
		errors.Is(err, ErrTookOver), errors.Is(err, ErrRemoved), errors.Is(err, ErrUnknown), errors.Is(err, ErrClosed):
	default:
		w.bad("%s: replace: %v", before.Name, err)
	}
}

// one is a supervisor with a child "a" that is online, whose n-th start
// behaves as scripts[n] says.
func one(t *testing.T, sp Spec, scripts ...script) (*Supervisor, *world) {
	t.Helper()
	w := newWorld()
	sp.Name, sp.Child = "a", w.kid("a", scripts...)
	w.setWant(true, "a")
	s := New(Options{})
	must(t, s.Add(sp, true))
	if _, err := s.Wait(t.Context(), Up, "a"); err != nil {
		t.Fatal(err)
	}
	w.takeLog()
	return s, w
}

func (w *world) end(t *testing.T, s *Supervisor) {
	t.Helper()
	synctest.Wait()
	w.check(s)
	w.setWant(false, "a")
	must(t, s.Shutdown(context.Background()))
	must(t, w.verdict())
	if k := w.kids["a"]; len(k.live)+k.calls > 0 {
		t.Errorf("%d runs and %d starts are left", len(k.live), k.calls)
	}
}

func run(s *Supervisor) *fakeRun {
	st, _ := s.Status("a")
	r, _ := st.Run.(*fakeRun)
	return r
}

// The old run is asked to end only when the new one is ready, and whatever
// becomes of the new one, there is a run that is ready all the time.
func TestReplaceLeavesNoGap(t *testing.T) {
	rapid.Check(t, func(rt *rapid.T) {
		old := script{OnStop: rapid.SampledFrom([]time.Duration{0, time.Second, -1}).Draw(rt, "old")}
		fresh := genScript(rt)
		timeout := rapid.SampledFrom([]time.Duration{0, time.Second}).Draw(rt, "timeout")
		late := rapid.SampledFrom([]ReadyAction{FailRun, TreatAsReady}).Draw(rt, "late")
		restarts := rapid.IntRange(0, 2).Draw(rt, "restarts")
		synctest.Test(t, func(t *testing.T) {
			scripts := make([]script, restarts, restarts+2)
			s, w := one(t, Spec{StartTimeout: 2 * time.Second, ReadyTimeout: timeout, OnReadyTimeout: late, Grace: 3 * time.Second},
				append(scripts, old, fresh, script{})...)
			for range restarts {
				must(t, s.Restart("", "a"))
				_, err := s.Wait(t.Context(), Up, "a")
				must(t, err)
			}
			before, _ := s.Status("a")
			w.mu.Lock()
			w.onStop = func(r *fakeRun, cause string) {
				if cause == "swap" && r != before.Run {
					rt.Errorf("the new run is stopped in place of the old one")
				}
				// A new one that was ready may have ended by now.
				if live := w.kids["a"].live; cause == "swap" && late == FailRun && len(live) > 1 && !closed(live[1].ready) && live[1].sc == fresh {
					rt.Errorf("the old run is stopped before the new one is ready")
				}
			}
			w.mu.Unlock()
			ctx, cancel := context.WithTimeout(t.Context(), time.Minute)
			err := s.Replace(ctx, "a", "swap")
			cancel()
			after, _ := s.Status("a")
			var re *ReplaceError
			switch was := before.Run.(*fakeRun); {
			case err == nil:
				if !closed(was.done) || after.Restarts != before.Restarts+1 && fresh.Life == 0 {
					rt.Errorf("replaced: %+v", after)
				}
			case errors.As(err, &re), errors.Is(err, context.DeadlineExceeded):
				if after.Run != before.Run || after.State != StateOnline || after.Restarts != before.Restarts || after.LastExit != before.LastExit || !after.Since.Equal(before.Since) {
					rt.Errorf("%v, but the old run did not go on as it was: %+v", err, after)
				}
				if was.stop || was.kill {
					rt.Errorf("%v, but the old run was stopped", err)
				}
			default:
				rt.Errorf("replace: %v", err)
			}
			w.mu.Lock()
			w.onStop = nil
			w.kids["a"].calm = true
			w.mu.Unlock()
			w.end(t, s)
		})
	})
}

func TestReplaceFails(t *testing.T) {
	for name, tc := range map[string]struct {
		sp    Spec
		fresh script
		want  string
	}{
		"cannot start":     {Spec{}, script{Err: true}, `"a": the new run did not become ready: could not be started: no such file`},
		"dies":             {Spec{}, script{Ready: -1, Life: time.Second, Code: 3}, `"a": the new run did not become ready: exited with code 3`},
		"is never ready":   {Spec{ReadyTimeout: time.Second}, script{Ready: -1}, `"a": the new run did not become ready: not ready within 1s`},
		"does not hear it": {Spec{ReadyTimeout: time.Second}, script{Ready: -1, OnStop: -1}, `"a": the new run did not become ready: not ready within 1s`},
		"start hangs":      {Spec{StartTimeout: time.Second}, script{Start: time.Minute, Deaf: true}, `"a": the new run did not become ready: its start has not returned within 1s`},
		"policy is never":  {Spec{Restart: Never}, script{Ready: -1, Life: time.Second}, `"a": the new run did not become ready: exited with code 0`},
	} {
		t.Run(name, func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				s, w := one(t, tc.sp, script{}, tc.fresh)
				old := run(s)
				err := s.Replace(t.Context(), "a", "")
				if err == nil || err.Error() != tc.want {
					t.Errorf("got %v, want %s", err, tc.want)
				}
				st, _ := s.Status("a")
				if run(s) != old || st.State != StateOnline || st.Restarts != 0 || old.stop {
					t.Errorf("the old run did not go on as it was: %+v", st)
				}
				time.Sleep(2 * time.Minute)
				synctest.Wait()
				if st, _ := s.Status("a"); st.Beside != nil || run(s) != old {
					t.Errorf("after a while: %+v", st)
				}
				w.end(t, s)
			})
		})
	}
}

// What comes in the middle: the old run ends, or somebody wants another thing.
func TestReplaceInterrupted(t *testing.T) {
	slow := script{Ready: 5 * time.Second, OnStop: time.Second}
	for name, tc := range map[string]struct {
		do    func(s *Supervisor, w *world) error
		err   error
		state State
		runs  int // starts in all
		count int // restarts
	}{
		"the old run dies":      {func(_ *Supervisor, w *world) error { w.crash("a", 1); return nil }, ErrTookOver, StateOnline, 2, 1},
		"the old run completes": {func(_ *Supervisor, w *world) error { w.crash("a", 0); return nil }, ErrTookOver, StateOnline, 2, 1},
		"the old run is failed": {func(s *Supervisor, _ *world) error { return s.Fail("probe", "a") }, ErrTookOver, StateOnline, 2, 1},
		"stop":                  {func(s *Supervisor, w *world) error { w.setWant(false, "a"); return s.Stop("", "a") }, ErrCalledOff, StateStopped, 2, 0},
		"restart":               {func(s *Supervisor, _ *world) error { return s.Restart("", "a") }, ErrCalledOff, StateOnline, 3, 1},
		"stop and start":        {func(s *Supervisor, _ *world) error { return errors.Join(s.Stop("", "a"), s.Start("a")) }, ErrCalledOff, StateOnline, 3, 0},
		"start":                 {func(s *Supervisor, _ *world) error { return s.Start("a") }, nil, StateOnline, 2, 1},
		"another": {func(s *Supervisor, _ *world) error {
			if err := s.Replace(context.Background(), "a", ""); !errors.Is(err, ErrReplacing) {
				return fmt.Errorf("a second replacement: %w", err)
			}
			return nil
		}, nil, StateOnline, 2, 1},
		"the new run is failed": {func(s *Supervisor, _ *world) error {
			st, _ := s.Status("a")
			return s.FailRun("probe", "a", st.Beside)
		}, nil, StateOnline, 2, 0},
	} {
		t.Run(name, func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				s, w := one(t, Spec{Restart: OnFailure}, script{}, slow)
				got := make(chan error, 1)
				go func() { got <- s.Replace(context.Background(), "a", "") }()
				time.Sleep(time.Second)
				synctest.Wait()
				must(t, tc.do(s, w))
				err := <-got
				var re *ReplaceError
				if tc.err != nil && !errors.Is(err, tc.err) || tc.err == nil && tc.count > 0 && err != nil || tc.err == nil && tc.count == 0 && !errors.As(err, &re) {
					t.Errorf("got %v, want %v", err, tc.err)
				}
				time.Sleep(time.Minute)
				synctest.Wait()
				st, _ := s.Status("a")
				if st.State != tc.state || st.Restarts != tc.count || w.kids["a"].n != tc.runs || st.Beside != nil {
					t.Errorf("%d starts, %+v", w.kids["a"].n, st)
				}
				w.end(t, s)
			})
		})
	}
}

// A new run that dies while the old one is still ending is followed by another
// at once, and "stopped" is said only when both are gone.
func TestReplaceOldRunLingers(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		s, w := one(t, Spec{Restart: OnFailure, Grace: time.Minute}, script{OnStop: 20 * time.Second}, script{Life: time.Second, Code: 1}, script{Life: time.Second})
		go func() {
			if err := s.Replace(context.Background(), "a", ""); err != nil {
				t.Error(err)
			}
		}()
		time.Sleep(1500 * time.Millisecond)
		synctest.Wait()
		w.check(s)
		if st, _ := s.Status("a"); st.State != StateOnline || w.kids["a"].n != 3 || st.Beside == nil {
			t.Errorf("after the new run's end: %+v", st)
		}
		time.Sleep(time.Second)
		synctest.Wait()
		if st, _ := s.Status("a"); st.State != StateStopping || st.Run != nil || st.Beside == nil {
			t.Errorf("it has completed, but the old run is there: %+v", st)
		}
		begin := time.Now()
		if _, err := s.Wait(t.Context(), Ended, "a"); err != nil {
			t.Error(err)
		}
		if st, _ := s.Status("a"); st.State != StateStopped || st.Reason != "completed" || time.Since(begin) < 15*time.Second || st.LastExit.Cause != "" {
			t.Errorf("at the end: %+v, %+v", st, st.LastExit)
		}
		w.end(t, s)
	})
}

func TestReplaceAdopted(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		w := newWorld()
		k := w.kid("a")
		w.setWant(true, "a")
		k.replaces = true
		var runs [2]Run
		for i := range runs {
			r, err := k.Start(t.Context(), Attempt{})
			must(t, err)
			runs[i] = r
		}
		s := New(Options{})
		must(t, s.Add(Spec{Name: "a", Child: k, Adopt: &Adoption{Run: runs[0], Beside: runs[1]}}, true))
		synctest.Wait()
		if st, _ := s.Status("a"); st.Run != runs[0] || st.Beside != nil || !closed(runs[1].Done()) || st.State != StateOnline {
			t.Errorf("adopted: %+v", st)
		}
		w.end(t, s)
	})
}

func TestReplaceRefused(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		s, w := one(t, Spec{Restart: Never}, script{OnStop: time.Second})
		if err := s.Replace(t.Context(), "b", ""); !errors.Is(err, ErrUnknown) {
			t.Errorf("unknown: %v", err)
		}
		w.setWant(false, "a")
		must(t, s.Stop("", "a"))
		if err := s.Replace(t.Context(), "a", ""); !errors.Is(err, ErrNotRunning) {
			t.Errorf("stopping: %v", err)
		}
		_, err := s.Wait(t.Context(), Ended, "a")
		must(t, err)
		if err := s.Replace(t.Context(), "a", ""); !errors.Is(err, ErrNotRunning) {
			t.Errorf("stopped: %v", err)
		}
		w.end(t, s)
		if err := s.Replace(t.Context(), "a", ""); !errors.Is(err, ErrClosed) {
			t.Errorf("shut down: %v", err)
		}
	})
}

// A controller that makes place for another leaves both runs.
func TestReplaceDetached(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		s, w := one(t, Spec{}, script{}, script{Ready: time.Minute})
		got := make(chan error, 1)
		go func() { got <- s.Replace(context.Background(), "a", "") }()
		time.Sleep(time.Second)
		left, err := s.Detach(t.Context())
		must(t, err)
		if err := <-got; !errors.Is(err, ErrClosed) {
			t.Errorf("replace: %v", err)
		}
		if st := left[0]; st.Run == nil || st.Beside == nil {
			t.Errorf("left: %+v", st)
		}
		w.mu.Lock()
		defer w.mu.Unlock()
		if len(w.kids["a"].live) != 2 {
			t.Errorf("%d runs are left", len(w.kids["a"].live))
		}
		for _, r := range w.kids["a"].live {
			r.ask(0, Exit{})
		}
	})
}
