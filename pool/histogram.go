package pool

import (
	"math"
	"math/bits"
	"time"
)

// A histogram counts durations in buckets that are a sixteenth of a power of two
// wide, so that a quantile is off by a thirty-second (3.2 %) at most, or by 32
// nanoseconds where that is more. From 78 hours on all are one bucket.
const (
	unitBits = 6  // durations count in units of 64 nanoseconds
	subBits  = 4  // sixteen buckets for each power of two
	maxBits  = 42 // of the largest duration in units that has a bucket of its own
	buckets  = (maxBits - subBits + 1) << subBits
)

type histogram struct {
	n     uint64
	total time.Duration
	max   time.Duration
	by    [buckets]uint64
}

func bucket(d time.Duration) int {
	v := min(uint64(d)>>unitBits, 1<<maxBits-1)
	if v < 1<<subBits {
		return int(v)
	}
	shift := bits.Len64(v) - subBits - 1
	return shift<<subBits + int(v>>shift)
}

// middle is the middle of what a bucket holds.
func middle(i int) time.Duration {
	low, width := uint64(i), uint64(1)
	if i >= 2<<subBits {
		shift := i>>subBits - 1
		low, width = uint64(i-shift<<subBits)<<shift, 1<<shift
	}
	return time.Duration((low << unitBits) + (width << unitBits >> 1))
}

func (h *histogram) add(d time.Duration) {
	d = max(d, 0)
	h.n++
	h.total += d
	h.max = max(h.max, d)
	h.by[bucket(d)]++
}

// merge adds what o has counted.
func (h *histogram) merge(o *histogram) {
	if o.n == 0 {
		return
	}
	h.n += o.n
	h.total += o.total
	h.max = max(h.max, o.max)
	for i, n := range o.by {
		h.by[i] += n
	}
}

// quantile returns a duration that the share q of all do not exceed.
func (h *histogram) quantile(q float64) time.Duration {
	rank := max(uint64(math.Ceil(q*float64(h.n))), 1)
	var seen uint64
	for i, n := range h.by {
		if seen += n; seen >= rank {
			return min(middle(i), h.max)
		}
	}
	return h.max
}

func (h *histogram) sum() Times {
	if h.n == 0 {
		return Times{}
	}
	return Times{
		Count: h.n, Total: h.total, Max: h.max,
		P50: h.quantile(0.5), P90: h.quantile(0.9), P99: h.quantile(0.99), P999: h.quantile(0.999),
	}
}

// series is a histogram of all time and of lately: of the turn that has begun
// and the one before. It takes no memory before the first add.
type series struct{ past, last, now *histogram }

func (s *series) add(d time.Duration) {
	if s.now == nil {
		s.now = new(histogram)
	}
	s.now.add(d)
}

// turn begins a new turn.
func (s *series) turn() {
	spare := s.last
	if spare != nil && spare.n > 0 {
		if s.past == nil {
			s.past, spare = spare, nil
		} else {
			s.past.merge(spare)
			*spare = histogram{}
		}
	}
	s.last, s.now = s.now, spare
}

func (s *series) recent() Times { return merged(s.last, s.now).sum() }
func (s *series) all() Times    { return merged(s.past, s.last, s.now).sum() }

func merged(of ...*histogram) *histogram {
	var sum histogram
	for _, h := range of {
		if h != nil {
			sum.merge(h)
		}
	}
	return &sum
}
