package supervise

import (
	"context"
	"errors"
	"fmt"
	"slices"
	"strings"
	"testing"
	"testing/synctest"
	"time"

	"pgregory.net/rapid"
)

var waits = []time.Duration{0, 0, 0, time.Millisecond, 30 * time.Millisecond, 400 * time.Millisecond, 1100 * time.Millisecond, 6 * time.Second, 40 * time.Second}

func genScript(t *rapid.T) script {
	pick := func(label string, of ...time.Duration) time.Duration { return rapid.SampledFrom(of).Draw(t, label) }
	return script{
		Start:  pick("start", 0, 0, 0, 10*time.Millisecond, 500*time.Millisecond, 50*time.Second),
		Deaf:   rapid.Bool().Draw(t, "deaf"),
		Err:    rapid.IntRange(0, 5).Draw(t, "err") == 0,
		Panic:  rapid.IntRange(0, 19).Draw(t, "panic") == 0,
		Ready:  pick("ready", 0, 0, 20*time.Millisecond, 3*time.Second, -1),
		Life:   pick("life", 0, 0, time.Millisecond, 700*time.Millisecond, 5*time.Second),
		Code:   rapid.SampledFrom([]int{0, 0, 1, 7}).Draw(t, "code"),
		OnStop: pick("on stop", 0, 0, 50*time.Millisecond, -1),
		OnKill: pick("on kill", 0, 0, time.Second, 9*time.Second),
	}
}

var letters = []string{"a", "b", "c", "d", "e"}

func genSpec(t *rapid.T, i int) Spec {
	sp := Spec{
		Name:           letters[i],
		Group:          rapid.SampledFrom([]string{"", "g", "h"}).Draw(t, "group"),
		Restart:        rapid.SampledFrom([]Policy{Always, Always, OnFailure, Never}).Draw(t, "policy"),
		MaxRestarts:    rapid.SampledFrom([]int{-1, 0, 1, 3}).Draw(t, "max"),
		Window:         rapid.SampledFrom([]time.Duration{0, 2 * time.Second, time.Minute}).Draw(t, "window"),
		Delay:          rapid.SampledFrom([]time.Duration{100 * time.Millisecond, time.Second}).Draw(t, "delay"),
		StartTimeout:   time.Second,
		ReadyTimeout:   rapid.SampledFrom([]time.Duration{0, time.Second}).Draw(t, "ready timeout"),
		OnReadyTimeout: rapid.SampledFrom([]ReadyAction{FailRun, TreatAsReady}).Draw(t, "on timeout"),
		Grace:          rapid.SampledFrom([]time.Duration{-1, 0, 200 * time.Millisecond}).Draw(t, "grace"),
		StopCodes:      []int{7},
	}
	if rapid.Bool().Draw(t, "backoff") {
		sp.Backoff = Backoff{Initial: 50 * time.Millisecond, Max: 2 * time.Second}
	}
	for range rapid.IntRange(0, 2).Draw(t, "deps") {
		sp.DependsOn = append(sp.DependsOn, Dep{
			On:        rapid.SampledFrom([]string{"a", "b", "c", "d", "e", "g", "zz"}).Draw(t, "on"),
			Condition: rapid.SampledFrom([]Condition{DepStarted, DepReady, DepCompleted}).Draw(t, "cond"),
		})
	}
	return sp
}

type op struct {
	wait  time.Duration
	kind  string
	names []string
	spec  int // for add and update
	code  int
}

type plan struct {
	opt     Options
	rnd     []float64
	specs   []Spec
	scripts [][]script
	ops     []op
}

func genPlan(t *rapid.T) plan {
	p := plan{
		opt: Options{
			Strategy:    rapid.SampledFrom([]Strategy{OneForOne, OneForOne, OneForAll, RestForOne}).Draw(t, "strategy"),
			MaxRestarts: rapid.SampledFrom([]int{0, 0, 4}).Draw(t, "sup max"),
			Nested:      rapid.IntRange(0, 2).Draw(t, "nested") == 0,
			Starts:      rapid.SampledFrom([]int{1, 2, 16}).Draw(t, "starts"),
		},
		rnd: rapid.SliceOfN(rapid.Float64Range(0.01, 0.999), 1, 4).Draw(t, "rand"),
	}
	n := rapid.IntRange(1, len(letters)).Draw(t, "children")
	for i := range n {
		p.specs = append(p.specs, genSpec(t, i))
		var l []script
		for range rapid.IntRange(1, 4).Draw(t, "scripts") {
			l = append(l, genScript(t))
		}
		p.scripts = append(p.scripts, l)
	}
	// Further specs are for updates.
	for range 2 {
		p.specs = append(p.specs, genSpec(t, rapid.IntRange(0, n-1).Draw(t, "of")))
	}
	for range rapid.IntRange(5, 40).Draw(t, "ops") {
		o := op{
			wait: rapid.SampledFrom(waits).Draw(t, "wait"),
			kind: rapid.SampledFrom([]string{"start", "start", "stop", "stop", "restart", "restart", "fail", "crash", "crash", "crash", "unready", "ready", "remove", "add", "add", "update", "reset", "all", "period", "replace", "replace", "replace", "failrun"}).Draw(t, "kind"),
			spec: rapid.IntRange(0, len(p.specs)-1).Draw(t, "spec"),
			code: rapid.SampledFrom([]int{0, 1, 7}).Draw(t, "code"),
		}
		for _, l := range letters[:n] {
			if rapid.IntRange(0, 2).Draw(t, "in") == 0 {
				o.names = append(o.names, l)
			}
		}
		p.ops = append(p.ops, o)
	}
	return p
}

