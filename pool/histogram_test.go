package pool

import (
	"math"
	"slices"
	"testing"
	"time"

	"pgregory.net/rapid"
)

// A quantile is as near to the true one as is promised.
func TestHistogramQuantiles(t *testing.T) {
	rapid.Check(t, func(t *rapid.T) {
		durations := rapid.SliceOfN(rapid.Custom(func(t *rapid.T) time.Duration {
			// Of any order of magnitude, not of any size.
			return time.Duration(rapid.Int64Range(0, 1<<rapid.IntRange(0, 48).Draw(t, "bits")-1).Draw(t, "ns"))
		}), 1, 300).Draw(t, "durations")
		var h, other histogram
		var s series
		var total time.Duration
		for i, d := range durations {
			if i%3 == 0 {
				other.add(d)
			} else {
				h.add(d)
			}
			s.add(d)
			if rapid.IntRange(0, 20).Draw(t, "turn") == 0 {
				s.turn()
			}
			total += d
		}
		h.merge(&other)
		slices.Sort(durations)
		for _, q := range []float64{0, 0.01, 0.5, 0.9, 0.99, 0.999, 1} {
			want := durations[max(int(math.Ceil(q*float64(len(durations)))), 1)-1]
			got := h.quantile(q)
			if off := (got - want).Abs(); off > max(32, want/32) {
				t.Fatalf("the quantile %v is %d, want %d", q, got, want)
			}
		}
		sum := h.sum()
		if sum.Count != uint64(len(durations)) || sum.Total != total || sum.Max != durations[len(durations)-1] || sum.Mean() != total/time.Duration(len(durations)) {
			t.Fatalf("%+v of %v", sum, durations)
		}
		if all := s.all(); all != sum {
			t.Fatalf("in turns %+v, at once %+v", all, sum)
		}
	})
}

// The buckets are in order, without gaps, and no duration is out of range.
func TestHistogramBuckets(t *testing.T) {
	for i := range buckets {
		if got := bucket(middle(i)); got != i {
			t.Fatalf("the middle of bucket %d is in %d", i, got)
		}
	}
	for bit := range 63 {
		for _, d := range []time.Duration{1<<bit - 1, 1 << bit, 1<<bit + 1} {
			i := bucket(d)
			if i < 0 || i >= buckets {
				t.Fatalf("%d is in bucket %d", d, i)
			}
			if off := (middle(i) - d).Abs(); bit < unitBits+maxBits && off > max(32, d/32) {
				t.Errorf("%d is in bucket %d of %d", d, i, middle(i))
			}
		}
	}
	var h histogram
	h.add(math.MinInt64)
	h.add(math.MaxInt64)
	if s := h.sum(); s.Max != math.MaxInt64 || s.P50 != 0 && s.P50 > 64 || s.P99 < 1<<47 {
		t.Errorf("%+v", s)
	}
}

// What was two turns ago is not recent.
func TestSeries(t *testing.T) {
	var s series
	if s.all() != (Times{}) || s.recent() != (Times{}) {
		t.Error("an empty series has counted")
	}
	for i, want := range []uint64{1, 2, 2, 2, 2} {
		s.add(time.Second)
		if r, a := s.recent(), s.all(); r.Count != want || a.Count != uint64(i+1) {
			t.Errorf("turn %d: %d recent, %d of all time", i, r.Count, a.Count)
		}
		s.turn()
	}
	for range 3 {
		s.turn()
	}
	if r, a := s.recent(), s.all(); r.Count != 0 || a.Count != 5 {
		t.Errorf("at the end: %d recent, %d of all time", r.Count, a.Count)
	}
}

func BenchmarkHistogram(b *testing.B) {
	var s series
	b.ReportAllocs()
	d := time.Duration(1)
	for b.Loop() {
		s.add(d)
		d = (d*5 + 7) & (1<<30 - 1)
	}
}
