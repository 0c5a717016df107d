package pool

import (
	"testing"
	"time"

	"pgregory.net/rapid"
)

// What is summed up, of all time and lately, is what a model finds that looks at
// each twenty milliseconds.
func TestUsageModel(t *testing.T) {
	rapid.Check(t, func(t *rapid.T) {
		type level struct{ want, up, busy, taken, waiting int }
		var (
			want, taken, waiting int
			u                    = usage{want: &want, taken: &taken, waiting: &waiting}
			start                = time.Unix(1000, 0)
			now                  = start
			past                 []level // by tick
			ended                []int64 // tasks, the tick
			turn                 = int64(turnTime / (20 * time.Millisecond))
			places               = rapid.IntRange(1, 4).Draw(t, "places")
			tick                 = 20 * time.Millisecond
		)
		u.advance(now)
		for range rapid.IntRange(1, 30).Draw(t, "steps") {
			for range rapid.IntRange(0, int(turn)*2/(1+rapid.IntRange(0, 9).Draw(t, "pace"))).Draw(t, "ticks") {
				past = append(past, level{want, u.up, u.busy, taken, waiting})
				now = now.Add(tick)
			}
			u.advance(now)
			if rapid.Bool().Draw(t, "task") {
				u.ran(time.Second, 2*time.Second, time.Second, 7)
				ended = append(ended, int64(len(past)))
			}
			up := rapid.IntRange(0, 3).Draw(t, "up")
			busy := rapid.IntRange(0, up).Draw(t, "busy")
			u.change(now.Add(-time.Duration(rapid.IntRange(0, 5).Draw(t, "late"))*tick), busy-u.busy, up-u.up)
			want, waiting = rapid.IntRange(up, 4).Draw(t, "want"), rapid.IntRange(0, 2).Draw(t, "waiting")
			taken = busy * rapid.IntRange(0, places).Draw(t, "taken")
		}
		sum := func(from int64) (s sums) {
			for _, l := range past[from:] {
				s.elapsed += tick
				s.want += tick * time.Duration(l.want)
				s.up += tick * time.Duration(l.up)
				s.busy += tick * time.Duration(l.busy)
				s.taken += tick * time.Duration(l.taken)
				if l.waiting > 0 {
					s.waited += tick
				}
			}
			for _, at := range ended {
				if at >= from {
					s.moved += 7
					s.told += 2 * time.Second
					s.took += time.Second
				}
			}
			return s
		}
		if got, want := u.sums, sum(0); got != want {
			t.Fatalf("of all time %+v, want %+v", got, want)
		}
		from := max(int64(len(past))/turn-1, 0) * turn
		s := sum(from)
		got, w := u.recent(places), Recent{
			Bytes: min(s.moved, 7), Span: s.elapsed, Utilization: share(s.taken, s.up*time.Duration(places)), Missing: share(s.want-s.up, s.want),
			Waiting: share(s.waited, s.elapsed), Overhead: share(s.told-s.took, s.told), Handling: share(s.took, s.busy),
		}
		if n := uint64(s.told / (2 * time.Second)); got.Run.Count != n || got.IPC.Count != n || got.Wait.Count != n {
			t.Fatalf("%d tasks lately, want %d", got.Run.Count, n)
		}
		got.Wait, got.Run, got.IPC = Times{}, Times{}, Times{}
		if got != w {
			t.Fatalf("lately %+v, want %+v", got, w)
		}
	})
}