// play carries the plan out and returns the first thing that is wrong.
func (p *plan) play(t *testing.T) error {
	w := newWorld()
	i := 0
	opt := p.opt
	opt.Rand = func() float64 { i++; return p.rnd[i%len(p.rnd)] }
	var told []Status // by OnChange: one call at a time
	opt.OnChange = func(st Status) { told = append(told, st) }
	s := New(opt)
	known := map[string]bool{}
	ctx, cancel := context.WithCancel(t.Context())
	defer cancel()
	add := func(sp Spec, started bool) {
		j := slices.Index(letters, sp.Name)
		if known[sp.Name] {
			return
		}
		if k := w.kids[sp.Name]; k == nil {
			w.kid(sp.Name, p.scripts[j]...)
		}
		sp.Child = w.kids[sp.Name]
		w.setWant(started, sp.Name)
		if err := s.Add(sp, started); err == nil {
			known[sp.Name] = true
		} else if !errors.Is(err, ErrCycle) && !errors.Is(err, ErrRemoved) {
			w.bad("add: %v", err)
		} else {
			w.setWant(false, sp.Name)
		}
	}
	// A nested supervisor is started and stopped as its parent would.
	var period Run
	idle := func(idle bool) {
		w.mu.Lock()
		w.idle = idle
		w.mu.Unlock()
	}
	begin := func() {
		idle(false)
		run, err := s.AsChild().Start(ctx, Attempt{})
		if err != nil {
			w.bad("nested: %v", err)
		}
		period = run
	}
	idle(opt.Nested)
	for j, sp := range p.specs[:len(p.scripts)] {
		add(sp, j%3 != 2)
	}
	for n, o := range p.ops {
		time.Sleep(o.wait)
		synctest.Wait()
		if period != nil && closed(period.Done()) {
			idle(true)
			if e := period.Exit(); e.Failed != strings.Contains(e.Err, "gave up") {
				w.bad("nested: %+v", e)
			}
			period = nil
		}
		w.check(s)
		if err := w.verdict(); err != nil {
			return fmt.Errorf("before op %d: %w", n, err)
		}
		var names []string
		for _, x := range o.names {
			if known[x] {
				names = append(names, x)
			}
		}
		if o.kind == "add" || o.kind == "update" {
			sp := p.specs[o.spec]
			if o.kind == "add" {
				add(sp, o.code != 0)
			} else if known[sp.Name] {
				sp.Child = w.kids[sp.Name]
				if err := s.Update(sp); err != nil && !errors.Is(err, ErrCycle) {
					return err
				}
			}
			continue
		}
		if o.kind == "period" && opt.Nested {
			switch {
			case period == nil:
				begin()
			case o.code == 0:
				idle(true)
				period.Kill("parent")
			default:
				idle(true)
				period.Stop("parent")
			}
			continue
		}
		if len(names) == 0 {
			continue
		}
		var err error
		switch o.kind {
		case "start":
			w.setWant(true, names...)
			err = s.Start(names...)
		case "stop":
			w.setWant(false, names...)
			err = s.Stop("", names...)
		case "restart":
			w.setWant(true, names...)
			err = s.Restart("", names...)
		case "all": // a burst at one instant: the last word counts
			w.setWant(true, names...)
			err = errors.Join(s.Restart("", names...), s.Start(names...), s.Restart("", names...))
			if o.code != 0 {
				err = errors.Join(err, s.Stop("", names...))
				w.setWant(false, names...) // not before: the starts above are under way
			}
		case "fail":
			err = s.Fail("probe", names...)
		case "failrun":
			for _, x := range names {
				if st, _ := s.Status(x); o.code == 0 {
					err = errors.Join(err, s.FailRun("probe", x, st.Run))
				} else {
					err = errors.Join(err, s.FailRun("probe", x, st.Beside))
				}
			}
		case "replace":
			for _, x := range names {
				c, stop := ctx, context.CancelFunc(func() {})
				if o.code == 7 {
					c, stop = context.WithTimeout(ctx, 300*time.Millisecond)
				}
				before, _ := s.Status(x)
				go func() {
					defer stop()
					rerr := s.Replace(c, x, "")
					w.replaced(s, before, rerr)
				}()
			}
		case "crash":
			for _, x := range names {
				w.crash(x, o.code)
			}
		case "ready", "unready":
			for _, x := range names {
				err = errors.Join(err, s.SetReady(x, o.kind == "ready", "probe"))
			}
		case "reset":
			err = s.Reset(names...)
		case "remove":
			w.setWant(false, names...)
			for _, x := range names {
				delete(known, x)
			}
			c, stop := context.WithTimeout(ctx, 5*time.Minute)
			done := make(chan error, 1)
			go func() { done <- s.Remove(c, names...) }()
			if o.code == 0 {
				synctest.Wait() // let it begin, go on beside it
				go func() {
					if err := <-done; err != nil && !errors.Is(err, ErrClosed) {
						w.mu.Lock()
						w.bad("remove: %v", err)
						w.mu.Unlock()
					}
					stop()
				}()
			} else {
				err = <-done
				stop()
			}
		}
		if err != nil {
			return fmt.Errorf("op %d %s %v: %w", n, o.kind, names, err)
		}
	}
	// From now on all starts succeed and all runs live on.
	w.mu.Lock()
	for _, k := range w.kids {
		k.calm = true
	}
	w.mu.Unlock()
	time.Sleep(time.Hour)
	synctest.Wait()
	if opt.Nested && (period == nil || closed(period.Done())) {
		begin()
		time.Sleep(time.Hour)
		synctest.Wait()
	}
	if period != nil && closed(period.Done()) {
		idle(true)
	}
	w.check(s)
	for _, st := range s.All() {
		ok := false
		switch st.State {
		case StateOnline, StateUnready:
			ok = st.Wanted
		case StateStarting: // allowed only to a run that never gets ready
			ok = st.Wanted && st.Run != nil && st.Run.(*fakeRun).sc.Ready < 0
		case StateStopped:
			ok = !st.Wanted || w.idle || st.LastExit != nil && st.Reason != ""
		case StateErrored:
			ok = st.Wanted && st.Reason != ""
		case StateWaiting:
			ok = st.Wanted && strings.HasPrefix(st.Reason, "waits for ") && p.reallyUnmet(s, st.Name)
		}
		if !ok {
			w.bad("%s: at rest it is %s (wanted %v): %s", st.Name, st.State, st.Wanted, st.Reason)
		}
	}
	if err := w.verdict(); err != nil {
		return fmt.Errorf("at rest: %w", err)
	}
	w.setWant(false, letters[:len(p.scripts)]...)
	if err := s.Shutdown(ctx); err != nil {
		return err
	}
	synctest.Wait()
	for _, st := range s.All() {
		if !Ended(st) || st.Run != nil {
			w.bad("%s: is %s after the shutdown", st.Name, st.State)
		}
	}
	if period != nil && !closed(period.Done()) {
		w.bad("nested: not done after the shutdown")
	}
	for name, k := range w.kids {
		if len(k.live)+k.calls > 0 {
			w.bad("%s: lives after the shutdown", name)
		}
	}
	last := map[string]State{}
	for _, st := range told {
		last[st.Name] = st.State
	}
	for _, st := range s.All() {
		if last[st.Name] != st.State {
			w.bad("%s: is %s, last told was %s", st.Name, st.State, last[st.Name])
		}
	}
	return w.verdict()
}

// reallyUnmet looks from outside whether a child has something to wait for.
func (p *plan) reallyUnmet(s *Supervisor, name string) bool {
	s.mu.Lock()
	deps := s.byName[name].spec.DependsOn
	s.mu.Unlock()
	all := s.All()
	for _, d := range deps {
		n := 0
		for _, st := range all {
			if st.Name != d.On && st.Group != d.On {
				continue
			}
			n++
			ok := st.State == StateOnline
			switch {
			case st.State == StateStopped && st.Completed:
				ok = true
			case d.Condition == DepStarted:
				ok = st.Run != nil && st.State != StateStopping
			case d.Condition == DepCompleted:
				ok = st.Completed
			}
			if !ok {
				return true
			}
		}
		if n == 0 {
			return true
		}
	}
	return false
}

func TestNeverTwiceNeverLostNeverUnasked(t *testing.T) {
	rapid.Check(t, func(rt *rapid.T) {
		p := genPlan(rt)
		var err error
		synctest.Test(t, func(t *testing.T) {
			if err = p.play(t); err != nil {
				rt.Log(err) // what is left of it would panic the bubble before it is told
			}
		})
		if err != nil {
			rt.Fatal(err)
		}
	})
}
