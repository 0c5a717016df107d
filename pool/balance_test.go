package pool

import (
	"context"
	"fmt"
	"hash/maphash"
	"sync"
	"testing"
	"testing/synctest"
	"time"

	"pgregory.net/rapid"
)

var fakeSeed = maphash.MakeSeed()

// Whatever comes and goes, a worker with room is found, and the right one.
func TestReady(t *testing.T) {
	rapid.Check(t, func(t *rapid.T) {
		const concurrency = 3
		balance := Balance(rapid.IntRange(0, 2).Draw(t, "balance"))
		r := ready{balance: balance, first: make([]*worker, concurrency+1), last: make([]*worker, concurrency+1), least: concurrency + 1}
		workers := make([]*worker, rapid.IntRange(1, 200).Draw(t, "workers"))
		for i := range workers {
			workers[i] = &worker{slot: &slot{n: i}}
		}
		turn := -1
		for range rapid.IntRange(1, 100).Draw(t, "steps") {
			w := workers[rapid.IntRange(0, len(workers)-1).Draw(t, "worker")]
			if w.listed {
				r.remove(w)
			} else {
				w.load = rapid.IntRange(0, concurrency-1).Draw(t, "load")
				r.add(w)
			}
			n, least, next, first := 0, concurrency, -1, -1
			for i, w := range workers {
				if !w.listed {
					continue
				}
				n++
				least = min(least, w.load)
				if first < 0 {
					first = i
				}
				if next < 0 && i > turn {
					next = i
				}
			}
			got := r.pick()
			switch {
			case (got == nil) != (n == 0) || got != nil && !got.listed || r.n != n:
				t.Fatalf("pick: %v of %d", got, n)
			case got == nil:
			case balance == LeastBusy && got.load != least:
				t.Fatalf("a load of %d was picked, the least is %d", got.load, least)
			case balance == RoundRobin:
				if next < 0 {
					next = first
				}
				if got.slot.n != next {
					t.Fatalf("%d was picked after %d, want %d", got.slot.n, turn, next)
				}
				turn = next
			}
		}
	})
}

// A worker that comes or goes moves only the keys it gets or had, about its
// share, and one that is replaced has the same keys as the one before.
func TestRing(t *testing.T) {
	rapid.Check(t, func(t *rapid.T) {
		r := ring{seed: maphash.MakeSeed()}
		n := rapid.IntRange(2, 12).Draw(t, "workers")
		workers := make([]*worker, n)
		for i := range workers {
			workers[i] = &worker{slot: &slot{n: i}}
			r.add(workers[i])
		}
		all := func(*worker) bool { return true }
		const keys = 200
		owners := func() (o [keys]*worker) {
			for i := range o {
				o[i] = r.find(fmt.Sprint("key", i), all)
			}
			return o
		}
		before := owners()
		gone := workers[rapid.IntRange(0, n-1).Draw(t, "gone")]
		r.remove(gone)
		after := owners()
		had := 0
		for i := range before {
			if before[i] == gone {
				had++
			}
			if after[i] == gone || before[i] != gone && after[i] != before[i] {
				t.Fatalf("key %d moved from %d to %d when %d went", i, before[i].slot.n, after[i].slot.n, gone.slot.n)
			}
		}
		if had > 3*keys/n {
			t.Fatalf("one of %d workers had %d of %d keys", n, had, keys)
		}
		next := &worker{slot: gone.slot}
		r.add(next)
		for i, w := range owners() {
			if w != before[i] && (before[i] != gone || w != next) {
				t.Fatalf("key %d did not come back", i)
			}
		}
	})
}

func TestBalance(t *testing.T) {
	run := func(t *testing.T, o Options, tasks int, key func(int) string) (by map[int]int, ofKey map[string]map[int]int) {
		by, ofKey = map[int]int{}, map[string]map[int]int{}
		synctest.Test(t, func(t *testing.T) {
			p, _ := fakePool(t, o, false)
			defer func() { _ = p.Close(context.Background()) }()
			synctest.Wait()
			var wg sync.WaitGroup
			var mu sync.Mutex
			for i := range tasks {
				k := key(i)
				wg.Go(func() {
					r, err := p.Do(context.Background(), Task{Body: []byte("1s"), Key: k})
					if err != nil {
						t.Error(err)
						return
					}
					mu.Lock()
					defer mu.Unlock()
					by[r.PID]++
					if ofKey[k] == nil {
						ofKey[k] = map[int]int{}
					}
					ofKey[k][r.PID]++
				})
				synctest.Wait()
				time.Sleep(400 * time.Millisecond)
			}
			wg.Wait()
		})
		return by, ofKey
	}
	none := func(int) string { return "" }
	if by, _ := run(t, Options{Size: 5, Concurrency: 4}, 100, none); len(by) != 3 {
		t.Errorf("LeastBusy with three at a time: %v", by)
	}
	by, _ := run(t, Options{Size: 5, Concurrency: 4, Balance: RoundRobin}, 100, none)
	for pid, n := range by {
		if n != 20 {
			t.Errorf("RoundRobin gave worker %d %d of 100 tasks", pid, n)
		}
	}
	if by, _ := run(t, Options{Size: 5, Concurrency: 4, Balance: TwoChoices}, 100, none); len(by) != 5 {
		t.Errorf("TwoChoices: %v", by)
	}
	_, of := run(t, Options{Size: 5, Concurrency: 4, Balance: ConsistentHash}, 100, func(i int) string { return fmt.Sprint("k", i%7) })
	for k, by := range of {
		if len(by) != 1 {
			t.Errorf("ConsistentHash: the key %s by worker: %v", k, by)
		}
	}
	// One key alone: its worker is full, and others help.
	if by, _ := run(t, Options{Size: 3, Balance: ConsistentHash}, 30, func(int) string { return "hot" }); len(by) < 2 {
		t.Errorf("ConsistentHash of one key: %v", by)
	}
}

// Every worker that is up gets a broadcast once, busy ones when they have room.
func TestBroadcast(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		p, log := fakePool(t, Options{Size: 3, Spares: 1}, false)
		defer func() { _ = p.Close(context.Background()) }()
		synctest.Wait()
		var wg sync.WaitGroup
		do(p, &wg, 4, "10s")
		begin := time.Now()
		all, err := p.Broadcast(context.Background(), Task{Name: "b", Body: []byte("1s"), Priority: 1})
		if err != nil || len(all) != 4 {
			t.Fatalf("%v, %v", all, err)
		}
		pids := map[int]bool{}
		for _, r := range all {
			pids[r.PID] = true
			if r.Err != nil || string(r.Body) != "done" || r.Attempts != 1 {
				t.Errorf("%+v", r)
			}
		}
		if took := time.Since(begin); len(pids) != 4 || took != 11*time.Second {
			t.Errorf("%v after %s", pids, took)
		}
		wg.Wait()
		log.mu.Lock()
		n := 0
		for _, name := range log.started {
			if name == "b" {
				n++
			}
		}
		log.mu.Unlock()
		if n != 4 {
			t.Errorf("begun %d times", n)
		}
		// One that dies before its turn is not replaced in this.
		do(p, &wg, 3, "die")
		all, err = p.Broadcast(context.Background(), Task{Body: []byte("1s")})
		dead := 0
		for _, r := range all {
			if r.Err != nil {
				dead++
			}
		}
		if err != nil || len(all) != 4 || dead != 3 {
			t.Errorf("%+v, %v", all, err)
		}
		wg.Wait()
	})
}
